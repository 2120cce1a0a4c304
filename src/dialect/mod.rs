//! The dialect of GGUF, both ways: a file as a Hugging Face checkpoint, and what a file says of a checkpoint.
//!
//! | what | read | written |
//! |---|---|---|
//! | architectures and the families that are written as them | `architectures` | the same |
//! | names and rows of tensors | `model`, with `fused` | `names` |
//! | settings | `settings`, with `rope` | `metadata`, with `same` |
//! | tokenizer | `tokenizer::rebuilt` | `tokenizer`, with `tokenizer::pretokenizer` |
//! | what makes tokens of images, in a file of its own | | `projector` |
//! | what a model's name brings about | `called` | the same |
//! | what mlx-lm takes from a config.json | `mlx`, with `same` | |
//!
//! Reading goes by what writing would have given: `model` looks for the tensors that `names::plan` lists. Nothing here writes a file.

pub(crate) mod architectures;
pub(crate) mod called;
mod fused;
pub mod metadata;
pub(crate) mod mlx;
pub(crate) mod model;
pub mod names;
pub mod projector;
mod rope;
pub(crate) mod same;
pub mod sampling;
pub(crate) mod settings;
pub mod tokenizer;

#[cfg(test)]
mod tests;
