//! JSON as Python's `json` reads and writes it.
//!
//! `NaN` and `Infinity` stand for numbers, and are null here; a string may hold half a surrogate pair, in whose place [`HALF`] stands
//! here; of two equal keys the last counts; integers are of any size, and floats here beyond 64 bits.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// What half a surrogate pair becomes. No text has it: its ends are no characters of Unicode's.
pub(super) const HALF: &str = "\u{FDD0}half\u{FDD1}";

/// A value, and what is otherwise in Python or easily missed.
#[derive(Debug, PartialEq)]
pub(super) struct Python {
    pub value: Value,
    /// The first key that an object has twice, and how many objects have one.
    pub twice: Option<(String, usize)>,
    /// The first integer that became a float.
    pub rounded: Option<String>,
}

impl Python {
    pub fn read(text: &str) -> Result<Python, serde_json::Error> {
        let mut found: Python = serde_json::from_str(text).or_else(|error| {
            let replaced = in_json(text).ok_or(error)?;
            serde_json::from_str(&replaced)
        })?;
        // Only the text says whether an integer was written.
        found.rounded = found
            .rounded
            .and_then(|_| tokens(text).map(|(_, token)| token).find(|token| is_beyond(token)))
            .map(str::to_owned);
        Ok(found)
    }
}

/// The value alone.
pub(super) fn python_json(text: &str) -> Result<Value, serde_json::Error> {
    Python::read(text).map(|read| read.value)
}

impl<'de> serde::Deserialize<'de> for Python {
    /// `rounded` is any float beyond 64 bits.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Python, D::Error> {
        let mut read = Python { value: Value::Null, twice: None, rounded: None };
        read.value = Reading(&mut read).deserialize(deserializer)?;
        Ok(read)
    }
}

struct Reading<'a>(&'a mut Python);

impl<'de> DeserializeSeed<'de> for Reading<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reading<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any valid JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        if value.abs() >= (1u64 << 63) as f64 && self.0.rounded.is_none() {
            self.0.rounded = Some(value.to_string());
        }
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Reading(&mut *self.0))? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        let mut twice = None;
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(Reading(&mut *self.0))?;
            if fields.insert(key.clone(), value).is_some() && twice.is_none() {
                twice = Some(key);
            }
        }
        if let Some(key) = twice {
            match &mut self.0.twice {
                Some((_, count)) => *count += 1,
                None => self.0.twice = Some((key, 1)),
            }
        }
        Ok(fields.into())
    }
}

/// Strings, numbers and words of a text with the place of each.
fn tokens(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let bytes = text.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        let begins = |byte: &u8| *byte == b'"' || *byte == b'-' || byte.is_ascii_alphanumeric();
        let start = at + bytes[at..].iter().position(begins)?;
        at = match bytes[start] {
            b'"' => {
                let mut end = start + 1;
                while end < bytes.len() && bytes[end] != b'"' {
                    end += if bytes[end] == b'\\' { 2 } else { 1 };
                }
                let end = (end + 1).min(bytes.len());
                // An escape stands before one byte of ASCII in what is JSON; elsewhere the text is refused anyway.
                (end..=bytes.len()).find(|&end| text.is_char_boundary(end)).unwrap_or(bytes.len())
            }
            _ => {
                let inside = |byte: &&u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
                start + 1 + bytes[start + 1..].iter().take_while(inside).count()
            }
        };
        Some((start, &text[start..at]))
    })
}

/// The text with what only Python reads in another form; `None` where there is no such thing.
fn in_json(text: &str) -> Option<String> {
    if !["NaN", "Infinity", "\\ud", "\\uD"].iter().any(|word| text.contains(word)) {
        return None;
    }
    let mut out = String::new();
    let mut copied = 0;
    for (at, token) in tokens(text) {
        let other = match token {
            "NaN" | "Infinity" | "-Infinity" => Some("null".to_owned()),
            _ if token.starts_with('"') => without_halves(token),
            _ => None,
        };
        if let Some(other) = other {
            out.push_str(&text[copied..at]);
            out.push_str(&other);
            copied = at + token.len();
        }
    }
    out.push_str(&text[copied..]);
    (copied > 0).then_some(out)
}

/// A string with [`HALF`] in place of each escaped half of a surrogate pair; `None` where there is none.
fn without_halves(token: &str) -> Option<String> {
    let unit = |at: usize| {
        let hex = token.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(hex, 16).ok()
    };
    let bytes = token.as_bytes();
    let (mut out, mut copied, mut at) = (String::new(), 0, 0);
    while at < bytes.len() {
        if bytes[at] != b'\\' {
            at += 1;
            continue;
        }
        let paired = unit(at + 6).is_some_and(|next| (0xDC00..0xE000).contains(&next));
        at += match unit(at) {
            Some(0xD800..0xDC00) if paired => 12,
            Some(0xD800..0xE000) => {
                out.push_str(&token[copied..at]);
                out.push_str(HALF);
                copied = at + 6;
                6
            }
            Some(_) => 6,
            None => 2,
        };
    }
    out.push_str(token.get(copied..).unwrap_or_default());
    (copied > 0).then_some(out)
}

/// Whether a number is an integer that neither 64 bits with a sign nor without hold.
fn is_beyond(token: &str) -> bool {
    let digits = token.strip_prefix('-').unwrap_or(token);
    let whole = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    whole && token.parse::<u64>().is_err() && token.parse::<i64>().is_err()
}

/// serde_json's message without its own " at line 1 column 5", which counts within one record.
pub(super) fn json_words(error: &serde_json::Error) -> String {
    let words = error.to_string();
    words.split(" at line ").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_only_python_reads_is_read() {
        let text = r#"{"a": [NaN, -Infinity, "NaN \" Infinity"], "b": "x\ud800y\ud83d\ude00", "\udc00": 1, "c": "\\ud800", "é": "\é"}"#;
        assert!(Python::read(text).is_err(), "an escape that JSON has not");
        let read = python_json(&text.replace(r"\é", "é")).unwrap();
        let half = |before: &str, after: &str| format!("{before}{HALF}{after}");
        assert_eq!(
            read,
            json!({"a": [null, null, "NaN \" Infinity"], "b": half("x", "y😀"), half("", ""): 1, "c": "\\ud800", "é": "é"})
        );
        for text in ["NaNs", "[-NaN]", "[+Infinity]", "{NaN: 1}", r#"["\ud800"#, r#"["\ud80"]"#] {
            assert!(python_json(text).is_err(), "{text}");
        }
    }

    #[test]
    fn keys_that_are_there_twice_are_counted_and_the_last_counts() {
        let read = Python::read(r#"[{"a": 1, "b": 2, "a": 3, "a": 4}, {"c": {"d": 1, "d": 2}}, {"a": 1}]"#).unwrap();
        assert_eq!(read.value, json!([{"a": 4, "b": 2}, {"c": {"d": 2}}, {"a": 1}]));
        assert_eq!(read.twice, Some(("a".to_owned(), 2)));
        assert_eq!(Python::read(r#"{"a": {"b": 1}, "b": "a"}"#).unwrap().twice, None);
    }

    #[test]
    fn integers_that_are_rounded_are_told() {
        let rounded = |text: &str| Python::read(text).unwrap().rounded;
        assert_eq!(
            rounded(r#"{"a": "18446744073709551616", "b": [-9223372036854775809, 1e99]}"#).unwrap(),
            "-9223372036854775809"
        );
        assert_eq!(rounded("[18446744073709551615, -9223372036854775808, 1e30, 18446744073709551616.0, 0.1]"), None);
    }

    #[test]
    fn values_are_those_of_serde_json() {
        for text in [r#"{"a":[1,-2,0.5,"é\n",null,true,{}],"b":{"c":[[],[{}]]}}"#, "[]", "3", r#""x""#, "1e22"] {
            assert_eq!(python_json(text).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        }
        let deep = "[".repeat(500) + &"]".repeat(500);
        assert!(python_json(&deep).is_err(), "no deeper than the parser goes");
    }
}
