//! What the CUDA backend asks of a device: memory, launches, matrix products. A card answers, or a stand-in that runs the
//! kernels' own source on the CPU.

use std::fmt::Debug;

use crate::Result;

/// A place in the device's memory, in bytes.
pub type Address = u64;

/// Kernels that are compiled together.
#[derive(Debug)]
pub struct Module {
    /// Of its file, without the ending.
    pub name: &'static str,
    /// CUDA C++, without what all share.
    pub source: &'static str,
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A pointer.
    At(Address),
    /// `int`.
    Int(i32),
    /// `i64`.
    Long(i64),
    /// `float`.
    Float(f32),
    /// `double`.
    Double(f64),
}

impl Arg {
    /// Its bits, as launches take them: eight bytes, of which the kernel reads the first.
    pub fn word(self) -> u64 {
        match self {
            Arg::At(at) => at,
            Arg::Int(x) => u64::from(x.cast_unsigned()),
            Arg::Long(x) => x.cast_unsigned(),
            Arg::Float(x) => u64::from(x.to_bits()),
            Arg::Double(x) => x.to_bits(),
        }
    }
}

impl From<i32> for Arg {
    fn from(x: i32) -> Arg {
        Arg::Int(x)
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Arg {
        Arg::Float(x)
    }
}

impl From<f64> for Arg {
    fn from(x: f64) -> Arg {
        Arg::Double(x)
    }
}

impl From<i64> for Arg {
    fn from(x: i64) -> Arg {
        Arg::Long(x)
    }
}

impl From<bool> for Arg {
    fn from(x: bool) -> Arg {
        Arg::Int(x.into())
    }
}

/// A launch's shape.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block, whole warps.
    pub block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
}

/// The type of a product's operands; its sums and its result are `f32`, or `f64` for those.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Real {
    /// bfloat16.
    Bf16,
    /// Single precision, and nothing less.
    F32,
    /// Double precision.
    F64,
}

impl Real {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Real::Bf16 => 2,
            Real::F32 => 4,
            Real::F64 => 8,
        }
    }
}

/// A row-major operand.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Its first value.
    pub at: Address,
    /// Values from one row to the next.
    pub stride: usize,
    /// Read with rows and columns exchanged.
    pub transposed: bool,
}

/// `c ← alpha · a b + beta · c`, `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]` row-major and not transposed.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Of `a` and `b`.
    pub real: Real,
    /// `[m, n, k]`.
    pub shape: [usize; 3],
    /// The left operand.
    pub a: Operand,
    /// The right one.
    pub b: Operand,
    /// The result.
    pub c: Operand,
    /// Factor on the product.
    pub alpha: f64,
    /// Factor on what is there.
    pub beta: f64,
}

/// Memory of a device in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Not in use by anybody.
    pub free: u64,
    /// In all.
    pub total: u64,
}

/// Work is done in the order of the calls, but for what is written ahead; only `read` and `synchronize` wait for it.
///
/// # Safety
/// Callers name memory that they have allocated, and arguments that fit the kernel: nothing here can check it.
pub trait Device: Send + Sync + Debug {
    /// What users see.
    fn name(&self) -> String;
    /// Compute capability, as 90.
    fn capability(&self) -> u32;
    /// Streaming multiprocessors.
    fn multiprocessors(&self) -> u32;
    /// Its memory.
    fn capacity(&self) -> Result<Capacity>;
    /// Uninitialized memory; `None` when there is none left.
    fn allocate(&self, bytes: usize) -> Result<Option<Address>>;
    /// Gives memory back once the work that was asked for so far is done.
    fn release(&self, at: Address, bytes: usize);
    /// Copies to the device; `bytes` may be reused at once.
    fn write(&self, at: Address, bytes: &[u8]) -> Result<()>;
    /// Memory for [`write_ahead`](Self::write_ahead): what was asked for before need not be done for it to be written.
    fn allocate_ahead(&self, bytes: usize) -> Result<Option<Address>> {
        self.allocate(bytes)
    }
    /// Copies to the device beside all other work; `bytes` may be reused at once. Nothing may touch that memory, and it may not be
    /// given back, before [`wait_for`](Self::wait_for). After an error nothing writes it any more.
    fn write_ahead(&self, at: Address, bytes: &[u8]) -> Result<Ticket>;
    /// Has the work that is asked for from now on wait for a copy; the host does not.
    fn wait_for(&self, ticket: Ticket) -> Result<()>;
    /// Copies from the device.
    fn read(&self, at: Address, bytes: &mut [u8]) -> Result<()>;
    /// Copies within the device; the two do not overlap.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;
    /// Fills with zero bytes.
    fn clear(&self, at: Address, bytes: usize) -> Result<()>;
    /// Puts memory aside on the host, for [`bring_back`](Self::bring_back).
    fn put_aside(&self, at: Address, bytes: usize) -> Result<Aside>;
    /// Copies what was put aside to the device again; it stays on the host until it is forgotten.
    fn bring_back(&self, aside: &Aside, at: Address) -> Result<()>;
    /// Frees a place on the host without copying.
    fn forget(&self, aside: Aside);
    /// Starts a kernel.
    fn launch(&self, module: &'static Module, kernel: &'static str, shape: Shape, args: &[Arg]) -> Result<()>;
    /// Starts a product.
    fn product(&self, product: &Product) -> Result<()>;
    /// Bytes of workspace for [`cholesky`](Self::cholesky) of `n` columns at `at`; `None` where the device has no library for it.
    fn cholesky_room(&self, at: Address, n: usize) -> Result<Option<usize>>;
    /// The Cholesky factor of the lower triangle, as a row-major matrix sees it, of the `n × n` doubles at `at`, in place; the pivot
    /// that was not positive, if the library tells of one.
    fn cholesky(&self, at: Address, n: usize, work: Address) -> Result<Option<usize>>;
    /// A sum over memory that tells whether it was written, of a stand-in, which has done all that was asked for; 0 of a card.
    fn sum_of(&self, at: Address, bytes: usize) -> u64 {
        let _ = (at, bytes);
        0
    }
    /// Waits for everything but what is written ahead.
    fn synchronize(&self) -> Result<()>;
}

/// A copy that was asked for ahead, for the device that made it.
#[derive(Debug)]
#[must_use = "the memory may only be used, and given back, once it was waited for"]
pub struct Ticket(pub u64);

/// Bytes on the host that a device has put aside.
#[derive(Debug)]
pub struct Aside {
    /// Where, for the device that made it.
    pub at: u64,
    /// How many.
    pub bytes: usize,
}
