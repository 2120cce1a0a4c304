//! Granite: Llama with four multipliers, dense or with experts, or most of its layers a state space.

use kernels::Activation;

use super::build::{Base, activation, block, pre};
use super::rope::rope;
use super::state_space::Sizes;
use super::{Config, Family, moe};
use crate::error::{Error, Result};
use crate::graph::{Graph, Layer, Linear, Mlp, Moe, Split};
use crate::json::shown;

/// Granite.
pub const GRANITE: Family =
    Family { id: "granite", model_types: &["granite"], build: |config| build(config, Kind::Dense) };

/// Granite with experts.
pub const GRANITE_MOE: Family =
    Family { id: "granitemoe", model_types: &["granitemoe"], build: |config| build(config, Kind::Experts) };

/// Granite with experts beside a feed-forward layer that every token takes.
pub const GRANITE_SHARED: Family =
    Family { id: "granitemoeshared", model_types: &["granitemoeshared"], build: |config| build(config, Kind::Shared) };

/// Granite 4, of which layers may be state spaces, with experts or without.
pub const GRANITE_HYBRID: Family =
    Family { id: "granitemoehybrid", model_types: &["granitemoehybrid"], build: |config| build(config, Kind::Hybrid) };

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Dense,
    Experts,
    Shared,
    Hybrid,
}

impl Kind {
    fn family(self) -> &'static str {
        match self {
            Kind::Dense => "granite",
            Kind::Experts => "granitemoe",
            Kind::Shared => "granitemoeshared",
            Kind::Hybrid => "granitemoehybrid",
        }
    }
}

fn build(config: &Config<'_>, kind: Kind) -> Result<Graph> {
    let base = Base::read(config)?;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let attention_bias = config.flag("attention_bias", false)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    let turns = kind != Kind::Hybrid || config.get("position_embedding_type").is_some_and(|said| said == "rope");
    let rope = turns.then(|| rope(config, base.head_dim)).transpose()?;
    let recurrent =
        if kind == Kind::Hybrid { recurrent_layers(config, base.layers)? } else { vec![false; base.layers] };
    let sizes = match recurrent.contains(&true) {
        true => Some(Sizes::read(config, config.count_or("mamba_expand", 2)? * base.hidden, act)?),
        false => None,
    };
    let multiplier = |key: &str| Ok::<f32, crate::error::Error>(config.number(key, 1.0)? as f32);
    let (residual, scale) = (multiplier("residual_multiplier")?, multiplier("attention_multiplier")?);
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mixer = match sizes.as_ref().filter(|_| recurrent[layer]) {
            Some(sizes) => Layer::Mamba(Box::new(sizes.layer(&base, &format!("{at}.mamba"))?)),
            None => {
                let mut attention =
                    base.attention(&format!("{at}.self_attn"), [attention_bias, attention_bias], rope.clone());
                attention.shape.scale = scale;
                Layer::Attention(attention)
            }
        };
        let experts = || moe::granite(&base, config, &format!("{at}.block_sparse_moe"), inner, act);
        let shared = |inner| shared(&base, &format!("{at}.shared_mlp"), inner, act);
        let feed_forward = match kind {
            Kind::Dense => Layer::Mlp(base.gated(&format!("{at}.mlp"), inner, act, mlp_bias)),
            Kind::Experts => Layer::Moe(experts()?),
            Kind::Shared => match config.count_or("shared_intermediate_size", 0)? {
                0 => Layer::Moe(experts()?),
                inner => Layer::Moe(Moe { shared: Some((shared(inner), None)), ..experts()? }),
            },
            Kind::Hybrid => {
                let shared = shared(config.count("shared_intermediate_size")?);
                match config.count_or("num_local_experts", 0)? {
                    0 => Layer::Mlp(shared),
                    _ => Layer::Moe(Moe { shared: Some((shared, None)), ..experts()? }),
                }
            }
        };
        let mut steps = vec![
            pre(base.norm(&format!("{at}.input_layernorm")), mixer),
            pre(base.norm(&format!("{at}.post_attention_layernorm")), feed_forward),
        ];
        steps.iter_mut().for_each(|step| step.scale = residual);
        Ok(block(at, steps))
    })?;
    let mut graph = base.graph(config, kind.family(), blocks)?;
    graph.embedding.scale = multiplier("embedding_multiplier")?;
    graph.head.scale = 1.0 / config.positive("logits_scaling", 1.0)? as f32;
    Ok(graph)
}

/// Which layers are state spaces: all, unless `layer_types` says otherwise.
fn recurrent_layers(config: &Config<'_>, layers: usize) -> Result<Vec<bool>> {
    let Some(types) = config.list("layer_types")? else { return Ok(vec![true; layers]) };
    if types.len() != layers {
        return Err(Error::failed(format!(
            "config.json: layer_types has {} entries, and there are {layers} layers",
            types.len()
        )));
    }
    let recurrent = types.iter().map(|kind| match kind.as_str() {
        Some("linear_attention" | "mamba") => Ok(true),
        Some("full_attention" | "attention") => Ok(false),
        _ => Err(Error::failed(format!("config.json: layer type {} is not supported", shown(kind)))),
    });
    recurrent.collect()
}

/// What every token takes: a gate and what it gates in one linear.
fn shared(base: &Base, module: &str, inner: usize, act: Activation) -> Mlp {
    let input = Linear {
        split: Split::of(&[inner, inner]),
        ..Linear::plain(format!("{module}.input_linear"), 2 * inner, base.hidden, false)
    };
    let down = Linear::plain(format!("{module}.output_linear"), base.hidden, inner, false);
    Mlp { inputs: vec![input], down, activation: act, scale: 1.0, learned: None, cut: None }
}
