use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::Tokenizer;
use super::super::select::words;

fn fixture(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/text").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A tokenizer with these keys in place of its own.
fn with(mut json: Value, changes: &[(&str, Value)]) -> Value {
    for (key, value) in changes {
        json[*key] = value.clone();
    }
    json
}

fn token(id: u32, content: &str, flags: &[&str]) -> Value {
    let mut token = json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    flags.iter().for_each(|flag| token[*flag] = true.into());
    token
}

/// A tokenizer of each kind, and whether a text may be cut before a space at least.
fn all() -> Vec<(&'static str, Value, bool)> {
    let regex =
        |source: &str| json!({"type": "Split", "pattern": {"Regex": source}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let gpt2 = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
    let normalizers = |steps: Vec<Value>| json!({"type": "Sequence", "normalizers": steps});
    let digits = |each: bool| json!({"type": "Digits", "individual_digits": each});
    let spaces = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let byte_level = || fixture("byte_level.json");
    let pieces = || fixture("sentencepiece_like.json");
    let split =
        |behavior: &str| json!({"type": "Split", "pattern": {"String": " "}, "behavior": behavior, "invert": false});
    let deepseek = sequence(vec![
        regex(r"\p{N}{1,3}"),
        regex("[一-龥\u{3040}-ゟ゠-ヿ]+"),
        regex(
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        ),
        bytes.clone(),
    ]);
    let falcon = sequence(vec![
        json!({"type": "Punctuation", "behavior": "Contiguous"}),
        gpt2.clone(),
        digits(false),
        regex("[0-9][0-9][0-9]"),
    ]);
    let llama3 = byte_level()["pre_tokenizer"].clone();
    let vocab: Vec<Value> = {
        let ids = pieces()["model"]["vocab"].as_object().unwrap().clone();
        let mut all: Vec<(String, u64)> = ids.into_iter().map(|(token, id)| (token, id.as_u64().unwrap())).collect();
        all.sort_by_key(|(_, id)| *id);
        all.into_iter().map(|(token, id)| json!([token, -0.01 * id as f64])).collect()
    };
    let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": false});
    let letters: serde_json::Map<String, Value> =
        ["[UNK]", "t", "##h", "##e", "e", "the", "##中", "中", "1", "##2", "."]
            .iter()
            .enumerate()
            .map(|(id, token)| ((*token).to_owned(), id.into()))
            .collect();
    let wordpiece = json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": letters});
    let bert = json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true});
    let odd_tokens = json!([
        token(0, "<|begin_of_text|>", &[]),
        token(1, "<|end_of_text|>", &["lstrip"]),
        token(2, "<|im_start|>", &["rstrip"]),
        token(3, "<|im_end|>", &["single_word", "normalized"]),
        token(1000, "  ", &[]),
        token(1001, "\n\n", &[]),
        token(1002, "the", &["single_word"]),
        token(1003, "中", &["lstrip", "rstrip"]),
        token(1004, " e", &["normalized"]),
    ]);
    let gemma = [("normalizer", replace.clone()), ("pre_tokenizer", split("MergedWithPrevious"))];
    let ignoring = {
        let mut json = pieces();
        json["model"]["ignore_merges"] = true.into();
        json
    };
    vec![
        ("Llama 3", byte_level(), true),
        ("GPT-2", with(byte_level(), &[("pre_tokenizer", gpt2.clone())]), true),
        ("Qwen", with(byte_level(), &[("normalizer", json!({"type": "NFC"}))]), true),
        (
            "NFKC and lower case",
            with(
                byte_level(),
                &[("normalizer", normalizers(vec![json!({"type": "NFKC"}), json!({"type": "Lowercase"})]))],
            ),
            true,
        ),
        ("SmolLM", with(byte_level(), &[("pre_tokenizer", sequence(vec![digits(true), gpt2.clone()]))]), true),
        ("DeepSeek", with(byte_level(), &[("pre_tokenizer", deepseek)]), true),
        ("Falcon", with(byte_level(), &[("pre_tokenizer", falcon)]), true),
        (
            "ignored merges",
            {
                let mut json = byte_level();
                json["model"]["ignore_merges"] = true.into();
                json
            },
            true,
        ),
        ("odd tokens", with(byte_level(), &[("added_tokens", odd_tokens.clone())]), false),
        (
            "odd tokens with a prefix",
            with(byte_level(), &[("added_tokens", odd_tokens), ("pre_tokenizer", gpt2.clone())]),
            false,
        ),
        ("Llama 2", pieces(), true),
        (
            "Llama 2 with tokens that strip",
            with(
                pieces(),
                &[("added_tokens", json!([token(1, "<s>", &["rstrip"]), token(2, "</s>", &["lstrip", "rstrip"])]))],
            ),
            true,
        ),
        ("Gemma", with(pieces(), &gemma), true),
        ("no words, ignored merges", ignoring, false),
        (
            "spaces, whole",
            with(pieces(), &[("normalizer", Value::Null), ("pre_tokenizer", spaces("first", false))]),
            true,
        ),
        (
            "spaces, first",
            with(pieces(), &[("normalizer", Value::Null), ("pre_tokenizer", spaces("first", true))]),
            true,
        ),
        (
            "spaces, always",
            with(pieces(), &[("normalizer", Value::Null), ("pre_tokenizer", spaces("always", true))]),
            true,
        ),
        (
            "Unigram",
            with(
                pieces(),
                &[("normalizer", Value::Null), ("pre_tokenizer", spaces("always", true)), ("model", unigram.clone())],
            ),
            true,
        ),
        (
            "Unigram by words",
            with(
                pieces(),
                &[
                    (
                        "normalizer",
                        normalizers(vec![
                            json!({"type": "Strip", "strip_left": true, "strip_right": true}),
                            json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}),
                        ]),
                    ),
                    ("pre_tokenizer", sequence(vec![json!({"type": "WhitespaceSplit"}), spaces("always", true)])),
                    ("model", unigram.clone()),
                ],
            ),
            true,
        ),
        (
            "SentencePiece's single spaces",
            with(
                pieces(),
                &[(
                    "normalizer",
                    normalizers(vec![
                        json!({"type": "Replace", "pattern": {"Regex": "^ +|[ ▁]+$"}, "content": ""}),
                        json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}),
                        json!({"type": "Prepend", "prepend": "▁"}),
                        replace.clone(),
                    ]),
                )],
            ),
            true,
        ),
        ("Unigram, whole", with(pieces(), &[("model", unigram)]), false),
        (
            "BERT",
            with(
                pieces(),
                &[
                    ("normalizer", bert),
                    ("pre_tokenizer", json!({"type": "BertPreTokenizer"})),
                    ("model", wordpiece.clone()),
                    ("added_tokens", json!([])),
                    ("post_processor", Value::Null),
                ],
            ),
            true,
        ),
        (
            "words and the rest",
            with(
                pieces(),
                &[
                    ("normalizer", Value::Null),
                    ("pre_tokenizer", json!({"type": "Whitespace"})),
                    ("model", wordpiece),
                    ("added_tokens", json!([])),
                    ("post_processor", Value::Null),
                ],
            ),
            true,
        ),
        (
            "scripts",
            with(byte_level(), &[("pre_tokenizer", sequence(vec![json!({"type": "UnicodeScripts"}), bytes.clone()]))]),
            false,
        ),
        (
            "looks behind",
            with(byte_level(), &[("pre_tokenizer", sequence(vec![regex(r"(?<=\n)\s+|\S+|\s"), bytes.clone()]))]),
            false,
        ),
        (
            "a run of digits from the right",
            with(
                byte_level(),
                &[(
                    "pre_tokenizer",
                    sequence(vec![regex(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|[^\s\S]))|\P{N}"), llama3.clone()]),
                )],
            ),
            true,
        ),
        (
            "merged with the next",
            with(byte_level(), &[("pre_tokenizer", sequence(vec![split("MergedWithNext"), llama3.clone()]))]),
            true,
        ),
        (
            "contiguous spaces",
            with(byte_level(), &[("pre_tokenizer", sequence(vec![split("Contiguous"), llama3]))]),
            true,
        ),
    ]
}

fn tokenizers() -> Vec<(&'static str, Tokenizer, bool)> {
    let read = |json: Value| Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    let mut all: Vec<_> = all().into_iter().map(|(name, json, cut)| (name, read(json), cut)).collect();
    all.push(("words", words(true), true));
    all
}

const PARTS: &[&str] = &[
    "e",
    "the",
    "Hello",
    "t",
    "A",
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\t",
    ".",
    ",",
    "'s",
    "'",
    "1",
    "234",
    "%%",
    "(((",
    "_",
    "\u{301}",
    "e\u{301}",
    "é",
    "中",
    "中文",
    "，",
    "。",
    "かな",
    "カ\u{3099}",
    "ไทย",
    "नमस्ते",
    "한국",
    "ᄒ",
    "ﬁ",
    "Ａ",
    "▁",
    "\u{a0}",
    "\u{3000}",
    "\u{200d}",
    "😀",
    "☃",
    "<s> 8",
    "</s> ☃",
    "<|im_start|> ,",
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|im_start|>",
    "<|end_of_text|>",
    "[INST]",
    " e",
    "x",
    "w1",
    "w2",
    "İ",
    "ß",
    "Σ",
];

fn text() -> impl Strategy<Value = String> {
    proptest::collection::vec(proptest::sample::select(PARTS), 1..40).prop_map(|parts| parts.concat())
}

#[test]
fn every_cut_gives_the_ids_of_the_whole() {
    let tokenizers = tokenizers();
    let cuts = std::cell::RefCell::new(vec![0; tokenizers.len()]);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 100,
        failure_persistence: None,
        ..Default::default()
    });
    let run = runner.run(&text(), |text| {
        for (index, (name, tokenizer, _)) in tokenizers.iter().enumerate() {
            let whole = tokenizer.inner.encode_fast(&*text, false).unwrap().get_ids().to_vec();
            for (at, y) in text.char_indices().skip(1) {
                let x = text[..at].chars().next_back().unwrap();
                if !tokenizer.cuts.allow(x, y) {
                    continue;
                }
                cuts.borrow_mut()[index] += 1;
                let parts = [tokenizer.part(&text, 0, at).unwrap(), tokenizer.part(&text, at, text.len()).unwrap()];
                let joined = parts.map(|part| part.expect("what was before comes again")).concat();
                prop_assert_eq!(&joined, &whole, "{}: cut after {:?} of {:?}", name, &text[..at], &text);
            }
        }
        Ok(())
    });
    run.unwrap();
    for ((name, tokenizer, cut), found) in tokenizers.iter().zip(cuts.into_inner()) {
        assert_eq!(tokenizer.cuts.allow('e', ' '), *cut, "{name}");
        assert!(!cut || found > 100, "{name}: {found} cuts");
    }
}

#[test]
fn a_long_text_is_taken_in_parts_and_only_as_far_as_it_is_needed() {
    let sample = include_str!("../../../../tests/fixtures/text/sample.txt");
    // Larger than the largest part.
    let long = sample.repeat(3);
    for (name, tokenizer, cut) in tokenizers() {
        let whole = tokenizer.inner.encode_fast(&*long, false).unwrap().get_ids().to_vec();
        let marked = [tokenizer.prefix(), &whole, tokenizer.suffix()].concat();
        // Where no cut can be shown, any number takes all of it.
        let asked: &[usize] = if cut { &[0, 100, 5000, usize::MAX] } else { &[100, usize::MAX] };
        for &least in asked {
            let found = tokenizer.begin(&long, true, least).unwrap();
            assert!(marked.starts_with(&found.ids) && found.ids.len() >= least.min(marked.len()), "{name}, {least}");
            let all = found.read == long.len();
            assert!(!all || found.ids == marked, "{name}, {least}");
            if cut && least <= 5000 {
                // A word of these small vocabularies has few bytes to a token.
                assert!(found.read <= 6 * least + (4 << 10), "{name}, {least}: {} bytes", found.read);
            }
        }
    }
    // Where no cut can be shown, all of it is taken.
    let (_, scripts, _) = tokenizers().into_iter().find(|(name, ..)| *name == "scripts").unwrap();
    assert_eq!(scripts.begin(&long, false, 1).unwrap().read, long.len());
    assert_eq!(scripts.begin("", true, 1).unwrap().ids, [0]);
}

#[test]
fn a_text_without_a_cut_is_one_part() {
    let mut json = fixture("sentencepiece_like.json");
    for (id, [a, b]) in [(900, ["a", "a"]), (901, ["aa", "aa"]), (902, ["aaaa", "aaaa"])] {
        json["model"]["vocab"][format!("{a}{b}")] = id.into();
        json["model"]["merges"].as_array_mut().unwrap().push(json!([a, b]));
    }
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    // The pairs in which such a run is merged are counted from its start.
    let run = "a".repeat(100_001);
    let text = format!("{run} b {run}");
    let whole = tokenizer.inner.encode_fast(&*text, false).unwrap().get_ids().to_vec();
    assert_eq!(tokenizer.encode(&text, false).unwrap(), whole);
    assert_eq!(tokenizer.begin(&text, false, 1).unwrap().read, run.len());
}
