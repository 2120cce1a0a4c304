//! EXAONE 4: norms behind the layers; in the mixed models the layers that see all have no positions.

use kernels::Activation;

use super::build::{Base, activation, sliding};
use super::rope::rope;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::Graph;

/// EXAONE 4.
pub const EXAONE4: Family = Family { id: "exaone4", model_types: &["exaone4"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let window = config.optional_count("sliding_window")?;
    // A number, or a string of L and G that is repeated.
    let pattern = config.get("sliding_window_pattern");
    let letters = pattern.and_then(|v| v.as_str()).map(str::as_bytes).filter(|text| !text.is_empty());
    let every = pattern.and_then(|v| v.as_u64()).unwrap_or(4).max(1) as usize;
    let local = sliding(config, base.layers, |layer| match letters {
        Some(text) => text[layer % text.len()] == b'L',
        None => (layer + 1) % every != 0,
    })?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let local = window.is_some() && local[layer];
        let rotated = window.is_none() || local;
        let mut attention = base.attention(&module, [false, false], rotated.then(|| rope.clone()));
        attention.shape.window = window.filter(|_| local);
        attention.norms = Some(base.head_norms(&module));
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, false);
        Ok(base.post_block(at, attention, mlp))
    })?;
    base.graph(config, "exaone4", blocks)
}
