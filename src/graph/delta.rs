//! Layers with a state that every token changes, in place of attention to all tokens before it.

use kernels::{Activation, DeltaShape};

use super::{Linear, Norm};

/// Linear attention by the gated delta rule (Gated DeltaNet).
#[derive(Clone, Debug)]
pub struct DeltaNet {
    /// Linears whose parts are queries, keys, values, and the gate of the result unless it is made by others, in this order.
    pub inputs: Vec<Linear>,
    /// Linears whose parts are, a number for each head of values, the logits of what is written and what decays are made of, unless that is
    /// made by others; never quantized, for they are tiny and all of a state hangs on them.
    pub rates: Vec<Linear>,
    /// What makes the others, if anything does.
    pub narrow: Option<Box<Narrow>>,
    /// Of queries, keys and values, whose channels follow each other.
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
    /// What is done to the gate before it multiplies.
    pub activation: Activation,
    /// From the gated values of all heads, `[hidden, value_heads · value_dim]`.
    pub out: Linear,
}

/// What decays and the gate are made by in two linears each, the first of which is as narrow as a head; never quantized, as other linears that make
/// decays.
#[derive(Clone, Debug)]
pub struct Narrow {
    /// To what decays are made of, a number for each channel of the keys.
    pub decay: [Linear; 2],
    /// To the gate of the result.
    pub gate: [Linear; 2],
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
    /// How far apart they are: 1 where they follow each other.
    pub dilation: usize,
    /// What is done to the sums.
    pub activation: Option<Activation>,
}

/// The logarithms of decays: `−exp(rates) · step`, `step = clamp(ln(1 + exp(x + bias)))`, for each head or each channel of its keys.
#[derive(Clone, Debug)]
pub struct Decay {
    /// Tensor of the logarithms of rates, one for each head, and its extents.
    pub rates: (String, Vec<usize>),
    /// Tensor of what is added, as many as there are decays, and its extents.
    pub bias: (String, Vec<usize>),
    /// The shortest step and the longest.
    pub limits: [f32; 2],
    /// The least that a logarithm may be, where they are this times `σ(exp(rates) · (x + bias))` instead.
    pub lower: Option<f32>,
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

    /// Its linears that never are.
    pub(super) fn fixed(&self) -> impl Iterator<Item = &Linear> {
        let narrow = self.narrow.iter().flat_map(|narrow| narrow.decay.iter().chain(&narrow.gate));
        self.rates.iter().chain(narrow)
    }

    /// Its tensors that are no linears and no norms, with their shapes.
    pub(super) fn vectors(&self) -> Vec<(String, Vec<usize>)> {
        self.convolution.vectors().chain([self.decay.rates.clone(), self.decay.bias.clone()]).collect()
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        let narrow = self.narrow.iter_mut().flat_map(|narrow| narrow.decay.iter_mut().chain(&mut narrow.gate));
        self.inputs.iter_mut().chain(&mut self.rates).chain(narrow).chain([&mut self.out]).for_each(change);
    }

    /// Gives every tensor that is no linear's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        let DeltaNet { convolution, decay, norm, .. } = self;
        convolution.rename(name);
        let others = [&mut decay.rates.0, &mut decay.bias.0].into_iter().chain(&mut norm.weights);
        others.for_each(|tensor| *tensor = name(tensor));
    }

    /// Numbers that a sequence leaves in memory however long it is: what convolutions still need of the last tokens, and the state.
    pub fn state(&self) -> [u64; 2] {
        [self.convolution.last(), self.shape.state()]
    }
}
