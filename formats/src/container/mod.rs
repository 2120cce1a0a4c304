//! File types that hold tensors, and what lies beside them: checked wholly when opened, then handed out as plain views.

pub mod cache;
pub mod file;
pub mod gguf;
pub mod imatrix;
pub mod placed;
pub mod safetensors;
pub mod sentencepiece;
pub mod shards;
pub mod stand_in;

use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// A file's content.
#[derive(Debug)]
enum Bytes {
    Mapped { map: Mmap, path: PathBuf, identity: file::Identity },
    Owned(Vec<u8>),
}

impl Bytes {
    /// Maps a file that is not empty into memory.
    fn map(path: &Path) -> Result<Bytes> {
        let open = || -> std::io::Result<Option<Bytes>> {
            let file = file::open(path)?;
            let identity = file::Identity::of(&file)?;
            if file.metadata()?.len() == 0 {
                return Ok(None);
            }
            // SAFETY: as with every memory map, another process that shortens the file while it is read would end this
            // process with a bus error; nothing is ever written through the map.
            let map = unsafe { Mmap::map(&file) }?;
            Ok(Some(Bytes::Mapped { map, path: path.to_path_buf(), identity }))
        };
        match open() {
            Ok(Some(bytes)) => Ok(bytes),
            Ok(None) => Err(Error::malformed(stand_in::stand_in(b"").expect("nothing is no file")).in_file(path)),
            Err(source) => Err(Error::io("open", source).in_file(path)),
        }
    }

    /// Fails when the file is not any more what it was when it was mapped.
    fn check_unchanged(&self) -> Result<()> {
        match self {
            Bytes::Owned(_) => Ok(()),
            Bytes::Mapped { path, identity, .. } => {
                identity.check(path).map_err(|source| Error::io("be relied on", source).in_file(path))
            }
        }
    }

    /// Tells the system that a part will be read soon.
    fn announce(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped { map, .. } = self
            && !range.is_empty()
        {
            // Failure only costs time.
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Gives the pages that lie wholly or partly in `range` back to the system; they are read again when next touched.
    fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped { map, .. } = self
            && !range.is_empty()
        {
            // SAFETY: the map is shared and read-only, so dropping its pages loses nothing. Failure only costs memory.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped { map, .. } => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}
