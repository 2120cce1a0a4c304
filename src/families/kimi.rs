//! Kimi Linear: most layers have a state whose channels decay each by itself (Kimi Delta Attention), the others DeepSeek's latent attention
//! without positions; experts are chosen as DeepSeek's are.

use kernels::{Activation, DeltaShape, NormKind};
use serde_json::Value;

use super::build::{Base, activation, block, by_type, pre, with_experts};
use super::deepseek::{Chosen, LatentHeads, moe};
use super::{Config, Family, type_of};
use crate::error::{Error, Result};
use crate::graph::{Convolution, Decay, DeltaNet, Graph, Layer, Linear, Narrow, Norm};
use crate::weights::Weights;

/// Kimi Linear.
pub const KIMI_LINEAR: Family = Family { id: "kimi_linear", model_types: &["kimi_linear"], build };

/// What DeepSeek's config.json calls some settings of this one.
const AS_DEEPSEEK: &[(&str, &str)] = &[
    ("num_experts_per_token", "num_experts_per_tok"),
    ("moe_renormalize", "norm_topk_prob"),
    ("num_expert_group", "n_group"),
    ("num_shared_experts", "n_shared_experts"),
];

fn build(config: &Config<'_>) -> Result<Graph> {
    let settings = in_words_of_deepseek(config.0);
    let config = &Config(&settings);
    let mut base = Base::read(config)?;
    let heads = LatentHeads::read(config, &mut base)?;
    let act = activation(config, Activation::Silu)?;
    let recurrent = recurrent_layers(config, base.layers)?;
    let dense = config.count_or("first_k_dense_replace", 1)?;
    let sparse = with_experts(config, base.layers, |layer| layer >= dense)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let attention = match recurrent[layer] {
            true => Layer::Delta(Box::new(delta(config, &base, &module, act)?)),
            false => Layer::Attention(heads.attention(&base, &module, None, false)),
        };
        let after = match sparse[layer] {
            false => Layer::Mlp(base.gated(&format!("{at}.mlp"), config.count("intermediate_size")?, act, false)),
            true => {
                let (experts, inner) = (config.count("num_experts")?, config.count("moe_intermediate_size")?);
                let module = format!("{at}.block_sparse_moe");
                let mut moe = moe(&base, config, &module, experts, act, Chosen::Sigmoid, true)?;
                let expert = |e| base.gated_of(&format!("{module}.experts.{e}"), ["w1", "w3", "w2"], inner, act, false);
                moe.experts = (0..experts).map(expert).collect();
                Layer::Moe(moe)
            }
        };
        let steps = vec![
            pre(base.norm(&format!("{at}.input_layernorm")), attention),
            pre(base.norm(&format!("{at}.post_attention_layernorm")), after),
        ];
        Ok(block(at, steps))
    })?;
    let mut graph = base.graph(config, "kimi_linear", blocks)?;
    for layer in 0..config.count_or("num_nextn_predict_layers", 0)? {
        graph.aside.push((format!("{}.", base.at(base.layers + layer)), crate::graph::FURTHER));
    }
    Ok(graph)
}

/// Takes the names that transformers 5 saves under, where a checkpoint has them: it turns its own renaming round for more modules than were
/// renamed, the feed-forward layers without experts of Kimi Linear and the layers of Kimi K2.5.
pub(super) fn settle(graph: &mut Graph, source: &dyn Weights) {
    let there = |module: &str| source.entry(&format!("{module}.weight")).is_some();
    if graph.family == "kimi_linear" {
        graph.linears_mut(&mut |linear| {
            let other = linear.module.replacen(".mlp.", ".block_sparse_moe.", 1);
            if !there(&linear.module) && there(&other) {
                linear.module = other;
            }
        });
    }
    if type_of(source.config()) == Some("kimi_k25") {
        let saved = |name: &str| name.replacen(".layers.", ".blocks.", 1);
        let first = graph.linears().next().map(|linear| linear.module.clone());
        if first.is_some_and(|module| !there(&module) && there(&saved(&module))) {
            graph.rename(&saved);
        }
    }
}

/// The same settings, those of experts also under the names that they have for DeepSeek.
pub(super) fn in_words_of_deepseek(settings: &Value) -> Value {
    let mut settings = settings.clone();
    for (own, other) in AS_DEEPSEEK {
        if let Some(value) = settings.get(*own).cloned() {
            settings[*other] = value;
        }
    }
    settings
}

/// Which layers have a state: `layer_types`, or what `linear_attn_config` counts from 1, or else all but every fourth behind the first.
fn recurrent_layers(config: &Config<'_>, layers: usize) -> Result<Vec<bool>> {
    let kinds: [&[&str]; 2] = [&["full_attention"], &["linear_attention"]];
    let parts = config.object("linear_attn_config")?;
    let lists = match &parts {
        None => None,
        Some(parts) => parts.layer_list("full_attn_layers")?.zip(parts.layer_list("kda_layers")?),
    };
    let Some((full, own)) = lists.filter(|_| config.get("layer_types").is_none()) else {
        return by_type(config, "layer_types", kinds, layers, |layer| layer == 0 || layer % 4 != 0);
    };
    let of = |layer: usize| match (full.contains(&(layer + 1)), own.contains(&(layer + 1))) {
        (true, false) => Ok(false),
        (false, true) => Ok(true),
        _ => Err(Error::failed(format!(
            "config.json: layer {} (counted from 1) must be in one of the lists full_attn_layers and kda_layers of linear_attn_config",
            layer + 1
        ))),
    };
    (0..layers).map(of).collect()
}

/// A layer with a state under `module`.
pub fn delta(config: &Config<'_>, base: &Base, module: &str, act: Activation) -> Result<DeltaNet> {
    let parts = config.object("linear_attn_config")?;
    let size = |name: &str, own: &str| match parts.as_ref().map(|parts| parts.optional_count(name)).transpose()? {
        Some(Some(size)) => Ok::<usize, Error>(size),
        _ => config.count(own),
    };
    let dim = size("head_dim", "linear_head_dim")?;
    let heads = size("num_heads", "linear_num_heads")?;
    let taps = size("short_conv_kernel_size", "linear_conv_kernel_dim")?;
    Ok(by_channel(base, module, [heads, dim, taps], act))
}

/// A layer under `module` with so many heads of so many values, whose channels decay each by itself, behind convolutions of so many taps.
pub fn by_channel(base: &Base, module: &str, [heads, dim, taps]: [usize; 3], act: Activation) -> DeltaNet {
    let width = heads * dim;
    let linear = |name: &str, rows, cols| Linear::plain(format!("{module}.{name}"), rows, cols, false);
    let convolution = Convolution {
        tensors: ["q", "k", "v"].map(|part| (format!("{module}.{part}_conv1d.weight"), width)).to_vec(),
        bias: None,
        channels: 3 * width,
        taps,
        dilation: 1,
        activation: Some(act),
    };
    let norm = base.norm_of(&format!("{module}.o_norm"), dim);
    let unit = Norm { kind: NormKind::Length, weights: Vec::new(), shape: vec![dim], eps: 1e-6, ..norm.clone() };
    DeltaNet {
        inputs: ["q_proj", "k_proj", "v_proj"].map(|name| linear(name, width, base.hidden)).to_vec(),
        rates: vec![linear("b_proj", heads, base.hidden)],
        narrow: Some(Box::new(Narrow {
            decay: [linear("f_a_proj", dim, base.hidden), linear("f_b_proj", width, dim)],
            gate: [linear("g_a_proj", dim, base.hidden), linear("g_b_proj", width, dim)],
        })),
        convolution,
        share: 1.0,
        shape: DeltaShape {
            key_heads: heads,
            value_heads: heads,
            key_dim: dim,
            value_dim: dim,
            scale: (dim as f32).powf(-0.5),
            replaces: true,
            by_channel: true,
        },
        decay: Decay {
            rates: (format!("{module}.A_log"), vec![1, 1, heads, 1]),
            bias: (format!("{module}.dt_bias"), vec![width]),
            limits: Decay::UNLIMITED,
            lower: None,
        },
        unit,
        norm,
        activation: Activation::Sigmoid,
        out: linear("o_proj", base.hidden, width),
    }
}
