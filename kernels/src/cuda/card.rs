//! A card, through CUDA's driver and cuBLAS, both loaded when they are asked for.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::cublas::sys as blas;
use cudarc::cusolver::sys as solver;
use cudarc::driver::sys;

use super::compile::{self, CUBLAS, CUSOLVER, NVRTC};
use super::device::{Address, Arg, Aside, Capacity, Device, Module, Product, Real, Shape, Ticket};
use super::images::Images;
use super::profile::{Clock, Profile};
use crate::{Error, Result};

/// The oldest driver: CUDA 12's.
const OLDEST_DRIVER: i32 = 12000;
/// The oldest card: Turing.
const OLDEST_CARD: u32 = 75;
/// Copies go through pinned pieces of these sizes, a few of each in flight.
const PIECES: [(usize, usize); 2] = [(64 << 10, 64), (16 << 20, 4)];
/// Workspace of cuBLAS: as much as its documentation asks for on the newest cards.
const WORKSPACE: usize = 64 << 20;

/// A card that is there.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability, as 90.
    pub capability: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Why it cannot be used.
    pub unusable: Option<String>,
}

pub(super) fn check(what: &str, code: sys::CUresult) -> Result<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: a pointer to write to; what it is set to lives as long as the driver.
    let known = unsafe { sys::cuGetErrorString(code, &mut text) } == sys::CUresult::CUDA_SUCCESS && !text.is_null();
    // SAFETY: a string of the driver's.
    let text = if known { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() } else { String::new() };
    let advice = match code {
        sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | sys::CUresult::CUDA_ERROR_LAUNCH_FAILED
        | sys::CUresult::CUDA_ERROR_MISALIGNED_ADDRESS => {
            ": a mistake in a kernel, please report it; --device cpu does without"
        }
        sys::CUresult::CUDA_ERROR_ECC_UNCORRECTABLE => ": the card's memory is damaged; see nvidia-smi",
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => ": give less with --gpu-memory, or free the card",
        _ => "",
    };
    Err(Error::Device(format!("CUDA: {what}: {text} ({code:?}){advice}")))
}

/// Pinned memory of the host; a context is current.
fn pinned(bytes: usize) -> Result<*mut c_void> {
    let mut at = std::ptr::null_mut();
    // SAFETY: a place to write to.
    match unsafe { sys::cuMemHostAlloc(&mut at, bytes, 0) } {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(Error::Device(format!(
            "CUDA: the host has no {:.1} MB left that can be pinned, in which copies pass and what the GPU does not hold is put aside: \
             give more with --gpu-memory, calibrate on fewer --samples, or free memory of the host",
            bytes as f64 / 1e6
        ))),
        code => check("pinned memory", code).map(|()| at),
    }
}

/// A program without a dynamic loader, as for musl, loads no library, whatever is installed.
const LINKED_STATICALLY: bool = cfg!(all(unix, target_feature = "crt-static"));

/// Starts the driver.
///
/// Fails with one sentence if there is none, or an old one, and in a program that can load nothing.
fn start() -> Result<()> {
    if LINKED_STATICALLY {
        return Err(Error::Device(
            "this quantc is linked statically and cannot load NVIDIA's libraries: take the build for glibc \
             (x86_64-unknown-linux-gnu), or run with --device cpu"
                .to_owned(),
        ));
    }
    if !["cuda", "nvcuda"].into_iter().any(compile::load_by_name) {
        return Err(Error::Device(
            "no NVIDIA driver is installed (libcuda.so.1 is not there): install one, or run with --device cpu"
                .to_owned(),
        ));
    }
    let mut version = 0;
    // SAFETY: a number to write to; this function is in every driver.
    check("version of the driver", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    if version < OLDEST_DRIVER {
        return Err(Error::Device(format!(
            "the NVIDIA driver is for CUDA {}.{}, and {}.0 is needed: install a newer driver, or run with --device cpu",
            version / 1000,
            version % 1000 / 10,
            OLDEST_DRIVER / 1000
        )));
    }
    compile::limit_libraries((version / 1000).max(12));
    // SAFETY: no arguments but flags, which are 0.
    match unsafe { sys::cuInit(0) } {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            Err(Error::Device("the NVIDIA driver sees no GPU: run with --device cpu".to_owned()))
        }
        code => check("starting the driver", code),
    }
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: a number to write to, a device of the driver's.
    check("attributes of the GPU", unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) })?;
    Ok(value)
}

fn describe(ordinal: usize) -> Result<(sys::CUdevice, Found)> {
    let (mut device, mut name, mut memory) = (0, [0u8; 256], 0usize);
    // SAFETY: places to write to, as long as is said.
    unsafe {
        check("opening the GPU", sys::cuDeviceGet(&mut device, ordinal as c_int))?;
        check("name of the GPU", sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int - 1, device))?;
        check("memory of the GPU", sys::cuDeviceTotalMem_v2(&mut memory, device))?;
    }
    let name = CStr::from_bytes_until_nul(&name).map_or_else(|_| String::new(), |n| n.to_string_lossy().into_owned());
    let major = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let capability = (10 * major + minor) as u32;
    let unusable = (capability < OLDEST_CARD).then(|| {
        format!("compute capability {major}.{minor}, and {}.{} is needed", OLDEST_CARD / 10, OLDEST_CARD % 10)
    });
    Ok((device, Found { ordinal, name, capability, memory: memory as u64, unusable }))
}

/// Every card that the driver sees.
///
/// Fails if there is no driver, an old one, or no card.
pub fn cards() -> Result<Vec<Found>> {
    start()?;
    let mut count = 0;
    // SAFETY: a number to write to.
    check("counting GPUs", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    (0..count.max(0) as usize).map(|ordinal| Ok(describe(ordinal)?.1)).collect()
}

/// A pinned piece of host memory that a copy goes through.
#[derive(Debug)]
struct Piece {
    at: *mut c_void,
    /// After its last use.
    done: sys::CUevent,
}

/// A stream, and the pieces that its copies go through: of both sizes, and which comes next.
#[derive(Debug)]
struct Lane {
    stream: sys::CUstream,
    pieces: Mutex<[(Vec<Piece>, usize); 2]>,
}

impl Lane {
    /// One that waits for no other.
    fn open() -> Result<Lane> {
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a place to write to; the context is current.
        check("stream of the GPU", unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        Ok(Lane { stream, pieces: Mutex::default() })
    }
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<&'static str, (sys::CUfunction, u32)>,
}

/// One card.
#[derive(Debug)]
pub struct Card {
    found: Found,
    context: sys::CUcontext,
    device: sys::CUdevice,
    /// Where all work is done in order.
    lane: Lane,
    /// Where weights are sent beside it.
    ahead: Lane,
    multiprocessors: u32,
    /// Where memory is taken in the order of a stream, if the driver can.
    pool: Option<sys::CUmemoryPool>,
    images: Images,
    loaded: Mutex<Loaded>,
    /// Pinned memory that was put aside and is free again, by size.
    free: Mutex<HashMap<usize, Vec<u64>>>,
    blas: Mutex<blas::cublasHandle_t>,
    solver: Option<Mutex<solver::cusolverDnHandle_t>>,
    clock: Option<Mutex<Clock>>,
}

// SAFETY: the driver's handles may be used from any thread once the context is current, which every call sees to; those of
// libraries, and host memory, are behind locks.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_blas(what: &str, code: blas::cublasStatus_t) -> Result<()> {
    match code {
        blas::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        other => Err(Error::Device(format!("cuBLAS: {what}: {other:?}"))),
    }
}

/// Row by row, the lower triangle is column by column the upper one.
const TRIANGLE: solver::cublasFillMode_t = solver::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;

/// Columns as cuSOLVER counts them.
fn columns(n: usize) -> Result<c_int> {
    c_int::try_from(n).map_err(|_| Error::Device(format!("{n} columns are too many for cuSOLVER")))
}

fn check_solver(what: &str, code: solver::cusolverStatus_t) -> Result<()> {
    match code {
        solver::cusolverStatus_t::CUSOLVER_STATUS_SUCCESS => Ok(()),
        other => Err(Error::Device(format!("cuSOLVER: {what}: {other:?}"))),
    }
}

impl Card {
    /// Opens a card by its number.
    ///
    /// Fails, with one sentence that says what to do, where driver, card, compiler or library is missing or too old.
    pub fn open(ordinal: usize) -> Result<Card> {
        let all = cards()?;
        let Some(found) = all.get(ordinal) else {
            let names: Vec<String> = all.iter().map(|card| format!("{}: {}", card.ordinal, card.name)).collect();
            return Err(Error::Device(format!("there is no GPU number {ordinal}, only {}", names.join(", "))));
        };
        if let Some(reason) = &found.unusable {
            return Err(Error::Device(format!("GPU {ordinal}, {}: {reason}; run with --device cpu", found.name)));
        }
        NVRTC.wanted()?;
        let images = Images::begin(found.capability);
        CUBLAS.wanted()?;
        let (device, found) = describe(ordinal)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: places to write to, and a device of the driver's.
        unsafe {
            check("context of the GPU", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            check("context of the GPU", sys::cuCtxSetCurrent(context))?;
        }
        let (lane, ahead) = (Lane::open()?, Lane::open()?);
        let stream = lane.stream;
        let which = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = attribute(device, which)? as u32;
        let mut pool = None;
        if attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? > 0 {
            // Memory that is given back stays with us: the same sizes come again. A copy ahead gets none that it had to wait for.
            let pool = pool.insert(std::ptr::null_mut());
            let (mut threshold, mut waits) = (u64::MAX, 0i32);
            let kept = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let waiting = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES;
            // SAFETY: a pool of the driver's, and numbers of the types that these attributes have.
            unsafe {
                check("memory pool", sys::cuDeviceGetDefaultMemPool(pool, device))?;
                check("memory pool", sys::cuMemPoolSetAttribute(*pool, kept, (&raw mut threshold).cast()))?;
                check("memory pool", sys::cuMemPoolSetAttribute(*pool, waiting, (&raw mut waits).cast()))?;
            }
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place to write to; a stream of this context.
        unsafe {
            check_blas("start", blas::cublasCreate_v2(&mut handle))?;
            check_blas("stream", blas::cublasSetStream_v2(handle, stream.cast()))?;
            let mut workspace = 0;
            check("workspace of cuBLAS", sys::cuMemAlloc_v2(&mut workspace, WORKSPACE))?;
            // A workspace of its own makes results the same from run to run.
            check_blas("workspace", blas::cublasSetWorkspace_v2(handle, workspace as *mut c_void, WORKSPACE))?;
        }
        let solver = if CUSOLVER.is_there() {
            let mut handle = std::ptr::null_mut();
            // SAFETY: as above.
            unsafe {
                check_solver("start", solver::cusolverDnCreate(&mut handle))?;
                check_solver("stream", solver::cusolverDnSetStream(handle, stream.cast()))?;
            }
            Some(Mutex::new(handle))
        } else {
            None
        };
        Ok(Card {
            found,
            context,
            device,
            lane,
            ahead,
            multiprocessors,
            pool,
            images,
            loaded: Mutex::default(),
            free: Mutex::default(),
            blas: Mutex::new(handle),
            solver,
            clock: None,
        })
    }

    /// The same, taking the time of each piece of work.
    pub fn profiled(mut self) -> Card {
        self.clock = Some(Mutex::default());
        self
    }

    /// What [`profiled`](Self::profiled) took, of all work so far; `None` where it was not asked for, or the card failed.
    pub fn profile(&self) -> Option<Profile> {
        let clock = self.clock.as_ref()?;
        self.enter().and_then(|()| lock(clock).profile()).ok()
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as this.
        check("context of the GPU", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Asks for work, and with a profile for its time.
    fn timed(&self, name: impl FnOnce() -> String, work: impl FnOnce() -> Result<()>) -> Result<()> {
        match &self.clock {
            // Held meanwhile, so that no other thread's work comes between.
            Some(clock) => lock(clock).take(self.lane.stream, name(), work),
            None => work(),
        }
    }

    fn function(&self, module: &'static Module, kernel: &'static str, shared: u32) -> Result<sys::CUfunction> {
        let known = lock(&self.loaded).modules.contains_key(module.name);
        // Nobody who needs another module waits for this one.
        let image = if known { &[] } else { self.images.of(module)? };
        let mut loaded = lock(&self.loaded);
        if !loaded.modules.contains_key(module.name) {
            let mut handle = std::ptr::null_mut();
            // SAFETY: an image that NVRTC made, whole; PTX ends with a zero byte.
            check("loading kernels", unsafe { sys::cuModuleLoadData(&mut handle, image.as_ptr().cast()) })?;
            loaded.modules.insert(module.name, handle);
        }
        let handle = loaded.modules[module.name];
        let (function, allowed) = match loaded.functions.get(kernel) {
            Some(known) => *known,
            None => {
                let mut function = std::ptr::null_mut();
                let name = CString::new(kernel).expect("a name");
                // SAFETY: a module that was loaded, a name.
                check(kernel, unsafe { sys::cuModuleGetFunction(&mut function, handle, name.as_ptr()) })?;
                (function, 48 << 10)
            }
        };
        if shared > allowed {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function that was found.
            check(kernel, unsafe { sys::cuFuncSetAttribute(function, which, shared as c_int) })?;
        }
        loaded.functions.insert(kernel, (function, allowed.max(shared)));
        Ok(function)
    }

    /// Memory that work in a stream may use.
    fn allocate_in(&self, lane: &Lane, bytes: usize) -> Result<Option<Address>> {
        self.enter()?;
        let mut at = 0;
        // SAFETY: a number to write to.
        let code = unsafe {
            match self.pool {
                Some(_) => sys::cuMemAllocAsync(&mut at, bytes, lane.stream),
                None => sys::cuMemAlloc_v2(&mut at, bytes),
            }
        };
        match code {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            code => check("device memory", code).map(|()| Some(at)),
        }
    }

    /// Copies to the device in a stream.
    fn write_in(&self, lane: &Lane, at: Address, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        let copy = |piece: *mut c_void, start: usize, count: usize| {
            // SAFETY: a piece at least that long, which no copy reads any more; `count` bytes follow `start`.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr().add(start), piece.cast(), count);
                check("copy to the GPU", sys::cuMemcpyHtoDAsync_v2(at + start as u64, piece, count, lane.stream))
            }
        };
        self.through_pieces(lane, bytes.len(), copy, || Ok(()))
    }

    /// An event after what was asked for in a stream so far.
    fn ticket(&self, lane: &Lane) -> Result<Ticket> {
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: a place to write to; the context is current.
        check("event", unsafe { sys::cuEventCreate(&mut event, flags) })?;
        // SAFETY: an event and a stream of this context.
        let recorded = check("event", unsafe { sys::cuEventRecord(event, lane.stream) });
        if recorded.is_err() {
            // SAFETY: made above, and nobody else has it.
            unsafe {
                let _ = sys::cuEventDestroy_v2(event);
            }
        }
        recorded.map(|()| Ticket(event as u64))
    }

    /// Runs `copy` on pinned pieces of a stream, one after the other, and `end` before another thread may have them.
    fn through_pieces(
        &self,
        lane: &Lane,
        bytes: usize,
        mut copy: impl FnMut(*mut c_void, usize, usize) -> Result<()>,
        end: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut pieces = lock(&lane.pieces);
        let class = usize::from(bytes > PIECES[0].0);
        let (size, count) = PIECES[class];
        let (pieces, next) = &mut pieces[class];
        for start in (0..bytes).step_by(size) {
            if pieces.len() < count {
                let (at, mut done) = (pinned(size)?, std::ptr::null_mut());
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                // SAFETY: a place to write to.
                check("event", unsafe { sys::cuEventCreate(&mut done, flags) })?;
                pieces.push(Piece { at, done });
                *next = pieces.len() - 1;
            }
            let piece = &pieces[*next];
            *next = (*next + 1) % count;
            // SAFETY: an event of this context; one that was never recorded is done.
            check("waiting for a copy", unsafe { sys::cuEventSynchronize(piece.done) })?;
            copy(piece.at, start, size.min(bytes - start))?;
            // SAFETY: an event and a stream of this context.
            check("event", unsafe { sys::cuEventRecord(piece.done, lane.stream) })?;
        }
        end()
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // What the driver holds goes with the process; the context is given back so that a second backend may start afresh.
        // SAFETY: the context was retained when this was opened.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuCtxSynchronize();
            let _ = blas::cublasDestroy_v2(*lock(&self.blas));
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

impl Device for Card {
    fn name(&self) -> String {
        let Found { ordinal, name, capability, .. } = &self.found;
        format!("{name} (cuda:{ordinal}, sm_{capability})")
    }

    fn capability(&self) -> u32 {
        self.found.capability
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn capacity(&self) -> Result<Capacity> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: two numbers to write to.
        check("memory of the GPU", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(Capacity { free: free as u64, total: total as u64 })
    }

    fn allocate(&self, bytes: usize) -> Result<Option<Address>> {
        let at = self.allocate_in(&self.lane, bytes)?;
        let (None, Some(pool)) = (at, self.pool) else { return Ok(at) };
        // The pool keeps what was given back in pieces. What is no longer in use goes back to the card, which joins it.
        self.synchronize()?;
        // SAFETY: the pool of this card.
        check("memory pool", unsafe { sys::cuMemPoolTrimTo(pool, 0) })?;
        self.allocate_in(&self.lane, bytes)
    }

    fn allocate_ahead(&self, bytes: usize) -> Result<Option<Address>> {
        self.allocate_in(&self.ahead, bytes)
    }

    fn release(&self, at: Address, _: usize) {
        // SAFETY: memory that was allocated here and is given back once. Without a pool the driver waits for what uses it.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = match self.pool {
                Some(_) => sys::cuMemFreeAsync(at, self.lane.stream),
                None => sys::cuMemFree_v2(at),
            };
        }
    }

    fn write(&self, at: Address, bytes: &[u8]) -> Result<()> {
        self.write_in(&self.lane, at, bytes)
    }

    fn write_ahead(&self, at: Address, bytes: &[u8]) -> Result<Ticket> {
        let sent = self.write_in(&self.ahead, at, bytes).and_then(|()| self.ticket(&self.ahead));
        if sent.is_err() {
            // SAFETY: a stream of this context. Pieces that were on their way are waited for, as the memory is given back.
            unsafe {
                let _ = sys::cuStreamSynchronize(self.ahead.stream);
            }
        }
        sent
    }

    fn wait_for(&self, ticket: Ticket) -> Result<()> {
        self.enter()?;
        let event = ticket.0 as sys::CUevent;
        // SAFETY: an event of `ticket`, which nobody has any more; the stream keeps what it waits for.
        unsafe {
            let waited = check("waiting for a copy", sys::cuStreamWaitEvent(self.lane.stream, event, 0));
            if waited.is_err() {
                // The memory is given back next.
                let _ = sys::cuEventSynchronize(event);
            }
            let _ = sys::cuEventDestroy_v2(event);
            waited
        }
    }

    fn read(&self, at: Address, bytes: &mut [u8]) -> Result<()> {
        self.enter()?;
        let to = bytes.as_mut_ptr();
        // The copy out of a piece waits until the next piece has been asked for.
        let last: Cell<Option<(*mut c_void, usize, usize, sys::CUevent)>> = Cell::new(None);
        let finish = |(piece, start, count, done): (*mut c_void, usize, usize, sys::CUevent)| -> Result<()> {
            // SAFETY: the copy into the piece is done after this event; `count` bytes follow `start` in both.
            unsafe {
                check("copy from the GPU", sys::cuEventSynchronize(done))?;
                std::ptr::copy_nonoverlapping(piece.cast::<u8>(), to.add(start), count);
            }
            Ok(())
        };
        let mut ready = std::ptr::null_mut();
        let mut events = Vec::new();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        for _ in 0..2 {
            // SAFETY: a place to write to.
            check("event", unsafe { sys::cuEventCreate(&mut ready, flags) })?;
            events.push(ready);
        }
        let mut turn = 0;
        let copy = |piece, start, count| {
            let done = events[turn % 2];
            turn += 1;
            // SAFETY: a piece at least that long, whose last use is over.
            unsafe {
                check(
                    "copy from the GPU",
                    sys::cuMemcpyDtoHAsync_v2(piece, at + start as u64, count, self.lane.stream),
                )?;
                check("event", sys::cuEventRecord(done, self.lane.stream))?;
            }
            last.replace(Some((piece, start, count, done))).map_or(Ok(()), finish)
        };
        let result = self.through_pieces(&self.lane, bytes.len(), copy, || last.take().map_or(Ok(()), finish));
        for event in events {
            // SAFETY: made above.
            unsafe {
                let _ = sys::cuEventDestroy_v2(event);
            }
        }
        result
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: memory of this card, by the trait's contract.
        check("copy on the GPU", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.lane.stream) })
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: memory of this card, by the trait's contract.
        check("clearing memory", unsafe { sys::cuMemsetD8Async(at, 0, bytes, self.lane.stream) })
    }

    fn put_aside(&self, at: Address, bytes: usize) -> Result<Aside> {
        self.enter()?;
        let known = lock(&self.free).get_mut(&bytes).and_then(Vec::pop);
        let host = match known {
            Some(host) => host,
            None => pinned(bytes)? as u64,
        };
        // SAFETY: pinned memory of that length. Its next use is a copy on the same stream.
        check("copy from the GPU", unsafe {
            sys::cuMemcpyDtoHAsync_v2(host as *mut c_void, at, bytes, self.lane.stream)
        })?;
        Ok(Aside { at: host, bytes })
    }

    fn bring_back(&self, aside: &Aside, at: Address) -> Result<()> {
        self.enter()?;
        // SAFETY: pinned memory of that length, written by a copy before this one on the same stream.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(at, aside.at as *const c_void, aside.bytes, self.lane.stream) };
        check("copy to the GPU", code)
    }

    fn forget(&self, aside: Aside) {
        // Whoever takes it next writes it on the same stream, after what reads it now.
        lock(&self.free).entry(aside.bytes).or_default().push(aside.at);
    }

    fn launch(&self, module: &'static Module, kernel: &'static str, shape: Shape, args: &[Arg]) -> Result<()> {
        self.enter()?;
        let function = self.function(module, kernel, shape.shared)?;
        let mut values: Vec<u64> = args.iter().map(|arg| arg.word()).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect();
        let [x, y, z] = shape.grid;
        self.timed(
            || kernel.to_owned(),
            || {
                // SAFETY: arguments that fit the kernel, by the trait's contract; they are read before this returns.
                check(kernel, unsafe {
                    sys::cuLaunchKernel(
                        function,
                        x,
                        y,
                        z,
                        shape.block,
                        1,
                        1,
                        shape.shared,
                        self.lane.stream,
                        pointers.as_mut_ptr(),
                        std::ptr::null_mut(),
                    )
                })
            },
        )
    }

    fn product(&self, product: &Product) -> Result<()> {
        let Product { real, shape: [m, n, k], a, b, c, alpha, beta } = *product;
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.enter()?;
        let int = |x: usize| {
            c_int::try_from(x)
                .map_err(|_| Error::Device(format!("a matrix of {x} rows or columns is too large for cuBLAS")))
        };
        let op = |transposed: bool| match transposed {
            true => blas::cublasOperation_t::CUBLAS_OP_T,
            false => blas::cublasOperation_t::CUBLAS_OP_N,
        };
        // Row by row is column by column of the transposed: cᵀ = bᵀ aᵀ.
        let (rows, cols, inner) = (int(n)?, int(m)?, int(k)?);
        let [lda, ldb, ldc] = [int(b.stride)?, int(a.stride)?, int(c.stride)?];
        let (left, right, out) = (b.at as *const c_void, a.at as *const c_void, c.at as *mut c_void);
        let handle = lock(&self.blas);
        self.timed(
            || format!("product {real:?}"),
            || {
                // SAFETY: operands on this card of these shapes, by the trait's contract; factors on the host.
                let code = unsafe {
                    match real {
                        Real::F64 => blas::cublasDgemm_v2(
                            *handle,
                            op(b.transposed),
                            op(a.transposed),
                            rows,
                            cols,
                            inner,
                            &alpha,
                            left.cast(),
                            lda,
                            right.cast(),
                            ldb,
                            &beta,
                            out.cast(),
                            ldc,
                        ),
                        _ => {
                            let (alpha, beta) = (alpha as f32, beta as f32);
                            let of = match real {
                                Real::Bf16 => blas::cudaDataType::CUDA_R_16BF,
                                _ => blas::cudaDataType::CUDA_R_32F,
                            };
                            blas::cublasGemmEx(
                                *handle,
                                op(b.transposed),
                                op(a.transposed),
                                rows,
                                cols,
                                inner,
                                (&raw const alpha).cast(),
                                left,
                                of,
                                lda,
                                right,
                                of,
                                ldb,
                                (&raw const beta).cast(),
                                out,
                                blas::cudaDataType::CUDA_R_32F,
                                ldc,
                                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                            )
                        }
                    }
                };
                check_blas("product", code)
            },
        )
    }

    fn cholesky_room(&self, at: Address, n: usize) -> Result<Option<usize>> {
        let Some(solver) = &self.solver else { return Ok(None) };
        self.enter()?;
        let (size, mut length) = (columns(n)?, 0);
        // SAFETY: a number to write to, and n × n doubles on this card, by the trait's contract.
        let code = unsafe {
            solver::cusolverDnDpotrf_bufferSize(*lock(solver), TRIANGLE, size, at as *mut f64, size, &mut length)
        };
        check_solver("workspace", code)?;
        // And a place for the pivot.
        Ok(Some(length.max(1) as usize * 8 + 16))
    }

    fn cholesky(&self, at: Address, n: usize, work: Address) -> Result<Option<usize>> {
        let room = self.cholesky_room(at, n)?.expect("asked for before") - 16;
        let solver = self.solver.as_ref().expect("asked for before");
        let (size, info, mut found) = (columns(n)?, work + room as u64, [0u8; 4]);
        // SAFETY: n × n doubles on this card and workspace as long as was said, by the trait's contract.
        let code = unsafe {
            let (a, work, info) = (at as *mut f64, work as *mut f64, info as *mut c_int);
            solver::cusolverDnDpotrf(*lock(solver), TRIANGLE, size, a, size, work, (room / 8) as c_int, info)
        };
        check_solver("Cholesky", code)?;
        self.read(info, &mut found)?;
        match i32::from_ne_bytes(found) {
            0 => Ok(None),
            p if p > 0 => Ok(Some(p as usize - 1)),
            p => Err(Error::Device(format!("cuSOLVER: argument {} of Cholesky", -p))),
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: a stream of this context.
        check("waiting for the GPU", unsafe { sys::cuStreamSynchronize(self.lane.stream) })
    }
}
