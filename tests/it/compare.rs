//! `quantc compare`: schemes, and checkpoints made elsewhere, in one table that can be believed.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::Command;

use quantc::compare::DOMAINS;
use quantc::text::load_text;
use serde_json::Value;

use crate::harness::{Room, TEXT};

/// What every comparison here takes: few samples, and few windows.
const FEW: &[&str] =
    &["--calibration", TEXT, "--samples", "4", "--seq-len", "128", "--context", "96", "--windows", "2"];

/// Runs a comparison of the room's model into its folder `report`.
fn compare(room: &Room, more: &[&str]) -> crate::harness::Run {
    room.run([&["compare", "model", "--report", "report"], more, FEW].concat())
}

fn table(room: &Room) -> Value {
    serde_json::from_slice(&std::fs::read(room.path("report/compare.json")).unwrap()).unwrap()
}

fn row<'t>(table: &'t Value, name: &str) -> &'t Value {
    let rows = table["rows"].as_array().unwrap();
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name} in {table}"))
}

/// Names and times of the rows that are kept.
fn kept(room: &Room) -> Vec<(PathBuf, std::time::SystemTime)> {
    let listed = std::fs::read_dir(room.path("report/rows")).unwrap().map(|entry| entry.unwrap().path());
    let mut kept: Vec<_> = listed.map(|path| (path.clone(), path.metadata().unwrap().modified().unwrap())).collect();
    kept.sort();
    kept
}

#[test]
fn figures_are_those_of_eval_and_a_second_call_does_no_work() {
    let room = Room::new();
    room.model();
    let schemes = ["--scheme", "W4A16:g32", "--scheme", "Q4_0", "--keep"];
    let run = compare(&room, &schemes);
    run.succeeds();
    let (found, first) = (table(&room), run.stdout());
    let names: Vec<&str> = found["rows"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["original", "W4A16:g32", "Q4_0"]);
    for (name, ending) in [("W4A16:g32", ""), ("Q4_0", ".gguf")] {
        let own = &row(&found, name)["found"];
        let path = own["path"].as_str().unwrap();
        assert!(path.ends_with(ending), "{path}");
        let eval = room.run(["eval", path, "--reference", "model", "--context", "96", "--windows", "2", "--json"]);
        let eval: Value = serde_json::from_str(&eval.stdout()).unwrap();
        let pairs = [
            ("perplexity", "perplexity"),
            ("perplexity_stderr", "perplexity_stderr"),
            ("ratio", "perplexity_ratio"),
            ("ratio_stderr", "perplexity_ratio_stderr"),
            ("kld_mean", "kld_mean"),
            ("kld_median", "kld_median"),
            ("kld_p99", "kld_p99"),
            ("kld_max", "kld_max"),
            ("top1", "top1_agreement"),
        ];
        for (ours, theirs) in pairs {
            let (ours_is, theirs_is) = (own["text"][ours].as_f64().unwrap(), eval[theirs].as_f64().unwrap());
            assert!((ours_is - theirs_is).abs() <= 1e-9 * theirs_is.abs(), "{name}, {ours}: {ours_is} {theirs_is}");
        }
        let original = &row(&found, "original")["found"]["text"]["perplexity"];
        let reference = eval["reference_perplexity"].as_f64().unwrap();
        assert!((original.as_f64().unwrap() - reference).abs() <= 1e-9 * reference, "{original} {reference}");
        let domains: Vec<&str> =
            own["domains"].as_array().unwrap().iter().map(|domain| domain["name"].as_str().unwrap()).collect();
        assert_eq!(domains, DOMAINS.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        assert!(own["domains"].as_array().unwrap().iter().all(|d| d["kld_mean"].as_f64().unwrap() > 0.0), "{own}");
        let counted = own["histogram"]["counts"].as_array().unwrap().iter().chain([&own["histogram"]["below"]]);
        let counted: u64 = counted.chain([&own["histogram"]["above"]]).map(|count| count.as_u64().unwrap()).sum();
        assert_eq!(counted, own["text"]["tokens"].as_u64().unwrap());
        let linears = own["linears"].as_array().unwrap();
        assert!(linears.len() == 14 && linears.iter().all(|l| l["relative_error"].as_f64().unwrap() > 0.0), "{own}");
        // What the run itself says of what it wrote.
        let report = match ending {
            "" => PathBuf::from(path).join("report.json"),
            _ => PathBuf::from(format!("{path}.report.json")),
        };
        let report: Value = serde_json::from_slice(&std::fs::read(room.path("").join(report)).unwrap()).unwrap();
        for (ours, theirs) in [("bpw", "file"), ("bpw_quantized", "quantized")] {
            let (ours_is, theirs_is) = (own[ours].as_f64().unwrap(), report["bpw"][theirs].as_f64().unwrap());
            assert!((ours_is - theirs_is).abs() <= 1e-6 * theirs_is, "{name}, {ours}: {ours_is} {theirs_is}");
        }
        for flip in own["flips"].as_array().unwrap() {
            let p = |side: usize, token: usize| flip["probabilities"][side][token].as_f64().unwrap();
            assert!(p(0, 0) >= p(0, 1) && p(1, 1) >= p(1, 0), "each prefers its own: {flip}");
        }
        assert!(!own["flips"].as_array().unwrap().is_empty());
    }
    assert_eq!(row(&found, "Q4_0")["found"]["beside"], "W4A16:g32");
    assert!(first.contains("top-1") && first.contains("dialogue") && first.contains("\n*  original "), "{first}");
    for name in ["compare.md", "compare.csv", "compare.html"] {
        let text = std::fs::read_to_string(room.path("report").join(name)).unwrap();
        assert!(text.contains("W4A16:g32") && text.contains("Q4_0"), "{name}: {text}");
    }

    // Again: the same, out of what was kept.
    let (before, json) = (kept(&room), std::fs::read(room.path("report/compare.json")).unwrap());
    assert_eq!(before.len(), 3);
    let again = compare(&room, &schemes);
    again.succeeds();
    assert_eq!(kept(&room), before);
    assert!(std::fs::read(room.path("report/compare.json")).unwrap() == json && again.stdout() == first);

    // A row that is gone is measured again on what is still there, as after a call that was interrupted.
    let gone = &before.iter().find(|(path, _)| path.to_string_lossy().contains("Q4_0")).unwrap().0;
    std::fs::remove_file(gone).unwrap();
    let output = room.path(row(&found, "Q4_0")["found"]["path"].as_str().unwrap());
    let written = || output.metadata().unwrap().modified().unwrap();
    let then = written();
    compare(&room, &schemes[..4]).succeeds();
    assert_eq!(kept(&room).iter().filter(|one| before.contains(one)).count(), 2, "the others are as they were");
    assert_eq!(row(&table(&room), "Q4_0"), row(&found, "Q4_0"));
    assert_eq!(written(), then, "what was to be kept is measured again, and stays");
}

#[test]
fn a_scheme_that_comes_later_is_what_it_would_have_been() {
    let room = Room::new();
    room.model();
    let (first, second) = (["--scheme", "W3A16:g32"], ["--scheme", "gptq:W4A16:g64"]);
    let rest = ["--tasks", "none", "--independent"];
    let figures = || {
        let table = table(&room);
        let found = &row(&table, "gptq:W4A16:g64")["found"];
        (found["text"].clone(), found["beside"].clone())
    };
    compare(&room, &[&first[..], &rest[..2]].concat()).succeeds();
    let lead = kept(&room);
    compare(&room, &[&first[..], &second, &rest[..2]].concat()).succeeds();
    assert!(lead.iter().all(|row| kept(&room).contains(row)), "the one that leads is as it was");
    let later = figures();
    std::fs::remove_dir_all(room.path("report")).unwrap();
    compare(&room, &[&first[..], &second, &rest[..2]].concat()).succeeds();
    assert_eq!(figures(), later);
    assert_eq!(later.1, "W3A16:g32");
    // By itself it is another one, and its row is not taken for that.
    compare(&room, &[&first[..], &second, &rest].concat()).succeeds();
    assert!(figures().0 != later.0 && figures().1.is_null(), "{:?}", figures());
    let alone = figures();
    compare(&room, &[&second[..], &rest[..2]].concat()).succeeds();
    assert_eq!(figures(), alone);
}

#[test]
fn what_fails_is_told_and_the_others_go_on() {
    let room = Room::new();
    room.model();
    room.file("broken.gguf", "GGUF and no more");
    let common = ["--method", "rtn", "--verify-text", "none"];
    room.run(["quantize", "model", "-o", "elsewhere", "--bits", "8"].iter().chain(&common)).succeeds();
    let also = ["--scheme", "W8A16", "--also", "broken.gguf", "--also", "elsewhere", "--method", "rtn"];
    let run = compare(&room, &also);
    assert_eq!(run.code(), Some(1), "{}", run.stderr());
    assert!(run.stderr().contains("error: broken.gguf: broken.gguf: "), "{}", run.stderr());
    let found = table(&room);
    assert!(row(&found, "broken.gguf")["failed"].as_str().unwrap().contains("broken.gguf"));
    let other = &row(&found, "elsewhere")["found"];
    assert!(other["linears"].is_null() && other["text"]["kld_mean"].as_f64().unwrap() > 0.0, "{other}");
    // The same scheme, whoever made it.
    assert_eq!(other["text"]["kld_mean"], row(&found, "W8A16")["found"]["text"]["kld_mean"]);
    let page = std::fs::read_to_string(room.path("report/compare.html")).unwrap();
    assert!(page.contains("broken.gguf"), "the page tells of it, too");
    assert!(!room.path("report/work").exists(), "what schemes wrote is gone without --keep");
    // What is kept of the others is enough for the next call, which fails in the same way.
    let before = kept(&room);
    assert_eq!(compare(&room, &also).code(), Some(1));
    assert_eq!(kept(&room), before);

    // A scheme that this model does not divide into, beside one that it does.
    let run = compare(&room, &["--scheme", "W4A16:g96", "--scheme", "W8A16:g64", "--method", "rtn"]);
    assert_eq!(run.code(), Some(1), "{}", run.stderr());
    assert!(row(&table(&room), "W8A16:g64")["found"].is_object());
    assert!(row(&table(&room), "W4A16:g96")["failed"].is_string());

    for (wrong, why) in [
        (&[][..], "nothing to compare"),
        (&["--scheme", "W4A16", "--scheme", "w4a16"], "given twice"),
        (&["--scheme", "W5A16"], "W5A16"),
        (&["--scheme", "W4A16", "--save-imatrix", "i"], "--save-imatrix is for quantize"),
    ] {
        compare(&room, wrong).refuses(2, &[why]);
    }
    room.run(["compare", "model", "--scheme", "W4A16", "--report", "report", "--context", "1"])
        .refuses(2, &["--context must be at least 2"]);
    compare(&room, &["--scheme", "W4A16", "--tasks", "no.jsonl"]).refuses(1, &["no.jsonl"]);
    room.run(["compare", "model", "--scheme", "W4A16", "--report", "model"]).refuses(2, &["model"]);
}

#[test]
fn strings_of_models_and_texts_stay_strings() {
    let room = Room::new();
    room.model();
    let evil = "x<!--<script>alert(1)<!--script>|&'\"";
    std::fs::rename(room.path("model"), room.path(evil)).unwrap();
    room.file(
        "q.jsonl",
        "{\"query\": \"</script><script>a\", \"choices\": [\"<b>\", \"-->\"], \"gold\": 0}\n".repeat(2),
    );
    let run = room.run([&["compare", evil, "--also", evil, "--report", "report", "--tasks", "q.jsonl"], FEW].concat());
    run.succeeds();
    let page = std::fs::read_to_string(room.path("report/compare.html")).unwrap();
    let (head, rest) = page.split_once("<script type=\"application/json\" id=\"data\">").unwrap();
    let (json, rest) = rest.split_once("</script>").unwrap();
    assert!(!head.contains("alert") && !rest.contains("alert"), "the name stands in the data alone");
    let data: Value = serde_json::from_str(json).unwrap();
    assert!(!json.contains('<') && data["rows"][1]["name"] == evil, "{}", data["rows"][1]["name"]);
    assert_eq!(data["questions"][0]["prompt"], "</script><script>a");
    let found = &data["rows"][1]["found"];
    assert_eq!((&found["text"]["kld_max"], &found["text"]["top1"]), (&0.0.into(), &1.0.into()));
    let markdown = std::fs::read_to_string(room.path("report/compare.md")).unwrap();
    assert!(!markdown.contains("<script>"), "{markdown}");
    if let Some(browser) = browser() {
        loads(&browser, &room, 2);
    }
}

#[test]
fn answers_are_chosen_by_likelihood() {
    let room = Room::new();
    room.model();
    // Of what the model was trained on: nobody doubts which of the two goes on.
    let line = |query: &str, right: &str, wrong: &str, gold: usize| {
        let choices = if gold == 0 { [right, wrong] } else { [wrong, right] };
        serde_json::json!({ "query": query, "choices": choices, "gold": gold }).to_string()
    };
    let questions = [
        line("Once upon a", "time", "xylophone", 0),
        line("Once upon a time, there was a little girl named", "Lily", "because of the", 1),
        line("They lived happily ever", "after", "quantum", 0),
        line("Once upon a", "time", "zzzz", 1),
        // Said to be wrong, so that not all are right.
        line("Once upon a", "qqqq", "time", 0),
    ];
    room.file("q.jsonl", questions.join("\n"));
    compare(&room, &["--scheme", "W8A16", "--method", "rtn", "--tasks", "q.jsonl"]).succeeds();
    let found = table(&room);
    let [original, scheme] = ["original", "W8A16"].map(|name| &row(&found, name)["found"]["tasks"]);
    assert_eq!(original["answers"], serde_json::json!([0, 1, 0, 1, 1]));
    assert_eq!(original["accuracy"], 0.8);
    assert_eq!((&scheme["answers"], &scheme["difference"]), (&original["answers"], &0.0.into()));
    assert_eq!((&scheme["changed"], &scheme["difference_stderr"]), (&0.into(), &0.0.into()));
    assert!(scheme["kld_mean"].as_f64().unwrap() > 0.0 && scheme["tokens"].as_u64().unwrap() >= 5, "{scheme}");
    compare(&room, &["--scheme", "W8A16", "--method", "rtn", "--tasks", "none"]).succeeds();
    assert!(row(&table(&room), "W8A16")["found"]["tasks"].is_null());
}

#[test]
fn bundled_texts_are_measured_on_and_never_calibrated_on() {
    let words = |text: &str| -> Vec<String> {
        text.to_lowercase().split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_owned).collect()
    };
    let plain = |name: &str| load_text(name).unwrap().plain().unwrap().into_owned();
    let seen: HashSet<Vec<String>> = ["mixed", TEXT]
        .iter()
        .flat_map(|name| {
            let text = std::fs::read_to_string(name).unwrap_or_else(|_| plain(name));
            words(&text).windows(13).map(<[String]>::to_vec).collect::<Vec<_>>()
        })
        .collect();
    assert!(seen.len() > 100_000);
    let held_out = plain("held-out");
    for (name, text) in DOMAINS.iter().copied().chain([("held-out", &held_out[..])]) {
        assert!(text.len() > 5000, "{name}");
        if let Some(run) = words(text).windows(13).find(|run| seen.contains(*run)) {
            panic!("{name} holds what is calibrated on: {}", run.join(" "));
        }
    }
}

/// A browser, if there is one.
fn browser() -> Option<String> {
    let names = ["chromium", "chromium-browser", "google-chrome"].map(str::to_owned);
    let found =
        names.into_iter().find(|name| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success()));
    if found.is_none() {
        eprintln!("SKIPPED: there is no chromium, and the page of a comparison was not looked at in a browser");
    }
    found
}

/// Opens the room's report, which has to be drawn without a complaint, with a mark in both plots for each row.
fn loads(browser: &str, room: &Room, rows: usize) {
    let page = format!("file://{}", room.path("report/compare.html").display());
    let profile = room.path("profile");
    let output = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=5000",
        ])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(["--dump-dom", &page])
        .output()
        .unwrap();
    let (page, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let complaints: Vec<&str> = log.lines().filter(|line| line.contains(":CONSOLE")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    assert!(page.contains(&format!("data-drawn=\"{rows}\"")), "the page was not drawn to its end: {log}");
    assert_eq!(page.matches("data-row=").count(), 2 * rows);
}
