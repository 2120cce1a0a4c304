//! Memory that a model takes while it is served: its weights, and the keys and values of every token that it has read.

use serde::Serialize;

use crate::graph::{Attention, Graph, Projections};

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

/// Values that one token leaves in the cache of an attention layer: of its keys and values, or of the latent that both are made from.
fn values(attention: &Attention) -> u64 {
    match &attention.projections {
        Projections::Direct(_) => {
            (attention.shape.kv_heads * (attention.shape.head_dim + attention.shape.value_dim)) as u64
        }
        Projections::Latent(latent) => latent.kv_a.rows as u64,
    }
}

/// Bytes of the cache for `batch` sequences of `context` tokens each; `None` for a model of which only the linears are known.
///
/// A layer that sees no further back than a window keeps no more tokens than that.
pub fn cache_bytes(graph: &Graph, context: u64, batch: u64, ty: CacheType, gguf: bool) -> Option<u64> {
    if graph.opaque {
        return None;
    }
    let of = |attention: &Attention| {
        let reach = [attention.shape.window, attention.shape.chunk].into_iter().flatten().min();
        let tokens = reach.map_or(context, |reach| context.min(reach as u64));
        ty.bytes(values(attention), gguf).saturating_mul(tokens)
    };
    let one = graph.blocks.iter().filter_map(|block| block.attention()).map(of).fold(0, u64::saturating_add);
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
