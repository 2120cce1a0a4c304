//! Device memory within a budget: what does not fit is put aside on the host and comes back when it is used.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::device::{Address, Aside, Device};
use crate::{Error, Result};

/// Smaller buffers stay where they are.
const MOVABLE: usize = 1 << 12;

/// A device's memory, as far as one backend may use it.
#[derive(Debug)]
pub(super) struct Memory {
    pub device: Arc<dyn Device>,
    budget: u64,
    ledger: Mutex<Ledger>,
    clock: AtomicU64,
}

#[derive(Debug, Default)]
struct Ledger {
    used: u64,
    peak: u64,
    /// Bytes that were put aside, all times together.
    moved: u64,
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
    /// Whether the device had no room although the budget had.
    pub short: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    pub fn new(device: Arc<dyn Device>, budget: u64) -> Memory {
        Memory { device, budget, ledger: Mutex::default(), clock: AtomicU64::new(0) }
    }

    pub fn budget(&self) -> u64 {
        self.budget
    }

    pub fn usage(&self) -> Usage {
        let ledger = lock(&self.ledger);
        Usage { peak: ledger.peak, moved: ledger.moved, short: ledger.short }
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
            if !self.put_oldest_aside()? {
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

impl Drop for Slot {
    fn drop(&mut self) {
        let place = self.place.get_mut().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(place, Place::Gone) {
            Place::Device(at) => {
                self.memory.device.release(at, self.bytes);
                lock(&self.memory.ledger).used -= self.bytes as u64;
            }
            Place::Host(aside) => self.memory.device.forget(aside),
            Place::Gone => {}
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
        let at = memory.allocate(bytes)?;
        let used = AtomicU64::new(memory.clock.fetch_add(1, Ordering::Relaxed));
        let place = Mutex::new(Place::Device(at));
        let slot = Arc::new(Slot { memory: memory.clone(), bytes, place, pins: AtomicUsize::new(0), used });
        if bytes >= MOVABLE {
            lock(&memory.ledger).slots.push(Arc::downgrade(&slot));
        }
        Ok(Buffer(slot))
    }

    /// Brings it to the device, where it stays as long as what this returns.
    pub(super) fn pin(&self) -> Result<Pinned<'_>> {
        let slot = &*self.0;
        let mut place = lock(&slot.place);
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
