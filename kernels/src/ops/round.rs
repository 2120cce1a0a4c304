//! Rounds every weight to its nearest code: no feedback between columns.

use std::ops::Range;

use ndarray::ArrayView2;
use rayon::prelude::*;

use super::blocks;
use crate::Grid;
use crate::simd_fn;

/// The code of `w` on a grid of step `scale`; ties go to the even code offset, as `torch.round` does.
#[inline(always)]
pub fn code(w: f32, inverse: f32, zero: f32, max: f32) -> f32 {
    ((w * inverse).round_ties_even() + zero).clamp(0.0, max)
}

/// `1 / scale`, or 0 for a group that holds only zeros.
#[inline(always)]
pub fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The plain loop; takes groups in any order.
pub fn reference(weight: ArrayView2<f32>, grid: &Grid) -> Vec<u8> {
    let groups = grid.spec.groups();
    let max = f32::from(grid.spec.encoding.max_code());
    let code = |((row, col), w): ((usize, usize), &f32)| {
        let at = row * groups + grid.spec.group_of[col] as usize;
        code(*w, inverse(grid.scales[at]), f32::from(grid.zeros[at]), max) as u8
    };
    weight.indexed_iter().map(code).collect()
}

/// Runs of consecutive columns of one group, each with its group: one run a group, unless columns were ordered.
pub(super) fn runs(group_of: &[u32]) -> Vec<(Range<usize>, usize)> {
    let mut start = 0;
    let same = group_of.chunk_by(|a, b| a == b).map(|run| {
        let range = start..start + run.len();
        start = range.end;
        (range, run[0] as usize)
    });
    same.collect()
}

/// Codes `[rows, cols]` of `weight` on `grid`.
pub fn run(weight: ArrayView2<f32>, grid: &Grid) -> Vec<u8> {
    match grid.spec.encoding.is_integers() {
        true => integers(weight, grid),
        false => blocks::round(weight, grid),
    }
}

fn integers(weight: ArrayView2<f32>, grid: &Grid) -> Vec<u8> {
    let (cols, groups) = (weight.ncols(), grid.spec.groups());
    let max = f32::from(grid.spec.encoding.max_code());
    let runs = runs(&grid.spec.group_of);
    let mut codes = vec![0u8; weight.len()];
    let data = weight.to_slice().expect("a contiguous matrix");
    codes.par_chunks_exact_mut(cols).zip(data.par_chunks_exact(cols)).enumerate().for_each(|(row, (codes, w))| {
        round_row(w, &runs, &grid.scales[row * groups..][..groups], &grid.zeros[row * groups..][..groups], max, codes);
    });
    codes
}

simd_fn! {
    fn round_row(w: &[f32], runs: &[(Range<usize>, usize)], scales: &[f32], zeros: &[u8], max: f32, codes: &mut [u8]) {
        for (columns, group) in runs {
            let (inverse, zero) = (inverse(scales[*group]), f32::from(zeros[*group]));
            for (c, w) in codes[columns.clone()].iter_mut().zip(&w[columns.clone()]) {
                *c = code(*w, inverse, zero, max) as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use formats::{Float, Scheme};

    use super::super::testing::Noise;
    use super::*;
    use crate::GridSpec;

    #[test]
    fn agrees_with_the_plain_loop_in_any_order_of_groups() {
        let mut noise = Noise(24);
        for (bits, group, cols) in [(2, Some(32), 96), (3, Some(32), 64), (4, None, 77), (8, Some(128), 256)] {
            let scheme = Scheme { bits, group, symmetric: false };
            let mut spec = GridSpec::of(scheme.encoding(Float::F32, 0), cols);
            for order in 0..3 {
                match order {
                    0 => {}
                    1 => spec.group_of.reverse(),
                    // No two neighbours alike, but for rows of one group.
                    _ => {
                        let groups = spec.groups() as u32;
                        spec.group_of.iter_mut().zip(0..).for_each(|(group, col)| *group = col % groups);
                    }
                }
                let (rows, groups) = (5, spec.groups());
                let mut scales: Vec<f32> = (0..rows * groups).map(|_| noise.next() * 0.2).collect();
                scales[1] = 0.0;
                let zeros = (0..rows * groups).map(|i| (i * 7) as u8 & scheme.max_code()).collect();
                let grid = Grid::of_integers(spec.clone(), rows, scales, zeros);
                let mut weight = noise.matrix(rows, cols);
                // Ties, and what no code is near to.
                weight[[1, 3]] = grid.scales[groups] * 0.5;
                weight[[2, 5]] = f32::MAX;
                weight[[2, 6]] = -f32::MAX;
                weight[[3, 7]] = f32::NAN;
                assert_eq!(run(weight.view(), &grid), reference(weight.view(), &grid), "{scheme:?}, order {order}");
            }
        }
    }
}
