//! Several streams side by side: `[tokens, count·width]`, of which layers read mixtures and to which they give what they make.
//!
//! So alternating updates have it (AltUp: Baykal et al. 2023, arXiv:2301.13310), and the connections of several residual streams of other models.
//! And the gate of a feed-forward layer that lets few values through, which is in the same models (Gemma 3n), and how far two values agree stream
//! by stream, by which rows of a table are let through (Qwen 4).

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::simd::{LANES, sum, sum_lanes};
use crate::simd_fn;

/// Tokens of one task.
const ROWS: usize = 16;

/// What is mixed of streams of `width` values: `y[t, i] + Σ coefficients[t, i, j] · x[t, j]`, by the plain loop in `f64`.
pub fn reference(x: ArrayView2<f32>, coefficients: ArrayView2<f32>, width: usize, y: ArrayView2<f32>) -> Array2<f32> {
    let from = x.ncols() / width.max(1);
    Array2::from_shape_fn(y.dim(), |(token, col)| {
        let (to, within) = (col / width, col % width);
        let mixed = (0..from).map(|stream| {
            f64::from(coefficients[[token, to * from + stream]]) * f64::from(x[[token, stream * width + within]])
        });
        (f64::from(y[[token, col]]) + mixed.sum::<f64>()) as f32
    })
}

/// The same, to `y`; tokens across threads.
pub fn run(x: ArrayView2<f32>, coefficients: ArrayView2<f32>, width: usize, y: &mut Array2<f32>) {
    let (from, to) = (x.ncols() / width.max(1), y.ncols() / width.max(1));
    if from == 0 || to == 0 {
        return;
    }
    let [x, coefficients] = [x, coefficients].map(|m| m.to_slice().expect("a contiguous matrix"));
    let y = y.as_slice_mut().expect("a contiguous matrix");
    let parts = y.par_chunks_mut(ROWS * to * width).zip(x.par_chunks(ROWS * from * width));
    parts.zip(coefficients.par_chunks(ROWS * to * from)).for_each(|((y, x), coefficients)| {
        mix(x, coefficients, [from, to, width], y);
    });
}

simd_fn! {
    /// One thread's share; `[from, to, width]` are numbers of streams and the values of each.
    fn mix(x: &[f32], coefficients: &[f32], shape: [usize; 3], y: &mut [f32]) {
        let [from, to, width] = shape;
        let tokens = y.chunks_exact_mut(to * width).zip(x.chunks_exact(from * width));
        for ((y, x), coefficients) in tokens.zip(coefficients.chunks_exact(to * from)) {
            for (y, shares) in y.chunks_exact_mut(width).zip(coefficients.chunks_exact(from)) {
                for (x, share) in x.chunks_exact(width).zip(shares) {
                    for (y, x) in y.iter_mut().zip(x) {
                        *y += share * x;
                    }
                }
            }
        }
    }
}

/// `x` with every stream of `width` values but the first made as large as that: times the root mean square of the first, divided by its own,
/// whose square is `least` at least. The plain loop in `f64`.
pub fn match_reference(x: ArrayView2<f32>, width: usize, least: f32) -> Array2<f32> {
    let mut out = x.to_owned();
    for mut row in out.rows_mut() {
        let square = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
        let row = row.as_slice_mut().expect("a contiguous row");
        let Some(first) = row.get(..width).map(square) else { continue };
        for stream in row.chunks_exact_mut(width).skip(1) {
            let factor = first.sqrt() / square(stream).max(f64::from(least)).sqrt();
            stream.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
        }
    }
    out
}

/// The same in place; tokens across threads.
pub fn match_first(x: &mut Array2<f32>, width: usize, least: f32) {
    let cols = x.ncols();
    if cols == 0 {
        return;
    }
    let data = x.as_slice_mut().expect("a contiguous matrix");
    data.par_chunks_mut(ROWS * cols).for_each(|rows| match_rows(rows, cols, width, least));
}

simd_fn! {
    fn match_rows(rows: &mut [f32], cols: usize, width: usize, least: f32) {
        for row in rows.chunks_exact_mut(cols) {
            let (first, others) = row.split_at_mut(width);
            let size = (sum(first, |x| x * x) / width as f32).sqrt();
            for stream in others.chunks_exact_mut(width) {
                let factor = size / (sum(stream, |x| x * x) / width as f32).max(least).sqrt();
                stream.iter_mut().for_each(|x| *x *= factor);
            }
        }
    }
}

/// `max(x − mean − deviations · √variance, 0)` of each row: of values that are spread like a bell, a share that `deviations` says is left.
/// The plain loop in `f64`.
pub fn cut_reference(x: ArrayView2<f32>, deviations: f32) -> Array2<f32> {
    let mut out = x.to_owned();
    for mut row in out.rows_mut() {
        let count = row.len() as f64;
        let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
        let variance = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count;
        let least = mean + variance.sqrt() * f64::from(deviations);
        row.iter_mut().for_each(|x| *x = (f64::from(*x) - least).max(0.0) as f32);
    }
    out
}

/// The same in place; tokens across threads.
pub fn cut(x: &mut Array2<f32>, deviations: f32) {
    let cols = x.ncols();
    if cols == 0 {
        return;
    }
    let data = x.as_slice_mut().expect("a contiguous matrix");
    data.par_chunks_mut(ROWS * cols).for_each(|rows| cut_rows(rows, cols, deviations));
}

simd_fn! {
    fn cut_rows(rows: &mut [f32], cols: usize, deviations: f32) {
        for row in rows.chunks_exact_mut(cols) {
            let mean = sum(row, |x| x) / cols as f32;
            let variance = sum(row, |x| (x - mean) * (x - mean)) / cols as f32;
            let least = mean + variance.sqrt() * deviations;
            row.iter_mut().for_each(|x| *x = (*x - least).max(0.0));
        }
    }
}

/// How far each stream of `width` values of `x` agrees with that of `y`: `r = Σ x·y / √width`, and of it `sign(r) · √max(|r|, least)`, by the
/// plain loop in `f64`.
pub fn agree_reference(x: ArrayView2<f32>, y: ArrayView2<f32>, width: usize, least: f32) -> Array2<f32> {
    let count = x.ncols() / width.max(1);
    Array2::from_shape_fn((x.nrows(), count), |(token, stream)| {
        let products =
            (stream * width..(stream + 1) * width).map(|d| f64::from(x[[token, d]]) * f64::from(y[[token, d]]));
        let sum = products.sum::<f64>() / (width as f64).sqrt();
        let sign = if sum == 0.0 { 0.0 } else { sum.signum() };
        (sign * sum.abs().max(f64::from(least)).sqrt()) as f32
    })
}

/// The same, `[tokens, streams]`; tokens across threads.
pub fn agree(x: ArrayView2<f32>, y: ArrayView2<f32>, width: usize, least: f32) -> Array2<f32> {
    let count = x.ncols() / width.max(1);
    let mut out = Array2::zeros((x.nrows(), count));
    if count == 0 {
        return out;
    }
    let [x, y] = [x, y].map(|m| m.to_slice().expect("a contiguous matrix"));
    let rows = out.as_slice_mut().expect("a contiguous matrix").par_chunks_mut(ROWS * count);
    let parts = rows.zip(x.par_chunks(ROWS * count * width)).zip(y.par_chunks(ROWS * count * width));
    parts.for_each(|((out, x), y)| agree_rows(out, x, y, width, least));
    out
}

simd_fn! {
    fn agree_rows(out: &mut [f32], x: &[f32], y: &[f32], width: usize, least: f32) {
        for ((out, x), y) in out.iter_mut().zip(x.chunks_exact(width)).zip(y.chunks_exact(width)) {
            let mut lanes = [0.0f32; LANES];
            let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
            let rest: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(a, b)| a * b).sum();
            for (a, b) in xs.zip(ys) {
                for lane in 0..LANES {
                    lanes[lane] += a[lane] * b[lane];
                }
            }
            let sum = (sum_lanes(lanes) + rest) / (width as f32).sqrt();
            let size = sum.abs().max(least).sqrt();
            // Of nothing the sign is 0.
            *out = if sum > 0.0 { size } else if sum < 0.0 { -size } else { sum };
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
        fn mixing_agrees_with_the_plain_loop(
            tokens in 0usize..40, from in 1usize..6, to in 1usize..6, width in 1usize..70, seed: u64,
        ) {
            let mut noise = Noise(seed);
            let [x, coefficients, mut y] =
                [from * width, to * from, to * width].map(|cols| noise.matrix(tokens, cols));
            let expected = reference(x.view(), coefficients.view(), width, y.view());
            run(x.view(), coefficients.view(), width, &mut y);
            close(y.as_slice().unwrap(), expected.as_slice().unwrap(), 2e-6);
        }

        #[test]
        fn matching_agrees_with_the_plain_loop(
            tokens in 0usize..40, count in 1usize..6, width in 1usize..70, small: bool, seed: u64,
        ) {
            let mut x = Noise(seed).matrix(tokens, count * width);
            if small {
                // So that they are divided by the least there may be.
                x.iter_mut().enumerate().filter(|(at, _)| at % (count * width) >= width).for_each(|(_, x)| *x *= 1e-4);
            }
            let expected = match_reference(x.view(), width, 1e-5);
            match_first(&mut x, width, 1e-5);
            close(x.as_slice().unwrap(), expected.as_slice().unwrap(), 3e-6);
        }

        #[test]
        fn agreement_agrees_with_the_plain_loop(
            tokens in 0usize..40, count in 1usize..6, width in 1usize..70, nothing: bool, seed: u64,
        ) {
            let mut noise = Noise(seed);
            let [mut x, y] = [0; 2].map(|_| noise.matrix(tokens, count * width));
            if nothing {
                // Their product is no number's sign, or less than the least.
                x.iter_mut().enumerate().for_each(|(at, x)| *x *= if at % 2 == 0 { 0.0 } else { 1e-9 });
            }
            let found = agree(x.view(), y.view(), width, 1e-6);
            let expected = agree_reference(x.view(), y.view(), width, 1e-6);
            // A root makes much of what is near to nothing: what counts is the square.
            let square = |m: &Array2<f32>| m.iter().map(|x| x * x.abs()).collect::<Vec<_>>();
            close(&square(&found), &square(&expected), 3e-6);
        }

        #[test]
        fn cutting_agrees_with_the_plain_loop(
            tokens in 0usize..40, cols in 1usize..600, deviations in -2.0f32..2.0, offset in -3.0f32..3.0, seed: u64,
        ) {
            let mut x = Noise(seed).matrix(tokens, cols) + offset;
            let expected = cut_reference(x.view(), deviations);
            cut(&mut x, deviations);
            close(x.as_slice().unwrap(), expected.as_slice().unwrap(), 3e-6);
        }
    }
}
