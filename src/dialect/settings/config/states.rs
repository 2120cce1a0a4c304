//! Keys of the types whose layers have a state in place of attention: Mamba 2 and gated short convolutions.

use serde_json::{Value, json};

use super::{Hyperparameters, Result, Settings, integer_share};

impl Settings {
    /// Which layers have no keys, and so a state.
    fn without_keys(&self, layers: usize) -> Result<Vec<bool>> {
        Ok(self.counts("attention.head_count_kv", layers)?.into_iter().map(|heads| heads == 0).collect())
    }

    /// `layer_types`, by the names of layers with a state and of those with attention.
    fn kinds(&self, layers: usize, [state, attention]: [&str; 2]) -> Result<Value> {
        let kinds = self.without_keys(layers)?.into_iter();
        Ok(kinds.map(|without| if without { state } else { attention }).collect())
    }

    /// Keys that only models with state spaces have.
    pub(super) fn state_space(&self, model_type: &str, model: &Hyperparameters) -> Result<Value> {
        let Hyperparameters { hidden, layers, experts, inner: width, .. } = *model;
        let used = experts.map(|_| self.required("expert_used_count")).transpose()?;
        if self.architecture.id == "granitemoe" {
            return Ok(json!({
                "num_local_experts": experts,
                "num_experts_per_tok": used,
                "shared_intermediate_size": self.required("expert_shared_feed_forward_length")?,
                "layer_types": vec!["full_attention"; layers],
                "position_embedding_type": "rope",
            }));
        }
        let (inner, heads) = (self.required("ssm.inner_size")?, self.required("ssm.time_step_rank")?);
        let (head_dim, expand) = (integer_share(self, inner, heads)?, inner / hidden.max(1));
        // Zeros where the model has none.
        let biased = self.biased(&["ssm_conv1d"]);
        let mut values = json!({
            "mamba_n_heads": heads,
            "mamba_d_head": head_dim,
            "mamba_n_groups": self.required("ssm.group_count")?,
            "mamba_d_state": self.required("ssm.state_size")?,
            "mamba_d_conv": self.required("ssm.conv_kernel")?,
            "mamba_expand": expand,
            "mamba_conv_bias": biased,
            "mamba_proj_bias": false,
        });
        let own = match model_type {
            "bamba" => {
                let seeing = self.without_keys(layers)?.into_iter().enumerate().filter(|(_, without)| !without);
                self.look("rope.scaling.finetuned");
                json!({"attn_layer_indices": seeing.map(|(layer, _)| layer).collect::<Vec<_>>()})
            }
            "granitemoehybrid" => json!({
                "num_local_experts": experts.unwrap_or(0),
                "num_experts_per_tok": used.unwrap_or(1),
                "layer_types": self.kinds(layers, ["linear_attention", "full_attention"])?,
                "position_embedding_type": (self.flag("rope.scaling.finetuned")? != Some(false)).then_some("rope"),
                "shared_intermediate_size": match experts {
                    Some(_) => self.required("expert_shared_feed_forward_length")?,
                    None => width,
                },
            }),
            "falcon_h1" => json!({
                "mamba_d_ssm": inner,
                "mamba_rms_norm": self.has("blk.0.ssm_norm.weight"),
                "mamba_norm_before_gate": false,
                "projectors_bias": false,
            }),
            _ => return self.nemotron(model, head_dim),
        };
        values.as_object_mut().expect("an object").extend(own.as_object().cloned().unwrap_or_default());
        Ok(values)
    }

    /// Keys that only models with gated short convolutions have. Fails for experts that are not chosen by sigmoids.
    pub(super) fn short_convolutions(&self, model_type: &str, model: &Hyperparameters) -> Result<Value> {
        let Hyperparameters { layers, experts, .. } = *model;
        let mut values = json!({
            "layer_types": self.kinds(layers, ["conv", "full_attention"])?,
            "conv_L_cache": self.required("shortconv.l_cache")?,
            "conv_bias": false,
        });
        let own = match model_type {
            "lfm2" => json!({"block_auto_adjust_ff_dim": false}),
            _ if !self.sigmoid(false)? => {
                return Err(self.unsupported("an lfm2moe model that routes by softmax cannot be said in config.json"));
            }
            _ => json!({
                "num_experts": experts,
                "num_experts_per_tok": self.required("expert_used_count")?,
                "moe_intermediate_size": self.required("expert_feed_forward_length")?,
                "num_dense_layers": self.count("leading_dense_block_count")?.unwrap_or(0),
                "use_expert_bias": true,
                "norm_topk_prob": true,
                "routed_scaling_factor": 1.0,
            }),
        };
        values.as_object_mut().expect("an object").extend(own.as_object().cloned().unwrap_or_default());
        Ok(values)
    }

    /// Experts and windows of AFMoE. Fails for routing that transformers has no model for, and for windows in other layers than those with
    /// positions, which llama.cpp takes for granted are all but every fourth.
    pub(super) fn arcee(&self, model: &Hyperparameters) -> Result<Value> {
        let Hyperparameters { layers, experts, .. } = *model;
        let local = self.local(layers, 4)?;
        if local.iter().enumerate().any(|(layer, local)| *local == (layer + 1).is_multiple_of(4)) {
            return Err(
                self.unsupported("windows in other layers than all but every fourth cannot be said of an afmoe model")
            );
        }
        if self.flag("expert_weights_norm")? == Some(false) {
            return Err(self
                .unsupported("weights of experts that are not divided by their sum cannot be said of an afmoe model"));
        }
        Ok(json!({
            "num_experts": experts,
            "num_experts_per_tok": self.required("expert_used_count")?,
            "num_shared_experts": self.required("expert_shared_count")?,
            "moe_intermediate_size": self.required("expert_feed_forward_length")?,
            "num_dense_layers": self.count("leading_dense_block_count")?.unwrap_or(0),
            "route_scale": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
            "sliding_window": self.window()?,
            "layer_types": super::layer_types(&local),
            "global_attn_every_n_layers": 4,
            "mup_enabled": true,
        }))
    }

    /// Nemotron-H, whose settings have names of their own.
    fn nemotron(&self, model: &Hyperparameters, head_dim: usize) -> Result<Value> {
        let Hyperparameters { layers, experts, inner, .. } = *model;
        let fed = self.counts("feed_forward_length", layers)?;
        let kind = |(without, inner): (bool, &usize)| match (without, inner) {
            (_, 1..) if experts.is_some() => "moe",
            (_, 1..) => "mlp",
            (true, _) => "linear_attention",
            (false, _) => "full_attention",
        };
        let kinds: Vec<&str> = self.without_keys(layers)?.into_iter().zip(&fed).map(kind).collect();
        let mut values = json!({
            "layers_block_type": kinds,
            "mamba_num_heads": self.required("ssm.time_step_rank")?,
            "mamba_head_dim": head_dim,
            "n_groups": self.required("ssm.group_count")?,
            "ssm_state_size": self.required("ssm.state_size")?,
            "conv_kernel": self.required("ssm.conv_kernel")?,
            "use_conv_bias": self.biased(&["ssm_conv1d"]),
            "use_bias": false,
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            // llama.cpp takes steps of any length.
            "time_step_min": 0.0,
            "mtp_hybrid_override_pattern": "*E",
        });
        if let Some(experts) = experts {
            let used = self.required("expert_used_count")?;
            let expert = self.count("expert_feed_forward_length")?.filter(|width| *width > 0);
            let groups = self.count("expert_group_count")?.filter(|count| *count > 1);
            let own = json!({
                "n_routed_experts": experts,
                "num_experts_per_tok": used,
                "n_shared_experts": self.count("expert_shared_count")?.unwrap_or(1),
                "moe_intermediate_size": expert.unwrap_or(inner / used),
                "moe_shared_expert_intermediate_size": self.required("expert_shared_feed_forward_length")?,
                "moe_latent_size": self.count("moe_latent_size")?.filter(|width| *width > 0),
                "norm_topk_prob": self.flag("expert_weights_norm")?.unwrap_or(false),
                "routed_scaling_factor": self.float("expert_weights_scale")?.filter(|x| *x != 0.0).unwrap_or(1.0),
                "n_group": groups.unwrap_or(1),
                "topk_group": self.count("expert_group_used_count")?.filter(|_| groups.is_some()).unwrap_or(1),
            });
            values.as_object_mut().expect("an object").extend(own.as_object().cloned().unwrap_or_default());
        }
        Ok(values)
    }
}
