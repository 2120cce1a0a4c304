//! Samples, statistics, transforms and solvers. No file IO, no model families, no device code.

#![forbid(unsafe_code)]

pub mod samples;
pub mod solvers;
pub mod statistics;
pub mod transforms;
