//! Layers with a state that every token changes, in place of attention to all tokens before it.

use kernels::{Activation, DeltaShape};

use super::{Linear, Norm};

/// Linear attention by the gated delta rule (Gated DeltaNet).
#[derive(Clone, Debug)]
pub struct DeltaNet {
    /// Linears whose parts are queries, keys, values, and the gate of the result, in this order.
    pub inputs: Vec<Linear>,
    /// Linears whose parts are, a number for each head of values, the logits of what is written and what decays are made of; never
    /// quantized, for they are tiny and all of a state hangs on them.
    pub rates: Vec<Linear>,
    /// Of queries, keys and values, whose channels follow each other in it.
    pub convolution: Convolution,
    /// Heads, their widths and the scale.
    pub shape: DeltaShape,
    /// How fast a state forgets.
    pub decay: Decay,
    /// Factor on the share that is written.
    pub share: f32,
    /// Of queries and keys after the convolution, each head by itself: their length alone, without a weight.
    pub unit: Norm,
    /// Of the result, each head by itself, before it is multiplied by the gate.
    pub norm: Norm,
    /// Of the gate.
    pub activation: Activation,
    /// From the gated values of all heads, `[hidden, value_heads · value_dim]`.
    pub out: Linear,
}

/// A causal convolution of a few taps, each channel by itself.
#[derive(Clone, Debug)]
pub struct Convolution {
    /// Tensors and their channels, one after the other: `[channels, 1, taps]`, the last of a channel's for the token itself.
    pub tensors: Vec<(String, usize)>,
    /// Tensor of one value a channel that is added.
    pub bias: Option<String>,
    /// Channels of all of them.
    pub channels: usize,
    /// The token and those before it that count.
    pub taps: usize,
    /// What is done to the sums.
    pub activation: Option<Activation>,
}

/// The logarithms of decays: `−exp(rates) · step`, `step = clamp(ln(1 + exp(x + bias)))`, for each head.
#[derive(Clone, Debug)]
pub struct Decay {
    /// Tensor of the logarithms of rates, `[heads]`.
    pub rates: String,
    /// Tensor of what is added, `[heads]`.
    pub bias: String,
    /// The shortest step and the longest.
    pub limits: [f32; 2],
}

impl Decay {
    /// Steps of any length.
    pub const UNLIMITED: [f32; 2] = [0.0, f32::INFINITY];
}

impl DeltaNet {
    /// Its linears that may be quantized, those that read one input together.
    pub(super) fn linears(&self) -> Vec<Vec<&Linear>> {
        vec![self.inputs.iter().collect(), vec![&self.out]]
    }

    /// Its tensors that are no linears and no norms, with their shapes.
    pub(super) fn vectors(&self) -> Vec<(String, Vec<usize>)> {
        let heads = [&self.decay.rates, &self.decay.bias];
        let heads = heads.map(|name| (name.clone(), vec![self.shape.value_heads]));
        self.convolution.vectors().chain(heads).collect()
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        self.inputs.iter_mut().chain(&mut self.rates).chain([&mut self.out]).for_each(change);
    }

    /// Gives every tensor that is no linear's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        let DeltaNet { convolution, decay, norm, .. } = self;
        convolution.rename(name);
        let others = [&mut decay.rates, &mut decay.bias].into_iter().chain(&mut norm.weights);
        others.for_each(|tensor| *tensor = name(tensor));
    }

    /// Numbers that a sequence leaves in memory however long it is: what the convolution still needs of the last tokens, and the state.
    pub fn state(&self) -> [u64; 2] {
        [self.convolution.last(), self.shape.state()]
    }
}
