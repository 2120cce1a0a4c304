//! What config.json and files beside it say of the weights, and what becomes of it.

use serde_json::{Value, json};

use crate::harness::{Room, Run};

fn json_of(path: &std::path::Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn quantize(room: &Room, out: &str) -> Run {
    room.run(["quantize", "model", "-o", out, "--method", "rtn", "--group-size", "32", "--verify-text", "none"])
}

fn rotated(location: &str) -> Value {
    json!({"config_groups": {"R4": {"type": "hadamard", "apply": [
        {"targets": ["re:.*down_proj$"], "location": location, "inverse": false, "ignore": []},
    ]}}})
}

#[test]
fn rotations_at_run_time_are_refused_wherever_a_model_is_read() {
    let room = Room::new();
    let plain = room.model();
    let original = json_of(&plain.path("config.json"));
    quantize(&room, "packed").succeeds();
    let packed = room.path("packed");
    let written = json_of(&packed.join("config.json"));
    let with = |transforms: Value| {
        let mut config = written.clone();
        config["quantization_config"]["transform_config"] = transforms;
        std::fs::write(packed.join("config.json"), config.to_string()).unwrap();
    };
    with(rotated("input"));
    let words = ["packed/config.json: ", "transform_config", "`R4`, at input", "take the model it was made from"];
    for command in [
        &["convert", "packed", "-o", "out"][..],
        &["quantize", "packed", "-o", "out", "--method", "rtn", "--group-size", "32", "--verify-text", "none"],
        &["quantize", "packed", "-o", "out.gguf", "--scheme", "Q8_0", "--verify-text", "none"],
        &["eval", "packed"],
        &["inspect", "packed"],
    ] {
        room.run(command).refuses(1, &words);
    }
    for nothing in [json!(null), json!({}), rotated("weight_input")] {
        with(nothing);
        room.run(["inspect", "packed"]).succeeds();
    }
    // Weights that are stored as plain numbers are rotated as well.
    plain.config(|config| {
        *config = original;
        config["quantization_config"] =
            json!({"quant_method": "compressed-tensors", "transform_config": rotated("output")});
    });
    room.run(["inspect", "model"]).refuses(1, &["model/config.json: ", "`R4`, at output"]);
}

#[test]
fn the_name_of_the_weights_file_stays_behind() {
    let room = Room::new();
    let model = room.model();
    std::fs::rename(model.path("model.safetensors"), model.path("w8.safetensors")).unwrap();
    model.config(|config| config["transformers_weights"] = json!("w8.safetensors"));
    for (out, run) in
        [("converted", room.run(["convert", "model", "-o", "converted"])), ("packed", quantize(&room, "packed"))]
    {
        run.succeeds();
        let told = run.stderr();
        assert!(told.contains("transformers_weights that the weights are in w8.safetensors"), "{told}");
        assert!(!told.contains("vLLM look for"), "{told}");
        assert!(room.path(out).join("model.safetensors").exists());
        assert_eq!(json_of(&room.path(out).join("config.json")).get("transformers_weights"), None, "{out}");
    }
}

#[test]
fn a_tied_head_alone_is_the_embedding() {
    let room = Room::new();
    let model = room.model();
    quantize(&room, "tied").succeeds();
    model.weights(|header, _| {
        let embedding = header.remove("model.embed_tokens.weight").unwrap();
        header.insert("lm_head.weight".to_owned(), embedding);
    });
    let run = quantize(&room, "out");
    run.succeeds();
    assert!(run.stderr().contains("`lm_head.weight` to `model.embed_tokens.weight`"), "{}", run.stderr());
    let bytes = |out: &str| std::fs::read(room.path(out).join("model.safetensors")).unwrap();
    assert!(bytes("out") == bytes("tied"), "the same weights make the same file");
    // A model that is not tied lacks its embedding.
    model.config(|config| config["tie_word_embeddings"] = json!(false));
    quantize(&room, "other").refuses(1, &["model.embed_tokens.weight", "missing"]);
}

#[test]
fn an_index_with_a_byte_order_mark_is_told_like_other_files() {
    let room = Room::new();
    let model = room.model();
    std::fs::rename(model.path("model.safetensors"), model.path("shard.safetensors")).unwrap();
    std::fs::write(model.path("model.safetensors.index.json"), "\u{feff}{\"weight_map\": {}}").unwrap();
    room.run(["inspect", "model"])
        .refuses(1, &["model.safetensors.index.json: it begins with a byte order mark", "without one"]);
}

#[test]
fn leftovers_of_bitsandbytes_are_called_so() {
    let room = Room::new();
    let model = room.model();
    model.config(|config| config["quantization_config"] = json!({"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}));
    let run = room.run(["inspect", "model"]);
    run.succeeds();
    assert!(
        run.stderr().contains("calls the weights quantized (bitsandbytes)")
            || run.stdout().contains("quantized (bitsandbytes)")
    );
}

#[test]
fn torchs_short_names_of_types_are_understood() {
    for (name, told) in [("half", "F16"), ("torch.half", "F16"), ("float", "F32"), ("double", "F32")] {
        let room = Room::new();
        let model = room.model();
        model.config(|config| {
            config.as_object_mut().unwrap().shift_remove("torch_dtype");
            config["dtype"] = json!(name);
        });
        let run = room.run(["convert", "model", "-o", "out", "--dtype", "f32"]);
        run.succeeds();
        assert!(run.stderr().contains(&format!("says that the weights are {told}")), "{name}: {}", run.stderr());
    }
}
