//! What a text holds whose name does not say it: records that can be told for certain, or what only looks like something else.

use serde_json::Value;

use super::json::{json_words, python_json};
use super::{columns, record, table};

/// Lines that are looked at to tell what a text looks like; what it is for certain is told by all of them.
const LOOKED_AT: usize = 2000;

/// Lines of a title that may stand above records.
const TITLE: usize = 3;

/// What a text holds.
#[derive(Debug, PartialEq)]
pub(super) enum Shape {
    /// Running text, as far as can be told.
    Running,
    /// JSON, from this byte on.
    Json { from: usize },
    /// A table whose header names a field that is known.
    Table { delimiter: u8 },
    /// Running text that looks like something else: what to say of it, to follow the name of the file.
    Like(String),
}

/// Tells what a text holds, by its ending and its content.
pub(super) fn shape(ending: &str, content: &str) -> Shape {
    if begins_with_json(content) || are_strings(content) {
        return Shape::Json { from: 0 };
    }
    if let Some(from) = below_title(content) {
        return Shape::Json { from };
    }
    if are_records(content) {
        return Shape::Json { from: 0 };
    }
    match table_of(content) {
        Some(shape) => shape,
        None => like(ending, content).map_or(Shape::Running, Shape::Like),
    }
}

fn lines(content: &str) -> impl Iterator<Item = &str> {
    content.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// Whether a text is JSON that begins with an object or a list of records, or its first line is.
fn begins_with_json(content: &str) -> bool {
    let start = content.trim_start();
    let object = start.starts_with('{');
    let list = start.strip_prefix('[').map(str::trim_start);
    if object || list.is_some_and(|rest| rest.starts_with('{')) {
        let first = start.lines().next().unwrap_or_default();
        return python_json(first).is_ok()
            || python_json(content).is_ok()
            || object && serde_json::Deserializer::from_str(content).into_iter::<Value>().all(|value| value.is_ok());
    }
    // A list of texts or of conversations; a link in brackets is none.
    let texts = |rest: &str| rest.starts_with('"') || rest.starts_with('[');
    list.is_some_and(texts)
        && python_json(content)
            .is_ok_and(|value| value.as_array().is_some_and(|items| items.len() > 1 && items.iter().all(is_record)))
}

/// Whether every line is a JSON string. A single one has to hold an escape: somebody may only be quoted.
fn are_strings(content: &str) -> bool {
    let is_string = |line: &str| line.starts_with('"') && python_json(line).is_ok_and(|value| value.is_string());
    lines(content).all(is_string) && (lines(content).nth(1).is_some() || content.contains('\\'))
}

fn is_record(value: &Value) -> bool {
    value.as_object().is_some_and(|fields| columns::records(fields).is_some()) || record::read(value).is_ok()
}

/// Whether more than half of the lines are records that are known.
fn are_records(content: &str) -> bool {
    let is = |line: &str| {
        let whole = line.starts_with('{') && line.ends_with('}') || line.starts_with('[') && line.ends_with(']');
        whole && python_json(line).is_ok_and(|value| is_record(&value))
    };
    let (mut all, mut records) = (0, 0);
    for line in lines(content) {
        all += 1;
        records += usize::from(is(line));
    }
    2 * records > all
}

/// Where JSON records begin that fill the text but for a few lines above them.
fn below_title(content: &str) -> Option<usize> {
    let mut at = 0;
    let mut above = 0;
    for line in content.split_inclusive('\n') {
        let start = line.trim_start();
        if start.starts_with('{') || start.starts_with('[') {
            break;
        }
        above += usize::from(!start.is_empty());
        at += line.len();
        if above > TITLE {
            return None;
        }
    }
    let values: Result<Vec<Value>, _> = serde_json::Deserializer::from_str(&content[at..]).into_iter().collect();
    let values = values.ok()?;
    let values = match &values[..] {
        [Value::Array(items)] if !is_record(&values[0]) => items,
        values => values,
    };
    let records = values.iter().filter(|value| is_record(value)).count();
    (above > 0 && records > 0 && 2 * records >= values.len()).then_some(at)
}

/// A table, by its header: one that is read where a column is known and nearly all rows have its length.
fn table_of(content: &str) -> Option<Shape> {
    let first = lines(content).next()?;
    if first == "text" || first == "\"text\"" {
        let why = "begins with `text` alone, like the header of a table with one column";
        return lines(content).nth(1).map(|_| Shape::Like(taken(why, "name it .csv or .tsv to have its rows read")));
    }
    for delimiter in [b',', b'\t', b';', b'|'] {
        let Some(header) = table::header(first, delimiter) else { continue };
        let named = |(index, name): (usize, &String)| {
            let mut letters = name.chars();
            let first = letters.next();
            // The column of numbers that pandas writes has no name.
            first.map_or(index == 0 && delimiter != b'|', |c| c.is_alphabetic() || c == '_')
                && name.len() <= 40
                && letters.all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.'))
        };
        if header.len() < 2 || !header.iter().enumerate().all(named) {
            continue;
        }
        // The line below the head of a Markdown table.
        if lines(content).nth(1).is_some_and(|line| line.chars().all(|c| matches!(c, '-' | ':' | '|' | ' '))) {
            return None;
        }
        let known = header.iter().any(|name| record::is_content(name));
        let (rows, odd) = table::lengths(content, delimiter, header.len());
        let closed = !table::is_open(content, delimiter);
        if known && closed && rows > 0 && 10 * odd <= rows {
            return Some(Shape::Table { delimiter });
        }
        if known && rows > 0 && 2 * odd <= rows || closed && rows >= 3 && odd == 0 {
            let columns = header.iter().take(8).map(String::as_str).collect::<Vec<_>>().join("`, `");
            let why = format!("looks like a table with the columns `{columns}`");
            let what =
                "to have its rows read, name it .csv or .tsv and give it a column `text`, or `prompt` and `completion`";
            return Some(Shape::Like(taken(&why, what)));
        }
    }
    None
}

/// One sentence on a text that was read as it is.
fn taken(why: &str, what: &str) -> String {
    format!("{why}, and was read as running text, marks and all; {what}")
}

/// What a text looks like that is none that is read.
fn like(ending: &str, content: &str) -> Option<String> {
    let start = content.trim_start();
    let begins = |word: &str| start.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word));
    if begins("{\\rtf") {
        return Some(taken("is RTF", "save it as .txt"));
    }
    if ["html", "htm", "xhtml"].contains(&ending) || begins("<!doctype html") || begins("<html") {
        return Some(taken("is HTML", "save the text of the page alone as .txt"));
    }
    if ["xml", "svg"].contains(&ending) || begins("<?xml") || is_one_element(content) {
        return Some(taken("is XML or the like", "save its text alone as .txt, or write it as JSON lines"));
    }
    if ["yaml", "yml"].contains(&ending) || is_yaml_records(content) {
        return Some(taken("is YAML, which is not read", "write its records as JSON lines into a .jsonl file"));
    }
    if !["py", "pyi"].contains(&ending) && is_python(content) {
        let what = "to have its records read, write each with `json.dumps` on a line of its own";
        return Some(taken("looks like what Python prints, which is not JSON", what));
    }
    let whole = start.starts_with(['{', '[']);
    let (mut all, mut marked, mut named, mut behind) = (0, 0, 0, 0);
    for line in lines(content).take(LOOKED_AT) {
        all += 1;
        behind += usize::from(has_record_behind(line));
        // Names and colons alone are marks of source code, too.
        if !whole && !line.starts_with(['{', '[']) {
            continue;
        }
        let brackets = line.chars().all(|c| matches!(c, '{' | '}' | '[' | ']' | ',' | ' '));
        let json = !brackets && is_json_line(line);
        named += usize::from(json);
        marked += usize::from(json || brackets);
    }
    if 2 * behind > all {
        let what = "to have them read, remove what stands before each `{`";
        return Some(taken("has JSON records behind other words on its lines", what));
    }
    if named > 0 && 2 * marked >= all && (whole || marked > 2) {
        let why = match python_json(lines(content).find(|line| is_json_line(line)).unwrap_or_default()) {
            Err(error) if lines(content).all(|line| line.starts_with('{')) => {
                format!("looks like JSON, but is not ({} in its first record)", json_words(&error))
            }
            _ => "looks like JSON, but is not, or holds no records that are known".to_owned(),
        };
        return Some(taken(&why, "to learn what is wrong, name it .jsonl or .json"));
    }
    None
}

/// Whether a line ends with a record and begins with something else, as what servers send and logs keep.
fn has_record_behind(line: &str) -> bool {
    let at = if line.ends_with('}') { line.find("{\"").filter(|at| *at > 0) } else { None };
    at.is_some_and(|at| python_json(&line[at..]).is_ok_and(|value| is_record(&value)))
}

/// Whether a line is part of JSON by its marks, a name in quotes and a colon, or a whole list with quotes in it.
fn is_json_line(line: &str) -> bool {
    let inside = line.trim_start_matches(['{', '[', ' ']);
    let named = |rest: &str| {
        let name = rest.split('"').next().unwrap_or_default();
        rest[name.len()..].trim_start_matches('"').trim_start().starts_with(':') && !name.is_empty()
    };
    inside.strip_prefix('"').is_some_and(named)
        || line.starts_with('[') && line.contains('"') && python_json(line).is_ok()
}

/// Whether a text is records as Python prints them: `{'text': …}`, or a list of these, or of strings.
pub(super) fn is_python(content: &str) -> bool {
    let record = |line: &str| {
        let inside = line.trim_start_matches(['[', '(', ' ']);
        let key = inside.strip_prefix('{').map(str::trim_start).and_then(|rest| rest.strip_prefix('\''));
        key.and_then(|rest| rest.split_once('\'')).is_some_and(|(_, rest)| rest.trim_start().starts_with(':'))
    };
    let strings = |line: &str| line.starts_with("['") && line.trim_end_matches(',').ends_with("']");
    if record(content.trim_start()) {
        return true;
    }
    let (mut all, mut python) = (0, 0);
    for line in lines(content).take(LOOKED_AT) {
        all += 1;
        python += usize::from(record(line) || strings(line));
    }
    all > 0 && 2 * python > all
}

/// Whether a text is one element, or a row of elements of one name, from its first mark to its last.
fn is_one_element(content: &str) -> bool {
    // Marks of sequences and of thoughts, which texts for models have.
    const OWN: &[&str] = &["s", "think"];
    let Some(rest) = content.trim_start().strip_prefix('<') else { return false };
    let name: &str =
        rest.split(|c: char| !c.is_alphanumeric() && !matches!(c, '_' | '-' | ':')).next().unwrap_or_default();
    let closed = content.trim_end().strip_suffix('>').map(str::trim_end).and_then(|rest| rest.strip_suffix(name));
    !name.is_empty() && !OWN.contains(&name) && closed.is_some_and(|rest| rest.ends_with("</"))
}

/// Whether a text is YAML with records: names and colons, or dashes before them, and a name that records have.
fn is_yaml_records(content: &str) -> bool {
    let key = |line: &str| {
        let (key, rest) = line.split_once(':')?;
        let name = key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')) && !key.is_empty();
        (name && (rest.is_empty() || rest.starts_with(' '))).then(|| key.to_owned())
    };
    let (mut items, mut known) = (0, false);
    for line in content.lines().take(LOOKED_AT).filter(|line| !line.trim().is_empty()) {
        let item = line.trim_start().strip_prefix("- ").map_or(line.trim_start(), str::trim_start);
        let named = key(item);
        known |= named.as_deref().is_some_and(record::is_content);
        if !line.starts_with([' ', '\t']) {
            let mark = line.starts_with('#') || ["---", "...", "-"].contains(&line.trim_end());
            if !mark && named.is_none() {
                return false;
            }
            items += usize::from(!mark);
        }
    }
    known && items > 0
}

#[cfg(test)]
mod tests {
    use super::super::{Document, Text, read};

    #[track_caller]
    fn text(name: &str, content: &str) -> Text {
        read(name, content.as_bytes().to_vec()).unwrap_or_else(|error| panic!("{content}: {error}"))
    }

    fn documents(texts: &[&str]) -> Vec<Document> {
        texts.iter().map(|text| Document::Plain((*text).to_owned())).collect()
    }

    /// Names that say nothing of records.
    const NAMES: &[&str] = &["a.txt", "a.md", "a", "a.dat", "folder.d/a.text"];

    #[test]
    fn records_are_read_under_any_name() {
        let json = "holds JSON records";
        let table = "begins with the header of a table";
        for (content, texts, note) in [
            ("\"a\\n\"\n\"b\"\n", &["a\n", "b"][..], json),
            ("\"a\\nb\"", &["a\nb"], json),
            ("[\"a\", \"b\"]", &["a", "b"], json),
            ("[\n \"a\",\n \"b\"\n]\n", &["a", "b"], json),
            ("My texts\n{\"text\": \"a\"}\n{\"text\": \"b\"}\n", &["a", "b"], "has records from line 2 on"),
            ("# one\n\n# two\n{\"text\": \"a\"}\n", &["a"], "has records from line 4 on"),
            ("Texts:\n[\n {\"text\": \"a\"},\n {\"text\": \"b\"}\n]", &["a", "b"], "has records from line 2 on"),
            ("{\n \"text\": \"a\"\n}\n{\n \"text\": \"b\"\n}\n", &["a", "b"], json),
            (
                "row 1\n{\"text\": \"a\"}\nrow 2\n{\"text\": \"b\"}\n{\"text\": \"c\"}\n",
                &["a", "b", "c"],
                "2 of 5 records",
            ),
            ("id,text\n1,a\n2,\"b, c\"\n", &["a", "b, c"], table),
            ("\"id\",\"text\"\n\"1\",\"a\"\n", &["a"], table),
            (",text\n0,a\n1,b\n", &["a", "b"], table),
            ("text\tlabel\r\na\t1\r\nb\t0\r\n", &["a", "b"], table),
            ("text;label\na;1\nb;0\n", &["a", "b"], table),
            ("{\"text\": [\"a\", \"b\"], \"id\": [1, 2]}", &["a", "b"], "column by column"),
        ] {
            for name in NAMES {
                let found = text(name, content);
                assert_eq!(found.documents, documents(texts), "{name}: {content}");
                assert!(found.notes.iter().any(|one| one.contains(note) && one.contains(name)), "{:?}", found.notes);
            }
        }
        let turns = "[[{\"role\": \"user\", \"content\": \"q\"}], [{\"role\": \"user\", \"content\": \"r\"}]]";
        assert!(matches!(text("a.txt", turns).documents[..], [Document::Chat { .. }, Document::Chat { .. }]));
    }

    #[test]
    fn capital_endings_are_endings() {
        for (name, content) in [
            ("Text.CSV", "id,text\n1,a\n2,b\n"),
            ("Text.TSV", "id\ttext\n1\ta\n2\tb\n"),
            ("x.JSONL", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n"),
            ("x.NdJson", "\"a\"\n\"b\"\n"),
        ] {
            let found = text(name, content);
            assert_eq!((found.documents, found.notes.len()), (documents(&["a", "b"]), 0), "{name}");
        }
    }

    #[test]
    fn what_only_looks_like_something_else_is_told() {
        for (content, words) in [
            ("{'text': 'a'}\n{'text': 'it\\'s'}\n", "what Python prints"),
            ("[{'role': 'user', 'content': 'a'}]\n", "what Python prints"),
            ("[{'text': 'a',\n  'id': 1},\n {'text': 'b'}]", "what Python prints"),
            ("['a', 'b']\n['c']\n", "what Python prints"),
            ("Title\n{'text': 'a'}\n{'text': 'b'}\n", "what Python prints"),
            ("{\"text\": \"a\"},\n{\"text\": \"b\"},\n", "trailing characters in its first record"),
            ("[\n {\"text\": \"a\"},\n {\"text\": \"b\"},\n]\n", "looks like JSON, but is not"),
            ("[\n {\"text\": \"a\"},\n {\"text\": \"b", "looks like JSON, but is not"),
            ("[\"a\", \"b\"]\n[\"c\", \"d\"]\n[{\"x\": 1}]\n", "or holds no records that are known"),
            (
                "data: {\"text\": \"a\"}\n\ndata: {\"text\": \"b\"}\n\ndata: [DONE]\n",
                "has JSON records behind other words",
            ),
            ("\u{1e}{\"text\": \"a\"}\n\u{1e}{\"text\": \"b\"}\n", "has JSON records behind other words"),
            ("id,body,label\n1,a,x\n2,b,y\n3,c,z\n", "a table with the columns `id`, `body`, `label`"),
            ("id,text\n1,a\n2,b,c\n3,d,e\n4,f\n", "a table with the columns"),
            ("text\na\nb\n", "begins with `text` alone"),
            ("- text: a\n- text: b\n", "is YAML"),
            ("---\n- id: 1\n  text: |\n    a\n    b\n", "is YAML"),
            ("text: a\n---\ntext: b\n", "is YAML"),
            ("<?xml version=\"1.0\"?>\n<a>b</a>", "is XML"),
            ("<doc id=\"1\">\na\n</doc>\n<doc id=\"2\">\nb\n</doc>\n", "is XML"),
            ("<!DOCTYPE html>\n<p>a</p>", "is HTML"),
            ("\n<HTML><body>a</body></HTML>", "is HTML"),
            ("{\\rtf1\\ansi a}", "is RTF"),
        ] {
            for name in NAMES {
                let found = text(name, content);
                assert_eq!(found.plain().unwrap(), content, "{name}");
                let [note] = &found.notes[..] else { panic!("{content}: {:?}", found.notes) };
                assert!(note.contains(words) && note.starts_with(name) && note.contains("running text"), "{note}");
            }
        }
        for (name, words) in [("a.html", "is HTML"), ("a.XML", "is XML"), ("a.yml", "is YAML")] {
            assert!(text(name, "whatever").notes[0].contains(words));
        }
    }

    #[test]
    fn prose_code_and_markdown_raise_no_alarm() {
        for content in [
            "\n = Title = \n \n Some text , with @-@ marks . \n",
            "\"Come in,\" she said.\n\"I will,\" said he.\n",
            "\"Be yourself.\"",
            "text, that is, words\nand more of it\n",
            "Yes, no\nand so\n",
            "Dear John, dear Mary,\nthank you, all.\n",
            "content: what a book holds.\nAnd a line.\n",
            "User: hi\nAssistant: hello\n",
            "Question: why?\nAnswer: because.\n",
            "# Title\n\n- one: a\n- two: b\n\nText.\n",
            "---\ntitle: A\ntext: x\n---\n\n# A\n\nWords follow.\n",
            "# A\n\n| text | label |\n|---|---|\n| a | 1 |\n\nwords\n",
            "text | label\n--- | ---\na | 1\nb | 2\nc | 3\n",
            "# API\n\nSend this:\n\n```json\n{\"text\": \"a\"}\n```\n\nand read the answer.\n",
            "<div align=\"center\">\n<h1>A</h1>\n</div>\n\nA README.\n",
            "<s>a</s>\n<s>b</s>",
            "<|im_start|>user\nhi<|im_end|>\n",
            "<think>a</think>",
            "def f(x):\n    return {'text': x}\n\nprint(f(1))\n",
            "import json\nwith open('a') as f:\n    rows = [{'text': 'a'}]\n",
            "fn main() {\n    println!(\"{}\", 1);\n}\n",
            "{\n  int x = 1;\n}\n",
            "const a = {\n  \"text\": \"b\",\n};\nconsole.log(a);\n",
            "CASES = {\n    \"a\": 1,\n    \"b\": 2,\n    \"c\": 3,\n}\n",
            "rows = [\n    {\"text\": \"a\"},\n]\nprint(rows)\nprint(rows)\n",
            "#include <stdio.h>\nint main(void) { return 0; }\n",
            "<?php\necho 'a';\n?>\n",
            "model: llama\nlr: 1.0\n",
            "[1] A. Author, 1990.\n[2] B. Author, 1991.\n",
            "['tis the season\n",
            "{{ template }}\n",
            "a\tb\nc\td\n",
            "1,2\n3,4\n5,6\n",
            "text",
        ] {
            for name in ["a.txt", "a.md", "a", "a.py", "a.rs", "wiki.raw"] {
                let found = text(name, content);
                assert_eq!((found.plain().as_deref(), &found.notes), (Some(content), &Vec::new()), "{name}: {content}");
            }
        }
    }
}
