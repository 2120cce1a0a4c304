//! What is told, or refused, where weights, inputs or an adapter say too little to be relied on.

use std::path::{Path, PathBuf};

use formats::{Imatrix, ImatrixEntry};
use kernels::Cpu;
use quantc::Checkpoint;
use quantc::job::{Job, Verification};
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request};
use quantc::report::{Limits, Report};
use serde_json::{Value, json};

use crate::adapter::{adapter, borrowed, product};
use crate::families::checkpoint;
use crate::gguf_families::spell;
use crate::harness::{Model, Room, TEXT};

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

fn quantize(model: &Path, output: &Path, toml: &str) -> quantc::Result<Report> {
    let defaults: Request = toml::from_str(&format!("samples = 4\nseq_len = 64\ncalibration = '{TEXT}'")).unwrap();
    let request: Request = toml::from_str(toml).unwrap();
    let recipe = Recipe::resolve(request.or(defaults))?;
    let job = Job::one(model, output, recipe, None, true);
    job.run_one(&Cpu::default(), &mut Progress::new(true))
}

/// Multiplies a bf16 tensor.
fn scale(model: &Model, tensor: &str, factor: f32) {
    model.weights(|header, data| {
        let [from, to] = [0, 1].map(|i| header[tensor]["data_offsets"][i].as_u64().unwrap() as usize);
        for bytes in data[from..to].chunks_exact_mut(2) {
            let value = f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16) * factor;
            bytes.copy_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
        }
    });
}

/// The share of a tensor's energy that a file has lost.
fn error(original: &Path, written: &Path, tensor: &str) -> f64 {
    let [x, y] = [original, written].map(|path| Checkpoint::open(path).unwrap().load(tensor).unwrap());
    let whole: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    x.iter().zip(&y).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>() / whole
}

#[test]
fn a_linear_beyond_its_types_range_is_refused_by_its_name() {
    // Every type is tried in `src/evidence.rs`; here what becomes of the file.
    let room = Room::new();
    scale(&room.model(), DOWN, 1e8);
    let [model, path] = ["model", "m.gguf"].map(|name| room.path(name));
    let with = |ty: &str, method: &str| {
        let types = format!("tensor_type = ['blk\\.1\\.ffn_down={ty}', 'blk=BF16']");
        quantize(&model, &path, &format!("format = 'gguf'\nscheme = 'Q8_0'\nmethod = '{method}'\n{types}"))
    };
    for (ty, method) in [("F16", "rtn"), ("Q8_0", "rtn"), ("Q4_0", "rtn"), ("Q4_0", "gptq"), ("TQ1_0", "gptq")] {
        let refused = with(ty, method).unwrap_err();
        let told = refused.to_string();
        let words = format!(
            "for which {ty} has no scale; choose a type for it that has, as with --tensor-type blk.1.ffn_down=BF16"
        );
        assert!(told.contains(DOWN) && told.contains(&words), "{told}");
        assert_eq!((refused.exit_code(), room.names()), (1, vec!["model".to_owned()]));
    }
    for (ty, method) in [("IQ4_XS", "rtn"), ("MXFP4", "rtn"), ("BF16", "rtn"), ("Q6_K", "gptq")] {
        let report = with(ty, method).unwrap();
        assert!(report.linears.iter().all(|linear| linear.lost.is_none()), "{ty}");
        let found = error(&model, &path, DOWN);
        assert!(found < 0.05, "{ty}: {found}");
    }
}

#[test]
fn what_is_no_number_is_refused_by_every_scheme() {
    for bits in [0x7f80, 0xffc0] {
        let room = Room::new();
        room.model().poison(DOWN, bits);
        for scheme in ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "TQ1_0", "MXFP4_MOE"] {
            room.run([
                "quantize",
                "model",
                "-o",
                "m.gguf",
                "--scheme",
                scheme,
                "--method",
                "rtn",
                "--verify-text",
                "none",
            ])
            .refuses(1, &[DOWN, "at index 0 is not a finite number"]);
        }
        for format in ["compressed-tensors", "gptq", "awq"] {
            room.run(["quantize", "model", "-o", "m", "--format", format, "--method", "rtn", "--verify-text", "none"])
                .refuses(1, &[DOWN, "at index 0 is not a finite number"]);
        }
        room.run(["convert", "model", "-o", "f", "--dtype", "f16"]).refuses(1, &[DOWN, "not a finite number"]);
        assert_eq!(room.names(), ["model"]);
    }
    let room = Room::new();
    scale(&room.model(), DOWN, 1e8);
    room.run(["convert", "model", "-o", "f", "--dtype", "f16"]).refuses(1, &[DOWN, "beyond F16's largest"]);
}

#[test]
fn codes_without_a_scale_are_refused_and_lost_weights_are_told() {
    for toml in [
        "format = 'compressed-tensors'\nmethod = 'rtn'",
        "format = 'compressed-tensors'\nscheme = 'W8A16_ASYM'\nmethod = 'rtn'",
        "format = 'gptq'\nmethod = 'gptq'\ndesc_act = true",
        "format = 'awq'\nmethod = 'rtn'",
    ] {
        let room = Room::new();
        let model = room.model();
        scale(&model, DOWN, 1e8);
        let refused = quantize(&room.path("model"), &room.path("out"), toml).unwrap_err().to_string();
        assert!(
            refused.contains(DOWN) && refused.contains("--ignore model.layers.1.mlp.down_proj"),
            "{toml}: {refused}"
        );
        assert_eq!(room.names(), ["model"]);

        let room = Room::new();
        let model = room.model();
        scale(&model, DOWN, 1e-8);
        let report = quantize(&room.path("model"), &room.path("out"), toml).unwrap();
        let lost: Vec<_> = report.linears.iter().filter(|linear| linear.lost.is_some()).collect();
        assert_eq!((lost.len(), lost[0].lost), (1, Some(1.0)), "{toml}");
        let told = |note: &String| note.contains("`model.layers.1.mlp.down_proj`") && note.contains("up to 100 %");
        assert!(report.notes.iter().any(told), "{toml}: {:?}", report.notes);
        let json: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
        assert!(json["linears"].as_array().unwrap().iter().any(|linear| linear["lost"] == 1.0));

        let room = Room::new();
        room.model();
        let report = quantize(&room.path("model"), &room.path("out"), toml).unwrap();
        assert!(report.linears.iter().all(|linear| linear.lost.is_none()), "{toml}");
        assert!(!report.notes.iter().any(|note| note.contains("too small")), "{toml}: {:?}", report.notes);
    }
}

#[test]
fn a_tensor_that_is_no_linear_is_told_too() {
    let room = Room::new();
    let model = room.model();
    scale(&model, "model.embed_tokens.weight", 1e-9);
    let report = quantize(&room.path("model"), &room.path("m.gguf"), "format = 'gguf'\nscheme = 'Q8_0'").unwrap();
    let told = |note: &String| note.contains("`model.embed_tokens.weight`") && note.contains("too small");
    assert!(report.notes.iter().any(told), "{:?}", report.notes);
}

#[test]
fn a_channel_that_is_never_seen_is_told() {
    let room = Room::new();
    let model = room.whole_model();
    scale(&model, "model.layers.2.mlp.up_proj.weight", 0.0);
    let report = quantize(&room.path("model"), &room.path("out"), "group_size = 64").unwrap();
    let down = report.linears.iter().find(|linear| linear.name == "model.layers.2.mlp.down_proj").unwrap();
    assert_eq!(down.dead_inputs, Some(1.0));
    let told =
        |note: &String| note.contains("1 of 28 linears read mostly zeros") && note.contains("layers.2.mlp.down_proj");
    assert!(report.notes.iter().any(told), "{:?}", report.notes);
    let others = report.linears.iter().filter(|linear| linear.name != down.name);
    assert!(others.into_iter().all(|linear| linear.dead_inputs.is_none()));
}

#[test]
fn an_importance_matrix_that_says_little_is_told() {
    let room = Room::new();
    room.whole_model();
    let [model, path] = ["model", "i.gguf"].map(|name| room.path(name));
    let entry = |name: &str, width: usize| {
        let sums = (0..width).map(|i| 1.0 + (i % 7) as f32).collect();
        (name.to_owned(), ImatrixEntry { sums, counts: vec![100_000.0] })
    };
    let mut whole = Imatrix { chunk_count: 200, chunk_size: 512, ..Imatrix::default() };
    for layer in 0..4 {
        for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
            let width = if name == "ffn_down" { 768 } else { 256 };
            whole.entries.extend([entry(&format!("blk.{layer}.{name}.weight"), width)]);
        }
    }
    let toml = format!("format = 'gguf'\nscheme = 'Q4_K_S'\nimatrix = '{}'", path.display());
    let told = |imatrix: &Imatrix| {
        imatrix.write(&path).unwrap();
        let report = quantize(&model, &room.path("m.gguf"), &toml).unwrap();
        report.notes.into_iter().filter(|note| note.contains("i.gguf: ")).collect::<Vec<_>>()
    };
    assert_eq!(told(&whole), Vec::<String>::new());
    let plain = std::fs::read(room.path("m.gguf")).unwrap();
    let mut weak = whole.clone();
    weak.entries.remove("blk.0.attn_q.weight");
    weak.entries.remove("blk.3.ffn_down.weight");
    weak.entries.get_mut("blk.1.ffn_up.weight").unwrap().counts = vec![0.0];
    weak.entries.get_mut("blk.2.ffn_up.weight").unwrap().sums = vec![0.0; 256];
    weak.entries.get_mut("blk.2.attn_v.weight").unwrap().sums = vec![3.0; 256];
    weak.entries.extend([entry("blk.4.ffn_up.weight", 256)]);
    (weak.chunk_count, weak.chunk_size) = (2, 512);
    let notes = told(&weak);
    for (index, words) in [
        "no entry for 2 of 28 linears (`model.layers.0.self_attn.q_proj`, `model.layers.3.mlp.down_proj`)",
        "saw no token before 1 of 28 linears (`model.layers.1.mlp.up_proj`)",
        "equally important in its entries for 2 of 28 linears (`model.layers.2.self_attn.v_proj`, `model.layers.2.mlp.up_proj`)",
        "1 of its 27 entries (`blk.4.ffn_up.weight`) are for tensors that this model does not have",
        "computed on 1024 tokens, which are few",
    ]
    .iter()
    .enumerate()
    {
        assert!(notes[index].contains(words), "{notes:#?}");
    }
    assert_eq!(notes.len(), 5, "{notes:#?}");
    // What an entry says of the embedding, which is the head too, is heard.
    let mut more = whole.clone();
    more.entries.extend([entry("token_embd.weight", 256)]);
    assert_eq!(told(&more), Vec::<String>::new());
    assert!(std::fs::read(room.path("m.gguf")).unwrap() != plain);
    let mut narrow = whole;
    narrow.entries.extend([entry("blk.0.attn_q.weight", 128)]);
    narrow.write(&path).unwrap();
    let refused = quantize(&model, &room.path("m.gguf"), &toml).unwrap_err().to_string();
    assert!(refused.contains("`blk.0.attn_q.weight`: the width of its importance is 128, expected 256"), "{refused}");
}

#[test]
fn a_mixture_says_the_same_of_its_experts_in_every_format() {
    let room = checkpoint("mixtral_plain");
    spell(room.path());
    let outputs = Room::new();
    let text = outputs.file("text.txt", "the quick brown fox jumps over the lazy dog; ".repeat(80).replace(' ', "_"));
    let fixed = format!("method = 'gptq'\ncalibration = '{}'\nsamples = 16", text.display());
    let [gguf, folder] = [("m.gguf", "format = 'gguf'\nscheme = 'Q4_0'\n"), ("out", "group_size = 32\n")]
        .map(|(name, toml)| quantize(room.path(), &outputs.path(name), &format!("{toml}{fixed}")).unwrap());
    let priors = |report: &Report| -> Vec<(String, f64)> {
        let mut priors: Vec<_> = report.linears.iter().filter_map(|l| Some((l.name.clone(), l.prior?))).collect();
        priors.sort_by(|a, b| a.0.cmp(&b.0));
        priors
    };
    let starved =
        |report: &Report| report.notes.iter().any(|note| note.contains("saw fewer tokens than they have inputs"));
    let (a, b) = (priors(&gguf), priors(&folder));
    assert!(!a.is_empty() && a.iter().all(|(_, prior)| (0.0..1.0).contains(prior)), "{a:?}");
    // Attention before them is rounded to other grids, and sends some tokens elsewhere.
    assert!(a[0].0 == b[0].0 && (a[0].1 - b[0].1).abs() < 0.05, "{:?} and {:?}", a[0], b[0]);
    for (report, priors) in [(&gguf, a), (&folder, b)] {
        assert_eq!(starved(report), priors.iter().any(|(_, prior)| *prior > 0.5), "{priors:?}");
    }
}

#[test]
fn the_scheme_of_a_gguf_file_is_its_mix() {
    let room = Room::new();
    room.whole_model();
    quantize(&room.path("model"), &room.path("m.gguf"), "format = 'gguf'\nscheme = 'Q4_K_M'\nmethod = 'rtn'").unwrap();
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("m.gguf.report.json")).unwrap()).unwrap();
    assert_eq!(report["recipe"]["scheme"], "Q4_K_M");
    assert_eq!(report["recipe"]["method"], "rtn");
    assert!(report["recipe"].get("damp").is_none(), "rounding has no Hessian to damp");
    let ty = |name: &str| {
        let tensors = report["tensors"].as_array().unwrap();
        tensors.iter().find(|tensor| tensor["name"] == name).unwrap()["type"].clone()
    };
    assert_eq!([ty("model.embed_tokens.weight"), ty(DOWN), ty("model.norm.weight")], ["Q6_K", "Q4_K", "F32"]);
    quantize(&room.path("model"), &room.path("out"), "method = 'rtn'\ngroup_size = 64").unwrap();
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
    assert_eq!(report["recipe"]["scheme"], json!({"bits": 4, "group": 64, "symmetric": true}));
}

/// Weights that are numbers, of a model whose logits are none.
fn broken(room: &Room) {
    let model = room.model();
    scale(&model, "model.norm.weight", 1e38);
    scale(&model, "model.embed_tokens.weight", 1e4);
}

#[test]
fn a_broken_original_is_named_and_nothing_is_written() {
    let room = Room::new();
    broken(&room);
    std::fs::rename(room.path("model"), room.path("bad")).unwrap();
    room.model();
    let quick = ["--method", "rtn", "--verify-windows", "1"];
    for output in ["out", "out.gguf"] {
        let run = room.run(["quantize", "bad", "-o", output].iter().chain(&quick));
        run.refuses(1, &["bad: the logits of scored token 0 are not finite numbers; the original is broken"]);
    }
    assert_eq!(room.names(), ["bad", "model"]);
    let eval =
        |args: &[&str]| room.run(["eval"].iter().chain(args).chain(&["--context", "64", "--windows", "1", "--json"]));
    eval(&["model", "--reference", "bad"]).refuses(1, &["bad: the logits", "the original is broken"]);
    eval(&["bad", "--reference", "model"]).refuses(1, &["bad: the logits", "the model is broken"]);
    eval(&["bad"]).refuses(1, &["bad: the logits", "the model is broken"]);
    // Logits that are numbers, and so far apart that no perplexity is.
    let room = Room::new();
    let model = room.model();
    scale(&model, "model.norm.weight", 1e4);
    let run = room.run(["eval", "model", "--context", "64", "--windows", "1", "--json"]);
    run.refuses(1, &["model: its perplexity is larger than a number can say"]);
}

#[test]
fn what_cannot_be_measured_passes_no_limit() {
    let room = Room::new();
    broken(&room);
    let mut limits = Limits::default();
    limits.max_kld = Some(1e9);
    let verification = Verification { text: "held-out".into(), context: 64, windows: Some(1), limits };
    let recipe = Recipe::resolve(toml::from_str("method = 'rtn'").unwrap()).unwrap();
    let (model, output): (PathBuf, PathBuf) = (room.path("model"), room.path("out"));
    let job = Job::one(&model, &output, recipe, Some(verification), false);
    assert!(job.run_one(&Cpu::default(), &mut Progress::new(true)).is_err());
    assert!(!output.exists());
}

#[test]
fn adapters_that_lack_something_are_refused_or_told() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/llama_untied_gqa");
    let module = "base_model.model.model.layers.0.self_attn.o_proj";
    let good = product(module, 4, [32, 32]);
    let open = |settings: Value, tensors: &[(String, Vec<usize>, Vec<f32>)]| {
        let room = tempfile::tempdir().unwrap();
        adapter(room.path(), &settings, &borrowed(tensors));
        match Checkpoint::open_with(&base, Some(room.path())) {
            Ok(merged) => {
                merged.load("model.layers.0.self_attn.o_proj.weight").unwrap();
                Ok(merged.notices())
            }
            Err(error) => Err(error.to_string()),
        }
    };
    let refused = |settings: Value, tensors: &[_], words: &str| {
        let told = open(settings.clone(), tensors).unwrap_err();
        assert!(told.contains(words), "{settings}: {told}");
    };
    let mut dora = good.clone();
    dora.push((format!("{module}.lora_magnitude_vector"), vec![32], vec![1.0; 32]));
    refused(json!({"use_dora": true}), &good, "has no lora_magnitude_vector; the adapter is incomplete");
    refused(json!({"use_dora": false}), &dora, "adapter_config.json does not say use_dora");
    refused(json!({}), &[], "it holds no tensor");
    let divided: Vec<_> = good.iter().map(|(name, _, _)| (name.clone(), vec![0], Vec::new())).collect();
    refused(json!({}), &divided, "save the adapter again with stage3_gather_16bit_weights_on_model_save");
    for kind in ["ADALORA", "VERA", "LOKR", "OFT", "PREFIX_TUNING", "LN_TUNING"] {
        refused(json!({"peft_type": kind}), &good, &format!("peft_type is {kind}, and only LORA"));
    }
    for start in ["loftq", "pissa_niter_4", "olora", "corda", "lora_ga"] {
        refused(json!({"init_lora_weights": start}), &good, &format!("init_lora_weights is `{start}`"));
    }
    refused(json!({"use_rslora": "false"}), &good, "use_rslora is \"false\", expected true or false");
    refused(json!({"use_qalora": true}), &good, "use_qalora is set");
    refused(json!({"r": null}), &good, "r is null, expected a positive number");
    refused(
        json!({"layers_to_transform": [1]}),
        &good,
        "layers_to_transform in adapter_config.json lists other layers",
    );
    let wrapped = product("base_model.model.model.language_model.layers.0.self_attn.o_proj", 4, [32, 32]);
    let strange = product("model.layers.0.self_attn.o_proj", 4, [32, 32]);

    let none: [&str; 0] = [];
    let mut idle = good.clone();
    idle[1].2.fill(0.0);
    let eight = product(module, 8, [32, 32]);
    let mut block = good.clone();
    block.push(("base_model.model.model.layers.1.self_attn.o_proj.weight".to_owned(), vec![32, 32], vec![0.5; 1024]));
    for (settings, tensors, notes) in [
        (json!({"use_dora": true}), &dora, &none[..]),
        (
            json!({"init_lora_weights": "mica", "exclude_modules": ["q_proj"], "megatron_config": {"a": 1}}),
            &good,
            &none,
        ),
        (
            json!({"base_model_name_or_path": "someone/Llama_Untied_GQA", "target_modules": ["o_proj"], "layers_to_transform": [0]}),
            &good,
            &none,
        ),
        (
            json!({"target_modules": ["o_proj"]}),
            &good,
            &["has no factors for 1 of the modules that target_modules names"],
        ),
        (
            json!({"target_modules": r"model\.layers\.\d+\.self_attn\.(q|o)_proj", "layers_to_transform": [0]}),
            &good,
            &none,
        ),
        (json!({"target_modules": "all-linear", "modules_to_save": null}), &good, &none),
        (json!({"base_model_name_or_path": "someone/Other"}), &good, &["trained on `someone/Other`"]),
        (
            json!({"lora_alpha": 0}),
            &good,
            &["1 of the adapter's 1 modules (`model.layers.0.self_attn.o_proj`) change nothing"],
        ),
        (json!({}), &idle, &["change nothing"]),
        (
            json!({"target_modules": ["v_proj", "o_proj", "j_proj"], "layers_to_transform": 0}),
            &good,
            &["lists `v_proj`, `j_proj` in target_modules"],
        ),
        (json!({"modules_to_save": ["lm_head"]}), &good, &["lists `lm_head` in modules_to_save"]),
        (json!({"modules_to_save": ["self_attn"]}), &block, &none),
        (json!({"layers_to_transform": 0}), &good, &none),
        (json!({}), &strange, &["are not called as PEFT calls them"]),
        (
            json!({"target_modules": ["q_proj"]}),
            &good,
            &["does not name 1 of the adapter's 1 modules", "lists `q_proj`"],
        ),
        (
            json!({"target_modules": ".*q_proj"}),
            &good,
            &["does not name 1 of the adapter's 1 modules", "in target_modules"],
        ),
        (
            json!({"target_modules": ["o_proj"], "exclude_modules": ["o_proj"]}),
            &good,
            &["does not name 1 of the adapter's 1 modules"],
        ),
        (
            json!({"target_modules": "all-linear", "exclude_modules": ".*_proj"}),
            &good,
            &["or excludes them, and PEFT would leave them out"],
        ),
        (json!({}), &wrapped, &["are not called as PEFT calls them"]),
    ] {
        let found = open(settings.clone(), tensors).unwrap();
        assert_eq!(found.len(), notes.len(), "{settings}: {found:?}");
        assert!(found.iter().zip(notes).all(|(found, words)| found.contains(words)), "{settings}: {found:?}");
    }
    // A head that is the embedding is a module of its own to PEFT, which no tensor is called after.
    let tied = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/llama_tied");
    let vocabulary = Checkpoint::open(&tied).unwrap().load("model.embed_tokens.weight").unwrap().len() / 32;
    let room = tempfile::tempdir().unwrap();
    adapter(room.path(), &json!({}), &borrowed(&product("base_model.model.lm_head", 4, [vocabulary, 32])));
    let told = Checkpoint::open_with(&tied, Some(room.path())).unwrap().notices();
    assert!(!told.iter().any(|note| note.contains("as PEFT calls them")), "{told:?}");
    // Without `r` it is PEFT's 8.
    let room = tempfile::tempdir().unwrap();
    adapter(room.path(), &json!({}), &borrowed(&eight));
    std::fs::write(room.path().join("adapter_config.json"), r#"{"peft_type": "LORA"}"#).unwrap();
    assert!(Checkpoint::open_with(&base, Some(room.path())).is_ok());
}

#[test]
fn a_model_for_which_all_tokens_are_alike_is_broken() {
    let room = Room::new();
    let model = room.model();
    scale(&model, "model.norm.weight", 0.0);
    let broken = ["model: every token of the vocabulary is given the same probability"];
    room.run(["eval", "model", "--context", "64", "--windows", "1"]).refuses(1, &broken);
    let limits =
        ["--method", "rtn", "--group-size", "64", "--verify-windows", "1", "--max-kld", "0.1", "--min-top1", "0.5"];
    room.run(["quantize", "model", "-o", "out"].iter().chain(&limits)).refuses(1, &broken);
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn a_calibration_text_that_is_not_read_is_told() {
    let room = Room::new();
    room.model();
    for output in ["out", "out.gguf"] {
        let scheme = if output == "out" { ["--group-size", "64"] } else { ["--scheme", "F16"] };
        let run = room.run(
            [
                "quantize",
                "model",
                "-o",
                output,
                "--method",
                "rtn",
                "--verify-text",
                "none",
                "--calibration",
                "gone.txt",
            ]
            .iter()
            .chain(&scheme),
        );
        run.succeeds();
        assert!(run.stderr().contains("calibration has no effect"), "{}", run.stderr());
    }
}

#[test]
fn experts_that_are_not_quantized_alike_are_told() {
    let room = checkpoint("mixtral_plain");
    let outputs = Room::new();
    let notes = |toml: &str| {
        let report = quantize(room.path(), &outputs.path("out"), &format!("method = 'rtn'\ngroup_size = 32\n{toml}"));
        report.unwrap().notes.join("; ")
    };
    let ignore = "ignore = ['re:.*experts\\.0\\..*']";
    assert!(!notes("format = 'gptq'").contains("not all quantized alike"));
    let told = notes(&format!("format = 'gptq'\n{ignore}"));
    let at = "`model.layers.0.block_sparse_moe`";
    assert!(told.contains(&format!("the experts of {at} are not all quantized alike")), "{told}");
}

#[test]
fn an_adapter_beside_the_weights_is_told_by_every_command() {
    let room = Room::new();
    let model = room.model();
    std::fs::write(model.path("adapter_config.json"), "{}").unwrap();
    std::fs::write(model.path("adapter_model.safetensors"), "x").unwrap();
    for args in ["inspect model", "eval model --context 64 --windows 1", "convert model -o out"] {
        let run = room.run(args.split(' '));
        run.succeeds();
        assert!(run.stderr().contains("model holds an adapter beside its weights"), "{args}: {}", run.stderr());
    }
}

#[test]
fn plain_halves_that_are_too_small_or_too_large_are_told() {
    const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
    let room = Room::new();
    let model = room.model();
    let fill = |bits: u16| {
        model.weights(|header, data| {
            let ends: Vec<usize> = serde_json::from_value(header[DOWN]["data_offsets"].clone()).unwrap();
            data[ends[0]..ends[1]].chunks_exact_mut(2).for_each(|at| at.copy_from_slice(&bits.to_le_bytes()));
        });
    };
    let convert = |dtype: &'static str| room.run(["convert", "model", "-o", dtype, "--dtype", dtype]);
    // 1e-10, of which half precision keeps nothing.
    fill(0x2edc);
    for (dtype, told) in [("f16", true), ("f32", false)] {
        let run = convert(dtype);
        run.succeeds();
        let words = format!("the weights of 1 tensors (`{DOWN}`) are too small for half precision: up to 100 %");
        assert_eq!(run.stderr().contains(&words), told, "{}", run.stderr());
    }
    std::fs::remove_dir_all(room.path("f16")).unwrap();
    // 1e10, which it cannot hold.
    fill(0x5015);
    convert("f16").refuses(1, &["model.safetensors", DOWN, "F16's largest", "--dtype bf16 or f32"]);
}

/// One row in several hundred may be what another one makes up for.
#[test]
fn a_single_row_that_is_too_small_for_its_scales_is_told() {
    const UP: &str = "model.layers.1.mlp.up_proj";
    let room = Room::new();
    room.model().weights(|header, data| {
        let tensor = &header[&format!("{UP}.weight")];
        let ends: Vec<usize> = serde_json::from_value(tensor["data_offsets"].clone()).unwrap();
        let row = 2 * tensor["shape"][1].as_u64().unwrap() as usize;
        data[ends[0]..ends[0] + row].chunks_exact_mut(2).for_each(|at| at.copy_from_slice(&0x2edcu16.to_le_bytes()));
    });
    for more in ["-o out --group-size 64", "-o out.gguf --scheme Q8_0", "-o out-mlx --format mlx"] {
        let run = room.run(format!("quantize model {more} --method rtn --verify-text none").split_whitespace());
        run.succeeds();
        let words = format!("the weights of 1 tensors (`{UP}`) are too small for scales in half precision: up to 0.");
        assert!(run.stderr().contains(&words), "{more}: {}", run.stderr());
    }
}

#[test]
fn weights_that_the_configuration_looks_for_elsewhere_are_refused() {
    let room = Room::new();
    let model = room.model();
    std::fs::copy(model.path("model.safetensors"), model.path("alt.safetensors")).unwrap();
    model.config(|config| config["transformers_weights"] = json!("alt.safetensors"));
    room.run(["inspect", "model"]).refuses(1, &["model/config.json: transformers_weights", "alt.safetensors"]);
    model.config(|config| config["transformers_weights"] = json!("model.safetensors"));
    room.run(["inspect", "model"]).succeeds();
}
