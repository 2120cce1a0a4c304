//! Models that predict no tokens: their embeddings and scores are those of transformers (`tests/fixtures/make_heads.py`), and what is
//! measured of an output is what it makes of texts.

use std::path::{Path, PathBuf};

use formats::SafetensorsFile;
use kernels::Cpu;
use quantc::Checkpoint;
use quantc::job::{Job, Verification};
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request};
use quantc::report::{Limits, Report};
use quantc::verify::outputs;
use serde_json::Value;
use tempfile::TempDir;

use crate::families::{checkpoint_of, each};
use crate::harness::Room;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/heads")
}

fn names() -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The whole checkpoint, with what sentence-transformers lays beside it.
fn model(name: &str) -> TempDir {
    let (described, room) = (folder().join(name), checkpoint_of(&folder().join(name)));
    for entry in std::fs::read_dir(described).unwrap() {
        let path = entry.unwrap().path();
        let to = room.path().join(path.file_name().unwrap());
        if path.is_dir() {
            std::fs::create_dir(&to).unwrap();
            for file in std::fs::read_dir(path).unwrap() {
                let file = file.unwrap().path();
                std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
            }
        } else if path.ends_with("modules.json") {
            std::fs::copy(path, to).unwrap();
        }
    }
    room
}

#[test]
fn embeddings_and_scores_are_those_of_transformers() {
    let names = names();
    assert!(names.len() >= 13, "{names:?}");
    for name in names {
        let (room, golden) =
            (model(&name), SafetensorsFile::open(folder().join(&name).join("golden.safetensors")).unwrap());
        let ids = golden.get("input_ids").unwrap();
        let all =
            ids.data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect::<Vec<_>>();
        let texts: Vec<Vec<u32>> = all.chunks(ids.shape[1]).map(<[u32]>::to_vec).collect();
        let found = outputs(&Cpu::exact(), &Checkpoint::open(room.path()).unwrap(), &texts).unwrap();
        let (key, found) = match found.scores.is_empty() {
            true => ("embeddings", found.embeddings),
            false => ("scores", found.scores),
        };
        let expected = golden.get(key).unwrap_or_else(|| panic!("{name}: {key} were made")).to_f32().unwrap();
        let found: Vec<f64> = found.into_iter().flatten().collect();
        assert_eq!(found.len(), expected.len(), "{name}");
        let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
        assert!(worst <= 1e-4 * f64::from(largest), "{name}: off by {worst}, the largest is {largest}");
    }
}

/// Quantizes a model on a text of its own words.
fn quantize(model: &Path, output: &Path, toml: &str, limits: Limits) -> quantc::Result<Report> {
    let text = model.join("text.txt").display().to_string();
    let request: Request = toml::from_str(toml).unwrap();
    let group = if toml.contains("'gguf'") { "" } else { "group_size = 32" };
    let common = format!("calibration = '{text}'\nsamples = 16\nseq_len = 24\n{group}");
    let recipe = Recipe::resolve(request.or(toml::from_str(&common).unwrap())).unwrap();
    let verification = Some(Verification { text, context: 24, windows: Some(16), limits });
    Job::one(model, output, recipe, verification, false).run_one(&Cpu::exact(), &mut Progress::new(true))
}

#[test]
fn every_head_is_kept_and_measured_in_every_layout() {
    let outputs = tempfile::tempdir().unwrap();
    each(&names(), |name| {
        let room = model(name);
        for format in ["compressed-tensors", "gptq", "awq", "gguf"] {
            crate::matrix::speak(room.path());
            if format == "gguf" {
                crate::gguf_families::spell(room.path());
                let text: String = (0..3000u32).map(|i| char::from(b'!' + (i * i % 9973 % 90) as u8)).collect();
                std::fs::write(room.path().join("text.txt"), text).unwrap();
            }
            let scheme = match format {
                "awq" => "W4A16_ASYM",
                "gguf" => "Q8_0",
                _ => "W8A16",
            };
            let output = outputs.path().join(format!("{name}-{format}"));
            let toml = format!("format = '{format}'\nscheme = '{scheme}'");
            let report = match quantize(room.path(), &output, &toml, Limits::default()) {
                Ok(report) => report,
                Err(error) => {
                    let (known, why) = (error.to_string(), format!("{name}, {format}: {error}"));
                    let conv = name.starts_with("gpt2") && known.contains("Conv1D");
                    let windows = name == "qwen2_both_ways" && known.contains("both ways within a window");
                    assert!(conv || format == "gguf" && windows, "{why}");
                    continue;
                }
            };
            let what = format!("{name}, {format}: {:#?}", report.hidden_states);
            let (states, close) = (report.hidden_states.expect(name), if format == "awq" { 0.9 } else { 0.999 });
            assert!(states.cosine_mean > close && states.cosine_min <= states.cosine_mean, "{what}");
            assert_eq!(report.quality.is_some(), name == "qwen3_yes_no", "{what}");
            let embeds = ["lasttoken", "pooled", "both_ways", "embedding"].iter().any(|word| name.contains(word));
            assert_eq!(states.embeddings.is_some(), embeds, "{what}");
            assert_eq!(states.scores.is_some(), !embeds, "{what}");
            if let Some(embeddings) = &states.embeddings {
                assert!(
                    embeddings.texts == 16 && embeddings.cosine_mean > close && embeddings.cosine_min < 1.0,
                    "{what}"
                );
            }
            if let Some(scores) = &states.scores {
                let one = scores.labels == 1;
                assert_eq!([scores.label_agreement.is_none(), scores.rank_correlation.is_some()], [one; 2], "{what}");
                let share = scores.label_agreement.or(scores.rank_correlation).unwrap();
                assert!(share > if format == "awq" { 0.6 } else { 0.95 } && scores.difference_max > 0.0, "{what}");
                assert!(scores.difference_mean <= scores.difference_max, "{what}");
                let tokens = name.contains("tokens") || name.contains("process");
                assert_eq!(scores.scored, if tokens { 16 * 24 } else { 16 }, "{what}");
            }
            if format != "gguf" {
                kept(room.path(), &output, &what);
            }
        }
    });
}

/// As transformers saves them, and as llama.cpp names them.
#[test]
fn models_that_see_both_ways_are_read_back_from_gguf() {
    for (name, architecture, pooling, said) in [
        ("gemma3_embedding", "gemma-embedding", 1, "use_bidirectional_attention"),
        ("gemma3_labels", "gemma-embedding", 0, "use_bidirectional_attention"),
        ("llama_both_ways", "llama", 1, "is_causal"),
    ] {
        let (room, outside) = (model(name), tempfile::tempdir().unwrap());
        crate::gguf_families::spell(room.path());
        let file = outside.path().join("model.gguf");
        crate::gguf_families::write(room.path(), &file, "method = 'rtn'\nscheme = 'F32'").unwrap();
        let read = Checkpoint::open(&file).unwrap();
        let written = read.gguf().unwrap();
        assert_eq!(written.string("general.architecture").unwrap(), Some(architecture), "{name}");
        assert_eq!(read.pooling().unwrap_or(0), pooling, "{name}");
        assert_eq!(read.remarks(), [""; 0], "{name}");
        assert_eq!(read.config()[said], (said != "is_causal"), "{name}");
        let texts: Vec<Vec<u32>> =
            (0..3u32).map(|text| (0..17).map(|at| 4 + (text * 31 + at * at) % 90).collect()).collect();
        let [a, b] = [&Checkpoint::open(room.path()).unwrap(), &read]
            .map(|model| outputs(&Cpu::exact(), model, &texts).unwrap().hidden);
        let largest = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(a.len() == b.len() && largest > 0.0 && worst <= 1e-4 * largest, "{name}: off by {worst} of {largest}");
    }
}

/// The head has its bytes, the configuration names it, and the modules are there.
fn kept(model: &Path, output: &Path, what: &str) {
    let [before, after] =
        [model, output].map(|folder| SafetensorsFile::open(folder.join("model.safetensors")).unwrap());
    let config: Value = serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
    let said = config["quantization_config"].to_string();
    for tensor in
        before.tensors().filter(|tensor| tensor.name.starts_with("score") || tensor.name.starts_with("classifier"))
    {
        let [a, b] = [&before, &after].map(|file| file.get(&tensor.name).expect(what).data.to_vec());
        assert_eq!(a, b, "{what}: {}", tensor.name);
        let module = tensor.name.strip_suffix(".weight").unwrap_or("score");
        assert!(
            !tensor.name.ends_with("weight") || said.contains(module) || said.contains("\"gptq\""),
            "{what}: {said}"
        );
    }
    let files = |folder: &Path| {
        let mut found: Vec<String> = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir())
        {
            let inner = std::fs::read_dir(&entry).unwrap().map(|file| file.unwrap().path());
            found.extend(inner.map(|file| file.strip_prefix(folder).unwrap().display().to_string()));
        }
        found.extend(folder.join("modules.json").exists().then(|| "modules.json".to_owned()));
        found.sort();
        found
    };
    assert_eq!(files(model), files(output), "{what}");
}

/// A model of this name under `model` in a room, with a tokenizer and a text.
fn room(name: &str) -> Room {
    let (room, made) = (Room::new(), model(name));
    crate::matrix::speak(made.path());
    std::fs::remove_dir_all(room.path("model")).ok();
    room.shell(&format!("rm -rf model && cp -r {} model", made.path().display())).succeeds();
    room
}

const QUICK: &str = "--text model/text.txt --context 24 --windows 16";

#[test]
fn eval_compares_embeddings_and_scores_and_limits_hold_them() {
    for (name, flag, words) in [
        ("qwen3_lasttoken", "--min-cosine", "embeddings of 64 (lasttoken, normalized), mean / lowest"),
        (
            "llama_pooled",
            "--min-cosine",
            "(cls and max and mean and mean_sqrt_len and weightedmean, a norm, a linear to 24, normalized)",
        ),
        ("qwen3_reranker", "--min-spearman", "rank correlation of 16 texts (Spearman)"),
        ("qwen3_labels", "--min-top1", "same label of 16 texts"),
        ("llama_tokens", "--min-top1", "same label of 384 tokens"),
        ("qwen3_yes_no", "--min-spearman", "rank correlation of 16 texts (Spearman)"),
    ] {
        let room = room(name);
        let quantize = "quantize model -o out --calibration model/text.txt --samples 8 --seq-len 24 --scheme W4A16 --method rtn \
                        --group-size 32 --verify-text model/text.txt --verify-windows 16 --force";
        let run = room.run(quantize.split_whitespace());
        run.succeeds();
        assert!(run.stdout().contains(words) || name.ends_with("tokens"), "{name}: {}", run.stdout());
        let card = std::fs::read_to_string(room.path("out/README.md")).unwrap();
        assert!(card.contains("difference of hidden states") && card.contains("## Quality"), "{card}");
        let eval = |more: &str| room.run(format!("eval out {QUICK} {more}").split_whitespace());
        let told = eval("--reference model");
        told.succeeds();
        assert!(told.stdout().contains(words), "{name}: {}", told.stdout());
        let json = eval("--reference model --json");
        let json: Value = serde_json::from_str(&json.stdout()).unwrap();
        assert!(json["hidden_states"]["cosine_mean"].as_f64().unwrap() < 1.0, "{json}");
        assert_eq!(json["perplexity"].is_number(), name == "qwen3_yes_no", "{json}");
        // A model is as its original is, and nothing else.
        let same = room.run(format!("eval model {QUICK} --reference model {flag} 1").split_whitespace());
        if name != "qwen3_lasttoken" && name != "llama_pooled" {
            same.succeeds();
        }
        let missed = eval(&format!("--reference model {flag} 1"));
        if name != "qwen3_labels" {
            assert_eq!(missed.code(), Some(3), "{name}: {}{}", missed.stdout(), missed.stderr());
            assert!(missed.stderr().contains("below the limit of 1"), "{}", missed.stderr());
        }
        let run = room.run(format!("{quantize} {flag} -0.9").replace("-0.9", "0.01").split_whitespace());
        run.succeeds();
        if name != "qwen3_yes_no" {
            eval("").refuses(1, &["give --reference MODEL"]);
            eval("--reference model --max-kld 1").refuses(2, &["drop the limits on what it would predict"]);
        }
        for other in ["--min-cosine", "--min-top1", "--min-spearman"] {
            let fits = other == flag
                || other == "--min-cosine" && name != "qwen3_yes_no"
                || other == "--min-top1" && name == "qwen3_yes_no";
            if !fits {
                eval(&format!("--reference model {other} 0.5")).refuses(2, &[other]);
            }
        }
    }
}

#[test]
fn scores_of_other_labels_are_not_compared() {
    let (room, other) = (room("qwen3_labels"), model("qwen3_reranker"));
    crate::matrix::speak(other.path());
    room.shell(&format!("cp -r {} other", other.path().display())).succeeds();
    for [model, reference] in [["other", "model"], ["model", "other"]] {
        let words = format!("eval {model} {QUICK} --reference {reference}");
        room.run(words.split_whitespace()).refuses(1, &["`score.weight` has the shape", "cannot be compared"]);
    }
}

#[test]
fn a_model_that_embeds_by_its_files_is_measured_by_that_whatever_its_class_says() {
    let room = room("qwen3_lasttoken");
    crate::harness::Model::at(&room.path("model")).config(|config| {
        config["architectures"] = serde_json::json!(["Qwen3ForCausalLM"]);
        config["tie_word_embeddings"] = true.into();
    });
    let quantize = "quantize model -o out --scheme W8A16 --method rtn --group-size 32 --verify-text model/text.txt --verify-windows 16";
    let run = room.run(quantize.split_whitespace());
    run.succeeds();
    assert!(run.stderr().contains("the model makes embeddings, as modules.json beside it says"), "{}", run.stderr());
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
    assert_eq!(report["quality"], Value::Null);
    assert_eq!(report["hidden_states"]["embeddings"]["made_by"], "lasttoken, normalized");
    let card = std::fs::read_to_string(room.path("out/README.md")).unwrap();
    assert!(!card.contains("vllm serve"), "{card}");
    // What is not known is told, and not measured.
    for (file, text, words) in [
        (
            "modules.json",
            r#"[{"path": "1_Splade", "type": "sentence_transformers.models.SpladePooling"}]"#,
            "SpladePooling, which is not known",
        ),
        ("1_Pooling/config.json", r#"{"pooling_mode": "attention"}"#, "pools by attention, which is not known"),
        ("1_Pooling/config.json", "{}", "does not say how hidden states are pooled"),
    ] {
        let before = std::fs::read(room.path("model").join(file)).unwrap();
        room.file(&format!("model/{file}"), text);
        let run = room.run(format!("{quantize} --force").split_whitespace());
        run.succeeds();
        assert!(run.stderr().contains(words), "{}", run.stderr());
        std::fs::write(room.path("model").join(file), before).unwrap();
    }
}

/// Writes the values of a tensor of a module's file anew, in another shape.
fn dense_of(path: &Path, shape: [usize; 2], value: f32) {
    let data: Vec<u8> = vec![value; shape[0] * shape[1]].iter().flat_map(|value| value.to_le_bytes()).collect();
    let header =
        serde_json::json!({"linear.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, data.len()]}});
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data[..]].concat();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_makes_embeddings_and_scores_is_checked_before_the_work() {
    let room = room("gemma3_embedding");
    let file = room.path("model/2_Dense/model.safetensors");
    let quantize = "quantize model -o out --scheme W8A16 --method rtn --group-size 32 --verify-text model/text.txt --verify-windows 16";
    let eval = format!("eval model {QUICK} --reference model --min-cosine 0.99");
    let before = std::fs::read(&file).unwrap();
    for (shape, value, words) in [
        (
            [96, 64],
            f32::NAN,
            "2_Dense/model.safetensors: tensor `linear.weight`: value NaN at index 0 is not a finite number",
        ),
        (
            [95, 64],
            0.5,
            "tensor `linear.weight` has shape [95, 64], and by 2_Dense/config.json it would be [96, 64]; take all files",
        ),
    ] {
        dense_of(&file, shape, value);
        for command in [quantize, "plan model --method rtn --verify-text model/text.txt", &eval, "check model"] {
            let run = room.run(command.split_whitespace());
            let told = format!("{}{}", run.stdout(), run.stderr());
            assert!(run.code() == Some(1) && told.contains(words), "{command}: {told}");
        }
        assert!(!room.path("out").exists());
    }
    std::fs::write(&file, before).unwrap();
    room.run(eval.split_whitespace()).succeeds();
    let room = crate::heads::room("qwen3_yes_no");
    let scores = room.path("model/1_LogitScore/config.json");
    std::fs::write(&scores, r#"{"true_token_id": 99999, "false_token_id": 31}"#).unwrap();
    let words = "1_LogitScore/config.json: true_token_id is 99999, and the model has logits for";
    room.run(quantize.split_whitespace()).refuses(1, &[words]);
}

#[test]
fn a_head_with_other_labels_than_config_json_counts_is_refused() {
    let quantize = "quantize model -o out --scheme W8A16 --method rtn --group-size 32 --verify-text";
    for (name, tensor, labels) in [("qwen3_labels", "score.weight", 77), ("llama_tokens", "score.weight", 2)] {
        let room = room(name);
        let place = room.path("model");
        let shape = Checkpoint::open(&place).unwrap().entry(tensor).expect(tensor).shape.clone();
        crate::harness::Model::at(&place).config(|config| {
            let labels: serde_json::Map<_, _> = (0..labels).map(|id| (id.to_string(), "label".into())).collect();
            config["id2label"] = labels.into();
        });
        let words = format!(
            "model: tensor `{tensor}` has shape {shape:?}, and by config.json it would be [{labels}, {}] (id2label has {labels} labels)",
            shape[1]
        );
        for text in ["none", "model/text.txt"] {
            room.run(format!("{quantize} {text}").split_whitespace())
                .refuses(1, &[&words, "published with these weights"]);
        }
        assert!(!room.path("out").exists());
        let check = room.run(["check", "model"]);
        assert!(
            check.code() == Some(1) && check.stdout().contains(&words) | check.stderr().contains(&words),
            "{}",
            check.stdout()
        );
    }
}

#[test]
fn a_modules_json_that_is_no_list_is_told() {
    let room = room("qwen3_lasttoken");
    room.file("model/modules.json", "{}");
    for output in ["out", "out.gguf"] {
        let groups = if output == "out" { "--group-size 32" } else { "--scheme Q8_0" };
        if output != "out" {
            crate::gguf_families::spell(&room.path("model"));
        }
        let words = format!("quantize model -o {output} --method rtn --verify-text none {groups}");
        let run = room.run(words.split_whitespace());
        run.succeeds();
        assert!(
            run.stderr().contains("modules.json: not a list of modules, each with a path and a type"),
            "{}",
            run.stderr()
        );
    }
}
