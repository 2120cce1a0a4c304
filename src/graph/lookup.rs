//! What a block makes of the ids of its tokens, beside the stream: rows of tables.

use std::ops::Range;

use kernels::Activation;

use super::{Linear, Norm};

/// Columns of the rows that a table has for tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Lookup {
    /// Tensor, `[rows, cols]`.
    pub tensor: String,
    /// A row for each id; a token whose id is beyond them has that of the first.
    pub rows: usize,
    /// Width of the table.
    pub cols: usize,
    /// Which of its columns.
    pub columns: Range<usize>,
    /// What every value is multiplied by.
    pub scale: f32,
}

impl Lookup {
    /// All columns of a table, as they are.
    pub fn whole(tensor: String, [rows, cols]: [usize; 2]) -> Lookup {
        Lookup { tensor, rows, cols, columns: 0..cols, scale: 1.0 }
    }

    /// Its tensor with its shape.
    pub(super) fn described(&self) -> (String, Vec<usize>) {
        (self.tensor.clone(), vec![self.rows, self.cols])
    }
}

/// A step that adds what a table has for the tokens, as far as the stream lets it through: `out(act(gate(h)) · side)` (Gemma's per-layer
/// embeddings).
#[derive(Clone, Debug)]
pub struct PerLayer {
    /// From the stream, `[width, hidden]`.
    pub gate: Linear,
    /// What is done to the gate before it multiplies.
    pub activation: Activation,
    /// What the gate multiplies.
    pub side: Side,
    /// Back to the stream, `[hidden, width]`.
    pub out: Linear,
}

/// What a block is given of its tokens: `table + share · norm(projection(embedding))`. It hangs on ids alone, so that it is made where it is
/// needed instead of being kept for every block.
#[derive(Clone, Debug)]
pub struct Side {
    /// The block's part of the table of all blocks.
    pub table: Lookup,
    /// What tokens were before the first block.
    pub embedding: Lookup,
    /// Of the embedding, the rows of this block in the projection of all blocks; never quantized.
    pub projection: Linear,
    /// Of what is projected.
    pub norm: Norm,
    /// What that is multiplied by.
    pub share: f32,
}

impl PerLayer {
    /// Its linears that may be quantized, those that read one input together.
    pub(super) fn linears(&self) -> Vec<Vec<&Linear>> {
        vec![vec![&self.gate], vec![&self.out]]
    }

    /// The tables, with their shapes.
    pub(super) fn tables(&self) -> Vec<(String, Vec<usize>)> {
        let Side { table, embedding, .. } = &self.side;
        [table, embedding].map(Lookup::described).to_vec()
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        [&mut self.gate, &mut self.side.projection, &mut self.out].into_iter().for_each(change);
    }

    /// Gives every tensor that is no linear's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        let Side { table, embedding, norm, .. } = &mut self.side;
        [&mut table.tensor, &mut embedding.tensor].into_iter().chain(&mut norm.weights).for_each(|t| *t = name(t));
    }
}
