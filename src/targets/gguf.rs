//! A GGUF file, or the parts of one: types from a mix, and blocks for every linear.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use calibration::solvers::{Observer, Rows, lies_on_grid, pack_rows, searched};
use calibration::statistics::Needs;
use formats::container::gguf::MetadataValue;
use formats::{Dtype, Encoding, Follower, GgmlType, GgufTensor, GgufWriter, TensorView};
use kernels::Backend;
use ndarray::{Array2, ArrayView2, Axis};

use super::tokens::check;
use super::{Folded, Notes, Placement, Rounded, Sink, Solved, Target, Words, Write, further, in_pieces, projector};
use crate::checkpoint::Checkpoint;
use crate::dialect::metadata::{About, ImportanceSource, Metadata, Written, metadata};
use crate::dialect::names::{self, ExportPlan, ExportTensor, From, Part, Source};
use crate::dialect::projector::{Projector, Types};
use crate::dialect::sampling;
use crate::dialect::tokenizer::tokenizer;
use crate::error::{Error, Result};
use crate::evidence::{lost_in_blocks, share_of};
use crate::forward::{load_bias, load_matrix, numbers};
use crate::graph::{Graph, Layer, Linear, Step, Stored};
use crate::importance::{Importance, ImportancePlace};
use crate::mixes::{
    Mix, ModelShape, Overrides, TensorInfo, TensorOverride, assign, block_number, parse_type, quantizable,
    substitutions,
};
use crate::output::Staging;
use crate::plan::check_tensors;
use crate::recipe::{GgufRecipe, Mtp, Recipe, Said};
use crate::report::{Fate, Recovery, TensorReport, papers_beside, projector_beside};
use crate::rest::Lost;
use crate::stray::Strays;
use crate::words::called;

/// What the file will hold, decided and checked before any work is done.
pub struct GgufPlan {
    /// Tensors in file order.
    pub tensors: Vec<(ExportTensor, GgmlType)>,
    /// Where each linear of the blocks goes, by module.
    by_module: HashMap<String, Vec<Place>>,
    /// The same as whoever solves sees it.
    placements: HashMap<String, Vec<Placement>>,
    /// Types that do not fit a tensor's rows and were replaced, by module.
    fallbacks: HashMap<String, String>,
    /// Everything but tensors.
    metadata: Metadata,
    /// What the user should know.
    pub notices: Vec<String>,
    /// What becomes of every input tensor.
    fates: Vec<TensorReport>,
    /// Importance that is read from a file, or written to one.
    importance: Importance,
    /// Keys of the recipe that the types of the tensors leave without effect.
    pub idle: &'static [&'static str],
    /// The file that makes tokens of images, where the model sees and llama.cpp has a place for it.
    projector: Option<Projector>,
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
        let (architecture, places) = (plan.architecture, places(&plan));
        let mut importance = Importance::new(recipe, &plan)?;
        let weighted = importance.file().is_some() || recipe.needs() > Needs::Nothing;

        let infos: Vec<TensorInfo<'_>> =
            plan.tensors.iter().map(|t| TensorInfo { name: &t.gguf, shape: &t.shape }).collect();
        let (overrides, types) = overrides(graph, source, recipe, &plan, &places)?;
        let assigned = assign(mix, &model_shape(graph, &plan), &infos, weighted, &overrides)?;

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
        notices.extend(substitutions(assigned.iter()));
        let plain = assigned.iter().all(|assigned| assigned.ty.block_len == 1);
        let idle = if plain { IDLE_OF_PLAIN } else { &[] };
        if plain {
            notices.extend(unused_inputs(recipe, mix, &mut importance));
        }
        notices.extend(importance.check(graph, false)?);

        let collected = importance_source(recipe, &importance, made.len()).filter(|_| weighted);
        let written = written(graph, source, &plan, settings, collected.as_ref())?;
        notices.extend(written.notices);

        let strays = Strays::new(graph, source, recipe.unknown_tensors);
        let fates = fates(graph, &strays, source, &plan, &assigned.iter().map(|a| a.ty).collect::<Vec<_>>())?;
        notices.extend(further::told(graph, source, recipe));
        notices.extend(strays.notes(fates.iter().map(|one| (&*one.name, &one.fate)), false));
        let tensors: Vec<(ExportTensor, GgmlType)> =
            plan.tensors.into_iter().zip(assigned).map(|(tensor, assigned)| (tensor, assigned.ty)).collect();
        let placement = |place: &Place| {
            let (tensor, ty) = &tensors[place.tensor];
            let Part { rows, transposed, columns, factor, .. } = &tensor.parts()[place.part];
            let (rows, columns) = (rows.clone(), columns.clone());
            Placement { encoding: ty.encoding(), rows, transposed: *transposed, columns, factor: *factor }
        };
        let of = |(module, places): (&String, &Vec<Place>)| (module.clone(), places.iter().map(placement).collect());
        let placements = by_module.iter().map(of).collect();
        let metadata = written.metadata;
        let (projector, told) = projector::plan(source, graph, architecture, &types)?;
        notices.extend(told);
        Ok(GgufPlan {
            tensors,
            by_module,
            placements,
            fallbacks,
            metadata,
            notices,
            fates,
            importance,
            idle,
            projector,
        })
    }
}

/// Keys of a recipe that have no effect where all tensors have types without blocks.
const IDLE_OF_PLAIN: &[&str] = &["observer", "imatrix", "damp", "act_order", "refine"];

/// Forgets an importance matrix that is of no use to types without blocks, and says of it and of the method that they are not used.
fn unused_inputs(recipe: &Recipe, mix: &Mix, importance: &mut Importance) -> Vec<String> {
    let mut notices = Vec::new();
    if let (Some(path), true) = (&recipe.imatrix, importance.forget()) {
        let path = path.display();
        notices.push(format!("{path} was not used: {} rounds nothing by the importance of inputs", mix.name));
    }
    if recipe.method.sweeps() {
        let method = recipe.method.name();
        notices.push(format!("method {method} has no effect: {} rounds nothing by the inputs", mix.name));
    }
    notices
}

/// The types that the recipe gives tensors in place of the mix's: by their names, and those of modules that it leaves out or gives
/// another scheme; and those of matrices in the file for images. Fails for a type that is not known and for a pattern that matches nothing.
fn overrides(
    graph: &Graph,
    source: &Checkpoint,
    recipe: &Recipe,
    plan: &ExportPlan,
    places: &HashMap<String, Vec<Place>>,
) -> Result<(Overrides, Types)> {
    let settings = recipe.gguf.as_ref().expect("a recipe for a GGUF file");
    let mut overrides = Overrides {
        tensors: settings.tensor_type.iter().map(|t| TensorOverride::parse(t)).collect::<Result<_>>()?,
        output: settings.output_tensor_type.as_deref().map(parse_type).transpose().map_err(Error::usage)?,
        embedding: settings.token_embedding_type.as_deref().map(parse_type).transpose().map_err(Error::usage)?,
        pure: settings.pure,
    };
    let mut patterns = recipe.patterns()?;
    let plain = if source.dtype() == Dtype::F16 { "F16" } else { "BF16" };
    for linear in graph.linears().chain([&graph.head.linear]) {
        let ty = match recipe.said_of(&linear.module, &mut patterns) {
            Said::Ignored => plain,
            Said::Otherwise(change_to) => change_to.scheme.as_deref().expect("resolved"),
            Said::Nothing => continue,
        };
        for place in places.get(&linear.module).into_iter().flatten() {
            let exact = format!("^{}$={ty}", plan.tensors[place.tensor].gguf.replace('.', "\\."));
            overrides.tensors.insert(0, TensorOverride::parse(&exact)?);
        }
    }
    // Layers that predict further tokens are kept as they are, but for what is F32 in any case. A file of plain numbers has one type for all.
    let own = graph.blocks.len() - graph.predictors().len();
    let keep = recipe.mtp == Mtp::Keep && Mix::parse(settings.mix).expect("resolved").is_quantized();
    let kept = |tensor: &&ExportTensor| {
        let block = block_number(&tensor.gguf).filter(|_| keep);
        block.is_some_and(|block| block >= own) && quantizable(&tensor.gguf, &tensor.shape)
    };
    for tensor in plan.tensors.iter().filter(kept) {
        let exact = format!("^{}$={plain}", tensor.gguf.replace('.', "\\."));
        overrides.tensors.insert(0, TensorOverride::parse(&exact)?);
    }
    // The embedding serves as the head.
    if graph.head.tied && matches!(recipe.said_of(&graph.head.linear.module, &mut patterns), Said::Ignored) {
        overrides.tensors.insert(0, TensorOverride::parse(&format!("^token_embd\\.weight$={plain}"))?);
    }
    let types = projector::types(graph, source, recipe, &mut patterns)?;
    patterns.check_hits()?;
    Ok((overrides, types))
}

/// What the mixes' rules ask of a model.
fn model_shape<'p>(graph: &Graph, plan: &'p ExportPlan) -> ModelShape<'p> {
    let shape = graph.blocks.iter().find_map(|block| block.attention()).map(|attention| attention.shape);
    let shape = shape.expect("names::plan has seen attention");
    let experts = |step: &Step| match &step.layer {
        Layer::Moe(moe) => Some(moe.experts.len()),
        _ => None,
    };
    ModelShape {
        architecture: plan.architecture,
        layers: graph.blocks.len(),
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        experts: graph.blocks.iter().flat_map(|block| &block.steps).find_map(experts).unwrap_or(0),
    }
}

/// Where the importance of inputs comes from: a file, or what is collected for `entries` tensors.
///
/// None where the recipe has a file that is not used.
fn importance_source(recipe: &Recipe, importance: &Importance, entries: usize) -> Option<ImportanceSource> {
    match (importance.file(), &recipe.imatrix) {
        (Some(imatrix), path) => Some(ImportanceSource {
            file: called(&path.as_ref().expect("read").display().to_string()).to_owned(),
            dataset: imatrix.datasets.first().cloned(),
            entries: imatrix.entries.len() as u32,
            chunks: Some(imatrix.chunk_count),
        }),
        (None, None) => Some(ImportanceSource {
            file: "collected while quantizing".to_owned(),
            dataset: Some(called(&recipe.calibration).to_owned()),
            entries: entries as u32,
            chunks: u32::try_from(recipe.samples).ok(),
        }),
        (None, Some(_)) => None,
    }
}

/// Everything that the file says beside its tensors: the model, then its tokenizer. Fails as [`metadata`] and [`tokenizer`] do.
fn written(
    graph: &Graph,
    source: &Checkpoint,
    plan: &ExportPlan,
    settings: &GgufRecipe,
    importance: Option<&ImportanceSource>,
) -> Result<Written> {
    let mix = Mix::parse(settings.mix).expect("resolved");
    let mut written = metadata(graph, source.config(), plan, &About::of(source), mix.file_type, importance)?;
    if let Some(pooling) = source.pooling() {
        let key = format!("{}.pooling_type", plan.architecture);
        written.metadata.push((key, MetadataValue::U32(pooling)));
    }
    written.notices.extend(source.lost_in_gguf());
    let words = tokenizer(source, graph.vocabulary, settings.pre.as_deref())?;
    if let Some(name) = words.name {
        let own = written.metadata.iter_mut().find(|(key, _)| key == "general.name");
        own.into_iter().for_each(|(_, value)| *value = MetadataValue::String(name.clone()));
    }
    match source.gguf() {
        Some(file) => {
            let carried = sampling::carried(file, &written.metadata);
            written.metadata.extend(carried);
        }
        None => written.metadata.extend(sampling::written(&source.generation())),
    }
    written.metadata.extend(words.metadata);
    written.notices.extend(words.notices);
    Ok(written)
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

/// Accounts for every tensor of the input.
fn fates(
    graph: &Graph,
    strays: &Strays<'_>,
    source: &Checkpoint,
    plan: &ExportPlan,
    types: &[GgmlType],
) -> Result<Vec<TensorReport>> {
    let mut exported: HashMap<String, GgmlType> = HashMap::new();
    let layers = graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer);
    let learned = layers.filter_map(|layer| if let Layer::Mlp(mlp) = layer { mlp.learned.as_deref() } else { None });
    // Settings of the file.
    let numbers: HashSet<&str> = learned.flatten().map(|(name, _)| &name[..]).collect();
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
            None if numbers.contains(&entry.name[..]) => Fate::Copied,
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

/// A GGUF file, or the parts of one, that will be written.
pub struct Gguf {
    recipe: Recipe,
    plan: GgufPlan,
    /// The file to open, or the first of its parts, once they are laid out.
    first: OnceLock<PathBuf>,
}

impl Gguf {
    /// Decides. Fails as [`GgufPlan::new`] does.
    pub fn new(graph: &Graph, source: &Checkpoint, recipe: Recipe) -> Result<Gguf> {
        let plan = GgufPlan::new(graph, source, &recipe)?;
        Ok(Gguf { recipe, plan, first: OnceLock::new() })
    }

    /// What a writer is told of the tensors, and what it is to be called: of parts, what their names begin with.
    fn laid_out(&self, path: &Path) -> (PathBuf, Vec<GgufTensor>) {
        let spec = |(tensor, ty): &(ExportTensor, GgmlType)| GgufTensor {
            name: tensor.gguf.clone(),
            ty: *ty,
            shape: tensor.shape.clone(),
        };
        let split = self.settings().split_max_size.is_some();
        let path = if split { path.with_extension("") } else { path.to_path_buf() };
        (path, self.plan.tensors.iter().map(spec).collect())
    }

    fn settings(&self) -> &GgufRecipe {
        self.recipe.gguf.as_ref().expect("a recipe for a GGUF file")
    }

    fn places(&self, linear: &Linear) -> &[Place] {
        self.plan.by_module.get(&linear.module).map_or(&[], |found| found)
    }
}

impl<B: Backend> Target<B> for Gguf {
    fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn files(&self, name: &str) -> Result<Vec<(String, u64)>> {
        let (path, tensors) = self.laid_out(Path::new(name));
        let files = GgufWriter::sizes(path, self.settings().split_max_size, self.plan.metadata.clone(), tensors)?;
        Ok(files.into_iter().map(|(path, bytes)| (path.display().to_string(), bytes)).collect())
    }

    fn placements(&self, linear: &Linear) -> &[Placement] {
        self.plan.placements.get(&linear.module).map_or(&[], |found| found)
    }

    fn ends(&self) -> Vec<(String, [usize; 2], Encoding)> {
        let made: HashSet<usize> = self.plan.by_module.values().flatten().map(|place| place.tensor).collect();
        let others = self.plan.tensors.iter().enumerate().filter(|(index, _)| !made.contains(index));
        let end = |(_, (tensor, ty)): (usize, &(ExportTensor, GgmlType))| {
            let [rows, cols] = tensor.shape[..] else { return None };
            (ty.block_len > 1).then(|| (tensor.gguf.clone(), [rows, cols], ty.encoding()))
        };
        others.filter_map(end).collect()
    }

    fn importance(&self, linear: &Linear, placement: usize) -> Result<Option<Vec<f32>>> {
        self.plan.importance.of_part(&linear.module, placement)
    }

    fn importance_places(&self, linear: &Linear) -> Vec<ImportancePlace> {
        self.plan.importance.to_write(&linear.module)
    }

    fn takes_importance(&self) -> bool {
        self.plan.importance.file().is_some()
    }

    fn called(&self, linear: &Linear, placement: usize) -> String {
        self.plan.tensors[self.places(linear)[placement].tensor].0.gguf.clone()
    }

    fn fallback(&self, linear: &Linear) -> Option<String> {
        self.plan.fallbacks.get(&linear.module).cloned()
    }

    fn float_dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn linears(&self) -> usize {
        self.plan.by_module.len()
    }

    fn open<'a>(&'a self, source: &'a Checkpoint, staging: &'a Staging) -> Result<Box<dyn Sink<B> + 'a>> {
        let (path, tensors) = self.laid_out(&staging.folder().join(staging.name()));
        let metadata = self.plan.metadata.clone();
        let most = self.settings().split_max_size;
        let writer = match most {
            _ if staging.goes_on() => {
                GgufWriter::take_up(path, most, metadata, tensors).map_err(|error| staging.damaged(error.into()))?
            }
            None => GgufWriter::create(path, metadata, tensors)?,
            Some(most) => GgufWriter::create_split(path, most, metadata, tensors)?,
        };
        let first = writer.files().next().expect("at least one file").to_path_buf();
        self.first.get_or_init(|| first);
        Ok(Box::new(File { plan: &self.plan, source, observer: self.recipe.observer(), writer }))
    }

    fn complete(&self, source: &Checkpoint, staging: &Staging) -> Result<()> {
        self.plan.projector.as_ref().map_or(Ok(()), |found| projector::write(found, source, staging))
    }

    fn reopen(&self, _: &Staging) -> Result<Checkpoint> {
        Checkpoint::open(self.first.get().expect("opened before"))
    }

    fn notes(&self) -> Notes {
        Notes { before: Vec::new(), after: self.plan.notices.clone() }
    }

    fn tensors(&self) -> Vec<TensorReport> {
        self.plan.fates.clone()
    }

    fn quantized(&self, graph: &Graph) -> [u64; 2] {
        let bytes = |linear: &Linear| -> usize {
            let of = |place: &Place| {
                let (tensor, ty) = &self.plan.tensors[place.tensor];
                let [rows, width] = tensor.parts()[place.part].extents();
                rows * ty.row_bytes(width).expect("by the mix")
            };
            self.places(linear).iter().map(of).sum()
        };
        [
            graph
                .linears()
                .filter(|linear| !self.places(linear).is_empty())
                .map(|linear| (linear.rows * linear.cols) as u64)
                .sum(),
            graph.linears().map(|linear| bytes(linear) as u64).sum(),
        ]
    }

    fn idle(&self) -> Vec<&'static str> {
        self.plan.idle.to_vec()
    }

    fn papers(&self, name: &str) -> [String; 2] {
        papers_beside(name)
    }

    fn projector(&self, name: &str) -> Option<String> {
        self.plan.projector.as_ref().map(|_| projector_beside(name))
    }

    fn beside(&self) -> u64 {
        self.plan.projector.as_ref().map_or(0, projector::bytes)
    }

    fn carries_others(&self) -> bool {
        false
    }

    fn check_tokenizer(&self, source: &Checkpoint, reopened: &Checkpoint, words: &Words<'_>) -> Result<Vec<String>> {
        check(source, reopened, self.settings().pre.is_some(), words)
    }
}

/// The file while it is written.
struct File<'a> {
    plan: &'a GgufPlan,
    source: &'a Checkpoint,
    observer: Observer,
    writer: GgufWriter,
}

impl File<'_> {
    /// What the columns of a part count where its scales are searched.
    fn importance(&self, tensor: &ExportTensor, ty: GgmlType, part: usize) -> Result<Option<Vec<f32>>> {
        let alike = || vec![1.0; tensor.parts()[part].extents()[1]];
        match self.plan.importance.file() {
            _ if ty.layout().is_none() => Ok(None),
            Some(_) => self.plan.importance.at(&ImportancePlace::of(tensor, part)),
            None => Ok((self.observer == Observer::Mse).then(alike)),
        }
    }

    /// Writes every tensor that is not a linear of a block, and is `wanted` by the names of what it is made of.
    fn write_rest<B: Backend>(
        &self,
        backend: &B,
        folded: Option<&Folded>,
        wanted: &dyn Fn(&ExportTensor) -> bool,
    ) -> Result<Vec<Lost>> {
        let linears: HashSet<usize> = self.plan.by_module.values().flatten().map(|place| place.tensor).collect();
        let mut all = Vec::new();
        for (index, (tensor, ty)) in self.plan.tensors.iter().enumerate() {
            if linears.contains(&index) || !wanted(tensor) {
                continue;
            }
            match &tensor.source {
                Source::Values(values) => {
                    let mut bytes = vec![0; ty.row_bytes(values.len()).expect("F32")];
                    ty.encode(values, &mut bytes).expect("F32");
                    self.writer.write(&tensor.gguf, &bytes)?;
                }
                Source::Zeros => {
                    // Of any type zeros are what bytes of zeros stand for: a block's scale is one of them.
                    let count = tensor.shape.iter().product();
                    let bytes = vec![0; ty.row_bytes(count).expect("chosen for this width")];
                    self.writer.write(&tensor.gguf, &bytes)?;
                }
                Source::Parts(parts) if *ty == GgmlType::I32 => {
                    let numbers = numbers(self.source, &parts[0].from.tensor(), &tensor.shape)?;
                    let bytes: Vec<u8> = numbers.into_iter().flat_map(|n| (n as i32).to_le_bytes()).collect();
                    self.writer.write(&tensor.gguf, &bytes)?;
                }
                Source::Parts(parts) => {
                    let (mut first, mut lost) = (0, 0);
                    for (index, part) in parts.iter().enumerate() {
                        let importance = self.importance(tensor, *ty, index)?;
                        let place = (tensor, part, first);
                        let values = folded.and_then(|folded| folded.values(&part.from.tensor()));
                        lost += self.write_part(backend, place, *ty, importance.as_deref(), values)?.lost;
                        first += part.extents()[0];
                    }
                    let share = share_of(lost, tensor.shape.iter().product());
                    all.extend(share.map(|share| Lost { index, name: parts[0].from.tensor(), share }));
                }
            }
        }
        Ok(all)
    }

    /// Writes one part of a tensor in pieces of whole rows, each read, rounded and written by one thread; copied where it
    /// lies in the input as it will in the output; of what was folded before these are the `changed` values. Returns how many values are
    /// lost for want of a scale, and whether all rows lay on a grid already.
    fn write_part<B: Backend>(
        &self,
        backend: &B,
        (tensor, part, start): (&ExportTensor, &Part, usize),
        ty: GgmlType,
        importance: Option<&[f32]>,
        changed: Option<&[f32]>,
    ) -> Result<PartDone> {
        let File { source, writer, .. } = self;
        let [rows, cols] = part.extents();
        let name = part.from.tensor();
        let row_bytes = ty.row_bytes(cols).expect("a type that fits, by the mix");
        let straight = changed.is_none()
            && !part.transposed
            && part.columns.is_none()
            && match &part.from {
                From::Weight(linear) => linear.stored == Stored::Plain,
                From::Bias(linear) => !matches!(linear.stored, Stored::Slice { .. }),
                From::Tensor(..) => true,
            };
        let by_rows = straight && source.entry(&name).is_some_and(|entry| entry.shape.len() == 2);
        let whole = straight && part.rows.is_none() && part.is_plain();
        let same = source.raw(&name).filter(|raw| whole && ty.plain() == Some(raw.dtype));
        let loaded = if by_rows || same.is_some_and(|raw| raw.is_finite()) {
            Vec::new()
        } else {
            load_part(source, part, changed)?
        };
        let searched = searched(ty, importance.is_some());
        let [on_grid, exact] = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let lost = in_pieces(backend, [rows, cols], |values, range| {
            let (first, count) = (range.start, range.len());
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
                source.load_rows(&name, &range.map(of).collect::<Vec<u32>>(), values)?;
            } else {
                values.copy_from_slice(&loaded[first * cols..][..count * cols]);
            }
            part.encode(values);
            let names = [&*name, &*tensor.gguf];
            let first_row = ArrayView2::from_shape((1, cols), &values[..cols]).expect("a row");
            let (packed, lost) = if searched || lies_on_grid(first_row, ty) {
                let matrix = Array2::from_shape_vec((count, cols), std::mem::take(values)).expect("whole rows");
                let matrix = backend.upload(matrix)?;
                let Rows { bytes: packed, recovered } = pack_rows(backend, &matrix, ty, importance)?;
                on_grid.fetch_add(recovered.map_or(0, |_| count), Ordering::Relaxed);
                exact.fetch_add(recovered.map_or(0, |exact| if exact { count } else { 0 }), Ordering::Relaxed);
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
            Ok(lost)
        })?;
        source.release(&name);
        let recovered = (rows > 0 && on_grid.into_inner() == rows).then(|| exact.into_inner() == rows);
        Ok(PartDone { lost, recovered })
    }
}

/// What there is to tell of a part that was written.
struct PartDone {
    /// Values that are lost for want of a scale.
    lost: usize,
    /// Whether all of its rows lay on a grid already, and were recovered to the bit.
    recovered: Option<bool>,
}

impl<B: Backend> Sink<B> for File<'_> {
    fn follow(&self) -> Result<Vec<Follower>> {
        Ok(self.writer.follow()?)
    }

    // The embedding is the first of the file: the hash, which follows the writing, need not wait for it.
    fn before(&self, backend: &B, folded: &dyn Fn(&str) -> bool) -> Result<Vec<Lost>> {
        let touched = |tensor: &ExportTensor| tensor.parts().iter().any(|part| folded(&part.from.tensor()));
        self.write_rest(backend, None, &|tensor| !touched(tensor))
    }

    fn put(&self, _: &B, linear: &Linear, placement: usize, solved: Solved<B>, _: Option<&[f32]>) -> Result<Write<'_>> {
        let packed = solved.rows.expect("GGUF holds rows");
        let place = self.plan.by_module[&linear.module][placement];
        let tensor = &self.plan.tensors[place.tensor].0;
        let part = &tensor.parts()[place.part];
        let [rows, _] = part.extents();
        let row_bytes = packed.len() / rows;
        let bytes = match &part.rows {
            // Rows of the whole were solved in the linear's own order.
            Some(order) if !part.transposed && part.factor == 1.0 && rows == linear.rows => {
                let mut sorted = Vec::with_capacity(packed.len());
                order.iter().for_each(|row| sorted.extend_from_slice(&packed[row * row_bytes..][..row_bytes]));
                sorted
            }
            _ => packed,
        };
        let offset = (place.first * row_bytes) as u64;
        Ok(Box::new(move || Ok(self.writer.write_at(&tensor.gguf, offset, &bytes)?)))
    }

    fn round(&self, backend: &B, linear: &Linear) -> Result<Option<Rounded>> {
        let places = &self.plan.by_module[&linear.module];
        let (mut lost, mut exact) = (0, Vec::new());
        for place in places {
            let (tensor, ty) = &self.plan.tensors[place.tensor];
            let importance = self.importance(tensor, *ty, place.part)?;
            let part = &tensor.parts()[place.part];
            let done = self.write_part(backend, (tensor, part, place.first), *ty, importance.as_deref(), None)?;
            lost += done.lost;
            exact.push(done.recovered);
        }
        let recovered = Recovery::of(exact);
        Ok(Some(Rounded { lost, recovered, encoding: self.plan.tensors[places[0].tensor].1.encoding() }))
    }

    fn write_folded(&self, backend: &B, folded: &Folded, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Lost>> {
        let touched = |tensor: &ExportTensor| {
            let mut names = tensor.parts().iter().map(|part| part.from.tensor());
            names.any(|name| folded.touches(&name) && wanted(&name))
        };
        self.write_rest(backend, Some(folded), &touched)
    }

    fn keep_written(&self, linear: &Linear) -> Result<()> {
        let places = &self.plan.by_module[&linear.module];
        Ok(places.iter().try_for_each(|place| self.writer.keep(&self.plan.tensors[place.tensor].0.gguf))?)
    }

    fn held(&self, backend: &B, linear: &Linear) -> Result<Option<B::Matrix>> {
        let mut whole = Array2::zeros((linear.rows, linear.cols));
        let places = &self.plan.by_module[&linear.module];
        for (place, placement) in places.iter().zip(&self.plan.placements[&linear.module]) {
            let (tensor, ty) = &self.plan.tensors[place.tensor];
            let [rows, width] = tensor.parts()[place.part].extents();
            let row_bytes = ty.row_bytes(width).expect("by the mix");
            let mut packed = vec![0; rows * row_bytes];
            self.writer.read_part(&tensor.gguf, (place.first * row_bytes) as u64, &mut packed)?;
            let mut values = vec![0.0; rows * width];
            ty.dequantize(&packed, &mut values)?;
            placement.place(ArrayView2::from_shape((rows, width), &values).expect("one value a weight"), &mut whole);
        }
        Ok(Some(backend.upload(whole)?))
    }

    fn sync(&self) -> Result<()> {
        Ok(self.writer.sync()?)
    }

    fn finish(self: Box<Self>) -> Box<dyn FnOnce() -> formats::Result<()> + Send> {
        let writer = self.writer;
        Box::new(move || writer.finish())
    }
}

/// All values of a part, `[rows, cols]`, before they are [encoded](Part::encode); `changed` are those of its tensor where they are not the input's.
fn load_part(source: &Checkpoint, part: &Part, changed: Option<&[f32]>) -> Result<Vec<f32>> {
    let load = |name: &str| changed.map_or_else(|| source.load(name), |values| Ok(values.to_vec()));
    let (matrix, rows) = match &part.from {
        From::Weight(linear) => (load_matrix(source, linear)?, part.rows.as_deref()),
        From::Bias(linear) => {
            let bias = match changed {
                Some(values) => values.to_vec(),
                None => load_bias(source, linear)?.expect("planned for those that have one"),
            };
            (Array2::from_shape_vec((bias.len(), 1), bias).expect("one column"), part.rows.as_deref())
        }
        From::Tensor(name, _) => {
            let values = load(name)?;
            let [count, width] = part.from.extents();
            let shape = if count == 1 { (width, 1) } else { (count, width) };
            (Array2::from_shape_vec(shape, values).expect("checked with the graph"), part.rows.as_deref())
        }
    };
    let chosen = match rows {
        Some(rows) => matrix.select(Axis(0), rows),
        None => matrix,
    };
    let chosen = match &part.columns {
        Some(columns) => chosen.select(Axis(1), columns),
        None => chosen,
    };
    let chosen = if part.transposed { chosen.reversed_axes() } else { chosen };
    Ok(chosen.iter().copied().collect())
}
