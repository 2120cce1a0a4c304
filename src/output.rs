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
        check_place(target, input)?;
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
        Ok(Staging { target: target.to_path_buf(), folder: make_hidden(target)?, committed: false })
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

/// The name of an output, and the folder that will hold it.
fn place(target: &Path) -> Result<(String, PathBuf)> {
    let name =
        target.file_name().ok_or_else(|| Error::usage(format!("{}: not a name for an output", target.display())))?;
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    Ok((name.to_string_lossy().into_owned(), parent))
}

/// Fails when `target` is the input, or one lies inside the other.
pub fn check_place(target: &Path, input: Option<&Path>) -> Result<()> {
    let (name, parent) = place(target)?;
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
                "{}: the output may not be the input {} nor lie inside it or hold it; choose another place",
                target.display(),
                input.display()
            )));
        }
    }
    Ok(())
}

/// What the folder is called in which an output of this name is written.
pub fn hidden_name(name: &str) -> String {
    format!(".{name}.partial-{}", std::process::id())
}

/// Makes an empty hidden directory beside `target`.
fn make_hidden(target: &Path) -> Result<PathBuf> {
    let (name, parent) = place(target)?;
    fs::create_dir_all(&parent).map_err(Error::io(&parent, "create"))?;
    let folder = parent.join(hidden_name(&name));
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(Error::io(&folder, "clear"))?;
    }
    fs::create_dir(&folder).map_err(Error::io(&folder, "create"))?;
    Ok(folder)
}

/// One file, or the parts of a split one, being written in a hidden directory beside its final place.
pub struct FileStaging {
    target: PathBuf,
    name: String,
    folder: PathBuf,
    replaced: Vec<PathBuf>,
}

impl FileStaging {
    /// Makes the staging directory for the GGUF file `target`.
    ///
    /// Fails when it (or a part of it) exists and `force` is not given, is the input, or, with `force`, is no GGUF file.
    pub fn new(target: &Path, input: Option<&Path>, force: bool) -> Result<FileStaging> {
        let (name, parent) = place(target)?;
        check_place(target, input)?;
        if target.is_dir() {
            return Err(Error::usage(format!(
                "{}: is a directory, and a GGUF file is to be written",
                target.display()
            )));
        }
        let mut replaced = Vec::new();
        let stem = name.strip_suffix(".gguf").unwrap_or(&name);
        if parent.is_dir() {
            for entry in fs::read_dir(&parent).map_err(Error::io(&parent, "list"))? {
                let path = entry.map_err(Error::io(&parent, "list"))?.path();
                let other = path.file_name().unwrap_or_default().to_string_lossy();
                if other == name || is_part(&other, stem) {
                    replaced.push(path);
                }
            }
        }
        replaced.sort();
        if let Some(first) = replaced.first() {
            if !force {
                return Err(Error::usage(format!("{}: exists already; --force replaces it", first.display())));
            }
            for path in &replaced {
                check_replaced(path)?;
                if let Some(input) = input
                    && path.canonicalize().ok() == input.canonicalize().ok()
                {
                    return Err(Error::usage(format!(
                        "{}: the output may not be the input; choose another place",
                        path.display()
                    )));
                }
            }
        }
        let folder = make_hidden(target)?;
        Ok(FileStaging { target: target.to_path_buf(), name, folder, replaced })
    }

    /// Checks another GGUF file that the same run is to write, in a folder that exists.
    ///
    /// Fails, always as a request that cannot be met, when it is the input, the output or a part of it, when it exists and
    /// `force` is not given or it is no GGUF file, and when its folder takes no new file.
    pub fn check_another(&self, target: &Path, input: Option<&Path>, force: bool) -> Result<()> {
        let (shown, (name, parent)) = (target.display(), place(target)?);
        if !parent.is_dir() {
            return Err(Error::usage(format!("{shown}: there is no folder {}; make it first", parent.display())));
        }
        check_place(target, input)?;
        let stem = self.name.strip_suffix(".gguf").unwrap_or(&self.name);
        let beside = self.folder.parent().and_then(|folder| folder.canonicalize().ok()) == parent.canonicalize().ok();
        if beside && (name == self.name || is_part(&name, stem)) {
            return Err(Error::usage(format!(
                "{shown}: is what the quantized model will be called; choose another name"
            )));
        }
        if target.is_dir() {
            return Err(Error::usage(format!("{shown}: is a directory, and a GGUF file is to be written")));
        }
        if target.exists() {
            if !force {
                return Err(Error::usage(format!("{shown}: exists already; --force replaces it")));
            }
            check_replaced(target)?;
        }
        // Permissions do not tell of everything that may forbid it.
        let trial = parent.join(hidden_name(&name));
        fs::write(&trial, b"")
            .and_then(|()| fs::remove_file(&trial))
            .map_err(|error| Error::usage(format!("{shown}: its folder takes no file ({error}); choose another place")))
    }

    /// Where to write.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Writes one file beside it.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, content).map_err(Error::io(&path, "write"))
    }

    /// Moves every file to its final place, in place of what is there.
    pub fn commit(self) -> Result<()> {
        let (_, parent) = place(&self.target)?;
        let mut moved = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(Error::io(&self.folder, "list"))? {
            let from = entry.map_err(Error::io(&self.folder, "list"))?.path();
            let to = parent.join(from.file_name().unwrap_or_default());
            fs::rename(&from, &to).map_err(Error::io(&to, "move into place"))?;
            moved.push(to);
        }
        // Parts of an earlier output that this one does not have.
        for old in self.replaced.iter().filter(|old| !moved.contains(old)) {
            fs::remove_file(old).map_err(Error::io(old, "remove"))?;
        }
        Ok(())
    }
}

impl Drop for FileStaging {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Fails when the file that `--force` would replace is no GGUF file.
fn check_replaced(path: &Path) -> Result<()> {
    let mut magic = [0; 4];
    let read = fs::File::open(path).and_then(|mut file| std::io::Read::read(&mut file, &mut magic));
    match read.map_err(Error::io(path, "read"))? > 0 && magic != *b"GGUF" {
        true => Err(Error::usage(format!("{}: --force replaces a GGUF file, and this is none", path.display()))),
        false => Ok(()),
    }
}

/// Whether `name` is `stem-00001-of-00003.gguf` for some numbers.
fn is_part(name: &str, stem: &str) -> bool {
    let numbers = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix('-')?.strip_suffix(".gguf"));
    numbers.and_then(|n| n.split_once("-of-")).is_some_and(|(number, count)| {
        [number, count].iter().all(|n| n.len() == 5 && n.bytes().all(|b| b.is_ascii_digit()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_replaces_itself_and_its_parts_only() {
        let room = tempfile::tempdir().unwrap();
        let at = |name: &str| room.path().join(name);
        let write = |names: &[&str], force| -> Result<()> {
            let staging = FileStaging::new(&at("m.gguf"), None, force)?;
            names.iter().try_for_each(|name| staging.write(name, b"GGUF"))?;
            staging.commit()
        };
        let listed = || {
            let mut names: Vec<String> =
                fs::read_dir(room.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        drop(FileStaging::new(&at("m.gguf"), None, false).unwrap());
        assert!(listed().is_empty());
        fs::write(at("m-other.gguf"), b"GGUF").unwrap();
        write(&["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], false).unwrap();
        assert!(write(&["m.gguf"], false).unwrap_err().to_string().contains("m-00001-of-00002.gguf: exists already"));
        write(&["m.gguf", "m.gguf.report.json"], true).unwrap();
        assert_eq!(listed(), ["m-other.gguf", "m.gguf", "m.gguf.report.json"]);
        fs::write(at("m.gguf"), b"letter").unwrap();
        assert!(write(&["m.gguf"], true).unwrap_err().to_string().contains("this is none"));
        let own = FileStaging::new(&at("m-other.gguf"), Some(&at("m-other.gguf")), true).err().unwrap();
        assert!(own.to_string().contains("may not be the input"));
    }

    #[test]
    fn what_would_stop_another_file_is_told_beforehand() {
        let room = tempfile::tempdir().unwrap();
        let at = |name: &str| room.path().join(name);
        fs::write(at("in.gguf"), b"GGUF").unwrap();
        let staging = FileStaging::new(&at("m.gguf"), Some(&at("in.gguf")), false).unwrap();
        let check = |name: &str, force| staging.check_another(&at(name), Some(&at("in.gguf")), force);
        fs::write(at("old.gguf"), b"GGUF").unwrap();
        fs::write(at("letter"), b"dear").unwrap();
        fs::create_dir(at("folder")).unwrap();
        for (name, force, expected) in [
            ("none/i.gguf", true, "there is no folder"),
            ("letter/i.gguf", true, "there is no folder"),
            ("folder", true, "is a directory"),
            ("old.gguf", false, "old.gguf: exists already; --force replaces it"),
            ("letter", true, "this is none"),
            ("in.gguf", true, "may not be the input"),
            ("m.gguf", true, "the quantized model"),
            ("folder/../m-00001-of-00002.gguf", true, "the quantized model"),
        ] {
            let error = check(name, force).unwrap_err();
            assert!(error.to_string().contains(expected), "{name}: {error}");
            assert_eq!(error.exit_code(), 2, "{name}: {error}");
        }
        for (name, force) in [("i.gguf", false), ("folder/m.gguf", false), ("old.gguf", true)] {
            check(name, force).unwrap();
        }
        assert_eq!(fs::read(at("old.gguf")).unwrap(), b"GGUF");
        assert_eq!(fs::read_dir(at("folder")).unwrap().count(), 0);
        #[cfg(target_os = "linux")]
        {
            // No one may write there, not even who may write anywhere.
            let error = staging.check_another(Path::new("/proc/i.gguf"), None, false).unwrap_err();
            assert!(error.to_string().contains("takes no file") && error.exit_code() == 2, "{error}");
        }
    }

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
