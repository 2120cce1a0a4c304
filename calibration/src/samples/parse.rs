//! Files into documents: running text, JSON records, and what only looks like either.

use formats::container::stand_in::{is_pointer, stand_in};
use serde_json::Value;

use super::guess::Guess;
use super::json::{Python, json_words, python_json};
use super::records::Records;
use super::shape::{Shape, is_python, shape};
use super::{Document, SampleError, Tally, Text, columns, parquet, record, sha256_hex, table};

/// A line that holds only this ends a document of a plain text.
const SEPARATOR: &str = "<|document|>";

/// Documents of a plain text: divided at lines that hold only `<|document|>`, else one document, byte for byte.
///
/// The line breaks beside a separator belong to it. Documents of white space only are dropped, as is a byte order mark.
pub fn parse_txt(name: &str, text: &str) -> Text {
    let sha256 = sha256_hex(text);
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    let mut start = 0;
    let mut at = 0;
    let mut push = |document: &str| {
        if !document.trim().is_empty() {
            documents.push(Document::Plain(document.to_owned()));
        }
    };
    for line in text.split_inclusive('\n') {
        if line.trim_end() == SEPARATOR {
            let before = &text[start..at];
            let before = before.strip_suffix('\n').unwrap_or(before);
            push(before.strip_suffix('\r').unwrap_or(before));
            start = at + line.len();
        }
        at += line.len();
    }
    push(&text[start..]);
    Text { name: name.to_owned(), sha256, documents, notes: Vec::new(), tally: Tally::default() }
}

/// Reads a file's bytes as what they are.
///
/// Parquet is known by its first bytes, tables and JSON by their ending or by what they hold; everything else is running text, byte for
/// byte, with a word on it in [`Text::notes`] where it looks like something else. Records that hold nothing to read are left out and counted in [`Text::notes`]. Fails where at
/// least half of them are so, and for what is no text: compressed and binary files, unknown encodings.
pub fn read(name: &str, bytes: Vec<u8>) -> Result<Text, SampleError> {
    let sha256 = sha256_hex(&bytes);
    let ending = ending(name);
    let refuse = |problem: &str| SampleError::Unread { name: name.to_owned(), problem: problem.to_owned() };
    if let Some(problem) = no_text(&bytes) {
        return Err(refuse(problem));
    }
    if let Some(problem) = instead(&ending, &bytes) {
        return Err(refuse(&problem));
    }
    if bytes.starts_with(b"PAR1") && is_binary(&bytes) {
        return parquet::read(name, bytes)?.finish(name, sha256);
    }
    if PARQUET.contains(&ending.as_str()) {
        return Err(refuse("not a Parquet file, though its name says so: it does not begin with `PAR1`"));
    }
    let mut notes = Vec::new();
    let text = decode(name, bytes, &mut notes)?;
    let content = text.strip_prefix('\u{feff}').unwrap_or(&text);
    if content.trim().is_empty() {
        return Err(SampleError::Empty { name: name.to_owned() });
    }
    let mut read = if JSON.contains(&ending.as_str()) {
        json(name, content, 0)?.finish(name, sha256.clone())?
    } else {
        let shape = shape(&ending, content);
        let records = match (&shape, table::delimiter(&ending, content)) {
            (Shape::Json { from }, _) => {
                let title = content[..*from].lines().count();
                Some(json(name, &content[*from..], title).map(|mut records| {
                    records
                        .notes
                        .push(format!("{name} holds JSON records and was read as such, whatever its name ends in"));
                    if title > 0 {
                        records
                            .notes
                            .push(format!("{name} has records from line {} on; what is above was left out", title + 1));
                    }
                    records
                }))
            }
            (_, Some(delimiter)) => Some(table::read(name, content, delimiter)),
            (Shape::Table { delimiter }, None) => Some(table::read(name, content, *delimiter).map(|mut records| {
                records.notes.push(format!(
                    "{name} begins with the header of a table and was read as one, whatever its name ends in"
                ));
                records
            })),
            _ => None,
        };
        let read = records.map(|records| records.and_then(|records| records.finish(name, sha256.clone())));
        let plain = |what: &str| {
            let mut read = parse_txt(name, &text);
            read.notes.push(format!("{name} {what}"));
            read
        };
        match (read, shape) {
            (Some(Ok(read)), _) => read,
            (Some(Err(_)), Shape::Json { .. }) if RUNNING.contains(&ending.as_str()) => plain(UNKNOWN_JSON),
            (Some(Err(error)), _) => return Err(error),
            (None, Shape::Like(what)) => plain(&what),
            (None, _) if text.contains(SEPARATOR) || text.starts_with('\u{feff}') => parse_txt(name, &text),
            // One document, which is not copied: it may be most of the memory there is.
            (None, _) => {
                let documents = vec![Document::Plain(text)];
                Text {
                    name: name.to_owned(),
                    sha256: String::new(),
                    documents,
                    notes: Vec::new(),
                    tally: Tally::default(),
                }
            }
        }
    };
    // Of a text in another encoding, too, it is the file's.
    read.sha256 = sha256;
    read.notes.splice(0..0, notes);
    Ok(read)
}

const JSON: &[&str] = &["json", "jsonl", "ndjson", "jsonlines"];
/// What there is to say of a file that Python did not write as JSON.
const PYTHON: &str = ": it is as Python prints it; write each record with `json.dumps`";

/// Lines among which the first record has to be.
const LOOKED_AT: usize = 4;

const PARQUET: &[&str] = &["parquet", "pq"];

/// Endings of running text, which has to stay as it is unless every sign says otherwise.
const RUNNING: &[&str] = &["txt", "raw", "md", "text", "tokens"];

/// What follows the last dot of a file's name, in lower case.
fn ending(name: &str) -> String {
    let file = name.rsplit(['/', '\\']).next().unwrap_or(name);
    file.rsplit_once('.').map_or(String::new(), |(_, ending)| ending.to_lowercase())
}

/// What to say of JSON that is no records, in a file that says of itself that it is running text.
const UNKNOWN_JSON: &str = "begins with a JSON object, but does not hold records that are known: it was read as running text; to have \
     it read as records, give each a `text`, `messages`, or `prompt` and `completion`";

/// What a file is that holds no text, by its first bytes, and what to do about it.
fn no_text(bytes: &[u8]) -> Option<&'static str> {
    const COMPRESSED: &str = "a compressed file, which is not read: unpack it first";
    const OFFICE: &str = "a zip archive, or a document of an office program: unpack it, or save it as .csv or .txt";
    const ARROW: &str =
        "an Arrow file, which is not read: save it as .parquet or .jsonl (`dataset.to_parquet`, `dataset.to_json`)";
    const BINARY: &str = "not text: texts are .txt, .jsonl, .json, .csv, .tsv or .parquet";
    const KINDS: &[(&[u8], &str)] = &[
        (b"\x1f\x8b", COMPRESSED),
        (b"\x28\xb5\x2f\xfd", COMPRESSED),
        (b"\x04\x22\x4d\x18", COMPRESSED),
        (b"\xfd7zXZ\x00", COMPRESSED),
        (b"BZh", COMPRESSED),
        (b"7z\xbc\xaf\x27\x1c", COMPRESSED),
        (b"Rar!\x1a\x07", COMPRESSED),
        (b"PK\x03\x04", OFFICE),
        (b"ARROW1\x00", ARROW),
        (b"\xff\xff\xff\xff", ARROW),
        (b"FEA1", ARROW),
        (b"PARE", "a Parquet file whose footer is encrypted, which is not read"),
        (b"%PDF-", BINARY),
        (b"GGUF", "a GGUF file, not a text"),
        (b"\x80\x04\x95", BINARY),
        (b"\x89HDF\r\n", BINARY),
        (b"\x93NUMPY", BINARY),
        (b"Obj\x01", BINARY),
        (b"ORC", BINARY),
        (b"SQLite format 3\x00", BINARY),
    ];
    // Letters alone may begin a text as well.
    let sure = |magic: &[u8]| !magic.iter().all(u8::is_ascii_graphic) || is_binary(bytes);
    KINDS.iter().find(|(magic, _)| bytes.starts_with(magic) && sure(magic)).map(|(_, problem)| *problem)
}

/// What lies in the place of a file that was never fetched. A page of HTML may be meant where the name does not say records.
fn instead(ending: &str, bytes: &[u8]) -> Option<String> {
    const ANSWER: usize = 256;
    let records = JSON.contains(&ending) || PARQUET.contains(&ending) || ["csv", "tsv"].contains(&ending);
    let page = bytes.trim_ascii_start().starts_with(b"<");
    let sure = is_pointer(bytes) || records || bytes.len() <= ANSWER && !page;
    stand_in(bytes).filter(|_| sure && !bytes.is_empty())
}

fn is_binary(bytes: &[u8]) -> bool {
    bytes.contains(&0) || std::str::from_utf8(bytes).is_err()
}

/// The text of a file: UTF-8, or UTF-16 with its mark.
fn decode(name: &str, bytes: Vec<u8>, notes: &mut Vec<String>) -> Result<String, SampleError> {
    let wide: Option<fn([u8; 2]) -> u16> = match bytes.as_slice() {
        [0xff, 0xfe, 0, 0, ..] => None,
        [0xff, 0xfe, ..] => Some(u16::from_le_bytes),
        [0xfe, 0xff, ..] => Some(u16::from_be_bytes),
        _ => None,
    };
    if let Some(unit) = wide {
        let units = bytes[2..].as_chunks::<2>().0.iter().map(|pair| unit(*pair));
        let text: Result<String, _> = char::decode_utf16(units).collect();
        notes.push(format!("{name} is UTF-16 and was read as such"));
        return match text {
            Ok(text) if bytes.len().is_multiple_of(2) && !text.contains('\0') => Ok(text),
            _ => Err(SampleError::Unread {
                name: name.to_owned(),
                problem: "begins as UTF-16 and is not: save it as UTF-8".to_owned(),
            }),
        };
    }
    let text = String::from_utf8(bytes)
        .map_err(|e| SampleError::Encoding { name: name.to_owned(), offset: e.utf8_error().valid_up_to() })?;
    match text.find('\0') {
        Some(at) => Err(SampleError::Unread {
            name: name.to_owned(),
            problem: format!(
                "byte {at} is zero, so this is not text: texts are .txt, .jsonl, .json, .csv, .tsv or .parquet, in UTF-8"
            ),
        }),
        None => Ok(text),
    }
}

/// Records of a JSON text: one a line, a list of them, one after the other, or such a list inside an object.
///
/// `above` lines of the file stand before it.
fn json(name: &str, text: &str, above: usize) -> Result<Records, SampleError> {
    let mut records = Records::default();
    let whole = match Python::read(text) {
        Ok(Python { value, twice, rounded }) => {
            whole(name, value, &mut records);
            if let Some((key, count)) = twice {
                let objects = if count == 1 { "an object".to_owned() } else { format!("{count} objects") };
                records
                    .notes
                    .push(format!("{name} gives a key twice in {objects} (`{key}`): the last counts, as in Python"));
            }
            if let Some(number) = rounded {
                records
                    .notes
                    .push(format!("{name} holds {number} and maybe more such integers: they were rounded to floats"));
            }
            return Ok(records);
        }
        Err(error) => error,
    };
    let container = |line: &str| python_json(line).is_ok_and(|value| !value.is_number());
    let lines = || text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    // The first lines may be the ones that are damaged.
    if lines().count() > 1 && lines().take(LOOKED_AT).any(|(_, line)| container(line)) {
        for (index, line) in lines() {
            let place = || format!("line {}", above + index + 1);
            let record = Python::read(line)
                .map_err(|error| format!("not JSON ({}); each line must be one JSON object", json_words(&error)));
            match record {
                Ok(record) => add_read(name, record, &place, &mut records),
                Err(problem) => records.add(place, Err(problem)),
            }
        }
        return Ok(records);
    }
    let stream: Result<Vec<Python>, _> = serde_json::Deserializer::from_str(text).into_iter().collect();
    match stream {
        Ok(values) => {
            for (index, value) in values.into_iter().enumerate() {
                add_read(name, value, &|| format!("record {}", index + 1), &mut records);
            }
            Ok(records)
        }
        Err(_) => Err(SampleError::Record {
            name: name.to_owned(),
            place: format!("line {}, column {}", above + whole.line(), whole.column()),
            problem: format!("not JSON ({}){}", json_words(&whole), if is_python(text) { PYTHON } else { "" }),
        }),
    }
}

/// The records of a file that is one JSON value.
fn whole(name: &str, value: Value, records: &mut Records) {
    /// Names under which files keep their list of records; the first that is there is taken.
    const LISTS: &[&str] =
        &["train", "data", "rows", "records", "examples", "items", "instances", "test", "validation"];
    let list = match value {
        Value::Array(items) if record::are_turns(&items) => vec![Value::Array(items)],
        Value::Array(items) => items,
        Value::Object(mut fields) => {
            let is_list = |key: &str, fields: &serde_json::Map<String, Value>| {
                fields.get(key).and_then(Value::as_array).is_some_and(|list| {
                    !list.is_empty() && list.iter().all(Value::is_object) && !record::are_turns(list)
                })
            };
            match LISTS.iter().find(|key| is_list(key, &fields)) {
                Some(key) => {
                    let others: Vec<&str> =
                        LISTS.iter().filter(|other| *other != key && is_list(other, &fields)).copied().collect();
                    if !others.is_empty() {
                        let others = others.join("`, `");
                        records
                            .notes
                            .push(format!("of {name} the records under `{key}` were read, not those under `{others}`"));
                    }
                    match fields.remove(*key) {
                        Some(Value::Array(items)) => items,
                        _ => Vec::new(),
                    }
                }
                None => vec![Value::Object(fields)],
            }
        }
        other => vec![other],
    };
    for (index, record) in list.into_iter().enumerate() {
        add(name, record, &|| format!("record {}", index + 1), records);
    }
}

/// [`add`] of a value that was read by itself.
fn add_read(name: &str, record: Python, place: &dyn Fn() -> String, records: &mut Records) {
    add(name, record.value, place, records);
    let twice = record.twice.map(|(key, _)| Guess::Twice(key));
    twice.into_iter().chain(record.rounded.map(Guess::Rounded)).for_each(|guess| records.guess(place, guess));
}

/// Takes a value as the record it is, or as those that it holds column by column.
fn add(name: &str, value: Value, place: &dyn Fn() -> String, records: &mut Records) {
    let held = value.as_object().and_then(columns::records);
    match held {
        Some((how, Ok(rows))) => {
            let note = format!("{name} holds its records {how} and was read as such");
            if !records.notes.contains(&note) {
                records.notes.push(note);
            }
            for (index, row) in rows.into_iter().enumerate() {
                add(name, row, &|| format!("{}, row {}", place(), index + 1), records);
            }
        }
        Some((_, Err(problem))) => records.add(place, Err(problem)),
        None => records.add(place, Ok(value)),
    }
}
