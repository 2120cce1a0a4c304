//! What is done for one target: its solutions of linears whose input is known, its report, its imatrix.

use std::collections::BTreeMap;
use std::time::Instant;

use calibration::samples::Samples;
use calibration::solvers::{Gptq, Rtn, Shared, Solver, solve_blocks};
use calibration::statistics::Statistics;
use formats::{Imatrix, ImatrixEntry};
use kernels::Backend;
use ndarray::Array2;

use super::observe::Observed;
use super::{Done, describe};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::evidence::{check_measured, dead_inputs, lost_in_blocks, lost_in_grid, prior_share, share_of};
use crate::forward::Weight;
use crate::graph::Linear;
use crate::output::behind::Behind;
use crate::recipe::Recipe;
use crate::report::{LinearReport, Stages};
use crate::rest::Lost;
use crate::targets::{Encoding, Placement, Sink, Solved, Target, Write};
use crate::words::called;

/// What decides how a Hessian is factored, and what it is gathered for: targets with equal ones share the factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShareKey {
    needs: calibration::statistics::Needs,
    sweeps: bool,
    damp: u64,
    ordered: bool,
}

/// A target at work.
pub struct Task<'a, B: Backend> {
    /// The target.
    pub target: &'a dyn Target<B>,
    /// What it writes into.
    pub sink: &'a dyn Sink<B>,
    solver: Box<dyn Solver<B>>,
    /// What was seen before every tensor of a GGUF file, where an imatrix is to be written.
    collected: BTreeMap<String, ImatrixEntry>,
    /// What was done.
    pub done: Done,
    /// Tensors beside the linears that lose values.
    pub lost: Vec<Lost>,
}

/// What solving takes besides the weights.
pub struct Work<'w, 'a, B: Backend> {
    /// The device.
    pub backend: &'a B,
    /// Where the weights come from, for messages.
    pub source: &'a Checkpoint,
    /// Who writes.
    pub behind: &'w Behind<Write<'a>>,
    /// Who is told.
    pub progress: &'w crate::progress::Progress,
    /// Whether the stream sees what this target holds.
    pub leads: bool,
}

fn solver<B: Backend>(recipe: &Recipe) -> Box<dyn Solver<B>> {
    let observer = recipe.observer();
    if recipe.method.sweeps() {
        let (damp, act_order, desc_act) = (recipe.damp, recipe.act_order, recipe.desc_act);
        Box::new(Gptq { observer, damp, act_order, desc_act })
    } else {
        Box::new(Rtn { observer })
    }
}

/// A matrix that is to be solved: the linear's own, or rows of it.
enum Asked<'m, M> {
    Whole(&'m M),
    Part(M),
}

impl<M> Asked<'_, M> {
    fn matrix(&self) -> &M {
        match self {
            Asked::Whole(matrix) => matrix,
            Asked::Part(matrix) => matrix,
        }
    }
}

/// What was found of one linear, put together of its placements.
#[derive(Default)]
struct Found {
    proxy_loss: Option<f64>,
    /// Of several placements the worst.
    relative_error: Option<f64>,
    damp: Option<f64>,
    /// Weights that no scale holds.
    lost: usize,
    swept: bool,
}

impl<'a, B: Backend> Task<'a, B> {
    /// Nothing is done yet.
    pub fn new(target: &'a dyn Target<B>, sink: &'a dyn Sink<B>) -> Task<'a, B> {
        let (collected, done, lost) = (BTreeMap::new(), Done::default(), Vec::new());
        Task { target, sink, solver: solver(target.recipe()), collected, done, lost }
    }

    /// What was done, with the times that are `shared` with other targets.
    pub fn end(mut self, shared: &Stages) -> (Done, Vec<Lost>) {
        let Stages { load, forward, observe, smooth, factor, .. } = *shared;
        let own = self.done.seconds;
        self.done.seconds = Stages { load, forward, observe, smooth, factor, ..own };
        (self.done, self.lost)
    }

    /// How the Hessian of linears is factored for it; `None` where none of them gets codes.
    pub fn key(&self, group: &[&Linear]) -> Option<ShareKey> {
        let recipe = self.target.recipe();
        let any = group.iter().any(|linear| !self.target.placements(linear).is_empty());
        let codes = group.iter().flat_map(|linear| self.target.placements(linear)).any(|p| p.encoding.has_codes());
        let sweeps = recipe.method.sweeps() && codes;
        let damp = if sweeps { recipe.damp.to_bits() } else { 0 };
        let ordered = sweeps && (recipe.act_order || recipe.desc_act);
        any.then_some(ShareKey { needs: self.target.needs(), sweeps, damp, ordered })
    }

    /// Factors what was seen.
    pub fn share<'s>(&self, backend: &B, group: &[&Linear], seen: &'s Observed<B>) -> Result<Shared<'s, B>> {
        let statistics = seen.of(self.target.needs());
        match self.key(group) {
            Some(ShareKey { sweeps: true, .. }) => Ok(self.solver.share(backend, statistics)?),
            _ => Ok(Shared { statistics, factor: None, fallback: None }),
        }
    }

    /// Rounds a linear in the target's own way, if it has one.
    pub fn round(&mut self, backend: &B, linear: &Linear, progress: &crate::progress::Progress) -> Result<bool> {
        let started = Instant::now();
        let Some(rounded) = self.sink.round(backend, linear)? else { return Ok(false) };
        let seconds = started.elapsed().as_secs_f64();
        self.done.seconds.solve += seconds;
        let report = LinearReport {
            fallback: self.target.fallback(linear),
            lost: share_of(rounded.lost, linear.rows * linear.cols),
            seconds,
            ..blank(linear, &rounded.encoding)
        };
        self.record(report, progress)?;
        Ok(true)
    }

    /// Solves linears that read one input, and has them written. Returns what the file will hold of each where the target leads and it is
    /// not what was loaded.
    pub fn quantize(
        &mut self,
        work: &Work<'_, 'a, B>,
        group: &[&Linear],
        loaded: &[Weight<B::Matrix>],
        seen: &Observed<B>,
        shared: Option<&Shared<'_, B>>,
    ) -> Result<Vec<Option<B::Matrix>>> {
        let backend = work.backend;
        let statistics = seen.of(self.target.needs());
        let started = Instant::now();
        let placements: Vec<Vec<Placement>> = group.iter().map(|linear| self.target.placements(linear)).collect();
        let mut solved = self.solve(backend, group, loaded, &placements, statistics, shared)?.into_iter();
        let seconds = started.elapsed().as_secs_f64();
        self.done.seconds.solve += seconds;
        let weights = |all: &mut dyn Iterator<Item = &&Linear>| all.map(|l| l.rows * l.cols).sum::<usize>() as f64;
        let all = weights(&mut group.iter().zip(&placements).filter(|(_, p)| !p.is_empty()).map(|(l, _)| l));

        let mut held = Vec::new();
        for ((linear, weight), placements) in group.iter().zip(loaded).zip(&placements) {
            if placements.is_empty() {
                self.done.lost.extend(self.sink.keep(backend, linear, weight)?);
                held.push(None);
                continue;
            }
            let solved: Vec<(Asked<'_, B::Matrix>, Solved<B>)> = solved.by_ref().take(placements.len()).collect();
            let found = self.look(work, linear, placements, &solved, shared)?;
            let own = weights(&mut [linear].into_iter()) / all;
            let fallbacks = [self.target.fallback(linear), shared.and_then(|shared| shared.fallback.clone())];
            let fallbacks: Vec<String> = fallbacks.into_iter().flatten().collect();
            let recipe = self.target.recipe();
            let method = if recipe.method.sweeps() && !found.swept { "rtn" } else { recipe.method.name() };
            let count = statistics.map_or(1.0, |s| s.count.max(1.0));
            let report = LinearReport {
                method: method.to_owned(),
                tokens: statistics.map_or(0, |s| s.tokens),
                prior: statistics.and_then(prior_share),
                dead_inputs: statistics.and_then(dead_inputs),
                damp: found.damp,
                fallback: (!fallbacks.is_empty()).then(|| fallbacks.join("; ")),
                proxy_loss: found.proxy_loss.map(|loss| loss / count),
                relative_error: found.relative_error,
                lost: share_of(found.lost, linear.rows * linear.cols),
                seconds: seconds * own,
                ..blank(linear, &placements[0].encoding)
            };
            check_measured(&report)?;
            let started = Instant::now();
            held.push(self.put(work, linear, weight, placements, solved)?);
            self.done.seconds.write += started.elapsed().as_secs_f64();
            self.record(report, work.progress)?;
        }
        Ok(held)
    }

    /// A solution for every placement of every linear.
    fn solve<'m>(
        &self,
        backend: &B,
        group: &[&Linear],
        loaded: &'m [Weight<B::Matrix>],
        placements: &[Vec<Placement>],
        statistics: Option<&Statistics<B>>,
        shared: Option<&Shared<'_, B>>,
    ) -> Result<Vec<(Asked<'m, B::Matrix>, Solved<B>)>> {
        let Some(shared) = shared else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for ((linear, weight), placements) in group.iter().zip(loaded).zip(placements) {
            for (at, placement) in placements.iter().enumerate() {
                all.push((*linear, at, placement, asked(backend, linear, &weight.matrix, placement)?));
            }
        }
        let grids: Vec<_> = all
            .iter()
            .filter_map(|(linear, _, placement, asked)| match placement.encoding {
                Encoding::Grid { .. } => Some((asked.matrix(), placement.encoding.grid(linear.cols)?)),
                Encoding::Ggml(_) => None,
            })
            .collect();
        // On grids those that read one input are swept side by side.
        let mut grids =
            if grids.is_empty() { Vec::new() } else { self.solver.solve(backend, shared, &grids)? }.into_iter();
        let alone = Shared { statistics: None, factor: None, fallback: None };
        let mut solved = Vec::new();
        for (linear, at, placement, asked) in all {
            let solution = match placement.encoding {
                Encoding::Grid { .. } => Solved::Grid(grids.next().expect("one for each")),
                Encoding::Ggml(ty) => {
                    let importance = match self.target.importance(linear, at)? {
                        Some(read) => Some(read),
                        None if self.target.takes_importance() => None,
                        // Columns of what is turned round are no inputs of the linear.
                        None => {
                            statistics.filter(|s| !placement.transposed && s.count > 0.0).map(Statistics::importance)
                        }
                    };
                    let by = if placement.transposed { &alone } else { shared };
                    Solved::Blocks(solve_blocks(backend, by, asked.matrix(), ty, importance.as_deref())?)
                }
            };
            solved.push((asked, solution));
        }
        Ok(solved)
    }

    /// How good the solutions of a linear are; fails where no scale holds its values.
    fn look(
        &self,
        work: &Work<'_, 'a, B>,
        linear: &Linear,
        placements: &[Placement],
        solved: &[(Asked<'_, B::Matrix>, Solved<B>)],
        shared: Option<&Shared<'_, B>>,
    ) -> Result<Found> {
        let backend = work.backend;
        let file = work.source.file_of(&linear.weight());
        let mut found = Found::default();
        for (at, (placement, (asked, solved))) in placements.iter().zip(solved).enumerate() {
            let asked = asked.matrix();
            let (loss, error, damp) = match solved {
                Solved::Grid(solution) => {
                    found.lost += lost_in_grid(&solution.grid, file, &linear.weight(), || {
                        Ok([backend.download(asked)?, backend.download(&solution.restored)?])
                    })?;
                    (solution.proxy_loss, solution.relative_error, solution.damp)
                }
                Solved::Blocks(solution) => {
                    let Encoding::Ggml(ty) = placement.encoding else { unreachable!("solved as blocks") };
                    let names = [&*linear.weight(), &*self.target.called(linear, at)];
                    found.lost += lost_in_blocks(ty, &solution.packed, file, names, || {
                        Ok(backend.download(asked)?.iter().copied().collect())
                    })?;
                    (solution.proxy_loss, solution.relative_error, solution.damp)
                }
            };
            if let Some(loss) = loss {
                *found.proxy_loss.get_or_insert(0.0) += loss;
            }
            if let Some(error) = error {
                found.relative_error = Some(found.relative_error.map_or(error, |other| other.max(error)));
            }
            let factored = shared.is_some_and(|shared| shared.factor.is_some());
            if factored && !placement.transposed && placement.encoding.has_codes() {
                found.swept = true;
                found.damp = damp;
            }
        }
        Ok(found)
    }

    /// Has the solutions of a linear written. Returns what they stand for, put together, where the target leads.
    fn put(
        &self,
        work: &Work<'_, 'a, B>,
        linear: &Linear,
        weight: &Weight<B::Matrix>,
        placements: &[Placement],
        solved: Vec<(Asked<'_, B::Matrix>, Solved<B>)>,
    ) -> Result<Option<B::Matrix>> {
        let backend = work.backend;
        let (mut matrix, mut whole) = (None, None);
        for (at, (placement, (_, mut solved))) in placements.iter().zip(solved).enumerate() {
            if work.leads {
                let empty = backend.zeros(1, 1)?;
                let restored = match &mut solved {
                    Solved::Grid(solution) => std::mem::replace(&mut solution.restored, empty),
                    Solved::Blocks(solution) => std::mem::replace(&mut solution.restored, empty),
                };
                if placement.is_whole(linear) {
                    matrix = Some(restored);
                } else {
                    let whole = whole.get_or_insert_with(|| Array2::zeros((linear.rows, linear.cols)));
                    let host = backend.download(&restored)?;
                    for at in 0..linear.rows.min(placement.rows.as_ref().map_or(linear.rows, Vec::len)) {
                        let row = placement.rows.as_ref().map_or(at, |rows| rows[at]);
                        match placement.transposed {
                            true => whole.row_mut(row).assign(&host.column(at)),
                            false => whole.row_mut(row).assign(&host.row(at)),
                        }
                    }
                }
            }
            work.behind.hand_over(self.sink.put(backend, linear, at, solved, weight.bias.as_deref())?)?;
        }
        match (matrix, whole) {
            (Some(matrix), _) => Ok(Some(matrix)),
            (None, Some(whole)) => Ok(Some(backend.upload(whole)?)),
            (None, None) => Ok(None),
        }
    }

    fn record(&mut self, report: LinearReport, progress: &crate::progress::Progress) -> Result<()> {
        check_measured(&report)?;
        progress.line(|| describe(&report));
        progress.step();
        self.done.linears.push(report);
        Ok(())
    }

    /// Remembers what was seen before the tensors that linears go to, for an imatrix.
    pub fn collect(&mut self, group: &[&Linear], seen: &Observed<B>) {
        let Some(statistics) = seen.of(self.target.needs()) else { return };
        let energy = statistics.energy();
        for linear in group {
            for place in self.target.importance_places(linear) {
                if energy.len() != place.width {
                    continue;
                }
                let (matrices, width) = (place.matrices, place.width);
                let entry = self
                    .collected
                    .entry(place.tensor)
                    .or_insert_with(|| ImatrixEntry { sums: vec![0.0; matrices * width], counts: vec![0.0; matrices] });
                entry.sums[place.matrix * width..][..width].copy_from_slice(&energy);
                entry.counts[place.matrix] = statistics.count as f32;
            }
        }
    }

    /// Writes the imatrix, if one is to be written.
    pub fn save_importance(&self, samples: &Samples) -> Result<()> {
        let recipe = self.target.recipe();
        let Some(path) = recipe.gguf.as_ref().and_then(|gguf| gguf.save_imatrix.as_deref()) else { return Ok(()) };
        let imatrix = Imatrix {
            entries: self.collected.clone(),
            datasets: vec![called(&samples.source.name).to_owned()],
            chunk_count: samples.source.sequences as u32,
            chunk_size: samples.source.seq_len as u32,
            ..Imatrix::default()
        };
        Ok(imatrix.write(path)?)
    }
}

/// The matrix of a placement.
fn asked<'m, B: Backend>(
    backend: &B,
    linear: &Linear,
    matrix: &'m B::Matrix,
    placement: &Placement,
) -> Result<Asked<'m, B::Matrix>> {
    // A linear that is all there is needs no copy, whatever the order of its rows.
    if placement.is_whole(linear) {
        return Ok(Asked::Whole(matrix));
    }
    let own = placement.rows.as_ref().map(|rows| backend.select_rows(matrix, rows)).transpose()?;
    if !placement.transposed {
        return Ok(own.map_or(Asked::Whole(matrix), Asked::Part));
    }
    let host = backend.download(own.as_ref().unwrap_or(matrix))?;
    Ok(Asked::Part(backend.upload(host.reversed_axes().as_standard_layout().into_owned())?))
}

/// What a report says of a linear that was only rounded.
fn blank(linear: &Linear, encoding: &Encoding) -> LinearReport {
    let (ty, bits, group_size, symmetric) = encoding.described();
    LinearReport {
        name: linear.module.clone(),
        method: "rtn".to_owned(),
        ty,
        bits,
        group_size,
        symmetric,
        tokens: 0,
        prior: None,
        dead_inputs: None,
        damp: None,
        fallback: None,
        proxy_loss: None,
        relative_error: None,
        lost: None,
        seconds: 0.0,
    }
}
