//! Streams that hyper-connections read and write, as llama.cpp's classes of Hunyuan 4, GLM-5.3-Flash and Qwen 4 have them, and tables for tokens in a row.

use super::{From, Lister, Need, Part};
use crate::error::Result;
use crate::graph::{Collapse, Connection, Gated, GramLayer, Hyper};

/// Rows for tokens in a row.
const TABLE: &str = "per_layer_token_embd.weight";

impl Lister {
    /// How a step reads and writes streams, under names that begin so.
    pub(super) fn connection(&mut self, start: &str, connection: &Connection) -> Result<()> {
        match connection {
            Connection::Weighed(hyper) => self.hyper(start, hyper),
            Connection::Gated(gated) => self.gated(start, gated),
        }
    }

    /// What makes gates of streams, and weights of what is written. The norm before is the step's, or the last one.
    fn gated(&mut self, start: &str, gated: &Gated) -> Result<()> {
        if self.architecture.id != "qwen4exp" {
            return Err(self.cannot("streams with a gate for each value"));
        }
        for (name, linear) in ["down", "up", "inject"].into_iter().zip(gated.linears()) {
            self.linear(&format!("{start}_{name}"), linear, None, Need::Never)?;
        }
        Ok(())
    }

    /// What adds rows of a table for tokens in a row, whose parts become one tensor.
    ///
    /// Fails for rows that are not as wide together as the stream, and for more of them than llama.cpp has room for.
    pub(super) fn grams(&mut self, at: &str, layer: &GramLayer, hidden: usize) -> Result<()> {
        let GramLayer { grams, key, value, norms, convolution } = layer;
        let (order, heads) = (grams.multipliers.len(), grams.sizes.len());
        if self.architecture.id != "qwen4exp" {
            return Err(self.cannot("rows of a table for tokens in a row"));
        }
        let limits = [
            (key.cols != hidden, format!("ple_embed_dim {} beside a hidden_size of {hidden}", key.cols)),
            (order > 8, format!("ngram_size {order}, where 8 is the most")),
            (heads > 64, format!("{heads} heads, (ngram_size - 1) · heads_per_ngram, where 64 are the most")),
            (self.tensors.iter().any(|tensor| tensor.gguf == TABLE), "several layers in ple_layer_ids".to_owned()),
        ];
        if let Some((_, why)) = limits.iter().find(|(beyond, _)| *beyond) {
            return Err(self.cannot(format_args!("tables for tokens in a row with {why},")));
        }
        let own = |tensor: &String, shape: &[usize]| Part::whole(From::Tensor(tensor.clone(), shape.to_vec()));
        let rows = grams.parts.iter().map(|(_, rows)| rows).sum();
        let parts = grams.parts.iter().map(|(tensor, rows)| own(tensor, &[*rows, grams.cols])).collect();
        self.push(TABLE.to_owned(), vec![rows, grams.cols], parts);
        for (name, linear) in [("key", key), ("value", value)] {
            self.linear(&format!("{at}.ple_{name}"), linear, None, Need::Never)?;
        }
        for (name, norm) in ["key", "query", "conv"].into_iter().zip(norms) {
            self.norm(&format!("{at}.ple_norm_{name}"), norm)?;
        }
        for (tensor, channels) in &convolution.tensors {
            let part = own(tensor, &[*channels, 1, convolution.taps]);
            self.push(format!("{at}.ple_conv1d.weight"), vec![*channels, convolution.taps], vec![part]);
        }
        Ok(())
    }

    /// What makes the weights of a step, whose names begin so.
    fn hyper(&mut self, start: &str, hyper: &Hyper) -> Result<()> {
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
        match collapse {
            Collapse::Weighed(hyper) => self.hyper("output_hc", hyper),
            Collapse::Gated(gated) => self.gated("output_hc", gated),
            Collapse::Mean(_) if self.architecture.id == "glm5-next" => Ok(()),
            Collapse::Mean(_) => Err(self.cannot("the mean of several streams")),
        }
    }
}
