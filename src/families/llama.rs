//! Llama 1–3.x, Mistral, and the many models that share their shape (SmolLM2, TinyLlama …).

use std::sync::Arc;

use kernels::AttentionShape;

use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{Attention, Block, DropRule, Graph, Head, Linear, Mlp, Norm, Rope, RopeScaling, Step};

/// Llama.
pub const LLAMA: Family =
    Family { id: "llama", model_types: &["llama"], build: |config| build(config, "llama", false) };

/// Mistral: Llama with a sliding window.
pub const MISTRAL: Family =
    Family { id: "mistral", model_types: &["mistral"], build: |config| build(config, "mistral", true) };

const DROPPED: &[DropRule] = &[DropRule { suffix: ".rotary_emb.inv_freq", reason: "computed from config.json" }];

fn build(config: &Config<'_>, family: &'static str, windowed: bool) -> Result<Graph> {
    let hidden = config.count("hidden_size")?;
    let inner = config.count("intermediate_size")?;
    let heads = config.count("num_attention_heads")?;
    let kv_heads = config.optional_count("num_key_value_heads")?.unwrap_or(heads);
    let vocabulary = config.count("vocab_size")?;
    let head_dim = config.optional_count("head_dim")?.unwrap_or(hidden / heads);
    let eps = config.number("rms_norm_eps", 1e-6)? as f32;
    let activation = config.get("hidden_act").and_then(|v| v.as_str()).unwrap_or("silu");
    if !matches!(activation, "silu" | "swish") {
        return Err(Error::failed(format!("config.json: hidden_act is `{activation}`, and only silu is supported")));
    }
    if heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
        return Err(Error::failed(format!(
            "config.json: {heads} heads of {head_dim} values cannot share {kv_heads} key and value heads in pairs of values"
        )));
    }
    let window = if windowed { config.optional_count("sliding_window")? } else { None };
    let (attention_bias, mlp_bias) = (config.flag("attention_bias", false)?, config.flag("mlp_bias", false)?);
    let rope = Arc::new(rope(config, head_dim)?);
    let shape = AttentionShape {
        heads,
        kv_heads,
        head_dim,
        value_dim: head_dim,
        scale: (head_dim as f32).powf(-0.5),
        window,
        chunk: None,
        softcap: None,
    };
    let norm = |weight: String| Norm { weight, eps };
    let blocks = (0..config.count("num_hidden_layers")?)
        .map(|layer| {
            let name = format!("model.layers.{layer}");
            let linear = |part: &str, rows, cols, bias| Linear { module: format!("{name}.{part}"), rows, cols, bias };
            let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
            let attention = Attention {
                norm: norm(format!("{name}.input_layernorm.weight")),
                q: linear("self_attn.q_proj", wide, hidden, attention_bias),
                k: linear("self_attn.k_proj", narrow, hidden, attention_bias),
                v: linear("self_attn.v_proj", narrow, hidden, attention_bias),
                o: linear("self_attn.o_proj", hidden, wide, attention_bias),
                shape,
                rope: rope.clone(),
            };
            let mlp = Mlp {
                norm: norm(format!("{name}.post_attention_layernorm.weight")),
                gate: linear("mlp.gate_proj", inner, hidden, mlp_bias),
                up: linear("mlp.up_proj", inner, hidden, mlp_bias),
                down: linear("mlp.down_proj", hidden, inner, mlp_bias),
            };
            Block { name, steps: vec![Step::Attention(attention), Step::Mlp(mlp)] }
        })
        .collect();
    let tied = config.flag("tie_word_embeddings", false)?;
    let head = Linear { module: "lm_head".to_owned(), rows: vocabulary, cols: hidden, bias: false };
    Ok(Graph {
        family,
        hidden,
        vocabulary,
        embedding: "model.embed_tokens.weight".to_owned(),
        blocks,
        final_norm: norm("model.norm.weight".to_owned()),
        head: Head { linear: head, tied },
        dropped: DROPPED,
    })
}

/// Frequencies, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
fn rope(config: &Config<'_>, head_dim: usize) -> Result<Rope> {
    let new = config.object("rope_parameters")?;
    let old = config.object("rope_scaling")?;
    let theta = match &new {
        Some(new) if new.get("rope_theta").is_some() => new.number("rope_theta", 0.0)?,
        _ => config.number("rope_theta", 10_000.0)?,
    };
    let mut frequencies: Vec<f32> =
        (0..head_dim / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32)).collect();
    let rope = |inverse_frequencies, scaling| Rope { inverse_frequencies, theta: theta as f32, scaling };
    let Some(scaling) = new.or(old) else { return Ok(rope(frequencies, RopeScaling::None)) };
    let kind = ["rope_type", "type"].iter().find_map(|key| scaling.get(key)).and_then(|v| v.as_str());
    let needed = |key: &str| -> Result<f64> {
        let value = scaling.number(key, f64::NAN)?;
        if value.is_finite() && value > 0.0 {
            return Ok(value);
        }
        Err(Error::failed(format!("config.json: rope scaling `{}` lacks a positive {key}", kind.unwrap_or_default())))
    };
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => {
            let factor = needed("factor")? as f32;
            frequencies.iter_mut().for_each(|f| *f /= factor);
            RopeScaling::Linear { factor }
        }
        "llama3" => {
            let factor = needed("factor")? as f32;
            let low = needed("low_freq_factor")? as f32;
            let high = needed("high_freq_factor")? as f32;
            let original = needed("original_max_position_embeddings")? as f32;
            for f in &mut frequencies {
                let wavelength = 2.0 * std::f32::consts::PI / *f;
                *f = if wavelength > original / low {
                    *f / factor
                } else if wavelength < original / high {
                    *f
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * (*f / factor) + smooth * *f
                };
            }
            RopeScaling::Llama3 { factor, low, high, original }
        }
        other => {
            return Err(Error::failed(format!(
                "config.json: rope scaling `{other}` is not supported, only default, linear and llama3"
            )));
        }
    };
    Ok(rope(frequencies, scaling))
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
        check("model_type", json!("mamba"), "model_type is `mamba`");
        check("hidden_size", json!("big"), "hidden_size must be a positive number, found \"big\"");
        check("hidden_size", json!(null), "hidden_size must be a positive number, found nothing");
        check("num_key_value_heads", json!(0), "num_key_value_heads must be a positive number");
        check("num_key_value_heads", json!(3), "cannot share 3 key and value heads");
        check("hidden_act", json!("gelu"), "only silu");
        check("rope_scaling", json!({"type": "yarn", "factor": 2.0}), "rope scaling `yarn` is not supported");
        check("rope_scaling", json!({"rope_type": "linear"}), "lacks a positive factor");
        check("rope_parameters", json!(3), "rope_parameters must be an object");
    }
}
