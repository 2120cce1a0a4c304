//! After the sweep: moves scales, then single codes, wherever the layer's output comes nearer.
//!
//! A sweep fixes codes one by one on scales that were chosen without it. With the codes at hand the loss
//! `tr((T − Ŵ) H (T − Ŵ)ᵀ)` is quadratic in each stored scale and offset, and in each single value: both are solved exactly, rounded
//! to what the file holds, and kept if the loss falls. So it never rises.
//!
//! ```text
//! e = t − ŵ;  g = H e                          # the loss is Σ e g, its slope along a change of ŵ is −2 g
//! move_scales
//! repeat:  move_codes;  move_scales
//!
//! move_scales: for each unit, the columns that share what the file stores as one scale (and zero or min):
//!     u, v  = what its values change by with the scale, with the offset
//!     change(s, t) = s² uᵀHu + 2 s t uᵀHv + t² vᵀHv − 2 (s uᵀg + t vᵀg)
//!     take the stored scale and offset of the least change, if that is below 0;  e and g follow
//! move_codes: for each column p:
//!     ŵ[p]  = the value nearest to ŵ[p] + g[p] / H[p, p];  e and g follow
//! ```
//!
//! A unit of ggml's is a block or superblock, whose groups' integers stay; of integers in groups it is a group, whose zero is an integer
//! itself and moves by one; of other levels it is a group with its scale and min. Columns whose groups lie apart (`desc_act`) are brought together first.
//!
//! Cyclic coordinate descent over codes is QuantEase's (Behdin et al. 2023, arXiv:2309.01885).

use std::ops::Range;

use formats::ggml::BlockScales;
use formats::{Encoding, Float};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::apart::Stored;
use super::fit::Rules;
use super::gemm;
use super::levels::{AnyLevels, LevelSet, codes_of, with_levels};
use super::round::{code, inverse};
use crate::{Grid, GridSpec, simd_fn};

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
/// If the encoding has no codes, or shapes differ: mistakes of the caller.
pub fn run(target: ArrayView2<f32>, gram: ArrayView2<f32>, damp: f64, grid: &mut Grid, codes: &mut [u8]) -> f64 {
    let (rows, n) = target.dim();
    assert!(gram.dim() == (n, n) && grid.cols() == n && codes.len() == rows * n, "checked by the caller");
    if rows * n == 0 {
        return 0.0;
    }
    let Units { order, ranges } = units(&grid.spec);
    let unit_of = ranges.iter().enumerate().flat_map(|(unit, range)| vec![unit; range.len()]).collect();
    let encoding = grid.spec.encoding;
    let kind = match encoding.is_integers() {
        false => Kind::Blocks {
            encoding: &encoding,
            stored: Stored::of(&encoding, grid.spec.global),
            set: AnyLevels::of(&encoding),
            codes: Box::new(codes_of(&encoding)),
        },
        true => Kind::Integers(Rules::of(&encoding)),
    };
    let hessian = whole(gram, damp, order.as_deref());
    let setup = Setup { hessian, n, order, units: ranges, unit_of, turns: turns(&encoding), kind };
    let target = target.to_slice().expect("a contiguous matrix");
    let per_task = ROWS * setup.units.len();
    let ends: Vec<Ends<'_>> = match encoding.is_integers() {
        false => grid.blocks.chunks_mut(per_task).map(Ends::Blocks).collect(),
        true => {
            let zeros = grid.zeros.chunks_mut(per_task);
            grid.scales.chunks_mut(per_task).zip(zeros).map(|(scales, zeros)| Ends::Integers(scales, zeros)).collect()
        }
    };
    let losses: Vec<f64> = codes
        .par_chunks_mut(ROWS * n)
        .zip(ends)
        .zip(target.par_chunks(ROWS * n))
        .map(|((codes, ends), target)| Rows::new(&setup, target, codes, ends).refine())
        .collect();
    if !encoding.is_integers() {
        *grid = Grid::of_blocks(grid.spec.clone(), rows, std::mem::take(&mut grid.blocks));
    }
    losses.iter().sum()
}

/// How often codes are moved, and scales after them. Groups with a scale of their own have it for few values, which a second round follows.
pub(crate) fn turns(encoding: &Encoding) -> usize {
    if encoding.ggml_type().is_some() { 1 } else { 2 }
}

/// Whether scales move: a power of two has no room to, and what rows have in common is not one row's to change.
pub(crate) fn moves_scales(encoding: &Encoding) -> bool {
    encoding.precision() != Float::E8M0 && encoding.block_height(2) == 1
}

/// Columns that share what the file stores as one scale.
pub(crate) struct Units {
    /// The column at each position, unless all are where they were.
    pub(crate) order: Option<Vec<u32>>,
    /// The positions of each.
    pub(crate) ranges: Vec<Range<usize>>,
}

/// The units of a row, in the order of the grid's blocks or groups.
pub(crate) fn units(spec: &GridSpec) -> Units {
    let n = spec.group_of.len();
    if !spec.encoding.is_integers() {
        let width = spec.encoding.unit_width(n).max(1);
        return Units { order: None, ranges: (0..n).step_by(width).map(|first| first..n.min(first + width)).collect() };
    }
    // Stable, so that columns of a group keep their order.
    let mut order: Vec<u32> = (0..n as u32).collect();
    order.sort_by_key(|col| spec.group_of[*col as usize]);
    let mut ranges = vec![0..0; spec.groups()];
    for (position, col) in order.iter().enumerate() {
        let range = &mut ranges[spec.group_of[*col as usize] as usize];
        *range = if range.end == 0 { position..position + 1 } else { range.start..position + 1 };
    }
    let moved = order.iter().zip(0..).any(|(col, position)| *col != position);
    Units { order: moved.then_some(order), ranges }
}

/// Both triangles, damped, with columns in order.
fn whole(gram: ArrayView2<f32>, damp: f64, order: Option<&[u32]>) -> Array2<f32> {
    let n = gram.nrows();
    let of = |position: usize| order.map_or(position, |order| order[position] as usize);
    let mut h = Array2::zeros((n, n));
    h.as_slice_mut().expect("a new matrix").par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
        let at = of(i);
        for (j, value) in row.iter_mut().enumerate() {
            let other = of(j);
            *value = if at > other { gram[[at, other]] } else { gram[[other, at]] };
        }
        row[i] = (f64::from(row[i].max(0.0)) * (1.0 + damp)) as f32;
    });
    h
}

/// What codes stand for.
enum Kind<'a> {
    /// `scale · level − min`, from the stored scales of blocks; `codes` has the code of each byte that is kept of a level.
    Blocks { encoding: &'a Encoding, stored: Stored, set: AnyLevels, codes: Box<[u8; 256]> },
    /// `scale · (code − zero)`.
    Integers(Rules),
}

/// Scales of some rows as the grid holds them.
enum Ends<'a> {
    Blocks(&'a mut [BlockScales]),
    Integers(&'a mut [f32], &'a mut [u8]),
}

impl Ends<'_> {
    /// Scale, and min or zero.
    fn at(&self, index: usize) -> [f32; 2] {
        match self {
            Ends::Blocks(blocks) => [blocks[index].d, blocks[index].m],
            Ends::Integers(scales, zeros) => [scales[index], zeros[index].into()],
        }
    }

    fn set(&mut self, index: usize, [scale, offset]: [f32; 2]) {
        match self {
            Ends::Blocks(blocks) => (blocks[index].d, blocks[index].m) = (scale, offset),
            Ends::Integers(scales, zeros) => (scales[index], zeros[index]) = (scale, offset as u8),
        }
    }
}

struct Setup<'a> {
    /// `[n, n]`, both triangles, damped.
    hessian: Array2<f32>,
    n: usize,
    /// The column at each position.
    order: Option<Vec<u32>>,
    units: Vec<Range<usize>>,
    /// The unit of each position.
    unit_of: Vec<usize>,
    /// How often codes are moved.
    turns: usize,
    kind: Kind<'a>,
}

impl Setup<'_> {
    fn column(&self, position: usize) -> usize {
        self.order.as_ref().map_or(position, |order| order[position] as usize)
    }
}

/// Some rows at work; columns one after the other, rows side by side.
struct Rows<'a> {
    setup: &'a Setup<'a>,
    rows: usize,
    out: &'a mut [u8],
    ends: Ends<'a>,
    /// The level of each weight; of integers the code.
    levels: Vec<Lane>,
    /// What is missing: target minus value.
    errors: Vec<Lane>,
    /// `H` times that.
    pull: Vec<Lane>,
}

impl<'a> Rows<'a> {
    fn new(setup: &'a Setup<'a>, target: &[f32], out: &'a mut [u8], ends: Ends<'a>) -> Self {
        let n = setup.n;
        let rows = target.len() / n;
        let zero = || vec![[0.0; ROWS]; n];
        let mut this = Rows { setup, rows, out, ends, levels: zero(), errors: zero(), pull: zero() };
        for row in 0..rows {
            for at in 0..n {
                let code = this.out[row * n + setup.column(at)];
                this.levels[at][row] = match &setup.kind {
                    Kind::Blocks { encoding, .. } => encoding.levels.level(code),
                    Kind::Integers(_) => code.into(),
                };
            }
        }
        for at in 0..n {
            let (scales, offsets) = this.grid(at);
            for row in 0..rows {
                let level = this.levels[at][row];
                let value = match &setup.kind {
                    Kind::Blocks { .. } => scales[row] * level - offsets[row],
                    Kind::Integers(_) => scales[row] * (level - offsets[row]),
                };
                this.errors[at][row] = target[row * n + setup.column(at)] - value;
            }
        }
        this.add_pull(0, n, None);
        this
    }

    /// Scale of a position's group, and its min or zero, for every row.
    fn grid(&self, at: usize) -> (Lane, Lane) {
        let (mut scales, mut offsets) = ([0.0; ROWS], [0.0; ROWS]);
        let unit = self.setup.unit_of[at];
        for row in 0..self.rows {
            let [d, m] = self.ends.at(row * self.setup.units.len() + unit);
            let [a, b] = self.factors(row, at);
            (scales[row], offsets[row]) = (d * a, m * b);
        }
        (scales, offsets)
    }

    /// What a unit's scale and offset are multiplied by in a position's group.
    #[inline(always)]
    fn factors(&self, row: usize, at: usize) -> [f32; 2] {
        let (Kind::Blocks { encoding, .. }, Ends::Blocks(blocks)) = (&self.setup.kind, &self.ends) else {
            return [1.0, 1.0];
        };
        let unit = self.setup.unit_of[at];
        let group = (at - self.setup.units[unit].start) / encoding.group_width(self.setup.n).max(1);
        let block = &blocks[row * self.setup.units.len() + unit];
        match (encoding.sub(), encoding.has_min()) {
            (Some(_), true) => [f32::from(block.scales[group]), f32::from(block.mins[group])],
            (Some(_), false) => [f32::from(block.scales[group]), 0.0],
            (None, true) => [1.0, 1.0],
            (None, false) => [1.0, 0.0],
        }
    }

    /// What a value changes by with its unit's scale, and with its offset: with a min, or with `scale · zero`.
    #[inline(always)]
    fn slopes(&self, row: usize, at: usize) -> [f32; 2] {
        let level = self.levels[at][row];
        match &self.setup.kind {
            Kind::Blocks { .. } => {
                let [a, b] = self.factors(row, at);
                [a * level, -b]
            }
            Kind::Integers(_) => {
                let [_, zero] = self.ends.at(row * self.setup.units.len() + self.setup.unit_of[at]);
                [level - zero, -1.0]
            }
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
        for _ in 0..self.setup.turns {
            self.move_codes();
            self.move_scales();
        }
        let n = self.setup.n;
        let mut loss = 0.0;
        for at in 0..n {
            let col = self.setup.column(at);
            for row in 0..self.rows {
                let level = self.levels[at][row];
                self.out[row * n + col] = match &self.setup.kind {
                    Kind::Blocks { set, codes, .. } => codes[usize::from(with_levels!(*set, set => set.keep(level)))],
                    Kind::Integers(_) => level as u8,
                };
            }
        }
        for at in 0..n {
            let dead = self.setup.hessian[[at, at]] <= 0.0;
            for row in 0..self.rows {
                let (e, g) = (f64::from(self.errors[at][row]), f64::from(self.pull[at][row]));
                loss += if dead { e * e } else { e * g };
            }
        }
        loss
    }

    /// One exact move of every unit's scale and offset.
    fn move_scales(&mut self) {
        let setup = self.setup;
        let two = match &setup.kind {
            Kind::Blocks { encoding, .. } if !moves_scales(encoding) => return,
            Kind::Blocks { encoding, .. } => encoding.has_min(),
            Kind::Integers(rules) => !rules.symmetric,
        };
        let n = setup.n;
        let widest = setup.units.iter().map(Range::len).max().unwrap_or(0);
        let zero = || vec![[0.0f32; ROWS]; widest];
        let (mut u, mut v, mut hu, mut hv) = (zero(), zero(), zero(), zero());
        for (unit, range) in setup.units.iter().enumerate() {
            let (first, width) = (range.start, range.len());
            for col in 0..width {
                for row in 0..self.rows {
                    [u[col][row], v[col][row]] = self.slopes(row, first + col);
                }
            }
            for (image, of) in [(&mut hu, &u), (&mut hv, &v)].into_iter().take(1 + usize::from(two)) {
                // SAFETY: the unit's own square of `H`; both buffers hold `width` lanes.
                unsafe {
                    gemm(
                        [width, ROWS, width],
                        image.as_mut_ptr().cast::<f32>(),
                        [ROWS, 1],
                        false,
                        setup.hessian.as_ptr().add(first * n + first),
                        [n, 1],
                        of.as_ptr().cast::<f32>(),
                        [ROWS, 1],
                        [0.0, 1.0],
                    );
                }
            }
            let mut moves = [[0.0f32; 2]; ROWS];
            for row in 0..self.rows {
                let mut curve = Curve::default();
                for col in 0..width {
                    let (a, b, g) = (u[col][row], v[col][row], self.pull[first + col][row]);
                    curve.uu += f64::from(a * hu[col][row]);
                    curve.ug += f64::from(a * g);
                    if two {
                        curve.uv += f64::from(b * hu[col][row]);
                        curve.vv += f64::from(b * hv[col][row]);
                        curve.vg += f64::from(b * g);
                    }
                }
                let index = row * setup.units.len() + unit;
                let from = self.ends.at(index);
                let best = match &setup.kind {
                    Kind::Blocks { encoding, stored, .. } => curve.of_block(from, *stored, encoding.sub().is_some()),
                    Kind::Integers(rules) => curve.of_integers(from, rules),
                };
                self.ends.set(index, best.to);
                moves[row] = best.steps;
            }
            for col in 0..width {
                for row in 0..self.rows {
                    let step = -(moves[row][0] * u[col][row] + moves[row][1] * v[col][row]);
                    self.errors[first + col][row] += step;
                    u[col][row] = step;
                }
            }
            self.add_pull(first, width, Some(&u[..width]));
        }
    }

    /// One round over all codes, each to where the loss is least while the others stay.
    fn move_codes(&mut self) {
        let n = self.setup.n;
        let nearest = match &self.setup.kind {
            Kind::Blocks { set, .. } => Nearest::Level(*set),
            Kind::Integers(rules) => Nearest::Code(rules.max.into()),
        };
        let mut steps = vec![[0.0f32; ROWS]; PANEL];
        for start in (0..n).step_by(PANEL) {
            let count = PANEL.min(n - start);
            for at in start..start + count {
                let h = &self.setup.hessian.as_slice().expect("a new matrix")[at * n..][..n];
                let step = &mut steps[at - start];
                *step = [0.0; ROWS];
                if h[at] <= 0.0 {
                    continue;
                }
                let (scales, offsets) = self.grid(at);
                descend(
                    &nearest,
                    [&scales, &offsets, &scales.map(inverse)],
                    1.0 / h[at],
                    &mut self.levels[at],
                    step,
                    &h[start..start + count],
                    &mut self.pull[start..start + count],
                    at - start,
                );
                self.errors[at].iter_mut().zip(&*step).for_each(|(e, s)| *e += s);
            }
            // The panel's own lanes are up to date already: put them aside while the others follow.
            let own = self.pull[start..start + count].to_vec();
            self.add_pull(start, count, Some(&steps[..count]));
            self.pull[start..start + count].copy_from_slice(&own);
        }
    }
}

/// The loss of a unit of one row as its scale and offset move: by `s² uu + 2 s t uv + t² vv − 2 (s ug + t vg)`.
#[derive(Clone, Copy, Debug, Default)]
struct Curve {
    uu: f64,
    uv: f64,
    vv: f64,
    ug: f64,
    vg: f64,
}

/// A move, and what it changes the loss by.
struct Move {
    change: f64,
    /// Scale and offset as they are stored.
    to: [f32; 2],
    /// How far along both slopes.
    steps: [f32; 2],
}

impl Move {
    fn none(from: [f32; 2]) -> Move {
        Move { change: 0.0, to: from, steps: [0.0; 2] }
    }
}

/// Far moves say that the quadratic is flat there, not that the scale was wrong.
fn is_near(new: f32, old: f32) -> bool {
    (0.25..=2.0).contains(&(new / old))
}

impl Curve {
    fn change(&self, s: f64, t: f64) -> f64 {
        s * s * self.uu + 2.0 * s * t * self.uv + t * t * self.vv - 2.0 * (s * self.ug + t * self.vg)
    }

    /// The best scale and min of a block; superblocks have no min below 0.
    fn of_block(&self, from: [f32; 2], stored: Stored, sub: bool) -> Move {
        let [d, m] = from;
        let mut best = Move::none(from);
        let mut consider = |new_d: f64, new_m: f64| {
            let (new_d, new_m) = (stored.round(new_d as f32), stored.round_min(new_m as f32));
            if !(is_near(new_d, d) && new_m.is_finite()) || sub && new_m < 0.0 {
                return;
            }
            let change = self.change(f64::from(new_d) - f64::from(d), f64::from(new_m) - f64::from(m));
            if change < best.change {
                best = Move { change, to: [new_d, new_m], steps: [new_d - d, new_m - m] };
            }
        };
        let Curve { uu, uv, vv, ug, vg } = *self;
        if uu > 0.0 && d != 0.0 {
            consider(f64::from(d) + ug / uu, f64::from(m));
            let determinant = uu * vv - uv * uv;
            if stored.min.is_some() && determinant > 1e-6 * uu * vv {
                let s = (ug * vv - vg * uv) / determinant;
                let t = (vg * uu - ug * uv) / determinant;
                consider(f64::from(d) + s, f64::from(m) + t);
            }
        }
        best
    }

    /// The best scale and zero of a group of integers: the zero stays, or moves by one.
    ///
    /// With the zero moved by `k` the values are `d' (code − zero − k)`, which is `d' − d` along `u` and `d' k` along `v`: a parabola in `d'`.
    fn of_integers(&self, from: [f32; 2], rules: &Rules) -> Move {
        let [d, zero] = from;
        let mut best = Move::none(from);
        let Curve { uu, uv, vv, ug, vg } = *self;
        let shifts: &[f64] = if rules.symmetric { &[0.0] } else { &[0.0, -1.0, 1.0] };
        for &k in shifts {
            let new_zero = zero + k as f32;
            let curvature = uu + 2.0 * k * uv + k * k * vv;
            let allowed = (f32::from(rules.min_zero)..=f32::from(rules.max)).contains(&new_zero) || k == 0.0;
            if !(allowed && curvature > 0.0 && d != 0.0) {
                continue;
            }
            let wanted = (f64::from(d) * (uu + k * uv) + ug + k * vg) / curvature;
            let new_d = rules.precision.round(wanted as f32);
            if !is_near(new_d, d) {
                continue;
            }
            let (s, t) = (f64::from(new_d) - f64::from(d), f64::from(new_d) * k);
            let change = self.change(s, t);
            if change < best.change {
                best = Move { change, to: [new_d, new_zero], steps: [s as f32, t as f32] };
            }
        }
        best
    }
}

/// What a value may become.
enum Nearest {
    Level(AnyLevels),
    /// Codes up to this one.
    Code(f32),
}

simd_fn! {
    /// Moves one column's codes and the pull of its panel; `step` is what the errors change by.
    fn descend(
        nearest: &Nearest,
        grid: [&Lane; 3],
        inverse_energy: f32,
        levels: &mut Lane,
        step: &mut Lane,
        ahead: &[f32],
        panel: &mut [Lane],
        at: usize,
    ) {
        let pull = panel[at];
        match *nearest {
            Nearest::Level(set) => {
                with_levels!(set, set => nearest_level(set, grid, inverse_energy, &pull, levels, step));
            }
            Nearest::Code(max) => nearest_code(max, grid, inverse_energy, &pull, levels, step),
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
fn nearest_level<L: LevelSet>(
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

#[inline(always)]
fn nearest_code(
    max: f32,
    [scales, zeros, inverses]: [&Lane; 3],
    inverse_energy: f32,
    pull: &Lane,
    codes: &mut Lane,
    step: &mut Lane,
) {
    for row in 0..ROWS {
        let wanted = scales[row] * (codes[row] - zeros[row]) + pull[row] * inverse_energy;
        let found = code(wanted, inverses[row], zeros[row], max);
        let found = if inverses[row] == 0.0 { codes[row] } else { found };
        step[row] = scales[row] * (codes[row] - found);
        codes[row] = found;
    }
}

#[cfg(test)]
mod tests;
