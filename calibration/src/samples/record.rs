//! One record of a data set, as JSON, into a document: the forms that people train and calibrate on.

use serde_json::{Map, Value, json};

pub(super) use super::guess::Guess;
use super::guess::Told;
use super::json::HALF;
use super::{Document, Message, media};

/// Fields that hold a conversation, in the order in which they are looked for.
const CONVERSATIONS: &[&str] = &["messages", "conversations", "conversation", "dialogue", "dialog", "contents"];

/// Fields that hold what is asked.
const PROMPTS: &[&str] = &["prompt", "question", "instruction", "query", "problem", "inputs", "input"];

/// Fields that hold what is answered.
const COMPLETIONS: &[&str] = &["completion", "response", "answer", "output", "solution", "targets", "chosen"];

/// Fields that add to what is asked.
const ADDITIONS: &[&str] = &["input", "context"];

/// Fields that hold a system prompt.
const SYSTEMS: &[&str] = &["system", "system_prompt", "system_message", "systemInstruction", "system_instruction"];

/// Fields that hold running text where a record has nothing else.
const TEXTS: &[&str] = &["content", "raw_content", "article", "document", "passage", "code", "prompt", "chosen"];

/// Fields under which another program packed the record itself.
pub(super) const WRAPPERS: &[&str] = &["row", "body", "data"];

/// The field of a preference that is never read.
pub(super) const REJECTED: &str = "rejected";

/// Roles that chat templates are written for; `message` makes others into these.
const ROLES: &[&str] = &["system", "user", "assistant", "tool", "developer", "ipython"];

/// A record that was read.
#[derive(Debug, PartialEq)]
pub(super) struct Record {
    pub document: Document,
    /// What was guessed or passed over in reading it.
    pub guesses: Vec<Guess>,
}

/// Whether a column of this name may take part in a record.
pub(super) fn is_known(column: &str) -> bool {
    let others = ["text", "tools", "functions", "history"];
    [CONVERSATIONS, PROMPTS, COMPLETIONS, ADDITIONS, SYSTEMS, TEXTS, &others].iter().any(|set| set.contains(&column))
}

/// Whether a column of this name may take part in a record, or is told of where it is not read.
pub(super) fn is_told(column: &str) -> bool {
    is_known(column) || column == REJECTED || media::is_media(column)
}

/// What to say where two columns that are known have one name, of which nobody can tell which is meant.
pub(super) fn twice<'c>(columns: impl Iterator<Item = &'c str>) -> Option<String> {
    let mut seen = std::collections::HashSet::new();
    let mut known = columns.filter(|column| is_known(column));
    let twice = known.find(|column| !seen.insert(*column))?;
    Some(format!("two columns are called `{twice}`: rename one, or leave it out"))
}

/// Whether a column of this name makes a record by itself or with another one.
pub(super) fn is_content(column: &str) -> bool {
    column == "text" || [CONVERSATIONS, PROMPTS, COMPLETIONS, TEXTS].iter().any(|set| set.contains(&column))
}

/// Whether a field of this name holds a conversation.
pub(super) fn is_conversation(key: &str) -> bool {
    CONVERSATIONS.contains(&key)
}

/// Whether every item of a list is one turn of a conversation.
pub(super) fn are_turns(list: &[Value]) -> bool {
    let turn = |item: &Value| {
        let has = |key| item.get(key).is_some();
        has("role") && (has("content") || has("tool_calls") || has("parts")) || has("from") && has("value")
    };
    !list.is_empty() && list.iter().all(turn)
}

/// Reads one record; the error says what it lacks.
pub(super) fn read(record: &Value) -> Result<Record, String> {
    let mut reader = Reader::default();
    let document = match record {
        Value::String(text) => Document::Plain(text.clone()),
        Value::Array(list) if are_turns(list) => {
            Document::Chat { messages: reader.turns("list", list)?, tools: Vec::new() }
        }
        Value::Array(_) => return Err("expected a list of messages with `role` and `content`".to_owned()),
        Value::Object(fields) => reader.object(fields)?,
        other => return Err(format!("expected a JSON object, found {}", kind(other))),
    };
    if held(&document) {
        return Err("holds half a surrogate pair, which no tokenizer takes".to_owned());
    }
    Ok(Record { document, guesses: reader.guesses })
}

/// Whether half a surrogate pair stands in what was read.
fn held(document: &Document) -> bool {
    let within = |value: &Value| value.to_string().contains(HALF);
    match document {
        Document::Plain(text) => text.contains(HALF),
        Document::Pair { prompt, completion } => prompt.contains(HALF) || completion.contains(HALF),
        Document::Chat { messages, tools } => {
            let of = |message: &Message| {
                message.role.contains(HALF)
                    || within(&message.content)
                    || message.extra.iter().any(|(key, value)| key.contains(HALF) || within(value))
            };
            messages.iter().any(of) || tools.iter().any(within)
        }
    }
}

/// A field's value, where it is there and not null.
fn given<'a>(fields: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    fields.get(key).filter(|value| !value.is_null())
}

/// One half of a record: text, or turns of a conversation.
enum Half {
    Text(String),
    Turns(Vec<Message>),
}

impl Half {
    fn turns(self, role: &str) -> Vec<Message> {
        match self {
            Half::Text(text) => vec![Message::new(role, text)],
            Half::Turns(turns) => turns,
        }
    }
}

#[derive(Default)]
struct Reader {
    guesses: Vec<Guess>,
    /// The fields that were read.
    read: Vec<String>,
}

impl Reader {
    fn object(&mut self, fields: &Map<String, Value>) -> Result<Document, String> {
        let mut document = self.fields(fields)?;
        if let Some(guess) = media::leave_out(&mut document, fields) {
            self.guess(guess);
        }
        let told = Told::new(&document);
        let other = |(key, value): &(&String, &Value)| is_known(key) && !self.read.contains(key) && !told.holds(value);
        // What a chat template gets beside the turns is no text of the record.
        let others: Vec<String> = fields
            .iter()
            .filter(|(key, _)| !["tools", "functions"].contains(&key.as_str()))
            .filter(other)
            .map(|(key, _)| key.clone())
            .collect();
        if !others.is_empty() {
            self.guess(Guess::Unread { read: self.read.clone(), others });
        }
        if self.read.iter().any(|key| key == "chosen") && given(fields, REJECTED).is_some() {
            self.guess(Guess::Rejected);
        }
        Ok(document)
    }

    /// Notes a guess about the record, once.
    fn guess(&mut self, guess: Guess) {
        match self.guesses.iter_mut().find(|known| known.is_of_kind(&guess)) {
            Some(known) => known.join(guess),
            None => self.guesses.push(guess),
        }
    }

    /// Notes the cells that a row of Hugging Face's viewer lacks the end of.
    fn truncated(&mut self, row: &Map<String, Value>) {
        let cells = row.get("truncated_cells").and_then(Value::as_array).into_iter().flatten();
        let cells: Vec<String> =
            cells.filter_map(Value::as_str).filter(|cell| is_known(cell)).map(str::to_owned).collect();
        if !cells.is_empty() {
            self.guess(Guess::Truncated(cells));
        }
    }

    fn reads(&mut self, keys: &[&str]) {
        self.read = keys.iter().map(|key| (*key).to_owned()).collect();
    }

    fn fields(&mut self, fields: &Map<String, Value>) -> Result<Document, String> {
        let plain = fields.get("text").is_some_and(Value::is_string);
        if let Some(Value::String(text)) = fields.get("text")
            && !text.trim().is_empty()
        {
            self.reads(&["text"]);
            return Ok(Document::Plain(text.clone()));
        }
        for key in CONVERSATIONS {
            if let Some(value) = given(fields, key) {
                // A row of blank text may have an empty list beside it.
                if plain && value.as_array().is_some_and(Vec::is_empty) {
                    continue;
                }
                self.reads(&[key]);
                let mut messages = system(fields)?;
                let list = list(value).ok_or_else(|| match value.as_str().is_some_and(is_python_turns) {
                    true => format!("`{key}` {PYTHON_LIST}"),
                    false => format!("`{key}` must be a list of messages, found {}", kind(value)),
                })?;
                let turns = self.turns(key, &list)?;
                if turns.first().is_some_and(|first| first.role == "system") {
                    messages.clear();
                }
                messages.extend(turns);
                return self.chat(key, messages, fields);
            }
        }
        if let Some(document) = self.pair(fields)? {
            return Ok(document);
        }
        for key in WRAPPERS {
            match given(fields, key) {
                Some(Value::Object(inner)) => {
                    self.truncated(fields);
                    return self.object(inner);
                }
                Some(Value::Array(turns)) if turns.len() > 1 && turns.iter().all(Value::is_string) => {
                    self.reads(&[key]);
                    let messages = self.turns(key, turns)?;
                    return self.chat(key, messages, fields);
                }
                _ => {}
            }
        }
        if fields.contains_key("role") && fields.contains_key("content") {
            self.reads(&["content"]);
            let messages = self.turns("message", &[Value::Object(fields.clone())])?;
            return self.chat("message", messages, fields);
        }
        for key in TEXTS {
            if let Some(value) = given(fields, key) {
                self.reads(&[key]);
                return match self.half(key, value)? {
                    Half::Text(text) => Ok(Document::Plain(text)),
                    Half::Turns(turns) => self.chat(key, turns, fields),
                };
            }
        }
        match fields.get("text") {
            Some(Value::String(blank)) => Ok(Document::Plain(blank.clone())),
            Some(other) => Err(is_not("text", other)),
            None => Err(self.nothing(fields)),
        }
    }

    /// What to say of a record in which there is nothing to read.
    fn nothing(&self, fields: &Map<String, Value>) -> String {
        let known = fields.iter().find(|(key, value)| value.is_null() && is_content(key));
        if let Some((key, value)) = known {
            return is_not(key, value);
        }
        let misspelt = |key: &&String| !is_content(key) && is_content(&key.trim().to_ascii_lowercase());
        if let Some(key) = fields.keys().find(misspelt) {
            return format!(
                "`{key}` is not the name of a field that is read; call it `{}`",
                key.trim().to_ascii_lowercase()
            );
        }
        let keys: Vec<&str> = fields.keys().take(8).map(String::as_str).collect();
        format!(
            "expected `text`, `messages`, `conversations`, or `prompt` with `completion`; found {}",
            if keys.is_empty() { "no key at all".to_owned() } else { format!("`{}`", keys.join("`, `")) }
        )
    }

    fn chat(&mut self, key: &str, messages: Vec<Message>, fields: &Map<String, Value>) -> Result<Document, String> {
        if messages.is_empty() {
            return Err(format!("`{key}` is empty"));
        }
        if messages.iter().all(Message::is_blank) {
            return Err(format!("`{key}` holds no text"));
        }
        Ok(Document::Chat { messages, tools: tools(fields)? })
    }

    /// What is asked and what is answered, in any of its spellings.
    fn pair(&mut self, fields: &Map<String, Value>) -> Result<Option<Document>, String> {
        let find = |keys: &[&'static str]| keys.iter().find_map(|key| given(fields, key).map(|value| (*key, value)));
        let (Some((asked, prompt)), Some((answered, completion))) = (find(PROMPTS), find(COMPLETIONS)) else {
            return Ok(None);
        };
        let (mut prompt, completion) = (self.half(asked, prompt)?, self.half(answered, completion)?);
        self.reads(&[asked, answered]);
        if let Half::Text(text) = &mut prompt {
            for key in ADDITIONS.iter().filter(|key| **key != asked) {
                if let Some(more) = given(fields, key) {
                    let more = string(key, more)?;
                    if text.trim().is_empty() {
                        *text = more;
                    } else if !more.trim().is_empty() {
                        *text = format!("{text}\n\n{more}");
                    }
                }
            }
        }
        let mut before = system(fields)?;
        before.extend(history(fields)?);
        let (turns, texts) = match (prompt, completion) {
            // A preference often repeats the prompt in front of the answer.
            (Half::Turns(prompt), Half::Turns(whole)) if whole.starts_with(&prompt) => (whole, None),
            (Half::Text(_), Half::Turns(whole)) if whole.iter().any(|turn| turn.role == "user") => (whole, None),
            (Half::Text(prompt), Half::Text(completion)) => (Vec::new(), Some((prompt, completion))),
            (prompt, completion) => ([prompt.turns("user"), completion.turns("assistant")].concat(), None),
        };
        let tools = tools(fields)?;
        let blank = |text: &str| text.trim().is_empty();
        let empty = match &texts {
            Some((prompt, completion)) => blank(prompt) && blank(completion),
            None => turns.iter().all(Message::is_blank),
        };
        if empty && before.iter().all(Message::is_blank) {
            // A row of blank text, as evaluation counts it, may have empty fields beside it.
            return match fields.get("text") {
                Some(Value::String(_)) => Ok(None),
                _ => Err(format!("`{asked}` and `{answered}` are blank")),
            };
        }
        if let Some((prompt, completion)) = &texts {
            for (key, text, other) in [(asked, prompt, answered), (answered, completion, asked)] {
                if blank(text) {
                    self.guess(Guess::Half { blank: key.to_owned(), beside: other.to_owned() });
                }
            }
        }
        Ok(Some(match texts {
            Some((prompt, completion)) if before.is_empty() && tools.is_empty() => {
                Document::Pair { prompt, completion }
            }
            Some((prompt, completion)) => {
                before.extend([Message::new("user", prompt), Message::new("assistant", completion)]);
                Document::Chat { messages: before, tools }
            }
            None => {
                if turns.first().is_some_and(|first| first.role == "system") {
                    before.clear();
                }
                before.extend(turns);
                Document::Chat { messages: before, tools }
            }
        }))
    }

    fn half(&mut self, key: &str, value: &Value) -> Result<Half, String> {
        match value {
            Value::Object(turn) if turn.contains_key("role") => {
                Ok(Half::Turns(self.turns(key, std::slice::from_ref(value))?))
            }
            Value::Array(items) if are_turns(items) => Ok(Half::Turns(self.turns(key, items)?)),
            // A list of turns in a cell of a table.
            Value::String(text) => match list(value) {
                Some(items) if are_turns(&items) => Ok(Half::Turns(self.turns(key, &items)?)),
                _ if is_python_turns(text) => Err(format!("`{key}` {PYTHON_LIST}")),
                _ => Ok(Half::Text(text.clone())),
            },
            other => Err(is_not(key, other)),
        }
    }

    fn turns(&mut self, key: &str, items: &[Value]) -> Result<Vec<Message>, String> {
        let mut messages = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let located = |problem: String| format!("`{key}[{index}]`: {problem}");
            let both = |a: &str, b: &str| Some((item.get(a)?.as_str()?, item.get(b)?.as_str()?));
            match item {
                // Turns of two people, one after the other.
                Value::String(text) => {
                    self.guess(Guess::InTurn(key.to_owned()));
                    messages.push(Message::new(["user", "assistant"][index % 2], text));
                }
                _ => match both("input", "output") {
                    Some((input, output)) => {
                        messages.extend([Message::new("user", input), Message::new("assistant", output)]);
                    }
                    None => {
                        let (message, more) = message(item).map_err(located)?;
                        if more {
                            self.guess(Guess::MoreThanText);
                        }
                        if !ROLES.contains(&message.role.as_str()) {
                            self.guess(Guess::Role(vec![message.role.clone()]));
                        }
                        messages.push(message);
                    }
                },
            }
        }
        Ok(messages)
    }
}

/// What to say of a cell with a list that is not JSON.
const PYTHON_LIST: &str = "is a list as Python prints it, which is not JSON; write it with `json.dumps`";

/// Whether a text is a list of turns as Python prints it, which tables often have in their cells.
fn is_python_turns(text: &str) -> bool {
    let inside = text.trim_start().strip_prefix('[').map(str::trim_start).and_then(|rest| rest.strip_prefix('{'));
    inside.is_some_and(|rest| {
        ["'role'", "'content'", "'from'", "'value'"].iter().any(|key| rest.trim_start().starts_with(key))
    })
}

/// A list, or the JSON text of one: what a table has in a cell.
fn list(value: &Value) -> Option<Vec<Value>> {
    match value {
        Value::Array(items) => Some(items.clone()),
        Value::String(text) if text.trim_start().starts_with('[') => match serde_json::from_str(text) {
            Ok(Value::Array(items)) => Some(items),
            _ => None,
        },
        _ => None,
    }
}

/// The system prompt that stands beside a conversation, where there is one.
fn system(fields: &Map<String, Value>) -> Result<Vec<Message>, String> {
    for key in SYSTEMS {
        if let Some(value) = given(fields, key) {
            // Gemini's is a turn without a role.
            let parts = value.get("parts").and_then(Value::as_array);
            let text = match parts {
                Some(parts) => parts.iter().filter_map(part_text).collect::<Vec<_>>().join("\n\n"),
                None => string(key, value)?,
            };
            if !text.trim().is_empty() {
                return Ok(vec![Message::new("system", text)]);
            }
        }
    }
    Ok(Vec::new())
}

/// Earlier questions and answers that stand beside a pair.
fn history(fields: &Map<String, Value>) -> Result<Vec<Message>, String> {
    let Some(Value::Array(pairs)) = given(fields, "history") else { return Ok(Vec::new()) };
    let mut messages = Vec::with_capacity(2 * pairs.len());
    for pair in pairs {
        let (Some(asked), Some(answered)) = (pair[0].as_str(), pair[1].as_str()) else {
            return Err("`history` must be a list of questions with their answers".to_owned());
        };
        messages.extend([Message::new("user", asked), Message::new("assistant", answered)]);
    }
    Ok(messages)
}

/// The tools that a conversation may call, each as `{"type": "function", "function": {…}}`, as templates are written for.
fn tools(fields: &Map<String, Value>) -> Result<Vec<Value>, String> {
    for key in ["tools", "functions"] {
        let Some(value) = given(fields, key) else { continue };
        if value.as_str().is_some_and(|text| text.trim().is_empty()) {
            continue;
        }
        let bad = || format!("`{key}` must be a list of objects, or the JSON text of one, found {}", kind(value));
        let items = list(value).ok_or_else(bad)?;
        // A cell of a table may hold each tool as text of its own.
        let item = |item: Value| match item {
            Value::String(text) => serde_json::from_str(&text).map_err(|_| bad()),
            other => Ok(other),
        };
        let items = items.into_iter().map(item).collect::<Result<Vec<Value>, _>>()?;
        if items.iter().any(|item| !item.is_object()) {
            return Err(bad());
        }
        return Ok(items.into_iter().map(as_function).collect());
    }
    Ok(Vec::new())
}

/// `{"name", …}` as `{"type": "function", "function": {"name", …}}`; what has that form already stays.
fn as_function(item: Value) -> Value {
    match item.get("name").is_some() && item.get("function").is_none() {
        true => json!({"type": "function", "function": item}),
        false => item,
    }
}

/// One turn; and whether it holds parts that are not text, which are left out.
pub(super) fn message(turn: &Value) -> Result<(Message, bool), String> {
    let Value::Object(fields) = turn else {
        return Err(format!("expected an object with `role` and `content`, found {}", kind(turn)));
    };
    let mut extra: Map<String, Value> = fields.clone();
    // `from`/`value` is the ShareGPT spelling, with role names of its own.
    let (named, content) = if given(fields, "role").is_some() {
        let content = extra.shift_remove("content").filter(|content| !content.is_null());
        (string("role", &fields["role"])?, content.or_else(|| extra.shift_remove("parts")))
    } else if given(fields, "from").is_some() {
        (string("from", &fields["from"])?, extra.shift_remove("value"))
    } else {
        return Err("expected `role` and `content`, or `from` and `value`".to_owned());
    };
    for key in ["role", "from"] {
        extra.shift_remove(key);
    }
    let role = match named.as_str() {
        "human" | "prompter" => "user",
        "gpt" | "chatgpt" | "bing" | "bard" | "bot" | "model" | "function_call" => "assistant",
        "observation" | "function_response" | "function" => "tool",
        other => other,
    };
    let mut content = content.unwrap_or(Value::Null);
    // The older spelling of a single call, and ShareGPT's, which has it as text.
    let older = extra.shift_remove("function_call").filter(|call| !call.is_null());
    let calls = if named == "function_call" {
        let text = string("value", &content)?;
        content = Value::Null;
        let calls: Value =
            serde_json::from_str(&text).map_err(|_| "a call of a function that is not JSON".to_owned())?;
        Some(if calls.is_array() { calls } else { json!([calls]) })
    } else if let Some(text) = extra.get("tool_calls").and_then(Value::as_str).filter(|text| !text.trim().is_empty()) {
        Some(serde_json::from_str(text).map_err(|_| "`tool_calls` is text that is not JSON".to_owned())?)
    } else {
        extra.get("tool_calls").filter(|calls| !calls.is_null()).cloned().or_else(|| older.map(|call| json!([call])))
    };
    match calls {
        Some(Value::Array(calls)) if !calls.is_empty() => {
            let calls: Vec<Value> = calls.into_iter().map(as_function).collect();
            calls.iter().try_for_each(check_call)?;
            extra.insert("tool_calls".to_owned(), calls.into());
        }
        // An empty list would send templates the way of a turn that calls something.
        _ => drop(extra.shift_remove("tool_calls")),
    }
    let calls = extra.contains_key("tool_calls");
    let reasoning = reasoning_in(&content);
    let (content, more) = match content {
        Value::String(text) => (text.into(), false),
        Value::Null if calls => (Value::Null, false),
        Value::Null => return Err(format!("a turn of `{role}` without content")),
        Value::Array(parts) if parts.iter().any(|part| part_text(part).is_some()) || role != "tool" => {
            let (thought, said): (Vec<&Value>, Vec<&Value>) =
                parts.iter().partition(|part| reasoning_of(part).is_some());
            let texts: Vec<&str> = said.iter().filter_map(|part| part_text(part)).collect();
            (texts.concat().into(), thought.len() + texts.len() < parts.len())
        }
        Value::Object(object) if part_text(&object.clone().into()).is_some() => {
            (part_text(&object.into()).unwrap_or_default().into(), false)
        }
        Value::Object(mut object) if object.get("parts").is_some_and(Value::is_array) => {
            let inner = json!({"role": role, "content": object["parts"].take()});
            let (message, more) = message(&inner)?;
            extra.extend(message.extra);
            (message.content, more)
        }
        // What a tool gave back may be any value; templates write it as JSON.
        result if role == "tool" => (result, false),
        other => return Err(format!("the content must be a string, found {}", kind(&other))),
    };
    // Templates are given it apart from what is said, as servers that take such parts give it to them.
    if let Some(reasoning) = reasoning.filter(|_| !REASONING.iter().any(|key| given(&extra, key).is_some())) {
        extra.insert(REASONING[0].to_owned(), reasoning.into());
    }
    Ok((Message { role: role.to_owned(), content, extra }, more))
}

/// Fields of a turn that hold what was thought before it was said; the first is what chat templates call it.
pub(super) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// What was thought, where a content lists it among its parts.
fn reasoning_in(content: &Value) -> Option<String> {
    let thought = content.as_array()?.iter().filter_map(reasoning_of).filter(|text| !text.trim().is_empty());
    let thought: Vec<String> = thought.collect();
    (!thought.is_empty()).then(|| thought.join("\n\n"))
}

/// What was thought, as one part of a content holds it: `{"type": "thinking", "thinking": …}` of Anthropic's API and (as a list of texts) of
/// Mistral's, `{"type": "reasoning", "text": …}` of others.
fn reasoning_of(part: &Value) -> Option<String> {
    if !["thinking", "reasoning"].contains(&part.get("type")?.as_str()?) {
        return None;
    }
    let keys = ["thinking", "reasoning", "text", "content", "summary"];
    let found = keys.iter().filter_map(|key| part.get(*key)).find_map(|value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(texts) if !texts.is_empty() => Some(texts.iter().filter_map(part_text).collect()),
        _ => None,
    });
    Some(found.unwrap_or_default())
}

/// The text of one part of a content.
fn part_text(part: &Value) -> Option<&str> {
    part.as_str().or_else(|| part.get("text")?.as_str())
}

/// Refuses a call whose arguments are text, yet not JSON.
fn check_call(call: &Value) -> Result<(), String> {
    match call.pointer("/function/arguments") {
        Some(Value::String(text)) if !text.trim().is_empty() && serde_json::from_str::<Value>(text).is_err() => {
            Err("the arguments of a call are text that is not JSON".to_owned())
        }
        _ => Ok(()),
    }
}

fn string(key: &str, value: &Value) -> Result<String, String> {
    value.as_str().map(str::to_owned).ok_or_else(|| is_not(key, value))
}

fn is_not(key: &str, value: &Value) -> String {
    match value {
        Value::Null => format!("`{key}` is null"),
        other => format!("`{key}` must be a string, found {}", kind(other)),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
