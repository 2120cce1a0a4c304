//! Solvers: one float weight matrix and what is known of its input → codes on a grid.
//!
//! A solver is one file. All of them choose a [`Grid`] first, in the precision the file stores, and codes second.

mod blocks;
mod gptq;
mod rtn;
#[cfg(test)]
mod tests;

use formats::{PackedWeight, WordLayout};
use kernels::{Backend, Factor, FitKind, Grid, GridSpec, Result};

pub use blocks::{BlockSolution, pack_rows, searched, solve_blocks};
pub use gptq::Gptq;
pub use rtn::Rtn;

use crate::statistics::{Needs, Statistics};

/// How the scale of a group is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observer {
    /// From the smallest and the largest weight.
    MinMax,
    /// Least squared error of the weights.
    Mse,
    /// Least squared error, each channel weighted by the mean square of its input.
    Imatrix,
    /// Range clipped to the least error of the group's output (AWQ's clip search).
    Clip,
}

impl Observer {
    /// Every observer, with the name users type.
    pub const ALL: &[(&str, Observer)] = &[
        ("minmax", Observer::MinMax),
        ("mse", Observer::Mse),
        ("imatrix", Observer::Imatrix),
        ("clip", Observer::Clip),
    ];

    /// What it must know of the input.
    pub fn needs(self) -> Needs {
        match self {
            Observer::MinMax | Observer::Mse => Needs::Nothing,
            Observer::Imatrix => Needs::Moments,
            Observer::Clip => Needs::Hessian,
        }
    }

    /// Fits the grid of `weight`.
    ///
    /// # Panics
    /// If the statistics it [`needs`](Self::needs) were not gathered: a mistake of the caller.
    pub fn fit<B: Backend>(
        self,
        backend: &B,
        weight: &B::Matrix,
        spec: &GridSpec,
        statistics: Option<&Statistics<B>>,
    ) -> Result<Grid> {
        let known = || statistics.expect("statistics for an observer that needs them");
        match self {
            Observer::MinMax => backend.fit(weight, spec, FitKind::MinMax),
            Observer::Mse => backend.fit(weight, spec, FitKind::Weighted(&vec![1.0; spec.group_of.len()])),
            Observer::Imatrix => backend.fit(weight, spec, FitKind::Weighted(&known().importance())),
            Observer::Clip => {
                backend.fit(weight, spec, FitKind::BlockHessian(known().gram.as_ref().expect("a Hessian")))
            }
        }
    }
}

/// What linears that read one input share: its statistics, and whatever a solver derives from them.
pub struct Shared<'a, B: Backend> {
    /// Absent for solvers that need nothing.
    pub statistics: Option<&'a Statistics<B>>,
    /// The factored Hessian, for the solvers that sweep.
    pub factor: Option<Factor<B::Matrix>>,
    /// Why the solver will not do what it was asked to, for the report.
    pub fallback: Option<String>,
}

/// The codes of one linear, and how good they are.
pub struct Solution<B: Backend> {
    /// On the device.
    pub codes: B::Codes,
    /// Their scales and zeros.
    pub grid: Grid,
    /// What they stand for, on the device.
    pub restored: B::Matrix,
    /// `tr((W − Ŵ) H (W − Ŵ)ᵀ)` under the undamped Hessian, when that is known.
    pub proxy_loss: Option<f64>,
    /// The proxy loss as a share of `tr(W H Wᵀ)`: the relative squared error of the layer's output.
    pub relative_error: Option<f64>,
    /// Relative damping that the factorization needed.
    pub damp: Option<f64>,
    /// What was done in place of what was asked for, and why.
    pub fallback: Option<String>,
}

impl<B: Backend> Solution<B> {
    /// Its codes as files hold them, and its grid.
    pub fn packed(self, backend: &B, layout: WordLayout) -> Result<PackedWeight> {
        let Grid { spec: GridSpec { scheme, group_of, .. }, rows, scales, zeros } = self.grid;
        let cols = group_of.len();
        let words = backend.pack(&self.codes, scheme.bits, layout)?;
        let width = scheme.group_width(cols);
        let contiguous = group_of.iter().enumerate().all(|(col, group)| col / width == *group as usize);
        let group_of = (!contiguous).then_some(group_of);
        Ok(PackedWeight { rows, cols, scheme, words, scales, zeros, group_of })
    }
}

/// Chooses codes and scales for linears.
pub trait Solver<B: Backend>: Sync {
    /// The name users type.
    fn id(&self) -> &'static str;
    /// What must be known of a linear's input.
    fn needs(&self) -> Needs;
    /// Derives, once, what all linears that read one input share.
    fn share<'a>(&self, backend: &B, statistics: Option<&'a Statistics<B>>) -> Result<Shared<'a, B>>;
    /// Quantizes weight matrices `[out, in]` that read one input, each on a grid of its own.
    fn solve(
        &self,
        backend: &B,
        shared: &Shared<'_, B>,
        weights: &[(&B::Matrix, GridSpec)],
    ) -> Result<Vec<Solution<B>>>;
}

/// Rounds every weight to the nearest code of its grid.
fn round<B: Backend>(backend: &B, shared: &Shared<'_, B>, weight: &B::Matrix, grid: Grid) -> Result<Solution<B>> {
    let codes = backend.round(weight, &grid)?;
    finish(backend, shared, weight, grid, codes, None)
}

/// Puts codes and grid together, and measures them when the Hessian is known.
///
/// A sweep has measured them already: `swept` is its loss, under the damped Hessian.
fn finish<B: Backend>(
    backend: &B,
    shared: &Shared<'_, B>,
    weight: &B::Matrix,
    grid: Grid,
    codes: B::Codes,
    swept: Option<f64>,
) -> Result<Solution<B>> {
    let restored = backend.restore(&codes, &grid)?;
    let [proxy_loss, relative_error] = measure(backend, shared, weight, &restored, swept)?;
    let damp = shared.factor.as_ref().map(|f| f.damp);
    let fallback = shared.fallback.clone();
    Ok(Solution { codes, grid, restored, proxy_loss, relative_error, damp, fallback })
}

/// The proxy loss and the relative error, where the Hessian is known.
fn measure<B: Backend>(
    backend: &B,
    shared: &Shared<'_, B>,
    weight: &B::Matrix,
    restored: &B::Matrix,
    swept: Option<f64>,
) -> Result<[Option<f64>; 2]> {
    let Some(gram) = shared.statistics.and_then(|s| s.gram.as_ref()) else { return Ok([None, None]) };
    let error = backend.difference(weight, restored)?;
    let lost = match swept.zip(shared.factor.as_ref()) {
        Some((loss, factor)) => {
            // What damping added to the diagonal comes off again; a column without energy had a pivot of 1.
            let added = backend.diagonal(gram)?.into_iter();
            let added: Vec<f64> = added.map(|d| if d > 0.0 { f64::from(d) * factor.damp } else { 1.0 }).collect();
            loss - backend.weighted_square(&error, &added)?
        }
        None => backend.quadratic(&error, gram)?,
    };
    let (lost, whole) = (lost.max(0.0), backend.quadratic(weight, gram)?);
    Ok([Some(lost), (whole > 0.0).then(|| lost / whole)])
}
