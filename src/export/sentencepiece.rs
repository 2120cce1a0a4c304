//! The vocabulary in a SentencePiece `tokenizer.model`.
//!
//! A protocol-buffers message (`ModelProto` of sentencepiece_model.proto); only the fields that a GGUF file needs are
//! read, everything else is skipped.

/// What a tokenizer.model says.
#[derive(Clone, Debug, PartialEq)]
pub struct SentencePiece {
    /// The pieces, by id.
    pub pieces: Vec<Piece>,
    /// Trained as a unigram model, and not by joining pairs.
    pub unigram: bool,
    /// A space is put before every text.
    pub add_dummy_prefix: bool,
    /// Characters are replaced by rules, or spaces collapsed, before the text is split.
    pub normalizes: bool,
    /// Ids of the unknown token, BOS, EOS and padding, where it has them.
    pub unknown: Option<u32>,
    /// Starts a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Fills a batch.
    pub padding: Option<u32>,
}

/// One piece.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Its text, spaces as `▁`.
    pub text: String,
    /// Pieces of higher score are joined first.
    pub score: f32,
    /// What it is; the numbers are GGUF's, too.
    pub kind: u32,
}

impl SentencePiece {
    /// Reads the bytes of a tokenizer.model. Fails, with the reason, for what is no such message.
    pub fn parse(bytes: &[u8]) -> Result<SentencePiece, String> {
        let mut model = SentencePiece {
            pieces: Vec::new(),
            // The defaults of the message.
            unigram: true,
            add_dummy_prefix: true,
            normalizes: false,
            unknown: Some(0),
            bos: Some(1),
            eos: Some(2),
            padding: None,
        };
        let mut collapses = true;
        let mut rules = false;
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(piece)) => model.pieces.push(read_piece(piece)?),
                (2, Field::Bytes(trainer)) => {
                    for field in Fields(trainer) {
                        let id = |value: u64| u32::try_from(value as i64).ok();
                        match field? {
                            (3, Field::Varint(kind)) => model.unigram = kind == 1,
                            (40, Field::Varint(value)) => model.unknown = id(value),
                            (41, Field::Varint(value)) => model.bos = id(value),
                            (42, Field::Varint(value)) => model.eos = id(value),
                            (43, Field::Varint(value)) => model.padding = id(value),
                            _ => {}
                        }
                    }
                }
                (3, Field::Bytes(normalizer)) => {
                    for field in Fields(normalizer) {
                        match field? {
                            (2, Field::Bytes(map)) => rules = !map.is_empty(),
                            (3, Field::Varint(flag)) => model.add_dummy_prefix = flag != 0,
                            (4, Field::Varint(flag)) => collapses = flag != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("it holds no pieces".to_owned());
        }
        model.normalizes = rules || collapses;
        Ok(model)
    }
}

fn read_piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: 1 };
    for field in Fields(bytes) {
        match field? {
            (1, Field::Bytes(text)) => {
                piece.text = String::from_utf8(text.to_vec()).map_err(|_| "a piece is not UTF-8".to_owned())?;
            }
            (2, Field::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Field::Varint(kind @ 1..=6)) => piece.kind = kind as u32,
            (3, Field::Varint(kind)) => return Err(format!("a piece is of the unknown kind {kind}")),
            _ => {}
        }
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
pub(crate) mod testing {
    /// A field of the type that has a length before it.
    pub fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
        let mut out = varint(u64::from(number) << 3 | 2);
        out.extend(varint(content.len() as u64));
        out.extend(content);
        out
    }

    /// A field that is a number.
    pub fn number(number: u8, value: i64) -> Vec<u8> {
        [varint(u64::from(number) << 3), varint(value as u64)].concat()
    }

    fn varint(mut value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
        out
    }

    /// A piece of a model.
    pub fn piece(text: &str, score: f32, kind: i64) -> Vec<u8> {
        let mut score_field = vec![2 << 3 | 5];
        score_field.extend(score.to_le_bytes());
        bytes(1, &[bytes(1, text.as_bytes()), score_field, number(3, kind)].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{bytes, number, piece};
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let trainer = [number(3, 2), bytes(1, b"input.txt"), number(43, -1), number(42, 5)].concat();
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
            unigram: false,
            add_dummy_prefix: false,
            normalizes: false,
            unknown: Some(0),
            bos: Some(1),
            eos: Some(5),
            padding: None,
        };
        assert_eq!(SentencePiece::parse(&sample()), Ok(expected));
        // A piece without a score, a model without settings, a field of no interest.
        let plain = [bytes(1, &bytes(1, b"x")), vec![9 << 3 | 1, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
        let plain = SentencePiece::parse(&plain).unwrap();
        assert_eq!((plain.pieces[0].kind, plain.unigram, plain.normalizes), (1, true, true));
    }

    #[test]
    fn what_is_no_model_is_refused() {
        let refused = |bytes: &[u8]| SentencePiece::parse(bytes).unwrap_err();
        assert_eq!(refused(b""), "it holds no pieces");
        // Llama 3's list of base64, where it seems to be a message.
        assert_eq!(refused(b"IQ== 0\nIg== 1\n"), "it holds no pieces");
        assert_eq!(refused(&[0xff; 12]), "a number in it has more than ten bytes");
        assert_eq!(refused(&[0x0b, 0x0c]), "it has a field of the unknown type 3");
        assert_eq!(refused(&bytes(1, &bytes(1, &[0xff]))), "a piece is not UTF-8");
        assert_eq!(refused(&piece("a", 0.0, 9)), "a piece is of the unknown kind 9");
        let whole = sample();
        assert_eq!(refused(&whole[..whole.len() - 1]), "it ends within a field");
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
