//! OLMo 1 (norms without weights), 2 and 3 (norms behind the layers, and of whole queries and keys), FlexOlmo (OLMo 2 with experts), and OLMo Hybrid,
//! most of whose layers are linear attention behind a norm.

use kernels::{Activation, DeltaShape, NormKind};

use super::build::{Base, activation, block, decay, pre, sliding, window_of};
use super::moe::router;
use super::rope::{of_kind, rope};
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{Convolution, DeltaNet, Graph, HeadNorms, Layer, Linear, Moe, Norm};
use crate::json::shown;
use crate::weights::Weights;

/// OLMo 1.
pub const OLMO: Family = Family { id: "olmo", model_types: &["olmo"], build: olmo };

/// OLMo 2.
pub const OLMO2: Family = Family { id: "olmo2", model_types: &["olmo2"], build: |config| later(config, "olmo2") };

/// OLMo 3.
pub const OLMO3: Family = Family { id: "olmo3", model_types: &["olmo3"], build: |config| later(config, "olmo3") };

/// FlexOlmo.
pub const FLEX_OLMO: Family =
    Family { id: "flex_olmo", model_types: &["flex_olmo"], build: |config| later(config, "flex_olmo") };

/// OLMo Hybrid.
pub const OLMO_HYBRID: Family = Family { id: "olmo_hybrid", model_types: &["olmo_hybrid"], build: hybrid };

fn olmo(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm = NormKind::Layer;
    base.eps = 1e-5;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let clip = config.get("clip_qkv").map(|_| config.number("clip_qkv", 0.0)).transpose()?.map(|x| x as f32);
    let rope = rope(config, base.head_dim)?;
    let mut norm = base.norm("");
    norm.weights.clear();
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mut attention = base.attention(&format!("{at}.self_attn"), [bias, bias], Some(rope.clone()));
        attention.clip = clip;
        let mlp = base.gated(&format!("{at}.mlp"), inner, act, false);
        Ok(block(at, vec![pre(norm.clone(), Layer::Attention(attention)), pre(norm.clone(), Layer::Mlp(mlp))]))
    })?;
    let mut graph = base.graph(config, "olmo", blocks)?;
    graph.final_norm = norm;
    Ok(graph)
}

/// Norms of all queries together, and of all keys.
pub fn whole_norms(base: &Base, module: &str) -> HeadNorms {
    let norm = |name: &str, heads: usize| base.norm_of(&format!("{module}.{name}"), heads * base.head_dim);
    let (q, k) = (norm("q_norm", base.heads), Some(norm("k_norm", base.kv_heads)));
    HeadNorms { q, k, v: None, per_head: false, after_rope: false }
}

fn later(config: &Config<'_>, family: &'static str) -> Result<Graph> {
    let mut base = Base::read(config)?;
    let sparse = family == "flex_olmo";
    base.eps = config.positive("rms_norm_eps", if sparse { 1e-6 } else { 1e-5 })? as f32;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let third = family == "olmo3";
    let local = match third {
        true => sliding(config, base.layers, |layer| (layer + 1) % 4 != 0)?,
        false => vec![false; base.layers],
    };
    let window = window_of(config, &local)?;
    let of = |kind: &str| match third {
        true => of_kind(config, kind, base.head_dim),
        false => rope(config, base.head_dim),
    };
    let (wide, near) = (of("full_attention")?, of("sliding_attention")?);
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let module = format!("{at}.self_attn");
        let rope = if local[layer] { &near } else { &wide };
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        attention.shape.window = window.filter(|_| local[layer]);
        attention.norms = Some(whole_norms(&base, &module));
        let module = format!("{at}.mlp");
        let feed_forward = match sparse {
            false => Layer::Mlp(base.gated(&module, inner, act, false)),
            true => {
                let (experts, top_k) = (config.count("num_experts")?, config.count("num_experts_per_tok")?);
                let renormalize = config.flag("norm_topk_prob", false)?;
                let router = router(&base, format!("{module}.gate"), experts, top_k, renormalize);
                let expert = |e| base.gated(&format!("{module}.experts.{e}"), inner, act, false);
                let experts = (0..experts).map(expert).collect();
                Layer::Moe(Moe { router, experts, shared: None, weigh_input: false, latent: None, norms: None })
            }
        };
        Ok(base.post_block(at, attention, feed_forward))
    })?;
    base.graph(config, family, blocks)
}

fn hybrid(config: &Config<'_>) -> Result<Graph> {
    let base = Base::read(config)?;
    let inner = config.count("intermediate_size")?;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let recurrent = recurrent_layers(config, base.layers)?;
    // None where its base is null.
    let rope = config.object("rope_parameters")?.map(|_| rope(config, base.head_dim)).transpose()?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mlp = Layer::Mlp(base.gated(&format!("{at}.mlp"), inner, act, false));
        if !recurrent[layer] {
            let module = format!("{at}.self_attn");
            let mut attention = base.attention(&module, [bias, bias], rope.clone());
            attention.norms = Some(whole_norms(&base, &module));
            return Ok(base.post_block(at, attention, mlp));
        }
        let delta = delta(config, &base, &format!("{at}.linear_attn"), act)?;
        let steps = vec![
            pre(base.norm(&format!("{at}.attention_layer_norm")), Layer::Delta(Box::new(delta))),
            pre(base.norm(&format!("{at}.feedforward_layer_norm")), mlp),
        ];
        Ok(block(at, steps))
    })?;
    base.graph(config, "olmo_hybrid", blocks)
}

/// Which layers are linear attention: `layer_types`, or else all but every fourth, and the last where there would be no other.
fn recurrent_layers(config: &Config<'_>, layers: usize) -> Result<Vec<bool>> {
    let Some(types) = config.list("layer_types")? else {
        return Ok((0..layers).map(|layer| layer % 4 != 3 && !(layers < 4 && layer + 1 == layers)).collect());
    };
    if types.len() != layers {
        let found = types.len();
        return Err(Error::failed(format!(
            "config.json: layer_types has {found} entries, and there are {layers} layers"
        )));
    }
    let recurrent = types.iter().map(|kind| match kind.as_str() {
        Some("linear_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(Error::failed(format!("config.json: layer type {} is not supported", shown(kind)))),
    });
    recurrent.collect()
}

/// Linear attention of linears that are all stored apart, and convolutions too.
fn delta(config: &Config<'_>, base: &Base, module: &str, act: Activation) -> Result<DeltaNet> {
    let count = |key: &str, usual: usize| Ok::<_, Error>(config.optional_count(key)?.unwrap_or(usual));
    let key_heads = count("linear_num_key_heads", base.heads)?;
    let value_heads = count("linear_num_value_heads", base.heads)?;
    let key_dim = count("linear_key_head_dim", 3 * base.hidden / (4 * key_heads))?;
    let value_dim = count("linear_value_head_dim", 2 * key_dim)?;
    let taps = config.count("linear_conv_kernel_dim")?;
    if !value_heads.is_multiple_of(key_heads) {
        return Err(Error::failed(format!(
            "config.json: {value_heads} heads of values (linear_num_value_heads) cannot share {key_heads} heads of keys (linear_num_key_heads)"
        )));
    }
    let (keys, values) = (key_heads * key_dim, value_heads * value_dim);
    let linear = |name: &str, rows| Linear::plain(format!("{module}.{name}"), rows, base.hidden, false);
    let norm = Norm { eps: 1e-5, ..base.norm_of(&format!("{module}.o_norm"), value_dim) };
    let unit = Norm { kind: NormKind::Length, weights: Vec::new(), shape: vec![key_dim], eps: 1e-6, ..norm.clone() };
    let parts = [("q", keys), ("k", keys), ("v", values)];
    let scale = (key_dim as f32).powf(-0.5);
    Ok(DeltaNet {
        inputs: vec![
            linear("q_proj", keys),
            linear("k_proj", keys),
            linear("v_proj", values),
            linear("g_proj", values),
        ],
        rates: vec![linear("b_proj", value_heads), linear("a_proj", value_heads)],
        convolution: Convolution {
            tensors: parts.map(|(part, channels)| (format!("{module}.{part}_conv1d.weight"), channels)).to_vec(),
            bias: None,
            channels: 2 * keys + values,
            taps,
            dilation: 1,
            activation: Some(act),
        },
        shape: DeltaShape { key_heads, value_heads, key_dim, value_dim, scale, replaces: true, by_channel: false },
        decay: decay(module, value_heads),
        narrow: None,
        share: if config.flag("linear_allow_neg_eigval", true)? { 2.0 } else { 1.0 },
        unit,
        norm,
        activation: Activation::Silu,
        out: Linear::plain(format!("{module}.o_proj"), base.hidden, values, false),
    })
}

/// Takes the names and shapes that transformers 5 saves OLMo Hybrid under, where a checkpoint has them: norms of all layers are called alike, and
/// the convolutions of queries, keys and values are one tensor that was cut into three.
pub(super) fn settle(graph: &mut Graph, source: &dyn Weights) {
    if graph.family != "olmo_hybrid" {
        return;
    }
    let there = |name: &str| source.entry(name).is_some();
    for block in &mut graph.blocks {
        for step in &mut block.steps {
            if let Layer::Delta(delta) = &mut step.layer {
                for (tensor, channels) in &mut delta.convolution.tensors {
                    let stored = source.entry(tensor).and_then(|entry| entry.shape.first().copied());
                    *channels = stored.unwrap_or(*channels);
                }
                let all: usize = delta.convolution.tensors.iter().map(|(_, channels)| channels).sum();
                if all != delta.convolution.channels {
                    // What is not right is told with the shapes that are expected.
                    let DeltaShape { key_heads, key_dim, value_heads, value_dim, .. } = delta.shape;
                    let widths = [key_heads * key_dim, key_heads * key_dim, value_heads * value_dim];
                    let tensors = delta.convolution.tensors.iter_mut().zip(widths);
                    tensors.for_each(|((_, channels), width)| *channels = width);
                }
            }
            let other = format!("{}.feedforward_layer_norm.weight", block.name);
            for weight in step.post.iter_mut().flat_map(|norm| &mut norm.weights) {
                if weight.ends_with(".post_attention_layernorm.weight") && !there(weight) && there(&other) {
                    *weight = other.clone();
                }
            }
        }
    }
}
