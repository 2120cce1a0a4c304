//! NVIDIA GPUs: the same operations as kernels in CUDA C++, which lie beside their CPU twins in `ops/`.
//!
//! What a kernel does is proven on the CPU by [`Simulated`], from the kernel's own source; a [`Card`] compiles it for the GPU at
//! hand. Both are a [`Device`], and everything else here is the same for both.

mod attention;
mod blocks;
mod card;
mod compile;
mod device;
mod factor;
mod forward;
mod images;
mod losses;
mod memory;
mod pack;
mod profile;
mod refine;
mod search;
mod simulated;
mod sweep;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use formats::Dtype;
use ndarray::Array2;

pub use self::card::{Card, Found, cards};
pub use self::compile::{Compiled, MODULES, compile, compiler_is_there, missing};
pub use self::device::{Address, Arg, Aside, Capacity, Device, Module, Operand, Product, Real, Shape, Ticket};
use self::forward::Norm;
pub use self::memory::{Buffer, Usage};
use self::memory::{Memory, Pinned};
pub use self::profile::Profile;
pub use self::simulated::Simulated;
use crate::backend::{
    Activation, ActivationRounding, AttentionShape, Backend, Factor, FitKind, Grid, GridSpec, NormKind, Packing,
    RopeLayout, Swept, TokenComparison, TokenLoss,
};
use crate::checks::{expect, expect_grid, expect_multiple, expect_refined, expect_spec, expect_type};
use crate::{Error, Result};

/// What all kernels share, before each module's own source.
pub(crate) const COMMON: &str = include_str!("common.cuh");

/// Threads of a block where nothing else is asked for.
const THREADS: u32 = 256;

/// One GPU.
#[derive(Clone, Debug)]
pub struct Cuda {
    memory: Arc<Memory>,
    /// Gibibytes that the device has in all.
    size: u64,
    /// Bytes of the host's memory that activations may be put aside in.
    host: u64,
    exact: bool,
    relaxed: bool,
}

/// Single precision, row-major, on the device.
#[derive(Debug)]
pub struct Matrix {
    buffer: Buffer,
    rows: usize,
    cols: usize,
}

/// bfloat16, row-major, on the device.
#[derive(Debug)]
pub struct Rounded {
    buffer: Buffer,
    rows: usize,
    cols: usize,
}

/// A matrix as a file stores it, on the device or on its way there.
#[derive(Debug)]
pub struct Stored {
    buffer: Buffer,
    /// What the kernel that widens it calls its type.
    kind: i32,
    rows: usize,
    cols: usize,
}

/// Codes `[rows, cols]`, a byte each, on the device.
#[derive(Debug)]
pub struct Codes {
    buffer: Buffer,
    rows: usize,
    cols: usize,
}

/// An operand of products: as it is, or rounded to bfloat16.
#[derive(Debug)]
pub enum Operands {
    /// Single precision.
    Whole(Matrix),
    /// bfloat16.
    Rounded(Rounded),
}

impl Operands {
    fn shape(&self) -> [usize; 2] {
        match self {
            Operands::Whole(m) => [m.rows, m.cols],
            Operands::Rounded(m) => [m.rows, m.cols],
        }
    }

    fn real(&self) -> Real {
        match self {
            Operands::Whole(_) => Real::F32,
            Operands::Rounded(_) => Real::Bf16,
        }
    }

    /// Pinned to be read: no operation writes to an operand.
    fn pin(&self) -> Result<Pinned<'_>> {
        match self {
            Operands::Whole(m) => m.buffer.pin_to_read(),
            Operands::Rounded(m) => m.buffer.pin_to_read(),
        }
    }
}

/// Numbers that are copied as their bytes.
///
/// # Safety
/// Every byte pattern is a value, and there is no padding.
unsafe trait Plain: Copy + Default {}

// SAFETY: as the trait demands.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for f64 {}
// SAFETY: as above.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}

fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), std::mem::size_of_val(values)) }
}

fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: plain numbers, of which every pattern is one.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), std::mem::size_of_val(values)) }
}

impl Cuda {
    /// On a device, with so much of its memory; by default most of what is free.
    ///
    /// Fails if the budget is more than the device has.
    pub fn new(device: Arc<dyn Device>, budget: Option<u64>) -> Result<Cuda> {
        let capacity = device.capacity()?;
        let budget = match budget {
            Some(bytes) if bytes > capacity.total => {
                return Err(Error::Device(format!(
                    "{}: {:.1} GB of memory were asked for, it has {:.1}",
                    device.name(),
                    bytes as f64 / 1e9,
                    capacity.total as f64 / 1e9
                )));
            }
            Some(bytes) => bytes,
            // Libraries take workspace of their own.
            None => capacity.free.saturating_sub(512 << 20) / 20 * 19,
        };
        let size = capacity.total >> 30;
        Ok(Cuda { memory: Arc::new(Memory::new(device, budget)), size, host: 0, exact: false, relaxed: false })
    }

    /// The same, which may put so many bytes of activations aside in the host's memory that are used twice, rather than compute them
    /// twice. What is computed is the same.
    pub fn with_host(self, bytes: u64) -> Cuda {
        Cuda { host: bytes, ..self }
    }

    /// The same, in single precision throughout.
    pub fn exact(self) -> Cuda {
        Cuda { exact: true, relaxed: false, ..self }
    }

    /// Bytes of device memory it may use.
    pub fn budget(&self) -> u64 {
        self.memory.budget()
    }

    /// Waits until all work is done.
    pub fn synchronize(&self) -> Result<()> {
        self.device().synchronize()
    }

    /// What became of its memory so far.
    pub fn usage(&self) -> Usage {
        self.memory.usage()
    }

    fn device(&self) -> &dyn Device {
        &*self.memory.device
    }

    fn rounds(&self) -> bool {
        self.relaxed && self.device().capability() >= 80
    }

    fn buffer<T: Plain>(&self, count: usize) -> Result<Buffer> {
        Buffer::new(&self.memory, count * size_of::<T>())
    }

    fn send<T: Plain>(&self, values: &[T]) -> Result<Buffer> {
        let buffer = self.buffer::<T>(values.len())?;
        self.device().write(buffer.pin()?.at, bytes_of(values))?;
        Ok(buffer)
    }

    fn fetch<T: Plain>(&self, buffer: &Buffer, count: usize) -> Result<Vec<T>> {
        let mut values = vec![T::default(); count];
        if count > 0 {
            self.device().read(buffer.pin_to_read()?.at, bytes_of_mut(&mut values))?;
        }
        Ok(values)
    }

    /// Codes of the host.
    pub fn send_codes(&self, host: &Array2<u8>) -> Result<Codes> {
        let (rows, cols) = host.dim();
        let host = host.as_standard_layout();
        Ok(Codes { buffer: self.send(host.as_slice().expect("standard layout"))?, rows, cols })
    }

    fn matrix(&self, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix { buffer: self.buffer::<f32>(rows * cols)?, rows, cols })
    }

    fn cleared<T: Plain>(&self, count: usize) -> Result<Buffer> {
        let buffer = self.buffer::<T>(count)?;
        self.device().clear(buffer.pin()?.at, count * size_of::<T>())?;
        Ok(buffer)
    }

    /// Starts a kernel on a grid of one dimension whose threads take `count` values in strides.
    fn each(&self, module: &'static Module, kernel: &'static str, count: usize, args: &[Arg]) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let most = self.device().multiprocessors() as usize * 32;
        let grid = [count.div_ceil(THREADS as usize).min(most) as u32, 1, 1];
        self.device().launch(module, kernel, Shape { grid, block: THREADS, shared: 0 }, args)
    }

    /// Starts a kernel with a block for each of `count` things.
    fn blocks(
        &self,
        module: &'static Module,
        kernel: &'static str,
        count: usize,
        block: u32,
        shared: usize,
        args: &[Arg],
    ) -> Result<()> {
        self.grid(module, kernel, [count, 1, 1], block, shared, args)
    }

    /// Starts a kernel on a grid; an empty one is no work.
    fn grid(
        &self,
        module: &'static Module,
        kernel: &'static str,
        grid: [usize; 3],
        block: u32,
        shared: usize,
        args: &[Arg],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let shape = Shape { grid: grid.map(|g| g as u32), block, shared: shared as u32 };
        self.device().launch(module, kernel, shape, args)
    }
}

/// How the kernel that widens a stored matrix calls its type; `None` for one that it does not know.
fn stored_kind(bytes: &[u8], dtype: Dtype, [rows, cols]: [usize; 2]) -> Result<Option<i32>> {
    let (kind, size) = match dtype {
        Dtype::F16 => (0, 2),
        Dtype::BF16 => (1, 2),
        Dtype::F32 => (2, 4),
        _ => return Ok(None),
    };
    expect("upload_stored", "bytes", rows * cols * size, bytes.len())?;
    Ok(Some(kind))
}

/// A pointer to a buffer, or a null one.
fn at(pinned: Option<&Pinned<'_>>) -> Arg {
    Arg::At(pinned.map_or(0, |p| p.at))
}

impl Pinned<'_> {
    fn arg(&self) -> Arg {
        Arg::At(self.at)
    }
}

impl Backend for Cuda {
    type Matrix = Matrix;
    type Input = Operands;
    type Weight = Operands;
    type Stored = Stored;
    type Codes = Codes;

    fn name(&self) -> String {
        let calibration =
            if !self.exact && self.device().capability() >= 80 { ", calibration in bfloat16" } else { "" };
        format!("{}{calibration}", self.device().name())
    }

    fn relaxed(&self) -> Cuda {
        Cuda { relaxed: !self.exact, ..self.clone() }
    }

    fn room(&self) -> Option<u64> {
        Some(self.budget())
    }

    fn tokens_at_once(&self) -> usize {
        // Larger products are nearer to the card's peak; what lies between operators has to fit several times. Libraries add up
        // products of other shapes in another order: what others have of the card's memory, or the user gives, must not decide.
        match self.size {
            32.. => 8192,
            12.. => 4096,
            _ => 2048,
        }
    }

    fn rows_at_once(&self) -> usize {
        // What a sweep works in takes some times the memory of its weights. As above it is the card that decides.
        if self.size >= 4 { sweep::CHUNK } else { 1 }
    }

    fn weights_at_once(&self) -> usize {
        // Launches and copies of less take longer than their work; several threads ask at once.
        ((self.budget() >> 12) as usize).clamp(1 << 16, 1 << 22)
    }

    fn kept_values(&self) -> usize {
        let on_host = self.host / self.bytes_of_input() as u64;
        (self.budget() / 8).max(on_host) as usize
    }

    fn bytes_of_input(&self) -> usize {
        if self.rounds() { 2 } else { 4 }
    }

    fn notes(&self) -> Vec<String> {
        let usage = self.usage();
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let mut notes = Vec::new();
        if usage.moved > 0 {
            notes.push(format!(
                "{:.1} GB were put aside in the host's memory, and {:.1} GB brought back, as {:.1} GB of the GPU's did not hold everything",
                gigabytes(usage.moved),
                gigabytes(usage.returned),
                gigabytes(self.budget())
            ));
        }
        if usage.short {
            notes.push("the GPU had less memory free than at the start, so more was put aside than planned".to_owned());
        }
        notes
    }

    fn upload_stored(&self, bytes: &[u8], dtype: Dtype, [rows, cols]: [usize; 2]) -> Result<Option<Matrix>> {
        let Some(kind) = stored_kind(bytes, dtype, [rows, cols])? else { return Ok(None) };
        self.widen(Stored { buffer: self.send(bytes)?, kind, rows, cols }).map(Some)
    }

    fn sends_ahead(&self) -> Option<u64> {
        // What is at work needs several times what its weights take.
        Some(self.budget() / 4)
    }

    fn send_ahead(&self, bytes: &[u8], dtype: Dtype, [rows, cols]: [usize; 2]) -> Result<Option<Stored>> {
        let Some(kind) = stored_kind(bytes, dtype, [rows, cols])? else { return Ok(None) };
        Ok(Buffer::ahead(&self.memory, bytes)?.map(|buffer| Stored { buffer, kind, rows, cols }))
    }

    fn widen(&self, Stored { buffer, kind, rows, cols }: Stored) -> Result<Matrix> {
        let out = self.matrix(rows, cols)?;
        let count = rows * cols;
        let (to, from) = (out.buffer.pin()?, buffer.pin_to_read()?);
        let args = [to.arg(), from.arg(), kind.into(), (count as i64).into()];
        self.each(&forward::POINTWISE, "widen", count, &args)?;
        drop(to);
        Ok(out)
    }

    fn upload(&self, host: Array2<f32>) -> Result<Matrix> {
        let (rows, cols) = host.dim();
        let host = host.as_standard_layout();
        Ok(Matrix { buffer: self.send(host.as_slice().expect("standard layout"))?, rows, cols })
    }

    fn download(&self, matrix: &Matrix) -> Result<Array2<f32>> {
        let values = self.fetch(&matrix.buffer, matrix.rows * matrix.cols)?;
        Ok(Array2::from_shape_vec((matrix.rows, matrix.cols), values).expect("as long as its shape says"))
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix { buffer: self.cleared::<f32>(rows * cols)?, rows, cols })
    }

    fn shape(&self, matrix: &Matrix) -> [usize; 2] {
        [matrix.rows, matrix.cols]
    }

    fn copy(&self, matrix: &Matrix) -> Result<Matrix> {
        let other = self.matrix(matrix.rows, matrix.cols)?;
        self.device().copy(matrix.buffer.pin_to_read()?.at, other.buffer.pin()?.at, 4 * matrix.rows * matrix.cols)?;
        Ok(other)
    }

    fn select_rows(&self, matrix: &Matrix, rows: &[usize]) -> Result<Matrix> {
        self.gather_rows(matrix, rows)
    }

    fn scale(&self, matrix: &mut Matrix, rows: &[f32], cols: &[f32]) -> Result<()> {
        self.scale_sides(matrix, rows, cols)
    }

    fn is_finite(&self, matrix: &Matrix) -> Result<bool> {
        self.all_finite(matrix)
    }

    fn input(&self, x: Matrix) -> Result<Operands> {
        if self.rounds() { self.narrowed(&x) } else { Ok(Operands::Whole(x)) }
    }

    fn input_shape(&self, x: &Operands) -> [usize; 2] {
        x.shape()
    }

    fn round_values(&self, x: &mut Matrix, kind: ActivationRounding) -> Result<()> {
        self.rounded_values(x, kind)
    }

    fn round_activations(&self, x: &Operands, kind: ActivationRounding) -> Result<Operands> {
        self.rounded_activations(x, kind)
    }

    fn weight(&self, matrix: Matrix) -> Result<Operands> {
        self.input(matrix)
    }

    fn linear(&self, x: &Operands, weight: &Operands, bias: Option<&[f32]>) -> Result<Matrix> {
        let mut y = self.matrix(x.shape()[0], weight.shape()[0])?;
        self.multiply("linear", x, weight, bias, &mut y, 0.0)?;
        Ok(y)
    }

    fn add_linear(&self, x: &Operands, weight: &Operands, bias: Option<&[f32]>, y: &mut Matrix) -> Result<()> {
        self.multiply("add_linear", x, weight, bias, y, 1.0)
    }

    fn gated(
        &self,
        x: &Operands,
        weights: [&Operands; 2],
        biases: [Option<&[f32]>; 2],
        activation: Activation,
    ) -> Result<Operands> {
        self.gated_product(x, weights, biases, activation)
    }

    fn activated(
        &self,
        x: &Operands,
        weight: &Operands,
        bias: Option<&[f32]>,
        activation: Activation,
    ) -> Result<Operands> {
        self.activated_product(x, weight, bias, activation)
    }

    fn rms_norm(&self, x: &Matrix, weight: &[f32], eps: f32) -> Result<Matrix> {
        self.normed(x, &Norm::of_rows("rms_norm", x, NormKind::Rms, weight, None, eps)?)
    }

    fn norm_input(
        &self,
        x: &Matrix,
        kind: NormKind,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<Operands> {
        self.normed_input(x, &Norm::of_rows("norm_input", x, kind, weight, bias, eps)?)
    }

    fn layer_norm(&self, x: &Matrix, weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Result<Matrix> {
        self.normed(x, &Norm::of_rows("layer_norm", x, NormKind::Layer, weight, bias, eps)?)
    }

    fn norm_heads(
        &self,
        x: &mut Matrix,
        head_dim: usize,
        kind: NormKind,
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<()> {
        self.norm_slices(x, head_dim, kind, weight, bias, eps)
    }

    fn rope(
        &self,
        x: &mut Matrix,
        cos: &Array2<f32>,
        sin: &Array2<f32>,
        layout: &RopeLayout,
        lengths: &[usize],
    ) -> Result<()> {
        self.rotate(x, cos, sin, layout, lengths)
    }

    fn attention(
        &self,
        q: &Matrix,
        k: &Matrix,
        v: &Matrix,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Operands> {
        self.attend(q, k, v, sinks, shape, lengths)
    }

    fn join_heads(&self, own: &Matrix, shared: &Matrix, heads: usize) -> Result<Matrix> {
        self.joined(own, shared, heads)
    }

    fn softcap(&self, x: &mut Matrix, cap: f32) -> Result<()> {
        self.capped(x, cap)
    }

    fn clamp(&self, x: &mut Matrix, limit: f32) -> Result<()> {
        self.clamped(x, limit)
    }

    fn add_scaled(&self, x: &Matrix, factor: f32, y: &mut Matrix) -> Result<()> {
        self.add_multiple(x, factor, y)
    }

    fn add_rows(&self, x: &Matrix, rows: &[usize], weights: &[f32], y: &mut Matrix) -> Result<()> {
        self.scatter_rows(x, rows, weights, y)
    }

    fn difference(&self, a: &Matrix, b: &Matrix) -> Result<Matrix> {
        self.subtracted(a, b)
    }

    fn add_gram(&self, x: &Operands, gram: &mut Matrix) -> Result<()> {
        self.accumulate(x, gram)
    }

    fn add_moments(&self, x: &Operands, magnitude: &mut [f64], energy: &mut [f64]) -> Result<()> {
        self.moments(x, magnitude, energy)
    }

    fn diagonal(&self, matrix: &Matrix) -> Result<Vec<f32>> {
        self.diagonal_of(matrix)
    }

    fn quadratic(&self, e: &Matrix, gram: &Matrix) -> Result<f64> {
        self.trace(e, gram)
    }

    fn weighted_square(&self, e: &Matrix, weights: &[f64]) -> Result<f64> {
        self.weighted_energy(e, weights)
    }

    fn scaled_rounding_loss(&self, weight: &Matrix, t: &[f32], spec: &GridSpec, gram: &Matrix) -> Result<f64> {
        let error = self.scaled_rounding_error(weight, t, spec)?;
        self.trace(&error, gram)
    }

    fn factor(&self, gram: &Matrix, order: Vec<u32>, damp: f64) -> Result<Factor<Matrix>> {
        self.factored(gram, order, damp)
    }

    fn fit(&self, weight: &Matrix, spec: &GridSpec, kind: FitKind<'_, Matrix>) -> Result<Grid> {
        expect_spec("fit", weight.cols, spec)?;
        match &kind {
            FitKind::Weighted(h) => expect("fit", "importances", weight.cols, h.len())?,
            FitKind::BlockHessian(h) => expect("fit", "features", weight.cols, h.cols)?,
            FitKind::MinMax => {}
        }
        let ty = spec.encoding.ggml_type();
        if spec.encoding.is_integers() {
            return self.fitted(weight, spec, kind);
        }
        let blocks = |importance: Option<&[f32]>| match ty {
            Some(ty) => self.fitted_blocks(weight, ty, importance),
            None => self.fitted_apart(weight, spec, importance),
        };
        match kind {
            FitKind::MinMax => blocks(None),
            FitKind::Weighted(h) => blocks(Some(h)),
            FitKind::BlockHessian(h) => blocks(Some(&self.diagonal_of(h)?)),
        }
    }

    fn round(&self, weight: &Matrix, grid: &Grid) -> Result<Codes> {
        expect_grid("round", [weight.rows, weight.cols], grid)?;
        match grid.spec.encoding.is_integers() {
            true => self.rounded_codes(weight, grid),
            false => self.rounded_blocks(weight, grid),
        }
    }

    fn sweep(&self, targets: &[(&Matrix, &Grid)], factor: &Factor<Matrix>) -> Result<Vec<Swept<Codes>>> {
        self.swept(targets, factor)
    }

    fn refine(&self, target: &Matrix, gram: &Matrix, damp: f64, grid: &mut Grid, codes: &mut Codes) -> Result<f64> {
        self.refined(target, gram, damp, grid, codes)
    }

    fn dequantize(&self, codes: &Codes, grid: &Grid) -> Result<Matrix> {
        expect_grid("dequantize", [codes.rows, codes.cols], grid)?;
        match grid.spec.encoding.is_integers() {
            true => self.dequantized(codes, grid),
            false => self.dequantized_blocks(codes, grid),
        }
    }

    fn pack(&self, codes: &Codes, packing: Packing<'_>) -> Result<Vec<u8>> {
        match packing {
            Packing::Words { bits, layout } => self.packed_words(codes, bits, layout),
            Packing::Blocks(grid) => self.packed_blocks(codes, grid),
        }
    }

    fn download_codes(&self, codes: &Codes) -> Result<Array2<u8>> {
        let values = self.fetch(&codes.buffer, codes.rows * codes.cols)?;
        Ok(Array2::from_shape_vec((codes.rows, codes.cols), values).expect("as long as its shape says"))
    }

    fn token_loss(&self, logits: &Matrix, targets: &[u32]) -> Result<TokenLoss> {
        self.token_losses(logits, targets)
    }

    fn compare(&self, reference: &Matrix, model: &Matrix, targets: &[u32]) -> Result<TokenComparison> {
        self.compared(reference, model, targets)
    }
}
