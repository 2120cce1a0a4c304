//! ggml's block types: the same rounding and the same sweep as for files of codes and scales, on the blocks' own grids.
//!
//! Scales and mins are found first, as the blocks will store them (see `kernels::ops::blocks`); codes come second. So the
//! sweep needs nothing new: a static grid, any order of columns. At the end both are moved once more wherever the loss
//! falls (see `kernels::ops::refine`).

use formats::GgmlType;
use kernels::{Backend, Error, Result, Swept};
use ndarray::Array2;
use rayon::prelude::*;

use super::{Shared, measure};

/// One linear in blocks, and how good it is.
pub struct BlockSolution<B: Backend> {
    /// Rows of blocks, as the file holds them.
    pub packed: Vec<u8>,
    /// What they stand for, on the device.
    pub restored: B::Matrix,
    /// `tr((W − Ŵ) H (W − Ŵ)ᵀ)` under the undamped Hessian, when that is known.
    pub proxy_loss: Option<f64>,
    /// The proxy loss as a share of `tr(W H Wᵀ)`.
    pub relative_error: Option<f64>,
    /// Relative damping that the factorization needed.
    pub damp: Option<f64>,
}

/// Rounds rows `[rows, in]` to blocks of `ty`, as the file holds them.
///
/// Without `importance` `[in]`, types that ggml encodes without a search are encoded as ggml does, and Q8_0 always. Fails when blocks do
/// not divide the rows.
pub fn pack_rows<B: Backend>(
    backend: &B,
    weight: &B::Matrix,
    ty: GgmlType,
    importance: Option<&[f32]>,
) -> Result<Vec<u8>> {
    let [rows, cols] = backend.shape(weight);
    let row_bytes = row_bytes(ty, cols)?;
    if !searched(ty, importance.is_some()) {
        let host = backend.download(weight)?;
        let values = host.as_slice().expect("a contiguous matrix");
        let mut packed = vec![0u8; rows * row_bytes];
        packed
            .par_chunks_exact_mut(row_bytes)
            .zip(values.par_chunks_exact(cols))
            .with_min_len(8)
            .for_each(|(packed, values)| ty.encode(values, packed).expect("a type with an encoder"));
        return Ok(packed);
    }
    let grid = backend.fit_blocks(weight, ty, importance)?;
    backend.pack_blocks(&backend.round_blocks(weight, &grid)?, &grid)
}

/// Quantizes one weight matrix `[out, in]` to `ty`; by a sweep where `shared` holds a factored Hessian, else as
/// [`pack_rows`].
///
/// Fails when blocks do not divide the rows.
pub fn solve_blocks<B: Backend>(
    backend: &B,
    shared: &Shared<'_, B>,
    weight: &B::Matrix,
    ty: GgmlType,
    importance: Option<&[f32]>,
) -> Result<BlockSolution<B>> {
    let [rows, cols] = backend.shape(weight);
    let row_bytes = row_bytes(ty, cols)?;
    let (packed, swept, restored) = match shared.factor.as_ref().filter(|_| ty.layout().is_some()) {
        Some(factor) => {
            let mut grid = backend.fit_blocks(weight, ty, importance)?;
            let Swept { mut codes, mut loss } = backend.sweep_blocks(weight, factor, &grid)?;
            if let Some(gram) = shared.statistics.and_then(|s| s.gram.as_ref()) {
                loss = backend.refine_blocks(weight, gram, factor.damp, &mut grid, &mut codes)?;
            }
            (backend.pack_blocks(&codes, &grid)?, Some(loss), backend.restore_blocks(&codes, &grid)?)
        }
        None => {
            let packed = pack_rows(backend, weight, ty, importance)?;
            let restored = unpack(backend, ty, &packed, [rows, cols], row_bytes)?;
            (packed, None, restored)
        }
    };
    let [proxy_loss, relative_error] = measure(backend, shared, weight, &restored, swept)?;
    Ok(BlockSolution { packed, restored, proxy_loss, relative_error, damp: shared.factor.as_ref().map(|f| f.damp) })
}

/// What packed blocks stand for, on the device.
fn unpack<B: Backend>(
    backend: &B,
    ty: GgmlType,
    packed: &[u8],
    [rows, cols]: [usize; 2],
    row_bytes: usize,
) -> Result<B::Matrix> {
    let mut values = vec![0.0f32; rows * cols];
    values
        .par_chunks_exact_mut(cols)
        .zip(packed.par_chunks_exact(row_bytes))
        .with_min_len(8)
        .for_each(|(values, packed)| ty.dequantize(packed, values).expect("whole blocks"));
    backend.upload(Array2::from_shape_vec((rows, cols), values).expect("one value a weight"))
}

fn row_bytes(ty: GgmlType, cols: usize) -> Result<usize> {
    ty.row_bytes(cols).ok_or_else(|| Error::Shape {
        op: "pack_rows",
        expected: format!("rows of whole blocks of {ty}, {} weights each", ty.block_len),
        found: cols.to_string(),
    })
}

/// Whether [`pack_rows`] looks for scales, with importance or without, rather than encode rows as ggml does.
pub fn searched(ty: GgmlType, importance: bool) -> bool {
    // With 256 levels the search gains nothing that can be measured, and llama.cpp does not search either.
    let fine = ty.layout().is_none_or(|layout| layout.levels.count() == 256);
    importance && !fine || ty.encode(&vec![0.0; ty.block_len], &mut vec![0; ty.block_bytes]).is_none()
}
