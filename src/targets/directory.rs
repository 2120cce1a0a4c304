//! A Hugging Face directory: safetensors files, what config.json says of their quantization, and everything that lies beside the weights.

use std::collections::HashMap;
use std::io::{Read, Write as _};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use calibration::solvers::{Asked, Observer, Rtn, Shared, Solver};
use formats::codec::{QuantizationReader, read_quantization};
use formats::container::file;
use formats::{Dtype, Encoding, Follower, PackedWeight, ShardedWriter, TensorSpec, TensorView};
use kernels::{Backend, GridSpec};
use ndarray::Array2;
use serde_json::Value;

use super::{Folded, Notes, Placement, Sink, Solved, Target, Write, further, in_pieces};
use crate::checkpoint::{Beside, Checkpoint, SideFile};
use crate::error::{Error, Result};
use crate::evidence::{lost_in_grid, share_of};
use crate::families::{self, spelt_out};
use crate::forward::Weight;
use crate::graph::{Graph, Linear, Stored};
use crate::importance::{Importance, ImportancePlace};
use crate::json;
use crate::output::{Staging, bytes_of, weight_files, weight_writer};
use crate::plan::{End, Plan};
use crate::recipe::{Recipe, Towers};
use crate::report::{Fate, PAPERS, TensorReport};
use crate::rest::{Lost, Rest, copied, rest, write_floats};

/// A directory that will be written.
pub struct Directory {
    recipe: Recipe,
    plan: Plan,
    /// Of every linear that it quantizes, by module.
    placements: HashMap<String, [Placement; 1]>,
    /// Importance that is read from a file, or written to one.
    importance: Importance,
    /// What there is to say of the one that was read.
    said: Vec<String>,
    beside: Beside,
    family: &'static str,
}

impl Directory {
    /// Decides. Fails as [`Plan::new`] does.
    pub fn new(graph: &Graph, source: &Checkpoint, recipe: Recipe) -> Result<Directory> {
        let plan = Plan::new(graph, source, &recipe)?;
        let importance = Importance::of_graph(&recipe, graph)?;
        let mut said = importance.check(graph, true)?;
        said.extend(further::told(graph, source, &recipe));
        let mut own = vec!["config.json"];
        own.extend(PAPERS);
        own.extend(plan.config.files.iter().map(|(name, _)| &name[..]));
        let beside = source.beside(&own)?;
        let placements =
            plan.encodings.iter().map(|(module, encoding)| (module.clone(), [Placement::whole(*encoding)]));
        let family = graph.family;
        Ok(Directory { placements: placements.collect(), recipe, plan, importance, said, beside, family })
    }
}

impl<B: Backend> Target<B> for Directory {
    fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn files(&self, _: &str) -> Result<Vec<(String, u64)>> {
        weight_files(self.plan.outputs.clone())
    }

    fn beside(&self) -> u64 {
        self.beside.bytes()
    }

    fn placements(&self, linear: &Linear) -> &[Placement] {
        self.placements.get(&linear.module).map_or(&[], |one| one)
    }

    fn ends(&self) -> Vec<(String, [usize; 2], Encoding)> {
        self.plan.ends.iter().map(|end| (end.tensor.clone(), end.shape, end.encoding)).collect()
    }

    fn importance(&self, linear: &Linear, _: usize) -> Result<Option<Vec<f32>>> {
        self.importance.of_whole(&linear.module)
    }

    fn importance_places(&self, linear: &Linear) -> Vec<ImportancePlace> {
        self.importance.to_write(&linear.module)
    }

    fn takes_importance(&self) -> bool {
        self.importance.file().is_some()
    }

    fn called(&self, linear: &Linear, _: usize) -> String {
        linear.weight()
    }

    fn float_dtype(&self) -> Dtype {
        self.plan.float_dtype
    }

    fn linears(&self) -> usize {
        self.plan.encodings.len()
    }

    fn open<'a>(&'a self, source: &'a Checkpoint, staging: &'a Staging) -> Result<Box<dyn Sink<B> + 'a>> {
        let goes_on = staging.goes_on();
        let writer = weight_writer(staging.folder(), self.plan.outputs.clone(), goes_on)
            .map_err(|error| if goes_on { staging.damaged(error) } else { error })?;
        let reader = if goes_on { read_quantization(&self.plan.config.of(self.plan.codec))? } else { None };
        // Of the inputs of what stands at the ends nothing is known but what an imatrix says.
        let observer = match self.recipe.observer() {
            Observer::MinMax => Observer::MinMax,
            _ => Observer::Mse,
        };
        let (plan, importance) = (&self.plan, &self.importance);
        Ok(Box::new(Files { plan, importance, source, rest: rest(plan), writer, reader, observer }))
    }

    /// config.json, the codec's files, the tokenizer and everything else that belongs to the model.
    fn complete(&self, source: &Checkpoint, staging: &Staging) -> Result<()> {
        let mut config = source.config_of_folder();
        // mlx-lm has defaults of its own, and takes what newer keys say of rotary positions for nothing.
        if self.plan.codec.id() == "mlx" {
            config = spelt_out(&config);
        }
        if let Value::Object(config) = &mut config {
            if let Value::Object(said) = self.plan.config.of(self.plan.codec) {
                config.extend(said);
            }
            further::uncount(config, &self.recipe);
            further::tell_plain(config, self.family, &self.recipe);
            tell_dtype(config, source.dtype());
            for key in families::TEXT_PARTS {
                if let Some(Value::Object(text)) = config.get_mut(key) {
                    tell_dtype(text, source.dtype());
                }
            }
        }
        debug_assert!(self.plan.fates.iter().any(|(_, fate)| *fate == Fate::Quantized));
        write_config(&config, staging)?;
        for (name, content) in &self.plan.config.files {
            staging.write(name, content)?;
        }
        copy_side_files(&self.beside, staging)
    }

    fn reopen(&self, staging: &Staging) -> Result<Checkpoint> {
        Checkpoint::open_strictly(staging.folder())
    }

    fn notes(&self) -> Notes {
        let after = self.beside.notes.iter().chain(&self.said).cloned().collect();
        Notes { before: self.plan.config.notes.clone(), after }
    }

    fn tensors(&self) -> Vec<TensorReport> {
        let report = |(name, fate): &(String, Fate)| TensorReport { name: name.clone(), fate: fate.clone(), ty: None };
        self.plan.fates.iter().map(report).collect()
    }

    fn quantized(&self, graph: &Graph) -> [u64; 2] {
        let Plan { codec, encodings, ends, scale_dtype, .. } = &self.plan;
        let linears = graph.linears().filter_map(|l| Some(([l.rows, l.cols], encodings.get(&l.module)?)));
        let ends = ends.iter().map(|end| (end.shape, &end.encoding));
        let bytes = |([rows, cols], encoding): ([usize; 2], &Encoding)| {
            let parts = codec.layout(rows, cols, encoding, *scale_dtype).into_iter();
            let specs = parts.map(|(part, dtype, shape)| TensorSpec { name: part.to_owned(), dtype, shape });
            [(rows * cols) as u64, bytes_of(&specs.collect::<Vec<_>>())]
        };
        linears.chain(ends).map(bytes).fold([0, 0], |[weights, all], [more, bytes]| [weights + more, all + bytes])
    }

    fn projector(&self, _: &str) -> Option<String> {
        None
    }

    fn idle(&self) -> Vec<&'static str> {
        let of_towers = self.plan.ends.iter().any(|end| end.whole);
        if self.recipe.towers != Towers::Keep && !of_towers { vec!["towers"] } else { Vec::new() }
    }

    fn papers(&self, _: &str) -> [String; 2] {
        PAPERS.map(str::to_owned)
    }

    fn carries_others(&self) -> bool {
        true
    }
}

/// The weight files while they are written.
struct Files<'a> {
    plan: &'a Plan,
    importance: &'a Importance,
    source: &'a Checkpoint,
    rest: Vec<Rest<'a>>,
    writer: ShardedWriter,
    /// How its weights are read back, where an earlier process has written some.
    reader: Option<QuantizationReader>,
    /// How scales of the embedding and the head are chosen where no imatrix has them.
    observer: Observer,
}

impl Files<'_> {
    fn write_packed(&self, module: &str, tensor: String, weight: PackedWeight) -> Result<()> {
        let parts = self.plan.codec.encode_packed(weight, self.plan.scale_dtype);
        let parts = parts.map_err(|e| Error::from(e.in_tensor(tensor)))?;
        for (part, tensor) in &parts.0 {
            self.writer.write(&format!("{module}.{part}"), &tensor.data)?;
        }
        Ok(())
    }

    /// Rounds and writes the embedding, the head or a linear of a tower, in pieces where that may be. Returns what it loses.
    fn round_end<B: Backend>(&self, backend: &B, end: &End) -> Result<Option<Lost>> {
        let Files { plan: Plan { codec, scale_dtype, .. }, source, .. } = self;
        let End { index, module, tensor, shape, encoding, .. } = end;
        let [rows, cols] = *shape;
        // The head is a linear, the embedding a tensor.
        let importance = match self.importance.of_whole(module)? {
            None => self.importance.of_whole(tensor)?,
            found => found,
        };
        let observer = if importance.is_some() { Observer::Imatrix } else { self.observer };
        let (solver, alone) = (Rtn { observer }, Shared { statistics: None, factor: None, fallback: None });
        let piece = |values: &mut Vec<f32>, range: Range<usize>| {
            values.resize(range.len() * cols, 0.0);
            source.load_rows(tensor, &(range.start as u32..range.end as u32).collect::<Vec<u32>>(), values)?;
            let matrix = Array2::from_shape_vec((range.len(), cols), std::mem::take(values)).expect("whole rows");
            let matrix = backend.upload(matrix)?;
            let asked =
                Asked { weight: &matrix, spec: GridSpec::of(*encoding, cols), importance: importance.as_deref() };
            let solution = solver.solve(backend, &alone, &[asked])?.pop().expect("one for each");
            let lost = solution.grid().map_or(Ok(0), |grid| {
                lost_in_grid(grid, source.file_of(tensor), tensor, || {
                    Ok([backend.download(&matrix)?, backend.download(&solution.dequantized)?])
                })
            })?;
            let packed = solution.packed(backend, codec.word_layout())?;
            let parts = codec.encode_packed(packed, *scale_dtype).map_err(|e| Error::from(e.in_tensor(tensor)))?;
            for (part, piece) in &parts.0 {
                let offset = piece.data.len() / range.len() * range.start;
                self.writer.write_part(&format!("{module}.{part}"), offset as u64, &piece.data)?;
            }
            Ok(lost)
        };
        let lost = match end.whole {
            true => piece(&mut Vec::new(), 0..rows)?,
            false => in_pieces(backend, *shape, piece)?,
        };
        source.release(tensor);
        Ok(share_of(lost, rows * cols).map(|share| Lost { index: *index, name: tensor.clone(), share }))
    }
}

impl<B: Backend> Sink<B> for Files<'_> {
    fn follow(&self) -> Result<Vec<Follower>> {
        Ok(self.writer.follow()?)
    }

    // No transform changes what stands at the ends.
    fn before(&self, backend: &B, _: &dyn Fn(&str) -> bool) -> Result<Vec<Lost>> {
        let lost = self.plan.ends.iter().map(|end| self.round_end(backend, end)).collect::<Result<Vec<_>>>()?;
        Ok(lost.into_iter().flatten().collect())
    }

    // Embedding and head are the most of what stays, and are on the disk long before the last linear is solved.
    fn beside(&self, folded: &(dyn Fn(&str) -> bool + Sync), over: &AtomicBool) -> Result<Vec<Lost>> {
        copied(self.source, self.rest.iter().filter(|rest| !folded(rest.name)), &self.writer, over)
    }

    fn put(
        &self,
        backend: &B,
        linear: &Linear,
        _: usize,
        solved: Solved<B>,
        bias: Option<&[f32]>,
    ) -> Result<Write<'_>> {
        let weight = solved.solution.packed(backend, self.plan.codec.word_layout())?;
        let (module, tensor) = (linear.module.clone(), linear.weight());
        // Only where it is not written as a tensor of its own.
        let bias = bias.filter(|_| matches!(linear.stored, Stored::Slice { .. })).map(<[f32]>::to_vec);
        Ok(Box::new(move || {
            self.write_packed(&module, tensor, weight)?;
            let Some(bias) = bias else { return Ok(()) };
            write_floats(self.source, &self.writer, &format!("{module}.bias"), self.plan.float_dtype, &bias).map(drop)
        }))
    }

    /// An expert out of a stack of which others are quantized; what is stored alone is copied with the rest.
    fn keep(&self, backend: &B, linear: &Linear, weight: &Weight<B::Matrix>) -> Result<Option<(String, f64)>> {
        if !self.plan.unstacked(linear) {
            return Ok(None);
        }
        let values = backend.download(&weight.matrix)?;
        let (dtype, name) = (self.plan.float_dtype, format!("{}.weight", linear.module));
        let values = values.as_slice().expect("contiguous");
        let lost = write_floats(self.source, &self.writer, &name, dtype, values)?;
        if let Some(bias) = &weight.bias {
            write_floats(self.source, &self.writer, &format!("{}.bias", linear.module), dtype, bias)?;
        }
        Ok(lost.map(|share| (name, share)))
    }

    fn write_folded(&self, _: &B, folded: &Folded, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Lost>> {
        let mut all = Vec::new();
        for rest in self.rest.iter().filter(|rest| folded.touches(rest.name) && wanted(rest.name)) {
            let lost = match folded.values(rest.name) {
                Some(values) => write_floats(self.source, &self.writer, rest.name, rest.dtype, values)?,
                None => rest.copy(self.source, &self.writer)?,
            };
            all.extend(rest.lost(lost));
        }
        Ok(all)
    }

    fn keep_written(&self, linear: &Linear) -> Result<()> {
        let Linear { module, rows, cols, .. } = linear;
        match self.plan.encodings.get(module) {
            Some(encoding) => {
                let parts = self.plan.codec.layout(*rows, *cols, encoding, self.plan.scale_dtype);
                parts.iter().try_for_each(|(part, ..)| self.writer.keep(&format!("{module}.{part}")))?;
            }
            None if self.plan.unstacked(linear) => self.writer.keep(&format!("{module}.weight"))?,
            None => return Ok(()),
        }
        match &linear.stored {
            Stored::Slice { bias: Some(_), .. } => Ok(self.writer.keep(&format!("{module}.bias"))?),
            _ => Ok(()),
        }
    }

    fn held(&self, backend: &B, linear: &Linear) -> Result<Option<B::Matrix>> {
        let Linear { module, rows, cols, .. } = linear;
        let Some(encoding) = self.plan.encodings.get(module) else { return Ok(None) };
        let mut parts = HashMap::new();
        for (part, dtype, shape) in self.plan.codec.layout(*rows, *cols, encoding, self.plan.scale_dtype) {
            let name = format!("{module}.{part}");
            let size = TensorSpec { name: name.clone(), dtype, shape: shape.clone() }.bytes().expect("planned");
            let mut data = vec![0; size];
            self.writer.read_part(&name, 0, &mut data)?;
            parts.insert(part.to_owned(), (dtype, shape, data));
        }
        let reader = self.reader.as_ref().expect("of files that were taken up");
        let declared = reader.declared(module)?.expect("planned");
        let part = |name: &str| parts.get(name).map(|(dtype, shape, data)| TensorView { dtype: *dtype, shape, data });
        let codec = self.plan.codec;
        let weight = codec.decode_packed(&part, &declared).map_err(|error| error.in_tensor(module))?;
        Ok(Some(backend.upload_packed(weight, codec.word_layout())?))
    }

    fn sync(&self) -> Result<()> {
        Ok(self.writer.sync()?)
    }

    fn finish(self: Box<Self>) -> Box<dyn FnOnce() -> formats::Result<()> + Send> {
        let writer = self.writer;
        Box::new(move || writer.finish())
    }
}

/// Has a configuration that says of which type the weights are say this one, under whichever of the two keys it does.
pub fn tell_dtype(config: &mut serde_json::Map<String, Value>, dtype: Dtype) {
    let name = match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    };
    for key in ["dtype", "torch_dtype"] {
        if let Some(said) = config.get_mut(key).filter(|said| said.is_string()) {
            *said = Value::from(name);
        }
    }
}

/// Writes config.json.
pub fn write_config(config: &Value, staging: &Staging) -> Result<()> {
    let mut bytes = json::pretty(config);
    bytes.push(b'\n');
    staging.write("config.json", &bytes)
}

/// Carries over what lies beside the weights.
pub fn copy_side_files(beside: &Beside, staging: &Staging) -> Result<()> {
    for (name, file) in &beside.files {
        let to = staging.folder().join(name);
        if let Some(folder) = to.parent() {
            std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        }
        match file {
            SideFile::Bytes(bytes) => std::fs::write(&to, bytes).map_err(Error::io(&to, "write"))?,
            SideFile::Copy(path, identity) => copy_file(path, identity, &to)?,
        }
    }
    Ok(())
}

/// Copies what a file holds; its mode is that of any new file. Fails for another file than was looked at when the run began, and for
/// one that was written to: a tokenizer would not be the one that the model was calibrated with, and a link may lead anywhere by now.
fn copy_file(from: &Path, identity: &file::Identity, to: &Path) -> Result<()> {
    let mut read = file::open(from).map_err(Error::io(from, "open"))?;
    identity.check_opened(&read).map_err(Error::io(from, "rely on"))?;
    let mut write = std::fs::File::create(to).map_err(Error::io(to, "create"))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = read.read(&mut buffer).map_err(Error::io(from, "read"))?;
        if count == 0 {
            return identity.check_opened(&read).map_err(Error::io(from, "rely on"));
        }
        write.write_all(&buffer[..count]).map_err(Error::io(to, "write"))?;
    }
}
