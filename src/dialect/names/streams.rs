//! Streams that hyper-connections read and write, as llama.cpp's classes of Hunyuan 4 and GLM-5.3-Flash have them, and indexers beside them.

use super::{From, Lister, Need, Part};
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
            None if self.architecture.id == "glm5-next" && matches!(collapse, Collapse::Mean(_)) => Ok(()),
            None => Err(self.cannot("the mean of several streams, or with gates")),
        }
    }

    /// What chooses the tokens that attention sees.
    ///
    /// Fails for indexers of another form than the classes of DeepSeek V3.2, GLM-5 and GLM-5.3-Flash have.
    pub(super) fn indexer(&mut self, at: &str, attention: &Attention, indexer: &Indexer) -> Result<()> {
        let (Some(keys), Some(weights), None) = (&indexer.k, &indexer.weights, &indexer.q_norm) else {
            return Err(self.cannot("an indexer of this form"));
        };
        self.pool(at, indexer)?;
        // llama.cpp turns queries and keys by a Hadamard matrix of this width, and aborts over others; single keys of blocks it does not turn.
        let width = indexer.shape.head_dim;
        if indexer.pool.is_none() && (width < 64 || !width.is_power_of_two()) {
            return Err(self.cannot(format_args!("an indexer with heads of {width} values")));
        }
        let order = self.turned(attention, indexer);
        for (name, linear) in [("attn_q_b", &indexer.q), ("attn_k", keys)] {
            let rows = order.as_ref().map(|order| order(linear.rows));
            self.linear(&format!("{at}.indexer.{name}"), linear, rows, Need::Never)?;
        }
        self.linear(&format!("{at}.indexer.proj"), weights, None, Need::Never)?;
        self.norm_of(&format!("{at}.indexer.k_norm"), &indexer.k_norm, order.map(|order| order(width)))
    }

    /// What makes one key of those of a block of tokens.
    fn pool(&mut self, at: &str, indexer: &Indexer) -> Result<()> {
        let Some(pool) = &indexer.pool else { return Ok(()) };
        if self.architecture.id != "glm5-next" {
            return Err(self.cannot("an indexer with one key for a block of tokens"));
        }
        self.linear(&format!("{at}.indexer_compressor_gate"), &pool.gate, None, Need::Never)?;
        let shape = vec![indexer.shape.block, indexer.shape.head_dim];
        let part = Part::whole(From::Tensor(pool.places.clone(), shape.clone()));
        self.push(format!("{at}.indexer_compressor_ape.weight"), shape, vec![part]);
        Ok(())
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
