//! The search, rounding and packing of blocks, against plain loops and on every instruction set.

use formats::ggml::TYPES;
use ndarray::Array2;

use super::super::testing::{Noise, dequantized};
use super::*;

fn loss(weight: &Array2<f32>, dequantized: &[f32], h: &[f32]) -> f64 {
    let errors = weight.iter().zip(dequantized).zip(h.iter().cycle());
    errors.map(|((w, r), h)| f64::from(*h) * f64::from(w - r).powi(2)).sum()
}

/// Every code is the one nearest to its weight, and the expanded scales are those of the packed block.
#[test]
fn rounding_is_to_the_nearest_value_that_the_file_can_hold() {
    let mut noise = Noise(40);
    let weight = noise.matrix(3, 512);
    for ty in TYPES.iter().filter(|t| t.layout().is_some()) {
        let encoding = ty.layout().unwrap();
        let grid = fit(weight.view(), *ty, None);
        let codes = round(weight.view(), &grid);
        let values = dequantized(&grid, &codes);
        let groups = 512 / encoding.group();
        for (i, (w, value)) in weight.iter().zip(&values).enumerate() {
            let (row, col) = (i / 512, i % 512);
            let at = row * groups + col / encoding.group();
            let nearest = (0..encoding.levels.count())
                .map(|code| grid.scales[at] * encoding.levels.level(code as u8) - grid.mins[at])
                .map(|v| (w - v).abs())
                .fold(f32::INFINITY, f32::min);
            let found = (w - value).abs();
            // The lowest of 256 levels is never used.
            let slack = if encoding.levels.count() == 256 { grid.scales[at].abs() } else { 1e-5 };
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
            loss(&weight, &dequantized(&grid, &round(weight.view(), &grid)), &h)
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
            let values = dequantized(&grid, &round(weight.view(), &grid));
            assert!(
                values.iter().all(|v| (v - value).abs() <= 0.02 * value.abs()),
                "{ty}: {value} became {}",
                values[0]
            );
        }
    }
}
