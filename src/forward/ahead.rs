//! Sends the weights of a block to the device while the block before is at work.
//!
//! A thread takes them from the mapped files, one after the other, and whoever needs one takes what was sent. What was not sent by
//! then is loaded by whoever needs it, so that results never hang on who was faster.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use kernels::Forward;

use super::Plain;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::graph::{Block, Linear, Stored};
use crate::report::Activations;
use crate::weights::RawTensor;

/// Weights on their way to a device; on one to which nothing need be sent, the file's.
pub struct Ahead<'a, B: Forward> {
    backend: &'a B,
    source: &'a Checkpoint,
    /// Bytes that may be on their way at a time, where the device wants any to be.
    most: Option<u64>,
    queue: Queue<B::Stored>,
}

impl<'a, B: Forward> Ahead<'a, B> {
    /// Nothing is sent before [`blocks`](Self::blocks).
    pub fn new(backend: &'a B, source: &'a Checkpoint) -> Ahead<'a, B> {
        Ahead { backend, source, most: backend.sends_ahead(), queue: Queue::new() }
    }

    /// Runs `work`, beside which is sent what it [announces](Self::announce).
    ///
    /// Fails if sending does; everything is over when this returns.
    fn beside<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        let Some(most) = self.most else { return work() };
        self.queue.beside(most, |name, shape| self.send(name, shape), work)
    }

    /// A block begins, and this one follows: has its weights read from disk, and sent unless they take too much of the device.
    fn announce(&self, next: Option<&Block>) {
        let linears = || next.into_iter().flat_map(Block::linears);
        linears().for_each(|linear| self.source.announce(&linear.weight()));
        let Some(most) = self.most else { return };
        let mut coming = Vec::new();
        for linear in linears() {
            if let Some((raw, shape)) = stored(self.source, linear) {
                coming.push((linear.weight(), shape, raw.data.len() as u64));
            }
        }
        if coming.iter().map(|(_, _, bytes)| bytes).sum::<u64>() > most {
            coming.clear();
        }
        self.queue.announce(coming);
    }

    /// Runs `begin`, and `work` on what it gives for each block and its number, while the next block's weights go ahead.
    pub fn blocks<S>(
        &self,
        blocks: &[Block],
        begin: impl FnOnce() -> Result<S>,
        mut work: impl FnMut(&mut S, usize, &Block) -> Result<()>,
    ) -> Result<S> {
        self.beside(|| {
            self.announce(blocks.first());
            let mut state = begin()?;
            for (index, block) in blocks.iter().enumerate() {
                self.announce(blocks.get(index + 1));
                work(&mut state, index, block)?;
            }
            Ok(state)
        })
    }

    /// Loads weights as they are, those that were sent from the device.
    pub fn plain(&self) -> Plain<'_, B> {
        Plain { backend: self.backend, source: self.source, activations: Activations::Exact, ahead: Some(self) }
    }

    /// A weight that was sent, or is being sent; `None` for one that is to be loaded.
    pub(super) fn take(&self, name: &str) -> Result<Option<B::Stored>> {
        if self.most.is_some() { self.queue.take(name) } else { Ok(None) }
    }

    fn send(&self, name: &str, shape: [usize; 2]) -> Result<Option<B::Stored>> {
        let raw = self.source.raw(name).expect("announced");
        let sent = self.backend.send_ahead(raw.data, raw.dtype, shape)?;
        if sent.is_some() {
            self.source.release(name);
        }
        Ok(sent)
    }
}

/// A weight that lies in the file as it is, and its shape.
pub(super) fn stored<'s>(source: &'s Checkpoint, linear: &Linear) -> Option<(RawTensor<'s>, [usize; 2])> {
    let shape = [linear.stored_rows(), linear.cols];
    let raw = source.raw(&linear.weight())?;
    (linear.stored == Stored::Plain && raw.shape == shape).then_some((raw, shape))
}

/// One weight.
struct Transfer<S> {
    name: String,
    shape: [usize; 2],
    bytes: u64,
    /// Which announcement named it.
    block: usize,
    state: State<S>,
}

enum State<S> {
    Waiting,
    Leaving,
    Sent(S),
}

/// Transfers in the order in which they are wanted.
struct Transfers<S> {
    all: Vec<Transfer<S>>,
    /// Announcements so far.
    blocks: usize,
    /// Why no more are sent, until somebody was told.
    error: Option<Error>,
    /// Nobody sends, or nobody wants any more.
    closed: bool,
}

/// What two threads share: one sends, the other takes.
struct Queue<S> {
    transfers: Mutex<Transfers<S>>,
    changed: Condvar,
}

/// Closes a queue whatever becomes of the thread that has it.
struct Closing<'r, S>(&'r Queue<S>);

impl<S> Drop for Closing<'_, S> {
    fn drop(&mut self) {
        let mut transfers = self.0.lock();
        transfers.closed = true;
        transfers.all.retain(|transfer| matches!(transfer.state, State::Sent(_)));
        self.0.changed.notify_all();
    }
}

impl<S> Queue<S> {
    fn new() -> Queue<S> {
        let transfers = Transfers { all: Vec::new(), blocks: 0, error: None, closed: true };
        Queue { transfers: Mutex::new(transfers), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Transfers<S>> {
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'g>(&self, transfers: MutexGuard<'g, Transfers<S>>) -> MutexGuard<'g, Transfers<S>> {
        self.changed.wait(transfers).unwrap_or_else(PoisonError::into_inner)
    }

    fn beside<R>(
        &self,
        most: u64,
        send: impl Fn(&str, [usize; 2]) -> Result<Option<S>> + Send,
        work: impl FnOnce() -> Result<R>,
    ) -> Result<R>
    where
        S: Send,
    {
        self.lock().closed = false;
        let done = std::thread::scope(|scope| {
            let sender = std::thread::Builder::new().name("ahead".to_owned());
            let closing = Closing(self);
            // Without a thread everything is loaded when it is wanted.
            if sender.spawn_scoped(scope, || self.serve(most, send)).is_err() {
                drop(closing);
                return work();
            }
            work()
        });
        let mut transfers = self.lock();
        let (unused, error) = (std::mem::take(&mut transfers.all), transfers.error.take());
        drop((transfers, unused));
        match error {
            Some(error) => done.and(Err(error)),
            None => done,
        }
    }

    /// Sends until the queue is closed.
    fn serve(&self, most: u64, send: impl Fn(&str, [usize; 2]) -> Result<Option<S>>) {
        let _closing = Closing(self);
        let mut transfers = self.lock();
        while !transfers.closed {
            let on_the_way = transfers.all.iter().filter(|transfer| !matches!(transfer.state, State::Waiting));
            let room = most.saturating_sub(on_the_way.map(|transfer| transfer.bytes).sum());
            let next = transfers.all.iter_mut().find(|transfer| matches!(transfer.state, State::Waiting));
            let Some(transfer) = next.filter(|transfer| transfer.bytes <= room) else {
                transfers = self.wait(transfers);
                continue;
            };
            transfer.state = State::Leaving;
            let (name, shape, block) = (transfer.name.clone(), transfer.shape, transfer.block);
            drop(transfers);
            let sent = send(&name, shape);
            transfers = self.lock();
            let place = transfers.all.iter().position(|transfer| transfer.block == block && transfer.name == name);
            match (sent, place) {
                (Ok(Some(sent)), Some(place)) => transfers.all[place].state = State::Sent(sent),
                (Ok(None), Some(place)) => drop(transfers.all.remove(place)),
                // Nobody wants it any more.
                (Ok(_), None) => {}
                (Err(error), _) => {
                    transfers.error = Some(error);
                    return;
                }
            }
            self.changed.notify_all();
        }
    }

    /// Names what will be wanted next, and forgets what was wanted before the block that begins now.
    fn announce(&self, coming: Vec<(String, [usize; 2], u64)>) {
        let mut transfers = self.lock();
        transfers.blocks += 1;
        let block = transfers.blocks;
        let (kept, unused) = std::mem::take(&mut transfers.all).into_iter().partition(|p| p.block + 1 >= block);
        transfers.all = kept;
        if !transfers.closed {
            for (name, shape, bytes) in coming {
                if transfers.all.iter().all(|transfer| transfer.name != name) {
                    transfers.all.push(Transfer { name, shape, bytes, block, state: State::Waiting });
                }
            }
        }
        drop(transfers);
        drop(unused);
        self.changed.notify_all();
    }

    fn take(&self, name: &str) -> Result<Option<S>> {
        let mut transfers = self.lock();
        loop {
            if let Some(error) = transfers.error.take() {
                return Err(error);
            }
            let Some(place) = transfers.all.iter().position(|transfer| transfer.name == name) else { return Ok(None) };
            if let State::Leaving = transfers.all[place].state {
                transfers = self.wait(transfers);
                continue;
            }
            let taken = transfers.all.remove(place);
            self.changed.notify_all();
            return Ok(match taken.state {
                State::Sent(sent) => Some(sent),
                _ => None,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    /// Counts what lives.
    struct Sent<'c>(String, &'c AtomicUsize);

    impl<'c> Sent<'c> {
        fn new(name: &str, living: &'c AtomicUsize) -> Sent<'c> {
            living.fetch_add(1, Ordering::SeqCst);
            Sent(name.to_owned(), living)
        }
    }

    impl Drop for Sent<'_> {
        fn drop(&mut self) {
            self.1.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl<S> Queue<S> {
        fn name(&self, transfers: &[(&str, u64)]) {
            self.announce(transfers.iter().map(|(name, bytes)| ((*name).to_owned(), [1, 1], *bytes)).collect());
        }

        fn wait_until(&self, done: impl Fn(&[Transfer<S>]) -> bool) {
            let mut transfers = self.lock();
            while !done(&transfers.all) {
                transfers = self.wait(transfers);
            }
        }
    }

    fn sent<S>(transfers: &[Transfer<S>]) -> usize {
        transfers.iter().filter(|p| matches!(p.state, State::Sent(_))).count()
    }

    #[test]
    fn what_is_announced_is_sent_and_what_is_not_used_is_dropped() {
        let living = AtomicUsize::new(0);
        let queue = Queue::<Sent<'_>>::new();
        let send = |name: &str, _: [usize; 2]| Ok((name != "refused").then(|| Sent::new(name, &living)));
        let work = || {
            queue.name(&[("a", 4), ("refused", 2), ("b", 4), ("a", 4)]);
            queue.wait_until(|all| all.len() == 2 && sent(all) == 2);
            assert_eq!(queue.take("a")?.unwrap().0, "a");
            assert!(queue.take("a")?.is_none() && queue.take("refused")?.is_none() && queue.take("other")?.is_none());
            // Those of the block that begins stay, and the others go with the next one.
            queue.name(&[("c", 1)]);
            queue.wait_until(|all| sent(all) == 2);
            queue.name(&[("d", 100), ("e", 1)]);
            queue.wait_until(|all| all.len() == 3 && sent(all) == 1);
            assert_eq!(living.load(Ordering::SeqCst), 1);
            // One that is too large for now is loaded by whoever needs it.
            assert!(queue.take("d")?.is_none());
            queue.wait_until(|all| sent(all) == 2);
            Ok(queue.take("c")?.unwrap().0.clone())
        };
        assert_eq!(queue.beside(10, send, work).unwrap(), "c");
        assert_eq!(living.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn no_more_is_on_the_way_than_may_be() {
        let living = AtomicUsize::new(0);
        let (queue, most) = (Queue::<Sent<'_>>::new(), AtomicUsize::new(0));
        let send = |name: &str, _: [usize; 2]| {
            most.fetch_max(living.load(Ordering::SeqCst) + 1, Ordering::SeqCst);
            Ok(Some(Sent::new(name, &living)))
        };
        let names: Vec<String> = (0..50).map(|i| i.to_string()).collect();
        let transfers: Vec<(&str, u64)> = names.iter().map(|name| (&name[..], 3)).collect();
        let work = || {
            queue.name(&transfers);
            for name in &names {
                queue.wait_until(|all| sent(all) > 0);
                assert_eq!(queue.take(name)?.unwrap().0, *name);
            }
            Ok(())
        };
        queue.beside(10, send, work).unwrap();
        assert!((1..=4).contains(&most.load(Ordering::SeqCst)), "{most:?}");
    }

    #[test]
    fn errors_end_the_work_and_nobody_waits_forever() {
        let lost = |name: &str, _: [usize; 2]| -> Result<Option<()>> {
            if name == "bad" { Err(Error::failed("the device is lost")) } else { Ok(Some(())) }
        };
        // Told to whoever wants a weight next, whichever it is.
        let queue = Queue::new();
        let work = || {
            queue.name(&[("good", 1), ("bad", 1), ("never", 1)]);
            queue.wait_until(|all| all.len() < 3);
            queue.take("good").map(drop)
        };
        assert_eq!(queue.beside(10, lost, work).unwrap_err().to_string(), "the device is lost");
        // Told at the end if nobody wants one.
        let work = || {
            queue.name(&[("bad", 1)]);
            queue.wait_until(<[_]>::is_empty);
            queue.name(&[("later", 1)]);
            Ok(())
        };
        assert_eq!(queue.beside(10, lost, work).unwrap_err().to_string(), "the device is lost");
        // The work's own error is told, and ends the sending: of what is being sent only that.
        let (begin, begun) = channel();
        let (go, gone) = channel::<()>();
        let slow = move |_: &str, _: [usize; 2]| {
            // Of a second one nobody is told, and it is let go with the work.
            let _ = begin.send(());
            let _ = gone.recv();
            Ok(Some(()))
        };
        let here = &queue;
        let work = move || -> Result<()> {
            here.name(&[("a", 1), ("b", 1)]);
            begun.recv().unwrap();
            go.send(()).unwrap();
            Err(Error::failed("enough"))
        };
        let told = queue.beside(10, slow, work).unwrap_err().to_string();
        assert!(told == "enough" && queue.lock().all.is_empty(), "{told}");
        // A sender that panics takes nobody with it who waits.
        let (begin, begun) = channel();
        let work = || {
            queue.name(&[("a", 1)]);
            begun.recv().unwrap();
            assert!(queue.take("a")?.is_none());
            Ok(())
        };
        let panics = move |_: &str, _: [usize; 2]| -> Result<Option<()>> {
            begin.send(()).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            panic!("on purpose")
        };
        let run = std::panic::AssertUnwindSafe(|| queue.beside(10, panics, work));
        std::panic::catch_unwind(run).unwrap_err();
    }
}
