//! Whether the files of a model of an unknown family hold all of it, as far as its layers tell of one another and config.json counts them.
//!
//! What no family would have is refused, and what one may have of its own is told.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::unknown::{block, is_head};
use super::{text_settings, vocabulary};
use crate::error::{Error, Result};
use crate::graph::{BESIDE, Graph};
use crate::json::integer;
use crate::weights::{Entry, Weights};
use crate::words::listed;

/// Settings that count layers.
const COUNTS: &[&str] = &["num_hidden_layers", "n_layer", "n_layers", "num_layers"];

/// Parts of the names of settings by which layers differ or share weights: where they are set, nothing tells what is missing.
const OWN_WAYS: &[&str] = &[
    "group",
    "shar",
    "skip",
    "block_configs",
    "hybrid",
    "pattern",
    "loop",
    "stages",
    "layers_block_type",
    "period",
    "offset",
    "interval",
    "prun",
];

/// Layers of one list, by their numbers: what each of them has, by the name behind the number.
type Layers<'e> = BTreeMap<usize, BTreeMap<&'e str, &'e Entry>>;

/// What to say of what is probably missing. Fails where something surely is: a layer amid the others, a weight whose bias is there, a matrix
/// that lies the other way round than in all other layers, and the embedding of a model that says tokens.
pub fn check(source: &dyn Weights) -> Result<Vec<String>> {
    let lists = lists(source);
    let mut notes = Vec::new();
    for (list, layers) in &lists {
        if let Some(why) = gap(source.config(), list, layers).or_else(|| odd(list, layers)) {
            return Err(Error::failed(format!("{}: {why}; download the weights again", source.path().display())));
        }
        if !has_own_ways(source.config()) {
            notes.extend(lacking(list, layers, false));
        }
    }
    match without_embedding(source) {
        Some((why, true)) => {
            return Err(Error::failed(format!("{}: {why}; download the weights again", source.path().display())));
        }
        Some((why, false)) => notes.push(why),
        None => {}
    }
    notes.extend(fewer(source.config(), &lists));
    Ok(notes)
}

/// What to say of what is probably missing of what sees or hears beside the language model of a known family, as far as its layers tell of
/// one another and config.json counts them.
pub fn check_beside(graph: &Graph, source: &dyn Weights) -> Vec<String> {
    let parts = graph.aside.iter().filter(|(prefix, what)| *what == BESIDE && !prefix.is_empty());
    let parts: Vec<&str> = parts.map(|(prefix, _)| &**prefix).collect();
    let lists: Vec<(&str, Layers<'_>)> =
        lists(source).into_iter().filter(|(list, _)| parts.iter().any(|part| list.starts_with(part))).collect();
    let missing = |(list, layers): &(&str, Layers<'_>)| {
        let odd = odd(list, layers).map(|why| format!("{why}; download the weights again"));
        odd.into_iter().chain(lacking(list, layers, true))
    };
    let mut notes: Vec<String> = lists.iter().flat_map(missing).collect();
    for (part, words) in PARTS {
        let own = lists.iter().filter(|(list, _)| words.iter().any(|word| list.contains(word)));
        // Of several lists the longest holds its layers.
        let longest = own.max_by_key(|(_, layers)| layers.len());
        notes.extend(longest.and_then(|(list, layers)| cut(source.config(), part, list, layers)));
    }
    notes
}

/// What to say of tensors beside the language model whose shape does not go with that of others: a bias that has not as many values as its weight
/// has rows, and a tensor of one layer that has another shape than in all others.
pub fn misshapen_beside(graph: &Graph, source: &dyn Weights) -> Vec<String> {
    let beside = |name: &str| {
        let of = |(part, what): &(String, &str)| *what == BESIDE && !part.is_empty() && name.starts_with(&part[..]);
        graph.aside.iter().any(of)
    };
    let mut told = BTreeMap::new();
    for bias in source.entries().iter().filter(|entry| beside(&entry.name)) {
        let weight = bias.name.strip_suffix(".bias").and_then(|module| source.entry(&format!("{module}.weight")));
        let Some((weight, [values])) = weight.zip(bias.shape.first_chunk::<1>()) else { continue };
        // Some convolutions have their inputs first.
        if bias.shape.len() == 1 && !weight.shape.is_empty() && !weight.shape.iter().take(2).any(|rows| rows == values)
        {
            let why =
                format!("`{}` has {values} values, and `{}` the shape {:?}", bias.name, weight.name, weight.shape);
            told.insert(&bias.name, why);
        }
    }
    for layers in lists(source).into_iter().filter(|(list, _)| beside(&format!("{list}."))).map(|(_, layers)| layers) {
        let tails: BTreeSet<&str> = layers.values().flat_map(|tails| tails.keys().copied()).collect();
        for tail in tails.into_iter().filter(|tail| tail.ends_with(".weight") || tail.ends_with(".bias")) {
            let mut all = layers.values().filter_map(|tails| tails.get(tail));
            // The first may be given something else.
            let (Some(first), true) = (all.next(), layers.len() > 2) else { continue };
            let mut others = all.filter(|entry| entry.shape != first.shape);
            if let (Some(other), None) = (others.next(), others.next()) {
                told.entry(&other.name).or_insert_with(|| {
                    format!("`{}` has the shape {:?} in place of {:?}", other.name, other.shape, first.shape)
                });
            }
        }
    }
    told.into_values().collect()
}

/// Parts of config.json that count layers of their own, and what the names of such layers have in them.
const PARTS: &[(&str, &[&str])] = &[("vision_config", &["vision", "visual"]), ("audio_config", &["audio"])];

/// What counts the layers of a part.
const COUNTS_OF_A_PART: &[&str] = &["num_hidden_layers", "depth", "encoder_layers", "vt_num_hidden_layers"];

/// Fewer layers than a part of config.json counts, where all of them are alike.
fn cut(config: &Value, part: &str, list: &str, layers: &Layers<'_>) -> Option<String> {
    let (key, count) = COUNTS_OF_A_PART.iter().find_map(|key| Some((*key, integer(&config[part][*key])?)))?;
    // What a projector is given may be made by an earlier layer than the last.
    let unused = integer(&config["vision_feature_layer"]).filter(|last| *last < 0).map_or(0, |last| -1 - last);
    let last = *layers.keys().next_back()?;
    let missing = (layers.len() as i64) < count - unused && last + 1 == layers.len() && alike(layers);
    missing.then(|| {
        format!(
            "config.json counts {count} layers ({part}.{key}), and the files have {} (`{list}.{last}` is the last): transformers makes up the \
             others at random; download the weights again",
            layers.len()
        )
    })
}

/// The lists of layers: what is numbered, and holds more than one module under each number.
fn lists(source: &dyn Weights) -> BTreeMap<&str, Layers<'_>> {
    let mut lists: BTreeMap<&str, Layers<'_>> = BTreeMap::new();
    for entry in source.entries() {
        let Some(block) = block(&entry.name) else { continue };
        let (list, number) = block.rsplit_once('.').expect("it ends in a number");
        let (Ok(number), Some(tail)) = (number.parse(), entry.name[block.len()..].strip_prefix('.')) else { continue };
        lists.entry(list).or_default().entry(number).or_default().insert(tail, entry);
    }
    let is_layer = |tails: &BTreeMap<&str, &Entry>| {
        let modules: BTreeSet<&str> = tails.keys().filter_map(|tail| Some(tail.rsplit_once('.')?.0)).collect();
        modules.len() > 1 && tails.values().any(|entry| entry.shape.len() == 2)
    };
    lists.retain(|_, layers| layers.len() > 1 && layers.values().all(is_layer));
    lists
}

/// Settings that count the layers of parts, beside which the others mean only one of them.
const COUNTS_OF_PARTS: &[&str] = &["encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"];

/// How many layers config.json counts, and under which key.
fn counted(config: &Value) -> Option<(&'static str, usize)> {
    let text = text_settings(config);
    if COUNTS_OF_PARTS.iter().any(|key| text.get(*key).is_some()) {
        return None;
    }
    COUNTS.iter().find_map(|key| Some((*key, usize::try_from(integer(text.get(*key)?)?).ok()?)))
}

/// Whether config.json has settings by which layers may differ or share what they have.
fn has_own_ways(config: &Value) -> bool {
    let set = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::String(_) => true,
        other => integer(other).is_none_or(|number| number > 1),
    };
    let uneven = |value: &Value| value.as_array().is_some_and(|list| list.windows(2).any(|pair| pair[0] != pair[1]));
    let named = |key: &str| OWN_WAYS.iter().any(|part| key.contains(part)) && key != "share_embedding";
    let mut settings = text_settings(config).as_object().into_iter().flatten();
    // A list with an entry for each layer.
    let layers = counted(config).map(|(_, layers)| layers);
    settings.any(|(key, value)| named(key) && set(value) || uneven(value) && value.as_array().map(Vec::len) == layers)
}

/// A layer that is missing amid the others, where config.json counts it.
fn gap(config: &Value, list: &str, layers: &Layers<'_>) -> Option<String> {
    let (key, count) = counted(config)?;
    let last = *layers.keys().next_back()?;
    let missing = (0..=last).find(|number| !layers.contains_key(number))?;
    let whole = last + 1 == count && layers.len() * 2 > count && alike(layers);
    (whole && !has_own_ways(config)).then(|| {
        format!("all tensors of `{list}.{missing}` are missing: config.json counts {count} layers ({key}), and the others are there")
    })
}

/// Whether all layers have tensors of the same names.
fn alike(layers: &Layers<'_>) -> bool {
    let mut names = layers.values().map(|tails| tails.keys().collect::<Vec<_>>());
    let first = names.next();
    names.all(|other| Some(&other) == first.as_ref())
}

/// A weight that is missing beside its bias, where other layers have both; a matrix with its extents the other way round than in all others.
fn odd(list: &str, layers: &Layers<'_>) -> Option<String> {
    for (number, tails) in layers {
        let others = |tail: &str| -> Vec<&[usize]> {
            let others = layers.iter().filter(|(other, _)| *other != number);
            others.filter_map(|(_, tails)| Some(&tails.get(tail)?.shape[..])).collect()
        };
        for (tail, entry) in tails {
            let name = &entry.name;
            if let Some(module) = tail.strip_suffix(".bias") {
                let weight = format!("{module}.weight");
                if !tails.contains_key(&weight[..]) && others(&weight).iter().any(|shape| shape.len() == 2) {
                    return Some(format!(
                        "tensor `{list}.{number}.{weight}` is missing: its bias is there, and other layers have both"
                    ));
                }
            }
            let [rows, columns] = entry.shape[..] else { continue };
            // Of many experts nearly all are as those of the first layer.
            if rows == columns
                || layers.values().next().and_then(|first| first.get(tail)).is_some_and(|e| e.shape == entry.shape)
                    && Some(number) != layers.keys().next()
            {
                continue;
            }
            let others = others(tail);
            let turned = others.len() > 1 && others.len() + 1 == layers.len();
            if turned && others.iter().all(|shape| *shape == [columns, rows]) {
                return Some(format!(
                    "tensor `{name}` has shape {:?}, and those of all other layers {:?}: it lies the other way round",
                    entry.shape, others[0]
                ));
            }
        }
    }
    None
}

/// Matrices that one layer lacks and all others have, where layers have nothing else in their own way; `all` other tensors, too, but for those
/// that the first layer may do without.
fn lacking(list: &str, layers: &Layers<'_>, all: bool) -> Option<String> {
    if layers.len() < 3 {
        return None;
    }
    let first = layers.keys().next();
    let numbered = |tail: &str| tail.split('.').any(|part| part.parse::<usize>().is_ok());
    let tails: BTreeSet<&str> = layers.values().flat_map(|tails| tails.keys().copied()).collect();
    let mut missing: Vec<String> = Vec::new();
    for tail in tails.into_iter().filter(|tail| !numbered(tail) && (all || tail.ends_with(".weight"))) {
        let mut without = layers.iter().filter(|(_, tails)| !tails.contains_key(tail));
        let (Some((number, own)), None) = (without.next(), without.next()) else { continue };
        let with: Vec<&BTreeMap<&str, &Entry>> = layers.values().filter(|tails| tails.contains_key(tail)).collect();
        // A layer of another kind has tensors of its own, or others in other shapes; another layer may lack something else.
        let same = |key: &str, shape: &[usize]| {
            let found: Vec<&[usize]> = with.iter().filter_map(|tails| Some(&tails.get(key)?.shape[..])).collect();
            found.len() * 2 >= with.len() && found.iter().all(|other| *other == shape)
        };
        let matrix = with[0][tail].shape.len() == 2;
        let counts = (matrix || all && Some(number) != first) && same(tail, &with[0][tail].shape);
        if counts && own.iter().all(|(key, entry)| same(key, &entry.shape)) {
            missing.push(format!("{list}.{number}.{tail}"));
        }
    }
    let names: Vec<&str> = missing.iter().map(String::as_str).collect();
    (!names.is_empty()).then(|| {
        format!(
            "{} {} missing, which all other layers have: unless the family has it so, download the weights again",
            listed(&names),
            if names.len() == 1 { "is" } else { "are" }
        )
    })
}

/// Fewer layers than config.json counts, in a model that has one list of them.
fn fewer(config: &Value, lists: &BTreeMap<&str, Layers<'_>>) -> Option<String> {
    let (key, count) = counted(config)?;
    let mut lists = lists.iter();
    let (Some((list, layers)), None) = (lists.next(), lists.next()) else { return None };
    let last = *layers.keys().next_back()?;
    // Some families count halves of layers, or layers of several kinds.
    let counts = |(key, value): (&String, &Value)| key.contains("layer") && integer(value) == Some(layers.len() as i64);
    let so_counted = text_settings(config).as_object().into_iter().flatten().any(counts);
    let missing = last + 1 < count && last + 1 == layers.len() && alike(layers) && !so_counted;
    (missing && !has_own_ways(config)).then(|| {
        format!(
            "config.json counts {count} layers ({key}), and the files have {} (`{list}.{last}` is the last): unless layers share their weights in \
             this family, transformers makes up the others at random; download the weights again",
            layers.len()
        )
    })
}

/// What to say of a model that says tokens and has no embedding of them, and whether that is sure.
fn without_embedding(source: &dyn Weights) -> Option<(String, bool)> {
    let config = source.config();
    let class = config["architectures"].get(0)?.as_str()?;
    let says = ["ForCausalLM", "LMHeadModel"].iter().any(|end| class.ends_with(end));
    let rows = vocabulary(config).ok()?.filter(|rows| *rows > 1)?;
    let tied = super::tied(config).unwrap_or(true);
    // Padded ones have more rows. A head is as large, and is the embedding where both are one.
    let may_be = |entry: &Entry| {
        let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
        entry.shape.len() == 2 && entry.shape.iter().any(|extent| *extent >= rows) && (tied || !is_head(module))
            || module.rsplit('.').next().is_some_and(|last| last.contains("embed_tokens") || last == "wte")
    };
    if !says || source.entries().iter().any(may_be) {
        return None;
    }
    let why = format!("no tensor has the {rows} rows of the embedding that vocab_size says, which {class} begins with");
    Some((why, config.get("auto_map").is_none()))
}
