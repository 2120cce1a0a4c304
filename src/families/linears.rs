//! Linears that transformers' class of a model has and a checkpoint lacks, as the tower of a model that was trained further for text alone.
//!
//! `linears.json` is made from transformers' own classes by `tests/fixtures/make_linears.py`: for each the names of its linears up to the
//! first number in them.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use serde_json::Value;

use super::renames::Loading;
use super::{component, unknown};
use crate::weights::Weights;
use crate::words::listed;

static TABLE: LazyLock<HashMap<String, Vec<String>>> =
    LazyLock::new(|| serde_json::from_str(include_str!("linears.json")).expect("a committed file"));

/// Where the files have no linears, and the class of transformers has.
#[derive(Debug, PartialEq)]
pub struct Absent {
    /// The class that config.json names, as `BertModel`.
    pub class: String,
    /// Where there are none.
    pub from: From,
}

impl Absent {
    /// What to say of it.
    pub fn note(&self) -> String {
        let Absent { class, from } = self;
        match from {
            From::Parts(modules) => {
                let modules: Vec<&str> = modules.iter().map(|name| name.trim_end_matches('.')).collect();
                format!(
                    "the model's files have no linears in {}, which {class} has: transformers makes them up at random, for this output as for the \
                     model itself",
                    listed(&modules)
                )
            }
            From::Everywhere(such) => format!(
                "config.json names the class {class}, whose linears transformers looks for in such places as `{such}`, and the files have none \
                 there: it would make all of them up at random; take the config.json that belongs to these files"
            ),
        }
    }
}

/// A place of linears.
#[derive(Debug, PartialEq)]
pub enum From {
    /// Components, whose names end in a dot where there is more under them than one linear. Heads are not among them, which may share a tensor.
    Parts(Vec<String>),
    /// Wherever the class has any, as under this name.
    Everywhere(String),
}

/// Components with linears that the class in config.json has and the files lack; nothing where the class is not known. What a setting leaves
/// out (`audio_config: null`) is not missed.
///
/// `packed` are the modules with codes, by all their names: no name here stands for one of them.
pub fn absent(source: &dyn Weights, packed: &[&String]) -> Option<Absent> {
    // A GGUF file is a language model by itself, and what is written of it is too.
    if source.gguf().is_some() {
        return None;
    }
    let class = source.config()["architectures"].get(0)?.as_str()?;
    let had = TABLE.get(class)?;
    let loading = Loading::of(source.config());
    // Of many layers one is enough.
    let mut seen = HashSet::new();
    let mut there: Vec<String> = Vec::new();
    for entry in source.entries() {
        let name = entry.name.rsplit_once('.').map_or(&entry.name[..], |(module, _)| module);
        if seen.insert(without_numbers(name)) {
            there.extend(loading.names(name));
            there.push(name.to_owned());
            // What a class has behind its base model's prefix is found without it, too.
            there.push(format!("model.{name}"));
        }
    }
    let under = |prefix: &str| there.iter().any(|name| name == prefix || name.starts_with(prefix));
    let may_be_absent = |name: &&String| unknown::is_head(name) || loading.tied().contains(&&name[..]);
    let body = || had.iter().filter(|name| !may_be_absent(name));
    let missing: Vec<&String> = body().filter(|name| !under(name)).collect();
    if missing.len() == body().count() {
        // The language model's layers, where there are others.
        let such = missing.iter().max_by_key(|name| (name.contains("language_model"), name.contains("layer")))?;
        let from = From::Everywhere(such.trim_end_matches('.').to_owned());
        return Some(Absent { class: class.to_owned(), from });
    }
    let without = |part: &str| {
        let settings = source.config().as_object().into_iter().flatten();
        let mut unset =
            settings.filter(|(_, value)| value.is_null()).filter_map(|(key, _)| key.strip_suffix("_config"));
        unset.any(|kind| part.contains(kind))
    };
    let hides = |part: &str| packed.iter().any(|own| own.starts_with(part) || own.contains(&format!(".{part}")));
    let mut modules: Vec<String> = Vec::new();
    for name in missing {
        // Of a component that is there a setting may leave out a part: only whole ones are surely missing.
        let part = component(name);
        if !under(&part) && !without(&part) && !hides(&part) && !modules.contains(&part) {
            modules.push(part);
        }
    }
    (!modules.is_empty()).then(|| Absent { class: class.to_owned(), from: From::Parts(modules) })
}

/// Tells whether the class that config.json names has a linear of this name, or linears under what it begins with; `None` where the class is
/// not known.
pub(super) fn has_linears(config: &Value) -> Option<impl Fn(&str) -> bool> {
    let had = TABLE.get(config["architectures"].get(0)?.as_str()?)?;
    Some(|name: &str| had.iter().any(|own| name == own || own.ends_with('.') && name.starts_with(&own[..])))
}

/// What the names of the language model begin with in a class of a model that also sees, and its head's module; `None` where the class is
/// not known, or the files (whose modules are `there`, as they are and as they are loaded) have it there already.
pub(super) fn language_model(class: &str, there: &[String]) -> Option<(&'static str, &'static str)> {
    let had = TABLE.get(class)?;
    let is_language = |name: &&String| {
        ["language_model", "text_model"].iter().any(|part| name.split('.').any(|own| own == *part))
            && name.ends_with(".layers.")
    };
    let mut layers = had.iter().filter(is_language);
    let (layers, None) = (layers.next()?, layers.next()) else { return None };
    let head = had.iter().find(|name| *name == "lm_head" || name.ends_with(".lm_head"));
    let own = layers.strip_suffix("layers.")?;
    (!there.iter().any(|name| name.starts_with(own))).then(|| (own, head.map_or("lm_head", |head| &head[..])))
}

/// A name with one sign for each of its numbers.
fn without_numbers(name: &str) -> String {
    let parts = name.split('.').map(|part| if part.bytes().all(|byte| byte.is_ascii_digit()) { "#" } else { part });
    parts.collect::<Vec<_>>().join(".")
}
