use formats::encoding::{Block, E4M3, Levels, PRESETS};
use ndarray::Array2;

use super::super::testing::{Noise, dequantized};
use super::super::{encoded, factor, fit, gram, refine, round, sweep};
use super::*;
use crate::FitKind;

/// The presets whose blocks store scales of their own, and are no plain integers.
pub(crate) fn encodings() -> impl Iterator<Item = (&'static str, Encoding)> {
    PRESETS.iter().copied().filter(|(_, encoding)| encoding.scheme().is_none())
}

fn weighted(weight: &Array2<f32>, values: &[f32], h: &[f32]) -> f64 {
    let cols = weight.ncols();
    let terms = weight.iter().zip(values).enumerate();
    terms.map(|(at, (x, value))| f64::from(h[at % cols]) * f64::from(x - value).powi(2)).sum()
}

/// As MLX's own function has it: a weight that is exactly zero is so for a reason, and its input may be large.
#[test]
fn a_range_with_a_min_has_a_level_for_zero() {
    let mut noise = Noise(52);
    for bits in [4, 8] {
        let encoding = Encoding::mlx(bits, 32, Float::F16);
        let mut weight = noise.matrix(40, 64);
        weight.column_mut(5).fill(0.0);
        // Most of them on one side, and all.
        weight.rows_mut().into_iter().take(20).for_each(|mut row| row.iter_mut().for_each(|x| *x = x.abs()));
        let grid = fit::run(weight.view(), &GridSpec::of(encoding, 64), FitKind::MinMax);
        let values = dequantized(&grid, &round::run(weight.view(), &grid));
        for (row, values) in values.chunks_exact(64).enumerate() {
            let step = grid.scales[2 * row];
            assert!(values[5].abs() <= 0.1 * step, "{bits} bits, row {row}: {} beside a step of {step}", values[5]);
        }
    }
}

#[test]
fn grids_from_ranges_are_those_of_the_plain_loop() {
    let mut noise = Noise(51);
    for (name, encoding) in encodings() {
        let mut weight = noise.matrix(135, 192);
        weight.row_mut(3).fill(0.0);
        let plain = encoded::quantize(weight.view(), &encoding);
        let mut spec = GridSpec::of(encoding, 192);
        // A power of two is not what the plain loop takes.
        let own = encoding.global.map(|_| plain.global);
        spec.global = own;
        let mut grid = fit::run(weight.view(), &spec, FitKind::MinMax);
        let [rows, groups] = [135, spec.groups()];
        for row in 0..rows {
            for group in 0..groups {
                let block = encoding.block.of([row, group * encoding.group_width(192)], [rows, 192]);
                let (found, wanted) = (grid.scales[row * groups + group], plain.scales[block] * own.unwrap_or(1.0));
                // What lies between two values may fall either way in double precision.
                let step = if encoding.precision() == Float::E4M3 { 0.13 } else { 1e-2 };
                assert!(
                    (found - wanted).abs() <= step * wanted.abs() + 1e-30,
                    "{name} [{row}, {group}]: {found} and {wanted}"
                );
                let min = grid.mins[row * groups + group];
                assert!((min - plain.offsets[block]).abs() <= 1e-2 * min.abs(), "{name} [{row}, {group}]");
            }
        }
        // On one grid both choose the nearest level.
        grid.scales.iter_mut().enumerate().for_each(|(at, scale)| {
            let block = encoding.block.of([at / groups, at % groups * encoding.group_width(192)], [rows, 192]);
            *scale = plain.scales[block] * own.unwrap_or(1.0);
            grid.mins[at] = plain.offsets[block];
        });
        let values = dequantized(&grid, &round::run(weight.view(), &grid));
        for ((x, a), b) in weight.iter().zip(values).zip(plain.dequantize()) {
            let (a, b) = ((x - a).abs(), (x - b).abs());
            assert!(a <= b * (1.0 + 1e-4) + 1e-6, "{name}: {x} is missed by {a}, and could be by {b}");
        }
    }
}

#[test]
fn what_is_searched_beats_the_range_and_comes_near_the_best_scale() {
    let mut noise = Noise(52);
    for (name, encoding) in encodings() {
        // A row of 77 columns is not whole lanes.
        let cols = match encoding.block {
            Block::Row => 77,
            _ => 128,
        };
        let weight = noise.matrix(9, cols).mapv(|x| x + 0.05 * x * x * x);
        let h: Vec<f32> = (0..cols).map(|_| noise.next().powi(2) + 0.01).collect();
        let spec = GridSpec::of(encoding, cols);
        let of = |kind: FitKind<'_, Array2<f32>>| {
            let grid = fit::run(weight.view(), &spec, kind);
            let values = dequantized(&grid, &round::run(weight.view(), &grid));
            (weighted(&weight, &values, &h), grid)
        };
        let ((plain, _), (found, grid)) = (of(FitKind::MinMax), of(FitKind::Weighted(&h)));
        assert!(found <= plain, "{name}: {found} after {plain}");
        let stored = Stored::of(&encoding, grid.spec.global);
        assert!(grid.scales.iter().all(|scale| stored.round(*scale) == *scale), "{name}: scales are stored ones");
        assert!(grid.mins.iter().all(|min| stored.round_min(*min) == *min), "{name}: mins are stored ones");
        if encoding.has_min() || encoding.block_height(9) > 1 {
            continue;
        }
        // Every scale on a fine ladder, block by block.
        let (width, mut best) = (encoding.group_width(cols), 0.0);
        let set = AnyLevels::of(&encoding);
        for row in weight.rows() {
            for group in 0..spec.groups() {
                let at = group * width..cols.min((group + 1) * width);
                let x: Vec<f32> = row.iter().skip(at.start).take(at.len()).copied().collect();
                let reach = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let loss_of = |scale: f32| -> f64 {
                    with_levels!(set, set => x.iter().zip(&h[at.clone()])
                        .map(|(x, h)| f64::from(h * (x - scale * set.nearest(x * inverse(scale))).powi(2)))
                        .sum())
                };
                let [_, top] = with_levels!(set, set => set.range());
                let ladder = (1..=400).map(|step| stored.round(reach / top * 2.0 * step as f32 / 400.0));
                best += ladder.map(loss_of).fold(f64::INFINITY, f64::min);
            }
        }
        // Of E4M3 the loss is a ragged function of the scale.
        let slack = if encoding.levels == Levels::Table(&E4M3) { 1.3 } else { 1.12 };
        assert!(found <= slack * best, "{name}: {found}, the best {best}");
    }
}

#[test]
fn a_row_of_e4m3_spans_its_largest_weight() {
    for scale in [Float::F32, Float::F16, Float::BF16] {
        let encoding = Encoding::fp8(Block::Row).stored_in(scale, 0);
        let mut weight = Noise(41).matrix(9, 77);
        weight.row_mut(3).fill(0.0);
        let grid = fit::run(weight.view(), &GridSpec::of(encoding, 77), FitKind::MinMax);
        let plain = encoded::quantize(weight.view(), &encoding);
        assert_eq!(grid.scales, plain.scales);
    }
}

#[test]
fn a_global_scale_holds_every_scale_and_is_a_power_of_two() {
    for reach in [1e-6f32, 0.7, 1.0, 448.0 * 6.0, 3e4] {
        let global = global_scale(&Encoding::NVFP4, reach);
        assert_eq!(global.to_bits() & 0x7f_ffff, 0, "{global}");
        let largest = reach / 6.0 / global;
        assert!((100.0..448.0).contains(&largest), "{reach}: {largest} is stored");
    }
    assert_eq!(global_scale(&Encoding::NVFP4, 0.0), 1.0);
}

/// Sweep and refinement lower the loss of the layer's output in every encoding, and say what it is.
#[test]
fn every_encoding_is_swept_and_refined() {
    let mut noise = Noise(53);
    let mixing = noise.matrix(128, 128);
    let x = noise.matrix(400, 128).dot(&mixing);
    let hessian = gram::reference(x.view());
    let weight = noise.matrix(70, 128);
    let factor = factor::run(hessian.view(), (0..128).rev().collect(), 0.05).unwrap();
    let mut damped = hessian.clone();
    damped.diag_mut().iter_mut().for_each(|d| *d *= 1.05);
    for (name, encoding) in encodings() {
        let mut grid = fit::run(weight.view(), &GridSpec::of(encoding, 128), FitKind::Weighted(&[1.0; 128]));
        let trace = |grid: &Grid, codes: &[u8]| {
            let e = &weight - &Array2::from_shape_vec((70, 128), dequantized(grid, codes)).unwrap();
            gram::quadratic(e.view(), damped.view())
        };
        let plain = trace(&grid, &round::run(weight.view(), &grid));
        let mut swept = sweep::run(weight.view(), &factor, &grid);
        let found = trace(&grid, &swept.codes);
        assert!((found - swept.loss).abs() <= 3e-3 * found, "{name}: {found}, and the sweep says {}", swept.loss);
        assert!(found < plain, "{name}: {found}, rounding {plain}");
        let said = refine::run(weight.view(), hessian.view(), 0.05, &mut grid, &mut swept.codes);
        let refined = trace(&grid, &swept.codes);
        assert!((refined - said).abs() <= 3e-3 * refined, "{name}: {refined}, and the refinement says {said}");
        assert!(refined < found, "{name}: {refined} after {found}");
        let stored = Stored::of(&encoding, grid.spec.global);
        assert!(grid.scales.iter().all(|scale| stored.round(*scale) == *scale), "{name}: scales are stored ones");
    }
}
