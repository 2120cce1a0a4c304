//! What a template says in words that the engine reads otherwise than jinja2, put so that it reads them alike.
//!
//! `~` joins its operands as `str` gives them, so each goes through the filter `string`; escapes in strings are Python's. Names for which
//! there is nothing here are refused, as they would be undefined.

/// The template in the engine's words. Fails, with the reason, for what it has no words for.
pub(super) fn spelt(source: &str) -> Result<String, String> {
    let mut out = String::with_capacity(source.len());
    let mut macros: Vec<&str> = Vec::new();
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let close = match from.as_bytes().get(1) {
            Some(b'#') => {
                let end = from.find("#}").map_or(from.len(), |end| end + 2);
                out.push_str(&from[..end]);
                rest = &from[end..];
                continue;
            }
            Some(b'%') => "%}",
            Some(b'{') => "}}",
            _ => {
                out.push('{');
                rest = &from[1..];
                continue;
            }
        };
        // One without an end is told by the engine.
        let Some((tokens, end)) = tokens(from, close) else { break };
        let is_block = close == "%}";
        let text = |token: &Token| &from[token.start..token.end];
        if is_block && tokens.first().is_some_and(|token| text(token) == "raw") {
            let raw = end + end_of_raw(&from[end..]);
            out.push_str(&from[..raw]);
            rest = &from[raw..];
            continue;
        }
        if let [first, name, ..] = &tokens[..]
            && is_block
            && text(first) == "macro"
        {
            macros.push(text(name));
        }
        out.push_str(&tag(&from[..end], &tokens, is_block, &macros)?);
        rest = &from[end..];
    }
    out.push_str(rest);
    Ok(out)
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Name,
    Number,
    Text,
    Sign,
}

struct Token {
    kind: Kind,
    start: usize,
    end: usize,
    /// Brackets around it.
    depth: usize,
}

/// Signs of more than one character.
const LONG: &[&str] = &["**", "//", "==", "!=", "<=", ">="];

/// The tokens of the tag that `text` begins with, and where it ends.
fn tokens(text: &str, close: &str) -> Option<(Vec<Token>, usize)> {
    let bytes = text.as_bytes();
    let mut at = 2 + usize::from(matches!(bytes.get(2), Some(b'-' | b'+')));
    let (mut found, mut depth) = (Vec::new(), 0usize);
    loop {
        let rest = text.get(at..)?;
        let c = rest.chars().next()?;
        if depth == 0 {
            let bare = rest.strip_prefix(['-', '+']).unwrap_or(rest);
            if bare.starts_with(close) {
                return Some((found, at + rest.len() - bare.len() + close.len()));
            }
        }
        let taken = |is: &dyn Fn(char) -> bool| rest.find(|c| !is(c)).unwrap_or(rest.len());
        let mut outside = depth;
        let (kind, len) = match c {
            _ if c.is_whitespace() => {
                at += c.len_utf8();
                continue;
            }
            '"' | '\'' => (Kind::Text, end_of_text(rest, c)?),
            '0'..='9' => (Kind::Number, end_of_number(rest)),
            _ if c.is_alphanumeric() || c == '_' => (Kind::Name, taken(&|c| c.is_alphanumeric() || c == '_')),
            '(' | '[' | '{' => {
                depth += 1;
                (Kind::Sign, 1)
            }
            ')' | ']' | '}' => {
                depth = depth.checked_sub(1)?;
                outside = depth;
                (Kind::Sign, 1)
            }
            _ if LONG.iter().any(|sign| rest.starts_with(sign)) => (Kind::Sign, 2),
            _ => (Kind::Sign, c.len_utf8()),
        };
        found.push(Token { kind, start: at, end: at + len, depth: outside });
        at += len;
    }
}

fn end_of_text(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    let end = text.char_indices().skip(1).find(|(_, c)| {
        let ends = *c == quote && !escaped;
        escaped = *c == '\\' && !escaped;
        ends
    });
    end.map(|(at, _)| at + 1)
}

fn end_of_number(text: &str) -> usize {
    let digits = |from: usize| {
        let rest = &text[from..];
        from + rest.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(rest.len())
    };
    let is_digit = |at: usize| text.as_bytes().get(at).is_some_and(u8::is_ascii_digit);
    if text.len() > 1 && matches!(text.as_bytes()[1], b'x' | b'X' | b'b' | b'B' | b'o' | b'O') {
        return 2 + text[2..].find(|c: char| !c.is_ascii_hexdigit() && c != '_').unwrap_or(text.len() - 2);
    }
    let mut end = digits(0);
    if text[end..].starts_with('.') && is_digit(end + 1) {
        end = digits(end + 1);
    }
    if text[end..].starts_with(['e', 'E']) {
        let sign = usize::from(text[end + 1..].starts_with(['+', '-']));
        if is_digit(end + 1 + sign) {
            end = digits(end + 1 + sign);
        }
    }
    end
}

/// Where the text behind `{% raw %}` ends, before its `{% endraw`.
fn end_of_raw(text: &str) -> usize {
    let is_end = |(at, _): &(usize, &str)| {
        let word = text[at + 2..].strip_prefix(['-', '+']).unwrap_or(&text[at + 2..]);
        word.trim_start().starts_with("endraw")
    };
    text.match_indices("{%").find(is_end).map_or(text.len(), |(at, _)| at)
}

/// Words that end an operand of `~`.
const WORDS: &[&str] = &["and", "or", "not", "in", "is", "if", "else", "elif", "recursive"];
/// Signs that do.
const SIGNS: &[&str] = &["==", "!=", "<", "<=", ">", ">=", "=", ",", ":", "~"];

/// A tag, of which `tokens` are the tokens, in the engine's words.
fn tag(source: &str, tokens: &[Token], is_block: bool, macros: &[&str]) -> Result<String, String> {
    let text = |at: usize| tokens.get(at).map_or("", |token| &source[token.start..token.end]);
    let behind_dot = |at: usize| at > 0 && text(at - 1) == ".";
    let word = |at: usize| tokens[at].kind == Kind::Name && !behind_dot(at);
    // Where what is before it ends an operand, a sign is between two.
    let is_binary = |at: usize| {
        at > 0
            && match tokens[at - 1].kind {
                Kind::Sign => matches!(text(at - 1), ")" | "]" | "}"),
                Kind::Name => !(WORDS.contains(&text(at - 1)) && word(at - 1) || is_block && at == 1),
                _ => true,
            }
    };
    let ends = |at: usize| match tokens[at].kind {
        Kind::Name => word(at) && (WORDS.contains(&text(at)) || is_block && at == 0),
        Kind::Sign => SIGNS.contains(&text(at)) || matches!(text(at), "+" | "-") && is_binary(at),
        _ => false,
    };
    let mut changes: Vec<(usize, usize, String)> = Vec::new();
    let mut wrap = |first: usize, last: usize| {
        if first < last || tokens[first].kind != Kind::Text {
            changes.push((tokens[first].start, tokens[first].start, "(".to_owned()));
            changes.push((tokens[last].end, tokens[last].end, ")|string".to_owned()));
        }
    };
    for at in (0..tokens.len()).filter(|at| text(*at) == "~") {
        let depth = tokens[at].depth;
        let is_end = |other: usize| tokens[other].depth < depth || tokens[other].depth == depth && ends(other);
        let before = (0..at).rev().find(|other| is_end(*other));
        let first = before.map_or(0, |other| other + 1);
        // The argument of a test.
        if before.is_some_and(|other| (other.saturating_sub(2)..=other).any(|near| text(near) == "is")) {
            continue;
        }
        // The one on the left of a chain was the right one of the sign before.
        if first < at && before.is_none_or(|other| text(other) != "~") {
            wrap(first, at - 1);
        }
        let behind = (at + 1..tokens.len()).find(|other| is_end(*other)).unwrap_or(tokens.len());
        let is_tested = behind < tokens.len() && text(behind) == "is" && tokens[behind].depth == depth;
        if at + 1 < behind && !is_tested {
            wrap(at + 1, behind - 1);
        }
    }
    for at in 0..tokens.len() {
        let token = &tokens[at];
        match text(at) {
            "self" if word(at) && text(at + 1) != "." => return Err("`self` by itself is not known here".to_owned()),
            name if word(at) && macros.contains(&name) && text(at + 1) == "." && text(at + 2) == "arguments" => {
                return Err(format!("the arguments of the macro `{name}` are not known here"));
            }
            "range" if word(at) && is_sliced(&text, tokens, at + 1) => {
                return Err("a slice of a range is not known here".to_owned());
            }
            literal if token.kind == Kind::Text && literal.contains('\\') => {
                changes.push((token.start, token.end, escapes(literal)?));
            }
            _ => {}
        }
    }
    changes.sort_by_key(|(start, end, _)| (*start, *end));
    let (mut out, mut copied) = (String::with_capacity(source.len()), 0);
    for (start, end, other) in changes {
        out.push_str(&source[copied..start]);
        out.push_str(&other);
        copied = end;
    }
    out.push_str(&source[copied..]);
    Ok(out)
}

/// Whether the call whose bracket is the token at `open` has a slice behind it.
fn is_sliced<'a>(text: &dyn Fn(usize) -> &'a str, tokens: &[Token], open: usize) -> bool {
    let end = |open: usize| (open + 1..tokens.len()).find(|at| tokens[*at].depth == tokens[open].depth);
    let Some(index) = tokens.get(open).filter(|_| text(open) == "(").and_then(|_| end(open)).map(|end| end + 1) else {
        return false;
    };
    let inside = tokens.get(index).filter(|_| text(index) == "[").and_then(|_| Some(index + 1..end(index)?));
    inside.is_some_and(|mut inside| inside.any(|at| text(at) == ":" && tokens[at].depth == tokens[index].depth + 1))
}

/// A string whose escapes are Python's in the engine's.
fn escapes(literal: &str) -> Result<String, String> {
    let mut out = String::with_capacity(literal.len());
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('a') => out.push_str("\\x07"),
            Some('v') => out.push_str("\\x0b"),
            Some('/') => out.push_str("\\\\/"),
            Some('\n') => {}
            Some('U') => {
                let digits: String = chars.by_ref().take(8).collect();
                let code = u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32);
                out.push(code.filter(|_| digits.len() == 8).ok_or(format!("`\\U{digits}` is no character"))?);
            }
            Some('N') => return Err("characters by their names (`\\N{…}`) are not known here".to_owned()),
            Some(other) => out.extend(['\\', other]),
            None => out.push('\\'),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_what_jinja2_takes_for_them() {
        for (source, expected) in [
            ("{{ a ~ 'b' }}", "{{ (a)|string ~ 'b' }}"),
            ("{{a~b~c}}", "{{(a)|string~(b)|string~(c)|string}}"),
            ("{{ x * 2 ~ -y|f(1, 2) }}", "{{ (x * 2)|string ~ (-y|f(1, 2))|string }}"),
            ("{{ 1 + a ~ b - c }}", "{{ 1 + (a)|string ~ (b)|string - c }}"),
            ("{{ {'k': a ~ b}[c ~ 'd'] }}", "{{ {'k': (a)|string ~ (b)|string}[(c)|string ~ 'd'] }}"),
            ("{{ f(a ~ b, k=c.in ~ d[0]) }}", "{{ f((a)|string ~ (b)|string, k=(c.in)|string ~ (d[0])|string) }}"),
            ("{% if not a ~ b in c %}", "{% if not (a)|string ~ (b)|string in c %}"),
            (
                "{%- set x = a ~ (b ~ 'c') if d else 'e' ~ f -%}",
                "{%- set x = (a)|string ~ (((b)|string ~ 'c'))|string if d else 'e' ~ (f)|string -%}",
            ),
            ("{{ a ~ b is string }}", "{{ (a)|string ~ b is string }}"),
            ("{{ a is eq b ~ c }}", "{{ a is eq b ~ c }}"),
            ("{{ a is not in b ~ c }}", "{{ a is not in b ~ c }}"),
            ("{{ a is not eq b ~ c }}", "{{ a is not eq b ~ c }}"),
            (
                "{# a ~ b #}~{% raw %}{{ a ~ b }}{%- endraw %}{{ ' ~ ' }}",
                "{# a ~ b #}~{% raw %}{{ a ~ b }}{%- endraw %}{{ ' ~ ' }}",
            ),
            ("{{ '}}' ~ {'a': {}} }}{{ '\\'' ~ a }}", "{{ '}}' ~ ({'a': {}})|string }}{{ '\\'' ~ (a)|string }}"),
            ("{{ 1e+5 ~ 0x1f ~ 1.5 }}", "{{ (1e+5)|string ~ (0x1f)|string ~ (1.5)|string }}"),
            ("{{ a ~ ", "{{ a ~ "),
            ("{ a ~ b } {", "{ a ~ b } {"),
            ("{{ '\\a\\v\\/\\n\\q\\U0001f600' }}", "{{ '\\x07\\x0b\\\\/\\n\\q😀' }}"),
        ] {
            assert_eq!(spelt(source).as_deref(), Ok(expected), "{source}");
        }
        for source in [
            "{{ self is defined }}",
            "{{ '\\N{DASH}' }}",
            "{% macro f(a) %}{% endmacro %}{{ f.arguments }}",
            "{{ '\\U00110000' }}",
        ] {
            assert!(spelt(source).is_err(), "{source}");
        }
        assert!(spelt("{{ self.b() }}{{ a.self }}{{ f.arguments }}").is_ok());
    }
}
