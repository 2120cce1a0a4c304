//! Quantizing a weight: statistics of its inputs, scales, codes, and how they lie in files.

use formats::ggml::BlockScales;
use formats::{Encoding, WordLayout};
use ndarray::Array2;

use super::Memory;
use crate::Result;

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

/// What turns weights `[out, in]` into codes, and back.
pub trait Quantize: Memory {
    /// Codes `[rows, cols]` of a weight, a byte each.
    type Codes: Send + Sync;

    /// Rows of weights with one input that keep it busy in a sweep; fewer are better swept together.
    fn rows_at_once(&self) -> usize {
        1
    }
    /// Weights that one thread has it round at a time, where nothing else decides.
    fn weights_at_once(&self) -> usize {
        1 << 16
    }

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
}
