//! What every command that writes a model tells of its tokenizer, chat templates and the files beside them.

use std::path::Path;

use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};
use quantc::Checkpoint;
use serde_json::{Value, json};

use crate::adapter::{adapter, borrowed, product};
use crate::gguf_inputs::changed;
use crate::harness::{Model, Room};

const QUICK: &[&str] = &["--method", "rtn", "--verify-text", "none"];

/// Changes a JSON file of a model, or makes it.
fn change(model: &Model, name: &str, change: impl FnOnce(&mut Value)) {
    let path = model.path(name);
    let mut json = std::fs::read(&path).map_or(json!({}), |bytes| serde_json::from_slice(&bytes).unwrap());
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// What is told of the tokenizer of the room's model.
fn notes(room: &Room) -> Vec<String> {
    Checkpoint::open(&room.path("model")).unwrap().tokenizer_notes()
}

/// What each command that writes a model tells, by what it wrote.
fn told(room: &Room) -> Vec<(&'static str, String)> {
    let product = product("model.layers.0.self_attn.q_proj", 2, [256, 256]);
    std::fs::create_dir_all(room.path("adapter")).unwrap();
    adapter(&room.path("adapter"), &json!({"r": 2, "lora_alpha": 2}), &borrowed(&product));
    let commands: [(&str, &[&str]); 4] = [
        ("out", &["quantize", "model", "-o", "out"]),
        ("out.gguf", &["quantize", "model", "-o", "out.gguf", "--scheme", "Q8_0"]),
        ("plain", &["convert", "model", "-o", "plain"]),
        ("merged", &["merge", "model", "--adapter", "adapter", "-o", "merged"]),
    ];
    commands
        .into_iter()
        .map(|(output, words)| {
            let quick = if words[0] == "quantize" { QUICK } else { &[] };
            let run = room.run(words.iter().chain(quick));
            if output != "out.gguf" || room.path("model/tokenizer.json").exists() {
                run.succeeds();
            }
            (output, run.stderr() + &run.stdout())
        })
        .collect()
}

#[test]
fn a_template_that_cannot_be_parsed_is_told_by_every_command() {
    let room = Room::new();
    room.model();
    assert_eq!(notes(&room), Vec::<String>::new());
    room.file("model/chat_template.jinja", "{% for m in messages %}\n{{ m.content }}\n{% if %}\n");
    for (output, told) in told(&room) {
        for words in ["model/chat_template.jinja: the template cannot be parsed", "line 3"] {
            assert!(told.contains(words), "{output}: {told}");
        }
        assert_eq!(told.matches("cannot be parsed").count(), 1, "{output}: {told}");
    }
    // Wherever it stands, and the others too.
    std::fs::remove_file(room.path("model/chat_template.jinja")).unwrap();
    room.file("model/additional_chat_templates/tool_use.jinja", "{{ tools");
    let found = notes(&room);
    assert!(
        found.len() == 1
            && found[0].contains("additional_chat_templates/tool_use.jinja: the template `tool_use` cannot be parsed"),
        "{found:?}"
    );
    std::fs::remove_file(room.path("model/additional_chat_templates/tool_use.jinja")).unwrap();
    room.file("model/chat_template.json", r#"{"chat_template": "{% endfor %}"}"#);
    assert!(notes(&room)[0].contains("model/chat_template.json: the template cannot be parsed"), "{:?}", notes(&room));
    room.run(["quantize", "model", "-o", "again.gguf", "--scheme", "Q8_0"].iter().chain(QUICK)).succeeds();
    let found = Checkpoint::open(&room.path("again.gguf")).unwrap().tokenizer_notes();
    assert!(found.len() == 1 && found[0].contains("again.gguf: the template cannot"), "{found:?}");
}

#[test]
fn a_template_that_no_conversation_gets_through_is_told() {
    let room = Room::new();
    room.model();
    for (template, words) in [
        ("{{ raise_exception('tools only') }}", Some("refuses a conversation of one turn by the user: tools only")),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}",
            Some("it takes more than"),
        ),
        ("", Some("is empty")),
        ("{{ messages[0].nothing.more }}", Some("refuses a conversation of one turn")),
        (
            "{% for m in messages if m.role == 'human' %}{{ m.content }}{% endfor %}",
            Some("leaves out what the user says"),
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}", None),
    ] {
        room.file("model/chat_template.jinja", template);
        let found = notes(&room);
        assert_eq!(found.len(), usize::from(words.is_some()), "{template}: {found:?}");
        if let Some(words) = words {
            assert!(
                found[0].contains("model/chat_template.jinja: the template ") && found[0].contains(words),
                "{found:?}"
            );
        }
    }
}

#[test]
fn a_folder_without_a_tokenizer_is_told() {
    let room = Room::new();
    let model = room.model();
    std::fs::remove_file(model.path("tokenizer.json")).unwrap();
    let copy = "copy it from the model that this one was made from";
    let of = |files: &[&str]| {
        files.iter().for_each(|file| drop(room.file(&format!("model/{file}"), "{}")));
        let found = told(&room);
        assert!(!room.path("out.gguf").exists());
        for output in ["out", "plain", "merged"] {
            std::fs::remove_dir_all(room.path(output)).unwrap();
        }
        files.iter().for_each(|file| std::fs::remove_file(model.path(file)).unwrap());
        found
    };
    for (output, told) in of(&[]) {
        assert!(told.contains("no tokenizer.model") && told.contains(copy), "{output}: {told}");
    }
    // Half of one is none.
    assert!(of(&["vocab.json"]).iter().all(|(_, told)| told.contains(copy)));
    for files in [&["vocab.json", "merges.txt"][..], &["spiece.model"], &["sentencepiece.bpe.model"], &["vocab.txt"]] {
        for (output, told) in of(files) {
            let name = files[0];
            for words in [
                "no tokenizer.model",
                &format!("{name} is "),
                "T.from_pretrained(\"model\").save_pretrained(\"model\")",
            ] {
                assert!(told.contains(words), "{output}, {name}: {told}");
            }
            assert!(!told.contains(copy), "{output}, {name}: {told}");
            let loads = told.contains("of which transformers makes a tokenizer each time");
            assert_eq!(loads, output != "out.gguf", "{output}, {name}: {told}");
        }
    }
    // A list without the name of the code that reads it.
    change(&model, "tokenizer_config.json", |config| config["tokenizer_class"] = "OtherTokenizer".into());
    for (output, told) in of(&["other.tiktoken"]) {
        for words in
            ["other.tiktoken is a list of tokens for tiktoken, and only the model's own code", "TikTokenConverter"]
        {
            assert!(told.contains(words), "{output}: {told}");
        }
        assert!(!told.contains("save_pretrained") && !told.contains("each time"), "{output}: {told}");
    }
}

#[test]
fn what_no_name_of_a_pre_tokenizer_mends_is_not_said_to_be() {
    let lowercase = |json: &mut Value| json["normalizer"] = json!({"type": "Lowercase"});
    let spaces = |json: &mut Value| {
        let steps = json["pre_tokenizer"]["pretokenizers"].as_array_mut().unwrap();
        steps.iter_mut().for_each(|step| step["add_prefix_space"] = true.into());
    };
    for alter in [&lowercase as &dyn Fn(&mut Value), &spaces] {
        let room = Room::new();
        let model = room.model();
        change(&model, "tokenizer.json", alter);
        let words = ["quantize", "model", "-o", "out.gguf", "--scheme", "Q8_0"];
        let run = room.run(words.iter().chain(QUICK));
        run.succeeds();
        let told = run.stderr();
        for words in
            ["a sample text into other tokens than the original's: \"", "whatever --pre says", "another --format"]
        {
            assert_eq!(told.matches(words).count(), 1, "{told}");
        }
        assert!(!told.contains("another --pre"), "{told}");
        let words =
            ["quantize", "model", "-o", "b.gguf", "--scheme", "Q8_0", "--method", "rtn", "--verify-windows", "1"];
        room.run(words).refuses(1, &["b.gguf", "whatever --pre says", "another --format", "--verify-text none"]);
    }
}

#[test]
fn a_gguf_file_without_an_eos_stops_where_llama_cpp_does() {
    let without = |names: &[(usize, &str)]| {
        changed(|keys, _| {
            keys.retain(|(key, _)| !key.ends_with("_token_id"));
            let (_, value) = keys.iter_mut().find(|(key, _)| key == "tokenizer.ggml.tokens").unwrap();
            let MetadataValue::Array(tokens) = value else { panic!("a list") };
            let mut tokens: Vec<MetadataValue> = tokens.iter().cloned().collect();
            names.iter().for_each(|(id, text)| tokens[*id] = MetadataValue::String((*text).to_owned()));
            *value = metadata_array(tokens, GGUFValueType::String).unwrap();
            // None of the last pieces is part of another.
            let (_, value) = keys.iter_mut().find(|(key, _)| key == "tokenizer.ggml.merges").unwrap();
            let MetadataValue::Array(merges) = value else { panic!("a list") };
            *value = metadata_array(merges.iter().take(3000).cloned().collect(), GGUFValueType::String).unwrap();
        })
    };
    let converted = |room: &Room| {
        let run = room.run(["convert", "x.gguf", "-o", "out", "--force"]);
        run.succeeds();
        let read = |name: &str| -> Value {
            serde_json::from_slice(&std::fs::read(room.path("out").join(name)).unwrap()).unwrap()
        };
        let settings = [read("config.json"), read("generation_config.json")].map(|json| json["eos_token_id"].clone());
        (settings, read("tokenizer_config.json")["eos_token"].clone(), run.stderr())
    };
    let (ids, name, told) = converted(&without(&[(4095, "<|im_end|>")]));
    assert_eq!((ids, name), ([json!([4095, 0]), json!([4095, 0])], json!("<|im_end|>")));
    let words = "x.gguf: does not name its EOS (tokenizer.ggml.eos_token_id): it stops at `<|im_end|>` (4095) and `<|endoftext|>` (0)";
    assert!(told.contains(words), "{told}");
    let (ids, name, told) = converted(&without(&[]));
    assert_eq!((ids, name), ([json!(0), json!(0)], json!("<|endoftext|>")));
    assert!(told.contains("it stops at `<|endoftext|>` (0), as llama.cpp does"), "{told}");
    let (ids, name, told) = converted(&without(&[(0, "<nothing>")]));
    assert_eq!((ids, name), ([Value::Null, Value::Null], Value::Null));
    assert!(told.contains("no token looks like one, so that generation ends by its length alone"), "{told}");
    // Where the key is there, nothing is guessed.
    let room = changed(|_, _| ());
    let (ids, _, told) = converted(&room);
    assert_eq!((&ids[0], told.contains("EOS")), (&json!(0), false), "{told}");
}

#[test]
fn side_files_that_are_not_what_their_names_say_are_told_or_refused() {
    let convert = |room: &Room| room.run(["convert", "model", "-o", "out", "--force"]);
    for (name, content, words) in [
        ("generation_config.json", "{\"eos_token_id\": ", "generation_config.json: not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json: not a JSON object"),
        ("vocab.json", "{\"a\": 1", "vocab.json: not valid JSON"),
    ] {
        let room = Room::new();
        room.model();
        room.file(&format!("model/{name}"), content);
        let run = convert(&room);
        run.succeeds();
        assert!(run.stderr().contains(words) && run.stderr().contains("goes along as it is"), "{}", run.stderr());
        assert_eq!(std::fs::read(room.path("out").join(name)).unwrap(), content.as_bytes());
    }
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    for name in [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "added_tokens.json",
        "chat_template.json",
        "processor_config.json",
        "generation_config.json",
    ] {
        for (content, words) in [
            ("{\"a\": ", "not valid JSON"),
            ("[]", "not a JSON object"),
            (pointer, "git lfs pull"),
            ("<!DOCTYPE html>", "HTML page"),
        ] {
            if name == "generation_config.json" && !content.starts_with(['v', '<']) {
                continue;
            }
            let room = Room::new();
            room.model();
            room.file(&format!("model/{name}"), content);
            convert(&room).refuses(1, &[name, words, "fetch the file"]);
            assert!(!room.path("out").exists());
        }
    }
}

/// A setting of a GGUF file's tokenizer.
fn said(path: &Path, key: &str) -> Option<u64> {
    let file = formats::GgufFile::open(path).unwrap();
    file.metadata(&format!("tokenizer.ggml.{key}")).and_then(MetadataValue::as_u64)
}

#[test]
fn special_tokens_that_the_vocabulary_lacks_are_told() {
    let room = Room::new();
    let model = room.model();
    change(&model, "tokenizer_config.json", |config| config["eos_token"] = "<|stop|>".into());
    for (output, told) in told(&room) {
        for words in [
            "`<|stop|>` (eos_token) is not in the vocabulary: it becomes token 4096, as in transformers",
            "tokenizer_config.json: eos_token is `<|stop|>` (4096), and the embedding has 4096 rows",
        ] {
            assert_eq!(told.matches(words).count(), 1, "{output}: {told}");
        }
        let gguf = "eos_token is `<|stop|>` (4096), beyond the embedding's 4096 rows: the file has `<|endoftext|>` (0) of \
                    config.json in its place";
        assert_eq!(told.contains(gguf), output == "out.gguf", "{output}: {told}");
    }
    assert_eq!(said(&room.path("out.gguf"), "eos_token_id"), Some(0));
    // And where nothing else names one, none is written.
    model.config(|config| drop(config.as_object_mut().unwrap().remove("eos_token_id")));
    change(&model, "generation_config.json", |config| drop(config.as_object_mut().unwrap().remove("eos_token_id")));
    let run = room.run(["quantize", "model", "-o", "none.gguf", "--scheme", "Q8_0"].iter().chain(QUICK));
    run.succeeds();
    let told = run.stderr() + &run.stdout();
    assert!(told.contains("the file has no eos_token_id, and llama.cpp takes one by its own guess"), "{told}");
    assert_eq!(said(&room.path("none.gguf"), "eos_token_id"), None);
}

/// A special token as tokenizer.json has it.
fn mark(id: usize, text: &str) -> Value {
    json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
}

#[test]
fn settings_that_do_not_agree_where_to_stop_are_told() {
    let room = Room::new();
    let model = room.model();
    change(&model, "tokenizer.json", |json| {
        // In the place of two pieces that no merge needs.
        json["model"]["vocab"].as_object_mut().unwrap().retain(|_, id| id.as_u64().unwrap() < 4094);
        json["model"]["merges"].as_array_mut().unwrap().truncate(3000);
        json["added_tokens"].as_array_mut().unwrap().extend([mark(4094, "<|im_start|>"), mark(4095, "<|im_end|>")]);
    });
    let chat = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";
    room.file("model/chat_template.jinja", chat);
    let found = notes(&room);
    let words =
        "ends the assistant's turns with `<|im_end|>` (4095), and generation_config.json stops at `<|endoftext|>` (0)";
    assert!(found.len() == 1 && found[0].contains(words), "{found:?}");
    assert!(found[0].contains("in transformers, vLLM; add the id"), "{found:?}");
    // The tokenizer's EOS is asked by all but transformers.
    change(&model, "tokenizer_config.json", |config| config["eos_token"] = "<|im_end|>".into());
    let found = notes(&room);
    assert!(found.len() == 1 && found[0].contains("do not end by themselves in transformers; add"), "{found:?}");
    change(&model, "generation_config.json", |config| config["eos_token_id"] = json!([0, 4095]));
    assert_eq!(notes(&room), Vec::<String>::new());
    // Without a chat template.
    std::fs::remove_file(room.path("model/chat_template.jinja")).unwrap();
    std::fs::remove_file(room.path("model/generation_config.json")).unwrap();
    let found = notes(&room);
    let words = "tokenizer_config.json names `<|im_end|>` (4095) as EOS, and config.json stops at `<|endoftext|>` (0)";
    assert!(found.len() == 1 && found[0].contains(words), "{found:?}");
}

/// An id that the model has a row for, and the tokenizer no token.
#[test]
fn an_end_without_a_text_is_told_by_its_number() {
    let room = Room::new();
    let model = room.model();
    change(&model, "tokenizer.json", |json| {
        json["model"]["vocab"].as_object_mut().unwrap().retain(|_, id| id.as_u64().unwrap() < 4094);
        json["model"]["merges"].as_array_mut().unwrap().truncate(3000);
    });
    change(&model, "generation_config.json", |config| config["eos_token_id"] = 4094.into());
    let found = notes(&room);
    let words = "generation_config.json stops at 4094, which is no token of the tokenizer's: ";
    assert!(found.iter().any(|note| note.contains(words)), "{found:?}");
}

/// Two tokens behind every text, of which a GGUF file says one.
#[test]
fn other_tokens_around_texts_are_not_put_down_to_the_pre_tokenizer() {
    let room = Room::new();
    let model = room.model();
    change(&model, "tokenizer.json", |json| {
        let special = json!({"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]});
        let end = json!({"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}});
        json["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, end, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": special},
        });
    });
    let run =
        room.run(["quantize", "model", "-o", "m.gguf", "--scheme", "Q8_0", "--method", "rtn", "--verify-windows", "1"]);
    run.refuses(
        1,
        &[
            "into other tokens than the original's; llama.cpp puts one BOS before texts and one EOS behind them",
            "whatever --pre says",
        ],
    );
}

#[test]
fn settings_that_no_runtime_takes_are_told() {
    let told = |file: &str, key: &str, value: Value| {
        let room = Room::new();
        let model = room.model();
        change(&model, file, |config| config[key] = value);
        notes(&room).join("; ")
    };
    for (key, value, words) in [
        ("eos_token", json!(["a"]), "eos_token is `[\"a\"]`"),
        ("pad_token", json!(3), "pad_token is `3`"),
        ("chat_template", json!(5), "chat_template is `5`"),
        ("added_tokens_decoder", json!([1]), "added_tokens_decoder is `[1]`"),
        ("extra_special_tokens", json!([{"content": "x"}]), "a token of extra_special_tokens is `{\"content\":\"x\"}`"),
    ] {
        let found = told("tokenizer_config.json", key, value);
        assert!(found.contains(words) && found.contains("transformers loads no tokenizer with that"), "{found}");
    }
    for value in [json!("0"), json!(-1), json!([0, 4096]), json!([[0]]), json!(true)] {
        let found = told("generation_config.json", "eos_token_id", value);
        assert!(
            found.contains("generation_config.json: eos_token_id has ") && found.contains("never stops there"),
            "{found}"
        );
    }
    for value in [json!([]), Value::Null, json!([0]), json!(0.0)] {
        assert_eq!(told("generation_config.json", "eos_token_id", value), "");
    }
}

#[test]
fn added_tokens_that_a_gguf_file_does_not_find_are_told() {
    let room = Room::new();
    let model = room.model();
    let gguf = |name: &str| {
        let run = room.run(["quantize", "model", "-o", name, "--scheme", "Q8_0"].iter().chain(QUICK));
        run.succeeds();
        run.stderr() + &run.stdout()
    };
    let same = gguf("same.gguf");
    assert!(!same.contains("the written tokenizer") && !same.contains("tokenizer that was written"), "{same}");
    // A piece that is named special stays the piece that merges make.
    change(&model, "tokenizer_config.json", |config| config["pad_token"] = "Ġthe".into());
    assert!(!gguf("piece.gguf").contains("tokenizer that was written"));
    let [before, after] = ["model", "piece.gguf"].map(|path| {
        let files = Checkpoint::open(&room.path(path)).unwrap().tokenizer().unwrap().unwrap();
        files.tokenizer.encode("over the lazy dog", false).unwrap()
    });
    assert_eq!(before, after);
    // Another one in GPT-2's alphabet is written as it is read.
    change(&model, "tokenizer.json", |json| {
        json["model"]["vocab"].as_object_mut().unwrap().retain(|_, id| id.as_u64().unwrap() < 4095);
        json["model"]["merges"].as_array_mut().unwrap().truncate(3000);
        json["added_tokens"].as_array_mut().unwrap().push(mark(4095, "Ġzebra"));
    });
    let told = gguf("other.gguf");
    let words = "added tokens that the written tokenizer does not find as the original does: `Ġzebra` (4095) becomes [";
    assert!(told.contains(words), "{told}");
}

/// The room's model with a tokenizer.model alone, and these files beside it.
fn with_pieces(room: &Room, base: &str, files: &[(&str, Value)]) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentencepiece");
    let model = room.model();
    std::fs::remove_file(model.path("tokenizer.json")).unwrap();
    std::fs::remove_file(model.path("tokenizer_config.json")).unwrap();
    std::fs::copy(from.join(base).join("tokenizer.model"), model.path("tokenizer.model")).unwrap();
    for (name, content) in files {
        room.file(&format!("model/{name}"), content.to_string());
    }
}

#[test]
fn text_beside_added_tokens_that_a_gguf_file_splits_otherwise_is_told() {
    let room = Room::new();
    let config = json!({"tokenizer_class": "LlamaTokenizer", "legacy": true, "add_bos_token": true});
    with_pieces(
        &room,
        "llama_fine_tuned",
        &[("tokenizer_config.json", config), ("added_tokens.json", json!({"<new>": 600}))],
    );
    let run = room.run(["quantize", "model", "-o", "out.gguf", "--scheme", "Q8_0"].iter().chain(QUICK));
    run.succeeds();
    let told = run.stderr() + &run.stdout();
    // The space after the token gets another before it.
    let words = "text beside added tokens that the written tokenizer splits otherwise than the original: `of <unk> in` becomes [";
    assert!(told.contains(words), "{told}");
}

#[test]
fn a_plain_added_token_is_found_wherever_a_text_gets_a_space() {
    let room = Room::new();
    let config = json!({"legacy": true, "add_bos_token": true});
    with_pieces(
        &room,
        "llama_fine_tuned",
        &[("tokenizer_config.json", config), ("added_tokens.json", json!({"<new>": 600}))],
    );
    let files = Checkpoint::open(&room.path("model")).unwrap().tokenizer().unwrap().unwrap();
    let ids = files.tokenizer.encode("the cat <new>the cat", true).unwrap();
    assert_eq!(ids, [1, 264, 269, 273, 507, 600, 264, 269, 273]);
}

#[test]
fn what_transformers_alone_does_with_a_tokenizer_model_is_told() {
    let found = |base: &str, config: Option<Value>| {
        let room = Room::new();
        let files: Vec<_> = config.into_iter().map(|config| ("tokenizer_config.json", config)).collect();
        with_pieces(&room, base, &files);
        let files = Checkpoint::open(&room.path("model")).unwrap().tokenizer().unwrap().unwrap();
        (files.notices, files.tokenizer.prefix().to_vec())
    };
    let class = |more: Value| {
        let mut config = json!({"tokenizer_class": "LlamaTokenizer"});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Some(config)
    };
    for (base, config, bos, words) in [
        ("llama", None, 1, "without a space before texts and without BOS, as no file names a tokenizer_class"),
        ("gemma", None, 2, "without BOS, as no file names a tokenizer_class"),
        ("llama", class(json!({})), 1, "tokenizer_config.json has no add_bos_token"),
        ("unigram", class(json!({"add_bos_token": true})), 1, "is a unigram model, and the class LlamaTokenizer joins"),
        ("rules", class(json!({"add_bos_token": true})), 1, "does not apply tokenizer.model's normalization"),
        (
            "llama",
            class(
                json!({"add_bos_token": true, "added_tokens_decoder": {"705": {"content": "<x>"}, "3": {"content": "<y>"}}}),
            ),
            1,
            "give `<y>` the id 3, and transformers 5 gives it 700; so 1 others",
        ),
    ] {
        let (notes, prefix) = found(base, config);
        assert!(notes.iter().any(|note| note.contains(words)), "{base}: {notes:?}");
        assert_eq!(prefix, [bos], "{base}");
    }
    assert_eq!(found("llama", class(json!({"add_bos_token": true}))).0, Vec::<String>::new());
    assert_eq!(found("llama", class(json!({"add_bos_token": false}))), (Vec::new(), Vec::new()));
}
