//! dots.llm1 and GLM-4.5: the usual attention with norms of heads, and DeepSeek V3's experts.

use kernels::Activation;

use super::build::{Base, activation, sliding};
use super::deepseek::moe;
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// dots.llm1.
pub const DOTS1: Family = Family { id: "dots1", model_types: &["dots1"], build: |config| build(config, false) };

/// GLM-4.5, 4.6 and 4.7.
pub const GLM4_MOE: Family = Family { id: "glm4_moe", model_types: &["glm4_moe"], build: |config| build(config, true) };

fn build(config: &Config<'_>, glm: bool) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", if glm { 1e-5 } else { 1e-6 })? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let normed = !glm || config.flag("use_qk_norm", false)?;
    let dense = config.count_or("first_k_dense_replace", if glm { 1 } else { 0 })?;
    let rope = rope(config, base.head_dim)?;
    let window = if glm { None } else { config.optional_count("sliding_window")? };
    let first_local = config.count_or("max_window_layers", 62)?;
    let local = sliding(config, base.layers, |layer| window.is_some() && layer >= first_local)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias, bias && !glm], Some(rope.clone()));
        attention.shape.window = window.filter(|_| local[layer]);
        attention.norms = normed.then(|| base.head_norms(&module));
        let module = format!("{at}.mlp");
        let feed_forward = match layer >= dense {
            false => Layer::Mlp(base.gated(&module, inner, act, false)),
            true => {
                let experts = config.count("n_routed_experts")?;
                Layer::Moe(moe(&base, config, &module, experts, act, true, glm)?)
            }
        };
        Ok(base.usual_block(at, attention, feed_forward))
    })?;
    let mut graph = base.graph(config, if glm { "glm4_moe" } else { "dots1" }, blocks)?;
    for layer in 0..config.count_or("num_nextn_predict_layers", 0)? {
        graph.aside.push((format!("{}.", base.at(base.layers + layer)), super::FURTHER));
    }
    Ok(graph)
}
