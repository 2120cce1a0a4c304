//! Root-mean-square normalisation of each row (Zhang and Sennrich 2019, arXiv:1910.07467).

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::simd::{LANES, sum_lanes};
use crate::simd_fn;

/// The plain loop, sums in `f64`.
pub fn reference(x: ArrayView2<f32>, weight: &[f32], eps: f32) -> Array2<f32> {
    let mut y = x.to_owned();
    for mut row in y.rows_mut() {
        let square: f64 = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        let scale = 1.0 / (square / row.len() as f64 + f64::from(eps)).sqrt();
        row.iter_mut().zip(weight).for_each(|(v, w)| *v = (f64::from(*v) * scale) as f32 * w);
    }
    y
}

/// Rows across threads.
pub fn run(x: ArrayView2<f32>, weight: &[f32], eps: f32) -> Array2<f32> {
    let cols = x.ncols();
    let input = x.as_slice().expect("a contiguous matrix");
    let mut y = vec![0.0f32; input.len()];
    y.par_chunks_mut(cols * 64).zip(input.par_chunks(cols * 64)).for_each(|(y, x)| rows(x, y, weight, eps));
    Array2::from_shape_vec((x.nrows(), cols), y).expect("same shape")
}

simd_fn! {
    fn rows(x: &[f32], y: &mut [f32], weight: &[f32], eps: f32) {
        let cols = weight.len();
        for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
            let mut lanes = [0.0f32; LANES];
            let chunks = x.chunks_exact(LANES);
            let rest = chunks.remainder();
            for chunk in chunks {
                for lane in 0..LANES {
                    lanes[lane] += chunk[lane] * chunk[lane];
                }
            }
            let square = sum_lanes(lanes) + rest.iter().map(|v| v * v).sum::<f32>();
            let scale = 1.0 / (square / cols as f32 + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * scale * w;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Noise, close};
    use super::*;

    #[test]
    fn agrees_with_the_plain_loop() {
        let mut noise = Noise(2);
        for (rows, cols) in [(1, 1), (2, 15), (65, 31), (130, 576)] {
            let x = noise.matrix(rows, cols);
            let weight: Vec<f32> = (0..cols).map(|_| noise.next()).collect();
            let (fast, slow) = (run(x.view(), &weight, 1e-5), reference(x.view(), &weight, 1e-5));
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
        }
    }
}
