//! MiniMax M2 and M3, with their layers that predict further tokens: experts chosen by sigmoids, norms of all queries and of all keys or of each
//! head, a part of each head rotated; most layers of M3 see a choice of blocks of tokens.

use kernels::{Activation, IndexShape, RopeLayout};

use super::build::{Base, activation, by_type, with_experts};
use super::moe::router;
use super::olmo::whole_norms;
use super::rope::rope;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{Choice, Graph, Indexer, Layer, Linear, Moe, Scoring};

/// MiniMax M2.
pub const MINIMAX_M2: Family = Family { id: "minimax_m2", model_types: &["minimax_m2"], build };

fn build(config: &Config<'_>) -> Result<Graph> {
    let base = Base::read(config)?;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let (experts, top_k) = (config.count("num_local_experts")?, config.count("num_experts_per_tok")?);
    let rope = rope(config, base.head_dim)?;
    let block = |layer: usize| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [false, false], Some(rope.clone()));
        attention.norms = Some(whole_norms(&base, &module));
        let module = format!("{at}.block_sparse_moe");
        let mut router = router(&base, format!("{module}.gate"), experts, top_k, true);
        router.scoring = Scoring::Sigmoid;
        router.correction = Some((format!("{module}.e_score_correction_bias"), vec![experts]));
        let expert = |e| base.gated_of(&format!("{module}.experts.{e}"), ["w1", "w3", "w2"], inner, act, false);
        let experts = (0..experts).map(expert).collect();
        base.usual_block(
            at,
            attention,
            Layer::Moe(Moe { router, experts, shared: None, weigh_input: false, latent: None, norms: None }),
        )
    };
    let mut graph = base.graph(config, "minimax_m2", base.each(|layer| Ok(block(layer)))?)?;
    for layer in base.layers..base.layers + config.count_or("num_mtp_modules", 0)? {
        further::append(&mut graph, &base, &further::DEEPSEEK, block(layer));
    }
    Ok(graph)
}

/// MiniMax M3, its language model.
pub const MINIMAX_M3: Family = Family { id: "minimax_m3", model_types: &["minimax_m3_vl_text"], build: build_m3 };

fn build_m3(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm_offset = 1.0;
    let [inner, dense, shared] =
        ["intermediate_size", "dense_intermediate_size", "shared_intermediate_size"].map(|key| config.count(key));
    let (inner, dense, shared) = (inner?, dense?, shared?);
    // Its class takes no other, whatever config.json names.
    let [alpha, limit] = [config.number("swiglu_alpha", 1.702)? as f32, config.number("swiglu_limit", 7.0)? as f32];
    let act = Activation::SwigluOai { alpha, limit, shift: 1.0 };
    let (experts, top_k) = (config.count("num_local_experts")?, config.count("num_experts_per_tok")?);
    let scale = config.number("routed_scaling_factor", 2.0)? as f32;
    let rope = rope(config, base.head_dim)?;
    let often = flags(config, "moe_layer_freq", base.layers)?;
    let sparse = with_experts(config, base.layers, |layer| often.as_ref().is_none_or(|often| often[layer]))?;
    let parts = config.object("sparse_attention_config")?;
    let of = parts.as_ref().map(|parts| flags(parts, "sparse_attention_freq", base.layers)).transpose()?.flatten();
    let kinds: [&[&str]; 2] = [&["full_attention"], &["minimax_m3_sparse"]];
    let chooses = by_type(config, "layer_types", kinds, base.layers, |layer| of.as_ref().is_some_and(|of| of[layer]))?;
    let index = index(config, &base)?;
    let block = |at: String, chooses: bool, sparse: bool| {
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [false, false], Some(rope.clone()));
        attention.norms = Some(base.head_norms(&module));
        if chooses {
            let linear =
                |name: &str, rows| Linear::plain(format!("{module}.index_{name}_proj"), rows, base.hidden, false);
            let norm = |name: &str| base.norm_of(&format!("{module}.index_{name}_norm"), index.head_dim);
            let indexer = Indexer {
                q: linear("q", index.heads * index.head_dim),
                latent: false,
                input_norm: None,
                temperature: None,
                k: Some(linear("k", index.head_dim)),
                q_norm: Some(norm("q")),
                k_norm: norm("k"),
                weights: None,
                pool: None,
                mean: false,
                shape: index,
                layout: RopeLayout { head_dim: index.head_dim, first: 0, interleaved: false },
            };
            attention.choice = Some(Choice::Own(Box::new(indexer), false));
        }
        if !sparse {
            let layer = Layer::Mlp(base.gated(&format!("{at}.mlp"), dense, act, false));
            return base.usual_block(at, attention, layer);
        }
        let module = format!("{at}.block_sparse_moe");
        let mut router = router(&base, format!("{module}.gate"), experts, top_k, true);
        router.scoring = Scoring::Sigmoid;
        router.scale = scale;
        router.correction = Some((format!("{module}.e_score_correction_bias"), vec![experts]));
        let expert = |e| base.gated_of(&format!("{module}.experts.{e}"), ["w1", "w3", "w2"], inner, act, false);
        let experts = (0..experts).map(expert).collect();
        let shared = Some((base.gated(&format!("{module}.shared_experts"), shared, act, false), None));
        let moe = Moe { router, experts, shared, latent: None, weigh_input: false, norms: None };
        base.usual_block(at, attention, Layer::Moe(moe))
    };
    let blocks = base.each(|layer| Ok(block(base.at(layer), chooses[layer], sparse[layer])))?;
    let mut graph = base.graph(config, "minimax_m3", blocks)?;
    // They choose blocks and experts, whatever layers of the model do; where config.json does not count them vLLM takes one for granted.
    for layer in 0..config.count_or("num_mtp_modules", 1)? {
        let block = block(format!("model.mtp.layers.{layer}.transformer_layer"), true, true);
        further::append(&mut graph, &base, &further::MINIMAX_M3, block);
    }
    Ok(graph)
}

/// How its indexers choose: by `sparse_attention_config`, or else by settings of their own.
///
/// Fails where the rotation turns more than their heads have, and where heads of attention do not divide among them.
fn index(config: &Config<'_>, base: &Base) -> Result<IndexShape> {
    let parts = config.object("sparse_attention_config")?;
    let size = |name: &str, own: &str| match parts.as_ref().map(|parts| parts.integer(name, -1)).transpose()? {
        Some(size) if size >= 0 => Ok(size as usize),
        _ => config.integer(own, 1).map(|size| size.max(0) as usize),
    };
    let heads = size("sparse_num_index_heads", "index_n_heads")?;
    let head_dim = size("sparse_index_dim", "index_head_dim")?;
    let shape = IndexShape {
        heads,
        head_dim,
        scale: 1.0,
        count: size("sparse_topk_blocks", "index_topk_blocks")?,
        block: size("sparse_block_size", "index_block_size")?,
        local: size("sparse_local_block", "index_local_blocks")?,
        apart: true,
        pooled: false,
        entries: false,
    };
    let rotated = (base.head_dim as f64
        * config.object("rope_parameters")?.map_or(Ok(1.0), |rope| rope.number("partial_rotary_factor", 1.0))?)
        as usize;
    if heads == 0 || !base.heads.is_multiple_of(heads) || shape.count == 0 || shape.block == 0 || rotated > head_dim {
        return Err(Error::failed(format!(
            "config.json: an indexer with {heads} heads of {head_dim} values that choose {} blocks of {} tokens for {} heads of attention, {rotated} values \
             of which are rotated, is not supported",
            shape.count, shape.block, base.heads
        )));
    }
    Ok(shape)
}

/// A flag for each layer, as 0 or 1, where there is such a list. Fails for one of another length.
fn flags(config: &Config<'_>, key: &str, layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(list) = config.list(key)? else { return Ok(None) };
    if list.len() != layers {
        return Err(Error::failed(format!(
            "config.json: {key} has {} entries, and there are {layers} layers",
            list.len()
        )));
    }
    Ok(Some(
        list.iter().map(|flag| flag.as_i64().is_some_and(|flag| flag != 0) || flag.as_bool() == Some(true)).collect(),
    ))
}
