//! dots.llm1, GLM-4.5 and Solar Open: the usual attention, with or without norms of heads, and DeepSeek V3's experts.

use kernels::Activation;

use super::build::{Base, activation, sliding};
use super::deepseek::{Chosen, moe};
use super::rope::rope;
use super::{Config, Family, further};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// dots.llm1.
pub const DOTS1: Family = Family { id: "dots1", model_types: &["dots1"], build: |config| build(config, "dots1") };

/// GLM-4.5, 4.6 and 4.7.
pub const GLM4_MOE: Family =
    Family { id: "glm4_moe", model_types: &["glm4_moe"], build: |config| build(config, "glm4_moe") };

/// The language model of GLM-4.5V and GLM-4.6V: no norms of queries and keys.
pub const GLM4V_MOE: Family =
    Family { id: "glm4v_moe", model_types: &["glm4v_moe_text"], build: |config| build(config, "glm4v_moe") };

/// Solar Open: experts in every layer.
pub const SOLAR_OPEN: Family =
    Family { id: "solar_open", model_types: &["solar_open"], build: |config| build(config, "solar_open") };

fn build(config: &Config<'_>, family: &'static str) -> Result<Graph> {
    let mut base = Base::read(config)?;
    let dots = family == "dots1";
    base.eps = config.positive("rms_norm_eps", if dots { 1e-6 } else { 1e-5 })? as f32;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", family == "glm4v_moe")?;
    // Solar Open's class has no such settings, whatever config.json says.
    let (normed, dense) = match family {
        "glm4_moe" => (config.flag("use_qk_norm", false)?, config.count_or("first_k_dense_replace", 1)?),
        "glm4v_moe" => (false, config.count_or("first_k_dense_replace", 1)?),
        "solar_open" => (false, 0),
        _ => (true, config.count_or("first_k_dense_replace", 0)?),
    };
    let rope = rope(config, base.head_dim)?;
    let window = if dots { config.optional_count("sliding_window")? } else { None };
    let first_local = config.count_or("max_window_layers", 62)?;
    let local = sliding(config, base.layers, |layer| window.is_some() && layer >= first_local)?;
    let block = |at: String, local: bool, sparse: bool| {
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias, bias && dots], Some(rope.clone()));
        attention.shape.window = window.filter(|_| local);
        attention.norms = normed.then(|| base.head_norms(&module));
        let module = format!("{at}.mlp");
        let feed_forward = match sparse {
            false => Layer::Mlp(base.gated(&module, config.count("intermediate_size")?, act, false)),
            true => {
                let experts = config.count("n_routed_experts")?;
                Layer::Moe(moe(&base, config, &module, experts, act, Chosen::Sigmoid, !dots)?)
            }
        };
        Ok(base.usual_block(at, attention, feed_forward))
    };
    let blocks = base.each(|layer| block(base.at(layer), local[layer], layer >= dense))?;
    let mut graph = base.graph(config, family, blocks)?;
    for layer in 0..config.count_or("num_nextn_predict_layers", 0)? {
        further::append(&mut graph, &base, &further::DEEPSEEK, block(base.at(base.layers + layer), false, true)?);
    }
    Ok(graph)
}
