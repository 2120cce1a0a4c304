//! The CPU: host matrices, rayon's threads, SIMD chosen at run time.

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use crate::backend::{
    Activation, ActivationRounding, AttentionShape, Backend, Factor, FitKind, Grid, GridSpec, NormKind, Packing,
    RopeLayout, Swept, TokenComparison, TokenLoss,
};
use crate::checks::{
    expect, expect_attention, expect_grid, expect_limit, expect_multiple, expect_refined, expect_rotation, expect_spec,
    expect_type,
};
use crate::ops::{
    activation, add, attention, bf16, dequantize, factor, fit, gram, heads, linear, loss, norm, refine, rope, round,
    round_activations, scaled, softcap, sweep,
};
use crate::simd::{Level, level};
use crate::{Error, Result};

/// Codes in the shape of their weight.
fn as_shaped(codes: Vec<u8>, weight: &Array2<f32>) -> Array2<u8> {
    Array2::from_shape_vec(weight.dim(), codes).expect("a code a weight")
}

/// The CPU backend. Uses the current rayon thread pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    /// Never round inputs of matrix products to bfloat16, not even [relaxed](Backend::relaxed).
    pub exact: bool,
    relaxed: bool,
}

impl Cpu {
    /// A backend that computes in single precision throughout.
    pub fn exact() -> Cpu {
        Cpu { exact: true, relaxed: false }
    }

    fn rounds(&self) -> bool {
        self.relaxed && bf16::available()
    }
}

/// An activation: as it is, or rounded to bfloat16.
#[derive(Clone, Debug)]
pub enum Input {
    /// Single precision.
    Whole(Array2<f32>),
    /// bfloat16.
    Rounded(bf16::Rows),
}

impl Input {
    /// `[tokens, features]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Input::Whole(x) => [x.nrows(), x.ncols()],
            Input::Rounded(x) => x.shape(),
        }
    }

    /// The values.
    pub fn values(&self) -> Array2<f32> {
        match self {
            Input::Whole(x) => x.clone(),
            Input::Rounded(x) => x.widen(),
        }
    }
}

/// A weight: as it is, or rounded to bfloat16 and packed.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Single precision.
    Whole(Array2<f32>),
    /// bfloat16.
    Rounded(bf16::Panels),
}

impl Weight {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Weight::Whole(w) => [w.nrows(), w.ncols()],
            Weight::Rounded(w) => w.shape(),
        }
    }
}

fn check_product(op: &'static str, x: &Input, weight: &Weight, bias: Option<&[f32]>) -> Result<()> {
    let [outs, cols] = weight.shape();
    expect(op, "input features", cols, x.shape()[1])?;
    bias.map_or(Ok(()), |bias| expect(op, "bias values", outs, bias.len()))
}

/// Operands of one product that were made by the exact and by the relaxed backend.
fn mixed(op: &'static str) -> Error {
    Error::Shape { op, expected: "operands of one precision".to_owned(), found: "two".to_owned() }
}

fn flat(matrix: &mut Array2<f32>) -> &mut [f32] {
    matrix.as_slice_mut().expect("matrices of this backend are contiguous")
}

impl Backend for Cpu {
    type Matrix = Array2<f32>;
    type Input = Input;
    type Weight = Weight;
    // Nothing is ever on its way to where it is.
    type Stored = std::convert::Infallible;
    type Codes = Array2<u8>;

    fn name(&self) -> String {
        let set = match level() {
            Level::Avx512 => "AVX-512",
            Level::Avx2 => "AVX2",
            Level::Baseline => "baseline instructions",
        };
        let products = if !self.exact && bf16::available() { ", calibration in bfloat16" } else { "" };
        format!("CPU, {} threads, {set}{products}", rayon::current_num_threads())
    }

    fn relaxed(&self) -> Cpu {
        Cpu { relaxed: !self.exact, ..*self }
    }

    fn bytes_of_input(&self) -> usize {
        if self.rounds() { 2 } else { 4 }
    }

    fn widen(&self, stored: Self::Stored) -> Result<Array2<f32>> {
        match stored {}
    }

    fn upload(&self, host: Array2<f32>) -> Result<Array2<f32>> {
        Ok(if host.is_standard_layout() { host } else { host.as_standard_layout().into_owned() })
    }

    fn download(&self, matrix: &Array2<f32>) -> Result<Array2<f32>> {
        Ok(matrix.clone())
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Array2<f32>> {
        Ok(Array2::zeros((rows, cols)))
    }

    fn shape(&self, matrix: &Array2<f32>) -> [usize; 2] {
        [matrix.nrows(), matrix.ncols()]
    }

    fn copy(&self, matrix: &Array2<f32>) -> Result<Array2<f32>> {
        Ok(matrix.clone())
    }

    fn select_rows(&self, matrix: &Array2<f32>, rows: &[usize]) -> Result<Array2<f32>> {
        if let Some(row) = rows.iter().find(|row| **row >= matrix.nrows()) {
            let expected = format!("rows below {}", matrix.nrows());
            return Err(Error::Shape { op: "select_rows", expected, found: row.to_string() });
        }
        Ok(matrix.select(Axis(0), rows))
    }

    fn scale(&self, matrix: &mut Array2<f32>, rows: &[f32], cols: &[f32]) -> Result<()> {
        for (side, factors, length) in [("rows", rows, matrix.nrows()), ("columns", cols, matrix.ncols())] {
            if !factors.is_empty() {
                expect("scale", side, length, factors.len())?;
            }
        }
        let width = matrix.ncols();
        flat(matrix).par_chunks_exact_mut(width).enumerate().for_each(|(row, values)| {
            if let Some(factor) = rows.get(row) {
                values.iter_mut().for_each(|v| *v *= factor);
            }
            values.iter_mut().zip(cols).for_each(|(v, factor)| *v *= factor);
        });
        Ok(())
    }

    fn is_finite(&self, matrix: &Array2<f32>) -> Result<bool> {
        // x·0 is 0 for finite x and NaN otherwise: a sum that vectorizes.
        let data = matrix.as_slice().expect("matrices of this backend are contiguous");
        Ok(data.par_chunks(1 << 14).all(|chunk| {
            let mut lanes = [0.0f32; 16];
            let parts = chunk.chunks_exact(16);
            let rest = parts.remainder().iter().fold(0.0, |sum, x| sum + x * 0.0);
            for part in parts {
                lanes.iter_mut().zip(part).for_each(|(lane, x)| *lane += x * 0.0);
            }
            lanes.iter().sum::<f32>() + rest == 0.0
        }))
    }

    fn input(&self, x: Array2<f32>) -> Result<Input> {
        Ok(if self.rounds() { Input::Rounded(bf16::Rows::of(x.view())) } else { Input::Whole(x) })
    }

    fn input_shape(&self, x: &Input) -> [usize; 2] {
        x.shape()
    }

    fn round_values(&self, x: &mut Array2<f32>, kind: ActivationRounding) -> Result<()> {
        expect_multiple("round_values", kind.block_len(), x.ncols())?;
        round_activations::run(x, kind);
        Ok(())
    }

    fn round_activations(&self, x: &Input, kind: ActivationRounding) -> Result<Input> {
        let mut values = x.values();
        self.round_values(&mut values, kind)?;
        Ok(match x {
            Input::Whole(_) => Input::Whole(values),
            Input::Rounded(_) => Input::Rounded(bf16::Rows::of(values.view())),
        })
    }

    fn weight(&self, matrix: Array2<f32>) -> Result<Weight> {
        Ok(if self.rounds() { Weight::Rounded(bf16::Panels::of(matrix.view())) } else { Weight::Whole(matrix) })
    }

    fn linear(&self, x: &Input, weight: &Weight, bias: Option<&[f32]>) -> Result<Array2<f32>> {
        check_product("linear", x, weight, bias)?;
        match (x, weight) {
            (Input::Rounded(x), Weight::Rounded(w)) => Ok(bf16::linear(x, w, bias)),
            (Input::Whole(x), Weight::Whole(w)) => Ok(linear::run(x.view(), w.view(), bias)),
            _ => Err(mixed("linear")),
        }
    }

    fn linear_by_rows(
        &self,
        x: &Input,
        outs: usize,
        rows: &(dyn Fn(usize, &mut [f32]) + Sync),
        bias: Option<&[f32]>,
        at_once: usize,
    ) -> Result<Array2<f32>> {
        bias.map_or(Ok(()), |bias| expect("linear_by_rows", "bias values", outs, bias.len()))?;
        match x {
            Input::Whole(x) => Ok(linear::run_by_rows(x.view(), outs, rows, bias, at_once)),
            Input::Rounded(x) => {
                let mut whole = Array2::zeros((outs, x.shape()[1]));
                rows(0, flat(&mut whole));
                Ok(bf16::linear(x, &bf16::Panels::of(whole.view()), bias))
            }
        }
    }

    fn add_linear(&self, x: &Input, weight: &Weight, bias: Option<&[f32]>, y: &mut Array2<f32>) -> Result<()> {
        check_product("add_linear", x, weight, bias)?;
        expect("add_linear", "tokens", x.shape()[0], y.nrows())?;
        expect("add_linear", "output features", weight.shape()[0], y.ncols())?;
        match (x, weight) {
            (Input::Rounded(x), Weight::Rounded(w)) => bf16::add_linear(x, w, bias, y),
            (Input::Whole(x), Weight::Whole(w)) => {
                let product = linear::run(x.view(), w.view(), bias);
                add::run(flat(y), product.as_slice().expect("contiguous"));
            }
            _ => return Err(mixed("add_linear")),
        }
        Ok(())
    }

    fn gated(
        &self,
        x: &Input,
        [gate, up]: [&Weight; 2],
        biases: [Option<&[f32]>; 2],
        activation: Activation,
    ) -> Result<Input> {
        check_product("gated", x, gate, biases[0])?;
        check_product("gated", x, up, biases[1])?;
        expect("gated", "output features", gate.shape()[0], up.shape()[0])?;
        if let Activation::SwigluOai { limit, .. } = activation {
            expect_limit("gated", limit)?;
        }
        match (x, gate, up) {
            (Input::Rounded(x), Weight::Rounded(gate), Weight::Rounded(up)) => {
                Ok(Input::Rounded(bf16::gated(x, [gate, up], biases, activation)))
            }
            (Input::Whole(x), Weight::Whole(gate), Weight::Whole(up)) => {
                let mut gate = linear::run(x.view(), gate.view(), biases[0]);
                let up = linear::run(x.view(), up.view(), biases[1]);
                activation::gate(activation, flat(&mut gate), up.as_slice().expect("contiguous"));
                Ok(Input::Whole(gate))
            }
            _ => Err(mixed("gated")),
        }
    }

    fn activated(&self, x: &Input, weight: &Weight, bias: Option<&[f32]>, activation: Activation) -> Result<Input> {
        check_product("activated", x, weight, bias)?;
        if let Activation::SwigluOai { .. } = activation {
            let (expected, found) = ("a function of one value".to_owned(), format!("{activation:?}"));
            return Err(Error::Shape { op: "activated", expected, found });
        }
        match (x, weight) {
            (Input::Rounded(x), Weight::Rounded(w)) => Ok(Input::Rounded(bf16::activated(x, w, bias, activation))),
            (Input::Whole(x), Weight::Whole(w)) => {
                let mut y = linear::run(x.view(), w.view(), bias);
                activation::run(activation, flat(&mut y));
                Ok(Input::Whole(y))
            }
            _ => Err(mixed("activated")),
        }
    }

    fn rms_norm(&self, x: &Array2<f32>, weight: &[f32], eps: f32) -> Result<Array2<f32>> {
        expect("rms_norm", "features", weight.len(), x.ncols())?;
        Ok(norm::run(x.view(), NormKind::Rms, weight, None, eps))
    }

    fn layer_norm(&self, x: &Array2<f32>, weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Result<Array2<f32>> {
        expect("layer_norm", "features", weight.len(), x.ncols())?;
        bias.map_or(Ok(()), |bias| expect("layer_norm", "bias values", x.ncols(), bias.len()))?;
        Ok(norm::run(x.view(), NormKind::Layer, weight, bias, eps))
    }

    fn norm_heads(
        &self,
        x: &mut Array2<f32>,
        head_dim: usize,
        kind: NormKind,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<()> {
        expect_multiple("norm_heads", head_dim, x.ncols())?;
        for values in [Some(weight), bias].into_iter().flatten().filter(|values| values.len() != head_dim) {
            expect("norm_heads", "weights", x.ncols(), values.len())?;
        }
        norm::heads(x, head_dim, kind, weight, bias, eps);
        Ok(())
    }

    fn rope(
        &self,
        x: &mut Array2<f32>,
        cos: &Array2<f32>,
        sin: &Array2<f32>,
        layout: &RopeLayout,
        lengths: &[usize],
    ) -> Result<()> {
        expect_rotation([x.nrows(), x.ncols()], cos, sin, layout, lengths)?;
        rope::run(x, cos, sin, layout, lengths);
        Ok(())
    }

    fn attention(
        &self,
        q: &Array2<f32>,
        k: &Array2<f32>,
        v: &Array2<f32>,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Input> {
        expect_attention([q, k, v].map(|m| [m.nrows(), m.ncols()]), sinks, shape, lengths)?;
        if self.rounds() && attention::can_round(shape) {
            return Ok(Input::Rounded(attention::rounded(q.view(), k.view(), v.view(), sinks, shape, lengths)));
        }
        self.input(attention::run(q.view(), k.view(), v.view(), sinks, shape, lengths))
    }

    fn join_heads(&self, own: &Array2<f32>, shared: &Array2<f32>, heads: usize) -> Result<Array2<f32>> {
        expect_multiple("join_heads", heads, own.ncols())?;
        expect("join_heads", "tokens", own.nrows(), shared.nrows())?;
        Ok(heads::run(own.view(), shared.view(), heads))
    }

    fn softcap(&self, x: &mut Array2<f32>, cap: f32) -> Result<()> {
        softcap::run(flat(x), cap);
        Ok(())
    }

    fn clamp(&self, x: &mut Array2<f32>, limit: f32) -> Result<()> {
        expect_limit("clamp", limit)?;
        flat(x).par_chunks_mut(1 << 14).for_each(|part| part.iter_mut().for_each(|x| *x = x.clamp(-limit, limit)));
        Ok(())
    }

    fn add_scaled(&self, x: &Array2<f32>, factor: f32, y: &mut Array2<f32>) -> Result<()> {
        expect("add_scaled", "tokens", y.nrows(), x.nrows())?;
        expect("add_scaled", "features", y.ncols(), x.ncols())?;
        add::scaled(flat(y), factor, x.as_slice().expect("contiguous"));
        Ok(())
    }

    fn add_rows(&self, x: &Array2<f32>, rows: &[usize], weights: &[f32], y: &mut Array2<f32>) -> Result<()> {
        expect("add_rows", "rows", x.nrows(), rows.len())?;
        expect("add_rows", "weights", x.nrows(), weights.len())?;
        expect("add_rows", "features", y.ncols(), x.ncols())?;
        let sources = add::sources(rows, y.nrows()).map_err(|row| Error::Shape {
            op: "add_rows",
            expected: format!("distinct rows below {}", y.nrows()),
            found: row.to_string(),
        })?;
        add::rows(x.view(), &sources, weights, y);
        Ok(())
    }

    fn difference(&self, a: &Array2<f32>, b: &Array2<f32>) -> Result<Array2<f32>> {
        expect("difference", "values", a.len(), b.len())?;
        Ok(a - b)
    }

    fn add_gram(&self, x: &Input, gram: &mut Array2<f32>) -> Result<()> {
        expect("add_gram", "features", gram.ncols(), x.shape()[1])?;
        expect("add_gram", "rows of the Hessian", gram.ncols(), gram.nrows())?;
        match x {
            Input::Rounded(x) => bf16::gram(x, gram),
            Input::Whole(x) => gram::run(x.view(), gram),
        }
        Ok(())
    }

    fn add_moments(&self, x: &Input, magnitude: &mut [f64], energy: &mut [f64]) -> Result<()> {
        expect("add_moments", "features", magnitude.len(), x.shape()[1])?;
        expect("add_moments", "features", energy.len(), x.shape()[1])?;
        match x {
            Input::Rounded(x) => x.moments(magnitude, energy),
            Input::Whole(x) => gram::moments(x.view(), magnitude, energy),
        }
        Ok(())
    }

    fn diagonal(&self, matrix: &Array2<f32>) -> Result<Vec<f32>> {
        Ok(matrix.diag().to_vec())
    }

    fn quadratic(&self, e: &Array2<f32>, gram: &Array2<f32>) -> Result<f64> {
        expect("quadratic", "features", gram.ncols(), e.ncols())?;
        Ok(gram::quadratic(e.view(), gram.view()))
    }

    fn weighted_square(&self, e: &Array2<f32>, weights: &[f64]) -> Result<f64> {
        expect("weighted_square", "weights", e.ncols(), weights.len())?;
        Ok(gram::weighted_square(e.view(), weights))
    }

    fn scaled_rounding_loss(
        &self,
        weight: &Array2<f32>,
        t: &[f32],
        spec: &GridSpec,
        gram: &Array2<f32>,
    ) -> Result<f64> {
        expect("scaled_rounding_loss", "factors", weight.ncols(), t.len())?;
        expect_spec("scaled_rounding_loss", weight.ncols(), spec)?;
        self.quadratic(&scaled::run(weight.view(), t, spec), gram)
    }

    fn factor(&self, gram: &Array2<f32>, order: Vec<u32>, damp: f64) -> Result<Factor<Array2<f32>>> {
        factor::run(gram.view(), order, damp)
    }

    fn fit(&self, weight: &Array2<f32>, spec: &GridSpec, kind: FitKind<'_, Array2<f32>>) -> Result<Grid> {
        expect_spec("fit", weight.ncols(), spec)?;
        match &kind {
            FitKind::Weighted(h) => expect("fit", "importances", weight.ncols(), h.len())?,
            FitKind::BlockHessian(h) => expect("fit", "features", weight.ncols(), h.ncols())?,
            FitKind::MinMax => {}
        }
        Ok(fit::run(weight.view(), spec, kind))
    }

    fn round(&self, weight: &Array2<f32>, grid: &Grid) -> Result<Array2<u8>> {
        expect_grid("round", self.shape(weight), grid)?;
        Ok(as_shaped(round::run(weight.view(), grid), weight))
    }

    fn sweep(&self, targets: &[(&Array2<f32>, &Grid)], factor: &Factor<Array2<f32>>) -> Result<Vec<Swept<Array2<u8>>>> {
        let one = |&(target, grid): &(&Array2<f32>, &Grid)| {
            expect_grid("sweep", self.shape(target), grid)?;
            expect("sweep", "columns", factor.order.len(), target.ncols())?;
            let Swept { codes, loss } = sweep::run(target.view(), factor, grid);
            Ok(Swept { codes: as_shaped(codes, target), loss })
        };
        targets.iter().map(one).collect()
    }

    fn refine(
        &self,
        target: &Array2<f32>,
        gram: &Array2<f32>,
        damp: f64,
        grid: &mut Grid,
        codes: &mut Array2<u8>,
    ) -> Result<f64> {
        expect_refined("refine", self.shape(target), self.shape(gram), codes.dim().into(), grid)?;
        Ok(refine::run(target.view(), gram.view(), damp, grid, codes.as_slice_mut().expect("contiguous")))
    }

    fn dequantize(&self, codes: &Array2<u8>, grid: &Grid) -> Result<Array2<f32>> {
        expect_grid("dequantize", codes.dim().into(), grid)?;
        Ok(dequantize::run(codes.view(), grid))
    }

    fn pack(&self, codes: &Array2<u8>, packing: Packing<'_>) -> Result<Vec<u8>> {
        match packing {
            Packing::Words { bits, layout } => {
                let words = layout.pack(codes.as_slice().expect("contiguous"), codes.dim().into(), bits);
                let words = words.map_err(|error| Error::Shape {
                    op: "pack",
                    expected: "codes that fit".to_owned(),
                    found: error.to_string(),
                })?;
                Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
            }
            Packing::Blocks(grid) => {
                expect_grid("pack", codes.dim().into(), grid)?;
                expect_type("pack", grid)?;
                Ok(dequantize::pack_blocks(codes.view(), grid))
            }
        }
    }

    fn download_codes(&self, codes: &Array2<u8>) -> Result<Array2<u8>> {
        Ok(codes.clone())
    }

    fn token_loss(&self, logits: &Array2<f32>, targets: &[u32]) -> Result<TokenLoss> {
        expect("token_loss", "targets", logits.nrows(), targets.len())?;
        Ok(loss::run(logits.view(), targets))
    }

    fn compare(&self, reference: &Array2<f32>, model: &Array2<f32>, targets: &[u32]) -> Result<TokenComparison> {
        expect("compare", "targets", model.nrows(), targets.len())?;
        expect("compare", "logits", reference.len(), model.len())?;
        Ok(loss::compare(reference.view(), model.view(), targets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::Noise;

    const SHAPE: AttentionShape = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        value_dim: 6,
        scale: 0.3,
        window: Some(70),
        chunk: Some(100),
        softcap: Some(5.0),
    };

    fn refused<T>(op: &str, result: Result<T>) {
        match result {
            Err(Error::Shape { op: found, .. }) => assert_eq!(found, op),
            Err(error) => panic!("{op}: {error}"),
            Ok(_) => panic!("{op}: accepted"),
        }
    }

    #[test]
    fn matrices_that_do_not_fit_are_refused() {
        let cpu = Cpu::exact();
        let m = |rows, cols| Array2::<f32>::zeros((rows, cols));
        refused("layer_norm", cpu.layer_norm(&m(3, 4), &[1.0; 5], None, 1e-5));
        refused("layer_norm", cpu.layer_norm(&m(3, 4), &[1.0; 4], Some(&[1.0; 3]), 1e-5));
        refused("norm_heads", cpu.norm_heads(&mut m(3, 8), 3, NormKind::Rms, &[1.0; 3], None, 1e-5));
        refused("norm_heads", cpu.norm_heads(&mut m(3, 8), 0, NormKind::Rms, &[], None, 1e-5));
        refused("norm_heads", cpu.norm_heads(&mut m(3, 8), 4, NormKind::Layer, &[1.0; 2], None, 1e-5));

        let layout = RopeLayout { head_dim: 8, first: 2, interleaved: true };
        let rope = |cols, angles: [usize; 2], sines, lengths: &[usize]| {
            cpu.rope(&mut m(5, cols), &m(angles[0], angles[1]), &m(sines, angles[1]), &layout, lengths)
        };
        assert!(rope(16, [3, 3], 3, &[3, 2]).is_ok());
        refused("rope", rope(12, [3, 3], 3, &[3, 2]));
        refused("rope", rope(16, [3, 4], 3, &[3, 2]));
        refused("rope", rope(16, [3, 3], 2, &[3, 2]));
        refused("rope", rope(16, [3, 3], 3, &[4, 1]));
        refused("rope", rope(16, [3, 3], 3, &[3, 1]));

        let attention = |v_cols, sinks, shape| cpu.attention(&m(5, 32), &m(5, 16), &m(5, v_cols), sinks, &shape, &[5]);
        assert_eq!(attention(12, Some(&[0.0; 4][..]), SHAPE).unwrap().shape(), [5, 24]);
        refused("attention", attention(16, None, SHAPE));
        refused("attention", attention(12, Some(&[0.0; 2]), SHAPE));
        refused("attention", attention(12, None, AttentionShape { kv_heads: 3, ..SHAPE }));
        refused("attention", attention(12, None, AttentionShape { kv_heads: 0, ..SHAPE }));
        refused("attention", attention(12, None, AttentionShape { window: Some(0), ..SHAPE }));
        refused("attention", attention(12, None, AttentionShape { chunk: Some(0), ..SHAPE }));

        let (x, w) = (Input::Whole(m(3, 4)), Weight::Whole(m(6, 4)));
        refused("activated", cpu.activated(&x, &w, Some(&[0.0; 4]), Activation::Relu));
        refused("activated", cpu.activated(&x, &Weight::Whole(m(6, 5)), None, Activation::Relu));
        refused("activated", cpu.activated(&x, &w, None, Activation::SwigluOai { alpha: 1.0, limit: 1.0 }));

        for limit in [-1.0, f32::NAN] {
            refused("gated", cpu.gated(&x, [&w, &w], [None; 2], Activation::SwigluOai { alpha: 1.0, limit }));
            refused("clamp", cpu.clamp(&mut m(2, 2), limit));
        }

        refused("join_heads", cpu.join_heads(&m(3, 8), &m(3, 2), 3));
        refused("join_heads", cpu.join_heads(&m(3, 8), &m(3, 2), 0));
        refused("join_heads", cpu.join_heads(&m(3, 8), &m(2, 2), 4));
        refused("add_scaled", cpu.add_scaled(&m(3, 8), 2.0, &mut m(4, 6)));
        refused("add_rows", cpu.add_rows(&m(2, 4), &[0, 1], &[1.0; 2], &mut m(3, 5)));
        refused("add_rows", cpu.add_rows(&m(2, 4), &[0], &[1.0; 2], &mut m(3, 4)));
        refused("add_rows", cpu.add_rows(&m(2, 4), &[0, 1], &[1.0; 3], &mut m(3, 4)));
        refused("add_rows", cpu.add_rows(&m(2, 4), &[0, 3], &[1.0; 2], &mut m(3, 4)));
        refused("add_rows", cpu.add_rows(&m(2, 4), &[1, 1], &[1.0; 2], &mut m(3, 4)));
    }

    /// One decoder layer of no model there is: every step that families differ in.
    fn layer(cpu: &Cpu) -> Array2<f32> {
        let (mut noise, lengths) = (Noise(31), [210, 1, 89]);
        let mut stream = noise.matrix(300, 37);
        let mut linear = |x: &Input, outs| {
            let weight = cpu.weight(noise.matrix(outs, x.shape()[1])).unwrap();
            cpu.linear(x, &weight, None).unwrap()
        };
        let x = cpu.input(cpu.layer_norm(&stream, &[0.2; 37], Some(&[0.1; 37]), 1e-5).unwrap()).unwrap();
        let (mut q, own, shared, v) = (linear(&x, 32), linear(&x, 12), linear(&x, 2), linear(&x, 12));
        let mut k = cpu.join_heads(&own, &shared, 2).unwrap();
        let angle = Array2::from_shape_fn((210, 3), |(position, pair)| (position * (pair + 1)) as f32 * 0.01);
        for heads in [&mut q, &mut k] {
            cpu.norm_heads(heads, 8, NormKind::Rms, &[1.0; 8], None, 1e-6).unwrap();
            let layout = RopeLayout { head_dim: 8, first: 1, interleaved: true };
            cpu.rope(heads, &angle.mapv(f32::cos), &angle.mapv(f32::sin), &layout, &lengths).unwrap();
        }
        let mixed = cpu.attention(&q, &k, &v, Some(&[0.5, -1.0, 2.0, 0.0]), &SHAPE, &lengths).unwrap();
        cpu.add_scaled(&linear(&mixed, 37), 0.3, &mut stream).unwrap();
        let x = cpu.input(cpu.rms_norm(&stream, &[0.2; 37], 1e-5).unwrap()).unwrap();
        let [gate, up, one] = [61, 61, 37].map(|outs| cpu.weight(noise.matrix(outs, 37)).unwrap());
        let gated = cpu.gated(&x, [&gate, &up], [None; 2], Activation::SwigluOai { alpha: 1.7, limit: 7.0 }).unwrap();
        let down = cpu.weight(noise.matrix(37, 61)).unwrap();
        let rows: Vec<usize> = (0..300).rev().collect();
        cpu.add_rows(&cpu.linear(&gated, &down, None).unwrap(), &rows, &[0.7; 300], &mut stream).unwrap();
        let alone = cpu.activated(&cpu.input(stream.clone()).unwrap(), &one, None, Activation::Gelu).unwrap();
        let mut last = alone.values() + &stream;
        cpu.softcap(&mut last, 30.0).unwrap();
        last
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        for cpu in [Cpu::exact(), Cpu::default().relaxed()] {
            let [one, some] = [1, 3].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| layer(&cpu))
            });
            assert_eq!(one, some);
            assert!(one.iter().all(|x| x.is_finite()) && one.iter().any(|x| x.abs() > 1.0));
        }
    }

    #[test]
    fn the_relaxed_layer_is_near_the_exact_one() {
        let (exact, relaxed) = (layer(&Cpu::exact()), layer(&Cpu::default().relaxed()));
        let [error, size] = [&relaxed - &exact, exact].map(|x| x.iter().map(|x| x * x).sum::<f32>().sqrt());
        assert!(error <= 0.03 * size, "{error} of {size}");
    }
}
