//! What becomes of layers that have a state, or a gate of few rows: what decides about all of it stays as it is.

use std::path::Path;

use formats::SafetensorsFile;
use kernels::Cpu;
use quantc::job::Job;
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request};
use serde_json::Value;

use crate::families::checkpoint;

/// A checkpoint, linears of it that are never quantized, and tensors that are no linears and stay.
const STAY: &[(&str, &[&str], &[&str])] = &[
    ("bamba_plain", &[], &["mamba.conv1d.weight", "mamba.conv1d.bias", "mamba.A_log", "mamba.D", "mamba.dt_bias"]),
    ("granitemoehybrid_plain", &["block_sparse_moe.router.layer"], &["mamba.norm.weight", "mamba.A_log", "mamba.D"]),
    ("nemotron_h_latent", &["mixer.gate"], &["mixer.conv1d.weight", "mixer.gate.e_score_correction_bias"]),
    ("lfm2_plain", &[], &["conv.conv.weight", "self_attn.q_layernorm.weight"]),
    ("lfm2_moe_plain", &["feed_forward.gate"], &["conv.conv.weight", "feed_forward.expert_bias"]),
    ("lfm3_plain", &["self_attn.gate_proj"], &["conv.conv.weight", "post_operator_norm.weight"]),
    ("afmoe_plain", &["mlp.router.gate"], &["mlp.expert_bias"]),
    ("olmo_hybrid_plain", &["linear_attn.a_proj", "linear_attn.b_proj"], &["linear_attn.q_conv1d.weight"]),
];

/// The tensors of a directory whose names end so, with their bytes.
fn ending(folder: &Path, end: &str) -> Vec<(String, Vec<u8>)> {
    let file = SafetensorsFile::open(folder.join("model.safetensors")).unwrap();
    let own = file.tensors().filter(|tensor| tensor.name.ends_with(end));
    own.map(|tensor| (tensor.name.clone(), file.get(&tensor.name).unwrap().data.to_vec())).collect()
}

#[test]
fn what_decides_about_a_state_stays_and_is_named() {
    for (name, linears, others) in STAY {
        let (model, outputs) = (checkpoint(name), tempfile::tempdir().unwrap());
        let output = outputs.path().join("out");
        let request: Request = toml::from_str("scheme = 'W4A16'\nmethod = 'rtn'\ngroup_size = 32").unwrap();
        let job = Job::one(model.path(), &output, Recipe::resolve(request).unwrap(), None, false);
        let report = job.run_one(&Cpu::exact(), &mut Progress::new(true)).unwrap();
        let config: Value = serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
        let ignored = config["quantization_config"]["ignore"].as_array().unwrap();
        for linear in *linears {
            let named = |entry: &Value| entry.as_str().unwrap().replace('\\', "").contains(linear);
            assert!(ignored.iter().any(named), "{name}: {linear} is not in {ignored:?}");
            assert!(report.linears.iter().all(|found| !found.name.ends_with(linear)), "{name}: {linear}");
        }
        for end in linears.iter().map(|linear| format!("{linear}.weight")).chain(others.iter().map(|x| x.to_string())) {
            let (before, after) = (ending(model.path(), &end), ending(&output, &end));
            assert!(!before.is_empty() && before == after, "{name}: {end}");
        }
    }
}
