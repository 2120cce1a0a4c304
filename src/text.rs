//! Reads what calibration and evaluation need from disk: texts, and a model's tokenizer and chat template.
//!
//! The work on bytes is `calibration::samples`; this file only opens files and puts their names into the messages.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use calibration::samples::{
    ChatTemplate, Document, PRESETS, SampleError, Samples, Text, Tokenizer, TokenizerConfig, parse_txt, preset, read,
    select,
};

use formats::container::file;

use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::families;
use crate::supervisor::within;
use crate::tokenizer::{TokenizerFiles, without_one};
use crate::words::nearest;

pub use crate::tokenizer::TextError;

/// The name of the bundled text for evaluation: neither the built-in model nor any preset has seen it.
pub const HELD_OUT: &str = "held-out";

/// That text.
pub(crate) const HELD_OUT_TEXT: &str = include_str!("demo/evaluation.txt");

/// Bytes of the largest text that is read (4 GiB).
const LONGEST: u64 = 4 << 30;

/// Reads a text: a bundled preset by its name, else a file by its path.
///
/// What a file is read as is told by `calibration::samples::read`: running text is taken byte for byte – perplexities of WikiText
/// compare only when the same file is read raw everywhere. A file named like a preset is reached as `./NAME`. Fails for a missing,
/// empty or unreadable file.
pub fn load_text(path_or_preset: &str) -> Result<Text, TextError> {
    if let Some(text) = preset(path_or_preset) {
        return Ok(text);
    }
    if path_or_preset == HELD_OUT {
        return Ok(parse_txt(HELD_OUT, HELD_OUT_TEXT));
    }
    let path = Path::new(path_or_preset);
    let bytes = file::read(path, LONGEST).map_err(|error| match error.kind() {
        ErrorKind::NotFound => TextError::Missing { name: path_or_preset.to_owned(), hint: meant(path) },
        _ if path.is_dir() => TextError::Folder { path: path.to_owned(), hint: texts_in(path) },
        _ => TextError::Io { path: path.to_owned(), error },
    })?;
    let text = read(path_or_preset, bytes)?;
    if text.documents.is_empty() {
        return Err(SampleError::Empty { name: path_or_preset.to_owned() }.into());
    }
    Ok(text)
}

/// Endings of files that are read as texts.
const ENDINGS: &[&str] = &["jsonl", "json", "ndjson", "parquet", "csv", "tsv", "txt", "raw"];

/// What may be meant by a text that is not there: a bundled one, or a text in the same folder, with or without its ending.
fn meant(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let listed = std::fs::read_dir(folder.unwrap_or(Path::new("."))).into_iter().flatten();
    let mut files: Vec<String> = listed.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    files.retain(|file| file.rsplit_once('.').is_some_and(|(_, ending)| ENDINGS.contains(&&*ending.to_lowercase())));
    files.sort();
    let stem = |file: &str| file.rsplit_once('.').map_or(file, |(stem, _)| stem).to_owned();
    let stems: Vec<String> = files.iter().map(|file| stem(file)).collect();
    let bundled = if folder.is_none() { [PRESETS, &[HELD_OUT]].concat() } else { Vec::new() };
    let whole = nearest(name, bundled.iter().copied().chain(files.iter().map(String::as_str)));
    let found = whole.or_else(|| {
        let found = nearest(name, stems.iter().map(String::as_str))?;
        let at = stems.iter().position(|stem| stem == found)?;
        (stems.iter().filter(|stem| *stem == found).count() == 1).then(|| files[at].as_str())
    });
    let shown = |found: &str| folder.map_or(PathBuf::from(found), |folder| folder.join(found)).display().to_string();
    found.map_or(String::new(), |found| format!("did you mean {}? ", shown(found)))
}

/// The first texts in a folder, as the end of a sentence.
fn texts_in(folder: &Path) -> String {
    let is_text = |path: &PathBuf| {
        let ending = path.extension().and_then(|ending| ending.to_str()).map(str::to_lowercase);
        ending.is_some_and(|ending| ENDINGS.contains(&&*ending))
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_text).collect();
    found.sort();
    // The .json files of a model are no texts.
    if folder.join("config.json").exists() {
        found.clear();
    }
    let names: Vec<String> = found.iter().take(2).map(|path| path.display().to_string()).collect();
    match found.len() {
        0 => " (.txt, .jsonl, .json, .csv, .tsv, .parquet)".to_owned(),
        1 => format!(": {}", names[0]),
        count => format!(" of its {count}, such as {}", names.join(" or ")),
    }
}

/// A model's way from text to ids.
pub struct ModelText {
    /// The tokenizer, with the BOS and EOS that the configuration names.
    pub tokenizer: Tokenizer,
    config: TokenizerConfig,
    /// What to say of chat templates of which none is the default.
    no_default: Option<String>,
    folder: PathBuf,
    /// Rows of the embedding, by config.json.
    rows: Option<u64>,
}

impl ModelText {
    /// Reads what a checkpoint says of its tokenizer (see [`TokenizerFiles`]). Fails where there is none.
    pub fn open(source: &Checkpoint) -> Result<Self, Error> {
        Self::of(source, source.tokenizer()?)
    }

    /// [`ModelText::open`] with what [`Checkpoint::tokenizer`] gave of `source`.
    pub fn of(source: &Checkpoint, files: Option<TokenizerFiles>) -> Result<Self, Error> {
        let folder = source.path();
        let Some(files) = files else {
            let hint = without_one(folder, families::type_of(source.config()));
            return Err(TextError::NoTokenizer { folder: folder.to_owned(), hint }.into());
        };
        let config = files.config();
        let TokenizerFiles { tokenizer, templates, .. } = files;
        let no_default = templates.lacks_default().then(|| templates.without_default());
        let rows = families::vocabulary(source.config())?.map(|rows| rows as u64);
        Ok(Self { tokenizer, config, no_default, folder: folder.to_owned(), rows })
    }

    /// What to say where the model has chat templates and none of them is the default.
    pub(crate) fn without_default(&self) -> Option<&str> {
        self.no_default.as_deref()
    }

    /// The model's chat template, if it has one. Fails on a syntax error in it.
    pub fn chat(&self) -> Result<Option<ChatTemplate>, TextError> {
        // A GGUF file holds its template itself.
        let at = match self.folder.is_file() {
            true => self.folder.clone(),
            false => self.folder.join(&self.config.chat_template_file),
        };
        self.config.chat(&within(at)).map_err(|error| TextError::of_model(&self.folder, error))
    }

    /// Calibration sequences: `calibration::samples::select` with this model's tokenizer and chat template.
    ///
    /// The template is only looked at when the text has conversations.
    pub fn select(&self, text: &Text, count: usize, seq_len: usize, seed: u64) -> Result<Samples, TextError> {
        let plain = text.documents.iter().all(|document| matches!(document, Document::Plain(_)));
        let chat = if plain { None } else { self.chat()? };
        let samples = select(text, &self.tokenizer, chat.as_ref(), count, seq_len, seed)
            .map_err(|error| TextError::of_model(&self.folder, error))?;
        samples.sequences.iter().try_for_each(|sequence| self.check(sequence))?;
        Ok(samples)
    }

    /// The ids of an evaluation text: those of the whole, with the tokenizer's own marks at its ends.
    pub fn evaluation_ids(&self, text: &Text) -> Result<Vec<u32>, TextError> {
        self.first_ids(text, usize::MAX)
    }

    /// The first `least` of [`evaluation_ids`](Self::evaluation_ids), or all where there are fewer. No more of the text is tokenized
    /// than gives them, if the tokenizer allows that.
    pub fn first_ids(&self, text: &Text, least: usize) -> Result<Vec<u32>, TextError> {
        let plain = text.plain().ok_or_else(|| TextError::NotPlain { name: text.name.clone() })?;
        let mut ids = self.tokenizer.begin(&plain, true, least)?.ids;
        ids.truncate(least);
        self.check(&ids)?;
        Ok(ids)
    }

    /// Fails on ids that the model has no row for.
    pub fn check(&self, ids: &[u32]) -> Result<(), TextError> {
        let Some(rows) = self.rows else { return Ok(()) };
        match ids.iter().find(|&&id| u64::from(id) >= rows) {
            Some(&id) => Err(TextError::Foreign { folder: self.folder.clone(), id, rows }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text").join(name)
    }

    fn file(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> String {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn message<T, E: std::fmt::Display>(result: Result<T, E>) -> String {
        result.err().unwrap().to_string()
    }

    /// A folder with a tiny model in it, and no tokenizer yet.
    fn model_folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/llama_tied");
        std::fs::copy(tiny.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        // Its vocabulary is smaller than that of the fixture tokenizers.
        let config = std::fs::read_to_string(tiny.join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config["vocab_size"] = 1000.into();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        folder
    }

    fn open(folder: &tempfile::TempDir) -> Result<ModelText, Error> {
        ModelText::open(&Checkpoint::open(folder.path()).unwrap())
    }

    #[test]
    fn files_are_read_by_their_ending() {
        let folder = tempfile::tempdir().unwrap();
        let plain = |name: &str, bytes: &[u8]| load_text(&file(&folder, name, bytes)).unwrap();
        assert_eq!(plain("a.raw", b" = A = \n \n").plain().unwrap(), " = A = \n \n");
        assert_eq!(plain("a.md", "é\r\n".as_bytes()).plain().unwrap(), "é\r\n");
        assert_eq!(plain("a.jsonl", b"{\"text\": \"x\"}\n{\"text\": \"y\"}").documents.len(), 2);
        assert_eq!(plain("A.JSON", b"[{\"text\": \"x\"}]").documents.len(), 1);
        assert_eq!(plain("a.csv", b"text\nx\ny\n").documents.len(), 2);
        assert_eq!(load_text("mixed").unwrap().name, "mixed");
    }

    #[test]
    fn unusable_files_are_one_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let missing = message(load_text("no/such/file.txt"));
        assert!(missing.starts_with("no/such/file.txt: no such file") && missing.contains("mixed"), "{missing}");
        let latin = message(load_text(&file(&folder, "latin.txt", b"caf\xe9")));
        assert!(latin.contains("latin.txt") && latin.contains("byte 3 "), "{latin}");
        for name in ["e.txt", "e.jsonl"] {
            let empty = message(load_text(&file(&folder, name, b" \n")));
            assert!(empty.ends_with(&format!("{name}: the text is empty")), "{empty}");
        }
        let line = message(load_text(&file(&folder, "bad.jsonl", b"{\"text\": \"a\"}\n{\"txt\": \"b\"}")));
        assert!(line.contains("bad.jsonl, line 2: expected `text`"), "{line}");
        let directory = message(load_text(folder.path().to_str().unwrap()));
        assert!(
            directory.contains(": a folder; give one file of its 4, such as ") && directory.contains("bad.jsonl or "),
            "{directory}"
        );
        let capital = tempfile::tempdir().unwrap();
        file(&capital, "Text.CSV", b"text\na\n");
        assert!(message(load_text(capital.path().to_str().unwrap())).ends_with("Text.CSV"));
        let near = message(load_text(capital.path().join("Txet.CSV").to_str().unwrap()));
        assert!(near.contains("did you mean ") && near.contains("Text.CSV? "), "{near}");
        let none = tempfile::tempdir().unwrap();
        assert!(
            message(load_text(none.path().to_str().unwrap())).ends_with("(.txt, .jsonl, .json, .csv, .tsv, .parquet)")
        );
    }

    #[test]
    fn a_model_folder_gives_tokens_marks_and_template() {
        let folder = model_folder();
        let error = message(open(&folder));
        assert!(error.contains("no tokenizer.json and no tokenizer.model"), "{error}");
        file(&folder, "spiece.model", b"x");
        assert!(message(open(&folder)).contains("spiece.model is a SentencePiece model under another name"));
        file(&folder, "tokenizer.model", b"x");
        assert!(message(open(&folder)).contains("/tokenizer.model: not a SentencePiece model: "));

        std::fs::copy(fixture("byte_level.json"), folder.path().join("tokenizer.json")).unwrap();
        let bare = open(&folder).unwrap();
        assert_eq!((bare.tokenizer.eos(), bare.tokenizer.added_bos()), (None, Some(0)));
        assert!(bare.chat().unwrap().is_none());

        let config = r#"{"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|im_end|>",
            "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}]}"#;
        file(&folder, "tokenizer_config.json", config.as_bytes());
        let model = open(&folder).unwrap();
        assert_eq!(model.tokenizer.eos(), model.tokenizer.token_to_id("<|im_end|>"));
        assert!(model.tokenizer.eos().is_some());
        let chats =
            load_text(&file(&folder, "c.jsonl", b"{\"prompt\": \"hello\", \"completion\": \"world\"}")).unwrap();
        let samples = model.select(&chats, 1, 4, 0).unwrap();
        let expected = model.tokenizer.encode("<|begin_of_text|>hello<|im_end|>world<|im_end|>", false).unwrap();
        assert_eq!(samples.sequences[0], expected[..4]);
        assert_eq!(samples.source.templated, 1);
        assert!(message(model.evaluation_ids(&chats)).contains("running text"));

        // The file beside goes before the configuration, and only conversations look at it.
        file(&folder, "chat_template.jinja", b"{% if %}");
        let broken = open(&folder).unwrap();
        assert!(message(broken.select(&chats, 1, 4, 0)).contains("/chat_template.jinja: chat template: "));
        let plain = load_text(&file(&folder, "p.txt", b"one two three four five")).unwrap();
        assert_eq!(broken.select(&plain, 1, 4, 0).unwrap().sequences.len(), 1);
        assert_eq!(broken.evaluation_ids(&plain).unwrap()[0], 0);

        file(&folder, "tokenizer.json", b"{\"version\": ");
        let error = message(open(&folder));
        assert!(error.contains("/tokenizer.json: not valid JSON: EOF"), "{error}");
        file(&folder, "tokenizer_config.json", b"[");
        assert!(message(open(&folder)).contains("/tokenizer_config.json: not valid JSON: EOF"));
    }

    #[test]
    fn special_tokens_may_stand_in_their_own_file() {
        let folder = model_folder();
        std::fs::copy(fixture("sentencepiece_like.json"), folder.path().join("tokenizer.json")).unwrap();
        file(&folder, "special_tokens_map.json", br#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#);
        let model = open(&folder).unwrap();
        assert_eq!((model.tokenizer.added_bos(), model.tokenizer.eos()), (Some(1), Some(2)));
    }
}
