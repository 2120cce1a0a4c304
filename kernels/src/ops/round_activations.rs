//! What ggml's CPU backend makes of an activation before it multiplies it with a weight: 16 bits, or blocks of 8.
//!
//! `x` is `[tokens, features]`, each row on its own, blocks of consecutive features. With `a` the largest magnitude of a
//! block a value becomes `d · round(x · 127 / a)`, halves to even as ggml's vector forms have it, and `d` is `a / 127`,
//! which `Q8_0` and `Q8_1` store as f16 and `Q8_K` as f32. (`Q8_1` also stores a block's sum as f16, which is not
//! followed.) Source: `quantize_row_q8_0`, `quantize_row_q8_K_ref` and `type_traits_cpu` in llama.cpp's ggml.

use half::{bf16, f16};
use ndarray::Array2;
use rayon::prelude::*;

use crate::backend::ActivationRounding;
use crate::simd_fn;

/// Values that a task rounds at a time: whole blocks of every kind.
const TASK: usize = 1 << 14;

/// One row, value by value.
///
/// # Panics
/// Unless the row is whole blocks.
pub fn reference(row: &[f32], kind: ActivationRounding) -> Vec<f32> {
    assert!(row.len().is_multiple_of(kind.block_len()), "whole blocks of {kind:?}");
    let block = |values: &[f32]| -> Vec<f32> {
        let largest = values.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let (d, inverse) = match kind {
            ActivationRounding::Q8K => (1.0 / (127.0 / largest), 127.0 / largest),
            _ => (f16::from_f32(largest / 127.0).to_f32(), 127.0 / largest),
        };
        let scaled = |x: &f32| if inverse.is_finite() { d * (x * inverse).round_ties_even() } else { x * 0.0 };
        values.iter().map(scaled).collect()
    };
    match kind {
        ActivationRounding::F16 => row.iter().map(|x| f16::from_f32(*x).to_f32()).collect(),
        ActivationRounding::Bf16 => row.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
        ActivationRounding::Q8_0 | ActivationRounding::Q8K => {
            row.chunks_exact(kind.block_len()).flat_map(block).collect()
        }
    }
}

/// Rounds every row of `x` in place.
///
/// # Panics
/// Unless rows are whole blocks, and contiguous.
pub fn run(x: &mut Array2<f32>, kind: ActivationRounding) {
    let width = x.ncols();
    assert!(width.is_multiple_of(kind.block_len()), "whole blocks of {kind:?}");
    // Rows are whole blocks, so that what is cut into blocks may as well be all of them.
    let values = x.as_slice_mut().expect("contiguous");
    values.par_chunks_mut(TASK).for_each(|part| match kind {
        ActivationRounding::F16 => part.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
        ActivationRounding::Bf16 => part.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        ActivationRounding::Q8_0 => blocks::<32>(part, true),
        ActivationRounding::Q8K => blocks::<256>(part, false),
    });
}

fn blocks<const LEN: usize>(values: &mut [f32], half: bool) {
    for block in values.chunks_exact_mut(LEN) {
        let largest = largest(block);
        let inverse = 127.0 / largest;
        let d = if half { f16::from_f32(largest / 127.0).to_f32() } else { 1.0 / inverse };
        // Of zeros, or of numbers so small that nothing is left of them. What is not a number stays that.
        let [d, inverse] = if inverse.is_finite() { [d, inverse] } else { [0.0, 0.0] };
        scale(block, d, inverse);
    }
}

simd_fn! {
    /// The largest magnitude of whole lanes.
    fn largest(block: &[f32]) -> f32 {
        let mut lanes = [0.0f32; 16];
        for values in block.chunks_exact(16) {
            for (lane, x) in lanes.iter_mut().zip(values) {
                *lane = if x.abs() > *lane { x.abs() } else { *lane };
            }
        }
        lanes.iter().fold(0.0f32, |largest, x| largest.max(*x))
    }
}

simd_fn! {
    fn scale(block: &mut [f32], d: f32, inverse: f32) {
        for x in block {
            *x = d * (*x * inverse).round_ties_even();
        }
    }
}

#[cfg(test)]
mod tests {
    use formats::ggml::TYPES;
    use proptest::prelude::*;

    use super::super::testing::Noise;
    use super::*;
    use crate::simd::testing::same_at_every_level;

    const KINDS: [ActivationRounding; 4] =
        [ActivationRounding::F16, ActivationRounding::Bf16, ActivationRounding::Q8_0, ActivationRounding::Q8K];

    #[test]
    fn every_type_is_multiplied_with_what_ggml_multiplies_it_with() {
        use ActivationRounding::{Bf16, F16, Q8_0, Q8K};
        for ty in TYPES {
            let expected = match ty.name {
                "F32" => None,
                "F16" => Some(F16),
                "BF16" => Some(Bf16),
                "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1" | "Q8_0" | "IQ4_NL" | "MXFP4" => Some(Q8_0),
                "Q2_K" | "Q3_K" | "Q4_K" | "Q5_K" | "Q6_K" | "IQ4_XS" | "TQ1_0" | "TQ2_0" => Some(Q8K),
                other => panic!("look {other} up in type_traits_cpu"),
            };
            assert_eq!(ActivationRounding::beside(*ty), expected, "{ty}");
        }
    }

    #[test]
    fn eight_bits_are_those_of_ggml() {
        // The file format's own encoder of Q8_0 rounds alike but for halves, which numbers such as these do not hit.
        let mut noise = Noise(3);
        let row: Vec<f32> = (0..4096).map(|_| noise.next() * 3.0).collect();
        let q8_0 = formats::GgmlType::from_name("Q8_0").unwrap();
        let mut bytes = vec![0; q8_0.row_bytes(row.len()).unwrap()];
        q8_0.encode(&row, &mut bytes).unwrap();
        let mut stored = vec![0.0; row.len()];
        q8_0.dequantize(&bytes, &mut stored).unwrap();
        assert_eq!(reference(&row, ActivationRounding::Q8_0), stored);
        let step = row[..256].iter().fold(0.0f32, |largest, x| largest.max(x.abs())) / 127.0;
        for (found, x) in reference(&row[..256], ActivationRounding::Q8K).iter().zip(&row) {
            let steps = found / step;
            assert!((found - x).abs() <= 0.501 * step && (steps - steps.round()).abs() < 1e-4, "{x} became {found}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_plain_form(rows in 1usize..40, blocks in 1usize..4, exponent in -44i32..7, seed: u64) {
            let mut noise = Noise(seed);
            for kind in KINDS {
                let cols = blocks * kind.block_len() * if kind.block_len() == 1 { 37 } else { 1 };
                let mut x = noise.matrix(rows, cols) * 10f32.powi(exponent);
                x.row_mut(0).fill(0.0);
                let found = same_at_every_level(&format!("{kind:?}"), || {
                    let mut found = x.clone();
                    run(&mut found, kind);
                    found
                });
                for (found, row) in found.rows().into_iter().zip(x.rows()) {
                    prop_assert_eq!(found.to_vec(), reference(row.as_slice().unwrap(), kind));
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for kind in KINDS {
            for broken in [f32::NAN, f32::INFINITY] {
                let mut x = Array2::from_elem((2, 256), 1.0);
                x[[1, 3]] = broken;
                run(&mut x, kind);
                assert!(x.row(0).iter().all(|x| (x - 1.0).abs() < 1e-3) && !x[[1, 3]].is_finite(), "{kind:?}");
            }
        }
    }
}
