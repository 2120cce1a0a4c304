//! The pipeline to a GGUF file: types from a mix, blocks for every linear as its input becomes known, one tensor in
//! memory at a time.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

use calibration::samples::Samples;
use calibration::solvers::{Gptq, Observer, Shared, Solver, pack_rows, searched, solve_blocks};
use calibration::statistics::{Needs, Statistics};
use formats::ggml::Levels;
use formats::{GgmlType, GgufTensor, GgufWriter, Imatrix, ImatrixEntry, TensorView};
use kernels::Backend;
use ndarray::Array2;
use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::compile::{LinearReport, Stages, describe, observe};
use crate::error::{Error, Result};
use crate::export::metadata::{About, ImportanceSource, Metadata, metadata};
use crate::export::mixes::{Mix, ModelShape, Overrides, TensorInfo, TensorOverride, assign, parse_type};
use crate::export::names::{self, ExportPlan, ExportTensor, Source};
use crate::export::tokenizer::tokenizer;
use crate::forward::{Inputs, Plain, Supply, Weight, embed, ready, run_block};
use crate::graph::{Graph, Linear};
use crate::plan::{Fate, check_tensors, left_out};
use crate::progress::Progress;
use crate::recipe::{Method, Recipe};
use crate::report::{FileReport, TensorReport, hash_files};

/// Weights of a tensor that are encoded at a time when nothing else needs the whole of it.
const PIECE: usize = 1 << 16;

/// What the file will hold, decided and checked before any work is done.
pub struct GgufPlan {
    /// Tensors in file order.
    pub tensors: Vec<(ExportTensor, GgmlType)>,
    /// The tensor of each linear of the blocks, by module: an index into `tensors`.
    by_module: HashMap<String, usize>,
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
}

impl GgufPlan {
    /// Decides. Fails when a tensor is missing, misshapen or unexplained, a pattern matches nothing, or GGUF cannot hold
    /// the model.
    pub fn new(graph: &Graph, source: &Checkpoint, recipe: &Recipe) -> Result<GgufPlan> {
        let settings = recipe.gguf.as_ref().expect("a recipe for a GGUF file");
        let mix = Mix::parse(settings.mix).expect("resolved");
        check_tensors(graph, source)?;
        let plan = names::plan(graph)?;
        let imatrix = settings.imatrix.as_ref().map(Imatrix::read).transpose()?;
        let importance = imatrix.is_some() || needs_data(recipe) > Needs::Nothing;

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
            if let Some(tensor) = plan.tensors.iter().find(|t| t.source == Source::Tensor(linear.weight()))
                && ignored
            {
                let exact = format!("^{}$={plain}", tensor.gguf.replace('.', "\\."));
                overrides.tensors.insert(0, TensorOverride::parse(&exact)?);
            }
        }
        patterns.check_hits()?;
        let shape = graph.blocks.iter().find_map(|block| block.attention()).map(|attention| attention.shape);
        let shape = shape.expect("names::plan has seen attention");
        let model = ModelShape {
            architecture: plan.architecture,
            layers: graph.blocks.len(),
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            experts: 0,
        };
        let infos: Vec<TensorInfo<'_>> =
            plan.tensors.iter().map(|t| TensorInfo { name: &t.gguf, shape: &t.shape }).collect();
        let assigned = assign(mix, &model, &infos, importance, &overrides)?;

        let source_name = |t: &ExportTensor| match &t.source {
            Source::Tensor(name) => Some(name.clone()),
            Source::Values(_) => None,
        };
        let modules: HashMap<String, String> = graph.linears().map(|l| (l.weight(), l.module.clone())).collect();
        let (mut by_module, mut fallbacks, mut notices) = (HashMap::new(), HashMap::new(), Vec::new());
        for (index, (tensor, assigned)) in plan.tensors.iter().zip(&assigned).enumerate() {
            match source_name(tensor).and_then(|name| modules.get(&name)) {
                Some(module) => {
                    by_module.insert(module.clone(), index);
                    if let Some(fallback) = &assigned.fallback {
                        fallbacks.insert(module.clone(), fallback.clone());
                    }
                }
                None => {
                    if let Some(fallback) = &assigned.fallback {
                        notices.push(format!("tensor `{}`: {fallback}", tensor.gguf));
                    }
                }
            }
        }
        if let Some(imatrix) = &imatrix {
            check_importance(imatrix, graph, &plan, &by_module, settings.imatrix.as_deref())?;
        }

        let collected = importance.then(|| match &imatrix {
            Some(imatrix) => ImportanceSource {
                file: settings.imatrix.as_ref().expect("read").display().to_string(),
                dataset: imatrix.datasets.first().cloned(),
                entries: imatrix.entries.len() as u32,
                chunks: Some(imatrix.chunk_count),
            },
            None => ImportanceSource {
                file: "collected while quantizing".to_owned(),
                dataset: Some(recipe.calibration.clone()),
                entries: by_module.len() as u32,
                chunks: u32::try_from(recipe.samples).ok(),
            },
        });
        let mut written =
            metadata(graph, source.config(), &plan, &About::of(source), mix.file_type, collected.as_ref())?;
        let words = tokenizer(source, graph.vocabulary, settings.pre.as_deref())?;
        written.metadata.extend(words.metadata);
        notices.extend(written.notices);
        notices.extend(words.notices);

        let fates = fates(graph, source, &plan, &assigned.iter().map(|a| a.ty).collect::<Vec<_>>())?;
        let tensors = plan.tensors.into_iter().zip(assigned).map(|(tensor, assigned)| (tensor, assigned.ty)).collect();
        Ok(GgufPlan { tensors, by_module, fallbacks, metadata: written.metadata, notices, fates, imatrix })
    }

    /// What has to be known of the inputs.
    pub fn needs(&self, recipe: &Recipe) -> Needs {
        needs_data(recipe)
    }
}

fn needs_data(recipe: &Recipe) -> Needs {
    let settings = recipe.gguf.as_ref().expect("a recipe for a GGUF file");
    match recipe.method {
        Method::Gptq => Needs::Hessian,
        _ if settings.save_imatrix.is_some() => Needs::Moments,
        _ if settings.imatrix.is_some() => Needs::Nothing,
        _ => recipe.observer().needs(),
    }
}

/// Fails unless every entry of an importance matrix that names one of the model's linears has its width.
fn check_importance(
    imatrix: &Imatrix,
    graph: &Graph,
    plan: &ExportPlan,
    by_module: &HashMap<String, usize>,
    path: Option<&Path>,
) -> Result<()> {
    let mut found = 0;
    for linear in graph.linears() {
        if imatrix.importance(&plan.tensors[by_module[&linear.module]].gguf, linear.cols)?.is_some() {
            found += 1;
        }
    }
    if found == 0 {
        return Err(Error::usage(format!(
            "{}: none of its {} entries is for a linear of this model",
            path.unwrap_or(Path::new("imatrix")).display(),
            imatrix.entries.len()
        )));
    }
    Ok(())
}

/// Accounts for every tensor of the input.
fn fates(graph: &Graph, source: &Checkpoint, plan: &ExportPlan, types: &[GgmlType]) -> Result<Vec<TensorReport>> {
    let exported: HashMap<&str, GgmlType> = plan
        .tensors
        .iter()
        .zip(types)
        .filter_map(|(tensor, ty)| match &tensor.source {
            Source::Tensor(name) => Some((name.as_str(), *ty)),
            Source::Values(_) => None,
        })
        .collect();
    let mut fates = Vec::new();
    for entry in source.entries() {
        let fate = match exported.get(entry.name.as_str()) {
            Some(ty) if ty.layout().is_some() => Fate::Quantized,
            Some(_) => Fate::Copied,
            None => left_out(graph, source, &entry.name)?,
        };
        fates.push(TensorReport { name: entry.name.clone(), fate });
    }
    Ok(fates)
}

/// What [`compile`] did.
pub struct Compiled {
    /// The files, the one to open first.
    pub files: Vec<PathBuf>,
    /// Waits until they are on disk, and hashes them.
    pub flushing: JoinHandle<Result<Vec<FileReport>>>,
    /// Every linear, in the order of the work.
    pub linears: Vec<LinearReport>,
    /// Every input tensor.
    pub tensors: Vec<TensorReport>,
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
    let files: Vec<PathBuf> = writer.files().map(Path::to_path_buf).collect();
    let backend = &backend.relaxed();
    progress.start("quantizing", plan.by_module.len());
    let sweep = Gptq { observer: Observer::Imatrix, damp: recipe.damp, act_order: recipe.act_order, desc_act: false };
    let mut work = Work {
        backend,
        source,
        plan,
        needs: needs_data(recipe),
        solver: (recipe.method == Method::Gptq).then_some(sweep),
        writer: &writer,
        progress,
        collected: BTreeMap::new(),
        final_block: false,
        linears: Vec::new(),
        quantized: [0, 0],
        seconds: Stages::default(),
    };
    match samples {
        None => {
            for linear in graph.linears() {
                work.round(linear)?;
            }
        }
        Some(samples) => {
            let started = Instant::now();
            let mut chunks = embed(backend, graph, source, &samples.sequences)?;
            source.release(&graph.embedding.tensor);
            for (index, block) in graph.blocks.iter().enumerate() {
                work.final_block = index + 1 == graph.blocks.len();
                run_block(backend, block, &mut work, &mut chunks)?;
            }
            let s = &mut work.seconds;
            s.forward = started.elapsed().as_secs_f64() - s.load - s.observe - s.factor - s.solve - s.write;
        }
    }
    work.write_rest()?;
    let Work { collected, linears, quantized, seconds, .. } = work;
    // While the disk is at work, what was written is read back.
    let written = files.clone();
    let flushing = std::thread::spawn(move || {
        let hashing = std::thread::spawn(move || hash_files(&written));
        writer.finish()?;
        hashing.join().map_err(|_| Error::failed("hashing the output failed"))?
    });
    if let (Some(path), Some(samples)) = (&settings.save_imatrix, samples) {
        let imatrix = Imatrix {
            entries: collected,
            datasets: vec![samples.source.name.clone()],
            chunk_count: samples.source.sequences as u32,
            chunk_size: samples.source.seq_len as u32,
            ..Imatrix::default()
        };
        imatrix.write(path)?;
    }
    Ok(Compiled { files, flushing, linears, tensors: plan.fates.clone(), quantized, seconds })
}

/// The state of a compilation. As a [`Supply`] it quantizes linears as their inputs become known.
struct Work<'a, B: Backend> {
    backend: &'a B,
    source: &'a Checkpoint,
    plan: &'a GgufPlan,
    needs: Needs,
    solver: Option<Gptq>,
    writer: &'a GgufWriter,
    progress: &'a Progress,
    collected: BTreeMap<String, ImatrixEntry>,
    final_block: bool,
    linears: Vec<LinearReport>,
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
        let backend = self.backend;
        let started = Instant::now();
        let blocks = group.iter().any(|l| self.plan.tensors[self.plan.by_module[&l.module]].1.layout().is_some());
        let shared = match &self.solver {
            Some(solver) if blocks => solver.share(backend, Some(statistics))?,
            _ => Shared { statistics: Some(statistics), factor: None, fallback: None },
        };
        lap(&mut self.seconds.factor, started);
        let mut weights = Vec::new();
        for linear in group {
            let (tensor, ty) = &self.plan.tensors[self.plan.by_module[&linear.module]];
            let started = Instant::now();
            let plain = Plain { backend, source: self.source };
            let weight = plain.load(linear)?;
            lap(&mut self.seconds.load, started);

            let importance = match &self.plan.imatrix {
                Some(imatrix) => imatrix.importance(&tensor.gguf, linear.cols)?,
                None => Some(statistics.importance()),
            };
            let started = Instant::now();
            let solution = solve_blocks(backend, &shared, &weight.matrix, *ty, importance.as_deref())?;
            let seconds = started.elapsed().as_secs_f64();
            self.seconds.solve += seconds;

            let started = Instant::now();
            let row_bytes = solution.packed.len() / linear.rows;
            match tensor.heads {
                None => self.writer.write(&tensor.gguf, &solution.packed)?,
                Some(_) => {
                    let mut rows = Vec::with_capacity(solution.packed.len());
                    for row in 0..linear.rows {
                        rows.extend_from_slice(&solution.packed[tensor.source_row(row) * row_bytes..][..row_bytes]);
                    }
                    self.writer.write(&tensor.gguf, &rows)?;
                }
            }
            lap(&mut self.seconds.write, started);

            let tokens = statistics.tokens;
            let entry = ImatrixEntry { sums: statistics.energy(), counts: vec![tokens as f32] };
            self.collected.insert(tensor.gguf.clone(), entry);
            let swept = shared.factor.is_some() && ty.layout().is_some();
            let fallbacks = [self.plan.fallbacks.get(&linear.module).cloned(), shared.fallback.clone()];
            let fallbacks: Vec<String> = fallbacks.into_iter().flatten().collect();
            self.record(LinearReport {
                method: if swept { "gptq" } else { "rtn" }.to_owned(),
                tokens,
                damp: if swept { solution.damp } else { None },
                fallback: (!fallbacks.is_empty()).then(|| fallbacks.join("; ")),
                proxy_loss: solution.proxy_loss.map(|loss| loss / tokens.max(1) as f64),
                relative_error: solution.relative_error,
                seconds,
                ..plain_report(linear, *ty)
            });
            self.quantized[0] += (linear.rows * linear.cols) as u64;
            self.quantized[1] += solution.packed.len() as u64;
            weights.extend(ready(backend, linear, Weight { matrix: solution.restored, bias: weight.bias })?);
        }
        Ok(weights)
    }

    /// Rounds and writes a linear whose input nobody has to see.
    fn round(&mut self, linear: &Linear) -> Result<()> {
        let started = Instant::now();
        let (tensor, ty) = &self.plan.tensors[self.plan.by_module[&linear.module]];
        let importance = match &self.plan.imatrix {
            Some(imatrix) => imatrix.importance(&tensor.gguf, linear.cols)?,
            None => None,
        };
        let name = linear.weight();
        write_tensor(self.backend, self.source, self.writer, (tensor, &name), *ty, importance.as_deref())?;
        let seconds = started.elapsed().as_secs_f64();
        self.seconds.solve += seconds;
        self.quantized[0] += (linear.rows * linear.cols) as u64;
        self.quantized[1] += (linear.rows * ty.row_bytes(linear.cols).expect("by the mix")) as u64;
        let fallback = self.plan.fallbacks.get(&linear.module).cloned();
        self.record(LinearReport { fallback, seconds, ..plain_report(linear, *ty) });
        Ok(())
    }

    fn record(&mut self, report: LinearReport) {
        self.progress.line(|| describe(&report));
        self.progress.step();
        self.linears.push(report);
    }

    /// Writes every tensor that is not a linear of a block.
    fn write_rest(&mut self) -> Result<()> {
        let started = Instant::now();
        let linears: Vec<usize> = self.plan.by_module.values().copied().collect();
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
                Source::Tensor(name) => {
                    write_tensor(self.backend, self.source, self.writer, (tensor, name), *ty, None)?;
                }
            }
        }
        lap(&mut self.seconds.write, started);
        Ok(())
    }
}

/// Writes one tensor in pieces of whole rows, each read, rounded and written by one thread; copied where it lies in the
/// input as it will in the output.
fn write_tensor<B: Backend>(
    backend: &B,
    source: &Checkpoint,
    writer: &GgufWriter,
    (tensor, name): (&ExportTensor, &str),
    ty: GgmlType,
    importance: Option<&[f32]>,
) -> Result<()> {
    let (rows, cols) = match tensor.shape[..] {
        [rows, cols] => (rows, cols),
        _ => (1, tensor.shape.iter().product()),
    };
    let row_bytes = ty.row_bytes(cols).expect("a type that fits, by the mix");
    let piece = (PIECE / cols.max(1)).max(1);
    let same = source.raw(name).filter(|raw| ty.plain() == Some(raw.dtype) && tensor.heads.is_none());
    let searched = searched(ty, importance.is_some());
    (0..rows.div_ceil(piece)).into_par_iter().try_for_each_init(Vec::new, |values, index| {
        let first = index * piece;
        let count = piece.min(rows - first);
        let offset = (first * row_bytes) as u64;
        if let Some(raw) = same {
            let data = &raw.data[first * row_bytes..][..count * row_bytes];
            // What is no number is named where values are read.
            if (TensorView { data, ..raw }).is_finite() {
                return Ok(writer.write_at(&tensor.gguf, offset, data)?);
            }
        }
        values.resize(count * cols, 0.0);
        if let [_, _] = tensor.shape[..] {
            let ids: Vec<u32> = (first..first + count).map(|row| tensor.source_row(row) as u32).collect();
            source.load_rows(name, &ids, values)?;
        } else {
            let loaded = source.load(name)?;
            match tensor.heads {
                None => values.copy_from_slice(&loaded),
                Some(_) => values.iter_mut().enumerate().for_each(|(i, v)| *v = loaded[tensor.source_row(i)]),
            }
        }
        let packed = if searched {
            let matrix = Array2::from_shape_vec((count, cols), std::mem::take(values)).expect("whole rows");
            pack_rows(backend, &backend.upload(matrix)?, ty, importance)?
        } else {
            let mut packed = vec![0; count * row_bytes];
            ty.encode(values, &mut packed).expect("a type with an encoder");
            packed
        };
        writer.write_at(&tensor.gguf, offset, &packed)?;
        Ok::<(), Error>(())
    })?;
    source.release(name);
    Ok(())
}

/// What a report says of a linear that was only rounded.
fn plain_report(linear: &Linear, ty: GgmlType) -> LinearReport {
    let layout = ty.layout();
    LinearReport {
        name: linear.module.clone(),
        method: "rtn".to_owned(),
        ty: Some(ty.name),
        bits: layout.map_or((ty.block_bytes * 8) as u8, |layout| match layout.levels {
            Levels::Uniform { codes, .. } => (16 - (codes - 1).leading_zeros()) as u8,
            Levels::Table(_) => 4,
        }),
        group_size: layout.map_or(1, |layout| layout.group as i64),
        symmetric: layout.is_none_or(|layout| !layout.has_min),
        tokens: 0,
        prior: None,
        damp: None,
        fallback: None,
        proxy_loss: None,
        relative_error: None,
        seconds: 0.0,
    }
}

impl<B: Backend> Supply<B> for Work<'_, B> {
    fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        self.source.load(name)
    }

    fn router(&mut self, linear: &Linear) -> Result<Weight<B::Weight>> {
        Supply::<B>::router(&mut Plain { backend: self.backend, source: self.source }, linear)
    }

    fn linears(&mut self, group: &[&Linear], inputs: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>> {
        let statistics = observe(self.backend, self.source, group[0], self.needs, inputs, &mut self.seconds.observe)?;
        self.quantize(group, &statistics)
    }

    fn needs_output(&self, last_step: bool) -> bool {
        !(self.final_block && last_step)
    }
}
