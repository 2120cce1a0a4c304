//! IQ4_NL: 32 weights, `y = d · LEVELS[q]` with unevenly spaced levels; nibbles in the order of Q4_0.

use crate::encoding::reals;

use super::simple::{join_nibbles, split_nibbles};
use super::{Block, BlockScales, Encoding, GgmlType, Levels, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockIQ4NL>(20, "IQ4_NL");

/// The levels of IQ4_NL and IQ4_XS.
pub(super) static LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The same as reals.
pub(super) static TABLE: [f32; 16] = reals(&LEVELS);

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockIQ4NL {
    d: [u8; 2],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockIQ4NL>() == 18);

// SAFETY: bytes only.
unsafe impl Block for BlockIQ4NL {
    const LEN: usize = 32;
    const ENCODING: Encoding = Encoding::ggml(Levels::Table(&TABLE), 32);

    #[inline(always)]
    fn decode(&self, out: &mut [f32]) {
        look_up(half(self.d), &LEVELS, &self.qs, out);
    }

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        BlockIQ4NL { d: to_half(scales.d), qs: join_nibbles(codes) }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_nibbles(&self.qs, codes);
        BlockScales { d: half(self.d), ..BlockScales::default() }
    }
}

/// `scale · levels[q]` for 32 nibbles; the 16 products are taken once.
#[inline(always)]
pub(super) fn look_up(scale: f32, levels: &[i8; 16], qs: &[u8; 16], out: &mut [f32]) {
    let mut values = [0.0; 16];
    for (value, &level) in values.iter_mut().zip(levels) {
        *value = scale * f32::from(level);
    }
    let (low, high) = out.split_at_mut(16);
    for ((q, low), high) in qs.iter().zip(low).zip(high) {
        *low = values[usize::from(q & 15)];
        *high = values[usize::from(q >> 4)];
    }
}
