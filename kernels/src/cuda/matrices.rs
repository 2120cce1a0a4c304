//! Matrices on the device: how they get there and back.

use formats::{Dtype, PackedWeight, WordLayout};
use ndarray::Array2;

use super::forward::POINTWISE;
use super::{Arg, Buffer, Codes, Cuda, Matrix, Operands, Real, Rounded, Stored, at, expect};
use crate::backend::{Grid, GridSpec, Memory, Quantize};
use crate::{Error, Result};

/// How the kernel that widens a stored matrix calls its type; `None` for one that it does not know.
fn stored_kind(bytes: &[u8], dtype: Dtype, [rows, cols]: [usize; 2]) -> Result<Option<i32>> {
    let (kind, size) = match dtype {
        Dtype::F16 => (0, 2),
        Dtype::BF16 => (1, 2),
        Dtype::F32 => (2, 4),
        _ => return Ok(None),
    };
    expect("upload_stored", "bytes", rows * cols * size, bytes.len())?;
    Ok(Some(kind))
}

impl Cuda {
    /// Codes of the host.
    pub fn send_codes(&self, host: &Array2<u8>) -> Result<Codes> {
        let (rows, cols) = host.dim();
        let host = host.as_standard_layout();
        Ok(Codes { buffer: self.send(host.as_slice().expect("standard layout"))?, rows, cols })
    }

    /// Rounds to bfloat16.
    pub(super) fn narrowed(&self, x: &Matrix) -> Result<Operands> {
        let count = x.rows * x.cols;
        let out = Rounded { buffer: self.buffer::<u16>(count)?, rows: x.rows, cols: x.cols };
        let pins = (out.buffer.pin()?, x.buffer.pin_to_read()?);
        let args = [pins.0.arg(), pins.1.arg(), (count as i64).into()];
        self.each(&POINTWISE, "narrow", count, &args)?;
        drop(pins);
        Ok(Operands::Rounded(out))
    }
}

impl Memory for Cuda {
    type Matrix = Matrix;
    type Input = Operands;
    type Stored = Stored;

    fn name(&self) -> String {
        let calibration =
            if !self.exact && self.device().capability() >= 80 { ", calibration in bfloat16" } else { "" };
        format!("{}{calibration}", self.device().name())
    }

    fn relaxed(&self) -> Cuda {
        Cuda { relaxed: !self.exact, ..self.clone() }
    }

    fn room(&self) -> Option<u64> {
        Some(self.budget())
    }

    fn tokens_at_once(&self) -> usize {
        // Larger products are nearer to the card's peak; what lies between operators has to fit several times. Libraries add up
        // products of other shapes in another order: what others have of the card's memory, or the user gives, must not decide.
        match self.size {
            32.. => 8192,
            12.. => 4096,
            _ => 2048,
        }
    }

    fn kept_values(&self) -> usize {
        let on_host = self.host / self.bytes_of_input() as u64;
        (self.budget() / 8).max(on_host) as usize
    }

    fn bytes_of_input(&self) -> usize {
        if self.rounds() { 2 } else { 4 }
    }

    fn notes(&self) -> Vec<String> {
        let usage = self.usage();
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let mut notes = Vec::new();
        if usage.moved > 0 {
            notes.push(format!(
                "{:.1} GB were put aside in the host's memory, and {:.1} GB brought back, as {:.1} GB of the GPU's did not hold everything",
                gigabytes(usage.moved),
                gigabytes(usage.returned),
                gigabytes(self.budget())
            ));
        }
        if usage.short {
            notes.push("the GPU had less memory free than at the start, so more was put aside than planned".to_owned());
        }
        notes
    }

    fn upload_stored(&self, bytes: &[u8], dtype: Dtype, [rows, cols]: [usize; 2]) -> Result<Option<Matrix>> {
        let Some(kind) = stored_kind(bytes, dtype, [rows, cols])? else { return Ok(None) };
        self.widen(Stored { buffer: self.send(bytes)?, kind, rows, cols }).map(Some)
    }

    fn sends_ahead(&self) -> Option<u64> {
        // What is at work needs several times what its weights take.
        Some(self.budget() / 4)
    }

    fn send_ahead(&self, bytes: &[u8], dtype: Dtype, [rows, cols]: [usize; 2]) -> Result<Option<Stored>> {
        let Some(kind) = stored_kind(bytes, dtype, [rows, cols])? else { return Ok(None) };
        Ok(Buffer::ahead(&self.memory, bytes)?.map(|buffer| Stored { buffer, kind, rows, cols }))
    }

    fn widen(&self, Stored { buffer, kind, rows, cols }: Stored) -> Result<Matrix> {
        let out = self.matrix(rows, cols)?;
        let count = rows * cols;
        let (to, from) = (out.buffer.pin()?, buffer.pin_to_read()?);
        let args = [to.arg(), from.arg(), kind.into(), (count as i64).into()];
        self.each(&POINTWISE, "widen", count, &args)?;
        drop(to);
        Ok(out)
    }

    fn upload(&self, host: Array2<f32>) -> Result<Matrix> {
        let (rows, cols) = host.dim();
        let host = host.as_standard_layout();
        Ok(Matrix { buffer: self.send(host.as_slice().expect("standard layout"))?, rows, cols })
    }

    fn upload_packed(&self, weight: PackedWeight, layout: WordLayout) -> Result<Matrix> {
        let PackedWeight { rows, cols, encoding, words, scales, zeros, mins, global, group_of } = weight;
        let codes = self.unpacked_words(&words, [rows, cols], encoding.levels.bits(), layout)?;
        let mut spec = GridSpec { global, ..GridSpec::of(encoding, cols) };
        if let Some(group_of) = group_of {
            spec.group_of = group_of;
        }
        match encoding.is_integers() {
            true => self.dequantize(&codes, &Grid::of_integers(spec, rows, scales, zeros)),
            false => {
                // The integers of blocks are not asked for: what is stored is what levels are multiplied by.
                let grid = Grid { spec, rows, scales, zeros: Vec::new(), mins, blocks: Vec::new() };
                self.dequantized_blocks(&codes, &grid)
            }
        }
    }

    fn download(&self, matrix: &Matrix) -> Result<Array2<f32>> {
        let values = self.fetch(&matrix.buffer, matrix.rows * matrix.cols)?;
        Ok(Array2::from_shape_vec((matrix.rows, matrix.cols), values).expect("as long as its shape says"))
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix { buffer: self.cleared::<f32>(rows * cols)?, rows, cols })
    }

    fn shape(&self, matrix: &Matrix) -> [usize; 2] {
        [matrix.rows, matrix.cols]
    }

    fn copy(&self, matrix: &Matrix) -> Result<Matrix> {
        let other = self.matrix(matrix.rows, matrix.cols)?;
        self.device().copy(matrix.buffer.pin_to_read()?.at, other.buffer.pin()?.at, 4 * matrix.rows * matrix.cols)?;
        Ok(other)
    }

    fn select_rows(&self, matrix: &Matrix, rows: &[usize]) -> Result<Matrix> {
        if let Some(row) = rows.iter().find(|row| **row >= matrix.rows) {
            let expected = format!("rows below {}", matrix.rows);
            return Err(Error::Shape { op: "select_rows", expected, found: row.to_string() });
        }
        let out = self.matrix(rows.len(), matrix.cols)?;
        let indices: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let indices = self.send(&indices)?;
        let pins = (out.buffer.pin()?, matrix.buffer.pin_to_read()?, indices.pin()?);
        let args = [pins.0.arg(), pins.1.arg(), pins.2.arg(), (rows.len() as i64).into(), (matrix.cols as i32).into()];
        self.each(&POINTWISE, "select_rows", rows.len() * matrix.cols, &args)?;
        drop(pins);
        Ok(out)
    }

    fn scale(&self, matrix: &mut Matrix, rows: &[f32], cols: &[f32]) -> Result<()> {
        for (side, factors, length) in [("rows", rows, matrix.rows), ("columns", cols, matrix.cols)] {
            if !factors.is_empty() {
                expect("scale", side, length, factors.len())?;
            }
        }
        let sent = |factors: &[f32]| (!factors.is_empty()).then(|| self.send(factors)).transpose();
        let (rows, cols) = (sent(rows)?, sent(cols)?);
        let (rows, cols) = (rows.as_ref().map(|b| b.pin()).transpose()?, cols.as_ref().map(|b| b.pin()).transpose()?);
        let count = matrix.rows * matrix.cols;
        let pinned = matrix.buffer.pin()?;
        let args = [
            pinned.arg(),
            at(rows.as_ref()),
            at(cols.as_ref()),
            (matrix.rows as i64).into(),
            (matrix.cols as i32).into(),
        ];
        self.each(&POINTWISE, "scale_sides", count, &args)
    }

    fn add_scaled(&self, x: &Matrix, factor: f32, y: &mut Matrix) -> Result<()> {
        expect("add_scaled", "tokens", y.rows, x.rows)?;
        expect("add_scaled", "features", y.cols, x.cols)?;
        let count = x.rows * x.cols;
        let pins = (y.buffer.pin()?, x.buffer.pin_to_read()?);
        let args = [pins.0.arg(), pins.1.arg(), factor.into(), (count as i64).into()];
        self.each(&POINTWISE, "add_scaled", count, &args)
    }

    fn difference(&self, a: &Matrix, b: &Matrix) -> Result<Matrix> {
        expect("difference", "rows", a.rows, b.rows)?;
        expect("difference", "columns", a.cols, b.cols)?;
        let (out, count) = (self.matrix(a.rows, a.cols)?, a.rows * a.cols);
        let pins = (out.buffer.pin()?, a.buffer.pin_to_read()?, b.buffer.pin_to_read()?);
        let args = [pins.0.arg(), pins.1.arg(), pins.2.arg(), Arg::Long(count as i64)];
        self.each(&POINTWISE, "difference", count, &args)?;
        drop(pins);
        Ok(out)
    }

    fn is_finite(&self, matrix: &Matrix) -> Result<bool> {
        let flag = self.cleared::<i32>(1)?;
        let count = matrix.rows * matrix.cols;
        let pins = (flag.pin()?, matrix.buffer.pin_to_read()?);
        let args = [pins.0.arg(), pins.1.arg(), (count as i64).into()];
        self.each(&POINTWISE, "find_not_finite", count, &args)?;
        drop(pins);
        Ok(self.fetch::<i32>(&flag, 1)?[0] == 0)
    }

    fn input(&self, x: Matrix) -> Result<Operands> {
        if self.rounds() { self.narrowed(&x) } else { Ok(Operands::Whole(x)) }
    }

    fn values(&self, x: &Operands) -> Result<Matrix> {
        let [rows, cols] = x.shape();
        let (out, count) = (self.matrix(rows, cols)?, rows * cols);
        {
            let (to, from) = (out.buffer.pin()?, x.pin()?);
            let stored = if x.real() == Real::Bf16 { 1 } else { 2 };
            self.each(&POINTWISE, "widen", count, &[to.arg(), from.arg(), stored.into(), (count as i64).into()])?;
        }
        Ok(out)
    }

    fn input_shape(&self, x: &Operands) -> [usize; 2] {
        x.shape()
    }
}
