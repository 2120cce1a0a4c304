//! A GGUF file as a Hugging Face checkpoint: names, row order, config.json.
//!
//! Which tensor of the file holds which rows of which tensor is what [`crate::dialect::names`] says for writing, gone
//! backwards.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;

use formats::container::gguf::{GgufSpec, GgufView, MetadataValue};
use formats::{Dtype, GgmlType, GgufFile, TensorView};
use serde_json::Value;

use crate::dialect::architectures::{ARCHITECTURES, Architecture, Need, ROPE_FREQS, ROPE_LONG, ROPE_SHORT};
use crate::dialect::names::{ExportTensor, From, Part, Source, plan};
use crate::dialect::settings::{CURVE, Settings};
use crate::dialect::tokenizer::rebuilt;
use crate::error::{Error, Result};
use crate::families;
use crate::graph::{Graph, Layer, Stored};
use crate::weights::{Entry, StoredType};
use crate::words::listed;

/// An opened GGUF model.
#[derive(Debug)]
pub(crate) struct GgufModel {
    file: GgufFile,
    config: Value,
    dtype: Dtype,
    tensors: HashMap<String, Mapped>,
    order: Vec<String>,
    notes: Vec<String>,
}

/// What a tensor is made of.
#[derive(Debug)]
struct Mapped {
    shape: Vec<usize>,
    pieces: Vec<Piece>,
    /// Of a matrix whose rows are rows of the file: for each its piece and the row there.
    rows: Option<Vec<(u32, u32)>>,
    /// The bytes of an F32 that is one of the file's settings, and of no tensor.
    setting: Option<[u8; 4]>,
}

/// Rows of a tensor of the file.
#[derive(Debug)]
struct Piece {
    /// The file's tensor.
    name: String,
    /// Its first row.
    first: usize,
    /// Its first column, of a vector that is in one with others.
    column: usize,
    /// What it is of the tensor.
    part: Part,
    /// What its weights are multiplied by.
    factor: f32,
}

impl GgufModel {
    /// Reads a file's settings and finds where each tensor of the checkpoint lies in it.
    ///
    /// Fails for a file that holds no model, an architecture or settings that cannot be read, and tensors of other shapes than
    /// the settings give.
    pub fn open(path: &Path) -> Result<GgufModel> {
        let file = GgufFile::open(path)?;
        let architecture = architecture(&file, path)?;
        let dtype = stored_dtype(file.tensors());
        let settings = settings(&file, architecture)?;
        let mut config = settings.config().map_err(|error| error.in_file(path))?;
        finish_config(&mut config, &file, dtype)?;
        let mut notes: Vec<String> = unread(path, &settings.unread()).into_iter().collect();
        notes.extend(foreign(path, &file.keys(), architecture.id));
        if let Some(window) = settings.unused_window().map_err(|error| error.in_file(path))? {
            notes.push(format!(
                "{}: its sliding window of {window} tokens is left out, as llama.cpp leaves it out for architecture {}: beyond {window} \
                 tokens the model attends to more than it was trained with",
                path.display(),
                architecture.id
            ));
        }

        let graph = families::build(&config).map_err(|error| Error::failed(format!("{}: {error}", path.display())))?;
        let planned = plan(&graph).map_err(|error| Error::failed(format!("{}: {error}", path.display())))?;
        let stored = super::fused::as_stored(planned.tensors, &file);
        let mut mapping = Mapping::of(&file, &graph, &stored, architecture).map_err(|error| error.in_file(path))?;
        let order = mapping.order();
        if let Some(first) = mapping.absent.first() {
            let others = mapping.absent.len() - 1;
            let more = if others > 0 { format!(" and {others} more") } else { String::new() };
            notes.push(format!(
                "{}: some layers or linears have biases and others none, which config.json has no word for: `{first}`{more} became zeros",
                path.display()
            ));
        }
        mapping.check_covered().map_err(|error| error.in_file(path))?;
        let tensors = mapping.tensors;
        notes.extend(super::tokenizer::rebuilt::notes(&file));
        Ok(GgufModel { file, config, dtype, tensors, order, notes })
    }

    /// What the user should know of the file.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// How hidden states become an embedding, as llama.cpp numbers it.
    pub fn pooling(&self) -> Option<u32> {
        let key = format!("{}.pooling_type", self.file.string("general.architecture").ok()??);
        u32::try_from(self.file.count(&key).ok()??).ok()
    }

    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    pub fn config(&self) -> &Value {
        &self.config
    }

    /// config.json of a folder with the same model, where that names another class.
    pub fn text_config(&self) -> Option<Value> {
        super::settings::config::as_text(&self.config)
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Every tensor under its Hugging Face name, in the file's order.
    pub fn entries(&self) -> Vec<Entry> {
        let entry = |name: &String| {
            let mapped = &self.tensors[name];
            let bytes = |piece: &Piece| {
                let view = self.file.get(&piece.name).expect("listed");
                let ([own, wide], (rows, width)) = (piece.part.extents(), view.rows_and_width());
                view.data.len() * own * wide / (rows * width).max(1)
            };
            let ty = |piece: &Piece| self.file.get(&piece.name).expect("listed").ty;
            let own = mapped.setting.map_or(0, |bytes| bytes.len());
            let stored = |ty: GgmlType| ty.plain().map_or(StoredType::Ggml(ty), StoredType::Plain);
            Entry {
                name: name.clone(),
                shape: mapped.shape.clone(),
                dtype: mapped.pieces.first().map_or(StoredType::Plain(Dtype::F32), |piece| stored(ty(piece))),
                stored_bytes: (own + mapped.pieces.iter().map(bytes).sum::<usize>()) as u64,
            }
        };
        self.order.iter().map(entry).collect()
    }

    /// Rows of a tensor in Hugging Face order; `rows` are within it, and each target holds one row.
    pub fn read_rows<'o>(&self, name: &str, rows: impl Iterator<Item = (usize, &'o mut [f32])>) -> formats::Result<()> {
        let mapped = &self.tensors[name];
        let Some(places) = &mapped.rows else {
            let width = mapped.shape.last().copied().unwrap_or(1);
            let whole = self.read(name, None)?;
            rows.for_each(|(row, out)| out.copy_from_slice(&whole[row * width..][..width]));
            return Ok(());
        };
        for (row, out) in rows {
            let (piece, at) = places[row];
            let Piece { name, first, part, factor, .. } = &mapped.pieces[piece as usize];
            let view = self.file.get(name).expect("listed");
            view.ty.dequantize(view.row(first + at as usize), out)?;
            part.decode(out);
            if *factor != 1.0 {
                out.iter_mut().for_each(|x| *x *= factor);
            }
        }
        Ok(())
    }

    /// All values of a tensor, or those of one of its slices.
    pub fn read(&self, name: &str, slice: Option<usize>) -> formats::Result<Vec<f32>> {
        let mapped = &self.tensors[name];
        if let Some(setting) = mapped.setting {
            return Ok(vec![f32::from_le_bytes(setting)]);
        }
        if let (None, Some(rows)) = (slice, &mapped.rows) {
            let width = mapped.shape.last().copied().unwrap_or(1);
            let mut values = vec![0.0; rows.len() * width];
            self.read_rows(name, values.chunks_exact_mut(width).enumerate())?;
            return Ok(values);
        }
        let one: usize = mapped.shape.iter().skip(usize::from(slice.is_some())).product();
        let sliced = |piece: &Piece| match &piece.part.from {
            From::Weight(linear) | From::Bias(linear) => matches!(linear.stored, Stored::Slice { .. }),
            From::Tensor(..) => false,
        };
        if let Some(index) = slice.filter(|_| !mapped.pieces.iter().all(sliced)) {
            return Ok(self.read(name, None)?[index * one..][..one].to_vec());
        }
        let mut values = vec![0.0; one];
        for Piece { name, first, column, part, factor } in &mapped.pieces {
            let at = match (&part.from, slice) {
                (From::Weight(linear) | From::Bias(linear), wanted) => match (&linear.stored, wanted) {
                    (Stored::Slice { index, .. }, Some(wanted)) if *index != wanted => continue,
                    (Stored::Slice { .. }, Some(_)) => 0,
                    (Stored::Slice { index, of, .. }, None) => index * (one / of),
                    _ => 0,
                },
                _ => 0,
            };
            let view = self.file.get(name).expect("listed");
            let [rows, width] = part.extents();
            let mut row = vec![0.0; view.rows_and_width().1];
            for r in 0..rows {
                view.ty.dequantize(view.row(first + r), &mut row)?;
                let row = &mut row[*column..][..width];
                part.decode(row);
                for (c, value) in row.iter().enumerate() {
                    values[at + place(part, [r, c])] = value * factor;
                }
            }
        }
        Ok(values)
    }

    /// The bytes of a tensor that is stored plainly and in Hugging Face order.
    pub fn raw(&self, name: &str) -> Option<TensorView<'_>> {
        let mapped = self.tensors.get(name)?;
        if let Some(setting) = &mapped.setting {
            return Some(TensorView { dtype: Dtype::F32, shape: &mapped.shape, data: setting });
        }
        let [piece] = &mapped.pieces[..] else { return None };
        let Piece { name, first: 0, column: 0, part, factor: 1.0 } = piece else { return None };
        let Part { from, rows: None, .. } = part else { return None };
        let plain = part.is_plain()
            && match from {
                From::Weight(linear) | From::Bias(linear) => linear.stored == Stored::Plain,
                From::Tensor(..) => true,
            };
        let view = self.file.get(name)?;
        let whole = plain && view.shape.iter().product::<usize>() == mapped.shape.iter().product::<usize>();
        whole.then_some(TensorView { dtype: view.ty.plain()?, shape: &mapped.shape, data: view.data })
    }

    /// Tells the system that a tensor will be read soon.
    pub fn announce(&self, name: &str) {
        // Of a tensor with parts of others those are still needed.
        if let Some([piece]) = self.tensors.get(name).map(|mapped| &mapped.pieces[..]) {
            self.file.announce(&piece.name);
        }
    }

    pub fn release(&self, name: &str) {
        // Of a tensor with parts of others those are still needed.
        if let Some([piece]) = self.tensors.get(name).map(|mapped| &mapped.pieces[..]) {
            self.file.release(&piece.name);
        }
    }

    /// What to say of a tokenizer that composes characters in the model that the file was made from, which the file does not say.
    pub fn composed(&self) -> Option<String> {
        let pre = self.file.string("tokenizer.ggml.pre").ok()??;
        ["qwen2", "qwen35"].contains(&pre).then(|| {
            format!(
                "{}: tokenizers that split as `{pre}` compose characters first (NFC), which a GGUF file does not say and llama.cpp does not do: the \
                 tokenizer.json that is written does not either; take that of the original model where texts have characters that are put \
                 together of several",
                self.file.path().display()
            )
        })
    }

    pub fn tokenizer_json(&self) -> Result<Value> {
        rebuilt::tokenizer_json(&self.file)
    }

    pub fn tokenizer_config(&self) -> Result<Value> {
        rebuilt::tokenizer_config(&self.file, self.config["max_position_embeddings"].as_u64())
    }

    pub fn generation_config(&self) -> Value {
        let mut config = super::sampling::read(&self.file);
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(id) = self.config.get(key).filter(|id| !id.is_null()) {
                config.insert(key.into(), id.clone());
            }
        }
        Value::Object(config)
    }
}

/// Where the tensors of a checkpoint lie in a file, while it is being found.
struct Mapping<'s> {
    file: &'s GgufFile,
    /// What the model's tensors are called in the file.
    planned: HashSet<&'s str>,
    /// Shapes of the tensors that the model needs.
    shapes: HashMap<String, Vec<usize>>,
    /// Tensors of the checkpoint by their Hugging Face names.
    tensors: HashMap<String, Mapped>,
    /// For each tensor of the file that the model has a use for, the tensors of the checkpoint that are made of it.
    known: HashMap<String, Vec<String>>,
    /// Tensors of the checkpoint that the file lacks wholly or in part, where that is as good as zeros.
    zeroed: BTreeSet<String>,
    /// The file's names of what is not there of these.
    absent: Vec<&'s str>,
}

impl<'s> Mapping<'s> {
    /// Looks up every tensor that a file of this model has, in the order of the plan. Fails for a tensor of another shape.
    fn of(
        file: &'s GgufFile,
        graph: &Graph,
        stored: &'s [ExportTensor],
        architecture: &Architecture,
    ) -> formats::Result<Mapping<'s>> {
        let mut mapping = Mapping {
            file,
            planned: stored.iter().map(|tensor| &tensor.gguf[..]).collect(),
            shapes: graph.tensors().into_iter().collect(),
            tensors: HashMap::new(),
            known: HashMap::new(),
            zeroed: BTreeSet::new(),
            absent: Vec::new(),
        };
        for tensor in stored.iter().filter(|tensor| !tensor.parts().is_empty()) {
            match file.get(&tensor.gguf) {
                Some(view) => mapping.locate(tensor, &view)?,
                // Loaders add each bias that is there, and config.json has one word for all of a kind.
                None if architecture.asks_for_bias(&tensor.gguf) == Need::May => mapping.zero(tensor),
                None => {}
            }
        }
        // Nothing reads what is there for loaders alone.
        let unread = stored.iter().filter(|tensor| tensor.source == Source::Zeros);
        mapping.known.extend(unread.map(|tensor| (tensor.gguf.clone(), Vec::new())));
        for (layer, block) in graph.blocks.iter().enumerate() {
            let learned = block.steps.iter().filter_map(|step| match &step.layer {
                Layer::Mlp(mlp) => mlp.learned.as_deref(),
                _ => None,
            });
            for (name, shape) in learned.flatten() {
                mapping.set(name, shape, layer)?;
            }
        }
        Ok(mapping)
    }

    /// Takes a number of a layer's activation out of the file's settings, where it is one for all layers or one for each.
    fn set(&mut self, name: &str, shape: &[usize], layer: usize) -> formats::Result<()> {
        let key = format!("{CURVE}.{}", name.rsplit('.').next().unwrap_or(name));
        let value = self.file.metadata(&key).ok_or_else(|| formats::Error::missing(format!("metadata key `{key}`")))?;
        let value = match value {
            MetadataValue::Array(list) => list.get(layer),
            one => Some(one),
        };
        let Some(MetadataValue::F32(number)) = value else {
            return Err(formats::Error::malformed(format!("metadata key `{key}` has no float for layer {layer}")));
        };
        let setting = Some(number.to_le_bytes());
        self.tensors.insert(name.to_owned(), Mapped { shape: shape.to_vec(), pieces: Vec::new(), rows: None, setting });
        Ok(())
    }

    /// Cuts a tensor of the file into the pieces that the checkpoint's tensors are made of.
    fn locate(&mut self, tensor: &ExportTensor, view: &GgufView<'_>) -> formats::Result<()> {
        let shapes_differ = view.shape.iter().product::<usize>() != tensor.shape.iter().product::<usize>()
            || view.shape.last() != tensor.shape.last();
        if shapes_differ {
            let error =
                formats::Error::mismatch("its shape", format!("{:?}", tensor.shape), format!("{:?}", view.shape));
            return Err(error.in_tensor(&tensor.gguf));
        }
        let own = |scale: &String| !self.planned.contains(&scale[..]);
        let scale = scale_of(&tensor.gguf).filter(own).and_then(|scale| Some((self.file.get(&scale)?, scale)));
        let factor = match &scale {
            None => 1.0,
            Some((view, scale)) => factor(view).map_err(|error| error.in_tensor(scale))?,
        };
        let (mut first, mut column) = (0, 0);
        let mut sources = Vec::new();
        for part in tensor.parts() {
            let source = part.from.tensor();
            let piece = Piece { name: tensor.gguf.clone(), first, column, part: part.clone(), factor };
            match view.shape.len() {
                1 => column += part.extents()[1],
                _ => first += part.extents()[0],
            }
            self.entry(tensor, &source).pieces.push(piece);
            if !sources.contains(&source) {
                sources.push(source);
            }
        }
        self.known.insert(tensor.gguf.clone(), sources);
        self.known.extend(scale.map(|(_, scale)| (scale, Vec::new())));
        Ok(())
    }

    /// Takes what a tensor that the file lacks would hold for zeros.
    fn zero(&mut self, tensor: &'s ExportTensor) {
        for source in tensor.parts().iter().map(|part| part.from.tensor()) {
            self.entry(tensor, &source);
            self.zeroed.insert(source);
        }
        self.absent.push(&tensor.gguf);
    }

    /// The tensor of the checkpoint of which `tensor` holds a part, without pieces where it is new.
    fn entry(&mut self, tensor: &ExportTensor, source: &str) -> &mut Mapped {
        self.tensors.entry(source.to_owned()).or_insert_with(|| {
            let shape = self.shapes.get(source).unwrap_or(&tensor.shape).clone();
            Mapped { shape, pieces: Vec::new(), rows: None, setting: None }
        })
    }

    /// Names of the checkpoint's tensors in the order in which the file begins each, then those that are zeros.
    ///
    /// An unknown tensor of the file is taken over under its own name, for whoever accounts for tensors to refuse.
    fn order(&mut self) -> Vec<String> {
        let (mut order, mut seen) = (Vec::new(), HashSet::new());
        let specs = self.file.tensors().iter();
        for spec in specs.filter(|spec| ![ROPE_FREQS, ROPE_LONG, ROPE_SHORT].contains(&&spec.name[..])) {
            let Some(sources) = self.known.get(&spec.name[..]) else {
                let part = Part::whole(From::Tensor(spec.name.clone(), spec.shape.clone()));
                let piece = Piece { name: spec.name.clone(), first: 0, column: 0, part, factor: 1.0 };
                let mapped = Mapped { shape: spec.shape.clone(), pieces: vec![piece], rows: None, setting: None };
                self.tensors.insert(spec.name.clone(), mapped);
                order.push(spec.name.clone());
                continue;
            };
            order.extend(sources.iter().filter(|source| seen.insert((*source).clone())).cloned());
        }
        order.extend(self.zeroed.iter().filter(|source| seen.insert((*source).clone())).cloned());
        let set = self.tensors.iter().filter(|(_, mapped)| mapped.setting.is_some());
        let set: BTreeSet<&String> = set.map(|(name, _)| name).collect();
        order.extend(set.into_iter().cloned());
        order
    }

    /// Finds the rows of each tensor. Fails for one of which the file has more or fewer values than its shape says.
    fn check_covered(&mut self) -> formats::Result<()> {
        for (name, mapped) in &mut self.tensors {
            mapped.rows = mapped.by_row();
            if self.zeroed.contains(name) || mapped.setting.is_some() {
                continue;
            }
            let covered: usize = mapped.pieces.iter().map(|piece| piece.part.extents().iter().product::<usize>()).sum();
            let values: usize = mapped.shape.iter().product();
            if covered != values {
                let error = formats::Error::mismatch("the values that the file has of it", values, covered);
                return Err(error.in_tensor(name));
            }
        }
        Ok(())
    }
}

impl Mapped {
    /// Where each row lies, of a matrix that is made of rows of the file.
    fn by_row(&self) -> Option<Vec<(u32, u32)>> {
        let width = *self.shape.last()?;
        if self.shape.len() < 2 || width == 0 {
            return None;
        }
        let rows = self.shape.iter().product::<usize>() / width;
        let mut places = vec![(u32::MAX, 0); rows];
        for (index, Piece { part, .. }) in self.pieces.iter().enumerate() {
            let plain = match &part.from {
                From::Weight(linear) => linear.stored == Stored::Plain,
                From::Bias(_) => false,
                From::Tensor(_, shape) => shape.len() > 1,
            };
            if part.transposed || part.columns.is_some() || !plain || part.extents()[1] != width {
                return None;
            }
            for row in 0..part.extents()[0] {
                let source = part.rows.as_ref().map_or(row, |rows| rows[row]);
                *places.get_mut(source)? = (index as u32, row as u32);
            }
        }
        places.iter().all(|(piece, _)| *piece != u32::MAX).then_some(places)
    }
}

/// Where the value in a row and column of a part lies in the tensor, or in its slice.
fn place(part: &Part, [row, col]: [usize; 2]) -> usize {
    let (row, col) = if part.transposed { (col, row) } else { (row, col) };
    let col = part.columns.as_ref().map_or(col, |columns| columns[col]);
    let of = |index: usize| part.rows.as_ref().map_or(index, |rows| rows[index]);
    let split = |linear: &crate::graph::Linear, index: usize| match &linear.stored {
        Stored::Slice { part: (split, which), .. } if !split.lengths.is_empty() => {
            let length = split.lengths[*which];
            let before: usize = split.lengths[..*which].iter().sum();
            let all: usize = split.lengths.iter().sum();
            index / length * all + before + index % length
        }
        _ => index,
    };
    match &part.from {
        From::Weight(linear) => {
            let row = split(linear, of(row));
            match &linear.stored {
                Stored::Transposed | Stored::Slice { transposed: true, .. } => col * linear.stored_rows() + row,
                _ => row * linear.cols + col,
            }
        }
        From::Bias(linear) => split(linear, of(col)),
        From::Tensor(_, shape) if shape.len() < 2 => of(col),
        From::Tensor(..) => of(row) * part.from.extents()[1] + col,
    }
}

/// The architecture that a file names. Fails for one that is not known, and for a file that holds something else than a model.
fn architecture(file: &GgufFile, path: &Path) -> Result<&'static Architecture> {
    let other = match file.string("general.type")? {
        Some("imatrix") => Some("an importance matrix; give it to quantize with --imatrix"),
        Some("adapter") => Some("an adapter of llama.cpp; give the folder that PEFT saved with --adapter"),
        Some("mmproj") => Some("what makes tokens of images; give the GGUF file of the model that it belongs to"),
        _ => None,
    };
    if let Some(other) = other {
        return Err(Error::failed(format!("{}: this is no model but {other}", path.display())));
    }
    let id = file.require("general.architecture", file.string("general.architecture")?)?;
    Architecture::named(id).ok_or_else(|| {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|architecture| architecture.id).collect();
        Error::failed(format!(
            "{}: GGUF architecture `{id}` is not one that can be read ({})",
            path.display(),
            known.join(", ")
        ))
    })
}

/// The tensor with what llama.cpp multiplies a linear's output by, before its bias.
fn scale_of(weight: &str) -> Option<String> {
    let linear = weight.starts_with("blk.") && !["norm", "gate_inp"].iter().any(|part| weight.contains(part));
    weight.strip_suffix(".weight").filter(|_| linear).map(|module| format!("{module}.scale"))
}

/// The one value of such a tensor.
fn factor(view: &GgufView<'_>) -> formats::Result<f32> {
    let count = view.shape.iter().product::<usize>();
    if count != 1 || view.ty.plain() != Some(Dtype::F32) {
        let found = format!("{count} of type {}", view.ty);
        return Err(formats::Error::mismatch("the scale of a whole linear", "one value of type F32", found));
    }
    let mut value = [0.0];
    view.ty.dequantize(view.data, &mut value)?;
    match value[0].is_finite() {
        true => Ok(value[0]),
        false => Err(formats::Error::malformed(format!("the scale {} is not a finite number", value[0]))),
    }
}

/// What to say of keys of no kind that llama.cpp writes: no output has them.
fn foreign(path: &Path, keys: &[&str], architecture: &str) -> Option<String> {
    let curve = if architecture == "apertus" { CURVE } else { architecture };
    let known = ["general", "tokenizer", "split", "quantize", "imatrix", architecture, curve];
    let is_known = |key: &str| key.split_once('.').is_some_and(|(kind, _)| known.contains(&kind));
    let others: Vec<&str> = keys.iter().copied().filter(|key| !is_known(key)).collect();
    (!others.is_empty()).then(|| {
        format!(
            "{}: keys that are not known here are left out of what is written ({})",
            path.display(),
            listed(&others)
        )
    })
}

/// What to say of settings that nothing here goes by.
fn unread(path: &Path, keys: &[&str]) -> Option<String> {
    (!keys.is_empty()).then(|| {
        format!(
            "{}: settings that are not known for this architecture were left out ({}): if the file's runtime goes by them, it \
             computes something else",
            path.display(),
            listed(keys)
        )
    })
}

/// What the file says, for [`Settings::config`].
fn settings(file: &GgufFile, architecture: &'static Architecture) -> Result<Settings> {
    let own = file.keys().into_iter().filter(|key| key.starts_with(architecture.id));
    let keys = own.map(|key| (key.to_owned(), file.metadata(key).expect("listed").clone())).collect();
    let tensors = file.tensors().iter().map(|spec| (spec.name.clone(), spec.shape.clone())).collect();
    let mut factors = HashMap::new();
    for name in [ROPE_FREQS, ROPE_LONG, ROPE_SHORT] {
        if let Some(view) = file.get(name) {
            let mut values = vec![0.0; view.shape.iter().product()];
            view.ty.dequantize(view.data, &mut values)?;
            factors.insert(name.to_owned(), values);
        }
    }
    Ok(Settings { architecture, keys, tensors, factors, asked: Default::default() })
}

/// What config.json says beside the model's shape.
fn finish_config(config: &mut Value, file: &GgufFile, dtype: Dtype) -> Result<()> {
    if config["vocab_size"].is_null() {
        let error = formats::Error::missing("the tensor").in_tensor("token_embd.weight").in_file(file.path());
        return Err(error.into());
    }
    let dtype = match dtype {
        Dtype::F32 => "float32",
        Dtype::BF16 => "bfloat16",
        _ => "float16",
    };
    let object = config.as_object_mut().expect("an object");
    object.insert("torch_dtype".into(), dtype.into());
    for (name, key) in [("bos_token_id", "bos"), ("pad_token_id", "padding")] {
        if let Some(id) = file.count(&format!("tokenizer.ggml.{key}_token_id"))? {
            object.insert(name.into(), id.into());
        }
    }
    // Some classes of transformers have a token of their own there, which a small vocabulary lacks.
    if object.get("pad_token_id").is_none() {
        object.insert("pad_token_id".into(), Value::Null);
    }
    let mut ends = rebuilt::ends(file)?;
    // Of several the first one ends what tables for tokens in a row see.
    if let Some(own) = object.get("eos_token_id").and_then(Value::as_u64) {
        ends.retain(|id| *id as u64 != own);
        ends.insert(0, own as usize);
    }
    match ends[..] {
        [] => {}
        [one] => drop(object.insert("eos_token_id".into(), one.into())),
        _ => drop(object.insert("eos_token_id".into(), ends.into())),
    }
    Ok(())
}

/// What converted weights should be stored as: the file's own float type, and half precision for ggml's blocks.
fn stored_dtype(tensors: &[GgufSpec]) -> Dtype {
    if tensors.iter().any(|spec| spec.ty.plain().is_none()) {
        return Dtype::F16;
    }
    let bytes = |dtype| tensors.iter().filter(|s| s.ty.plain() == Some(dtype)).map(GgufSpec::bytes).sum::<usize>();
    [Dtype::BF16, Dtype::F16, Dtype::F32].into_iter().max_by_key(|dtype| bytes(*dtype)).expect("three types")
}
