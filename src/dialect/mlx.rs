//! What mlx-lm makes of a config.json: the settings that its class of a model goes by, in Hugging Face's terms.
//!
//! A model is built of these and held against the original, as what a GGUF file says is ([`same`]): tensors that only one of the two has
//! mean that mlx-lm does not load the output, and anything else that differs that it would compute another model. `tests/runtimes/mlx.py`
//! holds the table below against mlx-lm 0.32.

use serde_json::{Map, Value, json};

use crate::dialect::same::{self, Reader, named};
use crate::error::{Error, Result};
use crate::families::rope::warmth;
use crate::families::{self, longest_context, spelt_out};
use crate::graph::{Graph, Layer, RopeScaling};
use crate::json::{integer, real};

/// What a class of mlx-lm goes by.
struct Class {
    /// By [`crate::families::Family::id`].
    families: &'static [&'static str],
    /// Its activation, whatever config.json says.
    activation: &'static str,
    /// Settings that it does not read, and what it does in place of them.
    fixed: &'static [(&'static str, Fixed)],
    /// Settings without which it cannot be made.
    needed: &'static [&'static str],
    head: Head,
    /// Heads are as wide as the residual stream divided among them.
    divided: bool,
    windows: Windows,
    positions: Positions,
    /// The key of the share of a head that is rotated; all of it elsewhere.
    share: Option<&'static str>,
}

enum Fixed {
    Flag(bool),
    Count(u32),
    Null,
    /// So many times `hidden_size`.
    Wide(u32),
}

use Fixed::{Count, Flag, Null, Wide};

/// Which output projection it asks for.
enum Head {
    /// One of its own.
    Own,
    /// The embedding.
    Tied,
    /// As `tie_word_embeddings` says.
    Said,
    /// Whatever the files have.
    Stored,
}

/// Which layers see a window only.
#[derive(Clone, Copy, PartialEq)]
enum Windows {
    /// None.
    Never,
    /// Those that `layer_types` calls so; none without.
    Types,
    /// The same, and there must be one layer of each kind.
    Mixed,
    /// All but every so many, of `sliding_window_pattern`.
    Every,
    /// Those with an L in `sliding_window_pattern`.
    Letters,
    /// Chunks, by a rule of the family.
    Chunks,
}

/// What it reads of rotary positions.
#[derive(Clone, Copy, PartialEq)]
enum Positions {
    /// `rope_theta` alone.
    Theta,
    /// `rotary_emb_base` alone.
    Base,
    /// `rope_theta` and `rope_scaling`.
    Scaled,
    /// The same for layers that see all, and `rope_local_base_freq` for those that see a window.
    Local,
    /// The same for layers that see all, and `rope_theta` for those that see a window.
    Near,
    /// `rope_parameters`.
    Parameters,
    /// LongRoPE or nothing.
    Long,
    /// `linear` or nothing, with `type` in `rope_scaling`; and whether it is applied.
    Linear { applied: bool },
    /// YaRN, whatever its type is called.
    Yarn,
    /// `alpha` of `rope_scaling`.
    Alpha,
}

const PLAIN: Class = Class {
    families: &[],
    activation: "silu",
    fixed: &[],
    needed: &[],
    head: Head::Said,
    divided: false,
    windows: Windows::Never,
    positions: Positions::Scaled,
    share: None,
};

const CLASSES: &[Class] = &[
    Class { families: &["llama", "mistral"], windows: Windows::Types, ..PLAIN },
    Class {
        families: &["ministral3"],
        fixed: &[("attention_bias", Flag(false)), ("mlp_bias", Flag(false))],
        windows: Windows::Types,
        positions: Positions::Parameters,
        ..PLAIN
    },
    Class { families: &["seed_oss"], ..PLAIN },
    Class { families: &["helium"], head: Head::Own, divided: true, positions: Positions::Theta, ..PLAIN },
    Class { families: &["qwen2", "qwen2_vl"], divided: true, ..PLAIN },
    Class { families: &["qwen3", "qwen3_vl"], fixed: &[("attention_bias", Flag(false))], ..PLAIN },
    Class {
        families: &["gemma"],
        activation: "gelu",
        fixed: &[("attention_bias", Flag(false))],
        head: Head::Tied,
        positions: Positions::Theta,
        ..PLAIN
    },
    Class {
        families: &["gemma2"],
        activation: "gelu_pytorch_tanh",
        fixed: &[("attention_bias", Flag(false))],
        needed: &["attn_logit_softcapping", "final_logit_softcapping"],
        head: Head::Tied,
        positions: Positions::Theta,
        ..PLAIN
    },
    Class {
        families: &["gemma3"],
        activation: "gelu_pytorch_tanh",
        fixed: &[("attention_bias", Flag(false)), ("final_logit_softcapping", Null)],
        head: Head::Stored,
        windows: Windows::Every,
        positions: Positions::Local,
        ..PLAIN
    },
    Class {
        families: &["phi"],
        activation: "gelu_pytorch_tanh",
        fixed: &[("qk_layernorm", Flag(false))],
        head: Head::Own,
        divided: true,
        positions: Positions::Theta,
        share: Some("partial_rotary_factor"),
        ..PLAIN
    },
    Class {
        families: &["phi3"],
        divided: true,
        positions: Positions::Long,
        share: Some("partial_rotary_factor"),
        ..PLAIN
    },
    Class { families: &["olmo2"], ..PLAIN },
    Class { families: &["olmo3"], windows: Windows::Mixed, positions: Positions::Near, ..PLAIN },
    Class { families: &["granite", "granitemoe"], divided: true, ..PLAIN },
    Class {
        families: &["gpt_neox"],
        activation: "gelu_pytorch_tanh",
        fixed: &[("attention_bias", Flag(true)), ("intermediate_size", Wide(4))],
        head: Head::Own,
        divided: true,
        positions: Positions::Base,
        share: Some("rotary_pct"),
        ..PLAIN
    },
    Class {
        families: &["starcoder2"],
        activation: "gelu",
        fixed: &[("use_bias", Flag(true))],
        divided: true,
        positions: Positions::Theta,
        ..PLAIN
    },
    Class { families: &["smollm3"], windows: Windows::Types, ..PLAIN },
    Class { families: &["cohere"], head: Head::Tied, divided: true, positions: Positions::Theta, ..PLAIN },
    Class {
        families: &["cohere2"],
        head: Head::Tied,
        divided: true,
        windows: Windows::Every,
        positions: Positions::Theta,
        ..PLAIN
    },
    Class { families: &["glm"], positions: Positions::Theta, ..PLAIN },
    Class {
        families: &["glm4", "glm4_moe"],
        head: Head::Own,
        positions: Positions::Theta,
        share: Some("partial_rotary_factor"),
        ..PLAIN
    },
    Class {
        families: &["stablelm"],
        head: Head::Own,
        divided: true,
        positions: Positions::Theta,
        share: Some("partial_rotary_factor"),
        ..PLAIN
    },
    Class {
        families: &["nemotron"],
        activation: "relu2",
        positions: Positions::Linear { applied: true },
        share: Some("partial_rotary_factor"),
        ..PLAIN
    },
    Class { families: &["exaone4"], windows: Windows::Letters, ..PLAIN },
    Class { families: &["ernie4_5", "ernie4_5_moe"], positions: Positions::Theta, ..PLAIN },
    Class { families: &["hunyuan_v1_dense"], positions: Positions::Alpha, ..PLAIN },
    Class { families: &["mixtral"], divided: true, positions: Positions::Theta, ..PLAIN },
    Class {
        families: &["qwen2_moe"],
        fixed: &[
            ("qkv_bias", Flag(true)),
            ("norm_topk_prob", Flag(false)),
            ("mlp_only_layers", Null),
            ("decoder_sparse_step", Count(1)),
        ],
        head: Head::Own,
        divided: true,
        positions: Positions::Linear { applied: false },
        ..PLAIN
    },
    Class { families: &["qwen3_moe"], fixed: &[("attention_bias", Flag(false))], positions: Positions::Theta, ..PLAIN },
    Class { families: &["olmoe"], fixed: &[("clip_qkv", Null)], ..PLAIN },
    Class {
        families: &["deepseek_v2"],
        fixed: &[("norm_topk_prob", Flag(false))],
        head: Head::Own,
        positions: Positions::Yarn,
        ..PLAIN
    },
    Class { families: &["deepseek_v3"], fixed: &[("rope_interleave", Flag(true))], head: Head::Own, ..PLAIN },
    Class { families: &["dots1"], fixed: &[("attention_bias", Flag(false))], ..PLAIN },
    Class {
        families: &["minimax_m2"],
        needed: &["shared_intermediate_size"],
        positions: Positions::Theta,
        share: Some("rotary_dim"),
        ..PLAIN
    },
    Class {
        families: &["llama4"],
        fixed: &[("no_rope_layers", Null), ("no_rope_layer_interval", Count(4)), ("moe_layers", Null)],
        head: Head::Own,
        windows: Windows::Chunks,
        ..PLAIN
    },
];

/// The types of models that mlx-lm 0.32 has a class for, or reads as another. Not `olmo`, whose class is that of files of another form, nor
/// `llama4_text`, whose class has the names of another form too.
#[rustfmt::skip]
const TYPES: &[&str] = &[
    "Klear", "afm7", "afmoe", "apertus", "baichuan_m1", "bailing_hybrid", "bailing_moe", "bailing_moe_linear",
    "bailing_moe_v3", "bitnet", "cohere", "cohere2", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v41", "deepseek_v41_text", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4",
    "exaone_moe", "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4",
    "gemma4_text", "gemma4_unified", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2",
    "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "helium", "hunyuan",
    "hunyuan_v1_dense", "internlm2", "internlm3", "iquestcoder", "iquestloopcoder", "jamba", "joyai_llm_flash",
    "kimi_k2", "kimi_k25", "kimi_k3", "kimi_linear", "kimi_vl", "laguna", "lfm2", "lfm2-vl", "lfm2_moe",
    "lille-130m", "llama", "llama4", "llava", "longcat_flash", "longcat_flash_ngram", "mamba", "mamba2", "mellum",
    "mimo", "mimo_v2_flash", "minicpm", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl", "ministral3",
    "mistral", "mistral3", "mistral4", "mixtral", "muse_glimmer", "muse_spark", "nanbeige", "nanochat", "nemotron",
    "nemotron-nas", "nemotron_h", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openelm", "phi", "phi-msft", "phi3",
    "phi3small", "phimoe", "phixtral", "pixtral", "plamo", "plamo2", "plamo3", "qwen", "qwen2", "qwen2_5_vl",
    "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl",
    "qwen3_vl_moe", "recurrent_gemma", "rwkv7", "seed_oss", "smollm3", "solar_open", "spark2_5", "stablelm",
    "starcoder2", "step3p5", "talkie", "telechat3", "xverse", "youtu_llm",
];

/// Those of them whose classes put experts into stacks with their scales.
#[rustfmt::skip]
const STACKS: &[&str] = &[
    "afmoe", "bailing_hybrid", "bailing_moe", "bailing_moe_linear", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
    "exaone_moe", "glm4_moe", "glm4_moe_lite", "hunyuan", "jamba", "kimi_k2", "kimi_vl", "laguna", "longcat_flash", "mimo_v2_flash",
    "mistral4", "mixtral", "olmoe", "phimoe", "phixtral", "qwen2_moe", "solar_open",
];

/// Whether mlx-lm has a class for models whose config.json has this `model_type`.
pub fn knows(model_type: &str) -> bool {
    TYPES.contains(&model_type)
}

/// Whether that class takes quantized experts that are written one by one.
pub fn stacks_experts(model_type: &str) -> bool {
    STACKS.contains(&model_type)
}

/// Whether its class leaves out a tensor that is no part of the language model, as it loads a file.
pub fn leaves_out(model_type: &str, name: &str, layers: usize) -> bool {
    let begins = |parts: &[&str]| parts.iter().any(|part| name.starts_with(part));
    let layer = || name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
    match model_type {
        "gemma3" => begins(&["vision_tower.", "multi_modal_projector."]),
        "mistral3" | "llava" => name.contains("vision_tower") || name.contains("multi_modal_projector"),
        "llama4" => name.contains("vision_model") || name.contains("multi_modal_projector"),
        "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl" | "qwen3_vl_moe" => {
            begins(&["visual.", "vision_tower.", "model.visual."])
        }
        "glm4_moe" => begins(&[&format!("model.layers.{layers}")]),
        "bailing_hybrid" | "bailing_moe_v3" | "deepseek_v32" | "glm4_moe_lite" | "glm_moe_dsa" | "step3p5" => {
            layer().is_some_and(|layer| layer >= layers)
        }
        // Whichever number is the first behind the model's.
        "deepseek_v3" | "joyai_llm_flash" | "kimi_k2" => begins(&["model.layers.61"]),
        "exaone_moe" | "nemotron_h" | "deepseek_v41" => begins(&["mtp."]),
        "qwen3_5" | "qwen3_5_moe" | "qwen3_next" => name.contains("mtp."),
        "mimo" => begins(&["model.mtp_layers."]),
        "kimi_linear" | "longcat_flash" | "mimo_v2_flash" => begins(&["model.mtp"]),
        "kimi_k3" => begins(&["model.mtp", "mtp"]),
        "ernie4_5_moe" => ["mtp_block.", "mtp_linear_proj.", "mtp_hidden_norm.", "mtp_emb_norm."]
            .iter()
            .any(|part| name.contains(part)),
        _ => false,
    }
}

/// What to say of mlx-lm, which is given `config` and a model of which `tensors` are written: notes, or a refusal where it would compute
/// something else than the model, and nobody would be told.
pub fn notes(config: &Value, graph: &Graph) -> Result<Vec<String>> {
    let Some(class) = CLASSES.iter().find(|class| class.families.contains(&graph.family)) else {
        return Ok(vec![format!(
            "mlx-lm 0.32 has a class of `{}` models, and what it computes was not compared with the original: load the output, and compare \
             its answers",
            graph.family
        )]);
    };
    if let Some(why) = &graph.unrunnable {
        return Err(Error::usage(format!(
            "{why}, and mlx-lm's class of `{}` models would load the output and compute something else; give another --format, as \
             compressed-tensors",
            graph.family
        )));
    }
    if graph.sees_both_ways() {
        return Err(Error::usage(
            "tokens of the model see what comes after them, which none of mlx-lm's classes does; give another --format, as compressed-tensors",
        ));
    }
    let mut original = families::build(config)?.without_predictors();
    // The prefix is the wrapper's where there is one, and its class looks for it.
    let wrapped = config.get("text_config").is_some() || graph.aside.iter().any(|(prefix, _)| prefix.contains("vis"));
    if graph.head.missing {
        original.head.missing = true;
    }
    let written = spelt_out(config);
    match taken(class, &written, graph) {
        Err(why) => Ok(vec![not_loaded(&why)]),
        Ok(taken) => {
            let mut other = families::build(&taken)?.without_predictors();
            correct(&mut other, &written);
            if let Some(why) = other_tensors(&original, &other, graph, wrapped) {
                return Ok(vec![not_loaded(&why)]);
            }
            let windows = set_windows(&mut other, class, families::text_settings(&written));
            let reader = Reader { windows, converted: false };
            match same::difference(&original, &other, reader) {
                Some(what) => Err(Error::usage(format!(
                    "{what} cannot be written for mlx-lm, whose class of `{}` models would load the output and compute something else; give \
                     another --format, as compressed-tensors or gguf",
                    graph.family
                ))),
                None => told(&original, class, windows, config),
            }
        }
    }
}

fn not_loaded(why: &str) -> String {
    format!(
        "mlx-lm 0.32 does not run this output: {why}; give another --format, as compressed-tensors or gguf, for other runtimes"
    )
}

/// What differs so little, or so late in a text, that the output is of use; `windows` says whether the class has those of this model.
fn told(graph: &Graph, class: &Class, windows: bool, config: &Value) -> Result<Vec<String>> {
    let attention = || graph.blocks.iter().filter_map(|block| block.attention());
    let mut told = Vec::new();
    let context = longest_context(config)?.unwrap_or(usize::MAX);
    let window = attention().filter_map(|attention| attention.shape.window).min();
    if let Some(window) = window.filter(|window| *window < context && !windows) {
        told.push(format!(
            "mlx-lm ignores the sliding window of {window} tokens in models of this type: beyond {window} tokens the model attends to more \
             than it was trained with, so keep texts shorter or give another --format, as compressed-tensors"
        ));
    }
    let own = graph.blocks.iter().flat_map(|block| &block.steps).find_map(|step| match &step.layer {
        Layer::Mlp(mlp) => Some(named(mlp.activation)),
        _ => None,
    });
    if let Some(own) = own.filter(|own| *own != class.activation) {
        told.push(format!(
            "mlx-lm computes {} for models of this type, and this one has {own}: logits differ a little from the original's",
            class.activation
        ));
    }
    if graph.head.missing {
        told.push(
            "this model has no output projection, and mlx-lm takes the embedding for one: its hidden states are right, and what it generates \
             means nothing"
                .to_owned(),
        );
    }
    let long = attention().find_map(|attention| match &attention.rope.as_ref()?.scaling {
        RopeScaling::Long { short, long, original } if short != long => Some(*original),
        _ => None,
    });
    if let Some(original) = long {
        told.push(format!(
            "mlx-lm takes LongRoPE's long factors however short a text is: within the first {original} tokens its logits differ from the \
             original's; give another --format, as compressed-tensors, for such texts"
        ));
    }
    Ok(told)
}

/// Families whose classes read `rope_traditional`, which says that neighbours are rotated together.
#[rustfmt::skip]
const TRADITIONAL: &[&str] = &[
    "llama", "mistral", "smollm3", "seed_oss", "qwen2", "qwen2_vl", "gemma", "gemma2", "phi3", "olmo2", "mixtral", "qwen2_moe", "olmoe", "glm4",
];

/// What a class does by settings that are none of transformers', or by none at all.
fn correct(graph: &mut Graph, written: &Value) {
    let family = graph.family;
    let said = |key: &str| families::text_settings(written).get(key).and_then(Value::as_bool);
    for step in graph.blocks.iter_mut().flat_map(|block| &mut block.steps) {
        match &mut step.layer {
            Layer::Attention(attention) => {
                if let Some(neighbours) = said("rope_traditional").filter(|_| TRADITIONAL.contains(&family)) {
                    attention.layout.interleaved = neighbours;
                }
                if family == "hunyuan_v1_dense" && said("use_qk_norm") == Some(false) {
                    attention.norms = None;
                }
            }
            Layer::Mlp(mlp) if ["olmo2", "dots1"].contains(&family) && said("mlp_bias") == Some(true) => {
                mlp.inputs.iter_mut().chain([&mut mlp.down]).for_each(|linear| linear.bias = true);
            }
            // The correction of the router is left out as the files are read.
            Layer::Moe(moe) if family == "ernie4_5_moe" => moe.router.correction = None,
            _ => {}
        }
    }
    match family {
        "ernie4_5" | "ernie4_5_moe" => graph.head.linear.bias = false,
        "cohere" | "cohere2" if said("layer_norm_bias") == Some(true) => {
            graph.final_norm.bias = Some("model.norm.bias".to_owned());
        }
        _ => {}
    }
}

/// Which layers the class takes for those that see a window only, where it goes by a list; `None` where it has none to go by.
fn local(class: &Class, text: &Value) -> Option<Vec<bool>> {
    match text.get("layer_types").and_then(Value::as_array) {
        Some(types) => Some(types.iter().map(|kind| *kind == "sliding_attention").collect()),
        None if class.windows == Windows::Mixed => {
            let layers = text.get("num_hidden_layers").and_then(integer)?;
            Some((1..=layers).map(|layer| layer % 4 != 0).collect())
        }
        None => None,
    }
}

/// Gives the layers of a model the windows that the class has for them, where these do not follow from its settings; whether it has any.
fn set_windows(graph: &mut Graph, class: &Class, text: &Value) -> bool {
    let listed = match class.windows {
        Windows::Never => return false,
        Windows::Every | Windows::Letters | Windows::Chunks => return true,
        Windows::Types | Windows::Mixed => local(class, text),
    };
    let Some(listed) = listed else { return false };
    let window = text.get("sliding_window").and_then(integer).map(|window| window as usize);
    for (block, local) in graph.blocks.iter_mut().zip(listed) {
        for step in &mut block.steps {
            if let Layer::Attention(attention) = &mut step.layer {
                attention.shape.window = window.filter(|_| local);
            }
        }
    }
    true
}

/// The settings that a class goes by, in Hugging Face's terms, or why it cannot be made of what is written.
fn taken(class: &Class, written: &Value, graph: &Graph) -> std::result::Result<Value, String> {
    let settings = families::settings(written).map_err(|error| error.to_string())?;
    let text = families::text_settings(written);
    let mut values = settings.values.as_object().cloned().unwrap_or_default();
    values.extend(json!({"model_type": settings.model_type}).as_object().cloned().unwrap_or_default());
    if let Some(key) = class.needed.iter().find(|key| text.get(**key).is_none_or(Value::is_null)) {
        return Err(format!("its class of `{}` models asks for {key}, which config.json does not say", graph.family));
    }
    let count = |key: &str| values.get(key).and_then(integer);
    let sizes = (count("hidden_size"), count("num_attention_heads"), count("num_hidden_layers"));
    let (Some(hidden), Some(heads @ 1..), Some(layers)) = sizes else {
        return Err("config.json lacks sizes of the model".to_owned());
    };
    let set = |values: &mut Map<String, Value>, key: &str, value: Value| drop(values.insert(key.to_owned(), value));
    for key in ["hidden_act", "hidden_activation"] {
        set(&mut values, key, class.activation.into());
    }
    for (key, fixed) in class.fixed {
        let value = match fixed {
            Flag(flag) => json!(flag),
            Count(count) => json!(count),
            Null => Value::Null,
            Wide(times) => json!(hidden * i64::from(*times)),
        };
        set(&mut values, key, value);
    }
    let tied = match class.head {
        Head::Own => false,
        Head::Tied => true,
        Head::Stored => graph.head.tied,
        Head::Said => text.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(graph.head.tied),
    };
    set(&mut values, "tie_word_embeddings", tied.into());
    if class.divided {
        if hidden % heads != 0 {
            return Err(format!("its class divides a width of {hidden} among {heads} heads, which leaves a rest"));
        }
        set(&mut values, "head_dim", (hidden / heads).into());
    }
    let pattern = text.get("sliding_window_pattern").cloned().unwrap_or_default();
    match class.windows {
        Windows::Never | Windows::Chunks => {}
        Windows::Types | Windows::Mixed => {
            let has = |kind: bool| local(class, text).is_none_or(|local| local.contains(&kind));
            let lacks = match class.windows {
                _ if !has(false) => Some("full_attention"),
                Windows::Mixed if !has(true) => Some("sliding_attention"),
                _ => None,
            };
            if let Some(kind) = lacks {
                return Err(format!(
                    "its class looks for a layer of {kind} (layer_types of config.json), and there is none"
                ));
            }
        }
        Windows::Every => {
            let usual = if graph.family == "cohere2" { 4 } else { 6 };
            let every = integer(&pattern).unwrap_or(usual);
            if every > layers {
                return Err(format!(
                    "its class looks at layer {every} (sliding_window_pattern) for what layers that see all are given, and there are {layers} \
                     layers"
                ));
            }
            set(&mut values, "layer_types", Value::Null);
            set(&mut values, "sliding_window_pattern", every.into());
        }
        Windows::Letters => {
            let letters = pattern.as_str().unwrap_or_default();
            set(&mut values, "layer_types", Value::Null);
            if pattern.is_null() || letters.is_empty() && pattern.is_string() {
                set(&mut values, "sliding_window", Value::Null);
            } else if !letters.contains('L') || !letters.contains('G') {
                return Err(
                    "its class reads sliding_window_pattern of config.json as letters, with an L and a G".to_owned()
                );
            } else if values.get("sliding_window").is_none_or(Value::is_null) {
                let all = values.get("max_position_embeddings").cloned().unwrap_or(json!(1 << 20));
                set(&mut values, "sliding_window", all);
            }
        }
    }
    let rotary = rotary(class, text, &values, graph)?;
    values.retain(|key, _| {
        ![
            "rope_scaling",
            "rope_theta",
            "rotary_emb_base",
            "rotary_pct",
            "partial_rotary_factor",
            "rope_local_base_freq",
        ]
        .contains(&&key[..])
    });
    set(&mut values, "rope_parameters", rotary);
    Ok(values.into())
}

/// `rope_parameters` in Hugging Face's terms, of what a class reads.
fn rotary(
    class: &Class,
    text: &Value,
    values: &Map<String, Value>,
    graph: &Graph,
) -> std::result::Result<Value, String> {
    let context = values.get("max_position_embeddings").and_then(integer).unwrap_or(0);
    let said = |key: &str| text.get(key).filter(|value| !value.is_null());
    let scaling = said("rope_scaling").and_then(Value::as_object);
    let own = said("rope_parameters").and_then(Value::as_object);
    let theta = match class.positions {
        Positions::Base => said("rotary_emb_base").cloned(),
        Positions::Parameters => own.and_then(|own| own.get("rope_theta")).cloned(),
        _ => said("rope_theta").cloned(),
    };
    let theta = theta.unwrap_or(json!(0.5));
    let kind_of = |scaling: &Map<String, Value>| {
        let named = |key: &str| scaling.get(key).and_then(Value::as_str);
        named("type").or(named("rope_type")).unwrap_or("default").to_owned()
    };
    let plain = || json!({"rope_type": "default"});
    let asks =
        |place: &str, of: &Map<String, Value>, keys: &[&str]| match keys.iter().find(|key| !of.contains_key(**key)) {
            Some(key) => Err(format!("its class asks for {key} in {place} of config.json")),
            None => Ok(()),
        };
    let mut turned = match (class.positions, scaling) {
        (Positions::Theta | Positions::Base, _) => plain(),
        (Positions::Scaled | Positions::Local | Positions::Near, None) => plain(),
        (Positions::Scaled | Positions::Local | Positions::Near, Some(scaling)) => {
            scaled(&kind_of(scaling), scaling, context, graph)?
        }
        (Positions::Parameters, _) => {
            let Some(own) = own else {
                return Err("its class asks for rope_parameters in config.json".to_owned());
            };
            let keys = ["llama_4_scaling_beta", "original_max_position_embeddings", "rope_theta"];
            asks("rope_parameters", own, &keys)?;
            let mut turned = scaled(&kind_of(own), own, context, graph)?;
            for key in ["llama_4_scaling_beta", "original_max_position_embeddings"] {
                turned[key] = own[key].clone();
            }
            turned
        }
        (Positions::Long | Positions::Linear { .. } | Positions::Alpha, None) => plain(),
        (Positions::Long, Some(scaling)) => {
            asks("rope_scaling", scaling, &["long_factor", "type"])?;
            match &kind_of(scaling)[..] {
                "longrope" | "su" => {
                    let original = said("original_max_position_embeddings").cloned().unwrap_or(json!(4096));
                    long(scaling, original, context, graph)
                }
                _ => plain(),
            }
        }
        (Positions::Linear { applied }, Some(scaling)) => {
            asks("rope_scaling", scaling, &["factor", "type"])?;
            match &kind_of(scaling)[..] {
                "linear" if applied => scaled("linear", scaling, context, graph)?,
                "linear" => plain(),
                other => {
                    return Err(format!("its class knows rope_scaling of the type linear alone, and this is {other}"));
                }
            }
        }
        (Positions::Yarn, None) => {
            return Err("its class cannot do without rope_scaling in config.json, and this model has none".to_owned());
        }
        (Positions::Yarn, Some(scaling)) => scaled("yarn", scaling, context, graph)?,
        (Positions::Alpha, Some(scaling)) => {
            asks("rope_scaling", scaling, &["alpha", "factor", "type"])?;
            json!({"rope_type": "dynamic", "alpha": scaling["alpha"], "factor": scaling["factor"]})
        }
    };
    turned["rope_theta"] = theta.clone();
    if let Some(key) = class.share {
        let head_dim = values.get("head_dim").and_then(real).filter(|width| *width > 0.0);
        let share = match (said(key).and_then(real), key, head_dim) {
            (Some(dim), "rotary_dim", Some(width)) => Some(dim / width),
            (share, ..) => share,
        };
        turned["partial_rotary_factor"] = json!(share.unwrap_or(1.0));
    } else if turned.get("partial_rotary_factor").is_none() {
        turned["partial_rotary_factor"] = json!(1.0);
    }
    let near = match class.positions {
        Positions::Local => said("rope_local_base_freq").cloned().unwrap_or(json!(1e4)),
        Positions::Near => theta,
        _ => return Ok(turned),
    };
    Ok(json!({"full_attention": turned, "sliding_attention": {"rope_type": "default", "rope_theta": near}}))
}

/// What its function for all kinds of scaling takes.
fn scaled(kind: &str, scaling: &Map<String, Value>, context: i64, graph: &Graph) -> std::result::Result<Value, String> {
    let needed = |key: &str| {
        scaling
            .get(key)
            .filter(|value| !value.is_null())
            .cloned()
            .ok_or_else(|| format!("it asks for {key} in rope_scaling of config.json"))
    };
    let or = |key: &str, usual: f64| match scaling.get(key) {
        Some(Value::Null) => Err(format!("it reads {key} in rope_scaling of config.json, which is null")),
        found => Ok(found.and_then(real).unwrap_or(usual)),
    };
    let original = |usual: i64| scaling.get("original_max_position_embeddings").cloned().unwrap_or(json!(usual));
    Ok(match kind {
        "default" | "mrope" => json!({"rope_type": "default"}),
        "linear" => json!({"rope_type": "linear", "factor": needed("factor")?}),
        "dynamic" => json!({"rope_type": "dynamic", "factor": needed("factor")?}),
        "llama3" => json!({
            "rope_type": "llama3", "factor": needed("factor")?, "low_freq_factor": or("low_freq_factor", 1.0)?,
            "high_freq_factor": or("high_freq_factor", 4.0)?, "original_max_position_embeddings": original(8192),
        }),
        "yarn" | "deepseek_yarn" | "telechat3-yarn" => {
            let factor = real(&needed("factor")?).unwrap_or(1.0);
            let all = or("mscale_all_dim", 0.0)?;
            let magnitude = warmth(factor, or("mscale", 1.0)?) / warmth(factor, all);
            json!({
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original(4096),
                "beta_fast": or("beta_fast", 32.0)?, "beta_slow": or("beta_slow", 1.0)?, "mscale_all_dim": all,
                "attention_factor": magnitude,
            })
        }
        "longrope" => long(scaling, needed("original_max_position_embeddings")?, context, graph),
        "proportional" => json!({
            "rope_type": "proportional", "factor": or("factor", 1.0)?,
            "partial_rotary_factor": or("partial_rotary_factor", 1.0)?,
        }),
        other => return Err(format!("it does not know rope_scaling of the type {other}")),
    })
}

/// LongRoPE's long factors, whatever the length of a text: of the short ones a note tells.
fn long(scaling: &Map<String, Value>, original: Value, context: i64, graph: &Graph) -> Value {
    let short = graph.blocks.iter().find_map(|block| match &block.attention()?.rope.as_ref()?.scaling {
        RopeScaling::Long { short, .. } => Some(short.clone()),
        _ => None,
    });
    let first = real(&original).unwrap_or(1.0);
    let factor = context as f64 / first;
    let magnitude = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / first.ln()).sqrt() };
    json!({
        "rope_type": "longrope", "short_factor": short, "long_factor": scaling.get("long_factor"), "factor": factor,
        "original_max_position_embeddings": original, "attention_factor": magnitude,
    })
}

/// Why mlx-lm does not load what is written, if it does not: it takes no file with a tensor that its class lacks, or without one that it
/// has.
fn other_tensors(original: &Graph, other: &Graph, graph: &Graph, wrapped: bool) -> Option<String> {
    let [usual, own] = [original, graph].map(|graph| &graph.embedding.tensor);
    if usual != own && !wrapped {
        return Some(format!("its class looks for `{usual}`, which this model calls `{own}`"));
    }
    if graph.head.missing && !other.head.tied {
        return Some(format!(
            "its class of `{}` models asks for an output projection (`{}`), and this model has none",
            graph.family,
            other.head.linear.weight()
        ));
    }
    let tensors = |graph: &Graph| graph.tensors().into_iter().collect::<std::collections::BTreeMap<_, _>>();
    let (written, asked) = (tensors(original), tensors(other));
    let family = graph.family;
    let count = |n: usize| if n > 1 { format!(" (and {} more)", n - 1) } else { String::new() };
    let extra: Vec<&String> = written.keys().filter(|name| !asked.contains_key(*name)).collect();
    if let Some(first) = extra.first() {
        return Some(format!(
            "its class of `{family}` models has no place for `{first}`{}, which this model has",
            count(extra.len())
        ));
    }
    let missing: Vec<&String> = asked.keys().filter(|name| !written.contains_key(*name)).collect();
    if let Some(first) = missing.first() {
        return Some(format!(
            "its class of `{family}` models asks for `{first}`{}, which this model does not have",
            count(missing.len())
        ));
    }
    let (name, shape) = written.iter().find(|(name, shape)| asked.get(*name) != Some(*shape))?;
    let extents = |shape: &[usize]| shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" by ");
    Some(format!(
        "its class of `{family}` models expects `{name}` to be {}, and it is {}",
        extents(&asked[name]),
        extents(shape)
    ))
}
