//! Solvers: float weight matrices and what is known of their input → codes on a grid.
//!
//! A solver is one file. All of them choose a [`Grid`] first, in the precision the file stores, and codes second; which encoding the grid
//! is of, integers in groups or ggml's superblocks, makes no difference to them.

mod gptq;
mod rows;
mod rtn;
#[cfg(test)]
mod tests;

use formats::{GgmlType, PackedWeight, WordLayout};
use kernels::{Factor, FitKind, Grid, GridSpec, Packing, Quantize, Recovered, Result};

pub use gptq::Gptq;
pub use rows::{Rows, lies_on_grid, pack_rows, searched};
pub use rtn::Rtn;

use crate::statistics::{Needs, Statistics};

/// How the scale of a group is chosen.
///
/// Every one takes every encoding. What differs for ggml's blocks is said beside each: their scales are integers of a superblock's, which
/// no range decides, so that all but the first are searches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observer {
    /// From the smallest and the largest weight. In ggml's blocks what ggml's own encoder does without a search, or, for the types that it
    /// searches, the search where each weight counts by its own size.
    MinMax,
    /// Least squared error of the weights.
    Mse,
    /// Least squared error, each channel weighted by the mean square of its input.
    Imatrix,
    /// Range clipped to the least error of the group's output (AWQ's clip search). In ggml's blocks the same search as for `Imatrix`: it
    /// clips as it finds scales, and the error of an output is its diagonal part.
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

    /// Fits the grid of a weight.
    ///
    /// # Panics
    /// If the statistics it [`needs`](Self::needs) were not gathered, and no importance was given instead: a mistake of the caller.
    pub fn fit<B: Quantize>(
        self,
        backend: &B,
        asked: &Asked<'_, B>,
        statistics: Option<&Statistics<B>>,
    ) -> Result<Grid> {
        let Asked { weight, spec, importance } = asked;
        let known = || statistics.expect("statistics for an observer that needs them");
        match (self, importance) {
            (Observer::MinMax, _) => backend.fit(weight, spec, FitKind::MinMax),
            (Observer::Mse, _) => backend.fit(weight, spec, FitKind::Weighted(&vec![1.0; spec.group_of.len()])),
            (Observer::Imatrix, Some(importance)) => backend.fit(weight, spec, FitKind::Weighted(importance)),
            (Observer::Imatrix, None) => backend.fit(weight, spec, FitKind::Weighted(&known().importance())),
            // Blocks have nothing but the diagonal to go by, which is what an importance says.
            (Observer::Clip, Some(importance)) if spec.encoding.ggml_type().is_some() => {
                backend.fit(weight, spec, FitKind::Weighted(importance))
            }
            (Observer::Clip, _) => {
                backend.fit(weight, spec, FitKind::BlockHessian(known().gram.as_ref().expect("a Hessian")))
            }
        }
    }

    /// The type whose rows ggml encodes without a search, where that is what was asked for.
    fn encoder(self, spec: &GridSpec) -> Option<GgmlType> {
        let by_size = self == Observer::MinMax;
        spec.encoding.ggml_type().filter(|ty| !searched(*ty, !by_size))
    }
}

/// A weight to be quantized.
pub struct Asked<'a, B: Quantize> {
    /// `[out, in]`.
    pub weight: &'a B::Matrix,
    /// How it is to be represented.
    pub spec: GridSpec,
    /// `[in]`: what each channel counts, in place of what the statistics say (an importance matrix out of a file).
    pub importance: Option<&'a [f32]>,
}

impl<B: Quantize> Clone for Asked<'_, B> {
    fn clone(&self) -> Self {
        Asked { weight: self.weight, spec: self.spec.clone(), importance: self.importance }
    }
}

/// What linears that read one input share: its statistics, and whatever a solver derives from them.
pub struct Shared<'a, B: Quantize> {
    /// Absent for solvers that need nothing.
    pub statistics: Option<&'a Statistics<B>>,
    /// The factored Hessian, for the solvers that sweep.
    pub factor: Option<Factor<B::Matrix>>,
    /// Why the solver will not do what it was asked to, for the report.
    pub fallback: Option<String>,
}

/// What was chosen for a weight.
enum Chosen<B: Quantize> {
    /// Codes on the device, and their grid.
    Codes(B::Codes, Box<Grid>),
    /// Rows as a file of ggml's holds them, by ggml's own encoder.
    Rows(Vec<u8>),
}

/// One linear, quantized, and how good it is.
pub struct Solution<B: Quantize> {
    chosen: Chosen<B>,
    /// What the codes stand for, on the device.
    pub dequantized: B::Matrix,
    /// `tr((W − Ŵ) H (W − Ŵ)ᵀ)` under the undamped Hessian, when that is known.
    pub proxy_loss: Option<f64>,
    /// The proxy loss as a share of `tr(W H Wᵀ)`: the relative squared error of the layer's output.
    pub relative_error: Option<f64>,
    /// Relative damping that the factorization needed.
    pub damp: Option<f64>,
    /// What was done in place of what was asked for, and why.
    pub fallback: Option<String>,
    /// Whether the weight lay on the grid already and was recovered: to the bit, or but for scales that the file's precision lacks.
    pub recovered: Option<bool>,
}

impl<B: Quantize> Solution<B> {
    /// Scales and zeros or minima; `None` where ggml's own encoder chose the rows, or values are stored as they are.
    pub fn grid(&self) -> Option<&Grid> {
        match &self.chosen {
            Chosen::Codes(_, grid) => Some(grid),
            Chosen::Rows(_) => None,
        }
    }

    /// Codes that lie apart from their scales as files hold them, and their grid.
    ///
    /// # Panics
    /// If the weight is in one of ggml's types, whose codes and scales lie together: a mistake of the caller.
    pub fn packed(self, backend: &B, layout: WordLayout) -> Result<PackedWeight> {
        let Chosen::Codes(codes, grid) = self.chosen else {
            panic!("codes and scales of ggml's types lie together");
        };
        let bits = grid.spec.encoding.levels.bits();
        let bytes = backend.pack(&codes, Packing::Words { bits, layout })?;
        let Grid { spec: GridSpec { encoding, group_of, global }, rows, scales, mut zeros, mut mins, .. } = *grid;
        let cols = group_of.len();
        if zeros.is_empty() {
            zeros = vec![0; scales.len()];
        }
        if !encoding.has_min() {
            mins.clear();
        }
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let words = bytes.chunks_exact(4).map(word).collect();
        let width = encoding.group_width(cols);
        let contiguous = group_of.iter().enumerate().all(|(col, group)| col / width == *group as usize);
        let group_of = (!contiguous).then_some(group_of);
        Ok(PackedWeight { rows, cols, encoding, words, scales, zeros, mins, global, group_of })
    }

    /// Rows of blocks as a file of ggml's holds them.
    ///
    /// Fails if the weight is in none of ggml's types.
    pub fn rows(&mut self, backend: &B) -> Result<Vec<u8>> {
        match &mut self.chosen {
            Chosen::Codes(codes, grid) => backend.pack(codes, Packing::Blocks(grid)),
            Chosen::Rows(rows) => Ok(std::mem::take(rows)),
        }
    }
}

/// Chooses codes and scales for linears.
pub trait Solver<B: Quantize>: Sync {
    /// The name users type.
    fn id(&self) -> &'static str;
    /// What must be known of a linear's input.
    fn needs(&self) -> Needs;
    /// Derives, once, what all linears that read one input share.
    fn share<'a>(&self, backend: &B, statistics: Option<&'a Statistics<B>>) -> Result<Shared<'a, B>>;
    /// Quantizes weight matrices that read one input, each on a grid of its own and in an encoding of its own.
    ///
    /// Fails where blocks do not divide the rows.
    fn solve(&self, backend: &B, shared: &Shared<'_, B>, asked: &[Asked<'_, B>]) -> Result<Vec<Solution<B>>>;
}

/// The grid on which a weight lies already, in the encoding that it is to have; its first row tells at once that there is none.
///
/// Whatever is known of inputs, no other codes come nearer, so that solvers neither look for scales nor sweep.
pub fn recovered<B: Quantize>(backend: &B, weight: &B::Matrix, spec: &GridSpec) -> Result<Option<Recovered>> {
    if backend.shape(weight)[0] == 0 {
        return Ok(None);
    }
    let first = backend.download(&backend.select_rows(weight, &[0])?)?;
    match kernels::recover(first.view(), spec) {
        Some(_) => Ok(kernels::recover(backend.download(weight)?.view(), spec)),
        None => Ok(None),
    }
}

/// A weight on the grid on which it lies already.
fn keep<B: Quantize>(backend: &B, shared: &Shared<'_, B>, weight: &B::Matrix, found: Recovered) -> Result<Solution<B>> {
    let Recovered { grid, exact } = found;
    let codes = backend.round(weight, &grid)?;
    Ok(Solution { recovered: Some(exact), ..finish(backend, shared, weight, grid, codes, None)? })
}

/// Rounds every weight to the nearest code of the grid that an observer chooses, or on which it lies already.
fn round<B: Quantize>(
    backend: &B,
    shared: &Shared<'_, B>,
    asked: &Asked<'_, B>,
    observer: Observer,
) -> Result<Solution<B>> {
    if let Some(found) = recovered(backend, asked.weight, &asked.spec)? {
        return keep(backend, shared, asked.weight, found);
    }
    if let Some(ty) = observer.encoder(&asked.spec) {
        let (rows, dequantized) = rows::encode(backend, asked.weight, ty)?;
        return measured(backend, shared, asked.weight, Chosen::Rows(rows), dequantized, None);
    }
    let grid = observer.fit(backend, asked, shared.statistics)?;
    let codes = backend.round(asked.weight, &grid)?;
    finish(backend, shared, asked.weight, grid, codes, None)
}

/// Puts codes and grid together, and measures them when the Hessian is known.
///
/// A sweep has measured them already: `swept` is its loss, under the damped Hessian.
fn finish<B: Quantize>(
    backend: &B,
    shared: &Shared<'_, B>,
    weight: &B::Matrix,
    grid: Grid,
    codes: B::Codes,
    swept: Option<f64>,
) -> Result<Solution<B>> {
    let dequantized = backend.dequantize(&codes, &grid)?;
    measured(backend, shared, weight, Chosen::Codes(codes, Box::new(grid)), dequantized, swept)
}

fn measured<B: Quantize>(
    backend: &B,
    shared: &Shared<'_, B>,
    weight: &B::Matrix,
    chosen: Chosen<B>,
    dequantized: B::Matrix,
    swept: Option<f64>,
) -> Result<Solution<B>> {
    let [proxy_loss, relative_error] = measure(backend, shared, weight, &dequantized, swept)?;
    let damp = shared.factor.as_ref().map(|f| f.damp);
    let fallback = shared.fallback.clone();
    Ok(Solution { chosen, dequantized, proxy_loss, relative_error, damp, fallback, recovered: None })
}

/// The proxy loss and the relative error, where the Hessian is known.
fn measure<B: Quantize>(
    backend: &B,
    shared: &Shared<'_, B>,
    weight: &B::Matrix,
    dequantized: &B::Matrix,
    swept: Option<f64>,
) -> Result<[Option<f64>; 2]> {
    let Some(gram) = shared.statistics.and_then(|s| s.gram.as_ref()) else { return Ok([None, None]) };
    let error = backend.difference(weight, dequantized)?;
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
