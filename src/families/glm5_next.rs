//! GLM-5.3-Flash: most layers have a state whose channels decay each by itself, as Kimi Linear's do, the others latent attention without positions
//! to whole blocks of tokens that an indexer chooses; all in streams that hyper-connections read, write and mix.

use kernels::{Activation, IndexShape};

use super::build::{Base, activation, block, by_type, pre, with_experts};
use super::deepseek::{Chosen, Indexing, LatentHeads, choices, moe, shared_choices};
use super::hy4::{clamped, hyper, named};
use super::kimi::delta;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{Choice, Collapse, Connection, Graph, Hyper, Layer, Linear, Pool, Projections, Stored};

/// GLM-5.3-Flash.
pub const GLM5_NEXT: Family = Family { id: "glm5_next", model_types: &["glm5_next_text"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut settings = config.0.clone();
    // Of what no position turns it says 0.
    settings.as_object_mut().map(|settings| settings.remove("head_dim"));
    let config = &Config(&settings);
    let mut base = Base::read(config)?;
    base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    let heads = LatentHeads::turned(config, &mut base, 0)?;
    if config.count_or("qk_rope_head_dim", 0)? != 0 {
        return Err(Error::failed(
            "config.json: qk_rope_head_dim must be 0: the attention of glm5_next has no positions",
        ));
    }
    let act = activation(config, Activation::Silu)?;
    if act != Activation::Silu {
        return Err(Error::failed("config.json: hidden_act must be silu for glm5_next, whose gates are clamped"));
    }
    let clamped = clamped(config)?;
    let kinds: [&[&str]; 2] = [&["indexed_attention", "full_attention"], &["linear_attention"]];
    let recurrent = by_type(config, "layer_types", kinds, base.layers, |layer| layer % 4 != 3)?;
    let sparse = with_experts(config, base.layers, |layer| layer >= 3)?;
    let further = config.count_or("num_nextn_predict_layers", 1)?;
    let mut shared = shared_choices(config, base.layers)?;
    // Layers that predict further tokens choose for themselves.
    shared.truncate(base.layers);
    shared.resize(base.layers + further, false);
    if let Some(layer) = (1..base.layers).find(|n| shared[*n] && !recurrent[*n] && recurrent[n - 1]) {
        return Err(Error::failed(format!(
            "config.json: layer {layer} takes over the choice of the layer before it (indexer_types), which is linear attention and has none"
        )));
    }
    let pooled = pooled(config, &base, shared)?;
    let hyper = mixed(config, &base)?;
    let lower = lower_bound(config)?;
    let steps = |at: &str, layer: usize, recurrent: bool, sparse: bool| {
        let module = format!("{at}.self_attn");
        let mixer = match recurrent {
            true => {
                let mut delta = delta(config, &base, &module, act)?;
                delta.decay.lower = lower;
                delta.decay.rates.1 = vec![delta.shape.value_heads];
                Layer::Delta(Box::new(delta))
            }
            false => {
                let mut attention = heads.attention(&base, &module, None, false);
                if let Projections::Latent(latent) = &mut attention.projections {
                    latent.q_norm.iter_mut().chain(&mut latent.kv_norm).for_each(|norm| norm.eps = base.eps);
                }
                attention.choice = Some(pooled(layer, &module));
                Layer::Attention(attention)
            }
        };
        let module = format!("{at}.mlp");
        let after = match sparse {
            false => Layer::Mlp(base.gated(&module, config.count("intermediate_size")?, clamped, false)),
            true => {
                let experts = config.count("n_routed_experts")?;
                Layer::Moe(moe(&base, config, &module, experts, clamped, Chosen::Sigmoid, true)?)
            }
        };
        Ok::<_, Error>(vec![
            pre(base.norm(&format!("{at}.input_layernorm")), mixer),
            pre(base.norm(&format!("{at}.post_attention_layernorm")), after),
        ])
    };
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut steps = steps(&at, layer, recurrent[layer], sparse[layer])?;
        for (step, name) in steps.iter_mut().zip(["hc_attn", "hc_ffn"]) {
            step.hyper = Some(Box::new(Connection::Weighed(named(&hyper, &format!("{at}.{name}_")))));
        }
        Ok(block(at, steps))
    })?;
    let mut graph = base.graph(config, "glm5_next", blocks)?;
    graph.collapse = Some(Collapse::Mean(hyper.shape.streams));
    for layer in base.layers..base.layers + further {
        let at = base.at(layer);
        let steps = steps(&at, layer, false, true)?;
        further::append(&mut graph, &base, &further::DEEPSEEK, block(at, steps));
    }
    Ok(graph)
}

/// What chooses whole blocks of tokens for each layer.
///
/// Fails where blocks do not divide how many tokens are chosen, and where a block that is not whole is not seen.
fn pooled<'a>(
    config: &Config<'_>,
    base: &'a Base,
    shared: Vec<bool>,
) -> Result<impl Fn(usize, &str) -> Choice + use<'a>> {
    let (block, topk) = (config.count_or("index_kpool", 16)?, config.count("index_topk")?);
    if block == 0 || !topk.is_multiple_of(block) || topk < block {
        return Err(Error::failed(format!(
            "config.json: index_topk {topk} must be a multiple of index_kpool, found {block}"
        )));
    }
    if !config.flag("index_kpool_always_select_tail", true)? {
        return Err(Error::failed(
            "config.json: index_kpool_always_select_tail must be true: the first tokens of a text would see nothing otherwise",
        ));
    }
    let choices = choices(
        config,
        base,
        shared,
        Indexing { rotated: 0, interleaved: false, behind: true, latent: true, eps: 1e-6 },
    )?;
    let whole = move |shape: IndexShape| IndexShape { count: topk / block + 1, block, pooled: true, ..shape };
    Ok(move |layer: usize, module: &str| match choices(layer, module) {
        Choice::Own(mut indexer, shared) => {
            let (tensor, width) = (format!("{module}.indexer.index_kpool_compress_gate"), indexer.shape.head_dim);
            let stored = Stored::Rows { tensor: tensor.clone(), first: 0, of: width };
            let gate = Linear { stored, ..Linear::plain(tensor, width, base.hidden, false) };
            indexer.pool = Some(Pool {
                gate,
                places: format!("{module}.indexer.index_kpool_compress_ape"),
                overlap: false,
                first: false,
            });
            indexer.shape = whole(indexer.shape);
            Choice::Own(indexer, shared)
        }
        Choice::Earlier(shape) => Choice::Earlier(whole(shape)),
    })
}

/// The least logarithm of a decay, if there is one: what `linear_attn_config` says, or `linear_lower_bound`.
fn lower_bound(config: &Config<'_>) -> Result<Option<f32>> {
    let own = match config.has("linear_lower_bound") && config.get("linear_lower_bound").is_none() {
        true => None,
        false => Some(config.number("linear_lower_bound", -5.0)?),
    };
    let lower = match config.object("linear_attn_config")? {
        None => own,
        Some(parts) => {
            let said =
                if parts.has("gate_lower_bound") { parts.get("gate_lower_bound").is_some() } else { own.is_some() };
            let safe = parts.flag("safe_gate", true)?;
            let value = parts.number("gate_lower_bound", own.unwrap_or(-5.0))?;
            (said || safe).then_some(value)
        }
    };
    match lower.map(|lower| lower as f32) {
        Some(lower) if lower < 0.0 => Ok(Some(lower)),
        None => Ok(None),
        Some(lower) => Err(Error::failed(format!(
            "config.json: linear_lower_bound must be negative, found {lower}: it bounds the logarithms of decays"
        ))),
    }
}

/// Connections to streams that are read, written and mixed; without names.
pub fn mixed(config: &Config<'_>, base: &Base) -> Result<Hyper> {
    hyper(config, base, [2.0, 0.0], config.optional_count("hc_sinkhorn_iters")?.unwrap_or(20))
}
