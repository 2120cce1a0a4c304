//! What the operations of attention to a choice of tokens do to one chunk.

use kernels::{ActivationRounding, AttentionShape, Entries, Forward, IndexShape};
use ndarray::Array2;

use super::run::{Read, Run};
use crate::error::Result;
use crate::program::Kind;

impl<'b, B: Forward> Run<'_, 'b, B> {
    /// What attention is to see, of an indexer's queries, keys and weights; a matrix without columns where that is everything. It is left in
    /// the chunk where layers behind this one take it over.
    pub fn choice(&self, index: usize, reads: Vec<Read<'_, B>>, shape: &IndexShape, shared: bool) -> Result<B::Matrix> {
        let (backend, chunk) = (self.backend, &self.chunks[index]);
        let chosen = match sees_all(shape, &chunk.lengths) {
            true => backend.zeros(chunk.lengths.iter().sum(), 0)?,
            false => {
                // Without weights all heads weigh the same, unless each chooses by itself.
                let alike = match reads.len() < 3 && !shape.apart {
                    true => Some(backend.upload(Array2::ones((chunk.lengths.iter().sum(), shape.heads)))?),
                    false => None,
                };
                let weights = reads.get(2).map(Read::matrix).or(alike.as_ref());
                backend.select(reads[0].matrix(), reads[1].matrix(), weights, shape, &chunk.lengths)?
            }
        };
        if shared {
            *chunk.chosen.borrow_mut() = Some(backend.copy(&chosen)?);
        }
        Ok(chosen)
    }

    /// One key for each whole block of tokens, at its last.
    pub fn pooled(&self, at: usize, keys: &B::Matrix, gates: &B::Matrix, lengths: &[usize]) -> Result<B::Matrix> {
        let places = self.vector(at).unwrap_or_default();
        let [_, width] = self.backend.shape(keys);
        let Kind::Pool(pool) = self.program.operations[at].kind else { unreachable!("what pools") };
        Ok(self.backend.pool_blocks(keys, gates, places, places.len() / width.max(1), pool.overlap, lengths)?)
    }

    /// What the last layer with an indexer left in the chunk.
    pub fn earlier_choice(&self, index: usize) -> Result<B::Matrix> {
        let chosen = self.chunks[index].chosen.borrow();
        Ok(self.backend.copy(chosen.as_ref().expect("an indexer was run before"))?)
    }

    /// Attention of whatever its operation reads.
    pub fn see(&self, at: usize, reads: Vec<Read<'_, B>>, lengths: &[usize]) -> Result<B::Input> {
        let Kind::Attention { shape, index, block, .. } = &self.program.operations[at].kind else {
            unreachable!("what attends")
        };
        let mut reads = reads.into_iter();
        let mut next = || reads.next().expect("as many as it reads");
        let qkv = [self.own(next())?, self.own(next())?, self.own(next())?];
        let chosen = index.as_ref().map(|index| (index, next()));
        match block {
            Some(block) => self.attend_beside(at, qkv, chosen, (self.own(next())?, *block), shape, lengths),
            None => self.attend(at, qkv, chosen, shape, lengths),
        }
    }

    /// Attention of queries, keys and values, to a choice of tokens where there is one and it leaves something out.
    fn attend(
        &self,
        at: usize,
        [q, mut k, mut v]: [B::Matrix; 3],
        chosen: Option<(&IndexShape, Read<'_, B>)>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<B::Input> {
        let backend = self.backend;
        if self.rounds_cache {
            // As a cache in half precision keeps them.
            backend.round_values(&mut k, ActivationRounding::F16)?;
            backend.round_values(&mut v, ActivationRounding::F16)?;
        }
        Ok(match chosen {
            Some((index, chosen)) if !sees_all(index, lengths) => {
                backend.attention_to([&q, &k, &v], chosen.matrix(), self.vector(at), shape, index, lengths)?
            }
            _ => backend.attention(&q, &k, &v, self.vector(at), shape, lengths)?,
        })
    }

    /// The same to a window of tokens, and to entries that stand for blocks of so many tokens.
    fn attend_beside(
        &self,
        at: usize,
        [q, mut k, mut v]: [B::Matrix; 3],
        chosen: Option<(&IndexShape, Read<'_, B>)>,
        (mut values, block): (B::Matrix, usize),
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<B::Input> {
        let backend = self.backend;
        if self.rounds_cache {
            for cached in [&mut k, &mut v, &mut values] {
                backend.round_values(cached, ActivationRounding::F16)?;
            }
        }
        let chosen = chosen.as_ref().filter(|(index, _)| !sees_all(index, lengths)).map(|(_, chosen)| chosen.matrix());
        let entries = Entries { values: &values, block, chosen };
        Ok(backend.attention_beside([&q, &k, &v], &entries, self.vector(at), shape, lengths)?)
    }
}

fn sees_all(shape: &IndexShape, lengths: &[usize]) -> bool {
    lengths.iter().all(|length| shape.sees_all(*length))
}
