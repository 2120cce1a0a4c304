//! config.json of models with experts, and of latent attention, which such models brought.

use formats::container::gguf::MetadataValue;
use serde_json::{Map, Value, json};

use super::{Hyperparameters, Result, Settings, integer, layer_types};

impl Settings {
    /// Keys of the types that have experts, DeepSeek's latent attention among them.
    pub(super) fn mixture(&self, model_type: &str, model: &Hyperparameters) -> Result<Value> {
        let Hyperparameters { layers, experts, inner, .. } = *model;
        let window = self.window()?;
        let used = || self.required("expert_used_count");
        let expert_inner = || self.expert_inner(model);
        Ok(match model_type {
            "glm4_moe" | "glm4v_moe_text" | "dots1" => json!({
                "moe_intermediate_size": expert_inner()?,
                "n_routed_experts": experts,
                "n_shared_experts": self.count("expert_shared_count")?.filter(|count| *count > 0),
                "num_experts_per_tok": used()?,
                "first_k_dense_replace": self.count("leading_dense_block_count")?.unwrap_or(0),
                "norm_topk_prob": self.flag("expert_weights_norm")?.unwrap_or(false),
                "routed_scaling_factor": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                "use_qk_norm": self.has("blk.0.attn_q_norm.weight"),
            }),
            "qwen3_next" | "qwen3_5_moe_text" | "qwen4_exp_text" => {
                let mut values = json!({
                    "num_experts": experts,
                    "num_experts_per_tok": used()?,
                    "moe_intermediate_size": match self.count("expert_feed_forward_length")?.filter(|n| *n > 0) {
                        Some(width) => width,
                        None => inner / used()?,
                    },
                    "shared_expert_intermediate_size":
                        self.count("expert_shared_feed_forward_length")?.filter(|n| *n > 0).unwrap_or(inner),
                });
                if model_type == "qwen3_next" {
                    let always = json!({"norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": []});
                    values.as_object_mut().expect("an object").extend(always.as_object().cloned().unwrap_or_default());
                }
                if model_type == "qwen4_exp_text" {
                    values.as_object_mut().expect("an object").extend(self.qwen4(model)?);
                }
                values
            }
            "minimax_m3_vl_text" => self.third_minimax(model, used()?)?,
            "exaone_moe" => {
                // It is the width of one times their count.
                self.look("expert_shared_feed_forward_length");
                json!({
                    "moe_intermediate_size": expert_inner()?,
                    "num_experts": experts,
                    "num_shared_experts": self.count("expert_shared_count")?.unwrap_or(0),
                    "num_experts_per_tok": used()?,
                    "first_k_dense_replace": self.count("leading_dense_block_count")?.unwrap_or(0),
                    "norm_topk_prob": self.flag("expert_weights_norm")?.unwrap_or(false),
                    "routed_scaling_factor": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                })
            }
            "hunyuan_v1_moe" => self.first_hunyuan(model, used()?)?,
            "minimax_m2" => {
                // llama.cpp's loader goes by the other width.
                self.look("expert_feed_forward_length");
                json!({"num_local_experts": experts, "num_experts_per_tok": used()?})
            }
            "ernie4_5_moe" => self.ernie(model, used()?)?,
            "cohere2_moe" => self.command(model, used()?)?,
            "hy_v3" => self.hunyuan(model, used()?)?,
            "mixtral" | "granitemoe" => json!({"num_local_experts": experts, "num_experts_per_tok": used()?}),
            "olmoe" => json!({"num_experts": experts, "num_experts_per_tok": used()?, "norm_topk_prob": false}),
            "qwen2_moe" | "qwen3_moe" | "qwen3_vl_moe_text" => json!({
                "num_experts": experts,
                "num_experts_per_tok": used()?,
                "moe_intermediate_size": match self.count("expert_feed_forward_length")?.filter(|n| *n > 0) {
                    Some(width) => width,
                    None => inner / used()?,
                },
                "norm_topk_prob": model_type != "qwen2_moe",
                "shared_expert_intermediate_size": match model_type {
                    "qwen2_moe" => Some(self.count("expert_shared_feed_forward_length")?.unwrap_or(inner)),
                    _ => None,
                },
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }),
            "gpt_oss" => json!({
                "num_local_experts": experts,
                "num_experts_per_tok": used()?,
                "intermediate_size": expert_inner()?,
                "sliding_window": window,
                "layer_types": layer_types(&self.local(layers, 2)?),
            }),
            "llama4_text" => self.llama4(model, used()?)?,
            "deepseek_v2" | "deepseek_v3" => self.deepseek(model)?,
            "mistral4" => {
                let Value::Object(mut values) = self.deepseek(model)? else { unreachable!("an object") };
                values.retain(|key, _| !matches!(key.as_str(), "moe_layer_freq" | "topk_method" | "scoring_func"));
                values.into()
            }
            "kimi_linear" => self.kimi_linear(model)?,
            "bailing_hybrid" => self.ling(model)?,
            "mimo_v2_flash" => self.mimo(model, used()?)?,
            "deepseek_v32" | "glm_moe_dsa" => self.indexed(model)?,
            "hy_v4" => self.hunyuan_4(model)?,
            "glm5_next_text" => self.glm5_next(model)?,
            "deepseek_v4" => self.deepseek_4(model)?,
            _ => json!({}),
        })
    }

    /// Experts and indexers of MiniMax M3, which all layers have but the first ones. llama.cpp has the numbers of its activation built in.
    fn third_minimax(&self, model: &Hyperparameters, used: usize) -> Result<Value> {
        let dense = self.count("leading_dense_block_count")?.unwrap_or(0);
        if self.flag("expert_weights_norm")? != Some(true) {
            return Err(self.unsupported(
                "weights of experts that are not divided by their sum cannot be said of a minimax-m3 model",
            ));
        }
        let inner = self.required("expert_feed_forward_length")?;
        let behind: Vec<u8> = (0..model.layers).map(|layer| u8::from(layer >= dense)).collect();
        Ok(json!({
            "intermediate_size": inner,
            "dense_intermediate_size": model.inner,
            "shared_intermediate_size": self.required("expert_shared_count")? * inner,
            "num_local_experts": model.experts,
            "num_experts_per_tok": used,
            "routed_scaling_factor": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "num_mtp_modules": 0,
            "moe_layer_freq": behind,
            "sparse_attention_config": {
                "sparse_attention_freq": behind,
                "sparse_num_index_heads": self.required("attention.indexer.head_count")?,
                "sparse_index_dim": self.required("attention.indexer.key_length")?,
                "sparse_topk_blocks": self.required("attention.indexer.top_k")?,
                "sparse_block_size": self.required("attention.indexer.block_size")?,
                "sparse_local_block": self.count("attention.indexer.local_blocks")?.unwrap_or(0),
            },
        }))
    }

    /// Experts of Llama 4, in every so many layers, and its chunks of text.
    fn llama4(&self, model: &Hyperparameters, used: usize) -> Result<Value> {
        let Hyperparameters { layers, experts, inner, .. } = *model;
        let unlimited = self.count("attention.sliding_window")? == Some(0);
        let local = if unlimited { vec![true; layers] } else { self.local(layers, 4)? };
        Ok(json!({
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "intermediate_size": self.expert_inner(model)?,
            "intermediate_size_mlp": inner,
            "interleave_moe_layer_step": self.required("interleave_moe_layer_step")?,
            "attention_chunk_size": if unlimited { None } else { Some(8192) },
            "no_rope_layers": local.iter().map(|local| u8::from(*local)).collect::<Vec<_>>(),
            "use_qk_norm": experts != Some(128),
            "attn_temperature_tuning": !unlimited,
            "floor_scale": 8192,
            "attn_scale": 0.1,
        }))
    }

    /// Experts of Hunyuan A13B, which have the width of all else.
    fn first_hunyuan(&self, model: &Hyperparameters, used: usize) -> Result<Value> {
        let Hyperparameters { experts, inner, .. } = *model;
        let widths = [Some(self.expert_inner(model)?), self.count("expert_shared_feed_forward_length")?];
        if let Some(other) = widths.into_iter().flatten().find(|width| ![0, inner].contains(width)) {
            return Err(self.unsupported(format!(
                "experts of width {inner} beside those of {other} cannot be said of a hunyuan-moe model"
            )));
        }
        Ok(json!({"num_experts": experts, "moe_topk": used}))
    }

    /// Experts of ERNIE 4.5.
    fn ernie(&self, model: &Hyperparameters, used: usize) -> Result<Value> {
        let shared = self.count("expert_shared_feed_forward_length")?.unwrap_or(0);
        Ok(json!({
            "moe_intermediate_size": self.expert_inner(model)?,
            "moe_num_experts": model.experts,
            "moe_k": used,
            "moe_num_shared_experts": shared / self.expert_inner(model)?,
            "moe_layer_start_index": self.count("leading_dense_block_count")?.unwrap_or(0),
            "moe_layer_interval": self.required("interleave_moe_layer_step")?,
            "moe_layer_end_index": -1,
        }))
    }

    /// Width of an expert; of all else where the file does not say.
    fn expert_inner(&self, model: &Hyperparameters) -> Result<usize> {
        Ok(self.count("expert_feed_forward_length")?.filter(|width| *width > 0).unwrap_or(model.inner))
    }

    /// Experts of Hunyuan 3, in the layers that have a router. Fails for routing that transformers has no model for.
    fn hunyuan(&self, model: &Hyperparameters, used: usize) -> Result<Value> {
        let Hyperparameters { layers, experts, .. } = *model;
        if self.flag("expert_weights_norm")? != Some(true) {
            return Err(self
                .unsupported("weights of experts that are not divided by their sum cannot be said of a hy_v3 model"));
        }
        let inner = self.required("expert_feed_forward_length")?;
        let shared = self.count("expert_shared_feed_forward_length")?.filter(|width| *width > 0).unwrap_or(inner);
        // Either is known from the tensors to llama.cpp.
        self.look("leading_dense_block_count");
        self.look("expert_shared_count");
        let kind = |layer| if self.has(&format!("blk.{layer}.ffn_gate_inp.weight")) { "sparse" } else { "dense" };
        Ok(json!({
            "moe_intermediate_size": inner,
            "num_experts": experts,
            "num_experts_per_tok": used,
            "num_shared_experts": shared / inner.max(1),
            "router_scaling_factor": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
            "mlp_layer_types": (0..layers).map(kind).collect::<Vec<_>>(),
        }))
    }

    /// Experts of Command A+, in all layers but the first ones, whose rotations llama.cpp takes for those of all layers without experts. The sum with the
    /// shared experts is halved.
    fn command(&self, model: &Hyperparameters, used: usize) -> Result<Value> {
        let inner = self.required("expert_feed_forward_length")?;
        let shared = self.count("expert_shared_count")?.unwrap_or(0);
        let width = self.count("expert_shared_feed_forward_length")?.filter(|width| *width > 0);
        if width.is_some_and(|width| width != shared * inner) {
            return Err(self.unsupported(format!(
                "{shared} shared experts of {inner} values each that have another width in all"
            )));
        }
        let (sigmoid, normed) = (self.sigmoid(true)?, self.flag("expert_weights_norm")?.unwrap_or(false));
        if !sigmoid && !normed {
            return Err(self.unsupported(
                "weights of experts chosen by softmax that are not divided by their sum cannot be said of a cohere2moe model",
            ));
        }
        if let Some(scale) = self.float("expert_weights_scale")?.filter(|scale| ![0.0, 1.0].contains(scale)) {
            return Err(self.unsupported(format!(
                "`{}` is {scale}, and config.json has no word for it in a cohere2moe model",
                self.key("expert_weights_scale")
            )));
        }
        let dense = self.count("leading_dense_block_count")?.unwrap_or(0);
        let kind = |layer| if layer < dense { "dense" } else { "sparse" };
        Ok(json!({
            "intermediate_size": inner,
            "prefix_dense_intermediate_size": model.inner,
            "prefix_dense_sliding_window_pattern": 1,
            "num_experts": model.experts,
            "num_experts_per_tok": used,
            "num_shared_experts": shared,
            "shared_expert_combination_strategy": "average",
            "expert_selection_fn": if sigmoid { "sigmoid" } else { "softmax" },
            "norm_topk_prob": normed,
            "mlp_layer_types": (0..model.layers).map(kind).collect::<Vec<_>>(),
        }))
    }

    /// Experts of MiMo V2, in the layers that have a router. llama.cpp always divides their weights by the sum, and scales nothing.
    fn mimo(&self, model: &Hyperparameters, used: usize) -> Result<Value> {
        let kind = |layer| if self.has(&format!("blk.{layer}.ffn_gate_inp.weight")) { "sparse" } else { "dense" };
        Ok(json!({
            "n_routed_experts": model.experts,
            "num_experts_per_tok": used,
            "moe_intermediate_size": self.required("expert_feed_forward_length")?,
            "mlp_layer_types": (0..model.layers).map(kind).collect::<Vec<_>>(),
            "norm_topk_prob": true,
            "routed_scaling_factor": 1.0,
        }))
    }

    /// DeepSeek V3.2's and GLM-5's sizes, their indexers' among them.
    pub(super) fn indexed(&self, model: &Hyperparameters) -> Result<Value> {
        let Value::Object(mut values) = self.deepseek(model)? else { unreachable!("an object") };
        values.remove("rope_interleave");
        values.extend(self.indexers(model.layers)?);
        Ok(values.into())
    }

    /// Ling's sizes of layers with a state, and which layers these are: those without keys.
    fn ling(&self, model: &Hyperparameters) -> Result<Value> {
        if self.flag("kda.safe_gate")? == Some(false) {
            return Err(self.unsupported("decays without a bound, which llama.cpp refuses, cannot be read"));
        }
        let counts = self.counts("attention.head_count_kv", model.layers)?;
        let kinds: Vec<&str> =
            counts.iter().map(|count| if *count == 0 { "linear_attention" } else { "full_attention" }).collect();
        let Value::Object(mut values) = self.deepseek(model)? else { unreachable!("an object") };
        for own in
            ["rope_interleave", "n_routed_experts", "q_lora_rank", "topk_method", "scoring_func", "moe_layer_freq"]
        {
            values.remove(own);
        }
        let sizes = json!({
            "num_experts": model.experts,
            "head_dim": self.required("kda.head_dim")?,
            "short_conv_kernel_size": self.required("ssm.conv_kernel")?,
            "layer_types": kinds,
            "kda_safe_gate": true,
            "kda_lower_bound": self.float("kda.gate_lower_bound")?,
            "num_nextn_predict_layers": 0,
        });
        values.extend(sizes.as_object().cloned().unwrap_or_default());
        Ok(values.into())
    }

    /// Kimi Linear's sizes of layers with a state, and which layers these are: those without keys.
    fn kimi_linear(&self, model: &Hyperparameters) -> Result<Value> {
        let name = "attention.head_count_kv";
        let counts = match self.look(name) {
            Some(MetadataValue::Array(list)) => list.iter().map(integer).collect::<Option<Vec<usize>>>(),
            _ => None,
        };
        let counts = counts.filter(|counts| counts.len() >= model.layers).ok_or_else(|| {
            formats::Error::malformed(format!("metadata key `{}` has no count for each layer", self.key(name)))
        })?;
        let of = |state: bool| -> Vec<usize> {
            (0..model.layers).filter(|layer| (counts[*layer] == 0) == state).map(|layer| layer + 1).collect()
        };
        let Value::Object(mut values) = self.deepseek(model)? else { unreachable!("an object") };
        for own in ["rope_interleave", "n_routed_experts", "norm_topk_prob", "topk_method", "scoring_func"] {
            values.remove(own);
        }
        values.insert("num_experts".to_owned(), json!(model.experts));
        // llama.cpp always divides by the sum.
        values.insert("moe_renormalize".to_owned(), true.into());
        let sizes = json!({
            "head_dim": self.required("kda.head_dim")?,
            "num_heads": model.heads,
            "short_conv_kernel_size": self.required("ssm.conv_kernel")?,
            "full_attn_layers": of(false),
            "kda_layers": of(true),
        });
        values.insert("linear_attn_config".to_owned(), sizes);
        Ok(values.into())
    }

    /// How much indexers choose, and which layers have one of their own.
    fn indexers(&self, layers: usize) -> Result<Map<String, Value>> {
        let mut found = Map::from_iter([
            ("index_n_heads".to_owned(), self.required("attention.indexer.head_count")?.into()),
            ("index_head_dim".to_owned(), self.required("attention.indexer.key_length")?.into()),
            ("index_topk".to_owned(), self.required("attention.indexer.top_k")?.into()),
        ]);
        if matches!(self.architecture.id, "glm-dsa" | "hy_v4") {
            self.look("attention.indexer.types");
            let kind = |layer| if self.has(&format!("blk.{layer}.indexer.proj.weight")) { "full" } else { "shared" };
            found.insert("indexer_types".to_owned(), (0..layers).map(kind).collect::<Vec<_>>().into());
        }
        Ok(found)
    }

    /// Latent attention and experts of DeepSeek V2 and V3, in groups where the file has them. Fails for routing that transformers has
    /// no model for.
    fn deepseek(&self, model: &Hyperparameters) -> Result<Value> {
        let Hyperparameters { layers, head_dim, rotated, experts, inner, .. } = *model;
        let third = self.sigmoid(matches!(self.architecture.id, "glm-dsa" | "glm5-next"))?;
        let fourth = self.architecture.id == "mistral4";
        if third == fourth && self.architecture.id != "deepseek2" {
            let id = self.architecture.id;
            let how = if fourth { "sigmoids" } else { "softmax" };
            return Err(self.unsupported(format!("a {id} model that routes by {how} cannot be said in config.json")));
        }
        let nope = head_dim.checked_sub(rotated).filter(|nope| *nope > 0).ok_or_else(|| {
            self.unsupported(format!("rotating {rotated} of {head_dim} values of a head cannot be read"))
        })?;
        let groups = self.count("expert_group_count")?.filter(|count| *count > 1);
        if groups.is_some() && !third && !fourth {
            return Err(self.unsupported(format!(
                "`{}` without sigmoids that choose experts: llama.cpp ranks groups by their two best experts then, and no model of \
                 transformers does; if the model is DeepSeek V3 or made from it, set `{}` to 2, else quantize the checkpoint that the file \
                 was made from",
                self.key("expert_group_count"),
                self.key("expert_gating_func")
            )));
        }
        // A mixture's correction may be left out of the file.
        let dense = self.count("leading_dense_block_count")?.unwrap_or(0);
        let corrected = self.has(&format!("blk.{}.exp_probs_b.bias", layers - 1));
        if third && !corrected && experts.is_some() && dense < layers {
            return Err(self.unsupported("sigmoid routing without a correction cannot be read"));
        }
        Ok(json!({
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
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::architectures::Architecture;

    /// What a file with experts of these settings is refused for.
    fn refused(id: &str, own: &[(&str, MetadataValue)]) -> Option<String> {
        let mut keys: Vec<(&str, MetadataValue)> = [
            ("embedding_length", 8),
            ("block_count", 2),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 2),
            ("attention.key_length", 4),
            ("context_length", 16),
            ("feed_forward_length", 8),
            ("expert_count", 4),
            ("expert_used_count", 2),
            ("expert_feed_forward_length", 8),
        ]
        .map(|(key, value)| (key, MetadataValue::U32(value)))
        .to_vec();
        keys.push(("attention.layer_norm_rms_epsilon", MetadataValue::F32(1e-5)));
        keys.extend(own.iter().cloned());
        let settings = Settings {
            architecture: Architecture::named(id).unwrap(),
            keys: keys.into_iter().map(|(key, value)| (format!("{id}.{key}"), value)).collect(),
            tensors: [("token_embd.weight".to_owned(), vec![10, 8])].into(),
            factors: Default::default(),
            asked: Default::default(),
        };
        settings.config().err().map(|error| error.to_string())
    }

    #[test]
    fn what_config_json_cannot_say_of_experts_is_refused() {
        let count = MetadataValue::U32;
        let of = |id: &str, own: &[(&str, MetadataValue)], what: &str| {
            let error = refused(id, own).unwrap();
            assert!(error.contains(what), "{error}");
        };
        assert_eq!(refused("hunyuan-moe", &[]), None);
        of("hunyuan-moe", &[("expert_shared_feed_forward_length", count(12))], "experts of width 8 beside those of 12");
        assert_eq!(refused("minimax-m2", &[]), None);
        of("minimax-m2", &[("expert_gating_func", count(1))], "routes by softmax");
        let command = [
            ("attention.sliding_window", count(4)),
            ("logit_scale", MetadataValue::F32(0.5)),
            ("leading_dense_block_count", count(0)),
            ("expert_gating_func", count(1)),
        ];
        of("cohere2moe", &command, "are not divided by their sum");
        let normed = |more: (&'static str, MetadataValue)| {
            [&command[..], &[("expert_weights_norm", MetadataValue::Bool(true)), more]].concat()
        };
        assert_eq!(refused("cohere2moe", &normed(("expert_shared_count", count(1)))), None);
        let twice = [normed(("expert_shared_count", count(2))), vec![("expert_shared_feed_forward_length", count(8))]];
        of("cohere2moe", &twice.concat(), "2 shared experts of 8 values each");
        of(
            "cohere2moe",
            &normed(("expert_weights_scale", MetadataValue::F32(2.5))),
            "`cohere2moe.expert_weights_scale` is 2.5",
        );
    }
}
