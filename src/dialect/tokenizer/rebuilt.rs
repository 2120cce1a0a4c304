//! tokenizer.json and tokenizer_config.json rebuilt from a GGUF's metadata.
//!
//! Byte-level BPE (`gpt2`) keeps its merges and names its pre-tokenizer; of SentencePiece (`llama`) only pieces and scores
//! remain, from which the merges follow: the pair whose piece scores highest is joined first. Unigram models (`t5`) are
//! what they were (`unigram`). What llama.cpp does not do to texts is not done either: it applies no NFC, which the original
//! tokenizers of `qwen2` and `qwen35` do.

use std::collections::{HashMap, HashSet};

use formats::GgufFile;
use serde_json::{Map, Value, json};

use super::byte_level::{Steps, WAYS, Way};
use super::special::ends_by_text;
use super::unigram;
use crate::dialect::called::Rule;
use crate::dialect::tokenizer::knows_as_end;
use crate::error::{Error, Result};
use crate::tokenizer::added::{self, Sources, Stated};
use crate::tokenizer::sentencepiece::{around, kind};
use crate::tokenizer::{FILE, Own, Templates, TokenizerFiles};
use crate::words::nearest;

/// The EOS of a SentencePiece file that does not give it.
const SENTENCE_PIECE_EOS: usize = 2;

/// And of a Unigram model's.
const UNIGRAM_EOS: usize = 1;

/// The vocabulary and what is special in it.
pub(super) struct Vocabulary<'f> {
    pub tokens: Vec<&'f str>,
    pub kinds: Vec<i64>,
    ids: HashMap<&'f str, usize>,
    /// What the model's name says of its special tokens.
    rule: Option<Rule>,
}

impl<'f> Vocabulary<'f> {
    fn read(file: &'f GgufFile) -> Result<Vocabulary<'f>> {
        let key = "tokenizer.ggml.tokens";
        let tokens = file.require(key, file.strings(key)?)?;
        let kinds = file.integers("tokenizer.ggml.token_type")?;
        let mut kinds = kinds.unwrap_or_else(|| vec![kind::NORMAL; tokens.len()]);
        if kinds.len() < tokens.len() {
            let what = "the length of metadata key `tokenizer.ggml.token_type`";
            return Err(formats::Error::mismatch(what, tokens.len(), kinds.len()).in_file(file.path()).into());
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(earlier) = ids.insert(*token, id) {
                let why = format!("tokens {earlier} and {id} are both `{token}`");
                return Err(formats::Error::malformed(why).in_file(file.path()).into());
            }
        }
        for (token, kind) in tokens.iter().zip(&mut kinds) {
            if ![kind::CONTROL, kind::USER_DEFINED].contains(kind) && is_special(token, file, &ids) {
                *kind = kind::CONTROL;
            }
        }
        let rule = Rule::of(file.string("general.name")?.unwrap_or_default());
        let rule = rule.filter(|rule| rule.needs().iter().all(|token| ids.contains_key(token)));
        Ok(Vocabulary { tokens, kinds, ids, rule })
    }

    /// The token under `tokenizer.ggml.{name}_token_id`.
    pub fn special(&self, file: &GgufFile, name: &str) -> Result<Option<(usize, &'f str)>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = match (file.count(&key)?, file.string("tokenizer.ggml.model")?) {
            (Some(id), _) => id,
            // SentencePiece files may rely on its own numbering, and those of Unigram models on T5's.
            (None, Some("llama")) => match name {
                "unknown" => 0,
                "bos" => 1,
                "eos" => SENTENCE_PIECE_EOS,
                _ => return Ok(None),
            },
            (None, Some(unigram::MODEL)) => match name {
                "padding" => 0,
                "eos" => UNIGRAM_EOS,
                "unknown" => 2,
                _ => return Ok(None),
            },
            _ => return Ok(None),
        };
        match self.tokens.get(id) {
            Some(token) => Ok(Some((id, token))),
            None => {
                let expected = format!("below {}", self.tokens.len());
                Err(formats::Error::mismatch(format!("metadata key `{key}`"), expected, id).in_file(file.path()).into())
            }
        }
    }

    /// The score of every token.
    pub fn scores(&self, file: &GgufFile) -> Result<Vec<f32>> {
        let key = "tokenizer.ggml.scores";
        let scores = file.floats(key)?.unwrap_or_else(|| vec![0.0; self.tokens.len()]);
        if scores.len() < self.tokens.len() {
            let what = format!("the length of metadata key `{key}`");
            return Err(formats::Error::mismatch(what, self.tokens.len(), scores.len()).in_file(file.path()).into());
        }
        Ok(scores)
    }

    /// The vocabulary object: all but unused entries that no text comes to, which only fill the embedding's rows.
    fn to_json(&self, merges: &[[&str; 2]]) -> Value {
        let made: HashSet<String> = merges.iter().map(|pair| pair.concat()).collect();
        let used = self.tokens.iter().enumerate().filter(|(id, token)| {
            self.kinds[*id] != kind::UNUSED || token.chars().count() == 1 || made.contains(**token)
        });
        Value::Object(used.map(|(id, token)| (token.to_string(), Value::from(id))).collect::<Map<_, _>>())
    }

    pub fn added_tokens(&self) -> Value {
        let added = self.tokens.iter().enumerate().filter_map(|(id, token)| {
            let special = match self.kinds[id] {
                kind::CONTROL | kind::UNKNOWN => true,
                kind::USER_DEFINED => false,
                _ => return None,
            };
            let [before, behind] = self.rule.map_or([false; 2], |rule| rule.strips(token));
            Some(json!({
                "id": id, "content": token, "single_word": false, "lstrip": before, "rstrip": behind,
                "normalized": false, "special": special,
            }))
        });
        added.collect()
    }
}

/// Texts that llama.cpp looks for in a text whatever the type of their token, beside those at which it stops, unless the file
/// gives one of the keys.
const MIDDLES: &[(&[&str], &[&str])] = &[
    (
        &["fim_pre_token_id", "prefix_token_id"],
        &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
    ),
    (
        &["fim_suf_token_id", "suffix_token_id"],
        &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
    ),
    (
        &["fim_mid_token_id", "middle_token_id"],
        &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
    ),
    (&["fim_pad_token_id"], &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    (&["fim_rep_token_id"], &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    (&["fim_sep_token_id"], &["<|file_sep|>"]),
    // Those of gpt-oss.
    (&[], &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"]),
];

/// Whether llama.cpp takes a token for a special one by its text.
fn is_special(token: &str, file: &GgufFile, ids: &HashMap<&str, usize>) -> bool {
    // Gemma 4's `</s>` ends nothing.
    let ends = knows_as_end(token) && (token != "</s>" || !ids.contains_key("<|tool_response>"));
    let given = |key: &&str| file.metadata(&format!("tokenizer.ggml.{key}")).is_some();
    ends || MIDDLES.iter().any(|(keys, texts)| texts.contains(&token) && !keys.iter().any(&given))
}

/// What a reader of a report should know of how texts are split.
pub(crate) fn notes(file: &GgufFile) -> Option<String> {
    let vocabulary =
        Vocabulary::read(file).ok().filter(|_| file.string("tokenizer.ggml.model").ok() == Some(Some("llama")))?;
    let scores = file.floats("tokenizer.ggml.scores").ok()?.unwrap_or_default();
    let mut normal = scores.iter().zip(&vocabulary.kinds).filter(|(_, kind)| **kind == kind::NORMAL).map(|(x, _)| x);
    let first = normal.next();
    (vocabulary.tokens.len() > 1 && normal.all(|other| Some(other) == first)).then(|| {
        format!(
            "{}: the pieces of its tokenizer have no scores (tokenizer.ggml.scores) that say which are joined first: here it is the one with \
             the lowest number, as pieces are numbered in the order in which they were learned, and llama.cpp joins from the left",
            file.path().display()
        )
    })
}

/// The tokenizer of a file; nothing lies beside it.
pub(crate) fn tokenizer_files(file: &GgufFile) -> Result<TokenizerFiles> {
    let json = tokenizer_json(file)?;
    let config = tokenizer_config(file, None)?;
    let name = file.path().file_name().unwrap_or_default().to_string_lossy();
    let templates = Templates::of_value(&config["chat_template"], &name);
    let stated = added::of_json(&json).unwrap_or_default();
    let stated = stated.into_iter().map(|(id, token)| Stated::new(id, token)).collect();
    let sources = Sources { config, ..Sources::default() };
    let mut files = TokenizerFiles::build(file.path(), FILE, json, stated, sources, templates, Own::default())?;
    files.notices.extend(guessed(file)?);
    files.notices.extend(without_end(file)?);
    Ok(files)
}

/// tokenizer.json, as the tokenizers library reads it.
pub(crate) fn tokenizer_json(file: &GgufFile) -> Result<Value> {
    let vocabulary = Vocabulary::read(file)?;
    let model = file.require("tokenizer.ggml.model", file.string("tokenizer.ggml.model")?)?;
    match model {
        "gpt2" => merged(file, &vocabulary, pre(file)?.unwrap_or("default")),
        "gemma4" => merged(file, &vocabulary, "gemma4"),
        "llama" => sentence_piece(file, &vocabulary),
        unigram::MODEL => unigram::rebuilt(file, &vocabulary),
        other => Err(formats::Error::unsupported(format!(
            "a tokenizer of model `{other}` cannot be read (gpt2, gemma4, llama, t5)"
        ))
        .in_file(file.path())
        .into()),
    }
}

/// The name of the pre-tokenizer; an empty one is none.
fn pre(file: &GgufFile) -> Result<Option<&str>> {
    Ok(file.string("tokenizer.ggml.pre")?.filter(|pre| !pre.is_empty()))
}

/// The ids at which generation stops: the file's own EOS, and what ends a turn and a message of the model's; without an EOS the tokens
/// that llama.cpp takes for ends by their texts.
pub(crate) fn ends(file: &GgufFile) -> Result<Vec<usize>> {
    let mut ends = match own_end(file)? {
        Some(own) => vec![own],
        None => ends_by_text(file.strings("tokenizer.ggml.tokens")?.unwrap_or_default().into_iter()),
    };
    for key in ["eot", "eom"] {
        let id = file.count(&format!("tokenizer.ggml.{key}_token_id"))?;
        ends.extend(id.filter(|id| !ends.contains(id)));
    }
    Ok(ends)
}

/// The EOS that a file gives, or the number that SentencePiece's has.
fn own_end(file: &GgufFile) -> Result<Option<usize>> {
    let given = file.count("tokenizer.ggml.eos_token_id")?;
    let usual = match file.string("tokenizer.ggml.model")? {
        Some("llama") => Some(SENTENCE_PIECE_EOS),
        Some(unigram::MODEL) => Some(UNIGRAM_EOS),
        _ => None,
    };
    let tokens = file.strings("tokenizer.ggml.tokens")?.map_or(0, |tokens| tokens.len());
    Ok(given.or(usual.filter(|id| *id < tokens)))
}

/// What to say of a file that does not name its EOS.
fn without_end(file: &GgufFile) -> Result<Option<String>> {
    let tokens = file.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    if own_end(file)?.is_some() {
        return Ok(None);
    }
    let shown: Vec<String> =
        ends(file)?.into_iter().filter_map(|id| Some(format!("`{}` ({id})", tokens.get(id)?))).collect();
    let taken = match shown.is_empty() {
        false => format!("it stops at {}, as llama.cpp does, which goes by their texts", shown.join(" and ")),
        true => "no token looks like one, so that generation ends by its length alone; set the key".to_owned(),
    };
    Ok(Some(format!("{}: does not name its EOS (tokenizer.ggml.eos_token_id): {taken}", file.path().display())))
}

/// What to say of a file that does not name its pre-tokenizer.
fn guessed(file: &GgufFile) -> Result<Option<String>> {
    let byte_level = file.string("tokenizer.ggml.model")? == Some("gpt2");
    Ok((byte_level && pre(file)?.is_none()).then(|| {
        format!(
            "{}: does not name its pre-tokenizer (tokenizer.ggml.pre), and `default` was taken, as in llama.cpp: texts may be divided otherwise \
             than the model was trained with; take a file that was converted anew, or set the key",
            file.path().display()
        )
    }))
}

/// Byte-level BPE, or the BPE of pieces that some names of pre-tokenizers stand for.
fn merged(file: &GgufFile, vocabulary: &Vocabulary<'_>, pre: &str) -> Result<Value> {
    let way = Way::named(pre).ok_or_else(|| {
        let near = nearest(pre, WAYS.iter().flat_map(|way| way.names).copied());
        formats::Error::unsupported(format!(
            "pre-tokenizer `{pre}` (tokenizer.ggml.pre) is none that is known here{}: how it splits texts cannot be rebuilt; take the model that the \
             file was made from, or set the key to a name of a tokenizer that splits alike, as llama-bpe or qwen2",
            near.map_or(String::new(), |near| format!(" (is it `{near}`?)"))
        ))
        .in_file(file.path())
    })?;
    let key = "tokenizer.ggml.merges";
    let mut merges = Vec::new();
    for merge in file.require(key, file.strings(key)?)? {
        // Of pieces the first may begin with a space.
        let space = merge.char_indices().skip(1).find(|(_, c)| *c == ' ');
        let parts = space.map(|(at, _)| (&merge[..at], &merge[at + 1..])).filter(|(left, right)| {
            [*left, *right, &format!("{left}{right}")].iter().all(|token| vocabulary.ids.contains_key(token))
        });
        let (left, right) = parts.ok_or_else(|| {
            formats::Error::malformed(format!("merge `{merge}` does not join two tokens to a third"))
                .in_file(file.path())
        })?;
        merges.push([left, right]);
    }
    let spaces = matches!(way.steps, Steps::Pieces { spaces: true, .. });
    if matches!(way.steps, Steps::Pieces { runs: true, .. }) {
        merges.extend(breaks(vocabulary, &merges));
    }
    let decoder = match way.is_of_bytes() {
        true => json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        false => json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]}),
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": spaces.then(|| json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})),
        "pre_tokenizer": way.pre_tokenizer(),
        "post_processor": post_processor(file, vocabulary, way.add_bos)?,
        "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": !way.is_of_bytes(), "ignore_merges": way.ignore_merges,
            "vocab": vocabulary.to_json(&merges), "merges": merges,
        },
    }))
}

/// Merges for runs of line breaks, which llama.cpp takes as they are where there is a token for one.
fn breaks<'f>(vocabulary: &Vocabulary<'f>, merges: &[[&'f str; 2]]) -> Vec<[&'f str; 2]> {
    let mut runs: Vec<&str> = vocabulary
        .tokens
        .iter()
        .copied()
        .filter(|token| !token.is_empty() && token.bytes().all(|b| b == b'\n'))
        .collect();
    runs.sort_unstable();
    let known: HashSet<[&str; 2]> = merges.iter().copied().collect();
    let made = runs.iter().flat_map(|run| (1..run.len()).map(|at| <[&str; 2]>::from(run.split_at(at))));
    made.filter(|pair| pair.iter().all(|part| runs.binary_search(part).is_ok()) && !known.contains(pair)).collect()
}

fn sentence_piece(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Value> {
    let scores = vocabulary.scores(file)?;
    let unknown = vocabulary.special(file, "unknown")?.map(|(_, token)| token);
    let merges = merges_of(vocabulary, &scores);
    let space = file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let normalizer = if space {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]})
    } else {
        replace
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "post_processor": post_processor(file, vocabulary, true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary.to_json(&merges), "merges": merges,
        },
    }))
}

/// Every way to join two pieces to a third, the best-scored result first. As in llama.cpp the pieces' types do not matter.
///
/// Files whose pieces all have one score say nothing of the order; there a piece's number stands in for it, as pieces
/// are numbered in the order they were learned.
fn merges_of<'f>(vocabulary: &Vocabulary<'f>, scores: &[f32]) -> Vec<[&'f str; 2]> {
    let mut merges: Vec<(usize, &'f str, &'f str)> = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if [left, right].iter().all(|part| vocabulary.ids.contains_key(part)) {
                merges.push((id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| {
        let by_score = scores[b.0].total_cmp(&scores[a.0]);
        by_score.then(a.0.cmp(&b.0)).then(a.1.len().cmp(&b.1.len()))
    });
    merges.into_iter().map(|(_, left, right)| [left, right]).collect()
}

/// Puts BOS before and EOS after a text, as the file says.
pub(super) fn post_processor(file: &GgufFile, vocabulary: &Vocabulary<'_>, default_bos: bool) -> Result<Value> {
    let add_bos = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(default_bos);
    let add_eos = file.bool("tokenizer.ggml.add_eos_token")?;
    let add_eos = add_eos.unwrap_or(file.string("tokenizer.ggml.model")? == Some(unigram::MODEL));
    let special = |wanted: bool, name: &str| match wanted {
        true => Ok(vocabulary.special(file, name)?.map(|(id, token)| (id as u32, token))),
        false => Ok::<_, Error>(None),
    };
    Ok(around(special(add_bos, "bos")?, special(add_eos, "eos")?))
}

/// tokenizer_config.json, as transformers reads it.
pub(crate) fn tokenizer_config(file: &GgufFile, context: Option<u64>) -> Result<Value> {
    let vocabulary = Vocabulary::read(file)?;
    let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    let object = config.as_object_mut().expect("an object");
    for (name, key) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        if let Some((_, token)) = vocabulary.special(file, key)? {
            object.insert(name.into(), token.into());
        }
    }
    if !object.contains_key("eos_token")
        && let Some(end) = ends(file)?.first().and_then(|id| vocabulary.tokens.get(*id))
    {
        object.insert("eos_token".into(), (*end).into());
    }
    if let Some(context) = context {
        object.insert("model_max_length".into(), context.into());
    }
    let key = "tokenizer.chat_template";
    let mut templates: Vec<Value> = Vec::new();
    for name in file.strings("tokenizer.chat_templates")?.unwrap_or_default() {
        if let Some(template) = file.string(&format!("{key}.{name}"))? {
            templates.push(json!({"name": name, "template": template}));
        }
    }
    match file.string(key)? {
        Some(template) if templates.is_empty() => drop(object.insert("chat_template".into(), template.into())),
        default => {
            let default = default.map(|template| json!({"name": "default", "template": template}));
            templates.splice(0..0, default);
        }
    }
    if !templates.is_empty() {
        object.insert("chat_template".into(), templates.into());
    }
    Ok(config)
}
