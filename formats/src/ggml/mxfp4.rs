//! MXFP4: 32 weights, `y = 2^(e − 128) · LEVELS[q]`; nibbles in the order of Q4_0.
//!
//! Codes are 4-bit floats of two exponent bits and one mantissa bit. The levels are twice their values, to be integers;
//! that is why the exponent's bias is 128, not 127.

use crate::encoding::reals;

use super::iq4_nl::look_up;
use super::simple::{join_nibbles, peak, split_nibbles};
use super::{Block, BlockScales, Encode, Encoding, Float, GgmlType, Levels, Scale};

pub(super) const TYPE: GgmlType = GgmlType::with_encoder::<BlockMXFP4>(39, "MXFP4");

static LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The same as reals.
static TABLE: [f32; 16] = reals(&LEVELS);

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockMXFP4 {
    e: u8,
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockMXFP4>() == 17);

// SAFETY: bytes only.
unsafe impl Block for BlockMXFP4 {
    const LEN: usize = 32;
    const ENCODING: Encoding = Encoding { scale: Scale::Own(Float::E8M0), ..Encoding::ggml(Levels::Table(&TABLE), 32) };

    #[inline(always)]
    fn decode(&self, out: &mut [f32]) {
        look_up(power(self.e), &LEVELS, &self.qs, out);
    }

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        BlockMXFP4 { e: exponent(scales.d), qs: join_nibbles(codes) }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_nibbles(&self.qs, codes);
        BlockScales { d: power(self.e), ..BlockScales::default() }
    }
}

impl Encode for BlockMXFP4 {
    #[inline(always)]
    fn encode(values: &[f32]) -> Self {
        let e = reference_exponent(peak(values));
        let d = power(e);
        let mut codes = [0u8; 32];
        for (code, x) in codes.iter_mut().zip(values) {
            // Halfway between levels the lower one wins. Every product is exact.
            let mut magnitude = 0u32;
            for halfway in [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0] {
                magnitude += u32::from(x.abs() > halfway * d);
            }
            let sign = if magnitude > 0 { x.to_bits() >> 28 & 8 } else { 0 };
            *code = (magnitude | sign) as u8;
        }
        BlockMXFP4 { e, qs: join_nibbles(&codes) }
    }
}

/// `2^(e − 128)`, a subnormal for 0 and 1.
#[inline(always)]
fn power(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// The reverse of [`power`] for a power of two; otherwise the next below, and 0 for what is smaller or no positive number.
#[inline(always)]
fn exponent(d: f32) -> u8 {
    if d.is_nan() || d <= 0.0 {
        return 0;
    }
    match d.to_bits() >> 23 {
        0 => u8::from(d.to_bits() >= 0x0040_0000),
        e => (e + 1).min(255) as u8,
    }
}

/// `⌊log₂ peak⌋ − 2 + 127`, 0 for 0. Below 2⁻¹²⁵ it wraps around to a scale so large that every code is 0, as in ggml.
#[inline(always)]
fn reference_exponent(peak: f32) -> u8 {
    if peak.is_nan() || peak <= 0.0 {
        return 0;
    }
    let mantissa = peak.to_bits() & 0x007f_ffff;
    let floor = if peak >= f32::MIN_POSITIVE && mantissa < 0x007f_f000 {
        (peak.to_bits() >> 23) as i32 - 127
    } else {
        // Just below a power of two the single-precision logarithm that ggml takes rounds up to it.
        (f64::from(peak).log2() as f32).floor() as i32
    };
    (floor - 2 + 127) as u8
}
