//! The metadata of a GGUF file but for the tokenizer: `general.*`, the architecture's settings, `quantize.imatrix.*`.
//!
//! Loaders ask for exact types: counts are u32, reals f32.

mod choice;
mod joint;
mod per_layer;
mod states;
mod streams;
#[cfg(test)]
mod tests;
mod windows;

use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};
use kernels::{Activation, DeltaShape, NormKind};
use serde_json::Value;

use crate::dialect::architectures::{Architecture, ROPE_FREQS};
use crate::dialect::names::{self, ExportPlan, Source};
use crate::dialect::same;
use crate::dialect::settings::CURVE;
use crate::dialect::settings::Settings;
use crate::error::{Error, Result};
use crate::families::rope::warmth;
use crate::families::{self, longest_context};
use crate::graph::{
    Attention, Block, Convolution, Graph, Latent, Layer, Mlp, Moe, Norm, Projections, RopeScaling, Scoring, Temperature,
};
use crate::json::integer;

/// Keys and values in the order in which they are written.
pub type Metadata = Vec<(String, MetadataValue)>;

/// The version of ggml's block types; it has not changed since 2023.
const QUANTIZATION_VERSION: u32 = 2;

/// The context that is written where config.json does not say.
const UNKNOWN_CONTEXT: usize = 2048;

/// What is said about a model beside its shape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// `general.name`.
    pub name: Option<String>,
    /// `general.license`: an SPDX id, as on model cards.
    pub license: Option<String>,
}

/// Where an importance matrix came from, for `quantize.imatrix.*`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImportanceSource {
    /// Its file, or what takes its place.
    pub file: String,
    /// The text that it was collected on.
    pub dataset: Option<String>,
    /// Tensors in it.
    pub entries: u32,
    /// Chunks of text that were run.
    pub chunks: Option<u32>,
}

/// What [`metadata`] gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Written {
    /// Keys and values.
    pub metadata: Metadata,
    /// What the file cannot say, one sentence each, for the user to read.
    pub notices: Vec<String>,
    /// The name that the model has to have in the file, where its own would bring about what its tokenizer does not do.
    pub name: Option<String>,
}

impl Written {
    pub(super) fn string(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.metadata.push((key.into(), MetadataValue::String(value.into())));
    }

    pub(super) fn count(&mut self, key: impl Into<String>, value: usize) -> Result<()> {
        let key = key.into();
        let small =
            u32::try_from(value).map_err(|_| Error::usage(format!("{key} would be {value}, beyond 32 bits")))?;
        self.metadata.push((key, MetadataValue::U32(small)));
        Ok(())
    }

    /// A count for each layer.
    pub(super) fn counts(&mut self, key: impl Into<String>, values: impl Iterator<Item = usize>) -> Result<()> {
        let values = values.map(|value| MetadataValue::U32(value as u32)).collect();
        self.metadata.push((key.into(), metadata_array(values, GGUFValueType::U32)?));
        Ok(())
    }

    pub(super) fn float(&mut self, key: impl Into<String>, value: f32) {
        self.metadata.push((key.into(), MetadataValue::F32(value)));
    }

    pub(super) fn flag(&mut self, key: impl Into<String>, value: bool) {
        self.metadata.push((key.into(), MetadataValue::Bool(value)));
    }

    pub(super) fn notice(&mut self, text: impl Into<String>) {
        self.notices.push(text.into());
    }
}

/// Describes a model: everything that a loader asks for, but the tokenizer.
///
/// `config` is config.json, `file_type` the mix's number. Fails for what the architecture has no setting for; what only
/// changes little, as a sliding window that llama.cpp ignores, is a notice.
pub fn metadata(
    graph: &Graph,
    config: &Value,
    plan: &ExportPlan,
    about: &About,
    file_type: u32,
    importance: Option<&ImportanceSource>,
) -> Result<Written> {
    let mut out = Written::default();
    out.string("general.architecture", plan.architecture);
    out.string("general.type", "model");
    if let Some(name) = &about.name {
        out.string("general.name", name);
    }
    out.string("general.size_label", size_label(parameters(plan)));
    if let Some(license) = &about.license {
        out.string("general.license", license);
    }
    out.count("general.file_type", file_type as usize)?;
    out.count("general.quantization_version", QUANTIZATION_VERSION as usize)?;
    settings(&mut out, graph, config, plan)?;
    if let Some(importance) = importance {
        out.string("quantize.imatrix.file", &importance.file);
        if let Some(dataset) = &importance.dataset {
            out.string("quantize.imatrix.dataset", dataset);
        }
        out.count("quantize.imatrix.entries_count", importance.entries as usize)?;
        if let Some(chunks) = importance.chunks {
            out.count("quantize.imatrix.chunks_count", chunks as usize)?;
        }
    }
    Ok(out)
}

/// The keys under the architecture's name.
///
/// What they say is read back and compared with the model: an architecture has no setting for what differs then.
fn settings(out: &mut Written, graph: &Graph, config: &Value, plan: &ExportPlan) -> Result<()> {
    let architecture = Architecture::named(plan.architecture).expect("of the plan");
    let id = architecture.id;
    let key = |name: &str| format!("{id}.{name}");
    let graph = &*graph.predicting_further(architecture.further.is_some());
    let layers = Layers::of(graph, id)?;
    let (attention, first) = (&layers.attention, layers.first);
    let context = match &graph.embedding.positions {
        Some((_, rows)) => *rows,
        None => context_of(out, config)?,
    };
    if layers.dense.iter().any(|mlp| mlp.activation == Activation::Gelu) {
        out.notice("llama.cpp approximates GELU: logits differ a little from the original's");
    }

    let latents = first.norms().into_iter().find(|norm| norm.eps != graph.final_norm.eps);
    if let Some(latents) = latents.filter(|_| latents_are_near(graph)) {
        out.notice(format!(
            "llama.cpp norms the latents of queries, keys and values with an epsilon of {}, and transformers with {}: logits differ a little \
             from the original's",
            graph.final_norm.eps, latents.eps
        ));
    }

    out.count(key("vocab_size"), graph.vocabulary)?;
    out.count(key("context_length"), context)?;
    out.count(key("embedding_length"), graph.hidden)?;
    blocks(out, graph, &layers, id)?;
    out.count(key("attention.head_count"), first.shape.heads)?;
    let rope_of = |a: &&Attention| a.rope.as_ref().map(|rope| 2 * rope.inverse_frequencies.len());
    let rotated = rope_of(&first).or_else(|| attention.iter().find_map(rope_of));
    // What no position turns has its place in the keys that all heads share, too.
    let shared = match &first.projections {
        Projections::Latent(latent) => latent.kv_a.as_ref().map(|kv_a| kv_a.rows - latent.kv_b.cols),
        Projections::Direct(_) | Projections::Joint(_) => None,
    };
    let rotated = rotated.or(shared);
    heads(out, graph, first, rotated.unwrap_or(0), id)?;
    heads_by_layer(out, graph, &layers, architecture)?;
    out.float(
        key(match graph.final_norm.kind {
            NormKind::Rms | NormKind::Length => "attention.layer_norm_rms_epsilon",
            NormKind::Layer => "attention.layer_norm_epsilon",
        }),
        graph.final_norm.eps,
    );
    if matches!(id, "nemotron_h" | "nemotron_h_moe") {
        // Asked for, and used by nothing.
        out.float(key("attention.layer_norm_epsilon"), graph.final_norm.eps);
    }
    if let Some(rotated) = rotated.filter(|_| id != "step35") {
        out.count(key("rope.dimension_count"), rotated)?;
    }
    match id {
        "deepseek4" => joint::rope(out, attention, id)?,
        _ => rope(out, attention, architecture, context)?,
    }
    windows::settings(out, graph, attention, architecture, context)?;
    if matches!(id, "qwen2vl" | "qwen3vl" | "qwen3vlmoe" | "qwen35" | "qwen35moe" | "qwen4exp")
        || matches!(graph.family, "glm4v" | "glm4v_moe")
    {
        sections(out, config, id, rotated.unwrap_or(0))?;
    }
    if matches!(id, "qwen3vl" | "qwen3vlmoe") {
        // As many of the first layers are given what a tower's inner layers make of an image.
        let said = config["vision_config"]["deepstack_visual_indexes"].as_array().map(Vec::len);
        let reaching = said.or_else(|| config["n_deepstack_layers"].as_u64().map(|n| n as usize)).unwrap_or(0);
        out.count(key("n_deepstack_layers"), reaching)?;
    }
    states::recurrent(out, graph, &layers, id)?;
    factors(out, graph, first, id);
    if id == "apertus" {
        curves(out, &layers)?;
    }
    choice::settings(out, graph, &layers, context, id)?;
    streams::settings(out, graph, &layers, id)?;
    streams::grams(out, graph, config, id)?;
    joint::settings(out, graph, &layers, id)?;
    experts(out, graph, &layers, id)?;
    read_back(out, graph, architecture, plan)
}

/// How many blocks there are, of which kinds, and how wide their feed-forward layers.
fn blocks(out: &mut Written, graph: &Graph, layers: &Layers<'_>, id: &'static str) -> Result<()> {
    let key = |name: &str| format!("{id}.{name}");
    out.count(key("block_count"), graph.blocks.len())?;
    if !graph.predictors().is_empty() {
        out.count(key("nextn_predict_layers"), graph.predictors().len())?;
    }
    match id {
        // By it layers are told apart.
        "nemotron_h" | "nemotron_h_moe" => {
            let inner = |block: &Block| match &block.steps[0].layer {
                Layer::Mlp(mlp) => mlp.inner(),
                Layer::Moe(_) => layers.inner,
                _ => 0,
            };
            out.counts(key("feed_forward_length"), graph.blocks.iter().map(inner))?;
        }
        _ if id == "gemma4" => out.counts_or_one(key("feed_forward_length"), &per_layer::widths(graph))?,
        _ => out.count(key("feed_forward_length"), layers.inner)?,
    }
    Ok(())
}

/// Heads of keys and values where layers differ in them, and what else architectures say of each layer that have such.
fn heads_by_layer(out: &mut Written, graph: &Graph, layers: &Layers<'_>, architecture: &Architecture) -> Result<()> {
    let id = architecture.id;
    let key = format!("{id}.attention.head_count_kv");
    if id == "step35" {
        // Layers with a window have more heads, and turn all of each, of which the others turn half.
        let heads: Vec<usize> = layers.attention.iter().map(|attention| attention.shape.heads).collect();
        let count = format!("{id}.attention.head_count");
        let turned = format!("{id}.rope.dimension_count");
        out.metadata.retain(|(name, _)| *name != count && *name != turned);
        out.counts(count, heads.into_iter())?;
        out.count(turned, layers.first.shape.head_dim)?;
    }
    // Layers with a state are told by there being no keys, and those with a window by there being more.
    let keys: Option<fn(&Attention) -> usize> = match id {
        "kimi-linear" | "bailingmoe3" | "glm5-next" => Some(|_| 1),
        "mimo2" => Some(|attention| attention.shape.kv_heads),
        _ => None,
    };
    if let Some(keys) = keys {
        out.metadata.retain(|(name, _)| *name != key);
        out.counts(key, graph.blocks.iter().map(|block| block.attention().map_or(0, keys)))?;
    } else if architecture.per_layer {
        let kv_heads: Vec<usize> = layers.attention.iter().map(|a| a.shape.kv_heads).collect();
        out.metadata.retain(|(name, _)| *name != key);
        out.counts_or_one(key, &kv_heads)?;
        per_layer::settings(out, graph, layers, id)?;
    } else if architecture.altup {
        per_layer::shared(out, graph, layers, id)?;
        per_layer::streams(out, graph, layers, id)?;
    }
    Ok(())
}

/// The layers of a model in an architecture of GGUF, which has one attention and one feed-forward layer in each block.
struct Layers<'g> {
    /// The attention of each block.
    attention: Vec<&'g Attention>,
    /// The first block's attention, whose shape is written for all.
    first: &'g Attention,
    /// The states of blocks that have one, and the convolutions before them.
    recurrent: Vec<(DeltaShape, &'g Convolution)>,
    /// The convolutions of blocks that have nothing else in place of attention.
    short: Vec<&'g Convolution>,
    /// Feed-forward layers without experts.
    dense: Vec<&'g Mlp>,
    /// Mixtures of experts.
    sparse: Vec<&'g Moe>,
    /// Width of feed-forward layers; of an expert where all layers are mixtures.
    inner: usize,
    /// Width of an expert.
    expert: Option<usize>,
}

impl<'g> Layers<'g> {
    /// Fails for what an architecture has no setting for: other layers than one of each kind in a block, norms with different
    /// epsilons, and what llama.cpp takes for granted of architecture `id`.
    fn of(graph: &'g Graph, id: &'static str) -> Result<Layers<'g>> {
        let cannot = |what: String| names::cannot(id, what);
        let steps = || graph.blocks.iter().flat_map(|block| &block.steps);
        let attention: Vec<&Attention> = graph.blocks.iter().filter_map(|block| block.attention()).collect();
        let first = if id == "gemma4" { per_layer::first(&attention) } else { attention.first().copied() };
        let Some(first) = first else { return Err(cannot("a model without attention".to_owned())) };
        let state = |layer: &'g Layer| match layer {
            Layer::Delta(delta) => Some((delta.shape, &delta.convolution)),
            Layer::Mamba(mamba) => Some((mamba.shape, &mamba.convolution)),
            _ => None,
        };
        let short: Vec<_> = steps()
            .filter_map(|step| if let Layer::Short(short) = &step.layer { Some(&short.convolution) } else { None })
            .collect();
        let recurrent: Vec<_> = steps().filter_map(|step| state(&step.layer)).collect();
        let dense: Vec<&Mlp> =
            steps().filter_map(|step| if let Layer::Mlp(mlp) = &step.layer { Some(mlp) } else { None }).collect();
        let sparse: Vec<&Moe> =
            steps().filter_map(|step| if let Layer::Moe(moe) = &step.layer { Some(moe) } else { None }).collect();
        let moe = sparse.first();
        let expert = moe.and_then(|moe| moe.experts.first()).map(Mlp::inner);
        let Some(inner) = dense.first().map(|mlp| mlp.inner()).or(expert) else {
            return Err(cannot("a model without feed-forward layers".to_owned()));
        };
        let (count, fed) = (graph.blocks.len(), dense.len() + sparse.len());
        let mixed = attention.len() + recurrent.len() + short.len();
        let one_each = match id {
            // One layer of any kind in each block, or all three kinds.
            "nemotron_h" | "nemotron_h_moe" => mixed + fed == count + graph.predictors().len(),
            "falcon-h1" => attention.len() == count && recurrent.len() == count && fed == count,
            _ => mixed == count && fed == count,
        };
        if !one_each {
            return Err(cannot("blocks without one attention and one feed-forward layer each".to_owned()));
        }
        let many = first.shape;
        match id {
            "nemotron_h_moe" if !dense.is_empty() => return Err(cannot("layers without experts".to_owned())),
            "granitehybrid" | "nemotron_h" | "nemotron_h_moe" if recurrent.is_empty() => {
                return Err(cannot("a model without state spaces".to_owned()));
            }
            // Which llama.cpp's class does not load.
            "granitehybrid"
                if recurrent.iter().any(|(shape, _)| shape.value_heads * shape.value_dim != 2 * graph.hidden) =>
            {
                return Err(cannot("state spaces that are not twice as wide as the stream".to_owned()));
            }
            "qwen3next" if !dense.is_empty() => return Err(cannot("layers without experts".to_owned())),
            "qwen3next" | "qwen35" | "qwen35moe" | "qwen4exp" if recurrent.is_empty() => {
                return Err(cannot("a model without linear attention".to_owned()));
            }
            "olmoe" | "dots1" if many.kv_heads != many.heads => {
                return Err(cannot(format!("{} heads that share {} keys", many.heads, many.kv_heads)));
            }
            // By the number of layers llama.cpp tells whether queries are made through a latent.
            "deepseek2" | "mistral4" => {
                let layers = graph.trunk().len();
                let lite = matches!(layers, 26 | 27) || layers == 48 && graph.vocabulary == 128256;
                let direct = matches!(&first.projections, Projections::Latent(latent) if latent.q.len() == 1);
                if lite != direct {
                    let how = if direct { "without" } else { "through" };
                    return Err(cannot(format!("queries made {how} a latent in a model of {layers} layers")));
                }
            }
            // It asks for keys of every layer, and tells those with a state by there being none; it divides all weights of experts by their sum.
            "kimi-linear" => {
                if matches!(&first.projections, Projections::Latent(latent) if latent.q.len() > 1) {
                    return Err(cannot("queries made through a latent".to_owned()));
                }
                if sparse.iter().any(|moe| !moe.router.renormalize) {
                    return Err(cannot("weights of experts that are not divided by their sum".to_owned()));
                }
            }
            "glm5-next" if graph.streams() != 4 => {
                return Err(cannot(format!("{} streams between layers", graph.streams())));
            }
            "glm5-next" if recurrent.is_empty() => return Err(cannot("a model without linear attention".to_owned())),
            "glm5-next" if first.choice.as_ref().is_some_and(|choice| choice.shape().block < 2) => {
                return Err(cannot("an indexer whose blocks are single tokens".to_owned()));
            }
            // Its scores are not multiplied there where positions are stretched.
            "hy_v4" if first.rope.as_ref().is_some_and(|rope| rope.scaling != RopeScaling::None) => {
                return Err(cannot("positions that are scaled".to_owned()));
            }
            _ => {}
        }
        let eps = graph.final_norm.eps;
        // There the norm of an indexer's keys has a setting of its own.
        let told = |norm: &&Norm| id == "glm5-next" && norm.kind == NormKind::Layer;
        let of_layer = |layer: &'g Layer| match latents_are_near(graph) {
            true => Vec::new(),
            false => layer.norms().into_iter().filter(|norm| !told(norm)).collect(),
        };
        let norms = steps().flat_map(|step| step.pre.iter().chain(&step.post).chain(of_layer(&step.layer)));
        if norms.into_iter().any(|norm| norm.eps != eps) {
            return Err(cannot("norms with different epsilons".to_owned()));
        }
        Ok(Layers { first, attention, recurrent, short, dense, sparse, inner, expert })
    }
}

/// Whether the norms of latents may have another epsilon than the others: they have in transformers, and in no other runtime of this model.
fn latents_are_near(graph: &Graph) -> bool {
    matches!(graph.family, "glm4_moe_lite" | "glm_moe_dsa" | "hy_v4" | "kimi_linear")
}

/// The context of a model that computes its positions, which config.json alone knows; a guess is a notice.
fn context_of(out: &mut Written, config: &Value) -> Result<usize> {
    let longest = longest_context(config)?;
    let context = longest.unwrap_or(UNKNOWN_CONTEXT);
    if longest.is_none() || families::settings(config)?.left_out.contains("max_position_embeddings") {
        out.notice(format!("config.json has no max_position_embeddings: the file says a context of {context} tokens"));
    }
    Ok(context)
}

/// Numbers and widths of heads, of which `rotated` values are rotated by position.
fn heads(out: &mut Written, graph: &Graph, first: &Attention, rotated: usize, id: &str) -> Result<()> {
    let key = |name: &str| format!("{id}.{name}");
    let shape = first.shape;
    let latent = match &first.projections {
        Projections::Latent(latent) => {
            let Latent { q, kv_b, .. } = &**latent;
            Some((q.first().filter(|_| q.len() > 1).map(|q| q.rows), kv_b.cols))
        }
        Projections::Direct(_) | Projections::Joint(_) => None,
    };
    match latent {
        None => {
            match id {
                // Layers without any have a state.
                "granitehybrid" | "nemotron_h" | "nemotron_h_moe" | "lfm2" | "lfm2moe" => {
                    let heads = |block: &Block| block.attention().map_or(0, |attention| attention.shape.kv_heads);
                    out.counts(key("attention.head_count_kv"), graph.blocks.iter().map(heads))?;
                }
                _ => out.count(key("attention.head_count_kv"), shape.kv_heads)?,
            }
            out.count(key("attention.key_length"), shape.head_dim)?;
            out.count(key("attention.value_length"), shape.value_dim)?;
        }
        // Queries meet the latent itself, which all heads share.
        Some((q, latent)) => {
            let shared = latent + rotated;
            out.count(key("attention.head_count_kv"), 1)?;
            out.count(key("attention.key_length"), shared)?;
            out.count(key("attention.value_length"), latent)?;
            out.count(key("attention.key_length_mla"), shape.head_dim)?;
            out.count(key("attention.value_length_mla"), shape.value_dim)?;
            out.count(key("attention.kv_lora_rank"), latent)?;
            if let Some(q) = q {
                out.count(key("attention.q_lora_rank"), q)?;
            }
        }
    }
    Ok(())
}

/// How many rotary frequencies each kind of position has: time, height and width of an image, which are the same in a text. Of `rotated` values
/// half are frequencies, and llama.cpp aborts where the sections are more.
fn sections(out: &mut Written, config: &Value, id: &'static str, rotated: usize) -> Result<()> {
    // Those of transformers' classes where nothing is said.
    let usual = if matches!(id, "glm4" | "glm4moe") { [8, 12, 12, 0] } else { [11, 11, 10, 0] };
    let key = format!("{id}.rope.dimension_sections");
    let text = families::settings(config)?.values;
    let list = text["rope_parameters"]["mrope_section"].as_array();
    let sections = list.map(|list| list.iter().filter_map(integer).chain([0; 4]).take(4).collect::<Vec<_>>());
    let Some(sections) = sections.or_else(|| (id != "qwen2vl").then(|| usual.to_vec())) else {
        return Err(names::cannot("qwen2vl", "a model whose config.json has no mrope_section".to_owned()));
    };
    let mut left = rotated as i64 / 2;
    let sections = sections.into_iter().map(|section| {
        let section = section.clamp(0, left);
        left -= section;
        MetadataValue::I32(section as i32)
    });
    let sections: Vec<MetadataValue> = sections.collect();
    if id == "glm4" && sections[..2].contains(&MetadataValue::I32(0)) {
        // llama.cpp would take all positions for those of a text.
        return Err(names::cannot(id, "positions of several kinds of which one rotates nothing".to_owned()));
    }
    out.metadata.push((key, metadata_array(sections, GGUFValueType::I32)?));
    Ok(())
}

/// What attention scores, logits and residuals are multiplied by or capped at.
fn factors(out: &mut Written, graph: &Graph, first: &Attention, id: &str) {
    let key = |name: &str| format!("{id}.{name}");
    let shape = first.shape;
    if let Some(cap) = shape.softcap {
        out.float(key("attn_logit_softcapping"), cap);
    }
    if let Some(cap) = graph.head.softcap {
        out.float(key("final_logit_softcapping"), cap);
    }
    if let Some(limit) = first.clip {
        out.float(key("attention.clamp_kqv"), limit);
    }
    match id {
        "granite" | "granitemoe" | "granitehybrid" => {
            if id == "granitehybrid" {
                out.flag(key("rope.scaling.finetuned"), first.rope.is_some());
            }
            // Bamba has none.
            if graph.family != "bamba" {
                out.float(key("attention.scale"), shape.scale);
                out.float(key("embedding_scale"), graph.embedding.scale);
                out.float(key("residual_scale"), graph.blocks[0].steps[0].scale);
                out.float(key("logit_scale"), 1.0 / graph.head.scale);
            }
        }
        "mimo2" => out.float(key("attention.value_scale"), first.value_scale),
        "mistral3" | "mistral4" => {
            if let Some(Temperature::Steps { scale, floor, .. }) = first.temperature {
                out.float(key("attention.temperature_scale"), scale);
                if id == "mistral4" {
                    out.metadata.push((key("attention.temperature_length"), MetadataValue::U32(floor as u32)));
                }
            }
        }
        "command-r" | "cohere2" | "cohere2moe" => out.float(key("logit_scale"), graph.head.scale),
        "gptneox" | "stablelm" => out.flag(key("use_parallel_residual"), graph.blocks[0].parallel),
        _ => {}
    }
}

/// The numbers of each layer's activation, which llama.cpp takes through softplus, as the model does.
///
/// Fails for a layer with another activation.
fn curves(out: &mut Written, layers: &Layers<'_>) -> Result<()> {
    let mut lists = [const { Vec::new() }; 4];
    for mlp in &layers.dense {
        let Activation::Xielu { positive, negative, beta, eps } = mlp.activation else {
            return Err(names::cannot("apertus", format!("a feed-forward layer with {}", same::named(mlp.activation))));
        };
        let before = |x: f32| f64::from(x).exp_m1().ln() as f32;
        let numbers = [before(positive), before(negative - beta), beta, eps];
        lists.iter_mut().zip(numbers).for_each(|(list, number)| list.push(MetadataValue::F32(number)));
    }
    for (list, name) in lists.into_iter().zip(["alpha_p", "alpha_n", "beta", "eps"]) {
        out.metadata.push((format!("{CURVE}.{name}"), metadata_array(list, GGUFValueType::F32)?));
    }
    Ok(())
}

/// Number, width and routing of experts, where there are some.
fn experts(out: &mut Written, graph: &Graph, layers: &Layers<'_>, id: &'static str) -> Result<()> {
    let key = |name: &str| format!("{id}.{name}");
    let cannot = |what: String| names::cannot(id, what);
    let Layers { sparse, inner, expert, .. } = layers;
    if let (Some(moe), Some(expert)) = (sparse.first(), *expert) {
        out.count(key("expert_count"), moe.experts.len())?;
        out.count(key("expert_used_count"), moe.router.top_k)?;
        if !matches!(id, "llama" | "granitemoe" | "granitehybrid" | "olmoe") {
            out.count(key("expert_feed_forward_length"), expert)?;
        }
        let tells = matches!(
            id,
            "qwen2moe"
                | "qwen3next"
                | "qwen35moe"
                | "qwen4exp"
                | "exaone-moe"
                | "hy_v3"
                | "granitemoe"
                | "granitehybrid"
                | "nemotron_h_moe"
                | "ernie4_5-moe"
                | "hunyuan-moe"
                | "cohere2moe"
                | "step35"
        );
        if let (Some((shared, _)), true) = (&moe.shared, tells) {
            out.count(key("expert_shared_feed_forward_length"), shared.inner())?;
        }
        if id == "llama4" {
            let step = graph.blocks.len() / sparse.len().max(1);
            out.count(key("interleave_moe_layer_step"), step)?;
        }
        if matches!(id, "lfm2moe" | "ernie4_5-moe") {
            out.count(key("leading_dense_block_count"), graph.blocks.len() - sparse.len())?;
        }
        if matches!(id, "lfm2moe" | "minimax-m2") {
            out.count(key("expert_gating_func"), 2)?;
        }
        if id == "ernie4_5-moe" {
            out.count(key("interleave_moe_layer_step"), 1)?;
        }
        if id == "step35" {
            out.count(key("expert_gating_func"), 2)?;
            out.float(key("expert_weights_scale"), moe.router.scale);
            out.flag(key("expert_weights_norm"), moe.router.renormalize);
            limits(out, graph, id)?;
        }
        if id == "nemotron_h_moe" {
            out.count(key("expert_shared_count"), 1)?;
            out.float(key("expert_weights_scale"), moe.router.scale);
            out.flag(key("expert_weights_norm"), moe.router.renormalize);
            if let Some(latent) = &moe.latent {
                out.count(key("moe_latent_size"), latent[0].rows)?;
            }
            if let Some(groups) = moe.router.groups.filter(|groups| groups.kept < groups.count) {
                out.count(key("expert_group_count"), groups.count)?;
                out.count(key("expert_group_used_count"), groups.kept)?;
            }
        }
        let latent = matches!(
            id,
            "deepseek2" | "deepseek32" | "glm-dsa" | "glm5-next" | "hy_v4" | "kimi-linear" | "bailingmoe3" | "mistral4"
        );
        if latent || matches!(id, "afmoe" | "glm4moe" | "exaone-moe" | "hy_v3" | "dots1" | "cohere2moe" | "minimax-m3")
        {
            let shared = moe.shared.as_ref().map_or(0, |(shared, _)| shared.inner() / expert.max(1));
            out.count(key("expert_shared_count"), shared)?;
            let all = graph.trunk().iter().flat_map(|block| &block.steps);
            let dense = all.filter(|step| matches!(step.layer, Layer::Mlp(_))).count();
            out.count(key("leading_dense_block_count"), dense)?;
            out.float(key("expert_weights_scale"), moe.router.scale);
            out.flag(key("expert_weights_norm"), moe.router.renormalize);
            let sigmoid = moe.router.scoring == Scoring::Sigmoid;
            out.count(key("expert_gating_func"), if sigmoid { 2 } else { 1 })?;
            let groups = moe.router.groups.filter(|groups| groups.kept < groups.count && latent);
            if let Some(groups) = groups {
                if !sigmoid && id != "mistral4" {
                    return Err(cannot("groups of experts that are ranked by their best expert".to_owned()));
                }
                out.count(key("expert_group_count"), groups.count)?;
                out.count(key("expert_group_used_count"), groups.kept)?;
            }
        }
    } else if matches!(id, "deepseek2" | "deepseek32" | "glm-dsa" | "mistral4") {
        out.count(key("leading_dense_block_count"), graph.trunk().len())?;
        out.count(key("expert_feed_forward_length"), *inner)?;
        out.count(key("expert_shared_count"), 0)?;
    }
    Ok(())
}

/// What is gated is limited to, in experts of each block and in what all tokens take; 0 where it is not.
fn limits(out: &mut Written, graph: &Graph, id: &'static str) -> Result<()> {
    let of = |mlp: Option<&Mlp>| MetadataValue::F32(mlp.and_then(|mlp| mlp.activation.limit()).unwrap_or(0.0));
    let (mut experts, mut shared) = (Vec::new(), Vec::new());
    for block in &graph.blocks {
        let layers = || block.steps.iter().map(|step| &step.layer);
        let moe = layers().find_map(|layer| if let Layer::Moe(moe) = layer { Some(moe) } else { None });
        let dense = layers().find_map(|layer| if let Layer::Mlp(mlp) = layer { Some(mlp) } else { None });
        experts.push(of(moe.and_then(|moe| moe.experts.first())));
        shared.push(of(moe.and_then(|moe| moe.shared.as_ref()).map(|(shared, _)| shared).or(dense)));
    }
    for (name, values) in [("swiglu_clamp_exp", experts), ("swiglu_clamp_shexp", shared)] {
        out.metadata.push((format!("{id}.{name}"), metadata_array(values, GGUFValueType::F32)?));
    }
    Ok(())
}

/// Fails unless reading what was written gives this model again.
fn read_back(out: &Written, graph: &Graph, architecture: &'static Architecture, plan: &ExportPlan) -> Result<()> {
    let cannot = |what: String| names::cannot(architecture.id, what);
    let factors = plan.tensors.iter().filter_map(|tensor| match &tensor.source {
        // Llama 3's are made of the settings that they stand for.
        Source::Values(values) if tensor.gguf != ROPE_FREQS || architecture.per_layer => {
            Some((tensor.gguf.clone(), values.clone()))
        }
        _ => None,
    });
    let read = Settings {
        asked: Default::default(),
        architecture,
        keys: out.metadata.iter().cloned().collect(),
        tensors: plan.tensors.iter().map(|tensor| (tensor.gguf.clone(), tensor.shape.clone())).collect(),
        factors: factors.collect(),
    };
    let rebuilt = read.config().map_err(|error| cannot(format!("this model ({error})")))?;
    let rebuilt = families::build(&rebuilt)?;
    let without = architecture.absorbs.then(|| names::absorbed(graph));
    let graph = without.as_ref().unwrap_or(graph);
    match same::difference(graph, &rebuilt, same::Reader { windows: architecture.windows, converted: true }) {
        Some(what) => Err(cannot(what)),
        None => Ok(()),
    }
}

/// Rotary frequencies.
fn rope(out: &mut Written, attention: &[&Attention], architecture: &Architecture, context: usize) -> Result<()> {
    let key = |name: &str| format!("{}.rope.{name}", architecture.id);
    let wide = |a: &&&Attention| a.shape.window.is_none();
    let of = |list: Vec<&&Attention>| list.into_iter().find_map(|a| a.rope.clone());
    let full = of(attention.iter().filter(wide).collect());
    let near = of(attention.iter().filter(|a| !wide(a)).collect());
    let Some(rope) = full.clone().or(near.clone()) else { return Ok(()) };
    out.float(key("freq_base"), rope.theta);
    if let Some(near) = near.filter(|near| {
        matches!(architecture.id, "gemma3" | "gemma3n" | "gemma4" | "gemma-embedding" | "step35")
            || full.is_some() && near.theta != rope.theta
    }) {
        out.float(key("freq_base_swa"), near.theta);
    }
    match &rope.scaling {
        // Llama 3's is the tensor of factors.
        RopeScaling::None | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { .. } | RopeScaling::Proportional if architecture.per_layer => {}
        RopeScaling::Proportional => {
            return Err(Error::usage(format!(
                "rotary positions of the type `proportional`, of which some pairs stand still, have no place in a GGUF file of architecture {}; \
                 write another --format",
                architecture.id
            )));
        }
        RopeScaling::Linear { factor } => {
            out.string(key("scaling.type"), "linear");
            out.float(key("scaling.factor"), *factor);
        }
        RopeScaling::Dynamic { original, .. } => {
            out.notice(format!(
                "llama.cpp has no dynamic rope scaling: beyond {original} tokens the model is given positions that it was not trained with"
            ));
        }
        RopeScaling::Yarn { factor, original, mscale_all_dim, .. } => {
            out.string(key("scaling.type"), "yarn");
            out.float(key("scaling.factor"), *factor);
            out.count(key("scaling.original_context_length"), *original)?;
            let plain = warmth(f64::from(*factor), 1.0) as f32;
            if *mscale_all_dim != 0.0 && architecture.latent {
                // A tenth of it, for reasons of history.
                out.float(key("scaling.yarn_log_multiplier"), 0.1 * mscale_all_dim);
            } else if (rope.magnitude / plain - 1.0).abs() > 1e-6 {
                out.float(key("scaling.attn_factor"), rope.magnitude / plain);
            }
            if same::bounds_are_rounded(&rope) {
                out.notice("llama.cpp rounds the bounds between which YaRN's frequencies change: logits differ a little from the original's");
            }
        }
        RopeScaling::Long { original, .. } => {
            out.string(key("scaling.type"), "longrope");
            out.count(key("scaling.original_context_length"), *original)?;
            out.float(key("scaling.attn_factor"), rope.magnitude);
            if *original < context {
                out.notice(format!(
                    "llama.cpp takes LongRoPE's long factors for contexts of more than {original} tokens, however short the text is"
                ));
            }
        }
    }
    Ok(())
}

/// Weights of the model, without what is computed.
fn parameters(plan: &ExportPlan) -> u64 {
    let stored = plan.tensors.iter().filter(|tensor| matches!(tensor.source, Source::Parts(_)));
    stored.map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum()
}

/// A count of parameters as model names have it: `135M`, `1.2B`, with at least two digits.
fn size_label(parameters: u64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")];
    let n = parameters as f64;
    let (unit, suffix) = units.into_iter().find(|(unit, _)| n > *unit).unwrap_or(units[3]);
    let scaled = n / unit;
    let decimals = match scaled.round() as u64 {
        0 => 2,
        1..10 => 1,
        _ => 0,
    };
    format!("{scaled:.decimals$}{suffix}")
}
