//! An output directory that appears whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use formats::{ShardedWriter, TensorSpec};

use crate::error::{Error, Result};

/// Bytes of one file of weights.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Lays out the weight files of a Hugging Face directory in `folder`.
pub fn weight_writer(folder: &Path, specs: Vec<TensorSpec>) -> Result<ShardedWriter> {
    let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    Ok(ShardedWriter::create(folder, specs, SHARD_BYTES, &metadata)?)
}

/// A directory being written beside its final place; removed unless it is [committed](Staging::commit).
pub struct Staging {
    target: PathBuf,
    folder: PathBuf,
    committed: bool,
}

impl Staging {
    /// Makes the staging directory for `target`.
    ///
    /// Fails when `target` exists and `force` is not given, is the input or holds it or lies inside it, or, with `force`,
    /// is something else than an earlier output.
    pub fn new(target: &Path, input: Option<&Path>, force: bool) -> Result<Staging> {
        let shown = target.display();
        let name = target
            .file_name()
            .ok_or_else(|| Error::usage(format!("{shown}: not a name for an output directory")))?
            .to_string_lossy()
            .into_owned();
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        // Nearest folder that exists, so that a link or `..` hides nothing.
        let mut existing = parent.as_path();
        while !existing.exists() {
            existing = existing.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        }
        let real_parent = existing
            .canonicalize()
            .map_err(Error::io(existing, "resolve"))?
            .join(parent.strip_prefix(existing).unwrap_or(Path::new("")));
        let real = if target.exists() {
            target.canonicalize().map_err(Error::io(target, "resolve"))?
        } else {
            real_parent.join(&name)
        };
        if let Some(input) = input {
            let real_input = input.canonicalize().map_err(Error::io(input, "resolve"))?;
            if real.starts_with(&real_input) || real_input.starts_with(&real) {
                return Err(Error::usage(format!(
                    "{shown}: the output may not be the input {} nor lie inside it or hold it; choose another place",
                    input.display()
                )));
            }
        }
        if target.exists() {
            if !force {
                return Err(Error::usage(format!("{shown}: exists already; --force replaces it")));
            }
            let empty = target.is_dir() && fs::read_dir(target).map_err(Error::io(target, "list"))?.next().is_none();
            if !target.is_dir() || !(empty || target.join("config.json").exists()) {
                return Err(Error::usage(format!(
                    "{shown}: --force replaces a model directory, and this is none (it has no config.json)"
                )));
            }
        }
        fs::create_dir_all(&parent).map_err(Error::io(&parent, "create"))?;
        let folder = parent.join(format!(".{name}.partial-{}", std::process::id()));
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(Error::io(&folder, "clear"))?;
        }
        fs::create_dir(&folder).map_err(Error::io(&folder, "create"))?;
        Ok(Staging { target: target.to_path_buf(), folder, committed: false })
    }

    /// Where to write.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes one file.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, content).map_err(Error::io(&path, "write"))
    }

    /// Moves the directory to its final place, in place of what is there.
    pub fn commit(mut self) -> Result<()> {
        let old = self.folder.with_extension("old");
        let replaces = self.target.exists();
        if replaces {
            fs::rename(&self.target, &old).map_err(Error::io(&self.target, "move aside"))?;
        }
        if let Err(error) = fs::rename(&self.folder, &self.target) {
            if replaces {
                // What was there goes back; nothing is lost.
                let _ = fs::rename(&old, &self.target);
            }
            return Err(Error::io(&self.target, "move into place")(error));
        }
        self.committed = true;
        if replaces {
            fs::remove_dir_all(&old).map_err(Error::io(&old, "remove"))?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_appears_until_it_is_committed_and_nothing_else_is_replaced() {
        let room = tempfile::tempdir().unwrap();
        let at = |name: &str| room.path().join(name);
        fs::create_dir(at("in")).unwrap();
        let message = |target: &Path, force| Staging::new(target, Some(&at("in")), force).err().unwrap().to_string();
        assert!(message(&at("in"), true).contains("may not be the input"));
        assert!(message(&at("in/out"), true).contains("may not be the input"));
        assert!(message(room.path(), true).contains("may not be the input"));
        assert!(message(&at("in/../in/deep/out"), true).contains("may not be the input"));

        let staging = Staging::new(&at("a/out"), Some(&at("in")), false).unwrap();
        staging.write("config.json", b"1").unwrap();
        drop(staging);
        assert_eq!(fs::read_dir(at("a")).unwrap().count(), 0);

        let write = |content: &[u8], force| -> Result<()> {
            let staging = Staging::new(&at("a/out"), Some(&at("in")), force)?;
            staging.write("config.json", content)?;
            staging.commit()
        };
        write(b"1", false).unwrap();
        assert!(write(b"2", false).unwrap_err().to_string().contains("--force"));
        assert_eq!(fs::read(at("a/out/config.json")).unwrap(), b"1");
        write(b"2", true).unwrap();
        assert_eq!(fs::read(at("a/out/config.json")).unwrap(), b"2");
        assert_eq!(fs::read_dir(at("a")).unwrap().count(), 1);

        fs::create_dir(at("home")).unwrap();
        fs::write(at("home/letter"), b"dear").unwrap();
        assert!(message(&at("home"), true).contains("this is none"));
    }
}
