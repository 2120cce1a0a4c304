//! Tokenizers whose tokens and names stand in several files (`tests/fixtures/make_tokenizers.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use formats::container::gguf::MetadataValue;
use quantc::Checkpoint;
use quantc::dialect::tokenizer::tokenizer as written;
use serde_json::{Value, json};

use crate::harness::Room;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join("tokenizers.json")).unwrap()).unwrap()
}

/// Puts the tokenizer of a case into the folder `model` of the room.
fn place(room: &Room, golden: &Value, case: &Value) {
    let base = case["base"].as_str().unwrap();
    if case["added"].is_null() {
        std::fs::copy(fixtures().join(base).join("tokenizer.model"), room.path("model/tokenizer.model")).unwrap();
    } else {
        let mut json = golden["bases"][base].clone();
        json["added_tokens"] = case["added"].clone();
        room.file("model/tokenizer.json", json.to_string());
    }
    for (name, content) in case["files"].as_object().unwrap() {
        room.file(&format!("model/{name}"), content.to_string());
    }
}

/// A tiny model with the tokenizer of a case.
fn opened(room: &Room, golden: &Value, case: &Value) -> Checkpoint {
    let tiny = fixtures().join("checkpoints/llama_tied");
    let weights = std::fs::read(tiny.join("model.safetensors")).unwrap();
    room.file("model/model.safetensors", weights);
    let mut config: Value = serde_json::from_slice(&std::fs::read(tiny.join("config.json")).unwrap()).unwrap();
    let config = config.as_object_mut().unwrap();
    config.insert("vocab_size".into(), case["rows"].clone());
    config.retain(|key, _| !key.ends_with("_token_id"));
    room.file("model/config.json", json!(config).to_string());
    place(room, golden, case);
    Checkpoint::open(&room.path("model")).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn ids_and_special_tokens_are_those_of_transformers() {
    let golden = golden();
    let mut wrong = Vec::new();
    for (name, case) in golden["cases"].as_object().unwrap() {
        let room = Room::new();
        let files = opened(&room, &golden, case).tokenizer().unwrap().unwrap();
        let texts = case.get("texts").unwrap_or(&golden["texts"]);
        for (place, text) in texts.as_array().unwrap().iter().enumerate() {
            for (key, special) in [("ids", false), ("marked", true)] {
                let found = files.tokenizer.encode(text.as_str().unwrap(), special).unwrap();
                let mut expected = ids(&case[key][place]);
                // Where transformers 5 alone forgets BOS, it stays, with a note.
                if name == "no config" && special {
                    expected.insert(0, 2);
                }
                if found != expected {
                    wrong.push(format!("{name}, {key} of {text}:\n  {found:?}\n  {expected:?}"));
                }
            }
        }
        let added = files.json["added_tokens"].as_array().unwrap().iter();
        let mut added: Vec<Value> = added.map(|t| json!([t["id"], t["content"], t["special"]])).collect();
        added.sort_by_key(|token| token[0].as_u64());
        if json!(added) != case["tokens"] {
            wrong.push(format!("{name}: {}\n  {}", json!(added), case["tokens"]));
        }
        for (key, id) in case["special"].as_object().unwrap() {
            let short = key.strip_suffix("_token").unwrap();
            // The class of a tokenizer.model names the unknown token by itself.
            if !["bos", "eos", "sep", "pad"].contains(&short) {
                continue;
            }
            let found = files.special(short).and_then(|(_, text)| files.tokenizer.token_to_id(text));
            if found.map(Value::from).as_ref() != Some(id) {
                wrong.push(format!("{name}: {key} is {found:?}, expected {id}"));
            }
        }
        let eos = case["special"]["eos_token"].as_u64().map(|id| id as u32);
        assert!(eos.is_none() || files.tokenizer.eos() == eos, "{name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a GGUF file says, without `tokenizer.ggml.`.
fn keys(metadata: &[(String, MetadataValue)]) -> BTreeMap<&str, &MetadataValue> {
    metadata.iter().filter_map(|(key, value)| Some((key.strip_prefix("tokenizer.ggml.")?, value))).collect()
}

fn list(value: &MetadataValue) -> Vec<MetadataValue> {
    let MetadataValue::Array(array) = value else { panic!("no array") };
    array.iter().cloned().collect()
}

#[test]
fn gguf_files_hold_every_token_that_has_a_row() {
    let golden = golden();
    for (name, case) in golden["cases"].as_object().unwrap() {
        let room = Room::new();
        let source = opened(&room, &golden, case);
        let rows = case["rows"].as_u64().unwrap() as usize;
        let out = match written(&source, rows, None) {
            Ok(out) => out,
            // Trained without byte_fallback, and read as BPE.
            Err(error) => {
                let base = case["base"].as_str().unwrap().trim_start_matches("sentencepiece/");
                assert!(base == "rules" || base == "unigram" && name.contains("class"), "{name}: {error}");
                assert!(error.to_string().contains("of the 256 bytes"), "{name}: {error}");
                continue;
            }
        };
        let keys = keys(&out.metadata);
        let (tokens, types) = (list(keys["tokens"]), list(keys["token_type"]));
        assert_eq!((tokens.len(), types.len()), (rows, rows), "{name}");
        let row = |id: usize| json!([tokens[id].as_str().unwrap(), types[id].as_i64().unwrap()]);
        if case["base"] == "byte_level" {
            let found: Vec<Value> = (300..rows).map(row).collect();
            assert_eq!(json!(found), case["gguf"], "{name}");
        }
        let mut left_out = Vec::new();
        for token in case["tokens"].as_array().unwrap() {
            let (id, text) = (token[0].as_u64().unwrap() as usize, token[1].as_str().unwrap());
            match (id < rows, id) {
                (false, _) => left_out.push(text),
                // Unknown or control, as the vocabulary says itself.
                (true, id) if text == "<unk>" => assert!([2, 3].contains(&types[id].as_i64().unwrap()), "{name}"),
                (true, _) => {
                    let control = token[2] == true || text.starts_with("<|");
                    // What merges make is spelt as they have it.
                    assert_eq!(row(id), json!([text, if control { 3 } else { 4 }]), "{name}");
                }
            }
        }
        let told: Vec<&String> = out.notices.iter().filter(|notice| notice.contains("left out of the file")).collect();
        assert_eq!(told.len(), usize::from(!left_out.is_empty()), "{name}: {:?}", out.notices);
        if let [first, ..] = &left_out[..] {
            assert!(told[0].contains(&format!("{rows} rows")) && told[0].contains(&format!("`{first}`")), "{told:?}");
        }
        for (key, short) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("padding_token_id", "pad")] {
            let expected = case["special"][format!("{short}_token")].as_u64();
            let found = keys.get(key).and_then(|value| value.as_u64());
            // That a tokenizer.model has a token for padding is nothing to the class.
            if short == "pad" && name == "class, gemma" || name == "no config" {
                continue;
            }
            assert_eq!(found, expected.filter(|id| (*id as usize) < rows), "{name}: {key}");
        }
    }
}

#[test]
fn files_that_do_not_agree_are_told() {
    let golden = golden();
    let told = |name: &str| {
        let room = Room::new();
        opened(&room, &golden, &golden["cases"][name]).tokenizer().unwrap().unwrap().notices
    };
    for name in ["decoder", "added_tokens", "agreeing", "twice", "model_added"] {
        assert_eq!(told(name), Vec::<String>::new(), "{name}");
    }
    let other = told("decoder_other_id");
    assert!(
        other[0].contains("give `<|im_start|>` the id 301, and it has 300 (tokenizer_config.json); so 1 others"),
        "{other:?}"
    );
    let taken = told("decoder_in_the_vocabulary");
    assert!(taken[0].contains("give `<tool>` the id 40, and it has 302 (tokenizer_config.json)"), "{taken:?}");
    let new = told("pieces_map");
    assert!(
        new.len() == 1 && new[0].contains("`<|im_end|>` (eos_token) is not in the vocabulary: it becomes token 380"),
        "{new:?}"
    );
    let differs = told("decoder_differs");
    assert_eq!(differs.len(), 2, "{differs:?}");
    assert!(
        differs[0].contains("give `<audio>` the id 304, and it has 302 (tokenizer_config.json); so 1 others"),
        "{differs:?}"
    );
    assert!(differs[1].contains("special_tokens_map.json names `</s>` and 3 other tokens"), "{differs:?}");
    let map = told("map_differs");
    assert!(map[0].contains("give `<image>` the id 309, and it has 302 (added_tokens.json)"), "{map:?}");
    let gaps = told("ids_with_gaps");
    assert!(gaps[0].contains("give `<|im_start|>` the id 305, and it has 300 (tokenizer.json)"), "{gaps:?}");
}

#[test]
fn entries_without_an_id_are_refused() {
    let golden = golden();
    for (file, content, words) in [
        ("added_tokens.json", json!({"hello": "x"}), "added_tokens.json has no id for `hello`"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"x": {}}}), "an entry in added_tokens_decoder, `x`"),
    ] {
        let room = Room::new();
        let source = opened(&room, &golden, &golden["cases"]["special_tokens_map"]);
        room.file(&format!("model/{file}"), content.to_string());
        let error = source.tokenizer().err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}

const QUICK: &[&str] = &["--method", "rtn", "--verify-text", "none", "--quiet"];

/// Through a GGUF file and back: every marker is one token all the way.
#[test]
fn markers_stay_whole_in_a_gguf_file_and_in_what_is_made_of_it() {
    let golden = golden();
    let case = &golden["cases"]["decoder"];
    let room = Room::new();
    let model = room.model();
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::remove_file(model.path(name)).ok();
    }
    model.config(|config| config["eos_token_id"] = json!(7));
    place(&room, &golden, case);
    room.file("model/generation_config.json", r#"{"eos_token_id": [300, 301]}"#);
    room.file("model/chat_template.json", r#"{"chat_template": "{{ messages }}"}"#);
    room.file("model/additional_chat_templates/tool_use.jinja", "{{ tools }}\r\n");
    room.run(["quantize", "model", "-o", "out.gguf", "--scheme", "Q8_0"].iter().chain(QUICK)).succeeds();
    room.run(["convert", "out.gguf", "-o", "back"]).succeeds();
    let text = golden["texts"][1].as_str().unwrap();
    for path in ["model", "out.gguf", "back"] {
        let files = Checkpoint::open(&room.path(path)).unwrap().tokenizer().unwrap().unwrap();
        assert_eq!(files.tokenizer.encode(text, false).unwrap(), ids(&case["ids"][1]), "{path}");
        assert_eq!(files.tokenizer.eos(), Some(301), "{path}");
        assert_eq!(files.templates.default.as_deref(), Some("{{ messages }}"), "{path}");
        assert_eq!(files.templates.others, [("tool_use".to_owned(), "{{ tools }}\n".to_owned())], "{path}");
    }
    let generation: Value =
        serde_json::from_slice(&std::fs::read(room.path("back/generation_config.json")).unwrap()).unwrap();
    assert_eq!(generation["eos_token_id"], json!([301, 300]));
    // Beside weights that are no GGUF file, files are copied as they are.
    room.run(["quantize", "model", "-o", "out"].iter().chain(QUICK)).succeeds();
    for name in ["tokenizer_config.json", "chat_template.json", "additional_chat_templates/tool_use.jinja"] {
        let read = |folder: &str| std::fs::read(room.path(folder).join(name)).unwrap();
        assert_eq!(read("out"), read("model"), "{name}");
    }
}

#[test]
fn chat_templates_are_found_in_the_order_of_transformers() {
    let golden = golden();
    let room = Room::new();
    let source = opened(&room, &golden, &golden["cases"]["special_tokens_map"]);
    let found = || {
        let templates = source.tokenizer().unwrap().unwrap().templates;
        let others: Vec<String> = templates.others.into_iter().map(|(name, text)| format!("{name}={text}")).collect();
        (templates.default.unwrap_or_default(), others.join(" "))
    };
    let is = |default: &str, others: &str| assert_eq!(found(), (default.to_owned(), others.to_owned()));
    is("", "");
    room.file("model/chat_template.json", r#"{"chat_template": "processor"}"#);
    is("processor", "");
    room.file("model/tokenizer_config.json", r#"{"chat_template": "config"}"#);
    is("config", "");
    let named = json!({"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]});
    room.file("model/tokenizer_config.json", named.to_string());
    is("D", "rag=R");
    // A folder of templates takes the place of the list, but for the one that it lacks.
    room.file("model/additional_chat_templates/tool_use.jinja", "T");
    room.file("model/additional_chat_templates/notes.txt", "N");
    is("D", "tool_use=T");
    room.file("model/chat_template.jinja", "J\r\n");
    is("J\n", "tool_use=T");
    room.file("model/chat_template.jinja", b"caf\xe9");
    let error = source.tokenizer().err().unwrap().to_string();
    assert!(error.contains("chat_template.jinja: not UTF-8 text: byte 3 "), "{error}");
}

#[test]
fn templates_have_the_tokens_that_a_model_names_itself() {
    let room = Room::new();
    let model = room.model();
    let path = model.path("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["extra_special_tokens"] = json!({"image_token": {"content": "<|image|>"}});
    config["chat_template"] = json!([
        {"name": "default", "template": "{{ image_token }} plain"},
        {"name": "tool_use", "template": "{{ image_token }} {{ tools|length }} tools"},
    ]);
    std::fs::write(&path, config.to_string()).unwrap();
    let _ = std::fs::remove_file(model.path("chat_template.jinja"));
    let files = Checkpoint::open(&model.path("")).unwrap().tokenizer().unwrap().unwrap();
    let chat = files.config().chat(&None).unwrap().unwrap();
    assert_eq!(chat.render(&[], &[]).unwrap(), "<|image|> plain");
    assert_eq!(chat.render(&[], &[json!({})]).unwrap(), "<|image|> 1 tools");
}
