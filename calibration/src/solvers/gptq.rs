//! GPTQ: column by column, each rounding error absorbed by the columns still open.
//!
//! Frantar et al. 2022, arXiv:2210.17323. Columns go by falling energy (act-order) on groups fixed beforehand, so that
//! the order leaves no trace in the file; scales are searched with the input's energy as weights.

use kernels::{Error, Grid, GridSpec, Quantize, Recovered, Result, Swept};

use super::{Asked, Observer, Shared, Solution, Solver, finish, keep, recovered, round};
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
    /// After the sweep, scales and codes are moved once more wherever the loss falls (see `kernels::ops::refine`).
    pub refine: bool,
}

/// Steps of tenfold damping that are tried before the sweep is given up.
const DAMPINGS: [f64; 4] = [1.0, 10.0, 100.0, 1000.0];

impl<B: Quantize> Solver<B> for Gptq {
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
        for step in DAMPINGS {
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

    fn solve(&self, backend: &B, shared: &Shared<'_, B>, asked: &[Asked<'_, B>]) -> Result<Vec<Solution<B>>> {
        let asked: Vec<Asked<'_, B>> = asked.iter().map(|one| self.grouped(one, shared)).collect();
        let Some(factor) = &shared.factor else {
            return asked.iter().map(|one| round(backend, shared, one, self.observer)).collect();
        };
        let mut known = Vec::new();
        for one in &asked {
            known.push(recovered(backend, one.weight, &one.spec)?);
        }
        // Values without codes have nothing to sweep, nor have those that lie on a grid.
        let sweepable: Vec<bool> =
            asked.iter().zip(&known).map(|(one, known)| one.spec.encoding.has_codes() && known.is_none()).collect();
        let open = || asked.iter().zip(&sweepable).filter(|(_, sweepable)| **sweepable).map(|(one, _)| one);
        let grids =
            open().map(|one| self.observer.fit(backend, one, shared.statistics)).collect::<Result<Vec<Grid>>>()?;
        let targets: Vec<(&B::Matrix, &Grid)> = open().map(|one| one.weight).zip(&grids).collect();
        let mut swept = backend.sweep(&targets, factor)?.into_iter().zip(grids);
        let one = |((one, known), sweepable): ((&Asked<'_, B>, Option<Recovered>), bool)| {
            if let Some(found) = known {
                return keep(backend, shared, one.weight, found);
            }
            if !sweepable {
                return round(backend, shared, one, self.observer);
            }
            let (Swept { mut codes, mut loss }, mut grid) = swept.next().expect("one for each");
            let gram = shared.statistics.and_then(|s| s.gram.as_ref());
            if let Some(gram) = gram.filter(|_| self.refine) {
                loss = backend.refine(one.weight, gram, factor.damp, &mut grid, &mut codes)?;
            }
            finish(backend, shared, one.weight, grid, codes, Some(loss))
        };
        asked.iter().zip(known).zip(sweepable.iter().copied()).map(one).collect()
    }
}

impl Gptq {
    /// With the groups that the weight will have: of `desc_act` they follow the order in which columns are processed.
    fn grouped<'a, B: Quantize>(&self, asked: &Asked<'a, B>, shared: &Shared<'_, B>) -> Asked<'a, B> {
        let mut asked = asked.clone();
        let GridSpec { encoding, group_of, .. } = &mut asked.spec;
        // Groups of others are where they are.
        if let (true, Some(factor), true) = (self.desc_act, &shared.factor, encoding.is_integers()) {
            let width = encoding.group_width(factor.order.len());
            for (position, col) in factor.order.iter().enumerate() {
                group_of[*col as usize] = (position / width) as u32;
            }
        }
        asked
    }
}
