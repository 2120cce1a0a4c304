//! The tensors of a GGUF file: their names and order, where each comes from, and how its rows are permuted.

use crate::error::{Error, Result};
use crate::export::mixes;
use crate::graph::{Graph, Rope, RopeScaling};
use crate::import::names::{self, Architecture, Heads, ROPE_FREQS};

/// The tensors of a GGUF file, in the order in which llama-quantize writes them.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportPlan {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Every tensor, in file order.
    pub tensors: Vec<ExportTensor>,
}

/// One tensor of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportTensor {
    /// Its name in the file.
    pub gguf: String,
    /// Where its values come from.
    pub source: Source,
    /// Heads whose rows (elements of a bias) the file holds interleaved; see [`ExportTensor::source_row`].
    pub heads: Option<usize>,
    /// Extents, slowest first, as in the checkpoint.
    pub shape: Vec<usize>,
    /// Whether a mix may give it another type than F32.
    pub quantizable: bool,
}

/// Where the values of a tensor come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The tensor of this Hugging Face name.
    Tensor(String),
    /// Computed from the configuration.
    Values(Vec<f32>),
}

impl ExportTensor {
    /// The row of the source that is row `row` of the file.
    pub fn source_row(&self, row: usize) -> usize {
        self.heads.map_or(row, |heads| names::original_row(row, self.shape[0], heads))
    }
}

/// Lists the tensors of `graph` as a GGUF file holds them.
///
/// A tied head is left out: runtimes take the embedding. Llama 3's rope scaling becomes the F32 tensor
/// `rope_freqs.weight`. Fails for a family without an architecture in GGUF, and for a tensor without a name in it.
pub fn plan(graph: &Graph) -> Result<ExportPlan> {
    let architecture = Architecture::of_family(graph.family)
        .ok_or_else(|| Error::usage(format!("models of the family `{}` cannot be written as GGUF", graph.family)))?;
    let shapes = graph.blocks.iter().filter_map(|block| block.attention()).map(|a| (a.shape, a.rope.as_deref()));
    let mut attention = None;
    for (shape, rope) in shapes {
        let (first, first_rope) = *attention.get_or_insert((shape, rope));
        if (first.heads, first.kv_heads, first.head_dim) != (shape.heads, shape.kv_heads, shape.head_dim)
            || first_rope != rope
        {
            return Err(Error::usage("blocks whose heads or rotary frequencies differ cannot be written as GGUF"));
        }
    }
    let (shape, rope) = attention.ok_or_else(|| Error::usage("a model without attention cannot be written as GGUF"))?;

    let mut tensors = Vec::new();
    for (source, extents) in graph.tensors() {
        let gguf = architecture.gguf_name(&source).ok_or_else(|| {
            Error::usage(format!("tensor `{source}` has no name in GGUF's architecture `{}`", architecture.id))
        })?;
        let heads = architecture.interleaved(&gguf).map(|heads| match heads {
            Heads::Query => shape.heads,
            Heads::Key => shape.kv_heads,
        });
        let quantizable = mixes::quantizable(&gguf, &extents);
        tensors.push(ExportTensor { gguf, source: Source::Tensor(source), heads, shape: extents, quantizable });
    }
    if let Some(factors) = rope.and_then(frequency_factors) {
        tensors.push(ExportTensor {
            gguf: ROPE_FREQS.to_owned(),
            shape: vec![factors.len()],
            source: Source::Values(factors),
            heads: None,
            quantizable: false,
        });
    }
    tensors.sort_by(|a, b| names::file_order(&a.gguf, &b.gguf));
    Ok(ExportPlan { architecture: architecture.id, tensors })
}

/// What each rotary frequency of Llama 3's scaling is divided by; `None` for other scalings.
fn frequency_factors(rope: &Rope) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { factor, low, high, original } = rope.scaling else { return None };
    let [factor, low, high, original] = [factor, low, high, original].map(f64::from);
    let pairs = rope.inverse_frequencies.len();
    let of_pair = |i: usize| {
        let frequency = 1.0 / rope.theta.powf((2 * i) as f32 / (2 * pairs) as f32);
        let wavelength = std::f64::consts::TAU / f64::from(frequency);
        let smooth = (original / wavelength - low) / (high - low);
        let value = if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        value as f32
    };
    Some((0..pairs).map(of_pair).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families;
    use serde_json::json;

    fn graph(change: impl FnOnce(&mut serde_json::Value)) -> Graph {
        let mut config = json!({
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 11, "vocab_size": 10, "tie_word_embeddings": false,
            "attention_bias": true,
        });
        change(&mut config);
        families::build(&config).unwrap()
    }

    #[test]
    fn a_llama_is_listed_in_file_order() {
        let plan = plan(&graph(|_| ())).unwrap();
        let names: Vec<&str> = plan.tensors.iter().map(|t| t.gguf.as_str()).collect();
        assert_eq!(plan.architecture, "llama");
        assert_eq!(
            names[..16],
            [
                "output.weight",
                "output_norm.weight",
                "token_embd.weight",
                "blk.0.attn_k.bias",
                "blk.0.attn_k.weight",
                "blk.0.attn_norm.weight",
                "blk.0.attn_output.bias",
                "blk.0.attn_output.weight",
                "blk.0.attn_q.bias",
                "blk.0.attn_q.weight",
                "blk.0.attn_v.bias",
                "blk.0.attn_v.weight",
                "blk.0.ffn_down.weight",
                "blk.0.ffn_gate.weight",
                "blk.0.ffn_norm.weight",
                "blk.0.ffn_up.weight",
            ]
        );
        assert_eq!(names.len(), 3 + 11 * 13);
        assert!(names.last().unwrap().starts_with("blk.10."));
        let find = |name: &str| plan.tensors.iter().find(|t| t.gguf == name).unwrap();
        let (q, k) = (find("blk.2.attn_q.weight"), find("blk.2.attn_k.bias"));
        assert_eq!((q.heads, k.heads, find("blk.2.attn_v.weight").heads), (Some(4), Some(2), None));
        assert_eq!(q.source, Source::Tensor("model.layers.2.self_attn.q_proj.weight".to_owned()));
        assert_eq!((0..8).map(|row| k.source_row(row)).collect::<Vec<_>>(), [0, 4, 1, 5, 2, 6, 3, 7]);
        assert_eq!(q.source_row(9), 12);
        assert!(q.quantizable && !k.quantizable && !find("output_norm.weight").quantizable);
    }

    #[test]
    fn a_tied_head_is_left_out() {
        let plan = plan(&graph(|config| config["tie_word_embeddings"] = true.into())).unwrap();
        assert!(plan.tensors.iter().all(|t| t.gguf != "output.weight"));
    }

    #[test]
    fn llama_3_scaling_is_a_tensor_of_factors() {
        let scaled = graph(|config| {
            config["rope_theta"] = 500000.0.into();
            config["head_dim"] = 128.into();
            config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        });
        let plan = plan(&scaled).unwrap();
        let freqs = plan.tensors.iter().find(|t| t.gguf == "rope_freqs.weight").unwrap();
        let Source::Values(factors) = &freqs.source else { panic!("computed") };
        assert_eq!((freqs.shape.as_slice(), factors[0], factors[63]), (&[64][..], 1.0, 8.0));
        // Dividing the plain frequencies by the factors gives the frequencies that the model is run with.
        let rope = scaled.blocks[0].attention().unwrap().rope.clone().unwrap();
        let between = (0..64).filter(|i| factors[*i] > 1.0 && factors[*i] < 8.0).count();
        assert!(between > 3);
        for (i, factor) in factors.iter().enumerate() {
            let plain = 1.0 / 500000f32.powf((2 * i) as f32 / 128.0);
            let ratio = rope.inverse_frequencies[i] / (plain / factor);
            assert!((ratio - 1.0).abs() < 1e-6, "{i}: {ratio}");
        }
    }
}
