//! The kernels against plain loops and against the CPU backend: on the simulated device always, on a card where there is one.

mod ahead;
mod aside;
mod attention;
mod blocks;
mod compiled;
mod factor;
mod forward;
mod hyper;
mod losses;
mod pack;
mod recurrent;
mod search;
mod sparse;
mod streams;
mod sweep;

use std::sync::{Arc, OnceLock};

use super::{Card, Cuda, Simulated};

/// Says that a test is left out; where everything is to be tested that is a failure.
pub(super) fn skip(why: &str) {
    assert!(std::env::var_os("QUANTC_TEST_ALL").is_none(), "QUANTC_TEST_ALL is set, and there is {why}");
    eprintln!("SKIPPED: {why}");
}

/// Backends to test: the card, if there is one, else simulated ones, whose threads run in different orders.
pub(super) fn devices() -> Vec<Cuda> {
    static CARD: OnceLock<Option<Cuda>> = OnceLock::new();
    let card = CARD.get_or_init(|| {
        let card = match Card::open(0) {
            Err(error) if std::env::var_os("QUANTC_TEST_CARD").is_some() => panic!("QUANTC_TEST_CARD is set: {error}"),
            card => card.ok()?,
        };
        Some(Cuda::new(Arc::new(card), None).expect("a card"))
    });
    if let (Some(card), None) = (card, std::env::var_os("QUANTC_TEST_SIMULATED")) {
        return vec![card.clone(), card.clone()];
    }
    simulated(80)
}

/// Simulated devices of a compute capability, whose threads run in different orders; none where there is no compiler for them.
pub(super) fn simulated(capability: u32) -> Vec<Cuda> {
    static COMPILER: OnceLock<bool> = OnceLock::new();
    if !COMPILER.get_or_init(|| Simulated::compiler().is_some()) {
        skip("no C++ compiler, so kernels cannot run on the CPU");
        return Vec::new();
    }
    let device = |order| Arc::new(Simulated::with_capability(order, capability));
    [0, 1, 21].into_iter().map(|order| Cuda::new(device(order), None).expect("a device")).collect()
}

/// Runs `work` on every device; all have to give the same, a card twice in a row.
pub(super) fn on_all<R: PartialEq + std::fmt::Debug>(work: impl Fn(&Cuda) -> R) -> Option<R> {
    on_these(devices(), work)
}

/// The same on some devices.
pub(super) fn on_these<R: PartialEq + std::fmt::Debug>(devices: Vec<Cuda>, work: impl Fn(&Cuda) -> R) -> Option<R> {
    let mut results = devices.into_iter().map(|cuda| work(&cuda));
    let first = results.next()?;
    results.for_each(|other| assert!(other == first, "the result hangs on the order of threads"));
    Some(first)
}
