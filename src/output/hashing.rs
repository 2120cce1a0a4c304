//! Hashes of the files that are read and written, made beside other work.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use formats::Follower;
use formats::container::file;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::report::FileReport;

/// Files that are hashed beside other work.
pub type Hashing = JoinHandle<Result<Vec<FileReport>>>;

/// Hashes files on threads of their own, up to a quarter of the cores.
pub fn hash_beside(paths: Vec<PathBuf>) -> Hashing {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    hash_on((cores / 4).max(1), paths)
}

fn hash_on(threads: usize, paths: Vec<PathBuf>) -> Hashing {
    std::thread::spawn(move || {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(path) = paths.get(index) else { return done };
                done.push((index, hash_file(path)));
            }
        };
        let mut done: Vec<(usize, Result<FileReport>)> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads.min(paths.len())).map(|_| scope.spawn(work)).collect();
            workers.into_iter().flat_map(|worker| worker.join().expect("hashing does not panic")).collect()
        });
        done.sort_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, file)| file).collect()
    })
}

/// Hashes files as they are written, each on a thread of its own: none waits for another to be complete.
pub fn hash_written(files: Vec<Follower>) -> Hashing {
    hash_each(files.into_iter().map(|file| (file.path().to_owned(), file)).collect())
}

fn hash_each<R: Read + Send + 'static>(files: Vec<(PathBuf, R)>) -> Hashing {
    let begin = |(path, mut file): (PathBuf, R)| std::thread::spawn(move || hash(&path, &mut file));
    let workers: Vec<JoinHandle<Result<FileReport>>> = files.into_iter().map(begin).collect();
    let end = |worker: JoinHandle<_>| worker.join().map_err(|_| Error::failed("hashing failed"))?;
    std::thread::spawn(move || workers.into_iter().map(end).collect())
}

/// Waits, on a thread of its own, until what is being hashed is on the disk as well, which `finish` sees to.
pub fn flushed(finish: impl FnOnce() -> formats::Result<()> + Send + 'static, hashing: Hashing) -> Hashing {
    std::thread::spawn(move || {
        finish()?;
        hashed(hashing)
    })
}

/// Waits for what is being hashed.
pub fn hashed(hashing: Hashing) -> Result<Vec<FileReport>> {
    hashing.join().map_err(|_| Error::failed("hashing failed"))?
}

/// Hashes a file without keeping it in memory.
pub fn hash_file(path: &Path) -> Result<FileReport> {
    let mut file = file::open(path).map_err(Error::io(path, "open"))?;
    let length = file.metadata().map_err(Error::io(path, "open"))?.len();
    let report = hash(path, &mut file)?;
    if report.bytes != length {
        return Err(Error::failed(format!(
            "{}: {} of its {length} bytes could be read; its disk failed, or it was written to",
            path.display(),
            report.bytes
        )));
    }
    Ok(report)
}

/// Bytes as lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hash(path: &Path, file: &mut impl Read) -> Result<FileReport> {
    let mut hash = Sha256::new();
    // Small enough to be hashed out of the nearest caches.
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer).map_err(Error::io(path, "read"))?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        bytes += read as u64;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(FileReport { name, bytes, sha256: hex(&hash.finalize()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first of two files is complete only when the second is hashed, as one whose first tensor comes last.
    #[test]
    fn no_file_waits_for_another_to_be_written() {
        struct Last(Option<std::sync::mpsc::Receiver<()>>);
        impl Read for Last {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                let gone = self.0.take().map(|gone| gone.recv_timeout(std::time::Duration::from_secs(20)));
                match gone {
                    Some(Err(std::sync::mpsc::RecvTimeoutError::Timeout)) => Err(std::io::Error::other("nobody came")),
                    _ => Ok(0),
                }
            }
        }
        struct First(#[expect(dead_code, reason = "what it takes with it is what counts")] std::sync::mpsc::Sender<()>);
        impl Read for First {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                Ok(0)
            }
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        let (last, first): (Box<dyn Read + Send>, Box<dyn Read + Send>) =
            (Box::new(Last(Some(receiver))), Box::new(First(sender)));
        let files =
            hashed(hash_each(vec![(PathBuf::from("a/last"), last), (PathBuf::from("a/first"), first)])).unwrap();
        assert_eq!(files.iter().map(|file| &file.name[..]).collect::<Vec<_>>(), ["last", "first"]);
    }

    #[test]
    fn files_are_hashed_in_order_whoever_does_it() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..7).map(|i| dir.path().join(format!("{i}"))).collect();
        for (path, byte) in paths.iter().zip(b"abcdefg") {
            std::fs::write(path, vec![*byte; 1 << (byte - b'a')]).unwrap();
        }
        let expected = hashed(hash_on(1, paths.clone())).unwrap();
        // printf a | sha256sum
        assert_eq!(expected[0].sha256, "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb");
        let found = hashed(hash_on(3, paths.clone())).unwrap();
        let told = |all: &[FileReport]| format!("{all:?}");
        assert!(told(&found) == told(&expected) && found.len() == 7);
        assert!(hashed(hash_on(3, Vec::new())).unwrap().is_empty());
        let lost = [paths, vec![dir.path().join("lost")]].concat();
        assert!(hashed(hash_on(3, lost)).unwrap_err().to_string().contains("lost: cannot open"));
    }
}
