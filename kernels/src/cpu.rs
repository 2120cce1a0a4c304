//! The CPU: host matrices, rayon's threads, SIMD chosen at run time.

mod forward;
mod measure;
mod memory;
mod quantize;
#[cfg(test)]
mod tests;

use ndarray::Array2;

use crate::ops::bf16;

/// The CPU backend. Uses the current rayon thread pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    /// Never round inputs of matrix products to bfloat16, not even [relaxed](crate::Memory::relaxed).
    pub exact: bool,
    relaxed: bool,
}

impl Cpu {
    /// A backend that computes in single precision throughout.
    pub fn exact() -> Cpu {
        Cpu { exact: true, relaxed: false }
    }

    fn rounds(&self) -> bool {
        self.relaxed && bf16::available()
    }
}

/// An activation: as it is, or rounded to bfloat16.
#[derive(Clone, Debug)]
pub enum Input {
    /// Single precision.
    Whole(Array2<f32>),
    /// bfloat16.
    Rounded(bf16::Rows),
}

impl Input {
    /// `[tokens, features]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Input::Whole(x) => [x.nrows(), x.ncols()],
            Input::Rounded(x) => x.shape(),
        }
    }

    /// The values.
    pub fn values(&self) -> Array2<f32> {
        match self {
            Input::Whole(x) => x.clone(),
            Input::Rounded(x) => x.widen(),
        }
    }
}

/// A weight: as it is, or rounded to bfloat16 and packed.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Single precision.
    Whole(Array2<f32>),
    /// bfloat16.
    Rounded(bf16::Panels),
}

impl Weight {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Weight::Whole(w) => [w.nrows(), w.ncols()],
            Weight::Rounded(w) => w.shape(),
        }
    }
}

fn flat(matrix: &mut Array2<f32>) -> &mut [f32] {
    matrix.as_slice_mut().expect("matrices of this backend are contiguous")
}
