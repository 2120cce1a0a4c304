//! Recovers the scales of weights that lie on a grid already, as those of quantization-aware training do.
//!
//! Such a weight is `x = P(scale · level)`, rounded to the precision `P` in which the checkpoint stores it. Every value of a group so
//! allows an interval of scales, and the group lies on the grid if they have something in common:
//!
//! ```text
//! for each level that the largest weight may stand for:          # from the smallest: the coarsest grid first
//!     allowed = the scales for which P(scale · level) is that weight
//!     for each other weight x of the group:
//!         level   = the one nearest to x / (middle of allowed)
//!         allowed = allowed ∩ the scales for which P(scale · level) = x       # empty: the next level
//!     scale = middle of allowed, as the file stores it
//! ```
//!
//! A scale that the file stores and that is allowed gives back every weight, to the bit. If the file's precision has none between the
//! bounds, its nearest one is off by half a unit in its last place, which is all that is lost. For weights that lie on no grid the first few values of
//! the first group say so.

use std::sync::atomic::{AtomicBool, Ordering};

use formats::encoding::{Block, Offset, Scale};
use formats::ggml::BlockScales;
use formats::{Encoding, Float, Levels};
use half::f16;
use ndarray::ArrayView2;
use rayon::prelude::*;

use crate::backend::{Grid, GridSpec};

/// A grid on which a weight lies already.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// Its scales and zeros; rounding to it finds the codes.
    pub grid: Grid,
    /// Whether what the codes stand for, in the precision of the weights, is every weight to the bit. Otherwise the file's precision of scales
    /// lacks the scale of some group, and has its neighbour.
    pub exact: bool,
}

/// The grid that `spec` describes and on which all of `weight` `[rows, cols]` lies, if there is one.
///
/// Encodings that divide the scale of a group further, or take off a real minimum, or scale the whole matrix, are not looked into.
///
/// # Panics
/// If `spec` is of another number of columns: a mistake of the caller.
pub fn recover(weight: ArrayView2<f32>, spec: &GridSpec) -> Option<Recovered> {
    let levels = AllowedLevels::of(&spec.encoding)?;
    let (rows, cols, groups) = (weight.nrows(), weight.ncols(), spec.groups());
    assert_eq!(cols, spec.group_of.len(), "a spec of as many columns");
    let mut columns: Vec<Vec<usize>> = vec![Vec::new(); groups];
    for (col, group) in spec.group_of.iter().enumerate() {
        columns[*group as usize].push(col);
    }
    let exact = AtomicBool::new(true);
    let of_row = |row: usize| -> Option<Vec<(f32, u8)>> {
        let row = weight.row(row);
        let mut x = Vec::new();
        let group = |columns: &Vec<usize>| {
            x.clear();
            x.extend(columns.iter().map(|col| row[*col]));
            let found = levels.fit(&x)?;
            if !found.exact {
                exact.store(false, Ordering::Relaxed);
            }
            Some((found.scale, found.zero))
        };
        columns.iter().map(group).collect()
    };
    let found: Vec<(f32, u8)> = (0..rows).into_par_iter().map(of_row).collect::<Option<Vec<_>>>()?.concat();
    let grid = match spec.encoding.is_integers() {
        true => {
            let (scales, zeros) = found.into_iter().unzip();
            Grid::of_integers(spec.clone(), rows, scales, zeros)
        }
        false => {
            let block = |(d, _)| BlockScales { d, ..BlockScales::default() };
            Grid::of_blocks(spec.clone(), rows, found.into_iter().map(block).collect())
        }
    };
    Some(Recovered { grid, exact: exact.into_inner() })
}

/// The multiples of a scale that the codes of an encoding may stand for.
struct AllowedLevels {
    /// From the one nearest to 0 on, without 0.
    by_size: Vec<f32>,
    /// Whether there is the level 0.
    zero: bool,
    /// How many integers a stored zero may move, and the smallest that it can be; `None` where levels are fixed.
    moved: Option<[u8; 2]>,
    /// The zero of all groups, where levels are fixed integers.
    fixed: u8,
    integers: bool,
    stored: Float,
}

/// What was found of a group.
struct Found {
    scale: f32,
    zero: u8,
    exact: bool,
}

impl AllowedLevels {
    fn of(encoding: &Encoding) -> Option<AllowedLevels> {
        let Scale::Own(stored) = encoding.scale else { return None };
        let in_rows = matches!(encoding.block, Block::Row | Block::Columns(_));
        if !in_rows || !encoding.has_codes() || encoding.has_min() || encoding.global.is_some() {
            return None;
        }
        let max = encoding.levels.count().checked_sub(1)?;
        let moved = match encoding.offset {
            Offset::Zero { min } => Some([max as u8, min]),
            _ => None,
        };
        let fixed = match encoding.levels {
            Levels::Integer { zero, .. } => zero,
            _ => 0,
        };
        let integers = matches!(encoding.levels, Levels::Integer { .. });
        let mut by_size: Vec<f32> = match moved {
            Some(_) => (1..=max as i16).flat_map(|level| [level, -level]).map(f32::from).collect(),
            // The lowest of 256 signed levels is given to no weight (see `levels`).
            None => (u8::from(integers && max == 255)..=max as u8)
                .map(|code| encoding.levels.level(code))
                .filter(|level| level.is_finite())
                .collect(),
        };
        let zero = moved.is_some() || by_size.contains(&0.0);
        by_size.retain(|level| *level != 0.0);
        by_size.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
        by_size.dedup();
        Some(AllowedLevels { by_size, zero, moved, fixed, integers, stored })
    }

    /// The scale and zero of a group, if all of it lies on the grid.
    fn fit(&self, x: &[f32]) -> Option<Found> {
        let largest = x.iter().copied().reduce(|a, b| if b.abs() > a.abs() { b } else { a })?;
        if !x.iter().all(|x| x.is_finite()) {
            return None;
        }
        if largest == 0.0 {
            // Any scale holds a group of zeros; a scale of 0 would make readers divide by it.
            let zero = self.moved.map_or(self.fixed, |[max, min]| (max / 2 + 1).max(min));
            return self.zero.then(|| Found { scale: self.stored.round(1.0), zero, exact: true });
        }
        // The strictest reading first: values that are products as they stand are no rounded ones.
        [Float::F32, Float::F16, Float::BF16].into_iter().find_map(|of| self.fit_in(x, largest, of))
    }

    fn fit_in(&self, x: &[f32], largest: f32, of: Float) -> Option<Found> {
        let bounds = preimage(largest, of)?;
        self.by_size.iter().find_map(|level| {
            // A scale with a sign is one that the file may have unless its precision has none.
            if self.stored == Float::E8M0 && (largest < 0.0) != (*level < 0.0) {
                return None;
            }
            let mut allowed = quotient(bounds, f64::from(*level));
            let mut reach = [0.0f32; 2];
            for value in x {
                let level = self.nearest(f64::from(*value) / (0.5 * (allowed[0] + allowed[1])))?;
                reach = [reach[0].min(level), reach[1].max(level)];
                if level == 0.0 {
                    if *value != 0.0 {
                        return None;
                    }
                    continue;
                }
                let [low, high] = quotient(preimage(*value, of)?, f64::from(level));
                allowed = [allowed[0].max(low), allowed[1].min(high)];
                if allowed[0] > allowed[1] {
                    return None;
                }
            }
            let zero = self.zero_for(reach)?;
            let scale = self.stored.round((0.5 * (allowed[0] + allowed[1])) as f32);
            if scale == 0.0 || !scale.is_finite() {
                return None;
            }
            let level = |value: f32| self.nearest(f64::from(value) / f64::from(scale));
            let held = |value: &f32| level(*value).is_some_and(|level| rounded(scale * level, of) == *value);
            Some(Found { scale, zero, exact: x.iter().all(held) })
        })
    }

    /// The level nearest to a multiple of the scale.
    fn nearest(&self, multiple: f64) -> Option<f32> {
        if self.integers {
            return Some(multiple.round_ties_even() as f32);
        }
        let zero = self.zero.then_some(0.0);
        let levels = self.by_size.iter().copied().chain(zero);
        levels.min_by(|a, b| (f64::from(*a) - multiple).abs().total_cmp(&(f64::from(*b) - multiple).abs()))
    }

    /// The zero under which integers between these are codes.
    fn zero_for(&self, [low, high]: [f32; 2]) -> Option<u8> {
        let Some([max, min]) = self.moved else {
            let within = !self.integers || self.by_size.iter().any(|l| *l <= low) || low == 0.0;
            let within = within && (!self.integers || self.by_size.iter().any(|l| *l >= high) || high == 0.0);
            return within.then_some(self.fixed);
        };
        let (least, most) = ((-low).max(f32::from(min)), f32::from(max) - high);
        (least <= most).then(|| (f32::from(max / 2 + 1)).clamp(least, most) as u8)
    }
}

/// The nearest value of a precision in which weights are stored.
fn rounded(x: f32, of: Float) -> f32 {
    match of {
        Float::BF16 => half::bf16::from_f32(x).to_f32(),
        Float::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// The reals that round to `x`; `None` if the precision does not have it.
fn preimage(x: f32, of: Float) -> Option<[f64; 2]> {
    let size = x.abs();
    if rounded(size, of) != size || size == 0.0 {
        return None;
    }
    let [below, above] = match of {
        Float::BF16 => [size.to_bits() - 0x1_0000, size.to_bits() + 0x1_0000].map(f32::from_bits),
        Float::F16 => {
            let bits = f16::from_f32(size).to_bits();
            [f16::from_bits(bits - 1), f16::from_bits(bits + 1)].map(f16::to_f32)
        }
        _ => [size.to_bits() - 1, size.to_bits() + 1].map(f32::from_bits),
    };
    let [low, high] = [below, above].map(|other| 0.5 * (f64::from(other) + f64::from(size)));
    high.is_finite().then_some(if x < 0.0 { [-high, -low] } else { [low, high] })
}

/// What a number in an interval may be when it is divided.
fn quotient([low, high]: [f64; 2], by: f64) -> [f64; 2] {
    if by < 0.0 { [high / by, low / by] } else { [low / by, high / by] }
}

#[cfg(test)]
mod tests {
    use formats::{GgmlType, Scheme};
    use ndarray::Array2;

    use super::super::testing::Noise;
    use super::*;

    /// Random codes of `low..=high` under a scale of `stored` for each group of 32, as the precision `of` holds them.
    fn on_grid(noise: &mut Noise, [low, high]: [i32; 2], stored: Float, of: Float) -> Array2<f32> {
        let scales: Vec<f32> = (0..12).map(|_| stored.round(0.01 + 0.02 * noise.next().abs())).collect();
        Array2::from_shape_fn((4, 96), |(row, col)| {
            let code = low + (noise.next().abs() * 1000.0) as i32 % (high - low + 1);
            rounded(scales[row * 3 + col / 32] * code as f32, of)
        })
    }

    fn spec(encoding: Encoding) -> GridSpec {
        GridSpec::of(encoding, 96)
    }

    /// What the codes of a grid stand for.
    fn held(weight: &Array2<f32>, grid: &Grid) -> Array2<f32> {
        let codes = match grid.spec.encoding.is_integers() {
            true => super::super::round::run(weight.view(), grid),
            false => super::super::blocks::round(weight.view(), grid),
        };
        let codes = Array2::from_shape_vec(weight.dim(), codes).expect("one a weight");
        super::super::dequantize::run(codes.view(), grid)
    }

    #[test]
    fn weights_on_a_grid_are_recovered_to_the_bit() {
        let mut noise = Noise(5);
        let scheme = |bits, symmetric| Scheme { bits, group: Some(32), symmetric };
        for of in [Float::F32, Float::F16, Float::BF16] {
            for (span, encoding) in [
                ([-8, 7], scheme(4, true).encoding(Float::BF16, 0)),
                ([-7, 8], scheme(4, true).encoding(Float::BF16, 0)),
                ([-7, 7], scheme(4, true).encoding(Float::F16, 0)),
                ([-3, 12], scheme(4, false).encoding(Float::F16, 1)),
                ([-2, 1], scheme(2, true).encoding(Float::F32, 0)),
                ([-1, 1], scheme(2, true).encoding(Float::BF16, 0)),
                ([-8, 7], scheme(8, true).encoding(Float::BF16, 0)),
                ([-127, 127], scheme(8, true).encoding(Float::BF16, 0)),
            ] {
                let weight = on_grid(&mut noise, span, Float::BF16, of);
                let found = recover(weight.view(), &spec(encoding)).unwrap_or_else(|| panic!("{encoding:?} {of:?}"));
                assert!(found.exact, "{encoding:?} {of:?}");
                assert_eq!(held(&weight, &found.grid).mapv(|x| rounded(x, of)), weight, "{encoding:?} {of:?}");
            }
            let weight = on_grid(&mut noise, [-8, 7], Float::F16, of);
            for ty in ["Q4_0", "Q5_0", "Q8_0"] {
                let spec = spec(GgmlType::from_name(ty).expect("a type").encoding());
                let found = recover(weight.view(), &spec).unwrap_or_else(|| panic!("{ty} {of:?}"));
                assert!(found.exact, "{ty} {of:?}");
                assert_eq!(held(&weight, &found.grid).mapv(|x| rounded(x, of)), weight, "{ty} {of:?}");
            }
        }
    }

    #[test]
    fn scales_that_the_file_lacks_are_its_nearest_ones() {
        let mut noise = Noise(6);
        let weight = on_grid(&mut noise, [-8, 7], Float::F32, Float::F32);
        let scheme = Scheme { bits: 4, group: Some(32), symmetric: true };
        let found = recover(weight.view(), &spec(scheme.encoding(Float::BF16, 0))).expect("a grid");
        assert!(!found.exact);
        let error = (held(&weight, &found.grid) - &weight).mapv(f32::abs);
        for (error, x) in error.iter().zip(&weight) {
            assert!(*error <= x.abs() / 250.0, "{error} of {x}");
        }
        assert!(recover(weight.view(), &spec(scheme.encoding(Float::F32, 0))).expect("a grid").exact);
    }

    #[test]
    fn other_weights_and_narrower_grids_have_none() {
        let mut noise = Noise(7);
        let encoding = |bits, group| Scheme { bits, group: Some(group), symmetric: true }.encoding(Float::BF16, 0);
        for of in [Float::F32, Float::F16, Float::BF16] {
            let weight = noise.matrix(4, 96).mapv(|x| rounded(0.02 * x, of));
            for (bits, group) in [(4, 32), (8, 32), (4, 8), (2, 16)] {
                assert!(recover(weight.view(), &spec(encoding(bits, group))).is_none(), "{bits} {group} {of:?}");
            }
        }
        let weight = on_grid(&mut noise, [-8, 7], Float::BF16, Float::BF16);
        assert!(recover(weight.view(), &spec(encoding(4, 96))).is_none(), "several scales in one group");
        assert!(recover(weight.view(), &spec(encoding(3, 32))).is_none(), "too few levels");
        assert!(recover(weight.view(), &spec(encoding(4, 16))).is_some_and(|found| found.exact), "parts of its groups");
        let k_quant = spec(GgmlType::from_name("Q8_0").expect("a type").encoding());
        let mut broken = weight.clone();
        broken[[3, 95]] *= 1.3;
        assert!(recover(broken.view(), &k_quant).is_none(), "a single weight beside the grid");
        broken[[3, 95]] = f32::NAN;
        assert!(recover(broken.view(), &k_quant).is_none(), "no number");
    }

    #[test]
    fn microscaled_weights_and_zeros_are_recovered() {
        let mut noise = Noise(8);
        let table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let weight = Array2::from_shape_fn((4, 96), |(row, col)| {
            let code = (noise.next().abs() * 1000.0) as usize % 8;
            let sign = if noise.next() < 0.0 { -1.0 } else { 1.0 };
            sign * table[code] * f32::from_bits((110 + row as u32 + col as u32 / 32) << 23)
        });
        let found =
            recover(weight.view(), &spec(GgmlType::from_name("MXFP4").expect("a type").encoding())).expect("a grid");
        assert!(found.exact);
        assert_eq!(held(&weight, &found.grid), weight);
        let zeros = Array2::zeros((2, 96));
        let scheme = Scheme { bits: 4, group: Some(32), symmetric: false };
        let found = recover(zeros.view(), &spec(scheme.encoding(Float::F16, 1))).expect("a grid");
        assert_eq!(held(&zeros, &found.grid), zeros);
    }
}
