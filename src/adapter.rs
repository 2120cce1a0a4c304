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

use fancy_regex::Regex;
use formats::{SafetensorsFile, TensorView};
use kernels::ops::low_rank::{self, Strided};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::checkpoint::place::mlx_adapter;
use crate::checkpoint::{Entry, read_json};
use crate::error::{Error, Result};
use crate::evidence::listed;
use crate::families::{self, tying};
use crate::report::hash_file;

/// The name of a head of its own, which a model with a tied one lacks.
const HEAD: &str = "lm_head.weight";

/// What was merged, for the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterReport {
    /// Its directory.
    pub path: String,
    /// `lora`, `rslora`, `dora` or `rsdora`.
    pub kind: &'static str,
    /// SHA-256 of adapter_model.safetensors, lower-case hex.
    pub sha256: String,
    /// Modules with a low-rank product.
    pub modules: usize,
    /// Tensors it brings whole.
    pub replaced: usize,
}

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

/// The settings that bear on merging.
struct Settings {
    rank: usize,
    alpha: f64,
    root: bool,
    /// The only layers that it is for, where it lists some.
    layers: Option<Vec<i64>>,
    keep_tied: bool,
    dora: bool,
    ranks: Vec<(Regex, f64)>,
    alphas: Vec<(Regex, f64)>,
    /// The model that it was trained on.
    base: Option<String>,
    /// Modules that it was to have factors for, and to bring whole; by their ends, or a pattern for all of the name.
    targets: Vec<(String, Regex)>,
    saved: Vec<(String, Regex)>,
}

/// Reads the named rows of a tensor.
type Rows<'a> = dyn Fn(&[u32], &mut [f32]) -> Result<()> + 'a;

impl Adapter {
    /// Opens the adapter in `folder` for a model with these tensors. Adds the tensor of a head that it unties.
    ///
    /// Fails on kinds other than LoRA and on every tensor that finds no place in the model.
    pub fn open(folder: &Path, model: &Path, config: &mut Value, entries: &mut Vec<Entry>) -> Result<Adapter> {
        if folder.is_file() {
            return Err(Error::failed(format!(
                "{}: a file; --adapter takes the directory that PEFT's save_pretrained wrote",
                folder.display()
            )));
        }
        let config_path = folder.join("adapter_config.json");
        let settings = match read_json(&config_path)? {
            Some(Value::Object(settings)) => settings,
            Some(_) => return Err(Error::failed(format!("{}: not a JSON object", config_path.display()))),
            None => {
                return Err(Error::failed(format!(
                    "{}: adapter_config.json is missing; --adapter takes a directory that PEFT's save_pretrained wrote",
                    folder.display()
                )));
            }
        };
        let settings = Value::Object(settings);
        if let Some(error) = mlx_adapter(folder, &settings) {
            return Err(error);
        }
        let Value::Object(settings) = settings else { unreachable!("made above") };
        let settings =
            Settings::read(&settings).map_err(|why| Error::failed(format!("{}: {why}", config_path.display())))?;
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
        let (modules, replacing) = sort_parts(&file);
        let original = config.get("_name_or_path").and_then(Value::as_str).map(str::to_owned);
        let finder = Finder::new(entries);
        let located = |name: &str, why: String| Error::failed(format!("{}: tensor `{name}`: {why}", path.display()));

        let mut changes: HashMap<String, Change> = HashMap::new();
        let mut pending = Vec::new();
        for (module, parts) in &modules {
            let any = parts.a.as_ref().or(parts.b.as_ref()).or(parts.magnitude.as_ref()).or(parts.bias.as_ref());
            let any = any.expect("a module has a part");
            let (Some(a), Some(b)) = (&parts.a, &parts.b) else {
                return Err(located(any, format!("of the module `{module}` only one of the two factors is there")));
            };
            match (settings.dora, &parts.magnitude) {
                (true, None) => {
                    let why = format!(
                        "adapter_config.json says use_dora, and the module `{module}` has no lora_magnitude_vector; the adapter is incomplete"
                    );
                    return Err(located(a, why));
                }
                (false, Some(magnitude)) => {
                    let why = "it is a magnitude of DoRA, and adapter_config.json does not say use_dora; set it to true, or remove the \
                               magnitudes";
                    return Err(located(magnitude, why.into()));
                }
                _ => {}
            }
            if let Some(layer) = module.split('.').find_map(|part| part.parse::<i64>().ok())
                && settings.layers.as_ref().is_some_and(|layers| !layers.contains(&layer))
            {
                let why = format!(
                    "it is of layer {layer}, and layers_to_transform in adapter_config.json lists other layers: PEFT would leave it \
                     out; remove one of the two"
                );
                return Err(located(a, why));
            }
            let target = format!("{module}.weight");
            let found = finder.find(&target).map_err(|why| located(a, why))?;
            pending.push((module, parts, a, b, target, found));
        }
        let mut replaced = 0;
        let mut heads: BTreeMap<String, &str> = BTreeMap::new();
        for (target, tensor) in &replacing {
            let view = file.get(tensor).expect("listed");
            match finder.find(target).map_err(|why| located(tensor, why))? {
                Some(index) => {
                    let entry = &entries[index];
                    if entry.shape != view.shape {
                        return Err(located(tensor, misfit(view.shape, entry, model)));
                    }
                    changes.entry(entry.name.clone()).or_default().replaced = Some(tensor.clone());
                    replaced += 1;
                }
                None => drop(heads.insert(target.clone(), tensor)),
            }
        }

        // A tied head has no tensor; an adapter of its own gives it one.
        let stored_head = entries.iter().position(|e| is_head(&e.name));
        let tied = families::tied(config).unwrap_or(stored_head.is_none());
        let embedding = |shape: &[usize]| {
            let mut found = entries.iter().filter(|e| e.shape == shape && !e.name.split('.').any(is_number));
            found.next().filter(|_| found.next().is_none()).map(|e| e.name.clone())
        };
        // A `Conv1D` stores its columns first, which its bias tells where the matrix is not square.
        let columns_first = entries.iter().any(|entry| {
            let bias = entry.name.strip_suffix("weight").map(|module| format!("{module}bias"));
            let bias = bias.and_then(|bias| entries.iter().find(|entry| entry.name == bias));
            matches!(&entry.shape[..], [rows, cols] if rows != cols && bias.is_some_and(|bias| bias.shape == [*cols]))
        });
        let mut new_head: Option<(String, Change)> = None;
        for (target, tensor) in heads {
            let shape = file.get(tensor).expect("listed").shape.to_vec();
            match embedding(&shape).filter(|_| tied && is_head(&target)) {
                Some(base) => {
                    let change = Change { base: Some(base), replaced: Some(tensor.to_owned()), ..Change::default() };
                    new_head = Some((target, change));
                    replaced += 1;
                }
                None => return Err(located(tensor, homeless(&target, model))),
            }
        }
        let mut count = 0;
        for (module, parts, a, b, target, found) in pending {
            let [a_shape, b_shape] = [a, b].map(|name| file.get(name).expect("listed").shape.to_vec());
            let (&[rank, inputs], &[outputs, b_rank]) = (&a_shape[..], &b_shape[..]) else {
                return Err(located(a, format!("its shape {a_shape:?} is not that of a matrix")));
            };
            if b_rank != rank {
                return Err(located(b, format!("its rank is {b_rank}, and that of {a} {rank}")));
            }
            let base = embedding(&[outputs, inputs]).filter(|_| tied && is_head(&target));
            let entry = match (&found, base) {
                (Some(index), _) => &entries[*index],
                (None, Some(_)) if settings.keep_tied => continue,
                (None, Some(base)) => {
                    let (_, change) = new_head.get_or_insert_with(|| (target.clone(), Change::default()));
                    change.base = Some(base.clone());
                    entries.iter().find(|e| e.name == base).expect("found")
                }
                (None, None) => return Err(located(a, homeless(&target, model))),
            };
            let straight = entry.shape == [outputs, inputs] && !parts.embedding;
            let turned = entry.shape == [inputs, outputs];
            let transposed = match (straight, turned) {
                // PEFT takes the flag back for linears, and sets it for GPT-2's.
                (true, true) => columns_first,
                (true, false) => false,
                (false, true) => true,
                (false, false) => {
                    return Err(located(a, misfit(&[outputs, inputs], entry, model)));
                }
            };
            if let Some(magnitude) = &parts.magnitude {
                let len: usize = file.get(magnitude).expect("listed").shape.iter().product();
                if len != outputs {
                    return Err(located(magnitude, format!("it has {len} values, expected {outputs}")));
                }
            }
            let scale = settings.scale(module, rank).map_err(|why| located(a, why))?;
            let product = Product {
                a: a.clone(),
                b: b.clone(),
                rank,
                scale,
                transposed,
                magnitude: parts.magnitude.clone(),
                factors: OnceLock::new(),
            };
            if let Some(bias) = &parts.bias {
                let name = format!("{}.bias", entry.name.strip_suffix(".weight").unwrap_or(&entry.name));
                let own = entries.iter().find(|e| e.name == name && e.shape == [outputs]);
                if own.is_none() || found.is_none() {
                    return Err(located(bias, format!("the model has no `{name}` of {outputs} values to add it to")));
                }
                changes.entry(name).or_default().added = Some((bias.clone(), scale));
            }
            match found {
                Some(_) => changes.entry(entry.name.clone()).or_default().product = Some(product),
                None => new_head.as_mut().expect("made above").1.product = Some(product),
            }
            count += 1;
        }

        let vocabulary = families::vocabulary(config)?;
        let untied = tied && untie(&file, &settings, entries, [stored_head, vocabulary], &mut changes, new_head);
        if untied {
            tying::set(config, false);
        }
        let notices = settings.notices(model, &original, &file, &modules, &replacing);
        let kind = match (settings.root, settings.dora) {
            (false, false) => "lora",
            (true, false) => "rslora",
            (false, true) => "dora",
            (true, true) => "rsdora",
        };
        let sha256 = hash_file(&path)?.sha256;
        let report = AdapterReport { path: folder.display().to_string(), kind, sha256, modules: count, replaced };
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
                "value {} at index {at} is not a finite number",
                values[at]
            )))),
        }
    }
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

fn misfit(shape: &[usize], entry: &Entry, model: &Path) -> String {
    format!(
        "it is made for a weight of shape {shape:?}, and `{}` in {} has {:?}; the adapter belongs to another model, or to \
         this one with a vocabulary that was resized, which has to be saved whole first",
        entry.name,
        model.display(),
        entry.shape
    )
}

fn homeless(target: &str, model: &Path) -> String {
    format!("{} has no `{target}` that it could change; the adapter belongs to another model", model.display())
}

/// Divides the adapter's tensors into factors by module and tensors brought whole, by the name they have in the model.
fn sort_parts(file: &SafetensorsFile) -> (BTreeMap<String, Parts>, BTreeMap<String, String>) {
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
            replacing.insert(name.replace(".modules_to_save.", "."), whole);
            continue;
        };
        let parts = modules.entry(module.replace(".base_layer", "")).or_default();
        match part {
            "lora_B" if rest.ends_with(".bias") => parts.bias = Some(whole),
            "lora_A" => parts.a = Some(whole),
            "lora_B" => parts.b = Some(whole),
            "lora_magnitude_vector" => parts.magnitude = Some(whole),
            _ => {
                parts.embedding = true;
                *(if part == "lora_embedding_A" { &mut parts.a } else { &mut parts.b }) = Some(whole);
            }
        }
    }
    (modules, replacing)
}

/// Finds the model's tensor for a name that may have been given in another wrapper.
struct Finder<'a> {
    exact: HashMap<&'a str, usize>,
    by_tail: HashMap<&'a str, Vec<(usize, Vec<&'a str>)>>,
}

/// The segments before the first list (`layers.0`), sorted, and everything from there on; without a list the last two.
fn split(name: &str) -> (Vec<&str>, &str) {
    let starts: Vec<usize> = std::iter::once(0).chain(name.match_indices('.').map(|(at, _)| at + 1)).collect();
    let segments: Vec<&str> = name.split('.').collect();
    let tail = segments.iter().position(|s| is_number(s)).unwrap_or(segments.len().saturating_sub(1)).saturating_sub(1);
    let mut outer = segments[..tail].to_vec();
    outer.sort_unstable();
    (outer, &name[starts[tail]..])
}

impl<'a> Finder<'a> {
    fn new(entries: &'a [Entry]) -> Self {
        let mut by_tail: HashMap<&str, Vec<(usize, Vec<&str>)>> = HashMap::new();
        for (index, entry) in entries.iter().enumerate() {
            let (outer, tail) = split(&entry.name);
            by_tail.entry(tail).or_default().push((index, outer));
        }
        Finder { exact: entries.iter().enumerate().map(|(index, e)| (e.name.as_str(), index)).collect(), by_tail }
    }

    /// Fails when several tensors could be meant.
    fn find(&self, name: &str) -> Result<Option<usize>, String> {
        if let Some(index) = self.exact.get(name) {
            return Ok(Some(*index));
        }
        let (outer, tail) = split(name);
        let Some(candidates) = self.by_tail.get(tail) else { return Ok(None) };
        let same: Vec<_> = candidates.iter().filter(|(_, other)| *other == outer).collect();
        match (&same[..], &candidates[..]) {
            ([(index, _)], _) | ([], [(index, _)]) => Ok(Some(*index)),
            _ => Err(format!(
                "{} tensors of the model end in `{tail}`, and it cannot be told which it changes",
                candidates.len()
            )),
        }
    }
}

/// Modules as adapter_config.json names them: a list of their ends, or one pattern for whole names. PEFT's word for all linears names
/// none, and what is no pattern to us is not looked for.
fn names(value: Option<&Value>) -> Vec<(String, Regex)> {
    let (list, is_pattern) = match value {
        Some(Value::Array(list)) => (list.iter().filter_map(Value::as_str).collect(), false),
        Some(Value::String(pattern)) if pattern != "all-linear" => (vec![pattern.as_str()], true),
        _ => (Vec::new(), false),
    };
    // A pattern is for names with all that a wrapper put before them, which were taken off here.
    let regex = |name: &str| match is_pattern {
        true => Regex::new(&format!("^(?:.*?)(?:{name})$")),
        false => Regex::new(&format!(r"^(?:.*\.)?{}$", fancy_regex::escape(name))),
    };
    list.into_iter().filter_map(|name| Some((name.to_owned(), regex(name).ok()?))).collect()
}

impl Settings {
    fn read(config: &Map<String, Value>) -> Result<Settings, String> {
        let set = |key: &str| match config.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(object)) => !object.is_empty(),
            Some(_) => true,
        };
        let wrong = |key: &str, expected: &str| format!("{key} is {}, expected {expected}", config[key]);
        match config.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            Some(other) => {
                return Err(format!("adapters of type {other} cannot be merged, only LORA (with rsLoRA and DoRA)"));
            }
            None => return Err("peft_type is missing".into()),
        }
        for (key, what) in [
            ("layer_replication", "layers that are repeated"),
            ("trainable_token_indices", "tokens that are trained alone"),
            ("target_parameters", "factors for parameters that are no module's weight"),
            ("alora_invocation_tokens", "an activated adapter, which works from its tokens on and has no merged form,"),
            ("use_qalora", "QA-LoRA"),
            ("use_bdlora", "factors in diagonal blocks"),
            ("arrow_config", "a router between adapters"),
            ("kasa_config", "KaSA, which changes the weights it adapts,"),
            ("monteclora_config", "sampled factors"),
            ("velora_config", "VeLoRA"),
            ("lora_ga_config", "LoRA-GA, which changes the weights it adapts,"),
        ] {
            if set(key) {
                return Err(format!("{key} is set: {what} cannot be merged"));
            }
        }
        if let Some(Value::String(start)) = config.get("init_lora_weights")
            && !["gaussian", "orthogonal", "eva", "mica"].contains(&start.to_ascii_lowercase().as_str())
        {
            return Err(format!(
                "init_lora_weights is `{start}`, which changes the weights it adapts; save the adapter as one for the \
                 original weights first (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
            ));
        }
        let number = |key: &str| config.get(key).and_then(Value::as_f64).filter(|n| n.is_finite());
        let rank = match config.get("r") {
            None => 8,
            Some(r) => r.as_u64().filter(|r| *r > 0).ok_or_else(|| wrong("r", "a positive number"))? as usize,
        };
        let alpha = match config.get("lora_alpha") {
            None => 8.0,
            Some(_) => number("lora_alpha").ok_or_else(|| wrong("lora_alpha", "a number"))?,
        };
        let patterns = |key: &str| -> Result<Vec<(Regex, f64)>, String> {
            let Some(Value::Object(patterns)) = config.get(key) else { return Ok(Vec::new()) };
            let read = |(pattern, value): (&String, &Value)| {
                let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
                    .map_err(|e| format!("{key} has an invalid pattern `{pattern}`: {e}"))?;
                let value = value.as_f64().ok_or_else(|| format!("{key}.{pattern} is {value}, expected a number"))?;
                Ok((regex, value))
            };
            patterns.iter().map(read).collect()
        };
        Ok(Settings {
            rank,
            alpha,
            root: config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            layers: match config.get("layers_to_transform") {
                Some(Value::Array(layers)) => layers.iter().map(Value::as_i64).collect(),
                Some(one) => one.as_i64().map(|layer| vec![layer]),
                None => None,
            },
            keep_tied: config.get("ensure_weight_tying").and_then(Value::as_bool).unwrap_or(false),
            dora: config.get("use_dora").and_then(Value::as_bool).unwrap_or(false),
            ranks: patterns("rank_pattern")?,
            alphas: patterns("alpha_pattern")?,
            base: config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
            targets: names(config.get("target_modules")),
            saved: names(config.get("modules_to_save")),
        })
    }

    /// What the user should know of an adapter of these parts.
    fn notices(
        &self,
        model: &Path,
        original: &Option<String>,
        file: &SafetensorsFile,
        modules: &BTreeMap<String, Parts>,
        replacing: &BTreeMap<String, String>,
    ) -> Vec<String> {
        let mut notices = Vec::new();
        let foreign = |name: &&str| !name.starts_with("base_model.model.") || name.contains("_orig_mod.");
        let names: Vec<&str> = file.tensors().map(|spec| spec.name.as_str()).collect();
        if let Some(first) = names.iter().copied().find(|name| foreign(name)) {
            notices.push(format!(
                "{} of the adapter's {} tensors, such as `{first}`, are not called as PEFT calls them, and it would leave them out; they \
                 were merged all the same",
                names.iter().filter(|name| foreign(name)).count(),
                names.len()
            ));
        }
        let last = |name: &str| name.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
        if let Some(base) = self.base.as_deref().filter(|base| !base.is_empty()) {
            let wanted = last(base);
            let place = model.canonicalize().unwrap_or_else(|_| model.to_path_buf());
            // A cache of the hub calls a model's folder models--OWNER--NAME.
            let mut parts = place.iter().map(|part| part.to_string_lossy().to_ascii_lowercase());
            let named = original.as_deref().is_some_and(|name| last(name) == wanted);
            if !named
                && !parts.any(|part| part.rsplit("--").next() == Some(&*wanted) || part == format!("{wanted}.gguf"))
            {
                notices.push(format!(
                    "the adapter was trained on `{base}`, and by its name {} may be another model; shapes fit, and nothing else tells",
                    model.display()
                ));
            }
        }
        let zero = |name: &Option<String>| {
            let data = name.as_ref().and_then(|name| file.get(name)).map(|view| view.data);
            data.is_some_and(|data| data.iter().all(|byte| *byte == 0))
        };
        let idle: Vec<&str> = modules
            .iter()
            .filter(|(module, parts)| {
                let alpha = Self::first(&self.alphas, module).unwrap_or(self.alpha);
                parts.magnitude.is_none() && (alpha == 0.0 || zero(&parts.a) || zero(&parts.b))
            })
            .map(|(module, _)| module.as_str())
            .collect();
        if !idle.is_empty() {
            notices.push(format!(
                "{} of the adapter's {} modules ({}) change nothing: a factor or lora_alpha is 0; it may never have been trained",
                idle.len(),
                modules.len(),
                listed(&idle)
            ));
        }
        for (key, what, wanted) in
            [("target_modules", "factors", &self.targets), ("modules_to_save", "tensors", &self.saved)]
        {
            let has = |regex: &Regex| {
                let whole = replacing.keys().filter_map(|name| Some(name.rsplit_once('.')?.0));
                modules.keys().map(String::as_str).chain(whole).any(|name| regex.is_match(name).unwrap_or(true))
            };
            let absent: Vec<&str> =
                wanted.iter().filter(|(_, regex)| !has(regex)).map(|(name, _)| name.as_str()).collect();
            if !absent.is_empty() {
                notices.push(format!(
                    "adapter_config.json lists {} in {key}, and the adapter has no {what} for {}; they stay as the model has them",
                    listed(&absent),
                    if absent.len() == 1 { "it" } else { "them" }
                ));
            }
        }
        notices
    }

    fn first(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
        patterns.iter().find(|(regex, _)| regex.is_match(module).unwrap_or(false)).map(|(_, value)| *value)
    }

    /// The factor of a module's product, whose factors are of rank `found`.
    fn scale(&self, module: &str, found: usize) -> Result<f32, String> {
        let rank = Self::first(&self.ranks, module).unwrap_or(self.rank as f64);
        if rank != found as f64 {
            return Err(format!("its rank is {found}, and adapter_config.json says {rank}"));
        }
        let alpha = Self::first(&self.alphas, module).unwrap_or(self.alpha);
        Ok((alpha / if self.root { rank.sqrt() } else { rank }) as f32)
    }
}
