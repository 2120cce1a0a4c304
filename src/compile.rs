//! The pipeline: stream the samples through the model block by block, quantize each linear when its input is known, and
//! write it before the next one.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use calibration::samples::Samples;
use calibration::solvers::{Asked, Gptq, Observer, Rtn, Shared, Solution, Solver};
use calibration::statistics::{Needs, Statistics};
use calibration::transforms::{Awq, Slot, Tie};
use formats::tensor::narrow;
use formats::{PackedWeight, Scheme, ShardedWriter};
use kernels::{Backend, GridSpec};
use serde::Serialize;

use crate::behind::{Behind, behind, beside};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::evidence::{check_measured, dead_inputs, lost_in_grid, prior_share};
use crate::forward::{Ahead, Chunk, Inputs, Others, Plain, Supply, Weight, embed, ready, run_block};
use crate::graph::{Attention, Block, Graph, Layer, Linear, Mlp, Norm, Projections, Stored};
use crate::output::weight_writer;
use crate::plan::Plan;
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::{Hashing, flushed, hash_written};
use crate::rest::{Lost, Rest, copied, rest, touched, write_floats};

/// What became of one linear.
#[derive(Clone, Debug, Serialize)]
pub struct LinearReport {
    /// The module.
    pub name: String,
    /// The method that chose its codes.
    pub method: String,
    /// The type of its blocks, in a GGUF file.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub ty: Option<&'static str>,
    /// Width of a code.
    pub bits: u8,
    /// Columns per scale; −1 for a whole row.
    pub group_size: i64,
    /// Symmetric grid.
    pub symmetric: bool,
    /// Calibration tokens that its input was seen on.
    pub tokens: usize,
    /// Share of what is known of an expert's input that came from tokens of the other experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prior: Option<f64>,
    /// Share of its input's channels that were 0 for all of these tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_inputs: Option<f64>,
    /// Relative damping that was used.
    pub damp: Option<f64>,
    /// What was done in place of what was asked for.
    pub fallback: Option<String>,
    /// `tr((W − Ŵ) H (W − Ŵ)ᵀ)` per token.
    pub proxy_loss: Option<f64>,
    /// Share of the output's energy that is lost.
    pub relative_error: Option<f64>,
    /// Share of its weights that are too small for the scales that the file stores, and lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<f64>,
    /// Time to choose its codes.
    pub seconds: f64,
}

/// Channel scales that were folded into the model before it was quantized.
#[derive(Clone, Debug, Serialize)]
pub struct SmoothingReport {
    /// What the scales were divided out of.
    pub producer: String,
    /// The linears that read them.
    pub readers: Vec<String>,
    /// The exponent of the activations' magnitude.
    pub alpha: f32,
    /// Rounding loss with the scales as a share of the loss without.
    pub loss_ratio: f64,
}

/// Seconds by stage.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Stages {
    /// Reading and widening weights.
    pub load: f64,
    /// Running the model.
    pub forward: f64,
    /// Gathering statistics of inputs.
    pub observe: f64,
    /// Searching channel scales.
    pub smooth: f64,
    /// Ordering and factoring Hessians.
    pub factor: f64,
    /// Searching scales, choosing codes, measuring the loss.
    pub solve: f64,
    /// Packing, and writing as far as it is not done behind the rest.
    pub write: f64,
}

/// What a compilation did.
pub struct Compiled {
    /// Everything else.
    pub done: Done,
    /// Waits until the weights are on disk; their hashes.
    pub flushing: Hashing,
}

/// What a compilation did, as far as it has got.
#[derive(Debug, Default)]
pub struct Done {
    /// Every quantized linear, in the order of the work.
    pub linears: Vec<LinearReport>,
    /// Every folded scale.
    pub smoothings: Vec<SmoothingReport>,
    /// Tensors that are written as plain numbers and lose values that are too small for them, with the share of these.
    pub lost: Vec<(String, f64)>,
    /// Where the time went.
    pub seconds: Stages,
}

/// What a recipe needs to know of the inputs.
pub fn needs(recipe: &Recipe) -> Needs {
    if recipe.method.smooths() || recipe.method.sweeps() { Needs::Hessian } else { recipe.observer().needs() }
}

fn solver<B: Backend>(recipe: &Recipe) -> Box<dyn Solver<B>> {
    let observer: Observer = recipe.observer();
    if recipe.method.sweeps() {
        let (damp, act_order, desc_act) = (recipe.damp, recipe.act_order, recipe.desc_act);
        Box::new(Gptq { observer, damp, act_order, desc_act, refine: true })
    } else {
        Box::new(Rtn { observer })
    }
}

/// Quantizes `source` into safetensors files in `folder`.
///
/// `samples` may be absent only if the recipe [`needs`] nothing. Fails on non-finite weights or activations.
pub fn compile<B: Backend>(
    backend: &B,
    graph: &Graph,
    source: &Checkpoint,
    recipe: &Recipe,
    plan: &Plan,
    samples: Option<&Samples>,
    folder: &Path,
    progress: &mut Progress,
) -> Result<Compiled> {
    let writer = weight_writer(folder, plan.outputs.clone())?;
    let hashing = hash_written(writer.follow()?);
    let backend = &backend.relaxed();
    let solver = solver::<B>(recipe);
    progress.start("quantizing", plan.schemes.len());
    let ahead = Ahead::new(backend, source);
    let smoothed = if recipe.method.smooths() { touched(graph) } else { HashSet::new() };
    let (now, later): (Vec<Rest<'_>>, Vec<Rest<'_>>) =
        rest(plan).into_iter().partition(|rest| !smoothed.contains(rest.name));
    let run = |hand: &Behind<Packed>| {
        let mut work = Work {
            backend,
            source,
            ahead: &ahead,
            plan,
            method: recipe.method.name(),
            solver: &*solver,
            writer: &writer,
            behind: hand,
            progress,
            prepared: HashMap::new(),
            changed: HashMap::new(),
            layer: None,
            all_experts: recipe.moe_all_experts,
            final_block: false,
            done: Done::default(),
        };
        match samples {
            None => ahead.blocks(
                &graph.blocks,
                || Ok(()),
                |(), _, block| block.linears().try_for_each(|linear| work.quantize(&[linear], None).map(drop)),
            )?,
            Some(samples) => {
                let started = Instant::now();
                let begin = || {
                    let chunks = embed(backend, graph, source, &samples.sequences)?;
                    source.release(&graph.embedding.tensor);
                    Ok(chunks)
                };
                ahead.blocks(&graph.blocks, begin, |chunks, index, block| {
                    if recipe.method.smooths() {
                        work.smooth(block, chunks)?;
                    }
                    work.final_block = index + 1 == graph.blocks.len();
                    run_block(backend, block, &mut work, chunks)?;
                    work.prepared.clear();
                    work.layer = None;
                    Ok(())
                })?;
                let s = &mut work.done.seconds;
                s.forward =
                    started.elapsed().as_secs_f64() - s.load - s.observe - s.smooth - s.factor - s.solve - s.write;
            }
        }
        work.copy(&later)
    };
    // Embedding and head are the most of what stays, and are on the disk long before the last linear is solved.
    let copy = |over: &AtomicBool| copied(source, &now, &writer, over);
    let ((mut done, late), early) = beside(copy, || behind(|packed| write_packed(source, packed, plan, &writer), run))?;
    let mut lost: Vec<Lost> = early.into_iter().chain(late).collect();
    lost.sort_by_key(|lost| lost.index);
    done.lost.extend(lost.into_iter().map(|lost| (lost.name, lost.share)));
    let flushing = flushed(move || writer.finish(), hashing);
    Ok(Compiled { done, flushing })
}

/// The state of a compilation. As a [`Supply`] it quantizes linears as their inputs become known.
struct Work<'a, B: Backend> {
    backend: &'a B,
    source: &'a Checkpoint,
    ahead: &'a Ahead<'a, B>,
    plan: &'a Plan,
    method: &'static str,
    solver: &'a dyn Solver<B>,
    writer: &'a ShardedWriter,
    behind: &'a Behind<Packed>,
    progress: &'a Progress,
    /// Weights of the current block that a transform has changed, by module.
    prepared: HashMap<String, Weight<B::Matrix>>,
    /// Other tensors that a transform has changed, as they will be written.
    changed: HashMap<String, Vec<f32>>,
    /// Statistics of a layer's input over all tokens, and the layer's name.
    layer: Option<(String, Statistics<B>)>,
    all_experts: bool,
    final_block: bool,
    done: Done,
}

/// A linear that is to be written while the next one is solved.
struct Packed {
    module: String,
    /// Its weight's name in the input.
    tensor: String,
    weight: PackedWeight,
    /// Only where it is not written as a tensor of its own.
    bias: Option<Vec<f32>>,
}

fn write_packed(source: &Checkpoint, packed: Packed, plan: &Plan, writer: &ShardedWriter) -> Result<()> {
    let Packed { module, tensor, weight, bias } = packed;
    let parts = plan.codec.encode_packed(weight, plan.scale_dtype).map_err(|e| Error::from(e.in_tensor(tensor)))?;
    for (part, tensor) in &parts.0 {
        writer.write(&format!("{module}.{part}"), &tensor.data)?;
    }
    match bias {
        Some(bias) => write_floats(source, writer, &format!("{module}.bias"), plan.float_dtype, &bias).map(drop),
        None => Ok(()),
    }
}

/// Runs `f` and adds its time to `stage`.
fn timed<T>(stage: &mut f64, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let result = f();
    *stage += started.elapsed().as_secs_f64();
    result
}

/// Gathers statistics of what `first`, and whatever else reads its input, sees; fails on a NaN or an infinity in it.
pub fn observe<B: Backend>(
    backend: &B,
    source: &Checkpoint,
    first: &Linear,
    needs: Needs,
    inputs: &Inputs<'_, B::Input>,
    stage: &mut f64,
) -> Result<Statistics<B>> {
    let statistics = Statistics::gather(backend, first.cols, needs, |see| inputs(&mut |x| timed(stage, || see(x))))?;
    if !statistics.is_finite() {
        return Err(Error::failed(format!(
            "{}: the input of `{}` holds a NaN or an infinity on the calibration text; the checkpoint is damaged, or overflows",
            source.path().display(),
            first.module
        )));
    }
    Ok(statistics)
}

impl<B: Backend> Work<'_, B> {
    fn load(&mut self, linear: &Linear) -> Result<Weight<B::Matrix>> {
        match self.prepared.remove(&linear.module) {
            Some(weight) => Ok(weight),
            None => {
                let plain = self.ahead.plain();
                timed(&mut self.done.seconds.load, || plain.load(linear))
            }
        }
    }

    fn spec(&self, scheme: Scheme, cols: usize) -> GridSpec {
        let min_zero = if scheme.symmetric { 0 } else { self.plan.codec.min_zero() };
        GridSpec::of(scheme.encoding(self.plan.precision, min_zero), cols)
    }

    /// Gathers statistics of what a group of linears reads.
    fn observe(
        &mut self,
        group: &[&Linear],
        needs: Needs,
        inputs: &Inputs<'_, B::Input>,
    ) -> Result<Option<Statistics<B>>> {
        if needs == Needs::Nothing || group.iter().all(|l| !self.plan.schemes.contains_key(&l.module)) {
            return Ok(None);
        }
        observe(self.backend, self.source, group[0], needs, inputs, &mut self.done.seconds.observe).map(Some)
    }

    /// Quantizes and writes the planned linears of a group; returns what each will be in the file.
    fn quantize(&mut self, group: &[&Linear], statistics: Option<&Statistics<B>>) -> Result<Vec<Weight<B::Weight>>> {
        let (backend, solver) = (self.backend, self.solver);
        let planned = group.iter().any(|l| self.plan.schemes.contains_key(&l.module));
        let shared: Option<Shared<'_, B>> = match planned {
            true => Some(timed(&mut self.done.seconds.factor, || Ok(solver.share(backend, statistics)?))?),
            false => None,
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
            weights.extend(self.quantize_together(now, statistics, shared.as_ref())?);
        }
        Ok(weights)
    }

    /// The same for linears that are solved at once.
    fn quantize_together(
        &mut self,
        group: &[&Linear],
        statistics: Option<&Statistics<B>>,
        shared: Option<&Shared<'_, B>>,
    ) -> Result<Vec<Weight<B::Weight>>> {
        let (backend, solver) = (self.backend, self.solver);
        let loaded = group.iter().map(|linear| self.load(linear)).collect::<Result<Vec<_>>>()?;
        let schemes: Vec<Option<Scheme>> = group.iter().map(|l| self.plan.schemes.get(&l.module).copied()).collect();
        let asked = |weight, spec| Asked { weight, spec, importance: None };
        let planned: Vec<Asked<'_, B>> = (group.iter().zip(&loaded).zip(&schemes))
            .filter_map(|((linear, weight), scheme)| Some(asked(&weight.matrix, self.spec((*scheme)?, linear.cols))))
            .collect();
        let started = Instant::now();
        let mut solutions = match shared {
            Some(shared) => solver.solve(backend, shared, &planned)?,
            None => Vec::new(),
        }
        .into_iter();
        let seconds = started.elapsed().as_secs_f64();
        self.done.seconds.solve += seconds;
        let solved: usize = group.iter().zip(&schemes).filter(|(_, s)| s.is_some()).map(|(l, _)| l.rows * l.cols).sum();

        let mut weights = Vec::new();
        for ((linear, mut weight), scheme) in group.iter().zip(loaded).zip(schemes) {
            let Some((scheme, shared)) = scheme.zip(shared) else {
                if self.plan.unstacked(linear) {
                    self.write_plain(linear, &weight)?;
                }
                weights.extend(ready(backend, linear, weight)?);
                continue;
            };
            let mut solution = solutions.next().expect("one for each planned linear");
            let grid = solution.grid().expect("integers in groups have a grid");
            let lost = lost_in_grid(grid, self.source.file_of(&linear.weight()), &linear.weight(), || {
                Ok([backend.download(&weight.matrix)?, backend.download(&solution.dequantized)?])
            })?;
            weight.matrix = std::mem::replace(&mut solution.dequantized, weight.matrix);
            let tokens = statistics.map_or(0, |s| s.tokens);
            let count = statistics.map_or(1.0, |s| s.count.max(1.0));
            let report = LinearReport {
                name: linear.module.clone(),
                method: if shared.factor.is_none() && solver.id() == "gptq" { "rtn" } else { self.method }.to_owned(),
                ty: None,
                bits: scheme.bits,
                group_size: scheme.group.map_or(-1, |g| g as i64),
                symmetric: scheme.symmetric,
                tokens,
                prior: statistics.and_then(prior_share),
                dead_inputs: statistics.and_then(dead_inputs),
                damp: solution.damp,
                fallback: solution.fallback.take(),
                proxy_loss: solution.proxy_loss.map(|loss| loss / count),
                relative_error: solution.relative_error,
                lost: (lost > 0).then(|| lost as f64 / (linear.rows * linear.cols) as f64),
                seconds: seconds * (linear.rows * linear.cols) as f64 / solved as f64,
            };
            check_measured(&report)?;
            let started = Instant::now();
            self.write(linear, solution, weight.bias.as_deref())?;
            self.done.seconds.write += started.elapsed().as_secs_f64();
            self.progress.line(|| describe(&report));
            self.progress.step();
            self.done.linears.push(report);
            weights.extend(ready(backend, linear, weight)?);
        }
        Ok(weights)
    }

    /// Packs what was found for a linear, and has it written.
    fn write(&self, linear: &Linear, solution: Solution<B>, bias: Option<&[f32]>) -> Result<()> {
        self.behind.hand_over(Packed {
            module: linear.module.clone(),
            tensor: linear.weight(),
            weight: solution.packed(self.backend, self.plan.codec.word_layout())?,
            bias: bias.filter(|_| matches!(linear.stored, Stored::Slice { .. })).map(<[f32]>::to_vec),
        })
    }

    /// Writes an expert that stays as it is, out of a stack of which others are quantized.
    fn write_plain(&mut self, linear: &Linear, weight: &Weight<B::Matrix>) -> Result<()> {
        let values = self.backend.download(&weight.matrix)?;
        let (dtype, name) = (self.plan.float_dtype, format!("{}.weight", linear.module));
        let values = values.as_slice().expect("contiguous");
        let lost = write_floats(self.source, self.writer, &name, dtype, values)?;
        self.done.lost.extend(lost.map(|share| (name, share)));
        match &weight.bias {
            Some(bias) => {
                write_floats(self.source, self.writer, &format!("{}.bias", linear.module), dtype, bias).map(drop)
            }
            None => Ok(()),
        }
    }

    /// Writes the tensors that a transform may have changed, and ends.
    fn copy(mut self, rest: &[Rest<'_>]) -> Result<(Done, Vec<Lost>)> {
        let started = Instant::now();
        let mut all = Vec::new();
        for rest in rest {
            let lost = match self.changed.get(rest.name) {
                Some(values) => write_floats(self.source, self.writer, rest.name, rest.dtype, values)?,
                None => rest.copy(self.source, self.writer)?,
            };
            all.extend(rest.lost(lost));
        }
        self.done.seconds.write += started.elapsed().as_secs_f64();
        Ok((self.done, all))
    }

    /// Rescales the channels of a block so that it is easier to quantize, and leaves its function as it is.
    fn smooth(&mut self, block: &Block, chunks: &[Chunk<B::Matrix>]) -> Result<()> {
        let backend = self.backend;
        let mut copies = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            copies.push(Chunk { hidden: backend.copy(&chunk.hidden)?, lengths: chunk.lengths.clone() });
        }
        let mut seen = FloatPass { work: self, statistics: HashMap::new() };
        run_block(backend, block, &mut seen, &mut copies)?;
        let statistics = seen.statistics;
        let started = Instant::now();
        for linear in block.linears() {
            let weight = self.load(linear)?;
            self.prepared.insert(linear.module.clone(), weight);
        }
        self.smooth_norms(block, &statistics)?;
        for step in &block.steps {
            match &step.layer {
                Layer::Attention(attention) => self.smooth_attention(attention, &statistics)?,
                Layer::Mlp(mlp) => self.smooth_mlp(mlp, &statistics)?,
                Layer::Moe(moe) => {
                    for mlp in moe.experts.iter().chain(moe.shared.as_ref().map(|(shared, _)| shared)) {
                        self.smooth_mlp(mlp, &statistics)?;
                    }
                }
                Layer::Opaque(_) => {}
            }
        }
        self.done.seconds.smooth += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Folds scales into the norms of a block, each with all the linears that read it.
    ///
    /// A mixture's input is left alone: its router, which is never quantized, would be rounded once more.
    fn smooth_norms(&mut self, block: &Block, seen: &HashMap<String, Statistics<B>>) -> Result<()> {
        let mut slots: Vec<(&Norm, Vec<&Linear>)> = Vec::new();
        for step in &block.steps {
            let Some(norm) = step.pre.as_ref().filter(|norm| norm.weights.len() == 1) else { continue };
            let readers = match &step.layer {
                Layer::Moe(_) | Layer::Opaque(_) => continue,
                layer => layer.linears().swap_remove(0),
            };
            match slots.iter_mut().find(|(other, _)| other.weights == norm.weights) {
                Some((_, all)) => all.extend(readers),
                None => slots.push((norm, readers)),
            }
        }
        slots.into_iter().try_for_each(|(norm, readers)| self.smooth_norm(norm, &readers, seen))
    }

    fn smooth_attention(&mut self, attention: &Attention, seen: &HashMap<String, Statistics<B>>) -> Result<()> {
        let Attention { projections: Projections::Direct(linears), o, shape, clip: None, .. } = attention else {
            return Ok(());
        };
        let v = linears.last().expect("values come last");
        let repeat = shape.heads / shape.kv_heads;
        let tie = match repeat {
            1 => Tie::Free,
            _ => Tie::Heads { head_dim: shape.value_dim, repeat },
        };
        self.smooth_linear(v, o, tie, seen)
    }

    fn smooth_mlp(&mut self, mlp: &Mlp, seen: &HashMap<String, Statistics<B>>) -> Result<()> {
        // What is gated may be scaled, what is activated may not.
        if !mlp.gated() || matches!(mlp.activation, kernels::Activation::SwigluOai { .. }) {
            return Ok(());
        }
        self.smooth_linear(mlp.inputs.last().expect("gated"), &mlp.down, Tie::Free, seen)
    }

    /// Folds scales of the inputs of `readers` into the normalisation before them.
    fn smooth_norm(&mut self, norm: &Norm, readers: &[&Linear], seen: &HashMap<String, Statistics<B>>) -> Result<()> {
        let Some(producer) = self.smooth_readers(readers, Tie::Free, &norm.weights[0], seen)? else { return Ok(()) };
        let mut weight = self.source.load(&norm.weights[0])?;
        weight.iter_mut().zip(&producer).for_each(|(w, t)| *w = (*w + norm.offset) / t - norm.offset);
        self.store(&norm.weights[0], weight)?;
        if let Some(bias) = &norm.bias {
            let mut values = self.source.load(bias)?;
            values.iter_mut().zip(&producer).for_each(|(b, t)| *b /= t);
            self.store(bias, values)?;
        }
        Ok(())
    }

    /// Folds scales of the input of `reader` into the output rows of the last part of `producer`.
    fn smooth_linear(
        &mut self,
        producer: &Linear,
        reader: &Linear,
        tie: Tie,
        seen: &HashMap<String, Statistics<B>>,
    ) -> Result<()> {
        // A producer that is written in the model's own type would be rounded once more.
        if !self.plan.schemes.contains_key(&producer.module) {
            return Ok(());
        }
        let Some(scales) = self.smooth_readers(&[reader], tie, &producer.module, seen)? else { return Ok(()) };
        let mut inverse = vec![1.0; producer.rows];
        match producer.split.rows(producer.split.parts() - 1) {
            Some(rows) => rows.into_iter().zip(&scales).for_each(|(row, t)| inverse[row] = 1.0 / t),
            None => inverse.iter_mut().zip(&scales).for_each(|(row, t)| *row = 1.0 / t),
        }
        let weight = self.prepared.get_mut(&producer.module).expect("prepared");
        self.backend.scale(&mut weight.matrix, &inverse, &[])?;
        if let (Some(bias), Some(name)) = (&mut weight.bias, producer.bias()) {
            bias.iter_mut().zip(&inverse).for_each(|(b, t)| *b *= t);
            let mut bias = bias.clone();
            self.round_to_file(&mut bias)?;
            self.prepared.get_mut(&producer.module).expect("prepared").bias = Some(bias.clone());
            self.changed.insert(name, bias);
        }
        Ok(())
    }

    /// Searches the scales of one slot and multiplies the readers' columns; `None` when there is nothing to fold.
    fn smooth_readers(
        &mut self,
        readers: &[&Linear],
        tie: Tie,
        producer: &str,
        seen: &HashMap<String, Statistics<B>>,
    ) -> Result<Option<Vec<f32>>> {
        let Some(statistics) = seen.get(&readers[0].module).filter(|s| s.tokens > 0) else { return Ok(None) };
        let mut specs = Vec::new();
        for reader in readers {
            match self.plan.schemes.get(&reader.module) {
                Some(scheme) => specs.push(self.spec(*scheme, reader.cols)),
                // A reader that stays as it is would be rounded in the model's own type after the scaling.
                None => return Ok(None),
            }
        }
        let weights = readers.iter().map(|l| &self.prepared[&l.module].matrix);
        let slot = Slot { readers: weights.zip(&specs).collect(), statistics, tie };
        let found = Awq::default().scales(self.backend, &slot)?;
        self.done.smoothings.push(SmoothingReport {
            producer: producer.to_owned(),
            readers: readers.iter().map(|l| l.module.clone()).collect(),
            alpha: found.alpha,
            loss_ratio: if found.loss[0] > 0.0 { found.loss[1] / found.loss[0] } else { 1.0 },
        });
        if found.alpha == 0.0 {
            return Ok(None);
        }
        for reader in readers {
            let weight = self.prepared.get_mut(&reader.module).expect("prepared");
            self.backend.scale(&mut weight.matrix, &[], &found.reader)?;
        }
        Ok(Some(found.producer))
    }

    /// Remembers a changed tensor as the file will hold it, so that the stream sees exactly that.
    fn store(&mut self, name: &str, mut values: Vec<f32>) -> Result<()> {
        self.round_to_file(&mut values)?;
        self.changed.insert(name.to_owned(), values);
        Ok(())
    }

    fn round_to_file(&self, values: &mut [f32]) -> Result<()> {
        let mut bytes = Vec::new();
        narrow(self.plan.float_dtype, values, &mut bytes)?;
        Ok(formats::tensor::widen(self.plan.float_dtype, &bytes, values)?)
    }
}

impl<B: Backend> Supply<B> for Work<'_, B> {
    fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        match self.changed.get(name) {
            Some(changed) => Ok(changed.clone()),
            None => self.source.load(name),
        }
    }

    fn linears(&mut self, group: &[&Linear], inputs: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>> {
        let statistics = self.observe(group, self.solver.needs(), inputs)?;
        self.quantize(group, statistics.as_ref())
    }

    fn expert(
        &mut self,
        group: &[&Linear],
        inputs: &Inputs<'_, B::Input>,
        others: &Others<'_, B::Input>,
    ) -> Result<Vec<Weight<B::Weight>>> {
        let needs = self.solver.needs();
        if needs == Needs::Nothing || group.iter().all(|l| !self.plan.schemes.contains_key(&l.module)) {
            return self.quantize(group, None);
        }
        let (backend, source, stage) = (self.backend, self.source, &mut self.done.seconds.observe);
        let statistics =
            observe_expert(backend, source, group[0], needs, inputs, others, self.all_experts, &mut self.layer, stage)?;
        self.quantize(group, Some(&statistics))
    }

    fn router(&mut self, linear: &Linear) -> Result<Weight<B::Weight>> {
        Supply::<B>::router(&mut Plain::exact(self.backend, self.source), linear)
    }

    fn needs_output(&self, last_step: bool) -> bool {
        !(self.final_block && last_step)
    }
}

/// Tokens that an expert is run over when too few were sent to it, unless it has more than half as many channels.
const ENOUGH_TOKENS: usize = 4096;

/// Gathers statistics of what an expert sees, with as many tokens of its layer as it has channels as a prior.
///
/// Of its first linears the layer's statistics are those of all tokens, and gathered once; of its last they are those of
/// some tokens that were not sent to it, if too few were. With `all` every token counts as sent to every expert.
#[allow(clippy::too_many_arguments)]
pub fn observe_expert<B: Backend>(
    backend: &B,
    source: &Checkpoint,
    first: &Linear,
    needs: Needs,
    inputs: &Inputs<'_, B::Input>,
    others: &Others<'_, B::Input>,
    all: bool,
    layer: &mut Option<(String, Statistics<B>)>,
    stage: &mut f64,
) -> Result<Statistics<B>> {
    let gather = |count: usize, stage: &mut f64| {
        observe(backend, source, first, needs, &|see| (others.inputs)(count, see), stage)
    };
    if let Some(name) = others.shared
        && layer.as_ref().is_none_or(|(known, _)| known != name)
    {
        *layer = Some((name.to_owned(), gather(usize::MAX, stage)?));
    }
    let mut statistics = match all {
        false => observe(backend, source, first, needs, inputs, stage)?,
        true => Statistics::gather(backend, first.cols, needs, |_| Ok::<(), Error>(()))?,
    };
    let channels = first.cols as f64;
    match (others.shared, &layer) {
        (Some(_), Some((_, seen))) if all => {
            statistics.blend(backend, seen, seen.count)?;
            statistics.tokens = seen.tokens;
        }
        (Some(_), Some((_, prior))) => statistics.blend(backend, prior, channels)?,
        _ if all => statistics = gather(usize::MAX, stage)?,
        _ if statistics.tokens < 2 * first.cols => {
            statistics.blend(backend, &gather(ENOUGH_TOKENS.max(2 * first.cols), stage)?, channels)?;
        }
        _ => {}
    }
    Ok(statistics)
}

/// Runs a float block and keeps the statistics of every input.
struct FloatPass<'w, 'a, B: Backend> {
    work: &'w mut Work<'a, B>,
    statistics: HashMap<String, Statistics<B>>,
}

impl<B: Backend> Supply<B> for FloatPass<'_, '_, B> {
    fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        self.work.vector(name)
    }

    fn linears(&mut self, group: &[&Linear], inputs: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>> {
        if let Some(statistics) = self.work.observe(group, Needs::HessianAndMagnitude, inputs)? {
            self.statistics.insert(group[0].module.clone(), statistics);
        }
        let mut weights = Vec::new();
        for linear in group {
            weights.extend(ready(self.work.backend, linear, self.work.load(linear)?)?);
        }
        Ok(weights)
    }

    fn router(&mut self, linear: &Linear) -> Result<Weight<B::Weight>> {
        self.work.router(linear)
    }

    fn needs_output(&self, last_step: bool) -> bool {
        !last_step
    }
}

/// One line for a linear.
pub fn describe(report: &LinearReport) -> String {
    let error = report.relative_error.map_or(String::new(), |e| format!("  error {:.4} %", 100.0 * e));
    let fallback = report.fallback.as_ref().map_or(String::new(), |f| format!("  {f}"));
    let LinearReport { name, bits, group_size, method, seconds, .. } = report;
    let kind = report.ty.map_or_else(|| format!("w{bits} g{group_size}"), str::to_owned);
    format!("{name:44} {method} {kind}{error}  {seconds:.2} s{fallback}")
}
