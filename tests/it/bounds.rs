//! What a run takes is bounded by what is asked of it, however long its text and whatever its counts.

use proptest::prelude::*;
use quantc::Checkpoint;
use quantc::text::ModelText;

use crate::harness::Room;

/// The built-in evaluation text.
const TEXT: &str = include_str!("../../src/demo/evaluation.txt");

/// The tokenizers of the SentencePiece fixtures, which have rules for characters, BPE and Unigram among them, and the built-in one.
fn tokenizers() -> Vec<(String, ModelText)> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentencepiece");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let room = Room::new();
        let model = room.model();
        std::fs::remove_file(model.path("tokenizer.json")).unwrap();
        std::fs::remove_file(model.path("tokenizer_config.json")).unwrap();
        for file in std::fs::read_dir(&entry).unwrap().map(|file| file.unwrap()) {
            std::fs::copy(file.path(), model.path(file.file_name().to_str().unwrap())).unwrap();
        }
        let name = entry.file_name().unwrap().to_str().unwrap().to_owned();
        all.push((name, ModelText::open(&Checkpoint::open(&room.path("model")).unwrap()).unwrap()));
    }
    let room = Room::new();
    room.model();
    all.push(("built-in".to_owned(), ModelText::open(&Checkpoint::open(&room.path("model")).unwrap()).unwrap()));
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

#[test]
fn the_beginning_of_a_text_has_the_ids_of_the_whole() {
    let tokenizers = tokenizers();
    let words = proptest::collection::vec("[ \n\t]{0,3}[a-zA-Zé中。<>/s▁0-9.,'-]{1,9}", 1500..3000);
    let config = ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(words in words, least in 1usize..6000)| {
        let random = words.concat();
        for text in [&random, TEXT] {
            for (name, tokenizer) in &tokenizers {
                // Shorter than the largest part, so in one.
                let whole = tokenizer.tokenizer.encode(text, true).unwrap();
                let found = tokenizer.tokenizer.begin(text, true, least).unwrap();
                prop_assert!(whole.starts_with(&found.ids), "{}: {} of {:?}", name, least, text);
                prop_assert!(found.ids.len() >= least.min(whole.len()), "{}", name);
                // Words of a Unigram model are never cut, and one that does not divide texts into words has no other places.
                let cut = !name.starts_with("unigram");
                prop_assert!(!cut || found.read <= 6 * least + 8192, "{}: {} for {}", name, found.read, least);
            }
        }
    });
}

#[test]
#[cfg(target_os = "linux")]
fn a_window_of_a_long_text_takes_little() {
    let room = Room::new();
    room.model();
    room.file("short.txt", TEXT);
    room.file("long.txt", TEXT.repeat(160));
    let eval = |text: &str, more: &str| {
        // Threads reserve room for their stacks; tokenizing all 17 MB takes two gigabytes.
        let program = env!("CARGO_BIN_EXE_quantc");
        room.shell(&format!(
            "ulimit -v 1200000; exec {program} eval model --text {text} --context 256 --threads 2 --json {more}"
        ))
    };
    let (short, long) = (eval("short.txt", "--windows 3"), eval("long.txt", "--windows 3"));
    short.succeeds();
    long.succeeds();
    assert_eq!(short.stdout(), long.stdout());
    let beside = eval("long.txt", "--windows 3 --reference model");
    beside.succeeds();
    assert!(beside.stdout().contains("\"kld_mean\": 0.0"), "{}", beside.stdout());
}

#[test]
fn a_run_says_what_it_will_take() {
    let room = Room::new();
    room.model();
    let args = "quantize model -o out --method rtn --observer imatrix --group-size 64 --samples 2 --seq-len 64 --verify-windows 1";
    let run = room.run(args.split(' '));
    run.succeeds();
    let told = run.stderr();
    let line = told.lines().find(|line| line.contains(" takes up to about ")).unwrap_or_else(|| panic!("{told}"));
    let start = "calibrating on 2 sequences of 64 tokens and measuring 1 windows of 512 takes up to about ";
    assert!(line.starts_with(start) && line.contains(" MB of memory"), "{line}");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
    let expected = report["expected_memory_bytes"].as_u64().unwrap();
    assert!((30_000_000..400_000_000).contains(&expected), "{expected}");
    let quiet = room.run(args.replace("-o out", "-o again --quiet").split(' '));
    assert_eq!((quiet.code(), quiet.stderr()), (Some(0), String::new()));
    let run = room.run("eval model --context 64 --windows 1".split(' '));
    run.succeeds();
    assert!(run.stderr().starts_with("measuring 1 windows of 64 tokens takes up to about "), "{}", run.stderr());
}

#[test]
#[cfg(target_os = "linux")]
fn a_run_that_cannot_fit_is_refused_before_the_work() {
    let room = Room::new();
    room.model();
    room.file("long.txt", TEXT.repeat(12));
    let quantize = |samples: &str| {
        let program = env!("CARGO_BIN_EXE_quantc");
        let args = format!(
            "--group-size 64 --calibration long.txt --samples {samples} --seq-len 512 --verify-text none --threads 1"
        );
        room.shell(&format!("ulimit -v 700000; exec {program} quantize model -o out {args}"))
    };
    let run = quantize("5000");
    run.refuses(
        2,
        &[
            "calibrating on ",
            " sequences of 512 tokens takes about ",
            "(ulimit -v 700000): give --samples ",
            " or less",
        ],
    );
    assert_eq!(room.names(), ["long.txt", "model"]);
    let told = run.stderr();
    let fits: usize = told.split("--samples ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((20..1000).contains(&fits), "{told}");
}

#[test]
fn counts_beyond_all_reason_take_what_there_is() {
    let room = Room::new();
    let model = room.model();
    room.file("text.txt", &TEXT[..6000]);
    let huge = usize::MAX.to_string();
    let words = |out: &str, samples: &str, length: &str| {
        format!(
            "quantize model -o {out} --method rtn --observer imatrix --group-size 64 --calibration text.txt --samples {samples} --seq-len {length} \
             --verify-text text.txt --verify-windows {huge}"
        )
    };
    let run = room.run(words("out", &huge, "64").split(' ').filter(|word| !word.is_empty()));
    run.succeeds();
    let told = run.stderr();
    for note in [
        format!("sequences of 64 tokens, {huge} were asked for"),
        format!("note: text.txt gives 4 windows of 512 tokens, {huge} were asked for"),
    ] {
        assert!(told.contains(&note), "`{note}` is missing in: {told}");
    }
    let run = room.run(format!("eval model --text text.txt --context 256 --windows {huge}").split(' '));
    run.succeeds();
    assert!(run.stderr().contains(&format!(" windows of 256 tokens, {huge} were asked for")), "{}", run.stderr());
    // A model that takes sequences of any length, and the text has none so long.
    let positions = 1u64 << 30;
    model.config(|config| config["max_position_embeddings"] = positions.into());
    let run = room.run(words("other", &huge, &huge).split(' ').filter(|word| !word.is_empty()));
    run.refuses(
        1,
        &["text.txt: ", &format!("tokens do not fill one sequence of {positions}; give more text, or --seq-len ")],
    );
    let run = room.run(format!("eval model --text text.txt --context {huge} --windows {huge}").split(' '));
    run.refuses(1, &["tokens are fewer than one window of", "or --context "]);
}
