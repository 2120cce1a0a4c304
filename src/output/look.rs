//! How a file looks: by that it is known again without being read.

use std::path::Path;

/// Size, time and number of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Its size in bytes.
    pub bytes: u64,
    /// When it was written, in nanoseconds since 1970.
    pub modified: String,
    /// Its number on its disk; 0 where the system has none.
    pub inode: u64,
}

impl Look {
    /// That of the file at `path`; `None` where there is none.
    pub fn of(path: &Path) -> Option<Look> {
        let metadata = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
        let since = metadata.modified().ok()?.duration_since(std::time::UNIX_EPOCH);
        let modified = since.map_or(0, |time| time.as_nanos()).to_string();
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
        #[cfg(not(unix))]
        let inode = 0;
        Some(Look { bytes: metadata.len(), modified, inode })
    }
}
