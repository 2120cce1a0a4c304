//! What rounding does to a matrix whose columns are scaled first: what AWQ's search looks at, many times over.

use std::ops::Range;

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::dequantize;
use super::fit::{self, Problem, Rules};
use super::round::{self, code, inverse};
use crate::backend::{FitKind, GridSpec};
use crate::simd::LANES;
use crate::simd_fn;

/// `W − Ŵ diag(t)⁻¹` for the min-max rounding `Ŵ` of `W diag(t)`, step by step; takes groups in any order.
pub fn reference(weight: ArrayView2<f32>, t: &[f32], spec: &GridSpec) -> Array2<f32> {
    let mut error = Array2::from_shape_fn(weight.dim(), |(row, col)| weight[[row, col]] * t[col]);
    let grid = fit::run(error.view(), spec, FitKind::MinMax);
    let codes = Array2::from_shape_vec(weight.dim(), round::run(error.view(), &grid)).expect("a code a weight");
    let values = dequantize::run(codes.view(), &grid);
    for (((_, col), e), value) in error.indexed_iter_mut().zip(&values) {
        *e = (*e - value) / t[col];
    }
    error
}

/// The same, a row at a time, without a grid in memory; the same bits.
pub fn run(weight: ArrayView2<f32>, t: &[f32], spec: &GridSpec) -> Array2<f32> {
    let runs = round::runs(&spec.group_of);
    // Levels of other kinds have no such short way, and groups that lie apart have no range of their own in a row.
    if !spec.encoding.is_integers() || runs.len() != spec.groups() {
        return reference(weight, t, spec);
    }
    let (rows, cols) = weight.dim();
    let rules = Rules::of(&spec.encoding);
    let mut error = vec![0.0f32; rows * cols];
    let data = weight.to_slice().expect("a contiguous matrix");
    let tasks = error.par_chunks_exact_mut(cols.max(1)).zip(data.par_chunks_exact(cols.max(1)));
    tasks.with_min_len(4).for_each(|(error, row)| error_row(row, t, &runs, &rules, error));
    Array2::from_shape_vec((rows, cols), error).expect("the shape of the weight")
}

simd_fn! {
    fn error_row(w: &[f32], t: &[f32], runs: &[(Range<usize>, usize)], rules: &Rules, error: &mut [f32]) {
        for (columns, _) in runs {
            let (w, t, error) = (&w[columns.clone()], &t[columns.clone()], &mut error[columns.clone()]);
            for ((e, w), t) in error.iter_mut().zip(w).zip(t) {
                *e = w * t;
            }
            let problem = Problem { rules, range: range(error) };
            let (scale, zero) = problem.min_max(1.0);
            let (inverse, zero, max) = (inverse(scale), f32::from(zero), problem.max_code());
            for (e, t) in error.iter_mut().zip(t) {
                *e = (*e - scale * (code(*e, inverse, zero, max) - zero)) / t;
            }
        }
    }
}

/// The range of `x`, widened to hold 0.
#[inline(always)]
fn range(x: &[f32]) -> fit::Range {
    let smaller = |a: f32, b: f32| if b < a { b } else { a };
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (mut low, mut high) = ([0.0f32; LANES], [0.0f32; LANES]);
    let chunks = x.chunks_exact(LANES);
    for (lane, x) in chunks.remainder().iter().enumerate() {
        low[lane] = smaller(low[lane], *x);
        high[lane] = larger(high[lane], *x);
    }
    for chunk in chunks {
        for lane in 0..LANES {
            low[lane] = smaller(low[lane], chunk[lane]);
            high[lane] = larger(high[lane], chunk[lane]);
        }
    }
    fit::Range { low: low.into_iter().fold(0.0, smaller), high: high.into_iter().fold(0.0, larger) }
}

#[cfg(test)]
mod tests {
    use formats::{Float, Scheme};

    use super::super::testing::Noise;
    use super::*;

    #[test]
    fn gives_the_bits_of_the_steps() {
        let mut noise = Noise(25);
        for (group, cols, symmetric) in [(Some(32), 96, true), (Some(64), 128, false), (None, 77, false)] {
            let scheme = Scheme { bits: 3, group, symmetric };
            let mut spec = GridSpec::of(scheme.encoding(Float::F16, 1), cols);
            let mut weight = noise.matrix(9, cols);
            weight.row_mut(4).fill(0.0);
            // One side only: the range still holds 0.
            weight.row_mut(5).mapv_inplace(f32::abs);
            weight.row_mut(6).mapv_inplace(|x| -x.abs());
            let t: Vec<f32> = (0..cols).map(|_| noise.next().exp()).collect();
            for _ in 0..2 {
                let (fast, slow) = (run(weight.view(), &t, &spec), reference(weight.view(), &t, &spec));
                assert_eq!(fast, slow, "{scheme:?}");
                assert!(slow.iter().any(|e| *e != 0.0));
                // Groups that lie apart.
                let groups = spec.groups() as u32;
                spec.group_of.iter_mut().zip(0..).for_each(|(group, col)| *group = col % groups);
            }
        }
    }
}
