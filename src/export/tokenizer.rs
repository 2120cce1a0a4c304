//! `tokenizer.ggml.*`: a model's tokenizer as a GGUF file holds it.
//!
//! Two kinds exist. Byte-level BPE (`gpt2`) keeps its merges and names its way of splitting text; of SentencePiece
//! (`llama`) there are pieces, scores and kinds, from tokenizer.model or, where only tokenizer.json is left, from its
//! merges: the piece that is made first scores highest.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use calibration::samples::Tokenizer;
use formats::SentencePiece;
use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};
use formats::container::sentencepiece::Algorithm;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, read_json};
use crate::error::{Error, Result};
use crate::export::metadata::Written;
use crate::export::pretokenizer;
use crate::families;
use crate::import::gguf_tokenizer::kind;
use crate::import::sentencepiece;
use crate::json::integer;
use crate::text::TextError;

/// The space of SentencePiece.
const SPACE: char = '▁';

/// The score of tokens that no merge makes.
const ADDED_SCORE: f32 = -1000.0;

/// The score of rows without a token.
const UNUSED_SCORE: f32 = -10000.0;

/// Texts that end a turn; loaders take the one token under `eot_token_id` for it.
const TURN_ENDS: &[&str] =
    &["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"];

/// Other texts at which llama.cpp stops by itself.
const OTHER_ENDS: &[&str] = &[
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "</s>",
    "[EOS]",
    "<eos>",
    "<｜end▁of▁sentence｜>",
];

/// One row of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
struct Token {
    text: String,
    score: f32,
    kind: i64,
}

/// Everything that a model folder says of its tokenizer.
struct Files {
    /// tokenizer.json.
    json: Option<Value>,
    tokenizer: Option<Tokenizer>,
    /// tokenizer.model, where it is a SentencePiece model.
    model: Option<SentencePiece>,
    /// Why tokenizer.model could not be read.
    not_a_model: Option<String>,
    /// tokenizer_config.json.
    config: Value,
    /// special_tokens_map.json.
    map: Value,
    /// generation_config.json.
    generation: Value,
    /// config.json.
    model_config: Value,
    /// added_tokens.json.
    added: Value,
    /// chat_template.jinja.
    template: Option<String>,
}

/// Writes the tokenizer of a checkpoint whose embedding has `rows` rows; `pre` is what the user gave with `--pre`.
///
/// Of a GGUF file all `tokenizer.*` keys are kept as they are. Of a folder tokenizer.json or tokenizer.model is read, with
/// tokenizer_config.json, special_tokens_map.json, generation_config.json, added_tokens.json and chat_template.jinja
/// where they exist. Fails for a tokenizer of another kind, for one with more tokens than rows, for two tokens of one
/// spelling, and for byte-level BPE whose way of splitting text is not recognised.
pub fn tokenizer(source: &Checkpoint, rows: usize, pre: Option<&str>) -> Result<Written> {
    match source.gguf() {
        Some(file) => copied(file, rows, pre),
        None => of_folder(source.path(), &families::settings(source.config())?.values, rows, pre),
    }
}

/// The keys of another GGUF file.
fn copied(file: &formats::GgufFile, rows: usize, pre: Option<&str>) -> Result<Written> {
    let mut out = Written::default();
    let count = file.strings("tokenizer.ggml.tokens")?.map_or(0, |tokens| tokens.len());
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
    Ok(out)
}

fn of_folder(folder: &Path, model_config: &Value, rows: usize, pre: Option<&str>) -> Result<Written> {
    let files = Files::read(folder, model_config)?;
    let mut out = Written::default();
    write(&files, rows, pre, &mut out).map_err(|error| match error {
        Error::Usage(why) => Error::Usage(format!("{}/{why}", folder.display())),
        Error::Failed(why) => Error::Failed(format!("{}/{why}", folder.display())),
        other => other,
    })?;
    Ok(out)
}

impl Files {
    fn read(folder: &Path, model_config: &Value) -> Result<Files> {
        let json_of = |name: &str| Ok::<_, Error>(read_json(&folder.join(name))?.unwrap_or(Value::Null));
        let read = |name: &str| match std::fs::read(folder.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(folder.join(name), "read")(error)),
        };
        let bytes = read("tokenizer.json")?;
        // Megabytes, parsed twice: for what they say, and for what they do.
        let (json, tokenizer) = rayon::join(
            || read_json(&folder.join("tokenizer.json")),
            || bytes.as_deref().map(Tokenizer::from_json).transpose(),
        );
        let json = json?;
        let tokenizer = tokenizer.map_err(|error| TextError::Model { folder: folder.to_owned(), error })?;
        let (model, not_a_model) = match read(sentencepiece::FILE)?.map(|bytes| (SentencePiece::parse(&bytes), bytes)) {
            Some((Ok(model), _)) => (Some(model), None),
            Some((Err(error), bytes)) => (None, Some(sentencepiece::not_a_model(&bytes, &error))),
            None => (None, None),
        };
        Ok(Files {
            json,
            tokenizer,
            model,
            not_a_model,
            config: json_of("tokenizer_config.json")?,
            map: json_of("special_tokens_map.json")?,
            generation: json_of("generation_config.json")?,
            model_config: model_config.clone(),
            added: json_of("added_tokens.json")?,
            template: read("chat_template.jinja")?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        })
    }

    /// Id, content and whether it is special, of each added token; those of tokenizer.json go last.
    fn added_tokens(&self) -> Vec<Added> {
        let mut added = Vec::new();
        for (content, id) in self.added.as_object().into_iter().flatten() {
            added.extend(id.as_u64().map(|id| Added::new(id, content, false, true)));
        }
        let decoder = self.config["added_tokens_decoder"].as_object();
        let of_config = decoder.into_iter().flatten().filter_map(|(id, token)| Some((id.parse().ok()?, token)));
        added.extend(of_config.filter_map(|(id, token)| Added::read(id, token)));
        added.extend(self.json.iter().flat_map(added_of_json));
        added
    }
}

/// A token beside the vocabulary proper.
struct Added {
    id: u64,
    content: String,
    special: bool,
    normalized: bool,
}

impl Added {
    fn new(id: u64, content: &str, special: bool, normalized: bool) -> Added {
        // Some models have control tokens that are not marked as such.
        let looks_special = matches!(content, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
            || content.starts_with("<|") && content.ends_with("|>")
            || content.starts_with("<｜") && content.ends_with("｜>")
            || content.starts_with("<unused") && content.ends_with('>');
        Added { id, content: content.to_owned(), special: special || looks_special, normalized }
    }

    fn read(id: u64, token: &Value) -> Option<Added> {
        Some(Added::new(id, token["content"].as_str()?, token["special"] == true, token["normalized"] != false))
    }

    fn kind(&self) -> i64 {
        if self.special { kind::CONTROL } else { kind::USER_DEFINED }
    }
}

/// The added tokens of a tokenizer.json.
fn added_of_json(json: &Value) -> Vec<Added> {
    let list = json["added_tokens"].as_array();
    list.into_iter().flatten().filter_map(|token| Added::read(token["id"].as_u64()?, token)).collect()
}

fn write(files: &Files, rows: usize, pre: Option<&str>, out: &mut Written) -> Result<()> {
    let tokens = match &files.json {
        Some(json) if is_byte_level(json) => {
            let tokens = byte_level(json, rows)?;
            let ids = ids_of(&tokens)?;
            // What there is to say of it is said with the other special tokens.
            let bos = special_id(files, &ids, "bos", rows, &mut Written::default());
            let tokenizer = files.tokenizer.as_ref().expect("read with tokenizer.json");
            let found = pretokenizer::find(tokenizer, json, bos, pre)?;
            out.notices.extend(found.notice);
            out.string("tokenizer.ggml.model", "gpt2");
            out.string("tokenizer.ggml.pre", found.name);
            write_tokens(&tokens, out)?;
            strings("tokenizer.ggml.merges", merges(json)?, out)?;
            byte_level_notices(json, out);
            tokens
        }
        Some(_) | None => {
            if let Some(name) = pre {
                return Err(Error::usage(format!(
                    "--pre {name}: only byte-level BPE has a pre-tokenizer, and this model's tokenizer is another"
                )));
            }
            let (tokens, space) = sentence_piece(files, rows, out)?;
            ids_of(&tokens)?;
            out.string("tokenizer.ggml.model", "llama");
            out.string("tokenizer.ggml.pre", "default");
            write_tokens(&tokens, out)?;
            let scores = tokens.iter().map(|token| MetadataValue::F32(token.score)).collect();
            array("tokenizer.ggml.scores", scores, GGUFValueType::F32, out)?;
            out.flag("tokenizer.ggml.add_space_prefix", space);
            tokens
        }
    };
    let ids = ids_of(&tokens)?;
    special_tokens(files, &tokens, &ids, rows, out)?;
    chat_templates(files, out)
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

/// Sets a row; fails beyond the last.
fn set(tokens: &mut [Token], id: u64, token: Token) -> Result<()> {
    let rows = tokens.len();
    match usize::try_from(id).ok().and_then(|id| tokens.get_mut(id)) {
        Some(row) => {
            *row = token;
            Ok(())
        }
        None => Err(Error::failed(format!(
            "tokenizer.json: token {id} (`{}`) is beyond the embedding's {rows} rows; is it another model's?",
            token.text
        ))),
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

fn byte_level(json: &Value, rows: usize) -> Result<Vec<Token>> {
    let mut tokens = unused(rows);
    for (id, text) in vocabulary(json)? {
        set(&mut tokens, id, Token { text: text.to_owned(), score: 0.0, kind: kind::NORMAL })?;
    }
    for token in added_of_json(json) {
        // Loaders search for the text as it is read.
        let text = if token.normalized { token.content.clone() } else { decoded(&token.content) };
        let text = if token.special { text } else { text.replace(SPACE, " ") };
        set(&mut tokens, token.id, Token { text, score: 0.0, kind: token.kind() })?;
    }
    Ok(tokens)
}

/// What a token spelt in GPT-2's alphabet stands for, or the spelling itself where it is not in that alphabet.
fn decoded(content: &str) -> String {
    let bytes: Option<Vec<u8>> = content.chars().map(byte_of).collect();
    match bytes.map(String::from_utf8) {
        Some(Ok(text)) => text,
        _ => content.to_owned(),
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 is itself, the 68 others follow U+0100 in
/// order.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        code @ 0..0x100 => Some(code as u8).filter(printable),
        code => (0..=255u8).filter(|b| !printable(b)).nth((code - 0x100) as usize),
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
    let normalizer = json["normalizer"]["type"].as_str().unwrap_or("NFC");
    if normalizer != "NFC" {
        out.notice(format!("llama.cpp does not apply tokenizer.json's normalizer ({normalizer}) to texts"));
    }
    let steps = json["pre_tokenizer"]["pretokenizers"].as_array();
    let steps = steps.map_or_else(|| vec![&json["pre_tokenizer"]], |steps| steps.iter().collect());
    if steps.iter().any(|step| step["add_prefix_space"] == true) {
        out.notice("llama.cpp does not put a space before texts, as tokenizer.json does");
    }
}

/// Pieces with scores, and whether a space is put before texts.
fn sentence_piece(files: &Files, rows: usize, out: &mut Written) -> Result<(Vec<Token>, bool)> {
    let of_json = files.json.as_ref().map(|json| pieces_of_json(json, rows)).transpose()?;
    if let (Some(why), None) = (&files.not_a_model, &of_json) {
        return Err(Error::failed(format!("tokenizer.model: {why}")));
    }
    let (mut tokens, space) = match (&files.model, of_json) {
        (Some(model), of_json) => {
            let tokens = pieces_of_model(model, rows)?;
            let added: HashSet<u64> = files.added_tokens().iter().map(|token| token.id).collect();
            let differs = |json: &Pieces| {
                let pairs = tokens.iter().zip(&json.tokens).enumerate();
                pairs.filter(|(id, (a, b))| a.text != b.text && !added.contains(&(*id as u64))).count()
            };
            match of_json {
                Some(json) if differs(&json) > 0 => {
                    out.notice(format!(
                        "tokenizer.model differs from tokenizer.json in {} tokens; tokenizer.json is taken",
                        differs(&json)
                    ));
                    out.notices.extend(json.notices);
                    (json.tokens, json.space)
                }
                _ => {
                    if model.algorithm == Algorithm::Unigram {
                        out.notice(UNIGRAM);
                    }
                    if model.normalizes() {
                        out.notice("llama.cpp does not apply tokenizer.model's normalization to texts");
                    }
                    (tokens, model.add_dummy_prefix)
                }
            }
        }
        (None, Some(json)) => {
            out.notices.extend(json.notices);
            (json.tokens, json.space)
        }
        (None, None) => return Err(Error::failed("tokenizer.json: no such file, and there is no tokenizer.model")),
    };
    let own: Vec<i64> = tokens.iter().map(|token| token.kind).collect();
    for token in files.added_tokens() {
        let row = usize::try_from(token.id).ok().filter(|id| *id < own.len());
        // What is in the vocabulary as what it is stays so.
        let stays = |id: usize| own[id] != kind::NORMAL && own[id] != kind::UNUSED && tokens[id].text == token.content;
        if row.is_some_and(stays) {
            continue;
        }
        let text = if token.special { token.content.clone() } else { token.content.replace(SPACE, " ") };
        set(&mut tokens, token.id, Token { text, score: ADDED_SCORE, kind: token.kind() })?;
    }
    Ok((tokens, space))
}

const UNIGRAM: &str =
    "the tokenizer is a unigram model, and llama.cpp joins pieces by their scores: some texts may be split otherwise";

fn pieces_of_model(model: &SentencePiece, rows: usize) -> Result<Vec<Token>> {
    let mut tokens = unused(rows);
    for (id, piece) in model.pieces.iter().enumerate() {
        // As llama.cpp's converter writes pieces that a user defined.
        let kind = if i64::from(piece.kind) == kind::USER_DEFINED { kind::NORMAL } else { i64::from(piece.kind) };
        set(&mut tokens, id as u64, Token { text: piece.text.clone(), score: piece.score, kind })?;
    }
    Ok(tokens)
}

/// The vocabulary of a tokenizer.json that was made from SentencePiece.
struct Pieces {
    tokens: Vec<Token>,
    space: bool,
    notices: Vec<String>,
}

fn pieces_of_json(json: &Value, rows: usize) -> Result<Pieces> {
    let model = &json["model"];
    let mut tokens = unused(rows);
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
            let added = added_of_json(json).into_iter().map(|token| token.content).collect();
            let scores = scores(&pieces, &merge_pairs(json)?, &added, &mut notices);
            for (id, text) in list {
                let kind = piece_kind(text, Some(text) == unknown);
                let score = scores.get(text).copied().unwrap_or(0.0);
                set(&mut tokens, id, Token { text: text.to_owned(), score, kind })?;
            }
        }
        Some("Unigram") => {
            notices.push(UNIGRAM.to_owned());
            let list =
                model["vocab"].as_array().ok_or_else(|| Error::failed("tokenizer.json: it has no vocabulary"))?;
            let unknown = model["unk_id"].as_u64();
            for (id, piece) in list.iter().enumerate() {
                let (text, score) = piece[0].as_str().zip(piece[1].as_f64()).ok_or_else(|| {
                    Error::failed(format!("tokenizer.json: piece {id} is {piece}, expected a text and its score"))
                })?;
                let kind = piece_kind(text, unknown == Some(id as u64));
                set(&mut tokens, id as u64, Token { text: text.to_owned(), score: score as f32, kind })?;
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
    if let Some(step) = foreign {
        notices.push(format!("llama.cpp does not apply tokenizer.json's {step} to texts"));
    }
    Ok(Pieces { tokens, space, notices })
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

/// Texts to ids; fails for two of one text, since loaders look tokens up by it.
fn ids_of(tokens: &[Token]) -> Result<HashMap<&str, u32>> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(earlier) = ids.insert(token.text.as_str(), id as u32) {
            return Err(Error::failed(format!(
                "tokenizer.json: tokens {earlier} and {id} are both `{}`, and a GGUF file needs distinct ones",
                token.text
            )));
        }
    }
    Ok(ids)
}

fn write_tokens(tokens: &[Token], out: &mut Written) -> Result<()> {
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

/// The id of the `bos`, `eos`, `unk`, `pad`, `sep` or `mask` token: by spelling, else by number.
fn special_id(files: &Files, ids: &HashMap<&str, u32>, name: &str, rows: usize, out: &mut Written) -> Option<u32> {
    for (file, json) in [("tokenizer_config.json", &files.config), ("special_tokens_map.json", &files.map)] {
        let entry = &json[format!("{name}_token")];
        let text = entry.as_str().or(entry["content"].as_str());
        match text.map(|text| (text, ids.get(text))) {
            Some((_, Some(id))) => return Some(*id),
            Some((text, None)) => {
                out.notice(format!("{file}: {name}_token is `{text}`, which is no token"));
            }
            None => {}
        }
    }
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
    // The only tokenizer knows its own marks.
    if let Some(id) = own().filter(|_| files.json.is_none()) {
        return Some(id);
    }
    for (file, json) in [("config.json", &files.model_config), ("generation_config.json", &files.generation)] {
        let entry = &json[format!("{name}_token_id")];
        match integer(entry).or(integer(&entry[0])).filter(|id| *id >= 0) {
            Some(id) if id < rows as i64 => return Some(id as u32),
            Some(id) => out.notice(format!("{file}: {name}_token_id is {id}, beyond the embedding's {rows} rows")),
            None => {}
        }
    }
    own()
}

fn special_tokens(
    files: &Files,
    tokens: &[Token],
    ids: &HashMap<&str, u32>,
    rows: usize,
    out: &mut Written,
) -> Result<()> {
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
    let mut found = HashMap::new();
    for (name, key) in KEYS {
        if let Some(id) = special_id(files, ids, name, rows, &mut told) {
            out.count(format!("tokenizer.ggml.{key}_token_id"), id as usize)?;
            found.insert(*name, id);
        }
    }
    out.notices.extend(told.notices);
    out.notices.dedup();
    let (bos, eos) = (found.get("bos").copied(), found.get("eos").copied());

    // A chat model may stop at several tokens.
    let mut eot = None;
    for id in [&files.generation, &files.model_config].into_iter().flat_map(|json| ends(&json["eos_token_id"])) {
        let Some(token) = tokens.get(id as usize).filter(|_| Some(id) != eos) else { continue };
        if TURN_ENDS.contains(&token.text.as_str()) {
            eot = eot.or(Some(id));
        } else if !OTHER_ENDS.contains(&token.text.as_str()) {
            out.notice(format!("the model also stops at token {id} (`{}`), which a GGUF file cannot say", token.text));
        }
    }
    if let Some(id) = eot {
        out.count("tokenizer.ggml.eot_token_id", id as usize)?;
    }

    let flag = |name: &str| files.config[name].as_bool();
    let (add_bos, add_eos) = match &files.tokenizer {
        Some(tokenizer) => {
            let (before, after) = (tokenizer.prefix(), tokenizer.suffix());
            let silent = files.json.as_ref().is_some_and(|json| json["post_processor"].is_null());
            let add_bos = bos.is_some() && before == [bos.unwrap_or_default()];
            let add_eos = eos.is_some() && after == [eos.unwrap_or_default()];
            if !add_bos && !before.is_empty() || !add_eos && !after.is_empty() {
                out.notice(format!(
                    "tokenizer.json puts tokens {before:?} before and {after:?} after texts, and a GGUF file can only name BOS and EOS"
                ));
            }
            for (name, added) in [("add_bos_token", add_bos), ("add_eos_token", add_eos)] {
                if let Some(other) = flag(name).filter(|flag| *flag != added && !silent) {
                    out.notice(format!(
                        "tokenizer_config.json has {name} {other}, but tokenizer.json {} it: the file follows tokenizer.json",
                        if added { "adds" } else { "does not add" }
                    ));
                }
            }
            match silent {
                true => (flag("add_bos_token").unwrap_or(false), flag("add_eos_token").unwrap_or(false)),
                false => (add_bos, add_eos),
            }
        }
        // As SentencePiece tokenizers do in transformers.
        None => (flag("add_bos_token").unwrap_or(true), flag("add_eos_token").unwrap_or(false)),
    };
    out.flag("tokenizer.ggml.add_bos_token", add_bos && bos.is_some());
    out.flag("tokenizer.ggml.add_eos_token", add_eos && eos.is_some());
    Ok(())
}

/// One id or a list of them.
fn ends(value: &Value) -> Vec<u32> {
    let list = value.as_array().map_or_else(|| vec![value], |list| list.iter().collect());
    list.into_iter().filter_map(|id| u32::try_from(integer(id)?).ok()).collect()
}

/// `tokenizer.chat_template`, and the others under their names.
fn chat_templates(files: &Files, out: &mut Written) -> Result<()> {
    let key = "tokenizer.chat_template";
    let mut names = Vec::new();
    let mut first = files.template.clone();
    match &files.config["chat_template"] {
        Value::String(text) => first = first.or(Some(text.clone())),
        Value::Array(list) => {
            for item in list {
                let Some((name, text)) = item["name"].as_str().zip(item["template"].as_str()) else { continue };
                if name == "default" {
                    first = first.or(Some(text.to_owned()));
                    continue;
                }
                // Names become keys.
                let clean = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c.to_ascii_lowercase() } else { '_' };
                let name: String = name.chars().map(clean).collect();
                if !names.contains(&name) {
                    out.string(format!("{key}.{name}"), text);
                    names.push(name);
                }
            }
        }
        _ => {}
    }
    if !names.is_empty() {
        strings("tokenizer.chat_templates", names, out)?;
    }
    if let Some(text) = first {
        out.string(key, text);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
