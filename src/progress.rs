//! What the user sees while work is under way: a bar and a line for each linear, on a terminal only, and what it will take.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::words::{one_line, tell};

/// A progress display; silent when it is asked to be and when standard error is not a terminal.
pub struct Progress {
    says: bool,
    loud: bool,
    bar: ProgressBar,
}

impl Progress {
    /// A display for `quiet` or not.
    pub fn new(quiet: bool) -> Progress {
        Progress { says: !quiet, loud: !quiet && std::io::stderr().is_terminal(), bar: ProgressBar::hidden() }
    }

    /// Starts a bar of `steps`.
    pub fn start(&mut self, what: &'static str, steps: usize) {
        self.bar.finish_and_clear();
        if self.loud {
            self.bar = ProgressBar::new(steps as u64).with_message(what);
            let style = ProgressStyle::with_template("{msg} {bar:32} {pos}/{len}  {elapsed}, {eta} left");
            self.bar.set_style(style.expect("a valid template"));
            self.bar.enable_steady_tick(Duration::from_millis(200));
        }
    }

    /// One step is done.
    pub fn step(&self) {
        self.bar.inc(1);
    }

    /// Says nothing more before the work, of several runs that are told together.
    pub fn say_no_more(&mut self) {
        self.says = false;
    }

    /// A line before the work, whatever standard error is.
    pub fn say(&self, text: &str) {
        if self.says {
            tell(text);
        }
    }

    /// A line above the bar.
    pub fn line(&self, text: impl FnOnce() -> String) {
        if self.loud {
            self.bar.println(one_line(&text()));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
