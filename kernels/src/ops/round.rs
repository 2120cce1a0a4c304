//! Rounds every weight to its nearest code: no feedback between columns.

use ndarray::ArrayView2;
use rayon::prelude::*;

use crate::Grid;

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

/// Codes `[rows, cols]` of `weight` on `grid`.
pub fn run(weight: ArrayView2<f32>, grid: &Grid) -> Vec<u8> {
    let (cols, groups) = (weight.ncols(), grid.spec.groups());
    let max = f32::from(grid.spec.scheme.max_code());
    let mut codes = vec![0u8; weight.len()];
    let data = weight.to_slice().expect("a contiguous matrix");
    codes.par_chunks_exact_mut(cols).zip(data.par_chunks_exact(cols)).enumerate().for_each(|(row, (codes, w))| {
        let inverses: Vec<f32> = grid.scales[row * groups..][..groups].iter().map(|s| inverse(*s)).collect();
        let zeros = &grid.zeros[row * groups..][..groups];
        for ((c, w), group) in codes.iter_mut().zip(w).zip(&grid.spec.group_of) {
            let group = *group as usize;
            *c = code(*w, inverses[group], f32::from(zeros[group]), max) as u8;
        }
    });
    codes
}
