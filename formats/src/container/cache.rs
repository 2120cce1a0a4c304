//! What was worked out once and may be needed again, in the user's cache folder: files that end with the hash of what is before it, so that a
//! damaged one is not taken for what it was.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Result, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

/// Bytes of a hash.
const HASH: u64 = 32;

/// The folder for what is called `name`: in `QUANTC_CACHE`, or in the user's cache folder. `None` where neither is known.
pub fn folder(name: &str) -> Option<PathBuf> {
    let said = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || said("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let home = || Some(said("HOME")?.join(".cache"));
    let own = said("QUANTC_CACHE").or_else(|| Some(cache().or_else(home)?.join("quantc")))?;
    Some(own.join(name))
}

/// What passes is hashed.
struct Hashed<T> {
    inner: T,
    hash: Sha256,
}

impl<T: Read> Read for Hashed<T> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}

impl<T: Write> Write for Hashed<T> {
    fn write(&mut self, buffer: &[u8]) -> Result<usize> {
        let written = self.inner.write(buffer)?;
        self.hash.update(&buffer[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> Result<()> {
        self.inner.flush()
    }
}

/// What `take` makes of the file that [`write`] made; `None` where there is none, and where it is not whole.
pub fn read<T>(path: &Path, take: impl FnOnce(&mut dyn Read) -> Result<T>) -> Option<T> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len().checked_sub(HASH)?;
    let mut content =
        BufReader::with_capacity(1 << 20, Hashed { inner: (&mut file).take(length), hash: Sha256::new() });
    let taken = take(&mut content).ok()?;
    // What was not asked for belongs to the hash too.
    std::io::copy(&mut content, &mut std::io::sink()).ok()?;
    let found = content.into_inner().hash.finalize();
    let mut expected = [0; HASH as usize];
    file.read_exact(&mut expected).ok()?;
    (found[..] == expected).then_some(taken)
}

/// Writes a file, with the folder it lies in, in one step: whoever reads it at the same time finds the old one or the new one.
///
/// Fails where it cannot be written, and leaves nothing.
pub fn write(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("")))?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    let own = path.with_extension(format!("{}-{now}", std::process::id()));
    let written = || -> Result<()> {
        let mut content = BufWriter::with_capacity(1 << 20, Hashed { inner: File::create(&own)?, hash: Sha256::new() });
        fill(&mut content)?;
        let Hashed { mut inner, hash } = content.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        inner.write_all(&hash.finalize())?;
        std::fs::rename(&own, path)
    };
    written().inspect_err(|_| drop(std::fs::remove_file(&own)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_not_taken() {
        let folder = std::env::temp_dir().join(format!("quantc-cache-{}", std::process::id()));
        let path = folder.join("kernels").join("image.bin");
        let all = |content: &mut dyn Read| {
            let mut bytes = Vec::new();
            content.read_to_end(&mut bytes).map(|_| bytes)
        };
        write(&path, |file| file.write_all(b"machine code")).unwrap();
        assert_eq!(read(&path, all).unwrap(), b"machine code");
        let first = |content: &mut dyn Read| {
            let mut byte = [0];
            content.read_exact(&mut byte).map(|()| byte[0])
        };
        assert_eq!(read(&path, first), Some(b'm'));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[3] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(read(&path, all).is_none());
        assert!(read(&path, first).is_none(), "damage behind what was taken counts");
        std::fs::write(&path, b"short").unwrap();
        assert!(read(&path, all).is_none());
        assert!(write(&path, |_| Err(std::io::Error::other("full"))).is_err());
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left of it");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
