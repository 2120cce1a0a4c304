//! Gemma 4 (text): layers that see all have wider heads than those that see a window, the last layers read the keys and values of earlier
//! ones, blocks are given rows of a table for the tokens themselves, and experts stand beside the dense layer.

use kernels::{Activation, NormKind};
use serde_json::Value;

use super::build::{Base, activation_of, block, post, sandwich, sliding, window_of};
use super::moe::{router, stacked};
use super::rope::of_kind;
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{
    Attention, Block, DropRule, Graph, HeadNorms, Keys, Layer, Linear, Lookup, Moe, MoeNorms, Norm, PerLayer,
    Projections, Rope, Side, Split, Stored,
};
use crate::json::integer;

/// Gemma 4, the text model.
pub const GEMMA4: Family = Family { id: "gemma4", model_types: &["gemma4_text", "gemma4_unified_text"], build };

/// What a checkpoint may hold of layers that read the keys and values of others, as it was trained; no runtime reads it.
const UNUSED: [[&str; 2]; 4] = [
    ["k_proj.weight", "attn_k.weight"],
    ["v_proj.weight", "attn_v.weight"],
    ["k_norm.weight", "attn_k_norm.weight"],
    ["v_norm.weight", "attn_v_norm.weight"],
];

fn build(config: &Config<'_>) -> Result<Graph> {
    causal(config)?;
    let base = Base { tied: true, ..Base::read(config)? };
    let act = activation_of(config, "hidden_activation", Activation::GeluTanh)?;
    let mut local = sliding(config, base.layers, |layer| (layer + 1) % 6 != 0)?;
    // Whatever is said of it.
    local.iter_mut().last().into_iter().for_each(|last| *last = false);
    let window = window_of(config, &local)?;
    let sizes = sizes(config, &base, &local)?;
    let keys = keys(config, &local)?;
    let side = per_layer_width(config)?;
    let inner = config.count("intermediate_size")?;
    let wide = config.flag("use_double_wide_mlp", false)?;
    let mixture = if config.flag("enable_moe_block", false)? { Some(Mixture::of(config)?) } else { None };
    let reuses = config.flag("attention_k_eq_v", false)?;
    let bias = config.flag("attention_bias", false)?;
    let mut ropes: Vec<(bool, usize, std::sync::Arc<Rope>)> = Vec::new();
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let own = Base { head_dim: sizes[layer].0, kv_heads: sizes[layer].1, ..base.clone() };
        let known = ropes.iter().find(|(near, width, _)| (*near, *width) == (local[layer], own.head_dim));
        let rope = match known {
            Some((.., rope)) => rope.clone(),
            None => {
                let kind = if local[layer] { "sliding_attention" } else { "full_attention" };
                let rope = of_kind(config, kind, own.head_dim)?;
                ropes.push((local[layer], own.head_dim, rope.clone()));
                rope
            }
        };
        let module = format!("{at}.self_attn");
        let mut attention = own.attention(&module, [bias, bias], Some(rope));
        attention.shape.scale = 1.0;
        attention.shape.window = window.filter(|_| local[layer]);
        attention.norms = Some(HeadNorms { v: Some(unit(&own, own.head_dim)), ..own.head_norms(&module) });
        share(&mut attention, keys[layer], reuses && !local[layer]);
        let width = if wide && matches!(keys[layer], Keys::Of(_)) { 2 * inner } else { inner };
        let mlp = base.gated(&format!("{at}.mlp"), width, act, false);
        let norm = |name: &str| base.norm(&format!("{at}.{name}"));
        let feed_forward = match &mixture {
            None => Layer::Mlp(mlp),
            Some(mixture) => Layer::Moe(mixture.layer(&base, &at, mlp, act)),
        };
        let mut steps = vec![
            sandwich(norm("input_layernorm"), Layer::Attention(attention), norm("post_attention_layernorm")),
            sandwich(norm("pre_feedforward_layernorm"), feed_forward, norm("post_feedforward_layernorm")),
        ];
        if let Some((width, rows)) = side {
            let layer = per_layer(&base, layer, act, width, rows);
            steps.push(post(Layer::PerLayer(Box::new(layer)), norm("post_per_layer_input_norm")));
        }
        Ok(Block { scale: Some(format!("{at}.layer_scalar")), ..block(at.clone(), steps) })
    })?;
    let mut graph = base.graph(config, "gemma4", blocks)?;
    graph.embedding.scale = (graph.hidden as f32).sqrt();
    if config.get("final_logit_softcapping").is_some() {
        graph.head.softcap = Some(config.positive("final_logit_softcapping", 30.0)? as f32);
    }
    graph.dropped.extend(unused(&base, &keys));
    Ok(graph)
}

/// What is left out of layers that read the keys and values of others.
pub(super) fn unused(base: &Base, keys: &[Keys]) -> Vec<DropRule> {
    let reason = "of a layer that reads the keys and values of another";
    let of_layer = |(layer, _): (usize, &Keys)| {
        // As GGUF files call it, too.
        let rule = |[name, gguf]: &[&'static str; 2]| {
            let own = DropRule { prefix: format!("{}.self_attn.", base.at(layer)), suffix: name, reason };
            [own, DropRule { prefix: format!("blk.{layer}."), suffix: gguf, reason }]
        };
        UNUSED.iter().flat_map(rule).collect::<Vec<_>>()
    };
    keys.iter().enumerate().filter(|(_, keys)| matches!(keys, Keys::Of(_))).flat_map(of_layer).collect()
}

/// Fails for a model that attends both ways; in images alone (`vision`) it may.
fn causal(config: &Config<'_>) -> Result<()> {
    match config.get("use_bidirectional_attention") {
        None => Ok(()),
        Some(Value::Bool(false)) => Ok(()),
        Some(said) if said == "vision" => Ok(()),
        Some(_) => Err(Error::failed(
            "config.json: use_bidirectional_attention is all, and only models that attend to what came before can be run",
        )),
    }
}

/// The width of a head and the heads of keys and values of each layer: those of layers that see all differ.
fn sizes(config: &Config<'_>, base: &Base, local: &[bool]) -> Result<Vec<(usize, usize)>> {
    let said = config.object("per_layer_config")?;
    let head_dim = config.optional_count("global_head_dim")?.unwrap_or(512);
    let reuses = config.flag("attention_k_eq_v", false)?;
    let kv_heads = config.optional_count("num_global_key_value_heads")?.filter(|_| reuses);
    let of_layer = |(layer, local): (usize, &bool)| -> Result<(usize, usize)> {
        let usual = (base.head_dim, base.kv_heads);
        let (head_dim, kv_heads) = match (&said, *local) {
            (None, true) => usual,
            (None, false) => (head_dim, kv_heads.unwrap_or(base.kv_heads)),
            (Some(all), _) => match all.object(&layer.to_string())? {
                None => usual,
                Some(own) => (
                    own.optional_count("head_dim")?.unwrap_or(usual.0),
                    own.optional_count("num_key_value_heads")?.unwrap_or(usual.1),
                ),
            },
        };
        if !base.heads.is_multiple_of(kv_heads) || !head_dim.is_multiple_of(2) {
            return Err(Error::failed(format!(
                "config.json: {} heads of {head_dim} values cannot share {kv_heads} key and value heads in pairs of values, in layer {layer}",
                base.heads
            )));
        }
        Ok((head_dim, kv_heads))
    };
    local.iter().enumerate().map(of_layer).collect()
}

/// Whose keys and values each layer reads: the last `num_kv_shared_layers` those of the last layer of their type before them.
pub(super) fn keys(config: &Config<'_>, local: &[bool]) -> Result<Vec<Keys>> {
    let said = config.get("num_kv_shared_layers").map_or(Some(0), integer);
    let shared = said.and_then(|count| usize::try_from(count).ok()).filter(|count| *count <= local.len());
    let Some(shared) = shared else {
        return Err(Error::failed(format!(
            "config.json: num_kv_shared_layers must be a count of the {} layers",
            local.len()
        )));
    };
    let first = local.len() - shared;
    let mut keys = vec![Keys::Own; local.len()];
    for layer in first..local.len() {
        let Some(of) = local[..first].iter().rposition(|kind| *kind == local[layer]) else {
            return Err(Error::failed(format!(
                "config.json: layer {layer} has no keys and values of its own (num_kv_shared_layers is {shared}), and no layer of its type \
                 before layer {first} has some that it could read"
            )));
        };
        keys[layer] = Keys::Of(of);
        keys[of] = Keys::Left(of);
    }
    Ok(keys)
}

/// Leaves out the linears and norms that a layer does not have.
pub(super) fn share(attention: &mut Attention, keys: Keys, reuses: bool) {
    let Projections::Direct(linears) = &mut attention.projections else { return };
    if reuses {
        linears.truncate(2);
    }
    if let (Keys::Of(_), Some(norms)) = (keys, &mut attention.norms) {
        linears.truncate(1);
        (norms.k, norms.v) = (None, None);
    }
    attention.keys = keys;
}

/// A norm without a weight.
pub(super) fn unit(base: &Base, width: usize) -> Norm {
    Norm { kind: NormKind::Rms, weights: Vec::new(), offset: 0.0, bias: None, shape: vec![width], eps: base.eps }
}

/// The values that each layer is given of a token, and the rows of the table of them.
fn per_layer_width(config: &Config<'_>) -> Result<Option<(usize, usize)>> {
    let none = config.get("hidden_size_per_layer_input").is_none_or(|width| integer(width) == Some(0));
    if none {
        return Ok(None);
    }
    Ok(Some((config.count("hidden_size_per_layer_input")?, config.count("vocab_size_per_layer_input")?)))
}

/// What layer `layer` makes of the tokens themselves, `width` values of each from a table of so many rows.
pub(super) fn per_layer(base: &Base, layer: usize, activation: Activation, width: usize, rows: usize) -> PerLayer {
    let at = base.at(layer);
    let (all, hidden) = (base.layers * width, base.hidden);
    let columns = layer * width..(layer + 1) * width;
    let share = 0.5f32.sqrt();
    let projection = "model.per_layer_model_projection";
    PerLayer {
        gate: Linear::plain(format!("{at}.per_layer_input_gate"), width, hidden, false),
        activation,
        side: Side {
            table: Lookup {
                tensor: "model.embed_tokens_per_layer.weight".to_owned(),
                rows,
                cols: all,
                columns: columns.clone(),
                scale: (width as f32).sqrt() * share,
            },
            // It is multiplied by the root of its width, and what is projected divided by it.
            embedding: Lookup {
                tensor: format!("{}.weight", base.embedding),
                rows: base.vocabulary,
                cols: hidden,
                columns: 0..hidden,
                scale: 1.0,
            },
            projection: Linear {
                stored: Stored::Rows { tensor: format!("{projection}.weight"), first: columns.start, of: all },
                ..Linear::plain(projection, width, hidden, false)
            },
            norm: base.norm_of("model.per_layer_projection_norm", width),
            share,
        },
        out: Linear::plain(format!("{at}.per_layer_projection"), hidden, width, false),
    }
}

/// Experts beside the dense layer of each block.
struct Mixture {
    experts: usize,
    top_k: usize,
    inner: usize,
}

impl Mixture {
    fn of(config: &Config<'_>) -> Result<Mixture> {
        Ok(Mixture {
            experts: config.count("num_experts")?,
            top_k: config.count("top_k_experts")?,
            inner: config.count("moe_intermediate_size")?,
        })
    }

    fn layer(&self, base: &Base, at: &str, dense: crate::graph::Mlp, act: Activation) -> Moe {
        let Mixture { experts, top_k, inner } = *self;
        let mut router = router(base, format!("{at}.router.proj"), experts, top_k, true);
        router.logits = (base.hidden as f32).powf(-0.5);
        router.factors = Some((format!("{at}.router.per_expert_scale"), vec![experts]));
        let tensors = ["gate_up_proj", "down_proj"].map(|name| format!("{at}.experts.{name}"));
        let sizes = [experts, base.hidden, inner];
        let halves = Split::of(&[inner, inner]);
        let norm = |name: &str| base.norm(&format!("{at}.{name}"));
        Moe {
            router,
            experts: stacked(&format!("{at}.experts"), tensors, [None, None], sizes, false, halves, act),
            shared: Some((dense, None)),
            weigh_input: false,
            latent: None,
            norms: Some(Box::new(MoeNorms {
                router: Norm { weights: vec![format!("{at}.router.scale")], ..unit(base, base.hidden) },
                experts: norm("pre_feedforward_layernorm_2"),
                routed: norm("post_feedforward_layernorm_2"),
                shared: norm("post_feedforward_layernorm_1"),
            })),
        }
    }
}
