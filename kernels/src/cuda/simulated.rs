//! The stand-in for a card: compiles the kernels with the system's C++ compiler over `on_cpu.h` and runs them on the CPU.
//!
//! It proves indexing and arithmetic where there is no card, and is far too slow for anything else.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use libloading::Library;
use sha2::{Digest, Sha256};

use super::device::{Address, Arg, Aside, Capacity, Device, Module, Operand, Product, Real, Shape, Ticket};
use crate::ops::gemm;
use crate::{Error, Result};

/// Bytes around each allocation that no kernel may write; as `f32` they are NaN.
const FENCE: usize = 256;
const FENCE_BYTE: u8 = 0xff;

/// Runs kernels on the CPU.
#[derive(Debug)]
pub struct Simulated {
    order: i32,
    limit: Option<usize>,
    capability: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    libraries: HashMap<&'static str, Library>,
    blocks: HashMap<Address, Vec<u64>>,
    used: usize,
    aside: HashMap<u64, Vec<u8>>,
    /// Copies to the host to put something aside, and back.
    copies: [usize; 2],
    /// What was written ahead and nobody has waited for: a card may be as late.
    ahead: HashMap<u64, (Address, Vec<u8>)>,
    tickets: u64,
}

type Entry = unsafe extern "C" fn(*const u32, u32, usize, *mut *mut c_void, c_int) -> c_int;

impl Simulated {
    /// Threads of a block run in this order: 0 forwards, 1 backwards, else scattered; 16 more keeps its warps apart.
    pub fn new(order: i32) -> Simulated {
        Simulated { order, limit: None, capability: 80, state: Mutex::default() }
    }

    /// A card of this compute capability, as 89.
    pub fn with_capability(order: i32, capability: u32) -> Simulated {
        Simulated { capability, ..Simulated::new(order) }
    }

    /// With so many bytes of memory.
    pub fn with_memory(order: i32, bytes: usize) -> Simulated {
        Simulated { limit: Some(bytes), ..Simulated::new(order) }
    }

    /// How often something was put aside by a copy to the host, and brought back.
    pub fn copies(&self) -> [usize; 2] {
        self.state.lock().expect("no panic").copies
    }

    /// The C++ compiler, if there is one.
    pub fn compiler() -> Option<String> {
        let named = std::env::var("CXX").ok();
        let candidates = named.into_iter().chain(["c++", "g++", "clang++"].map(str::to_owned));
        candidates
            .into_iter()
            .find(|name| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success()))
    }
}

fn failed(what: impl std::fmt::Display) -> Error {
    Error::Device(format!("the simulated device: {what}"))
}

/// Compiles a module, or finds it compiled.
fn library(module: &Module) -> Result<Library> {
    let compiler = Simulated::compiler().ok_or_else(|| failed("no C++ compiler"))?;
    let source = format!("#define QUANTC_ON_CPU\n{}\n{}", super::COMMON, module.source);
    let header = include_str!("on_cpu.h");
    let options = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w"];
    let mut hash = Sha256::new();
    for part in [&compiler[..], &source, header, &options.join(" ")] {
        hash.update(part);
        hash.update([0]);
    }
    let key: String = hash.finalize().iter().take(12).map(|b| format!("{b:02x}")).collect();
    let folder: PathBuf = std::env::temp_dir().join("quantc-simulated");
    let path = folder.join(format!("{}-{key}.so", module.name));
    if !path.exists() {
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let unique = format!("{key}-{}-{:?}", std::process::id(), std::thread::current().id());
        let own = folder.join(unique.replace(['(', ')'], ""));
        std::fs::create_dir_all(&own).map_err(failed)?;
        std::fs::write(own.join("on_cpu.h"), header).map_err(failed)?;
        let (input, output) = (own.join(format!("{}.cpp", module.name)), own.join("out.so"));
        std::fs::write(&input, source).map_err(failed)?;
        let run = Command::new(&compiler).args(options).arg("-o").arg(&output).arg(&input).output().map_err(failed)?;
        if !run.status.success() {
            return Err(failed(format!("{} does not compile:\n{}", module.name, String::from_utf8_lossy(&run.stderr))));
        }
        std::fs::rename(&output, &path).map_err(failed)?;
        let _ = std::fs::remove_dir_all(&own);
    }
    // SAFETY: a library that was just made of our own source; it runs nothing when loaded.
    unsafe { Library::new(&path) }.map_err(failed)
}

/// # Safety
/// The operand lies in the simulated memory.
unsafe fn widened<T: Copy, R>(operand: &Operand, [rows, cols]: [usize; 2], widen: impl Fn(T) -> R) -> Vec<R> {
    let mut out = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        for col in 0..cols {
            let (row, col) = if operand.transposed { (col, row) } else { (row, col) };
            // SAFETY: the caller's promise.
            out.push(widen(unsafe { *(operand.at as *const T).add(row * operand.stride + col) }));
        }
    }
    out
}

impl Device for Simulated {
    fn name(&self) -> String {
        "simulated device".to_owned()
    }

    fn capability(&self) -> u32 {
        self.capability
    }

    fn multiprocessors(&self) -> u32 {
        4
    }

    fn capacity(&self) -> Result<Capacity> {
        let total = self.limit.unwrap_or(1 << 34);
        Ok(Capacity { free: (total - self.state.lock().expect("no panic").used) as u64, total: total as u64 })
    }

    fn allocate(&self, bytes: usize) -> Result<Option<Address>> {
        let mut state = self.state.lock().expect("no panic");
        if self.limit.is_some_and(|limit| state.used + bytes > limit) {
            return Ok(None);
        }
        let block = vec![u64::from_ne_bytes([FENCE_BYTE; 8]); (bytes + 2 * FENCE).div_ceil(8)];
        let at = block.as_ptr() as Address + FENCE as Address;
        state.used += bytes;
        state.blocks.insert(at, block);
        Ok(Some(at))
    }

    fn release(&self, at: Address, bytes: usize) {
        let mut state = self.state.lock().expect("no panic");
        let block = state.blocks.remove(&at).expect("an address that was allocated");
        let late = state.ahead.values().any(|(to, _)| *to == at);
        assert!(!late || std::thread::panicking(), "memory is given back that a copy may still write");
        state.used -= bytes;
        // SAFETY: the block holds the fences and the bytes.
        let all = unsafe { std::slice::from_raw_parts(block.as_ptr().cast::<u8>(), block.len() * 8) };
        let fences = all[..FENCE].iter().chain(&all[FENCE + bytes..]);
        if !std::thread::panicking() {
            assert!(fences.into_iter().all(|b| *b == FENCE_BYTE), "a kernel wrote beside a buffer of {bytes} bytes");
        }
    }

    fn write(&self, at: Address, bytes: &[u8]) -> Result<()> {
        // SAFETY: memory of ours, by the trait's contract.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
        Ok(())
    }

    fn write_ahead(&self, at: Address, bytes: &[u8]) -> Result<Ticket> {
        let mut state = self.state.lock().expect("no panic");
        state.tickets += 1;
        let ticket = state.tickets;
        state.ahead.insert(ticket, (at, bytes.to_vec()));
        Ok(Ticket(ticket))
    }

    fn wait_for(&self, Ticket(ticket): Ticket) -> Result<()> {
        let (at, bytes) = self.state.lock().expect("no panic").ahead.remove(&ticket).expect("a ticket of this device");
        self.write(at, &bytes)
    }

    fn read(&self, at: Address, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: memory of ours, by the trait's contract.
        unsafe { std::ptr::copy_nonoverlapping(at as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        // SAFETY: memory of ours, by the trait's contract.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        // SAFETY: memory of ours, by the trait's contract.
        unsafe { std::ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    fn put_aside(&self, at: Address, bytes: usize) -> Result<Aside> {
        let mut kept = vec![0; bytes];
        self.read(at, &mut kept)?;
        let key = kept.as_ptr() as u64;
        let mut state = self.state.lock().expect("no panic");
        state.aside.insert(key, kept);
        state.copies[0] += 1;
        Ok(Aside { at: key, bytes })
    }

    fn bring_back(&self, aside: &Aside, at: Address) -> Result<()> {
        let mut state = self.state.lock().expect("no panic");
        state.copies[1] += 1;
        self.write(at, state.aside.get(&aside.at).expect("put aside before"))
    }

    fn sum_of(&self, at: Address, bytes: usize) -> u64 {
        // SAFETY: memory of ours, by the trait's contract.
        let all = unsafe { std::slice::from_raw_parts(at as *const u8, bytes) };
        let mut hash = std::hash::DefaultHasher::new();
        std::hash::Hasher::write(&mut hash, all);
        std::hash::Hasher::finish(&hash)
    }

    fn forget(&self, aside: Aside) {
        self.state.lock().expect("no panic").aside.remove(&aside.at);
    }

    fn launch(&self, module: &'static Module, kernel: &'static str, shape: Shape, args: &[Arg]) -> Result<()> {
        assert!(
            shape.block.is_multiple_of(32) && shape.block <= 1024 && shape.grid.iter().all(|g| *g > 0),
            "{shape:?}"
        );
        assert!(shape.shared <= 227 << 10, "{kernel}: {} bytes of shared memory", shape.shared);
        let entry: Entry = {
            let mut state = self.state.lock().expect("no panic");
            if !state.libraries.contains_key(module.name) {
                state.libraries.insert(module.name, library(module)?);
            }
            let library = &state.libraries[module.name];
            // SAFETY: `EXPORT` gives its function this type.
            *unsafe { library.get(format!("quantc_launch_{kernel}\0").as_bytes()) }.map_err(failed)?
        };
        let mut values: Vec<u64> = args.iter().map(|arg| arg.word()).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect();
        // SAFETY: the caller's arguments fit the kernel, by the trait's contract.
        let code = unsafe {
            entry(shape.grid.as_ptr(), shape.block, shape.shared as usize, pointers.as_mut_ptr(), self.order)
        };
        if code != 0 {
            return Err(failed(format!("{kernel}: threads wait for others that never come")));
        }
        Ok(())
    }

    fn product(&self, product: &Product) -> Result<()> {
        let Product { real, shape: [m, n, k], a, b, c, alpha, beta } = *product;
        // SAFETY: the caller's operands lie in memory of ours; all of the shapes are the call's.
        unsafe {
            match real {
                Real::F64 => {
                    let (a, b) = (widened(&a, [m, k], |x: f64| x), widened(&b, [k, n], |x: f64| x));
                    let mut out = widened(&c, [m, n], |x: f64| if beta == 0.0 { 0.0 } else { x * beta });
                    gemm(
                        [m, n, k],
                        out.as_mut_ptr(),
                        [n, 1],
                        true,
                        a.as_ptr(),
                        [k, 1],
                        b.as_ptr(),
                        [n, 1],
                        [1.0, alpha],
                    );
                    for row in 0..m {
                        let to = (c.at as *mut f64).add(row * c.stride);
                        std::ptr::copy_nonoverlapping(out.as_ptr().add(row * n), to, n);
                    }
                }
                _ => {
                    let read = |operand: &Operand, shape| match real {
                        Real::Bf16 => widened(operand, shape, |x: u16| f32::from_bits(u32::from(x) << 16)),
                        _ => widened(operand, shape, |x: f32| x),
                    };
                    let (a, b) = (read(&a, [m, k]), read(&b, [k, n]));
                    let mut out = widened(&c, [m, n], |x: f32| if beta == 0.0 { 0.0 } else { x * beta as f32 });
                    let factors = [1.0, alpha as f32];
                    gemm([m, n, k], out.as_mut_ptr(), [n, 1], true, a.as_ptr(), [k, 1], b.as_ptr(), [n, 1], factors);
                    for row in 0..m {
                        let to = (c.at as *mut f32).add(row * c.stride);
                        std::ptr::copy_nonoverlapping(out.as_ptr().add(row * n), to, n);
                    }
                }
            }
        }
        Ok(())
    }

    fn cholesky_room(&self, _: Address, _: usize) -> Result<Option<usize>> {
        Ok(None)
    }

    fn cholesky(&self, _: Address, _: usize, _: Address) -> Result<Option<usize>> {
        Err(failed("there is no library for factorizations"))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
