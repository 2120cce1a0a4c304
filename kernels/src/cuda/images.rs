//! Kernels are compiled behind the work, several modules at once, from the moment a card is opened.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use super::compile::{LATER, MODULES, cached};
use super::device::Module;
use crate::{Error, Result};

/// Modules that are compiled at once, at most and at least.
const MOST: usize = 8;
const LEAST: usize = 2;

/// What each module is compiled to for one card.
#[derive(Debug)]
pub(super) struct Images {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    capability: u32,
    /// One for each of [`MODULES`].
    images: Vec<OnceLock<Result<Vec<u8>>>>,
    next: AtomicUsize,
    over: AtomicBool,
}

impl Shared {
    /// Compiles a module unless somebody has; waits for whoever is at it.
    fn get(&self, index: usize) -> &Result<Vec<u8>> {
        self.images[index].get_or_init(|| cached(MODULES[index], self.capability))
    }

    /// Compiles one module after the other, until there is none left or nobody wants them any more.
    fn work(&self) {
        while !self.over.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(module) = MODULES.get(index) else { return };
            if !LATER.contains(&module.name) {
                self.get(index);
            }
        }
    }
}

impl Images {
    /// Begins to compile for a compute capability, as 90. Where no thread can be had, modules are compiled when they are needed.
    pub fn begin(capability: u32) -> Images {
        let images = MODULES.iter().map(|_| OnceLock::new()).collect();
        let shared = Arc::new(Shared { capability, images, next: AtomicUsize::new(0), over: AtomicBool::new(false) });
        let threads = std::thread::available_parallelism().map_or(LEAST, usize::from).clamp(LEAST, MOST);
        let begin = |_| {
            let shared = shared.clone();
            std::thread::Builder::new().name("kernels".to_owned()).spawn(move || shared.work()).ok()
        };
        let workers = (0..threads).filter_map(begin).collect();
        Images { shared, workers }
    }

    /// The image of a module, which is waited for.
    ///
    /// Fails with what the compiler said.
    pub fn of(&self, module: &Module) -> Result<&[u8]> {
        let index = MODULES.iter().position(|known| known.name == module.name).expect("a module of the list");
        match self.shared.get(index) {
            Ok(image) => Ok(image),
            Err(error) => Err(Error::Device(error.to_string())),
        }
    }
}

impl Drop for Images {
    /// Waits for what is being compiled: a compiler that is at work while the process ends may bring it down.
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}
