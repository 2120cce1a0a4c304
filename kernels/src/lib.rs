//! Number crunching on a device, behind one small trait for each purpose; every operation beside its scalar reference.
//!
//! An operation is one file under [`ops`]: it states the shapes, holds the plain-loop reference and the fast CPU form.
//! [`Backend`], which is all of these, is what the rest of the program sees. No file, no model name and no policy belongs here.

pub mod backend;
mod checks;
pub mod cpu;
pub mod cuda;
mod error;
pub mod ops;
pub mod simd;

pub use backend::{
    Activation, ActivationRounding, AttentionShape, Backend, DeltaShape, Entries, Factor, FitKind, Forward, Grid,
    GridSpec, HyperParameters, HyperShape, IndexShape, Measure, Memory, NormKind, Packing, Quantize, RopeLayout, Swept,
    TokenComparison, TokenLoss,
};
pub use cpu::Cpu;
pub use cuda::Cuda;
pub use error::Error;
pub use ops::apart::global_scale;
pub use ops::lattice::{Recovered, recover};

/// What a device operation returns.
pub type Result<T> = std::result::Result<T, Error>;
