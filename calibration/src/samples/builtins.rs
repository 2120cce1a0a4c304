//! Filters, tests and functions as jinja2 has them, where the engine has others or none.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, filters};

use super::printed::{self, Lazy, Range, as_float, is_object};
use super::strings::{is_space, place, printable, strip};

fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// Adds them all.
pub(super) fn complete(environment: &mut Environment<'_>) {
    environment.add_filter("string", |value: Value| match value.as_str() {
        Some(_) => Ok(value),
        None => printed::text(&value).map(Value::from),
    });
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("attr", attr);
    environment.add_filter("join", join);
    environment.add_filter("striptags", striptags);
    environment.add_filter("trim", |text: Value, chars: Option<Value>| -> Result<Value, Error> {
        let text = printed::text(&text)?;
        let chars = chars.filter(|chars| !chars.is_none());
        Ok(Value::from(match chars.as_ref().map(|chars| chars.as_str().ok_or_else(|| wrong("trim takes a string"))) {
            None => strip(&text).to_owned(),
            Some(chars) => {
                let chars = chars?;
                text.trim_matches(|c| chars.contains(c)).to_owned()
            }
        }))
    });
    for name in ["escape", "e"] {
        environment.add_filter(name, |value: Value| match value.is_safe() {
            true => Ok(value),
            false => printed::text(&value).map(|text| Value::from_safe_string(escaped(&text))),
        });
    }
    environment.add_filter("format", |state: &mut State, text: Value, values: Rest<Value>| {
        printable("format", values.iter())?;
        let (values,) = from_args(&values)?;
        filters::format(state, &text, values)
    });
    complete_generators(environment);
    complete_tests(environment);
    // These are no names of jinja2's.
    for name in ["bool", "split", "lines", "zip", "chain", "pprint"] {
        environment.remove_filter(name);
    }
    for name in ["startingwith", "endingwith", "safe"] {
        environment.remove_test(name);
    }
    environment.remove_global("debug");
    environment.add_function("range", Range::of);
    environment.add_function("lipsum", |_: Rest<Value>| -> Result<Value, Error> {
        Err(wrong("lipsum gives another text each time"))
    });
}

/// Filters that give generators.
fn complete_generators(environment: &mut Environment<'_>) {
    fn lazy(items: Result<Vec<Value>, Error>) -> Result<Value, Error> {
        items.map(|items| Value::from_object(Lazy(items)))
    }
    fn listed(value: Result<Value, Error>) -> Result<Value, Error> {
        lazy(value?.try_iter().map(Iterator::collect))
    }
    environment
        .add_filter("map", |state: &mut State, value: Value, args: Rest<_>| lazy(filters::map(state, value, args)));
    environment.add_filter("select", |state: &mut State, value: Value, args: Rest<Value>| {
        let (test, args) = from_args(&args)?;
        lazy(filters::select(state, value, test, args))
    });
    environment.add_filter("reject", |state: &mut State, value: Value, args: Rest<Value>| {
        let (test, args) = from_args(&args)?;
        lazy(filters::reject(state, value, test, args))
    });
    environment.add_filter("selectattr", |state: &mut State, value: Value, args: Rest<Value>| {
        let (attr, test, args) = from_args(&args)?;
        lazy(filters::selectattr(state, value, attr, test, args))
    });
    environment.add_filter("rejectattr", |state: &mut State, value: Value, args: Rest<Value>| {
        let (attr, test, args) = from_args(&args)?;
        lazy(filters::rejectattr(state, value, attr, test, args))
    });
    environment.add_filter("unique", |state: &State, value: Value, names: Kwargs| {
        listed(filters::unique(state, value, names))
    });
    environment.add_filter("batch", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        listed(filters::batch(state, value, count, fill))
    });
    environment.add_filter("slice", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        listed(filters::slice(state, value, count, fill))
    });
    environment.add_filter("reverse", |value: Value| match value.as_str() {
        Some(_) => filters::reverse(&value),
        None => listed(filters::reverse(&value)),
    });
}

fn complete_tests(environment: &mut Environment<'_>) {
    environment.add_test("sequence", |value: Value| match value.kind() {
        ValueKind::String | ValueKind::Seq | ValueKind::Undefined => true,
        ValueKind::Map => !is_object(&value),
        // A slice of a list.
        ValueKind::Iterable => !is_lazy(&value) && value.downcast_object_ref::<printed::View>().is_none(),
        _ => false,
    });
    environment.add_test("iterable", |value: Value| match value.kind() {
        ValueKind::None => false,
        ValueKind::Undefined => true,
        ValueKind::Map if is_object(&value) => printed::is_loop(&value),
        _ => value.try_iter().is_ok(),
    });
    environment.add_test("mapping", |value: Value| value.kind() == ValueKind::Map && !is_object(&value));
    environment.add_test("callable", |value: Value| match value.as_object() {
        // jinja2's undefined can be called, if only to fail.
        None => value.is_undefined(),
        Some(_) if printed::is_loop(&value) => true,
        Some(object) => value.kind() == ValueKind::Plain && !object.type_name().ends_with("Cycler"),
    });
    environment.add_test("sameas", |value: Value, other: Value| -> Result<bool, Error> {
        if value.is_undefined() || other.is_undefined() {
            return Ok(false);
        }
        Ok(minijinja::tests::is_sameas(&value, &other))
    });
    environment.add_test("odd", |value: Value| remainder(&value).map(|rest| rest == 1.0));
    environment.add_test("even", |value: Value| remainder(&value).map(|rest| rest == 0.0));
    environment.add_test("in", |state: &State, value: Value, within: Value| match within.kind() {
        ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Undefined => {
            minijinja::tests::is_in(state, &value, &within)
        }
        kind => Err(wrong(format!("a {kind} contains nothing"))),
    });
    environment.add_test("filter", |name: String| FILTERS.split_whitespace().any(|known| known == name));
    environment.add_test("test", |name: String| TESTS.split_whitespace().any(|known| known == name));
}

/// jinja2's filters, and transformers' `tojson`.
const FILTERS: &str = "abs attr batch capitalize center count d default dictsort e escape filesizeformat first float forceescape format \
    groupby indent int items join last length list lower map max min pprint random reject rejectattr replace reverse round safe select \
    selectattr slice sort string striptags sum title tojson trim truncate unique upper urlencode urlize wordcount wordwrap xmlattr";
/// jinja2's tests.
const TESTS: &str = "!= < <= == > >= boolean callable defined divisibleby eq equalto escaped even false filter float ge greaterthan gt in \
    integer iterable le lessthan lower lt mapping ne none number odd sameas sequence string test true undefined upper";

fn is_lazy(value: &Value) -> bool {
    value.downcast_object_ref::<Lazy>().is_some()
}

/// `value % 2`.
fn remainder(value: &Value) -> Result<f64, Error> {
    match value.kind() {
        ValueKind::Bool => Ok(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => match as_float(value) {
            Some(number) => Ok(number.rem_euclid(2.0)),
            None => Ok(f64::from(u8::from(value.to_string().ends_with(['1', '3', '5', '7', '9'])))),
        },
        kind => Err(wrong(format!("a {kind} is neither odd nor even"))),
    }
}

/// `int(value)`, or of a string in a base; the default where that is no number.
fn int(value: Value, places: Rest<Value>, names: Kwargs) -> Result<Value, Error> {
    let default = place(&places, &names, 0, "default")?.unwrap_or_else(|| Value::from(0));
    let base = place(&places, &names, 1, "base")?.map_or(Ok(10), u32::try_from)?;
    names.assert_all_used()?;
    let whole = |number: f64| match number.abs() < 1e38 {
        true => Ok(Value::from(number.trunc() as i128)),
        false => Err(wrong(format!("{} is too large for an integer here", printed::float(number)))),
    };
    match value.kind() {
        ValueKind::Undefined => Err(wrong("an undefined value is no number")),
        ValueKind::Bool => Ok(Value::from(i64::from(value.is_true()))),
        ValueKind::Number => match as_float(&value) {
            Some(number) if number.is_nan() => Ok(default),
            Some(number) => whole(number),
            None => Ok(value),
        },
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            if let Some(number) = parsed_int(text, base)? {
                return Ok(number);
            }
            match parsed_float(text)? {
                Some(number) if number.is_finite() => whole(number),
                _ => Ok(default),
            }
        }
        _ => Ok(default),
    }
}

/// `float(value)`, or the default where that is no number.
fn float(value: Value, places: Rest<Value>, names: Kwargs) -> Result<Value, Error> {
    let default = place(&places, &names, 0, "default")?.unwrap_or_else(|| Value::from(0.0));
    names.assert_all_used()?;
    match value.kind() {
        ValueKind::Undefined => Err(wrong("an undefined value is no number")),
        ValueKind::Bool => Ok(Value::from(f64::from(u8::from(value.is_true())))),
        ValueKind::Number => f64::try_from(value).map(Value::from),
        ValueKind::String => Ok(parsed_float(value.as_str().unwrap_or_default())?.map_or(default, Value::from)),
        _ => Ok(default),
    }
}

/// Digits as Python's numbers have them: without spaces around them, and single underscores between two digits. `None` where they stand
/// otherwise; fails for digits beyond ASCII.
fn digits(text: &str) -> Result<Option<String>, Error> {
    let text = strip(text);
    if text.chars().any(|c| !c.is_ascii() && c.is_numeric()) {
        return Err(wrong(format!("`{text}` as a number is not known here")));
    }
    let bytes = text.as_bytes();
    let beside = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphanumeric);
    let wrong = (0..bytes.len()).any(|at| bytes[at] == b'_' && (at == 0 || !beside(at - 1) || !beside(at + 1)));
    Ok((!wrong && text.is_ascii()).then(|| text.replace('_', "").to_ascii_lowercase()))
}

fn parsed_int(text: &str, base: u32) -> Result<Option<Value>, Error> {
    let Some(text) = digits(text)? else { return Ok(None) };
    let (sign, bare) = match text.strip_prefix('-') {
        Some(bare) => (-1, bare),
        None => (1, text.strip_prefix('+').unwrap_or(&text)),
    };
    let prefixed = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find(|(prefix, _)| bare.starts_with(prefix));
    let (bare, base) = match prefixed {
        Some((prefix, its)) if base == its || base == 0 => (&bare[prefix.len()..], its),
        // Zeros before a number say nothing of its base to Python.
        _ if base == 0 && bare.len() > 1 && bare.starts_with('0') && bare.bytes().any(|b| b != b'0') => {
            return Ok(None);
        }
        _ => (bare, if base == 0 { 10 } else { base }),
    };
    if !(2..=36).contains(&base) {
        return Err(wrong(format!("int() base must be from 2 to 36, or 0, and not {base}")));
    }
    if bare.is_empty() || !bare.chars().all(|c| c.is_digit(base)) {
        return Ok(None);
    }
    match i128::from_str_radix(bare, base) {
        Ok(number) => Ok(Some(Value::from(sign * number))),
        Err(_) => Err(wrong(format!("{bare} is too large for an integer here"))),
    }
}

fn parsed_float(text: &str) -> Result<Option<f64>, Error> {
    Ok(digits(text)?.and_then(|text| text.parse().ok()))
}

/// An attribute, of which dicts, lists and strings have none but their methods.
fn attr(value: Value, name: String) -> Result<Value, Error> {
    const METHODS: &str = "append capitalize casefold center clear copy count encode endswith expandtabs extend find format format_map \
        fromkeys get index insert isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle \
        isupper items join keys ljust lower lstrip maketrans partition pop popitem remove removeprefix removesuffix replace reverse rfind \
        rindex rjust rpartition rsplit rstrip setdefault sort split splitlines startswith strip swapcase title translate update upper \
        values zfill real imag numerator denominator conjugate bit_length bit_count to_bytes from_bytes as_integer_ratio is_integer hex \
        fromhex start stop step grouper list";
    let has_none = value.kind() != ValueKind::Plain && !is_object(&value);
    match has_none {
        true if name.starts_with("__") || METHODS.split_whitespace().any(|method| method == name) => {
            Err(wrong(format!("the attribute `{name}` of a {} is not known here", value.kind())))
        }
        true => Ok(Value::UNDEFINED),
        false => value.get_attr(&name),
    }
}

/// jinja2's `join`: what each item is as `str`.
fn join(state: &mut State, value: Value, places: Rest<Value>, names: Kwargs) -> Result<Value, Error> {
    let between = place(&places, &names, 0, "d")?.map_or(Ok(String::new()), |between| printed::text(&between))?;
    let attribute = place(&places, &names, 1, "attribute")?.filter(|attribute| !attribute.is_none());
    names.assert_all_used()?;
    let value = match attribute {
        None => value,
        Some(attribute) => {
            let names = Kwargs::from_iter([("attribute", attribute)]);
            state.apply_filter("map", &[value, Value::from(names)])?
        }
    };
    let mut joined = String::new();
    for (index, item) in value.try_iter()?.enumerate() {
        let before = joined.len();
        joined.push_str(if index > 0 { &between } else { "" });
        joined.push_str(&printed::text(&item)?);
        state.consume_fuel(1 + (joined.len() - before) as u64 / 64)?;
    }
    Ok(Value::from(joined))
}

/// markupsafe's `escape`.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    out
}

/// markupsafe's `striptags`: without tags and comments, single spaces, and characters in the place of their entities.
fn striptags(value: Value) -> Result<String, Error> {
    let text = printed::text(&value)?;
    let (mut bare, mut rest) = (String::with_capacity(text.len()), &text[..]);
    while let Some(start) = rest.find('<') {
        let end = match rest[start..].starts_with("<!--") {
            true => rest[start + 4..].find("-->").map(|end| start + 4 + end + 3),
            false => rest[start..].find('>').map(|end| start + end + 1),
        };
        let Some(end) = end else { break };
        bare.push_str(&rest[..start]);
        rest = &rest[end..];
    }
    bare.push_str(rest);
    let words: Vec<&str> = bare.split(is_space).filter(|word| !word.is_empty()).collect();
    unescaped(&words.join(" "))
}

/// `html.unescape` of the entities that everyone knows; fails for others.
fn unescaped(text: &str) -> Result<String, Error> {
    const KNOWN: [(&str, &str); 6] =
        [("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#34;", "\""), ("&#39;", "'")];
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some((entity, other)) = KNOWN.iter().find(|(entity, _)| rest.starts_with(entity)) {
            out.push_str(other);
            rest = &rest[entity.len()..];
        } else if rest[1..].starts_with(|c: char| c == '#' || c.is_ascii_alphabetic()) {
            return Err(wrong("striptags: an entity of HTML that is not known here"));
        } else {
            out.push('&');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// Methods of lists and dicts that change nothing.
pub(super) fn method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let Some(object) = value.as_object() else { return Ok(None) };
    let is_list = value.kind() == ValueKind::Seq || value.kind() == ValueKind::Iterable && !is_lazy(value);
    let view = match method {
        "items" => Some(printed::Viewed::Items),
        "keys" => Some(printed::Viewed::Keys),
        "values" => Some(printed::Viewed::Values),
        _ => None,
    };
    let is_dict = value.kind() == ValueKind::Map && !is_object(value);
    if let (true, Some(view)) = (is_dict, view) {
        let () = from_args(args)?;
        return Ok(Some(printed::View::of(object.clone(), view)));
    }
    match method {
        "copy" if is_dict || is_list && !value.is_tuple() => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        "index" if is_list => {
            let (what,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *what);
            Ok(Some(Value::from(at.ok_or_else(|| wrong("the list has no such item"))?)))
        }
        _ => Ok(None),
    }
}
