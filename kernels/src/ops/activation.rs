//! Pointwise steps: the SiLU gate and the residual sum.

use rayon::prelude::*;

use crate::simd::exp;
use crate::simd_fn;

const CHUNK: usize = 1 << 14;

/// `x · σ(x)`, in `f64`.
pub fn silu_reference(x: f32) -> f32 {
    (f64::from(x) / (1.0 + (-f64::from(x)).exp())) as f32
}

/// `gate ← silu(gate) · up`.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    gate.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(gate, up)| silu_mul_chunk(gate, up));
}

simd_fn! {
    /// One thread's share.
    pub(super) fn silu_mul_chunk(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
}

/// `a ← a + b`.
pub fn add(a: &mut [f32], b: &[f32]) {
    a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::Noise;
    use super::*;

    #[test]
    fn silu_agrees_with_the_plain_form() {
        let mut noise = Noise(4);
        let x: Vec<f32> = (0..CHUNK + 37).map(|_| noise.next() * 20.0).chain([0.0, 200.0, -200.0]).collect();
        let up: Vec<f32> = x.iter().map(|_| noise.next()).collect();
        let mut gate = x.clone();
        silu_mul(&mut gate, &up);
        for i in 0..x.len() {
            let expected = silu_reference(x[i]) * up[i];
            assert!((gate[i] - expected).abs() <= 1e-6 * expected.abs() + 1e-30, "silu({}) · {}", x[i], up[i]);
        }
    }
}
