//! What blocks are given beside the stream: rows of tables for the ids of tokens, and keys and values of earlier blocks.

use std::ops::Range;

use kernels::Forward;
use ndarray::Array2;
use rayon::prelude::*;

use super::run::{Read, Run};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::graph::{Grams, Lookup};
use crate::program::Kind;

/// Rows that one thread reads at a time.
const ROWS: usize = 256;

/// These columns of the rows `ids` of a table into `out` (`[ids.len(), columns]`).
pub fn rows(source: &Checkpoint, tensor: &str, ids: &[u32], columns: Range<usize>, out: &mut [f32]) -> Result<()> {
    let width = columns.len();
    let parts = out.par_chunks_mut((ROWS * width).max(1)).zip(ids.par_chunks(ROWS));
    parts.try_for_each(|(out, ids)| source.load_columns(tensor, ids, columns.clone(), out))
}

impl<'b, B: Forward> Run<'_, 'b, B> {
    /// Does one of these operations for a chunk; `next` gives what it reads, one after the other.
    pub fn beside<'m>(&self, at: usize, mut next: impl FnMut() -> Read<'m, B>, index: usize) -> Result<Vec<B::Matrix>>
    where
        B: 'm,
    {
        let (backend, chunk) = (self.backend, &self.chunks[index]);
        Ok(match &self.program.operations[at].kind {
            Kind::Lookup(table) => vec![lookup(backend, self.source, table, &chunk.tokens)?],
            Kind::Grams(grams) => vec![gram_rows(backend, self.source, grams, &chunk.tokens, &chunk.lengths)?],
            Kind::Shared(block) => {
                chunk.shared[block].iter().map(|value| Ok(backend.copy(value)?)).collect::<Result<_>>()?
            }
            Kind::Plus(scale) => {
                let (mut x, y) = (self.own(next())?, next());
                backend.add_scaled(y.matrix(), *scale, &mut x)?;
                vec![x]
            }
            _ => unreachable!("one of these"),
        })
    }
}

/// What a table has for these tokens, `[tokens, columns]`.
fn lookup<B: Forward>(backend: &B, source: &Checkpoint, table: &Lookup, ids: &[u32]) -> Result<B::Matrix> {
    let width = table.columns.len();
    let ids: Vec<u32> = ids.iter().map(|id| if (*id as usize) < table.rows { *id } else { 0 }).collect();
    let mut found = vec![0.0; ids.len() * width];
    rows(source, &table.tensor, &ids, table.columns.clone(), &mut found)?;
    if table.scale != 1.0 {
        found.iter_mut().for_each(|x| *x *= table.scale);
    }
    Ok(backend.upload(Array2::from_shape_vec((ids.len(), width), found).expect("a row for each token"))?)
}

/// What a table has for the tokens and those before them in sequences of these lengths, `[tokens, heads · cols]`.
fn gram_rows<B: Forward>(
    backend: &B,
    source: &Checkpoint,
    grams: &Grams,
    ids: &[u32],
    lengths: &[usize],
) -> Result<B::Matrix> {
    let (found, width) = (grams.rows(ids, lengths), grams.cols);
    let mut out = vec![0.0; found.len() * width];
    let mut first = 0;
    for (tensor, count) in &grams.parts {
        // Those of one part are read together.
        let here: Vec<usize> = (0..found.len()).filter(|at| (first..first + count).contains(&found[*at])).collect();
        let own: Vec<u32> = here.iter().map(|at| (found[*at] - first) as u32).collect();
        let mut read = vec![0.0; own.len() * width];
        rows(source, tensor, &own, 0..width, &mut read)?;
        for (at, row) in here.into_iter().zip(read.chunks_exact(width)) {
            out[at * width..][..width].copy_from_slice(row);
        }
        first += count;
    }
    let shape = (ids.len(), grams.width());
    Ok(backend.upload(Array2::from_shape_vec(shape, out).expect("a row for each head of each token"))?)
}
