//! config.json for a reader that has defaults of its own, and knows rotary positions by the older keys alone: mlx-lm.

use serde_json::{Map, Value, json};

use super::rope::{self, all_near, near, warmth};
use super::{is_known, settings, text_part};
use crate::json::{integer, real};

/// The same settings with nothing left to defaults, and what is said of rotary positions in the older keys too. Nothing is said that
/// would change what those take from it who read as transformers does.
pub fn spelt_out(config: &Value) -> Value {
    let part = text_part(config);
    let mut told = Told { config: config.clone(), inner: part.inner, known: is_known(config) };
    let Ok(settings) = settings(config) else { return told.config };
    for key in &settings.left_out {
        told.say(key, settings.values[key].clone());
    }
    told.say("tie_word_embeddings", settings.values["tie_word_embeddings"].clone());
    // A setting that transformers calls otherwise now.
    if part.model_type == "qwen3_moe" {
        told.say("num_experts", settings.values["num_local_experts"].clone());
    }
    // The size of the embedding is looked for outside there.
    if part.wrapper.is_some_and(|wrapper| wrapper.model_type == "gemma3") && told.config.get("vocab_size").is_none() {
        told.config["vocab_size"] = settings.values["vocab_size"].clone();
    }
    let [hidden, heads] = ["hidden_size", "num_attention_heads"].map(|key| integer(&settings.values[key]).unwrap_or(0));
    let asked = ["cohere2", "ernie4_5", "ernie4_5_moe", "exaone4", "glm4_moe", "llama4_text", "qwen3_moe"];
    if asked.contains(&&part.model_type[..])
        && heads > 0
        && hidden % heads == 0
        && settings.values.get("head_dim").is_none_or(Value::is_null)
    {
        told.part().insert("head_dim".to_owned(), (hidden / heads).into());
    }
    told.pattern(&part.model_type, &settings.values);
    let Some(rotary) = settings.values["rope_parameters"].as_object() else { return told.config };
    let of = |kind: &str| rotary.get(kind).and_then(Value::as_object);
    let far = of("full_attention").unwrap_or(rotary);
    let number = |of: &Map<String, Value>, key: &str| of.get(key).cloned().unwrap_or_default();
    let (theta, partial) = (number(far, "rope_theta"), number(far, "partial_rotary_factor"));
    if !told.say("rope_theta", theta.clone()) {
        told.say("rotary_emb_base", theta);
    }
    if !told.say("partial_rotary_factor", partial.clone()) {
        told.say("rotary_pct", partial);
    }
    if let Some(near) = of("sliding_attention") {
        told.say("rope_local_base_freq", number(near, "rope_theta"));
    }
    let mut scaling = far.clone();
    scaling.retain(|key, value| !["rope_theta", "partial_rotary_factor"].contains(&&key[..]) && !value.is_null());
    match scaling.get("rope_type").and_then(Value::as_str) {
        Some(kind) if kind != "default" => {
            let kind = kind.to_owned();
            if part.model_type == "phi3" {
                told.say("original_max_position_embeddings", number(far, "original_max_position_embeddings"));
            }
            // Some classes know its older name alone, and some ask for a number with a point.
            scaling.entry("type").or_insert_with(|| kind.clone().into());
            if let Some(factor) = scaling.get("factor").and_then(real) {
                scaling.insert("factor".to_owned(), factor.into());
            }
            if kind == "yarn" {
                warm(&mut scaling, far, &settings.values);
            }
            told.scaling(scaling);
        }
        // For some models it has to be there.
        _ => drop(told.part().entry("rope_scaling").or_insert(Value::Null)),
    }
    told.config
}

/// Says YaRN's factors in the words that are read: `attention_factor` is not, and `mscale` is, whatever stands beside it.
fn warm(scaling: &mut Map<String, Value>, far: &Map<String, Value>, settings: &Value) {
    let context = settings["max_position_embeddings"].clone();
    let original = scaling.get("original_max_position_embeddings").and_then(integer);
    if let (None, Some(context), Some(original @ 1..)) = (scaling.get("factor"), integer(&context), original) {
        scaling.insert("factor".to_owned(), (context as f64 / original as f64).into());
    }
    let Ok(rope) = rope::of(&far.clone().into(), &context, 64) else { return };
    let number = |key: &str, usual: f64| scaling.get(key).and_then(real).unwrap_or(usual);
    let (factor, all) = (number("factor", 1.0), number("mscale_all_dim", 0.0));
    let taken = warmth(factor, number("mscale", 1.0)) / warmth(factor, all);
    let meant = f64::from(rope.magnitude);
    if factor > 1.0 && (taken / meant - 1.0).abs() > 1e-6 {
        let mscale = (meant * warmth(factor, all) - 1.0) / (0.1 * factor.ln());
        scaling.insert("mscale".to_owned(), mscale.into());
    }
}

struct Told {
    config: Value,
    /// Whether the language model's settings are in `text_config`.
    inner: bool,
    /// Whether the family is known, so that what is taken from settings can be compared.
    known: bool,
}

impl Told {
    fn part(&mut self) -> &mut Map<String, Value> {
        let key = super::text_key(&self.config);
        let part = if self.inner { &mut self.config[key] } else { &mut self.config };
        part.as_object_mut().expect("settings")
    }

    /// Says it where nothing is said yet, and nobody would take something else from it. Returns whether it is said now.
    fn say(&mut self, key: &str, value: Value) -> bool {
        if self.part().get(key).is_some_and(|said| !said.is_null()) || value.is_null() {
            return !value.is_null();
        }
        let before = self.config.clone();
        self.part().insert(key.to_owned(), value);
        let same = !self.known || taken_alike(&before, &self.config);
        if !same {
            self.config = before;
        }
        same
    }

    /// Says how positions are stretched, in `rope_parameters` too where these are there.
    fn scaling(&mut self, scaling: Map<String, Value>) {
        let before = self.config.clone();
        if let Some(Value::Object(own)) = self.part().get_mut("rope_parameters") {
            let own = match own.get_mut("full_attention") {
                Some(Value::Object(far)) => far,
                _ => own,
            };
            for key in ["factor", "mscale"] {
                scaling.get(key).into_iter().for_each(|value| drop(own.insert(key.to_owned(), value.clone())));
            }
        }
        self.part().insert("rope_scaling".to_owned(), scaling.into());
        if self.known && !taken_alike(&before, &self.config) {
            self.config = before;
        }
    }

    /// Which layers see a window only, as a number or as letters: some classes know no list.
    fn pattern(&mut self, model_type: &str, settings: &Value) {
        let Some(list) = settings["layer_types"].as_array().filter(|list| !list.is_empty()) else { return };
        let local: Vec<bool> = list.iter().map(|kind| *kind == "sliding_attention").collect();
        let said = self.part().get("sliding_window_pattern").cloned().unwrap_or_default();
        let fits = |every: usize| local.iter().enumerate().all(|(at, local)| *local != (at + 1).is_multiple_of(every));
        match model_type {
            "gemma3_text" | "cohere2" if said.is_null() => {
                let usual = if model_type == "cohere2" { 4 } else { 6 };
                let every = (1..=local.len()).chain([usual]).find(|every| fits(*every));
                every.into_iter().for_each(|every| {
                    self.part().insert("sliding_window_pattern".to_owned(), every.into());
                });
            }
            "exaone4" if !said.is_string() => {
                let windowed = local.contains(&true) && !settings["sliding_window"].is_null();
                let letters: String = local.iter().map(|local| if *local { 'L' } else { 'G' }).collect();
                let pattern = if windowed { letters.into() } else { json!(null) };
                self.part().insert("sliding_window_pattern".to_owned(), pattern);
            }
            _ => {}
        }
    }
}

/// Whether the same is taken from two configurations, with the same notes.
fn taken_alike(a: &Value, b: &Value) -> bool {
    let (Ok(mut a), Ok(mut b)) = (settings(a), settings(b)) else { return false };
    let (one, other) = (a.values["rope_parameters"].take(), b.values["rope_parameters"].take());
    let context = a.values["max_position_embeddings"].clone();
    a.notes == b.notes && a.values == b.values && (one == other || turn_alike(&one, &other, &context))
}

/// Whether positions are rotated alike, for all layers or for each kind of them.
fn turn_alike(a: &Value, b: &Value, context: &Value) -> bool {
    let kinds = ["full_attention", "sliding_attention"];
    if kinds.iter().any(|kind| a.get(*kind).is_some()) {
        return kinds.iter().all(|kind| turn_alike(&a[*kind], &b[*kind], context));
    }
    if a == b {
        return true;
    }
    // As many pairs as it has factors for.
    let pairs = a["long_factor"].as_array().map_or(32, Vec::len);
    let of = |parameters: &Value| {
        let mut whole = parameters.clone();
        whole["partial_rotary_factor"] = json!(1.0);
        rope::of(&whole, context, 2 * pairs).ok()
    };
    let (Some(one), Some(other)) = (of(a), of(b)) else { return false };
    ["partial_rotary_factor", "llama_4_scaling_beta", "alpha"].iter().all(|key| a.get(*key) == b.get(*key))
        && near(one.magnitude, other.magnitude)
        && one.scaling == other.scaling
        && all_near(&one.inverse_frequencies, &other.inverse_frequencies)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_transformers_saves_is_said_in_the_older_keys_too() {
        let config = json!({
            "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96,
            "vocab_size": 96, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        });
        let told = spelt_out(&config);
        assert_eq!(told["rope_theta"], 5e5);
        assert_eq!(told["rope_scaling"], json!({"rope_type": "linear", "type": "linear", "factor": 2.0}));
        assert_eq!((&told["rms_norm_eps"], &told["rope_parameters"]), (&json!(1e-6), &config["rope_parameters"]));
        let plain =
            json!({"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}});
        let told = spelt_out(&plain);
        assert_eq!([&told["rotary_emb_base"], &told["rotary_pct"]], [&json!(1e4), &json!(0.5)]);
        assert!(told.get("rope_theta").is_none() && told["rope_scaling"].is_null());
        let config = json!({"model_type": "gemma3_text", "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }});
        let told = spelt_out(&config);
        assert_eq!([&told["rope_theta"], &told["rope_local_base_freq"]], [&json!(1e6), &json!(2e4)]);
        let unknown = json!({"model_type": "something", "rope_theta": null});
        assert_eq!(spelt_out(&unknown), unknown);
    }

    #[test]
    fn families_that_are_not_known_are_told_of_in_the_older_keys_too() {
        let rope = json!({"rope_type": "yarn", "factor": 2, "rope_theta": 1e7, "partial_rotary_factor": 0.25});
        let told = spelt_out(&json!({"model_type": "deepseek_v41", "rope_parameters": rope}));
        assert_eq!([&told["rope_theta"], &told["partial_rotary_factor"]], [&json!(1e7), &json!(0.25)]);
        assert_eq!(told["rope_scaling"], json!({"rope_type": "yarn", "type": "yarn", "factor": 2.0}));
    }

    fn decoder(model_type: &str, key: &str, value: Value) -> Value {
        let mut config = json!({
            "model_type": model_type, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 96,
            "vocab_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 256,
        });
        config[key] = value;
        config
    }

    #[test]
    fn the_type_of_a_scaling_has_its_older_name_too() {
        let factors = [1.0; 8];
        let rope = json!({
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": 64,
        });
        let mut config = decoder("phi3", "rope_parameters", rope);
        config["original_max_position_embeddings"] = json!(64);
        let told = spelt_out(&config);
        assert_eq!(
            [&told["rope_scaling"]["type"], &told["original_max_position_embeddings"]],
            [&json!("longrope"), &json!(64)]
        );
    }

    #[test]
    fn the_warmth_of_yarn_is_said_as_it_is_read() {
        for (key, also) in [("rope_parameters", None), ("rope_scaling", None), ("rope_parameters", Some(0.5))] {
            let mut rope = json!({
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5, "rope_theta": 1e4,
            });
            if let Some(all) = also {
                rope["mscale_all_dim"] = json!(all);
            }
            let config = decoder("llama", key, rope);
            let scaling = spelt_out(&config)["rope_scaling"].clone();
            let number = |key: &str| scaling[key].as_f64().unwrap_or(0.0);
            let taken = warmth(4.0, number("mscale")) / warmth(4.0, number("mscale_all_dim"));
            assert!((taken - 1.5).abs() < 1e-6, "{scaling}");
            assert_eq!(scaling["attention_factor"], 1.5);
        }
    }

    #[test]
    fn a_pattern_is_said_where_no_list_is_read() {
        let of = |kinds: &str| -> Value {
            let name = |kind| if kind == 'L' { "sliding_attention" } else { "full_attention" };
            kinds.chars().map(name).collect()
        };
        let said = |model_type: &str, kinds: &str| {
            let mut config = decoder(model_type, "layer_types", of(kinds));
            config["sliding_window"] = json!(8);
            spelt_out(&config)["sliding_window_pattern"].clone()
        };
        assert_eq!(said("gemma3_text", "LGLG"), 2);
        assert_eq!(said("gemma3_text", "LLLL"), 6);
        assert_eq!(said("cohere2", "LLGL"), 3);
        assert_eq!(said("gemma3_text", "GLLG"), Value::Null);
        assert_eq!(said("exaone4", "LLGG"), "LLGG");
    }

    #[test]
    fn nobody_takes_something_else_from_it() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
        let mut changed = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let Ok(text) = std::fs::read(entry.unwrap().path().join("config.json")) else { continue };
            let config: Value = serde_json::from_slice(&text).unwrap();
            let told = spelt_out(&config);
            let [mut before, mut after] = [&config, &told].map(|config| settings(config).unwrap());
            assert_eq!(before.notes, after.notes);
            let context = before.values["max_position_embeddings"].clone();
            let [one, other] = [&mut before, &mut after].map(|settings| settings.values["rope_parameters"].take());
            assert!(turn_alike(&one, &other, &context), "{one} {other}");
            // These follow from what stands beside them.
            for settings in [&mut before, &mut after] {
                let values = settings.values.as_object_mut().unwrap();
                values.retain(|key, _| !["sliding_window_pattern", "head_dim"].contains(&&key[..]));
            }
            assert_eq!(before.values, after.values);
            changed += usize::from(told != config);
        }
        assert!(changed > 50, "{changed}");
    }
}
