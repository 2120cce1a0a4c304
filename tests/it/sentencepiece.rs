//! Folders whose only tokenizer is a SentencePiece tokenizer.model (`tests/fixtures/make_sentencepiece.py`).

use std::path::{Path, PathBuf};

use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};
use quantc::Checkpoint;
use quantc::text::ModelText;
use serde_json::{Value, json};

use crate::gguf_inputs::rewrite;
use crate::harness::{Room, TEXT, damaged};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentencepiece")
}

/// Every case.
fn names() -> Vec<String> {
    let entries = std::fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

/// The built-in model with the tokenizer of a case instead of its own.
fn model(room: &Room, name: &str) -> Value {
    let model = room.model();
    for entry in std::fs::read_dir(model.path("")).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.file_name().unwrap().to_str().unwrap().starts_with("tokenizer") {
            std::fs::remove_file(entry).unwrap();
        }
    }
    for entry in std::fs::read_dir(fixtures().join(name)).unwrap().map(|entry| entry.unwrap()) {
        std::fs::copy(entry.path(), model.path(entry.file_name().to_str().unwrap())).unwrap();
    }
    let golden = std::fs::read(model.path("golden.json")).unwrap();
    std::fs::remove_file(model.path("golden.json")).unwrap();
    serde_json::from_slice(&golden).unwrap()
}

#[test]
fn ids_are_those_of_sentencepiece_and_transformers() {
    let mut wrong = Vec::new();
    for name in names() {
        let room = Room::new();
        let golden = model(&room, &name);
        let tokenizer = ModelText::open(&Checkpoint::open(&room.path("model")).unwrap()).unwrap().tokenizer;
        let mut compared = 0;
        for (key, special) in [("sentencepiece", false), ("transformers", true)] {
            let Some(expected) = golden[key].as_array() else { continue };
            // Without a space before a text that begins with one, when that is asked for.
            let legacy = golden.get("transformers").is_none();
            for (text, expected) in golden["texts"].as_array().unwrap().iter().zip(expected) {
                let text = text.as_str().unwrap();
                let Ok(expected) = serde_json::from_value::<Vec<u32>>(expected.clone()) else { continue };
                if key == "sentencepiece" && !legacy && (text.starts_with([' ', '▁'])) {
                    continue;
                }
                compared += 1;
                let found = tokenizer.encode(text, special).unwrap();
                if found != expected {
                    wrong.push(format!("{name}, {key}, {text:?}:\n  {found:?}\n  {expected:?}"));
                }
            }
        }
        assert!(compared > 10, "{name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

const QUICK: &[&str] =
    &["--samples", "4", "--seq-len", "64", "--verify-windows", "1", "--quiet", "--calibration", TEXT];

/// What is said of a model without byte_fallback.
const WITHOUT_BYTES: &[&str] = &[
    "model/tokenizer.model: the vocabulary has no token for ",
    "of the 256 bytes (such as `<0x0A>`)",
    "llama.cpp aborts",
    "another --format",
];

#[test]
fn llama_cpp_has_a_token_for_every_byte_or_gets_no_file() {
    let quick = ["--scheme", "Q8_0", "--method", "rtn", "--verify-text", "none", "--force"];
    let room = Room::new();
    model(&room, "rules");
    room.run(["quantize", "model", "-o", "out.gguf"].iter().chain(&quick)).refuses(2, WITHOUT_BYTES);
    assert!(!room.path("out.gguf").exists());
    room.run(["convert", "model", "-o", "plain", "--force"]).succeeds();
    // Nor of a file that another program made so.
    model(&room, "llama");
    room.run(["quantize", "model", "-o", "whole.gguf"].iter().chain(&quick)).succeeds();
    rewrite(&room.path("whole.gguf"), &room.path("x.gguf"), |keys, _| {
        let (_, value) = keys.iter_mut().find(|(key, _)| key == "tokenizer.ggml.tokens").unwrap();
        let MetadataValue::Array(tokens) = value else { panic!("a list") };
        let other = |token: &MetadataValue| match token.as_str() {
            Some("<0x0A>") => MetadataValue::String("<newline>".to_owned()),
            _ => token.clone(),
        };
        *value = metadata_array(tokens.iter().map(other).collect(), GGUFValueType::String).unwrap();
    });
    let words = ["x.gguf: the vocabulary has no token for 1 of the 256 bytes (such as `<0x0A>`)", "another --format"];
    room.run(["quantize", "x.gguf", "-o", "out.gguf"].iter().chain(&quick)).refuses(2, &words);
}

#[test]
fn spaces_that_llama_cpp_puts_and_transformers_does_not_are_told_with_an_example() {
    let room = Room::new();
    model(&room, "llama_fine_tuned");
    for verify in ["none", "held-out"] {
        let words = ["quantize", "model", "-o", "out.gguf", "--scheme", "Q8_0", "--method", "rtn", "--force"];
        let run = room.run(words.iter().chain(&["--verify-text", verify, "--verify-windows", "1"]));
        run.succeeds();
        let told = run.stderr();
        let example = "though not running text: \"  two spaces\" becomes `<s> ▁▁ ▁t";
        for words in
            [example, "` and not `<s> ▁ ▁t", "; so ", "llama.cpp puts a space before the text after each special token"]
        {
            assert_eq!(told.matches(words).count(), 1, "{verify}, {words}: {told}");
        }
    }
    // Where nothing but the model's own marks is special.
    std::fs::remove_file(room.path("model/added_tokens.json")).unwrap();
    std::fs::remove_file(room.path("model/special_tokens_map.json")).unwrap();
    let words = ["quantize", "model", "-o", "own.gguf", "--scheme", "Q8_0", "--method", "rtn", "--verify-text", "none"];
    let run = room.run(words);
    run.succeeds();
    assert!(run.stderr().contains("puts a space before the text after each special token"), "{}", run.stderr());
}

#[test]
fn a_model_with_it_is_calibrated_measured_and_written() {
    for name in ["llama", "unigram", "unigram_bytes"] {
        let room = Room::new();
        model(&room, name);
        let with = |words: &[&str]| -> Vec<String> { words.iter().chain(QUICK).map(|w| (*w).to_owned()).collect() };
        room.run(with(&["quantize", "model", "-o", "out"])).succeeds();
        let copied = std::fs::read(room.path("out/tokenizer.model")).unwrap();
        assert_eq!(copied, std::fs::read(room.path("model/tokenizer.model")).unwrap());
        room.run(["eval", "out", "--reference", "model", "--windows", "1"]).succeeds();
        let gguf = room.run(with(&["quantize", "model", "-o", "out.gguf", "--scheme", "Q8_0"]));
        match name {
            // llama.cpp spells nothing in bytes, and the text has characters that are no pieces.
            "unigram_bytes" => gguf.refuses(1, &["out.gguf", "other tokens", "unigram", "unknown character in bytes"]),
            _ => {
                gguf.succeeds();
                room.run(["eval", "out.gguf", "--windows", "1"]).succeeds();
            }
        }
    }
}

/// A GGUF file of a Unigram model gives SentencePiece's ids, as llama.cpp does (`tests/runtimes/tokens.py`), but for bytes.
#[test]
fn unigram_models_in_gguf_files_give_the_same_ids() {
    for name in ["unigram", "unigram_bytes"] {
        let room = Room::new();
        let golden = model(&room, name);
        let words =
            ["quantize", "model", "-o", "out.gguf", "--scheme", "Q8_0", "--method", "rtn", "--verify-text", "none"];
        let run = room.run(words);
        run.succeeds();
        let bytes = name == "unigram_bytes";
        assert_eq!(
            run.stderr().contains("a character that is no piece becomes the unknown token"),
            bytes,
            "{}",
            run.stderr()
        );
        let original = Checkpoint::open(&room.path("model")).unwrap().tokenizer().unwrap().unwrap().tokenizer;
        let written = Checkpoint::open(&room.path("out.gguf")).unwrap().tokenizer().unwrap().unwrap().tokenizer;
        let mut compared = 0;
        for text in golden["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()) {
            let expected = original.encode(text, true).unwrap();
            let spelt = |id: &u32| original.id_to_token(*id).unwrap().starts_with("<0x");
            if !expected.iter().any(spelt) {
                assert_eq!(written.encode(text, true).unwrap(), expected, "{name}, {text:?}");
                compared += 1;
            }
        }
        assert!(compared > if bytes { 4 } else { 12 }, "{name}: {compared}");
        // Rules that lead nowhere are found before any text is split.
        rewrite(&room.path("out.gguf"), &room.path("bad.gguf"), |keys, _| {
            keys.retain(|(key, _)| key != "tokenizer.ggml.precompiled_charsmap");
            let rules = metadata_array(vec![MetadataValue::U8(9); 12], GGUFValueType::U8).unwrap();
            keys.push(("tokenizer.ggml.precompiled_charsmap".to_owned(), rules));
        });
        let words = ["bad.gguf", "tokenizer.ggml.precompiled_charsmap", "rules for characters are damaged"];
        room.run(["eval", "bad.gguf", "--windows", "1", "--quiet"]).refuses(1, &words);
    }
}

#[test]
fn gguf_files_hold_the_pieces_own_scores_and_types() {
    for name in names() {
        let room = Room::new();
        let golden = model(&room, &name);
        let source = Checkpoint::open(&room.path("model")).unwrap();
        let written = quantc::dialect::tokenizer::tokenizer(&source, 4096, None);
        let Ok(written) = written else {
            assert_eq!(name, "rules", "no byte tokens");
            continue;
        };
        let list = |key: &str| -> Vec<MetadataValue> {
            let (_, value) = written.metadata.iter().find(|(k, _)| k == &format!("tokenizer.ggml.{key}")).unwrap();
            let MetadataValue::Array(array) = value else { panic!("{key}") };
            array.iter().cloned().collect()
        };
        let [tokens, scores, types] = ["tokens", "scores", "token_type"].map(list);
        assert_eq!((tokens.len(), scores.len(), types.len()), (4096, 4096, 4096));
        let pieces = golden["pieces"].as_array().unwrap();
        for (id, piece) in pieces.iter().enumerate() {
            assert_eq!(tokens[id].as_str(), piece[0].as_str(), "{name} {id}");
            assert_eq!(scores[id], MetadataValue::F32(piece[1].as_f64().unwrap() as f32), "{name} {id}");
            assert_eq!(types[id].as_i64(), piece[2].as_i64(), "{name} {id}");
        }
        // What was added since has a low score of its own, and rows without a token a lower one.
        let last = pieces.len();
        let (added, unused) = (MetadataValue::F32(-1000.0), MetadataValue::F32(-10000.0));
        let expected: &[(usize, &MetadataValue, i64)] = match &name[..] {
            "llama_added" => &[(last, &added, 3), (last + 1, &unused, 5)],
            "llama_fine_tuned" => {
                &[(last, &added, 4), (last + 1, &added, 3), (last + 2, &added, 4), (last + 3, &unused, 5)]
            }
            _ => &[(last, &unused, 5)],
        };
        for (id, score, kind) in expected {
            assert_eq!((&scores[*id], types[*id].as_i64()), (*score, Some(*kind)), "{name} {id}");
        }
        let flag =
            |key: &str| written.metadata.iter().find(|(k, _)| k == &format!("tokenizer.ggml.{key}")).unwrap().1.clone();
        let model = formats::SentencePiece::parse(&std::fs::read(room.path("model/tokenizer.model")).unwrap()).unwrap();
        assert_eq!(flag("add_space_prefix"), MetadataValue::Bool(model.add_dummy_prefix));
        let config: Value =
            serde_json::from_slice(&std::fs::read(room.path("model/tokenizer_config.json")).unwrap()).unwrap();
        assert_eq!(flag("add_bos_token"), MetadataValue::Bool(config["add_bos_token"] == true));
        assert_eq!(flag("add_eos_token"), MetadataValue::Bool(config["add_eos_token"] == true));
    }
}

#[test]
fn a_tokenizer_model_that_cannot_be_used_is_one_sentence() {
    let room = Room::new();
    model(&room, "unigram");
    let path = room.path("model/tokenizer.model");
    let good = std::fs::read(&path).unwrap();
    let cases: &[(&[u8], &str)] = &[
        (b"", "the file is empty; fetch it again"),
        (b"PK\x03\x04 no such thing", "not a SentencePiece model"),
        (&good[..good.len() / 3], "it ends within a field"),
        (b"IQ== 0\nIg== 1\n", "names no special tokens behind the list's 2"),
    ];
    for (bytes, words) in cases {
        std::fs::write(&path, bytes).unwrap();
        room.run(["eval", "model", "--windows", "1", "--quiet"]).refuses(1, &["model/tokenizer.model: ", words]);
        let gguf =
            ["quantize", "model", "-o", "out.gguf", "--method", "rtn", "--scheme", "Q8_0", "--verify-text", "none"];
        room.run(gguf).refuses(1, &["model/tokenizer.model: ", words]);
    }
    // Files beside it that do not agree with it.
    std::fs::write(&path, &good).unwrap();
    for (file, content, words) in [
        ("added_tokens.json", json!({"hello": "x"}), "added_tokens.json beside it has no id for `hello`"),
        ("added_tokens.json", json!({"<s>": 700}), "`<s>` is piece 1 and, by the files beside it, token 700"),
        ("added_tokens.json", json!({"hello": 4_000_000_000u32}), "far beyond its 500 pieces"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"x": {}}}), "an entry in added_tokens_decoder, `x`"),
    ] {
        let room = Room::new();
        model(&room, "unigram");
        std::fs::write(room.path("model").join(file), content.to_string()).unwrap();
        room.run(["eval", "model", "--windows", "1", "--quiet"]).refuses(1, &["model/tokenizer.model: ", words]);
    }
    // Under another name, and nothing else.
    std::fs::rename(&path, room.path("model/spiece.model")).unwrap();
    let words = [
        "model: no tokenizer.json",
        "spiece.model is a SentencePiece model under another name",
        "save_pretrained(\"model\")",
    ];
    room.run(["eval", "model", "--windows", "1", "--quiet"]).refuses(1, &words);
}

/// Whatever was changed in a model, its tokenizer is refused or can be used.
#[test]
fn damage_is_found_before_any_text_is_split() {
    let room = Room::new();
    for name in ["rules", "llama"] {
        model(&room, name);
        let path = room.path("model/tokenizer.model");
        let good = std::fs::read(&path).unwrap();
        let source = Checkpoint::open(&room.path("model")).unwrap();
        let mut usable = 0;
        for bytes in damaged(&good, 300) {
            std::fs::write(&path, &bytes).unwrap();
            match ModelText::open(&source) {
                Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
                Ok(text) => {
                    usable += 1;
                    for text_of in ["", " a  b\tcafé\n", "\u{10ffff}\u{0}\u{1}…"] {
                        drop(text.tokenizer.encode(text_of, true));
                    }
                }
            }
        }
        assert!(usable > 50 && usable < 300, "{name}: {usable}");
    }
}

#[test]
fn a_class_that_says_nothing_of_legacy_is_read_as_transformers_reads_it() {
    let room = Room::new();
    model(&room, "llama_fine_tuned");
    std::fs::remove_file(room.path("model/special_tokens_map.json")).unwrap();
    room.file("model/added_tokens.json", r#"{"<new>": 600}"#);
    // LlamaTokenizer of transformers 5.23.
    let expected = [1, 264, 269, 273, 507, 600, 509, 261, 269, 273];
    for legacy in [None, Some(false)] {
        let mut config = json!({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
        if let Some(legacy) = legacy {
            config["legacy"] = legacy.into();
        }
        room.file("model/tokenizer_config.json", config.to_string());
        let opened = Checkpoint::open(&room.path("model")).unwrap();
        let tokenizer = opened.tokenizer().unwrap().unwrap().tokenizer;
        assert_eq!(tokenizer.encode("the cat <new>the cat", true).unwrap(), expected, "{legacy:?}");
    }
}
