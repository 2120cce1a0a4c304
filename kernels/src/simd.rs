//! Run-time choice of the instruction set, and the few transcendental functions the operations share.
//!
//! Loops are written once, without intrinsics, in a form the compiler vectorizes; [`simd_fn!`](crate::simd_fn) compiles
//! the same body for AVX-512, for AVX2 and for the baseline, so that all three give equal results.

use std::sync::OnceLock;

/// The widest instruction set that this CPU has and the loops are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2.
    Avx2,
    /// What every CPU of this architecture has.
    Baseline,
}

/// Detects the instruction set once.
pub fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = testing::forced() {
        return level;
    }
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return Level::Avx512;
            }
            if is_x86_feature_detected!("avx2") {
                return Level::Avx2;
            }
        }
        Level::Baseline
    })
}

/// Defines a function whose body is compiled per instruction set and chosen at run time.
#[macro_export]
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match $crate::simd::level() {
                    // SAFETY: the level says that this CPU has the features.
                    $crate::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::simd::Level::Baseline => {}
                }
            }
            body($($arg),*)
        }
    };
}

/// Lanes that reductions keep apart, so that the order of additions is the same on every instruction set.
pub const LANES: usize = 16;

/// `eˣ` to about two units in the last place; 0 below −87.3, `e^88.3` above 88.3.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two pieces, so that x − n·ln 2 is exact enough.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.3, 88.3);
    let n = (clamped * LOG2_E).round_ties_even();
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let y = p * r * r + r + 1.0;
    let scaled = y * f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < -87.3 { 0.0 } else { scaled }
}

/// `tanh(x)` to about three units in the last place.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Below 5/8 the quotient would cancel: there (tanh x − x) / x³ as a polynomial in x², of least relative error of tanh.
    let s = x * x;
    let mut p = -5.704_975_7e-3;
    p = p * s + 2.063_907_7e-2;
    p = p * s - 5.373_971e-2;
    p = p * s + 1.333_144_2e-1;
    p = p * s - 3.333_328e-1;
    let small = p * s * x + x;
    let large = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.625 { small } else { large }
}

/// `Σ f(x)` in lanes that are added up in one order on every instruction set.
#[inline(always)]
pub fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|v| f(*v)).sum();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += f(chunk[lane]);
        }
    }
    sum_lanes(lanes) + rest
}

/// `Σ f(i)` over lanes, pairwise at the end.
#[inline(always)]
pub fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
pub(crate) mod testing {
    //! Loops as narrower CPUs run them.

    use std::cell::Cell;

    use super::{Level, level};

    thread_local! {
        static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
    }

    /// What this thread is to use in place of the widest.
    pub fn forced() -> Option<Level> {
        FORCED.get()
    }

    /// What `work` gives on each instruction set that this CPU has, on threads of its own; all have to give the same.
    pub fn same_at_every_level<R: PartialEq + Send>(what: &str, work: impl Fn() -> R + Sync) -> R {
        let all = [Level::Avx512, Level::Avx2, Level::Baseline];
        let mut results = all.into_iter().skip_while(|l| *l != level()).map(|wanted| {
            let force = move |_| FORCED.set(Some(wanted));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(2).start_handler(force).build().expect("threads");
            let (used, result) = pool.install(|| (level(), work()));
            assert_eq!(used, wanted);
            (wanted, result)
        });
        let (widest, first) = results.next().expect("the baseline at least");
        results.for_each(|(level, other)| assert!(other == first, "{what}: {level:?} differs from {widest:?}"));
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_library() {
        let mut x = -90.0f32;
        while x < 88.0 {
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= exact * 3e-7 + 2e-38, "exp({x}) = {ours}, not {exact}");
            x += 0.013;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn tanh_agrees_with_the_library() {
        let small = (0..400).map(|i| 1e-20 * 1.12f32.powi(i));
        for x in (-12_000..12_000).map(|i| i as f32 * 1.07e-3).chain(small) {
            let (ours, exact) = (f64::from(tanh(x)), f64::from(x).tanh());
            assert!((ours - exact).abs() <= exact.abs() * 3e-7, "tanh({x}) = {ours}, not {exact}");
        }
        for (x, exact) in [(0.0, 0.0), (1e30, 1.0), (f32::NEG_INFINITY, -1.0)] {
            assert_eq!(tanh(x), exact);
        }
        assert!(tanh(f32::NAN).is_nan());
    }
}
