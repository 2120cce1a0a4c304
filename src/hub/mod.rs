//! Models from and to a hub: what is not on this disk is downloaded into Hugging Face's cache, and outputs are uploaded.
//!
//! ```text
//! settings   what the environment says, in the words of Hugging Face's own programs
//! client     HTTP: the token, redirects, trying again, what an error means
//! listing    what a repository holds, and which of it a model needs
//! fetch      blobs, snapshots and refs of the cache; a download goes on where it stopped
//! sketch     headers alone, for who reads no weights
//! push       files to a repository: preupload, large files, one commit
//! ```
//!
//! No other room opens a connection, and this one only for a model that is named as a hub names it and is not on this disk, or where an
//! output is to be pushed.

mod client;
mod fetch;
mod listing;
mod push;
mod settings;
mod sketch;

use std::path::{Path, PathBuf};

use client::Client;
use fetch::Fetch;
use settings::Settings;
use tempfile::TempDir;

use crate::checkpoint::{Cached, HubName, Sought};
use crate::error::{Error, Result};
use crate::progress::Progress;

pub use push::Push;

/// How much of a model a command reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// All of it.
    Whole,
    /// Everything but the values of weights.
    Headers,
    /// All of an adapter, which is small, and whose values tell whether it does anything.
    Adapter,
}

/// A model that was named as a hub names it.
#[derive(Debug)]
pub struct Found {
    /// The folder or file that is opened.
    pub place: PathBuf,
    /// What to say of it.
    pub note: Option<String>,
    /// What holds it as long as this lives, where it is no more than headers.
    room: Option<TempDir>,
}

impl Found {
    fn at(place: PathBuf) -> Found {
        Found { place, note: None, room: None }
    }

    /// Whether the values of its weights are there.
    pub fn is_whole(&self) -> bool {
        self.room.is_none()
    }
}

/// The model, or the adapter, that a name of a hub means: from the cache, and what is not there is downloaded into it; `None` for a path.
///
/// A name whose first part is a folder here is that of a path, unless the cache has it or `hf://` stands before it.
///
/// Fails where the hub does not have it, or does not give it; where it has to be said which file is meant; for a full disk; and where the
/// network is forbidden.
pub fn find(path: &Path, reads: Reads, progress: &mut Progress) -> Result<Option<Found>> {
    let Some(name) = HubName::of(path)? else { return Ok(None) };
    let settings = Settings::of_environment()?;
    let sought = if reads == Reads::Adapter { Sought::Adapter } else { Sought::Model };
    if let (Sought::Adapter, Some(file)) = (sought, &name.file) {
        return Err(Error::usage(format!("{name}: an adapter has no files to choose among; leave :{file} out")));
    }
    let cached = match name.cached(&settings.cache, sought) {
        Some(Cached { place, lacks: None, .. }) => return Ok(Some(Found::at(place))),
        cached => cached,
    };
    let is_path = !path.starts_with("hf:") && path.parent().is_some_and(Path::exists);
    if is_path {
        return Ok(None);
    }
    if let Some(variable) = settings.offline {
        return match cached {
            // What it lacks is told where it is opened.
            Some(cached) => Ok(Some(Found::at(cached.place))),
            None => Err(forbidden(&name, &settings.cache, variable)),
        };
    }
    let client = Client::new(&settings);
    let doing = match cached.and_then(|cached| cached.lacks) {
        Some(lacks) => format!("{name}: the cache lacks {lacks}, which is to be downloaded"),
        None => format!("{name}: it is not in {} and is to be downloaded", settings.cache.display()),
    };
    let listing = listing::list(&client, &name).map_err(|fault| client.told(fault, &doing, &name.id))?;
    let wanted = match sought {
        Sought::Model => listing::wanted(&name, &listing)?,
        Sought::Adapter => listing::adapter(&name, &listing)?,
    };
    let fetch = Fetch { client: &client, name: &name, listing: &listing, cache: &settings.cache };
    if reads == Reads::Headers
        && let Some(sketch) = sketch::sketch(&fetch, &wanted, progress)?
    {
        return Ok(Some(sketch));
    }
    fetch.whole(&wanted, progress).map(Found::at).map(Some)
}

/// The commit that a name of a hub means: of the cache, where it has the revision, else the hub is asked.
///
/// Fails where neither knows it.
pub fn commit_of(name: &HubName) -> Result<String> {
    let settings = Settings::of_environment()?;
    if let Some(cached) = name.cached(&settings.cache, Sought::Model) {
        return Ok(cached.commit);
    }
    if let Some(commit) = name.commit() {
        return Ok(commit.to_owned());
    }
    if let Some(variable) = settings.offline {
        return Err(forbidden(name, &settings.cache, variable));
    }
    let client = Client::new(&settings);
    let doing = format!("{name}: the hub is asked which commit that is");
    listing::commit(&client, name).map_err(|fault| client.told(fault, &doing, &name.id))
}

/// Why a model that is not here cannot be downloaded.
fn forbidden(name: &HubName, cache: &Path, variable: &str) -> Error {
    let snapshots = cache.join(name.folder()).join("snapshots");
    let entries = std::fs::read_dir(snapshots).into_iter().flatten().flatten();
    let mut there: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    there.sort();
    let what = match &there[..] {
        [] => "it is not in the cache".to_owned(),
        there => format!("the cache holds the model, and not this revision of it, but {}", there.join(", ")),
    };
    Error::failed(format!(
        "{name}: {what} ({}), and {variable} forbids to download it: unset it, or bring the model into that folder",
        cache.display()
    ))
}
