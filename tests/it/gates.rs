//! What pipelines read of a run: exit codes, JUnit XML, summaries, annotations, events, and limits that an earlier report sets.

use std::process::Command;

use serde_json::Value;

use crate::harness::{Room, TEXT};

const FEW: &[&str] = &["--method", "rtn", "--verify-text", TEXT, "--verify-windows", "1"];

fn quantize<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    [&["quantize", "model"], flags, FEW].concat()
}

#[test]
fn limits_are_tests_in_junit_and_lines_of_a_summary() {
    let room = Room::new();
    room.model();
    let limits = ["--max-kld", "0.0000001", "--min-top1", "0.01"];
    let done = room.run(quantize(&[&["-o", "a<&>", "--junit", "j.xml", "--summary", "s.md"], &limits[..]].concat()));
    assert_eq!(done.code(), Some(3), "{}", done.stderr());
    let junit = std::fs::read_to_string(room.path("j.xml")).unwrap();
    assert!(junit.contains("tests=\"3\" failures=\"1\""), "{junit}");
    assert!(junit.contains("classname=\"a&lt;&amp;&gt;\" name=\"mean KL divergence at most 0.0000001\""), "{junit}");
    assert!(junit.contains("<failure message=\"the mean KL divergence is"), "{junit}");
    let summary = std::fs::read_to_string(room.path("s.md")).unwrap();
    assert!(summary.contains("❌ limits missed") && summary.contains("the mean KL divergence is"), "{summary}");
    // A second run at the place of the first is told beside it; the summary is appended to.
    let done = room.run(quantize(&["-o", "a<&>", "--summary", "s.md", "--force", "--group-size", "32"]));
    done.succeeds();
    let both = std::fs::read_to_string(room.path("s.md")).unwrap();
    let second = both.strip_prefix(&summary).unwrap();
    assert!(second.contains("the change from the output that was there before") && second.contains(" %)"), "{second}");
    for (flag, file) in [("--junit", "model/config.json"), ("--junit", "out/x.xml"), ("--summary", "model")] {
        room.run(quantize(&["-o", "out", flag, file])).refuses(2, &[flag]);
    }
}

#[test]
fn a_baseline_is_a_limit() {
    let room = Room::new();
    room.model();
    room.run(quantize(&["-o", "fine", "--bits", "8"])).succeeds();
    room.run(quantize(&["-o", "same", "--bits", "8", "--baseline", "fine"])).succeeds();
    let worse = room.run(quantize(&["-o", "worse", "--baseline", "fine/report.json", "--max-regression", "5%"]));
    assert_eq!(worse.code(), Some(3), "{}", worse.stderr());
    assert!(worse.stderr().contains("the mean KL divergence is"), "{}", worse.stderr());
    room.run(quantize(&["-o", "far", "--baseline", "fine", "--max-regression", "1000000%"])).succeeds();
    let refused =
        |flags: &[&str], words: &[&str]| room.run(quantize(&[&["-o", "x"], flags].concat())).refuses(2, words);
    refused(&["--baseline", "model"], &["--baseline model: there is no report"]);
    refused(&["--baseline", "fine", "--max-regression", "much"], &["--max-regression `much`", "5% or 0.05"]);
    assert_eq!(room.run(quantize(&["-o", "x", "--max-regression", "5%"])).code(), Some(2));
    room.file("no.json", "{}");
    refused(&["--baseline", "no.json"], &["says nothing of quality"]);
    // eval has them too.
    let done =
        room.run(["eval", "worse", "--reference", "model", "--text", TEXT, "--windows", "1", "--baseline", "fine"]);
    assert_eq!(done.code(), Some(3), "{}", done.stderr());
}

#[test]
fn events_are_one_json_object_a_line() {
    let room = Room::new();
    room.model();
    let done = room.run(quantize(&["-o", "out", "--events"]));
    done.succeeds();
    let said = done.stdout();
    let events: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let of = |name: &str| events.iter().filter(|event| event["event"] == name).collect::<Vec<_>>();
    assert!(of("stage").len() >= 2, "{said}");
    assert!(of("progress").iter().all(|event| (0.0..=1.0).contains(&event["done"].as_f64().unwrap())), "{said}");
    assert_eq!(of("progress").last().unwrap()["done"], 1.0);
    let [output] = of("output")[..] else { panic!("{said}") };
    assert_eq!((output["path"].as_str(), output["scheme"].as_str()), (Some("out"), Some("W4A16 g128")));
    assert!(output["quality"]["kld_mean"].as_f64().unwrap() > 0.0 && output["files"][0]["sha256"].is_string());
    assert_eq!(events.last().unwrap(), &serde_json::json!({"event": "end", "exit_code": 0, "error": null}));
    // A run that fails says so, too.
    let done = room.run(quantize(&["-o", "x", "--format", "mlx", "--bits", "3", "--events", "--junit", "j.xml"]));
    let end: Value = serde_json::from_str(done.stdout().lines().last().unwrap()).unwrap();
    assert_eq!((done.code(), end["exit_code"].as_i64(), end["error"].is_string()), (Some(2), Some(2), true));
    assert!(std::fs::read_to_string(room.path("j.xml")).unwrap().contains("failures=\"1\""));
    // Nobody reads on.
    let line = format!(
        "\"{}\" quantize model -o full --method rtn --verify-text none --events > /dev/full",
        env!("CARGO_BIN_EXE_quantc")
    );
    assert_eq!(room.shell(&line).code(), Some(1));
}

/// The scripts of a YAML file of ours: what is indented below `run: |` or `- |`.
fn scripts(path: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let mut found: Vec<String> = Vec::new();
    let mut within: Option<usize> = None;
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        match within {
            Some(first) if indent > first => *found.last_mut().unwrap() += &format!("{}\n", line.trim_start()),
            _ => within = None,
        }
        if within.is_none() && (line.trim_end().ends_with("run: |") || line.trim_end().ends_with("- |")) {
            within = Some(indent);
            found.push(String::new());
        }
    }
    found
}

/// Runs a script as a runner does: bash, which stops at what fails.
fn runner(room: &Room, script: &str, variables: &[(&str, &str)]) -> i32 {
    let mut bash = Command::new("bash");
    bash.args(["--noprofile", "--norc", "-eo", "pipefail", "-c", script]).current_dir(room.path("."));
    bash.env("QUANTC", env!("CARGO_BIN_EXE_quantc")).envs(variables.iter().copied());
    bash.output().unwrap().status.code().unwrap()
}

#[test]
fn the_action_and_the_example_for_gitlab_run() {
    let room = Room::new();
    room.model();
    let project = format!(
        "version = 1\nmodel = 'model'\nmethod = 'rtn'\nverify_text = '{TEXT}'\nverify_windows = 1\nmax_kld = 0.5\n[[target]]\npath = 'out/w4'\n"
    );
    room.file("quantc.toml", &project);
    let [action] = &scripts(".github/actions/build/action.yml")[..] else { panic!("one step") };
    let of = |check: &'static str| {
        [
            ("PROJECT", "quantc.toml"),
            ("JUNIT", "quantc-junit.xml"),
            ("CHECK", check),
            ("GITHUB_ACTIONS", "true"),
            ("GITHUB_OUTPUT", "output"),
            ("GITHUB_STEP_SUMMARY", "summary.md"),
        ]
    };
    assert_eq!(runner(&room, action, &of("true")), 1, "nothing was made yet");
    assert_eq!(runner(&room, action, &of("false")), 0);
    assert_eq!(runner(&room, action, &of("true")), 0);
    let output = std::fs::read_to_string(room.path("output")).unwrap();
    assert_eq!(output, "exit-code=1\nexit-code=0\nexit-code=0\n");
    assert!(std::fs::read_to_string(room.path("summary.md")).unwrap().contains("| out/w4 | ✅ limits kept |"));
    room.file("quantc.toml", project.replace("0.5", "0.0000001"));
    assert_eq!(runner(&room, action, &of("false")), 3);
    let [gitlab] = &scripts("docs/examples/gitlab-ci.yml")[..] else { panic!("one script") };
    assert_eq!(runner(&room, gitlab, &[]), 3, "as it was found when it was made");
    room.file("quantc.toml", &project);
    assert_eq!(runner(&room, gitlab, &[]), 0);
    let summary = std::fs::read_to_string(room.path("quantc-summary.md")).unwrap();
    assert!(summary.contains("✅ up to date"), "{summary}");
}

#[test]
fn a_log_tells_what_was_done_and_replaces_nothing() {
    let room = Room::new();
    room.model();
    let words =
        ["quantize", "model", "-o", "out", "--method", "rtn", "--group-size", "64", "--verify-windows", "1", "--force"];
    let quiet = |more: &[&str]| room.run([&words[..], &["-q"], more].concat());
    quiet(&[]).succeeds();
    let run = quiet(&["--log", "run.log"]);
    run.succeeds();
    assert!(run.stdout().is_empty() && run.stderr().is_empty(), "{}{}", run.stdout(), run.stderr());
    let log = std::fs::read_to_string(room.path("run.log")).unwrap();
    for told in [
        " INFO quantc: quantc 0.",
        "INFO quantc::api::compute: computing on CPU",
        "INFO quantc::progress: quantizing begins",
        "DEBUG quantc::pipeline::solve: model.layers.0.self_attn.q_proj",
        "INFO quantc::progress: measuring the output beside the original ends seconds=",
        "INFO quantc::job: out is measured perplexity=",
    ] {
        assert!(log.contains(told), "no `{told}` in:\n{log}");
    }
    assert_eq!(log.matches("quantc::pipeline::solve: ").count(), 14, "a line for each linear");
    // It goes on where it was, and takes no other file's place.
    room.run(["plan", "nowhere", "--log", "run.log"]).refuses(1, &["nowhere"]);
    let both = std::fs::read_to_string(room.path("run.log")).unwrap();
    assert!(both.starts_with(&log) && both.contains("ERROR quantc: nowhere"), "{both}");
    let config = std::fs::read(room.path("model/config.json")).unwrap();
    quiet(&["--log", "model/config.json"]).refuses(2, &["--log model/config.json", "is no log"]);
    // A pipe is refused, and not waited for.
    room.shell("mkfifo pipe").succeeds();
    quiet(&["--log", "pipe"]).refuses(2, &["--log pipe", "is no file"]);
    assert_eq!(std::fs::read(room.path("model/config.json")).unwrap(), config);
}
