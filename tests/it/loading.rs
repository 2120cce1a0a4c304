//! What transformers makes of a model's tensors as it loads them: other names, and matrices that are split or joined.

use std::path::Path;

use formats::Dtype;
use formats::codec::{QuantizationReader, read_quantization};
use quantc::Checkpoint;
use quantc::weights::StoredType;
use serde_json::{Value, json};

use crate::harness::Room;
use crate::unknown::write_as;

const RTN: [&str; 6] = ["--method", "rtn", "--verify-text", "none", "--group-size", "32"];
const LAYOUTS: [[&str; 4]; 3] = [
    ["--format", "compressed-tensors", "--scheme", "W8A16"],
    ["--format", "gptq", "--scheme", "W8A16"],
    ["--format", "awq", "--scheme", "W4A16_ASYM"],
];

/// Writes a checkpoint of these matrices, of 96 rows and 64 columns.
fn write(folder: &Path, config: &Value, modules: &[&str]) {
    let tensors: Vec<_> = modules.iter().map(|name| (format!("{name}.weight"), vec![96, 64])).collect();
    write_as(Dtype::BF16, folder, config, &tensors);
}

/// Quantizes a model and gives what was said, and what its configuration says of modules.
fn quantize(room: &Room, model: &str, layout: &[&str]) -> (String, QuantizationReader) {
    let out = format!("{model}-{}", layout[1]);
    let run = room.run(["quantize", model, "-o", &out].iter().chain(&RTN).chain(layout));
    run.succeeds();
    let config: Value = serde_json::from_slice(&std::fs::read(room.path(&out).join("config.json")).unwrap()).unwrap();
    (run.stderr(), read_quantization(&config).unwrap().unwrap())
}

/// Whether a module of an output has codes.
fn is_packed(folder: &Path, module: &str) -> bool {
    let written = Checkpoint::open(folder).unwrap();
    matches!(written.entry(&format!("{module}.weight")).unwrap().dtype, StoredType::Quantized { .. })
}

#[test]
fn what_stays_is_named_as_transformers_calls_it_once_it_is_loaded() {
    let room = Room::new();
    let config = json!({"model_type": "paddleocr_vl", "text_config": {"model_type": "paddleocr_vl_text"}});
    write(&room.path("seeing"), &config, &["model.layers.0.mlp.up_proj", "mlp_AR.linear_1", "visual.layers.0.fc1"]);
    write(
        &room.path("fuyu"),
        &json!({"model_type": "fuyu"}),
        &["language_model.model.layers.0.mlp.dense_h_to_4h", "vision_embed_tokens"],
    );
    for layout in LAYOUTS {
        let (_, reader) = quantize(&room, "seeing", &layout);
        for name in ["mlp_AR.linear_1", "model.projector.linear_1", "model.visual.layers.0.fc1"] {
            assert_eq!(reader.declared(name).unwrap(), None, "{name}");
        }
        assert!(reader.declared("model.language_model.layers.0.mlp.up_proj").unwrap().is_some());
        let (_, reader) = quantize(&room, "fuyu", &layout);
        for name in ["vision_embed_tokens", "model.vision_embed_tokens"] {
            assert_eq!(reader.declared(name).unwrap(), None, "{name}");
        }
    }
}

#[test]
fn a_tower_that_is_called_as_the_language_model_once_it_is_loaded_is_named_as_a_whole() {
    let room = Room::new();
    let config = json!({"model_type": "inkling2", "text_config": {"model_type": "inkling2_text"}, "vision_config": {}});
    let modules = ["model.llm.layers.0.attn.wq_du", "model.visual.backbone.layers.0.self_attn.q_proj"];
    write(&room.path("model"), &config, &modules);
    for layout in LAYOUTS {
        let (_, reader) = quantize(&room, "model", &layout);
        for (name, packed) in [
            (modules[0], true),
            ("model.language_model.layers.0.self_attn.q_proj", true),
            ("model.vision_tower.layers.0.self_attn.q_proj", false),
        ] {
            assert_eq!(reader.declared(name).unwrap().is_some(), packed, "{name}");
        }
    }
}

#[test]
fn linears_that_share_a_tensor_are_named_where_only_transformers_knows_them() {
    let room = Room::new();
    write(
        &room.path("luke"),
        &json!({"model_type": "luke"}),
        &["luke.encoder.layer.0.output.dense", "lm_head.decoder"],
    );
    let (_, reader) = quantize(&room, "luke", &LAYOUTS[0]);
    assert_eq!(reader.declared("entity_predictions.decoder").unwrap(), None);
    assert!(reader.declared("luke.encoder.layer.0.output.dense").unwrap().is_some());
}

#[test]
fn matrices_that_transformers_splits_stay_and_are_named_by_their_parts() {
    let room = Room::new();
    let config = json!({"model_type": "nomic_bert"});
    let (whole, packed) = ("nomic_bert.encoder.layers.0.attn.Wqkv", "nomic_bert.encoder.layers.0.mlp.fc2");
    write(&room.path("model"), &config, &[whole, packed, "nomic_bert.embeddings.word_embeddings"]);
    for layout in LAYOUTS {
        let (said, reader) = quantize(&room, "model", &layout);
        assert!(
            said.contains(&format!("turns `{whole}` as it loads it")) && said.contains("it stays as it is"),
            "{said}"
        );
        assert!(!said.contains("cannot load this output"), "{said}");
        let out = room.path(&format!("model-{}", layout[1]));
        assert!(!is_packed(&out, whole) && is_packed(&out, packed));
        for part in ["q_proj", "k_proj", "v_proj"] {
            let name = format!("nomic_bert.layers.0.self_attn.{part}");
            assert_eq!(reader.declared(&name).unwrap(), None, "{name}");
        }
        assert!(reader.declared("nomic_bert.layers.0.mlp.down_proj").unwrap().is_some());
    }
    // With nothing else there is nothing to quantize.
    write(&room.path("alone"), &config, &[whole]);
    room.run(["quantize", "alone", "-o", "out"].iter().chain(&RTN)).refuses(1, &["splits or joins all matrices"]);
}

#[test]
fn what_transformers_cannot_load_packed_at_all_is_told() {
    let room = Room::new();
    let modules = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_up_proj"];
    write(&room.path("model"), &json!({"model_type": "hrm_text"}), &modules);
    let (said, _) = quantize(&room, "model", &LAYOUTS[0]);
    assert!(said.contains("it cannot load this output"), "{said}");
    assert!(!is_packed(&room.path("model-compressed-tensors"), modules[1]));
    // Other layouts have no such trouble.
    let (said, _) = quantize(&room, "model", &LAYOUTS[1]);
    assert!(!said.contains("cannot load this output"), "{said}");
}

#[test]
fn classes_that_ask_for_weights_are_told_of_by_the_type_of_the_whole_model_too() {
    let room = Room::new();
    let config =
        json!({"model_type": "siglip", "text_config": {"model_type": "siglip_text_model"}, "vision_config": {}});
    write(
        &room.path("model"),
        &config,
        &["text_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.0.mlp.fc1"],
    );
    let (said, _) = quantize(&room, "model", &LAYOUTS[0]);
    assert!(said.contains("asks for the weights of linears"), "{said}");
}
