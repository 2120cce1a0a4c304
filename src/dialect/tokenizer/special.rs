//! Which tokens are special in a GGUF file, and the chat templates.

use calibration::samples::Tokenizer;
use serde_json::Value;

use super::{Files, Token, strings};
use crate::dialect::metadata::Written;
use crate::error::Result;
use crate::families;
use crate::json::integer;
use crate::tokenizer::Templates;
use crate::tokenizer::sentencepiece;

/// Texts that end a turn; loaders take the one token under `eot_token_id` for it.
const TURN_ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
];

/// Other texts at which llama.cpp stops by itself.
const OTHER_ENDS: &[&str] = &[
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
];

/// Whether llama.cpp stops at a token with this text, whatever a file says.
pub(crate) fn knows_as_end(text: &str) -> bool {
    TURN_ENDS.contains(&text) || OTHER_ENDS.contains(&text)
}

/// The ids of the tokens among `tokens` at which llama.cpp stops by their texts, those that end a turn first.
pub(super) fn ends_by_text<'t>(tokens: impl Iterator<Item = &'t str>) -> Vec<usize> {
    let known = || TURN_ENDS.iter().chain(OTHER_ENDS);
    let mut found: Vec<(usize, usize)> =
        tokens.enumerate().filter_map(|(id, text)| Some((known().position(|end| *end == text)?, id))).collect();
    found.sort_unstable();
    let texts: Vec<&str> = found.iter().map(|(place, _)| *known().nth(*place).expect("found there")).collect();
    let all = |wanted: &[&str]| wanted.iter().all(|text| texts.contains(text));
    let calls = texts.contains(&"<|call|>") || texts.contains(&"<|calls|>");
    // Of gpt-oss and Solar `<|end|>` ends a message, and another the turn; Gemma 4's `</s>` ends nothing.
    let is_end = |text: &str| match text {
        "<|end|>" => !(calls && (all(&["<|return|>"]) || all(&["<|flush|>"]))),
        "</s>" => !all(&["<|tool_response>"]),
        _ => true,
    };
    found.iter().zip(&texts).filter(|(_, text)| is_end(text)).map(|((_, id), _)| *id).collect()
}

/// The id of the `bos`, `eos`, `unk`, `pad`, `sep` or `mask` token: by spelling, else by number.
pub(super) fn id(files: &Files, name: &str, rows: usize, out: &mut Written) -> Option<u32> {
    let own = || {
        let model = files.model.as_ref()?;
        let id = match name {
            "bos" => model.bos,
            "eos" => model.eos,
            "unk" => model.unknown,
            "pad" => model.padding,
            _ => None,
        };
        id.filter(|id| (*id as usize) < rows)
    };
    let only_model = files.tokenizer.name == sentencepiece::FILE;
    let mut refused = None;
    if let Some((file, text)) = files.tokenizer.special(name) {
        match files.tokenizer.tokenizer.token_to_id(text) {
            Some(id) if (id as usize) < rows => return Some(id),
            Some(id) => {
                refused = Some(format!("{file}: {name}_token is `{text}` ({id}), beyond the embedding's {rows} rows"));
            }
            None => refused = Some(format!("{file}: {name}_token is `{text}`, which is no token")),
        }
    }
    let (found, others) = fallback(files, name, rows, own().filter(|_| only_model), own());
    match (refused, found) {
        (None, _) => {}
        (Some(why), Some((file, id))) => {
            let text = files.tokenizer.tokenizer.id_to_token(id).unwrap_or_default();
            out.notice(format!("{why}: the file has `{text}` ({id}) of {file} in its place"));
        }
        (Some(why), None) => {
            out.notice(format!("{why}: the file has no {name}_token_id, and llama.cpp takes one by its own guess"));
        }
    }
    others.into_iter().for_each(|told| out.notice(told));
    found.map(|(_, id)| id)
}

/// The id by number where no spelling gives one, with the file that says so: `first` of the vocabulary, the configurations,
/// `last`; and what is told of numbers that cannot be.
fn fallback(
    files: &Files,
    name: &str,
    rows: usize,
    first: Option<u32>,
    last: Option<u32>,
) -> (Option<(&'static str, u32)>, Vec<String>) {
    let mut told = Vec::new();
    // The only tokenizer knows its own marks.
    if let Some(id) = first {
        return (Some((sentencepiece::FILE, id)), told);
    }
    for (file, json) in [("config.json", &files.model_config), ("generation_config.json", &files.generation)] {
        let entry = of_config(json, &format!("{name}_token_id"));
        match integer(entry).or(integer(&entry[0])).filter(|id| *id >= 0) {
            Some(id) if id < rows as i64 => return (Some((file, id as u32)), told),
            Some(id) => told.push(format!("{file}: {name}_token_id is {id}, beyond the embedding's {rows} rows")),
            None => {}
        }
    }
    (last.map(|id| (sentencepiece::FILE, id)), told)
}

/// A setting, which models of images and text have one level down.
fn of_config<'v>(json: &'v Value, key: &str) -> &'v Value {
    match &json[key] {
        Value::Null => &json[families::text_key(json)][key],
        value => value,
    }
}

/// `tokenizer.ggml.*_token_id`, and whether BOS and EOS are put around texts.
pub(super) fn write(files: &Files, tokens: &[Token], out: &mut Written) -> Result<()> {
    // The seperator is spelt so.
    const KEYS: &[(&str, &str)] = &[
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("sep", "seperator"),
        ("pad", "padding"),
        ("mask", "mask"),
    ];
    let mut told = Written::default();
    let mut found: Vec<Option<u32>> = KEYS.iter().map(|(name, _)| id(files, name, tokens.len(), &mut told)).collect();
    let of = |name: &str| KEYS.iter().position(|(key, _)| *key == name).expect("one of them");
    // Loaders put EOS alone behind texts: where the tokenizer has another mark there, as embedding models do whose chats end otherwise, that
    // is EOS, and what was becomes an end of turns. So does llama.cpp's converter.
    let (said, after) = (found[of("eos")], files.tokenizer.tokenizer.suffix());
    if let [behind] = after
        && (*behind as usize) < tokens.len()
        && said.is_some_and(|eos| eos != *behind)
        && found[of("sep")] != Some(*behind)
    {
        found[of("eos")] = Some(*behind);
    }
    for ((_, key), id) in KEYS.iter().zip(&found) {
        if let Some(id) = id {
            out.count(format!("tokenizer.ggml.{key}_token_id"), *id as usize)?;
        }
    }
    out.notices.extend(told.notices);
    out.notices.dedup();
    let (bos, eos) = (found[of("bos")], found[of("eos")]);
    ends(files, tokens, (eos, said), out)?;
    around(files, bos, eos, out);
    Ok(())
}

/// A chat model may stop at several tokens: loaders know some by their texts, and two more by their keys. Of EOS it is known what the file
/// calls so, and what the tokenizer does.
fn ends(files: &Files, tokens: &[Token], (eos, said): (Option<u32>, Option<u32>), out: &mut Written) -> Result<()> {
    let (mut turn, mut others) = (None, Vec::new());
    // Where generation_config.json says it, config.json is not asked.
    let of_config = [&files.generation, &files.model_config].map(|json| ids(of_config(json, "eos_token_id")));
    let of_config = of_config.into_iter().find(|ids| !ids.is_empty()).unwrap_or_default();
    for id in said.into_iter().chain(of_config) {
        let Some(token) = tokens.get(id as usize).filter(|_| Some(id) != eos) else { continue };
        if TURN_ENDS.contains(&token.text.as_str()) {
            turn = turn.or(Some(id));
        } else if !OTHER_ENDS.contains(&token.text.as_str()) && !others.contains(&id) {
            others.push(id);
        }
    }
    let mut others = others.into_iter();
    for (key, id) in [("eot", turn), ("eom", None)] {
        if let Some(id) = id.or_else(|| others.next()) {
            out.count(format!("tokenizer.ggml.{key}_token_id"), id as usize)?;
        }
    }
    for id in others {
        let text = &tokens[id as usize].text;
        out.notice(format!("the model also stops at token {id} (`{text}`), which a GGUF file cannot say"));
    }
    Ok(())
}

/// Whether loaders put BOS before texts and EOS behind them: what the tokenizer does.
fn around(files: &Files, bos: Option<u32>, eos: Option<u32>, out: &mut Written) {
    let tokenizer: &Tokenizer = &files.tokenizer.tokenizer;
    let (before, after) = (tokenizer.prefix(), tokenizer.suffix());
    let add_bos = bos.is_some() && before == [bos.unwrap_or_default()];
    let add_eos = eos.is_some() && after == [eos.unwrap_or_default()];
    if !add_bos && !before.is_empty() || !add_eos && !after.is_empty() {
        out.notice(format!(
            "tokenizer.json puts tokens {before:?} before and {after:?} after texts, and a GGUF file can only name BOS and EOS"
        ));
    }
    let of_json = files.tokenizer.name != sentencepiece::FILE;
    for (name, added) in [("add_bos_token", add_bos), ("add_eos_token", add_eos)] {
        if let Some(other) = files.tokenizer.flag(name).filter(|flag| *flag != added && of_json) {
            out.notice(format!(
                "tokenizer_config.json has {name} {other}, but tokenizer.json {} it: the file follows tokenizer.json",
                if added { "adds" } else { "does not add" }
            ));
        }
        out.flag(format!("tokenizer.ggml.{name}"), added);
    }
}

/// One id or a list of them.
fn ids(value: &Value) -> Vec<u32> {
    let list = value.as_array().map_or_else(|| vec![value], |list| list.iter().collect());
    list.into_iter().filter_map(|id| u32::try_from(integer(id)?).ok()).collect()
}

/// `tokenizer.chat_template`, and the others under their names.
pub(super) fn chat_templates(templates: &Templates, out: &mut Written) -> Result<()> {
    let key = "tokenizer.chat_template";
    let mut names = Vec::new();
    for (name, text) in &templates.others {
        // Names become keys.
        let clean = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c.to_ascii_lowercase() } else { '_' };
        let name: String = name.chars().map(clean).collect();
        if !names.contains(&name) {
            out.string(format!("{key}.{name}"), text);
            names.push(name);
        }
    }
    if !names.is_empty() {
        strings("tokenizer.chat_templates", names, out)?;
    }
    if let Some(text) = &templates.default {
        out.string(key, text);
    }
    Ok(())
}
