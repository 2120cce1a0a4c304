//! DeepSeek V4: attention to a window and to what stands for blocks of tokens, heavily compressed or a choice of it, whose keys are its values; experts
//! that a table names in the first layers; all in streams that hyper-connections read, write and mix.

use kernels::{Activation, HyperShape, IndexShape, NormKind, RopeLayout};

use super::build::{Base, activation, block, pre};
use super::glm5_next::mixed;
use super::hy4::{clamped, named};
use super::moe::router;
use super::names::set_aside;
use super::rope::of_kind;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{
    Attention, Choice, Collapse, Compressor, Connection, Graph, HeadNorms, Hyper, Indexer, Joint, Layer, Linear, Moe,
    Norm, Pool, Projections, Scoring, Split,
};
use crate::json::integer;
use crate::weights::Weights;

/// DeepSeek V4.
pub const DEEPSEEK_V4: Family = Family { id: "deepseek_v4", model_types: &["deepseek_v4"], build };

/// What a layer sees beside its window.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Nothing.
    Sliding,
    /// One entry for many tokens, all of them.
    Heavily,
    /// One entry for a few tokens, and of these a choice.
    Sparse,
}

impl Kind {
    const ALL: [(Kind, &str); 3] = [
        (Kind::Sliding, "sliding_attention"),
        (Kind::Heavily, "heavily_compressed_attention"),
        (Kind::Sparse, "compressed_sparse_attention"),
    ];
}

fn build(config: &Config<'_>) -> Result<Graph> {
    let mut graph = in_memory(config)?;
    graph.rename(&published);
    Ok(graph)
}

/// The model under the names that transformers has in memory.
fn in_memory(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.kv_heads = 1;
    let act = activation(config, Activation::Silu)?;
    if act != Activation::Silu {
        return Err(Error::failed("config.json: hidden_act must be silu for deepseek_v4, whose gates are clamped"));
    }
    let further = config.count_or("num_nextn_predict_layers", 1)?;
    let (kinds, rates) = (kinds(config, base.layers, further)?, rates(config)?);
    let ropes = [of_kind(config, "main", base.head_dim)?, of_kind(config, "compress", base.head_dim)?];
    let hashed = hashed(config, base.layers)?;
    let hyper = mixed(config, &base)?;
    let layer = |at: String, kind: Kind, hashed: bool| {
        let mut attention = attention(config, &base, &format!("{at}.self_attn"), kind, rates)?;
        attention.rope = Some(ropes[usize::from(kind != Kind::Sliding)].clone());
        turned(&mut attention)?;
        let moe = mixture(config, &base, &format!("{at}.mlp"), hashed)?;
        let mut steps = vec![
            pre(base.norm(&format!("{at}.input_layernorm")), Layer::Attention(attention)),
            pre(base.norm(&format!("{at}.post_attention_layernorm")), Layer::Moe(moe)),
        ];
        for (step, name) in steps.iter_mut().zip(["attn_hc", "ffn_hc"]) {
            let own = named(&hyper, &format!("{at}.{name}."));
            step.hyper = Some(Box::new(Connection::Weighed(own)));
        }
        Ok::<_, Error>(block(at, steps))
    };
    let blocks = base.each(|number| layer(base.at(number), kinds[number], hashed[number]))?;
    let mut graph = base.graph(config, DEEPSEEK_V4.id, blocks)?;
    let shape = HyperShape { writes: None, rounds: 0, ..hyper.shape };
    let ending = Hyper { shape, ..hyper.clone() };
    graph.collapse = Some(Collapse::Weighed(named(&ending, "model.hc_head.hc_")));
    for number in 0..further {
        let at = format!("mtp.{number}");
        let ending = Collapse::Weighed(named(&ending, &format!("{at}.hc_head_")));
        let block = layer(at, kinds[base.layers + number], false)?;
        further::append_with(&mut graph, &base, &further::DEEPSEEK_V4, block, Some(ending));
    }
    Ok(graph)
}

/// What each layer sees: `layer_types`, or `compress_ratios`, or else two layers that see heavily compressed entries, and then every other one;
/// and what those see that predict `further` tokens, of which only `compress_ratios` tells: nothing else but their windows otherwise.
fn kinds(config: &Config<'_>, layers: usize, further: usize) -> Result<Vec<Kind>> {
    let mut kinds = kinds_of(config, layers, further)?;
    kinds.resize(layers + further, Kind::Sliding);
    Ok(kinds)
}

fn kinds_of(config: &Config<'_>, layers: usize, further: usize) -> Result<Vec<Kind>> {
    let wrong = |key: &str, what: String| Error::failed(format!("config.json: {key} {what}"));
    if let Some(types) = config.list("layer_types")? {
        if types.len() != layers {
            return Err(wrong("layer_types", format!("has {} entries, and there are {layers} layers", types.len())));
        }
        let of = |kind: &serde_json::Value| {
            let found = Kind::ALL.iter().find(|(_, name)| kind.as_str() == Some(name));
            found
                .map(|(kind, _)| *kind)
                .ok_or_else(|| wrong("layer_types", format!("has {kind}, which is not supported")))
        };
        return types.iter().map(of).collect();
    }
    let Some(ratios) = config.list("compress_ratios")? else {
        let of = |layer: usize| if layer < 2 || layer.is_multiple_of(2) { Kind::Heavily } else { Kind::Sparse };
        return Ok((0..layers).map(of).collect());
    };
    if ratios.len() < layers {
        return Err(wrong("compress_ratios", format!("has {} entries, and there are {layers} layers", ratios.len())));
    }
    let of = |ratio: &serde_json::Value| match integer(ratio) {
        Some(0) => Ok(Kind::Sliding),
        Some(4) => Ok(Kind::Sparse),
        Some(128) => Ok(Kind::Heavily),
        _ => Err(wrong("compress_ratios", format!("has {ratio}, and only 0, 4 and 128 are known"))),
    };
    ratios.iter().take(layers + further).map(of).collect()
}

/// Tokens for each entry in layers that are heavily compressed, and in those that see a choice.
fn rates(config: &Config<'_>) -> Result<[usize; 2]> {
    let said = config.object("compress_rates")?;
    let rate = |kind: &str, legacy: &str, usual: usize| -> Result<usize> {
        let own = said.as_ref().map_or(Ok(None), |said| said.optional_count(kind))?;
        Ok(config.optional_count(legacy)?.or(own).unwrap_or(usual))
    };
    Ok([
        rate("heavily_compressed_attention", "compress_rate_hca", 128)?,
        rate("compressed_sparse_attention", "compress_rate_csa", 4)?,
    ])
}

/// In which layers a table names the experts of each token: `mlp_layer_types`, or else the first `num_hash_layers`.
fn hashed(config: &Config<'_>, layers: usize) -> Result<Vec<bool>> {
    let first = config.count_or("num_hash_layers", 3)?;
    super::build::by_type(config, "mlp_layer_types", [&["moe"], &["hash_moe"]], layers, |layer| layer < first)
}

/// Attention under `module`, not yet turned.
fn attention(config: &Config<'_>, base: &Base, module: &str, kind: Kind, rates: [usize; 2]) -> Result<Attention> {
    let [latent, groups, rank] = ["q_lora_rank", "o_groups", "o_lora_rank"].map(|key| config.count(key));
    let (latent, groups, rank) = (latent?, groups?, rank?);
    let (heads, width) = (base.heads, base.head_dim);
    if !heads.is_multiple_of(groups) {
        return Err(Error::failed(format!("config.json: {heads} heads do not divide into {groups} groups (o_groups)")));
    }
    let linear = |name: &str, rows, cols| Linear::plain(format!("{module}.{name}"), rows, cols, false);
    let narrow =
        Linear { split: Split::of(&vec![rank; groups]), ..linear("o_a_proj", groups * rank, heads / groups * width) };
    let joint = Joint {
        q: [linear("q_a_proj", latent, base.hidden), linear("q_b_proj", heads * width, latent)],
        q_norm: base.norm_of(&format!("{module}.q_a_norm"), latent),
        kv: linear("kv_proj", width, base.hidden),
        narrow,
    };
    let o = linear("o_b_proj", base.hidden, groups * rank);
    let mut attention = base.attention_of(Vec::new(), o, None);
    attention.projections = Projections::Joint(Box::new(joint));
    attention.shape.window = Some(config.count("sliding_window")?);
    attention.sinks = Some(format!("{module}.sinks"));
    attention.norms = Some(HeadNorms {
        q: Norm {
            kind: NormKind::Rms,
            weights: Vec::new(),
            offset: 0.0,
            bias: None,
            shape: vec![width],
            eps: base.eps,
        },
        k: Some(base.norm_of(&format!("{module}.kv_norm"), width)),
        v: None,
        per_head: true,
        after_rope: false,
    });
    let module = format!("{module}.compressor");
    let block = rates[usize::from(kind == Kind::Sparse)];
    let made = |module: &str, width: usize| {
        let rows = if kind == Kind::Sparse { 2 * width } else { width };
        let linear = |name: &str| Linear::plain(format!("{module}.{name}"), rows, base.hidden, false);
        let places = format!("{module}.position_bias");
        let pool = Pool { gate: linear("gate_proj"), places, overlap: kind == Kind::Sparse, first: true };
        (linear("kv_proj"), pool, base.norm_of(&format!("{module}.kv_norm"), width))
    };
    if kind != Kind::Sliding {
        let (kv, pool, norm) = made(&module, width);
        attention.beside = Some(Box::new(Compressor { kv, pool, norm, block }));
    }
    if kind == Kind::Sparse {
        let [heads, width, count] = ["index_n_heads", "index_head_dim", "index_topk"].map(|key| config.count(key));
        let (heads, head_dim, count) = (heads?, width?, count?);
        let module = format!("{module}.indexer");
        let (k, pool, k_norm) = made(&module, head_dim);
        let scale = ((head_dim * heads) as f32).powf(-0.5);
        let shape =
            IndexShape { heads, head_dim, scale, count, block, local: 0, apart: false, pooled: true, entries: true };
        let linear = |name: &str, rows, cols| Linear::plain(format!("{module}.{name}"), rows, cols, false);
        let indexer = Indexer {
            q: linear("q_b_proj", heads * head_dim, latent),
            latent: true,
            input_norm: None,
            temperature: None,
            k: Some(k),
            q_norm: None,
            k_norm,
            weights: Some(linear("scorer.weights_proj", heads, base.hidden)),
            pool: Some(pool),
            mean: false,
            shape,
            layout: RopeLayout { head_dim, first: 0, interleaved: true },
        };
        attention.choice = Some(Choice::Own(Box::new(indexer), false));
    }
    Ok(attention)
}

/// Has the last values of heads turn with their neighbours, as many as the rotation has.
///
/// Fails where heads of an indexer have fewer.
fn turned(attention: &mut Attention) -> Result<()> {
    let turned = attention.rope.as_ref().map_or(0, |rope| 2 * rope.inverse_frequencies.len());
    let last = |head_dim: usize| RopeLayout { head_dim, first: head_dim - turned, interleaved: true };
    attention.layout = last(attention.shape.head_dim);
    if let Some(Choice::Own(indexer, _)) = &mut attention.choice {
        let head_dim = indexer.shape.head_dim;
        if head_dim < turned {
            return Err(Error::failed(format!(
                "config.json: {turned} values of a head are rotated, and heads of the indexer have only {head_dim} (index_head_dim)"
            )));
        }
        indexer.layout = last(head_dim);
    }
    Ok(())
}

/// Experts and one for all tokens.
fn mixture(config: &Config<'_>, base: &Base, module: &str, hashed: bool) -> Result<Moe> {
    let [count, top_k, inner] =
        ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"].map(|key| config.count(key));
    let (count, top_k, inner) = (count?, top_k?, inner?);
    // Weights are divided by their sum whatever norm_topk_prob says.
    let mut router = router(base, format!("{module}.gate"), count, top_k, true);
    router.scale = config.number("routed_scaling_factor", 1.5)? as f32;
    router.scoring = match config.text("scoring_func")? {
        "sqrtsoftplus" => Scoring::RootSoftplus,
        "sigmoid" => Scoring::Sigmoid,
        "softmax" => Scoring::Softmax,
        other => {
            return Err(Error::failed(format!(
                "config.json: scoring_func `{other}` is not supported, only sqrtsoftplus, sigmoid and softmax"
            )));
        }
    };
    match hashed {
        true => router.table = Some((format!("{module}.gate.tid2eid"), vec![base.vocabulary, top_k])),
        false => router.correction = Some((format!("{module}.gate.e_score_correction_bias"), vec![count])),
    }
    let clamped = clamped(config)?;
    let shared = base.gated(&format!("{module}.shared_experts"), inner, clamped, config.flag("mlp_bias", false)?);
    let experts = (0..count).map(|e| base.gated(&format!("{module}.experts.{e}"), inner, clamped, false)).collect();
    Ok(Moe { router, experts, shared: Some((shared, None)), weigh_input: false, latent: None, norms: None })
}

/// Takes the names that transformers saves it under, or those that it has in memory, where a checkpoint has them.
pub(super) fn settle(graph: &mut Graph, source: &dyn Weights) -> Result<()> {
    if graph.family != DEEPSEEK_V4.id {
        return Ok(());
    }
    let there = |name: &str| source.entry(name).is_some();
    let own = "model.layers.0.input_layernorm.weight";
    if there(&published(own)) {
        // Models that also see have a tower and what stands before it.
        set_aside(graph, source, &["layers.", "norm.", "embed.", "head.", "hc_head_", "mtp."]);
    } else if there(own) || there(&saved(own)) {
        let mut other = in_memory(&Config(&super::settings(source.config())?.values))?;
        let saves = !there(own);
        // transformers knows nothing of layers that predict further tokens: whoever adds them has them as published.
        other.rename(&|name| match name {
            name if name.starts_with("mtp.") => published(name),
            name if saves => saved(name),
            name => name.to_owned(),
        });
        other.unrunnable = graph.unrunnable.take();
        *graph = other;
    }
    Ok(())
}

/// What a tensor or module is called as published.
fn published(name: &str) -> String {
    const WHOLE: [(&str, &str); 4] = [
        ("model.embed_tokens", "embed"),
        ("model.hc_head.hc_", "hc_head_"),
        ("model.norm", "norm"),
        ("lm_head", "head"),
    ];
    for (own, other) in WHOLE {
        if let Some(rest) = name.strip_prefix(own) {
            return format!("{other}{rest}");
        }
    }
    in_layers(name.strip_prefix("model.").unwrap_or(name))
}

/// What it is called as transformers saves it.
fn saved(name: &str) -> String {
    match name {
        "lm_head" => "head".to_owned(),
        "lm_head.weight" => "head.weight".to_owned(),
        name => in_layers(name).replacen(".attn.kv_norm", ".attn.norm", 1),
    }
}

/// The same within layers.
fn in_layers(name: &str) -> String {
    const PARTS: [(&str, &str); 24] = [
        (".self_attn.compressor.indexer.scorer.weights_proj", ".attn.indexer.weights_proj"),
        (".self_attn.compressor.indexer.q_b_proj", ".attn.indexer.wq_b"),
        (".self_attn.compressor.indexer.", ".attn.indexer.compressor."),
        (".self_attn.sinks", ".attn.attn_sink"),
        (".self_attn.", ".attn."),
        (".compressor.kv_norm", ".compressor.norm"),
        (".compressor.gate_proj", ".compressor.wgate"),
        (".position_bias", ".ape"),
        (".q_a_norm", ".q_norm"),
        (".q_a_proj", ".wq_a"),
        (".q_b_proj", ".wq_b"),
        (".kv_proj", ".wkv"),
        (".o_a_proj", ".wo_a"),
        (".o_b_proj", ".wo_b"),
        (".input_layernorm", ".attn_norm"),
        (".post_attention_layernorm", ".ffn_norm"),
        (".attn_hc.", ".hc_attn_"),
        (".ffn_hc.", ".hc_ffn_"),
        (".gate.e_score_correction_bias", ".gate.bias"),
        (".mlp.", ".ffn."),
        (".gate_up_proj", ".gate_up_proj"),
        (".gate_proj", ".w1"),
        (".down_proj", ".w2"),
        (".up_proj", ".w3"),
    ];
    PARTS.iter().fold(name.to_owned(), |name, (own, other)| name.replacen(own, other, 1))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config(changes: Value) -> Value {
        let mut config = json!({
            "model_type": "deepseek_v4", "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "head_dim": 32, "q_lora_rank": 32, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "sliding_window": 8, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 3,
            "partial_rotary_factor": 0.5,
        });
        changes.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        config
    }

    fn built(changes: Value) -> std::result::Result<Graph, String> {
        super::super::build(&config(changes)).map_err(|error| error.to_string())
    }

    #[test]
    fn older_keys_say_what_newer_ones_say() {
        let newer = json!({
            "layer_types": [Kind::ALL[0].1, Kind::ALL[2].1, Kind::ALL[1].1, Kind::ALL[2].1],
            "compress_rates": {"compressed_sparse_attention": 8, "heavily_compressed_attention": 16},
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        });
        let older = json!({
            "compress_ratios": [0, 4, 128, 4, 0], "compress_rate_csa": 8, "compress_rate_hca": 16, "num_hash_layers": 1,
            "partial_rotary_factor": null, "qk_rope_head_dim": 16,
        });
        let [newer, older] = [newer, older].map(|changes| built(changes).unwrap());
        assert_eq!(format!("{newer:?}"), format!("{older:?}"));
        let seen = |graph: &Graph| {
            let of = |block: &crate::graph::Block| {
                let attention = block.attention().unwrap();
                (attention.beside.as_ref().map(|beside| beside.block), attention.choice.is_some())
            };
            graph.trunk().iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(seen(&newer), [(None, false), (Some(8), true), (Some(16), false), (Some(8), true)]);
        // Where nothing is said, the rates are those of the published models.
        let usual = built(json!({})).unwrap();
        assert_eq!(seen(&usual), [(Some(128), false), (Some(128), false), (Some(128), false), (Some(4), true)]);
    }

    #[test]
    fn what_no_layer_can_be_is_refused() {
        for (changes, what) in [
            (json!({"compress_ratios": [0, 4, 128]}), "compress_ratios has 3 entries, and there are 4 layers"),
            (json!({"compress_ratios": [0, 4, 128, 64]}), "has 64, and only 0, 4 and 128 are known"),
            (json!({"layer_types": ["full_attention", "", "", ""]}), "layer_types has \"full_attention\""),
            (json!({"o_groups": 3}), "4 heads do not divide into 3 groups"),
            (json!({"index_head_dim": 8}), "heads of the indexer have only 8"),
            (json!({"scoring_func": "tanh"}), "scoring_func `tanh`"),
        ] {
            let said = built(changes).unwrap_err();
            assert!(said.contains(what), "{said}");
        }
    }

    #[test]
    fn names_are_those_of_the_published_files() {
        for (own, other) in [
            ("model.embed_tokens.weight", "embed.weight"),
            ("model.hc_head.hc_fn", "hc_head_fn"),
            ("lm_head", "head"),
            ("model.norm.weight", "norm.weight"),
            ("model.layers.1.attn_hc.base", "layers.1.hc_attn_base"),
            ("model.layers.1.self_attn.kv_norm.weight", "layers.1.attn.kv_norm.weight"),
            ("model.layers.1.self_attn.compressor.kv_norm.weight", "layers.1.attn.compressor.norm.weight"),
            ("model.layers.1.self_attn.compressor.gate_proj", "layers.1.attn.compressor.wgate"),
            ("model.layers.1.self_attn.compressor.indexer.kv_proj", "layers.1.attn.indexer.compressor.wkv"),
            ("model.layers.1.self_attn.compressor.indexer.q_b_proj", "layers.1.attn.indexer.wq_b"),
            ("model.layers.1.self_attn.compressor.indexer.scorer.weights_proj", "layers.1.attn.indexer.weights_proj"),
            ("model.layers.1.mlp.gate", "layers.1.ffn.gate"),
            ("model.layers.1.mlp.gate.e_score_correction_bias", "layers.1.ffn.gate.bias"),
            ("model.layers.1.mlp.experts.3.gate_proj", "layers.1.ffn.experts.3.w1"),
            ("mtp.0.self_attn.kv_norm.weight", "mtp.0.attn.kv_norm.weight"),
            ("mtp.0.ffn_hc.fn", "mtp.0.hc_ffn_fn"),
            ("mtp.0.hc_head_fn", "mtp.0.hc_head_fn"),
            ("mtp.0.emb.tok_emb.weight", "mtp.0.emb.tok_emb.weight"),
        ] {
            assert_eq!(published(own), other);
        }
        assert_eq!(saved("model.layers.1.self_attn.kv_norm"), "model.layers.1.attn.norm");
        assert_eq!(saved("model.hc_head.hc_fn"), "model.hc_head.hc_fn");
    }
}
