//! Adds the product of two thin matrices to a matrix, and measures its rows and columns: what merging LoRA and DoRA takes
//! (Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353).
//!
//! Weights are merged while they are read, before a device is chosen, so these are functions on slices.

use rayon::prelude::*;

use super::{Shared, gemm};

/// Rows of one task.
const TILE: usize = 64;

/// A matrix with any strides, `[row, column]` in elements.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// From one row, and from one column, to the next.
    pub strides: [usize; 2],
}

/// The plain loop, in `f64`: `w ← w + scale · left · right` with `w` `[rows, cols]`, `left` `[rows, rank]`, `right` `[rank, cols]`.
pub fn reference(w: &mut [f32], [rows, cols, rank]: [usize; 3], left: Strided<'_>, right: Strided<'_>, scale: f32) {
    let at = |m: Strided<'_>, row: usize, col: usize| f64::from(m.data[row * m.strides[0] + col * m.strides[1]]);
    for row in 0..rows {
        for col in 0..cols {
            let product: f64 = (0..rank).map(|k| at(left, row, k) * at(right, k, col)).sum();
            let w = &mut w[row * cols + col];
            *w = (f64::from(*w) + f64::from(scale) * product) as f32;
        }
    }
}

/// Rows across threads; sums in `f32`.
///
/// Panics when a matrix is smaller than its shape and strides say.
pub fn run(w: &mut [f32], [rows, cols, rank]: [usize; 3], left: Strided<'_>, right: Strided<'_>, scale: f32) {
    assert_eq!(w.len(), rows * cols, "the shape of the matrix");
    if w.is_empty() || rank == 0 {
        return;
    }
    for (m, [height, width]) in [(left, [rows, rank]), (right, [rank, cols])] {
        assert!((height - 1) * m.strides[0] + (width - 1) * m.strides[1] < m.data.len(), "the shape of a factor");
    }
    let out = Shared::new(w);
    (0..rows.div_ceil(TILE)).into_par_iter().for_each(|tile| {
        let first = tile * TILE;
        let height = TILE.min(rows - first);
        let left_tile = left.data[first * left.strides[0]..].as_ptr();
        // SAFETY: the shapes were checked above, and each task writes rows of its own.
        unsafe {
            let shape = [height, cols, rank];
            let c = out.at(first * cols);
            gemm(shape, c, [cols, 1], true, left_tile, left.strides, right.data.as_ptr(), right.strides, [1.0, scale]);
        }
    });
}

/// The length of every row of `w` `[rows, cols]`.
pub fn row_lengths(w: &[f32], cols: usize) -> Vec<f32> {
    let length = |row: &[f32]| row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32;
    w.par_chunks(cols).map(length).collect()
}

/// Adds the squares of every column of `w` `[rows, cols]` to `sums`.
pub fn add_column_squares(w: &[f32], sums: &mut [f64]) {
    for row in w.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v) * f64::from(*v));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Noise, close};
    use super::*;

    #[test]
    fn agrees_with_the_plain_loop_in_either_orientation() {
        let mut noise = Noise(5);
        for (rows, cols, rank) in [(1, 1, 1), (3, 17, 2), (64, 8, 16), (131, 70, 5)] {
            let w = noise.matrix(rows, cols).into_raw_vec_and_offset().0;
            let (left, right) = (noise.matrix(rows, rank), noise.matrix(rank, cols));
            let (left_t, right_t) =
                (left.t().as_standard_layout().to_owned(), right.t().as_standard_layout().to_owned());
            let mut expected = w.clone();
            let l = Strided { data: left.as_slice().unwrap(), strides: [rank, 1] };
            let r = Strided { data: right.as_slice().unwrap(), strides: [cols, 1] };
            reference(&mut expected, [rows, cols, rank], l, r, 0.75);
            let mut found = w.clone();
            run(&mut found, [rows, cols, rank], l, r, 0.75);
            close(&found, &expected, 1e-6);
            let l = Strided { data: left_t.as_slice().unwrap(), strides: [1, rows] };
            let r = Strided { data: right_t.as_slice().unwrap(), strides: [1, rank] };
            let mut found = w;
            run(&mut found, [rows, cols, rank], l, r, 0.75);
            close(&found, &expected, 1e-6);
        }
    }

    #[test]
    fn lengths_are_those_of_rows_and_columns() {
        let w = [3.0, 0.0, 4.0, 12.0, 0.0, 5.0];
        assert_eq!(row_lengths(&w, 3), [5.0, 13.0]);
        let mut sums = [0.0; 3];
        add_column_squares(&w, &mut sums);
        assert_eq!(sums, [153.0, 0.0, 41.0]);
    }
}
