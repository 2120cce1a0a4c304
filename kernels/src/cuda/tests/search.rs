//! Integer grids: scales, zeros and codes are those of the CPU, to the bit.

use formats::{Float, Scheme};
use ndarray::Array2;

use super::on_all;
use crate::backend::{FitKind, Grid, GridSpec, Memory, Quantize};
use crate::ops::testing::Noise;
use crate::ops::{fit, gram, round, scaled};

/// Specs of all kinds, from rows of one group to groups that lie apart.
fn specs(bits: u8, symmetric: bool, precision: Float, group: Option<usize>, cols: usize) -> Vec<GridSpec> {
    let scheme = Scheme { bits, group, symmetric };
    let spec = GridSpec::of(scheme.encoding(precision, u8::from(!symmetric)), cols);
    let mut apart = spec.clone();
    // No two neighbours alike, but for rows of one group; as many columns in each as before.
    let mut left: Vec<usize> =
        (0..spec.groups()).map(|g| spec.group_of.iter().filter(|x| **x as usize == g).count()).collect();
    let mut next = 0;
    for group in &mut apart.group_of {
        while left[next] == 0 {
            next = (next + 1) % left.len();
        }
        *group = next as u32;
        left[next] -= 1;
        next = (next + 1) % left.len();
    }
    vec![spec, apart]
}

/// Rows of every kind: ordinary ones with tails, of zeros, of one sign, all equal.
fn weights(noise: &mut Noise, rows: usize, cols: usize) -> Array2<f32> {
    let mut weight = noise.matrix(rows, cols).mapv(|x| x + 0.05 * x * x * x);
    for (row, mut values) in weight.rows_mut().into_iter().enumerate() {
        match row % 7 {
            2 => values.fill(0.0),
            3 => values.mapv_inplace(f32::abs),
            4 => values.mapv_inplace(|x| -x.abs()),
            5 => values.fill(0.37),
            6 => values.mapv_inplace(|x| x * 1e-6),
            _ => {}
        }
    }
    weight
}

fn same(found: Grid, expected: Grid, what: &str) {
    assert_eq!(found.zeros, expected.zeros, "{what}");
    assert_eq!(found.scales, expected.scales, "{what}");
}

#[test]
fn fits_are_the_cpus() {
    let mut noise = Noise(61);
    let precisions = [Float::F16, Float::BF16, Float::F32];
    let mut number = 0;
    for bits in [2, 3, 4, 8] {
        for symmetric in [true, false] {
            for (rows, group, cols) in [(7, Some(32), 64), (2, Some(128), 256), (9, Some(24), 61), (1, Some(1), 3)] {
                number += 1;
                let weight = weights(&mut noise, rows, cols);
                let h: Vec<f32> = (0..cols).map(|_| noise.next().powi(2)).collect();
                for spec in specs(bits, symmetric, precisions[number % 3], group, cols) {
                    for kind in [0, 1] {
                        let kind = || if kind == 0 { FitKind::MinMax } else { FitKind::Weighted(&h) };
                        let found = on_all(|cuda| {
                            let grid = cuda.fit(&cuda.upload(weight.clone()).unwrap(), &spec, kind()).unwrap();
                            (grid.scales, grid.zeros)
                        });
                        let Some((scales, zeros)) = found else { return };
                        let host = match kind() {
                            FitKind::MinMax => FitKind::MinMax,
                            _ => FitKind::Weighted(&h),
                        };
                        let what = format!("{:?} {}", spec.encoding, number);
                        let found = Grid::of_integers(spec.clone(), rows, scales, zeros);
                        same(found, fit::run(weight.view(), &spec, host), &what);
                    }
                }
            }
        }
    }
}

#[test]
fn fits_of_long_groups_are_the_cpus() {
    let mut noise = Noise(62);
    let (half, single) = (Float::F16, Float::F32);
    for (bits, symmetric, precision, rows, group, cols, size) in [
        (4, true, half, 4, None, 300, 1.0),
        (3, false, single, 7, None, 515, 1.0),
        (2, false, half, 2, Some(131), 300, 1.0),
        (8, true, single, 3, Some(160), 320, 1.0),
        (8, false, half, 2, None, 257, 1.0),
        // So small that squares are a few units of the least number, and many candidates equally good.
        (2, true, single, 6, None, 129, 5e-23),
        (2, false, single, 6, None, 129, 5e-23),
    ] {
        let weight = weights(&mut noise, rows, cols) * size;
        let h: Vec<f32> = (0..cols).map(|_| noise.next().powi(2)).collect();
        for spec in specs(bits, symmetric, precision, group, cols) {
            let found = on_all(|cuda| {
                let weight = cuda.upload(weight.clone()).unwrap();
                let plain = cuda.fit(&weight, &spec, FitKind::MinMax).unwrap();
                let grid = cuda.fit(&weight, &spec, FitKind::Weighted(&h)).unwrap();
                [(plain.scales, plain.zeros), (grid.scales, grid.zeros)]
            });
            let Some(found) = found else { return };
            for ((scales, zeros), kind) in found.into_iter().zip([FitKind::MinMax, FitKind::Weighted(&h)]) {
                let found = Grid::of_integers(spec.clone(), rows, scales, zeros);
                same(found, fit::run(weight.view(), &spec, kind), &format!("{:?}", spec.encoding));
            }
        }
    }
}

#[test]
fn clipping_is_the_cpus() {
    let mut noise = Noise(63);
    for (bits, symmetric, rows, group, cols) in [
        (3, false, 9, Some(16), 32),
        (4, true, 7, Some(64), 128),
        (4, false, 8, Some(128), 128),
        (2, false, 3, Some(24), 61),
        (2, true, 17, Some(7), 14),
        (3, true, 2, None, 203),
        // Wider than blocks go, and a narrower rest.
        (4, false, 2, Some(270), 300),
    ] {
        let weight = weights(&mut noise, rows, cols);
        let mut x = noise.matrix(2 * cols, cols);
        x.column_mut(1).mapv_inplace(|x| x * 0.01);
        let mut hessian = gram::reference(x.view());
        for i in 0..cols {
            for j in i + 1..cols {
                // Never read.
                hessian[[i, j]] = f32::NAN;
            }
        }
        for spec in specs(bits, symmetric, Float::BF16, group, cols) {
            let found = on_all(|cuda| {
                let hessian = cuda.upload(hessian.clone()).unwrap();
                let weight = cuda.upload(weight.clone()).unwrap();
                let grid = cuda.fit(&weight, &spec, FitKind::BlockHessian(&hessian)).unwrap();
                (grid.scales, grid.zeros)
            });
            let Some((scales, zeros)) = found else { return };
            let found = Grid::of_integers(spec.clone(), rows, scales, zeros);
            let expected = fit::run(weight.view(), &spec, FitKind::BlockHessian(&hessian));
            let plain = fit::run(weight.view(), &spec, FitKind::MinMax);
            assert!(expected.scales != plain.scales, "{:?}: nothing was clipped", spec.encoding);
            same(found, expected, &format!("{:?}", spec.encoding));
        }
    }
}

#[test]
fn codes_are_the_nearest() {
    let mut noise = Noise(64);
    for (rows, bits, group, cols) in
        [(5, 2, Some(32), 96), (3, 3, Some(20), 47), (4, 4, None, 77), (2, 8, Some(128), 256), (1, 4, Some(1), 1)]
    {
        for spec in specs(bits, false, Float::F32, group, cols) {
            let groups = spec.groups();
            let mut scales: Vec<f32> = (0..rows * groups).map(|_| noise.next() * 0.2).collect();
            if rows > 1 {
                scales[groups] = 0.0;
            }
            let zeros = (0..rows * groups).map(|i| (i * 7) as u8 & spec.encoding.max_code()).collect();
            let grid = Grid::of_integers(spec.clone(), rows, scales, zeros);
            let mut weight = noise.matrix(rows, cols);
            // Ties, and what no code is near to.
            weight[[0, 0]] = grid.scales[0] * 1.5;
            if cols > 9 {
                for (col, value) in [f32::MAX, -f32::MAX, f32::NAN, 0.5 * grid.scales[0], 1e-40].into_iter().enumerate()
                {
                    weight[[0, col + 1]] = value;
                }
            }
            let found = on_all(|cuda| {
                let codes = cuda.round(&cuda.upload(weight.clone()).unwrap(), &grid).unwrap();
                let dequantized = cuda.download(&cuda.dequantize(&codes, &grid).unwrap()).unwrap();
                (cuda.download_codes(&codes).unwrap(), dequantized)
            });
            let Some((codes, dequantized)) = found else { return };
            assert_eq!(codes.as_slice().unwrap(), round::reference(weight.view(), &grid), "{:?}", spec.encoding);
            let plain = Array2::from_shape_fn((rows, cols), |(row, col)| {
                let at = row * groups + spec.group_of[col] as usize;
                grid.scales[at] * (f32::from(codes[[row, col]]) - f32::from(grid.zeros[at]))
            });
            assert_eq!(dequantized, plain);
        }
    }
}

#[test]
fn errors_of_scaled_weights_are_the_cpus() {
    let mut noise = Noise(65);
    for (group, cols, symmetric) in [
        (Some(32), 96, true),
        (Some(128), 256, false),
        (Some(24), 61, false),
        (None, 277, false),
        (Some(200), 300, true),
    ] {
        let weight = weights(&mut noise, 9, cols);
        let t: Vec<f32> = (0..cols).map(|_| noise.next().exp()).collect();
        for spec in specs(3, symmetric, Float::F16, group, cols) {
            let found = on_all(|cuda| {
                let weight = cuda.upload(weight.clone()).unwrap();
                cuda.download(&cuda.scaled_rounding_error(&weight, &t, &spec).unwrap()).unwrap()
            });
            let Some(found) = found else { return };
            assert_eq!(found, scaled::reference(weight.view(), &t, &spec), "{:?}", spec.encoding);
        }
    }
}

#[test]
fn shapes_are_checked_and_nothing_is_no_work() {
    on_all(|cuda| {
        let scheme = Scheme { bits: 4, group: Some(4), symmetric: true };
        let spec = GridSpec::of(scheme.encoding(Float::F16, 0), 8);
        let (right, wrong) = (cuda.zeros(2, 8).unwrap(), cuda.zeros(2, 7).unwrap());
        let grid = cuda.fit(&right, &spec, FitKind::MinMax).unwrap();
        assert_eq!((grid.scales.len(), &grid.zeros[..]), (4, &[8u8; 4][..]));
        assert!(cuda.fit(&wrong, &spec, FitKind::MinMax).is_err());
        assert!(cuda.fit(&right, &spec, FitKind::Weighted(&[1.0; 7])).is_err());
        assert!(cuda.fit(&right, &spec, FitKind::BlockHessian(&wrong)).is_err());
        assert!(cuda.round(&wrong, &grid).is_err());
        assert!(cuda.round(&cuda.zeros(3, 8).unwrap(), &grid).is_err());
        assert!(cuda.scaled_rounding_error(&right, &[1.0; 7], &spec).is_err());
        assert!(cuda.dequantize(&cuda.send_codes(&Array2::zeros((3, 8))).unwrap(), &grid).is_err());
        assert!(cuda.dequantize(&cuda.send_codes(&Array2::zeros((2, 7))).unwrap(), &grid).is_err());
        let none = cuda.fit(&cuda.zeros(0, 8).unwrap(), &spec, FitKind::MinMax).unwrap();
        let codes = cuda.round(&cuda.zeros(0, 8).unwrap(), &none).unwrap();
        assert!(none.scales.is_empty() && cuda.download_codes(&codes).unwrap().is_empty());
    });
}
