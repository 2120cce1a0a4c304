//! `quantc build`: a project is made once, and again only where something has changed.

use std::time::SystemTime;

use serde_json::Value;

use crate::harness::{Room, Run, TEXT};

const PROJECT: &str = "version = 1
model = 'model'
method = 'gptq'
samples = 4
seq_len = 128
calibration = 'text.txt'
verify_text = 'text.txt'
verify_windows = 1
[[target]]
path = 'out/ct'
group_size = 64
[[target]]
path = 'out/m.gguf'
scheme = 'Q4_K_S'
";

fn project() -> Room {
    let room = Room::new();
    room.model();
    room.file("text.txt", std::fs::read(TEXT).unwrap());
    room.file("quantc.toml", PROJECT);
    room
}

fn build(room: &Room, flags: &[&str]) -> Run {
    room.run([&["build"], flags].concat())
}

fn edit(room: &Room, change: impl FnOnce(String) -> String) {
    let path = room.path("quantc.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let changed = change(text.clone());
    assert_ne!(text, changed);
    std::fs::write(path, changed).unwrap();
}

fn written(room: &Room, name: &str) -> SystemTime {
    std::fs::metadata(room.path(name)).unwrap().modified().unwrap()
}

#[test]
fn what_is_up_to_date_is_left_alone_and_what_is_not_is_made_again() {
    let room = project();
    assert_eq!(build(&room, &["--check"]).code(), Some(1));
    let first = build(&room, &[]);
    first.succeeds();
    assert_eq!(first.stdout().matches("out of date: it was never made").count(), 2, "{}", first.stdout());
    // The bytes are those of a run with flags.
    let flags = [
        "--method",
        "gptq",
        "--samples",
        "4",
        "--seq-len",
        "128",
        "--calibration",
        "text.txt",
        "--verify-text",
        "none",
    ];
    let targets = ["--target", "compressed-tensors:W4A16:g64=by-flags", "--target", "gguf:Q4_K_S=by-flags.gguf"];
    room.run([&["quantize", "model"], &targets[..], &flags].concat()).succeeds();
    for (one, other) in [("out/ct/model.safetensors", "by-flags/model.safetensors"), ("out/m.gguf", "by-flags.gguf")] {
        assert!(std::fs::read(room.path(one)).unwrap() == std::fs::read(room.path(other)).unwrap(), "{one}");
    }

    let before = written(&room, "out/ct/model.safetensors");
    let lock = std::fs::read(room.path("quantc.lock")).unwrap();
    let again = build(&room, &[]);
    again.succeeds();
    assert_eq!(again.stdout(), "out/ct: up to date\nout/m.gguf: up to date\n");
    build(&room, &["--check", "--verify"]).succeeds();
    assert!(std::fs::read(room.path("quantc.lock")).unwrap() == lock);

    // Copied with new times, it is the same; the lock learns how it looks now.
    let weights = room.path("model/model.safetensors");
    std::fs::copy(&weights, room.path("copy")).unwrap();
    std::fs::rename(room.path("copy"), &weights).unwrap();
    build(&room, &[]).succeeds();
    assert!(std::fs::read(room.path("quantc.lock")).unwrap() != lock);
    assert_eq!(written(&room, "out/ct/model.safetensors"), before);

    // One target's recipe: it alone is out of date, and the one that leads is made with it, with the same bytes.
    let leader = std::fs::read(room.path("out/ct/model.safetensors")).unwrap();
    edit(&room, |text| text.replace("Q4_K_S", "Q5_K_S"));
    let check = build(&room, &["--check"]);
    assert_eq!(check.code(), Some(1));
    assert!(
        check
            .stdout()
            .contains("out/ct: up to date\nout/m.gguf: out of date: recipe.gguf.mix was \"Q4_K_S\" and is \"Q5_K_S\""),
        "{}",
        check.stdout()
    );
    build(&room, &[]).succeeds();
    assert!(std::fs::read(room.path("out/ct/model.safetensors")).unwrap() == leader);
    build(&room, &["--check"]).succeeds();

    // An input, and an output that somebody has changed.
    room.file("text.txt", std::fs::read_to_string(TEXT).unwrap() + "And then?\n");
    let check = build(&room, &["--check"]);
    assert_eq!(
        (check.code(), check.stdout().matches("text.txt is not what it was").count()),
        (Some(1), 2),
        "{}",
        check.stdout()
    );
    build(&room, &[]).succeeds();
    std::fs::remove_file(room.path("out/ct/tokenizer.json")).unwrap();
    let check = build(&room, &["--check"]);
    assert!(
        check
            .stdout()
            .contains("out/ct: out of date: out/ct/tokenizer.json is not what it was\nout/m.gguf: up to date"),
        "{}",
        check.stdout()
    );
    build(&room, &[]).succeeds();
    build(&room, &["--check", "--verify"]).succeeds();
}

#[test]
fn limits_that_were_missed_are_told_by_every_build() {
    let room = project();
    edit(&room, |text| text.replace("verify_windows = 1", "verify_windows = 1\nmax_kld = 1e-9"));
    let first = build(&room, &[]);
    assert_eq!(first.code(), Some(3), "{}", first.stderr());
    let before = written(&room, "out/m.gguf");
    let again = build(&room, &[]);
    assert_eq!((again.code(), written(&room, "out/m.gguf")), (Some(3), before));
    assert!(
        again.stderr().contains("out/ct: ") && again.stderr().contains("as it was found when it was made"),
        "{}",
        again.stderr()
    );
    assert_eq!(build(&room, &["--check", "--junit", "j.xml"]).code(), Some(3));
    let junit = std::fs::read_to_string(room.path("j.xml")).unwrap();
    assert!(junit.contains("failures=\"2\"") && junit.contains("name=\"up to date\""), "{junit}");
    // Another limit is held against what was measured, and nothing is made again.
    edit(&room, |text| text.replace("1e-9", "1e9"));
    build(&room, &["--check", "--events", "--summary", "s.md"]).succeeds();
    assert!(std::fs::read_to_string(room.path("s.md")).unwrap().contains("| out/ct | ✅ up to date |"));
    assert_eq!(written(&room, "out/m.gguf"), before);
}

#[test]
fn nothing_is_written_over_the_project_its_lock_or_the_model() {
    let room = project();
    let text = std::fs::read_to_string(room.path("quantc.toml")).unwrap();
    for (line, place) in [
        ("path = 'out/ct'\nreport = 'quantc.toml'", "quantc.toml"),
        ("path = 'out/ct'\nreport = 'quantc.lock'", "quantc.lock"),
        ("path = 'out/ct'\nsave_imatrix = 'quantc.lock'", "quantc.lock"),
        ("path = 'quantc.lock'", "quantc.lock"),
    ] {
        room.file("quantc.toml", text.replace("path = 'out/ct'", line));
        build(&room, &[]).refuses(2, &[place, "choose another place"]);
    }
    room.file("quantc.toml", &text);
    let config = std::fs::read(room.path("model/config.json")).unwrap();
    for flag in ["--junit", "--summary"] {
        for place in ["model/config.json", "model/new.xml", "quantc.toml", "quantc.lock/x"] {
            build(&room, &[flag, place]).refuses(2, &[flag]);
        }
        room.run(["quantize", "nowhere", "-o", "x", flag, "model/config.json"])
            .code()
            .map(|code| assert_ne!(code, 0))
            .unwrap();
    }
    assert!(std::fs::read(room.path("model/config.json")).unwrap() == config);
    assert_eq!(std::fs::read_to_string(room.path("quantc.toml")).unwrap(), text);
    assert!(!room.path("quantc.lock").exists() && !room.path("out").exists());
    // A lock that is none does not hang the next build.
    assert!(std::process::Command::new("mkfifo").arg(room.path("quantc.lock")).status().unwrap().success());
    build(&room, &["--check"]).refuses(1, &["quantc.lock", "remove it"]);
}

#[test]
fn what_cannot_be_built_is_refused_before_any_work() {
    let room = project();
    room.file("out/ct/config.json", "{}");
    build(&room, &[]).code().map(|code| assert_eq!(code, 2)).unwrap();
    assert!(build(&room, &[]).stderr().contains("out/ct: exists already"));
    assert!(!room.path("quantc.lock").exists());
    let refused = |text: &str, words: &[&str]| {
        room.file("other.toml", text);
        room.run(["build", "other.toml"]).refuses(2, words);
    };
    refused("model = 'model'", &["says no version", "version = 1"]);
    refused("version = 2\nmodel = 'model'", &["its version is 2", "reads version 1"]);
    refused("version = 1", &["model"]);
    refused("version = 1\nmodel = 'model'", &["names no output", "[[target]]"]);
    refused("version = 1\nmodel = 'model'\n[[target]]\npath = 'x'\nbit = 4", &["line 5, `bit = 4`", "own keys"]);
    refused(
        "version = 1\nmodel = 'model'\n\nverify_windows = 'x' # many\n[[target]]\npath = 'x'",
        &["line 4, `verify_windows = 'x'"],
    );
    refused("version = 1\nmodel = 'model'\nmax_kld = 'x'\n[[target]]\npath = 'x'", &["line 3, `max_kld = 'x'`"]);
    refused(
        "version = 1\nmodel = 'model'\nscheme = \"\"\"\nx\"\"\"\nbits = 'x'\n[[target]]\npath = 'x'",
        &["line 5, `bits = 'x'`"],
    );
    refused("version = 1\nmodel = 'model'\nshceme = 'W4A16'\n[[target]]\npath = 'x'", &["line 3, `shceme = 'W4A16'`"]);
    refused(
        "version = 1\nmodel = 'model'\nverify_text = 'none'\nmax_kld = 1\n[[target]]\npath = 'x'",
        &["drop verify_text"],
    );
    refused(
        "version = 1\nmodel = 'model'\nbaseline = 'x'\nmax_regression = '-1'\n[[target]]\npath = 'x'",
        &["--max-regression `-1`"],
    );
    refused(
        "version = 1\nmodel = 'model'\nadapter = 'org/lora'\n[[target]]\npath = 'x'",
        &["there is no folder org/lora", "hf download org/lora --local-dir DIR"],
    );
    room.run(["build", "nowhere.toml"]).refuses(1, &["nowhere.toml"]);
}

/// What a target is computed with belongs to it, unless whoever builds does not mind.
#[test]
fn another_device_or_type_is_another_target() {
    let room = project();
    edit(&room, |text| {
        text.replace("method = 'gptq'", "method = 'rtn'").replace("verify_text = 'text.txt'", "verify_text = 'none'")
    });
    edit(&room, |text| {
        text.replace("verify_windows = 1\n", "recipe = 'recipe.yaml'\n").replace("group_size = 64\n", "")
    });
    let yaml = "a_stage: {a_modifiers: {QuantizationModifier: {config_groups: {g: {targets: [Linear], weights: {num_bits: 8, type: int, \
                strategy: group, group_size: 32}}}}}}";
    room.file("recipe.yaml", yaml);
    edit(&room, |text| text.split("[[target]]\npath = 'out/m.gguf'").next().unwrap().to_owned());
    build(&room, &["--device", "cpu"]).succeeds();
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/ct/report.json")).unwrap()).unwrap();
    assert_eq!([&report["linears"][0]["bits"], &report["linears"][0]["group_size"]], [8, 32]);
    build(&room, &["--check"]).succeeds();
    build(&room, &["--check", "--device", "cpu"]).succeeds();
    let told = |flags: &[&str], why: &str| {
        let run = build(&room, &[&["--check"], flags].concat());
        assert_eq!(run.code(), Some(1));
        assert!(run.stdout().contains(why), "{}", run.stdout());
    };
    told(&["--math", "f32"], "out of date: --math was auto and is f32");
    told(&["--device", "cuda"], "out of date: --device was cpu and is cuda");
    room.file("recipe.yaml", yaml.replace("32", "64"));
    told(&[], "out of date: recipe.");
}

/// The schema that is committed is the program's own; QUANTC_RENEW=1 writes it.
#[test]
fn the_schema_is_that_of_the_program() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/quantc.schema.json");
    let schema = serde_json::to_string_pretty(&quantc::build::schema()).unwrap() + "\n";
    if std::env::var_os("QUANTC_RENEW").is_some() {
        std::fs::write(path, &schema).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(committed == schema, "docs/quantc.schema.json is another: run this test with QUANTC_RENEW=1");
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let text = schema.to_string();
    for key in ["version", "model", "max_kld", "group_size", "target", "override", "tensor_type"] {
        assert!(text.contains(&format!("\"{key}\":{{")), "{key}");
    }
}
