//! Llama 4 (text): layers that see a chunk and layers without positions, stacked experts that are given weighed inputs.

use kernels::{Activation, NormKind};

use super::build::{Base, activation};
use super::moe::{router, stacked};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, HeadNorms, Layer, Moe, Norm, Scoring, Split, Temperature};

/// The text model of Llama 4.
pub const LLAMA4: Family = Family { id: "llama4", model_types: &["llama4_text"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let chunk = config.optional_count("attention_chunk_size")?;
    let rotated = config.rotated_layers(base.layers)?;
    let normed = config.flag("use_qk_norm", true)?;
    let tuned = config.flag("attn_temperature_tuning", true)?;
    let (floor, scale) = (config.positive("floor_scale", 8192.0)? as f32, config.number("attn_scale", 0.1)? as f32);
    let temperature = Temperature::Steps { floor, scale, first: 1 };
    let (experts, top_k) = (config.count("num_local_experts")?, config.count("num_experts_per_tok")?);
    let every = config.optional_count("interleave_moe_layer_step")?.unwrap_or(1);
    let sparse = match config.layer_list("moe_layers")? {
        Some(layers) => layers,
        None => (every - 1..base.layers).step_by(every).collect(),
    };
    let rope = rope(config, base.head_dim)?;
    let unit = Norm {
        kind: NormKind::Rms,
        weights: Vec::new(),
        offset: 0.0,
        bias: None,
        shape: vec![base.head_dim],
        eps: base.eps,
    };
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let rope = rotated[layer].then(|| rope.clone());
        let mut attention = base.attention(&format!("{at}.self_attn"), [bias, bias], rope);
        attention.layout.interleaved = true;
        attention.shape.chunk = chunk.filter(|_| rotated[layer]);
        attention.norms = (normed && rotated[layer]).then(|| HeadNorms {
            q: unit.clone(),
            k: Some(unit.clone()),
            v: None,
            per_head: true,
            after_rope: true,
        });
        attention.temperature = (tuned && !rotated[layer]).then(|| temperature.clone());
        let module = format!("{at}.feed_forward");
        let feed_forward = match sparse.contains(&layer) {
            false => Layer::Mlp(base.gated(&module, config.count("intermediate_size_mlp")?, act, false)),
            true => {
                let mut router = router(&base, format!("{module}.router"), experts, top_k, false);
                router.scoring = Scoring::Sigmoid;
                let tensors = ["gate_up_proj", "down_proj"].map(|name| format!("{module}.experts.{name}"));
                let sizes = [experts, base.hidden, inner];
                let halves = Split::of(&[inner, inner]);
                Layer::Moe(Moe {
                    router,
                    experts: stacked(&format!("{module}.experts"), tensors, [None, None], sizes, true, halves, act),
                    shared: Some((base.gated(&format!("{module}.shared_expert"), inner, act, false), None)),
                    weigh_input: true,
                    latent: None,
                    norms: None,
                })
            }
        };
        Ok(base.usual_block(at, attention, feed_forward))
    })?;
    base.graph(config, "llama4", blocks)
}
