//! Running a model: products, norms, rotations, activations.

use ndarray::Array2;

use super::{Cuda, Matrix, Module, Operand, Operands, Pinned, Product, Rounded, at, expect, expect_multiple};
use crate::backend::{
    Activation, ActivationRounding, AttentionShape, DeltaShape, Entries, Forward, HyperParameters, HyperShape,
    IndexShape, Memory, NormKind, RopeLayout,
};
use crate::checks::{expect_alone, expect_limit, expect_rotation};
use crate::ops::add::sources;
use crate::{Error, Result};

pub(super) static POINTWISE: Module = Module {
    name: "pointwise",
    source: concat!(include_str!("../ops/activation.cuh"), include_str!("../ops/pointwise.cu")),
};
pub(super) static NORM: Module = Module { name: "norm", source: include_str!("../ops/norm.cu") };
pub(super) static ROUNDING: Module =
    Module { name: "round_activations", source: include_str!("../ops/round_activations.cu") };
pub(super) static ROPE: Module = Module { name: "rope", source: include_str!("../ops/rope.cu") };

/// Threads that norm one slice.
pub(super) fn threads_for(width: usize) -> u32 {
    (width.div_ceil(4).next_multiple_of(32)).clamp(32, 256) as u32
}

/// The number by which the kernels know a function, and its own numbers.
pub(super) fn code(activation: Activation) -> (i32, [f32; 4]) {
    match activation {
        Activation::Silu => (0, [0.0; 4]),
        Activation::Gelu => (1, [0.0; 4]),
        Activation::GeluTanh => (2, [0.0; 4]),
        Activation::Relu => (3, [0.0; 4]),
        Activation::Relu2 => (4, [0.0; 4]),
        Activation::SwigluOai { alpha, limit, shift } => (5, [alpha, limit, shift, 0.0]),
        Activation::Xielu { positive, negative, beta, eps } => (6, [positive, negative, beta, eps]),
        Activation::Sigmoid => (7, [0.0; 4]),
        Activation::Identity => (8, [0.0; 4]),
        Activation::SiluWithin { limit } => (9, [0.0, limit, 0.0, 0.0]),
    }
}

fn check_product(op: &'static str, x: &Operands, weight: &Operands, bias: Option<&[f32]>) -> Result<()> {
    let [outs, cols] = weight.shape();
    expect(op, "input features", cols, x.shape()[1])?;
    if x.real() != weight.real() {
        return Err(Error::Shape { op, expected: "operands of one precision".to_owned(), found: "two".to_owned() });
    }
    bias.map_or(Ok(()), |bias| expect(op, "bias values", outs, bias.len()))
}

/// A norm of slices.
struct Norm<'a> {
    /// Values of a slice.
    width: usize,
    kind: NormKind,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
}

impl<'a> Norm<'a> {
    /// That of whole rows of `x`. Fails unless there is a weight for each of its columns and, where there are biases, one of these.
    fn of_rows(
        op: &'static str,
        x: &Matrix,
        kind: NormKind,
        weight: &'a [f32],
        bias: Option<&'a [f32]>,
        eps: f32,
    ) -> Result<Norm<'a>> {
        // The other kind has none.
        let bias = bias.filter(|_| kind == NormKind::Layer);
        expect(op, "features", weight.len(), x.cols)?;
        bias.map_or(Ok(()), |bias| expect(op, "bias values", x.cols, bias.len()))?;
        Ok(Norm { width: x.cols, kind, weight, bias, eps })
    }
}

impl Cuda {
    /// `y ← x wᵀ + bias + keep · y`.
    fn multiply(
        &self,
        op: &'static str,
        x: &Operands,
        weight: &Operands,
        bias: Option<&[f32]>,
        y: &mut Matrix,
        keep: f64,
    ) -> Result<()> {
        check_product(op, x, weight, bias)?;
        let ([tokens, features], [outs, _]) = (x.shape(), weight.shape());
        expect(op, "tokens", tokens, y.rows)?;
        expect(op, "output features", outs, y.cols)?;
        if tokens == 0 || outs == 0 {
            return Ok(());
        }
        let (a, b, c) = (x.pin()?, weight.pin()?, y.buffer.pin()?);
        self.device().product(&Product {
            real: x.real(),
            shape: [tokens, outs, features],
            a: Operand { at: a.at, stride: features, transposed: false },
            b: Operand { at: b.at, stride: features, transposed: true },
            c: Operand { at: c.at, stride: outs, transposed: false },
            alpha: 1.0,
            beta: keep,
        })?;
        if let Some(bias) = bias {
            let bias = self.send(bias)?;
            let pinned = bias.pin()?;
            let args = [c.arg(), pinned.arg(), (tokens as i64).into(), (outs as i32).into()];
            self.each(&POINTWISE, "add_bias", tokens * outs, &args)?;
            drop(pinned);
        }
        Ok(())
    }

    /// Runs `kernel` over `gate` (and `up`) into an operand of the precision that `x` has.
    fn activate_into(
        &self,
        real: super::Real,
        gate: Matrix,
        up: Option<Matrix>,
        biases: [Option<&[f32]>; 2],
        activation: Activation,
    ) -> Result<Operands> {
        let (rows, cols) = (gate.rows, gate.cols);
        let (kind, [a, b, c, d]) = code(activation);
        let biases = [biases[0].map(|b| self.send(b)).transpose()?, biases[1].map(|b| self.send(b)).transpose()?];
        let pinned_biases =
            [biases[0].as_ref().map(|b| b.pin()).transpose()?, biases[1].as_ref().map(|b| b.pin()).transpose()?];
        let rounded = real == super::Real::Bf16;
        let narrow = match rounded {
            true => Some(Rounded { buffer: self.buffer::<u16>(rows * cols)?, rows, cols }),
            false => None,
        };
        {
            let (gate_at, up_at) = (gate.buffer.pin()?, up.as_ref().map(|up| up.buffer.pin()).transpose()?);
            let out = narrow.as_ref().map(|out| out.buffer.pin()).transpose()?;
            let args = [
                out.as_ref().map_or(gate_at.arg(), |out| out.arg()),
                gate_at.arg(),
                at(up_at.as_ref()),
                at(pinned_biases[0].as_ref()),
                at(pinned_biases[1].as_ref()),
                kind.into(),
                a.into(),
                b.into(),
                c.into(),
                d.into(),
                (rows as i64).into(),
                (cols as i32).into(),
            ];
            self.each(&POINTWISE, if rounded { "activate_rounded" } else { "activate" }, rows * cols, &args)?;
        }
        Ok(narrow.map_or(Operands::Whole(gate), Operands::Rounded))
    }

    /// `gate ← act(gate) · up`, or `act(gate)` alone.
    fn activate_in_place(&self, gate: &mut Matrix, up: Option<&Matrix>, activation: Activation) -> Result<()> {
        let (kind, [a, b, c, d]) = code(activation);
        let (gate_at, up_at) = (gate.buffer.pin()?, up.map(|up| up.buffer.pin_to_read()).transpose()?);
        let args = [
            gate_at.arg(),
            gate_at.arg(),
            at(up_at.as_ref()),
            at(None),
            at(None),
            kind.into(),
            a.into(),
            b.into(),
            c.into(),
            d.into(),
            (gate.rows as i64).into(),
            (gate.cols as i32).into(),
        ];
        self.each(&POINTWISE, "activate", gate.rows * gate.cols, &args)
    }

    /// Norms slices of `width` from `x` to `y`, which is memory of as many values, of single precision or, where it is `rounded`, of
    /// bfloat16; `weight` repeats.
    fn norm_into(&self, x: &Pinned<'_>, y: &Pinned<'_>, rounded: bool, count: usize, norm: &Norm<'_>) -> Result<()> {
        let Norm { width, kind, weight, bias, eps } = *norm;
        if count == 0 {
            return Ok(());
        }
        let (weight_at, bias_at) = (self.send(weight)?, bias.map(|b| self.send(b)).transpose()?);
        let bias_pin = bias_at.as_ref().map(|b| b.pin()).transpose()?;
        let weight_pin = weight_at.pin()?;
        let args = [
            y.arg(),
            x.arg(),
            weight_pin.arg(),
            at(bias_pin.as_ref()),
            (width as i32).into(),
            (weight.len() as i32).into(),
            (bias.map_or(1, <[f32]>::len) as i32).into(),
            i32::into(match kind {
                NormKind::Rms => 0,
                NormKind::Layer => 1,
                NormKind::Length => 2,
            }),
            eps.into(),
        ];
        let kernel = if rounded { "norm_rounded" } else { "norm_slices" };
        self.blocks(&NORM, kernel, count / width, threads_for(width), 0, &args)
    }

    fn normed(&self, x: &Matrix, norm: &Norm<'_>) -> Result<Matrix> {
        let y = self.matrix(x.rows, x.cols)?;
        self.norm_into(&x.buffer.pin_to_read()?, &y.buffer.pin()?, false, x.rows * x.cols, norm)?;
        Ok(y)
    }
}

impl Forward for Cuda {
    type Weight = Operands;

    fn round_values(&self, x: &mut Matrix, kind: ActivationRounding) -> Result<()> {
        let (count, length) = (x.rows * x.cols, kind.block_len());
        expect_multiple("round_values", length, x.cols)?;
        let to = x.buffer.pin()?;
        match kind {
            ActivationRounding::F16 | ActivationRounding::Bf16 => {
                let brain = kind == ActivationRounding::Bf16;
                self.each(&ROUNDING, "round_to_halves", count, &[to.arg(), brain.into(), (count as i64).into()])
            }
            _ => {
                // The number of `SCALE_…` in the kernel, and the values that share a scale.
                let (scale, length) = match kind {
                    ActivationRounding::Q8_0 => (0, length),
                    ActivationRounding::Q8K => (1, length),
                    ActivationRounding::Int8Token => (2, x.cols.max(1)),
                    _ => (3, x.cols.max(1)),
                };
                let blocks = count / length;
                let args = [to.arg(), (blocks as i64).into(), (length as i32).into(), i32::into(scale)];
                self.each(&ROUNDING, "round_to_bytes", blocks * 32, &args)
            }
        }
    }

    fn round_activations(&self, x: &Operands, kind: ActivationRounding) -> Result<Operands> {
        let mut out = self.values(x)?;
        self.round_values(&mut out, kind)?;
        match x {
            Operands::Whole(_) => Ok(Operands::Whole(out)),
            Operands::Rounded(_) => self.narrowed(&out),
        }
    }

    fn weight(&self, matrix: Matrix) -> Result<Operands> {
        self.input(matrix)
    }

    fn linear(&self, x: &Operands, weight: &Operands, bias: Option<&[f32]>) -> Result<Matrix> {
        let mut y = self.matrix(x.shape()[0], weight.shape()[0])?;
        self.multiply("linear", x, weight, bias, &mut y, 0.0)?;
        Ok(y)
    }

    fn add_linear(&self, x: &Operands, weight: &Operands, bias: Option<&[f32]>, y: &mut Matrix) -> Result<()> {
        self.multiply("add_linear", x, weight, bias, y, 1.0)
    }

    fn gated(
        &self,
        x: &Operands,
        [gate, up]: [&Operands; 2],
        biases: [Option<&[f32]>; 2],
        activation: Activation,
    ) -> Result<Operands> {
        check_product("gated", x, gate, biases[0])?;
        check_product("gated", x, up, biases[1])?;
        expect("gated", "output features", gate.shape()[0], up.shape()[0])?;
        if let Some(limit) = activation.limit() {
            expect_limit("gated", limit)?;
        }
        let (tokens, outs) = (x.shape()[0], gate.shape()[0]);
        let mut products = [self.matrix(tokens, outs)?, self.matrix(tokens, outs)?];
        for (weight, y) in [gate, up].into_iter().zip(&mut products) {
            self.multiply("gated", x, weight, None, y, 0.0)?;
        }
        let [gate, up] = products;
        self.activate_into(x.real(), gate, Some(up), biases, activation)
    }

    fn activated(
        &self,
        x: &Operands,
        weight: &Operands,
        bias: Option<&[f32]>,
        activation: Activation,
    ) -> Result<Operands> {
        check_product("activated", x, weight, bias)?;
        expect_alone("activated", activation)?;
        let mut y = self.matrix(x.shape()[0], weight.shape()[0])?;
        self.multiply("activated", x, weight, None, &mut y, 0.0)?;
        self.activate_into(x.real(), y, None, [bias, None], activation)
    }

    fn rms_norm(&self, x: &Matrix, weight: &[f32], eps: f32) -> Result<Matrix> {
        self.normed(x, &Norm::of_rows("rms_norm", x, NormKind::Rms, weight, None, eps)?)
    }

    fn layer_norm(&self, x: &Matrix, weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Result<Matrix> {
        self.normed(x, &Norm::of_rows("layer_norm", x, NormKind::Layer, weight, bias, eps)?)
    }

    fn norm_input(
        &self,
        x: &Matrix,
        kind: NormKind,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<Operands> {
        let norm = Norm::of_rows("norm_input", x, kind, weight, bias, eps)?;
        if !self.rounds() {
            return Ok(Operands::Whole(self.normed(x, &norm)?));
        }
        let count = x.rows * x.cols;
        let y = Rounded { buffer: self.buffer::<u16>(count)?, rows: x.rows, cols: x.cols };
        self.norm_into(&x.buffer.pin_to_read()?, &y.buffer.pin()?, true, count, &norm)?;
        Ok(Operands::Rounded(y))
    }

    fn norm_heads(
        &self,
        x: &mut Matrix,
        head_dim: usize,
        kind: NormKind,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<()> {
        expect_multiple("norm_heads", head_dim, x.cols)?;
        for values in [Some(weight), bias].into_iter().flatten().filter(|values| values.len() != head_dim) {
            expect("norm_heads", "weights", x.cols, values.len())?;
        }
        let (pin, norm) = (x.buffer.pin()?, Norm { width: head_dim, kind, weight, bias, eps });
        self.norm_into(&pin, &pin, false, x.rows * x.cols, &norm)
    }

    fn rope(
        &self,
        x: &mut Matrix,
        cos: &Array2<f32>,
        sin: &Array2<f32>,
        layout: &RopeLayout,
        lengths: &[usize],
    ) -> Result<()> {
        expect_rotation([x.rows, x.cols], cos, sin, layout, lengths)?;
        let (half, heads) = (cos.ncols(), x.cols / layout.head_dim);
        let positions: Vec<u32> = lengths.iter().flat_map(|&length| 0..length as u32).collect();
        let [cos, sin] = [cos, sin].map(|m| m.as_standard_layout().into_owned());
        let (cos, sin) = (self.send(cos.as_slice().expect("standard"))?, self.send(sin.as_slice().expect("standard"))?);
        let positions = self.send(&positions)?;
        let pins = (x.buffer.pin()?, cos.pin()?, sin.pin()?, positions.pin()?);
        let args = [
            pins.0.arg(),
            pins.1.arg(),
            pins.2.arg(),
            pins.3.arg(),
            (x.rows as i64).into(),
            (heads as i32).into(),
            (layout.head_dim as i32).into(),
            (layout.first as i32).into(),
            (half as i32).into(),
            layout.interleaved.into(),
        ];
        self.each(&ROPE, "rope", x.rows * heads * half, &args)
    }

    fn attention(
        &self,
        q: &Matrix,
        k: &Matrix,
        v: &Matrix,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Operands> {
        self.attend(q, k, v, sinks, shape, lengths)
    }

    fn select(
        &self,
        q: &Matrix,
        k: &Matrix,
        weights: Option<&Matrix>,
        shape: &IndexShape,
        lengths: &[usize],
    ) -> Result<Matrix> {
        self.chosen(q, k, weights, shape, lengths)
    }

    fn attention_to(
        &self,
        qkv: [&Matrix; 3],
        chosen: &Matrix,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        index: &IndexShape,
        lengths: &[usize],
    ) -> Result<Operands> {
        self.attend_to(qkv, chosen, sinks, shape, index, lengths)
    }

    fn attention_beside(
        &self,
        qkv: [&Matrix; 3],
        entries: &Entries<'_, Matrix>,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Operands> {
        self.attend_beside(qkv, entries, sinks, shape, lengths)
    }

    fn convolve(
        &self,
        x: &Matrix,
        weight: &[f32],
        bias: Option<&[f32]>,
        activation: Option<Activation>,
        lengths: &[usize],
    ) -> Result<Matrix> {
        self.convolved(x, weight, bias, activation, lengths)
    }

    fn decays(&self, x: &mut Matrix, rates: &[f32], bias: &[f32], limits: [f32; 2]) -> Result<()> {
        self.decayed(x, rates, bias, limits)
    }

    fn bounded_decays(&self, x: &mut Matrix, rates: &[f32], bias: &[f32], lower: f32) -> Result<()> {
        self.bounded(x, rates, bias, lower)
    }

    fn pool_blocks(
        &self,
        x: &Matrix,
        gates: &Matrix,
        places: &[f32],
        block: usize,
        overlap: bool,
        lengths: &[usize],
    ) -> Result<Matrix> {
        self.pooled(x, gates, places, (block, overlap), lengths)
    }

    fn delta_rule(
        &self,
        qkv: [&Matrix; 3],
        decay: &Matrix,
        beta: &Matrix,
        shape: &DeltaShape,
        lengths: &[usize],
    ) -> Result<Matrix> {
        self.recur(qkv, decay, beta, shape, lengths)
    }

    fn hyper_weights(&self, h: &Matrix, of: HyperParameters<'_>, shape: &HyperShape) -> Result<Matrix> {
        self.hyper(h, of, shape)
    }

    fn read_streams(&self, h: &Matrix, weights: &Matrix, streams: usize) -> Result<Matrix> {
        self.streams_read(h, weights, streams)
    }

    fn write_streams(&self, y: &Matrix, weights: &Matrix, shape: &HyperShape, h: &mut Matrix) -> Result<()> {
        self.streams_written(y, weights, shape, h)
    }

    fn activate(&self, x: &mut Matrix, activation: Activation) -> Result<()> {
        expect_alone("activate", activation)?;
        self.activate_in_place(x, None, activation)
    }

    fn gate(&self, gate: &mut Matrix, x: &Matrix, activation: Activation) -> Result<()> {
        expect("gate", "rows", gate.rows, x.rows)?;
        expect("gate", "features", gate.cols, x.cols)?;
        if let Some(limit) = activation.limit() {
            expect_limit("gate", limit)?;
        }
        self.activate_in_place(gate, Some(x), activation)
    }

    fn mix_streams(&self, x: &Matrix, coefficients: &Matrix, width: usize, y: &mut Matrix) -> Result<()> {
        self.mixed(x, coefficients, width, y)
    }

    fn match_streams(&self, x: &mut Matrix, width: usize, least: f32) -> Result<()> {
        self.matched(x, width, least)
    }

    fn agree_streams(&self, x: &Matrix, y: &Matrix, width: usize, least: f32) -> Result<Matrix> {
        self.agreement(x, y, width, least)
    }

    fn cut(&self, x: &mut Matrix, deviations: f32) -> Result<()> {
        self.cut_off(x, deviations)
    }

    fn join_heads(&self, own: &Matrix, shared: &Matrix, heads: usize) -> Result<Matrix> {
        expect_multiple("join_heads", heads, own.cols)?;
        expect("join_heads", "tokens", own.rows, shared.rows)?;
        let (a, b) = (own.cols / heads, shared.cols);
        let out = self.matrix(own.rows, heads * (a + b))?;
        let pins = (out.buffer.pin()?, own.buffer.pin_to_read()?, shared.buffer.pin_to_read()?);
        let args = [
            pins.0.arg(),
            pins.1.arg(),
            pins.2.arg(),
            (own.rows as i64).into(),
            (heads as i32).into(),
            (a as i32).into(),
            (b as i32).into(),
        ];
        self.each(&POINTWISE, "join_heads", out.rows * out.cols, &args)?;
        drop(pins);
        Ok(out)
    }

    fn spread_heads(&self, x: &Matrix, width: usize) -> Result<Matrix> {
        let out = self.matrix(x.rows, x.cols * width)?;
        let count = out.rows * out.cols;
        let pins = (out.buffer.pin()?, x.buffer.pin_to_read()?);
        let args = [pins.0.arg(), pins.1.arg(), (count as i64).into(), (width as i32).into()];
        self.each(&POINTWISE, "spread_heads", count, &args)?;
        drop(pins);
        Ok(out)
    }

    fn softcap(&self, x: &mut Matrix, cap: f32) -> Result<()> {
        let count = x.rows * x.cols;
        self.each(&POINTWISE, "softcap", count, &[x.buffer.pin()?.arg(), cap.into(), (count as i64).into()])
    }

    fn clamp(&self, x: &mut Matrix, limit: f32) -> Result<()> {
        expect_limit("clamp", limit)?;
        let count = x.rows * x.cols;
        self.each(&POINTWISE, "clamp_all", count, &[x.buffer.pin()?.arg(), limit.into(), (count as i64).into()])
    }

    fn add_rows(&self, x: &Matrix, rows: &[usize], weights: &[f32], y: &mut Matrix) -> Result<()> {
        expect("add_rows", "rows", x.rows, rows.len())?;
        expect("add_rows", "weights", x.rows, weights.len())?;
        expect("add_rows", "features", y.cols, x.cols)?;
        sources(rows, y.rows).map_err(|row| Error::Shape {
            op: "add_rows",
            expected: format!("distinct rows below {}", y.rows),
            found: row.to_string(),
        })?;
        let indices: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let (indices, weights) = (self.send(&indices)?, self.send(weights)?);
        let pins = (y.buffer.pin()?, x.buffer.pin_to_read()?, indices.pin()?, weights.pin()?);
        let args =
            [pins.0.arg(), pins.1.arg(), pins.2.arg(), pins.3.arg(), (x.rows as i64).into(), (x.cols as i32).into()];
        self.each(&POINTWISE, "add_rows", x.rows * x.cols, &args)
    }
}
