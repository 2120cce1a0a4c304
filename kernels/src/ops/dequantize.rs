//! What codes stand for, and blocks of codes as files hold them.

use formats::ggml::GgmlType;
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::levels::levels_of;
use super::round::runs;
use crate::backend::Grid;

/// Rows that a task takes at least.
const ROWS: usize = 8;

/// The reals of codes `[rows, cols]`.
pub fn run(codes: ArrayView2<u8>, grid: &Grid) -> Array2<f32> {
    match grid.spec.encoding.is_integers() {
        true => integers(codes, grid),
        false => levels(codes, grid),
    }
}

/// `scale · (code − zero)`.
fn integers(codes: ArrayView2<u8>, grid: &Grid) -> Array2<f32> {
    let groups = grid.spec.groups();
    let runs = runs(&grid.spec.group_of);
    by_rows(codes, |row, codes, out: &mut [f32]| {
        for (columns, group) in &runs {
            let at = row * groups + group;
            let (scale, zero) = (grid.scales[at], i32::from(grid.zeros[at]));
            for (out, code) in out[columns.clone()].iter_mut().zip(&codes[columns.clone()]) {
                *out = scale * (i32::from(*code) - zero) as f32;
            }
        }
    })
}

/// `scale · level − min`.
fn levels(codes: ArrayView2<u8>, grid: &Grid) -> Array2<f32> {
    let encoding = &grid.spec.encoding;
    let levels = levels_of(encoding);
    let (groups, width) = (grid.spec.groups(), encoding.group_width(grid.cols()).max(1));
    by_rows(codes, |row, codes, out: &mut [f32]| {
        let scales = &grid.scales[row * groups..][..groups];
        let mins = &grid.mins[row * groups..][..groups];
        let parts = codes.chunks(width).zip(out.chunks_mut(width));
        for ((codes, out), (scale, min)) in parts.zip(scales.iter().zip(mins)) {
            for (out, code) in out.iter_mut().zip(codes) {
                *out = scale * levels[usize::from(*code)] - min;
            }
        }
    })
}

/// Codes `[rows, cols]` as [`GgmlType::pack`] packs them.
///
/// # Panics
/// If the grid is not one of ggml's types: a mistake of the caller.
pub fn pack_blocks(codes: ArrayView2<u8>, grid: &Grid) -> Vec<u8> {
    let ty = grid.spec.encoding.ggml_type().expect("a type of ggml's");
    let GgmlType { block_len, block_bytes, .. } = ty;
    let (cols, per_row) = (codes.ncols(), codes.ncols() / block_len);
    let mut packed = vec![0u8; codes.nrows() * per_row * block_bytes];
    if packed.is_empty() {
        return packed;
    }
    packed
        .par_chunks_exact_mut(per_row * block_bytes)
        .zip(grid.blocks.par_chunks_exact(per_row))
        .zip(codes.to_slice().expect("contiguous codes").par_chunks_exact(cols))
        .with_min_len(ROWS)
        .for_each(|((packed, blocks), codes)| ty.pack(blocks, codes, packed));
    packed
}

fn by_rows(codes: ArrayView2<u8>, work: impl Fn(usize, &[u8], &mut [f32]) + Sync) -> Array2<f32> {
    let cols = codes.ncols().max(1);
    let data = codes.to_slice().expect("contiguous codes");
    let mut out = Array2::zeros(codes.dim());
    let rows = out.as_slice_mut().expect("contiguous").par_chunks_exact_mut(cols).zip(data.par_chunks_exact(cols));
    rows.enumerate().with_min_len(ROWS).for_each(|(row, (out, codes))| work(row, codes, out));
    out
}

#[cfg(test)]
mod tests {
    use formats::{Float, QuantizedWeight, Scheme};

    use super::super::testing::Noise;
    use super::super::{blocks, round};
    use super::*;
    use crate::GridSpec;

    #[test]
    fn codes_stand_for_what_files_say() {
        let mut noise = Noise(41);
        for (bits, group, cols, scattered) in [(4, Some(32), 96, false), (3, None, 77, false), (8, Some(32), 64, true)]
        {
            let scheme = Scheme { bits, group, symmetric: false };
            let mut spec = GridSpec::of(scheme.encoding(Float::F16, 0), cols);
            let groups = spec.groups() as u32;
            if scattered {
                spec.group_of.iter_mut().zip(0..).for_each(|(group, col)| *group = col % groups);
            }
            let (rows, count) = (5, 5 * spec.groups());
            let scales: Vec<f32> = (0..count).map(|_| noise.next()).collect();
            let zeros: Vec<u8> = (0..count).map(|i| (i * 3) as u8 & scheme.max_code()).collect();
            let grid = Grid::of_integers(spec.clone(), rows, scales.clone(), zeros.clone());
            let codes = round::run(noise.matrix(rows, cols).view(), &grid);
            let group_of = scattered.then_some(spec.group_of);
            let weight = QuantizedWeight {
                rows,
                cols,
                encoding: scheme.into(),
                codes: codes.clone(),
                scales,
                zeros,
                mins: Vec::new(),
                global: None,
                group_of,
            };
            let found = run(ArrayView2::from_shape((rows, cols), &codes).unwrap(), &grid);
            assert_eq!(found.as_slice().unwrap(), weight.dequantize(), "{scheme:?}");
        }
    }

    #[test]
    fn blocks_stand_for_what_files_say() {
        let mut noise = Noise(42);
        for ty in formats::ggml::TYPES.iter().filter(|ty| ty.layout().is_some()) {
            let weight = noise.matrix(9, 512);
            let grid = blocks::fit(weight.view(), *ty, None);
            let codes = Array2::from_shape_vec((9, 512), blocks::round(weight.view(), &grid)).unwrap();
            let packed = pack_blocks(codes.view(), &grid);
            let mut expected = vec![0.0; 9 * 512];
            ty.dequantize(&packed, &mut expected).unwrap();
            let found = run(codes.view(), &grid);
            assert_eq!(found.as_slice().unwrap(), expected, "{ty}");
        }
    }
}
