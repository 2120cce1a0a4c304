//! `tokenizer.ggml.*`: a model's tokenizer as a GGUF file holds it.
//!
//! Three kinds are written. Byte-level BPE (`gpt2`) keeps its merges and names its way of splitting text; of SentencePiece's
//! BPE (`llama`) there are pieces, scores and kinds, from tokenizer.model or, where only tokenizer.json is left, from its
//! merges: the piece that is made first scores highest. Unigram models (`t5`) have scores of their own.

mod apart;
mod byte_level;
pub(crate) mod pretokenizer;
pub(crate) mod rebuilt;
mod special;
mod unigram;

pub(crate) use special::knows_as_end;

use std::collections::{HashMap, HashSet};
use std::path::Path;

use formats::SentencePiece;
use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};
use serde_json::Value;

use crate::dialect::called::{Rule, suitable, without_rule};
use crate::dialect::metadata::Written;
use crate::error::{Error, Result};
use crate::families;
use crate::json::read_json;
use crate::tokenizer::added::Added;
use crate::tokenizer::alphabet::byte_of;
use crate::tokenizer::sentencepiece::{self, kind};
use crate::tokenizer::{TokenizerFiles, without_one};
use crate::weights::Weights;

/// The space of SentencePiece.
const SPACE: char = '▁';

/// The score of tokens that no merge makes.
const ADDED_SCORE: f32 = -1000.0;

/// The score of rows without a token.
const UNUSED_SCORE: f32 = -10000.0;

/// One row of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
struct Token {
    text: String,
    score: f32,
    kind: i64,
}

/// Everything that a model folder says of its tokenizer.
struct Files {
    tokenizer: TokenizerFiles,
    /// tokenizer.model, where it is a SentencePiece model.
    model: Option<SentencePiece>,
    /// generation_config.json.
    generation: Value,
    /// config.json.
    model_config: Value,
}

/// Rows of the vocabulary, and the added tokens that the embedding has no row for.
struct Rows {
    tokens: Vec<Token>,
    left_out: Vec<(u64, String)>,
}

/// Writes the tokenizer of a checkpoint whose embedding has `rows` rows; `pre` is what the user gave with `--pre`.
///
/// Of a GGUF file all `tokenizer.*` keys are kept as they are. Of a folder everything is read that tells of the tokenizer
/// ([`TokenizerFiles`]), and generation_config.json. Added tokens beyond the last row are left out with a notice. Fails for
/// a tokenizer of another kind, for a vocabulary with more tokens than rows, for two tokens of one spelling, and for
/// byte-level BPE whose way of splitting text is not recognised.
pub fn tokenizer(source: &dyn Weights, rows: usize, pre: Option<&str>) -> Result<Written> {
    match source.gguf() {
        Some(file) => copied(file, rows, pre),
        None => of_folder(source.path(), &families::settings(source.config())?.values, rows, pre, &source.name()),
    }
}

/// The keys of another GGUF file.
fn copied(file: &formats::GgufFile, rows: usize, pre: Option<&str>) -> Result<Written> {
    let mut out = Written::default();
    let count = file.strings("tokenizer.ggml.tokens")?.map_or(0, |tokens| tokens.len());
    if count == 0 {
        return Err(Error::failed(format!(
            "{}: the file holds no tokenizer (`tokenizer.ggml.tokens`), without which llama.cpp loads no model: take a file that has one",
            file.path().display()
        )));
    }
    if count != rows {
        let error =
            formats::Error::mismatch("the number of tokens", format!("{rows}, as the embedding has rows"), count);
        return Err(error.in_file(file.path()).into());
    }
    for key in file.keys().into_iter().filter(|key| key.starts_with("tokenizer.")) {
        let value = file.metadata(key).expect("listed").clone();
        let value = match pre.filter(|_| key == "tokenizer.ggml.pre") {
            Some(name) => MetadataValue::String(name.to_owned()),
            None => value,
        };
        out.metadata.push((key.to_owned(), value));
    }
    if let Some(name) = pre.filter(|_| file.metadata("tokenizer.ggml.pre").is_none()) {
        out.string("tokenizer.ggml.pre", name);
    }
    let texts: HashSet<&str> = file.strings("tokenizer.ggml.tokens")?.into_iter().flatten().collect();
    if file.string("tokenizer.ggml.model")? == Some("llama") {
        check_bytes(&texts).map_err(|why| Error::usage(format!("{}: {why}", file.path().display())))?;
    }
    rule_of(file.string("general.name")?.unwrap_or_default(), &texts, &[], &mut out);
    Ok(out)
}

/// The rule that llama.cpp goes by for a model of this name. Where that does not suit its tokens it gets another name.
fn rule_of(name: &str, texts: &HashSet<&str>, added: &[(u32, Added)], out: &mut Written) -> Option<Rule> {
    let wrong = Rule::of(name)?;
    let rule = suitable(name, texts, added.iter().map(|(_, token)| token));
    if rule.is_none() {
        let other = without_rule(name);
        let missing = wrong.needs().iter().find(|token| !texts.contains(*token));
        let why = match missing {
            Some(token) => format!("asks for a token `{token}`, which this model does not have"),
            None => "takes spaces beside special tokens along, which this model's tokenizer does not do".to_owned(),
        };
        out.notice(format!("the file calls the model `{other}`: of one called `{name}` llama.cpp {why}"));
        out.name = Some(other);
    }
    rule
}

fn of_folder(folder: &Path, model_config: &Value, rows: usize, pre: Option<&str>, model: &str) -> Result<Written> {
    let read = |name: &str| Ok::<_, Error>(read_json(&folder.join(name))?.unwrap_or(Value::Null));
    let Some(tokenizer) = TokenizerFiles::of_folder(folder, families::type_of(model_config))? else {
        return Err(Error::failed(format!(
            "{}/tokenizer.json: no such file, and there is no tokenizer.model, and a GGUF file holds its tokenizer{}",
            folder.display(),
            without_one(folder, families::type_of(model_config))
        )));
    };
    let files = Files {
        tokenizer,
        model: sentencepiece::read(folder)?.and_then(Result::ok),
        generation: read("generation_config.json")?,
        model_config: model_config.clone(),
    };
    let mut out = Written::default();
    // What is said of tokenizer.json is said of the file that takes its place.
    let told = |why: String| match why.strip_prefix("tokenizer.json") {
        Some(rest) => format!("{}/{}{rest}", folder.display(), files.tokenizer.file()),
        None => format!("{}/{why}", folder.display()),
    };
    write(&files, rows, pre, model, &mut out).map_err(|error| match error {
        Error::Usage(why) => Error::Usage(told(why)),
        Error::Failed(why) => Error::Failed(told(why)),
        other => other,
    })?;
    Ok(out)
}

/// The type of an added token.
fn kind_of(token: &Added) -> i64 {
    // Some models have control tokens that are not marked as such.
    let text = &token.content[..];
    let looks_special = matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || text.starts_with("<|") && text.ends_with("|>")
        || text.starts_with("<｜") && text.ends_with("｜>")
        || text.starts_with("<unused") && text.ends_with('>');
    if token.special || looks_special { kind::CONTROL } else { kind::USER_DEFINED }
}

fn write(files: &Files, rows: usize, pre: Option<&str>, model: &str, out: &mut Written) -> Result<()> {
    let (json, added) = (&files.tokenizer.json, &files.tokenizer.added);
    out.notices.extend(files.tokenizer.notices.iter().cloned());
    let Rows { tokens, left_out } = if is_byte_level(json) {
        let rows = byte_level(json, added, rows)?;
        // What there is to say of it is said with the other special tokens.
        let bos = special::id(files, "bos", rows.tokens.len(), &mut Written::default());
        let found = pretokenizer::find(&files.tokenizer.tokenizer, json, bos, pre)?;
        out.notices.extend(found.notice);
        out.string("tokenizer.ggml.model", "gpt2");
        out.string("tokenizer.ggml.pre", found.name);
        write_tokens(&rows.tokens, out)?;
        strings("tokenizer.ggml.merges", merges(json)?, out)?;
        byte_level_notices(json, out);
        out.notices.extend(apart::gaps(rows.tokens.iter().map(|token| &*token.text)));
        rows
    } else {
        if let Some(name) = pre {
            return Err(Error::usage(format!(
                "--pre {name}: only byte-level BPE has a pre-tokenizer, and this model's tokenizer is another"
            )));
        }
        let (rows, space) = sentence_piece(files, rows, out)?;
        let is_unigram = unigram::is_unigram(json);
        if !is_unigram {
            check_bytes(&rows.tokens.iter().map(|token| &*token.text).collect())
                .map_err(|why| Error::usage(format!("{}: {why}", files.tokenizer.name)))?;
        }
        out.string("tokenizer.ggml.model", if is_unigram { unigram::MODEL } else { "llama" });
        out.string("tokenizer.ggml.pre", "default");
        write_tokens(&rows.tokens, out)?;
        let scores = rows.tokens.iter().map(|token| MetadataValue::F32(token.score)).collect();
        array("tokenizer.ggml.scores", scores, GGUFValueType::F32, out)?;
        out.flag("tokenizer.ggml.add_space_prefix", space);
        if is_unigram {
            unigram::write(files, &rows.tokens, out)?;
        }
        rows
    };
    let found: Vec<&str> = added.iter().map(|(_, token)| &token.content[..]).filter(|text| !text.is_empty()).collect();
    out.notices.extend(apart::overlaps(&found));
    let rule = rule_of(model, &tokens.iter().map(|token| &*token.text).collect(), added, out);
    let greedy = |(_, token): &&(u32, Added)| {
        let theirs = rule.map_or([false; 2], |rule| rule.strips(&token.content));
        (token.lstrip, token.rstrip) != theirs.into() || token.single_word
    };
    if let Some((_, first)) = added.iter().find(greedy) {
        let text = &first.content;
        out.notice(match first.lstrip || first.rstrip || first.single_word {
            true => format!(
                "this tokenizer takes the spaces beside `{text}` along, or finds it between words only; llama.cpp does not"
            ),
            false => format!("llama.cpp takes the spaces beside `{text}` along, and this tokenizer does not"),
        });
    }
    if let Some((id, text)) = left_out.first() {
        let others = if left_out.len() > 1 { format!(" and {} more", left_out.len() - 1) } else { String::new() };
        out.notice(format!(
            "added tokens beyond the embedding's {rows} rows are left out of the file: `{text}` ({id}){others}"
        ));
    }
    special::write(files, &tokens, out)?;
    let key = "tokenizer.ggml.unknown_token_id";
    if let Some(id) = unigram::unknown(json).filter(|_| out.metadata.iter().all(|(other, _)| other != key)) {
        out.count(key, id)?;
    }
    special::chat_templates(&files.tokenizer.templates, out)
}

/// Whether a text gets a space before it, and the text after a special token gets none.
pub(crate) fn spaces_first_alone(json: &Value) -> bool {
    let first_only = |step: &Value| step["prepend_scheme"] == "first";
    let steps = json["pre_tokenizer"]["pretokenizers"].as_array();
    first_only(&json["pre_tokenizer"]) || steps.is_some_and(|steps| steps.iter().any(first_only))
}

/// Whether every byte has a token, spelt in GPT-2's alphabet.
fn is_byte_level(json: &Value) -> bool {
    let has = |part: &Value, list: &str| {
        let is = |step: &Value| step["type"] == "ByteLevel";
        is(part) || part[list].as_array().is_some_and(|steps| steps.iter().any(is))
    };
    json["model"]["type"] == "BPE"
        && json["model"]["byte_fallback"] != true
        && (has(&json["pre_tokenizer"], "pretokenizers") || has(&json["decoder"], "decoders"))
}

/// Rows with nothing in them but a name of their own.
fn unused(rows: usize) -> Vec<Token> {
    let token = |id| Token { text: format!("[PAD{id}]"), score: UNUSED_SCORE, kind: kind::UNUSED };
    (0..rows).map(token).collect()
}

impl Rows {
    fn new(rows: usize) -> Rows {
        Rows { tokens: unused(rows), left_out: Vec::new() }
    }

    /// Sets the row of a token of the vocabulary. Fails beyond the last, but for what is also among the added tokens.
    fn set(&mut self, id: u64, token: Token, added: &[(u32, Added)]) -> Result<()> {
        let rows = self.tokens.len();
        match usize::try_from(id).ok().and_then(|id| self.tokens.get_mut(id)) {
            Some(row) => *row = token,
            None if added.iter().any(|(_, added)| added.content == token.text) => {}
            None => {
                return Err(Error::failed(format!(
                    "tokenizer.json: token {id} (`{}`) is beyond the embedding's {rows} rows; is it another model's?",
                    token.text
                )));
            }
        }
        Ok(())
    }

    /// Sets the row of an added token, if it has one.
    fn add(&mut self, id: u32, token: Token) {
        match self.tokens.get_mut(id as usize) {
            Some(row) => *row = token,
            None => self.left_out.push((id.into(), token.text)),
        }
    }
}

/// The vocabulary of tokenizer.json, by id.
fn vocabulary(json: &Value) -> Result<Vec<(u64, &str)>> {
    let vocab =
        json["model"]["vocab"].as_object().ok_or_else(|| Error::failed("tokenizer.json: it has no vocabulary"))?;
    let mut list: Vec<(u64, &str)> = Vec::with_capacity(vocab.len());
    for (text, id) in vocab {
        let id = id.as_u64().ok_or_else(|| Error::failed(format!("tokenizer.json: token `{text}` has no id")))?;
        list.push((id, text));
    }
    list.sort_unstable();
    match list.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        None => Ok(list),
        Some(pair) => {
            let (id, a, b) = (pair[0].0, pair[0].1, pair[1].1);
            Err(Error::failed(format!("tokenizer.json: tokens `{a}` and `{b}` both have id {id}")))
        }
    }
}

fn byte_level(json: &Value, added: &[(u32, Added)], rows: usize) -> Result<Rows> {
    let mut rows = Rows::new(rows);
    for (id, text) in vocabulary(json)? {
        rows.set(id, Token { text: text.to_owned(), score: 0.0, kind: kind::NORMAL }, added)?;
    }
    for (id, token) in added {
        // Loaders search for the text as it is read; but merges make what stands in the vocabulary by its spelling there.
        let is_piece = rows.tokens.get(*id as usize).is_some_and(|row| row.text == token.content);
        let text = if token.normalized || is_piece { token.content.clone() } else { decoded(&token.content) };
        let kind = kind_of(token);
        let text = if kind == kind::CONTROL { text } else { text.replace(SPACE, " ") };
        rows.add(*id, Token { text, score: 0.0, kind });
    }
    Ok(rows)
}

/// What a token spelt in GPT-2's alphabet stands for, or the spelling itself where it is not in that alphabet.
fn decoded(content: &str) -> String {
    let bytes: Option<Vec<u8>> = content.chars().map(byte_of).collect();
    match bytes.map(String::from_utf8) {
        Some(Ok(text)) => text,
        _ => content.to_owned(),
    }
}

/// Merges as pairs, of either form.
fn merge_pairs(json: &Value) -> Result<Vec<(&str, &str)>> {
    let merges = json["model"]["merges"].as_array().ok_or_else(|| Error::failed("tokenizer.json: it has no merges"))?;
    let wrong = |merge: &Value| Error::failed(format!("tokenizer.json: {merge} is no merge of two tokens"));
    let mut found = Vec::with_capacity(merges.len());
    for merge in merges {
        let parts = match merge {
            Value::String(text) => text.split_once(' '),
            other => other.get(0).and_then(Value::as_str).zip(other.get(1).and_then(Value::as_str)),
        };
        found.push(parts.ok_or_else(|| wrong(merge))?);
    }
    Ok(found)
}

fn merges(json: &Value) -> Result<Vec<String>> {
    // The space between the parts must be the only one.
    let part = |text: &str| text.replace(' ', "Ġ");
    Ok(merge_pairs(json)?.into_iter().map(|(left, right)| format!("{} {}", part(left), part(right))).collect())
}

/// What llama.cpp does not do before it splits text.
fn byte_level_notices(json: &Value, out: &mut Written) {
    if let Some(normalizer) = normalizer(json) {
        out.notice(format!("llama.cpp does not apply tokenizer.json's normalizer ({normalizer}) to texts"));
    }
    if puts_space(json) {
        out.notice("llama.cpp does not put a space before texts, as tokenizer.json does");
    }
}

/// What a byte-level tokenizer does to texts first, beside NFC.
fn normalizer(json: &Value) -> Option<&str> {
    json["normalizer"]["type"].as_str().filter(|kind| *kind != "NFC")
}

/// Whether a byte-level tokenizer puts a space before texts.
fn puts_space(json: &Value) -> bool {
    let steps = json["pre_tokenizer"]["pretokenizers"].as_array();
    let steps = steps.map_or_else(|| vec![&json["pre_tokenizer"]], |steps| steps.iter().collect());
    steps.iter().any(|step| step["add_prefix_space"] == true)
}

/// Whether a byte-level tokenizer changes texts before it splits them, which llama.cpp does not do whatever `--pre` says.
pub(crate) fn changes_texts(json: &Value) -> bool {
    normalizer(json).is_some() || puts_space(json)
}

/// Pieces with scores, and whether a space is put before texts.
fn sentence_piece(files: &Files, rows: usize, out: &mut Written) -> Result<(Rows, bool)> {
    let TokenizerFiles { json, added, name, .. } = &files.tokenizer;
    let of_json = (*name != sentencepiece::FILE).then(|| pieces_of_json(json, added, rows)).transpose()?;
    let (mut rows, space) = match (&files.model, of_json) {
        (Some(model), of_json) => {
            let rows = pieces_of_model(model, added, rows, unigram::is_unigram(json))?;
            let ids: HashSet<usize> = added.iter().map(|(id, _)| *id as usize).collect();
            let differs = |json: &Pieces| {
                let pairs = rows.tokens.iter().zip(&json.rows.tokens).enumerate();
                pairs.filter(|(id, (a, b))| a.text != b.text && !ids.contains(id)).count()
            };
            match of_json {
                Some(json) if differs(&json) > 0 => {
                    out.notice(format!(
                        "tokenizer.model differs from tokenizer.json in {} tokens; tokenizer.json is taken",
                        differs(&json)
                    ));
                    out.notices.extend(json.notices);
                    (json.rows, json.space)
                }
                _ => {
                    if model.normalizes() && !unigram::is_unigram(json) {
                        out.notice("llama.cpp does not apply tokenizer.model's normalization to texts");
                    }
                    (rows, if *name == sentencepiece::FILE { spaces(json).0 } else { model.add_dummy_prefix })
                }
            }
        }
        (None, Some(json)) => {
            out.notices.extend(json.notices);
            (json.rows, json.space)
        }
        (None, None) => return Err(Error::failed("tokenizer.model: it cannot be read a second time")),
    };
    let space = files.tokenizer.flag("add_prefix_space").unwrap_or(space);
    // The marks of a tokenizer.model are special, too.
    if space && json["added_tokens"].as_array().is_some_and(|all| !all.is_empty()) && spaces_first_alone(json) {
        out.notice(
            "llama.cpp puts a space before the text after each special token, and this tokenizer only before the first: chats are split \
             a little otherwise",
        );
    }
    for (id, token) in added {
        // What is in the vocabulary as what it is stays so.
        let stays = |row: &Token| row.kind != kind::NORMAL && row.kind != kind::UNUSED && row.text == token.content;
        if rows.tokens.get(*id as usize).is_some_and(stays) {
            continue;
        }
        let kind = kind_of(token);
        let text = if kind == kind::CONTROL { token.content.clone() } else { token.content.replace(SPACE, " ") };
        rows.add(*id, Token { text, score: ADDED_SCORE, kind });
    }
    Ok((rows, space))
}

/// `unigram` says that pieces which a user defined are found before others.
fn pieces_of_model(model: &SentencePiece, added: &[(u32, Added)], rows: usize, unigram: bool) -> Result<Rows> {
    let mut rows = Rows::new(rows);
    for (id, piece) in model.pieces.iter().enumerate() {
        // As llama.cpp's converter writes pieces that a user defined.
        let is_normal = !unigram && i64::from(piece.kind) == kind::USER_DEFINED;
        let kind = if is_normal { kind::NORMAL } else { i64::from(piece.kind) };
        rows.set(id as u64, Token { text: piece.text.clone(), score: piece.score, kind }, added)?;
    }
    Ok(rows)
}

/// The vocabulary of a tokenizer.json that was made from SentencePiece.
struct Pieces {
    rows: Rows,
    space: bool,
    notices: Vec<String>,
}

fn pieces_of_json(json: &Value, added: &[(u32, Added)], rows: usize) -> Result<Pieces> {
    let model = &json["model"];
    let mut rows = Rows::new(rows);
    let mut notices = Vec::new();
    let byte_fallback = model["byte_fallback"] == true;
    let piece_kind = |text: &str, unknown: bool| match () {
        () if unknown => kind::UNKNOWN,
        () if byte_fallback && is_byte(text) => kind::BYTE,
        () => kind::NORMAL,
    };
    match model["type"].as_str() {
        Some("BPE") if byte_fallback => {
            let unknown = model["unk_token"].as_str();
            let list = vocabulary(json)?;
            let pieces: Vec<(u64, &str)> = list
                .iter()
                .copied()
                .filter(|(_, text)| piece_kind(text, Some(*text) == unknown) == kind::NORMAL)
                .collect();
            let texts = added.iter().map(|(_, token)| token.content.clone()).collect();
            let scores = scores(&pieces, &merge_pairs(json)?, &texts, &mut notices);
            for (id, text) in list {
                let kind = piece_kind(text, Some(text) == unknown);
                let score = scores.get(text).copied().unwrap_or(0.0);
                rows.set(id, Token { text: text.to_owned(), score, kind }, added)?;
            }
        }
        Some("Unigram") => {
            let list =
                model["vocab"].as_array().ok_or_else(|| Error::failed("tokenizer.json: it has no vocabulary"))?;
            let unknown = model["unk_id"].as_u64();
            for (id, piece) in list.iter().enumerate() {
                let (text, score) = piece[0].as_str().zip(piece[1].as_f64()).ok_or_else(|| {
                    Error::failed(format!("tokenizer.json: piece {id} is {piece}, expected a text and its score"))
                })?;
                let kind = piece_kind(text, unknown == Some(id as u64));
                rows.set(id as u64, Token { text: text.to_owned(), score: score as f32, kind }, added)?;
            }
        }
        other => {
            return Err(Error::usage(format!(
                "tokenizer.json: a tokenizer of type {} {}cannot be written as GGUF, only byte-level BPE and SentencePiece",
                other.unwrap_or("unknown"),
                if other == Some("BPE") { "without bytes " } else { "" }
            )));
        }
    }
    let (space, foreign) = spaces(json);
    if let Some(step) = foreign.filter(|_| !unigram::is_unigram(json)) {
        notices.push(format!("llama.cpp does not apply tokenizer.json's {step} to texts"));
    }
    Ok(Pieces { rows, space, notices })
}

/// `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The score of each piece: minus its place in the order in which merges make them, single characters last.
///
/// That is what SentencePiece writes for the same vocabulary. llama.cpp joins any two neighbours that form a piece, the
/// best first; where `merges` differs from that, a notice says so.
fn scores<'t>(
    pieces: &[(u64, &'t str)],
    merges: &[(&str, &str)],
    added: &HashSet<String>,
    notices: &mut Vec<String>,
) -> HashMap<&'t str, f32> {
    let mut first: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    let mut scattered = 0usize;
    let mut previous = String::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        let made = format!("{left}{right}");
        if made != previous {
            scattered += usize::from(first.contains_key(&made));
            first.entry(made.clone()).or_insert(rank);
            previous = made;
        }
    }
    let mut order: Vec<(usize, u64, &'t str)> = pieces
        .iter()
        .filter(|(_, text)| !added.contains(*text))
        .map(|(id, text)| (first.get(*text).copied().unwrap_or(usize::MAX), *id, *text))
        .collect();
    order.sort_unstable();

    let known: HashSet<&str> = order.iter().map(|(_, _, text)| *text).collect();
    let listed: HashSet<(&str, &str)> = merges.iter().copied().collect();
    let missing: usize = order
        .iter()
        .map(|(_, _, text)| {
            let splits = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
            splits.filter(|(l, r)| known.contains(l) && known.contains(r) && !listed.contains(&(*l, *r))).count()
        })
        .sum();
    if missing + scattered > 0 {
        notices.push(format!(
            "tokenizer.json joins pieces in its own order ({missing} pairs that form a piece are never joined, {scattered} \
             are joined late), and llama.cpp by the pieces' scores: some texts may be split otherwise"
        ));
    }
    order.iter().enumerate().map(|(place, (_, _, text))| (*text, -(place as f32))).collect()
}

/// Whether texts get a space before them, and a step that llama.cpp does not take.
fn spaces(json: &Value) -> (bool, Option<String>) {
    let (mut space, mut foreign) = (false, None);
    let list = |part: &'_ Value, name: &str| match part {
        Value::Null => Vec::new(),
        part => part[name].as_array().map_or_else(|| vec![part.clone()], Clone::clone),
    };
    let steps =
        list(&json["normalizer"], "normalizers").into_iter().chain(list(&json["pre_tokenizer"], "pretokenizers"));
    for step in steps {
        match step["type"].as_str().unwrap_or_default() {
            "Prepend" if step["prepend"] == "▁" => space = true,
            "Replace" if step["pattern"]["String"] == " " && step["content"] == "▁" => {}
            // The scheme is `always` where the older flag stands instead.
            "Metaspace" => {
                space = match step["prepend_scheme"].as_str() {
                    Some(scheme) => scheme != "never",
                    None => step["add_prefix_space"] != false,
                }
            }
            other => foreign = Some(format!("step {other}")),
        }
    }
    (space, foreign)
}

/// Fails, with the reason, for SentencePiece without a token for each byte, from which llama.cpp puts together every character that
/// is no piece. It aborts where one is missing, be it in a prompt or only a line break.
fn check_bytes(texts: &HashSet<&str>) -> Result<(), String> {
    let is_missing = |byte: &u8| {
        let itself = byte.is_ascii().then(|| char::from(*byte).to_string());
        let spelt = [Some(format!("<0x{byte:02X}>")), itself];
        !spelt.iter().flatten().any(|text| texts.contains(&**text))
    };
    let missing: Vec<u8> = (0..=255).filter(is_missing).collect();
    // A line break is in every chat.
    let Some(first) = missing.iter().find(|byte| **byte == b'\n').or(missing.first()) else { return Ok(()) };
    Err(format!(
        "the vocabulary has no token for {} of the 256 bytes (such as `<0x{first:02X}>`), of which llama.cpp makes what is no piece, and \
         llama.cpp aborts at the first text that needs one; choose another --format",
        missing.len()
    ))
}

/// Fails for two tokens of one text, since loaders look tokens up by it.
fn check_distinct(tokens: &[Token]) -> Result<()> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(earlier) = ids.insert(token.text.as_str(), id) {
            return Err(Error::failed(format!(
                "tokenizer.json: tokens {earlier} and {id} are both `{}`, and a GGUF file needs distinct ones",
                token.text
            )));
        }
    }
    Ok(())
}

fn write_tokens(tokens: &[Token], out: &mut Written) -> Result<()> {
    check_distinct(tokens)?;
    strings("tokenizer.ggml.tokens", tokens.iter().map(|token| token.text.clone()).collect(), out)?;
    let kinds = tokens.iter().map(|token| MetadataValue::I32(token.kind as i32)).collect();
    array("tokenizer.ggml.token_type", kinds, GGUFValueType::I32, out)
}

fn strings(key: &str, values: Vec<String>, out: &mut Written) -> Result<()> {
    array(key, values.into_iter().map(MetadataValue::String).collect(), GGUFValueType::String, out)
}

fn array(key: &str, values: Vec<MetadataValue>, ty: GGUFValueType, out: &mut Written) -> Result<()> {
    out.metadata.push((key.to_owned(), metadata_array(values, ty)?));
    Ok(())
}

#[cfg(test)]
mod tests;
