//! What the user sees while work is under way: a bar on a terminal and else a line now and then, and what it will take.

use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use serde_json::{Value, json};

use crate::words::{one_line, tell};

/// What lies between two lines where standard error is no terminal.
const BETWEEN: Duration = Duration::from_secs(15);

/// What has to be seen of a stage before it is said when it will end: so long, and such a share of it.
const SEEN: (Duration, f64) = (Duration::from_secs(3), 0.01);

/// A progress display; silent when it is asked to be.
pub struct Progress {
    says: bool,
    terminal: bool,
    verbose: bool,
    bar: ProgressBar,
    stage: Mutex<Stage>,
    listener: Option<Listener>,
}

/// Who is told what happens, as one JSON object for each event.
pub type Listener = Box<dyn Fn(&Value) + Send + Sync>;

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

    /// The event that is to be told when the stage is so old; `None` where the last one was not long ago.
    fn event(&mut self, age: Duration) -> Option<Value> {
        let over = self.done >= self.all;
        if age < self.heard + EVENTS && !over {
            return None;
        }
        self.heard = age;
        let share = self.done as f64 / self.all.max(1) as f64;
        let left = left(age, share).map(|left| left.as_secs_f64());
        Some(
            json!({"event": "progress", "stage": self.what, "part": self.part, "done": share.min(1.0), "seconds_left": left}),
        )
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
    /// A display for `quiet` or not.
    pub fn new(quiet: bool) -> Progress {
        let terminal = !quiet && std::io::stderr().is_terminal();
        let (bar, stage) = (ProgressBar::hidden(), Mutex::new(Stage::begin(String::new(), 0)));
        Progress { says: !quiet, terminal, verbose: false, bar, stage, listener: None }
    }

    /// The same, with a line for each linear where there is a bar.
    pub fn verbose(mut self, verbose: bool) -> Progress {
        self.verbose = verbose;
        self
    }

    /// The same, and tells `listener` of every stage and how far it is.
    pub fn listened(mut self, listener: Option<Listener>) -> Progress {
        self.listener = listener;
        self
    }

    /// Starts a stage of so much work, in a unit of its own.
    pub fn start(&mut self, what: impl Into<String>, work: u64) {
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
            listener(&json!({"event": "stage", "stage": what}));
        }
        *self.stage() = Stage::begin(what, work);
    }

    /// The work goes on with a part of the stage, as `window 3 of 8`.
    pub fn part(&self, part: impl Into<String>) {
        let mut stage = self.stage();
        stage.part = part.into();
        self.bar.set_message(stage.name());
    }

    /// So much work is done.
    pub fn step(&self, work: u64) {
        self.bar.inc(work);
        let mut stage = self.stage();
        stage.done += work;
        let age = stage.started.elapsed();
        if let Some(listener) = &self.listener
            && let Some(event) = stage.event(age)
        {
            listener(&event);
        }
        if self.says
            && !self.terminal
            && let Some(line) = stage.line(age)
        {
            tell(&line);
        }
    }

    /// So much of the work was done before, and says nothing of how long the rest takes.
    pub fn skip(&self, work: u64) {
        let mut stage = self.stage();
        stage.all = stage.all.saturating_sub(work);
        self.bar.set_length(stage.all);
    }

    /// Says nothing more, before and in the work, of several runs that are told together; a bar there still is.
    pub fn say_no_more(&mut self) {
        self.says = false;
    }

    /// A line before the work, whatever standard error is.
    pub fn say(&self, text: &str) {
        if self.says {
            tell(text);
        }
    }

    /// A line above the bar, for who wants to see everything.
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
    fn times_are_named_once_something_is_known() {
        let seconds = Duration::from_secs;
        assert_eq!(left(seconds(1), 0.5), None);
        assert_eq!(left(seconds(100), 0.001), None);
        assert_eq!(left(seconds(100), 1.0), None);
        assert_eq!(left(seconds(10), 0.25), Some(seconds(30)));
        assert_eq!([1, 60, 600, 7260].map(|s| time(seconds(s))), ["1 s", "1 min 0 s", "10 min", "2 h 1 min"]);
    }
}
