//! JSON as Python reads and writes it.
//!
//! The files of a model are Python's. Its json module writes `Infinity` and `NaN`, integers of any size and halves of
//! surrogate pairs, which a [`Value`] cannot hold. Each stands in the value as an object with the one key [`VERBATIM`]
//! and its text, so that [`pretty`] writes it as it was read.

use std::borrow::Cow;
use std::path::Path;

use formats::container::file;
use formats::container::stand_in::stand_in;
use serde_json::{Map, Value};

use crate::error::Error;

/// The key under which the text of a token stands that JSON has no value for.
const VERBATIM: &str = "\u{0}verbatim";

/// The key under which transformers 5 writes numbers that JSON has no token for: `{"__float__": "Infinity"}`.
const TAGGED: &str = "__float__";

/// A file of JSON, or `None` when there is no such file. Fails for what takes the place of one that was not fetched.
pub fn read_json(path: &Path) -> crate::error::Result<Option<Value>> {
    match file::read(path, file::DESCRIPTION) {
        Ok(bytes) => {
            let failed = |why: String| Error::failed(format!("{}: {why}", path.display()));
            stand_in(&bytes).map_or(Ok(()), |why| Err(failed(why.to_string())))?;
            parse(&bytes).map(Some).map_err(failed)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, "read")(e)),
    }
}

/// Parses a file. Fails, with what is wrong in words, for what Python refuses too, and for keys with half a surrogate pair.
pub fn parse(bytes: &[u8]) -> Result<Value, String> {
    file::misencoded(bytes).map_or(Ok(()), |why| Err(why.to_owned()))?;
    let plain = replace(bytes, |token| {
        let text = serde_json::to_string(token).expect("a string");
        Some(format!("{{{}:{text}}}", serde_json::to_string(VERBATIM).expect("a string")))
    })?;
    serde_json::from_slice(&plain).map_err(|error| match plain {
        // Columns are those of the file only where nothing was replaced.
        Cow::Owned(_) => format!("not valid JSON in line {}", error.line()),
        Cow::Borrowed(_) => format!("not valid JSON: {error}"),
    })
}

/// The text of a value, in two-space indentation as `serde_json` writes it.
pub fn pretty(value: &Value) -> Vec<u8> {
    let mut out = String::new();
    write(value, 0, &mut out);
    out.into_bytes()
}

fn write(value: &Value, depth: usize, out: &mut String) {
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", depth));
    };
    let mut rows = |open: char, close: char, rows: &mut dyn Iterator<Item = (Option<&String>, &Value)>| {
        out.push(open);
        let mut any = false;
        for (key, value) in rows {
            out.extend(any.then_some(','));
            any = true;
            line(out, depth + 1);
            if let Some(key) = key {
                out.push_str(&serde_json::to_string(key).expect("a string"));
                out.push_str(": ");
            }
            write(value, depth + 1, out);
        }
        if any {
            line(out, depth);
        }
        out.push(close);
    };
    match value {
        Value::Object(object) => match verbatim(object) {
            Some(text) => out.push_str(text),
            None => rows('{', '}', &mut object.iter().map(|(key, value)| (Some(key), value))),
        },
        Value::Array(list) => rows('[', ']', &mut list.iter().map(|value| (None, value))),
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// A value as it stands in the file, for messages.
pub fn shown(value: &Value) -> String {
    match value {
        Value::Object(object) => match verbatim(object).or(tagged(object)) {
            Some(text) => text.to_owned(),
            None => value.to_string(),
        },
        other => other.to_string(),
    }
}

/// The real number that a value is: a JSON number, or one of those that only Python or transformers write.
pub fn real(value: &Value) -> Option<f64> {
    let Value::Object(object) = value else { return value.as_f64() };
    match verbatim(object).or(tagged(object))? {
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        "NaN" => Some(f64::NAN),
        digits => digits.parse().ok(),
    }
}

/// The whole number that a value is; to Python, 4096.0 and 4096 are equal.
pub fn integer(value: &Value) -> Option<i64> {
    const EXACT: f64 = (1u64 << 53) as f64;
    let whole = |x: &f64| x.fract() == 0.0 && x.abs() <= EXACT;
    value.as_i64().or_else(|| value.as_f64().filter(whole).map(|x| x as i64))
}

fn only<'v>(object: &'v Map<String, Value>, key: &str) -> Option<&'v str> {
    object.get(key).filter(|_| object.len() == 1)?.as_str()
}

fn verbatim(object: &Map<String, Value>) -> Option<&str> {
    only(object, VERBATIM)
}

fn tagged(object: &Map<String, Value>) -> Option<&str> {
    only(object, TAGGED).filter(|name| ["Infinity", "-Infinity", "NaN"].contains(name))
}

/// The text with each token that a [`Value`] cannot hold in another form, where `form` gives one.
fn replace(bytes: &[u8], form: impl Fn(&str) -> Option<String>) -> Result<Cow<'_, [u8]>, String> {
    let mut out: Vec<u8> = Vec::new();
    let (mut copied, mut at) = (0, 0);
    while at < bytes.len() {
        let end = match bytes[at] {
            b'"' => string_end(bytes, at),
            b'-' | b'0'..=b'9' | b'I' | b'N' => {
                let rest = bytes[at + 1..].iter();
                at + 1 + rest.take_while(|b| b.is_ascii_alphanumeric() || b"+-.".contains(b)).count()
            }
            _ => {
                at += 1;
                continue;
            }
        };
        let token = &bytes[at..end];
        if let Ok(text) = std::str::from_utf8(token)
            && (if token[0] == b'"' { halves(token) } else { beyond(text) })
        {
            let is_key = bytes[end..].iter().find(|b| !b.is_ascii_whitespace()) == Some(&b':');
            if token[0] == b'"' && is_key {
                return Err(format!("the key {text} has half a surrogate pair in it; rename it"));
            }
            if let Some(other) = form(text) {
                out.extend_from_slice(&bytes[copied..at]);
                out.extend_from_slice(other.as_bytes());
                copied = end;
            }
        }
        at = end;
    }
    if copied == 0 {
        return Ok(Cow::Borrowed(bytes));
    }
    out.extend_from_slice(&bytes[copied..]);
    Ok(Cow::Owned(out))
}

/// Where a string ends that begins at `start`.
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

/// Whether a number is one of Python's that JSON has not, or beyond what a [`Value`] keeps.
fn beyond(token: &str) -> bool {
    if ["Infinity", "-Infinity", "NaN"].contains(&token) {
        return true;
    }
    let unsigned = token.strip_prefix('-').unwrap_or(token);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if digits(unsigned) {
        let kept = token.parse::<u64>().is_ok() || token.parse::<i64>().is_ok();
        return !kept && !unsigned.starts_with('0');
    }
    // Python reads what is too large as infinity.
    let (mantissa, exponent) = unsigned.split_once(['e', 'E']).unwrap_or((unsigned, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, "0"));
    let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    digits(whole)
        && (whole == "0" || !whole.starts_with('0'))
        && digits(fraction)
        && digits(exponent)
        && token.parse::<f64>().is_ok_and(f64::is_infinite)
}

/// The escapes `\uXXXX` of a string: where each begins, and its unit of UTF-16.
fn units(token: &[u8]) -> impl Iterator<Item = (usize, u16)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        while at + 1 < token.len() {
            let here = at;
            at += if token[here] == b'\\' { 2 } else { 1 };
            if token[here] != b'\\' || token[here + 1] != b'u' {
                continue;
            }
            let hex = token.get(here + 2..here + 6).and_then(|hex| std::str::from_utf8(hex).ok());
            if let Some(unit) = hex.and_then(|hex| u16::from_str_radix(hex, 16).ok()) {
                at = here + 6;
                return Some((here, unit));
            }
        }
        None
    })
}

/// Where half a surrogate pair is escaped in a string.
fn lone(token: &[u8]) -> Vec<usize> {
    let units: Vec<(usize, u16)> = units(token).collect();
    let (high, low) = (0xD800..0xDC00, 0xDC00..0xE000);
    let pairs = |i: usize| {
        i + 1 < units.len()
            && high.contains(&units[i].1)
            && low.contains(&units[i + 1].1)
            && units[i].0 + 6 == units[i + 1].0
    };
    let half = |i: &usize| {
        let unit = units[*i].1;
        high.contains(&unit) && !pairs(*i) || low.contains(&unit) && !(*i > 0 && pairs(*i - 1))
    };
    (0..units.len()).filter(half).map(|i| units[i].0).collect()
}

fn halves(token: &[u8]) -> bool {
    token.windows(3).any(|w| matches!(w, [b'\\', b'u', b'd' | b'D'])) && !lone(token).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_python_writes_is_read_and_written_back() {
        let text = r#"{
  "a": Infinity,
  "b": [
    -Infinity,
    NaN,
    1000000000000000019884624838656,
    -9223372036854775809,
    1e999
  ],
  "c": "x\ud800y",
  "d": {
    "__float__": "Infinity"
  },
  "e": 4096.0,
  "f": [],
  "g": {},
  "h": "\ud83d\ude00 NaN 1e999",
  "i": 18446744073709551615
}"#;
        let value = parse(text.as_bytes()).unwrap();
        let again = String::from_utf8(pretty(&value)).unwrap();
        assert_eq!(again, text.replace(r"\ud83d\ude00", "😀"));
        let of = |key: &str| real(&value[key]);
        assert_eq!(
            (of("a"), of("d"), of("e"), of("h")),
            (Some(f64::INFINITY), Some(f64::INFINITY), Some(4096.0), None)
        );
        let list: Vec<f64> = value["b"].as_array().unwrap().iter().map(|x| real(x).unwrap()).collect();
        assert!(list[1].is_nan());
        assert_eq!([list[0], list[2], list[4]], [f64::NEG_INFINITY, 1e30, f64::INFINITY]);
        assert_eq!(value["i"], serde_json::json!(u64::MAX));
        assert_eq!(shown(&value["a"]), "Infinity");
        assert_eq!(shown(&value["d"]), "Infinity");
    }

    #[test]
    fn plain_files_are_written_as_serde_writes_them() {
        for text in [r#"{"a":[1,-0.5,"é\n",null,true,{}],"b":{"c":[[],[{}]]}}"#, "[]", "3", r#""x""#] {
            let value = parse(text.as_bytes()).unwrap();
            assert_eq!(pretty(&value), serde_json::to_vec_pretty(&value).unwrap());
        }
    }

    #[test]
    fn the_last_of_two_equal_keys_counts() {
        assert_eq!(parse(br#"{"a": 1, "b": 2, "a": 3}"#).unwrap(), serde_json::json!({"a": 3, "b": 2}));
    }

    #[test]
    fn what_python_refuses_is_refused() {
        let wrong = |bytes: &[u8], why: &str| {
            let found = parse(bytes).unwrap_err();
            assert!(found.contains(why), "{found}");
        };
        wrong(b"\xEF\xBB\xBF{}", "byte order mark");
        wrong(b"\xFF\xFE{\0}\0", "UTF-16");
        wrong(b"{\"a\": 1} // done", "not valid JSON");
        wrong(b"{\"a\": 1,}", "not valid JSON");
        for token in ["NaNs", "+Infinity", "-NaN", "inf", "-inf", "00000000000000000000001", "1.e999", "01e999", "'a'"]
        {
            wrong(format!("[{token}]").as_bytes(), "not valid JSON");
        }
        wrong(b"{NaN: 1}", "not valid JSON in line 1");
        wrong(br#"{"\udc00": 1}"#, "half a surrogate pair");
        wrong(b"[\"\xFF\"]", "not valid JSON");
        wrong(br#"["\ud800"#, "not valid JSON");
        wrong(br#"["\u"#, "not valid JSON");
        wrong(br#"["\"#, "not valid JSON");
    }

    #[test]
    fn a_whole_real_is_an_integer() {
        let found: Vec<Option<i64>> = ["4096.0", "4096", "-1", "0.5", "1e3", "Infinity", "true", "\"1\"", "1e17"]
            .map(|text| integer(&parse(text.as_bytes()).unwrap()))
            .to_vec();
        assert_eq!(found, [Some(4096), Some(4096), Some(-1), None, Some(1000), None, None, None, None]);
    }
}
