//! Checkpoints that other libraries quantized, as inputs.

use std::collections::BTreeMap;
use std::path::Path;

use formats::{Dtype, ShardedWriter, TensorSpec};
use quantc::Checkpoint;
use serde_json::{Value, json};

use crate::harness::Room;

struct Stored {
    spec: TensorSpec,
    data: Vec<u8>,
}

fn stored(name: &str, value: &Value) -> Stored {
    let hex = value["data"].as_str().unwrap();
    Stored {
        spec: TensorSpec {
            name: name.to_owned(),
            dtype: serde_json::from_value(value["dtype"].clone()).unwrap(),
            shape: serde_json::from_value(value["shape"].clone()).unwrap(),
        },
        data: (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect(),
    }
}

fn write(folder: &Path, config: &Value, tensors: &[Stored]) {
    std::fs::create_dir_all(folder).unwrap();
    let weights = folder.join("model.safetensors");
    if weights.exists() {
        std::fs::remove_file(weights).unwrap();
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let specs = tensors.iter().map(|t| t.spec.clone()).collect();
    let writer = ShardedWriter::create(folder, specs, 1 << 30, &BTreeMap::new()).unwrap();
    tensors.iter().for_each(|t| writer.write(&t.spec.name, &t.data).unwrap());
    writer.finish().unwrap();
}

#[test]
fn tensors_of_other_libraries_appear_as_the_models_own() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("formats/tests/vectors/foreign.json");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for case in &cases {
        let label = case["label"].as_str().unwrap();
        let room = tempfile::tempdir().unwrap();
        let mut tensors: Vec<Stored> =
            case["tensors"].as_object().unwrap().iter().map(|(name, value)| stored(name, value)).collect();
        let spec = TensorSpec { name: "norm.weight".into(), dtype: Dtype::F32, shape: vec![2] };
        tensors.push(Stored { spec, data: vec![0; 8] });
        let config = json!({"dtype": "bfloat16", "quantization_config": case["quantization_config"]});
        write(room.path(), &config, &tensors);

        let opened = Checkpoint::open(room.path()).unwrap();
        let name = case["name"].as_str().unwrap();
        let names: Vec<&str> = opened.entries().iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names.len(), 2, "{label}: {names:?}");
        assert_eq!(opened.config(), &json!({"dtype": "bfloat16"}), "{label}");
        assert_eq!(opened.dtype(), Dtype::BF16, "{label}");
        let entry = opened.entry(name).unwrap();
        let expected = stored("", &case["values"]);
        assert_eq!(entry.shape, expected.spec.shape, "{label}");
        assert!(entry.stored_bytes < 4 * expected.data.len() as u64 && entry.stored_bytes > 0, "{label}");
        assert_eq!(opened.kind(entry), label);
        assert!(opened.raw(name).is_none() && opened.quantized(name).unwrap().is_none());
        let values = opened.load(name).unwrap();
        let expected: Vec<f32> =
            expected.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        for (value, expected) in values.iter().zip(&expected) {
            assert!((value - expected).abs() <= 0.004 * expected.abs(), "{label}: {value}, expected {expected}");
        }
        let (count, slice) = (entry.shape[0], values.len() / entry.shape[0]);
        assert!(opened.load_slices(name, 1..count).unwrap() == values[slice..], "{label}");
        if let &[rows, width] = &entry.shape[..] {
            let mut picked = vec![0.0; 2 * width];
            opened.load_rows(name, &[rows as u32 - 1, 0], &mut picked).unwrap();
            assert!(picked[..width] == values[(rows - 1) * width..] && picked[width..] == values[..width], "{label}");
        }
        opened.release(name);
        let notices = opened.notices().join(" ");
        assert!(notices.contains(&format!("is itself quantized ({label})")), "{label}: {notices}");
    }
}

#[test]
fn methods_and_parts_that_are_not_read_are_named() {
    let weight = |dtype: Dtype, bytes: usize| Stored {
        spec: TensorSpec { name: "a.weight".into(), dtype, shape: vec![2, 2] },
        data: vec![0; 4 * bytes],
    };
    for (config, tensor, words) in [
        (
            json!({"quant_method": "hqq"}),
            weight(Dtype::U8, 1),
            "quant_method `hqq` is not one that can be read (compressed",
        ),
        (
            json!({"quant_method": "fp8"}),
            weight(Dtype::F8_E4M3, 1),
            "its scale, a.weight_scale_inv or a.weight_scale, is missing",
        ),
        (
            json!({"quant_method": "bitsandbytes"}),
            weight(Dtype::U8, 1),
            "quant_state.bitsandbytes__nf4 (or fp4) is missing",
        ),
        (
            json!({"quant_method": "fp8", "weight_block_size": [0, 1]}),
            weight(Dtype::F8_E4M3, 1),
            "weight_block_size is [0,1]",
        ),
    ] {
        let room = tempfile::tempdir().unwrap();
        write(room.path(), &json!({ "quantization_config": config }), &[tensor]);
        let message = Checkpoint::open(room.path()).unwrap_err().to_string();
        assert!(
            message.contains(words) && message.contains("model.safetensors") | message.contains("config.json"),
            "{message}"
        );
    }
}

/// The built-in model with its linears as bytes, as llm-compressor writes W8A8.
fn as_bytes(room: &Room) {
    let model = room.model();
    let source = Checkpoint::open(&model.path("")).unwrap();
    let mut tensors = Vec::new();
    for entry in source.entries() {
        let values = source.load(&entry.name).unwrap();
        let mut add = |name: String, dtype, shape: Vec<usize>, data| {
            tensors.push(Stored { spec: TensorSpec { name, dtype, shape }, data });
        };
        if entry.name.contains("_proj.") {
            let width = entry.shape[1];
            let scales: Vec<f32> =
                values.chunks(width).map(|row| row.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0).collect();
            let codes = values.iter().enumerate().map(|(i, v)| (v / scales[i / width]).round() as i8 as u8).collect();
            add(entry.name.clone(), Dtype::I8, entry.shape.clone(), codes);
            let bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            add(format!("{}_scale", entry.name), Dtype::F32, vec![entry.shape[0], 1], bytes);
        } else {
            add(entry.name.clone(), Dtype::BF16, entry.shape.clone(), source.raw(&entry.name).unwrap().data.to_vec());
        }
    }
    let mut config = source.config().clone();
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel", "symmetric": true},
            "input_activations": {"num_bits": 8, "dynamic": true},
        }},
    });
    drop(source);
    write(&room.path("model"), &config, &tensors);
}

#[test]
fn a_quantized_model_is_quantized_again_with_a_notice() {
    let room = Room::new();
    as_bytes(&room);
    let quick = ["--method", "rtn", "--group-size", "64", "--verify-windows", "1"];
    for output in ["out", "out.gguf"] {
        let quick = if output == "out" { &quick[..] } else { &["--scheme", "Q8_0", "--verify-windows", "1"] };
        let run = room.run(["quantize", "model", "-o", output].iter().chain(quick));
        run.succeeds();
        let told = run.stderr();
        assert!(told.contains("model is itself quantized (int8 with a scale per row)"), "{told}");
        assert!(told.contains("round activations too (compressed-tensors)"), "{told}");
    }
    // And what was written here, once more.
    let run = room.run(["quantize", "out", "-o", "twice"].iter().chain(&quick));
    run.succeeds();
    assert!(run.stderr().contains("out is itself quantized (compressed-tensors W4A16 group 64)"), "{}", run.stderr());
    let run = room.run(["convert", "model", "-o", "plain"]);
    run.succeeds();
    let (packed, plain) =
        (Checkpoint::open(&room.path("model")).unwrap(), Checkpoint::open(&room.path("plain")).unwrap());
    let name = "model.layers.0.mlp.up_proj.weight";
    let (a, b) = (packed.load(name).unwrap(), plain.load(name).unwrap());
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= a.abs() / 256.0), "in bfloat16");
}
