//! Where llama.cpp cuts texts otherwise than Hugging Face's tokenizers do, whatever their pre-tokenizer: what the vocabulary says of it.

use std::collections::HashMap;

use crate::tokenizer::alphabet::byte_of;

/// Texts of two added tokens that are looked into at most.
const MOST: usize = 4000;

/// What to say of a byte-level vocabulary without a token for some byte. Both leave such bytes out; llama.cpp merges nothing across the gap.
pub(super) fn gaps<'t>(tokens: impl Iterator<Item = &'t str>) -> Option<String> {
    let mut there = [false; 256];
    for text in tokens {
        let mut characters = text.chars();
        if let (Some(byte), None) = (characters.next().and_then(byte_of), characters.next()) {
            there[usize::from(byte)] = true;
        }
    }
    let missing: Vec<usize> = (0..256).filter(|byte| !there[*byte]).collect();
    // No text in UTF-8 has these.
    let never = |byte: &usize| matches!(byte, 0xc0 | 0xc1 | 0xf5..);
    let first = missing.iter().find(|byte| !never(byte))?;
    Some(format!(
        "the vocabulary has no token for {} of the 256 bytes (such as 0x{first:02X}): both leave such bytes out of a text, and what stands on both \
         sides of them transformers may join to one token, and llama.cpp does not",
        missing.len()
    ))
}

/// What to say of added tokens of which one ends as another begins: llama.cpp looks for the longest first, all over the text, and transformers
/// for what comes first.
pub(super) fn overlaps(added: &[&str]) -> Option<String> {
    let mut beginnings: HashMap<&str, Vec<&str>> = HashMap::new();
    let proper = |text: &'_ str| text.char_indices().map(|(at, _)| at).skip(1).collect::<Vec<_>>();
    for token in added {
        for at in proper(token) {
            beginnings.entry(&token[..at]).or_default().push(token);
        }
    }
    let mut longest: Vec<&str> = added.to_vec();
    longest.sort_by_key(|token| std::cmp::Reverse(token.len()));
    let mut tried = 0;
    for first in added {
        for at in proper(first) {
            for second in beginnings.get(&first[at..]).into_iter().flatten() {
                let text = format!("{first}{}", &second[first.len() - at..]);
                // Spaces and the like, of which there may be thousands of pairs: they are cut alike.
                if text.chars().all(|c| text.starts_with(c)) {
                    continue;
                }
                tried += 1;
                if tried > MOST {
                    return None;
                }
                let within: Vec<&str> = longest.iter().copied().filter(|token| text.contains(token)).collect();
                let [theirs, ours] = [leftmost(&text, &within), longest_first(&text, &within)];
                if theirs != ours {
                    return Some(format!(
                        "added tokens overlap, and llama.cpp takes the longest of them first, where transformers takes the one that begins first: \
                         `{text}` is cut into {} and not into {}",
                        shown(&ours),
                        shown(&theirs)
                    ));
                }
            }
        }
    }
    None
}

fn shown(parts: &[&str]) -> String {
    parts.iter().map(|part| format!("`{part}`")).collect::<Vec<_>>().join(" ")
}

/// A text cut at the token that begins first, of several the longest, and so on behind it.
fn leftmost<'t>(text: &'t str, longest: &[&str]) -> Vec<&'t str> {
    let (mut parts, mut plain, mut at) = (Vec::new(), 0, 0);
    while at < text.len() {
        let found = longest.iter().find(|token| text[at..].starts_with(**token));
        let Some(token) = found else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
            continue;
        };
        parts.extend(Some(&text[plain..at]).filter(|part| !part.is_empty()));
        parts.push(&text[at..at + token.len()]);
        at += token.len();
        plain = at;
    }
    parts.extend(Some(&text[plain..]).filter(|part| !part.is_empty()));
    parts
}

/// A text cut at one token after another wherever it stands, the longest first.
fn longest_first<'t>(text: &'t str, longest: &[&str]) -> Vec<&'t str> {
    let mut parts = vec![(text, false)];
    for token in longest {
        let cut = |(part, done): (&'t str, bool)| {
            let (mut pieces, mut rest) = (Vec::new(), part);
            while let Some(at) = rest.find(token).filter(|_| !done) {
                pieces.extend(Some((&rest[..at], false)).filter(|(part, _)| !part.is_empty()));
                pieces.push((&rest[at..at + token.len()], true));
                rest = &rest[at + token.len()..];
            }
            pieces.extend(Some((rest, done)).filter(|(part, _)| !part.is_empty()));
            pieces
        };
        parts = parts.into_iter().flat_map(cut).collect();
    }
    parts.into_iter().map(|(part, _)| part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cut as llama.cpp and transformers cut them.
    #[test]
    fn tokens_that_overlap_are_cut_otherwise() {
        let operators = ["==", "=>>", "->"];
        let mut longest = operators.to_vec();
        longest.sort_by_key(|token| std::cmp::Reverse(token.len()));
        assert_eq!(leftmost("a==>>b", &longest), ["a", "==", ">>b"]);
        assert_eq!(longest_first("a==>>b", &longest), ["a=", "=>>", "b"]);
        let note = overlaps(&operators).unwrap();
        assert!(note.contains("`==>>` is cut into `=` `=>>` and not into `==` `>>`"), "{note}");
        // Runs of one sign are cut alike, as are tokens that do not overlap.
        for alike in [&["  ", "   ", "     "][..], &["<|im_start|>", "<|im_end|>", "<|x|>"], &["\u{2581}é", "a"], &[]]
        {
            assert_eq!(overlaps(alike), None, "{alike:?}");
        }
    }

    #[test]
    fn bytes_without_a_token_are_counted() {
        let all: Vec<String> =
            (0..0x200).filter_map(char::from_u32).filter(|c| byte_of(*c).is_some()).map(String::from).collect();
        assert_eq!(all.len(), 256);
        assert_eq!(gaps(all.iter().map(String::as_str)), None);
        let note = gaps(all.iter().map(String::as_str).filter(|text| *text != "A")).unwrap();
        assert!(note.contains("1 of the 256 bytes (such as 0x41)"), "{note}");
        // Bytes that no text has are not missed.
        let usual = all.iter().map(String::as_str).filter(|text| byte_of(text.chars().next().unwrap()) != Some(0xff));
        assert_eq!(gaps(usual), None);
    }
}
