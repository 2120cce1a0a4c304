//! Every family in every layout: written, read back, and still the model. The table in docs/models.md is what came out.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use kernels::Cpu;
use quantc::Checkpoint;
use quantc::convert::convert;
use quantc::job::{Asked, Job, Verification};
use quantc::progress::Progress;
use quantc::recipe::UnknownTensors;
use quantc::recipe::{Recipe, Request};
use quantc::report::{Fate, Limits, LinearReport, Report};
use quantc::stray::Strays;
use serde_json::{Value, json};

use crate::families::{checkpoint, each};
use crate::golden::{golden, logits};
use crate::plan::check;

/// Gives a checkpoint a tokenizer of words, and writes a text of them.
pub fn speak(folder: &Path) {
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let size = config.get("text_config").unwrap_or(&config)["vocab_size"].as_u64().unwrap();
    let words: serde_json::Map<String, Value> = (0..size).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        format!("w{}", (state >> 33) % size)
    };
    let text: Vec<String> = (0..4096).map(|_| word()).collect();
    std::fs::write(folder.join("text.txt"), text.join(" ")).unwrap();
}

/// What became of a model, on words of its own; a recipe's `samples` are 32 unless it says otherwise.
fn quantize(model: &Path, output: &Path, toml: &str) -> quantc::Result<Report> {
    let text = model.join("text.txt").display().to_string();
    let request: Request = toml::from_str(toml).unwrap();
    let common = format!("calibration = '{text}'\nsamples = 32\nseq_len = 24\ngroup_size = 32");
    let recipe = Recipe::resolve(request.or(toml::from_str(&common).unwrap())).unwrap();
    let limits = Limits::default();
    let verification = Some(Verification { text, context: 24, windows: Some(16), limits });
    let job = Job::one(model, output, recipe, verification, false);
    let planned = job.plan(&Cpu::exact(), &Asked { named: true, ..Asked::default() }, &Progress::new(true))?;
    let report = job.run_one(&Cpu::exact(), &mut Progress::new(true))?;
    check(&planned.outputs[0], &report);
    // The tiny checkpoints have every linear where their classes have it.
    let elsewhere = |note: &String| note.contains("have no linears in") || note.contains("names the class");
    assert!(!report.notes.iter().any(elsewhere), "{}: {:?}", model.display(), report.notes);
    Ok(report)
}

fn divergence(report: &Report) -> f64 {
    report.quality.as_ref().unwrap().beside.as_ref().unwrap().kld_mean
}

/// What a layout makes of a model: how it is there, or why it is not.
type Cell = Option<Result<String, String>>;

/// A row of the table.
#[derive(Default)]
struct Family {
    checkpoints: Vec<String>,
    layouts: [Cell; 4],
}

#[test]
fn every_family_is_written_in_every_layout_and_read_back() {
    // Some of them alone: parts of their names, divided by commas. The table is not compared then.
    let only = std::env::var("QUANTC_FAMILY").ok();
    let mut names = crate::families::names();
    names.retain(|name| only.as_ref().is_none_or(|only| only.split(',').any(|part| name.contains(part))));
    let mut families: BTreeMap<&str, Family> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (name, (id, layouts, own)) in names.iter().zip(each(&names, in_every_layout)) {
        let family = families.entry(id).or_default();
        family.checkpoints.push(name.clone());
        // Sizes that no real model has are refused; another checkpoint of the family has others.
        for (cell, found) in family.layouts.iter_mut().zip(layouts) {
            if cell.is_none() || matches!(found, Some(Ok(_))) {
                *cell = found;
            }
        }
        wrong.extend(own);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    compare(&families, only.is_some());
}

/// The family of a checkpoint, its cells of the table, and what is wrong.
fn in_every_layout(name: &str) -> (&'static str, [Cell; 4], Vec<String>) {
    let outputs = tempfile::tempdir().unwrap();
    let room = checkpoint(name);
    speak(room.path());
    let graph = quantc::families::graph_of(&Checkpoint::open(room.path()).unwrap()).unwrap();
    let mut layouts: [Cell; 4] = Default::default();
    let mut wrong = Vec::new();
    for (column, (format, settings, most)) in [
        ("compressed-tensors", "scheme = 'W8A16'\nmethod = 'gptq'", 0.005),
        ("gptq", "scheme = 'W8A16'\nmethod = 'awq+gptq'", 0.005),
        ("awq", "scheme = 'W4A16_ASYM'\nmethod = 'awq'", 0.5),
    ]
    .into_iter()
    .enumerate()
    {
        // A few samples and windows: a layout that is read otherwise than it was written is another model on any of them.
        let settings = format!("format = '{format}'\n{settings}\nsamples = 16");
        let [output, plain] = ["quantized", "plain"].map(|kind| outputs.path().join(format!("{format}-{kind}")));
        let result = quantize(room.path(), &output, &settings);
        if result.is_ok() {
            convert(&output, &plain, Some(formats::Dtype::F32), UnknownTensors::Copy, false).unwrap();
            let (sequences, _) = golden(&crate::families::folder().join(name));
            let [a, b] = [&output, &plain].map(|folder| logits(folder, &sequences).unwrap());
            assert_eq!(a, b, "{name}: plain weights are the quantized ones");
            let shapes = |path: &Path| {
                let opened = Checkpoint::open(path).unwrap();
                let left = |name: &String| Strays::new(&graph, &opened, UnknownTensors::Refuse).fate(name);
                let kept = opened.entries().iter().filter(|e| !matches!(left(&e.name), Ok(Fate::Dropped(_))));
                kept.map(|e| (e.name.clone(), e.shape.clone())).collect::<BTreeMap<_, _>>()
            };
            assert_eq!(shapes(&plain), shapes(room.path()), "{name}: plain weights lie as the original's");
        }
        match result.map(|report| divergence(&report)).map_err(|error| error.to_string()) {
            Ok(kld) if kld <= most => layouts[column] = Some(Ok("yes".to_owned())),
            Err(why) if why.contains("cannot hold it: ") => {
                let why = why.split_once("cannot hold it: ").unwrap().1;
                layouts[column] = Some(Err(why.split(';').next().unwrap().to_owned()));
            }
            other => wrong.push(format!("{name} {format}: {other:?}")),
        }
    }
    let gguf = quantc::dialect::names::plan(&graph);
    layouts[3] = Some(match gguf {
        Ok(plan) => Ok(format!("`{}`", plan.architecture)),
        Err(why) => Err(why.to_string().split(';').next().unwrap().to_owned()),
    });
    (graph.family, layouts, wrong)
}

/// Compares the table with the one in docs/models.md, or writes it there; of families that were left out, if `some` were, the rows stay.
fn compare(families: &BTreeMap<&str, Family>, some: bool) {
    const MARKS: [&str; 2] = ["<!-- families -->\n", "<!-- end of families -->"];
    let mut table = "| family | `model_type` | compressed-tensors | GPTQ | AWQ | GGUF | tiny checkpoints |\n|---|---|---|---|---|---|---|\n".to_owned();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/models.md");
    let text = std::fs::read_to_string(&path).unwrap();
    for family in quantc::families::FAMILIES {
        let Some(found) = families.get(family.id) else {
            assert!(some, "{} has no tiny checkpoint", family.id);
            let row = text.lines().find(|line| line.starts_with(&format!("| {} |", family.id)));
            row.into_iter().for_each(|row| writeln!(table, "{row}").unwrap());
            continue;
        };
        let kinds: Vec<String> = family.model_types.iter().map(|kind| format!("`{kind}`")).collect();
        let said = |cell: &'_ Cell| cell.clone().map_or_else(String::new, |cell| cell.unwrap_or_else(|why| why));
        let [a, b, c, d] = found.layouts.each_ref().map(said);
        let own = |name: &String| name.strip_prefix(&format!("{}_", family.id)).unwrap_or(name).replace('_', " ");
        let checkpoints: Vec<String> = found.checkpoints.iter().map(own).collect();
        let (kinds, checkpoints) = (kinds.join(", "), checkpoints.join(", "));
        writeln!(table, "| {} | {kinds} | {a} | {b} | {c} | {d} | {checkpoints} |", family.id).unwrap();
    }
    let (before, rest) = text.split_once(MARKS[0]).expect("the table's mark");
    let (found, after) = rest.split_once(MARKS[1]).expect("the table's end");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, [before, MARKS[0], &table, MARKS[1], after].concat()).unwrap();
        return;
    }
    assert_eq!(found, table, "docs/models.md is out of date: UPDATE_DOCS=1 cargo test --test it matrix");
}

/// Indexers, and what makes the decays and the gate of a state.
#[test]
fn what_decides_about_much_stays_whole_and_is_named() {
    for (name, at, modules) in [
        ("glm_moe_dsa_shared", "model.layers.0.self_attn.indexer", vec!["wq_b", "wk", "weights_proj"]),
        (
            "kimi_linear_published",
            "model.layers.1.self_attn",
            vec!["b_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"],
        ),
        ("minimax_m3_vl_published", "language_model.model.layers.1.self_attn", vec!["index_q_proj", "index_k_proj"]),
        (
            "glm5_next_vision",
            "model.language_model.layers.0.self_attn",
            vec!["b_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"],
        ),
        ("glm5_next_vision", "model.language_model.layers.2.self_attn.indexer", vec!["wq_b", "wk", "weights_proj"]),
        ("hy_v4_published", "model.layers.1.self_attn.indexer", vec!["wq_b", "wk", "weights_proj"]),
        ("mistral_large4_published", "layers.3.attention.indexer", vec!["wq_b", "wk", "weights_proj"]),
        ("longcat_flash_published", "model.layers.0.mlp", vec!["router.classifier"]),
        ("qwen4_exp_text_plain", "model.layers.2.self_attn.indexer", vec!["index_qk_proj"]),
        ("deepseek_v4_published", "layers.1.attn.compressor", vec!["wkv", "wgate"]),
        (
            "deepseek_v4_published",
            "layers.2.attn.indexer",
            vec!["wq_b", "weights_proj", "compressor.wkv", "compressor.wgate"],
        ),
        (
            "qwen4_exp_text_plain",
            "model.layers.1.attn_hyper_connection",
            vec!["input_mix_weight_down", "input_mix_weight_up", "block_inject_weight"],
        ),
        ("qwen4_exp_vision", "model.language_model.layers.0.linear_attn", vec!["in_proj_b", "in_proj_a"]),
        (
            "qwen4_exp_vision",
            "model.language_model.hyper_connection_mixer",
            vec!["input_mix_weight_down", "input_mix_weight_up"],
        ),
    ] {
        let (room, outputs) = (checkpoint(name), tempfile::tempdir().unwrap());
        speak(room.path());
        let output = outputs.path().join("output");
        quantize(room.path(), &output, "format = 'compressed-tensors'\nscheme = 'W8A16'\nmethod = 'rtn'").unwrap();
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
        let ignored = config["quantization_config"]["ignore"].as_array().unwrap();
        let [before, after] = [room.path(), &output].map(|path| Checkpoint::open(path).unwrap());
        for part in modules {
            // By its name, or by a pattern of those of all layers.
            let (module, pattern) = (format!("{at}.{part}"), format!("\\.{}$", part.replace('.', "\\.")));
            let names = |one: &serde_json::Value| one == &module || one.as_str().unwrap().ends_with(&pattern);
            assert!(ignored.iter().any(names), "{name}: {module}: {ignored:?}");
            let weight = format!("{module}.weight");
            let [one, other] = [&before, &after].map(|source| source.load(&weight).unwrap());
            assert_eq!(one, other, "{name}: {module}");
        }
    }
}

#[test]
fn experts_are_calibrated_on_their_tokens_and_starved_ones_on_their_layer() {
    let names = ["mixtral_plain", "deepseek_v3_plain", "gpt_oss_plain", "llama4_text_plain", "qwen2_moe_plain"];
    each(&names, |name| {
        let room = checkpoint(name);
        speak(room.path());
        let outputs = tempfile::tempdir().unwrap();
        let run = |output: &str, toml: &str| quantize(room.path(), &outputs.path().join(output), toml).unwrap();
        let [rtn, gptq] = ["method = 'rtn'\nobserver = 'mse'", "method = 'gptq'"].map(|toml| run(&toml[10..13], toml));
        assert!(divergence(&gptq) < 0.95 * divergence(&rtn), "{name}: {} {}", divergence(&gptq), divergence(&rtn));

        let starved = run("starved", "samples = 1\nseq_len = 3");
        let expert = |l: &&LinearReport| l.name.contains(".experts.");
        let unseen = starved.linears.iter().filter(expert).filter(|l| l.tokens == 0).count();
        assert!(unseen > 0, "{name}: three tokens cannot reach every expert");
        for linear in starved.linears.iter().filter(expert) {
            assert!(linear.prior.is_some_and(|prior| prior > 0.9), "{name}: {linear:?}");
            assert!(linear.fallback.is_none() && linear.proxy_loss.unwrap().is_finite(), "{name}: {linear:?}");
        }
        assert!(
            starved.notes.iter().any(|note| note.contains(&format!("{unseen} of them none"))),
            "{:?}",
            starved.notes
        );

        let all = run("all", "moe_all_experts = true");
        assert!(all.linears.iter().filter(expert).all(|l| l.tokens == 32 * 24 && l.prior.is_none()), "{name}");
        assert!(divergence(&all) < divergence(&rtn), "{name}");
        let routers = |report: &Report| {
            let written = report.linears.iter().filter(|l| l.name.ends_with("gate") || l.name.ends_with("router"));
            written.count()
        };
        assert_eq!(routers(&all), 0, "{name}: routers are never quantized");
    });
}
