//! quantc: a post-training quantization compiler for large language models.
//!
//! The pipeline is [`job`]: open a [`Checkpoint`], build its [`graph`], decide what every [`targets`] makes of it,
//! walk through it ([`pipeline`]), reopen what was written and [`verify`] it against the original.

#![forbid(unsafe_code)]

pub mod build;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod compare;
pub mod convert;
mod cost;
pub mod demo;
pub mod devices;
pub mod dialect;
pub mod diff;
pub mod error;
pub mod eval;
mod evidence;
pub mod families;
pub mod forward;
pub mod graph;
pub mod hub;

mod importance;
pub mod inspect;
pub mod job;
mod json;
pub mod memory;
pub mod merge;
pub mod mixes;
pub mod output;
pub mod pipeline;
pub mod plan;
mod probe;
pub mod program;
pub mod progress;
pub mod recipe;
pub mod report;
mod rest;
pub mod runtimes;
pub mod serving;
pub mod stray;
pub mod supervisor;
pub mod targets;
pub mod text;
pub mod tokenizer;
pub mod verify;
pub mod weights;
pub mod words;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
