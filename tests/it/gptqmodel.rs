//! What is said of GPTQModel, which knows of a file only what its own table says of the type of the model
//! (`tests/runtimes/families.py` loads them).

use serde_json::{Value, json};

use crate::families::checkpoint;
use crate::harness::Room;

/// What a checkpoint's output is called by its configuration, and what the report says of it, where linears stay as they are besides.
fn told(name: &str, format: &str, ignore: &[&str]) -> (Value, Vec<String>) {
    let room = Room::new();
    let model = checkpoint(name);
    let scheme = if format == "awq" { "W4A16_ASYM" } else { "W4A16" };
    let mut run = vec!["quantize", model.path().to_str().unwrap(), "-o", "out", "--format", format, "--scheme", scheme];
    run.extend(["--group-size", "32", "--method", "rtn", "--verify-text", "none"]);
    run.extend(ignore.iter().flat_map(|pattern| ["--ignore", pattern]));
    room.run(run).succeeds();
    let read = |file: &str| -> Value { serde_json::from_slice(&std::fs::read(room.path(file)).unwrap()).unwrap() };
    let notes = serde_json::from_value(read("out/report.json")["notes"].clone()).unwrap();
    (read("out/config.json")["quantization_config"].clone(), notes)
}

/// The same, and of the notes that on GPTQModel.
fn quantized(name: &str, format: &str, ignore: &[&str]) -> (Value, Option<String>) {
    let (config, notes) = told(name, format, ignore);
    (config, notes.into_iter().find(|note| note.starts_with("GPTQModel 7.7")))
}

#[test]
fn a_note_says_what_gptqmodel_does_not_know() {
    let types = "does not know models of the type";
    for (name, format, expected) in [
        ("apertus_plain", "gptq", None),
        ("apertus_plain", "awq", None),
        ("falcon_h1_plain", "gptq", None),
        ("qwen3_moe_plain", "gptq", None),
        ("qwen3_next_published", "awq", None),
        ("glm4v_moe_vision", "gptq", Some("may look for the language model under other names")),
        // Types that it lists are loaded from both; of others it guesses what GPTQ has.
        ("internlm3_biases", "gptq", None),
        ("internlm3_biases", "awq", Some(types)),
        ("bamba_plain", "gptq", Some(types)),
        ("exaone_moe_plain", "gptq", Some(types)),
        ("lfm3_plain", "gptq", Some(types)),
        // It is told of no names but those in memory.
        ("gpt_neox_sequential", "gptq", Some("and so for `embed_out` as `lm_head`")),
        ("hy_v3_plain", "awq", Some("looks for tensors by the names that transformers gives them")),
        ("mixtral_plain", "gptq", Some("and so for `model.layers.0.block_sparse_moe.")),
        // Its table lacks some linears.
        ("cohere2_moe_plain", "gptq", Some("does not know that `model.layers.1.mlp.shared_experts.")),
        ("lfm2_moe_plain", "awq", Some("does not know that `model.layers.")),
        ("qwen3_next_sparse_step", "gptq", Some("does not know that `model.layers.0.mlp.")),
    ] {
        let (_, note) = quantized(name, format, &[]);
        let as_expected = match (&note, expected) {
            (Some(note), Some(expected)) => note.contains(expected),
            (note, expected) => note.is_none() && expected.is_none(),
        };
        assert!(as_expected, "{name} in {format}: {note:?}");
    }
    let (_, note) = quantized("cohere2_moe_plain", "gptq", &[r"re:.*shared_experts.*"]);
    assert_eq!(note, None, "what its table lacks is as it was");
}

#[test]
fn awq_says_in_both_ways_what_stays_as_it_is() {
    let (config, note) = quantized("deepseek_v32_published", "awq", &[]);
    assert_eq!(note, None);
    let left = config["modules_to_not_convert"].as_array().unwrap();
    assert!(left.contains(&json!("model.layers.0.self_attn.indexer.wk")), "{config}");
    assert_eq!(config["dynamic"][r"-:.*\.\d+\.self_attn\.indexer\.wk$"], json!({}), "{config}");
    let (config, _) = quantized("apertus_plain", "awq", &[]);
    assert_eq!(config.get("dynamic"), None);
}

#[test]
fn what_is_quantized_and_what_is_not_goes_by_the_names_in_memory_too() {
    // transformers with optimum looks for these by what it has built.
    let (config, _) = quantized("hy_v3_plain", "gptq", &[r"re:.*\.experts\..*"]);
    let named = config["modules_in_block_to_quantize"][0].as_array().unwrap();
    assert!(
        ["mlp.shared_mlp.up_proj", "mlp.shared_experts.up_proj"].iter().all(|name| named.contains(&json!(name))),
        "{config}"
    );
    // What mixes streams after the last block is a linear as others are.
    let (config, _) = quantized("qwen4_exp_text_bare", "awq", &[]);
    let left = config["modules_to_not_convert"].as_array().unwrap();
    assert!(left.contains(&json!("hyper_connection_mixer.input_mix_weight_up")), "{config}");
}

#[test]
fn matrices_that_transformers_joins_are_told_of_in_families_that_are_known() {
    let (_, notes) = told("qwen4_exp_text_plain", "compressed-tensors", &[]);
    assert!(notes.iter().any(|note| note.contains("transformers splits or joins matrices of this model")), "{notes:?}");
}
