//! Q8_0: 32 weights, `y = d · q` with signed bytes `q`.

use super::simple::{inverse, peak, round};
use super::{Block, BlockScales, Encode, Encoding, GgmlType, Levels, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::with_encoder::<BlockQ8_0>(8, "Q8_0");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ8_0 {
    d: [u8; 2],
    qs: [u8; 32],
}

const _: () = assert!(size_of::<BlockQ8_0>() == 34);

// SAFETY: bytes only.
unsafe impl Block for BlockQ8_0 {
    const LEN: usize = 32;
    const ENCODING: Encoding = Encoding::ggml(Levels::signed(8), 32);

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        let mut qs = [0; 32];
        for (q, code) in qs.iter_mut().zip(codes) {
            *q = code ^ 0x80;
        }
        BlockQ8_0 { d: to_half(scales.d), qs }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        for (code, q) in codes.iter_mut().zip(&self.qs) {
            *code = q ^ 0x80;
        }
        BlockScales { d: half(self.d), ..BlockScales::default() }
    }
}

impl Encode for BlockQ8_0 {
    #[inline(always)]
    fn encode(values: &[f32]) -> Self {
        let d = peak(values) / 127.0;
        let inverse = inverse(d).unwrap_or(0.0);
        let mut qs = [0; 32];
        for (q, x) in qs.iter_mut().zip(values) {
            *q = round(x * inverse) as u8;
        }
        BlockQ8_0 { d: to_half(d), qs }
    }
}
