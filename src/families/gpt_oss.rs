//! gpt-oss: sinks in the softmax, layers that see a window alternate, stacked experts with biases.

use kernels::Activation;

use super::build::{Base, sliding, window_of};
use super::moe::{router, stacked};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer, Moe, Split};

/// gpt-oss.
pub const GPT_OSS: Family = Family { id: "gpt_oss", model_types: &["gpt_oss"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let (experts, top_k) = (config.count("num_local_experts")?, config.count("num_experts_per_tok")?);
    let bias = config.flag("attention_bias", true)?;
    let activation = Activation::SwigluOai {
        alpha: config.number("swiglu_alpha", 1.702)? as f32,
        limit: config.number("swiglu_limit", 7.0)? as f32,
        shift: 1.0,
    };
    let local = sliding(config, base.layers, |layer| layer % 2 == 0)?;
    let window = window_of(config, &local)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        attention.shape.window = window.filter(|_| local[layer]);
        attention.sinks = Some(format!("{module}.sinks"));
        let mut router = router(&base, format!("{at}.mlp.router"), experts, top_k, true);
        router.linear.bias = true;
        let module = format!("{at}.mlp.experts");
        let names = ["gate_up_proj", "down_proj"];
        let experts = stacked(
            &module,
            names.map(|name| format!("{module}.{name}")),
            names.map(|name| Some(format!("{module}.{name}_bias"))),
            [experts, base.hidden, inner],
            true,
            // Gate and up alternate.
            Split { times: inner, lengths: vec![1, 1] },
            activation,
        );
        let moe = Moe { router, experts, shared: None, weigh_input: false, latent: None, norms: None };
        Ok(base.usual_block(at, attention, Layer::Moe(moe)))
    })?;
    base.graph(config, "gpt_oss", blocks)
}
