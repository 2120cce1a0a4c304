//! One view over every checkpoint that can be read: a Hugging Face directory, quantized or not, and a GGUF file.
//!
//! Whatever the source, tensors have their Hugging Face names and orientation. A quantized linear appears as the one
//! entry `<module>.weight`. Nothing is loaded on opening; the files stay mapped and their headers are checked wholly.
//! With a LoRA adapter every tensor is read as merged with it, one at a time, so that nobody else need know of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use formats::codec::{Foreign, QuantizationReader};
use formats::{Dtype, Encoding, GgufFile, PackedWeight, QuantizedWeight, SafetensorsSet, TensorView, WordLayout};
use kernels::ActivationRounding;
use serde_json::Value;

use self::adapter::{Adapter, Change};
use crate::dialect::model::GgufModel;
use crate::error::{Error, Result};
use crate::families;
use crate::report::AdapterReport;
use crate::weights::{Entry, RawTensor, StoredType, Weights};

/// What names of tensors end in that values are cut at, as Gemma 4's towers have them. They may be infinite.
const BOUNDS: [&str; 4] = [".input_min", ".input_max", ".output_min", ".output_max"];

mod about;
mod adapter;
mod beside;
mod columns;
mod embedding;
mod hub;
mod names;
mod opening;
mod place;
mod sentence;
mod tokenizer;
mod training;

pub(crate) use beside::read_loaded;
pub use beside::{Beside, OF_WORDS, SideFile, goes_along};
pub use embedding::Modules;
pub use hub::{
    ADAPTER_FILES, Cached, HubName, INDEX, Sought, cache, gguf_files, hub_home, hub_name, in_snapshot, is_commit,
    weights_of,
};
pub(crate) use place::{parts_of, resolve};

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    dtype: Dtype,
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
    source: Source,
    adapter: Option<Adapter>,
    /// What was found otherwise than a path or config.json says it.
    remarks: Vec<String>,
    /// What was done to the names of the tensors.
    renamed: Option<String>,
}

#[derive(Debug)]
enum Source {
    Directory {
        tensors: SafetensorsSet,
        quantization: Option<QuantizationReader>,
        /// Tensors in layouts that are only read, by name.
        foreign: HashMap<String, Foreign>,
    },
    Gguf(GgufModel),
}

impl Checkpoint {
    fn new(path: &Path, config: Value, dtype: Dtype, entries: Vec<Entry>, source: Source) -> Checkpoint {
        let by_name = index(&entries);
        Checkpoint {
            path: path.to_path_buf(),
            config,
            dtype,
            entries,
            by_name,
            source,
            adapter: None,
            remarks: Vec::new(),
            renamed: None,
        }
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the model is called: by a GGUF's `general.name`, or by its configuration.
    pub fn name(&self) -> String {
        let said = self.gguf().and_then(|file| file.string("general.name").ok().flatten());
        let parameters = || self.entries.iter().map(|entry| entry.shape.iter().product::<usize>() as u64).sum();
        said.map_or_else(|| place::model_name(&self.config, parameters()), str::to_owned)
    }

    /// config.json, without `quantization_config`; rebuilt from the metadata of a GGUF.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The type of the float tensors: that of most bytes, or of config.json when the linears are quantized.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Every tensor, in the order of the files.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The tensor of this name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        Some(&self.entries[*self.by_name.get(name)?])
    }

    /// The shard that an index promises a tensor in that no file holds, and the index.
    pub fn promised(&self, name: &str) -> Option<(&str, &Path)> {
        match &self.source {
            Source::Directory { tensors, .. } => tensors.promised(name),
            Source::Gguf(_) => None,
        }
    }

    /// What to say of tensors that an index names and no shard holds.
    pub fn broken_promise(&self) -> Option<String> {
        let Source::Directory { tensors, .. } = &self.source else { return None };
        tensors.broken_promise()
    }

    /// Whether the configuration of a compressed-tensors checkpoint says that a module is packed, whatever there is of it.
    pub fn calls_packed(&self, module: &str) -> bool {
        let Source::Directory { quantization: Some(reader), .. } = &self.source else { return false };
        let by_class = reader.codec().is_some_and(|codec| codec.goes_by_class());
        by_class && reader.declared(module).is_ok_and(|declared| declared.is_some())
    }

    /// The adapter that tensors are merged with, if there is one.
    pub fn adapter(&self) -> Option<&AdapterReport> {
        self.adapter.as_ref().map(Adapter::report)
    }

    /// Fails when a file of weights was replaced or written to since the checkpoint was opened: what was read and what is hashed are
    /// not the same then.
    pub fn check_unchanged(&self) -> Result<()> {
        match &self.source {
            Source::Directory { tensors, .. } => tensors.check_unchanged()?,
            Source::Gguf(model) => model.file().check_unchanged()?,
        }
        self.adapter.as_ref().map_or(Ok(()), Adapter::check_unchanged)
    }

    /// How the configuration says that a weight with codes is represented, where it says all there is to know.
    pub fn declared(&self, weight: &str) -> Option<Encoding> {
        let Source::Directory { quantization: Some(reader), .. } = &self.source else { return None };
        let with_codes = matches!(self.entry(weight)?.dtype, StoredType::Quantized { .. } | StoredType::Foreign);
        let declared = with_codes.then(|| reader.declared(module_of(weight)).ok()?)?;
        declared.map(|declared| declared.encoding)
    }

    /// Whether runtimes round what linears read in a way that is known.
    pub fn rounds_inputs(&self) -> bool {
        let rounded = |entry: &Entry| {
            self.declared(&entry.name).is_some_and(|encoding| ActivationRounding::beside(&encoding).is_some())
        };
        // Else every module would be looked up for nothing.
        let said = matches!(&self.source, Source::Directory { quantization: Some(reader), .. } if reader.quantizes_activations());
        said && self.entries.iter().any(rounded)
    }

    /// What opening it found out: what is otherwise than a path, config.json or an index says it, how settings were read, and what an
    /// adapter does. Every command passes it on.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = self.remarks.clone();
        remarks.extend(self.renamed.as_ref().map(|how| format!("{}: {how}", self.path.display())));
        if let Source::Directory { tensors, .. } = &self.source {
            remarks.extend(tensors.notes().iter().cloned());
        }
        if let Source::Directory { quantization: Some(reader), .. } = &self.source
            && reader.quantizes_activations()
            && !self.rounds_inputs()
            && self.entries.iter().any(|e| matches!(e.dtype, StoredType::Quantized { .. } | StoredType::Foreign))
        {
            remarks.push(format!(
                "{} is made for runtimes that round activations too ({}); here they are left as they are",
                self.path.display(),
                reader.method()
            ));
        }
        // The settings of a GGUF file were put into words here.
        if self.gguf().is_none()
            && let Ok(settings) = families::settings(&self.config)
        {
            remarks.extend(settings.notes);
        }
        if self.adapter.as_ref().is_some_and(Adapter::unties) {
            remarks.push("the adapter makes the head differ from the embedding; it is now a tensor of its own".into());
        }
        remarks.extend(self.adapter.iter().flat_map(Adapter::notices).cloned());
        remarks
    }

    /// What a reader of a report should know of an original that is measured against: its [remarks](Checkpoint::remarks), and whether it
    /// is itself quantized.
    pub fn notices(&self) -> Vec<String> {
        let mut notices = self.remarks();
        if let Some(how) = self.quantized_as() {
            notices.push(format!(
                "{} is itself quantized ({how}): it is the reference that is measured against, with its weights dequantized",
                self.path.display()
            ));
        }
        notices
    }

    /// What it is to what was made of it: the original, or a mere reference where it is itself quantized.
    pub fn role(&self) -> &'static str {
        if self.quantized_as().is_some() { "the reference" } else { "the original" }
    }

    /// How its weights are quantized, as `Q4_K and others` with the way that holds most bytes first; `None` for plain numbers.
    pub fn quantized_as(&self) -> Option<String> {
        let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
        for entry in &self.entries {
            let plain = match entry.dtype {
                StoredType::Plain(_) => true,
                StoredType::Ggml(ty) => ty.block_len == 1,
                _ => false,
            };
            if !plain {
                *kinds.entry(self.kind(entry)).or_default() += entry.stored_bytes;
            }
        }
        let mut kinds: Vec<(String, u64)> = kinds.into_iter().collect();
        kinds.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let (first, _) = kinds.first()?;
        Some(format!("{first}{}", if kinds.len() > 1 { " and others" } else { "" }))
    }

    /// How a tensor is stored, as `BF16`, `Q4_K`, `gptq W4A16 group 128` or `fp8 in blocks of 128x128`.
    pub fn kind(&self, entry: &Entry) -> String {
        match (&self.source, entry.dtype) {
            (_, StoredType::Plain(dtype)) => dtype.to_string(),
            (_, StoredType::Ggml(ty)) => ty.name.to_owned(),
            (_, StoredType::Quantized { codec, encoding }) => {
                let scheme = formats::codec::scheme_of(&encoding).expect("packed codes are integers");
                let group = scheme.group.map_or("per row".to_owned(), |g| format!("group {g}"));
                format!("{codec} {} {group}", scheme.name())
            }
            (Source::Directory { foreign, .. }, StoredType::Foreign) => {
                foreign[self.stored_name(&entry.name)].kind.clone()
            }
            (Source::Gguf(_), StoredType::Foreign) => unreachable!("a GGUF has no other library's layout"),
        }
    }

    /// The values of a tensor, dequantized or widened to `f32`, and merged. Fails on NaN and infinity.
    pub fn load(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.expect(name)?;
        let values = match self.change(name) {
            None => self.stored(name)?,
            Some((adapter, change)) => {
                let mut values = match adapter.replacement(change) {
                    Some(view) => view.to_f32().map_err(|e| self.locate(e, name))?,
                    None => self.stored(self.stored_name(name))?,
                };
                let rows: Vec<u32> = (0..entry.shape.first().map_or(0, |n| *n as u32)).collect();
                self.merge(adapter, change, entry, &rows, &mut values, 0)?;
                return Ok(values);
            }
        };
        self.check_finite(name, &values, 0)?;
        Ok(values)
    }

    /// Rows `rows` of a matrix `[n, width]` into `out` (`[rows.len(), width]`), without loading the others.
    pub fn load_rows(&self, name: &str, rows: &[u32], out: &mut [f32]) -> Result<()> {
        let entry = self.expect(name)?;
        let &[count, width] = &entry.shape[..] else {
            return Err(Error::failed(format!("tensor `{name}`: rows of a tensor of shape {:?}", entry.shape)));
        };
        assert_eq!(out.len(), rows.len() * width, "the output holds the rows");
        if let Some(row) = rows.iter().find(|&&row| row as usize >= count) {
            return Err(Error::failed(format!("tensor `{name}`: row {row} is beyond its {count} rows")));
        }
        if width == 0 {
            return Ok(());
        }
        match self.change(name) {
            None => self.stored_rows(name, rows, out)?,
            Some((adapter, change)) => {
                self.unmerged_rows(adapter, change, name, rows, out)?;
                return self.merge(
                    adapter,
                    change,
                    entry,
                    rows,
                    out,
                    rows.first().map_or(0, |row| *row as usize * width),
                );
            }
        }
        for (&row, out) in rows.iter().zip(out.chunks_exact(width)) {
            self.check_finite(name, out, row as usize * width)?;
        }
        Ok(())
    }

    /// Slices `range` along the first extent, whatever the number of extents: the matrices of some experts, say.
    pub fn load_slices(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let entry = self.expect(name)?;
        let count = entry.shape.first().copied().unwrap_or(0);
        if range.start > range.end || range.end > count {
            return Err(Error::failed(format!("tensor `{name}`: slices {range:?} are beyond its {count}")));
        }
        let slice: usize = entry.shape[1..].iter().product();
        if let ([_, width], true) = (&entry.shape[..], range.len() < count) {
            let mut values = vec![0.0; range.len() * width];
            let rows: Vec<u32> = range.map(|row| row as u32).collect();
            self.load_rows(name, &rows, &mut values)?;
            return Ok(values);
        }
        let mut values = vec![0.0; range.len() * slice];
        match (&self.source, entry.dtype) {
            _ if range.len() == count || self.change(name).is_some() => {
                return Ok(self.load(name)?[range.start * slice..range.end * slice].to_vec());
            }
            (Source::Directory { tensors, .. }, StoredType::Plain(dtype)) => {
                let view = tensors.get(name).expect("an entry");
                let bytes = view.data.len() / count;
                let data = &view.data[range.start * bytes..range.end * bytes];
                formats::tensor::widen(dtype, data, &mut values).map_err(|e| self.locate(e, name))?;
            }
            (Source::Directory { tensors, foreign, .. }, StoredType::Foreign) => {
                let read = foreign[name].read(&|part| tensors.get(part), range.clone(), &mut values);
                read.map_err(|e| self.locate(e, name))?;
            }
            (Source::Gguf(model), _) => {
                for (index, out) in range.clone().zip(values.chunks_exact_mut(slice.max(1))) {
                    out.copy_from_slice(&model.read(name, Some(index)).map_err(|e| self.locate(e, name))?);
                }
            }
            (Source::Directory { .. }, _) => unreachable!("a matrix, or in a GGUF"),
        }
        self.check_finite(name, &values, range.start * slice)?;
        Ok(values)
    }

    /// One of the [`pieces`](Entry::pieces) of a tensor, whatever the number of its extents.
    pub fn load_piece(&self, entry: &Entry, piece: Range<usize>) -> Result<Vec<f32>> {
        match entry.shape.len() {
            0 | 1 => self.load(&entry.name),
            _ => self.load_slices(&entry.name, piece),
        }
    }

    fn change(&self, name: &str) -> Option<(&Adapter, &Change)> {
        let adapter = self.adapter.as_ref()?;
        Some((adapter, adapter.change(name)?))
    }

    /// The tensor in the files that `name` is made of, which is another one for a head that an adapter untied.
    fn stored_name<'n>(&'n self, name: &'n str) -> &'n str {
        self.change(name).and_then(|(_, change)| change.base.as_deref()).unwrap_or(name)
    }

    /// Merges values of a tensor, of which the first stands at `first`. Fails where one is no finite number, before or by that.
    fn merge(
        &self,
        adapter: &Adapter,
        change: &Change,
        entry: &Entry,
        rows: &[u32],
        values: &mut [f32],
        first: usize,
    ) -> Result<()> {
        self.check_finite(&entry.name, values, first)?;
        adapter.merge(change, &entry.shape, rows, values, &|rows, out| {
            self.unmerged_rows(adapter, change, &entry.name, rows, out)
        })?;
        match values.iter().find(|value| !value.is_finite()) {
            None => Ok(()),
            Some(value) => {
                Err(adapter.overflow(&entry.name, &format!("a value becomes {value}, which is not a finite number")))
            }
        }
    }

    /// What to say of a tensor with a value that its type cannot hold: of an adapter's where it was merged.
    pub fn beyond(&self, error: formats::Error, name: &str, dtype: Dtype) -> Error {
        match self.change(name) {
            None => {
                let error = self.locate(error, name);
                let wider = if dtype == Dtype::F16 { "bf16 or f32" } else { "f32" };
                Error::failed(format!("{error}; a type with a wider range holds it: quantc convert --dtype {wider}"))
            }
            Some((adapter, _)) => adapter.overflow(name, &error.to_string()),
        }
    }

    /// Rows of a matrix that an adapter changes, before its product is added.
    fn unmerged_rows(
        &self,
        adapter: &Adapter,
        change: &Change,
        name: &str,
        rows: &[u32],
        out: &mut [f32],
    ) -> Result<()> {
        match adapter.replacement(change) {
            Some(view) => widen_rows(&view, rows, out).map_err(|e| self.locate(e, name)),
            None => self.stored_rows(self.stored_name(name), rows, out),
        }
    }

    /// The values of a tensor as the files hold it.
    fn stored(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.expect(name)?;
        Ok(match (&self.source, entry.dtype) {
            (Source::Directory { tensors, .. }, StoredType::Plain(_)) => {
                let view = tensors.get(name).expect("an entry");
                view.to_f32().map_err(|e| self.locate(e, name))?
            }
            (Source::Directory { .. }, StoredType::Quantized { .. }) => {
                self.codes(name)?.expect("a quantized entry").dequantize()
            }
            (Source::Directory { tensors, foreign, .. }, StoredType::Foreign) => {
                let mut values = vec![0.0; entry.shape.iter().product()];
                let read = foreign[name].read(&|part| tensors.get(part), 0..entry.shape[0], &mut values);
                read.map_err(|e| self.locate(e, name))?;
                values
            }
            (Source::Gguf(model), _) => model.read(name, None).map_err(|e| self.locate(e, name))?,
            (Source::Directory { .. }, StoredType::Ggml(_)) => unreachable!("only a GGUF has ggml blocks"),
        })
    }

    /// Rows of a matrix as the files hold it; they are known to exist.
    fn stored_rows(&self, name: &str, rows: &[u32], out: &mut [f32]) -> Result<()> {
        let entry = self.expect(name)?;
        let width = entry.shape[1];
        match (&self.source, entry.dtype) {
            (Source::Directory { tensors, .. }, StoredType::Plain(_)) => {
                let view = tensors.get(name).expect("an entry");
                widen_rows(&view, rows, out).map_err(|e| self.locate(e, name))?;
            }
            (Source::Directory { tensors, quantization, .. }, StoredType::Quantized { .. }) => {
                let reader = quantization.as_ref().expect("of a quantized entry");
                let module = module_of(name);
                let read = reader.read_rows(module, &|part| tensors.get(&format!("{module}.{part}")), rows, out);
                read.map_err(|e| self.locate(e, name))?;
            }
            (Source::Directory { tensors, foreign, .. }, StoredType::Foreign) => {
                for (&row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
                    let row = row as usize;
                    let read = foreign[name].read(&|part| tensors.get(part), row..row + 1, out);
                    read.map_err(|e| self.locate(e, name))?;
                }
            }
            (Source::Gguf(model), _) => {
                let targets = rows.iter().map(|&row| row as usize).zip(out.chunks_exact_mut(width));
                model.read_rows(name, targets).map_err(|e| self.locate(e, name))?;
            }
            (Source::Directory { .. }, StoredType::Ggml(_)) => unreachable!("only a GGUF has ggml blocks"),
        }
        Ok(())
    }

    /// The bytes of a tensor that is stored plainly and in Hugging Face order, for copying as it is; `None` for one that an
    /// adapter changes.
    pub fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        let entry = self.entry(name).filter(|_| self.change(name).is_none())?;
        match (&self.source, entry.dtype) {
            (Source::Directory { tensors, .. }, StoredType::Plain(_)) => tensors.get(name),
            (Source::Gguf(model), StoredType::Plain(_)) => model.raw(name),
            _ => None,
        }
    }

    /// The codes, scales and zeros of a quantized linear as stored; `None` for every other tensor.
    pub fn quantized(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        if self.change(name).is_some() { Ok(None) } else { self.codes(name) }
    }

    /// The same with the codes in words as they lie in the file.
    pub fn packed(&self, name: &str) -> Result<Option<(PackedWeight, WordLayout)>> {
        if self.change(name).is_some() { Ok(None) } else { self.words(name) }
    }

    fn codes(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        let unpacked = |(weight, layout): (PackedWeight, _)| weight.unpacked(layout).map_err(|e| self.locate(e, name));
        self.words(name)?.map(unpacked).transpose()
    }

    fn words(&self, name: &str) -> Result<Option<(PackedWeight, WordLayout)>> {
        let entry = self.expect(name)?;
        match (&self.source, entry.dtype) {
            (Source::Directory { tensors, quantization: Some(reader), .. }, StoredType::Quantized { .. }) => {
                let module = module_of(name);
                let read = reader.read(module, &|part| tensors.get(&format!("{module}.{part}")));
                read.map_err(|e| self.locate(e, name))
            }
            _ => Ok(None),
        }
    }

    /// Tells the system that a tensor will be read soon, if it lies in its file under its own name.
    pub fn announce(&self, name: &str) {
        match &self.source {
            Source::Directory { tensors, .. } => tensors.announce(self.stored_name(name)),
            Source::Gguf(model) => model.announce(self.stored_name(name)),
        }
    }

    /// Gives the memory behind a tensor back to the system; it can be loaded again.
    pub fn release(&self, name: &str) {
        let Some(entry) = self.entry(name) else { return };
        if let Some((adapter, change)) = self.change(name) {
            adapter.release(change);
        }
        let name = self.stored_name(name);
        match (&self.source, entry.dtype) {
            (Source::Directory { tensors, quantization: Some(reader), .. }, StoredType::Quantized { .. }) => {
                for part in reader.codec().into_iter().flat_map(|codec| codec.part_names()) {
                    tensors.release(&format!("{}.{part}", module_of(name)));
                }
            }
            (Source::Directory { tensors, foreign, .. }, StoredType::Foreign) => {
                foreign[name].parts.iter().for_each(|part| tensors.release(part));
            }
            (Source::Directory { tensors, .. }, _) => tensors.release(name),
            (Source::Gguf(model), _) => model.release(name),
        }
    }

    /// The file itself where the checkpoint is a GGUF file, for what has no Hugging Face form.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.source {
            Source::Directory { .. } => None,
            Source::Gguf(model) => Some(model.file()),
        }
    }

    /// How hidden states become an embedding, as llama.cpp numbers it, where the model says so.
    pub fn pooling(&self) -> Option<u32> {
        match &self.source {
            Source::Directory { .. } => sentence::pooling(&self.path),
            Source::Gguf(model) => model.pooling(),
        }
    }

    /// What to say of modules beside a directory's weights that a GGUF file cannot hold.
    pub fn lost_in_gguf(&self) -> Vec<String> {
        match &self.source {
            Source::Directory { .. } => sentence::lost_in_gguf(&self.path),
            Source::Gguf(_) => Vec::new(),
        }
    }

    /// The weight files.
    pub fn files(&self) -> Vec<PathBuf> {
        match &self.source {
            Source::Directory { tensors, .. } => tensors.files().iter().map(|file| file.path().to_path_buf()).collect(),
            Source::Gguf(model) => model.file().paths().to_vec(),
        }
    }

    /// Bytes of the weight files, headers included.
    ///
    /// Fails where one is gone.
    pub fn file_bytes(&self) -> Result<u64> {
        let bytes = |file: PathBuf| Ok(std::fs::metadata(&file).map_err(Error::io(&file, "look at"))?.len());
        self.files().into_iter().map(bytes).sum()
    }

    fn expect(&self, name: &str) -> Result<&Entry> {
        self.entry(name).ok_or_else(|| formats::Error::missing("the tensor").in_tensor(name).in_file(&self.path).into())
    }

    fn check_finite(&self, name: &str, values: &[f32], first_index: usize) -> Result<()> {
        // Infinities and NaNs are the largest bit patterns; an integer maximum is quick.
        let largest = values.iter().fold(0, |largest: u32, v| largest.max(v.to_bits() & 0x7fff_ffff));
        if largest < f32::INFINITY.to_bits() {
            return Ok(());
        }
        // What values are cut at may be infinite.
        let bound = BOUNDS.iter().any(|end| name.ends_with(end));
        match values.iter().position(|v| if bound { v.is_nan() } else { !v.is_finite() }) {
            None => Ok(()),
            Some(at) => Err(self.locate(not_finite(values[at], first_index + at), name)),
        }
    }

    fn locate(&self, error: formats::Error, name: &str) -> Error {
        error.in_tensor(name).in_file(self.file_of(name)).into()
    }

    /// The file that holds a tensor, or the folder where none is known.
    pub(crate) fn file_of(&self, name: &str) -> &Path {
        match &self.source {
            Source::Directory { tensors, quantization, foreign } => {
                let main = quantization.as_ref().and_then(QuantizationReader::main_part);
                let part = match foreign.get(name) {
                    Some(foreign) => Some(foreign.parts[0].clone()),
                    None => main.map(|part| format!("{}.{part}", module_of(name))),
                };
                tensors.file_of(name).or_else(|| tensors.file_of(&part?)).unwrap_or(&self.path)
            }
            Source::Gguf(model) => model.file().path(),
        }
    }
}

impl Weights for Checkpoint {
    fn path(&self) -> &Path {
        self.path()
    }

    fn name(&self) -> String {
        self.name()
    }

    fn config(&self) -> &Value {
        self.config()
    }

    fn entries(&self) -> &[Entry] {
        self.entries()
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.entry(name)
    }

    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        self.raw(name)
    }

    fn release(&self, name: &str) {
        self.release(name);
    }

    fn gguf(&self) -> Option<&GgufFile> {
        self.gguf()
    }
}

/// The error of a value that stands in no weight.
fn not_finite(value: f32, index: usize) -> formats::Error {
    formats::Error::malformed(format!(
        "value {value} at index {index} is not a finite number: the weights are broken; fetch or save them again"
    ))
}

fn index(entries: &[Entry]) -> HashMap<String, usize> {
    entries.iter().enumerate().map(|(index, entry)| (entry.name.clone(), index)).collect()
}

/// Rows of a plain matrix that has them.
fn widen_rows(view: &TensorView<'_>, rows: &[u32], out: &mut [f32]) -> formats::Result<()> {
    let (count, width) = (view.shape[0], view.shape[1]);
    let row_bytes = view.data.len() / count.max(1);
    for (&row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
        formats::tensor::widen(view.dtype, &view.data[row as usize * row_bytes..][..row_bytes], out)?;
    }
    Ok(())
}

fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// What a directory's files hold.
struct Listed {
    entries: Vec<Entry>,
    /// Weights of layouts that are read and not written, by name.
    foreign: HashMap<String, Foreign>,
    /// What to say of tensors that are not listed.
    note: Option<String>,
}

fn directory_entries(tensors: &SafetensorsSet, quantization: Option<&QuantizationReader>) -> Result<Listed> {
    let located = |e: formats::Error, name: &str| e.in_tensor(name).in_file(tensors.file_of(name).expect("listed"));
    let lookup = |name: &str| tensors.get(name);
    let (mut foreign, mut by_values, mut others) = (HashMap::new(), HashMap::new(), HashSet::new());
    for spec in quantization.iter().flat_map(|_| tensors.tensors()) {
        let found = quantization.expect("iterated").foreign(&spec.name, &lookup);
        if let Some(found) = found.map_err(|e| located(e, &spec.name))? {
            others.extend(found.parts[1..].iter().cloned());
            by_values.insert(spec.name.as_str(), found.name.clone());
            foreign.insert(found.name.clone(), found);
        }
    }
    let mut entries: Vec<Entry> = Vec::new();
    let mut modules: HashMap<&str, usize> = HashMap::new();
    let mut beside_codes: Vec<&str> = Vec::new();
    let codes_of = |module: &str| {
        let part = quantization?.main_part().filter(|part| *part != "weight")?;
        tensors.get(&format!("{module}.{part}"))
    };
    for spec in tensors.tensors() {
        let bytes = spec.bytes().unwrap_or(0) as u64;
        if let Some(name) = by_values.get(spec.name.as_str()) {
            let Foreign { shape, parts, .. } = &foreign[name];
            let stored_bytes = parts.iter().filter_map(|part| tensors.get(part)).map(|t| t.data.len() as u64).sum();
            let (name, shape) = (name.clone(), shape.clone());
            entries.push(Entry { name, shape, dtype: StoredType::Foreign, stored_bytes });
            continue;
        }
        if others.contains(&spec.name) || quantization.is_some_and(|reader| reader.is_for_runtimes(&spec.name)) {
            continue;
        }
        let part = quantization.and_then(|reader| {
            let (module, _) = reader.split_part(&spec.name)?;
            let main = format!("{module}.{}", reader.main_part()?);
            Some((reader, module, main)).filter(|(_, _, main)| tensors.get(main).is_some())
        });
        let Some((reader, module, main)) = part else {
            let codes = [".qweight", ".weight_packed"].into_iter().find_map(|end| spec.name.strip_suffix(end));
            if codes.is_some_and(|module| tensors.get(&format!("{module}.weight")).is_none()) {
                let why = formats::Error::missing("the quantization_config that says how these codes are meant");
                return Err(located(why, &spec.name).into());
            }
            if spec.name.strip_suffix(".weight").and_then(codes_of).is_some() {
                beside_codes.push(&spec.name);
                continue;
            }
            let (name, shape) = (spec.name.clone(), spec.shape.clone());
            entries.push(Entry { name, shape, dtype: StoredType::Plain(spec.dtype), stored_bytes: bytes });
            continue;
        };
        if let Some(&index) = modules.get(module) {
            entries[index].stored_bytes += bytes;
            continue;
        }
        let at = |e: formats::Error| e.in_tensor(module).in_file(tensors.file_of(&main).expect("has its main part"));
        let (declared, shape) =
            reader.describe(module, &|part| tensors.get(&format!("{module}.{part}"))).map_err(at)?;
        modules.insert(module, entries.len());
        let codec = reader.codec().expect("has parts").id();
        entries.push(Entry {
            name: format!("{module}.weight"),
            shape: shape.to_vec(),
            dtype: StoredType::Quantized { codec, encoding: declared.encoding },
            stored_bytes: bytes,
        });
    }
    let note = beside_codes.first().map(|first| {
        format!(
            "{} plain weights beside the codes of the same linears (`{first}`) were left out: config.json says that the codes count, and runtimes \
             read these",
            beside_codes.len()
        )
    });
    Ok(Listed { entries, foreign, note })
}

fn dtype_named(name: &str) -> Option<Dtype> {
    match name.strip_prefix("torch.").unwrap_or(name) {
        // What has doubles is read as singles.
        "float32" | "float" | "float64" | "double" => Some(Dtype::F32),
        "float16" | "half" => Some(Dtype::F16),
        "bfloat16" => Some(Dtype::BF16),
        _ => None,
    }
}

/// The float type that holds the most bytes, or `None` when no tensor is a float.
fn dominant_dtype(entries: &[Entry]) -> Option<Dtype> {
    let bytes = |dtype: Dtype| -> u64 {
        let read_as = |stored| if stored == Dtype::F64 { Dtype::F32 } else { stored };
        let of = |e: &&Entry| matches!(e.dtype, StoredType::Plain(stored) if read_as(stored) == dtype);
        entries.iter().filter(of).map(|e| e.stored_bytes).sum()
    };
    [Dtype::BF16, Dtype::F16, Dtype::F32]
        .into_iter()
        .max_by_key(|dtype| bytes(*dtype))
        .filter(|dtype| bytes(*dtype) > 0)
}

#[cfg(test)]
mod tests;
