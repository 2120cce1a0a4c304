//! tekken.json, the tokenizer of Mistral's own library: tokens by rank, special ones before them, and the expression that divides texts.
//!
//! Ids are those of that library and of what transformers makes of the file, held to both by `tests/fixtures/make_ranked.py`.

use std::path::Path;

use serde_json::Value;

use super::Own;
use super::added::Sources;
use super::ranked::{Found, MOST_SPECIAL, Ranks, Setup};
use super::sentencepiece::around;
use crate::error::{Error, Result};

/// The file that is read here.
const FILE: &str = "tekken.json";

/// Special tokens of files that do not list them, up to version 7.
const EARLIER: &[&str] = &[
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// The last version without a list of special tokens.
const LAST_EARLIER: u32 = 7;

/// What the library calls its special tokens.
const NAMED: [(&str, &str); 4] = [("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"), ("pad", "<pad>")];

/// The tokenizer of a folder with this file; `None` without it.
pub(super) fn tokenizer(folder: &Path, settings: &Sources) -> Result<Option<Found>> {
    let path = folder.join(FILE);
    let Some(json) = super::read_words(&path)? else { return Ok(None) };
    converted(&json, settings).map(Some).map_err(|why| Error::failed(format!("{}: {why}", path.display())))
}

fn converted(json: &Value, settings: &Sources) -> Result<Found, String> {
    let config = &json["config"];
    let words = config["pattern"].as_str().ok_or("its config has no pattern, the expression that divides texts")?;
    let special = special(json)?;
    let ranks = ranks(json, special.len())?;
    let named: Vec<(&'static str, String)> = NAMED
        .iter()
        .filter(|(_, text)| special.iter().any(|other| other == text))
        .map(|(name, text)| (*name, (*text).to_owned()))
        .collect();
    let special: Vec<(u32, String)> = (0..).zip(special).collect();
    // The library puts BOS before texts, and EOS behind them when it is told to.
    let of = |name: &str, default: bool| {
        if !settings.flag(&format!("add_{name}_token")).unwrap_or(default) {
            return None;
        }
        let own = || named.iter().find(|(own, _)| *own == name).map(|(_, text)| &text[..]);
        let text = settings.named(name).map(|(_, text)| text).or_else(own)?;
        special.iter().find(|(_, other)| other == text).map(|(id, text)| (*id, &text[..]))
    };
    let (bos, eos) = (of("bos", true), of("eos", false));
    let notes = match (settings.flag("add_bos_token"), bos) {
        (None, Some(_)) => vec![format!(
            "{FILE}: transformers 5 puts no BOS before texts where mistral-common is not installed: here one is put there, as by that \
             library and llama.cpp; say `\"add_bos_token\": true` or `false` in tokenizer_config.json"
        )],
        _ => Vec::new(),
    };
    let around = around(bos, eos);
    let json = ranks.json(&Setup { first: special.len(), words, composes: false, special, around });
    Ok(Found { file: FILE.to_owned(), json, own: Own { file: FILE, named }, notes })
}

/// Special tokens by id; those without a name are filled up.
fn special(json: &Value) -> Result<Vec<String>, String> {
    let config = &json["config"];
    let mut texts: Vec<String> = match &json["special_tokens"] {
        Value::Null => {
            let version = config["version"].as_str().unwrap_or_default();
            let number = version.strip_prefix('v').and_then(|version| version.parse::<u32>().ok());
            if number.is_none_or(|number| number > LAST_EARLIER) {
                return Err(format!(
                    "it has no special_tokens, and its version is `{version}`, where they have to stand in it"
                ));
            }
            EARLIER.iter().map(|text| (*text).to_owned()).collect()
        }
        listed => {
            let listed = listed.as_array().ok_or("its special_tokens are no list")?;
            let mut texts = vec![None; listed.len()];
            for token in listed {
                let (rank, text) = (token["rank"].as_u64(), token["token_str"].as_str());
                let text = text
                    .filter(|text| !text.is_empty())
                    .ok_or_else(|| format!("special token {token} has no token_str"))?;
                let place = rank.and_then(|rank| texts.get_mut(usize::try_from(rank).ok()?));
                let place = place.filter(|place| place.is_none()).ok_or_else(|| {
                    format!(
                        "special token `{text}` has the rank {}, and those of {} tokens have to count from 0",
                        token["rank"],
                        listed.len()
                    )
                })?;
                *place = Some(text.to_owned());
            }
            texts.into_iter().flatten().collect()
        }
    };
    let count = match &config["default_num_special_tokens"] {
        Value::Null => texts.len(),
        count => count
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
            .filter(|count| *count <= MOST_SPECIAL)
            .ok_or_else(|| format!("default_num_special_tokens is {count}, expected a number up to {MOST_SPECIAL}"))?,
    };
    if texts.len() > count {
        return Err(format!("it has {} special tokens, and default_num_special_tokens is {count}", texts.len()));
    }
    texts.extend((texts.len()..count).map(|id| format!("<SPECIAL_{id}>")));
    let mut sorted: Vec<&String> = texts.iter().collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two special tokens are `{}`", pair[0])),
        None => Ok(texts),
    }
}

/// The tokens by rank, up to the size of the vocabulary that the model was trained with.
fn ranks(json: &Value, special: usize) -> Result<Ranks, String> {
    let listed = json["vocab"].as_array().filter(|listed| !listed.is_empty()).ok_or("it has no vocab")?;
    let count = match &json["config"]["default_vocab_size"] {
        Value::Null => listed.len(),
        size => {
            let inner = size.as_u64().and_then(|size| usize::try_from(size).ok()?.checked_sub(special));
            inner.filter(|inner| (1..=listed.len()).contains(inner)).ok_or_else(|| {
                format!(
                    "default_vocab_size is {size}, and there are {special} special tokens and {} others",
                    listed.len()
                )
            })?
        }
    };
    let mut ranks = Ranks::default();
    for (place, token) in listed[..count].iter().enumerate() {
        if token["rank"].as_u64() != Some(place as u64) {
            return Err(format!("token {place} of its vocab has the rank {}, expected {place}", token["rank"]));
        }
        let spelling =
            token["token_bytes"].as_str().ok_or_else(|| format!("token {place} of its vocab has no token_bytes"))?;
        ranks.set(place, spelling.as_bytes(), count)?;
    }
    Ok(ranks)
}
