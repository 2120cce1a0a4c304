//! tokenizer.json from a SentencePiece tokenizer.model, for folders that have no other tokenizer.
//!
//! The same steps as in published tokenizer.json files that were made from one: rules for characters, `▁` for spaces and
//! before texts, then BPE with the merges that follow from the pieces' scores, or Unigram. Ids are SentencePiece's own but
//! for what is done as transformers does: special tokens written out in a text become those tokens, and each text between them is
//! split for itself. Its `LlamaTokenizer` makes BPE of every model, without rules for characters, puts a space before texts
//! whatever the model says, and none before a text that begins with one; with `"legacy": false`, its default, none but the first
//! text gets one. Where transformers 5 leaves out the space or BOS because no class is named, it is alone with that: here
//! they stay, and a note says so.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use formats::SentencePiece;
use formats::container::file;
use formats::container::sentencepiece::{Algorithm, Piece};
use formats::container::stand_in::stand_in;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::tokenizer::Own;
use crate::tokenizer::added::{Added, Declared, Sources};
use crate::tokenizer::classes::{GENERAL, puts_marks, save_tokenizer};
use crate::tokenizer::tiktoken::is_list;

/// Kinds of token, as SentencePiece and GGUF files number them.
pub(crate) mod kind {
    pub const NORMAL: i64 = 1;
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
    pub const BYTE: i64 = 6;
}

/// The file that is read here.
pub(crate) const FILE: &str = "tokenizer.model";

/// The tokenizer of `folder`, from its tokenizer.model and what lies beside it. `None` without that file; fails for one that
/// cannot be read.
pub(crate) fn tokenizer(folder: &Path, beside: &Sources) -> Result<Option<Converted>> {
    let path = folder.join(FILE);
    let failed = |why: String| Error::failed(format!("{}: {why}", path.display()));
    let Some(model) = read(folder)? else { return Ok(None) };
    let model = model.map_err(failed)?;
    let declared = beside.declared().map_err(|(file, why)| failed(format!("{file} beside it {why}")))?;
    let numbered: HashSet<u32> = declared.numbered.iter().map(|(id, _)| *id).collect();
    let added = added_tokens(&model, declared);
    let json = build(&model, beside, &added).map_err(failed)?;
    let notes = notes(&model, beside, &added);
    let piece = |id: Option<u32>| Some(model.pieces.get(id? as usize)?.text.clone());
    let named = [("bos", piece(model.bos)), ("eos", piece(model.eos))];
    let own = Own { file: FILE, named: named.into_iter().filter_map(|(name, text)| Some((name, text?))).collect() };
    let added = added.into_iter().filter(|(_, (_, declared))| *declared);
    let known = |id: &u32| (*id as usize) < model.pieces.len() || numbered.contains(id);
    let added = added.map(|(id, (token, _))| (Some(id).filter(known), token)).collect();
    Ok(Some(Converted { json, added, own, notes }))
}

/// The model in `folder`, or why it is none; `None` without the file.
pub(crate) fn read(folder: &Path) -> Result<Option<Result<SentencePiece, String>>> {
    let path = folder.join(FILE);
    match file::read(&path, file::DESCRIPTION) {
        Ok(bytes) => Ok(Some(SentencePiece::parse(&bytes).map_err(|error| not_a_model(&bytes, &error)))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path, "read")(error)),
    }
}

/// What to say of a tokenizer.model that is no SentencePiece model.
fn not_a_model(bytes: &[u8], error: &formats::Error) -> String {
    if let Some(why) = stand_in(bytes) {
        return why;
    }
    // Llama 3's is one; of models that are known it is read as such.
    match is_list(bytes) {
        true => format!(
            "a list of tokens for tiktoken, and not a SentencePiece model, and of this model it is not known how it divides texts into words; \
             save the model's tokenizer.json beside it: {}",
            save_tokenizer("MODEL")
        ),
        false => format!("not a SentencePiece model: {error}"),
    }
}

/// A tokenizer.model in the form of tokenizer.json.
pub(crate) struct Converted {
    pub json: Value,
    /// What the files beside it add, in the order of the ids; without an id where no file and no piece has one.
    pub added: Vec<(Option<u32>, Added)>,
    /// The model's own BOS and EOS.
    pub own: Own,
    /// What transformers does otherwise.
    pub notes: Vec<String>,
}

/// Whether the class is one that transformers has rules of its own for, whatever the model says.
fn is_llama(settings: &Sources) -> bool {
    settings.class().is_some_and(|class| class.starts_with("LlamaTokenizer"))
}

/// Whether [`notes`] tells all that transformers does otherwise by a class: it is Llama's or none of its own.
pub(crate) fn has_notes(class: &str) -> bool {
    class.starts_with("LlamaTokenizer") || GENERAL.contains(&class)
}

/// What a reader of a report should know of how texts are split.
fn notes(model: &SentencePiece, settings: &Sources, added: &BTreeMap<u32, (Added, bool)>) -> Vec<String> {
    let mut notes = Vec::new();
    let no_bos =
        settings.flag("add_bos_token").is_none() && post_processor(model, settings, added) != around(None, None);
    let class = settings.class();
    // Those that put marks around texts do so whatever is said.
    if no_bos && class.is_some_and(|class| !GENERAL.contains(&class) && !puts_marks(class)) {
        notes.push(
            "tokenizer_config.json has no add_bos_token, and transformers 5 puts no BOS before texts then: here one is put there, as earlier \
             versions and llama.cpp do; say `\"add_bos_token\": true` or `false` in it"
                .to_owned(),
        );
    }
    if is_llama(settings) {
        if model.algorithm == Algorithm::Unigram {
            notes.push(
                "tokenizer.model is a unigram model, and the class LlamaTokenizer joins its pieces as BPE: texts are split as \
                 transformers 5 and llama.cpp do, and not as SentencePiece does"
                    .to_owned(),
            );
        }
        if model.normalizes() {
            notes.push(
                "the class LlamaTokenizer does not apply tokenizer.model's normalization to texts, nor is it applied here".to_owned(),
            );
        }
    } else if class.is_none_or(|class| GENERAL.contains(&class)) {
        let space = prefix(model, settings).then_some("a space before texts");
        let left: Vec<&str> = space.into_iter().chain(no_bos.then_some("BOS")).collect();
        if !left.is_empty() {
            let left = left.join(" and without ");
            notes.push(format!(
                "transformers 5 reads this tokenizer.model without {left}, as no file names a tokenizer_class of its own: here it is read \
                 as SentencePiece, earlier versions and llama.cpp do; for a model like Llama 2, tokenizer_config.json should say \
                 `\"tokenizer_class\": \"LlamaTokenizer\", \"add_bos_token\": true`"
            ));
        }
    }
    // The library counts on from the last piece, in the order of the ids.
    let texts: HashSet<&str> = model.pieces.iter().map(|piece| &piece.text[..]).collect();
    let new = added.iter().filter(|(_, (token, _))| !texts.contains(&token.content[..]));
    let moved: Vec<String> = new
        .zip(model.pieces.len() as u32..)
        .filter(|((id, _), next)| *id != next)
        .map(|((id, (token, _)), next)| format!("`{}` the id {id}, and transformers 5 gives it {next}", token.content))
        .collect();
    if let Some(first) = moved.first() {
        let others = if moved.len() > 1 { format!("; so {} others", moved.len() - 1) } else { String::new() };
        notes.push(format!(
            "the files beside tokenizer.model give {first}{others}: the files' ids are taken, as llama.cpp does"
        ));
    }
    notes
}

/// Whether texts get a space before them.
fn prefix(model: &SentencePiece, settings: &Sources) -> bool {
    settings.flag("add_prefix_space").unwrap_or(model.add_dummy_prefix || is_llama(settings))
}

/// Added tokens by id: the model's own special pieces, and what the files beside it declare, with true.
///
/// Ids that files give are kept, as the tokenizers did that such folders were made for. Tokens without one come last.
fn added_tokens(model: &SentencePiece, declared: Declared) -> BTreeMap<u32, (Added, bool)> {
    let mut added: BTreeMap<u32, (Added, bool)> = BTreeMap::new();
    let mut pieces: HashMap<&str, u32> = HashMap::with_capacity(model.pieces.len());
    for (id, piece) in model.pieces.iter().enumerate() {
        pieces.entry(&piece.text).or_insert(id as u32);
        let special = matches!(i64::from(piece.kind), kind::CONTROL | kind::UNKNOWN);
        if special || i64::from(piece.kind) == kind::USER_DEFINED {
            added.insert(id as u32, (Added { normalized: false, ..Added::new(&piece.text, special) }, false));
        }
    }
    let names: HashSet<String> = declared.named.iter().map(|(_, token)| token.content.clone()).collect();
    for (id, token) in declared.numbered {
        added.insert(id, (token, true));
    }
    let mut known: HashMap<String, u32> = added.iter().map(|(id, (token, _))| (token.content.clone(), *id)).collect();
    let mut next = added.keys().last().map_or(0, |id| id + 1).max(model.pieces.len() as u32);
    for token in declared.named.into_iter().map(|(_, token)| token).chain(declared.extra) {
        if known.contains_key(&token.content) {
            continue;
        }
        let id = pieces.get(&token.content[..]).copied().filter(|id| !added.contains_key(id));
        let id = id.unwrap_or_else(|| {
            next += 1;
            next - 1
        });
        known.insert(token.content.clone(), id);
        added.insert(id, (token, true));
    }
    // What files name as special is, however it was added.
    for (token, _) in added.values_mut() {
        token.special |= names.contains(&token.content);
    }
    added
}

/// tokenizer.json. Fails, with the reason, for what the tokenizers library has no steps for.
fn build(model: &SentencePiece, settings: &Sources, added: &BTreeMap<u32, (Added, bool)>) -> Result<Value, String> {
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
    // An added token may take the place of a piece.
    let text = |id: usize| added.get(&(id as u32)).map_or(&model.pieces[id].text, |(token, _)| &token.content);
    for (id, (token, _)) in added {
        if ids.get(&token.content[..]).is_some_and(|other| *other != *id as usize && text(*other) == &token.content) {
            return Err(format!(
                "`{}` is piece {} and, by the files beside it, token {id}",
                token.content,
                ids[&token.content[..]]
            ));
        }
    }
    let llama = is_llama(settings);
    let bytes = model.byte_fallback;
    let tokens = match model.algorithm {
        algorithm if algorithm == Algorithm::Bpe || algorithm == Algorithm::Unigram && llama => {
            let beyond =
                added.range(model.pieces.len() as u32..).map(|(id, (token, _))| (token.content.clone(), *id as usize));
            let vocab = (0..model.pieces.len()).map(|id| (text(id).clone(), id)).chain(beyond);
            let vocab: Map<String, Value> = vocab.map(|(text, id)| (text, id.into())).collect();
            let merges = merges(&model.pieces, &ids, &|id| text(id) == &model.pieces[id].text);
            let unknown = (!llama).then(|| text(unknown));
            json!({
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": bytes, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            })
        }
        Algorithm::Unigram => {
            let mut vocab: Vec<Value> =
                model.pieces.iter().enumerate().map(|(id, piece)| json!([text(id), piece.score])).collect();
            for (id, (token, _)) in added.range(model.pieces.len() as u32..) {
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
        _ => {
            return Err("it splits texts at spaces or into characters; only BPE and Unigram models are read".to_owned());
        }
    };
    let (normalizer, pre_tokenizer) = spaces(model, settings);
    // A token that is looked for in a text with its space before it would be found at the beginning alone.
    let prepends = !normalizer.is_null() && pre_tokenizer.is_null() && prefix(model, settings);
    let token = |(id, (token, _)): (&u32, &(Added, bool))| {
        Added { normalized: token.normalized && !prepends, ..token.clone() }.to_json(*id)
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.iter().map(token).collect::<Vec<_>>(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(model, settings, added),
        "decoder": null,
        "model": tokens,
    }))
}

/// Rows without a token that are believed in.
const MOST_UNUSED: usize = 1 << 20;

/// What is done to a text before it is split: the normalizer and the pre-tokenizer.
fn spaces(model: &SentencePiece, settings: &Sources) -> (Value, Value) {
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let space = if model.escape_whitespaces { "▁" } else { " " };
    let prefix = prefix(model, settings);
    let before = |scheme: &str| {
        let scheme = if prefix { scheme } else { "never" };
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false})
    };
    if is_llama(settings) {
        return (Value::Null, before(if settings.flag("legacy") == Some(true) { "always" } else { "first" }));
    }
    let mut steps = Vec::new();
    if !model.rules.is_empty() {
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(&model.rules)}));
    }
    if model.remove_extra_whitespaces {
        // What is spelt like a space ends a text no less than one.
        let behind = if model.escape_whitespaces { "[ ▁]+$" } else { " +$" };
        steps.push(replace(json!({"Regex": format!("^ +|{behind}")}), ""));
        steps.push(replace(json!({"Regex": " {2,}"}), " "));
    }
    let mut pre_tokenizer = Value::Null;
    if settings.flag("legacy") == Some(false) && model.escape_whitespaces {
        pre_tokenizer = before("first");
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
fn post_processor<'a>(model: &SentencePiece, settings: &Sources, added: &'a BTreeMap<u32, (Added, bool)>) -> Value {
    let special = |name: &str, own: Option<u32>, default: bool| -> Option<(u32, &'a str)> {
        if !settings.flag(&format!("add_{name}_token")).unwrap_or(default) {
            return None;
        }
        let of = |(id, (token, _)): (&u32, &'a (Added, bool))| (*id, &token.content[..]);
        let own = added.get_key_value(&own?).map(of);
        let named =
            settings.named(name).and_then(|(_, text)| added.iter().find(|(_, (token, _))| token.content == text));
        named.map(of).or(own)
    };
    let bos = special("bos", model.bos.or(Some(u32::MAX)), true);
    let eos = special("eos", model.eos.or(Some(u32::MAX)), false);
    around(bos, eos)
}

/// The step that puts tokens before and after a text, each by id and spelling.
pub(crate) fn around(bos: Option<(u32, &str)>, eos: Option<(u32, &str)>) -> Value {
    let special = |token: &str, type_id: u8| json!({"SpecialToken": {"id": token, "type_id": type_id}});
    let text = |id: &str, type_id: u8| {
        let before = bos.map(|(_, token)| special(token, type_id));
        let after = eos.map(|(_, token)| special(token, type_id));
        [before, Some(json!({"Sequence": {"id": id, "type_id": type_id}})), after].into_iter().flatten()
    };
    let tokens = bos.into_iter().chain(eos);
    let tokens: Map<String, Value> =
        tokens.map(|(id, token)| (token.into(), json!({"id": token, "ids": [id], "tokens": [token]}))).collect();
    json!({
        "type": "TemplateProcessing",
        "single": text("A", 0).collect::<Vec<_>>(),
        "pair": text("A", 0).chain(text("B", 1)).collect::<Vec<_>>(),
        "special_tokens": tokens,
    })
}
