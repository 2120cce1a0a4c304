//! Limits on what a model's own programs may take: its chat templates and tokenizers.
//!
//! ```text
//! watcher ── memory that both see ──► worker
//!                "model/chat_template.jinja"    limits on, work, limits off
//! ```
//!
//! While such a program runs, the worker has soft limits on data and processor time, and the watcher knows the file. A program that
//! wants more, or nests without end, is the worker's end; the watcher then names the file. Time is that of all its runs together: a
//! template that takes a while for each of a thousand conversations takes too long.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use calibration::samples::Limits;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::ClockId;

/// Bytes of data that may come to what there is already, whatever the size of the text (2 GiB).
const DATA: u64 = 2 << 30;

/// Bytes of data for each byte of text. The tokenizers library takes about a hundred.
const DATA_PER_BYTE: u64 = 256;

/// Seconds of processor time that the program of a file has, whatever the size of the texts.
const SECONDS: u64 = 15;

/// Bytes of texts that have a second more.
const BYTES_PER_SECOND: u64 = 100_000;

/// Where the worker writes what it is working on; unset in a process without a watcher, which has no limits either.
static SEEN_BY_WATCHER: OnceLock<File> = OnceLock::new();

static STATE: Mutex<State> = Mutex::new(State { inside: 0, before: None, spent: BTreeMap::new() });

struct State {
    /// Pieces of work under way.
    inside: usize,
    /// What was before the first of them.
    before: Option<Before>,
    /// Of each file: how long its program's threads were at work, and on how many bytes of text.
    spent: BTreeMap<PathBuf, (Duration, u64)>,
}

struct Before {
    data: Rlimit,
    cpu: Rlimit,
    stderr: Option<OwnedFd>,
}

/// What both processes see; `None` where the system has no such memory.
pub fn shared() -> Option<File> {
    #[cfg(target_os = "linux")]
    return rustix::fs::memfd_create("quantc", rustix::fs::MemfdFlags::empty()).ok().map(File::from);
    #[cfg(not(target_os = "linux"))]
    None
}

/// In the worker: the memory that the watcher knows by this number.
pub fn share(number: i32) {
    let Ok(memory) = rustix::fs::open(
        format!("/proc/self/fd/{number}"),
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    ) else {
        return;
    };
    let _ = SEEN_BY_WATCHER.set(File::from(memory));
}

/// In the watcher: the file whose program the worker was running at its end.
pub fn last_seen(memory: &File) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = vec![0; usize::try_from(memory.metadata().ok()?.len()).ok()?];
    memory.read_exact_at(&mut bytes, 0).ok()?;
    (!bytes.is_empty()).then(|| PathBuf::from(std::ffi::OsString::from_vec(bytes)))
}

/// The limits around the programs in one file.
#[derive(Debug)]
pub struct Within(pub PathBuf);

impl Limits for Within {
    fn around(&self, bytes: usize, work: &mut (dyn FnMut() + Send)) {
        let Some(memory) = SEEN_BY_WATCHER.get() else { return work() };
        enter(memory, &self.0, bytes as u64);
        // Leaves when `work` panics too.
        let _leaving = Leaving(memory, &self.0, own_time());
        work();
    }
}

struct Leaving<'a>(&'a File, &'a Path, Duration);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        leave(self.0, self.1, own_time().saturating_sub(self.2));
    }
}

fn enter(memory: &File, path: &Path, bytes: u64) {
    use std::os::unix::ffi::OsStrExt;
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    state.inside += 1;
    let _ = memory.set_len(0).and_then(|()| memory.write_all_at(path.as_os_str().as_bytes(), 0));
    let first = state.before.is_none();
    let before = state.before.get_or_insert_with(|| Before {
        data: getrlimit(Resource::Data),
        cpu: getrlimit(Resource::Cpu),
        stderr: silent(),
    });
    let raise = |resource: Resource, before: Rlimit, to: u64| {
        // Several pieces of work share the widest limit; a limit from outside stands.
        let now = if first { 0 } else { getrlimit(resource).current.unwrap_or(u64::MAX) };
        let most = [before.current, before.maximum].into_iter().flatten().min().unwrap_or(u64::MAX);
        let _ = setrlimit(resource, Rlimit { current: Some(to.max(now).min(most)), maximum: before.maximum });
    };
    raise(Resource::Data, before.data, data() + DATA + DATA_PER_BYTE.saturating_mul(bytes));
    let cpu = before.cpu;
    let (spent, texts) = state.spent.entry(path.to_path_buf()).or_default();
    *texts = texts.saturating_add(bytes);
    let left = (SECONDS + *texts / BYTES_PER_SECOND).saturating_sub(spent.as_secs());
    raise(Resource::Cpu, cpu, time(ClockId::ProcessCPUTime).as_secs() + left);
}

/// Processor time so far.
fn time(clock: ClockId) -> Duration {
    let now = rustix::time::clock_gettime(clock);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// That of this thread.
fn own_time() -> Duration {
    time(ClockId::ThreadCPUTime)
}

fn leave(memory: &File, path: &Path, spent: Duration) {
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    state.inside -= 1;
    state.spent.entry(path.to_path_buf()).or_default().0 += spent;
    if state.inside > 0 {
        return;
    }
    if let Some(before) = state.before.take() {
        let _ = setrlimit(Resource::Data, before.data);
        let _ = setrlimit(Resource::Cpu, before.cpu);
        if let Some(stderr) = before.stderr {
            let _ = rustix::stdio::dup2_stderr(stderr);
        }
    }
    let _ = memory.set_len(0);
}

/// Bytes of data that this process has now.
fn data() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Puts standard error aside: what the language's runtime says of a full stack is for the watcher to say. Returns what was there.
fn silent() -> Option<OwnedFd> {
    let stderr = rustix::io::dup(rustix::stdio::stderr()).ok()?;
    let null = File::options().write(true).open("/dev/null").ok()?;
    rustix::stdio::dup2_stderr(null.as_fd()).ok()?;
    Some(stderr)
}
