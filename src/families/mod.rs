//! Model families: `config.json` → [`Graph`]. A family is one file and one line here.

mod afmoe;
mod apertus;
mod bailing;
mod build;
mod classes;
mod cohere;
mod deepseek;
mod deepseek4;
mod dots;
mod ernie;
mod exaone;
mod further;
mod gemma;
mod gemma3n;
mod gemma4;
mod glm;
mod glm5_next;
mod gpt;
mod gpt_oss;
mod granite;
mod guesses;
mod hunyuan;
mod hy4;
mod kimi;
mod labels;
mod lfm;
pub mod linears;
mod llama;
mod llama4;
mod longcat;
mod mimo;
mod minimax;
mod mistral_large4;
mod moe;
mod names;
mod nemotron;
mod nemotron_h;
mod olmo;
mod phi;
mod qwen;
mod qwen4;
mod qwen_next;
mod renames;
pub mod rope;
mod smollm3;
mod spelling;
mod spelt_out;
mod stablelm;
mod state_space;
mod step;
mod strict;
pub mod towers;
pub mod tying;
mod unknown;
mod whole;

pub use further::{not_whole, uncounted, without_codes};
pub use labels::Labels;
pub use linears::{Absent, absent};
pub use names::{component, names};
pub(crate) use qwen4::seed as qwen4_seed;
pub use renames::{AdapterNames, Loading};
pub use spelt_out::spelt_out;
pub use unknown::{changed_modules, plain_modules};
pub use whole::{check as check_whole, check_beside, misshapen_beside};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::graph::{DropRule, Graph, Layer, Moe, Stored};
use crate::json::{integer, real, shown};
use crate::weights::{StoredType, Weights};

pub use spelling::Settings;
pub use strict::normalize;

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
    llama::INTERNLM3,
    llama4::LLAMA4,
    lfm::LFM2,
    lfm::LFM2_MOE,
    lfm::LFM3,
    afmoe::AFMOE,
    qwen::QWEN2,
    qwen::QWEN2_VL,
    qwen::QWEN3,
    qwen::QWEN3_VL,
    qwen_next::QWEN3_NEXT,
    qwen_next::QWEN3_5,
    qwen_next::QWEN3_5_MOE,
    qwen4::QWEN4,
    gemma::GEMMA,
    gemma::GEMMA2,
    gemma::GEMMA3,
    gemma3n::GEMMA3N,
    gemma4::GEMMA4,
    phi::PHI,
    phi::PHI3,
    olmo::OLMO,
    olmo::OLMO2,
    olmo::OLMO3,
    olmo::FLEX_OLMO,
    olmo::OLMO_HYBRID,
    granite::GRANITE,
    granite::GRANITE_MOE,
    granite::GRANITE_SHARED,
    granite::GRANITE_HYBRID,
    gpt::GPT2,
    gpt::GPT_NEOX,
    gpt::STARCODER2,
    smollm3::SMOLLM3,
    cohere::COHERE,
    cohere::COHERE2,
    cohere::COHERE2_MOE,
    glm::GLM,
    glm::GLM4,
    glm::GLM4V,
    stablelm::STABLELM,
    nemotron::NEMOTRON,
    nemotron_h::NEMOTRON_H,
    state_space::BAMBA,
    state_space::FALCON_H1,
    apertus::APERTUS,
    exaone::EXAONE4,
    exaone::EXAONE_MOE,
    ernie::ERNIE4_5,
    hunyuan::HUNYUAN_DENSE,
    moe::MIXTRAL,
    moe::QWEN2_MOE,
    moe::QWEN3_MOE,
    moe::QWEN3_VL_MOE,
    moe::OLMOE,
    deepseek::DEEPSEEK_V2,
    deepseek::DEEPSEEK_V3,
    deepseek::GLM4_MOE_LITE,
    deepseek::MISTRAL4,
    mistral_large4::MISTRAL_LARGE4,
    deepseek::DEEPSEEK_V32,
    deepseek4::DEEPSEEK_V4,
    deepseek::GLM_MOE_DSA,
    kimi::KIMI_LINEAR,
    bailing::BAILING_HYBRID,
    glm5_next::GLM5_NEXT,
    longcat::LONGCAT_FLASH,
    mimo::MIMO_V2_FLASH,
    gpt_oss::GPT_OSS,
    dots::DOTS1,
    dots::GLM4_MOE,
    dots::GLM4V_MOE,
    dots::SOLAR_OPEN,
    ernie::ERNIE4_5_MOE,
    hunyuan::HUNYUAN_MOE,
    hunyuan::HY_V3,
    hy4::HY_V4,
    step::STEP3P5,
    minimax::MINIMAX_M2,
    minimax::MINIMAX_M3,
];

/// Tensors of checkpoints of any family that can be computed.
const DROPPED: &[DropRule] =
    &[DropRule { prefix: String::new(), suffix: ".rotary_emb.inv_freq", reason: "computed from config.json" }];

fn family_of(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.model_types.contains(&model_type))
}

/// What config.json calls the family.
pub(crate) fn type_of(config: &Value) -> Option<&str> {
    config.get("model_type").and_then(Value::as_str)
}

/// A model that also sees or hears: `text_config` is its language model's part of config.json.
struct Wrapper {
    model_type: &'static str,
    /// The type of its text, where that says none, and whether whatever it says is read as this one.
    text: (&'static str, bool),
    /// Whether the head is the embedding where the wrapper does not say.
    tied: bool,
    /// Whether it is also where the text's part says so.
    hears_text: bool,
}

const WRAPPERS: &[Wrapper] = &[
    Wrapper { model_type: "llava", text: ("llama", false), tied: false, hears_text: true },
    Wrapper { model_type: "llava_next", text: ("llama", false), tied: false, hears_text: false },
    Wrapper { model_type: "idefics3", text: ("llama", false), tied: false, hears_text: false },
    Wrapper { model_type: "smolvlm", text: ("llama", false), tied: false, hears_text: false },
    Wrapper { model_type: "qwen2_audio", text: ("qwen2", false), tied: false, hears_text: false },
    Wrapper { model_type: "voxtral", text: ("llama", false), tied: false, hears_text: false },
    Wrapper { model_type: "internvl", text: ("qwen2", false), tied: true, hears_text: false },
    Wrapper { model_type: "lfm2_vl", text: ("lfm2", false), tied: true, hears_text: false },
    Wrapper { model_type: "lfm3_vl", text: ("lfm3", false), tied: true, hears_text: false },
    Wrapper { model_type: "mistral3", text: ("mistral", false), tied: true, hears_text: false },
    Wrapper { model_type: "mistral_large4", text: ("mistral_large4_text", true), tied: false, hears_text: false },
    Wrapper { model_type: "glm4v", text: ("glm4v_text", true), tied: false, hears_text: false },
    Wrapper { model_type: "glm4v_moe", text: ("glm4v_moe_text", true), tied: false, hears_text: false },
    Wrapper { model_type: "glm5_next", text: ("glm5_next_text", true), tied: false, hears_text: false },
    Wrapper { model_type: "kimi_k25", text: ("deepseek_v3", false), tied: true, hears_text: false },
    Wrapper { model_type: "minimax_m3_vl", text: ("minimax_m3_vl_text", true), tied: false, hears_text: true },
    Wrapper { model_type: "step3p7", text: ("step3p5", true), tied: false, hears_text: false },
    Wrapper { model_type: "gemma3", text: ("gemma3_text", true), tied: true, hears_text: false },
    Wrapper { model_type: "gemma3n", text: ("gemma3n_text", true), tied: true, hears_text: false },
    Wrapper { model_type: "gemma4", text: ("gemma4_text", true), tied: true, hears_text: false },
    Wrapper { model_type: "gemma4_unified", text: ("gemma4_unified_text", true), tied: true, hears_text: false },
    Wrapper { model_type: "llama4", text: ("llama4_text", true), tied: false, hears_text: false },
    Wrapper { model_type: "qwen2_vl", text: ("qwen2_vl_text", true), tied: false, hears_text: true },
    Wrapper { model_type: "qwen2_5_vl", text: ("qwen2_5_vl_text", true), tied: false, hears_text: true },
    Wrapper { model_type: "qwen3_vl", text: ("qwen3_vl_text", true), tied: false, hears_text: false },
    Wrapper { model_type: "qwen3_vl_moe", text: ("qwen3_vl_moe_text", true), tied: false, hears_text: false },
    Wrapper { model_type: "qwen3_5", text: ("qwen3_5_text", true), tied: false, hears_text: false },
    Wrapper { model_type: "qwen4_exp", text: ("qwen4_exp_text", true), tied: false, hears_text: false },
    Wrapper { model_type: "qwen3_5_moe", text: ("qwen3_5_moe_text", true), tied: false, hears_text: false },
];

/// Parts of config.json that may hold the settings of a language model: as transformers calls it, and as InternVL's own code does.
pub(crate) const TEXT_PARTS: [&str; 2] = ["text_config", "llm_config"];

/// The one of them that a config.json has; the first where it has none.
pub(crate) fn text_key(config: &Value) -> &'static str {
    TEXT_PARTS.into_iter().find(|key| config.get(key).is_some_and(Value::is_object)).unwrap_or(TEXT_PARTS[0])
}

/// Where a config.json has the settings of its language model.
struct TextPart {
    wrapper: Option<&'static Wrapper>,
    model_type: String,
    /// They are in a part of it.
    inner: bool,
}

fn text_part(config: &Value) -> TextPart {
    let outer = type_of(config);
    let wrapper = WRAPPERS.iter().find(|wrapper| outer == Some(wrapper.model_type));
    let part = config.get(text_key(config)).filter(|part| part.is_object());
    // A text model has no parts, whatever its config.json holds beside its settings.
    let part = part.filter(|_| wrapper.is_some() || outer.is_none_or(|outer| family_of(outer).is_none()));
    let own = type_of(part.unwrap_or(config)).map(str::to_owned);
    let model_type = match (part, wrapper) {
        (Some(_), Some(Wrapper { text: (text, true), .. })) => (*text).to_owned(),
        (Some(_), Some(Wrapper { text: (text, false), .. })) => own.unwrap_or_else(|| (*text).to_owned()),
        _ => own.unwrap_or_default(),
    };
    TextPart { wrapper, model_type, inner: part.is_some() }
}

/// Whether a model of this type sees or hears beside a language model that is known here.
fn is_wrapper(model_type: &str) -> bool {
    WRAPPERS.iter().any(|wrapper| wrapper.model_type == model_type)
}

/// What to say of a config.json whose type no runtime is known to have, around a language model of a known family.
pub fn unknown_outside(config: &Value) -> Option<String> {
    let TextPart { model_type, inner, .. } = text_part(config);
    let outer = type_of(config).filter(|_| inner && family_of(&model_type).is_some())?;
    if code_of_its_own(config).is_some() {
        return None;
    }
    guesses::unknown_outside(outer, &model_type)
}

/// What to say of a wrapper of a known type without the settings of its language model.
fn without_text(config: &Value) -> Option<String> {
    let TextPart { wrapper, model_type, inner } = text_part(config);
    let wrapper = wrapper.filter(|_| !inner && family_of(&model_type).is_none())?;
    let key = TEXT_PARTS[0];
    let found = config.get(key).map_or("is missing".to_owned(), |found| format!("is {}", shown(found)));
    Some(format!(
        "config.json: {key} {found}, and of a `{}` it is an object with the settings of the language model, a `{}`; take the config.json that was \
         published with the model",
        wrapper.model_type, wrapper.text.0
    ))
}

/// The class that a checkpoint brings along for the model itself, as `modeling_my.MyForCausalLM`.
fn code_of_its_own(config: &Value) -> Option<&str> {
    let map = config.get("auto_map")?.as_object()?;
    let classes = ["AutoModelForCausalLM", "AutoModel"].iter().find_map(|key| map.get(*key))?;
    classes.as_str().or_else(|| classes.get(0)?.as_str())
}

/// The part of config.json that has the settings of the language model: all of it, or `text_config` of a wrapper.
pub fn text_settings(config: &Value) -> &Value {
    if text_part(config).inner { &config[text_key(config)] } else { config }
}

/// The settings of the language model that `config` (config.json) describes, in one spelling: what every reader takes.
///
/// Fails for what is of another kind than it must be, as far as it is looked at. Of a family that is not in the list they
/// are as they were.
pub fn settings(config: &Value) -> Result<Settings> {
    let TextPart { wrapper, model_type, inner } = text_part(config);
    let part = config.get(text_key(config)).and_then(Value::as_object).filter(|_| inner);
    let text = part.or(config.as_object()).cloned().unwrap_or_default();
    let said = |place: &serde_json::Map<String, Value>| place.get("tie_word_embeddings").and_then(Value::as_bool);
    let (above, below) = (config.as_object().and_then(said), part.and_then(said));
    let mut settings = spelling::settled(&model_type, text)?;
    if let Some(code) = code_of_its_own(config).filter(|_| family_of(&model_type).is_some()) {
        settings.notes.push(format!(
            "config.json names code of the model's own ({code}, in auto_map), which is not run: it is taken for a `{model_type}`, as runtimes do \
             that do not trust remote code"
        ));
    }
    if wrapper.is_none()
        && !inner
        && family_of(&model_type).is_some()
        && config.get("text_config").is_some_and(Value::is_object)
    {
        settings.notes.push(format!(
            "config.json has a text_config beside the settings of a `{model_type}`, which transformers 5 fails on: it is not looked at"
        ));
    }
    // Those of a Mistral make it a Ministral to transformers, but not inside a wrapper.
    if let (Some(_), "mistral", Some(values)) = (part, model_type.as_str(), settings.values.as_object_mut()) {
        values.remove("layer_types");
    }
    let tied = match (wrapper, part) {
        (Some(wrapper), _) => {
            let text = settings.values.get("tie_word_embeddings").and_then(Value::as_bool);
            Some(above.unwrap_or(wrapper.tied) || wrapper.hears_text && text == Some(true))
        }
        (None, Some(_)) => below.or(above),
        (None, None) => None,
    };
    if let Some(outer) = type_of(config).filter(|_| part.is_some()) {
        settings.notes.extend(guesses::head(outer, &settings.model_type, &settings.values));
        settings.notes.extend(unknown_outside(config));
    }
    // Ids of tokens are looked for above first.
    let ids = part.and(config.as_object()).into_iter().flatten();
    for (key, id) in ids.filter(|(key, id)| key.ends_with("_token_id") && !id.is_null()) {
        settings.values[key] = id.clone();
    }
    if let Some(tied) = tied {
        if let Some(said) = below.filter(|said| *said != tied && wrapper.is_some()) {
            settings.notes.push(format!(
                "config.json has tie_word_embeddings {said} in text_config, and what is above it counts in transformers: {tied} is taken"
            ));
        }
        settings.values["tie_word_embeddings"] = tied.into();
    }
    Ok(settings)
}

/// Builds the graph of the model that `config` (config.json) describes. Fails for a family that is not in the list.
pub fn build(config: &Value) -> Result<Graph> {
    let settings = settings(config)?;
    match family_of(&settings.model_type) {
        Some(family) => {
            let mut graph = (family.build)(&Config(&settings.values)).or_else(|error| {
                // What only the arithmetic needs stands in no one's way who asks for none.
                let Some(other) = build::with_known_arithmetic(&settings.values) else { return Err(error) };
                let mut graph = (family.build)(&Config(&other))?;
                graph.unrunnable = Some(error.to_string());
                Ok(graph)
            })?;
            let said = settings.values.get("is_causal").filter(|said| counts_as_false(said));
            if let Some(said) = said.filter(|_| !graph.see_both_ways()) {
                graph.unrunnable.get_or_insert(format!(
                    "config.json: is_causal is {}, and only models that attend to what came before can be run",
                    shown(said)
                ));
            }
            check(&graph)?;
            Ok(graph)
        }
        None => {
            let model_type = match &settings.model_type[..] {
                "" => {
                    let found = config
                        .get("model_type")
                        .map_or("is missing".to_owned(), |found| format!("is {}", shown(found)));
                    return Err(Error::failed(format!(
                        "config.json: model_type {found}, and it is what names the architecture, as \"llama\"; take the config.json \
                         that was published with the model"
                    )));
                }
                known => known,
            };
            Err(Error::failed(format!("config.json: model_type is `{model_type}`, and only {} are supported", known())))
        }
    }
}

/// Whether Python takes a value of config.json for false.
fn counts_as_false(value: &Value) -> bool {
    value.is_null() || *value == Value::Bool(false) || real(value) == Some(0.0) || value.as_str() == Some("")
}

/// Every `model_type` that there is a family for.
fn known() -> String {
    let known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types.iter().copied()).collect();
    known.join(", ")
}

/// Whether the model that `config` describes is of a family in the list.
pub fn is_known(config: &Value) -> bool {
    family_of(&text_part(config).model_type).is_some()
}

/// What to say of a model of a known family that cannot be run.
pub fn cannot_run(graph: &Graph) -> Option<String> {
    let why = graph.unrunnable.as_ref()?;
    Some(format!("{why}: what is written was not measured, nor can it be"))
}

/// Fails for a model whose family is unknown, so that it cannot be run.
pub fn check_runnable(graph: &Graph, source: &dyn Weights) -> Result<()> {
    if let Some(why) = &graph.unrunnable {
        let path = source.path().display();
        return Err(Error::failed(format!(
            "{path}/{why}: such a model can be converted, merged with an adapter, and quantized without data and without measuring: \
             --method rtn --verify-text none"
        )));
    }
    if !graph.opaque {
        return Ok(());
    }
    let model_type = settings(source.config())?.model_type;
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
pub fn graph_of(source: &dyn Weights) -> Result<Graph> {
    if let Some(why) = without_text(source.config()) {
        return Err(Error::Failed(format!("{}/{why}", source.path().display())));
    }
    if settings(source.config()).is_ok_and(|text| family_of(&text.model_type).is_none() && !text.model_type.is_empty())
    {
        return unknown::graph(source);
    }
    let mut graph = published(source)?;
    as_stored(&mut graph, source);
    Ok(graph)
}

/// Quantized experts are stored one by one, and quantized linears as such, whatever their original was.
fn as_stored(graph: &mut Graph, source: &dyn Weights) {
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
}

/// The graph of a checkpoint as its family publishes them, with the names that its tensors have: experts may be stacked
/// that the checkpoint has one by one. Fails for an unknown family.
pub fn published(source: &dyn Weights) -> Result<Graph> {
    let located = |error: Error| match error {
        Error::Failed(why) if why.starts_with("config.json: ") => {
            Error::Failed(format!("{}/{why}", source.path().display()))
        }
        other => other,
    };
    let settings = settings(source.config()).map_err(located)?;
    let tensors = source.entries().len();
    if tensors == 0 {
        return Err(Error::failed(format!(
            "{}: the checkpoint holds no tensors; if it has an index, that names none: remove it where one file has all weights, or take the one \
             that belongs to the shards",
            source.path().display()
        )));
    }
    if let Some((key, layers)) = too_many_layers(&settings.values, tensors) {
        return Err(Error::failed(format!(
            "{}/config.json: {key} is {layers}, but the checkpoint has only {tensors} tensors; is the file another model's?",
            source.path().display()
        )));
    }
    let mut graph = build(source.config()).map_err(located)?;
    names::adopt(&mut graph, source);
    apertus::settle(&mut graph, source)?;
    olmo::settle(&mut graph, source);
    kimi::settle(&mut graph, source);
    hy4::settle(&mut graph, source);
    mistral_large4::settle(&mut graph, source);
    deepseek4::settle(&mut graph, source)?;
    qwen4::settle(&mut graph, source)?;
    moe::from_stacks(&mut graph, source);
    further::settle(&mut graph, source);
    if headless(&graph, source) {
        graph.head.linear.bias = false;
        (graph.head.tied, graph.head.missing) = (true, true);
    }
    Ok(graph)
}

/// Whether the checkpoint is of a class without an output projection: the bare model, which gives embeddings, or one with a
/// head for labels or values.
fn headless(graph: &Graph, source: &dyn Weights) -> bool {
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
fn too_many_layers(settings: &Value, tensors: usize) -> Option<(&'static str, i64)> {
    let layers = |key| Some((key, integer(settings.get(key)?)?));
    ["num_hidden_layers", "n_layer"].into_iter().find_map(layers).filter(|(_, layers)| *layers > tensors as i64)
}

/// Typed reads of config.json, with errors that name the key.
pub struct Config<'a>(&'a Value);

impl<'a> Config<'a> {
    /// The value of `key`, unless it is missing or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// Whether `key` is there, though it may be null.
    pub fn has(&self, key: &str) -> bool {
        self.0.get(key).is_some()
    }

    fn wrong(key: &str, expected: &str, found: Option<&Value>) -> Error {
        let hint = match found {
            Some(Value::String(text)) if text.trim().parse::<f64>().is_ok() => "; write it without quotes",
            _ => "",
        };
        let found = found.map_or("nothing".to_owned(), shown);
        Error::failed(format!("config.json: {key} must be {expected}, found {found}{hint}"))
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
        match (integer(value), real(value)) {
            (Some(n), _) if (1..=most(key)).contains(&n) => Ok(Some(n as usize)),
            (_, Some(x)) if x > most(key) as f64 => {
                Err(Self::wrong(key, &format!("at most {}", most(key)), Some(value)))
            }
            (None, Some(x)) if x > 0.0 => Err(Self::wrong(key, "a positive number without a fraction", Some(value))),
            _ => Err(Self::wrong(key, "a positive number", Some(value))),
        }
    }

    /// A count that may be 0, or `default` when it is missing.
    pub fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.get(key).is_some_and(|value| integer(value) == Some(0)) {
            true => Ok(0),
            false => Ok(self.optional_count(key)?.unwrap_or(default)),
        }
    }

    /// A number without a fraction, or `default` when it is missing.
    pub fn integer(&self, key: &str, default: i64) -> Result<i64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        integer(value).ok_or_else(|| Self::wrong(key, "a number without a fraction", Some(value)))
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
        real(value).ok_or_else(|| Self::wrong(key, "a number", Some(value)))
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
        let list = value.as_array().map(|list| {
            let layer = |value| integer(value).and_then(|layer| usize::try_from(layer).ok());
            list.iter().map(layer).collect::<Option<Vec<usize>>>()
        });
        match list.flatten() {
            Some(list) => Ok(Some(list)),
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
fn most(key: &str) -> i64 {
    match () {
        () if key.contains("vocab")
            || key.contains("intermediate")
            || key.contains("hidden") && !key.contains("layers") =>
        {
            1 << 30
        }
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

/// The positions that a model was made for, if config.json or its family says. Fails for what is no count.
pub fn longest_context(config: &Value) -> Result<Option<usize>> {
    let settings = settings(config)?;
    let config = Config(&settings.values);
    let keys = ["n_positions", "max_position_embeddings", "model_max_length"];
    let said = keys.into_iter().map(|key| config.optional_count(key)).find(|said| !matches!(said, Ok(None)));
    Ok(said.transpose()?.flatten().filter(|n| *n > 1))
}

/// Rows of the embedding, if config.json or its family says. Fails for what is no count.
pub fn vocabulary(config: &Value) -> Result<Option<usize>> {
    Config(&settings(config)?.values).optional_count("vocab_size")
}

/// Whether the head is the embedding, if config.json or its family says.
pub fn tied(config: &Value) -> Option<bool> {
    settings(config).ok()?.values.get("tie_word_embeddings")?.as_bool()
}
