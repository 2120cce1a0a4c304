//! Token ids and rendered conversations against transformers' own; `tests/fixtures/make_text_golden.py` makes the values, and
//! `make_record_golden.py` those of records as they lie in data sets.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::record::{self, message};
use super::{ChatTemplate, Document, Message, Tokenizer, sha256_ids};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/text")
}

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join("golden.json")).unwrap()).unwrap()
}

/// The folder of texts and models too large for the repository, where there is one.
fn shared() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let found = std::env::var_os("QUANTC_SHARED").map_or(beside, PathBuf::from);
    found.is_dir().then_some(found)
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn ids_are_those_of_transformers() {
    let golden = golden();
    let (mut short, mut whole) = (0, 0);
    for (name, expected) in golden["tokens"].as_object().unwrap() {
        let path = match (name.as_str(), shared()) {
            ("smollm2-135m", Some(shared)) => shared.join("models/smollm2-135m/tokenizer.json"),
            ("smollm2-135m", None) => {
                eprintln!("SKIPPED: no shared folder, {name} is not compared");
                continue;
            }
            _ => fixtures().join(format!("{name}.json")),
        };
        let tokenizer = Tokenizer::from_json(&std::fs::read(path).unwrap()).unwrap();
        for case in expected["short"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]), "{name}: {text:?}");
            short += 1;
        }
        for case in expected["whole"].as_array().unwrap() {
            let file = case["file"].as_str().unwrap();
            let path = if file == "sample.txt" {
                fixtures().join(file)
            } else if let Some(shared) = shared() {
                shared.join("data").join(file)
            } else {
                eprintln!("SKIPPED: no shared folder, {file} is not compared");
                continue;
            };
            let text = std::fs::read_to_string(path).unwrap();
            let started = std::time::Instant::now();
            let found = tokenizer.encode(&text, true).unwrap();
            eprintln!("{name}: {file}: {} tokens in {:.2} s", found.len(), started.elapsed().as_secs_f64());
            assert_eq!(found.len() as u64, case["tokens"].as_u64().unwrap(), "{name}: {file}");
            assert_eq!(found[..16], ids(&case["first"]), "{name}: {file}");
            assert_eq!(sha256_ids(&[found]), case["ids_sha256"].as_str().unwrap(), "{name}: {file}");
            whole += 1;
        }
    }
    assert!(short >= 24 && whole >= 2, "{short} short and {whole} long texts were compared");
}

/// Holds what templates make of conversations to `cases`, each of which names its template and, under `what`, its conversation.
fn compare(golden: &Value, cases: &str, what: &str, conversation: impl Fn(&str) -> (Vec<Message>, Vec<Value>)) {
    let mut differing = Vec::new();
    let cases = golden[cases].as_array().unwrap();
    assert!(cases.len() >= 50 && cases.iter().any(|case| case.get("refused").is_some()));
    for case in cases {
        let (template, name) = (case["template"].as_str().unwrap(), case[what].as_str().unwrap());
        let (source, token) =
            (&golden["templates"][template], |name: &str| golden["templates"][template][name].as_str());
        let chat =
            ChatTemplate::new("t.jinja", source["source"].as_str().unwrap(), token("bos"), token("eos")).unwrap();
        let (messages, tools) = conversation(name);
        let found = chat.render(&messages, &tools);
        let same = match (&found, case.get("rendered"), case.get("refused")) {
            (Ok(found), Some(expected), _) => found == expected.as_str().unwrap(),
            // What a template itself says is the same; what Jinja says of a missing field is not.
            (Err(error), _, Some(expected)) => {
                let expected = expected.as_str().unwrap();
                error.to_string().contains(expected) || expected.contains("has no attribute")
            }
            _ => false,
        };
        if !same {
            let found = found.unwrap_or_else(|e| format!("error: {e}"));
            let expected = case.get("rendered").or(case.get("refused")).unwrap().as_str().unwrap();
            let at = found.bytes().zip(expected.bytes()).take_while(|(a, b)| a == b).count();
            let from = |text: &str| {
                String::from_utf8_lossy(&text.as_bytes()[at.saturating_sub(30)..]).chars().take(120).collect::<String>()
            };
            differing.push(format!("{template}, {name}: found {:?}, expected {:?}", from(&found), from(expected)));
        }
    }
    assert!(differing.is_empty(), "{} of {} differ:\n{}", differing.len(), cases.len(), differing.join("\n"));
}

#[test]
fn conversations_are_rendered_as_by_transformers() {
    let golden = golden();
    let conversation = |name: &str| {
        let turns = golden["conversations"][name].as_array().unwrap();
        (turns.iter().map(|turn| message(turn).unwrap().0).collect(), Vec::new())
    };
    compare(&golden, "chats", "conversation", conversation);
}

#[test]
fn records_are_rendered_as_by_transformers() {
    let golden: Value = serde_json::from_slice(&std::fs::read(fixtures().join("records.json")).unwrap()).unwrap();
    let conversation = |name: &str| match record::read(&golden["records"][name]).unwrap().document {
        Document::Chat { messages, tools } => (messages, tools),
        Document::Pair { prompt, completion } => {
            (vec![Message::new("user", prompt), Message::new("assistant", completion)], Vec::new())
        }
        Document::Plain(text) => panic!("{name} is read as {text:?}"),
    };
    compare(&golden, "cases", "record", conversation);
}

#[test]
fn damaged_tokenizer_files_are_errors_not_panics() {
    let whole = std::fs::read(fixtures().join("sentencepiece_like.json")).unwrap();
    let mut refused = 0;
    let mut state = 1u32;
    let mut random = |bound: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % bound
    };
    // The head of the file holds everything but the vocabulary and its merges.
    for round in 0..600 {
        let mut bytes = whole.clone();
        match round % 3 {
            0 => bytes.truncate(random(whole.len())),
            1 => bytes[random(2000)] = b"0{}[],:\"\\a9"[random(11)],
            _ => drop(bytes.drain(random(2000)..2000 + random(2000))),
        }
        match Tokenizer::from_json(&bytes) {
            Ok(tokenizer) => drop(tokenizer.encode("some text \u{1f642} <s>", true)),
            Err(error) => {
                assert!(error.to_string().starts_with("tokenizer.json: ") && !error.to_string().contains('\n'));
                refused += 1;
            }
        }
    }
    assert!(refused > 300, "{refused} of 600 were refused");
}
