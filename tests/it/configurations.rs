//! Settings in another form than transformers takes them, options without effect, and folders that are not whole: what is written, told
//! or refused.

use std::path::Path;

use formats::{Imatrix, ImatrixEntry};
use serde_json::{Value, json};

use crate::adapter::{adapter, borrowed, product};
use crate::harness::{Model, Room, Run};

const RTN: [&str; 6] = ["--method", "rtn", "--verify-text", "none", "--group-size", "64"];

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn quantize(room: &Room, model: &str, more: &[&str]) -> Run {
    room.run(["quantize", model, "-o", "out", "--force"].iter().chain(&RTN).chain(more))
}

/// The built-in model with strange settings.
fn strange(model: &Model) {
    model.config(|config| {
        config["num_hidden_layers"] = json!(4.0);
        config["use_cache"] = json!("true");
        config["initializer_range"] = Value::Null;
        config["eos_token_id"] = json!([1.0]);
        config["torch_dtype"] = json!("torch.bfloat16");
        // What differs in two places, and what nobody can make sense of.
        config["rope_theta"] = json!(10000.0);
        config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500.0});
        config["layer_types"] = json!(["full_attention"]);
    });
}

#[test]
fn every_command_writes_what_transformers_reads_and_tells_the_same() {
    let room = Room::new();
    strange(&room.whole_model());
    adapter(
        &room.path("adapter"),
        &json!({"r": 4.0}),
        &borrowed(&product("base_model.model.model.layers.0.self_attn.o_proj", 4, [256, 256])),
    );
    let words = [
        "4.0 for num_hidden_layers, which transformers 5 refuses: it is read and written as 4",
        "\"true\" for use_cache, which transformers 5 refuses: it is read and written as true",
        "null for initializer_range, which transformers 5 refuses: it is left out",
        "[1.0] for eos_token_id",
        "\"torch.bfloat16\" for torch_dtype",
        "1 entries in layer_types and 4 layers: transformers 5 refuses that",
        "has rope_theta 10000.0 outside",
    ];
    let commands: [&[&str]; 3] = [
        &["quantize", "model", "-o", "out-q", "--method", "rtn", "--verify-text", "none", "--group-size", "64"],
        &["convert", "model", "-o", "out-c"],
        &["merge", "model", "--adapter", "adapter", "-o", "out-m"],
    ];
    for command in commands {
        let run = room.run(command);
        run.succeeds();
        for word in words {
            assert!(run.stderr().contains(word), "{}: `{word}` in {}", command[0], run.stderr());
        }
        let out = command.iter().find(|word| word.starts_with("out-")).unwrap();
        let config = json_of(&room.path(out).join("config.json"));
        let of = |key: &str| config.get(key).cloned();
        assert_eq!(of("num_hidden_layers"), Some(json!(4)), "{out}");
        assert!(config["num_hidden_layers"].is_u64(), "{out}");
        assert_eq!(of("use_cache"), Some(json!(true)), "{out}");
        assert_eq!(of("initializer_range"), None, "{out}");
        assert_eq!(of("eos_token_id"), Some(json!([1])), "{out}");
        assert_eq!(of("torch_dtype"), Some(json!("bfloat16")), "{out}");
        assert_eq!(of("layer_types"), Some(json!(["full_attention"])), "{out}");
    }
    let told = room.run(["inspect", "model"]).stderr();
    assert!(words.iter().all(|word| told.contains(word)), "{told}");
}

#[test]
fn rotary_positions_for_types_of_layers_are_read_where_transformers_reads_them() {
    let nested = json!({"full_attention": {"rope_type": "default", "rope_theta": 500.0}});
    let room = Room::new();
    let model = room.model();
    model.config(|config| config["rope_parameters"] = nested.clone());
    let run = quantize(&room, "model", &["--format", "gguf", "--scheme", "F16"]);
    // --group-size is not for GGUF.
    run.refuses(2, &["group-size"]);
    let run = quantize(&room, "model", &[]);
    run.succeeds();
    assert!(run.stderr().contains("which transformers does not read for `llama`"), "{}", run.stderr());
    assert_eq!(json_of(&room.path("out/config.json"))["rope_parameters"], nested);
    // A class that knows types of layers takes these settings and has no rotation for them.
    model.config(|config| config["model_type"] = json!("qwen3"));
    quantize(&room, "model", &[])
        .refuses(1, &["rope_parameters has settings for `full_attention` alone", "write them"]);
}

#[test]
fn a_report_holds_no_option_without_effect() {
    let room = Room::new();
    room.model();
    let run = quantize(&room, "model", &["--damp", "0.1", "--samples", "7", "--moe-all-experts"]);
    run.succeeds();
    for words in [
        "damp has no effect: method rtn does not sweep",
        "samples, moe_all_experts have no effect: method rtn with observer minmax is done without calibration",
    ] {
        assert!(run.stderr().contains(words), "{}", run.stderr());
    }
    let recipe = json_of(&room.path("out/report.json"))["recipe"].clone();
    for key in ["damp", "act_order", "desc_act", "samples", "seq_len", "seed", "calibration", "moe_all_experts"] {
        assert!(recipe.get(key).is_none(), "{key}: {recipe}");
    }
    assert_eq!((&recipe["method"], &recipe["observer"]), (&json!("rtn"), &json!("minmax")));
    let card = std::fs::read_to_string(room.path("out/README.md")).unwrap();
    assert!(card.contains("damp has no effect"), "{card}");
    // What was not asked for is no news.
    let run = quantize(&room, "model", &[]);
    assert!(!run.stderr().contains("no effect"), "{}", run.stderr());
    // A model without experts has none to send tokens to.
    let more = ["--method", "gptq", "--moe-all-experts", "--samples", "2", "--seq-len", "32", "--group-size", "64"];
    let run = room.run(["quantize", "model", "-o", "swept", "--verify-text", "none"].iter().chain(&more));
    run.succeeds();
    assert!(run.stderr().contains("moe_all_experts has no effect: the model is no mixture"), "{}", run.stderr());
    let recipe = json_of(&room.path("swept/report.json"))["recipe"].clone();
    assert!(recipe.get("moe_all_experts").is_none(), "{recipe}");
    assert_eq!((&recipe["damp"], &recipe["samples"]), (&json!(0.05), &json!(2)));
}

fn importance(path: &Path, width: usize, value: f32, count: f32) {
    let mut all = Imatrix { chunk_count: 200, chunk_size: 512, ..Imatrix::default() };
    for layer in 0..4 {
        for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
            let width = if name == "ffn_down" { 3 * width } else { width };
            let entry = ImatrixEntry { sums: vec![value; width], counts: vec![count] };
            all.entries.insert(format!("blk.{layer}.{name}.weight"), entry);
        }
    }
    all.write(path).unwrap();
}

#[test]
fn importance_that_cannot_be_used_is_told_or_refused_as_other_files_are() {
    let room = Room::new();
    room.whole_model();
    let run = |scheme: &str| {
        let flags = ["--imatrix", "i.gguf", "--verify-text", "none", "--force", "--scheme", scheme];
        room.run(["quantize", "model", "-o", "m.gguf"].iter().chain(&flags))
    };
    importance(&room.path("i.gguf"), 256, 0.0, 100.0);
    let fine = run("F16");
    fine.succeeds();
    assert!(fine.stderr().contains("i.gguf was not used: F16 rounds nothing"), "{}", fine.stderr());
    assert!(!fine.stderr().contains("rounded as without importance"), "{}", fine.stderr());
    let report = json_of(&room.path("m.gguf.report.json"));
    assert!(report["recipe"].get("observer").is_none() && report["recipe"].get("imatrix").is_none());
    let file = formats::GgufFile::open(room.path("m.gguf")).unwrap();
    assert!(file.metadata("quantize.imatrix.file").is_none(), "nothing was made with it");
    let flags = ["--method", "gptq", "--samples", "2", "--seq-len", "32", "--verify-text", "none", "--scheme", "F16"];
    let swept = room.run(["quantize", "model", "-o", "swept.gguf"].iter().chain(&flags));
    swept.succeeds();
    assert!(swept.stderr().contains("method gptq has no effect: F16 rounds nothing"), "{}", swept.stderr());
    let nothing = ["i.gguf", "none of the model's 28 linears apart", "leave --imatrix out"];
    run("Q4_K_M").refuses(1, &nothing);
    importance(&room.path("i.gguf"), 256, 1.0, 0.0);
    run("Q4_K_M").refuses(1, &nothing);
    importance(&room.path("i.gguf"), 128, 1.0, 1.0);
    run("Q4_K_M").refuses(1, &["i.gguf", "is 128, expected 256"]);
    let entry = ImatrixEntry { sums: vec![1.0, 2.0], counts: vec![3.0] };
    let other = Imatrix { entries: [("elsewhere".to_owned(), entry)].into(), ..Imatrix::default() };
    other.write(room.path("i.gguf")).unwrap();
    run("Q4_K_M").refuses(1, &["i.gguf", "none of its 1 entries", "made for another one"]);
}

#[test]
fn an_adapter_that_leaves_the_types_range_is_blamed_itself() {
    let room = Room::new();
    room.model();
    let mut tensors = product("base_model.model.model.layers.0.self_attn.o_proj", 4, [256, 256]);
    for (name, _, values) in &mut tensors {
        let factor = if name.contains("lora_B") { 1e30 } else { 1e15 };
        values.iter_mut().for_each(|value| *value *= factor);
    }
    adapter(&room.path("adapter"), &json!({}), &borrowed(&tensors));
    let merge = |model: &str| room.run(["merge", model, "--adapter", "adapter", "-o", "out"]);
    let words =
        ["adapter/adapter_model.safetensors: merged with it", "layers.0.self_attn.o_proj.weight", "--dtype bf16"];
    merge("model").refuses(1, &words);
    // In F16 far less is beyond.
    tensors.iter_mut().for_each(|(_, _, values)| values.iter_mut().for_each(|value| *value = 1e3));
    adapter(&room.path("adapter"), &json!({}), &borrowed(&tensors));
    room.run(["convert", "model", "-o", "half", "--dtype", "f16"]).succeeds();
    merge("half").refuses(1, &[words[0], words[1], "beyond F16's largest, 65504", words[2]]);
    let quantize = ["quantize", "half", "--adapter", "adapter", "-o", "out", "--scheme", "W8A16"];
    room.run(quantize.iter().chain(&RTN))
        .refuses(1, &["o_proj.weight", "as they are dequantized", "F16's largest", words[2]]);
    merge("model").succeeds();
}

#[test]
fn an_adapter_with_biases_for_linears_without_is_refused_by_the_setting() {
    let room = Room::new();
    room.model();
    let module = "base_model.model.model.layers.0.self_attn.o_proj";
    let mut tensors = product(module, 4, [256, 256]);
    tensors.push((format!("{module}.lora_B.bias"), vec![256], vec![0.5; 256]));
    adapter(&room.path("adapter"), &json!({"lora_bias": true}), &borrowed(&tensors));
    let words =
        ["lora_B.bias", "lora_bias is set", "no `model.layers.0.self_attn.o_proj.bias`", "train the adapter without"];
    room.run(["merge", "model", "--adapter", "adapter", "-o", "out"]).refuses(1, &words);
    adapter(&room.path("adapter"), &json!({"lora_bias": false}), &borrowed(&tensors));
    let words = ["lora_B.bias", "lora_bias is not set", "PEFT leaves such a tensor out"];
    room.run(["merge", "model", "--adapter", "adapter", "-o", "out"]).refuses(1, &words);
}

#[test]
fn what_a_configuration_lacks_is_said_with_a_way_out() {
    let room = Room::new();
    let model = room.model();
    let original = json_of(&model.path("config.json"));
    let with = |change: &dyn Fn(&mut Value)| {
        model.config(|config| {
            *config = original.clone();
            change(config);
        });
        quantize(&room, "model", &[])
    };
    with(&|config| drop(config.as_object_mut().unwrap().remove("model_type")))
        .refuses(1, &["model/config.json: model_type is missing", "names the architecture", "published"]);
    with(&|config| config["model_type"] = json!(5)).refuses(1, &["model_type is 5", "names the architecture"]);
    with(&|config| config["tie_word_embeddings"] = Value::Null)
        .refuses(1, &["`lm_head.weight` is missing", "null or not there"]);
    // What cannot be read is not copied without a word either.
    with(&|config| config["rope_scaling"] = json!("x")).refuses(1, &["rope_scaling must be an object"]);
    room.run(["convert", "model", "-o", "out"]).refuses(1, &["rope_scaling must be an object"]);
    let run = with(&|config| config["quantization_config"] = json!({}));
    run.succeeds();
    assert!(run.stderr().contains("an empty quantization_config"), "{}", run.stderr());
    assert!(!run.stderr().contains("gptq"), "{}", run.stderr());
    with(&|_| {}).succeeds();
    model.weights(|header, _| {
        let mut weight = header.remove("model.layers.0.mlp.up_proj.weight").unwrap();
        weight["shape"] = json!([weight["shape"][0].as_u64().unwrap() * weight["shape"][1].as_u64().unwrap()]);
        header.insert("model.layers.0.mlp.other".to_owned(), weight);
    });
    let words = ["`model.layers.0.mlp.up_proj.weight` is missing", "`model.layers.0.mlp.other`", "save_pretrained()"];
    quantize(&room, "model", &[]).refuses(1, &words);
}

#[test]
fn folders_that_are_not_whole_say_what_to_fetch_or_give() {
    let room = Room::new();
    let model = room.model();
    room.run(["quantize", "model", "-o", "one.gguf", "--method", "rtn", "--verify-text", "none"]).succeeds();
    let gguf = std::fs::read(room.path("one.gguf")).unwrap();
    for name in ["b.gguf", "a.gguf", "c-00001-of-00002.gguf", "c-00002-of-00002.gguf"] {
        room.file(&format!("two/{name}"), &gguf);
    }
    let all = "give one of its files: two/a.gguf, two/b.gguf, two/c-00001-of-00002.gguf";
    let run = room.run(["inspect", "two"]);
    run.refuses(1, &[all]);
    assert!(!run.stderr().contains("00002-of"), "{}", run.stderr());
    room.file("two/config.json", "{}");
    room.run(["inspect", "two"]).refuses(1, &["its weights are GGUF", all]);
    let shard = |number: usize| format!("model-{number:05}-of-00003.safetensors");
    std::fs::rename(model.path("model.safetensors"), model.path(&shard(2))).unwrap();
    let words = [&shard(1)[..], "(and 1 more) of the 3 that", &shard(2), "is missing; fetch it"];
    room.run(["inspect", "model"]).refuses(1, &words);
    std::fs::rename(model.path(&shard(2)), model.path("model.safetensors")).unwrap();
    room.run(["inspect", "model"]).succeeds();
}

#[cfg(unix)]
#[test]
fn a_link_to_what_was_not_fetched_is_named() {
    let room = Room::new();
    let model = room.model();
    let link = |name: &str| {
        std::fs::remove_file(model.path(name)).unwrap();
        std::os::unix::fs::symlink("../../blobs/abc", model.path(name)).unwrap();
    };
    link("model.safetensors");
    let words = ["a link to ../../blobs/abc, which is not there", "download the model again"];
    room.run(["inspect", "model"]).refuses(1, &[&["model/model.safetensors"], &words[..]].concat());
    link("config.json");
    room.run(["inspect", "model"]).refuses(1, &[&["model/config.json"], &words[..]].concat());
    std::os::unix::fs::symlink("blobs/abc", room.path("m.gguf")).unwrap();
    room.run(["inspect", "m.gguf"]).refuses(1, &["m.gguf: a link to blobs/abc"]);
}
