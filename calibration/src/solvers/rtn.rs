//! Round to nearest: every weight on its own.

use kernels::{Quantize, Result};

use super::{Asked, Observer, Shared, Solution, Solver, round};
use crate::statistics::{Needs, Statistics};

/// Rounds to the nearest code of a grid that `observer` chooses.
#[derive(Clone, Copy, Debug)]
pub struct Rtn {
    /// How scales are chosen.
    pub observer: Observer,
}

impl<B: Quantize> Solver<B> for Rtn {
    fn id(&self) -> &'static str {
        "rtn"
    }

    fn needs(&self) -> Needs {
        self.observer.needs()
    }

    fn share<'a>(&self, _: &B, statistics: Option<&'a Statistics<B>>) -> Result<Shared<'a, B>> {
        Ok(Shared { statistics, factor: None, fallback: None })
    }

    fn solve(&self, backend: &B, shared: &Shared<'_, B>, asked: &[Asked<'_, B>]) -> Result<Vec<Solution<B>>> {
        asked.iter().map(|one| round(backend, shared, one, self.observer)).collect()
    }
}
