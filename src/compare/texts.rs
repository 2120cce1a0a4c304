//! What models are compared on: a text, a short text of each domain, and questions.

use std::ops::Range;

use calibration::samples::{parse_txt, windows};
use sha2::{Digest, Sha256};

use super::spelling::Spelling;
use super::tasks::{Choice, Question, questions};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::families;
use crate::job::fewer_windows;
use crate::output::hashing::hex;
use crate::text::{HELD_OUT, ModelText, TextError, load_text};

/// The texts of domains, with what they are called; `texts/README.md` says where they are from.
pub const DOMAINS: &[(&str, &str)] = &[
    ("encyclopedia", include_str!("texts/encyclopedia.txt")),
    ("code", include_str!("texts/code.txt")),
    ("mathematics", include_str!("texts/mathematics.txt")),
    ("dialogue", include_str!("texts/dialogue.txt")),
    ("German", include_str!("texts/german.txt")),
];

/// Tokens of a window of a domain's text.
const DOMAIN_CONTEXT: usize = 512;

/// What is to be read.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// A file or a bundled text; the bundled held-out text without.
    pub text: Option<&'a str>,
    /// Tokens of a window; cut down to what the model can take.
    pub context: usize,
    /// Windows of each text at most; all where it is not said.
    pub windows: Option<usize>,
    /// A file of questions, or `none`; the bundled ones without.
    pub tasks: Option<&'a str>,
}

/// All that models are measured on, in the tokens of one of them.
pub struct Material {
    /// Everything that goes through the models, window after window: the text, the domains, the questions with each of their answers.
    pub sequences: Vec<Vec<u32>>,
    /// The positions of each sequence whose next token is looked at.
    pub scored: Vec<Range<usize>>,
    /// The text.
    pub text: Part,
    /// The domains, as far as their texts fill a window.
    pub domains: Vec<Part>,
    /// The questions.
    pub questions: Vec<Question>,
    /// An answer of each question after the other: which sequence and tokens it is.
    pub choices: Vec<Vec<Choice>>,
    /// What the questions are called.
    pub tasks: Option<String>,
    /// A window of each domain as it is read, token by token.
    pub passages: Vec<Passage>,
    /// How tokens are written.
    pub spelling: Spelling,
    /// What there is to say of it.
    pub notes: Vec<String>,
    /// SHA-256 of all ids and of what is looked at, lower-case hex: whoever gives the same can be compared.
    pub digest: String,
}

/// A text in windows of one length.
pub struct Part {
    /// What it is called.
    pub name: String,
    /// Tokens of a window.
    pub context: usize,
    /// Number of windows, all of `context` tokens.
    pub windows: usize,
    /// Which of all scored tokens are its own.
    pub tokens: Range<usize>,
}

/// The first window of a text.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct Passage {
    /// The domain's name, one of [`DOMAINS`].
    pub domain: String,
    /// Its tokens as they are written.
    pub tokens: Vec<String>,
}

impl Material {
    /// Reads it all in the tokens of a model. The text's windows are those that `eval` takes.
    ///
    /// Fails where the model has no tokenizer, a file cannot be read, or the text does not fill a window.
    pub fn of(asked: &Asked<'_>, source: &Checkpoint) -> Result<Material> {
        let tokenizer = ModelText::open(source)?;
        let longest = families::longest_context(source.config())?.unwrap_or(usize::MAX);
        let mut material = Material {
            sequences: Vec::new(),
            scored: Vec::new(),
            text: Part { name: String::new(), context: 0, windows: 0, tokens: 0..0 },
            domains: Vec::new(),
            questions: Vec::new(),
            choices: Vec::new(),
            tasks: None,
            passages: Vec::new(),
            spelling: Spelling::of(&tokenizer.tokenizer),
            notes: Vec::new(),
            digest: String::new(),
        };
        let text = load_text(asked.text.unwrap_or(HELD_OUT)).map_err(Error::from)?;
        let context = asked.context.min(longest);
        let ids = tokenizer.first_ids(&text, calibration::samples::needed(context, asked.windows))?;
        let own = windows(&text.name, &ids, context, asked.windows, None).map_err(TextError::from)?;
        material.notes.extend(text.notes);
        material.notes.extend(fewer_windows(&text.name, own.len(), context, asked.windows));
        material.text = material.part(&text.name, own);
        let context = context.min(DOMAIN_CONTEXT);
        for (name, content) in DOMAINS {
            let ids = tokenizer.first_ids(&parse_txt(name, content), usize::MAX)?;
            let Ok(own) = windows(name, &ids, context, asked.windows, None) else { continue };
            let tokens = material.spelling.each(&own[0]);
            material.passages.push(Passage { domain: (*name).to_owned(), tokens });
            let part = material.part(name, own);
            material.domains.push(part);
        }
        if asked.tasks != Some("none") {
            let (name, questions) = questions(asked.tasks)?;
            for question in &questions {
                let mut choices = Vec::new();
                for choice in 0..question.choices.len() {
                    let (ids, scored) = question.tokens(choice, &tokenizer, longest)?;
                    choices.push(Choice { tokens: material.count()..material.count() + scored.len() });
                    material.sequences.push(ids);
                    material.scored.push(scored);
                }
                material.choices.push(choices);
            }
            (material.tasks, material.questions) = (Some(name), questions);
        }
        material.digest = material.digest();
        Ok(material)
    }

    /// Tokens that are scored so far.
    fn count(&self) -> usize {
        self.scored.iter().map(Range::len).sum()
    }

    /// Adds the windows of a text, of which all tokens but the first are scored.
    fn part(&mut self, name: &str, windows: Vec<Vec<u32>>) -> Part {
        let (from, context, count) = (self.count(), windows[0].len(), windows.len());
        self.scored.extend(windows.iter().map(|window| 0..window.len() - 1));
        self.sequences.extend(windows);
        Part { name: name.to_owned(), context, windows: count, tokens: from..self.count() }
    }

    fn digest(&self) -> String {
        let mut all = Sha256::new();
        let mut number = |number: usize| all.update((number as u64).to_le_bytes());
        for (ids, scored) in self.sequences.iter().zip(&self.scored) {
            [ids.len(), scored.start, scored.end].into_iter().for_each(&mut number);
            ids.iter().for_each(|id| number(*id as usize));
        }
        for question in &self.questions {
            number(question.gold);
            question.choices.iter().for_each(|choice| number(choice.chars().count()));
        }
        hex(&all.finalize())
    }
}
