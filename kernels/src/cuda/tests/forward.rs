//! Pointwise operations, norms, rotations, products.

use ndarray::Array2;

use super::on_all;
use crate::backend::{Activation, Forward, Memory, NormKind, RopeLayout};
use crate::ops::testing::{Noise, close};
use crate::ops::{activation, norm, rope};

fn flat(m: &Array2<f32>) -> &[f32] {
    m.as_slice().expect("contiguous")
}

#[test]
fn norms_agree_with_the_plain_loop() {
    let mut noise = Noise(1);
    for (tokens, cols) in [(1, 1), (3, 7), (5, 31), (2, 576), (0, 8), (4, 1031)] {
        let x = noise.matrix(tokens, cols) + 0.5;
        let [weight, bias]: [Vec<f32>; 2] = std::array::from_fn(|_| (0..cols).map(|_| noise.next()).collect());
        for (kind, bias) in [(NormKind::Rms, None), (NormKind::Layer, Some(&bias[..])), (NormKind::Layer, None)] {
            let found = on_all(|cuda| {
                let x = cuda.upload(x.clone()).unwrap();
                cuda.download(&cuda.norm(&x, kind, &weight, bias, 1e-2).unwrap()).unwrap()
            });
            let Some(found) = found else { return };
            close(flat(&found), flat(&norm::reference(x.view(), cols, kind, &weight, bias, 1e-2)), 3e-6);
        }
    }
    let x = noise.matrix(6, 40);
    for length in [8, 40] {
        let weight: Vec<f32> = (0..length).map(|_| noise.next()).collect();
        let found = on_all(|cuda| {
            let mut x = cuda.upload(x.clone()).unwrap();
            cuda.norm_heads(&mut x, 8, NormKind::Layer, &weight, Some(&weight), 1e-3).unwrap();
            cuda.download(&x).unwrap()
        });
        let expected = norm::reference(x.view(), 8, NormKind::Layer, &weight, Some(&weight), 1e-3);
        close(flat(&found.unwrap()), flat(&expected), 3e-6);
    }
}

/// What only products read is written in bfloat16 at once, and is what it would have become.
#[test]
fn norms_are_written_as_products_read_them() {
    let mut noise = Noise(21);
    for (tokens, cols) in [(3, 7), (5, 64), (1, 1), (0, 4)] {
        let x = noise.matrix(tokens, cols) + 0.5;
        let [weight, bias]: [Vec<f32>; 2] = std::array::from_fn(|_| (0..cols).map(|_| noise.next()).collect());
        for (kind, bias) in [(NormKind::Rms, None), (NormKind::Layer, Some(&bias[..])), (NormKind::Layer, None)] {
            on_all(|cuda| {
                for cuda in [cuda.clone(), cuda.relaxed()] {
                    let uploaded = cuda.upload(x.clone()).unwrap();
                    let normed = cuda.norm(&uploaded, kind, &weight, bias, 1e-2).unwrap();
                    let inputs =
                        [cuda.norm_input(&uploaded, kind, &weight, bias, 1e-2).unwrap(), cuda.input(normed).unwrap()];
                    let unit = cuda.weight(cuda.upload(Array2::eye(cols)).unwrap()).unwrap();
                    let [found, expected] =
                        inputs.map(|x| cuda.download(&cuda.linear(&x, &unit, None).unwrap()).unwrap());
                    assert_eq!(found, expected, "{tokens} x {cols}");
                }
            });
        }
    }
}

#[test]
fn rotations_are_those_of_the_plain_loop() {
    let mut noise = Noise(2);
    for (first, half, interleaved) in [(0, 4, false), (2, 3, true), (1, 1, false), (0, 0, false)] {
        let layout = RopeLayout { head_dim: 11, first, interleaved };
        let angle = noise.matrix(9, half);
        let (cos, sin) = (angle.mapv(f32::cos), angle.mapv(f32::sin));
        let lengths = [9, 1, 4];
        let x = noise.matrix(14, 33);
        let found = on_all(|cuda| {
            let mut x = cuda.upload(x.clone()).unwrap();
            cuda.rope(&mut x, &cos, &sin, &layout, &lengths).unwrap();
            cuda.download(&x).unwrap()
        });
        let mut expected = x.clone();
        rope::reference(&mut expected, &cos, &sin, &layout, &lengths);
        assert_eq!(found.unwrap_or_else(|| expected.clone()), expected);
    }
}

#[test]
fn gates_agree_with_the_plain_forms_and_round_as_asked() {
    let mut noise = Noise(3);
    let (x, gate, up) = (noise.matrix(5, 19), noise.matrix(7, 19), noise.matrix(7, 19));
    let bias: Vec<f32> = (0..7).map(|_| noise.next()).collect();
    let kinds = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Relu2,
        Activation::SwigluOai { alpha: 1.702, limit: 0.7, shift: 1.0 },
        Activation::SwigluOai { alpha: 1.0, limit: 0.5, shift: 0.0 },
        Activation::SiluWithin { limit: 0.4 },
        Activation::Identity,
        Activation::Xielu { positive: 0.8, negative: 1.1, beta: 0.5, eps: -1e-6 },
    ];
    for kind in kinds {
        for rounds in [false, true] {
            let narrow = |m: &Array2<f32>| match rounds {
                true => m.mapv(|x| half::bf16::from_f32(x).to_f32()),
                false => m.clone(),
            };
            let found = on_all(|cuda| {
                let cuda = if rounds { cuda.relaxed() } else { cuda.clone() };
                let x = cuda.input(cuda.upload(x.clone()).unwrap()).unwrap();
                let [gate, up] = [&gate, &up].map(|w| cuda.weight(cuda.upload(w.clone()).unwrap()).unwrap());
                let both = cuda.gated(&x, [&gate, &up], [Some(&bias), None], kind).unwrap();
                // Products with the identity show what an operand holds.
                let one = cuda.weight(cuda.upload(Array2::eye(7)).unwrap()).unwrap();
                cuda.download(&cuda.linear(&both, &one, None).unwrap()).unwrap()
            });
            let Some(found) = found else { return };
            let (x, gate, up) = (narrow(&x), narrow(&gate), narrow(&up));
            let expected = Array2::from_shape_fn((5, 7), |(i, j)| {
                let dot = |w: &Array2<f32>| x.row(i).dot(&w.row(j));
                activation::gate_reference(kind, dot(&gate) + bias[j], dot(&up))
            });
            close(flat(&found), flat(&expected), if rounds { 4e-3 } else { 3e-6 });
            if rounds {
                assert!(found.iter().all(|x| x.to_bits() & 0xffff == 0));
            }
        }
    }
}

#[test]
fn rows_columns_and_whole_matrices() {
    let mut noise = Noise(4);
    let (a, b) = (noise.matrix(6, 5), noise.matrix(6, 5));
    let shared = noise.matrix(6, 3);
    let w = noise.matrix(4, 5);
    let bias = [0.5, -1.0, 2.0, 0.0];
    on_all(|cuda| {
        let up = |m: &Array2<f32>| cuda.upload(m.clone()).unwrap();
        let down = |m: &super::super::Matrix| cuda.download(m).unwrap();
        let same = |found: Array2<f32>, expected: Array2<f32>| close(flat(&found), flat(&expected), 1e-6);
        assert_eq!(down(&cuda.select_rows(&up(&a), &[5, 0, 5]).unwrap()), a.select(ndarray::Axis(0), &[5, 0, 5]));
        assert!(cuda.select_rows(&up(&a), &[6]).is_err());
        let mut m = up(&a);
        cuda.scale(&mut m, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[]).unwrap();
        cuda.scale(&mut m, &[], &[0.5, 1.0, 2.0, 4.0, 8.0]).unwrap();
        let expected = Array2::from_shape_fn((6, 5), |(i, j)| a[[i, j]] * (i as f32 + 1.0) * 0.5 * 2f32.powi(j as i32));
        assert_eq!(down(&m), expected);
        let mut y = up(&a);
        cuda.add_rows(&up(&b), &[5, 4, 3, 2, 1, 0], &[2.0; 6], &mut y).unwrap();
        let mut expected = a.clone();
        crate::ops::add::rows_reference(b.view(), &[5, 4, 3, 2, 1, 0], &[2.0; 6], &mut expected);
        assert_eq!(down(&y), expected);
        assert!(cuda.add_rows(&up(&b), &[5, 5, 3, 2, 1, 0], &[2.0; 6], &mut y).is_err());
        let mut y = up(&a);
        cuda.add_scaled(&up(&b), -0.5, &mut y).unwrap();
        assert_eq!(down(&y), &a + &(&b * -0.5));
        assert_eq!(down(&cuda.difference(&up(&a), &up(&b)).unwrap()), &a - &b);
        let mut y = up(&a);
        cuda.clamp(&mut y, 0.25).unwrap();
        assert_eq!(down(&y), a.mapv(|x| x.clamp(-0.25, 0.25)));
        let mut y = up(&(&a * 9.0));
        cuda.softcap(&mut y, 3.0).unwrap();
        same(down(&y), a.mapv(|x| 3.0 * (x * 3.0).tanh()));
        let joined = down(&cuda.join_heads(&up(&a), &up(&shared), 5).unwrap());
        let plain = |(i, j): (usize, usize)| if j % 4 == 0 { a[[i, j / 4]] } else { shared[[i, j % 4 - 1]] };
        assert_eq!(joined, Array2::from_shape_fn((6, 20), plain));
        let spread = down(&cuda.spread_heads(&up(&a), 3).unwrap());
        assert_eq!(spread, crate::ops::heads::spread(a.view(), 3));
        assert!(cuda.is_finite(&up(&a)).unwrap());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut m = a.clone();
            m[[5, 4]] = bad;
            assert!(!cuda.is_finite(&up(&m)).unwrap());
        }
        let (x, weight) = (cuda.input(up(&a)).unwrap(), cuda.weight(up(&w)).unwrap());
        let expected = a.dot(&w.t()) + ndarray::arr1(&bias);
        let mut y = cuda.linear(&x, &weight, Some(&bias)).unwrap();
        same(down(&y), expected.clone());
        cuda.add_linear(&x, &weight, Some(&bias), &mut y).unwrap();
        same(down(&y), expected * 2.0);
        assert!(cuda.linear(&x, &x, Some(&bias)).is_err());
    });
}

#[test]
fn what_does_not_fit_is_put_aside_and_comes_back() {
    let limit = 100_000;
    if super::Simulated::compiler().is_none() {
        return super::skip("no C++ compiler");
    }
    let device = std::sync::Arc::new(super::Simulated::with_memory(0, limit));
    let cuda = super::Cuda::new(device, Some(limit as u64)).unwrap();
    let mut noise = Noise(5);
    let hosts: Vec<Array2<f32>> = (0..20).map(|_| noise.matrix(32, 64)).collect();
    let mut all: Vec<_> = hosts.iter().map(|h| cuda.upload(h.clone()).unwrap()).collect();
    assert!(cuda.usage().peak <= limit as u64 && cuda.usage().moved > 0, "{:?}", cuda.usage());
    for m in &mut all {
        cuda.scale(m, &[2.0; 32], &[]).unwrap();
    }
    for (m, host) in all.iter().zip(&hosts) {
        assert_eq!(cuda.download(m).unwrap(), host * 2.0);
    }
    let too_large = cuda.zeros(1000, 1000).unwrap_err().to_string();
    assert!(too_large.contains("--gpu-memory"), "{too_large}");
}

#[test]
fn activations_are_rounded_as_on_the_cpu() {
    use crate::backend::ActivationRounding::{Bf16, F16, Fp8Token, Int8Token, Q8_0, Q8K};
    let mut noise = Noise(6);
    let mut x = noise.matrix(3, 512);
    x.row_mut(1).fill(0.0);
    x[[2, 5]] = 1e-30;
    for kind in [F16, Bf16, Q8_0, Q8K, Int8Token, Fp8Token] {
        for rounds in [false, true] {
            let found = on_all(|cuda| {
                let cuda = if rounds { cuda.relaxed() } else { cuda.clone() };
                let x = cuda.input(cuda.upload(x.clone()).unwrap()).unwrap();
                let rounded = cuda.round_activations(&x, kind).unwrap();
                let one = cuda.weight(cuda.upload(Array2::eye(512)).unwrap()).unwrap();
                cuda.download(&cuda.linear(&rounded, &one, None).unwrap()).unwrap()
            });
            let Some(found) = found else { return };
            let narrow = |m: &Array2<f32>| match rounds {
                true => m.mapv(|x| half::bf16::from_f32(x).to_f32()),
                false => m.clone(),
            };
            let mut expected = narrow(&x);
            crate::ops::round_activations::run(&mut expected, kind);
            assert_eq!(found, narrow(&expected), "{kind:?}");
        }
    }
    on_all(|cuda| {
        let x = cuda.input(cuda.zeros(2, 48).unwrap()).unwrap();
        assert!(cuda.round_activations(&x, Q8_0).is_err() && cuda.round_activations(&x, F16).is_ok());
    });
}
