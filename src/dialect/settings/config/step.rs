//! config.json of Step 3.5, whose layers with a window have more heads than the others.

use formats::container::gguf::MetadataValue;
use serde_json::{Value, json};

use super::{Hyperparameters, layer_types};
use crate::dialect::settings::{Result, Settings};

impl Settings {
    /// Heads of layers that see all, and of those with a window.
    ///
    /// Fails where layers of one type differ.
    pub(super) fn step_heads(&self, layers: usize) -> Result<[usize; 2]> {
        let (heads, local) = (self.counts("attention.head_count", layers)?, self.local(layers, 1)?);
        let of =
            |near: bool| heads.iter().zip(&local).filter(move |(_, local)| **local == near).map(|(heads, _)| *heads);
        let first = |near: bool| of(near).next().or_else(|| of(!near).next()).unwrap_or(0);
        let [full, near] = [first(false), first(true)];
        if full == 0 || of(false).any(|heads| heads != full) || of(true).any(|heads| heads != near) {
            return Err(
                self.unsupported("layers of one type with different numbers of heads cannot be said in config.json")
            );
        }
        Ok([full, near])
    }

    /// The rotation of layers that see all, which turns half of a head, and of those with a window.
    pub(super) fn step_positions(&self, mut full: Value) -> Result<Value> {
        if full["rope_type"] == "yarn" {
            return Err(self.unsupported("YaRN, which llama.cpp would use in layers with a window too, cannot be read"));
        }
        full["partial_rotary_factor"] = 0.5.into();
        let near = self.float("rope.freq_base_swa")?.unwrap_or(10_000.0);
        let near = json!({"rope_type": "default", "rope_theta": near, "partial_rotary_factor": 1.0});
        Ok(json!({"rope_parameters": {"full_attention": full, "sliding_attention": near}}))
    }

    /// What only a Step 3.5 says.
    pub(super) fn step(&self, model: &Hyperparameters) -> Result<Value> {
        let Hyperparameters { layers, experts, head_dim, inner, .. } = *model;
        if self.flag("expert_weights_norm")? == Some(false) {
            return Err(
                self.unsupported("weights of experts that are not divided by their sum cannot be said in config.json")
            );
        }
        self.look("leading_dense_block_count");
        let sparse = |layer: usize| self.has(&format!("blk.{layer}.ffn_gate_inp.weight"));
        let all = layers + self.further()?;
        let kinds: Vec<&str> = (0..all).map(|layer| if sparse(layer) { "sparse" } else { "dense" }).collect();
        let kv_heads = self.counts("attention.head_count_kv", layers)?;
        if kv_heads.iter().any(|heads| *heads != kv_heads[0]) {
            return Err(self.unsupported("layers with different numbers of keys cannot be said in config.json"));
        }
        Ok(json!({
            "num_sliding_attention_heads": self.step_heads(layers)?[1],
            "num_key_value_heads": kv_heads[0],
            "sliding_window": self.window()?,
            "layer_types": layer_types(&self.local(all, 1)?),
            "mlp_layer_types": kinds,
            "query_pre_attn_scalar": head_dim,
            "n_routed_experts": experts,
            "num_experts_per_tok": self.required("expert_used_count")?,
            "moe_intermediate_size": self.count("expert_feed_forward_length")?.filter(|n| *n > 0).unwrap_or(inner),
            "share_expert_dim": self.required("expert_shared_feed_forward_length")?,
            "moe_router_scaling_factor": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
            "swiglu_limits": self.limits("swiglu_clamp_exp")?,
            "swiglu_limits_shared": self.limits("swiglu_clamp_shexp")?,
        }))
    }

    /// A limit for each layer, where there are any.
    fn limits(&self, name: &str) -> Result<Option<Vec<f32>>> {
        match self.look(name) {
            None => Ok(None),
            Some(MetadataValue::Array(list)) => {
                let number =
                    |value: &MetadataValue| if let MetadataValue::F32(limit) = value { Some(*limit) } else { None };
                let limits: Option<Vec<f32>> = list.iter().map(number).collect();
                limits.map(Some).ok_or_else(|| {
                    formats::Error::malformed(format!("metadata key `{}` is not a list of numbers", self.key(name)))
                })
            }
            Some(_) => {
                Err(formats::Error::malformed(format!("metadata key `{}` is not a list of numbers", self.key(name))))
            }
        }
    }
}
