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
    room.model();
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

#[test]
fn differences_are_told_by_tensor_setting_and_quality() {
    let room = Room::new();
    room.model();
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
