//! Which reals a code stands for, how codes lie in bytes, how files hold tensors.
//!
//! Nothing here chooses scales, knows a model family or starts a thread.

pub mod grid;
pub mod weight;

pub use grid::{ScalePrecision, Scheme};
pub use weight::QuantizedWeight;
