//! ggml's block types: chooses the scales of every block in the precision they are stored in, and rounds onto them.
//!
//! Each group's scale (and min) is searched for the least `Σ h (x − x̂)²`: candidates around the one that spans the range,
//! each solved by least squares for its own rounding. What the groups want is then rounded to the small integers that
//! the block stores, both neighbours of each tried for several scales of the block, so that the second rounding is part
//! of the search; a last least-squares fit moves the block's scale and min under the codes that were found.
//!
//! Types are told apart by their [`Layout`] alone.

use formats::ScalePrecision;
use formats::ggml::{BlockScales, GgmlType, Layout, Levels, ScaleKind};
use ndarray::ArrayView2;
use rayon::prelude::*;

use super::round::inverse;
use crate::backend::BlockGrid;
use crate::simd::{LANES, sum_lanes};
use crate::simd_fn;

/// The levels of a type, ascending.
pub trait Ladder: Copy {
    /// The level nearest to `x`.
    fn nearest(self, x: f32) -> f32;
    /// The smallest and the largest level.
    fn range(self) -> [f32; 2];
}

/// Evenly spaced levels.
#[derive(Clone, Copy, Debug)]
pub struct Even {
    low: f32,
    high: f32,
}

impl Ladder for Even {
    #[inline(always)]
    fn nearest(self, x: f32) -> f32 {
        x.round_ties_even().clamp(self.low, self.high)
    }

    #[inline(always)]
    fn range(self) -> [f32; 2] {
        [self.low, self.high]
    }
}

/// Sixteen levels of a table, or fewer: where one gives way to the next, and by how much.
#[derive(Clone, Copy, Debug)]
pub struct Uneven {
    first: f32,
    last: f32,
    middles: [f32; 15],
    steps: [f32; 15],
}

impl Ladder for Uneven {
    #[inline(always)]
    fn nearest(self, x: f32) -> f32 {
        let mut level = self.first;
        for i in 0..15 {
            level += if x > self.middles[i] { self.steps[i] } else { 0.0 };
        }
        level
    }

    #[inline(always)]
    fn range(self) -> [f32; 2] {
        [self.first, self.last]
    }
}

/// A type's levels in the form that rounding wants.
#[derive(Clone, Copy, Debug)]
pub enum Rungs {
    /// Evenly spaced.
    Even(Even),
    /// Of a table.
    Uneven(Uneven),
}

impl Rungs {
    /// The levels of a layout.
    pub fn of(layout: &Layout) -> Rungs {
        match layout.levels {
            // The lowest of 256 levels has no counterpart above, and no encoder uses it.
            Levels::Uniform { codes: 256, offset } => {
                Rungs::Even(Even { low: f32::from(1 - offset), high: f32::from(255 - offset) })
            }
            Levels::Uniform { codes, offset } => {
                Rungs::Even(Even { low: f32::from(-offset), high: f32::from(codes as i16 - 1 - offset) })
            }
            Levels::Table(table) => {
                let mut sorted = *table;
                sorted.sort_unstable();
                let mut levels = sorted.to_vec();
                levels.dedup();
                let levels: Vec<f32> = levels.into_iter().map(f32::from).collect();
                let (mut middles, mut steps) = ([f32::INFINITY; 15], [0.0; 15]);
                for (i, pair) in levels.windows(2).enumerate() {
                    (middles[i], steps[i]) = (0.5 * (pair[0] + pair[1]), pair[1] - pair[0]);
                }
                Rungs::Uneven(Uneven { first: levels[0], last: levels[levels.len() - 1], middles, steps })
            }
        }
    }
}

/// The code of each level, at `level + 128`.
pub fn codes_of(layout: &Layout) -> [u8; 256] {
    let mut codes = [0; 256];
    // Downwards, so that of two codes for one level the first stays.
    for code in (0..layout.levels.count()).rev() {
        codes[(layout.levels.level(code as u8) + 128.0) as usize] = code as u8;
    }
    codes
}

/// Fits every block of `weight` `[rows, cols]`; `importance` is `[cols]`.
///
/// # Panics
/// If the type has no layout or its blocks do not divide a row: mistakes of the caller.
pub fn fit(weight: ArrayView2<f32>, ty: GgmlType, importance: Option<&[f32]>) -> BlockGrid {
    let (rows, cols) = weight.dim();
    let layout = ty.layout().expect("a type with codes");
    let per_row = cols / ty.block_len;
    assert_eq!(per_row * ty.block_len, cols, "whole blocks in a row");
    let importance = importance.map(floor);
    let rungs = Rungs::of(layout);
    let data = weight.to_slice().expect("a contiguous matrix");
    let mut blocks = vec![BlockScales::default(); rows * per_row];
    blocks.par_chunks_exact_mut(per_row).zip(data.par_chunks_exact(cols)).with_min_len(4).for_each(|(blocks, row)| {
        fit_row(row, importance.as_deref(), &Task { layout, rungs, block_len: ty.block_len }, blocks);
    });
    BlockGrid::new(ty, rows, cols, blocks)
}

/// Keeps channels that were never active from vanishing out of the search.
fn floor(importance: &[f32]) -> Vec<f32> {
    let mean = importance.iter().map(|x| f64::from(*x)).sum::<f64>() / importance.len().max(1) as f64;
    if mean <= 0.0 || !mean.is_finite() {
        return vec![1.0; importance.len()];
    }
    importance.iter().map(|x| (*x / mean as f32).max(1e-3)).collect()
}

/// Levels of every weight as codes, `[rows, cols]`.
pub fn round(weight: ArrayView2<f32>, grid: &BlockGrid) -> Vec<u8> {
    let cols = weight.ncols();
    let layout = grid.ty.layout().expect("a type with codes");
    let (rungs, codes, groups) = (Rungs::of(layout), codes_of(layout), cols / layout.group);
    let data = weight.to_slice().expect("a contiguous matrix");
    let mut out = vec![0u8; data.len()];
    out.par_chunks_exact_mut(cols).zip(data.par_chunks_exact(cols)).enumerate().with_min_len(4).for_each(
        |(row, (out, x))| {
            let (scales, mins) = (&grid.scales[row * groups..][..groups], &grid.mins[row * groups..][..groups]);
            round_row(x, scales, mins, layout.group, &rungs, &codes, out);
        },
    );
    out
}

simd_fn! {
    fn round_row(x: &[f32], scales: &[f32], mins: &[f32], group: usize, rungs: &Rungs, codes: &[u8; 256], out: &mut [u8]) {
        match *rungs {
            Rungs::Even(ladder) => round_groups(ladder, x, scales, mins, group, codes, out),
            Rungs::Uneven(ladder) => round_groups(ladder, x, scales, mins, group, codes, out),
        }
    }
}

#[inline(always)]
fn round_groups<L: Ladder>(
    ladder: L,
    x: &[f32],
    scales: &[f32],
    mins: &[f32],
    group: usize,
    codes: &[u8; 256],
    out: &mut [u8],
) {
    for (((x, out), scale), min) in x.chunks_exact(group).zip(out.chunks_exact_mut(group)).zip(scales).zip(mins) {
        let inverse = inverse(*scale);
        for (x, out) in x.chunks_exact(LANES).zip(out.chunks_exact_mut(LANES)) {
            let mut places = [0u8; LANES];
            for lane in 0..LANES {
                places[lane] = (ladder.nearest((x[lane] + min) * inverse) + 128.0) as i32 as u8;
            }
            for lane in 0..LANES {
                out[lane] = codes[usize::from(places[lane])];
            }
        }
    }
}

struct Task<'a> {
    layout: &'a Layout,
    rungs: Rungs,
    block_len: usize,
}

simd_fn! {
    fn fit_row(row: &[f32], importance: Option<&[f32]>, task: &Task<'_>, blocks: &mut [BlockScales]) {
        match task.rungs {
            Rungs::Even(ladder) => fit_blocks(ladder, row, importance, task, blocks),
            Rungs::Uneven(ladder) => fit_blocks(ladder, row, importance, task, blocks),
        }
    }
}

#[inline(always)]
fn fit_blocks<L: Ladder>(
    ladder: L,
    row: &[f32],
    importance: Option<&[f32]>,
    task: &Task<'_>,
    blocks: &mut [BlockScales],
) {
    let mut own = [0.0f32; 256];
    for (index, (x, block)) in row.chunks_exact(task.block_len).zip(blocks).enumerate() {
        let h = match importance {
            Some(importance) => &importance[index * task.block_len..][..task.block_len],
            None => {
                // Without data, larger weights count for more: the output's error is in proportion to what they carry.
                let spread = (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt();
                own.iter_mut().zip(x).for_each(|(h, x)| *h = spread + x.abs());
                &own[..task.block_len]
            }
        };
        *block = match (task.layout.sub, task.layout.scale) {
            (Some(_), _) => two_stages(ladder, x, h, task.layout),
            (None, ScaleKind::E8M0) => power_of_two(ladder, x, h),
            (None, ScaleKind::F16) => one_stage(ladder, x, h, task.layout),
        };
    }
}

/// What one scale and min cost: `Σ h (x − scale · level + min)²`.
#[inline(always)]
fn cost<L: Ladder>(ladder: L, x: &[f32], h: &[f32], scale: f32, min: f32) -> f32 {
    let inverse = inverse(scale);
    let mut lanes = [0.0f32; LANES];
    for (x, h) in x.chunks_exact(LANES).zip(h.chunks_exact(LANES)) {
        for lane in 0..LANES {
            let e = x[lane] - (scale * ladder.nearest((x[lane] + min) * inverse) - min);
            lanes[lane] += h[lane] * e * e;
        }
    }
    sum_lanes(lanes)
}

/// Candidates of a search: the finer the grid, the nearer the best one is to the plain one.
#[inline(always)]
pub(super) fn candidates(levels: f32) -> (f32, f32, usize) {
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
fn signed<L: Ladder>(ladder: L, count: usize, x: &[f32], h: &[f32]) -> f32 {
    let reach = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    if reach == 0.0 {
        return 0.0;
    }
    let [low, high] = ladder.range();
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
                    let level = ladder.nearest(x[lane] * inverse);
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

/// The scale and min of the best grid; mins below 0 only where the type has them (`any`).
#[inline(always)]
fn with_min<L: Ladder>(ladder: L, x: &[f32], h: &[f32], any: bool) -> (f32, f32) {
    let (mut low, mut high) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, g), x| (l.min(*x), g.max(*x)));
    if !any {
        (low, high) = (low.min(0.0), high.max(0.0));
    }
    let [_, top] = ladder.range();
    if high <= low {
        // All equal: the min alone says it, or nothing is left of a group of zeros.
        return if any { (0.0, -low) } else { (0.0, 0.0) };
    }
    let (mut weight, mut first) = ([0.0f32; LANES], [0.0f32; LANES]);
    for (x, h) in x.chunks_exact(LANES).zip(h.chunks_exact(LANES)) {
        for lane in 0..LANES {
            weight[lane] += h[lane];
            first[lane] += h[lane] * x[lane];
        }
    }
    let (weight, first) = (f64::from(sum_lanes(weight)), f64::from(sum_lanes(first)));
    let plain = ((high - low) / top, -low);
    let (mut best, mut found) = (cost(ladder, x, h, plain.0, plain.1), plain);
    let (from, to, steps) = candidates(top + 1.0);
    for step in 0..=steps {
        let size = (high - low) / top * (from + (to.min(1.05) - from) * step as f32 / steps as f32);
        let inverse = 1.0 / size;
        let [mut a, mut b, mut c] = [[0.0f32; LANES]; 3];
        for (x, h) in x.chunks_exact(LANES).zip(h.chunks_exact(LANES)) {
            for lane in 0..LANES {
                let level = ladder.nearest((x[lane] - low) * inverse);
                let hl = h[lane] * level;
                a[lane] += hl;
                b[lane] += hl * level;
                c[lane] += hl * x[lane];
            }
        }
        let [a, b, c] = [a, b, c].map(|lanes| f64::from(sum_lanes(lanes)));
        let determinant = weight * b - a * a;
        if determinant <= 0.0 {
            continue;
        }
        let mut scale = (weight * c - first * a) / determinant;
        let mut min = (a * c - b * first) / determinant;
        if min < 0.0 && !any {
            (scale, min) = (if b > 0.0 { c / b } else { 0.0 }, 0.0);
        }
        if scale.is_nan() || scale <= 0.0 {
            continue;
        }
        let (scale, min) = (scale as f32, min as f32);
        let cost = cost(ladder, x, h, scale, min);
        if cost < best {
            (best, found) = (cost, (scale, min));
        }
    }
    found
}

/// A block of one group, its scale (and min) in half precision.
#[inline(always)]
fn one_stage<L: Ladder>(ladder: L, x: &[f32], h: &[f32], layout: &Layout) -> BlockScales {
    let (d, m) = match layout.has_min {
        true => with_min(ladder, x, h, true),
        false => (signed(ladder, layout.levels.count(), x, h), 0.0),
    };
    BlockScales { d: ScalePrecision::F16.round(d), m: ScalePrecision::F16.round(m), ..BlockScales::default() }
}

/// A block whose scale is a power of two.
#[inline(always)]
fn power_of_two<L: Ladder>(ladder: L, x: &[f32], h: &[f32]) -> BlockScales {
    let reach = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    if reach == 0.0 {
        return BlockScales::default();
    }
    let [_, high] = ladder.range();
    let plain = (reach / high).log2().floor() as i32;
    let mut found = (f32::INFINITY, 0.0);
    for exponent in plain - 1..=plain + 1 {
        // Neither end of the byte's range: 2^-127 and below are subnormal.
        let d = f32::from_bits((exponent.clamp(-126, 126) + 127).cast_unsigned() << 23);
        let cost = cost(ladder, x, h, d, 0.0);
        if cost < found.0 {
            found = (cost, d);
        }
    }
    BlockScales { d: found.1, ..BlockScales::default() }
}

/// A block whose groups' scales (and mins) are small integers times the block's.
#[inline(always)]
fn two_stages<L: Ladder>(ladder: L, x: &[f32], h: &[f32], layout: &Layout) -> BlockScales {
    let sub = layout.sub.expect("a type with integer scales");
    let group = layout.group;
    let groups = x.len() / group;
    let (mut scales, mut mins) = ([0.0f32; 16], [0.0f32; 16]);
    for index in 0..groups {
        let (x, h) = (&x[index * group..][..group], &h[index * group..][..group]);
        (scales[index], mins[index]) = match layout.has_min {
            true => with_min(ladder, x, h, false),
            false => (signed(ladder, layout.levels.count(), x, h), 0.0),
        };
    }
    let widest = scales[..groups].iter().fold(0.0f32, |w, s| if s.abs() > w.abs() { *s } else { w });
    let deepest = mins[..groups].iter().fold(0.0f32, |w, m| w.max(*m));
    if widest == 0.0 && deepest == 0.0 {
        return BlockScales::default();
    }
    let (low, high) = (f32::from(sub.low), f32::from(sub.high));
    let fine = sub.high > 31;
    let mut best = (f32::INFINITY, BlockScales::default());
    let consider = |d: f32, m: f32, best: &mut (f32, BlockScales)| {
        let (d, m) = (ScalePrecision::F16.round(d), ScalePrecision::F16.round(m));
        let mut block = BlockScales { d, m, ..BlockScales::default() };
        let mut total = 0.0;
        for index in 0..groups {
            let (x, h) = (&x[index * group..][..group], &h[index * group..][..group]);
            let wanted = (scales[index] * inverse(d)).clamp(low, high);
            let deep = (mins[index] * inverse(m)).clamp(0.0, f32::from(sub.max_min));
            // Of a fine scale the nearest integer is as good as any; a coarse one is worth both.
            let scale_options = if fine { [wanted.round_ties_even(); 2] } else { [wanted.floor(), wanted.ceil()] };
            let min_options = if fine { [deep.round_ties_even(); 2] } else { [deep.floor(), deep.ceil()] };
            let mut least = f32::INFINITY;
            for (i, scale) in scale_options.into_iter().enumerate() {
                if i == 1 && scale == scale_options[0] {
                    continue;
                }
                for (j, min) in min_options.into_iter().enumerate() {
                    if j == 1 && min == min_options[0] {
                        continue;
                    }
                    let cost = cost(ladder, x, h, d * scale, m * min);
                    if cost < least {
                        least = cost;
                        block.scales[index] = scale as i8;
                        block.mins[index] = min as u8;
                    }
                }
            }
            total += least;
        }
        if total < best.0 {
            *best = (total, block);
        }
    };
    let m = if sub.max_min > 0 { deepest / f32::from(sub.max_min) } else { 0.0 };
    let stretches: &[f32] = if fine { &[1.0, 1.03] } else { &[1.0, 1.04, 1.08, 0.96] };
    for stretch in stretches {
        consider(widest / high * stretch, m * stretch, &mut best);
        if low < 0.0 {
            consider(widest / low * stretch, m * stretch, &mut best);
        }
    }
    if !fine && layout.has_min {
        consider(widest / high * 1.04, m, &mut best);
        consider(widest / high, m * 1.04, &mut best);
    }
    // Least squares of the block's scale and min under the codes they gave.
    for _ in 0..2 {
        let block = best.1;
        let [mut aa, mut ab, mut bb, mut ax, mut bx] = [0.0f64; 5];
        for index in 0..groups {
            let (x, h) = (&x[index * group..][..group], &h[index * group..][..group]);
            let (s, m) = (f32::from(block.scales[index]), f32::from(block.mins[index]));
            let (scale, min) = (block.d * s, block.m * m);
            let inverse = inverse(scale);
            let [mut hl, mut hll, mut hlx, mut hs, mut hx] = [[0.0f32; LANES]; 5];
            for (x, h) in x.chunks_exact(LANES).zip(h.chunks_exact(LANES)) {
                for lane in 0..LANES {
                    let level = ladder.nearest((x[lane] + min) * inverse);
                    hl[lane] += h[lane] * level;
                    hll[lane] += h[lane] * level * level;
                    hlx[lane] += h[lane] * level * x[lane];
                    hs[lane] += h[lane];
                    hx[lane] += h[lane] * x[lane];
                }
            }
            let [hl, hll, hlx, hs, hx] = [hl, hll, hlx, hs, hx].map(|lanes| f64::from(sum_lanes(lanes)));
            let (s, m) = (f64::from(s), f64::from(m));
            aa += s * s * hll;
            ab += s * m * hl;
            bb += m * m * hs;
            ax += s * hlx;
            bx += m * hx;
        }
        // x ≈ d·a − m·b
        let determinant = aa * bb - ab * ab;
        let (d, m) = match layout.has_min && determinant > 1e-9 * aa * bb {
            true => ((ax * bb - bx * ab) / determinant, (ax * ab - bx * aa) / determinant),
            false if aa > 0.0 && bb == 0.0 => (ax / aa, 0.0),
            false => break,
        };
        if !(d.is_finite() && m.is_finite()) || m < 0.0 {
            break;
        }
        let before = best.0;
        let (d, m) = (ScalePrecision::F16.round(d as f32), ScalePrecision::F16.round(m as f32));
        let moved = BlockScales { d, m, ..block };
        let mut total = 0.0;
        for index in 0..groups {
            let (x, h) = (&x[index * group..][..group], &h[index * group..][..group]);
            total += cost(ladder, x, h, d * f32::from(block.scales[index]), m * f32::from(block.mins[index]));
        }
        if total < best.0 {
            best = (total, moved);
        }
        consider(d, m, &mut best);
        if best.0 >= before {
            break;
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use formats::ggml::TYPES;
    use ndarray::Array2;

    use super::super::testing::{Noise, restored};
    use super::*;

    fn loss(weight: &Array2<f32>, restored: &[f32], h: &[f32]) -> f64 {
        let errors = weight.iter().zip(restored).zip(h.iter().cycle());
        errors.map(|((w, r), h)| f64::from(*h) * f64::from(w - r).powi(2)).sum()
    }

    /// Every code is the one nearest to its weight, and the expanded scales are those of the packed block.
    #[test]
    fn rounding_is_to_the_nearest_value_that_the_file_can_hold() {
        let mut noise = Noise(40);
        let weight = noise.matrix(3, 512);
        for ty in TYPES.iter().filter(|t| t.layout().is_some()) {
            let layout = ty.layout().unwrap();
            let grid = fit(weight.view(), *ty, None);
            let codes = round(weight.view(), &grid);
            let values = restored(&grid, &codes);
            let groups = 512 / layout.group;
            for (i, (w, value)) in weight.iter().zip(&values).enumerate() {
                let (row, col) = (i / 512, i % 512);
                let at = row * groups + col / layout.group;
                let nearest = (0..layout.levels.count())
                    .map(|code| grid.scales[at] * layout.levels.level(code as u8) - grid.mins[at])
                    .map(|v| (w - v).abs())
                    .fold(f32::INFINITY, f32::min);
                let found = (w - value).abs();
                // The lowest of 256 levels is never used.
                let slack = if layout.levels.count() == 256 { grid.scales[at].abs() } else { 1e-5 };
                assert!(found <= nearest + slack, "{ty} at {i}: {found}, nearest {nearest}");
            }
        }
    }

    #[test]
    fn the_search_beats_the_plain_encoder_and_uses_the_importance() {
        let mut noise = Noise(41);
        let weight = noise.matrix(16, 512).mapv(|x| x + 0.05 * x * x * x);
        let h: Vec<f32> = (0..512).map(|_| noise.next().powi(2) + 0.01).collect();
        for ty in TYPES.iter().filter(|t| t.layout().is_some()) {
            let of = |importance: Option<&[f32]>| {
                let grid = fit(weight.view(), *ty, importance);
                loss(&weight, &restored(&grid, &round(weight.view(), &grid)), &h)
            };
            let (without, with) = (of(None), of(Some(&h)));
            assert!(with < without * 1.0001, "{ty}: {with} after {without}");
            let mut bytes = vec![0; ty.row_bytes(weight.len()).unwrap()];
            if ty.encode(weight.as_slice().unwrap(), &mut bytes).is_some() {
                let mut plain = vec![0.0; weight.len()];
                ty.dequantize(&bytes, &mut plain).unwrap();
                let plain = loss(&weight, &plain, &h);
                // Ternary blocks are for weights that are ternary already.
                assert!(with <= plain, "{ty}: {with}, plain {plain}");
            }
        }
    }

    #[test]
    fn zeros_and_constants_survive() {
        for ty in TYPES.iter().filter(|t| t.layout().is_some()) {
            for value in [0.0f32, 0.25, -0.25] {
                let weight = Array2::from_elem((1, 256), value);
                let grid = fit(weight.view(), *ty, Some(&vec![0.0; 256]));
                let values = restored(&grid, &round(weight.view(), &grid));
                assert!(
                    values.iter().all(|v| (v - value).abs() <= 0.02 * value.abs()),
                    "{ty}: {value} became {}",
                    values[0]
                );
            }
        }
    }
}
