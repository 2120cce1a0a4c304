//! Qwen3-Next and Qwen3.5: most layers have a state that is changed by the gated delta rule (Gated DeltaNet) in place of keys and values,
//! the others attention whose result is gated.

use kernels::{Activation, DeltaShape, NormKind};

use super::build::{Base, activation, decay};
use super::moe::router;
use super::rope::rope;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{Block, Convolution, DeltaNet, Graph, Layer, Linear, Moe, Norm, Split};

/// Qwen3-Next.
pub const QWEN3_NEXT: Family =
    Family { id: "qwen3_next", model_types: &["qwen3_next"], build: |config| build(config, Kind::Next) };

/// Qwen3.5, its language model.
pub const QWEN3_5: Family =
    Family { id: "qwen3_5", model_types: &["qwen3_5_text"], build: |config| build(config, Kind::Dense) };

/// Qwen3.5 with experts, its language model.
pub const QWEN3_5_MOE: Family =
    Family { id: "qwen3_5_moe", model_types: &["qwen3_5_moe_text"], build: |config| build(config, Kind::Experts) };

/// What distinguishes these models.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// Qwen3-Next, which stores what its layers with a state read fused, the rows of each key head together, and may mix dense layers in.
    Next,
    /// Qwen3.5 without experts.
    Dense,
    /// Qwen3.5 with experts in every layer.
    Experts,
    /// Qwen 4, whose config.json says whether the weights of experts are divided by their sum.
    Four,
}

impl Kind {
    fn family(self) -> &'static str {
        match self {
            Kind::Next => "qwen3_next",
            Kind::Dense => "qwen3_5",
            Kind::Experts => "qwen3_5_moe",
            Kind::Four => "qwen4_exp",
        }
    }
}

fn build(config: &Config<'_>, kind: Kind) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.norm_offset = 1.0;
    let act = activation(config, Activation::Silu)?;
    let bias = config.flag("attention_bias", false)?;
    let rope = rope(config, base.head_dim)?;
    let recurrent = recurrent_layers(config, base.layers)?;
    let feed_forward = feed_forward(config, &base, kind, act)?;
    let full = |at: String, after: Layer| {
        let module = format!("{at}.self_attn");
        let mut attention = base.attention(&module, [bias, bias], Some(rope.clone()));
        base.gate_heads(&mut attention);
        attention.norms = Some(base.head_norms(&module));
        base.usual_block(at, attention, after)
    };
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let after = feed_forward(&at, layer);
        if !recurrent[layer] {
            return Ok(full(at, after));
        }
        let delta = delta(config, &base, &format!("{at}.linear_attn"), kind, act)?;
        let steps = vec![
            super::build::pre(base.norm(&format!("{at}.input_layernorm")), Layer::Delta(Box::new(delta))),
            super::build::pre(base.norm(&format!("{at}.post_attention_layernorm")), after),
        ];
        Ok(Block { name: at, steps, parallel: false, scale: None, altup: None })
    })?;
    let mut graph = base.graph(config, kind.family(), blocks)?;
    let further = further_layers(config)?;
    if further > 0 {
        let at = "mtp.layers.0".to_owned();
        let after = feed_forward(&at, 0);
        further::append(&mut graph, &base, &further::QWEN, full(at, after));
    }
    further::aside_unless_one(&mut graph, "mtp.", further);
    Ok(graph)
}

/// How many layers predict further tokens, whichever key says so: one that files of Qwen3-Next hold and their config.json does not tell of.
pub fn further_layers(config: &Config<'_>) -> Result<usize> {
    match config.get("mtp_num_hidden_layers") {
        Some(_) => config.count_or("mtp_num_hidden_layers", 1),
        None => config.count_or("num_nextn_predict_layers", 1),
    }
}

/// Which layers have a state: `layer_types`, or else all but every fourth, or whichever `full_attention_interval` says.
fn recurrent_layers(config: &Config<'_>, layers: usize) -> Result<Vec<bool>> {
    let Some(types) = config.list("layer_types")? else {
        let every = config.optional_count("full_attention_interval")?.unwrap_or(4);
        return Ok((1..=layers).map(|layer| layer % every != 0).collect());
    };
    if types.len() != layers {
        return Err(Error::failed(format!(
            "config.json: layer_types has {} entries, and there are {layers} layers",
            types.len()
        )));
    }
    let recurrent = types.iter().map(|kind| match kind.as_str() {
        Some("linear_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(Error::failed(format!("config.json: layer type {kind} is not supported"))),
    });
    recurrent.collect()
}

/// Makes what follows attention in a layer of a name and a number.
pub type FeedForward<'a> = Box<dyn Fn(&str, usize) -> Layer + 'a>;

/// What follows attention in a layer of this name and number.
pub fn feed_forward<'a>(config: &Config<'_>, base: &'a Base, kind: Kind, act: Activation) -> Result<FeedForward<'a>> {
    if kind == Kind::Dense {
        let inner = config.count("intermediate_size")?;
        return Ok(Box::new(move |at, _| Layer::Mlp(base.gated(&format!("{at}.mlp"), inner, act, false))));
    }
    let next = kind == Kind::Next;
    let dense_inner = if next { config.count("intermediate_size")? } else { 0 };
    let experts = if next { config.count_or("num_experts", 512)? } else { config.count("num_experts")? };
    let step = config.optional_count("decoder_sparse_step")?.unwrap_or(1);
    let dense = config.layer_list("mlp_only_layers")?.unwrap_or_default();
    let top_k = config.count("num_experts_per_tok")?;
    let [inner, shared] = ["moe_intermediate_size", "shared_expert_intermediate_size"].map(|key| config.count(key));
    let (inner, shared) = (inner?, shared?);
    // The class of Qwen3.5 has no such setting, and always divides by the sum.
    let renormalize = kind == Kind::Experts || config.flag("norm_topk_prob", true)?;
    Ok(Box::new(move |at, layer| {
        let module = format!("{at}.mlp");
        if next && (dense.contains(&layer) || experts == 0 || !(layer + 1).is_multiple_of(step)) {
            return Layer::Mlp(base.gated(&module, dense_inner, act, false));
        }
        let gate = Linear::plain(format!("{module}.shared_expert_gate"), 1, base.hidden, false);
        Layer::Moe(Moe {
            router: router(base, format!("{module}.gate"), experts, top_k, renormalize),
            experts: (0..experts).map(|e| base.gated(&format!("{module}.experts.{e}"), inner, act, false)).collect(),
            shared: Some((base.gated(&format!("{module}.shared_expert"), shared, act, false), Some(gate))),
            weigh_input: false,
            latent: None,
            norms: None,
        })
    }))
}

/// A layer with a state under `module`.
pub fn delta(config: &Config<'_>, base: &Base, module: &str, kind: Kind, act: Activation) -> Result<DeltaNet> {
    let (key_heads, value_heads) = (config.count("linear_num_key_heads")?, config.count("linear_num_value_heads")?);
    let (key_dim, value_dim) = (config.count("linear_key_head_dim")?, config.count("linear_value_head_dim")?);
    let taps = config.count("linear_conv_kernel_dim")?;
    if !value_heads.is_multiple_of(key_heads) {
        return Err(Error::failed(format!(
            "config.json: {value_heads} heads of values (linear_num_value_heads) cannot share {key_heads} heads of keys (linear_num_key_heads)"
        )));
    }
    let of_each = value_heads / key_heads;
    let (keys, values) = (key_heads * key_dim, value_heads * value_dim);
    let linear = |name: &str, split: Split| {
        let rows = match &split.lengths[..] {
            [] => split.times,
            lengths => split.times * lengths.iter().sum::<usize>(),
        };
        let split = if split.lengths.is_empty() { Split::WHOLE } else { split };
        Linear { split, ..Linear::plain(format!("{module}.{name}"), rows, base.hidden, false) }
    };
    let whole = |rows: usize| Split { times: rows, lengths: Vec::new() };
    let (inputs, rates) = match kind {
        Kind::Next => {
            let lengths = vec![key_dim, key_dim, of_each * value_dim, of_each * value_dim];
            let by_head = |lengths| Split { times: key_heads, lengths };
            (vec![linear("in_proj_qkvz", by_head(lengths))], vec![linear("in_proj_ba", by_head(vec![of_each; 2]))])
        }
        Kind::Dense | Kind::Experts | Kind::Four => (
            vec![linear("in_proj_qkv", Split::of(&[keys, keys, values])), linear("in_proj_z", whole(values))],
            vec![linear("in_proj_b", whole(value_heads)), linear("in_proj_a", whole(value_heads))],
        ),
    };
    let scale = (key_dim as f32).powf(-0.5);
    let norm = Norm { offset: 0.0, ..base.norm_of(&format!("{module}.norm"), value_dim) };
    let unit = Norm { kind: NormKind::Length, weights: Vec::new(), shape: vec![key_dim], eps: 1e-6, ..norm.clone() };
    Ok(DeltaNet {
        inputs,
        rates,
        narrow: None,
        convolution: Convolution {
            tensors: vec![(format!("{module}.conv1d.weight"), 2 * keys + values)],
            bias: None,
            channels: 2 * keys + values,
            taps,
            dilation: 1,
            activation: Some(act),
        },
        shape: DeltaShape { key_heads, value_heads, key_dim, value_dim, scale, replaces: true, by_channel: false },
        decay: decay(module, value_heads),
        share: 1.0,
        unit,
        norm,
        activation: Activation::Silu,
        out: Linear::plain(format!("{module}.out_proj"), base.hidden, values, false),
    })
}
