//! Factors a Hessian for the sweep: `P (H + damping) Pᵀ = R D Rᵀ`, `R` unit upper triangular.
//!
//! `R` is the Cholesky factor of the matrix with its indices reversed. With it, the feedback of GPTQ needs no inverse:
//! a third of the work of the usual inverse-and-factor-again, better conditioned, and the same codes
//! (Chee et al. 2023, arXiv:2307.13304, "LDLQ"; Frantar et al. 2022, arXiv:2210.17323).

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::{Shared, gemm};
use crate::{Error, Factor, Result};

/// Columns factored at a time.
const BLOCK: usize = 96;
/// Side of the tiles of the trailing update.
const TILE: usize = 288;

/// Factors the lower triangle of `gram` `[n, n]` in double precision, with its columns in `order`.
///
/// Every diagonal entry is multiplied by `1 + damp`. A column of zero energy gets a unit pivot: nothing feeds back from it.
pub fn run(gram: ArrayView2<f32>, order: Vec<u32>, damp: f64) -> Result<Factor<Array2<f32>>> {
    let n = gram.nrows();
    if order.len() != n {
        return Err(Error::Shape { op: "factor", expected: format!("{n} columns"), found: order.len().to_string() });
    }
    let gram = gram.to_slice().expect("a contiguous matrix");
    if (0..n).any(|j| !gram[j * n + j].is_finite()) {
        return Err(Error::NonFinite("the Hessian"));
    }
    // Column-major, reversed: position p of the order is row and column n − 1 − p.
    let mut a = vec![0.0f64; n * n];
    a.par_chunks_mut(n).enumerate().for_each(|(col, a)| {
        let from = order[n - 1 - col] as usize;
        for row in col..n {
            let to = order[n - 1 - row] as usize;
            a[row] = f64::from(gram[from.max(to) * n + from.min(to)]);
        }
    });
    let mut dead = 0;
    for j in 0..n {
        let diagonal = &mut a[j * n + j];
        if *diagonal <= 0.0 {
            *diagonal = 1.0;
            dead += 1;
        } else {
            *diagonal *= 1.0 + damp;
        }
    }
    cholesky(&mut a, n)?;
    let pivots: Vec<f64> = (0..n).map(|p| a[(n - 1 - p) * n + (n - 1 - p)].powi(2)).collect();
    let inverse: Vec<f64> = (0..n).map(|p| 1.0 / a[(n - 1 - p) * n + (n - 1 - p)]).collect();
    let mut unit = vec![0.0f32; n * n];
    unit.par_chunks_mut(n).enumerate().for_each(|(p, row)| {
        for i in p + 1..n {
            row[i] = (a[(n - 1 - i) * n + (n - 1 - p)] * inverse[i]) as f32;
        }
    });
    if unit.par_iter().any(|x| !x.is_finite()) {
        return Err(Error::NotPositive(0));
    }
    let unit = Array2::from_shape_vec((n, n), unit).expect("square");
    Ok(Factor { order, unit, pivots, damp, dead })
}

/// Cholesky factor of the lower triangle of the column-major `a`, in place; the upper triangle is scratch.
fn cholesky(a: &mut [f64], n: usize) -> Result<()> {
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        for j in start..end {
            let pivot = a[j * n + j];
            if !(pivot.is_finite() && pivot > 0.0) {
                return Err(Error::NotPositive(j));
            }
            let root = pivot.sqrt();
            a[j * n + j] = root;
            for i in j + 1..end {
                a[j * n + i] /= root;
            }
            for k in j + 1..end {
                let factor = a[j * n + k];
                let (done, open) = a.split_at_mut(k * n);
                let (from, to) = (&done[j * n + k..j * n + end], &mut open[k..end]);
                to.iter_mut().zip(from).for_each(|(t, f)| *t -= factor * f);
            }
        }
        let rest = n - end;
        if rest == 0 {
            break;
        }
        let shared = Shared::new(a);
        (0..rest.div_ceil(TILE)).into_par_iter().for_each(|tile| {
            let row = end + tile * TILE;
            let rows = TILE.min(n - row);
            for j in start..end {
                // SAFETY: each task touches its own rows of the panel, and reads the finished block above them.
                unsafe {
                    let to = std::slice::from_raw_parts_mut(shared.at(j * n + row), rows);
                    for k in start..j {
                        let factor = *shared.at(k * n + j);
                        let from = std::slice::from_raw_parts(shared.at(k * n + row), rows);
                        to.iter_mut().zip(from).for_each(|(t, f)| *t -= factor * f);
                    }
                    let root = *shared.at(j * n + j);
                    to.iter_mut().for_each(|t| *t /= root);
                }
            }
        });
        let tiles: Vec<(usize, usize)> =
            (end..n).step_by(TILE).flat_map(|row| (end..=row).step_by(TILE).map(move |col| (row, col))).collect();
        tiles.into_par_iter().for_each(|(row, col)| {
            let (rows, cols) = (TILE.min(n - row), TILE.min(n - col));
            // SAFETY: each task updates its own tile from the finished panel to its left.
            unsafe {
                gemm(
                    [rows, cols, end - start],
                    shared.at(col * n + row),
                    [1, n],
                    true,
                    shared.at(start * n + row),
                    [1, n],
                    shared.at(start * n + col),
                    [n, 1],
                    [1.0, -1.0],
                );
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::Noise;
    use super::*;

    #[test]
    fn the_product_of_the_factors_is_the_damped_permuted_matrix() {
        let mut noise = Noise(8);
        for n in [1, 2, 7, 97, 300] {
            let gram = super::super::gram::reference(noise.matrix(2 * n + 3, n).view());
            let order: Vec<u32> = (0..n as u32).map(|i| (i * 7 + 3) % n as u32).collect();
            let order = if n == 7 || n == 2 { (0..n as u32).rev().collect() } else { order };
            let factor = run(gram.view(), order.clone(), 0.1).unwrap();
            for p in 0..n {
                for i in p..n {
                    let unit = |p: usize, i: usize| if p == i { 1.0 } else { f64::from(factor.unit[[p, i]]) };
                    let found: f64 = (i..n).map(|k| unit(p, k) * factor.pivots[k] * unit(i, k)).sum();
                    let damped = if p == i { 1.1 } else { 1.0 };
                    let expected = f64::from(gram[[order[p] as usize, order[i] as usize]]) * damped;
                    assert!((found - expected).abs() <= 2e-6 * n as f64, "[{p}, {i}] of {n}: {found}, not {expected}");
                }
            }
        }
    }

    #[test]
    fn an_indefinite_matrix_is_refused_and_a_dead_column_is_not() {
        let indefinite = ndarray::arr2(&[[1.0, 0.0], [2.0, 1.0]]);
        assert!(matches!(run(indefinite.view(), vec![0, 1], 0.01), Err(Error::NotPositive(_))));
        let dead = ndarray::arr2(&[[4.0, 0.0], [0.0, 0.0]]);
        let factor = run(dead.view(), vec![0, 1], 0.0).unwrap();
        assert_eq!((factor.dead, factor.pivots), (1, vec![4.0, 1.0]));
    }
}
