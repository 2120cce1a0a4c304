//! Lists of tokens for tiktoken: a line for each, with its bytes in base64 and its rank.
//!
//! How texts are divided, and which tokens are special, stands in code that comes with a model. Of models that are known here it stands in
//! [`KNOWN`]; lists of others are not read. Ids are those of that code, held to tiktoken's by `tests/fixtures/make_ranked.py`.

use std::path::Path;

use formats::container::file;
use formats::container::stand_in::stand_in;
use serde_json::Value;

use super::added::{CONFIG, Sources};
use super::classes::GENERAL;
use super::ranked::{Found, MOST_SPECIAL, Ranks, Setup};
use super::sentencepiece::around;
use super::{Own, sentencepiece, words};
use crate::error::{Error, Result};

/// The usual file.
const FILE: &str = "tiktoken.model";

/// The ending of lists under other names.
const ENDING: &str = ".tiktoken";

/// What a model's code does with its list.
struct Known {
    /// Names of the code's class, without `Fast`.
    classes: &'static [&'static str],
    /// Types of models whose files name no class of their own.
    model_types: &'static [&'static str],
    /// The expression that divides texts.
    words: &'static str,
    /// Whether characters are composed first (NFC).
    composes: bool,
    special: Special,
    /// Whether the order of the lines counts, without those of a token that was there before, and not the ranks in them.
    by_line: bool,
    /// Whether transformers needs the model's own code.
    by_code: bool,
}

/// Where special tokens stand.
enum Special {
    /// In tokenizer_config.json; so many rows are filled up.
    Declared(usize),
    /// In the code: these, and a number of [`EXTRA`].
    Own(&'static [&'static str]),
}

/// Special tokens `<|extra_0|>` and on, of models whose code names them.
const EXTRA: usize = 205;

/// Models whose code is known.
const KNOWN: &[Known] = &[
    Known {
        classes: &["TikTokenTokenizer"],
        model_types: &["kimi_k2", "kimi_k25", "kimi_linear", "kimi_vl"],
        words: words::KIMI,
        composes: false,
        special: Special::Declared(256),
        by_line: false,
        by_code: true,
    },
    Known {
        classes: &["QWenTokenizer"],
        model_types: &["qwen"],
        words: words::QWEN2,
        composes: true,
        special: Special::Own(&["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        by_line: false,
        by_code: true,
    },
    Known {
        classes: &["HYTokenizer"],
        model_types: &["hunyuan_v1_moe", "hunyuan_v1_dense", "hunyuan"],
        words: words::QWEN2,
        composes: true,
        special: Special::Own(&["<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"]),
        by_line: true,
        by_code: true,
    },
    Known {
        classes: &[],
        model_types: &["llama", "mllama", "mllama_text_model"],
        words: words::LLAMA3,
        composes: false,
        special: Special::Declared(0),
        by_line: false,
        by_code: false,
    },
];

impl Known {
    /// What the model's code does: by its class or, where that is a general one, by the model's type.
    fn of(settings: &Sources) -> Option<&'static Known> {
        let class = settings.class().map(|class| class.strip_suffix("Fast").unwrap_or(class));
        if let Some(known) = KNOWN.iter().find(|known| class.is_some_and(|class| known.classes.contains(&class))) {
            return Some(known);
        }
        if class.is_some_and(|class| !GENERAL.contains(&class) && class != "LlamaTokenizer") {
            return None;
        }
        let model_type = settings.model_type.as_deref()?;
        KNOWN.iter().find(|known| known.model_types.contains(&model_type))
    }
}

/// The list of a folder, by name.
fn list(folder: &Path) -> Option<String> {
    if folder.join(FILE).exists() {
        return Some(FILE.to_owned());
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.ends_with(ENDING)).min()
}

/// The list of `folder` whose model is not known, by its name.
pub(super) fn unknown(folder: &Path, settings: &Sources) -> Option<String> {
    list(folder).filter(|_| Known::of(settings).is_none())
}

/// The tokenizer of a folder with a list; `None` without one, and for one of a model that is not known.
pub(super) fn tokenizer(folder: &Path, settings: &Sources) -> Result<Option<Found>> {
    let Some((name, known)) = list(folder).zip(Known::of(settings)) else { return Ok(None) };
    let path = folder.join(&name);
    let bytes = file::read(&path, file::DESCRIPTION).map_err(Error::io(&path, "read"))?;
    converted(&name, &bytes, known, settings).map(Some).map_err(|why| failed(&path, &why))
}

/// The tokenizer of a folder whose tokenizer.model is a list, as Llama 3's.
pub(super) fn in_place_of_pieces(folder: &Path, settings: &Sources) -> Result<Option<Found>> {
    let path = folder.join(sentencepiece::FILE);
    let Some(known) = Known::of(settings) else { return Ok(None) };
    let bytes = file::read(&path, file::DESCRIPTION).map_err(Error::io(&path, "read"))?;
    if !is_list(&bytes) {
        return Ok(None);
    }
    converted(sentencepiece::FILE, &bytes, known, settings).map(Some).map_err(|why| failed(&path, &why))
}

fn failed(path: &Path, why: &str) -> Error {
    Error::failed(format!("{}: {why}", path.display()))
}

/// Whether the first line has a token and its rank.
pub(super) fn is_list(bytes: &[u8]) -> bool {
    let first = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = std::str::from_utf8(first).ok().and_then(|line| line.split_once(' '));
    line.is_some_and(|(token, rank)| !token.is_empty() && rank.trim().parse::<u32>().is_ok())
}

fn converted(name: &str, bytes: &[u8], known: &Known, settings: &Sources) -> Result<Found, String> {
    if let Some(why) = stand_in(bytes) {
        return Err(why);
    }
    // tiktoken passes over what is no letter of base64, such as a mark of the order of bytes.
    let ranks = ranks(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes), known.by_line)?;
    let special = special(ranks.len(), known, settings)?;
    let around = match known.by_code {
        true => Value::Null,
        false => marks(&special, settings),
    };
    let json = ranks.json(&Setup { first: 0, words: known.words, composes: known.composes, special, around });
    let notes = match known.by_code {
        false => Vec::new(),
        true => {
            let without = match name.ends_with(ENDING) {
                true => "no tokenizer of it",
                false => {
                    "a tokenizer of it that divides texts by Llama 3's expression, which gives some texts other ids"
                }
            };
            vec![format!(
                "{name}: texts are divided here as by the model's own code; without that (trust_remote_code) transformers makes {without}"
            )]
        }
    };
    Ok(Found { file: name.to_owned(), json, own: Own::default(), notes })
}

/// The list's tokens by rank.
fn ranks(bytes: &[u8], by_line: bool) -> Result<Ranks, String> {
    let lines = || bytes.split(|byte| matches!(byte, b'\n' | b'\r')).map(<[u8]>::trim_ascii).enumerate();
    let lines = || lines().filter(|(_, line)| !line.is_empty());
    let count = lines().count();
    if count == 0 {
        return Err("a list of tokens for tiktoken without a token; fetch it again".to_owned());
    }
    let mut ranks = Ranks::default();
    for (number, line) in lines() {
        let at = |why: String| format!("line {}: {why}; fetch the list again", number + 1);
        let mut parts = line.split(u8::is_ascii_whitespace).filter(|part| !part.is_empty());
        let (Some(token), Some(rank), None) = (parts.next(), parts.next(), parts.next()) else {
            return Err(at("not a token in base64 and its rank".to_owned()));
        };
        let rank = match by_line {
            true if ranks.has(token) => continue,
            true => Some(ranks.len()),
            false => std::str::from_utf8(rank).ok().and_then(|rank| rank.parse().ok()),
        };
        let rank = rank.ok_or_else(|| at("not a token in base64 and its rank".to_owned()))?;
        ranks.set(rank, token, count).map_err(at)?;
    }
    Ok(ranks)
}

/// Special tokens with their ids, which follow the list's.
fn special(count: usize, known: &Known, settings: &Sources) -> Result<Vec<(u32, String)>, String> {
    let id =
        |place: usize| u32::try_from(count + place).map_err(|_| format!("{count} tokens are more than ids can number"));
    let reserved = match known.special {
        Special::Own(named) => {
            let extra = (0..EXTRA).map(|place| format!("<|extra_{place}|>"));
            let texts = named.iter().map(|text| (*text).to_owned()).chain(extra);
            return texts.enumerate().map(|(place, text)| Ok((id(place)?, text))).collect();
        }
        Special::Declared(reserved) => reserved,
    };
    let declared = settings.declared().map_err(|(file, why)| format!("{file} beside it {why}"))?;
    let beyond: Vec<(usize, String)> = declared
        .numbered
        .into_iter()
        .filter_map(|(id, token)| Some(((id as usize).checked_sub(count)?, token.content)))
        .collect();
    let Some((last, text)) = beyond.last() else {
        return Err(format!(
            "{CONFIG} beside it names no special tokens behind the list's {count} (added_tokens_decoder), and the list has none; fetch \
             that file again"
        ));
    };
    if *last >= MOST_SPECIAL {
        return Err(format!(
            "{CONFIG} beside it gives `{text}` the id {}, far beyond the list's {count} tokens",
            count + last
        ));
    }
    let mut texts: Vec<Option<String>> = vec![None; reserved.max(last + 1)];
    for (place, text) in beyond {
        texts[place] = Some(text);
    }
    let filled = |(place, text): (usize, Option<String>)| {
        let id = id(place)?;
        Ok((id, text.unwrap_or_else(|| format!("<|reserved_token_{id}|>"))))
    };
    texts.into_iter().enumerate().map(filled).collect()
}

/// BOS and EOS around texts, where tokenizer_config.json says so.
fn marks(special: &[(u32, String)], settings: &Sources) -> Value {
    let of = |name: &str| {
        let (_, text) = settings.named(name).filter(|_| settings.flag(&format!("add_{name}_token")) == Some(true))?;
        special.iter().find(|(_, other)| other == text).map(|(id, text)| (*id, &text[..]))
    };
    around(of("bos"), of("eos"))
}
