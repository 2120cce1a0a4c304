//! tokenizer.json and tokenizer_config.json rebuilt from a GGUF's metadata.
//!
//! Byte-level BPE (`gpt2`) keeps its merges and names its pre-tokenizer; of SentencePiece (`llama`) only pieces and scores
//! remain, from which the merges follow: the pair whose piece scores highest is joined first. What llama.cpp does not do to
//! texts is not done either: it applies no NFC, which the original tokenizers of `qwen2` and `qwen35` do.

use std::collections::{HashMap, HashSet};

use formats::GgufFile;
use serde_json::{Map, Value, json};

use super::special::ends_by_text;
use crate::dialect::called::Rule;
use crate::dialect::tokenizer::knows_as_end;
use crate::error::{Error, Result};
use crate::tokenizer::added::{self, Sources, Stated};
use crate::tokenizer::sentencepiece::{around, kind};
use crate::tokenizer::{FILE, Own, Templates, TokenizerFiles, words};

/// Mistral's since Nemo: case ends a word.
const TEKKEN_WORDS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GPT-4o's: the same with English endings, and numbers by three.
const GPT_4O_WORDS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// DeepSeek V3's, one after the other.
const DEEPSEEK_V3_WORDS: &[&str] = &[
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
];

/// DeepSeek's first, one after the other: letters of scripts with case, punctuation, those of Chinese, Japanese, Korean.
const DEEPSEEK_LLM_WORDS: &[&str] = &[
    "[\r\n]",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
];

/// DeepSeek Coder's, one after the other.
const DEEPSEEK_CODER_WORDS: &[&str] = &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"];

/// Falcon's, one after the other.
const FALCON_WORDS: &[&str] = &[
    r"[\p{P}\$\+<=>\^~\|`]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"[0-9][0-9][0-9]",
];

/// Qwen 3.5's: marks belong to their letters.
const QWEN35_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What llama.cpp does, one after the other, when a file says `default`.
const DEFAULT_WORDS: &[&str] = &[
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// How byte-level BPE is set up under one `tokenizer.ggml.pre`.
pub(crate) struct ByteLevel {
    pub pre_tokenizer: Value,
    pub ignore_merges: bool,
    /// Whether texts start with the BOS token when the file does not say.
    add_bos: bool,
}

/// The names that [`ByteLevel::named`] knows, without second names.
pub(crate) const BYTE_LEVEL: &[&str] = &[
    "gpt-2",
    "smollm",
    "llama-bpe",
    "smaug-bpe",
    "qwen2",
    "stablelm2",
    "qwen35",
    "tekken",
    "gpt-4o",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "falcon",
    "default",
];

impl ByteLevel {
    pub fn named(pre: &str) -> Option<ByteLevel> {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
        let plain = |pre_tokenizer| ByteLevel { pre_tokenizer, ignore_merges: false, add_bos: false };
        let splits = |patterns: &[&str]| {
            plain(sequence(patterns.iter().map(|pattern| split(pattern)).chain([bytes(false)]).collect()))
        };
        Some(match pre {
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "granite-docling" | "exaone4" | "gigachat"
            | "a.x-4.0" | "mellum" | "jina-es" | "jina-de" => plain(bytes(true)),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" | "mellum2" => {
                plain(sequence(vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)]))
            }
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
                ByteLevel { ignore_merges: true, add_bos: true, ..splits(&[words::LLAMA3]) }
            }
            "glm4" | "glm5" => ByteLevel { ignore_merges: true, ..splits(&[words::LLAMA3]) },
            "smaug-bpe" | "dbrx" | "chatglm-bpe" => splits(&[words::LLAMA3]),
            "tekken" => ByteLevel { ignore_merges: true, add_bos: true, ..splits(&[TEKKEN_WORDS]) },
            "gpt-4o" | "llama4" | "kanana2" | "minimax-m2" => splits(&[GPT_4O_WORDS]),
            "deepseek-llm" => splits(DEEPSEEK_LLM_WORDS),
            "deepseek-coder" => splits(DEEPSEEK_CODER_WORDS),
            "deepseek-v3" | "hunyuan-dense" | "joyai-llm" | "hy_v4" => splits(DEEPSEEK_V3_WORDS),
            "falcon" => splits(FALCON_WORDS),
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "stablelm2" | "hunyuan" | "solar-open" | "megrez"
            | "grok-2" => splits(&[words::QWEN2]),
            "qwen35" => splits(&[QWEN35_WORDS]),
            "default" => splits(DEFAULT_WORDS),
            _ => return None,
        })
    }
}

/// The EOS of a SentencePiece file that does not give it.
const SENTENCE_PIECE_EOS: usize = 2;

/// The vocabulary and what is special in it.
struct Vocabulary<'f> {
    tokens: Vec<&'f str>,
    kinds: Vec<i64>,
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
    fn special(&self, file: &GgufFile, name: &str) -> Result<Option<(usize, &'f str)>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = match file.count(&key)? {
            Some(id) => id,
            // SentencePiece files may rely on its own numbering.
            None if file.string("tokenizer.ggml.model")? == Some("llama") => match name {
                "unknown" => 0,
                "bos" => 1,
                "eos" => SENTENCE_PIECE_EOS,
                _ => return Ok(None),
            },
            None => return Ok(None),
        };
        match self.tokens.get(id) {
            Some(token) => Ok(Some((id, token))),
            None => {
                let expected = format!("below {}", self.tokens.len());
                Err(formats::Error::mismatch(format!("metadata key `{key}`"), expected, id).in_file(file.path()).into())
            }
        }
    }

    /// The vocabulary object: all but unused entries that no text comes to, which only fill the embedding's rows.
    fn to_json(&self, merges: &[[&str; 2]]) -> Value {
        let made: HashSet<String> = merges.iter().map(|pair| pair.concat()).collect();
        let used = self.tokens.iter().enumerate().filter(|(id, token)| {
            self.kinds[*id] != kind::UNUSED || token.chars().count() == 1 || made.contains(**token)
        });
        Value::Object(used.map(|(id, token)| (token.to_string(), Value::from(id))).collect::<Map<_, _>>())
    }

    fn added_tokens(&self) -> Value {
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
        "gpt2" => byte_level(file, &vocabulary),
        "llama" => sentence_piece(file, &vocabulary),
        other => {
            Err(formats::Error::unsupported(format!("a tokenizer of model `{other}` cannot be read (gpt2, llama)"))
                .in_file(file.path())
                .into())
        }
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
    let pieces = file.string("tokenizer.ggml.model")? == Some("llama");
    let tokens = file.strings("tokenizer.ggml.tokens")?.map_or(0, |tokens| tokens.len());
    Ok(given.or((pieces && tokens > SENTENCE_PIECE_EOS).then_some(SENTENCE_PIECE_EOS)))
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

fn byte_level(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Value> {
    let pre = pre(file)?.unwrap_or("default");
    let setup = ByteLevel::named(pre).ok_or_else(|| {
        formats::Error::unsupported(format!(
            "pre-tokenizer `{pre}` is not one that can be rebuilt ({})",
            BYTE_LEVEL.join(", ")
        ))
        .in_file(file.path())
    })?;
    let key = "tokenizer.ggml.merges";
    let mut merges = Vec::new();
    for merge in file.require(key, file.strings(key)?)? {
        let parts = merge.split_once(' ').filter(|(left, right)| {
            [*left, *right, &format!("{left}{right}")].iter().all(|token| vocabulary.ids.contains_key(token))
        });
        let (left, right) = parts.ok_or_else(|| {
            formats::Error::malformed(format!("merge `{merge}` does not join two tokens to a third"))
                .in_file(file.path())
        })?;
        merges.push([left, right]);
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": null,
        "pre_tokenizer": setup.pre_tokenizer,
        "post_processor": post_processor(file, vocabulary, setup.add_bos)?,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": setup.ignore_merges,
            "vocab": vocabulary.to_json(&merges), "merges": merges,
        },
    }))
}

fn sentence_piece(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Result<Value> {
    let key = "tokenizer.ggml.scores";
    let scores = file.floats(key)?.unwrap_or_else(|| vec![0.0; vocabulary.tokens.len()]);
    if scores.len() < vocabulary.tokens.len() {
        let what = format!("the length of metadata key `{key}`");
        return Err(formats::Error::mismatch(what, vocabulary.tokens.len(), scores.len()).in_file(file.path()).into());
    }
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
fn post_processor(file: &GgufFile, vocabulary: &Vocabulary<'_>, default_bos: bool) -> Result<Value> {
    let add_bos = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(default_bos);
    let add_eos = file.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
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
