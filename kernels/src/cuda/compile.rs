//! Compiles kernels for the card at hand with NVRTC, and keeps what it made on disk.

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use cudarc::nvrtc::sys;
use formats::container::cache;
use sha2::{Digest, Sha256};

use super::device::Module;
use crate::{Error, Result};

/// Every module; a new one is a line here. Those that take long to compile and every run needs come first.
pub static MODULES: &[&Module] = &[
    &super::attention::ATTENTION,
    &super::sweep::SWEEP,
    &super::search::SEARCH,
    &super::forward::POINTWISE,
    &super::forward::NORM,
    &super::forward::ROPE,
    &super::recurrent::RECURRENT,
    &super::sparse::SPARSE,
    &super::hyper::HYPER,
    &super::streams::STREAMS,
    &super::quantize::GRAM,
    &super::factor::FACTOR,
    &super::pack::PACK,
    &super::losses::LOSS,
    &super::forward::ROUNDING,
    &super::blocks::BLOCKS,
    &super::blocks::APART,
    &super::refine::REFINE,
    &super::search::CLIP,
];

/// Modules that few runs need, and that take the longest to compile: no sooner than they are needed.
pub(super) static LATER: &[&str] = &["clip"];

/// What the compiler made of a module.
#[derive(Debug)]
pub struct Compiled {
    /// Machine code, or PTX where the compiler does not know the card, as the driver loads it.
    pub image: Vec<u8>,
    /// What the compiler said; with `report`, registers and spills of each kernel.
    pub log: String,
}

/// A place beside the system's own where a library of CUDA's may lie.
fn folders() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for variable in ["QUANTC_CUDA_LIBRARIES", "CUDA_PATH", "CUDA_HOME"] {
        if let Some(root) = std::env::var_os(variable).map(PathBuf::from) {
            found.extend([root.join("lib64"), root.join("lib"), root.clone()]);
        }
    }
    let mut roots: Vec<PathBuf> = Vec::new();
    roots.extend(std::env::var_os("VIRTUAL_ENV").map(PathBuf::from));
    roots.extend(std::env::var_os("CONDA_PREFIX").map(PathBuf::from));
    roots.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local")));
    // The interpreters that a shell would find.
    for folder in std::env::var_os("PATH").iter().flat_map(|path| std::env::split_paths(path).collect::<Vec<_>>()) {
        roots.extend(prefixes(folder.join("python3")));
    }
    roots.extend(["/usr/local", "/usr"].map(PathBuf::from));
    for root in roots {
        for lib in ["lib", "lib64"] {
            for python in children(&root.join(lib), "python3") {
                for packages in ["site-packages", "dist-packages"] {
                    // CUDA 13 puts all its libraries into one folder, CUDA 12 each into its own.
                    for package in children(&python.join(packages).join("nvidia"), "") {
                        found.push(package.join("lib"));
                    }
                }
            }
        }
    }
    for cuda in children(Path::new("/usr/local"), "cuda") {
        found.extend([cuda.join("lib64"), cuda.join("targets/x86_64-linux/lib")]);
    }
    found.push(PathBuf::from("/opt/cuda/lib64"));
    found.retain(|folder| folder.is_dir());
    found
}

/// Where the packages of an interpreter may be: beside it, and beside each link on the way to what it really is.
fn prefixes(mut interpreter: PathBuf) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // Links that lead in a circle exist to nobody.
    if interpreter.exists() {
        loop {
            let folder = interpreter.parent().expect("in a folder").to_path_buf();
            found.extend(folder.parent().map(Path::to_path_buf));
            match std::fs::read_link(&interpreter) {
                Ok(next) => interpreter = folder.join(next),
                Err(_) => break,
            }
        }
    }
    found
}

/// What lies in a folder and begins so, sorted.
fn children(folder: &Path, start: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(start))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// How the names of a library's files end, the newest first: of which version of CUDA which it is.
fn endings(name: &str) -> [(i32, i32); 2] {
    match name {
        "cusolver" => [(13, 12), (12, 11)],
        "cusparse" => [(13, 12), (12, 12)],
        _ => [(13, 13), (12, 12)],
    }
}

/// Loads `lib{name}.so.N` from where Python's packages and toolkits put it, so that a later search by that name finds it loaded.
///
/// The search is for what the system's own does not find; a newer version goes before an older one, but none before the driver's.
fn preload(name: &str) {
    let newest = NEWEST.load(Ordering::Relaxed);
    for (_, version) in endings(name).into_iter().filter(|(cuda, _)| *cuda <= newest) {
        let file = format!("lib{name}.so.{version}");
        for path in folders().iter().map(|folder| folder.join(&file)).filter(|path| path.exists()) {
            // NVRTC looks for its own part by name alone, and not in every version beside itself.
            let parts = children(path.parent().expect("in a folder"), &format!("lib{name}-builtins.so."));
            parts.iter().for_each(|part| {
                load(part);
            });
            if load(&path) {
                return;
            }
        }
    }
}

/// Loads a library of CUDA's as the system finds it, under the names that it is asked for by later, which then find it loaded.
pub(super) fn load_by_name(name: &str) -> bool {
    cudarc::get_lib_name_candidates(name).iter().any(|file| load(Path::new(file)))
}

/// Loads a library, and keeps it.
fn load(path: &Path) -> bool {
    // SAFETY: a library of CUDA's, by its name; what it runs when loaded is its own setting up.
    match unsafe { libloading::Library::new(path) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(_) => false,
    }
}

/// The version of CUDA that the driver is for: libraries of a later one would not run with it.
static NEWEST: AtomicI32 = AtomicI32::new(13);

/// Looks for libraries of this version of CUDA at most from now on.
pub(super) fn limit_libraries(newest: i32) {
    NEWEST.store(newest, Ordering::Relaxed);
}

/// A library of CUDA's, and how to get it.
#[derive(Debug)]
pub(super) struct Library {
    name: &'static str,
    package: &'static str,
    there: OnceLock<bool>,
}

pub(super) static NVRTC: Library = Library::new("nvrtc", "nvidia-cuda-nvrtc");
pub(super) static CUBLAS: Library = Library::new("cublas", "nvidia-cublas");
pub(super) static CUSOLVER: Library = Library::new("cusolver", "nvidia-cusolver");

impl Library {
    const fn new(name: &'static str, package: &'static str) -> Library {
        Library { name, package, there: OnceLock::new() }
    }

    /// Whether it can be loaded; it then is.
    pub fn is_there(&self) -> bool {
        *self.there.get_or_init(|| {
            if load_by_name(self.name) {
                return true;
            }
            let before: &[&str] = match self.name {
                "cublas" => &["cublasLt"],
                "cusolver" => &["nvJitLink", "cusparse"],
                _ => &[],
            };
            before.iter().for_each(|name| preload(name));
            preload(self.name);
            load_by_name(self.name)
        })
    }

    /// Fails with a sentence that says how to get it.
    pub fn wanted(&self) -> Result<()> {
        if self.is_there() {
            return Ok(());
        }
        Err(Error::Device(format!(
            "CUDA's library {} is not there: install the CUDA toolkit, or `pip install {}` (CUDA 12: {}-cu12), and name its folder in \
             QUANTC_CUDA_LIBRARIES if it lies at an unusual place",
            self.name, self.package, self.package
        )))
    }
}

/// Whether NVRTC can be loaded: the compiler needs no card.
pub fn compiler_is_there() -> bool {
    NVRTC.is_there()
}

fn check(what: &str, code: sys::nvrtcResult) -> Result<()> {
    match code {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        other => Err(Error::Device(format!("NVRTC: {what}: {other:?}"))),
    }
}

/// Which library of CUDA's a card cannot be used without and is not there, and how to get it.
pub fn missing() -> Option<String> {
    [&NVRTC, &CUBLAS].into_iter().find_map(|library| library.wanted().err()).map(|error| error.to_string())
}

/// NVRTC's version, as `(13, 0)`.
pub fn version() -> Result<(i32, i32)> {
    NVRTC.wanted()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two numbers to write to.
    check("version", unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
    Ok((major, minor))
}

/// The targets that NVRTC makes machine code for, as 90.
fn targets() -> Result<Vec<i32>> {
    let mut count: c_int = 0;
    // SAFETY: a number to write to.
    check("targets", unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) })?;
    let mut all = vec![0; count.max(0) as usize];
    // SAFETY: as many numbers as it said.
    check("targets", unsafe { sys::nvrtcGetSupportedArchs(all.as_mut_ptr()) })?;
    Ok(all)
}

/// What NVRTC compiles for a compute capability: machine code, as `sm_90`, where it knows the card; else PTX for the newest that it
/// knows before it, as `compute_80`, which the driver takes on.
fn target_for(capability: u32, known: &[i32]) -> Result<String> {
    if known.contains(&(capability as i32)) {
        return Ok(format!("sm_{capability}"));
    }
    let older = known.iter().filter(|target| **target <= capability as i32).max();
    let older = older.ok_or_else(|| {
        Error::Device(format!(
            "NVRTC does not compile for compute capability {capability} any more: install an older one"
        ))
    })?;
    Ok(format!("compute_{older}"))
}

/// How modules are compiled: a product and a sum are rounded one after the other unless a kernel says otherwise.
fn options_for(target: &str) -> Vec<String> {
    vec![format!("--gpu-architecture={target}"), "--std=c++17".to_owned(), "--fmad=false".to_owned()]
}

/// Compiles a module for a compute capability, as 90.
pub fn compile(module: &Module, capability: u32, report: bool) -> Result<Compiled> {
    NVRTC.wanted()?;
    let target = target_for(capability, &targets()?)?;
    let exact = target.starts_with("sm_");
    let mut options = options_for(&target);
    if report {
        options.push("--ptxas-options=--verbose".to_owned());
    }
    let named = |text: &str| CString::new(text).expect("no zero byte in a source");
    let source = named(&format!("{}\n#line 1 \"{}.cu\"\n{}", super::COMMON, module.name, module.source));
    let name = named(&format!("{}.cu", module.name));
    let options: Vec<CString> = options.iter().map(|option| named(option)).collect();
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: strings that outlive the program, which is destroyed below; buffers as long as NVRTC says.
    unsafe {
        let none = std::ptr::null();
        check("program", sys::nvrtcCreateProgram(&mut program, source.as_ptr(), name.as_ptr(), 0, none, none))?;
        let code = sys::nvrtcCompileProgram(program, pointers.len() as c_int, pointers.as_ptr());
        let mut length = 0;
        let mut log = Vec::new();
        if check("log", sys::nvrtcGetProgramLogSize(program, &mut length)).is_ok() {
            log = vec![0u8; length];
            let _ = sys::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
        }
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
        let said = if log.is_empty() { String::new() } else { format!(":\n{log}\n") };
        let result = check(&format!("{} for {target}{said}", module.name), code).and_then(|()| {
            let mut length = 0;
            let size = match exact {
                true => sys::nvrtcGetCUBINSize(program, &mut length),
                false => sys::nvrtcGetPTXSize(program, &mut length),
            };
            check("size", size)?;
            let mut image = vec![0u8; length];
            let copied = match exact {
                true => sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()),
                false => sys::nvrtcGetPTX(program, image.as_mut_ptr().cast()),
            };
            check("image", copied)?;
            Ok(image)
        });
        let _ = sys::nvrtcDestroyProgram(&mut program);
        Ok(Compiled { image: result?, log })
    }
}

/// What makes two images equal: the source, how it is compiled and for which card, and the compiler.
fn key(module: &Module, options: &[String], version: (i32, i32)) -> String {
    let mut hash = Sha256::new();
    let compiler = format!("{version:?} {}", env!("CARGO_PKG_VERSION"));
    for part in [super::COMMON, module.source, &compiler].into_iter().chain(options.iter().map(String::as_str)) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// The image of a module for a card: from the cache, or compiled and put there. A cache that cannot be written is done without.
pub fn cached(module: &Module, capability: u32) -> Result<Vec<u8>> {
    let key = key(module, &options_for(&target_for(capability, &targets()?)?), version()?);
    let path = cache::folder("kernels").map(|folder| folder.join(format!("{}-sm{capability}-{key}.bin", module.name)));
    if let Some(image) = path.as_ref().and_then(|path| {
        cache::read(path, |content| {
            let mut image = Vec::new();
            content.read_to_end(&mut image).map(|_| image)
        })
    }) {
        return Ok(image);
    }
    let image = compile(module, capability, false)?.image;
    if let Some(path) = path {
        let _ = cache::write(&path, |file| file.write_all(&image));
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_source_options_and_compiler() {
        let a = Module { name: "a", source: "one" };
        let b = Module { name: "a", source: "two" };
        let [new, old] = ["sm_90", "sm_80"].map(options_for);
        let fused = [&new[..], &["--fmad=true".to_owned()]].concat();
        let keys = [
            key(&a, &new, (13, 0)),
            key(&b, &new, (13, 0)),
            key(&a, &old, (13, 0)),
            key(&a, &new, (12, 9)),
            key(&a, &fused, (13, 0)),
        ];
        assert!((0..5).all(|i| (0..i).all(|j| keys[i] != keys[j])));
    }
}
