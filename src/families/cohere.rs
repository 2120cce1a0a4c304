//! Cohere's Command R and A: one norm for attention and feed-forward side by side, neighbours rotated, scaled logits.

use kernels::{Activation, NormKind};

use super::build::{Base, activation, block, pre, sliding, window_of, with_experts};
use super::moe::router;
use super::rope::rope;
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{Graph, HeadNorms, Layer, Moe, Scoring};

/// Command R and R+, Aya.
pub const COHERE: Family = Family { id: "cohere", model_types: &["cohere"], build: |config| build(config, "cohere") };

/// Command R7B and A: every fourth layer sees all and has no positions.
pub const COHERE2: Family =
    Family { id: "cohere2", model_types: &["cohere2"], build: |config| build(config, "cohere2") };

/// Command A+: the same with experts.
pub const COHERE2_MOE: Family =
    Family { id: "cohere2_moe", model_types: &["cohere2_moe"], build: |config| build(config, "cohere2_moe") };

fn build(config: &Config<'_>, family: &'static str) -> Result<Graph> {
    let mut base = Base::read(config)?;
    let (second, sparse) = (family != "cohere", family == "cohere2_moe");
    // Only a model with experts may say that it has norms of the other kind.
    if !(sparse && config.get("rms_norm_eps").is_some()) {
        base.norm = NormKind::Layer;
        base.eps = config.positive("layer_norm_eps", 1e-5)? as f32;
    }
    base.tied = true;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let normed = !second && config.flag("use_qk_norm", false)?;
    let pattern = config.optional_count("sliding_window_pattern")?.unwrap_or(4);
    let dense = if sparse { config.count_or("first_k_dense_replace", 0)? } else { 0 };
    let dense_pattern = config.optional_count("prefix_dense_sliding_window_pattern")?.unwrap_or(1);
    let local = match second {
        true => sliding(config, base.layers, |layer| match layer.checked_sub(dense) {
            Some(layer) => (layer + 1) % pattern != 0,
            None => (layer + 1) % dense_pattern != 0,
        })?,
        false => vec![false; base.layers],
    };
    let mixed = match sparse {
        true => with_experts(config, base.layers, |layer| layer >= dense)?,
        false => vec![false; base.layers],
    };
    let dense_inner = if sparse { config.optional_count("prefix_dense_intermediate_size")? } else { None };
    let window = window_of(config, &local)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let rotated = local[layer] || !second || sparse && !mixed[layer] && dense_pattern == 1;
        let mut attention = base.attention(&module, [bias, bias], rotated.then(|| rope.clone()));
        attention.shape.window = window.filter(|_| local[layer]);
        attention.layout.interleaved = true;
        let norm = |name: &str, heads: usize| {
            let mut norm = base.norm(&format!("{module}.{name}"));
            norm.shape = vec![heads, base.head_dim];
            norm
        };
        attention.norms = normed.then(|| HeadNorms {
            q: norm("q_norm", base.heads),
            k: Some(norm("k_norm", base.kv_heads)),
            v: None,
            per_head: true,
            after_rope: false,
        });
        let module = format!("{at}.mlp");
        let norm = base.norm(&format!("{at}.input_layernorm"));
        let (feed_forward, scale) = match mixed[layer] {
            false => (Layer::Mlp(base.gated(&module, dense_inner.unwrap_or(inner), act, false)), 1.0),
            true => {
                let (moe, scale) = moe(&base, config, &module, inner, act)?;
                (Layer::Moe(moe), scale)
            }
        };
        let mut second = pre(norm.clone(), feed_forward);
        second.scale = scale;
        let mut block = block(at, vec![pre(norm, Layer::Attention(attention)), second]);
        block.parallel = true;
        Ok(block)
    })?;
    let mut graph = base.graph(config, family, blocks)?;
    graph.head.scale = config.number("logit_scale", 0.0625)? as f32;
    Ok(graph)
}

/// Experts, and what their sum with the shared ones is multiplied by: a half where it is to be their average.
fn moe(base: &Base, config: &Config<'_>, module: &str, inner: usize, act: Activation) -> Result<(Moe, f32)> {
    let unknown = |key: &str, found: &str, known: &str| {
        Error::failed(format!("config.json: {key} is `{found}`, and only {known} are supported"))
    };
    let experts = config.count("num_experts")?;
    let mut router = router(base, format!("{module}.gate"), experts, config.count("num_experts_per_tok")?, true);
    match config.text("expert_selection_fn")? {
        "softmax" => {}
        "sigmoid" => {
            router.scoring = Scoring::Sigmoid;
            router.renormalize = config.flag("norm_topk_prob", true)?;
        }
        other => return Err(unknown("expert_selection_fn", other, "softmax and sigmoid")),
    }
    let shared = config.count_or("num_shared_experts", 0)?;
    let shared =
        (shared > 0).then(|| (base.gated(&format!("{module}.shared_experts"), shared * inner, act, false), None));
    let scale = match (config.text("shared_expert_combination_strategy")?, &shared) {
        ("average", Some(_)) => 0.5,
        ("sum", _) | (_, None) => 1.0,
        (other, _) => return Err(unknown("shared_expert_combination_strategy", other, "average and sum")),
    };
    let experts = (0..experts).map(|e| base.gated(&format!("{module}.experts.{e}"), inner, act, false)).collect();
    Ok((Moe { router, experts, shared, weigh_input: false, latent: None, norms: None }, scale))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::build;

    #[test]
    fn ways_to_choose_and_to_add_experts_are_known_or_refused() {
        let of = |key: &str, value: Value, shared: usize| {
            let mut config = json!({
                "model_type": "cohere2_moe", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 4,
                "num_hidden_layers": 1, "vocab_size": 10, "num_experts": 2, "num_shared_experts": shared,
            });
            config[key] = value;
            build(&config).map(|graph| graph.blocks[0].steps[1].scale).map_err(|error| error.to_string())
        };
        let strategy = "shared_expert_combination_strategy";
        assert_eq!(of(strategy, json!("average"), 1), Ok(0.5));
        assert_eq!(of(strategy, json!("sum"), 1), Ok(1.0));
        assert_eq!(of(strategy, json!("average"), 0), Ok(1.0));
        assert!(of(strategy, json!("vote"), 1).unwrap_err().contains("strategy is `vote`"));
        assert!(of("expert_selection_fn", json!("tanh"), 0).unwrap_err().contains("only softmax and sigmoid"));
    }
}
