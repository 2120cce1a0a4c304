//! GLM-4 (`glm`) and GLM-4-0414 (`glm4`): half of each head rotated by neighbours, fused gate and up.

use kernels::Activation;

use super::build::{Base, activation, block, pre, sandwich};
use super::phi::fused_gate;
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// GLM-4-9B.
pub const GLM: Family = Family { id: "glm", model_types: &["glm"], build: |config| build(config, false) };

/// GLM-4-0414: norms on both sides.
pub const GLM4: Family = Family { id: "glm4", model_types: &["glm4"], build: |config| build(config, true) };

fn build(config: &Config<'_>, fourth: bool) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1.5625e-7)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut attention = base.attention(&format!("{at}.self_attn"), [bias, false], Some(rope.clone()));
        attention.layout.interleaved = true;
        let attention = Layer::Attention(attention);
        let mlp = Layer::Mlp(fused_gate(&base, &format!("{at}.mlp"), inner, act));
        let norm = |name: &str| base.norm(&format!("{at}.{name}"));
        let (first, second) = (norm("input_layernorm"), norm("post_attention_layernorm"));
        let steps = match fourth {
            false => vec![pre(first, attention), pre(second, mlp)],
            true => vec![
                sandwich(first, attention, norm("post_self_attn_layernorm")),
                sandwich(second, mlp, norm("post_mlp_layernorm")),
            ],
        };
        Ok(block(at.clone(), steps))
    })?;
    base.graph(config, if fourth { "glm4" } else { "glm" }, blocks)
}
