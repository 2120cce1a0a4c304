//! Qwen2, Qwen2.5 and Qwen3: biases on q, k and v, or norms of them.

use kernels::Activation;

use super::build::{Base, activation, sliding};
use super::rope::rope;
use super::{Config, Family, further};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// Qwen2 and 2.5, and MiMo with its layers that predict further tokens.
pub const QWEN2: Family =
    Family { id: "qwen2", model_types: &["qwen2", "mimo"], build: |config| build(config, "qwen2", 1e-6) };

/// The language models of Qwen2-VL and 2.5-VL.
pub const QWEN2_VL: Family = Family {
    id: "qwen2_vl",
    model_types: &["qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"],
    build: |config| build(config, "qwen2_vl", 1e-5),
};

/// Qwen3.
pub const QWEN3: Family = Family { id: "qwen3", model_types: &["qwen3"], build: |config| build(config, "qwen3", 1e-6) };

/// The language model of Qwen3-VL.
pub const QWEN3_VL: Family =
    Family { id: "qwen3_vl", model_types: &["qwen3_vl_text"], build: |config| build(config, "qwen3_vl", 1e-6) };

fn build(config: &Config<'_>, family: &'static str, eps: f64) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", eps)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let normed = matches!(family, "qwen3" | "qwen3_vl");
    let biases = match normed {
        false => [true, false],
        true => [config.flag("attention_bias", false)?; 2],
    };
    let windows = windows(config, base.layers)?;
    let rope = rope(config, base.head_dim)?;
    let block = |at: String, window: Option<usize>| {
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, biases, Some(rope.clone()));
        attention.shape.window = window;
        attention.norms = normed.then(|| base.head_norms(&module));
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, false);
        base.usual_block(at, attention, Layer::Mlp(mlp))
    };
    let blocks = base.each(|layer| Ok(block(base.at(layer), windows[layer])))?;
    let mut graph = base.graph(config, family, blocks)?;
    let further = if family == "qwen2" { config.count_or("num_nextn_predict_layers", 0)? } else { 0 };
    for layer in 0..further {
        further::append(&mut graph, &base, &further::MIMO, block(format!("model.mtp_layers.{layer}"), None));
    }
    Ok(graph)
}

/// The window of each layer: from layer `max_window_layers` on, if windows are used at all.
fn windows(config: &Config<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
    if !config.flag("use_sliding_window", false)? {
        return Ok(vec![None; layers]);
    }
    let Some(window) = config.optional_count("sliding_window")? else { return Ok(vec![None; layers]) };
    let first = config.count_or("max_window_layers", 28)?;
    let sliding = sliding(config, layers, |layer| layer >= first)?;
    Ok(sliding.into_iter().map(|sliding| sliding.then_some(window)).collect())
}
