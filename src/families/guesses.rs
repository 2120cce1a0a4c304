//! What is made of settings that transformers 5 fails on or does not read: one sentence for each guess.

use serde_json::{Map, Value};

use super::spelling::CLASSES;
use crate::json::{integer, shown};

/// Settings that classes let be null and compute with, and what is taken for a null where it is not the class's default.
const COMPUTED_WITH: &[(&str, Option<&str>)] = &[
    ("logit_scale", None),
    ("layer_norm_eps", None),
    ("embedding_multiplier", None),
    ("logits_scaling", None),
    ("residual_multiplier", None),
    ("attention_multiplier", None),
    ("n_group", Some("1")),
    ("topk_group", Some("1")),
];

/// Notes on the settings of a model of this class, each under its own name and without defaults.
pub(super) fn notes(class: &str, settings: &Map<String, Value>) -> Vec<String> {
    let mut notes = Vec::new();
    let said = |key: &str| settings.get(key).filter(|value| !value.is_null());
    let null = |key: &str| settings.get(key).is_some_and(Value::is_null);
    let known = &CLASSES[class];
    for (key, taken) in COMPUTED_WITH.iter().filter(|(key, _)| null(key) && known.nullable.iter().any(|n| n == key)) {
        let default = shown(&known.defaults[*key]);
        let taken = taken.unwrap_or(&default);
        notes.push(format!("config.json has null for {key}, which transformers 5 fails on: {taken} is taken"));
    }
    let types = said("layer_types").and_then(Value::as_array);
    let sliding = types.is_some_and(|types| types.iter().any(|kind| kind == "sliding_attention"));
    let switched = class.starts_with("qwen") && known.defaults.contains_key("use_sliding_window");
    let off = switched && said("use_sliding_window") != Some(&Value::Bool(true));
    if sliding && (off || null("sliding_window") && (switched || class == "exaone4")) {
        let why = if off { "use_sliding_window is not true" } else { "sliding_window is null" };
        notes.push(format!(
            "config.json has sliding_attention in layer_types though {why}, which transformers 5 fails on: no layer has a window"
        ));
    }
    match class {
        "smollm3" if said("no_rope_layers").and_then(Value::as_array).is_some_and(Vec::is_empty) => notes.push(
            "config.json has an empty no_rope_layers, which transformers 5 fails on: no_rope_layer_interval counts"
                .to_owned(),
        ),
        "exaone4" if types.is_none() => {
            let letters = said("sliding_window_pattern").filter(|pattern| pattern.is_string());
            let (what, taken) = match (null("sliding_window"), letters) {
                (true, _) => ("null for sliding_window".to_owned(), "no layer has a window"),
                (false, Some(letters)) => (
                    format!("{} for sliding_window_pattern", shown(letters)),
                    "the letters are repeated over the layers",
                ),
                (false, None) => return notes,
            };
            notes.push(format!("config.json has {what} and no layer_types, which transformers 5 fails on: {taken}"));
        }
        "deepseek_v2" | "deepseek_v3" => {
            if let Some(every) = said("moe_layer_freq").filter(|every| integer(every) != Some(1)) {
                notes.push(format!(
                    "config.json has {} for moe_layer_freq, which transformers 5 does not read for `{class}`: all layers behind the \
                     first first_k_dense_replace have experts",
                    shown(every)
                ));
            }
        }
        _ => {}
    }
    notes
}

/// A note on settings of rotary positions that name two types, of which the newer key's is taken.
pub(super) fn two_types(own: &Map<String, Value>) -> Option<String> {
    // Qwen2-VL's are written with both, and so was the first LongRoPE.
    const ALIKE: &[[&str; 2]] = &[["mrope", "default"], ["su", "longrope"]];
    let of = |key: &str| own.get(key)?.as_str();
    let (new, old) = (of("rope_type")?, of("type")?);
    let alike = new == old || ALIKE.iter().any(|pair| pair.contains(&new) && pair.contains(&old));
    (!alike).then(|| {
        format!(
            "config.json has rope_type {new} and type {old} for rotary positions, and they differ: {new} is taken, as transformers does"
        )
    })
}
