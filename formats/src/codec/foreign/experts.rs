//! gpt-oss: the matrices of all experts in one tensor, as MXFP4.
//!
//! ```text
//! T_blocks  U8 [experts, out, groups, 16]   two E2M1 codes a byte, the low nibble first
//! T_scales  U8 [experts, out, groups]       exponents: 2^(e − 127)
//! ```
//!
//! The model's own tensor is `T [experts, in, out]` with `in = 32 · groups`: transposed.

use std::ops::Range;

use super::{Foreign, Layout, TensorLookup, need, power};
use crate::encoding::E2M1;
use crate::error::{Error, Result};
use crate::tensor::{Dtype, TensorView};

pub(super) fn find(stored: &str, view: &TensorView<'_>, tensors: &TensorLookup<'_, '_>) -> Result<Option<Foreign>> {
    let Some(name) = stored.strip_suffix("_blocks").filter(|_| view.dtype == Dtype::U8) else { return Ok(None) };
    let &[experts, rows, groups, 16] = view.shape else {
        return Err(Error::mismatch("its shape", "[experts, out, groups, 16]", format_args!("{:?}", view.shape)));
    };
    if view.data.is_empty() {
        return Err(Error::malformed("it has no values"));
    }
    let parts = vec![stored.to_owned(), format!("{name}_scales")];
    need(tensors, &parts[1])?.expect(&parts[1], Dtype::U8, &[experts, rows, groups])?;
    let shape = vec![experts, 32 * groups, rows];
    Ok(Some(Foreign { name: name.to_owned(), shape, kind: "mxfp4".into(), parts, layout: Layout::Experts }))
}

/// Experts `range`.
pub(super) fn read(
    shape: &[usize],
    parts: &[String],
    tensors: &TensorLookup<'_, '_>,
    range: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    let (blocks, scales) = (need(tensors, &parts[0])?.data, need(tensors, &parts[1])?.data);
    let (groups, rows) = (shape[1] / 32, shape[2]);
    for (expert, out) in range.zip(out.chunks_exact_mut(shape[1] * rows)) {
        for (group, out) in out.chunks_exact_mut(32 * rows).enumerate() {
            // Neighbouring rows write beside each other, so that the 32 lines stay in cache.
            for row in 0..rows {
                let at = (expert * rows + row) * groups + group;
                let scale = power(scales[at]);
                for (pair, byte) in blocks[16 * at..][..16].iter().enumerate() {
                    out[2 * pair * rows + row] = E2M1[usize::from(byte & 15)] * scale;
                    out[(2 * pair + 1) * rows + row] = E2M1[usize::from(byte >> 4)] * scale;
                }
            }
        }
    }
    Ok(())
}
