//! How the tokens of a model read, one by one.

use calibration::samples::Tokenizer;

/// The marks by which SentencePiece and byte-level vocabularies write a blank.
const BLANKS: [char; 2] = ['\u{2581}', '\u{120}'];

/// The spellings of a tokenizer's tokens.
pub struct Spelling {
    /// By id; none for an id that no token has.
    tokens: Vec<Option<String>>,
    /// Whether each letter of a spelling stands for a byte, as GPT-2 writes them.
    bytes: bool,
}

impl Spelling {
    /// That of a tokenizer.
    pub fn of(tokenizer: &Tokenizer) -> Spelling {
        let tokens: Vec<Option<String>> = (0..=tokenizer.max_id()).map(|id| tokenizer.id_to_token(id)).collect();
        let holds = |mark: char| tokens.iter().flatten().filter(|token| token.contains(mark)).count();
        Spelling { bytes: holds(BLANKS[1]) > holds(BLANKS[0]), tokens }
    }

    /// The bytes of a token.
    fn bytes(&self, id: u32) -> Vec<u8> {
        let Some(Some(token)) = self.tokens.get(id as usize) else { return format!("[{id}]").into_bytes() };
        if self.bytes {
            let all: Option<Vec<u8>> = token.chars().map(byte).collect();
            // What is no such spelling is an added token, written as it is.
            return all.unwrap_or_else(|| token.clone().into_bytes());
        }
        let hex = token.strip_prefix("<0x").and_then(|rest| u8::from_str_radix(rest.strip_suffix('>')?, 16).ok());
        hex.map_or_else(|| token.replace(BLANKS[0], " ").into_bytes(), |byte| vec![byte])
    }

    /// One token; what is no whole letter by itself as a mark.
    pub fn one(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.bytes(id)).into_owned()
    }

    /// Tokens that follow each other: a letter of several tokens stands with the last of them.
    pub fn each(&self, ids: &[u32]) -> Vec<String> {
        let mut open: Vec<u8> = Vec::new();
        let piece = |id: &u32| {
            open.extend(self.bytes(*id));
            match std::str::from_utf8(&open) {
                Ok(whole) => {
                    let whole = whole.to_owned();
                    open.clear();
                    whole
                }
                // The longest letter has four bytes.
                Err(error) if error.error_len().is_none() && open.len() - error.valid_up_to() < 4 => {
                    let rest = open.split_off(error.valid_up_to());
                    String::from_utf8(std::mem::replace(&mut open, rest)).expect("valid so far")
                }
                Err(_) => String::from_utf8_lossy(&std::mem::take(&mut open)).into_owned(),
            }
        };
        ids.iter().map(piece).collect()
    }
}

/// The byte that a letter of GPT-2's spelling stands for: printable ones for themselves, the others in order from U+0100.
fn byte(letter: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(letter);
    match u8::try_from(code) {
        Ok(byte) => printable(byte).then_some(byte),
        Err(_) => (0..=u8::MAX).filter(|byte| !printable(*byte)).nth((code - 0x100) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelling(tokens: &[&str], bytes: bool) -> Spelling {
        Spelling { tokens: tokens.iter().map(|token| Some((*token).to_owned())).collect(), bytes }
    }

    #[test]
    fn tokens_read_as_the_text_they_are_of() {
        let gpt = spelling(&["ĠMÃ", "¼", "ller", "Ċ", "<|end|>日"], true);
        assert_eq!(gpt.each(&[0, 1, 2, 3]), [" M", "ü", "ller", "\n"]);
        assert_eq!((gpt.one(1), gpt.one(9)), ("\u{fffd}".to_owned(), "[9]".to_owned()));
        assert_eq!(gpt.one(4), "<|end|>日");
        let piece = spelling(&["▁a", "<0xC3>", "<0xA9>", "x"], false);
        assert_eq!(piece.each(&[0, 1, 2, 3]), [" a", "", "é", "x"]);
        // What is never completed is shown as it can be, and holds nothing back.
        assert_eq!(piece.each(&[1, 3, 3]), ["", "\u{fffd}x", "x"]);
    }
}
