//! Work on what others have written, over which a library may panic, overflow its stack, or never come to an end.
//!
//! Chat templates and tokenizers are programs in a checkpoint's files. They run on a thread of their own with a deep stack, where a
//! panic is an error and prints nothing; whoever embeds this crate may put limits on time and memory [around](Limits) them.

use std::sync::Arc;

/// The name of such a thread, by which a panic hook knows what not to print.
pub const GUARDED: &str = "guarded";

/// Enough for the deepest nesting that a file of a sensible size can hold; taken only as far as it is used.
const STACK: usize = 256 << 20;

/// Limits around work on a checkpoint's own programs.
pub trait Limits: Send + Sync + std::fmt::Debug {
    /// Calls `work`, which goes through `bytes` of text. May end the whole process where `work` takes too much.
    fn around(&self, bytes: usize, work: &mut (dyn FnMut() + Send));
}

/// Limits, if there are any.
pub type Guard = Option<Arc<dyn Limits>>;

/// Runs `work` on a thread of its own within the guard's limits. Fails with `broken` where it panics, and with the system's reason where
/// no thread can be had.
pub fn guarded<T: Send>(
    guard: &Guard,
    bytes: usize,
    broken: &str,
    work: impl FnOnce() -> T + Send,
) -> Result<T, String> {
    let thread = std::thread::Builder::new().name(GUARDED.to_owned()).stack_size(STACK);
    std::thread::scope(|scope| {
        let thread = thread.spawn_scoped(scope, || {
            let Some(limits) = guard else { return Some(work()) };
            let (mut work, mut done) = (Some(work), None);
            limits.around(bytes, &mut || {
                if let Some(work) = work.take() {
                    done = Some(work());
                }
            });
            done
        });
        let thread = thread.map_err(|error| {
            format!("there is no thread to work with it on ({error}); give the process more memory, or address space")
        })?;
        thread.join().ok().flatten().ok_or_else(|| broken.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Twice;

    impl Limits for Twice {
        fn around(&self, bytes: usize, work: &mut (dyn FnMut() + Send)) {
            assert_eq!(bytes, 3);
            work();
            work();
        }
    }

    #[test]
    fn work_is_done_once_and_a_panic_is_an_error() {
        assert_eq!(guarded(&None, 0, "", || 7), Ok(7));
        let mut calls = 0;
        let guard: Guard = Some(Arc::new(Twice));
        assert_eq!(guarded(&guard, 3, "", || calls += 1), Ok(()));
        assert_eq!(calls, 1);
        assert_eq!(
            guarded::<()>(&None, 0, "it is broken", || panic!("told by nobody")),
            Err("it is broken".to_owned())
        );
    }

    #[test]
    fn a_deep_stack_is_there() {
        fn deep(levels: usize) -> usize {
            let room = std::hint::black_box([levels; 64]);
            if levels == 0 { room[0] } else { deep(levels - 1) + room[1].min(1) }
        }
        assert_eq!(guarded(&None, 0, "", || deep(100_000)), Ok(100_000));
    }
}
