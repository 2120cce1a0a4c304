//! What llama.cpp computes whatever a model's files say, and what it asks for: a file for images is written only of what is so.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use formats::container::gguf::MetadataValue;
use serde_json::Value;

use super::{Kind, Metadata, Projector, Rule, Said, flag};
use crate::json::real;

/// A setting that llama.cpp takes for something, as a path into config.json, and for what.
pub(super) type Computed = (&'static str, Is);

/// What llama.cpp takes a setting for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Is {
    /// GELU, of which it has one approximation for all of them.
    Gelu,
    /// The approximation by a sigmoid.
    QuickGelu,
    /// SiLU, which configurations also call swish.
    Silu,
    /// GELU or SiLU, of which a file says the one; this where config.json says nothing.
    Said(&'static str),
    /// This number, which stands in its source.
    Number(f64),
}

/// Words for GELU and its approximations by tanh.
const GELU: &[&str] = &["gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python", "gelu_accurate"];
const SILU: &[&str] = &["silu", "swish"];

impl Is {
    /// What it is, to be read.
    fn told(self) -> String {
        match self {
            Is::Gelu => "gelu".to_owned(),
            Is::QuickGelu => "quick_gelu".to_owned(),
            Is::Silu => "silu".to_owned(),
            Is::Said(_) => "gelu and silu".to_owned(),
            Is::Number(number) => number.to_string(),
        }
    }
}

/// Fails for the first setting that is not what llama.cpp computes, and says in the file which activation it is where it asks.
pub(super) fn check(kind: &Kind, config: &Value, out: &mut Metadata) -> Result<(), String> {
    for (path, is) in kind.computes {
        let found = config.pointer(path).unwrap_or(&Value::Null);
        let among = |words: &[&str]| found.as_str().is_some_and(|word| words.contains(&word));
        let same = match is {
            // Transformers' class has the same then.
            _ if found.is_null() => true,
            Is::Gelu => among(GELU),
            Is::QuickGelu => among(&["quick_gelu"]),
            Is::Silu => among(SILU),
            Is::Said(_) => among(GELU) || among(SILU),
            Is::Number(number) => real(found) == Some(*number),
        };
        if !same {
            let named = path.trim_start_matches('/').replace('/', ".");
            let found = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
            return Err(format!("config.json has {named} {found}, and llama.cpp computes {} alone there", is.told()));
        }
        if let Is::Said(usual) = is {
            flag(out, if SILU.contains(&found.as_str().unwrap_or(usual)) { "use_silu" } else { "use_gelu" });
        }
    }
    Ok(())
}

/// What of a module is asked for, by llama.cpp or by transformers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Need {
    /// Nothing: models have it or not.
    Nothing,
    /// The tensor of this name.
    Itself,
    /// Its weight, and no bias: models have that or not.
    Weight,
    /// Its weight and its bias.
    Both,
}

impl Need {
    /// The tensors that are asked for, of a module or a tensor of this name.
    fn of(self, from: &str) -> Vec<String> {
        let parts: &[&str] = match self {
            Need::Nothing => return Vec::new(),
            Need::Weight | Need::Both if from.ends_with(".weight") || from.ends_with(".bias") => &[""],
            Need::Itself => &[""],
            Need::Weight => &[".weight"],
            Need::Both => &[".weight", ".bias"],
        };
        parts.iter().map(|part| format!("{from}{part}")).collect()
    }
}

/// Tensors that llama.cpp or transformers ask for and the checkpoint lacks, by the names that they would have there.
pub(super) fn missing(kind: &Kind, said: &Said<'_>, found: &Projector) -> Vec<String> {
    let there: HashSet<&str> = found.tensors.iter().map(|tensor| &tensor.gguf[..]).collect();
    let counted = |sense: &str| {
        let key = format!("clip.{sense}.block_count");
        found.metadata.iter().find_map(|(name, value)| match value {
            MetadataValue::U32(count) if *name == key => Some(*count as usize),
            _ => None,
        })
    };
    let [sees, hears] = ["vision", "audio"].map(counted);
    // Names differ by how a checkpoint was saved: one of those that become a tensor of the file is enough.
    let mut needed: BTreeMap<String, String> = BTreeMap::new();
    for rule in kind.rules.iter().copied().flatten() {
        let blocks = if rule.to.starts_with("a.") || rule.to.starts_with("mm.a.") { hears } else { sees };
        let Some(blocks) = blocks else { continue };
        for number in 0..rule.numbers(said, blocks) {
            for name in rule.need.of(&rule.from.replace("{}", &number.to_string())) {
                if let Some(gguf) = rule.called(&name, said) {
                    needed.entry(gguf).or_insert(name);
                }
            }
        }
    }
    let before = if found.tensors.iter().any(|tensor| tensor.from.starts_with("model.")) { "model." } else { "" };
    let lacks = needed.into_iter().filter(|(gguf, _)| !there.contains(&gguf[..]));
    let mut missing: BTreeSet<String> = lacks.map(|(_, name)| format!("{before}{name}")).collect();
    missing.extend(uneven(found));
    missing.into_iter().collect()
}

/// Tensors that some blocks have and others lack, whichever is right.
fn uneven(found: &Projector) -> Vec<String> {
    let mut tails: BTreeMap<(&str, &str), BTreeMap<usize, &str>> = BTreeMap::new();
    for tensor in &found.tensors {
        let parts = tensor.gguf.split_once(".blk.").and_then(|(sense, rest)| Some((sense, rest.split_once('.')?)));
        let Some((sense, (number, tail))) = parts else { continue };
        let Ok(number) = number.parse() else { continue };
        // Blocks within stages are of several kinds.
        if tail.starts_with(|first: char| first.is_ascii_digit()) {
            continue;
        }
        tails.entry((sense, tail)).or_default().insert(number, &tensor.from);
    }
    let blocks = |sense: &str| -> BTreeSet<usize> {
        tails.iter().filter(|((of, _), _)| *of == sense).flat_map(|(_, numbers)| numbers.keys().copied()).collect()
    };
    let mut missing = Vec::new();
    for ((sense, _), numbers) in &tails {
        let (one, from) = numbers.first_key_value().expect("it is of a tensor");
        let without = blocks(sense).into_iter().filter(|number| !numbers.contains_key(number));
        // The number of the block is the last of the parts that are that number.
        let named = |number: usize| {
            let (before, after) = from.split_once(&format!(".{one}."))?;
            Some(format!("{before}.{number}.{after}"))
        };
        missing.extend(without.filter_map(named));
    }
    missing
}

impl Rule {
    /// How many numbers its `{}` stands for, in a tower of so many blocks; 1 where there is none, and 0 where it is not known.
    fn numbers(&self, said: &Said<'_>, blocks: usize) -> usize {
        match self.to.split_once('{').and_then(|(_, rest)| rest.split_once('}')) {
            None => 1,
            Some((key, _)) if !key.is_empty() => said.list(key).len(),
            Some(_) if self.to.contains(".blk.") => blocks,
            Some(_) => 0,
        }
    }
}
