//! From text to token ids: what calibration observes and what evaluation scores.
//!
//! Nothing here opens a file; callers pass the bytes and a name for messages. The parts:
//! `parse` tells what a file is and turns it into documents, with `json` for JSON as Python has it, `shape` for what no name says, `record` for one record of a data set,
//! `columns` for those that lie column by column, `table` and `parquet` for files of them, and `records` and `guess` for what the user is
//! told; `chat` renders conversations through the model's own template, with `spelling` for what it says otherwise than the engine reads,
//! and `jinja`, `builtins`, `strings`, `dumps` and `printed` for what the engine lacks or has otherwise; `tokenizer` wraps tokenizer.json, `cuts` and
//! `pattern` say where a text may be cut for it, `select` draws calibration sequences and cuts evaluation windows.

mod builtins;
mod chat;
mod columns;
mod cuts;
mod dumps;
#[cfg(test)]
mod golden;
mod guard;
mod guess;
mod jinja;
mod json;
mod media;
mod parquet;
mod parse;
mod pattern;
mod printed;
mod record;
mod records;
mod select;
mod shape;
mod spelling;
mod strings;
mod table;
#[cfg(test)]
mod templates {
    mod tests;
}
#[cfg(test)]
mod tests;
mod tokenizer;

use std::borrow::Cow;

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use chat::ChatTemplate;
pub use guard::{GUARDED, Guard, Limits, guarded};
pub use parse::{parse_txt, read};
pub use select::{needed, select, windows};
pub use tokenizer::{Beginning, Tokenizer, TokenizerConfig};

/// Names of the bundled calibration texts, the default first.
pub const PRESETS: &[&str] = &["mixed"];

/// What went wrong between a text and its token ids: one sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// A record that is not one of the known forms, where too many are not.
    #[error("{name}, {place}: {problem}")]
    Record {
        /// The file, as the user called it.
        name: String,
        /// Where in it, as `line 3` or `record 3`.
        place: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// A file that is no text, or of a kind that is not read.
    #[error("{name}: {problem}")]
    Unread {
        /// The file, as the user called it.
        name: String,
        /// What it is and what to do about it.
        problem: String,
    },
    /// A text in another encoding.
    #[error("{name}: not UTF-8 text: byte {offset} cannot be read; save it as UTF-8")]
    Encoding {
        /// The file, as the user called it.
        name: String,
        /// Bytes before the first bad one.
        offset: usize,
    },
    /// A text in which there is nothing to read.
    #[error("{name}: the text is empty")]
    Empty {
        /// The file or preset.
        name: String,
    },
    /// A text with fewer tokens than one sequence.
    #[error(
        "{name}: {found} tokens do not fill one sequence of {needed}; give more text, or --seq-len {found} or less"
    )]
    TooShort {
        /// The file or preset.
        name: String,
        /// Tokens in the whole text.
        found: usize,
        /// Tokens of one sequence.
        needed: usize,
    },
    /// An evaluation text with fewer tokens than one window.
    #[error(
        "{name}: {found} tokens are fewer than one window of {context}; give more text, or --context {found} or less"
    )]
    NoWindow {
        /// The file or preset.
        name: String,
        /// Tokens in the whole text.
        found: usize,
        /// Tokens of one window.
        context: usize,
    },
    /// A sequence length, window or count that cannot be served.
    #[error("{0}")]
    Length(String),
    /// tokenizer.json or tokenizer_config.json cannot be read, or a text cannot be encoded.
    #[error("{file}: {problem}")]
    Tokenizer {
        /// The file, by its usual name.
        file: String,
        /// The tokenizer library's own words.
        problem: String,
    },
    /// The chat template has a syntax error or refused a conversation.
    #[error("{file}: chat template: {problem}")]
    Template {
        /// The file in which it stands.
        file: String,
        /// The template's own words, or what is wrong with it.
        problem: String,
    },
    /// The chat template takes so much that trying it on another conversation is of no use.
    #[error("{file}: chat template: {problem}")]
    Endless {
        /// The file in which it stands.
        file: String,
        /// What it takes.
        problem: String,
    },
}

/// One turn of a conversation, as chat templates see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant` or whatever the template knows.
    pub role: String,
    /// The text of the turn, its text parts joined where the record lists parts; null where the turn only calls tools; what a tool
    /// gave back may be any value.
    pub content: Value,
    /// Every other field of the record, handed to the template as it is (`tool_calls`, `name`, …).
    pub extra: serde_json::Map<String, Value>,
}

impl Message {
    /// A turn with nothing but its role and text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Value::String(content.into()), extra: serde_json::Map::new() }
    }

    /// Whether it holds no text and calls nothing.
    fn is_blank(&self) -> bool {
        self.text().trim().is_empty() && !self.extra.contains_key("tool_calls")
    }

    /// The content as running text.
    pub fn text(&self) -> Cow<'_, str> {
        match &self.content {
            Value::String(text) => Cow::Borrowed(text),
            Value::Null => Cow::Borrowed(""),
            other => Cow::Owned(other.to_string()),
        }
    }
}

/// One piece of text that stands by itself.
#[derive(Clone, Debug, PartialEq)]
pub enum Document {
    /// Running text.
    Plain(String),
    /// A conversation, for the model's chat template.
    Chat {
        /// Its turns.
        messages: Vec<Message>,
        /// What the assistant may call, for the template's `tools`; often empty.
        tools: Vec<Value>,
    },
    /// An instruction and its answer: a two-turn conversation where there is a chat template, else the two joined.
    Pair {
        /// What is asked.
        prompt: String,
        /// What is answered.
        completion: String,
    },
}

impl Document {
    /// Whether it holds nothing but white space.
    fn is_blank(&self) -> bool {
        match self {
            Document::Plain(text) => text.trim().is_empty(),
            Document::Chat { messages, .. } => messages.is_empty(),
            Document::Pair { prompt, completion } => prompt.trim().is_empty() && completion.trim().is_empty(),
        }
    }
}

/// How many records a file has; all 0 for running text.
#[derive(Clone, Debug, Default, PartialEq)]
struct Tally {
    found: usize,
    /// Left out in reading them.
    lost: usize,
    /// Blank ones, which are among the documents.
    blank: Option<LeftOut>,
}

/// Records that were left out for one reason.
#[derive(Clone, Debug, PartialEq)]
struct LeftOut {
    /// The first of them, as `line 3` or `row 3`.
    place: String,
    /// What it lacks.
    problem: String,
    /// How many they are.
    count: usize,
}

/// A text: documents under one name.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    /// File name or preset, for messages and the report.
    pub name: String,
    /// SHA-256 of the source text, lower-case hex.
    pub sha256: String,
    /// In the order of the file; blank lines of a data set are among them, since evaluation joins all.
    pub documents: Vec<Document>,
    /// What was left out or guessed in reading it, each a sentence for the report.
    pub notes: Vec<String>,
    tally: Tally,
}

impl Text {
    /// Bytes of all that is said in it.
    pub fn bytes(&self) -> u64 {
        let of = |document: &Document| match document {
            Document::Plain(text) => text.len(),
            Document::Pair { prompt, completion } => prompt.len() + completion.len(),
            Document::Chat { messages, .. } => messages.iter().map(|message| message.text().len()).sum(),
        };
        self.documents.iter().map(|document| of(document) as u64).sum()
    }

    /// What there is to say of blank records, which calibration leaves out and evaluation keeps.
    pub fn without_blank(&self) -> Option<String> {
        let Tally { found, blank, .. } = &self.tally;
        let LeftOut { place, count, .. } = blank.as_ref()?;
        let name = &self.name;
        Some(format!(
            "{count} of {found} records of {name} are blank and were left out of calibration; the first is {place}"
        ))
    }

    /// The text as one string, as evaluation reads it: `None` when any document is a conversation or a pair.
    ///
    /// Documents are joined by a blank line; a text with a single document comes back byte for byte.
    pub fn plain(&self) -> Option<Cow<'_, str>> {
        if let [Document::Plain(text)] = &self.documents[..] {
            return Some(Cow::Borrowed(text));
        }
        let parts: Option<Vec<&str>> = self
            .documents
            .iter()
            .map(|document| match document {
                Document::Plain(text) => Some(text.as_str()),
                Document::Chat { .. } | Document::Pair { .. } => None,
            })
            .collect();
        parts.map(|parts| Cow::Owned(parts.join("\n\n")))
    }
}

/// Token windows for calibration: each inner `Vec` is one sequence of `source.seq_len` ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// The sequences, in the order in which they are to be run.
    pub sequences: Vec<Vec<u32>>,
    /// Where they come from, for the report.
    pub source: SampleSource,
}

/// Where calibration sequences come from; equal sources mean equal sequences.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SampleSource {
    /// File name or preset.
    pub name: String,
    /// SHA-256 of the source text, lower-case hex.
    pub text_sha256: String,
    /// SHA-256 of all ids, sequence after sequence, each as a little-endian u32; lower-case hex.
    pub tokens_sha256: String,
    /// Documents in the text, blank ones not counted.
    pub documents: usize,
    /// Conversations that the model's chat template refused and that were left out.
    pub refused: usize,
    /// The template's words on the first of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    /// Conversations of which the chat template wrote nothing and that were left out.
    pub unwritten: usize,
    /// Conversations and pairs rendered through the chat template.
    pub templated: usize,
    /// Conversations and pairs read as plain text, since the model has no chat template.
    pub untemplated: usize,
    /// Tokens in all sequences.
    pub tokens: usize,
    /// Sequences there are.
    pub sequences: usize,
    /// Sequences asked for; more than `sequences` where the text ran out.
    pub requested: usize,
    /// Tokens of each sequence.
    pub seq_len: usize,
    /// Seed of the selection.
    pub seed: u64,
}

/// The bundled calibration text of this name, or `None`; see [`PRESETS`].
pub fn preset(name: &str) -> Option<Text> {
    match name {
        "mixed" => Some(parse_txt("mixed", include_str!("../../presets/mixed.txt"))),
        _ => None,
    }
}

/// SHA-256 of `bytes` as lower-case hex.
fn sha256_hex(bytes: impl AsRef<[u8]>) -> String {
    hex(Sha256::digest(bytes.as_ref()).as_slice())
}

/// SHA-256 of the ids of all sequences, one after the other, each as a little-endian u32.
fn sha256_ids(sequences: &[Vec<u32>]) -> String {
    let mut hash = Sha256::new();
    for sequence in sequences {
        for id in sequence {
            hash.update(id.to_le_bytes());
        }
    }
    hex(hash.finalize().as_slice())
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}
