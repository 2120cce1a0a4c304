//! A small process that watches over the one that works, so that however the latter ends, the former tidies up and says why.
//!
//! ```text
//! quantc …            starts itself once more, hands signals on, waits
//!  └─ quantc …        does the work; dies at once of what it cannot survive
//! ```
//!
//! A file that is truncated while it is mapped, memory that cannot be had, a stack that overflows and a kill from outside all end a
//! process on the spot, and no code of its own can be trusted to run then. The watcher holds nothing but a path: it sweeps the staging
//! folder, turns the end into one sentence and an exit code, and dies itself of a signal that it was sent, as shells expect.

use std::path::{Path, PathBuf};

#[cfg(unix)]
mod limits;

/// How the watched process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It returned this exit code.
    Code(u8),
    /// This signal was sent to the watcher, which handed it on.
    Asked(i32),
    /// It died of this signal by itself.
    Died(i32),
    /// It died of this signal while it ran a program in this file: a chat template, or a tokenizer.
    DiedIn(PathBuf, i32),
}

impl End {
    /// What to tell of a death, where there is something to tell: `subject` is what was worked on.
    pub fn sentence(&self, subject: &Path) -> Option<String> {
        let signal = match self {
            End::Died(signal) => *signal,
            End::DiedIn(file, signal) if [signal::XCPU, signal::ABRT, signal::SEGV].contains(signal) => {
                let what =
                    if *signal == signal::XCPU { "takes far more time" } else { "nests deeper, or takes more memory," };
                return Some(format!(
                    "{}: working with it {what} than any that is meant well; get the file from where the model was published",
                    file.display()
                ));
            }
            End::DiedIn(_, signal) => *signal,
            End::Code(_) | End::Asked(_) => return None,
        };
        let subject = subject.display();
        let known = [
            (
                signal::BUS,
                "one of its files was truncated, or its disk failed, while it was being read; nothing was written",
            ),
            (
                signal::KILL,
                "the process was killed from outside, as systems do when memory runs out; give fewer --samples or a shorter --seq-len, or \
                 more memory",
            ),
            (
                signal::ABRT,
                "the process gave up, most often because memory ran out; give fewer --samples or a shorter --seq-len, or more memory",
            ),
            (signal::SEGV, "the process was stopped for an invalid access or a full stack; this is a fault of quantc"),
            (
                signal::XCPU,
                "the process has used up the processor time that its limit allows (ulimit -t); give it more",
            ),
        ];
        let why = known.iter().find(|(number, _)| *number == signal).map(|(_, why)| (*why).to_owned());
        let why = why.unwrap_or_else(|| format!("the process was ended by signal {signal}"));
        Some(format!("{subject}: {why}"))
    }
}

/// Numbers of signals that are the same on every system that has them here.
mod signal {
    #[cfg(unix)]
    pub use signal_hook::consts::{SIGABRT as ABRT, SIGBUS as BUS, SIGKILL as KILL, SIGSEGV as SEGV, SIGXCPU as XCPU};
    #[cfg(not(unix))]
    pub const ABRT: i32 = 6;
    #[cfg(not(unix))]
    pub const BUS: i32 = 7;
    #[cfg(not(unix))]
    pub const KILL: i32 = 9;
    #[cfg(not(unix))]
    pub const SEGV: i32 = 11;
    #[cfg(not(unix))]
    pub const XCPU: i32 = 24;
}

/// The limits around the programs in the file `path`, for whoever runs them.
pub fn within(path: PathBuf) -> calibration::samples::Guard {
    Some(std::sync::Arc::new(Within(path)))
}

#[cfg(unix)]
pub use limits::Within;
#[cfg(unix)]
pub use watching::{die_of, watch};

/// The limits around the programs in one file; this system has none.
#[cfg(not(unix))]
#[derive(Debug)]
pub struct Within(pub PathBuf);

#[cfg(not(unix))]
impl calibration::samples::Limits for Within {
    fn around(&self, _: usize, work: &mut (dyn FnMut() + Send)) {
        work();
    }
}

/// Without signals there is nothing to watch for.
#[cfg(not(unix))]
pub fn watch() -> Option<End> {
    None
}

/// Never called: there are no signals.
#[cfg(not(unix))]
pub fn die_of(_: i32) {}

#[cfg(unix)]
mod watching {
    use std::os::fd::AsRawFd;
    use std::os::unix::process::ExitStatusExt;
    use std::path::PathBuf;
    use std::process::{Child, Command, ExitStatus};

    use rustix::process::{
        Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, getppid, getrlimit, kill_process,
        set_parent_process_death_signal, setrlimit, waitid,
    };
    use signal_hook::consts::{
        SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
    };
    use signal_hook::iterator::Signals;

    use super::{End, limits};

    /// Holds the watcher's process id, so that the worker knows what it is.
    const MARK: &str = "QUANTC_WATCHED_BY";

    /// Signals that ask a run to end: of people and shells, and of batch systems whose time is over.
    const ASKING: [i32; 11] =
        [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGXCPU];

    /// Starts this program once more with the same arguments and waits for its end; `None` in the process that is to work.
    ///
    /// Where no process can be started, the work is done without a watcher.
    pub fn watch() -> Option<End> {
        let parent = getppid().map(Pid::as_raw_nonzero).map(|id| id.to_string());
        let marked = std::env::var(MARK).unwrap_or_default();
        let (watcher, memory) = marked.split_once(':').unwrap_or((&marked, ""));
        if parent.is_some_and(|parent| parent == watcher) {
            be_watched();
            memory.parse().into_iter().for_each(limits::share);
            return None;
        }
        // Before the start, so that no end is missed. What was ignored from outside, as by nohup, stays so.
        let ignored = ignored();
        let asked = ASKING.into_iter().filter(|signal| ignored & (1 << (signal - 1)) == 0);
        let mut signals = Signals::new(asked).ok()?;
        let program = std::env::current_exe().ok()?;
        let memory = limits::shared();
        let number = memory.as_ref().map(|memory| memory.as_raw_fd().to_string()).unwrap_or_default();
        let mark = format!("{}:{number}", std::process::id());
        let mut child = Command::new(program).args(std::env::args_os().skip(1)).env(MARK, mark).spawn().ok()?;
        no_image();
        // Waited for by a thread, and not by SIGCHLD, which whoever started this program may have blocked or ignored.
        let worker = i32::try_from(child.id()).ok().and_then(Pid::from_raw)?;
        let (over, waiting) = (signals.handle(), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        let waiter = std::thread::Builder::new().spawn(move || {
            while waitid(WaitId::Pid(worker), waiting).is_err_and(|error| error == rustix::io::Errno::INTR) {}
            over.close();
        });
        let mut asked = None;
        if waiter.is_ok() {
            // The iterator panics where its own socket fails. The worker's end is then waited for all the same.
            std::panic::set_hook(Box::new(|_| {}));
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for signal in signals.forever() {
                    asked = Some(signal);
                    hand_on(&child, signal);
                }
            }));
        }
        // Its number is its own until now, as the thread has not taken its end away.
        let status = child.wait().ok()?;
        // A signal to both may be seen here after the worker has died of it.
        asked = signals.pending().last().or(asked);
        Some(end(status, asked, memory.as_ref().and_then(limits::last_seen)))
    }

    fn end(status: ExitStatus, asked: Option<i32>, file: Option<PathBuf>) -> End {
        match (status.code(), asked, status.signal().unwrap_or(0), file) {
            (Some(code), ..) => End::Code(u8::try_from(code).unwrap_or(u8::MAX)),
            (None, Some(signal), ..) => End::Asked(signal),
            (None, None, signal, _) if signal != SIGXCPU && ASKING.contains(&signal) => End::Asked(signal),
            (None, None, signal, Some(file)) => End::DiedIn(file, signal),
            (None, None, signal, None) => End::Died(signal),
        }
    }

    fn hand_on(child: &Child, signal: i32) {
        let process = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        if let (Some(process), Some(signal)) = (process, Signal::from_named_raw(signal)) {
            // It may be gone already. One that was stopped learns of a signal when it goes on.
            let _ = kill_process(process, signal);
            let _ = kill_process(process, Signal::CONT);
        }
    }

    /// The worker ends with its watcher, and learns of a file that grew too large from the write instead of by a signal.
    fn be_watched() {
        #[cfg(target_os = "linux")]
        let _ = set_parent_process_death_signal(Some(Signal::TERM));
        let _ = signal_hook::flag::register(SIGXFSZ, std::sync::Arc::default());
        no_image();
    }

    /// An image of the memory beside the output would be something that the run leaves behind.
    fn no_image() {
        let core = Rlimit { current: Some(0), maximum: getrlimit(Resource::Core).maximum };
        let _ = setrlimit(Resource::Core, core);
    }

    /// The signals that this process ignores, as a set of bits from signal 1 on.
    fn ignored() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
    }

    /// Ends this process by a signal, as if nobody had caught it.
    pub fn die_of(signal: i32) {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_one_sentence() {
        for (end, words) in [
            (End::Died(signal::BUS), "truncated"),
            (End::Died(signal::KILL), "memory runs out"),
            (End::Died(signal::ABRT), "memory ran out"),
            (End::Died(signal::SEGV), "full stack"),
            (End::Died(signal::XCPU), "ulimit -t"),
            (End::Died(31), "signal 31"),
        ] {
            let sentence = end.sentence(Path::new("model")).unwrap();
            assert!(sentence.starts_with("model: ") && sentence.contains(words), "{sentence}");
        }
        let file = || PathBuf::from("model/chat_template.jinja");
        for (signal, words) in [(signal::XCPU, "far more time"), (signal::ABRT, "nests deeper, or takes more memory,")]
        {
            let sentence = End::DiedIn(file(), signal).sentence(Path::new("model")).unwrap();
            assert!(sentence.starts_with("model/chat_template.jinja: ") && sentence.contains(words), "{sentence}");
        }
        assert!(End::DiedIn(file(), signal::BUS).sentence(Path::new("model")).unwrap().starts_with("model: "));
        assert_eq!(End::Code(3).sentence(Path::new("m")).or(End::Asked(2).sentence(Path::new("m"))), None);
    }
}
