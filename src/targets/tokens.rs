//! Whether a tokenizer that was written anew makes the same ids of a text as the original's.

use calibration::samples::{Document, Text};

use super::{HeldOut, Words};
use crate::checkpoint::Checkpoint;
use crate::dialect::tokenizer::changes_texts;
use crate::error::{Error, Result};
use crate::probe::{self, Unlike};
use crate::text::{ModelText, load_text};
use crate::tokenizer::TokenizerFiles;

/// Compares the two. Returns notes; fails where the held-out text becomes other tokens, for what is measured would not be what runtimes
/// see. `named` says that the user has chosen the pre-tokenizer.
pub fn check(source: &Checkpoint, reopened: &Checkpoint, named: bool, words: &Words<'_>) -> Result<Vec<String>> {
    let byte_level = reopened.gguf().is_some_and(|file| file.metadata("tokenizer.ggml.merges").is_some());
    let mut notes = Vec::new();
    let mut way = Way::of(byte_level, None);
    match (source.tokenizer(), reopened.tokenizer()) {
        (Ok(Some(original)), Ok(Some(written))) => {
            way = Way::of(byte_level, Some(&original));
            let around =
                |files: &TokenizerFiles| [files.tokenizer.prefix().to_vec(), files.tokenizer.suffix().to_vec()];
            if matches!(way, Way::Named) && around(&original) != around(&written) {
                way = Way::Around;
            }
            notes = probe::differences(&original, &written, words.vocabulary)?;
            notes.extend(match probe::unlike(&original, &written, words.vocabulary, named)? {
                // With a text to measure on, other ids of running text are an error.
                Some(Unlike { is_prose: true, example }) => words.held_out.is_none().then(|| {
                    format!(
                        "the tokenizer that was written turns a sample text into other tokens than the original's: {example}; {}",
                        way.advice()
                    )
                }),
                Some(Unlike { example, .. }) => Some(format!(
                    "the tokenizer that was written turns some texts into other tokens than the original's, though not running text: \
                     {example}"
                )),
                None => None,
            });
        }
        (Ok(Some(_)), Err(error)) => {
            notes.push(format!("the tokenizer that was written cannot be read back, and was not compared: {error}"));
        }
        _ => {}
    }
    if let Some((text, held_out)) = words.held_out
        && let Ok(own) = ModelText::open(reopened)
        && own.first_ids(&load_text(text)?, held_out.asked)? != held_out.ids
        && !composed_alone(&own, load_text(text)?, held_out, &mut notes)?
    {
        let or = match way {
            Way::Named => "",
            Way::Around | Way::Changed | Way::Pieces | Way::Unigram => {
                ", or write it all the same with --verify-text none"
            }
        };
        return Err(Error::failed(format!(
            "{}: the tokenizer that was written turns the held-out text into other tokens than the original's; {}{or}",
            words.output.display(),
            way.advice()
        )));
    }
    Ok(notes)
}

/// Whether the written tokenizer makes the ids of the text once its characters are composed (NFC), which original tokenizers do by
/// themselves and llama.cpp does not; a note says so.
fn composed_alone(own: &ModelText, mut text: Text, held_out: &HeldOut, notes: &mut Vec<String>) -> Result<bool> {
    let Some(plain) = text.plain() else { return Ok(false) };
    let mut composed = tokenizers::NormalizedString::from(&*plain);
    let composed = composed.nfc().get().to_owned();
    let differs = composed != plain;
    text.documents = vec![Document::Plain(composed)];
    let alone = differs && own.first_ids(&text, held_out.asked)? == held_out.ids;
    if alone {
        notes.push(
            "the held-out text has characters that are put together of several (as e and an accent): the original's tokenizer \
             composes them first (NFC), as was done for measuring, and llama.cpp does not"
                .to_owned(),
        );
    }
    Ok(alone)
}

/// Why a GGUF file's tokenizer gives other ids than the original's.
enum Way {
    /// It splits texts by a name that may be another.
    Named,
    /// The original puts other tokens around a text.
    Around,
    /// The original changes texts before it splits them.
    Changed,
    /// It joins pieces by their scores.
    Pieces,
    /// It looks for the likeliest pieces, and the original does something else to texts.
    Unigram,
}

impl Way {
    fn of(byte_level: bool, original: Option<&TokenizerFiles>) -> Way {
        match byte_level {
            true if original.is_some_and(|files| changes_texts(&files.json)) => Way::Changed,
            true => Way::Named,
            false if original.is_some_and(|files| files.json["model"]["type"] == "Unigram") => Way::Unigram,
            false => Way::Pieces,
        }
    }

    /// What to do about it.
    fn advice(&self) -> &'static str {
        match self {
            Way::Named => "choose another --pre",
            Way::Around => {
                "llama.cpp puts one BOS before texts and one EOS behind them, and no other tokens, whatever --pre says: let tokenizer.json do the \
                 same, or choose another --format"
            }
            Way::Changed => {
                "llama.cpp does not change texts before it splits them, whatever --pre says: give it texts that are changed already, or \
                 choose another --format"
            }
            Way::Pieces => {
                "llama.cpp joins the pieces of SentencePiece by their scores, which one with rules for characters was not made for; choose \
                 another --format"
            }
            Way::Unigram => {
                "llama.cpp looks for the likeliest pieces of this unigram model after other steps than its own, and spells no unknown \
                 character in bytes; choose another --format"
            }
        }
    }
}
