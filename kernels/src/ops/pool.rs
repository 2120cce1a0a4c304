//! What blocks of tokens have in common: a sum of each, with weights that every channel has of its own.
//!
//! So an indexer has one key for a block of tokens (GLM-5.3), and attention one for keys and values that lie far back (DeepSeek V4). Where blocks
//! overlap, tokens give something else to the block behind their own, too.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::simd::exp;
use crate::simd_fn;

/// The plain loop, in `f64`; `places` is `[block, columns of x]`.
pub fn reference(
    x: ArrayView2<f32>,
    gates: ArrayView2<f32>,
    places: &[f32],
    (block, overlap): (usize, bool),
    lengths: &[usize],
) -> Array2<f32> {
    let cols = x.ncols();
    let channels = if overlap { cols / 2 } else { cols };
    let mut out = Array2::zeros((x.nrows(), channels));
    for (start, behind) in starts(block, lengths) {
        for channel in 0..channels {
            let own = (0..block).map(|at| (start + at, at, cols - channels + channel));
            let before = (0..block).filter(|_| overlap && behind).map(|at| (start + at - block, at, channel));
            let slots: Vec<_> = before.chain(own).collect();
            let logit = |&(row, at, col): &(usize, usize, usize)| {
                f64::from(gates[[row, col]]) + f64::from(places[at * cols + col])
            };
            let top = slots.iter().map(logit).fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = slots.iter().map(|slot| (logit(slot) - top).exp()).collect();
            let sum: f64 = powers.iter().zip(&slots).map(|(p, &(row, _, col))| p * f64::from(x[[row, col]])).sum();
            out[[start + block - 1, channel]] = (sum / powers.iter().sum::<f64>()) as f32;
        }
    }
    out
}

/// The first tokens of whole blocks, and whether another block of their sequence is before them.
pub fn starts(block: usize, lengths: &[usize]) -> Vec<(usize, bool)> {
    let mut found = Vec::new();
    let mut start = 0;
    for length in lengths {
        found.extend((0..length / block).map(|index| (start + index * block, index > 0)));
        start += length;
    }
    found
}

/// Blocks across threads, channels side by side.
pub fn run(
    x: ArrayView2<f32>,
    gates: ArrayView2<f32>,
    places: &[f32],
    (block, overlap): (usize, bool),
    lengths: &[usize],
) -> Array2<f32> {
    let cols = x.ncols();
    let channels = if overlap { cols / 2 } else { cols };
    let mut out = Array2::zeros((x.nrows(), channels));
    let [x, gates] = [x, gates].map(|m| m.to_slice().expect("a contiguous matrix"));
    let part = |start: usize, first: usize| {
        let rows = start * cols + first..(start + block) * cols;
        Part { x: &x[rows.clone()], gates: &gates[rows], places: &places[first..] }
    };
    let pooled: Vec<(usize, Vec<f32>)> = starts(block, lengths)
        .into_par_iter()
        .with_min_len(16)
        .map(|(start, behind)| {
            let before = (overlap && behind).then(|| part(start - block, 0));
            let parts: Vec<Part<'_>> = before.into_iter().chain([part(start, cols - channels)]).collect();
            (start, of_block(&parts, cols, channels))
        })
        .collect();
    for (start, values) in pooled {
        out.row_mut(start + block - 1).as_slice_mut().expect("a contiguous matrix").copy_from_slice(&values);
    }
    out
}

/// What the tokens of a block give to a sum: columns of rows that lie so far apart as there are columns in all.
struct Part<'a> {
    x: &'a [f32],
    gates: &'a [f32],
    places: &'a [f32],
}

simd_fn! {
    fn of_block(parts: &[Part<'_>], cols: usize, channels: usize) -> Vec<f32> {
        let (mut top, mut sum, mut total) = (vec![f32::NEG_INFINITY; channels], vec![0.0; channels], vec![0.0; channels]);
        for Part { gates, places, .. } in parts {
            for (gates, places) in gates.chunks(cols).zip(places.chunks(cols)) {
                for ((top, gate), place) in top.iter_mut().zip(gates).zip(places) {
                    let logit = gate + place;
                    *top = if logit > *top { logit } else { *top };
                }
            }
        }
        for Part { x, gates, places } in parts {
            for ((gates, places), x) in gates.chunks(cols).zip(places.chunks(cols)).zip(x.chunks(cols)) {
                let (gates, places, x) = (&gates[..channels], &places[..channels], &x[..channels]);
                for channel in 0..channels {
                    let power = exp(gates[channel] + places[channel] - top[channel]);
                    total[channel] += power;
                    sum[channel] += power * x[channel];
                }
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
            channels in 1usize..40, block in 1usize..9, overlap: bool, lengths in prop::collection::vec(0usize..50, 0..4), seed: u64,
        ) {
            let mut noise = Noise(seed);
            let (channels, block) = (if overlap { 2 * channels } else { channels }, (block, overlap));
            let tokens = lengths.iter().sum();
            let (x, gates) = (noise.matrix(tokens, channels), noise.matrix(tokens, channels) * 3.0);
            let places: Vec<f32> = (0..block.0 * channels).map(|_| noise.next()).collect();
            let fast = run(x.view(), gates.view(), &places, block, &lengths);
            let slow = reference(x.view(), gates.view(), &places, block, &lengths);
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
        }
    }

    #[test]
    fn what_is_no_whole_block_has_nothing() {
        let mut noise = Noise(2);
        let (x, gates) = (noise.matrix(9, 3), noise.matrix(9, 3));
        let found = run(x.view(), gates.view(), &[0.5; 12], (4, false), &[6, 3]);
        assert_eq!(found.rows().into_iter().map(|row| row.iter().any(|x| *x != 0.0)).collect::<Vec<_>>(), {
            let mut whole = vec![false; 9];
            whole[3] = true;
            whole
        });
    }
}
