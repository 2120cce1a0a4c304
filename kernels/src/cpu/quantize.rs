//! Quantizing a weight.

use ndarray::Array2;

use super::{Cpu, Input};
use crate::backend::{Factor, FitKind, Grid, GridSpec, Memory, Packing, Quantize, Swept};
use crate::checks::{expect, expect_grid, expect_refined, expect_spec, expect_type};
use crate::ops::{bf16, dequantize, factor, fit, gram, refine, round, scaled, sweep};
use crate::{Error, Result};

/// Codes in the shape of their weight.
fn as_shaped(codes: Vec<u8>, weight: &Array2<f32>) -> Array2<u8> {
    Array2::from_shape_vec(weight.dim(), codes).expect("a code a weight")
}

impl Quantize for Cpu {
    type Codes = Array2<u8>;

    fn add_gram(&self, x: &Input, gram: &mut Array2<f32>) -> Result<()> {
        expect("add_gram", "features", gram.ncols(), x.shape()[1])?;
        expect("add_gram", "rows of the Hessian", gram.ncols(), gram.nrows())?;
        match x {
            Input::Rounded(x) => bf16::gram(x, gram),
            Input::Whole(x) => gram::run(x.view(), gram),
        }
        Ok(())
    }

    fn add_moments(&self, x: &Input, magnitude: &mut [f64], energy: &mut [f64]) -> Result<()> {
        expect("add_moments", "features", magnitude.len(), x.shape()[1])?;
        expect("add_moments", "features", energy.len(), x.shape()[1])?;
        match x {
            Input::Rounded(x) => x.moments(magnitude, energy),
            Input::Whole(x) => gram::moments(x.view(), magnitude, energy),
        }
        Ok(())
    }

    fn diagonal(&self, matrix: &Array2<f32>) -> Result<Vec<f32>> {
        Ok(matrix.diag().to_vec())
    }

    fn quadratic(&self, e: &Array2<f32>, gram: &Array2<f32>) -> Result<f64> {
        expect("quadratic", "features", gram.ncols(), e.ncols())?;
        Ok(gram::quadratic(e.view(), gram.view()))
    }

    fn weighted_square(&self, e: &Array2<f32>, weights: &[f64]) -> Result<f64> {
        expect("weighted_square", "weights", e.ncols(), weights.len())?;
        Ok(gram::weighted_square(e.view(), weights))
    }

    fn scaled_rounding_loss(
        &self,
        weight: &Array2<f32>,
        t: &[f32],
        spec: &GridSpec,
        gram: &Array2<f32>,
    ) -> Result<f64> {
        expect("scaled_rounding_loss", "factors", weight.ncols(), t.len())?;
        expect_spec("scaled_rounding_loss", weight.ncols(), spec)?;
        self.quadratic(&scaled::run(weight.view(), t, spec), gram)
    }

    fn factor(&self, gram: &Array2<f32>, order: Vec<u32>, damp: f64) -> Result<Factor<Array2<f32>>> {
        factor::run(gram.view(), order, damp)
    }

    fn fit(&self, weight: &Array2<f32>, spec: &GridSpec, kind: FitKind<'_, Array2<f32>>) -> Result<Grid> {
        expect_spec("fit", weight.ncols(), spec)?;
        match &kind {
            FitKind::Weighted(h) => expect("fit", "importances", weight.ncols(), h.len())?,
            FitKind::BlockHessian(h) => expect("fit", "features", weight.ncols(), h.ncols())?,
            FitKind::MinMax => {}
        }
        Ok(fit::run(weight.view(), spec, kind))
    }

    fn round(&self, weight: &Array2<f32>, grid: &Grid) -> Result<Array2<u8>> {
        expect_grid("round", self.shape(weight), grid)?;
        Ok(as_shaped(round::run(weight.view(), grid), weight))
    }

    fn sweep(&self, targets: &[(&Array2<f32>, &Grid)], factor: &Factor<Array2<f32>>) -> Result<Vec<Swept<Array2<u8>>>> {
        let one = |&(target, grid): &(&Array2<f32>, &Grid)| {
            expect_grid("sweep", self.shape(target), grid)?;
            expect("sweep", "columns", factor.order.len(), target.ncols())?;
            let Swept { codes, loss } = sweep::run(target.view(), factor, grid);
            Ok(Swept { codes: as_shaped(codes, target), loss })
        };
        targets.iter().map(one).collect()
    }

    fn refine(
        &self,
        target: &Array2<f32>,
        gram: &Array2<f32>,
        damp: f64,
        grid: &mut Grid,
        codes: &mut Array2<u8>,
    ) -> Result<f64> {
        expect_refined("refine", self.shape(target), self.shape(gram), codes.dim().into(), grid)?;
        Ok(refine::run(target.view(), gram.view(), damp, grid, codes.as_slice_mut().expect("contiguous")))
    }

    fn dequantize(&self, codes: &Array2<u8>, grid: &Grid) -> Result<Array2<f32>> {
        expect_grid("dequantize", codes.dim().into(), grid)?;
        Ok(dequantize::run(codes.view(), grid))
    }

    fn pack(&self, codes: &Array2<u8>, packing: Packing<'_>) -> Result<Vec<u8>> {
        match packing {
            Packing::Words { bits, layout } => {
                let words = layout.pack(codes.as_slice().expect("contiguous"), codes.dim().into(), bits);
                let words = words.map_err(|error| Error::Shape {
                    op: "pack",
                    expected: "codes that fit".to_owned(),
                    found: error.to_string(),
                })?;
                Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
            }
            Packing::Blocks(grid) => {
                expect_grid("pack", codes.dim().into(), grid)?;
                expect_type("pack", grid)?;
                Ok(dequantize::pack_blocks(codes.view(), grid))
            }
        }
    }

    fn download_codes(&self, codes: &Array2<u8>) -> Result<Array2<u8>> {
        Ok(codes.clone())
    }
}
