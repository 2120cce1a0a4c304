//! Q5_1: 32 weights, `y = d · q + m`; codes as in Q5_0.

use super::simple::{cut, extremes, inverse, join_fives, split_fives};
use super::{Block, BlockScales, Encode, Encoding, Float, GgmlType, Levels, Offset, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::with_encoder::<BlockQ5_1>(7, "Q5_1");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ5_1 {
    d: [u8; 2],
    m: [u8; 2],
    qh: [u8; 4],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_1>() == 24);

// SAFETY: bytes only.
unsafe impl Block for BlockQ5_1 {
    const LEN: usize = 32;
    const ENCODING: Encoding = Encoding::ggml(Levels::unsigned(5), 32).with(Offset::Min(Float::F16));

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        let (qh, qs) = join_fives(codes);
        BlockQ5_1 { d: to_half(scales.d), m: to_half(-scales.m), qh, qs }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_fives(&self.qs, self.qh, codes);
        BlockScales { d: half(self.d), m: -half(self.m), ..BlockScales::default() }
    }
}

impl Encode for BlockQ5_1 {
    #[inline(always)]
    fn encode(values: &[f32]) -> Self {
        let (low, high) = extremes(values);
        let d = (high - low) / 31.0;
        let codes = inverse(d).map_or([0; 32], |inverse| cut(values, low, inverse, 0.5, 31));
        let (qh, qs) = join_fives(&codes);
        BlockQ5_1 { d: to_half(d), m: to_half(low), qh, qs }
    }
}
