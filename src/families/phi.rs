//! Phi 1 and 2 (attention and feed-forward side by side), Phi 3 and 4 (fused projections).

use kernels::{Activation, NormKind};

use super::build::{Base, activation, block, pre};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, HeadNorms, Layer, Linear, Mlp, Split};

/// Phi 1, 1.5 and 2.
pub const PHI: Family = Family { id: "phi", model_types: &["phi"], build: phi };

/// Phi 3, 3.5 and 4.
pub const PHI3: Family = Family { id: "phi3", model_types: &["phi3"], build: phi3 };

fn phi(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm = NormKind::Layer;
    base.norm_bias = true;
    base.eps = config.positive("layer_norm_eps", 1e-5)? as f32;
    base.final_norm = "model.final_layernorm";
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::GeluTanh)?;
    let rope = rope(config, base.head_dim)?;
    let normed = config.flag("qk_layernorm", false)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [true, true], Some(rope.clone()));
        attention.o.module = format!("{module}.dense");
        let norm = |name: &str| base.norm_of(&format!("{module}.{name}"), base.head_dim);
        attention.norms = normed.then(|| HeadNorms {
            q: norm("q_layernorm"),
            k: Some(norm("k_layernorm")),
            v: None,
            per_head: true,
            after_rope: false,
        });
        let mlp = base.ungated(["fc1", "fc2"].map(|name| format!("{at}.mlp.{name}")), inner, act, true);
        let norm = base.norm(&format!("{at}.input_layernorm"));
        let steps = vec![pre(norm.clone(), Layer::Attention(attention)), pre(norm, Layer::Mlp(mlp))];
        let mut block = block(at, steps);
        block.parallel = true;
        Ok(block)
    })?;
    let mut graph = base.graph(config, "phi", blocks)?;
    graph.head.linear.bias = true;
    Ok(graph)
}

fn phi3(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let window = config.optional_count("sliding_window")?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let o = Linear::plain(format!("{module}.o_proj"), base.hidden, base.heads * base.head_dim, false);
        let mut attention =
            base.attention_of(vec![base.fused_qkv(format!("{module}.qkv_proj"), false)], o, Some(rope.clone()));
        attention.shape.window = window;
        let mlp = fused_gate(&base, &format!("{at}.mlp"), inner, act);
        Ok(base.usual_block(at, attention, Layer::Mlp(mlp)))
    })?;
    base.graph(config, "phi3", blocks)
}

/// `gate_up_proj` and `down_proj` under `module`.
pub fn fused_gate(base: &Base, module: &str, inner: usize, activation: Activation) -> Mlp {
    let gate_up = Linear {
        split: Split::of(&[inner, inner]),
        ..Linear::plain(format!("{module}.gate_up_proj"), 2 * inner, base.hidden, false)
    };
    let down = Linear::plain(format!("{module}.down_proj"), base.hidden, inner, false);
    Mlp { inputs: vec![gate_up], down, activation, scale: 1.0, learned: None, cut: None }
}
