//! What operations demand of what they are given, the same on every device.

use ndarray::Array2;

use crate::backend::{AttentionShape, BlockGrid, RopeLayout};
use crate::{Error, Result};

/// So many of something.
pub(crate) fn expect(op: &'static str, what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{expected} {what}"), found: found.to_string() })
}

/// `parts` parts of one size, or parts of that size.
pub(crate) fn expect_multiple(op: &'static str, parts: usize, whole: usize) -> Result<()> {
    if parts > 0 && whole.is_multiple_of(parts) {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("a multiple of {parts}"), found: whole.to_string() })
}

/// What values are limited to; `f32::clamp` would panic at others.
pub(crate) fn expect_limit(op: &'static str, limit: f32) -> Result<()> {
    if limit >= 0.0 {
        return Ok(());
    }
    Err(Error::Shape { op, expected: "a limit of at least 0".to_owned(), found: limit.to_string() })
}

/// Angles for every position of the sequences that `rows` consist of, and for heads of `cols`.
pub(crate) fn expect_rotation(
    [rows, cols]: [usize; 2],
    cos: &Array2<f32>,
    sin: &Array2<f32>,
    layout: &RopeLayout,
    lengths: &[usize],
) -> Result<()> {
    expect("rope", "tokens", rows, lengths.iter().sum())?;
    expect_multiple("rope", layout.head_dim, cols)?;
    expect("rope", "sines", cos.len(), sin.len())?;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    if longest > cos.nrows() || layout.first + 2 * cos.ncols() > layout.head_dim {
        return Err(Error::Shape {
            op: "rope",
            expected: format!("angles for {longest} positions and for heads of {} values", layout.head_dim),
            found: format!("{} positions, {} values from {}", cos.nrows(), 2 * cos.ncols(), layout.first),
        });
    }
    Ok(())
}

/// Queries, keys and values, each `[tokens, features]`, that fit the layer and the sequences.
pub(crate) fn expect_attention(
    qkv: [[usize; 2]; 3],
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    lengths: &[usize],
) -> Result<()> {
    let AttentionShape { heads, kv_heads, head_dim, value_dim, window, chunk, .. } = *shape;
    expect_multiple("attention", kv_heads, heads)?;
    if window == Some(0) || chunk == Some(0) {
        let expected = "a window and a chunk of some positions".to_owned();
        return Err(Error::Shape { op: "attention", expected, found: "0".to_owned() });
    }
    expect("attention", "query features", heads * head_dim, qkv[0][1])?;
    expect("attention", "key features", kv_heads * head_dim, qkv[1][1])?;
    expect("attention", "value features", kv_heads * value_dim, qkv[2][1])?;
    for [tokens, _] in qkv {
        expect("attention", "tokens", lengths.iter().sum(), tokens)?;
    }
    sinks.map_or(Ok(()), |sinks| expect("attention", "sinks", heads, sinks.len()))
}

/// Codes `[rows, cols]` of the blocks of a grid.
pub(crate) fn expect_blocks(op: &'static str, [rows, cols]: [usize; 2], grid: &BlockGrid) -> Result<()> {
    expect(op, "rows", grid.rows, rows)?;
    expect(op, "columns", grid.cols, cols)?;
    expect_multiple(op, grid.ty.block_len, cols)?;
    expect(op, "blocks", rows * (cols / grid.ty.block_len), grid.blocks.len())?;
    if grid.ty.layout().is_none() {
        return Err(Error::Shape { op, expected: "a type with blocks".to_owned(), found: grid.ty.to_string() });
    }
    Ok(())
}
