//! What quantc asks of a device: few, whole operations.

use formats::ggml::{BlockScales, GgmlType};
use formats::{Dtype, Encoding, WordLayout};
use ndarray::Array2;

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
}

impl AttentionShape {
    /// The first position that the token at `position` sees; the last is its own.
    pub fn first_seen(&self, position: usize) -> usize {
        let window = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        window.max(self.chunk.map_or(0, |chunk| position / chunk * chunk))
    }
}

/// How a slice of values is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// By its root mean square.
    Rms,
    /// By its mean and standard deviation.
    Layer,
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
    /// `x · Φ(x)`, `Φ` the normal distribution.
    Gelu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    Relu2,
    /// `g · σ(alpha · g) · (u + 1)` with `g = min(gate, limit)` and `u` in `±limit` (gpt-oss); only as a gate.
    SwigluOai {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Largest gate, and largest size of the other.
        limit: f32,
    },
}

/// How a runtime that keeps weights in a ggml type rounds what it multiplies them with.
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
}

impl ActivationRounding {
    /// That of ggml's CPU backend beside a weight of type `ty`; `None` where nothing is rounded.
    pub fn beside(ty: GgmlType) -> Option<ActivationRounding> {
        match (ty.name, ty.block_len) {
            ("F16", _) => Some(ActivationRounding::F16),
            ("BF16", _) => Some(ActivationRounding::Bf16),
            (_, 32) => Some(ActivationRounding::Q8_0),
            (_, 256) => Some(ActivationRounding::Q8K),
            _ => None,
        }
    }

    /// Features that are rounded together.
    pub fn block_len(self) -> usize {
        match self {
            ActivationRounding::F16 | ActivationRounding::Bf16 => 1,
            ActivationRounding::Q8_0 => 32,
            ActivationRounding::Q8K => 256,
        }
    }
}

/// A grid to be fitted: how the weight is represented, and which columns go together.
#[derive(Clone, Debug)]
pub struct GridSpec {
    /// What codes stand for, and how scales are stored.
    pub encoding: Encoding,
    /// `[cols]`: the group of each column.
    pub group_of: Vec<u32>,
    /// What all scales of the matrix are multiplied by, where the encoding has a global scale: a power of two
    /// ([`global_scale`](crate::global_scale)). Without one the matrix gets its own.
    pub global: Option<f32>,
}

impl GridSpec {
    /// Groups of consecutive columns, in a row of `cols`.
    pub fn of(encoding: Encoding, cols: usize) -> GridSpec {
        let width = encoding.group_width(cols);
        GridSpec { encoding, group_of: (0..cols).map(|col| (col / width.max(1)) as u32).collect(), global: None }
    }

    /// Number of groups in a row.
    pub fn groups(&self) -> usize {
        self.encoding.groups(self.group_of.len())
    }
}

/// Scales and zeros or minima of every group of a weight matrix, fixed before the codes are chosen.
#[derive(Clone, Debug)]
pub struct Grid {
    /// What it was fitted to.
    pub spec: GridSpec,
    /// Rows of the weight matrix.
    pub rows: usize,
    /// `[rows, groups]`: what levels are multiplied by. Exactly what the file says: its own value, or what the integers in `blocks` give.
    pub scales: Vec<f32>,
    /// `[rows, groups]`: the code of 0 of [integers](Encoding::scheme); the same everywhere where none is stored. Empty of others.
    pub zeros: Vec<u8>,
    /// `[rows, groups]`: what is taken off; zeros where nothing is. Empty of integers.
    pub mins: Vec<f32>,
    /// `[rows, blocks]`: what columns that share a stored scale have of it. Empty of integers.
    pub blocks: Vec<BlockScales>,
}

impl Grid {
    /// Integers with these scales and zeros of every group.
    pub fn of_integers(spec: GridSpec, rows: usize, scales: Vec<f32>, zeros: Vec<u8>) -> Grid {
        Grid { spec, rows, scales, zeros, mins: Vec::new(), blocks: Vec::new() }
    }

    /// Expands the scales of blocks: of ggml's types, or of levels with scales of their own.
    pub fn of_blocks(spec: GridSpec, rows: usize, blocks: Vec<BlockScales>) -> Grid {
        let cols = spec.group_of.len();
        let per_block = spec.encoding.unit_width(cols).div_ceil(spec.encoding.group_width(cols).max(1)).max(1);
        let (mut scales, mut mins) = (vec![0.0; blocks.len() * per_block], vec![0.0; blocks.len() * per_block]);
        for ((block, scales), mins) in
            blocks.iter().zip(scales.chunks_exact_mut(per_block)).zip(mins.chunks_exact_mut(per_block))
        {
            block.expand(&spec.encoding, scales, mins);
        }
        Grid { spec, rows, scales, zeros: Vec::new(), mins, blocks }
    }

    /// Columns of the weight matrix.
    pub fn cols(&self) -> usize {
        self.spec.group_of.len()
    }
}

/// How codes are to lie.
#[derive(Clone, Copy, Debug)]
pub enum Packing<'a> {
    /// In 32-bit words of their own, little-endian.
    Words {
        /// Bits of a code.
        bits: u8,
        /// Which bits of which word hold each code.
        layout: WordLayout,
    },
    /// In the blocks of one of ggml's types, together with these scales.
    Blocks(&'a Grid),
}

/// How the scale of a group is chosen.
///
/// Ranges of ggml's blocks are never taken as they are: what spans a superblock's groups says nothing of the integers between. So the
/// first is a search there, too, and the last one by the Hessian's diagonal.
#[derive(Debug)]
pub enum FitKind<'a, M> {
    /// From the smallest and the largest weight. In ggml's blocks the search where each weight counts by its own size.
    MinMax,
    /// The scale (and zero or min) of least `Σ h_j (w_j − ŵ_j)²`; `h` is `[cols]`, all ones for plain squared error.
    Weighted(&'a [f32]),
    /// Range shrunk in steps to the least `eᵀ H_gg e`; `H` is `[cols, cols]`, its lower triangle is read. In ggml's blocks the weighted
    /// search by its diagonal.
    BlockHessian(&'a M),
}

/// A damped, ordered, factored Hessian: `P H Pᵀ + damping = R D Rᵀ` with `R` unit upper triangular.
#[derive(Debug)]
pub struct Factor<M> {
    /// Column processed at each position.
    pub order: Vec<u32>,
    /// `R`, `[n, n]`, in processing order; entries on and below the diagonal are not read.
    pub unit: M,
    /// The diagonal of `D`: what one squared unit of error in that column costs once later columns have absorbed it.
    pub pivots: Vec<f64>,
    /// The relative damping that was used.
    pub damp: f64,
    /// Columns that no input ever reached.
    pub dead: usize,
}

/// What the sweep returns.
#[derive(Clone, Debug)]
pub struct Swept<C> {
    /// `[rows, cols]` in the original column order.
    pub codes: C,
    /// `tr((T − Ŵ) H (T − Ŵ)ᵀ)` under the factor's damped Hessian.
    pub loss: f64,
}

/// Negative log-likelihood of each scored token, and what the model would have said.
#[derive(Clone, Debug, Default)]
pub struct TokenLoss {
    /// `−ln p(target)` in nats.
    pub nll: Vec<f64>,
    /// Index of the largest logit; the first one on a tie.
    pub argmax: Vec<u32>,
}

/// A model beside its reference, token by token.
#[derive(Clone, Debug, Default)]
pub struct TokenComparison {
    /// The reference's loss.
    pub reference: TokenLoss,
    /// The model's loss.
    pub model: TokenLoss,
    /// `KL(reference ‖ model)` in nats over the whole vocabulary.
    pub kld: Vec<f64>,
}

/// One device. Matrices are `f32`, row-major, resident on the device; activations are `[tokens, features]`, weights `[out, in]`.
///
/// Results do not depend on the number of threads.
pub trait Backend: Sync {
    /// A matrix on the device.
    type Matrix: Send + Sync;
    /// An activation in the form that products read it in.
    type Input: Send + Sync;
    /// A linear layer's weight in the form that products read it in.
    type Weight: Send + Sync;
    /// A matrix as a file stores it, on its way to the device.
    type Stored: Send + Sync;
    /// Codes `[rows, cols]` of a weight, a byte each.
    type Codes: Send + Sync;

    /// What the user should see: device and instruction set.
    fn name(&self) -> String;
    /// The same device where the operands of products may be kept in bfloat16 if that is faster: good for calibration,
    /// not for measuring.
    fn relaxed(&self) -> Self
    where
        Self: Sized;
    /// Bytes of memory it may use, where that is not the host's.
    fn room(&self) -> Option<u64> {
        None
    }
    /// Tokens that go through an operator together, unless one sequence is longer.
    fn tokens_at_once(&self) -> usize {
        2048
    }
    /// Rows of weights with one input that keep it busy in a sweep; fewer are better swept together.
    fn rows_at_once(&self) -> usize {
        1
    }
    /// Weights that one thread has it round at a time, where nothing else decides.
    fn weights_at_once(&self) -> usize {
        1 << 16
    }
    /// Values of an activation that are kept between two uses of it; more are computed twice.
    fn kept_values(&self) -> usize {
        1 << 29
    }
    /// Bytes that a value of an [input](Self::Input) takes.
    fn bytes_of_input(&self) -> usize {
        4
    }
    /// What the user should know of how the work went, for the report.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
    /// A matrix as a file stores it, row-major and little-endian, widened on the device; `None` where the caller is to widen it.
    fn upload_stored(&self, bytes: &[u8], dtype: Dtype, shape: [usize; 2]) -> Result<Option<Self::Matrix>> {
        let _ = (bytes, dtype, shape);
        Ok(None)
    }
    /// Bytes of stored matrices that may be on their way at a time; `None` where nothing is gained by sending them ahead.
    fn sends_ahead(&self) -> Option<u64> {
        None
    }
    /// Sends a matrix as a file stores it, beside the work that was asked for; `bytes` may be reused at once. `None` where there is
    /// no room for it now, or the caller is to widen it.
    fn send_ahead(&self, bytes: &[u8], dtype: Dtype, shape: [usize; 2]) -> Result<Option<Self::Stored>> {
        let _ = (bytes, dtype, shape);
        Ok(None)
    }
    /// What [`upload_stored`](Self::upload_stored) gives, of what was sent ahead.
    fn widen(&self, stored: Self::Stored) -> Result<Self::Matrix>;
    /// Copies a host matrix to the device.
    fn upload(&self, host: Array2<f32>) -> Result<Self::Matrix>;
    /// Copies a device matrix to the host.
    fn download(&self, matrix: &Self::Matrix) -> Result<Array2<f32>>;
    /// A matrix of zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Result<Self::Matrix>;
    /// `[rows, cols]`.
    fn shape(&self, matrix: &Self::Matrix) -> [usize; 2];
    /// A copy of the whole.
    fn copy(&self, matrix: &Self::Matrix) -> Result<Self::Matrix>;
    /// A copy of the named rows.
    fn select_rows(&self, matrix: &Self::Matrix, rows: &[usize]) -> Result<Self::Matrix>;
    /// `matrix[i, j] ← matrix[i, j] · rows[i] · cols[j]`; an empty slice leaves that side alone.
    fn scale(&self, matrix: &mut Self::Matrix, rows: &[f32], cols: &[f32]) -> Result<()>;
    /// Whether every value is finite.
    fn is_finite(&self, matrix: &Self::Matrix) -> Result<bool>;

    /// An activation `[tokens, features]`, ready to be multiplied.
    fn input(&self, x: Self::Matrix) -> Result<Self::Input>;
    /// `[tokens, features]`.
    fn input_shape(&self, x: &Self::Input) -> [usize; 2];
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
    /// Fails for [`Activation::SwigluOai`], which is only a gate.
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
    /// Causal softmax attention of each sequence.
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
    /// `[tokens, heads·(a + b)]`: each head's own `a` values of `own` `[tokens, heads·a]`, then those of `shared`
    /// `[tokens, b]`, which all heads have in common (the keys of multi-head latent attention).
    fn join_heads(&self, own: &Self::Matrix, shared: &Self::Matrix, heads: usize) -> Result<Self::Matrix>;
    /// `x ← cap · tanh(x / cap)`.
    fn softcap(&self, x: &mut Self::Matrix, cap: f32) -> Result<()>;
    /// Limits every value to `−limit ..= limit`.
    fn clamp(&self, x: &mut Self::Matrix, limit: f32) -> Result<()>;
    /// `y ← y + factor · x`.
    fn add_scaled(&self, x: &Self::Matrix, factor: f32, y: &mut Self::Matrix) -> Result<()>;
    /// `y[rows[i]] ← y[rows[i]] + weights[i] · x[i]` for every row of `x`; `rows` are distinct.
    fn add_rows(&self, x: &Self::Matrix, rows: &[usize], weights: &[f32], y: &mut Self::Matrix) -> Result<()>;
    /// `a − b`.
    fn difference(&self, a: &Self::Matrix, b: &Self::Matrix) -> Result<Self::Matrix>;

    /// `gram ← gram + xᵀ x`, lower triangle only.
    fn add_gram(&self, x: &Self::Input, gram: &mut Self::Matrix) -> Result<()>;
    /// `magnitude[j] ← magnitude[j] + Σ_t |x_tj|` and `energy[j] ← energy[j] + Σ_t x_tj²`.
    fn add_moments(&self, x: &Self::Input, magnitude: &mut [f64], energy: &mut [f64]) -> Result<()>;
    /// The diagonal of a square matrix.
    fn diagonal(&self, matrix: &Self::Matrix) -> Result<Vec<f32>>;
    /// `tr(e H eᵀ)` for `e` `[rows, n]` and a gram matrix of which the lower triangle is read.
    fn quadratic(&self, e: &Self::Matrix, gram: &Self::Matrix) -> Result<f64>;
    /// `Σ e_ij² · weights_j`.
    fn weighted_square(&self, e: &Self::Matrix, weights: &[f64]) -> Result<f64>;
    /// What plain min-max rounding of `weight · diag(t)` costs: `tr(e H eᵀ)` with `e` the error divided by `t` again.
    fn scaled_rounding_loss(
        &self,
        weight: &Self::Matrix,
        t: &[f32],
        spec: &GridSpec,
        gram: &Self::Matrix,
    ) -> Result<f64>;
    /// Factors `gram` with its columns in `order` and each diagonal entry multiplied by `1 + damp`.
    ///
    /// Columns of zero energy get a unit pivot and no feedback. Fails when the matrix is not positive definite.
    fn factor(&self, gram: &Self::Matrix, order: Vec<u32>, damp: f64) -> Result<Factor<Self::Matrix>>;

    /// Chooses scales, and zeros or minima, for every group of `weight`.
    ///
    /// Integers with scales of their own are searched as [`ops::fit`](crate::ops::fit) says, ggml's blocks as
    /// [`ops::blocks`](crate::ops::blocks) does. Fails for other encodings, and where blocks do not divide the rows.
    fn fit(&self, weight: &Self::Matrix, spec: &GridSpec, kind: FitKind<'_, Self::Matrix>) -> Result<Grid>;
    /// Rounds every weight to the nearest code of its group's grid.
    fn round(&self, weight: &Self::Matrix, grid: &Grid) -> Result<Self::Codes>;
    /// Rounds weights that read one input column by column, each column's error spread over the columns not yet done. Each has a grid of
    /// its own, in whatever encoding.
    fn sweep(
        &self,
        targets: &[(&Self::Matrix, &Grid)],
        factor: &Factor<Self::Matrix>,
    ) -> Result<Vec<Swept<Self::Codes>>>;
    /// Moves scales and codes of a swept matrix wherever its loss falls; returns the loss, as [`Swept::loss`].
    ///
    /// `gram` and `damp` are those of the sweep's [`factor`](Self::factor).
    fn refine(
        &self,
        target: &Self::Matrix,
        gram: &Self::Matrix,
        damp: f64,
        grid: &mut Grid,
        codes: &mut Self::Codes,
    ) -> Result<f64>;
    /// The reals that codes stand for.
    fn dequantize(&self, codes: &Self::Codes, grid: &Grid) -> Result<Self::Matrix>;
    /// Codes as files hold them.
    fn pack(&self, codes: &Self::Codes, packing: Packing<'_>) -> Result<Vec<u8>>;
    /// Copies codes to the host.
    fn download_codes(&self, codes: &Self::Codes) -> Result<Array2<u8>>;

    /// Loss of `logits` `[tokens, vocabulary]` against the next tokens.
    fn token_loss(&self, logits: &Self::Matrix, targets: &[u32]) -> Result<TokenLoss>;
    /// The same for two models, with the divergence between them.
    fn compare(&self, reference: &Self::Matrix, model: &Self::Matrix, targets: &[u32]) -> Result<TokenComparison>;
}
