//! TQ1_0: 256 weights of −1, 0 or 1 times `d`, five a byte.
//!
//! A byte is `⌈256/243 · v⌉` of the base-3 number `v` of five codes, the first the most significant; code `n` is the whole
//! part of `3 · (byte · 3ⁿ mod 256) / 256`. Bytes and the weights they hold:
//!
//! ```text
//! qs[0..32]    weights 0..160:    n·32 + m in byte m
//! qs[32..48]   weights 160..240:  160 + n·16 + m in byte 32 + m
//! qh[0..4]     weights 240..256:  240 + n·4 + m in byte m, four codes and a 0
//! ```

use super::simple::{inverse, peak, round};
use super::{Block, BlockScales, Encode, Encoding, GgmlType, Levels, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::with_encoder::<BlockTQ1>(34, "TQ1_0");

/// What both ternary types stand for.
pub(super) const TERNARY: Encoding = Encoding::ggml(Levels::Integer { codes: 3, zero: 1 }, 256);

const POWERS: [u8; 5] = [1, 3, 9, 27, 81];

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockTQ1 {
    qs: [u8; 48],
    qh: [u8; 4],
    d: [u8; 2],
}

const _: () = assert!(size_of::<BlockTQ1>() == 54);

// SAFETY: bytes only.
unsafe impl Block for BlockTQ1 {
    const LEN: usize = 256;
    const ENCODING: Encoding = TERNARY;

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        let (mut qs, mut qh) = ([0; 48], [0; 4]);
        let (first, rest) = qs.split_at_mut(32);
        join(first, &codes[..160]);
        join(rest, &codes[160..240]);
        join(&mut qh, &codes[240..256]);
        BlockTQ1 { qs, qh, d: to_half(scales.d) }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split(&self.qs[..32], &mut codes[..160]);
        split(&self.qs[32..], &mut codes[160..240]);
        split(&self.qh, &mut codes[240..256]);
        BlockScales { d: half(self.d), ..BlockScales::default() }
    }
}

impl Encode for BlockTQ1 {
    #[inline(always)]
    fn encode(values: &[f32]) -> Self {
        let (d, codes) = ternary(values);
        BlockTQ1::pack(&BlockScales { d, ..BlockScales::default() }, &codes)
    }
}

/// The reference encoder of both ternary types: the largest magnitude, and codes rounded to a multiple of it.
#[inline(always)]
pub(super) fn ternary(values: &[f32]) -> (f32, [u8; 256]) {
    let d = peak(values);
    let inverse = inverse(d).unwrap_or(0.0);
    let mut codes = [0; 256];
    for (code, x) in codes.iter_mut().zip(values) {
        *code = (round(x * inverse) + 1) as u8;
    }
    (d, codes)
}

#[inline(always)]
fn split(bytes: &[u8], codes: &mut [u8]) {
    for (codes, power) in codes.chunks_exact_mut(bytes.len()).zip(POWERS) {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
        }
    }
}

#[inline(always)]
fn join(bytes: &mut [u8], codes: &[u8]) {
    let len = bytes.len();
    for (codes, power) in codes.chunks_exact(len).zip(POWERS) {
        for (byte, code) in bytes.iter_mut().zip(codes) {
            *byte = byte.wrapping_add(code.wrapping_mul(81 / power));
        }
    }
    for byte in bytes {
        *byte = (u16::from(*byte) * 256).div_ceil(243) as u8;
    }
}
