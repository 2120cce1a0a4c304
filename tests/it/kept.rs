//! `quantc check` and `quantc diff`: whether an output is whole, and what two of them have in common.

use serde_json::Value;

use crate::harness::{Model, Room};

const RTN: &[&str] = &["--method", "rtn", "--verify-text", "none"];

fn quantize(room: &Room, flags: &[&str]) {
    room.run([&["quantize", "model"], flags, RTN].concat()).succeeds();
}

#[test]
fn what_was_written_is_whole_in_every_format_and_stays_so_until_it_is_touched() {
    let room = Room::new();
    room.whole_model();
    for flags in [
        &["-o", "ct"][..],
        &["-o", "gptq", "--format", "gptq"],
        &["-o", "awq", "--format", "awq"],
        &["-o", "mlx", "--format", "mlx", "--group-size", "64"],
        &["-o", "m.gguf", "--scheme", "Q4_K_M"],
        &["-o", "s.gguf", "--scheme", "Q8_0", "--split-max-size", "2M"],
    ] {
        quantize(&room, flags);
    }
    let first = room.names().into_iter().find(|name| name.starts_with("s-00001-of-")).unwrap();
    for path in ["ct", "gptq", "awq", "mlx", "m.gguf", &first] {
        let done = room.run(["check", path]);
        done.succeeds();
        let said = done.stdout();
        assert!(said.contains("whole; ") && said.contains("hashes as the report says"), "{path}: {said}");
    }
    // All files of a split one are the input of whatever is made of it.
    room.run(["quantize", &first, "-o", "again", "--method", "rtn", "--verify-text", "none"]).succeeds();
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("again/report.json")).unwrap()).unwrap();
    let parts = room.names().into_iter().filter(|name| name.starts_with("s-0000")).count();
    assert!(parts > 1 && report["inputs"].as_array().unwrap().len() == parts, "{parts}: {}", report["inputs"]);
    // The model itself has no report, and is whole all the same.
    let done = room.run(["check", "model", "--json"]);
    done.succeeds();
    let found: Value = serde_json::from_str(&done.stdout()).unwrap();
    assert_eq!((found["faults"].as_array().unwrap().len(), found["tensors"].as_u64()), (0, Some(38)));
    assert!(done.stderr().contains("no report lies beside it"), "{}", done.stderr());

    let faulty = |path: &str, words: &[&str]| {
        let done = room.run(["check", path]);
        assert_eq!(done.code(), Some(1), "{path}: {}{}", done.stdout(), done.stderr());
        words.iter().for_each(|word| assert!(done.stderr().contains(word), "{path}: {word} in {}", done.stderr()));
    };
    // Under another name it is the same.
    std::fs::copy(room.path("m.gguf"), room.path("prod.gguf")).unwrap();
    std::fs::copy(room.path("m.gguf.report.json"), room.path("prod.gguf.report.json")).unwrap();
    let done = room.run(["check", "prod.gguf"]);
    done.succeeds();
    assert!(
        done.stdout().contains("hashes as the report says") && done.stderr().contains("have other names"),
        "{}",
        done.stderr()
    );
    // Half a file is told as JSON, too.
    let half = std::fs::read(room.path("m.gguf")).unwrap();
    room.file("half.gguf", &half[..half.len() / 2]);
    let done = room.run(["check", "half.gguf", "--json"]);
    let found: Value = serde_json::from_str(&done.stdout()).unwrap();
    assert_eq!((done.code(), found["faults"].as_array().unwrap().len()), (Some(1), 1));
    // A bit of a file, a missing one, another's configuration.
    let touched = room.path("m.gguf");
    let mut bytes = std::fs::read(&touched).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&touched, bytes).unwrap();
    faulty("m.gguf", &["m.gguf: has", "it was changed since it was written"]);
    let second = first.replace("-00001-", "-00002-");
    std::fs::remove_file(room.path(&second)).unwrap();
    faulty(&first, &[&second]);
    Model::at(&room.path("ct")).config(|config| drop(config.as_object_mut().unwrap().remove("quantization_config")));
    faulty("ct", &["weight"]);
    Model::at(&room.path("gptq")).poison("model.norm.weight", 0x7fc0);
    faulty("gptq", &["model.norm.weight", "it was changed since it was written"]);
    std::fs::remove_file(room.path("awq/tokenizer.json")).unwrap();
    assert!(room.run(["check", "awq"]).stderr().contains("tokenizer"));
    faulty("nowhere", &["nowhere"]);
}

/// What lies beside the weights, and what the configuration says of them, has to fit them.
#[test]
fn words_and_promises_that_no_runtime_can_keep_are_faults() {
    type Change<'c> = &'c dyn Fn(&Room);
    let set = |room: &Room, file: &str, change: &dyn Fn(&mut Value)| {
        let path = room.path(file);
        let mut value: Value =
            std::fs::read(&path).map_or(serde_json::json!({}), |bytes| serde_json::from_slice(&bytes).unwrap());
        change(&mut value);
        std::fs::write(path, value.to_string()).unwrap();
    };
    let cases: [(Change<'_>, &str, bool); 6] = [
        (
            &|room| set(room, "out/generation_config.json", &|v| v["eos_token_id"] = 999999.into()),
            "eos_token_id has 999999",
            true,
        ),
        (&|room| set(room, "out/config.json", &|v| v["eos_token_id"] = 999999.into()), "eos_token_id has 999999", true),
        (&|room| std::fs::write(room.path("out/chat_template.jinja"), "{% if %}").unwrap(), "cannot be parsed", true),
        (
            &|room| {
                set(room, "out/tokenizer.json", &|v| {
                    let added = serde_json::json!({"id": 70000, "content": "<extra>", "single_word": false, "lstrip": false,
                        "rstrip": false, "normalized": false, "special": true});
                    v["added_tokens"].as_array_mut().unwrap().push(added);
                });
            },
            "and the embedding has",
            false,
        ),
        (
            &|room| set(room, "out/config.json", &|v| v["quantization_config"]["ignore"] = serde_json::json!([])),
            "config.json does not leave them out of what is packed (`model.layers.0.mlp.down_proj`)",
            true,
        ),
        (
            &|room| {
                let index = serde_json::json!({"weight_map": {"model.norm.weight": "model.safetensors", "ghost": "model.safetensors"}});
                std::fs::write(room.path("out/model.safetensors.index.json"), index.to_string()).unwrap();
                std::fs::rename(room.path("out/model.safetensors"), room.path("out/part.safetensors")).unwrap();
                let text = index.to_string().replace("model.safetensors", "part.safetensors");
                std::fs::write(room.path("out/model.safetensors.index.json"), text).unwrap();
            },
            "names `ghost`, and no shard holds it",
            true,
        ),
    ];
    for (change, told, is_fault) in cases {
        let room = Room::new();
        room.model();
        quantize(&room, &["-o", "out", "--ignore", "down_proj"]);
        room.run(["check", "out"]).succeeds();
        change(&room);
        let done = room.run(["check", "out", "--json"]);
        assert!(
            done.stderr().contains(told) || done.stdout().contains(told),
            "{told}: {}{}",
            done.stdout(),
            done.stderr()
        );
        let found: Value = serde_json::from_str(&done.stdout()).unwrap();
        let said = |list: &str| {
            found[list].as_array().unwrap().iter().filter(|one| one.as_str().unwrap().contains(told)).count()
        };
        assert_eq!((said("faults"), said("notes")), if is_fault { (1, 0) } else { (0, 1) }, "{told}: {found}");
        assert_eq!(done.code() == Some(1), is_fault, "{told}");
    }
}

#[test]
fn files_of_words_and_of_generation_are_compared() {
    let room = Room::new();
    room.model();
    quantize(&room, &["-o", "a"]);
    quantize(&room, &["-o", "b"]);
    let diff = || {
        let text = room.run(["diff", "a", "b"]);
        text.succeeds();
        let found: Value = serde_json::from_str(&room.run(["diff", "a", "b", "--json"]).stdout()).unwrap();
        (found["files"].clone(), text.stdout())
    };
    assert_eq!(diff().0, serde_json::json!([]));
    std::fs::write(room.path("a/generation_config.json"), r#"{"eos_token_id": 1, "top_k": 5, "max_length": 9}"#)
        .unwrap();
    std::fs::write(room.path("b/generation_config.json"), r#"{"max_length": 9,  "eos_token_id": 2}"#).unwrap();
    std::fs::write(room.path("b/chat_template.jinja"), "{{ messages }}").unwrap();
    std::fs::remove_file(room.path("a/chat_template.jinja")).ok();
    let (files, text) = diff();
    assert_eq!(
        files,
        serde_json::json!([
            {"name": "chat_template.jinja", "only_in": "B", "keys": []},
            {"name": "generation_config.json", "only_in": null, "keys": ["eos_token_id", "top_k"]},
        ])
    );
    assert!(text.contains("generation_config.json: differs in eos_token_id, top_k\n"), "{text}");
    assert!(text.contains("chat_template.jinja: only in B\n"), "{text}");
}

#[test]
fn differences_are_told_by_tensor_setting_and_quality() {
    let room = Room::new();
    room.whole_model();
    quantize(&room, &["-o", "a"]);
    quantize(&room, &["-o", "b", "--ignore", "down_proj"]);
    quantize(&room, &["-o", "m.gguf", "--scheme", "Q8_0"]);
    let diff = |a: &str, b: &str| {
        let done = room.run(["diff", a, b, "--json"]);
        done.succeeds();
        let text = room.run(["diff", a, b]);
        text.succeeds();
        (serde_json::from_str::<Value>(&done.stdout()).unwrap(), text.stdout())
    };
    let (same, _) = diff("a", "a");
    assert_eq!((same["tensors"].as_array().unwrap().len(), same["same"].as_u64()), (0, Some(38)));
    let (found, text) = diff("a", "b");
    let tensors = found["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 4);
    let apart = |tensor: &Value| tensor["relative_error"].as_f64().unwrap();
    assert!(tensors.iter().all(|t| t["name"].as_str().unwrap().ends_with("down_proj.weight") && apart(t) > 0.01));
    assert!(
        text.contains("34 tensors are the same, 4 differ") && text.contains("4 × model.layers.*.mlp.down_proj.weight"),
        "{text}"
    );
    assert_eq!(found["recipe"]["ignore"][1], serde_json::json!(["down_proj"]));
    // A GGUF file is compared under the same names; eight bits are near the original.
    let (found, text) = diff("model", "m.gguf");
    let tensors = found["tensors"].as_array().unwrap();
    assert!(
        !tensors.is_empty() && tensors.iter().all(|tensor| tensor["a"].is_object() && tensor["b"].is_object()),
        "{text}"
    );
    assert!(tensors.iter().all(|tensor| apart(tensor) < 0.01), "{text}");
    room.run(["diff", "a", "nowhere"]).refuses(1, &["nowhere"]);
}

#[test]
fn names_are_those_that_a_tensor_type_wants_and_may_stand_in_a_file() {
    let room = Room::new();
    room.model();
    quantize(&room, &["-o", "m.gguf", "--scheme", "Q8_0"]);
    let said = room.run(["inspect", "m.gguf"]).stdout();
    assert!(said.contains("blk.0.attn_q.weight") && !said.contains("q_proj"), "{said}");
    let found: Value = serde_json::from_str(&room.run(["inspect", "model", "--json"]).stdout()).unwrap();
    let tensor =
        found["tensors"].as_array().unwrap().iter().find(|t| t["name"] == "model.layers.0.mlp.down_proj.weight");
    assert_eq!(tensor.unwrap()["gguf"], "blk.0.ffn_down.weight");
    // As llama-quantize reads it; a flag goes before it.
    room.file("types.txt", "blk\\.0\\.attn_q\\.weight=q6_k\nffn_down=q5_k token_embd=q8_0\n");
    quantize(
        &room,
        &[
            "-o",
            "t.gguf",
            "--scheme",
            "Q4_K_S",
            "--tensor-type-file",
            "types.txt",
            "--tensor-type",
            "blk.1.ffn_down=q4_0",
        ],
    );
    let said = room.run(["inspect", "t.gguf"]).stdout();
    for (name, ty) in [
        ("blk.0.attn_q.weight", "Q6_K"),
        ("blk.1.attn_q.weight", "Q4_K"),
        ("blk.0.ffn_down.weight", "Q5_K"),
        ("blk.1.ffn_down.weight", "Q4_0"),
        ("token_embd.weight", "Q8_0"),
    ] {
        let line = said.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line.contains(ty), "{line}");
    }
    room.file("wrong.txt", "ffn_down=q99");
    room.run(["quantize", "model", "-o", "x.gguf", "--tensor-type-file", "wrong.txt"])
        .refuses(2, &["wrong.txt", "q99"]);
    room.file("wrong.txt", "\n");
    room.run(["quantize", "model", "-o", "x.gguf", "--tensor-type-file", "wrong.txt"]).refuses(2, &["names no type"]);
    room.run(["quantize", "model", "-o", "x", "--tensor-type-file", "types.txt"]).refuses(2, &["tensor-type-file"]);
}

#[test]
fn shells_and_man_know_the_commands() {
    let room = Room::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let done = room.run(["completions", shell]);
        done.succeeds();
        assert!(done.stdout().contains("max-kld") && done.stdout().contains("tensor-parallel"), "{shell}");
    }
    std::fs::create_dir(room.path("man")).unwrap();
    room.run(["man", "man"]).succeeds();
    let page = std::fs::read_to_string(room.path("man/quantc-quantize.1")).unwrap();
    assert!(page.contains("max\\-kld") && room.path("man/quantc.1").exists(), "{page}");
    room.run(["man", "nowhere"]).refuses(1, &["nowhere"]);
    assert_eq!(room.run(["completions", "sh"]).code(), Some(2));
}
