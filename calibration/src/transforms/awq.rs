//! AWQ: channels with large activations are scaled up before rounding, so that rounding hurts them less.
//!
//! Lin et al. 2023, arXiv:2306.00978. `t_j = E|x_j|^α`, α on a grid. The paper compares block outputs on sampled tokens;
//! here the exact second moments of the input are at hand, so that the error of the layers' outputs is
//! `tr(e H eᵀ)`, without any tokens. Heads that share a value head share their scales, so that v → o works under GQA too.

use kernels::{Quantize, Result};

use super::{Slot, SlotScales};

/// AWQ's settings.
#[derive(Clone, Copy, Debug)]
pub struct Awq {
    /// Points of α in `[0, 1)`.
    pub grid: usize,
    /// Rows of each weight matrix that take part in the search, evenly spaced.
    pub rows: usize,
}

impl Default for Awq {
    fn default() -> Self {
        Awq { grid: 20, rows: 192 }
    }
}

impl Awq {
    /// Chooses the scales of a slot.
    ///
    /// # Panics
    /// If the slot's statistics lack the Hessian: a mistake of the caller.
    pub fn scales<B: Quantize>(&self, backend: &B, slot: &Slot<'_, B>) -> Result<SlotScales> {
        let gram = slot.statistics.gram.as_ref().expect("a Hessian");
        let magnitude = slot.tie.reduce(&slot.statistics.magnitude());
        let readers = slot
            .readers
            .iter()
            .map(|(weight, spec)| {
                let rows = backend.shape(weight)[0];
                let count = self.rows.min(rows);
                let chosen: Vec<usize> = (0..count).map(|i| i * rows / count).collect();
                // Each sampled row stands for as many as it was sampled from.
                Ok((backend.select_rows(weight, &chosen)?, *spec, rows as f64 / count as f64))
            })
            .collect::<Result<Vec<_>>>()?;
        let loss = |t: &[f32]| -> Result<f64> {
            readers.iter().map(|(w, spec, share)| Ok(backend.scaled_rounding_loss(w, t, spec, gram)? * share)).sum()
        };
        let mut best: Option<SlotScales> = None;
        for point in 0..self.grid {
            let alpha = point as f32 / self.grid as f32;
            let producer = exponent(&magnitude, alpha);
            let reader = slot.tie.expand(&producer);
            let found = loss(&reader)?;
            let without = best.as_ref().map_or(found, |b| b.loss[0]);
            if best.as_ref().is_none_or(|b| found < b.loss[1]) {
                best = Some(SlotScales { producer, reader, alpha, loss: [without, found] });
            }
        }
        Ok(best.expect("a grid of at least one point"))
    }
}

/// `m_j^α`, centred so that the largest and the smallest are each other's inverse.
fn exponent(magnitude: &[f32], alpha: f32) -> Vec<f32> {
    let t: Vec<f32> = magnitude.iter().map(|m| m.max(1e-8).powf(alpha).clamp(1e-4, 1e4)).collect();
    let (low, high) = t.iter().fold((f32::INFINITY, 0.0f32), |(l, h), x| (l.min(*x), h.max(*x)));
    let centre = (low * high).sqrt();
    t.into_iter().map(|x| x / centre).collect()
}
