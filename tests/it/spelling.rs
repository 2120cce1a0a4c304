//! Configurations that say a thing twice, in an old spelling, or as Python alone writes it (`tests/fixtures/make_spellings.py`).

use std::collections::BTreeMap;
use std::path::Path;

use formats::GgufFile;
use quantc::job::Job;
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request};
use quantc::{Checkpoint, families};
use serde_json::Value;
use tempfile::TempDir;

use crate::families::checkpoint;
use crate::gguf_families::{spell, write};
use crate::golden::{golden, logits};
use crate::harness::Room;

/// A change of a committed checkpoint's config.json, and what comes of it.
#[derive(serde::Deserialize)]
struct Case {
    base: String,
    config: Vec<Vec<Value>>,
    logits: Option<Vec<f32>>,
    refused: Option<String>,
    note: Option<String>,
}

fn cases() -> BTreeMap<String, Case> {
    serde_json::from_slice(&std::fs::read("tests/fixtures/spellings.json").unwrap()).unwrap()
}

/// Sets `path`, as `/text_config/head_dim`, or removes what is there.
fn change(config: &mut Value, path: &str, value: Option<&Value>) {
    let (outer, key) = path.rsplit_once('/').unwrap();
    let place = config.pointer_mut(outer).unwrap().as_object_mut().unwrap();
    match value {
        Some(value) => drop(place.insert(key.to_owned(), value.clone())),
        None => drop(place.shift_remove(key)),
    }
}

fn rewrite(room: &TempDir, edit: impl FnOnce(&str) -> String) {
    let path = room.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(path, edit(&text)).unwrap();
}

fn notes(folder: &Path) -> Vec<String> {
    let notes = Checkpoint::open(folder).unwrap().notices();
    let of_config = |note: &String| note.starts_with("config.json") || note.contains("tie_word_embeddings is");
    notes.into_iter().filter(of_config).collect()
}

fn wrong(case: &Case) -> Option<String> {
    let room = made(case);
    let (sequences, whole) = golden(&Path::new("tests/fixtures/families").join(&case.base));
    let found = match (logits(room.path(), &sequences), &case.refused) {
        (Err(error), Some(word)) if error.to_string().contains(word.as_str()) => return None,
        (Err(error), _) => return Some(format!("refused: {error}")),
        (Ok(_), Some(word)) => return Some(format!("not refused with `{word}`")),
        (Ok(found), None) => found,
    };
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let vocabulary = whole.len() / tokens;
    let last = found.chunks(found.len() / sequences.len()).flat_map(|text| text[text.len() - vocabulary..].iter());
    let kept: Vec<f32> =
        last.enumerate().filter(|(i, _)| (i % vocabulary).is_multiple_of(8)).map(|(_, x)| *x).collect();
    let expected = case.logits.as_ref().unwrap();
    assert_eq!(kept.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let worst = kept.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Written so that a NaN is a difference.
    let close = worst <= 2e-4 * largest;
    if !close {
        return Some(format!("logits are off by {worst}, the largest is {largest}"));
    }
    let notes = notes(room.path());
    match &case.note {
        Some(note) if !notes.iter().any(|found| found.contains(note)) => Some(format!("no note `{note}` in {notes:?}")),
        None if !notes.is_empty() => Some(format!("notes: {notes:?}")),
        _ => None,
    }
}

#[test]
fn every_spelling_is_read_as_transformers_reads_it() {
    let cases = cases();
    assert!(cases.len() >= 120, "the fixtures are there");
    let wrong: Vec<String> =
        cases.iter().filter_map(|(name, case)| wrong(case).map(|why| format!("{name}: {why}"))).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// The checkpoint of a case.
fn made(case: &Case) -> TempDir {
    let room = checkpoint(&case.base);
    rewrite(&room, |text| {
        let mut config: Value = serde_json::from_str(text).unwrap();
        for one in &case.config {
            change(&mut config, one[0].as_str().unwrap(), one.get(1));
        }
        config.to_string()
    });
    room
}

/// The settings of a GGUF file are those that the model was found to have, whichever spelling said so.
#[test]
fn a_gguf_says_what_the_model_was_found_to_be() {
    let cases = cases();
    let check = |name: &str, texts: &[(&str, Option<&str>)], numbers: &[(&str, Option<f64>)]| {
        let (room, outputs) = (made(&cases[name]), tempfile::tempdir().unwrap());
        spell(room.path());
        let output = outputs.path().join("model.gguf");
        let report = write(room.path(), &output, "method = 'rtn'\nscheme = 'F32'").unwrap();
        if let Some(note) = &cases[name].note {
            assert!(report.notes.iter().any(|found| found.contains(note)), "{name}: {:?}", report.notes);
        }
        let file = GgufFile::open(&output).unwrap();
        for (key, expected) in texts {
            assert_eq!(file.string(key).unwrap(), *expected, "{name} {key}");
        }
        for (key, expected) in numbers {
            let found = file.count(key).map(|n| n.map(|n| n as f64)).or_else(|_| file.float(key)).unwrap();
            assert_eq!(found, *expected, "{name} {key}");
        }
    };
    let scaling = ("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.freq_base");
    check("differ", &[(scaling.0, Some("linear"))], &[(scaling.1, Some(3.0)), (scaling.2, Some(500.0))]);
    check("old_wins_whole", &[(scaling.0, Some("linear"))], &[(scaling.1, Some(3.0)), (scaling.2, Some(10000.0))]);
    check("old_is_empty", &[(scaling.0, Some("linear"))], &[(scaling.1, Some(5.0)), (scaling.2, Some(500.0))]);
    check("neither", &[(scaling.0, None)], &[(scaling.1, None), (scaling.2, Some(10000.0))]);
    check("whole_share_only", &[], &[("llama.rope.dimension_count", Some(16.0))]);
    let neox = [("gptneox.rope.freq_base", Some(1000.0)), ("gptneox.rope.dimension_count", Some(8.0))];
    check("neox_inside", &[], &neox);
    let gemma = [("gemma3.rope.freq_base", Some(1e6)), ("gemma3.rope.freq_base_swa", Some(1e4))];
    check("gemma3_bases_absent", &[], &gemma);
    check("gemma3_old", &[("gemma3.rope.scaling.type", Some("linear"))], &[("gemma3.rope.scaling.factor", Some(8.0))]);
    let gpt2 = [("gpt2.context_length", Some(32.0)), ("gpt2.attention.head_count", Some(4.0))];
    check("gpt2_heads_differ", &[], &gpt2);
    check("mixtral_differ", &[], &[("llama.expert_count", Some(6.0)), ("llama.context_length", Some(64.0))]);
    check("float_context", &[], &[("llama.context_length", Some(4096.0)), ("llama.block_count", Some(2.0))]);
}

/// What only Python writes is read, and written as it was read.
#[test]
fn what_only_python_writes_goes_from_file_to_file() {
    let room = checkpoint("llama_rope_linear");
    spell(room.path());
    rewrite(&room, |text| {
        let extra = r#"{"max_position_embeddings": 1, "time_step_limit": [0.0, Infinity], "low": -Infinity, "none": NaN,
            "tagged": {"__float__": "Infinity"}, "large": 1000000000000000019884624838656, "half": "\ud800", "real": 8.0, "#;
        text.replacen('{', extra, 1)
    });
    let tokenizer_config = r#"{"model_max_length": 1000000000000000019884624838656, "other": Infinity}"#;
    std::fs::write(room.path().join("tokenizer_config.json"), tokenizer_config).unwrap();
    let outputs = tempfile::tempdir().unwrap();
    let output = outputs.path().join("out");
    let request: Request = toml::from_str("method = 'rtn'\ngroup_size = 32").unwrap();
    let recipe = Recipe::resolve(request).unwrap();
    let model = room.path();
    let job = Job::one(model, &output, recipe, None, false);
    job.run_one(&kernels::Cpu::exact(), &mut Progress::new(true)).unwrap();
    let config = std::fs::read_to_string(output.join("config.json")).unwrap();
    for line in [
        "\"time_step_limit\": [\n    0.0,\n    Infinity\n  ],",
        "\"low\": -Infinity,",
        "\"none\": NaN,",
        "\"tagged\": {\n    \"__float__\": \"Infinity\"\n  },",
        "\"large\": 1000000000000000019884624838656,",
        "\"half\": \"\\ud800\",",
        "\"real\": 8.0,",
        // The last of two counts.
        "\"max_position_embeddings\": 64,",
    ] {
        assert!(config.contains(line), "{line} in {config}");
    }
    assert_eq!(std::fs::read_to_string(output.join("tokenizer_config.json")).unwrap(), tokenizer_config);
    // What was written is read again.
    let again = Checkpoint::open(&output).unwrap();
    assert_eq!(families::longest_context(again.config()).unwrap(), Some(64));
}

#[test]
fn numbers_that_are_none_are_refused_in_a_sentence() {
    let check = |setting: &str, value: &str, words: &[&str]| {
        let room = Room::new();
        let path = room.model().path("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        // The last of two counts.
        let end = text.rfind('}').unwrap();
        std::fs::write(&path, format!("{}, \"{setting}\": {value}}}", text[..end].trim_end())).unwrap();
        let recipe = ["quantize", "model", "-o", "out", "--method", "rtn", "--verify-text", "none"];
        room.run(recipe).refuses(1, &[&["model/config.json"], words].concat());
    };
    check("hidden_size", "Infinity", &["hidden_size must be", "found Infinity"]);
    check("num_hidden_layers", "1000000000000000019884624838656", &["at most", "1000000000000000019884624838656"]);
    check("rms_norm_eps", "NaN", &["rms_norm_eps must be a positive number, found NaN"]);
    check("num_attention_heads", "8.5", &["without a fraction, found 8.5"]);
    check("rms_norm_eps", "\"1e-5\"", &["found \"1e-5\"; write it without quotes"]);
    check("max_position_embeddings", "4096 // tokens", &["not valid JSON"]);
}

#[test]
fn a_byte_order_mark_is_named() {
    let room = Room::new();
    let path = room.model().path("config.json");
    let text = std::fs::read(&path).unwrap();
    std::fs::write(&path, [b"\xEF\xBB\xBF", &text[..]].concat()).unwrap();
    room.run(["inspect", "model"]).refuses(1, &["model/config.json", "byte order mark", "UTF-8 without one"]);
}

/// Of a model that also sees, ids of tokens stand beside its text's settings or among them.
#[test]
fn settings_of_a_wrapper_and_of_its_text_are_one() {
    let mut config = serde_json::json!({
        "model_type": "llava", "eos_token_id": [2, 5], "hidden_size": 8,
        "text_config": {"vocab_size": 32064, "eos_token_id": 7, "bos_token_id": 1},
    });
    let found = families::settings(&config).unwrap();
    assert_eq!(found.model_type, "llama");
    let of = |key: &str| found.values[key].clone();
    assert_eq!((of("eos_token_id"), of("bos_token_id")), (serde_json::json!([2, 5]), serde_json::json!(1)));
    // What a published wrapper leaves out is its text's usual size.
    assert_eq!((of("hidden_size"), of("num_hidden_layers")), (serde_json::json!(4096), serde_json::json!(32)));
    assert!(found.notes.iter().any(|note| note.contains("does not say hidden_size, intermediate_size")));
    assert_eq!(families::vocabulary(&config).unwrap(), Some(32064));
    config["text_config"]["vocab_size"] = "32064".into();
    let error = families::vocabulary(&config).unwrap_err().to_string();
    assert!(
        error.contains("vocab_size must be a positive number, found \"32064\"; write it without quotes"),
        "{error}"
    );
}
