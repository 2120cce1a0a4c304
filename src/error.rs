//! What can go wrong, and the exit code each failure ends with.

use std::path::{Path, PathBuf};

use crate::output::hidden_name;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, told in one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be met as it was made: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The work could not be done: exit code 1.
    #[error("{0}")]
    Failed(String),
    /// A file or tensor is not what it should be: exit code 1.
    #[error(transparent)]
    Format(#[from] formats::Error),
    /// A text or tokenizer cannot be used: exit code 1.
    #[error(transparent)]
    Text(#[from] crate::text::TextError),
    /// The device failed: exit code 1.
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
    pub fn usage(why: impl Into<String>) -> Error {
        Error::Usage(why.into())
    }

    /// Work that could not be done.
    pub fn failed(why: impl Into<String>) -> Error {
        Error::Failed(why.into())
    }

    /// Names the path and the attempt that `source` belongs to; for `map_err`.
    pub fn io(path: impl AsRef<Path>, doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, doing, source }
    }

    /// Names the files of `output` as they will be called; while they are written they lie in a hidden folder, of which
    /// the user knows nothing. `single` says that the output is a file, or its parts, and no folder.
    pub fn of_output(self, output: &Path, single: bool) -> Error {
        let Some(name) = output.file_name().map(|name| name.to_string_lossy()) else { return self };
        let (told, hidden) = (self.to_string(), hidden_name(&name));
        if !told.contains(&hidden) {
            return self;
        }
        let separator = std::path::MAIN_SEPARATOR;
        let here = format!(".{separator}{hidden}");
        let told = match output.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => told,
            _ => told.replace(&here, &hidden),
        };
        let inside = if single { String::new() } else { format!("{name}{separator}") };
        let told = told.replace(&format!("{hidden}{separator}"), &inside).replace(&hidden, &name);
        match self {
            Error::Usage(_) => Error::Usage(told),
            _ => Error::Failed(told),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_called_what_it_will_be_called() {
        let told = |output: &str, staged: &str, single| {
            let path = staged.replace("HIDDEN", &hidden_name(Path::new(output).file_name().unwrap().to_str().unwrap()));
            let source = std::io::Error::other("full");
            Error::io(path, "write")(source).of_output(Path::new(output), single).to_string()
        };
        let path = |parts: &[&str]| parts.iter().collect::<PathBuf>().display().to_string();
        for (output, staged, single, expected) in [
            ("out", path(&[".", "HIDDEN", "config.json"]), false, path(&["out", "config.json"])),
            ("a/out", path(&["a", "HIDDEN", "config.json"]), false, path(&["a", "out", "config.json"])),
            ("a/out", path(&["a", "HIDDEN"]), false, path(&["a", "out"])),
            ("m.gguf", path(&[".", "HIDDEN", "m-00001-of-00002.gguf"]), true, path(&["m-00001-of-00002.gguf"])),
            ("a/m.gguf", path(&["a", "HIDDEN", "m.gguf"]), true, path(&["a", "m.gguf"])),
            ("a/m.gguf", path(&["a", "HIDDEN"]), true, path(&["a", "m.gguf"])),
            ("out", path(&["model", "config.json"]), false, path(&["model", "config.json"])),
        ] {
            assert_eq!(told(output, &staged, single), format!("{expected}: cannot write: full"));
        }
    }
}
