//! Rotary position embedding in the half-split form: element `i` of a head turns with element `i + head_dim/2`.
//!
//! Su et al. 2021, arXiv:2104.09864; the pairing is that of Hugging Face checkpoints.

use ndarray::Array2;
use rayon::prelude::*;

/// The plain loop over one matrix of sequences.
pub fn reference(x: &mut Array2<f32>, cos: &Array2<f32>, sin: &Array2<f32>, lengths: &[usize]) {
    let half = cos.ncols();
    let mut token = 0;
    for &length in lengths {
        for position in 0..length {
            for head in 0..x.ncols() / (2 * half) {
                for i in 0..half {
                    let (a, b) = (head * 2 * half + i, head * 2 * half + half + i);
                    let (p, q) = (x[[token, a]], x[[token, b]]);
                    let (c, s) = (cos[[position, i]], sin[[position, i]]);
                    x[[token, a]] = p * c - q * s;
                    x[[token, b]] = q * c + p * s;
                }
            }
            token += 1;
        }
    }
}

/// Tokens across threads.
pub fn run(x: &mut Array2<f32>, cos: &Array2<f32>, sin: &Array2<f32>, lengths: &[usize]) {
    let (half, cols) = (cos.ncols(), x.ncols());
    let positions: Vec<usize> = lengths.iter().flat_map(|&length| 0..length).collect();
    let data = x.as_slice_mut().expect("a contiguous matrix");
    data.par_chunks_mut(cols).zip(positions).with_min_len(64).for_each(|(row, position)| {
        let (cos, sin) = (cos.row(position), sin.row(position));
        let (cos, sin) = (cos.as_slice().expect("a row"), sin.as_slice().expect("a row"));
        for head in row.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            for (((p, q), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*p, *q) = (*p * c - *q * s, *q * c + *p * s);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::Noise;
    use super::*;

    #[test]
    fn agrees_with_the_plain_loop_and_restarts_at_each_sequence() {
        let mut noise = Noise(3);
        let angle = noise.matrix(9, 3);
        let (cos, sin) = (angle.mapv(f32::cos), angle.mapv(f32::sin));
        let x = noise.matrix(9 + 4 + 1, 12);
        let (mut fast, mut slow) = (x.clone(), x.clone());
        run(&mut fast, &cos, &sin, &[9, 4, 1]);
        reference(&mut slow, &cos, &sin, &[9, 4, 1]);
        assert_eq!(fast, slow);
        assert_ne!(fast, x);
    }
}
