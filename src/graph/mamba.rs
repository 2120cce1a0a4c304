//! Layers with a state in place of attention that are no gated delta rule: Mamba 2 and gated short convolutions.

use kernels::{Activation, DeltaShape};

use super::{Convolution, Decay, Linear, Norm};

/// A state space whose heads each forget at a rate of their own (Mamba 2).
#[derive(Clone, Debug)]
pub struct Mamba {
    /// Its parts are the gate of the result, then values, keys and queries (x, B and C), then a number for each head, of which the steps
    /// are made; in this order.
    pub input: Linear,
    /// What these parts are multiplied by.
    pub scales: [f32; 5],
    /// Of values, keys and queries, whose channels follow each other in it.
    pub convolution: Convolution,
    /// Heads, their widths and the scale.
    pub shape: DeltaShape,
    /// How long a step is, and how fast a state forgets in it.
    pub decay: Decay,
    /// Tensor of what a head's values are multiplied by before they are added to its result, `[heads]`.
    pub skip: String,
    /// Of the result, in groups of consecutive channels.
    pub norm: Option<GroupNorm>,
    /// What is done to the gate before it multiplies.
    pub activation: Activation,
    /// From the gated values of all heads, `[hidden, heads · value_dim]`.
    pub out: Linear,
}

/// A norm of groups of channels beside a gate.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// With a weight for each channel.
    pub norm: Norm,
    /// Channels that are normed together.
    pub width: usize,
    /// It comes before the gate, not after it.
    pub first: bool,
}

/// A short convolution between two gates (LFM2).
#[derive(Clone, Debug)]
pub struct ShortConvolution {
    /// Its parts are the gate before the convolution, the gate behind it, and what goes through both; each as wide as the convolution.
    pub input: Linear,
    /// Of what the first gate has multiplied.
    pub convolution: Convolution,
    /// Back to the residual stream.
    pub out: Linear,
}

impl Mamba {
    /// Its linears, those that read one input together.
    pub(super) fn linears(&self) -> Vec<Vec<&Linear>> {
        vec![vec![&self.input], vec![&self.out]]
    }

    /// Its tensors that are no linears and no norms, with their shapes.
    pub(super) fn vectors(&self) -> Vec<(String, Vec<usize>)> {
        let skip = (self.skip.clone(), vec![self.shape.value_heads]);
        let of_heads = [self.decay.rates.clone(), self.decay.bias.clone(), skip];
        self.convolution.vectors().chain(of_heads).collect()
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        [&mut self.input, &mut self.out].into_iter().for_each(change);
    }

    /// Gives every tensor that is no linear's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        let Mamba { convolution, decay, skip, norm, .. } = self;
        convolution.rename(name);
        let norms = norm.iter_mut().flat_map(|norm| &mut norm.norm.weights);
        [&mut decay.rates.0, &mut decay.bias.0, skip]
            .into_iter()
            .chain(norms)
            .for_each(|tensor| *tensor = name(tensor));
    }

    /// Numbers that a sequence leaves in memory, as of [`super::DeltaNet::state`].
    pub fn state(&self) -> [u64; 2] {
        [self.convolution.last(), self.shape.state()]
    }
}

impl ShortConvolution {
    /// Its linears, those that read one input together.
    pub(super) fn linears(&self) -> Vec<Vec<&Linear>> {
        vec![vec![&self.input], vec![&self.out]]
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        [&mut self.input, &mut self.out].into_iter().for_each(change);
    }
}

impl Convolution {
    /// Its tensors, with their shapes.
    pub(super) fn vectors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        let Convolution { tensors, bias, channels, taps, .. } = self;
        let bias = bias.iter().map(|name| (name.clone(), vec![*channels]));
        tensors.iter().map(|(name, channels)| (name.clone(), vec![*channels, 1, *taps])).chain(bias)
    }

    /// Gives its tensors another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        let tensors = self.tensors.iter_mut().map(|(tensor, _)| tensor);
        tensors.chain(&mut self.bias).for_each(|tensor| *tensor = name(tensor));
    }

    /// Numbers of the last tokens that the next one needs.
    pub fn last(&self) -> u64 {
        (self.channels * (self.reach() - 1)) as u64
    }

    /// The token and all those before it up to the first that counts.
    pub fn reach(&self) -> usize {
        (self.taps - 1) * self.dilation + 1
    }
}
