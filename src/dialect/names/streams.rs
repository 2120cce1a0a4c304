//! Streams that hyper-connections read and write, as llama.cpp's class of Hunyuan 4 has them.

use super::{From, Lister, Part};
use crate::error::Result;
use crate::graph::{Attention, Collapse, Hyper, Indexer};

impl Lister {
    /// What makes the weights of a step, whose names begin so.
    pub(super) fn hyper(&mut self, start: &str, hyper: &Hyper) -> Result<()> {
        if !self.architecture.streams {
            return Err(self.cannot("a stream of several hidden states"));
        }
        let (weights, width) = (hyper.shape.weights(), hyper.shape.streams * hyper.hidden);
        for (name, tensor, shape) in [
            ("fn", &hyper.projection, vec![weights, width]),
            ("base", &hyper.base, vec![weights]),
            ("scale", &hyper.scale, vec![hyper.shape.kinds()]),
        ] {
            let part = Part::whole(From::Tensor(tensor.clone(), shape.clone()));
            self.push(format!("{start}_{name}.weight"), shape, vec![part]);
        }
        Ok(())
    }

    /// What makes one hidden state of all streams.
    pub(super) fn collapse(&mut self, collapse: &Collapse) -> Result<()> {
        match collapse.hyper() {
            Some(hyper) => self.hyper("output_hc", hyper),
            None => Err(self.cannot("the mean of several streams, or with gates")),
        }
    }

    /// The order of the rows of an indexer's heads where the runtime turns neighbours in them as in attention, and the model halves.
    pub(super) fn turned(
        &self,
        attention: &Attention,
        indexer: &Indexer,
    ) -> Option<impl Fn(usize) -> Vec<usize> + use<>> {
        let (width, first) = (indexer.shape.head_dim, indexer.layout.first);
        let pairs = attention.rope.as_ref()?.inverse_frequencies.len();
        let within = move |at: usize| match at.checked_sub(first).filter(|at| *at < 2 * pairs) {
            Some(at) => first + at % 2 * pairs + at / 2,
            None => at,
        };
        let order = move |rows: usize| (0..rows).map(|row| row / width * width + within(row % width)).collect();
        (self.architecture.streams && !indexer.layout.interleaved).then_some(order)
    }
}
