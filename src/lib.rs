//! quantc: a post-training quantization compiler for large language models.
//!
//! The pipeline is [`job`]: open a [`Checkpoint`], build its [`graph`], [`plan`] every tensor, [`compile`] block by
//! block, reopen what was written and [`verify`] it against the original.

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod cli;
pub mod compile;
pub mod convert;
pub mod demo;
pub mod devices;
pub mod dialect;
pub mod error;
mod evidence;
pub mod families;
pub mod forward;
pub mod gguf;
pub mod graph;

mod importance;
pub mod inspect;
pub mod job;
mod json;
pub mod memory;
pub mod merge;
pub mod mixes;
pub mod output;
pub mod plan;
mod probe;
pub mod progress;
pub mod recipe;
pub mod report;
mod rest;
pub mod runtimes;
pub mod stray;
pub mod supervisor;
pub mod text;
pub mod tokenizer;
pub mod verify;
pub mod weights;
pub mod words;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
