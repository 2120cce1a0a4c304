//! Losses of tokens.

use super::{Cuda, Matrix, Module, expect};
use crate::Result;
use crate::backend::{Measure, TokenComparison, TokenLoss};

pub(super) static LOSS: Module = Module { name: "loss", source: include_str!("../ops/loss.cu") };

/// Threads of a row.
const ROW: u32 = 256;

impl Measure for Cuda {
    fn token_loss(&self, logits: &Matrix, targets: &[u32]) -> Result<TokenLoss> {
        expect("token_loss", "targets", logits.rows, targets.len())?;
        let (nll, argmax) = (self.buffer::<f64>(logits.rows)?, self.buffer::<u32>(logits.rows)?);
        let wanted = self.send(targets)?;
        let pins = (logits.buffer.pin_to_read()?, wanted.pin()?, nll.pin()?, argmax.pin()?);
        let args = [pins.0.arg(), pins.1.arg(), pins.2.arg(), pins.3.arg(), (logits.cols as i32).into()];
        self.blocks(&LOSS, "token_loss", logits.rows, ROW, 0, &args)?;
        drop(pins);
        Ok(TokenLoss { nll: self.fetch(&nll, logits.rows)?, argmax: self.fetch(&argmax, logits.rows)? })
    }

    fn compare(&self, reference: &Matrix, model: &Matrix, targets: &[u32]) -> Result<TokenComparison> {
        expect("compare", "targets", model.rows, targets.len())?;
        expect("compare", "rows", reference.rows, model.rows)?;
        expect("compare", "logits", reference.cols, model.cols)?;
        let kld = self.buffer::<f64>(model.rows)?;
        let pins = (reference.buffer.pin_to_read()?, model.buffer.pin_to_read()?, kld.pin()?);
        let args = [pins.0.arg(), pins.1.arg(), pins.2.arg(), (model.cols as i32).into()];
        self.blocks(&LOSS, "divergence", model.rows, ROW, 0, &args)?;
        drop(pins);
        Ok(TokenComparison {
            reference: self.token_loss(reference, targets)?,
            model: self.token_loss(model, targets)?,
            kld: self.fetch(&kld, model.rows)?,
        })
    }
}
