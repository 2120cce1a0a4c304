//! adapter_config.json: what bears on merging.

use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::json::{self, integer};

/// What to do with an adapter that is not merged here.
const WITH_PEFT: &str = "merge it with PEFT (merge_and_unload, then save_pretrained) and give the model that comes out";

/// The settings that bear on merging.
pub(super) struct Settings {
    pub(super) rank: usize,
    pub(super) alpha: f64,
    pub(super) root: bool,
    /// The only layers that it is for, where it lists some.
    pub(super) layers: Option<Vec<i64>>,
    pub(super) keep_tied: bool,
    pub(super) dora: bool,
    /// Whether factors have biases; PEFT reads none without.
    pub(super) bias: bool,
    pub(super) ranks: Vec<(Regex, f64)>,
    pub(super) alphas: Vec<(Regex, f64)>,
    /// The model that it was trained on.
    pub(super) base: Option<String>,
    /// Modules that `targets` fit and that are left alone.
    pub(super) excluded: Vec<(String, Regex)>,
    /// Modules that it was to have factors for; by their ends, or a pattern for all of the name, as in the other two.
    pub(super) targets: Vec<(String, Regex)>,
    /// It names no targets at all, and PEFT takes those of its own table.
    pub(super) no_targets: bool,
    /// Modules that it was to bring whole.
    pub(super) saved: Vec<(String, Regex)>,
}

/// Modules as adapter_config.json names them: a list of their ends, or one pattern for whole names. PEFT's word for all linears names
/// none, and what is no pattern to us is not looked for.
fn names(value: Option<&Value>) -> Vec<(String, Regex)> {
    let (list, is_pattern) = match value {
        Some(Value::Array(list)) => (list.iter().filter_map(Value::as_str).collect(), false),
        Some(Value::String(pattern)) if pattern != "all-linear" => (vec![pattern.as_str()], true),
        _ => (Vec::new(), false),
    };
    // A pattern is for names with all that a wrapper put before them, which were taken off here.
    let regex = |name: &str| match is_pattern {
        true => Regex::new(&format!("^(?:.*?)(?:{name})$")),
        false => Regex::new(&format!(r"^(?:.*\.)?{}$", fancy_regex::escape(name))),
    };
    list.into_iter().filter_map(|name| Some((name.to_owned(), regex(name).ok()?))).collect()
}

impl Settings {
    pub(super) fn read(config: &Map<String, Value>) -> Result<Settings, String> {
        let set = |key: &str| match config.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(object)) => !object.is_empty(),
            Some(_) => true,
        };
        let wrong = |key: &str, expected: &str| format!("{key} is {}, expected {expected}", json::shown(&config[key]));
        // Python takes any other value for one of the two, and not always for the one that its writer meant.
        let flag = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(wrong(key, "true or false")),
        };
        match config.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            Some(other) => {
                return Err(format!(
                    "peft_type is {other}, and only LORA (with rsLoRA and DoRA) is merged here; {WITH_PEFT}"
                ));
            }
            None => return Err("peft_type is missing".into()),
        }
        for (key, what) in [
            ("layer_replication", "layers that are repeated"),
            ("trainable_token_indices", "tokens that are trained alone"),
            ("target_parameters", "factors for parameters that are no module's weight"),
            ("alora_invocation_tokens", "an activated adapter, which works from its tokens on and has no merged form,"),
            ("use_qalora", "QA-LoRA"),
            ("use_bdlora", "factors in diagonal blocks"),
            ("arrow_config", "a router between adapters"),
            ("kasa_config", "KaSA, which changes the weights it adapts,"),
            ("monteclora_config", "sampled factors"),
            ("velora_config", "VeLoRA"),
            ("lora_ga_config", "LoRA-GA, which changes the weights it adapts,"),
        ] {
            if set(key) {
                return Err(format!("{key} is set: {what} cannot be merged here; {WITH_PEFT}"));
            }
        }
        if let Some(Value::String(start)) = config.get("init_lora_weights")
            && !["gaussian", "orthogonal", "eva", "mica"].contains(&start.to_ascii_lowercase().as_str())
        {
            return Err(format!(
                "init_lora_weights is `{start}`, which changes the weights it adapts; save the adapter as one for the \
                 original weights first (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
            ));
        }
        let number = |key: &str| config.get(key).and_then(Value::as_f64).filter(|n| n.is_finite());
        let rank = match config.get("r") {
            None => 8,
            Some(r) => integer(r).filter(|r| *r > 0).ok_or_else(|| wrong("r", "a positive number"))? as usize,
        };
        let alpha = match config.get("lora_alpha") {
            None => 8.0,
            Some(_) => number("lora_alpha").ok_or_else(|| wrong("lora_alpha", "a number"))?,
        };
        let patterns = |key: &str| -> Result<Vec<(Regex, f64)>, String> {
            let Some(Value::Object(patterns)) = config.get(key) else { return Ok(Vec::new()) };
            let read = |(pattern, value): (&String, &Value)| {
                let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
                    .map_err(|e| format!("{key} has an invalid pattern `{pattern}`: {e}"))?;
                let value = value.as_f64().ok_or_else(|| format!("{key}.{pattern} is {value}, expected a number"))?;
                Ok((regex, value))
            };
            patterns.iter().map(read).collect()
        };
        Ok(Settings {
            rank,
            alpha,
            root: flag("use_rslora")?,
            bias: set("lora_bias"),
            layers: match config.get("layers_to_transform") {
                Some(Value::Array(layers)) => layers.iter().map(Value::as_i64).collect(),
                Some(one) => one.as_i64().map(|layer| vec![layer]),
                None => None,
            },
            keep_tied: flag("ensure_weight_tying")?,
            dora: flag("use_dora")?,
            ranks: patterns("rank_pattern")?,
            alphas: patterns("alpha_pattern")?,
            base: config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
            excluded: names(config.get("exclude_modules")),
            targets: names(config.get("target_modules")),
            no_targets: config.get("target_modules").is_none_or(Value::is_null),
            saved: names(config.get("modules_to_save")),
        })
    }

    fn first(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
        patterns.iter().find(|(regex, _)| regex.is_match(module).unwrap_or(false)).map(|(_, value)| *value)
    }

    /// `lora_alpha`, or what alpha_pattern says of a module.
    pub(super) fn alpha_of(&self, module: &str) -> f64 {
        Self::first(&self.alphas, module).unwrap_or(self.alpha)
    }

    /// The factor of a module's product, whose factors are of rank `found`.
    pub(super) fn scale(&self, module: &str, found: usize) -> Result<f32, String> {
        let rank = Self::first(&self.ranks, module).unwrap_or(self.rank as f64);
        if rank != found as f64 {
            return Err(format!("its rank is {found}, and adapter_config.json says {rank}"));
        }
        let alpha = self.alpha_of(module);
        Ok((alpha / if self.root { rank.sqrt() } else { rank }) as f32)
    }
}
