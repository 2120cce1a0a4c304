//! What is done for one target: its solutions of linears whose input is known, its report, its imatrix.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Instant;

use calibration::samples::Samples;
use calibration::solvers::{Asked, Gptq, Observer, Rtn, Shared, Solver};
use calibration::statistics::{Needs, Statistics};
use formats::{Encoding, Imatrix, ImatrixEntry};
use kernels::{Backend, GridSpec, Memory};
use ndarray::{Array2, Axis};

use super::observe::Observed;
use super::{Done, describe};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::evidence::{check_measured, dead_inputs, lost_in_blocks, lost_in_grid, prior_share, share_of};
use crate::forward::Weight;
use crate::graph::Linear;
use crate::output::behind::Behind;
use crate::output::journal::{Finished, Journal};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::{LinearReport, Recovery, Stages};
use crate::rest::Lost;
use crate::targets::{Placement, Sink, Solved, Target, Write, described};
use crate::words::called;

/// What decides how a Hessian is factored, and what it is gathered for: targets with equal ones share the factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShareKey {
    needs: Needs,
    sweeps: bool,
    damp: u64,
    ordered: bool,
}

/// A target at work.
pub struct Task<'a, B: Backend> {
    /// How linears are represented in it, and what it is made by.
    pub target: &'a dyn Target<B>,
    /// Where it is said what is finished, of a run that can be gone on with.
    pub journal: Option<&'a Journal>,
    /// What it writes into.
    pub sink: &'a dyn Sink<B>,
    /// What each of its linears takes, by module, for the progress.
    costs: HashMap<String, u64>,
    /// What was seen before every linear, by llama.cpp's names, where an imatrix is to be written.
    collected: BTreeMap<String, ImatrixEntry>,
    /// What the journal has of it: entries of `done`, and what was collected since.
    journaled: [usize; 3],
    new: BTreeMap<String, ImatrixEntry>,
    /// What was done for it so far.
    pub done: Done,
    /// Tensors beside the linears that lose values.
    pub lost: Vec<Lost>,
}

/// What solving takes besides the weights.
pub struct Work<'w, 'a, B: Backend> {
    /// Where weights and Hessians are.
    pub backend: &'a B,
    /// Where the weights come from, for messages.
    pub source: &'a Checkpoint,
    /// Where packed weights are handed over, to be written in order while the next ones are solved.
    pub behind: &'w Behind<Write<'a>>,
    /// Steps by one for each linear.
    pub progress: &'w Progress,
    /// Whether the stream sees what this target holds.
    pub leads: bool,
    /// The largest magnitude of all linears that read the input, where a scale is common to them.
    pub reach: Option<f32>,
}

/// What chooses codes as a recipe says, with scales as `observer` does.
pub fn solver<B: Backend>(recipe: &Recipe, observer: Observer) -> Box<dyn Solver<B>> {
    if recipe.method.sweeps() {
        let Recipe { damp, act_order, desc_act, refine, .. } = *recipe;
        Box::new(Gptq { observer, damp, act_order, desc_act, refine })
    } else {
        Box::new(Rtn { observer })
    }
}

/// A matrix that is to be solved: the linear's own, or rows of it.
enum Wanted<'m, M> {
    Whole(&'m M),
    Part(M),
}

impl<M> Wanted<'_, M> {
    fn matrix(&self) -> &M {
        match self {
            Wanted::Whole(matrix) => matrix,
            Wanted::Part(matrix) => matrix,
        }
    }
}

/// How a placement is solved; those that are solved alike may be solved together.
#[derive(PartialEq)]
struct Kind<'p> {
    /// How its scales are chosen.
    observer: Observer,
    /// Its columns are no inputs of the linear, and it is looked at by itself.
    transposed: bool,
    /// The order in which it has the inputs, where that is not their own.
    columns: Option<&'p [usize]>,
}

/// A matrix with what was found for it.
type Answer<'m, B> = (Wanted<'m, <B as Memory>::Matrix>, Solved<B>);

/// What was found of one linear, put together of its placements.
#[derive(Default)]
struct Found {
    proxy_loss: Option<f64>,
    /// Of several placements the worst.
    relative_error: Option<f64>,
    damp: Option<f64>,
    /// Weights that no scale holds.
    lost: usize,
    /// Of every placement whether it was recovered to the bit, where it lay on a grid already.
    exact: Vec<Option<bool>>,
    swept: bool,
}

impl<'a, B: Backend> Task<'a, B> {
    /// Nothing is done yet.
    pub fn new(
        target: &'a dyn Target<B>,
        journal: Option<&'a Journal>,
        sink: &'a dyn Sink<B>,
        costs: HashMap<String, u64>,
    ) -> Task<'a, B> {
        let (collected, done, lost) = (BTreeMap::new(), Done::default(), Vec::new());
        Task { target, journal, sink, costs, collected, journaled: [0; 3], new: BTreeMap::new(), done, lost }
    }

    /// What was done, with the times that are `shared` with other targets.
    pub fn end(mut self, shared: &Stages) -> (Done, Vec<Lost>) {
        let Stages { load, forward, observe, smooth, factor, .. } = *shared;
        let own = self.done.seconds;
        self.done.seconds = Stages { load, forward, observe, smooth, factor, ..own };
        (self.done, self.lost)
    }

    /// How the Hessian of linears is factored for it; `None` where all of them stay as they are.
    pub fn key(&self, group: &[&Linear]) -> Option<ShareKey> {
        let recipe = self.target.recipe();
        let mut placements = group.iter().flat_map(|linear| self.target.placements(linear)).peekable();
        placements.peek()?;
        let sweeps = recipe.method.sweeps() && placements.any(|placement| placement.encoding.has_codes());
        let damp = if sweeps { recipe.damp.to_bits() } else { 0 };
        let ordered = sweeps && (recipe.act_order || recipe.desc_act);
        Some(ShareKey { needs: self.target.needs(), sweeps, damp, ordered })
    }

    /// Factors what was seen, as the key says.
    pub fn share<'s>(&self, backend: &B, key: ShareKey, seen: &'s Observed<B>) -> Result<Shared<'s, B>> {
        let statistics = seen.of(key.needs);
        if !key.sweeps {
            return Ok(Shared { statistics, factor: None, fallback: None });
        }
        let recipe = self.target.recipe();
        Ok(solver::<B>(recipe, recipe.observer()).share(backend, statistics)?)
    }

    /// Rounds a linear in the target's own way, if it has one.
    pub fn round(&mut self, backend: &B, linear: &Linear, progress: &Progress) -> Result<bool> {
        let started = Instant::now();
        let Some(rounded) = self.sink.round(backend, linear)? else { return Ok(false) };
        let seconds = started.elapsed().as_secs_f64();
        self.done.seconds.solve += seconds;
        let report = LinearReport {
            fallback: self.target.fallback(linear),
            recovered: rounded.recovered,
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
        let placements: Vec<&[Placement]> = group.iter().map(|linear| self.target.placements(linear)).collect();
        let mut solved = self.solve(work, group, loaded, &placements, statistics, shared)?.into_iter();
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
            let solved: Vec<Answer<'_, B>> = solved.by_ref().take(placements.len()).collect();
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
                recovered: Recovery::of(found.exact),
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
        work: &Work<'_, 'a, B>,
        group: &[&Linear],
        loaded: &'m [Weight<B::Matrix>],
        placements: &[&[Placement]],
        statistics: Option<&Statistics<B>>,
        shared: Option<&Shared<'_, B>>,
    ) -> Result<Vec<Answer<'m, B>>> {
        let Some(shared) = shared else { return Ok(Vec::new()) };
        let backend = work.backend;
        let mut all = Vec::new();
        for ((linear, weight), placements) in group.iter().zip(loaded).zip(placements) {
            for (at, placement) in placements.iter().enumerate() {
                let importance = self.importance(linear, at, placement, statistics)?;
                all.push((placement, importance, wanted(backend, linear, &weight.matrix, placement)?));
            }
        }
        let alone = Shared { statistics: None, factor: None, fallback: None };
        let mut solutions: Vec<Option<Solved<B>>> = all.iter().map(|_| None).collect();
        // Those that are solved alike are swept side by side.
        let kinds: Vec<Kind<'_>> =
            all.iter().map(|(placement, importance, _)| self.kind(placement, importance.is_some())).collect();
        for (first, kind) in kinds.iter().enumerate() {
            if kinds[..first].contains(kind) {
                continue;
            }
            let alike: Vec<usize> = (0..all.len()).filter(|at| kinds[*at] == kinds[first]).collect();
            let ask = |at: &usize| {
                let (placement, importance, wanted) = &all[*at];
                let weight = wanted.matrix();
                let mut spec = GridSpec::of(placement.encoding, backend.shape(weight)[1]);
                let global = |reach| kernels::global_scale(&placement.encoding, reach);
                spec.global = placement.encoding.global.and(work.reach).map(global);
                Asked { weight, spec, importance: importance.as_deref() }
            };
            let asked: Vec<Asked<'_, B>> = alike.iter().map(ask).collect();
            let found = match kind {
                Kind { observer, transposed: true, .. } => {
                    Rtn { observer: *observer }.solve(backend, &alone, &asked)?
                }
                Kind { observer, columns: None, .. } => {
                    solver(self.target.recipe(), *observer).solve(backend, shared, &asked)?
                }
                Kind { observer, columns: Some(columns), .. } => {
                    let ordered = statistics.map(|seen| seen.ordered(backend, columns)).transpose()?;
                    let solver = solver(self.target.recipe(), *observer);
                    let own = match shared.factor {
                        Some(_) => solver.share(backend, ordered.as_ref())?,
                        None => Shared { statistics: ordered.as_ref(), factor: None, fallback: None },
                    };
                    solver.solve(backend, &own, &asked)?
                }
            };
            for (at, mut solution) in alike.into_iter().zip(found) {
                let blocks = all[at].0.encoding.ggml_type().is_some();
                let rows = blocks.then(|| solution.rows(backend)).transpose()?;
                solutions[at] = Some(Solved { solution, rows });
            }
        }
        let found = all.into_iter().zip(solutions);
        Ok(found.map(|((_, _, wanted), solved)| (wanted, solved.expect("one for each"))).collect())
    }

    /// What the columns of a placement count, where that is not left to the observer.
    fn importance(
        &self,
        linear: &Linear,
        at: usize,
        placement: &Placement,
        statistics: Option<&Statistics<B>>,
    ) -> Result<Option<Vec<f32>>> {
        if let Some(read) = self.target.importance(linear, at)? {
            return Ok(Some(read));
        }
        // Columns of what is turned round are no inputs of the linear.
        let seen = statistics.filter(|s| !placement.transposed && s.count > 0.0 && !self.target.takes_importance());
        let blocks = placement.encoding.ggml_type().is_some();
        let importance = seen.filter(|_| blocks).map(Statistics::importance);
        Ok(importance.map(|of_inputs| match &placement.columns {
            Some(columns) => columns.iter().map(|column| of_inputs[*column]).collect(),
            None => of_inputs,
        }))
    }

    /// How a placement is solved.
    fn kind<'p>(&self, placement: &'p Placement, importance: bool) -> Kind<'p> {
        let observer = match self.target.recipe().observer() {
            // Nothing is known of its columns.
            Observer::Imatrix | Observer::Clip if placement.encoding.ggml_type().is_some() && !importance => {
                Observer::MinMax
            }
            // Where a file is silent, all of them count alike.
            Observer::Imatrix if !importance && self.target.takes_importance() => Observer::Mse,
            observer => observer,
        };
        Kind { observer, transposed: placement.transposed, columns: placement.columns.as_deref() }
    }

    /// How good the solutions of a linear are; fails where no scale holds its values.
    fn look(
        &self,
        work: &Work<'_, 'a, B>,
        linear: &Linear,
        placements: &[Placement],
        solved: &[Answer<'_, B>],
        shared: Option<&Shared<'_, B>>,
    ) -> Result<Found> {
        let backend = work.backend;
        let file = work.source.file_of(&linear.weight());
        let mut found = Found::default();
        for (at, (placement, (wanted, Solved { solution, rows }))) in placements.iter().zip(solved).enumerate() {
            let wanted = wanted.matrix();
            if let (Some(ty), Some(rows)) = (placement.encoding.ggml_type(), rows) {
                let names = [&*linear.weight(), &*self.target.called(linear, at)];
                found.lost +=
                    lost_in_blocks(ty, rows, file, names, || Ok(backend.download(wanted)?.iter().copied().collect()))?;
            } else if let Some(grid) = solution.grid() {
                found.lost += lost_in_grid(grid, file, &linear.weight(), || {
                    Ok([backend.download(wanted)?, backend.download(&solution.dequantized)?])
                })?;
            }
            found.exact.push(solution.recovered);
            if let Some(loss) = solution.proxy_loss {
                *found.proxy_loss.get_or_insert(0.0) += loss;
            }
            if let Some(error) = solution.relative_error {
                found.relative_error = Some(found.relative_error.map_or(error, |other| other.max(error)));
            }
            let factored = shared.is_some_and(|shared| shared.factor.is_some());
            if factored && !placement.transposed && placement.encoding.has_codes() {
                found.swept = true;
                found.damp = solution.damp;
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
        solved: Vec<Answer<'_, B>>,
    ) -> Result<Option<B::Matrix>> {
        let backend = work.backend;
        let (mut matrix, mut whole) = (None, None);
        for (at, (placement, (_, mut solved))) in placements.iter().zip(solved).enumerate() {
            if work.leads {
                let empty = backend.zeros(1, 1)?;
                let restored = std::mem::replace(&mut solved.solution.dequantized, empty);
                if placement.is_whole(linear) {
                    matrix = Some(restored);
                } else {
                    let whole = whole.get_or_insert_with(|| Array2::zeros((linear.rows, linear.cols)));
                    placement.place(backend.download(&restored)?.view(), whole);
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

    fn record(&mut self, report: LinearReport, progress: &Progress) -> Result<()> {
        progress.line(|| describe(&report));
        match &report.fallback {
            Some(_) => tracing::warn!(tokens = report.tokens, damp = report.damp, "{}", describe(&report)),
            None => tracing::debug!(tokens = report.tokens, damp = report.damp, "{}", describe(&report)),
        }
        let cost = self.costs.get(&report.name).copied().unwrap_or(0);
        self.done.linears.push(report);
        progress.step(cost)
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
                    .new
                    .entry(place.tensor.clone())
                    .or_insert_with(|| ImatrixEntry { sums: vec![0.0; matrices * width], counts: vec![0.0; matrices] });
                entry.sums[place.matrix * width..][..width].copy_from_slice(&place.ordered(energy.clone()));
                entry.counts[place.matrix] = statistics.count as f32;
            }
        }
    }

    /// What is new since the last block, with the tensors that were folded in it where it leads.
    pub fn finished(&mut self, folded: BTreeMap<String, Vec<u32>>) -> Finished {
        let [linears, smoothings, lost] = self.journaled;
        let done = &self.done;
        let importance = self.new.iter().map(|(name, entry)| (name.clone(), [bits(&entry.sums), bits(&entry.counts)]));
        let block = Finished {
            linears: done.linears[linears..].to_vec(),
            smoothings: done.smoothings[smoothings..].to_vec(),
            lost: done.lost[lost..].to_vec(),
            folded,
            importance: importance.collect(),
        };
        self.journaled = [done.linears.len(), done.smoothings.len(), done.lost.len()];
        self.collected.append(&mut self.new);
        block
    }

    /// Takes the first blocks as an earlier process has left them, and gives what it said of them.
    pub fn take_up(&mut self, blocks: usize, progress: &Progress) -> Result<&'a [Finished]> {
        let Some(journal) = self.journal else { return Ok(&[]) };
        let finished = journal.take_up(blocks)?;
        for block in finished {
            let done = &mut self.done;
            done.linears.extend(block.linears.iter().cloned());
            done.smoothings.extend(block.smoothings.iter().cloned());
            done.lost.extend(block.lost.iter().cloned());
            let costs = block.linears.iter().filter_map(|linear| self.costs.get(&linear.name));
            progress.skip(costs.sum());
            for (name, [sums, counts]) in &block.importance {
                let entry = ImatrixEntry { sums: values(sums), counts: values(counts) };
                self.collected.insert(name.clone(), entry);
            }
        }
        let done = &self.done;
        self.journaled = [done.linears.len(), done.smoothings.len(), done.lost.len()];
        Ok(finished)
    }

    /// The imatrix that is to be written, and where.
    pub fn imatrix(&self, samples: &Samples) -> Option<(PathBuf, Imatrix)> {
        let path = self.target.recipe().save_imatrix.clone()?;
        let imatrix = Imatrix {
            entries: self.collected.clone(),
            datasets: vec![called(&samples.source.name).to_owned()],
            chunk_count: samples.source.sequences as u32,
            chunk_size: samples.source.seq_len as u32,
            ..Imatrix::default()
        };
        Some((path, imatrix))
    }
}

/// Values as a journal holds them, so that they come back as they were.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// What a journal holds as such.
pub fn values(bits: &[u32]) -> Vec<f32> {
    bits.iter().copied().map(f32::from_bits).collect()
}

/// The matrix of a placement.
fn wanted<'m, B: Backend>(
    backend: &B,
    linear: &Linear,
    matrix: &'m B::Matrix,
    placement: &Placement,
) -> Result<Wanted<'m, B::Matrix>> {
    // A linear that is all there is needs no copy, whatever the order of its rows.
    if placement.is_whole(linear) {
        return Ok(Wanted::Whole(matrix));
    }
    let mut own = placement.rows.as_ref().map(|rows| backend.select_rows(matrix, rows)).transpose()?;
    if placement.factor != 1.0 {
        let mut scaled = own.map_or_else(|| backend.copy(matrix), Ok)?;
        let [rows, _] = backend.shape(&scaled);
        backend.scale(&mut scaled, &vec![placement.factor; rows], &[])?;
        own = Some(scaled);
    }
    if placement.reads_inputs() {
        return Ok(own.map_or(Wanted::Whole(matrix), Wanted::Part));
    }
    let mut host = backend.download(own.as_ref().unwrap_or(matrix))?;
    if let Some(columns) = &placement.columns {
        host = host.select(Axis(1), columns);
    }
    if !placement.transposed {
        return Ok(Wanted::Part(backend.upload(host)?));
    }
    Ok(Wanted::Part(backend.upload(host.reversed_axes().as_standard_layout().into_owned())?))
}

/// What a report says of a linear that was only rounded.
fn blank(linear: &Linear, encoding: &Encoding) -> LinearReport {
    let (ty, bits, group_size, symmetric) = described(encoding);
    let ty = ty.map(str::to_owned);
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
        recovered: None,
        lost: None,
        seconds: 0.0,
    }
}
