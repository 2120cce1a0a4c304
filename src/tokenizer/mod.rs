//! A model's tokenizer, put together from every file that says something of it.
//!
//! The vocabulary is that of tokenizer.json, tokenizer.model, tekken.json, a list for tiktoken, vocab.json or a GGUF file. Tokens, names and flags also stand in
//! tokenizer_config.json, special_tokens_map.json and added_tokens.json (`added`), chat templates in files of their own
//! (`templates`). What comes out is one tokenizer.json with all of it, from which calibration, evaluation and the GGUF writer
//! take their ids: those that transformers gives.

pub(crate) mod added;
pub(crate) mod alphabet;
pub(crate) mod classes;
mod error;
mod halves;
mod ranked;
pub(crate) mod sentencepiece;
mod tekken;
pub(crate) mod templates;
mod tiktoken;
mod versions;
pub(crate) mod words;

use std::path::Path;

use calibration::samples::{SampleError, Tokenizer, TokenizerConfig};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::json::read_json;
use crate::supervisor::within;
pub use error::TextError;
pub use templates::Templates;

use added::{Added, NAMES, Sources, Stated};

/// The usual file.
pub(crate) const FILE: &str = "tokenizer.json";

/// Files of tokenizers that are not read here, what they are, and a file without which they are none. Transformers makes a
/// tokenizer of each.
const OTHER_TOKENIZERS: &[(&str, &str, Option<&str>)] = &[
    ("vocab.json", "one half of a tokenizer, and merges.txt the other", Some("merges.txt")),
    ("spiece.model", "a SentencePiece model under another name", None),
    ("sentencepiece.bpe.model", "a SentencePiece model under another name", None),
    ("vocab.txt", "a list of pieces for BERT's tokenizer", None),
];

/// A tokenizer in a form that is not read here.
pub(crate) struct Other {
    /// The file, and what it is.
    pub what: String,
    /// Whether transformers makes a tokenizer of it by itself.
    pub is_loaded: bool,
    /// How to make a tokenizer.json of it.
    pub remedy: String,
}

/// The tokenizer that `folder` has in a form that is not read here.
pub(crate) fn other_tokenizer(folder: &Path, model_type: Option<&str>) -> Option<Other> {
    let known = OTHER_TOKENIZERS
        .iter()
        .find(|(name, _, with)| folder.join(name).exists() && with.is_none_or(|with| folder.join(with).exists()));
    if let Some((name, what, _)) = known {
        let remedy =
            format!("save tokenizer.json beside it with {}", classes::save_tokenizer(&folder.display().to_string()));
        return Some(Other { what: format!("{name} is {what}"), is_loaded: true, remedy });
    }
    let name = tiktoken::unknown(folder, &Sources::read(folder, model_type).ok()?)?;
    Some(Other {
        what: format!("{name} is a list of tokens for tiktoken, and only the model's own code says how it divides texts into words"),
        is_loaded: false,
        remedy: "make tokenizer.json of it with transformers' TikTokenConverter, which takes this list and, from that code, the pattern \
                 and the special tokens"
            .to_owned(),
    })
}

/// What to do where `folder` has neither tokenizer.json nor tokenizer.model, as the end of a sentence.
pub(crate) fn without_one(folder: &Path, model_type: Option<&str>) -> String {
    match other_tokenizer(folder, model_type) {
        Some(Other { what, is_loaded: true, remedy }) => format!("; {what}, which is not read: {remedy}"),
        Some(Other { what, remedy, .. }) => format!("; {what}: {remedy}"),
        None => ": copy it from the model that this one was made from".to_owned(),
    }
}

/// A model's tokenizer.
pub struct TokenizerFiles {
    /// The file with the vocabulary.
    pub name: &'static str,
    /// tokenizer.json with everything that was added, under the ids that texts give.
    pub json: Value,
    /// The same, ready for use, with the BOS and EOS of [`TokenizerFiles::special`].
    pub tokenizer: Tokenizer,
    /// Chat templates.
    pub templates: Templates,
    /// What the reader of a report should know: ids and names about which the files do not agree.
    pub notices: Vec<String>,
    /// What files add to the vocabulary, by id; without the special pieces that a tokenizer.model has itself.
    pub(crate) added: Vec<(u32, Added)>,
    pub(crate) sources: Sources,
    own: Own,
}

/// Special tokens that a file with a vocabulary names itself.
#[derive(Default)]
pub(crate) struct Own {
    /// The file.
    file: &'static str,
    /// Spellings by names, such as `bos`.
    named: Vec<(&'static str, String)>,
}

/// Reads a file of a tokenizer, or `None` where there is none. Fails for what is no JSON, with what to do.
fn read_words(path: &Path) -> Result<Option<Value>> {
    read_json(path).map_err(|error| match error {
        Error::Failed(why) if why.contains("not valid JSON") => Error::Failed(format!("{why}; fetch the file again")),
        other => other,
    })
}

impl TokenizerFiles {
    /// Reads a folder: tokenizer.json or, without it, tokenizer.model, tekken.json, a list for tiktoken or vocab.json with merges.txt, and what lies beside.
    ///
    /// `model_type` is what config.json calls the model. Fails for a file that cannot be read or does not fit the others; `None` where there
    /// is none of them.
    pub(crate) fn of_folder(folder: &Path, model_type: Option<&str>) -> Result<Option<TokenizerFiles>> {
        let failed = |(file, why): added::Flaw| Error::failed(format!("{} {why}", folder.join(file).display()));
        let mut sources = Sources::read(folder, model_type)?;
        let templates = Templates::of_folder(folder, &sources.config)?;
        let versioned = versions::file(&sources.config)
            .map_err(|why| Error::failed(format!("{}: {why}; name the files that are there", folder.display())))?;
        let (mut told, mut read, mut own) = (Vec::new(), None, Own::default());
        if let Some(name) = versioned {
            read = read_words(&folder.join(&name))?;
            told.push(match read {
                Some(_) => format!(
                    "{name} is read, as by transformers, and not {FILE}: so {} says in fast_tokenizer_files",
                    added::CONFIG
                ),
                None => format!(
                    "{} names {name} in fast_tokenizer_files, and there is no such file: {FILE} is read",
                    added::CONFIG
                ),
            });
            if read.is_some() {
                sources.file = Some(name);
            }
        }
        let json = match read {
            None => read_words(&folder.join(FILE))?,
            read => read,
        };
        let json = match json {
            None => ranked::tokenizer(folder, &sources)?.map(|found| {
                sources.file = Some(found.file);
                told.extend(found.notes);
                own = found.own;
                found.json
            }),
            json => json,
        };
        let Some(mut json) = json else {
            let Some(found) = sentencepiece::tokenizer(folder, &sources)? else { return Ok(None) };
            let stated = found.added.into_iter().map(|(id, token)| Stated { token, id, file: FILE }).collect();
            let mut files =
                Self::build(folder, sentencepiece::FILE, found.json, stated, sources, templates, found.own)?;
            files.notices.splice(0..0, found.notes);
            return Ok(Some(files));
        };
        if json.is_object() && !json["model"].is_object() {
            let file = folder.join(sources.file.as_deref().unwrap_or(FILE));
            return Err(Error::failed(format!(
                "{}: has no object `model`, which holds the vocabulary, and no tokenizer loads with it; fetch the file again",
                file.display()
            )));
        }
        // A list that is not as it has to be is left to the library, which says what is wrong.
        let stated = match added::of_json(&json) {
            Some(listed) if json.is_object() => {
                let merged = sources.declared().map_err(failed)?.merge(&listed, sources.is_whole());
                json["added_tokens"] =
                    merged.iter().map(|stated| stated.token.to_json(stated.id.unwrap_or(0))).collect();
                merged
            }
            _ => Vec::new(),
        };
        let mut files = Self::build(folder, FILE, json, stated, sources, templates, own)?;
        files.notices.splice(0..0, told);
        Ok(Some(files))
    }

    /// The file with the vocabulary, by its name in the folder.
    pub(crate) fn file(&self) -> &str {
        self.sources.file.as_deref().unwrap_or(self.name)
    }

    /// One tokenizer.json of all that was `stated`, and what is told of it.
    pub(crate) fn build(
        path: &Path,
        name: &'static str,
        mut json: Value,
        stated: Vec<Stated>,
        sources: Sources,
        templates: Templates,
        own: Own,
    ) -> Result<TokenizerFiles> {
        // A GGUF file holds its tokenizer itself.
        let file = sources.file.as_deref().unwrap_or(name);
        let guard = within(if path.is_file() { path.to_owned() } else { path.join(file) });
        let tokenizer = Tokenizer::from_value(&mut json, &guard).map_err(|error| {
            let error = match error {
                SampleError::Tokenizer { problem, .. } => SampleError::Tokenizer { file: file.to_owned(), problem },
                other => other,
            };
            TextError::of_model(path, error)
        })?;
        // The library counts on from the vocabulary, whatever ids files give.
        let mut moved = Vec::new();
        let mut added = Vec::with_capacity(stated.len());
        let mut new = Vec::new();
        for Stated { token, id, file } in stated {
            let Some(found) = tokenizer.token_to_id(&token.content) else { continue };
            if id.is_none() && !is_in_vocabulary(&json["model"]["vocab"], &token.content, found, name) {
                new.push((token.content.clone(), found));
            }
            if let Some(id) = id.filter(|id| *id != found) {
                moved.push(format!("`{}` the id {id}, and it has {found} ({file})", token.content));
            }
            added.push((found, token));
        }
        if name == FILE && json["added_tokens"].is_array() {
            json["added_tokens"] = added.iter().map(|(id, token)| token.to_json(*id)).collect();
        }
        let mut notices = Vec::new();
        let misshapen = sources.misshapen();
        if !misshapen.is_empty() {
            notices.push(format!(
                "{}: {}: transformers loads no tokenizer with that, and here it is left out where it says nothing",
                added::CONFIG,
                misshapen.join("; ")
            ));
        }
        if let Some(first) = moved.first() {
            let others = if moved.len() > 1 { format!("; so {} others", moved.len() - 1) } else { String::new() };
            notices.push(format!(
                "the tokenizer's files give {first}{others}: ids are those of the tokenizers library, as in transformers"
            ));
        }
        if let Some((text, id)) = new.first() {
            let others = if new.len() > 1 { format!("; so {} others", new.len() - 1) } else { String::new() };
            let key = NAMES.iter().find(|short| sources.named(short).is_some_and(|(_, named)| named == text));
            let key = key.map_or("a special token".to_owned(), |short| format!("{short}_token"));
            notices.push(format!(
                "`{text}` ({key}) is not in the vocabulary: it becomes token {id}, as in transformers, whose embedding the model did not \
                 learn{others}"
            ));
        }
        notices.extend(templates.notices.iter().map(|notice| format!("{}/{notice}", path.display())));
        notices.extend(sources.passed_over(&|text| tokenizer.token_to_id(text).is_some()));
        let mut files = TokenizerFiles { name, json, tokenizer, templates, notices, added, sources, own };
        let config = files.config();
        files.tokenizer = files.tokenizer.with_config(&config);
        Ok(files)
    }

    /// The spelling of the special token called `bos`, `eos`, `unk`, `sep`, `pad`, `cls` or `mask`, and the file that says so.
    pub fn special(&self, name: &str) -> Option<(&'static str, &str)> {
        let own = || self.own.named.iter().find(|(own, _)| *own == name).map(|(_, text)| (self.own.file, &text[..]));
        self.sources.named(name).or_else(own)
    }

    /// A flag of tokenizer_config.json.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.sources.flag(name)
    }

    /// Special tokens and the default chat template, as calibration takes them.
    pub fn config(&self) -> TokenizerConfig {
        let token = |name: &str| self.special(name).map(|(_, text)| text.to_owned());
        let extra = self.sources.extra_tokens();
        let others = NAMES[2..].iter().filter_map(|name| Some((format!("{name}_token"), token(name)?)));
        let others = others.chain(extra).collect();
        let chat_template = self.templates.default.clone();
        let tools = self.templates.others.iter().find(|(name, _)| name == "tool_use");
        let tool_template = tools.map(|(name, text)| (text.clone(), self.templates.place(name).to_owned()));
        let chat_template_file = self.templates.place(templates::DEFAULT).to_owned();
        TokenizerConfig {
            bos_token: token("bos"),
            eos_token: token("eos"),
            chat_template,
            chat_template_file,
            tool_template,
            others,
        }
    }
}

/// Whether a token of this id stands in the vocabulary itself. What a tokenizer.model lacks was put into its own.
fn is_in_vocabulary(vocabulary: &Value, text: &str, id: u32, file: &str) -> bool {
    match vocabulary {
        _ if file == sentencepiece::FILE => false,
        Value::Object(vocabulary) => vocabulary.contains_key(text),
        Value::Array(pieces) => pieces.get(id as usize).is_some_and(|piece| piece[0] == text),
        _ => true,
    }
}

impl Stated {
    pub(crate) fn new(id: u32, token: Added) -> Stated {
        Stated { token, id: Some(id), file: FILE }
    }
}
