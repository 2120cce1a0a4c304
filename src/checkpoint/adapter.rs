//! LoRA adapters as PEFT writes them (`adapter_config.json`, `adapter_model.safetensors`), merged while tensors are read.
//!
//! ```text
//! M.lora_A.weight [r, in], M.lora_B.weight [out, r]            M.weight + s · B · A
//! M.lora_embedding_A [r, rows], M.lora_embedding_B [width, r]  M.weight + s · (B · A)ᵀ
//! M.lora_magnitude_vector [out]                                each output scaled to this length (DoRA)
//! M.lora_B.bias [out]                                          M.bias + s · bias
//! M.weight, M.bias                                             instead of the model's (modules_to_save)
//! ```
//!
//! `s` is `lora_alpha / r`, or `lora_alpha / √r` (rsLoRA), with the patterns' exceptions.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::OnceLock;

use formats::{SafetensorsFile, TensorView};
use kernels::ops::low_rank::{self, Strided};
use serde_json::Value;

use super::in_snapshot;
use super::training::{emptied, empty_weights};
use crate::error::{Error, Result};
use crate::families::{self, AdapterNames, tying};
use crate::json::read_json;
use crate::output::hashing::hash_file;
use crate::report::AdapterReport;
use crate::weights::Entry;

mod matching;
mod notices;
mod settings;

use matching::{Matching, Model};
use notices::Merged;
use settings::Settings;

/// The name of a head of its own, which a model with a tied one lacks.
const HEAD: &str = "lm_head.weight";

/// An opened adapter, matched to the tensors of a model.
#[derive(Debug)]
pub struct Adapter {
    file: SafetensorsFile,
    changes: HashMap<String, Change>,
    report: AdapterReport,
    untied: bool,
    notices: Vec<String>,
}

/// What happens to one tensor of the model.
#[derive(Debug, Default)]
pub struct Change {
    /// The tensor that a head which was tied is made of.
    pub base: Option<String>,
    /// The adapter's tensor that takes its place.
    replaced: Option<String>,
    product: Option<Product>,
    /// The adapter's tensor that is added to a bias, and its factor.
    added: Option<(String, f32)>,
}

#[derive(Debug)]
struct Product {
    a: String,
    b: String,
    rank: usize,
    scale: f32,
    /// The weight is stored as `[in, out]`: an embedding, or GPT-2's linears.
    transposed: bool,
    magnitude: Option<String>,
    /// The factor of each column, where DoRA's outputs are columns.
    factors: OnceLock<Vec<f32>>,
}

/// Tensors of one module of the adapter.
#[derive(Default)]
struct Parts {
    a: Option<String>,
    b: Option<String>,
    embedding: bool,
    magnitude: Option<String>,
    bias: Option<String>,
}

/// Reads the named rows of a tensor.
type Rows<'a> = dyn Fn(&[u32], &mut [f32]) -> Result<()> + 'a;

impl Adapter {
    /// Opens the adapter in `folder` for a model with these tensors. Adds the tensor of a head that it unties.
    ///
    /// Fails on kinds other than LoRA and on every tensor that finds no place in the model.
    pub fn open(folder: &Path, model: &Path, config: &mut Value, entries: &mut Vec<Entry>) -> Result<Adapter> {
        let settings = read_settings(folder)?;
        let file = open_weights(folder)?;
        let (modules, replacing) = sort_parts(&file)?;
        let original = config.get("_name_or_path").and_then(Value::as_str).map(str::to_owned);
        let stored_head = entries.iter().position(|e| is_head(&e.name));
        let tied = families::tied(config).unwrap_or(stored_head.is_none());
        let names = AdapterNames::of(config);
        let to = Model { path: model, entries, names: &names, tied };
        let Matching { mut changes, new_head, modules: count, replaced, .. } =
            Matching::of(&settings, &file, &modules, &replacing, to)?;

        let vocabulary = families::vocabulary(config)?;
        let untied = tied && untie(&file, &settings, entries, [stored_head, vocabulary], &mut changes, new_head);
        if untied {
            tying::set(config, false);
        }
        let merged = Merged {
            settings: &settings,
            file: &file,
            modules: &modules,
            replacing: &replacing,
            model,
            original: original.as_deref(),
            entries,
            names: &names,
        };
        let notices = merged.notices();
        let kind = match (settings.root, settings.dora) {
            (false, false) => "lora",
            (true, false) => "rslora",
            (false, true) => "dora",
            (true, true) => "rsdora",
        };
        let sha256 = hash_file(file.path())?.sha256;
        let hub = in_snapshot(folder).map(|(name, commit, _)| format!("{name}@{commit}"));
        let report = AdapterReport { path: folder.display().to_string(), hub, kind, sha256, modules: count, replaced };
        Ok(Adapter { file, changes, report, untied, notices })
    }

    /// What it is and what it changed.
    pub fn report(&self) -> &AdapterReport {
        &self.report
    }

    /// What the user should know of it.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Whether the model's head is no longer its embedding.
    pub fn unties(&self) -> bool {
        self.untied
    }

    /// What happens to the tensor of this name.
    pub fn change(&self, name: &str) -> Option<&Change> {
        self.changes.get(name)
    }

    /// The adapter's tensor in place of the model's.
    pub fn replacement(&self, change: &Change) -> Option<TensorView<'_>> {
        self.file.get(change.replaced.as_ref()?)
    }

    /// Fails when the adapter's file was replaced or written to since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        Ok(self.file.check_unchanged()?)
    }

    /// What to say of a tensor that merging gave a value that cannot be written.
    pub fn overflow(&self, name: &str, what: &str) -> Error {
        Error::failed(format!(
            "{}: merged with it, tensor `{name}` cannot be written: {what}; the adapter was trained in a type with a wider range: \
             convert the model first (quantc convert --dtype bf16, or f32), or the adapter is damaged",
            self.file.path().display()
        ))
    }

    /// Gives the memory behind the factors back to the system.
    pub fn release(&self, change: &Change) {
        let Change { replaced, product, added, .. } = change;
        let product = product.iter().flat_map(|p| [Some(&p.a), Some(&p.b), p.magnitude.as_ref()]).flatten();
        product.chain(replaced).chain(added.iter().map(|(name, _)| name)).for_each(|name| self.file.release(name));
    }

    /// Merges rows `rows` of a tensor `[n, width]`, or all of a vector, whose values before merging are `values`.
    ///
    /// `whole` gives rows of the tensor before merging, `[n, width]` in all, for DoRA on embeddings, whose lengths run
    /// through all rows.
    pub fn merge(
        &self,
        change: &Change,
        shape: &[usize],
        rows: &[u32],
        values: &mut [f32],
        whole: &Rows<'_>,
    ) -> Result<()> {
        if let Some((name, scale)) = &change.added {
            let bias = self.values(name)?;
            values.iter_mut().zip(bias).for_each(|(v, b)| *v += scale * b);
        }
        let Some(product) = &change.product else { return Ok(()) };
        let (n, width) = (shape[0], shape[1]);
        let [a, b] = [self.values(&product.a)?, self.values(&product.b)?];
        self.add(product, [n, width], [&a, &b], rows, values);
        let Some(name) = &product.magnitude else { return Ok(()) };
        let magnitude = self.values(name)?;
        if !product.transposed {
            let lengths = low_rank::row_lengths(values, width);
            for ((row, length), values) in rows.iter().zip(lengths).zip(values.chunks_exact_mut(width)) {
                let factor = magnitude[*row as usize] / length;
                values.iter_mut().for_each(|v| *v *= factor);
            }
            return Ok(());
        }
        let factors = match product.factors.get() {
            Some(factors) => factors,
            None => {
                let mut squares = vec![0.0f64; width];
                let piece = (1 << 20) / width + 1;
                for first in (0..n).step_by(piece) {
                    let rows: Vec<u32> = (first..n.min(first + piece)).map(|row| row as u32).collect();
                    let mut values = vec![0.0; rows.len() * width];
                    whole(&rows, &mut values)?;
                    self.add(product, [n, width], [&a, &b], &rows, &mut values);
                    low_rank::add_column_squares(&values, &mut squares);
                }
                let factors = magnitude.iter().zip(squares).map(|(m, s)| m / s.sqrt() as f32).collect();
                product.factors.get_or_init(|| factors)
            }
        };
        for row in values.chunks_exact_mut(width) {
            row.iter_mut().zip(factors).for_each(|(v, factor)| *v *= factor);
        }
        Ok(())
    }

    /// Adds the product to rows `rows` of a tensor `[n, width]`.
    fn add(&self, product: &Product, [n, width]: [usize; 2], [a, b]: [&[f32]; 2], rows: &[u32], values: &mut [f32]) {
        let rank = product.rank;
        let (left, right) = match product.transposed {
            false => (Strided { data: b, strides: [rank, 1] }, Strided { data: a, strides: [width, 1] }),
            true => (Strided { data: a, strides: [1, n] }, Strided { data: b, strides: [1, rank] }),
        };
        let in_order = rows.len() == n && rows.iter().enumerate().all(|(i, row)| *row as usize == i);
        if in_order {
            low_rank::run(values, [n, width, rank], left, right, product.scale);
            return;
        }
        let at = |row: u32, k: usize| left.data[row as usize * left.strides[0] + k * left.strides[1]];
        let gathered: Vec<f32> = rows.iter().flat_map(|row| (0..rank).map(move |k| at(*row, k))).collect();
        let left = Strided { data: &gathered, strides: [rank, 1] };
        low_rank::run(values, [rows.len(), width, rank], left, right, product.scale);
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let view = self.file.get(name).expect("matched on opening");
        let located = |e: formats::Error| Error::from(e.in_tensor(name).in_file(self.file.path()));
        let values = view.to_f32().map_err(located)?;
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(at) => Err(located(formats::Error::malformed(format!(
                "value {} at index {at} is not a finite number: the adapter is broken; fetch or save it again",
                values[at]
            )))),
        }
    }
}

/// Reads adapter_config.json. Fails for what is no adapter of PEFT's, and for one of a kind that is not merged here.
fn read_settings(folder: &Path) -> Result<Settings> {
    if folder.is_file() {
        return Err(Error::failed(format!(
            "{}: a file; --adapter takes the directory that PEFT's save_pretrained wrote",
            folder.display()
        )));
    }
    let path = folder.join("adapter_config.json");
    let Some(config) = read_json(&path)? else {
        return Err(Error::failed(format!(
            "{}: adapter_config.json is missing; --adapter takes a directory that PEFT's save_pretrained wrote",
            folder.display()
        )));
    };
    let Value::Object(settings) = &config else {
        return Err(Error::failed(format!("{}: not a JSON object", path.display())));
    };
    match mlx_adapter(folder, &config) {
        Some(error) => Err(error),
        None => Settings::read(settings).map_err(|why| Error::failed(format!("{}: {why}", path.display()))),
    }
}

/// Opens adapter_model.safetensors. Fails for an adapter that is saved otherwise, and for one without tensors.
fn open_weights(folder: &Path) -> Result<SafetensorsFile> {
    let path = folder.join("adapter_model.safetensors");
    if !path.exists() && folder.join("adapter_model.bin").exists() {
        return Err(Error::failed(format!(
            "{}: adapter_model.bin is a PyTorch pickle, which is not read; convert it once with PEFT: \
             PeftModel.from_pretrained(model, \"{}\").save_pretrained(OUT)",
            folder.display(),
            folder.display()
        )));
    }
    let file = SafetensorsFile::open(&path)?;
    if file.tensors().len() == 0 {
        return Err(Error::failed(format!(
            "{}: it holds no tensor, so there is nothing to merge; the adapter was saved by something that left its weights out",
            path.display()
        )));
    }
    if let Some((name, counts)) = empty_weights(file.tensors().map(|spec| (&spec.name[..], &spec.shape[..]))) {
        return Err(emptied(&path, name, counts, true));
    }
    Ok(file)
}

/// Says so when the folder is an adapter of MLX, whose configuration is `config`.
pub(crate) fn mlx_adapter(folder: &Path, config: &Value) -> Option<Error> {
    let own = config.get("peft_type").is_none()
        && (folder.join("adapters.safetensors").exists()
            || ["fine_tune_type", "lora_parameters", "lora_layers"].iter().any(|key| config.get(*key).is_some()));
    own.then(|| {
        Error::failed(format!(
            "{}: an adapter of MLX, which is not read; fuse it into its model first (mlx_lm.fuse --dequantize) and give \
             the model that comes out",
            folder.display()
        ))
    })
}

/// Gives a head that was tied a tensor of its own where embedding and head now differ; true if they do. The embedding is
/// the matrix with a row for each token, outside of the layers.
fn untie(
    file: &SafetensorsFile,
    settings: &Settings,
    entries: &mut Vec<Entry>,
    [stored_head, vocabulary]: [Option<usize>; 2],
    changes: &mut HashMap<String, Change>,
    new_head: Option<(String, Change)>,
) -> bool {
    let is_embedding = |name: &String| {
        let entry = entries.iter().find(|e| e.name == *name);
        entry.is_some_and(|e| {
            let rows = vocabulary.is_none_or(|n| e.shape.first() == Some(&n));
            e.shape.len() == 2 && rows && !is_head(name) && !name.split('.').any(is_number)
        })
    };
    let touched = changes.keys().filter(|name| is_embedding(name)).min().cloned();
    let bytes = |change: Option<&Change>| {
        let change = change.filter(|c| c.product.is_none())?;
        file.get(change.replaced.as_ref()?).map(|view| (view.dtype, view.data))
    };
    match (new_head, touched) {
        (None, None) => {
            let head = stored_head.map(|index| entries[index].name.clone());
            head.is_some_and(|name| changes.contains_key(&name))
        }
        (_, Some(_)) if settings.keep_tied => false,
        // Both brought whole, and equal: a vocabulary that was saved with the adapter.
        (Some((_, head)), Some(name)) if bytes(Some(&head)).is_some_and(|b| bytes(changes.get(&name)) == Some(b)) => {
            false
        }
        (new_head, touched) => {
            if stored_head.is_none() {
                let (name, change) = new_head.unwrap_or_else(|| {
                    let base = touched.expect("one of the two");
                    // A wrapper may keep the head beside the model it wraps.
                    let outer = base.strip_prefix("language_model.").map_or("", |_| "language_model.");
                    (format!("{outer}{HEAD}"), Change { base: Some(base), ..Change::default() })
                });
                let base = change.base.as_ref().and_then(|base| entries.iter().find(|e| e.name == *base));
                let entry = Entry { name: name.clone(), ..base.expect("found by shape").clone() };
                entries.push(entry);
                changes.insert(name, change);
            }
            true
        }
    }
}

fn is_head(name: &str) -> bool {
    name == HEAD || name.ends_with(".lm_head.weight")
}

fn is_number(segment: &str) -> bool {
    segment.bytes().all(|b| b.is_ascii_digit())
}

/// Divides the adapter's tensors into factors by module and tensors brought whole, by the name they have in the model.
fn sort_parts(file: &SafetensorsFile) -> Result<(BTreeMap<String, Parts>, BTreeMap<String, String>)> {
    let two = |first: &str, second: &str| {
        Error::failed(format!(
            "{}: `{first}` and `{second}` belong to two adapters in one file: save the one that is to be merged by itself, with \
             save_pretrained(DIR, selected_adapters=[NAME])",
            file.path().display()
        ))
    };
    let put = |place: &mut Option<String>, name: String| match place.replace(name.clone()) {
        Some(first) => Err(two(&first, &name)),
        None => Ok(()),
    };
    let mut modules: BTreeMap<String, Parts> = BTreeMap::new();
    let mut replacing = BTreeMap::new();
    for spec in file.tensors() {
        let name = spec.name.strip_prefix("base_model.model.").unwrap_or(&spec.name);
        let whole = spec.name.clone();
        let part = ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"]
            .into_iter()
            .find_map(|part| Some((part, name.split_once(&format!(".{part}"))?)))
            .filter(|(_, (_, rest))| rest.is_empty() || rest.starts_with('.'));
        let Some((part, (module, rest))) = part else {
            let name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".");
            let name = name.replace(".modules_to_save.", ".");
            if let Some(first) = replacing.insert(name, whole.clone()) {
                return Err(two(&first, &whole));
            }
            continue;
        };
        let parts = modules.entry(module.replace(".base_layer", "")).or_default();
        match part {
            "lora_B" if rest.ends_with(".bias") => put(&mut parts.bias, whole)?,
            "lora_A" => put(&mut parts.a, whole)?,
            "lora_B" => put(&mut parts.b, whole)?,
            "lora_magnitude_vector" => put(&mut parts.magnitude, whole)?,
            _ => {
                parts.embedding = true;
                put(if part == "lora_embedding_A" { &mut parts.a } else { &mut parts.b }, whole)?;
            }
        }
    }
    Ok((modules, replacing))
}
