//! tokenizer.json from a SentencePiece tokenizer.model, for folders that have no other tokenizer.
//!
//! The same steps as in published tokenizer.json files that were made from one: rules for characters, `▁` for spaces and
//! before texts, then BPE with the merges that follow from the pieces' scores, or Unigram. Ids are SentencePiece's own but
//! for two things that are done as transformers does: special tokens written out in a text become those tokens, and with
//! `"legacy": false` in tokenizer_config.json only a text that does not begin with a space gets one before it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use formats::SentencePiece;
use formats::container::sentencepiece::{Algorithm, Piece};
use formats::container::stand_in::stand_in;
use serde_json::{Map, Value, json};

use crate::checkpoint::{TokenizerFile, read_json};
use crate::error::{Error, Result};
use crate::import::gguf_tokenizer::kind;

/// The file that is read here.
pub(crate) const FILE: &str = "tokenizer.model";

/// The tokenizer of `folder`, from its tokenizer.model and what lies beside it: tokenizer_config.json,
/// special_tokens_map.json and added_tokens.json. `None` without that file; fails for one that cannot be read.
pub(crate) fn tokenizer(folder: &Path) -> Result<Option<TokenizerFile>> {
    let path = folder.join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, "read")(error)),
    };
    let failed = |why: String| Error::failed(format!("{}: {why}", path.display()));
    let model = SentencePiece::parse(&bytes).map_err(|error| failed(not_a_model(&bytes, &error)))?;
    let json_of = |name: &str| Ok::<_, Error>(read_json(&folder.join(name))?.unwrap_or(Value::Null));
    let settings = Settings {
        config: json_of("tokenizer_config.json")?,
        map: json_of("special_tokens_map.json")?,
        added: json_of("added_tokens.json")?,
    };
    let piece = |id: Option<u32>| Some(model.pieces.get(id? as usize)?.text.clone());
    let (bos, eos) = (piece(model.bos), piece(model.eos));
    let json = build(&model, &settings).map_err(failed)?;
    Ok(Some(TokenizerFile { name: FILE, json: json.to_string().into_bytes(), bos, eos }))
}

/// What to say of a tokenizer.model that is no SentencePiece model.
pub(crate) fn not_a_model(bytes: &[u8], error: &formats::Error) -> String {
    if let Some(why) = stand_in(bytes) {
        return why;
    }
    // Llama 3's is a list of tokens in base64 with their ranks.
    let first = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let ranked = std::str::from_utf8(first).ok().and_then(|line| line.split_once(' '));
    match ranked.is_some_and(|(token, rank)| !token.is_empty() && rank.trim().parse::<u32>().is_ok()) {
        true => format!(
            "a list of tokens for tiktoken, and not a SentencePiece model; save the model's tokenizer.json beside it: {}",
            save_tokenizer("MODEL")
        ),
        false => format!("not a SentencePiece model: {error}"),
    }
}

/// The line of Python that saves tokenizer.json.
pub(crate) fn save_tokenizer(model: &str) -> String {
    format!(
        "python3 -c 'from transformers import AutoTokenizer as T; T.from_pretrained(\"{model}\").save_pretrained(\"{model}\")'"
    )
}

/// The files beside tokenizer.model.
struct Settings {
    config: Value,
    map: Value,
    added: Value,
}

/// A token that is looked for in texts before they are split.
struct Added {
    content: String,
    special: bool,
    /// Looked for in the text as it is after the rules for characters.
    normalized: bool,
    lstrip: bool,
    rstrip: bool,
    single_word: bool,
}

impl Added {
    fn new(content: &str, special: bool, normalized: bool) -> Added {
        Added { content: content.to_owned(), special, normalized, lstrip: false, rstrip: false, single_word: false }
    }

    fn read(token: &Value) -> Option<Added> {
        let flag = |name: &str| token[name] == true;
        let normalized = token["normalized"].as_bool().unwrap_or(!flag("special"));
        let mut added = Added::new(token["content"].as_str()?, flag("special"), normalized);
        (added.lstrip, added.rstrip, added.single_word) = (flag("lstrip"), flag("rstrip"), flag("single_word"));
        Some(added)
    }

    fn to_json(&self, id: u32) -> Value {
        json!({
            "id": id, "content": self.content, "single_word": self.single_word, "lstrip": self.lstrip,
            "rstrip": self.rstrip, "normalized": self.normalized, "special": self.special,
        })
    }
}

impl Settings {
    /// The spelling of the `bos`, `eos`, `unk`, … token.
    fn token(&self, name: &str) -> Option<&str> {
        let key = format!("{name}_token");
        [&self.config, &self.map].into_iter().find_map(|json| json[&key].as_str().or(json[&key]["content"].as_str()))
    }

    fn flag(&self, name: &str) -> Option<bool> {
        self.config[name].as_bool()
    }

    /// What was added since the model was trained, by id.
    fn added(&self, model: &SentencePiece) -> Result<BTreeMap<u32, Added>, String> {
        let mut added: BTreeMap<u32, Added> = BTreeMap::new();
        for (id, piece) in model.pieces.iter().enumerate() {
            let special = matches!(i64::from(piece.kind), kind::CONTROL | kind::UNKNOWN);
            if special || i64::from(piece.kind) == kind::USER_DEFINED {
                added.insert(id as u32, Added::new(&piece.text, special, false));
            }
        }
        let decoder = self.config["added_tokens_decoder"].as_object().filter(|decoder| !decoder.is_empty());
        // Later files say all of it in one place.
        for (content, id) in self.added.as_object().filter(|_| decoder.is_none()).into_iter().flatten() {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| format!("added_tokens.json beside it has no id for `{content}`"))?;
            added.insert(id, Added::new(content, false, true));
        }
        for (id, token) in decoder.into_iter().flatten() {
            let read = id.parse::<u32>().ok().zip(Added::read(token));
            let (id, token) = read.ok_or_else(|| {
                format!("tokenizer_config.json beside it has an entry in added_tokens_decoder, `{id}`, without an id or a content")
            })?;
            added.insert(id, token);
        }
        // Tokens that files name without an id come last.
        let known = model.pieces.iter().map(|piece| piece.text.as_str()).chain(added.values().map(|a| &a.content[..]));
        let known: std::collections::HashSet<&str> = known.collect();
        let mut named: Vec<String> = Vec::new();
        let lists = ["additional_special_tokens", "extra_special_tokens"];
        let files = [Some(&self.config), Some(&self.map).filter(|_| decoder.is_none())];
        let listed = files.into_iter().flatten().flat_map(|json| lists.map(|key| &json[key]));
        let listed = listed.filter_map(Value::as_array).flatten();
        let listed = listed.filter_map(|token| token.as_str().or(token["content"].as_str()));
        let single = ["bos", "eos", "unk", "pad", "sep", "cls", "mask"].into_iter().filter_map(|name| self.token(name));
        for content in single.chain(listed) {
            if !content.is_empty() && !known.contains(content) && !named.iter().any(|other| other == content) {
                named.push(content.to_owned());
            }
        }
        let highest = added.keys().last().map_or(0, |id| id + 1);
        let next = highest.max(model.pieces.len() as u32);
        added.extend((next..).zip(named.iter().map(|content| Added::new(content, true, false))));
        // What files name as special is, however it was added.
        for token in added.values_mut() {
            token.special |=
                ["bos", "eos", "unk", "pad"].into_iter().any(|name| self.token(name) == Some(&token.content));
        }
        Ok(added)
    }
}

/// tokenizer.json. Fails, with the reason, for what the tokenizers library has no steps for.
fn build(model: &SentencePiece, settings: &Settings) -> Result<Value, String> {
    if model.whitespace_as_suffix {
        return Err("it puts spaces behind words, which cannot be done here".to_owned());
    }
    let unknown = model.pieces.iter().position(|piece| i64::from(piece.kind) == kind::UNKNOWN);
    let unknown = unknown.ok_or("it has no piece for what is unknown")?;
    let mut ids: HashMap<&str, usize> = HashMap::with_capacity(model.pieces.len());
    for (id, piece) in model.pieces.iter().enumerate() {
        if piece.text.is_empty() {
            return Err(format!("piece {id} is empty"));
        }
        if let Some(earlier) = ids.insert(&piece.text, id) {
            return Err(format!("pieces {earlier} and {id} are both `{}`", piece.text));
        }
    }
    let added = settings.added(model)?;
    // An added token may take the place of a piece.
    let text = |id: usize| added.get(&(id as u32)).map_or(&model.pieces[id].text, |token| &token.content);
    for (id, token) in &added {
        if ids.get(&token.content[..]).is_some_and(|other| *other != *id as usize && text(*other) == &token.content) {
            return Err(format!(
                "`{}` is piece {} and, by the files beside it, token {id}",
                token.content,
                ids[&token.content[..]]
            ));
        }
    }
    let bytes = model.byte_fallback;
    let tokens = match model.algorithm {
        Algorithm::Bpe => {
            let beyond =
                added.range(model.pieces.len() as u32..).map(|(id, token)| (token.content.clone(), *id as usize));
            let vocab = (0..model.pieces.len()).map(|id| (text(id).clone(), id)).chain(beyond);
            let vocab: Map<String, Value> = vocab.map(|(text, id)| (text, id.into())).collect();
            let merges = merges(&model.pieces, &ids, &|id| text(id) == &model.pieces[id].text);
            json!({
                "type": "BPE", "dropout": null, "unk_token": text(unknown), "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": bytes, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            })
        }
        Algorithm::Unigram => {
            let mut vocab: Vec<Value> =
                model.pieces.iter().enumerate().map(|(id, piece)| json!([text(id), piece.score])).collect();
            for (id, token) in added.range(model.pieces.len() as u32..) {
                if *id as usize > vocab.len() + MOST_UNUSED {
                    return Err(format!(
                        "token {id} (`{}`) was added far beyond its {} pieces",
                        token.content,
                        model.pieces.len()
                    ));
                }
                vocab.extend(
                    (vocab.len()..*id as usize).map(|id| json!([format!("[UNUSED{id}]"), 0.0])).collect::<Vec<_>>(),
                );
                vocab.push(json!([token.content, 0.0]));
            }
            json!({"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": bytes})
        }
        Algorithm::Words | Algorithm::Characters => {
            return Err("it splits texts at spaces or into characters; only BPE and Unigram models are read".to_owned());
        }
    };
    let (normalizer, pre_tokenizer) = spaces(model, settings);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.iter().map(|(id, token)| token.to_json(*id)).collect::<Vec<_>>(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(model, settings, &added),
        "decoder": null,
        "model": tokens,
    }))
}

/// Rows without a token that are believed in.
const MOST_UNUSED: usize = 1 << 20;

/// What is done to a text before it is split: the normalizer and the pre-tokenizer.
fn spaces(model: &SentencePiece, settings: &Settings) -> (Value, Value) {
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let mut steps = Vec::new();
    if !model.rules.is_empty() {
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(&model.rules)}));
    }
    if model.remove_extra_whitespaces {
        // What is spelt like a space ends a text no less than one.
        let behind = if model.escape_whitespaces { "[ ▁]+$" } else { " +$" };
        steps.push(replace(json!({"Regex": format!("^ +|{behind}")}), ""));
        steps.push(replace(json!({"Regex": " {2,}"}), " "));
    }
    let space = if model.escape_whitespaces { "▁" } else { " " };
    let prefix = settings.flag("add_prefix_space").unwrap_or(model.add_dummy_prefix);
    let mut pre_tokenizer = Value::Null;
    if settings.flag("legacy") == Some(false) && model.escape_whitespaces {
        let scheme = if prefix { "first" } else { "never" };
        pre_tokenizer = json!({"type": "Metaspace", "replacement": space, "prepend_scheme": scheme, "split": false});
    } else {
        if prefix {
            steps.push(json!({"type": "Prepend", "prepend": space}));
        }
        if model.escape_whitespaces {
            steps.push(replace(json!({"String": " "}), space));
        }
    }
    let normalizer = if steps.is_empty() { Value::Null } else { json!({"type": "Sequence", "normalizers": steps}) };
    (normalizer, pre_tokenizer)
}

/// Every way to join two pieces to a third, the best-scored result first; control tokens and bytes take no part, nor do
/// pieces that are none any more (`is_piece`).
fn merges(pieces: &[Piece], ids: &HashMap<&str, usize>, is_piece: &dyn Fn(usize) -> bool) -> Vec<Value> {
    let joined = |id: &usize| {
        matches!(i64::from(pieces[*id].kind), kind::NORMAL | kind::USER_DEFINED | kind::UNUSED) && is_piece(*id)
    };
    let mut merges: Vec<(usize, &str, &str)> = Vec::new();
    for id in (0..pieces.len()).filter(joined) {
        let text = &pieces[id].text[..];
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if [left, right].iter().all(|part| ids.get(part).is_some_and(joined)) {
                merges.push((id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| {
        let by_score = pieces[b.0].score.total_cmp(&pieces[a.0].score);
        by_score.then(a.0.cmp(&b.0)).then(a.1.len().cmp(&b.1.len()))
    });
    merges.into_iter().map(|(_, left, right)| json!([left, right])).collect()
}

/// BOS before texts unless tokenizer_config.json says otherwise, EOS behind them if it says so.
fn post_processor(model: &SentencePiece, settings: &Settings, added: &BTreeMap<u32, Added>) -> Value {
    let special = |name: &str, own: Option<u32>, default: bool| -> Option<(u32, &str)> {
        if !settings.flag(&format!("add_{name}_token")).unwrap_or(default) {
            return None;
        }
        let own = added.get_key_value(&own?).map(|(id, token)| (*id, token));
        let named = settings.token(name).and_then(|text| added.iter().find(|(_, token)| token.content == text));
        named.map(|(id, token)| (*id, token)).or(own).map(|(id, token)| (id, &token.content[..]))
    };
    let bos = special("bos", model.bos.or(Some(u32::MAX)), true);
    let eos = special("eos", model.eos.or(Some(u32::MAX)), false);
    crate::import::gguf_tokenizer::around(bos, eos)
}

/// Bytes in base64.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = (0..3).fold(0u32, |word, i| word << 8 | u32::from(chunk.get(i).copied().unwrap_or(0)));
        for i in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    out
}
