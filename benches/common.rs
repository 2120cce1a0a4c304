//! What the benchmarks share: the clock, repeatable numbers, and state that is made once and only when it is measured.

use std::ffi::c_long;
use std::fmt::Debug;
use std::time::{Duration, Instant};

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkGroup, Throughput};

/// Criterion with [`Clock`].
pub type Criterion = criterion::Criterion<Clock>;

/// Wall time; with `CLOCK=cpu` the processor time of all threads, which other programs' work hardly changes.
pub struct Clock {
    start: Instant,
    cpu: bool,
}

unsafe extern "C" {
    /// The C library's: processor time of the whole process, on Unix in microseconds.
    safe fn clock() -> c_long;
}

impl Clock {
    fn now(&self) -> Duration {
        if self.cpu { Duration::from_micros(clock() as u64) } else { self.start.elapsed() }
    }
}

impl Measurement for Clock {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        self.now()
    }

    fn end(&self, start: Duration) -> Duration {
        self.now() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// The settings of every benchmark.
pub fn criterion() -> Criterion {
    let cpu = std::env::var("CLOCK").is_ok_and(|clock| clock == "cpu");
    criterion::Criterion::default().with_measurement(Clock { start: Instant::now(), cpu })
}

/// `count` repeatable numbers, roughly normal with a standard deviation of 1.
pub fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.7).collect()
}

/// Measures `run` on what `make` gives; a filter that leaves the benchmark out leaves out `make` too.
pub fn measure<S, R, E: Debug>(
    group: &mut BenchmarkGroup<'_, Clock>,
    name: &str,
    work: Throughput,
    make: impl Fn() -> S,
    mut run: impl FnMut(&mut S) -> Result<R, E>,
) {
    let mut state = None;
    group.throughput(work);
    group.bench_function(name, |bencher| {
        let state = state.get_or_insert_with(&make);
        bencher.iter(|| run(state).expect("a benchmark measures what works"));
    });
}
