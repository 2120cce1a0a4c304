//! The types that are not quantized.

use super::GgmlType;
use crate::tensor::{Dtype, widen};

pub(super) const F32: GgmlType =
    GgmlType { id: 0, name: "F32", block_len: 1, block_bytes: 4, decode: |bytes, out| plain(Dtype::F32, bytes, out) };
pub(super) const F16: GgmlType =
    GgmlType { id: 1, name: "F16", block_len: 1, block_bytes: 2, decode: |bytes, out| plain(Dtype::F16, bytes, out) };
pub(super) const BF16: GgmlType = GgmlType {
    id: 30,
    name: "BF16",
    block_len: 1,
    block_bytes: 2,
    decode: |bytes, out| plain(Dtype::BF16, bytes, out),
};

fn plain(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    widen(dtype, bytes, out).expect("a float type and lengths that were checked");
}

impl GgmlType {
    /// The element type when the values are stored as they are.
    pub fn plain(&self) -> Option<Dtype> {
        match self.id {
            0 => Some(Dtype::F32),
            1 => Some(Dtype::F16),
            30 => Some(Dtype::BF16),
            _ => None,
        }
    }
}
