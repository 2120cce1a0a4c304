//! tokenizer.json from tokens in the order of their ranks, as tiktoken (`tiktoken`) and Mistral's library (`tekken`) have them.
//!
//! Such a list is byte-level BPE without merges: of all neighbours that form a token, those are joined first whose token has the lowest
//! rank. Every way to join two tokens to a third is a merge, then, as in the files that transformers makes of a list. A word that is a token
//! as a whole is taken as it is (`ignore_merges`), which both libraries do.

use std::collections::HashMap;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::added::{Added, Sources};
use super::alphabet::spelt;
use super::{Own, halves, tekken, tiktoken};
use crate::error::Result;

/// Bytes of the longest token that is believed in; the longest known have 256, and all ways to join one are tried.
const LONGEST: usize = 1024;

/// Special tokens that are believed in, beside those that a file has.
pub(super) const MOST_SPECIAL: usize = 1 << 16;

/// A list in the form of tokenizer.json.
pub(super) struct Found {
    /// The file's name.
    pub file: String,
    pub json: Value,
    /// Special tokens that the list names itself.
    pub own: Own,
    /// What transformers does otherwise.
    pub notes: Vec<String>,
}

/// The tokenizer of a folder without tokenizer.json that has a list, or a vocabulary and merges. `None` where there is none, where the model is none whose way of
/// dividing texts is known ([`tiktoken::unknown`]), and where tokenizer.model is one of SentencePiece. Fails for a list that is broken.
pub(super) fn tokenizer(folder: &Path, settings: &Sources) -> Result<Option<Found>> {
    if folder.join(super::sentencepiece::FILE).exists() {
        return tiktoken::in_place_of_pieces(folder, settings);
    }
    for read in [tekken::tokenizer, tiktoken::tokenizer, halves::tokenizer] {
        if let Some(found) = read(folder, settings)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Bytes of tokens, by rank, as they are gathered.
#[derive(Default)]
pub(super) struct Ranks {
    tokens: Vec<Option<Vec<u8>>>,
    places: HashMap<Vec<u8>, usize>,
}

/// What is done with a list's tokens.
pub(super) struct Setup<'a> {
    /// The id of the token with rank 0.
    pub first: usize,
    /// The expression that divides texts.
    pub words: &'a str,
    /// Whether characters are composed first (NFC).
    pub composes: bool,
    /// Tokens that are looked for before texts are divided, by id.
    pub special: Vec<(u32, String)>,
    /// The step that puts tokens around texts.
    pub around: Value,
}

impl Ranks {
    /// Takes the token of a rank, `count` tokens being those that there are. Fails, with the reason, for what is no base64, for no bytes
    /// or too many, for a token or a rank that was there before, and for a rank that none of so many has.
    pub fn set(&mut self, rank: usize, spelling: &[u8], count: usize) -> Result<(), String> {
        let shown = || String::from_utf8_lossy(&spelling[..spelling.len().min(40)]).into_owned();
        let bytes = STANDARD.decode(spelling).map_err(|error| format!("`{}` is no base64: {error}", shown()))?;
        if bytes.is_empty() || bytes.len() > LONGEST {
            return Err(format!("the token of rank {rank} has {} bytes, expected 1 to {LONGEST}", bytes.len()));
        }
        if rank >= count {
            return Err(format!(
                "`{}` has the rank {rank}, and there are {count} tokens, whose ranks count from 0",
                shown()
            ));
        }
        self.tokens.resize(self.tokens.len().max(count), None);
        if let Some(other) = self.places.insert(bytes.clone(), rank) {
            return Err(format!("ranks {other} and {rank} are the same token, `{}`", spelt(&bytes)));
        }
        match self.tokens[rank].replace(bytes) {
            Some(_) => Err(format!("two tokens have the rank {rank}")),
            None => Ok(()),
        }
    }

    /// Whether a token is there already.
    pub fn has(&self, spelling: &[u8]) -> bool {
        STANDARD.decode(spelling).is_ok_and(|bytes| self.places.contains_key(&bytes))
    }

    /// Number of tokens that there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// tokenizer.json of the list. Ranks have no holes, where as many tokens were set as were told of.
    pub fn json(&self, setup: &Setup<'_>) -> Value {
        let tokens: Vec<&[u8]> = self.tokens.iter().flatten().map(|token| &token[..]).collect();
        let mut vocabulary: Map<String, Value> =
            tokens.iter().enumerate().map(|(rank, token)| (spelt(token), (setup.first + rank).into())).collect();
        if setup.first > 0 {
            vocabulary.extend(setup.special.iter().map(|(id, text)| (text.clone(), (*id).into())));
        }
        let added = setup.special.iter().map(|(id, text)| Added::new(text, true).to_json(*id));
        let splits =
            json!({"type": "Split", "pattern": {"Regex": setup.words}, "behavior": "Isolated", "invert": false});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": setup.composes.then(|| json!({"type": "NFC"})),
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [splits, bytes]},
            "post_processor": setup.around,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                "vocab": vocabulary, "merges": self.merges(&tokens),
            },
        })
    }

    /// Every way to join two tokens to a third, by the rank of what is made, then of its parts.
    fn merges(&self, tokens: &[&[u8]]) -> Vec<String> {
        let mut merges = Vec::with_capacity(tokens.len());
        let mut ways: Vec<[usize; 2]> = Vec::new();
        for token in tokens {
            ways.clear();
            for at in 1..token.len() {
                let parts = token.split_at(at);
                if let (Some(left), Some(right)) = (self.places.get(parts.0), self.places.get(parts.1)) {
                    ways.push([*left, *right]);
                }
            }
            ways.sort_unstable();
            merges.extend(ways.iter().map(|way| way.map(|rank| spelt(tokens[rank])).join(" ")));
        }
        merges
    }
}
