//! ERNIE 4.5, dense and with experts: Llama whose heads rotate neighbours.

use kernels::Activation;

use super::build::{Base, activation};
use super::moe::router;
use super::rope::rope;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{FURTHER, Graph, Layer, Moe};

/// ERNIE 4.5.
pub const ERNIE4_5: Family =
    Family { id: "ernie4_5", model_types: &["ernie4_5"], build: |config| build(config, false) };

/// ERNIE 4.5 with experts.
pub const ERNIE4_5_MOE: Family =
    Family { id: "ernie4_5_moe", model_types: &["ernie4_5_moe"], build: |config| build(config, true) };

fn build(config: &Config<'_>, sparse: bool) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.tied = true;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("use_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let every = config.optional_count("moe_layer_interval")?.unwrap_or(1);
    let first = config.count_or("moe_layer_start_index", 1)?;
    // Minus one is the last layer.
    let last = match config.integer("moe_layer_end_index", -1)? {
        last if last >= 0 => last as usize,
        _ => base.layers,
    };
    let block = |at: String, sparse: bool| {
        let mut attention = base.attention(&format!("{at}.self_attn"), [bias, bias], Some(rope.clone()));
        attention.layout.interleaved = true;
        let module = format!("{at}.mlp");
        let feed_forward = match sparse {
            false => Layer::Mlp(base.gated(&module, inner, act, bias)),
            true => Layer::Moe(moe(&base, config, &module, act, bias)?),
        };
        Ok(base.usual_block(at, attention, feed_forward))
    };
    let has_experts = |layer: usize| sparse && (layer + 1).is_multiple_of(every) && (first..=last).contains(&layer);
    let blocks = base.each(|layer| block(base.at(layer), has_experts(layer)))?;
    let mut graph = base.graph(config, if sparse { "ernie4_5_moe" } else { "ernie4_5" }, blocks)?;
    graph.head.linear.bias = sparse && bias;
    match config.count_or("num_nextn_predict_layers", 0)? {
        // Where there are biases, runtimes do not agree on one of the projection.
        further if further > 0 && !bias => {
            for layer in 0..further {
                let block = block(format!("model.mtp_block.{layer}"), false)?;
                further::append(&mut graph, &base, &further::ERNIE, block);
            }
        }
        _ => graph.aside.push(("model.mtp_".to_owned(), FURTHER)),
    }
    Ok(graph)
}

fn moe(base: &Base, config: &Config<'_>, module: &str, act: Activation, bias: bool) -> Result<Moe> {
    let inner = config.count("moe_intermediate_size")?;
    let experts = config.count("moe_num_experts")?;
    let least = config.number("moe_norm_min", 1e-12)?;
    // The sum of the weights of the chosen experts is far above what the setting guards against.
    if least > 1e-6 {
        return Err(Error::failed(format!(
            "config.json: moe_norm_min is {least}, and only a sum of the experts' weights that it does not change can be run \
             (up to 0.000001)"
        )));
    }
    let mut router = router(base, format!("{module}.gate"), experts, config.count("moe_k")?, true);
    router.correction = Some((format!("{module}.moe_statics.e_score_correction_bias"), vec![1, experts]));
    let shared = config.count_or("moe_num_shared_experts", 2)?;
    let shared =
        (shared > 0).then(|| (base.gated(&format!("{module}.shared_experts"), shared * inner, act, bias), None));
    let experts = (0..experts).map(|e| base.gated(&format!("{module}.experts.{e}"), inner, act, false)).collect();
    Ok(Moe { router, experts, shared, weigh_input: false, latent: None, norms: None })
}
