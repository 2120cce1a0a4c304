//! TQ2_0: 256 weights of −1, 0 or 1 times `d`, `y = d · (q − 1)`; two bits a weight in the order of Q2_K.

use super::q2_k::{join_pairs, split_pairs};
use super::tq1_0::{TERNARY, ternary};
use super::{Block, BlockScales, Encode, Encoding, GgmlType, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::with_encoder::<BlockTQ2>(35, "TQ2_0");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockTQ2 {
    qs: [u8; 64],
    d: [u8; 2],
}

const _: () = assert!(size_of::<BlockTQ2>() == 66);

// SAFETY: bytes only.
unsafe impl Block for BlockTQ2 {
    const LEN: usize = 256;
    const ENCODING: Encoding = TERNARY;

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        BlockTQ2 { qs: join_pairs(codes), d: to_half(scales.d) }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_pairs(&self.qs, codes);
        BlockScales { d: half(self.d), ..BlockScales::default() }
    }
}

impl Encode for BlockTQ2 {
    #[inline(always)]
    fn encode(values: &[f32]) -> Self {
        let (d, codes) = ternary(values);
        BlockTQ2::pack(&BlockScales { d, ..BlockScales::default() }, &codes)
    }
}
