//! Hunyuan, dense and with experts: Llama with norms of queries and keys behind the rotation. Hunyuan 3 has them before it.

use std::sync::Arc;

use kernels::Activation;

use super::build::{Base, activation, with_experts};
use super::moe::router;
use super::rope::{rope, unscaled};
use super::{Config, Family, further};
use crate::error::Result;
use crate::graph::{Graph, HeadNorms, Layer, Moe, Rope, Scoring};

/// Hunyuan.
pub const HUNYUAN_DENSE: Family =
    Family { id: "hunyuan_v1_dense", model_types: &["hunyuan_v1_dense"], build: |config| build(config, false) };

/// Hunyuan with experts.
pub const HUNYUAN_MOE: Family =
    Family { id: "hunyuan_v1_moe", model_types: &["hunyuan_v1_moe"], build: |config| build(config, true) };

/// Hunyuan 3: experts chosen by sigmoids.
pub const HY_V3: Family = Family { id: "hy_v3", model_types: &["hy_v3"], build: third };

fn build(config: &Config<'_>, sparse: bool) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let rope = rotation(config, base.head_dim)?;
    // One number for all layers, or one for each.
    let counts = |key: &str| -> Result<Vec<usize>> {
        match config.get(key).is_some_and(|value| value.is_array()) {
            true => config.counts(key, base.layers),
            false => Ok(vec![config.count(key)?; base.layers]),
        }
    };
    let (experts, top_k) = match sparse {
        true => (counts("num_experts")?, counts("moe_topk")?),
        false => Default::default(),
    };
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        let norm = |name: &str| base.norm_of(&format!("{module}.{name}"), base.head_dim);
        let (q, k) = (norm("query_layernorm"), Some(norm("key_layernorm")));
        attention.norms = Some(HeadNorms { q, k, v: None, per_head: true, after_rope: true });
        let module = format!("{at}.mlp");
        let feed_forward = match sparse {
            false => Layer::Mlp(base.gated(&module, inner, act, false)),
            true => Layer::Moe(Moe {
                router: router(&base, format!("{module}.gate.wg"), experts[layer], top_k[layer], true),
                experts: (0..experts[layer])
                    .map(|e| base.gated(&format!("{module}.experts.{e}"), inner, act, false))
                    .collect(),
                shared: Some((base.gated(&format!("{module}.shared_mlp"), inner, act, false), None)),
                weigh_input: false,
                latent: None,
                norms: None,
            }),
        };
        Ok(base.usual_block(at, attention, feed_forward))
    })?;
    base.graph(config, if sparse { "hunyuan_v1_moe" } else { "hunyuan_v1_dense" }, blocks)
}

fn third(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    let (experts, top_k) = (config.count("num_experts")?, config.count("num_experts_per_tok")?);
    let expert_inner = config.count("moe_intermediate_size")?;
    let shared_inner = config.count("num_shared_experts")? * expert_inner;
    let scale = config.number("router_scaling_factor", 1.0)? as f32;
    let sparse = with_experts(config, base.layers, |layer| layer > 0)?;
    let rope = rope(config, base.head_dim)?;
    let block = |at: String, sparse: bool| {
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        attention.norms = Some(base.head_norms(&module));
        let module = format!("{at}.mlp");
        let feed_forward = match sparse {
            false => Layer::Mlp(base.gated(&module, inner, act, mlp_bias)),
            true => {
                let mut router = router(&base, format!("{module}.router.gate"), experts, top_k, true);
                router.scoring = Scoring::Sigmoid;
                router.correction = Some((format!("{module}.expert_bias"), vec![experts]));
                router.scale = scale;
                let expert = |e| base.gated(&format!("{module}.experts.{e}"), expert_inner, act, false);
                let shared = base.gated(&format!("{module}.shared_mlp"), shared_inner, act, mlp_bias);
                let experts = (0..experts).map(expert).collect();
                Layer::Moe(Moe {
                    router,
                    experts,
                    shared: Some((shared, None)),
                    weigh_input: false,
                    latent: None,
                    norms: None,
                })
            }
        };
        base.usual_block(at, attention, feed_forward)
    };
    let blocks = base.each(|layer| Ok(block(base.at(layer), sparse[layer])))?;
    let mut graph = base.graph(config, "hy_v3", blocks)?;
    for layer in 0..config.count_or("num_nextn_predict_layers", 0)? {
        further::append(&mut graph, &base, &further::HUNYUAN, block(base.at(base.layers + layer), true));
    }
    Ok(graph)
}

/// What is called `dynamic` grows the base once and for all where there is an `alpha`.
fn rotation(config: &Config<'_>, head_dim: usize) -> Result<Arc<Rope>> {
    let Some(own) =
        config.object("rope_parameters")?.filter(|own| own.get("rope_type").is_some_and(|v| v == "dynamic"))
    else {
        return rope(config, head_dim);
    };
    let alpha = own.number("alpha", 0.0)?;
    if alpha <= 0.0 {
        return rope(config, head_dim);
    }
    let theta = own.positive("rope_theta", 10_000.0)?;
    let width = head_dim as f64;
    Ok(Arc::new(unscaled(theta * alpha.powf(width / (width - 2.0)), head_dim)))
}
