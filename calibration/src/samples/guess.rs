//! What is guessed or passed over in reading a record, and how the user is told.

use serde_json::Value;

use super::{Document, Message};

/// Names of roles that one note tells at most.
const NAMES: usize = 3;

/// What was guessed about a record, or passed over in it; said of several records at once.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Guess {
    /// It also holds images or other parts that are not text, which were left out.
    MoreThanText,
    /// Fields of it name images, videos or audio, whose placeholders were left out of the text; these fields and placeholders, each once.
    Media { under: Vec<String>, dropped: Vec<String> },
    /// Other fields that are known hold text that those which were read do not hold.
    Unread { read: Vec<String>, others: Vec<String> },
    /// Roles that are not known, each once.
    Role(Vec<String>),
    /// A list of bare texts under this field was read as a user and an assistant in turn.
    InTurn(String),
    /// One half of a pair is blank: this field, beside that one.
    Half { blank: String, beside: String },
    /// The worse answer of a preference was not read.
    Rejected,
    /// An object of it has this key twice.
    Twice(String),
    /// An integer of it is larger than what is kept exactly; this one.
    Rounded(String),
    /// Cells of it were cut off by the program that wrote it; these.
    Truncated(Vec<String>),
}

impl Guess {
    /// Whether one note tells both.
    pub fn is_of_kind(&self, other: &Guess) -> bool {
        match (self, other) {
            (Guess::Role(_), Guess::Role(_))
            | (Guess::Media { .. }, Guess::Media { .. })
            | (Guess::Twice(_), Guess::Twice(_))
            | (Guess::Rounded(_), Guess::Rounded(_)) => true,
            _ => self == other,
        }
    }

    /// Takes in what another one of the same kind says.
    pub fn join(&mut self, other: Guess) {
        let add = |known: &mut Vec<String>, others: Vec<String>| {
            for other in others {
                // One more than is told says that there are more.
                if known.len() <= NAMES && !known.contains(&other) {
                    known.push(other);
                }
            }
        };
        match (self, other) {
            (Guess::Role(roles), Guess::Role(others)) => add(roles, others),
            (Guess::Media { under, dropped }, Guess::Media { under: others, dropped: more }) => {
                add(under, others);
                add(dropped, more);
            }
            _ => {}
        }
    }

    /// What there is to say, to follow "2 of 5 records of a.jsonl".
    pub fn told(&self) -> String {
        let quoted = |names: &[String]| format!("`{}`", names.join("` and `"));
        match self {
            Guess::MoreThanText => "hold images or other parts that are not text, which were left out".to_owned(),
            Guess::Media { under, dropped } => {
                let left_out = match dropped.is_empty() {
                    true => String::new(),
                    false => {
                        format!(", and {} was left out of the text, where it stands for one of them", quoted(dropped))
                    }
                };
                format!("name images, videos or audio under {}, which are not looked at{left_out}", quoted(under))
            }
            Guess::Unread { read, others } => {
                format!("hold text under {} beside {}, which alone was read", quoted(others), quoted(read))
            }
            Guess::Role(roles) => {
                let more = if roles.len() > NAMES { " and others" } else { "" };
                let names = quoted(&roles[..roles.len().min(NAMES)]);
                format!("hold turns of roles that are not known ({names}{more}), which were passed on as they are")
            }
            Guess::InTurn(key) => {
                format!("hold bare texts under `{key}`, which were read as a user and an assistant in turn")
            }
            Guess::Half { blank, beside } => {
                format!("are blank under `{blank}` and were read with nothing but `{beside}`")
            }
            Guess::Rejected => {
                "hold an answer under `rejected`, which was not read beside the one under `chosen`".to_owned()
            }
            Guess::Twice(key) => format!("give a key twice (`{key}`), of which the last counts, as in Python"),
            Guess::Rounded(number) => {
                format!("hold integers of more than 64 bits ({number}), which were rounded to floats")
            }
            Guess::Truncated(cells) => format!(
                "were cut off under {} before they got here, as their `truncated_cells` say; download the data set itself",
                quoted(cells)
            ),
        }
    }
}

/// All text of a document.
pub(super) struct Told(String);

impl Told {
    pub fn new(document: &Document) -> Told {
        Told(match document {
            Document::Plain(text) => text.clone(),
            Document::Pair { prompt, completion } => format!("{prompt}\n{completion}"),
            Document::Chat { messages, .. } => messages.iter().map(Message::text).collect::<Vec<_>>().join("\n"),
        })
    }

    /// Whether every text in a field's value is in the document; a field without text holds nothing to miss.
    pub fn holds(&self, value: &Value) -> bool {
        match value {
            Value::String(text) => self.0.contains(text.trim()),
            Value::Array(items) => items.iter().all(|item| self.holds(item)),
            // Who speaks is not text.
            Value::Object(fields) => {
                fields.iter().all(|(key, value)| ["role", "from", "type"].contains(&key.as_str()) || self.holds(value))
            }
            _ => true,
        }
    }
}
