//! Chooses the scale and zero of every group, in the precision they are stored in.
//!
//! The search matters as much as the sweep: a sweep cannot repair a scale. Candidates are tried as the file will hold
//! them, symmetric grids in both orientations (the longer tail gets the extra level), integer zeros near every split of
//! the clipped range; the best candidate's scale is then solved by least squares, rounded, and kept if it is better.
//!
//! ```text
//! best = the grid that spans the group's range, widened to hold 0
//! for each share of that range:                 # from `candidates`: the fewer levels, the more clipping pays
//!     for each place of the grid:               # symmetric: scale and −scale; else zeros that cut at either end
//!         scale = share as the file stores it
//!         best  = it, if Σ h (x − scale · (code − zero))² is less
//! three times:                                  # from the best one to the bottom of its own valley
//!     scale = Σ h x c / Σ h c², c = code − zero # least squares for the codes that it gives, stored, kept if better
//!     zero ± 1 with the same scale              # kept if better
//! ```
//!
//! ggml's blocks, whose scales are integers of a superblock's, are searched by `blocks.rs`; levels of tables, and those with a real
//! minimum, by `apart.rs`.

use formats::{Encoding, Float, Offset};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::round::{code, inverse};
use super::{apart, blocks};
use crate::backend::{FitKind, Grid, GridSpec};
use crate::simd::{LANES, sum_lanes};
use crate::simd_fn;

/// Widest group whose own Hessian block is used; wider ones fall back to its diagonal.
const WIDEST_BLOCK: usize = 256;

/// Fits every group of `weight` `[rows, cols]`.
///
/// # Panics
/// If the encoding has no codes, or rows are not whole blocks of one of ggml's types: mistakes of the caller.
pub fn run(weight: ArrayView2<f32>, spec: &GridSpec, kind: FitKind<'_, Array2<f32>>) -> Grid {
    if let Some(ty) = spec.encoding.ggml_type() {
        return match kind {
            FitKind::MinMax => blocks::fit(weight, ty, None),
            FitKind::Weighted(h) => blocks::fit(weight, ty, Some(h)),
            FitKind::BlockHessian(h) => blocks::fit(weight, ty, Some(&h.diag().to_vec())),
        };
    }
    if spec.encoding.is_integers() {
        return integers(weight, spec, kind);
    }
    match kind {
        FitKind::MinMax => apart::fit(weight, spec, None),
        FitKind::Weighted(h) => apart::fit(weight, spec, Some(h)),
        FitKind::BlockHessian(h) => apart::fit(weight, spec, Some(&h.diag().to_vec())),
    }
}

fn integers(weight: ArrayView2<f32>, spec: &GridSpec, kind: FitKind<'_, Array2<f32>>) -> Grid {
    let rules = Rules::of(&spec.encoding);
    let (rows, cols, groups) = (weight.nrows(), weight.ncols(), spec.groups());
    let mut columns: Vec<Vec<usize>> = vec![Vec::new(); groups];
    for (col, group) in spec.group_of.iter().enumerate() {
        columns[*group as usize].push(col);
    }
    let weights_of = |kind: &FitKind<'_, Array2<f32>>, columns: &[usize]| -> Vec<f32> {
        columns
            .iter()
            .map(|&c| match kind {
                FitKind::MinMax => 1.0,
                FitKind::Weighted(h) => h[c],
                FitKind::BlockHessian(h) => h[[c, c]],
            })
            .collect()
    };
    let importance: Vec<Vec<f32>> = columns.iter().map(|c| floor(weights_of(&kind, c))).collect();
    let blocks: Vec<Vec<f32>> = match &kind {
        FitKind::BlockHessian(h) => columns
            .iter()
            .map(|c| match c.len() {
                0..=WIDEST_BLOCK => c.iter().flat_map(|&i| c.iter().map(move |&j| h[[i.max(j), i.min(j)]])).collect(),
                _ => Vec::new(),
            })
            .collect(),
        _ => Vec::new(),
    };
    let data = weight.to_slice().expect("a contiguous matrix");
    let mut scales = vec![0.0; rows * groups];
    let mut zeros = vec![0; rows * groups];
    scales
        .par_chunks_exact_mut(groups)
        .zip(zeros.par_chunks_exact_mut(groups))
        .zip(data.par_chunks_exact(cols))
        .for_each_init(
            || (Vec::new(), Vec::new()),
            |(x, h), ((scales, zeros), row)| {
                for (group, columns) in columns.iter().enumerate() {
                    let padded = columns.len().next_multiple_of(LANES);
                    x.clear();
                    x.extend(columns.iter().map(|&c| row[c]));
                    let problem = Problem { rules: &rules, range: Range::of(x) };
                    (scales[group], zeros[group]) = match kind {
                        FitKind::MinMax => problem.min_max(1.0),
                        FitKind::BlockHessian(_) if columns.len() <= WIDEST_BLOCK => clip(x, &blocks[group], &problem),
                        _ => {
                            x.resize(padded, 0.0);
                            h.clear();
                            h.extend_from_slice(&importance[group]);
                            h.resize(padded, 0.0);
                            search(x, h, &problem)
                        }
                    };
                }
            },
        );
    Grid::of_integers(spec.clone(), rows, scales, zeros)
}

/// The importance of a group's columns; keeps never-active ones from vanishing out of the search: at least a small part of the mean.
pub(crate) fn floor(mut importance: Vec<f32>) -> Vec<f32> {
    let mean = importance.iter().map(|x| f64::from(*x)).sum::<f64>() / importance.len().max(1) as f64;
    if mean <= 0.0 || !mean.is_finite() {
        importance.fill(1.0);
    } else {
        // Relative to the mean, so that sums over a group neither overflow nor vanish.
        importance.iter_mut().for_each(|x| *x = (*x / mean as f32).max(1e-3));
    }
    importance
}

/// What integers with scales of their own allow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Whether all groups have the same zero.
    pub(crate) symmetric: bool,
    /// What scales are stored in.
    pub(crate) precision: Float,
    /// The largest code that its bits hold.
    pub(crate) max: u8,
    /// The zero that all groups have, the middle.
    pub(crate) midpoint: u8,
    /// The smallest zero that the file can hold.
    pub(crate) min_zero: u8,
    bits: u8,
}

impl Rules {
    /// Those of an encoding.
    pub(crate) fn of(encoding: &Encoding) -> Rules {
        let scheme = encoding.scheme().expect("integers with scales of their own");
        let min_zero = if let Offset::Zero { min } = encoding.offset { min } else { 0 };
        Rules {
            symmetric: scheme.symmetric,
            precision: encoding.precision(),
            max: scheme.max_code(),
            midpoint: scheme.midpoint(),
            min_zero,
            bits: scheme.bits,
        }
    }
}

/// Scales that are tried, as shares of the one that spans the range: from, to, and in how many steps.
pub(crate) fn candidates(rules: &Rules) -> (f32, f32, usize) {
    match (rules.symmetric, rules.bits) {
        (true, 2) => (0.40, 1.60, 28),
        (true, 3) => (0.45, 1.30, 28),
        (true, 4) => (0.55, 1.15, 28),
        (true, _) => (0.90, 1.01, 28),
        (false, 2) => (0.40, 1.0, 18),
        (false, 3) => (0.45, 1.0, 16),
        (false, 4) => (0.60, 1.0, 14),
        (false, _) => (0.94, 1.0, 8),
    }
}

/// Smallest and largest weight of a group, or 0.
#[derive(Clone, Copy)]
pub(super) struct Range {
    pub(super) low: f32,
    pub(super) high: f32,
}

impl Range {
    /// The range of `x`, widened to hold 0.
    fn of(x: &[f32]) -> Range {
        Range { low: x.iter().fold(0.0, |m, x| x.min(m)), high: x.iter().fold(0.0, |m, x| x.max(m)) }
    }
}

/// One group to be fitted.
pub(super) struct Problem<'a> {
    pub(super) rules: &'a Rules,
    pub(super) range: Range,
}

impl Problem<'_> {
    pub(super) fn max_code(&self) -> f32 {
        f32::from(self.rules.max)
    }

    /// The grid that spans the range shrunk by `shrink`.
    #[inline(always)]
    pub(super) fn min_max(&self, shrink: f32) -> (f32, u8) {
        let Range { low, high } = self.range;
        let max = self.max_code();
        if self.rules.symmetric {
            let scale = self.rules.precision.round(2.0 * high.max(-low) * shrink / max);
            (scale, self.rules.midpoint)
        } else {
            let scale = self.rules.precision.round((high - low) * shrink / max);
            let zero = (-low * shrink * inverse(scale)).round_ties_even();
            (scale, zero.clamp(f32::from(self.rules.min_zero), max) as u8)
        }
    }
}

/// AWQ's clipping by the exact loss of the group: `eᵀ H e` with its own block of the Hessian
/// (Lin et al. 2023, arXiv:2306.00978, measures the same on sampled tokens).
fn clip(x: &[f32], block: &[f32], problem: &Problem<'_>) -> (f32, u8) {
    let mut best = (f32::INFINITY, problem.min_max(1.0));
    let mut e = vec![0.0; x.len()];
    for step in 0..=10 {
        let (scale, zero) = problem.min_max(1.0 - 0.05 * step as f32);
        let (inverse, z, max) = (inverse(scale), f32::from(zero), problem.max_code());
        for (e, x) in e.iter_mut().zip(x) {
            *e = x - scale * (code(*x, inverse, z, max) - z);
        }
        let loss = quadratic_form(&e, block);
        if loss < best.0 {
            best = (loss, (scale, zero));
        }
    }
    best.1
}

simd_fn! {
    fn quadratic_form(e: &[f32], block: &[f32]) -> f32 {
        let n = e.len();
        let mut total = 0.0f32;
        for (row, scale) in block.chunks_exact(n).zip(e) {
            let mut lanes = [0.0f32; LANES];
            let (chunks, values) = (row.chunks_exact(LANES), e.chunks_exact(LANES));
            let rest: f32 = chunks.remainder().iter().zip(values.remainder()).map(|(a, b)| a * b).sum();
            for (a, b) in chunks.zip(values) {
                for lane in 0..LANES {
                    lanes[lane] += a[lane] * b[lane];
                }
            }
            total += (sum_lanes(lanes) + rest) * scale;
        }
        total
    }
}

/// Weighted squared error of the grid `(scale, zero)`, and the sums for the least-squares scale of its codes.
#[inline(always)]
fn evaluate(x: &[f32], h: &[f32], scale: f32, zero: f32, max: f32) -> f32 {
    let inverse = inverse(scale);
    let mut lanes = [0.0f32; LANES];
    for (x, h) in x.chunks_exact(LANES).zip(h.chunks_exact(LANES)) {
        for lane in 0..LANES {
            let e = x[lane] - scale * (code(x[lane], inverse, zero, max) - zero);
            lanes[lane] += h[lane] * e * e;
        }
    }
    sum_lanes(lanes)
}

/// `Σ h x c / Σ h c²` for the codes `c` that `(scale, zero)` gives.
#[inline(always)]
fn least_squares(x: &[f32], h: &[f32], scale: f32, zero: f32, max: f32) -> f32 {
    let inverse = inverse(scale);
    let (mut cross, mut square) = ([0.0f32; LANES], [0.0f32; LANES]);
    for (x, h) in x.chunks_exact(LANES).zip(h.chunks_exact(LANES)) {
        for lane in 0..LANES {
            let c = code(x[lane], inverse, zero, max) - zero;
            cross[lane] += h[lane] * x[lane] * c;
            square[lane] += h[lane] * c * c;
        }
    }
    let square = sum_lanes(square);
    if square > 0.0 { sum_lanes(cross) / square } else { scale }
}

/// The best grid found so far.
#[derive(Clone, Copy)]
struct Best {
    loss: f32,
    scale: f32,
    zero: f32,
}

impl Best {
    #[inline(always)]
    fn consider(&mut self, x: &[f32], h: &[f32], scale: f32, zero: f32, max: f32, precision: Float) {
        let scale = precision.round(scale);
        let loss = evaluate(x, h, scale, zero, max);
        if loss < self.loss {
            *self = Best { loss, scale, zero };
        }
    }
}

simd_fn! {
    /// `x` and `h` are padded with zeros to whole lanes.
    fn search(x: &[f32], h: &[f32], problem: &Problem<'_>) -> (f32, u8) {
        let Range { low, high } = problem.range;
        let (max, precision, rules) = (problem.max_code(), problem.rules.precision, problem.rules);
        if low == 0.0 && high == 0.0 {
            return problem.min_max(1.0);
        }
        let (scale, zero) = problem.min_max(1.0);
        let zero = f32::from(zero);
        let mut best = Best { loss: evaluate(x, h, scale, zero, max), scale, zero };
        if rules.symmetric {
            let (half, reach) = (f32::from(rules.midpoint), high.max(-low));
            let (from, to, steps) = candidates(rules);
            for step in 0..=steps {
                let size = reach / half * (from + (to - from) * step as f32 / steps as f32);
                best.consider(x, h, size, half, max, precision);
                best.consider(x, h, -size, half, max, precision);
            }
        } else {
            let lowest_zero = f32::from(rules.min_zero);
            let (from, _, steps) = candidates(rules);
            for step in 0..=steps {
                let shrink = 1.0 - (1.0 - from) * step as f32 / steps as f32;
                let size = (high - low) * shrink / max;
                // Codes that the shrunk grid lacks may be missing at either end.
                let (missing, top) = ((high - low) / size - max, -low / size);
                let options = (missing.ceil() as i32 + 1).clamp(2, 9);
                for option in 0..=options {
                    let zero = (top + 0.5 - (missing + 1.0) * option as f32 / options as f32).round_ties_even();
                    best.consider(x, h, size, zero.clamp(lowest_zero, max), max, precision);
                }
            }
        }
        for _ in 0..3 {
            let solved = least_squares(x, h, best.scale, best.zero, max);
            best.consider(x, h, solved, best.zero, max, precision);
            if !rules.symmetric {
                let lowest_zero = f32::from(rules.min_zero);
                for step in [-1.0, 1.0] {
                    let zero = (best.zero + step).clamp(lowest_zero, max);
                    best.consider(x, h, best.scale, zero, max, precision);
                }
            }
        }
        (best.scale, best.zero as u8)
    }
}

#[cfg(test)]
mod tests {
    use formats::Scheme;

    use super::super::testing::Noise;
    use super::*;

    fn loss(weight: &Array2<f32>, grid: &Grid, h: &[f32]) -> f64 {
        let codes = super::super::round::run(weight.view(), grid);
        let (cols, groups) = (weight.ncols(), grid.spec.groups());
        let mut total = 0.0;
        for (i, code) in codes.iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let at = row * groups + grid.spec.group_of[col] as usize;
            let value = grid.scales[at] * (f32::from(*code) - f32::from(grid.zeros[at]));
            total += f64::from(h[col]) * f64::from(weight[[row, col]] - value).powi(2);
        }
        total
    }

    #[test]
    fn the_search_beats_min_max_and_comes_near_an_exhaustive_one() {
        let mut noise = Noise(11);
        let weight = noise.matrix(12, 64).mapv(|x| x + 0.05 * x * x * x);
        let h: Vec<f32> = (0..64).map(|_| noise.next().powi(2) + 0.01).collect();
        for bits in [2, 3, 4, 8] {
            for symmetric in [true, false] {
                let scheme = Scheme { bits, group: Some(32), symmetric };
                let spec = GridSpec::of(scheme.encoding(Float::F16, 0), 64);
                let plain = loss(&weight, &run(weight.view(), &spec, FitKind::MinMax), &h);
                let grid = run(weight.view(), &spec, FitKind::Weighted(&h));
                let found = loss(&weight, &grid, &h);
                assert!(found <= plain, "{scheme:?}: {found} after {plain}");
                assert!(bits > 4 || found < 0.9 * plain, "{scheme:?}: {found} after {plain}");
                let mut best = 0.0;
                for row in 0..12 {
                    for group in 0..2 {
                        let part = weight.slice(ndarray::s![row..row + 1, group * 32..group * 32 + 32]).to_owned();
                        let h = &h[group * 32..][..32];
                        let reach = part.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                        let spec = GridSpec::of(Scheme { group: None, ..scheme }.encoding(Float::F16, 0), 32);
                        let mut least = f64::INFINITY;
                        let zeros: Vec<u8> = match (symmetric, bits) {
                            (true, _) => vec![scheme.midpoint()],
                            (false, 8) => (60..=200).step_by(4).collect(),
                            (false, _) => (0..=scheme.max_code()).collect(),
                        };
                        for zero in zeros {
                            for step in 1..=120 {
                                for sign in [1.0, -1.0] {
                                    let scale = Float::F16
                                        .round(sign * reach * 2.4 / f32::from(scheme.max_code()) * step as f32 / 120.0);
                                    let (scales, zeros) = (vec![scale], vec![zero]);
                                    let grid = Grid::of_integers(spec.clone(), 1, scales, zeros);
                                    least = least.min(loss(&part, &grid, h));
                                }
                            }
                        }
                        best += least;
                    }
                }
                // At 8 bits the loss is a ragged function of the scale: no short list of candidates finds its very bottom.
                let slack = if bits == 8 { 1.5 } else { 1.10 };
                assert!(found <= slack * best, "{scheme:?}: {found}, exhaustive {best}");
            }
        }
    }

    #[test]
    fn clipping_lowers_the_loss_of_the_whole_block() {
        let mut noise = Noise(12);
        let mut weight = noise.matrix(8, 32);
        weight.column_mut(3).mapv_inplace(|x| x * 3.0);
        let mut x = noise.matrix(64, 32);
        x.column_mut(3).mapv_inplace(|x| x * 0.01);
        let gram = super::super::gram::reference(x.view());
        let scheme = Scheme { bits: 3, group: Some(16), symmetric: false };
        let spec = GridSpec::of(scheme.encoding(Float::F16, 0), 32);
        let error = |kind: FitKind<'_, Array2<f32>>| {
            let grid = run(weight.view(), &spec, kind);
            let codes = super::super::round::run(weight.view(), &grid);
            let e = Array2::from_shape_fn((8, 32), |(r, c)| {
                let at = r * 2 + c / 16;
                weight[[r, c]] - grid.scales[at] * (f32::from(codes[r * 32 + c]) - f32::from(grid.zeros[at]))
            });
            super::super::gram::quadratic(e.view(), gram.view())
        };
        assert!(error(FitKind::BlockHessian(&gram)) < 0.8 * error(FitKind::MinMax));
    }

    #[test]
    fn zero_groups_and_forbidden_zeros() {
        let weight = Array2::from_shape_fn((1, 32), |(_, c)| if c < 16 { 0.0 } else { c as f32 });
        for kind in [FitKind::MinMax, FitKind::Weighted(&[1.0; 32])] {
            let scheme = Scheme { bits: 4, group: Some(16), symmetric: false };
            let spec = GridSpec::of(scheme.encoding(Float::F16, 1), 32);
            let grid = run(weight.view(), &spec, kind);
            assert!(grid.zeros.iter().all(|z| *z >= 1));
            let codes = super::super::round::run(weight.view(), &grid);
            assert!(codes[..16].iter().all(|c| *c == grid.zeros[0]), "zeros stay zeros");
        }
    }
}
