//! Images, videos and audio that records name in fields of their own, and the places of them in the text.
//!
//! Training programs that read such records put the tokens of each image where its placeholder stands. Here nothing is looked at but
//! text, so that a placeholder would be read as if somebody had written it: it is left out, as image parts of a content are.

use serde_json::Value;

use super::guess::Guess;
use super::{Document, Message};

/// Fields that name images, videos or audio, each with the placeholder that stands for one of them.
const MEDIA: &[(&str, &str)] = &[
    ("images", "<image>"),
    ("image", "<image>"),
    ("videos", "<video>"),
    ("video", "<video>"),
    ("audios", "<audio>"),
    ("audio", "<audio>"),
];

/// Whether a field of this name holds images, videos or audio.
pub(super) fn is_media(field: &str) -> bool {
    MEDIA.iter().any(|(name, _)| *name == field)
}

/// Whether the value of such a field names anything. A table has lists as text in its cells.
fn names_any(value: &Value) -> bool {
    match value {
        Value::Null | Value::Number(_) => false,
        Value::Bool(there) => *there,
        Value::String(text) => !["", "[]", "{}", "null"].contains(&text.trim()),
        Value::Array(items) => items.iter().any(names_any),
        Value::Object(fields) => fields.values().any(names_any),
    }
}

/// Leaves out the placeholders of what `fields`, or the turns themselves, name; what there is to say of it.
pub(super) fn leave_out(document: &mut Document, fields: &serde_json::Map<String, Value>) -> Option<Guess> {
    let of = |fields: &serde_json::Map<String, Value>| -> Vec<(&'static str, &'static str)> {
        let there = |(name, _): &&(&str, &str)| fields.get(*name).is_some_and(names_any);
        MEDIA.iter().filter(there).copied().collect()
    };
    let mut named = of(fields);
    if let Document::Chat { messages, .. } = document {
        named.extend(messages.iter().flat_map(|message| of(&message.extra)));
    }
    let (mut under, mut dropped) = (Vec::<String>::new(), Vec::<String>::new());
    for (name, placeholder) in named {
        if under.iter().any(|known| known == name) {
            continue;
        }
        under.push(name.to_owned());
        let mut any = false;
        each_text(document, &mut |text| {
            if text.contains(placeholder) {
                *text = without(text, placeholder);
                any = true;
            }
        });
        if any && !dropped.iter().any(|known| known == placeholder) {
            dropped.push(placeholder.to_owned());
        }
    }
    (!under.is_empty()).then_some(Guess::Media { under, dropped })
}

fn each_text(document: &mut Document, work: &mut dyn FnMut(&mut String)) {
    let mut of_message = |message: &mut Message| {
        if let Value::String(text) = &mut message.content {
            work(text);
        }
    };
    match document {
        Document::Plain(text) => work(text),
        Document::Pair { prompt, completion } => [prompt, completion].into_iter().for_each(work),
        Document::Chat { messages, .. } => messages.iter_mut().for_each(&mut of_message),
    }
}

/// A text without a placeholder, and without the end of the line that it stands on alone.
fn without(text: &str, placeholder: &str) -> String {
    let whole = |text: &str| text.replace(&format!("{placeholder}\n"), "");
    let text = whole(text);
    // At the end the line's break stands before it.
    let text = text.strip_suffix(&format!("\n{placeholder}")).unwrap_or(&text);
    text.replace(placeholder, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placeholder_goes_with_its_own_line_and_no_other_letter() {
        for (text, left) in [
            ("<image>\nWhat is it?", "What is it?"),
            ("<image>What is it?", "What is it?"),
            ("What is it?\n<image>", "What is it?"),
            ("<image>\n<image>\nBoth?", "Both?"),
            ("Is <image> like <image>?", "Is  like ?"),
            ("<images> stay", "<images> stay"),
        ] {
            assert_eq!(without(text, "<image>"), left, "{text}");
        }
    }
}
