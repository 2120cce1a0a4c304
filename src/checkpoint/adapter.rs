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

use crate::error::{Error, Result};
use crate::families::{self, tying};
use crate::json::read_json;
use crate::output::hashing::hash_file;
use crate::report::AdapterReport;
use crate::weights::Entry;

mod settings;

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
                if !settings.bias {
                    let why = "lora_bias is not set in adapter_config.json, and PEFT leaves such a tensor out then: set it if the adapter \
                               was trained with it, or take these tensors out of the file";
                    return Err(located(bias, why.to_owned()));
                }
                let name = format!("{}.bias", entry.name.strip_suffix(".weight").unwrap_or(&entry.name));
                let own = entries.iter().find(|e| e.name == name && e.shape == [outputs]);
                if own.is_none() || found.is_none() {
                    let why = format!(
                        "lora_bias is set in adapter_config.json, and the model has no `{name}` of {outputs} values to add it to; \
                         PEFT does not merge it either: train the adapter without lora_bias"
                    );
                    return Err(located(bias, why));
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
        let notices = settings.notices(model, &original, &file, &modules, &replacing, entries);
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
