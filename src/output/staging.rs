//! An output being written: in a hidden folder beside its place, and nowhere else until it is complete.
//!
//! The folder has a name of its own and is locked for as long as its process lives. So a later run can tell what an earlier one
//! left behind from what another one is writing, and [`sweep`]s the former.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::journal::{self, Journal};
use super::left::{Before, HOLDER, Left, look};
use super::place::{
    LONGEST_NAME, MARK, Place, belongs_to, check_place, check_space, check_takes_files, is_mount_point, is_part,
    mounted_within, stem,
};
use super::switch::{Switch, exchange, is_under_way, rename_new, sync_folder, sync_tree};
use crate::error::{Error, Result};
use crate::report::{papers_beside, projector_beside};

/// Letters that make the name of a staging folder unlike any other.
pub(super) const RANDOM: usize = 8;

/// Bytes that the names of a GGUF file's parts and of its report have more than its own.
const PART: usize = 15;

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A folder with a config.json.
    Folder,
    /// A GGUF file, or the parts of one.
    Gguf,
}

/// What tells a file or folder from every other one.
type Number = Option<(u64, u64)>;

/// The number of what is called `path`, where the system has such.
fn number(path: &Path) -> Number {
    #[cfg(unix)]
    return fs::symlink_metadata(path).ok().map(|metadata| {
        use std::os::unix::fs::MetadataExt;
        (metadata.dev(), metadata.ino())
    });
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// The place of a folder. Fails for one that is called as a file is, and for the input's.
fn named_folder(target: &Path, input: Option<&Path>) -> Result<Place> {
    let place = Place::resolve(target)?;
    input.map_or(Ok(()), |input| check_place(target, input))?;
    if place.path().extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")) {
        let shown = target.display();
        return Err(Error::usage(format!(
            "{shown}: is the name of a GGUF file, and a folder would be written; `quantc quantize MODEL -o {shown}` writes such a file \
             (--scheme F16 or BF16 without quantizing), and a folder needs another name"
        )));
    }
    Ok(place)
}

/// Fails where something is at a folder's place that may not be replaced.
fn check_folder(place: &Place, target: &Path, force: bool) -> Result<()> {
    let (path, shown) = (place.path(), target.display());
    if !path.exists() {
        return Ok(());
    }
    if !path.is_dir() {
        return Err(Error::usage(format!("{shown}: is a file, and a folder is to be written")));
    }
    let there = entries(&path).map_err(Error::io(&path, "list"))?;
    if there.is_empty() {
        return Ok(());
    }
    if !force {
        return Err(Error::usage(format!("{shown}: exists already; --force replaces it")));
    }
    if !path.join("config.json").exists() {
        return Err(Error::usage(format!(
            "{shown}: --force replaces a model directory, and this is none (it has no config.json)"
        )));
    }
    if let Some(why) = no_model_directory(&there) {
        return Err(Error::usage(format!(
            "{shown}: --force replaces a model directory with all that is in it, and this {why}; choose another place, or remove it"
        )));
    }
    mounted_within(&path).map_or(Ok(()), |inner| {
        Err(Error::usage(format!(
            "{shown}: something else is mounted at {}, and --force would remove it; unmount it first",
            inner.display()
        )))
    })
}

/// The place of a GGUF file. Fails where no file can appear under that name, and for the input's.
fn named_file(target: &Path, input: Option<&Path>) -> Result<Place> {
    let place = Place::resolve(target)?;
    input.map_or(Ok(()), |input| check_place(target, input))?;
    let (path, shown) = (place.path(), target.display());
    check_file(&path, &shown)?;
    let papers = papers_beside(&place.name).map(|paper| place.parent.join(paper));
    if let Some(mounted) = [path.clone()].into_iter().chain(papers).find(|path| path.is_file() && is_mount_point(path))
    {
        return Err(Error::usage(format!(
            "{shown}: {} is mounted as a single file, which no other file can take the place of; mount the folder that is to hold it",
            mounted.display()
        )));
    }
    if place.name.len() + PART > LONGEST_NAME {
        return Err(Error::usage(format!(
            "{shown}: its name has {} bytes, which leaves no room for the names of its parts and its report; choose a shorter one",
            place.name.len()
        )));
    }
    Ok(place)
}

/// An earlier file at the place, and the parts of one. Fails where one is not to be replaced.
fn files_there(place: &Place, input: Option<&Path>, force: bool) -> Result<Vec<PathBuf>> {
    let mut there = Vec::new();
    if place.parent.is_dir() {
        for name in entries(&place.parent).map_err(Error::io(&place.parent, "list"))? {
            if name == place.name || is_part(&name, stem(&place.name)) {
                there.push(place.parent.join(name));
            }
        }
    }
    if let (Some(first), false) = (there.first(), force) {
        return Err(Error::usage(format!("{}: exists already; --force replaces it", first.display())));
    }
    for path in &there {
        check_replaced(path)?;
        if input.is_some_and(|input| path.canonicalize().ok() == input.canonicalize().ok()) {
            return Err(Error::usage(format!(
                "{}: the output may not be the input; choose another place",
                path.display()
            )));
        }
    }
    Ok(there)
}

/// An output being written; removed unless it is [committed](Staging::commit).
pub struct Staging {
    /// As the user called it, for messages.
    shown: PathBuf,
    place: Place,
    kind: Kind,
    folder: PathBuf,
    /// Where the folder lies in the output itself, for that cannot be renamed.
    inside: bool,
    /// What was at the place when the run began, which alone may be replaced; `None` where nothing may.
    found: Option<Vec<(PathBuf, Number)>>,
    /// Folders that were made to hold the output, the outermost first.
    made: Vec<PathBuf>,
    notes: Vec<String>,
    committed: bool,
    /// What is finished, of a run that can be gone on with.
    journal: Option<Journal>,
    /// Whether finished blocks stay where the run ends without an output.
    keeps: AtomicBool,
    /// Held until this goes; `None` on file systems without locks.
    _lock: Option<File>,
}

impl Staging {
    /// Begins a Hugging Face directory.
    ///
    /// Fails when `target` holds something and `force` is not given, is the input or holds it or lies inside it, or, with
    /// `force`, is something else than an earlier output. An empty folder is as good as none.
    pub fn folder_for(target: &Path, input: Option<&Path>, force: bool, before: Option<Before<'_>>) -> Result<Staging> {
        let place = named_folder(target, input)?;
        let (notes, left) = look(&place, target, before)?;
        check_folder(&place, target, force)?;
        let path = place.path();
        let found = force.then(|| vec![(path.clone(), number(&path))]);
        Self::begin(target, place, Kind::Folder, found, (notes, left), before)
    }

    /// Fails as [`folder_for`](Self::folder_for) or, for a `single` file, [`gguf`](Self::gguf) would, and begins nothing.
    pub fn check(target: &Path, input: Option<&Path>, force: bool, single: bool) -> Result<()> {
        if single {
            let place = named_file(target, input)?;
            return files_there(&place, input, force).map(drop);
        }
        check_folder(&named_folder(target, input)?, target, force)
    }

    /// Checks the place of a file that appears with the GGUF file `target`, under the name `name` beside it.
    ///
    /// Fails when it exists and cannot be replaced.
    pub fn check_with(target: &Path, name: &str, force: bool) -> Result<()> {
        let path = Place::resolve(target)?.parent.join(name);
        match (path.exists(), force) {
            (false, _) => Ok(()),
            (true, true) => check_replaced(&path),
            (true, false) => Err(Error::usage(format!("{}: exists already; --force replaces it", path.display()))),
        }
    }

    /// Begins a GGUF file, or the parts of one, which are called `NAME-00001-of-00003.gguf`.
    ///
    /// Fails when it (or a part of it) exists and `force` is not given, is the input, or, with `force`, is no GGUF file.
    pub fn gguf(target: &Path, input: Option<&Path>, force: bool, before: Option<Before<'_>>) -> Result<Staging> {
        let place = named_file(target, input)?;
        let (mut notes, left) = look(&place, target, before)?;
        let mut there = files_there(&place, input, force)?;
        let path = place.path();
        let parts: Vec<&PathBuf> = there.iter().filter(|there| **there != path).collect();
        if let Some(first) = parts.first() {
            notes.push(format!(
                "{}: parts of an earlier output, such as {}, are beside it; those that the new one does not replace stay",
                path.display(),
                first.display()
            ));
        }
        let others = papers_beside(&place.name).into_iter().chain([projector_beside(&place.name)]);
        there.extend(others.map(|other| place.parent.join(other)));
        let found = force.then(|| there.iter().map(|there| (there.clone(), number(there))).collect());
        Self::begin(target, place, Kind::Gguf, found, (notes, left), before)
    }

    fn begin(
        target: &Path,
        place: Place,
        kind: Kind,
        found: Option<Vec<(PathBuf, Number)>>,
        (mut notes, left): (Vec<String>, Option<Left>),
        before: Option<Before<'_>>,
    ) -> Result<Staging> {
        let made = place.missing_parents();
        let inside = kind == Kind::Folder && is_mount_point(&place.path());
        let home = if inside { place.path() } else { place.parent.clone() };
        let create = || -> std::io::Result<(PathBuf, Option<File>)> {
            fs::create_dir_all(&home)?;
            loop {
                let mut builder = tempfile::Builder::new();
                let prefix = hidden_prefix(&place.name);
                builder.prefix(&prefix).rand_bytes(RANDOM);
                #[cfg(unix)]
                builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
                // As the user wrote the path: the library made an absolute one of it.
                let folder = builder.tempdir_in(&home)?.keep();
                let folder = home.join(folder.file_name().expect("it has just been given a name"));
                let lock = lock(&folder)?;
                // Another run may have swept the folder before it was locked.
                if folder.exists() {
                    return Ok((folder, lock));
                }
            }
        };
        let (folder, lock, finished) = match left {
            Some(Left { folder, lock, finished }) => {
                notes.push(format!(
                    "{}: goes on after {} blocks that an interrupted run had finished",
                    target.display(),
                    finished.len()
                ));
                (folder, Some(lock), Some(finished))
            }
            None => {
                let (folder, lock) = create().map_err(|error| {
                    remove_made(&made);
                    Error::io(&home, "create a folder in")(error)
                })?;
                (folder, lock, None)
            }
        };
        let mut staging = Staging {
            shown: target.to_path_buf(),
            place,
            kind,
            folder,
            inside,
            found,
            made,
            notes,
            committed: false,
            journal: None,
            keeps: AtomicBool::new(finished.is_some()),
            _lock: lock,
        };
        // From here on the folder goes with the staging, if that is not to stay.
        staging.journal = match (finished, before) {
            (Some(finished), _) => Some(Journal::go_on(&staging.folder, finished)?),
            (None, before) => before.map(|before| Journal::begin(&staging.folder, before.key)).transpose()?,
        };
        if staging.journal.is_some() {
            // Who is refused wants to know by whom; nothing else hangs on it.
            let _ = staging.write(HOLDER, std::process::id().to_string().as_bytes());
        }
        Ok(staging)
    }

    /// Where to write.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The output's own name.
    pub fn name(&self) -> &str {
        &self.place.name
    }

    /// What the user should know of what was found at the place.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What is finished of it, and more is added to; `None` of outputs that are always made in one go.
    pub fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    /// Whether an earlier run has laid out its files.
    pub fn goes_on(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| journal.finished() > 0)
    }

    /// What to say where the files of an earlier run cannot be taken up; they go with this one.
    pub fn damaged(&self, error: Error) -> Error {
        let blocks = self.journal.as_ref().map_or(0, Journal::finished);
        Error::failed(format!(
            "{}: {blocks} finished blocks of an interrupted run cannot be gone on with ({error}) and are removed; the same command begins afresh",
            self.shown.display()
        ))
    }

    /// Finished blocks stay, or go, where the run ends without an output from now on.
    pub fn keep_finished(&self, keeps: bool) {
        self.keeps.store(keeps, Ordering::Relaxed);
    }

    /// Fails when an output of so many bytes does not fit on the disk.
    pub fn check_space(&self, bytes: u64) -> Result<()> {
        check_space(&self.folder, &self.shown, bytes)
    }

    /// Whether another output is written to the same file system.
    pub fn is_beside(&self, other: &Staging) -> bool {
        let of = |staging: &Staging| number(&staging.folder).map(|(device, _)| device);
        of(self) == of(other)
    }

    /// Writes one file.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, content).map_err(Error::io(&path, "write"))
    }

    /// Checks another GGUF file that the same run is to write, in a folder that exists.
    ///
    /// Fails, always as a request that cannot be met, when it is the input, the output or a part of it, when it exists and
    /// `force` is not given or it is no GGUF file, and when its folder takes no new file.
    pub fn check_another(&self, target: &Path, input: Option<&Path>, force: bool) -> Result<()> {
        let (shown, place) = (target.display(), Place::resolve(target)?);
        if !place.parent.is_dir() {
            return Err(Error::usage(format!("{shown}: there is no folder {}; make it first", place.parent.display())));
        }
        input.map_or(Ok(()), |input| check_place(target, input))?;
        let beside = self.place.parent.canonicalize().ok() == place.parent.canonicalize().ok();
        if beside && (place.name == self.place.name || belongs_to(&place.name, &self.place.name)) {
            return Err(Error::usage(format!(
                "{shown}: is what the quantized model will be called; choose another name"
            )));
        }
        check_file(target, &shown)?;
        if target.exists() {
            if !force {
                return Err(Error::usage(format!("{shown}: exists already; --force replaces it")));
            }
            check_replaced(target)?;
        }
        check_takes_files(&place.parent)
            .map_err(|error| Error::usage(format!("{shown}: its folder takes no file ({error}); choose another place")))
    }

    /// Waits until everything that was written is on the disk.
    pub fn flush(&self) -> Result<()> {
        sync_tree(&self.folder).map_err(Error::io(&self.folder, "flush"))
    }

    /// Moves the output to its place in one step, once everything is on the disk; with `force` in place of what is there.
    ///
    /// What has appeared there since the run began stays, and the finished output is kept beside it. Returns notes on what could
    /// not be removed.
    pub fn commit(mut self) -> Result<Vec<String>> {
        let path = self.place.path();
        self.flush()?;
        if self.journal.take().is_some() {
            let journal = self.folder.join(journal::NAME);
            fs::remove_file(&journal).map_err(Error::io(&journal, "remove"))?;
            let _ = fs::remove_file(self.folder.join(HOLDER));
        }
        let moved = match self.kind {
            Kind::Folder if !self.inside => self.switch_folder(&path),
            _ => self.switch_files(&path),
        };
        match moved {
            Ok(()) => {}
            Err(error) if is_taken(&error) => return Err(self.keep_beside()),
            Err(error) if is_under_way(&self.folder) => {
                // What is in the folder now is all there is of the earlier output.
                self.committed = true;
                return Err(Error::failed(format!(
                    "{}: cannot move into place: {error}; some of its files are in {}, which the next run to this place puts right",
                    self.shown.display(),
                    self.folder.display()
                )));
            }
            Err(error) => return Err(Error::io(&self.shown, "move into place")(error)),
        }
        self.committed = true;
        let _ = sync_folder(&self.place.parent);
        // What is left is what was replaced; a run that ends here leaves it to the next one.
        let left = remove_tree(&self.folder).err().filter(|error| error.kind() != ErrorKind::NotFound);
        Ok(left.map(|error| format!("{}: {}", self.folder.display(), stays(&error))).into_iter().collect())
    }

    /// Whether what is called `path` now may be replaced, as it was there when the run began.
    fn may_replace(&self, path: &Path) -> bool {
        let is_same = |(found, number): &(PathBuf, Number)| found == path && *number == self::number(path);
        self.found.as_ref().is_some_and(|found| found.iter().any(is_same))
    }

    fn switch_folder(&mut self, path: &Path) -> std::io::Result<()> {
        if !path.exists() {
            return rename_new(&self.folder, path);
        }
        if entries(path)?.is_empty() {
            // A rename replaces an empty folder, and nothing else.
            return fs::rename(&self.folder, path);
        }
        if !self.may_replace(path) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        self.folder = exchange(&self.folder, path, &aside_of(&self.place))?;
        Ok(())
    }

    fn switch_files(&self, path: &Path) -> std::io::Result<()> {
        let into = if self.inside { path } else { &self.place.parent };
        let mut moves = entries(&self.folder)?;
        let opener = match self.kind {
            Kind::Folder => "config.json".to_owned(),
            Kind::Gguf => moves.iter().find(|name| opens(name, &self.place.name)).cloned().unwrap_or_default(),
        };
        moves.sort_by_key(|name| (*name == opener, name.clone()));
        let mut aside: Vec<String> = match self.kind {
            // Everything that was in the folder belonged to the output before.
            Kind::Folder => entries(path)?,
            // One model file replaces one in a single step, the last of all, so that there is a model at every moment; several have
            // to make room first. The report always does: it comes back where the model's step fails.
            Kind::Gguf => {
                let other = projector_beside(&self.place.name);
                let single = moves.iter().filter(|name| name.ends_with(".gguf") && **name != other).count() < 2;
                let stays = |name: &String| single && *name == opener;
                moves.iter().filter(|name| !stays(name) && into.join(name).exists()).cloned().collect()
            }
        };
        let force = self.found.is_some();
        let taken = |name: &String| into.join(name).exists() && !self.may_replace(&into.join(name));
        if !force && !aside.is_empty() || self.kind == Kind::Gguf && force && moves.iter().any(taken) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        aside.sort_by_key(|name| (*name != opener, name.clone()));
        Switch::new(into, aside, moves).perform(&self.folder, force)
    }

    /// Gives the finished output a name of its own, for its own was taken while it was written.
    fn keep_beside(&mut self) -> Error {
        let shown = self.shown.display();
        for number in 1.. {
            let suffix = if number == 1 { String::new() } else { format!("-{number}") };
            let kept = self.shown.with_file_name(format!("{}.finished{suffix}", self.place.name));
            match rename_new(&self.folder, &kept) {
                Ok(()) => {
                    self.committed = true;
                    return Error::failed(format!(
                        "{shown}: something appeared there while quantc was at work, and was left as it is; the finished output is in {}",
                        kept.display()
                    ));
                }
                Err(error) if is_taken(&error) && number < 1000 => {}
                Err(error) => return Error::io(&self.shown, "move into place")(error),
            }
        }
        unreachable!("the loop ends by returning")
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let stays = self.keeps.load(Ordering::Relaxed)
            && journal::read(&self.folder).is_some_and(|(_, finished)| !finished.is_empty());
        if !self.committed && !stays {
            let _ = fs::remove_dir_all(&self.folder);
            remove_made(&self.made);
        }
    }
}

/// Removes a folder with everything in it, also where its owner has locked it against himself.
pub(super) fn remove_tree(folder: &Path) -> std::io::Result<()> {
    let removed = fs::remove_dir_all(folder);
    #[cfg(unix)]
    if removed.as_ref().is_err_and(|error| error.kind() == ErrorKind::PermissionDenied) {
        open_up(folder)?;
        return fs::remove_dir_all(folder);
    }
    removed
}

/// Gives the owner every right to a folder and those in it.
#[cfg(unix)]
fn open_up(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_up(&entry.path())?;
        }
    }
    Ok(())
}

/// What is said of a hidden folder that stays.
pub(super) fn stays(error: &std::io::Error) -> String {
    format!("holds what an earlier output or run has left and cannot be removed ({error}); remove it")
}

fn is_taken(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory)
}

/// The names in a folder, sorted; without those of staging folders and of what file systems put into every folder of theirs.
fn entries(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.contains(MARK) && name != "lost+found" {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// How the names of all staging folders of an output begin.
pub(super) fn hidden_prefix(name: &str) -> String {
    let mut kept = name.len().min(LONGEST_NAME - 1 - MARK.len() - RANDOM);
    while !name.is_char_boundary(kept) {
        kept -= 1;
    }
    format!(".{}{MARK}", &name[..kept])
}

/// Where a folder that is replaced waits on file systems that cannot exchange two names.
pub(super) fn aside_of(place: &Place) -> PathBuf {
    let hidden = hidden_prefix(&place.name);
    place.parent.join(hidden.replace(MARK, ".replaced"))
}

/// Locks a staging folder for as long as the file lives; `None` where the file system has no locks.
fn lock(folder: &Path) -> std::io::Result<Option<File>> {
    if cfg!(not(unix)) {
        return Ok(None);
    }
    let file = match File::open(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    Ok(file.try_lock().is_ok().then_some(file))
}

/// `told` with the names of staging folders of `target` replaced by the output's own, of which alone the user knows; `single` says
/// that the output is a file, or its parts, and no folder.
pub fn without_hidden_names(told: &str, target: &Path, single: bool) -> String {
    let Ok(place) = Place::resolve(target) else { return told.to_owned() };
    let prefix = hidden_prefix(&place.name);
    let separator = std::path::MAIN_SEPARATOR;
    let (mut out, mut rest) = (String::new(), told);
    while let Some(at) = rest.find(&prefix) {
        let after = &rest[at + prefix.len()..];
        let letters = after.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(after.len());
        let before = &rest[..at];
        // The user gave a name without a folder.
        let bare = target.parent().is_none_or(|parent| parent.as_os_str().is_empty());
        let before = if bare { before.strip_suffix(&format!(".{separator}")).unwrap_or(before) } else { before };
        out.push_str(before);
        rest = &after[letters..];
        match rest.strip_prefix(separator) {
            Some(inside) if single => rest = inside,
            _ => out.push_str(&place.name),
        }
    }
    out + rest
}

/// Removes folders that were made for an output, as far as nothing is in them.
pub fn remove_made(made: &[PathBuf]) {
    made.iter().rev().take_while(|folder| fs::remove_dir(folder).is_ok()).for_each(drop);
}

/// Whether a file of this name is the one to open of the GGUF output called `output`.
fn opens(name: &str, output: &str) -> bool {
    name == output || is_part(name, stem(output)) && name.contains("-00001-of-")
}

/// Why a folder with a config.json and these names is not taken for a model's, where it is not: other programs have files of that
/// name too.
fn no_model_directory(names: &[String]) -> Option<String> {
    if let Some(history) = names.iter().find(|name| [".git", ".hg", ".svn"].contains(&&name[..])) {
        return Some(format!("holds {history}"));
    }
    let endings = [".safetensors", ".bin", ".gguf", ".index.json"];
    let is_models = |name: &String| endings.iter().any(|ending| name.ends_with(ending)) || name == "report.json";
    (!names.iter().any(is_models)).then(|| "has no weights".to_owned())
}

/// Fails when something other than a plain file is where a GGUF file is to be.
fn check_file(path: &Path, shown: &impl std::fmt::Display) -> Result<()> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            Err(Error::usage(format!("{shown}: is a directory, and a GGUF file is to be written")))
        }
        Ok(metadata) if !metadata.is_file() => {
            Err(Error::usage(format!("{shown}: is a device or a pipe, and a GGUF file is to be written")))
        }
        _ => Ok(()),
    }
}

/// Fails when the file that `--force` would replace is no GGUF file.
fn check_replaced(path: &Path) -> Result<()> {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| std::io::Read::read(&mut file, &mut magic));
    match read.map_err(Error::io(path, "read"))? > 0 && magic != *b"GGUF" {
        true => Err(Error::usage(format!("{}: --force replaces a GGUF file, and this is none", path.display()))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests;
