//! EXAONE 4, and K-EXAONE with experts: in the mixed models the layers that see all have no positions.

use kernels::Activation;

use super::build::{Base, activation, sliding, with_experts};
use super::deepseek::{Chosen, moe};
use super::rope::rope;
use super::{Config, Family, further};
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// EXAONE 4: norms behind the layers.
pub const EXAONE4: Family = Family { id: "exaone4", model_types: &["exaone4"], build: |config| build(config, false) };

/// K-EXAONE: norms before the layers, and DeepSeek V3's experts.
pub const EXAONE_MOE: Family =
    Family { id: "exaone_moe", model_types: &["exaone_moe"], build: |config| build(config, true) };

fn build(config: &Config<'_>, second: bool) -> Result<Graph> {
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
    let dense = config.count_or("first_k_dense_replace", 1)?;
    let sparse = match second {
        true => with_experts(config, base.layers, |layer| layer >= dense)?,
        false => vec![false; base.layers],
    };
    let rope = rope(config, base.head_dim)?;
    let block = |at: String, local: bool, sparse: bool| {
        let module = format!("{at}.self_attn");
        let local = window.is_some() && local;
        let rotated = window.is_none() || local;
        let mut attention = base.attention(&module, [false, false], rotated.then(|| rope.clone()));
        attention.shape.window = window.filter(|_| local);
        attention.norms = Some(base.head_norms(&module));
        let module = format!("{at}.mlp");
        let feed_forward = match sparse {
            false => Layer::Mlp(base.gated(&module, inner, act, false)),
            true => {
                let experts = config.count("num_experts")?;
                let mut moe = moe(&base, config, &module, experts, act, Chosen::Sigmoid, true)?;
                let shared = config.count_or("num_shared_experts", 1)? * config.count("moe_intermediate_size")?;
                moe.router.correction = Some((format!("{module}.e_score_correction_bias"), vec![experts]));
                moe.shared =
                    (shared > 0).then(|| (base.gated(&format!("{module}.shared_experts"), shared, act, false), None));
                Layer::Moe(moe)
            }
        };
        Ok(match second {
            true => base.usual_block(at, attention, feed_forward),
            false => base.post_block(at, attention, feed_forward),
        })
    };
    let blocks = base.each(|layer| block(base.at(layer), local[layer], sparse[layer]))?;
    let mut graph = base.graph(config, if second { "exaone_moe" } else { "exaone4" }, blocks)?;
    if second {
        // Of one layer it is known what it sees; several share what comes before and behind them, and may be one.
        let sees = config.list("mtp_layer_types")?.and_then(|types| types.first()?.as_str());
        let sees = sees.filter(|sees| ["sliding_attention", "full_attention"].contains(sees));
        let further = config.count_or("num_nextn_predict_layers", 1)?;
        if let Some(sees) = sees.filter(|_| further > 0) {
            let last = block("mtp.layers.0".to_owned(), sees == "sliding_attention", false)?;
            further::append(&mut graph, &base, &further::QWEN, last);
        }
        further::aside_unless_one(&mut graph, "mtp.", sees.map_or(0, |_| further));
    }
    Ok(graph)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::families::build;

    #[test]
    fn kinds_of_layers_are_one_of_two_for_each_layer() {
        let of = |key: &str, kinds: Value| {
            let mut config = json!({
                "model_type": "exaone_moe", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
                "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 10, "num_experts": 2, "num_experts_per_tok": 1,
            });
            config[key] = kinds;
            build(&config).map(|graph| graph.has_experts()).map_err(|error| error.to_string())
        };
        assert_eq!(of("mlp_layer_types", json!(["dense", "dense"])), Ok(false));
        assert_eq!(of("mlp_layer_types", json!(["dense", "sparse"])), Ok(true));
        let one = of("mlp_layer_types", json!(["sparse"])).unwrap_err();
        assert!(one.contains("mlp_layer_types has 1 entries, and there are 2 layers"), "{one}");
        let other = of("mlp_layer_types", json!(["dense", "thick"])).unwrap_err();
        assert!(other.contains("layer type \"thick\" is not supported"), "{other}");
        assert!(of("layer_types", json!(["dense", "sparse"])).unwrap_err().contains("\"dense\" is not supported"));
    }
}
