//! Q6_K: a superblock of 256 weights in 16 groups of 16, `y = (d · scale) · (q − 32)` with signed 8-bit scales.
//!
//! Weight `i = 128·h + 32·j + l` has its low four bits in `ql[64·h + 32·(j % 2) + l]`, the low nibble for `j < 2`, and its
//! high two in bits `2j, 2j + 1` of `qh[32·h + l]`.

use super::{Block, BlockScales, Encoding, GgmlType, Levels, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ6K>(14, "Q6_K");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ6K {
    ql: [u8; 128],
    qh: [u8; 64],
    scales: [u8; 16],
    d: [u8; 2],
}

const _: () = assert!(size_of::<BlockQ6K>() == 210);

// SAFETY: bytes only.
unsafe impl Block for BlockQ6K {
    const LEN: usize = 256;
    const ENCODING: Encoding = Encoding::superblocks(Levels::signed(6), 16, -128, 127);

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        let (mut ql, mut qh) = ([0; 128], [0; 64]);
        for (part, codes) in codes[..256].chunks_exact(32).enumerate() {
            let (h, j) = (part / 4, part % 4);
            for (q, code) in ql[64 * h + 32 * (j % 2)..][..32].iter_mut().zip(codes) {
                *q |= (code & 15) << (4 * (j / 2));
            }
            for (q, code) in qh[32 * h..][..32].iter_mut().zip(codes) {
                *q |= (code >> 4 & 3) << (2 * j);
            }
        }
        BlockQ6K { ql, qh, scales: scales.scales.map(|scale| scale as u8), d: to_half(scales.d) }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
            let (h, j) = (part / 4, part % 4);
            let low = &self.ql[64 * h + 32 * (j % 2)..][..32];
            let high = &self.qh[32 * h..][..32];
            for ((code, low), high) in codes.iter_mut().zip(low).zip(high) {
                *code = low >> (4 * (j / 2)) & 15 | (high >> (2 * j) & 3) << 4;
            }
        }
        BlockScales { d: half(self.d), scales: self.scales.map(|scale| scale as i8), ..BlockScales::default() }
    }
}
