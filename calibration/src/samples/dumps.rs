//! `json.dumps`, which transformers' `tojson` is.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::printed::{self, Lazy, Range, View, as_float, is_object};
use super::strings::place;

/// The deepest nesting that is written.
const DEEPEST: usize = 256;

fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// `json.dumps` with the arguments that transformers passes on: `ensure_ascii`, `indent`, `separators`, `sort_keys`.
pub(super) fn tojson(value: Value, places: Rest<Value>, names: Kwargs) -> Result<Value, Error> {
    let given = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        Ok(place(&places, &names, at, name)?.filter(|value| !value.is_none()))
    };
    let ascii = given(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = given(1, "indent")?.map(|indent| match indent.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => indent
            .as_usize()
            .filter(|indent| *indent <= 64)
            .map(|indent| " ".repeat(indent))
            .ok_or_else(|| wrong(format!("tojson: an indent of {indent} is not known here"))),
    });
    let indent = indent.transpose()?;
    let separators = given(2, "separators")?
        .map(|pair| pair.try_iter().map(|items| items.map(|item| item.to_string()).collect::<Vec<_>>()));
    let separators = separators.transpose()?;
    let sort = given(3, "sort_keys")?.is_some_and(|value| value.is_true());
    names.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(wrong("tojson takes two separators")),
    };
    let style = Dumps { ascii, indent, item, key, sort };
    let mut out = String::new();
    style.write(&value, 0, &mut out)?;
    Ok(Value::from(out))
}

/// `json.dumps` as it is usual for chats: every letter as it is.
pub(super) fn dumps(value: &Value) -> Result<String, Error> {
    let style = Dumps { ascii: false, indent: None, item: ", ".to_owned(), key: ": ".to_owned(), sort: false };
    let mut out = String::new();
    style.write(value, 0, &mut out)?;
    Ok(out)
}

/// The settings of one `json.dumps`.
struct Dumps {
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort: bool,
}

impl Dumps {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(wrong(format!("tojson of a value nested more than {DEEPEST} deep")));
        }
        let is_list = match value.kind() {
            ValueKind::Seq => value.downcast_object_ref::<Range>().is_none(),
            // A slice of a list.
            ValueKind::Iterable => {
                value.downcast_object_ref::<Lazy>().is_none() && value.downcast_object_ref::<View>().is_none()
            }
            _ => false,
        };
        match value.kind() {
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => out.push_str(&plain(value)),
            ValueKind::Map if !is_object(value) => {
                let mut fields = Vec::with_capacity(value.len().unwrap_or_default());
                for key in value.try_iter()? {
                    let field = value.get_item(&key)?;
                    fields.push((key, field));
                }
                if fields.is_empty() {
                    out.push_str("{}");
                    return Ok(());
                }
                if self.sort {
                    if fields.iter().any(|(key, _)| key.as_str().is_none()) {
                        return Err(wrong("tojson: only strings are sorted as keys here"));
                    }
                    fields.sort_by(|(a, _), (b, _)| a.as_str().cmp(&b.as_str()));
                }
                out.push('{');
                for (index, (key, value)) in fields.iter().enumerate() {
                    self.between(index, depth + 1, out);
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default(), out),
                        ValueKind::None | ValueKind::Bool | ValueKind::Number => self.string(&plain(key), out),
                        kind => return Err(wrong(format!("tojson: keys are no {kind}"))),
                    }
                    out.push_str(&self.key);
                    self.write(value, depth + 1, out)?;
                }
                self.line(depth, out);
                out.push('}');
            }
            _ if is_list => {
                let before = out.len();
                out.push('[');
                for (index, item) in value.try_iter()?.enumerate() {
                    self.between(index, depth + 1, out);
                    self.write(&item, depth + 1, out)?;
                }
                if out.len() > before + 1 {
                    self.line(depth, out);
                }
                out.push(']');
            }
            kind => return Err(wrong(format!("tojson cannot write this value: a {kind} is no JSON"))),
        }
        Ok(())
    }

    fn between(&self, index: usize, depth: usize, out: &mut String) {
        if index > 0 {
            out.push_str(&self.item);
        }
        self.line(depth, out);
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        // The escapes of serde_json and of Python are the same where non-ASCII is left alone.
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ascii {
            out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                let mut units = [0u16; 2];
                out.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
            }
        }
    }
}

/// A number, a boolean or none.
fn plain(value: &Value) -> String {
    match as_float(value) {
        Some(number) if number.is_nan() => "NaN".to_owned(),
        Some(number) if number.is_infinite() => if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        Some(number) => printed::float(number),
        None if value.is_none() => "null".to_owned(),
        None if value.kind() == ValueKind::Bool => if value.is_true() { "true" } else { "false" }.to_owned(),
        None => value.to_string(),
    }
}
