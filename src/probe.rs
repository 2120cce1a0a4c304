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
        let ids = |files: &TokenizerFiles, text: &str| files.tokenizer.encode(text, false).map_err(TextError::from);
        let alone = [ids(original, text)?, ids(written, text)?];
        if alone[0] != alone[1] {
            lost.push(format!("`{text}` ({id}) becomes {:?} and not {:?}", alone[1], alone[0]));
            continue;
        }
        for around in [format!("of{text}in"), format!("of {text} in"), format!(" {text} ")] {
            let [before, after] = [ids(original, &around)?, ids(written, &around)?];
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

/// Whether both give running text the same ids; where the user `named` a pre-tokenizer, more of it and the text that tells these
/// apart.
pub(crate) fn agree(original: &TokenizerFiles, written: &TokenizerFiles, named: bool) -> Result<bool> {
    let prose = HELD_OUT_TEXT;
    let beginning =
        prose.match_indices('\n').map(|(at, _)| at).take_while(|at| *at <= SAMPLE).last().unwrap_or(prose.len());
    let texts: &[&str] = if named { &[PROBE, prose] } else { &[&prose[..beginning]] };
    for text in texts {
        let [original, written] = [original, written].map(|files| files.tokenizer.encode(text, true));
        if original.map_err(TextError::from)? != written.map_err(TextError::from)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Id and spelling, and whether more than the spelling is looked at.
fn token(token: &Value) -> Option<(u32, &str, bool)> {
    let greedy = ["lstrip", "rstrip", "single_word"].iter().any(|flag| token[flag] == true);
    Some((u32::try_from(token["id"].as_u64()?).ok()?, token["content"].as_str()?, greedy))
}
