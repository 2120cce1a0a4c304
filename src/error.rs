//! What can go wrong, and the exit code each failure ends with.

use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, told in one sentence that names files and tensors, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request cannot be met as it was made: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The work could not be done: exit code 1.
    #[error("{0}")]
    Failed(String),
    /// The work was stopped by who had asked for it: exit code 1.
    #[error("the work was stopped before it was done")]
    Cancelled,
    /// A file or tensor is not what it should be: exit code 1.
    #[cfg_attr(doc, doc(hidden))]
    #[error(transparent)]
    Format(#[from] formats::Error),
    /// The device failed: exit code 1.
    #[cfg_attr(doc, doc(hidden))]
    #[error(transparent)]
    Device(#[from] kernels::Error),
    /// The operating system refused: exit code 1.
    #[error("{}: cannot {doing}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted, as in "open".
        doing: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl Error {
    /// A request that cannot be met as it was made.
    #[cfg_attr(doc, doc(hidden))]
    pub fn usage(why: impl Into<String>) -> Error {
        Error::Usage(why.into())
    }

    /// Work that could not be done.
    #[cfg_attr(doc, doc(hidden))]
    pub fn failed(why: impl Into<String>) -> Error {
        Error::Failed(why.into())
    }

    /// Names the path and the attempt that `source` belongs to; for `map_err`.
    #[cfg_attr(doc, doc(hidden))]
    pub fn io(path: impl AsRef<Path>, doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, doing, source }
    }

    /// Whether the same request may well succeed later: a full disk, a file that could not be written or read, memory that could not be
    /// had, work that was stopped.
    pub fn may_pass(&self) -> bool {
        use std::error::Error as _;
        // What we find fault with ourselves has no number of the system's.
        let by_system = |source: &std::io::Error| source.raw_os_error().is_some();
        match self {
            Error::Io { source, .. } => by_system(source),
            Error::Format(error) => error.source().and_then(|source| source.downcast_ref()).is_some_and(by_system),
            Error::Cancelled => true,
            Error::Device(error) => matches!(error, kernels::Error::Device(_)),
            Error::Usage(_) | Error::Failed(_) => false,
        }
    }

    /// 2 for a request that cannot be met, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            _ => 1,
        }
    }
}
