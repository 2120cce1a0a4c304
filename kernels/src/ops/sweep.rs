//! The sweep: rounds a target matrix column by column against a factored Hessian.
//!
//! ```text
//! for p in order:                       # H = R D Rᵀ, R unit upper
//!     v     = t[p] + Σ_{k<p} e[k] · R[k, p]
//!     q     = nearest grid point of v
//!     e[p]  = t[p] − q
//!     loss += D[p] · (v − q)²
//! ```
//!
//! Errors are measured against the target itself, so that nothing is updated to the right of the current column: the sum
//! over finished columns is one matrix product a panel. Rows are independent: each task takes 64 of them through the
//! whole sweep. GPTQ is this with `t = w`.

use ndarray::ArrayView2;
use rayon::prelude::*;

use super::gemm;
use super::levels::{AnyLevels, LevelSet, codes_of, with_levels};
use super::round::{code, inverse};
use crate::backend::Swept;
use crate::{Factor, Grid, simd_fn};

/// Rows that one task carries, and columns of a panel.
const ROWS: usize = 64;
const PANEL: usize = 64;

type Lane = [f32; ROWS];

/// GPTQ as its paper states it, in `f64` and with the inverse: columns left to right in `order`, errors spread right.
///
/// `inverse_upper` is the upper Cholesky factor of the inverse of the damped, permuted Hessian.
pub fn reference(target: ArrayView2<f32>, order: &[u32], inverse_upper: &[Vec<f64>], grid: &Grid) -> Swept<Vec<u8>> {
    let (rows, cols, groups) = (target.nrows(), target.ncols(), grid.spec.groups());
    let mut swept = Swept { codes: vec![0; rows * cols], loss: 0.0 };
    for row in 0..rows {
        let mut w: Vec<f64> = order.iter().map(|&c| f64::from(target[[row, c as usize]])).collect();
        for p in 0..cols {
            let col = order[p] as usize;
            let at = row * groups + grid.spec.group_of[col] as usize;
            let (scale, zero) = (grid.scales[at], f32::from(grid.zeros[at]));
            let max = f32::from(grid.spec.encoding.max_code());
            let code = code(w[p] as f32, inverse(scale), zero, max);
            swept.codes[row * cols + col] = code as u8;
            let error = (w[p] - f64::from(scale * (code - zero))) / inverse_upper[p][p];
            swept.loss += error * error;
            for i in p..cols {
                w[i] -= error * inverse_upper[p][i];
            }
        }
    }
    swept
}

/// Codes `[rows, cols]` in the original column order, and the loss.
///
/// # Panics
/// If the encoding has no codes: a mistake of the caller.
pub fn run(target: ArrayView2<f32>, factor: &Factor<ndarray::Array2<f32>>, grid: &Grid) -> Swept<Vec<u8>> {
    let encoding = &grid.spec.encoding;
    let zero = |at: usize| grid.zeros.get(at).copied().map_or(0.0, f32::from);
    let kept = match encoding.is_integers() {
        true => Kept::Codes(f32::from(encoding.max_code())),
        false => Kept::Levels(AnyLevels::of(encoding)),
    };
    let points = Points {
        groups: grid.spec.groups(),
        group_of: &grid.spec.group_of,
        scales: &grid.scales,
        zero: &zero,
        mins: &grid.mins,
        kept,
    };
    let mut swept = sweep(target, factor, &points);
    if let Kept::Levels(_) = points.kept {
        let codes = codes_of(encoding);
        swept.codes.par_chunks_mut(1 << 14).for_each(|part| part.iter_mut().for_each(|c| *c = codes[usize::from(*c)]));
    }
    swept
}

/// The values that each group may take.
struct Points<'a> {
    groups: usize,
    /// `[cols]`.
    group_of: &'a [u32],
    /// `[rows, groups]`.
    scales: &'a [f32],
    /// The code of 0 in a group.
    zero: &'a (dyn Fn(usize) -> f32 + Sync),
    /// `[rows, groups]`, or empty.
    mins: &'a [f32],
    kept: Kept,
}

/// What is kept of a chosen value.
enum Kept {
    /// Its code, up to this one.
    Codes(f32),
    /// The byte that stands for its level.
    Levels(AnyLevels),
}

fn sweep(target: ArrayView2<f32>, factor: &Factor<ndarray::Array2<f32>>, points: &Points<'_>) -> Swept<Vec<u8>> {
    let cols = target.ncols();
    let data = target.to_slice().expect("a contiguous matrix");
    let mut codes = vec![0u8; data.len()];
    let losses: Vec<f64> = codes
        .par_chunks_mut(ROWS * cols)
        .zip(data.par_chunks(ROWS * cols))
        .enumerate()
        .map_init(Scratch::default, |scratch, (task, (codes, target))| {
            scratch.sweep(task * ROWS, target, factor, points, codes)
        })
        .collect();
    Swept { codes, loss: losses.iter().sum() }
}

/// What one task works in; columns in processing order, rows side by side.
#[derive(Default)]
struct Scratch {
    target: Vec<Lane>,
    errors: Vec<Lane>,
    codes: Vec<[u8; ROWS]>,
    scales: Vec<Lane>,
    inverses: Vec<Lane>,
    zeros: Vec<Lane>,
    mins: Vec<Lane>,
    feedback: Vec<Lane>,
}

impl Scratch {
    fn sweep(
        &mut self,
        first_row: usize,
        target: &[f32],
        factor: &Factor<ndarray::Array2<f32>>,
        points: &Points<'_>,
        codes: &mut [u8],
    ) -> f64 {
        let (n, groups) = (factor.order.len(), points.groups);
        let rows = target.len() / n;
        self.target.clear();
        self.target.resize(n, [0.0; ROWS]);
        self.errors.resize(n, [0.0; ROWS]);
        self.codes.resize(n, [0; ROWS]);
        for lanes in [&mut self.scales, &mut self.inverses, &mut self.zeros, &mut self.mins] {
            lanes.clear();
            lanes.resize(groups, [0.0; ROWS]);
        }
        // Rows side by side, columns in processing order: a column of 64 rows is a few vector registers, and no step depends on another row.
        for row in 0..rows {
            let target = &target[row * n..][..n];
            for (lane, &col) in self.target.iter_mut().zip(&factor.order) {
                lane[row] = target[col as usize];
            }
            for group in 0..groups {
                let at = (first_row + row) * groups + group;
                self.scales[group][row] = points.scales[at];
                self.inverses[group][row] = inverse(points.scales[at]);
                self.zeros[group][row] = (points.zero)(at);
                self.mins[group][row] = points.mins.get(at).copied().unwrap_or(0.0);
            }
        }
        let unit = factor.unit.as_slice().expect("a contiguous matrix");
        // In double precision, as sums over thousands of columns are compared between candidates and with the loss after refinement.
        let mut loss = [0.0f64; ROWS];
        for start in (0..n).step_by(PANEL) {
            let width = PANEL.min(n - start);
            self.feedback.clear();
            self.feedback.resize(width, [0.0; ROWS]);
            // What all panels before feed back to this one is one product, which is where the time goes; within the panel each column
            // feeds the next ones at once.
            if start > 0 {
                // SAFETY: `unit` is [n, n], `errors` holds `start` finished columns, `feedback` has `width`.
                unsafe {
                    gemm(
                        [width, ROWS, start],
                        self.feedback.as_mut_ptr().cast::<f32>(),
                        [ROWS, 1],
                        false,
                        unit.as_ptr().add(start),
                        [1, n],
                        self.errors.as_ptr().cast::<f32>(),
                        [ROWS, 1],
                        [0.0, 1.0],
                    );
                }
            }
            for p in start..start + width {
                let group = points.group_of[factor.order[p] as usize] as usize;
                let ahead = &unit[p * n + p + 1..p * n + start + width];
                let (now, later) = self.feedback.split_at_mut(p - start + 1);
                column(
                    &self.target[p],
                    &now[p - start],
                    [&self.scales[group], &self.inverses[group], &self.zeros[group], &self.mins[group]],
                    &points.kept,
                    factor.pivots[p],
                    &mut self.errors[p],
                    &mut self.codes[p],
                    &mut loss,
                    ahead,
                    later,
                );
            }
        }
        for row in 0..rows {
            let codes = &mut codes[row * n..][..n];
            for (lane, &col) in self.codes.iter().zip(&factor.order) {
                codes[col as usize] = lane[row];
            }
        }
        loss[..rows].iter().sum()
    }
}

simd_fn! {
    fn column(
        target: &Lane,
        feedback: &Lane,
        grid: [&Lane; 4],
        kept: &Kept,
        pivot: f64,
        errors: &mut Lane,
        codes: &mut [u8; ROWS],
        loss: &mut [f64; ROWS],
        ahead: &[f32],
        later: &mut [Lane],
    ) {
        let [scales, inverses, zeros, mins] = grid;
        match *kept {
            Kept::Codes(max) => {
                for row in 0..ROWS {
                    let wanted = target[row] + feedback[row];
                    let code = code(wanted, inverses[row], zeros[row], max);
                    let value = scales[row] * (code - zeros[row]);
                    // Against the target, not against what was wanted: what was fed back is in the errors before it already.
                    errors[row] = target[row] - value;
                    codes[row] = code as i32 as u8;
                    let missed = f64::from(wanted - value);
                    loss[row] += missed * missed * pivot;
                }
            }
            Kept::Levels(set) => with_levels!(set, set => {
                nearest(set, target, feedback, [scales, inverses, mins], pivot, errors, codes, loss);
            }),
        }
        let errors = *errors;
        for (u, lane) in ahead.iter().zip(later) {
            for row in 0..ROWS {
                lane[row] += errors[row] * u;
            }
        }
    }
}

#[inline(always)]
fn nearest<L: LevelSet>(
    set: L,
    target: &Lane,
    feedback: &Lane,
    [scales, inverses, mins]: [&Lane; 3],
    pivot: f64,
    errors: &mut Lane,
    codes: &mut [u8; ROWS],
    loss: &mut [f64; ROWS],
) {
    for row in 0..ROWS {
        let wanted = target[row] + feedback[row];
        let level = set.nearest((wanted + mins[row]) * inverses[row]);
        let value = scales[row] * level - mins[row];
        errors[row] = target[row] - value;
        codes[row] = set.keep(level);
        let missed = f64::from(wanted - value);
        loss[row] += missed * missed * pivot;
    }
}

#[cfg(test)]
mod tests {
    use formats::{Float, Scheme};
    use ndarray::Array2;

    use super::super::plain::inverse_upper;
    use super::super::testing::{Noise, dequantized};
    use super::*;
    use crate::ops::{blocks, factor, fit, gram, round};
    use crate::{FitKind, GridSpec};

    #[test]
    fn codes_are_those_of_the_textbook_algorithm() {
        let mut noise = Noise(9);
        for (rows, cols, group, bits, symmetric) in [
            (3, 5, None, 3, true),
            (70, 96, Some(32), 4, false),
            (5, 130, Some(65), 2, false),
            (64, 64, Some(64), 8, true),
        ] {
            let mixing = noise.matrix(cols, cols);
            let x = noise.matrix(3 * cols, cols).dot(&mixing);
            let hessian = gram::reference(x.view());
            let weight = noise.matrix(rows, cols);
            let scheme = Scheme { bits, group, symmetric };
            let spec = GridSpec::of(scheme.encoding(Float::F16, 0), cols);
            let grid = fit::run(weight.view(), &spec, FitKind::MinMax);
            let mut order: Vec<u32> = (0..cols as u32).collect();
            order.sort_by(|a, b| hessian[[*b as usize, *b as usize]].total_cmp(&hessian[[*a as usize, *a as usize]]));
            let factor = factor::run(hessian.view(), order.clone(), 0.05).unwrap();
            let fast = run(weight.view(), &factor, &grid);
            let slow = reference(weight.view(), &order, &inverse_upper(&hessian, &order, 0.05), &grid);
            let different = fast.codes.iter().zip(&slow.codes).filter(|(a, b)| a != b).count();
            // A value on the edge between two codes may fall either way, and then moves what follows it.
            assert!(different * 200 <= fast.codes.len(), "{different} of {} codes", fast.codes.len());
            assert!((fast.loss - slow.loss).abs() <= 2e-3 * slow.loss, "{} and {}", fast.loss, slow.loss);

            // The loss is the trace that the sweep claims to have reached, and lower than without feedback.
            let trace = |codes: &[u8]| {
                let e = Array2::from_shape_fn((rows, cols), |(row, col)| {
                    let at = row * spec.groups() + spec.group_of[col] as usize;
                    let step = f32::from(codes[row * cols + col]) - f32::from(grid.zeros[at]);
                    weight[[row, col]] - grid.scales[at] * step
                });
                let mut damped = hessian.clone();
                damped.diag_mut().iter_mut().for_each(|d| *d *= 1.05);
                gram::quadratic(e.view(), damped.view())
            };
            assert!((trace(&fast.codes) - fast.loss).abs() <= 1e-3 * fast.loss);
            assert!(fast.loss < trace(&round::run(weight.view(), &grid)));
        }
    }

    #[test]
    fn blocks_are_swept_as_groups_are() {
        let mut noise = Noise(15);
        let mixing = noise.matrix(256, 256);
        let x = noise.matrix(600, 256).dot(&mixing);
        let hessian = gram::reference(x.view());
        let weight = noise.matrix(70, 256);
        let factor = factor::run(hessian.view(), (0..256).rev().collect(), 0.05).unwrap();
        let trace = |grid: &Grid, codes: &[u8]| {
            let e = &weight - &Array2::from_shape_vec((70, 256), dequantized(grid, codes)).unwrap();
            let mut damped = hessian.clone();
            damped.diag_mut().iter_mut().for_each(|d| *d *= 1.05);
            gram::quadratic(e.view(), damped.view())
        };
        for ty in formats::ggml::TYPES.iter().filter(|t| t.layout().is_some()) {
            let grid = blocks::fit(weight.view(), *ty, None);
            let swept = run(weight.view(), &factor, &grid);
            let (found, plain) = (trace(&grid, &swept.codes), trace(&grid, &blocks::round(weight.view(), &grid)));
            assert!((found - swept.loss).abs() <= 2e-3 * found, "{ty}: {found}, and the sweep says {}", swept.loss);
            assert!(found < plain, "{ty}: {found}, rounding {plain}");
        }
        // On a grid that both can say, both say the same.
        let ty = formats::ggml::GgmlType::from_name("Q4_0").unwrap();
        let grid = blocks::fit(weight.view(), ty, None);
        let scheme = Scheme { bits: 4, group: Some(32), symmetric: true };
        let same = Grid::of_integers(
            GridSpec::of(scheme.encoding(Float::F16, 0), 256),
            70,
            grid.scales.clone(),
            vec![8; grid.scales.len()],
        );
        assert_eq!(run(weight.view(), &factor, &grid).codes, run(weight.view(), &factor, &same).codes);
    }

    #[test]
    fn without_correlation_the_sweep_only_rounds() {
        let mut noise = Noise(10);
        let weight = noise.matrix(66, 70);
        let spec = GridSpec::of(Scheme { bits: 3, group: None, symmetric: false }.encoding(Float::F32, 0), 70);
        let grid = fit::run(weight.view(), &spec, FitKind::MinMax);
        let diagonal = Array2::from_diag(&ndarray::Array1::from_shape_simple_fn(70, || noise.next().abs() + 0.1));
        let factor = factor::run(diagonal.view(), (0..70).collect(), 0.0).unwrap();
        assert_eq!(run(weight.view(), &factor, &grid).codes, round::run(weight.view(), &grid));
    }
}
