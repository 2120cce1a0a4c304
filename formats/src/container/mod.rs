//! File types that hold tensors: checked wholly when opened, then handed out as plain views.

pub mod gguf;
pub mod safetensors;

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps a file that is not empty into memory.
fn map(path: &Path) -> Result<Mmap> {
    let open = || -> std::io::Result<Option<Mmap>> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(None);
        }
        // SAFETY: as with every memory map, another process that shortens the file while it is read would end this
        // process with a bus error; nothing is ever written through the map.
        unsafe { Mmap::map(&file) }.map(Some)
    };
    match open() {
        Ok(Some(map)) => Ok(map),
        Ok(None) => Err(Error::malformed("the file is empty").in_file(path)),
        Err(source) => Err(Error::io("open", source).in_file(path)),
    }
}

/// Gives the pages that lie wholly or partly in `range` back to the system; they are read again when next touched.
fn release(map: &Mmap, range: Range<usize>) {
    #[cfg(unix)]
    if !range.is_empty() {
        // SAFETY: the map is shared and read-only, so dropping its pages loses nothing. Failure only costs memory.
        let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
    }
    #[cfg(not(unix))]
    let _ = (map, range);
}
