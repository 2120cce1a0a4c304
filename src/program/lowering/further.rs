//! The stream of a layer that predicts further tokens.

use super::Lowering;
use crate::graph::{Collapse, Further, Joining};
use crate::program::{Kept, Kind, Streams};

impl<'b> Lowering<'b> {
    /// What a state and the embedding of a token that follows make, in the place of the stream.
    pub(super) fn further(&mut self, further: &'b Further, stream: usize) -> usize {
        let Further { collapse, before, embedding, of_token, of_state, joining, .. } = further;
        let token = self.one(Kind::Lookup(embedding), &[], "e", self.hidden);
        let token = self.norm(Some(of_token), token, "e");
        let state = match collapse {
            None => stream,
            Some(Collapse::Weighed(hyper)) => {
                let weights = self.one(Kind::Connect(hyper), &[stream], "w", hyper.shape.weights());
                self.one(Kind::ReadStreams(hyper.shape.streams), &[stream, weights], "s", self.hidden)
            }
            Some(Collapse::Mean(_) | Collapse::Gated(_)) => self.on_streams(Streams::Mean, &[stream], "s", self.hidden),
        };
        let state = self.norm(before.as_ref(), state, "s");
        let width = self.program.values[state].width;
        let state = match of_state.shape == [width] {
            true => self.norm(Some(of_state), state, "s"),
            false => self.one(Kind::HeadNorm { norm: of_state, head_dim: self.hidden }, &[state], "s", width),
        };
        let (hidden, y) = match joining {
            Joining::Beside { projection, state_first } => {
                let both = if *state_first { [state, token] } else { [token, state] };
                let both = self.one(Kind::JoinHeads { heads: 1 }, &both, "x", 2 * self.hidden);
                self.keep(both, Kept::Room);
                (self.hidden, self.linears(vec![projection], false, both, &["y"])[0])
            }
            Joining::Apart { token: of_token, state: of_state, streams } => {
                let token = self.linears(vec![of_token], false, token, &["e"])[0];
                let take = |index| self.on_streams(Streams::Take(index), &[state], "s", self.hidden);
                let each: Vec<usize> = (0..*streams).map(take).collect();
                // One weight, by which each of them is multiplied.
                let linear = Kind::Linear { linears: vec![of_state], fixed: false };
                let made = self.operation(linear, &each, &vec![("y", self.hidden); *streams]);
                let add = |state| self.one(Kind::Plus(1.0), &[state, token], "y", self.hidden);
                let each: Vec<usize> = made.into_iter().map(add).collect();
                (width, self.beside_each_other(each))
            }
        };
        self.one(Kind::Begin, &[stream, y], "h", hidden)
    }

    /// All of these side by side.
    pub(super) fn beside_each_other(&mut self, values: Vec<usize>) -> usize {
        let join = |before: usize, next: usize| {
            let width = [before, next].map(|value| self.program.values[value].width).iter().sum();
            self.one(Kind::JoinHeads { heads: 1 }, &[before, next], "co", width)
        };
        values.into_iter().reduce(join).expect("a part at least")
    }
}
