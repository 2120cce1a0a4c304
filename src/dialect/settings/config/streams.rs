//! Keys of the types whose stream is several hidden states wide.

use formats::Result;
use serde_json::{Value, json};

use super::Hyperparameters;
use crate::dialect::settings::Settings;

impl Settings {
    /// GLM-5.3-Flash's sizes: those of layers with a state, which have no keys, and of the others, whose indexer chooses whole blocks.
    pub(super) fn glm5_next(&self, model: &Hyperparameters) -> Result<Value> {
        let Value::Object(mut values) = self.indexed(model)? else { unreachable!("an object") };
        let dense = values.shift_remove("first_k_dense_replace").and_then(|dense| dense.as_u64()).unwrap_or(0) as usize;
        for own in ["moe_layer_freq", "topk_method", "scoring_func"] {
            values.shift_remove(own);
        }
        self.look("attention.indexer.types");
        self.look("swiglu_clamp_shexp");
        self.look("attention.layer_norm_epsilon");
        let counts = self.counts("attention.head_count_kv", model.layers)?;
        let recurrent = |layer: usize| counts[layer] == 0;
        let layers = || 0..model.layers;
        let kind = |layer| if recurrent(layer) { "linear_attention" } else { "indexed_attention" };
        let indexer = |layer| match recurrent(layer) || self.has(&format!("blk.{layer}.indexer.proj.weight")) {
            true => "full",
            false => "shared",
        };
        let own = json!({
            "layer_types": layers().map(kind).collect::<Vec<_>>(),
            "indexer_types": layers().map(indexer).collect::<Vec<_>>(),
            "mlp_layer_types": layers().map(|n| if n < dense { "dense" } else { "sparse" }).collect::<Vec<_>>(),
            "index_kpool": self.required("attention.indexer.kpool")?,
            "index_kpool_always_select_tail": self.flag("attention.indexer.kpool_select_tail")?.unwrap_or(false),
            "linear_head_dim": self.required("kda.head_dim")?,
            "linear_num_heads": model.heads,
            "linear_conv_kernel_dim": self.required("ssm.conv_kernel")?,
            "linear_lower_bound": self.float("kda.gate_lower_bound")?,
            "hc_mult": self.required("hyper_connection.count")?,
            "hc_eps": self.float("hyper_connection.epsilon")?,
            "hc_sinkhorn_iters": self.required("hyper_connection.sinkhorn_iterations")?,
            "swiglu_limit": self.float_of_layers("swiglu_clamp_exp")?.unwrap_or(0.0),
        });
        values.extend(own.as_object().cloned().unwrap_or_default());
        Ok(values.into())
    }

    /// Hunyuan 4's sizes: latent attention and an indexer as GLM-5 has them, and streams.
    pub(super) fn hunyuan_4(&self, model: &Hyperparameters) -> Result<Value> {
        let Value::Object(mut values) = self.indexed(model)? else { unreachable!("an object") };
        let dense = values.shift_remove("first_k_dense_replace").and_then(|dense| dense.as_u64()).unwrap_or(0);
        for own in ["moe_layer_freq", "topk_method", "scoring_func"] {
            values.shift_remove(own);
        }
        let kind = |layer| if layer < dense { "dense" } else { "sparse" };
        let own = json!({
            "mlp_layer_types": (0..model.layers as u64).map(kind).collect::<Vec<_>>(),
            "hc_mult": self.required("hyper_connection.count")?,
            "hc_eps": self.float("hyper_connection.epsilon")?,
            "hc_magnitude": self.float("hyper_connection.magnitude")?,
            "swiglu_limit": self.float_of_layers("swiglu_clamp_exp")?.unwrap_or(0.0),
        });
        values.extend(own.as_object().cloned().unwrap_or_default());
        Ok(values.into())
    }
}
