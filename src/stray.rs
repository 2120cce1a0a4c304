//! Tensors of a checkpoint that its model does not need: what they are, and what becomes of them.
//!
//! transformers leaves such tensors out as it loads and says so; vLLM skips some and fails on others; llama.cpp refuses a
//! file that has any. Copied as they are they load wherever the input did.

use std::collections::{HashMap, HashSet};

use formats::ShardedWriter;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::families::{graph_of, not_whole, settings};
use crate::graph::{DropRule, FURTHER as PREDICTS, Graph, Linear, Stored};
use crate::mixes::block_number;
use crate::recipe::UnknownTensors;
use crate::report::Fate;
use crate::weights::{Entry, StoredType};

const ADAPTER: &str = "a part of an adapter";
const LEFTOVER: &str = "left over from another way of storing a weight that is there";
const BEYOND: &str = "a layer beyond those that config.json counts";
const BEYOND_COUNT: &str = "a block beyond those that `block_count` counts";
const FURTHER: &str = "a part that predicts further tokens";
const BIAS: &str = "a bias that config.json says there is none of";
const UNREAD: &str =
    "a bias that transformers leaves out in models of this type, whatever config.json says, and other runtimes may add";
const HEAD: &str = "an output for something else than tokens";
const CACHE: &str = "a scale for the cache of keys and values";
const BUFFER: &str = "a buffer that runtimes compute";
const TWIN: &str = "another tensor for a weight that is there, and transformers may take it in that one's place";
const OTHER: &str = "of a name that means nothing in this model";

/// Every reason, which no rule of a family shares.
const REASONS: &[&str] =
    &[ADAPTER, LEFTOVER, BEYOND, BEYOND_COUNT, FURTHER, BIAS, UNREAD, HEAD, CACHE, BUFFER, TWIN, OTHER];

/// Parts of names that PEFT gives what it trains.
const ADAPTERS: &[&str] =
    &["lora_", "hada_w", "lokr_w", "ia3_l", "oft_r", "boft_", "vera_lambda", "base_layer", "modules_to_save"];

/// Modules that are put on a model in place of its head, or beside it.
const HEADS: &[&str] = &[
    "score",
    "scores",
    "v_head",
    "value_head",
    "reward_head",
    "regression_head",
    "rm_head",
    "classifier",
    "classification_head",
    "qa_outputs",
    "medusa_head",
];

/// Tensors that modules register and do not learn.
const BUFFERS: &[&str] = &[
    "position_ids",
    "cos_cached",
    "sin_cached",
    "inv_freq",
    "masked_bias",
    "causal_mask",
    "attn_mask",
    "attention_mask",
    "num_batches_tracked",
];

/// Parts of quantized weights that no codec here writes.
const FOREIGN_PARTS: &[&str] = &["weight_scale_inv", "weight_scale_2", "weight_global_scale", "scale_weight", "SCB"];

/// Decides about the tensors of a checkpoint that a graph does not name.
pub struct Strays<'a> {
    graph: &'a Graph,
    source: &'a Checkpoint,
    policy: UnknownTensors,
    known: HashSet<String>,
    linears: HashMap<&'a str, &'a Linear>,
}

impl<'a> Strays<'a> {
    /// Of a checkpoint, under a policy.
    pub fn new(graph: &'a Graph, source: &'a Checkpoint, policy: UnknownTensors) -> Strays<'a> {
        let linears = graph.linears().chain([&graph.head.linear]).map(|linear| (&*linear.module, linear)).collect();
        let known = graph.tensors().into_iter().map(|(name, _)| name).collect();
        Strays { graph, source, policy, known, linears }
    }

    /// The tensors that no rule names, in file order.
    pub fn entries(&self) -> impl Iterator<Item = &'a Entry> {
        self.source
            .entries()
            .iter()
            .filter(|entry| !self.known.contains(&entry.name) && self.rule(&entry.name).is_none())
    }

    /// What becomes of a tensor that is no part of the model. Fails where it may not be ignored.
    pub fn fate(&self, name: &str) -> Result<Fate> {
        if let Some(fate) = self.rule(name) {
            return Ok(fate);
        }
        let (family, place) = (self.graph.family, self.source.path().display());
        let reason = self.reason(name);
        match self.policy {
            UnknownTensors::Refuse => Err(Error::failed(format!(
                "{place}: tensor `{name}` is not part of a {family} model and no rule says what to do with it: it is {reason}; \
                 --unknown-tensors drop leaves it out"
            ))),
            UnknownTensors::Drop => Ok(Fate::Dropped(reason)),
            _ if reason == LEFTOVER => Ok(Fate::Dropped(reason)),
            UnknownTensors::Copy if reason == TWIN => Err(Error::failed(format!(
                "{place}: tensor `{name}` is {reason}: take one of the two out of the file, or give --unknown-tensors drop, which keeps the one \
                 that is called as {family} models call it"
            ))),
            UnknownTensors::Copy if reason == ADAPTER => Err(Error::failed(format!(
                "{place}: tensor `{name}` is {reason}, which would be lost: merge it first (PEFT's merge_and_unload), or leave it \
                 out with --unknown-tensors drop"
            ))),
            UnknownTensors::Copy if self.source.gguf().is_some() => Err(Error::failed(format!(
                "{place}: tensor `{name}` is not known here to be part of a {family} model: a runtime that loads the file computes with it, and \
                 --unknown-tensors drop, which leaves it out, makes another model of it"
            ))),
            UnknownTensors::Copy => Ok(Fate::Aside(reason)),
        }
    }

    /// What the family says.
    fn rule(&self, name: &str) -> Option<Fate> {
        let Graph { head, aside, dropped, .. } = self.graph;
        let named = |rule: &&DropRule| name.starts_with(&rule.prefix) && name.ends_with(rule.suffix);
        // What is asked to be left out is so in a model of which all else is aside, too.
        if let Some(rule) = dropped.iter().filter(|rule| rule.reason == PREDICTS).find(named) {
            return Some(Fate::Dropped(rule.reason));
        }
        if head.tied && name == head.linear.weight() {
            return Some(Fate::Tied);
        }
        if let Some((_, what)) = aside.iter().find(|(prefix, _)| name.starts_with(prefix)) {
            return Some(Fate::Aside(what));
        }
        dropped.iter().find(named).map(|rule| Fate::Dropped(rule.reason))
    }

    fn reason(&self, name: &str) -> &'static str {
        let inner = name.strip_prefix("model.").is_some_and(|inner| self.known.contains(inner));
        if inner || self.known.contains(&format!("model.{name}")) {
            return TWIN;
        }
        let parts: Vec<&str> = name.split('.').collect();
        let gguf = self.source.gguf().is_some();
        let last = *parts.last().expect("one at least");
        let any = |what: &[&str]| parts.iter().any(|part| what.contains(part));
        let module = name.strip_suffix(last).and_then(|rest| rest.strip_suffix('.')).unwrap_or_default();
        // `blocks.12.` of blocks that are numbered from zero on.
        let beyond =
            self.graph.trunk().last().and_then(|block| block.name.rsplit_once('.')).is_some_and(|(stem, number)| {
                let own = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix('.'));
                let own = own.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
                own.zip(number.parse().ok()).is_some_and(|(own, last)| own > last)
            });
        match () {
            () if parts.iter().any(|part| ADAPTERS.iter().any(|name| part.starts_with(name))) => ADAPTER,
            () if self.left_over(module, last) => LEFTOVER,
            () if parts.iter().any(|part| *part == "mtp" || part.starts_with("mtp_") || *part == "nextn") => FURTHER,
            () if beyond => BEYOND,
            () if gguf && block_number(name).is_some_and(|block| block >= self.graph.blocks.len()) => BEYOND_COUNT,
            () if last == "bias" && self.linears.contains_key(module) => match promises_biases(self.source) {
                true => UNREAD,
                false => BIAS,
            },
            () if any(HEADS) || gguf && parts[0] == "cls" => HEAD,
            () if ["k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale"].contains(&last) => CACHE,
            () if any(BUFFERS) => BUFFER,
            () => OTHER,
        }
    }

    /// Whether a tensor is codes or scales beside the plain weight that they once stood for, or an expert that is also in a
    /// stack: what is written may need its name.
    fn left_over(&self, module: &str, part: &str) -> bool {
        let Some(linear) = self.linears.get(module) else { return false };
        let stacked = matches!(linear.stored, Stored::Slice { .. }) && matches!(part, "weight" | "bias");
        let mut written = formats::CODECS.iter().flat_map(|codec| codec.part_names());
        let code = written.any(|name| *name == part) || FOREIGN_PARTS.contains(&part);
        stacked || code && self.known.contains(&format!("{module}.weight"))
    }

    /// What a reader of a report should know of tensors that no rule names, and of types that were changed.
    ///
    /// `copies` says whether the output can hold them.
    pub fn notes<'n>(&self, fates: impl Iterator<Item = (&'n str, &'n Fate)>, copies: bool) -> Vec<String> {
        let mut groups: Vec<(&str, bool, &str, usize)> = Vec::new();
        for (name, fate) in fates {
            let (reason, copied) = match fate {
                Fate::Aside(reason) => (*reason, true),
                Fate::Dropped(reason) => (*reason, false),
                _ => continue,
            };
            if !REASONS.contains(&reason) {
                continue;
            }
            match groups.iter_mut().find(|group| (group.0, group.1) == (reason, copied)) {
                Some(group) => group.3 += 1,
                None => groups.push((reason, copied, name, 1)),
            }
        }
        let mut notes = Vec::new();
        for copied in [true, false] {
            let found = groups.iter().filter(|group| group.1 == copied).map(|(reason, _, first, count)| match count {
                1 => format!("`{first}` ({reason})"),
                n => format!("`{first}` and {} more ({reason})", n - 1),
            });
            let found: Vec<String> = found.collect();
            let done = match (copied, copies) {
                (true, _) => "copied as they are",
                (false, true) => "left out",
                (false, false) => "left out, for llama.cpp refuses files with tensors that it does not know",
            };
            if !found.is_empty() {
                notes.push(format!("not part of a {} model, and {done}: {}", self.graph.family, found.join(", ")));
            }
        }
        let doubles = |entry: &&Entry| entry.dtype == StoredType::Plain(formats::Dtype::F64);
        let doubles = self.source.entries().iter().filter(doubles).filter(|entry| self.known.contains(&entry.name));
        match doubles.count() {
            0 => {}
            n => notes.push(format!("{n} tensors of type F64 were rounded to F32, and taken as such")),
        }
        notes
    }
}

/// Whether config.json has a flag for biases set, whoever reads it.
fn promises_biases(source: &Checkpoint) -> bool {
    let flags = ["attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias"];
    settings(source.config()).is_ok_and(|settings| flags.iter().any(|flag| settings.values[*flag] == true))
}

/// Copies a tensor that no rule names as its bytes are: nobody computes with it, and a mask may well be infinite. Says whether
/// it was one.
pub fn copied(source: &Checkpoint, name: &str, fate: &Fate, writer: &ShardedWriter) -> Result<bool> {
    match (fate, source.raw(name)) {
        (Fate::Aside(reason), Some(raw)) if REASONS.contains(reason) => {
            writer.write(name, raw.data)?;
            source.release(name);
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// What to say of tensors that are no part of what is computed. Fails for a checkpoint that holds parts of an adapter, whose
/// product would be.
pub fn left_out(source: &Checkpoint) -> Result<Vec<String>> {
    let graph = graph_of(source)?;
    let strays = Strays::new(&graph, source, UnknownTensors::Copy);
    strays
        .entries()
        .filter(|entry| strays.reason(&entry.name) == ADAPTER)
        .try_for_each(|entry| strays.fate(&entry.name).map(drop))?;
    let fates: Vec<(&str, Fate)> =
        strays.entries().map(|entry| (&*entry.name, Fate::Dropped(strays.reason(&entry.name)))).collect();
    let notes = strays.notes(fates.iter().map(|(name, fate)| (*name, fate)), true);
    Ok([notes, not_whole(&graph)].concat())
}

/// What may stand in a file in the place of a tensor that is missing.
pub struct Lookalike<'a> {
    /// Its name.
    pub name: &'a str,
    /// Whether it has the shape of what is missing, and so may be it.
    pub same_shape: bool,
}

/// The tensor that a missing one may be under another name or a part of: unknown, in its layer, in its module if there is one, of its shape
/// if there is one, and of those the most alike.
pub fn lookalike<'a>(graph: &'a Graph, source: &'a Checkpoint, name: &str, shape: &[usize]) -> Option<Lookalike<'a>> {
    let layer = |name: &str| name.split('.').find_map(|part| part.parse::<usize>().ok());
    let alike = |other: &str| {
        let (a, b) = (name.split('.').collect::<Vec<_>>(), other.split('.').collect::<Vec<_>>());
        let first = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        first + a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count()
    };
    // `model.layers.0.self_attn` of `model.layers.0.self_attn.q_proj.weight`, and the mixture of an expert's.
    let module = |name: &'_ str| {
        let of_layer = name.split('.').position(|part| part.parse::<usize>().is_ok()).map_or(0, |at| at + 2);
        name.split('.').take(of_layer).collect::<Vec<_>>().join(".")
    };
    let strays = Strays::new(graph, source, UnknownTensors::Refuse);
    let found = strays.entries().filter(|entry| layer(&entry.name) == layer(name));
    let found = found.map(|entry| {
        let here = layer(name).is_some() && module(&entry.name) == module(name);
        (here, entry.shape == shape, &*entry.name)
    });
    let found: Vec<(bool, bool, &str)> = found.filter(|(here, same, _)| *here || *same).collect();
    // Of equals the first.
    let best = found.into_iter().rev().max_by_key(|(here, same, other)| (*here, *same, alike(other)))?;
    Some(Lookalike { name: best.2, same_shape: best.1 })
}
