//! AFMoE (Trinity of Arcee AI): gated attention that sees a window and positions, or all and none, norms around every layer, and experts that
//! are chosen by sigmoids.

use kernels::Activation;

use super::build::{Base, activation, block, sandwich, sliding, window_of};
use super::moe::router;
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer, Linear, Moe, Projections, Scoring};

/// AFMoE.
pub const AFMOE: Family = Family { id: "afmoe", model_types: &["afmoe"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let base = Base::read(config)?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let every = config.optional_count("global_attn_every_n_layers")?.unwrap_or(4);
    let local = sliding(config, base.layers, |layer| (layer + 1) % every != 0)?;
    let window = window_of(config, &local)?;
    let inner = config.count("intermediate_size")?;
    let dense = config.count_or("num_dense_layers", 1)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias; 2], Some(rope.clone()).filter(|_| local[layer]));
        attention.norms = Some(base.head_norms(&module));
        attention.shape.window = window.filter(|_| local[layer]);
        // The gate is a linear of its own, behind that of the queries.
        if let Projections::Direct(linears) = &mut attention.projections {
            let gate = Linear::plain(format!("{module}.gate_proj"), base.heads * base.head_dim, base.hidden, false);
            linears.insert(1, gate);
            attention.gated = true;
        }
        let module = format!("{at}.mlp");
        let feed_forward = match layer < dense {
            true => Layer::Mlp(base.gated(&module, inner, act, false)),
            false => Layer::Moe(mixture(&base, config, &module, act)?),
        };
        let norm = |name: &str| base.norm(&format!("{at}.{name}"));
        let steps = vec![
            sandwich(norm("input_layernorm"), Layer::Attention(attention), norm("post_attention_layernorm")),
            sandwich(norm("pre_mlp_layernorm"), feed_forward, norm("post_mlp_layernorm")),
        ];
        Ok(block(at.clone(), steps))
    })?;
    let mut graph = base.graph(config, "afmoe", blocks)?;
    if config.flag("mup_enabled", false)? {
        graph.embedding.scale = (base.hidden as f32).sqrt();
    }
    Ok(graph)
}

fn mixture(base: &Base, config: &Config<'_>, module: &str, act: Activation) -> Result<Moe> {
    let (count, inner) = (config.count("num_experts")?, config.count("moe_intermediate_size")?);
    let mut router = router(base, format!("{module}.router.gate"), count, config.count("num_experts_per_tok")?, true);
    router.scoring = Scoring::Sigmoid;
    router.scale = config.number("route_scale", 1.0)? as f32;
    router.correction = Some((format!("{module}.expert_bias"), vec![count]));
    let experts = (0..count).map(|e| base.gated(&format!("{module}.experts.{e}"), inner, act, false)).collect();
    let shared = match config.count_or("num_shared_experts", 0)? {
        0 => None,
        count => Some((base.gated(&format!("{module}.shared_experts"), inner * count, act, false), None)),
    };
    Ok(Moe { router, experts, shared, weigh_input: false, latent: None, norms: None })
}
