//! Second moments, and their factorization.

use super::{Cuda, Matrix, Module, Operands};
use crate::backend::Factor;
use crate::{Error, Result};

pub(super) static GRAM: Module = Module { name: "gram", source: include_str!("../ops/gram.cu") };
pub(super) static FACTOR: Module = Module { name: "factor", source: include_str!("../ops/factor.cu") };

impl Cuda {
    pub(super) fn accumulate(&self, x: &Operands, gram: &mut Matrix) -> Result<()> {
        let _ = (x, gram);
        Err(Error::Device("not written".to_owned()))
    }

    pub(super) fn moments(&self, x: &Operands, magnitude: &mut [f64], energy: &mut [f64]) -> Result<()> {
        let _ = (x, magnitude, energy);
        Err(Error::Device("not written".to_owned()))
    }

    pub(super) fn diagonal_of(&self, matrix: &Matrix) -> Result<Vec<f32>> {
        let _ = matrix;
        Err(Error::Device("not written".to_owned()))
    }

    pub(super) fn trace(&self, e: &Matrix, gram: &Matrix) -> Result<f64> {
        let _ = (e, gram);
        Err(Error::Device("not written".to_owned()))
    }

    pub(super) fn weighted_energy(&self, e: &Matrix, weights: &[f64]) -> Result<f64> {
        let _ = (e, weights);
        Err(Error::Device("not written".to_owned()))
    }

    pub(super) fn factored(&self, gram: &Matrix, order: Vec<u32>, damp: f64) -> Result<Factor<Matrix>> {
        let _ = (gram, order, damp);
        Err(Error::Device("not written".to_owned()))
    }
}
