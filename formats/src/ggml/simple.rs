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
    let mut qh = 0;
    for (j, &code) in codes[..32].iter().enumerate() {
        qh |= u32::from(code >> 4 & 1) << j;
    }
    (qh.to_le_bytes(), join_nibbles(codes))
}

/// Smallest and largest of 32 values. Of `−0` and `0`, the first stands for both.
#[inline(always)]
pub(super) fn extremes(values: &[f32]) -> (f32, f32) {
    let (low, high) = fold(values);
    let first_zero = || values.iter().copied().find(|&x| x == 0.0).unwrap_or(0.0);
    (if low == 0.0 { first_zero() } else { low }, high)
}

/// The value of the largest magnitude, with its sign; the first of several.
#[inline(always)]
pub(super) fn signed_peak(values: &[f32]) -> f32 {
    let (low, high) = fold(values);
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
    let mut lanes = [0.0f32; 16];
    for part in values.chunks_exact(16) {
        for (lane, x) in lanes.iter_mut().zip(part) {
            *lane = if x.abs() > *lane { x.abs() } else { *lane };
        }
    }
    lanes.into_iter().fold(0.0, f32::max)
}

/// Smallest and largest, over 16 lanes side by side.
#[inline(always)]
fn fold(values: &[f32]) -> (f32, f32) {
    let mut low: [f32; 16] = values[..16].try_into().expect("16 values");
    let mut high = low;
    for part in values[16..].chunks_exact(16) {
        for j in 0..16 {
            low[j] = if part[j] < low[j] { part[j] } else { low[j] };
            high[j] = if part[j] > high[j] { part[j] } else { high[j] };
        }
    }
    (low.into_iter().fold(low[0], f32::min), high.into_iter().fold(high[0], f32::max))
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
        *code = (((x - shift) * inverse + bias) as i32).clamp(0, top) as u8;
    }
    codes
}

/// `y` rounded to the nearest integer, ties away from zero.
#[inline(always)]
pub(super) fn round(y: f32) -> i32 {
    let whole = y as i32;
    let rest = y - whole as f32;
    whole + i32::from(rest >= 0.5) - i32::from(rest <= -0.5)
}
