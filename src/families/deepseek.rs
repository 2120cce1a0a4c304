//! DeepSeek V2, V3 and V3.2, GLM-4.7-Flash, GLM-5, Mistral 4: latent attention, in some of a choice of tokens, shared and routed experts, experts
//! chosen by groups.

use std::sync::Arc;

use kernels::{Activation, IndexShape, NormKind, RopeLayout};

use super::build::{Base, activation, with_experts};
use super::llama::temperature;
use super::moe::{router, stacked};
use super::rope::{rope, warmth};
use super::{Config, Family, further};
use crate::error::{Error, Result};
use crate::graph::{
    Attention, Choice, Graph, Groups, Indexer, Latent, Layer, Linear, Moe, Norm, Projections, Rope, RopeScaling,
    Scoring, Split,
};

/// DeepSeek V2 and V2-Lite.
pub const DEEPSEEK_V2: Family =
    Family { id: "deepseek_v2", model_types: &["deepseek_v2"], build: |config| build(config, Kind::V2) };

/// DeepSeek V3 and R1, Kimi K2.
pub const DEEPSEEK_V3: Family =
    Family { id: "deepseek_v3", model_types: &["deepseek_v3", "kimi_k2"], build: |config| build(config, Kind::V3) };

/// GLM-4.7-Flash: V3 that says of each layer whether it has experts.
pub const GLM4_MOE_LITE: Family =
    Family { id: "glm4_moe_lite", model_types: &["glm4_moe_lite"], build: |config| build(config, Kind::GlmLite) };

/// Mistral 4: experts in stacks, chosen by softmax, and queries that grow with their positions.
pub const MISTRAL4: Family =
    Family { id: "mistral4", model_types: &["mistral4"], build: |config| build(config, Kind::Mistral4) };

/// DeepSeek V3.2: V3 whose attention sees a choice of tokens.
pub const DEEPSEEK_V32: Family =
    Family { id: "deepseek_v32", model_types: &["deepseek_v32"], build: |config| build(config, Kind::V32) };

/// GLM-5: V3.2 whose layers may take over the choice of one before them.
pub const GLM_MOE_DSA: Family =
    Family { id: "glm_moe_dsa", model_types: &["glm_moe_dsa"], build: |config| build(config, Kind::Glm5) };

/// Which of the models it is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    V2,
    V3,
    V32,
    GlmLite,
    Glm5,
    Mistral4,
}

impl Kind {
    fn family(self) -> &'static str {
        match self {
            Kind::V2 => "deepseek_v2",
            Kind::V3 => "deepseek_v3",
            Kind::V32 => "deepseek_v32",
            Kind::GlmLite => "glm4_moe_lite",
            Kind::Glm5 => "glm_moe_dsa",
            Kind::Mistral4 => "mistral4",
        }
    }

    /// How its experts are chosen.
    fn chosen(self) -> Chosen {
        match self {
            Kind::V2 => Chosen::Softmax,
            Kind::V3 | Kind::V32 | Kind::GlmLite | Kind::Glm5 => Chosen::Sigmoid,
            Kind::Mistral4 => Chosen::SoftmaxOfTwo,
        }
    }
}

/// How experts are chosen.
#[derive(Clone, Copy, PartialEq)]
pub enum Chosen {
    /// By the softmax, of all or of the groups with the best expert, as `topk_method` says (V2).
    Softmax,
    /// By sigmoids with a correction, of the groups with the two best experts (V3).
    Sigmoid,
    /// By the softmax, of the groups with the two best experts (Mistral 4).
    SoftmaxOfTwo,
}

/// Heads whose keys and values are made from a latent, and queries too where there is one of them.
#[derive(Clone, Copy)]
pub struct LatentHeads {
    /// Width of the latent of queries.
    q_latent: Option<usize>,
    /// Of that of keys and values.
    latent: usize,
    /// Values of a query or key that no position turns.
    nope: usize,
    /// Those behind them, which may be turned, and which all heads have in common in the keys.
    rotated: usize,
    /// Values of a value.
    value: usize,
    /// Whether the first linears and the last have biases.
    bias: bool,
}

impl LatentHeads {
    /// Reads them as DeepSeek's config.json says them, and tells `base` of them.
    pub fn read(config: &Config<'_>, base: &mut Base) -> Result<LatentHeads> {
        LatentHeads::turned(config, base, config.count("qk_rope_head_dim")?)
    }

    /// The same, where so many values of a head are turned, none maybe.
    pub fn turned(config: &Config<'_>, base: &mut Base, rotated: usize) -> Result<LatentHeads> {
        let [nope, value] = [config.count("qk_nope_head_dim")?, config.count("v_head_dim")?];
        base.kv_heads = base.heads;
        base.head_dim = nope + rotated;
        Ok(LatentHeads {
            q_latent: config.optional_count("q_lora_rank")?,
            latent: config.count("kv_lora_rank")?,
            nope,
            rotated,
            value,
            bias: config.flag("attention_bias", false)?,
        })
    }

    /// The same heads where no position turns any of their values.
    pub fn still(&self) -> LatentHeads {
        LatentHeads { nope: self.nope + self.rotated, rotated: 0, ..*self }
    }

    /// Attention under `module`, with the usual scale.
    pub fn attention(&self, base: &Base, module: &str, rope: Option<Arc<Rope>>, interleaved: bool) -> Attention {
        let LatentHeads { q_latent, latent, nope, rotated, value, bias } = *self;
        // Latents are normed with an epsilon of their own.
        let norm = |name: &str, width| Norm { eps: 1e-6, ..base.norm_of(&format!("{module}.{name}"), width) };
        let linear = |name: &str, rows, cols, bias| Linear::plain(format!("{module}.{name}"), rows, cols, bias);
        let (heads, hidden) = (base.heads, base.hidden);
        let wide = heads * (nope + rotated);
        let q = match q_latent {
            None => vec![linear("q_proj", wide, hidden, false)],
            Some(width) => {
                vec![linear("q_a_proj", width, hidden, bias), linear("q_b_proj", wide, width, false)]
            }
        };
        let kv_a = Linear {
            split: if rotated > 0 { Split::of(&[latent, rotated]) } else { Split::WHOLE },
            ..linear("kv_a_proj_with_mqa", latent + rotated, hidden, bias)
        };
        let kv_b = Linear {
            split: Split { times: heads, lengths: vec![nope, value] },
            ..linear("kv_b_proj", heads * (nope + value), latent, false)
        };
        let o = linear("o_proj", hidden, heads * value, bias);
        let mut attention = Attention {
            projections: Projections::Latent(Box::new(Latent {
                q,
                q_norm: q_latent.map(|width| norm("q_a_layernorm", width)),
                kv_a: Some(kv_a),
                kv_norm: Some(norm("kv_a_layernorm", latent)),
                kv_scale: 1.0,
                kv_b,
                gate: None,
            })),
            layout: RopeLayout { head_dim: nope + rotated, first: nope, interleaved },
            ..base.attention_of(Vec::new(), o, rope)
        };
        attention.shape.value_dim = value;
        attention
    }
}

/// What turns the last part of each head, and the factor on scores, which grows where positions are stretched.
///
/// Fails where two settings say how many values are turned, and do not agree.
pub fn rotation(config: &Config<'_>, heads: &LatentHeads) -> Result<(Arc<Rope>, f32)> {
    rotation_of(config, heads, heads.rotated)
}

/// The same, where a share of so many values of a head is turned.
fn rotation_of(config: &Config<'_>, heads: &LatentHeads, whole: usize) -> Result<(Arc<Rope>, f32)> {
    let LatentHeads { nope, rotated, .. } = *heads;
    let rope = rope(config, whole)?;
    if 2 * rope.inverse_frequencies.len() != rotated {
        return Err(Error::failed(format!(
            "config.json: partial_rotary_factor says that {} values of a head are rotated, and qk_rope_head_dim that {rotated} are; take the \
             former out",
            2 * rope.inverse_frequencies.len()
        )));
    }
    let scale = warmed(nope + rotated, &rope);
    Ok((rope, scale))
}

fn build(config: &Config<'_>, kind: Kind) -> Result<Graph> {
    let mut base = Base::read(config)?;
    if kind == Kind::GlmLite {
        base.eps = config.positive("rms_norm_eps", 1e-5)? as f32;
    }
    let heads = LatentHeads::read(config, &mut base)?;
    // Mistral's share of a head is that of all of it.
    let whole = if kind == Kind::Mistral4 { heads.nope + heads.rotated } else { heads.rotated };
    let (rope, scale) = rotation_of(config, &heads, whole)?;
    let temperature = if kind == Kind::Mistral4 { temperature(config)? } else { None };
    let sparse = match kind {
        Kind::GlmLite => with_experts(config, base.layers, |layer| layer > 0)?,
        Kind::V32 | Kind::Glm5 => {
            let dense = config.count_or("first_k_dense_replace", 3)?;
            with_experts(config, base.layers, |layer| layer >= dense)?
        }
        _ => {
            let dense = config.count_or("first_k_dense_replace", 0)?;
            (0..base.layers).map(|layer| layer >= dense).collect()
        }
    };
    let further = config.count_or("num_nextn_predict_layers", 0)?;
    // Runtimes do not read it for others.
    let told = matches!(kind, Kind::V3 | Kind::GlmLite | Kind::Mistral4);
    let interleaved = !told || config.flag("rope_interleave", true)?;
    let choices = match kind {
        Kind::V32 | Kind::Glm5 => {
            // Layers that predict further tokens choose for themselves.
            let mut shared = if kind == Kind::Glm5 { shared_choices(config, base.layers)? } else { Vec::new() };
            shared.truncate(base.layers);
            shared.resize(base.layers + further, false);
            let rotated = heads.rotated;
            let like = Indexing { rotated, interleaved: kind == Kind::Glm5, behind: false, latent: true, eps: 1e-6 };
            Some(choices(config, &base, shared, like)?)
        }
        _ => None,
    };
    let block = |at: String, layer: usize, sparse: bool| {
        let module = format!("{at}.self_attn");
        let mut attention = heads.attention(&base, &module, Some(rope.clone()), interleaved);
        attention.shape.scale = scale;
        attention.temperature = temperature.clone();
        attention.choice = choices.as_ref().map(|choices| choices(layer, &module));
        let feed_forward = feed_forward(&base, config, kind, &format!("{at}.mlp"), sparse)?;
        Ok(base.usual_block(at, attention, feed_forward))
    };
    let blocks = base.each(|layer| block(base.at(layer), layer, sparse[layer]))?;
    let mut graph = base.graph(config, kind.family(), blocks)?;
    for layer in base.layers..base.layers + further {
        further::append(&mut graph, &base, &further::DEEPSEEK, block(base.at(layer), layer, true)?);
    }
    Ok(graph)
}

/// What chooses the tokens that attention `module` of a layer sees.
pub type Choices<'a> = Box<dyn Fn(usize, &str) -> Choice + 'a>;

/// How the heads of an indexer are turned, and how their keys are normed.
#[derive(Clone, Copy)]
pub struct Indexing {
    /// How many of their values turn.
    pub rotated: usize,
    /// Neighbours turn together.
    pub interleaved: bool,
    /// The last values of a head turn, not the first.
    pub behind: bool,
    /// Their queries are made of the latent of attention's, not of what attention is given.
    pub latent: bool,
    /// Of the norm of keys.
    pub eps: f32,
}

/// What chooses for each layer; those that are `shared` take over the choice of the last one before them that has an indexer.
///
/// Fails where there is no latent of queries, if it is read.
pub fn choices<'a>(config: &Config<'_>, base: &'a Base, shared: Vec<bool>, like: Indexing) -> Result<Choices<'a>> {
    let [heads, head_dim, count] = ["index_n_heads", "index_head_dim", "index_topk"].map(|key| config.count(key));
    let (heads, head_dim, count) = (heads?, head_dim?, count?);
    let width = if like.latent { config.count("q_lora_rank")? } else { base.hidden };
    let rotated = like.rotated;
    if rotated > head_dim {
        return Err(Error::failed(format!(
            "config.json: {rotated} values of a head are rotated (qk_rope_head_dim), and heads of the indexer have only {head_dim} \
             (index_head_dim)"
        )));
    }
    let scale = ((head_dim * heads) as f32).powf(-0.5);
    let shape =
        IndexShape { heads, head_dim, scale, count, block: 1, local: 0, apart: false, pooled: false, entries: false };
    let first = if like.behind { head_dim - rotated } else { 0 };
    Ok(Box::new(move |layer, module| {
        if shared[layer] {
            return Choice::Earlier(shape);
        }
        let module = format!("{module}.indexer");
        let linear = |name: &str, rows, cols| Linear::plain(format!("{module}.{name}"), rows, cols, false);
        let k_norm = Norm {
            kind: NormKind::Layer,
            bias: Some(format!("{module}.k_norm.bias")),
            eps: like.eps,
            ..base.norm_of(&format!("{module}.k_norm"), head_dim)
        };
        let indexer = Indexer {
            q: linear("wq_b", heads * head_dim, width),
            latent: like.latent,
            input_norm: None,
            temperature: None,
            k: Some(linear("wk", head_dim, base.hidden)),
            q_norm: None,
            k_norm,
            weights: Some(linear("weights_proj", heads, base.hidden)),
            pool: None,
            mean: false,
            shape,
            layout: RopeLayout { head_dim, first, interleaved: like.interleaved },
        };
        Choice::Own(Box::new(indexer), shared.get(layer + 1) == Some(&true))
    }))
}

/// Which layers take over the choice of the last one before them that has an indexer: `indexer_types`, or what `index_topk_pattern` or
/// `index_topk_freq` and `index_skip_topk_offset` say.
pub fn shared_choices(config: &Config<'_>, layers: usize) -> Result<Vec<bool>> {
    let wrong = |said: &str| Error::failed(format!("config.json: indexer type {said} is not supported"));
    let of = |said: &str| match said {
        "full" | "F" => Ok(false),
        "shared" | "S" => Ok(true),
        other => Err(wrong(other)),
    };
    let listed = |key| -> Result<Option<Vec<bool>>> {
        let Some(types) = config.list(key)? else { return Ok(None) };
        let each = types.iter().map(|kind| kind.as_str().map_or_else(|| Err(wrong(&kind.to_string())), of));
        each.collect::<Result<Vec<bool>>>().map(Some)
    };
    let pattern = config.get("index_topk_pattern");
    let shared = match (listed("indexer_types")?, pattern.and_then(|pattern| pattern.as_str())) {
        (Some(shared), _) => shared,
        (None, Some(pattern)) => pattern.chars().map(|kind| of(&kind.to_string())).collect::<Result<_>>()?,
        (None, None) if pattern.is_some_and(|pattern| !pattern.is_null()) => {
            listed("index_topk_pattern")?.unwrap_or_default()
        }
        (None, None) => {
            let every = config.count_or("index_topk_freq", 1)?.max(1);
            let offset = config.count_or("index_skip_topk_offset", 2)?;
            (0..layers).map(|layer| !(layer + 1).saturating_sub(offset).is_multiple_of(every)).collect()
        }
    };
    if shared.len() < layers || shared.first() == Some(&true) {
        return Err(Error::failed(format!(
            "config.json: it has to be said of each of {layers} layers whether it has an indexer, and the first has to have one"
        )));
    }
    Ok(shared)
}

/// What scores of heads of so many values are multiplied by: more where YaRN stretches positions and says so.
pub fn warmed(head_dim: usize, rope: &Rope) -> f32 {
    let scale = (head_dim as f32).powf(-0.5);
    match rope.scaling {
        RopeScaling::Yarn { factor, mscale_all_dim, .. } if mscale_all_dim != 0.0 => {
            scale * (warmth(factor.into(), mscale_all_dim.into()) as f32).powi(2)
        }
        _ => scale,
    }
}

/// The feed-forward layer `module`, with experts where it is `sparse` and the model has some.
fn feed_forward(base: &Base, config: &Config<'_>, kind: Kind, module: &str, sparse: bool) -> Result<Layer> {
    let act = activation(config, Activation::Silu)?;
    // Transformers reads it for V2 alone, and for no routed expert.
    let mlp_bias = kind == Kind::V2 && config.flag("mlp_bias", false)?;
    let Some(experts) = config.optional_count("n_routed_experts")?.filter(|_| sparse) else {
        return Ok(Layer::Mlp(base.gated(module, config.count("intermediate_size")?, act, mlp_bias)));
    };
    let mut moe = moe(base, config, module, experts, act, kind.chosen(), kind != Kind::V2)?;
    if let Some((shared, _)) = &mut moe.shared {
        shared.inputs.iter_mut().chain([&mut shared.down]).for_each(|linear| linear.bias = mlp_bias);
    }
    if kind == Kind::Mistral4 {
        let inner = config.count("moe_intermediate_size")?;
        let module = format!("{module}.experts");
        let tensors = ["gate_up_proj", "down_proj"].map(|name| format!("{module}.{name}"));
        let (sizes, halves) = ([experts, base.hidden, inner], Split::of(&[inner; 2]));
        moe.experts = stacked(&module, tensors, [None, None], sizes, false, halves, act);
    }
    Ok(Layer::Moe(moe))
}

/// DeepSeek's experts; `normed` says whether weights are divided by their sum where config.json does not.
///
/// Fails for groups that do not divide the experts, or that hold too few of them.
pub fn moe(
    base: &Base,
    config: &Config<'_>,
    module: &str,
    experts: usize,
    act: Activation,
    chosen: Chosen,
    normed: bool,
) -> Result<Moe> {
    let inner = config.count("moe_intermediate_size")?;
    let renormalize = config.flag("norm_topk_prob", normed)?;
    let mut router = router(base, format!("{module}.gate"), experts, config.count("num_experts_per_tok")?, renormalize);
    router.scale = config.number("routed_scaling_factor", 1.0)? as f32;
    let grouped = match chosen {
        Chosen::Sigmoid => {
            router.scoring = Scoring::Sigmoid;
            router.correction = Some((format!("{module}.gate.e_score_correction_bias"), vec![experts]));
            Some(2)
        }
        Chosen::SoftmaxOfTwo => Some(2),
        Chosen::Softmax => match config.get("topk_method").and_then(|v| v.as_str()).unwrap_or("greedy") {
            "greedy" => None,
            "group_limited_greedy" => Some(1),
            other => return Err(Error::failed(format!("config.json: topk_method `{other}` is not supported"))),
        },
    };
    router.groups = match grouped {
        None => None,
        Some(ranked_by) => {
            let count = config.optional_count("n_group")?.unwrap_or(1);
            if !experts.is_multiple_of(count) {
                return Err(Error::failed(format!("config.json: {experts} experts do not divide into {count} groups")));
            }
            let kept = config.optional_count("topk_group")?.unwrap_or(1);
            // Which of the others are taken then is left to the order in which a runtime sorts equal numbers.
            if experts / count * kept < router.top_k {
                return Err(Error::failed(format!(
                    "config.json: topk_group {kept} of {count} groups of {} experts hold fewer than the {} of \
                     num_experts_per_tok",
                    experts / count,
                    router.top_k
                )));
            }
            Some(Groups { count, kept, ranked_by })
        }
    };
    let shared = config.optional_count("n_shared_experts")?;
    let shared = shared.map(|n| (base.gated(&format!("{module}.shared_experts"), n * inner, act, false), None));
    let experts = (0..experts).map(|e| base.gated(&format!("{module}.experts.{e}"), inner, act, false)).collect();
    Ok(Moe { router, experts, shared, weigh_input: false, latent: None, norms: None })
}
