//! The sweep over columns, and the refinement after it.

use super::{Cuda, Matrix, Module};
use crate::backend::{BlockGrid, Factor, Grid, Swept};
use crate::{Error, Result};

pub(super) static SWEEP: Module = Module { name: "sweep", source: include_str!("../ops/sweep.cu") };
pub(super) static REFINE: Module = Module { name: "refine", source: include_str!("../ops/refine.cu") };

impl Cuda {
    pub(super) fn swept(&self, target: &Matrix, factor: &Factor<Matrix>, grid: &Grid) -> Result<Swept> {
        let _ = (target, factor, grid);
        Err(Error::Device("not written".to_owned()))
    }

    pub(super) fn swept_blocks(&self, target: &Matrix, factor: &Factor<Matrix>, grid: &BlockGrid) -> Result<Swept> {
        let _ = (target, factor, grid);
        Err(Error::Device("not written".to_owned()))
    }

    pub(super) fn refined_blocks(
        &self,
        target: &Matrix,
        gram: &Matrix,
        damp: f64,
        grid: &mut BlockGrid,
        codes: &mut [u8],
    ) -> Result<f64> {
        let _ = (target, gram, damp, grid, codes);
        Err(Error::Device("not written".to_owned()))
    }
}
