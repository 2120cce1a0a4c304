//! Work that is done behind whoever hands it over: on a thread of its own, in order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use crate::error::{Error, Result};

/// Pieces of work that wait at most.
const WAITING: usize = 2;

/// Where work is handed over.
pub struct Behind<T>(SyncSender<T>);

impl<T> Behind<T> {
    /// Hands a piece over, and waits while too many wait already.
    ///
    /// Fails once an earlier one has failed; [`behind`] then tells why.
    pub fn hand_over(&self, piece: T) -> Result<()> {
        self.0.send(piece).map_err(|_| Error::failed("writing failed"))
    }
}

/// Does `work` on each piece that `run` hands over, beside it; all of it is done when this returns.
///
/// Fails when either does; of two errors that of `work` is told, as `run` may have failed only because of it.
pub fn behind<T: Send, R>(
    work: impl FnMut(T) -> Result<()> + Send,
    run: impl FnOnce(&Behind<T>) -> Result<R>,
) -> Result<R> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(WAITING);
        let worker = scope.spawn(move || receiver.into_iter().try_for_each(work));
        let hand = Behind(sender);
        let result = run(&hand);
        drop(hand);
        match worker.join() {
            Ok(done) => done.and(result),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Does `other` on a thread of its own beside `run`, which tells it when nothing more is wanted of it.
///
/// Fails when either does, with `run`'s error if both do: what is told hangs on no one's speed.
pub fn beside<T: Send, R>(
    other: impl FnOnce(&AtomicBool) -> Result<T> + Send,
    run: impl FnOnce() -> Result<R>,
) -> Result<(R, T)> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| other(&over));
        let result = run();
        if result.is_err() {
            over.store(true, Ordering::Relaxed);
        }
        match worker.join() {
            Ok(done) => Ok((result?, done?)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_done_in_order_before_it_returns() {
        let mut done = Vec::new();
        let work = |piece: usize| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            done.push(piece);
            Ok(())
        };
        let run = |hand: &Behind<usize>| (0..20).try_for_each(|piece| hand.hand_over(piece)).map(|()| "run");
        assert_eq!(behind(work, run).unwrap(), "run");
        assert_eq!(done, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn a_failure_stops_whoever_hands_over_and_is_told() {
        let work = |piece: usize| if piece == 3 { Err(Error::failed("the disk is full")) } else { Ok(()) };
        let mut handed = 0;
        let run = |hand: &Behind<usize>| {
            (0..1000).try_for_each(|piece| {
                handed += 1;
                hand.hand_over(piece)
            })
        };
        assert_eq!(behind(work, run).unwrap_err().to_string(), "the disk is full");
        assert!(handed < 1000);
        // The last piece's failure is not lost.
        let alone = behind(work, |hand| hand.hand_over(3));
        assert_eq!(alone.unwrap_err().to_string(), "the disk is full");
    }

    #[test]
    fn of_two_at_once_the_error_of_the_first_is_told() {
        let fails = |what: &'static str| move || Err::<(), _>(Error::failed(what));
        let told = |result: Result<((), ())>| result.unwrap_err().to_string();
        assert_eq!(told(beside(|_| fails("other")(), fails("run"))), "run");
        assert_eq!(told(beside(|_| fails("other")(), || Ok(()))), "other");
        // It is told when nothing is wanted of it any more, and not before.
        let waits = |over: &AtomicBool| {
            while !over.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            Ok(())
        };
        assert_eq!(told(beside(waits, fails("run"))), "run");
        assert_eq!(beside(|over| Ok(over.load(Ordering::Relaxed)), || Ok(3)).unwrap(), (3, false));
    }

    #[test]
    fn what_was_handed_over_is_done_although_the_rest_fails() {
        let mut done = 0;
        let run = |hand: &Behind<usize>| {
            hand.hand_over(1)?;
            Err::<(), _>(Error::failed("enough"))
        };
        let told = behind(
            |piece| {
                done += piece;
                Ok(())
            },
            run,
        )
        .unwrap_err();
        assert_eq!((told.to_string().as_str(), done), ("enough", 1));
    }
}
