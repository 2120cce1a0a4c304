//! Attention whose keys are its values, to a window of tokens and to what stands for blocks of tokens (DeepSeek V4).
//!
//! ```text
//! q = turn(norm(q_b(norm(q_a(x)))))
//! k = v = turn(norm(kv(x)))                             # one head, which all heads of queries share
//! entries = turn(norm(pool(kv'(x), gate'(x))))          # one for each whole block of tokens, as if it stood at the first of them
//! y = o(narrow(turn_back(attention(q, k, v, entries))))
//! ```
//!
//! Values are turned as keys are, and so what is attended to is turned back by the query's own position: what a token gives depends on how far it is away.

use super::{Linear, Norm, Pool};

/// Queries through a latent, and one vector that is key and value of all heads.
#[derive(Clone, Debug)]
pub struct Joint {
    /// From the input to the queries' latent, and from that to the queries.
    pub q: [Linear; 2],
    /// Of the latent.
    pub q_norm: Norm,
    /// From the input to the keys, which are the values, too.
    pub kv: Linear,
    /// Behind what is attended to: each part of its rows reads what one group of heads has, and makes a part of what the output projection reads.
    pub narrow: Linear,
}

/// What makes entries that stand for blocks of tokens. None of it is ever quantized: it is small, and all of a text but its end is seen through it.
#[derive(Clone, Debug)]
pub struct Compressor {
    /// From the input to what is summed up.
    pub kv: Linear,
    /// How each token of a block is weighed in that sum.
    pub pool: Pool,
    /// Of the sum.
    pub norm: Norm,
    /// Tokens of a block.
    pub block: usize,
}

impl Joint {
    /// Its linears, those that read one input together, but for the output projection.
    pub fn linears(&self) -> Vec<Vec<&Linear>> {
        vec![vec![&self.q[0], &self.kv], vec![&self.q[1]], vec![&self.narrow]]
    }
}

impl Compressor {
    /// Its linears.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        [&self.kv, &self.pool.gate].into_iter()
    }

    /// The same, to be changed.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        [&mut self.kv, &mut self.pool.gate].into_iter()
    }

    /// Its tensor that is no linear and no norm, with its shape.
    pub(super) fn vectors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        [(self.pool.places.clone(), vec![self.block, self.kv.rows])].into_iter()
    }
}
