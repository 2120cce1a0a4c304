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
//! `n` is 1 for the first such layer, whose state is what the model's head reads, or what the norm before it does, and one more for each that follows (DeepSeek-AI 2024,
//! arXiv:2412.19437, section 2.2).

use std::borrow::Cow;

use super::{Block, Collapse, DropRule, Graph, Layer, Linear, Lookup, Norm};

/// What layers are that predict the token after the next.
pub const FURTHER: &str = "predicts further tokens";

/// What is said of tensors of what sees or hears beside a language model.
pub const BESIDE: &str = "not part of the language model";

/// What a block begins with that predicts further tokens, and what comes behind it.
#[derive(Clone, Debug)]
pub struct Further {
    /// What the names of all of its tensors begin with, and those of no others: `mtp.`, or `model.layers.61.`.
    pub prefix: String,
    /// What makes one state of the streams that the model leaves, where these are several.
    pub collapse: Option<Collapse>,
    /// What the state has been normed by before: the model's last norm, or that of the layer of this kind before it. Nothing where it is
    /// taken before that norm.
    pub before: Option<Norm>,
    /// The embedding of the tokens that follow: the model's, unless the layer has a copy.
    pub embedding: Lookup,
    /// Of that embedding.
    pub of_token: Norm,
    /// Of the state.
    pub of_state: Norm,
    /// The state comes before the embedding.
    pub state_first: bool,
    /// `[hidden, 2 · hidden]`.
    pub projection: Linear,
    /// Behind the block; it may be the model's.
    pub norm: Norm,
    /// A projection to logits of its own, in place of the model's, `[vocabulary, hidden]`.
    pub head: Option<Linear>,
}

impl Further {
    /// Its own norms, each once.
    pub(super) fn norms(&self) -> Vec<&Norm> {
        let own = |norm: &&Norm| norm.weights.iter().all(|name| name.starts_with(&self.prefix));
        [&self.of_token, &self.of_state, &self.norm].into_iter().filter(own).collect()
    }

    /// Its tensors that are no norms and no linears, with their shapes.
    pub(super) fn vectors(&self) -> Vec<(String, Vec<usize>)> {
        vec![self.embedding.described()]
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        [&mut self.projection].into_iter().chain(&mut self.head).for_each(change);
    }

    /// Gives every tensor that is no linear's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        self.prefix = name(&self.prefix);
        self.embedding.tensor = name(&self.embedding.tensor);
        self.collapse.iter_mut().filter_map(Collapse::hyper_mut).for_each(|hyper| hyper.rename(name));
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
            opaque,
            unrunnable: self.unrunnable.clone(),
        }
    }

    /// Whether a linear makes the stream of a layer that predicts further tokens.
    pub fn joins(&self, linear: &Linear) -> bool {
        self.predictors().iter().filter_map(Block::further).any(|further| further.projection.module == linear.module)
    }
}
