//! Values as files store them, widened.

use formats::Dtype;

use crate::simd_fn;

/// `bytes` (little-endian) as `f32`, as [`formats::tensor::widen`] gives them. Fails where the lengths differ.
pub fn run(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> formats::Result<()> {
    match dtype {
        Dtype::BF16 if bytes.len() == 2 * out.len() => {
            bf16(bytes, out);
            Ok(())
        }
        // These have loops of their own for the CPU's instructions.
        _ => formats::tensor::widen(dtype, bytes, out),
    }
}

simd_fn! {
    fn bf16(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_format() {
        let bytes: Vec<u8> = (0..4096u32).map(|i| ((i * 7919) >> 3) as u8).collect();
        for (dtype, size) in [(Dtype::BF16, 2), (Dtype::F16, 2), (Dtype::F32, 4)] {
            for count in [0, 1, 17, 1000] {
                let (mut fast, mut plain) = (vec![0.0; count], vec![0.0; count]);
                // Where it begins in memory makes no difference.
                let bytes = &bytes[1..][..size * count];
                run(dtype, bytes, &mut fast).unwrap();
                formats::tensor::widen(dtype, bytes, &mut plain).unwrap();
                assert!(fast.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits()), "{dtype}, {count}");
            }
            assert!(run(dtype, &bytes[..3], &mut [0.0; 2]).is_err());
        }
    }
}
