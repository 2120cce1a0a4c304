//! Quantizing a weight: sums over its inputs here, the rest beside its kernels.

use ndarray::Array2;

use super::factor::{Halves, operand, panel, pinned, transposed};
use super::{
    Arg, Codes, Cuda, Matrix, Module, Operands, Product, Real, THREADS, expect, expect_grid, expect_spec, sweep,
};
use crate::Result;
use crate::backend::{Factor, FitKind, Grid, GridSpec, Packing, Quantize, Swept};

pub(super) static GRAM: Module = Module { name: "gram", source: include_str!("../ops/gram.cu") };

/// Tokens whose products are summed in one product: so few that the order of sums is that of cards which run no more at a time.
const TOKENS: usize = 2048;
/// Tokens that one block sums up in `column_moments`.
const MOMENT_TOKENS: usize = 512;
/// Rows of errors whose image is held at a time.
const IMAGE_ROWS: usize = 16384;
/// Partial sums of a reduction to one number, the same on every device.
const PARTS: usize = 512;

impl Quantize for Cuda {
    type Codes = Codes;

    fn rows_at_once(&self) -> usize {
        // What a sweep works in takes some times the memory of its weights. As above it is the card that decides.
        if self.size >= 4 { sweep::CHUNK } else { 1 }
    }

    fn weights_at_once(&self) -> usize {
        // Launches and copies of less take longer than their work; several threads ask at once.
        ((self.budget() >> 12) as usize).clamp(1 << 16, 1 << 22)
    }

    fn add_gram(&self, x: &Operands, gram: &mut Matrix) -> Result<()> {
        let [tokens, n] = x.shape();
        expect("add_gram", "features", gram.cols, n)?;
        expect("add_gram", "rows of the Hessian", gram.cols, gram.rows)?;
        let (from, to) = (x.pin()?, gram.buffer.pin()?);
        let (real, side) = (x.real(), panel(n));
        let at = |token: usize, col: usize| from.at + ((token * n + col) * real.bytes()) as u64;
        for token in (0..tokens).step_by(TOKENS) {
            for row in (0..n).step_by(side) {
                let height = side.min(n - row);
                self.device().product(&Product {
                    real,
                    shape: [height, row + height, TOKENS.min(tokens - token)],
                    a: transposed(at(token, row), n),
                    b: operand(at(token, 0), n),
                    c: operand(to.at + 4 * (row * n) as u64, n),
                    alpha: 1.0,
                    beta: 1.0,
                })?;
            }
        }
        Ok(())
    }

    fn add_moments(&self, x: &Operands, magnitude: &mut [f64], energy: &mut [f64]) -> Result<()> {
        let [tokens, cols] = x.shape();
        expect("add_moments", "features", magnitude.len(), cols)?;
        expect("add_moments", "features", energy.len(), cols)?;
        let chunks = tokens.div_ceil(MOMENT_TOKENS);
        // Magnitudes, then energies.
        let (parts, sums) = (self.buffer::<f32>(2 * chunks * cols)?, self.buffer::<f64>(2 * cols)?);
        {
            let (parts, sums, from) = (parts.pin()?, sums.pin()?, x.pin()?);
            let half = |i: usize| (parts.at + (4 * i * chunks * cols) as u64, sums.at + (8 * i * cols) as u64);
            let args =
                [Arg::At(half(0).0), Arg::At(half(1).0), from.arg(), (tokens as i64).into(), (cols as i32).into()];
            let kernel = if x.real() == Real::Bf16 { "column_moments_rounded" } else { "column_moments" };
            let block = 128;
            self.grid(&GRAM, kernel, [cols.div_ceil(block), chunks, 1], block as u32, 0, &args)?;
            for i in 0..2 {
                let (part, sum) = half(i);
                let args = [Arg::At(sum), Arg::At(part), (chunks as i32).into(), (cols as i64).into()];
                self.each(&GRAM, "sum_parts", cols, &args)?;
            }
        }
        let found = self.fetch::<f64>(&sums, 2 * cols)?;
        let (sizes, squares) = found.split_at(cols);
        magnitude.iter_mut().zip(sizes).for_each(|(sum, x)| *sum += x);
        energy.iter_mut().zip(squares).for_each(|(sum, x)| *sum += x);
        Ok(())
    }

    fn diagonal(&self, matrix: &Matrix) -> Result<Vec<f32>> {
        let count = matrix.rows.min(matrix.cols);
        let out = self.buffer::<f32>(count)?;
        let (to, from) = (out.pin()?, matrix.buffer.pin_to_read()?);
        let args = [to.arg(), from.arg(), (count as i32).into(), (matrix.cols as i64).into()];
        self.each(&GRAM, "diagonal", count, &args)?;
        self.fetch(&out, count)
    }

    fn quadratic(&self, e: &Matrix, gram: &Matrix) -> Result<f64> {
        expect("quadratic", "features", gram.cols, e.cols)?;
        expect("quadratic", "rows of the Hessian", gram.cols, gram.rows)?;
        let (rows, n, side) = (e.rows, e.cols, panel(e.cols));
        let (heights, panels) = (rows.div_ceil(IMAGE_ROWS), n.div_ceil(side));
        let sums = self.cleared::<f64>(heights * panels * PARTS)?;
        {
            let image = self.buffer::<f32>(rows.min(IMAGE_ROWS) * side)?;
            let square = self.buffer::<f32>(side * side)?;
            let (e, gram, sums) = (e.buffer.pin_to_read()?, gram.buffer.pin_to_read()?, sums.pin()?);
            let (image, square) = (image.pin()?, square.pin()?);
            let (errors, energies) = (self.halves(e.at, rows * n)?, self.halves(gram.at, n * n)?);
            let errors = errors.as_ref().map(pinned).transpose()?;
            let energies = energies.as_ref().map(pinned).transpose()?;
            let (errors, energies) = (Halves::of(&e, errors.as_ref()), Halves::of(&gram, energies.as_ref()));
            let at = |base: u64, row: usize, col: usize| base + 4 * (row * n + col) as u64;
            for (index, col) in (0..n).step_by(side).enumerate() {
                let width = side.min(n - col);
                let corner = Arg::At(at(gram.at, col, col));
                let args = [square.arg(), corner, (width as i32).into(), (n as i64).into()];
                self.each(&GRAM, "whole_square", width * width, &args)?;
                let corners = self.halves(square.at, width * width)?;
                let corners = corners.as_ref().map(pinned).transpose()?;
                let corners = Halves::of(&square, corners.as_ref());
                for (chunk, row) in (0..rows).step_by(IMAGE_ROWS).enumerate() {
                    let height = IMAGE_ROWS.min(rows - row);
                    let mut product = Product {
                        real: Real::F32,
                        shape: [height, width, width],
                        a: operand(0, n),
                        b: operand(0, width),
                        c: operand(image.at, width),
                        alpha: 1.0,
                        beta: 0.0,
                    };
                    self.multiply_split(product, [errors, corners], [row * n + col, 0])?;
                    if col > 0 {
                        // What lies left of the diagonal square counts for its mirror image too.
                        product.shape = [height, width, col];
                        product.b = transposed(0, n);
                        (product.alpha, product.beta) = (2.0, 1.0);
                        self.multiply_split(product, [errors, energies], [row * n, col * n])?;
                    }
                    let args = [
                        Arg::At(sums.at + (8 * (index * heights + chunk) * PARTS) as u64),
                        Arg::At(at(e.at, row, col)),
                        (n as i64).into(),
                        image.arg(),
                        (width as i64).into(),
                        (height as i64).into(),
                        (width as i32).into(),
                    ];
                    self.blocks(&GRAM, "dot_rows", height.min(PARTS), THREADS, 0, &args)?;
                }
            }
        }
        Ok(self.fetch::<f64>(&sums, heights * panels * PARTS)?.iter().sum())
    }

    fn weighted_square(&self, e: &Matrix, weights: &[f64]) -> Result<f64> {
        expect("weighted_square", "weights", e.cols, weights.len())?;
        let parts = e.rows.min(PARTS);
        let (sums, weights) = (self.buffer::<f64>(parts)?, self.send(weights)?);
        {
            let (sums, from, weights) = (sums.pin()?, e.buffer.pin_to_read()?, weights.pin()?);
            let args = [sums.arg(), from.arg(), weights.arg(), (e.rows as i64).into(), (e.cols as i32).into()];
            self.blocks(&GRAM, "weigh_squares", parts, THREADS, 0, &args)?;
        }
        Ok(self.fetch::<f64>(&sums, parts)?.iter().sum())
    }

    fn scaled_rounding_loss(&self, weight: &Matrix, t: &[f32], spec: &GridSpec, gram: &Matrix) -> Result<f64> {
        let error = self.scaled_rounding_error(weight, t, spec)?;
        self.quadratic(&error, gram)
    }

    fn factor(&self, gram: &Matrix, order: Vec<u32>, damp: f64) -> Result<Factor<Matrix>> {
        self.factored(gram, order, damp)
    }

    fn fit(&self, weight: &Matrix, spec: &GridSpec, kind: FitKind<'_, Matrix>) -> Result<Grid> {
        expect_spec("fit", weight.cols, spec)?;
        match &kind {
            FitKind::Weighted(h) => expect("fit", "importances", weight.cols, h.len())?,
            FitKind::BlockHessian(h) => expect("fit", "features", weight.cols, h.cols)?,
            FitKind::MinMax => {}
        }
        let ty = spec.encoding.ggml_type();
        if spec.encoding.is_integers() {
            return self.fitted(weight, spec, kind);
        }
        let blocks = |importance: Option<&[f32]>| match ty {
            Some(ty) => self.fitted_blocks(weight, ty, importance),
            None => self.fitted_apart(weight, spec, importance),
        };
        match kind {
            FitKind::MinMax => blocks(None),
            FitKind::Weighted(h) => blocks(Some(h)),
            FitKind::BlockHessian(h) => blocks(Some(&self.diagonal(h)?)),
        }
    }

    fn round(&self, weight: &Matrix, grid: &Grid) -> Result<Codes> {
        expect_grid("round", [weight.rows, weight.cols], grid)?;
        match grid.spec.encoding.is_integers() {
            true => self.rounded_codes(weight, grid),
            false => self.rounded_blocks(weight, grid),
        }
    }

    fn sweep(&self, targets: &[(&Matrix, &Grid)], factor: &Factor<Matrix>) -> Result<Vec<Swept<Codes>>> {
        self.swept(targets, factor)
    }

    fn refine(&self, target: &Matrix, gram: &Matrix, damp: f64, grid: &mut Grid, codes: &mut Codes) -> Result<f64> {
        self.refined(target, gram, damp, grid, codes)
    }

    fn dequantize(&self, codes: &Codes, grid: &Grid) -> Result<Matrix> {
        expect_grid("dequantize", [codes.rows, codes.cols], grid)?;
        match grid.spec.encoding.is_integers() {
            true => self.dequantized(codes, grid),
            false => self.dequantized_blocks(codes, grid),
        }
    }

    fn pack(&self, codes: &Codes, packing: Packing<'_>) -> Result<Vec<u8>> {
        match packing {
            Packing::Words { bits, layout } => self.packed_words(codes, bits, layout),
            Packing::Blocks(grid) => self.packed_blocks(codes, grid),
        }
    }

    fn download_codes(&self, codes: &Codes) -> Result<Array2<u8>> {
        let values = self.fetch(&codes.buffer, codes.rows * codes.cols)?;
        Ok(Array2::from_shape_vec((codes.rows, codes.cols), values).expect("as long as its shape says"))
    }
}
