//! Granite: Llama with four multipliers, dense or with experts.

use kernels::Activation;

use super::build::{Base, activation, block, pre};
use super::rope::rope;
use super::{Config, Family, moe};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// Granite.
pub const GRANITE: Family = Family { id: "granite", model_types: &["granite"], build: |config| build(config, false) };

/// Granite with experts.
pub const GRANITE_MOE: Family =
    Family { id: "granitemoe", model_types: &["granitemoe"], build: |config| build(config, true) };

fn build(config: &Config<'_>, experts: bool) -> Result<Graph> {
    let base = Base::read(config)?;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let attention_bias = config.flag("attention_bias", false)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let multiplier = |key: &str| Ok::<f32, crate::error::Error>(config.number(key, 1.0)? as f32);
    let (residual, scale) = (multiplier("residual_multiplier")?, multiplier("attention_multiplier")?);
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut attention =
            base.attention(&format!("{at}.self_attn"), [attention_bias, attention_bias], Some(rope.clone()));
        attention.shape.scale = scale;
        let feed_forward = match experts {
            false => Layer::Mlp(base.gated(&format!("{at}.mlp"), inner, act, mlp_bias)),
            true => Layer::Moe(moe::granite(&base, config, &format!("{at}.block_sparse_moe"), inner, act)?),
        };
        let mut steps = vec![
            pre(base.norm(&format!("{at}.input_layernorm")), Layer::Attention(attention)),
            pre(base.norm(&format!("{at}.post_attention_layernorm")), feed_forward),
        ];
        steps.iter_mut().for_each(|step| step.scale = residual);
        Ok(block(at, steps))
    })?;
    let mut graph = base.graph(config, if experts { "granitemoe" } else { "granite" }, blocks)?;
    graph.embedding.scale = multiplier("embedding_multiplier")?;
    graph.head.scale = 1.0 / config.positive("logits_scaling", 1.0)? as f32;
    Ok(graph)
}
