//! What the input of a linear looked like over the calibration tokens.

use kernels::{Backend, Result};

/// How much of the input a method wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// Nothing: no forward pass at all.
    Nothing,
    /// The mean square of each channel (what llama.cpp calls the importance matrix).
    Moments,
    /// All second moments.
    Hessian,
}

/// Moments of the input of one or more linears that read the same activation.
pub struct Statistics<B: Backend> {
    /// Tokens seen.
    pub tokens: usize,
    /// `Σ xᵀx`, lower triangle, when it was asked for.
    pub gram: Option<B::Matrix>,
    magnitude: Vec<f64>,
    energy: Vec<f64>,
}

impl<B: Backend> Statistics<B> {
    /// Empty statistics of `cols` channels.
    pub fn new(backend: &B, cols: usize, needs: Needs) -> Result<Self> {
        let gram = if needs == Needs::Hessian { Some(backend.zeros(cols, cols)?) } else { None };
        Ok(Statistics { tokens: 0, gram, magnitude: vec![0.0; cols], energy: vec![0.0; cols] })
    }

    /// Adds the rows of `x` `[tokens, cols]`.
    pub fn add(&mut self, backend: &B, x: &B::Matrix) -> Result<()> {
        backend.add_moments(x, &mut self.magnitude, &mut self.energy)?;
        if let Some(gram) = &mut self.gram {
            backend.add_gram(x, gram)?;
        }
        self.tokens += backend.shape(x)[0];
        Ok(())
    }

    /// Whether every sum is finite: false after a NaN or infinity in the activations.
    pub fn is_finite(&self) -> bool {
        self.energy.iter().all(|x| x.is_finite())
    }

    /// `E[x_j²]` per channel.
    pub fn importance(&self) -> Vec<f32> {
        self.energy.iter().map(|x| (x / self.tokens.max(1) as f64) as f32).collect()
    }

    /// `E|x_j|` per channel.
    pub fn magnitude(&self) -> Vec<f32> {
        self.magnitude.iter().map(|x| (x / self.tokens.max(1) as f64) as f32).collect()
    }
}
