//! Streams: a stream between layers that is several hidden states of each token wide (hyper-connections).
//!
//! ```text
//! read, write, mix = weights(streams)                    # of a small projection of all of a token's streams
//! x = Σ read[i] · streams[i]                             # what a step reads
//! streams[k] = write[k] · layer(norm(x)) + Σ mix[j, k] · streams[j]
//! ```
//!
//! Before the first block all streams are the embedding; behind the last one becomes of them, which the last norm reads.

use kernels::HyperShape;

use super::{Graph, Linear};

/// What makes the weights by which streams are read and written. It is never quantized: it is small, and all that is read hangs on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Hyper {
    /// Tensor `[weights, streams · hidden]` that all of a token's streams are multiplied by.
    pub projection: String,
    /// Tensor of what is added, one for each weight.
    pub base: String,
    /// Tensor of what is multiplied by before, one for each kind of weights.
    pub scale: String,
    /// Values of a stream.
    pub hidden: usize,
    /// How many streams, and how their weights are made.
    pub shape: HyperShape,
}

/// How a step reads several streams and writes into them.
#[derive(Clone, Debug, PartialEq)]
pub enum Connection {
    /// With a weight of the token for each stream.
    Weighed(Hyper),
    /// With a gate for each value of each stream, and a weight of the token for what is written into each.
    Gated(Box<Gated>),
}

/// Gates of all values of all streams (Qwen 4): `Σ σ(mix₁(silu(mix₀(n) / streams))) · n / streams` is read, where `n` are the streams, each normed
/// by the norm before the step, and `2 σ(inject(n) / streams)` times what the step gives is added to each. None of it is ever quantized: it is
/// small, and all that is read hangs on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Gated {
    /// How many streams there are.
    pub streams: usize,
    /// To the gates, `[rank, streams · hidden]` and `[streams · hidden, rank]`.
    pub mix: [Linear; 2],
    /// To a weight for each stream that is written, `[streams, streams · hidden]`; none where nothing is.
    pub inject: Option<Linear>,
}

/// What one hidden state is made of all streams by.
#[derive(Clone, Debug, PartialEq)]
pub enum Collapse {
    /// A sum with weights of the token.
    Weighed(Hyper),
    /// The mean of so many.
    Mean(usize),
    /// The mean of so many with a gate for each value. The last norm is that of each stream before its gates.
    Gated(Box<Gated>),
}

impl Gated {
    /// Its linears, none of which is ever quantized.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.mix.iter().chain(&self.inject)
    }

    /// Does something to every linear.
    fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        self.mix.iter_mut().chain(&mut self.inject).for_each(change);
    }
}

impl Connection {
    /// How many streams there are.
    pub fn streams(&self) -> usize {
        match self {
            Connection::Weighed(hyper) => hyper.shape.streams,
            Connection::Gated(gated) => gated.streams,
        }
    }

    /// What makes weights of a token, if such are all that there is.
    pub fn hyper(&self) -> Option<&Hyper> {
        match self {
            Connection::Weighed(hyper) => Some(hyper),
            Connection::Gated(_) => None,
        }
    }

    /// Its linears, which are never quantized.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let gated = if let Connection::Gated(gated) = self { Some(gated) } else { None };
        gated.into_iter().flat_map(|gated| gated.linears())
    }

    /// Its tensors that are no linears, with their shapes.
    pub(super) fn vectors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        self.hyper().into_iter().flat_map(Hyper::vectors)
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        if let Connection::Gated(gated) = self {
            gated.linears_mut(change);
        }
    }

    /// Gives every tensor that is no linear's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        if let Connection::Weighed(hyper) = self {
            hyper.rename(name);
        }
    }
}

impl Hyper {
    /// Its tensors, with their shapes.
    pub(super) fn vectors(&self) -> [(String, Vec<usize>); 3] {
        let (weights, width) = (self.shape.weights(), self.shape.streams * self.hidden);
        [
            (self.projection.clone(), vec![weights, width]),
            (self.base.clone(), vec![weights]),
            (self.scale.clone(), vec![self.shape.kinds()]),
        ]
    }

    /// Gives every tensor another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        [&mut self.projection, &mut self.base, &mut self.scale].into_iter().for_each(|tensor| *tensor = name(tensor));
    }
}

impl Collapse {
    /// How many streams there are.
    pub fn streams(&self) -> usize {
        match self {
            Collapse::Weighed(hyper) => hyper.shape.streams,
            Collapse::Mean(streams) => *streams,
            Collapse::Gated(gated) => gated.streams,
        }
    }

    /// What makes the weights of the sum, where it has such.
    pub fn hyper(&self) -> Option<&Hyper> {
        match self {
            Collapse::Weighed(hyper) => Some(hyper),
            Collapse::Mean(_) | Collapse::Gated(_) => None,
        }
    }

    /// Its linears, which are never quantized.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let gated = if let Collapse::Gated(gated) = self { Some(gated) } else { None };
        gated.into_iter().flat_map(|gated| gated.linears())
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        if let Collapse::Gated(gated) = self {
            gated.linears_mut(change);
        }
    }

    /// What makes the weights of the sum, to be changed.
    pub(super) fn hyper_mut(&mut self) -> Option<&mut Hyper> {
        match self {
            Collapse::Weighed(hyper) => Some(hyper),
            Collapse::Mean(_) | Collapse::Gated(_) => None,
        }
    }
}

impl Graph {
    /// Hidden states of a token that lie side by side between blocks.
    pub fn streams(&self) -> usize {
        let beside = self.blocks.iter().filter_map(|block| block.altup.as_ref()).map(|altup| altup.count).max();
        self.collapse.as_ref().map(Collapse::streams).or(beside).unwrap_or(1)
    }

    /// Values of a token between blocks.
    pub fn width(&self) -> usize {
        self.hidden * self.streams()
    }
}
