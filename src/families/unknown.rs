//! Models of families that are not in the list: linears found by name and shape, for quantization without data.
//!
//! What is quantized here has to be an `nn.Linear` in every runtime, for only that is looked for under its packed parts. What
//! is no such thing, or may not be, stays as it is, and the plan names it in the configuration.

use std::collections::HashSet;

use kernels::NormKind;

use super::names::component;
use super::renames::Loading;
use crate::error::{Error, Result};
use crate::graph::{BESIDE, Block, Embedding, Graph, Head, Held, Layer, Linear, Norm, Step};
use crate::weights::{Entry, StoredType, Weights};

/// Parts of names of modules in layers that are matrices and no linears to quantize: tables and filters, what chooses, layers that
/// predict further tokens, and what has no tensor of its own in most of the layers that share it.
const KEPT: &[&str] = &[
    "embed",
    "norm",
    "gate",
    "router",
    "conv",
    "rotary",
    "position",
    "relative",
    "patch",
    "lora",
    "mtp",
    "nextn",
    "shared_transf",
    "index",
    "compressor",
    "altup",
    "laurel",
];

/// Those of other senses, which may have linears of their own (`towers`).
const SENSES: &[&str] =
    &["vision", "visual", "image", "video", "audio", "speech", "projector", "resampler", "perceiver"];

/// Parts of names likewise, where they end so.
const KEPT_ENDS: &[&str] = &["emb", "wte", "wpe", "head", "heads"];

/// Whole parts of names likewise: Mamba and DeepSeek V4 multiply by these weights themselves, without
/// asking the linear, and what Ling's KDA decays by goes through an exponential.
const KEPT_WHOLE: &[&str] = &["x_proj", "dt_proj", "wo_a", "o_a_proj", "f_proj"];

/// Whole parts of names with a word of those above that hold linears: DBRX's attention with the norms around it.
const HOLDERS: &[&str] = &["norm_attn_norm"];

/// Words of those above that may be in the first part of all names, which is the model's own: RoBERTa-PreLayerNorm, ConvBERT.
const OF_MODELS: &[&str] = &["norm", "conv"];

/// Gates of feed-forward layers, which are linears all the same.
const QUANTIZED: &[&str] = &["gate_proj", "gate_up_proj", "gate_up"];

/// Parts of the names of the language model in one that also sees or hears.
const LANGUAGE: &[&str] = &["language_model", "text_model", "text_decoder", "llm"];

/// Modules that only layers which predict further tokens have.
const OF_FURTHER: &[&str] = &["eh_proj", "enorm", "hnorm"];

/// Output projections of Transformers' classes. One that shares the embedding's weight is a linear without a tensor.
const HEADS: &[&str] = &[
    "lm_head",
    "lm_head.decoder",
    "lm_head.out_proj",
    "embed_out",
    "output_projection",
    "output",
    "head",
    "head.decoder",
    "decoder",
    "predictions.decoder",
    "cls.predictions.decoder",
    "mlm_score.decoder",
    "generator_lm_head",
    "pred_layer.proj",
    "proj_out",
    "vocab_projector",
    "unembedding_projection",
    "lm_loss",
    "text_model.lm_head",
    "language_model.lm_head",
];

/// Those of models that are parts of others, as `decoder.lm_head` of an encoder-decoder made of two models.
const INNER_HEADS: &[&str] =
    &["lm_head", "lm_head.decoder", "output_projection", "embed_out", "cls.predictions.decoder"];

/// A graph that names linears and cannot be run. Fails when there are none.
pub fn graph(source: &dyn Weights) -> Result<Graph> {
    super::whole::check(source)?;
    let finder = Finder::new(source);
    let mut found: Vec<(&Entry, &str)> =
        source.entries().iter().filter_map(|entry| Some((entry, finder.block_of(entry)?))).collect();
    let wrapped = ["text_config", "vision_config", "audio_config"].iter().any(|key| source.config().get(key).is_some());
    let language = |name: &str| LANGUAGE.iter().any(|word| name.split('.').any(|part| part == *word));
    if wrapped && found.iter().any(|(_, block)| language(block)) {
        found.retain(|(_, block)| language(block));
    }
    let mut blocks: Vec<Block> = Vec::new();
    for (entry, block) in found {
        let module = entry.name.strip_suffix(".weight").expect("as block_of says");
        let bias = source.entry(&format!("{module}.bias")).is_some();
        let linear = Linear::plain(module, entry.shape[0], entry.shape[1], bias);
        let step = Step {
            pre: None,
            layer: Layer::Opaque(vec![linear]),
            post: None,
            scale: 1.0,
            given: 1.0,
            unseen: 0,
            hyper: None,
        };
        match blocks.last_mut().filter(|last| last.name == block) {
            Some(last) => last.steps.push(step),
            None => blocks.push(Block {
                name: block.to_owned(),
                steps: vec![step],
                parallel: false,
                scale: None,
                altup: None,
            }),
        }
    }
    if blocks.is_empty() {
        let why = match finder.turned {
            true => {
                "its matrices lie with their columns first, as those of a `Conv1D`, which runtimes look for in known families only"
            }
            false if !changed_modules(source).is_empty() => {
                "transformers splits or joins all matrices of its layers as it loads them, which it cannot do to packed ones"
            }
            false => "no matrices of numbered layers were found in it",
        };
        return Err(Error::failed(format!("{}: the model's family is unknown, and {why}", source.path().display())));
    }
    let stored = HEADS.iter().find(|head| source.entry(&format!("{head}.weight")).is_some_and(|e| e.shape.len() == 2));
    let says_tied = super::tied(source.config()).unwrap_or(false);
    let aside = if wrapped { components(source, &blocks) } else { Vec::new() };
    let mut aside: Vec<(String, &str)> = aside.into_iter().map(|part| (part, BESIDE)).collect();
    aside.push((String::new(), "not a linear that was recognised"));
    Ok(Graph {
        family: "unknown",
        hidden: 0,
        vocabulary: 0,
        embedding: Embedding { tensor: String::new(), scale: 1.0, positions: None },
        blocks,
        collapse: None,
        final_norm: Norm {
            kind: NormKind::Rms,
            weights: Vec::new(),
            offset: 0.0,
            bias: None,
            shape: vec![0],
            eps: 0.0,
        },
        head: Head {
            linear: Linear::plain(stored.copied().unwrap_or("lm_head"), 0, 0, false),
            tied: stored.is_none() && says_tied,
            missing: false,
            scale: 1.0,
            softcap: None,
        },
        dropped: super::DROPPED.to_vec(),
        aside,
        held: Held::default(),
        opaque: true,
        unrunnable: None,
    })
}

/// Modules of a model of an unknown family that runtimes may take for linears to quantize, and that are none here: matrices and
/// stacks of them, and where `classes` are what a layout goes by, heads that have no tensor.
pub fn plain_modules(graph: &Graph, source: &dyn Weights, classes: bool) -> Vec<String> {
    let quantizable: HashSet<&str> = graph.linears().map(|linear| &linear.module[..]).collect();
    let mut modules = Vec::new();
    for entry in source.entries().iter().filter(|entry| entry.shape.len() > 1) {
        match entry.name.strip_suffix(".weight") {
            Some(module) if quantizable.contains(module) => {}
            Some(module) => modules.push(module.to_owned()),
            // A stack of experts, for which vLLM asks as if the first of them were stored by itself. DBRX's are one level deeper.
            None => {
                let module = entry.name.rsplit_once('.').map_or("", |(module, _)| module);
                let Some(stack) =
                    module.strip_suffix(".mlp").into_iter().chain([module]).find(|m| m.ends_with("experts"))
                else {
                    continue;
                };
                modules.extend([module, stack].map(str::to_owned));
                modules.extend(["gate", "up", "down"].map(|what| format!("{stack}.0.{what}_proj")));
            }
        }
    }
    if classes && !HEADS.iter().any(|head| source.entry(&format!("{head}.weight")).is_some()) {
        let in_layers = |head: &str| quantizable.iter().any(|module| module.ends_with(&format!(".{head}")));
        modules.extend(HEADS.iter().filter(|head| !in_layers(head)).map(|head| (*head).to_owned()));
    }
    if classes {
        modules.extend(inner_heads(graph, source));
        modules.extend(Loading::of(source.config()).tied().iter().map(|head| (*head).to_owned()));
    }
    let mut seen = HashSet::new();
    modules.retain(|module| !quantizable.contains(&module[..]) && seen.insert(module.clone()));
    modules
}

/// Whether a module is an output projection by its name, which may share another tensor.
pub(super) fn is_head(module: &str) -> bool {
    HEADS.contains(&module) || INNER_HEADS.iter().any(|head| module.ends_with(&format!(".{head}")))
}

/// Heads that parts of a model which say something may have, where none is stored in them.
fn inner_heads(graph: &Graph, source: &dyn Weights) -> Vec<String> {
    let mut parts: Vec<&str> = graph.blocks.iter().filter_map(|block| Some(block.name.split_once('.')?.0)).collect();
    parts.dedup();
    let says = |part: &&str| !part.contains("encoder") && !["model", "transformer"].contains(part);
    let names = parts.into_iter().filter(says).filter_map(|part| {
        let heads: Vec<String> = INNER_HEADS.iter().map(|head| format!("{part}.{head}")).collect();
        let stored = heads.iter().any(|head| source.entry(&format!("{head}.weight")).is_some());
        (!stored).then_some(heads)
    });
    names.flatten().collect()
}

/// Linears of the language model's blocks that stay as they are for what transformers does to their matrices as it loads them.
pub fn changed_modules(source: &dyn Weights) -> Vec<String> {
    // Blocks are found as if nothing were changed.
    let mut all = Finder::new(source);
    let loading = std::mem::take(&mut all.loading);
    let module =
        |entry: &Entry| all.block_of(entry).and_then(|_| entry.name.strip_suffix(".weight").map(str::to_owned));
    source.entries().iter().filter_map(module).filter(|module| loading.changes(module)).collect()
}

/// Components in which nothing is quantized, such as `vision_tower.`: runtimes call what is in them otherwise than files do.
fn components(source: &dyn Weights, blocks: &[Block]) -> Vec<String> {
    let mut found: Vec<String> = source.entries().iter().map(|entry| component(&entry.name)).collect();
    found.sort();
    found.dedup();
    let of_language = |part: &String| blocks.iter().any(|block| block.name.starts_with(&part[..]));
    let whole = |part: &String| {
        let inside = |entry: &Entry| entry.name.strip_prefix(&part[..]).is_some_and(|rest| rest.contains('.'));
        part.ends_with('.') && source.entries().iter().any(inside)
    };
    found.retain(|part| whole(part) && !of_language(part));
    found
}

/// Tells linears from other matrices.
pub(super) struct Finder<'a> {
    source: &'a dyn Weights,
    /// Layers that predict further tokens.
    further: HashSet<&'a str>,
    /// Some matrices lie with their columns first, for their biases have a value for each column (`Conv1D`).
    turned: bool,
    pub(super) loading: Loading,
}

impl<'a> Finder<'a> {
    /// Of a model that is opened.
    pub(super) fn new(source: &'a dyn Weights) -> Finder<'a> {
        let of_further = |name: &str| name.split('.').any(|part| OF_FURTHER.contains(&part));
        let names = source.entries().iter().map(|entry| &entry.name[..]);
        let further = names.filter(|name| of_further(name)).filter_map(block).collect();
        let mut finder = Finder { source, further, turned: false, loading: Loading::of(source.config()) };
        finder.turned = source.entries().iter().any(|entry| {
            let bias = || finder.bias(entry).is_some_and(|bias| *bias == entry.shape[1..] && bias[0] != entry.shape[0]);
            entry.shape.len() == 2 && block(&entry.name).is_some() && bias()
        });
        finder
    }

    /// The extents of the bias beside a weight.
    fn bias(&self, entry: &Entry) -> Option<&'a [usize]> {
        let module = entry.name.strip_suffix(".weight")?;
        Some(&self.source.entry(&format!("{module}.bias"))?.shape[..])
    }

    /// The block that a linear belongs to; `None` for what is no linear of a block.
    fn block_of<'e>(&self, entry: &'e Entry) -> Option<&'e str> {
        let module = entry.name.strip_suffix(".weight")?;
        let block = block(module)?;
        // A model may be named for its norms or convolutions, which says nothing of what is in its blocks.
        let own = module
            .split('.')
            .next()
            .filter(|own| block.matches('.').count() > 1 && OF_MODELS.iter().any(|word| own.contains(word)));
        let rest = own.map_or(module, |own| module[own.len()..].trim_start_matches('.'));
        let of_senses = rest.split('.').any(|part| SENSES.iter().any(|word| part.contains(word)) && !is_holder(part));
        let linear = !of_senses && self.is_linear(entry, module, rest) && !self.further.contains(block);
        (linear && !self.loading.changes(module)).then_some(block)
    }

    /// Whether a matrix, the weight of `module`, is a linear's by its type and extents, and by the parts of its name in `told`, the last
    /// of which is its own.
    pub(super) fn is_linear(&self, entry: &Entry, module: &str, told: &str) -> bool {
        let matrix = matches!(entry.dtype, StoredType::Plain(_) | StoredType::Quantized { .. } | StoredType::Foreign)
            && entry.shape.len() == 2
            && entry.shape.iter().all(|extent| *extent >= 32);
        let last = told.rsplit('.').next().unwrap_or_default();
        let is_kept = |part: &str| {
            let gate = part == last && QUANTIZED.contains(&part);
            !is_holder(part) && KEPT.iter().any(|word| part.contains(word) && !(gate && *word == "gate"))
                || KEPT_ENDS.iter().any(|word| part.ends_with(word))
                || KEPT_WHOLE.contains(&part)
        };
        // Norms have weights of one extent and biases too.
        let straight = || {
            self.bias(entry)
                .is_none_or(|bias| *bias == entry.shape[..1] && !(self.turned && entry.shape[0] == entry.shape[1]))
        };
        // torch's own attention multiplies by the output's weight without asking the linear.
        let parent = module.rsplit_once('.').map_or("", |(parent, _)| parent);
        let of_torch = || self.source.entry(&format!("{parent}.in_proj_weight")).is_some();
        matrix && !told.split('.').any(is_kept) && straight() && !of_torch()
    }
}

fn is_holder(part: &str) -> bool {
    HOLDERS.contains(&part)
}

/// The name of the block that a tensor is in: up to its first number.
pub(super) fn block(name: &str) -> Option<&str> {
    let mut at = 0;
    for part in name.split('.') {
        if part.parse::<usize>().is_ok() {
            return (at > 0).then(|| &name[..at + part.len()]);
        }
        at += part.len() + 1;
    }
    None
}
