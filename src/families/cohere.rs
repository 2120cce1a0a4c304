//! Cohere's Command R: one norm for attention and feed-forward side by side, neighbours rotated, scaled logits.

use kernels::{Activation, NormKind};

use super::build::{Base, activation, block, pre, sliding, window_of};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, HeadNorms, Layer};

/// Command R and R+, Aya.
pub const COHERE: Family = Family { id: "cohere", model_types: &["cohere"], build: |config| build(config, false) };

/// Command R7B and A: every fourth layer sees all and has no positions.
pub const COHERE2: Family = Family { id: "cohere2", model_types: &["cohere2"], build: |config| build(config, true) };

fn build(config: &Config<'_>, second: bool) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm = NormKind::Layer;
    base.eps = config.positive("layer_norm_eps", 1e-5)? as f32;
    base.tied = true;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let normed = !second && config.flag("use_qk_norm", false)?;
    let pattern = config.optional_count("sliding_window_pattern")?.unwrap_or(4);
    let local = match second {
        true => sliding(config, base.layers, |layer| (layer + 1) % pattern != 0)?,
        false => vec![false; base.layers],
    };
    let window = window_of(config, &local)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let rotated = local[layer] || !second;
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
            k: norm("k_norm", base.kv_heads),
            per_head: true,
            after_rope: false,
        });
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, false);
        let norm = base.norm(&format!("{at}.input_layernorm"));
        let mut block = block(at, vec![pre(norm.clone(), Layer::Attention(attention)), pre(norm, Layer::Mlp(mlp))]);
        block.parallel = true;
        Ok(block)
    })?;
    let mut graph = base.graph(config, if second { "cohere2" } else { "cohere" }, blocks)?;
    graph.head.scale = config.number("logit_scale", 0.0625)? as f32;
    Ok(graph)
}
