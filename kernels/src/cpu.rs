//! The CPU: host matrices, rayon's threads, SIMD chosen at run time.

use ndarray::{Array2, Axis, s};
use rayon::prelude::*;

use crate::backend::{AttentionShape, Backend, Factor, FitKind, Grid, GridSpec, Swept, TokenComparison, TokenLoss};
use crate::ops::{activation, attention, bf16, factor, fit, gram, linear, loss, norm, rope, round, sweep};
use crate::simd::{Level, level};
use crate::{Error, Result};

/// The CPU backend. Uses the current rayon thread pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    /// Never round inputs of matrix products to bfloat16, not even [relaxed](Backend::relaxed).
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

fn expect(op: &'static str, what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{expected} {what}"), found: found.to_string() })
}

fn flat(matrix: &mut Array2<f32>) -> &mut [f32] {
    matrix.as_slice_mut().expect("matrices of this backend are contiguous")
}

impl Backend for Cpu {
    type Matrix = Array2<f32>;

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

    fn linear(&self, x: &Array2<f32>, weight: &Array2<f32>, bias: Option<&[f32]>) -> Result<Array2<f32>> {
        expect("linear", "input features", weight.ncols(), x.ncols())?;
        if let Some(bias) = bias {
            expect("linear", "bias values", weight.nrows(), bias.len())?;
        }
        let fast = if self.rounds() { bf16::linear(x.view(), weight.view(), bias) } else { None };
        Ok(fast.unwrap_or_else(|| linear::run(x.view(), weight.view(), bias)))
    }

    fn rms_norm(&self, x: &Array2<f32>, weight: &[f32], eps: f32) -> Result<Array2<f32>> {
        expect("rms_norm", "features", weight.len(), x.ncols())?;
        Ok(norm::run(x.view(), weight, eps))
    }

    fn rope(&self, x: &mut Array2<f32>, cos: &Array2<f32>, sin: &Array2<f32>, lengths: &[usize]) -> Result<()> {
        expect("rope", "tokens", x.nrows(), lengths.iter().sum())?;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if longest > cos.nrows() || !x.ncols().is_multiple_of(2 * cos.ncols()) {
            return Err(Error::Shape {
                op: "rope",
                expected: format!("angles for {longest} positions in heads that divide {} features", x.ncols()),
                found: format!("{} positions of {}", cos.nrows(), 2 * cos.ncols()),
            });
        }
        rope::run(x, cos, sin, lengths);
        Ok(())
    }

    fn attention(
        &self,
        q: &Array2<f32>,
        k: &Array2<f32>,
        v: &Array2<f32>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Array2<f32>> {
        expect("attention", "query features", shape.heads * shape.head_dim, q.ncols())?;
        expect("attention", "key features", shape.kv_heads * shape.head_dim, k.ncols())?;
        expect("attention", "value features", shape.kv_heads * shape.head_dim, v.ncols())?;
        for matrix in [q, k, v] {
            expect("attention", "tokens", lengths.iter().sum(), matrix.nrows())?;
        }
        Ok(attention::run(q.view(), k.view(), v.view(), shape, lengths))
    }

    fn silu_mul(&self, gate: &mut Array2<f32>, up: &Array2<f32>) -> Result<()> {
        expect("silu_mul", "values", gate.len(), up.len())?;
        activation::silu_mul(flat(gate), up.as_slice().expect("contiguous"));
        Ok(())
    }

    fn difference(&self, a: &Array2<f32>, b: &Array2<f32>) -> Result<Array2<f32>> {
        expect("difference", "values", a.len(), b.len())?;
        Ok(a - b)
    }

    fn add(&self, a: &mut Array2<f32>, b: &Array2<f32>) -> Result<()> {
        expect("add", "values", a.len(), b.len())?;
        activation::add(flat(a), b.as_slice().expect("contiguous"));
        Ok(())
    }

    fn add_gram(&self, x: &Array2<f32>, gram: &mut Array2<f32>) -> Result<()> {
        expect("add_gram", "features", gram.ncols(), x.ncols())?;
        if !(self.rounds() && bf16::gram(x.view(), gram)) {
            gram::run(x.view(), gram);
        }
        Ok(())
    }

    fn add_moments(&self, x: &Array2<f32>, magnitude: &mut [f64], energy: &mut [f64]) -> Result<()> {
        expect("add_moments", "features", magnitude.len(), x.ncols())?;
        expect("add_moments", "features", energy.len(), x.ncols())?;
        gram::moments(x.view(), magnitude, energy);
        Ok(())
    }

    fn diagonal(&self, matrix: &Array2<f32>) -> Result<Vec<f32>> {
        Ok(matrix.diag().to_vec())
    }

    fn quadratic(&self, e: &Array2<f32>, gram: &Array2<f32>) -> Result<f64> {
        expect("quadratic", "features", gram.ncols(), e.ncols())?;
        Ok(gram::quadratic(e.view(), gram.view()))
    }

    fn scaled_rounding_loss(
        &self,
        weight: &Array2<f32>,
        t: &[f32],
        spec: &GridSpec,
        gram: &Array2<f32>,
    ) -> Result<f64> {
        expect("scaled_rounding_loss", "factors", weight.ncols(), t.len())?;
        let mut scaled = weight.clone();
        self.scale(&mut scaled, &[], t)?;
        let grid = fit::run(scaled.view(), spec, FitKind::MinMax);
        let codes = round::run(scaled.view(), &grid);
        let (cols, groups) = (weight.ncols(), spec.groups());
        // What is left of `scaled` is the error, in the original scale.
        flat(&mut scaled).par_chunks_exact_mut(cols).zip(codes.par_chunks_exact(cols)).enumerate().for_each(
            |(row, (values, codes))| {
                for (col, (value, code)) in values.iter_mut().zip(codes).enumerate() {
                    let at = row * groups + spec.group_of[col] as usize;
                    let step = f32::from(*code) - f32::from(grid.zeros[at]);
                    *value = (*value - grid.scales[at] * step) / t[col];
                }
            },
        );
        self.quadratic(&scaled, gram)
    }

    fn factor(&self, gram: &Array2<f32>, order: Vec<u32>, damp: f64) -> Result<Factor<Array2<f32>>> {
        factor::run(gram.view(), order, damp)
    }

    fn fit(&self, weight: &Array2<f32>, spec: &GridSpec, kind: FitKind<'_, Array2<f32>>) -> Result<Grid> {
        expect("fit", "columns", spec.group_of.len(), weight.ncols())?;
        match &kind {
            FitKind::Weighted(h) => expect("fit", "importances", weight.ncols(), h.len())?,
            FitKind::BlockHessian(h) => expect("fit", "features", weight.ncols(), h.ncols())?,
            FitKind::MinMax => {}
        }
        Ok(fit::run(weight.slice(s![.., ..]), spec, kind))
    }

    fn round(&self, weight: &Array2<f32>, grid: &Grid) -> Result<Vec<u8>> {
        expect("round", "rows", grid.rows, weight.nrows())?;
        Ok(round::run(weight.view(), grid))
    }

    fn sweep(&self, target: &Array2<f32>, factor: &Factor<Array2<f32>>, grid: &Grid) -> Result<Swept> {
        expect("sweep", "rows", grid.rows, target.nrows())?;
        expect("sweep", "columns", factor.order.len(), target.ncols())?;
        Ok(sweep::run(target.view(), factor, grid))
    }

    fn token_loss(&self, logits: &Array2<f32>, targets: &[u32]) -> Result<TokenLoss> {
        expect("token_loss", "targets", logits.nrows(), targets.len())?;
        Ok(loss::run(logits.view(), targets))
    }

    fn compare(&self, reference: &Array2<f32>, model: &Array2<f32>, targets: &[u32]) -> Result<TokenComparison> {
        expect("compare", "targets", model.nrows(), targets.len())?;
        expect("compare", "logits", reference.len(), model.len())?;
        Ok(loss::compare(reference.view(), model.view(), targets))
    }
}
