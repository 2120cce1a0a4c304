//! Q5_K: a superblock of 256 weights in 8 groups of 32, `y = (d · sc) · q − dmin · mn`.
//!
//! Scales, mins and the low four bits of the codes lie as in Q4_K; bit `g` of `qh[l]` is bit 4 of weight `l` of group `g`.

use super::q4_k::{join_halves, join_scales, split_halves, split_scales};
use super::{Block, BlockScales, Encoding, GgmlType, Levels, Offset, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ5K>(13, "Q5_K");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ5K {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; 12],
    qh: [u8; 32],
    qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ5K>() == 176);

// SAFETY: bytes only.
unsafe impl Block for BlockQ5K {
    const LEN: usize = 256;
    const ENCODING: Encoding = Encoding::superblocks(Levels::unsigned(5), 32, 0, 63).with(Offset::SubMin { max: 63 });

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        let mut qh = [0; 32];
        for (group, codes) in codes[..256].chunks_exact(32).enumerate() {
            for (high, code) in qh.iter_mut().zip(codes) {
                *high |= (code >> 4 & 1) << group;
            }
        }
        BlockQ5K {
            d: to_half(scales.d),
            dmin: to_half(scales.m),
            scales: join_scales(scales),
            qh,
            qs: join_halves(codes),
        }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_halves(&self.qs, codes);
        for (group, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, high) in codes.iter_mut().zip(&self.qh) {
                *code |= (high >> group & 1) << 4;
            }
        }
        split_scales(half(self.d), half(self.dmin), &self.scales)
    }
}
