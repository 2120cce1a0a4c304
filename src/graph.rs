//! A model as data: which tensors it has, and what is done with them, block by block.

mod altup;
mod attention;
mod both_ways;
mod compressed;
mod delta;
mod further;
mod grams;
mod hyper;
mod lookup;
mod mamba;
mod rope;
mod sparse;

use std::collections::HashSet;
use std::sync::Arc;

use kernels::{Activation, AttentionShape, NormKind, RopeLayout};

pub use self::altup::{AltUp, LEAST, Laurel};
pub use self::compressed::{Compressor, Joint};
pub use self::delta::{Convolution, Decay, DeltaNet, Narrow};
pub use self::further::{BESIDE, FURTHER, Further, Held, Joining, Partial};
pub use self::grams::{AGREEMENT, GramLayer, Grams};
pub use self::hyper::{Collapse, Connection, Gated, Hyper};
pub use self::lookup::{Lookup, PerLayer, Side};
pub use self::mamba::{GroupNorm, Mamba, ShortConvolution};
pub use self::rope::{Rope, RopeScaling, Temperature};
pub use self::sparse::{Choice, Indexer, Pool};

/// A decoder-only language model.
#[derive(Clone, Debug)]
pub struct Graph {
    /// The family that built it.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// What tokens become.
    pub embedding: Embedding,
    /// Decoder blocks, in order; behind them those that predict further tokens.
    pub blocks: Vec<Block>,
    /// What becomes of the streams before the last normalisation, where the blocks have several.
    pub collapse: Option<Collapse>,
    /// The last normalisation.
    pub final_norm: Norm,
    /// The output projection.
    pub head: Head,
    /// Tensors that a checkpoint may hold and that are left out of the output.
    pub dropped: Vec<DropRule>,
    /// Prefixes of tensors that are no part of the language model and go over untouched, with what they are.
    pub aside: Vec<(String, &'static str)>,
    /// What a checkpoint holds of its layers that predict further tokens.
    pub held: Held,
    /// Whether the family is unknown: its linears were found by name and shape, and it cannot be run.
    pub opaque: bool,
    /// Why it cannot be run, though all of its parts are known.
    pub unrunnable: Option<String>,
}

/// Tensors that are left out of the output, and why.
#[derive(Clone, Debug)]
pub struct DropRule {
    /// Names that begin so.
    pub prefix: String,
    /// And end so.
    pub suffix: &'static str,
    /// Why they may be left out.
    pub reason: &'static str,
}

/// What tokens become before the first block.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// Tensor, `[vocabulary, hidden]`.
    pub tensor: String,
    /// What every value is multiplied by.
    pub scale: f32,
    /// Learned positions: a tensor `[positions, hidden]` that is added, and its rows.
    pub positions: Option<(String, usize)>,
}

/// One decoder block: steps that each add to the residual stream.
#[derive(Clone, Debug)]
pub struct Block {
    /// The prefix of its tensors, as in `model.layers.3`.
    pub name: String,
    /// What is done, in order.
    pub steps: Vec<Step>,
    /// All steps read what the block was given, instead of what the step before left.
    pub parallel: bool,
    /// Tensor of one number that the stream is multiplied by at the end.
    pub scale: Option<String>,
    /// What it does with several streams, where its steps work on one of them.
    pub altup: Option<Box<AltUp>>,
}

/// One residual step: `h ← h + scale · post(layer(pre(h)))`.
#[derive(Clone, Debug)]
pub struct Step {
    /// Before the layer.
    pub pre: Option<Norm>,
    /// What is computed.
    pub layer: Layer,
    /// After the layer.
    pub post: Option<Norm>,
    /// Factor on what is added.
    pub scale: f32,
    /// Factor on what the layer is given.
    pub given: f32,
    /// So many steps before it add to the stream what it does not read.
    pub unseen: usize,
    /// How it reads and writes several streams.
    pub hyper: Option<Box<Connection>>,
}

/// What a step computes.
#[derive(Clone, Debug)]
pub enum Layer {
    /// Self-attention.
    Attention(Attention),
    /// Linear attention by the gated delta rule.
    Delta(Box<DeltaNet>),
    /// A state space (Mamba 2).
    Mamba(Box<Mamba>),
    /// A gated short convolution.
    Short(Box<ShortConvolution>),
    /// A feed-forward layer.
    Mlp(Mlp),
    /// A mixture of feed-forward layers.
    Moe(Moe),
    /// The start of a block that predicts further tokens: its stream, of a state and the embedding of a token that follows.
    Further(Box<Further>),
    /// What a table has for the tokens.
    PerLayer(Box<PerLayer>),
    /// What a table has for tokens in a row.
    Grams(Box<GramLayer>),
    /// Linears of a model that cannot be run.
    Opaque(Vec<Linear>),
}

/// A normalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// By the root mean square, or by mean and variance.
    pub kind: NormKind,
    /// Its weight tensors, one after the other; all ones without.
    pub weights: Vec<String>,
    /// Added to the stored weight: 1 where the file holds the difference from 1.
    pub offset: f32,
    /// Its bias tensor.
    pub bias: Option<String>,
    /// Extents of each of these tensors.
    pub shape: Vec<usize>,
    /// Added to the mean square.
    pub eps: f32,
}

/// One linear layer, or several that are stored as one.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// The module's name, without `.weight`.
    pub module: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// Which of its rows are which linear.
    pub split: Split,
    /// How its weight lies in the checkpoint.
    pub stored: Stored,
}

/// How the rows of a stored weight divide into linears: `times` over, so many rows of the first, of the second …
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// Repetitions, as one for each head.
    pub times: usize,
    /// Rows of each linear in one repetition; empty when all rows are one linear.
    pub lengths: Vec<usize>,
}

/// How a weight lies in the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum Stored {
    /// `module.weight`, `[rows, cols]`.
    Plain,
    /// `module.weight`, `[cols, rows]` (GPT-2's `Conv1D`).
    Transposed,
    /// Rows of a tensor `[of, cols]` that other linears have rows of, too.
    Rows {
        /// The tensor.
        tensor: String,
        /// The first of its rows.
        first: usize,
        /// How many the tensor has.
        of: usize,
    },
    /// One of the experts that lie in one tensor.
    Slice {
        /// `[experts, rows, cols]`, or `[experts, cols, rows]`.
        tensor: String,
        /// Which expert.
        index: usize,
        /// How many there are.
        of: usize,
        /// Whether columns come before rows.
        transposed: bool,
        /// `[experts, rows]`, if there are biases.
        bias: Option<String>,
        /// How an expert's rows in the tensor divide, and which of the parts this linear is.
        part: (Split, usize),
    },
}

impl Split {
    /// One linear.
    pub const WHOLE: Split = Split { times: 1, lengths: Vec::new() };

    /// Linears one after the other.
    pub fn of(lengths: &[usize]) -> Split {
        Split { times: 1, lengths: lengths.to_vec() }
    }

    /// Number of linears.
    pub fn parts(&self) -> usize {
        self.lengths.len().max(1)
    }

    /// The rows of one of the linears, in its own order; `None` when it is the only one.
    pub fn rows(&self, part: usize) -> Option<Vec<usize>> {
        let length = *self.lengths.get(part)?;
        let (first, all) = (self.lengths[..part].iter().sum::<usize>(), self.lengths.iter().sum::<usize>());
        Some((0..self.times).flat_map(|time| (0..length).map(move |row| time * all + first + row)).collect())
    }
}

impl Linear {
    /// A linear that is stored as such.
    pub fn plain(module: impl Into<String>, rows: usize, cols: usize, bias: bool) -> Linear {
        Linear { module: module.into(), rows, cols, bias, split: Split::WHOLE, stored: Stored::Plain }
    }

    /// The weight tensor's name; of the stack's for an expert of a stack.
    pub fn weight(&self) -> String {
        match &self.stored {
            Stored::Slice { tensor, .. } | Stored::Rows { tensor, .. } => tensor.clone(),
            _ => format!("{}.weight", self.module),
        }
    }

    /// The bias tensor's name, if it has one; of the stack's for an expert of a stack.
    pub fn bias(&self) -> Option<String> {
        match &self.stored {
            Stored::Slice { bias, .. } => bias.clone(),
            _ => self.bias.then(|| format!("{}.bias", self.module)),
        }
    }

    /// Rows of the stored matrix: more than its own where another linear is stored with it.
    pub fn stored_rows(&self) -> usize {
        match &self.stored {
            Stored::Slice { part: (split, _), .. } if !split.lengths.is_empty() => {
                split.times * split.lengths.iter().sum::<usize>()
            }
            _ => self.rows,
        }
    }

    /// The tensors that hold it, with their shapes.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (rows, cols) = (self.stored_rows(), self.cols);
        let (weight, bias) = match &self.stored {
            Stored::Plain => (vec![rows, cols], vec![rows]),
            Stored::Transposed => (vec![cols, rows], vec![rows]),
            Stored::Rows { of, .. } => (vec![*of, cols], vec![*of]),
            Stored::Slice { of, transposed: false, .. } => (vec![*of, rows, cols], vec![*of, rows]),
            Stored::Slice { of, transposed: true, .. } => (vec![*of, cols, rows], vec![*of, rows]),
        };
        [(self.weight(), weight)].into_iter().chain(self.bias().map(|name| (name, bias))).collect()
    }
}

/// Self-attention, to what came before unless its shape says both ways.
#[derive(Clone, Debug)]
pub struct Attention {
    /// How queries, keys and values are made.
    pub projections: Projections,
    /// Whose keys and values it reads.
    pub keys: Keys,
    /// The linears make one part more, after the queries and as wide as what is attended to, whose sigmoid multiplies that.
    pub gated: bool,
    /// To one number a head, whose sigmoid multiplies what the head has attended to; never quantized.
    pub head_gate: Option<Linear>,
    /// Output projection.
    pub o: Linear,
    /// Heads, scale and mask.
    pub shape: AttentionShape,
    /// Rotation of queries and keys.
    pub rope: Option<Arc<Rope>>,
    /// What part of a head is rotated, and how.
    pub layout: RopeLayout,
    /// Normalisation of queries and keys.
    pub norms: Option<HeadNorms>,
    /// Queries, keys and values are clamped to this size, after their norms.
    pub clip: Option<f32>,
    /// Tensor of one logit a head that takes part in the softmax and has no value.
    pub sinks: Option<String>,
    /// What queries are multiplied by.
    pub temperature: Option<Temperature>,
    /// What values are multiplied by.
    pub value_scale: f32,
    /// What is seen of all that could be; everything without.
    pub choice: Option<Choice>,
    /// What stands for blocks of tokens and is seen beside the window; the choice is then one of that.
    pub beside: Option<Box<Compressor>>,
}

/// Whose keys and values attention reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// Its own.
    Own,
    /// Its own, which later blocks read too: those of the block with this number, itself.
    Left(usize),
    /// Those that the block with this number left.
    Of(usize),
}

/// How queries, keys and values are made of the normed input.
#[derive(Clone, Debug)]
pub enum Projections {
    /// By linears whose parts are q, k and v, in this order, with the gate after q where there is one. Without a v the values are what the keys
    /// are made of; attention to the keys of another block has q alone.
    Direct(Vec<Linear>),
    /// Through latent vectors (DeepSeek's multi-head latent attention).
    Latent(Box<Latent>),
    /// Queries through a latent, and one vector that is key and value of all heads (DeepSeek V4).
    Joint(Box<Joint>),
}

/// Queries, keys and values through latent vectors.
#[derive(Clone, Debug)]
pub struct Latent {
    /// From the input to the queries, or first to a latent that is normed and then to the queries.
    pub q: Vec<Linear>,
    /// Of the queries' latent.
    pub q_norm: Option<Norm>,
    /// To the latent of keys and values, and to the rotated key that all heads share; none where both are those of another block.
    pub kv_a: Option<Linear>,
    /// Of the latent, where it is the layer's own.
    pub kv_norm: Option<Norm>,
    /// What the normed latent is multiplied by.
    pub kv_scale: f32,
    /// From the latent to the parts of keys that are not rotated, and to values.
    pub kv_b: Linear,
    /// From the input to what multiplies all that is attended to, once its sigmoid is taken.
    pub gate: Option<Linear>,
}

/// Normalisation of queries and keys, and of values.
#[derive(Clone, Debug)]
pub struct HeadNorms {
    /// Of queries.
    pub q: Norm,
    /// Of keys; none where attention has none of its own.
    pub k: Option<Norm>,
    /// Of values, each head by itself.
    pub v: Option<Norm>,
    /// Each head by itself; otherwise all of a token's values together.
    pub per_head: bool,
    /// After the rotation instead of before it.
    pub after_rope: bool,
}

/// Tensors that the numbers of an activation are read from, and their extents.
pub type Learned = [(String, Vec<usize>); 4];

/// A feed-forward layer.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// Linears whose parts are the gate and what is gated, or only what is activated.
    pub inputs: Vec<Linear>,
    /// Back to the residual stream.
    pub down: Linear,
    /// Of the gate, or of all.
    pub activation: Activation,
    /// Factor on what is activated.
    pub scale: f32,
    /// Tensors that the numbers of the activation are read from, and their extents; none of most.
    pub learned: Option<Box<Learned>>,
    /// Of the gate is left before the activation what is above its mean by more than so many standard deviations.
    pub cut: Option<f32>,
}

impl Mlp {
    /// Whether it has a gate.
    pub fn gated(&self) -> bool {
        self.inputs.iter().map(|l| l.split.parts()).sum::<usize>() == 2
    }

    /// Its linears, those that read one input together.
    fn linears(&self) -> Vec<Vec<&Linear>> {
        vec![self.inputs.iter().collect(), vec![&self.down]]
    }

    /// Width between its linears.
    pub fn inner(&self) -> usize {
        self.down.cols
    }
}

/// A mixture of feed-forward layers, of which each token takes a few.
#[derive(Clone, Debug)]
pub struct Moe {
    /// Chooses.
    pub router: Router,
    /// Chosen from; those behind them give back what they are given.
    pub experts: Vec<Mlp>,
    /// What every token takes besides, with the linear `[1, hidden]` whose sigmoid weighs it.
    pub shared: Option<(Mlp, Option<Linear>)>,
    /// Experts are given the input times their weight, instead of their output being weighed.
    pub weigh_input: bool,
    /// Router and experts read and leave through norms of their own, and `pre` of the step is the shared layer's.
    pub norms: Option<Box<MoeNorms>>,
    /// Experts work in a space of their own: to it, and from the sum of what they make back to the stream.
    pub latent: Option<Box<[Linear; 2]>>,
}

impl Moe {
    /// Its linears that may be quantized, those that read one input together.
    fn linears(&self) -> Vec<Vec<&Linear>> {
        let [to, back] = [0, 1].map(|at| self.latent.iter().map(move |latent| vec![&latent[at]]));
        let shared = self.shared.iter().flat_map(|(shared, _)| shared.linears());
        to.chain(self.experts.iter().flat_map(Mlp::linears)).chain(back).chain(shared).collect()
    }
}

/// Norms within a mixture.
#[derive(Clone, Debug)]
pub struct MoeNorms {
    /// Of what the router reads.
    pub router: Norm,
    /// Of what the experts read.
    pub experts: Norm,
    /// Of the sum of what the experts give.
    pub routed: Norm,
    /// Of what the shared layer gives.
    pub shared: Norm,
}

impl MoeNorms {
    fn all(&self) -> Vec<&Norm> {
        vec![&self.router, &self.experts, &self.routed, &self.shared]
    }

    fn all_mut(&mut self) -> [&mut Norm; 4] {
        [&mut self.router, &mut self.experts, &mut self.routed, &mut self.shared]
    }
}

/// How experts are chosen.
#[derive(Clone, Debug)]
pub struct Router {
    /// `[experts, hidden]`; never quantized.
    pub linear: Linear,
    /// What logits are multiplied by first.
    pub logits: f32,
    /// What scores are made of logits.
    pub scoring: Scoring,
    /// Experts of a token.
    pub top_k: usize,
    /// Tensor that is added to the scores for choosing only, and its extents.
    pub correction: Option<(String, Vec<usize>)>,
    /// Only experts of the best groups.
    pub groups: Option<Groups>,
    /// Weights are divided by their sum.
    pub renormalize: bool,
    /// Factor on the weights.
    pub scale: f32,
    /// Tensor of a further factor for each expert, and its extents.
    pub factors: Option<(String, Vec<usize>)>,
    /// Tensor of the experts of each token by its id, and its extents; then scores do no more than weigh.
    pub table: Option<(String, Vec<usize>)>,
}

impl Router {
    /// Its tensors beside the linear.
    pub fn vectors(&self) -> impl Iterator<Item = &(String, Vec<usize>)> {
        self.correction.iter().chain(&self.factors).chain(&self.table)
    }
}

/// Scores of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Over all experts.
    Softmax,
    /// Each by itself.
    Sigmoid,
    /// Each by itself, the root of `ln(1 + eˣ)` (DeepSeek V4).
    RootSoftplus,
}

/// Limits the choice to the best groups of consecutive experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Groups {
    /// Number of groups.
    pub count: usize,
    /// How many are left.
    pub kept: usize,
    /// Groups are ranked by the sum of so many of their best scores.
    pub ranked_by: usize,
}

/// The output projection.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its module; the weight tensor does not exist when tied.
    pub linear: Linear,
    /// Uses the embedding's weight.
    pub tied: bool,
    /// The model has none, and gives hidden states; `tied` then, for there is no tensor.
    pub missing: bool,
    /// Factor on the logits.
    pub scale: f32,
    /// Logits become `cap · tanh(logits / cap)`.
    pub softcap: Option<f32>,
}

impl Layer {
    /// Its linears that may be quantized, those that read one input together.
    pub fn linears(&self) -> Vec<Vec<&Linear>> {
        match self {
            Layer::Attention(attention) => attention.linears(),
            Layer::Delta(delta) => delta.linears(),
            Layer::Mlp(mlp) => mlp.linears(),
            Layer::Mamba(mamba) => mamba.linears(),
            Layer::Short(short) => short.linears(),
            Layer::Moe(moe) => moe.linears(),
            Layer::Further(further) => further.joining.linears().into_iter().map(|linear| vec![linear]).collect(),
            Layer::PerLayer(layer) => layer.linears(),
            Layer::Grams(layer) => layer.linears(),
            Layer::Opaque(linears) => linears.iter().map(|l| vec![l]).collect(),
        }
    }

    /// The same, as far as runtimes may fuse them into one: of a layer that is not known, those of one parent and one width.
    pub fn fused(&self) -> Vec<Vec<&Linear>> {
        let Layer::Opaque(linears) = self else { return self.linears() };
        let of = |linear: &Linear| (linear.module.rsplit_once('.').map(|(parent, _)| parent.to_owned()), linear.cols);
        linears.chunk_by(|a, b| of(a) == of(b)).map(|group| group.iter().collect()).collect()
    }

    /// Its linears that never are.
    pub fn routers(&self) -> Vec<&Linear> {
        match self {
            Layer::Moe(moe) => [&moe.router.linear]
                .into_iter()
                .chain(moe.shared.as_ref().and_then(|(_, gate)| gate.as_ref()))
                .collect(),
            Layer::Delta(delta) => delta.fixed().collect(),
            Layer::Attention(attention) => {
                let indexer = attention.indexer().into_iter().flat_map(Indexer::linears);
                let beside = attention.beside.iter().flat_map(|beside| beside.linears());
                attention.head_gate.iter().chain(indexer).chain(beside).collect()
            }
            Layer::Further(further) => further.fixed().collect(),
            Layer::PerLayer(layer) => vec![&layer.side.projection],
            _ => Vec::new(),
        }
    }

    /// Its normalisations.
    pub fn norms(&self) -> Vec<&Norm> {
        match self {
            Layer::Attention(attention) => attention.norms(),
            Layer::Delta(delta) => vec![&delta.norm],
            Layer::Mamba(mamba) => mamba.norm.iter().map(|norm| &norm.norm).collect(),
            Layer::Further(further) => further.norms(),
            Layer::Moe(moe) => moe.norms.iter().flat_map(|norms| norms.all()).collect(),
            Layer::PerLayer(layer) => vec![&layer.side.norm],
            Layer::Grams(layer) => layer.norms.iter().collect(),
            _ => Vec::new(),
        }
    }

    /// Other tensors of it.
    fn vectors(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            Layer::Attention(a) => {
                let sinks = a.sinks.iter().map(|name| (name.clone(), vec![a.shape.heads]));
                let rope = a.rope.iter().flat_map(|rope| rope.vectors());
                let warmth = a.temperature.iter().flat_map(|t| t.vectors(a.shape.heads));
                let beside = a.beside.iter().flat_map(|beside| beside.vectors());
                let indexer = a.indexer().into_iter().flat_map(Indexer::vectors);
                sinks.chain(rope).chain(warmth).chain(indexer).chain(beside).collect()
            }
            Layer::Moe(moe) => moe.router.vectors().cloned().collect(),
            Layer::PerLayer(layer) => layer.tables(),
            Layer::Grams(layer) => layer.vectors(),
            Layer::Delta(delta) => delta.vectors(),
            Layer::Mamba(mamba) => mamba.vectors(),
            Layer::Short(short) => short.convolution.vectors().collect(),
            Layer::Further(further) => further.vectors(),
            Layer::Mlp(mlp) => mlp.learned.iter().flat_map(|learned| learned.iter().cloned()).collect(),
            _ => Vec::new(),
        }
    }
}

impl Block {
    /// All its linears that may be quantized, in the order in which they are run.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.steps.iter().flat_map(|step| step.layer.linears().into_iter().flatten())
    }

    /// Its attention.
    pub fn attention(&self) -> Option<&Attention> {
        self.steps.iter().find_map(|step| match &step.layer {
            Layer::Attention(attention) => Some(attention),
            _ => None,
        })
    }
}

impl Graph {
    /// All linears of the blocks that may be quantized, in the order in which they are run.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// Whether a layer is a mixture of experts.
    pub fn has_experts(&self) -> bool {
        self.blocks.iter().flat_map(|block| &block.steps).any(|step| matches!(step.layer, Layer::Moe(_)))
    }

    /// What chooses experts, layer by layer.
    pub fn routers(&self) -> impl Iterator<Item = &Router> {
        self.blocks.iter().flat_map(|block| &block.steps).filter_map(|step| match &step.layer {
            Layer::Moe(moe) => Some(&moe.router),
            _ => None,
        })
    }

    /// The tensors that hold whole numbers.
    pub fn tables(&self) -> impl Iterator<Item = &str> {
        self.routers().filter_map(|router| router.table.as_ref()).map(|(tensor, _)| &tensor[..])
    }

    /// Every tensor that the model needs, with its shape, each once.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::new();
        let norm = |norm: &Norm, tensors: &mut Vec<(String, Vec<usize>)>| {
            tensors.extend(norm.weights.iter().chain(&norm.bias).map(|name| (name.clone(), norm.shape.clone())));
        };
        if !self.opaque {
            tensors.push((self.embedding.tensor.clone(), vec![self.vocabulary, self.hidden]));
            tensors
                .extend(self.embedding.positions.iter().map(|(name, rows)| (name.clone(), vec![*rows, self.hidden])));
        }
        for step in self.blocks.iter().flat_map(|block| &block.steps) {
            step.pre.iter().for_each(|n| norm(n, &mut tensors));
            step.layer.norms().into_iter().for_each(|n| norm(n, &mut tensors));
            for linear in step.layer.linears().into_iter().flatten().chain(step.layer.routers()) {
                tensors.extend(linear.tensors());
            }
            tensors.extend(step.layer.vectors());
            step.post.iter().for_each(|n| norm(n, &mut tensors));
            if let Some(hyper) = &step.hyper {
                tensors.extend(hyper.vectors().chain(hyper.linears().flat_map(Linear::tensors)));
            }
        }
        for altup in self.blocks.iter().filter_map(|block| block.altup.as_deref()) {
            tensors.extend(altup.linears().flat_map(Linear::tensors).chain(altup.scale.clone()));
            altup.norms().into_iter().for_each(|n| norm(n, &mut tensors));
        }
        tensors.extend(self.blocks.iter().filter_map(|block| Some((block.scale.clone()?, vec![1]))));
        tensors.extend(self.collapse.iter().filter_map(Collapse::hyper).flat_map(Hyper::vectors));
        tensors.extend(self.collapse.iter().flat_map(Collapse::linears).flat_map(Linear::tensors));
        if !self.opaque {
            norm(&self.final_norm, &mut tensors);
            match self.head.tied {
                false => tensors.extend(self.head.linear.tensors()),
                true => tensors.extend(self.head.linear.bias().map(|name| (name, vec![self.vocabulary]))),
            }
        }
        let mut seen = HashSet::new();
        tensors.retain(|(name, _)| seen.insert(name.clone()));
        tensors
    }

    /// Does something to every linear of the blocks, and of what becomes of streams behind them.
    pub fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        self.collapse.iter_mut().for_each(|collapse| collapse.linears_mut(change));
        self.blocks.iter_mut().filter_map(|block| block.altup.as_mut()).for_each(|altup| altup.linears_mut(change));
        for step in self.blocks.iter_mut().flat_map(|block| &mut block.steps) {
            step.hyper.iter_mut().for_each(|hyper| hyper.linears_mut(change));
            let mut mlp = |mlp: &mut Mlp| mlp.inputs.iter_mut().chain([&mut mlp.down]).for_each(&mut *change);
            match &mut step.layer {
                Layer::Mlp(m) => mlp(m),
                Layer::Moe(moe) => {
                    moe.experts.iter_mut().for_each(&mut mlp);
                    moe.shared.iter_mut().for_each(|(shared, _)| mlp(shared));
                    moe.latent.iter_mut().flat_map(|latent| latent.iter_mut()).for_each(&mut *change);
                    change(&mut moe.router.linear);
                    moe.shared.iter_mut().filter_map(|(_, gate)| gate.as_mut()).for_each(&mut *change);
                }
                Layer::Attention(attention) => attention.linears_mut(change),
                Layer::Delta(delta) => delta.linears_mut(change),
                Layer::Mamba(mamba) => mamba.linears_mut(change),
                Layer::Short(short) => short.linears_mut(change),
                Layer::Further(further) => further.linears_mut(change),
                Layer::PerLayer(layer) => layer.linears_mut(change),
                Layer::Grams(layer) => layer.linears_mut(change),
                Layer::Opaque(linears) => linears.iter_mut().for_each(&mut *change),
            }
        }
    }

    /// Gives every tensor and module another name.
    pub fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        let linear = |l: &mut Linear| {
            l.module = name(&l.module);
            match &mut l.stored {
                Stored::Slice { tensor, bias, .. } => {
                    *tensor = name(tensor);
                    bias.iter_mut().for_each(|bias| *bias = name(bias));
                }
                Stored::Rows { tensor, .. } => *tensor = name(tensor),
                Stored::Plain | Stored::Transposed => {}
            }
        };
        let text = |text: &mut Option<String>| text.iter_mut().for_each(|text| *text = name(text));
        let norm = |norm: &mut Norm| {
            norm.weights.iter_mut().for_each(|weight| *weight = name(weight));
            text(&mut norm.bias);
        };
        self.linears_mut(&mut |l| linear(l));
        linear(&mut self.head.linear);
        self.embedding.tensor = name(&self.embedding.tensor);
        self.embedding.positions.iter_mut().for_each(|(tensor, _)| *tensor = name(tensor));
        norm(&mut self.final_norm);
        self.collapse.iter_mut().filter_map(Collapse::hyper_mut).for_each(|hyper| hyper.rename(name));
        self.aside.iter_mut().for_each(|(prefix, _)| *prefix = name(prefix));
        let prefixes = self.dropped.iter_mut().map(|rule| &mut rule.prefix);
        prefixes.filter(|prefix| !prefix.is_empty()).for_each(|prefix| *prefix = name(prefix));
        for block in &mut self.blocks {
            block.name = name(&block.name);
            text(&mut block.scale);
            block.altup.iter_mut().for_each(|altup| altup.rename(name));
            for step in &mut block.steps {
                step.pre.iter_mut().chain(&mut step.post).for_each(norm);
                step.hyper.iter_mut().for_each(|hyper| hyper.rename(name));
                match &mut step.layer {
                    Layer::Attention(attention) => {
                        attention.rename(name);
                        attention.norms_mut().into_iter().for_each(norm);
                    }
                    Layer::Moe(moe) => {
                        let Router { correction, factors, table, .. } = &mut moe.router;
                        let tensors = correction.iter_mut().chain(factors).chain(table);
                        tensors.for_each(|(tensor, _)| *tensor = name(tensor));
                        moe.norms.iter_mut().flat_map(|norms| norms.all_mut()).for_each(norm);
                    }
                    Layer::Delta(delta) => delta.rename(name),
                    Layer::Mamba(mamba) => mamba.rename(name),
                    Layer::Short(short) => short.convolution.rename(name),
                    Layer::Further(further) => further.rename(name),
                    Layer::PerLayer(layer) => layer.rename(name),
                    Layer::Grams(layer) => layer.rename(name),
                    Layer::Mlp(mlp) => mlp
                        .learned
                        .iter_mut()
                        .flat_map(|learned| learned.iter_mut())
                        .for_each(|(tensor, _)| *tensor = name(tensor)),
                    Layer::Opaque(_) => {}
                }
            }
        }
    }
}
