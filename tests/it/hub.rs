//! Models from and to a hub, which runs in the test: no test uses the network.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use self::server::{Hub, TOKEN, sha256};
use crate::folders::small_adapter;
use crate::harness::{Room, Run, children};

mod server;

/// Bytes of the built-in model's file of weights.
const WEIGHTS: &str = "model.safetensors";

/// The built-in model's files, and what repositories have beside them that nobody here needs.
fn small() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo/model");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<(String, Vec<u8>)> = entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect();
    for (name, bytes) in [
        (".gitattributes", 10),
        ("README.md", 20),
        ("LICENSE", 20),
        ("chat_template.jinja", 30),
        ("pytorch_model.bin", 200_000),
        ("original/consolidated.00.pth", 200_000),
        ("onnx/model.onnx", 200_000),
        ("m-Q8_0.gguf", 200_000),
        ("picture.png", 5),
    ] {
        files.push((name.to_owned(), vec![b'x'; bytes]));
    }
    files
}

fn weights() -> Vec<u8> {
    small().into_iter().find(|(name, _)| name == WEIGHTS).unwrap().1
}

/// quantc in a room, with the cache in `hf` there, that asks this hub.
fn command(hub: &Hub, room: &Room, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
    command.args(line.split_whitespace()).current_dir(room.path("")).stdin(Stdio::null());
    for name in
        ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH"]
    {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", hub.address()).env("HF_HOME", room.path("hf"));
    command.env("NO_PROXY", "127.0.0.1,localhost").env("no_proxy", "127.0.0.1,localhost");
    command
}

fn run(hub: &Hub, room: &Room, line: &str) -> Run {
    Run::of(command(hub, room, line).output().unwrap())
}

/// Demands a failure with this code whose last line holds all of `words`.
#[track_caller]
fn fails(run: &Run, code: i32, words: &[&str]) {
    let told = run.stderr();
    assert_eq!(run.code(), Some(code), "{told}");
    let last = told.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: ") && !told.contains("panicked"), "{told}");
    words.iter().for_each(|word| assert!(last.contains(word), "`{word}` is missing in: {last}"));
}

/// The files of a snapshot in the cache of a room, as they are read.
fn snapshot(room: &Room, commit: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = room.path("hf/hub/models--org--small/snapshots").join(commit);
    let entries = std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), std::fs::read(&path).ok()?))).collect()
}

/// Names of blobs that are not whole.
fn incomplete(room: &Room) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(room.path("hf/hub/models--org--small/blobs")).into_iter().flatten().flatten();
    let named = entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len()));
    named.filter(|(name, _)| name.ends_with(".incomplete")).collect()
}

const QUICK: &str = "--method rtn --group-size 64 --verify-text none";

#[test]
fn a_model_is_downloaded_once_into_the_cache_as_hugging_face_lays_it_out() {
    let (hub, room) = (Hub::start(), Room::new());
    let commit = hub.publish("org/small", small());
    hub.faults().page.store(4, Ordering::Relaxed);
    let made = run(&hub, &room, &format!("quantize org/small -o out {QUICK} --junit tests.xml"));
    made.succeeds();
    let told = made.stderr();
    assert!(told.contains("org/small: downloading its weights (1 files, 8.4 MB) at commit"), "{told}");
    let files = snapshot(&room, &commit);
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    let kept = [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, kept);
    assert!(small().iter().all(|(name, bytes)| files.get(name).is_none_or(|found| found == bytes)));
    let root = room.path("hf/hub/models--org--small");
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), commit);
    let hash = sha256(&weights());
    assert!(root.join("blobs").join(&hash).is_file());
    #[cfg(unix)]
    assert_eq!(
        std::fs::read_link(root.join("snapshots").join(&commit).join(WEIGHTS)).unwrap(),
        Path::new("../../blobs").join(&hash)
    );
    assert!(!hub.asked().is_empty());
    // It is there now: nobody is asked again, and the card knows what it was made of.
    run(&hub, &room, "inspect org/small").succeeds();
    run(&hub, &room, &format!("check org/small@{}", &commit[..8])).succeeds();
    assert!(hub.asked().is_empty());
    assert!(std::fs::read_to_string(room.path("out/README.md")).unwrap().contains("base_model: org/small"));
    // A revision that is not there is fetched, of which all contents are there already.
    run(&hub, &room, "check org/small@v1").succeeds();
    assert!(!hub.asked().iter().any(|asked| asked.path.contains("resolve")));
    assert_eq!(std::fs::read_to_string(root.join("refs/v1")).unwrap(), commit);
    run(&hub, &room, "check org/small@refs/pr/1").succeeds();
    // What the snapshot lacks is fetched, and nothing else.
    std::fs::remove_file(root.join("snapshots").join(&commit).join(WEIGHTS)).unwrap();
    std::fs::remove_file(root.join("blobs").join(&hash)).unwrap();
    hub.asked();
    run(&hub, &room, "check org/small").succeeds();
    let fetched: Vec<_> = hub.asked().into_iter().filter(|asked| asked.path.contains("/resolve/")).collect();
    assert!(fetched.len() == 1 && fetched[0].path.ends_with(WEIGHTS), "{fetched:?}");
}

#[test]
fn plans_and_inspections_read_headers_alone_and_say_the_same() {
    let (hub, room) = (Hub::start(), Room::new());
    let commit = hub.publish("org/small", small());
    room.whole_model();
    let plan = |model: &str| {
        run(&hub, &room, &format!("plan {model} -q --device cpu --group-size 64 --samples 4 --seq-len 64 --json"))
    };
    let (there, here) = (plan("org/small"), plan("model"));
    there.succeeds();
    assert!(hub.asked().iter().all(|asked| !asked.path.contains("cdn")
        || asked.headers.contains_key("range")
        || asked.path.contains(&sha256(&small()[0].1))));
    let of = |run: &Run| -> serde_json::Value { serde_json::from_str(&run.stdout()).unwrap() };
    let (there, here) = (of(&there), of(&here));
    for key in ["name", "family", "parameters", "bytes", "tied"] {
        assert_eq!(there[key], here[key], "{key}");
    }
    assert_eq!(there["outputs"][0]["bytes"], here["outputs"][0]["bytes"]);
    let inspected = run(&hub, &room, "inspect org/small");
    inspected.succeeds();
    assert!(
        inspected.stderr().contains("its weights (8.4 MB) are not on this disk and were not downloaded"),
        "{}",
        inspected.stderr()
    );
    assert!(!snapshot(&room, &commit).contains_key(WEIGHTS));
    // What would be refused is refused before the weights come.
    fails(&run(&hub, &room, "quantize org/small -o out --group-size 96 -q"), 2, &["group"]);
    assert!(!snapshot(&room, &commit).contains_key(WEIGHTS) && !room.path("out").exists());
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_broke() {
    let (hub, room) = (Hub::start(), Room::new());
    let commit = hub.publish("org/small", small());
    hub.faults().cut_after.store(1_000_000, Ordering::Relaxed);
    hub.faults().cuts.store(3, Ordering::Relaxed);
    run(&hub, &room, "check org/small").succeeds();
    assert_eq!(snapshot(&room, &commit)[WEIGHTS], weights());
    let ranges: Vec<String> = hub.asked().into_iter().filter_map(|asked| asked.headers.get("range").cloned()).collect();
    assert!(ranges.iter().any(|range| range == "bytes=1000000-"), "{ranges:?}");
    assert!(incomplete(&room).is_empty());
    // A hub that knows no ranges is read from the beginning.
    let room = Room::new();
    hub.faults().knows_no_ranges.store(true, Ordering::Relaxed);
    hub.faults().cuts.store(2, Ordering::Relaxed);
    run(&hub, &room, "check org/small").succeeds();
    assert_eq!(snapshot(&room, &commit)[WEIGHTS], weights());
}

/// Waits until something is so.
#[track_caller]
fn until(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..600 {
        if is() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("not within 30 s: {what}");
}

/// Ends a run and the process that works for it, as a power cut would.
#[cfg(unix)]
fn kill(mut child: Child) {
    for id in children(child.id()).into_iter().chain([child.id()]) {
        Command::new("kill").args(["-9", &id.to_string()]).status().unwrap();
    }
    child.wait().unwrap();
}

#[cfg(unix)]
#[test]
fn a_run_that_was_killed_goes_on_where_it_was() {
    let (hub, room) = (Hub::start(), Room::new());
    let commit = hub.publish("org/small", small());
    hub.faults().cut_after.store(3_000_000, Ordering::Relaxed);
    hub.faults().stalls.store(true, Ordering::Relaxed);
    hub.faults().cuts.store(100, Ordering::Relaxed);
    let child = command(&hub, &room, "check org/small").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("3 MB are there", || incomplete(&room).iter().any(|(_, bytes)| *bytes == 3_000_000));
    kill(child);
    hub.faults().cuts.store(0, Ordering::Relaxed);
    assert!(!snapshot(&room, &commit).contains_key(WEIGHTS));
    assert!(!room.path("hf/hub/models--org--small/refs/main").exists());
    hub.asked();
    run(&hub, &room, "check org/small").succeeds();
    let ranges: Vec<String> = hub.asked().into_iter().filter_map(|asked| asked.headers.get("range").cloned()).collect();
    assert!(ranges.contains(&"bytes=3000000-".to_owned()), "{ranges:?}");
    assert_eq!(snapshot(&room, &commit)[WEIGHTS], weights());
}

#[test]
fn two_runs_that_want_the_same_model_share_one_download() {
    let (hub, room) = (Hub::start(), Room::new());
    let commit = hub.publish("org/small", small());
    let start = || command(&hub, &room, "check org/small").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let all: Vec<Child> = (0..3).map(|_| start()).collect();
    for mut child in all {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(snapshot(&room, &commit)[WEIGHTS], weights());
    let cdn = format!("/cdn/{}", sha256(&weights()));
    assert_eq!(hub.asked().iter().filter(|asked| asked.path.starts_with(&cdn)).count(), 1);
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_else() {
    let hub = Hub::start();
    hub.publish("org/small", small());
    hub.repos().get_mut("org/small").unwrap().private = true;
    let with = |room: &Room, change: &dyn Fn(&mut Command)| {
        let mut command = command(&hub, room, "check org/small");
        change(&mut command);
        Run::of(command.output().unwrap())
    };
    let room = Room::new();
    fails(&with(&room, &|_| {}), 1, &["the hub has no public org/small", "HF_TOKEN"]);
    hub.asked();
    let file = room.file("elsewhere", format!("{TOKEN}\n"));
    type Way<'a> = &'a dyn Fn(&Room, &mut Command);
    let ways: [Way<'_>; 3] = [
        &|_, command| _ = command.env("HF_TOKEN", TOKEN),
        &|_, command| _ = command.env("HF_TOKEN_PATH", &file),
        &|room, _| drop(room.file("hf/token", TOKEN)),
    ];
    for way in ways {
        let room = Room::new();
        with(&room, &|command| way(&room, command)).succeeds();
        let asked = hub.asked();
        let (elsewhere, here): (Vec<_>, Vec<_>) = asked.iter().partition(|asked| asked.path.starts_with("/cdn/"));
        assert!(!elsewhere.is_empty() && elsewhere.iter().all(|asked| !asked.headers.contains_key("authorization")));
        // Redirects within the hub keep it.
        assert!(here.iter().any(|asked| asked.path.contains("resolve-cache")));
        assert!(
            here.iter().all(|asked| asked.headers.get("authorization").is_some_and(|said| said == "Bearer hf_known"))
        );
    }
    fails(
        &with(&Room::new(), &|command| _ = command.env("HF_TOKEN", "hf_old")),
        1,
        &["does not know your token", "Invalid credentials"],
    );
    fails(&with(&Room::new(), &|command| _ = command.env("HF_TOKEN", "two\nlines")), 2, &["letters that no token has"]);
}

#[test]
fn what_cannot_be_had_is_told_with_what_to_do() {
    let (hub, room) = (Hub::start(), Room::new());
    let commit = hub.publish("org/small", small());
    fails(&run(&hub, &room, "check org/none"), 1, &["org/none", "the hub has no public org/none"]);
    fails(&run(&hub, &room, "check org/small@v9"), 1, &["org/small has no such branch, tag or commit"]);
    fails(&run(&hub, &room, "check hf://small"), 2, &["hf://org/name"]);
    hub.repos().get_mut("org/small").unwrap().gated = true;
    fails(
        &run(&hub, &room, "check org/small"),
        1,
        &["only to those who accept its licence", "/org/small", "set HF_TOKEN"],
    );
    hub.repos().get_mut("org/small").unwrap().gated = false;
    // Other bytes than the hub lists never get the file's name.
    hub.faults().spoils.store(true, Ordering::Relaxed);
    fails(&run(&hub, &room, "check org/small"), 1, &["tokenizer.json", "its SHA-256 is", "was removed"]);
    assert!(!snapshot(&room, &commit).contains_key("tokenizer.json") && incomplete(&room).is_empty());
    hub.faults().spoils.store(false, Ordering::Relaxed);
    hub.faults().spoils_small.store(true, Ordering::Relaxed);
    let other = Room::new();
    fails(&run(&hub, &other, "check org/small"), 1, &["its hash in git is", "and the hub lists", "was removed"]);
    assert!(!snapshot(&other, &commit).contains_key("config.json") && incomplete(&other).is_empty());
    hub.faults().spoils_small.store(false, Ordering::Relaxed);
    // Nobody is there, the network is forbidden, nothing comes any more.
    let with = |line: &str, name: &str, value: &str| {
        Run::of(command(&hub, &Room::new(), line).env(name, value).output().unwrap())
    };
    fails(
        &with("check org/small", "HF_ENDPOINT", "http://127.0.0.1:9"),
        1,
        &["cannot reach the hub", "HF_HUB_OFFLINE=1"],
    );
    fails(&with("check org/small", "HF_ENDPOINT", "hub"), 2, &["HF_ENDPOINT is `hub`"]);
    hub.asked();
    for variable in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        fails(&with("check org/small", variable, "1"), 1, &["not in the cache", variable]);
    }
    assert!(hub.asked().is_empty());
    // A path asks nobody, nor does a name that may be one; hf:// says which is meant.
    room.file("org/other", "");
    fails(&run(&hub, &room, "check org/small"), 1, &["cannot open", "hf://org/small"]);
    assert!(hub.asked().is_empty());
    run(&hub, &room, "check hf://org/small").succeeds();
    std::fs::remove_dir_all(room.path("org")).unwrap();
    // Without its weights the cache's model is fetched, unless that is forbidden.
    std::fs::remove_file(room.path("hf/hub/models--org--small/snapshots").join(&commit).join(WEIGHTS)).unwrap();
    let mut offline = command(&hub, &room, "check org/small");
    assert_eq!(Run::of(offline.env("HF_HUB_OFFLINE", "true").output().unwrap()).code(), Some(1));
    run(&hub, &room, "check org/small").succeeds();
}

#[test]
fn a_connection_on_which_nothing_comes_is_given_up() {
    let (hub, room) = (Hub::start(), Room::new());
    let commit = hub.publish("org/small", small());
    hub.faults().cut_after.store(0, Ordering::Relaxed);
    hub.faults().stalls.store(true, Ordering::Relaxed);
    hub.faults().cuts.store(1000, Ordering::Relaxed);
    let mut command = command(&hub, &room, "check org/small");
    let gone = Run::of(command.env("HF_HUB_DOWNLOAD_TIMEOUT", "1").output().unwrap());
    fails(&gone, 1, &["the connection broke", "nothing came for too long", "goes on where it stopped"]);
    assert!(!snapshot(&room, &commit).contains_key("tokenizer.json"));
}

#[test]
fn of_several_gguf_files_it_is_said_which() {
    let (hub, room) = (Hub::start(), Room::new());
    room.model();
    for scheme in ["Q4_0", "Q8_0"] {
        run(
            &hub,
            &room,
            &format!("quantize model -o m-{scheme}.gguf --scheme {scheme} --method rtn --verify-text none -q"),
        )
        .succeeds();
    }
    let of = |name: &str| (name.to_owned(), std::fs::read(room.path(name)).unwrap());
    let card = ("README.md".to_owned(), b"x".to_vec());
    hub.publish("org/small", [of("m-Q4_0.gguf"), of("m-Q8_0.gguf"), card.clone()]);
    hub.publish("org/one", [of("m-Q4_0.gguf"), card]);
    fails(
        &run(&hub, &room, "inspect org/small"),
        1,
        &["say which", "org/small:Q4_K_M", "org/small:m-Q4_0.gguf, org/small:m-Q8_0.gguf"],
    );
    fails(&run(&hub, &room, "inspect org/small:Q5_K"), 1, &[":Q5_K is not the name or type", "org/small:m-Q4_0.gguf"]);
    for name in ["org/small:q4_0", "org/small@main:m-Q4_0.gguf", "org/one", "org/small:Q4_0"] {
        run(&hub, &room, &format!("inspect {name}")).succeeds();
    }
    let root = room.path("hf/hub/models--org--small");
    assert_eq!(std::fs::read_dir(root.join("blobs")).unwrap().count(), 1, "the other one was not asked for");
    hub.asked();
    run(&hub, &room, "inspect org/small:Q4_0").succeeds();
    assert!(hub.asked().is_empty());
    run(&hub, &room, "inspect org/small:Q8_0").succeeds();
}

/// What a repository holds now.
fn files(hub: &Hub, id: &str) -> BTreeMap<String, Vec<u8>> {
    hub.repos()[id].files.clone()
}

fn push(hub: &Hub, room: &Room, line: &str) -> Run {
    Run::of(command(hub, room, line).env("HF_TOKEN", TOKEN).output().unwrap())
}

#[test]
fn outputs_are_pushed_as_they_are_and_can_be_used_from_there() {
    let (hub, room) = (Hub::start(), Room::new());
    room.model();
    let made = push(&hub, &room, &format!("quantize model -o out {QUICK} --push-to org/small-w4 --push-private"));
    made.succeeds();
    assert!(made.stdout().contains(&format!("pushed: {}/org/small-w4/commit/", hub.address())), "{}", made.stdout());
    let there = files(&hub, "org/small-w4");
    for name in ["config.json", WEIGHTS, "README.md", "report.json", "tokenizer.json"] {
        assert_eq!(there[name], std::fs::read(room.path("out").join(name)).unwrap(), "{name}");
    }
    assert!(hub.repos()["org/small-w4"].private);
    let asked = hub.asked();
    let uploads: Vec<_> = asked.iter().filter(|asked| asked.method == "PUT").collect();
    assert!(
        uploads
            .iter()
            .all(|asked| !asked.headers.contains_key("authorization") && asked.headers.contains_key("content-length"))
    );
    push(&hub, &room, "eval org/small-w4 --reference model --windows 1 --context 32").succeeds();
    // Large files that are there are not uploaded again, and weights of an earlier push go.
    hub.repos().get_mut("org/small-w4").unwrap().files.insert("model-00001-of-00002.safetensors".to_owned(), vec![1]);
    hub.asked();
    push(&hub, &room, "push out org/small-w4").succeeds();
    assert!(hub.asked().iter().all(|asked| asked.method != "PUT"));
    assert!(!files(&hub, "org/small-w4").contains_key("model-00001-of-00002.safetensors"));
    // In parts, after an upload that failed; a GGUF file goes with its report and its card.
    hub.faults().part.store(1_000_000, Ordering::Relaxed);
    hub.faults().refuses_uploads.store(2, Ordering::Relaxed);
    push(&hub, &room, "quantize model -o m.gguf --scheme Q8_0 --method rtn --verify-text none -q --push-to org/m-gguf")
        .succeeds();
    let there = files(&hub, "org/m-gguf");
    assert_eq!(there["m.gguf"], std::fs::read(room.path("m.gguf")).unwrap());
    assert!(there.contains_key("m.gguf.report.json") && !hub.repos()["org/m-gguf"].private);
    // Its card is the page of the repository, as long as no other file of it has one.
    let card = std::fs::read(room.path("m.gguf.README.md")).unwrap();
    assert!(there["m.gguf.README.md"] == card && there["README.md"] == card);
    std::fs::copy(room.path("m.gguf"), room.path("n.gguf")).unwrap();
    std::fs::write(room.path("n.gguf.README.md"), "another").unwrap();
    push(&hub, &room, "push n.gguf org/m-gguf").succeeds();
    let there = files(&hub, "org/m-gguf");
    assert!(there["n.gguf.README.md"] == b"another" && there["README.md"] == card);
    // A public repository is none that was to be private.
    fails(&push(&hub, &room, "push m.gguf org/m-gguf --private"), 1, &["org/m-gguf is public, and was to be private"]);
    push(&hub, &room, "convert model -o plain --dtype f16 --push-to org/plain").succeeds();
    assert_eq!(files(&hub, "org/plain")[WEIGHTS], std::fs::read(room.path("plain").join(WEIGHTS)).unwrap());
}

#[test]
fn what_cannot_be_pushed_is_refused_before_the_work_or_stays_here() {
    let (hub, room) = (Hub::start(), Room::new());
    room.model();
    let line = format!("quantize model -o out {QUICK} --push-to org/small-w4");
    run(&hub, &room, &line).refuses(2, &["needs a token that may write", "HF_TOKEN"]);
    let with = |name: &str, value: &str| {
        Run::of(command(&hub, &room, &line).env("HF_TOKEN", TOKEN).env(name, value).output().unwrap())
    };
    with("HF_TOKEN", "hf_old").refuses(2, &["does not know your token"]);
    with("HF_TOKEN", "hf_reads").refuses(2, &["may only read"]);
    with("HF_HUB_OFFLINE", "1").refuses(2, &["HF_HUB_OFFLINE forbids"]);
    push(&hub, &room, &format!("quantize model -o out {QUICK} --push-to small"))
        .refuses(2, &["`small` is no repository"]);
    let several = "quantize model --target awq:W4A16:g64=a --target gptq:W4A16:g64=b --method rtn --verify-text none --push-to org/x";
    push(&hub, &room, several).refuses(2, &["one output, or several GGUF files"]);
    assert!(!room.path("out").exists() && hub.repos().is_empty());
    // A limit is missed: nothing is pushed.
    let missed = push(
        &hub,
        &room,
        "quantize model -o out --method rtn --group-size 64 --verify-windows 1 --max-kld 0 --push-to org/small-w4",
    );
    fails(&missed, 3, &["nothing was pushed", "`quantc push out org/small-w4`"]);
    assert!(room.path("out").exists() && hub.repos().is_empty());
    // The hub fails: the output stays, and the same can be tried again.
    hub.faults().refuses_uploads.store(1000, Ordering::Relaxed);
    let failed = push(&hub, &room, "convert model -o plain --push-to org/plain");
    fails(&failed, 1, &["the hub answered 500", "whole on this disk", "`quantc push plain org/plain` tries again"]);
    assert!(room.path("plain/config.json").exists());
    assert_eq!(files(&hub, "org/plain").len(), 1, "no commit was made");
    hub.faults().refuses_uploads.store(0, Ordering::Relaxed);
    push(&hub, &room, "push plain org/plain").succeeds();
    assert_eq!(files(&hub, "org/plain")[WEIGHTS], std::fs::read(room.path("plain").join(WEIGHTS)).unwrap());
}

#[test]
fn a_lock_knows_a_hubs_model_by_its_commit_on_every_machine() {
    let hub = Hub::start();
    let commit = hub.publish("org/small", small());
    let project = "version = 1\nmodel = \"org/small\"\nmethod = \"rtn\"\ngroup_size = 64\nverify_text = \"none\"\n[[target]]\npath = \"out\"\n";
    let (here, there) = (Room::new(), Room::new());
    here.file("quantc.toml", project);
    run(&hub, &here, "build --junit tests.xml").succeeds();
    let lock = std::fs::read_to_string(here.path("quantc.lock")).unwrap();
    assert!(lock.contains(&format!("path = \"org/small@{commit}/{WEIGHTS}\"")), "{lock}");
    assert!(!lock.contains("snapshots") && !lock.contains(here.path("").to_str().unwrap()), "{lock}");
    run(&hub, &here, "build --check").succeeds();
    // Another machine, without the model: its commit is all that is asked for.
    let mut copy = Command::new("cp");
    copy.args(["-rp", "quantc.toml", "quantc.lock", "out"]).arg(there.path("")).current_dir(here.path(""));
    assert!(copy.status().unwrap().success());
    hub.asked();
    let checked = run(&hub, &there, "build --check");
    checked.succeeds();
    let asked: Vec<String> = hub.asked().into_iter().map(|asked| asked.path).collect();
    assert_eq!(asked, ["/api/models/org/small/revision/main"]);
    assert!(!there.path("hf").exists());
    // With another snapshot of the same commit, which has more files and other times.
    run(&hub, &there, "check org/small").succeeds();
    let snapshot = there.path("hf/hub/models--org--small/snapshots").join(&commit);
    std::fs::write(snapshot.join("pytorch_model.bin"), "x").unwrap();
    hub.asked();
    run(&hub, &there, "build --check").succeeds();
    run(&hub, &there, "build --check --verify").succeeds();
    // What it looks like here does not go into the lock.
    let timeless = |lock: &str| lock.matches("inode = 0\n").count();
    run(&hub, &there, "build").succeeds();
    let now = std::fs::read_to_string(there.path("quantc.lock")).unwrap();
    assert!(timeless(&lock) > 3 && timeless(&now) == timeless(&lock), "{now}");
    assert!(hub.asked().is_empty());
    // A file of the commit that is not what it was, and a branch that has gone on.
    std::fs::remove_file(snapshot.join("config.json")).unwrap();
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    let stale = run(&hub, &there, "build --check");
    assert!(stale.code() == Some(1) && stale.stdout().contains("config.json is not what it was"), "{}", stale.stdout());
    std::fs::remove_dir_all(there.path("hf")).unwrap();
    let mut files = small();
    files.push(("new.json".to_owned(), b"{}".to_vec()));
    let later = hub.publish("org/small", files);
    let stale = run(&hub, &there, "build --check");
    assert!(stale.code() == Some(1) && stale.stdout().contains(&later), "{}", stale.stdout());
    run(&hub, &there, "build").succeeds();
    run(&hub, &there, "build --check").succeeds();
}

/// An adapter is named as a model is, wherever one is merged, and comes whole: what it says of itself hangs on its values.
#[test]
fn an_adapter_is_named_as_a_model_is() {
    let (hub, room) = (Hub::start(), Room::new());
    hub.publish("org/small", small());
    let local = Room::new();
    small_adapter(&local.path("lora"));
    let read = |name: &str| std::fs::read(local.path("lora").join(name)).unwrap();
    let beside = ["tokenizer_config.json", "optimizer.pt", "checkpoint-5/adapter_config.json"];
    let files = ["adapter_config.json", "adapter_model.safetensors"].map(|name| (name.to_owned(), read(name)));
    let files = files.into_iter().chain(beside.map(|name| (name.to_owned(), b"{}".to_vec())));
    let commit = hub.publish("org/lora", files.clone());
    let mut pickled: Vec<_> = files.filter(|(name, _)| name != "adapter_model.safetensors").collect();
    pickled.push(("adapter_model.bin".to_owned(), b"x".to_vec()));
    hub.publish("org/pickled", pickled);
    // A plan reads the headers of the model alone.
    let planned = run(&hub, &room, &format!("plan org/small --adapter org/lora {QUICK}"));
    planned.succeeds();
    let told = planned.stderr();
    assert!(told.contains("org/lora: downloading the adapter (3 files,"), "{told}");
    assert!(told.contains("the headers of their files were read") && !told.contains("change nothing"), "{told}");
    let lora = room.path("hf/hub/models--org--lora/snapshots").join(&commit);
    let mut names: Vec<_> = std::fs::read_dir(&lora).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"]);
    hub.asked();
    run(&hub, &room, &format!("quantize org/small --adapter org/lora -o out {QUICK}")).succeeds();
    run(&hub, &room, "merge org/small --adapter org/lora -o merged").succeeds();
    run(&hub, &room, "eval out --reference org/small --reference-adapter hf://org/lora@main --windows 1 --context 64")
        .succeeds();
    assert!(!hub.asked().iter().any(|asked| asked.path.contains("lora")), "it is in the cache");
    // The same as from a folder.
    run(&hub, &room, &format!("merge org/small --adapter {} -o same", local.path("lora").display())).succeeds();
    let weights = |name: &str| std::fs::read(room.path(name).join(WEIGHTS)).unwrap();
    assert_eq!(weights("merged"), weights("same"));
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
    assert_eq!(report["adapter"]["hub"], format!("org/lora@{commit}"));
    let card = std::fs::read_to_string(room.path("out/README.md")).unwrap();
    assert!(card.contains(&format!("adapter org/lora@{commit}")), "{card}");
    for (name, code, words) in [
        ("org/small", 1, &["org/small is a model and no adapter"][..]),
        ("org/pickled", 1, &["adapter_model.bin is a PyTorch pickle", "nothing was downloaded"]),
        ("org/none", 1, &["org/none"]),
        ("org/lora:Q8_0", 2, &["leave :Q8_0 out"]),
        ("nowhere", 1, &["nowhere"]),
    ] {
        fails(&run(&hub, &room, &format!("merge org/small --adapter {name} -o other")), code, words);
    }
    fails(
        &run(&hub, &Room::new(), "merge org/lora --adapter org/lora -o other"),
        1,
        &["it is an adapter", "this name with --adapter"],
    );
}
