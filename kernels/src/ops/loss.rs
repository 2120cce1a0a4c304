//! Token losses: negative log-likelihood, and the divergence between a model and its reference.
//!
//! Exponentials are single precision; every sum of more than a few hundred of them is double.

use ndarray::ArrayView2;
use rayon::prelude::*;

use crate::backend::{TokenComparison, TokenLoss};
use crate::simd::{LANES, exp, sum_lanes};
use crate::simd_fn;

/// Values summed in single precision before they join a double sum.
const CHUNK: usize = 16 * LANES;

/// `(nll of target, argmax)` of one row, in `f64`.
pub fn reference(logits: &[f32], target: usize) -> (f64, u32) {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - top).exp()).sum();
    let argmax = logits.iter().position(|l| *l == top).unwrap_or(0) as u32;
    (sum.ln() + f64::from(top) - f64::from(logits[target]), argmax)
}

/// `KL(p ‖ q)` of two rows of logits, in `f64`.
pub fn reference_kld(p: &[f32], q: &[f32]) -> f64 {
    let (zero_p, zero_q) = (reference(p, 0).0 + f64::from(p[0]), reference(q, 0).0 + f64::from(q[0]));
    p.iter()
        .zip(q)
        .map(|(p, q)| {
            let log_p = f64::from(*p) - zero_p;
            log_p.exp() * (log_p - (f64::from(*q) - zero_q))
        })
        .sum()
}

/// Loss of each row of `logits` `[tokens, vocabulary]`.
pub fn run(logits: ArrayView2<f32>, targets: &[u32]) -> TokenLoss {
    let vocabulary = logits.ncols();
    let rows = logits.to_slice().expect("a contiguous matrix").par_chunks_exact(vocabulary);
    let (nll, argmax) = rows
        .zip(targets)
        .map(|(row, target)| {
            let (top, argmax) = largest(row);
            (sum_exp(row, top).ln() + f64::from(top) - f64::from(row[*target as usize]), argmax)
        })
        .unzip();
    TokenLoss { nll, argmax }
}

/// Both models' losses, and the divergence of `model` from `reference`; exactly 0 for equal logits.
pub fn compare(reference: ArrayView2<f32>, model: ArrayView2<f32>, targets: &[u32]) -> TokenComparison {
    let vocabulary = reference.ncols();
    let p_rows = reference.to_slice().expect("a contiguous matrix").par_chunks_exact(vocabulary);
    let q_rows = model.to_slice().expect("a contiguous matrix").par_chunks_exact(vocabulary);
    let kld = p_rows
        .zip(q_rows)
        .map(|(p, q)| {
            let ((top_p, _), (top_q, _)) = (largest(p), largest(q));
            let (sum_p, sum_q) = (sum_exp(p, top_p), sum_exp(q, top_q));
            // Σ p (ln p − ln q) = Σ p (l_p − l_q) − (ln Z_p − ln Z_q), logits taken from their maxima.
            weighted_difference(p, q, top_p, top_q) / sum_p - (sum_p.ln() - sum_q.ln())
        })
        .collect();
    TokenComparison { reference: run(reference, targets), model: run(model, targets), kld }
}

simd_fn! {
    fn largest(row: &[f32]) -> (f32, u32) {
        let top = row.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        (top, row.iter().position(|x| *x == top).unwrap_or(0) as u32)
    }
}

simd_fn! {
    fn sum_exp(row: &[f32], top: f32) -> f64 {
        let mut total = 0.0f64;
        for part in row.chunks(CHUNK) {
            let mut lanes = [0.0f32; LANES];
            let chunks = part.chunks_exact(LANES);
            let rest: f32 = chunks.remainder().iter().map(|x| exp(x - top)).sum();
            for chunk in chunks {
                for lane in 0..LANES {
                    lanes[lane] += exp(chunk[lane] - top);
                }
            }
            total += f64::from(sum_lanes(lanes) + rest);
        }
        total
    }
}

simd_fn! {
    fn weighted_difference(p: &[f32], q: &[f32], top_p: f32, top_q: f32) -> f64 {
        let mut total = 0.0f64;
        for (p, q) in p.chunks(CHUNK).zip(q.chunks(CHUNK)) {
            let mut lanes = [0.0f32; LANES];
            let (p_chunks, q_chunks) = (p.chunks_exact(LANES), q.chunks_exact(LANES));
            let rest: f32 = p_chunks
                .remainder()
                .iter()
                .zip(q_chunks.remainder())
                .map(|(p, q)| exp(p - top_p) * ((p - top_p) - (q - top_q)))
                .sum();
            for (p, q) in p_chunks.zip(q_chunks) {
                for lane in 0..LANES {
                    lanes[lane] += exp(p[lane] - top_p) * ((p[lane] - top_p) - (q[lane] - top_q));
                }
            }
            total += f64::from(sum_lanes(lanes) + rest);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Noise;
    use super::*;

    #[test]
    fn agrees_with_the_plain_loops() {
        let mut noise = Noise(13);
        for vocabulary in [1, 5, 17, 256, 1031] {
            let p = noise.matrix(4, vocabulary).mapv(|x| 6.0 * x);
            let q = &p + &noise.matrix(4, vocabulary).mapv(|x| 0.2 * x);
            let targets: Vec<u32> = (0..4).map(|t| (t * 7 % vocabulary) as u32).collect();
            let found = compare(p.view(), q.view(), &targets);
            for token in 0..4 {
                let (p, q) = (p.row(token).to_vec(), q.row(token).to_vec());
                let target = targets[token] as usize;
                for (row, loss) in [(&p, &found.reference), (&q, &found.model)] {
                    let (nll, argmax) = reference(row, target);
                    assert!((loss.nll[token] - nll).abs() <= 1e-5, "{} and {nll}", loss.nll[token]);
                    assert_eq!(loss.argmax[token], argmax);
                }
                let kld = reference_kld(&p, &q);
                assert!((found.kld[token] - kld).abs() <= 1e-5 * kld + 2e-6, "{} and {kld}", found.kld[token]);
            }
            assert_eq!(compare(p.view(), p.view(), &targets).kld, vec![0.0; 4]);
        }
    }
}
