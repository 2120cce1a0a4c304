//! Keys of the types whose stream is several hidden states wide.

use formats::Result;
use formats::container::gguf::MetadataValue;
use serde_json::{Map, Value, json};

use super::Hyperparameters;
use crate::dialect::settings::{Settings, integer};
use crate::families::qwen4_seed;

/// Rows of the table for tokens in a row that are one tensor of a folder, as in published models.
const ROWS_OF_A_PART: usize = 1 << 19;

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

    /// Qwen 4's sizes of streams and indexers, and of the table for tokens in a row, whose rows are found by a seed.
    ///
    /// Fails for layers of attention without an indexer, and for rows that are found by other numbers than a seed gives.
    pub(super) fn qwen4(&self, model: &Hyperparameters) -> Result<Map<String, Value>> {
        let ratios = self.counts("attention.compress_ratios", model.layers)?;
        let recurrent = self.recurrent(model.layers)?;
        let mut own = ratios.iter().zip(&recurrent).filter(|(_, recurrent)| !**recurrent).map(|(ratio, _)| *ratio);
        let ratio = own.next().unwrap_or(0);
        if ratio == 0 || own.any(|other| other != ratio) {
            return Err(self.unsupported(format!(
                "`{}` must be one number for all layers of attention, found {ratios:?}",
                self.key("attention.compress_ratios")
            )));
        }
        let values = json!({
            "hc_count": self.required("hyper_connection.count")?,
            "hc_lowrank": self.required("hyper_connection.low_rank")?,
            "indexer_n_heads": self.required("attention.indexer.head_count")?,
            "indexer_head_dim": self.required("attention.indexer.key_length")?,
            "indexer_kv_heads": 1,
            "indexer_budget": self.required("attention.indexer.top_k")?,
            "indexer_compress_ratio": ratio,
            "output_gate_type": "sigmoid",
            "norm_topk_prob": true,
            "ple_layer_ids": [],
            // Files have no place for it, and without the key there would be one.
            "mtp_num_hidden_layers": 0,
        });
        let mut values = values.as_object().cloned().unwrap_or_default();
        if self.look("ple.layers").is_some() {
            values.extend(self.grams()?.as_object().cloned().unwrap_or_default());
        }
        Ok(values)
    }

    /// A table for tokens in a row.
    fn grams(&self) -> Result<Value> {
        const TABLE: &str = "per_layer_token_embd.weight";
        let list = |name: &str| {
            let list = match self.look(name) {
                Some(MetadataValue::Array(list)) => list.iter().map(integer).collect::<Option<Vec<usize>>>(),
                _ => None,
            };
            list.ok_or_else(|| {
                formats::Error::malformed(format!("metadata key `{}` is no list of counts", self.key(name)))
            })
        };
        let (layers, sizes, multipliers) =
            (list("ple.layers")?, list("ple.head_vocab_sizes")?, list("ple.layer_multipliers")?);
        let (order, each) = (self.required("ple.ngram_size")?, self.required("ple.heads_per_ngram")?);
        let columns = self.required("embedding_length_per_layer_input")?;
        let shape = |name: &str| self.tensors.get(name).filter(|shape| shape.len() == 2);
        let rows = shape(TABLE).map_or(0, |shape| shape[0]);
        let vocabulary = shape("token_embd.weight").map_or(0, |shape| shape[0]);
        let starts = sizes.iter().scan(0usize, |next, size| {
            let first = *next;
            *next = next.saturating_add(*size);
            Some(first)
        });
        let of_file = sizes.iter().fold(0usize, |sum, size| sum.saturating_add(*size));
        let heads = order.saturating_sub(1).saturating_mul(each);
        let fits = sizes.len() == heads && multipliers.len() == order && rows >= of_file;
        let fits = fits && starts.eq(list("ple.head_offsets")?);
        let seed = qwen4_seed(vocabulary, &sizes, &multipliers).filter(|_| fits);
        let Some(seed) = seed else {
            return Err(self.unsupported(format!(
                "`{}`, `{}` and `{}`: rows of `{TABLE}` are found by other numbers than config.json can say",
                self.key("ple.layer_multipliers"),
                self.key("ple.head_vocab_sizes"),
                self.key("ple.head_offsets")
            )));
        };
        let padding = [128, rows].into_iter().find(|by| of_file.next_multiple_of(*by) == rows).unwrap_or(rows);
        // Known from the tokenizer, too, which may name others before it.
        let end = self.count("ple.eos_token_id")?;
        self.look("ple.image_token_id");
        Ok(json!({
            "ple_layer_ids": layers.iter().map(|layer| layer + 1).collect::<Vec<_>>(),
            "ngram_size": order,
            "heads_per_ngram": each,
            "ple_embed_dim": sizes.len() * columns,
            "ple_conv_kernel_size": self.required("ple.conv_kernel")?,
            "ngram_vocab_size_base": sizes[0],
            "make_ngram_vocab_size_divisible_by": padding,
            "split_ngram_parts": rows.div_ceil(ROWS_OF_A_PART),
            "seed": seed,
            "eos_token_id": end,
        }))
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
