//! Measuring a model by its logits.

use ndarray::Array2;

use super::Cpu;
use crate::Result;
use crate::backend::{Measure, TokenComparison, TokenLoss};
use crate::checks::expect;
use crate::ops::loss;

impl Measure for Cpu {
    fn token_loss(&self, logits: &Array2<f32>, targets: &[u32]) -> Result<TokenLoss> {
        expect("token_loss", "targets", logits.nrows(), targets.len())?;
        Ok(loss::run(logits.view(), targets))
    }

    fn compare(&self, reference: &Array2<f32>, model: &Array2<f32>, targets: &[u32]) -> Result<TokenComparison> {
        expect("compare", "targets", model.nrows(), targets.len())?;
        expect("compare", "logits", reference.len(), model.len())?;
        Ok(loss::compare(reference.view(), model.view(), targets))
    }
}
