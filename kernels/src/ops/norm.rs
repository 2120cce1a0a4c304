//! Normalisation by the root mean square (Zhang and Sennrich 2019, arXiv:1910.07467) or by mean and variance (Ba et al.
//! 2016, arXiv:1607.06450), or by the length of a vector; of whole rows or of every head of a row.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::backend::NormKind;
use crate::simd::sum;
use crate::simd_fn;

/// Rows of one task.
const ROWS: usize = 64;

/// The plain loop over slices of `width` values, sums in `f64`; `weight` is repeated along a row, as `bias` is.
pub fn reference(
    x: ArrayView2<f32>,
    width: usize,
    kind: NormKind,
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
) -> Array2<f32> {
    let mut y = x.to_owned();
    for mut row in y.rows_mut() {
        for start in (0..row.len()).step_by(width) {
            let values: Vec<f64> = (start..start + width).map(|col| f64::from(row[col])).collect();
            let mean = match kind {
                NormKind::Rms | NormKind::Length => 0.0,
                NormKind::Layer => values.iter().sum::<f64>() / width as f64,
            };
            let square: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
            let parts = if kind == NormKind::Length { 1.0 } else { width as f64 };
            let scale = 1.0 / (square / parts + f64::from(eps)).sqrt();
            for (col, value) in (start..).zip(values) {
                let bias = bias.map_or(0.0, |bias| bias[col % bias.len()]);
                row[col] = ((value - mean) * scale) as f32 * weight[col % weight.len()] + bias;
            }
        }
    }
    y
}

/// Each row by itself, rows across threads; `weight` and `bias` are as wide as it.
pub fn run(x: ArrayView2<f32>, kind: NormKind, weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Array2<f32> {
    let part = (ROWS * x.ncols()).max(1);
    let mut y = vec![0.0f32; x.len()];
    let input = x.to_slice().expect("a contiguous matrix");
    y.par_chunks_mut(part).zip(input.par_chunks(part)).for_each(|(y, x)| rows(x, y, kind, weight, bias, eps));
    Array2::from_shape_vec(x.dim(), y).expect("same shape")
}

/// Every `width` values of each row in place, rows across threads; `weight` is for them all or as wide as a row.
pub fn heads(x: &mut Array2<f32>, width: usize, kind: NormKind, weight: &[f32], bias: Option<&[f32]>, eps: f32) {
    let part = (ROWS * x.ncols()).max(1);
    let data = x.as_slice_mut().expect("a contiguous matrix");
    data.par_chunks_mut(part).for_each(|x| slices(x, width, kind, weight, bias, eps));
}

simd_fn! {
    fn rows(x: &[f32], y: &mut [f32], kind: NormKind, weight: &[f32], bias: Option<&[f32]>, eps: f32) {
        let cols = weight.len();
        for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
            let (mean, scale) = moments(x, kind, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = (x - mean) * scale * w;
            }
            if let Some(bias) = bias {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
    }
}

simd_fn! {
    fn slices(x: &mut [f32], width: usize, kind: NormKind, weight: &[f32], bias: Option<&[f32]>, eps: f32) {
        for (index, x) in x.chunks_exact_mut(width).enumerate() {
            let (mean, scale) = moments(x, kind, eps);
            let weight = &weight[index * width % weight.len()..][..width];
            for (x, w) in x.iter_mut().zip(weight) {
                *x = (*x - mean) * scale * w;
            }
            if let Some(bias) = bias {
                let bias = &bias[index * width % bias.len()..][..width];
                x.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            }
        }
    }
}

/// What is taken off, and the factor on what remains.
#[inline(always)]
fn moments(x: &[f32], kind: NormKind, eps: f32) -> (f32, f32) {
    let count = x.len() as f32;
    let mean = match kind {
        NormKind::Rms | NormKind::Length => 0.0,
        NormKind::Layer => sum(x, |v| v) / count,
    };
    let parts = if kind == NormKind::Length { 1.0 } else { count };
    (mean, 1.0 / (sum(x, |v| (v - mean) * (v - mean)) / parts + eps).sqrt())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Noise, close};
    use super::*;

    proptest! {
        #[test]
        fn agrees_with_the_plain_loop(
            tokens in 0usize..140, cols in 1usize..600, layer: bool, biased: bool, offset in -3.0f32..3.0, seed: u64,
        ) {
            let mut noise = Noise(seed);
            let kind = if layer { NormKind::Layer } else { NormKind::Rms };
            let x = noise.matrix(tokens, cols) + offset;
            let [weight, bias]: [Vec<f32>; 2] = std::array::from_fn(|_| (0..cols).map(|_| noise.next()).collect());
            let bias = biased.then_some(&bias[..]);
            let fast = run(x.view(), kind, &weight, bias, 1e-2);
            let slow = reference(x.view(), cols, kind, &weight, bias, 1e-2);
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 3e-6);
        }

        #[test]
        fn heads_agree_with_the_plain_loop(
            tokens in 0usize..140, width in 1usize..40, count in 1usize..6, kind in 0usize..3, shared: bool, biased: bool,
            seed: u64,
        ) {
            let mut noise = Noise(seed);
            let kind = [NormKind::Rms, NormKind::Layer, NormKind::Length][kind];
            let x = noise.matrix(tokens, count * width);
            let length = if shared { width } else { count * width };
            let [weight, bias]: [Vec<f32>; 2] = std::array::from_fn(|_| (0..length).map(|_| noise.next()).collect());
            let bias = biased.then_some(&bias[..]);
            let mut fast = x.clone();
            heads(&mut fast, width, kind, &weight, bias, 1e-2);
            let slow = reference(x.view(), width, kind, &weight, bias, 1e-2);
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 3e-6);
        }
    }
}
