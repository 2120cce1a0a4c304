//! What transformers calls tensors once they are loaded, where that is not what files call them: a configuration that leaves a
//! module out has to name it so too.
//!
//! `renames.json` is made from transformers' own conversions, in the order in which they are done.

use std::collections::HashMap;
use std::sync::LazyLock;

use fancy_regex::Regex;

/// For a model type, what is looked for in a name and what stands there instead; `\1` is the first group.
static RENAMES: LazyLock<HashMap<String, Vec<(String, String)>>> =
    LazyLock::new(|| serde_json::from_str(include_str!("renames.json")).expect("a committed file"));

/// The names of those of these modules that transformers calls otherwise, as it calls them.
pub fn loaded<'a>(model_type: &str, modules: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let Some(renames) = RENAMES.get(model_type) else { return Vec::new() };
    let renames: Vec<(Regex, &str)> =
        renames.iter().map(|(from, to)| (Regex::new(from).expect("a committed file"), &to[..])).collect();
    let rename = |module: &&String| {
        let weight = format!("{module}.weight");
        let mut name = weight.clone();
        for (from, to) in &renames {
            let Ok(Some(found)) = from.captures(&name) else { continue };
            let to = to.replace(r"\1", found.get(1).map_or("", |group| group.as_str()));
            name = name.replacen(&found[0], &to, 1);
        }
        (name != weight).then(|| name.strip_suffix(".weight").map(str::to_owned)).flatten()
    };
    let named = modules.into_iter().filter(|name| !name.ends_with('.'));
    named.filter_map(|name| rename(&name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(model_type: &str, module: &str) -> Vec<String> {
        loaded(model_type, &[module.to_owned()])
    }

    #[test]
    fn modules_are_called_as_transformers_loads_them() {
        for (model_type, file, name) in [
            ("phimoe", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router"),
            ("deepseek_v4", "model.layers.1.attn.compressor.wgate", "model.layers.1.self_attn.compressor.gate_proj"),
            ("deepseek_v4", "model.layers.1.attn.wo_a", "model.layers.1.self_attn.o_a_proj"),
            ("hy_v4", "model.layers.1.mlp.shared_experts.linear_gate", "model.layers.1.mlp.shared_experts.gate_proj"),
            ("inkling2_text", "model.llm.layers.0.attn.gate_attn", "model.layers.0.self_attn.gate_proj"),
            ("gemma3n_text", "model.language_model.layers.0.x", "model.layers.0.x"),
        ] {
            assert_eq!(of(model_type, file), [name], "{model_type}");
        }
        assert!(of("phimoe", "lm_head").is_empty());
        assert!(of("unheard_of", "model.layers.0.block_sparse_moe.gate").is_empty());
    }

    #[test]
    fn every_rename_can_be_looked_for() {
        RENAMES.keys().for_each(|model_type| drop(of(model_type, "model.layers.0.x")));
    }
}
