//! Measuring a model by its logits.

use super::Memory;
use crate::Result;

/// Negative log-likelihood of each scored token, and what the model would have said.
#[derive(Clone, Debug, Default)]
pub struct TokenLoss {
    /// `−ln p(target)` in nats.
    pub nll: Vec<f64>,
    /// Index of the largest logit; the first one on a tie.
    pub argmax: Vec<u32>,
}

/// A model beside its reference, token by token.
#[derive(Clone, Debug, Default)]
pub struct TokenComparison {
    /// The reference's loss.
    pub reference: TokenLoss,
    /// The model's loss.
    pub model: TokenLoss,
    /// `KL(reference ‖ model)` in nats over the whole vocabulary.
    pub kld: Vec<f64>,
}

/// What a model's logits are worth.
pub trait Measure: Memory {
    /// Loss of `logits` `[tokens, vocabulary]` against the next tokens.
    fn token_loss(&self, logits: &Self::Matrix, targets: &[u32]) -> Result<TokenLoss>;
    /// The same for two models, with the divergence between them.
    fn compare(&self, reference: &Self::Matrix, model: &Self::Matrix, targets: &[u32]) -> Result<TokenComparison>;
}
