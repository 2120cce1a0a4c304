//! Causal convolutions of a few taps, each channel by itself, within sequences; optionally with a bias and an activation.
//!
//! So layers with a state mix neighbouring tokens before it (Mamba 2023, arXiv:2312.00752).

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::activation;
use crate::backend::Activation;
use crate::simd_fn;

/// Tokens of one task.
const ROWS: usize = 32;

/// The plain loop, in `f64`; `weight` is `[channels, taps]`, the last of them for the token itself.
pub fn reference(
    x: ArrayView2<f32>,
    weight: &[f32],
    bias: Option<&[f32]>,
    activation: Option<Activation>,
    lengths: &[usize],
) -> Array2<f32> {
    let taps = weight.len() / x.ncols().max(1);
    let positions = positions(lengths);
    Array2::from_shape_fn(x.dim(), |(token, channel)| {
        let seen = taps.min(positions[token] + 1);
        let products = (0..seen)
            .map(|back| f64::from(weight[channel * taps + taps - 1 - back]) * f64::from(x[[token - back, channel]]));
        let sum = (products.sum::<f64>() + bias.map_or(0.0, |bias| f64::from(bias[channel]))) as f32;
        activation.map_or(sum, |activation| activation::reference(activation, sum))
    })
}

/// The position of each token in its sequence.
pub fn positions(lengths: &[usize]) -> Vec<usize> {
    lengths.iter().flat_map(|length| 0..*length).collect()
}

/// Tokens across threads, channels side by side.
pub fn run(
    x: ArrayView2<f32>,
    weight: &[f32],
    bias: Option<&[f32]>,
    activation: Option<Activation>,
    lengths: &[usize],
) -> Array2<f32> {
    let channels = x.ncols();
    let mut out = vec![0.0f32; x.len()];
    if let Some(taps) = weight.len().checked_div(channels) {
        let by_tap: Vec<Vec<f32>> =
            (0..taps).map(|tap| weight.iter().skip(tap).step_by(taps).copied().collect()).collect();
        let positions = positions(lengths);
        let x = x.to_slice().expect("a contiguous matrix");
        out.par_chunks_mut(ROWS * channels).enumerate().for_each(|(part, out)| {
            for (row, y) in out.chunks_exact_mut(channels).enumerate() {
                let token = part * ROWS + row;
                if let Some(bias) = bias {
                    y.copy_from_slice(bias);
                }
                for back in (0..taps.min(positions[token] + 1)).rev() {
                    add_product(y, &by_tap[taps - 1 - back], &x[(token - back) * channels..][..channels]);
                }
                if let Some(activation) = activation {
                    activation::run_chunk(activation, y);
                }
            }
        });
    }
    Array2::from_shape_vec(x.dim(), out).expect("same shape")
}

simd_fn! {
    /// `y ← y + a · b`.
    fn add_product(y: &mut [f32], a: &[f32], b: &[f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y += a * b;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Noise, close};
    use super::*;

    proptest! {
        #[test]
        fn agrees_with_the_plain_loop(
            channels in 0usize..40, taps in 1usize..6, biased: bool, activated: bool,
            lengths in prop::collection::vec(0usize..50, 0..4), seed: u64,
        ) {
            let mut noise = Noise(seed);
            let x = noise.matrix(lengths.iter().sum(), channels);
            let weight: Vec<f32> = (0..channels * taps).map(|_| noise.next()).collect();
            let bias: Vec<f32> = (0..channels).map(|_| noise.next()).collect();
            let bias = biased.then_some(&bias[..]);
            let activation = activated.then_some(Activation::Silu);
            let fast = run(x.view(), &weight, bias, activation, &lengths);
            let slow = reference(x.view(), &weight, bias, activation, &lengths);
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
        }
    }

    #[test]
    fn every_sequence_begins_anew() {
        let mut noise = Noise(9);
        let (x, weight) = (noise.matrix(11, 3), [0.5f32, -1.0, 2.0, 0.25, 1.0, 1.5, -2.0, 0.75, 1.0]);
        let whole = run(x.view(), &weight, None, None, &[7, 4]);
        let second = run(x.slice(ndarray::s![7.., ..]), &weight, None, None, &[4]);
        assert_eq!(whole.slice(ndarray::s![7.., ..]), second);
        assert_ne!(run(x.view(), &weight, None, None, &[11]).slice(ndarray::s![7.., ..]), second);
    }
}
