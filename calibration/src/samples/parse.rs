//! Text files and JSON records into documents.

use serde_json::{Map, Value};

use super::{Document, Message, SampleError, Text, sha256_hex};

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
    Text { name: name.to_owned(), sha256, documents }
}

/// Documents of a JSON-lines text, one record a line; blank lines are skipped, unknown keys ignored.
///
/// A record is one of `{"text"}`, `{"prompt", "completion"}`, `{"instruction", "output"}` (with `"input"`; `"response"`
/// stands for `"output"`), `{"question", "answer"}`, `{"messages": [{"role", "content"}]}` or
/// `{"conversations": [{"from", "value"}]}`. Anything else is an error with the file and the line.
pub fn parse_jsonl(name: &str, text: &str) -> Result<Text, SampleError> {
    let mut documents = Vec::new();
    for (index, line) in text.strip_prefix('\u{feff}').unwrap_or(text).lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let place = || format!("line {}", index + 1);
        let record: Value = serde_json::from_str(line).map_err(|e| {
            bad(name, place(), format!("not JSON ({}); each line must be one JSON object", json_words(&e)))
        })?;
        documents.push(document(&record).map_err(|problem| bad(name, place(), problem))?);
    }
    finish(name, text, documents)
}

/// Documents of a JSON text: an array of the records that [`parse_jsonl`] reads, or a single one.
pub fn parse_json(name: &str, text: &str) -> Result<Text, SampleError> {
    let value: Value = serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(text)).map_err(|e| {
        bad(name, format!("line {}, column {}", e.line(), e.column()), format!("not JSON ({})", json_words(&e)))
    })?;
    let records = match value {
        Value::Array(records) => records,
        other => vec![other],
    };
    let documents = records
        .iter()
        .enumerate()
        .map(|(index, record)| document(record).map_err(|e| bad(name, format!("record {}", index + 1), e)))
        .collect::<Result<Vec<_>, _>>()?;
    finish(name, text, documents)
}

fn finish(name: &str, text: &str, mut documents: Vec<Document>) -> Result<Text, SampleError> {
    documents.retain(|document| match document {
        Document::Plain(text) => !text.trim().is_empty(),
        Document::Chat(messages) => !messages.is_empty(),
        Document::Pair { prompt, completion } => !(prompt.trim().is_empty() && completion.trim().is_empty()),
    });
    if documents.is_empty() {
        return Err(SampleError::Empty { name: name.to_owned() });
    }
    Ok(Text { name: name.to_owned(), sha256: sha256_hex(text), documents })
}

fn bad(name: &str, place: String, problem: String) -> SampleError {
    SampleError::Record { name: name.to_owned(), place, problem }
}

/// serde_json's message without its own " at line 1 column 5", which counts within one record.
fn json_words(error: &serde_json::Error) -> String {
    let words = error.to_string();
    words.split(" at line ").next().unwrap_or_default().to_owned()
}

fn document(record: &Value) -> Result<Document, String> {
    let Value::Object(fields) = record else {
        return Err(format!("expected a JSON object, found {}", kind(record)));
    };
    if let Some(text) = fields.get("text") {
        return Ok(Document::Plain(string("text", text)?));
    }
    for key in ["messages", "conversations", "conversation"] {
        if let Some(list) = fields.get(key) {
            let Value::Array(list) = list else {
                return Err(format!("`{key}` must be a list of messages, found {}", kind(list)));
            };
            let messages = list
                .iter()
                .enumerate()
                .map(|(index, turn)| message(turn).map_err(|problem| format!("`{key}[{index}]`: {problem}")));
            return Ok(Document::Chat(messages.collect::<Result<_, _>>()?));
        }
    }
    let pair = |prompt: &str, completion: &str| -> Result<Option<(String, String)>, String> {
        match (fields.get(prompt), fields.get(completion)) {
            (Some(p), Some(c)) => Ok(Some((string(prompt, p)?, string(completion, c)?))),
            _ => Ok(None),
        }
    };
    if let Some((prompt, completion)) = match pair("prompt", "completion")? {
        Some(found) => Some(found),
        None => pair("question", "answer")?,
    } {
        return Ok(Document::Pair { prompt, completion });
    }
    if let Some((mut prompt, completion)) = match pair("instruction", "output")? {
        Some(found) => Some(found),
        None => pair("instruction", "response")?,
    } {
        if let Some(input) = fields.get("input") {
            let input = string("input", input)?;
            if !input.is_empty() {
                prompt = format!("{prompt}\n\n{input}");
            }
        }
        return Ok(Document::Pair { prompt, completion });
    }
    let keys: Vec<&str> = fields.keys().take(8).map(String::as_str).collect();
    Err(format!(
        "expected `text`, `messages`, `conversations`, or `prompt` with `completion`; found {}",
        if keys.is_empty() { "no key at all".to_owned() } else { format!("`{}`", keys.join("`, `")) }
    ))
}

pub(super) fn message(turn: &Value) -> Result<Message, String> {
    let Value::Object(fields) = turn else {
        return Err(format!("expected an object with `role` and `content`, found {}", kind(turn)));
    };
    let mut extra: Map<String, Value> = fields.clone();
    // `from`/`value` is the ShareGPT spelling, with role names of its own.
    let (role, content) = if fields.contains_key("role") {
        (string("role", &fields["role"])?, extra.shift_remove("content"))
    } else if fields.contains_key("from") {
        let role = string("from", &fields["from"])?;
        let role = match role.as_str() {
            "human" | "user" => "user",
            "gpt" | "chatgpt" | "bing" | "bard" | "model" | "assistant" => "assistant",
            other => other,
        };
        (role.to_owned(), extra.shift_remove("value"))
    } else {
        return Err("expected `role` and `content`, or `from` and `value`".to_owned());
    };
    extra.shift_remove("role");
    extra.shift_remove("from");
    let content = match content {
        Some(Value::String(text)) => text,
        // A turn that only calls tools.
        Some(Value::Null) => String::new(),
        None if extra.contains_key("tool_calls") => String::new(),
        Some(Value::Array(parts)) => {
            parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect::<Vec<_>>().concat()
        }
        Some(other) => return Err(format!("the content must be a string, found {}", kind(&other))),
        None => return Err(format!("a turn of `{role}` without content")),
    };
    Ok(Message { role, content, extra })
}

fn string(key: &str, value: &Value) -> Result<String, String> {
    value.as_str().map(str::to_owned).ok_or_else(|| format!("`{key}` must be a string, found {}", kind(value)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> Document {
        Document::Plain(text.to_owned())
    }

    #[test]
    fn txt_is_one_document_byte_for_byte() {
        let text = parse_txt("a.txt", " \n = Title = \r\n\r\nbody\n");
        assert_eq!(text.documents, [plain(" \n = Title = \r\n\r\nbody\n")]);
        assert_eq!(text.plain().unwrap(), " \n = Title = \r\n\r\nbody\n");
        assert!(parse_txt("a.txt", " \n\n").documents.is_empty());
    }

    #[test]
    fn txt_splits_at_separator_lines_only() {
        let text = parse_txt("a.txt", "one\n<|document|>\n\ntwo <|document|>\n<|document|>\r\n<|document|>\nthree\n");
        assert_eq!(text.documents, [plain("one"), plain("\ntwo <|document|>"), plain("three\n")]);
        let windows = parse_txt("a.txt", "one\r\n<|document|>\r\ntwo");
        assert_eq!(windows.documents, [plain("one"), plain("two")]);
    }

    #[test]
    fn jsonl_reads_every_form() {
        let lines = r#"{"text": "t", "meta": {"x": 1}}

{"prompt": "p", "completion": "c"}
{"messages": [{"role": "user", "content": "hi", "name": "bob"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}
{"instruction": "i", "input": "in", "output": "o"}
{"question": "q", "answer": "a"}
{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]}
"#;
        let text = parse_jsonl("a.jsonl", lines).unwrap();
        let mut named = Message::new("user", "hi");
        named.extra.insert("name".to_owned(), "bob".into());
        let mut call = Message::new("assistant", "");
        call.extra.insert("tool_calls".to_owned(), serde_json::json!([{"name": "f"}]));
        let pair = |p: &str, c: &str| Document::Pair { prompt: p.to_owned(), completion: c.to_owned() };
        assert_eq!(
            text.documents,
            [
                plain("t"),
                pair("p", "c"),
                Document::Chat(vec![named, Message::new("assistant", "ab")]),
                Document::Chat(vec![
                    Message::new("system", "s"),
                    Message::new("user", "q"),
                    Message::new("assistant", "r")
                ]),
                pair("i\n\nin", "o"),
                pair("q", "a"),
                Document::Chat(vec![call]),
            ]
        );
        assert_eq!(text.plain(), None);
    }

    #[test]
    fn jsonl_errors_name_file_and_line() {
        let cases = [
            ("{\"text\": \"a\"}\n{\"text\": ", "a.jsonl, line 2: not JSON (EOF while parsing a value)"),
            ("\n[1]", "a.jsonl, line 2: expected a JSON object, found a list"),
            ("{\"text\": 3}", "a.jsonl, line 1: `text` must be a string, found a number"),
            ("{\"body\": \"x\"}", "a.jsonl, line 1: expected `text`, `messages`"),
            ("{}", "found no key at all"),
            ("{\"messages\": \"x\"}", "a.jsonl, line 1: `messages` must be a list of messages, found a string"),
            ("{\"messages\": [{\"content\": \"x\"}]}", "`messages[0]`: expected `role` and `content`"),
            ("{\"messages\": [{\"role\": \"user\"}]}", "`messages[0]`: a turn of `user` without content"),
            ("{\"text\": \" \"}", "a.jsonl: the text is empty"),
            ("", "a.jsonl: the text is empty"),
        ];
        for (text, expected) in cases {
            let message = parse_jsonl("a.jsonl", text).unwrap_err().to_string();
            assert!(message.contains(expected), "{text:?}: {message}");
            assert!(!message.contains('\n'));
        }
    }

    #[test]
    fn json_array_or_single_record() {
        let text = parse_json("a.json", "[{\"text\": \"a\"}, {\"text\": \"b\"}]").unwrap();
        assert_eq!(text.documents, [plain("a"), plain("b")]);
        assert_eq!(parse_json("a.json", "{\"text\": \"a\"}").unwrap().documents, [plain("a")]);
        let error = |text| parse_json("a.json", text).unwrap_err().to_string();
        assert!(error("[{\"text\": \"a\"}, 3]").starts_with("a.json, record 2: expected a JSON object"));
        assert!(error("[\n{]").starts_with("a.json, line 2, column 2: not JSON"));
        assert!(error("[]").contains("the text is empty"));
    }
}
