//! Several streams with a gate for each value, and what a table has for tokens in a row.

use kernels::Activation;

use super::Lowering;
use crate::graph::{Gated, GramLayer, Norm};
use crate::program::{Kept, Kind, Streams};

impl<'b> Lowering<'b> {
    /// What is read of streams by gates, each stream normed first, and the weights by which is written, where anything is.
    pub(super) fn gated(&mut self, gated: &'b Gated, norm: Option<&'b Norm>, stream: usize) -> (usize, Option<usize>) {
        let Gated { streams, mix: [to_rank, to_gates], inject } = gated;
        let (hidden, width, share) = (self.hidden, streams * self.hidden, 1.0 / *streams as f32);
        let mut normed = stream;
        if let Some(norm) = norm {
            normed = self.one(Kind::HeadNorm { norm, head_dim: hidden }, &[stream], "n", width);
        }
        let linears = [to_rank].into_iter().chain(inject).collect();
        let made = self.linears(linears, true, normed, &["m", "w"]);
        let narrow = self.scaled(made[0], share);
        let narrow = self.one(Kind::Map(Activation::Silu), &[narrow], "m", to_rank.rows);
        let gates = self.linears(vec![to_gates], true, narrow, &["gate"])[0];
        let open = self.one(Kind::Gate(Activation::Sigmoid), &[gates, normed], "n", width);
        let read = self.on_streams(Streams::Mean, &[open], "r", hidden);
        // Two products with all streams stand before it.
        self.keep(read, Kept::Always);
        let weights = made.get(1).map(|made| {
            let weights = self.scaled(*made, share);
            let weights = self.one(Kind::Map(Activation::Sigmoid), &[weights], "w", *streams);
            self.scaled(weights, 2.0)
        });
        (read, weights)
    }

    /// What is added to all streams.
    pub(super) fn grams(&mut self, layer: &'b GramLayer, stream: usize) -> usize {
        let GramLayer { grams, key, value, norms: [of_keys, of_streams, of_added], convolution } = layer;
        let (hidden, width) = (value.rows, key.rows);
        let found = self.one(Kind::Grams(grams), &[], "e", grams.width());
        let made = self.linears(vec![key, value], false, found, &["k", "v"]);
        let norm = |this: &mut Self, norm, value, name| {
            this.one(Kind::HeadNorm { norm, head_dim: hidden }, &[value], name, width)
        };
        let keys = norm(self, of_keys, made[0], "k");
        let streams = norm(self, of_streams, stream, "n");
        let agreement = self.one(Kind::Agree(hidden), &[keys, streams], "gate", width / hidden);
        let share = self.one(Kind::Map(Activation::Sigmoid), &[agreement], "gate", width / hidden);
        let added = self.on_streams(Streams::Each, &[made[1], share], "g", width);
        let mut around = norm(self, of_added, added, "n");
        self.convolve(convolution, 0, &mut around);
        self.one(Kind::Plus(1.0), &[added, around], "y", width)
    }
}
