//! ggml's block types: scales, mins and codes are those of the CPU, to the bit.

use formats::ggml::{GgmlType, TYPES};
use ndarray::Array2;

use super::super::blocks::ladder_of;
use super::on_all;
use crate::backend::Backend;
use crate::ops::blocks::{self, Ladder, Rungs};
use crate::ops::testing::{Noise, restored};

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

#[test]
fn ladders_have_the_cpus_levels() {
    for ty in types() {
        let layout = ty.layout().unwrap();
        let words: Vec<[u8; 4]> = ladder_of(layout).chunks_exact(4).map(|b| b.try_into().unwrap()).collect();
        let numbers: Vec<f32> = words.iter().map(|w| f32::from_ne_bytes(*w)).collect();
        let even = i32::from_ne_bytes(words[0]);
        let levels = || (-300..300).map(|i| i as f32 * 0.5);
        match Rungs::of(layout) {
            Rungs::Even(ladder) => {
                assert_eq!((even, &numbers[1..3]), (1, &ladder.range()[..]));
                for x in levels() {
                    let level = ladder.nearest(x);
                    assert_eq!(level, x.round_ties_even().clamp(numbers[1], numbers[2]));
                    assert_eq!(ladder.code(level, &[0; 256]), (level + numbers[3]) as u8);
                }
            }
            Rungs::Uneven(ladder) => {
                assert_eq!((even, &numbers[1..3]), (0, &ladder.range()[..]));
                for x in levels() {
                    let steps = numbers[5..20].iter().zip(&numbers[20..]).filter(|(middle, _)| x > **middle);
                    assert_eq!(ladder.nearest(x), steps.fold(numbers[4], |level, (_, step)| level + step), "{ty} {x}");
                }
            }
        }
        assert_eq!(words.len(), 35);
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
                    cuda.fit_blocks(&cuda.upload(weight.clone()).unwrap(), ty, importance).unwrap().blocks
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
fn codes_are_the_cpus_and_restore_to_what_files_hold() {
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
            let codes = cuda.round_blocks(&cuda.upload(weight.clone()).unwrap(), &grid).unwrap();
            let restored = cuda.download(&cuda.restore_blocks(&codes, &grid).unwrap()).unwrap();
            (cuda.download_codes(&codes).unwrap(), restored)
        });
        let Some((codes, found)) = found else { return };
        let codes = codes.as_slice().unwrap();
        assert_eq!(codes, blocks::round(weight.view(), &grid), "{ty}");
        assert_eq!(found.as_slice().unwrap(), restored(&grid, codes), "{ty}");
    }
}

#[test]
fn shapes_are_checked_and_nothing_is_no_work() {
    on_all(|cuda| {
        let ty = GgmlType::from_name("Q4_K").unwrap();
        let (right, wrong) = (cuda.zeros(2, 256).unwrap(), cuda.zeros(2, 128).unwrap());
        let grid = cuda.fit_blocks(&right, ty, None).unwrap();
        assert_eq!(grid.blocks.len(), 2);
        assert!(cuda.fit_blocks(&wrong, ty, None).is_err());
        assert!(cuda.fit_blocks(&right, GgmlType::from_name("F16").unwrap(), None).is_err());
        assert!(cuda.fit_blocks(&right, ty, Some(&[1.0; 128])).is_err());
        assert!(cuda.round_blocks(&wrong, &grid).is_err());
        assert!(cuda.round_blocks(&cuda.zeros(1, 256).unwrap(), &grid).is_err());
        for shape in [(2, 255), (1, 256)] {
            let codes = cuda.send_codes(&Array2::zeros(shape)).unwrap();
            assert!(cuda.pack_blocks(&codes, &grid).is_err());
            assert!(cuda.restore_blocks(&codes, &grid).is_err());
        }
        let none = cuda.fit_blocks(&cuda.zeros(0, 256).unwrap(), ty, None).unwrap();
        assert!(none.blocks.is_empty());
        let codes = cuda.round_blocks(&cuda.zeros(0, 256).unwrap(), &none).unwrap();
        assert!(cuda.download_codes(&codes).unwrap().is_empty());
    });
}
