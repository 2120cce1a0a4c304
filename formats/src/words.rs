//! How packed codes lie in the 32-bit words of a file: row by row, turned round, or in AWQ's order.

use crate::bits;
use crate::error::{Error, Result};

/// How the words of packed codes `[rows, cols]` lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WordLayout {
    /// `[rows, words]`: each row a stream of bits (`weight_packed` of compressed-tensors).
    Rows,
    /// `[words, rows]`: the same, words transposed (`qweight` of GPTQ).
    RowsTransposed,
    /// `[cols, words]`: each column a stream of codes less one (`qzeros` of GPTQ, version 1).
    ColumnsLessOne,
    /// `[words, cols]`: each column a stream, words transposed (`weight_zero_point` of compressed-tensors).
    ColumnsTransposed,
    /// `[cols, rows / 8]`: eight rows a word in the order 0 2 4 6 1 3 5 7 (`qweight` and `qzeros` of AWQ, 4 bits).
    Awq,
}

/// The row, of eight, whose code lies in each nibble of a word of AWQ's, from the lowest.
pub(crate) const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

impl WordLayout {
    /// Words that codes `[rows, cols]` of `bits` bits take.
    ///
    /// Fails where the layout has no room for such codes.
    pub fn words(self, [rows, cols]: [usize; 2], bits: u8) -> Result<usize> {
        let awq = self == WordLayout::Awq;
        if !(1..=8).contains(&bits) || awq && bits != 4 {
            return Err(Error::mismatch("the width of a code", if awq { "4 bits" } else { "1 to 8 bits" }, bits));
        }
        if awq && !rows.is_multiple_of(8) {
            return Err(Error::mismatch("the number of rows", "a multiple of 8", rows));
        }
        Ok(match self {
            WordLayout::Rows | WordLayout::RowsTransposed => rows * bits::packed_words(cols, bits),
            WordLayout::ColumnsLessOne | WordLayout::ColumnsTransposed => cols * bits::packed_words(rows, bits),
            WordLayout::Awq => rows / 8 * cols,
        })
    }

    /// The codes `[rows, cols]` that words hold: what [`pack`](Self::pack) packed.
    ///
    /// Fails where the layout has no room for such codes, or there are more or fewer words.
    pub fn unpack(self, words: &[u32], [rows, cols]: [usize; 2], bits: u8) -> Result<Vec<u8>> {
        let count = self.words([rows, cols], bits)?;
        if words.len() != count {
            return Err(Error::mismatch("the number of words", count, words.len()));
        }
        Ok(match self {
            WordLayout::Rows => unpack_rows(words, rows, cols, bits),
            WordLayout::RowsTransposed => {
                unpack_rows(&transpose(words, bits::packed_words(cols, bits), rows), rows, cols, bits)
            }
            WordLayout::ColumnsLessOne => {
                let mut codes = transpose(&unpack_rows(words, cols, rows, bits), cols, rows);
                let low = u8::MAX >> (8 - bits);
                codes.iter_mut().for_each(|code| *code = code.wrapping_add(1) & low);
                codes
            }
            WordLayout::ColumnsTransposed => {
                let columns = transpose(words, bits::packed_words(rows, bits), cols);
                transpose(&unpack_rows(&columns, cols, rows, bits), cols, rows)
            }
            WordLayout::Awq => unpack_awq(words, rows, cols),
        })
    }

    /// Packs `codes` `[rows, cols]`, each below `2^bits`.
    ///
    /// Fails where the layout has no room for such codes, or there are more or fewer.
    pub fn pack(self, codes: &[u8], [rows, cols]: [usize; 2], bits: u8) -> Result<Vec<u32>> {
        self.words([rows, cols], bits)?;
        if codes.len() != rows * cols {
            return Err(Error::mismatch("the number of codes", rows * cols, codes.len()));
        }
        Ok(match self {
            WordLayout::Rows => pack_rows(codes, cols, bits),
            // A row's bit stream fills whole words, so packing rows and transposing words packs along the columns.
            WordLayout::RowsTransposed => {
                transpose(&pack_rows(codes, cols, bits), rows, bits::packed_words(cols, bits))
            }
            WordLayout::ColumnsLessOne => {
                let mut columns = transpose(codes, rows, cols);
                let low = u8::MAX >> (8 - bits);
                columns.iter_mut().for_each(|code| *code = code.wrapping_sub(1) & low);
                pack_rows(&columns, rows, bits)
            }
            WordLayout::ColumnsTransposed => {
                let packed = pack_rows(&transpose(codes, rows, cols), rows, bits);
                transpose(&packed, cols, bits::packed_words(rows, bits))
            }
            WordLayout::Awq => pack_awq(codes, rows, cols),
        })
    }
}

/// Packs each of the rows of `codes` (`[rows, cols]`) into whole 32-bit words.
fn pack_rows(codes: &[u8], cols: usize, bits: u8) -> Vec<u32> {
    let row_words = bits::packed_words(cols, bits);
    let mut words = vec![0; codes.len().checked_div(cols).unwrap_or(0) * row_words];
    if row_words > 0 {
        let mut packed = vec![0; 4 * row_words];
        for (codes, out) in codes.chunks_exact(cols).zip(words.chunks_exact_mut(row_words)) {
            bits::pack(codes, bits, &mut packed);
            for (word, bytes) in out.iter_mut().zip(packed.chunks_exact(4)) {
                *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
            }
        }
    }
    words
}

/// The codes of rows that were packed into whole words each.
fn unpack_rows(words: &[u32], rows: usize, cols: usize, bits: u8) -> Vec<u8> {
    let row_words = bits::packed_words(cols, bits);
    let mut codes = vec![0; rows * cols];
    if row_words > 0 {
        let mut packed = vec![0; 4 * row_words];
        for (codes, words) in codes.chunks_exact_mut(cols).zip(words.chunks_exact(row_words)) {
            for (bytes, word) in packed.chunks_exact_mut(4).zip(words) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            bits::unpack(&packed, bits, codes);
        }
    }
    codes
}

fn unpack_awq(words: &[u32], rows: usize, cols: usize) -> Vec<u8> {
    let words = transpose(words, cols, rows / 8);
    let mut codes = vec![0; rows * cols];
    if cols > 0 {
        for (codes, words) in codes.chunks_exact_mut(8 * cols).zip(words.chunks_exact(cols)) {
            for (k, row) in AWQ_ORDER.into_iter().enumerate() {
                for (code, word) in codes[row * cols..][..cols].iter_mut().zip(words) {
                    *code = (word >> (4 * k) & 15) as u8;
                }
            }
        }
    }
    codes
}

fn pack_awq(codes: &[u8], rows: usize, cols: usize) -> Vec<u32> {
    let mut words = vec![0; rows / 8 * cols];
    if cols > 0 {
        for (words, codes) in words.chunks_exact_mut(cols).zip(codes.chunks_exact(8 * cols)) {
            for (k, row) in AWQ_ORDER.into_iter().enumerate() {
                for (word, &code) in words.iter_mut().zip(&codes[row * cols..][..cols]) {
                    *word |= u32::from(code) << (4 * k);
                }
            }
        }
    }
    transpose(&words, rows / 8, cols)
}

/// Transposes a `[rows, cols]` matrix, in tiles that stay in cache.
pub(crate) fn transpose<T: Copy + Default>(matrix: &[T], rows: usize, cols: usize) -> Vec<T> {
    const TILE: usize = 32;
    let mut out = vec![T::default(); rows * cols];
    for row in (0..rows).step_by(TILE) {
        for col in (0..cols).step_by(TILE) {
            for c in col..cols.min(col + TILE) {
                for r in row..rows.min(row + TILE) {
                    out[c * rows + r] = matrix[r * cols + c];
                }
            }
        }
    }
    out
}

/// Little-endian bytes of 32-bit words as words.
pub(crate) fn to_words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// The inverse of [`to_words`].
pub(crate) fn from_words(words: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0; 4 * words.len()];
    for (out, word) in bytes.chunks_exact_mut(4).zip(words) {
        out.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_twice_is_the_identity() {
        for (rows, cols) in [(0, 3), (1, 1), (33, 70), (64, 32)] {
            let m: Vec<u32> = (0..rows * cols).map(|i| i as u32).collect();
            let t = transpose(&m, rows, cols);
            assert!((0..rows * cols).all(|i| t[(i % cols) * rows + i / cols] == m[i]));
            assert_eq!(transpose(&t, cols, rows), m);
        }
    }

    #[test]
    fn what_has_no_room_is_refused() {
        let message = |result: Result<Vec<u32>>| result.unwrap_err().to_string();
        assert_eq!(message(WordLayout::Awq.pack(&[0; 24], [8, 3], 3)), "the width of a code is 3, expected 4 bits");
        assert_eq!(
            message(WordLayout::Awq.pack(&[0; 12], [4, 3], 4)),
            "the number of rows is 4, expected a multiple of 8"
        );
        assert_eq!(
            message(WordLayout::Rows.pack(&[0; 12], [4, 3], 9)),
            "the width of a code is 9, expected 1 to 8 bits"
        );
        assert_eq!(message(WordLayout::Rows.pack(&[0; 11], [4, 3], 4)), "the number of codes is 11, expected 12");
    }

    #[test]
    fn words_are_as_many_as_are_said_and_hold_the_codes() {
        let layouts = [
            WordLayout::Rows,
            WordLayout::RowsTransposed,
            WordLayout::ColumnsLessOne,
            WordLayout::ColumnsTransposed,
            WordLayout::Awq,
        ];
        for shape @ [rows, cols] in [[0, 5], [8, 0], [8, 33], [16, 7]] {
            for (layout, bits) in layouts.into_iter().flat_map(|layout| [(layout, 3), (layout, 4)]) {
                if let Ok(words) = layout.words(shape, bits) {
                    let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % (1 << bits)) as u8).collect();
                    let packed = layout.pack(&codes, shape, bits).unwrap();
                    assert_eq!(packed.len(), words, "{layout:?} of {shape:?} at {bits} bits");
                    assert_eq!(layout.unpack(&packed, shape, bits).unwrap(), codes, "{layout:?} of {shape:?}");
                    layout.unpack(&vec![0; words + 1], shape, bits).unwrap_err();
                }
            }
        }
    }
}
