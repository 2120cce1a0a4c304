//! One view over every checkpoint that can be read: a Hugging Face directory, quantized or not, and a GGUF file.
//!
//! Whatever the source, tensors have their Hugging Face names and orientation. A quantized linear appears as the one
//! entry `<module>.weight`. Nothing is loaded on opening; the files stay mapped and their headers are checked wholly.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use formats::codec::{QuantizationReader, read_quantization};
use formats::{Dtype, GgmlType, GgufFile, QuantizedWeight, SafetensorsSet, Scheme, TensorView};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::import::gguf::GgufModel;

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    dtype: Dtype,
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Directory { tensors: SafetensorsSet, quantization: Option<QuantizationReader> },
    Gguf(GgufModel),
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The Hugging Face name; `<module>.weight` for a quantized module.
    pub name: String,
    /// Extents in Hugging Face order, `[out, in]` for a linear.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub dtype: StoredType,
    /// Bytes in the file, all parts together.
    pub stored_bytes: u64,
}

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// As numbers of this type.
    Plain(Dtype),
    /// As codes and scales.
    Quantized {
        /// The codec's id: `compressed-tensors`, `gptq` or `awq`.
        codec: &'static str,
        /// Width and grouping.
        scheme: Scheme,
    },
    /// As blocks of a ggml type.
    Ggml(GgmlType),
}

/// A tensor stored plainly, as it lies in the file.
pub type RawTensor<'a> = TensorView<'a>;

/// A file that accompanies the weights.
#[derive(Clone, Debug, PartialEq)]
pub enum SideFile {
    /// To be copied from here.
    Copy(PathBuf),
    /// Rebuilt from other information.
    Bytes(Vec<u8>),
}

impl Checkpoint {
    /// Opens a Hugging Face directory or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path, "open"))?;
        if metadata.is_dir() {
            Self::open_directory(path)
        } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            let model = GgufModel::open(path)?;
            Ok(Self::new(path, model.config().clone(), model.dtype(), model.entries(), Source::Gguf(model)))
        } else {
            Err(Error::failed(format!(
                "{}: not a checkpoint: expected a directory with config.json and model.safetensors, or a .gguf file",
                path.display()
            )))
        }
    }

    fn open_directory(path: &Path) -> Result<Checkpoint> {
        let config_path = path.join("config.json");
        let mut config = read_json(&config_path)?
            .ok_or_else(|| Error::failed(format!("{}: config.json is missing", path.display())))?;
        if !config.is_object() {
            return Err(Error::failed(format!("{}: not a JSON object", config_path.display())));
        }
        refuse_pickles(path)?;
        let tensors = SafetensorsSet::open(path)?;

        let mut quantization = read_quantization(&config).map_err(|e| e.in_file(&config_path))?;
        let separate = path.join("quantize_config.json");
        let has_codes = |name: &str| name.ends_with(".qweight") || name.ends_with(".weight_packed");
        if quantization.is_none()
            && tensors.tensors().any(|spec| has_codes(&spec.name))
            && let Some(separate_config) = read_json(&separate)?
        {
            quantization = read_quantization(&separate_config).map_err(|e| e.in_file(&separate))?;
        }
        for key in ["quantization_config", "compression_config"] {
            config.as_object_mut().expect("checked above").shift_remove(key);
        }

        let entries = directory_entries(&tensors, quantization.as_ref())?;
        let declared_dtype = ["dtype", "torch_dtype"].iter().find_map(|key| dtype_named(config.get(key)?.as_str()?));
        let quantized = entries.iter().any(|entry| matches!(entry.dtype, StoredType::Quantized { .. }));
        let dominant = dominant_dtype(&entries);
        let dtype = if quantized { declared_dtype.or(dominant) } else { dominant.or(declared_dtype) };
        let source = Source::Directory { tensors, quantization };
        Ok(Self::new(path, config, dtype.unwrap_or(Dtype::F16), entries, source))
    }

    fn new(path: &Path, config: Value, dtype: Dtype, entries: Vec<Entry>, source: Source) -> Checkpoint {
        let by_name = entries.iter().enumerate().map(|(index, entry)| (entry.name.clone(), index)).collect();
        Checkpoint { path: path.to_path_buf(), config, dtype, entries, by_name, source }
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
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

    /// The values of a tensor, dequantized or widened to `f32`. Fails on NaN and infinity.
    pub fn load(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.expect(name)?;
        let values = match (&self.source, entry.dtype) {
            (Source::Directory { tensors, .. }, StoredType::Plain(_)) => {
                let view = tensors.get(name).expect("an entry");
                view.to_f32().map_err(|e| self.locate(e, name))?
            }
            (Source::Directory { .. }, StoredType::Quantized { .. }) => {
                self.quantized(name)?.expect("a quantized entry").dequantize()
            }
            (Source::Gguf(model), _) => {
                let mut values = vec![0.0; entry.shape.iter().product()];
                let width = entry.shape.last().copied().unwrap_or(1).max(1);
                model.read_rows(name, values.chunks_exact_mut(width).enumerate()).map_err(|e| self.locate(e, name))?;
                values
            }
            (Source::Directory { .. }, StoredType::Ggml(_)) => unreachable!("only a GGUF has ggml blocks"),
        };
        self.check_finite(name, &values, 0)?;
        Ok(values)
    }

    /// The values of `tensor[index]`, dequantized or widened to `f32`. Fails on NaN and infinity.
    pub fn load_slice(&self, name: &str, index: usize) -> Result<Vec<f32>> {
        let entry = self.expect(name)?;
        let (Some(count), length) = (entry.shape.first(), entry.shape.iter().skip(1).product::<usize>()) else {
            return Err(Error::failed(format!("tensor `{name}`: a slice of a single number")));
        };
        if index >= *count {
            return Err(Error::failed(format!("tensor `{name}`: slice {index} is beyond its {count}")));
        }
        let (Source::Directory { tensors, .. }, StoredType::Plain(dtype)) = (&self.source, entry.dtype) else {
            let values = self.load(name)?;
            return Ok(values[index * length..][..length].to_vec());
        };
        let view = tensors.get(name).expect("an entry");
        let bytes = view.data.len() / count;
        let mut values = vec![0.0; length];
        formats::tensor::widen(dtype, &view.data[index * bytes..][..bytes], &mut values)
            .map_err(|e| self.locate(e, name))?;
        self.check_finite(name, &values, index * length)?;
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
        let targets = rows.iter().map(|&row| row as usize).zip(out.chunks_exact_mut(width));
        match (&self.source, entry.dtype) {
            (Source::Directory { tensors, .. }, StoredType::Plain(dtype)) => {
                let view = tensors.get(name).expect("an entry");
                let row_bytes = view.data.len() / count;
                for (row, out) in targets {
                    let bytes = &view.data[row * row_bytes..][..row_bytes];
                    formats::tensor::widen(dtype, bytes, out).map_err(|e| self.locate(e, name))?;
                }
            }
            (Source::Directory { .. }, StoredType::Quantized { .. }) => {
                let weight = self.quantized(name)?.expect("a quantized entry");
                targets.for_each(|(row, out)| weight.dequantize_row(row, out));
            }
            (Source::Gguf(model), _) => model.read_rows(name, targets).map_err(|e| self.locate(e, name))?,
            (Source::Directory { .. }, StoredType::Ggml(_)) => unreachable!("only a GGUF has ggml blocks"),
        }
        for (&row, out) in rows.iter().zip(out.chunks_exact(width)) {
            self.check_finite(name, out, row as usize * width)?;
        }
        Ok(())
    }

    /// The bytes of a tensor that is stored plainly and in Hugging Face order, for copying as it is.
    pub fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        let entry = self.entry(name)?;
        match (&self.source, entry.dtype) {
            (Source::Directory { tensors, .. }, StoredType::Plain(_)) => tensors.get(name),
            (Source::Gguf(model), StoredType::Plain(_)) => model.raw(name),
            _ => None,
        }
    }

    /// The codes, scales and zeros of a quantized linear as stored; `None` for every other tensor.
    pub fn quantized(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        let entry = self.expect(name)?;
        match (&self.source, entry.dtype) {
            (Source::Directory { tensors, quantization: Some(reader) }, StoredType::Quantized { .. }) => {
                let module = module_of(name);
                let read = reader.read(module, &|part| tensors.get(&format!("{module}.{part}")));
                read.map_err(|e| self.locate(e, name))
            }
            _ => Ok(None),
        }
    }

    /// Gives the memory behind a tensor back to the system; it can be loaded again.
    pub fn release(&self, name: &str) {
        let Some(entry) = self.entry(name) else { return };
        match (&self.source, entry.dtype) {
            (Source::Directory { tensors, quantization: Some(reader) }, StoredType::Quantized { .. }) => {
                for part in reader.codec().part_names() {
                    tensors.release(&format!("{}.{part}", module_of(name)));
                }
            }
            (Source::Directory { tensors, .. }, _) => tensors.release(name),
            (Source::Gguf(model), _) => model.release(name),
        }
    }

    /// The tokenizer in the form of tokenizer.json.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>> {
        match &self.source {
            Source::Directory { .. } => {
                let path = self.path.join("tokenizer.json");
                std::fs::read(&path).map_err(Error::io(path, "read"))
            }
            Source::Gguf(model) => Ok(to_json_bytes(&model.tokenizer_json()?)),
        }
    }

    /// tokenizer_config.json, when there is a valid one.
    pub fn tokenizer_config(&self) -> Option<Value> {
        match &self.source {
            Source::Directory { .. } => read_json(&self.path.join("tokenizer_config.json")).ok()?,
            Source::Gguf(model) => model.tokenizer_config().ok(),
        }
    }

    /// The chat template: chat_template.jinja, or the one (`default`, if several) of tokenizer_config.json.
    pub fn chat_template(&self) -> Option<String> {
        if let Source::Directory { .. } = self.source
            && let Ok(template) = std::fs::read_to_string(self.path.join("chat_template.jinja"))
        {
            return Some(template);
        }
        let config = self.tokenizer_config()?;
        match config.get("chat_template")? {
            Value::String(template) => Some(template.clone()),
            Value::Array(list) => {
                let named = |name: &str| list.iter().find(|item| item["name"] == name);
                let item = named("default").or(list.first())?;
                item["template"].as_str().map(str::to_string)
            }
            _ => None,
        }
    }

    /// The files to carry over beside converted weights: tokenizer, templates, generation settings, code, licences.
    pub fn side_files(&self) -> Result<Vec<(String, SideFile)>> {
        match &self.source {
            Source::Directory { .. } => {
                let mut files = Vec::new();
                for entry in std::fs::read_dir(&self.path).map_err(Error::io(&self.path, "list"))? {
                    let entry = entry.map_err(Error::io(&self.path, "list"))?;
                    let Ok(name) = entry.file_name().into_string() else { continue };
                    // Through links, as hub caches hold links to their blobs.
                    if is_side_file(&name) && entry.path().is_file() {
                        files.push((name, SideFile::Copy(entry.path())));
                    }
                }
                files.sort_by(|a, b| a.0.cmp(&b.0));
                Ok(files)
            }
            Source::Gguf(model) => Ok([
                ("generation_config.json", model.generation_config()),
                ("tokenizer.json", model.tokenizer_json()?),
                ("tokenizer_config.json", model.tokenizer_config()?),
            ]
            .into_iter()
            .map(|(name, value)| (name.to_string(), SideFile::Bytes(to_json_bytes(&value))))
            .collect()),
        }
    }

    /// The file itself where the checkpoint is a GGUF file, for what has no Hugging Face form.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.source {
            Source::Directory { .. } => None,
            Source::Gguf(model) => Some(model.file()),
        }
    }

    /// The weight files.
    pub fn files(&self) -> Vec<PathBuf> {
        match &self.source {
            Source::Directory { tensors, .. } => tensors.files().iter().map(|file| file.path().to_path_buf()).collect(),
            Source::Gguf(model) => vec![model.file().path().to_path_buf()],
        }
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
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(at) => {
                let error = formats::Error::malformed(format!(
                    "value {} at index {} is not a finite number",
                    values[at],
                    first_index + at
                ));
                Err(self.locate(error, name))
            }
        }
    }

    fn locate(&self, error: formats::Error, name: &str) -> Error {
        let file = match &self.source {
            Source::Directory { tensors, quantization } => {
                let part = quantization.as_ref().map(|q| format!("{}.{}", module_of(name), q.main_part()));
                tensors.file_of(name).or_else(|| tensors.file_of(&part?)).unwrap_or(&self.path)
            }
            Source::Gguf(model) => model.file().path(),
        };
        error.in_tensor(name).in_file(file).into()
    }
}

fn to_json_bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("a JSON value")
}

fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// A JSON file, or `None` when there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::failed(format!("{}: not valid JSON: {e}", path.display()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, "read")(e)),
    }
}

/// A directory that has PyTorch pickles and nothing else.
fn refuse_pickles(dir: &Path) -> Result<()> {
    let mut pickle = None;
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir, "list"))? {
        let name = entry.map_err(Error::io(dir, "list"))?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
            return Ok(());
        }
        if name.starts_with("pytorch_model") || name.ends_with(".pth") || name.ends_with(".pt") {
            pickle = Some(name);
        }
    }
    match pickle {
        None => Ok(()),
        Some(name) => Err(Error::failed(format!(
            "{}: PyTorch pickles such as {name} are not read; convert them once with transformers: \
             AutoModelForCausalLM.from_pretrained(\"{}\", dtype=\"auto\").save_pretrained(OUT)",
            dir.display(),
            dir.display()
        ))),
    }
}

fn directory_entries(tensors: &SafetensorsSet, quantization: Option<&QuantizationReader>) -> Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut modules: HashMap<&str, usize> = HashMap::new();
    for spec in tensors.tensors() {
        let bytes = spec.bytes().unwrap_or(0) as u64;
        let part = quantization
            .and_then(|reader| Some((reader, reader.split_part(&spec.name)?)))
            .filter(|(reader, (module, _))| tensors.get(&format!("{module}.{}", reader.main_part())).is_some());
        let Some((reader, (module, _))) = part else {
            if spec.name.ends_with(".qweight") || spec.name.ends_with(".weight_packed") {
                return Err(formats::Error::missing("the quantization_config that says how these codes are meant")
                    .in_tensor(&spec.name)
                    .in_file(tensors.file_of(&spec.name).expect("listed"))
                    .into());
            }
            let (name, shape) = (spec.name.clone(), spec.shape.clone());
            entries.push(Entry { name, shape, dtype: StoredType::Plain(spec.dtype), stored_bytes: bytes });
            continue;
        };
        if let Some(&index) = modules.get(module) {
            entries[index].stored_bytes += bytes;
            continue;
        }
        let main = format!("{module}.{}", reader.main_part());
        let located =
            |e: formats::Error| e.in_tensor(module).in_file(tensors.file_of(&main).expect("has its main part"));
        let (declared, shape) =
            reader.describe(module, &|part| tensors.get(&format!("{module}.{part}"))).map_err(located)?;
        modules.insert(module, entries.len());
        entries.push(Entry {
            name: format!("{module}.weight"),
            shape: shape.to_vec(),
            dtype: StoredType::Quantized { codec: reader.codec().id(), scheme: declared.scheme },
            stored_bytes: bytes,
        });
    }
    Ok(entries)
}

fn dtype_named(name: &str) -> Option<Dtype> {
    match name.strip_prefix("torch.").unwrap_or(name) {
        "float32" => Some(Dtype::F32),
        "float16" => Some(Dtype::F16),
        "bfloat16" => Some(Dtype::BF16),
        _ => None,
    }
}

/// The float type that holds the most bytes, or `None` when no tensor is a float.
fn dominant_dtype(entries: &[Entry]) -> Option<Dtype> {
    let bytes = |dtype: Dtype| -> u64 {
        entries.iter().filter(|e| e.dtype == StoredType::Plain(dtype)).map(|e| e.stored_bytes).sum()
    };
    [Dtype::BF16, Dtype::F16, Dtype::F32]
        .into_iter()
        .max_by_key(|dtype| bytes(*dtype))
        .filter(|dtype| bytes(*dtype) > 0)
}

fn is_side_file(name: &str) -> bool {
    const NAMES: &[&str] = &[
        "special_tokens_map.json",
        "generation_config.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
        "spiece.model",
        "sentencepiece.bpe.model",
    ];
    const PREFIXES: &[&str] = &["tokenizer", "chat_template", "LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY"];
    NAMES.contains(&name) || name.ends_with(".py") || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use formats::codec::{Codec, QuantizedModule, codec};
    use formats::{ShardedWriter, TensorSpec};
    use serde_json::json;
    use std::collections::BTreeMap;

    /// A plain tensor, with its values.
    fn plain(name: &str, dtype: Dtype, shape: &[usize], values: &[f32]) -> (TensorSpec, Vec<u8>) {
        let mut bytes = Vec::new();
        formats::tensor::narrow(dtype, values, &mut bytes).unwrap();
        (TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }, bytes)
    }

    fn write(dir: &Path, config: &Value, tensors: &[(TensorSpec, Vec<u8>)]) {
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let writer = ShardedWriter::create(dir, specs, 600, &BTreeMap::new()).unwrap();
        tensors.iter().for_each(|(spec, bytes)| writer.write(&spec.name, bytes).unwrap());
        writer.finish().unwrap();
    }

    fn weight(scheme: Scheme) -> QuantizedWeight {
        let (rows, cols) = (32, 64);
        let groups = scheme.groups(cols);
        let max = usize::from(scheme.max_code());
        QuantizedWeight {
            rows,
            cols,
            scheme,
            codes: (0..rows * cols).map(|i| (i * 7 % (max + 1)) as u8).collect(),
            scales: (0..rows * groups).map(|i| i as f32 / 64.0 - 0.25).collect(),
            zeros: (0..rows * groups)
                .map(|i| if scheme.symmetric { scheme.midpoint() } else { 1 + (i % max) as u8 })
                .collect(),
            group_of: None,
        }
    }

    /// A directory as each codec's runtime would load it, opened again.
    fn check_quantized(codec: &dyn Codec, scheme: Scheme) {
        let dir = tempfile::tempdir().unwrap();
        let weight = weight(scheme);
        let module = "model.layers.0.mlp.up_proj";
        let parts = codec.encode(&weight, Dtype::F16).unwrap();
        let mut tensors: Vec<_> = parts
            .0
            .into_iter()
            .map(|(part, t)| (TensorSpec { name: format!("{module}.{part}"), dtype: t.dtype, shape: t.shape }, t.data))
            .collect();
        tensors.push(plain("model.norm.weight", Dtype::F16, &[2], &[1.0, -2.0]));
        let files = codec.config(&[QuantizedModule { name: module, scheme, desc_act: false }], &[]).unwrap();
        let config =
            json!({"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": files.quantization_config});
        write(dir.path(), &config, &tensors);

        let name = format!("{module}.weight");
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.config(), &json!({"model_type": "llama", "torch_dtype": "bfloat16"}));
        assert_eq!(checkpoint.dtype(), Dtype::BF16, "of config.json, as the linears are quantized");
        assert_eq!(checkpoint.entries().len(), 2);
        let entry = checkpoint.entry(&name).unwrap();
        assert_eq!(entry.shape, [32, 64]);
        let stored: usize = tensors[..tensors.len() - 1].iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(entry.stored_bytes, stored as u64);
        assert!(matches!(entry.dtype, StoredType::Quantized { codec: id, .. } if id == codec.id()));
        assert!(checkpoint.raw(&name).is_none());
        assert!(checkpoint.load(&name).unwrap() == weight.dequantize());
        checkpoint.release(&name);
        let read = checkpoint.quantized(&name).unwrap().unwrap();
        assert!(read.codes == weight.codes && read.scales == weight.scales && read.zeros == weight.zeros);
        let mut rows = vec![0.0; 128];
        checkpoint.load_rows(&name, &[31, 0], &mut rows).unwrap();
        assert!(rows[..64] == weight.dequantize()[31 * 64..] && rows[64..] == weight.dequantize()[..64]);
        assert_eq!(checkpoint.quantized("model.norm.weight").unwrap(), None);
        assert_eq!(checkpoint.load("model.norm.weight").unwrap(), [1.0, -2.0]);
    }

    #[test]
    fn every_codec_is_read_back() {
        for (id, bits, symmetric, group) in [
            ("compressed-tensors", 4, true, Some(32)),
            ("compressed-tensors", 3, false, None),
            ("gptq", 4, true, Some(32)),
            ("gptq", 8, false, None),
            ("awq", 4, false, Some(32)),
        ] {
            check_quantized(codec(id).unwrap(), Scheme { bits, group, symmetric });
        }
    }

    #[test]
    fn plain_tensors_load_whole_by_rows_and_raw() {
        let dir = tempfile::tempdir().unwrap();
        let values: Vec<f32> = (0..300).map(|i| i as f32).collect();
        let tensors = [
            plain("model.embed_tokens.weight", Dtype::F16, &[100, 3], &values),
            plain("model.norm.weight", Dtype::F32, &[3], &[0.1, 0.2, 0.3]),
        ];
        write(dir.path(), &json!({"torch_dtype": "bfloat16"}), &tensors);
        std::fs::write(
            dir.path().join("tokenizer_config.json"),
            json!({"chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]})
                .to_string(),
        )
        .unwrap();
        for name in ["LICENSE.txt", "modeling_x.py", "README.md", "merges.txt", "optimizer.pt"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.dtype(), Dtype::F16, "of the tensors, whatever config.json says");
        assert_eq!(checkpoint.load("model.embed_tokens.weight").unwrap(), values);
        let mut rows = [0.0; 6];
        checkpoint.load_rows("model.embed_tokens.weight", &[99, 1], &mut rows).unwrap();
        assert_eq!(rows, [297.0, 298.0, 299.0, 3.0, 4.0, 5.0]);
        assert_eq!(checkpoint.raw("model.norm.weight").unwrap().data, &tensors[1].1[..]);
        assert_eq!(checkpoint.files().len(), 2);
        assert_eq!(checkpoint.chat_template().as_deref(), Some("D"));
        let side: Vec<String> = checkpoint.side_files().unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(side, ["LICENSE.txt", "merges.txt", "modeling_x.py", "tokenizer_config.json"]);
        let message = checkpoint.load_rows("model.embed_tokens.weight", &[100], &mut [0.0; 3]).unwrap_err().to_string();
        assert_eq!(message, "tensor `model.embed_tokens.weight`: row 100 is beyond its 100 rows");
        let message = checkpoint.load("model.nothing").unwrap_err().to_string();
        assert!(message.ends_with("tensor `model.nothing`: the tensor is missing"), "{message}");
        std::fs::write(dir.path().join("chat_template.jinja"), "J").unwrap();
        assert_eq!(checkpoint.chat_template().as_deref(), Some("J"));
    }

    fn refused(prepare: impl FnOnce(&Path)) -> String {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let error = match Checkpoint::open(dir.path()) {
            Ok(checkpoint) => checkpoint.load("w").unwrap_err(),
            Err(error) => error,
        };
        error.to_string().replace(&dir.path().display().to_string(), "DIR")
    }

    #[test]
    fn what_cannot_be_read_is_told_in_a_sentence() {
        assert_eq!(refused(|_| ()), "DIR: config.json is missing");
        let config = |dir: &Path| std::fs::write(dir.join("config.json"), "{}").unwrap();
        assert_eq!(refused(config), "DIR: model.safetensors or model.safetensors.index.json is missing");
        assert_eq!(
            refused(|dir| {
                config(dir);
                std::fs::write(dir.join("pytorch_model.bin"), "").unwrap();
            }),
            "DIR: PyTorch pickles such as pytorch_model.bin are not read; convert them once with transformers: \
             AutoModelForCausalLM.from_pretrained(\"DIR\", dtype=\"auto\").save_pretrained(OUT)"
        );
        let nan = plain("w", Dtype::BF16, &[3], &[0.0, 1.0, f32::NAN]);
        assert_eq!(
            refused(|dir| write(dir, &json!({}), &[nan])),
            "DIR/model.safetensors: tensor `w`: value NaN at index 2 is not a finite number"
        );
        let inf = plain("w", Dtype::F32, &[2], &[f32::NEG_INFINITY, 1.0]);
        assert_eq!(
            refused(|dir| write(dir, &json!({}), &[inf])),
            "DIR/model.safetensors: tensor `w`: value -inf at index 0 is not a finite number"
        );
        let codes = (TensorSpec { name: "w.qweight".into(), dtype: Dtype::I32, shape: vec![1, 1] }, vec![0; 4]);
        assert_eq!(
            refused(|dir| write(dir, &json!({}), &[codes])),
            "DIR/model.safetensors: tensor `w.qweight`: \
             the quantization_config that says how these codes are meant is missing"
        );
        let message = Checkpoint::open(Path::new("/nonexistent/model")).unwrap_err().to_string();
        assert!(message.starts_with("/nonexistent/model: cannot open: "), "{message}");
    }
}
