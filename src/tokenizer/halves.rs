//! A vocabulary and its merges in files of their own, as the first byte-level tokenizers have them.
//!
//! The rest, how texts are changed and divided and which token is special, is what the class does in transformers: it stands in classes.json,
//! as for a tokenizer.json of the class. Ids are held to transformers' by `tests/fixtures/make_halves.py`.

use std::path::Path;

use formats::container::file;
use serde_json::{Value, json};

use super::Own;
use super::added::{Added, Sources};
use super::classes;
use super::ranked::Found;
use super::sentencepiece::around;
use crate::error::{Error, Result};

/// The vocabulary.
const FILE: &str = "vocab.json";
/// The other half.
const MERGES: &str = "merges.txt";

/// What classes call their only special token, where no file says otherwise.
const SPECIAL: &str = "<|endoftext|>";

/// Classes that are read, and the names by which they have that token.
const CLASSES: &[(&str, &[&str])] =
    &[("GPT2Tokenizer", &["bos", "eos", "unk"]), ("Qwen2Tokenizer", &["eos", "unk", "pad"])];

/// The tokenizer of a folder with both files; `None` without them, and for a class that is not read. Fails for files that are broken.
pub(super) fn tokenizer(folder: &Path, settings: &Sources) -> Result<Option<Found>> {
    let path = folder.join(MERGES);
    if !path.exists() {
        return Ok(None);
    }
    let Some(rules) = classes::rules(settings) else { return Ok(None) };
    let Some((_, names)) = CLASSES.iter().find(|(class, _)| *class == rules.class) else { return Ok(None) };
    let Some(vocabulary) = super::read_words(&folder.join(FILE))? else { return Ok(None) };
    let merges = file::read_text(&path, file::DESCRIPTION).map_err(Error::io(&path, "read"))?;
    let merges = parts(&merges).map_err(|why| Error::failed(format!("{}: {why}", path.display())))?;
    let last = last(&vocabulary).map_err(|why| Error::failed(format!("{}: {why}", folder.join(FILE).display())))?;
    let named: Vec<(&'static str, String)> =
        names.iter().filter(|name| settings.named(name).is_none()).map(|name| (*name, SPECIAL.to_owned())).collect();
    let id = |text: &str| vocabulary[text].as_u64().map_or(last + 1, |id| id as u32);
    let added: Vec<Value> = named.iter().take(1).map(|(_, text)| Added::new(text, true).to_json(id(text))).collect();
    let of = |name: &str| {
        let flag = settings.flag(&format!("add_{name}_token")) == Some(true);
        let own = || named.iter().find(|(own, _)| *own == name).map(|(_, text)| &text[..]);
        let text = settings.named(name).map(|(_, text)| text).or_else(own).filter(|_| flag)?;
        Some((vocabulary[text].as_u64()? as u32, text))
    };
    let around = around(of("bos"), of("eos"));
    let mut model = rules.model.clone();
    model["vocab"] = vocabulary.clone();
    model["merges"] = merges.into();
    for (key, value) in [("dropout", Value::Null), ("unk_token", Value::Null), ("fuse_unk", false.into())] {
        model[key] = value;
    }
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": rules.normalizer,
        "pre_tokenizer": rules.pre_tokenizer,
        "post_processor": around,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": model,
    });
    Ok(Some(Found { file: FILE.to_owned(), json, own: Own { file: FILE, named }, notes: Vec::new() }))
}

/// The lines of merges.txt, each two tokens.
fn parts(text: &str) -> Result<Vec<String>, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with("#version"));
    let merge = |(number, line): (usize, &str)| match line.split(' ').filter(|part| !part.is_empty()).count() {
        2 => Ok(line.to_owned()),
        _ => Err(format!("line {}: not two tokens that are joined", number + 1)),
    };
    lines.map(merge).collect()
}

/// The last id of a vocabulary.
fn last(vocabulary: &Value) -> Result<u32, String> {
    let entries = vocabulary.as_object().filter(|entries| !entries.is_empty()).ok_or("it is no vocabulary")?;
    let mut last = 0;
    for (text, id) in entries {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| *id < u32::MAX);
        last = last.max(id.ok_or_else(|| format!("token `{text}` has no id"))?);
    }
    Ok(last)
}
