//! ggml's block types: chooses the scales of every block in the precision they are stored in, and rounds onto them.
//!
//! Each group's scale (and min) is searched for the least `Σ h (x − x̂)²`: candidates around the one that spans the range,
//! each solved by least squares for its own rounding. What the groups want is then rounded to the small integers that
//! the block stores, both neighbours of each tried for several scales of the block, so that the second rounding is part
//! of the search; a last least-squares fit moves the block's scale and min under the codes that were found.
//!
//! Types are told apart by their [`Encoding`] alone.

use formats::encoding::SubScales;
use formats::ggml::{BlockScales, GgmlType};
use formats::{Encoding, Float};
use ndarray::ArrayView2;
use rayon::prelude::*;

use super::levels::{AnyLevels, LevelSet, codes_of, with_levels};
use super::round::inverse;
use crate::backend::{Grid, GridSpec};
use crate::simd::{LANES, sum_lanes};
use crate::simd_fn;

/// Groups whose blocks are one task.
const TASK: usize = 16 * LANES;

/// Fits every block of `weight` `[rows, cols]`; `importance` is `[cols]`.
///
/// # Panics
/// If the type has no encoding or its blocks do not divide a row: mistakes of the caller.
pub fn fit(weight: ArrayView2<f32>, ty: GgmlType, importance: Option<&[f32]>) -> Grid {
    let (rows, cols) = weight.dim();
    let encoding = &ty.encoding();
    let per_row = cols / ty.block_len;
    assert_eq!(per_row * ty.block_len, cols, "whole blocks in a row");
    let importance = importance.map(floor);
    let task =
        Task { encoding, set: AnyLevels::of(encoding), block_len: ty.block_len, importance: importance.as_deref() };
    let data = weight.to_slice().expect("a contiguous matrix");
    let mut blocks = vec![BlockScales::default(); rows * per_row];
    let at_once = TASK / ty.groups_per_block();
    let pieces = blocks.par_chunks_mut(at_once).zip(data.par_chunks(at_once * ty.block_len));
    pieces.enumerate().for_each(|(index, (blocks, x))| fit_blocks(x, index * at_once % per_row.max(1), &task, blocks));
    Grid::of_blocks(GridSpec::of(*encoding, cols), rows, blocks)
}

/// Keeps channels that were never active from vanishing out of the search.
pub(crate) fn floor(importance: &[f32]) -> Vec<f32> {
    let mean = importance.iter().map(|x| f64::from(*x)).sum::<f64>() / importance.len().max(1) as f64;
    if mean <= 0.0 || !mean.is_finite() {
        return vec![1.0; importance.len()];
    }
    importance.iter().map(|x| (*x / mean as f32).max(1e-3)).collect()
}

/// The code of every weight, `[rows, cols]`: that of the nearest level of its group.
pub fn round(weight: ArrayView2<f32>, grid: &Grid) -> Vec<u8> {
    let cols = weight.ncols();
    let encoding = &grid.spec.encoding;
    let (set, codes, groups) = (AnyLevels::of(encoding), codes_of(encoding), grid.spec.groups());
    let width = encoding.group_width(cols).max(1);
    let data = weight.to_slice().expect("a contiguous matrix");
    let mut out = vec![0u8; data.len()];
    let rows = out.par_chunks_exact_mut(cols.max(1)).zip(data.par_chunks_exact(cols.max(1)));
    rows.enumerate().with_min_len(4).for_each(|(row, (out, x))| {
        let (scales, mins) = (&grid.scales[row * groups..][..groups], &grid.mins[row * groups..][..groups]);
        round_row(x, scales, mins, width, &set, out);
        out.iter_mut().for_each(|byte| *byte = codes[usize::from(*byte)]);
    });
    out
}

simd_fn! {
    fn round_row(x: &[f32], scales: &[f32], mins: &[f32], group: usize, set: &AnyLevels, out: &mut [u8]) {
        with_levels!(*set, set => round_groups(set, x, scales, mins, group, out))
    }
}

#[inline(always)]
fn round_groups<L: LevelSet>(set: L, x: &[f32], scales: &[f32], mins: &[f32], group: usize, out: &mut [u8]) {
    for (((x, out), scale), min) in x.chunks(group).zip(out.chunks_mut(group)).zip(scales).zip(mins) {
        let inverse = inverse(*scale);
        let whole = x.len() / LANES * LANES;
        for (x, out) in x.chunks_exact(LANES).zip(out.chunks_exact_mut(LANES)) {
            let mut levels = [0.0; LANES];
            for lane in 0..LANES {
                levels[lane] = set.nearest((x[lane] + min) * inverse);
            }
            for lane in 0..LANES {
                out[lane] = set.keep(levels[lane]);
            }
        }
        // A row need not be whole lanes.
        for (x, out) in x[whole..].iter().zip(&mut out[whole..]) {
            *out = set.keep(set.nearest((x + min) * inverse));
        }
    }
}

struct Task<'a> {
    encoding: &'a Encoding,
    set: AnyLevels,
    block_len: usize,
    /// Of every column.
    importance: Option<&'a [f32]>,
}

simd_fn! {
    fn fit_blocks(x: &[f32], first: usize, task: &Task<'_>, blocks: &mut [BlockScales]) {
        match (task.set, task.encoding.precision(), task.encoding.group()) {
            (AnyLevels::Even(set), Float::F16, 16) => fit_tiles::<_, 16>(set, x, first, task, blocks),
            (AnyLevels::Even(set), Float::F16, 32) => fit_tiles::<_, 32>(set, x, first, task, blocks),
            (AnyLevels::Table(set), Float::F16, 32) => fit_tiles::<_, 32>(set, x, first, task, blocks),
            (levels, _, _) => with_levels!(levels, set => fit_singly(set, x, first, task, blocks)),
        }
    }
}

impl Task<'_> {
    /// The importance of block `index` of those after `first` in a row, in a buffer or where it lies.
    #[inline(always)]
    fn weigh<'h>(&'h self, x: &[f32], index: usize, own: &'h mut [f32; 256]) -> &'h [f32] {
        match self.importance {
            Some(importance) => &importance[index * self.block_len % importance.len()..][..self.block_len],
            None => {
                // Without data, larger weights count for more: the output's error is in proportion to what they carry.
                let spread = (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt();
                own.iter_mut().zip(x).for_each(|(h, x)| *h = spread + x.abs());
                &own[..self.block_len]
            }
        }
    }
}

/// Blocks one after the other: those of long groups and of powers of two.
#[inline(always)]
fn fit_singly<L: LevelSet>(set: L, x: &[f32], first: usize, task: &Task<'_>, blocks: &mut [BlockScales]) {
    let mut own = [0.0f32; 256];
    for (index, (x, block)) in x.chunks_exact(task.block_len).zip(blocks).enumerate() {
        let h = task.weigh(x, first + index, &mut own);
        *block = match (task.encoding.precision(), task.encoding.sub(), task.encoding.has_min()) {
            (Float::E8M0, ..) => power_of_two(set, x, h),
            (Float::F16, None, false) => {
                let d = Float::F16.round(signed(set, task.encoding.levels.count(), x, h));
                BlockScales { d, ..BlockScales::default() }
            }
            _ => unreachable!("groups with scales of their own have 16 or 32 weights"),
        };
    }
}

/// Groups of `G` weights side by side, one a lane: weight `j` of a group is `x[j][lane]`, of importance `h[j][lane]`.
///
/// No sum goes across lanes, and what is chosen is chosen in all lanes at once.
struct Tile<const G: usize> {
    x: [[f32; LANES]; G],
    h: [[f32; LANES]; G],
}

/// What is summed over the weights of a group.
trait Sums<const K: usize> {
    fn term<L: LevelSet>(&self, set: L, x: f32, h: f32) -> [f32; K];
}

/// Under the levels that a scale gives: `h x level` and `h level²`.
struct Moments {
    inverse: f32,
}

/// The same where a min is taken off: `h level`, `h level²` and `h x level`.
struct Plane {
    min: f32,
    inverse: f32,
}

/// `h` and `h x`.
struct Whole;

/// `h (x − scale · level + min)²`.
struct Loss {
    scale: f32,
    min: f32,
    inverse: f32,
}

impl Sums<2> for Moments {
    #[inline(always)]
    fn term<L: LevelSet>(&self, set: L, x: f32, h: f32) -> [f32; 2] {
        let level = set.nearest(x * self.inverse);
        [h * x * level, h * level * level]
    }
}

impl Sums<3> for Plane {
    #[inline(always)]
    fn term<L: LevelSet>(&self, set: L, x: f32, h: f32) -> [f32; 3] {
        let level = set.nearest((x + self.min) * self.inverse);
        let hl = h * level;
        [hl, hl * level, hl * x]
    }
}

impl Sums<2> for Whole {
    #[inline(always)]
    fn term<L: LevelSet>(&self, _: L, x: f32, h: f32) -> [f32; 2] {
        [h, h * x]
    }
}

impl Sums<1> for Loss {
    #[inline(always)]
    fn term<L: LevelSet>(&self, set: L, x: f32, h: f32) -> [f32; 1] {
        let e = x - (self.scale * set.nearest((x + self.min) * self.inverse) - self.min);
        [h * e * e]
    }
}

#[inline(always)]
fn add<const K: usize>(mut a: [f32; K], b: [f32; K]) -> [f32; K] {
    (0..K).for_each(|k| a[k] += b[k]);
    a
}

impl<const G: usize> Tile<G> {
    /// The sums of one lane, added in the order of [`sum_lanes`].
    #[inline(always)]
    fn sums<L: LevelSet, S: Sums<K>, const K: usize>(&self, set: L, lane: usize, of: S) -> [f32; K] {
        let quarter = |tile, i| Self::quarter(tile, set, lane, &of, i);
        add(add(quarter(self, 0), quarter(self, 2)), add(quarter(self, 1), quarter(self, 3)))
    }

    #[inline(always)]
    fn quarter<L: LevelSet, S: Sums<K>, const K: usize>(&self, set: L, lane: usize, of: &S, i: usize) -> [f32; K] {
        let (a, b) = (self.column(set, lane, of, i), self.column(set, lane, of, i + 8));
        let (c, d) = (self.column(set, lane, of, i + 4), self.column(set, lane, of, i + 12));
        add(add(a, b), add(c, d))
    }

    #[inline(always)]
    fn column<L: LevelSet, S: Sums<K>, const K: usize>(&self, set: L, lane: usize, of: &S, i: usize) -> [f32; K] {
        let first = of.term(set, self.x[i][lane], self.h[i][lane]);
        match G {
            16 => first,
            _ => add(first, of.term(set, self.x[i + 16][lane], self.h[i + 16][lane])),
        }
    }

    /// The smallest and the largest weight of each lane.
    #[inline(always)]
    fn extremes(&self) -> [[f32; LANES]; 2] {
        let [mut low, mut high] = [[f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]];
        for x in &self.x {
            for lane in 0..LANES {
                (low[lane], high[lane]) = (low[lane].min(x[lane]), high[lane].max(x[lane]));
            }
        }
        [low, high]
    }

    /// What scales and mins cost.
    #[inline(always)]
    fn cost<L: LevelSet>(&self, set: L, scale: &[f32; LANES], min: &[f32; LANES]) -> [f32; LANES] {
        let mut costs = [0.0; LANES];
        for lane in 0..LANES {
            let of = Loss { scale: scale[lane], min: min[lane], inverse: inverse(scale[lane]) };
            [costs[lane]] = self.sums(set, lane, of);
        }
        costs
    }

    /// [`signed`] of each lane.
    #[inline(always)]
    fn signed<L: LevelSet>(&self, set: L, count: usize) -> [f32; LANES] {
        let [low, high] = set.range();
        let (from, to, steps) = candidates(count as f32);
        let ends = self.extremes();
        let mut size = [0.0; LANES];
        for lane in 0..LANES {
            size[lane] = ends[0][lane].abs().max(ends[1][lane].abs()) / low.abs().max(high);
        }
        let (mut best, mut found) = ([f32::NEG_INFINITY; LANES], [0.0; LANES]);
        let both = if -low == high { 1 } else { 2 };
        for step in 0..=steps {
            let share = from + (to - from) * step as f32 / steps as f32;
            for sign in [1.0, -1.0].into_iter().take(both) {
                for lane in 0..LANES {
                    let of = Moments { inverse: sign / (size[lane] * share) };
                    let [cross, square] = self.sums(set, lane, of);
                    let better = size[lane] > 0.0 && square > 0.0 && cross * cross > best[lane] * square;
                    best[lane] = if better { cross * cross / square } else { best[lane] };
                    found[lane] = if better { cross / square } else { found[lane] };
                }
            }
        }
        found
    }

    /// Scale and min of the best grid of each lane; mins below 0 only where the type has them (`any`).
    #[inline(always)]
    fn with_min<L: LevelSet>(&self, set: L, any: bool) -> [[f32; LANES]; 2] {
        let [mut low, mut high] = self.extremes();
        let [_, top] = set.range();
        let [mut weight, mut first] = [[0.0f32; LANES]; 2];
        let (mut span, mut found) = ([0.0; LANES], [[0.0; LANES]; 2]);
        for lane in 0..LANES {
            if !any {
                (low[lane], high[lane]) = (low[lane].min(0.0), high[lane].max(0.0));
            }
            [weight[lane], first[lane]] = self.sums(set, lane, Whole);
            span[lane] = (high[lane] - low[lane]) / top;
            (found[0][lane], found[1][lane]) = (span[lane], -low[lane]);
        }
        let mut best = self.cost(set, &found[0], &found[1]);
        let (from, to, steps) = candidates(top + 1.0);
        for step in 0..=steps {
            let share = from + (to.min(1.05) - from) * step as f32 / steps as f32;
            let [mut a, mut b, mut c] = [[0.0f32; LANES]; 3];
            for lane in 0..LANES {
                let of = Plane { min: -low[lane], inverse: 1.0 / (span[lane] * share) };
                [a[lane], b[lane], c[lane]] = self.sums(set, lane, of);
            }
            let [mut scale, mut min] = [[0.0; LANES]; 2];
            for lane in 0..LANES {
                let [a, b, c] = [a[lane], b[lane], c[lane]].map(f64::from);
                let [weight, first] = [weight[lane], first[lane]].map(f64::from);
                let determinant = weight * b - a * a;
                let (s, m) = ((weight * c - first * a) / determinant, (a * c - b * first) / determinant);
                let alone = if b > 0.0 { c / b } else { 0.0 };
                let (s, m) = if m < 0.0 && !any { (alone, 0.0) } else { (s, m) };
                // Of what is no number the cost is none either, and never the least.
                scale[lane] = if determinant > 0.0 && s > 0.0 { s as f32 } else { f32::NAN };
                min[lane] = m as f32;
            }
            let cost = self.cost(set, &scale, &min);
            for lane in 0..LANES {
                let better = cost[lane] < best[lane];
                best[lane] = if better { cost[lane] } else { best[lane] };
                found[0][lane] = if better { scale[lane] } else { found[0][lane] };
                found[1][lane] = if better { min[lane] } else { found[1][lane] };
            }
        }
        for lane in 0..LANES {
            // All equal: the min alone says it, or nothing is left of a group of zeros.
            if high[lane] <= low[lane] {
                (found[0][lane], found[1][lane]) = if any { (0.0, -low[lane]) } else { (0.0, 0.0) };
            }
        }
        found
    }
}

/// Blocks whose groups have `G` weights, as many at once as there are lanes for their groups.
#[inline(always)]
fn fit_tiles<L: LevelSet, const G: usize>(
    set: L,
    x: &[f32],
    first: usize,
    task: &Task<'_>,
    blocks: &mut [BlockScales],
) {
    let Task { encoding, block_len, .. } = *task;
    let per_block = block_len / G;
    let mut own = [0.0f32; 256];
    let mut tile = Tile::<G> { x: [[0.0; LANES]; G], h: [[1.0; LANES]; G] };
    for (index, blocks) in blocks.chunks_mut(LANES / per_block).enumerate() {
        let before = index * (LANES / per_block);
        for (block, x) in x[before * block_len..][..blocks.len() * block_len].chunks_exact(block_len).enumerate() {
            let h = task.weigh(x, first + before + block, &mut own);
            for (group, (x, h)) in x.chunks_exact(G).zip(h.chunks_exact(G)).enumerate() {
                for j in 0..G {
                    tile.x[j][block * per_block + group] = x[j];
                    tile.h[j][block * per_block + group] = h[j];
                }
            }
        }
        let [scales, mins] = match encoding.has_min() {
            true => tile.with_min(set, encoding.sub().is_none()),
            false => [tile.signed(set, encoding.levels.count()), [0.0; LANES]],
        };
        match encoding.sub() {
            Some(sub) => {
                let all = Blocks { tile: &tile, scales, mins, sub, has_min: encoding.has_min(), count: blocks.len() };
                two_stages(set, &all, blocks);
            }
            None => {
                for (block, (d, m)) in blocks.iter_mut().zip(scales.iter().zip(&mins)) {
                    let (d, m) = (Float::F16.round(*d), Float::F16.round(*m));
                    *block = BlockScales { d, m, ..BlockScales::default() };
                }
            }
        }
    }
}

/// What one scale and min cost: `Σ h (x − scale · level + min)²`.
#[inline(always)]
pub(super) fn cost<L: LevelSet>(set: L, x: &[f32], h: &[f32], scale: f32, min: f32) -> f32 {
    let inverse = inverse(scale);
    let mut lanes = [0.0f32; LANES];
    for (x, h) in x.chunks_exact(LANES).zip(h.chunks_exact(LANES)) {
        for lane in 0..LANES {
            let e = x[lane] - (scale * set.nearest((x[lane] + min) * inverse) - min);
            lanes[lane] += h[lane] * e * e;
        }
    }
    sum_lanes(lanes)
}

/// Candidates of a search: the finer the grid, the nearer the best one is to the plain one.
#[inline(always)]
pub(crate) fn candidates(levels: f32) -> (f32, f32, usize) {
    match levels as usize {
        0..=4 => (0.40, 1.60, 24),
        5..=8 => (0.50, 1.30, 20),
        9..=16 => (0.60, 1.15, 18),
        17..=40 => (0.80, 1.08, 14),
        41..=100 => (0.90, 1.04, 10),
        // Of levels up to 127, as of 256 evenly spaced ones.
        _ => (0.94, 1.01, 7),
    }
}

/// The scale of the best grid without a min, of either sign.
#[inline(always)]
fn signed<L: LevelSet>(set: L, count: usize, x: &[f32], h: &[f32]) -> f32 {
    let reach = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    if reach == 0.0 {
        return 0.0;
    }
    let [low, high] = set.range();
    let (from, to, steps) = candidates(count as f32);
    let (mut best, mut found) = (f32::NEG_INFINITY, 0.0);
    // The longer side of the levels takes the largest weight, whatever its sign.
    let both = if -low == high { 1 } else { 2 };
    for step in 0..=steps {
        let size = reach / low.abs().max(high) * (from + (to - from) * step as f32 / steps as f32);
        for sign in [1.0, -1.0].into_iter().take(both) {
            let inverse = sign / size;
            let (mut cross, mut square) = ([0.0f32; LANES], [0.0f32; LANES]);
            for (x, h) in x.chunks_exact(LANES).zip(h.chunks_exact(LANES)) {
                for lane in 0..LANES {
                    let level = set.nearest(x[lane] * inverse);
                    cross[lane] += h[lane] * x[lane] * level;
                    square[lane] += h[lane] * level * level;
                }
            }
            let (cross, square) = (sum_lanes(cross), sum_lanes(square));
            if square > 0.0 && cross * cross > best * square {
                (best, found) = (cross * cross / square, cross / square);
            }
        }
    }
    found
}

/// A block whose scale is a power of two.
#[inline(always)]
fn power_of_two<L: LevelSet>(set: L, x: &[f32], h: &[f32]) -> BlockScales {
    let reach = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    if reach == 0.0 {
        return BlockScales::default();
    }
    let [_, high] = set.range();
    let plain = (reach / high).log2().floor() as i32;
    let mut found = (f32::INFINITY, 0.0);
    for exponent in plain - 1..=plain + 1 {
        // Neither end of the byte's range: 2^-127 and below are subnormal.
        let d = f32::from_bits((exponent.clamp(-126, 126) + 127).cast_unsigned() << 23);
        let cost = cost(set, x, h, d, 0.0);
        if cost < found.0 {
            found = (cost, d);
        }
    }
    BlockScales { d: found.1, ..BlockScales::default() }
}

/// Up to sixteen blocks whose groups fill a tile, and what the groups alone would take.
struct Blocks<'a, const G: usize> {
    tile: &'a Tile<G>,
    scales: [f32; LANES],
    mins: [f32; LANES],
    sub: SubScales,
    has_min: bool,
    count: usize,
}

/// What blocks cost and hold.
type Held = [(f32, BlockScales); LANES];

impl<const G: usize> Blocks<'_, G> {
    const GROUPS: usize = 256 / G;

    fn lanes(index: usize) -> std::ops::Range<usize> {
        index * Self::GROUPS..(index + 1) * Self::GROUPS
    }

    /// Whether of a group's scale only the nearest integer is tried.
    fn fine(&self) -> bool {
        self.sub.high > 31
    }

    /// Tries a scale and a min of each block, which keeps what it has if they cost more or are no numbers.
    #[inline(always)]
    fn consider<L: LevelSet>(&self, set: L, d: &[f32; LANES], m: &[f32; LANES], best: &mut Held) {
        let (low, high) = (f32::from(self.sub.low), f32::from(self.sub.high));
        let [mut of_scale, mut of_min, mut wanted, mut deep] = [[0.0f32; LANES]; 4];
        for lane in 0..LANES {
            (of_scale[lane], of_min[lane]) = (d[lane / Self::GROUPS], m[lane / Self::GROUPS]);
            wanted[lane] = (self.scales[lane] * inverse(of_scale[lane])).clamp(low, high);
            deep[lane] = (self.mins[lane] * inverse(of_min[lane])).clamp(0.0, f32::from(self.sub.max_min));
        }
        let [mut least, mut scale, mut min] = [[f32::INFINITY; LANES], [0.0; LANES], [0.0; LANES]];
        // Of a fine scale the nearest integer is as good as any; a coarse one is worth both.
        let sides = if self.fine() { 1 } else { 2 };
        let tries = if self.has_min { sides * sides } else { sides };
        for number in 0..tries {
            let near = |x: f32, up: bool| match (self.fine(), up) {
                (true, _) => x.round_ties_even(),
                (false, false) => x.floor(),
                (false, true) => x.ceil(),
            };
            let (scale_up, min_up) = if self.has_min { (number > 1, number % 2 == 1) } else { (number == 1, false) };
            let [mut whole_scale, mut whole_min, mut a, mut b] = [[0.0f32; LANES]; 4];
            for lane in 0..LANES {
                (whole_scale[lane], whole_min[lane]) = (near(wanted[lane], scale_up), near(deep[lane], min_up));
                (a[lane], b[lane]) = (of_scale[lane] * whole_scale[lane], of_min[lane] * whole_min[lane]);
            }
            let cost = self.tile.cost(set, &a, &b);
            for lane in 0..LANES {
                let better = cost[lane] < least[lane];
                least[lane] = if better { cost[lane] } else { least[lane] };
                scale[lane] = if better { whole_scale[lane] } else { scale[lane] };
                min[lane] = if better { whole_min[lane] } else { min[lane] };
            }
        }
        for index in 0..self.count {
            let total = least[Self::lanes(index)].iter().fold(0.0, |total, cost| total + cost);
            if total < best[index].0 {
                let mut block = BlockScales { d: d[index], m: m[index], ..BlockScales::default() };
                for (group, lane) in Self::lanes(index).enumerate() {
                    (block.scales[group], block.mins[group]) = (scale[lane] as i8, min[lane] as u8);
                }
                best[index] = (total, block);
            }
        }
    }
}

/// Halves nearest to values.
#[inline(always)]
fn halves(values: [f32; LANES]) -> [f32; LANES] {
    values.map(|value| Float::F16.round(value))
}

/// Blocks whose groups' scales (and mins) are small integers times the block's.
#[inline(always)]
fn two_stages<L: LevelSet, const G: usize>(set: L, all: &Blocks<'_, G>, blocks: &mut [BlockScales]) {
    let Blocks { tile, scales, mins, sub, has_min, count } = all;
    let mut best = [(f32::INFINITY, BlockScales::default()); LANES];
    let [mut widest, mut deepest] = [[0.0f32; LANES]; 2];
    for index in 0..*count {
        let lanes = Blocks::<G>::lanes(index);
        widest[index] = scales[lanes.clone()].iter().fold(0.0f32, |w, s| if s.abs() > w.abs() { *s } else { w });
        let deep = mins[lanes].iter().fold(0.0f32, |w, m| w.max(*m));
        deepest[index] = if sub.max_min > 0 { deep / f32::from(sub.max_min) } else { 0.0 };
        if widest[index] == 0.0 && deep == 0.0 {
            // Zeros stay zeros.
            widest[index] = f32::NAN;
        }
    }
    let ends = [sub.high, sub.low].map(f32::from);
    let ends = if sub.low < 0 { &ends[..] } else { &ends[..1] };
    let stretches: &[[f32; 2]] = match (all.fine(), *has_min) {
        (true, _) => &[[1.0, 1.0], [1.03, 1.03]],
        (false, false) => &[[1.0, 1.0], [1.04, 1.04], [1.08, 1.08], [0.96, 0.96]],
        (false, true) => &[[1.0, 1.0], [1.04, 1.04], [1.08, 1.08], [0.96, 0.96], [1.04, 1.0], [1.0, 1.04]],
    };
    for [of_d, of_m] in stretches {
        for end in ends {
            let (d, m) = (halves(widest.map(|w| w / end * of_d)), halves(deepest.map(|m| m * of_m)));
            all.consider(set, &d, &m, &mut best);
        }
    }
    // Least squares of the block's scale and min under the codes they gave.
    let mut done: [bool; LANES] = std::array::from_fn(|index| index >= *count || best[index].0 == f32::INFINITY);
    for _ in 0..2 {
        let held = best;
        let [mut s, mut m, mut scale, mut min] = [[0.0f32; LANES]; 4];
        for lane in 0..LANES {
            let (block, group) = (&held[lane / Blocks::<G>::GROUPS].1, lane % Blocks::<G>::GROUPS);
            (s[lane], m[lane]) = (f32::from(block.scales[group]), f32::from(block.mins[group]));
            (scale[lane], min[lane]) = (block.d * s[lane], block.m * m[lane]);
        }
        let [mut hl, mut hll, mut hlx, mut hs, mut hx] = [[0.0f32; LANES]; 5];
        for lane in 0..LANES {
            [hl[lane], hll[lane], hlx[lane]] =
                tile.sums(set, lane, Plane { min: min[lane], inverse: inverse(scale[lane]) });
            [hs[lane], hx[lane]] = tile.sums(set, lane, Whole);
        }
        let [mut moved_d, mut moved_m] = [[f32::NAN; LANES]; 2];
        for index in 0..*count {
            let [mut aa, mut ab, mut bb, mut ax, mut bx] = [0.0f64; 5];
            for lane in Blocks::<G>::lanes(index) {
                let [s, m, hl, hll] = [s[lane], m[lane], hl[lane], hll[lane]].map(f64::from);
                let [hlx, hs, hx] = [hlx[lane], hs[lane], hx[lane]].map(f64::from);
                aa += s * s * hll;
                ab += s * m * hl;
                bb += m * m * hs;
                ax += s * hlx;
                bx += m * hx;
            }
            // x ≈ d·a − m·b
            let determinant = aa * bb - ab * ab;
            let (d, m) = match *has_min && determinant > 1e-9 * aa * bb {
                true => ((ax * bb - bx * ab) / determinant, (ax * ab - bx * aa) / determinant),
                false if aa > 0.0 && bb == 0.0 => (ax / aa, 0.0),
                false => (f64::NAN, 0.0),
            };
            done[index] |= !(d.is_finite() && m.is_finite() && m >= 0.0);
            if !done[index] {
                (moved_d[index], moved_m[index]) = (d as f32, m as f32);
            }
        }
        let (moved_d, moved_m) = (halves(moved_d), halves(moved_m));
        for lane in 0..LANES {
            let block = lane / Blocks::<G>::GROUPS;
            (scale[lane], min[lane]) = (moved_d[block] * s[lane], moved_m[block] * m[lane]);
        }
        let cost = tile.cost(set, &scale, &min);
        for index in (0..*count).filter(|index| !done[*index]) {
            let total = cost[Blocks::<G>::lanes(index)].iter().fold(0.0, |total, cost| total + cost);
            if total < best[index].0 {
                best[index] = (total, BlockScales { d: moved_d[index], m: moved_m[index], ..held[index].1 });
            }
        }
        all.consider(set, &moved_d, &moved_m, &mut best);
        for index in 0..*count {
            done[index] |= best[index].0 >= held[index].0;
        }
        if done.iter().all(|done| *done) {
            break;
        }
    }
    for (block, (_, found)) in blocks.iter_mut().zip(best) {
        *block = found;
    }
}

#[cfg(test)]
mod tests;
