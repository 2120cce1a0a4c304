//! Nemotron and Minitron: squared ReLU without a gate, layer norms that hold the difference from 1.

use kernels::{Activation, NormKind};

use super::build::{Base, activation};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// Nemotron.
pub const NEMOTRON: Family = Family { id: "nemotron", model_types: &["nemotron"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm = NormKind::Layer;
    base.norm_bias = true;
    base.norm_offset = 1.0;
    base.eps = config.positive("norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Relu2)?;
    let attention_bias = config.flag("attention_bias", false)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let attention =
            base.attention(&format!("{at}.self_attn"), [attention_bias, attention_bias], Some(rope.clone()));
        let names = ["up_proj", "down_proj"].map(|name| format!("{at}.mlp.{name}"));
        Ok(base.usual_block(at, attention, Layer::Mlp(base.ungated(names, inner, act, mlp_bias))))
    })?;
    base.graph(config, "nemotron", blocks)
}
