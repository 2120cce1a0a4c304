//! ggml's block types: scales, mins and codes are those of the CPU, to the bit.

use formats::Encoding;
use formats::encoding::{Block, PRESETS};
use formats::ggml::{GgmlType, TYPES};
use ndarray::Array2;

use super::super::blocks::level_set_of;
use super::on_all;
use crate::backend::{FitKind, GridSpec, Memory, Packing, Quantize};
use crate::ops::levels::{AnyLevels, LevelSet};
use crate::ops::testing::{Noise, dequantized, fit_blocks};
use crate::ops::{blocks, fit, round};

fn types() -> impl Iterator<Item = GgmlType> {
    TYPES.iter().copied().filter(|ty| ty.layout().is_some())
}

/// Blocks of every kind: ordinary ones with tails, and some whose groups are of zeros, of one sign, all equal, tiny.
fn weights(noise: &mut Noise, rows: usize, cols: usize) -> Array2<f32> {
    let mut weight = noise.matrix(rows, cols).mapv(|x| x + 0.05 * x * x * x);
    for (index, group) in weight.as_slice_mut().unwrap().chunks_mut(16).enumerate() {
        match index % 37 {
            3 | 20..=23 => group.fill(0.0),
            5 | 6 => group.iter_mut().for_each(|x| *x = x.abs()),
            8 | 9 => group.iter_mut().for_each(|x| *x = -x.abs()),
            12 | 13 => group.fill(-0.37),
            15 => group.fill(0.37),
            17 => group.iter_mut().for_each(|x| *x *= 1e-6),
            18 => group.iter_mut().for_each(|x| *x *= 1e-39),
            30 => group.iter_mut().for_each(|x| *x *= 40.0),
            _ => {}
        }
    }
    if rows > 2 {
        weight.row_mut(2).fill(0.0);
        // Groups that want the same scale but for its sign.
        let first = weight.row(0).to_vec();
        let sign = |col: usize| if (col / 32).is_multiple_of(2) { 1.0 } else { -1.0 };
        weight.row_mut(1).indexed_iter_mut().for_each(|(col, x)| *x = sign(col) * first[32 + col % 32]);
    }
    weight
}

/// Encodings whose blocks store scales of their own.
pub(super) fn apart() -> impl Iterator<Item = (&'static str, Encoding)> {
    PRESETS.iter().copied().filter(|(_, encoding)| !encoding.is_integers())
}

#[test]
fn level_sets_are_the_cpus() {
    for (name, encoding) in types().map(|ty| (ty.name, ty.encoding())).chain(apart()) {
        let words: Vec<[u8; 4]> = level_set_of(&encoding).chunks_exact(4).map(|b| b.try_into().unwrap()).collect();
        let numbers: Vec<f32> = words.iter().map(|w| f32::from_ne_bytes(*w)).collect();
        let kind = i32::from_ne_bytes(words[0]);
        let levels = || (-300..300).map(|i| i as f32 * 0.5);
        match AnyLevels::of(&encoding) {
            AnyLevels::Even(set) => {
                assert_eq!((kind, &numbers[1..3]), (1, &set.range()[..]));
                for x in levels() {
                    let level = set.nearest(x);
                    assert_eq!(level, x.round_ties_even().clamp(numbers[1], numbers[2]));
                    assert_eq!(set.keep(level), (level + numbers[3]) as u8);
                }
            }
            AnyLevels::Table(set) => {
                assert_eq!((kind, &numbers[1..3]), (0, &set.range()[..]));
                for x in levels() {
                    let above = numbers[20..].iter().filter(|middle| x > **middle).count();
                    assert_eq!(set.nearest(x), numbers[4 + above], "{name} {x}");
                }
            }
            AnyLevels::Float(set) => assert_eq!((kind, &numbers[1..3]), (2, &set.range()[..])),
        }
        assert_eq!(words.len(), 35);
    }
}

/// Rows that are no whole lanes, a last tile that is smaller, few blocks and more than a warp of them.
#[test]
fn scales_of_their_own_are_the_cpus() {
    let mut noise = Noise(73);
    for (name, encoding) in apart() {
        let shapes = match encoding.block {
            Block::Row | Block::Matrix => [(1, 77), (5, 130)],
            Block::Tile(_) => [(3, 77), (131, 130)],
            _ => [(1, 128), (3, 256)],
        };
        for (rows, cols) in shapes {
            let weight = weights(&mut noise, rows, cols);
            let mut h: Vec<f32> = (0..cols).map(|_| noise.next().powi(2)).collect();
            h[3] = 0.0;
            let spec = GridSpec::of(encoding, cols);
            for importance in [None, Some(&h[..])] {
                let kind = || importance.map_or(FitKind::MinMax, FitKind::Weighted);
                let of = importance.is_some();
                let expected = fit::run(weight.view(), &spec, importance.map_or(FitKind::MinMax, FitKind::Weighted));
                let found = on_all(|cuda| {
                    let weight = cuda.upload(weight.clone()).unwrap();
                    let grid = cuda.fit(&weight, &spec, kind()).unwrap();
                    let codes = cuda.round(&weight, &grid).unwrap();
                    let values = cuda.download(&cuda.dequantize(&codes, &grid).unwrap()).unwrap();
                    (grid.blocks, grid.spec.global, cuda.download_codes(&codes).unwrap(), values)
                });
                let Some((blocks, global, codes, values)) = found else { return };
                assert_eq!(global, expected.spec.global, "{name}");
                for (index, (found, expected)) in blocks.iter().zip(&expected.blocks).enumerate() {
                    assert_eq!(found, expected, "{name}, block {index} of {rows} rows, {of}");
                }
                let codes = codes.as_slice().unwrap();
                assert_eq!(codes, round::run(weight.view(), &expected), "{name}");
                assert_eq!(values.as_slice().unwrap(), dequantized(&expected, codes), "{name}");
            }
        }
    }
}

#[test]
fn fits_are_the_cpus() {
    let mut noise = Noise(71);
    for ty in types() {
        // Few blocks, so that the last warp is not full; and more than one warp.
        for (rows, blocks) in [(1, 1), (3, 3)] {
            let cols = blocks * 256;
            let weight = weights(&mut noise, rows, cols);
            let mut h: Vec<f32> = (0..cols).map(|_| noise.next().powi(2)).collect();
            h[3] = 0.0;
            for importance in [None, Some(&h[..]), Some(&vec![0.0; cols][..])] {
                let found = on_all(|cuda| {
                    fit_blocks(cuda, &cuda.upload(weight.clone()).unwrap(), ty, importance).unwrap().blocks
                });
                let Some(found) = found else { return };
                let expected = blocks::fit(weight.view(), ty, importance).blocks;
                assert_eq!(found.len(), expected.len());
                for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert_eq!(found, expected, "{ty}, block {index} of {rows} rows, {}", importance.is_some());
                }
            }
        }
    }
}

#[test]
fn codes_are_the_cpus_and_dequantize_to_what_files_hold() {
    let mut noise = Noise(72);
    for ty in types() {
        let mut weight = weights(&mut noise, 3, 512);
        let grid = blocks::fit(weight.view(), ty, None);
        // Ties, and what no code is near to.
        for (col, value) in
            [f32::MAX, -f32::MAX, f32::NAN, 1.5 * grid.scales[0], -0.5 * grid.scales[0]].into_iter().enumerate()
        {
            weight[[0, col]] = value;
        }
        let found = on_all(|cuda| {
            let codes = cuda.round(&cuda.upload(weight.clone()).unwrap(), &grid).unwrap();
            let values = cuda.download(&cuda.dequantize(&codes, &grid).unwrap()).unwrap();
            (cuda.download_codes(&codes).unwrap(), values)
        });
        let Some((codes, found)) = found else { return };
        let codes = codes.as_slice().unwrap();
        assert_eq!(codes, blocks::round(weight.view(), &grid), "{ty}");
        assert_eq!(found.as_slice().unwrap(), dequantized(&grid, codes), "{ty}");
    }
}

#[test]
fn shapes_are_checked_and_nothing_is_no_work() {
    on_all(|cuda| {
        let ty = GgmlType::from_name("Q4_K").unwrap();
        let (right, wrong) = (cuda.zeros(2, 256).unwrap(), cuda.zeros(2, 128).unwrap());
        let grid = fit_blocks(cuda, &right, ty, None).unwrap();
        assert_eq!(grid.blocks.len(), 2);
        assert!(fit_blocks(cuda, &wrong, ty, None).is_err());
        assert!(fit_blocks(cuda, &right, GgmlType::from_name("F16").unwrap(), None).is_err());
        assert!(fit_blocks(cuda, &right, ty, Some(&[1.0; 128])).is_err());
        assert!(cuda.round(&wrong, &grid).is_err());
        assert!(cuda.round(&cuda.zeros(1, 256).unwrap(), &grid).is_err());
        for shape in [(2, 255), (1, 256)] {
            let codes = cuda.send_codes(&Array2::zeros(shape)).unwrap();
            assert!(cuda.pack(&codes, Packing::Blocks(&grid)).is_err());
            assert!(cuda.dequantize(&codes, &grid).is_err());
        }
        let none = fit_blocks(cuda, &cuda.zeros(0, 256).unwrap(), ty, None).unwrap();
        assert!(none.blocks.is_empty());
        let codes = cuda.round(&cuda.zeros(0, 256).unwrap(), &none).unwrap();
        assert!(cuda.download_codes(&codes).unwrap().is_empty());
    });
}
