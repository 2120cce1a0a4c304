//! Q2_K: a superblock of 256 weights in 16 groups of 16, `y = (d · sc) · q − dmin · mn` with 4-bit `sc` and `mn`.
//!
//! `scales[g]` holds `sc` of group `g` in its low nibble and `mn` in its high one. Weight `i = 128·h + 32·j + l` has its
//! code in bits `2j, 2j + 1` of `qs[32·h + l]`.

use super::{Block, BlockScales, Encoding, GgmlType, Levels, Offset, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ2K>(10, "Q2_K");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ2K {
    scales: [u8; 16],
    qs: [u8; 64],
    d: [u8; 2],
    dmin: [u8; 2],
}

const _: () = assert!(size_of::<BlockQ2K>() == 84);

// SAFETY: bytes only.
unsafe impl Block for BlockQ2K {
    const LEN: usize = 256;
    const ENCODING: Encoding = Encoding::superblocks(Levels::unsigned(2), 16, 0, 15).with(Offset::SubMin { max: 15 });

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        let mut block =
            BlockQ2K { scales: [0; 16], qs: join_pairs(codes), d: to_half(scales.d), dmin: to_half(scales.m) };
        for (g, byte) in block.scales.iter_mut().enumerate() {
            *byte = scales.scales[g] as u8 & 15 | scales.mins[g] << 4;
        }
        block
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_pairs(&self.qs, codes);
        BlockScales {
            d: half(self.d),
            m: half(self.dmin),
            scales: self.scales.map(|byte| (byte & 15) as i8),
            mins: self.scales.map(|byte| byte >> 4),
        }
    }
}

/// The 2-bit codes of Q2_K and TQ2_0, and the low bits of Q3_K's.
#[inline(always)]
pub(super) fn split_pairs(qs: &[u8; 64], codes: &mut [u8]) {
    for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (code, q) in codes.iter_mut().zip(&qs[32 * (part / 4)..][..32]) {
            *code = q >> (2 * (part % 4)) & 3;
        }
    }
}

/// The reverse of [`split_pairs`]; higher bits of the codes are dropped.
#[inline(always)]
pub(super) fn join_pairs(codes: &[u8]) -> [u8; 64] {
    let mut qs = [0; 64];
    for (part, codes) in codes[..256].chunks_exact(32).enumerate() {
        for (q, code) in qs[32 * (part / 4)..][..32].iter_mut().zip(codes) {
            *q |= (code & 3) << (2 * (part % 4));
        }
    }
    qs
}
