//! JSON that holds records column by column, or under their numbers, as pandas and datasets write them.

use serde_json::{Map, Value};

use super::media::is_media;
use super::record::{self, are_turns, is_content, is_conversation, is_known};

/// How an object holds its records, and the records; `None` where it is a record itself or something else.
///
/// The forms are those of pandas: `list` (also `to_dict` of datasets), `dict`, `split` and `index`. Fails where columns differ in length.
pub(super) fn records(fields: &Map<String, Value>) -> Option<(&'static str, Result<Vec<Value>, String>)> {
    let columns = split(fields).or_else(|| indexed(fields)).map(Ok).or_else(|| lists(fields));
    let columns = columns.map(|rows| ("column by column", rows));
    columns.or_else(|| Some(("under a name each", Ok(numbered(fields)?))))
}

/// `{"columns": ["text", …], "data": [["a", …], …]}`
fn split(fields: &Map<String, Value>) -> Option<Vec<Value>> {
    let columns: Option<Vec<&str>> = fields.get("columns")?.as_array()?.iter().map(Value::as_str).collect();
    let (columns, rows) = (columns?, fields.get("data")?.as_array()?);
    let row = |row: &Value| {
        let row = row.as_array().filter(|row| row.len() == columns.len())?;
        Some(Value::Object(columns.iter().map(|column| (*column).to_owned()).zip(row.iter().cloned()).collect()))
    };
    columns.iter().any(|column| is_content(column)).then(|| rows.iter().map(row).collect())?
}

/// `{"0": {"text": "a"}, "1": {"text": "b"}}`, whatever the keys are.
fn numbered(fields: &Map<String, Value>) -> Option<Vec<Value>> {
    let one = |(key, value): (&String, &Value)| {
        !is_known(key) && value.as_object().is_some_and(|fields| fields.keys().any(|key| is_content(key)))
    };
    let wrapped = fields.len() == 1 && fields.keys().any(|key| record::WRAPPERS.contains(&key.as_str()));
    let all = !fields.is_empty() && !wrapped && fields.iter().all(one);
    all.then(|| fields.values().cloned().collect())
}

/// `{"text": ["a", "b"], "id": [1, 2]}`
fn lists(fields: &Map<String, Value>) -> Option<Result<Vec<Value>, String>> {
    let is_column = |(key, value): (&String, &Value)| {
        let Some(items) = value.as_array() else { return false };
        let cell = |item: &Value| match item {
            Value::Null => true,
            // Bare texts of two people are one conversation, and texts of other lists are not JSON.
            Value::String(text) if is_conversation(key) => text.trim_start().starts_with("[{"),
            Value::String(_) => true,
            Value::Array(_) if is_conversation(key) => true,
            Value::Array(turns) => key != "text" && are_turns(turns),
            _ => false,
        };
        is_content(key) && !items.is_empty() && items.iter().all(cell)
    };
    let (first, _) = fields.iter().find(|(key, value)| is_column((key, value)))?;
    let known: Vec<(&String, &Value)> = fields.iter().filter(|(key, _)| record::is_told(key)).collect();
    if known.iter().any(|(key, value)| is_content(key) && !value.is_array() && !value.is_null()) {
        return None;
    }
    let length = |value: &Value| value.as_array().map(Vec::len);
    let rows = length(&fields[first])?;
    if let Some((key, other)) = known
        .iter()
        .filter(|(key, _)| !is_media(key))
        .find_map(|(key, value)| Some((key, length(value).filter(|other| *other != rows)?)))
    {
        return Some(Err(format!(
            "`{first}` is a list of {rows} and `{key}` one of {other}, and columns are of equal length"
        )));
    }
    let row = |index: usize| {
        let cell =
            |value: &Value| value.as_array().map_or(value, |items| items.get(index).unwrap_or(&Value::Null)).clone();
        Value::Object(known.iter().map(|(key, value)| ((*key).clone(), cell(value))).collect())
    };
    Some(Ok((0..rows).map(row).collect()))
}

/// `{"text": {"0": "a", "1": "b"}, "id": {"0": 1, "1": 2}}`
fn indexed(fields: &Map<String, Value>) -> Option<Vec<Value>> {
    let is_column = |value: &Value| {
        let numbers = |key: &String| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
        value.as_object().is_some_and(|column| !column.is_empty() && column.keys().all(numbers))
    };
    let (_, first) = fields.iter().find(|(key, value)| is_content(key) && is_column(value))?;
    let row = |index: &String| {
        let cells = fields.iter().filter_map(|(key, column)| Some((key.clone(), column.get(index)?.clone())));
        Value::Object(cells.collect())
    };
    Some(first.as_object()?.keys().map(row).collect())
}
