//! Layers of linear attention, as llama.cpp's classes of Qwen3-Next, Qwen3.5, Kimi Linear, Ling and GLM-5.3-Flash have them.
//!
//! Of Qwen's queries, keys and values are one tensor, and the gate another, whichever of them the model stores together. In some architectures the heads of
//! values that share a head of keys do not follow each other: heads take turns, so that a sum over them needs no copy of the keys.

use kernels::DeltaShape;

use super::{From, Lister, Part};
use crate::dialect::architectures::Need;
use crate::error::Result;
use crate::graph::{Convolution, DeltaNet, Linear, Narrow};

/// The order of heads of values in a file, each of `width` rows or columns; `None` where it is their own.
fn order(shape: &DeltaShape, tiled: bool, width: usize) -> Option<Vec<usize>> {
    let DeltaShape { key_heads, value_heads, .. } = *shape;
    let of_each = value_heads / key_heads;
    let turns = tiled && of_each > 1 && key_heads > 1;
    let head = move |at: usize| at % key_heads * of_each + at / key_heads;
    turns.then(|| (0..value_heads).flat_map(|at| (0..width).map(move |row| head(at) * width + row)).collect())
}

/// Rows of a linear in the order of `order`, which counts them within the linear's own part.
fn ordered(rows: Vec<usize>, order: Option<&Vec<usize>>) -> Vec<usize> {
    match order {
        Some(order) => order.iter().map(|at| rows[*at]).collect(),
        None => rows,
    }
}

impl Lister {
    /// Fails for heads of queries and values that differ in width, which these classes do not know.
    pub(super) fn delta(&mut self, at: &str, delta: &DeltaNet) -> Result<()> {
        if delta.shape.by_channel {
            return self.channels(at, delta);
        }
        let DeltaNet { inputs, rates, convolution, shape, decay, norm, out, .. } = delta;
        let tiled = self.architecture.tiled;
        let DeltaShape { key_heads, value_heads, key_dim, value_dim, .. } = *shape;
        if key_dim != value_dim {
            return Err(self.cannot(format_args!("linear attention with keys of {key_dim} and values of {value_dim}")));
        }
        let (by_head, by_row) = (order(shape, tiled, 1), order(shape, tiled, value_dim));
        let parts: Vec<(&Linear, Vec<usize>)> = inputs.iter().flat_map(parts).collect();
        let [(first, q), (second, k), (third, v), (gate, z)] = &parts[..] else {
            return Err(self.cannot("linear attention of this form"));
        };
        if first.module != second.module || second.module != third.module {
            return Err(self.cannot("queries, keys and values of linear attention that are stored apart"));
        }
        let rows = [q.clone(), k.clone(), ordered(v.clone(), by_row.as_ref())].concat();
        self.rows(&format!("{at}.attn_qkv"), first, rows)?;
        self.rows(&format!("{at}.attn_gate"), gate, ordered(z.clone(), by_row.as_ref()))?;

        let Convolution { tensors, bias, channels, taps, .. } = convolution;
        if bias.is_some() {
            return Err(self.cannot("a convolution with a bias"));
        }
        let keys = 2 * key_heads * key_dim;
        let channel = |order: &Vec<usize>| (0..keys).chain(order.iter().map(|row| keys + row)).collect();
        let [(tensor, _)] = &tensors[..] else {
            return Err(self.cannot("convolutions of queries, keys and values that are stored apart"));
        };
        let from = From::Tensor(tensor.clone(), vec![*channels, 1, *taps]);
        let part = Part::some(from, by_row.as_ref().map(channel));
        self.push(format!("{at}.ssm_conv1d.weight"), vec![*channels, *taps], vec![part]);

        let heads = |(tensor, shape): &(String, Vec<usize>)| {
            Part::some(From::Tensor(tensor.clone(), shape.clone()), by_head.clone())
        };
        self.push(format!("{at}.ssm_dt.bias"), vec![value_heads], vec![heads(&decay.bias)]);
        self.push(format!("{at}.ssm_a"), vec![value_heads], vec![Part { rates: Some(-1.0), ..heads(&decay.rates) }]);
        match &rates[..] {
            // Both of each head of keys together, as they are stored.
            [both] => self.linear(&format!("{at}.ssm_ba"), both, None, Need::Never)?,
            [beta, alpha] => {
                self.linear(&format!("{at}.ssm_beta"), beta, by_head.clone(), Need::Never)?;
                self.linear(&format!("{at}.ssm_alpha"), alpha, by_head.clone(), Need::Never)?;
            }
            _ => return Err(self.cannot("linear attention of this form")),
        }
        self.norm(&format!("{at}.ssm_norm"), norm)?;
        let part = Part { columns: by_row, ..Part::whole(From::Weight(out.clone())) };
        self.push(format!("{at}.ssm_out.weight"), vec![out.rows, out.cols], vec![part]);
        self.bias(&format!("{at}.ssm_out"), &[(out, None)], Need::Never)
    }

    /// Kimi Linear's, Ling's and GLM-5.3's, whose channels decay each by itself; Ling's decays and gates are made by one linear each.
    ///
    /// Fails for heads of another number or width than the class has, and for convolutions with biases.
    fn channels(&mut self, at: &str, delta: &DeltaNet) -> Result<()> {
        let DeltaNet { inputs, rates, narrow, convolution, shape, decay, norm, out, .. } = delta;
        let DeltaShape { value_heads, key_dim, value_dim, .. } = *shape;
        let (Some([q, k, v]), [beta, ..], [_, _, _]) =
            (inputs.first_chunk::<3>(), &rates[..], &convolution.tensors[..])
        else {
            return Err(self.cannot("linear attention of this form"));
        };
        let class = matches!(
            (self.architecture.id, narrow, decay.lower),
            ("kimi-linear", Some(_), None) | ("bailingmoe3", None, Some(_)) | ("glm5-next", Some(_), _)
        );
        if !class || key_dim != value_dim {
            return Err(self.cannot("linear attention whose channels decay each by itself"));
        }
        for (name, linear) in [("attn_q", q), ("attn_k", k), ("attn_v", v), ("ssm_beta", beta), ("attn_output", out)] {
            self.linear(&format!("{at}.{name}"), linear, None, Need::Never)?;
        }
        let [decays, gates] = match narrow.as_deref() {
            Some(Narrow { decay, gate }) => [&decay[..], &gate[..]],
            None => [&rates[1..], &inputs[3..]],
        };
        for (name, linears) in [("f", decays), ("g", gates)] {
            for (part, linear) in ["a", "b"].into_iter().zip(linears) {
                self.linear(&format!("{at}.ssm_{name}_{part}"), linear, None, Need::Never)?;
            }
        }
        if convolution.bias.is_some() {
            return Err(self.cannot("a convolution with a bias"));
        }
        for (name, (tensor, channels)) in ["q", "k", "v"].into_iter().zip(&convolution.tensors) {
            let extents = vec![*channels, 1, convolution.taps];
            let part = Part::whole(From::Tensor(tensor.clone(), extents.clone()));
            self.push(format!("{at}.ssm_conv1d_{name}.weight"), extents, vec![part]);
        }
        let whole = |(tensor, shape): &(String, Vec<usize>)| Part::whole(From::Tensor(tensor.clone(), shape.clone()));
        self.push(format!("{at}.ssm_dt.bias"), vec![value_heads * key_dim], vec![whole(&decay.bias)]);
        // Ling's alone are written without a sign, and GLM-5.3's alone as a vector.
        let sign = if self.architecture.id == "bailingmoe3" { 1.0 } else { -1.0 };
        let extents = if self.architecture.id == "glm5-next" { vec![value_heads] } else { vec![value_heads, 1] };
        let from = From::Tensor(decay.rates.0.clone(), extents.clone());
        let part = Part { rates: Some(sign), ..Part::whole(from) };
        self.push(format!("{at}.ssm_a"), extents, vec![part]);
        self.norm(&format!("{at}.ssm_norm"), norm)
    }

    /// These rows of a linear.
    pub(super) fn rows(&mut self, name: &str, linear: &Linear, rows: Vec<usize>) -> Result<()> {
        let rows = (!rows.iter().copied().eq(0..linear.rows)).then_some(rows);
        self.linear(name, linear, rows, Need::Never)
    }
}

/// The rows of each part of a linear.
fn parts(linear: &Linear) -> impl Iterator<Item = (&Linear, Vec<usize>)> {
    let rows = |part| linear.split.rows(part).unwrap_or_else(|| (0..linear.rows).collect());
    (0..linear.split.parts()).map(move |part| (linear, rows(part)))
}
