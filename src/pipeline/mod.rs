//! The walk: streams the samples through the model block by block, solves each linear when its input is known, and hands it to every
//! target before the next one.
//!
//! ```text
//! stream = embed(samples)
//! for block in blocks:
//!     fold channel scales into the block              # AWQ, as the leading target's types ask for it
//!     for stage in block:                             # linears that read one input
//!         seen   = statistics of that input           # once, whoever needs them
//!         factor = factored Hessian                   # once for all targets that damp and order alike
//!         for target in targets:
//!             for linear in stage: target ← solve(linear, seen, factor)
//!         stream ← stage(stream) with what the leading target's file holds of its weights
//! ```
//!
//! So the model is run once, each linear is calibrated on the output of quantized predecessors, and the leading target's bytes are those of
//! a run of it alone.

mod fold;
mod observe;
mod solve;

pub use solve::solver;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use calibration::samples::Samples;
use calibration::statistics::Needs;
use formats::Imatrix;
use kernels::Backend;

use self::observe::{Observed, Observer};
use self::solve::Task;
use crate::checkpoint::Checkpoint;
use crate::cost::Cost;
use crate::error::Result;
use crate::forward::{Ahead, Inputs, Others, Plain, Supply, Weight, embed, enter, load_bias, ready, run_block};
use crate::graph::{Block, Graph, Linear};
use crate::output::Staging;
use crate::output::behind::{Behind, behind, beside};
use crate::output::hashing::{Hashing, flushed, hash_written};
use crate::output::journal::Journal;
use crate::progress::Progress;
use crate::report::{LinearReport, SmoothingReport, Stages};
use crate::rest::{Lost, touched};
use crate::targets::{Folded, Target, Write};

/// What the walk did for one target.
pub struct Written {
    /// What stands of it in the report.
    pub done: Done,
    /// The imatrix that is to be written, and where.
    pub imatrix: Option<(PathBuf, Imatrix)>,
    /// Waits until the weights are on disk; their hashes.
    pub flushing: Hashing,
}

/// What each task did and lost, and the imatrices.
type Walked = (Vec<(Done, Vec<Lost>)>, Vec<Option<(PathBuf, Imatrix)>>);

/// What was done for one target, as far as it has got.
#[derive(Debug, Default)]
pub struct Done {
    /// Every quantized linear, in the order of the work.
    pub linears: Vec<LinearReport>,
    /// Every folded scale.
    pub smoothings: Vec<SmoothingReport>,
    /// Tensors that are written as plain numbers and lose values that are too small for them, with the share of these.
    pub lost: Vec<(String, f64)>,
    /// Where the time went; what targets share is counted for each.
    pub seconds: Stages,
}

/// Quantizes `source` for all of `targets`, of which the stream sees the one that leads.
///
/// `samples` may be absent only if no target needs anything. Fails on non-finite weights or activations.
pub fn quantize<B: Backend>(
    backend: &B,
    graph: &Graph,
    source: &Checkpoint,
    targets: &[(&dyn Target<B>, &Staging)],
    lead: usize,
    samples: Option<&Samples>,
    progress: &mut Progress,
) -> Result<Vec<Written>> {
    let sinks = targets.iter().map(|(target, staging)| target.open(source, staging)).collect::<Result<Vec<_>>>()?;
    let hashing = sinks.iter().map(|sink| Ok(hash_written(sink.follow()?))).collect::<Result<Vec<_>>>()?;
    let backend = &backend.relaxed();
    let costs: Vec<HashMap<String, u64>> =
        (0..targets.len()).map(|index| costs(graph, targets[index].0, index == lead, samples)).collect();
    progress.start("quantizing", costs.iter().flat_map(HashMap::values).sum())?;
    let ahead = Ahead::new(backend, source);
    let leader = targets[lead].0.recipe();
    let names: HashSet<String> = match leader.method.smooths() {
        true => {
            let all: Vec<_> = targets.iter().map(|(target, _)| *target).collect();
            walked(graph, &all).iter().flat_map(touched).collect()
        }
        false => HashSet::new(),
    };
    let early = |over: &AtomicBool| {
        sinks.iter().map(|sink| sink.beside(&|name| names.contains(name), over)).collect::<Result<Vec<_>>>()
    };
    let progress = &*progress;
    let run = || {
        behind(
            |write: Write<'_>| write(),
            |hand| {
                let all = targets.iter().zip(&sinks).zip(costs);
                let tasks =
                    all.map(|(((target, staging), sink), costs)| Task::new(*target, staging.journal(), &**sink, costs));
                let tasks = tasks.collect();
                let walk = Walk {
                    backend,
                    source,
                    ahead: &ahead,
                    tasks,
                    lead,
                    behind: hand,
                    progress,
                    observer: Observer::new(backend, source, targets.iter().map(|(target, _)| target.needs()), leader),
                    prepared: HashMap::new(),
                    folded: Folded::of(names.clone()),
                    final_block: false,
                    shared: Stages::default(),
                };
                walk.run(graph, samples)
            },
        )
    };
    let ((done, imatrices), early) = beside(early, run)?;
    let all = done.into_iter().zip(imatrices).zip(early).zip(sinks).zip(hashing);
    let written = all.map(|(((((mut done, late), imatrix), early), sink), hashing)| {
        let mut lost: Vec<Lost> = early.into_iter().chain(late).collect();
        lost.sort_by_key(|lost| lost.index);
        done.lost.extend(lost.into_iter().map(|lost| (lost.name, lost.share)));
        let finish = sink.finish();
        Written { done, imatrix, flushing: flushed(finish, hashing) }
    });
    Ok(written.collect())
}

/// What each linear takes that a target quantizes, by module; what all targets share is the leading one's.
fn costs<B: Backend>(
    graph: &Graph,
    target: &dyn Target<B>,
    leads: bool,
    samples: Option<&Samples>,
) -> HashMap<String, u64> {
    let tokens = samples.map_or(0, |samples| samples.source.tokens);
    let cost = Cost::of(target.recipe(), target.needs(), tokens);
    let mut costs = if leads { cost } else { cost.beside() }.of_linears(graph);
    for linear in graph.linears().filter(|linear| target.placements(linear).is_empty()) {
        costs.remove(&linear.module);
    }
    costs
}

/// The state of a walk. As a [`Supply`] it quantizes linears as their inputs become known.
struct Walk<'h, 'a, B: Backend> {
    backend: &'a B,
    source: &'a Checkpoint,
    ahead: &'a Ahead<'a, B>,
    tasks: Vec<Task<'a, B>>,
    /// The task of the target that the stream sees.
    lead: usize,
    behind: &'h Behind<Write<'a>>,
    progress: &'h Progress,
    observer: Observer<'a, B>,
    /// Weights of the current block that a transform has changed, by module.
    prepared: HashMap<String, Weight<B::Matrix>>,
    folded: Folded,
    final_block: bool,
    /// What is done once for all targets.
    shared: Stages,
}

/// Runs `f` and adds its time to `stage`.
fn timed<T>(stage: &mut f64, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let result = f();
    *stage += started.elapsed().as_secs_f64();
    result
}

impl<B: Backend> Walk<'_, '_, B> {
    fn run(mut self, graph: &Graph, samples: Option<&Samples>) -> Result<Walked> {
        let started = Instant::now();
        let (ahead, backend, source) = (self.ahead, self.backend, self.source);
        let smooths = self.smooths();
        self.before()?;
        let targets: Vec<_> = self.tasks.iter().map(|task| task.target).collect();
        let walked = walked(graph, &targets);
        let finished = self.take_up(walked)?;
        match samples {
            None => ahead.blocks(
                walked,
                || Ok(()),
                |(), _, block| {
                    block.steps.iter().flat_map(|step| step.layer.fused()).try_for_each(|group| self.round(&group))
                },
            )?,
            // All that is left is to look at what was written.
            Some(_) if finished == walked.len() => {}
            Some(samples) => {
                let begin = || {
                    let chunks = embed(backend, graph, source, &samples.sequences)?;
                    source.release(&graph.embedding.tensor);
                    Ok(chunks)
                };
                ahead.blocks(walked, begin, |chunks, index, block| {
                    enter(backend, block, chunks)?;
                    if index < finished {
                        return run_block(backend, block, source, &mut Again { walk: &mut self }, chunks);
                    }
                    if smooths {
                        self.smooth(block, chunks)?;
                    }
                    self.final_block = index + 1 == walked.len();
                    run_block(backend, block, source, &mut self, chunks)?;
                    self.prepared.clear();
                    self.observer.forget_layer();
                    self.finish(block)
                })?;
            }
        }
        let imatrices = self.tasks.iter().map(|task| task.imatrix(samples?)).collect();
        Ok((self.end(started)?, imatrices))
    }

    fn before(&mut self) -> Result<()> {
        let folded = &self.folded;
        for task in &mut self.tasks {
            let lost =
                timed(&mut task.done.seconds.write, || task.sink.before(self.backend, &|name| folded.touches(name)))?;
            task.lost.extend(lost);
        }
        Ok(())
    }

    /// Takes the first blocks as an earlier process has left them, as many as every target has; their number.
    fn take_up(&mut self, blocks: &[Block]) -> Result<usize> {
        let finished = self.tasks.iter().map(|task| task.journal.map_or(0, Journal::finished));
        let finished = finished.min().unwrap_or(0).min(blocks.len());
        for block in &blocks[..finished] {
            for linear in block.linears() {
                self.tasks.iter().try_for_each(|task| task.sink.keep_written(linear))?;
            }
        }
        for (index, task) in self.tasks.iter_mut().enumerate() {
            let taken = task.take_up(finished, self.progress)?;
            // The stream has seen what the leading one's file holds.
            for (name, bits) in taken.iter().filter(|_| index == self.lead).flat_map(|block| &block.folded) {
                self.folded.change(name.clone(), solve::values(bits));
            }
        }
        if self.smooths() {
            blocks[..finished].iter().try_for_each(|block| self.write_folded(&touched(block)))?;
        }
        Ok(finished)
    }

    /// Writes what a transform may have changed of a block.
    fn write_folded(&mut self, names: &HashSet<String>) -> Result<()> {
        let (backend, folded) = (self.backend, &self.folded);
        for task in &mut self.tasks {
            let write = || task.sink.write_folded(backend, folded, &|name| names.contains(name));
            task.lost.extend(timed(&mut task.done.seconds.write, write)?);
        }
        Ok(())
    }

    /// A block is finished: says so in the journals, once all of it is on the disk.
    fn finish(&mut self, block: &Block) -> Result<()> {
        let mut folded = BTreeMap::new();
        if self.smooths() {
            let names = touched(block);
            self.write_folded(&names)?;
            folded.extend(
                names.into_iter().filter_map(|name| Some((name.clone(), solve::bits(self.folded.values(&name)?)))),
            );
        }
        for (index, task) in self.tasks.iter_mut().enumerate() {
            let folded = if index == self.lead { std::mem::take(&mut folded) } else { BTreeMap::new() };
            let block = task.finished(folded);
            let (sink, journal) = (task.sink, task.journal);
            if let Some(journal) = journal {
                self.behind.hand_over(Box::new(move || {
                    sink.sync()?;
                    journal.add(&block)
                }))?;
            }
        }
        Ok(())
    }

    /// Whether channel scales are folded into the model, which the leading target decides.
    fn smooths(&self) -> bool {
        self.tasks[self.lead].target.recipe().method.smooths()
    }

    /// Gives what was done, with the seconds that all targets share, and what is left of them as those of running the model.
    fn end(self, started: Instant) -> Result<Vec<(Done, Vec<Lost>)>> {
        let mut shared = Stages { observe: self.observer.seconds, ..self.shared };
        let own = |task: &Task<'_, B>| task.done.seconds.solve + task.done.seconds.write;
        let others: f64 = self.tasks.iter().map(own).sum();
        shared.forward =
            started.elapsed().as_secs_f64() - shared.load - shared.observe - shared.smooth - shared.factor - others;
        Ok(self.tasks.into_iter().map(|task| task.end(&shared)).collect())
    }

    fn load(&mut self, linear: &Linear) -> Result<Weight<B::Matrix>> {
        match self.prepared.remove(&linear.module) {
            Some(weight) => Ok(weight),
            None => {
                let plain = self.ahead.plain();
                timed(&mut self.shared.load, || plain.load(linear))
            }
        }
    }

    /// Quantizes linears whose input, which they read together, nobody looks at.
    fn round(&mut self, group: &[&Linear]) -> Result<()> {
        let all = self.all();
        let reach = self.reach(group, &all)?;
        for linear in group {
            let mut left = Vec::new();
            for index in &all {
                if !self.tasks[*index].round(self.backend, linear, self.progress)? {
                    left.push(*index);
                }
            }
            if !left.is_empty() {
                self.quantize(&[linear], &Observed::nothing(), &left, reach)?;
            }
        }
        Ok(())
    }

    /// Quantizes and writes the planned linears of a group for these tasks, which may have a scale in common for weights that go up to
    /// `reach`; returns what the leading target's file will hold of each.
    fn quantize(
        &mut self,
        group: &[&Linear],
        seen: &Observed<B>,
        tasks: &[usize],
        reach: Option<f32>,
    ) -> Result<Vec<Weight<B::Weight>>> {
        let backend = self.backend;
        for index in tasks {
            self.tasks[*index].collect(group, seen);
        }
        // Targets that damp and order alike share a factorization.
        let shares: Vec<Option<solve::ShareKey>> = tasks.iter().map(|index| self.tasks[*index].key(group)).collect();
        let mut factored = Vec::new();
        for (at, key) in shares.iter().enumerate() {
            let Some(key) = key else { continue };
            if shares[..at].contains(&Some(*key)) {
                continue;
            }
            let task = &self.tasks[tasks[at]];
            let shared = timed(&mut self.shared.factor, || task.share(backend, *key, seen))?;
            factored.push((*key, shared));
        }
        let of = |key: &Option<solve::ShareKey>| {
            let key = key.as_ref()?;
            factored.iter().find(|(known, _)| known == key).map(|(_, shared)| shared)
        };
        let mut weights = Vec::new();
        let mut rest = group;
        while !rest.is_empty() {
            let mut rows = 0;
            let fits = |linear: &&&Linear| {
                rows += linear.rows;
                rows <= backend.rows_at_once()
            };
            let (now, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            rest = later;
            let mut loaded = now.iter().map(|linear| self.load(linear)).collect::<Result<Vec<_>>>()?;
            for (index, key) in tasks.iter().zip(&shares) {
                let work = solve::Work {
                    backend,
                    source: self.source,
                    behind: self.behind,
                    progress: self.progress,
                    leads: *index == self.lead,
                    reach,
                };
                let held = self.tasks[*index].quantize(&work, now, &loaded, seen, of(key))?;
                for (weight, held) in loaded.iter_mut().zip(held) {
                    if let Some(held) = held {
                        weight.matrix = held;
                    }
                }
            }
            for (linear, weight) in now.iter().zip(loaded) {
                weights.extend(ready(backend, linear, weight)?);
            }
        }
        Ok(weights)
    }

    /// The largest magnitude of linears that read one input, where one of these tasks has a scale that they have in common: runtimes fuse
    /// q, k and v, and gate and up, and keep one such scale of what they have fused.
    fn reach(&mut self, group: &[&Linear], tasks: &[usize]) -> Result<Option<f32>> {
        let mut reach = None;
        for linear in group {
            let mut placements = tasks.iter().flat_map(|index| self.tasks[*index].target.placements(linear));
            if placements.any(|placement| placement.encoding.global.is_some()) {
                let values = match self.prepared.get(&linear.module) {
                    Some(weight) => self.backend.download(&weight.matrix)?,
                    None => self.backend.download(&self.ahead.plain().load(linear)?.matrix)?,
                };
                reach = Some(values.iter().fold(reach.unwrap_or(0.0f32), |reach, x| reach.max(x.abs())));
            }
        }
        Ok(reach)
    }

    /// All tasks, that of the leading target last: what the stream will see of a weight need not wait while others are solved.
    fn all(&self) -> Vec<usize> {
        let others = (0..self.tasks.len()).filter(|index| *index != self.lead);
        others.chain([self.lead]).collect()
    }

    /// Whether anybody wants to know what linears read.
    fn wanted(&self, group: &[&Linear]) -> bool {
        let wants = |task: &Task<'_, B>| {
            // An imatrix has entries for linears that stay as they are, too.
            let of =
                |l: &&Linear| !task.target.placements(l).is_empty() || !task.target.importance_places(l).is_empty();
            task.target.needs() > Needs::Nothing && group.iter().any(of)
        };
        self.tasks.iter().any(wants)
    }
}

impl<B: Backend> Supply<B> for Walk<'_, '_, B> {
    fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        match self.folded.values(name) {
            Some(changed) => Ok(changed.to_vec()),
            None => self.source.load(name),
        }
    }

    fn linears(&mut self, group: &[&Linear], inputs: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>> {
        let seen = match self.wanted(group) {
            true => self.observer.observe(group[0], inputs)?,
            false => Observed::nothing(),
        };
        let all = self.all();
        let reach = self.reach(group, &all)?;
        self.quantize(group, &seen, &all, reach)
    }

    fn expert(
        &mut self,
        group: &[&Linear],
        inputs: &Inputs<'_, B::Input>,
        others: &Others<'_, B::Input>,
    ) -> Result<Vec<Weight<B::Weight>>> {
        let seen = match self.wanted(group) {
            true => self.observer.observe_expert(group[0], inputs, others)?,
            false => Observed::nothing(),
        };
        let all = self.all();
        let reach = self.reach(group, &all)?;
        self.quantize(group, &seen, &all, reach)
    }

    fn router(&mut self, linear: &Linear) -> Result<Vec<Weight<B::Weight>>> {
        Supply::<B>::router(&mut Plain::exact(self.backend, self.source), linear)
    }

    fn needs_output(&self) -> bool {
        !self.final_block
    }
}

/// Runs a block that an earlier process has finished, with what the leading target's file holds of it.
struct Again<'w, 'h, 'a, B: Backend> {
    walk: &'w mut Walk<'h, 'a, B>,
}

impl<B: Backend> Supply<B> for Again<'_, '_, '_, B> {
    fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        self.walk.vector(name)
    }

    fn linears(&mut self, group: &[&Linear], _: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>> {
        let (backend, source) = (self.walk.backend, self.walk.source);
        let sink = self.walk.tasks[self.walk.lead].sink;
        let mut weights = Vec::new();
        for linear in group {
            let Some(matrix) = timed(&mut self.walk.shared.load, || sink.held(backend, linear))? else {
                weights.extend(ready(backend, linear, self.walk.load(linear)?)?);
                continue;
            };
            let bias = match linear.bias().and_then(|name| self.walk.folded.values(&name)) {
                Some(changed) => Some(changed.to_vec()),
                None => load_bias(source, linear)?,
            };
            weights.extend(ready(backend, linear, Weight { matrix, bias, rounding: None })?);
        }
        Ok(weights)
    }

    fn router(&mut self, linear: &Linear) -> Result<Vec<Weight<B::Weight>>> {
        self.walk.router(linear)
    }
}

/// The blocks that are gone through: those that predict further tokens only as far as somebody quantizes them.
fn walked<'g, B: Backend>(graph: &'g Graph, targets: &[&dyn Target<B>]) -> &'g [Block] {
    let wanted = |linear: &Linear| targets.iter().any(|target| !target.placements(linear).is_empty());
    let last = graph.predictors().iter().rposition(|block| block.linears().any(wanted));
    &graph.blocks[..graph.trunk().len() + last.map_or(0, |last| last + 1)]
}

/// One line for a linear.
pub fn describe(report: &LinearReport) -> String {
    let error = report.relative_error.map_or(String::new(), |e| format!("  error {:.4} %", 100.0 * e));
    let fallback = report.fallback.as_ref().map_or(String::new(), |f| format!("  {f}"));
    let LinearReport { name, bits, group_size, method, seconds, .. } = report;
    let kind = report.ty.clone().unwrap_or_else(|| format!("w{bits} g{group_size}"));
    format!("{name:44} {method} {kind}{error}  {seconds:.2} s{fallback}")
}
