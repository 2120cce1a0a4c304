//! config.json of DeepSeek V4.

use serde_json::{Value, json};

use super::Hyperparameters;
use crate::dialect::names::joint::BLOCKS;
use crate::dialect::settings::{Result, Settings};

impl Settings {
    /// What only a DeepSeek V4 says.
    ///
    /// Fails for what llama.cpp has no model for either.
    pub(super) fn deepseek_4(&self, model: &Hyperparameters) -> Result<Value> {
        let Hyperparameters { layers, experts, head_dim, rotated, inner, theta, .. } = *model;
        if self.count("expert_gating_func")? != Some(4) || self.flag("expert_weights_norm")? == Some(false) {
            return Err(self.unsupported(format!(
                "experts can be weighed by roots of softplus (`{}` 4) that are divided by their sum",
                self.key("expert_gating_func")
            )));
        }
        // It is the width of an expert, where it is said.
        self.look("feed_forward_length");
        let limit = self.float_of_layers("swiglu_clamp_exp")?.unwrap_or(0.0);
        if self.float_of_layers("swiglu_clamp_shexp")?.is_some_and(|other| other != limit) {
            return Err(self.unsupported(format!("`{}` differs from that of experts", self.key("swiglu_clamp_shexp"))));
        }
        let kinds = self.counts("attention.compress_ratios", layers)?.into_iter().map(|block| match block {
            0 => Ok("sliding_attention"),
            block if block == BLOCKS[0] => Ok("compressed_sparse_attention"),
            block if block == BLOCKS[1] => Ok("heavily_compressed_attention"),
            other => Err(self.unsupported(format!("`{}` has {other}", self.key("attention.compress_ratios")))),
        });
        let kinds: Vec<&str> = kinds.collect::<Result<_>>()?;
        let hashed = self.count("hash_layer_count")?.unwrap_or(0);
        let experts_of = |layer: usize| if layer < hashed { "hash_moe" } else { "moe" };
        let warm = self.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
        let base = self.float("attention.compress_rope_freq_base")?.unwrap_or(1.6e5);
        let mut compress = self.scaling_by_type(base, warm, false)?.unwrap_or(json!({"rope_type": "default"}));
        if compress["rope_type"] == "yarn" {
            // Nothing is multiplied by what YaRN would warm attention by.
            compress["attention_factor"] = 1.0.into();
        }
        let share = rotated as f64 / head_dim as f64;
        let share = if (head_dim as f64 * share) as usize == rotated { share } else { share + 1e-9 };
        let mut main = json!({"rope_type": "default", "rope_theta": theta});
        compress["rope_theta"] = base.into();
        for rope in [&mut main, &mut compress] {
            rope["partial_rotary_factor"] = share.into();
        }
        Ok(json!({
            "num_key_value_heads": 1,
            "q_lora_rank": self.required("attention.q_lora_rank")?,
            "moe_intermediate_size": inner,
            "n_routed_experts": experts,
            "num_experts_per_tok": self.required("expert_used_count")?,
            "n_shared_experts": self.required("expert_shared_count")?,
            "norm_topk_prob": true,
            "scoring_func": "sqrtsoftplus",
            "routed_scaling_factor": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
            "swiglu_limit": limit,
            "sliding_window": self.window()?,
            "layer_types": kinds,
            "compress_rates": {"compressed_sparse_attention": BLOCKS[0], "heavily_compressed_attention": BLOCKS[1]},
            "mlp_layer_types": (0..layers).map(experts_of).collect::<Vec<_>>(),
            "o_groups": self.required("attention.output_group_count")?,
            "o_lora_rank": self.required("attention.output_lora_rank")?,
            "index_n_heads": self.required("attention.indexer.head_count")?,
            "index_head_dim": self.required("attention.indexer.key_length")?,
            "index_topk": self.required("attention.indexer.top_k")?,
            "hc_mult": self.required("hyper_connection.count")?,
            "hc_eps": self.float("hyper_connection.epsilon")?,
            "hc_sinkhorn_iters": self.required("hyper_connection.sinkhorn_iterations")?,
            "rope_parameters": {"main": main, "compress": compress},
            "num_nextn_predict_layers": 0,
        }))
    }
}
