//! Causal softmax attention with grouped heads and an optional sliding window.
//!
//! A task takes a few queries of one head of one sequence: it builds their scores only, never the whole
//! `heads × tokens × tokens` tensor.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::{Shared, gemm};
use crate::backend::AttentionShape;
use crate::simd::exp;
use crate::simd_fn;

/// Queries of one task.
const QUERIES: usize = 64;

/// The plain loop, in `f64`.
pub fn reference(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    shape: &AttentionShape,
    lengths: &[usize],
) -> Array2<f32> {
    let AttentionShape { heads, kv_heads, head_dim, scale, window } = *shape;
    let mut out = Array2::zeros(q.raw_dim());
    let mut start = 0;
    for &length in lengths {
        for head in 0..heads {
            let (qh, kh) = (head * head_dim, head / (heads / kv_heads) * head_dim);
            for i in 0..length {
                let first = window.map_or(0, |w| (i + 1).saturating_sub(w));
                let scores: Vec<f64> = (first..=i)
                    .map(|j| {
                        (0..head_dim)
                            .map(|d| f64::from(q[[start + i, qh + d]]) * f64::from(k[[start + j, kh + d]]))
                            .sum::<f64>()
                            * f64::from(scale)
                    })
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let sum: f64 =
                        weights.iter().zip(first..).map(|(w, j)| w * f64::from(v[[start + j, kh + d]])).sum();
                    out[[start + i, qh + d]] = (sum / total) as f32;
                }
            }
        }
        start += length;
    }
    out
}

/// One task for 64 queries of a head.
pub fn run(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    shape: &AttentionShape,
    lengths: &[usize],
) -> Array2<f32> {
    let AttentionShape { heads, kv_heads, head_dim, scale, window } = *shape;
    let (q_cols, kv_cols) = (heads * head_dim, kv_heads * head_dim);
    let mut out = vec![0.0f32; q.nrows() * q_cols];
    let mut tasks = Vec::new();
    let mut start = 0;
    for &length in lengths {
        for head in 0..heads {
            // Late queries see more keys: start with them.
            tasks.extend((0..length).step_by(QUERIES).rev().map(|query| (start, length, head, query)));
        }
        start += length;
    }
    let target = Shared::new(&mut out);
    let [q, k, v] = [q, k, v].map(|m| m.to_slice().expect("a contiguous matrix"));
    tasks.into_par_iter().for_each_init(Vec::new, |scores: &mut Vec<f32>, (start, length, head, query)| {
        let kv_head = head / (heads / kv_heads);
        let count = QUERIES.min(length - query);
        let first = window.map_or(0, |w| (query + 1).saturating_sub(w));
        let keys = query + count - first;
        scores.clear();
        scores.resize(count * keys, 0.0);
        let kv = (start + first) * kv_cols + kv_head * head_dim;
        // SAFETY: the slices hold `start + length` tokens, and each task writes its own queries of its own head.
        unsafe {
            gemm(
                [count, keys, head_dim],
                scores.as_mut_ptr(),
                [keys, 1],
                false,
                q.as_ptr().add((start + query) * q_cols + head * head_dim),
                [q_cols, 1],
                k.as_ptr().add(kv),
                [1, kv_cols],
                [0.0, scale],
            );
            for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
                let end = query + i + 1 - first;
                let begin = window.map_or(0, |w| end.saturating_sub(w));
                row[..begin].fill(0.0);
                row[end..].fill(0.0);
                softmax(&mut row[begin..end]);
            }
            gemm(
                [count, head_dim, keys],
                target.at((start + query) * q_cols + head * head_dim),
                [q_cols, 1],
                false,
                scores.as_ptr(),
                [keys, 1],
                v.as_ptr().add(kv),
                [kv_cols, 1],
                [0.0, 1.0],
            );
        }
    });
    Array2::from_shape_vec((q.len() / q_cols, q_cols), out).expect("the shape of q")
}

simd_fn! {
    fn softmax(row: &mut [f32]) {
        let top = row.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        for x in row.iter_mut() {
            *x = exp(*x - top);
        }
        let mut lanes = [0.0f32; crate::simd::LANES];
        let chunks = row.chunks_exact(crate::simd::LANES);
        let rest: f32 = chunks.remainder().iter().sum();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += x;
            }
        }
        let scale = 1.0 / (crate::simd::sum_lanes(lanes) + rest);
        for x in row.iter_mut() {
            *x *= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Noise, close};
    use super::*;

    #[test]
    fn agrees_with_the_plain_loop() {
        let mut noise = Noise(5);
        for (heads, kv_heads, head_dim, window, lengths) in [
            (1, 1, 1, None, vec![1]),
            (4, 2, 8, None, vec![130, 1, 67]),
            (6, 2, 5, Some(7), vec![90, 3]),
            (2, 2, 16, Some(1), vec![65]),
            (3, 1, 4, Some(500), vec![70]),
        ] {
            let tokens = lengths.iter().sum();
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.3, window };
            let q = noise.matrix(tokens, heads * head_dim);
            let k = noise.matrix(tokens, kv_heads * head_dim);
            let v = noise.matrix(tokens, kv_heads * head_dim);
            let fast = run(q.view(), k.view(), v.view(), &shape, &lengths);
            let slow = reference(q.view(), k.view(), v.view(), &shape, &lengths);
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
        }
    }
}
