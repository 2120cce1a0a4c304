//! How queries and keys are turned by their positions, and how queries grow with them.

use ndarray::Array2;

/// Rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Radians per position, one for each pair of values, in contexts of the first training's length.
    pub inverse_frequencies: Vec<f32>,
    /// The base that they are powers of.
    pub theta: f32,
    /// Factor on cosines and sines.
    pub magnitude: f32,
    /// How they were stretched beyond the first context; already in `inverse_frequencies`.
    pub scaling: RopeScaling,
    /// Tensor of the logarithms of what the frequencies are multiplied by, one for each pair of values.
    pub learned: Option<String>,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by the factor.
    Linear {
        /// How many times longer the context becomes.
        factor: f32,
    },
    /// The base grows with contexts beyond the first.
    Dynamic {
        /// How many times longer the context becomes.
        factor: f32,
        /// The context of the first training.
        original: usize,
    },
    /// Llama 3's: long wavelengths divided by the factor, short ones kept, those between in between.
    Llama3 {
        /// How many times longer the context becomes.
        factor: f32,
        /// Wavelengths above `original / low` are divided.
        low: f32,
        /// Wavelengths below `original / high` are kept.
        high: f32,
        /// The context of the first training.
        original: f32,
    },
    /// YaRN's: as Llama 3's with a ramp over the pairs, and warmer attention.
    Yarn {
        /// How many times longer the context becomes.
        factor: f32,
        /// The context of the first training.
        original: usize,
        /// Turns over the first context above which a pair is kept.
        beta_fast: f32,
        /// Turns below which it is divided.
        beta_slow: f32,
        /// Multiplies the logarithm in the factor on the scores; 0 if there is none.
        mscale_all_dim: f32,
    },
    /// Only the first pairs of a head turn; the others stand still.
    Proportional,
    /// LongRoPE's: every pair divided by a factor of its own, others in contexts beyond the first.
    Long {
        /// Factors of the first context.
        short: Vec<f32>,
        /// Factors beyond it.
        long: Vec<f32>,
        /// The context of the first training.
        original: usize,
    },
}

/// What queries are multiplied by, which grows with their positions.
#[derive(Clone, Debug, PartialEq)]
pub enum Temperature {
    /// `1 + scale · ln(⌊(position + first) / floor⌋ + 1)`.
    Steps {
        /// Positions after which it grows.
        floor: f32,
        /// How much.
        scale: f32,
        /// What the first position counts as.
        first: usize,
    },
    /// `scale · ln(position + 1) + bias`, of each head by itself.
    Heads {
        /// Tensor of how much it grows, `[heads]`.
        scale: String,
        /// Tensor of what it is at the first position, `[heads]`.
        bias: String,
    },
}

impl Temperature {
    /// Its tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &String> {
        let [scale, bias] = match self {
            Temperature::Steps { .. } => [None, None],
            Temperature::Heads { scale, bias } => [Some(scale), Some(bias)],
        };
        scale.into_iter().chain(bias)
    }

    /// The same, with their shapes.
    pub(super) fn vectors(&self, heads: usize) -> impl Iterator<Item = (String, Vec<usize>)> {
        self.tensors().map(move |tensor| (tensor.clone(), vec![heads]))
    }

    /// Gives its tensors other names.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        if let Temperature::Heads { scale, bias } = self {
            [scale, bias].into_iter().for_each(|tensor| *tensor = name(tensor));
        }
    }
}

impl Rope {
    /// Its tensor, with its shape.
    pub(super) fn vectors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        self.learned.iter().map(|tensor| (tensor.clone(), vec![self.inverse_frequencies.len()]))
    }

    /// Radians per position in a context of `positions`.
    pub fn frequencies(&self, positions: usize) -> Vec<f32> {
        let dim = 2 * self.inverse_frequencies.len();
        let powers = |base: f32| (0..dim / 2).map(move |i| base.powf((2 * i) as f32 / dim as f32));
        match &self.scaling {
            RopeScaling::Dynamic { factor, original } if positions > *original => {
                let grown = f64::from(*factor) * positions as f64 / *original as f64 - (f64::from(*factor) - 1.0);
                let base = f64::from(self.theta) * grown.powf(dim as f64 / (dim as f64 - 2.0));
                powers(base as f32).map(|power| 1.0 / power).collect()
            }
            RopeScaling::Long { long, original, .. } if positions > *original => {
                powers(self.theta).zip(long).map(|(power, factor)| 1.0 / (factor * power)).collect()
            }
            _ => self.inverse_frequencies.clone(),
        }
    }

    /// Cosines and sines `[tokens, rotated / 2]` of sequences of these lengths that lie one behind the other, each turned as if it were alone: the
    /// frequencies of some kinds of scaling depend on the length. Each token is turned as the one that is so many places before it, or the first.
    /// `learned` is what the tensor of that name holds, if there is one.
    pub fn table(&self, lengths: &[usize], back: usize, learned: Option<&[f32]>) -> (Array2<f32>, Array2<f32>) {
        let shape = (lengths.iter().sum(), self.inverse_frequencies.len());
        let (mut cos, mut sin) = (Array2::zeros(shape), Array2::zeros(shape));
        let mut start = 0;
        for length in lengths {
            let mut frequencies = self.frequencies(*length);
            for (frequency, logarithm) in frequencies.iter_mut().zip(learned.into_iter().flatten()) {
                *frequency *= logarithm.exp();
            }
            for position in 0..*length {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let angle = position.saturating_sub(back) as f32 * frequency;
                    cos[(start + position, i)] = angle.cos() * self.magnitude;
                    sin[(start + position, i)] = angle.sin() * self.magnitude;
                }
            }
            start += length;
        }
        (cos, sin)
    }
}
