//! SentencePiece models: the `tokenizer.model` of Llama 1 and 2, the first Mistral, Gemma and many others.
//!
//! A protocol-buffers message, `ModelProto` of sentencepiece_model.proto, of which these fields are read and everything
//! else is skipped:
//!
//! ```text
//! 1 pieces, repeated     1 piece string | 2 score f32 | 3 kind (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte)
//! 2 trainer              3 model type (1 unigram, 2 BPE, 3 words, 4 characters) | 24 spaces behind words | 35 byte fallback
//!                        40 to 43 ids of the unknown token, BOS, EOS and padding
//! 3 normalizer           2 rules for characters | 3 space before texts | 4 single spaces | 5 spaces as `▁`
//! ```

use crate::error::{Error, Result};

/// What a tokenizer.model says.
#[derive(Clone, Debug, PartialEq)]
pub struct SentencePiece {
    /// The pieces, by id.
    pub pieces: Vec<Piece>,
    /// How texts are split into them.
    pub algorithm: Algorithm,
    /// What no piece covers is spelt in bytes.
    pub byte_fallback: bool,
    /// A space is put before every text.
    pub add_dummy_prefix: bool,
    /// Spaces at the ends are left out, and only one of several in a row is kept.
    pub remove_extra_whitespaces: bool,
    /// Spaces are spelt `▁`.
    pub escape_whitespaces: bool,
    /// Spaces belong to the word before them.
    pub whitespace_as_suffix: bool,
    /// Characters that are replaced first: a trie and what it leads to, checked by [`SentencePiece::parse`]; may be empty.
    pub rules: Vec<u8>,
    /// Ids of the unknown token, BOS, EOS and padding, where it has them.
    pub unknown: Option<u32>,
    /// Starts a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Fills a batch.
    pub padding: Option<u32>,
}

/// How texts are split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Into the most likely pieces.
    Unigram,
    /// By joining pairs, the best-scored first.
    Bpe,
    /// At spaces.
    Words,
    /// Into characters.
    Characters,
}

/// One piece.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Its text, spaces as `▁`.
    pub text: String,
    /// Pieces of higher score are preferred.
    pub score: f32,
    /// What it is; the numbers are those of the message, and GGUF's too.
    pub kind: u32,
}

impl SentencePiece {
    /// Reads the bytes of a tokenizer.model.
    ///
    /// Fails for what is no such message, for a score that is not finite, and for rules whose trie leads outside of itself.
    pub fn parse(bytes: &[u8]) -> Result<SentencePiece> {
        Self::read(bytes).map_err(Error::malformed)
    }

    /// Whether texts are changed before they are split.
    pub fn normalizes(&self) -> bool {
        !self.rules.is_empty() || self.remove_extra_whitespaces
    }

    fn read(bytes: &[u8]) -> Result<SentencePiece, String> {
        let mut model = SentencePiece {
            pieces: Vec::new(),
            // The defaults of the message.
            algorithm: Algorithm::Unigram,
            byte_fallback: false,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
            whitespace_as_suffix: false,
            rules: Vec::new(),
            unknown: Some(0),
            bos: Some(1),
            eos: Some(2),
            padding: None,
        };
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(piece)) => {
                    let piece = read_piece(piece).map_err(|why| format!("piece {}: {why}", model.pieces.len()))?;
                    model.pieces.push(piece);
                }
                (2, Field::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Field::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("it holds no pieces".to_owned());
        }
        check_rules(&model.rules)?;
        Ok(model)
    }

    fn read_trainer(&mut self, bytes: &[u8]) -> Result<(), String> {
        let id = |value: u64| u32::try_from(value as i64).ok();
        for field in Fields(bytes) {
            match field? {
                (3, Field::Varint(kind)) => {
                    self.algorithm = match kind {
                        1 => Algorithm::Unigram,
                        2 => Algorithm::Bpe,
                        3 => Algorithm::Words,
                        4 => Algorithm::Characters,
                        other => return Err(format!("its model type is {other}, expected 1 to 4")),
                    }
                }
                (24, Field::Varint(flag)) => self.whitespace_as_suffix = flag != 0,
                (35, Field::Varint(flag)) => self.byte_fallback = flag != 0,
                (40, Field::Varint(value)) => self.unknown = id(value),
                (41, Field::Varint(value)) => self.bos = id(value),
                (42, Field::Varint(value)) => self.eos = id(value),
                (43, Field::Varint(value)) => self.padding = id(value),
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, bytes: &[u8]) -> Result<(), String> {
        for field in Fields(bytes) {
            match field? {
                (2, Field::Bytes(rules)) => self.rules = rules.to_vec(),
                (3, Field::Varint(flag)) => self.add_dummy_prefix = flag != 0,
                (4, Field::Varint(flag)) => self.remove_extra_whitespaces = flag != 0,
                (5, Field::Varint(flag)) => self.escape_whitespaces = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

/// Fails unless every text can be looked up in these rules.
///
/// They are a length, that many bytes of a double array (a trie of bytes, each unit 32 bits), and texts that end in a
/// zero byte. A unit's place and its offset say where its children are; a child is known by its label, and a unit with
/// a value keeps it in the child of the zero byte: where in the texts the replacement begins.
pub fn check_rules(rules: &[u8]) -> Result<(), String> {
    if rules.is_empty() {
        return Ok(());
    }
    let wrong = |why: &str| Err(format!("its rules for characters are damaged: {why}"));
    let split = rules.split_first_chunk().and_then(|(size, rest)| {
        let size = u32::from_le_bytes(*size) as usize;
        rest.split_at_checked(size).filter(|_| size.is_multiple_of(4))
    });
    let Some((trie, texts)) = split else { return wrong("the trie is cut off") };
    let Ok(texts) = std::str::from_utf8(texts) else { return wrong("a replacement is not UTF-8") };
    let units: Vec<u32> = trie.chunks_exact(4).map(|unit| u32::from_le_bytes(unit.try_into().expect("four"))).collect();
    let offset = |unit: u32| ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize;
    let Some(root) = units.first() else { return wrong("the trie is empty") };
    let mut seen = vec![false; units.len()];
    let mut open = vec![offset(*root)];
    while let Some(base) = open.pop() {
        for label in 1..=0xffusize {
            let Some(&unit) = units.get(base ^ label) else { return wrong("the trie leads outside of itself") };
            // Values have the highest bit, and so are nobody's child.
            if (unit & (1 << 31 | 0xff)) as usize != label || std::mem::replace(&mut seen[base ^ label], true) {
                continue;
            }
            let next = (base ^ label) ^ offset(unit);
            if unit >> 8 & 1 == 1 {
                let value = units.get(next).map(|value| (value & !(1 << 31)) as usize);
                if !value.is_some_and(|at| texts.is_char_boundary(at)) {
                    return wrong("a replacement lies outside of the texts");
                }
            }
            open.push(next);
        }
    }
    Ok(())
}

fn read_piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: 1 };
    for field in Fields(bytes) {
        match field? {
            (1, Field::Bytes(text)) => {
                piece.text = String::from_utf8(text.to_vec()).map_err(|_| "its text is not UTF-8".to_owned())?;
            }
            (2, Field::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Field::Varint(kind @ 1..=6)) => piece.kind = kind as u32,
            (3, Field::Varint(kind)) => return Err(format!("its kind is {kind}, expected 1 to 6")),
            _ => {}
        }
    }
    if !piece.score.is_finite() {
        return Err(format!("its score is {}", piece.score));
    }
    Ok(piece)
}

/// The value of a field.
#[derive(Debug)]
enum Field<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

/// Number and value of each field of a message.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or("it ends within a field")?;
        self.0 = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number in it has more than ten bytes".to_owned())
    }

    fn field(&mut self) -> Result<(u64, Field<'a>), String> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Fixed64
            }
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| "it ends within a field")?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes"))),
            other => return Err(format!("it has a field of the unknown type {other}")),
        };
        Ok((tag >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

#[cfg(test)]
#[path = "../../../tests/fixtures/sentencepiece.rs"]
mod written;

#[cfg(test)]
mod tests {
    use super::written::{bytes, number, piece};
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let trainer = [number(3, 2), bytes(1, b"input.txt"), number(43, -1), number(42, 5), number(35, 1)].concat();
        let normalizer = [bytes(1, b"identity"), number(3, 0), number(4, 0)].concat();
        [piece("<unk>", 0.0, 2), piece("▁a", -1.5, 1), bytes(2, &trainer), bytes(3, &normalizer)].concat()
    }

    #[test]
    fn pieces_and_settings_are_read() {
        let expected = SentencePiece {
            pieces: vec![
                Piece { text: "<unk>".to_owned(), score: 0.0, kind: 2 },
                Piece { text: "▁a".to_owned(), score: -1.5, kind: 1 },
            ],
            algorithm: Algorithm::Bpe,
            byte_fallback: true,
            add_dummy_prefix: false,
            remove_extra_whitespaces: false,
            escape_whitespaces: true,
            whitespace_as_suffix: false,
            rules: Vec::new(),
            unknown: Some(0),
            bos: Some(1),
            eos: Some(5),
            padding: None,
        };
        assert_eq!(SentencePiece::parse(&sample()).unwrap(), expected);
        // A piece without a score, a model without settings, a field of no interest.
        let plain = [bytes(1, &bytes(1, b"x")), vec![9 << 3 | 1, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
        let plain = SentencePiece::parse(&plain).unwrap();
        assert_eq!((plain.pieces[0].kind, plain.algorithm, plain.normalizes()), (1, Algorithm::Unigram, true));
    }

    #[test]
    fn what_is_no_model_is_refused() {
        let refused = |bytes: &[u8]| SentencePiece::parse(bytes).unwrap_err().to_string();
        assert_eq!(refused(b""), "it holds no pieces");
        // Llama 3's list of base64, where it seems to be a message.
        assert_eq!(refused(b"IQ== 0\nIg== 1\n"), "it holds no pieces");
        assert_eq!(refused(&[0xff; 12]), "a number in it has more than ten bytes");
        assert_eq!(refused(&[0x0b, 0x0c]), "it has a field of the unknown type 3");
        assert_eq!(refused(&bytes(1, &bytes(1, &[0xff]))), "piece 0: its text is not UTF-8");
        assert_eq!(refused(&piece("a", 0.0, 9)), "piece 0: its kind is 9, expected 1 to 6");
        assert_eq!(refused(&piece("a", f32::NAN, 1)), "piece 0: its score is NaN");
        assert_eq!(refused(&bytes(2, &number(3, 7))), "its model type is 7, expected 1 to 4");
        let whole = sample();
        assert_eq!(refused(&whole[..whole.len() - 1]), "it ends within a field");
    }

    /// Rules that turn `a` into `b`: a root, its child with a value, the value.
    fn rules(child: u32, value: u32) -> Vec<u8> {
        let mut units = vec![0u32; 0x200];
        units[0] = 1 << 10 << 8; // children at 0x100
        units[0x100 ^ usize::from(b'a')] = child;
        units[0x100] = value | 1 << 31;
        let trie: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        [&(trie.len() as u32).to_le_bytes()[..], &trie, b"b\0"].concat()
    }

    #[test]
    fn rules_are_followed_to_their_ends() {
        let with = |rules: &[u8]| [piece("a", 0.0, 1), bytes(3, &bytes(2, rules))].concat();
        let offset = u32::from(b'a') << 10;
        let good = rules(u32::from(b'a') | 1 << 8 | offset, 0);
        assert_eq!(SentencePiece::parse(&with(&good)).unwrap().rules, good);
        let refused = |rules: &[u8]| SentencePiece::parse(&with(rules)).unwrap_err().to_string();
        assert!(refused(&good[..100]).ends_with("the trie is cut off"));
        assert!(refused(&[0, 0, 0, 0, b'b', 0]).ends_with("the trie is empty"));
        assert!(refused(&rules(u32::from(b'a') | 1 << 8 | offset, 9)).ends_with("outside of the texts"));
        assert!(refused(&rules(u32::from(b'a') | 0x4000 << 10, 0)).ends_with("outside of itself"));
        assert!(refused(&[&good[..good.len() - 2], &[0xff]].concat()).ends_with("not UTF-8"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..80), at in 0usize..60, value: u8) {
            let _ = SentencePiece::parse(&bytes);
            bytes = sample();
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = SentencePiece::parse(&bytes);
        }
    }
}
