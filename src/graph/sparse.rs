//! Attention that sees a choice of tokens.

use kernels::{IndexShape, RopeLayout};

use super::{Linear, Norm, Temperature};

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
    /// To the queries of all its heads: of the latent of attention's queries, or of the input. Without a linear for the keys they are its second
    /// part.
    pub q: Linear,
    /// Whether `q` reads the latent.
    pub latent: bool,
    /// Of what `q` reads otherwise.
    pub input_norm: Option<Norm>,
    /// What its queries are multiplied by.
    pub temperature: Option<Temperature>,
    /// To the keys that its heads have in common.
    pub k: Option<Linear>,
    /// Of its queries, each head by itself.
    pub q_norm: Option<Norm>,
    /// Of its keys.
    pub k_norm: Norm,
    /// To a weight for each of its heads; without, all weigh the same, or each chooses by itself.
    pub weights: Option<Linear>,
    /// Heads, and how much they choose.
    pub shape: IndexShape,
    /// What makes one key of those of a block of tokens, where a block has one.
    pub pool: Option<Pool>,
    /// The key of a block is the mean of those of its tokens, which is then normed, and turned as if it stood at the first of them.
    pub mean: bool,
    /// Which of its values attention's rotation turns.
    pub layout: RopeLayout,
}

/// What weighs the keys of a block of tokens, each channel by itself.
#[derive(Clone, Debug)]
pub struct Pool {
    /// From the input to a logit for each channel.
    pub gate: Linear,
    /// Tensor of what is added to them by their places in a block, `[block, head_dim]`.
    pub places: String,
    /// Tokens give something else to the block behind their own, too, in the first half of the rows.
    pub overlap: bool,
    /// What is summed up is neither normed nor turned yet: the sum is, as if it stood at the first token of its block.
    pub first: bool,
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
        [&self.q].into_iter().chain(&self.k).chain(&self.weights).chain(self.pool.iter().map(|pool| &pool.gate))
    }

    /// The same, to be changed.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let pool = self.pool.iter_mut().map(|pool| &mut pool.gate);
        [&mut self.q].into_iter().chain(&mut self.k).chain(&mut self.weights).chain(pool)
    }

    /// Its tensors that are no linears and no norms, with their shapes.
    pub(super) fn vectors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        let shape = |pool: &Pool| vec![self.shape.block, pool.gate.rows];
        let warmth = self.temperature.iter().flat_map(|temperature| temperature.vectors(self.shape.heads));
        self.pool.iter().map(move |pool| (pool.places.clone(), shape(pool))).chain(warmth)
    }

    /// Gives its tensors that are no linears and no norms other names.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        self.pool.iter_mut().for_each(|pool| pool.places = name(&pool.places));
        self.temperature.iter_mut().for_each(|temperature| temperature.rename(name));
    }

    /// Its normalisations.
    pub(super) fn norms(&self) -> impl Iterator<Item = &Norm> {
        self.input_norm.iter().chain(&self.q_norm).chain([&self.k_norm])
    }

    /// The same, to be changed.
    pub(super) fn norms_mut(&mut self) -> impl Iterator<Item = &mut Norm> {
        self.input_norm.iter_mut().chain(&mut self.q_norm).chain([&mut self.k_norm])
    }
}
