//! Streams: the weights of hyper-connections, what is read by them and what is written.

use kernels::{Activation, Forward, HyperParameters};
use ndarray::Array2;

use super::run::{Loaded, Place, Read, Run};
use super::{LoadedNorm, Supply, Weight, product};
use crate::error::Result;
use crate::graph::{AGREEMENT, Collapse, Hyper, Norm};
use crate::program::{Kind, Operation};

/// What makes weights, in memory.
pub(super) struct LoadedHyper<'b> {
    hyper: &'b Hyper,
    projection: Vec<f32>,
    base: Vec<f32>,
    scale: Vec<f32>,
}

impl<'b> LoadedHyper<'b> {
    pub fn of<B: Forward>(hyper: &'b Hyper, supply: &mut dyn Supply<B>) -> Result<LoadedHyper<'b>> {
        let [projection, base, scale] =
            [&hyper.projection, &hyper.base, &hyper.scale].map(|tensor| supply.vector(tensor));
        Ok(LoadedHyper { hyper, projection: projection?, base: base?, scale: scale? })
    }

    fn weights<B: Forward>(&self, backend: &B, h: &B::Matrix) -> Result<B::Matrix> {
        let LoadedHyper { hyper, projection, base, scale } = self;
        Ok(backend.hyper_weights(h, HyperParameters { projection, base, scale }, &hyper.shape)?)
    }
}

/// What makes of all streams what the head reads.
pub(super) struct Ending<'b, B: Forward> {
    norm: LoadedNorm<'b>,
    collapse: Option<LoadedCollapse<'b, B>>,
}

/// What one hidden state is made of all streams by.
enum LoadedCollapse<'b, B: Forward> {
    Weighed(LoadedHyper<'b>),
    Mean(usize),
    /// Of so many streams, by gates that these make.
    Gated(usize, Vec<Weight<B::Weight>>),
}

impl<'b, B: Forward> Ending<'b, B> {
    pub fn of(norm: &'b Norm, collapse: Option<&'b Collapse>, supply: &mut dyn Supply<B>) -> Result<Ending<'b, B>> {
        let collapse = match collapse {
            None => None,
            Some(Collapse::Weighed(hyper)) => Some(LoadedCollapse::Weighed(LoadedHyper::of(hyper, supply)?)),
            Some(Collapse::Mean(streams)) => Some(LoadedCollapse::Mean(*streams)),
            Some(Collapse::Gated(gated)) => {
                let mut mix = Vec::new();
                for linear in &gated.mix {
                    mix.extend(supply.router(linear)?);
                }
                Some(LoadedCollapse::Gated(gated.streams, mix))
            }
        };
        Ok(Ending { norm: LoadedNorm::of(norm, supply)?, collapse })
    }

    /// `[tokens, hidden]` of `[tokens, streams · hidden]`.
    pub fn apply(&self, backend: &B, h: &B::Matrix) -> Result<B::Matrix> {
        let [tokens, width] = backend.shape(h);
        let mean = |h: &B::Matrix, streams: usize| -> Result<B::Matrix> {
            let weights = backend.upload(Array2::from_elem((tokens, streams), 1.0 / streams as f32))?;
            Ok(backend.read_streams(h, &weights, streams)?)
        };
        match &self.collapse {
            None => self.norm.apply(backend, h),
            Some(LoadedCollapse::Mean(streams)) => self.norm.apply(backend, &mean(h, *streams)?),
            Some(LoadedCollapse::Weighed(hyper)) => {
                let weights = hyper.weights(backend, h)?;
                self.norm.apply(backend, &backend.read_streams(h, &weights, hyper.hyper.shape.streams)?)
            }
            Some(LoadedCollapse::Gated(streams, mix)) => {
                let (mut normed, LoadedNorm { norm, weight, .. }) = (backend.copy(h)?, &self.norm);
                backend.norm_heads(&mut normed, width / streams, norm.kind, weight, None, norm.eps)?;
                let mut narrow = product(backend, &backend.input(backend.copy(&normed)?)?, &mix[0])?;
                let [_, rank] = backend.shape(&narrow);
                backend.scale(&mut narrow, &[], &vec![1.0 / *streams as f32; rank])?;
                backend.activate(&mut narrow, Activation::Silu)?;
                let mut gates = product(backend, &backend.input(narrow)?, &mix[1])?;
                backend.gate(&mut gates, &normed, Activation::Sigmoid)?;
                mean(&gates, *streams)
            }
        }
    }
}

impl<'b, B: Forward> Run<'_, 'b, B> {
    /// Makes weights, reads streams by them, or compares streams.
    pub fn connect<'m>(&self, at: usize, mut next: impl FnMut() -> Read<'m, B>) -> Result<B::Matrix>
    where
        B: 'm,
    {
        match (&self.program.operations[at].kind, &self.loaded[at]) {
            (Kind::Connect(_), Loaded::Hyper(hyper)) => hyper.weights(self.backend, next().matrix()),
            (Kind::ReadStreams(streams), _) => {
                let (h, weights) = (next(), next());
                Ok(self.backend.read_streams(h.matrix(), weights.matrix(), *streams)?)
            }
            (Kind::Agree(width), _) => {
                let (keys, streams) = (next(), next());
                Ok(self.backend.agree_streams(keys.matrix(), streams.matrix(), *width, AGREEMENT)?)
            }
            _ => unreachable!("one of these, with what was loaded where it stands"),
        }
    }

    /// Writes what a layer gives into all streams of a chunk.
    pub fn write_streams(&mut self, operation: &Operation<'b>, hyper: Option<&Hyper>, place: Place<'_>) -> Result<()> {
        let found = self.compute(&operation.reads[1..], place)?;
        self.keep_stream(operation, place.index)?;
        let hidden = &mut self.chunks[place.index].hidden;
        let (y, weights) = (found[0].matrix(), found[1].matrix());
        match hyper {
            Some(hyper) => self.backend.write_streams(y, weights, &hyper.shape, hidden)?,
            None => self.backend.mix_streams(y, weights, self.backend.shape(y)[1], hidden)?,
        }
        Ok(())
    }
}
