//! A model as data: which tensors it has, and what is done with them, block by block.

use std::sync::Arc;

use kernels::AttentionShape;
use ndarray::Array2;

/// A decoder-only language model.
#[derive(Clone, Debug)]
pub struct Graph {
    /// The family that built it.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Tensor of the token embedding, `[vocabulary, hidden]`.
    pub embedding: String,
    /// Decoder blocks, in order.
    pub blocks: Vec<Block>,
    /// The last normalisation.
    pub final_norm: Norm,
    /// The output projection.
    pub head: Head,
    /// Tensors that a checkpoint may hold and that the model does not use.
    pub dropped: &'static [DropRule],
}

/// Tensors that are left out of the output, and why.
#[derive(Clone, Copy, Debug)]
pub struct DropRule {
    /// Names that end so.
    pub suffix: &'static str,
    /// Why they may be left out.
    pub reason: &'static str,
}

/// One decoder block: steps that each add to the residual stream.
#[derive(Clone, Debug)]
pub struct Block {
    /// The prefix of its tensors, as in `model.layers.3`.
    pub name: String,
    /// What is done, in order.
    pub steps: Vec<Step>,
}

/// One residual step.
#[derive(Clone, Debug)]
pub enum Step {
    /// `h ← h + o(attention(q(n), k(n), v(n)))`, `n = norm(h)`.
    Attention(Attention),
    /// `h ← h + down(silu(gate(n)) · up(n))`, `n = norm(h)`.
    Mlp(Mlp),
}

/// Root-mean-square normalisation.
#[derive(Clone, Debug)]
pub struct Norm {
    /// Its weight tensor, `[hidden]`.
    pub weight: String,
    /// Added to the mean square.
    pub eps: f32,
}

/// One linear layer.
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
}

impl Linear {
    /// The weight tensor's name.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.module)
    }

    /// The bias tensor's name, if it has one.
    pub fn bias(&self) -> Option<String> {
        self.bias.then(|| format!("{}.bias", self.module))
    }
}

/// Causal self-attention with rotary positions.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Before the projections.
    pub norm: Norm,
    /// Query projection.
    pub q: Linear,
    /// Key projection.
    pub k: Linear,
    /// Value projection.
    pub v: Linear,
    /// Output projection.
    pub o: Linear,
    /// Heads, scale and window.
    pub shape: AttentionShape,
    /// Rotation of queries and keys.
    pub rope: Arc<Rope>,
}

/// A gated feed-forward layer.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// Before the projections.
    pub norm: Norm,
    /// The gate.
    pub gate: Linear,
    /// What is gated.
    pub up: Linear,
    /// Back to the residual stream.
    pub down: Linear,
}

/// The output projection.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its module; the tensor does not exist when tied.
    pub linear: Linear,
    /// Uses the embedding's weight.
    pub tied: bool,
}

/// Rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Radians per position, one for each pair of values.
    pub inverse_frequencies: Vec<f32>,
    /// The base that they are powers of.
    pub theta: f32,
    /// How they were stretched beyond the first context; already in `inverse_frequencies`.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by the factor.
    Linear {
        /// By how much.
        factor: f32,
    },
    /// Llama 3's: long wavelengths divided by the factor, short ones kept, those between in between.
    Llama3 {
        /// By how much.
        factor: f32,
        /// Wavelengths above `original / low` are divided.
        low: f32,
        /// Wavelengths below `original / high` are kept.
        high: f32,
        /// The context of the first training.
        original: f32,
    },
}

impl Rope {
    /// Cosines and sines `[positions, head_dim / 2]`.
    pub fn table(&self, positions: usize) -> (Array2<f32>, Array2<f32>) {
        let angle = |(position, i): (usize, usize)| position as f32 * self.inverse_frequencies[i];
        let shape = (positions, self.inverse_frequencies.len());
        (Array2::from_shape_fn(shape, |at| angle(at).cos()), Array2::from_shape_fn(shape, |at| angle(at).sin()))
    }
}

impl Step {
    /// Its linears, those that read one input together.
    pub fn linears(&self) -> Vec<Vec<&Linear>> {
        match self {
            Step::Attention(a) => vec![vec![&a.q, &a.k, &a.v], vec![&a.o]],
            Step::Mlp(m) => vec![vec![&m.gate, &m.up], vec![&m.down]],
        }
    }

    /// Its normalisation.
    pub fn norm(&self) -> &Norm {
        match self {
            Step::Attention(a) => &a.norm,
            Step::Mlp(m) => &m.norm,
        }
    }
}

impl Block {
    /// All its linears, in the order in which they are run.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.steps.iter().flat_map(|step| step.linears().into_iter().flatten())
    }
}

impl Graph {
    /// All linears of the blocks, in the order in which they are run.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// Every tensor that the model needs, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = vec![(self.embedding.clone(), vec![self.vocabulary, self.hidden])];
        let linear = |l: &Linear, tensors: &mut Vec<(String, Vec<usize>)>| {
            tensors.push((l.weight(), vec![l.rows, l.cols]));
            tensors.extend(l.bias().map(|bias| (bias, vec![l.rows])));
        };
        for block in &self.blocks {
            for step in &block.steps {
                tensors.push((step.norm().weight.clone(), vec![self.hidden]));
                step.linears().into_iter().flatten().for_each(|l| linear(l, &mut tensors));
            }
        }
        tensors.push((self.final_norm.weight.clone(), vec![self.hidden]));
        if !self.head.tied {
            linear(&self.head.linear, &mut tensors);
        }
        tensors
    }
}
