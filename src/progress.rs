//! What the user sees while work is under way: a bar on a terminal and else a line now and then, and what it will take.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::words::{one_line, tell};

/// What lies between two lines where standard error is no terminal.
const BETWEEN: Duration = Duration::from_secs(15);

/// What has to be seen of a stage before it is said when it will end: so long, and such a share of it.
const SEEN: (Duration, f64) = (Duration::from_secs(3), 0.01);

/// How a run tells how far it is, and by what it is stopped.
///
/// A library has [`Progress::silent`], which prints nothing, or [`Progress::told`], which calls back; both may be given a [`Cancel`].
pub struct Progress {
    says: bool,
    prints: bool,
    terminal: bool,
    verbose: bool,
    bar: ProgressBar,
    stage: Mutex<Stage>,
    listener: Option<Listener>,
    cancel: Cancel,
}

/// Who is told how far the work is.
#[cfg_attr(doc, doc(hidden))]
pub type Listener = Box<dyn Fn(&Update) + Send + Sync>;

/// How far the work is. A new stage is told when it begins, and then every half second or less often.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Update {
    /// What is done, as `quantizing` or `measuring the model`.
    pub stage: String,
    /// Where in it the work is, as `window 3 of 8`; empty where that has no name.
    pub part: String,
    /// Whether the stage begins with this.
    pub begins: bool,
    /// Work of the stage that is done, in a unit of its own.
    pub done: u64,
    /// All work of the stage, in the same unit.
    pub total: u64,
    /// Seconds until the stage ends, where that can be said yet.
    pub seconds_left: Option<f64>,
}

impl Update {
    /// The event that `--events` prints.
    #[cfg_attr(doc, doc(hidden))]
    pub fn event(&self) -> Value {
        if self.begins {
            return json!({"event": "stage", "stage": self.stage});
        }
        let share = (self.done as f64 / self.total.max(1) as f64).min(1.0);
        json!({"event": "progress", "stage": self.stage, "part": self.part, "done": share, "seconds_left": self.seconds_left})
    }
}

/// Stops a run from another thread, or from its own callback.
///
/// Every clone is the same flag. A run looks at it after each linear and each block of a model, fails with [`Error::Cancelled`], and leaves
/// no output; blocks that are finished are kept, and the same run goes on after them.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A flag that is not set.
    pub fn new() -> Cancel {
        Cancel::default()
    }

    /// Stops the runs that look at this flag. It cannot be taken back.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was set.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What lies between two events of progress.
const EVENTS: Duration = Duration::from_millis(500);

/// What is at work.
struct Stage {
    what: String,
    /// Where in it the work is, where that has a name.
    part: String,
    all: u64,
    done: u64,
    started: Instant,
    /// The last line, after the start.
    told: Duration,
    /// When the last event was told, after the start.
    heard: Duration,
}

impl Stage {
    fn begin(what: String, all: u64) -> Stage {
        Stage {
            what,
            part: String::new(),
            all,
            done: 0,
            started: Instant::now(),
            told: Duration::ZERO,
            heard: Duration::ZERO,
        }
    }

    /// What is to be told when the stage is so old; `None` where the last update was not long ago.
    fn update(&mut self, age: Duration) -> Option<Update> {
        let over = self.done >= self.all;
        if age < self.heard + EVENTS && !over {
            return None;
        }
        self.heard = age;
        let share = self.done as f64 / self.all.max(1) as f64;
        Some(Update {
            stage: self.what.clone(),
            part: self.part.clone(),
            begins: false,
            done: self.done.min(self.all),
            total: self.all,
            seconds_left: left(age, share).map(|left| left.as_secs_f64()),
        })
    }

    fn name(&self) -> String {
        if self.part.is_empty() { self.what.clone() } else { format!("{}: {}", self.what, self.part) }
    }

    /// The line that is to be told when the stage is so old; `None` where the last one was not long ago.
    fn line(&mut self, age: Duration) -> Option<String> {
        if age < self.told + BETWEEN || self.done >= self.all {
            return None;
        }
        self.told = age;
        let share = self.done as f64 / self.all as f64;
        let left = left(age, share).map_or(String::new(), |left| format!(", about {} left", time(left)));
        Some(format!("{}, {:.0} % done{left}", self.name(), 100.0 * share))
    }
}

/// How long it will take on, by how long a share of it took; `None` where too little is known, and at the end.
fn left(age: Duration, share: f64) -> Option<Duration> {
    let (least, some) = SEEN;
    (age >= least && share >= some && share < 1.0).then(|| age.mul_f64((1.0 - share) / share))
}

/// A length of time as people say it.
fn time(length: Duration) -> String {
    let seconds = length.as_secs_f64().ceil() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, _) if minutes >= 10 => format!("{minutes} min"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

impl Progress {
    /// Prints nothing.
    pub fn silent() -> Progress {
        let mut silent = Progress::new(true);
        silent.prints = false;
        silent
    }

    /// Prints nothing, and calls `listener` with every stage and how far it is. It is called by the threads that work, so it should return
    /// soon; what it panics with ends the run.
    pub fn told(listener: impl Fn(&Update) + Send + Sync + 'static) -> Progress {
        Progress::silent().listened(Some(Box::new(listener)))
    }

    /// The same, and stops where `cancel` is set.
    #[must_use]
    pub fn stopped_by(mut self, cancel: &Cancel) -> Progress {
        self.cancel = cancel.clone();
        self
    }

    /// A display on standard error, for `quiet` or not, as the program has it.
    #[cfg_attr(doc, doc(hidden))]
    pub fn new(quiet: bool) -> Progress {
        let terminal = !quiet && std::io::stderr().is_terminal();
        let (bar, stage) = (ProgressBar::hidden(), Mutex::new(Stage::begin(String::new(), 0)));
        let cancel = Cancel::new();
        Progress { says: !quiet, prints: true, terminal, verbose: false, bar, stage, listener: None, cancel }
    }

    /// The same, with a line for each linear where there is a bar.
    #[cfg_attr(doc, doc(hidden))]
    pub fn verbose(mut self, verbose: bool) -> Progress {
        self.verbose = verbose;
        self
    }

    /// The same, and tells `listener` of every stage and how far it is.
    #[cfg_attr(doc, doc(hidden))]
    pub fn listened(mut self, listener: Option<Listener>) -> Progress {
        self.listener = listener;
        self
    }

    /// Fails where the work is to stop.
    #[cfg_attr(doc, doc(hidden))]
    pub fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Starts a stage of so much work, in a unit of its own. Fails where the work is to stop.
    #[cfg_attr(doc, doc(hidden))]
    pub fn start(&mut self, what: impl Into<String>, work: u64) -> Result<()> {
        self.check()?;
        self.bar.finish_and_clear();
        let what = what.into();
        if self.terminal {
            let style = ProgressStyle::with_template("{msg} {bar:32} {percent} %  {elapsed}{left}");
            let style = style.expect("a valid template").with_key(
                "left",
                |state: &ProgressState, text: &mut dyn std::fmt::Write| {
                    if let Some(left) = left(state.elapsed(), f64::from(state.fraction())) {
                        let _ = write!(text, ", about {} left", time(left));
                    }
                },
            );
            self.bar = ProgressBar::new(work).with_message(what.clone());
            self.bar.set_style(style);
            self.bar.enable_steady_tick(Duration::from_millis(200));
        }
        if let Some(listener) = &self.listener {
            let (stage, part) = (what.clone(), String::new());
            listener(&Update { stage, part, begins: true, done: 0, total: work, seconds_left: None });
        }
        *self.stage() = Stage::begin(what, work);
        self.check()
    }

    /// The work goes on with a part of the stage, as `window 3 of 8`.
    #[cfg_attr(doc, doc(hidden))]
    pub fn part(&self, part: impl Into<String>) {
        let mut stage = self.stage();
        stage.part = part.into();
        self.bar.set_message(stage.name());
    }

    /// So much work is done. Fails where the rest is not to be done.
    #[cfg_attr(doc, doc(hidden))]
    pub fn step(&self, work: u64) -> Result<()> {
        self.bar.inc(work);
        let mut stage = self.stage();
        stage.done += work;
        let age = stage.started.elapsed();
        let update = self.listener.as_ref().and_then(|_| stage.update(age));
        let line = if self.says && !self.terminal { stage.line(age) } else { None };
        // Who is told may take long, or panic.
        drop(stage);
        if let (Some(listener), Some(update)) = (&self.listener, update) {
            listener(&update);
        }
        if let Some(line) = line {
            tell(&line);
        }
        self.check()
    }

    /// So much of the work was done before, and says nothing of how long the rest takes.
    #[cfg_attr(doc, doc(hidden))]
    pub fn skip(&self, work: u64) {
        let mut stage = self.stage();
        stage.all = stage.all.saturating_sub(work);
        self.bar.set_length(stage.all);
    }

    /// Says nothing more, before and in the work, of several runs that are told together; a bar there still is.
    #[cfg_attr(doc, doc(hidden))]
    pub fn say_no_more(&mut self) {
        self.says = false;
    }

    /// A line before the work, whatever standard error is.
    #[cfg_attr(doc, doc(hidden))]
    pub fn say(&self, text: &str) {
        if self.says {
            tell(text);
        }
    }

    /// Lines that were asked for by themselves, however quiet the rest is; a library prints nothing.
    #[cfg_attr(doc, doc(hidden))]
    pub fn print(&self, text: &str) {
        if self.prints {
            text.trim_end().lines().for_each(tell);
        }
    }

    /// A line above the bar, for who wants to see everything.
    #[cfg_attr(doc, doc(hidden))]
    pub fn line(&self, text: impl FnOnce() -> String) {
        if self.terminal && self.verbose {
            self.bar.println(one_line(&text()));
        }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_told_now_and_then_with_what_is_known() {
        let seconds = Duration::from_secs;
        let mut stage = Stage::begin("quantizing".to_owned(), 1000);
        assert_eq!(stage.line(seconds(14)), None);
        // Nothing is done yet: no time is named.
        assert_eq!(stage.line(seconds(16)).unwrap(), "quantizing, 0 % done");
        stage.done = 250;
        assert_eq!(stage.line(seconds(30)), None, "the last one was 14 s ago");
        assert_eq!(stage.line(seconds(40)).unwrap(), "quantizing, 25 % done, about 2 min 0 s left");
        stage.part = "window 3 of 8".to_owned();
        assert_eq!(stage.line(seconds(60)).unwrap(), "quantizing: window 3 of 8, 25 % done, about 3 min 0 s left");
        stage.done = 1000;
        assert_eq!(stage.line(seconds(90)), None, "it is over");
    }

    #[test]
    fn a_callback_hears_of_stages_and_may_stop_them() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (cancel, ears) = (Cancel::new(), heard.clone());
        let stop = cancel.clone();
        let listener = move |update: &Update| {
            if update.done == 7 {
                stop.cancel();
            }
            ears.lock().unwrap().push((update.begins, update.done, update.total));
        };
        let mut progress = Progress::told(listener).stopped_by(&cancel);
        progress.start("measuring", 10).unwrap();
        progress.skip(3);
        progress.step(5).unwrap();
        let error = progress.step(2).unwrap_err();
        assert!(matches!(error, Error::Cancelled) && error.may_pass(), "{error}");
        assert!(progress.start("more", 1).is_err());
        assert_eq!(*heard.lock().unwrap(), [(true, 0, 10), (false, 7, 7)]);
    }

    #[test]
    fn times_are_named_once_something_is_known() {
        let seconds = Duration::from_secs;
        assert_eq!(left(seconds(1), 0.5), None);
        assert_eq!(left(seconds(100), 0.001), None);
        assert_eq!(left(seconds(100), 1.0), None);
        assert_eq!(left(seconds(10), 0.25), Some(seconds(30)));
        assert_eq!([1, 60, 600, 7260].map(|s| time(seconds(s))), ["1 s", "1 min 0 s", "10 min", "2 h 1 min"]);
    }
}
