//! ggml's block types: the same rounding and the same sweep as for files of codes and scales, on the blocks' own grids.
//!
//! Scales and mins are found first, as the blocks will store them (see `kernels::ops::blocks`); codes come second. So the
//! sweep needs nothing new: a static grid, any order of columns. At the end both are moved once more wherever the loss
//! falls (see `kernels::ops::refine`).

use formats::GgmlType;
use kernels::{Backend, Result};
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

/// Quantizes one weight matrix `[out, in]` to `ty`; by a sweep where `shared` holds a factored Hessian.
///
/// Without `importance` `[in]` and without a sweep, types that ggml encodes without a search are encoded as ggml does.
/// Fails when blocks do not divide the rows.
pub fn solve_blocks<B: Backend>(
    backend: &B,
    shared: &Shared<'_, B>,
    weight: &B::Matrix,
    ty: GgmlType,
    importance: Option<&[f32]>,
) -> Result<BlockSolution<B>> {
    let [rows, cols] = backend.shape(weight);
    let row_bytes = ty.row_bytes(cols).ok_or_else(|| kernels::Error::Shape {
        op: "solve_blocks",
        expected: format!("rows of whole blocks of {ty}, {} weights each", ty.block_len),
        found: cols.to_string(),
    })?;
    let mut packed = vec![0u8; rows * row_bytes];
    let sweeps = shared.factor.as_ref().filter(|_| ty.layout().is_some());
    let mut swept = None;
    if sweeps.is_none() && (importance.is_none() || ty.layout().is_none()) && encodes(ty) {
        let host = backend.download(weight)?;
        let values = host.as_slice().expect("a contiguous matrix");
        packed
            .par_chunks_exact_mut(row_bytes)
            .zip(values.par_chunks_exact(cols))
            .with_min_len(8)
            .for_each(|(packed, values)| ty.encode(values, packed).expect("a type with an encoder"));
    } else {
        let mut grid = backend.fit_blocks(weight, ty, importance)?;
        let codes = match sweeps {
            Some(factor) => {
                let found = backend.sweep_blocks(weight, factor, &grid)?;
                let (mut codes, mut loss) = (found.codes, found.loss);
                if let Some(gram) = shared.statistics.and_then(|s| s.gram.as_ref()) {
                    loss = backend.refine_blocks(weight, gram, factor.damp, &mut grid, &mut codes)?;
                }
                swept = Some(loss);
                codes
            }
            None => backend.round_blocks(weight, &grid)?,
        };
        let per_row = cols / ty.block_len;
        packed
            .par_chunks_exact_mut(row_bytes)
            .zip(grid.blocks.par_chunks_exact(per_row))
            .zip(codes.par_chunks_exact(cols))
            .with_min_len(8)
            .for_each(|((packed, blocks), codes)| ty.pack(blocks, codes, packed));
    }
    let mut values = vec![0.0f32; rows * cols];
    values
        .par_chunks_exact_mut(cols)
        .zip(packed.par_chunks_exact(row_bytes))
        .with_min_len(8)
        .for_each(|(values, packed)| ty.dequantize(packed, values).expect("whole blocks"));
    let restored = backend.upload(Array2::from_shape_vec((rows, cols), values).expect("one value a weight"))?;
    let [proxy_loss, relative_error] = measure(backend, shared, weight, &restored, swept)?;
    Ok(BlockSolution { packed, restored, proxy_loss, relative_error, damp: shared.factor.as_ref().map(|f| f.damp) })
}

/// Whether ggml has an encoder without a search for the type.
fn encodes(ty: GgmlType) -> bool {
    ty.encode(&vec![0.0; ty.block_len], &mut vec![0; ty.block_bytes]).is_some()
}
