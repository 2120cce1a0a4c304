//! The pointwise functions of feed-forward layers, alone and as a gate.

use rayon::prelude::*;

use crate::backend::Activation;
use crate::simd::exp;
use crate::simd_fn;

const CHUNK: usize = 1 << 14;

/// One value, in `f64`; of [`Activation::SwigluOai`] and [`Activation::SiluWithin`] the factor that depends on the gate.
pub fn reference(activation: Activation, x: f32) -> f32 {
    let x = f64::from(x);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let value = match activation {
        Activation::Silu => x * sigmoid(x),
        Activation::Identity => x,
        Activation::Gelu => 0.5 * x * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Relu2 => x.max(0.0).powi(2),
        Activation::SwigluOai { alpha, limit, .. } => {
            let gate = x.min(f64::from(limit));
            gate * sigmoid(f64::from(alpha) * gate)
        }
        Activation::SiluWithin { limit } => (x * sigmoid(x)).min(f64::from(limit)),
        Activation::Sigmoid => sigmoid(x),
        Activation::Xielu { positive, negative, beta, eps } => {
            let [positive, negative, beta, eps] = [positive, negative, beta, eps].map(f64::from);
            match x > 0.0 {
                true => positive * x * x + beta * x,
                false => negative * (x.min(eps).exp_m1() - x) + beta * x,
            }
        }
    };
    value as f32
}

/// `act(gate) · up` of one pair.
pub fn gate_reference(activation: Activation, gate: f32, up: f32) -> f32 {
    let up = match activation {
        Activation::SwigluOai { limit, shift, .. } => up.clamp(-limit, limit) + shift,
        Activation::SiluWithin { limit } => up.clamp(-limit, limit),
        _ => up,
    };
    reference(activation, gate) * up
}

/// `x ← act(x)`.
pub fn run(activation: Activation, x: &mut [f32]) {
    x.par_chunks_mut(CHUNK).for_each(|x| run_chunk(activation, x));
}

/// `gate ← act(gate) · up`.
pub fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    gate.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(gate, up)| gate_chunk(activation, gate, up));
}

simd_fn! {
    /// One thread's share of [`run`].
    pub(super) fn run_chunk(activation: Activation, x: &mut [f32]) {
        match activation {
            Activation::Silu => each(x, silu),
            Activation::Identity => {}
            Activation::Gelu => each(x, gelu),
            Activation::GeluTanh => each(x, gelu_tanh),
            Activation::Relu => each(x, relu),
            Activation::Relu2 => each(x, relu2),
            Activation::SwigluOai { alpha, limit, .. } => {
                for x in x.iter_mut() {
                    *x = swiglu_oai(*x, alpha, limit);
                }
            }
            Activation::SiluWithin { limit } => each(x, |x| silu_within(x, limit)),
            Activation::Sigmoid => each(x, sigmoid),
            Activation::Xielu { positive, negative, beta, eps } => {
                each(x, |x| xielu(x, [positive, negative, beta, eps]));
            }
        }
    }
}

simd_fn! {
    /// One thread's share of [`gate`].
    pub(super) fn gate_chunk(activation: Activation, gate: &mut [f32], up: &[f32]) {
        match activation {
            Activation::Silu => product(gate, up, silu),
            Activation::Identity => product(gate, up, |x| x),
            Activation::Gelu => product(gate, up, gelu),
            Activation::GeluTanh => product(gate, up, gelu_tanh),
            Activation::Relu => product(gate, up, relu),
            Activation::Relu2 => product(gate, up, relu2),
            Activation::SwigluOai { alpha, limit, shift } => {
                for (g, u) in gate.iter_mut().zip(up) {
                    *g = swiglu_oai(*g, alpha, limit) * (u.clamp(-limit, limit) + shift);
                }
            }
            Activation::SiluWithin { limit } => {
                for (g, u) in gate.iter_mut().zip(up) {
                    *g = silu_within(*g, limit) * u.clamp(-limit, limit);
                }
            }
            Activation::Sigmoid => product(gate, up, sigmoid),
            Activation::Xielu { positive, negative, beta, eps } => {
                product(gate, up, |x| xielu(x, [positive, negative, beta, eps]));
            }
        }
    }
}

#[inline(always)]
fn each(x: &mut [f32], f: impl Fn(f32) -> f32) {
    for x in x.iter_mut() {
        *x = f(*x);
    }
}

#[inline(always)]
fn product(gate: &mut [f32], up: &[f32], f: impl Fn(f32) -> f32) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = f(*g) * u;
    }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// A NaN stays one.
#[inline(always)]
fn silu_within(x: f32, limit: f32) -> f32 {
    let value = silu(x);
    if value > limit { limit } else { value }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `Φ(x) = σ(x · q(x²))`, with a polynomial for `q` of least error of `Φ` up to 6; beyond, `q` stays, and `Φ` is 0 or 1.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    let square = x * x;
    let s = if square > 36.0 { 36.0 } else { square };
    let mut q = 4.251_024e-13;
    q = q * s - 4.099_066_6e-11;
    q = q * s + 1.529_531_6e-9;
    q = q * s - 2.505_618e-8;
    q = q * s + 2.499_056_6e-8;
    q = q * s + 6.314_773_6e-6;
    q = q * s - 1.058_119_8e-4;
    q = q * s - 7.217_251e-5;
    q = q * s + 7.267_031e-2;
    q = q * s + 1.595_769_3;
    x / (1.0 + exp(-(x * q)))
}

/// `(1 + tanh(u)) / 2 = σ(2u)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const TWICE: f32 = 1.595_769;
    x / (1.0 + exp(-(TWICE * (x + 0.044715 * x * x * x))))
}

/// Keeps NaN, which `max` would hide.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn relu2(x: f32) -> f32 {
    relu(x) * relu(x)
}

#[inline(always)]
fn swiglu_oai(gate: f32, alpha: f32, limit: f32) -> f32 {
    let gate = if gate > limit { limit } else { gate };
    gate / (1.0 + exp(-(alpha * gate)))
}

/// Both sides are computed, and one is taken, so that the loop has no branch.
#[inline(always)]
fn xielu(x: f32, [positive, negative, beta, eps]: [f32; 4]) -> f32 {
    let exponent = if x < eps { x } else { eps };
    let below = negative * (exp(exponent) - 1.0 - x);
    let above = positive * x * x;
    (if x > 0.0 { above } else { below }) + beta * x
}

/// Every form, for tests.
#[cfg(test)]
pub(super) const ALL: [Activation; 11] = [
    Activation::Identity,
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Relu2,
    Activation::SwigluOai { alpha: 1.702, limit: 7.0, shift: 1.0 },
    Activation::SwigluOai { alpha: 1.0, limit: 3.0, shift: 0.0 },
    Activation::SiluWithin { limit: 0.5 },
    Activation::Sigmoid,
    Activation::Xielu { positive: 0.8, negative: 1.1, beta: 0.5, eps: -1e-6 },
];

#[cfg(test)]
mod tests {
    use super::super::testing::Noise;
    use super::*;

    #[test]
    fn agree_with_the_plain_forms() {
        let mut noise = Noise(4);
        let x: Vec<f32> = (0..CHUNK + 37)
            .map(|i| noise.next() * if i % 2 == 0 { 20.0 } else { 2.0 })
            .chain([0.0, -0.0, 1e-30, 7.0, -6.0, 6.0, 200.0, -200.0])
            .collect();
        let up: Vec<f32> = x.iter().map(|_| noise.next() * 6.0).collect();
        for activation in ALL {
            let (mut alone, mut gated) = (x.clone(), x.clone());
            run(activation, &mut alone);
            gate(activation, &mut gated, &up);
            // Where an exponent is itself a product, its rounding shows in the tail.
            let slack =
                if let Activation::Silu | Activation::Relu | Activation::Relu2 | Activation::Sigmoid = activation {
                    1e-30
                } else {
                    2e-7
                };
            for i in 0..x.len() {
                let expected = reference(activation, x[i]);
                let error = (alone[i] - expected).abs();
                assert!(
                    error <= 1e-6 * expected.abs() + slack,
                    "{activation:?}({}) = {}, not {expected}",
                    x[i],
                    alone[i]
                );
                let expected = gate_reference(activation, x[i], up[i]);
                let error = (gated[i] - expected).abs();
                let slack = slack * up[i].abs();
                assert!(error <= 1e-6 * expected.abs() + slack, "{activation:?}({}) · {}", x[i], up[i]);
            }
        }
    }

    /// Relative to the value, or to 1 where that is smaller.
    #[test]
    fn gelu_is_as_good_as_single_precision_allows() {
        for activation in [Activation::Gelu, Activation::GeluTanh] {
            for x in (-130_000..130_000).map(|i| i as f32 * 1e-4) {
                let (mut found, expected) = ([x], reference(activation, x));
                run_chunk(activation, &mut found);
                let error = (found[0] - expected).abs();
                assert!(error <= 2e-7 * expected.abs().max(1.0), "{activation:?}({x}) = {}, not {expected}", found[0]);
            }
        }
    }

    #[test]
    fn nan_stays() {
        for activation in ALL {
            for (mut x, up) in [([f32::NAN], 1.0), ([1.0], f32::NAN)] {
                gate(activation, &mut x, &[up]);
                assert!(x[0].is_nan(), "{activation:?}");
            }
        }
    }
}
