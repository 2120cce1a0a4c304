//! What the types with blocks of 32 share: the order of their nibbles, their fifth bits, and the reference roundings.
//!
//! The reference encoders multiply by `1 / d` in `f32`, taken before `d` is rounded to a half. Where `d` is so small that
//! `1 / d` is infinite, ggml's products are no numbers and its codes are 0; `inverse` and the roundings keep that.

/// The low nibbles of 16 bytes, then the high ones.
#[inline(always)]
pub(super) fn split_nibbles(qs: &[u8; 16], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(16);
    for ((&q, low), high) in qs.iter().zip(low).zip(high) {
        *low = q & 15;
        *high = q >> 4;
    }
}

/// The reverse of [`split_nibbles`]; higher bits of the codes are dropped.
#[inline(always)]
pub(super) fn join_nibbles(codes: &[u8]) -> [u8; 16] {
    let (low, high) = codes[..32].split_at(16);
    let mut qs = [0; 16];
    for ((q, low), high) in qs.iter_mut().zip(low).zip(high) {
        *q = low & 15 | high << 4;
    }
    qs
}

/// The 5-bit codes of Q5_0 and Q5_1: bit `j` of `qh` is bit 4 of code `j`.
#[inline(always)]
pub(super) fn split_fives(qs: &[u8; 16], qh: [u8; 4], codes: &mut [u8]) {
    let qh = u32::from_le_bytes(qh);
    let (low, high) = codes.split_at_mut(16);
    for j in 0..16 {
        low[j] = qs[j] & 15 | ((qh >> j) << 4) as u8 & 16;
        high[j] = qs[j] >> 4 | (qh >> (j + 12)) as u8 & 16;
    }
}

/// The reverse of [`split_fives`].
#[inline(always)]
pub(super) fn join_fives(codes: &[u8]) -> ([u8; 4], [u8; 16]) {
    let mut qh = [0; 4];
    for (bits, codes) in qh.iter_mut().zip(codes[..32].chunks_exact(8)) {
        let codes = u64::from_le_bytes(codes.try_into().expect("eight codes"));
        // Moves bit 0 of byte i to bit 56 + i.
        *bits = ((codes >> 4 & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
    (qh, join_nibbles(codes))
}

/// Smallest and largest of 32 values. Of `−0` and `0`, the first counts as the smaller, as it does for ggml.
#[inline(always)]
pub(super) fn extremes(values: &[f32]) -> (f32, f32) {
    let (low, high) = smallest_and_largest(values);
    let first_zero = || values.iter().copied().find(|&x| x == 0.0).unwrap_or(0.0);
    (if low == 0.0 { first_zero() } else { low }, high)
}

/// The value of the largest magnitude, with its sign; the first of several.
#[inline(always)]
pub(super) fn signed_peak(values: &[f32]) -> f32 {
    let (low, high) = smallest_and_largest(values);
    if high > -low {
        high
    } else if high < -low {
        low
    } else {
        values.iter().copied().find(|x| x.abs() == high).unwrap_or(0.0)
    }
}

/// The largest magnitude.
#[inline(always)]
pub(super) fn peak(values: &[f32]) -> f32 {
    // Magnitudes order as their bits do, and the largest of integers is found side by side.
    f32::from_bits(values.iter().fold(0, |peak, x| peak.max(x.to_bits() & 0x7fff_ffff)))
}

/// `−0` counts as below `0`.
#[inline(always)]
fn smallest_and_largest(values: &[f32]) -> (f32, f32) {
    // As for `peak`; negative floats order in reverse. The mapping is its own inverse.
    let ordered = |bits: i32| bits ^ (bits >> 31) & 0x7fff_ffff;
    let (mut low, mut high) = (i32::MAX, i32::MIN);
    for x in values {
        let x = ordered(x.to_bits() as i32);
        (low, high) = (low.min(x), high.max(x));
    }
    (f32::from_bits(ordered(low) as u32), f32::from_bits(ordered(high) as u32))
}

/// `1 / d`, or `None` where there is no such number.
#[inline(always)]
pub(super) fn inverse(d: f32) -> Option<f32> {
    let inverse = 1.0 / d;
    inverse.is_finite().then_some(inverse)
}

/// Codes `(x − shift) · inverse + bias`, cut to an integer of at most `top`.
#[inline(always)]
pub(super) fn cut(values: &[f32], shift: f32, inverse: f32, bias: f32, top: i32) -> [u8; 32] {
    let mut codes = [0; 32];
    for (code, x) in codes.iter_mut().zip(values) {
        *code = whole((x - shift) * inverse + bias).clamp(0, top) as u8;
    }
    codes
}

/// `y` rounded to the nearest integer, ties away from zero; 0 for what is no number or beyond ±2²⁴.
#[inline(always)]
pub(super) fn round(y: f32) -> i32 {
    let cut = whole(y);
    let rest = y - cut as f32;
    cut + i32::from(rest >= 0.5) - i32::from(rest <= -0.5)
}

/// `y` without its fraction; 0 for what is no number or beyond ±2²⁴. `y as i32` would keep loops from being vectorized.
#[inline(always)]
fn whole(y: f32) -> i32 {
    let y = if y.abs() < 16_777_216.0 { y } else { 0.0 };
    // SAFETY: neither NaN nor beyond an i32.
    unsafe { y.to_int_unchecked() }
}
