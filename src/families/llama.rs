//! Llama 1–3.x, Mistral, and the many models that share their shape (SmolLM2, TinyLlama …), Seed-OSS, Arcee, Helium and InternLM 3.

use kernels::Activation;

use super::build::{Base, activation, sliding};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer, Temperature};

/// Llama.
pub const LLAMA: Family =
    Family { id: "llama", model_types: &["llama"], build: |config| build(config, "llama", false) };

/// Mistral: Llama with a sliding window.
pub const MISTRAL: Family =
    Family { id: "mistral", model_types: &["mistral"], build: |config| build(config, "mistral", true) };

/// Ministral: only some layers have a window.
pub const MINISTRAL: Family =
    Family { id: "ministral", model_types: &["ministral"], build: |config| build(config, "ministral", true) };

/// Ministral 3: queries grow with their positions.
pub const MINISTRAL3: Family =
    Family { id: "ministral3", model_types: &["ministral3"], build: |config| build(config, "ministral3", true) };

/// Seed-OSS: biases of queries, keys and values.
pub const SEED_OSS: Family =
    Family { id: "seed_oss", model_types: &["seed_oss"], build: |config| build(config, "seed_oss", false) };

/// Arcee: squared ReLU without a gate.
pub const ARCEE: Family =
    Family { id: "arcee", model_types: &["arcee"], build: |config| build(config, "arcee", false) };

/// Helium: heads rotate neighbours.
pub const HELIUM: Family =
    Family { id: "helium", model_types: &["helium"], build: |config| build(config, "helium", false) };

/// InternLM 3: `qkv_bias` and `bias` say which linears have biases.
pub const INTERNLM3: Family =
    Family { id: "internlm3", model_types: &["internlm3"], build: |config| build(config, "internlm3", false) };

fn build(config: &Config<'_>, family: &'static str, windowed: bool) -> Result<Graph> {
    let mut base = Base::read(config)?;
    let eps = match family {
        "arcee" | "ministral3" | "internlm3" => 1e-5,
        "helium" => 1e-8,
        _ => 1e-6,
    };
    base.eps = config.positive("rms_norm_eps", eps)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, if family == "arcee" { Activation::Relu2 } else { Activation::Silu })?;
    let window = if windowed { config.optional_count("sliding_window")? } else { None };
    // Elsewhere all layers have the window, whatever config.json calls them.
    let local = match family {
        "mistral" | "ministral" => sliding(config, base.layers, |_| true)?,
        _ => vec![true; base.layers],
    };
    // Mistral's classes have no biases, whatever config.json says.
    let reads_biases = !matches!(family, "mistral" | "ministral" | "ministral3");
    let qkv_bias = reads_biases && config.flag("attention_bias", family == "seed_oss")?;
    let o_bias = match family {
        "seed_oss" => config.flag("attention_out_bias", false)?,
        "helium" => false,
        // As in the code that the model was published with, where the two settings differ.
        "internlm3" => config.flag("mlp_bias", false)?,
        _ => qkv_bias,
    };
    let mlp_bias = reads_biases && config.flag("mlp_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let temperature = if family == "ministral3" { temperature(config)? } else { None };
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut attention = base.attention(&format!("{at}.self_attn"), [qkv_bias, o_bias], Some(rope.clone()));
        attention.shape.window = window.filter(|_| local[layer]);
        attention.layout.interleaved = family == "helium";
        attention.temperature = temperature.clone();
        let module = format!("{at}.mlp");
        let mlp = match family {
            "arcee" => base.ungated(["up_proj", "down_proj"].map(|n| format!("{module}.{n}")), inner, act, mlp_bias),
            _ => base.gated(&module, inner, act, mlp_bias),
        };
        Ok(base.usual_block(at, attention, Layer::Mlp(mlp)))
    })?;
    base.graph(config, family, blocks)
}

/// How queries grow beyond the context of the first training, from which `llama_4_scaling_beta` counts.
pub fn temperature(config: &Config<'_>) -> Result<Option<Temperature>> {
    let Some(rope) = config.object("rope_parameters")? else { return Ok(None) };
    let scale = rope.number("llama_4_scaling_beta", 0.0)? as f32;
    if scale == 0.0 {
        return Ok(None);
    }
    let floor = rope.count("original_max_position_embeddings")? as f32;
    Ok(Some(Temperature::Steps { floor, scale, first: 0 }))
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
        check("hidden_act", json!("mash"), "hidden_act is `mash`");
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
