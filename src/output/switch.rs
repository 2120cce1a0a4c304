//! Moving finished files into place so that nobody ever sees half of an output.
//!
//! ```text
//! a folder     without --force: rename, which refuses to replace     with --force: exchange, then remove what was there
//! some files   journal;  old files aside, the one that opens the set first;  new files in, that one last
//! ```
//!
//! A folder takes one atomic step (`renameat2`). A set of files cannot: so what is to be done is written down first. Whoever finds
//! the journal of a run that is gone does the rest, see [`finish`].

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The journal's name in the staging folder.
const JOURNAL: &str = ".switch.json";

/// Where files that were replaced wait in the staging folder until the switch is complete.
const ASIDE: &str = ".replaced";

/// Moves `from` to `to`; fails with `AlreadyExists` when something is there.
pub fn rename_new(from: &Path, to: &Path) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // File systems without the flag.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {}
            done => return Ok(done?),
        }
    }
    if from.is_dir() {
        // Renaming a folder never replaces a file, nor a folder with something in it.
        return fs::rename(from, to);
    }
    // A second name is refused where the name is taken.
    fs::hard_link(from, to)?;
    fs::remove_file(from)
}

/// Puts the folder `new` in the place of the folder `old`, which is called `new` or `aside` afterwards; returns its path.
///
/// `aside` is used on file systems that cannot exchange two names; a run that ends between its two steps leaves `aside` alone there.
pub fn exchange(new: &Path, old: &Path, aside: &Path) -> std::io::Result<PathBuf> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {}
            done => return done.map(|()| new.to_path_buf()).map_err(Into::into),
        }
    }
    fs::rename(old, aside)?;
    if let Err(error) = fs::rename(new, old) {
        // What was there goes back; nothing is lost.
        let _ = fs::rename(aside, old);
        return Err(error);
    }
    Ok(aside.to_path_buf())
}

/// A set of files on their way from a staging folder into the folder that they belong to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Switch {
    /// The folder that they go to.
    into: PathBuf,
    /// Names there that have to go, the one that opens the old set first.
    aside: Vec<String>,
    /// Names that come, the one that opens the new set last.
    moves: Vec<String>,
}

impl Switch {
    /// Plans to move `moves` to `into`, in this order, once `aside` is out of the way.
    pub fn new(into: &Path, aside: Vec<String>, moves: Vec<String>) -> Switch {
        Switch { into: into.to_path_buf(), aside, moves }
    }

    /// Performs it from `staging`. Where `replaces` is false, a name that is taken fails with `AlreadyExists`.
    ///
    /// After a failure everything is where it was before. Where that cannot be either, the journal stays, see [`is_under_way`], and
    /// nothing in `staging` may be removed.
    pub fn perform(&self, staging: &Path, replaces: bool) -> std::io::Result<()> {
        let journal = staging.join(JOURNAL);
        if self.aside.len() + self.moves.len() > 1 {
            let resolved = Switch { into: self.into.canonicalize()?, ..self.clone() };
            let written = || -> std::io::Result<()> {
                fs::write(&journal, serde_json::to_vec(&resolved).expect("plain data"))?;
                File::open(&journal)?.sync_all()?;
                sync_folder(staging)
            };
            // Half a journal is of a switch that has not begun.
            written().inspect_err(|_| drop(fs::remove_file(&journal)))?;
        }
        self.steps(staging, replaces).inspect_err(|_| {
            if self.take_back(staging) {
                let _ = fs::remove_file(&journal);
            }
        })?;
        // It is done, and where a disk does not say that it is written down nothing is gained by calling it failed.
        let _ = sync_folder(&self.into);
        let _ = forget(staging);
        Ok(())
    }

    /// Every step that has not been done yet.
    fn steps(&self, staging: &Path, replaces: bool) -> std::io::Result<()> {
        let old = staging.join(ASIDE);
        if !self.aside.is_empty() && !old.exists() {
            fs::create_dir(&old)?;
        }
        for name in &self.aside {
            let (from, to) = (self.into.join(name), old.join(name));
            if from.exists() && !to.exists() {
                fs::rename(from, to)?;
            }
        }
        for name in &self.moves {
            let (from, to) = (staging.join(name), self.into.join(name));
            if from.exists() {
                if replaces { fs::rename(from, to)? } else { rename_new(&from, &to)? }
            }
        }
        Ok(())
    }

    /// Undoes the steps that were done; false where one cannot be undone.
    fn take_back(&self, staging: &Path) -> bool {
        let mut undone = true;
        for name in self.moves.iter().rev() {
            let (from, to) = (staging.join(name), self.into.join(name));
            if !from.exists() && to.exists() {
                undone &= fs::rename(to, from).is_ok();
            }
        }
        for name in self.aside.iter().rev() {
            let from = staging.join(ASIDE).join(name);
            if from.exists() {
                undone &= fs::rename(from, self.into.join(name)).is_ok();
            }
        }
        undone
    }
}

/// Whether a switch from `staging` was begun and neither completed nor taken back.
pub fn is_under_way(staging: &Path) -> bool {
    staging.join(JOURNAL).exists()
}

/// Completes the switch that a run which is gone had begun in `staging`; false when it had begun none.
pub fn finish(staging: &Path) -> std::io::Result<bool> {
    let journal = match fs::read(staging.join(JOURNAL)) {
        Ok(journal) => journal,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    // A journal that was not written to its end is of a switch that had not begun.
    let Ok(switch) = serde_json::from_slice::<Switch>(&journal) else { return Ok(false) };
    switch.steps(staging, true)?;
    sync_folder(&switch.into)?;
    forget(staging)?;
    Ok(true)
}

/// Removes the journal of a switch that is complete, before anything else in `staging` goes: whoever finds the one without the other
/// would take new files for old ones.
fn forget(staging: &Path) -> std::io::Result<()> {
    match fs::remove_file(staging.join(JOURNAL)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_folder(staging),
    }
}

/// Waits until every file below `folder`, and every name in it, is on the disk.
pub fn sync_tree(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_folder(folder)
}

/// Waits until the names in a folder are on the disk.
pub fn sync_folder(folder: &Path) -> std::io::Result<()> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // Some systems open no folders, and some file systems sync none.
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::InvalidInput) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names in a folder with their contents, hidden ones too.
    fn listed(folder: &Path) -> Vec<(String, String)> {
        let mut files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.path().is_file())
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap()))
            .collect();
        files.sort();
        files
    }

    fn pairs(files: &[(&str, &str)]) -> Vec<(String, String)> {
        files.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect()
    }

    const PARTS: [&str; 3] = ["m-1", "m-2", "m-3"];

    /// A staging folder with new parts, beside old ones, and the switch from these to those.
    fn set() -> (tempfile::TempDir, PathBuf, Switch) {
        let room = tempfile::tempdir().unwrap();
        let staging = room.path().join(".staging");
        fs::create_dir(&staging).unwrap();
        for name in PARTS {
            fs::write(staging.join(name), "new").unwrap();
            fs::write(room.path().join(name), "old").unwrap();
        }
        let moves = ["m-2", "m-3", "m-1"].map(str::to_owned).to_vec();
        let switch = Switch::new(room.path(), PARTS.map(str::to_owned).to_vec(), moves);
        (room, staging, switch)
    }

    #[test]
    fn a_set_of_files_is_switched_as_one() {
        let (room, staging, switch) = set();
        switch.perform(&staging, true).unwrap();
        assert_eq!(listed(room.path()), pairs(&PARTS.map(|name| (name, "new"))));
        assert!(!is_under_way(&staging), "what is removed next is not looked for");
    }

    #[test]
    fn a_step_that_fails_takes_the_others_back() {
        let (room, staging, switch) = set();
        // The last step finds a folder where its file has to go.
        let blocked = Switch { aside: vec!["m-2".into(), "m-3".into()], ..switch };
        fs::remove_file(room.path().join("m-1")).unwrap();
        fs::create_dir(room.path().join("m-1")).unwrap();
        blocked.perform(&staging, true).unwrap_err();
        assert_eq!(listed(room.path()), pairs(&[("m-2", "old"), ("m-3", "old")]));
        assert_eq!(listed(&staging), pairs(&PARTS.map(|name| (name, "new"))));
    }

    #[test]
    fn a_journal_that_cannot_be_written_is_of_no_switch() {
        let (room, staging, switch) = set();
        // A folder with its name cannot be written to; what is under way is told by a file.
        fs::create_dir(staging.join(JOURNAL)).unwrap();
        switch.perform(&staging, true).unwrap_err();
        assert_eq!(listed(room.path()), pairs(&PARTS.map(|name| (name, "old"))));
        fs::remove_dir(staging.join(JOURNAL)).unwrap();
        switch.perform(&staging, true).unwrap();
        assert!(!is_under_way(&staging));
    }

    #[test]
    fn a_name_that_is_taken_is_left_and_the_others_are_taken_back() {
        let (room, staging, switch) = set();
        fs::remove_file(room.path().join("m-2")).unwrap();
        let error = Switch { aside: Vec::new(), ..switch }.perform(&staging, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(listed(room.path()), pairs(&[("m-1", "old"), ("m-3", "old")]));
        assert_eq!(listed(&staging).len(), 3);
    }

    /// Ends a switch after each number of its steps, as a kill would, and lets another run finish it.
    #[test]
    fn a_switch_that_was_cut_short_is_finished() {
        for done in 0..=6 {
            let (room, staging, switch) = set();
            let resolved = Switch { into: switch.into.canonicalize().unwrap(), ..switch };
            fs::write(staging.join(JOURNAL), serde_json::to_vec(&resolved).unwrap()).unwrap();
            fs::create_dir(staging.join(ASIDE)).unwrap();
            let aside = resolved.aside.iter().map(|name| (room.path().join(name), staging.join(ASIDE).join(name)));
            let moves = resolved.moves.iter().map(|name| (staging.join(name), room.path().join(name)));
            aside.chain(moves).take(done).for_each(|(from, to)| fs::rename(from, to).unwrap());
            assert!(finish(&staging).unwrap());
            assert_eq!(listed(room.path()), pairs(&PARTS.map(|name| (name, "new"))), "after {done} steps");
            // What was replaced goes next, and a run that ends there leaves new files that nobody takes for old ones.
            fs::remove_file(staging.join(ASIDE).join("m-1")).unwrap();
            assert!(!finish(&staging).unwrap(), "it is complete");
            assert_eq!(listed(room.path()), pairs(&PARTS.map(|name| (name, "new"))));
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(!finish(empty.path()).unwrap());
        fs::write(empty.path().join(JOURNAL), b"{\"into\": ").unwrap();
        assert!(!finish(empty.path()).unwrap());
    }

    #[test]
    fn folders_are_exchanged_or_refused() {
        let room = tempfile::tempdir().unwrap();
        let at = |name: &str| room.path().join(name);
        for (name, content) in [("new", "new"), ("old", "old")] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("f"), content).unwrap();
        }
        assert_eq!(rename_new(&at("new"), &at("old")).unwrap_err().kind(), ErrorKind::AlreadyExists);
        let replaced = exchange(&at("new"), &at("old"), &at("aside")).unwrap();
        assert_eq!(fs::read_to_string(at("old/f")).unwrap(), "new");
        assert_eq!(fs::read_to_string(replaced.join("f")).unwrap(), "old");
        rename_new(&at("old"), &at("fresh")).unwrap();
        assert!(at("fresh").is_dir() && !at("old").exists());
    }
}
