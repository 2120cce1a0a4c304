//! Heads of two parts: `[tokens, heads·a]` of their own and `[tokens, b]` that all share make `[tokens, heads·(a + b)]`.
//!
//! So the keys of multi-head latent attention are put together (DeepSeek-V2 2024, arXiv:2405.04434). And one number a head, `[tokens, heads]`,
//! becomes one for each of its values, as a gate of whole heads is.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

/// The plain loop.
pub fn reference(own: ArrayView2<f32>, shared: ArrayView2<f32>, heads: usize) -> Array2<f32> {
    let (a, b) = (own.ncols() / heads, shared.ncols());
    Array2::from_shape_fn((own.nrows(), heads * (a + b)), |(token, col)| match (col / (a + b), col % (a + b)) {
        (head, i) if i < a => own[[token, head * a + i]],
        (_, i) => shared[[token, i - a]],
    })
}

/// Tokens across threads.
pub fn run(own: ArrayView2<f32>, shared: ArrayView2<f32>, heads: usize) -> Array2<f32> {
    let (a, b) = (own.ncols() / heads, shared.ncols());
    let mut out = Array2::zeros((own.nrows(), heads * (a + b)));
    let [own, shared] = [own, shared].map(|m| m.to_slice().expect("a contiguous matrix"));
    let rows = out.as_slice_mut().expect("a contiguous matrix").par_chunks_exact_mut((heads * (a + b)).max(1));
    rows.enumerate().with_min_len(64).for_each(|(token, row)| {
        for (head, values) in row.chunks_exact_mut(a + b).enumerate() {
            let (first, second) = values.split_at_mut(a);
            first.copy_from_slice(&own[(token * heads + head) * a..][..a]);
            second.copy_from_slice(&shared[token * b..][..b]);
        }
    });
    out
}

/// `[tokens, heads·width]`: each value of `x` `[tokens, heads]` so many times.
pub fn spread(x: ArrayView2<f32>, width: usize) -> Array2<f32> {
    let values = x.iter().flat_map(|value| std::iter::repeat_n(*value, width)).collect();
    Array2::from_shape_vec((x.nrows(), x.ncols() * width), values).expect("as many values")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::Noise;
    use super::*;

    #[test]
    fn every_value_of_a_head_gets_that_of_its_head() {
        let x = Noise(7).matrix(3, 2);
        let spread = spread(x.view(), 4);
        assert_eq!(spread, Array2::from_shape_fn((3, 8), |(token, col)| x[[token, col / 4]]));
    }

    proptest! {
        #[test]
        fn agrees_with_the_plain_loop(
            tokens in 0usize..150, heads in 1usize..8, a in 0usize..20, b in 0usize..20, seed: u64,
        ) {
            let mut noise = Noise(seed);
            let (own, shared) = (noise.matrix(tokens, heads * a), noise.matrix(tokens, b));
            prop_assert_eq!(run(own.view(), shared.view(), heads), reference(own.view(), shared.view(), heads));
        }
    }
}
