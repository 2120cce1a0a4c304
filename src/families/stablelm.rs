//! StableLM 2: layer norms, a quarter of each head rotated.

use kernels::{Activation, NormKind};

use super::build::{Base, activation, block, pre};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, HeadNorms, Layer, Norm};

/// StableLM.
pub const STABLELM: Family = Family { id: "stablelm", model_types: &["stablelm"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm = NormKind::Layer;
    base.norm_bias = true;
    base.eps = config.positive("layer_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("use_qkv_bias", false)?;
    let parallel = config.flag("use_parallel_residual", false)?;
    let normed = config.flag("qk_layernorm", false)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias, false], Some(rope.clone()));
        // A norm for every head, each with a weight of its own.
        let norm = |name: &str, heads: usize| Norm {
            weights: (0..heads).map(|head| format!("{module}.{name}.norms.{head}.weight")).collect(),
            bias: None,
            ..base.norm_of("", base.head_dim)
        };
        attention.norms = normed.then(|| HeadNorms {
            q: norm("q_layernorm", base.heads),
            k: Some(norm("k_layernorm", base.kv_heads)),
            v: None,
            per_head: true,
            after_rope: false,
        });
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, false);
        let first = base.norm(&format!("{at}.input_layernorm"));
        let second = match parallel {
            true => first.clone(),
            false => base.norm(&format!("{at}.post_attention_layernorm")),
        };
        let mut block = block(at, vec![pre(first, Layer::Attention(attention)), pre(second, Layer::Mlp(mlp))]);
        block.parallel = parallel;
        Ok(block)
    })?;
    base.graph(config, "stablelm", blocks)
}
