//! `cap · tanh(x / cap)`: large values bend towards `±cap` (Gemma 2 2024, arXiv:2408.00118).

use rayon::prelude::*;

use crate::simd::tanh;
use crate::simd_fn;

/// One value, in `f64`.
pub fn reference(x: f32, cap: f32) -> f32 {
    (f64::from(cap) * (f64::from(x) / f64::from(cap)).tanh()) as f32
}

/// `x ← cap · tanh(x / cap)`, in parts across threads.
pub fn run(x: &mut [f32], cap: f32) {
    x.par_chunks_mut(1 << 14).for_each(|x| scaled(x, 1.0, cap));
}

simd_fn! {
    /// `x ← cap · tanh(scale · x / cap)`, one thread's share.
    pub(super) fn scaled(x: &mut [f32], scale: f32, cap: f32) {
        for x in x.iter_mut() {
            *x = cap * tanh(scale * *x / cap);
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
        fn agrees_with_the_plain_form(len in 0usize..40_000, cap in 0.5f32..60.0, seed: u64) {
            let mut noise = Noise(seed);
            let x: Vec<f32> = (0..len).map(|i| noise.next() * [1e-4, 1.0, 100.0][i % 3]).collect();
            let mut found = x.clone();
            run(&mut found, cap);
            for (found, x) in found.into_iter().zip(x) {
                let expected = reference(x, cap);
                prop_assert!((found - expected).abs() <= 5e-7 * expected.abs(), "{} of {}, not {}", found, x, expected);
            }
        }
    }
}
