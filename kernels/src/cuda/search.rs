//! Scales and codes of integer grids.

use super::{Cuda, Matrix, Module};
use crate::backend::{FitKind, Grid, GridSpec};
use crate::{Error, Result};

pub(super) static SEARCH: Module = Module { name: "search", source: include_str!("../ops/fit.cu") };

impl Cuda {
    pub(super) fn fitted(&self, weight: &Matrix, spec: &GridSpec, kind: FitKind<'_, Matrix>) -> Result<Grid> {
        let _ = (weight, spec, kind);
        Err(Error::Device("not written".to_owned()))
    }

    pub(super) fn rounded_codes(&self, weight: &Matrix, grid: &Grid) -> Result<Vec<u8>> {
        let _ = (weight, grid);
        Err(Error::Device("not written".to_owned()))
    }

    /// `W − Ŵ diag(t)⁻¹` for the min-max rounding `Ŵ` of `W diag(t)`.
    pub(super) fn scaled_rounding_error(&self, weight: &Matrix, t: &[f32], spec: &GridSpec) -> Result<Matrix> {
        let _ = (weight, t, spec);
        Err(Error::Device("not written".to_owned()))
    }
}
