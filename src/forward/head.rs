//! The output projection: the largest matrix of many models, of which every logit needs one row once.

use std::sync::{Mutex, PoisonError};

use kernels::ops::widen;
use kernels::{ActivationRounding, Forward};
use ndarray::Array2;
use rayon::prelude::*;

use super::rounded;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::report::Activations;
use crate::weights::RawTensor;

/// Bytes as f32 up to which a projection is kept in memory whose rows take more than widening to read (256 MiB).
const KEPT: usize = 256 << 20;

/// Rows that are checked at a time.
const ROWS: usize = 256;

/// The output projection of a model.
pub struct LoadedHead<'a, B: Forward> {
    rows: Rows<'a, B>,
    vocabulary: usize,
    bias: Option<Vec<f32>>,
    rounding: Option<ActivationRounding>,
    scale: f32,
    softcap: Option<f32>,
}

/// Where its rows are.
enum Rows<'a, B: Forward> {
    /// On the device.
    Here(B::Weight),
    /// In the file, from which they are widened a few at a time, as often as they are used.
    There { source: &'a Checkpoint, name: String, raw: Option<RawTensor<'a>> },
}

/// The tensor that a model's projection is.
fn tensor(graph: &Graph) -> String {
    if graph.head.tied { graph.embedding.tensor.clone() } else { graph.head.linear.weight() }
}

/// Bytes that a projection takes in the host's memory when it is loaded; 0 where it is read as it is used. Without a checkpoint it is one
/// whose rows take more than widening.
pub fn kept(graph: &Graph, source: Option<&Checkpoint>) -> u64 {
    let bytes = 4 * graph.vocabulary * graph.hidden;
    let plain = source.is_some_and(|source| source.raw(&tensor(graph)).is_some());
    if plain || bytes > KEPT { 0 } else { bytes as u64 }
}

impl<'a, B: Forward> LoadedHead<'a, B> {
    /// Loads it as far as it is to be in memory. Fails on values that are not finite.
    pub fn of(backend: &B, graph: &Graph, source: &'a Checkpoint, activations: Activations) -> Result<Self> {
        let (head, name) = (&graph.head, tensor(graph));
        let bias = head.linear.bias().map(|bias| source.load(&bias)).transpose()?;
        let rounding = activations.rounding(source, &name);
        let (vocabulary, width) = (graph.vocabulary, graph.hidden);
        // A device of its own reads from its own memory only.
        let raw = source.raw(&name);
        let rows = if backend.room().is_none() && kept(graph, Some(source)) == 0 {
            let check = |from: usize| {
                let rows: Vec<u32> = (from..vocabulary.min(from + ROWS)).map(|row| row as u32).collect();
                source.load_rows(&name, &rows, &mut vec![0.0; rows.len() * width])
            };
            let starts: Vec<usize> = (0..vocabulary).step_by(ROWS).collect();
            // The first one that is wrong is told, whichever is found first.
            starts.into_par_iter().map(check).collect::<Vec<_>>().into_iter().collect::<Result<()>>()?;
            Rows::There { source, name, raw }
        } else {
            let values = source.load(&name)?;
            source.release(&name);
            let matrix = Array2::from_shape_vec((vocabulary, width), values).expect("checked");
            Rows::Here(backend.weight(backend.upload(matrix)?)?)
        };
        Ok(LoadedHead { rows, vocabulary, bias, rounding, scale: head.scale, softcap: head.softcap })
    }

    /// How many times the tokens of one product it takes at once for as long as that is no more than `most` tokens: what is read from the
    /// file should serve many.
    pub fn products_at_once(&self, tokens: usize, most: usize) -> usize {
        match self.rows {
            Rows::Here(_) => 1,
            Rows::There { .. } => (most / tokens.max(1)).max(1),
        }
    }

    /// Logits `[tokens, vocabulary]` of normed hidden states, those of `at_once` tokens as they are without the others.
    pub fn logits(&self, backend: &B, hidden: B::Matrix, at_once: usize) -> Result<B::Matrix> {
        let tokens = backend.shape(&hidden)[0];
        let x = backend.input(hidden)?;
        let rounded = rounded(backend, &x, self.rounding)?;
        let (x, bias) = (rounded.as_ref().unwrap_or(&x), self.bias.as_deref());
        let mut logits = match &self.rows {
            Rows::Here(weight) => backend.linear(x, weight, bias)?,
            Rows::There { source, name, raw } => {
                let failed: Mutex<Option<Error>> = Mutex::new(None);
                let width = backend.input_shape(x)[1].max(1);
                let read = |from: usize, out: &mut [f32]| {
                    let read = match raw {
                        Some(raw) => {
                            let row = raw.data.len() / self.vocabulary.max(1);
                            let bytes = &raw.data[from * row..][..out.len() / width * row];
                            widen::run(raw.dtype, bytes, out).map_err(Error::from)
                        }
                        None => {
                            let rows: Vec<u32> = (from..from + out.len() / width).map(|row| row as u32).collect();
                            source.load_rows(name, &rows, out)
                        }
                    };
                    if let Err(error) = read {
                        *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    }
                };
                let logits = backend.linear_by_rows(x, self.vocabulary, &read, bias, at_once)?;
                match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
                    Some(error) => return Err(error),
                    None => logits,
                }
            }
        };
        if self.scale != 1.0 {
            backend.scale(&mut logits, &vec![self.scale; tokens], &[])?;
        }
        if let Some(cap) = self.softcap {
            backend.softcap(&mut logits, cap)?;
        }
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kernels::Cpu;

    use super::*;
    use crate::families;

    #[test]
    fn logits_are_the_same_from_the_file_and_from_memory() {
        for (folder, tied) in [("checkpoints/llama_tied", true), ("checkpoints/llama_untied_gqa", false)] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder);
            let source = Checkpoint::open(&path).unwrap();
            let (graph, cpu) = (families::graph_of(&source).unwrap(), Cpu::exact());
            assert_eq!(graph.head.tied, tied);
            let there = LoadedHead::of(&cpu, &graph, &source, Activations::Exact).unwrap();
            let Rows::There { name, .. } = &there.rows else { panic!("it was loaded") };
            let whole = Array2::from_shape_vec((graph.vocabulary, graph.hidden), source.load(name).unwrap()).unwrap();
            let rows = Rows::Here(cpu.weight(whole).unwrap());
            let here = LoadedHead::<Cpu> { rows, vocabulary: graph.vocabulary, bias: there.bias.clone(), ..there };
            let there = LoadedHead::of(&cpu, &graph, &source, Activations::Exact).unwrap();
            let hidden = Array2::from_shape_fn((9, graph.hidden), |(i, j)| ((i * 31 + j * 7) % 19) as f32 / 7.0 - 1.0);
            let expected = here.logits(&cpu, hidden.clone(), 9).unwrap();
            assert!(expected.iter().any(|x| *x != 0.0));
            assert!(there.logits(&cpu, hidden, 9).unwrap() == expected, "{folder}");
            assert_eq!((there.products_at_once(32, 128), there.products_at_once(200, 128)), (4, 1));
            assert_eq!(here.products_at_once(32, 128), 1);
        }
    }
}
