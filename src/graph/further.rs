//! Layers that predict further tokens: blocks behind the model that begin with a state of it and the embedding of a token that follows.
//!
//! ```text
//! x = [norm(embedding of token t + n) | norm(state of token t)]      # or the other way round
//! h = projection(x)                                                  # the stream of the block, n tokens shorter than the model's
//! … attention and a feed-forward layer, as in any block …
//! state = norm(h)                                                    # which the next such layer takes, too
//! logits of token t + n + 1 = head(state)
//! ```
//!
//! Of a model with several streams such a layer may read them all, each by itself: `stream[i] = projection₁(norm(embedding)) + projection₂(norm(state[i]))`.
//!
//! `n` is 1 for the first such layer, whose state is what the model's head reads, or what the norm before it does, and one more for each that follows (DeepSeek-AI 2024,
//! arXiv:2412.19437, section 2.2).

use std::borrow::Cow;

use super::{Block, Collapse, DropRule, Graph, Hyper, Layer, Linear, Lookup, Norm};

/// What layers are that predict the token after the next.
pub const FURTHER: &str = "predicts further tokens";

/// What is said of tensors of what sees or hears beside a language model.
pub const BESIDE: &str = "not part of the language model";

/// What a block begins with that predicts further tokens, and what comes behind it.
#[derive(Clone, Debug)]
pub struct Further {
    /// What the names of all of its tensors begin with, and those of no others: `mtp.`, or `model.layers.61.`.
    pub prefix: String,
    /// What makes one state of the streams that the model leaves, where these are several and it does not read them all.
    pub collapse: Option<Collapse>,
    /// What the state has been normed by before: the model's last norm, or that of the layer of this kind before it. Nothing where it is
    /// taken before that norm.
    pub before: Option<Norm>,
    /// The embedding of the tokens that follow: the model's, unless the layer has a copy.
    pub embedding: Lookup,
    /// Of that embedding.
    pub of_token: Norm,
    /// Of the state; of several streams each by itself, where it has a weight for one, or all together.
    pub of_state: Norm,
    /// How both become the stream of the block.
    pub joining: Joining,
    /// What makes one state of the streams of the block, where these are several.
    pub ending: Option<Collapse>,
    /// Behind the block; it may be the model's.
    pub norm: Norm,
    /// A projection to logits of its own, in place of the model's, `[vocabulary, hidden]`.
    pub head: Option<Linear>,
    /// No runtime loads codes of any of its linears.
    pub whole: bool,
}

/// How an embedding and a state become the stream of a block that predicts further tokens.
#[derive(Clone, Debug)]
pub enum Joining {
    /// Side by side, by one projection.
    Beside {
        /// `[hidden, 2 · hidden]`.
        projection: Linear,
        /// The state comes before the embedding.
        state_first: bool,
    },
    /// Each by a projection of its own, `[hidden, hidden]`: what that of the embedding makes is added to what the other makes of each stream.
    Apart {
        /// Of the embedding, whose product is added to every stream.
        token: Linear,
        /// Of every stream of the state.
        state: Linear,
        /// How many streams there are.
        streams: usize,
    },
}

/// What a checkpoint holds of the layers that predict further tokens and are known, wherever they go.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// How many it has tensors of.
    pub count: usize,
    /// Those of which tensors are missing, which are no part of the model.
    pub partial: Vec<Partial>,
}

/// A layer that predicts further tokens, of which tensors are missing.
#[derive(Clone, Debug)]
pub struct Partial {
    /// What it is called.
    pub layer: String,
    /// The first tensor that is missing, and its shape.
    pub tensor: (String, Vec<usize>),
    /// How many are missing besides.
    pub others: usize,
    /// Layers come behind it that are given its states.
    pub followed: bool,
}

impl Joining {
    /// The linears, that of the embedding first; each reads an input of its own.
    pub fn linears(&self) -> Vec<&Linear> {
        match self {
            Joining::Beside { projection, .. } => vec![projection],
            Joining::Apart { token, state, .. } => vec![token, state],
        }
    }

    /// Does something to every linear.
    fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        match self {
            Joining::Beside { projection, .. } => change(projection),
            Joining::Apart { token, state, .. } => [token, state].into_iter().for_each(change),
        }
    }
}

impl Further {
    /// Its own norms, each once.
    pub(super) fn norms(&self) -> Vec<&Norm> {
        let own = |norm: &&Norm| norm.weights.iter().all(|name| name.starts_with(&self.prefix));
        [&self.of_token, &self.of_state, &self.norm].into_iter().filter(own).collect()
    }

    /// Its tensors that are no norms and no linears, with their shapes.
    pub(super) fn vectors(&self) -> Vec<(String, Vec<usize>)> {
        let ending = self.ending.iter().filter_map(Collapse::hyper).flat_map(Hyper::vectors);
        ending.chain([self.embedding.described()]).collect()
    }

    /// Its linears that are never quantized.
    pub(super) fn fixed(&self) -> impl Iterator<Item = &Linear> {
        self.head.iter().chain(self.ending.iter().flat_map(Collapse::linears))
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        self.joining.linears_mut(change);
        self.ending.iter_mut().for_each(|ending| ending.linears_mut(change));
        self.head.iter_mut().for_each(change);
    }

    /// Gives every tensor that is no linear's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        self.prefix = name(&self.prefix);
        self.embedding.tensor = name(&self.embedding.tensor);
        let streams = self.collapse.iter_mut().chain(&mut self.ending);
        streams.filter_map(Collapse::hyper_mut).for_each(|hyper| hyper.rename(name));
        let own = [&mut self.of_token, &mut self.of_state, &mut self.norm];
        for norm in self.before.iter_mut().chain(own) {
            norm.weights.iter_mut().chain(&mut norm.bias).for_each(|tensor| *tensor = name(tensor));
        }
    }
}

impl Block {
    /// What it begins with if it predicts further tokens.
    pub fn further(&self) -> Option<&Further> {
        self.steps.iter().find_map(|step| match &step.layer {
            Layer::Further(further) => Some(&**further),
            _ => None,
        })
    }
}

impl Graph {
    /// The blocks of the model itself, without those behind it that predict further tokens.
    pub fn trunk(&self) -> &[Block] {
        let count = self.blocks.iter().take_while(|block| block.further().is_none()).count();
        &self.blocks[..count]
    }

    /// The blocks that predict further tokens, in order.
    pub fn predictors(&self) -> &[Block] {
        &self.blocks[self.trunk().len()..]
    }

    /// What the names of tensors begin with that only layers have which predict further tokens.
    pub fn of_predictors(&self) -> Vec<String> {
        let mut all: Vec<String> =
            self.predictors().iter().filter_map(Block::further).map(|further| further.prefix.clone()).collect();
        all.dedup();
        all
    }

    /// The same model without the layers that predict further tokens.
    pub fn without_predictors(&self) -> Graph {
        Graph { blocks: self.trunk().to_vec(), ..self.without_blocks() }
    }

    /// The same model with the layers that predict further tokens, or with their tensors aside.
    pub fn predicting_further(&self, whether: bool) -> Cow<'_, Graph> {
        if whether || self.predictors().is_empty() {
            return Cow::Borrowed(self);
        }
        let mut graph = self.without_predictors();
        graph.aside.extend(self.of_predictors().into_iter().map(|prefix| (prefix, FURTHER)));
        Cow::Owned(graph)
    }

    /// The same model without the layers that predict further tokens, whose tensors are left out; those that were aside are, too.
    pub fn dropping_further(&self) -> Graph {
        let mut graph = self.without_predictors();
        let (further, aside) = graph.aside.into_iter().partition(|(_, what)| what.starts_with(FURTHER));
        graph.aside = aside;
        let further: Vec<(String, &str)> = further;
        let prefixes = further.into_iter().map(|(prefix, _)| prefix).chain(self.of_predictors());
        graph.dropped.extend(prefixes.map(|prefix| DropRule { prefix, suffix: "", reason: FURTHER }));
        graph
    }

    /// The same model without any blocks.
    pub fn without_blocks(&self) -> Graph {
        let Graph { family, hidden, vocabulary, opaque, .. } = *self;
        Graph {
            family,
            hidden,
            vocabulary,
            embedding: self.embedding.clone(),
            blocks: Vec::new(),
            collapse: self.collapse.clone(),
            final_norm: self.final_norm.clone(),
            head: self.head.clone(),
            dropped: self.dropped.clone(),
            aside: self.aside.clone(),
            held: self.held.clone(),
            opaque,
            unrunnable: self.unrunnable.clone(),
        }
    }

    /// Whether a linear makes the stream of a layer that predicts further tokens.
    pub fn joins(&self, linear: &Linear) -> bool {
        let further = self.predictors().iter().filter_map(Block::further);
        further.flat_map(|further| further.joining.linears()).any(|joining| joining.module == linear.module)
    }
}
