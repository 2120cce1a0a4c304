//! LFM2 and LFM3 of Liquid AI: most layers are gated short convolutions, the others attention; dense or with experts.

use kernels::Activation;

use super::build::{Base, block, pre};
use super::moe::router;
use super::rope::{of_kind, rope};
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{
    Attention, Convolution, Graph, HeadNorms, Layer, Linear, Moe, Rope, Scoring, ShortConvolution, Split,
};
use crate::json::shown;

/// LFM2.
pub const LFM2: Family = Family { id: "lfm2", model_types: &["lfm2"], build: |config| build(config, false) };

/// LFM2 with experts.
pub const LFM2_MOE: Family = Family { id: "lfm2_moe", model_types: &["lfm2_moe"], build: |config| build(config, true) };

/// LFM3, whose attention sees a window in some layers.
pub const LFM3: Family = Family { id: "lfm3", model_types: &["lfm3"], build: third };

fn build(config: &Config<'_>, experts: bool) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("norm_eps", 1e-5)? as f32;
    base.final_norm = "model.embedding_norm";
    base.tied = true;
    let seeing = seeing(config, &base, experts)?;
    let taps = config.count("conv_L_cache")?;
    let bias = config.flag("conv_bias", false)?;
    let inner = if experts { config.count("intermediate_size")? } else { inner(config)? };
    let dense = if experts { config.count_or("num_dense_layers", 2)? } else { base.layers };
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mixer = match seeing[layer] {
            true => Layer::Attention(attention(&base, &format!("{at}.self_attn"), rope.clone())),
            false => Layer::Short(Box::new(short(&base, &format!("{at}.conv"), taps, bias))),
        };
        let module = format!("{at}.feed_forward");
        let feed_forward = match layer < dense {
            true => Layer::Mlp(base.gated_of(&module, NAMES, inner, Activation::Silu, false)),
            false => Layer::Moe(mixture(&base, config, &module)?),
        };
        let steps = vec![
            pre(base.norm(&format!("{at}.operator_norm")), mixer),
            pre(base.norm(&format!("{at}.ffn_norm")), feed_forward),
        ];
        Ok(block(at, steps))
    })?;
    base.graph(config, if experts { "lfm2_moe" } else { "lfm2" }, blocks)
}

/// Linears of a feed-forward layer: the gate, what it gates, and back.
const NAMES: [&str; 3] = ["w1", "w3", "w2"];

/// Which layers have attention: by `layer_types`, or else `full_attn_idxs`, or all.
fn seeing(config: &Config<'_>, base: &Base, experts: bool) -> Result<Vec<bool>> {
    let Some(types) = config.list("layer_types")? else {
        if experts {
            return Err(Error::failed("config.json: layer_types must be a list, found nothing".to_owned()));
        }
        let listed = config.layer_list("full_attn_idxs")?;
        let seeing = |layer| listed.as_ref().is_none_or(|listed| listed.contains(&layer));
        return Ok((0..base.layers).map(seeing).collect());
    };
    if types.len() != base.layers {
        let (found, layers) = (types.len(), base.layers);
        return Err(Error::failed(format!(
            "config.json: layer_types has {found} entries, and there are {layers} layers"
        )));
    }
    let seeing = types.iter().map(|kind| match kind.as_str() {
        Some("full_attention" | "attention") => Ok(true),
        Some("conv") => Ok(false),
        _ => Err(Error::failed(format!("config.json: layer type {} is not supported", shown(kind)))),
    });
    seeing.collect()
}

/// The width of feed-forward layers, which `block_auto_adjust_ff_dim` makes two thirds of what is said, in whole multiples.
fn inner(config: &Config<'_>) -> Result<usize> {
    let said = config.count("intermediate_size")?;
    if !config.flag("block_auto_adjust_ff_dim", true)? {
        return Ok(said);
    }
    let adjusted = 2 * said / 3;
    if config.has("block_ffn_dim_multiplier") && config.get("block_ffn_dim_multiplier").is_none() {
        return Ok(adjusted);
    }
    let multiplied = (config.positive("block_ffn_dim_multiplier", 1.0)? * adjusted as f64) as usize;
    let multiple = config.optional_count("block_multiple_of")?.unwrap_or(256);
    Ok(multiplied.div_ceil(multiple) * multiple)
}

fn attention(base: &Base, module: &str, rope: std::sync::Arc<Rope>) -> Attention {
    let mut attention = base.attention(module, [false; 2], Some(rope));
    attention.o.module = format!("{module}.out_proj");
    let norm = |name: &str| base.norm_of(&format!("{module}.{name}"), base.head_dim);
    attention.norms = Some(HeadNorms {
        q: norm("q_layernorm"),
        k: Some(norm("k_layernorm")),
        v: None,
        per_head: true,
        after_rope: false,
    });
    attention
}

fn short(base: &Base, module: &str, taps: usize, bias: bool) -> ShortConvolution {
    let hidden = base.hidden;
    ShortConvolution {
        input: Linear {
            split: Split::of(&[hidden; 3]),
            ..Linear::plain(format!("{module}.in_proj"), 3 * hidden, hidden, bias)
        },
        convolution: Convolution {
            tensors: vec![(format!("{module}.conv.weight"), hidden)],
            bias: bias.then(|| format!("{module}.conv.bias")),
            channels: hidden,
            taps,
            dilation: 1,
            activation: None,
        },
        out: Linear::plain(format!("{module}.out_proj"), hidden, hidden, bias),
    }
}

/// With norms behind each layer too, and a gate for each head.
fn third(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.eps = config.positive("norm_eps", 1e-5)? as f32;
    base.final_norm = "model.embedding_norm";
    base.tied = true;
    let kinds = kinds(config, base.layers)?;
    let taps = config.count("conv_L_cache")?;
    let (conv_bias, bias) = (config.flag("conv_bias", false)?, config.flag("attention_bias", false)?);
    let inner = config.count("intermediate_size")?;
    let window = config.optional_count("sliding_window")?;
    let sandwiched = config.flag("use_sandwich_norm", true)?;
    let gated = config.flag("use_attention_gate", true)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mixer = match kinds[layer] {
            "conv" => Layer::Short(Box::new(short(&base, &format!("{at}.conv"), taps, conv_bias))),
            kind => {
                let module = format!("{at}.self_attn");
                let mut attention = base.attention(&module, [bias; 2], Some(of_kind(config, kind, base.head_dim)?));
                attention.norms = Some(base.head_norms(&module));
                attention.shape.window = window.filter(|_| kind == "sliding_attention");
                attention.head_gate =
                    gated.then(|| Linear::plain(format!("{module}.gate_proj"), base.heads, base.hidden, false));
                Layer::Attention(attention)
            }
        };
        let feed_forward = base.gated_of(&format!("{at}.feed_forward"), NAMES, inner, Activation::Silu, false);
        let mut steps = vec![
            pre(base.norm(&format!("{at}.operator_norm")), mixer),
            pre(base.norm(&format!("{at}.ffn_norm")), Layer::Mlp(feed_forward)),
        ];
        if sandwiched {
            for (step, name) in steps.iter_mut().zip(["post_operator_norm", "post_ffn_norm"]) {
                step.post = Some(base.norm(&format!("{at}.{name}")));
            }
        }
        Ok(block(at, steps))
    })?;
    base.graph(config, "lfm3", blocks)
}

/// The kinds of layers: by `layer_types`, or else one of two that see a window, or all, and convolutions around them.
fn kinds(config: &Config<'_>, layers: usize) -> Result<Vec<&'static str>> {
    let Some(types) = config.list("layer_types")? else {
        let kind = |layer: usize| match layer % 4 {
            2 => "full_attention",
            0 if layer > 0 => "sliding_attention",
            _ => "conv",
        };
        return Ok((0..layers).map(kind).collect());
    };
    if types.len() != layers {
        let found = types.len();
        return Err(Error::failed(format!(
            "config.json: layer_types has {found} entries, and there are {layers} layers"
        )));
    }
    let kind = |kind: &serde_json::Value| match kind.as_str() {
        Some("full_attention") => Ok("full_attention"),
        Some("sliding_attention") => Ok("sliding_attention"),
        Some("conv") => Ok("conv"),
        _ => Err(Error::failed(format!("config.json: layer type {} is not supported", shown(kind)))),
    };
    types.iter().map(kind).collect()
}

/// Experts that are chosen by sigmoids, with a correction or without.
fn mixture(base: &Base, config: &Config<'_>, module: &str) -> Result<Moe> {
    let (count, inner) = (config.count("num_experts")?, config.count("moe_intermediate_size")?);
    let normed = config.flag("norm_topk_prob", true)?;
    let mut router = router(base, format!("{module}.gate"), count, config.count("num_experts_per_tok")?, normed);
    router.scoring = Scoring::Sigmoid;
    router.scale = config.number("routed_scaling_factor", 1.0)? as f32;
    router.correction = config.flag("use_expert_bias", true)?.then(|| (format!("{module}.expert_bias"), vec![count]));
    let expert = |e: usize| base.gated_of(&format!("{module}.experts.{e}"), NAMES, inner, Activation::Silu, false);
    let experts = (0..count).map(expert).collect();
    Ok(Moe { router, experts, shared: None, weigh_input: false, latent: None, norms: None })
}
