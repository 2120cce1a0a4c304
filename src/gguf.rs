//! The pipeline to a GGUF file: types from a mix, blocks for every linear as its input becomes known, one tensor in
//! memory at a time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use calibration::samples::Samples;
use calibration::solvers::{Asked, Gptq, Observer, Rtn, Shared, Solver, pack_rows, searched};
use calibration::statistics::{Needs, Statistics};
use formats::container::gguf::MetadataValue;
use formats::{GgmlType, GgufTensor, GgufWriter, Imatrix, ImatrixEntry, TensorView};
use kernels::{Backend, GridSpec};
use ndarray::{Array2, Axis};
use rayon::prelude::*;

use crate::behind::{Behind, behind};
use crate::checkpoint::Checkpoint;
use crate::compile::{LinearReport, Stages, describe, observe, observe_expert};
use crate::error::{Error, Result};
use crate::evidence::{check_measured, dead_inputs, lost_in_blocks, prior_share, share_of};
use crate::export::metadata::{About, ImportanceSource, Metadata, metadata};
use crate::export::mixes::{Mix, ModelShape, Overrides, TensorInfo, TensorOverride, assign, parse_type};
use crate::export::names::{self, ExportPlan, ExportTensor, From, Part, Source};
use crate::export::tokenizer::tokenizer;
use crate::forward::{Ahead, Inputs, Others, Plain, Supply, Weight, embed, load_bias, load_matrix, ready, run_block};
use crate::graph::{Graph, Layer, Linear, Step, Stored};
use crate::importance::{check_importance, importance_of};
use crate::plan::{Fate, check_tensors};
use crate::progress::Progress;
use crate::recipe::{Method, Recipe};
use crate::report::{Hashing, TensorReport, flushed, hash_written};
use crate::stray::Strays;
use crate::words::called;

/// What the file will hold, decided and checked before any work is done.
pub struct GgufPlan {
    /// Tensors in file order.
    pub tensors: Vec<(ExportTensor, GgmlType)>,
    /// Where each linear of the blocks goes, by module.
    by_module: HashMap<String, Vec<Place>>,
    /// Types that do not fit a tensor's rows and were replaced, by module.
    fallbacks: HashMap<String, String>,
    /// Everything but tensors.
    metadata: Metadata,
    /// What the user should know.
    pub notices: Vec<String>,
    /// What becomes of every input tensor.
    fates: Vec<TensorReport>,
    /// Importance that was read from a file.
    imatrix: Option<Imatrix>,
    /// Keys of the recipe that the types of the tensors leave without effect.
    pub idle: Vec<&'static str>,
}

/// A part of a tensor of the file that a linear makes.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Index into [`GgufPlan::tensors`].
    tensor: usize,
    /// Which of its parts.
    part: usize,
    /// The part's first row in it.
    first: usize,
}

impl GgufPlan {
    /// Decides. Fails when a tensor is missing, misshapen or unexplained, a pattern matches nothing, or GGUF cannot hold
    /// the model.
    pub fn new(graph: &Graph, source: &Checkpoint, recipe: &Recipe) -> Result<GgufPlan> {
        let settings = recipe.gguf.as_ref().expect("a recipe for a GGUF file");
        let mix = Mix::parse(settings.mix).expect("resolved");
        check_tensors(graph, source)?;
        let plan = names::plan(graph)?;
        let places = places(&plan);
        let mut imatrix = settings.imatrix.as_ref().map(Imatrix::read).transpose()?;
        let importance = imatrix.is_some() || needs(recipe) > Needs::Nothing;

        let mut overrides = Overrides {
            tensors: settings.tensor_type.iter().map(|t| TensorOverride::parse(t)).collect::<Result<_>>()?,
            output: settings.output_tensor_type.as_deref().map(parse_type).transpose().map_err(Error::usage)?,
            embedding: settings.token_embedding_type.as_deref().map(parse_type).transpose().map_err(Error::usage)?,
            pure: settings.pure,
        };
        let mut patterns = recipe.patterns()?;
        let plain = if source.dtype() == formats::Dtype::F16 { "F16" } else { "BF16" };
        for linear in graph.linears().chain([&graph.head.linear]) {
            let ignored = recipe.scheme_of(&linear.module, &mut patterns)?.is_none();
            for place in places.get(&linear.module).into_iter().flatten().filter(|_| ignored) {
                let exact = format!("^{}$={plain}", plan.tensors[place.tensor].gguf.replace('.', "\\."));
                overrides.tensors.insert(0, TensorOverride::parse(&exact)?);
            }
        }
        // The embedding serves as the head.
        if graph.head.tied && recipe.scheme_of(&graph.head.linear.module, &mut patterns)?.is_none() {
            overrides.tensors.insert(0, TensorOverride::parse(&format!("^token_embd\\.weight$={plain}"))?);
        }
        patterns.check_hits()?;
        let shape = graph.blocks.iter().find_map(|block| block.attention()).map(|attention| attention.shape);
        let shape = shape.expect("names::plan has seen attention");
        let model = ModelShape {
            architecture: plan.architecture,
            layers: graph.blocks.len(),
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            experts: graph.blocks.iter().flat_map(|block| &block.steps).find_map(experts).unwrap_or(0),
        };
        let infos: Vec<TensorInfo<'_>> =
            plan.tensors.iter().map(|t| TensorInfo { name: &t.gguf, shape: &t.shape }).collect();
        let assigned = assign(mix, &model, &infos, importance, &overrides)?;

        let (mut by_module, mut fallbacks, mut notices) = (HashMap::new(), HashMap::new(), Vec::new());
        let mut made = HashSet::new();
        for linear in graph.linears() {
            let places = places.get(&linear.module).expect("every linear is in the plan").clone();
            for place in &places {
                made.insert(place.tensor);
                if let Some(fallback) = &assigned[place.tensor].fallback {
                    fallbacks.insert(linear.module.clone(), fallback.clone());
                }
            }
            by_module.insert(linear.module.clone(), places);
        }
        let others = plan.tensors.iter().zip(&assigned).enumerate().filter(|(index, _)| !made.contains(index));
        notices.extend(
            others.filter_map(|(_, (t, a))| a.fallback.as_ref().map(|why| format!("tensor `{}`: {why}", t.gguf))),
        );
        let mut idle = Vec::new();
        if assigned.iter().all(|assigned| assigned.ty.block_len == 1) {
            idle.extend(["observer", "imatrix", "damp", "act_order"]);
            if let (Some(path), true) = (&settings.imatrix, imatrix.take().is_some()) {
                let path = path.display();
                notices.push(format!("{path} was not used: {} rounds nothing by the importance of inputs", mix.name));
            }
            if recipe.method.sweeps() {
                let method = recipe.method.name();
                notices.push(format!("method {method} has no effect: {} rounds nothing by the inputs", mix.name));
            }
        }
        if let Some(imatrix) = &imatrix {
            let linears =
                graph.linears().flat_map(|linear| by_module[&linear.module].iter().map(move |at| (linear, at)));
            let linears = linears.map(|(linear, at)| (&*linear.module, &plan.tensors[at.tensor], at.part));
            let known = plan.tensors.iter().map(|tensor| &*tensor.gguf).collect();
            let path = settings.imatrix.as_deref().expect("read");
            notices.extend(check_importance(imatrix, path, linears, &known)?);
        }

        let collected = (importance && (imatrix.is_some() || settings.imatrix.is_none())).then(|| match &imatrix {
            Some(imatrix) => ImportanceSource {
                file: called(&settings.imatrix.as_ref().expect("read").display().to_string()).to_owned(),
                dataset: imatrix.datasets.first().cloned(),
                entries: imatrix.entries.len() as u32,
                chunks: Some(imatrix.chunk_count),
            },
            None => ImportanceSource {
                file: "collected while quantizing".to_owned(),
                dataset: Some(called(&recipe.calibration).to_owned()),
                entries: made.len() as u32,
                chunks: u32::try_from(recipe.samples).ok(),
            },
        });
        let mut written =
            metadata(graph, source.config(), &plan, &About::of(source), mix.file_type, collected.as_ref())?;
        if let Some(pooling) = source.pooling() {
            let key = format!("{}.pooling_type", plan.architecture);
            written.metadata.push((key, MetadataValue::U32(pooling)));
        }
        let words = tokenizer(source, graph.vocabulary, settings.pre.as_deref())?;
        if let Some(name) = words.name {
            let own = written.metadata.iter_mut().find(|(key, _)| key == "general.name");
            own.into_iter().for_each(|(_, value)| *value = MetadataValue::String(name.clone()));
        }
        written.metadata.extend(words.metadata);
        notices.extend(written.notices);
        notices.extend(words.notices);

        let strays = Strays::new(graph, source, recipe.unknown_tensors);
        let fates = fates(&strays, source, &plan, &assigned.iter().map(|a| a.ty).collect::<Vec<_>>())?;
        notices.extend(strays.notes(fates.iter().map(|one| (&*one.name, &one.fate)), false));
        let tensors = plan.tensors.into_iter().zip(assigned).map(|(tensor, assigned)| (tensor, assigned.ty)).collect();
        Ok(GgufPlan { tensors, by_module, fallbacks, metadata: written.metadata, notices, fates, imatrix, idle })
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        let rows = |tensor: &ExportTensor| tensor.shape[..tensor.shape.len() - 1].iter().product::<usize>();
        let of = |tensor: &ExportTensor, ty: &GgmlType| Some(rows(tensor) * ty.row_bytes(*tensor.shape.last()?)?);
        self.tensors.iter().filter_map(|(tensor, ty)| of(tensor, ty)).map(|bytes| bytes as u64).sum()
    }
}

/// The experts of a mixture.
fn experts(step: &Step) -> Option<usize> {
    match &step.layer {
        Layer::Moe(moe) => Some(moe.experts.len()),
        _ => None,
    }
}

/// Where the weight of every module goes.
fn places(plan: &ExportPlan) -> HashMap<String, Vec<Place>> {
    let mut places: HashMap<String, Vec<Place>> = HashMap::new();
    for (tensor, one) in plan.tensors.iter().enumerate() {
        let mut first = 0;
        for (index, part) in one.parts().iter().enumerate() {
            if let From::Weight(linear) = &part.from {
                let place = Place { tensor, part: index, first };
                places.entry(linear.module.clone()).or_default().push(place);
            }
            first += part.extents()[0];
        }
    }
    places
}

/// What a recipe for a GGUF file needs to know of the inputs.
pub fn needs(recipe: &Recipe) -> Needs {
    let settings = recipe.gguf.as_ref().expect("a recipe for a GGUF file");
    match recipe.method {
        Method::Gptq => Needs::Hessian,
        _ if settings.save_imatrix.is_some() => Needs::Moments,
        _ if settings.imatrix.is_some() => Needs::Nothing,
        _ => recipe.observer().needs(),
    }
}

/// Accounts for every tensor of the input.
fn fates(strays: &Strays<'_>, source: &Checkpoint, plan: &ExportPlan, types: &[GgmlType]) -> Result<Vec<TensorReport>> {
    let mut exported: HashMap<String, GgmlType> = HashMap::new();
    for (tensor, ty) in plan.tensors.iter().zip(types) {
        for part in tensor.parts() {
            let known = exported.entry(part.from.tensor()).or_insert(*ty);
            if ty.layout().is_some() {
                *known = *ty;
            }
        }
    }
    let mut fates = Vec::new();
    for entry in source.entries() {
        let fate = match exported.get(entry.name.as_str()) {
            Some(ty) if ty.layout().is_some() => Fate::Quantized,
            Some(_) => Fate::Copied,
            None => match strays.fate(&entry.name)? {
                // No file has room for what its loader does not know.
                Fate::Aside(what) => Fate::Dropped(what),
                fate => fate,
            },
        };
        let ty = exported.get(entry.name.as_str()).map(|ty| ty.name);
        fates.push(TensorReport { name: entry.name.clone(), fate, ty });
    }
    Ok(fates)
}

/// What [`compile`] did.
pub struct Compiled {
    /// The files, the one to open first.
    pub files: Vec<PathBuf>,
    /// Waits until they are on disk, and hashes them.
    pub flushing: Hashing,
    /// Every linear, in the order of the work.
    pub linears: Vec<LinearReport>,
    /// Every input tensor.
    pub tensors: Vec<TensorReport>,
    /// Tensors that are no linears and lose values whose scales are too small to be stored, with the share of these.
    pub lost: Vec<(String, f64)>,
    /// Weights of the linears, and the bytes they take.
    pub quantized: [u64; 2],
    /// Where the time went.
    pub seconds: Stages,
}

/// Writes `source` as the GGUF file `path`, or as its parts beside it.
pub fn compile<B: Backend>(
    backend: &B,
    graph: &Graph,
    source: &Checkpoint,
    recipe: &Recipe,
    plan: &GgufPlan,
    samples: Option<&Samples>,
    path: &Path,
    progress: &mut Progress,
) -> Result<Compiled> {
    let settings = recipe.gguf.as_ref().expect("a recipe for a GGUF file");
    let tensors = plan
        .tensors
        .iter()
        .map(|(tensor, ty)| GgufTensor { name: tensor.gguf.clone(), ty: *ty, shape: tensor.shape.clone() })
        .collect();
    let writer = match settings.split_max_size {
        None => GgufWriter::create(path, plan.metadata.clone(), tensors)?,
        Some(limit) => GgufWriter::create_split(path.with_extension(""), limit, plan.metadata.clone(), tensors)?,
    };
    let hashing = hash_written(writer.follow()?);
    let files: Vec<PathBuf> = writer.files().map(Path::to_path_buf).collect();
    let backend = &backend.relaxed();
    progress.start("quantizing", plan.by_module.len());
    let sweep = Gptq {
        observer: Observer::Imatrix,
        damp: recipe.damp,
        act_order: recipe.act_order,
        desc_act: false,
        refine: true,
    };
    let ahead = Ahead::new(backend, source);
    let run = |hand: &Behind<Piece>| {
        let mut work = Work {
            backend,
            source,
            ahead: &ahead,
            plan,
            needs: needs(recipe),
            solver: (recipe.method == Method::Gptq).then_some(sweep),
            writer: &writer,
            behind: hand,
            progress,
            collected: BTreeMap::new(),
            final_block: false,
            all_experts: recipe.moe_all_experts,
            layer: None,
            linears: Vec::new(),
            lost: Vec::new(),
            quantized: [0, 0],
            seconds: Stages::default(),
        };
        // The embedding is the first of the file: the hash, which follows the writing, need not wait for it.
        work.write_rest()?;
        match samples {
            None => {
                for linear in graph.linears() {
                    work.round(linear)?;
                }
            }
            Some(samples) => {
                let started = Instant::now();
                let begin = || {
                    let chunks = embed(backend, graph, source, &samples.sequences)?;
                    source.release(&graph.embedding.tensor);
                    Ok(chunks)
                };
                ahead.blocks(&graph.blocks, begin, |chunks, index, block| {
                    work.final_block = index + 1 == graph.blocks.len();
                    run_block(backend, block, &mut work, chunks)
                })?;
                let s = &mut work.seconds;
                s.forward = started.elapsed().as_secs_f64() - s.load - s.observe - s.factor - s.solve - s.write;
            }
        }
        let Work { collected, linears, lost, quantized, seconds, .. } = work;
        Ok((collected, linears, lost, quantized, seconds))
    };
    let write = |Piece { tensor, offset, bytes }| Ok(writer.write_at(&tensor, offset, &bytes)?);
    let (collected, linears, lost, quantized, seconds) = behind(write, run)?;
    let flushing = flushed(move || writer.finish(), hashing);
    if let (Some(path), Some(samples)) = (&settings.save_imatrix, samples) {
        let imatrix = Imatrix {
            entries: collected,
            datasets: vec![called(&samples.source.name).to_owned()],
            chunk_count: samples.source.sequences as u32,
            chunk_size: samples.source.seq_len as u32,
            ..Imatrix::default()
        };
        imatrix.write(path)?;
    }
    Ok(Compiled { files, flushing, linears, tensors: plan.fates.clone(), lost, quantized, seconds })
}

/// Packed rows that are to be written while the next ones are solved.
struct Piece {
    tensor: String,
    offset: u64,
    bytes: Vec<u8>,
}

/// The state of a compilation. As a [`Supply`] it quantizes linears as their inputs become known.
struct Work<'a, B: Backend> {
    backend: &'a B,
    source: &'a Checkpoint,
    ahead: &'a Ahead<'a, B>,
    plan: &'a GgufPlan,
    needs: Needs,
    solver: Option<Gptq>,
    writer: &'a GgufWriter,
    behind: &'a Behind<Piece>,
    progress: &'a Progress,
    collected: BTreeMap<String, ImatrixEntry>,
    final_block: bool,
    all_experts: bool,
    layer: Option<(String, Statistics<B>)>,
    linears: Vec<LinearReport>,
    lost: Vec<(String, f64)>,
    quantized: [u64; 2],
    seconds: Stages,
}

/// Adds the time since `started` to `stage`.
fn lap(stage: &mut f64, started: Instant) {
    *stage += started.elapsed().as_secs_f64();
}

impl<B: Backend> Work<'_, B> {
    /// Quantizes and writes linears that read one input; returns what the file holds of each.
    fn quantize(&mut self, group: &[&Linear], statistics: &Statistics<B>) -> Result<Vec<Weight<B::Weight>>> {
        let (backend, plan) = (self.backend, self.plan);
        let started = Instant::now();
        let blocks =
            group.iter().flat_map(|l| &plan.by_module[&l.module]).any(|p| plan.tensors[p.tensor].1.layout().is_some());
        let shared = match &self.solver {
            Some(solver) if blocks => solver.share(backend, Some(statistics))?,
            _ => Shared { statistics: Some(statistics), factor: None, fallback: None },
        };
        lap(&mut self.seconds.factor, started);
        let mut weights = Vec::new();
        for linear in group {
            let started = Instant::now();
            let weight = self.ahead.plain().load(linear)?;
            lap(&mut self.seconds.load, started);
            let places = &plan.by_module[&linear.module];
            let mut restored: Option<Array2<f32>> = None;
            let mut matrix = None;
            let mut report = plain_report(linear, plan.tensors[places[0].tensor].1);
            let (mut proxy, mut errors, mut lost) = (None, None, 0);
            for place in places {
                let (tensor, ty) = &plan.tensors[place.tensor];
                let part = &tensor.parts()[place.part];
                let started = Instant::now();
                let importance = match &plan.imatrix {
                    Some(imatrix) => importance_of(imatrix, tensor, place.part)?,
                    // Columns of what is turned round are no inputs of the linear.
                    None if part.transposed || statistics.count == 0.0 => None,
                    None => Some(statistics.importance()),
                };
                // A linear that is all there is needs no copy, whatever the order of its rows.
                let all = !part.transposed && part.extents()[0] == linear.rows;
                let own = match (&part.rows, all) {
                    (Some(rows), false) => Some(backend.select_rows(&weight.matrix, rows)?),
                    _ => None,
                };
                let turned = match part.transposed {
                    true => {
                        let host = backend.download(own.as_ref().unwrap_or(&weight.matrix))?;
                        Some(backend.upload(host.reversed_axes().as_standard_layout().into_owned())?)
                    }
                    false => None,
                };
                let asked = turned.as_ref().or(own.as_ref()).unwrap_or(&weight.matrix);
                let alone = Shared { statistics: None, factor: None, fallback: None };
                let by = if part.transposed { &alone } else { &shared };
                let observer = if importance.is_some() { Observer::Imatrix } else { Observer::MinMax };
                let spec = GridSpec::of(ty.encoding(), backend.shape(asked)[1]);
                let one = [Asked { weight: asked, spec, importance: importance.as_deref() }];
                let mut solution = match (self.solver, &by.factor) {
                    (Some(sweep), Some(_)) => Gptq { observer, ..sweep }.solve(backend, by, &one)?,
                    _ => Rtn { observer }.solve(backend, by, &one)?,
                }
                .remove(0);
                let packed = solution.rows(backend)?;
                let asked = || Ok(backend.download(asked)?.iter().copied().collect());
                lost += lost_in_blocks(
                    *ty,
                    &packed,
                    self.source.file_of(&part.from.tensor()),
                    [&part.from.tensor(), &tensor.gguf],
                    asked,
                )?;
                report.seconds += started.elapsed().as_secs_f64();
                lap(&mut self.seconds.solve, started);

                let started = Instant::now();
                let [rows, _] = part.extents();
                let row_bytes = packed.len() / rows;
                let offset = (place.first * row_bytes) as u64;
                let bytes = match &part.rows {
                    Some(order) if all => {
                        let mut ordered = Vec::with_capacity(packed.len());
                        order.iter().for_each(|row| ordered.extend_from_slice(&packed[row * row_bytes..][..row_bytes]));
                        ordered
                    }
                    _ => packed,
                };
                self.quantized[1] += bytes.len() as u64;
                self.behind.hand_over(Piece { tensor: tensor.gguf.clone(), offset, bytes })?;
                lap(&mut self.seconds.write, started);
                if all {
                    matrix = Some(solution.dequantized);
                } else {
                    let whole = restored.get_or_insert_with(|| Array2::zeros((linear.rows, linear.cols)));
                    let host = backend.download(&solution.dequantized)?;
                    for at in 0..linear.rows.min(part.rows.as_ref().map_or(linear.rows, Vec::len)) {
                        let row = part.rows.as_ref().map_or(at, |rows| rows[at]);
                        match part.transposed {
                            true => whole.row_mut(row).assign(&host.column(at)),
                            false => whole.row_mut(row).assign(&host.row(at)),
                        }
                    }
                }
                self.collect(tensor, place.part, part.transposed, statistics);
                if let Some(loss) = solution.proxy_loss {
                    *proxy.get_or_insert(0.0) += loss;
                }
                if let Some(error) = solution.relative_error {
                    // Of several parts the worst.
                    errors = Some(errors.map_or(error, |other: f64| other.max(error)));
                }
                if by.factor.is_some() && ty.layout().is_some() {
                    report.method = "gptq".to_owned();
                    report.damp = solution.damp;
                }
            }
            let fallbacks = [plan.fallbacks.get(&linear.module).cloned(), shared.fallback.clone()];
            let fallbacks: Vec<String> = fallbacks.into_iter().flatten().collect();
            self.record(LinearReport {
                tokens: statistics.tokens,
                prior: prior_share(statistics),
                dead_inputs: dead_inputs(statistics),
                fallback: (!fallbacks.is_empty()).then(|| fallbacks.join("; ")),
                proxy_loss: proxy.map(|loss| loss / statistics.count.max(1.0)),
                relative_error: errors,
                lost: share(lost, linear),
                ..report
            })?;
            self.quantized[0] += (linear.rows * linear.cols) as u64;
            let matrix = match (matrix, restored) {
                (Some(matrix), _) => matrix,
                (None, Some(host)) => backend.upload(host)?,
                (None, None) => weight.matrix,
            };
            weights.extend(ready(backend, linear, Weight { matrix, ..weight })?);
        }
        Ok(weights)
    }

    /// Remembers what was seen before one matrix of a tensor.
    fn collect(&mut self, tensor: &ExportTensor, part: usize, transposed: bool, statistics: &Statistics<B>) {
        let ([_, width], matrices) = (tensor.extents(), tensor.matrices());
        let energy = statistics.energy();
        if transposed || energy.len() != width {
            return;
        }
        let entry = self
            .collected
            .entry(tensor.gguf.clone())
            .or_insert_with(|| ImatrixEntry { sums: vec![0.0; matrices * width], counts: vec![0.0; matrices] });
        let at = if matrices > 1 { part } else { 0 };
        entry.sums[at * width..][..width].copy_from_slice(&energy);
        entry.counts[at] = statistics.count as f32;
    }

    /// Rounds and writes a linear whose input nobody has to see.
    fn round(&mut self, linear: &Linear) -> Result<()> {
        let started = Instant::now();
        let (mut bytes, mut lost) = (0, 0);
        for place in &self.plan.by_module[&linear.module] {
            let (tensor, ty) = &self.plan.tensors[place.tensor];
            let importance = match &self.plan.imatrix {
                Some(imatrix) => importance_of(imatrix, tensor, place.part)?,
                None => None,
            };
            let part = &tensor.parts()[place.part];
            lost += write_part(
                self.backend,
                self.source,
                self.writer,
                (tensor, part, place.first),
                *ty,
                importance.as_deref(),
            )?;
            let [rows, width] = part.extents();
            bytes += rows * ty.row_bytes(width).expect("by the mix");
        }
        let seconds = started.elapsed().as_secs_f64();
        self.seconds.solve += seconds;
        self.quantized[0] += (linear.rows * linear.cols) as u64;
        self.quantized[1] += bytes as u64;
        let fallback = self.plan.fallbacks.get(&linear.module).cloned();
        let ty = self.plan.tensors[self.plan.by_module[&linear.module][0].tensor].1;
        self.record(LinearReport { fallback, lost: share(lost, linear), seconds, ..plain_report(linear, ty) })
    }

    fn record(&mut self, report: LinearReport) -> Result<()> {
        check_measured(&report)?;
        self.progress.line(|| describe(&report));
        self.progress.step();
        self.linears.push(report);
        Ok(())
    }

    /// Writes every tensor that is not a linear of a block.
    fn write_rest(&mut self) -> Result<()> {
        let started = Instant::now();
        let linears: HashSet<usize> = self.plan.by_module.values().flatten().map(|place| place.tensor).collect();
        for (index, (tensor, ty)) in self.plan.tensors.iter().enumerate() {
            if linears.contains(&index) {
                continue;
            }
            match &tensor.source {
                Source::Values(values) => {
                    let mut bytes = vec![0; ty.row_bytes(values.len()).expect("F32")];
                    ty.encode(values, &mut bytes).expect("F32");
                    self.writer.write(&tensor.gguf, &bytes)?;
                }
                Source::Parts(parts) => {
                    let (mut first, mut lost) = (0, 0);
                    for (index, part) in parts.iter().enumerate() {
                        let importance = match &self.plan.imatrix {
                            Some(imatrix) if ty.layout().is_some() => importance_of(imatrix, tensor, index)?,
                            _ => None,
                        };
                        let place = (tensor, part, first);
                        lost += write_part(self.backend, self.source, self.writer, place, *ty, importance.as_deref())?;
                        first += part.extents()[0];
                    }
                    let share = share_of(lost, tensor.shape.iter().product());
                    self.lost.extend(share.map(|share| (parts[0].from.tensor(), share)));
                }
            }
        }
        lap(&mut self.seconds.write, started);
        Ok(())
    }
}

/// Writes one part of a tensor in pieces of whole rows, each read, rounded and written by one thread; copied where it
/// lies in the input as it will in the output. Returns how many values are lost for want of a scale.
fn write_part<B: Backend>(
    backend: &B,
    source: &Checkpoint,
    writer: &GgufWriter,
    (tensor, part, start): (&ExportTensor, &Part, usize),
    ty: GgmlType,
    importance: Option<&[f32]>,
) -> Result<usize> {
    let [rows, cols] = part.extents();
    let name = part.from.tensor();
    let row_bytes = ty.row_bytes(cols).expect("a type that fits, by the mix");
    let straight = !part.transposed
        && match &part.from {
            From::Weight(linear) => linear.stored == Stored::Plain,
            From::Bias(linear) => !matches!(linear.stored, Stored::Slice { .. }),
            From::Tensor(..) => true,
        };
    let by_rows = straight && source.entry(&name).is_some_and(|entry| entry.shape.len() == 2);
    let whole = straight && part.rows.is_none() && part.offset == 0.0;
    let same = source.raw(&name).filter(|raw| whole && ty.plain() == Some(raw.dtype));
    let loaded = if by_rows || same.is_some_and(|raw| raw.is_finite()) { Vec::new() } else { load_part(source, part)? };
    let piece = (backend.weights_at_once() / cols.max(1)).max(1);
    let searched = searched(ty, importance.is_some());
    let one = |values: &mut Vec<f32>, index: usize| {
        let first = index * piece;
        let count = piece.min(rows - first);
        let offset = ((start + first) * row_bytes) as u64;
        if let Some(raw) = same {
            let data = &raw.data[first * row_bytes..][..count * row_bytes];
            // What is no number is named where values are read.
            if (TensorView { data, ..raw }).is_finite() {
                writer.write_at(&tensor.gguf, offset, data)?;
                return Ok(0);
            }
        }
        values.resize(count * cols, 0.0);
        if by_rows {
            let of = |row: usize| part.rows.as_ref().map_or(row, |rows| rows[row]) as u32;
            source.load_rows(&name, &(first..first + count).map(of).collect::<Vec<u32>>(), values)?;
        } else {
            values.copy_from_slice(&loaded[first * cols..][..count * cols]);
        }
        if part.offset != 0.0 {
            values.iter_mut().for_each(|x| *x += part.offset);
        }
        let names = [&*name, &*tensor.gguf];
        let (packed, lost) = if searched {
            let matrix = Array2::from_shape_vec((count, cols), std::mem::take(values)).expect("whole rows");
            let matrix = backend.upload(matrix)?;
            let packed = pack_rows(backend, &matrix, ty, importance)?;
            let lost = lost_in_blocks(ty, &packed, source.file_of(&name), names, || {
                Ok(backend.download(&matrix)?.iter().copied().collect())
            })?;
            (packed, lost)
        } else {
            let mut packed = vec![0; count * row_bytes];
            ty.encode(values, &mut packed).expect("a type with an encoder");
            let lost = lost_in_blocks(ty, &packed, source.file_of(&name), names, || Ok(std::mem::take(values)))?;
            (packed, lost)
        };
        writer.write_at(&tensor.gguf, offset, &packed)?;
        Ok::<usize, Error>(lost)
    };
    let pieces = (0..rows.div_ceil(piece)).into_par_iter().map_init(Vec::new, one);
    let lost = pieces.try_reduce(|| 0, |a, b| Ok(a + b))?;
    source.release(&name);
    Ok(lost)
}

/// All values of a part, `[rows, cols]`, without its offset.
fn load_part(source: &Checkpoint, part: &Part) -> Result<Vec<f32>> {
    let (matrix, rows) = match &part.from {
        From::Weight(linear) => (load_matrix(source, linear)?, part.rows.as_deref()),
        From::Bias(linear) => {
            let bias = load_bias(source, linear)?.expect("planned for those that have one");
            (Array2::from_shape_vec((bias.len(), 1), bias).expect("one column"), part.rows.as_deref())
        }
        From::Tensor(name, _) => {
            let values = source.load(name)?;
            let [count, width] = part.from.extents();
            let shape = if count == 1 { (width, 1) } else { (count, width) };
            (Array2::from_shape_vec(shape, values).expect("checked with the graph"), part.rows.as_deref())
        }
    };
    let chosen = match rows {
        Some(rows) => matrix.select(Axis(0), rows),
        None => matrix,
    };
    let chosen = if part.transposed { chosen.reversed_axes() } else { chosen };
    Ok(chosen.iter().copied().collect())
}

/// What a report says of a linear that was only rounded.
fn plain_report(linear: &Linear, ty: GgmlType) -> LinearReport {
    let layout = ty.layout();
    LinearReport {
        name: linear.module.clone(),
        method: "rtn".to_owned(),
        ty: Some(ty.name),
        bits: layout.map_or((ty.block_bytes * 8) as u8, |encoding| encoding.levels.bits()),
        group_size: layout.map_or(1, |encoding| encoding.group() as i64),
        symmetric: layout.is_none_or(|encoding| !encoding.has_min()),
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

/// The share of a linear's weights.
fn share(lost: usize, linear: &Linear) -> Option<f64> {
    share_of(lost, linear.rows * linear.cols)
}

impl<B: Backend> Supply<B> for Work<'_, B> {
    fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        self.source.load(name)
    }

    fn router(&mut self, linear: &Linear) -> Result<Weight<B::Weight>> {
        Supply::<B>::router(&mut Plain::exact(self.backend, self.source), linear)
    }

    fn linears(&mut self, group: &[&Linear], inputs: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>> {
        let statistics = observe(self.backend, self.source, group[0], self.needs, inputs, &mut self.seconds.observe)?;
        self.quantize(group, &statistics)
    }

    fn expert(
        &mut self,
        group: &[&Linear],
        inputs: &Inputs<'_, B::Input>,
        others: &Others<'_, B::Input>,
    ) -> Result<Vec<Weight<B::Weight>>> {
        let (backend, source, stage) = (self.backend, self.source, &mut self.seconds.observe);
        let (first, layer) = (group[0], &mut self.layer);
        let statistics =
            observe_expert(backend, source, first, self.needs, inputs, others, self.all_experts, layer, stage)?;
        self.quantize(group, &statistics)
    }

    fn needs_output(&self, last_step: bool) -> bool {
        !(self.final_block && last_step)
    }
}
