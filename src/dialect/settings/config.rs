//! config.json, put together part by part: what every model says, then what only models of its type say.

mod joint;
mod mixture;
mod states;
mod step;
mod streams;

use formats::container::gguf::MetadataValue;
use serde_json::{Map, Value, json};

use super::{Result, Settings, integer, required};
use crate::dialect::architectures::Need;

/// The numbers that every architecture has, most of them under keys of the same names.
struct Hyperparameters {
    /// Width of hidden states.
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    /// Whether keys and values are made of a latent, as DeepSeek's are.
    latent: bool,
    /// Tokens of the longest text.
    context: usize,
    /// Values of a head.
    head_dim: usize,
    /// How many of them are rotated by position.
    rotated: usize,
    /// Experts of a mixture.
    experts: Option<usize>,
    /// Width of feed-forward layers.
    inner: usize,
    /// Epsilon of the norms.
    eps: f64,
    /// Base of rotary frequencies.
    theta: f64,
}

/// How many values each of so many heads has.
fn integer_share(settings: &Settings, inner: usize, heads: usize) -> Result<usize> {
    match inner.is_multiple_of(heads) {
        true => Ok(inner / heads),
        false => Err(settings.unsupported(format!("{heads} heads of a state space do not divide {inner} values"))),
    }
}

/// The value of `layer_types`: whether a layer sees a window alone or the whole text.
pub(super) fn layer_types(local: &[bool]) -> Value {
    local.iter().map(|local| if *local { "sliding_attention" } else { "full_attention" }).collect()
}

/// config.json of a folder with what a file of these settings holds, where that names another class than reading goes by: the language models of
/// Qwen2-VL, Qwen3-VL, GLM-4.1V and GLM-4.5V have no classes of their own in transformers, and in a text, where positions of all kinds are the same,
/// they are a Qwen2, a Qwen3, a GLM-4 and a GLM-4.5.
pub(crate) fn as_text(config: &Value) -> Option<Value> {
    let mut text = config.clone();
    let object = text.as_object_mut()?;
    let (model_type, class) = match object["model_type"].as_str()? {
        "qwen2_vl" => ("qwen2", "Qwen2ForCausalLM"),
        "qwen3_vl_text" => ("qwen3", "Qwen3ForCausalLM"),
        "qwen3_vl_moe_text" => ("qwen3_moe", "Qwen3MoeForCausalLM"),
        "glm4v_text" => ("glm4", "Glm4ForCausalLM"),
        "glm4v_moe_text" => ("glm4_moe", "Glm4MoeForCausalLM"),
        _ => return None,
    };
    object.insert("model_type".to_owned(), json!(model_type));
    object.insert("architectures".to_owned(), json!([class]));
    ["rope_scaling", "n_deepstack_layers"].iter().for_each(|key| drop(object.shift_remove(*key)));
    if let Some(Value::Object(rope)) = object.get_mut("rope_parameters") {
        ["mrope_section", "mrope_interleaved"].iter().for_each(|key| drop(rope.shift_remove(*key)));
    }
    Some(text)
}

impl Settings {
    /// config.json. Fails for what is missing or cannot be said there.
    pub fn config(&self) -> Result<Value> {
        self.check_sayable()?;
        let model = self.hyperparameters()?;
        let Hyperparameters { hidden, layers, heads, kv_heads, latent, context, head_dim, inner, eps, .. } = model;
        let scaling = self.rope_scaling(model.theta, latent)?;
        let [model_type, class, activation] = self.class(model.experts.is_some())?;
        let tied = !self.has("output.weight");
        let embedding = self.tensors.get("token_embd.weight");
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
        if !latent {
            set(json!({"head_dim": head_dim}));
        }
        set(self.epsilon(model_type, eps)?);
        set(self.rotary_share(model_type, &model)?);
        set(self.positions(model_type, model.theta, scaling.as_ref())?);
        set(self.biases(model_type));
        if model_type.starts_with("granite") {
            set(self.multipliers(head_dim)?);
        }
        set(self.of_type(model_type, activation, &model)?);
        set(self.mixture(model_type, &model)?);
        if self.flag("attention.causal")? == Some(false) && self.architecture.id != "gemma-embedding" {
            set(json!({"is_causal": false}));
        }
        if let Some(key) = self.architecture.further {
            set(json!({key: self.further()?}));
        }
        Ok(config)
    }

    /// Fails for flags that change what is computed and have no key in any config.json.
    fn check_sayable(&self) -> Result<()> {
        let id = self.architecture.id;
        if self.flag("attention.causal")? == Some(false) && self.window()?.is_some() && id != "gemma-embedding" {
            return Err(self.unsupported(format!(
                "`{}` is false: attention both ways within a window can be neither computed nor written here; take the model as it is, or have \
                 llama-quantize quantize it",
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
        Ok(())
    }

    /// Fails for the first key that is missing, and for values of another width than keys.
    fn hyperparameters(&self) -> Result<Hyperparameters> {
        let id = self.architecture.id;
        let hidden = self.required("embedding_length")?;
        let layers = self.layers()?.map_or_else(|| self.required("block_count"), Ok)?;
        let heads = match id {
            // Layers with a window have more.
            "step35" => self.step_heads(layers)?[0],
            _ => self.required("attention.head_count")?,
        };
        // Layers with a state have none, or no feed-forward layer.
        let by_layer = matches!(id, "granitehybrid" | "nemotron_h" | "nemotron_h_moe" | "lfm2" | "lfm2moe");
        let largest = |name: &str| Ok::<_, formats::Error>(self.counts(name, layers)?.into_iter().max());
        let kv_heads = match by_layer {
            // It tells layers with a state, and nothing else.
            _ if matches!(id, "kimi-linear" | "bailingmoe3" | "glm5-next") => Some(heads),
            // Layers with a window have twice as many.
            _ if id == "mimo2" => self.counts("attention.head_count_kv", layers)?.into_iter().min(),
            _ if self.architecture.per_layer => self.counts("attention.head_count_kv", layers)?.first().copied(),
            true => largest("attention.head_count_kv")?,
            false => self.count("attention.head_count_kv")?,
        };
        let kv_heads = kv_heads.unwrap_or(heads).max(1);
        let latent = self.count("attention.kv_lora_rank")?.is_some() && self.architecture.latent;
        let context = self.required("context_length")?;
        required::check(self)?;
        let head_dim = match latent {
            true => self.required("attention.key_length_mla")?,
            false => self.count("attention.key_length")?.unwrap_or(hidden / heads),
        };
        if !latent
            && id != "mimo2"
            && let Some(value) = self.count("attention.value_length")?.filter(|value| *value != head_dim)
        {
            return Err(self.unsupported(format!("keys of {head_dim} values and values of {value} cannot be read")));
        }
        let rotated = self.count("rope.dimension_count")?.unwrap_or(head_dim);
        let experts = self.count("expert_count")?.filter(|n| *n > 0);
        let inner = match by_layer {
            _ if self.architecture.per_layer => self.counts("feed_forward_length", layers)?[0],
            true => largest("feed_forward_length")?.filter(|inner| *inner > 0).unwrap_or(1),
            // All layers are mixtures.
            false if id == "deepseek4" => self.required("expert_feed_forward_length")?,
            false => self.required("feed_forward_length")?,
        };
        // Of all but the layer that predicts further tokens, where it is there.
        let rms = match id {
            "nemotron_h" | "nemotron_h_moe" => self.float(required::RMS)?,
            _ => None,
        };
        let eps = rms.or(self.float(required::epsilon(self))?);
        let eps = eps.ok_or_else(|| formats::Error::missing(self.key(required::epsilon(self))))?;
        let theta = self.float("rope.freq_base")?.unwrap_or(10000.0);
        // There a stretched context is a larger base.
        let alpha = match id {
            "hunyuan-dense" => self.float("rope.scaling.alpha")?.filter(|alpha| *alpha > 0.0),
            _ => None,
        };
        let power = head_dim as f64 / (head_dim as f64 - 2.0);
        let theta = alpha.map_or(theta, |alpha| theta * alpha.powf(power));
        Ok(Hyperparameters {
            hidden,
            layers,
            heads,
            kv_heads,
            latent,
            context,
            head_dim,
            rotated,
            experts,
            inner,
            eps,
            theta,
        })
    }

    /// Tokens that layers with a window attend to, where there are such layers.
    pub(super) fn window(&self) -> Result<Option<usize>> {
        Ok(self.count("attention.sliding_window")?.filter(|window| *window > 0))
    }

    /// Whether one of these modules has a bias in any layer.
    fn biased(&self, modules: &[&str]) -> bool {
        self.tensors
            .keys()
            .filter_map(|name| name.strip_prefix("blk.")?.strip_suffix(".bias")?.split_once('.'))
            .any(|(_, module)| modules.contains(&module))
    }

    /// The norms' epsilon, under the key that this type has for it. Fails where it has none and another than the usual epsilon.
    fn epsilon(&self, model_type: &str, eps: f64) -> Result<Value> {
        let norm = match model_type {
            "phi" | "gpt_neox" | "stablelm" | "cohere" | "cohere2" => Some("layer_norm_eps"),
            "starcoder2" => Some("norm_epsilon"),
            "nemotron" => Some("norm_eps"),
            "nemotron_h" => Some("layer_norm_epsilon"),
            "lfm2" | "lfm2_moe" => Some("norm_eps"),
            "olmo" => None,
            "cohere2_moe" if required::epsilon(self) != required::RMS => Some("layer_norm_eps"),
            _ => Some("rms_norm_eps"),
        };
        match norm {
            Some(key) => Ok(Value::Object(Map::from_iter([(key.to_owned(), eps.into())]))),
            None if eps as f32 != 1e-5 => {
                Err(self.unsupported(format!("norms without weights have an epsilon of 1e-5, not {eps}")))
            }
            None => Ok(json!({})),
        }
    }

    /// Which share of a head's values is rotated. Fails for a type that rotates whole heads, where the file does not.
    fn rotary_share(&self, model_type: &str, model: &Hyperparameters) -> Result<Value> {
        let Hyperparameters { rotated, head_dim, latent, .. } = *model;
        if model_type == "nemotron_h" {
            return Ok(json!({}));
        }
        if model_type == "bamba" {
            // Its class puts one of its own in the place of what stands outside.
            let share = rotated as f64 / head_dim as f64;
            return Ok(json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": share}}));
        }
        if rotated != head_dim && !latent {
            // Multiplied by the width of a head it is truncated.
            let share = rotated as f64 / head_dim as f64;
            let share = if (head_dim as f64 * share) as usize == rotated { share } else { share + 1e-9 };
            Ok(match model_type {
                "gpt_neox" => json!({"rotary_pct": share}),
                // Each of its rotations has it.
                "deepseek_v4" => json!({}),
                // Each kind of layers has it.
                "mimo_v2_flash" => json!({}),
                "minimax_m2" => json!({"rotary_dim": rotated}),
                "phi" | "phi3" | "stablelm" | "nemotron" | "glm" | "glm4" | "glm4_moe" | "glm4v_text"
                | "glm4v_moe_text" | "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text" | "qwen4_exp_text"
                | "minimax_m3_vl_text" => {
                    json!({"partial_rotary_factor": share})
                }
                _ => {
                    return Err(
                        self.unsupported(format!("rotating {rotated} of {head_dim} values of a head cannot be read"))
                    );
                }
            })
        } else if matches!(
            model_type,
            "phi"
                | "stablelm"
                | "nemotron"
                | "glm"
                | "glm4"
                | "glm4_moe"
                | "glm4v_text"
                | "glm4v_moe_text"
                | "qwen3_next"
                | "qwen3_5_text"
                | "qwen3_5_moe_text"
                | "qwen4_exp_text"
                | "minimax_m3_vl_text"
        ) {
            Ok(json!({"partial_rotary_factor": 1.0}))
        } else if model_type == "gpt_neox" {
            Ok(json!({"rotary_pct": 1.0}))
        } else if model_type == "minimax_m2" {
            Ok(json!({"rotary_dim": rotated}))
        } else {
            Ok(json!({}))
        }
    }

    /// Base and scaling of rotary frequencies. Fails for scaled positions of several kinds.
    fn positions(&self, model_type: &str, theta: f64, scaling: Option<&Value>) -> Result<Value> {
        let with_base = || {
            let mut parameters = scaling.cloned().unwrap_or(json!({"rope_type": "default"}));
            parameters["rope_theta"] = theta.into();
            parameters
        };
        match model_type {
            "gemma4_text" | "deepseek_v4" => return Ok(json!({})),
            // Outside of that its class takes its own.
            "apertus" => return Ok(json!({"rope_parameters": with_base()})),
            "ministral3" | "mistral4" => {
                let mut all = with_base();
                if model_type == "mistral4" {
                    // Of all of a head.
                    let (rotated, dim) =
                        (self.required("rope.dimension_count")?, self.required("attention.key_length_mla")?);
                    all["partial_rotary_factor"] = (rotated as f64 / dim as f64 + 1e-9).into();
                }
                if let Some(scale) = self.float("attention.temperature_scale")?.filter(|scale| *scale != 0.0) {
                    let length = self.count("attention.temperature_length")?.filter(|_| model_type == "mistral4");
                    let original = all.get("original_max_position_embeddings").and_then(Value::as_i64);
                    if let Some(length) = length.filter(|length| original != Some(*length as i64)) {
                        return Err(self.unsupported(format!(
                            "`{}` is {length}, and config.json has no other word for it than for the context before positions are stretched",
                            self.key("attention.temperature_length")
                        )));
                    }
                    all["llama_4_scaling_beta"] = scale.into();
                }
                return Ok(json!({"rope_parameters": all}));
            }
            "step3p5" => return self.step_positions(with_base()),
            // Layers with a window have frequencies of their own, of as many values.
            "mimo_v2_flash" => {
                let dim = self.required("attention.key_length")?;
                let rotated = self.count("rope.dimension_count")?.unwrap_or(dim);
                let share = rotated as f64 / dim as f64 + 1e-9;
                let mut wide = with_base();
                let near = self.float("rope.freq_base_swa")?.unwrap_or(theta);
                let mut near = json!({"rope_type": "default", "rope_theta": near});
                for all in [&mut wide, &mut near] {
                    all["partial_rotary_factor"] = share.into();
                }
                return Ok(json!({"rope_parameters": {"full_attention": wide, "sliding_attention": near}}));
            }
            // In a text the positions of all kinds are the same.
            "qwen3_5_text" | "qwen3_5_moe_text" | "qwen4_exp_text" | "qwen3_vl_text" | "qwen3_vl_moe_text"
            | "glm4v_text" | "glm4v_moe_text" => {
                let mut all = with_base();
                if let Some(MetadataValue::Array(list)) = self.look("rope.dimension_sections") {
                    all["mrope_section"] = list.iter().filter_map(integer).take(3).collect::<Vec<usize>>().into();
                    if model_type.starts_with("qwen") {
                        all["mrope_interleaved"] = true.into();
                    }
                }
                return Ok(json!({"rope_parameters": all}));
            }
            // Layers with a window have frequencies of their own.
            "gemma3_text" | "gemma3n_text" | "olmo3" => {
                let near = match model_type {
                    "olmo3" => theta,
                    _ => self.float("rope.freq_base_swa")?.unwrap_or(10000.0),
                };
                return Ok(json!({"rope_parameters": {
                    "full_attention": with_base(),
                    "sliding_attention": {"rope_type": "default", "rope_theta": near},
                }}));
            }
            _ => {}
        }
        let mut values = match model_type {
            "gpt_neox" => json!({"rotary_emb_base": theta}),
            _ => json!({"rope_theta": theta}),
        };
        match (scaling, model_type) {
            (_, "qwen2_vl") => {
                // In a text the positions of all kinds are the same.
                let name = "rope.dimension_sections";
                let sections: Vec<usize> = match self.look(name) {
                    Some(MetadataValue::Array(list)) => list.iter().filter_map(integer).take(3).collect(),
                    _ => return Err(formats::Error::missing(format!("metadata key `{}`", self.key(name)))),
                };
                if scaling.is_some() {
                    return Err(self.unsupported("scaled positions of several kinds cannot be read"));
                }
                values["rope_scaling"] = json!({"type": "mrope", "mrope_section": sections});
            }
            (Some(scaling), _) => {
                // This family's configurations have it outside, where it counts.
                if let (Some(original), "phi3") = (scaling.get("original_max_position_embeddings"), model_type) {
                    values["original_max_position_embeddings"] = original.clone();
                }
                values["rope_scaling"] = scaling.clone();
            }
            // Where nothing is said of scaling this family's usual one is meant.
            (None, "gpt_oss") => values["rope_scaling"] = json!({"rope_type": "default"}),
            (None, _) => {}
        }
        Ok(values)
    }

    /// Which linears have biases.
    fn biases(&self, model_type: &str) -> Value {
        let of_output = if self.architecture.o_bias == Need::May { "attn_output" } else { "attn_qkv" };
        let biases = self.biased(&["attn_q", "attn_k", "attn_v", "attn_qkv", of_output]);
        match model_type {
            "bamba" | "falcon_h1" => {
                json!({"attention_bias": biases, "mlp_bias": self.biased(&["ffn_up", "ffn_gate", "ffn_down"])})
            }
            "granitemoehybrid" => json!({"attention_bias": biases}),
            "nemotron_h" => json!({"mlp_bias": self.biased(&["ffn_up", "ffn_down"])}),
            "llama" | "mixtral" | "granite" | "granitemoe" | "smollm3" | "nemotron" => {
                json!({"attention_bias": biases, "mlp_bias": self.biased(&["ffn_up", "ffn_gate", "ffn_down"])})
            }
            "qwen3" | "qwen3_moe" | "gemma" | "gemma2" | "gemma3_text" | "olmo" | "olmo2" | "olmo3" | "cohere"
            | "cohere2" | "glm" | "glm4" | "olmoe" | "gpt_oss" | "llama4_text" | "gpt_neox" | "seed_oss" | "arcee"
            | "hunyuan_v1_dense" | "hunyuan_v1_moe" | "dots1" | "cohere2_moe" | "mistral4" | "glm4_moe"
            | "glm4v_text" | "glm4v_moe_text" | "hy_v3" | "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text"
            | "qwen4_exp_text" | "qwen3_vl_text" | "qwen3_vl_moe_text" => {
                json!({"attention_bias": biases})
            }
            "starcoder2" => json!({"use_bias": true}),
            "ernie4_5_moe" => json!({"use_bias": biases}),
            "apertus" => json!({"attention_bias": biases}),
            "stablelm" => {
                // The norm decides.
                self.look("use_parallel_residual");
                json!({
                    "use_qkv_bias": biases,
                    "use_parallel_residual": !self.has("blk.0.ffn_norm.weight"),
                    "qk_layernorm": self.has("blk.0.attn_q_norm.weight"),
                })
            }
            "qwen2_moe" => json!({"qkv_bias": biases}),
            _ => json!({}),
        }
    }

    /// Granite's factors: of attention's scores, the embedding, what blocks add and the logits.
    fn multipliers(&self, head_dim: usize) -> Result<Value> {
        let factor = |name: &str| Ok::<f64, formats::Error>(self.float(name)?.filter(|x| *x != 0.0).unwrap_or(1.0));
        let scale = self.float("attention.scale")?.filter(|x| *x != 0.0);
        Ok(json!({
            "attention_multiplier": scale.unwrap_or((head_dim as f64).powf(-0.5)),
            "embedding_multiplier": factor("embedding_scale")?,
            "residual_multiplier": factor("residual_scale")?,
            "logits_scaling": factor("logit_scale")?,
        }))
    }

    /// Keys that only a model of this type has, but for a mixture's.
    fn of_type(&self, model_type: &str, activation: &str, model: &Hyperparameters) -> Result<Value> {
        let Hyperparameters { hidden, layers, heads, head_dim, .. } = *model;
        let window = self.window()?;
        let heads_27b = matches!((model_type, layers), ("gemma2", 46) | ("gemma3_text", 62));
        Ok(match model_type {
            "gemma2" | "gemma3_text" => {
                let third = model_type == "gemma3_text";
                let scalar = if heads_27b { hidden / heads } else { head_dim };
                let cap = |name: &str| self.float(name);
                let local = match (third, window) {
                    (true, None) => vec![false; layers],
                    _ => self.local(layers, if third { 6 } else { 2 })?,
                };
                let mut values = json!({
                    "query_pre_attn_scalar": scalar,
                    "sliding_window": window.unwrap_or(4096),
                    "layer_types": layer_types(&local),
                    "attn_logit_softcapping": if third { None } else { Some(cap("attn_logit_softcapping")?.unwrap_or(50.0)) },
                    "final_logit_softcapping": match (cap("final_logit_softcapping")?, third) {
                        (found, true) => found.filter(|cap| *cap != 0.0),
                        (found, false) => Some(found.unwrap_or(30.0)),
                    },
                    "hidden_activation": activation,
                });
                // llama.cpp takes every file of that architecture for a model whose tokens see both ways.
                if self.architecture.id == "gemma-embedding" {
                    values["use_bidirectional_attention"] = true.into();
                }
                values
            }
            "gemma" => json!({"hidden_activation": activation}),
            "step3p5" => self.step(model)?,
            "gemma3n_text" => self.gemma3n(activation, layers)?,
            "gemma4_text" => self.gemma4(activation, layers, model.experts)?,
            "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text" | "qwen4_exp_text" => {
                let value_heads = self.required("ssm.time_step_rank")?;
                let kinds = self.recurrent(layers)?.into_iter();
                let kinds: Vec<&str> =
                    kinds.map(|recurrent| if recurrent { "linear_attention" } else { "full_attention" }).collect();
                json!({
                    "linear_conv_kernel_dim": self.required("ssm.conv_kernel")?,
                    "linear_key_head_dim": self.required("ssm.state_size")?,
                    "linear_value_head_dim": self.required("ssm.inner_size")? / value_heads,
                    "linear_num_key_heads": self.required("ssm.group_count")?,
                    "linear_num_value_heads": value_heads,
                    "layer_types": kinds,
                })
            }
            "qwen3_vl_text" | "qwen3_vl_moe_text" => {
                json!({"n_deepstack_layers": self.count("n_deepstack_layers")?.unwrap_or(0)})
            }
            "bamba" | "granitemoehybrid" | "falcon_h1" | "nemotron_h" => self.state_space(model_type, model)?,
            "afmoe" => self.arcee(model)?,
            "lfm2" | "lfm2_moe" => self.short_convolutions(model_type, model)?,
            "mimo_v2_flash" => json!({
                "v_head_dim": self.required("attention.value_length")?,
                "sliding_window": window,
                "layer_types": layer_types(&self.local(layers, 6)?),
                "attention_value_scale": self.float("attention.value_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                "attention_bias": self.biased(&["attn_q", "attn_k", "attn_v"]),
            }),
            "olmo" => json!({"clip_qkv": self.float("attention.clamp_kqv")?.filter(|clip| *clip > 0.0)}),
            "olmo3" => json!({"sliding_window": window, "layer_types": layer_types(&self.local(layers, 4)?)}),
            "gpt_neox" => json!({"use_parallel_residual": self.flag("use_parallel_residual")?.unwrap_or(true)}),
            "cohere" => json!({
                "logit_scale": self.float("logit_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                "use_qk_norm": layers >= 64,
            }),
            "cohere2" | "cohere2_moe" => json!({
                "logit_scale": self.float("logit_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                "sliding_window": window,
                "layer_types": layer_types(&self.local(layers, 4)?),
            }),
            "smollm3" => json!({"no_rope_layer_interval": 4, "use_sliding_window": false}),
            // Windows, and with them layers without positions, are used in the largest model only.
            "exaone4" => {
                let window = (layers == 64).then(|| window.unwrap_or(4096));
                let local = if window.is_some() { self.local(layers, 4)? } else { vec![false; layers] };
                json!({"sliding_window": window, "layer_types": layer_types(&local)})
            }
            // llama.cpp does not read which layers have the window: the last of every four has none.
            "exaone_moe" => {
                let local: Vec<bool> = (0..layers).map(|layer| layer % 4 != 3).collect();
                let all = self.local(layers + self.further()?, 4).unwrap_or_default();
                let further = layer_types(all.get(layers..).unwrap_or_default());
                json!({"sliding_window": window, "layer_types": layer_types(&local), "mtp_layer_types": further})
            }
            _ => json!({}),
        })
    }
}
