//! After the sweep: moves the blocks' scales, then single codes, wherever the layer's output comes nearer.
//!
//! A sweep fixes codes one by one on scales that were chosen without it. With the codes at hand the loss
//! `tr((T − Ŵ) H (T − Ŵ)ᵀ)` is quadratic in each block's scale and min, and in each single value: both are solved exactly, rounded
//! to what the file holds, and kept if the loss falls. So it never rises.
//!
//! Cyclic coordinate descent over codes is QuantEase's (Behdin et al. 2023, arXiv:2309.01885).

use formats::{Encoding, Float};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::gemm;
use super::levels::{AnyLevels, LevelSet, codes_of};
use super::round::inverse;
use crate::{Grid, simd_fn};

/// Rows that one task carries, and columns of a panel of codes.
const ROWS: usize = 64;
const PANEL: usize = 64;

type Lane = [f32; ROWS];

/// Lowers the loss of `codes` on `grid`; returns what it has become, under the damped Hessian.
///
/// `gram` is `[n, n]`, its lower triangle is read and its diagonal multiplied by `1 + damp`, as the sweep's was. A column without
/// energy counts with a weight of 1 and stays as it is.
///
/// # Panics
/// If it is none of ggml's types or shapes differ: mistakes of the caller.
pub fn run(target: ArrayView2<f32>, gram: ArrayView2<f32>, damp: f64, grid: &mut Grid, codes: &mut [u8]) -> f64 {
    let (rows, n) = target.dim();
    assert!(gram.dim() == (n, n) && grid.cols() == n && codes.len() == rows * n, "checked by the caller");
    let ty = grid.spec.encoding.ggml_type().expect("a type of ggml's");
    let (encoding, block_len) = (&ty.encoding(), ty.block_len);
    let hessian = whole(gram, damp);
    let target = target.to_slice().expect("a contiguous matrix");
    let setup =
        Setup { hessian: &hessian, n, encoding, block_len, set: AnyLevels::of(encoding), codes: codes_of(encoding) };
    let losses: Vec<f64> = codes
        .par_chunks_mut(ROWS * n)
        .zip(grid.blocks.par_chunks_mut(ROWS * (n / block_len)))
        .zip(target.par_chunks(ROWS * n))
        .map(|((codes, blocks), target)| Rows::new(&setup, target, codes, blocks).refine())
        .collect();
    *grid = Grid::of_blocks(ty, rows, n, std::mem::take(&mut grid.blocks));
    losses.iter().sum()
}

/// Both triangles, damped.
fn whole(gram: ArrayView2<f32>, damp: f64) -> Array2<f32> {
    let n = gram.nrows();
    let mut h = Array2::zeros((n, n));
    h.as_slice_mut().expect("a new matrix").par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
        for (j, value) in row.iter_mut().enumerate() {
            *value = if i > j { gram[[i, j]] } else { gram[[j, i]] };
        }
        row[i] = (f64::from(row[i].max(0.0)) * (1.0 + damp)) as f32;
    });
    h
}

struct Setup<'a> {
    hessian: &'a Array2<f32>,
    n: usize,
    encoding: &'a Encoding,
    block_len: usize,
    set: AnyLevels,
    /// The code of each level, at `level + 128`.
    codes: [u8; 256],
}

/// Some rows at work; columns one after the other, rows side by side.
struct Rows<'a> {
    setup: &'a Setup<'a>,
    rows: usize,
    out: &'a mut [u8],
    blocks: &'a mut [formats::ggml::BlockScales],
    /// The level of each weight.
    levels: Vec<Lane>,
    /// What is missing: target minus value.
    errors: Vec<Lane>,
    /// `H` times that.
    pull: Vec<Lane>,
}

impl<'a> Rows<'a> {
    fn new(
        setup: &'a Setup<'a>,
        target: &[f32],
        out: &'a mut [u8],
        blocks: &'a mut [formats::ggml::BlockScales],
    ) -> Self {
        let n = setup.n;
        let rows = target.len() / n;
        let zero = || vec![[0.0; ROWS]; n];
        let mut this = Rows { setup, rows, out, blocks, levels: zero(), errors: zero(), pull: zero() };
        for row in 0..rows {
            for col in 0..n {
                this.levels[col][row] = setup.encoding.levels.level(this.out[row * n + col]);
            }
        }
        for col in 0..n {
            let (scales, mins) = this.grid(col);
            for row in 0..rows {
                let value = scales[row] * this.levels[col][row] - mins[row];
                this.errors[col][row] = target[row * n + col] - value;
            }
        }
        this.add_pull(0, n, None);
        this
    }

    /// Scale and min of a column's group, for every row.
    fn grid(&self, col: usize) -> (Lane, Lane) {
        let (mut scales, mut mins) = ([0.0; ROWS], [0.0; ROWS]);
        let (block, group) = (col / self.setup.block_len, col % self.setup.block_len / self.setup.encoding.group());
        let per_row = self.setup.n / self.setup.block_len;
        for row in 0..self.rows {
            let at = &self.blocks[row * per_row + block];
            let [a, b] = self.factors(at, group);
            (scales[row], mins[row]) = (at.d * a, at.m * b);
        }
        (scales, mins)
    }

    /// What a block's scale and min are multiplied by in a group.
    #[inline(always)]
    fn factors(&self, block: &formats::ggml::BlockScales, group: usize) -> [f32; 2] {
        match (self.setup.encoding.sub(), self.setup.encoding.has_min()) {
            (Some(_), true) => [f32::from(block.scales[group]), f32::from(block.mins[group])],
            (Some(_), false) => [f32::from(block.scales[group]), 0.0],
            (None, true) => [1.0, 1.0],
            (None, false) => [1.0, 0.0],
        }
    }

    /// Adds `H[.., first..first + count] · step` to the pull, or all of `H · errors`.
    fn add_pull(&mut self, first: usize, count: usize, step: Option<&[Lane]>) {
        let n = self.setup.n;
        let source = step.map_or(self.errors.as_ptr(), <[Lane]>::as_ptr);
        // SAFETY: `H` is [n, n]; `count` lanes follow `source`, and `pull` has `n`.
        unsafe {
            gemm(
                [n, ROWS, count],
                self.pull.as_mut_ptr().cast::<f32>(),
                [ROWS, 1],
                true,
                self.setup.hessian.as_ptr().add(first),
                [n, 1],
                source.cast::<f32>(),
                [ROWS, 1],
                [1.0, 1.0],
            );
        }
    }

    fn refine(mut self) -> f64 {
        self.move_scales();
        self.move_codes();
        self.move_scales();
        let n = self.setup.n;
        let mut loss = 0.0;
        for row in 0..self.rows {
            for col in 0..n {
                self.out[row * n + col] = self.setup.codes[(self.levels[col][row] + 128.0) as usize];
            }
        }
        for col in 0..n {
            let dead = self.setup.hessian[[col, col]] <= 0.0;
            for row in 0..self.rows {
                let (e, g) = (f64::from(self.errors[col][row]), f64::from(self.pull[col][row]));
                loss += if dead { e * e } else { e * g };
            }
        }
        loss
    }

    /// One exact move of every block's scale and min.
    fn move_scales(&mut self) {
        // A power of two has no room to move.
        if self.setup.encoding.precision() == Float::E8M0 {
            return;
        }
        let (n, width, group) = (self.setup.n, self.setup.block_len, self.setup.encoding.group());
        let per_row = n / width;
        let has_min = self.setup.encoding.has_min();
        let zero = || vec![[0.0f32; ROWS]; width];
        let (mut u, mut v, mut hu, mut hv) = (zero(), zero(), zero(), zero());
        for block in 0..per_row {
            let first = block * width;
            for col in 0..width {
                for row in 0..self.rows {
                    let [a, b] = self.factors(&self.blocks[row * per_row + block], col / group);
                    (u[col][row], v[col][row]) = (a * self.levels[first + col][row], -b);
                }
            }
            for (image, of) in [(&mut hu, &u), (&mut hv, &v)].into_iter().take(1 + usize::from(has_min)) {
                // SAFETY: the block's own square of `H`; both buffers hold `width` lanes.
                unsafe {
                    gemm(
                        [width, ROWS, width],
                        image.as_mut_ptr().cast::<f32>(),
                        [ROWS, 1],
                        false,
                        self.setup.hessian.as_ptr().add(first * n + first),
                        [n, 1],
                        of.as_ptr().cast::<f32>(),
                        [ROWS, 1],
                        [0.0, 1.0],
                    );
                }
            }
            let mut moves = [[0.0f32; 2]; ROWS];
            for row in 0..self.rows {
                let [mut uu, mut uv, mut vv, mut ug, mut vg] = [0.0f64; 5];
                for col in 0..width {
                    let (a, b, g) = (u[col][row], v[col][row], self.pull[first + col][row]);
                    uu += f64::from(a * hu[col][row]);
                    ug += f64::from(a * g);
                    if has_min {
                        uv += f64::from(b * hu[col][row]);
                        vv += f64::from(b * hv[col][row]);
                        vg += f64::from(b * g);
                    }
                }
                let at = &mut self.blocks[row * per_row + block];
                let (d, m) = (at.d, at.m);
                let mut best = (0.0f64, d, m);
                let mut consider = |new_d: f64, new_m: f64| {
                    let (new_d, new_m) = (Float::F16.round(new_d as f32), Float::F16.round(new_m as f32));
                    // Far moves say that the quadratic is flat there, not that the scale was wrong.
                    let near = new_d / d;
                    if !((0.25..=2.0).contains(&near) && new_m.is_finite())
                        || (self.setup.encoding.sub().is_some() && new_m < 0.0)
                    {
                        return;
                    }
                    let (s, t) = (f64::from(new_d) - f64::from(d), f64::from(new_m) - f64::from(m));
                    let change = s * s * uu + 2.0 * s * t * uv + t * t * vv - 2.0 * (s * ug + t * vg);
                    if change < best.0 {
                        best = (change, new_d, new_m);
                    }
                };
                if uu > 0.0 && d != 0.0 {
                    consider(f64::from(d) + ug / uu, f64::from(m));
                    let determinant = uu * vv - uv * uv;
                    if has_min && determinant > 1e-6 * uu * vv {
                        let s = (ug * vv - vg * uv) / determinant;
                        let t = (vg * uu - ug * uv) / determinant;
                        consider(f64::from(d) + s, f64::from(m) + t);
                    }
                }
                (at.d, at.m) = (best.1, best.2);
                moves[row] = [best.1 - d, best.2 - m];
            }
            for col in 0..width {
                for row in 0..self.rows {
                    let step = -(moves[row][0] * u[col][row] + moves[row][1] * v[col][row]);
                    self.errors[first + col][row] += step;
                    u[col][row] = step;
                }
            }
            self.add_pull(first, width, Some(&u));
        }
    }

    /// One round over all codes, each to where the loss is least while the others stay.
    fn move_codes(&mut self) {
        let n = self.setup.n;
        let mut steps = vec![[0.0f32; ROWS]; PANEL];
        for start in (0..n).step_by(PANEL) {
            let count = PANEL.min(n - start);
            for col in start..start + count {
                let h = &self.setup.hessian.as_slice().expect("a new matrix")[col * n..][..n];
                let step = &mut steps[col - start];
                *step = [0.0; ROWS];
                if h[col] <= 0.0 {
                    continue;
                }
                let (scales, mins) = self.grid(col);
                descend(
                    &self.setup.set,
                    [&scales, &mins, &scales.map(inverse)],
                    1.0 / h[col],
                    &mut self.levels[col],
                    step,
                    &h[start..start + count],
                    &mut self.pull[start..start + count],
                    col - start,
                );
                self.errors[col].iter_mut().zip(&*step).for_each(|(e, s)| *e += s);
            }
            // The panel's own lanes are up to date already: put them aside while the others follow.
            let own = self.pull[start..start + count].to_vec();
            self.add_pull(start, count, Some(&steps[..count]));
            self.pull[start..start + count].copy_from_slice(&own);
        }
    }
}

simd_fn! {
    /// Moves one column's codes and the pull of its panel; `step` is what the errors change by.
    fn descend(
        set: &AnyLevels,
        grid: [&Lane; 3],
        inverse_energy: f32,
        levels: &mut Lane,
        step: &mut Lane,
        ahead: &[f32],
        panel: &mut [Lane],
        at: usize,
    ) {
        let pull = panel[at];
        match *set {
            AnyLevels::Even(set) => nearest(set, grid, inverse_energy, &pull, levels, step),
            AnyLevels::Table(set) => nearest(set, grid, inverse_energy, &pull, levels, step),
        }
        let step = *step;
        for (h, lane) in ahead.iter().zip(panel) {
            for row in 0..ROWS {
                lane[row] += step[row] * h;
            }
        }
    }
}

#[inline(always)]
fn nearest<L: LevelSet>(
    set: L,
    [scales, mins, inverses]: [&Lane; 3],
    inverse_energy: f32,
    pull: &Lane,
    levels: &mut Lane,
    step: &mut Lane,
) {
    for row in 0..ROWS {
        let value = scales[row] * levels[row] - mins[row];
        let wanted = value + pull[row] * inverse_energy;
        let level = set.nearest((wanted + mins[row]) * inverses[row]);
        // A group without a scale has nowhere to go.
        let level = if inverses[row] == 0.0 { levels[row] } else { level };
        step[row] = scales[row] * (levels[row] - level);
        levels[row] = level;
    }
}

#[cfg(test)]
mod tests {
    use formats::ggml::TYPES;

    use super::super::testing::{Noise, dequantized};
    use super::super::{blocks, factor, gram, sweep};
    use super::*;

    #[test]
    fn the_loss_falls_and_is_what_it_is_said_to_be() {
        let mut noise = Noise(50);
        let mixing = noise.matrix(256, 256);
        let mut x = noise.matrix(600, 256).dot(&mixing);
        x.column_mut(7).fill(0.0);
        let hessian = gram::reference(x.view());
        let weight = noise.matrix(70, 256);
        let factor = factor::run(hessian.view(), (0..256).rev().collect(), 0.05).unwrap();
        for ty in TYPES.iter().filter(|t| t.layout().is_some()) {
            let trace = |grid: &Grid, codes: &[u8]| {
                let e = &weight - &Array2::from_shape_vec((70, 256), dequantized(grid, codes)).unwrap();
                let mut damped = hessian.clone();
                damped.diag_mut().iter_mut().for_each(|d| *d *= 1.05);
                damped[[7, 7]] = 1.0;
                gram::quadratic(e.view(), damped.view())
            };
            let mut grid = blocks::fit(weight.view(), *ty, None);
            let swept = sweep::run(weight.view(), &factor, &grid);
            let mut codes = swept.codes.clone();
            let loss = run(weight.view(), hessian.view(), 0.05, &mut grid, &mut codes);
            let found = trace(&grid, &codes);
            assert!((found - loss).abs() <= 2e-3 * found, "{ty}: {found}, and it says {loss}");
            assert!(found < 0.995 * swept.loss, "{ty}: {found} after {}", swept.loss);
        }
    }
}
