//! Second moments of a layer's input: `H ← H + xᵀ x`, of which only the lower triangle is kept.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::{Shared, gemm};

/// The plain loop, sums in `f64`; both triangles.
pub fn reference(x: ArrayView2<f32>) -> Array2<f32> {
    Array2::from_shape_fn((x.ncols(), x.ncols()), |(i, j)| {
        x.column(i).iter().zip(x.column(j)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
    })
}

/// Side of the square blocks that tasks work on: depends on the width alone, so that sums do not depend on threads.
fn block_side(cols: usize) -> usize {
    cols.div_ceil(2).next_multiple_of(32).clamp(64, 768)
}

/// Adds `xᵀ x` to the lower triangle of `gram` `[cols, cols]`; what lies above the diagonal is scratch.
///
/// Partial sums run over the tokens of one call in single precision: feed a few thousand tokens at a time.
pub fn run(x: ArrayView2<f32>, gram: &mut Array2<f32>) {
    let (tokens, cols) = (x.nrows(), x.ncols());
    let side = block_side(cols);
    let x = x.to_slice().expect("a contiguous matrix");
    let mut tasks: Vec<(usize, usize)> =
        (0..cols).step_by(side).flat_map(|row| (0..=row).step_by(side).map(move |col| (row, col))).collect();
    // Off-diagonal blocks are twice the work: first.
    tasks.sort_by_key(|(row, col)| row == col);
    let target = Shared::new(gram.as_slice_mut().expect("a contiguous matrix"));
    tasks.into_par_iter().for_each(|(row, col)| {
        let (m, n) = (side.min(cols - row), side.min(cols - col));
        // SAFETY: `x` holds `tokens` rows of `cols`; each task writes its own block of the lower triangle.
        unsafe {
            let block = target.at(row * cols + col);
            let (left, right) = (x.as_ptr().add(row), x.as_ptr().add(col));
            if row == col {
                triangle(left, tokens, cols, m, block);
            } else {
                gemm([m, n, tokens], block, [cols, 1], true, left, [1, cols], right, [cols, 1], [1.0, 1.0]);
            }
        }
    });
}

/// Adds the lower triangle of a diagonal block of side `side`, halving it until full squares waste little.
///
/// # Safety
/// `x` points to `tokens` rows of at least `side` values, `cols` apart; `block` to `side` such rows that no other task uses.
unsafe fn triangle(x: *const f32, tokens: usize, cols: usize, side: usize, block: *mut f32) {
    // SAFETY: the parts lie inside the block.
    unsafe {
        if side <= 96 {
            gemm([side, side, tokens], block, [cols, 1], true, x, [1, cols], x, [cols, 1], [1.0, 1.0]);
            return;
        }
        let half = (side / 2).next_multiple_of(16);
        let rest = side - half;
        triangle(x, tokens, cols, half, block);
        gemm(
            [rest, half, tokens],
            block.add(half * cols),
            [cols, 1],
            true,
            x.add(half),
            [1, cols],
            x,
            [cols, 1],
            [1.0, 1.0],
        );
        triangle(x.add(half), tokens, cols, rest, block.add(half * cols + half));
    }
}

/// Per column `Σ_t |x_tj|` and `Σ_t x_tj²`, added to `magnitude` and `energy`.
pub fn moments(x: ArrayView2<f32>, magnitude: &mut [f64], energy: &mut [f64]) {
    let cols = x.ncols();
    let partial: Vec<[Vec<f32>; 2]> = x
        .to_slice()
        .expect("a contiguous matrix")
        .par_chunks(cols * 512)
        .map(|rows| {
            let [mut first, mut second] = [vec![0.0f32; cols], vec![0.0f32; cols]];
            for row in rows.chunks_exact(cols) {
                for ((first, second), x) in first.iter_mut().zip(&mut second).zip(row) {
                    *first += x.abs();
                    *second += x * x;
                }
            }
            [first, second]
        })
        .collect();
    for [first, second] in partial {
        magnitude.iter_mut().zip(first).for_each(|(sum, x)| *sum += f64::from(x));
        energy.iter_mut().zip(second).for_each(|(sum, x)| *sum += f64::from(x));
    }
}

/// Rows of `e` and features that one task of [`quadratic`] works on.
const QUADRATIC: [usize; 2] = [512, 128];

/// `tr(e H eᵀ)`: `e` is `[rows, n]`, the lower triangle of `gram` is read.
pub fn quadratic(e: ArrayView2<f32>, gram: ArrayView2<f32>) -> f64 {
    let (rows, n) = (e.nrows(), gram.nrows());
    let [e, gram] = [e, gram].map(|m| m.to_slice().expect("a contiguous matrix"));
    // Of what is left of the diagonal blocks each product counts for its mirror image too; late blocks have most of it.
    let starts: Vec<(usize, usize)> = (0..n)
        .step_by(QUADRATIC[1])
        .rev()
        .flat_map(|col| (0..rows).step_by(QUADRATIC[0]).map(move |row| (row, col)))
        .collect();
    let sums: Vec<f64> = starts
        .into_par_iter()
        .map_init(Vec::new, |scratch: &mut Vec<f32>, (row, col)| {
            let (m, side) = (QUADRATIC[0].min(rows - row), QUADRATIC[1].min(n - col));
            scratch.resize(QUADRATIC[1] * (QUADRATIC[0] + QUADRATIC[1]), 0.0);
            let (diagonal, image) = scratch.split_at_mut(QUADRATIC[1] * QUADRATIC[1]);
            for i in 0..side {
                for j in 0..=i {
                    let value = gram[(col + i) * n + col + j];
                    (diagonal[i * side + j], diagonal[j * side + i]) = (value, value);
                }
            }
            let part = &e[row * n..][..m * n];
            // SAFETY: `part` has `m` rows of `n`, the block's rows of `gram` begin at `col`, and the scratch is this task's.
            unsafe {
                let (left, c) = (part.as_ptr(), image.as_mut_ptr());
                gemm(
                    [m, side, side],
                    c,
                    [side, 1],
                    false,
                    left.add(col),
                    [n, 1],
                    diagonal.as_ptr(),
                    [side, 1],
                    [0.0, 1.0],
                );
                if col > 0 {
                    let right = gram.as_ptr().add(col * n);
                    gemm([m, side, col], c, [side, 1], true, left, [n, 1], right, [1, n], [1.0, 2.0]);
                }
            }
            let product = |(e, image): (&[f32], &[f32])| -> f64 {
                e[col..][..side].iter().zip(image).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            part.chunks_exact(n).zip(image.chunks_exact(side)).map(product).sum()
        })
        .collect();
    sums.iter().sum()
}

/// `Σ e_ij² · weights_j`.
pub fn weighted_square(e: ArrayView2<f32>, weights: &[f64]) -> f64 {
    let e = e.to_slice().expect("a contiguous matrix");
    let rows: Vec<f64> = e
        .par_chunks_exact(weights.len().max(1))
        .map(|row| row.iter().zip(weights).map(|(e, w)| f64::from(*e) * f64::from(*e) * w).sum())
        .collect();
    rows.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::super::testing::Noise;
    use super::*;

    #[test]
    fn lower_triangle_agrees_with_the_plain_loop() {
        let mut noise = Noise(6);
        for (tokens, cols) in [(1, 1), (5, 3), (100, 65), (257, 130), (64, 300)] {
            let (a, b) = (noise.matrix(tokens, cols), noise.matrix(3, cols));
            let mut gram = Array2::zeros((cols, cols));
            run(a.view(), &mut gram);
            run(b.view(), &mut gram);
            let expected = reference(a.view()) + reference(b.view());
            for i in 0..cols {
                for j in 0..=i {
                    let (f, e) = (gram[[i, j]], expected[[i, j]]);
                    assert!((f - e).abs() <= 1e-5 * (tokens as f32).sqrt(), "[{i}, {j}] of {cols}: {f}, not {e}");
                }
            }
        }
    }

    #[test]
    fn moments_are_the_sums() {
        let x = Noise(14).matrix(1100, 3);
        let (mut magnitude, mut energy) = ([1.0; 3], [2.0; 3]);
        moments(x.view(), &mut magnitude, &mut energy);
        for col in 0..3 {
            let first: f64 = x.column(col).iter().map(|v| f64::from(v.abs())).sum();
            let second: f64 = x.column(col).iter().map(|v| f64::from(*v).powi(2)).sum();
            assert!((magnitude[col] - 1.0 - first).abs() < 1e-3 && (energy[col] - 2.0 - second).abs() < 1e-3);
        }
    }

    #[test]
    fn quadratic_is_the_trace() {
        let mut noise = Noise(7);
        for (rows, n) in [(4, 9), (1, 1), (3, QUADRATIC[1]), (QUADRATIC[0] + 3, 2 * QUADRATIC[1] + 5)] {
            let (x, e) = (noise.matrix(40, n), noise.matrix(rows, n));
            let mut gram = Array2::zeros((n, n));
            run(x.view(), &mut gram);
            // Above the diagonal is scratch.
            (0..n).for_each(|i| (i + 1..n).for_each(|j| gram[[i, j]] = f32::NAN));
            let direct: f64 = x.dot(&e.t()).iter().map(|v| f64::from(*v).powi(2)).sum();
            let found = quadratic(e.view(), gram.view());
            assert!((found - direct).abs() <= 1e-5 * direct, "{rows} x {n}: {found}, not {direct}");
        }
    }
}
