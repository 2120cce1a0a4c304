//! quantc: a post-training quantization compiler for large language models.

pub mod checkpoint;
pub mod error;
mod import;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
