//! However a run ends, the output is old or new and whole, nothing else is left, and the exit code is one of 0 to 3.
#![cfg(target_os = "linux")]

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{Room, TEXT, children};

/// A run that takes far longer than any test waits.
const LONG: &[&str] = &["quantize", "model", "-o", "out", "--samples", "100000", "--seq-len", "128"];

const QUICK: &str = "quantize model -o out --group-size 64 --samples 2 --seq-len 64 --verify-windows 1";

/// The text of a quick run, as a shell reads it.
const ON_TEXT: &str = concat!("--calibration '", env!("CARGO_MANIFEST_DIR"), "/src/demo/calibration.txt'");

/// The arguments of a quick run.
fn quick() -> impl Iterator<Item = &'static str> {
    QUICK.split(' ').chain(["--calibration", TEXT])
}

/// A run at work, seen by its staging folder.
struct AtWork {
    child: Child,
    staging: PathBuf,
}

fn start(room: &Room) -> AtWork {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
    command.args(LONG).current_dir(room.path("")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut run = AtWork { child: command.spawn().unwrap(), staging: PathBuf::new() };
    let waiting = Instant::now();
    loop {
        let hidden = room.names().into_iter().find(|name| name.starts_with(".out.partial-"));
        // The weights are laid out right before the first of them is read.
        if let Some(staging) =
            hidden.map(|name| room.path(&name)).filter(|path| path.join("model.safetensors").exists())
        {
            run.staging = staging;
            return run;
        }
        assert!(waiting.elapsed() < Duration::from_secs(120), "the run does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl AtWork {
    /// The process that works; the other one watches it.
    fn worker(&self) -> u32 {
        let [worker] = children(self.child.id())[..] else { panic!("one child") };
        worker
    }

    fn end(self) -> Output {
        self.child.wait_with_output().unwrap()
    }
}

fn kill(signal: &str, process: u32) {
    assert!(Command::new("kill").args([&format!("-{signal}"), &process.to_string()]).status().unwrap().success());
}

fn sentence(output: &Output) -> String {
    let told = String::from_utf8(output.stderr.clone()).unwrap();
    let errors: Vec<&str> = told.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{told}");
    errors[0].to_owned()
}

#[test]
fn a_signal_ends_the_run_and_leaves_nothing() {
    // What these tests were told to ignore, as by nohup, the run ignores too.
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
    let ignored = u64::from_str_radix(ignored, 16).unwrap();
    for (signal, number) in [("INT", 2), ("TERM", 15), ("HUP", 1), ("QUIT", 3), ("USR1", 10), ("XCPU", 24)] {
        if ignored & (1 << (number - 1)) != 0 {
            continue;
        }
        let room = Room::new();
        room.model();
        let run = start(&room);
        kill(signal, run.child.id());
        let output = run.end();
        assert_eq!(output.status.signal(), Some(number), "as shells expect");
        assert_eq!(room.names(), ["model"], "{signal}");
    }
}

#[test]
fn a_stopped_worker_ends_when_it_is_asked_to() {
    let room = Room::new();
    room.model();
    let run = start(&room);
    kill("STOP", run.worker());
    kill("TERM", run.child.id());
    assert_eq!(run.end().status.signal(), Some(15));
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn a_worker_that_dies_is_explained_in_one_sentence() {
    for (signal, words) in [("KILL", "memory runs out"), ("ABRT", "memory ran out"), ("BUS", "truncated")] {
        let room = Room::new();
        room.model();
        let mut run = start(&room);
        let worker = run.worker();
        kill(signal, worker);
        // The first one is taken for a fault that comes again, and several that come before the worker has its turn are one.
        while signal == "BUS" && run.child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(50));
            let _ = Command::new("kill").args(["-BUS", &worker.to_string()]).stderr(Stdio::null()).status();
        }
        let output = run.end();
        assert_eq!(output.status.code(), Some(1), "{signal}");
        let told = sentence(&output);
        assert!(told.starts_with("error: model: ") && told.contains(words), "{told}");
        assert_eq!(room.names(), ["model"], "{signal}");
    }
}

#[test]
fn an_input_that_is_truncated_while_it_is_read_is_told() {
    let room = Room::new();
    let model = room.model();
    let run = start(&room);
    std::fs::File::options().write(true).open(model.path("model.safetensors")).unwrap().set_len(0).unwrap();
    let output = run.end();
    assert_eq!(output.status.code(), Some(1));
    assert!(sentence(&output).contains("model"), "{}", sentence(&output));
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn what_a_killed_run_has_left_goes_with_the_next_one() {
    let room = Room::new();
    room.model();
    let run = start(&room);
    let (staging, worker) = (run.staging.clone(), run.worker());
    kill("KILL", run.child.id());
    run.end();
    // The worker goes when its watcher is gone.
    let waiting = Instant::now();
    while PathBuf::from(format!("/proc/{worker}/exe")).read_link().is_ok() {
        assert!(waiting.elapsed() < Duration::from_secs(60), "the worker lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(staging.exists());
    let next = room.run(quick());
    next.succeeds();
    assert!(next.stderr().contains("removed what an interrupted run had left"), "{}", next.stderr());
    assert_eq!(room.names(), ["model", "out"]);
}

#[test]
fn two_runs_to_one_place_do_not_disturb_each_other() {
    let room = Room::new();
    room.model();
    let run = start(&room);
    // A second run of quantize would be refused.
    room.run(["convert", "model", "-o", "out"]).succeeds();
    assert!(run.staging.exists());
    kill("TERM", run.child.id());
    run.end();
    assert_eq!(room.names(), ["model", "out"]);
}

#[test]
fn what_cannot_be_printed_ends_with_an_exit_code() {
    let room = Room::new();
    room.model();
    let program = env!("CARGO_BIN_EXE_quantc");
    let code = |line: &str| room.shell(&line.replace("quantc", program)).code();
    assert_eq!(code("quantc inspect model --json > /dev/full"), Some(1));
    assert_eq!(code("quantc inspect model --json | head -n 1 > /dev/null"), Some(0));
    for help in ["--help", "--version", "quantize --help"] {
        assert_eq!(code(&format!("quantc {help} > /dev/full")), Some(1), "{help}");
    }
    assert_eq!(code("quantc inspect nothing 2> /dev/full"), Some(1));
    assert_eq!(code("quantc inspect nothing 2>&-"), Some(1));
    // The verdict stands, whoever listens.
    let strict = format!("quantc {QUICK} {ON_TEXT} --force --max-kld 1e-9");
    for streams in ["2>&- >/dev/null", "> /dev/full 2> /dev/full", ">&- 2>&-"] {
        assert_eq!(code(&format!("{strict} {streams}")), Some(3), "{streams}");
        assert_eq!(room.names(), ["model", "out"]);
    }
}

#[test]
fn a_file_that_may_not_grow_is_a_failed_write() {
    let room = Room::new();
    room.model();
    let run = room.shell(&format!("ulimit -f 1000; {} {QUICK} {ON_TEXT}", env!("CARGO_BIN_EXE_quantc")));
    run.refuses(1, &["File too large"]);
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn a_report_overwrites_no_input() {
    let room = Room::new();
    let model = room.model();
    let before = std::fs::read(model.path("model.safetensors")).unwrap();
    for (path, words) in [
        ("model/model.safetensors", "lies in the input"),
        ("out/report.json", "lies in the output"),
        ("none/report.json", "there is no folder"),
        ("model", "is a folder"),
    ] {
        room.run(quick().chain(["--report", path])).refuses(2, &["--report", words]);
    }
    assert_eq!(std::fs::read(model.path("model.safetensors")).unwrap(), before);
    assert_eq!(room.names(), ["model"]);
    room.file("recipe.toml", "bits = 4\n");
    room.file("text.gguf", "Once there was a text.\n");
    for (args, words) in [
        ("-o out --recipe recipe.toml --report recipe.toml", "lies in the input"),
        ("-o out --report /dev/full", "takes nothing"),
        ("-o m.gguf --scheme Q8_0 --report m-00001-of-00002.gguf", "lies in the output"),
        ("-o m.gguf --scheme Q8_0 --save-imatrix i --report i", "--save-imatrix names too"),
        ("-o text.gguf --scheme Q8_0 --imatrix text.gguf --force", "may not be the input"),
    ] {
        let line = format!("quantize model --method rtn --verify-text none {args}");
        room.run(line.split(' ')).refuses(2, &[words]);
    }
    std::fs::remove_file(room.path("recipe.toml")).unwrap();
    std::fs::remove_file(room.path("text.gguf")).unwrap();
    room.run(quick().chain(["--report", "report.json"])).succeeds();
    assert_eq!(room.names(), ["model", "out", "report.json"]);
}

#[test]
fn odd_places_for_an_output_are_told_or_used() {
    let room = Room::new();
    room.model();
    let run = |output: &'static str| room.run(quick().map(|word| if word == "out" { output } else { word }));
    std::os::unix::fs::symlink("nowhere", room.path("dangling")).unwrap();
    run("dangling").refuses(2, &["dangling: is a link to nowhere, which does not exist"]);
    std::fs::create_dir(room.path("empty")).unwrap();
    run("empty/.").succeeds();
    assert!(room.path("empty/config.json").exists());
    run("a/b/c").succeeds();
    std::fs::remove_dir_all(room.path("a")).unwrap();
    std::fs::write(room.path("short.txt"), "Too little.").unwrap();
    room.run("quantize model -o a/b/c --calibration short.txt".split(' ')).refuses(1, &["short.txt"]);
    std::fs::remove_file(room.path("short.txt")).unwrap();
    assert_eq!(room.names(), ["dangling", "empty", "model"], "folders made for the output go with it");
}

#[test]
fn what_is_no_plain_file_is_refused_at_once() {
    let room = Room::new();
    let model = room.model();
    room.shell("mkfifo pipe; mkdir folder; ln -s pipe link.jsonl").succeeds();
    for (args, path) in [
        ("eval model --text pipe", "pipe"),
        ("eval model --text link.jsonl", "link.jsonl"),
        ("eval model --text /dev/zero", "/dev/zero"),
        ("eval model --text /proc/self/status", "/proc/self/status"),
        ("eval pipe", "pipe"),
        ("inspect /dev/zero", "/dev/zero"),
        ("quantize model -o out --calibration pipe", "pipe"),
        ("quantize model -o out --recipe pipe", "pipe"),
        ("quantize model -o out --recipe folder", "folder"),
        ("quantize model -o out --adapter pipe", "pipe"),
        ("quantize model -o m.gguf --scheme Q4_0 --method rtn --imatrix pipe", "pipe"),
    ] {
        let run = room.run(args.split(' '));
        assert!(matches!(run.code(), Some(1 | 2)), "{args}: {:?} {}", run.code(), run.stderr());
        assert!(run.stderr().contains(path) && run.stderr().lines().count() == 1, "{args}: {}", run.stderr());
    }
    assert_eq!(room.names(), ["folder", "link.jsonl", "model", "pipe"]);
    // What a loader would read, as a pipe; and what only lies there is left where it is.
    std::fs::rename(room.path("pipe"), model.path("notes")).unwrap();
    let run = room.run(quick());
    run.succeeds();
    assert!(run.stderr().contains("notes") && !room.path("out/notes").exists(), "{}", run.stderr());
    std::fs::remove_file(model.path("tokenizer.json")).unwrap();
    std::fs::rename(model.path("notes"), model.path("tokenizer.json")).unwrap();
    room.run(["eval", "model"]).refuses(1, &["tokenizer.json", "it is a pipe, and a plain file is needed"]);
}

#[test]
fn links_that_lead_out_of_a_model_are_not_followed_into_the_output() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let room = Room::new();
    let model = room.model();
    room.file("secret", "key");
    symlink("../secret", model.path("LICENSE")).unwrap();
    let quantize = || room.run("quantize model -o out --method rtn --verify-text none".split(' '));
    quantize().refuses(1, &["model/LICENSE: a link that leads out of the model's folder, to ", "secret"]);
    std::fs::remove_file(model.path("LICENSE")).unwrap();
    std::fs::create_dir(room.path("secrets")).unwrap();
    symlink("../secrets", model.path("assets")).unwrap();
    room.run(["convert", "model", "-o", "out"]).refuses(1, &["model/assets: a link that leads out"]);
    std::fs::remove_file(model.path("assets")).unwrap();
    assert!(!room.path("out").exists());
    // A link within the folder is one of its files, and nobody's rights go along.
    std::fs::write(model.path("real"), "text").unwrap();
    std::fs::set_permissions(model.path("real"), std::fs::Permissions::from_mode(0o4777)).unwrap();
    symlink("real", model.path("NOTICE")).unwrap();
    quantize().succeeds();
    assert_eq!(std::fs::read(room.path("out/NOTICE")).unwrap(), b"text");
    let mode = std::fs::metadata(room.path("out/real")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7111, 0, "{mode:o}");
}

#[test]
fn weights_that_change_under_the_run_are_an_error() {
    let room = Room::new();
    let model = room.model();
    let weights = model.path("model.safetensors");
    let touching = format!(
        "(while [ -z \"$(ls -d .out.partial-* 2>/dev/null)\" ]; do :; done; touch -d '2001-01-01' {}) & {} {QUICK} {ON_TEXT}; code=$?; wait; exit $code",
        weights.display(),
        env!("CARGO_BIN_EXE_quantc")
    );
    let run = room.shell(&touching);
    run.refuses(1, &["model/model.safetensors: cannot be relied on: it was written to while it was read"]);
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn files_beside_the_weights_that_change_under_the_run_are_an_error() {
    for (file, change, words) in [
        ("tokenizer.json", "truncate -s 1000", "written to while it was read"),
        ("generation_config.json", "ln -sf config.json", "replaced by another file"),
    ] {
        let room = Room::new();
        let model = room.model();
        std::fs::write(model.path("generation_config.json"), "{}").unwrap();
        // The weights appear in the staging folder when all that lies beside them has been looked at.
        let changing = format!(
            "(while [ -z \"$(ls .out.partial-*/*.safetensors 2>/dev/null)\" ]; do :; done; {change} model/{file}) & {} {QUICK} {ON_TEXT}; code=$?; \
             wait; exit $code",
            env!("CARGO_BIN_EXE_quantc")
        );
        room.shell(&changing).refuses(1, &[&format!("model/{file}: cannot rely on: it "), words]);
        assert_eq!(room.names(), ["model"]);
    }
}

/// Whoever starts a program hands on which signals it does not get.
#[test]
fn a_signal_that_is_blocked_from_outside_hangs_nothing() {
    let room = Room::new();
    room.model();
    let run = room.shell(&format!("timeout 60 env --block-signal=CHLD {} inspect model", env!("CARGO_BIN_EXE_quantc")));
    if run.stderr().contains("unrecognized option") {
        eprintln!("SKIPPED: env has no --block-signal");
        return;
    }
    run.succeeds();
}

#[test]
fn the_same_input_gives_the_same_bytes_wherever_it_lies() {
    let room = Room::new();
    room.model();
    let text = "The same words again and again, for as long as it takes. ".repeat(400);
    room.file("text.txt", text);
    room.shell("mkdir -p elsewhere/deep; cp -r model elsewhere/deep/another; cp text.txt elsewhere/text.txt")
        .succeeds();
    let base = "quantize model --samples 2 --seq-len 64 --verify-text none --calibration text.txt";
    let moved = base
        .replace("model", "elsewhere/deep/another")
        .replace("text.txt", room.path("elsewhere/text.txt").to_str().unwrap());
    for (base, out) in [(base, "here"), (&moved[..], "there")] {
        room.run(format!("{base} -o {out} --group-size 64").split(' ')).succeeds();
        let gguf = format!("{base} -o {out}.gguf --scheme Q4_K_M --save-imatrix {out}.imatrix");
        room.run(gguf.split(' ')).succeeds();
    }
    let same = |here: &str, there: &str| {
        let [here, there] = [here, there].map(|name| std::fs::read(room.path(name)).unwrap());
        assert!(here == there, "{}", String::from_utf8_lossy(&there[..there.len().min(2000)]));
    };
    for name in ["model.safetensors", "config.json", "README.md"] {
        same(&format!("here/{name}"), &format!("there/{name}"));
    }
    same("here.gguf", "there.gguf");
    same("here.imatrix", "there.imatrix");
    let card = std::fs::read_to_string(room.path("there/README.md")).unwrap();
    assert!(!card.contains("elsewhere") && card.contains("text.txt"), "{card}");
}

#[test]
fn names_steer_no_terminal() {
    let room = Room::new();
    let model = room.model();
    let mut weights = std::fs::read(model.path("model.safetensors")).unwrap();
    // A name of the same length, so that the header keeps its own.
    let from = b"model.norm.weight";
    let at = weights.windows(from.len()).position(|window| window == from).unwrap();
    let raw = br"model.\u001bnorm.";
    assert_eq!(raw.len(), from.len());
    weights[at..at + from.len()].copy_from_slice(raw);
    std::fs::write(model.path("model.safetensors"), weights).unwrap();
    for args in ["inspect model", "convert model -o out", "eval model"] {
        let run = room.run(args.split(' '));
        let told = [run.stdout(), run.stderr()].concat();
        assert!(!told.contains('\u{1b}'), "{args}");
        assert!(told.contains("norm"), "{args}: {told}");
    }
}

#[test]
fn more_threads_than_make_sense_are_not_started() {
    let room = Room::new();
    room.model();
    let run = room.run(quick().chain(["--threads", "65536"]));
    run.succeeds();
    assert!(run.stderr().contains("note: --threads 65536 is more than "), "{}", run.stderr());
}

#[test]
fn devices_and_pipes_are_no_place_for_an_output() {
    let room = Room::new();
    room.model();
    room.shell("mkfifo m.gguf report.json").succeeds();
    let gguf = "quantize model -o m.gguf --scheme Q4_0 --method rtn --verify-text none";
    room.run(gguf.split(' ')).refuses(2, &["m.gguf: is a device or a pipe"]);
    room.run(gguf.split(' ').chain(["--force"])).refuses(2, &["m.gguf: is a device or a pipe"]);
    room.run(quick().chain(["--report", "report.json"])).refuses(2, &["report.json: is a pipe"]);
    room.run(gguf.replace("m.gguf", "/dev/null").split(' ').chain(["--format", "gguf", "--force"]))
        .refuses(2, &["/dev/null"]);
    assert_eq!(room.names(), ["m.gguf", "model", "report.json"]);
}

#[test]
fn an_earlier_output_goes_whatever_its_rights_are() {
    use std::os::unix::fs::PermissionsExt;
    let room = Room::new();
    room.model();
    let quantize = |more: &str| {
        room.run(format!("quantize model -o out --method rtn --verify-text none{more}").split(' ')).succeeds();
    };
    quantize("");
    std::fs::set_permissions(room.path("out"), std::fs::Permissions::from_mode(0o555)).unwrap();
    quantize(" --force");
    assert_eq!(room.names(), ["model", "out"]);
}

#[test]
fn dropout_of_a_tokenizer_is_left_to_training() {
    let room = Room::new();
    let model = room.model();
    let ids = || room.run(["eval", "model", "--context", "64", "--windows", "2", "--json"]).stdout();
    let before = ids();
    let path = model.path("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["model"]["dropout"] = 0.9.into();
    std::fs::write(&path, json.to_string()).unwrap();
    let ppl = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap()["perplexity"].clone();
    assert_eq!(ppl(ids()), ppl(before));
}

#[test]
fn what_finds_no_room_for_its_stack_is_not_called_a_damaged_file() {
    let room = Room::new();
    room.model();
    let run = room.shell(&format!("ulimit -v 300000; exec {} {QUICK} {ON_TEXT}", env!("CARGO_BIN_EXE_quantc")));
    run.refuses(1, &["model/tokenizer.json: there is no thread to work with it on", "more memory"]);
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn a_small_limit_on_stacks_is_not_met() {
    let room = Room::new();
    room.model();
    let run = room.shell(&format!("ulimit -s 128; exec {} {QUICK} {ON_TEXT}", env!("CARGO_BIN_EXE_quantc")));
    run.succeeds();
}

/// What goes beside a GGUF file is looked for before the work, and a name that ends in a slash is that name.
#[test]
fn places_beside_a_file_are_looked_at_first() {
    let room = Room::new();
    room.whole_model();
    std::fs::create_dir(room.path("m.gguf.README.md")).unwrap();
    let quantize =
        ["quantize", "model", "-o", "m.gguf/", "--scheme", "Q8_0", "--method", "rtn", "--verify-text", "none"];
    room.run(quantize).refuses(2, &["m.gguf.README.md: is a folder in the place of a file that goes beside m.gguf;"]);
    std::fs::remove_dir(room.path("m.gguf.README.md")).unwrap();
    let run = room.run(quantize);
    run.succeeds();
    let told = run.stdout() + &run.stderr();
    assert!(told.contains("m.gguf: 28 linears") && !told.contains("m.gguf/"), "{told}");
}
