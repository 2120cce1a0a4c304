//! Streams: the weights of hyper-connections, what is read by them and what is written.

use kernels::{Forward, HyperParameters};
use ndarray::Array2;

use super::Supply;
use super::run::{Loaded, Place, Read, Run};
use crate::error::Result;
use crate::graph::{Collapse, Hyper};
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

/// What one hidden state is made of all streams by.
pub(super) struct LoadedCollapse<'b> {
    streams: usize,
    hyper: Option<LoadedHyper<'b>>,
}

impl<'b> LoadedCollapse<'b> {
    pub fn of<B: Forward>(collapse: &'b Collapse, supply: &mut dyn Supply<B>) -> Result<LoadedCollapse<'b>> {
        let hyper = collapse.hyper().map(|hyper| LoadedHyper::of(hyper, supply)).transpose()?;
        Ok(LoadedCollapse { streams: collapse.streams(), hyper })
    }

    /// `[tokens, hidden]` of `[tokens, streams · hidden]`.
    pub fn apply<B: Forward>(&self, backend: &B, h: &B::Matrix) -> Result<B::Matrix> {
        let weights = match &self.hyper {
            Some(hyper) => hyper.weights(backend, h)?,
            None => {
                let [tokens, _] = backend.shape(h);
                backend.upload(Array2::from_elem((tokens, self.streams), 1.0 / self.streams as f32))?
            }
        };
        Ok(backend.read_streams(h, &weights, self.streams)?)
    }
}

impl<'b, B: Forward> Run<'_, 'b, B> {
    /// Makes weights, or reads streams by them.
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
            _ => unreachable!("one of these, with what was loaded where it stands"),
        }
    }

    /// Writes what a layer gives into all streams of a chunk.
    pub fn write_streams(&mut self, operation: &Operation<'b>, hyper: &Hyper, place: Place<'_>) -> Result<()> {
        let found = self.compute(&operation.reads[1..], place)?;
        self.keep_stream(operation, place.index)?;
        let hidden = &mut self.chunks[place.index].hidden;
        Ok(self.backend.write_streams(found[0].matrix(), found[1].matrix(), &hyper.shape, hidden)?)
    }
}
