//! MiMo V2 Flash: layers with a window have twice as many keys and values as the others, sinks, and positions of their own; experts are chosen as
//! DeepSeek's are.

use kernels::Activation;

use super::build::{Base, activation, sliding, with_experts};
use super::deepseek::{Chosen, moe};
use super::rope::of_kind;
use super::{Config, Family};
use crate::error::Result;
use crate::graph::{Graph, Layer, Linear};

/// MiMo V2 Flash.
pub const MIMO_V2_FLASH: Family = Family { id: "mimo_v2_flash", model_types: &["mimo_v2_flash"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let base = Base::read(config)?;
    let value_dim = config.count("v_head_dim")?;
    let bias = config.flag("attention_bias", false)?;
    let act = activation(config, Activation::Silu)?;
    let local = sliding(config, base.layers, |layer| layer > 0 && !(layer + 1).is_multiple_of(6))?;
    let sparse = with_experts(config, base.layers, |layer| layer > 0)?;
    // Which counts the query itself.
    let before = config.optional_count("sliding_window_size")?.map(|before| before + 1);
    let window = before.map_or_else(|| config.count("sliding_window"), Ok)?;
    let value_scale = config.number("attention_value_scale", 1.0)? as f32;
    let ropes = ["full_attention", "sliding_attention"].map(|kind| of_kind(config, kind, base.head_dim));
    let [full, near] = ropes;
    let (full, near) = (full?, near?);
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let own = if local[layer] { Base { kv_heads: 2 * base.kv_heads, ..base.clone() } } else { base.clone() };
        let linear = |name: &str, rows| Linear::plain(format!("{module}.{name}"), rows, base.hidden, bias);
        let linears = vec![
            linear("q_proj", own.heads * own.head_dim),
            linear("k_proj", own.kv_heads * own.head_dim),
            linear("v_proj", own.kv_heads * value_dim),
        ];
        let o = Linear::plain(format!("{module}.o_proj"), base.hidden, own.heads * value_dim, false);
        let rope = if local[layer] { near.clone() } else { full.clone() };
        let mut attention = own.attention_of(linears, o, Some(rope));
        attention.shape.value_dim = value_dim;
        attention.value_scale = value_scale;
        if local[layer] {
            attention.shape.window = Some(window);
            attention.sinks = Some(format!("{module}.attention_sink_bias"));
        }
        let module = format!("{at}.mlp");
        let after = match sparse[layer] {
            false => Layer::Mlp(base.gated(&module, config.count("intermediate_size")?, act, false)),
            true => {
                let experts = config.count("n_routed_experts")?;
                let mut moe = moe(&base, config, &module, experts, act, Chosen::Sigmoid, true)?;
                // Its class has none, whatever is said.
                moe.shared = None;
                Layer::Moe(moe)
            }
        };
        Ok(base.usual_block(at, attention, after))
    })?;
    let mut graph = base.graph(config, "mimo_v2_flash", blocks)?;
    graph.aside.push(("model.mtp.".to_owned(), crate::graph::FURTHER));
    Ok(graph)
}
