//! Model families: `config.json` → [`Graph`]. A family is one file and one line here.

mod build;
mod cohere;
mod deepseek;
mod dots;
mod ernie;
mod exaone;
mod gemma;
mod glm;
mod gpt;
mod gpt_oss;
mod granite;
mod hunyuan;
mod llama;
mod llama4;
mod minimax;
mod moe;
mod names;
mod nemotron;
mod olmo;
mod phi;
mod qwen;
pub mod rope;
mod smollm3;
mod stablelm;
pub mod tying;
mod unknown;

pub use names::names;
pub use unknown::plain_modules;

use serde_json::Value;

use crate::checkpoint::{Checkpoint, StoredType};
use crate::error::{Error, Result};
use crate::graph::{DropRule, Graph, Layer, Moe, Stored};

/// A model family.
pub struct Family {
    /// The name in reports.
    pub id: &'static str,
    /// `model_type` values of config.json that it builds.
    pub model_types: &'static [&'static str],
    /// Builds the graph.
    pub build: fn(&Config<'_>) -> Result<Graph>,
}

/// Every family.
pub const FAMILIES: &[Family] = &[
    llama::LLAMA,
    llama::MISTRAL,
    llama::MINISTRAL,
    llama::MINISTRAL3,
    llama::SEED_OSS,
    llama::ARCEE,
    llama::HELIUM,
    llama4::LLAMA4,
    qwen::QWEN2,
    qwen::QWEN2_VL,
    qwen::QWEN3,
    gemma::GEMMA,
    gemma::GEMMA2,
    gemma::GEMMA3,
    phi::PHI,
    phi::PHI3,
    olmo::OLMO,
    olmo::OLMO2,
    olmo::OLMO3,
    granite::GRANITE,
    granite::GRANITE_MOE,
    gpt::GPT2,
    gpt::GPT_NEOX,
    gpt::STARCODER2,
    smollm3::SMOLLM3,
    cohere::COHERE,
    cohere::COHERE2,
    glm::GLM,
    glm::GLM4,
    stablelm::STABLELM,
    nemotron::NEMOTRON,
    exaone::EXAONE4,
    ernie::ERNIE4_5,
    hunyuan::HUNYUAN_DENSE,
    moe::MIXTRAL,
    moe::QWEN2_MOE,
    moe::QWEN3_MOE,
    moe::OLMOE,
    deepseek::DEEPSEEK_V2,
    deepseek::DEEPSEEK_V3,
    gpt_oss::GPT_OSS,
    dots::DOTS1,
    dots::GLM4_MOE,
    ernie::ERNIE4_5_MOE,
    hunyuan::HUNYUAN_MOE,
    minimax::MINIMAX_M2,
];

/// What layers are that predict the token after the next.
pub const FURTHER: &str = "predicts further tokens";

/// Tensors of checkpoints of any family that can be computed.
const DROPPED: &[DropRule] = &[DropRule { suffix: ".rotary_emb.inv_freq", reason: "computed from config.json" }];

fn family_of(config: &Value) -> Option<&'static Family> {
    let model_type = config.get("model_type")?.as_str()?;
    FAMILIES.iter().find(|family| family.model_types.contains(&model_type))
}

/// The settings of the language model: those of `text_config` in a model that also sees or hears.
///
/// What the wrapper says of tied embeddings holds unless the language model's settings say otherwise.
pub fn text_config(config: &Value) -> Value {
    let Some(text) = config.get("text_config").and_then(Value::as_object) else { return config.clone() };
    let mut text = text.clone();
    // Wrappers leave out what is the default of their text model.
    let default = match config.get("model_type").and_then(Value::as_str) {
        Some("llava" | "llava_next" | "idefics3" | "smolvlm") => Some("llama"),
        Some("mistral3") => Some("mistral"),
        _ => None,
    };
    if let (None, Some(default)) = (text.get("model_type"), default) {
        text.insert("model_type".to_owned(), default.into());
    }
    if let (None, Some(tied)) = (text.get("tie_word_embeddings"), config.get("tie_word_embeddings")) {
        text.insert("tie_word_embeddings".to_owned(), tied.clone());
    }
    Value::Object(text)
}

/// Builds the graph of the model that `config` (config.json) describes. Fails for a family that is not in the list.
pub fn build(config: &Value) -> Result<Graph> {
    let text = text_config(config);
    match family_of(&text) {
        Some(family) => {
            let graph = (family.build)(&Config(&text))?;
            check(&graph)?;
            Ok(graph)
        }
        None => {
            let model_type = Config(&text).text("model_type")?;
            Err(Error::failed(format!("config.json: model_type is `{model_type}`, and only {} are supported", known())))
        }
    }
}

/// Every `model_type` that there is a family for.
fn known() -> String {
    let known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types.iter().copied()).collect();
    known.join(", ")
}

/// Fails for a model whose family is unknown, so that it cannot be run.
pub fn check_runnable(graph: &Graph, source: &Checkpoint) -> Result<()> {
    if !graph.opaque {
        return Ok(());
    }
    let text = text_config(source.config());
    let model_type = text.get("model_type").and_then(Value::as_str).unwrap_or_default();
    Err(Error::failed(format!(
        "{}: models of the type `{model_type}` are not known and cannot be run; they can only be quantized without data \
         and without measuring: --method rtn --verify-text none (known are {})",
        source.path().display(),
        known()
    )))
}

/// Builds the graph of a checkpoint, with the names that its tensors have.
///
/// A model of an unknown family has a graph of linears that cannot be run. Whether the head is the embedding is what
/// [`tying`] made of config.json and the tensors when the checkpoint was opened.
pub fn graph_of(source: &Checkpoint) -> Result<Graph> {
    let text = text_config(source.config());
    if family_of(&text).is_none() && Config(&text).text("model_type").is_ok() {
        return unknown::graph(source);
    }
    let mut graph = published(source)?;
    // Quantized experts are stored one by one, and quantized linears as such, whatever their original was.
    graph.linears_mut(&mut |linear| {
        let quantized = |name: &str| {
            source.entry(name).is_some_and(|e| matches!(e.dtype, StoredType::Quantized { .. } | StoredType::Foreign))
        };
        if linear.stored == Stored::Transposed && quantized(&linear.weight()) {
            linear.stored = Stored::Plain;
        }
        let stacked = matches!(&linear.stored, Stored::Slice { tensor, .. } if source.entry(tensor).is_none());
        if stacked && source.entry(&format!("{}.weight", linear.module)).is_some() {
            linear.stored = Stored::Plain;
        }
    });
    Ok(graph)
}

/// The graph of a checkpoint as its family publishes them, with the names that its tensors have: experts may be stacked
/// that the checkpoint has one by one. Fails for an unknown family.
pub fn published(source: &Checkpoint) -> Result<Graph> {
    let text = text_config(source.config());
    let tensors = source.entries().len();
    if tensors == 0 {
        return Err(Error::failed(format!("{}: the checkpoint holds no tensors", source.path().display())));
    }
    if let Some((key, layers)) = too_many_layers(&text, tensors) {
        return Err(Error::failed(format!(
            "{}/config.json: {key} is {layers}, but the checkpoint has only {tensors} tensors; is the file another model's?",
            source.path().display()
        )));
    }
    let mut graph = build(source.config()).map_err(|error| match error {
        Error::Failed(why) if why.starts_with("config.json: ") => {
            Error::Failed(format!("{}/{why}", source.path().display()))
        }
        other => other,
    })?;
    names::adopt(&mut graph, source);
    if headless(&graph, source) {
        graph.head.linear.bias = false;
        (graph.head.tied, graph.head.missing) = (true, true);
    }
    Ok(graph)
}

/// Whether the checkpoint is of a class without an output projection: the bare model, which gives embeddings, or one with a
/// head for labels or values.
fn headless(graph: &Graph, source: &Checkpoint) -> bool {
    let classes = source.config().get("architectures").and_then(Value::as_array);
    let without = |class: &Value| {
        let class = class.as_str().unwrap_or_default();
        let bare = class.ends_with("Model") && !["LMHead", "Heads", "Chat"].iter().any(|word| class.contains(word));
        let other = ["SequenceClassification", "TokenClassification", "QuestionAnswering", "Reward", "Embedding"];
        bare || other.iter().any(|word| class.contains(word))
    };
    classes.is_some_and(|classes| !classes.is_empty() && classes.iter().all(without))
        && source.entry(&graph.head.linear.weight()).is_none()
}

/// The setting that promises more layers than there are tensors, if it does: a graph of them would be laid out for nothing.
fn too_many_layers(config: &Value, tensors: usize) -> Option<(&'static str, u64)> {
    let layers = ["num_hidden_layers", "n_layer"].into_iter().find_map(|key| Some((key, config.get(key)?.as_u64()?)));
    layers.filter(|(_, layers)| *layers > tensors as u64)
}

/// Typed reads of config.json, with errors that name the key.
pub struct Config<'a>(&'a Value);

impl<'a> Config<'a> {
    /// The settings with those filled in that a configuration leaves out where they are the family's usual ones.
    pub fn with_defaults(&self, defaults: &[(&str, u64)]) -> Value {
        let mut whole = self.0.clone();
        for (key, value) in defaults.iter().filter(|(key, _)| self.get(key).is_none()) {
            whole[*key] = (*value).into();
        }
        whole
    }

    /// The value of `key`, unless it is missing or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// Whether `key` is there, though it may be null.
    pub fn has(&self, key: &str) -> bool {
        self.0.get(key).is_some()
    }

    fn wrong(key: &str, expected: &str, found: Option<&Value>) -> Error {
        let found = found.map_or("nothing".to_owned(), |v| v.to_string());
        Error::failed(format!("config.json: {key} must be {expected}, found {found}"))
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<&'a str> {
        self.get(key).and_then(Value::as_str).ok_or_else(|| Self::wrong(key, "a string", self.get(key)))
    }

    /// A count, at least 1.
    pub fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| Self::wrong(key, "a positive number", None))
    }

    /// A count, if it is there.
    pub fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..=most(key)).contains(&n) => Ok(Some(n as usize)),
            Some(n) if n > 0 => Err(Self::wrong(key, &format!("at most {}", most(key)), Some(value))),
            _ => Err(Self::wrong(key, "a positive number", Some(value))),
        }
    }

    /// A count that may be 0, or `default` when it is missing.
    pub fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.get(key).is_some_and(|value| value.as_u64() == Some(0)) {
            true => Ok(0),
            false => Ok(self.optional_count(key)?.unwrap_or(default)),
        }
    }

    /// Whether a rope scaling calls itself so.
    pub fn is_kind(&self, kind: &str) -> bool {
        ["rope_type", "type"].iter().find_map(|key| self.get(key)).is_some_and(|found| found == kind)
    }

    /// A positive number, or `default` when it is missing.
    pub fn positive(&self, key: &str, default: f64) -> Result<f64> {
        Some(self.number(key, default)?)
            .filter(|x| (*x as f32).is_finite() && *x as f32 > 0.0)
            .ok_or_else(|| Self::wrong(key, "a positive number", self.get(key)))
    }

    /// A number, or `default` when it is missing.
    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().ok_or_else(|| Self::wrong(key, "a number", Some(value)))
    }

    /// A flag, or `default` when it is missing.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| Self::wrong(key, "true or false", Some(value)))
    }

    /// The list under `key`, if it is there.
    pub fn list(&self, key: &str) -> Result<Option<&'a Vec<Value>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_array().map(Some).ok_or_else(|| Self::wrong(key, "a list", Some(value)))
    }

    /// The object under `key`, if it is there.
    pub fn object(&self, key: &str) -> Result<Option<Config<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) if value.is_object() => Ok(Some(Config(value))),
            Some(value) => Err(Self::wrong(key, "an object", Some(value))),
        }
    }
}

impl Config<'_> {
    /// A list of layers, if it is there.
    pub fn layer_list(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().map(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
        match list.flatten() {
            Some(list) => Ok(Some(list.into_iter().map(|layer| layer as usize).collect())),
            None => Err(Self::wrong(key, "a list of layers", Some(value))),
        }
    }

    /// A count for each layer.
    pub fn counts(&self, key: &str, layers: usize) -> Result<Vec<usize>> {
        let list = self.layer_list(key)?.unwrap_or_default();
        if list.len() != layers || list.contains(&0) {
            let expected = format!("a positive number for each of {layers} layers");
            return Err(Self::wrong(key, &expected, self.get(key)));
        }
        Ok(list)
    }

    /// Which layers have rotary positions: `no_rope_layers` (1 for those that do), or all but every fourth.
    pub fn rotated_layers(&self, layers: usize) -> Result<Vec<bool>> {
        match self.layer_list("no_rope_layers")?.filter(|list| !list.is_empty()) {
            Some(list) if list.len() == layers => Ok(list.into_iter().map(|rotated| rotated != 0).collect()),
            Some(list) => Err(Error::failed(format!(
                "config.json: no_rope_layers has {} entries, and there are {layers} layers",
                list.len()
            ))),
            None => {
                let every = self.optional_count("no_rope_layer_interval")?.unwrap_or(4);
                Ok((0..layers).map(|layer| (layer + 1) % every != 0).collect())
            }
        }
    }
}

/// The largest count that is believed, so that nothing is laid out for numbers that no model has.
fn most(key: &str) -> u64 {
    match () {
        () if key.contains("intermediate") || key.contains("hidden") && !key.contains("layers") => 1 << 30,
        () if key.contains("layer") || key.contains("head") || key.contains("mtp") || key.contains("nextn") => 1 << 16,
        () if key.contains("expert") || key.contains("moe_k") || key.contains("topk") => 1 << 14,
        () => 1 << 30,
    }
}

/// Fails for what would be asked of layers that cannot do it.
fn check(graph: &Graph) -> Result<()> {
    for step in graph.blocks.iter().flat_map(|block| &block.steps) {
        let Layer::Moe(Moe { router, experts, .. }) = &step.layer else { continue };
        if router.top_k > experts.len() {
            return Err(Error::failed(format!(
                "config.json: each token would take {} experts, and there are {}",
                router.top_k,
                experts.len()
            )));
        }
        if let Some(groups) = router.groups
            && (groups.kept > groups.count || !experts.len().is_multiple_of(groups.count))
        {
            return Err(Error::failed(format!(
                "config.json: {} of {} groups of {} experts cannot be chosen",
                groups.kept,
                groups.count,
                experts.len()
            )));
        }
    }
    Ok(())
}

/// The positions that a model was made for, if config.json says.
pub fn longest_context(config: &Value) -> Option<usize> {
    let config = text_config(config);
    let said = config.get("max_position_embeddings").or(config.get("n_positions"))?;
    said.as_u64().map(|n| n as usize).filter(|n| *n > 1)
}
