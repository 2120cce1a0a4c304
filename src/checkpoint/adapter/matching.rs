//! Which tensor of the model each tensor of an adapter changes.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::OnceLock;

use formats::SafetensorsFile;

use super::settings::Settings;
use super::{Change, Parts, Product, is_head, is_number};
use crate::error::{Error, Result};
use crate::families::AdapterNames;
use crate::weights::Entry;

/// The model that an adapter is merged into.
pub(super) struct Model<'m> {
    /// Where it is, for messages.
    pub(super) path: &'m Path,
    pub(super) entries: &'m [Entry],
    /// What PEFT calls its modules.
    pub(super) names: &'m AdapterNames,
    /// Whether its head is its embedding.
    pub(super) tied: bool,
}

/// An adapter and a model, while a place is found for each tensor of the adapter.
pub(super) struct Matching<'m> {
    settings: &'m Settings,
    file: &'m SafetensorsFile,
    model: Model<'m>,
    /// A `Conv1D` stores its columns first, which its bias tells where the matrix is not square.
    columns_first: bool,
    /// What happens to the model's tensors, by name.
    pub(super) changes: HashMap<String, Change>,
    /// The tensor that a tied head gets, and what it is made of.
    pub(super) new_head: Option<(String, Change)>,
    /// Modules with a product of factors.
    pub(super) modules: usize,
    /// Tensors of the model that the adapter's take the place of.
    pub(super) replaced: usize,
}

/// A module with both factors.
struct Factors<'m> {
    module: &'m str,
    parts: &'m Parts,
    /// The tensor `[rank, inputs]`.
    a: &'m str,
    /// The tensor `[outputs, rank]`.
    b: &'m str,
    /// The name of the weight that their product is added to.
    target: String,
    /// Where the model has it; a tied head has no tensor.
    found: Option<usize>,
}

impl<'m> Matching<'m> {
    /// Finds a place for all `modules` with factors and for all tensors that are `replacing` the model's.
    ///
    /// Fails for a tensor without a place, of another shape, or that adapter_config.json does not speak of.
    pub(super) fn of(
        settings: &'m Settings,
        file: &'m SafetensorsFile,
        modules: &'m BTreeMap<String, Parts>,
        replacing: &'m BTreeMap<String, String>,
        model: Model<'m>,
    ) -> Result<Matching<'m>> {
        let (entries, names) = (model.entries, model.names);
        let mut matching = Matching {
            settings,
            file,
            model,
            columns_first: stores_columns_first(entries),
            changes: HashMap::new(),
            new_head: None,
            modules: 0,
            replaced: 0,
        };
        let finder = Finder::new(entries, names);
        let complete = |(module, parts): (&'m String, &'m Parts)| matching.complete(&finder, module, parts);
        let pending = modules.iter().map(complete).collect::<Result<Vec<_>>>()?;
        matching.replace(&finder, replacing)?;
        for factors in &pending {
            matching.multiply(factors)?;
        }
        Ok(matching)
    }

    /// The error of a tensor of the adapter.
    fn refused(&self, name: &str, why: String) -> Error {
        Error::failed(format!("{}: tensor `{name}`: {why}", self.file.path().display()))
    }

    /// Fails unless a module has the tensors that adapter_config.json says it has, and is in a layer that is listed there.
    fn complete(&self, finder: &Finder<'_>, module: &'m str, parts: &'m Parts) -> Result<Factors<'m>> {
        let any = parts.a.as_ref().or(parts.b.as_ref()).or(parts.magnitude.as_ref()).or(parts.bias.as_ref());
        let any = any.expect("a module has a part");
        let (Some(a), Some(b)) = (&parts.a, &parts.b) else {
            let (there, missing) = if parts.a.is_some() { ("lora_A", "lora_B") } else { ("lora_B", "lora_A") };
            let why = match parts.a.is_some() || parts.b.is_some() {
                true => format!("of the module `{module}` {there} is there and {missing} is not"),
                false => format!("of the module `{module}` neither lora_A nor lora_B is there"),
            };
            return Err(self.refused(any, format!("{why}; copy the whole adapter again, or save it anew")));
        };
        match (self.settings.dora, &parts.magnitude) {
            (true, None) => {
                let why = format!(
                    "adapter_config.json says use_dora, and the module `{module}` has no lora_magnitude_vector; the adapter is incomplete"
                );
                return Err(self.refused(a, why));
            }
            (false, Some(magnitude)) => {
                let why = "it is a magnitude of DoRA, and adapter_config.json does not say use_dora; set it to true, or remove the \
                           magnitudes";
                return Err(self.refused(magnitude, why.into()));
            }
            _ => {}
        }
        if let Some(layer) = module.split('.').find_map(|part| part.parse::<i64>().ok())
            && self.settings.layers.as_ref().is_some_and(|layers| !layers.contains(&layer))
        {
            let why = format!(
                "it is of layer {layer}, and layers_to_transform in adapter_config.json lists other layers: PEFT would leave it \
                 out; remove one of the two"
            );
            return Err(self.refused(a, why));
        }
        let target = format!("{module}.weight");
        let found = finder.find(&target).map_err(|why| self.refused(a, why))?;
        Ok(Factors { module, parts, a, b, target, found })
    }

    /// Puts tensors in the place of the model's, or in that of a tied head. Fails for one of another shape.
    fn replace(&mut self, finder: &Finder<'_>, replacing: &'m BTreeMap<String, String>) -> Result<()> {
        let mut heads: BTreeMap<&str, &str> = BTreeMap::new();
        for (target, tensor) in replacing {
            let view = self.file.get(tensor).expect("listed");
            match finder.find(target).map_err(|why| self.refused(tensor, why))? {
                Some(index) => {
                    let entry = &self.model.entries[index];
                    if entry.shape != view.shape {
                        return Err(self.refused(tensor, misfit(view.shape, entry, self.model.path)));
                    }
                    self.changes.entry(entry.name.clone()).or_default().replaced = Some(tensor.clone());
                    self.replaced += 1;
                }
                None => drop(heads.insert(target, tensor)),
            }
        }
        for (target, tensor) in heads {
            let Some(base) = self.tied_head(target, self.file.get(tensor).expect("listed").shape) else {
                return Err(self.refused(tensor, homeless(target, self.model.path)));
            };
            let change =
                Change { base: Some(base.name.clone()), replaced: Some(tensor.to_owned()), ..Change::default() };
            self.new_head = Some((target.to_owned(), change));
            self.replaced += 1;
        }
        Ok(())
    }

    /// The embedding that a tied head of this shape is: a tied head has no tensor, and an adapter of its own gives it one.
    fn tied_head(&self, target: &str, shape: &[usize]) -> Option<&'m Entry> {
        let mut found = self.model.entries.iter().filter(|e| e.shape == shape && !e.name.split('.').any(is_number));
        found.next().filter(|_| found.next().is_none() && self.model.tied && is_head(target))
    }

    /// Adds a product of factors to the model's weight, and the bias of its factors to the model's bias.
    ///
    /// Fails for factors of other shapes than the weight and each other, and for a rank that adapter_config.json does not give.
    fn multiply(&mut self, factors: &Factors<'_>) -> Result<()> {
        let Factors { module, parts, a, b, target, found } = factors;
        let [a_shape, b_shape] = [a, b].map(|name| self.file.get(name).expect("listed").shape);
        let (&[rank, inputs], &[outputs, b_rank]) = (a_shape, b_shape) else {
            return Err(self.refused(a, format!("its shape {a_shape:?} is not that of a matrix, and only matrices are merged here; merge it with PEFT (merge_and_unload)")));
        };
        if b_rank != rank {
            return Err(self.refused(b, format!("its rank is {b_rank}, and that of {a} {rank}")));
        }
        let entry = match (found, self.tied_head(target, &[outputs, inputs])) {
            (Some(index), _) => &self.model.entries[*index],
            (None, Some(_)) if self.settings.keep_tied => return Ok(()),
            (None, Some(base)) => {
                let (_, change) = self.new_head.get_or_insert_with(|| (target.clone(), Change::default()));
                change.base = Some(base.name.clone());
                base
            }
            (None, None) => return Err(self.refused(a, homeless(target, self.model.path))),
        };
        let straight = entry.shape == [outputs, inputs] && !parts.embedding;
        let turned = entry.shape == [inputs, outputs];
        let transposed = match (straight, turned) {
            // PEFT takes the flag back for linears, and sets it for GPT-2's.
            (true, true) => self.columns_first,
            (true, false) => false,
            (false, true) => true,
            (false, false) => return Err(self.refused(a, misfit(&[outputs, inputs], entry, self.model.path))),
        };
        if let Some(magnitude) = &parts.magnitude {
            let len: usize = self.file.get(magnitude).expect("listed").shape.iter().product();
            if len != outputs {
                return Err(self.refused(magnitude, format!("it has {len} values, expected {outputs}")));
            }
        }
        let scale = self.settings.scale(module, rank).map_err(|why| self.refused(a, why))?;
        let product = Product {
            a: (*a).to_owned(),
            b: (*b).to_owned(),
            rank,
            scale,
            transposed,
            magnitude: parts.magnitude.clone(),
            factors: OnceLock::new(),
        };
        if let Some(bias) = &parts.bias {
            let name = self.bias_of(factors, entry, bias)?;
            self.changes.entry(name).or_default().added = Some((bias.clone(), scale));
        }
        match found {
            Some(_) => self.changes.entry(entry.name.clone()).or_default().product = Some(product),
            None => self.new_head.as_mut().expect("made above").1.product = Some(product),
        }
        self.modules += 1;
        Ok(())
    }

    /// The model's bias that the bias of these factors, a tensor of the adapter, is added to. Fails where PEFT adds none.
    fn bias_of(&self, factors: &Factors<'_>, entry: &Entry, bias: &str) -> Result<String> {
        if !self.settings.bias {
            let why = "lora_bias is not set in adapter_config.json, and PEFT leaves such a tensor out then: set it if the adapter \
                       was trained with it, or take these tensors out of the file";
            return Err(self.refused(bias, why.to_owned()));
        }
        let outputs = self.file.get(factors.b).expect("listed").shape[0];
        let name = format!("{}.bias", entry.name.strip_suffix(".weight").unwrap_or(&entry.name));
        let own = self.model.entries.iter().find(|e| e.name == name && e.shape == [outputs]);
        if own.is_none() || factors.found.is_none() {
            let why = format!(
                "lora_bias is set in adapter_config.json, and the model has no `{name}` of {outputs} values to add it to; \
                 PEFT does not merge it either: train the adapter without lora_bias"
            );
            return Err(self.refused(bias, why));
        }
        Ok(name)
    }
}

/// Whether the model's linears are stored as `[in, out]`.
fn stores_columns_first(entries: &[Entry]) -> bool {
    entries.iter().any(|entry| {
        let bias = entry.name.strip_suffix("weight").map(|module| format!("{module}bias"));
        let bias = bias.and_then(|bias| entries.iter().find(|entry| entry.name == bias));
        matches!(&entry.shape[..], [rows, cols] if rows != cols && bias.is_some_and(|bias| bias.shape == [*cols]))
    })
}

/// Why factors or a tensor of this shape are not for a tensor of the model.
fn misfit(shape: &[usize], entry: &Entry, model: &Path) -> String {
    format!(
        "it is made for a weight of shape {shape:?}, and `{}` in {} has {:?}; the adapter belongs to another model, or to \
         this one with a vocabulary that was resized, which has to be saved whole first",
        entry.name,
        model.display(),
        entry.shape
    )
}

/// Why a tensor for `target` has no place in the model.
fn homeless(target: &str, model: &Path) -> String {
    format!("{} has no `{target}` that it could change; the adapter belongs to another model", model.display())
}

/// Finds the model's tensor for a name that may have been given in another wrapper.
struct Finder<'a> {
    exact: HashMap<&'a str, usize>,
    /// By the names that PEFT knows them by; `None` where several have one.
    called: HashMap<String, Option<usize>>,
    names: &'a AdapterNames,
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
    fn new(entries: &'a [Entry], names: &'a AdapterNames) -> Self {
        let mut by_tail: HashMap<&str, Vec<(usize, Vec<&str>)>> = HashMap::new();
        let mut called = HashMap::new();
        for (index, entry) in entries.iter().enumerate() {
            let (outer, tail) = split(&entry.name);
            by_tail.entry(tail).or_default().push((index, outer));
            if let Some((module, part)) = entry.name.rsplit_once('.').filter(|_| names.differ()) {
                for name in names.in_memory(module) {
                    called.entry(format!("{name}.{part}")).and_modify(|other| *other = None).or_insert(Some(index));
                }
            }
        }
        let exact = entries.iter().enumerate().map(|(index, e)| (e.name.as_str(), index)).collect();
        Finder { exact, called, names, by_tail }
    }

    /// Fails when several tensors could be meant.
    ///
    /// The whole name goes first, as the file has it or as PEFT knows it. Of names that end alike that is meant which has the same parts before,
    /// in any order, and else the only one of which all parts are there, or which has all that are.
    fn find(&self, name: &str) -> Result<Option<usize>, String> {
        if let Some(index) = self.exact.get(name) {
            return Ok(Some(*index));
        }
        if let Some((module, part)) = name.rsplit_once('.') {
            let known = |module: String| *self.called.get(&format!("{module}.{part}"))?;
            if let Some(index) =
                known(module.to_owned()).or_else(|| self.names.taken_for(module).into_iter().find_map(known))
            {
                return Ok(Some(index));
            }
        }
        let (outer, tail) = split(name);
        let Some(candidates) = self.by_tail.get(tail) else { return Ok(None) };
        let same: Vec<_> = candidates.iter().filter(|(_, other)| *other == outer).collect();
        let within = |some: &[&str], all: &[&str]| !some.is_empty() && some.iter().all(|part| all.contains(part));
        let akin = candidates.iter().filter(|(_, other)| within(other, &outer) || within(&outer, other));
        let akin: Vec<_> = akin.collect();
        match (&same[..], &candidates[..], &akin[..]) {
            ([(index, _)], ..) | ([], [(index, _)], _) | ([], _, [(index, _)]) => Ok(Some(*index)),
            _ => Err(format!(
                "{} tensors of the model end in `{tail}`, and it cannot be told which it changes",
                candidates.len()
            )),
        }
    }
}
