//! What files and records are read as.

use std::path::Path;

use serde_json::{Value, json};

use super::*;

fn plain(text: &str) -> Document {
    Document::Plain(text.to_owned())
}

fn pair(prompt: &str, completion: &str) -> Document {
    Document::Pair { prompt: prompt.to_owned(), completion: completion.to_owned() }
}

/// A conversation of a user and an assistant, by turns.
fn talk(turns: &[&str]) -> Document {
    let messages = turns.iter().enumerate().map(|(index, text)| Message::new(["user", "assistant"][index % 2], *text));
    Document::Chat { messages: messages.collect(), tools: Vec::new() }
}

fn with_system(text: &str, document: Document) -> Document {
    match document {
        Document::Chat { mut messages, tools } => {
            messages.insert(0, Message::new("system", text));
            Document::Chat { messages, tools }
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn text(name: &str, content: impl AsRef<[u8]>) -> Text {
    read(name, content.as_ref().to_vec()).unwrap_or_else(|error| panic!("{error}"))
}

#[track_caller]
fn error(name: &str, content: impl AsRef<[u8]>) -> String {
    let message = read(name, content.as_ref().to_vec()).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

fn record(record: Value) -> Result<Document, String> {
    super::record::read(&record).map(|record| record.document)
}

#[test]
fn hashes_are_the_published_ones() {
    assert_eq!(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    // sha256 of the bytes 01 00 00 00 00 01 00 00, however the ids are divided.
    let whole = sha256_ids(&[vec![1, 256]]);
    assert_eq!(whole, sha256_hex([1u8, 0, 0, 0, 0, 1, 0, 0]));
    assert_eq!(whole, sha256_ids(&[vec![1], vec![256]]));
}

#[test]
fn every_preset_has_many_documents() {
    for name in PRESETS {
        let text = preset(name).unwrap();
        assert!(text.documents.len() > 100, "{name}: {} documents", text.documents.len());
        assert!(text.plain().is_some());
    }
    assert!(preset("no-such-preset").is_none());
}

#[test]
fn running_text_is_one_document_byte_for_byte() {
    let content = " \n = Title = \r\n\r\nbody, {\"text\": 1}\n";
    let found = text("a.txt", content);
    assert_eq!(found.documents, [plain(content)]);
    assert_eq!(found.plain().unwrap(), content);
    assert_eq!(found.sha256, sha256_hex(content));
    assert!(found.notes.is_empty());
    assert!(parse_txt("a.txt", " \n\n").documents.is_empty());
    assert_eq!(error("a.txt", " \n\n"), "a.txt: the text is empty");
}

#[test]
fn running_text_splits_at_separator_lines_only() {
    let text = parse_txt("a.txt", "one\n<|document|>\n\ntwo <|document|>\n<|document|>\r\n<|document|>\nthree\n");
    assert_eq!(text.documents, [plain("one"), plain("\ntwo <|document|>"), plain("three\n")]);
    let windows = parse_txt("a.txt", "one\r\n<|document|>\r\ntwo");
    assert_eq!(windows.documents, [plain("one"), plain("two")]);
}

#[test]
fn every_form_of_text_and_pair_is_read() {
    let cases = [
        (json!({"text": "t", "meta": {"x": 1}}), plain("t")),
        (json!("t"), plain("t")),
        (json!({"content": "t", "title": "no"}), plain("t")),
        (json!({"article": "t", "highlights": "no"}), plain("t")),
        (json!({"prompt": "t"}), plain("t")),
        (json!({"chosen": "\n\nHuman: t", "rejected": "no"}), plain("\n\nHuman: t")),
        (json!({"row_idx": 0, "row": {"text": "t"}}), plain("t")),
        (json!({"prompt": "p", "completion": "c", "label": true}), pair("p", "c")),
        (json!({"prompt": "p", "chosen": "c", "rejected": "r"}), pair("p", "c")),
        (json!({"question": "q", "answer": "a"}), pair("q", "a")),
        (json!({"query": "q", "response": "a"}), pair("q", "a")),
        (json!({"input": "q", "output": "a"}), pair("q", "a")),
        (json!({"inputs": "q", "targets": "a"}), pair("q", "a")),
        (json!({"problem": "q", "solution": "a", "answer": null}), pair("q", "a")),
        (json!({"instruction": "i", "input": "", "output": "o"}), pair("i", "o")),
        (json!({"instruction": "i", "input": "in", "output": "o"}), pair("i\n\nin", "o")),
        (json!({"instruction": "", "input": "in", "output": "o"}), pair("in", "o")),
        (json!({"instruction": "i", "context": "c", "response": "r"}), pair("i\n\nc", "r")),
        // A field that is null, blank or not a number is no field.
        (json!({"text": null, "prompt": "p", "completion": "c"}), pair("p", "c")),
        (json!({"text": " ", "prompt": "p", "completion": "c"}), pair("p", "c")),
        (json!({"text": null, "messages": [{"role": "user", "content": "q"}]}), talk(&["q"])),
        (json!({"text": ""}), plain("")),
    ];
    for (json, expected) in cases {
        assert_eq!(record(json.clone()).unwrap(), expected, "{json}");
    }
}

#[test]
fn every_form_of_conversation_is_read() {
    let (q, a) = (json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": "a"}));
    let (human, gpt) = (json!({"from": "human", "value": "q"}), json!({"from": "gpt", "value": "a"}));
    let both = talk(&["q", "a"]);
    let cases = [
        (json!([q, a]), both.clone()),
        (json!({"messages": [q, a], "prompt": "no"}), both.clone()),
        (json!({"messages": json!([q, a]).to_string()}), both.clone()),
        (json!({"conversations": [human, gpt]}), both.clone()),
        (json!({"conversations": [human, gpt], "system": "s"}), with_system("s", both.clone())),
        (
            json!({"conversations": [{"from": "system", "value": "s"}, human, gpt], "system": "no"}),
            with_system("s", both.clone()),
        ),
        (json!({"conversation": [{"input": "q", "output": "a"}]}), both.clone()),
        (json!({"data": ["q", "a"], "id": "1"}), both.clone()),
        (json!({"body": {"messages": [q, a]}, "method": "POST"}), both.clone()),
        (json!({"prompt": [q], "completion": [a]}), both.clone()),
        (json!({"prompt": [q], "completion": "a"}), both.clone()),
        (json!({"prompt": "q", "completion": [a]}), both.clone()),
        (json!({"prompt": "q", "completion": a}), both.clone()),
        (json!({"prompt": [q], "chosen": [a], "rejected": []}), both.clone()),
        (json!({"prompt": [q], "chosen": [q, a], "rejected": []}), both.clone()),
        (json!({"prompt": "q", "chosen": [q, a]}), both.clone()),
        (json!({"chosen": [q, a], "rejected": [q]}), both.clone()),
        (json!({"prompt": [q]}), talk(&["q"])),
        (q.clone(), talk(&["q"])),
        (json!({"system_prompt": "s", "question": "q", "response": "a"}), with_system("s", both.clone())),
        (
            json!({
                "systemInstruction": {"parts": [{"text": "s"}]},
                "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}],
            }),
            with_system("s", both.clone()),
        ),
        (json!({"instruction": "x", "output": "y", "history": [["q", "a"]]}), talk(&["q", "a", "x", "y"])),
        (json!({"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": ["a"]}]}), both.clone()),
    ];
    for (json, expected) in cases {
        assert_eq!(record(json.clone()).unwrap(), expected, "{json}");
    }
    let named = record(json!({"messages": [{"role": "user", "content": "q", "name": "bob"}]})).unwrap();
    let Document::Chat { messages, .. } = named else { panic!() };
    assert_eq!(messages[0].extra["name"], "bob");
}

#[test]
fn calls_and_tools_take_the_form_that_templates_know() {
    let function = json!({"name": "f", "parameters": {}});
    let tool = json!({"type": "function", "function": function});
    let calls = json!([{"type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]);
    let called = |fields: Value| {
        let Document::Chat { messages, tools } = record(fields.clone()).unwrap() else { panic!("{fields}") };
        assert_eq!(messages[0].role, "assistant", "{fields}");
        (messages[0].content.clone(), messages[0].extra.get("tool_calls").cloned(), tools)
    };
    let turn = |turn: Value| called(json!({"messages": [turn]}));
    for (turn_, content) in [
        (json!({"role": "assistant", "content": null, "tool_calls": calls}), Value::Null),
        (json!({"role": "assistant", "content": "c", "tool_calls": calls.to_string()}), json!("c")),
        (json!({"role": "assistant", "tool_calls": [calls[0]["function"]]}), Value::Null),
        (json!({"role": "assistant", "content": null, "function_call": calls[0]["function"]}), Value::Null),
        (json!({"from": "function_call", "value": calls[0]["function"].to_string()}), Value::Null),
    ] {
        assert_eq!(turn(turn_.clone()), (content, Some(calls.clone()), Vec::new()), "{turn_}");
    }
    assert_eq!(turn(json!({"role": "assistant", "content": "c", "tool_calls": []})), (json!("c"), None, Vec::new()));
    let a = json!([{"role": "assistant", "content": "c"}]);
    for tools in [json!([tool]), json!([function]), json!([tool]).to_string().into(), json!([function.to_string()])] {
        assert_eq!(called(json!({"messages": a, "tools": tools})).2, std::slice::from_ref(&tool), "{tools}");
    }
    assert_eq!(called(json!({"messages": a, "functions": [function], "tools": null})).2, [tool]);
    assert!(called(json!({"messages": a, "tools": ""})).2.is_empty());
}

#[test]
fn what_a_record_lacks_is_said() {
    let turn = |turn: Value| json!({"messages": [{"role": "user", "content": "q"}, turn]});
    let call = |arguments: &str| json!([{"function": {"name": "f", "arguments": arguments}}]);
    let cases = [
        (json!(3), "expected a JSON object, found a number"),
        (json!([1]), "expected a list of messages"),
        (json!({}), "expected `text`, `messages`, `conversations`, or `prompt` with `completion`; found no key at all"),
        (json!({"Text": "x", "Label": 1}), "`Text` is not the name of a field that is read; call it `text`"),
        (json!({"instruction": "x", "instances": []}), "found `instruction`, `instances`"),
        (json!({"body": "x", "label": 1}), "found `body`, `label`"),
        (json!({"text": null}), "`text` is null"),
        (json!({"text": 3}), "`text` must be a string, found a number"),
        (json!({"text": ["a"]}), "`text` must be a string, found a list"),
        (json!({"messages": null, "id": 1}), "`messages` is null"),
        (json!({"messages": "x"}), "`messages` must be a list of messages, found a string"),
        (json!({"messages": []}), "`messages` is empty"),
        (json!({"instruction": "i", "output": null}), "`output` is null"),
        (json!({"question": "q", "answer": 3}), "`answer` must be a string, found a number"),
        (turn(json!({"content": "x"})), "`messages[1]`: expected `role` and `content`"),
        (turn(json!({"role": "user"})), "`messages[1]`: a turn of `user` without content"),
        (
            turn(json!({"role": "assistant", "content": null, "tool_calls": null})),
            "a turn of `assistant` without content",
        ),
        (
            turn(json!({"role": "user", "content": {"a": 1}})),
            "`messages[1]`: the content must be a string, found an object",
        ),
        (turn(json!({"role": "user", "content": 3})), "the content must be a string, found a number"),
        (
            turn(json!({"role": "assistant", "tool_calls": call("{x")})),
            "the arguments of a call are text that is not JSON",
        ),
        (turn(json!({"from": "function_call", "value": "f(x)"})), "a call of a function that is not JSON"),
        (json!({"messages": [{"role": "user", "content": "q"}], "tools": "none"}), "`tools` must be a list of objects"),
        (json!({"messages": [{"role": "user", "content": "q"}], "tools": [1]}), "`tools` must be a list of objects"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "`messages` holds no text"),
    ];
    for (json, expected) in cases {
        let found = record(json.clone()).unwrap_err();
        assert!(found.contains(expected), "{json}: {found}");
    }
}

#[test]
fn a_few_useless_records_are_left_out_and_counted() {
    let mut lines: Vec<String> = (0..9).map(|i| format!("{{\"text\": \"t{i}\"}}")).collect();
    for (at, line) in [(1, "{\"text\": null}"), (3, "{\"text\": NaN}"), (5, "{\"text\": "), (7, "")] {
        lines.insert(at, line.to_owned());
    }
    let found = text("a.jsonl", lines.join("\n"));
    assert_eq!(found.documents.len(), 9);
    assert_eq!(
        found.notes,
        [
            "3 of 12 records of a.jsonl were left out: 2 from line 2 on: `text` is null; line 6: not JSON (EOF while parsing a value); each line must be one JSON object"
        ]
    );
    // The same reason at another turn is the same reason.
    let turn = |n: usize| {
        let turns = vec![json!({"role": "user", "content": "q"}); n];
        let turns = [turns, vec![json!({"role": "user", "content": null})]].concat();
        json!({"messages": turns}).to_string()
    };
    let good = vec!["{\"text\": \"t\"}".to_owned(); 3];
    let found = text("a.jsonl", [good, vec![turn(1), turn(12)]].concat().join("\n"));
    assert_eq!(
        found.notes,
        ["2 of 5 records of a.jsonl were left out: 2 from line 4 on: `messages[1]`: a turn of `user` without content"]
    );
}

#[test]
fn a_file_of_useless_records_is_refused_with_the_first() {
    let cases = [
        (
            "{\"text\": \"a\"}\n{\"text\": ",
            "a.jsonl, line 2: not JSON (EOF while parsing a value); each line must be one JSON object; 1 of 2 records cannot be used, and fewer than half may be left out: mend them, or take them out of the file",
        ),
        ("\n[1]", "a.jsonl, record 1: expected a JSON object, found a number"),
        ("{\"text\": 3}", "a.jsonl, record 1: `text` must be a string, found a number"),
        (
            "{\"body\": \"x\"}\n{\"text\": null}\n{\"text\": null}",
            "a.jsonl, line 2: `text` is null; 3 of 3 records cannot be used, and fewer than half may be left out: mend them, or take them out of the file",
        ),
        ("{\"text\": \" \"}", "a.jsonl: the text is empty"),
        ("{\"text\": \" \"}\n{\"text\": \"\"}", "a.jsonl: the text is empty"),
        ("plain\ntext", "a.jsonl, line 1, column 1: not JSON (expected value)"),
        ("", "a.jsonl: the text is empty"),
    ];
    for (content, expected) in cases {
        assert_eq!(error("a.jsonl", content), expected, "{content:?}");
    }
}

#[test]
fn json_is_read_however_it_is_laid_out() {
    let (a, b) = ("{\"text\": \"a\"}", "{\"text\": \"b\"}");
    let both = [plain("a"), plain("b")];
    for ending in ["json", "jsonl", "ndjson", "jsonlines", "JSON"] {
        let name = format!("a.{ending}");
        for content in [
            format!("{a}\n{b}"),
            format!("\u{feff}{a}\r\n\r\n{b}\r\n"),
            format!("[{a}, {b}]"),
            format!("[\n{a},\n{b}\n]"),
            format!("{{\"data\": [{a}, {b}]}}"),
            format!("{{\"features\": [], \"rows\": [{{\"row\": {a}}}, {{\"row\": {b}}}]}}"),
            "{\n \"text\": \"a\"\n}\n{\n \"text\": \"b\"\n}\n".to_owned(),
            "[\"a\", \"b\"]".to_owned(),
            "\"a\"\n\"b\"".to_owned(),
        ] {
            let found = text(&name, &content);
            assert_eq!(found.documents, both, "{name}: {content}");
            assert_eq!(found.sha256, sha256_hex(&content));
            assert!(found.notes.is_empty());
        }
    }
    let turns = "[{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]";
    assert_eq!(text("a.json", turns).documents, [talk(&["q", "a"])]);
    assert_eq!(text("a.jsonl", format!("{turns}\n{turns}")).documents, [talk(&["q", "a"]), talk(&["q", "a"])]);
    let splits = text("a.json", format!("{{\"test\": [{b}], \"train\": [{a}]}}"));
    assert_eq!(
        (splits.documents, splits.notes),
        (vec![plain("a")], vec!["of a.json the records under `train` were read, not those under `test`".to_owned()])
    );
    assert!(error("a.json", "[{\"text\": \"a\"}, 3]").starts_with("a.json, record 2: expected a JSON object"));
    assert!(error("a.json", "[\n{]").starts_with("a.json, line 2, column 2: not JSON"));
    assert!(error("a.json", "[]").contains("the text is empty"));
}

#[test]
fn numbers_that_only_python_writes_cost_no_record() {
    let line = "{\"text\": \"NaN \\\" Infinity\", \"score\": NaN, \"a\": [-Infinity, Infinity, -1]}";
    let found = text("a.jsonl", format!("{line}\n{line}"));
    assert_eq!(found.documents, vec![plain("NaN \" Infinity"); 2]);
    assert!(found.notes.is_empty());
    assert!(error("a.jsonl", "{\"text\": \"é\\é NaN").contains("not JSON"));
}

#[test]
fn names_do_not_hide_records() {
    let lines = "{\"text\": \"a\"}\n{\"text\": \"b\"}\n";
    for name in ["a.txt", "a.md", "a", "folder.d/a", "a.dat", "a.csv", "a.log"] {
        let found = text(name, lines);
        assert_eq!(found.documents, [plain("a"), plain("b")], "{name}");
        assert_eq!(found.notes, [format!("{name} holds JSON records and was read as such, whatever its name ends in")]);
    }
    assert_eq!(text("a.txt", "[\n {\"text\": \"a\"}\n]").documents, [plain("a")]);
    // What is not known as records stays what it is; where the name says running text, with a word on it.
    let log = "{\"level\": \"info\"}\n{\"level\": \"warning\"}\n";
    let found = text("a.txt", log);
    assert_eq!(found.documents, [plain(log)]);
    assert_eq!(
        found.notes,
        [
            "a.txt begins with a JSON object, but does not hold records that are known: it was read as running text; to have it read as \
             records, give each a `text`, `messages`, or `prompt` and `completion`"
        ]
    );
    assert!(error("a.log", log).starts_with("a.log, line 1: expected `text`"));
    for content in ["{ a block }\nand text", "[link]: x", "[{broken", "[1, 2]", "{\"text\" is a word}"] {
        let found = text("a.txt", content);
        assert_eq!((found.documents, found.notes.len()), (vec![plain(content)], 0), "{content}");
    }
}

#[test]
fn blank_rows_count_in_evaluation_only() {
    // The rows of WikiText as its data set has them; perplexity is measured on all of them joined.
    let found =
        text("a.jsonl", "{\"text\": \"\"}\n{\"text\": \" = A = \\n\"}\n{\"text\": \"\"}\n{\"text\": \" b \\n\"}\n");
    assert_eq!(found.plain().unwrap(), "\n\n = A = \n\n\n\n\n b \n");
    assert!(found.notes.is_empty());
}

#[test]
fn tables_are_read_by_their_header() {
    let rows = [plain("a, \"b\"\n\nc"), plain("d")];
    for (name, content) in [
        ("a.csv", "id,text\n1,\"a, \"\"b\"\"\n\nc\"\n2,d\n"),
        ("a.csv", "\u{feff}id;text\r\n1;\"a, \"\"b\"\"\n\nc\"\r\n2;d"),
        ("a.tsv", "id\ttext\n1\t\"a, \"\"b\"\"\n\nc\"\n2\td\n"),
        ("a.csv", "id|text\n1|\"a, \"\"b\"\"\n\nc\"\n2|d\n"),
    ] {
        let found = text(name, content);
        assert_eq!(found.documents, rows, "{content}");
        assert_eq!(found.sha256, sha256_hex(content));
    }
    let found = text("a.csv", "instruction,input,output\ni,,o\ni,in,o\n,,\nx\ni,in,o\ni,in,o\n");
    assert_eq!(found.documents, [pair("i", "o"), pair("i\n\nin", "o"), pair("i\n\nin", "o"), pair("i\n\nin", "o")]);
    assert_eq!(
        found.notes,
        [
            "2 of 6 records of a.csv were left out: line 4: `instruction` is null; line 5: a row of 1 fields, where the header has 3"
        ]
    );
    let turns = "\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"q\"\"}]\"";
    assert_eq!(text("a.csv", format!("messages\n{turns}\n")).documents, [talk(&["q"])]);
    let cases = [
        (
            "a.csv",
            "a,b\n1,2\n",
            "a.csv, line 1: the header must name a column `text`, or `prompt` and `completion`, …; found `a`, `b`",
        ),
        ("a.csv", "just text\n", "a.csv, line 1: the header must name"),
        ("a.tsv", "text\tb\n1\t2\n\"x\t\n\n", "a.tsv, line 3: a quote that is never closed opens here"),
        ("a.csv", "text\n", "a.csv: the text is empty"),
    ];
    for (name, content, expected) in cases {
        assert!(error(name, content).starts_with(expected), "{}", error(name, content));
    }
    // Quotes in the middle of a field are letters.
    assert_eq!(text("a.csv", "text\n5\" pipe\n").documents, [plain("5\" pipe")]);
}

#[test]
fn what_is_no_text_is_never_taken_for_one() {
    let cases: &[(&[u8], &str)] = &[
        (b"\x1f\x8b\x08\x00", "a compressed file, which is not read: unpack it first"),
        (b"\x28\xb5\x2f\xfd\x00", "unpack it first"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"ARROW1\x00\x00", "an Arrow file, which is not read: save it as .parquet"),
        (b"\xff\xff\xff\xff\x10\x00", "an Arrow file"),
        (b"PARE\x00", "encrypted"),
        (b"%PDF-1.7\xff", "not text"),
        (b"BZh91AY&SY\xff", "a compressed file"),
        (b"GGUF\x03\x00", "a GGUF file"),
        (b"{\"__metadata__\": {}}\x00\x00", "byte 20 is zero"),
        (b"caf\xe9", "not UTF-8 text: byte 3 cannot be read"),
        (b"\xff\xfea\x00b", "begins as UTF-16 and is not"),
        (b"\xff\xfe\x00\xd8a\x00", "begins as UTF-16 and is not"),
        (b"\xff\xfe\x00\x00a\x00\x00\x00", "not UTF-8 text: byte 0"),
        (b"a\x00b\x00", "byte 1 is zero"),
    ];
    for (bytes, expected) in cases {
        for name in ["a.txt", "a.jsonl", "a.csv", "a"] {
            let found = error(name, bytes);
            assert!(found.starts_with(name) && found.contains(expected), "{found}");
        }
    }
    for start in ["PAR1", "GGUF", "BZh9", "ORC"] {
        let content = format!("{start} begins a text");
        assert_eq!(text("a.txt", &content).plain().unwrap(), content);
    }
    assert!(error("a.parquet", "text").contains("does not begin with `PAR1`"));
    let wide = |text: &str, unit: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(unit).collect::<Vec<u8>>();
    for bytes in [wide("\u{feff}é\r\n𝄞", u16::to_le_bytes), wide("\u{feff}é\r\n𝄞", u16::to_be_bytes)] {
        let found = text("a.txt", &bytes);
        assert_eq!((found.plain().unwrap(), found.sha256.clone()), ("é\r\n𝄞".into(), sha256_hex(&bytes)));
        assert_eq!(found.notes, ["a.txt is UTF-16 and was read as such"]);
    }
    assert_eq!(text("a.jsonl", wide("\u{feff}{\"text\": \"a\"}", u16::to_le_bytes)).documents, [plain("a")]);
}

fn fixture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/records");
    std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn parquet_gives_what_pyarrow_reads() {
    let lines = |name: &str| text("x.jsonl", fixture(&format!("{name}.jsonl")));
    let flat = [
        "texts",
        "snappy",
        "gzip",
        "brotli",
        "lz4",
        "zstd",
        "view",
        "dictionary",
        "large",
        "delta_byte_array",
        "delta_length_byte_array",
        "plain",
        "others",
        "unmarked",
    ];
    let nested = ["chats", "parts", "sharegpt", "alpaca", "preference"];
    let cases = flat.map(|name| (name, "texts")).into_iter().chain(nested.map(|name| (name, name)));
    for (name, rows) in cases.chain([("chats_pages", "chats")]) {
        let found = text("x", fixture(&format!("{name}.parquet")));
        assert_eq!(found.documents, lines(rows).documents, "{name}");
        let notes = lines(rows)
            .notes
            .iter()
            .map(|note| note.replace("x.jsonl", "x").replace("line", "row"))
            .collect::<Vec<_>>();
        // Its other answer is no column that is read, and is told all the same.
        let rejected = [
            "2 of 2 records of x hold an answer under `rejected`, which was not read beside the one under `chosen`; the first is row 1",
        ];
        let mut notes = if name == "preference" { rejected.map(str::to_owned).to_vec() } else { notes };
        // A column of them is not read either, and it is told whether something stands in it.
        let images = "83 of 84 records of x name images, videos or audio under `image`, which are not looked at; the first is row 1";
        notes.extend((name == "others").then(|| images.to_owned()));
        assert_eq!(found.notes, notes, "{name}");
        assert_eq!(found.sha256, sha256_hex(fixture(&format!("{name}.parquet"))));
    }
    let chats = text("x", fixture("chats.parquet"));
    assert_eq!(
        chats.notes,
        [
            "2 of 17 records of x were left out: row 3: `messages` is null; row 4: `messages[0]`: a turn of `user` without content"
        ]
    );
    assert!(text("x", fixture("parts.parquet")).notes[0].starts_with("1 of 2 records of x hold images"));
    assert!(error("x", fixture("unknown.parquet")).contains("no column `text`"));
    assert!(error("x", fixture("unknown.parquet")).contains("found `body`, `label`"));
    assert!(error("x", fixture("texts.feather")).contains("an Arrow file"));
}

#[test]
fn damaged_parquet_files_are_errors() {
    let mut refused = 0;
    let mut state = 1u32;
    let mut random = |bound: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % bound
    };
    for name in ["chats.parquet", "texts.parquet", "zstd.parquet", "delta_byte_array.parquet"] {
        let whole = fixture(name);
        for round in 0..400 {
            let mut bytes = whole.clone();
            match round % 4 {
                0 => bytes.truncate(4 + random(whole.len() - 4)),
                // Most of a small file is its footer.
                1 => bytes[4 + random(whole.len() - 4)] ^= 1 << random(8),
                2 => bytes[4 + random(whole.len() - 4)] = random(256) as u8,
                _ => drop(bytes.drain(4 + random(200)..204 + random(200))),
            }
            refused += usize::from(read("x", bytes).is_err());
        }
    }
    assert!(refused > 600, "{refused} were refused");
}

#[test]
fn json_in_columns_is_read_as_records() {
    let column = |how: &str| vec![format!("a.json holds its records {how} and was read as such")];
    for (content, how) in [
        (json!({"text": ["a", "b"], "id": [1, 2]}), "column by column"),
        (json!({"text": {"0": "a", "1": "b"}, "id": {"0": 1, "1": 2}}), "column by column"),
        (json!({"columns": ["id", "text"], "index": [0, 1], "data": [[1, "a"], [2, "b"]]}), "column by column"),
        (json!({"0": {"text": "a"}, "1": {"text": "b"}}), "under a name each"),
    ] {
        let found = text("a.json", content.to_string());
        assert_eq!((found.documents, found.notes), (vec![plain("a"), plain("b")], column(how)), "{content}");
    }
    let turns = json!([{"role": "user", "content": "q"}]);
    for content in
        [json!({"messages": [turns, turns], "id": [1, 2]}), json!({"messages": [turns.to_string(), turns.to_string()]})]
    {
        assert_eq!(text("a.json", content.to_string()).documents, vec![talk(&["q"]); 2], "{content}");
    }
    let asked = json!({"prompt": ["p", "q"], "completion": ["a", "b"], "system": "s"});
    let both = [with_system("s", talk(&["p", "a"])), with_system("s", talk(&["q", "b"]))];
    assert_eq!(text("a.json", asked.to_string()).documents, both);
    // Batches of rows, one a line; a row that lacks its text is told by its place.
    let lines = "{\"text\": [\"a\", null]}\n{\"text\": [\"b\"]}\n";
    let found = text("a.jsonl", lines);
    assert_eq!(found.documents, [plain("a"), plain("b")]);
    assert!(
        found.notes[1].ends_with("1 of 3 records of a.jsonl were left out: line 1, row 2: `text` is null"),
        "{:?}",
        found.notes
    );
    let uneven = error("a.json", json!({"text": ["a", "b"], "prompt": ["c"]}).to_string());
    assert!(uneven.contains("`text` is a list of 2 and `prompt` one of 1"), "{uneven}");
    // One record with lists in it is no columns.
    let single = json!({"messages": [{"role": "user", "content": "q"}], "tags": ["x", "y"]});
    assert_eq!(text("a.json", single.to_string()).documents, [talk(&["q"])]);
    assert!(error("a.json", json!({"question": "q", "answer": ["a", "b"]}).to_string()).contains("found a list"));
    assert_eq!(
        text("a.json", json!({"messages": ["q", "a"], "id": ["1", "2"]}).to_string()).documents,
        [talk(&["q", "a"])]
    );
}

#[test]
fn what_is_guessed_is_told_once_for_all_records() {
    let turns = |role: &str| json!([{"role": role, "content": "q"}, {"role": "assistant", "content": "a"}]);
    let cases = [
        (
            json!({"text": "t", "messages": turns("user"), "prompt": "p"}),
            "hold text under `messages` and `prompt` beside `text`, which alone was read",
        ),
        (json!({"messages": turns("user"), "prompt": "other"}), "under `prompt` beside `messages`"),
        (json!({"problem": "p", "solution": "long", "answer": "3"}), "under `solution` beside `problem` and `answer`"),
        (json!({"text": "t", "system": "s"}), "under `system` beside `text`"),
        (
            json!({"conversations": [{"from": "narrator", "value": "q"}, {"from": "Human", "value": "x"}]}),
            "hold turns of roles that are not known (`narrator` and `Human`), which were passed on as they are",
        ),
        (
            json!({"messages": ["q", "a"]}),
            "hold bare texts under `messages`, which were read as a user and an assistant in turn",
        ),
        (json!({"data": ["q", "a"]}), "bare texts under `data`"),
        (
            json!({"instruction": "i", "input": "", "output": " "}),
            "are blank under `output` and were read with nothing but `instruction`",
        ),
        (json!({"prompt": "p", "chosen": "c", "rejected": "r"}), "hold an answer under `rejected`, which was not read"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}]}]}),
            "hold images or other parts that are not text, which were left out",
        ),
        (
            json!({"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}], "images": ["a.png"]}),
            "name images, videos or audio under `images`, which are not looked at, and `<image>` was left out of the text",
        ),
        (
            json!({"prompt": "p", "completion": "c", "audio": {"path": "a.wav"}}),
            "under `audio`, which are not looked at",
        ),
        (
            json!({"messages": [{"role": "user", "content": "q", "images": ["aGk="]}]}),
            "under `images`, which are not looked at",
        ),
    ];
    for (record, words) in cases {
        let lines = format!("{}\n{record}\n{record}\n", json!({"text": "first"}));
        let found = text("a.jsonl", lines);
        let [note] = &found.notes[..] else { panic!("{record}: {:?}", found.notes) };
        assert!(note.starts_with("2 of 3 records of a.jsonl "), "{note}");
        assert!(note.contains(words) && note.ends_with("; the first is line 2"), "{note}");
    }
    // Many roles make one note, and it names a few.
    let lines: String = (0..9).map(|i| format!("{}\n", json!({"messages": turns(&format!("r{i}"))}))).collect();
    let notes = text("a.jsonl", lines).notes;
    assert_eq!(
        notes,
        [
            "9 of 9 records of a.jsonl hold turns of roles that are not known (`r0` and `r1` and `r2` and others), which were passed on as they are; the first is line 1"
        ]
    );
    // What is in the text that was read is not missed; nor is what is empty, or no text.
    for record in [
        json!({"text": "Do: p\n\nin\n\no", "instruction": "p", "input": "in", "output": "o"}),
        json!({"messages": turns("user"), "prompt": "q", "prompt_id": "1"}),
        json!({"messages": turns("user"), "chosen": turns("user"), "text": ""}),
        json!({"text": "t", "messages": [], "prompt": null, "code": 3}),
        json!({"instruction": "i", "input": "in", "output": "o"}),
        json!({"messages": turns("developer"), "tools": []}),
        json!({"prompt": "p", "chosen": "c", "rejected": null}),
        json!({"text": "t", "rejected": "r"}),
        json!({"text": "t", "images": [], "image": null, "audio": {"bytes": null, "path": null}, "video": 3}),
        json!({"text": "an <image> of words"}),
    ] {
        assert_eq!(text("a.jsonl", record.to_string()).notes, [""; 0], "{record}");
    }
}

#[test]
fn placeholders_of_images_are_no_text() {
    let turns = |asked: &str| json!([{"role": "user", "content": asked}, {"role": "assistant", "content": "a"}]);
    let shown = json!({"messages": turns("<image>\n<image>\nq"), "images": ["a.png", "b.png"]});
    assert_eq!(record(shown).unwrap(), talk(&["q", "a"]));
    // Nobody says that it stands for something.
    assert_eq!(record(json!({"messages": turns("<image>q"), "images": []})).unwrap(), talk(&["<image>q", "a"]));
    assert_eq!(record(json!({"text": "<video>t", "videos": ["v.mp4"]})).unwrap(), plain("t"));
    let table = text("a.csv", "text,images\n<image>t,\"[\"\"a.png\"\"]\"\n<image>u,[]\n");
    assert_eq!(table.documents, [plain("t"), plain("<image>u")]);
    assert!(table.notes[0].starts_with("1 of 2 records of a.csv name images"), "{:?}", table.notes);
    let columns = json!({"text": ["<image>t", "u"], "images": [["a.png"], []]}).to_string();
    assert_eq!(text("a.json", columns).documents, [plain("t"), plain("u")]);
}

/// As servers read such parts: Anthropic's, Mistral's and others'.
#[test]
fn what_was_thought_is_no_answer() {
    let answer = json!({"type": "text", "text": "a"});
    for thought in [
        json!({"type": "thinking", "thinking": "hm", "signature": "x"}),
        json!({"type": "thinking", "thinking": [{"type": "text", "text": "h"}, {"type": "text", "text": "m"}]}),
        json!({"type": "reasoning", "text": "hm"}),
        json!({"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}),
    ] {
        for key in ["content", "parts"] {
            let turn = json!({"role": "assistant", key: [thought, answer]});
            let found = text("a.jsonl", json!({"messages": [{"role": "user", "content": "q"}, turn]}).to_string());
            let [Document::Chat { messages, .. }] = &found.documents[..] else { panic!("{thought}") };
            assert_eq!(messages[1].content, json!("a"), "{thought}");
            assert_eq!(Value::from(messages[1].extra.clone()), json!({"reasoning_content": "hm"}), "{thought}");
            assert_eq!(found.notes, [""; 0], "{thought}");
        }
    }
    // What the turn itself has goes before, and what holds nothing is nothing.
    let turn = json!({"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}, answer], "reasoning_content": "y"});
    let Document::Chat { messages, .. } = record(json!({"messages": [turn]})).unwrap() else { panic!() };
    assert_eq!(Value::from(messages[0].extra.clone()), json!({"reasoning_content": "y"}));
    let turn =
        json!({"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": "x"}, answer]});
    assert_eq!(record(json!({"messages": [turn]})).unwrap(), {
        let mut only = talk(&["q", "a"]);
        if let Document::Chat { messages, .. } = &mut only {
            messages.remove(0);
        }
        only
    });
}

#[test]
fn lists_that_python_printed_are_no_text() {
    let cell = "[{'role': 'user', 'content': 'q'}]";
    for record in [json!({"messages": cell}), json!({"prompt": "p", "chosen": cell}), json!({"prompt": cell})] {
        assert!(record_error(record).contains("is a list as Python prints it"));
    }
    let whole = error("a.jsonl", "{'text': 'a'}\n{'text': 'b'}\n");
    assert!(whole.ends_with("it is as Python prints it; write each record with `json.dumps`"), "{whole}");
}

fn record_error(json: Value) -> String {
    record(json).unwrap_err()
}

#[test]
fn blank_records_count_among_those_of_no_use_in_calibration() {
    let lines = |blank: usize, null: usize, good: usize| {
        let of = |text: Value, count: usize| vec![format!("{}\n", json!({"text": text})); count];
        [of("w1 w2 w3 w4".into(), good), of("".into(), blank), of(Value::Null, null)].concat().concat()
    };
    let tokenizer = super::select::words(false);
    let calibrate = |content: String| {
        let found = text("a.jsonl", content);
        select(&found, &tokenizer, None, 1, 4, 0).map(|_| found.without_blank()).map_err(|error| error.to_string())
    };
    assert_eq!(calibrate(lines(0, 0, 4)).unwrap(), None);
    // As many as WikiText has.
    assert_eq!(
        calibrate(lines(35, 0, 65)).unwrap().unwrap(),
        "35 of 100 records of a.jsonl are blank and were left out of calibration; the first is line 66"
    );
    assert!(calibrate(lines(5, 0, 5)).is_ok());
    assert_eq!(
        calibrate(lines(6, 0, 5)).unwrap_err(),
        "a.jsonl, line 6: the text is blank; 6 of 11 records cannot be used, and fewer than half may be left out: mend them, or take them out of the file"
    );
    assert_eq!(
        calibrate(lines(3, 3, 5)).unwrap_err(),
        "a.jsonl, line 6: the text is blank; 6 of 11 records cannot be used, and fewer than half may be left out: mend them, or take them out of the file"
    );
    // Evaluation has them all as blank lines.
    assert_eq!(text("a.jsonl", lines(6, 0, 1)).plain().unwrap(), format!("w1 w2 w3 w4{}", "\n\n".repeat(6)));
    // Conversations and pairs in which nothing is said are left out for good.
    let blank = json!({"messages": [{"role": "user", "content": " "}]});
    assert_eq!(record_error(blank), "`messages` holds no text");
    assert_eq!(record_error(json!({"prompt": "", "completion": " "})), "`prompt` and `completion` are blank");
    assert_eq!(record(json!({"text": "", "prompt": "", "completion": ""})).unwrap(), plain(""));
    assert_eq!(record(json!({"text": "", "messages": []})).unwrap(), plain(""));
}

#[test]
fn files_that_were_never_fetched_are_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    for name in ["a.txt", "a.jsonl", "a.parquet", "a.csv"] {
        assert!(error(name, pointer).contains("git lfs pull"), "{name}");
        assert!(error(name, "Entry not found").contains("what a server answered"), "{name}");
    }
    for name in ["a.jsonl", "a.csv", "a.parquet"] {
        assert!(error(name, "<!doctype html><html></html>").contains("an HTML page and not the file itself"), "{name}");
    }
    let story = format!("Access denied. {}", "So it went on. ".repeat(40));
    assert!(text("a.txt", story).notes.is_empty());
}
