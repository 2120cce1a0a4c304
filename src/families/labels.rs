//! The head of a classifier, a reranker or a reward model: what makes scores of hidden states.

use serde_json::Value;

use super::settings;
use crate::graph::{Graph, Linear};
use crate::weights::Weights;

/// The modules that transformers, and models with code of their own, call it.
const NAMES: &[&str] = &["score", "classifier", "v_head", "reward_head", "regression_head", "classification_head"];

/// A head that scores labels. It is never quantized.
#[derive(Clone, Debug, PartialEq)]
pub struct Labels {
    /// One linear, or two with a ReLU between them (the reward models of Qwen 2.5); stored plainly.
    pub layers: Vec<Linear>,
    /// Whether every token is scored, or a text by its last token.
    pub tokens: bool,
    /// The id that fills up texts: the last token that is another is the one that is looked at.
    pub pad: Option<u32>,
    /// Whether any number of labels may hold (`multi_label_classification`), and not just the one with the highest score.
    pub several: bool,
}

impl Labels {
    /// The head of a checkpoint, if its class has one that is known. Nothing of a model whose scores are made in another way: of marked tokens
    /// (`reward_token_id`), or as a span of the text (`ForQuestionAnswering`).
    pub fn of(graph: &Graph, source: &dyn Weights) -> Option<Labels> {
        let config = source.config();
        let class = config.get("architectures")?.get(0)?.as_str()?;
        let is = |words: &[&str]| words.iter().any(|word| class.contains(word));
        let tokens = is(&["TokenClassification", "ProcessReward"]);
        let said = |key: &str| config.get(key).filter(|value| !value.is_null());
        if !(tokens || is(&["SequenceClassification", "RewardModel"])) || said("reward_token_id").is_some() {
            return None;
        }
        let linear = |module: String, cols: usize| {
            let shape = &source.entry(&format!("{module}.weight"))?.shape;
            let fits = shape.len() == 2 && shape[1] == cols;
            let bias = source.entry(&format!("{module}.bias")).is_some();
            fits.then(|| Linear::plain(module, shape[0], cols, bias))
        };
        let layers = NAMES.iter().find_map(|name| {
            if let Some(one) = linear((*name).to_owned(), graph.hidden) {
                return Some(vec![one]);
            }
            let first = linear(format!("{name}.0"), graph.hidden)?;
            let second = linear(format!("{name}.2"), first.rows)?;
            Some(vec![first, second])
        })?;
        let own = settings(config).ok();
        let pad = own.as_ref().and_then(|own| own.values.get("pad_token_id")).and_then(Value::as_u64);
        let several = said("problem_type").and_then(Value::as_str) == Some("multi_label_classification");
        Some(Labels { layers, tokens, pad: pad.and_then(|id| u32::try_from(id).ok()), several })
    }

    /// What is wrong with the head of a class of transformers', if anything is: it has to have a row for each label that config.json counts, as wide
    /// as hidden states.
    pub fn fault(graph: &Graph, source: &dyn Weights) -> Option<String> {
        let config = source.config();
        let class = config.get("architectures")?.get(0)?.as_str()?;
        if graph.opaque
            || !["ForSequenceClassification", "ForTokenClassification"].iter().any(|end| class.ends_with(end))
        {
            return None;
        }
        let named = config.get("id2label").and_then(Value::as_object).map(|labels| ("id2label", labels.len()));
        let counted = || Some(("num_labels", usize::try_from(config.get("num_labels")?.as_u64()?).ok()?));
        let (key, labels) = named.or_else(counted)?;
        let head = |name: &&str| source.entry(&format!("{name}.weight"));
        let (entry, expected) = (NAMES[..2].iter().find_map(head)?, [labels, graph.hidden]);
        (entry.shape != expected).then(|| {
            format!(
                "{}: tensor `{}` has shape {:?}, and by config.json it would be {expected:?} ({key} has {labels} labels); take the config.json that was \
                 published with these weights, or mend {key}",
                source.path().display(),
                entry.name,
                entry.shape
            )
        })
    }

    /// How many scores there are.
    pub fn count(&self) -> usize {
        self.layers.last().map_or(0, |last| last.rows)
    }
}
