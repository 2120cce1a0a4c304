//! Hyper-connections: the stream between layers is several hidden states wide, and each layer reads a weighted sum of them and writes
//! with a weight to each (Zhu et al. 2024, arXiv:2409.19606).
//!
//! The weights of a token are made of all of its streams: a product with a projection, divided by the root of their mean square, times a
//! scale for each kind of weight, plus a base. The sigmoid of the first kind reads, that of the second writes, and the third, where there is
//! one, is a matrix by which the streams are mixed, of whose rows and columns each sums up to 1 (Xie et al. 2025, arXiv:2512.24880).

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::linear;
use crate::backend::{HyperParameters, HyperShape};
use crate::simd::{exp, sum};
use crate::simd_fn;

/// Tokens of one task.
const ROWS: usize = 16;

/// The plain loop of [`weights`], in `f64`.
pub fn weights_reference(h: ArrayView2<f32>, of: HyperParameters<'_>, shape: &HyperShape) -> Array2<f32> {
    let (n, count) = (shape.streams, shape.weights());
    let [norm_eps, eps] = [shape.norm_eps, shape.eps].map(f64::from);
    let mut out = Array2::zeros((h.nrows(), count));
    for (row, mut out) in h.rows().into_iter().zip(out.rows_mut()) {
        let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        let size = (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + norm_eps).sqrt();
        let made = |index: usize| {
            let projection = &of.projection[index * row.len()..][..row.len()];
            let product: f64 = row.iter().zip(projection).map(|(x, w)| x * f64::from(*w)).sum();
            product / size * f64::from(of.scale[(index / n).min(2)]) + f64::from(of.base[index])
        };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        for i in 0..n {
            out[i] = (sigmoid(made(i)) + eps) as f32;
        }
        if let Some([magnitude, more]) = shape.writes.map(|writes| writes.map(f64::from)) {
            for i in n..2 * n {
                out[i] = (magnitude * sigmoid(made(i)) + more) as f32;
            }
        }
        if shape.rounds > 0 {
            let mut matrix = Array2::from_shape_fn((n, n), |(j, k)| made((2 + j) * n + k).exp());
            for mut row in matrix.rows_mut() {
                let sum = row.sum();
                row.mapv_inplace(|x| x / sum + eps);
            }
            for round in 0..2 * shape.rounds - 1 {
                for mut line in matrix.lanes_mut(ndarray::Axis(round % 2)) {
                    let sum = line.sum() + eps;
                    line.mapv_inplace(|x| x / sum);
                }
            }
            out.iter_mut().skip(2 * n).zip(&matrix).for_each(|(out, x)| *out = *x as f32);
        }
    }
    out
}

/// The weights of each token, `[tokens, weights]`: those by which streams are read, those by which they are written, and the matrix that mixes
/// them, row by row, as far as there are such.
pub fn weights(h: ArrayView2<f32>, of: HyperParameters<'_>, shape: &HyperShape) -> Array2<f32> {
    let (width, count) = (h.ncols(), shape.weights());
    let projection = ArrayView2::from_shape((count, width), of.projection).expect("as long as its shape says");
    let mut out = linear::run(h, projection, None);
    let h = h.to_slice().expect("a contiguous matrix");
    let rows = out.as_slice_mut().expect("a contiguous matrix").par_chunks_mut(ROWS * count);
    rows.zip(h.par_chunks((ROWS * width).max(1))).for_each(|(out, h)| rows_of_weights(out, h, of, shape));
    out
}

simd_fn! {
    fn rows_of_weights(out: &mut [f32], h: &[f32], of: HyperParameters<'_>, shape: &HyperShape) {
        let count = shape.weights();
        let width = h.len() / (out.len() / count);
        for (out, row) in out.chunks_exact_mut(count).zip(h.chunks_exact(width)) {
            let size = (sum(row, |x| x * x) / width as f32 + shape.norm_eps).sqrt();
            finish(out, 1.0 / size, of.base, of.scale, shape);
        }
    }
}

/// Makes weights of one token's products.
#[inline(always)]
fn finish(out: &mut [f32], factor: f32, base: &[f32], scale: &[f32], shape: &HyperShape) {
    let n = shape.streams;
    for (index, (out, base)) in out.iter_mut().zip(base).enumerate() {
        *out = *out * factor * scale[(index / n).min(2)] + base;
    }
    let sigmoid = |x: f32| 1.0 / (1.0 + exp(-x));
    out[..n].iter_mut().for_each(|x| *x = sigmoid(*x) + shape.eps);
    if let Some([magnitude, more]) = shape.writes {
        out[n..2 * n].iter_mut().for_each(|x| *x = magnitude * sigmoid(*x) + more);
    }
    if shape.rounds > 0 {
        let matrix = &mut out[2 * n..];
        for row in matrix.chunks_exact_mut(n) {
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut().for_each(|x| *x = exp(*x - top));
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|x| *x = *x / sum + shape.eps);
        }
        for round in 0..2 * shape.rounds - 1 {
            // Columns first.
            let [along, across] = if round % 2 == 0 { [n, 1] } else { [1, n] };
            for line in 0..n {
                let sum = (0..n).map(|i| matrix[line * across + i * along]).sum::<f32>() + shape.eps;
                (0..n).for_each(|i| matrix[line * across + i * along] /= sum);
            }
        }
    }
}

/// The plain loop of [`read`], in `f64`.
pub fn read_reference(h: ArrayView2<f32>, weights: ArrayView2<f32>, streams: usize) -> Array2<f32> {
    let hidden = h.ncols() / streams;
    Array2::from_shape_fn((h.nrows(), hidden), |(token, d)| {
        let terms = (0..streams).map(|i| f64::from(weights[[token, i]]) * f64::from(h[[token, i * hidden + d]]));
        terms.sum::<f64>() as f32
    })
}

/// `[tokens, hidden]`: each token's streams, summed up with its first weights.
pub fn read(h: ArrayView2<f32>, weights: ArrayView2<f32>, streams: usize) -> Array2<f32> {
    let (hidden, count) = (h.ncols() / streams, weights.ncols());
    let mut out = Array2::zeros((h.nrows(), hidden));
    let [h, weights] = [h, weights].map(|m| m.to_slice().expect("a contiguous matrix"));
    let rows = out.as_slice_mut().expect("a contiguous matrix").par_chunks_mut((ROWS * hidden).max(1));
    rows.enumerate().for_each(|(part, out)| {
        let (h, weights) = (&h[part * ROWS * hidden * streams..], &weights[part * ROWS * count..]);
        read_rows(out, h, weights, [streams, hidden, count]);
    });
    out
}

simd_fn! {
    fn read_rows(out: &mut [f32], h: &[f32], weights: &[f32], sizes: [usize; 3]) {
        let [streams, hidden, count] = sizes;
        for (token, out) in out.chunks_exact_mut(hidden).enumerate() {
            for stream in 0..streams {
                let weight = weights[token * count + stream];
                for (out, x) in out.iter_mut().zip(&h[(token * streams + stream) * hidden..]) {
                    *out += weight * x;
                }
            }
        }
    }
}

/// The plain loop of [`write`], in `f64`.
pub fn write_reference(y: ArrayView2<f32>, weights: ArrayView2<f32>, shape: &HyperShape, h: &mut Array2<f32>) {
    let (n, hidden, old) = (shape.streams, y.ncols(), h.clone());
    for ((token, col), out) in h.indexed_iter_mut() {
        let (k, d) = (col / hidden, col % hidden);
        let of = |j: usize| f64::from(old[[token, j * hidden + d]]);
        let mixed = match shape.rounds {
            0 => of(k),
            _ => (0..n).map(|j| f64::from(weights[[token, (2 + j) * n + k]]) * of(j)).sum(),
        };
        *out = (mixed + f64::from(weights[[token, n + k]]) * f64::from(y[[token, d]])) as f32;
    }
}

/// Adds `y` `[tokens, hidden]` to every stream of `h`, times the token's weight for it, once the streams are mixed where they are.
pub fn write(y: ArrayView2<f32>, weights: ArrayView2<f32>, shape: &HyperShape, h: &mut Array2<f32>) {
    let (hidden, count) = (y.ncols(), weights.ncols());
    let [y, weights] = [y, weights].map(|m| m.to_slice().expect("a contiguous matrix"));
    let width = (ROWS * hidden * shape.streams).max(1);
    let rows = h.as_slice_mut().expect("a contiguous matrix").par_chunks_mut(width);
    rows.enumerate().for_each_init(Vec::new, |old, (part, h)| {
        let (y, weights) = (&y[part * ROWS * hidden..], &weights[part * ROWS * count..]);
        write_rows(h, y, weights, shape, [hidden, count], old);
    });
}

simd_fn! {
    fn write_rows(
        h: &mut [f32],
        y: &[f32],
        weights: &[f32],
        shape: &HyperShape,
        sizes: [usize; 2],
        old: &mut Vec<f32>,
    ) {
        let ([hidden, count], n) = (sizes, shape.streams);
        for (token, h) in h.chunks_exact_mut(n * hidden).enumerate() {
            let (y, weights) = (&y[token * hidden..][..hidden], &weights[token * count..][..count]);
            if shape.rounds > 0 {
                old.clear();
                old.extend_from_slice(h);
                h.fill(0.0);
            }
            for (k, h) in h.chunks_exact_mut(hidden).enumerate() {
                for (j, old) in old.chunks_exact(hidden).enumerate() {
                    let weight = weights[(2 + j) * n + k];
                    h.iter_mut().zip(old).for_each(|(h, x)| *h += weight * x);
                }
                let weight = weights[n + k];
                h.iter_mut().zip(y).for_each(|(h, y)| *h += weight * y);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Noise, close};
    use super::*;

    /// Streams that are read and written, and mixed in so many rounds.
    pub fn shape(streams: usize, writes: bool, rounds: usize) -> HyperShape {
        HyperShape { streams, norm_eps: 1e-3, eps: 1e-2, writes: writes.then_some([1.5, 0.02]), rounds }
    }

    /// A projection, a base and scales for streams of `hidden` values.
    pub fn parameters(noise: &mut Noise, shape: &HyperShape, hidden: usize) -> [Vec<f32>; 3] {
        let counts = [shape.weights() * shape.streams * hidden, shape.weights(), shape.kinds()];
        counts.map(|count| (0..count).map(|_| noise.next()).collect())
    }

    fn check(shape: HyperShape, tokens: usize, hidden: usize, seed: u64) {
        let mut noise = Noise(seed);
        let mut h = noise.matrix(tokens, shape.streams * hidden) * 3.0;
        let [projection, base, scale] = parameters(&mut noise, &shape, hidden);
        let of = HyperParameters { projection: &projection, base: &base, scale: &scale };
        let found = weights(h.view(), of, &shape);
        let expected = weights_reference(h.view(), of, &shape);
        close(found.as_slice().unwrap(), expected.as_slice().unwrap(), 1e-5);
        let fast = read(h.view(), expected.view(), shape.streams);
        let slow = read_reference(h.view(), expected.view(), shape.streams);
        close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
        if shape.writes.is_some() {
            let (y, mut slow) = (noise.matrix(tokens, hidden), h.clone());
            write_reference(y.view(), expected.view(), &shape, &mut slow);
            write(y.view(), expected.view(), &shape, &mut h);
            close(h.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_plain_loop(
            streams in 1usize..6, writes: bool, rounds in 0usize..5, tokens in 0usize..40, hidden in 1usize..40, seed: u64,
        ) {
            check(shape(streams, writes, if writes { rounds } else { 0 }), tokens, hidden, seed);
        }
    }

    #[test]
    fn what_mixes_streams_neither_adds_nor_takes_away() {
        let mut noise = Noise(5);
        let shape = HyperShape { eps: 1e-6, ..shape(4, true, 20) };
        let h = noise.matrix(9, 4 * 7);
        let [projection, base, mut scale] = parameters(&mut noise, &shape, 7);
        // From sizes that lie far apart it would take many more rounds.
        scale.fill(0.1);
        let found = weights(h.view(), HyperParameters { projection: &projection, base: &base, scale: &scale }, &shape);
        for row in found.rows() {
            for line in 0..4 {
                let column: f32 = (0..4).map(|j| row[(2 + j) * 4 + line]).sum();
                let across: f32 = (0..4).map(|k| row[(2 + line) * 4 + k]).sum();
                assert!((column - 1.0).abs() < 1e-4 && (across - 1.0).abs() < 1e-3, "{column}, {across}");
            }
        }
    }
}
