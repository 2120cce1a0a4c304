//! Matrices of the host.

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use super::{Cpu, Input, flat};
use crate::backend::Memory;
use crate::checks::expect;
use crate::ops::{add, bf16};
use crate::simd::{Level, level};
use crate::{Error, Result};

impl Memory for Cpu {
    type Matrix = Array2<f32>;
    type Input = Input;
    // Nothing is ever on its way to where it is.
    type Stored = std::convert::Infallible;

    fn name(&self) -> String {
        let set = match level() {
            Level::Avx512 => "AVX-512",
            Level::Avx2 => "AVX2",
            Level::Baseline => "baseline instructions",
        };
        let products = if !self.exact && bf16::available() { ", calibration in bfloat16" } else { "" };
        format!("CPU, {} threads, {set}{products}", rayon::current_num_threads())
    }

    fn relaxed(&self) -> Cpu {
        Cpu { relaxed: !self.exact, ..*self }
    }

    fn bytes_of_input(&self) -> usize {
        if self.rounds() { 2 } else { 4 }
    }

    fn widen(&self, stored: Self::Stored) -> Result<Array2<f32>> {
        match stored {}
    }

    fn upload(&self, host: Array2<f32>) -> Result<Array2<f32>> {
        Ok(if host.is_standard_layout() { host } else { host.as_standard_layout().into_owned() })
    }

    fn download(&self, matrix: &Array2<f32>) -> Result<Array2<f32>> {
        Ok(matrix.clone())
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Array2<f32>> {
        Ok(Array2::zeros((rows, cols)))
    }

    fn shape(&self, matrix: &Array2<f32>) -> [usize; 2] {
        [matrix.nrows(), matrix.ncols()]
    }

    fn copy(&self, matrix: &Array2<f32>) -> Result<Array2<f32>> {
        Ok(matrix.clone())
    }

    fn select_rows(&self, matrix: &Array2<f32>, rows: &[usize]) -> Result<Array2<f32>> {
        if let Some(row) = rows.iter().find(|row| **row >= matrix.nrows()) {
            let expected = format!("rows below {}", matrix.nrows());
            return Err(Error::Shape { op: "select_rows", expected, found: row.to_string() });
        }
        Ok(matrix.select(Axis(0), rows))
    }

    fn scale(&self, matrix: &mut Array2<f32>, rows: &[f32], cols: &[f32]) -> Result<()> {
        for (side, factors, length) in [("rows", rows, matrix.nrows()), ("columns", cols, matrix.ncols())] {
            if !factors.is_empty() {
                expect("scale", side, length, factors.len())?;
            }
        }
        let width = matrix.ncols();
        flat(matrix).par_chunks_exact_mut(width).enumerate().for_each(|(row, values)| {
            if let Some(factor) = rows.get(row) {
                values.iter_mut().for_each(|v| *v *= factor);
            }
            values.iter_mut().zip(cols).for_each(|(v, factor)| *v *= factor);
        });
        Ok(())
    }

    fn add_scaled(&self, x: &Array2<f32>, factor: f32, y: &mut Array2<f32>) -> Result<()> {
        expect("add_scaled", "tokens", y.nrows(), x.nrows())?;
        expect("add_scaled", "features", y.ncols(), x.ncols())?;
        add::scaled(flat(y), factor, x.as_slice().expect("contiguous"));
        Ok(())
    }

    fn difference(&self, a: &Array2<f32>, b: &Array2<f32>) -> Result<Array2<f32>> {
        expect("difference", "values", a.len(), b.len())?;
        Ok(a - b)
    }

    fn is_finite(&self, matrix: &Array2<f32>) -> Result<bool> {
        // x·0 is 0 for finite x and NaN otherwise: a sum that vectorizes.
        let data = matrix.as_slice().expect("matrices of this backend are contiguous");
        Ok(data.par_chunks(1 << 14).all(|chunk| {
            let mut lanes = [0.0f32; 16];
            let parts = chunk.chunks_exact(16);
            let rest = parts.remainder().iter().fold(0.0, |sum, x| sum + x * 0.0);
            for part in parts {
                lanes.iter_mut().zip(part).for_each(|(lane, x)| *lane += x * 0.0);
            }
            lanes.iter().sum::<f32>() + rest == 0.0
        }))
    }

    fn input(&self, x: Array2<f32>) -> Result<Input> {
        Ok(if self.rounds() { Input::Rounded(bf16::Rows::of(x.view())) } else { Input::Whole(x) })
    }

    fn values(&self, x: &Input) -> Result<Array2<f32>> {
        Ok(x.values())
    }

    fn input_shape(&self, x: &Input) -> [usize; 2] {
        x.shape()
    }
}
