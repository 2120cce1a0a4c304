//! The alphabet of GPT-2, in which byte-level tokenizers spell bytes: printable Latin-1 is itself, the 68 others follow U+0100 in order.

/// The byte that a character of the alphabet stands for.
pub(crate) fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ 0..0x100 => Some(code as u8).filter(printable),
        code => (0..=255u8).filter(|b| !printable(b)).nth((code - 0x100) as usize),
    }
}

/// Bytes in the alphabet.
pub(super) fn spelt(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char_of(*byte)).collect()
}

fn char_of(byte: u8) -> char {
    let code = match printable(&byte) {
        true => u32::from(byte),
        false => 0x100 + (0..byte).filter(|b| !printable(b)).count() as u32,
    };
    char::from_u32(code).expect("below U+0144")
}

fn printable(byte: &u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        assert_eq!(spelt(b" a\n\xad~"), "ĠaĊŃ~");
        for byte in 0..=255 {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
        assert_eq!([byte_of('\u{144}'), byte_of('漢')], [None, None]);
    }
}
