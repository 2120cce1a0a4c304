//! Running a model: products, norms, rotations, activations.

use ndarray::Array2;

use super::{Arg, Cuda, Matrix, Module, Operand, Operands, Pinned, Product, Rounded, at, expect, expect_multiple};
use crate::backend::{Activation, ActivationRounding, NormKind, RopeLayout};
use crate::checks::{expect_limit, expect_rotation};
use crate::ops::add::sources;
use crate::{Error, Result};

pub(super) static POINTWISE: Module = Module { name: "pointwise", source: include_str!("../ops/pointwise.cu") };
pub(super) static NORM: Module = Module { name: "norm", source: include_str!("../ops/norm.cu") };
pub(super) static ROUNDING: Module =
    Module { name: "round_activations", source: include_str!("../ops/round_activations.cu") };
pub(super) static ROPE: Module = Module { name: "rope", source: include_str!("../ops/rope.cu") };

/// Threads that norm one slice.
fn threads_for(width: usize) -> u32 {
    (width.div_ceil(4).next_multiple_of(32)).clamp(32, 256) as u32
}

fn code(activation: Activation) -> (i32, f32, f32) {
    match activation {
        Activation::Silu => (0, 0.0, 0.0),
        Activation::Gelu => (1, 0.0, 0.0),
        Activation::GeluTanh => (2, 0.0, 0.0),
        Activation::Relu => (3, 0.0, 0.0),
        Activation::Relu2 => (4, 0.0, 0.0),
        Activation::SwigluOai { alpha, limit } => (5, alpha, limit),
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
pub(super) struct Norm<'a> {
    /// Values of a slice.
    width: usize,
    kind: NormKind,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
}

impl<'a> Norm<'a> {
    /// That of whole rows of `x`. Fails unless there is a weight for each of its columns and, where there are biases, one of these.
    pub(super) fn of_rows(
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
    /// Rounds to bfloat16.
    pub(super) fn narrowed(&self, x: &Matrix) -> Result<Operands> {
        let count = x.rows * x.cols;
        let out = Rounded { buffer: self.buffer::<u16>(count)?, rows: x.rows, cols: x.cols };
        let pins = (out.buffer.pin()?, x.buffer.pin_to_read()?);
        let args = [pins.0.arg(), pins.1.arg(), (count as i64).into()];
        self.each(&POINTWISE, "narrow", count, &args)?;
        drop(pins);
        Ok(Operands::Rounded(out))
    }

    pub(super) fn rounded_activations(&self, x: &Operands, kind: ActivationRounding) -> Result<Operands> {
        let [rows, cols] = x.shape();
        let (mut out, count) = (self.matrix(rows, cols)?, rows * cols);
        {
            let (to, from) = (out.buffer.pin()?, x.pin()?);
            let stored = if x.real() == super::Real::Bf16 { 1 } else { 2 };
            self.each(&POINTWISE, "widen", count, &[to.arg(), from.arg(), stored.into(), (count as i64).into()])?;
        }
        self.rounded_values(&mut out, kind)?;
        match x {
            Operands::Whole(_) => Ok(Operands::Whole(out)),
            Operands::Rounded(_) => self.narrowed(&out),
        }
    }

    pub(super) fn rounded_values(&self, x: &mut Matrix, kind: ActivationRounding) -> Result<()> {
        let (count, length) = (x.rows * x.cols, kind.block_len());
        expect_multiple("round_values", length, x.cols)?;
        let to = x.buffer.pin()?;
        match kind {
            ActivationRounding::F16 | ActivationRounding::Bf16 => {
                let brain = kind == ActivationRounding::Bf16;
                self.each(&ROUNDING, "round_to_halves", count, &[to.arg(), brain.into(), (count as i64).into()])
            }
            ActivationRounding::Int8Token | ActivationRounding::Fp8Token => {
                let floats = kind == ActivationRounding::Fp8Token;
                let args = [to.arg(), (x.rows as i64).into(), (x.cols as i32).into(), floats.into()];
                self.each(&ROUNDING, "round_tokens", x.rows * 32, &args)
            }
            ActivationRounding::Q8_0 | ActivationRounding::Q8K => {
                let (blocks, half) = (count / length, kind == ActivationRounding::Q8_0);
                let args = [to.arg(), (blocks as i64).into(), (length as i32).into(), half.into()];
                self.each(&ROUNDING, "round_to_bytes", blocks * 32, &args)
            }
        }
    }

    /// `y ← x wᵀ + bias + keep · y`.
    pub(super) fn multiply(
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
    fn activate(
        &self,
        real: super::Real,
        gate: Matrix,
        up: Option<Matrix>,
        biases: [Option<&[f32]>; 2],
        activation: Activation,
    ) -> Result<Operands> {
        let (rows, cols) = (gate.rows, gate.cols);
        let (kind, alpha, limit) = code(activation);
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
                alpha.into(),
                limit.into(),
                (rows as i64).into(),
                (cols as i32).into(),
            ];
            self.each(&POINTWISE, if rounded { "activate_rounded" } else { "activate" }, rows * cols, &args)?;
        }
        Ok(narrow.map_or(Operands::Whole(gate), Operands::Rounded))
    }

    pub(super) fn gated_product(
        &self,
        x: &Operands,
        [gate, up]: [&Operands; 2],
        biases: [Option<&[f32]>; 2],
        activation: Activation,
    ) -> Result<Operands> {
        check_product("gated", x, gate, biases[0])?;
        check_product("gated", x, up, biases[1])?;
        expect("gated", "output features", gate.shape()[0], up.shape()[0])?;
        if let Activation::SwigluOai { limit, .. } = activation {
            expect_limit("gated", limit)?;
        }
        let (tokens, outs) = (x.shape()[0], gate.shape()[0]);
        let mut products = [self.matrix(tokens, outs)?, self.matrix(tokens, outs)?];
        for (weight, y) in [gate, up].into_iter().zip(&mut products) {
            self.multiply("gated", x, weight, None, y, 0.0)?;
        }
        let [gate, up] = products;
        self.activate(x.real(), gate, Some(up), biases, activation)
    }

    pub(super) fn activated_product(
        &self,
        x: &Operands,
        weight: &Operands,
        bias: Option<&[f32]>,
        activation: Activation,
    ) -> Result<Operands> {
        check_product("activated", x, weight, bias)?;
        if let Activation::SwigluOai { .. } = activation {
            let (expected, found) = ("a function of one value".to_owned(), format!("{activation:?}"));
            return Err(Error::Shape { op: "activated", expected, found });
        }
        let mut y = self.matrix(x.shape()[0], weight.shape()[0])?;
        self.multiply("activated", x, weight, None, &mut y, 0.0)?;
        self.activate(x.real(), y, None, [bias, None], activation)
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
            (kind == NormKind::Layer).into(),
            eps.into(),
        ];
        let kernel = if rounded { "norm_rounded" } else { "norm_slices" };
        self.blocks(&NORM, kernel, count / width, threads_for(width), 0, &args)
    }

    pub(super) fn normed(&self, x: &Matrix, norm: &Norm<'_>) -> Result<Matrix> {
        let y = self.matrix(x.rows, x.cols)?;
        self.norm_into(&x.buffer.pin_to_read()?, &y.buffer.pin()?, false, x.rows * x.cols, norm)?;
        Ok(y)
    }

    /// Normed, as products read it.
    pub(super) fn normed_input(&self, x: &Matrix, norm: &Norm<'_>) -> Result<Operands> {
        if !self.rounds() {
            return Ok(Operands::Whole(self.normed(x, norm)?));
        }
        let count = x.rows * x.cols;
        let y = Rounded { buffer: self.buffer::<u16>(count)?, rows: x.rows, cols: x.cols };
        self.norm_into(&x.buffer.pin_to_read()?, &y.buffer.pin()?, true, count, norm)?;
        Ok(Operands::Rounded(y))
    }

    pub(super) fn norm_slices(
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

    pub(super) fn rotate(
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

    pub(super) fn gather_rows(&self, matrix: &Matrix, rows: &[usize]) -> Result<Matrix> {
        if let Some(row) = rows.iter().find(|row| **row >= matrix.rows) {
            let expected = format!("rows below {}", matrix.rows);
            return Err(Error::Shape { op: "select_rows", expected, found: row.to_string() });
        }
        let out = self.matrix(rows.len(), matrix.cols)?;
        let indices: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let indices = self.send(&indices)?;
        let pins = (out.buffer.pin()?, matrix.buffer.pin_to_read()?, indices.pin()?);
        let args = [pins.0.arg(), pins.1.arg(), pins.2.arg(), (rows.len() as i64).into(), (matrix.cols as i32).into()];
        self.each(&POINTWISE, "select_rows", rows.len() * matrix.cols, &args)?;
        drop(pins);
        Ok(out)
    }

    pub(super) fn scale_sides(&self, matrix: &mut Matrix, rows: &[f32], cols: &[f32]) -> Result<()> {
        for (side, factors, length) in [("rows", rows, matrix.rows), ("columns", cols, matrix.cols)] {
            if !factors.is_empty() {
                expect("scale", side, length, factors.len())?;
            }
        }
        let sent = |factors: &[f32]| (!factors.is_empty()).then(|| self.send(factors)).transpose();
        let (rows, cols) = (sent(rows)?, sent(cols)?);
        let (rows, cols) = (rows.as_ref().map(|b| b.pin()).transpose()?, cols.as_ref().map(|b| b.pin()).transpose()?);
        let count = matrix.rows * matrix.cols;
        let pinned = matrix.buffer.pin()?;
        let args = [
            pinned.arg(),
            at(rows.as_ref()),
            at(cols.as_ref()),
            (matrix.rows as i64).into(),
            (matrix.cols as i32).into(),
        ];
        self.each(&POINTWISE, "scale_sides", count, &args)
    }

    pub(super) fn all_finite(&self, matrix: &Matrix) -> Result<bool> {
        let flag = self.cleared::<i32>(1)?;
        let count = matrix.rows * matrix.cols;
        let pins = (flag.pin()?, matrix.buffer.pin_to_read()?);
        let args = [pins.0.arg(), pins.1.arg(), (count as i64).into()];
        self.each(&POINTWISE, "find_not_finite", count, &args)?;
        drop(pins);
        Ok(self.fetch::<i32>(&flag, 1)?[0] == 0)
    }

    pub(super) fn joined(&self, own: &Matrix, shared: &Matrix, heads: usize) -> Result<Matrix> {
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

    pub(super) fn capped(&self, x: &mut Matrix, cap: f32) -> Result<()> {
        let count = x.rows * x.cols;
        self.each(&POINTWISE, "softcap", count, &[x.buffer.pin()?.arg(), cap.into(), (count as i64).into()])
    }

    pub(super) fn clamped(&self, x: &mut Matrix, limit: f32) -> Result<()> {
        expect_limit("clamp", limit)?;
        let count = x.rows * x.cols;
        self.each(&POINTWISE, "clamp_all", count, &[x.buffer.pin()?.arg(), limit.into(), (count as i64).into()])
    }

    pub(super) fn add_multiple(&self, x: &Matrix, factor: f32, y: &mut Matrix) -> Result<()> {
        expect("add_scaled", "tokens", y.rows, x.rows)?;
        expect("add_scaled", "features", y.cols, x.cols)?;
        let count = x.rows * x.cols;
        let pins = (y.buffer.pin()?, x.buffer.pin_to_read()?);
        let args = [pins.0.arg(), pins.1.arg(), factor.into(), (count as i64).into()];
        self.each(&POINTWISE, "add_scaled", count, &args)
    }

    pub(super) fn scatter_rows(&self, x: &Matrix, rows: &[usize], weights: &[f32], y: &mut Matrix) -> Result<()> {
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

    pub(super) fn subtracted(&self, a: &Matrix, b: &Matrix) -> Result<Matrix> {
        expect("difference", "rows", a.rows, b.rows)?;
        expect("difference", "columns", a.cols, b.cols)?;
        let (out, count) = (self.matrix(a.rows, a.cols)?, a.rows * a.cols);
        let pins = (out.buffer.pin()?, a.buffer.pin_to_read()?, b.buffer.pin_to_read()?);
        let args = [pins.0.arg(), pins.1.arg(), pins.2.arg(), Arg::Long(count as i64)];
        self.each(&POINTWISE, "difference", count, &args)?;
        drop(pins);
        Ok(out)
    }
}
