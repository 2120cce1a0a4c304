//! What is told of an adapter that was merged: where PEFT would do otherwise, and what changed nothing.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use fancy_regex::Regex;
use formats::SafetensorsFile;

use super::super::beside::OF_WORDS;
use super::settings::Settings;
use super::{Parts, is_head};
use crate::families::AdapterNames;
use crate::weights::Entry;
use crate::words::listed;

/// An adapter that was merged, and the model that it was merged into.
pub(super) struct Merged<'a> {
    pub(super) settings: &'a Settings,
    pub(super) file: &'a SafetensorsFile,
    /// The adapter's factors by module.
    pub(super) modules: &'a BTreeMap<String, Parts>,
    /// The adapter's tensors that took the place of the model's, by the model's names.
    pub(super) replacing: &'a BTreeMap<String, String>,
    /// Where the model is.
    pub(super) model: &'a Path,
    /// What the model's config.json calls it.
    pub(super) original: Option<&'a str>,
    /// The model's tensors.
    pub(super) entries: &'a [Entry],
    /// What PEFT calls its modules.
    pub(super) names: &'a AdapterNames,
}

impl Merged<'_> {
    /// What the user should know, one sentence each.
    pub(super) fn notices(&self) -> Vec<String> {
        let modules = self.entries.iter().filter(|entry| entry.shape.len() == 2);
        let modules = modules.filter_map(|entry| entry.name.strip_suffix(".weight"));
        let called: Vec<Vec<String>> = modules.map(|module| self.names.in_memory(module)).collect();
        let linears: HashSet<&str> = called.iter().flatten().map(String::as_str).collect();
        // PEFT looks a module up by the name that it has in memory, and nowhere else. A head that is the embedding is a module without
        // a tensor.
        let known = |module: &String| linears.contains(&module[..]) || module == "lm_head";
        let taken = |module: &String| self.names.taken_for(module).into_iter().find(known);
        let own: BTreeSet<String> = self.modules.keys().filter_map(taken).collect();
        let strange: HashSet<&str> =
            self.modules.keys().filter(|module| taken(module).is_none()).map(String::as_str).collect();
        // Of a target without any factors, and of modules under other names, is told elsewhere.
        let is_told = strange.is_empty() && called.iter().all(|names| names.len() == 1);
        let without_factors = if is_told { self.without_factors(&linears, &own) } else { None };
        let of_modules = [self.foreign_names(&strange), self.unnamed(&linears, &own), without_factors];
        let words = self.file.path().parent().and_then(|folder| other_words(folder, self.model));
        let of_values = [self.other_base(), self.idle(), words];
        let listed = [
            self.without_targets(&own),
            self.listed_in_vain("target_modules", "factors", &self.settings.targets, &own),
            self.listed_in_vain("modules_to_save", "tensors", &self.settings.saved, &own),
        ];
        of_modules.into_iter().chain(of_values).chain(listed).flatten().collect()
    }

    /// The adapter's tensors that are brought whole under names by which PEFT knows no tensor of the model.
    fn foreign_whole(&self) -> HashSet<&str> {
        if !self.names.differ() || self.replacing.is_empty() {
            return HashSet::new();
        }
        let parts = self.entries.iter().filter_map(|entry| entry.name.rsplit_once('.'));
        let in_memory =
            |(module, part)| self.names.in_memory(module).into_iter().map(move |name| format!("{name}.{part}"));
        let known: HashSet<String> = parts.flat_map(in_memory).collect();
        let foreign = self.replacing.iter().filter(|(name, _)| !is_head(name) && !known.contains(*name));
        foreign.map(|(_, tensor)| tensor.as_str()).collect()
    }

    /// Tensors whose names PEFT would not look for: `strange` are the modules that the model has under other names.
    fn foreign_names(&self, strange: &HashSet<&str>) -> Option<String> {
        let whole = self.foreign_whole();
        let foreign = |name: &&str| {
            let module = name.strip_prefix("base_model.model.").and_then(|name| Some(name.split_once(".lora_")?.0));
            !name.starts_with("base_model.model.")
                || name.contains("_orig_mod.")
                || whole.contains(name)
                || module.is_some_and(|module| strange.contains(module.replace(".base_layer", "").as_str()))
        };
        let names: Vec<&str> = self.file.tensors().map(|spec| spec.name.as_str()).collect();
        let first = names.iter().copied().find(|name| foreign(name))?;
        Some(format!(
            "{} of the adapter's {} tensors, such as `{first}`, are not called as PEFT calls them with the transformers of today, and it \
             would leave them out or fail; they were merged all the same",
            names.iter().filter(|name| foreign(name)).count(),
            names.len()
        ))
    }

    /// Whether PEFT would look for factors of a module that adapter_config.json names.
    fn is_target(&self, module: &str) -> bool {
        is_among(&self.settings.targets, module) && !is_among(&self.settings.excluded, module)
    }

    /// Modules with factors that adapter_config.json does not name.
    fn unnamed(&self, linears: &HashSet<&str>, own: &BTreeSet<String>) -> Option<String> {
        let unnamed: Vec<&str> = own
            .iter()
            .map(String::as_str)
            .filter(|module| match self.settings.targets.is_empty() {
                // All linears are meant.
                true => linears.contains(module) && is_among(&self.settings.excluded, module),
                false => linears.contains(module) && !self.is_target(module),
            })
            .collect();
        (!unnamed.is_empty()).then(|| {
            format!(
                "adapter_config.json does not name {} of the adapter's {} modules ({}) in target_modules, or excludes them, and PEFT would \
                 leave them out; they were merged all the same",
                unnamed.len(),
                self.modules.len(),
                listed(&unnamed)
            )
        })
    }

    /// A configuration that leaves it to PEFT which modules have factors, where the adapter has some of several kinds.
    fn without_targets(&self, own: &BTreeSet<String>) -> Option<String> {
        let kinds: BTreeSet<&str> = own.iter().filter_map(|module| module.rsplit('.').next()).collect();
        let kinds: Vec<&str> = kinds.into_iter().collect();
        (self.settings.no_targets && !kinds.is_empty()).then(|| {
            format!(
                "adapter_config.json names no target_modules, and PEFT takes those of its own table for models of this type, which may be fewer \
                 than the adapter has factors for ({}), and leaves out the others; all were merged",
                listed(&kinds)
            )
        })
    }

    /// Linears without factors, of a target that others have factors of.
    fn without_factors(&self, linears: &HashSet<&str>, own: &BTreeSet<String>) -> Option<String> {
        let in_layers = |module: &str| {
            let layer = module.split('.').find_map(|part| part.parse::<i64>().ok());
            self.settings.layers.as_ref().is_none_or(|layers| layer.is_some_and(|layer| layers.contains(&layer)))
        };
        let has = |module: &str| own.contains(module);
        let mut absent: Vec<&str> = linears
            .iter()
            .copied()
            .filter(|module| self.is_target(module) && in_layers(module) && !has(module))
            .collect();
        absent.sort_unstable();
        let partly = |module: &&str| {
            let tail = module.rsplit('.').next().unwrap_or_default();
            own.iter().any(|other| other.rsplit('.').next() == Some(tail))
        };
        absent.retain(partly);
        (!absent.is_empty()).then(|| {
            format!(
                "the adapter has no factors for {} of the modules that target_modules names ({}); they stay as the model has them",
                absent.len(),
                listed(&absent)
            )
        })
    }

    /// A model whose name is not that of the one that the adapter was trained on.
    fn other_base(&self) -> Option<String> {
        let last = |name: &str| name.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
        let base = self.settings.base.as_deref().filter(|base| !base.is_empty())?;
        let wanted = last(base);
        let place = self.model.canonicalize().unwrap_or_else(|_| self.model.to_path_buf());
        // A cache of the hub calls a model's folder models--OWNER--NAME.
        let mut parts = place.iter().map(|part| part.to_string_lossy().to_ascii_lowercase());
        let named = self.original.is_some_and(|name| last(name) == wanted);
        let other =
            !named && !parts.any(|part| part.rsplit("--").next() == Some(&*wanted) || part == format!("{wanted}.gguf"));
        other.then(|| {
            format!(
                "the adapter was trained on `{base}`, and by its name {} may be another model; shapes fit, and nothing else tells",
                self.model.display()
            )
        })
    }

    /// Modules whose product is zero.
    fn idle(&self) -> Option<String> {
        let zero = |name: &Option<String>| {
            let data = name.as_ref().and_then(|name| self.file.get(name)).map(|view| view.data);
            data.is_some_and(|data| data.iter().all(|byte| *byte == 0))
        };
        let idle: Vec<&str> = self
            .modules
            .iter()
            .filter(|(module, parts)| {
                parts.magnitude.is_none() && (self.settings.alpha_of(module) == 0.0 || zero(&parts.a) || zero(&parts.b))
            })
            .map(|(module, _)| module.as_str())
            .collect();
        (!idle.is_empty()).then(|| {
            format!(
                "{} of the adapter's {} modules ({}) change nothing: a factor or lora_alpha is 0; it may never have been trained",
                idle.len(),
                self.modules.len(),
                listed(&idle)
            )
        })
    }

    /// Modules that setting `key` lists, and that the adapter has no tensor for; `what` such tensors are called.
    fn listed_in_vain(
        &self,
        key: &str,
        what: &str,
        wanted: &[(String, Regex)],
        own: &BTreeSet<String>,
    ) -> Option<String> {
        let has = |regex: &Regex| {
            // A block that is saved whole gives tensors of what is inside it.
            let whole = self.replacing.keys().flat_map(|name| name.match_indices('.').map(|(dot, _)| &name[..dot]));
            let modules = self.modules.keys().chain(own).map(String::as_str);
            modules.chain(whole).any(|name| regex.is_match(name).unwrap_or(true))
        };
        let absent: Vec<&str> = wanted.iter().filter(|(_, regex)| !has(regex)).map(|(name, _)| name.as_str()).collect();
        (!absent.is_empty()).then(|| {
            format!(
                "adapter_config.json lists {} in {key}, and the adapter has no {what} for {}; they stay as the model has them",
                listed(&absent),
                if absent.len() == 1 { "it" } else { "them" }
            )
        })
    }
}

/// Whether a module is one of those that a list of adapter_config.json means.
fn is_among(list: &[(String, Regex)], module: &str) -> bool {
    list.iter().any(|(_, regex)| regex.is_match(module).unwrap_or(false))
}

/// Settings of tokenizer_config.json that change what a model reads or where it stops.
const SETTINGS: &[&str] =
    &["bos_token", "eos_token", "pad_token", "add_bos_token", "add_eos_token", "chat_template", "added_tokens_decoder"];

/// What to say where the folder of an adapter has a tokenizer or a template of its own, which is not the model's: training programs save them
/// together.
fn other_words(adapter: &Path, model: &Path) -> Option<String> {
    let differs = |name: &&&str| {
        let Ok(own) = std::fs::read(adapter.join(name)) else { return false };
        let Ok(theirs) = std::fs::read(model.join(name)) else { return true };
        let json = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).ok();
        match (json(&own), json(&theirs)) {
            (Some(own), Some(theirs)) if **name == "tokenizer_config.json" => {
                SETTINGS.iter().any(|setting| own.get(setting) != theirs.get(setting))
            }
            (Some(own), Some(theirs)) => own != theirs,
            _ => own != theirs,
        }
    };
    if !model.is_dir() {
        return None;
    }
    let names: Vec<&str> = OF_WORDS.iter().filter(differs).copied().collect();
    if names.is_empty() {
        return None;
    }
    Some(format!(
        "{} has files of its own that differ from the model's, or that the model lacks ({}): the model's are taken, and where the adapter was \
         trained with its own, quantize a copy of the model that has them",
        adapter.display(),
        listed(&names)
    ))
}
