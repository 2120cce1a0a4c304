//! What becomes of layers that predict further tokens in an output.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;
use crate::dialect::architectures::Architecture;
use crate::families::{self, not_whole, uncounted, without_codes};
use crate::graph::{Block, DropRule, FURTHER, Graph};
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

/// A model as a target is to hold it, with such layers as part of it, aside, or left out, then those of the file that nobody counts, too.
pub fn asked<'g>(graph: &'g Graph, source: &Checkpoint, recipe: &Recipe) -> Cow<'g, Graph> {
    let has_names = Architecture::of_family(graph.family).is_some_and(|architecture| architecture.further.is_some());
    let whole = graph.predictors().iter().filter_map(Block::further).any(|further| further.whole);
    match (recipe.mtp, &recipe.gguf) {
        (Mtp::Drop, _) => {
            let rule = |prefix| DropRule { prefix, suffix: "", reason: FURTHER };
            let mut other = graph.dropping_further();
            other.dropped.extend(uncounted(graph, source).into_iter().map(rule));
            Cow::Owned(other)
        }
        // Kept are they there in types of a file's own.
        (_, Some(_)) => graph.predicting_further(has_names),
        (Mtp::Keep, None) => graph.predicting_further(false),
        // No class of mlx-lm has such layers: they are left out where a file is loaded.
        (Mtp::Quantize, None) => graph.predicting_further(recipe.format != "mlx" && !whole),
    }
}

/// What to say of such layers of a model as [`asked`] for, where they are there and not quantized.
pub fn told(graph: &Graph, source: &Checkpoint, recipe: &Recipe) -> Vec<String> {
    let there = |prefix: &&str| source.entries().iter().any(|entry| entry.name.starts_with(prefix));
    let say = |prefixes: Vec<&str>, what: &str| {
        let names: Vec<&str> = prefixes.into_iter().filter(there).map(|prefix| prefix.trim_end_matches('.')).collect();
        (!names.is_empty()).then(|| format!("layers that predict further tokens are {what}: {}", listed(&names)))
    };
    // Of a family that is not known everything but linears is kept, and these too.
    let found = if graph.opaque { uncounted(graph, source) } else { Vec::new() };
    let aside = graph.aside.iter().filter(|(_, what)| what.starts_with(FURTHER)).map(|(prefix, _)| &**prefix);
    let aside = aside.chain(found.iter().map(|prefix| &**prefix));
    let dropped = graph.dropped.iter().filter(|rule| rule.reason == FURTHER).map(|rule| &*rule.prefix);
    let own = graph.of_predictors();
    let kept = own.iter().filter(|_| recipe.mtp == Mtp::Keep).map(|prefix| &**prefix);
    let counted = if recipe.gguf.is_none() { "left out, and counted no longer in config.json" } else { "left out" };
    let of_aside = match recipe.gguf {
        Some(_) => "left out, since llama.cpp has no place for them here or some of their tensors are missing",
        None => "kept as they are",
    };
    let said = [
        say(aside.clone().collect(), of_aside),
        say(dropped.collect(), counted),
        say(kept.collect(), "kept as they are"),
        // How others call theirs is not known.
        missing(graph, source, own.iter().map(|prefix| &**prefix).chain(aside).filter(there))
            .filter(|_| recipe.gguf.is_none() && recipe.mtp != Mtp::Drop && !graph.opaque),
    ];
    let lacking = if recipe.mtp == Mtp::Drop { Vec::new() } else { not_whole(graph) };
    said.into_iter().flatten().chain(lacking).collect()
}

/// What to say where config.json counts more such layers than are there, whose names begin so.
fn missing<'p>(graph: &Graph, source: &Checkpoint, there: impl Iterator<Item = &'p str>) -> Option<String> {
    let settings = [Some(source.config()), source.config().get("text_config")];
    let counts = settings
        .into_iter()
        .flatten()
        .flat_map(|settings| COUNTS.iter().filter_map(|key| Some((*key, settings.get(*key)?.as_u64()?))));
    let (key, count) = counts.max_by_key(|(_, count)| *count)?;
    let there: Vec<&str> = there.collect();
    // What is not numbered may be several, and is known where it was looked through.
    let numbered = |prefix: &&str| prefix.trim_end_matches('.').ends_with(|c: char| c.is_ascii_digit());
    let all = there.iter().all(numbered);
    let held = if all { there.len() } else { graph.held.count };
    let known = all || held > 0;
    (known && count > held as u64).then(|| {
        let held = match held {
            0 => "none".to_owned(),
            held => format!("{held} of them"),
        };
        format!(
            "config.json counts {count} layers that predict further tokens ({key}), and the checkpoint holds {held}: a runtime that is asked to draft \
             with them will not find them; take the files of the whole model, or --mtp drop, which counts none"
        )
    })
}

/// Says in config.json that such layers have no codes, where runtimes look for that.
pub fn tell_plain(config: &mut Map<String, Value>, family: &str, recipe: &Recipe) {
    let Some(name) = without_codes(family).filter(|_| recipe.mtp != Mtp::Drop) else { return };
    let modules = config.entry("disable_quant_module").or_insert_with(|| Value::Array(Vec::new()));
    if let Some(modules) = modules.as_array_mut().filter(|modules| !modules.iter().any(|module| module == name)) {
        modules.push(name.into());
    }
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
