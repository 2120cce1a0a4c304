//! Memory of a device without which it cannot work on a model at all.

use calibration::statistics::Needs;
use kernels::Backend;

use super::Job;
use crate::error::{Error, Result};
use crate::graph::{Graph, Linear};
use crate::memory::Device;
use crate::targets::Target;

/// What a run does on its device.
pub(super) struct OnDevice {
    /// It sweeps, and so factors Hessians.
    sweeps: bool,
    /// It measures what was written.
    measures: bool,
    /// Tokens that go through an operator together.
    tokens: usize,
}

impl OnDevice {
    /// What a run does for these of its outputs.
    pub(super) fn of<B: Backend>(
        job: &Job<'_>,
        targets: &[Box<dyn Target<B>>],
        device: Device,
        members: &[usize],
        measures: bool,
    ) -> OnDevice {
        let recipe = &job.outputs[members[0]].recipe;
        let sweeps = members.iter().any(|index| job.outputs[*index].recipe.method.sweeps());
        let any = members.iter().any(|index| targets[*index].needs() > Needs::Nothing);
        let tokens = if any { recipe.samples.saturating_mul(recipe.seq_len) } else { 0 };
        OnDevice { sweeps, measures, tokens: tokens.min(device.at_once.max(recipe.seq_len)) }
    }
}

/// Bytes of a device's memory without which not even one operator's work on so many tokens can be done, and the largest linear; what is more
/// than that is put aside on the host while it is not used.
pub(super) fn room_of<'g>(graph: &'g Graph, needs: &OnDevice) -> (u64, Option<&'g Linear>) {
    let OnDevice { sweeps, measures, tokens } = *needs;
    // The Hessian, its factorization in doubles and the factor; the target, its errors and what feeds back.
    let solving = |linear: &Linear| {
        let (rows, cols) = (linear.rows as u64, linear.cols as u64);
        16 * rows * cols + if sweeps { 16 * cols * cols } else { 0 }
    };
    let Some(largest) = graph.linears().max_by_key(|linear| solving(linear)) else { return (0, None) };
    let widest = graph.linears().map(|linear| linear.rows.max(linear.cols)).max().unwrap_or(0);
    // Two products of a gate, and what they become.
    let running = (tokens as u64).saturating_mul(12 * widest as u64);
    let head = if measures { 4 * (graph.vocabulary * graph.hidden) as u64 } else { 0 };
    (solving(largest).max(running).max(head), Some(largest))
}

/// Refuses a model that a device has no [room](room_of) for.
pub(super) fn check_room(room: u64, graph: &Graph, needs: &OnDevice) -> Result<()> {
    let (wanted, largest) = room_of(graph, needs);
    let Some(largest) = largest.filter(|_| wanted > room) else { return Ok(()) };
    Err(Error::usage(format!(
        "`{}` takes {:.2} GB of the GPU's memory and {:.2} GB may be used: give more with --gpu-memory, or run with --device cpu",
        largest.module,
        wanted as f64 / 1e9,
        room as f64 / 1e9
    )))
}
