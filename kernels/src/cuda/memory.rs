//! Device memory within a budget: what does not fit is put aside on the host and comes back when it is used.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::device::{Address, Aside, Device, Ticket};
use crate::{Error, Result};

/// Smaller buffers stay where they are.
const MOVABLE: usize = 1 << 12;

/// A device's memory, as far as one backend may use it.
#[derive(Debug)]
pub(super) struct Memory {
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
    /// Bytes that were sent ahead of their use, all together.
    pub ahead: u64,
    /// Whether the device had no room although the budget had.
    pub short: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    pub fn new(device: Arc<dyn Device>, budget: u64) -> Memory {
        Memory { device, budget, ledger: Mutex::default(), road: Mutex::default(), clock: AtomicU64::new(0) }
    }

    pub fn budget(&self) -> u64 {
        self.budget
    }

    pub fn usage(&self) -> Usage {
        let ledger = lock(&self.ledger);
        Usage { peak: ledger.peak, moved: ledger.moved, ahead: ledger.ahead, short: ledger.short }
    }

    /// Takes memory, putting aside what was used the longest ago until there is room.
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
            if !self.put_oldest_aside()? {
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

    fn put_oldest_aside(&self) -> Result<bool> {
        let mut slots: Vec<Arc<Slot>> = {
            let mut ledger = lock(&self.ledger);
            ledger.slots.retain(|slot| slot.strong_count() > 0);
            ledger.slots.iter().filter_map(Weak::upgrade).collect()
        };
        slots.sort_by_key(|slot| slot.used.load(Ordering::Relaxed));
        for slot in slots {
            let Ok(mut place) = slot.place.try_lock() else { continue };
            if slot.pins.load(Ordering::Relaxed) > 0 {
                continue;
            }
            slot.settle(&mut place)?;
            if let Place::Device(at) = *place {
                *place = Place::Host(self.device.put_aside(at, slot.bytes)?);
                self.device.release(at, slot.bytes);
                let mut ledger = lock(&self.ledger);
                ledger.used -= slot.bytes as u64;
                ledger.moved += slot.bytes as u64;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[derive(Debug)]
enum Place {
    Device(Address),
    /// On the device, for what waits for the copy.
    Arriving(Address, Ticket),
    Host(Aside),
    Gone,
}

#[derive(Debug)]
struct Slot {
    memory: Arc<Memory>,
    bytes: usize,
    place: Mutex<Place>,
    pins: AtomicUsize,
    used: AtomicU64,
}

impl Slot {
    fn at(memory: &Arc<Memory>, at: Address, bytes: usize) -> Arc<Slot> {
        let used = AtomicU64::new(memory.clock.fetch_add(1, Ordering::Relaxed));
        let place = Mutex::new(Place::Device(at));
        Arc::new(Slot { memory: memory.clone(), bytes, place, pins: AtomicUsize::new(0), used })
    }

    /// Has everything from now on wait for the copy of what was sent ahead.
    fn settle(&self, place: &mut Place) -> Result<()> {
        let &mut Place::Arriving(at, _) = place else { return Ok(()) };
        match std::mem::replace(place, Place::Device(at)) {
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
            Place::Device(at) => {
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
    pub(super) fn new(memory: &Arc<Memory>, bytes: usize) -> Result<Buffer> {
        // Nothing is never asked for: an address is wanted all the same.
        let bytes = bytes.max(16);
        let slot = Slot::at(memory, memory.allocate(bytes)?, bytes);
        if bytes >= MOVABLE {
            lock(&memory.ledger).slots.push(Arc::downgrade(&slot));
        }
        Ok(Buffer(slot))
    }

    /// Sends bytes ahead, while the device is at other work; `None` where there is no room now.
    pub(super) fn ahead(memory: &Arc<Memory>, bytes: &[u8]) -> Result<Option<Buffer>> {
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
        let slot = &*self.0;
        let mut place = lock(&slot.place);
        slot.settle(&mut place)?;
        slot.used.store(slot.memory.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if let Place::Host(_) = *place {
            let at = slot.memory.allocate(slot.bytes)?;
            let Place::Host(aside) = std::mem::replace(&mut *place, Place::Device(at)) else {
                unreachable!("seen above")
            };
            slot.memory.device.bring_back(aside, at)?;
        }
        let Place::Device(at) = *place else { unreachable!("it lives") };
        slot.pins.fetch_add(1, Ordering::Relaxed);
        Ok(Pinned { slot, at })
    }
}

/// A buffer that may be named in launches.
///
/// Work is done in order, so that letting go after a launch, and before its end, is safe.
#[derive(Debug)]
pub(super) struct Pinned<'a> {
    slot: &'a Slot,
    pub at: Address,
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.slot.pins.fetch_sub(1, Ordering::Relaxed);
    }
}
