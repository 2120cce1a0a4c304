//! What programs and other languages call: everything that the command line does with models, with requests and results that are plain data.
//!
//! ```text
//! Job, Evaluate, Compare, Serve      what is asked for: public fields, and serde from the keys of recipes and quantc.toml
//!   └─ Compute                       where it is computed: device, threads, memory
//!   └─ Progress, Cancel              how it is watched, and stopped
//! Report, Planned, Evaluated, …      what was found: serde to the JSON that the commands print
//! ```
//!
//! The program's commands are calls of what stands here. Flags, exit codes and printing are theirs; whatever else a run needs (opening
//! models, fetching them from a hub, choosing the device, limits on the quality) is done here, once for all callers.

// Its macro is used by the others.
#[macro_use]
mod compute;

mod compare;
mod evaluate;
mod job;
mod keys;

use std::path::{Path, PathBuf};

use crate::check::Checked;
use crate::checkpoint::Checkpoint;
use crate::diff::Diff;
use crate::error::{Error, Result};
use crate::hub::{self, Found, Reads};
use crate::inspect::Inspection;
use crate::progress::Progress;
use crate::targets::Output;
use crate::{check as checking, demo, diff as differences, inspect as inspection};

pub use compare::Compare;
pub use compute::{Compute, Device, Engine, Math};
pub use evaluate::Evaluate;
pub use job::{Job, Serve};

/// A model where it lies: the path itself, or what a name of the Hugging Face hub means, which is downloaded where its cache does not have it.
///
/// What of it is no more than headers goes away with this.
#[derive(Debug)]
pub struct Located {
    path: PathBuf,
    found: Option<Found>,
}

impl Located {
    /// Finds all of a model.
    ///
    /// Fails where a hub is asked and does not give it. That a path leads nowhere is told by whoever opens it.
    pub fn whole(model: &Path, progress: &mut Progress) -> Result<Located> {
        Located::of(model, Reads::Whole, progress)
    }

    /// Finds a model of which so much is read.
    pub(crate) fn of(model: &Path, reads: Reads, progress: &mut Progress) -> Result<Located> {
        let found = hub::find(model, reads, progress)?;
        found.iter().flat_map(|found| &found.note).for_each(|note| progress.say(&format!("note: {note}")));
        Ok(Located { path: found.as_ref().map_or_else(|| model.to_path_buf(), |found| found.place.clone()), found })
    }

    /// Finds a LoRA adapter: the path of its folder, which is the cache's where a name of a hub was given.
    ///
    /// Fails as [`whole`](Self::whole) does.
    pub fn adapter(adapter: &Path, progress: &mut Progress) -> Result<PathBuf> {
        Ok(Located::of(adapter, Reads::Adapter, progress)?.path)
    }

    /// Finds several.
    pub(crate) fn all(models: &[PathBuf], progress: &mut Progress) -> Result<Vec<Located>> {
        models.iter().map(|model| Located::whole(model, progress)).collect()
    }

    /// The folder or file that is opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the values of its weights are there.
    pub(crate) fn is_whole(&self) -> bool {
        self.found.as_ref().is_none_or(Found::is_whole)
    }
}

/// Shows what is in a checkpoint, of which no weights are read. With `program` also what the model computes, one block of each kind.
///
/// Fails where it cannot be opened, and with `program` for a family that is not known.
pub fn inspect(model: &Path, program: bool) -> Result<Inspection> {
    let located = Located::of(model, Reads::Headers, &mut Progress::new(false))?;
    let checkpoint = Checkpoint::open(located.path())?;
    let mut found = inspection::inspect(&checkpoint);
    if program {
        found.program = Some(inspection::program(&checkpoint)?);
    }
    Ok(found)
}

/// Finds out whether a checkpoint is whole: hashes of its files, where a report says them, every tensor, its configuration, its tokenizer.
/// What is wrong is told in the result.
///
/// Fails where it cannot be opened at all.
pub fn check(model: &Path) -> Result<Checked> {
    checking::check(Located::whole(model, &mut Progress::new(false))?.path())
}

/// Says what differs between two checkpoints, in whatever formats they are. Reads all tensors that both have.
///
/// Fails where one cannot be opened, or a tensor of it not be read.
pub fn diff(a: &Path, b: &Path) -> Result<Diff> {
    let [a, b] = [Located::whole(a, &mut Progress::new(false))?, Located::whole(b, &mut Progress::new(false))?];
    differences::diff(a.path(), b.path())
}

/// Writes the small built-in model to `folder`, for trials and tests, as a Hugging Face checkpoint.
///
/// Fails where something lies there already.
pub fn demo_model(folder: &Path) -> Result<()> {
    demo::export(folder)
}

/// Puts the places of adapters where names of a hub stand for them.
fn bring_adapters(outputs: &mut [Output], progress: &mut Progress) -> Result<()> {
    for adapter in outputs.iter_mut().filter_map(|output| output.recipe.adapter.as_mut()) {
        *adapter = Located::adapter(adapter, progress)?;
    }
    Ok(())
}

/// Fails where a setting that counts says 0.
fn at_least_one(flag: &str, count: Option<u64>) -> Result<()> {
    if count == Some(0) { Err(Error::usage(format!("{flag} must be at least 1"))) } else { Ok(()) }
}

/// Fails where a setting that counts says more than anybody means.
fn at_most(flag: &str, count: Option<u64>, most: u64) -> Result<()> {
    match count.filter(|count| *count > most) {
        Some(count) => Err(Error::usage(format!("{flag} {count}: {most} is the most that is counted with"))),
        None => Ok(()),
    }
}

/// Fails for windows in which nothing is predicted.
fn check_windows(context: usize, windows: Option<usize>) -> Result<()> {
    if context < 2 {
        return Err(Error::usage("--context must be at least 2: the first token of a window is not predicted"));
    }
    at_least_one("--windows", windows.map(|windows| windows as u64))
}
