//! Q5_0: 32 weights, `y = d · (q − 16)`; low four bits as in Q4_0, bit `j` of `qh` is bit 4 of weight `j`.

use super::simple::{cut, inverse, join_fives, signed_peak, split_fives};
use super::{Block, BlockScales, Encode, Encoding, GgmlType, Levels, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::with_encoder::<BlockQ5_0>(6, "Q5_0");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ5_0 {
    d: [u8; 2],
    qh: [u8; 4],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_0>() == 22);

// SAFETY: bytes only.
unsafe impl Block for BlockQ5_0 {
    const LEN: usize = 32;
    const ENCODING: Encoding = Encoding::ggml(Levels::signed(5), 32);

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        let (qh, qs) = join_fives(codes);
        BlockQ5_0 { d: to_half(scales.d), qh, qs }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_fives(&self.qs, self.qh, codes);
        BlockScales { d: half(self.d), ..BlockScales::default() }
    }
}

impl Encode for BlockQ5_0 {
    #[inline(always)]
    fn encode(values: &[f32]) -> Self {
        let d = signed_peak(values) / -16.0;
        let codes = match inverse(d) {
            Some(inverse) => cut(values, 0.0, inverse, 16.5, 31),
            None => [if d == 0.0 { 16 } else { 0 }; 32],
        };
        let (qh, qs) = join_fives(&codes);
        BlockQ5_0 { d: to_half(d), qh, qs }
    }
}
