//! Layers with a state: short convolutions, decays, and linear attention whose state forgets.

use super::forward::code;
use super::{Cuda, Matrix, Module, at, expect};
use crate::backend::{Activation, DeltaShape};
use crate::checks::{expect_convolution, expect_delta};
use crate::ops::convolve::positions;
use crate::{Error, Result};

pub(super) static RECURRENT: Module = Module {
    name: "recurrent",
    source: concat!(include_str!("../ops/activation.cuh"), include_str!("../ops/recurrent.cu")),
};

/// Threads of a block, and the most values of a state's column that each of them holds, as the kernel has it.
const BLOCK: u32 = 128;
const HELD: usize = 32;

impl Cuda {
    pub(super) fn convolved(
        &self,
        x: &Matrix,
        weight: &[f32],
        bias: Option<&[f32]>,
        activation: Option<Activation>,
        lengths: &[usize],
    ) -> Result<Matrix> {
        expect_convolution([x.rows, x.cols], weight, bias, activation, lengths)?;
        let (kind, [a, b, c, d]) = activation.map_or((-1, [0.0; 4]), code);
        let y = self.matrix(x.rows, x.cols)?;
        let positions: Vec<u32> = positions(lengths).into_iter().map(|position| position as u32).collect();
        let (sent, bias) = (self.send(weight)?, bias.map(|bias| self.send(bias)).transpose()?);
        let positions = self.send(&positions)?;
        let bias = bias.as_ref().map(|bias| bias.pin()).transpose()?;
        let pins = (y.buffer.pin()?, x.buffer.pin_to_read()?, sent.pin()?, positions.pin()?);
        let args = [
            pins.0.arg(),
            pins.1.arg(),
            pins.2.arg(),
            at(bias.as_ref()),
            pins.3.arg(),
            (x.rows as i64).into(),
            (x.cols as i32).into(),
            ((weight.len() / x.cols.max(1)) as i32).into(),
            kind.into(),
            a.into(),
            b.into(),
            c.into(),
            d.into(),
        ];
        self.each(&RECURRENT, "convolve", x.rows * x.cols, &args)?;
        drop(pins);
        Ok(y)
    }

    pub(super) fn decayed(&self, x: &mut Matrix, rates: &[f32], bias: &[f32], [least, most]: [f32; 2]) -> Result<()> {
        expect("decays", "rates", x.cols, rates.len())?;
        expect("decays", "bias values", x.cols, bias.len())?;
        let (rates, bias) = (self.send(rates)?, self.send(bias)?);
        let pins = (x.buffer.pin()?, rates.pin()?, bias.pin()?);
        let args = [
            pins.0.arg(),
            pins.1.arg(),
            pins.2.arg(),
            (x.rows as i64).into(),
            (x.cols as i32).into(),
            least.into(),
            most.into(),
        ];
        self.each(&RECURRENT, "decays", x.rows * x.cols, &args)
    }

    pub(super) fn bounded(&self, x: &mut Matrix, rates: &[f32], bias: &[f32], lower: f32) -> Result<()> {
        expect("bounded_decays", "rates", x.cols, rates.len())?;
        expect("bounded_decays", "bias values", x.cols, bias.len())?;
        let (rates, bias) = (self.send(rates)?, self.send(bias)?);
        let pins = (x.buffer.pin()?, rates.pin()?, bias.pin()?);
        let sizes = [(x.rows as i64).into(), (x.cols as i32).into(), lower.into()];
        let args = [&[pins.0.arg(), pins.1.arg(), pins.2.arg()][..], &sizes].concat();
        self.each(&RECURRENT, "bounded_decays", x.rows * x.cols, &args)
    }

    pub(super) fn recur(
        &self,
        [q, k, v]: [&Matrix; 3],
        decay: &Matrix,
        beta: &Matrix,
        shape: &DeltaShape,
        lengths: &[usize],
    ) -> Result<Matrix> {
        expect_delta([q, k, v, decay, beta].map(|m| [m.rows, m.cols]), shape, lengths)?;
        let DeltaShape { key_heads, value_heads, key_dim, value_dim, scale, replaces, by_channel } = *shape;
        let lanes = key_dim.div_ceil(HELD).next_power_of_two();
        if lanes > 32 {
            let expected = format!("keys of at most {} values a head", 32 * HELD);
            return Err(Error::Shape { op: "delta_rule", expected, found: key_dim.to_string() });
        }
        let mut sequences = Vec::new();
        let mut start = 0;
        for length in lengths {
            sequences.extend([start, *length].map(|x| x as i32));
            start += length;
        }
        let out = self.matrix(q.rows, value_heads * value_dim)?;
        let sequences = self.send(&sequences)?;
        let pins = (out.buffer.pin()?, sequences.pin()?);
        let [q, k, v, decay, beta] = [q, k, v, decay, beta].map(|m| m.buffer.pin_to_read());
        let (q, k, v, decay, beta) = (q?, k?, v?, decay?, beta?);
        let args = [
            pins.0.arg(),
            q.arg(),
            k.arg(),
            v.arg(),
            decay.arg(),
            beta.arg(),
            pins.1.arg(),
            (key_heads as i32).into(),
            (value_heads as i32).into(),
            (key_dim as i32).into(),
            (value_dim as i32).into(),
            (lanes as i32).into(),
            scale.into(),
            i32::from(replaces).into(),
            i32::from(by_channel).into(),
        ];
        let columns = BLOCK as usize / lanes;
        let grid = [lengths.len() * value_heads, value_dim.div_ceil(columns), 1];
        self.grid(&RECURRENT, "delta_rule", grid, BLOCK, 0, &args)?;
        drop(pins);
        Ok(out)
    }
}
