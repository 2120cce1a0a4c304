//! The kernels against plain loops and against the CPU backend: on the simulated device always, on a card where there is one.

mod attention;
mod forward;
mod losses;

use std::sync::{Arc, OnceLock};

use super::{Cuda, Simulated};

/// Backends to test; threads of the simulated ones run in different orders.
///
/// Without a C++ compiler there are none, which is said.
pub(super) fn devices() -> Vec<Cuda> {
    static COMPILER: OnceLock<bool> = OnceLock::new();
    if !COMPILER.get_or_init(|| Simulated::compiler().is_some()) {
        eprintln!("SKIPPED: no C++ compiler, so kernels cannot run on the CPU");
        return Vec::new();
    }
    [0, 1, 5].into_iter().map(|order| Cuda::new(Arc::new(Simulated::new(order)), None).expect("a device")).collect()
}

/// Runs `work` on every device; all simulated ones have to give the same.
pub(super) fn on_all<R: PartialEq + std::fmt::Debug>(work: impl Fn(&Cuda) -> R) -> Option<R> {
    let mut results = devices().into_iter().map(|cuda| work(&cuda));
    let first = results.next()?;
    results.for_each(|other| assert!(other == first, "the result hangs on the order of threads"));
    Some(first)
}
