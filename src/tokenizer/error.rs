//! Why texts and tokenizers cannot be used.

use std::path::{Path, PathBuf};

use calibration::samples::{PRESETS, SampleError};

use crate::error::Error;

/// Why a text or a tokenizer could not be read: one sentence with the file.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// There is neither a file nor a preset of this name.
    #[error("{name}: no such file; {hint}give a text (.txt, .jsonl, .json, .csv, .tsv, .parquet) or a bundled preset: {presets}", presets = PRESETS.join(", "))]
    Missing {
        /// What the user gave.
        name: String,
        /// What could be meant, as a question that ends with a space, or empty.
        hint: String,
    },
    /// The file is there, and reading it failed.
    #[error("{path}: cannot be read: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        error: std::io::Error,
    },
    /// A folder, where one file is read.
    #[error("{path}: a folder; give one file{hint}", path = path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Files in it that could be meant; begins with a separator, or is empty.
        hint: String,
    },
    /// A template is not text.
    #[error("{path}: not UTF-8 text: byte {offset} cannot be read", path = path.display())]
    Encoding {
        /// The file.
        path: PathBuf,
        /// Bytes before the first bad one.
        offset: usize,
    },
    /// The model folder has no tokenizer that can be read.
    #[error("{folder}: no tokenizer.json and no tokenizer.model; the text cannot be turned into tokens without one{hint}", folder = folder.display())]
    NoTokenizer {
        /// The model folder.
        folder: PathBuf,
        /// What to do about it, where that is known; begins with a separator.
        hint: String,
    },
    /// Evaluation scores running text only.
    #[error(
        "{name}: evaluation needs running text, but this file holds conversations; give a .txt file, or records with a `text`"
    )]
    NotPlain {
        /// The file.
        name: String,
    },
    /// The tokenizer gives an id that the model has no embedding for.
    #[error("{folder}: the tokenizer gives token {id}, and the model has {rows} embeddings; is tokenizer.json another model's?", folder = folder.display())]
    Foreign {
        /// The model folder.
        folder: PathBuf,
        /// The token.
        id: u32,
        /// Rows of the embedding, by config.json.
        rows: u64,
    },
    /// A file of a model that has to do with texts is unusable.
    #[error("{path}: {problem}", path = path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The text itself is unusable.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

impl TextError {
    /// Puts the model's folder before the name of its file; a GGUF file has all in it. Errors of the text itself stay.
    pub(crate) fn of_model(model: &Path, error: SampleError) -> TextError {
        let (file, part, problem) = match error {
            SampleError::Tokenizer { file, problem } => (file, "tokenizer: ", problem),
            SampleError::Template { file, problem } | SampleError::Endless { file, problem } => {
                (file, "chat template: ", problem)
            }
            other => return TextError::Sample(other),
        };
        let (path, single) = if model.is_dir() { (model.join(&file), false) } else { (model.to_owned(), true) };
        // Of a file with one thing in it, it goes without saying.
        let part = if single || part.starts_with("chat") { part } else { "" };
        TextError::Model { path, problem: format!("{part}{problem}") }
    }
}

impl From<TextError> for Error {
    fn from(error: TextError) -> Error {
        Error::Failed(error.to_string())
    }
}
