//! The refinement against its own promise, and of integers against a plain loop in `f64` (that of blocks is in `plain.rs`).

use formats::ggml::TYPES;

use formats::Scheme;

use super::super::testing::{Noise, dequantized};
use super::super::{blocks, dequantize, factor, fit, gram, sweep};
use super::*;
use crate::FitKind;

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

/// One row of integers in groups under a damped Hessian, one value after another.
struct Plain<'a> {
    rules: Rules,
    /// Columns of each group.
    groups: Vec<Vec<usize>>,
    hessian: &'a Array2<f64>,
    target: Vec<f64>,
    scales: Vec<f64>,
    zeros: Vec<f64>,
    codes: Vec<f64>,
}

impl Plain<'_> {
    /// What is missing, and `H` times that.
    fn pull(&self) -> [Vec<f64>; 2] {
        let mut errors = self.target.clone();
        for (group, columns) in self.groups.iter().enumerate() {
            columns.iter().for_each(|col| errors[*col] -= self.scales[group] * (self.codes[*col] - self.zeros[group]));
        }
        let pull = self.hessian.outer_iter().map(|row| row.iter().zip(&errors).map(|(h, e)| h * e).sum()).collect();
        [errors, pull]
    }

    /// A column without energy counts with a weight of 1.
    fn loss(&self) -> f64 {
        let [errors, pull] = self.pull();
        let terms = errors.iter().zip(&pull).zip(self.hessian.diag());
        terms.map(|((e, g), h)| if *h > 0.0 { e * g } else { e * e }).sum()
    }

    /// What the loss changes by if a group gets another scale and zero: without any derivative. Columns without energy do not count.
    fn change(&mut self, group: usize, scale: f64, zero: f64) -> f64 {
        let quadratic = |this: &Self| -> f64 {
            let [errors, pull] = this.pull();
            errors.iter().zip(&pull).map(|(e, g)| e * g).sum()
        };
        let (before, from) = (quadratic(self), [self.scales[group], self.zeros[group]]);
        (self.scales[group], self.zeros[group]) = (scale, zero);
        let after = quadratic(self);
        [self.scales[group], self.zeros[group]] = from;
        after - before
    }

    fn move_scales(&mut self) {
        for group in 0..self.groups.len() {
            let (scale, zero) = (self.scales[group], self.zeros[group]);
            let mut best = (0.0, scale, zero);
            let shifts: &[f64] = if self.rules.symmetric { &[0.0] } else { &[0.0, -1.0, 1.0] };
            for shift in shifts {
                let wanted = zero + shift;
                if scale == 0.0
                    || *shift != 0.0 && !(f64::from(self.rules.min_zero)..=f64::from(self.rules.max)).contains(&wanted)
                {
                    continue;
                }
                // The loss is a parabola in the scale: three points say where its bottom is.
                let step = 0.1 * scale;
                let [a, b, c] = [-step, 0.0, step].map(|step| self.change(group, scale + step, wanted));
                if a + c - 2.0 * b <= 0.0 {
                    continue;
                }
                let bottom = scale + 0.5 * step * (a - c) / (a + c - 2.0 * b);
                let stored = f64::from(self.rules.precision.round(bottom as f32));
                let change = self.change(group, stored, wanted);
                if (0.25..=2.0).contains(&(stored / scale)) && change < best.0 {
                    best = (change, stored, wanted);
                }
            }
            (self.scales[group], self.zeros[group]) = (best.1, best.2);
        }
    }

    fn move_codes(&mut self) {
        for group in 0..self.groups.len() {
            for col in self.groups[group].clone() {
                let (scale, zero, energy) = (self.scales[group], self.zeros[group], self.hessian[[col, col]]);
                if energy > 0.0 && scale != 0.0 {
                    let wanted = scale * (self.codes[col] - zero) + self.pull()[1][col] / energy;
                    self.codes[col] = ((wanted / scale).round_ties_even() + zero).clamp(0.0, f64::from(self.rules.max));
                }
            }
        }
    }
}

#[test]
fn integers_move_where_a_plain_loop_moves_them() {
    let mut noise = Noise(52);
    for (bits, symmetric, group, cols, apart) in [
        (4, true, Some(32), 96, false),
        (3, false, Some(24), 61, false),
        (2, false, None, 40, false),
        (4, false, Some(16), 64, true),
        (8, true, Some(16), 32, true),
    ] {
        let rows = 67;
        let mixing = noise.matrix(cols, cols);
        let mut x = noise.matrix(3 * cols, cols).dot(&mixing);
        x.column_mut(7).fill(0.0);
        let hessian = gram::reference(x.view());
        let weight = noise.matrix(rows, cols);
        let scheme = Scheme { bits, group, symmetric };
        let mut spec = GridSpec::of(scheme.encoding(Float::F16, 1), cols);
        let groups = spec.groups();
        if apart {
            spec.group_of.iter_mut().zip(0..).for_each(|(group, col)| *group = col % groups as u32);
        }
        let mut grid = fit::run(weight.view(), &spec, FitKind::MinMax);
        grid.scales[groups] = 0.0;
        let factor = factor::run(hessian.view(), (0..cols as u32).rev().collect(), 0.05).unwrap();
        let swept = sweep::run(weight.view(), &factor, &grid);
        let (before, start) = (grid.clone(), swept.codes.clone());
        let mut codes = swept.codes;
        let loss = run(weight.view(), hessian.view(), 0.05, &mut grid, &mut codes);

        let mut damped = hessian.mapv(f64::from);
        damped.diag_mut().iter_mut().for_each(|h| *h *= 1.05);
        let columns = |group: usize| (0..cols).filter(|col| spec.group_of[*col] as usize == group).collect();
        let (mut plain_loss, mut other_codes, mut other_grids, mut held) = (0.0, 0, 0, 0.0);
        for row in 0..rows {
            let own = row * groups..(row + 1) * groups;
            let mut one = Plain {
                rules: Rules::of(&spec.encoding),
                groups: (0..groups).map(columns).collect(),
                hessian: &damped,
                target: weight.row(row).iter().map(|x| f64::from(*x)).collect(),
                scales: before.scales[own.clone()].iter().map(|x| f64::from(*x)).collect(),
                zeros: before.zeros[own.clone()].iter().map(|x| f64::from(*x)).collect(),
                codes: start[row * cols..][..cols].iter().map(|x| f64::from(*x)).collect(),
            };
            let from = one.loss();
            one.move_scales();
            for _ in 0..turns(&spec.encoding) {
                one.move_codes();
                one.move_scales();
            }
            plain_loss += one.loss();
            assert!(one.loss() <= from * (1.0 + 1e-9), "{scheme:?}: the plain loop's loss rose");
            let found = &codes[row * cols..][..cols];
            other_codes += found.iter().zip(&one.codes).filter(|(a, b)| f64::from(**a) != **b).count();
            let found = grid.scales[own.clone()].iter().zip(&grid.zeros[own.clone()]);
            let pairs = found.zip(one.scales.iter().zip(&one.zeros));
            other_grids += pairs.filter(|((a, z), (b, y))| f64::from(**a) != **b || f64::from(**z) != **y).count();
            // What the fast form ends with, measured by the plain one.
            one.scales = grid.scales[own.clone()].iter().map(|x| f64::from(*x)).collect();
            one.zeros = grid.zeros[own].iter().map(|x| f64::from(*x)).collect();
            one.codes = codes[row * cols..][..cols].iter().map(|x| f64::from(*x)).collect();
            held += one.loss();
            assert!(one.loss() <= from * (1.0 + 1e-4), "{scheme:?}: the loss of a row rose");
        }
        assert!((held / loss - 1.0).abs() < 1e-3, "{scheme:?}: it says {loss}, and holds {held}");
        assert!((loss / plain_loss - 1.0).abs() < 2e-3, "{scheme:?}: {loss}, plain loop {plain_loss}");
        // Of candidates that are as good as equal either may be taken, and what follows follows from that.
        assert!(other_codes * 100 <= codes.len(), "{scheme:?}: {other_codes} of {} codes", codes.len());
        assert!(other_grids * 25 <= rows * groups, "{scheme:?}: {other_grids} of {} groups", rows * groups);
        assert!(loss < 0.99 * swept.loss, "{scheme:?}: {loss} after {}", swept.loss);
        assert!(
            codes.iter().all(|code| *code <= scheme.max_code()) && (symmetric || grid.zeros.iter().all(|z| *z >= 1))
        );
        let stays = |values: &[u8]| values[cols..][..cols].to_vec();
        let zero_group = (0..cols).filter(|col| spec.group_of[*col] == 0);
        assert!(
            zero_group.clone().all(|col| stays(&codes)[col] == stays(&start)[col]),
            "a group without a scale moved"
        );
        let values = dequantize::run(ArrayView2::from_shape((rows, cols), &codes).unwrap(), &grid);
        assert!(values.iter().all(|x| x.is_finite()));
    }
}
