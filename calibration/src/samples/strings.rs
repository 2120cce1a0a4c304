//! Methods of Python's `str` of which minijinja-contrib has none, or others.

use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind};

use super::printed;

fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// What Python takes for white space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `str.strip` of white space.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// The value of `text.method(args)`; `None` for a method that is not here. Fails as Python does, and where Python's answer is not known.
pub(super) fn method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let value = match method {
        "partition" | "rpartition" => partition(text, method, args)?,
        "startswith" | "endswith" => affix(text, method, args)?,
        "find" | "rfind" | "index" | "rindex" => find(text, method, args)?,
        "count" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            Value::from(within(text, start, end).map_or(0, |(_, within)| within.matches(what).count()))
        }
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let is = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            Value::from(match method {
                "strip" => text.trim_matches(is),
                "lstrip" => text.trim_start_matches(is),
                _ => text.trim_end_matches(is),
            })
        }
        "split" => split(text, args)?,
        "splitlines" => {
            let (places, names): (&[Value], Kwargs) = from_args(args)?;
            let keep = place(places, &names, 0, "keepends")?.is_some_and(|keep| keep.is_true());
            names.assert_all_used()?;
            lines(text, keep).into_iter().map(Value::from).collect()
        }
        "title" => titled(text, args)?,
        "capitalize" => {
            let () = from_args(args)?;
            let mut chars = text.chars();
            let first = chars.next().map(title).transpose()?;
            Value::from(first.into_iter().collect::<String>() + &chars.as_str().to_lowercase())
        }
        "casefold" => {
            let () = from_args(args)?;
            match text.is_ascii() {
                true => Value::from(text.to_ascii_lowercase()),
                false => return Err(wrong("casefold of letters beyond ASCII is not known here")),
            }
        }
        "expandtabs" => expand_tabs(text, args)?,
        "join" => join(text, args)?,
        "format" => {
            let (places, names): (&[Value], Kwargs) = from_args(args)?;
            let named = names.args().map(|name| names.peek::<Value>(name)).collect::<Result<Vec<_>, _>>()?;
            printable("format", places.iter().chain(&named))?;
            return Ok(None);
        }
        _ => return is_of_kind(text, method, args),
    };
    Ok(Some(value))
}

/// `str.isspace` and others that ask for a kind of character; `None` for a method that is not here.
fn is_of_kind(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let all = |is: fn(char) -> bool| -> Result<bool, Error> {
        let () = from_args(args)?;
        Ok(!text.is_empty() && text.chars().all(is))
    };
    let is = match method {
        "isspace" => all(is_space)?,
        "isprintable" => text.is_empty() || all(printed::is_printable)?,
        "isdigit" | "isdecimal" | "isnumeric" => match text.is_ascii() {
            true => all(|c| c.is_ascii_digit())?,
            // Of letters beyond ASCII, Python's tables know more kinds than Rust's.
            false => return Err(wrong(format!("{method} of letters beyond ASCII is not known here"))),
        },
        "isidentifier" => {
            let starts = |c: char| c.is_alphabetic() || c == '_';
            all(|c| c.is_alphanumeric() || c == '_')? && text.starts_with(starts)
        }
        _ => return Ok(None),
    };
    Ok(Some(Value::from(is)))
}

/// `str.partition` and `str.rpartition`: what lies before the separator, the separator, and what lies behind it. Fails for an empty one.
fn partition(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(wrong("empty separator"));
    }
    let found = if method == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if method == "partition" => [text, "", ""],
        None => ["", "", text],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// `str.startswith` and `str.endswith`, of one string or any of a tuple.
fn affix(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
    let within = within(text, start, end).map(|(_, within)| within);
    let is = |what: &Value| -> Result<bool, Error> {
        let what = what.as_str().ok_or_else(|| wrong(format!("{method} takes a string or a tuple of them")))?;
        Ok(within.is_some_and(|text| match method {
            "startswith" => text.starts_with(what),
            _ => text.ends_with(what),
        }))
    };
    Ok(Value::from(if what.is_tuple() {
        let mut found = false;
        for what in what.try_iter()? {
            found |= is(&what)?;
        }
        found
    } else {
        is(what)?
    }))
}

/// `str.find`, `str.index` and the two from the right; places are counted in characters.
fn find(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let found = within(text, start, end).and_then(|(before, within)| {
        let at = if method.starts_with('r') { within.rfind(what) } else { within.find(what) };
        at.map(|at| before + within[..at].chars().count())
    });
    match found {
        Some(at) => Ok(Value::from(at)),
        None if method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(wrong("substring not found")),
    }
}

/// `str.split` at a separator, or at white space without one, into `maxsplit + 1` parts at most. Fails for an empty separator.
fn split(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (places, names): (&[Value], Kwargs) = from_args(args)?;
    let separator = place(places, &names, 0, "sep")?;
    let most = place(places, &names, 1, "maxsplit")?;
    names.assert_all_used()?;
    let most = most.map(i64::try_from).transpose()?.and_then(|most| usize::try_from(most).ok());
    let most = most.unwrap_or(usize::MAX);
    let Some(separator) = separator.as_ref().filter(|separator| !separator.is_none()) else {
        return Ok(words(text, most).into_iter().map(Value::from).collect());
    };
    let separator = separator.as_str().ok_or_else(|| wrong("split takes a string or none"))?;
    if separator.is_empty() {
        return Err(wrong("empty separator"));
    }
    Ok(text.splitn(most.saturating_add(1), separator).map(Value::from).collect())
}

/// `str.title`: the first letter of each run of letters as a title has it, the others small.
fn titled(text: &str, args: &[Value]) -> Result<Value, Error> {
    let () = from_args(args)?;
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match (is_cased(c), inside) {
            (true, true) => out.extend(c.to_lowercase()),
            (true, false) => out.push(title(c)?),
            (false, _) => out.push(c),
        }
        inside = is_cased(c);
    }
    Ok(Value::from(out))
}

/// `str.expandtabs`, with tabs of 1024 characters at most.
fn expand_tabs(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (size,): (Option<usize>,) = from_args(args)?;
    let size = size.unwrap_or(8).min(1 << 10);
    let (mut out, mut column) = (String::new(), 0);
    for c in text.chars() {
        let spaces = if size == 0 { 0 } else { size - column % size };
        match c {
            '\t' => {
                out.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            _ => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(Value::from(out))
}

/// `str.join` of strings, up to [`WIDEST`] bytes.
fn join(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (items,): (&Value,) = from_args(args)?;
    let mut joined = String::new();
    for (index, item) in items.try_iter()?.enumerate() {
        let item = item
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| wrong(format!("join: item {index} is a {}, and Python joins strings alone", item.kind())))?;
        joined.push_str(if index > 0 { text } else { "" });
        joined.push_str(&item);
        if joined.len() > WIDEST {
            return Err(wrong(format!("join makes more than {WIDEST} bytes")));
        }
    }
    Ok(Value::from(joined))
}

/// The longest text that is joined (64 MiB).
const WIDEST: usize = 64 << 20;

/// Fails for a value that is formatted otherwise by Python.
pub(super) fn printable<'a>(what: &str, values: impl IntoIterator<Item = &'a Value>) -> Result<(), Error> {
    for value in values {
        let plain = matches!(value.kind(), ValueKind::String | ValueKind::Number | ValueKind::Bool | ValueKind::None);
        if !plain && printed::text(value)? != value.to_string() {
            return Err(wrong(format!("{what} writes this {} otherwise than Python", value.kind())));
        }
    }
    Ok(())
}

/// An argument by its place or its name.
pub(super) fn place(places: &[Value], names: &Kwargs, at: usize, name: &str) -> Result<Option<Value>, Error> {
    match places.get(at) {
        Some(value) => Ok(Some(value.clone())),
        None => names.get::<Option<Value>>(name),
    }
}

/// `text[start:end]` as `find` has it, and the characters before it; `None` where it starts behind the end.
fn within(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(usize, &str)> {
    if start.is_none() && end.is_none() {
        return Some((0, text));
    }
    let len = text.chars().count() as i64;
    let place = |at: i64| if at < 0 { (at + len).max(0) } else { at };
    let start = place(start.unwrap_or(0));
    let end = place(end.unwrap_or(len)).min(len);
    if start > end {
        return None;
    }
    let byte = |at: i64| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    Some((start as usize, &text[byte(start)..byte(end)]))
}

/// `str.split` at white space.
fn words(text: &str, most: usize) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = if found.len() < most { rest.find(is_space) } else { None };
        match end {
            Some(end) => {
                found.push(&rest[..end]);
                rest = rest[end..].trim_start_matches(is_space);
            }
            None => {
                found.push(rest);
                break;
            }
        }
    }
    found
}

/// `str.splitlines`: lines with or without what ends them, by every end of a line that Unicode has.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    const ENDS: &[char] = &['\n', '\r', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(ENDS) {
        let end = match &rest[at..] {
            both if both.starts_with("\r\n") => at + 2,
            other => at + other.chars().next().map_or(0, char::len_utf8),
        };
        found.push(&rest[..if keep { end } else { at }]);
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        found.push(rest);
    }
    found
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ')
}

/// A letter as titles begin with it.
fn title(c: char) -> Result<char, Error> {
    let mut upper = c.to_uppercase();
    match (upper.next(), upper.next()) {
        // Letters of two, which have a form of their own, and those that have none, as Georgian's.
        (Some(upper), None) if !matches!(c, 'Ǆ'..='ǌ' | 'Ǳ'..='ǳ' | '\u{10d0}'..='\u{10ff}') => Ok(upper),
        _ => Err(wrong(format!("`{c}` at the beginning of a title is not known here"))),
    }
}
