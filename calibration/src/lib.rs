//! Samples, statistics, transforms and solvers. No file IO, no model families, no device code.

#![cfg_attr(not(test), forbid(unsafe_code))]
// The slices of ndarray allow what they need themselves, which a test that uses them may not forbid.
#![cfg_attr(test, deny(unsafe_code))]

pub mod samples;
pub mod solvers;
pub mod statistics;
pub mod transforms;
