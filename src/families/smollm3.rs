//! SmolLM3: Llama of which every fourth layer has no positions.

use kernels::Activation;

use super::build::{Base, activation, sliding};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// SmolLM3.
pub const SMOLLM3: Family = Family { id: "smollm3", model_types: &["smollm3"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.tied = true;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let (attention_bias, mlp_bias) = (config.flag("attention_bias", false)?, config.flag("mlp_bias", false)?);
    let rotated = config.rotated_layers(base.layers)?;
    let window = match config.flag("use_sliding_window", false)? {
        true => config.optional_count("sliding_window")?,
        false => None,
    };
    let local = sliding(config, base.layers, |layer| !rotated[layer])?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let rope = rotated[layer].then(|| rope.clone());
        let mut attention = base.attention(&format!("{at}.self_attn"), [attention_bias, attention_bias], rope);
        attention.shape.window = window.filter(|_| local[layer]);
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, mlp_bias);
        Ok(base.usual_block(at, attention, Layer::Mlp(mlp)))
    })?;
    base.graph(config, "smollm3", blocks)
}
