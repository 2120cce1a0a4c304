//! What was guessed of a text, or is only surmised of it, is told in the report and on the terminal; what is wrong with a template names its file.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Model, Room, Run};

const WORDS: &str = "The river runs through ten countries, from the forest to the sea, and its water is cold. ";

/// A run of a second or so.
fn quantize(room: &Room, model: &str, calibration: &str) -> Run {
    let quick = ["--force", "--samples", "1", "--seq-len", "16", "--verify-text", "none", "--calibration", calibration];
    room.run([&["quantize", model, "-o", "out"][..], &quick].concat())
}

/// Demands that a note holding all of `words` stands in the report and on the terminal.
#[track_caller]
fn noted(room: &Room, run: &Run, words: &[&str]) {
    run.succeeds();
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
    let mut notes = report["notes"].as_array().unwrap().iter().map(|note| note.as_str().unwrap());
    let found = notes.find(|note| words.iter().all(|word| note.contains(word)));
    let found = found.unwrap_or_else(|| panic!("{words:?} are in none of {}", report["notes"]));
    assert!(run.stderr().contains(&format!("note: {found}\n")), "{}", run.stderr());
}

fn lines(records: impl IntoIterator<Item = Value>) -> String {
    records.into_iter().map(|record| format!("{record}\n")).collect()
}

fn turns() -> Value {
    json!([{"role": "user", "content": WORDS}, {"role": "assistant", "content": WORDS}])
}

/// Removes every template of a model.
fn without_template(model: &Model) {
    let _ = std::fs::remove_file(model.path("chat_template.jinja"));
    with_config(model, |config| drop(config.remove("chat_template")));
}

fn with_config(model: &Model, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = model.path("tokenizer_config.json");
    let mut config: Value = std::fs::read(&path).map_or(json!({}), |bytes| serde_json::from_slice(&bytes).unwrap());
    change(config.as_object_mut().unwrap());
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn what_a_text_looks_like_is_told_where_it_is_calibrated_and_measured() {
    let room = Room::new();
    room.model();
    for (name, content, words) in [
        ("python.txt", format!("{{'text': '{WORDS}'}}\n").repeat(4), "looks like what Python prints"),
        ("page.md", format!("<!doctype html>\n<p>{WORDS}{WORDS}</p>"), "is HTML"),
        ("list.dat", format!("- text: {WORDS}\n").repeat(4), "is YAML"),
        (
            "table.txt",
            format!("id,text\n{}", format!("1,\"{WORDS}\"\n").repeat(4)),
            "begins with the header of a table",
        ),
        ("columns.json", json!({"text": [WORDS.repeat(2), WORDS.repeat(2)]}).to_string(), "column by column"),
    ] {
        room.file(name, &content);
        noted(&room, &quantize(&room, "model", name), &[name, words]);
        let eval = room.run(["eval", "model", "--text", name, "--context", "16"]);
        eval.succeeds();
        assert!(
            eval.stderr().contains(&format!("note: {name} {words}")) || words.contains("column"),
            "{}",
            eval.stderr()
        );
    }
    room.file("prose.txt", WORDS.repeat(6));
    let run = quantize(&room, "model", "prose.txt");
    run.succeeds();
    assert!(!run.stderr().contains("prose.txt"), "{}", run.stderr());
}

#[test]
fn guesses_about_records_are_told() {
    let room = Room::new();
    room.model();
    let long = WORDS.repeat(3);
    let records = [
        json!({"text": long, "messages": [{"role": "user", "content": "another thing"}]}),
        json!({"text": long}),
        json!({"text": ""}),
        json!({"text": long, "messages": [{"role": "user", "content": "a third thing"}]}),
        json!({"prompt": long, "chosen": long, "rejected": "no"}),
    ];
    room.file("a.jsonl", lines(records));
    let run = quantize(&room, "model", "a.jsonl");
    noted(&room, &run, &["2 of 5 records of a.jsonl hold text under `messages` beside `text`", "the first is line 1"]);
    noted(&room, &run, &["1 of 5 records of a.jsonl hold an answer under `rejected`", "the first is line 5"]);
    noted(&room, &run, &["1 of 5 records of a.jsonl are blank", "the first is line 3"]);
    room.file("blank.jsonl", lines([json!({"text": ""}), json!({"text": long}), json!({"text": " "})]));
    quantize(&room, "model", "blank.jsonl").refuses(1, &["blank.jsonl, line 1", "blank", "2 of 3 records"]);
    // Evaluation has them as blank lines.
    room.run(["eval", "model", "--text", "blank.jsonl", "--context", "16"]).succeeds();
    room.file("short.txt", "a b");
    room.run(["eval", "model", "--text", "short.txt"]).refuses(1, &["short.txt: ", "fewer than one window"]);
}

#[test]
fn templates_are_named_by_the_file_they_stand_in() {
    let room = Room::new();
    let model = room.model();
    without_template(&model);
    room.file("a.jsonl", lines((0..3).map(|_| json!({"messages": turns()}))));
    // As a GGUF file has it.
    with_config(&model, |config| drop(config.insert("chat_template".to_owned(), "{{ nothing.at.all }}".into())));
    room.run(["quantize", "model", "-o", "m.gguf", "--format", "gguf", "--scheme", "Q8_0", "--verify-text", "none"])
        .succeeds();
    quantize(&room, "m.gguf", "a.jsonl")
        .refuses(1, &["m.gguf: chat template: all 3 conversations of a.jsonl are refused"]);

    let silent = "{{ '' }}";
    let place = |name: &str| format!("{}: chat template: ", Path::new("model").join(name).display());
    with_config(&model, |config| drop(config.insert("chat_template".to_owned(), silent.into())));
    quantize(&room, "model", "a.jsonl").refuses(
        1,
        &[&place("tokenizer_config.json"), "writes nothing of what is said in 3 of the 3 conversations of a.jsonl"],
    );
    with_config(&model, |config| drop(config.insert("chat_template".to_owned(), "{% if %}".into())));
    quantize(&room, "model", "a.jsonl").refuses(1, &[&place("tokenizer_config.json"), "(line 1)"]);
    with_config(&model, |config| drop(config.remove("chat_template")));
    room.file("model/chat_template.json", json!({"chat_template": "{{ raise_exception('never') }}"}).to_string());
    quantize(&room, "model", "a.jsonl").refuses(1, &[&place("chat_template.json"), "all 3 conversations", "never"]);
    room.file("model/additional_chat_templates/default.jinja", "{% if %}");
    quantize(&room, "model", "a.jsonl").refuses(1, &[&place("additional_chat_templates/default.jinja"), "(line 1)"]);
    room.file("model/chat_template.jinja", silent);
    quantize(&room, "model", "a.jsonl").refuses(1, &[&place("chat_template.jinja"), "writes nothing"]);

    // Where it writes some, the others are counted.
    room.file(
        "model/chat_template.jinja",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    );
    let other = json!({"messages": [{"role": "narrator", "content": WORDS}]});
    room.file("b.jsonl", lines([json!({"messages": turns()}), other, json!({"messages": turns()})]));
    let run = quantize(&room, "model", "b.jsonl");
    noted(&room, &run, &["1 of 3 conversations of b.jsonl were left out", "writes nothing of what is said"]);
    noted(&room, &run, &["1 of 3 records of b.jsonl hold turns of roles that are not known (`narrator`)", "line 2"]);
}

#[test]
fn weights_beyond_their_scales_are_named_with_their_file() {
    let room = Room::new();
    let model = room.model();
    // 3e38 in bfloat16.
    model.poison("model.layers.0.mlp.down_proj.weight", 0x7f61);
    room.run(["quantize", "model", "-o", "out", "--method", "rtn", "--scheme", "W4A16", "--verify-text", "none"])
        .refuses(
            1,
            &[&format!(
                "{}: tensor `model.layers.0.mlp.down_proj.weight`: its values go up to",
                Path::new("model").join("model.safetensors").display()
            )],
        );
}
