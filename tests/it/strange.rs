//! Models as people have them: names of other classes, what was left beside codes, settings of sampling, code and tokenizers of their own.

use formats::container::gguf::MetadataValue;
use formats::{GgufFile, SafetensorsFile};
use serde_json::{Value, json};

use crate::adapter::{adapter, product};
use crate::families::checkpoint;
use crate::harness::{Model, Room, Run};

const RTN: [&str; 4] = ["--method", "rtn", "--verify-text", "none"];

fn quantize(room: &Room, more: &[&str]) -> Run {
    // The types of GGUF files have groups of their own.
    let groups: &[&str] = if more[1].ends_with(".gguf") { &[] } else { &["--group-size", "64"] };
    let run = room.run(["quantize", "model", "--force"].iter().chain(&RTN).chain(groups).chain(more));
    run.succeeds();
    run
}

fn json_of(room: &Room, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(room.path(name)).unwrap()).unwrap()
}

fn rename(model: &Model, from: &str, to: &str) {
    model.weights(|header, _| {
        *header = std::mem::take(header).into_iter().map(|(name, at)| (name.replacen(from, to, 1), at)).collect();
    });
}

/// `LlamaForQuestionAnswering` and its like call the model `transformer`, and nothing else is looked for.
#[test]
fn a_class_for_questions_has_the_names_that_it_looks_for() {
    let room = Room::new();
    let model = room.model();
    model.config(|config| config["architectures"] = json!(["LlamaForQuestionAnswering"]));
    let names = || {
        let file = SafetensorsFile::open(room.path("out/model.safetensors")).unwrap();
        file.tensors().map(|spec| spec.name.clone()).collect::<Vec<_>>()
    };
    // What a causal model was called becomes what the class calls it, with a note.
    let told = quantize(&room, &["-o", "out"]).stderr();
    assert!(told.contains("to `transformer."), "{told}");
    let renamed = names();
    rename(&model, "model.", "transformer.");
    let told = quantize(&room, &["-o", "out"]).stderr();
    assert!(!told.contains("were rewritten"), "{told}");
    assert_eq!(names(), renamed);
    assert!(renamed.iter().all(|name| name.starts_with("transformer.")), "{renamed:?}");
}

#[test]
fn a_plain_weight_beside_codes_is_left_out_with_a_note() {
    let room = Room::new();
    room.model();
    quantize(&room, &["-o", "coded", "--format", "gptq"]);
    let [original, coded] = ["model", "coded"].map(|name| Model::at(&room.path(name)));
    let name = "model.layers.0.mlp.up_proj.weight";
    let mut plain = Vec::new();
    original.weights(|header, data| {
        let [from, to] = [0, 1].map(|i| header[name]["data_offsets"][i].as_u64().unwrap() as usize);
        plain = data[from..to].to_vec();
    });
    coded.weights(|header, data| {
        let place = [data.len(), data.len() + plain.len()];
        header.insert(name.to_owned(), json!({"dtype": "BF16", "shape": [768, 256], "data_offsets": place}));
        data.extend(&plain);
    });
    let run = room.run(["convert", "coded", "-o", "out"]);
    run.succeeds();
    assert!(run.stderr().contains(name) && run.stderr().contains("beside the codes"), "{}", run.stderr());
}

/// Both ways between generation_config.json and llama.cpp's keys, and from file to file.
#[test]
fn how_a_model_is_best_sampled_goes_along() {
    let room = Room::new();
    let model = room.model();
    let path = model.path("generation_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in [("do_sample", json!(true)), ("temperature", json!(0.6)), ("top_k", json!(20))] {
        config[key] = value;
    }
    std::fs::write(&path, config.to_string()).unwrap();
    let keys = |name: &str| {
        let file = GgufFile::open(room.path(name)).unwrap();
        ["general.sampling.temp", "general.sampling.top_k", "general.author"].map(|key| file.metadata(key).cloned())
    };
    quantize(&room, &["-o", "m.gguf", "--scheme", "Q8_0"]);
    assert_eq!(keys("m.gguf"), [Some(MetadataValue::F32(0.6)), Some(MetadataValue::I32(20)), None]);
    crate::gguf_inputs::rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |keys, _| {
        keys.push(crate::gguf_inputs::key("general.author", MetadataValue::String("A. Nother".into())));
    });
    let again = room.run(["quantize", "x.gguf", "-o", "y.gguf", "--scheme", "Q4_0", "--verify-text", "none"]);
    again.succeeds();
    let author = Some(MetadataValue::String("A. Nother".into()));
    assert_eq!(keys("y.gguf"), [Some(MetadataValue::F32(0.6)), Some(MetadataValue::I32(20)), author]);
    room.run(["convert", "y.gguf", "-o", "back"]).succeeds();
    let back = json_of(&room, "back/generation_config.json");
    assert_eq!((&back["temperature"], &back["top_k"], &back["do_sample"]), (&json!(0.6), &json!(20), &json!(true)));
}

#[test]
fn code_and_words_of_its_own_are_told() {
    let room = Room::new();
    let model = room.model();
    let told = quantize(&room, &["-o", "out"]).stderr();
    assert!(!told.contains("auto_map"), "{told}");
    model.config(|config| config["auto_map"] = json!({"AutoModelForCausalLM": "modeling_my.MyForCausalLM"}));
    let told = quantize(&room, &["-o", "m.gguf", "--scheme", "Q8_0"]).stderr();
    assert!(told.contains("modeling_my.MyForCausalLM") && told.contains("is not run"), "{told}");

    let factors = product("base_model.model.model.layers.0.self_attn.q_proj.lora", 4, [256, 256]);
    let named = |name: &str| name.replace(".lora.lora_", ".lora_").replace(".lora.", ".");
    let factors: Vec<_> = factors.into_iter().map(|(name, shape, values)| (named(&name), shape, values)).collect();
    let factors: Vec<_> =
        factors.iter().map(|(name, shape, values)| (&name[..], shape.clone(), values.clone())).collect();
    adapter(&room.path("lora"), &json!({"target_modules": ["q_proj"]}), &factors);
    let merge = || {
        let run = room.run(["merge", "model", "--adapter", "lora", "-o", "merged", "--force"]);
        run.succeeds();
        run.stderr()
    };
    assert!(!merge().contains("files of its own"));
    // The same tokenizer says nothing, and another template does.
    std::fs::copy(model.path("tokenizer.json"), room.path("lora/tokenizer.json")).unwrap();
    assert!(!merge().contains("files of its own"));
    room.file("lora/chat_template.jinja", "{{ messages[0].content }} of the adapter");
    let told = merge();
    assert!(told.contains("chat_template.jinja") && !told.contains("tokenizer.json"), "{told}");
}

#[test]
fn settings_that_transformers_fails_on_are_told() {
    let told = |family: &str, change: fn(&mut Value)| {
        let (room, folder) = (Room::new(), checkpoint(family));
        let model = Model::at(folder.path());
        model.config(change);
        let run = room.run(["inspect", folder.path().to_str().unwrap(), "--program"]);
        run.succeeds();
        let planned = room.run([
            "plan",
            folder.path().to_str().unwrap(),
            "--method",
            "rtn",
            "--verify-text",
            "none",
            "--group-size",
            "32",
        ]);
        run.stderr() + &planned.stderr() + &planned.stdout()
    };
    let null = told("qwen2_plain", |config| {
        config.as_object_mut().unwrap().remove("rope_parameters");
        config["rope_theta"] = Value::Null;
    });
    assert!(null.contains("null for rope_theta"), "{null}");
    let stray = told("qwen2_plain", |config| config["text_config"] = json!({"hidden_size": 64}));
    assert!(stray.contains("has a text_config beside"), "{stray}");
    let headless = told("hunyuan_v1_dense_plain", |config| drop(config.as_object_mut().unwrap().remove("head_dim")));
    assert!(headless.contains("no head_dim"), "{headless}");
}

/// What stands in the place of a missing tensor is named with what to do, in place of the advice to download again what is there.
#[test]
fn fused_weights_that_no_runtime_reads_are_named() {
    let (room, folder) = (Room::new(), checkpoint("qwen2_plain"));
    rename(&Model::at(folder.path()), "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.qkv.weight");
    let args = ["quantize", folder.path().to_str().unwrap(), "-o", "out", "--group-size", "32"];
    room.run(args).refuses(1, &["q_proj.weight", "missing", "self_attn.qkv.weight"]);
}

/// A training with a reference keeps two adapters in one state, of which nobody can tell which is meant.
#[test]
fn two_adapters_in_one_file_are_refused() {
    let room = Room::new();
    room.model();
    let factor = |name: &str, part: &str, shape: [usize; 2]| {
        let count = shape[0] * shape[1];
        let name = format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.{name}weight");
        (name, shape.to_vec(), vec![0.01; count])
    };
    let written = |names: &[&str]| {
        let both = |name: &&str| [factor(name, "A", [4, 256]), factor(name, "B", [256, 4])];
        let all: Vec<_> = names.iter().flat_map(both).collect();
        let all: Vec<_> = all.iter().map(|(name, shape, values)| (&name[..], shape.clone(), values.clone())).collect();
        adapter(&room.path("lora"), &json!({"target_modules": ["q_proj"]}), &all);
        room.run(["merge", "model", "--adapter", "lora", "-o", "merged", "--force"])
    };
    written(&["default."]).succeeds();
    for names in [["default.", "reference."], ["", "other."]] {
        std::fs::remove_dir_all(room.path("lora")).unwrap();
        written(&names).refuses(1, &["two adapters in one file", "selected_adapters"]);
    }
}

#[test]
fn modules_that_a_gguf_file_cannot_hold_are_told() {
    let room = Room::new();
    room.model();
    let told = quantize(&room, &["-o", "m.gguf", "--scheme", "Q8_0"]).stderr();
    assert!(!told.contains("modules.json"), "{told}");
    room.file(
        "model/modules.json",
        r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]"#,
    );
    room.file("model/1_Pooling/config.json", r#"{"pooling_mode_max_tokens": true}"#);
    let told = quantize(&room, &["-o", "m.gguf", "--scheme", "Q8_0"]).stderr();
    assert!(
        told.contains("2_Dense (Dense)") && told.contains("by max_tokens, which llama.cpp does not have"),
        "{told}"
    );
}

#[test]
fn columns_with_one_name_are_refused() {
    let room = Room::new();
    room.model();
    room.file("two.csv", "text,id,text\none,1,two\n");
    let args = ["eval", "model", "--text", "two.csv", "--context", "16", "--windows", "1"];
    room.run(args).refuses(1, &["two.csv", "two columns are called `text`"]);
}

#[test]
fn weights_in_a_folder_inside_are_pointed_at() {
    let room = Room::new();
    let model = room.model();
    std::fs::create_dir(model.path("checkpoint-500")).unwrap();
    std::fs::rename(model.path("model.safetensors"), model.path("checkpoint-500/model.safetensors")).unwrap();
    room.run(["inspect", "model"]).refuses(1, &["model.safetensors", "checkpoint-500 has weights"]);
}

/// A pad token that was added to the tokenizer and not to the embedding, and operators of a programming language as added tokens.
#[test]
fn tokens_that_runtimes_stumble_over_are_told() {
    let room = Room::new();
    let model = room.model();
    let told = quantize(&room, &["-o", "m.gguf", "--scheme", "Q8_0"]).stderr();
    assert!(!told.contains("overlap") && !told.contains("of the 256 bytes"), "{told}");
    model.config(|config| config["pad_token_id"] = 4096.into());
    let told = quantize(&room, &["-o", "out"]).stderr();
    assert!(told.contains("pad_token_id is 4096, and the embedding has 4096 rows"), "{told}");
    model.config(|config| config["pad_token_id"] = 4095.into());
    assert!(!quantize(&room, &["-o", "out"]).stderr().contains("pad_token_id"));
    let path = model.path("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let known: Vec<(String, Value)> =
        json["model"]["vocab"].as_object().unwrap().iter().map(|(text, id)| (text.clone(), id.clone())).collect();
    // Words that overlap are made added tokens, as if a user had added them.
    let has = |text: &str| known.iter().find(|(known, _)| known == text).map(|(_, id)| id.clone());
    let pair = known.iter().find_map(|(first, id)| {
        let longer = known.iter().find(|(second, _)| {
            second.len() > first.len()
                && first.len() > 2
                && first.is_ascii()
                && second.starts_with(&first[first.len() - 1..])
                && second.is_ascii()
                && has(&second[..1]).is_some()
                && !second.starts_with(first.as_str())
        })?;
        Some(((first.clone(), id.clone()), longer.clone()))
    });
    let (first, second) = pair.unwrap();
    for (content, id) in [first, second] {
        let token = json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false});
        json["added_tokens"].as_array_mut().unwrap().push(token);
    }
    std::fs::write(&path, json.to_string()).unwrap();
    let told = quantize(&room, &["-o", "m.gguf", "--scheme", "Q8_0"]).stderr();
    assert!(told.contains("added tokens overlap"), "{told}");
}

#[test]
fn a_wrapper_without_the_settings_of_its_language_model_is_told_which_key_it_lacks() {
    for (text, words) in [
        (Some(Value::Null), "config.json: text_config is null, and of a `qwen3_5_moe` it is an object"),
        (Some(json!("x")), "config.json: text_config is \"x\", and"),
        (None, "config.json: text_config is missing, and"),
    ] {
        let (room, folder) = (Room::new(), checkpoint("qwen3_5_moe_vision"));
        Model::at(folder.path()).config(|config| match text {
            Some(text) => config["text_config"] = text,
            None => drop(config.as_object_mut().unwrap().remove("text_config")),
        });
        let model = folder.path().to_str().unwrap();
        let words = [words, "`qwen3_5_moe_text`", "take the config.json that was published with the model"];
        for more in [&[][..], &RTN[..]] {
            let args = ["quantize", model, "-o", "out", "--group-size", "32"];
            room.run(args.iter().chain(more)).refuses(1, &words);
        }
        let inspected = room.run(["inspect", model]);
        inspected.succeeds();
        assert!(words.iter().all(|word| inspected.stderr().contains(word)), "{}", inspected.stderr());
    }
}

#[test]
fn a_wrapper_that_no_runtime_has_is_told() {
    const WORDS: &str = "model_type is `nonsense`, and no runtime is known to have models of that type: the language model inside, a `qwen3_5_moe_text`";
    let (room, folder) = (Room::new(), checkpoint("qwen3_5_moe_vision"));
    let model = folder.path().to_str().unwrap();
    let plan = |runtime: &str, code: i32| {
        let run = room.run(["plan", model, "--group-size", "32", "--for", runtime].iter().chain(&RTN));
        assert_eq!(run.code(), Some(code), "{}{}", run.stdout(), run.stderr());
        run.stdout()
    };
    assert!(!plan("vllm", 0).contains("no runtime is known"));
    Model::at(folder.path()).config(|config| config["model_type"] = json!("nonsense"));
    for run in [
        room.run(["inspect", model]),
        room.run(["quantize", model, "-o", "out", "--group-size", "32"].iter().chain(&RTN)),
    ] {
        assert!(run.stderr().contains(WORDS), "{}", run.stderr());
    }
    for runtime in ["vllm", "transformers"] {
        let told = plan(runtime, 2);
        assert!(told.contains(&format!("refused: config.json: {WORDS}")), "{told}");
    }
    // Those that runtimes have, and those with code of their own, are not doubted.
    for change in [
        |config: &mut Value| config["model_type"] = json!("aya_vision"),
        |config: &mut Value| {
            config["model_type"] = json!("nonsense");
            config["auto_map"] = json!({"AutoModel": "modeling_own.Own"});
        },
    ] {
        Model::at(folder.path()).config(change);
        let run = room.run(["inspect", model]);
        assert!(!run.stderr().contains("no runtime is known"), "{}", run.stderr());
    }
}

#[test]
fn overrides_of_what_stays_whole_are_told() {
    let (room, folder) = (Room::new(), checkpoint("kimi_linear_published"));
    let plan = |pattern: &str| {
        room.file("recipe.toml", format!("[[override]]\nmatch = '{pattern}'\nbits = 8\n"));
        let model = folder.path().to_str().unwrap();
        let run = room.run(["plan", model, "--group-size", "32", "--recipe", "recipe.toml"].iter().chain(&RTN));
        run.succeeds();
        run.stdout()
    };
    let whole = plan("re:model.layers.0.self_attn.q_proj");
    assert!(
        whole.contains("the override `re:model.layers.0.self_attn.q_proj` has no effect on linears as `model.layers.0.self_attn.q_proj` (1 in all): they stay as they are, because vLLM"),
        "{whole}"
    );
    let some = plan("re:.*self_attn.*q_proj");
    assert!(some.contains("has no effect on linears as") && some.contains("(3 in all)"), "{some}");
    let outside = plan("lm_head");
    assert!(
        outside.contains("`lm_head` has no effect on linears as `lm_head` (1 in all): they are no linears of"),
        "{outside}"
    );
    let taken = plan("re:.*self_attn.o_proj");
    assert!(!taken.contains("has no effect on linears"), "{taken}");
}

#[test]
fn a_missing_embedding_has_the_name_that_its_file_would_give_it() {
    let (room, folder) = (Room::new(), checkpoint("qwen3_5_moe_vision"));
    rename(&Model::at(folder.path()), "language_model.embed_tokens", "visual.other");
    let args = ["quantize", folder.path().to_str().unwrap(), "-o", "out", "--group-size", "32"];
    room.run(args.iter().chain(&RTN)).refuses(1, &["tensor `model.language_model.embed_tokens.weight` is missing"]);
}

#[test]
fn a_broken_file_of_the_tokenizer_is_to_be_fetched_again_whatever_is_written() {
    let room = Room::new();
    let model = room.model();
    for (file, content, words) in [
        ("tokenizer.json", "{\"model\": ", "tokenizer.json: not valid JSON"),
        ("tokenizer_config.json", "{\"eos_token\": ", "tokenizer_config.json: not valid JSON"),
        ("tokenizer.json", "{}", "tokenizer.json: has no object `model`, which holds the vocabulary"),
    ] {
        let before = std::fs::read(model.path(file)).ok();
        std::fs::write(model.path(file), content).unwrap();
        for more in [&["-o", "out.gguf"][..], &["-o", "out", "--group-size", "64"]] {
            let run = room.run(["quantize", "model"].iter().chain(more));
            run.refuses(1, &[words, "fetch the file again"]);
            assert_eq!(run.stderr().matches("fetch the file again").count(), 1, "{}", run.stderr());
        }
        match before {
            Some(before) => std::fs::write(model.path(file), before).unwrap(),
            None => std::fs::remove_file(model.path(file)).unwrap(),
        }
    }
    std::fs::remove_file(model.path("tokenizer.json")).unwrap();
    std::fs::write(model.path("tekken.json"), "{\"config\": ").unwrap();
    room.run(["quantize", "model", "-o", "out.gguf"])
        .refuses(1, &["tekken.json: not valid JSON", "fetch the file again"]);
}
