//! What a runtime makes of an activation before it multiplies it with a weight: 16 bits, or 8 for a block or a token.
//!
//! `x` is `[tokens, features]`, each row on its own, blocks of consecutive features. With `a` the largest magnitude of a
//! block a value becomes `d · round(x · 127 / a)`, halves to even as ggml's vector forms have it, and `d` is `a / 127`,
//! which `Q8_0` and `Q8_1` store as f16 and `Q8_K` as f32. (`Q8_1` also stores a block's sum as f16, which is not
//! followed.) Source: `quantize_row_q8_0`, `quantize_row_q8_K_ref` and `type_traits_cpu` in llama.cpp's ggml.
//!
//! vLLM rounds token by token: to 8 bits as above, with `d = a / 127` in single precision, and to E4M3 as `d · e4m3(x / d)` with
//! `d = a / 448`, at least `1 / (448 · 512)`. Source: `dynamic_scaled_int8_quant` and `dynamic_per_token_scaled_fp8_quant` in its csrc.
//! (The library compressed-tensors, which transformers calls, divides by 127.5 where vLLM divides by 127.)

use formats::encoding::round_e4m3;
use half::{bf16, f16};
use ndarray::Array2;
use rayon::prelude::*;

use crate::backend::ActivationRounding;
use crate::simd_fn;

/// Values that a task rounds at a time: whole blocks of every kind.
const TASK: usize = 1 << 14;
/// vLLM divides by no smaller scale than this.
const SMALLEST_FP8_SCALE: f32 = 1.0 / (448.0 * 512.0);

/// One row, value by value.
///
/// # Panics
/// Unless the row is whole blocks.
pub fn reference(row: &[f32], kind: ActivationRounding) -> Vec<f32> {
    assert!(row.len().is_multiple_of(kind.block_len()), "whole blocks of {kind:?}");
    let block = |values: &[f32]| -> Vec<f32> {
        let largest = values.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let inverse = 127.0 / largest;
        let d = match kind {
            ActivationRounding::Fp8Token => {
                let d = (largest / 448.0).max(SMALLEST_FP8_SCALE);
                return values.iter().map(|x| d * round_e4m3(x / d)).collect();
            }
            ActivationRounding::Q8_0 => f16::from_f32(largest / 127.0).to_f32(),
            ActivationRounding::Q8K => 1.0 / inverse,
            _ => largest / 127.0,
        };
        let scaled = |x: &f32| if inverse.is_finite() { d * (x * inverse).round_ties_even() } else { x * 0.0 };
        values.iter().map(scaled).collect()
    };
    match kind {
        ActivationRounding::F16 => row.iter().map(|x| f16::from_f32(*x).to_f32()).collect(),
        ActivationRounding::Bf16 => row.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
        _ => row.chunks_exact(block_len(kind, row.len())).flat_map(block).collect(),
    }
}

/// Values of a row of `width` that are rounded together: of a token all.
fn block_len(kind: ActivationRounding, width: usize) -> usize {
    match kind {
        ActivationRounding::Int8Token | ActivationRounding::Fp8Token => width.max(1),
        _ => kind.block_len(),
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
    let length = block_len(kind, width);
    let values = x.as_slice_mut().expect("contiguous");
    values.par_chunks_mut((TASK / length).max(1) * length).for_each(|part| match kind {
        ActivationRounding::F16 => part.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
        ActivationRounding::Bf16 => part.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        _ => part.chunks_exact_mut(length).for_each(|block| round_block(block, kind)),
    });
}

fn round_block(block: &mut [f32], kind: ActivationRounding) {
    // A token need not be whole lanes.
    let (lanes, rest) = block.split_at(block.len() / 16 * 16);
    let largest = rest.iter().fold(largest(lanes), |largest, x| if x.abs() > largest { x.abs() } else { largest });
    let inverse = 127.0 / largest;
    let d = match kind {
        ActivationRounding::Fp8Token => return scale_floats(block, (largest / 448.0).max(SMALLEST_FP8_SCALE)),
        ActivationRounding::Q8_0 => f16::from_f32(largest / 127.0).to_f32(),
        ActivationRounding::Q8K => 1.0 / inverse,
        _ => largest / 127.0,
    };
    // Of zeros, or of numbers so small that nothing is left of them. What is not a number stays that.
    let [d, inverse] = if inverse.is_finite() { [d, inverse] } else { [0.0, 0.0] };
    scale(block, d, inverse);
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

simd_fn! {
    fn scale_floats(row: &mut [f32], d: f32) {
        for x in row {
            *x = d * round_e4m3(*x / d);
        }
    }
}

#[cfg(test)]
mod tests {
    use formats::encoding::{E4M3, PRESETS};
    use formats::ggml::TYPES;
    use proptest::prelude::*;

    use super::super::testing::Noise;
    use super::*;
    use crate::simd::testing::same_at_every_level;

    const KINDS: [ActivationRounding; 6] = [
        ActivationRounding::F16,
        ActivationRounding::Bf16,
        ActivationRounding::Q8_0,
        ActivationRounding::Q8K,
        ActivationRounding::Int8Token,
        ActivationRounding::Fp8Token,
    ];

    #[test]
    fn every_type_is_multiplied_with_what_ggml_multiplies_it_with() {
        use ActivationRounding::{Bf16, F16, Fp8Token, Int8Token, Q8_0, Q8K};
        for ty in TYPES {
            let expected = match ty.name {
                "F32" => None,
                "F16" => Some(F16),
                "BF16" => Some(Bf16),
                "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1" | "Q8_0" | "IQ4_NL" | "MXFP4" => Some(Q8_0),
                "Q2_K" | "Q3_K" | "Q4_K" | "Q5_K" | "Q6_K" | "IQ4_XS" | "TQ1_0" | "TQ2_0" => Some(Q8K),
                other => panic!("look {other} up in type_traits_cpu"),
            };
            assert_eq!(ActivationRounding::beside(&ty.encoding()), expected, "{ty}");
        }
        for (name, expected) in
            [("W8A8", Some(Int8Token)), ("FP8_DYNAMIC", Some(Fp8Token)), ("W4A16", None), ("FP8", None)]
        {
            let encoding = PRESETS.iter().find(|(known, _)| *known == name).unwrap().1;
            assert_eq!(ActivationRounding::beside(&encoding), expected, "{name}");
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

    /// What a token keeps are 255 levels around 0, or E4M3's numbers, times a scale that its largest value decides.
    #[test]
    fn a_token_keeps_levels_of_its_own() {
        let row: Vec<f32> = (0..77).map(|i| (i as f32 - 30.0) * 0.031).collect();
        let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        for (found, x) in reference(&row, ActivationRounding::Int8Token).iter().zip(&row) {
            let code = found / (largest / 127.0);
            assert!(
                (code - code.round()).abs() < 1e-4 && (found - x).abs() <= 0.5001 * largest / 127.0,
                "{x}: {found}"
            );
        }
        for (found, x) in reference(&row, ActivationRounding::Fp8Token).iter().zip(&row) {
            let level = found / (largest / 448.0);
            let near =
                E4M3.iter().filter(|level| level.is_finite()).map(|other| (other - level).abs()).fold(1e9, f32::min);
            assert!(near <= 1e-5 * level.abs() && (found - x).abs() <= x.abs() / 15.9 + 1e-5, "{x}: {found}");
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
