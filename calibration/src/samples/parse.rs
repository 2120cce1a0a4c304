//! Files into documents: running text, JSON records, and what only looks like either.

use serde_json::Value;

use super::record::{self, Record};
use super::{Document, LeftOut, SampleError, Text, parquet, sha256_hex, table};

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
    Text { name: name.to_owned(), sha256, documents, notes: Vec::new() }
}

/// Reads a file's bytes as what they are.
///
/// Parquet is known by its first bytes, tables by their ending (`.csv`, `.tsv`), JSON by its ending or by what it holds; everything
/// else is running text, byte for byte. Records that hold nothing to read are left out and counted in [`Text::notes`]. Fails where at
/// least half of them are so, and for what is no text: compressed and binary files, unknown encodings.
pub fn read(name: &str, bytes: Vec<u8>) -> Result<Text, SampleError> {
    let sha256 = sha256_hex(&bytes);
    let ending = ending(name);
    let refuse = |problem: &str| SampleError::Unread { name: name.to_owned(), problem: problem.to_owned() };
    if let Some(problem) = no_text(&bytes) {
        return Err(refuse(problem));
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
        json(name, content)?.finish(name, sha256.clone())?
    } else {
        match (looks_like_json(content), table::delimiter(&ending, content)) {
            (false, Some(delimiter)) => table::read(name, content, delimiter)?.finish(name, sha256.clone())?,
            (false, None) => parse_txt(name, &text),
            (true, _) => match json(name, content).and_then(|records| records.finish(name, sha256.clone())) {
                Ok(mut read) => {
                    read.notes
                        .push(format!("{name} holds JSON records and was read as such, whatever its name ends in"));
                    read
                }
                Err(_) if RUNNING.contains(&ending.as_str()) => {
                    let mut read = parse_txt(name, &text);
                    read.notes.push(format!(
                        "{name} begins with a JSON object, but does not hold records that are known: it was read as running text"
                    ));
                    read
                }
                Err(error) => return Err(error),
            },
        }
    };
    // Of a text in another encoding, too, it is the file's.
    read.sha256 = sha256;
    read.notes.splice(0..0, notes);
    Ok(read)
}

const JSON: &[&str] = &["json", "jsonl", "ndjson", "jsonlines"];
const PARQUET: &[&str] = &["parquet", "pq"];

/// Endings of running text, which has to stay as it is unless every sign says otherwise.
const RUNNING: &[&str] = &["txt", "raw", "md", "text", "tokens"];

/// What follows the last dot of a file's name, in lower case.
fn ending(name: &str) -> String {
    let file = name.rsplit(['/', '\\']).next().unwrap_or(name);
    file.rsplit_once('.').map_or(String::new(), |(_, ending)| ending.to_lowercase())
}

/// Whether a text begins with an object or a list of them that is whole JSON, or whose first line is.
fn looks_like_json(content: &str) -> bool {
    let start = content.trim_start();
    let object =
        start.starts_with('{') || start.strip_prefix('[').is_some_and(|rest| rest.trim_start().starts_with('{'));
    let first = start.lines().next().unwrap_or_default();
    object && (python_json(first).is_ok() || python_json(content).is_ok())
}

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

/// Records as they are read, those that hold nothing left out and counted.
#[derive(Default)]
pub(super) struct Records {
    documents: Vec<Document>,
    found: usize,
    left_out: Vec<LeftOut>,
    more_than_text: usize,
    notes: Vec<String>,
}

impl Records {
    /// Takes the record at a place such as `line 3`.
    pub fn add(&mut self, place: impl FnOnce() -> String, record: Result<Value, String>) {
        self.found += 1;
        match record.and_then(|record| record::read(&record)) {
            Ok(Record { document, more_than_text }) => {
                self.documents.push(document);
                self.more_than_text += usize::from(more_than_text);
            }
            Err(problem) => self.leave_out(place, problem),
        }
    }

    fn leave_out(&mut self, place: impl FnOnce() -> String, problem: String) {
        let reason = without_numbers(&problem);
        match self.left_out.iter_mut().find(|one| without_numbers(&one.problem) == reason) {
            Some(one) => one.count += 1,
            None => self.left_out.push(LeftOut { place: place(), problem, count: 1 }),
        }
    }

    /// The text; an error where at least half of the records are of no use, or nothing at all is left.
    pub fn finish(mut self, name: &str, sha256: String) -> Result<Text, SampleError> {
        let lost: usize = self.left_out.iter().map(|one| one.count).sum();
        if let Some(first) = self.left_out.first().filter(|_| 2 * lost >= self.found) {
            let most = self.left_out.iter().max_by_key(|one| one.count).unwrap_or(first);
            // The commonest reason is the one to mend; among equals the first.
            let told = if most.count > first.count { most } else { first };
            let of = if self.found > 1 {
                format!("; {lost} of {} records cannot be used", self.found)
            } else {
                String::new()
            };
            return Err(SampleError::Record {
                name: name.to_owned(),
                place: told.place.clone(),
                problem: format!("{}{of}", told.problem),
            });
        }
        if self.documents.iter().all(Document::is_blank) {
            return Err(SampleError::Empty { name: name.to_owned() });
        }
        if lost > 0 {
            self.notes.push(format!(
                "{lost} of {} records of {name} were left out: {}",
                self.found,
                reasons(&self.left_out)
            ));
        }
        if self.more_than_text > 0 {
            self.notes.push(format!(
                "{} of {} records of {name} hold images or other parts that are not text, which were left out",
                self.more_than_text, self.found
            ));
        }
        Ok(Text { name: name.to_owned(), sha256, documents: self.documents, notes: self.notes })
    }
}

/// The reasons for which records were left out, the commonest first, each with the first record it is true of.
fn reasons(left_out: &[LeftOut]) -> String {
    const TOLD: usize = 4;
    let mut sorted: Vec<&LeftOut> = left_out.iter().collect();
    sorted.sort_by_key(|one| std::cmp::Reverse(one.count));
    let mut told: Vec<String> = sorted
        .iter()
        .take(TOLD)
        .map(|one| match one.count {
            1 => format!("{}: {}", one.place, one.problem),
            count => format!("{count} from {} on: {}", one.place, one.problem),
        })
        .collect();
    let others: usize = sorted.iter().skip(TOLD).map(|one| one.count).sum();
    if others > 0 {
        told.push(format!("{others} for other reasons"));
    }
    told.join("; ")
}

/// A problem without the numbers in it, so that the same one at another turn counts as the same.
fn without_numbers(problem: &str) -> String {
    problem.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// Records of a JSON text: one a line, a list of them, one after the other, or such a list inside an object.
fn json(name: &str, text: &str) -> Result<Records, SampleError> {
    let mut records = Records::default();
    let whole = match python_json(text) {
        Ok(value) => {
            whole(name, value, &mut records);
            return Ok(records);
        }
        Err(error) => error,
    };
    let container = |line: &str| python_json(line).is_ok_and(|value| !value.is_number());
    let lines = || text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    // The first line may be the one that is damaged.
    if lines().count() > 1 && lines().take(2).any(|(_, line)| container(line)) {
        for (index, line) in lines() {
            let record = python_json(line)
                .map_err(|error| format!("not JSON ({}); each line must be one JSON object", json_words(&error)));
            records.add(|| format!("line {}", index + 1), record);
        }
        return Ok(records);
    }
    let stream: Result<Vec<Value>, _> = serde_json::Deserializer::from_str(text).into_iter().collect();
    match stream {
        Ok(values) => {
            for (index, value) in values.into_iter().enumerate() {
                records.add(|| format!("record {}", index + 1), Ok(value));
            }
            Ok(records)
        }
        Err(_) => Err(SampleError::Record {
            name: name.to_owned(),
            place: format!("line {}, column {}", whole.line(), whole.column()),
            problem: format!("not JSON ({})", json_words(&whole)),
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
        records.add(|| format!("record {}", index + 1), Ok(record));
    }
}

/// A JSON value as Python's `json` reads and writes it: `NaN` and `Infinity` stand for numbers, and are null here.
fn python_json(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text).or_else(|error| {
        let replaced = without_nan(text).ok_or(error)?;
        serde_json::from_str(&replaced)
    })
}

/// The text with `NaN`, `Infinity` and `-Infinity` outside of strings as `null`; `None` where there is none of them.
fn without_nan(text: &str) -> Option<String> {
    if !text.contains("NaN") && !text.contains("Infinity") {
        return None;
    }
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut found) = (text, false);
    while let Some(at) = rest.find(['"', 'N', 'I', '-']) {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let taken = if from.starts_with('"') {
            let bytes = from.as_bytes();
            let mut end = 1;
            while end < bytes.len() && bytes[end] != b'"' {
                end += if bytes[end] == b'\\' { 2 } else { 1 };
            }
            let end = (end + 1).min(from.len());
            // An escape stands before one byte of ASCII in what is JSON; elsewhere the text is refused anyway.
            let end = (end..=from.len()).find(|&end| from.is_char_boundary(end)).unwrap_or(from.len());
            out.push_str(&from[..end]);
            end
        } else if let Some(word) = ["NaN", "Infinity", "-Infinity"].iter().find(|word| from.starts_with(**word)) {
            out.push_str("null");
            found = true;
            word.len()
        } else {
            out.push_str(&from[..1]);
            1
        };
        rest = &from[taken..];
    }
    out.push_str(rest);
    found.then_some(out)
}

/// serde_json's message without its own " at line 1 column 5", which counts within one record.
fn json_words(error: &serde_json::Error) -> String {
    let words = error.to_string();
    words.split(" at line ").next().unwrap_or_default().to_owned()
}
