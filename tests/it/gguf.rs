//! GGUF files: written from a checkpoint, read back as the same model.

use std::path::{Path, PathBuf};

use formats::{GgmlType, GgufFile, Imatrix};
use kernels::Cpu;
use quantc::Checkpoint;
use quantc::job::{Job, Verification};
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request};
use quantc::report::{Activations, Limits, Protocol, Report};
use quantc::text::{ModelText, load_text};
use quantc::verify::evaluate;

use crate::harness::{Room, TEXT};
use crate::pipeline::model;

fn job<'a>(model: &'a Path, output: &Path, toml: &str) -> quantc::Result<Job<'a>> {
    let defaults: Request = toml::from_str("format = 'gguf'\nsamples = 4\nseq_len = 256").unwrap();
    let request: Request = toml::from_str(toml).unwrap();
    let verification =
        Verification { text: "held-out".to_owned(), context: 128, windows: Some(4), limits: Limits::default() };
    Ok(Job::one(model, output, Recipe::resolve(request.or(defaults))?, Some(verification), false))
}

fn run(model: &Path, output: &Path, toml: &str) -> quantc::Result<Report> {
    job(model, output, toml)?.run_one(&Cpu::default(), &mut Progress::new(true))
}

fn types(path: &Path) -> Vec<(String, GgmlType)> {
    GgufFile::open(path).unwrap().tensors().iter().map(|t| (t.name.clone(), t.ty)).collect()
}

/// Each mix with the most that it may lose; a wrong row order, a wrong scale or a swapped nibble costs nats.
const BARS: &[(&str, f64)] = &[
    ("F32", 1e-9),
    ("F16", 1e-6),
    ("BF16", 1e-6),
    ("Q8_0", 5e-4),
    ("Q6_K", 2e-3),
    ("Q5_K_M", 0.01),
    ("Q5_1", 0.01),
    ("Q4_K_M", 0.03),
    ("Q4_0", 0.05),
    ("IQ4_XS", 0.04),
    ("Q3_K_M", 0.06),
    ("Q2_K", 0.25),
    ("TQ2_0", 6.0),
];

#[test]
fn every_mix_keeps_the_model_and_gptq_keeps_more_of_it() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    let at = |mix: &str, method: &str| room.path().join(format!("{mix}-{method}.gguf"));
    // All mixes of a method by one run, which measures the original once.
    let losses = |method: &str, mixes: &[&str]| -> Vec<f64> {
        let jobs: Vec<Job<'_>> = mixes
            .iter()
            .map(|mix| job(&model, &at(mix, method), &format!("scheme = '{mix}'\nmethod = '{method}'")).unwrap())
            .collect();
        let outputs = jobs.iter().flat_map(|job| job.outputs.clone()).collect();
        let job = Job { outputs, independent: true, ..jobs[0].clone() };
        let reports = job.run(&Cpu::default(), &mut Progress::new(true)).unwrap();
        let loss = |(report, mix): (Report, &&str)| {
            assert!(report.linears.iter().all(|l| l.fallback.is_none()), "{mix}");
            assert_eq!(report.linears.len(), 28);
            report.quality.unwrap().beside.unwrap().kld_mean
        };
        reports.into_iter().zip(mixes).map(loss).collect()
    };
    let mixes: Vec<&str> = BARS.iter().map(|(mix, _)| *mix).collect();
    let rounded = losses("rtn", &mixes);
    for ((mix, bar), rounded) in BARS.iter().zip(&rounded) {
        assert!(rounded < bar, "{mix}: KL {rounded}");
    }
    let swept = ["Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "Q2_K"];
    for (mix, swept) in swept.iter().zip(losses("gptq", &swept)) {
        let rounded = rounded[mixes.iter().position(|known| known == mix).unwrap()];
        assert!(swept < 0.85 * rounded, "{mix}: KL {swept} after {rounded}");
        assert_eq!(types(&at(mix, "rtn")).len(), types(&at(mix, "gptq")).len());
    }
    // What is not quantized is the model itself, to the bit, under the same names and in the same order of rows.
    let (plain, original) = (Checkpoint::open(&at("F32", "rtn")).unwrap(), Checkpoint::open(&model).unwrap());
    for entry in original.entries() {
        assert_eq!(plain.load(&entry.name).unwrap(), original.load(&entry.name).unwrap(), "{}", entry.name);
    }
    assert_eq!(plain.entries().len(), original.entries().len());
}

#[test]
fn the_same_bytes_for_any_number_of_threads() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    let bytes = |threads: usize, name: &str| {
        let path = room.path().join(name);
        let pool = rayon_pool(threads);
        pool.install(|| {
            run(&model, &path, &format!("scheme = 'Q4_K_M'\nsamples = 2\nseq_len = 64\ncalibration = '{TEXT}'"))
        })
        .unwrap();
        std::fs::read(path).unwrap()
    };
    let first = bytes(1, "a.gguf");
    assert!(first == bytes(3, "b.gguf") && first == bytes(2, "c.gguf"));
}

fn rayon_pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

#[test]
fn types_are_chosen_by_name_and_by_hand() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    let path = room.path().join("m.gguf");
    run(
        &model,
        &path,
        "scheme = 'Q4_K_M'\nmethod = 'rtn'\ntensor_type = ['blk\\.0\\.attn_q=Q6_K']\ntoken_embedding_type = 'Q8_0'\nignore = ['re:.*layers.1.mlp.up_proj']",
    )
    .unwrap();
    let types = types(&path);
    let of = |name: &str| types.iter().find(|(n, _)| n == name).unwrap().1.name;
    assert_eq!(of("blk.0.attn_q.weight"), "Q6_K");
    assert_eq!(of("blk.1.attn_q.weight"), "Q4_K");
    assert_eq!(of("token_embd.weight"), "Q8_0");
    assert_eq!(of("blk.1.ffn_up.weight"), "BF16");
    assert_eq!(of("blk.0.attn_norm.weight"), "F32");
    for (toml, expected) in [
        ("tensor_type = ['no_such_tensor=Q6_K']", "no_such_tensor"),
        ("tensor_type = ['attn_q=Q9_X']", "Q9_X"),
        ("ignore = ['no_such_linear']", "matches no linear"),
    ] {
        let error = run(&model, &room.path().join("n.gguf"), toml).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.exit_code(), 2, "{error}");
    }
    assert!(!room.path().join("n.gguf").exists());
    let named = format!("scheme = 'Q8_0'\npre = 'no-such-pre'\ncalibration = '{TEXT}'");
    let report = run(&model, &room.path().join("p.gguf"), &named).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("`no-such-pre` is no pre-tokenizer")), "{:?}", report.notes);
}

#[test]
fn importance_goes_to_a_file_and_comes_from_one() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    let at = |name: &str| room.path().join(name);
    let imatrix = at("imatrix.gguf");
    let collect = format!("scheme = 'Q3_K_M'\nmethod = 'rtn'\nsave_imatrix = '{}'", imatrix.display());
    run(&model, &at("a.gguf"), &collect).unwrap();
    let read = Imatrix::read(&imatrix).unwrap();
    assert_eq!(read.entries.len(), 28);
    let importance = read.importance("blk.0.attn_q.weight", 256).unwrap().unwrap();
    assert!(importance.iter().all(|x| x.is_finite() && *x >= 0.0) && importance.iter().any(|x| *x > 0.0));

    // The float model's own inputs: rounding does not change what was collected before it, so block 0 is the same.
    let read_back = format!("scheme = 'Q3_K_M'\nimatrix = '{}'", imatrix.display());
    let report = run(&model, &at("b.gguf"), &read_back).unwrap();
    assert!(report.linears.iter().all(|l| l.method == "rtn" && l.tokens == 0));
    let first = |path: PathBuf| GgufFile::open(path).unwrap().get("blk.0.attn_q.weight").unwrap().data.to_vec();
    assert_eq!(first(at("a.gguf")), first(at("b.gguf")));
    let file = GgufFile::open(at("b.gguf")).unwrap();
    assert_eq!(file.count("quantize.imatrix.entries_count").unwrap(), Some(28));
    let plain = run(&model, &at("c.gguf"), "scheme = 'Q3_K_M'\nmethod = 'rtn'").unwrap();
    let loss = |report: &Report| report.quality.as_ref().unwrap().beside.as_ref().unwrap().kld_mean;
    assert!(loss(&report) < loss(&plain), "{} with importance, {} without", loss(&report), loss(&plain));

    // What is there is not lost, and that is told before anything is written.
    let kept = std::fs::read(&imatrix).unwrap();
    let error = run(&model, &at("d.gguf"), &collect).unwrap_err();
    assert!(error.to_string().contains("imatrix.gguf: exists already; --force replaces it"), "{error}");
    assert_eq!(error.exit_code(), 2);
    assert!(!at("d.gguf").exists() && std::fs::read(&imatrix).unwrap() == kept);
}

#[test]
fn a_file_in_parts_is_the_same_model() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    let whole = room.path().join("w.gguf");
    run(&model, &whole, "scheme = 'Q4_0'\nmethod = 'rtn'").unwrap();
    let report =
        run(&model, &room.path().join("s.gguf"), "scheme = 'Q4_0'\nmethod = 'rtn'\nsplit_max_size = '1M'").unwrap();
    assert!(report.outputs.len() > 2, "{:?}", report.outputs);
    assert!(report.outputs[0].name.starts_with("s-00001-of-0000"), "{}", report.outputs[0].name);
    let parts = Checkpoint::open(&room.path().join(&report.outputs[0].name)).unwrap();
    let whole = Checkpoint::open(&whole).unwrap();
    for entry in whole.entries() {
        assert_eq!(parts.load(&entry.name).unwrap(), whole.load(&entry.name).unwrap());
    }
    assert!(room.path().join("s.gguf.report.json").exists());
    let card = std::fs::read_to_string(room.path().join("s.gguf.README.md")).unwrap();
    assert!(card.contains(&format!("llama-cli -m {}\n", report.outputs[0].name)) && !card.contains("Ollama"), "{card}");
}

/// What llama-perplexity prints for files of the built-in model that were written without calibration, on the first eight
/// windows of the held-out text: `-c 512 --chunks 8`, llama.cpp of llama-cpp-python 0.3.36, on a CPU with AVX-512.
const LLAMA_PERPLEXITY: &[(&str, f64)] = &[
    ("F16", 74.1202),
    ("Q4_0", 75.1957),
    ("Q5_1", 74.8240),
    ("Q6_K", 74.3706),
    ("Q2_K", 78.9534),
    ("IQ4_NL", 74.4171),
];

#[test]
fn perplexity_is_what_llama_perplexity_prints() {
    let room = tempfile::tempdir().unwrap();
    let model = model(room.path());
    for (mix, printed) in LLAMA_PERPLEXITY {
        let path = room.path().join(format!("{mix}.gguf"));
        let recipe = format!("scheme = '{mix}'\nmethod = 'rtn'");
        let request: Request = toml::from_str(&recipe).unwrap();
        let request = request.or(toml::from_str("format = 'gguf'").unwrap());
        let recipe = Recipe::resolve(request).unwrap();
        let job = Job::one(&model, &path, recipe, None, false);
        job.run_one(&Cpu::default(), &mut Progress::new(true)).unwrap();
        let file = Checkpoint::open(&path).unwrap();
        let text = load_text(concat!(env!("CARGO_MANIFEST_DIR"), "/src/demo/evaluation.txt")).unwrap();
        let tokenizer = ModelText::open(&file).unwrap();
        let ids = tokenizer.evaluation_ids(&text).unwrap();
        let windows =
            calibration::samples::windows(&text.name, &ids, 512, Some(8), tokenizer.tokenizer.added_bos()).unwrap();
        let measure = |activations| {
            let mut progress = Progress::new(true);
            let found =
                evaluate(&Cpu::default(), &file, None, &windows, Protocol::LlamaCpp, activations, &mut progress)
                    .unwrap();
            assert_eq!(found.activations, activations);
            (found.perplexity / printed - 1.0).abs()
        };
        let runtime = measure(Activations::Runtime);
        // Which way a rounding falls depends on the order of sums, in llama.cpp too: with --no-repack its IQ4_NL is 74.3903.
        assert!(runtime < 8e-4, "{mix}: {runtime}");
        // The inputs of one are rounded in blocks of 32, as those of Q5_1 and IQ4_NL are, and of the other in blocks of 256.
        if matches!(*mix, "Q4_0" | "Q6_K") {
            let exact = measure(Activations::Exact);
            assert!(exact > 1e-3, "{mix}: {runtime} as the runtime rounds, {exact} exactly");
        }
    }
}

#[test]
fn eval_says_what_it_rounded() {
    let room = Room::new();
    room.model();
    room.run(["quantize", "model", "-o", "m.gguf", "--scheme", "Q4_0", "--method", "rtn", "--verify-text", "none"])
        .succeeds();
    let eval = |flags: &[&str]| {
        let fixed = ["eval", "m.gguf", "--context", "128", "--windows", "1", "--json"];
        let run = room.run(fixed.iter().chain(flags));
        run.succeeds();
        let found: serde_json::Value = serde_json::from_str(&run.stdout()).unwrap();
        (found["activations"].as_str().unwrap().to_owned(), found["perplexity"].as_f64().unwrap())
    };
    let (said, exact) = eval(&["--protocol", "llama.cpp", "--activations", "exact"]);
    assert_eq!(said, "exact");
    let (said, rounded) = eval(&["--protocol", "llama.cpp"]);
    assert_eq!(said, "runtime");
    assert!(exact != rounded && (exact / rounded - 1.0).abs() < 0.02, "{exact} and {rounded}");
    // Comparisons are of the files, unless asked otherwise.
    let (said, beside) = eval(&["--protocol", "llama.cpp", "--reference", "model"]);
    assert_eq!((said.as_str(), beside), ("exact", exact));
    let (said, beside) = eval(&["--protocol", "llama.cpp", "--reference", "model", "--activations", "runtime"]);
    assert_eq!((said.as_str(), beside), ("runtime", rounded));
    assert_eq!(eval(&[]).0, "exact");
    room.run(["eval", "model", "--windows", "1", "--activations", "runtime"])
        .refuses(2, &["--activations", "GGUF", "model"]);
    room.run(["eval", "m.gguf", "--activations", "x"]).refuses(2, &["exact, runtime"]);
}
