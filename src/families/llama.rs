//! Llama 1–3.x, Mistral, and the many models that share their shape (SmolLM2, TinyLlama …).

use kernels::Activation;

use super::build::{Base, activation};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// Llama.
pub const LLAMA: Family =
    Family { id: "llama", model_types: &["llama"], build: |config| build(config, "llama", false) };

/// Mistral: Llama with a sliding window.
pub const MISTRAL: Family =
    Family { id: "mistral", model_types: &["mistral"], build: |config| build(config, "mistral", true) };

fn build(config: &Config<'_>, family: &'static str, windowed: bool) -> Result<Graph> {
    let base = Base::read(config)?;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let window = if windowed { config.optional_count("sliding_window")? } else { None };
    let (attention_bias, mlp_bias) = (config.flag("attention_bias", false)?, config.flag("mlp_bias", false)?);
    let rope = rope(config, base.head_dim, Default::default())?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut attention =
            base.attention(&format!("{at}.self_attn"), [attention_bias, attention_bias], Some(rope.clone()));
        attention.shape.window = window;
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, mlp_bias);
        Ok(base.usual_block(at, attention, Layer::Mlp(mlp)))
    })?;
    base.graph(config, family, blocks)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::families::build;

    fn message(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut config = json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 1, "vocab_size": 10, "tie_word_embeddings": true
        });
        assert_eq!(build(&config).unwrap().tensors().len(), 11);
        change(&mut config);
        build(&config).unwrap_err().to_string()
    }

    #[test]
    fn a_bad_configuration_is_one_sentence_that_names_the_key() {
        let check = |key: &str, value: serde_json::Value, expected: &str| {
            let found = message(|config| config[key] = value);
            assert!(found.contains(expected), "{found}");
        };
        check("hidden_size", json!("big"), "hidden_size must be a positive number, found \"big\"");
        check("hidden_size", json!(null), "hidden_size must be a positive number, found nothing");
        check("num_key_value_heads", json!(0), "num_key_value_heads must be a positive number");
        check("num_key_value_heads", json!(3), "cannot share 3 key and value heads");
        check("hidden_act", json!("mish"), "hidden_act is `mish`");
        check("rope_scaling", json!({"type": "ntk", "factor": 2.0}), "rope scaling `ntk` is not supported");
        check("rope_scaling", json!({"rope_type": "linear"}), "lacks a positive factor");
        check(
            "rope_scaling",
            json!({"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 4}),
            "2 positive numbers in short_factor",
        );
        check("rope_parameters", json!(3), "rope_parameters must be an object");
    }
}
