//! What can go wrong when bytes and tensors meet: one sentence with the file, the tensor, what was expected and found.

use std::fmt;
use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, with the file and the tensor it was met in once a caller has added them.
#[derive(Debug)]
pub struct Error {
    /// The file, when known.
    pub file: Option<PathBuf>,
    /// The tensor or module, when the failure is about one.
    pub tensor: Option<String>,
    /// What was wrong.
    pub kind: Kind,
}

/// What was wrong, without where.
#[derive(Debug, thiserror::Error)]
pub enum Kind {
    /// The operating system refused.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was attempted, as in "open" or "write 4096 bytes".
        doing: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The bytes do not follow the format.
    #[error("{0}")]
    Malformed(String),
    /// Two descriptions of one thing disagree.
    #[error("{what} is {found}, expected {expected}")]
    Mismatch {
        /// The thing described.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Something that must be there is not.
    #[error("{0} is missing")]
    Missing(String),
    /// Valid as far as can be told, but not something this crate reads or writes.
    #[error("{0}")]
    Unsupported(String),
    /// The caller asked for something that cannot be written.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// An input or output error while `doing` something ("open", "write 4096 bytes").
    pub fn io(doing: impl Into<String>, source: std::io::Error) -> Error {
        Kind::Io { doing: doing.into(), source }.into()
    }

    /// The bytes do not follow the format; `why` is a clause without a full stop.
    pub fn malformed(why: impl Into<String>) -> Error {
        Kind::Malformed(why.into()).into()
    }

    /// `what` is `found` but should be `expected`.
    pub fn mismatch(what: impl Into<String>, expected: impl fmt::Display, found: impl fmt::Display) -> Error {
        Kind::Mismatch { what: what.into(), expected: expected.to_string(), found: found.to_string() }.into()
    }

    /// `what` is not there.
    pub fn missing(what: impl Into<String>) -> Error {
        Kind::Missing(what.into()).into()
    }

    /// Not something this crate reads or writes.
    pub fn unsupported(why: impl Into<String>) -> Error {
        Kind::Unsupported(why.into()).into()
    }

    /// A request that cannot be met.
    pub fn invalid(why: impl Into<String>) -> Error {
        Kind::Invalid(why.into()).into()
    }

    /// Adds the file, unless one is already named.
    pub fn in_file(mut self, file: impl AsRef<Path>) -> Error {
        self.file.get_or_insert_with(|| file.as_ref().to_path_buf());
        self
    }

    /// Adds the tensor or module, unless one is already named.
    pub fn in_tensor(mut self, tensor: impl Into<String>) -> Error {
        self.tensor.get_or_insert_with(|| tensor.into());
        self
    }
}

impl From<Kind> for Error {
    fn from(kind: Kind) -> Error {
        Error { file: None, tensor: None, kind }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(tensor) = &self.tensor {
            write!(f, "tensor `{tensor}`: ")?;
        }
        self.kind.fmt(f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            Kind::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_is_one_sentence_with_file_and_tensor() {
        let error = Error::invalid("a row of 11000 values does not split into groups of 128")
            .in_tensor("model.layers.7.mlp.down_proj.weight")
            .in_file("model-00002-of-00004.safetensors")
            .in_tensor("not this one: the innermost name wins");
        assert_eq!(
            error.to_string(),
            "model-00002-of-00004.safetensors: tensor `model.layers.7.mlp.down_proj.weight`: \
             a row of 11000 values does not split into groups of 128"
        );
    }
}
