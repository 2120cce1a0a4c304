//! Keys of the types whose stream is several hidden states wide.

use formats::Result;
use serde_json::{Value, json};

use super::Hyperparameters;
use crate::dialect::settings::Settings;

impl Settings {
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
