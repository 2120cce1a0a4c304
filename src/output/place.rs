//! Where an output goes, and what would keep it from going there: found before any work is done.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The resolved place of an output: a name in a folder, links followed.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The folder that holds the output; it may not exist yet.
    pub parent: PathBuf,
    /// The output's name in it.
    pub name: String,
}

impl Place {
    /// Resolves `target`: `x/.` is `x`, and a link stands for what it leads to, so that the link itself stays.
    ///
    /// Fails for a path without a name, for a name that is not UTF-8, and for a link that leads nowhere.
    pub fn resolve(target: &Path) -> Result<Place> {
        let shown = target.display();
        let is_link = fs::symlink_metadata(target).is_ok_and(|metadata| metadata.is_symlink());
        let real = match is_link {
            false => target.to_path_buf(),
            true => target.canonicalize().map_err(|_| {
                let leads = fs::read_link(target).unwrap_or_default();
                Error::usage(format!(
                    "{shown}: is a link to {}, which does not exist; make that folder, or remove the link",
                    leads.display()
                ))
            })?,
        };
        let no_name = || Error::usage(format!("{shown}: not a name for an output"));
        let name = real.file_name().ok_or_else(no_name)?;
        let name =
            name.to_str().ok_or_else(|| Error::usage(format!("{shown}: the name of an output must be UTF-8")))?;
        let parent = match real.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        Ok(Place { parent, name: name.to_owned() })
    }

    /// The output's path.
    pub fn path(&self) -> PathBuf {
        self.parent.join(&self.name)
    }

    /// The folders above the output that do not exist yet, the outermost first.
    pub fn missing_parents(&self) -> Vec<PathBuf> {
        let missing = self.parent.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let mut missing: Vec<PathBuf> = missing.map(Path::to_path_buf).collect();
        missing.reverse();
        missing
    }

    /// The path without links and `..`, as far as it exists.
    fn real(&self) -> Result<PathBuf> {
        let path = self.path();
        if path.exists() {
            return path.canonicalize().map_err(Error::io(&path, "resolve"));
        }
        let missing = self.missing_parents();
        let existing = match missing.first() {
            None => self.parent.as_path(),
            Some(first) => first.parent().unwrap_or(Path::new("")),
        };
        let opened = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
        let real = opened.canonicalize().map_err(Error::io(opened, "resolve"))?;
        Ok(real.join(self.parent.strip_prefix(existing).unwrap_or(Path::new(""))).join(&self.name))
    }
}

/// Fails when `target` is the input, or one lies inside the other.
pub fn check_place(target: &Path, input: &Path) -> Result<()> {
    let real = Place::resolve(target)?.real()?;
    let real_input = input.canonicalize().map_err(Error::io(input, "resolve"))?;
    if real.starts_with(&real_input) || real_input.starts_with(&real) {
        return Err(Error::usage(format!(
            "{}: the output may not be the input {} nor lie inside it or hold it; choose another place",
            target.display(),
            input.display()
        )));
    }
    Ok(())
}

/// Fails when a side output such as the report would overwrite an input, part of the output, or cannot be written.
///
/// `inputs` are files and folders that are read, `output` is what the run writes. An existing plain file elsewhere is replaced,
/// and a device such as `/dev/stdout` is written to.
pub fn check_beside(flag: &str, path: &Path, inputs: &[&Path], output: &Path) -> Result<()> {
    let shown = path.display();
    if path.is_dir() {
        return Err(Error::usage(format!("{flag} {shown}: is a folder, and a file is to be written")));
    }
    let place = Place::resolve(path)?;
    let real = place.real()?;
    for input in inputs {
        let Ok(input_real) = input.canonicalize() else { continue };
        if real.starts_with(&input_real) {
            return Err(Error::usage(format!(
                "{flag} {shown}: lies in the input {} and would overwrite part of it; choose another place",
                input.display()
            )));
        }
    }
    if real.starts_with(Place::resolve(output)?.real()?) {
        return Err(Error::usage(format!(
            "{flag} {shown}: lies in the output {}, which holds a report of its own; choose another place",
            output.display()
        )));
    }
    if let Ok(metadata) = fs::metadata(path)
        && !metadata.is_file()
    {
        // A pipe waits for its reader; those of the shell below /dev have one.
        let waits = is_pipe(&metadata) && !path.starts_with("/dev") && !path.starts_with("/proc");
        return match waits {
            true => Err(Error::usage(format!("{flag} {shown}: is a pipe, and a file is to be written"))),
            false => Ok(()),
        };
    }
    if !place.parent.is_dir() {
        let folder = place.parent.display();
        return Err(Error::usage(format!("{flag} {shown}: there is no folder {folder}; make it first")));
    }
    check_takes_files(&place.parent).map_err(|error| {
        Error::usage(format!("{flag} {shown}: its folder takes no file ({error}); choose another place"))
    })
}

#[cfg(unix)]
fn is_pipe(metadata: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    metadata.file_type().is_fifo() || metadata.file_type().is_socket()
}

#[cfg(not(unix))]
fn is_pipe(_: &fs::Metadata) -> bool {
    false
}

/// Writes a file beside the output in one step; what is no plain file, such as `/dev/stdout`, is written to as it is.
pub fn write_beside(path: &Path, content: &[u8]) -> Result<()> {
    let io = |error| Error::io(path, "write")(error);
    if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return fs::write(path, content).map_err(io);
    }
    let place = Place::resolve(path)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".quantc-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(&place.parent).map_err(io)?;
    std::io::Write::write_all(&mut file, content).and_then(|()| file.as_file().sync_all()).map_err(io)?;
    file.persist(place.path()).map_err(|error| io(error.error))?;
    Ok(())
}

/// Tries whether a folder takes a new file; permissions do not tell of everything that may forbid it.
pub fn check_takes_files(folder: &Path) -> std::io::Result<()> {
    tempfile::Builder::new().prefix(".quantc-").tempfile_in(folder).map(drop)
}

/// Whether something else is mounted at `folder`, so that the folder itself cannot be renamed.
pub fn is_mount_point(folder: &Path) -> bool {
    let Ok(real) = folder.canonicalize() else { return false };
    // A folder mounted from the same file system has the same device number as what is around it.
    if let (Ok(table), Some(path)) = (fs::read_to_string("/proc/self/mountinfo"), real.to_str()) {
        let escaped = path.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011").replace('\n', "\\012");
        return table.lines().any(|line| line.split(' ').nth(4) == Some(escaped.as_str()));
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
        real.parent().is_some_and(|parent| device(parent) != device(&real))
    }
    #[cfg(not(unix))]
    false
}

/// Fails when fewer than `bytes` are free on the file system of `folder`, which exists.
pub fn check_space(folder: &Path, shown: &Path, bytes: u64) -> Result<()> {
    #[cfg(unix)]
    if let Ok(disk) = rustix::fs::statvfs(folder) {
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if free < bytes {
            return Err(Error::failed(format!(
                "{}: the output takes {:.2} GB and only {:.2} GB are free on its disk; make room, or choose another place",
                shown.display(),
                bytes as f64 / 1e9,
                free as f64 / 1e9
            )));
        }
    }
    #[cfg(not(unix))]
    let _ = (folder, shown, bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_resolved() {
        let room = tempfile::tempdir().unwrap();
        let at = |name: &str| room.path().join(name);
        assert_eq!(Place::resolve(Path::new("x/.")).unwrap().path(), Path::new("./x"));
        assert_eq!(Place::resolve(&at("a/b/out")).unwrap().missing_parents(), [at("a"), at("a/b")]);
        for nameless in ["/", "..", "a/.."] {
            assert_eq!(Place::resolve(Path::new(nameless)).unwrap_err().exit_code(), 2, "{nameless}");
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("gone", at("link")).unwrap();
            let error = Place::resolve(&at("link")).unwrap_err().to_string();
            assert!(error.contains("is a link to gone, which does not exist"), "{error}");
            fs::create_dir(at("gone")).unwrap();
            assert_eq!(Place::resolve(&at("link")).unwrap().path(), at("gone").canonicalize().unwrap());
        }
    }

    #[test]
    fn what_a_report_would_overwrite_is_told_beforehand() {
        let room = tempfile::tempdir().unwrap();
        let at = |name: &str| room.path().join(name);
        fs::create_dir(at("model")).unwrap();
        fs::write(at("model/model.safetensors"), b"weights").unwrap();
        fs::write(at("text.txt"), b"text").unwrap();
        fs::write(at("old.json"), b"{}").unwrap();
        let check = |path: &Path| check_beside("--report", path, &[&at("model"), &at("text.txt")], &at("out"));
        for (path, expected) in [
            (at("model/model.safetensors"), "lies in the input"),
            (at("model/new.json"), "lies in the input"),
            (at("text.txt"), "lies in the input"),
            (at("out"), "lies in the output"),
            (at("out/report.json"), "lies in the output"),
            (at("model"), "is a folder"),
            (at("none/report.json"), "there is no folder"),
        ] {
            let error = check(&path).unwrap_err();
            assert!(error.to_string().contains(expected), "{}: {error}", path.display());
            assert_eq!(error.exit_code(), 2);
        }
        for path in [at("report.json"), at("old.json")] {
            check(&path).unwrap();
        }
        #[cfg(target_os = "linux")]
        {
            check(Path::new("/dev/null")).unwrap();
            assert!(check(Path::new("/proc/report.json")).unwrap_err().to_string().contains("takes no file"));
        }
    }

    #[test]
    fn a_disk_that_is_too_small_is_told() {
        let room = tempfile::tempdir().unwrap();
        check_space(room.path(), Path::new("out"), 1).unwrap();
        let error = check_space(room.path(), Path::new("out"), u64::MAX).unwrap_err().to_string();
        assert!(error.starts_with("out: the output takes ") && error.contains("are free on its disk"), "{error}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn mount_points_are_known() {
        let room = tempfile::tempdir().unwrap();
        assert!(is_mount_point(Path::new("/proc")) && is_mount_point(Path::new("/")));
        assert!(!is_mount_point(room.path()));
    }
}
