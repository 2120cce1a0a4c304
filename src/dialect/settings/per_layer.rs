//! config.json of Gemma 3n and 4, whose layers read what others leave, and of 4 differ in heads and widths.

use serde_json::{Value, json};

use super::config::layer_types;
use super::{Result, Settings};
use crate::dialect::architectures::{ROPE_FREQS, STANDING};

/// Layers of a Gemma 3n that have keys and values of their own, those of which gates let few values through, and the share that these do not.
const OWN: usize = 20;
const SPARSE: usize = 10;
const SHARE: f64 = 0.95;

impl Settings {
    /// What only a Gemma 3n says: of most llama.cpp takes no more notice than that they are there, and runs the models that were published.
    pub(super) fn gemma3n(&self, activation: &str, layers: usize) -> Result<Value> {
        let ignored = [
            "altup.num_inputs",
            "altup.active_idx",
            "attention.shared_kv_layers",
            "embedding_length_per_layer_input",
            "activation_sparsity_scale",
        ];
        ignored.into_iter().for_each(|name| {
            self.look(name);
        });
        let local = self.local(layers, 5)?;
        if layers > OWN && local[OWN - 2..OWN] != [true, false] {
            return Err(self.unsupported(format!(
                "layers from {OWN} on that read the keys and values of others, where the two before are not one with a window and one \
                 without, cannot be read as llama.cpp runs them"
            )));
        }
        let sparse: Vec<f64> = (0..layers).map(|layer| if layer < SPARSE { SHARE } else { 0.0 }).collect();
        Ok(json!({
            "hidden_activation": activation,
            "sliding_window": self.window()?,
            "layer_types": layer_types(&local),
            "num_kv_shared_layers": layers.saturating_sub(OWN),
            "altup_num_inputs": 4,
            "altup_active_idx": 0,
            "altup_correct_scale": true,
            "laurel_rank": 64,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": self.tensors.get("token_embd.weight").and_then(|shape| shape.first()),
            "activation_sparsity_pattern": sparse,
            "final_logit_softcapping": self.float("final_logit_softcapping")?.filter(|cap| *cap != 0.0).unwrap_or(30.0),
        }))
    }

    /// What only a Gemma 4 says.
    pub(super) fn gemma4(&self, activation: &str, layers: usize, experts: Option<usize>) -> Result<Value> {
        let local = self.local(layers, 6)?;
        let widths = self.counts("feed_forward_length", layers)?;
        let heads = self.counts("attention.head_count_kv", layers)?;
        let shared = self.count("attention.shared_kv_layers")?.unwrap_or(0);
        let first = layers.saturating_sub(shared);
        // llama.cpp takes the last two layers with keys of their own for one of each type, whatever they are.
        let kinds = [first.checked_sub(2), first.checked_sub(1)].map(|layer| layer.map(|layer| local[layer]));
        if shared > 0 && kinds != [Some(true), Some(false)] {
            return Err(self.unsupported(format!(
                "layers from {first} on that read the keys and values of others, where the two before are not one with a window and one \
                 without, cannot be read as llama.cpp runs them"
            )));
        }
        let usual = widths[0];
        let wide = first > 0 && widths[first..].iter().any(|width| *width != usual);
        let expected = |layer: usize| if wide && layer >= first { 2 * usual } else { usual };
        if let Some(layer) = (0..layers).find(|layer| widths[*layer] != expected(*layer)) {
            return Err(self.unsupported(format!(
                "a feed-forward layer of width {} in block {layer}, where the first is of {usual}, cannot be said in config.json",
                widths[layer]
            )));
        }
        let width = |name: &str| self.required(&format!("attention.{name}"));
        let (full, near) = (width("key_length")?, width("key_length_swa")?);
        if self.count("attention.value_length_swa")?.is_some_and(|value| value != near) {
            return Err(self.unsupported("keys and values of different widths cannot be read"));
        }
        let rotated = self.count("rope.dimension_count_swa")?.unwrap_or(near);
        if rotated != near {
            return Err(self.unsupported(format!("rotating {rotated} of {near} values of a head cannot be read")));
        }
        let reuses =
            |layer: &usize| !local[*layer] && *layer < first && !self.has(&format!("blk.{layer}.attn_v.weight"));
        let reuses = (0..layers).any(|layer| reuses(&layer));
        let of = |kind: bool| (0..layers).find(|layer| local[*layer] == kind).map(|layer| heads[layer]);
        let (near_heads, full_heads) = (of(true).unwrap_or(heads[0]), of(false).unwrap_or(heads[0]));
        let overrides: serde_json::Map<String, Value> = (0..layers)
            .filter(|layer| !local[*layer])
            .map(|layer| (layer.to_string(), json!({"head_dim": full, "num_key_value_heads": heads[layer]})))
            .collect();
        let side = self.count("embedding_length_per_layer_input")?.unwrap_or(0);
        let cap = self.float("final_logit_softcapping")?.filter(|cap| *cap != 0.0);
        let mut values = json!({
            "hidden_activation": activation,
            "head_dim": near,
            "num_key_value_heads": near_heads,
            "global_head_dim": full,
            "num_global_key_value_heads": if reuses { Some(full_heads) } else { None },
            "attention_k_eq_v": reuses,
            "sliding_window": self.window()?,
            "layer_types": layer_types(&local),
            "num_kv_shared_layers": shared,
            "use_double_wide_mlp": wide,
            "hidden_size_per_layer_input": side,
            "vocab_size_per_layer_input": self.tensors.get("token_embd.weight").and_then(|shape| shape.first()),
            "final_logit_softcapping": cap,
            "rope_parameters": self.rotations()?,
            "enable_moe_block": experts.is_some(),
            "num_experts": experts,
            "top_k_experts": self.count("expert_used_count")?.filter(|_| experts.is_some()),
            "moe_intermediate_size": self.count("expert_feed_forward_length")?.filter(|_| experts.is_some()),
        });
        // There is no other word for it.
        if full_heads != near_heads && !reuses {
            values["per_layer_config"] = overrides.into();
        }
        Ok(values)
    }

    /// The rotation of layers that see all, whose last pairs stand still, and of the others.
    fn rotations(&self) -> Result<Value> {
        let mut full = json!({
            "rope_type": "proportional",
            "rope_theta": self.float("rope.freq_base")?.unwrap_or(10_000.0),
        });
        if let Some(factors) = self.factors.get(ROPE_FREQS) {
            let turning = factors.iter().take_while(|factor| **factor < STANDING / 2.0).count();
            let factor = factors.first().copied().unwrap_or(1.0);
            let alike = factors[..turning].iter().all(|other| *other == factor) && factor > 0.0;
            if turning == 0 || !alike || factors[turning..].iter().any(|factor| *factor < STANDING / 2.0) {
                return Err(self
                    .unsupported(
                        "rotary frequencies of which others than the last stand still cannot be said in config.json",
                    )
                    .in_tensor(ROPE_FREQS));
            }
            full["partial_rotary_factor"] = (turning as f64 / factors.len() as f64).into();
            if factor != 1.0 {
                full["factor"] = factor.into();
            }
        }
        let near = self.float("rope.freq_base_swa")?.unwrap_or(10_000.0);
        Ok(json!({"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": near}}))
    }
}
