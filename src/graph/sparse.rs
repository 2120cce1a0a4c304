//! Attention that sees a choice of tokens.

use kernels::{IndexShape, RopeLayout};

use super::{Linear, Norm};

/// Where the choice of what attention sees comes from.
#[derive(Clone, Debug)]
pub enum Choice {
    /// An indexer of its own; and whether layers behind it take the choice over.
    Own(Box<Indexer>, bool),
    /// The last layer before it that has an indexer, which has this shape.
    Earlier(IndexShape),
}

/// Small heads that score every earlier token for each query (the lightning indexer of DeepSeek Sparse Attention). None of it is
/// ever quantized: it is small, and another token that is seen changes more than rounding does.
#[derive(Clone, Debug)]
pub struct Indexer {
    /// To the queries of all its heads: of the latent of attention's queries, or of the input.
    pub q: Linear,
    /// Whether `q` reads the latent.
    pub latent: bool,
    /// To the keys that its heads have in common.
    pub k: Linear,
    /// Of its queries, each head by itself.
    pub q_norm: Option<Norm>,
    /// Of its keys.
    pub k_norm: Norm,
    /// To a weight for each of its heads, unless each chooses by itself.
    pub weights: Option<Linear>,
    /// Heads, and how much they choose.
    pub shape: IndexShape,
    /// Which of its values attention's rotation turns.
    pub layout: RopeLayout,
}

impl Choice {
    /// How much is chosen.
    pub fn shape(&self) -> &IndexShape {
        match self {
            Choice::Own(indexer, _) => &indexer.shape,
            Choice::Earlier(shape) => shape,
        }
    }

    /// The indexer, where it is the layer's own.
    pub fn indexer(&self) -> Option<&Indexer> {
        match self {
            Choice::Own(indexer, _) => Some(indexer),
            Choice::Earlier(_) => None,
        }
    }

    /// The same, to be changed.
    pub(super) fn indexer_mut(&mut self) -> Option<&mut Indexer> {
        match self {
            Choice::Own(indexer, _) => Some(indexer),
            Choice::Earlier(_) => None,
        }
    }
}

impl Indexer {
    /// Its linears.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        [&self.q, &self.k].into_iter().chain(&self.weights)
    }

    /// The same, to be changed.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        [&mut self.q, &mut self.k].into_iter().chain(&mut self.weights)
    }

    /// Its normalisations.
    pub(super) fn norms(&self) -> impl Iterator<Item = &Norm> {
        self.q_norm.iter().chain([&self.k_norm])
    }

    /// The same, to be changed.
    pub(super) fn norms_mut(&mut self) -> impl Iterator<Item = &mut Norm> {
        self.q_norm.iter_mut().chain([&mut self.k_norm])
    }
}
