//! Texts of calibration and evaluation as people have them: what is read, what is left out, and what the user is told of it.

use serde_json::{Value, json};

use crate::harness::{Model, Room, Run};

const WORDS: &str = "The river runs through ten countries, from the forest to the sea, and its water is cold. ";

/// A run of a second or so.
fn quantize(room: &Room, calibration: &str, more: &[&str]) -> Run {
    let quick =
        ["quantize", "model", "-o", "out", "--force", "--samples", "2", "--seq-len", "32", "--verify-windows", "1"];
    let args = [&quick[..], &["--calibration", calibration], more].concat();
    room.run(args)
}

/// `calibration` and `notes` of the report.
fn report(room: &Room) -> (Value, Vec<String>) {
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
    let notes = report["notes"].as_array().unwrap().iter().map(|note| note.as_str().unwrap().to_owned()).collect();
    (report["calibration"].clone(), notes)
}

/// Demands that a note holding all of `words` stands in the report and on the terminal.
#[track_caller]
fn noted(room: &Room, run: &Run, words: &[&str]) {
    run.succeeds();
    let (_, notes) = report(room);
    let found = notes.iter().find(|note| words.iter().all(|word| note.contains(word)));
    let found = found.unwrap_or_else(|| panic!("{words:?} are in none of {notes:?}"));
    assert!(run.stderr().contains(&format!("note: {found}\n")), "{}", run.stderr());
}

fn template(model: &Model, source: &str) {
    std::fs::write(model.path("chat_template.jinja"), source).unwrap();
}

fn lines(records: impl IntoIterator<Item = Value>) -> String {
    records.into_iter().map(|record| format!("{record}\n")).collect()
}

fn chat(role: &str) -> Value {
    json!({"messages": [{"role": role, "content": WORDS}, {"role": "assistant", "content": WORDS}]})
}

#[test]
fn records_without_content_are_left_out_and_told() {
    let room = Room::new();
    room.model();
    let mut records = vec![json!({"text": WORDS.repeat(4)}); 7];
    records[2] = json!({"text": null});
    records[4] = json!({"text": null});
    room.file("a.jsonl", lines(records));
    let run = quantize(&room, "a.jsonl", &[]);
    noted(&room, &run, &["2 of 7 records of a.jsonl were left out", "line 3", "`text` is null"]);
    assert_eq!(report(&room).0["documents"], 5);

    room.file("most.jsonl", lines([json!({"text": WORDS}), json!({"text": null}), json!({"text": null})]));
    quantize(&room, "most.jsonl", &[]).refuses(1, &["most.jsonl, line 2", "`text` is null", "2 of 3 records"]);
}

#[test]
fn conversations_that_a_template_refuses_are_told() {
    let room = Room::new();
    let model = room.model();
    template(
        &model,
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ m.content }}{% endfor %}",
    );
    room.file("half.jsonl", lines((0..8).map(|i| chat(["user", "system"][i % 2]))));
    let run = quantize(&room, "half.jsonl", &[]);
    noted(&room, &run, &["4 of 8 conversations of half.jsonl were left out", "no system here"]);
    let (calibration, _) = report(&room);
    assert_eq!((&calibration["refused"], &calibration["templated"]), (&json!(4), &json!(4)));

    room.file("all.jsonl", lines((0..8).map(|_| chat("system"))));
    quantize(&room, "all.jsonl", &[]).refuses(1, &["all 8 conversations of all.jsonl", "no system here"]);
}

#[test]
fn conversations_without_a_template_are_told() {
    let room = Room::new();
    let model = room.model();
    // Whatever template the built-in model may have.
    let _ = std::fs::remove_file(model.path("chat_template.jinja"));
    let config = model.path("tokenizer_config.json");
    if let Ok(bytes) = std::fs::read(&config) {
        let mut config_json: Value = serde_json::from_slice(&bytes).unwrap();
        config_json.as_object_mut().unwrap().remove("chat_template");
        std::fs::write(config, config_json.to_string()).unwrap();
    }
    room.file(
        "a.jsonl",
        lines([chat("user"), chat("user"), json!({"text": WORDS}), json!({"prompt": WORDS, "completion": WORDS})]),
    );
    let run = quantize(&room, "a.jsonl", &[]);
    noted(&room, &run, &["3 conversations of a.jsonl were read as plain text", "no chat template"]);
    assert_eq!(report(&room).0["untemplated"], 3);
    // Running text alone needs no word.
    room.file("b.jsonl", lines([json!({"text": WORDS.repeat(8)})]));
    quantize(&room, "b.jsonl", &[]).succeeds();
    assert!(!report(&room).1.iter().any(|note| note.contains("b.jsonl") || note.contains("template")));
}

#[test]
fn one_text_gives_one_model_whatever_file_it_is_in() {
    let room = Room::new();
    room.model();
    let texts: Vec<String> = (0..6).map(|i| format!("{i} {}", WORDS.repeat(3))).collect();
    let records = || texts.iter().map(|text| json!({"text": text}));
    room.file("a.jsonl", lines(records()));
    room.file("a.json", Value::from_iter(records()).to_string());
    room.file("a.txt", lines(records()));
    room.file("a", lines(records()));
    room.file("a.csv", format!("id,text\n{}", texts.iter().map(|text| format!("1,\"{text}\"\n")).collect::<String>()));
    room.file("a.tsv", format!("text\n{}\n", texts.join("\n")));
    let mut found = Vec::new();
    for name in ["a.jsonl", "a.json", "a.txt", "a", "a.csv", "a.tsv"] {
        quantize(&room, name, &["--verify-text", "none"]).succeeds();
        found.push(report(&room).0["tokens_sha256"].clone());
    }
    assert!(found.iter().all(|hash| hash == &found[0] && hash.is_string()), "{found:?}");
    quantize(&room, "a.txt", &[]).succeeds();
    assert!(report(&room).1.iter().any(|note| note.contains("a.txt holds JSON records")));
}

#[test]
fn parquet_files_calibrate_and_measure() {
    let room = Room::new();
    room.model();
    let fixture =
        |name: &str| std::fs::read(format!("{}/tests/fixtures/records/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    for name in ["chats.parquet", "texts.parquet", "texts.feather"] {
        room.file(name, fixture(name));
    }
    let run = quantize(&room, "chats.parquet", &["--verify-text", "texts.parquet"]);
    noted(&room, &run, &["2 of 17 records of chats.parquet were left out", "row 3: `messages` is null"]);
    noted(&room, &run, &["1 of 84 records of texts.parquet were left out", "row 2: `text` is null"]);
    let eval = room.run(["eval", "model", "--text", "texts.parquet", "--context", "64"]);
    eval.succeeds();
    assert!(eval.stderr().contains("note: 1 of 84 records of texts.parquet were left out"), "{}", eval.stderr());
    room.run(["eval", "model", "--text", "chats.parquet"])
        .refuses(1, &["chats.parquet", "running text", "conversations"]);
    quantize(&room, "texts.feather", &[]).refuses(1, &["texts.feather", "an Arrow file", ".parquet"]);
    let whole = fixture("texts.parquet");
    room.file("cut.parquet", &whole[..whole.len() / 2]);
    quantize(&room, "cut.parquet", &[]).refuses(1, &["cut.parquet", "damaged Parquet file"]);
}

#[test]
fn files_that_are_no_texts_are_named() {
    let room = Room::new();
    room.model();
    room.file("a.jsonl.gz", b"\x1f\x8b\x08\x00\x00");
    room.file("a.bin", b"MZ\x00\x00");
    room.file("folder/one.jsonl", lines([json!({"text": WORDS})]));
    for (name, words) in [
        ("a.jsonl.gz", &["a.jsonl.gz", "compressed", "unpack it"][..]),
        ("a.bin", &["a.bin", "byte 2 is zero", ".parquet"]),
        ("folder", &["folder: a folder; give one file", "one.jsonl"]),
        ("no/such", &["no/such: no such file", ".parquet"]),
    ] {
        quantize(&room, name, &[]).refuses(1, words);
        room.run(["eval", "model", "--text", name]).refuses(1, words);
    }
    assert!(!room.names().contains(&"out".to_owned()));
}
