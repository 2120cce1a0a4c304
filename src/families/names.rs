//! Where a family's tensors are: under its usual names, a wrapper's prefix, or none.

use std::collections::HashSet;

use serde_json::Value;

use super::renames::Loading;
use super::{Config, family_of, linears, settings, text_part, too_many_layers, type_of};
use crate::graph::{BESIDE, Graph};
use crate::weights::Weights;

/// The names that runtimes look for in a model of a known family that is no part of a larger one.
pub struct Names {
    /// `model.`, or `transformer.`
    prefix: String,
    /// The embedding's tensor without it.
    embedding: String,
    /// The head's module.
    head: String,
    /// What the layers' names begin with: `model.layers.`
    layers: String,
    /// Every tensor.
    tensors: HashSet<String>,
    /// Whether the head is the embedding.
    tied: bool,
    /// Whether the class is that of the model without a head, which has no prefix.
    base: bool,
    /// The family's files call mixtures otherwise than transformers does in memory.
    mixtures: bool,
    /// The model is a part of one that also sees or hears, whose other tensors keep their names.
    part: bool,
}

/// What mixtures are called in memory, and in the files of some families.
const MIXTURES: [&str; 2] = [".mlp.", ".block_sparse_moe."];

/// The names that config.json promises for a file with these names; `None` for a model of an unknown family, with settings that make none,
/// and of one that is a part of another, where the file has it in its place or the class is not known.
pub fn names(config: &Value, stored: &[String]) -> Option<Names> {
    let settings = settings(config).ok()?;
    if too_many_layers(&settings.values, stored.len()).is_some() {
        return None;
    }
    let mut graph = (family_of(&settings.model_type)?.build)(&Config(&settings.values)).ok()?;
    let (usual, embedding) = graph.embedding.tensor.split_once('.')?;
    let (usual, embedding) = (format!("{usual}."), embedding.to_owned());
    let part = is_wrapped(config);
    let (prefix, head) = match part {
        true => place_in_class(config, stored)?,
        false => {
            (prefix_of_class(config).map_or(usual.clone(), |own| format!("{own}.")), graph.head.linear.module.clone())
        }
    };
    let old_head = graph.head.linear.module.clone();
    graph.rename(&|name| match name.strip_prefix(&usual) {
        Some(rest) => format!("{prefix}{rest}"),
        None if name == old_head => head.clone(),
        None => name.to_owned(),
    });
    let first = &graph.blocks.first()?.name;
    Some(Names {
        embedding,
        head,
        tied: graph.head.tied,
        layers: first[..first.rfind('.')? + 1].to_owned(),
        tensors: graph.tensors().into_iter().map(|(name, _)| name).collect(),
        base: is_base(config),
        mixtures: !part && {
            let tensors = graph.tensors();
            let [some, all] = MIXTURES.map(|what| tensors.iter().any(|(name, _)| name.contains(what)));
            all && !some
        },
        prefix,
        part,
    })
}

/// Where the class of a model that also sees or hears has its language model: what names in it begin with, and the head's module. Nothing where
/// the files have it there. Codes keep the names that the configuration of their quantization goes by.
fn place_in_class(config: &Value, stored: &[String]) -> Option<(String, String)> {
    let class = config.get("architectures")?.get(0)?.as_str()?;
    let quantized = formats::codec::declared_method(config).is_some();
    text_part(config).wrapper.filter(|_| !quantized)?;
    let loading = Loading::of(config);
    let modules = stored.iter().map(|name| name.rsplit_once('.').map_or(&name[..], |(module, _)| module));
    let there: Vec<String> =
        modules.flat_map(|module| loading.names(module).into_iter().chain([module.to_owned()])).collect();
    let (prefix, head) = linears::language_model(class, &there)?;
    Some((prefix.to_owned(), head.to_owned()))
}

impl Names {
    /// What each of a file's tensors is called by runtimes.
    pub fn of(&self, stored: &[String]) -> Vec<String> {
        let mut names = stored.to_vec();
        if let Some(at) = self.only_head(stored) {
            names[at] = format!("{}{}", self.prefix, self.embedding);
        }
        let mut names = self.of_prefix(&names);
        if self.mixtures {
            // As transformers saves them where it is told to leave names as they are.
            let [memory, file] = MIXTURES;
            names.iter_mut().for_each(|name| *name = name.replacen(memory, file, 1));
        }
        names
    }

    /// Where the head's weight stands in a file of a tied model that has it and no embedding, as `safetensors.torch.save_model` leaves
    /// it: transformers takes either for both.
    fn only_head(&self, stored: &[String]) -> Option<usize> {
        let Names { embedding, head, tied, .. } = self;
        let is_embedding =
            |name: &String| name.strip_suffix(&embedding[..]).is_some_and(|own| own.is_empty() || own.ends_with('.'));
        if !tied || stored.iter().any(is_embedding) {
            return None;
        }
        stored.iter().position(|name| name.strip_suffix(".weight") == Some(head))
    }

    fn of_prefix(&self, stored: &[String]) -> Vec<String> {
        let Names { prefix, head, .. } = self;
        let Some(own) = self.own_prefix(stored) else { return stored.to_vec() };
        let weight = format!("{head}.weight");
        let other_head = match stored.contains(&weight) {
            true => None,
            false => {
                let leaf = head.rsplit('.').next().unwrap_or(head);
                let is_head =
                    |module: &&str| module.strip_suffix(leaf).is_some_and(|own| own.is_empty() || own.ends_with('.'));
                let mut found = stored.iter().filter_map(|name| name.strip_suffix(".weight")).filter(is_head);
                found.next().filter(|_| found.next().is_none()).map(|module| format!("{module}."))
            }
        };
        let renamed = |name: &String| match (&other_head, own) {
            (Some(other), _) if name.starts_with(other) => format!("{head}.{}", &name[other.len()..]),
            // Without a prefix all begins with it, as with that of a larger model; what is no part of the model below its head stays.
            (_, own) if (own.is_empty() || self.part) && name.starts_with(own) => {
                let new = format!("{prefix}{}", &name[own.len()..]);
                let known = new.starts_with(&self.layers) || self.tensors.contains(&new) || {
                    let module = new.rsplit_once('.').map_or(&new[..], |(module, _)| module);
                    self.tensors.contains(&format!("{module}.weight"))
                };
                if known { new } else { name.clone() }
            }
            (_, own) if name.starts_with(own) => format!("{prefix}{}", &name[own.len()..]),
            _ => name.clone(),
        };
        stored.iter().map(renamed).collect()
    }

    /// The prefix that stands where the family's own should; `None` where all is well, or nothing is to be told.
    fn own_prefix<'n>(&self, stored: &'n [String]) -> Option<&'n str> {
        let Names { prefix, embedding, .. } = self;
        if stored.iter().any(|name| name.strip_prefix(&prefix[..]) == Some(embedding)) {
            return None;
        }
        let before = stored.iter().filter_map(|name| name.strip_suffix(&embedding[..]));
        let mut found = before.filter(|own| own.is_empty() || own.ends_with('.'));
        // Of several no one can tell.
        let own = found.next().filter(|_| found.next().is_none())?;
        (!(self.base && own.is_empty())).then_some(own)
    }
}

/// Types whose classes for questions (`LlamaForQuestionAnswering`) call the model otherwise than all others of the type do.
const ASKED: &[&str] =
    &["arcee", "exaone4", "llama", "ministral", "nemotron", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3"];

/// What the names of the model below the head begin with in the class that config.json names, where that is not its family's usual prefix.
fn prefix_of_class(config: &Value) -> Option<&'static str> {
    let class = config.get("architectures")?.get(0)?.as_str()?;
    (class.ends_with("ForQuestionAnswering") && ASKED.contains(&type_of(config)?)).then_some("transformer")
}

/// Whether a model is the language part of one that also sees or hears.
fn is_wrapped(config: &Value) -> bool {
    ["text_config", "vision_config"].iter().any(|key| config.get(key).is_some())
}

/// Whether config.json names a class without a head (`LlamaModel`).
fn is_base(config: &Value) -> bool {
    let class = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    class.is_some_and(|class| class.ends_with("Model") && !class.contains("Head"))
}

/// Finds the language model in a checkpoint: under a wrapper's prefix, of which runtimes know more than one, or without the
/// prefix that its own class lacks. Other names are not forgiven, as runtimes do not; opening a checkpoint rewrites them.
pub(super) fn adopt(graph: &mut Graph, source: &dyn Weights) {
    let wrapped = is_wrapped(source.config());
    let embedding = graph.embedding.tensor.clone();
    let (prefix, leaf) = embedding.split_once('.').map_or(("", &embedding[..]), |(prefix, leaf)| (prefix, leaf));
    let bare = is_base(source.config()) && source.entry(leaf).is_some();
    let own = prefix_of_class(source.config());
    let asked = own.is_some_and(|own| source.entry(&format!("{own}.{leaf}")).is_some());
    if !(wrapped || bare || asked) {
        return;
    }
    if source.entry(&embedding).is_none() {
        let ends = |name: &str| name == leaf || name.strip_suffix(leaf).is_some_and(|rest| rest.ends_with('.'));
        let found = source.entries().iter().map(|entry| &entry.name[..]).filter(|name| ends(name));
        // A vision tower may have embeddings as well; the language model says what it is.
        let found = found.max_by_key(|name| (name.contains("language_model"), name.contains("text")));
        // Where it is missing, its layers say what it would be called.
        let own =
            match found.map(|name| &name[..name.len() - leaf.len()]).or_else(|| before_layers(graph, prefix, source)) {
                Some(own) => own,
                None => return,
            };
        let head = graph.head.linear.module.clone();
        let head = match source.entry(&graph.head.linear.weight()).is_some() {
            true => head,
            false => {
                let heads = source.entries().iter().filter_map(|entry| entry.name.strip_suffix(".weight"));
                let found = heads.filter(|name| name.ends_with(&format!(".{head}"))).max_by_key(|name| name.len());
                found.map_or(head.clone(), str::to_owned)
            }
        };
        let old_head = graph.head.linear.module.clone();
        graph.rename(&|name| match name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.')) {
            Some(rest) => format!("{own}{rest}"),
            None if name == old_head => head.clone(),
            None => name.to_owned(),
        });
    }
    if wrapped {
        let own = &graph.embedding.tensor[..graph.embedding.tensor.len() - leaf.len()];
        let head = graph.head.linear.module.clone();
        let own = own.to_owned();
        set_aside(graph, source, &[&own, &head]);
    }
}

/// What the names of the first layer of a language model inside another begin with in a file; `usual` is what they begin with by themselves.
fn before_layers<'s>(graph: &Graph, usual: &str, source: &'s dyn Weights) -> Option<&'s str> {
    let layer = graph.blocks.first()?.name.strip_prefix(usual)?;
    let of = |name: &'s str| {
        let at = name.find(&format!("{layer}."))?;
        Some(&name[..at + 1]).filter(|own| own.contains("language_model"))
    };
    source.entries().iter().find_map(|entry| of(&entry.name))
}

/// Leaves aside whatever has a name that begins with none of these, and is not the family's.
pub(super) fn set_aside(graph: &mut Graph, source: &dyn Weights, own: &[&str]) {
    let is_own = |name: &str| own.iter().any(|own| name.starts_with(own));
    let others = source.entries().iter().filter(|entry| !is_own(&entry.name));
    let mut aside: Vec<String> = others.map(|entry| component(&entry.name)).collect();
    // What the family knows of itself.
    let further = graph.of_predictors();
    aside.retain(|prefix| graph.aside.iter().all(|(known, _)| known != prefix) && !further.contains(prefix));
    aside.sort();
    aside.dedup();
    graph.aside.extend(aside.into_iter().map(|prefix| (prefix, BESIDE)));
}

/// The part of a name that says which component a tensor belongs to: `vision_tower.`, or `model.visual.`.
pub fn component(name: &str) -> String {
    let mut parts = name.splitn(3, '.');
    let first = parts.next().unwrap_or_default();
    match (first, parts.next(), parts.next()) {
        ("model", Some(second), Some(_)) => format!("model.{second}."),
        (_, Some(_), _) => format!("{first}."),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama(class: &str) -> Names {
        let config = json!({
            "model_type": "llama", "architectures": [class], "hidden_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 32,
        });
        names(&config, &vec![String::new(); 99]).unwrap()
    }

    fn renamed(class: &str, stored: &[&str]) -> Vec<String> {
        llama(class).of(&stored.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
    }

    const USUAL: [&str; 4] =
        ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"];

    #[test]
    fn a_plain_model_has_the_names_of_its_class() {
        let causal = "LlamaForCausalLM";
        assert_eq!(renamed(causal, &USUAL), USUAL);
        for prefix in ["language_model.", "model.", "module.deep."] {
            assert_eq!(renamed(causal, &USUAL.map(|name| format!("{prefix}{name}")).each_ref().map(|n| &n[..])), USUAL);
        }
        let bare = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight", "lm_head.weight"];
        assert_eq!(renamed(causal, &bare), USUAL);
        assert_eq!(renamed("LlamaModel", &bare), bare);
        assert_eq!(renamed("LlamaModel", &USUAL), USUAL);
        assert_eq!(renamed("LlamaModel", &["a.norm.weight", "a.embed_tokens.weight"])[0], "model.norm.weight");
        let asked = USUAL.map(|name| name.replace("model.", "transformer.")).to_vec();
        let asked: Vec<&str> = asked.iter().map(|name| &name[..]).collect();
        assert_eq!(renamed("LlamaForQuestionAnswering", &asked), asked);
        assert_eq!(renamed("LlamaForQuestionAnswering", &USUAL), asked);
        // What belongs to nothing that the family has keeps its name, and so does all where no one can tell.
        let stray = ["embed_tokens.weight", "score.weight", "layers.7.extra"];
        assert_eq!(renamed(causal, &stray), ["model.embed_tokens.weight", "score.weight", "model.layers.7.extra"]);
        let two = ["a.embed_tokens.weight", "b.embed_tokens.weight"];
        assert_eq!(renamed(causal, &two), two);
    }

    #[test]
    fn parts_of_a_quantized_linear_go_with_it() {
        let stored = ["x.embed_tokens.weight", "x.layers.0.mlp.up_proj.qweight", "y.lm_head.weight", "y.lm_head.bias"];
        let expected =
            ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.qweight", "lm_head.weight", "lm_head.bias"];
        assert_eq!(renamed("LlamaForCausalLM", &stored), expected);
    }

    #[test]
    fn a_base_class_is_told_by_its_name() {
        for (class, base) in [("LlamaModel", true), ("GPT2LMHeadModel", false), ("GPT2Model", true)] {
            assert_eq!(is_base(&json!({"architectures": [class]})), base, "{class}");
        }
        assert!(!is_base(&json!({})));
    }
}
