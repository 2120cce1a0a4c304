//! What interrupted runs have left at the place of an output: gone on with, removed, or listed.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::journal::{self, Key};
use super::place::{MARK, Place};
use super::staging::{RANDOM, aside_of, hidden_prefix, remove_tree, stays};
use super::switch::{finish, is_under_way};
use crate::error::{Error, Result};

/// Where a staging folder says whose it is.
pub(super) const HOLDER: &str = ".quantc-holder";

/// What to do about what runs before have left at the place of an output.
#[derive(Clone, Copy, Debug)]
pub struct Before<'k> {
    /// Who this run is; what a run with the same key has finished is gone on with.
    pub key: &'k Key,
    /// It is removed instead.
    pub afresh: bool,
    /// Whether to wait for another run that is at work there, instead of being refused.
    pub waits: bool,
}

/// Blocks that a run has finished which is at work no more.
#[derive(Debug)]
pub struct Unfinished {
    /// Where it lies, hidden beside the output's place.
    pub folder: PathBuf,
    /// How many there are; 0 where a run ended before the first.
    pub blocks: usize,
    /// Bytes on the disk.
    pub bytes: u64,
}

/// What is gone on with.
pub(super) struct Left {
    /// Where the earlier run has staged it.
    pub folder: PathBuf,
    /// Held for whoever goes on.
    pub lock: File,
    /// Its finished blocks, in order.
    pub finished: Vec<journal::Finished>,
}

/// A staging folder of an output, and its lock where no run holds it.
fn staged(place: &Place) -> Vec<(PathBuf, Option<File>)> {
    let (path, prefix) = (place.path(), hidden_prefix(&place.name));
    let mut all = Vec::new();
    for home in [&place.parent, &path] {
        let Ok(listed) = fs::read_dir(home) else { continue };
        let mut left: Vec<PathBuf> = listed
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.strip_prefix(&*prefix).is_some_and(are_ours) && path.is_dir()
            })
            .collect();
        left.sort();
        all.extend(left.into_iter().map(|folder| (hold(&folder), folder)).map(|(held, folder)| (folder, held)));
    }
    all
}

/// The lock of a staging folder, unless a run holds it.
fn hold(folder: &Path) -> Option<File> {
    let file = File::open(folder).ok()?;
    match file.try_lock() {
        Ok(()) => Some(file),
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => None,
    }
}

/// A staging folder that another run is writing, opened. One that cannot be opened, or on a file system without locks, is none.
fn busy(place: &Place) -> Option<(PathBuf, File)> {
    let of = |(folder, _)| {
        let file = File::open(&folder).ok()?;
        matches!(file.try_lock(), Err(TryLockError::WouldBlock)).then_some((folder, file))
    };
    staged(place).into_iter().filter(|(_, held)| held.is_none()).find_map(of)
}

/// Puts in order what is at the place of an output before a run begins: as [`sweep`], but for what the run can go on with.
pub(super) fn look(place: &Place, shown: &Path, before: Option<Before<'_>>) -> Result<(Vec<String>, Option<Left>)> {
    let Some(Before { key, afresh, waits }) = before else {
        return Ok((put_in_order(place, &mut |_| false)?, None));
    };
    while let Some((folder, file)) = busy(place) {
        if !waits {
            let who = fs::read_to_string(folder.join(HOLDER)).unwrap_or_default();
            let who = if who.is_empty() { String::new() } else { format!(" (process {})", who.trim()) };
            return Err(Error::usage(format!(
                "{}: another run{who} is writing there; give another place, or --wait for its end",
                shown.display()
            )));
        }
        file.lock().map_err(Error::io(&folder, "wait for"))?;
    }
    let (mut left, mut others) = (None, Vec::new());
    let mut notes = put_in_order(place, &mut |folder| {
        let Some((then, finished)) = journal::read(folder).filter(|(_, finished)| !finished.is_empty()) else {
            return false;
        };
        let differences = journal::differences(&then, key);
        if !differences.is_empty() || afresh || left.is_some() {
            let why = match differences.is_empty() {
                true => "--no-resume says so".to_owned(),
                false => differences.join(", "),
            };
            others.push(format!(
                "{}: {} finished blocks of an interrupted run were removed and not gone on with, since {why}",
                shown.display(),
                finished.len()
            ));
            return false;
        }
        left = Some((folder.to_path_buf(), finished));
        true
    })?;
    notes.extend(others);
    let left = left.and_then(|(folder, finished)| Some(Left { lock: hold(&folder)?, folder, finished }));
    Ok((notes, left))
}

/// Removes what runs that are gone have left of an output and nobody can go on with, or completes the switch that one of them had
/// begun; returns what was done, each in one sentence. Staging folders of runs that are at work are not touched.
pub fn sweep(place: &Place) -> Result<Vec<String>> {
    put_in_order(place, &mut |folder| journal::read(folder).is_some_and(|(_, finished)| !finished.is_empty()))
}

fn put_in_order(place: &Place, stays_as_it_is: &mut dyn FnMut(&Path) -> bool) -> Result<Vec<String>> {
    let (path, mut notes, mut busy) = (place.path(), Vec::new(), false);
    for (folder, held) in staged(place) {
        let Some(_held) = held else {
            busy = true;
            continue;
        };
        let finished = finish(&folder).map_err(Error::io(&path, "finish replacing"))?;
        if !finished && stays_as_it_is(&folder) {
            continue;
        }
        let removed = remove_tree(&folder);
        if finished {
            notes.push(format!("{}: finished putting into place what an interrupted run had written", path.display()));
        }
        match removed {
            Ok(()) if finished => {}
            Ok(()) => notes.push(format!("{}: removed what an interrupted run had left", folder.display())),
            Err(error) => notes.push(format!("{}: {}", folder.display(), stays(&error))),
        }
    }
    let aside = aside_of(place);
    if aside.exists() && !busy {
        if path.exists() {
            fs::remove_dir_all(&aside).map_err(Error::io(&aside, "remove"))?;
            notes.push(format!("{}: removed what an interrupted run had replaced", aside.display()));
        } else {
            fs::rename(&aside, &path).map_err(Error::io(&path, "move back"))?;
            notes.push(format!("{}: an interrupted run had moved it aside, and it is back", path.display()));
        }
    }
    Ok(notes)
}

/// What interrupted runs have finished of an output.
pub fn unfinished(place: &Place) -> Vec<Unfinished> {
    let of = |(folder, held): (PathBuf, Option<File>)| held.and_then(|_| of_folder(folder));
    staged(place).into_iter().filter_map(of).filter(|left| left.blocks > 0).collect()
}

fn of_folder(folder: PathBuf) -> Option<Unfinished> {
    let blocks = journal::read(&folder).map_or(0, |(_, finished)| finished.len());
    let bytes = bytes_in(&folder).ok()?;
    Some(Unfinished { folder, blocks, bytes })
}

/// Bytes that the files in a folder take on the disk; those that are laid out and not yet written take none.
fn bytes_in(folder: &Path) -> std::io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += match metadata.is_dir() {
            true => bytes_in(&entry.path())?,
            #[cfg(unix)]
            false => std::os::unix::fs::MetadataExt::blocks(&metadata) * 512,
            #[cfg(not(unix))]
            false => metadata.len(),
        };
    }
    Ok(sum)
}

/// Removes what interrupted runs have left of an output.
pub fn discard(place: &Place) -> Result<Vec<Unfinished>> {
    let mut gone = Vec::new();
    for (folder, held) in staged(place) {
        if held.is_some() && !is_under_way(&folder) {
            gone.extend(remove(folder)?);
        }
    }
    Ok(gone)
}

/// Finds what interrupted runs have left in a folder, whatever their outputs were called, and removes it unless it is only to be listed.
pub fn clean(folder: &Path, only_list: bool) -> Result<Vec<Unfinished>> {
    let listed = fs::read_dir(folder).map_err(Error::io(folder, "list"))?;
    let mut all: Vec<PathBuf> =
        listed.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_staging(path)).collect();
    all.sort();
    let mut found = Vec::new();
    for folder in all {
        let Some(_held) = hold(&folder).filter(|_| !is_under_way(&folder)) else { continue };
        found.extend(if only_list { of_folder(folder) } else { remove(folder)? });
    }
    Ok(found)
}

fn remove(folder: PathBuf) -> Result<Option<Unfinished>> {
    let left = of_folder(folder.clone());
    remove_tree(&folder).map_err(Error::io(&folder, "remove"))?;
    Ok(left)
}

/// Whether the end of a name is one that staging folders have, so that a folder which somebody called `.out.partial-old` is his.
fn are_ours(letters: &str) -> bool {
    letters.len() == RANDOM && letters.bytes().all(|letter| letter.is_ascii_alphanumeric())
}

/// Whether a folder is called as a staging folder, by [`hidden_prefix`] and some letters, and holds what such a folder does.
fn is_staging(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let letters = name.strip_prefix('.').and_then(|name| name.rsplit_once(MARK)).map(|(_, letters)| letters);
    let is_called = letters.is_some_and(are_ours);
    let is_folder = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    is_called && is_folder && {
        let names = fs::read_dir(path).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.file_name()));
        let names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        let ours = [journal::NAME, HOLDER, "config.json"];
        let is_ours =
            |name: &String| ours.contains(&&name[..]) || name.ends_with(".safetensors") || name.ends_with(".gguf");
        names.is_empty() || names.iter().any(is_ours)
    }
}
