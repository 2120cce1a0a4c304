//! Gemma 1, 2 and 3 (text): norms that hold the difference from 1, scaled embeddings; from 2 on norms on both sides,
//! capped scores and logits, and layers that see a window only.

use kernels::Activation;

use super::build::{Base, activation, activation_of, block, sandwich, sliding, window_of};
use super::rope::{of_kind, rope};
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{Graph, Layer};

/// Gemma 1.
pub const GEMMA: Family = Family { id: "gemma", model_types: &["gemma"], build: gemma };

/// Gemma 2.
pub const GEMMA2: Family = Family { id: "gemma2", model_types: &["gemma2"], build: |config| later(config, "gemma2") };

/// Gemma 3, the text model.
pub const GEMMA3: Family =
    Family { id: "gemma3", model_types: &["gemma3_text"], build: |config| later(config, "gemma3") };

fn base(config: &Config<'_>, third: bool) -> Result<Base> {
    // In transformers the classes of Gemma 1 and 2 do not agree with themselves on what it means: they look both ways by one kind of
    // attention, and by another they do not.
    if !third && both_ways(config)? {
        return Err(Error::failed(
            "config.json: use_bidirectional_attention is true, and only models that attend to what came before can be run",
        ));
    }
    let mut base = Base::read(config)?;
    base.head_dim = config.optional_count("head_dim")?.unwrap_or(256);
    base.norm_offset = 1.0;
    base.tied = true;
    Ok(base)
}

/// Whether tokens see those after them, too, as in EmbeddingGemma.
fn both_ways(config: &Config<'_>) -> Result<bool> {
    config.flag("use_bidirectional_attention", false)
}

fn gemma(config: &Config<'_>) -> Result<Graph> {
    let base = base(config, false)?;
    let inner = config.count("intermediate_size")?;
    // Checkpoints of the first days say gelu and mean its approximation.
    let act = match activation(config, Activation::GeluTanh)? {
        Activation::Gelu => Activation::GeluTanh,
        other => other,
    };
    let bias = config.flag("attention_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let attention = base.attention(&format!("{at}.self_attn"), [bias, bias], Some(rope.clone()));
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, false);
        Ok(base.usual_block(at, attention, Layer::Mlp(mlp)))
    })?;
    scaled(base.graph(config, "gemma", blocks)?)
}

/// Embeddings are multiplied by the root of their width.
fn scaled(mut graph: Graph) -> Result<Graph> {
    graph.embedding.scale = (graph.hidden as f32).sqrt();
    Ok(graph)
}

fn later(config: &Config<'_>, family: &'static str) -> Result<Graph> {
    let third = family == "gemma3";
    let base = base(config, third)?;
    let inner = config.count("intermediate_size")?;
    let act = activation_of(config, "hidden_activation", Activation::GeluTanh)?;
    let bias = config.flag("attention_bias", false)?;
    let scale = (config.positive("query_pre_attn_scalar", 256.0)? as f32).powf(-0.5);
    let cap = |key: &str, default: f64| -> Result<Option<f32>> {
        // A null switches the cap off; Gemma 2 has both if config.json does not say.
        match (config.has(key), third) {
            (false, true) => Ok(None),
            (false, false) => Ok(Some(default as f32)),
            (true, _) => Ok(config.get(key).map(|_| config.positive(key, default)).transpose()?.map(|cap| cap as f32)),
        }
    };
    // The class of Gemma 3 keeps the setting and attends without it, in transformers, vLLM and llama.cpp; a note tells.
    let softcap = if third { None } else { cap("attn_logit_softcapping", 50.0)? };
    let pattern = if third { config.optional_count("sliding_window_pattern")?.unwrap_or(6) } else { 2 };
    let local = sliding(config, base.layers, |layer| (layer + 1) % pattern != 0)?;
    let both_ways = both_ways(config)?;
    // What config.json says counts for both sides together, and the token itself is not among it.
    let window = window_of(config, &local)?.map(|window| if both_ways { window / 2 + 1 } else { window });
    let (wide, near) = match third {
        false => {
            let rope = rope(config, base.head_dim)?;
            (rope.clone(), rope)
        }
        true => {
            let of = |kind| of_kind(config, kind, base.head_dim);
            (of("full_attention")?, of("sliding_attention")?)
        }
    };
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let rope = if local[layer] { &near } else { &wide };
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        attention.shape.scale = scale;
        attention.shape.softcap = softcap;
        attention.shape.window = window.filter(|_| local[layer]);
        attention.shape.both_ways = both_ways;
        attention.norms = third.then(|| base.head_norms(&module));
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, false);
        let norm = |name: &str| base.norm(&format!("{at}.{name}"));
        let steps = vec![
            sandwich(norm("input_layernorm"), Layer::Attention(attention), norm("post_attention_layernorm")),
            sandwich(norm("pre_feedforward_layernorm"), Layer::Mlp(mlp), norm("post_feedforward_layernorm")),
        ];
        Ok(block(at.clone(), steps))
    })?;
    let mut graph = base.graph(config, family, blocks)?;
    graph.head.softcap = cap("final_logit_softcapping", 30.0)?;
    scaled(graph)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_gemma_2_caps_its_scores() {
        let caps = |family: &Family| {
            let config = json!({
                "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 7.0, "model_type": family.model_types[0],
            });
            let settings = crate::families::settings(&config).unwrap();
            let graph = (family.build)(&Config(&settings.values)).unwrap();
            let crate::graph::Layer::Attention(attention) = &graph.blocks[0].steps[0].layer else {
                panic!("attention first")
            };
            (attention.shape.softcap, graph.head.softcap)
        };
        assert_eq!(caps(&GEMMA2), (Some(5.0), Some(7.0)));
        assert_eq!(caps(&GEMMA3), (None, Some(7.0)));
    }
}
