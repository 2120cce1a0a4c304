//! What once went by without a word: every one of these is told, refused in one sentence, or done as other runtimes do it.

use formats::Dtype;
use formats::container::gguf::MetadataValue;
use quantc::Checkpoint;
use quantc::weights::StoredType;
use serde_json::{Value, json};

use crate::families::checkpoint;
use crate::gguf_inputs::{changed, floats, key, rewrite};
use crate::harness::{Model, Room, Run};
use crate::unknown::write_as;

const RTN: [&str; 6] = ["--method", "rtn", "--verify-text", "none", "--group-size", "32"];

/// Demands a run that works and says all of `words` in one note.
#[track_caller]
fn notes(run: &Run, words: &[&str]) {
    run.succeeds();
    let told = run.stderr();
    assert!(
        told.lines().any(|line| line.starts_with("note: ") && words.iter().all(|w| line.contains(w))),
        "{words:?}: {told}"
    );
}

/// Demands a run that works and says nothing of the kind.
#[track_caller]
fn silent(run: &Run, word: &str) {
    run.succeeds();
    assert!(!run.stderr().contains(word), "{}", run.stderr());
}

/// Transformers unpacks experts to the type of their scales, and a class may multiply them by what the model computes in.
#[test]
fn experts_of_an_unknown_family_have_scales_of_the_models_type() {
    let room = Room::new();
    let of = |dtype: Dtype, expert: bool, layout: &str| {
        let module = if expert { "mlp.experts.0" } else { "mlp" };
        let tensors = [(format!("model.layers.0.{module}.up_proj.weight"), vec![64, 64])];
        let name = format!("{dtype}-{expert}-{layout}");
        write_as(dtype, &room.path(&name), &json!({"model_type": "unheard_of"}), &tensors);
        let run = room.run(["quantize", &name, "-o", "out", "--force", "--format", layout].iter().chain(&RTN));
        run.succeeds();
        let written = formats::SafetensorsFile::open(room.path("out/model.safetensors")).unwrap();
        let scales =
            written.tensors().find(|spec| spec.name.ends_with("scale") || spec.name.ends_with("scales")).unwrap().dtype;
        assert_eq!(run.stderr().contains("dtype=\"auto\""), scales == Dtype::F32, "{}", run.stderr());
        scales
    };
    let ours = "compressed-tensors";
    assert_eq!(of(Dtype::F32, true, ours), Dtype::F32);
    assert_eq!(of(Dtype::F32, false, ours), Dtype::F16);
    assert_eq!(of(Dtype::BF16, true, ours), Dtype::BF16);
    assert_eq!(of(Dtype::F32, true, "gptq"), Dtype::F16);
}

#[test]
fn a_pre_tokenizer_that_a_gguf_file_does_not_name_is_told() {
    let name = "tokenizer.ggml.pre";
    let room = changed(|keys, _| keys.retain(|(key, _)| key != name));
    for command in [&["eval", "x.gguf", "--windows", "1", "--context", "32"][..], &["convert", "x.gguf", "-o", "out"]] {
        notes(&room.run(command), &["x.gguf", "tokenizer.ggml.pre", "`default`"]);
    }
    rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |keys, _| {
        keys.retain(|(key, _)| key != name);
        keys.push(key(name, MetadataValue::String(String::new())));
    });
    notes(&room.run(["convert", "x.gguf", "-o", "empty"]), &[name]);
    rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |keys, _| {
        keys.iter_mut()
            .filter(|(key, _)| key == name)
            .for_each(|(_, value)| *value = MetadataValue::String("default".into()));
    });
    silent(&room.run(["convert", "x.gguf", "-o", "named"]), name);
}

#[test]
fn files_of_templates_without_one_are_told() {
    let room = Room::new();
    let model = room.model();
    let path = model.path("chat_template.json");
    let inspected = |text: &str| {
        std::fs::write(&path, text).unwrap();
        room.run(["convert", "model", "-o", "out", "--force"])
    };
    let all = |text: &str, words: &[&str]| {
        let run = inspected(text);
        notes(&run, &[&["model/chat_template.json"], words].concat());
        assert_eq!(run.stderr().matches("chat_template.json").count(), 1, "{}", run.stderr());
    };
    all("{}", &["has no `chat_template`"]);
    all(r#"{"chat_template": 3}"#, &["holds 3", "no template"]);
    all(r#"{"chat_template": [{"name": "default"}, {"name": 1, "template": "x"}]}"#, &[r#"holds {"name":"default"}"#]);
    all(r#"{"chat_template": {"default": null}}"#, &["holds null"]);
    silent(
        &inspected(r#"{"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}"#),
        "chat_template.json",
    );
}

#[test]
fn folders_with_the_names_of_files_that_runtimes_read_are_told() {
    let room = Room::new();
    let model = room.model();
    std::fs::create_dir(model.path("tokenizer.model")).unwrap();
    std::fs::remove_file(model.path("generation_config.json")).unwrap();
    std::fs::create_dir(model.path("generation_config.json")).unwrap();
    let run = room.run(["convert", "model", "-o", "out"]);
    notes(&run, &["model/tokenizer.model: is a folder"]);
    notes(&run, &["model/generation_config.json: is a folder"]);
}

/// A run that calibrates on two short sequences.
fn calibrated(room: &Room, text: &str) -> Run {
    let quick = ["--samples", "2", "--seq-len", "32", "--verify-text", "none", "--calibration", text, "--force"];
    room.run(["quantize", "model", "-o", "out"].iter().chain(&quick))
}

const WORDS: &str = "The river runs through ten countries, from the forest to the sea, and its water is cold. ";

#[test]
fn what_json_says_twice_or_too_large_is_counted() {
    let room = Room::new();
    room.model();
    let plain = json!({"text": WORDS.repeat(4)}).to_string();
    let twice = format!(r#"{{"text": "short", "text": "{WORDS}"}}"#);
    let large = format!(r#"{{"id": 18446744073709551616, "text": "{WORDS}"}}"#);
    room.file("a.jsonl", [&plain[..], &twice, &twice, &large].join("\n"));
    let run = calibrated(&room, "a.jsonl");
    notes(&run, &["2 of 4 records of a.jsonl give a key twice (`text`)", "the last counts", "line 2"]);
    notes(&run, &["1 of 4 records of a.jsonl", "more than 64 bits (18446744073709551616)", "line 4"]);
    room.file("b.json", format!("[{plain}, {twice}, {large}]"));
    let run = calibrated(&room, "b.json");
    notes(&run, &["b.json gives a key twice in an object (`text`)"]);
    notes(&run, &["b.json", "18446744073709551616"]);
    room.file("c.jsonl", format!("{plain}\n{plain}"));
    silent(&calibrated(&room, "c.jsonl"), "twice");
}

#[test]
fn half_a_surrogate_pair_costs_its_own_record_and_no_other() {
    let room = Room::new();
    room.model();
    let plain = json!({"text": WORDS.repeat(4)}).to_string();
    let half = r#"{"text": "x\ud800y"}"#;
    let unread = format!(r#"{{"id": "\udc00", "text": "{WORDS}"}}"#);
    let chat = r#"{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]}"#;
    let records = [&plain[..], half, &unread, chat, &plain, &plain];
    room.file("a.jsonl", records.join("\n"));
    let words = ["2 from line 2 on: holds half a surrogate pair", "2 of 6 records of a.jsonl were left out"];
    notes(&calibrated(&room, "a.jsonl"), &words);
    room.file("b.json", format!("[{}]", records.join(", ")));
    notes(&calibrated(&room, "b.json"), &["2 of 6 records of b.json were left out", "half a surrogate pair"]);
    room.file("c.jsonl", half);
    calibrated(&room, "c.jsonl").refuses(1, &["c.jsonl", "half a surrogate pair"]);
}

#[test]
fn cells_that_a_viewer_cut_off_are_counted() {
    let room = Room::new();
    room.model();
    let row = |cut: &[&str]| json!({"row_idx": 0, "row": {"text": WORDS.repeat(3), "id": "a"}, "truncated_cells": cut});
    let rows = json!({"rows": [row(&["text"]), row(&[]), row(&["id"]), row(&["text"])]});
    room.file("a.json", rows.to_string());
    notes(&calibrated(&room, "a.json"), &["2 of 4 records of a.json were cut off under `text`", "record 1"]);
    room.file("b.json", json!({"rows": [row(&[]), row(&["id"])]}).to_string());
    silent(&calibrated(&room, "b.json"), "cut off");
}

#[test]
fn a_window_that_llama_cpp_does_not_keep_to_is_told() {
    let window = |tokens| key("llama.attention.sliding_window", MetadataValue::U32(tokens));
    let room = changed(|keys, _| keys.push(window(16)));
    notes(&room.run(["inspect", "x.gguf"]), &["sliding window of 16 tokens", "llama.cpp", "architecture llama"]);
    rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |keys, _| keys.push(window(1 << 20)));
    silent(&room.run(["inspect", "x.gguf"]), "window");
}

#[test]
fn a_pre_tokenizer_that_splits_otherwise_is_told_where_nothing_is_measured() {
    let room = Room::new();
    room.model();
    let fixed = [
        "quantize",
        "model",
        "-o",
        "m.gguf",
        "--scheme",
        "Q8_0",
        "--method",
        "rtn",
        "--verify-text",
        "none",
        "--force",
    ];
    notes(&room.run(fixed.iter().chain(&["--pre", "qwen2"])), &["a sample text into other tokens", "another --pre"]);
    silent(&room.run(fixed), "sample text");
    silent(&room.run(fixed.iter().chain(&["--pre", "smollm"])), "sample text");
}

#[test]
fn a_folder_is_not_called_as_a_gguf_file() {
    let room = Room::new();
    room.model();
    for command in
        [&["convert", "model", "-o", "x.gguf"][..], &["quantize", "model", "-o", "x.GGUF", "--format", "gptq"]]
    {
        room.run(command).refuses(2, &["is the name of a GGUF file", "quantc quantize MODEL -o"]);
    }
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn windows_without_a_text_have_no_effect() {
    let room = Room::new();
    room.model();
    let run = |more: &[&str]| room.run(["quantize", "model", "-o", "out", "--force"].iter().chain(&RTN).chain(more));
    notes(&run(&["--verify-windows", "3"]), &["verify_windows has no effect"]);
    silent(&run(&[]), "verify_windows");
}

#[test]
fn shards_may_lie_in_folders_within_the_models() {
    let room = Room::new();
    let model = room.model();
    room.run(["convert", "model", "-o", "plain"]).succeeds();
    std::fs::create_dir_all(model.path("weights/a")).unwrap();
    std::fs::rename(model.path("model.safetensors"), model.path("weights/a/model-1.safetensors")).unwrap();
    let names: Vec<String> =
        Checkpoint::open(&room.path("plain")).unwrap().entries().iter().map(|entry| entry.name.clone()).collect();
    let index = |file: &str| {
        let map: serde_json::Map<String, Value> = names.iter().map(|name| (name.clone(), file.into())).collect();
        std::fs::write(model.path("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    };
    index("weights/a/model-1.safetensors");
    let run = room.run(["convert", "model", "-o", "out"]);
    run.succeeds();
    assert_eq!(run.stderr(), "");
    let bytes = |folder: &str| std::fs::read(room.path(folder).join("model.safetensors")).unwrap();
    assert!(bytes("out") == bytes("plain"));
    assert!(!room.path("out/weights/a/model-1.safetensors").exists(), "weights are no side files");
    for outside in
        ["../model/weights/a/model-1.safetensors", "weights/../../x.safetensors", "/x.safetensors", "weights"]
    {
        index(outside);
        let run = room.run(["inspect", "model"]);
        assert_eq!(run.code(), Some(1), "{outside}: {}", run.stderr());
        assert!(
            outside == "weights" || run.stderr().contains("in the index's folder or in one within it"),
            "{}",
            run.stderr()
        );
    }
}

#[test]
fn an_activation_that_cannot_be_computed_stops_only_what_computes() {
    let room = Room::new();
    let model = room.model();
    room.run(["convert", "model", "-o", "plain"]).succeeds();
    model.config(|config| config["hidden_act"] = "laplace".into());
    room.run(["convert", "model", "-o", "out"]).succeeds();
    let written: Value = serde_json::from_slice(&std::fs::read(room.path("out/config.json")).unwrap()).unwrap();
    assert_eq!(written["hidden_act"], "laplace");
    room.run(["quantize", "model", "-o", "packed"].iter().chain(&RTN)).succeeds();
    for command in [&["eval", "model"][..], &["quantize", "model", "-o", "x"]] {
        room.run(command)
            .refuses(1, &["model/config.json", "hidden_act is `laplace`", "--method rtn --verify-text none"]);
    }
    room.run(["quantize", "model", "-o", "x.gguf", "--method", "rtn", "--verify-text", "none"])
        .refuses(2, &["`laplace`", "--format"]);
    model.config(|config| config["hidden_act"] = "no_such".into());
    room.run(["convert", "model", "-o", "y"]).refuses(1, &["hidden_act is `no_such`"]);
    for (name, same) in [("gelu_python", "gelu"), ("gelu_accurate", "gelu_pytorch_tanh")] {
        let measured = [name, same].map(|name| {
            model.config(|config| config["hidden_act"] = name.into());
            let run = room.run(["eval", "model", "--context", "64", "--windows", "1"]);
            run.succeeds();
            run.stdout()
        });
        assert_eq!(measured[0], measured[1], "{name}");
    }
}

#[test]
fn factors_of_frequencies_need_not_be_llama_3s() {
    let room = changed(|_, _| {});
    let perplexity = |factors: Option<&dyn Fn(usize) -> f32>| {
        let rotated = Checkpoint::open(&room.path("m.gguf")).unwrap().config()["head_dim"].as_u64().unwrap() as usize;
        rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |_, tensors| {
            let values = factors.map(|of| (0..rotated / 2).map(of).collect::<Vec<f32>>());
            tensors.extend(values.map(|values| floats("rope_freqs.weight", &values)));
        });
        let run = room.run(["eval", "x.gguf", "--context", "64", "--windows", "1", "--json"]);
        run.succeeds();
        let found: Value = serde_json::from_str(&run.stdout()).unwrap();
        found["perplexity"].as_f64().or(found["model"]["perplexity"].as_f64()).unwrap_or_else(|| panic!("{found}"))
    };
    let plain = perplexity(None);
    assert_eq!(perplexity(Some(&|_| 1.0)), plain);
    let odd = perplexity(Some(&|i| if i % 2 == 0 { 1.0 } else { 3.0 }));
    assert!((odd / plain - 1.0).abs() > 1e-6, "{odd} {plain}");
    // The same frequencies in config.json's words.
    room.run(["convert", "x.gguf", "-o", "out"]).succeeds();
    let scaling = Checkpoint::open(&room.path("out")).unwrap().config()["rope_scaling"].clone();
    assert_eq!((&scaling["rope_type"], &scaling["attention_factor"]), (&json!("longrope"), &json!(1.0)));
    assert_eq!((&scaling["short_factor"][1], &scaling["long_factor"][1]), (&json!(3.0), &json!(3.0)));
    // And in a file's again.
    room.run(["quantize", "x.gguf", "-o", "y.gguf", "--scheme", "F32", "--method", "rtn", "--verify-windows", "1"])
        .succeeds();
    rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |_, tensors| {
        tensors.push(floats("rope_freqs.weight", &[0.0; 16]))
    });
    room.run(["inspect", "x.gguf"]).refuses(1, &["rope_freqs.weight"]);
}

#[test]
fn a_bias_may_stand_alone_in_a_gguf_file() {
    let room = changed(|_, _| {});
    let with = |names: &[&str]| {
        rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |_, tensors| {
            for name in names {
                let rows = tensors.iter().find(|(t, _)| t.name == format!("{name}.weight")).unwrap().0.shape[0];
                let values: Vec<f32> = (0..rows).map(|i| i as f32 / rows as f32).collect();
                tensors.push(floats(&format!("{name}.bias"), &values));
            }
        });
        let run = room.run(["convert", "x.gguf", "-o", "out", "--force"]);
        run.succeeds();
        (Checkpoint::open(&room.path("out")).unwrap(), run.stderr())
    };
    let names = ["blk.1.attn_q", "blk.0.ffn_down"];
    let (written, told) = with(&names);
    assert!(told.contains("became zeros") && told.contains("`blk.0.attn_k.bias` and"), "{told}");
    let values = |name: &str| written.load(&format!("model.layers.{name}.bias")).unwrap();
    assert!(
        values("1.self_attn.q_proj").iter().any(|x| *x != 0.0) && values("0.mlp.down_proj").iter().any(|x| *x != 0.0)
    );
    for name in ["0.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.o_proj", "0.mlp.up_proj"] {
        assert!(values(name).iter().all(|x| *x == 0.0), "{name}");
    }
    assert!(written.entries().iter().all(|entry| matches!(entry.dtype, StoredType::Plain(_))));
    let run = room.run(["eval", "out", "--reference", "x.gguf", "--context", "64", "--windows", "1"]);
    run.succeeds();
    let (_, told) = with(&[]);
    assert!(!told.contains("zeros"), "{told}");
}

/// Appends tensors of zeros, in bfloat16.
fn add_zeros(model: &Model, names: &[(&str, usize)]) {
    model.weights(|header, data| {
        for (name, length) in names {
            let entry =
                json!({"dtype": "BF16", "shape": [length], "data_offsets": [data.len(), data.len() + 2 * length]});
            data.resize(data.len() + 2 * length, 0);
            header.insert((*name).to_owned(), entry);
        }
    });
}

/// Transformers' classes of these read no flag for biases: there are none, whatever config.json says.
#[test]
fn biases_that_a_class_does_not_read_are_none() {
    let room = Room::new();
    for name in ["mistral_grouped", "ministral_layers", "ministral3_plain"] {
        let folder = checkpoint(name);
        let model = Model::at(folder.path());
        let path = folder.path().to_str().unwrap();
        model.config(|config| (config["attention_bias"], config["mlp_bias"]) = (json!(true), json!(true)));
        silent(&room.run(["convert", path, "-o", "out", "--force"]), "bias");
        add_zeros(&model, &[("model.layers.0.mlp.up_proj.bias", 96)]);
        notes(&room.run(["convert", path, "-o", "out", "--force"]), &["mlp.up_proj.bias", "transformers leaves out"]);
    }
    // One that reads it needs them.
    let folder = checkpoint("llama_rope_linear");
    Model::at(folder.path()).config(|config| config["attention_bias"] = json!(true));
    let path = folder.path().to_str().unwrap();
    room.run(["convert", path, "-o", "other"]).refuses(1, &["q_proj.bias", "missing"]);
}

/// Transformers reads `mlp_bias` of DeepSeek V2 for dense layers and shared experts, vLLM for none.
#[test]
fn biases_of_feed_forward_layers_of_deepseek_v2_are_its_own() {
    let room = Room::new();
    let folder = checkpoint("deepseek_v2_lite");
    let model = Model::at(folder.path());
    let path = folder.path().to_str().unwrap();
    let run = || room.run(["quantize", path, "-o", "out", "--force"].iter().chain(&RTN));
    silent(&run(), "mlp_bias");
    model.config(|config| config["mlp_bias"] = json!(true));
    room.run(["convert", path, "-o", "other"]).refuses(1, &["bias` is missing"]);
    let graph = |path: &std::path::Path| quantc::families::graph_of(&Checkpoint::open(path).unwrap()).unwrap();
    let tensors = graph(folder.path()).tensors();
    let biases: Vec<(&str, usize)> = tensors
        .iter()
        .filter(|(name, _)| name.ends_with("proj.bias"))
        .map(|(name, shape)| (&name[..], shape[0]))
        .collect();
    assert!(
        biases.iter().all(|(name, _)| !name.contains(".experts."))
            && biases.iter().any(|(name, _)| name.contains("shared"))
    );
    add_zeros(&model, &biases);
    notes(&run(), &["vLLM leaves out biases", "mlp.gate_proj.bias"]);
}

/// vLLM's classes of these have no place for some biases, and skip them; of GPT-OSS they fill experts from stacks alone.
#[test]
fn what_vllm_does_not_load_is_told() {
    let room = Room::new();
    let run = |name: &str| {
        let folder = checkpoint(name);
        let path = folder.path().to_str().unwrap().to_owned();
        room.run(["quantize", &path, "-o", "out", "--force"].iter().chain(&RTN))
    };
    for (name, first, count) in [
        ("granitemoeshared_biases", "self_attn.q_proj.bias", 8),
        ("falcon_h1_normed", "feed_forward.gate_proj.bias", 6),
        ("ernie4_5_biases", "self_attn.q_proj.bias", 14),
    ] {
        notes(&run(name), &["vLLM leaves out biases", first, &format!(", {count} in all")]);
    }
    // Of GLM 5 Next four linears of each of two recurrent layers, and five of each of two others.
    for (name, first, count) in [
        ("kimi_linear_published", "self_attn.k_proj", 0),
        ("mimo_v2_flash_further", "self_attn.o_proj", 0),
        ("glm5_next_vision", "0.self_attn.k_proj", 18),
        ("minimax_m3_vl_usual", "0.self_attn.k_proj", 6),
    ] {
        notes(&run(name), &["linears as ", first, " stay as they are", "because vLLM loads them without codes"]);
        if count > 0 {
            notes(&run(name), &[&format!("({count} in all)")]);
        }
    }
    notes(&run("lfm2_moe_unbiased"), &["vLLM leaves out `lm_head` of this family"]);
    // Of one layout and not of another.
    let written = |name: &str, layout: &str| {
        let folder = checkpoint(name);
        let path = folder.path().to_str().unwrap().to_owned();
        room.run(["quantize", &path, "-o", "out", "--force", "--format", layout].iter().chain(&RTN))
    };
    for (name, layout, what) in [
        ("glm4_plain", "gptq", "vLLM 0.32 fails at the tensors `g_idx` that"),
        ("lfm2_vl_vision", "gptq", "vLLM 0.32 fails at the tensors `g_idx` that"),
        ("glm4_moe_further", "gptq", "vLLM 0.32 fails at the tensors `g_idx` of layers for further tokens"),
        ("granitemoehybrid_plain", "gptq", "mamba.in_proj` stay as they are"),
        ("qwen3_5_text_further", "gptq", "`mtp.layers.0.mlp.down_proj` stay as they are"),
        ("qwen4_exp_text_plain", "gptq", "vLLM 0.32 refuses GPTQ for models with tables"),
    ] {
        notes(&written(name, layout), &[what]);
        silent(&written(name, "compressed-tensors"), what);
    }
    for name in ["lfm2_plain", "glm4_moe_grouped", "glm_plain", "granitemoehybrid_attention"] {
        silent(&written(name, "gptq"), "vLLM 0.32 fails");
        silent(&written(name, "gptq"), "without codes");
    }
    for name in
        ["granitemoeshared_plain", "falcon_h1_plain", "granite_biases", "lfm2_moe_plain", "mimo_v2_flash_published"]
    {
        silent(&run(name), "vLLM leaves out");
        silent(&run(name), "without codes");
    }
    notes(&run("gpt_oss_plain"), &["transformers and vLLM keep this family's experts in stacks", "--ignore"]);
}

/// Transformers rotates as many values of GPT-NeoX's heads as are the part of this width, and cuts heads by their number.
#[test]
fn a_stray_width_of_heads_is_no_fault() {
    let with = |folder: &std::path::Path, head_dim: Value, part: Option<f64>| {
        Model::at(folder).config(|config| {
            config["head_dim"] = head_dim;
            if let Some(part) = part {
                config["rope_parameters"]["partial_rotary_factor"] = json!(part);
            }
        });
        crate::golden::logits(folder, &[(3..40).collect()]).map_err(|e| e.to_string())
    };
    let folder = checkpoint("gpt_neox_sequential");
    let usual = with(folder.path(), Value::Null, Some(0.5)).unwrap();
    assert!(with(folder.path(), json!(32), Some(0.25)).unwrap() == usual);
    assert!(with(folder.path(), json!(32), Some(0.5)).unwrap() != usual);
    assert!(with(folder.path(), json!(64), Some(0.5)).unwrap_err().contains("take head_dim out of config.json"));
    // No width makes any family fall over.
    crate::families::each(&crate::families::names(), |name| {
        let folder = checkpoint(name);
        for width in [2, 6, 8, 10, 64] {
            let _ = with(folder.path(), json!(width), None);
        }
    });
}

/// config.json may count layers for further tokens that the file does not hold: they are not kept, and that is told.
#[test]
fn parts_that_are_not_there_are_not_kept() {
    let room = Room::new();
    for (name, there) in [("deepseek_v3_plain", false), ("glm4_moe_grouped", false), ("deepseek_v3_further", true)] {
        let folder = checkpoint(name);
        Model::at(folder.path()).config(|config| config["num_nextn_predict_layers"] = json!(1));
        let path = folder.path().to_str().unwrap();
        let run = room.run(["quantize", path, "-o", "out", "--force", "--mtp", "keep"].iter().chain(&RTN));
        run.succeeds();
        let kept = run.stderr().contains("layers that predict further tokens are kept");
        let none = run.stderr().contains("and the checkpoint holds none");
        assert_eq!((kept, none), (there, !there), "{name}: {}", run.stderr());
        assert!(!run.stderr().contains("not part of"), "{name}: {}", run.stderr());
    }
}

/// Of a family that is not known it is not known what it calls such layers: those that are found are kept, or left out.
#[test]
fn layers_of_an_unknown_family_are_not_said_to_be_missing() {
    let room = Room::new();
    let folder = checkpoint("deepseek_v32_further");
    Model::at(folder.path()).config(|config| config["model_type"] = json!("unheard_of"));
    let path = folder.path().to_str().unwrap();
    for (mtp, done) in [("quantize", "kept as they are"), ("drop", "left out, and counted no longer in config.json")] {
        let run = room.run(["quantize", path, "-o", "out", "--force", "--mtp", mtp].iter().chain(&RTN));
        notes(&run, &[&format!("layers that predict further tokens are {done}: `model.layers.2`")]);
        silent(&run, "the checkpoint holds");
        let written = Checkpoint::open(&room.path("out")).unwrap();
        let there = written.entries().iter().any(|entry| entry.name.starts_with("model.layers.2."));
        assert_eq!((there, &written.config()["num_nextn_predict_layers"] == 0), (mtp != "drop", mtp == "drop"));
    }
}

/// compressed-tensors unpacks NVFP4 to bfloat16, whatever the model is in.
#[test]
fn nvfp4_beside_another_type_is_told() {
    let room = Room::new();
    for (dtype, told) in [(Dtype::F16, true), (Dtype::F32, true), (Dtype::BF16, false)] {
        let tensors = [("model.layers.0.mlp.up_proj.weight".to_owned(), vec![64, 64])];
        let name = format!("{dtype}");
        write_as(dtype, &room.path(&name), &json!({"model_type": "unheard_of"}), &tensors);
        let run = room.run([
            "quantize",
            &name,
            "-o",
            "out",
            "--force",
            "--scheme",
            "NVFP4A16",
            "--method",
            "rtn",
            "--verify-text",
            "none",
        ]);
        run.succeeds();
        assert_eq!(run.stderr().contains("load it with dtype=torch.bfloat16"), told, "{}", run.stderr());
    }
}

#[test]
fn gguf_files_without_a_tokenizer_or_with_keys_of_their_own_are_told() {
    let room = changed(|keys, _| keys.push(key("foo.bar", MetadataValue::String("x".into()))));
    notes(&room.run(["convert", "x.gguf", "-o", "out"]), &["x.gguf", "keys that are not known here", "`foo.bar`"]);
    silent(&room.run(["convert", "m.gguf", "-o", "other"]), "keys that are not known here");
    let room = changed(|keys, _| keys.retain(|(key, _)| !key.starts_with("tokenizer.")));
    let run = room.run(["quantize", "x.gguf", "-o", "y.gguf", "--scheme", "Q8_0", "--verify-text", "none"]);
    run.refuses(1, &["x.gguf: the file holds no tokenizer", "take a file that has one"]);
}

/// vLLM looks for what AWQ's library once wrote beside config.json.
#[test]
fn the_file_of_awq_beside_config_json_is_read() {
    let room = Room::new();
    room.model();
    let run = ["quantize", "model", "-o", "awq", "--format", "awq"];
    room.run(run.iter().chain(&RTN)).succeeds();
    let model = Model::at(&room.path("awq"));
    room.run(["convert", "awq", "-o", "usual"]).succeeds();
    model.config(|config| drop(config.as_object_mut().unwrap().shift_remove("quantization_config")));
    room.run(["convert", "awq", "-o", "none"]).refuses(1, &["says how these codes are meant is missing"]);
    let settings = json!({"w_bit": 4, "q_group_size": 32, "zero_point": true, "version": "GEMM"});
    std::fs::write(model.path("quant_config.json"), settings.to_string()).unwrap();
    room.run(["convert", "awq", "-o", "beside"]).succeeds();
    let bytes = |folder: &str| std::fs::read(room.path(folder).join("model.safetensors")).unwrap();
    assert!(bytes("usual") == bytes("beside"));
    std::fs::write(model.path("quant_config.json"), settings.to_string().replace("GEMM", "GEMV")).unwrap();
    room.run(["convert", "awq", "-o", "gemv"]).refuses(1, &["AWQ version `GEMV`", "take the model it was made from"]);
}

#[test]
fn plain_weights_of_compressed_tensors_are_called_so() {
    let room = Room::new();
    let model = room.model();
    let group = json!({"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}});
    model.config(|config| {
        config["quantization_config"] =
            json!({"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": group}});
    });
    add_zeros(&model, &[("model.layers.0.self_attn.q_proj.weight_scale", 1)]);
    room.run(["convert", "model", "-o", "out"])
        .refuses(1, &["the weights are plain", "take the model it was made from"]);
}

/// transformers stacks experts, or joins matrices, as it loads these, and does neither to packed ones.
#[test]
fn what_transformers_loads_nothing_of_is_told() {
    for (name, words) in [
        ("gemma4_text_experts", "experts in stacks and fills them from stacks alone"),
        ("kimi_linear_published", "transformers splits or joins matrices of this model"),
        ("longcat_flash_published", "with those that have no weights"),
    ] {
        let (model, room) = (checkpoint(name), Room::new());
        let folder = model.path().display().to_string();
        notes(&room.run(["quantize", &folder, "-o", "out"].iter().chain(&RTN)), &[words]);
    }
}

/// As it saves these models, transformers turns a renaming round for modules too that were not renamed, and reads them again.
#[test]
fn names_that_transformers_saves_are_read() {
    for (name, from, to) in [
        ("kimi_linear_published", ".mlp.", ".block_sparse_moe."),
        ("kimi_k25_vision", "language_model.model.layers.", "language_model.model.blocks."),
    ] {
        let model = checkpoint(name);
        let (tokens, _) = crate::golden::golden(&crate::families::folder().join(name));
        let usual = crate::golden::logits(model.path(), &tokens).unwrap();
        Model::at(model.path()).weights(|header, _| {
            let all = std::mem::take(header);
            let renamed = |name: &String| name.replace(from, to);
            assert!(all.keys().any(|name| renamed(name) != *name), "{name}");
            *header = all.into_iter().map(|(name, entry)| (renamed(&name), entry)).collect();
        });
        assert!(crate::golden::logits(model.path(), &tokens).unwrap() == usual, "{name}");
    }
}
