//! Mistral Large 4: GLM-5's attention to a choice of tokens without a latent of queries, which grow with their positions, each head at its own
//! pace; some layers have no positions, and some read the latents of earlier ones.

use std::sync::Arc;

use kernels::{Activation, NormKind};

use super::build::{Base, activation, with_experts};
use super::deepseek::{Chosen, Indexing, LatentHeads, choices, moe, rotation, shared_choices};
use super::names::set_aside;
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{Choice, FURTHER, Graph, Keys, Layer, Norm, Projections, Rope, Temperature};
use crate::json::integer;
use crate::weights::Weights;

/// Mistral Large 4.
pub const MISTRAL_LARGE4: Family = Family { id: "mistral_large4", model_types: &["mistral_large4_text"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut settings = config.0.clone();
    if let Some(settings) = settings.as_object_mut() {
        // Its class has neither, and does not read them.
        ["q_lora_rank", "norm_topk_prob"].into_iter().for_each(|key| drop(settings.remove(key)));
        // It puts the part that is rotated in the place of this.
        settings.insert("head_dim".to_owned(), config.count("qk_rope_head_dim")?.into());
    }
    let config = &Config(&settings);
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let turned = LatentHeads::read(config, &mut base)?;
    let (rope, scale) = rotation(config, &turned)?;
    let rope = Arc::new(Rope { learned: Some("model.rotary_emb.alpha".to_owned()), ..(*rope).clone() });
    let rotated = config.rotated_layers(base.layers)?;
    let keys = keys(config, &rotated)?;
    let dense = config.count_or("first_k_dense_replace", 1)?;
    let sparse = with_experts(config, base.layers, |layer| layer >= dense)?;
    let like = Indexing {
        rotated: config.count("qk_rope_head_dim")?,
        interleaved: true,
        behind: false,
        latent: false,
        eps: 1e-6,
    };
    let choices = choices(config, &base, shared_choices(config, base.layers)?, like)?;
    let act = activation(config, Activation::Silu)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = match rotated[layer] {
            true => turned.attention(&base, &module, Some(rope.clone()), true),
            false => turned.still().attention(&base, &module, None, true),
        };
        attention.shape.scale = scale;
        attention.keys = keys[layer];
        attention.temperature = Some(growing(&module));
        if let Projections::Latent(latent) = &mut attention.projections {
            latent.kv_norm.iter_mut().for_each(|norm| norm.eps = base.eps);
            if let Keys::Of(_) = keys[layer] {
                (latent.kv_a, latent.kv_norm) = (None, None);
            }
        }
        let mut choice = choices(layer, &module);
        if let Choice::Own(indexer, _) = &mut choice {
            let module = format!("{module}.indexer");
            indexer.input_norm = Some(Norm {
                kind: NormKind::Layer,
                bias: Some(format!("{module}.q_input_norm.bias")),
                eps: 1e-6,
                ..base.norm(&format!("{module}.q_input_norm"))
            });
            indexer.temperature = Some(growing(&module));
        }
        attention.choice = Some(choice);
        let module = format!("{at}.mlp");
        let feed_forward = match sparse[layer] {
            false => Layer::Mlp(base.gated(&module, config.count("intermediate_size")?, act, false)),
            true => {
                let experts = config.count("n_routed_experts")?;
                Layer::Moe(moe(&base, config, &module, experts, act, Chosen::SoftmaxOfTwo, true)?)
            }
        };
        Ok(base.usual_block(at, attention, feed_forward))
    })?;
    let mut graph = base.graph(config, MISTRAL_LARGE4.id, blocks)?;
    graph.head.softcap = Some(config.positive("final_logit_softcapping", 30.0)? as f32);
    graph.aside.push(("mtp_dspark.".to_owned(), FURTHER));
    if !rotated.contains(&true) {
        graph.aside.push(("model.rotary_emb.".to_owned(), "of rotary positions, which no layer has"));
    }
    Ok(graph)
}

/// What the queries under `module` are multiplied by.
fn growing(module: &str) -> Temperature {
    let [scale, bias] = ["scale", "bias"].map(|name| format!("{module}.softmax_scaling.{name}"));
    Temperature::Heads { scale, bias }
}

/// Whose latents each layer reads, by `kv_source_layers`: its own without that list.
///
/// Fails where a layer is to read what is not there, what positions turn otherwise, or other latents than transformers would give it.
fn keys(config: &Config<'_>, rotated: &[bool]) -> Result<Vec<Keys>> {
    let mut keys = vec![Keys::Own; rotated.len()];
    let Some(sources) = config.list("kv_source_layers")? else { return Ok(keys) };
    let wrong = |what: String| Error::failed(format!("config.json: kv_source_layers {what}"));
    if sources.len() != rotated.len() {
        return Err(wrong(format!("has {} entries, and there are {} layers", sources.len(), rotated.len())));
    }
    let sources: Vec<Option<usize>> =
        sources.iter().map(|layer| integer(layer).and_then(|layer| usize::try_from(layer).ok())).collect();
    let mut last = [None; 2];
    for (layer, source) in sources.iter().enumerate() {
        let kind = usize::from(rotated[layer]);
        let own = |source: &usize| *source <= layer && sources[*source] == Some(*source);
        let Some(source) = source.filter(own) else {
            let told = source.map_or("no number".to_owned(), |source| source.to_string());
            return Err(wrong(format!(
                "says of layer {layer} {told}, and it must be an earlier layer that has latents of its own, or itself"
            )));
        };
        if source != layer {
            if rotated[source] != rotated[layer] {
                return Err(wrong(format!(
                    "has layer {layer} read the latents of layer {source}, and positions turn the keys of only one of them (no_rope_layers)"
                )));
            }
            if let Some(other) = last[kind].filter(|other| *other != source) {
                return Err(wrong(format!(
                    "has layer {layer} read the latents of layer {source}, and transformers gives it those of layer {other}, which are shared, too"
                )));
            }
            keys[layer] = Keys::Of(source);
        } else if sources[layer + 1..].contains(&Some(layer)) {
            keys[layer] = Keys::Left(layer);
            last[kind] = Some(layer);
        }
    }
    Ok(keys)
}

/// Takes the names that it is published under, where a checkpoint has them. Transformers saves the same.
pub(super) fn settle(graph: &mut Graph, source: &dyn Weights) {
    if graph.family != MISTRAL_LARGE4.id {
        return;
    }
    let first = format!("{}.input_layernorm.weight", graph.blocks[0].name);
    let there = |name: &str| source.entry(name).is_some();
    if there(&first) || !there(&published(&first)) {
        return;
    }
    graph.rename(&published);
    if there("tok_embeddings.weight") {
        set_aside(graph, source, &["layers.", "norm.", "tok_embeddings.", "output.", "lerope."]);
    }
}

/// What a tensor or module is called as published.
fn published(name: &str) -> String {
    const WHOLE: [(&str, &str); 4] = [
        ("model.embed_tokens", "tok_embeddings"),
        ("model.rotary_emb.", "lerope."),
        ("model.norm", "norm"),
        ("lm_head", "output"),
    ];
    const PARTS: [(&str, &str); 14] = [
        (".self_attn.q_proj", ".attention.wq"),
        (".self_attn.o_proj", ".attention.wo"),
        (".self_attn.", ".attention."),
        (".kv_a_proj_with_mqa", ".wkv_a_with_mqa"),
        (".kv_a_layernorm", ".kv_a_norm"),
        (".kv_b_proj", ".wkv_b"),
        (".softmax_scaling.scale", ".ssmax_scaling.s"),
        (".softmax_scaling.bias", ".ssmax_scaling.b"),
        (".input_layernorm", ".attention_norm"),
        (".post_attention_layernorm", ".ffn_norm"),
        (".mlp.experts.", ".experts."),
        (".mlp.shared_experts.", ".shared_experts."),
        (".mlp.gate_proj", ".feed_forward.gate_proj"),
        (".mlp.up_proj", ".feed_forward.up_proj"),
    ];
    const ENDS: [(&str, &str); 5] = [
        (".mlp.down_proj", ".feed_forward.down_proj"),
        (".mlp.gate", ".gate"),
        (".gate_proj", ".w1"),
        (".down_proj", ".w2"),
        (".up_proj", ".w3"),
    ];
    for (own, other) in WHOLE {
        if let Some(rest) = name.strip_prefix(own) {
            return format!("{other}{rest}");
        }
    }
    let name = name.strip_prefix("model.").unwrap_or(name).to_owned();
    PARTS.iter().chain(&ENDS).fold(name, |name, (own, other)| name.replacen(own, other, 1))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config(sources: Value, no_rope_layers: Value) -> Value {
        json!({
            "model_type": "mistral_large4_text", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
            "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 2, "index_head_dim": 16,
            "kv_source_layers": sources, "no_rope_layers": no_rope_layers,
        })
    }

    #[test]
    fn layers_read_the_latents_of_the_layers_that_config_json_names() {
        let keys = |sources, rotated| {
            let graph = super::super::build(&config(sources, rotated)).map_err(|error| error.to_string())?;
            let of = |block: &crate::graph::Block| block.attention().expect("attention first").keys;
            Ok::<_, String>(graph.blocks.iter().map(of).collect::<Vec<_>>())
        };
        let apart = json!([1, 0, 1, 0]);
        let found = keys(json!([0, 1, 0, 1]), apart.clone());
        assert_eq!(found.unwrap(), [Keys::Left(0), Keys::Left(1), Keys::Of(0), Keys::Of(1)]);
        assert_eq!(keys(Value::Null, apart.clone()).unwrap(), [Keys::Own; 4]);
        let all = json!([1, 1, 1, 1]);
        for (sources, rotated, what) in [
            (json!([0, 1, 0]), &all, "has 3 entries, and there are 4 layers"),
            (
                json!([0, 2, 2, 3]),
                &all,
                "says of layer 1 2, and it must be an earlier layer that has latents of its own, or itself",
            ),
            (json!([0, 0, 1, 3]), &all, "says of layer 2 1,"),
            (json!([0, 1, 2, -1]), &all, "says of layer 3 no number,"),
            (json!([0, 0, 2, 3]), &apart, "positions turn the keys of only one of them"),
            // Layer 3 shares layer 0's, and layer 1 shares its own in between.
            (json!([0, 1, 1, 0]), &all, "and transformers gives it those of layer 1"),
        ] {
            let said = keys(sources, rotated.clone()).unwrap_err();
            assert!(said.contains("kv_source_layers") && said.contains(what), "{said}");
        }
    }

    #[test]
    fn names_are_those_of_the_published_files() {
        for (own, other) in [
            ("model.embed_tokens.weight", "tok_embeddings.weight"),
            ("lm_head", "output"),
            ("model.norm.weight", "norm.weight"),
            ("model.rotary_emb.alpha", "lerope.alpha"),
            ("model.layers.1.self_attn.q_proj", "layers.1.attention.wq"),
            ("model.layers.1.self_attn.kv_a_proj_with_mqa", "layers.1.attention.wkv_a_with_mqa"),
            ("model.layers.1.self_attn.indexer.wq_b", "layers.1.attention.indexer.wq_b"),
            ("model.layers.1.self_attn.indexer.softmax_scaling.bias", "layers.1.attention.indexer.ssmax_scaling.b"),
            ("model.layers.1.post_attention_layernorm.weight", "layers.1.ffn_norm.weight"),
            ("model.layers.1.mlp.gate", "layers.1.gate"),
            ("model.layers.0.mlp.gate_proj", "layers.0.feed_forward.w1"),
            ("model.layers.1.mlp.shared_experts.down_proj", "layers.1.shared_experts.w2"),
            ("model.layers.1.mlp.experts.3.up_proj", "layers.1.experts.3.w3"),
            ("mtp_dspark.", "mtp_dspark."),
        ] {
            assert_eq!(published(own), other);
        }
    }
}
