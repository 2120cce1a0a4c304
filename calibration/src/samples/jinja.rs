//! What Python's jinja2 has for templates and minijinja has not: methods of `str`, filters, and floats as Python prints them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, escape_formatter};
use minijinja_contrib::pycompat;

/// The widest that a text is made (1 MiB), so that one number is no memory without end.
const WIDEST: usize = 1 << 20;

/// Adds it all.
pub(super) fn complete(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| match printed(value)? {
        Some(text) => escape_formatter(out, state, &Value::from(text)),
        None => escape_formatter(out, state, value),
    });
    environment.add_filter("string", |value: Value| -> Result<Value, Error> {
        Ok(match printed(&value)? {
            Some(text) => Value::from(text),
            None if value.as_str().is_some() => value,
            None => Value::from(value.to_string()),
        })
    });
    environment
        .add_filter("center", |text: String, width: Option<i64>| padded(&text, width.unwrap_or(80), ' ', center));
    environment.add_filter("wordcount", |text: String| words(&text));
    environment.add_filter("truncate", truncate);
    environment.add_function("cycler", |items: Rest<Value>| match items.is_empty() {
        true => Err(wrong("cycler needs at least one item")),
        false => Ok(Value::from_object(Cycler { items: items.0, at: AtomicUsize::new(0) })),
    });
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
}

fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// A value as Python prints it, where minijinja prints it otherwise. Fails for lists and objects with such numbers in them.
fn printed(value: &Value) -> Result<Option<String>, Error> {
    if let Some(number) = float(value) {
        return Ok(Some(repr(number)));
    }
    match odd(value, 0) {
        Some(number) => Err(wrong(format!("{} in a list or an object is printed otherwise by Python", repr(number)))),
        None => Ok(None),
    }
}

fn float(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok()).flatten()
}

/// A float within a list or an object that minijinja prints otherwise than Python.
fn odd(value: &Value, depth: usize) -> Option<f64> {
    const DEPTH: usize = 64;
    if depth > DEPTH {
        return None;
    }
    match value.kind() {
        ValueKind::Number => float(value).filter(|number| depth > 0 && format!("{number:?}") != repr(*number)),
        ValueKind::Seq => value.try_iter().ok()?.find_map(|item| odd(&item, depth + 1)),
        ValueKind::Map => value.try_iter().ok()?.find_map(|key| odd(&value.get_item(&key).ok()?, depth + 1)),
        _ => None,
    }
}

/// `repr` of a float: plain digits from 1e-4 to 1e16, else an exponent with its sign and two digits.
pub(super) fn repr(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "nan".to_owned() } else { value.to_string() };
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        // Rust goes over to exponents elsewhere.
        _ if value.fract() == 0.0 => format!("{value:.1}"),
        _ => value.to_string(),
    }
}

/// Python's methods: those of minijinja-contrib and the few that it lacks.
fn method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return pycompat::unknown_method_callback(state, value, method, args) };
    let all = |is: fn(char) -> bool| -> Result<Value, Error> {
        let () = from_args(args)?;
        Ok(Value::from(!text.is_empty() && text.chars().all(is)))
    };
    match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, found, after) = match text.split_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => (text, "", ""),
            };
            Ok(Value::from([before, found, after].map(Value::from)))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, found, after) = match text.rsplit_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => ("", "", text),
            };
            Ok(Value::from([before, found, after].map(Value::from)))
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            rsplit(text, separator, most)
        }
        "center" | "ljust" | "rjust" => {
            let (width, fill): (i64, Option<char>) = from_args(args)?;
            let before: fn(usize, usize) -> usize = match method {
                "center" => center,
                "ljust" => |_, _| 0,
                _ => |missing, _| missing,
            };
            padded(text, width, fill.unwrap_or(' '), before)
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let sign = &text[..usize::from(text.starts_with(['+', '-']))];
            let digits = padded(&text[sign.len()..], width - sign.len() as i64, '0', |missing, _| missing)?;
            Ok(Value::from(format!("{sign}{digits}")))
        }
        "index" | "rindex" => {
            let (what,): (&str,) = from_args(args)?;
            let at = if method == "index" { text.find(what) } else { text.rfind(what) };
            let at = at.ok_or_else(|| wrong("substring not found"))?;
            Ok(Value::from(text[..at].chars().count()))
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swapped = text.chars().flat_map(|c| -> Box<dyn Iterator<Item = char>> {
                match c.is_uppercase() {
                    true => Box::new(c.to_lowercase()),
                    false => Box::new(c.to_uppercase()),
                }
            });
            Ok(Value::from(swapped.collect::<String>()))
        }
        "isdecimal" => all(|c| c.is_ascii_digit()).and_then(|plain| match text.is_ascii() {
            true => Ok(plain),
            false => Err(wrong("isdecimal of letters beyond ASCII is not known")),
        }),
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// Divides from the right, at most so many times.
fn rsplit(text: &str, separator: Option<&str>, most: usize) -> Result<Value, Error> {
    let mut parts: Vec<&str> = Vec::new();
    let mut rest = text;
    match separator {
        Some("") => return Err(wrong("empty separator")),
        Some(separator) => {
            while parts.len() < most
                && let Some((before, after)) = rest.rsplit_once(separator)
            {
                parts.push(after);
                rest = before;
            }
            parts.push(rest);
        }
        None => loop {
            rest = rest.trim_end();
            match rest.rfind(char::is_whitespace) {
                _ if rest.is_empty() => break,
                Some(at) if parts.len() < most => {
                    let begins = at + rest[at..].chars().next().map_or(0, char::len_utf8);
                    parts.push(&rest[begins..]);
                    rest = &rest[..at];
                }
                _ => {
                    parts.push(rest);
                    break;
                }
            }
        },
    }
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}

/// How much stands before a text in the middle, as CPython divides what is missing.
fn center(missing: usize, width: usize) -> usize {
    missing / 2 + (missing & width & 1)
}

/// A text of at least this many letters; `before` says how many of those missing go before it.
fn padded(text: &str, width: i64, fill: char, before: fn(usize, usize) -> usize) -> Result<Value, Error> {
    let width = usize::try_from(width).unwrap_or(0);
    if width > WIDEST {
        return Err(wrong(format!("a text of {width} letters is too wide")));
    }
    let missing = width.saturating_sub(text.chars().count());
    let before = before(missing, width);
    let filled = |count: usize| std::iter::repeat_n(fill, count);
    Ok(Value::from(filled(before).chain(text.chars()).chain(filled(missing - before)).collect::<String>()))
}

/// Runs of letters, numerals and underscores.
fn words(text: &str) -> usize {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    text.split(|c| !inside(c)).filter(|word| !word.is_empty()).count()
}

/// jinja2's `truncate`: length, killwords, end and leeway, by place or by name.
fn truncate(text: String, places: Rest<Value>, names: Kwargs) -> Result<String, Error> {
    let given = |at: usize, name: &str| match places.get(at) {
        Some(value) => Ok(Some(value.clone())),
        None => names.get::<Option<Value>>(name),
    };
    let number = |at: usize, name: &str, usual: usize| match given(at, name)? {
        Some(value) if !value.is_none() => usize::try_from(value),
        _ => Ok(usual),
    };
    let (length, leeway) = (number(0, "length", 255)?, number(3, "leeway", 5)?);
    let killwords = given(1, "killwords")?.is_some_and(|value| value.is_true());
    let end = given(2, "end")?.map_or("...".to_owned(), |value| value.to_string());
    names.assert_all_used()?;
    let kept = length
        .checked_sub(end.chars().count())
        .ok_or_else(|| wrong(format!("truncate to {length} letters, which `{end}` does not fit into")))?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let cut: String = text.chars().take(kept).collect();
    let whole = if killwords { &cut[..] } else { cut.rsplit_once(' ').map_or(&cut[..], |(whole, _)| whole) };
    Ok(format!("{whole}{end}"))
}

/// jinja2's `cycler`.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.items[self.at.load(Ordering::Relaxed)].clone())
    }

    fn call_method(self: &Arc<Self>, _: &mut State, method: &str, args: &[Value]) -> Result<Value, Error> {
        let () = from_args(args)?;
        let at = self.at.load(Ordering::Relaxed);
        match method {
            "next" => {
                self.at.store((at + 1) % self.items.len(), Ordering::Relaxed);
                Ok(self.items[at].clone())
            }
            "reset" => {
                self.at.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::samples::ChatTemplate;

    fn render(source: &str) -> Result<String, String> {
        ChatTemplate::new("t.jinja", source, None, None).and_then(|t| t.render(&[], &[])).map_err(|e| e.to_string())
    }

    /// What jinja2 3.1.6 makes of each, in the environment that transformers makes.
    #[test]
    fn what_minijinja_lacks_is_as_in_jinja2() {
        for (source, expected) in GOLDEN {
            let wrapped = format!("{{{{ {source} }}}}");
            assert_eq!(render(&wrapped).as_deref(), Ok(*expected), "{source}");
        }
        let cycled = "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.current }}{{ c.next() }}{{ c.next() }}{{ c.reset() }}{{ c.next() }}";
        assert_eq!(render(cycled).unwrap(), "abbaNonea");
        assert_eq!(
            render("{% set j = joiner('|') %}{% for x in 'abc' %}{{ j() }}{{ x }}{% endfor %}").unwrap(),
            "a|b|c"
        );
    }

    #[test]
    fn what_would_come_out_otherwise_is_an_error() {
        for source in [
            "[1e22]",
            "{'a': [1e-5]}",
            "'a b'.rsplit('')",
            "'abc'.index('x')",
            "'a'.center(99999999)",
            "'abc'|truncate(1)",
            "cycler()",
            "'%s' % 1",
        ] {
            assert!(
                render(&format!("{{{{ {source} }}}}")).unwrap_err().starts_with("t.jinja: chat template: "),
                "{source}"
            );
        }
    }

    const GOLDEN: &[(&str, &str)] = &[
        ("1e22", "1e+22"),
        ("-1e22", "-1e+22"),
        ("1.5e300", "1.5e+300"),
        ("1e-5", "1e-05"),
        ("0.0001", "0.0001"),
        ("1e16", "1e+16"),
        ("1e15", "1000000000000000.0"),
        ("123456789012345680.0", "1.2345678901234568e+17"),
        ("9999999999999998.0", "9999999999999998.0"),
        ("0.1 + 0.2", "0.30000000000000004"),
        ("100.0", "100.0"),
        ("-0.0", "-0.0"),
        ("1e22|string", "1e+22"),
        ("1e22|string|length", "5"),
        ("1.0|string", "1.0"),
        ("7|string", "7"),
        ("[1.5, 2.0]", "[1.5, 2.0]"),
        ("['a', none, true]", "['a', None, True]"),
        ("'a'|center(4) ~ '|'", " a  |"),
        ("'abc'|center(6) ~ '|'", " abc  |"),
        ("'abc'|center(8) ~ '|'", "  abc   |"),
        ("'abcd'|center(7) ~ '|'", "  abcd |"),
        ("'ab'|center|length", "80"),
        ("'ab'.center(5, '*')", "**ab*"),
        ("'abc'.center(6, '*')", "*abc**"),
        ("'ü'.center(4, '*')", "*ü**"),
        ("'ab'.ljust(4, '.')", "ab.."),
        ("'ab'.rjust(4, '.')", "..ab"),
        ("'ab'.rjust(1)", "ab"),
        ("'42'.zfill(5)", "00042"),
        ("'-42'.zfill(5)", "-0042"),
        ("'+4'.zfill(1)", "+4"),
        ("'a b  c'.rsplit()", "['a', 'b', 'c']"),
        ("' a b  c '.rsplit(none, 1)", "[' a b', 'c']"),
        ("' a b  c '.rsplit(none, 0)", "[' a b  c']"),
        ("'a,b,,c'.rsplit(',')", "['a', 'b', '', 'c']"),
        ("'a,b,,c'.rsplit(',', 1)", "['a,b,', 'c']"),
        ("'a,b,,c'.rsplit(',', 2)", "['a,b', '', 'c']"),
        ("'a--b--c'.rsplit('--', -1)", "['a', 'b', 'c']"),
        ("''.rsplit()", "[]"),
        ("''.rsplit(',')", "['']"),
        ("'a b'.rsplit(' ', 1)[-1]", "b"),
        ("'foo bar_baz, qux-7 é.'|wordcount", "5"),
        ("''|wordcount", "0"),
        ("'foo bar baz qux'|truncate(9)", "foo..."),
        ("'foo bar baz qux'|truncate(9, True)", "foo ba..."),
        ("'foo bar baz qux'|truncate(11)", "foo bar baz qux"),
        ("'foo bar baz qux'|truncate(11, False, '...', 0)", "foo bar..."),
        ("'foobarbazqux'|truncate(5, end='-', leeway=0)", "foob-"),
        ("'héllo wörld again'|truncate(8, true, '', 0)", "héllo wö"),
        ("'abcabc'.index('c')", "2"),
        ("'abcabc'.rindex('c')", "5"),
        ("'aBcÉ'.swapcase()", "AbCé"),
        ("'12'.isdecimal()", "True"),
        ("'1a'.isdecimal()", "False"),
        ("''.isdecimal()", "False"),
        ("'a-b-c'.partition('-')[2]", "b-c"),
        ("'a-b-c'.rpartition('-')[0]", "a-b"),
    ];
}
