//! Where an output goes, and what would keep it from going there: found before any work is done.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::report::{papers_beside, projector_beside};

/// What stands between an output's name and the letters that make the name of its staging folder unlike any other.
pub const MARK: &str = ".partial-";

/// Bytes of the longest file name.
pub const LONGEST_NAME: usize = 255;

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
    /// Fails too for a name that is too long, and for a way over a folder that does not exist (`x/../y`).
    pub fn resolve(target: &Path) -> Result<Place> {
        let shown = target.display();
        // A path that ends in a separator would be asked for what a link leads to.
        let bare: PathBuf = target.components().collect();
        let target = bare.as_path();
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
        if name.len() > LONGEST_NAME {
            return Err(Error::usage(format!(
                "{shown}: its name has {} bytes, and file systems allow {LONGEST_NAME}; choose a shorter one",
                name.len()
            )));
        }
        if name.starts_with('.') && name.contains(MARK) {
            return Err(Error::usage(format!(
                "{shown}: has a name as unfinished outputs have, which later runs remove; choose another one"
            )));
        }
        let parent = match real.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let mut above = parent.ancestors();
        if let Some(gone) = above.find(|folder| folder.ends_with("..") && !folder.exists()) {
            return Err(Error::usage(format!(
                "{shown}: goes through a folder that does not exist ({}); write the path without it",
                gone.parent().unwrap_or(gone).display()
            )));
        }
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

/// Fails when two outputs of one run are the same, or one lies inside the other.
pub fn check_apart(one: &Path, other: &Path) -> Result<()> {
    let (first, second) = (Place::resolve(one)?, Place::resolve(other)?);
    let (real, other_real) = (first.real()?, second.real()?);
    let belongs = real.parent() == other_real.parent()
        && (belongs_to(&first.name, &second.name) || belongs_to(&second.name, &first.name));
    if belongs || real.starts_with(&other_real) || other_real.starts_with(&real) {
        return Err(Error::usage(format!(
            "{}: is or holds another output of this run, {}; give each a place of its own",
            other.display(),
            one.display()
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
    let out = Place::resolve(output)?;
    let out_real = out.real()?;
    if real.starts_with(&out_real) || real.parent() == out_real.parent() && is_part(&place.name, stem(&out.name)) {
        return Err(Error::usage(format!(
            "{flag} {shown}: lies in the output {}, which holds a report of its own; choose another place",
            output.display()
        )));
    }
    if let Ok(metadata) = fs::metadata(path)
        && !metadata.is_file()
    {
        if path.starts_with("/dev/full") {
            return Err(Error::usage(format!("{flag} {shown}: is a device that takes nothing; choose another place")));
        }
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

/// A file that is to appear beside the output, and is on the disk already.
pub struct SideOutput {
    path: PathBuf,
    place: PathBuf,
    /// `None` for what is no plain file, such as `/dev/stdout`, which takes what is written at once.
    file: Option<tempfile::NamedTempFile>,
}

impl SideOutput {
    /// Writes `content` next to `path`, or to what is no plain file.
    pub fn write(path: &Path, content: &[u8]) -> Result<SideOutput> {
        let io = |error| Error::io(path, "write")(error);
        if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            fs::write(path, content).map_err(io)?;
            return Ok(SideOutput { path: path.to_path_buf(), place: path.to_path_buf(), file: None });
        }
        let place = Place::resolve(path)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".quantc-");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(&place.parent).map_err(io)?;
        std::io::Write::write_all(&mut file, content).and_then(|()| file.as_file().sync_all()).map_err(io)?;
        Ok(SideOutput { path: path.to_path_buf(), place: place.path(), file: Some(file) })
    }

    /// Lets it appear, in one step.
    pub fn appear(self) -> Result<()> {
        let Some(file) = self.file else { return Ok(()) };
        file.persist(&self.place).map(drop).map_err(|error| {
            Error::failed(format!(
                "{}: cannot write: {}; the output itself is complete",
                self.path.display(),
                error.error
            ))
        })
    }
}

/// Whether a file called `name` is the report, the model card, the file for images or a part of the GGUF output called `output`.
pub fn belongs_to(name: &str, output: &str) -> bool {
    papers_beside(output).iter().any(|paper| paper == name)
        || name == projector_beside(output)
        || is_part(name, stem(output))
}

/// The name of a GGUF output without its ending.
pub fn stem(name: &str) -> &str {
    name.strip_suffix(".gguf").unwrap_or(name)
}

/// Whether `name` is `stem-00001-of-00003.gguf` for some numbers.
pub fn is_part(name: &str, stem: &str) -> bool {
    let numbers = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix('-')?.strip_suffix(".gguf"));
    numbers.and_then(|n| n.split_once("-of-")).is_some_and(|(number, count)| {
        [number, count].iter().all(|n| n.len() == 5 && n.bytes().all(|b| b.is_ascii_digit()))
    })
}

/// What else is mounted within `folder`, for nothing of that may go when the folder is replaced.
pub fn mounted_within(folder: &Path) -> Option<PathBuf> {
    let real = folder.canonicalize().ok()?;
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let places = table.lines().filter_map(|line| line.split(' ').nth(4)).map(|place| PathBuf::from(unescaped(place)));
    { places }.find(|place| *place != real && place.starts_with(&real))
}

/// A path of the table of mounts, in which blanks and some other signs are written as octal numbers.
fn unescaped(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(path.to_owned(), |path, (code, sign)| path.replace(code, sign))
}

/// Tries whether a folder takes a new file; permissions do not tell of everything that may forbid it.
pub fn check_takes_files(folder: &Path) -> std::io::Result<()> {
    tempfile::Builder::new().prefix(".quantc-").tempfile_in(folder).map(drop)
}

/// Whether something else is mounted at `folder`, so that the folder itself cannot be renamed.
pub fn is_mount_point(path: &Path) -> bool {
    let Ok(real) = path.canonicalize() else { return false };
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
    match free_space(folder) {
        Some(free) if free < bytes => Err(Error::failed(format!(
            "{}: the output takes {:.1} MB and only {:.1} MB are free on its disk; make room, or choose another place",
            shown.display(),
            bytes as f64 / 1e6,
            free as f64 / 1e6
        ))),
        _ => Ok(()),
    }
}

/// Bytes that this user may still write on the disk of a folder; `None` where the system does not tell.
pub fn free_space(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    return rustix::fs::statvfs(folder).ok().map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
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
        let long = "n".repeat(256);
        for (odd, words) in
            [("gone/../out", "goes through a folder that does not exist"), (long.as_str(), "has 256 bytes")]
        {
            let error = Place::resolve(&at(odd)).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(words), "{error}");
        }
        for nameless in ["/", "..", "a/.."] {
            assert_eq!(Place::resolve(Path::new(nameless)).unwrap_err().exit_code(), 2, "{nameless}");
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("gone", at("link")).unwrap();
            let error = Place::resolve(&at("link")).unwrap_err().to_string();
            assert!(error.contains("is a link to gone, which does not exist"), "{error}");
            assert!(Place::resolve(&at("link/")).is_err());
            fs::create_dir(at("gone")).unwrap();
            for slashed in ["link", "link/", "link/."] {
                assert_eq!(Place::resolve(&at(slashed)).unwrap().path(), at("gone").canonicalize().unwrap());
            }
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
