//! Layers that predict further tokens: quantized, kept and left out, in every format, and how often they draft what the model says.
//!
//! That what they compute is what the reference makes of it is in `golden.rs`.

use std::path::Path;

use kernels::Cpu;
use ndarray::Axis;
use quantc::graph::Graph;
use quantc::job::{Job, Verification};
use quantc::progress::{Cancel, Progress, Update};
use quantc::recipe::{Recipe, Request};
use quantc::report::{Activations, Fate, Limits, Report};
use quantc::{Checkpoint, families, forward};
use serde_json::Value;
use tempfile::TempDir;

use crate::families::checkpoint;
use crate::harness::Model;

/// One for each way in which such layers are called and made.
const NAMES: &[&str] = &[
    "qwen3_next_further",
    "qwen3_5_text_further",
    // Experts in stacks, which are written one by one.
    "qwen3_5_moe_text_further",
    "qwen3_5_vision",
    "deepseek_v3_further",
    "deepseek_v3_two",
    "glm4_moe_further",
    "glm4_moe_lite_plain",
    "exaone_moe_further",
    "hy_v3_further",
    "qwen2_mimo",
    "deepseek_v32_further",
    "glm_moe_dsa_further",
    "minimax_m2_further",
    "minimax_m3_vl_further",
    "mimo_v2_flash_further",
    "step3p7_further",
    "bailing_hybrid_further",
    "nemotron_h_further",
    "ernie4_5_moe_further",
    "hy_v4_further",
    "glm5_next_further",
    // They are given every stream, and leave as many.
    "deepseek_v4_further",
    "qwen4_exp_text_further",
    "longcat_flash_further",
];

/// Of which llama.cpp has no such layers.
const NOWHERE: &[&str] =
    &["qwen2_mimo", "minimax_m2_further", "minimax_m3_vl_further", "ernie4_5_moe_further", "hy_v4_further"];

/// Of which it has no class, or none for as many streams or for such tables.
const REFUSED: &[&str] = &["longcat_flash_further", "deepseek_v4_further", "qwen4_exp_text_further"];

fn model(name: &str) -> TempDir {
    let room = checkpoint(name);
    crate::matrix::speak(room.path());
    room
}

fn job<'a>(model: &'a Path, output: &Path, toml: &str) -> Job<'a> {
    let text = model.join("text.txt").display().to_string();
    let request: Request = toml::from_str(toml).unwrap();
    let common = format!("calibration = '{text}'\nsamples = 16\nseq_len = 24");
    let recipe = Recipe::resolve(request.or(toml::from_str(&common).unwrap())).unwrap();
    let verification = Some(Verification { text, context: 24, windows: Some(16), limits: Limits::default() });
    Job::one(model, output, recipe, verification, false)
}

fn quantize(model: &Path, output: &Path, toml: &str) -> Report {
    job(model, output, toml).run_one(&Cpu::exact(), &mut Progress::new(true)).unwrap()
}

/// As [`quantize`], to a GGUF file, of a model whose tokenizer one can hold.
fn gguf(model: &Path, output: &Path, toml: &str) -> Report {
    crate::gguf_families::spell(model);
    let text: String = (0..3000u32).map(|i| char::from(b'!' + (i * i % 9973 % 90) as u8)).collect();
    std::fs::write(model.join("text.txt"), text).unwrap();
    quantize(model, output, &format!("format = 'gguf'\n{toml}"))
}

/// The tokens that a model would say behind each of a text, and those that each layer of it drafts.
fn said_and_drafted(path: &Path, sequence: &[u32]) -> (Vec<usize>, Vec<Vec<usize>>) {
    let (cpu, source) = (Cpu::exact(), Checkpoint::open(path).unwrap());
    let graph = families::graph_of(&source).unwrap();
    let texts = [sequence.to_vec()];
    let hidden = forward::final_hidden(&cpu, &graph, &source, &texts, Activations::Exact, true, &|_| Ok(())).unwrap();
    let likeliest = |graph: &Graph, mut hidden: Vec<_>| -> Vec<usize> {
        let head = forward::LoadedHead::of(&cpu, graph, &source, Activations::Exact).unwrap();
        let logits = head.logits(&cpu, hidden.remove(0), usize::MAX).unwrap();
        let first = |row: ndarray::ArrayView1<'_, f32>| {
            (0..row.len()).rev().max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap()
        };
        logits.axis_iter(Axis(0)).map(first).collect()
    };
    let mut drafted = Vec::new();
    for (block, hidden) in graph.predictors().iter().zip(hidden.further) {
        let mut own = graph.without_blocks();
        if let Some(linear) = &block.further().unwrap().head {
            (own.head.linear, own.head.tied) = (linear.clone(), false);
        }
        drafted.push(likeliest(&own, hidden));
    }
    (likeliest(&graph, hidden.normed), drafted)
}

/// Shares of drafted tokens that are what the model says, over windows of 24 tokens of a text of words, counted in the plainest way.
fn agreement(path: &Path, text: &Path) -> Vec<(usize, usize)> {
    let words = std::fs::read_to_string(text).unwrap();
    let ids: Vec<u32> = words.split(' ').map(|word| word[1..].parse().unwrap()).collect();
    let mut found: Vec<(usize, usize)> = Vec::new();
    for window in ids.chunks_exact(24).take(16) {
        let (said, drafted) = said_and_drafted(path, window);
        found.resize(drafted.len(), (0, 0));
        for (layer, drafted) in drafted.iter().enumerate() {
            // What the last token is followed by is not scored.
            for (at, token) in drafted.iter().enumerate().take(23 - layer - 1) {
                found[layer].0 += 1;
                found[layer].1 += usize::from(said[at + layer + 1] == *token);
            }
        }
    }
    found
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

#[test]
fn they_are_quantized_and_measured_as_the_rest_of_the_model() {
    for name in NAMES {
        let (room, outputs) = (model(name), tempfile::tempdir().unwrap());
        let output = outputs.path().join("out");
        let report = quantize(room.path(), &output, "scheme = 'W8A16'\nmethod = 'awq+gptq'\ngroup_size = 32");
        let graph = families::graph_of(&Checkpoint::open(room.path()).unwrap()).unwrap();
        assert!(!graph.predictors().is_empty(), "{name}");
        let ignored = config(&output)["quantization_config"]["ignore"].to_string();
        for block in graph.predictors() {
            let further = block.further().unwrap();
            for linear in block.linears() {
                let quantized = report.linears.iter().any(|found| found.name == linear.module);
                // vLLM and SGLang load codes of all but the projection, and vLLM none of some linears of attention.
                let joins = further.joining.linears().iter().any(|joining| joining.module == linear.module);
                let left: &[&str] = match graph.family {
                    "mimo_v2_flash" => &["self_attn.o_proj"],
                    "glm5_next" => &["self_attn"],
                    "minimax_m3" => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                    _ => &[],
                };
                let left = left.iter().any(|part| linear.module.contains(part));
                assert_eq!(quantized, !joins && !left && !further.whole, "{name}: {}", linear.module);
            }
            // All of it is left out as a part of the model.
            if further.whole {
                assert!(ignored.contains("mtp\\\\..*"), "{name}: {ignored}");
                continue;
            }
            let left = further.joining.linears().into_iter().chain(&further.head);
            let left = left.chain(further.ending.iter().flat_map(|ending| ending.linears()));
            for left in left.map(|linear| &linear.module) {
                // Of numbered layers, and in a part of a larger model, by an expression.
                let (parent, last) = left.rsplit_once('.').unwrap();
                let last = last.trim_start_matches(|c: char| c.is_numeric());
                let own = left.trim_start_matches("model.").replace('.', "\\\\.");
                let said = [format!("\"{left}\""), format!("\\\\.{last}$\""), format!(")?{own}$\"")];
                assert!(said.iter().any(|said| ignored.contains(said)), "{name}: {parent} in {ignored}");
            }
        }
        let quality = report.quality.as_ref().unwrap();
        let [own, before] = [&output, room.path()].map(|path| agreement(path, &room.path().join("text.txt")));
        assert_eq!(quality.further.len(), graph.predictors().len(), "{name}");
        for (found, ((tokens, agreed), (_, before))) in quality.further.iter().zip(own.into_iter().zip(before)) {
            let share = |count: usize| count as f64 / tokens as f64;
            assert_eq!((found.tokens, found.agreement), (tokens, share(agreed)), "{name}");
            assert_eq!(found.reference_agreement, Some(share(before)), "{name}");
            // Of random layers they are few, and of eight bits hardly any are others.
            assert!((found.agreement - share(before)).abs() < 0.05, "{name}: {found:?}");
        }
        // What they draft is nearly what it was, too.
        let ids: Vec<u32> = (3..27).map(|i| i * 7 % 90).collect();
        let [(_, a), (_, b)] = [&output, room.path()].map(|path| said_and_drafted(path, &ids));
        let same = a.iter().flatten().zip(b.iter().flatten()).filter(|(a, b)| a == b).count();
        assert!(10 * same >= 8 * a.iter().map(Vec::len).sum::<usize>(), "{name}: {same}");
    }
}

#[test]
fn they_are_kept_or_left_out_where_that_is_asked_for() {
    for name in NAMES {
        let (room, outputs) = (model(name), tempfile::tempdir().unwrap());
        let (kept, dropped) = (outputs.path().join("kept"), outputs.path().join("dropped"));
        let source = Checkpoint::open(room.path()).unwrap();
        let prefixes = families::graph_of(&source).unwrap().of_predictors();
        let own = |entry: &str| prefixes.iter().any(|prefix| entry.starts_with(prefix));
        let names: Vec<&str> =
            source.entries().iter().map(|entry| &entry.name[..]).filter(|entry| own(entry)).collect();
        let settings = "scheme = 'W8A16'\nmethod = 'awq+gptq'\ngroup_size = 32\nmtp = 'keep'";
        let report = quantize(room.path(), &kept, settings);
        assert!(report.linears.iter().all(|linear| !own(&linear.name)), "{name}");
        assert!(report.notes.iter().any(|note| note.contains("further tokens are kept as they are")), "{name}");
        let written = Checkpoint::open(&kept).unwrap();
        for tensor in &names {
            assert!(written.raw(tensor).unwrap().data == source.raw(tensor).unwrap().data, "{name}: {tensor}");
        }
        let quality = report.quality.unwrap();
        assert_eq!(quality.further.len(), prefixes.len(), "{name}");
        assert!(quality.further.iter().all(|found| found.reference_agreement.is_some()), "{name}");

        let settings = "scheme = 'W8A16'\nmethod = 'gptq'\ngroup_size = 32\nmtp = 'drop'";
        let report = quantize(room.path(), &dropped, settings);
        let written = Checkpoint::open(&dropped).unwrap();
        assert!(written.entries().iter().all(|entry| !own(&entry.name)), "{name}");
        assert!(report.tensors.iter().filter(|one| own(&one.name)).all(|one| matches!(one.fate, Fate::Dropped(_))));
        assert!(report.notes.iter().any(|note| note.contains("left out, and counted no longer")), "{name}");
        assert!(report.quality.unwrap().further.is_empty(), "{name}");
        let config = config(&dropped);
        for key in ["num_nextn_predict_layers", "mtp_num_hidden_layers"] {
            assert!(config.get(key).is_none_or(|count| *count == 0), "{name}: {config}");
        }
        assert!(!config["quantization_config"].to_string().contains(prefixes[0].trim_end_matches('.')), "{name}");
    }
}

#[test]
fn a_gguf_file_has_them_as_llama_cpp_calls_them() {
    for name in NAMES.iter().filter(|name| !NOWHERE.contains(name) && !REFUSED.contains(name)) {
        let (room, outputs) = (model(name), tempfile::tempdir().unwrap());
        let ids: Vec<u32> = (3..27).map(|i| i * 7 % 90).collect();
        let before = said_and_drafted(room.path(), &ids);
        let graph = families::graph_of(&Checkpoint::open(room.path()).unwrap()).unwrap();
        let path = |kind: &str| outputs.path().join(format!("{kind}.gguf"));
        gguf(room.path(), &path("whole"), "scheme = 'F32'\nmethod = 'rtn'");
        assert_eq!(said_and_drafted(&path("whole"), &ids), before, "{name}");
        let types = |kind: &str| {
            let file = formats::GgufFile::open(path(kind)).unwrap();
            let architecture = file.string("general.architecture").unwrap().unwrap().to_owned();
            let counts = ["block_count", "nextn_predict_layers"]
                .map(|key| file.count(&format!("{architecture}.{key}")).unwrap().unwrap_or(0));
            let at = format!("blk.{}.", graph.trunk().len());
            let own = file.tensors().iter().filter(|tensor| tensor.name.starts_with(&at));
            let own: Vec<(String, String)> =
                own.map(|tensor| (tensor.name[at.len()..].to_owned(), tensor.ty.name.to_owned())).collect();
            (own, counts)
        };
        let (trunk, further) = (graph.trunk().len(), graph.predictors().len());
        let report = gguf(room.path(), &path("quantized"), "scheme = 'Q8_0'\nmethod = 'gptq'");
        let (found, counts) = types("quantized");
        assert_eq!(counts, [trunk + further, further], "{name}");
        let of = |part: &str| found.iter().find(|(tensor, _)| tensor == part).map(|(_, ty)| &ty[..]);
        for (part, ty) in [
            ("nextn.eh_proj.weight", "Q8_0"),
            ("nextn.enorm.weight", "F32"),
            ("nextn.hnorm.weight", "F32"),
            (
                if *name == "bailing_hybrid_further" {
                    "layer_output_norm.weight"
                } else {
                    "nextn.shared_head_norm.weight"
                },
                "F32",
            ),
            ("attn_output.weight", "Q8_0"),
        ] {
            assert_eq!(of(part), Some(ty), "{name}: {part}, {found:?}");
        }
        let first = graph.predictors()[0].further().unwrap();
        assert_eq!(of("nextn.shared_head_head.weight").is_some(), first.head.is_some(), "{name}");
        let joining = &first.joining.linears()[0].module;
        assert!(report.linears.iter().any(|linear| linear.name == *joining), "{name}");
        assert_eq!(report.quality.unwrap().further.len(), further, "{name}");

        let report = gguf(room.path(), &path("kept"), "scheme = 'Q8_0'\nmethod = 'gptq'\nmtp = 'keep'");
        let (found, _) = types("kept");
        assert!(found.iter().all(|(_, ty)| ["BF16", "F32"].contains(&&ty[..])), "{name}: {found:?}");
        assert_eq!(report.quality.unwrap().further.len(), further, "{name}");

        // There is nothing to keep apart where all is F32.
        gguf(room.path(), &path("plain"), "scheme = 'F32'\nmethod = 'rtn'\nmtp = 'keep'");
        assert_eq!(types("plain").1, [trunk + further, further], "{name}");

        gguf(room.path(), &path("dropped"), "scheme = 'Q8_0'\nmethod = 'rtn'\nmtp = 'drop'");
        assert_eq!(types("dropped"), (Vec::new(), [trunk, 0]), "{name}");
    }
}

#[test]
fn a_gguf_file_of_an_architecture_without_them_has_none() {
    for name in NOWHERE {
        let (room, outputs) = (model(name), tempfile::tempdir().unwrap());
        let path = outputs.path().join("m.gguf");
        let report = gguf(room.path(), &path, "scheme = 'Q8_0'\nmethod = 'gptq'");
        let said = report.notes.iter().any(|note| note.contains("llama.cpp has no place for them here"));
        assert!(said, "{name}: {:?}", report.notes);
        let file = formats::GgufFile::open(&path).unwrap();
        let layers = families::graph_of(&Checkpoint::open(room.path()).unwrap()).unwrap().trunk().len();
        let behind = format!("blk.{layers}.");
        assert!(file.tensors().iter().all(|tensor| !tensor.name.starts_with(&behind)), "{name}");
        let architecture = file.string("general.architecture").unwrap().unwrap().to_owned();
        assert_eq!(file.count(&format!("{architecture}.block_count")).unwrap(), Some(layers), "{name}");
        assert!(report.quality.unwrap().further.is_empty(), "{name}");
    }
}

/// What is said of a model by checking it, by looking into it and by measuring it.
fn said_elsewhere(path: &Path) -> [Vec<String>; 3] {
    let inspected = quantc::inspect::inspect(&Checkpoint::open(path).unwrap());
    let left_out = quantc::stray::left_out(&Checkpoint::open(path).unwrap()).unwrap();
    [quantc::check::check(path).unwrap().faults, inspected.notes, left_out]
}

/// A checkpoint may have lost some tensors of such a layer, as where someone saved part of it.
#[test]
fn a_layer_that_is_not_whole_is_told_and_stays_as_it_is() {
    for (name, layer, lost) in [
        ("qwen3_5_text_further", "mtp.layers.0", &["mtp.norm.weight [64]"][..]),
        ("deepseek_v3_further", "model.layers.2", &["model.layers.2.eh_proj.weight [64, 128]"]),
        ("nemotron_h_further", "mtp", &["mtp.layers.0.eh_proj.weight [64, 128]", "mtp.layers.1.norm.weight [64]"]),
        ("qwen4_exp_text_further", "mtp.layers.0", &["mtp.fc_hidden.weight [64, 64]"]),
    ] {
        let (room, outputs) = (model(name), tempfile::tempdir().unwrap());
        let sound = said_elsewhere(room.path());
        let names: Vec<&str> = lost.iter().map(|lost| lost.split_once(' ').unwrap().0).collect();
        Model::at(room.path()).keep_tensors(|name| !names.contains(&name));
        let (first, shape) = lost[0].split_once(' ').unwrap();
        let tells = |note: &String| {
            let more = lost.len() == 1 || note.contains("and 1 more of its tensors are missing");
            note.starts_with(&format!("`{layer}`, which")) && note.contains(&format!("`{first}` {shape}")) && more
        };
        for (said, before) in said_elsewhere(room.path()).iter().zip(&sound) {
            assert!(said.iter().any(tells) && !before.iter().any(tells), "{name}: {said:?}");
        }
        let prefix = if layer == "mtp.layers.0" { "mtp." } else { layer };
        for mtp in ["quantize", "keep", "drop"] {
            let report = quantize(room.path(), &outputs.path().join(mtp), &format!("{PLAIN}\nmtp = '{mtp}'"));
            let of_it: Vec<&Fate> =
                report.tensors.iter().filter(|one| one.name.starts_with(prefix)).map(|one| &one.fate).collect();
            let fits = |fate: &&Fate| match mtp {
                "drop" => matches!(fate, Fate::Dropped(_)),
                _ => matches!(fate, Fate::Aside("predicts further tokens, and is not whole")),
            };
            assert!(!of_it.is_empty() && of_it.iter().all(fits), "{name}, {mtp}: {of_it:?}");
            assert_eq!(
                report.notes.iter().filter(|note| tells(note)).count(),
                usize::from(mtp != "drop"),
                "{name}, {mtp}"
            );
            assert!(report.notes.iter().all(|note| !note.contains("checkpoint holds")), "{name}: {:?}", report.notes);
            assert!(report.linears.iter().all(|linear| !linear.name.starts_with(prefix)), "{name}");
            assert!(report.quality.unwrap().further.is_empty());
        }
    }
}

/// Each is given the states of the one before it.
#[test]
fn those_before_one_that_is_not_whole_are_quantized() {
    for (name, prefixes, lost) in [
        ("deepseek_v3_two", ["model.layers.2.", "model.layers.3."], "eh_proj.weight"),
        ("deepseek_v4_further", ["mtp.0.", "mtp.1."], "e_proj.weight"),
    ] {
        for (damaged, [first, second]) in
            [(0, ["and is not whole", "and comes behind a layer that is not whole"]), (1, ["", "and is not whole"])]
        {
            let (room, outputs) = (model(name), tempfile::tempdir().unwrap());
            let tensor = format!("{}{lost}", prefixes[damaged]);
            Model::at(room.path()).keep_tensors(|name| name != tensor);
            let report = quantize(room.path(), &outputs.path().join("out"), PLAIN);
            let note = report.notes.iter().find(|note| note.contains(&format!("`{tensor}`"))).unwrap();
            assert_eq!(note.contains("nor those behind it"), damaged == 0, "{note}");
            for (prefix, said) in prefixes.iter().zip([first, second]) {
                let linears = report.linears.iter().filter(|linear| linear.name.starts_with(prefix)).count();
                assert_eq!(linears > 0, said.is_empty(), "{name}, {damaged}: {prefix}");
                let mut aside = report.tensors.iter().filter(|one| one.name.starts_with(prefix));
                let fits = |fate: &Fate| matches!(fate, Fate::Aside(what) if what.ends_with(said));
                assert!(said.is_empty() || aside.all(|one| fits(&one.fate)), "{name}, {damaged}: {prefix}");
            }
            assert_eq!(report.quality.unwrap().further.len(), damaged, "{name}");
        }
    }
}

/// config.json counts two, and would have them share what comes before and behind them: the file has the word.
#[test]
fn one_that_is_counted_twice_is_quantized() {
    for (name, prefix) in [
        ("qwen3_5_moe_text_further", "mtp.layers."),
        ("qwen4_exp_text_further", "mtp.layers."),
        ("nemotron_h_further", "mtp.layers."),
        ("exaone_moe_further", "mtp.layers."),
        ("longcat_flash_further", "model.mtp.layers."),
    ] {
        let (room, outputs) = (counting(name, 2), tempfile::tempdir().unwrap());
        let made = |mtp: &str| quantize(room.path(), &outputs.path().join(mtp), &format!("{PLAIN}\nmtp = '{mtp}'"));
        let quantized = |report: &Report| report.linears.iter().any(|linear| linear.name.starts_with(prefix));
        for mtp in ["quantize", "keep"] {
            let report = made(mtp);
            assert_eq!(quantized(&report), mtp == "quantize" && name != "longcat_flash_further", "{name}");
            let told = report.notes.iter().any(|note| note.contains("and the checkpoint holds 1 of them"));
            assert!(told, "{name}, {mtp}: {:?}", report.notes);
            assert_eq!(report.quality.unwrap().further.len(), 1, "{name}");
        }
        // Of several it is not known whether they share that.
        Model::at(room.path()).weights(|header, data| {
            let begin = data.len();
            data.extend([0; 8]);
            let second = serde_json::json!({"dtype": "F32", "shape": [2], "data_offsets": [begin, begin + 8]});
            header.insert(format!("{prefix}7.input_layernorm.weight"), second);
        });
        let report = quantize(room.path(), &outputs.path().join("two"), PLAIN);
        let kept = format!("are kept as they are: `{}`", prefix.trim_end_matches(".layers."));
        assert!(
            !quantized(&report) && report.notes.iter().any(|note| note.ends_with(&kept)),
            "{name}: {:?}",
            report.notes
        );
        assert!(report.quality.unwrap().further.is_empty(), "{name}");
    }
    let (room, outputs) = (counting("nemotron_h_further", 2), tempfile::tempdir().unwrap());
    let report = gguf(room.path(), &outputs.path().join("m.gguf"), "scheme = 'Q8_0'\nmethod = 'rtn'");
    assert_eq!(report.quality.unwrap().further.len(), 1);
}

/// What is only rounded.
const PLAIN: &str = "scheme = 'W8A16'\nmethod = 'rtn'\ngroup_size = 32";

/// vLLM and SGLang load LongCat's as they are, where config.json says that they are.
#[test]
fn a_layer_of_which_runtimes_load_no_codes_stays_as_it_is() {
    let (room, outputs) = (model("longcat_flash_further"), tempfile::tempdir().unwrap());
    for (mtp, said) in [("quantize", true), ("keep", true), ("drop", false)] {
        let output = outputs.path().join(mtp);
        let report = quantize(room.path(), &output, &format!("{PLAIN}\nmtp = '{mtp}'"));
        assert!(report.linears.iter().all(|linear| !linear.name.starts_with("model.mtp.")), "{mtp}");
        let kept = report
            .notes
            .iter()
            .any(|note| note == "layers that predict further tokens are kept as they are: `model.mtp`");
        assert_eq!(kept, said, "{mtp}: {:?}", report.notes);
        assert_eq!(config(&output)["disable_quant_module"] == serde_json::json!(["mtp"]), said, "{mtp}");
        assert_eq!(report.quality.unwrap().further.len(), usize::from(said), "{mtp}");
    }
}

/// A copy of a checkpoint whose config.json counts so many.
fn counting(name: &str, count: usize) -> TempDir {
    let room = model(name);
    let mut config = config(room.path());
    let key = ["mtp_num_hidden_layers", "num_nextn_predict_layers"].into_iter().find(|key| config.get(key).is_some());
    config[key.unwrap_or("num_nextn_predict_layers")] = count.into();
    std::fs::write(room.path().join("config.json"), config.to_string()).unwrap();
    room
}

#[test]
fn those_that_nobody_counts_are_left_out_with_the_others() {
    for (name, count, left) in [
        ("deepseek_v3_two", 1, "`model.layers.2`, `model.layers.3`"),
        ("deepseek_v3_two", 0, "`model.layers.2`, `model.layers.3`"),
        ("deepseek_v4_further", 1, "`mtp.0`, `mtp.1`"),
        ("deepseek_v4_further", 0, "`mtp.0`, `mtp.1`"),
    ] {
        let (room, outputs) = (counting(name, count), tempfile::tempdir().unwrap());
        let output = outputs.path().join("out");
        let report = quantize(room.path(), &output, &format!("{PLAIN}\nmtp = 'drop'"));
        let written = Checkpoint::open(&output).unwrap();
        let further = |name: &str| name.starts_with("mtp.") || name.contains("layers.2.") || name.contains("layers.3.");
        assert!(written.entries().iter().all(|entry| !further(&entry.name)), "{name}, {count}");
        let note =
            report.notes.iter().any(|note| note.contains(left) && note.contains("left out, and counted no longer"));
        assert!(note, "{name}, {count}: {:?}", report.notes);
        assert!(!report.recipe.idle.contains(&"mtp"), "{name}, {count}");
        assert_eq!(config(&output)["num_nextn_predict_layers"], 0, "{name}, {count}");
    }
}

#[test]
fn those_that_are_counted_and_not_there_are_told() {
    for (name, count, held) in [
        (
            "deepseek_v3_two",
            3,
            Some(
                "counts 3 layers that predict further tokens (num_nextn_predict_layers), and the checkpoint holds 2 of them",
            ),
        ),
        ("deepseek_v4_further", 3, Some("and the checkpoint holds 2 of them")),
        ("deepseek_v4_further", 2, None),
        ("deepseek_v4_usual", 1, Some("and the checkpoint holds none")),
    ] {
        let (room, outputs) = (counting(name, count), tempfile::tempdir().unwrap());
        for mtp in ["quantize", "keep", "drop"] {
            let output = outputs.path().join(mtp);
            let report = quantize(room.path(), &output, &format!("{PLAIN}\nmtp = '{mtp}'"));
            let told = report.notes.iter().find(|note| note.contains("and the checkpoint holds"));
            match held.filter(|_| mtp != "drop") {
                None => assert_eq!(told, None, "{name}, {mtp}"),
                Some(held) => {
                    assert!(told.is_some_and(|told| told.contains(held)), "{name}, {mtp}: {:?}", report.notes)
                }
            }
        }
    }
}

/// Weights of an output.
fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("model.safetensors")).unwrap()
}

#[test]
fn an_interrupted_run_goes_on_with_them() {
    let settings = "scheme = 'W4A16'\nmethod = 'awq+gptq'\ngroup_size = 32";
    for name in ["qwen3_5_text_further", "deepseek_v3_two", "deepseek_v4_further", "qwen4_exp_text_further"] {
        let (room, outputs) = (model(name), tempfile::tempdir().unwrap());
        let [whole, again] = ["whole", "again"].map(|kind| outputs.path().join(kind));
        quantize(room.path(), &whole, settings);
        let graph = families::graph_of(&Checkpoint::open(room.path()).unwrap()).unwrap();
        // Finished blocks as a run left them that was stopped before it measured, and then fewer: half of such layers, and none.
        for finished in [graph.blocks.len(), graph.blocks.len() - 1, graph.trunk().len()] {
            let cancel = Cancel::new();
            let stop = cancel.clone();
            let stops = move |update: &Update| {
                if update.stage.starts_with("measuring") {
                    stop.cancel();
                }
            };
            let mut progress = Progress::told(stops).stopped_by(&cancel);
            let error = job(room.path(), &again, settings).run_one(&Cpu::exact(), &mut progress).unwrap_err();
            assert!(matches!(error, quantc::Error::Cancelled), "{name}: {error}");
            let hidden = std::fs::read_dir(outputs.path()).unwrap().map(|entry| entry.unwrap().path());
            let staged = hidden.filter(|path| path.display().to_string().contains(".partial-")).collect::<Vec<_>>();
            let journal = staged[0].join(".quantc-journal");
            let text = std::fs::read_to_string(&journal).unwrap();
            let lines: Vec<&str> = text.split_inclusive('\n').collect();
            assert_eq!(lines.len(), 1 + graph.blocks.len(), "{name}: a line for each block");
            std::fs::write(&journal, lines[..1 + finished].concat()).unwrap();
            let report = quantize(room.path(), &again, settings);
            assert!(report.interrupted.iter().any(|note| note.contains(&format!("goes on after {finished} blocks"))));
            assert!(weights(&again) == weights(&whole), "{name}, after {finished} blocks");
            std::fs::remove_dir_all(&again).unwrap();
        }
    }
}
