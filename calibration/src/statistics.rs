//! What the input of a linear looked like over the calibration tokens.

use kernels::Quantize;
use ndarray::Array2;

/// How much of the input a method wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// Nothing: no forward pass at all.
    Nothing,
    /// The mean square of each channel (what llama.cpp calls the importance matrix).
    Moments,
    /// All second moments.
    Hessian,
    /// All second moments, and the mean magnitude of each channel.
    HessianAndMagnitude,
}

/// Moments of the input of one or more linears that read the same activation.
pub struct Statistics<B: Quantize> {
    /// Tokens seen.
    pub tokens: usize,
    /// Tokens seen, and those that [`blend`](Self::blend) counted as seen.
    pub count: f64,
    /// `Σ xᵀx`, lower triangle, when it was asked for.
    pub gram: Option<B::Matrix>,
    needs: Needs,
    magnitude: Vec<f64>,
    energy: Vec<f64>,
}

impl<B: Quantize> Statistics<B> {
    /// Gathers what is needed of an input of `cols` channels; `inputs` hands it over piece by piece, `[tokens, cols]`.
    ///
    /// Fails as the inputs do, or the backend.
    pub fn gather<E: From<kernels::Error>>(
        backend: &B,
        cols: usize,
        needs: Needs,
        inputs: impl FnOnce(&mut dyn FnMut(&B::Input) -> Result<(), E>) -> Result<(), E>,
    ) -> Result<Self, E> {
        let gram = if needs >= Needs::Hessian { Some(backend.zeros(cols, cols)?) } else { None };
        let mut seen =
            Statistics { tokens: 0, count: 0.0, gram, needs, magnitude: vec![0.0; cols], energy: vec![0.0; cols] };
        inputs(&mut |x| Ok(seen.add(backend, x)?))?;
        // The Hessian's diagonal holds the energies already.
        if let (Needs::Hessian, Some(gram)) = (needs, &seen.gram) {
            seen.energy = backend.diagonal(gram)?.into_iter().map(f64::from).collect();
        }
        Ok(seen)
    }

    fn add(&mut self, backend: &B, x: &B::Input) -> kernels::Result<()> {
        if self.needs != Needs::Hessian {
            backend.add_moments(x, &mut self.magnitude, &mut self.energy)?;
        }
        if let Some(gram) = &mut self.gram {
            backend.add_gram(x, gram)?;
        }
        self.tokens += backend.input_shape(x)[0];
        self.count = self.tokens as f64;
        Ok(())
    }

    /// Counts `tokens` more that look as `prior`'s do on average.
    ///
    /// The statistics of an expert that sees few tokens shrink towards those of its layer, and a prior of as many tokens
    /// as there are channels makes their Hessian well conditioned. Both must have gathered the same.
    pub fn blend(&mut self, backend: &B, prior: &Statistics<B>, tokens: f64) -> kernels::Result<()> {
        if prior.count == 0.0 {
            return Ok(());
        }
        let factor = tokens / prior.count;
        if let (Some(gram), Some(other)) = (&mut self.gram, &prior.gram) {
            backend.add_scaled(other, factor as f32, gram)?;
        }
        for (sums, others) in [(&mut self.magnitude, &prior.magnitude), (&mut self.energy, &prior.energy)] {
            sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += factor * other);
        }
        self.count += tokens;
        Ok(())
    }

    /// The same of the channels in another order: column `i` is what column `columns[i]` was.
    pub fn ordered(&self, backend: &B, columns: &[usize]) -> kernels::Result<Statistics<B>> {
        let gram = match &self.gram {
            None => None,
            Some(gram) => {
                let lower = backend.download(gram)?;
                let moment = |(i, j): (usize, usize)| {
                    let (a, b) = (columns[i], columns[j]);
                    lower[[a.max(b), a.min(b)]]
                };
                Some(backend.upload(Array2::from_shape_fn((columns.len(), columns.len()), moment))?)
            }
        };
        let of = |sums: &[f64]| columns.iter().map(|column| sums[*column]).collect();
        let (magnitude, energy) = (of(&self.magnitude), of(&self.energy));
        Ok(Statistics { tokens: self.tokens, count: self.count, gram, needs: self.needs, magnitude, energy })
    }

    /// Whether every sum is finite: false after a NaN or infinity in the activations.
    pub fn is_finite(&self) -> bool {
        self.energy.iter().all(|x| x.is_finite())
    }

    /// `E[x_j²]` per channel.
    pub fn importance(&self) -> Vec<f32> {
        self.energy.iter().map(|x| (x / self.count.max(1.0)) as f32).collect()
    }

    /// `Σ x_j²` per channel.
    pub fn energy(&self) -> Vec<f32> {
        self.energy.iter().map(|x| *x as f32).collect()
    }

    /// `E|x_j|` per channel; zeros unless it was asked for.
    pub fn magnitude(&self) -> Vec<f32> {
        self.magnitude.iter().map(|x| (x / self.count.max(1.0)) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use kernels::{Cpu, Memory};
    use ndarray::Axis;

    use super::*;

    #[test]
    fn channels_in_another_order_are_those_of_inputs_in_that_order() {
        let cpu = Cpu::exact();
        let x = Array2::from_shape_fn((7, 4), |(i, j)| (i * (j + 2) % 5) as f32 - 1.5);
        let columns = [2, 0, 3, 1];
        let of = |x: &Array2<f32>| {
            let input = cpu.input(cpu.upload(x.clone()).unwrap()).unwrap();
            let see = |see: &mut dyn FnMut(&_) -> Result<(), kernels::Error>| see(&input);
            Statistics::gather(&cpu, 4, Needs::HessianAndMagnitude, see).unwrap()
        };
        let found = of(&x).ordered(&cpu, &columns).unwrap();
        let expected = of(&x.select(Axis(1), &columns));
        assert_eq!(found.energy(), expected.energy());
        assert_eq!(found.magnitude(), expected.magnitude());
        let [found, expected] = [found.gram.unwrap(), expected.gram.unwrap()];
        for i in 0..4 {
            for j in 0..=i {
                assert_eq!(found[[i, j]], expected[[i, j]], "{i}, {j}");
            }
        }
    }
}
