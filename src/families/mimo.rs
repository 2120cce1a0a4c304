//! MiMo V2 Flash: layers with a window have twice as many keys and values as the others, sinks, and positions of their own; experts are chosen as
//! DeepSeek's are.

use kernels::Activation;

use super::build::{Base, activation, sliding, with_experts};
use super::deepseek::{Chosen, moe};
use super::rope::of_kind;
use super::{Config, Family, further};
use crate::error::Result;
use crate::graph::{Graph, Layer, Linear};

/// MiMo V2 Flash.
pub const MIMO_V2_FLASH: Family = Family { id: "mimo_v2_flash", model_types: &["mimo_v2_flash"], build };

/// So many layers that predict further tokens are in published files.
const PUBLISHED: usize = 3;

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
    let block = |at: String, local: bool, sparse: bool| {
        let module = format!("{at}.self_attn");
        let own = if local { Base { kv_heads: 2 * base.kv_heads, ..base.clone() } } else { base.clone() };
        let linear = |name: &str, rows| Linear::plain(format!("{module}.{name}"), rows, base.hidden, bias);
        let linears = vec![
            linear("q_proj", own.heads * own.head_dim),
            linear("k_proj", own.kv_heads * own.head_dim),
            linear("v_proj", own.kv_heads * value_dim),
        ];
        let o = Linear::plain(format!("{module}.o_proj"), base.hidden, own.heads * value_dim, false);
        let rope = if local { near.clone() } else { full.clone() };
        let mut attention = own.attention_of(linears, o, Some(rope));
        attention.shape.value_dim = value_dim;
        attention.value_scale = value_scale;
        if local {
            attention.shape.window = Some(window);
            attention.sinks = Some(format!("{module}.attention_sink_bias"));
        }
        let module = format!("{at}.mlp");
        let after = match sparse {
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
    };
    let blocks = base.each(|layer| block(base.at(layer), local[layer], sparse[layer]))?;
    let mut graph = base.graph(config, "mimo_v2_flash", blocks)?;
    // How many there are config.json of published files does not tell.
    for layer in 0..config.count_or("num_nextn_predict_layers", PUBLISHED)? {
        let mut block = block(format!("model.mtp.layers.{layer}"), true, false)?;
        block.steps[1].pre = Some(base.norm(&format!("{}.pre_mlp_layernorm", block.name)));
        further::append(&mut graph, &base, &further::MIMO_V2, block);
    }
    Ok(graph)
}
