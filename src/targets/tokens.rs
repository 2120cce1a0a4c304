//! Whether a tokenizer that was written anew makes the same ids of a text as the original's.

use calibration::samples::{Document, Text};

use super::{HeldOut, Words};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::probe;
use crate::text::{ModelText, load_text};

/// Compares the two. Returns notes; fails where the held-out text becomes other tokens, for what is measured would not be what runtimes
/// see. `named` says that the user has chosen the pre-tokenizer.
pub fn check(source: &Checkpoint, reopened: &Checkpoint, named: bool, words: &Words<'_>) -> Result<Vec<String>> {
    let byte_level = reopened.gguf().is_some_and(|file| file.metadata("tokenizer.ggml.merges").is_some());
    let mut notes = Vec::new();
    match (source.tokenizer(), reopened.tokenizer()) {
        (Ok(Some(original)), Ok(Some(written))) => {
            notes = probe::differences(&original, &written, words.vocabulary)?;
            // With a text to measure on, other ids are an error.
            if words.held_out.is_none() && !probe::agree(&original, &written, named)? {
                notes.push(format!(
                    "the tokenizer that was written turns a sample text into other tokens than the original's; {}",
                    other_ids(byte_level)
                ));
            }
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
        let or = if byte_level { "" } else { ", or write it all the same with --verify-text none" };
        return Err(Error::failed(format!(
            "{}: the tokenizer that was written turns the held-out text into other tokens than the original's; {}{or}",
            words.output.display(),
            other_ids(byte_level)
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

/// What to do about a GGUF file whose tokenizer gives other ids than the original's.
fn other_ids(byte_level: bool) -> &'static str {
    match byte_level {
        true => "choose another --pre",
        false => {
            "llama.cpp joins the pieces of SentencePiece by their scores, which a unigram model or one with rules for \
             characters was not made for; choose another --format"
        }
    }
}
