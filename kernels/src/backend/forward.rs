//! Running a model: products, norms, rotations, attention.

use formats::{Encoding, Float, Levels};
use ndarray::Array2;

use super::Memory;
use crate::Result;

/// Shape and masking of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values per head of the queries and the keys.
    pub head_dim: usize,
    /// Values per head of the values and of the result; differs from `head_dim` in multi-head latent attention.
    pub value_dim: usize,
    /// Factor on the scores, usually `head_dim^-1/2`; positive.
    pub scale: f32,
    /// A token sees itself and `window − 1` tokens before it; `None` sees all before it. Not 0.
    pub window: Option<usize>,
    /// A sequence falls into blocks of so many positions, and a token sees none before its block's (Llama 4). Not 0.
    pub chunk: Option<usize>,
    /// Scores become `cap · tanh(score / cap)` before the softmax (Gemma 2); positive.
    pub softcap: Option<f32>,
    /// A token sees as far ahead as it sees back, as in models that make embeddings; not with a `chunk`.
    pub both_ways: bool,
}

impl AttentionShape {
    /// The first position that the token at `position` sees.
    pub fn first_seen(&self, position: usize) -> usize {
        let window = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        window.max(self.chunk.map_or(0, |chunk| position / chunk * chunk))
    }

    /// The position after the last one that the token at `position` sees, in a sequence of `length`.
    pub fn end_seen(&self, position: usize, length: usize) -> usize {
        match (self.both_ways, self.window) {
            (false, _) => position + 1,
            (true, None) => length,
            (true, Some(window)) => position.saturating_add(window).min(length),
        }
    }
}

/// How heads beside those of attention choose what these see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IndexShape {
    /// Heads of the queries; all have the keys in common.
    pub heads: usize,
    /// Values per head of the queries and the keys.
    pub head_dim: usize,
    /// Factor on the scores; positive.
    pub scale: f32,
    /// Blocks that are chosen for each query. Not 0.
    pub count: usize,
    /// Consecutive tokens that are chosen together, by the best score among them; 1 for tokens one by one. Not 0.
    pub block: usize,
    /// Blocks that are chosen whatever their scores are: the query's own, and those before it.
    pub local: usize,
    /// Each head chooses for as many heads of attention (MiniMax M3); otherwise their scores, as far as they are positive, are weighed and summed
    /// up (DeepSeek).
    pub apart: bool,
    /// A block has one key, which stands at its last token, and only whole blocks are chosen, one fewer than `count`; that of the query is seen
    /// besides until it is whole (GLM-5.3).
    pub pooled: bool,
    /// Of blocks with one key attention reads one entry each in the place of their tokens, as many as `count`, and a block that is not whole has none
    /// (DeepSeek V4).
    pub entries: bool,
}

/// What attention sees beside the tokens of its window: one entry for each whole block of tokens of a sequence, key and value of all heads in one.
pub struct Entries<'m, M> {
    /// `[tokens, kv_heads·head_dim]`: each entry stands at the last token of its block, and those from there on see it. What other rows hold is not read.
    pub values: &'m M,
    /// Tokens of a block. Not 0.
    pub block: usize,
    /// Which of them each query sees, as [`select`](Forward::select) chose them; all without.
    pub chosen: Option<&'m M>,
}

impl IndexShape {
    /// Choices that are made for each query.
    pub fn groups(&self) -> usize {
        if self.apart { self.heads } else { 1 }
    }

    /// Numbers of a query's choices.
    pub fn width(&self) -> usize {
        self.groups() * self.count
    }

    /// Tokens that a query sees at most.
    pub fn tokens(&self) -> usize {
        self.count.saturating_mul(self.block)
    }

    /// Whether nothing is left out of a sequence of so many tokens.
    pub fn sees_all(&self, length: usize) -> bool {
        match self.entries {
            true => length / self.block <= self.count,
            false => length + usize::from(self.pooled) <= self.tokens(),
        }
    }

    /// Blocks that are chosen for the query at `position`, its own among them where it is seen in any case.
    pub fn chosen(&self, position: usize) -> usize {
        self.count - usize::from(self.pooled && !self.entries && (position + 1).is_multiple_of(self.block))
    }

    /// Blocks that the query at `position` can choose from.
    pub fn there(&self, position: usize) -> usize {
        if self.entries { (position + 1) / self.block } else { position / self.block + 1 }
    }
}

/// Shape of one layer of linear attention whose state forgets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaShape {
    /// Heads of the queries and the keys; divides `value_heads`, and each serves so many of them that follow each other.
    pub key_heads: usize,
    /// Heads of the values, of the result, and of the decays; each has a state of its own.
    pub value_heads: usize,
    /// Values per head of the queries and the keys.
    pub key_dim: usize,
    /// Values per head of the values and of the result.
    pub value_dim: usize,
    /// Factor on the queries, usually `key_dim^-1/2`.
    pub scale: f32,
    /// What a token writes takes the place of what the state holds under its key (the gated delta rule), instead of being added to it (the
    /// state spaces of Mamba 2, whose keys and queries are called B and C).
    pub replaces: bool,
    /// Each channel of the keys decays by itself (Kimi Delta Attention), not all of a head alike.
    pub by_channel: bool,
}

impl DeltaShape {
    /// Numbers of the states of all heads.
    pub fn state(&self) -> u64 {
        (self.value_heads * self.key_dim * self.value_dim) as u64
    }

    /// Decays of one token.
    pub fn decays(&self) -> usize {
        self.value_heads * if self.by_channel { self.key_dim } else { 1 }
    }
}

/// Several hidden states of a token side by side, its streams, by what weights they are read and written, and how these are made
/// (hyper-connections).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HyperShape {
    /// How many.
    pub streams: usize,
    /// Added to the mean square of all of a token's values.
    pub norm_eps: f32,
    /// Added to the sigmoids that are the weights of reading, and to what the streams are mixed by, and to its sums.
    pub eps: f32,
    /// What the sigmoids are multiplied by that are the weights of writing, and what is added to them; none where nothing is written.
    pub writes: Option<[f32; 2]>,
    /// How often rows and columns of the matrix that mixes the streams are divided by their sums; 0 where they are not mixed.
    pub rounds: usize,
}

impl HyperShape {
    /// Kinds of weights: of reading, of writing, of mixing.
    pub fn kinds(&self) -> usize {
        1 + usize::from(self.writes.is_some()) + usize::from(self.rounds > 0)
    }

    /// Weights of a token.
    pub fn weights(&self) -> usize {
        let mixing = if self.rounds > 0 { self.streams } else { 0 };
        self.streams * (1 + usize::from(self.writes.is_some()) + mixing)
    }
}

/// What makes the weights of one layer's hyper-connections.
#[derive(Clone, Copy, Debug)]
pub struct HyperParameters<'a> {
    /// `[weights, streams · hidden]`, row by row.
    pub projection: &'a [f32],
    /// One for each weight.
    pub base: &'a [f32],
    /// One for each kind of weights.
    pub scale: &'a [f32],
}

/// How a slice of values is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// By its root mean square.
    Rms,
    /// By its mean and standard deviation.
    Layer,
    /// By its length: the root of the sum of squares, not of their mean.
    Length,
}

/// Which values of each head rotary position embedding turns, and which two turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeLayout {
    /// Values per head.
    pub head_dim: usize,
    /// Where the part that turns begins in a head; it is twice as wide as the tables of angles.
    pub first: usize,
    /// Neighbours turn together (GPT-J, Cohere, DeepSeek), else the halves of the part (most Hugging Face checkpoints).
    pub interleaved: bool,
}

/// The function between the linears of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x · σ(x)`.
    Silu,
    /// `x`: as a gate, the product of both.
    Identity,
    /// `x · Φ(x)`, `Φ` the normal distribution.
    Gelu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    Relu2,
    /// `g · σ(alpha · g) · (u + shift)` with `g = min(gate, limit)` and `u` in `±limit`; only as a gate.
    SwigluOai {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Largest gate, and largest size of the other.
        limit: f32,
        /// Added to the other then: 1 in gpt-oss.
        shift: f32,
    },
    /// `min(g · σ(g), limit) · u` with `u` in `±limit` (Step 3.5); only as a gate.
    SiluWithin {
        /// The largest that is made of the gate, and the largest size of the other.
        limit: f32,
    },
    /// `σ(x)`.
    Sigmoid,
    /// `positive · x² + beta · x` above 0, `negative · (e^min(x, eps) − 1 − x) + beta · x` elsewhere (xIELU).
    Xielu {
        /// Of the square above 0.
        positive: f32,
        /// Of the exponential's curve below it.
        negative: f32,
        /// Factor of `x` on both sides, and so the slope at 0.
        beta: f32,
        /// A little below 0: the largest exponent.
        eps: f32,
    },
}

impl Activation {
    /// The largest size of what is gated, where that has one.
    pub fn limit(self) -> Option<f32> {
        match self {
            Activation::SwigluOai { limit, .. } | Activation::SiluWithin { limit } => Some(limit),
            _ => None,
        }
    }
}

/// How a runtime rounds what it multiplies weights with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationRounding {
    /// Each value to half precision.
    F16,
    /// Each value to bfloat16.
    Bf16,
    /// Blocks of 32 values to 8 bits, with a scale in half precision.
    Q8_0,
    /// Blocks of 256 values to 8 bits, with a scale in single precision.
    Q8K,
    /// Each token to 8 bits, with a scale in single precision.
    Int8Token,
    /// Each token to E4M3, with a scale in single precision.
    Fp8Token,
}

impl ActivationRounding {
    /// That beside a weight in this encoding: ggml's CPU backend's for its types, vLLM's for others; `None` where nothing is rounded, or in
    /// a way that is not known.
    pub fn beside(encoding: &Encoding) -> Option<ActivationRounding> {
        const KNOWN: [(formats::encoding::Activation, ActivationRounding); 4] = [
            (formats::encoding::Activation::Q8_0, ActivationRounding::Q8_0),
            (formats::encoding::Activation::Q8_K, ActivationRounding::Q8K),
            (formats::encoding::Activation::INT8_TOKEN, ActivationRounding::Int8Token),
            (formats::encoding::Activation::FP8_TOKEN, ActivationRounding::Fp8Token),
        ];
        match (encoding.levels, encoding.activation) {
            (Levels::Plain(Float::F16), _) => Some(ActivationRounding::F16),
            (Levels::Plain(Float::BF16), _) => Some(ActivationRounding::Bf16),
            (_, activation) => KNOWN.iter().find(|(known, _)| Some(*known) == activation).map(|(_, kind)| *kind),
        }
    }

    /// Features that are rounded together in blocks; 1 where they are rounded one by one, or all of a token together.
    pub fn block_len(self) -> usize {
        match self {
            ActivationRounding::Q8_0 => 32,
            ActivationRounding::Q8K => 256,
            _ => 1,
        }
    }
}

/// What a model's operators do. Activations are `[tokens, features]`, weights `[out, in]`.
pub trait Forward: Memory {
    /// A linear layer's weight in the form that products read it in.
    type Weight: Send + Sync;

    /// Leaves of `x` what is left once a runtime has rounded it; each row on its own.
    ///
    /// Fails unless its features are whole blocks of `kind`.
    fn round_values(&self, x: &mut Self::Matrix, kind: ActivationRounding) -> Result<()>;
    /// The same of what is multiplied.
    fn round_activations(&self, x: &Self::Input, kind: ActivationRounding) -> Result<Self::Input>;

    /// A weight `[out, in]`, ready to be multiplied.
    fn weight(&self, matrix: Self::Matrix) -> Result<Self::Weight>;
    /// `y = x wᵀ + bias`.
    fn linear(&self, x: &Self::Input, weight: &Self::Weight, bias: Option<&[f32]>) -> Result<Self::Matrix>;
    /// [`linear`](Self::linear) of a weight `[outs, in]` that need not be in memory whole: `rows` writes those from the given one on, and
    /// is asked more than once where that takes less. Each `at_once` tokens, 256 at most, get the values that they get alone.
    fn linear_by_rows(
        &self,
        x: &Self::Input,
        outs: usize,
        rows: &(dyn Fn(usize, &mut [f32]) + Sync),
        bias: Option<&[f32]>,
        at_once: usize,
    ) -> Result<Self::Matrix> {
        let _ = at_once;
        let mut whole = Array2::zeros((outs, self.input_shape(x)[1]));
        rows(0, whole.as_slice_mut().expect("contiguous"));
        self.linear(x, &self.weight(self.upload(whole)?)?, bias)
    }
    /// `y ← y + x wᵀ + bias`.
    fn add_linear(
        &self,
        x: &Self::Input,
        weight: &Self::Weight,
        bias: Option<&[f32]>,
        y: &mut Self::Matrix,
    ) -> Result<()>;
    /// `act(x gᵀ + bias) · (x uᵀ + bias)` for `[gate, up]`.
    fn gated(
        &self,
        x: &Self::Input,
        weights: [&Self::Weight; 2],
        biases: [Option<&[f32]>; 2],
        activation: Activation,
    ) -> Result<Self::Input>;
    /// `act(x wᵀ + bias)`: a feed-forward layer without a gate.
    ///
    /// Fails for [`Activation::SwigluOai`] and [`Activation::SiluWithin`], which are only gates.
    fn activated(
        &self,
        x: &Self::Input,
        weight: &Self::Weight,
        bias: Option<&[f32]>,
        activation: Activation,
    ) -> Result<Self::Input>;

    /// `x / rms(x) · weight` per row, `rms² = mean(x²) + eps`.
    fn rms_norm(&self, x: &Self::Matrix, weight: &[f32], eps: f32) -> Result<Self::Matrix>;
    /// `(x − mean) / √(variance + eps) · weight + bias` per row.
    fn layer_norm(&self, x: &Self::Matrix, weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Result<Self::Matrix>;
    /// Each row's norm; root mean squares have no `bias`.
    fn norm(
        &self,
        x: &Self::Matrix,
        kind: NormKind,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<Self::Matrix> {
        match kind {
            NormKind::Rms => self.rms_norm(x, weight, eps),
            NormKind::Layer => self.layer_norm(x, weight, bias, eps),
            NormKind::Length => {
                let mut y = self.copy(x)?;
                let width = self.shape(x)[1];
                self.norm_heads(&mut y, width, kind, weight, None, eps)?;
                Ok(y)
            }
        }
    }
    /// [`input`](Self::input) of a [`norm`](Self::norm), where products are all that read it.
    fn norm_input(
        &self,
        x: &Self::Matrix,
        kind: NormKind,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<Self::Input> {
        self.input(self.norm(x, kind, weight, bias, eps)?)
    }
    /// Normalises every `head_dim` values of each row in place.
    ///
    /// `weight` and `bias` are `[head_dim]`, shared by the heads, or as wide as `x`, one for each head.
    fn norm_heads(
        &self,
        x: &mut Self::Matrix,
        head_dim: usize,
        kind: NormKind,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<()>;

    /// Rotates pairs of values of each head by the angles of its token's position.
    ///
    /// `cos` and `sin` are `[positions, pairs]`; `lengths` are the sequences that `x`'s rows consist of.
    fn rope(
        &self,
        x: &mut Self::Matrix,
        cos: &Array2<f32>,
        sin: &Array2<f32>,
        layout: &RopeLayout,
        lengths: &[usize],
    ) -> Result<()>;
    /// Softmax attention of each sequence.
    ///
    /// `q` is `[tokens, heads·head_dim]`, `k` `[tokens, kv_heads·head_dim]`, `v` `[tokens, kv_heads·value_dim]`, the
    /// result `[tokens, heads·value_dim]`. `sinks` `[heads]` are logits that take part in each query's softmax and have
    /// no value (gpt-oss).
    fn attention(
        &self,
        q: &Self::Matrix,
        k: &Self::Matrix,
        v: &Self::Matrix,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Self::Input>;

    /// What attention is to see: for each query and each group of heads the positions in its sequence of `count` blocks of the best scores, ascending,
    /// with −1 behind them where fewer are there; of equal ones the earliest.
    ///
    /// `q` is `[tokens, heads·head_dim]`, `k` `[tokens, head_dim]`, `weights` `[tokens, heads]`, there unless heads choose apart; the result
    /// `[tokens, groups·count]`.
    fn select(
        &self,
        q: &Self::Matrix,
        k: &Self::Matrix,
        weights: Option<&Self::Matrix>,
        shape: &IndexShape,
        lengths: &[usize],
    ) -> Result<Self::Matrix>;
    /// [`attention`](Self::attention) to what [`select`](Self::select) chose, without window, chunks and caps.
    fn attention_to(
        &self,
        qkv: [&Self::Matrix; 3],
        chosen: &Self::Matrix,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        index: &IndexShape,
        lengths: &[usize],
    ) -> Result<Self::Input>;

    /// [`attention`](Self::attention) to the tokens of the shape's window and to entries that stand for blocks of tokens besides, without chunks and
    /// caps; values are as wide as keys.
    fn attention_beside(
        &self,
        qkv: [&Self::Matrix; 3],
        entries: &Entries<'_, Self::Matrix>,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Self::Input>;

    /// A causal convolution of each channel by itself, within each sequence: `y[t, c] = act(bias[c] + Σ weight[c, j] · x[t − K + 1 + j, c])`,
    /// where what lies before a sequence is 0.
    ///
    /// `weight` is `[channels, K]`, row-major, the last of a channel's values for the token itself; `K` at least 1.
    fn convolve(
        &self,
        x: &Self::Matrix,
        weight: &[f32],
        bias: Option<&[f32]>,
        activation: Option<Activation>,
        lengths: &[usize],
    ) -> Result<Self::Matrix>;
    /// `x ← −rates · clamp(ln(1 + exp(x + bias)))`: logarithms of decays, for each column a rate and a bias; `limits` are the least and the
    /// most that a step may be.
    fn decays(&self, x: &mut Self::Matrix, rates: &[f32], bias: &[f32], limits: [f32; 2]) -> Result<()>;
    /// `x ← lower · σ(rates · (x + bias))`: logarithms of decays that are no less than `lower`, which is negative.
    fn bounded_decays(&self, x: &mut Self::Matrix, rates: &[f32], bias: &[f32], lower: f32) -> Result<()>;
    /// What blocks of tokens have in common: at the last token of each whole block of `block` tokens of a sequence every channel of `x` summed up over
    /// the block, with the softmax over it of `gates + places` as weights; 0 at all other tokens.
    ///
    /// `x` and `gates` are `[tokens, channels]`, `places` `[block, channels]`, row by row. Where blocks `overlap`, each of these has twice as many columns:
    /// the first half is what a token gives to the block behind its own, and the second what it gives to its own; a sequence's first block has its own
    /// tokens alone.
    fn pool_blocks(
        &self,
        x: &Self::Matrix,
        gates: &Self::Matrix,
        places: &[f32],
        block: usize,
        overlap: bool,
        lengths: &[usize],
    ) -> Result<Self::Matrix>;
    /// The gated delta rule over each sequence: `S ← exp(decay) · S`, by rows where channels decay by themselves, then
    /// `S ← S + k · β(v − Sᵀk)ᵀ`, then `out = scale · Sᵀq`, for each head a state `S` `[key_dim, value_dim]` that is 0 before the first
    /// token of a sequence. Where the shape does not say that it replaces, `S ← S + k · βvᵀ` (Mamba 2).
    ///
    /// `q` and `k` are `[tokens, key_heads·key_dim]`, `v` and the result `[tokens, value_heads·value_dim]`, `decay` (no positive values)
    /// `[tokens, value_heads]`, or `[tokens, value_heads·key_dim]`, and `beta` `[tokens, value_heads]`. Where it replaces, keys are no longer
    /// than 1 and `beta` is from 0 to 1.
    fn delta_rule(
        &self,
        qkv: [&Self::Matrix; 3],
        decay: &Self::Matrix,
        beta: &Self::Matrix,
        shape: &DeltaShape,
        lengths: &[usize],
    ) -> Result<Self::Matrix>;
    /// The weights of hyper-connections, `[tokens, weights]`, made of a token's streams `h` `[tokens, streams·hidden]`: first those by which
    /// they are read, then those by which they are written, then the matrix by which they are mixed, as far as the shape has such.
    fn hyper_weights(&self, h: &Self::Matrix, of: HyperParameters<'_>, shape: &HyperShape) -> Result<Self::Matrix>;
    /// `[tokens, hidden]`: each token's streams, summed up with the first of its weights.
    fn read_streams(&self, h: &Self::Matrix, weights: &Self::Matrix, streams: usize) -> Result<Self::Matrix>;
    /// `stream k ← write[k] · y + Σ mix[j, k] · stream j`, or `+ stream k` where they are not mixed; `y` is `[tokens, hidden]`.
    fn write_streams(
        &self,
        y: &Self::Matrix,
        weights: &Self::Matrix,
        shape: &HyperShape,
        h: &mut Self::Matrix,
    ) -> Result<()>;

    /// `x ← act(x)`.
    ///
    /// Fails for [`Activation::SwigluOai`] and [`Activation::SiluWithin`], which are only gates.
    fn activate(&self, x: &mut Self::Matrix, activation: Activation) -> Result<()>;
    /// `gate ← act(gate) · x`.
    fn gate(&self, gate: &mut Self::Matrix, x: &Self::Matrix, activation: Activation) -> Result<()>;

    /// `y ← y + coefficients · x` of each token, whose values are streams of `width` side by side: `x` is `[tokens, from·width]`, `y`
    /// `[tokens, to·width]`, and `coefficients` `[tokens, to·from]` say for each stream of `y` how much of each of `x` it takes.
    fn mix_streams(
        &self,
        x: &Self::Matrix,
        coefficients: &Self::Matrix,
        width: usize,
        y: &mut Self::Matrix,
    ) -> Result<()>;
    /// Makes each stream of `width` values of `x` as large as the first: times the root mean square of that, divided by its own, whose square
    /// is taken for `least` where it is less.
    fn match_streams(&self, x: &mut Self::Matrix, width: usize, least: f32) -> Result<()>;
    /// How far each stream of `width` values of `x` agrees with that of `y`, `[tokens, streams]`: `r = Σ x·y / √width`, and of it
    /// `sign(r) · √max(|r|, least)`.
    fn agree_streams(&self, x: &Self::Matrix, y: &Self::Matrix, width: usize, least: f32) -> Result<Self::Matrix>;
    /// `x ← max(x − mean − deviations · √variance, 0)`, each row on its own.
    fn cut(&self, x: &mut Self::Matrix, deviations: f32) -> Result<()>;

    /// `[tokens, heads·(a + b)]`: each head's own `a` values of `own` `[tokens, heads·a]`, then those of `shared`
    /// `[tokens, b]`, which all heads have in common (the keys of multi-head latent attention).
    fn join_heads(&self, own: &Self::Matrix, shared: &Self::Matrix, heads: usize) -> Result<Self::Matrix>;
    /// `[tokens, heads·width]`: each value of `x` `[tokens, heads]` so many times, one after the other.
    fn spread_heads(&self, x: &Self::Matrix, width: usize) -> Result<Self::Matrix>;
    /// `x ← cap · tanh(x / cap)`.
    fn softcap(&self, x: &mut Self::Matrix, cap: f32) -> Result<()>;
    /// Limits every value to `−limit ..= limit`.
    fn clamp(&self, x: &mut Self::Matrix, limit: f32) -> Result<()>;
    /// `y[rows[i]] ← y[rows[i]] + weights[i] · x[i]` for every row of `x`; `rows` are distinct.
    fn add_rows(&self, x: &Self::Matrix, rows: &[usize], weights: &[f32], y: &mut Self::Matrix) -> Result<()>;
}
