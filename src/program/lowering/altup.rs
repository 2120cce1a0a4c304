//! Blocks whose steps work on one of several streams.

use super::Lowering;
use crate::graph::{AltUp, Block, Laurel, Layer, Linear};
use crate::program::{Kept, Kind, Program, Streams};

impl<'b> Lowering<'b> {
    /// All of such a block; `None` for a layer that cannot stand in it.
    pub(super) fn altup(&mut self, block: &'b Block, altup: &'b AltUp) -> Option<()> {
        let before = if altup.widen.is_empty() { altup.count } else { 1 };
        let first = self.value("h", before * self.hidden, None);
        debug_assert_eq!(first, Program::STREAM);
        let widened = self.widened(altup, first);
        let stream = self.predicted(altup, widened);
        let mut one = self.on_streams(Streams::Take(altup.active), &[stream], "a", self.hidden);
        let mut corrected = None;
        for (index, step) in block.steps.iter().enumerate() {
            if let Layer::PerLayer(layer) = &step.layer {
                // It reads what has come of the block, and tells the other streams.
                let stream = corrected.unwrap_or_else(|| self.corrected(altup, stream, one));
                let mut x = self.on_streams(Streams::Take(altup.active), &[stream], "a", self.hidden);
                if let Some((tensor, _)) = &altup.scale {
                    x = self.on_streams(Streams::Times(tensor), &[x], "a", self.hidden);
                }
                let x = self.norm(step.pre.as_ref(), x, "x");
                let y = self.per_layer(layer, x);
                let y = self.norm(step.post.as_ref(), y, "y");
                let told = self.on_streams(Streams::Others, &[stream, y], "s", altup.count * self.hidden);
                corrected = Some(self.begin(stream, told));
                continue;
            }
            if index > 0 {
                // Made once, as the products before it are wide.
                self.keep(one, Kept::Always);
            }
            let x = self.norm(step.pre.as_ref(), one, "x");
            let y = self.layer(&step.layer, x)?;
            let y = self.norm(step.post.as_ref(), y, "y");
            one = match index {
                0 => {
                    let Laurel { left, right, norm, share } = &altup.laurel;
                    let narrow = self.linears(vec![left], true, x, &["l"])[0];
                    let low = self.linears(vec![right], true, narrow, &["l"])[0];
                    let low = self.norm(Some(norm), low, "l");
                    self.on_streams(Streams::Join(*share), &[one, y, x, low], "a", self.hidden)
                }
                _ => self.on_streams(Streams::Join(1.0), &[one, y], "a", self.hidden),
            };
        }
        let stream = corrected.unwrap_or_else(|| self.corrected(altup, stream, one));
        self.narrowed(altup, stream);
        Some(())
    }

    pub(super) fn on_streams(&mut self, what: Streams<'b>, reads: &[usize], name: &'static str, width: usize) -> usize {
        self.one(Kind::Streams(self.hidden, what), reads, name, width)
    }

    /// A value in the place of the stream.
    fn begin(&mut self, stream: usize, value: usize) -> usize {
        let width = self.program.values[value].width;
        self.one(Kind::Begin, &[stream, value], "h", width)
    }

    /// Values side by side.
    fn joined(&mut self, first: usize, others: Vec<usize>) -> usize {
        others.into_iter().fold(first, |all, next| {
            let width = self.program.values[all].width + self.program.values[next].width;
            self.one(Kind::JoinHeads { heads: 1 }, &[all, next], "s", width)
        })
    }

    /// All streams, of the only one that there is before the first block.
    fn widened(&mut self, altup: &'b AltUp, stream: usize) -> usize {
        if altup.widen.is_empty() {
            return stream;
        }
        let names = vec!["s"; altup.widen.len()];
        let others = self.linears(altup.widen.iter().collect(), true, stream, &names);
        let all = self.joined(stream, others);
        let width = self.program.values[all].width;
        let all = self.on_streams(Streams::Match, &[all], "s", width);
        self.begin(stream, all)
    }

    /// What a stream says of all: as many numbers as there are, each from −1 to 1, through a linear.
    fn said(&mut self, altup: &'b AltUp, one: usize, linear: &'b Linear) -> usize {
        let normed = self.norm(Some(&altup.norm), one, "n");
        let given = self.scaled(normed, altup.given);
        let routed = self.linears(vec![&altup.router], true, given, &["m"])[0];
        let routed = self.on_streams(Streams::Tanh, &[routed], "m", altup.count);
        self.linears(vec![linear], true, routed, &["c"])[0]
    }

    fn predicted(&mut self, altup: &'b AltUp, stream: usize) -> usize {
        let one = self.on_streams(Streams::Take(altup.active), &[stream], "a", self.hidden);
        let coefficients = self.said(altup, one, &altup.predict);
        let width = altup.count * self.hidden;
        let all = self.on_streams(Streams::Predict, &[stream, stream, coefficients], "s", width);
        self.begin(stream, all)
    }

    /// All streams with what has become of the one that was worked on.
    fn corrected(&mut self, altup: &'b AltUp, stream: usize, one: usize) -> usize {
        let coefficients = self.said(altup, one, &altup.correct);
        let before = self.on_streams(Streams::Take(altup.active), &[stream], "a", self.hidden);
        let new = self.one(Kind::Plus(-1.0), &[one, before], "i", self.hidden);
        let width = altup.count * self.hidden;
        let all = self.on_streams(Streams::Correct, &[stream, new, coefficients], "s", width);
        self.begin(stream, all)
    }

    /// The only stream that there is behind the last block.
    fn narrowed(&mut self, altup: &'b AltUp, stream: usize) {
        if altup.narrow.is_empty() {
            return;
        }
        let first = self.on_streams(Streams::Take(0), &[stream], "a", self.hidden);
        let mut others = Vec::new();
        for (index, linear) in altup.narrow.iter().enumerate() {
            let other = self.on_streams(Streams::Take(index + 1), &[stream], "a", self.hidden);
            others.push(self.linears(vec![linear], true, other, &["s"])[0]);
        }
        let all = self.joined(first, others);
        let width = self.program.values[all].width;
        let all = self.on_streams(Streams::Match, &[all], "s", width);
        let mean = self.on_streams(Streams::Mean, &[all], "a", self.hidden);
        self.begin(stream, mean);
    }
}
