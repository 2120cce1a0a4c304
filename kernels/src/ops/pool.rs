//! What blocks of tokens have in common: a sum of each, with weights that every channel has of its own.
//!
//! So an indexer has one key for a block of tokens (GLM-5.3), and attention one for keys and values that lie far back.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::simd::exp;
use crate::simd_fn;

/// The plain loop, in `f64`; `places` is `[block, channels]`.
pub fn reference(
    x: ArrayView2<f32>,
    gates: ArrayView2<f32>,
    places: &[f32],
    block: usize,
    lengths: &[usize],
) -> Array2<f32> {
    let mut out = Array2::zeros(x.dim());
    for start in starts(block, lengths) {
        for channel in 0..x.ncols() {
            let logit =
                |at: usize| f64::from(gates[[start + at, channel]]) + f64::from(places[at * x.ncols() + channel]);
            let top = (0..block).map(logit).fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = (0..block).map(|at| (logit(at) - top).exp()).collect();
            let sum: f64 = powers.iter().enumerate().map(|(at, p)| p * f64::from(x[[start + at, channel]])).sum();
            out[[start + block - 1, channel]] = (sum / powers.iter().sum::<f64>()) as f32;
        }
    }
    out
}

/// The first tokens of whole blocks.
pub fn starts(block: usize, lengths: &[usize]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut start = 0;
    for length in lengths {
        found.extend((0..length / block).map(|index| start + index * block));
        start += length;
    }
    found
}

/// Blocks across threads, channels side by side.
pub fn run(x: ArrayView2<f32>, gates: ArrayView2<f32>, places: &[f32], block: usize, lengths: &[usize]) -> Array2<f32> {
    let channels = x.ncols();
    let mut out = Array2::zeros(x.dim());
    let [x, gates] = [x, gates].map(|m| m.to_slice().expect("a contiguous matrix"));
    let pooled: Vec<(usize, Vec<f32>)> = starts(block, lengths)
        .into_par_iter()
        .with_min_len(16)
        .map(|start| {
            let rows = start * channels..(start + block) * channels;
            (start, of_block(&x[rows.clone()], &gates[rows], places, channels))
        })
        .collect();
    for (start, values) in pooled {
        out.row_mut(start + block - 1).as_slice_mut().expect("a contiguous matrix").copy_from_slice(&values);
    }
    out
}

simd_fn! {
    fn of_block(x: &[f32], gates: &[f32], places: &[f32], channels: usize) -> Vec<f32> {
        let (mut top, mut sum, mut total) = (vec![f32::NEG_INFINITY; channels], vec![0.0; channels], vec![0.0; channels]);
        let rows = || gates.chunks_exact(channels).zip(places.chunks_exact(channels));
        for (gates, places) in rows() {
            for ((top, gate), place) in top.iter_mut().zip(gates).zip(places) {
                let logit = gate + place;
                *top = if logit > *top { logit } else { *top };
            }
        }
        for ((gates, places), x) in rows().zip(x.chunks_exact(channels)) {
            for channel in 0..channels {
                let power = exp(gates[channel] + places[channel] - top[channel]);
                total[channel] += power;
                sum[channel] += power * x[channel];
            }
        }
        sum.iter_mut().zip(&total).for_each(|(sum, total)| *sum /= total);
        sum
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
            channels in 1usize..40, block in 1usize..9, lengths in prop::collection::vec(0usize..50, 0..4), seed: u64,
        ) {
            let mut noise = Noise(seed);
            let tokens = lengths.iter().sum();
            let (x, gates) = (noise.matrix(tokens, channels), noise.matrix(tokens, channels) * 3.0);
            let places: Vec<f32> = (0..block * channels).map(|_| noise.next()).collect();
            let fast = run(x.view(), gates.view(), &places, block, &lengths);
            let slow = reference(x.view(), gates.view(), &places, block, &lengths);
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
        }
    }

    #[test]
    fn what_is_no_whole_block_has_nothing() {
        let mut noise = Noise(2);
        let (x, gates) = (noise.matrix(9, 3), noise.matrix(9, 3));
        let found = run(x.view(), gates.view(), &[0.5; 12], 4, &[6, 3]);
        assert_eq!(found.rows().into_iter().map(|row| row.iter().any(|x| *x != 0.0)).collect::<Vec<_>>(), {
            let mut whole = vec![false; 9];
            whole[3] = true;
            whole
        });
    }
}
