//! Files as inputs: plain ones only, read up to a bound, and told apart from what they become while they are used.
//!
//! A pipe or a device in a file's place would hang a reader, or never end; a file that changes under the reader gives values that nobody
//! can account for.

use std::fs::{File, Metadata};
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;
use std::time::SystemTime;

/// Bytes of the largest file that is read whole as part of a model's description (256 MiB); the largest known tokenizers have 40.
pub const DESCRIPTION: u64 = 256 << 20;

/// Opens a plain file. Fails with a reason for a folder, a pipe, a socket, a device and what lies in /proc, without waiting for any of
/// them.
pub fn open(path: &Path) -> Result<File> {
    // Before it is opened, for opening a pipe waits for its writer.
    check_plain(&std::fs::metadata(path)?)?;
    #[cfg(target_os = "linux")]
    if path.canonicalize()?.starts_with("/proc") {
        // Some of those wait for what the kernel has to say, or have no end.
        return Err(Error::new(ErrorKind::InvalidInput, "it is a file of the kernel's, and a plain file is needed"));
    }
    File::open(path)
}

/// The content of a plain file of at most `limit` bytes.
///
/// A file that the system says is longer is not read at all. That it is not longer is not relied on: those below /proc have no length,
/// and some of them no end.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let too_large = || Error::new(ErrorKind::FileTooLarge, format!("it is larger than {} MiB", limit >> 20));
    let file = open(path)?;
    if file.metadata()?.len() > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(too_large());
    }
    Ok(bytes)
}

/// Why Python's json does not read these bytes, whatever they say: by how they are encoded.
pub fn misencoded(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0xEF, 0xBB, 0xBF, ..] => {
            Some("it begins with a byte order mark, which Python's json refuses; save it as UTF-8 without one")
        }
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => Some("it is UTF-16; save it as UTF-8 without a byte order mark"),
        _ => None,
    }
}

/// [`read`] of a file in UTF-8.
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    String::from_utf8(read(path, limit)?).map_err(|_| Error::new(ErrorKind::InvalidData, "it is not UTF-8 text"))
}

fn check_plain(metadata: &Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let what = if metadata.is_dir() { "a folder" } else { kind(metadata) };
    Err(Error::new(ErrorKind::InvalidInput, format!("it is {what}, and a plain file is needed")))
}

#[cfg(unix)]
fn kind(metadata: &Metadata) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    let kind = metadata.file_type();
    match () {
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    }
}

#[cfg(not(unix))]
fn kind(_: &Metadata) -> &'static str {
    "no file"
}

/// What tells a file from another one, and from what it was before it was written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    bytes: u64,
    modified: Option<SystemTime>,
    /// Device and number of the file on it, where the system has such.
    number: Option<(u64, u64)>,
}

impl Identity {
    /// That of an opened file.
    pub fn of(file: &File) -> Result<Identity> {
        Ok(Self::from_metadata(&file.metadata()?))
    }

    /// How many bytes the file had when it was looked at.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// That of a file, or of what a link leads to, of which this is known.
    pub fn from_metadata(metadata: &Metadata) -> Identity {
        #[cfg(unix)]
        let number = {
            use std::os::unix::fs::MetadataExt;
            Some((metadata.dev(), metadata.ino()))
        };
        #[cfg(not(unix))]
        let number = None;
        Identity { bytes: metadata.len(), modified: metadata.modified().ok(), number }
    }

    /// Fails with the reason when `path` is not the file any more that it was, or was written to.
    pub fn check(&self, path: &Path) -> Result<()> {
        self.check_now(&std::fs::metadata(path)?)
    }

    /// Fails with the reason when `file` is another file than it was, or was written to.
    pub fn check_opened(&self, file: &File) -> Result<()> {
        self.check_now(&file.metadata()?)
    }

    fn check_now(&self, metadata: &Metadata) -> Result<()> {
        let now = Self::from_metadata(metadata);
        let what = match () {
            () if now == *self => return Ok(()),
            () if now.number != self.number => "it was replaced by another file while it was read".to_owned(),
            () if now.bytes != self.bytes => {
                format!("it had {} bytes and has {} now: it was written to while it was read", self.bytes, now.bytes)
            }
            () => "it was written to while it was read".to_owned(),
        };
        Err(Error::new(ErrorKind::InvalidData, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_files_are_read_and_only_up_to_the_bound() {
        let room = tempfile::tempdir().unwrap();
        let path = room.path().join("f");
        std::fs::write(&path, [0; 8]).unwrap();
        assert_eq!(read(&path, 8).unwrap().len(), 8);
        assert_eq!(read(&path, 7).unwrap_err().kind(), ErrorKind::FileTooLarge);
        assert_eq!(read_text(&path, 8).unwrap(), "\0".repeat(8));
        std::fs::write(&path, [0xff]).unwrap();
        assert!(read_text(&path, 8).unwrap_err().to_string().contains("UTF-8"));
        assert!(read(room.path(), 8).unwrap_err().to_string().starts_with("it is a folder"));
        assert_eq!(read(&room.path().join("none"), 8).unwrap_err().kind(), ErrorKind::NotFound);
        #[cfg(unix)]
        {
            let device = read(Path::new("/dev/zero"), 8).unwrap_err().to_string();
            assert!(device.starts_with("it is a device"), "{device}");
            let pipe = room.path().join("pipe");
            assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
            assert!(read(&pipe, 8).unwrap_err().to_string().starts_with("it is a pipe"));
        }
    }

    #[test]
    fn a_change_is_seen() {
        let room = tempfile::tempdir().unwrap();
        let path = room.path().join("f");
        std::fs::write(&path, b"old").unwrap();
        let identity = Identity::of(&open(&path).unwrap()).unwrap();
        identity.check(&path).unwrap();
        std::fs::write(&path, b"newer").unwrap();
        assert_eq!(
            identity.check(&path).unwrap_err().to_string(),
            "it had 3 bytes and has 5 now: it was written to while it was read"
        );
        std::fs::write(&path, b"new").unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(identity.check(&path).unwrap_err().to_string(), "it was written to while it was read");
        std::fs::write(room.path().join("g"), b"old").unwrap();
        std::fs::rename(room.path().join("g"), &path).unwrap();
        assert!(identity.check(&path).unwrap_err().to_string().contains("replaced by another file"));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(identity.check(&path).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
