//! What becomes of layers that predict further tokens in an output.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;
use crate::dialect::architectures::Architecture;
use crate::families;
use crate::graph::{FURTHER, Graph};
use crate::recipe::{Mtp, Recipe};
use crate::words::listed;

/// What configurations call the number of such layers.
const COUNTS: &[&str] = &["num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules"];

/// Lists of configurations that tell of each layer, of such layers too.
const LISTS: &[&str] = &[
    "layer_types",
    "mlp_layer_types",
    "swiglu_limits",
    "swiglu_limits_shared",
    "rope_theta",
    "partial_rotary_factors",
    "use_rope_layers",
];

/// A model as a target is to hold it, with such layers as part of it, aside, or left out.
pub fn asked<'g>(graph: &'g Graph, recipe: &Recipe) -> Cow<'g, Graph> {
    let has_names = Architecture::of_family(graph.family).is_some_and(|architecture| architecture.further.is_some());
    match (recipe.mtp, &recipe.gguf) {
        (Mtp::Drop, _) => Cow::Owned(graph.dropping_further()),
        // Kept are they there in types of a file's own.
        (_, Some(_)) => graph.predicting_further(has_names),
        (Mtp::Keep, None) => graph.predicting_further(false),
        // No class of mlx-lm has such layers: they are left out where a file is loaded.
        (Mtp::Quantize, None) => graph.predicting_further(recipe.format != "mlx"),
    }
}

/// What to say of such layers of a model as [`asked`] for, where they are there and not quantized.
pub fn told(graph: &Graph, source: &Checkpoint, recipe: &Recipe) -> Vec<String> {
    let there = |prefix: &&str| source.entries().iter().any(|entry| entry.name.starts_with(prefix));
    let say = |prefixes: Vec<&str>, what: &str| {
        let names: Vec<&str> = prefixes.into_iter().filter(there).map(|prefix| prefix.trim_end_matches('.')).collect();
        (!names.is_empty()).then(|| format!("layers that predict further tokens are {what}: {}", listed(&names)))
    };
    let aside = graph.aside.iter().filter(|(_, what)| what.starts_with(FURTHER)).map(|(prefix, _)| &**prefix);
    let dropped = graph.dropped.iter().filter(|rule| rule.reason == FURTHER).map(|rule| &*rule.prefix);
    let own = graph.of_predictors();
    let kept = own.iter().filter(|_| recipe.mtp == Mtp::Keep).map(|prefix| &**prefix);
    let counted = if recipe.gguf.is_none() { "left out, and counted no longer in config.json" } else { "left out" };
    let of_aside = match recipe.gguf {
        Some(_) => "left out, since llama.cpp has no place for them here or some of their tensors are missing",
        None => "kept as they are",
    };
    let said =
        [say(aside.collect(), of_aside), say(dropped.collect(), counted), say(kept.collect(), "kept as they are")];
    said.into_iter().flatten().collect()
}

/// Takes back in config.json that there are such layers, where they are left out.
pub fn uncount(config: &mut Map<String, Value>, recipe: &Recipe) {
    if recipe.mtp != Mtp::Drop {
        return;
    }
    let layers = config.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0) as usize;
    for key in COUNTS {
        let Some(count) = config.get_mut(*key).filter(|count| count.is_number()) else { continue };
        let further = std::mem::replace(count, 0.into()).as_u64().unwrap_or(0) as usize;
        for list in LISTS {
            let list = config.get_mut(*list).and_then(Value::as_array_mut);
            list.filter(|list| list.len() == layers + further).into_iter().for_each(|list| list.truncate(layers));
        }
    }
    for key in families::TEXT_PARTS {
        if let Some(Value::Object(text)) = config.get_mut(key) {
            uncount(text, recipe);
        }
    }
}
