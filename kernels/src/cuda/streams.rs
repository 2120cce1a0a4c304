//! Several streams side by side, and gates that let few values through.

use super::forward::threads_for;
use super::{Cuda, Matrix, Module};
use crate::Result;
use crate::backend::Memory;
use crate::checks::{expect_alike, expect_multiple, expect_streams};

pub(super) static STREAMS: Module = Module { name: "streams", source: include_str!("../ops/streams.cu") };

impl Cuda {
    pub(super) fn mixed(&self, x: &Matrix, coefficients: &Matrix, width: usize, y: &mut Matrix) -> Result<()> {
        let of = |m: &Matrix| [m.rows, m.cols];
        let [from, to] = expect_streams([of(x), of(coefficients), of(y)], width)?;
        let pins = (y.buffer.pin()?, x.buffer.pin_to_read()?, coefficients.buffer.pin_to_read()?);
        let args = [
            pins.0.arg(),
            pins.1.arg(),
            pins.2.arg(),
            (y.rows as i64).into(),
            (from as i32).into(),
            (to as i32).into(),
            (width as i32).into(),
        ];
        self.each(&STREAMS, "mix_streams", y.rows * y.cols, &args)
    }

    pub(super) fn matched(&self, x: &mut Matrix, width: usize, least: f32) -> Result<()> {
        expect_multiple("match_streams", width, x.cols)?;
        if x.rows * x.cols == 0 {
            return Ok(());
        }
        let args = [x.buffer.pin()?.arg(), ((x.cols / width) as i32).into(), (width as i32).into(), least.into()];
        self.blocks(&STREAMS, "match_streams", x.rows, threads_for(width), 0, &args)
    }

    pub(super) fn agreement(&self, x: &Matrix, y: &Matrix, width: usize, least: f32) -> Result<Matrix> {
        expect_alike("agree_streams", [x.rows, x.cols], [y.rows, y.cols], width)?;
        let count = x.cols / width;
        let out = self.zeros(x.rows, count)?;
        if x.rows * count > 0 {
            let pins = (out.buffer.pin()?, x.buffer.pin_to_read()?, y.buffer.pin_to_read()?);
            let args = [pins.0.arg(), pins.1.arg(), pins.2.arg(), (width as i32).into(), least.into()];
            self.blocks(&STREAMS, "agree_streams", x.rows * count, threads_for(width), 0, &args)?;
        }
        Ok(out)
    }

    pub(super) fn cut_off(&self, x: &mut Matrix, deviations: f32) -> Result<()> {
        if x.rows * x.cols == 0 {
            return Ok(());
        }
        let args = [x.buffer.pin()?.arg(), (x.cols as i32).into(), deviations.into()];
        self.blocks(&STREAMS, "cut_rows", x.rows, threads_for(x.cols), 0, &args)
    }
}
