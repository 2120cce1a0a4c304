//! A block's computation as data: operations on named values, in the order in which they are done.
//!
//! `forward` runs it, `memory` counts what it keeps, `pipeline` finds in it where channel scales can go, and `inspect` shows it.

mod lifetimes;
mod lowering;
mod shown;
mod slots;
#[cfg(test)]
mod tests;

use kernels::{Activation, AttentionShape, DeltaShape, IndexShape, RopeLayout};

pub use self::lifetimes::Lifetimes;
pub use self::shown::{Shown, ShownOperation, ShownValue, shown};
pub use self::slots::{Producer, Slot};
use crate::graph::{Convolution, Decay, Grams, Hyper, Linear, Lookup, Norm, Pool, Rope, Router, Temperature};

/// What a block does.
#[derive(Clone, Debug)]
pub struct Program<'b> {
    /// Every value, the stream that the block is given first.
    pub values: Vec<Value>,
    /// What is done, in order: an operation reads what those before it make.
    pub operations: Vec<Operation<'b>>,
    /// Keys and values that later blocks read, or the latents that they are made of, and the number by which they ask for them.
    pub leaves: Option<(usize, Vec<usize>)>,
}

/// Something that is computed for each token.
#[derive(Clone, Debug)]
pub struct Value {
    /// What it is called.
    pub name: &'static str,
    /// Which of those of this name it is, from 1.
    pub number: usize,
    /// Numbers of one token.
    pub width: usize,
    /// The expert whose tokens have it; `None` for all tokens.
    pub expert: Option<usize>,
    /// Whether it is kept from where it is made to where it is used.
    pub kept: Kept,
    /// The operation that makes it; `None` for the stream that the block is given.
    pub maker: Option<usize>,
    /// Nothing but linears reads it.
    pub multiplied: bool,
}

/// Whether a value is there for all tokens at once. Others are computed chunk by chunk where they are used, and again where they are used
/// again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It is cheaply computed, or used once.
    Never,
    /// Where there is room for it.
    Room,
    /// Always.
    Always,
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Operation<'b> {
    /// What it does.
    pub kind: Kind<'b>,
    /// Numbers of the values that it reads.
    pub reads: Vec<usize>,
    /// Numbers of the values that it makes.
    pub makes: Vec<usize>,
    /// Whose tokens it is done for; `None` for all.
    pub expert: Option<Expert>,
}

/// One of the experts of a mixture.
#[derive(Clone, Copy, Debug)]
pub struct Expert {
    /// Which.
    pub index: usize,
    /// The value that says which tokens are its own.
    pub routes: usize,
}

/// What an operation does.
#[derive(Clone, Debug)]
pub enum Kind<'b> {
    /// Normalises all values of a token together.
    Norm(&'b Norm),
    /// Normalises each head by itself.
    HeadNorm {
        /// With its weight.
        norm: &'b Norm,
        /// Values of a head.
        head_dim: usize,
    },
    /// Multiplies one value by the weights of several linears; each part of each makes one value. Or several values by the weight
    /// of one linear: each by a part of its own, or each by the whole. A stage, as these linears are calibrated together.
    Linear {
        /// The linears.
        linears: Vec<&'b Linear>,
        /// They are never quantized.
        fixed: bool,
    },
    /// Puts the part of the keys that all heads share beside each head's own.
    JoinHeads {
        /// How many there are.
        heads: usize,
    },
    /// Makes of one number a head as many as the head has values.
    Spread,
    /// Limits the size of the values.
    Clamp(f32),
    /// Rotates by the position.
    Rope {
        /// How far.
        rope: &'b Rope,
        /// Which values.
        layout: RopeLayout,
        /// As if it were so many places before it.
        back: usize,
        /// The other way round.
        inverse: bool,
    },
    /// Multiplies queries by what grows with the position.
    Warm(&'b Temperature),
    /// The rows of a table for the ids of the tokens.
    Lookup(&'b Lookup),
    /// The rows of a table for the ids of the tokens and of those before them.
    Grams(&'b Grams),
    /// The keys and values that the block with this number left, or their latents.
    Shared(usize),
    /// Softmax attention of queries, keys and values.
    Attention {
        /// Heads, scale and mask.
        shape: AttentionShape,
        /// Tensor of one logit a head that takes part in the softmax and has no value.
        sinks: Option<&'b str>,
        /// Of the choice that it reads behind them, if what it sees is one.
        index: Option<IndexShape>,
        /// Tokens of the blocks whose entries it reads last, and sees beside its window; the choice is then one of these.
        block: Option<usize>,
    },
    /// One of each block of tokens, made of all of its own, with the logits of weights.
    Pool(&'b Pool),
    /// The mean of the values of so many tokens, the last of which is the token itself.
    Average(usize),
    /// Chooses what attention sees, of an indexer's queries, keys and weights.
    Select {
        /// How much.
        shape: IndexShape,
        /// Layers behind this one take the choice over.
        shared: bool,
    },
    /// The choice of the last layer with an indexer.
    Chosen,
    /// A causal convolution of each channel by itself.
    Convolve {
        /// Of these channels and others.
        convolution: &'b Convolution,
        /// The first of these channels in it.
        first: usize,
    },
    /// The logarithms of decays, of what linears made.
    Decay(&'b Decay),
    /// How long the steps are in which a state space forgets that much, of what linears made.
    Step(&'b Decay),
    /// Linear attention whose state forgets, of queries, keys, values, the logarithms of decays, and how much is written.
    Delta(DeltaShape),
    /// Adds to the first value the second times a number for each head.
    Skip {
        /// Tensor of these numbers.
        tensor: &'b str,
        /// Values of a head.
        head_dim: usize,
    },
    /// Multiplies every value by this.
    Scale(f32),
    /// Applies a function to every value.
    Map(Activation),
    /// `act(gate) · x` of values that are there.
    Gate(Activation),
    /// `act(gate) · up`, or `act(up)` of a single value.
    Activate(Activation),
    /// Leaves what is above the mean of a token's values by more than so many standard deviations.
    Cut(f32),
    /// Something of several streams side by side, of so many values each.
    Streams(usize, Streams<'b>),
    /// Chooses experts by logits.
    Route(&'b Router),
    /// The tokens of an expert.
    Tokens,
    /// Multiplies the tokens of an expert by its weight in each.
    Weigh,
    /// A sum of nothing, as wide as the stream.
    Zeros,
    /// Adds the output of an expert to its tokens.
    Scatter {
        /// Times its weight in each.
        weighed: bool,
    },
    /// Adds what experts that compute nothing give back to their tokens: what they are given, times their weights.
    Return {
        /// The first of them.
        first: usize,
    },
    /// Multiplies by the sigmoid of one logit a token.
    Share,
    /// Adds to one value another times this, where both are used.
    Plus(f32),
    /// Adds one value to another.
    Sum,
    /// The weights by which a step reads and writes several streams.
    Connect(&'b Hyper),
    /// What is read of so many streams by the weights that it is given behind them.
    ReadStreams(usize),
    /// How far two values agree in each stream of so many of them.
    Agree(usize),
    /// Writes a value into all streams, by the weights behind it; where no connection mixes them and says how, it is added times a weight for each.
    WriteStreams(Option<&'b Hyper>),
    /// Adds a value to the stream.
    Add {
        /// Times this.
        scale: f32,
    },
    /// Puts a value in the place of the stream.
    Begin,
    /// Multiplies the stream by the one number of a tensor.
    Rescale(&'b str),
}

/// What is done with several streams side by side.
#[derive(Clone, Copy, Debug)]
pub enum Streams<'b> {
    /// Takes the one with this number.
    Take(usize),
    /// Makes each as large as the first.
    Match,
    /// Takes their mean.
    Mean,
    /// The hyperbolic tangent of numbers that decide about them.
    Tanh,
    /// Adds to each what the second value says of all of them, by the coefficients that are read last.
    Predict,
    /// Adds to each the second value, times 1 and what the coefficients say that are read last.
    Correct,
    /// A stream for each number of the second value, which is the first times that number.
    Each,
    /// Adds the second value to all but the first.
    Others,
    /// Adds to one of them whatever else is read, and multiplies it by this.
    Join(f32),
    /// Multiplies one of them by a tensor, value by value.
    Times(&'b str),
}

impl Kind<'_> {
    /// Whether something happens where it stands, to all chunks: weights are asked for, or something is added to what is kept. Everything
    /// else is done where its value is used.
    pub fn is_step(&self) -> bool {
        matches!(self, Kind::Linear { .. }) || self.adds()
    }

    /// Whether it changes what is kept of its first value, which becomes what it makes.
    pub fn adds(&self) -> bool {
        matches!(self, Kind::Scatter { .. } | Kind::Return { .. } | Kind::Sum) || self.makes_stream()
    }

    /// Whether what it makes is the stream.
    pub fn makes_stream(&self) -> bool {
        matches!(self, Kind::Add { .. } | Kind::Begin | Kind::Rescale(_) | Kind::WriteStreams(_))
    }
}

impl Operation<'_> {
    /// The names of the tensors that it needs.
    pub fn tensors(&self) -> Vec<String> {
        match &self.kind {
            Kind::Norm(norm) | Kind::HeadNorm { norm, .. } => norm.weights.iter().chain(&norm.bias).cloned().collect(),
            Kind::Linear { linears, .. } => {
                linears.iter().flat_map(|linear| linear.tensors()).map(|(name, _)| name).collect()
            }
            Kind::Rope { rope, .. } => rope.learned.iter().cloned().collect(),
            Kind::Warm(temperature) => temperature.tensors().cloned().collect(),
            Kind::Attention { sinks, .. } => sinks.iter().map(|name| (*name).to_owned()).collect(),
            Kind::Convolve { convolution: Convolution { tensors, bias, .. }, .. } => {
                tensors.iter().map(|(tensor, _)| tensor).chain(bias).cloned().collect()
            }
            Kind::Decay(decay) => vec![decay.rates.0.clone(), decay.bias.0.clone()],
            Kind::Step(decay) => vec![decay.bias.0.clone()],
            Kind::Skip { tensor, .. } => vec![(*tensor).to_owned()],
            Kind::Route(router) => router.vectors().map(|(name, _)| name.clone()).collect(),
            Kind::Pool(pool) => vec![pool.places.clone()],
            Kind::Lookup(lookup) => vec![lookup.tensor.clone()],
            Kind::Grams(grams) => grams.parts.iter().map(|(tensor, _)| tensor.clone()).collect(),
            Kind::Streams(_, Streams::Times(tensor)) => vec![(*tensor).to_owned()],
            Kind::Rescale(tensor) => vec![(*tensor).to_owned()],
            Kind::Connect(hyper) => [&hyper.projection, &hyper.base, &hyper.scale].map(String::clone).to_vec(),
            _ => Vec::new(),
        }
    }
}

impl<'b> Program<'b> {
    /// The stream that the block is given.
    pub const STREAM: usize = 0;

    /// The operation that makes a value.
    pub fn maker(&self, value: usize) -> Option<&Operation<'b>> {
        Some(&self.operations[self.values[value].maker?])
    }

    /// The values that have to be there for an operation: those that it reads, or what the linears read whose output it takes as one with
    /// theirs.
    pub fn operands(&self, operation: &Operation<'b>) -> Vec<usize> {
        let Operation { kind, reads, .. } = operation;
        let product = |value: usize| self.maker(value).filter(|maker| matches!(maker.kind, Kind::Linear { .. }));
        match kind {
            Kind::Activate(_) => product(reads[0]).expect("linears make what is gated").reads.clone(),
            Kind::Add { scale } => match product(reads[1]) {
                Some(last) if *scale == 1.0 => last.reads.clone(),
                _ => vec![reads[1]],
            },
            Kind::Begin => vec![reads[1]],
            Kind::WriteStreams(_) => reads[1..].to_vec(),
            _ => reads.clone(),
        }
    }

    /// The linear and the part of it that make a value.
    pub fn made_by(&self, value: usize) -> Option<(&'b Linear, usize)> {
        let Operation { kind: Kind::Linear { linears, .. }, makes, .. } = self.maker(value)? else { return None };
        let place = makes.iter().position(|made| *made == value)?;
        linears.iter().flat_map(|linear| (0..linear.split.parts()).map(move |part| (*linear, part))).nth(place)
    }

    /// Whether a value is the stream, at whatever point, or what is read of its streams.
    pub fn is_stream(&self, value: usize) -> bool {
        let one = |kind: &Kind<'_>| match kind {
            Kind::ReadStreams(_) => true,
            Kind::Streams(_, what) => matches!(what, Streams::Take(_) | Streams::Join(_)),
            kind => kind.makes_stream(),
        };
        self.maker(value).is_none_or(|maker| one(&maker.kind))
    }
}
