//! Q4_0: 32 weights, `y = d · (q − 8)`; byte `j` holds weights `j` (low nibble) and `j + 16`.

use super::simple::{cut, inverse, join_nibbles, signed_peak, split_nibbles};
use super::{Block, BlockScales, Encode, Encoding, GgmlType, Levels, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::with_encoder::<BlockQ4_0>(2, "Q4_0");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ4_0 {
    d: [u8; 2],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_0>() == 18);

// SAFETY: bytes only.
unsafe impl Block for BlockQ4_0 {
    const LEN: usize = 32;
    const ENCODING: Encoding = Encoding::ggml(Levels::signed(4), 32);

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        BlockQ4_0 { d: to_half(scales.d), qs: join_nibbles(codes) }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_nibbles(&self.qs, codes);
        BlockScales { d: half(self.d), ..BlockScales::default() }
    }
}

impl Encode for BlockQ4_0 {
    #[inline(always)]
    fn encode(values: &[f32]) -> Self {
        let d = signed_peak(values) / -8.0;
        let codes = match inverse(d) {
            Some(inverse) => cut(values, 0.0, inverse, 8.5, 15),
            None => [if d == 0.0 { 8 } else { 0 }; 32],
        };
        BlockQ4_0 { d: to_half(d), qs: join_nibbles(&codes) }
    }
}
