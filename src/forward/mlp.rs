//! Feed-forward layers.

use std::cell::RefCell;

use kernels::Backend;

use super::{Chunk, Run, Supply, Weight};
use crate::error::Result;
use crate::graph::Mlp;

pub(super) fn run<B: Backend>(
    run: &Run<'_, B>,
    mlp: &Mlp,
    supply: &mut dyn Supply<B>,
    chunks: &mut [Chunk<B::Matrix>],
) -> Result<()> {
    let loaded = layer(run, mlp, supply, chunks)?;
    if !supply.needs_output(run.last) {
        return Ok(());
    }
    for index in 0..chunks.len() {
        let x = loaded.inner(run, mlp, chunks, index)?;
        run.add(&x, &loaded.down, &mut chunks[index].hidden)?;
    }
    Ok(())
}

/// A feed-forward layer whose weights are there.
pub(super) struct Loaded<B: Backend> {
    inputs: Vec<Weight<B::Weight>>,
    /// The input of the last linear, for each chunk for which it is known.
    kept: Vec<RefCell<Option<B::Input>>>,
    pub down: Weight<B::Weight>,
}

impl<B: Backend> Loaded<B> {
    /// The input of the last linear, for one chunk; handed out once.
    pub fn inner(&self, run: &Run<'_, B>, mlp: &Mlp, chunks: &[Chunk<B::Matrix>], index: usize) -> Result<B::Input> {
        taken(run, mlp, &self.inputs, &self.kept, chunks, index)
    }
}

/// The input of the last linear, for one chunk: what was kept of it, which is then gone, or computed.
fn taken<B: Backend>(
    run: &Run<'_, B>,
    mlp: &Mlp,
    inputs: &[Weight<B::Weight>],
    kept: &[RefCell<Option<B::Input>>],
    chunks: &[Chunk<B::Matrix>],
    index: usize,
) -> Result<B::Input> {
    match kept[index].take() {
        Some(x) => Ok(x),
        None => activate(run.backend, mlp, inputs, &run.input(chunks, index)?),
    }
}

/// What the last linear reads.
pub(super) fn activate<B: Backend>(
    backend: &B,
    mlp: &Mlp,
    inputs: &[Weight<B::Weight>],
    x: &B::Input,
) -> Result<B::Input> {
    // Types of gate and up differ only where somebody asked for that: what both read is then rounded for one after the other.
    let mut kinds: Vec<_> = inputs.iter().filter_map(|weight| weight.rounding).collect();
    kinds.dedup();
    let mut kept = None;
    for kind in kinds {
        kept = Some(backend.round_activations(kept.as_ref().unwrap_or(x), kind)?);
    }
    let x = kept.as_ref().unwrap_or(x);
    Ok(match inputs {
        [gate, up] => backend.gated(x, [&gate.matrix, &up.matrix], [gate.bias(), up.bias()], mlp.activation)?,
        [up, ..] => backend.activated(x, &up.matrix, up.bias(), mlp.activation)?,
        [] => unreachable!("a feed-forward layer has an input"),
    })
}

/// Asks for the weights of a layer that all tokens go through.
pub(super) fn layer<B: Backend>(
    run: &Run<'_, B>,
    mlp: &Mlp,
    supply: &mut dyn Supply<B>,
    chunks: &[Chunk<B::Matrix>],
) -> Result<Loaded<B>> {
    let all = 0..chunks.len();
    let group: Vec<_> = mlp.inputs.iter().collect();
    let inputs = supply.linears(&group, &|see| all.clone().try_for_each(|index| see(&run.input(chunks, index)?)))?;
    let tokens: usize = chunks.iter().flat_map(|chunk| &chunk.lengths).sum();
    let keeps = tokens * mlp.inner() <= run.backend.kept_values();
    let kept: Vec<RefCell<Option<B::Input>>> = all.clone().map(|_| RefCell::default()).collect();
    // Kept as soon as it is there and has been seen: what is put aside for want of room is then written once and read once.
    let down = supply.linears(&[&mlp.down], &|see| {
        all.clone().try_for_each(|index| {
            let x = taken(run, mlp, &inputs, &kept, chunks, index)?;
            see(&x)?;
            kept[index].replace(keeps.then_some(x));
            Ok(())
        })
    })?;
    let down = down.into_iter().next().expect("one weight");
    Ok(Loaded { inputs, kept, down })
}
