//! Where a text may be cut so that the ids of its parts, one after the other, are the ids of the whole.
//!
//! Whether a cut is exact hangs on the two characters beside it, `x | y`, and follows from the tokenizer's own steps:
//!
//! | step | what is asked |
//! |---|---|
//! | added tokens | none holds `x` and then `y`, and none ends with `x` |
//! | normalizer | `x` and `y` become what they become whatever stands on the other side |
//! | pre-tokenizer | no match, and no look ahead from the left, goes from `x` to `y` |
//! | model | the pre-tokenizer divides there for certain; or, for BPE, no merge joins what ends with `x` and what begins with `y` |
//!
//! What a tokenizer does at the start of a text – a space put before it, say – is not done at a cut: a part is encoded with `x` before
//! it, and the ids of `x` are taken off again. A tokenizer with a step that is not known here has no cuts.
//!
//! A Unigram model adds up the scores of a whole word in floating point, and WordPiece and WordLevel look words up: they are cut between
//! words only.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper};

use super::pattern::{Kind, Pattern, Side, kind};

/// What the byte-level pre-tokenizer splits by, unless told not to (GPT-2's).
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The cuts of one tokenizer.
#[derive(Clone)]
pub(super) struct Cuts {
    rules: Option<Arc<Rules>>,
}

struct Rules {
    /// Added tokens that are looked for in the text as it is, and those looked for once it is normalized.
    added: [Added; 2],
    normalizer: Vec<Norm>,
    splits: Vec<Split>,
    /// Of BPE without rules for words.
    merges: Option<Merges>,
    /// What was found of two characters, for those of ASCII by their place: 0 for nothing yet, else 1 and whether they may be cut.
    ascii: Vec<AtomicU8>,
    known: Mutex<HashMap<(char, char), bool>>,
}

#[derive(Default)]
struct Added {
    /// Characters that stand beside each other in a token.
    pairs: HashSet<(char, char)>,
    last: HashSet<char>,
    /// The first characters of those that look at what stands beside them.
    looking: HashSet<char>,
    /// Whether any takes white space beside it, after which a text begins anew.
    strips: bool,
}

enum Norm {
    /// A text is put before the text.
    Prepend,
    Replace {
        pattern: Pattern,
        /// The character that is replaced, where it is one.
        one: Option<char>,
        content: String,
    },
    /// White space at the ends is taken off.
    Strip,
    /// What becomes of a character is known from it alone, if nothing that combines follows.
    Each {
        step: NormalizerWrapper,
        /// Only if it does not combine with what stands before it either.
        alone: bool,
        /// No character becomes white space, or nothing.
        keeps_words: bool,
    },
}

enum Split {
    /// At the matches of an expression; `divides` where each is a piece of its own, or none.
    Matches {
        pattern: Pattern,
        divides: bool,
    },
    /// At characters.
    At {
        is: fn(char) -> Option<bool>,
        divides: bool,
        contiguous: bool,
    },
    AtOne(char),
    /// Metaspace.
    Spaces {
        to: char,
        split: bool,
    },
    /// Bytes become characters.
    Bytes,
}

struct Merges {
    /// The last character of what stands left and the first of what stands right.
    pairs: HashSet<(char, char)>,
    /// Tokens of one character.
    single: HashSet<char>,
}

/// What a pre-tokenizer does at a cut.
enum Done {
    /// It divides there for certain.
    Divided,
    /// What it does on either side does not depend on the other.
    Beside(Side, Side),
    Joined,
}

impl Cuts {
    /// Those of a tokenizer.json, of which `inner` was made.
    pub fn of(json: &Value, inner: &tokenizers::Tokenizer) -> Cuts {
        Cuts { rules: Rules::of(json, inner).map(Arc::new) }
    }

    /// Whether a text may be cut between these characters.
    pub fn allow(&self, x: char, y: char) -> bool {
        let Some(rules) = &self.rules else { return false };
        if x.is_ascii() && y.is_ascii() {
            let known = &rules.ascii[x as usize * 128 + y as usize];
            if known.load(Ordering::Relaxed) == 0 {
                known.store(1 + u8::from(rules.allow(x, y)), Ordering::Relaxed);
            }
            return known.load(Ordering::Relaxed) == 2;
        }
        let mut known = rules.known.lock().unwrap_or_else(PoisonError::into_inner);
        *known.entry((x, y)).or_insert_with(|| rules.allow(x, y))
    }

    /// The end of a part of `text` that begins at `from`: a cut before `from + bytes` but not by far, else the next one, or the end.
    pub fn end(&self, text: &str, from: usize, bytes: usize) -> usize {
        if self.rules.is_none() || bytes >= text.len() - from {
            return text.len();
        }
        let target = (from..=from + bytes).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(from);
        let cut = |at: usize| {
            let before = text[from..at].chars().next_back();
            before.zip(text[at..].chars().next()).is_some_and(|(x, y)| self.allow(x, y))
        };
        let least = from + bytes / 2;
        let before = text[from..target].char_indices().rev().map(|(at, _)| from + at).take_while(|&at| at >= least);
        let after = text[target..].char_indices().map(|(at, _)| target + at);
        std::iter::once(target).chain(before).chain(after).find(|&at| at > from && cut(at)).unwrap_or(text.len())
    }
}

impl Rules {
    fn of(json: &Value, inner: &tokenizers::Tokenizer) -> Option<Rules> {
        let normalizer = steps(&json["normalizer"], "normalizers").into_iter().map(norm).collect::<Option<Vec<_>>>()?;
        let splits: Vec<Vec<Split>> =
            steps(&json["pre_tokenizer"], "pretokenizers").into_iter().map(split).collect::<Option<_>>()?;
        let splits: Vec<Split> = splits.into_iter().flatten().collect();
        let divides = |split: &Split| match split {
            Split::Matches { divides, .. } | Split::At { divides, .. } => *divides,
            Split::AtOne(_) => true,
            Split::Spaces { split, .. } => *split,
            Split::Bytes => false,
        };
        // Without words and without merges there is nothing that a cut could be shown by.
        let merges = if splits.iter().any(divides) { None } else { Some(Merges::of(&json["model"])?) };
        let mut added = [Added::default(), Added::default()];
        for token in inner.get_added_tokens_decoder().values() {
            let mut content = NormalizedString::from(token.content.as_str());
            let mut forms = vec![token.content.clone()];
            if let (true, Some(normalizer)) = (token.normalized, inner.get_normalizer()) {
                normalizer.normalize(&mut content).ok()?;
                forms.push(content.get().to_owned());
            }
            let added = &mut added[usize::from(token.normalized)];
            for form in forms {
                added.pairs.extend(form.chars().zip(form.chars().skip(1)));
                added.last.extend(form.chars().next_back());
                if token.lstrip || token.rstrip || token.single_word {
                    added.looking.extend(form.chars().next());
                }
            }
            added.strips |= token.lstrip || token.rstrip;
        }
        let ascii = (0..128 * 128).map(|_| AtomicU8::new(0)).collect();
        Some(Rules { added, normalizer, splits, merges, ascii, known: Mutex::default() })
    }

    fn allow(&self, x: char, y: char) -> bool {
        let raw = (Side::Char(x), Side::Char(y));
        let normalized = self.normalizer.iter().try_fold(raw, |(x, y), step| step.at(x, y));
        let Some((x, y)) = normalized.filter(|(x, y)| self.added[0].apart(raw) && self.added[1].apart((*x, *y))) else {
            return false;
        };
        let (mut x, mut y) = (x, y);
        for split in &self.splits {
            match split.at(x, y) {
                Done::Divided => return true,
                Done::Beside(left, right) => (x, y) = (left, right),
                Done::Joined => return false,
            }
        }
        match (&self.merges, x, y) {
            (Some(merges), Side::Char(x), Side::Char(y)) => {
                merges.single.contains(&x) && merges.single.contains(&y) && !merges.pairs.contains(&(x, y))
            }
            _ => false,
        }
    }
}

/// The steps of a sequence, or the only one.
fn steps<'j>(step: &'j Value, key: &str) -> Vec<&'j Value> {
    match step {
        Value::Null => Vec::new(),
        step if step["type"] == "Sequence" => {
            step[key].as_array().into_iter().flatten().flat_map(|step| steps(step, key)).collect()
        }
        step => vec![step],
    }
}

/// An expression of a tokenizer.json: `{"String": …}` or `{"Regex": …}`.
fn pattern(value: &Value) -> Option<Pattern> {
    match (value["String"].as_str(), value["Regex"].as_str()) {
        (Some(text), None) if !text.is_empty() => Some(Pattern::literal(text)),
        (None, Some(source)) => Pattern::parse(source),
        _ => None,
    }
}

fn norm(step: &Value) -> Option<Norm> {
    Some(match step["type"].as_str()? {
        "Prepend" => Norm::Prepend,
        "Strip" => Norm::Strip,
        "Replace" => Norm::Replace {
            pattern: pattern(&step["pattern"])?,
            one: step["pattern"]["String"].as_str().and_then(|text| {
                let mut chars = text.chars();
                chars.next().filter(|_| chars.next().is_none())
            }),
            content: step["content"].as_str()?.to_owned(),
        },
        name @ ("NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "StripAccents" | "Nmt" | "BertNormalizer"
        | "Precompiled" | "ByteLevel") => {
            let keeps_words = matches!(name, "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase");
            Norm::Each { step: serde_json::from_value(step.clone()).ok()?, alone: name == "Precompiled", keeps_words }
        }
        _ => return None,
    })
}

impl Norm {
    /// What the characters beside a cut become; `None` where that depends on the other side.
    fn at(&self, x: Side, y: Side) -> Option<(Side, Side)> {
        match self {
            Norm::Prepend => Some((x, y)),
            // Neither what ends with `x` nor what is encoded with `x` before it has white space at that end.
            Norm::Strip => {
                let kept = x == Side::Word || matches!(x, Side::Char(c) if !c.is_whitespace());
                kept.then_some((x, y))
            }
            Norm::Replace { pattern, one, content } => {
                if pattern.joins(x, y) {
                    return None;
                }
                let [ends, begins] = pattern.touches(x, y);
                if (ends || begins) && content.is_empty() {
                    return None;
                }
                // What is replaced may be this character alone, or many of which it is one, or it may stay.
                let becomes = |side: Side, touched: bool, new: Option<char>| match (side, new) {
                    _ if !touched => side,
                    (Side::Char(old), Some(new)) if old == new || *one == Some(old) => Side::Char(new),
                    _ => Side::Any,
                };
                Some((becomes(x, ends, content.chars().next_back()), becomes(y, begins, content.chars().next())))
            }
            Norm::Each { step, alone, keeps_words } => {
                let Side::Char(right) = y else { return None };
                if kind(right).is_none() || x == Side::Char('\r') && right == '\n' {
                    return None;
                }
                let becomes = |c: char| {
                    let mut text = NormalizedString::from(c.to_string());
                    step.normalize(&mut text).ok()?;
                    Some(text.get().to_owned()).filter(|text| !text.is_empty())
                };
                let left = match x {
                    Side::Char(c) if kind(c).is_some() => Side::Char(becomes(c)?.chars().next_back()?),
                    _ if *alone => return None,
                    // It may combine with what stands before it.
                    Side::Char(c) if *keeps_words && !c.is_whitespace() => Side::Word,
                    Side::Word if *keeps_words => Side::Word,
                    _ => Side::Any,
                };
                Some((left, Side::Char(becomes(right)?.chars().next()?)))
            }
        }
    }
}

fn split(step: &Value) -> Option<Vec<Split>> {
    let divides = |behavior: &Value| matches!(behavior.as_str(), Some("Isolated" | "Removed"));
    let at = |is, divides, contiguous| vec![Split::At { is, divides, contiguous }];
    Some(match step["type"].as_str()? {
        "Split" => vec![Split::Matches { pattern: pattern(&step["pattern"])?, divides: divides(&step["behavior"]) }],
        "ByteLevel" => {
            let split = step["use_regex"].as_bool().unwrap_or(true);
            let matches = || Some(Split::Matches { pattern: Pattern::parse(GPT2)?, divides: true });
            split.then(matches).flatten().into_iter().chain([Split::Bytes]).collect()
        }
        "Metaspace" => {
            let to = step["replacement"].as_str()?.chars().next()?;
            vec![Split::Spaces { to, split: step["split"].as_bool().unwrap_or(true) }]
        }
        "Whitespace" => vec![
            Split::At { is: |c| Some(c.is_whitespace()), divides: true, contiguous: false },
            Split::Matches { pattern: Pattern::parse(r"\w+|[^\w\s]+")?, divides: true },
        ],
        "WhitespaceSplit" => at(|c| Some(c.is_whitespace()), true, false),
        "BertPreTokenizer" => vec![
            Split::At { is: |c| Some(c.is_whitespace()), divides: true, contiguous: false },
            Split::At { is: is_punctuation, divides: true, contiguous: false },
        ],
        "Punctuation" => {
            let behavior = step.get("behavior").cloned().unwrap_or_else(|| "Isolated".into());
            at(is_punctuation, divides(&behavior), behavior == "Contiguous")
        }
        "Digits" => {
            let each = step["individual_digits"].as_bool()?;
            at(|c| Some(c.is_numeric()), each, !each)
        }
        "CharDelimiterSplit" => vec![Split::AtOne(step["delimiter"].as_str()?.chars().next()?)],
        _ => return None,
    })
}

fn is_punctuation(c: char) -> Option<bool> {
    // All of ASCII's symbols count, others do not.
    if c.is_ascii() { Some(c.is_ascii_punctuation()) } else { kind(c).map(|kind| kind == Kind::Punctuation) }
}

impl Split {
    fn at(&self, x: Side, y: Side) -> Done {
        match self {
            Split::Matches { pattern, .. } if pattern.joins(x, y) => Done::Joined,
            Split::Matches { pattern, divides: true } if pattern.takes(y) => Done::Divided,
            Split::Matches { .. } => Done::Beside(x, y),
            Split::At { is, divides, contiguous } => {
                let of = |side| if let Side::Char(c) = side { is(c) } else { None };
                let (left, right) = (of(x), of(y));
                let divided = *divides && (left == Some(true) || right == Some(true))
                    || *contiguous && left.is_some() && right.is_some() && left != right;
                if divided { Done::Divided } else { Done::Beside(x, y) }
            }
            Split::AtOne(one) => match x == Side::Char(*one) || y == Side::Char(*one) {
                true => Done::Divided,
                false => Done::Beside(x, y),
            },
            Split::Spaces { to, split } => {
                let [x, y] = [x, y].map(|side| if side == Side::Char(' ') { Side::Char(*to) } else { side });
                if *split && y == Side::Char(*to) { Done::Divided } else { Done::Beside(x, y) }
            }
            Split::Bytes => {
                let of = |side: Side, last: bool| {
                    let Side::Char(c) = side else { return Side::Any };
                    let mut buffer = [0; 4];
                    let bytes = c.encode_utf8(&mut buffer).as_bytes();
                    Side::Char(byte_char(if last { bytes[bytes.len() - 1] } else { bytes[0] }))
                };
                Done::Beside(of(x, true), of(y, false))
            }
        }
    }
}

/// The character that stands for a byte in byte-level vocabularies.
fn byte_char(byte: u8) -> char {
    let plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if plain(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|byte| !plain(*byte)).count() as u32;
    char::from_u32(256 + before).expect("a letter")
}

impl Added {
    fn apart(&self, (x, y): (Side, Side)) -> bool {
        if self.last.is_empty() {
            return true;
        }
        let (Side::Char(x), Side::Char(y)) = (x, y) else { return false };
        let joined = self.pairs.contains(&(x, y)) || self.last.contains(&x) || self.looking.contains(&y);
        !(joined || self.strips && x.is_whitespace())
    }
}

impl Merges {
    /// `None` for another model, and for BPE that treats a word's parts by where they stand in it.
    fn of(model: &Value) -> Option<Merges> {
        let unset = |key: &str| matches!(&model[key], Value::Null | Value::Bool(false)) || model[key] == "";
        // Older files do not name the model's type.
        let is_bpe = model["type"] == "BPE" || model["type"].is_null() && model["merges"].is_array();
        if !is_bpe || !["ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"].into_iter().all(unset) {
            return None;
        }
        let mut pairs = HashSet::new();
        for merge in model["merges"].as_array()? {
            let (left, right) = match merge {
                Value::String(both) => both.split_once(' ')?,
                Value::Array(both) => (both.first()?.as_str()?, both.get(1)?.as_str()?),
                _ => return None,
            };
            pairs.insert((left.chars().next_back()?, right.chars().next()?));
        }
        let only = |text: &String| {
            let mut chars = text.chars();
            chars.next().filter(|_| chars.next().is_none())
        };
        let single = model["vocab"].as_object()?.keys().filter_map(only).collect();
        Some(Merges { pairs, single })
    }
}

#[cfg(test)]
mod tests;
