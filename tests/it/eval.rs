//! `quantc eval`: one model, several beside one reference, and limits.

use serde_json::Value;

use crate::harness::{Model, Room};

/// What every measurement here takes.
const MEASURE: [&str; 4] = ["--context", "64", "--windows", "2"];

/// A room with the built-in model, a folder of 8 bits and a file of 4.
fn room() -> Room {
    let room = Room::new();
    room.model();
    let common = ["--method", "rtn", "--verify-text", "none"];
    room.run(["quantize", "model", "-o", "w8", "--bits", "8", "--group-size", "32"].iter().chain(&common)).succeeds();
    room.run(["quantize", "model", "-o", "q4.gguf"].iter().chain(&common)).succeeds();
    room
}

#[test]
fn several_models_are_measured_as_each_is_alone() {
    let room = room();
    let eval = |models: &[&str], more: &[&str]| {
        let run = room.run([&["eval"], models, &MEASURE[..], more].concat());
        run.succeeds();
        run
    };
    for beside in [&["--reference", "model"][..], &[]] {
        let json = [beside, &["--json"]].concat();
        let all: Value = serde_json::from_str(&eval(&["w8", "q4.gguf", "model"], &json).stdout()).unwrap();
        let all = all.as_array().unwrap();
        assert_eq!(all.len(), 3);
        for (model, together) in ["w8", "q4.gguf", "model"].into_iter().zip(all) {
            let alone: Value = serde_json::from_str(&eval(&[model], &json).stdout()).unwrap();
            let alone = alone.as_object().unwrap();
            assert_eq!(alone["model"], model);
            for (key, value) in alone {
                assert_eq!(together[key], *value, "{model}: {key}");
            }
            assert!(!alone.contains_key("bpw") && together["bpw"].as_f64().unwrap() > 4.0, "{together}");
        }
    }
    let table = eval(&["w8", "q4.gguf"], &["--reference", "model"]).stdout();
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 6, "what was measured, a gap, the heading, the reference, and two models: {table}");
    assert!(!table.contains('|') && lines[0].starts_with("126 tokens, context 64, protocol papers"), "{table}");
    for word in ["model", "bpw", "MB", "perplexity", "ratio", "KL, mean", "KL, 99 %", "top-1"] {
        assert!(lines[2].contains(word), "{word}: {table}");
    }
    assert!(lines[3].starts_with("model ") && lines[3].contains("reference"), "{table}");
    assert!(lines[4].starts_with("w8 ") && lines[5].starts_with("q4.gguf "), "{table}");
    let width = |line: &str| line.chars().count();
    assert!(
        lines[3..].iter().all(|line| width(line) == width(lines[4])),
        "the last column ends where it ends: {table}"
    );
    // One model: a list of what was found, aligned.
    let one = eval(&["w8"], &["--reference", "model"]).stdout();
    assert!(!one.contains('|') && one.contains("perplexity of the original"), "{one}");
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let room = room();
    room.run(["eval", "w8", "q4.gguf", "--adapter", "x"]).refuses(2, &["--adapter is merged into one model"]);
    room.run(["eval", "w8", "nowhere"]).refuses(1, &["nowhere: cannot open"]);
    let run = room.run(["eval"]);
    assert!(run.code() == Some(2) && run.stderr().contains("<MODEL>"), "{}", run.stderr());
}

#[test]
fn limits_hold_what_is_measured() {
    let room = room();
    let eval = |more: &[&str]| room.run([&["eval"], more, &MEASURE].concat());
    for flag in ["--max-ppl-ratio", "--max-kld", "--min-top1"] {
        eval(&["w8", flag, "0.5"]).refuses(2, &["give --reference MODEL"]);
    }

    eval(&["w8", "--reference", "model", "--max-kld=-1"]).refuses(2, &["--max-kld -1: must be"]);
    eval(&["w8", "--reference", "model", "--max-kld", "0.5", "--min-top1", "0.5"]).succeeds();
    let missed = eval(&["w8", "q4.gguf", "--reference", "model", "--max-kld", "0.005", "--json"]);
    assert_eq!(missed.code(), Some(3), "{}", missed.stderr());
    let errors: Vec<String> = missed.stderr().lines().filter(|l| l.starts_with("error: ")).map(str::to_owned).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].starts_with("error: q4.gguf: the mean KL divergence is 0."), "{errors:?}");
    assert!(errors[0].ends_with("above the limit of 0.005"), "{errors:?}");
    let all: Value = serde_json::from_str(&missed.stdout()).unwrap();
    assert_eq!([&all[0]["verdict"]["passed"], &all[1]["verdict"]["passed"]], [true, false]);
    assert_eq!(all[1]["verdict"]["limits"]["max_kld"], 0.005);
    // One model: the verdict stands in its object.
    let one = eval(&["q4.gguf", "--reference", "model", "--max-kld", "0.005", "--json"]);
    assert_eq!(one.code(), Some(3));
    let one: Value = serde_json::from_str(&one.stdout()).unwrap();
    assert_eq!(one["verdict"]["missed"].as_array().unwrap().len(), 1, "{one}");
}

#[test]
fn a_quantized_reference_is_not_called_the_original() {
    let room = room();
    let run = room.run([&["eval", "model", "w8", "--reference", "q4.gguf"], &MEASURE[..]].concat());
    run.succeeds();
    let told = run.stdout() + &run.stderr();
    assert!(told.contains("the reference is itself quantized (Q") && !told.contains("original"), "{told}");
    let run = room.run([&["eval", "w8", "--reference", "q4.gguf"], &MEASURE[..]].concat());
    let told = run.stdout() + &run.stderr();
    assert!(told.contains("perplexity of the reference, itself quantized (Q"), "{told}");
    assert!(told.contains("note: q4.gguf is itself quantized (Q") && !told.contains("original"), "{told}");
    let run = room.run(["quantize", "q4.gguf", "-o", "out", "--method", "rtn", "--verify-windows", "1"]);
    run.succeeds();
    let card = std::fs::read_to_string(room.path("out/README.md")).unwrap();
    assert!(!(run.stdout() + &run.stderr()).contains("original"), "{}{}", run.stdout(), run.stderr());
    assert!(!card.contains("original"), "{card}");
}

/// The original's run is kept by the content of its files, for quantize, eval and compare alike, and what is measured is the same with it.
#[test]
fn the_original_runs_once_for_many_measurements() {
    let room = room();
    let cache = room.path("cache");
    let again = "is not run again";
    let eval = |more: &[&str]| {
        let measure = if more.len() > 2 { &MEASURE[..2] } else { &MEASURE };
        let run = room.run_keeping(cache.clone(), [&["eval", "w8", "--json"][..], measure, more].concat());
        run.succeeds();
        (run.stderr().contains(again), serde_json::from_str::<Value>(&run.stdout()).unwrap())
    };
    let kept = || std::fs::read_dir(cache.join("originals")).map_or(0, |files| files.count());
    let (known, first) = eval(&["--reference", "model"]);
    assert!(!known && kept() == 1);
    let (known, second) = eval(&["--reference", "model"]);
    assert!(known && first == second, "{first} {second}");
    // Another process of the same kind, in another place.
    let copied = room.shell("cp -r model copy && touch copy/*");
    copied.succeeds();
    let (known, mut moved) = eval(&["--reference", "copy"]);
    moved["reference"] = first["reference"].clone();
    assert!(known && moved == first, "{moved}");
    // What was kept is damaged: it is computed again.
    let file = std::fs::read_dir(cache.join("originals")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert_eq!(eval(&["--reference", "model"]).1, first);
    // Other weights under the same name, of the same size; other text.
    Model::at(&room.path("copy")).config(|config| config["rms_norm_eps"] = 0.5.into());
    let (known, other) = eval(&["--reference", "copy"]);
    assert!(!known && other["kld_mean"] != first["kld_mean"] && kept() == 2, "{other}");
    assert!(!eval(&["--reference", "model", "--windows", "1"]).0);
    // A run of quantization takes what eval kept, and says the same as without.
    let quantize = |cache: &str| {
        let quick = ["--method", "rtn", "--verify-windows", "2", "--report", "report.json", "--force"];
        let run = room.run_keeping(room.path(cache), ["quantize", "model", "-o", "out"].iter().chain(&quick));
        run.succeeds();
        let report: Value = serde_json::from_slice(&std::fs::read(room.path("report.json")).unwrap()).unwrap();
        (run.stderr().contains(again), report["quality"].clone())
    };
    let (fresh, first) = quantize("other");
    let (known, second) = quantize("other");
    assert!(!fresh && known && first == second);
    // A cache that cannot be had is done without.
    room.file("none", "");
    assert_eq!(quantize("none"), (false, first));
}
