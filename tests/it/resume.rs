//! Runs that are killed, and go on.
#![cfg(unix)]

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Room, TEXT, children};

/// Long enough that it does not end before it is killed.
const SLOW: &[&str] = &["--samples", "48", "--seq-len", "256", "--calibration", TEXT, "--verify-text", "none"];

fn words<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    [&["quantize", "model"], flags, SLOW].concat()
}

/// Staging folders, and finished blocks in each.
fn staged(room: &Room) -> Vec<(PathBuf, usize)> {
    let hidden = room.names().into_iter().filter(|name| name.contains(".partial-")).map(|name| room.path(&name));
    let lines = |folder: &PathBuf| {
        let journal = std::fs::read(folder.join(".quantc-journal")).unwrap_or_default();
        journal.iter().filter(|byte| **byte == b'\n').count().saturating_sub(1)
    };
    hidden.map(|folder| (folder.clone(), lines(&folder))).collect()
}

/// Sends a signal to a run once every output has so many finished blocks.
fn kill_after(room: &Room, flags: &[&str], outputs: usize, blocks: usize, signal: &str) -> Output {
    let before = room.names();
    loop {
        let output = kill_once(room, flags, outputs, blocks, signal);
        if !output.status.success() {
            return output;
        }
        // On a machine that has much to do it may be done before it is killed.
        for name in room.names().into_iter().filter(|name| !before.contains(name)) {
            let path = room.path(&name);
            if path.is_dir() { std::fs::remove_dir_all(path).unwrap() } else { std::fs::remove_file(path).unwrap() }
        }
    }
}

fn kill_once(room: &Room, flags: &[&str], outputs: usize, blocks: usize, signal: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
    command.args(words(flags)).current_dir(room.path("")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = command.spawn().unwrap();
    let waiting = Instant::now();
    loop {
        let staged = staged(room);
        if std::fs::read_to_string(format!("/proc/{}/stat", run.id())).is_ok_and(|stat| stat.contains(") Z ")) {
            break;
        }
        if staged.len() == outputs && staged.iter().all(|(_, finished)| *finished >= blocks) {
            break;
        }
        assert!(waiting.elapsed() < Duration::from_secs(300), "the run does not get so far");
        std::thread::sleep(Duration::from_millis(2));
    }
    let workers = children(run.id());
    let signal = format!("-{signal}");
    assert!(Command::new("kill").args([&signal, &run.id().to_string()]).status().unwrap().success());
    let output = run.wait_with_output().unwrap();
    // A worker whose watcher was killed ends a moment later, and holds its lock until then.
    let lives =
        |worker: &u32| std::fs::read_to_string(format!("/proc/{worker}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    while workers.iter().any(lives) {
        std::thread::sleep(Duration::from_millis(5));
    }
    output
}

fn told(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// All files of some outputs but for their reports, which hold times.
fn held(room: &Room, outputs: &[&str]) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for name in room.names().into_iter().filter(|name| outputs.iter().any(|output| name.starts_with(output))) {
        let path = room.path(&name);
        if path.is_dir() {
            for entry in std::fs::read_dir(&path).unwrap() {
                let path = entry.unwrap().path();
                all.push((path.display().to_string(), std::fs::read(path).unwrap()));
            }
        } else {
            all.push((path.display().to_string(), std::fs::read(path).unwrap()));
        }
    }
    all.retain(|(name, _)| !name.ends_with("report.json"));
    all.sort();
    all
}

#[test]
fn a_run_that_was_killed_goes_on_and_ends_in_the_same_bytes() {
    for (flags, outputs) in [
        (&["-o", "out", "--method", "awq+gptq", "--group-size", "64"][..], &["out"][..]),
        (&["-o", "out.gguf", "--split-max-size", "1M", "--save-imatrix", "importance.gguf"], &["out", "importance"]),
        (&["--target", "gguf:Q3_K_S=out.gguf", "--target", "gptq:W3A16:g32=two", "--desc-act"], &["out", "two"]),
        (&["-o", "out", "--format", "mlx"], &["out"]),
    ] {
        let room = Room::new();
        room.whole_model().keep_layers(3);
        room.run(words(flags)).succeeds();
        let expected = held(&room, outputs);
        for output in room.names().into_iter().filter(|name| name != "model") {
            let path = room.path(&output);
            if path.is_dir() { std::fs::remove_dir_all(path).unwrap() } else { std::fs::remove_file(path).unwrap() }
        }
        let count = if flags[0] == "--target" { 2 } else { 1 };
        // Twice in a row, the second time in a later block.
        let first = kill_after(&room, flags, count, 1, "KILL");
        assert_eq!(first.status.signal(), Some(9));
        let second = kill_after(&room, flags, count, 2, "TERM");
        assert!(
            told(&second).contains("finished blocks are kept") && told(&second).contains("--discard"),
            "{}",
            told(&second)
        );
        let last = room.run(words(flags));
        last.succeeds();
        assert!(last.stderr().contains("blocks that an interrupted run had finished"), "{}", last.stderr());
        let found = held(&room, outputs);
        let names = |all: &[(String, Vec<u8>)]| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected), "{flags:?}");
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            assert!(found == expected, "{flags:?}: {name}");
        }
        assert!(staged(&room).is_empty());
        // The report knows all linears, whoever solved them.
        let report = if flags[1] == "out" { "out/report.json" } else { "out.gguf.report.json" };
        let report: Value = serde_json::from_slice(&std::fs::read(room.path(report)).unwrap()).unwrap();
        assert_eq!(report["linears"].as_array().unwrap().len(), 21);
        assert_eq!(report["smoothings"].as_array().unwrap().is_empty(), !flags.contains(&"awq+gptq"));
    }
}

/// The blocks that are run again leave keys and values for those behind them, as they did the first time.
#[test]
fn a_run_goes_on_among_blocks_that_read_what_others_have_left() {
    let (room, source) = (Room::new(), crate::families::checkpoint("gemma4_text_plain"));
    crate::gguf_families::spell(source.path());
    std::fs::create_dir(room.path("model")).unwrap();
    for entry in std::fs::read_dir(source.path()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, room.path("model").join(path.file_name().unwrap())).unwrap();
    }
    let flags = ["-o", "out", "--method", "awq+gptq", "--group-size", "32", "--force"];
    room.run(words(&flags)).succeeds();
    let expected = held(&room, &["out"]);
    std::fs::remove_dir_all(room.path("out")).unwrap();
    kill_after(&room, &flags, 1, 4, "KILL");
    let last = room.run(words(&flags));
    last.succeeds();
    assert!(last.stderr().contains("blocks that an interrupted run had finished"), "{}", last.stderr());
    let found = held(&room, &["out"]);
    assert!(found == expected && !found.is_empty());
}

#[test]
fn another_run_does_not_go_on_and_says_what_differs() {
    let room = Room::new();
    room.model();
    let flags = ["-o", "out", "--group-size", "64"];
    let changed: &[(&[&str], &str)] = &[
        (&["-o", "out", "--group-size", "32"], "out.recipe.scheme.group was 64 and is 32"),
        (&["-o", "out", "--group-size", "64", "--no-resume"], "--no-resume says so"),
    ];
    for (other, why) in changed {
        kill_after(&room, &flags, 1, 1, "KILL");
        let run = room.run([&words(other)[..], &["--force"]].concat());
        run.succeeds();
        assert!(run.stderr().contains("not gone on with") && run.stderr().contains(why), "{}", run.stderr());
        assert_eq!(room.names(), ["model", "out"]);
        std::fs::remove_dir_all(room.path("out")).unwrap();
    }
    // Neither does one of other inputs.
    kill_after(&room, &flags, 1, 1, "KILL");
    let config = room.path("model/generation_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text + "\n").unwrap();
    let run = room.run(words(&flags));
    run.succeeds();
    assert!(run.stderr().contains("since model.generation_config.json is another"), "{}", run.stderr());
}

#[test]
fn what_is_kept_is_listed_and_discarded() {
    let room = Room::new();
    room.model();
    let flags = ["-o", "out", "--group-size", "64"];
    let run = kill_after(&room, &flags, 1, 1, "INT");
    assert!(told(&run).contains("the same command goes on after them"), "{}", told(&run));
    let listed = room.run(["clean", ".", "--list"]);
    listed.succeeds();
    assert!(
        listed.stdout().contains("finished blocks, ") && !listed.stdout().contains("removed"),
        "{}",
        listed.stdout()
    );
    assert_eq!(staged(&room).len(), 1);
    let discarded = room.run([&words(&flags)[..], &["--discard"]].concat());
    discarded.succeeds();
    assert!(discarded.stdout().contains("out: ") && discarded.stdout().contains("removed"), "{}", discarded.stdout());
    assert_eq!(room.names(), ["model"]);
    kill_after(&room, &flags, 1, 1, "KILL");
    let cleaned = room.run(["clean", "."]);
    cleaned.succeeds();
    assert!(cleaned.stdout().contains("MB, removed"), "{}", cleaned.stdout());
    assert_eq!(room.names(), ["model"]);
    assert!(room.run(["clean", "."]).stdout().contains("no interrupted run"));
    room.run(["clean", "nowhere"]).refuses(1, &["nowhere"]);
}

#[test]
fn of_two_runs_to_one_place_the_second_is_refused_or_waits() {
    let room = Room::new();
    room.model();
    let flags = ["-o", "out", "--group-size", "64"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
    command.args(words(&flags)).current_dir(room.path("")).stdout(Stdio::null()).stderr(Stdio::null());
    let mut first = command.spawn().unwrap();
    while staged(&room).is_empty() {
        std::thread::sleep(Duration::from_millis(2));
    }
    room.run(words(&flags)).refuses(2, &["out: another run (process ", "--wait"]);
    let second = room.run([&words(&flags)[..], &["--wait", "--force"]].concat());
    assert!(first.wait().unwrap().success());
    second.succeeds();
    assert_eq!(room.names(), ["model", "out"]);
}
