//! A post-training quantization compiler for large language models.
//!
//! What stands here at the root, and in [`results`], is the library: requests as plain data, functions that meet them, and results that
//! serialize to the JSON that the program prints. The modules behind it, which this documentation leaves out, change with every version.
//!
#![doc = include_str!("../docs/library.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[cfg_attr(doc, doc(hidden))]
pub mod api;
#[cfg_attr(doc, doc(hidden))]
pub mod build;
#[cfg_attr(doc, doc(hidden))]
pub mod check;
#[cfg_attr(doc, doc(hidden))]
pub mod checkpoint;
#[cfg_attr(doc, doc(hidden))]
pub mod cli;
#[cfg_attr(doc, doc(hidden))]
pub mod compare;
#[cfg_attr(doc, doc(hidden))]
pub mod convert;
mod cost;
#[cfg_attr(doc, doc(hidden))]
pub mod demo;
#[cfg_attr(doc, doc(hidden))]
pub mod devices;
#[cfg_attr(doc, doc(hidden))]
pub mod dialect;
#[cfg_attr(doc, doc(hidden))]
pub mod diff;
#[cfg_attr(doc, doc(hidden))]
pub mod error;
#[cfg_attr(doc, doc(hidden))]
pub mod eval;
mod evidence;
#[cfg_attr(doc, doc(hidden))]
pub mod families;
#[cfg_attr(doc, doc(hidden))]
pub mod forward;
#[cfg_attr(doc, doc(hidden))]
pub mod graph;
#[cfg_attr(doc, doc(hidden))]
pub mod hub;
mod importance;
#[cfg_attr(doc, doc(hidden))]
pub mod inspect;
#[cfg_attr(doc, doc(hidden))]
pub mod job;
mod json;
#[cfg_attr(doc, doc(hidden))]
pub mod memory;
#[cfg_attr(doc, doc(hidden))]
pub mod merge;
#[cfg_attr(doc, doc(hidden))]
pub mod mixes;
#[cfg_attr(doc, doc(hidden))]
pub mod output;
#[cfg_attr(doc, doc(hidden))]
pub mod pipeline;
#[cfg_attr(doc, doc(hidden))]
pub mod plan;
mod probe;
#[cfg_attr(doc, doc(hidden))]
pub mod program;
#[cfg_attr(doc, doc(hidden))]
pub mod progress;
#[cfg_attr(doc, doc(hidden))]
pub mod recipe;
#[cfg_attr(doc, doc(hidden))]
pub mod report;
mod rest;
#[cfg_attr(doc, doc(hidden))]
pub mod runtimes;
#[cfg_attr(doc, doc(hidden))]
pub mod serving;
#[cfg_attr(doc, doc(hidden))]
pub mod stray;
#[cfg_attr(doc, doc(hidden))]
pub mod supervisor;
#[cfg_attr(doc, doc(hidden))]
pub mod targets;
#[cfg_attr(doc, doc(hidden))]
pub mod text;
#[cfg_attr(doc, doc(hidden))]
pub mod tokenizer;
#[cfg_attr(doc, doc(hidden))]
pub mod verify;
#[cfg_attr(doc, doc(hidden))]
pub mod weights;
#[cfg_attr(doc, doc(hidden))]
pub mod words;

pub use api::{Compare, Compute, Device, Evaluate, Job, Located, Math, Serve, check, demo_model, diff, inspect};
pub use check::Checked;
#[cfg_attr(doc, doc(hidden))]
pub use checkpoint::Checkpoint;
pub use compare::Compared;
pub use diff::Diff;
pub use error::{Error, Result};
pub use eval::Evaluated;
pub use inspect::Inspection;
pub use job::Planned;
pub use progress::{Cancel, Progress, Update};
pub use recipe::{Override, Request};
pub use report::Report;
pub use report::gates::Bounds;

/// What results are made of.
pub mod results {
    pub use crate::check::CheckedFile;
    pub use crate::compare::{
        AskedQuestion, Domain, Figures, Files, Histogram, LinearError, Measurement, Origin, Passage, Row, ShownFlip,
        Stored, Tasks,
    };
    pub use crate::diff::{Differing, DifferingFile, HeldAs};
    pub use crate::eval::{Entry, Size};
    pub use crate::inspect::{TensorInfo, TypeShare};
    pub use crate::job::{
        PlannedFile, PlannedFold, PlannedLinear, PlannedOutput, PlannedPart, PlannedSeconds, Serving, Takes,
    };
    pub use crate::report::{
        Activations, AdapterReport, Beside, BitsPerWeight, Drafts, Embeddings, Fate, FileReport, HiddenStates, Limits,
        LinearReport, Measured, Protocol, Quality, Recovery, Scored, Scores, Seconds, SmoothingReport, Stages,
        TensorReport, Verdict,
    };
    pub use crate::serving::{Finding, Fit, Splits};
}
