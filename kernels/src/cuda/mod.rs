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
mod hyper;
mod images;
mod losses;
mod matrices;
mod memory;
mod pack;
mod profile;
mod quantize;
mod recurrent;
mod refine;
mod search;
mod simulated;
mod sparse;
mod streams;
mod sweep;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use self::card::{Card, Found, cards};
pub use self::compile::{Compiled, MODULES, compile, compiler_is_there, missing};
pub use self::device::{Address, Arg, Aside, Capacity, Device, Module, Operand, Product, Real, Shape, Ticket};
pub use self::memory::{Buffer, Usage};
use self::memory::{Pinned, Pool};
pub use self::profile::Profile;
pub use self::simulated::Simulated;
use crate::checks::{expect, expect_grid, expect_multiple, expect_refined, expect_spec, expect_type};
use crate::{Error, Result};

/// What all kernels share, before each module's own source.
pub(crate) const COMMON: &str = include_str!("common.cuh");

/// Threads of a block where nothing else is asked for.
const THREADS: u32 = 256;

/// One GPU.
#[derive(Clone, Debug)]
pub struct Cuda {
    memory: Arc<Pool>,
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
        Ok(Cuda { memory: Arc::new(Pool::new(device, budget)), size, host: 0, exact: false, relaxed: false })
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

/// A pointer to a buffer, or a null one.
fn at(pinned: Option<&Pinned<'_>>) -> Arg {
    Arg::At(pinned.map_or(0, |p| p.at))
}

impl Pinned<'_> {
    fn arg(&self) -> Arg {
        Arg::At(self.at)
    }
}
