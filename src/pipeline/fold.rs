//! Channel scales (AWQ): found for every slot of a block, and folded into its weights, so that its function stays.
//!
//! A slot is what some linears read in common: the output of a norm, of the values' projection, of a gate. Multiplying the readers' columns by
//! scales and dividing whatever comes before by them changes nothing but what rounding does (Lin et al. 2023, arXiv:2306.00978).

use std::collections::HashMap;
use std::time::Instant;

use calibration::solvers::recovered;
use calibration::statistics::{Needs, Statistics};
use calibration::transforms::{Awq, Slot as Scaled, Tie};
use formats::tensor::{narrow, widen};
use kernels::{Backend, GridSpec};

use super::Walk;
use crate::error::Result;
use crate::forward::{Chunk, Inputs, Supply, Weight, ready, run_block};
use crate::graph::{Block, Linear, Norm, Stored};
use crate::program::{Producer, Program, Slot};
use crate::report::SmoothingReport;
use crate::targets::plain_grid;

impl<B: Backend> Walk<'_, '_, B> {
    /// Rescales the channels of a block so that it is easier to quantize, and leaves its function as it is.
    pub fn smooth(&mut self, block: &Block, chunks: &[Chunk<B::Matrix>]) -> Result<()> {
        let backend = self.backend;
        let mut copies = chunks.iter().map(|chunk| chunk.copy(backend)).collect::<Result<Vec<_>>>()?;
        let source = self.source;
        let mut seen = FloatPass { walk: self, statistics: HashMap::new() };
        run_block(backend, block, source, &mut seen, &mut copies)?;
        let statistics = seen.statistics;
        let started = Instant::now();
        for linear in block.linears() {
            let weight = self.load(linear)?;
            self.prepared.insert(linear.module.clone(), weight);
        }
        let program = Program::of(block).expect("refused when the sequences were embedded");
        for Slot { producer, readers } in program.slots() {
            match producer {
                Producer::Norm(norm) => self.smooth_norm(norm, &readers, &statistics)?,
                Producer::Linear { linear, part, heads } => {
                    let tie = heads.map_or(Tie::Free, |(head_dim, repeat)| Tie::Heads { head_dim, repeat });
                    self.smooth_linear(linear, part, &readers, tie, &statistics)?;
                }
            }
        }
        self.shared.smooth += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Folds scales of the inputs of `readers` into the normalisation before them.
    fn smooth_norm(&mut self, norm: &Norm, readers: &[&Linear], seen: &HashMap<String, Statistics<B>>) -> Result<()> {
        let Some(producer) = self.smooth_readers(readers, Tie::Free, &norm.weights[0], seen)? else { return Ok(()) };
        let mut weight = self.source.load(&norm.weights[0])?;
        weight.iter_mut().zip(&producer).for_each(|(w, t)| *w = (*w + norm.offset) / t - norm.offset);
        self.store(&norm.weights[0], weight)?;
        if let Some(bias) = &norm.bias {
            let mut values = self.source.load(bias)?;
            values.iter_mut().zip(&producer).for_each(|(b, t)| *b /= t);
            self.store(bias, values)?;
        }
        Ok(())
    }

    /// Folds scales of the inputs of `readers` into the output rows of a part of `producer`.
    fn smooth_linear(
        &mut self,
        producer: &Linear,
        part: usize,
        readers: &[&Linear],
        tie: Tie,
        seen: &HashMap<String, Statistics<B>>,
    ) -> Result<()> {
        // A producer that is written in the model's own type would be rounded once more.
        if self.grid(producer).is_none() {
            return Ok(());
        }
        // A bias that lies in a stack with others is read from there.
        if let Stored::Slice { bias: Some(_), .. } = producer.stored {
            return Ok(());
        }
        let Some(scales) = self.smooth_readers(readers, tie, &producer.module, seen)? else { return Ok(()) };
        let mut inverse = vec![1.0; producer.rows];
        match producer.split.rows(part) {
            Some(rows) => rows.into_iter().zip(&scales).for_each(|(row, t)| inverse[row] = 1.0 / t),
            None => inverse.iter_mut().zip(&scales).for_each(|(row, t)| *row = 1.0 / t),
        }
        let weight = self.prepared.get_mut(&producer.module).expect("prepared");
        self.backend.scale(&mut weight.matrix, &inverse, &[])?;
        if let (Some(bias), Some(name)) = (&mut weight.bias, producer.bias()) {
            bias.iter_mut().zip(&inverse).for_each(|(b, t)| *b *= t);
            let mut bias = bias.clone();
            self.round_to_file(&mut bias)?;
            self.prepared.get_mut(&producer.module).expect("prepared").bias = Some(bias.clone());
            self.folded.change(name, bias);
        }
        Ok(())
    }

    /// Searches the scales of one slot and multiplies the readers' columns; `None` when there is nothing to fold.
    fn smooth_readers(
        &mut self,
        readers: &[&Linear],
        tie: Tie,
        producer: &str,
        seen: &HashMap<String, Statistics<B>>,
    ) -> Result<Option<Vec<f32>>> {
        let Some(statistics) = seen.get(&readers[0].module).filter(|s| s.tokens > 0) else { return Ok(None) };
        let mut specs = Vec::new();
        for reader in readers {
            match self.grid(reader) {
                Some(spec) => specs.push(spec),
                // A reader that stays as it is would be rounded in the model's own type after the scaling.
                None => return Ok(None),
            }
        }
        // Scales would move weights off a grid on which they lie to the bit.
        let mut on_grid = true;
        for (reader, spec) in readers.iter().zip(&specs) {
            on_grid = on_grid && recovered(self.backend, &self.prepared[&reader.module].matrix, spec)?.is_some();
        }
        if on_grid {
            return Ok(None);
        }
        let weights = readers.iter().map(|l| &self.prepared[&l.module].matrix);
        let slot = Scaled { readers: weights.zip(&specs).collect(), statistics, tie };
        let found = Awq::default().scales(self.backend, &slot)?;
        self.tasks[self.lead].done.smoothings.push(SmoothingReport {
            producer: producer.to_owned(),
            readers: readers.iter().map(|l| l.module.clone()).collect(),
            alpha: found.alpha,
            loss_ratio: if found.loss[0] > 0.0 { found.loss[1] / found.loss[0] } else { 1.0 },
        });
        if found.alpha == 0.0 {
            return Ok(None);
        }
        for reader in readers {
            let weight = self.prepared.get_mut(&reader.module).expect("prepared");
            self.backend.scale(&mut weight.matrix, &[], &found.reader)?;
        }
        Ok(Some(found.producer))
    }

    /// Remembers a changed tensor as the file will hold it, so that the stream sees exactly that.
    fn store(&mut self, name: &str, mut values: Vec<f32>) -> Result<()> {
        self.round_to_file(&mut values)?;
        self.folded.change(name.to_owned(), values);
        Ok(())
    }

    fn round_to_file(&self, values: &mut [f32]) -> Result<()> {
        let mut bytes = Vec::new();
        let dtype = self.tasks[self.lead].target.float_dtype();
        narrow(dtype, values, &mut bytes)?;
        Ok(widen(dtype, &bytes, values)?)
    }

    /// The grid on which the leading target's codes of a linear lie, or one like it; `None` for one that gets no codes.
    fn grid(&self, linear: &Linear) -> Option<GridSpec> {
        plain_grid(&self.tasks[self.lead].target.placements(linear).first()?.encoding, linear.cols)
    }
}

/// Runs a float block and keeps the statistics of every input.
struct FloatPass<'w, 'h, 'a, B: Backend> {
    walk: &'w mut Walk<'h, 'a, B>,
    statistics: HashMap<String, Statistics<B>>,
}

impl<B: Backend> Supply<B> for FloatPass<'_, '_, '_, B> {
    fn vector(&mut self, name: &str) -> Result<Vec<f32>> {
        self.walk.vector(name)
    }

    fn linears(&mut self, group: &[&Linear], inputs: &Inputs<'_, B::Input>) -> Result<Vec<Weight<B::Weight>>> {
        if group.iter().any(|linear| self.walk.grid(linear).is_some()) {
            let statistics = self.walk.observer.gather(group[0], Needs::HessianAndMagnitude, inputs)?;
            self.statistics.insert(group[0].module.clone(), statistics);
        }
        let mut weights = Vec::new();
        for linear in group {
            weights.extend(ready(self.walk.backend, linear, self.walk.load(linear)?)?);
        }
        Ok(weights)
    }

    fn router(&mut self, linear: &Linear) -> Result<Vec<Weight<B::Weight>>> {
        self.walk.router(linear)
    }

    fn needs_output(&self) -> bool {
        false
    }
}
