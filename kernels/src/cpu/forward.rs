//! Running a model.

use ndarray::Array2;
use rayon::prelude::*;

use super::{Cpu, Input, Weight, flat};
use crate::backend::{
    Activation, ActivationRounding, AttentionShape, DeltaShape, Entries, Forward, HyperParameters, HyperShape,
    IndexShape, Memory, NormKind, RopeLayout,
};
use crate::checks::{
    expect, expect_alike, expect_alone, expect_attention, expect_choice, expect_convolution, expect_delta,
    expect_entries, expect_hyper, expect_index, expect_limit, expect_multiple, expect_pool, expect_rotation,
    expect_streams, expect_weights,
};
use crate::ops::{
    activation, add, attention, beside, bf16, convolve, delta, heads, hyper, linear, norm, pool, rope,
    round_activations, softcap, sparse, streams,
};
use crate::{Error, Result};

fn check_product(op: &'static str, x: &Input, weight: &Weight, bias: Option<&[f32]>) -> Result<()> {
    let [outs, cols] = weight.shape();
    expect(op, "input features", cols, x.shape()[1])?;
    bias.map_or(Ok(()), |bias| expect(op, "bias values", outs, bias.len()))
}

/// Operands of one product that were made by the exact and by the relaxed backend.
fn mixed(op: &'static str) -> Error {
    Error::Shape { op, expected: "operands of one precision".to_owned(), found: "two".to_owned() }
}

impl Forward for Cpu {
    type Weight = Weight;

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
        if let Some(limit) = activation.limit() {
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
        expect_alone("activated", activation)?;
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

    fn select(
        &self,
        q: &Array2<f32>,
        k: &Array2<f32>,
        weights: Option<&Array2<f32>>,
        shape: &IndexShape,
        lengths: &[usize],
    ) -> Result<Array2<f32>> {
        let of = |m: &Array2<f32>| [m.nrows(), m.ncols()];
        expect_index([of(q), of(k)], weights.map(of), shape, lengths)?;
        Ok(sparse::select(q.view(), k.view(), weights.map(|m| m.view()), shape, lengths))
    }

    fn attention_to(
        &self,
        qkv: [&Array2<f32>; 3],
        chosen: &Array2<f32>,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        index: &IndexShape,
        lengths: &[usize],
    ) -> Result<Input> {
        let of = |m: &Array2<f32>| [m.nrows(), m.ncols()];
        expect_choice(qkv.map(of), of(chosen), sinks, shape, index, lengths)?;
        self.input(sparse::attend(qkv.map(|m| m.view()), chosen.view(), sinks, shape, index, lengths))
    }

    fn attention_beside(
        &self,
        qkv: [&Array2<f32>; 3],
        entries: &Entries<'_, Array2<f32>>,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Input> {
        let of = |m: &Array2<f32>| [m.nrows(), m.ncols()];
        let Entries { values, block, chosen } = *entries;
        expect_entries(qkv.map(of), of(values), (block, chosen.map(of)), sinks, shape, lengths)?;
        let far = beside::Far { values: values.view(), block, chosen: chosen.map(|m| m.view()) };
        self.input(beside::run(qkv.map(|m| m.view()), far, sinks, shape, lengths))
    }

    fn convolve(
        &self,
        x: &Array2<f32>,
        weight: &[f32],
        bias: Option<&[f32]>,
        activation: Option<Activation>,
        lengths: &[usize],
    ) -> Result<Array2<f32>> {
        expect_convolution([x.nrows(), x.ncols()], weight, bias, activation, lengths)?;
        Ok(convolve::run(x.view(), weight, bias, activation, lengths))
    }

    fn decays(&self, x: &mut Array2<f32>, rates: &[f32], bias: &[f32], limits: [f32; 2]) -> Result<()> {
        expect("decays", "rates", x.ncols(), rates.len())?;
        expect("decays", "bias values", x.ncols(), bias.len())?;
        delta::decays(x, rates, bias, limits);
        Ok(())
    }

    fn bounded_decays(&self, x: &mut Array2<f32>, rates: &[f32], bias: &[f32], lower: f32) -> Result<()> {
        expect("bounded_decays", "rates", x.ncols(), rates.len())?;
        expect("bounded_decays", "bias values", x.ncols(), bias.len())?;
        delta::bounded_decays(x, rates, bias, lower);
        Ok(())
    }

    fn pool_blocks(
        &self,
        x: &Array2<f32>,
        gates: &Array2<f32>,
        places: &[f32],
        block: usize,
        overlap: bool,
        lengths: &[usize],
    ) -> Result<Array2<f32>> {
        let of = |m: &Array2<f32>| [m.nrows(), m.ncols()];
        expect_pool(of(x), of(gates), places, (block, overlap), lengths)?;
        Ok(pool::run(x.view(), gates.view(), places, (block, overlap), lengths))
    }

    fn delta_rule(
        &self,
        qkv: [&Array2<f32>; 3],
        decay: &Array2<f32>,
        beta: &Array2<f32>,
        shape: &DeltaShape,
        lengths: &[usize],
    ) -> Result<Array2<f32>> {
        let [q, k, v] = qkv;
        expect_delta([q, k, v, decay, beta].map(|m| [m.nrows(), m.ncols()]), shape, lengths)?;
        Ok(delta::run(qkv.map(|m| m.view()), decay.view(), beta.view(), shape, lengths))
    }

    fn hyper_weights(&self, h: &Array2<f32>, of: HyperParameters<'_>, shape: &HyperShape) -> Result<Array2<f32>> {
        expect_hyper([h.nrows(), h.ncols()], of, shape)?;
        Ok(hyper::weights(h.view(), of, shape))
    }

    fn read_streams(&self, h: &Array2<f32>, weights: &Array2<f32>, streams: usize) -> Result<Array2<f32>> {
        expect_weights([h.nrows(), h.ncols()], [weights.nrows(), weights.ncols()], streams, streams)?;
        Ok(hyper::read(h.view(), weights.view(), streams))
    }

    fn write_streams(
        &self,
        y: &Array2<f32>,
        weights: &Array2<f32>,
        shape: &HyperShape,
        h: &mut Array2<f32>,
    ) -> Result<()> {
        let (of_h, of_weights) = ([h.nrows(), h.ncols()], [weights.nrows(), weights.ncols()]);
        expect_weights(of_h, of_weights, shape.streams, shape.weights().max(2 * shape.streams))?;
        expect("write_streams", "tokens", h.nrows(), y.nrows())?;
        expect("write_streams", "features", h.ncols() / shape.streams, y.ncols())?;
        hyper::write(y.view(), weights.view(), shape, h);
        Ok(())
    }

    fn activate(&self, x: &mut Array2<f32>, activation: Activation) -> Result<()> {
        expect_alone("activate", activation)?;
        activation::run(activation, flat(x));
        Ok(())
    }

    fn gate(&self, gate: &mut Array2<f32>, x: &Array2<f32>, activation: Activation) -> Result<()> {
        expect("gate", "rows", gate.nrows(), x.nrows())?;
        expect("gate", "features", gate.ncols(), x.ncols())?;
        if let Some(limit) = activation.limit() {
            expect_limit("gate", limit)?;
        }
        activation::gate(activation, flat(gate), x.as_slice().expect("contiguous"));
        Ok(())
    }

    fn mix_streams(
        &self,
        x: &Array2<f32>,
        coefficients: &Array2<f32>,
        width: usize,
        y: &mut Array2<f32>,
    ) -> Result<()> {
        let of = |m: &Array2<f32>| [m.nrows(), m.ncols()];
        expect_streams([of(x), of(coefficients), of(y)], width)?;
        streams::run(x.view(), coefficients.view(), width, y);
        Ok(())
    }

    fn match_streams(&self, x: &mut Array2<f32>, width: usize, least: f32) -> Result<()> {
        expect_multiple("match_streams", width, x.ncols())?;
        streams::match_first(x, width, least);
        Ok(())
    }

    fn agree_streams(&self, x: &Array2<f32>, y: &Array2<f32>, width: usize, least: f32) -> Result<Array2<f32>> {
        expect_alike("agree_streams", [x.nrows(), x.ncols()], [y.nrows(), y.ncols()], width)?;
        Ok(streams::agree(x.view(), y.view(), width, least))
    }

    fn cut(&self, x: &mut Array2<f32>, deviations: f32) -> Result<()> {
        streams::cut(x, deviations);
        Ok(())
    }

    fn join_heads(&self, own: &Array2<f32>, shared: &Array2<f32>, heads: usize) -> Result<Array2<f32>> {
        expect_multiple("join_heads", heads, own.ncols())?;
        expect("join_heads", "tokens", own.nrows(), shared.nrows())?;
        Ok(heads::run(own.view(), shared.view(), heads))
    }

    fn spread_heads(&self, x: &Array2<f32>, width: usize) -> Result<Array2<f32>> {
        Ok(heads::spread(x.view(), width))
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
}
