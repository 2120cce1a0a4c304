//! GPTQ: column by column, each rounding error absorbed by the columns still open.
//!
//! Frantar et al. 2022, arXiv:2210.17323. Columns go by falling energy (act-order) on groups fixed beforehand, so that
//! the order leaves no trace in the file; scales are searched with the input's energy as weights.

use kernels::{Backend, Error, Grid, GridSpec, Result, Swept};

use super::{Observer, Shared, Solution, Solver, finish, round};
use crate::statistics::{Needs, Statistics};

/// GPTQ's settings.
#[derive(Clone, Copy, Debug)]
pub struct Gptq {
    /// How scales are chosen, before the sweep.
    pub observer: Observer,
    /// Relative damping: each diagonal entry of the Hessian grows by this share.
    pub damp: f64,
    /// Columns by falling energy; else from left to right.
    pub act_order: bool,
    /// Groups follow the processing order, as `g_idx` in the file; else they are runs of consecutive columns.
    pub desc_act: bool,
}

/// Steps of tenfold damping that are tried before the sweep is given up.
const LADDER: [f64; 4] = [1.0, 10.0, 100.0, 1000.0];

impl<B: Backend> Solver<B> for Gptq {
    fn id(&self) -> &'static str {
        "gptq"
    }

    fn needs(&self) -> Needs {
        Needs::Hessian
    }

    fn share<'a>(&self, backend: &B, statistics: Option<&'a Statistics<B>>) -> Result<Shared<'a, B>> {
        let gram = statistics.and_then(|s| s.gram.as_ref()).expect("a Hessian for a solver that needs it");
        let energy = backend.diagonal(gram)?;
        let mut order: Vec<u32> = (0..energy.len() as u32).collect();
        if self.act_order || self.desc_act {
            order.sort_by(|a, b| energy[*b as usize].total_cmp(&energy[*a as usize]));
        }
        for step in LADDER {
            match backend.factor(gram, order.clone(), self.damp.max(1e-6) * step) {
                Ok(factor) => {
                    let fallback = (step > 1.0).then(|| {
                        format!("the Hessian needed {step} times the damping to factor: {}", self.damp.max(1e-6) * step)
                    });
                    return Ok(Shared { statistics, factor: Some(factor), fallback });
                }
                Err(Error::NotPositive(_)) => {}
                Err(other) => return Err(other),
            }
        }
        let fallback = Some("the Hessian could not be factored at any damping: rounded to nearest instead".to_owned());
        Ok(Shared { statistics, factor: None, fallback })
    }

    fn solve(
        &self,
        backend: &B,
        shared: &Shared<'_, B>,
        weights: &[(&B::Matrix, GridSpec)],
    ) -> Result<Vec<Solution<B>>> {
        let fit = |(weight, spec): &(&B::Matrix, GridSpec)| {
            let mut spec = spec.clone();
            if let (true, Some(factor)) = (self.desc_act, &shared.factor) {
                let width = spec.scheme.group_width(factor.order.len());
                for (position, col) in factor.order.iter().enumerate() {
                    spec.group_of[*col as usize] = (position / width) as u32;
                }
            }
            self.observer.fit(backend, weight, &spec, shared.statistics)
        };
        let grids = weights.iter().map(fit).collect::<Result<Vec<Grid>>>()?;
        let Some(factor) = &shared.factor else {
            return weights.iter().zip(grids).map(|((weight, _), grid)| round(backend, shared, weight, grid)).collect();
        };
        let targets: Vec<(&B::Matrix, &Grid)> = weights.iter().zip(&grids).map(|((w, _), grid)| (*w, grid)).collect();
        let swept = backend.sweep(&targets, factor)?;
        let all = weights.iter().zip(grids).zip(swept);
        all.map(|(((weight, _), grid), Swept { codes, loss })| finish(backend, shared, weight, grid, codes, Some(loss)))
            .collect()
    }
}
