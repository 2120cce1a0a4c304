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

use super::Graph;

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

/// What one hidden state is made of all streams by.
#[derive(Clone, Debug, PartialEq)]
pub enum Collapse {
    /// A sum with weights of the token.
    Weighed(Hyper),
    /// The mean of so many.
    Mean(usize),
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
        }
    }

    /// The weights of the sum, where they are made.
    pub fn hyper(&self) -> Option<&Hyper> {
        match self {
            Collapse::Weighed(hyper) => Some(hyper),
            Collapse::Mean(_) => None,
        }
    }

    /// The same, to be changed.
    pub(super) fn hyper_mut(&mut self) -> Option<&mut Hyper> {
        match self {
            Collapse::Weighed(hyper) => Some(hyper),
            Collapse::Mean(_) => None,
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
