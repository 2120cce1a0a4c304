//! What the operations of attention to a choice of tokens do to one chunk.

use kernels::{AttentionShape, Forward, IndexShape};

use super::run::{Read, Run};
use crate::error::Result;

impl<'b, B: Forward> Run<'_, 'b, B> {
    /// What attention is to see, of an indexer's queries, keys and weights; a matrix without columns where that is everything. It is left in
    /// the chunk where layers behind this one take it over.
    pub fn choice(&self, index: usize, reads: Vec<Read<'_, B>>, shape: &IndexShape, shared: bool) -> Result<B::Matrix> {
        let (backend, chunk) = (self.backend, &self.chunks[index]);
        let chosen = match sees_all(shape, &chunk.lengths) {
            true => backend.zeros(chunk.lengths.iter().sum(), 0)?,
            false => {
                let weights = reads.get(2).map(Read::matrix);
                backend.select(reads[0].matrix(), reads[1].matrix(), weights, shape, &chunk.lengths)?
            }
        };
        if shared {
            *chunk.chosen.borrow_mut() = Some(backend.copy(&chosen)?);
        }
        Ok(chosen)
    }

    /// What the last layer with an indexer left in the chunk.
    pub fn earlier_choice(&self, index: usize) -> Result<B::Matrix> {
        let chosen = self.chunks[index].chosen.borrow();
        Ok(self.backend.copy(chosen.as_ref().expect("an indexer was run before"))?)
    }

    /// Attention to a choice, or to all where nothing is left out.
    pub fn attend_to(
        &self,
        qkv: [&B::Matrix; 3],
        chosen: &B::Matrix,
        shape: &AttentionShape,
        index: &IndexShape,
        lengths: &[usize],
    ) -> Result<B::Input> {
        let [q, k, v] = qkv;
        Ok(match sees_all(index, lengths) {
            true => self.backend.attention(q, k, v, None, shape, lengths)?,
            false => self.backend.attention_to(qkv, chosen, shape, index, lengths)?,
        })
    }
}

fn sees_all(shape: &IndexShape, lengths: &[usize]) -> bool {
    lengths.iter().all(|length| shape.sees_all(*length))
}
