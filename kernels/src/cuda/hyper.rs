//! Hyper-connections.

use super::{Cuda, Matrix, Module, Operand, Product, Real};
use crate::Result;
use crate::backend::{HyperParameters, HyperShape};
use crate::checks::{expect_hyper, expect_weights};

pub(super) static HYPER: Module = Module { name: "hyper", source: include_str!("../ops/hyper.cu") };

/// Threads of a block of `stream_sizes`.
const BLOCK: usize = 128;

impl Cuda {
    pub(super) fn hyper(&self, h: &Matrix, of: HyperParameters<'_>, shape: &HyperShape) -> Result<Matrix> {
        expect_hyper([h.rows, h.cols], of, shape)?;
        let (tokens, width, count) = (h.rows, h.cols, shape.weights());
        let out = self.matrix(tokens, count)?;
        if tokens == 0 {
            return Ok(out);
        }
        let (projection, sizes) = (self.send(of.projection)?, self.matrix(tokens, 1)?);
        let (base, scale) = (self.send(of.base)?, self.send(of.scale)?);
        let pins = (out.buffer.pin()?, h.buffer.pin_to_read()?, projection.pin()?, sizes.buffer.pin()?);
        self.device().product(&Product {
            real: Real::F32,
            shape: [tokens, count, width],
            a: Operand { at: pins.1.at, stride: width, transposed: false },
            b: Operand { at: pins.2.at, stride: width, transposed: true },
            c: Operand { at: pins.0.at, stride: count, transposed: false },
            alpha: 1.0,
            beta: 0.0,
        })?;
        let args = [pins.3.arg(), pins.1.arg(), (tokens as i64).into(), (width as i32).into(), shape.norm_eps.into()];
        self.grid(&HYPER, "stream_sizes", [tokens.div_ceil(BLOCK / 32), 1, 1], BLOCK as u32, 0, &args)?;
        let (base, scale) = (base.pin()?, scale.pin()?);
        let [magnitude, more] = shape.writes.unwrap_or([-1.0, 0.0]);
        let args = [
            pins.0.arg(),
            pins.3.arg(),
            base.arg(),
            scale.arg(),
            (tokens as i64).into(),
            (shape.streams as i32).into(),
            (count as i32).into(),
            shape.eps.into(),
            magnitude.into(),
            more.into(),
            (shape.rounds as i32).into(),
        ];
        self.each(&HYPER, "stream_weights", tokens, &args)?;
        drop(pins);
        Ok(out)
    }

    pub(super) fn streams_read(&self, h: &Matrix, weights: &Matrix, streams: usize) -> Result<Matrix> {
        expect_weights([h.rows, h.cols], [weights.rows, weights.cols], streams, streams)?;
        let hidden = h.cols / streams;
        let out = self.matrix(h.rows, hidden)?;
        let pins = (out.buffer.pin()?, h.buffer.pin_to_read()?, weights.buffer.pin_to_read()?);
        let args = [
            pins.0.arg(),
            pins.1.arg(),
            pins.2.arg(),
            (h.rows as i64).into(),
            (hidden as i32).into(),
            (streams as i32).into(),
            (weights.cols as i32).into(),
        ];
        self.each(&HYPER, "read_streams", h.rows * hidden, &args)?;
        drop(pins);
        Ok(out)
    }

    pub(super) fn streams_written(
        &self,
        y: &Matrix,
        weights: &Matrix,
        shape: &HyperShape,
        h: &mut Matrix,
    ) -> Result<()> {
        let (of_h, of_weights) = ([h.rows, h.cols], [weights.rows, weights.cols]);
        expect_weights(of_h, of_weights, shape.streams, shape.weights().max(2 * shape.streams))?;
        super::expect("write_streams", "tokens", h.rows, y.rows)?;
        super::expect("write_streams", "features", h.cols / shape.streams, y.cols)?;
        let pins = (h.buffer.pin()?, y.buffer.pin_to_read()?, weights.buffer.pin_to_read()?);
        let args = [
            pins.0.arg(),
            pins.1.arg(),
            pins.2.arg(),
            (y.rows as i64).into(),
            (y.cols as i32).into(),
            (shape.streams as i32).into(),
            (weights.cols as i32).into(),
            i32::from(shape.rounds > 0).into(),
        ];
        self.each(&HYPER, "write_streams", y.rows * y.cols, &args)
    }
}
