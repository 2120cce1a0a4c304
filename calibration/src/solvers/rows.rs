//! Rows of ggml's types without a solver: by ggml's own encoder where that does not search, else on searched scales.

use formats::GgmlType;
use kernels::{Error, FitKind, GridSpec, Packing, Quantize, Recovered, Result, recover};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::recovered;

/// Rows as the file holds them.
#[derive(Debug)]
pub struct Rows {
    /// The blocks of each row, one row after the other.
    pub bytes: Vec<u8>,
    /// Whether they lay on the grid of the type already, and were recovered: to the bit, or but for scales that the type cannot store.
    pub recovered: Option<bool>,
}

/// Rounds rows `[rows, in]` to blocks of `ty`, as the file holds them.
///
/// Rows that lie on a grid of the type already get that. Without `importance` `[in]`, types that ggml encodes without a search are encoded as
/// ggml does, and Q8_0 always. Fails when blocks do not divide the rows.
pub fn pack_rows<B: Quantize>(
    backend: &B,
    weight: &B::Matrix,
    ty: GgmlType,
    importance: Option<&[f32]>,
) -> Result<Rows> {
    let spec = (ty.layout().is_some()).then(|| GridSpec::of(ty.encoding(), backend.shape(weight)[1]));
    let known = spec.as_ref().map(|spec| recovered(backend, weight, spec)).transpose()?.flatten();
    if let Some(Recovered { grid, exact }) = known {
        let bytes = backend.pack(&backend.round(weight, &grid)?, Packing::Blocks(&grid))?;
        return Ok(Rows { bytes, recovered: Some(exact) });
    }
    let Some(spec) = spec.filter(|_| searched(ty, importance.is_some())) else {
        return Ok(Rows { bytes: encode_rows(backend, weight, ty)?, recovered: None });
    };
    let grid = backend.fit(weight, &spec, importance.map_or(FitKind::MinMax, FitKind::Weighted))?;
    let bytes = backend.pack(&backend.round(weight, &grid)?, Packing::Blocks(&grid))?;
    Ok(Rows { bytes, recovered: None })
}

/// Whether rows `[rows, in]` lie on a grid of `ty` already.
pub fn lies_on_grid(rows: ArrayView2<f32>, ty: GgmlType) -> bool {
    ty.layout().is_some() && recover(rows, &GridSpec::of(ty.encoding(), rows.ncols())).is_some()
}

/// Whether [`pack_rows`] looks for scales, with importance or without, rather than encode rows as ggml does.
pub fn searched(ty: GgmlType, importance: bool) -> bool {
    // With 256 levels the search gains nothing that can be measured, and llama.cpp does not search either.
    let fine = ty.layout().is_none_or(|encoding| encoding.levels.count() == 256);
    importance && !fine || ty.encode(&vec![0.0; ty.block_len], &mut vec![0; ty.block_bytes]).is_none()
}

/// Rows by ggml's own encoder, and what they stand for, on the device.
pub(super) fn encode<B: Quantize>(backend: &B, weight: &B::Matrix, ty: GgmlType) -> Result<(Vec<u8>, B::Matrix)> {
    let [rows, cols] = backend.shape(weight);
    let packed = encode_rows(backend, weight, ty)?;
    let mut values = vec![0.0f32; rows * cols];
    if !values.is_empty() {
        values
            .par_chunks_exact_mut(cols)
            .zip(packed.par_chunks_exact(packed.len() / rows))
            .with_min_len(8)
            .for_each(|(values, packed)| ty.dequantize(packed, values).expect("whole blocks"));
    }
    Ok((packed, backend.upload(Array2::from_shape_vec((rows, cols), values).expect("one value a weight"))?))
}

fn encode_rows<B: Quantize>(backend: &B, weight: &B::Matrix, ty: GgmlType) -> Result<Vec<u8>> {
    let [rows, cols] = backend.shape(weight);
    let row_bytes = ty.row_bytes(cols).ok_or_else(|| Error::Shape {
        op: "pack_rows",
        expected: format!("rows of whole blocks of {ty}, {} weights each", ty.block_len),
        found: cols.to_string(),
    })?;
    let host = backend.download(weight)?;
    let values = host.as_slice().expect("a contiguous matrix");
    let mut packed = vec![0u8; rows * row_bytes];
    if !packed.is_empty() {
        packed
            .par_chunks_exact_mut(row_bytes)
            .zip(values.par_chunks_exact(cols))
            .with_min_len(8)
            .for_each(|(packed, values)| ty.encode(values, packed).expect("a type with an encoder"));
    }
    Ok(packed)
}
