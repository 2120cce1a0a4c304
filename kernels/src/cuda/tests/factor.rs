//! Second moments and their factorization.

use ndarray::Array2;

use super::super::{Card, Real};
use super::{devices, on_all, on_these, simulated};
use crate::backend::{Memory, Quantize};
use crate::ops::gram;
use crate::ops::testing::Noise;
use crate::{Cpu, Error};

/// `None` where there is no device to ask.
fn grams(parts: &[Array2<f32>], cols: usize) -> Option<Array2<f32>> {
    on_all(|cuda| {
        let mut gram = cuda.zeros(cols, cols).unwrap();
        for x in parts {
            let x = cuda.input(cuda.upload(x.clone()).unwrap()).unwrap();
            cuda.add_gram(&x, &mut gram).unwrap();
        }
        let mut gram = cuda.download(&gram).unwrap();
        // What lies above the diagonal is scratch.
        (0..cols).for_each(|i| (i + 1..cols).for_each(|j| gram[[i, j]] = 0.0));
        gram
    })
}

#[test]
fn lower_triangles_agree_with_the_plain_loop() {
    let mut noise = Noise(6);
    for (tokens, cols) in [(1, 1), (5, 3), (100, 65), (257, 130), (64, 300), (0, 4), (9000, 2)] {
        let (a, b) = (noise.matrix(tokens, cols), noise.matrix(3, cols));
        let expected = gram::reference(a.view()) + gram::reference(b.view());
        let Some(found) = grams(&[a, b], cols) else { return };
        for i in 0..cols {
            for j in 0..=i {
                let (f, e) = (found[[i, j]], expected[[i, j]]);
                // Roundings of so many sums add up like steps of a random walk, in whatever order a library adds.
                let size = (expected[[i, i]] * expected[[j, j]]).sqrt();
                let near = 2.0 * f32::EPSILON * (tokens as f32 + 3.0).sqrt() * size;
                assert!((f - e).abs() <= near, "[{i}, {j}] of {cols}: {f}, not {e}");
            }
        }
    }
}

/// A card that runs many tokens at a time adds them up as one that runs few.
#[test]
fn sums_hang_on_no_number_of_tokens_at_a_time() {
    let mut noise = Noise(16);
    let x = noise.matrix(5000, 40);
    let parts = [0..2048, 2048..4096, 4096..5000].map(|rows| x.slice(ndarray::s![rows, ..]).to_owned());
    let (Some(whole), Some(parts)) = (grams(&[x], 40), grams(&parts, 40)) else { return };
    assert!(whole.iter().zip(&parts).all(|(a, b)| a.to_bits() == b.to_bits()));
}

#[test]
fn rounded_operands_count_as_what_they_have_become() {
    let mut noise = Noise(7);
    let x = noise.matrix(77, 150);
    let rounded = x.mapv(|x| half::bf16::from_f32(x).to_f32());
    let expected = gram::reference(rounded.view());
    let found = on_all(|cuda| {
        let cuda = cuda.relaxed();
        let x = cuda.input(cuda.upload(x.clone()).unwrap()).unwrap();
        let mut gram = cuda.zeros(150, 150).unwrap();
        cuda.add_gram(&x, &mut gram).unwrap();
        let [mut magnitude, mut energy] = [vec![0.0; 150], vec![0.0; 150]];
        cuda.add_moments(&x, &mut magnitude, &mut energy).unwrap();
        (cuda.download(&gram).unwrap(), magnitude, energy)
    });
    let Some((gram, magnitude, energy)) = found else { return };
    for i in 0..150 {
        (0..=i).for_each(|j| assert!((gram[[i, j]] - expected[[i, j]]).abs() <= 1e-4));
        let size: f64 = rounded.column(i).iter().map(|x| f64::from(x.abs())).sum();
        assert!((magnitude[i] - size).abs() <= 1e-4 && (energy[i] - f64::from(expected[[i, i]])).abs() <= 1e-4);
    }
}

#[test]
fn moments_are_those_of_the_cpu() {
    let mut noise = Noise(14);
    for (tokens, cols) in [(1100, 3), (1, 1), (0, 5), (512, 131), (513, 300)] {
        let x = noise.matrix(tokens, cols);
        let of = |start: f64| [vec![start; cols], vec![start + 1.0; cols]];
        let [mut magnitude, mut energy] = of(1.0);
        gram::moments(x.view(), &mut magnitude, &mut energy);
        let found = on_all(|cuda| {
            let [mut magnitude, mut energy] = of(1.0);
            let x = cuda.input(cuda.upload(x.clone()).unwrap()).unwrap();
            cuda.add_moments(&x, &mut magnitude, &mut energy).unwrap();
            [magnitude, energy]
        });
        let Some(found) = found else { return };
        for (found, expected) in found.iter().flatten().zip(magnitude.iter().chain(&energy)) {
            assert!((found - expected).abs() <= 1e-12 * expected, "{found}, not {expected}");
        }
    }
}

#[test]
fn reductions_to_one_number_agree_with_the_sums() {
    let mut noise = Noise(7);
    for (rows, n) in [(4, 9), (1, 1), (3, 128), (515, 300), (0, 3), (700, 1)] {
        let (x, e) = (noise.matrix(40, n), noise.matrix(rows, n));
        let mut hessian = gram::reference(x.view());
        // Above the diagonal is scratch.
        (0..n).for_each(|i| (i + 1..n).for_each(|j| hessian[[i, j]] = f32::NAN));
        let weights: Vec<f64> = (0..n).map(|i| 0.5 + i as f64).collect();
        let found = on_all(|cuda| {
            let [e, hessian] = [&e, &hessian].map(|m| cuda.upload(m.clone()).unwrap());
            let diagonal = cuda.diagonal(&hessian).unwrap();
            // In calibration products are three of bfloat16.
            let quadratic = [cuda.clone(), cuda.relaxed()].map(|cuda| cuda.quadratic(&e, &hessian).unwrap());
            (quadratic, cuda.weighted_square(&e, &weights).unwrap(), diagonal)
        });
        let Some(([quadratic, split], weighted, diagonal)) = found else { return };
        let direct: f64 = x.dot(&e.t()).iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!((quadratic - direct).abs() <= 1e-5 * direct, "{rows} x {n}: {quadratic}, not {direct}");
        assert!((split - direct).abs() <= 2e-5 * direct, "{rows} x {n}: {split} in halves, not {direct}");
        let apart = if rows * n > 8 { split != quadratic } else { true };
        assert!(apart || Card::open(0).is_ok(), "{rows} x {n}: it was not done in halves");
        let expected = gram::weighted_square(e.view(), &weights);
        assert!((weighted - expected).abs() <= 1e-12 * expected, "{rows} x {n}: {weighted}, not {expected}");
        assert_eq!(diagonal, hessian.diag().to_vec());
    }
    // More rows than their image is held of at a time.
    let (x, e) = (noise.matrix(5, 2), noise.matrix(16_500, 2));
    let hessian = gram::reference(x.view());
    let found = on_all(|cuda| {
        let [e, hessian] = [&e, &hessian].map(|m| cuda.upload(m.clone()).unwrap());
        cuda.quadratic(&e, &hessian).unwrap()
    });
    let expected = gram::quadratic(e.view(), hessian.view());
    assert!(found.is_none_or(|found| (found - expected).abs() <= 1e-5 * expected));
}

#[test]
fn factors_are_those_of_the_cpu() {
    let mut noise = Noise(8);
    let cpu = Cpu::exact();
    for n in [1, 2, 7, 63, 64, 65, 130, 300] {
        let mut x = noise.matrix(2 * n + 3, n);
        if n > 2 {
            x.column_mut(2).fill(0.0);
        }
        let mut hessian = gram::reference(x.view());
        (0..n).for_each(|i| (i + 1..n).for_each(|j| hessian[[i, j]] = f32::NAN));
        let order: Vec<u32> = match n {
            7 | 2 => (0..n as u32).rev().collect(),
            _ => (0..n as u32).map(|i| (i * 11 + 3) % n as u32).collect(),
        };
        let expected = cpu.factor(&hessian, order.clone(), 0.1).unwrap();
        // In double precision, and in single where a card has few units for doubles.
        for devices in [devices(), simulated(89)] {
            let single = devices.first().is_some_and(|cuda| cuda.factor_real() == Real::F32);
            let (of_pivots, of_units) = if single { (1e-4, 1e-4) } else { (1e-10, 1e-6) };
            let found = on_these(devices, |cuda| {
                let hessian = cuda.upload(hessian.clone()).unwrap();
                let factor = cuda.factor(&hessian, order.clone(), 0.1).unwrap();
                assert_eq!((factor.dead, factor.damp, &factor.order), (expected.dead, 0.1, &order));
                (cuda.download(&factor.unit).unwrap(), factor.pivots)
            });
            let Some((unit, pivots)) = found else { return };
            for p in 0..n {
                let (found, expected_pivot) = (pivots[p], expected.pivots[p]);
                assert!((found - expected_pivot).abs() <= of_pivots * expected_pivot, "pivot {p} of {n}: {found}");
                for i in 0..n {
                    let wanted = if i > p { expected.unit[[p, i]] } else { 0.0 };
                    let near = (unit[[p, i]] - wanted).abs() <= of_units;
                    assert!(near, "[{p}, {i}] of {n}: {}, not {wanted}", unit[[p, i]]);
                }
            }
            let same = pivots.iter().zip(&expected.pivots).all(|(a, b)| (a - b).abs() <= 1e-10 * b);
            assert!(!single || n < 7 || !same, "{n}: it was not done in single precision");
        }
    }
}

#[test]
fn what_is_not_positive_definite_is_refused() {
    let mut noise = Noise(9);
    let good = gram::reference(noise.matrix(300, 150).view());
    let with = |at: &[([usize; 2], f32)]| {
        let mut hessian = good.clone();
        at.iter().for_each(|(at, value)| hessian[*at] = *value);
        hessian
    };
    let order: Vec<u32> = (0..150).map(|i| (i * 7 + 3) % 150).collect();
    let cpu = Cpu::exact();
    for (name, hessian) in [
        ("a large entry", with(&[([100, 20], 1e4)])),
        ("a NaN", with(&[([100, 20], f32::NAN)])),
        ("a NaN on the diagonal", with(&[([70, 70], f32::NAN)])),
        ("an infinity on the diagonal", with(&[([70, 70], f32::INFINITY), ([100, 20], 1e4)])),
    ] {
        let expected = cpu.factor(&hessian, order.clone(), 0.01).unwrap_err();
        for devices in [devices(), simulated(89)] {
            on_these(devices, |cuda| {
                let hessian = cuda.upload(hessian.clone()).unwrap();
                let found = cuda.factor(&hessian, order.clone(), 0.01).unwrap_err();
                assert_eq!(found.to_string(), expected.to_string(), "{name}");
            });
        }
    }
    on_all(|cuda| {
        let hessian = cuda.zeros(3, 3).unwrap();
        assert!(matches!(cuda.factor(&hessian, vec![0, 1], 0.1), Err(Error::Shape { op: "factor", .. })));
        assert!(matches!(cuda.factor(&hessian, vec![0, 1, 3], 0.1), Err(Error::Shape { op: "factor", .. })));
        let wide = cuda.zeros(2, 3).unwrap();
        assert!(matches!(cuda.quadratic(&wide, &wide), Err(Error::Shape { op: "quadratic", .. })));
        assert!(matches!(cuda.weighted_square(&wide, &[1.0]), Err(Error::Shape { op: "weighted_square", .. })));
    });
}
