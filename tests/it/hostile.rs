//! Chat templates and tokenizers are programs that come with a model; whatever they do, a run ends in one sentence with their file.
#![cfg(target_os = "linux")]

use serde_json::{Value, json};

use crate::harness::{Model, Room};

const CHATS: &str =
    r#"{"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hello to you"}]}"#;

/// A room with a model and so many conversations.
fn room(conversations: usize) -> (Room, Model) {
    let room = Room::new();
    let model = room.model();
    room.file("chats.jsonl", format!("{CHATS}\n").repeat(conversations));
    (room, model)
}

const CALIBRATED: &str = "quantize model -o out --calibration chats.jsonl --samples 2 --seq-len 32 --verify-text none";

/// Whether a line is one that quantc itself says, beside a library's.
fn is_told(line: &str) -> bool {
    line.starts_with("error: ") || line.starts_with("note: ") || line.contains(" takes up to about ")
}

#[test]
fn a_template_ends_in_one_sentence_whatever_it_does() {
    let (room, model) = room(2);
    let doubled =
        "{% set ns = namespace(s='x') %}{% for i in range(45) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
    for (what, template) in [
        ("not", format!("{{{{ {}true }}}}", "not ".repeat(20_000))),
        ("chain", format!("{{{{ 1{} }}}}", " ~ 1".repeat(20_000))),
        ("brackets", format!("{{{{ {}1{} }}}}", "[".repeat(50_000), "]".repeat(50_000))),
        ("blocks", format!("{}{}", "{% if true %}".repeat(20_000), "{% endif %}".repeat(20_000))),
        ("itself", "{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}".to_owned()),
        ("ranges", "{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}".to_owned()),
        ("doubled", doubled.to_owned()),
        ("indent", "{{ 'x\\ny'|indent(1000000000) }}".to_owned()),
        ("format", "{{ '%9999999999d'|format(1) }}".to_owned()),
        ("join", "{% set s = ('a' * 100000) %}{{ (range(100000)|list)|join(s) }}".to_owned()),
        ("lists", "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l|length }}".to_owned()),
    ] {
        std::fs::write(model.path("chat_template.jinja"), template).unwrap();
        let run = room.run(CALIBRATED.split(' '));
        let told = run.stderr();
        let errors = told.lines().filter(|line| line.starts_with("error: ")).count();
        let silent = told.lines().all(is_told);
        assert!(silent && told.contains("chat_template.jinja"), "{what}: {told}");
        // A template that is only strange may be left alone, if the conversations come out.
        assert!(run.code() == Some(1) && errors == 1 || run.code() == Some(0) && errors == 0, "{what}: {:?} {told}", run.code());
        for left in room.names() {
            assert!(["chats.jsonl", "model", "out"].contains(&&*left), "{what}: {left}");
        }
        let _ = std::fs::remove_dir_all(room.path("out"));
    }
}

#[test]
fn a_tokenizer_ends_in_one_sentence_whatever_it_does() {
    let (room, model) = room(8);
    let own: Value = serde_json::from_slice(&std::fs::read(model.path("tokenizer.json")).unwrap()).unwrap();
    // The third of these finds no memory; a factor of two would take as much, and far more time.
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(4096)});
    let prepend = json!({"type": "Prepend", "prepend": "abcdefgh"});
    // A trie of no entry: four bytes of length, none of content.
    let charsmap = json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="});
    for (what, normalizer) in [
        ("replace", json!({"type": "Sequence", "normalizers": vec![replace; 40]})),
        ("prepend", json!({"type": "Sequence", "normalizers": vec![prepend; 300]})),
        ("charsmap", charsmap),
        ("nothing", json!({"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""})),
    ] {
        let mut changed = own.clone();
        changed["normalizer"] = normalizer;
        std::fs::write(model.path("tokenizer.json"), changed.to_string()).unwrap();
        let run = room.run(CALIBRATED.split(' '));
        let told = run.stderr();
        let silent = told.lines().all(is_told);
        assert!(silent, "{what}: {told}");
        match run.code() {
            Some(1) => assert!(told.contains("error: model/tokenizer.json"), "{what}: {told}"),
            code => assert_eq!(code, Some(0), "{what}: {told}"),
        }
        let _ = std::fs::remove_dir_all(room.path("out"));
        assert_eq!(room.names(), ["chats.jsonl", "model"], "{what}");
    }
}
