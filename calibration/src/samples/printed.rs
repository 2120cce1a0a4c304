//! Values as Python prints them: `str` and `repr`, and those of its types that the engine lacks.

use std::sync::{Arc, LazyLock};

use minijinja::value::{DynObject, Enumerator, Object, ObjectRepr, Tuple, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// The deepest nesting that is printed.
const DEEPEST: usize = 256;

/// Ranges of characters that `repr` escapes; `tests/fixtures/make_templates.py` makes them.
static UNPRINTABLE: LazyLock<Vec<[u32; 2]>> =
    LazyLock::new(|| serde_json::from_str(include_str!("unprintable.json")).expect("made by a script"));

fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// `str` of a value. Fails for one that Python prints with its address, or in words that are not known here.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None if value.is_undefined() => Ok(String::new()),
        None => repr(value),
    }
}

/// `repr` of a value; fails as [`text`] does.
pub(super) fn repr(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write(value, 0, &mut out)?;
    Ok(out)
}

fn write(value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(wrong(format!("a value nested more than {DEEPEST} deep is not printed")));
    }
    if let Some(number) = as_float(value) {
        out.push_str(&float(number));
        return Ok(());
    }
    let object = value.as_object();
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None | ValueKind::Bool | ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String if value.is_safe() => {
            out.push_str("Markup(");
            quoted(value.as_str().unwrap_or_default(), out);
            out.push(')');
        }
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Map if is_loop(value) => {
            let [index, length] = [value.get_attr("index")?, value.get_attr("length")?];
            out.push_str(&format!("<LoopContext {index}/{length}>"));
        }
        ValueKind::Map if is_namespace(value) => {
            let keys = value.len().unwrap_or_default();
            if keys > 1 {
                return Err(wrong("a namespace of several values is printed by Python in another order"));
            }
            out.push_str("<Namespace ");
            table(value, depth, out)?;
            out.push('>');
        }
        ValueKind::Map => table(value, depth, out)?,
        _ if let Some(range) = value.downcast_object_ref::<Range>() => out.push_str(&range.repr()),
        _ if let Some(view) = value.downcast_object_ref::<View>() => {
            out.push_str(view.name());
            out.push('(');
            list(value, depth, ["[", "]"], out)?;
            out.push(')');
        }
        ValueKind::Seq if value.is_tuple() => {
            let one = value.len() == Some(1);
            list(value, depth, ["(", if one { ",)" } else { ")" }], out)?;
        }
        // What `groupby` gives is a pair with names.
        ValueKind::Seq if object.is_some_and(|object| object.type_name().ends_with("GroupTuple")) => {
            out.push('(');
            write(&value.get_item_by_index(0)?, depth + 1, out)?;
            out.push_str(", ");
            list(&value.get_item_by_index(1)?, depth, ["[", "]"], out)?;
            out.push(')');
        }
        ValueKind::Seq => list(value, depth, ["[", "]"], out)?,
        // A slice of a list.
        ValueKind::Iterable if value.downcast_object_ref::<Lazy>().is_none() => list(value, depth, ["[", "]"], out)?,
        ValueKind::Invalid => return Err(wrong(value.to_string())),
        _ => return Err(wrong(format!("Python prints {} in words of its own", named(value)))),
    }
    Ok(())
}

/// What to call a value that is not printed.
fn named(value: &Value) -> String {
    match value.downcast_object_ref::<Lazy>() {
        Some(_) => "a generator".to_owned(),
        None => format!("a {}", value.kind()),
    }
}

fn list(value: &Value, depth: usize, [before, behind]: [&str; 2], out: &mut String) -> Result<(), Error> {
    out.push_str(before);
    for (index, item) in value.try_iter()?.enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        write(&item, depth + 1, out)?;
    }
    out.push_str(behind);
    Ok(())
}

fn table(value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    out.push('{');
    for (index, key) in value.try_iter()?.enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        write(&key, depth + 1, out)?;
        out.push_str(": ");
        write(&value.get_item(&key)?, depth + 1, out)?;
    }
    out.push('}');
    Ok(())
}

/// A string in Python's quotes.
fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote || c == '\\' => out.extend(['\\', c]),
            _ if is_printable(c) => out.push(c),
            _ => match u32::from(c) {
                code @ ..=0xFF => out.push_str(&format!("\\x{code:02x}")),
                code @ ..=0xFFFF => out.push_str(&format!("\\u{code:04x}")),
                code => out.push_str(&format!("\\U{code:08x}")),
            },
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable` of one character.
pub(super) fn is_printable(c: char) -> bool {
    let code = u32::from(c);
    let at = UNPRINTABLE.partition_point(|[_, last]| *last < code);
    UNPRINTABLE.get(at).is_none_or(|[first, _]| code < *first)
}

/// The number, if it is a float to Python.
pub(super) fn as_float(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok()).flatten()
}

/// `repr` of a float: plain digits from 1e-4 to 1e16, else an exponent with its sign and two digits.
pub(super) fn float(value: f64) -> String {
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

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// Whether it is what `namespace()` gives or `loop`, which are no dicts to Python.
pub(super) fn is_object(value: &Value) -> bool {
    is_namespace(value) || is_loop(value)
}

pub(super) fn is_loop(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Loop"))
}

/// Python's `range`.
#[derive(Debug)]
pub(super) struct Range {
    start: i64,
    stop: i64,
    step: i64,
    len: usize,
}

/// The longest range of jinja2's sandbox.
const LONGEST: u64 = 100_000;

impl Range {
    pub fn of(first: i64, second: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
        let (start, stop) = second.map_or((0, first), |stop| (first, stop));
        let step = step.unwrap_or(1);
        if step == 0 {
            return Err(wrong("range() arg 3 must not be zero"));
        }
        let (low, high) = if step > 0 { (start, stop) } else { (stop, start) };
        let len = if low < high { (low.abs_diff(high) - 1) / step.unsigned_abs() + 1 } else { 0 };
        if len > LONGEST {
            return Err(wrong(format!("range of {len} items, of which jinja2 allows {LONGEST}")));
        }
        Ok(Value::from_object(Range { start, stop, step, len: len as usize }))
    }

    fn repr(&self) -> String {
        match self.step {
            1 => format!("range({}, {})", self.start, self.stop),
            step => format!("range({}, {}, {step})", self.start, self.stop),
        }
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = key.as_usize().filter(|at| *at < self.len)?;
        Some(Value::from(self.start + at as i64 * self.step))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.len)
    }
}

/// What `items`, `keys` and `values` of a dict give; nothing in it has a number.
#[derive(Debug)]
pub(super) struct View {
    of: DynObject,
    what: Viewed,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Viewed {
    Items,
    Keys,
    Values,
}

impl View {
    pub fn of(of: DynObject, what: Viewed) -> Value {
        Value::from_object(View { of, what })
    }

    fn name(&self) -> &'static str {
        match self.what {
            Viewed::Items => "dict_items",
            Viewed::Keys => "dict_keys",
            Viewed::Values => "dict_values",
        }
    }
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn get_value(self: &Arc<Self>, _: &Value) -> Option<Value> {
        Some(Value::UNDEFINED)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let pairs = self.of.try_iter_pairs().into_iter().flatten();
        Enumerator::Values(match self.what {
            Viewed::Items => pairs.map(|(key, value)| Value::from(Tuple::from([key, value]))).collect(),
            Viewed::Keys => pairs.map(|(key, _)| key).collect(),
            Viewed::Values => pairs.map(|(_, value)| value).collect(),
        })
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        self.of.enumerator_len()
    }
}

/// What is a generator to Python: it has no length, nothing in it a number, and is true even if it gives nothing.
#[derive(Debug)]
pub(super) struct Lazy(pub Vec<Value>);

impl Object for Lazy {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn get_value(self: &Arc<Self>, _: &Value) -> Option<Value> {
        Some(Value::UNDEFINED)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.clone())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }
}
