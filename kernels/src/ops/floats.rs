//! A scale for each row from its largest weight, and each weight to the nearest value of E4M3 times that.
//!
//! ```text
//! scale = max |w| / 448, as the file stores it
//! code  = the nearest value of E4M3 to w / scale, ties to the even code, beyond 448 that
//! ```
//!
//! As compressed-tensors makes it of weights in single precision (`calculate_qparams`, `quantize`), but for a row of zeros, which has the
//! scale 0 here. With levels that are closer the smaller they are there is no scale that is better than one that just spans the row.

use formats::encoding::{Block, E4M3, Levels, code_e4m3};
use ndarray::ArrayView2;
use rayon::prelude::*;

use crate::backend::{Grid, GridSpec};

/// Codes `[rows, cols]` of `weight`, and their grid.
///
/// # Panics
/// Unless the encoding is of E4M3 with a scale for each row: a mistake of the caller.
pub fn run(weight: ArrayView2<f32>, spec: &GridSpec) -> (Vec<u8>, Grid) {
    let encoding = &spec.encoding;
    assert!(encoding.block == Block::Row && encoding.levels == Levels::Table(&E4M3), "E4M3 with a scale for each row");
    let (rows, cols) = (weight.nrows(), weight.ncols());
    let data = weight.to_slice().expect("a contiguous matrix");
    let (mut codes, mut scales) = (vec![0; rows * cols], vec![0.0; rows]);
    if cols > 0 {
        let rows = codes.par_chunks_exact_mut(cols).zip(data.par_chunks_exact(cols)).zip(&mut scales);
        rows.for_each(|((codes, row), scale)| {
            let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            *scale = encoding.precision().round(largest / 448.0);
            if *scale > 0.0 {
                codes.iter_mut().zip(row).for_each(|(code, x)| *code = code_e4m3(x / *scale));
            }
        });
    }
    let zeros = vec![0; rows];
    (codes, Grid::of_integers(spec.clone(), rows, scales, zeros))
}

#[cfg(test)]
mod tests {
    use formats::{Encoding, Float};

    use super::super::testing::Noise;
    use super::*;
    use crate::ops::encoded;

    #[test]
    fn rows_are_those_of_the_plain_loop() {
        for scale in [Float::F32, Float::F16, Float::BF16] {
            let encoding = Encoding::fp8(Block::Row).stored_in(scale, 0);
            let mut weight = Noise(41).matrix(9, 77);
            weight.row_mut(3).fill(0.0);
            let (codes, grid) = run(weight.view(), &GridSpec::of(encoding, 77));
            let plain = encoded::quantize(weight.view(), &encoding);
            assert_eq!(grid.scales, plain.scales);
            let values = plain.dequantize();
            for ((row, col), x) in weight.indexed_iter() {
                let found = grid.scales[row] * E4M3[usize::from(codes[row * 77 + col])];
                // Between two values that are as near the plain loop takes the one of the smaller code.
                let (a, b) = ((found - x).abs(), (values[[row, col]] - x).abs());
                assert!(a <= b * (1.0 + 1e-5) + 1e-9, "{x}: {found} and not {}", values[[row, col]]);
            }
        }
    }
}
