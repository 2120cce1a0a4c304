//! What Gemma 3n and 4 have beside attention and feed-forward layers, as llama.cpp calls it.

use super::{From, Lister, Part};
use crate::dialect::architectures::Need;
use crate::error::Result;
use crate::graph::{Block, Graph, Layer, Moe, PerLayer};

impl Lister {
    /// The linears of one block's share of what tokens bring along.
    pub(super) fn per_layer(&mut self, at: &str, layer: &PerLayer) -> Result<()> {
        if !(self.architecture.per_layer || self.architecture.altup) {
            return Err(self.cannot("rows of a table for the tokens in each layer"));
        }
        self.linear(&format!("{at}.inp_gate"), &layer.gate, None, Need::Never)?;
        self.linear(&format!("{at}.proj"), &layer.out, None, Need::Never)
    }

    /// The table of all blocks, and the projection and the norm beside it. Fails where the table has other rows than the embedding.
    pub(super) fn tables(&mut self, graph: &Graph) -> Result<()> {
        let mut steps = graph.blocks.iter().flat_map(|block| &block.steps);
        let found = steps.find_map(|step| if let Layer::PerLayer(layer) = &step.layer { Some(layer) } else { None });
        let Some(PerLayer { side, .. }) = found.map(|layer| &**layer) else { return Ok(()) };
        let shape = vec![side.table.rows, side.table.cols];
        if side.table.rows != graph.vocabulary {
            return Err(self.cannot(format_args!("a table of {} rows for {} tokens", shape[0], graph.vocabulary)));
        }
        let part = Part::whole(From::Tensor(side.table.tensor.clone(), shape.clone()));
        self.push("per_layer_token_embd.weight".into(), shape, vec![part]);
        let (tensor, shape) = side.projection.tensors().remove(0);
        let part = Part::whole(From::Tensor(tensor, shape.clone()));
        self.push("per_layer_model_proj.weight".into(), shape, vec![part]);
        self.norm("per_layer_proj_norm", &side.norm)
    }

    /// The number that the stream is multiplied by behind a block.
    pub(super) fn scale(&mut self, at: &str, block: &Block) -> Result<()> {
        let Some(tensor) = &block.scale else { return Ok(()) };
        if !self.architecture.per_layer {
            return Err(self.cannot("a stream that is multiplied behind a block"));
        }
        let part = Part::whole(From::Tensor(tensor.clone(), vec![1]));
        self.push(format!("{at}.layer_output_scale.weight"), vec![1], vec![part]);
        Ok(())
    }

    /// Norms within a mixture, and the factor of each expert.
    pub(super) fn within(&mut self, at: &str, moe: &Moe) -> Result<()> {
        let (Some(norms), Some((factors, shape))) = (&moe.norms, &moe.router.factors) else {
            return match (&moe.norms, &moe.router.factors) {
                (None, None) => Ok(()),
                _ => Err(self.cannot("a mixture of this form")),
            };
        };
        if !self.architecture.per_layer {
            return Err(self.cannot("a mixture whose parts have norms of their own"));
        }
        let vector = |tensor: &String, shape: &Vec<usize>| Part::whole(From::Tensor(tensor.clone(), shape.clone()));
        for tensor in &norms.router.weights {
            let part = vector(tensor, &norms.router.shape);
            self.push(format!("{at}.ffn_gate_inp.scale"), norms.router.shape.clone(), vec![part]);
        }
        self.push(format!("{at}.ffn_down_exps.scale"), shape.clone(), vec![vector(factors, shape)]);
        self.norm(&format!("{at}.pre_ffw_norm_2"), &norms.experts)?;
        self.norm(&format!("{at}.post_ffw_norm_1"), &norms.shared)?;
        self.norm(&format!("{at}.post_ffw_norm_2"), &norms.routed)
    }
}
