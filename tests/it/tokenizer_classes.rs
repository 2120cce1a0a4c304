//! What transformers makes of a tokenizer by its class, its settings and the list of its files.

use std::path::Path;

use quantc::Checkpoint;
use serde_json::{Value, json};

use crate::harness::{Model, Room};

fn json_at(model: &Model, name: &str) -> Value {
    std::fs::read(model.path(name)).map_or(json!({}), |bytes| serde_json::from_slice(&bytes).unwrap())
}

/// What is told of the room's model with this tokenizer_config.json.
fn notes(room: &Room, config: &Value) -> Vec<String> {
    room.file("model/tokenizer_config.json", config.to_string());
    Checkpoint::open(&room.path("model")).unwrap().tokenizer_notes()
}

#[test]
fn settings_by_which_a_class_reads_otherwise_are_told() {
    let room = Room::new();
    let model = room.model();
    let mut json = json_at(&model, "tokenizer.json");
    json["normalizer"] = Value::Null;
    json["pre_tokenizer"] =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    room.file("model/tokenizer.json", json.to_string());
    let mut config = json_at(&model, "tokenizer_config.json");
    config["tokenizer_class"] = "GPT2Tokenizer".into();
    assert_eq!(notes(&room, &config), Vec::<String>::new());
    config["add_prefix_space"] = true.into();
    let found = notes(&room, &config);
    let words = "as its class GPT2Tokenizer does with \"add_prefix_space\": true in tokenizer_config.json and not as this file says";
    assert!(found.len() == 1 && found[0].contains(words), "{found:?}");
    config["tokenizer_class"] = "RobertaTokenizer".into();
    config["add_prefix_space"] = false.into();
    let found = notes(&room, &config);
    assert!(found.len() == 1 && found[0].contains("puts `<s>` before texts and `</s>` behind them"), "{found:?}");
}

#[test]
fn the_tokenizer_of_the_version_is_read() {
    let room = Room::new();
    let model = room.model();
    let mut config = json_at(&model, "tokenizer_config.json");
    let ids = || {
        let files = Checkpoint::open(&room.path("model")).unwrap().tokenizer().unwrap().unwrap();
        files.tokenizer.encode("ONE text", false).unwrap()
    };
    let plain = ids();
    let mut json = json_at(&model, "tokenizer.json");
    json["normalizer"] = json!({"type": "Lowercase"});
    room.file("model/tokenizer.4.0.0.json", json.to_string());
    assert_eq!(ids(), plain);
    config["fast_tokenizer_files"] = json!(["tokenizer.4.0.0.json", "tokenizer.json"]);
    let found = notes(&room, &config);
    assert!(
        found.len() == 1
            && found[0].starts_with("tokenizer.4.0.0.json is read, as by transformers, and not tokenizer.json"),
        "{found:?}"
    );
    assert_ne!(ids(), plain);
    // What is wrong with it is told of it.
    room.file("model/tokenizer.4.0.0.json", r#"{"model": {"type": "None"}}"#);
    let broken = Checkpoint::open(&room.path("model")).unwrap().tokenizer().err().unwrap().to_string();
    assert!(broken.contains("model/tokenizer.4.0.0.json: "), "{broken}");
    std::fs::remove_file(model.path("tokenizer.4.0.0.json")).unwrap();
    let found = notes(&room, &config);
    assert!(found.len() == 1 && found[0].contains("there is no such file: tokenizer.json is read"), "{found:?}");
    assert_eq!(ids(), plain);
    config["fast_tokenizer_files"] = json!(["tokenizer.new.json"]);
    let found = notes(&room, &config);
    assert!(found.len() == 1 && found[0].contains("`tokenizer.new.json` of fast_tokenizer_files"), "{found:?}");
}

#[test]
fn classes_that_read_a_tokenizer_model_otherwise_are_told() {
    let room = Room::new();
    let model = room.model();
    std::fs::remove_file(model.path("tokenizer.json")).unwrap();
    let pieces = |base: &str| {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentencepiece").join(base);
        std::fs::copy(from.join("tokenizer.model"), model.path("tokenizer.model")).unwrap();
    };
    let config =
        |class: &str| json!({"tokenizer_class": class, "add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>"});
    pieces("llama");
    for (class, words) in [
        (
            "GemmaTokenizer",
            "normalizes and divides texts as its class GemmaTokenizer does and not as SentencePiece does",
        ),
        (
            "T5Tokenizer",
            "reads the vocabulary of a BPE model as Unigram and puts `</s>` behind texts and nothing before",
        ),
        ("MarianTokenizer", "by rules that are not known here as its class MarianTokenizer"),
    ] {
        let found = notes(&room, &config(class));
        let found: Vec<_> = found.iter().filter(|note| note.contains("transformers 5")).collect();
        assert!(found.len() == 1 && found[0].contains(words), "{class}: {found:?}");
    }
    // Gemma's own says the same.
    pieces("gemma");
    let told = |config: &Value| {
        notes(&room, config).into_iter().filter(|note| note.contains("transformers 5")).collect::<Vec<_>>()
    };
    assert_eq!(told(&config("GemmaTokenizer")), Vec::<String>::new());
    let without = told(&json!({"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}));
    assert!(without.len() == 1 && without[0].contains("has no add_bos_token"), "{without:?}");
}

#[test]
fn templates_of_which_none_is_the_default_are_told() {
    let room = Room::new();
    let model = room.model();
    let _ = std::fs::remove_file(model.path("chat_template.jinja"));
    let mut config = json_at(&model, "tokenizer_config.json");
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    config["chat_template"] =
        json!([{"name": "rag", "template": template}, {"name": "tool_use", "template": template}]);
    let found = notes(&room, &config);
    let words = "the model's chat templates are called `rag`, `tool_use` and none of them `default`";
    assert!(found.len() == 1 && found[0].contains(words), "{found:?}");
    let words = "The river runs through ten countries, from the forest to the sea, and its water is cold. ";
    let record = json!({"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": words}]});
    room.file("a.jsonl", format!("{record}\n{record}\n"));
    let run = room.run([
        "quantize",
        "model",
        "-o",
        "out",
        "--samples",
        "2",
        "--seq-len",
        "32",
        "--verify-text",
        "none",
        "--calibration",
        "a.jsonl",
    ]);
    run.succeeds();
    let said = run.stderr();
    assert!(
        said.contains(
            "2 conversations of a.jsonl were read as plain text, since the model's chat templates are called `rag`"
        ) && !said.contains("has no chat template"),
        "{said}"
    );
}
