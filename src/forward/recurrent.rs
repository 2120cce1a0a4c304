//! What the operations of layers with a state do to one chunk, and gates.

use kernels::Forward;

use super::run::{Loaded, Read, Run};
use crate::error::Result;
use crate::graph::Decay;
use crate::program::Kind;

impl<'b, B: Forward> Run<'_, 'b, B> {
    /// Does one of these operations; `next` gives what it reads, one after the other.
    pub fn recur<'m>(
        &self,
        at: usize,
        mut next: impl FnMut() -> Read<'m, B>,
        lengths: &[usize],
    ) -> Result<Vec<B::Matrix>>
    where
        B: 'm,
    {
        let (backend, operation) = (self.backend, &self.program.operations[at]);
        Ok(match (&operation.kind, &self.loaded[at]) {
            (Kind::Convolve { convolution, .. }, Loaded::Taps(taps, bias)) => {
                let x = next();
                let [_, channels] = backend.shape(x.matrix());
                // What lies behind these channels is other values'.
                let (taps, bias) =
                    (&taps[..channels * convolution.reach()], bias.as_ref().map(|bias| &bias[..channels]));
                vec![backend.convolve(x.matrix(), taps, bias, convolution.activation, lengths)?]
            }
            (Kind::Average(count), _) => {
                // A convolution whose taps are all the same.
                let channels = self.program.values[operation.reads[0]].width;
                let taps = vec![1.0 / *count as f32; channels * count];
                vec![backend.convolve(next().matrix(), &taps, None, None, lengths)?]
            }
            (Kind::Decay(Decay { lower: Some(lower), .. }), Loaded::Decay(rates, bias)) => {
                self.each(operation, next, |x| Ok(backend.bounded_decays(x, rates, bias, *lower)?))?
            }
            (Kind::Decay(decay) | Kind::Step(decay), Loaded::Decay(rates, bias)) => {
                self.each(operation, next, |x| Ok(backend.decays(x, rates, bias, decay.limits)?))?
            }
            (Kind::Skip { .. }, _) => {
                let (mut mixed, mut own) = (self.own(next())?, self.own(next())?);
                backend.scale(&mut own, &[], self.vector(at).unwrap_or_default())?;
                backend.add_scaled(&own, 1.0, &mut mixed)?;
                vec![mixed]
            }
            (Kind::Spread, _) => {
                let width = |value: usize| self.program.values[value].width;
                vec![backend.spread_heads(next().matrix(), width(operation.makes[0]) / width(operation.reads[0]))?]
            }
            (Kind::Scale(factor), _) => {
                let width = self.program.values[operation.reads[0]].width;
                self.each(operation, next, |x| Ok(backend.scale(x, &[], &vec![*factor; width])?))?
            }
            (Kind::Delta(shape), _) => {
                let [q, k, v, decay, beta] = [next(), next(), next(), next(), next()];
                let qkv = [q.matrix(), k.matrix(), v.matrix()];
                vec![backend.delta_rule(qkv, decay.matrix(), beta.matrix(), shape, lengths)?]
            }
            (Kind::Map(activation), _) => self.each(operation, next, |x| Ok(backend.activate(x, *activation)?))?,
            (Kind::Gate(activation), _) => {
                let (mut gate, x) = (self.own(next())?, next());
                backend.gate(&mut gate, x.matrix(), *activation)?;
                vec![gate]
            }
            _ => unreachable!("one of these, with what was loaded where it stands"),
        })
    }
}
