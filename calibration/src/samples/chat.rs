//! The model's own chat template, rendered as transformers renders it.
//!
//! Templates are Jinja with Python habits: string and dict methods, `tojson` as `json.dumps`, `raise_exception`,
//! loop controls, blocks trimmed on both sides. minijinja does the work; what it lacks is filled in here.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde::Serialize;

use super::dumps::{self, dumps};
use super::guard::{Guard, guarded};
use super::record::REASONING;
use super::{Message, SampleError, jinja, spelling};

const NAME: &str = "chat_template";

/// What to say of a template over which the library gives up without a word.
const BROKEN: &str = "the template engine fails on it";

/// Bytes that a template may write of any conversation (16 MiB), and how much longer than a long one its text may be.
const LONGEST: usize = 16 << 20;
const LONGER: usize = 16;

/// Steps that a template may take for one conversation, so that one without end is an error; usual ones take some dozens a turn.
const STEPS: u64 = 20_000_000;

/// A parsed chat template and the special tokens that it may print.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Where it stands, for messages.
    file: String,
    guard: Guard,
    /// The one for conversations with tools.
    with_tools: Option<Box<ChatTemplate>>,
}

#[derive(Serialize)]
struct Context {
    messages: Vec<serde_json::Value>,
    tools: Option<Vec<serde_json::Value>>,
    documents: Option<()>,
    add_generation_prompt: bool,
}

impl ChatTemplate {
    /// Parses a template that stands in `file`; `bos` and `eos` become its `bos_token` and `eos_token`.
    ///
    /// Fails on a syntax error, with its line. A template that asks for today's date gets 26 July 2024, the date that
    /// Llama's template falls back to: the same input must give the same output on every day.
    pub fn new(file: &str, source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, SampleError> {
        Self::guarded(file, source, [bos, eos], &None)
    }

    /// [`ChatTemplate::new`] of a template that is parsed and rendered within `guard`.
    pub fn guarded(
        file: &str,
        source: &str,
        [bos, eos]: [Option<&str>; 2],
        guard: &Guard,
    ) -> Result<Self, SampleError> {
        let located = |error| template_error(file, error);
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(located)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(STEPS));
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        jinja::complete(&mut environment);
        environment.add_filter("tojson", dumps::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| strftime(format));
        // A token that the model lacks stays undefined and prints as nothing.
        for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
            if let Some(token) = token {
                environment.add_global(name, token);
            }
        }
        let parse = || {
            let unknown = |why| Error::new(ErrorKind::InvalidOperation, why);
            let spelt = spelling::spelt(&without_generation_tags(source)).map_err(unknown)?;
            environment.add_template_owned(NAME, spelt)
        };
        guarded(guard, source.len(), BROKEN, parse).map_err(|problem| failing(file, problem))?.map_err(located)?;
        Ok(Self { environment, file: file.to_owned(), guard: guard.clone(), with_tools: None })
    }

    /// The file in which it stands.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Defines one more variable, such as `pad_token` or `unk_token`.
    pub fn with_variable(mut self, name: &str, value: &str) -> Self {
        self.environment.add_global(name.to_owned(), value);
        self
    }

    /// Takes `other` for conversations with tools.
    pub(super) fn with_tools(mut self, other: ChatTemplate) -> Self {
        self.with_tools = Some(Box::new(other));
        self
    }

    /// The conversation as the model was trained to see it, without a prompt for a further answer; `tools` are what it may call.
    ///
    /// The turns are given as transformers gives them, the arguments of calls as objects. Where the template refuses that, it gets them
    /// as OpenAI's API has them, which DeepSeek's templates for calls are written for, and at last with an empty content in
    /// turns that only call, which is what vLLM gives. Fails where the template refuses all of these (`raise_exception`) or trips over
    /// a message.
    pub fn render(&self, messages: &[Message], tools: &[serde_json::Value]) -> Result<String, SampleError> {
        if let (Some(other), false) = (&self.with_tools, tools.is_empty()) {
            return other.render(messages, tools);
        }
        let mut refusal = None;
        let mut tried: Vec<Vec<serde_json::Value>> = Vec::new();
        for form in [Form::Documented, Form::Raw, Form::Filled] {
            let messages: Vec<serde_json::Value> = messages.iter().map(|message| form.fields(message)).collect();
            if tried.contains(&messages) {
                continue;
            }
            match self.rendered(messages.clone(), tools) {
                Ok(text) => return Ok(text),
                Err(error @ SampleError::Endless { .. }) => return Err(error),
                Err(error) => drop(refusal.get_or_insert(error)),
            }
            tried.push(messages);
        }
        Err(refusal.expect("the first form is always tried"))
    }

    pub(super) fn rendered(
        &self,
        messages: Vec<serde_json::Value>,
        tools: &[serde_json::Value],
    ) -> Result<String, SampleError> {
        let tools = (!tools.is_empty()).then(|| tools.to_vec());
        let context = Context { messages, tools, documents: None, add_generation_prompt: false };
        let bytes: usize = context.messages.iter().map(|message| message.to_string().len()).sum();
        let render = || self.environment.get_template(NAME)?.render(Value::from(Serde(context)));
        let rendered = guarded(&self.guard, bytes, BROKEN, render).map_err(|problem| failing(&self.file, problem))?;
        let text = rendered.map_err(|error| template_error(&self.file, error))?;
        let most = LONGEST.max(bytes.saturating_mul(LONGER));
        if text.len() > most {
            let problem = format!("it makes {} bytes of a conversation of {bytes}", text.len());
            return Err(SampleError::Endless { file: self.file.clone(), problem });
        }
        Ok(text)
    }
}

/// How turns that call tools are given to a template.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// Fields that are null are left out, as transformers does, and arguments are objects, as it asks for.
    Documented,
    /// What is null is none, and arguments are JSON text, as OpenAI's API has both.
    Raw,
    /// Documented, and a content that is not there is empty.
    Filled,
}

impl Form {
    /// A message as the template sees it: the reasoning, where there is some, under each name that templates know it by.
    fn fields(self, message: &Message) -> serde_json::Value {
        let reasoning = REASONING.iter().find_map(|&name| message.extra.get(name).filter(|value| !value.is_null()));
        let mut fields = serde_json::Map::new();
        if let Some(reasoning) = reasoning {
            fields.insert("thinking".to_owned(), reasoning.clone());
        }
        fields.insert("role".to_owned(), message.role.as_str().into());
        let content = match (self, &message.content) {
            (Form::Filled, serde_json::Value::Null) => "".into(),
            (_, content) => content.clone(),
        };
        fields.insert("content".to_owned(), content);
        fields.extend(message.extra.clone());
        if let Some(reasoning) = reasoning {
            fields.insert("reasoning_content".to_owned(), reasoning.clone());
        }
        if self != Form::Raw {
            fields.retain(|_, value| !value.is_null());
        }
        if let Some(serde_json::Value::Array(calls)) = fields.get_mut("tool_calls") {
            calls.iter_mut().for_each(if self == Form::Raw { with_text } else { with_object });
        }
        fields.into()
    }
}

/// Arguments of a call as an object, where they are JSON text or missing; what vLLM does to each request.
fn with_object(call: &mut serde_json::Value) {
    let Some(function) = call.get_mut("function").and_then(serde_json::Value::as_object_mut) else { return };
    let parsed = match function.get("arguments") {
        None | Some(serde_json::Value::Null) => serde_json::json!({}),
        Some(serde_json::Value::String(text)) if text.trim().is_empty() => serde_json::json!({}),
        Some(serde_json::Value::String(text)) => match serde_json::from_str(text) {
            Ok(value) => value,
            Err(_) => return,
        },
        Some(_) => return,
    };
    function.insert("arguments".to_owned(), parsed);
}

/// Arguments of a call as JSON text, where they are an object.
fn with_text(call: &mut serde_json::Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    if arguments.is_object()
        && let Ok(text) = dumps(&Value::from(Serde(arguments.clone())))
    {
        *arguments = text.into();
    }
}

fn failing(file: &str, problem: String) -> SampleError {
    SampleError::Template { file: file.to_owned(), problem }
}

fn template_error(file: &str, error: Error) -> SampleError {
    let what = match error.kind() {
        ErrorKind::OutOfFuel => {
            let problem = format!("it takes more than {STEPS} steps for one conversation");
            return SampleError::Endless { file: file.to_owned(), problem };
        }
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    let what = what.split_whitespace().collect::<Vec<_>>().join(" ");
    let problem = match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    };
    failing(file, problem)
}

/// Replaces transformers' `{% generation %}` … `{% endgeneration %}`, which only mark the assistant's tokens, by a plain scope.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}").map(|at| open + at) else { break };
        let tag = &rest[open + 2..close];
        let word = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        out.push_str(&rest[..open + 2]);
        match word {
            "generation" => out.push_str(&tag.replace("generation", "with")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endwith")),
            _ => out.push_str(tag),
        }
        out.push_str("%}");
        rest = &rest[close + 2..];
    }
    out.push_str(rest);
    out
}

/// Python's `strftime` at noon of Friday, 26 July 2024 (see [`ChatTemplate::new`]).
fn strftime(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let code = match chars.next() {
            // glibc's "no padding".
            Some('-') => chars.next(),
            code => code,
        };
        out.push_str(match code {
            Some('d') => "26",
            Some('b' | 'h') => "Jul",
            Some('B') => "July",
            Some('m') => {
                if format.contains("%-m") {
                    "7"
                } else {
                    "07"
                }
            }
            Some('Y') => "2024",
            Some('y') => "24",
            Some('a') => "Fri",
            Some('A') => "Friday",
            Some('j') => "208",
            Some('u' | 'w') => "5",
            Some('H' | 'I') => "12",
            Some('M' | 'S') => "00",
            Some('p') => "PM",
            Some('F') => "2024-07-26",
            Some('T') => "12:00:00",
            Some('D') => "07/26/24",
            Some('Z') => "UTC",
            Some('z') => "+0000",
            Some('%') => "%",
            other => {
                let code = other.map_or_else(|| "%".to_owned(), |c| format!("%{c}"));
                return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know `{code}`")));
            }
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String, String> {
        ChatTemplate::new("t.jinja", source, Some("<s>"), None)
            .and_then(|t| t.render(messages, &[]))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn refusals_and_syntax_errors_are_one_sentence() {
        let refused = render("{% if true %}\n{{ raise_exception('roles must\nalternate') }}{% endif %}", &[]);
        assert_eq!(refused.unwrap_err(), "t.jinja: chat template: roles must alternate (line 2)");
        let broken = render("line\n{% if %}", &[]).unwrap_err();
        assert!(broken.starts_with("t.jinja: chat template: ") && broken.ends_with("(line 2)"), "{broken}");
        let missing = render("{{ messages[0].content.nope.nope }}", &[Message::new("user", "a")]).unwrap_err();
        assert!(missing.starts_with("t.jinja: chat template: "), "{missing}");
    }

    #[test]
    fn a_missing_token_prints_nothing() {
        assert_eq!(render("{{ bos_token }}|{{ eos_token }}|{{ tools }}", &[]).unwrap(), "<s>||None");
        let pad =
            ChatTemplate::new("t.jinja", "{{ pad_token }}", None, None).unwrap().with_variable("pad_token", "<pad>");
        assert_eq!(pad.render(&[], &[]).unwrap(), "<pad>");
    }

    #[test]
    fn conversations_with_tools_have_a_template_of_their_own() {
        let template = |source: &str| ChatTemplate::new("t.jinja", source, None, None).unwrap();
        let both = template("plain").with_tools(template("{{ tools|length }} tools"));
        let messages = [Message::new("user", "a")];
        assert_eq!(both.render(&messages, &[]).unwrap(), "plain");
        assert_eq!(both.render(&messages, &[serde_json::json!({})]).unwrap(), "1 tools");
    }

    #[test]
    fn the_date_stands_still() {
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}", &[]).unwrap(), "26 Jul 2024");
        assert_eq!(render("{{ strftime_now('%A, %B %-d, %-m 100%%') }}", &[]).unwrap(), "Friday, July 26, 7 100%");
        assert!(render("{{ strftime_now('%Q') }}", &[]).unwrap_err().contains("does not know `%Q`"));
    }

    #[test]
    fn generation_tags_are_scopes() {
        let source =
            "{%- generation -%} a {%- endgeneration %}|{% generation%}\nb{% endgeneration %}{% if true %}c{% endif %}";
        assert_eq!(render(source, &[]).unwrap(), "a|bc");
        assert_eq!(without_generation_tags("{% unclosed"), "{% unclosed");
    }
}
