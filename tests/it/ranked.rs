//! Folders whose only tokenizer is a list of tokens by rank: for tiktoken, or Mistral's tekken.json (`tests/fixtures/make_ranked.py`).

use std::path::{Path, PathBuf};

use formats::container::gguf::MetadataValue;
use quantc::Checkpoint;
use quantc::dialect::tokenizer::tokenizer as written;
use serde_json::{Value, json};

use crate::harness::{Model, Room, damaged};

/// Each case, with the file of its list.
const CASES: &[(&str, &str)] = &[
    ("kimi", "tiktoken.model"),
    ("qwen", "qwen.tiktoken"),
    ("hunyuan", "hy.tiktoken"),
    ("llama3", "tokenizer.model"),
    ("tekken", "tekken.json"),
    ("tekken_earlier", "tekken.json"),
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ranked")
}

/// The built-in model with the tokenizer of a case instead of its own, and what it has to give.
fn model(room: &Room, name: &str) -> (Model, Value) {
    let model = room.model();
    for entry in std::fs::read_dir(model.path("")).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.file_name().unwrap().to_str().unwrap().starts_with("tokenizer") {
            std::fs::remove_file(entry).unwrap();
        }
    }
    for entry in std::fs::read_dir(fixtures().join(name)).unwrap().map(|entry| entry.unwrap()) {
        let file = entry.file_name().into_string().unwrap();
        if file != "golden.json" {
            std::fs::copy(entry.path(), model.path(&file)).unwrap();
        }
    }
    (model, serde_json::from_slice(&std::fs::read(fixtures().join(name).join("golden.json")).unwrap()).unwrap())
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn ids_are_those_of_tiktoken_transformers_and_mistral_common() {
    let mut wrong = Vec::new();
    for (name, list) in CASES {
        let room = Room::new();
        let (_, golden) = model(&room, name);
        let files = Checkpoint::open(&room.path("model")).unwrap().tokenizer().unwrap().unwrap();
        for (text, expected) in golden["texts"].as_array().unwrap().iter().zip(golden["ids"].as_array().unwrap()) {
            let text = text.as_str().unwrap();
            for (marks, marked) in [(Vec::new(), false), (ids(&golden["marks"]), true)] {
                let expected = [marks, ids(expected)].concat();
                let found = files.tokenizer.encode(text, marked).unwrap();
                if found != expected {
                    wrong.push(format!("{name}, {text:?}:\n  {found:?}\n  {expected:?}"));
                }
            }
        }
        for token in golden["special"].as_array().unwrap() {
            let found = files.tokenizer.encode(token[1].as_str().unwrap(), false).unwrap();
            assert_eq!(json!(found), json!([token[0]]), "{name}, {token}");
        }
        if list.starts_with("tekken") {
            assert_eq!(files.special("eos"), Some(("tekken.json", "</s>")), "{name}");
        }
        assert_eq!(files.tokenizer.eos().is_some(), files.special("eos").is_some(), "{name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What the model's own code or library does and transformers does not is told with every output, once.
#[test]
fn what_transformers_does_otherwise_is_told() {
    for (name, words) in [
        (
            "kimi",
            Some("tiktoken.model: texts are divided here as by the model's own code; without that (trust_remote_code)"),
        ),
        ("qwen", Some("transformers makes no tokenizer of it")),
        ("hunyuan", Some("transformers makes no tokenizer of it")),
        ("llama3", None),
        ("tekken", Some("tekken.json: transformers 5 puts no BOS before texts where mistral-common is not installed")),
    ] {
        let room = Room::new();
        let (model, _) = model(&room, name);
        let run = room.run(["convert", "model", "-o", "out"]);
        run.succeeds();
        let told = |text: &str| text.matches(words.unwrap_or("transformers makes")).count();
        assert_eq!(told(&run.stderr()), usize::from(words.is_some()), "{name}: {}", run.stderr());
        let (_, list) = CASES.iter().find(|(case, _)| *case == name).unwrap();
        assert_eq!(std::fs::read(room.path("out").join(list)).unwrap(), std::fs::read(model.path(list)).unwrap());
    }
}

#[test]
fn such_models_are_calibrated_measured_and_written() {
    let quick = ["--samples", "4", "--seq-len", "64", "--verify-windows", "1", "--quiet"];
    for name in ["kimi", "tekken"] {
        let room = Room::new();
        model(&room, name);
        let words = ["quantize", "model", "-o", "out", "--calibration", crate::harness::TEXT];
        room.run(words.iter().chain(&quick)).succeeds();
        room.run(["eval", "out", "--reference", "model", "--windows", "1"]).succeeds();
    }
    let room = Room::new();
    model(&room, "tekken");
    let run = room.run([
        "quantize",
        "model",
        "-o",
        "out.gguf",
        "--scheme",
        "Q8_0",
        "--method",
        "rtn",
        "--verify-windows",
        "1",
    ]);
    run.succeeds();
    assert!(!run.stderr().contains("other tokens than the original's"), "{}", run.stderr());
    room.run(["eval", "out.gguf", "--reference", "model", "--windows", "1"]).succeeds();
}

#[test]
fn gguf_files_name_how_texts_are_divided() {
    for (name, pre) in
        [("kimi", "kimi-k2"), ("qwen", "qwen2"), ("hunyuan", "qwen2"), ("llama3", "llama-bpe"), ("tekken", "tekken")]
    {
        let room = Room::new();
        let (_, golden) = model(&room, name);
        let source = Checkpoint::open(&room.path("model")).unwrap();
        let out = written(&source, 4096, None).unwrap();
        let key = |key: &str| &out.metadata.iter().find(|(k, _)| k == &format!("tokenizer.ggml.{key}")).unwrap().1;
        assert_eq!(key("pre").as_str(), Some(pre), "{name}");
        let MetadataValue::Array(tokens) = key("tokens") else { panic!("a list") };
        for token in golden["special"].as_array().unwrap() {
            let row = tokens.iter().nth(token[0].as_u64().unwrap() as usize).unwrap();
            assert_eq!(row.as_str(), token[1].as_str(), "{name}");
        }
        if name == "tekken" {
            for (name, id) in [("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 5)] {
                assert_eq!(key(&format!("{name}_token_id")), &MetadataValue::U32(id), "{name}");
            }
            assert_eq!(key("add_bos_token"), &MetadataValue::Bool(true));
        }
    }
}

/// Changes a file of JSON in the model's folder.
fn change(model: &Model, name: &str, alter: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&std::fs::read(model.path(name)).unwrap()).unwrap();
    alter(&mut json);
    std::fs::write(model.path(name), json.to_string()).unwrap();
}

#[test]
fn settings_beside_a_list_count() {
    let room = Room::new();
    let (model, _) = model(&room, "tekken");
    let marks = || {
        let files = Checkpoint::open(&room.path("model")).unwrap().tokenizer().unwrap().unwrap();
        files.tokenizer.encode("", true).unwrap()
    };
    assert_eq!(marks(), [1]);
    room.file("model/tokenizer_config.json", json!({"add_bos_token": false, "add_eos_token": true}).to_string());
    assert_eq!(marks(), [2]);
    // A tokenizer.json goes before it, and what is wrong with it is not looked at.
    room.file("model/tekken.json", "{}");
    std::fs::copy(fixtures().join("../text/byte_level.json"), model.path("tokenizer.json")).unwrap();
    assert_ne!(marks(), [2]);
}

#[test]
fn lists_of_unknown_models_are_told_with_a_remedy() {
    let room = Room::new();
    let (model, _) = model(&room, "qwen");
    change(&model, "tokenizer_config.json", |config| config["tokenizer_class"] = "OtherTokenizer".into());
    let words =
        ["qwen.tiktoken is a list of tokens for tiktoken, and only the model's own code says how", "TikTokenConverter"];
    room.run(["eval", "model", "--windows", "1"]).refuses(1, &words);
    let run = room.run(["convert", "model", "-o", "out"]);
    run.succeeds();
    assert!(words.iter().all(|words| run.stderr().contains(words)), "{}", run.stderr());
}

/// Damage, and what is said of it.
type Damage<'a> = (&'a dyn Fn(&str) -> Vec<u8>, &'a str);

#[test]
fn a_broken_list_is_one_sentence() {
    let swapped = |from: &'static str, to: &'static str| move |text: &str| text.replacen(from, to, 1).into_bytes();
    let longer = |text: &str| format!("{text}{} 800\n", "QUJD".repeat(1000)).into_bytes();
    let cases: &[Damage<'_>] = &[
        (&|_| Vec::new(), "the file is empty; fetch it again"),
        (&|_| b"\n\n\n".to_vec(), "without a token"),
        (&|_| vec![0xff; 5000], "line 1: not a token in base64 and its rank"),
        (&swapped("AQ== 1\n", "A?== 1\n"), "line 2: `A?==` is no base64"),
        (&swapped("AQ== 1\n", " 1\n"), "line 2: not a token in base64 and its rank"),
        (&swapped("AQ== 1\n", "AQ== -1\n"), "line 2: not a token in base64 and its rank"),
        (&swapped("AQ== 1\n", "AQ== 1 1\n"), "line 2: not a token in base64 and its rank"),
        (&swapped("AQ== 1\n", "AQ== 99999999999999999999\n"), "line 2: not a token in base64 and its rank"),
        (&swapped("AQ== 1\n", "AQ== 2\n"), "line 3: two tokens have the rank 2"),
        (&swapped("AQ== 1\n", "Ag== 1\n"), "line 3: ranks 1 and 2 are the same token"),
        (&swapped("AQ== 1\n", ""), "and there are 799 tokens, whose ranks count from 0"),
        (&longer, "has 3000 bytes, expected 1 to 1024"),
    ];
    let room = Room::new();
    let (model, _) = model(&room, "kimi");
    let good = std::fs::read_to_string(model.path("tiktoken.model")).unwrap();
    for (damage, words) in cases {
        std::fs::write(model.path("tiktoken.model"), damage(&good)).unwrap();
        room.run(["eval", "model", "--windows", "1", "--quiet"]).refuses(1, &["model/tiktoken.model: ", words]);
    }
    // More than is read.
    std::fs::File::create(model.path("tiktoken.model")).unwrap().set_len(300 << 20).unwrap();
    room.run(["eval", "model", "--windows", "1", "--quiet"])
        .refuses(1, &["model/tiktoken.model", "larger than 256 MiB"]);
    std::fs::write(model.path("tiktoken.model"), &good).unwrap();
    for (decoder, words) in [
        (json!({}), "names no special tokens behind the list's 800"),
        (json!({"900000": {"content": "x"}}), "gives `x` the id 900000, far beyond the list's 800 tokens"),
        (json!({"x": {"content": "x"}}), "an entry in added_tokens_decoder, `x`"),
    ] {
        change(&model, "tokenizer_config.json", |config| config["added_tokens_decoder"] = decoder);
        room.run(["eval", "model", "--windows", "1", "--quiet"]).refuses(1, &["model/tiktoken.model: ", words]);
    }
}

#[test]
fn a_broken_tekken_json_is_one_sentence() {
    type Alter = fn(&mut Value);
    let cases: &[(Alter, &str)] = &[
        (|json| *json = json!({}), "its config has no pattern"),
        (|json| *json = json!([]), "its config has no pattern"),
        (|json| json["config"]["pattern"] = "(".into(), "tekken.json"),
        (|json| json["vocab"] = json!({}), "it has no vocab"),
        (|json| json["vocab"][3]["token_bytes"] = "A?==".into(), "`A?==` is no base64"),
        (|json| json["vocab"][3]["token_bytes"] = Value::Null, "token 3 of its vocab has no token_bytes"),
        (|json| json["vocab"][3]["token_bytes"] = "AA==".into(), "ranks 0 and 3 are the same token"),
        (|json| json["vocab"][3]["rank"] = 4.into(), "token 3 of its vocab has the rank 4, expected 3"),
        (
            |json| drop(json["vocab"].as_array_mut().unwrap().remove(3)),
            "token 3 of its vocab has the rank 4, expected 3",
        ),
        (
            |json| json["config"]["default_vocab_size"] = 5000.into(),
            "default_vocab_size is 5000, and there are 20 special",
        ),
        (|json| json["config"]["default_vocab_size"] = 20.into(), "default_vocab_size is 20, and there are 20 special"),
        (
            |json| json["config"]["default_num_special_tokens"] = 4_000_000_000u64.into(),
            "expected a number up to 65536",
        ),
        (
            |json| json["config"]["default_num_special_tokens"] = 2.into(),
            "6 special tokens, and default_num_special_tokens is 2",
        ),
        (|json| json["special_tokens"] = Value::Null, "it has no special_tokens, and its version is `v11`"),
        (
            |json| json["special_tokens"][3]["rank"] = 9.into(),
            "`[INST]` has the rank 9, and those of 6 tokens have to count from 0",
        ),
        (|json| json["special_tokens"][3]["token_str"] = "<s>".into(), "two special tokens are `<s>`"),
    ];
    for (alter, words) in cases {
        let room = Room::new();
        let (model, _) = model(&room, "tekken");
        change(&model, "tekken.json", alter);
        room.run(["eval", "model", "--windows", "1", "--quiet"]).refuses(1, &["model/tekken.json: ", words]);
    }
}

/// Whatever was changed in a list, its tokenizer is refused in one sentence or can be used.
#[test]
fn damage_is_found_before_any_text_is_split() {
    for (name, list) in [("kimi", "tiktoken.model"), ("tekken", "tekken.json")] {
        let room = Room::new();
        let (model, _) = model(&room, name);
        let good = std::fs::read(model.path(list)).unwrap();
        let source = Checkpoint::open(&room.path("model")).unwrap();
        let mut usable = 0;
        for bytes in damaged(&good, 120) {
            std::fs::write(model.path(list), &bytes).unwrap();
            match source.tokenizer() {
                Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
                Ok(files) => {
                    usable += 1;
                    for text in ["", " a  b\tcafé\n", "\u{10ffff}\u{0}\u{1}…"] {
                        drop(files.as_ref().unwrap().tokenizer.encode(text, true));
                    }
                }
            }
        }
        assert!(usable > 0 && usable < 120, "{name}: {usable}");
    }
}

/// The built-in model with vocab.json and merges.txt (`tests/fixtures/make_halves.py`) instead of its own tokenizer.
fn halves(room: &Room, model_type: &str, config: &Value) -> Model {
    let model = room.model();
    std::fs::remove_file(model.path("tokenizer.json")).unwrap();
    for name in ["vocab.json", "merges.txt"] {
        std::fs::copy(fixtures().with_file_name("halves").join(name), model.path(name)).unwrap();
    }
    room.file("model/tokenizer_config.json", config.to_string());
    model.config(|config| config["model_type"] = model_type.into());
    model
}

#[test]
fn a_vocabulary_and_its_merges_are_what_the_class_makes_of_them() {
    let golden = std::fs::read(fixtures().with_file_name("halves").join("golden.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let room = Room::new();
        halves(&room, case["model_type"].as_str().unwrap(), &case["config"]);
        let files = Checkpoint::open(&room.path("model")).unwrap().tokenizer().unwrap().unwrap();
        for (text, expected) in golden["texts"].as_array().unwrap().iter().zip(case["ids"].as_array().unwrap()) {
            let found = files.tokenizer.encode(text.as_str().unwrap(), true).unwrap();
            assert_eq!(found, ids(expected), "{}, {text}", case["config"]);
        }
    }
}

#[test]
fn a_broken_half_is_one_sentence() {
    let room = Room::new();
    let model = halves(&room, "llama", &json!({"tokenizer_class": "GPT2Tokenizer"}));
    room.run(["eval", "model", "--windows", "1", "--quiet"]).succeeds();
    for (file, content, words) in [
        ("merges.txt", "#version: 0.2\na b\na\n", "merges.txt: line 3: not two tokens that are joined"),
        ("merges.txt", "a \u{144}\n", "vocab.json"),
        ("vocab.json", "[]", "vocab.json: it is no vocabulary"),
        ("vocab.json", "{\"a\": -1}", "vocab.json: token `a` has no id"),
    ] {
        let good = std::fs::read(model.path(file)).unwrap();
        std::fs::write(model.path(file), content).unwrap();
        room.run(["eval", "model", "--windows", "1", "--quiet"]).refuses(1, &["model/", words]);
        std::fs::write(model.path(file), good).unwrap();
    }
}
