//! Memory that a model takes while it is served: its weights, and the keys and values of every token that it has read.

use serde::Serialize;

use crate::graph::{Attention, Graph, Keys, Layer, Projections};

/// Memory of cards as they are sold, in GiB.
pub const CARDS: [u64; 9] = [4, 6, 8, 12, 16, 24, 32, 48, 80];

/// Share of a card that weights and cache may take; the rest is for activations and for whatever else is on it. It is what vLLM takes
/// unless it is told otherwise.
const USABLE: f64 = 0.9;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// In 16 bits.
    Half,
    /// In 8 bits: FP8 in vLLM and SGLang; Q8_0, with a scale for 32 values, in llama.cpp.
    Byte,
}

impl CacheType {
    /// Bytes of so many values, in llama.cpp or elsewhere.
    fn bytes(self, values: u64, gguf: bool) -> u64 {
        match self {
            CacheType::Half => values * 2,
            CacheType::Byte if gguf => values.div_ceil(32) * 34,
            CacheType::Byte => values,
        }
    }
}

/// Values that one token leaves in the cache of an attention layer: of its keys and values, or of the latent that both are made from, and of
/// the keys of an indexer.
fn values(attention: &Attention) -> u64 {
    let cached = match &attention.projections {
        // Which reads what another layer keeps.
        Projections::Direct(_) if matches!(attention.keys, Keys::Of(_)) => 0,
        Projections::Direct(_) => attention.shape.kv_heads * (attention.shape.head_dim + attention.shape.value_dim),
        Projections::Latent(latent) => latent.kv_a.as_ref().map_or(0, |kv_a| kv_a.rows),
        Projections::Joint(joint) => joint.kv.rows,
    };
    let indexed = attention.indexer().filter(|indexer| !indexer.shape.entries);
    (cached + indexed.map_or(0, |indexer| indexer.shape.head_dim)) as u64
}

/// Bytes that one sequence leaves in a layer with a state, however long it is: the state in single precision, and what the convolution
/// still needs of the last tokens, which llama.cpp keeps so too and others in 16 bits.
fn state_bytes([last, state]: [u64; 2], gguf: bool) -> u64 {
    4 * state + if gguf { 4 } else { 2 } * last
}

/// Bytes of the cache for `batch` sequences of `context` tokens each; `None` for a model of which only the linears are known.
///
/// A layer that sees no further back than a window keeps no more tokens than that, and one with a state takes the same for any context.
pub fn cache_bytes(graph: &Graph, context: u64, batch: u64, ty: CacheType, gguf: bool) -> Option<u64> {
    if graph.opaque {
        return None;
    }
    let of = |attention: &Attention| {
        let reach = [attention.shape.window, attention.shape.chunk].into_iter().flatten().min();
        let tokens = reach.map_or(context, |reach| context.min(reach as u64));
        // An entry for each block of tokens, and its key where an indexer chooses.
        let entries = attention.beside.as_ref().map_or(0, |beside| {
            let key = attention.indexer().map_or(0, |indexer| indexer.shape.head_dim);
            ty.bytes((beside.norm.shape[0] + key) as u64, gguf).saturating_mul(context / beside.block as u64)
        });
        ty.bytes(values(attention), gguf).saturating_mul(tokens).saturating_add(entries)
    };
    let of_layer = |layer: &Layer| match layer {
        Layer::Attention(attention) => of(attention),
        Layer::Delta(delta) => state_bytes(delta.state(), gguf),
        Layer::Mamba(mamba) => state_bytes(mamba.state(), gguf),
        Layer::Short(short) => state_bytes([short.convolution.last(), 0], gguf),
        Layer::Grams(layer) => state_bytes([layer.convolution.last(), 0], gguf),
        Layer::Mlp(_) | Layer::Moe(_) | Layer::Further(_) | Layer::PerLayer(_) | Layer::Opaque(_) => 0,
    };
    // Those that predict further tokens have one only where a runtime is told to draft with them.
    let layers = graph.trunk().iter().flat_map(|block| &block.steps).map(|step| &step.layer);
    let one = layers.map(of_layer).fold(0, u64::saturating_add);
    Some(one.saturating_mul(batch))
}

/// What a card of one size has room for.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Fit {
    /// Its memory in GiB.
    pub gib: u64,
    /// Whether weights and a 16-bit cache of what was asked for fit.
    pub fits_16_bit: bool,
    /// The same with an 8-bit cache.
    pub fits_8_bit: bool,
    /// Tokens of the longest context that fits with a 16-bit cache, up to what the model can take; 0 where not even the weights do.
    pub context_16_bit: u64,
    /// The same with an 8-bit cache.
    pub context_8_bit: u64,
}

/// What fits on so many cards of each of the usual sizes: `weights` bytes with caches for `batch` sequences of `context` tokens, of at most
/// `longest`.
pub fn fits(
    graph: &Graph,
    weights: u64,
    [context, longest]: [u64; 2],
    batch: u64,
    gguf: bool,
    cards: usize,
) -> Vec<Fit> {
    let fit = |gib: u64| {
        let room = ((gib << 30) as f64 * USABLE * cards as f64) as u64;
        let left = room.checked_sub(weights);
        let takes = |context: u64, ty| cache_bytes(graph, context, batch, ty, gguf);
        let fits = |context: u64, ty| left.zip(takes(context, ty)).is_some_and(|(left, takes)| takes <= left);
        let most = |ty| {
            // Bisected, for layers with a window make the cache grow ever more slowly.
            let (mut low, mut high) = (0, longest);
            while low < high {
                let middle = low + (high - low).div_ceil(2);
                if fits(middle, ty) { low = middle } else { high = middle - 1 }
            }
            low
        };
        let [half, byte] = [CacheType::Half, CacheType::Byte];
        Fit {
            gib,
            fits_16_bit: fits(context, half),
            fits_8_bit: fits(context, byte),
            context_16_bit: most(half),
            context_8_bit: most(byte),
        }
    };
    CARDS.into_iter().map(fit).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn linear_attention_takes_the_same_for_any_context() {
        let config = json!({
            "model_type": "qwen3_5_text", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
        });
        let graph = crate::families::build(&config).unwrap();
        let bytes = |context, gguf| cache_bytes(&graph, context, 3, CacheType::Half, gguf).unwrap();
        // Three layers of four: 4 heads of 8 by 16, and 3 tokens of 2 · 16 + 64 channels; the other one 2 heads of 16 keys and values.
        let (state, last, token) = (4 * 8 * 16, 3 * 96, 2 * 2 * 16 * 2);
        assert_eq!(bytes(100, false), 3 * (3 * (4 * state + 2 * last) + 100 * token));
        assert_eq!(bytes(1000, true) - bytes(100, true), 3 * 900 * token);
        assert_eq!(bytes(0, true), 9 * 4 * (state + last));
    }

    #[test]
    fn latents_of_other_layers_are_kept_once_and_the_keys_of_every_indexer() {
        let config = include_str!("../../tests/fixtures/families/mistral_large4_published/config.json");
        let graph = crate::families::build(&serde_json::from_str(config).unwrap()).unwrap();
        // Latents of 32 with 16 that are rotated, without, and with; keys of 32 of four indexers.
        let values = 48 + 32 + 48 + 4 * 32;
        assert_eq!(cache_bytes(&graph, 10, 1, CacheType::Half, false), Some(10 * 2 * values));
    }
}
