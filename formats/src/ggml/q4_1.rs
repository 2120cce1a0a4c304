//! Q4_1: 32 weights, `y = d · q + m`; nibbles in the order of Q4_0.

use super::simple::{cut, extremes, inverse, join_nibbles, split_nibbles};
use super::{Block, BlockScales, Encode, Encoding, Float, GgmlType, Levels, Offset, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::with_encoder::<BlockQ4_1>(3, "Q4_1");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ4_1 {
    d: [u8; 2],
    m: [u8; 2],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_1>() == 20);

// SAFETY: bytes only.
unsafe impl Block for BlockQ4_1 {
    const LEN: usize = 32;
    const ENCODING: Encoding = Encoding::ggml(Levels::unsigned(4), 32).with(Offset::Min(Float::F16));

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        BlockQ4_1 { d: to_half(scales.d), m: to_half(-scales.m), qs: join_nibbles(codes) }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_nibbles(&self.qs, codes);
        BlockScales { d: half(self.d), m: -half(self.m), ..BlockScales::default() }
    }
}

impl Encode for BlockQ4_1 {
    #[inline(always)]
    fn encode(values: &[f32]) -> Self {
        let (low, high) = extremes(values);
        let d = (high - low) / 15.0;
        let codes = inverse(d).map_or([0; 32], |inverse| cut(values, low, inverse, 0.5, 15));
        BlockQ4_1 { d: to_half(d), m: to_half(low), qs: join_nibbles(&codes) }
    }
}
