//! `quantc.lock`: of each target what it was made of and by, and what was written, with hashes.
//!
//! Whether a file is still the one that was seen is told by its size, its time and its number (inode), and where one of these differs by its
//! hash. So a project of many gigabytes is known to be up to date by looking at its folders.

use std::io::Write;
use std::path::{Path, PathBuf};

use formats::container::file;
use serde::{Deserialize, Serialize};

use crate::checkpoint::is_commit;
use crate::error::{Error, Result};
use crate::output::Look;
use crate::output::hashing::hash_file;
use crate::report::{FileReport, Made};

/// The version of the file's form.
const VERSION: u32 = 1;

/// Bytes of a lock at the most: a hundred files of each of thousands of targets.
const LARGEST: u64 = 1 << 28;

/// What a project's targets were made of and by; of one that was never built there are none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// The version of the file's form.
    pub version: u32,
    /// Each target, in the project's order.
    #[serde(default, rename = "target")]
    pub targets: Vec<Locked>,
}

/// A target that was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Locked {
    /// Where it is, seen from the lock's folder.
    pub path: String,
    /// Name and version of the program that made it.
    pub tool: String,
    /// All that it was made by, as JSON with its keys in order.
    pub recipe: String,
    /// The kind of device that it was made on, `cpu` or `cuda`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The type in which it was calibrated, as `--math` says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub math: Option<String>,
    /// Perplexity ratio, mean KL divergence and top-1 agreement, where they were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<[f64; 3]>,
    /// The figures of a model that is measured by what it makes of texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<Made>,
    /// Every file that was read, weights, tokenizer and texts alike.
    #[serde(rename = "input")]
    pub inputs: Vec<Stamp>,
    /// Every file at the target's place, report included.
    #[serde(rename = "output")]
    pub outputs: Vec<Stamp>,
}

/// A file as it was. One of a model on a hub is called `org/name@COMMIT/PATH`, wherever the cache lies, and has neither time nor number: the
/// commit and its hash say which it is on every machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    /// Where it is, seen from the lock's folder, or what it is called on a hub.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// When it was written, in nanoseconds since 1970; 0 for one of a hub.
    pub modified: String,
    /// Its number on its disk; 0 where the system has none.
    pub inode: u64,
    /// SHA-256 of its content, lower-case hex.
    pub sha256: String,
}

/// Whether a lock calls a file as one of a model on a hub.
fn is_of_hub(path: &str) -> bool {
    path.split_once('@').and_then(|(_, rest)| rest.split_once('/')).is_some_and(|(commit, _)| is_commit(commit))
}

/// How a file compares with what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It is the same, and looks the same.
    Same,
    /// It has the same bytes, and was touched: as it looks now.
    Touched(Stamp),
    /// It is another, or gone.
    Changed,
}

impl Stamp {
    /// A file as it is now; `path` is how it is called in the lock. `known` has hashes that need not be made again, by file name.
    pub fn of(file: &Path, path: String, known: &[FileReport]) -> Result<Stamp> {
        let gone = || Error::failed(format!("{}: is not there any more", file.display()));
        let Look { bytes, modified, inode } = Look::of(file).ok_or_else(gone)?;
        let (modified, inode) = if is_of_hub(&path) { ("0".to_owned(), 0) } else { (modified, inode) };
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let known = known.iter().find(|known| known.name == name && known.bytes == bytes);
        let sha256 = match known {
            Some(known) => known.sha256.clone(),
            None => hash_file(file)?.sha256,
        };
        Ok(Stamp { path, bytes, modified, inode, sha256 })
    }

    /// Whether a file is still this one. With `hashes` it is hashed whatever it looks like.
    pub fn compare(&self, file: &Path, hashes: bool) -> Result<Seen> {
        let Some(Look { bytes, modified, inode }) = Look::of(file) else { return Ok(Seen::Changed) };
        if is_of_hub(&self.path) {
            // The cache calls a large file by its hash.
            let called = std::fs::read_link(file).ok().is_some_and(|blob| blob.ends_with(&self.sha256));
            let same = bytes == self.bytes && (called && !hashes || hash_file(file)?.sha256 == self.sha256);
            return Ok(if same { Seen::Same } else { Seen::Changed });
        }
        let alike = bytes == self.bytes && modified == self.modified && inode == self.inode;
        if alike && !hashes {
            return Ok(Seen::Same);
        }
        if bytes != self.bytes || hash_file(file)?.sha256 != self.sha256 {
            return Ok(Seen::Changed);
        }
        Ok(if alike { Seen::Same } else { Seen::Touched(Stamp { modified, inode, ..self.clone() }) })
    }
}

impl Lock {
    /// Reads a lock; an empty one where there is none.
    ///
    /// Fails where it is no lock, or one of a later version.
    pub fn read(path: &Path) -> Result<Lock> {
        let advice = "remove it, and the next build makes everything again";
        let text = match file::read_text(path, LARGEST) {
            Ok(text) => text,
            Err(error) if !path.exists() && !path.is_symlink() => {
                drop(error);
                return Ok(Lock { version: VERSION, targets: Vec::new() });
            }
            Err(error) => return Err(Error::failed(format!("{}; {advice}", Error::io(path, "read")(error)))),
        };
        let lock: Lock = toml::from_str(&text)
            .map_err(|error| Error::failed(format!("{}: {}; {advice}", path.display(), error.message())))?;
        if lock.version != VERSION {
            return Err(Error::failed(format!(
                "{}: is of version {}, and this program reads version {VERSION}; take the quantc that wrote it, or {advice}",
                path.display(),
                lock.version
            )));
        }
        Ok(lock)
    }

    /// Writes it in one step, so that there is one at every moment.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = format!(
            "# Written by quantc build: what was made, and of what. Keep it beside the project, and do not edit it.\n{}",
            toml::to_string(self).expect("plain data")
        );
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(text.as_bytes())?;
            file.as_file().sync_all()?;
            #[cfg(unix)]
            std::fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
            file.persist(path)?;
            Ok(())
        };
        write().map_err(Error::io(path, "write"))
    }

    /// Fails where it could not be written, which is better found before the work.
    pub fn check_place(path: &Path) -> Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let there = || path.exists().then(|| std::fs::File::options().append(true).open(path)).transpose();
        let probe = tempfile::NamedTempFile::new_in(folder).and_then(|_| there());
        probe.map(drop).map_err(Error::io(path, "write"))
    }

    /// What is known of the target at a place.
    pub fn target(&self, path: &str) -> Option<&Locked> {
        self.targets.iter().find(|target| target.path == path)
    }
}

/// The files in a folder and in folders of it, hidden ones apart, in order; a file stands for itself.
pub fn files_in(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut found = Vec::new();
    let entries = std::fs::read_dir(path).map_err(Error::io(path, "list"))?;
    for entry in entries {
        let entry = entry.map_err(Error::io(path, "list"))?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let inner = entry.path();
        // Links lead to files of a hub cache; to a folder they might lead in circles.
        match inner.is_dir() {
            true if !inner.is_symlink() => found.extend(files_in(&inner)?),
            true => {}
            false if inner.exists() => found.push(inner),
            false => {}
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_looks_and_then_by_their_bytes() {
        let room = tempfile::tempdir().unwrap();
        let file = room.path().join("x");
        std::fs::write(&file, "one").unwrap();
        let stamp = Stamp::of(&file, "x".to_owned(), &[]).unwrap();
        assert_eq!(stamp.compare(&file, true).unwrap(), Seen::Same);
        // Written anew with the same bytes, and then with others of the same length.
        std::fs::write(room.path().join("y"), "one").unwrap();
        std::fs::rename(room.path().join("y"), &file).unwrap();
        let Seen::Touched(touched) = stamp.compare(&file, false).unwrap() else { panic!("another file") };
        assert_eq!((touched.compare(&file, false).unwrap(), &touched.sha256), (Seen::Same, &stamp.sha256));
        std::fs::write(&file, "two").unwrap();
        assert_eq!(touched.compare(&file, false).unwrap(), Seen::Changed);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(touched.compare(&file, false).unwrap(), Seen::Changed);
    }

    #[test]
    fn locks_are_read_as_they_were_written_and_nothing_else_is() {
        let room = tempfile::tempdir().unwrap();
        let path = room.path().join("quantc.lock");
        assert_eq!(Lock::read(&path).unwrap().targets.len(), 0);
        let stamp = Stamp { path: "m/x".into(), bytes: 3, modified: "7".into(), inode: 1, sha256: "ab".into() };
        let locked = Locked {
            path: "out".into(),
            tool: "quantc 0".into(),
            recipe: "{\"a\":\"\\\"\"}".into(),
            device: Some("cpu".into()),
            math: None,
            quality: Some([1.0, 0.25, 0.5]),
            made: None,
            inputs: vec![stamp.clone()],
            outputs: vec![stamp],
        };
        let lock = Lock { version: VERSION, targets: vec![locked] };
        lock.write(&path).unwrap();
        assert_eq!(Lock::read(&path).unwrap(), lock);
        for (text, told) in [("version = 9", "version 9"), ("{", "next build makes everything again")] {
            std::fs::write(&path, text).unwrap();
            let error = Lock::read(&path).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn hidden_files_and_folders_of_links_are_none_of_a_models() {
        let room = tempfile::tempdir().unwrap();
        for name in ["b", "a", ".hidden", "inner/c", ".git/x"] {
            let path = room.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let found = files_in(room.path()).unwrap();
        let names: Vec<_> =
            found.iter().map(|path| path.strip_prefix(room.path()).unwrap().display().to_string()).collect();
        assert_eq!(names, ["a", "b", "inner/c"]);
    }
}
