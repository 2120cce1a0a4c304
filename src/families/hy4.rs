//! Hunyuan 4: GLM-5's attention with a gate and sinks, in streams that hyper-connections read and write; experts whose activation is clamped.

use kernels::{Activation, HyperShape};

use super::build::{Base, activation, by_type, with_experts};
use super::deepseek::{Chosen, Indexing, LatentHeads, choices, moe, rotation};
use super::moe::stacked;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{Collapse, Connection, FURTHER, Graph, Hyper, Layer, Linear, Projections, Split};
use crate::weights::Weights;

/// Hunyuan 4.
pub const HY_V4: Family = Family { id: "hy_v4", model_types: &["hy_v4"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let heads = LatentHeads::read(config, &mut base)?;
    let (rope, scale) = rotation(config, &heads)?;
    let sparse = with_experts(config, base.layers, |layer| layer > 0)?;
    let shared = by_type(config, "indexer_types", [&["full"], &["shared"]], base.layers, |n| {
        n > 0 && !(n - 1).is_multiple_of(4)
    })?;
    if shared.first() == Some(&true) {
        return Err(Error::failed("config.json: the first of indexer_types must be full: there is no layer before it"));
    }
    let further = config.count_or("num_nextn_predict_layers", 0)?;
    let choices = choices(
        config,
        &base,
        // Layers that predict further tokens choose for themselves.
        [shared, vec![false; further]].concat(),
        Indexing {
            rotated: config.count("qk_rope_head_dim")?,
            interleaved: false,
            behind: true,
            latent: true,
            eps: base.eps,
        },
    )?;
    let act = activation(config, Activation::Silu)?;
    let magnitude = config.positive("hc_magnitude", 2.0)? as f32;
    let hyper = hyper(config, &base, [magnitude, config.positive("hc_eps", 1e-6)? as f32], 0)?;
    let block = |at: String, layer: usize, sparse: bool| {
        let module = format!("{at}.self_attn");
        let mut attention = heads.attention(&base, &module, Some(rope.clone()), false);
        attention.shape.scale = scale;
        attention.choice = Some(choices(layer, &module));
        attention.sinks = Some(format!("{module}.learnable_sink_param"));
        if let Projections::Latent(latent) = &mut attention.projections {
            latent.gate = Some(Linear::plain(format!("{module}.linear_gate"), attention.o.cols, base.hidden, false));
        }
        let module = format!("{at}.mlp");
        let feed_forward = match sparse {
            false => Layer::Mlp(base.gated(&module, config.count("intermediate_size")?, act, false)),
            true => mixture(&base, config, &module, act)?,
        };
        Ok::<_, Error>(base.usual_block(at, attention, feed_forward))
    };
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut block = block(at.clone(), layer, sparse[layer])?;
        for (step, name) in block.steps.iter_mut().zip(["hc_attn_layer", "hc_mlp_layer"]) {
            step.hyper = Some(Box::new(Connection::Weighed(named(&hyper, &format!("{at}.{name}.hc_pre.hc_")))));
        }
        Ok(block)
    })?;
    let mut graph = base.graph(config, "hy_v4", blocks)?;
    let shape = HyperShape { writes: None, ..hyper.shape };
    graph.collapse = Some(Collapse::Weighed(named(&Hyper { shape, ..hyper }, "model.hc_head.hc_head_")));
    if further == 0 {
        graph.aside.push(("model.mtp_layers.".to_owned(), FURTHER));
    }
    for layer in 0..further {
        let block = block(format!("model.mtp_layers.{layer}"), base.layers + layer, true)?;
        further::append(&mut graph, &base, &further::HUNYUAN, block);
    }
    Ok(graph)
}

/// Experts in stacks, whose activation is clamped, and one for all tokens.
fn mixture(base: &Base, config: &Config<'_>, module: &str, act: Activation) -> Result<Layer> {
    let (count, inner) = (config.count("n_routed_experts")?, config.count("moe_intermediate_size")?);
    let mut moe = moe(base, config, module, count, act, Chosen::Sigmoid, true)?;
    let module = format!("{module}.experts");
    let tensors = ["gate_up_proj", "down_proj"].map(|name| format!("{module}.{name}"));
    let (sizes, halves) = ([count, base.hidden, inner], Split::of(&[inner; 2]));
    moe.experts = stacked(&module, tensors, [None, None], sizes, false, halves, clamped(config)?);
    Ok(Layer::Moe(moe))
}

/// What stands between the linears of routed experts: SwiGLU of parts that are clamped.
///
/// Fails for a limit that is not positive: transformers says that nothing is clamped then, and clamps to it all the same.
pub fn clamped(config: &Config<'_>) -> Result<Activation> {
    let limit = config.positive("swiglu_limit", 10.0)? as f32;
    Ok(Activation::SwigluOai { alpha: 1.0, limit, shift: 0.0 })
}

/// Connections to streams that are read, written with sigmoids times `factor` and `least` more, and mixed in `rounds`; without names.
pub fn hyper(config: &Config<'_>, base: &Base, [factor, least]: [f32; 2], rounds: usize) -> Result<Hyper> {
    let shape = HyperShape {
        streams: config.optional_count("hc_mult")?.unwrap_or(4),
        norm_eps: base.eps,
        eps: config.positive("hc_eps", 1e-6)? as f32,
        writes: Some([factor, least]),
        rounds,
    };
    let none = String::new;
    Ok(Hyper { projection: none(), base: none(), scale: none(), hidden: base.hidden, shape })
}

/// The same of tensors whose names begin so.
pub fn named(hyper: &Hyper, start: &str) -> Hyper {
    let [projection, base, scale] = ["fn", "base", "scale"].map(|name| format!("{start}{name}"));
    Hyper { projection, base, scale, ..hyper.clone() }
}

/// Takes the names that transformers 5 saves under, where a checkpoint has them: it turns its own renaming round in other places than those that
/// were renamed.
pub(super) fn settle(graph: &mut Graph, source: &dyn Weights) {
    const SAVED: [(&str, &str); 4] = [
        (".hc_attn_layer.hc_pre.", ".hc_pre.hc_attn_layer."),
        (".hc_mlp_layer.hc_pre.", ".hc_pre.hc_mlp_layer."),
        (".hc_head.", ".hc_pre.hc_head."),
        (".gate_proj", ".linear_gate"),
    ];
    let saved = |name: &str| SAVED.iter().fold(name.to_owned(), |name, (own, other)| name.replacen(own, other, 1));
    let Some(head) = graph.collapse.as_ref().and_then(Collapse::hyper).filter(|_| graph.family == "hy_v4") else {
        return;
    };
    let there = |name: &str| source.entry(name).is_some();
    if !there(&head.projection) && there(&saved(&head.projection)) {
        // Experts are named one by one as if they were published so.
        graph.rename(&|name| if name.contains(".experts.") { name.to_owned() } else { saved(name) });
    }
}
