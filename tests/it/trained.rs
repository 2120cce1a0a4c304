//! Weights that lie on a grid already, as quantization-aware training leaves them.

use std::path::{Path, PathBuf};

use formats::Dtype;
use kernels::Cpu;
use quantc::convert::convert;
use quantc::job::{Job, Verification};
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request, UnknownTensors};
use quantc::report::{Limits, Recovery, Report};
use quantc::{Checkpoint, demo};

use crate::harness::TEXT;

fn run(model: &Path, output: &Path, toml: &str) -> Report {
    let request: Request = toml::from_str(toml).unwrap();
    let defaults: Request = toml::from_str(&format!("samples = 4\nseq_len = 128\ncalibration = '{TEXT}'")).unwrap();
    let recipe = Recipe::resolve(request.or(defaults)).unwrap();
    let limits = Limits::default();
    let verification = Verification { text: "held-out".to_owned(), context: 128, windows: Some(2), limits };
    Job::one(model, output, recipe, Some(verification), false)
        .run_one(&Cpu::default(), &mut Progress::new(true))
        .unwrap()
}

/// The built-in model in bfloat16, all linears of its blocks on a grid of four bits in groups of 32.
fn trained(room: &Path) -> PathBuf {
    let (model, packed, plain) = (room.join("model"), room.join("packed"), room.join("trained"));
    demo::export(&model).unwrap();
    run(&model, &packed, "scheme = 'W4A16'\ngroup_size = 32\nmethod = 'rtn'");
    convert(&packed, &plain, Some(Dtype::BF16), UnknownTensors::Copy, false).unwrap();
    plain
}

/// Moves the first weight of a linear off the grid.
fn disturb(model: &Path, tensor: &str) {
    let file = model.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let at = 8 + length + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 2].copy_from_slice(&((0.012_345f32.to_bits() >> 16) as u16).to_le_bytes());
    std::fs::write(file, bytes).unwrap();
}

fn advised(report: &Report) -> bool {
    report.notes.iter().any(|note| note.contains("weights lie on a grid of 4 bits in groups of 32"))
}

#[test]
fn scale_and_code_of_every_weight_are_recovered() {
    let room = tempfile::tempdir().unwrap();
    let model = trained(room.path());
    let original = Checkpoint::open(&model).unwrap();
    for (index, toml) in [
        "scheme = 'W4A16'\ngroup_size = 32",
        "scheme = 'W4A16'\ngroup_size = 32\nmethod = 'rtn'\nobserver = 'minmax'",
        "scheme = 'W4A16_ASYM'\ngroup_size = 32\nmethod = 'awq'",
        "scheme = 'W8A16'\ngroup_size = 32\nmethod = 'awq+gptq'",
        "format = 'gptq'\ngroup_size = 32",
        "format = 'gguf'\nscheme = 'Q4_0'\nmethod = 'rtn'",
        "format = 'gguf'\nscheme = 'Q8_0'\nmethod = 'rtn'",
        "format = 'gguf'\nscheme = 'Q4_0'\nmethod = 'gptq'",
    ]
    .iter()
    .enumerate()
    {
        let output =
            room.path().join(format!("out-{index}")).with_extension(if toml.contains("gguf") { "gguf" } else { "d" });
        let report = run(&model, &output, toml);
        let recovered = |of: Recovery| report.linears.iter().filter(|l| l.recovered == Some(of)).count();
        assert_eq!((recovered(Recovery::Exact), report.linears.len()), (28, 28), "{toml}");
        assert!(
            report.notes.iter().any(|note| note.contains("28 of 28 linears lay on a grid")),
            "{toml}: {:?}",
            report.notes
        );
        assert!(report.smoothings.iter().all(|s| s.alpha == 0.0) && !advised(&report), "{toml}");
        let plain = room.path().join(format!("plain-{index}"));
        convert(&output, &plain, Some(Dtype::BF16), UnknownTensors::Copy, false).unwrap();
        let plain = Checkpoint::open(&plain).unwrap();
        for linear in &report.linears {
            let name = format!("{}.weight", linear.name);
            assert_eq!(plain.load(&name).unwrap(), original.load(&name).unwrap(), "{toml}: {name}");
        }
    }
}

#[test]
fn a_grid_that_the_output_cannot_hold_is_told() {
    let room = tempfile::tempdir().unwrap();
    let model = trained(room.path());
    for (toml, output) in [
        ("scheme = 'W4A16'\ngroup_size = 64", "wide"),
        ("scheme = 'W3A16'\ngroup_size = 32", "narrow"),
        ("format = 'gguf'\nscheme = 'Q4_K_M'\nmethod = 'rtn'", "superblocks.gguf"),
        ("format = 'mlx'\ngroup_size = 32\nmethod = 'rtn'", "minimum"),
    ] {
        let report = run(&model, &room.path().join(output), toml);
        assert!(advised(&report), "{toml}: {:?}", report.notes);
        let behind =
            report.notes.iter().any(|note| note.contains("compressed-tensors or GPTQ with 4 bits in such groups"));
        assert_eq!(behind, output == "minimum", "{toml}: {:?}", report.notes);
        assert!(report.linears.iter().all(|l| l.recovered.is_none()), "{toml}");
    }
    let report = run(
        &room.path().join("model"),
        &room.path().join("plain"),
        "scheme = 'W4A16'\ngroup_size = 32\nmethod = 'rtn'",
    );
    assert!(!advised(&report) && report.linears.iter().all(|l| l.recovered.is_none()), "{:?}", report.notes);
}

#[test]
fn one_weight_beside_the_grid_hides_none_of_the_others() {
    let room = tempfile::tempdir().unwrap();
    let model = trained(room.path());
    disturb(&model, "model.layers.0.self_attn.q_proj.weight");
    let held = run(&model, &room.path().join("held"), "scheme = 'W4A16'\ngroup_size = 32\nmethod = 'rtn'");
    assert_eq!(held.linears.iter().filter(|l| l.recovered.is_some()).count(), 27);
    assert!(!advised(&held), "{:?}", held.notes);
    let lost = run(&model, &room.path().join("lost"), "scheme = 'W8A8'\nmethod = 'rtn'");
    assert!(
        advised(&lost) && lost.notes.iter().any(|note| note.starts_with("most of the weights lie")),
        "{:?}",
        lost.notes
    );
}
