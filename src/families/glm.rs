//! GLM-4 (`glm`), GLM-4-0414 (`glm4`) and the language model of GLM-4.1V (`glm4v`): heads, or half of them, rotated by neighbours, fused
//! gate and up.

use kernels::Activation;

use super::build::{Base, activation, block, pre, sandwich};
use super::phi::fused_gate;
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// GLM-4-9B.
pub const GLM: Family = Family { id: "glm", model_types: &["glm"], build: |config| build(config, "glm") };

/// GLM-4-0414: norms on both sides.
pub const GLM4: Family = Family { id: "glm4", model_types: &["glm4"], build: |config| build(config, "glm4") };

/// The language model of GLM-4.1V and GLM-4.6V-Flash: GLM-4-0414 whose queries, keys and values always have biases.
pub const GLM4V: Family = Family { id: "glm4v", model_types: &["glm4v_text"], build: |config| build(config, "glm4v") };

fn build(config: &Config<'_>, family: &'static str) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", if family == "glm4v" { 1e-5 } else { 1.5625e-7 })? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = family == "glm4v" || config.flag("attention_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut attention = base.attention(&format!("{at}.self_attn"), [bias, false], Some(rope.clone()));
        attention.layout.interleaved = true;
        let attention = Layer::Attention(attention);
        let mlp = Layer::Mlp(fused_gate(&base, &format!("{at}.mlp"), inner, act));
        let norm = |name: &str| base.norm(&format!("{at}.{name}"));
        let (first, second) = (norm("input_layernorm"), norm("post_attention_layernorm"));
        let steps = match family {
            "glm" => vec![pre(first, attention), pre(second, mlp)],
            _ => vec![
                sandwich(first, attention, norm("post_self_attn_layernorm")),
                sandwich(second, mlp, norm("post_mlp_layernorm")),
            ],
        };
        Ok(block(at.clone(), steps))
    })?;
    base.graph(config, family, blocks)
}
