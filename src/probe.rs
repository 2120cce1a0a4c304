//! Whether a GGUF file's tokenizer finds the tokens that were added to the original's.
//!
//! Running text has none of them, so that a wrong type or spelling would be seen in chats alone.

use std::collections::HashSet;

use serde_json::Value;

use crate::dialect::tokenizer::pretokenizer::PROBE;
use crate::dialect::tokenizer::spaces_first_alone;
use crate::error::Result;
use crate::text::HELD_OUT_TEXT;
use crate::tokenizer::{TextError, TokenizerFiles};

/// Bytes of running text that are tried (16 KiB).
const SAMPLE: usize = 16 << 10;

/// Tokens from either end of the list that are tried.
const TRIED: usize = 256;

/// What the added tokens of `original` become with `written`, where that is something else. Tokens beyond `rows` are not in the
/// file and are told elsewhere, as is that llama.cpp takes no spaces along.
pub(crate) fn differences(original: &TokenizerFiles, written: &TokenizerFiles, rows: usize) -> Result<Vec<String>> {
    let all: Vec<(u32, &str, bool)> =
        original.json["added_tokens"].as_array().into_iter().flatten().filter_map(token).collect();
    let tried: Vec<_> = match all.len() > 2 * TRIED {
        true => all[..TRIED].iter().chain(&all[all.len() - TRIED..]).collect(),
        false => all.iter().collect(),
    };
    // Words that no added token is part of.
    let spaced = !spaces_first_alone(&original.json);
    let (mut lost, mut beside) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    for &&(id, text, greedy) in tried.iter().filter(|(id, ..)| (*id as usize) < rows && seen.insert(*id)) {
        let alone = [ids(original, text, false)?, ids(written, text, false)?];
        if alone[0] != alone[1] {
            lost.push(format!("`{text}` ({id}) becomes {:?} and not {:?}", alone[1], alone[0]));
            continue;
        }
        for around in [format!("of{text}in"), format!("of {text} in"), format!(" {text} ")] {
            let [before, after] = [ids(original, &around, false)?, ids(written, &around, false)?];
            if before.contains(&id) != after.contains(&id) && !greedy {
                lost.push(format!("`{text}` ({id}) in `{around}` becomes {after:?} and not {before:?}"));
                break;
            }
            if before != after && !greedy && spaced {
                beside.push(format!("`{around}` becomes {after:?} and not {before:?}"));
                break;
            }
        }
    }
    let told = |found: Vec<String>, what: &str| {
        let first = found.first()?;
        let others = if found.len() > 1 { format!("; so {} others", found.len() - 1) } else { String::new() };
        Some(format!("{what}: {first}{others}"))
    };
    let lost = told(lost, "added tokens that the written tokenizer does not find as the original does");
    let beside = told(beside, "text beside added tokens that the written tokenizer splits otherwise than the original");
    Ok(lost.into_iter().chain(beside).collect())
}

/// Texts that begin with spaces, or have breaks between lines, as running text seldom does.
const SPACED: &[&str] = &["  two spaces", " one space", "line\n\n\nline\t end ", "\n  indented"];

/// Texts that the written tokenizer gives other ids than the original.
pub(crate) struct Unlike {
    /// Whether running text is among them.
    pub is_prose: bool,
    /// The first of them with what it becomes, and how many more there are, as the end of a sentence.
    pub example: String,
}

/// What the written tokenizer gives other ids than the original of running text, of texts with spaces and breaks, and of text after a
/// special token; where the user `named` a pre-tokenizer, of more running text and of what tells these apart. `rows` are those
/// that the embedding has.
pub(crate) fn unlike(
    original: &TokenizerFiles,
    written: &TokenizerFiles,
    rows: usize,
    named: bool,
) -> Result<Option<Unlike>> {
    let prose = HELD_OUT_TEXT;
    let beginning =
        prose.match_indices('\n').map(|(at, _)| at).take_while(|at| *at <= SAMPLE).last().unwrap_or(prose.len());
    let running: &[&str] = if named { &[PROBE, prose] } else { &[&prose[..beginning]] };
    let mut is_prose = false;
    for text in running {
        is_prose |= ids(original, text, true)? != ids(written, text, true)?;
    }
    let mut short: Vec<String> = SPACED.iter().map(|text| (*text).to_owned()).collect();
    // Elsewhere text beside special tokens is compared token by token.
    if spaces_first_alone(&original.json) {
        for token in original.json["added_tokens"].as_array().into_iter().flatten().filter_map(token) {
            let (id, text, greedy) = token;
            if !greedy && (id as usize) < rows && [original, written].iter().all(|files| knows(files, id, text)) {
                short.extend([format!("{text}text"), format!("{text} text"), format!("{text}\ntext")]);
                break;
            }
        }
    }
    let mut lines: Vec<&str> = short.iter().map(String::as_str).collect();
    if is_prose {
        lines.extend(running.iter().flat_map(|text| text.lines().filter(|line| !line.is_empty())));
    }
    let mut found: Option<(String, usize)> = None;
    for text in lines {
        let [before, after] = [ids(original, text, true)?, ids(written, text, true)?];
        match &mut found {
            _ if before == after => {}
            Some((_, more)) => *more += 1,
            None => {
                let [before, after] = [pieces(original, &before), pieces(written, &after)];
                found = Some((format!("{text:?} becomes `{after}` and not `{before}`"), 0));
            }
        }
    }
    Ok(match found {
        Some((example, more)) => {
            let others = if more > 0 { format!("; so {more} others") } else { String::new() };
            Some(Unlike { is_prose, example: format!("{example}{others}") })
        }
        // Only across lines.
        None => is_prose.then(|| Unlike { is_prose, example: "a text of several lines".to_owned() }),
    })
}

fn ids(files: &TokenizerFiles, text: &str, special: bool) -> Result<Vec<u32>> {
    Ok(files.tokenizer.encode(text, special).map_err(TextError::from)?)
}

/// Whether a token's spelling becomes that token.
fn knows(files: &TokenizerFiles, id: u32, text: &str) -> bool {
    ids(files, text, false).is_ok_and(|ids| ids == [id])
}

/// Tokens by their spellings, up to some.
fn pieces(files: &TokenizerFiles, ids: &[u32]) -> String {
    const SHOWN: usize = 12;
    let spelt = |id: &u32| files.tokenizer.id_to_token(*id).unwrap_or_else(|| id.to_string());
    let shown: Vec<String> = ids.iter().take(SHOWN).map(spelt).collect();
    if ids.len() > SHOWN { format!("{} …", shown.join(" ")) } else { shown.join(" ") }
}

/// Id and spelling, and whether more than the spelling is looked at.
fn token(token: &Value) -> Option<(u32, &str, bool)> {
    let greedy = ["lstrip", "rstrip", "single_word"].iter().any(|flag| token[flag] == true);
    Some((u32::try_from(token["id"].as_u64()?).ok()?, token["content"].as_str()?, greedy))
}
