//! config.json for a reader that has defaults of its own, and knows rotary positions by the older keys alone: mlx-lm.

use serde_json::{Map, Value};

use super::{settings, text_part};

/// The same settings with nothing left to defaults, and what is said of rotary positions in the older keys too. Nothing is said that
/// would change what those take from it who read as transformers does.
pub fn spelt_out(config: &Value) -> Value {
    let mut told = Told { config: config.clone(), inner: text_part(config).inner };
    let Ok(settings) = settings(config) else { return told.config };
    for key in &settings.left_out {
        told.say(key, settings.values[key].clone());
    }
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
    scaling.retain(|key, _| !["rope_theta", "partial_rotary_factor"].contains(&&key[..]));
    if scaling.get("rope_type").is_some_and(|kind| kind != "default") {
        told.say("rope_scaling", scaling.into());
    } else {
        // For some models it has to be there.
        told.part().entry("rope_scaling").or_insert(Value::Null);
    }
    told.config
}

struct Told {
    config: Value,
    /// Whether the language model's settings are in `text_config`.
    inner: bool,
}

impl Told {
    fn part(&mut self) -> &mut Map<String, Value> {
        let part = if self.inner { &mut self.config["text_config"] } else { &mut self.config };
        part.as_object_mut().expect("settings")
    }

    /// Says it where nothing is said yet, and nobody would take something else from it. Returns whether it is said now.
    fn say(&mut self, key: &str, value: Value) -> bool {
        if self.part().get(key).is_some_and(|said| !said.is_null()) || value.is_null() {
            return !value.is_null();
        }
        let taken = |config: &Value| settings(config).map(|settings| (settings.values, settings.notes)).ok();
        let before = (self.config.clone(), taken(&self.config));
        self.part().insert(key.to_owned(), value);
        let same = taken(&self.config) == before.1;
        if !same {
            self.config = before.0;
        }
        same
    }
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
        assert_eq!(told["rope_scaling"], json!({"rope_type": "linear", "factor": 2.0}));
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
    fn nobody_takes_something_else_from_it() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
        let mut changed = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let Ok(text) = std::fs::read(entry.unwrap().path().join("config.json")) else { continue };
            let config: Value = serde_json::from_slice(&text).unwrap();
            let told = spelt_out(&config);
            let [before, after] = [&config, &told].map(|config| settings(config).unwrap());
            assert_eq!(before.values, after.values);
            assert_eq!(before.notes, after.notes);
            changed += usize::from(told != config);
        }
        assert!(changed > 50, "{changed}");
    }
}
