//! What a GGUF file says of a model, from what a checkpoint says: tensor names and order, types, metadata, tokenizer.
//!
//! Nothing here reads a weight or writes a file.

pub mod metadata;
pub mod mixes;
pub mod names;
mod pretokenizer;
pub(crate) mod probe;
pub(crate) mod same;
pub mod tokenizer;
