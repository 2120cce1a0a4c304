//! Unigram models as llama.cpp has them (`tokenizer.ggml.model` is `t5`): the likeliest pieces of a text, after rules for characters and
//! spaces.
//!
//! llama.cpp looks for them as SentencePiece and the tokenizers library do: scores are added up, and a character without a piece costs ten
//! more than the least likely piece; several of these in a row are one unknown token. What it does not do is to spell such characters in
//! bytes, whatever pieces there are for bytes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use formats::GgufFile;
use formats::container::gguf::{GGUFValueType, MetadataValue};
use formats::container::sentencepiece::check_rules;
use serde_json::{Value, json};

use super::rebuilt::{Vocabulary, post_processor};
use super::{Files, Token, array};
use crate::dialect::metadata::Written;
use crate::error::{Error, Result};
use crate::tokenizer::sentencepiece::kind;

/// What `tokenizer.ggml.model` says of such a file.
pub(super) const MODEL: &str = "t5";

/// The keys beside pieces and scores.
const PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const SINGLE: &str = "tokenizer.ggml.remove_extra_whitespaces";
const RULES: &str = "tokenizer.ggml.precompiled_charsmap";

/// Whether a tokenizer.json is of this kind.
pub(super) fn is_unigram(json: &Value) -> bool {
    json["model"]["type"] == "Unigram"
}

/// What is done to a text before pieces are looked for.
#[derive(Debug, Default, PartialEq)]
struct Rules {
    /// Characters that are replaced, as SentencePiece has them; may be empty.
    characters: Vec<u8>,
    /// Spaces at the ends are left out, and only one of several is kept.
    single: bool,
    /// A space is put before.
    prefix: bool,
    /// Steps that llama.cpp does not know.
    foreign: Vec<String>,
}

impl Rules {
    /// Those of a tokenizer.json. Fails, with the reason, for rules for characters that cannot be looked up.
    fn of_json(json: &Value) -> Result<Rules, String> {
        let list = |part: &Value, name: &str| match part {
            Value::Null => Vec::new(),
            part => part[name].as_array().map_or_else(|| vec![part.clone()], Clone::clone),
        };
        let steps =
            list(&json["normalizer"], "normalizers").into_iter().chain(list(&json["pre_tokenizer"], "pretokenizers"));
        let mut rules = Rules::default();
        for step in steps {
            let pattern = step["pattern"]["Regex"].as_str().unwrap_or_default();
            match step["type"].as_str().unwrap_or_default() {
                "Precompiled" => {
                    let text = step["precompiled_charsmap"].as_str().unwrap_or_default();
                    rules.characters =
                        STANDARD.decode(text).map_err(|error| format!("precompiled_charsmap: {error}"))?;
                    check_rules(&rules.characters)?;
                }
                "Prepend" => rules.prefix = true,
                "Replace" if step["pattern"]["String"] == " " && step["content"] == "▁" => {}
                "Replace" if pattern == " {2,}" && matches!(step["content"].as_str(), Some(" " | "▁")) => {
                    rules.single = true
                }
                "Replace" if pattern.starts_with("^ +|") && step["content"] == "" => {}
                "WhitespaceSplit" => rules.single = true,
                "Strip" => {}
                // The scheme is `always` where the older flag stands instead.
                "Metaspace" => {
                    rules.prefix = match step["prepend_scheme"].as_str() {
                        Some(scheme) => scheme != "never",
                        None => step["add_prefix_space"] != false,
                    }
                }
                other => rules.foreign.push(other.to_owned()),
            }
        }
        Ok(rules)
    }
}

/// Writes what is done to texts, beside tokens, scores and the space before.
pub(super) fn write(files: &Files, tokens: &[Token], out: &mut Written) -> Result<()> {
    let json = &files.tokenizer.json;
    let rules = Rules::of_json(json).map_err(|why| Error::failed(format!("{}: {why}", files.tokenizer.file())))?;
    out.flag(SINGLE, rules.single);
    if !rules.characters.is_empty() {
        let bytes = rules.characters.iter().map(|byte| MetadataValue::U8(*byte)).collect();
        array(RULES, bytes, GGUFValueType::U8, out)?;
    }
    for step in rules.foreign {
        out.notice(format!("llama.cpp does not apply tokenizer.json's step {step} to texts"));
    }
    if json["model"]["byte_fallback"] == true && tokens.iter().any(|token| token.kind == kind::BYTE) {
        out.notice("a character that is no piece becomes the unknown token in llama.cpp, and its bytes here");
    }
    Ok(())
}

/// The number of the unknown token in the vocabulary, where nothing else names it.
pub(super) fn unknown(json: &Value) -> Option<usize> {
    json["model"]["unk_id"].as_u64().and_then(|id| usize::try_from(id).ok()).filter(|_| is_unigram(json))
}

/// tokenizer.json of a file. Fails where scores are missing, or rules for characters cannot be looked up.
pub(super) fn rebuilt(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Value> {
    let scores = vocabulary.scores(file)?;
    let failed = |why: String| {
        Error::from(formats::Error::malformed(format!("metadata key `{RULES}`: {why}")).in_file(file.path()))
    };
    let characters: Vec<u8> = file.integers(RULES)?.unwrap_or_default().into_iter().map(|byte| byte as u8).collect();
    check_rules(&characters).map_err(failed)?;
    let single = file.bool(SINGLE)?.unwrap_or(false);
    let unknown = vocabulary.special(file, "unknown")?.map(|(id, _)| id);
    // What is no piece has no part in the likelihoods.
    let is_piece = |id: usize| matches!(vocabulary.kinds[id], kind::NORMAL | kind::USER_DEFINED | kind::UNUSED);
    let least = (0..scores.len()).filter(|id| vocabulary.kinds[*id] == kind::NORMAL).map(|id| scores[id]);
    let least = least.fold(0.0, f32::min);
    let piece = |(id, text): (usize, &&str)| {
        let score = match vocabulary.kinds[id] {
            kind::USER_DEFINED => 0.0,
            _ if !is_piece(id) => least,
            _ => scores[id].max(least),
        };
        json!([text, f64::from(score)])
    };
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let mut steps = Vec::new();
    if !characters.is_empty() {
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(&characters)}));
    }
    if single {
        steps.push(replace(json!({"Regex": "^ +| +$"}), ""));
        steps.push(replace(json!({"Regex": " {2,}"}), " "));
    }
    // Where single spaces are kept, every word begins with one.
    if single || file.bool(PREFIX)?.unwrap_or(true) {
        steps.push(json!({"type": "Prepend", "prepend": "▁"}));
    }
    steps.push(replace(json!({"String": " "}), "▁"));
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": null,
        "post_processor": post_processor(file, vocabulary, false)?,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false},
        "model": {
            "type": "Unigram", "unk_id": unknown, "byte_fallback": false,
            "vocab": vocabulary.tokens.iter().enumerate().map(piece).collect::<Vec<_>>(),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_a_tokenizer_json_are_llama_cpps_or_foreign() {
        let of = |normalizers: Value, pretokenizers: Value| {
            Rules::of_json(&json!({
                "normalizer": {"type": "Sequence", "normalizers": normalizers},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers},
            }))
        };
        let spaces = json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "});
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let plain = Rules { single: true, prefix: true, ..Rules::default() };
        assert_eq!(of(json!([spaces]), json!([metaspace])), Ok(plain));
        let foreign = of(json!([{"type": "Lowercase"}]), json!([metaspace, {"type": "Punctuation"}])).unwrap();
        assert_eq!(
            (foreign.single, &foreign.foreign[..]),
            (false, &["Lowercase".to_owned(), "Punctuation".to_owned()][..])
        );
        for damaged in ["AAAAAA=", "AAAAAA==", "BAAAAP//"] {
            assert!(
                of(json!([{"type": "Precompiled", "precompiled_charsmap": damaged}]), json!([])).is_err(),
                "{damaged}"
            );
        }
    }
}
