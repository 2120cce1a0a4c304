//! Rotary position embedding: pairs of values of each head turn by angles that depend on the token's position.
//!
//! Su et al. 2021, arXiv:2104.09864. Of a part `2n` wide, element `i` turns with element `i + n`, as Hugging Face
//! checkpoints have it, or, interleaved, element `2i` with element `2i + 1`.

use ndarray::Array2;
use rayon::prelude::*;

use crate::backend::RopeLayout;
use crate::simd_fn;

/// The plain loop over one matrix of sequences.
pub fn reference(x: &mut Array2<f32>, cos: &Array2<f32>, sin: &Array2<f32>, layout: &RopeLayout, lengths: &[usize]) {
    let RopeLayout { head_dim, first, interleaved } = *layout;
    let half = cos.ncols();
    let mut token = 0;
    for &length in lengths {
        for position in 0..length {
            for head in 0..x.ncols() / head_dim {
                for i in 0..half {
                    let start = head * head_dim + first;
                    let [a, b] = if interleaved { [2 * i, 2 * i + 1] } else { [i, half + i] }.map(|i| start + i);
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
pub fn run(x: &mut Array2<f32>, cos: &Array2<f32>, sin: &Array2<f32>, layout: &RopeLayout, lengths: &[usize]) {
    let cols = x.ncols().max(1);
    let positions: Vec<usize> = lengths.iter().flat_map(|&length| 0..length).collect();
    let data = x.as_slice_mut().expect("a contiguous matrix");
    data.par_chunks_mut(cols).zip(positions).with_min_len(64).for_each(|(row, position)| {
        let (cos, sin) = (cos.row(position), sin.row(position));
        turn(row, cos.as_slice().expect("a row"), sin.as_slice().expect("a row"), layout);
    });
}

simd_fn! {
    /// All heads of one token.
    fn turn(row: &mut [f32], cos: &[f32], sin: &[f32], layout: &RopeLayout) {
        let half = cos.len();
        for head in row.chunks_exact_mut(layout.head_dim) {
            let part = &mut head[layout.first..][..2 * half];
            if layout.interleaved {
                for ((pair, c), s) in part.chunks_exact_mut(2).zip(cos).zip(sin) {
                    (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
                }
            } else {
                let (first, second) = part.split_at_mut(half);
                for (((p, q), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*p, *q) = (*p * c - *q * s, *q * c + *p * s);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::Noise;
    use super::*;

    proptest! {
        #[test]
        fn agrees_with_the_plain_loop_and_restarts_at_each_sequence(
            heads in 1usize..5, first in 0usize..6, half in 0usize..20, after in 0usize..4, interleaved: bool,
            lengths in prop::collection::vec(0usize..90, 0..4), seed: u64,
        ) {
            let mut noise = Noise(seed);
            let layout = RopeLayout { head_dim: first + 2 * half + after + 1, first, interleaved };
            let angle = noise.matrix(90, half);
            let (cos, sin) = (angle.mapv(f32::cos), angle.mapv(f32::sin));
            let x = noise.matrix(lengths.iter().sum(), heads * layout.head_dim);
            let (mut fast, mut slow) = (x.clone(), x);
            run(&mut fast, &cos, &sin, &layout, &lengths);
            reference(&mut slow, &cos, &sin, &layout, &lengths);
            prop_assert_eq!(fast, slow);
        }
    }

    #[test]
    fn a_quarter_turn_swaps_the_pairs() {
        let (cos, sin) = (Array2::zeros((1, 2)), Array2::ones((1, 2)));
        let check = |first, interleaved, expected: [f32; 6]| {
            let mut x = Array2::from_shape_vec((1, 6), vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
            run(&mut x, &cos, &sin, &RopeLayout { head_dim: 6, first, interleaved }, &[1]);
            assert_eq!(x.as_slice().unwrap(), expected);
        };
        check(0, false, [-3.0, -4.0, 1.0, 2.0, 5.0, 6.0]);
        check(2, false, [1.0, 2.0, -5.0, -6.0, 3.0, 4.0]);
        check(2, true, [1.0, 2.0, -4.0, 3.0, -6.0, 5.0]);
    }
}
