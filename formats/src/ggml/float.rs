//! The types that are not quantized.

use super::{EncodeFn, GgmlType};
use crate::encoding::{Encoding, Float, Store};
use crate::tensor::{Dtype, widen};
use half::f16;
use half::slice::HalfFloatSliceExt;

pub(super) const F32: GgmlType =
    plain_type(0, "F32", 4, Float::F32, |bytes, out| plain(Dtype::F32, bytes, out), to_f32);
pub(super) const F16: GgmlType =
    plain_type(1, "F16", 2, Float::F16, |bytes, out| plain(Dtype::F16, bytes, out), to_f16);
pub(super) const BF16: GgmlType =
    plain_type(30, "BF16", 2, Float::BF16, |bytes, out| plain(Dtype::BF16, bytes, out), to_bf16);

/// Whole numbers, as the experts that a table names; no weights are ever asked for in it.
pub(super) const I32: GgmlType = plain_type(26, "I32", 4, Float::F32, from_i32, to_i32);

const fn plain_type(
    id: u32,
    name: &'static str,
    block_bytes: usize,
    values: Float,
    decode: fn(&[u8], &mut [f32]),
    encode: EncodeFn,
) -> GgmlType {
    let encoding = Encoding { store: Store::Ggml(id), ..Encoding::plain(values) };
    GgmlType { id, name, block_len: 1, block_bytes, encoding, decode, encode: Some(encode), blocks: None }
}

fn plain(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    widen(dtype, bytes, out).expect("a float type and lengths that were checked");
}

fn from_i32(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
        *out = i32::from_le_bytes(*bytes) as f32;
    }
}

fn to_i32(values: &[f32], out: &mut [u8]) {
    for (out, value) in out.chunks_exact_mut(4).zip(values) {
        out.copy_from_slice(&(*value as i32).to_le_bytes());
    }
}

fn to_f32(values: &[f32], out: &mut [u8]) {
    for (out, value) in out.chunks_exact_mut(4).zip(values) {
        out.copy_from_slice(&value.to_le_bytes());
    }
}

/// Nearest, ties to even; beyond the largest half, infinite.
fn to_f16(values: &[f32], out: &mut [u8]) {
    let mut halves = [f16::ZERO; 1024];
    for (out, values) in out.chunks_mut(2 * halves.len()).zip(values.chunks(halves.len())) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        for (out, half) in out.chunks_exact_mut(2).zip(halves) {
            out.copy_from_slice(&half.to_le_bytes());
        }
    }
}

/// Nearest, ties to even; NaNs are made quiet.
fn to_bf16(values: &[f32], out: &mut [u8]) {
    for (out, value) in out.chunks_exact_mut(2).zip(values) {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        let quiet = (bits >> 16) as u16 | 64;
        out.copy_from_slice(&(if value.is_nan() { quiet } else { rounded }).to_le_bytes());
    }
}

impl GgmlType {
    /// The element type when the values are stored as they are.
    pub fn plain(&self) -> Option<Dtype> {
        match self.id {
            0 => Some(Dtype::F32),
            1 => Some(Dtype::F16),
            30 => Some(Dtype::BF16),
            26 => Some(Dtype::I32),
            _ => None,
        }
    }
}
