//! What quantc asks of a device: few, whole operations, in one trait for each purpose.

mod forward;
mod measure;
mod memory;
mod quantize;

pub use self::forward::{
    Activation, ActivationRounding, AttentionShape, DeltaShape, Entries, Forward, HyperParameters, HyperShape,
    IndexShape, NormKind, RopeLayout,
};
pub use self::measure::{Measure, TokenComparison, TokenLoss};
pub use self::memory::Memory;
pub use self::quantize::{Factor, FitKind, Grid, GridSpec, Packing, Quantize, Swept};

/// A device that can do everything: what a whole run asks for.
///
/// Results do not depend on the number of threads.
pub trait Backend: Forward + Quantize + Measure {}

impl<D: Forward + Quantize + Measure> Backend for D {}
