//! Levels whose blocks each store a scale of their own (and a min): chooses these, in the precision in which they are stored.
//!
//! ```text
//! from a range:  scale = largest |x| / largest level                    # with a min: (high − low) / largest level, min = −low
//! searched:      best = that
//!     for each share of it:                                             # `blocks::candidates`: the fewer levels, the more clipping pays
//!         scale = the share, or with a min what solves least squares for its levels, as the file stores it
//!         best  = it, if Σ h (x − x̂)² is less
//!     three times: least squares of scale (and min) for the levels that the best one gives, stored, kept if better
//! ```
//!
//! All values of a block count together, be they a group of a row, a row, or a tile that reaches over rows. Where scales are multiples of
//! a global one that, a power of two, is exact in every precision, so that it does not matter in which a runtime keeps it.
//!
//! ggml's blocks, whose scales may be integers of a superblock's, are searched by `blocks.rs`; integers without a min by `fit.rs`.

use formats::encoding::Offset;
use formats::ggml::BlockScales;
use formats::{Encoding, Float};
use ndarray::ArrayView2;
use rayon::prelude::*;

use super::blocks::{candidates, cost};
use super::levels::{AnyLevels, LevelSet, with_levels};
use super::round::inverse;
use crate::backend::{Grid, GridSpec};
use crate::simd::{LANES, sum_lanes};
use crate::simd_fn;

/// How scales and mins are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored {
    /// The precision of scales.
    pub(crate) scale: Float,
    /// That of mins, where there are any.
    pub(crate) min: Option<Float>,
    /// What every stored scale is multiplied by.
    pub(crate) global: f32,
}

impl Stored {
    /// Those of an encoding with codes.
    pub(crate) fn of(encoding: &Encoding, global: Option<f32>) -> Stored {
        let min = match encoding.offset {
            Offset::Min(of) => Some(of),
            Offset::SubMin { .. } => Some(encoding.precision()),
            Offset::None | Offset::Zero { .. } => None,
        };
        Stored { scale: encoding.precision(), min, global: global.unwrap_or(1.0) }
    }

    /// The nearest scale that the file can hold.
    #[inline(always)]
    pub(crate) fn round(self, scale: f32) -> f32 {
        // Both steps are exact but for the rounding, for the global scale is a power of two.
        self.scale.round(scale / self.global) * self.global
    }

    /// The nearest min.
    #[inline(always)]
    pub(crate) fn round_min(self, min: f32) -> f32 {
        self.min.map_or(0.0, |of| of.round(min))
    }
}

/// The scale of all scales of a matrix whose largest magnitude is `reach`: a power of two, so that every precision holds it. The largest
/// scale that a search may want can be stored, and is in the upper half of what can be.
pub fn global_scale(encoding: &Encoding, reach: f32) -> f32 {
    let most = with_levels!(AnyLevels::of(encoding), set => set.range().map(f32::abs).into_iter().fold(0.0, f32::max));
    let (_, widest, _) = candidates(encoding.levels.count() as f32);
    let wanted = reach / most * widest.max(1.0) / encoding.precision().largest();
    // Without its mantissa it is a power of two; one above unless it was one.
    let power = f32::from_bits(wanted.to_bits() & 0x7f80_0000);
    let power = if power < wanted { 2.0 * power } else { power };
    if power.is_normal() { power } else { 1.0 }
}

/// Fits every block of `weight` `[rows, cols]`: from its range, or by a search where `importance` `[cols]` says what columns count.
///
/// # Panics
/// If scales are none of the blocks' own: a mistake of the caller.
pub fn fit(weight: ArrayView2<f32>, spec: &GridSpec, importance: Option<&[f32]>) -> Grid {
    let (rows, cols) = weight.dim();
    let encoding = &spec.encoding;
    let mut spec = spec.clone();
    let reach = || weight.iter().fold(0.0f32, |reach, x| reach.max(x.abs()));
    spec.global = spec.global.or_else(|| encoding.global.map(|_| global_scale(encoding, reach())));
    let task = Task {
        set: AnyLevels::of(encoding),
        count: encoding.levels.count(),
        stored: Stored::of(encoding, spec.global),
        searched: importance.is_some(),
    };
    let importance = importance.map_or_else(|| vec![1.0; cols], super::blocks::floor);
    let (width, groups) = (encoding.group_width(cols).max(1), spec.groups());
    let height = encoding.block_height(rows).max(1);
    let data = weight.to_slice().expect("a contiguous matrix");
    let mut blocks = vec![BlockScales::default(); rows * groups];
    blocks.par_chunks_mut((height * groups).max(1)).enumerate().for_each_init(
        || (Vec::new(), Vec::new()),
        |(x, h), (tile, blocks)| {
            let of = tile * height..rows.min((tile + 1) * height);
            for group in 0..groups {
                let columns = group * width..cols.min((group + 1) * width);
                x.clear();
                h.clear();
                for row in of.clone() {
                    x.extend_from_slice(&data[row * cols..][columns.clone()]);
                    h.extend_from_slice(&importance[columns.clone()]);
                }
                let found = fit_block(x, h, &task);
                blocks.iter_mut().skip(group).step_by(groups).for_each(|block| *block = found);
            }
        },
    );
    Grid::of_blocks(spec, rows, blocks)
}

struct Task {
    set: AnyLevels,
    count: usize,
    stored: Stored,
    searched: bool,
}

/// Pads both with zeros to whole lanes, which count for nothing.
fn fit_block(x: &mut Vec<f32>, h: &mut Vec<f32>, task: &Task) -> BlockScales {
    let [mut low, mut high] = [f32::INFINITY, f32::NEG_INFINITY];
    x.iter().for_each(|x| (low, high) = (low.min(*x), high.max(*x)));
    let padded = x.len().next_multiple_of(LANES);
    x.resize(padded, 0.0);
    h.resize(padded, 0.0);
    if task.searched { search(x, h, low, high, task) } else { from_range(low, high, task) }
}

fn from_range(low: f32, high: f32, task: &Task) -> BlockScales {
    let [bottom, top] = with_levels!(task.set, set => set.range());
    let stored = task.stored;
    if low == 0.0 && high == 0.0 {
        return BlockScales::default();
    }
    let (d, m) = match stored.min {
        Some(_) => through_zero(low, high, top, stored),
        None => (stored.round(high.abs().max(low.abs()) / top.max(-bottom)), 0.0),
    };
    BlockScales { d, m, ..BlockScales::default() }
}

/// A scale and a min of levels from 0 to `top` for values from `low` to `high`, so that a level stands for zero, as `mlx.core.quantize`
/// has it: weights that are exactly zero are so for a reason, and their input may be large.
///
/// ```text
/// steps = ⌊far / ((high − low) / top)⌉        far: the end that is further from zero
/// scale = far / steps                         zero is that many steps from it
/// ```
fn through_zero(low: f32, high: f32, top: f32, stored: Stored) -> (f32, f32) {
    let span = (high - low) / top;
    if span <= 0.0 {
        return (stored.round(span), stored.round_min(-low));
    }
    let below = -low > high;
    let far = if below { -low } else { high };
    let steps = (far / span).round_ties_even();
    let d = stored.round(far / steps);
    (d, stored.round_min(d * if below { steps } else { top - steps }))
}

/// The best scale and min found so far.
#[derive(Clone, Copy)]
struct Best {
    loss: f32,
    d: f32,
    m: f32,
}

impl Best {
    #[inline(always)]
    fn consider<L: LevelSet>(&mut self, set: L, x: &[f32], h: &[f32], stored: Stored, scale: f32, min: f32) {
        let (d, m) = (stored.round(scale), stored.round_min(min));
        let loss = cost(set, x, h, d, m);
        if loss < self.loss {
            *self = Best { loss, d, m };
        }
    }
}

/// Scale and min of least squares for the levels that a scale and a min give, `x ≈ s · level − m`; `None` where they say nothing.
///
/// Sums in single precision, the few steps after them in double.
#[inline(always)]
fn solved<L: LevelSet>(set: L, x: &[f32], h: &[f32], inverse: f32, min: f32, has_min: bool) -> Option<[f32; 2]> {
    let [mut hl, mut hll, mut hlx, mut hx, mut hs] = [[0.0f32; LANES]; 5];
    for (x, h) in x.chunks_exact(LANES).zip(h.chunks_exact(LANES)) {
        for lane in 0..LANES {
            let level = set.nearest((x[lane] + min) * inverse);
            let of_level = h[lane] * level;
            hl[lane] += of_level;
            hll[lane] += of_level * level;
            hlx[lane] += of_level * x[lane];
            hx[lane] += h[lane] * x[lane];
            hs[lane] += h[lane];
        }
    }
    let [a, b, c, first, weight] = [hl, hll, hlx, hx, hs].map(|lanes| f64::from(sum_lanes(lanes)));
    if !has_min {
        return (b > 0.0).then(|| [(c / b) as f32, 0.0]);
    }
    let determinant = weight * b - a * a;
    let (s, m) = ((weight * c - first * a) / determinant, (a * c - b * first) / determinant);
    (determinant > 0.0 && s > 0.0).then_some([s as f32, m as f32])
}

simd_fn! {
    fn search(x: &[f32], h: &[f32], low: f32, high: f32, task: &Task) -> BlockScales {
        with_levels!(task.set, set => search_in(set, x, h, low, high, task))
    }
}

#[inline(always)]
fn search_in<L: LevelSet>(set: L, x: &[f32], h: &[f32], low: f32, high: f32, task: &Task) -> BlockScales {
    let BlockScales { d, m, .. } = from_range(low, high, task);
    let mut best = Best { loss: cost(set, x, h, d, m), d, m };
    let ([bottom, top], stored) = (set.range(), task.stored);
    if best.loss > 0.0 && high - low > 0.0 {
        let (from, to, steps) = candidates(task.count as f32);
        let share = |step: usize, to: f32| from + (to - from) * step as f32 / steps as f32;
        match (stored.min, stored.scale) {
            (Some(_), _) => {
                let span = (high - low) / top;
                for step in 0..=steps {
                    let inverse = 1.0 / (span * share(step, to.min(1.05)));
                    if let Some([s, m]) = solved(set, x, h, inverse, -low, true) {
                        best.consider(set, x, h, stored, s, m);
                    }
                }
            }
            // Of powers of two there are few to choose from.
            (None, Float::E8M0) => {
                let plain = stored.round(high.abs().max(low.abs()) / top);
                for share in [0.5, 1.0, 2.0] {
                    best.consider(set, x, h, stored, plain * share, 0.0);
                }
            }
            (None, _) => {
                let size = high.abs().max(low.abs()) / top.max(-bottom);
                for step in 0..=steps {
                    best.consider(set, x, h, stored, size * share(step, to), 0.0);
                    if -bottom != top {
                        best.consider(set, x, h, stored, -size * share(step, to), 0.0);
                    }
                }
            }
        }
        for _ in 0..3 {
            let Some([s, m]) = solved(set, x, h, inverse(best.d), best.m, stored.min.is_some()) else { break };
            let before = best.loss;
            best.consider(set, x, h, stored, s, m);
            if best.loss >= before {
                break;
            }
        }
    }
    BlockScales { d: best.d, m: best.m, ..BlockScales::default() }
}

#[cfg(test)]
mod tests;
