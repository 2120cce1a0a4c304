//! Device memory within a budget: what does not fit is put aside on the host and comes back when it is used.
//!
//! Most of it is scanned in turn, again and again: the activations of one chunk of tokens after the other. Whoever then puts aside what
//! was unused the longest puts aside what is needed next, and has to bring back everything in each scan. So uses are counted, and what
//! goes is that whose next use is the furthest away, reckoned from the pause before its last one. What was only read since it came back
//! is still on the host, and need not be copied there again.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::device::{Address, Aside, Device, Ticket};
use crate::{Error, Result};

/// Smaller buffers stay where they are.
const MOVABLE: usize = 1 << 12;
/// Uses of anything within which a buffer counts as at work: it was made for, or belongs to, the operation at hand.
const FRESH: u64 = 32;

/// A device's memory, as far as one backend may use it.
#[derive(Debug)]
pub(super) struct Pool {
    pub device: Arc<dyn Device>,
    budget: u64,
    ledger: Mutex<Ledger>,
    /// Held while a buffer is sent ahead.
    road: Mutex<()>,
    clock: AtomicU64,
}

#[derive(Debug, Default)]
struct Ledger {
    used: u64,
    peak: u64,
    /// Bytes that were put aside, all times together.
    moved: u64,
    /// Bytes that were brought back.
    returned: u64,
    /// Bytes that were sent ahead, all together.
    ahead: u64,
    /// A buffer is being sent ahead, and not among the slots yet.
    arriving: bool,
    /// The device had less than the budget.
    short: bool,
    slots: Vec<Weak<Slot>>,
}

impl Ledger {
    fn take(&mut self, bytes: usize) {
        self.used += bytes as u64;
        self.peak = self.peak.max(self.used);
    }
}

/// What became of the memory so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The most that was in use at a time, in bytes.
    pub peak: u64,
    /// Bytes that were put aside on the host, all times together.
    pub moved: u64,
    /// Bytes that were brought back from there.
    pub returned: u64,
    /// Bytes that were sent ahead of their use, all together.
    pub ahead: u64,
    /// Whether the device had no room although the budget had.
    pub short: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    pub fn new(device: Arc<dyn Device>, budget: u64) -> Pool {
        Pool { device, budget, ledger: Mutex::default(), road: Mutex::default(), clock: AtomicU64::new(0) }
    }

    pub fn budget(&self) -> u64 {
        self.budget
    }

    pub fn usage(&self) -> Usage {
        let ledger = lock(&self.ledger);
        let Ledger { peak, moved, returned, ahead, short, .. } = *ledger;
        Usage { peak, moved, returned, ahead, short }
    }

    /// Takes memory, putting aside what is not needed for the longest time until there is room.
    fn allocate(&self, bytes: usize) -> Result<Address> {
        loop {
            {
                let mut ledger = lock(&self.ledger);
                if ledger.used + bytes as u64 <= self.budget {
                    if let Some(at) = self.device.allocate(bytes)? {
                        ledger.take(bytes);
                        return Ok(at);
                    }
                    ledger.short = true;
                }
            }
            let arriving = lock(&self.ledger).arriving;
            if !self.put_one_aside()? {
                if arriving {
                    // It can be put aside when it is there.
                    drop(lock(&self.road));
                    continue;
                }
                let used = lock(&self.ledger).used;
                return Err(Error::Device(format!(
                    "{}: {:.2} GB of device memory are not enough: an operation needs {:.2} GB beside {:.2} GB in use; give more \
                     with --gpu-memory, or run on the CPU",
                    self.device.name(),
                    self.budget as f64 / 1e9,
                    bytes as f64 / 1e9,
                    used as f64 / 1e9
                )));
            }
        }
    }

    /// Takes memory for something that is not needed yet; `None` where something else would have to make room for it.
    fn allocate_ahead(&self, bytes: usize) -> Result<Option<Address>> {
        let mut ledger = lock(&self.ledger);
        if ledger.used + bytes as u64 > self.budget {
            return Ok(None);
        }
        let at = self.device.allocate_ahead(bytes)?;
        if at.is_some() {
            ledger.take(bytes);
            ledger.arriving = true;
        }
        Ok(at)
    }

    fn put_one_aside(&self) -> Result<bool> {
        let mut slots: Vec<Arc<Slot>> = {
            let mut ledger = lock(&self.ledger);
            ledger.slots.retain(|slot| slot.strong_count() > 0);
            ledger.slots.iter().filter_map(Weak::upgrade).collect()
        };
        let now = self.clock.load(Ordering::Relaxed);
        slots.sort_by_cached_key(|slot| slot.rank(now));
        for slot in slots {
            let Ok(mut place) = slot.place.try_lock() else { continue };
            if slot.pins.load(Ordering::Relaxed) > 0 {
                continue;
            }
            slot.settle(&mut place)?;
            if let Place::Device(at, kept) = &mut *place {
                let (at, mut moved) = (*at, 0);
                let aside = match kept.take() {
                    Some(aside) => aside,
                    None => {
                        moved = slot.bytes as u64;
                        self.device.put_aside(at, slot.bytes)?
                    }
                };
                *place = Place::Host(aside);
                self.device.release(at, slot.bytes);
                let mut ledger = lock(&self.ledger);
                ledger.used -= slot.bytes as u64;
                ledger.moved += moved;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[derive(Debug)]
enum Place {
    /// On the device, and perhaps still on the host as well.
    Device(Address, Option<Aside>),
    /// On the device, for what waits for the copy.
    Arriving(Address, Ticket),
    Host(Aside),
    Gone,
}

#[derive(Debug)]
struct Slot {
    memory: Arc<Pool>,
    bytes: usize,
    place: Mutex<Place>,
    pins: AtomicUsize,
    /// When it was used last, in uses of anything.
    used: AtomicU64,
    /// The last pause between two uses that was long enough to be one; 0 before there was one.
    pause: AtomicU64,
}

impl Slot {
    fn at(memory: &Arc<Pool>, at: Address, bytes: usize) -> Arc<Slot> {
        let used = AtomicU64::new(memory.clock.fetch_add(1, Ordering::Relaxed));
        let place = Mutex::new(Place::Device(at, None));
        Arc::new(Slot {
            memory: memory.clone(),
            bytes,
            place,
            pins: AtomicUsize::new(0),
            used,
            pause: AtomicU64::new(0),
        })
    }

    /// Notes a use.
    fn touch(&self) {
        let now = self.memory.clock.fetch_add(1, Ordering::Relaxed);
        let pause = now.saturating_sub(self.used.swap(now, Ordering::Relaxed));
        if pause >= FRESH {
            self.pause.store(pause, Ordering::Relaxed);
        }
    }

    /// What is the least of all goes first: of what is not at work that which is used again the latest, then the oldest at work.
    fn rank(&self, now: u64) -> (bool, u64) {
        let (used, pause) = (self.used.load(Ordering::Relaxed), self.pause.load(Ordering::Relaxed));
        let age = now.saturating_sub(used);
        if age < FRESH {
            return (true, used);
        }
        let next = match pause {
            // Never used again so far: a scan has begun that comes back to the latest last.
            0 => (1 << 62) + used,
            _ if pause > age => used + pause,
            // Longer than the last time: nobody knows, but most likely for long yet.
            _ => now + age,
        };
        (false, u64::MAX - next)
    }

    /// Has everything from now on wait for the copy of what was sent ahead.
    fn settle(&self, place: &mut Place) -> Result<()> {
        let &mut Place::Arriving(at, _) = place else { return Ok(()) };
        match std::mem::replace(place, Place::Device(at, None)) {
            Place::Arriving(_, ticket) => self.memory.device.wait_for(ticket),
            _ => unreachable!("seen above"),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let place = self.place.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut place = std::mem::replace(place, Place::Gone);
        // If that fails the device does, and whoever uses it next is told.
        let _ = self.settle(&mut place);
        match place {
            Place::Device(at, kept) => {
                kept.into_iter().for_each(|aside| self.memory.device.forget(aside));
                self.memory.device.release(at, self.bytes);
                lock(&self.memory.ledger).used -= self.bytes as u64;
            }
            Place::Host(aside) => self.memory.device.forget(aside),
            Place::Arriving(..) | Place::Gone => {}
        }
    }
}

/// Some bytes of a device's memory, or of the host's while they are not used.
#[derive(Debug)]
pub struct Buffer(Arc<Slot>);

impl Buffer {
    /// Uninitialized.
    pub(super) fn new(memory: &Arc<Pool>, bytes: usize) -> Result<Buffer> {
        // Nothing is never asked for: an address is wanted all the same.
        let bytes = bytes.max(16);
        let slot = Slot::at(memory, memory.allocate(bytes)?, bytes);
        if bytes >= MOVABLE {
            lock(&memory.ledger).slots.push(Arc::downgrade(&slot));
        }
        Ok(Buffer(slot))
    }

    /// Sends bytes ahead, while the device is at other work; `None` where there is no room now.
    pub(super) fn ahead(memory: &Arc<Pool>, bytes: &[u8]) -> Result<Option<Buffer>> {
        let _road = lock(&memory.road);
        let size = bytes.len().max(16);
        let Some(at) = memory.allocate_ahead(size)? else { return Ok(None) };
        let slot = Slot::at(memory, at, size);
        let ticket = memory.device.write_ahead(at, bytes);
        let sent = ticket.map(|ticket| *lock(&slot.place) = Place::Arriving(at, ticket));
        let mut ledger = lock(&memory.ledger);
        ledger.arriving = false;
        if sent.is_ok() {
            ledger.ahead += bytes.len() as u64;
            if size >= MOVABLE {
                ledger.slots.push(Arc::downgrade(&slot));
            }
        }
        // What is dropped takes the ledger.
        drop(ledger);
        sent.map(|()| Some(Buffer(slot)))
    }

    /// Brings it to the device, where it stays as long as what this returns.
    pub(super) fn pin(&self) -> Result<Pinned<'_>> {
        self.bring(false)
    }

    /// The same for work that only reads it.
    pub(super) fn pin_to_read(&self) -> Result<Pinned<'_>> {
        self.bring(true)
    }

    fn bring(&self, to_read: bool) -> Result<Pinned<'_>> {
        let slot = &*self.0;
        let device = &slot.memory.device;
        let mut place = lock(&slot.place);
        slot.settle(&mut place)?;
        slot.touch();
        if let Place::Host(aside) = &*place {
            let at = slot.memory.allocate(slot.bytes)?;
            if let Err(error) = device.bring_back(aside, at) {
                device.release(at, slot.bytes);
                lock(&slot.memory.ledger).used -= slot.bytes as u64;
                return Err(error);
            }
            lock(&slot.memory.ledger).returned += slot.bytes as u64;
            if let Place::Host(aside) = std::mem::replace(&mut *place, Place::Device(at, None)) {
                *place = Place::Device(at, Some(aside));
            }
        }
        let Place::Device(at, kept) = &mut *place else { unreachable!("it lives") };
        if !to_read {
            kept.take().into_iter().for_each(|aside| device.forget(aside));
        }
        let before = to_read.then(|| device.sum_of(*at, slot.bytes));
        slot.pins.fetch_add(1, Ordering::Relaxed);
        Ok(Pinned { slot, at: *at, before })
    }
}

/// A buffer that may be named in launches.
///
/// Work is done in order, so that letting go after a launch, and before its end, is safe.
#[derive(Debug)]
pub(super) struct Pinned<'a> {
    slot: &'a Slot,
    pub at: Address,
    /// Of what is only to be read, by which writing to it is found out.
    before: Option<u64>,
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let after = self.slot.memory.device.sum_of(self.at, self.slot.bytes);
            debug_assert!(before == after || std::thread::panicking(), "what was pinned to be read was written");
        }
        self.slot.pins.fetch_sub(1, Ordering::Relaxed);
    }
}
