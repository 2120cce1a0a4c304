//! Sums into the residual stream: all of a matrix, a multiple of it, or some rows each with its weight.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

const CHUNK: usize = 1 << 14;

/// `a ← a + b`.
pub fn run(a: &mut [f32], b: &[f32]) {
    a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    });
}

/// `a ← a + factor · b`.
pub fn scaled(a: &mut [f32], factor: f32, b: &[f32]) {
    a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += factor * b);
    });
}

/// The plain loop of [`rows`].
pub fn rows_reference(x: ArrayView2<f32>, rows: &[usize], weights: &[f32], y: &mut Array2<f32>) {
    for (i, &row) in rows.iter().enumerate() {
        for col in 0..x.ncols() {
            y[[row, col]] += weights[i] * x[[i, col]];
        }
    }
}

/// Which row of `x` goes to each of `count` rows; or the row that is named twice, or is none.
pub fn sources(rows: &[usize], count: usize) -> Result<Vec<Option<usize>>, usize> {
    let mut sources = vec![None; count];
    for (i, &row) in rows.iter().enumerate() {
        match sources.get_mut(row) {
            Some(source @ None) => *source = Some(i),
            _ => return Err(row),
        }
    }
    Ok(sources)
}

/// `y[row] ← y[row] + weights[i] · x[i]` where `sources[row]` is `i`; rows of `y` across threads.
pub fn rows(x: ArrayView2<f32>, sources: &[Option<usize>], weights: &[f32], y: &mut Array2<f32>) {
    let cols = x.ncols().max(1);
    let x = x.to_slice().expect("a contiguous matrix");
    let y = y.as_slice_mut().expect("a contiguous matrix").par_chunks_exact_mut(cols);
    y.zip(sources).with_min_len(64).for_each(|(y, source)| {
        if let Some(i) = *source {
            y.iter_mut().zip(&x[i * cols..][..cols]).for_each(|(y, x)| *y += weights[i] * x);
        }
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::Noise;
    use super::*;

    proptest! {
        #[test]
        fn rows_agree_with_the_plain_loop(
            tokens in 1usize..300, cols in 1usize..40, some in 0usize..400, seed: u64,
        ) {
            let mut noise = Noise(seed);
            // Distinct rows in no order.
            let mut rows: Vec<usize> = (0..tokens).collect();
            rows.sort_by_key(|row| (row * 7919 + seed as usize % 1000) % 293);
            rows.truncate(some);
            let (x, mut fast) = (noise.matrix(rows.len(), cols), noise.matrix(tokens, cols));
            let weights: Vec<f32> = rows.iter().map(|_| noise.next()).collect();
            let mut slow = fast.clone();
            rows_reference(x.view(), &rows, &weights, &mut slow);
            super::rows(x.view(), &sources(&rows, tokens).unwrap(), &weights, &mut fast);
            prop_assert_eq!(fast, slow);
        }

        #[test]
        fn multiples_are_added_everywhere(len in 0usize..40_000, factor in -3.0f32..3.0, seed: u64) {
            let mut noise = Noise(seed);
            let [a, b]: [Vec<f32>; 2] = std::array::from_fn(|_| (0..len).map(|_| noise.next()).collect());
            let (mut multiple, mut whole) = (a.clone(), a.clone());
            scaled(&mut multiple, factor, &b);
            run(&mut whole, &b);
            for i in 0..len {
                prop_assert_eq!(multiple[i], a[i] + factor * b[i]);
                prop_assert_eq!(whole[i], a[i] + b[i]);
            }
        }
    }

    #[test]
    fn rows_named_twice_or_beyond_the_end_are_found() {
        assert_eq!(sources(&[2, 0], 3), Ok(vec![Some(1), None, Some(0)]));
        assert_eq!(sources(&[2, 0, 2], 3), Err(2));
        assert_eq!(sources(&[1, 3], 3), Err(3));
    }
}
