//! What llama.cpp makes tokens of images from, where more is said of it than that it is what its converter writes (`wrappers.rs`).

use std::path::Path;

use formats::container::gguf::GgufFile;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::wrappers::{model, plain, quantize};

/// llama.cpp stops at others: at BF16 where a convolution goes over all channels, and at F32 where it goes over one.
#[test]
fn convolutions_of_gemma3n_are_in_half_precision_whatever_is_asked_for() {
    let (room, outputs) = (model("gemma3n_towers"), tempfile::tempdir().unwrap());
    for ty in ["keep", "q8_0", "f32"] {
        let output = outputs.path().join(format!("{ty}.gguf"));
        let toml = format!("format = 'gguf'\nscheme = 'Q8_0'\nmethod = 'rtn'\ntowers = '{ty}'");
        quantize(room.path(), &output, &toml).unwrap();
        let file = GgufFile::open(outputs.path().join(format!("mmproj-{ty}.gguf"))).unwrap();
        let of = |tensor: &str| file.tensors().iter().find(|one| one.name == tensor).unwrap().ty.name;
        let over = file.tensors().iter().filter(|one| one.shape.len() == 4 && one.name.starts_with("v."));
        for tensor in over.filter(|one| one.name.ends_with(".weight") && !one.name.contains("stem")) {
            assert_eq!(tensor.ty.name, "F16", "{ty}: {}", tensor.name);
        }
        assert_eq!(of("v.conv_stem.conv.weight"), "F32");
        assert_eq!(
            of("mm.input_projection.weight"),
            match ty {
                "keep" => "BF16",
                "q8_0" => "Q8_0",
                _ => "F32",
            }
        );
        assert!(!file.tensors().iter().any(|one| one.name.starts_with("a.") || one.name.starts_with("mm.a.")));
    }
}

/// Both models turn pairs of queries and keys by width and height in turn, and llama.cpp turns one half of a head by each. Its converter orders the
/// rows for that in Kimi K2.5 alone.
#[test]
fn queries_and_keys_of_kimi_vl_are_ordered_as_those_of_kimi_k25() {
    let (room, outputs) = (model("kimi_vl_vision"), tempfile::tempdir().unwrap());
    let toml = "format = 'gguf'\nscheme = 'Q8_0'\nmethod = 'rtn'";
    quantize(room.path(), &outputs.path().join("m.gguf"), toml).unwrap();
    let file = GgufFile::open(outputs.path().join("mmproj-m.gguf")).unwrap();
    let listed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mmproj/kimi_k25_vision.json");
    let listed: Value = serde_json::from_slice(&std::fs::read(listed).unwrap()).unwrap();
    for end in ["weight", "bias"] {
        let part = |part: &str| file.get(&format!("v.blk.0.attn_{part}.{end}")).unwrap().data.to_vec();
        let all = ["q", "k", "v"].map(part).concat();
        let name = json!(format!("v.blk.0.attn_qkv.{end}"));
        let other = listed["tensors"].as_array().unwrap().iter().find(|tensor| tensor[0] == name).unwrap();
        assert_eq!(other[3], format!("{:x}", Sha256::digest(&all)), "{end}");
    }
}

/// As for transformers and for llama.cpp's converter, where a folder has both files.
#[test]
fn what_processor_config_json_says_of_pictures_counts() {
    let (room, outputs) = (model("qwen3_vl_vision"), tempfile::tempdir().unwrap());
    let said = json!({"image_processor": {"image_mean": [0.125, 0.25, 0.375]}});
    std::fs::write(room.path().join("processor_config.json"), said.to_string()).unwrap();
    let output = outputs.path().join("m.gguf");
    quantize(room.path(), &output, "format = 'gguf'\nscheme = 'Q8_0'\nmethod = 'rtn'").unwrap();
    let file = GgufFile::open(outputs.path().join("mmproj-m.gguf")).unwrap();
    let found = |key: &str| plain(file.metadata(&format!("clip.vision.{key}")).unwrap());
    assert_eq!([found("image_mean"), found("image_std")], [json!([0.125, 0.25, 0.375]), json!([0.5, 0.125, 1.0])]);
}
