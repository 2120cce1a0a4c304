//! Layers of Mamba 2, as several families have them; Bamba, which has attention in a few layers, and Falcon-H1, which has both in every layer.

use kernels::{Activation, DeltaShape};

use super::build::{Base, activation, block, decay, pre};
use super::rope::rope;
use super::{Config, Family};
use crate::error::{Error, Result};
use crate::graph::{Block, Convolution, Decay, Graph, GroupNorm, Layer, Linear, Mamba, Split};
use crate::json::real;

/// Bamba.
pub const BAMBA: Family = Family { id: "bamba", model_types: &["bamba"], build: bamba };

/// Falcon-H1.
pub const FALCON_H1: Family = Family { id: "falcon_h1", model_types: &["falcon_h1"], build: falcon };

/// What a layer of Mamba 2 looks like.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Heads, each with a state of its own.
    pub heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Groups of heads that share keys and queries (B and C).
    pub groups: usize,
    /// Values of a key, or a query.
    pub state: usize,
    /// Of the convolution.
    pub taps: usize,
    /// Whether the convolution has a bias, the input's linear, and the output's.
    pub biases: [bool; 3],
    /// The shortest step and the longest.
    pub limits: [f32; 2],
    /// Behind the convolution.
    pub activation: Activation,
}

impl Sizes {
    /// As Bamba's config.json has them, of layers of `inner` values.
    pub fn read(config: &Config<'_>, inner: usize, activation: Activation) -> Result<Sizes> {
        let heads = config.count("mamba_n_heads")?;
        let head_dim = match config.get("mamba_d_head").and_then(|value| value.as_str()) {
            Some("auto") => inner / heads,
            _ => config.optional_count("mamba_d_head")?.unwrap_or(inner / heads),
        };
        let proj_bias = config.flag("mamba_proj_bias", false)?;
        let sizes = Sizes {
            heads,
            head_dim,
            groups: config.count("mamba_n_groups")?,
            state: config.count("mamba_d_state")?,
            taps: config.count("mamba_d_conv")?,
            biases: [config.flag("mamba_conv_bias", true)?, proj_bias, proj_bias],
            limits: limits(config)?,
            activation,
        };
        if heads * head_dim != inner {
            return Err(Error::failed(format!(
                "config.json: {heads} heads (mamba_n_heads) of {head_dim} values (mamba_d_head) are not the {inner} values of a layer"
            )));
        }
        Ok(sizes)
    }

    /// The layer under `module`. Fails for groups that do not divide heads.
    pub fn layer(&self, base: &Base, module: &str) -> Result<Mamba> {
        let Sizes { heads, head_dim, groups, state, taps, biases, limits, activation } = *self;
        if !heads.is_multiple_of(groups) {
            return Err(Error::failed(format!(
                "config.json: {heads} heads of a state space do not divide into {groups} groups"
            )));
        }
        let (inner, keys) = (heads * head_dim, groups * state);
        let lengths = [inner, inner, keys, keys, heads];
        let rows = lengths.iter().sum();
        let input = Linear {
            split: Split::of(&lengths),
            ..Linear::plain(format!("{module}.in_proj"), rows, base.hidden, biases[1])
        };
        let norm = base.norm_of(&format!("{module}.norm"), inner);
        Ok(Mamba {
            input,
            scales: [1.0; 5],
            convolution: Convolution {
                tensors: vec![(format!("{module}.conv1d.weight"), inner + 2 * keys)],
                bias: biases[0].then(|| format!("{module}.conv1d.bias")),
                channels: inner + 2 * keys,
                taps,
                dilation: 1,
                activation: Some(activation),
            },
            shape: DeltaShape {
                key_heads: groups,
                value_heads: heads,
                key_dim: state,
                value_dim: head_dim,
                scale: 1.0,
                replaces: false,
                by_channel: false,
            },
            decay: Decay { limits, ..decay(module, heads) },
            skip: format!("{module}.D"),
            norm: Some(GroupNorm { norm, width: inner / groups, first: false }),
            activation: Activation::Silu,
            out: Linear::plain(format!("{module}.out_proj"), base.hidden, inner, biases[2]),
        })
    }
}

/// `time_step_limit`: any where nothing is said.
fn limits(config: &Config<'_>) -> Result<[f32; 2]> {
    let Some(list) = config.list("time_step_limit")? else { return Ok(Decay::UNLIMITED) };
    match list.iter().map(real).collect::<Option<Vec<f64>>>().as_deref() {
        Some([least, most]) if *least >= 0.0 && least <= most => Ok([*least as f32, *most as f32]),
        _ => Err(Error::failed(
            "config.json: time_step_limit must be the shortest and the longest step, two numbers from 0 on, the larger one last"
                .to_owned(),
        )),
    }
}

fn bamba(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.final_norm = "model.final_layernorm";
    let act = activation(config, Activation::Silu)?;
    let (inner, bias) = (config.count("intermediate_size")?, config.flag("attention_bias", false)?);
    let mlp_bias = config.flag("mlp_bias", false)?;
    let seeing = config.layer_list("attn_layer_indices")?.unwrap_or_default();
    let sizes = Sizes::read(config, config.count_or("mamba_expand", 2)? * base.hidden, act)?;
    let rope = rope(config, base.head_dim)?;
    let blocks = base.each(|layer| {
        let at = base.at(layer);
        let mixer = match seeing.contains(&layer) {
            true => Layer::Attention(base.attention(&format!("{at}.self_attn"), [bias; 2], Some(rope.clone()))),
            false => Layer::Mamba(Box::new(sizes.layer(&base, &format!("{at}.mamba"))?)),
        };
        let feed_forward = Layer::Mlp(base.gated(&format!("{at}.feed_forward"), inner, act, mlp_bias));
        let steps = vec![
            pre(base.norm(&format!("{at}.input_layernorm")), mixer),
            pre(base.norm(&format!("{at}.pre_ff_layernorm")), feed_forward),
        ];
        Ok(block(at, steps))
    })?;
    base.graph(config, "bamba", blocks)
}

fn falcon(config: &Config<'_>) -> Result<Graph> {
    let mut base = Base::read(config)?;
    base.final_norm = "model.final_layernorm";
    let act = activation(config, Activation::Silu)?;
    let (inner, bias) = (config.count("intermediate_size")?, config.flag("attention_bias", false)?);
    let mlp_bias = config.flag("mlp_bias", false)?;
    let width = match config.optional_count("mamba_d_ssm")? {
        Some(width) => width,
        None => config.count_or("mamba_expand", 2)? * base.hidden,
    };
    let mut sizes = Sizes::read(config, width, act)?;
    sizes.biases[2] = config.flag("projectors_bias", false)?;
    let normed = config.flag("mamba_rms_norm", false)?;
    let norm_first = config.flag("mamba_norm_before_gate", true)?;
    let rope = rope(config, base.head_dim)?;
    let multiplier = |key: &str| Ok::<f32, Error>(config.number(key, 1.0)? as f32);
    let [gate, down] = multipliers(config, "mlp_multipliers")?;
    let scales = multipliers(config, "ssm_multipliers")?;
    let key = config.positive("key_multiplier", 1.0)? as f32;
    let [to_mamba, of_mamba] = [multiplier("ssm_in_multiplier")?, multiplier("ssm_out_multiplier")?];
    let [to_attention, of_attention] =
        [multiplier("attention_in_multiplier")?, multiplier("attention_out_multiplier")?];
    let blocks = base.each(|layer| -> Result<Block> {
        let at = base.at(layer);
        let mut mamba = sizes.layer(&base, &format!("{at}.mamba"))?;
        mamba.scales = scales;
        mamba.norm = mamba.norm.filter(|_| normed).map(|norm| GroupNorm { first: norm_first, ..norm });
        let mut attention = base.attention(&format!("{at}.self_attn"), [bias; 2], Some(rope.clone()));
        // Keys are multiplied before they turn, which scores are multiplied with.
        attention.shape.scale *= key;
        let mut feed_forward = base.gated(&format!("{at}.feed_forward"), inner, act, mlp_bias);
        feed_forward.scale = gate;
        let norm = base.norm(&format!("{at}.input_layernorm"));
        let mut steps = vec![
            pre(norm.clone(), Layer::Mamba(Box::new(mamba))),
            pre(norm, Layer::Attention(attention)),
            pre(base.norm(&format!("{at}.pre_ff_layernorm")), Layer::Mlp(feed_forward)),
        ];
        (steps[0].given, steps[0].scale) = (to_mamba, of_mamba);
        (steps[1].given, steps[1].scale, steps[1].unseen) = (to_attention, of_attention, 1);
        steps[2].scale = down;
        Ok(block(at, steps))
    })?;
    let mut graph = base.graph(config, "falcon_h1", blocks)?;
    graph.embedding.scale = multiplier("embedding_multiplier")?;
    graph.head.scale = multiplier("lm_head_multiplier")?;
    Ok(graph)
}

/// So many factors under `key`, all 1 where it is missing.
fn multipliers<const N: usize>(config: &Config<'_>, key: &str) -> Result<[f32; N]> {
    let Some(list) = config.list(key)? else { return Ok([1.0; N]) };
    let found: Option<Vec<f32>> = list.iter().map(|value| Some(real(value)? as f32)).collect();
    found.and_then(|found| found.try_into().ok()).ok_or_else(|| {
        Error::failed(format!("config.json: {key} must be {N} numbers, found {}", crate::json::shown(&config.0[key])))
    })
}
