//! Nemotron-H and Nemotron 3: each layer is one of Mamba 2, attention without positions, a feed-forward layer without a gate, or a mixture of
//! such, whose experts may work in a narrower space.

use kernels::Activation;

use super::build::{Base, activation_of, block, pre};
use super::deepseek::{Chosen, moe};
use super::state_space::Sizes;
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{Decay, Graph, Layer, Linear, Mlp, Moe};
use crate::json::shown;

/// Nemotron-H.
pub const NEMOTRON_H: Family = Family { id: "nemotron_h", model_types: &["nemotron_h"], build };

/// What a layer is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Mamba,
    Attention,
    FeedForward,
    Experts,
}

/// By `layers_block_type`, or else by the letters of `hybrid_override_pattern`; `num_hidden_layers` does not count.
fn kinds(config: &Config<'_>) -> Result<Vec<Kind>> {
    if let Some(list) = config.list("layers_block_type")? {
        let kind = |name: &serde_json::Value| match name.as_str() {
            Some("linear_attention" | "mamba") => Ok(Kind::Mamba),
            Some("full_attention" | "attention") => Ok(Kind::Attention),
            Some("mlp") => Ok(Kind::FeedForward),
            Some("moe") => Ok(Kind::Experts),
            _ => Err(Error::failed(format!("config.json: layer type {} is not supported", shown(name)))),
        };
        return list.iter().map(kind).collect();
    }
    if config.get("hybrid_override_pattern").is_none() {
        return Ok(vec![Kind::Mamba, Kind::Experts, Kind::Attention, Kind::FeedForward]);
    }
    let letter = |letter| match letter {
        'M' => Ok(Kind::Mamba),
        '*' => Ok(Kind::Attention),
        '-' => Ok(Kind::FeedForward),
        'E' => Ok(Kind::Experts),
        other => Err(Error::failed(format!(
            "config.json: hybrid_override_pattern has `{other}`, and only M (Mamba), * (attention), - (feed-forward) and E (experts) are known"
        ))),
    };
    config.text("hybrid_override_pattern")?.chars().map(letter).collect()
}

fn build(config: &Config<'_>) -> Result<Graph> {
    let kinds = kinds(config)?;
    let mut counted = config.0.clone();
    counted["num_hidden_layers"] = kinds.len().into();
    let mut base = Base::read(&Config(&counted))?;
    base.eps = config.positive("layer_norm_epsilon", 1e-5)? as f32;
    (base.blocks, base.embedding, base.final_norm) = ("backbone.layers", "backbone.embeddings", "backbone.norm_f");
    let act = activation_of(config, "mlp_hidden_act", Activation::Relu2)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    let sizes = sizes(config)?;
    let step = |at: &str, kind: Kind| {
        let module = format!("{at}.mixer");
        let ungated = |module: &str, inner: usize, bias: bool| {
            base.ungated(["up_proj", "down_proj"].map(|name| format!("{module}.{name}")), inner, act, bias)
        };
        let mixer = match kind {
            Kind::Mamba => Layer::Mamba(Box::new(sizes.layer(&base, &module)?)),
            Kind::Attention => Layer::Attention(base.attention(&module, [false; 2], None)),
            Kind::FeedForward => Layer::Mlp(ungated(&module, config.count("intermediate_size")?, mlp_bias)),
            Kind::Experts => Layer::Moe(mixture(&base, config, &module, act, &ungated)?),
        };
        Ok::<_, Error>(pre(base.norm(&format!("{at}.norm")), mixer))
    };
    let blocks = base.each(|layer| Ok(block(base.at(layer), vec![step(&base.at(layer), kinds[layer])?])))?;
    let mut graph = base.graph(config, "nemotron_h", blocks)?;
    let further = config.count_or("num_nextn_predict_layers", 0)?;
    let usual = further > 0 && predicts_usually(config)?;
    if usual {
        let steps = vec![step("mtp.layers.0", Kind::Attention)?, step("mtp.layers.1", Kind::Experts)?];
        further::append(&mut graph, &base, &further::NEMOTRON, block("mtp".to_owned(), steps));
    }
    further::aside_unless_one(&mut graph, "mtp.", if usual { further } else { 0 });
    Ok(graph)
}

/// Whether a layer that predicts further tokens is attention, and then a mixture, as in all published models.
fn predicts_usually(config: &Config<'_>) -> Result<bool> {
    let listed = config.list("mtp_layers_block_type")?;
    let named = listed.is_none_or(|kinds| {
        let names: Vec<&str> = kinds.iter().filter_map(|kind| kind.as_str()).collect();
        matches!(names[..], ["full_attention" | "attention", "moe"])
    });
    let lettered = config.get("mtp_hybrid_override_pattern").is_none_or(|pattern| pattern == "*E");
    Ok(named && lettered && config.optional_count("n_routed_experts")?.is_some())
}

fn sizes(config: &Config<'_>) -> Result<Sizes> {
    let bias = config.flag("use_bias", false)?;
    Ok(Sizes {
        heads: config.count("mamba_num_heads")?,
        head_dim: config.count("mamba_head_dim")?,
        groups: config.count("n_groups")?,
        state: config.count("ssm_state_size")?,
        taps: config.count("conv_kernel")?,
        biases: [config.flag("use_conv_bias", true)?, bias, bias],
        // Without a longest, whatever time_step_limit says.
        limits: [config.number("time_step_min", 0.001)? as f32, Decay::UNLIMITED[1]],
        activation: activation_of(config, "mamba_hidden_act", Activation::Silu)?,
    })
}

/// A mixture of layers without a gate, and one that every token takes.
fn mixture(
    base: &Base,
    config: &Config<'_>,
    module: &str,
    act: Activation,
    ungated: &dyn Fn(&str, usize, bool) -> Mlp,
) -> Result<Moe> {
    let count = config.count("n_routed_experts")?;
    let mut moe = moe(base, config, module, count, act, Chosen::Sigmoid, true)?;
    let (inner, bias) = (config.count("moe_intermediate_size")?, config.flag("mlp_bias", false)?);
    let latent = config.optional_count("moe_latent_size")?;
    let within = Base { hidden: latent.unwrap_or(base.hidden), ..base.clone() };
    let expert = |e: usize| {
        within.ungated(["up_proj", "down_proj"].map(|name| format!("{module}.experts.{e}.{name}")), inner, act, false)
    };
    moe.experts = (0..count).map(expert).collect();
    let shared = config.count("moe_shared_expert_intermediate_size")?;
    moe.shared = Some((ungated(&format!("{module}.shared_experts"), shared, bias), None));
    moe.latent = latent.map(|width| {
        let linear = |name: &str, rows, cols| Linear::plain(format!("{module}.{name}"), rows, cols, bias);
        Box::new([linear("fc1_latent_proj", width, base.hidden), linear("fc2_latent_proj", base.hidden, width)])
    });
    Ok(moe)
}
