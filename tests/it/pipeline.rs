//! From a checkpoint to files and back, through the library.

use std::path::{Path, PathBuf};

use formats::Dtype;
use kernels::Cpu;
use quantc::convert::convert;
use quantc::job::{Job, Verification};
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request, UnknownTensors};
use quantc::report::{Limits, Report, SmoothingReport};
use quantc::{Checkpoint, demo};

use crate::harness::{Room, TEXT};

/// The built-in model, written once a test.
pub fn model(room: &Path) -> PathBuf {
    let folder = room.join("model");
    demo::export(&folder).unwrap();
    folder
}

fn request(toml: &str) -> Recipe {
    let request: Request = toml::from_str(toml).unwrap();
    let defaults: Request = toml::from_str(&format!("samples = 4\nseq_len = 256\ncalibration = '{TEXT}'")).unwrap();
    Recipe::resolve(request.or(defaults)).unwrap()
}

fn run(model: &Path, output: &Path, recipe: Recipe, measure: bool) -> quantc::Result<Report> {
    let mut limits = Limits::default();
    limits.max_kld = Some(1e-9);
    let verification =
        measure.then(|| Verification { text: "held-out".to_owned(), context: 128, windows: Some(4), limits });
    let job = Job::one(model, output, recipe, verification, false);
    job.run_one(&Cpu::default(), &mut Progress::new(true))
}

fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("model.safetensors")).unwrap()
}

#[test]
fn every_layout_holds_what_was_solved_and_reads_back_as_it() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    for (index, toml) in [
        "format = 'compressed-tensors'\ngroup_size = 64",
        "format = 'compressed-tensors'\nscheme = 'W3A16_ASYM'\ngroup_size = 32",
        "format = 'compressed-tensors'\nscheme = 'W2A16'\ngroup_size = -1\nmethod = 'rtn'",
        "format = 'compressed-tensors'\nscheme = 'W8A16'\nmethod = 'awq'",
        "format = 'compressed-tensors'\nscheme = 'W8A8'",
        "format = 'compressed-tensors'\nscheme = 'W8A8'\nmethod = 'awq+gptq'",
        "format = 'compressed-tensors'\nscheme = 'FP8_DYNAMIC'",
        "format = 'compressed-tensors'\nscheme = 'FP8_DYNAMIC'\nmethod = 'gptq'",
        "format = 'compressed-tensors'\nscheme = 'NVFP4A16'",
        "format = 'compressed-tensors'\nscheme = 'NVFP4A16'\nmethod = 'awq+gptq'",
        "format = 'gptq'\ngroup_size = 128",
        "format = 'gptq'\nscheme = 'W4A16_ASYM'\ngroup_size = 64\nmethod = 'awq+gptq'",
        "format = 'gptq'\nscheme = 'W3A16'\ngroup_size = 32\ndesc_act = true",
        "format = 'awq'\ngroup_size = 64\nmethod = 'awq'",
        "format = 'mlx'\ngroup_size = 32",
        "format = 'mlx'\nscheme = 'W8A16'\nmethod = 'awq+gptq'",
    ]
    .iter()
    .enumerate()
    {
        let output = room.path().join(format!("out-{index}"));
        let recipe = request(toml);
        let (bits, smooths) = (recipe.encoding.levels.bits(), recipe.method.smooths());
        let report = run(&model, &output, recipe, true).unwrap();
        let helped = |s: &SmoothingReport| s.alpha > 0.0 && s.loss_ratio < 1.0;
        assert_eq!(report.smoothings.iter().any(helped), smooths, "{toml}: {:?}", report.smoothings);
        let quality = report.quality.as_ref().unwrap().beside.as_ref().unwrap();
        let floats = toml.contains("FP8");
        let bar = if floats { 0.005 } else { [0.0, 0.0, 4.0, 0.3, 0.05, 0.0, 0.0, 0.0, 0.001][bits as usize] };
        assert_eq!(report.notes.iter().any(|note| note.contains("token by token")), toml.contains("A8") || floats);
        assert!(quality.kld_mean > 0.0 && quality.kld_mean < bar, "{toml}: KL {}", quality.kld_mean);
        assert!(!report.verdict.as_ref().unwrap().passed, "no quantized model keeps KL 1e-9");
        assert_eq!(report.linears.len(), 28);
        assert!(report.linears.iter().all(|l| l.fallback.is_none()), "{toml}");
        assert!(output.join("tokenizer.json").exists() && output.join("README.md").exists());

        // The plain form of the output is the same model.
        let plain = room.path().join(format!("plain-{index}"));
        convert(&output, &plain, Some(Dtype::F32), UnknownTensors::Copy, false).unwrap();
        let (packed, plain) = (Checkpoint::open(&output).unwrap(), Checkpoint::open(&plain).unwrap());
        for entry in packed.entries() {
            assert_eq!(packed.load(&entry.name).unwrap(), plain.load(&entry.name).unwrap(), "{}", entry.name);
        }
        let again = run(plain.path(), &room.path().join("again"), request("method = 'rtn'\ngroup_size = 64"), false);
        again.unwrap();
        std::fs::remove_dir_all(room.path().join("again")).unwrap();
    }
}

/// Runtimes keep one global scale of the linears that they fuse, and it is exact in every precision.
#[test]
fn linears_with_one_input_have_one_global_scale() {
    let room = tempfile::tempdir().unwrap();
    let output = room.path().join("out");
    run(&model(room.path()), &output, request("scheme = 'NVFP4A16'\nmethod = 'rtn'"), false).unwrap();
    let bytes = weights(&output);
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let global = |name: String| {
        let view = tensors.tensor(&format!("{name}.weight_global_scale")).unwrap();
        assert_eq!(view.shape(), [1]);
        f32::from_le_bytes(view.data().try_into().unwrap())
    };
    for layer in 0..4 {
        for group in
            [&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..], &["mlp.gate_proj", "mlp.up_proj"]]
        {
            let own: Vec<f32> = group.iter().map(|name| global(format!("model.layers.{layer}.{name}"))).collect();
            assert!(own.iter().all(|scale| *scale == own[0] && scale.to_bits() & 0x7f_ffff == 0), "{own:?}");
        }
    }
}

#[test]
fn equal_runs_give_equal_bytes_on_any_number_of_threads() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    let cases: [(&str, &[usize]); 3] = [
        ("group_size = 64", &[1, 1, 2, 3, 7]),
        ("method = 'awq'\nbits = 3\ngroup_size = 32", &[1, 2, 7]),
        ("format = 'gptq'\ndesc_act = true", &[1, 2, 3]),
    ];
    for (toml, counts) in cases {
        let mut seen: Option<(Vec<u8>, String)> = None;
        for (attempt, &threads) in counts.iter().enumerate() {
            let output = room.path().join(format!("t{attempt}"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&model, &output, request(toml), false)).unwrap();
            let card = std::fs::read_to_string(output.join("README.md")).unwrap();
            let found = (weights(&output), card);
            assert!(seen.get_or_insert_with(|| found.clone()) == &found, "{toml}: {threads} threads");
            std::fs::remove_dir_all(output).unwrap();
        }
    }
}

#[test]
fn better_methods_are_better() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    let mut last = f64::INFINITY;
    for method in ["rtn", "awq", "gptq"] {
        let recipe = request(&format!("bits = 3\ngroup_size = 64\nmethod = '{method}'\nsamples = 16"));
        let report = run(&model, &room.path().join(method), recipe, true).unwrap();
        let kld = report.quality.unwrap().beside.unwrap().kld_mean;
        assert!(kld < 0.9 * last, "{method}: {kld} after {last}");
        last = kld;
    }
}

#[test]
fn exceptions_are_obeyed_and_told() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    let toml = "group_size = 64\nignore = ['o_proj']\n[[override]]\nmatch = 'down_proj'\nbits = 8\n";
    let report = run(&model, &room.path().join("out"), request(toml), false).unwrap();
    assert_eq!(report.linears.len(), 24);
    assert!(report.linears.iter().all(|l| (l.bits == 8) == l.name.ends_with("down_proj")));
    let source = Checkpoint::open(&model).unwrap();
    let output = Checkpoint::open(&room.path().join("out")).unwrap();
    let name = "model.layers.1.self_attn.o_proj.weight";
    assert_eq!(source.raw(name).unwrap().data, output.raw(name).unwrap().data);
}

#[test]
fn a_model_of_an_unknown_family_is_quantized_without_data_and_copied_otherwise() {
    let room = Room::new();
    let model = room.whole_model();
    model.config(|config| config["model_type"] = "never_heard_of".into());
    let run = |more: &[&str]| {
        let args = ["quantize", "model", "-o", "out", "--group-size", "64"];
        room.run(args.iter().chain(more))
    };
    let both = ["--method", "rtn", "--verify-text", "none"];
    for missing in [&both[..2], &both[2..], &[]] {
        run(missing).refuses(1, &["never_heard_of", "--method rtn --verify-text none"]);
        assert_eq!(room.names(), ["model"], "nothing is begun");
    }
    run(&both).succeeds();

    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
    let notes = report["notes"].to_string();
    assert!(notes.contains("28 linears were found by name and shape"), "{notes}");
    let (plain, written) =
        (Checkpoint::open(&room.path("model")).unwrap(), Checkpoint::open(&room.path("out")).unwrap());
    let mut quantized = 0;
    for entry in plain.entries() {
        let found = written.entry(&entry.name).unwrap_or_else(|| panic!("{} is missing", entry.name));
        match found.dtype {
            quantc::weights::StoredType::Quantized { .. } => quantized += 1,
            _ => assert_eq!(plain.raw(&entry.name).unwrap().data, written.raw(&entry.name).unwrap().data),
        }
    }
    assert_eq!(quantized, 28);
    // As a Llama, which it is, it gives what it would have given under its own name.
    model.config(|config| config["model_type"] = "llama".into());
    room.run(["quantize", "model", "-o", "out2", "--group-size", "64", "--method", "rtn", "--verify-text", "none"])
        .succeeds();
    assert_eq!(weights(&room.path("out")), weights(&room.path("out2")));
}
