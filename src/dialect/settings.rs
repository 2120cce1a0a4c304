//! config.json from the settings of a GGUF file: what llama.cpp would run, in Hugging Face's terms.
//!
//! Writing uses it too: a model is written only if what would be read back is the same model
//! ([`crate::dialect::metadata`]).

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use formats::container::gguf::MetadataValue;
use serde_json::{Map, Value, json};

use crate::dialect::architectures::{Architecture, Need, ROPE_FREQS, ROPE_LONG, ROPE_SHORT};

mod required;

/// What a GGUF file says of a model beside its weights.
pub(crate) struct Settings {
    /// What the settings' names start with.
    pub architecture: &'static Architecture,
    /// Keys and values.
    pub keys: HashMap<String, MetadataValue>,
    /// Names and extents of tensors.
    pub tensors: HashMap<String, Vec<usize>>,
    /// The values of the tensors of rotary factors.
    pub factors: HashMap<String, Vec<f32>>,
    /// Keys that were asked for.
    pub asked: RefCell<HashSet<String>>,
}

/// Settings that change nothing that is computed here, or are carried over elsewhere.
const SILENT: &[&str] = &[
    "vocab_size",
    "tensor_data_layout",
    "pooling_type",
    "expert_shared_count",
    "rope.scaling.finetuned",
    // Of a latent they follow from its width.
    "attention.key_length",
    "attention.value_length",
];

type Result<T> = formats::Result<T>;

impl Settings {
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.id)
    }

    fn get<T>(&self, name: &str, what: &str, as_type: impl Fn(&MetadataValue) -> Option<T>) -> Result<Option<T>> {
        match self.look(name) {
            None => Ok(None),
            Some(value) => as_type(value)
                .map(Some)
                .ok_or_else(|| formats::Error::malformed(format!("metadata key `{}` is not {what}", self.key(name)))),
        }
    }

    /// The value of a setting, which counts as asked for.
    fn look(&self, name: &str) -> Option<&MetadataValue> {
        let key = self.key(name);
        let value = self.keys.get(&key);
        self.asked.borrow_mut().insert(key);
        value
    }

    /// The architecture's settings in the file that nothing has asked for, sorted.
    pub fn unread(&self) -> Vec<&str> {
        let asked = self.asked.borrow();
        let own = |key: &&str| {
            let name = key.strip_prefix(self.architecture.id).and_then(|rest| rest.strip_prefix('.'));
            name.is_some_and(|name| !SILENT.contains(&name)) && !asked.contains(*key)
        };
        let mut unread: Vec<&str> = self.keys.keys().map(String::as_str).filter(own).collect();
        unread.sort_unstable();
        unread
    }

    /// A count; the first of a list where there is one for each layer and all are the same.
    pub(super) fn count(&self, name: &str) -> Result<Option<usize>> {
        self.get(name, "a count that is the same for all layers", |value| match value {
            MetadataValue::Array(list) => {
                let mut list = list.iter().map(integer);
                let first = list.next()??;
                list.all(|other| other == Some(first)).then_some(first)
            }
            value => integer(value),
        })
    }

    pub(super) fn required(&self, name: &str) -> Result<usize> {
        let value =
            self.count(name)?.ok_or_else(|| formats::Error::missing(format!("metadata key `{}`", self.key(name))))?;
        match value {
            0 => Err(formats::Error::mismatch(format!("metadata key `{}`", self.key(name)), "a positive count", 0)),
            value => Ok(value),
        }
    }

    pub(super) fn float(&self, name: &str) -> Result<Option<f64>> {
        self.get(name, "a float", |value| match value {
            // The shortest decimal that is the same number.
            MetadataValue::F32(x) => x.to_string().parse().ok(),
            MetadataValue::F64(x) => Some(*x),
            _ => None,
        })
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        self.get(name, "a boolean", |value| match value {
            MetadataValue::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&str>> {
        match self.look(name) {
            None => Ok(None),
            Some(MetadataValue::String(text)) => Ok(Some(text)),
            Some(_) => Err(formats::Error::malformed(format!("metadata key `{}` is not a string", self.key(name)))),
        }
    }

    fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    pub(super) fn unsupported(&self, why: impl Into<String>) -> formats::Error {
        formats::Error::unsupported(why.into())
    }

    /// Which layers see a window only: one flag a layer, or all but every so many.
    fn local(&self, layers: usize, default: usize) -> Result<Vec<bool>> {
        let name = "attention.sliding_window_pattern";
        let list = match self.look(name) {
            Some(MetadataValue::Array(list)) => list
                .iter()
                .map(|value| match value {
                    MetadataValue::Bool(flag) => Some(*flag),
                    other => integer(other).map(|n| n != 0),
                })
                .collect::<Option<Vec<bool>>>(),
            _ => {
                let every = self.count(name)?.unwrap_or(default);
                Some((0..layers).map(|layer| every == 0 || layer % every + 1 < every).collect())
            }
        };
        list.filter(|list| list.len() >= layers).map(|list| list[..layers].to_vec()).ok_or_else(|| {
            formats::Error::malformed(format!("metadata key `{}` has no flag for each layer", self.key(name)))
        })
    }

    /// A window that layers of this architecture do not keep to, where a text may be longer.
    pub fn unused_window(&self) -> Result<Option<usize>> {
        let context = self.count("context_length")?.unwrap_or(0);
        let window = self.count("attention.sliding_window")?.filter(|window| (1..context).contains(window));
        Ok(window.filter(|_| !self.architecture.windows))
    }

    /// config.json. Fails for what is missing or cannot be said there.
    pub fn config(&self) -> Result<Value> {
        let id = self.architecture.id;
        if self.flag("attention.causal")? == Some(false) {
            return Err(self.unsupported(format!(
                "`{}` is false: attention to what comes later in the text can be neither computed nor written here; take the model \
                 as it is, or have llama-quantize quantize it",
                self.key("attention.causal")
            )));
        }
        let finetuned = self.flag("rope.scaling.finetuned")?;
        if (id, finetuned) == ("granite", Some(false)) {
            return Err(self.unsupported(format!(
                "`{}` is false, by which llama.cpp runs a granite model without positions, and config.json has no word for that",
                self.key("rope.scaling.finetuned")
            )));
        }
        let embedding = self.tensors.get("token_embd.weight");
        let hidden = self.required("embedding_length")?;
        let layers = self.required("block_count")?;
        let heads = self.required("attention.head_count")?;
        let kv_heads = self.count("attention.head_count_kv")?.unwrap_or(heads).max(1);
        let latent = self.count("attention.kv_lora_rank")?.filter(|_| id == "deepseek2");
        let context = self.required("context_length")?;
        required::check(self)?;
        let head_dim = match latent {
            Some(_) => self.required("attention.key_length_mla")?,
            None => self.count("attention.key_length")?.unwrap_or(hidden / heads),
        };
        if latent.is_none()
            && let Some(value) = self.count("attention.value_length")?.filter(|value| *value != head_dim)
        {
            return Err(self.unsupported(format!("keys of {head_dim} values and values of {value} cannot be read")));
        }
        let rotated = self.count("rope.dimension_count")?.unwrap_or(head_dim);
        let experts = self.count("expert_count")?.filter(|n| *n > 0);
        let inner = self.required("feed_forward_length")?;
        let eps = self.float(required::epsilon(id))?;
        let eps = eps.ok_or_else(|| formats::Error::missing(self.key(required::epsilon(id))))?;
        let theta = self.float("rope.freq_base")?.unwrap_or(10000.0);
        // There a stretched context is a larger base.
        let alpha = match id {
            "hunyuan-dense" => self.float("rope.scaling.alpha")?.filter(|alpha| *alpha > 0.0),
            _ => None,
        };
        let power = head_dim as f64 / (head_dim as f64 - 2.0);
        let theta = alpha.map_or(theta, |alpha| theta * alpha.powf(power));
        let scaling = self.rope_scaling(theta, latent.is_some())?;
        let (model_type, class, activation) = self.class(experts.is_some())?;
        let tied = !self.has("output.weight");
        let biased = |modules: &[&str]| {
            self.tensors
                .keys()
                .filter_map(|name| name.strip_prefix("blk.")?.strip_suffix(".bias")?.split_once('.'))
                .any(|(_, module)| modules.contains(&module))
        };
        let mut config = json!({
            "architectures": [class], "model_type": model_type, "vocab_size": embedding.and_then(|shape| shape.first()),
        });
        let object = config.as_object_mut().expect("an object");
        let mut set = |values: Value| object.extend(values.as_object().cloned().unwrap_or_default());
        if model_type == "gpt2" {
            set(json!({
                "n_embd": hidden, "n_head": heads, "n_layer": layers, "n_positions": context, "n_inner": inner,
                "layer_norm_epsilon": eps, "activation_function": activation, "tie_word_embeddings": tied,
            }));
            return Ok(config);
        }
        set(json!({
            "hidden_act": activation,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "max_position_embeddings": context,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied,
        }));
        if latent.is_none() {
            set(json!({"head_dim": head_dim}));
        }
        let norm = match model_type {
            "phi" | "gpt_neox" | "stablelm" | "cohere" | "cohere2" => Some("layer_norm_eps"),
            "starcoder2" => Some("norm_epsilon"),
            "nemotron" => Some("norm_eps"),
            "olmo" => None,
            _ => Some("rms_norm_eps"),
        };
        match norm {
            Some(key) => set(Value::Object(Map::from_iter([(key.to_owned(), eps.into())]))),
            None if eps as f32 != 1e-5 => {
                return Err(self.unsupported(format!("norms without weights have an epsilon of 1e-5, not {eps}")));
            }
            None => {}
        }
        if rotated != head_dim && latent.is_none() {
            // Multiplied by the width of a head it is truncated.
            let share = rotated as f64 / head_dim as f64;
            let share = if (head_dim as f64 * share) as usize == rotated { share } else { share + 1e-9 };
            match model_type {
                "gpt_neox" => set(json!({"rotary_pct": share})),
                "phi" | "phi3" | "stablelm" | "nemotron" | "glm" | "glm4" | "glm4_moe" => {
                    set(json!({"partial_rotary_factor": share}));
                }
                _ => {
                    return Err(
                        self.unsupported(format!("rotating {rotated} of {head_dim} values of a head cannot be read"))
                    );
                }
            }
        } else if matches!(model_type, "phi" | "stablelm" | "nemotron" | "glm" | "glm4" | "glm4_moe") {
            set(json!({"partial_rotary_factor": 1.0}));
        } else if model_type == "gpt_neox" {
            set(json!({"rotary_pct": 1.0}));
        }
        let window = self.count("attention.sliding_window")?.filter(|window| *window > 0);
        let types = |local: &[bool]| -> Value {
            local.iter().map(|local| if *local { "sliding_attention" } else { "full_attention" }).collect()
        };
        let of_two_kinds = matches!(model_type, "gemma3_text" | "olmo3");
        if model_type == "ministral3" {
            let mut all = scaling.clone().unwrap_or(json!({"rope_type": "default"}));
            all["rope_theta"] = theta.into();
            if let Some(scale) = self.float("attention.temperature_scale")?.filter(|scale| *scale != 0.0) {
                all["llama_4_scaling_beta"] = scale.into();
            }
            set(json!({"rope_parameters": all}));
        } else if !of_two_kinds {
            set(match model_type {
                "gpt_neox" => json!({"rotary_emb_base": theta}),
                _ => json!({"rope_theta": theta}),
            });
            match scaling.clone() {
                Some(scaling) => {
                    // This family's configurations have it outside, where it counts.
                    if let (Some(original), "phi3") = (scaling.get("original_max_position_embeddings"), model_type) {
                        set(json!({"original_max_position_embeddings": original}));
                    }
                    set(json!({"rope_scaling": scaling}));
                }
                // Where nothing is said of scaling this family's usual one is meant.
                None if model_type == "gpt_oss" => set(json!({"rope_scaling": {"rope_type": "default"}})),
                None => {}
            }
        } else {
            let near = match model_type {
                "olmo3" => theta,
                _ => self.float("rope.freq_base_swa")?.unwrap_or(10000.0),
            };
            let mut wide = scaling.clone().unwrap_or(json!({"rope_type": "default"}));
            wide["rope_theta"] = theta.into();
            set(json!({"rope_parameters": {
                "full_attention": wide,
                "sliding_attention": {"rope_type": "default", "rope_theta": near},
            }}));
        }
        let of_output = if self.architecture.o_bias == Need::May { "attn_output" } else { "attn_qkv" };
        let biases = biased(&["attn_q", "attn_k", "attn_v", "attn_qkv", of_output]);
        let heads_27b = matches!((model_type, layers), ("gemma2", 46) | ("gemma3_text", 62));
        match model_type {
            "llama" | "mixtral" | "granite" | "granitemoe" | "smollm3" | "nemotron" => {
                set(json!({"attention_bias": biases, "mlp_bias": biased(&["ffn_up", "ffn_gate", "ffn_down"])}));
            }
            "qwen3" | "qwen3_moe" | "gemma" | "gemma2" | "gemma3_text" | "olmo" | "olmo2" | "olmo3" | "cohere"
            | "cohere2" | "glm" | "glm4" | "olmoe" | "gpt_oss" | "llama4_text" | "gpt_neox" | "seed_oss" | "arcee"
            | "hunyuan_v1_dense" | "glm4_moe" => {
                set(json!({"attention_bias": biases}));
            }
            "starcoder2" => set(json!({"use_bias": true})),
            "stablelm" => {
                // The norm decides.
                self.look("use_parallel_residual");
                set(json!({
                    "use_qkv_bias": biases,
                    "use_parallel_residual": !self.has("blk.0.ffn_norm.weight"),
                    "qk_layernorm": self.has("blk.0.attn_q_norm.weight"),
                }))
            }
            "qwen2_moe" => set(json!({"qkv_bias": biases})),
            _ => {}
        }
        if model_type.starts_with("granite") {
            let factor = |name: &str| Ok::<f64, formats::Error>(self.float(name)?.filter(|x| *x != 0.0).unwrap_or(1.0));
            let scale = self.float("attention.scale")?.filter(|x| *x != 0.0);
            set(json!({
                "attention_multiplier": scale.unwrap_or((head_dim as f64).powf(-0.5)),
                "embedding_multiplier": factor("embedding_scale")?,
                "residual_multiplier": factor("residual_scale")?,
                "logits_scaling": factor("logit_scale")?,
            }));
        }
        let used = || self.required("expert_used_count");
        let expert_inner =
            || -> Result<usize> { Ok(self.count("expert_feed_forward_length")?.filter(|n| *n > 0).unwrap_or(inner)) };
        match model_type {
            "gemma2" | "gemma3_text" => {
                let third = model_type == "gemma3_text";
                let scalar = if heads_27b { hidden / heads } else { head_dim };
                let cap = |name: &str| self.float(name);
                let local = match (third, window) {
                    (true, None) => vec![false; layers],
                    _ => self.local(layers, if third { 6 } else { 2 })?,
                };
                set(json!({
                    "query_pre_attn_scalar": scalar,
                    "sliding_window": window.unwrap_or(4096),
                    "layer_types": types(&local),
                    "attn_logit_softcapping": if third { None } else { Some(cap("attn_logit_softcapping")?.unwrap_or(50.0)) },
                    "final_logit_softcapping": match (cap("final_logit_softcapping")?, third) {
                        (found, true) => found.filter(|cap| *cap != 0.0),
                        (found, false) => Some(found.unwrap_or(30.0)),
                    },
                    "hidden_activation": activation,
                }));
            }
            "qwen2_vl" => {
                // Of a text all kinds of position are the same.
                let name = "rope.dimension_sections";
                let sections: Vec<usize> = match self.look(name) {
                    Some(MetadataValue::Array(list)) => list.iter().filter_map(integer).take(3).collect(),
                    _ => return Err(formats::Error::missing(format!("metadata key `{}`", self.key(name)))),
                };
                if scaling.is_some() {
                    return Err(self.unsupported("scaled positions of several kinds cannot be read"));
                }
                set(json!({"rope_scaling": {"type": "mrope", "mrope_section": sections}}));
            }
            "gemma" => set(json!({"hidden_activation": activation})),
            "olmo" => set(json!({"clip_qkv": self.float("attention.clamp_kqv")?.filter(|clip| *clip > 0.0)})),
            "olmo3" => set(json!({"sliding_window": window, "layer_types": types(&self.local(layers, 4)?)})),
            "gpt_neox" => set(json!({"use_parallel_residual": self.flag("use_parallel_residual")?.unwrap_or(true)})),
            "cohere" => set(json!({
                "logit_scale": self.float("logit_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                "use_qk_norm": layers >= 64,
            })),
            "cohere2" => set(json!({
                "logit_scale": self.float("logit_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                "sliding_window": window,
                "layer_types": types(&self.local(layers, 4)?),
            })),
            "smollm3" => set(json!({"no_rope_layer_interval": 4, "use_sliding_window": false})),
            // Windows, and with them layers without positions, are used in the largest model only.
            "exaone4" => {
                let window = (layers == 64).then(|| window.unwrap_or(4096));
                let local = if window.is_some() { self.local(layers, 4)? } else { vec![false; layers] };
                set(json!({"sliding_window": window, "layer_types": types(&local)}));
            }
            "glm4_moe" => set(json!({
                "moe_intermediate_size": expert_inner()?,
                "n_routed_experts": experts,
                "n_shared_experts": self.count("expert_shared_count")?.filter(|count| *count > 0),
                "num_experts_per_tok": used()?,
                "first_k_dense_replace": self.count("leading_dense_block_count")?.unwrap_or(0),
                "norm_topk_prob": self.flag("expert_weights_norm")?.unwrap_or(false),
                "routed_scaling_factor": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                "use_qk_norm": self.has("blk.0.attn_q_norm.weight"),
            })),
            "mixtral" | "granitemoe" => set(json!({"num_local_experts": experts, "num_experts_per_tok": used()?})),
            "olmoe" => set(json!({"num_experts": experts, "num_experts_per_tok": used()?, "norm_topk_prob": false})),
            "qwen2_moe" | "qwen3_moe" => set(json!({
                "num_experts": experts,
                "num_experts_per_tok": used()?,
                "moe_intermediate_size": match self.count("expert_feed_forward_length")?.filter(|n| *n > 0) {
                    Some(width) => width,
                    None => inner / used()?,
                },
                "norm_topk_prob": model_type == "qwen3_moe",
                "shared_expert_intermediate_size": match model_type {
                    "qwen2_moe" => Some(self.count("expert_shared_feed_forward_length")?.unwrap_or(inner)),
                    _ => None,
                },
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            })),
            "gpt_oss" => set(json!({
                "num_local_experts": experts,
                "num_experts_per_tok": used()?,
                "intermediate_size": expert_inner()?,
                "sliding_window": window,
                "layer_types": types(&self.local(layers, 2)?),
            })),
            "llama4_text" => {
                let unlimited = self.count("attention.sliding_window")? == Some(0);
                let local = if unlimited { vec![true; layers] } else { self.local(layers, 4)? };
                set(json!({
                    "num_local_experts": experts,
                    "num_experts_per_tok": used()?,
                    "intermediate_size": expert_inner()?,
                    "intermediate_size_mlp": inner,
                    "interleave_moe_layer_step": self.required("interleave_moe_layer_step")?,
                    "attention_chunk_size": if unlimited { None } else { Some(8192) },
                    "no_rope_layers": local.iter().map(|local| u8::from(*local)).collect::<Vec<_>>(),
                    "use_qk_norm": experts != Some(128),
                    "attn_temperature_tuning": !unlimited,
                    "floor_scale": 8192,
                    "attn_scale": 0.1,
                }));
            }
            "deepseek_v2" | "deepseek_v3" => self.deepseek(&mut set, [inner, head_dim, rotated], experts)?,
            _ => {}
        }
        Ok(config)
    }

    /// `model_type`, the class in transformers and the activation.
    fn class(&self, experts: bool) -> Result<(&'static str, &'static str, &'static str)> {
        let windowed = self.count("attention.sliding_window")?.is_some_and(|window| window > 0);
        Ok(match (self.architecture.id, experts) {
            ("llama", false) => ("llama", "LlamaForCausalLM", "silu"),
            ("llama", true) => ("mixtral", "MixtralForCausalLM", "silu"),
            ("qwen2", false) => ("qwen2", "Qwen2ForCausalLM", "silu"),
            ("qwen2vl", false) => ("qwen2_vl", "Qwen2VLForConditionalGeneration", "silu"),
            ("qwen3", false) => ("qwen3", "Qwen3ForCausalLM", "silu"),
            ("gemma", false) => ("gemma", "GemmaForCausalLM", "gelu_pytorch_tanh"),
            ("gemma2", false) => ("gemma2", "Gemma2ForCausalLM", "gelu_pytorch_tanh"),
            ("gemma3", false) => ("gemma3_text", "Gemma3ForCausalLM", "gelu_pytorch_tanh"),
            ("phi2", false) => ("phi", "PhiForCausalLM", "gelu_new"),
            ("phi3", false) => ("phi3", "Phi3ForCausalLM", "silu"),
            ("olmo", false) => ("olmo", "OlmoForCausalLM", "silu"),
            ("olmo2", false) if windowed => ("olmo3", "Olmo3ForCausalLM", "silu"),
            ("olmo2", false) => ("olmo2", "Olmo2ForCausalLM", "silu"),
            ("granite", false) => ("granite", "GraniteForCausalLM", "silu"),
            ("granitemoe", true) => ("granitemoe", "GraniteMoeForCausalLM", "silu"),
            ("starcoder2", false) => ("starcoder2", "Starcoder2ForCausalLM", "gelu_pytorch_tanh"),
            ("gptneox", false) => ("gpt_neox", "GPTNeoXForCausalLM", "gelu_new"),
            ("gpt2", false) => ("gpt2", "GPT2LMHeadModel", "gelu_new"),
            ("smollm3", false) => ("smollm3", "SmolLM3ForCausalLM", "silu"),
            ("command-r", false) => ("cohere", "CohereForCausalLM", "silu"),
            ("cohere2", false) => ("cohere2", "Cohere2ForCausalLM", "silu"),
            ("chatglm", false) => ("glm", "GlmForCausalLM", "silu"),
            ("glm4", false) => ("glm4", "Glm4ForCausalLM", "silu"),
            ("stablelm", false) => ("stablelm", "StableLmForCausalLM", "silu"),
            ("nemotron", false) => ("nemotron", "NemotronForCausalLM", "relu2"),
            ("exaone4", false) => ("exaone4", "Exaone4ForCausalLM", "silu"),
            ("mistral3", false) => ("ministral3", "Ministral3ForCausalLM", "silu"),
            ("glm4moe", true) if !self.sigmoid(true)? => {
                return Err(self.unsupported("a glm4moe model that routes by softmax cannot be said in config.json"));
            }
            ("glm4moe", true) => ("glm4_moe", "Glm4MoeForCausalLM", "silu"),
            ("arcee", false) => ("arcee", "ArceeForCausalLM", "relu2"),
            ("seed_oss", false) => ("seed_oss", "SeedOssForCausalLM", "silu"),
            ("ernie4_5", false) => ("ernie4_5", "Ernie4_5ForCausalLM", "silu"),
            ("hunyuan-dense", false) => ("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "silu"),
            ("qwen2moe", true) => ("qwen2_moe", "Qwen2MoeForCausalLM", "silu"),
            ("qwen3moe", true) => ("qwen3_moe", "Qwen3MoeForCausalLM", "silu"),
            ("olmoe", true) => ("olmoe", "OlmoeForCausalLM", "silu"),
            ("deepseek2", _) if self.sigmoid(false)? => ("deepseek_v3", "DeepseekV3ForCausalLM", "silu"),
            ("deepseek2", _) => ("deepseek_v2", "DeepseekV2ForCausalLM", "silu"),
            ("gpt-oss", true) => ("gpt_oss", "GptOssForCausalLM", "silu"),
            ("llama4", true) => ("llama4_text", "Llama4ForCausalLM", "silu"),
            (id, true) => {
                return Err(self.unsupported(format!("a mixture of experts of architecture `{id}` cannot be read")));
            }
            (id, false) => {
                return Err(self.unsupported(format!("a model of architecture `{id}` has experts, this one none")));
            }
        })
    }

    /// Whether experts are chosen by sigmoids; where the file does not say, `usual`.
    fn sigmoid(&self, usual: bool) -> Result<bool> {
        let name = "expert_gating_func";
        let layers = self.count("block_count")?;
        // GLM 4.7 Lite, whose files do not say.
        let vocabulary = self.tensors.get("token_embd.weight").and_then(|shape| shape.first());
        let lite =
            self.architecture.id == "deepseek2" && matches!(layers, Some(47 | 48)) && vocabulary == Some(&154880);
        match self.count(name)? {
            None | Some(0) => Ok(usual || lite),
            Some(1) => Ok(false),
            Some(2) => Ok(true),
            Some(other) => Err(self.unsupported(format!(
                "`{}` is {other}: experts can be chosen by softmax (1) and by sigmoids (2)",
                self.key(name)
            ))),
        }
    }

    fn deepseek(
        &self,
        set: &mut dyn FnMut(Value),
        [inner, head_dim, rotated]: [usize; 3],
        experts: Option<usize>,
    ) -> Result<()> {
        let third = self.sigmoid(false)?;
        let nope = head_dim.checked_sub(rotated).filter(|nope| *nope > 0).ok_or_else(|| {
            self.unsupported(format!("rotating {rotated} of {head_dim} values of a head cannot be read"))
        })?;
        let groups = self.count("expert_group_count")?.filter(|count| *count > 1);
        if groups.is_some() && !third {
            return Err(self.unsupported(format!(
                "`{}` without sigmoids that choose experts: llama.cpp ranks groups by their two best experts then, and no model of \
                 transformers does; if the model is DeepSeek V3 or made from it, set `{}` to 2, else quantize the checkpoint that the file \
                 was made from",
                self.key("expert_group_count"),
                self.key("expert_gating_func")
            )));
        }
        // A mixture's correction may be left out of the file.
        let layers = self.required("block_count")?;
        let dense = self.count("leading_dense_block_count")?.unwrap_or(0);
        let corrected = self.has(&format!("blk.{}.exp_probs_b.bias", layers - 1));
        if third && !corrected && experts.is_some() && dense < layers {
            return Err(self.unsupported("sigmoid routing without a correction cannot be read"));
        }
        set(json!({
            "num_key_value_heads": self.required("attention.head_count")?,
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rotated,
            "v_head_dim": self.required("attention.value_length_mla")?,
            "kv_lora_rank": self.required("attention.kv_lora_rank")?,
            "q_lora_rank": self.count("attention.q_lora_rank")?.filter(|rank| *rank > 0),
            "intermediate_size": inner,
            "moe_intermediate_size": self.required("expert_feed_forward_length")?,
            "n_routed_experts": experts,
            "n_shared_experts": self.count("expert_shared_count")?.filter(|count| *count > 0),
            "num_experts_per_tok": self.count("expert_used_count")?,
            "first_k_dense_replace": dense,
            "moe_layer_freq": 1,
            "norm_topk_prob": self.flag("expert_weights_norm")?.unwrap_or(false),
            "routed_scaling_factor": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
            "n_group": groups.unwrap_or(1),
            "topk_group": self.count("expert_group_used_count")?.filter(|_| groups.is_some()).unwrap_or(1),
            "topk_method": if third { "noaux_tc" } else { "greedy" },
            "scoring_func": if third { "sigmoid" } else { "softmax" },
            "rope_interleave": true,
        }));
        Ok(())
    }

    fn rope_scaling(&self, theta: f64, latent: bool) -> Result<Option<Value>> {
        let warm = self.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
        if let Some(factors) = self.factors.get(ROPE_FREQS) {
            let usable = factors.iter().all(|factor| *factor > 0.0 && factor.is_finite()) && !latent;
            let scaled = if usable { self.scaled_factors(factors, warm)? } else { None };
            if scaled.is_some() {
                return Ok(scaled);
            }
            return llama3_scaling(factors, theta).or_else(|error| match usable {
                // Any other factors, within the first context and beyond it.
                true => self.divided(decimals(factors), warm).map(Some),
                false => Err(error.in_tensor(ROPE_FREQS)),
            });
        }
        let original = self.count("rope.scaling.original_context_length")?;
        if let (Some(long), Some(short)) = (self.factors.get(ROPE_LONG), self.factors.get(ROPE_SHORT)) {
            // The factors decide, whatever the type says.
            self.look("rope.scaling.type");
            if self.float("rope.scaling.factor")?.is_some_and(|factor| factor != 0.0 && factor != 1.0) {
                return Err(self.unsupported(format!(
                    "`{}` beside LongRoPE's own factors cannot be said in config.json; quantize the checkpoint that the file was made from",
                    self.key("rope.scaling.factor")
                )));
            }
            let original = original.map_or_else(|| self.required("context_length"), Ok)?;
            return Ok(Some(json!({
                "rope_type": "longrope", "short_factor": decimals(short), "long_factor": decimals(long),
                "original_max_position_embeddings": original, "attention_factor": warm,
            })));
        }
        self.scaling_by_type(theta, warm, latent)
    }
}

fn integer(value: &MetadataValue) -> Option<usize> {
    let wide: i128 = match value {
        MetadataValue::U8(n) => (*n).into(),
        MetadataValue::I8(n) => (*n).into(),
        MetadataValue::U16(n) => (*n).into(),
        MetadataValue::I16(n) => (*n).into(),
        MetadataValue::U32(n) => (*n).into(),
        MetadataValue::I32(n) => (*n).into(),
        MetadataValue::U64(n) => (*n).into(),
        MetadataValue::I64(n) => (*n).into(),
        _ => return None,
    };
    wide.try_into().ok()
}

/// Numbers by their shortest decimals.
fn decimals(values: &[f32]) -> Vec<f64> {
    values.iter().filter_map(|x| x.to_string().parse().ok()).collect()
}

/// Finds Llama 3's scaling from the factor it gives each rotary frequency.
///
/// With wavelength `λ` the factor is 1 below `original/high`, `factor` above `original/low`, and between them
/// `1 / ((1 − t)/factor + t)` with `t = (original/λ − low) / (high − low)`. Only the ratios `original : low : high` can be
/// known, so `low` is taken to be 1, as it always is.
fn llama3_scaling(factors: &[f32], theta: f64) -> formats::Result<Option<Value>> {
    if factors.iter().all(|f| *f == 1.0) {
        return Ok(None);
    }
    let dim = 2 * factors.len();
    let inverse_wavelength = |i: usize| theta.powf(-(2.0 * i as f64) / dim as f64) / std::f64::consts::TAU;
    let factor = factors.iter().copied().fold(1.0f32, f32::max);
    // Each factor in between gives a point on the line t(1/λ).
    let t = |f: f32| (1.0 / f64::from(f) - 1.0 / f64::from(factor)) / (1.0 - 1.0 / f64::from(factor));
    let between: Vec<(f64, f64)> = (0..factors.len())
        .filter(|&i| factors[i] > 1.0 && factors[i] < factor)
        .map(|i| (inverse_wavelength(i), t(factors[i])))
        .collect();
    let (original, high) = match (between.first(), between.last()) {
        (Some(first), Some(last)) if between.len() > 1 => {
            let slope = (last.1 - first.1) / (last.0 - first.0);
            let low_over_span = slope * first.0 - first.1;
            let span = 1.0 / low_over_span;
            (slope * span, 1.0 + span)
        }
        // Few rotary pairs leave the bounds open; any between the last unscaled and the first scaled wavelength will do.
        (None, None) => {
            let wavelength = |i: usize| 1.0 / inverse_wavelength(i);
            let first_scaled = (0..factors.len()).find(|&i| factors[i] > 1.0).map_or(1.0, wavelength);
            let last_whole =
                (0..factors.len()).rev().find(|&i| factors[i] == 1.0).map_or(first_scaled / 4.0, wavelength);
            let original = first_scaled.floor();
            (original, (original / last_whole).min(4.0))
        }
        // One point tells one bound; the other is Llama's.
        (Some((inverse, t)), _) => ((3.0 * t + 1.0) / inverse, 4.0),
        (None, Some(_)) => unreachable!("the first is the last"),
    };
    let (original, high) = (original.round(), (high * 1000.0).round() / 1000.0);
    let expected = |i: usize| {
        let t = (original * inverse_wavelength(i) - 1.0) / (high - 1.0);
        1.0 / ((1.0 - t.clamp(0.0, 1.0)) / f64::from(factor) + t.clamp(0.0, 1.0))
    };
    if let Some(i) = (0..factors.len()).find(|&i| (f64::from(factors[i]) / expected(i) - 1.0).abs() > 1e-3) {
        return Err(formats::Error::unsupported(format!(
            "the frequency factors are not Llama 3's rope scaling: factor {i} is {}, expected {:.4}",
            factors[i],
            expected(i)
        )));
    }
    Ok(Some(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
        "original_max_position_embeddings": original as u64,
    })))
}
