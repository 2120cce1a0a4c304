//! Transforms: rescale a float model so that it is easier to quantize, and leave its function as it is.

mod awq;

pub use awq::Awq;

use kernels::{GridSpec, Quantize};

use crate::statistics::Statistics;

/// One place where a scale per channel can be folded into whatever produces the channels.
pub struct Slot<'a, B: Quantize> {
    /// The linears that read these channels, each with the grid it will be rounded on.
    pub readers: Vec<(&'a B::Matrix, &'a GridSpec)>,
    /// The channels' statistics, with their Hessian.
    pub statistics: &'a Statistics<B>,
    /// How channels are tied together because one producer feeds several of them.
    pub tie: Tie,
}

/// Channels that must share one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tie {
    /// Every channel has its own.
    Free,
    /// Attention heads that share a key and value head: `heads` runs of `head_dim` channels, `repeat` heads a run.
    Heads {
        /// Channels in a head.
        head_dim: usize,
        /// Query heads per key and value head.
        repeat: usize,
    },
}

impl Tie {
    /// Averages `values` over tied channels; the result has one value per producer channel.
    pub fn reduce(self, values: &[f32]) -> Vec<f32> {
        let Tie::Heads { head_dim, repeat } = self else { return values.to_vec() };
        values
            .chunks_exact(head_dim * repeat)
            .flat_map(|run| {
                (0..head_dim).map(|d| (0..repeat).map(|r| run[r * head_dim + d]).sum::<f32>() / repeat as f32)
            })
            .collect()
    }

    /// Spreads one value per producer channel back over the channels.
    pub fn expand(self, values: &[f32]) -> Vec<f32> {
        let Tie::Heads { head_dim, repeat } = self else { return values.to_vec() };
        values.chunks_exact(head_dim).flat_map(|head| head.repeat(repeat)).collect()
    }
}

/// Scales found for a slot.
#[derive(Clone, Debug)]
pub struct SlotScales {
    /// One factor per producer channel: readers' columns are multiplied, the producer's channels divided.
    pub producer: Vec<f32>,
    /// The same per channel as readers see it.
    pub reader: Vec<f32>,
    /// The exponent that won; 0 leaves the model as it is.
    pub alpha: f32,
    /// Rounding loss without scales and with them, on the sampled rows.
    pub loss: [f64; 2],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tied_heads_share_their_scale() {
        let tie = Tie::Heads { head_dim: 2, repeat: 2 };
        let producer = tie.reduce(&[1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0]);
        assert_eq!(producer, [2.0, 3.0, 20.0, 30.0]);
        assert_eq!(tie.expand(&producer), [2.0, 3.0, 2.0, 3.0, 20.0, 30.0, 20.0, 30.0]);
    }
}
