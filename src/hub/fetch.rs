//! Downloads into Hugging Face's cache, in the layout that its own programs read and write.
//!
//! ```text
//! models--org--name/blobs/HASH              a content, once; HASH.incomplete while it comes
//! models--org--name/snapshots/COMMIT/PATH   a link to it, made when it is whole and its hash was checked
//! models--org--name/refs/main               the commit, written when all is there
//! .locks/models--org--name/HASH.lock        held while the content comes
//! ```

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha1::{Digest, Sha1};

use super::client::{Client, Fault, Sent, fault_of, header, quoted};
use super::listing::{Listed, Listing, Wanted};
use crate::checkpoint::{HubName, weights_of};
use crate::error::{Error, Result};
use crate::output::free_space;
use crate::output::hashing::hash_file;
use crate::progress::Progress;

/// Files that are fetched at the same time.
const AT_ONCE: usize = 4;

/// Bytes that are taken from a connection at a time.
const PIECE: usize = 1 << 20;

/// What is fetched, and where it goes.
pub struct Fetch<'a> {
    /// What asks.
    pub client: &'a Client,
    /// What is meant.
    pub name: &'a HubName,
    /// What there is.
    pub listing: &'a Listing,
    /// Hugging Face's cache.
    pub cache: &'a Path,
}

impl Fetch<'_> {
    /// The model's folder in the cache.
    fn root(&self) -> PathBuf {
        self.cache.join(self.name.folder())
    }

    /// Where the model's files get their names.
    pub fn snapshot(&self) -> PathBuf {
        self.root().join("snapshots").join(&self.listing.commit)
    }

    /// Fetches what is beside the weights of a folder.
    pub fn side(&self, files: &[Listed], progress: &mut Progress) -> Result<()> {
        self.all(files, "its configuration and tokenizer", progress)
    }

    /// The files of weights of a folder whose other files are there.
    ///
    /// Fails where the index names one that the hub does not have.
    pub fn weights(&self) -> Result<Vec<Listed>> {
        let names: Vec<String> = self.listing.files.iter().map(|file| file.path.clone()).collect();
        let found = weights_of(&self.snapshot(), &names).into_iter().map(|name| {
            let file = self.listing.files.iter().find(|file| file.path == name);
            file.cloned().ok_or_else(|| {
                Error::failed(format!(
                    "{}: its index names {name}, and the hub does not have it; tell who published the model",
                    self.name
                ))
            })
        });
        found.collect()
    }

    /// Fetches everything; what is to be opened.
    pub fn whole(&self, wanted: &Wanted, progress: &mut Progress) -> Result<PathBuf> {
        let place = match wanted {
            Wanted::Folder(files) => {
                self.side(files, progress)?;
                self.all(&self.weights()?, "its weights", progress)?;
                self.snapshot()
            }
            Wanted::Gguf(parts) => {
                self.all(parts, "the GGUF file", progress)?;
                let first = parts.iter().map(|part| &part.path).min().expect("a GGUF file has parts");
                self.snapshot().join(first)
            }
            Wanted::Adapter(files) => {
                self.all(files, "the adapter", progress)?;
                self.snapshot()
            }
        };
        self.refer()?;
        Ok(place)
    }

    /// Remembers which commit the branch or tag is.
    fn refer(&self) -> Result<()> {
        let revision = self.name.revision.as_deref().unwrap_or("main");
        if self.listing.commit.starts_with(revision) {
            return Ok(());
        }
        let place = self.root().join("refs").join(revision);
        let write = || -> std::io::Result<()> {
            let folder = place.parent().expect("it lies in refs");
            std::fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(self.listing.commit.as_bytes())?;
            #[cfg(unix)]
            std::fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
            file.persist(&place)?;
            Ok(())
        };
        write().map_err(Error::io(&place, "write"))
    }

    /// Fetches files, several at the same time, and gives them their names.
    fn all(&self, files: &[Listed], what: &str, progress: &mut Progress) -> Result<()> {
        let there = |file: &&Listed| {
            let metadata = std::fs::metadata(self.snapshot().join(&file.path));
            metadata.is_ok_and(|metadata| metadata.len() == file.bytes)
        };
        // Files of the same content come once.
        let mut missing: Vec<Vec<&Listed>> = Vec::new();
        for file in files.iter().filter(|file| !there(file)) {
            match missing.iter_mut().find(|alike| alike[0].blob == file.blob) {
                Some(alike) => alike.push(file),
                None => missing.push(vec![file]),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let blobs = self.root().join("blobs");
        std::fs::create_dir_all(&blobs).map_err(Error::io(&blobs, "create"))?;
        let bytes = missing.iter().map(|alike| alike[0].bytes).sum();
        self.check_space(&blobs, &missing)?;
        let commit = &self.listing.commit[..7];
        progress.say(&format!(
            "{}: downloading {what} ({} files, {:.1} MB) at commit {commit} into {}",
            self.name,
            missing.len(),
            bytes as f64 / 1e6,
            self.root().display()
        ));
        progress.start(format!("downloading {}", self.name.id), bytes)?;
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
        let work = || {
            loop {
                let alike = missing.get(next.fetch_add(1, Ordering::Relaxed));
                let goes_on = failed.lock().unwrap_or_else(PoisonError::into_inner).is_none();
                let Some(alike) = alike.filter(|_| goes_on) else { return };
                if let Err(error) = self.content(alike, &blobs, progress) {
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_ONCE.min(missing.len())).map(|_| scope.spawn(work)).collect();
            workers.into_iter().for_each(|worker| worker.join().expect("downloading does not panic"));
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Fails where the disk has no room for what is still to come.
    fn check_space(&self, blobs: &Path, files: &[Vec<&Listed>]) -> Result<()> {
        let size = |path: PathBuf| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        let comes = |alike: &Vec<&Listed>| {
            let file = alike[0];
            let there = size(blobs.join(&file.blob)).max(size(blobs.join(format!("{}.incomplete", file.blob))));
            file.bytes.saturating_sub(there)
        };
        let bytes: u64 = files.iter().map(comes).sum();
        match free_space(blobs) {
            Some(free) if free < bytes => Err(Error::failed(format!(
                "{}: {:.1} MB are to be downloaded and only {:.1} MB are free on the disk of {}; make room, or set HF_HUB_CACHE to a folder on \
                 another disk",
                self.name,
                bytes as f64 / 1e6,
                free as f64 / 1e6,
                self.cache.display()
            ))),
            _ => Ok(()),
        }
    }

    /// Fetches what these files hold, checks it and gives it their names.
    fn content(&self, alike: &[&Listed], blobs: &Path, progress: &Progress) -> Result<()> {
        let file = alike[0];
        let blob = blobs.join(&file.blob);
        let _lock = self.lock(file, progress)?;
        let is_whole = || std::fs::metadata(&blob).is_ok_and(|metadata| metadata.len() == file.bytes);
        if is_whole() {
            progress.skip(file.bytes);
        } else {
            let incomplete = blobs.join(format!("{}.incomplete", file.blob));
            let doing = format!("{}: {}", self.name, file.path);
            let mut told = None;
            loop {
                let before = told;
                match self.client.patiently(|| self.come(file, &incomplete, &mut told, progress)) {
                    Ok(()) => break,
                    // A connection that breaks again and again, and brings more each time, is one that works.
                    Err(Fault::Lost(_)) if told > before.or(Some(0)) => {}
                    Err(fault) => return Err(self.client.told(fault, &doing, &self.name.id)),
                }
            }
            check(file, &incomplete).map_err(|why| {
                drop(std::fs::remove_file(&incomplete));
                Error::failed(format!("{doing}: {why}; what was downloaded was removed: try again, and where it happens again check proxies and disk"))
            })?;
            std::fs::rename(&incomplete, &blob).map_err(Error::io(&blob, "move a finished download to"))?;
        }
        for file in alike {
            let place = self.snapshot().join(&file.path);
            link(&blob, &place, file.path.split('/').count()).map_err(Error::io(&place, "link"))?;
        }
        Ok(())
    }

    /// Waits until no other process fetches this file. Where a disk knows no locks there is none.
    fn lock(&self, file: &Listed, progress: &Progress) -> Result<Option<File>> {
        let folder = self.cache.join(".locks").join(self.name.folder());
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder, "create"))?;
        let place = folder.join(format!("{}.lock", file.blob));
        let options = File::options().create(true).truncate(false).write(true).open(&place);
        let lock = options.map_err(Error::io(&place, "open"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(lock)),
            Err(TryLockError::WouldBlock) => {
                progress.say(&format!("{}: another process is downloading {}; waiting for it", self.name, file.path));
                Ok(lock.lock().ok().map(|()| lock))
            }
            Err(TryLockError::Error(_)) => Ok(None),
        }
    }

    /// Goes on with a download where it stopped, as far as the connection goes. `told` is how much of it the progress knows.
    fn come(&self, file: &Listed, incomplete: &Path, told: &mut Option<u64>, progress: &Progress) -> Result<(), Fault> {
        let failed = |doing: &'static str| {
            let cache = self.cache.display().to_string();
            move |error: std::io::Error| match error.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    Fault::Other(Error::failed(format!(
                        "the disk of {cache} is full; make room and try again, and it goes on where it stopped, or set HF_HUB_CACHE to a folder on \
                     another disk"
                    )))
                }
                _ => Fault::Other(Error::io(incomplete, doing)(error)),
            }
        };
        let mut into =
            File::options().create(true).truncate(false).write(true).open(incomplete).map_err(failed("open"))?;
        let mut have = into.seek(SeekFrom::End(0)).map_err(failed("read"))?;
        if have > file.bytes {
            into.set_len(0).and_then(|()| into.rewind()).map_err(failed("write"))?;
            have = 0;
        }
        let told = told.get_or_insert_with(|| {
            progress.skip(have);
            have
        });
        if have == file.bytes {
            return Ok(());
        }
        let url =
            self.client.at(&format!("/{}/resolve/{}/{}", self.name.id, self.listing.commit, quoted(&file.path, true)));
        let range = format!("bytes={have}-");
        let headers: &[(&str, &str)] = if have > 0 { &[("range", &range)] } else { &[] };
        let answer = match self.client.send("GET", &url, headers, Sent::Nothing) {
            // What was there was more than there is.
            Err(Fault::Status { status: 416, .. }) => {
                into.set_len(0).map_err(failed("write"))?;
                return Err(Fault::Lost("the hub has no such range of the file".to_owned()));
            }
            answer => answer?,
        };
        if have > 0 && !goes_on(answer.status().as_u16(), header(answer.headers(), "content-range"), have) {
            into.set_len(0).and_then(|()| into.rewind()).map_err(failed("write"))?;
            have = 0;
        }
        let mut reader = answer.into_body().into_with_config().limit(u64::MAX).reader();
        let mut piece = vec![0; PIECE];
        loop {
            let count = match reader.read(&mut piece) {
                Ok(count) => count,
                Err(error) => return Err(fault_of(&url, &ureq::Error::from(error))),
            };
            if count == 0 {
                break;
            }
            into.write_all(&piece[..count]).map_err(failed("write"))?;
            have += count as u64;
            if have > *told {
                progress.step(have.min(file.bytes) - *told)?;
                *told = have.min(file.bytes);
            }
            if have > file.bytes {
                break;
            }
        }
        if have < file.bytes {
            return Err(Fault::Lost(format!("{url}: {have} of {} bytes came", file.bytes)));
        }
        into.sync_all().map_err(failed("write"))
    }

    /// The beginning of a file: so many bytes of it from a place on.
    pub fn beginning(&self, file: &Listed, from: u64, count: u64) -> Result<Vec<u8>> {
        let url =
            self.client.at(&format!("/{}/resolve/{}/{}", self.name.id, self.listing.commit, quoted(&file.path, true)));
        let range = format!("bytes={from}-{}", (from + count).min(file.bytes).saturating_sub(1));
        let read = || {
            let answer = self.client.send("GET", &url, &[("range", &range)], Sent::Nothing)?;
            let skipped = if answer.status().as_u16() == 206 { 0 } else { from };
            let mut reader = answer.into_body().into_with_config().limit(u64::MAX).reader();
            let mut bytes = Vec::new();
            let taken = std::io::copy(&mut reader.by_ref().take(skipped), &mut std::io::sink());
            taken
                .and_then(|_| reader.take(count).read_to_end(&mut bytes))
                .map_err(|error| fault_of(&url, &ureq::Error::from(error)))?;
            Ok(bytes)
        };
        self.client
            .patiently(read)
            .map_err(|fault| self.client.told(fault, &format!("{}: {}", self.name, file.path), &self.name.id))
    }
}

/// Whether an answer goes on where a download stopped; else it begins at the beginning.
fn goes_on(status: u16, range: Option<&str>, have: u64) -> bool {
    status == 206 && range.is_none_or(|range| range.trim_start_matches("bytes ").starts_with(&format!("{have}-")))
}

/// Says what is wrong with a file that has come.
fn check(file: &Listed, place: &Path) -> std::result::Result<(), String> {
    let length = std::fs::metadata(place).map_err(|error| error.to_string())?.len();
    if length != file.bytes {
        return Err(format!("{length} bytes came, and the hub lists {}", file.bytes));
    }
    let (what, found) = match file.hashed {
        true => ("SHA-256", hash_file(place).map_err(|error| error.to_string())?.sha256),
        false => ("hash in git", git_hash(place, length).map_err(|error| error.to_string())?),
    };
    match found == file.blob {
        true => Ok(()),
        false => Err(format!("its {what} is {found}, and the hub lists {}", file.blob)),
    }
}

/// What git calls a file of so many bytes: the SHA-1 of a blob.
fn git_hash(place: &Path, length: u64) -> std::io::Result<String> {
    let mut hasher = Sha1::new_with_prefix(format!("blob {length}\0"));
    let mut file = File::open(place)?;
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => hasher.update(&piece[..count]),
        }
    }
}

/// Gives a blob the name `place`, which lies `depth` folders deep in the snapshots: as a link, and where a disk has none as a second name or a
/// copy.
fn link(blob: &Path, place: &Path, depth: usize) -> std::io::Result<()> {
    let folder = place.parent().expect("it lies in a snapshot");
    std::fs::create_dir_all(folder)?;
    #[cfg(unix)]
    {
        // In one step, over what may be there: a link to nothing, or one that another process has made.
        let mut to = PathBuf::from("../".repeat(depth + 1));
        to.push("blobs");
        to.push(blob.file_name().unwrap_or_default());
        let name = format!(".{}.{}", place.file_name().unwrap_or_default().to_string_lossy(), std::process::id());
        let beside = folder.join(name);
        let _ = std::fs::remove_file(&beside);
        if std::os::unix::fs::symlink(&to, &beside).is_ok() {
            return std::fs::rename(&beside, place);
        }
    }
    let _ = (depth, std::fs::remove_file(place));
    std::fs::hard_link(blob, place).or_else(|_| std::fs::copy(blob, place).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_go_on_only_where_they_say_so() {
        assert!(goes_on(206, Some("bytes 5-9/10"), 5) && goes_on(206, None, 5));
        assert!(!goes_on(200, None, 5) && !goes_on(206, Some("bytes 50-99/100"), 5));
    }

    /// As `git hash-object` says.
    #[test]
    fn small_files_are_known_by_their_hash_in_git() {
        let room = tempfile::tempdir().unwrap();
        for (text, hash) in [
            ("", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
            ("test content\n", "d670460b4b4aece5915caf5c68d12f560a9fe3e4"),
        ] {
            let place = room.path().join("x");
            std::fs::write(&place, text).unwrap();
            assert_eq!(git_hash(&place, text.len() as u64).unwrap(), hash);
            let bytes = text.len() as u64;
            let file = Listed { path: "x".to_owned(), bytes, blob: hash.replacen("d6", "e6", 1), hashed: false };
            assert_eq!(check(&file, &place).is_ok(), file.blob == hash);
        }
    }

    #[cfg(unix)]
    #[test]
    fn names_are_links_to_blobs_that_stay_right_when_the_cache_moves() {
        let room = tempfile::tempdir().unwrap();
        let root = room.path().join("models--a--b");
        let blob = root.join("blobs/01");
        std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
        std::fs::write(&blob, "x").unwrap();
        for name in ["config.json", "inner/deep/x.json"] {
            let place = root.join("snapshots/c0").join(name);
            // Once more over what is there.
            for _ in 0..2 {
                link(&blob, &place, name.split('/').count()).unwrap();
            }
            assert_eq!(std::fs::read_to_string(&place).unwrap(), "x");
            assert!(std::fs::read_link(&place).unwrap().is_relative());
        }
    }
}
