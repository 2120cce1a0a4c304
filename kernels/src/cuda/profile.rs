//! Time of each kind of work, which the card takes itself: nothing waits for it.

use std::collections::{HashMap, VecDeque};

use cudarc::driver::sys;

use super::card::check;
use crate::Result;

/// Launches whose times are not read yet, at most.
const PENDING: usize = 1024;

/// Time of each kind of work, if it is asked for.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// Seconds and launches by kernel; products by their operands' type.
    pub kernels: HashMap<String, (f64, usize)>,
}

impl Profile {
    /// A line for each kernel, the longest first.
    pub fn text(&self) -> String {
        let mut kernels: Vec<_> = self.kernels.iter().collect();
        kernels.sort_by(|a, b| b.1.0.total_cmp(&a.1.0).then_with(|| a.0.cmp(b.0)));
        let total: f64 = kernels.iter().map(|(_, (seconds, _))| seconds).sum();
        let line = |name: &str, seconds: f64, count: usize| {
            format!("{name:<28} {seconds:>9.3} s {:>5.1} % {count:>9} launches\n", 100.0 * seconds / total.max(1e-9))
        };
        let lines: String = kernels.iter().map(|(name, (seconds, count))| line(name, *seconds, *count)).collect();
        lines + &line("all", total, kernels.iter().map(|(_, (_, count))| count).sum())
    }
}

/// Events of one stream around each launch, and what they told so far.
#[derive(Debug, Default)]
pub(super) struct Clock {
    known: Profile,
    /// A name, and the events before and after, in the order of the stream.
    pending: VecDeque<(String, [sys::CUevent; 2])>,
    spare: Vec<sys::CUevent>,
}

impl Clock {
    /// Has the card take the time of `work`, which is asked for in `stream`; the context is current.
    pub fn take(&mut self, stream: sys::CUstream, name: String, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let events = [self.event()?, self.event()?];
        // SAFETY: an event and a stream of this context.
        check("event", unsafe { sys::cuEventRecord(events[0], stream) })?;
        work()?;
        // SAFETY: as above.
        check("event", unsafe { sys::cuEventRecord(events[1], stream) })?;
        self.pending.push_back((name, events));
        if self.pending.len() < PENDING { Ok(()) } else { self.settle(PENDING / 2) }
    }

    /// What became of all work so far, which is waited for.
    pub fn profile(&mut self) -> Result<Profile> {
        self.settle(self.pending.len())?;
        Ok(self.known.clone())
    }

    fn event(&mut self) -> Result<sys::CUevent> {
        if let Some(event) = self.spare.pop() {
            return Ok(event);
        }
        let mut event = std::ptr::null_mut();
        // SAFETY: a place to write to; the context is current.
        check("event", unsafe { sys::cuEventCreate(&mut event, 0) })?;
        Ok(event)
    }

    /// Reads the times of the oldest launches.
    fn settle(&mut self, count: usize) -> Result<()> {
        let Some((_, [_, last])) = count.checked_sub(1).and_then(|last| self.pending.get(last)) else { return Ok(()) };
        // SAFETY: an event of this context. What was asked for before it is done when it is.
        check("waiting for the GPU", unsafe { sys::cuEventSynchronize(*last) })?;
        for (name, events) in self.pending.drain(..count) {
            let seconds = elapsed(events)?;
            let entry = self.known.kernels.entry(name).or_default();
            entry.0 += seconds;
            entry.1 += 1;
            self.spare.extend(events);
        }
        Ok(())
    }
}

/// Seconds between two events that are over.
///
/// The function is looked up under the name that drivers for CUDA 12.0 have too.
fn elapsed([from, to]: [sys::CUevent; 2]) -> Result<f64> {
    type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
    let mut milliseconds = 0.0f32;
    // SAFETY: the driver's library, which is loaded, and the type that its documentation gives this function; a place to write to, and
    // events that take the time.
    let code = unsafe {
        match sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0") {
            Ok(function) => function(&mut milliseconds, from, to),
            Err(_) => sys::CUresult::CUDA_ERROR_NOT_FOUND,
        }
    };
    check("time between events", code)?;
    Ok(f64::from(milliseconds) / 1e3)
}
