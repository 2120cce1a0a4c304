//! What the codes of a block type stand for, and the way between blocks and their scales and codes.

use super::{Blocks, GgmlType};
use crate::encoding::Encoding;

/// The scale fields of one block, the columns that share a stored scale, as the file stores them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BlockScales {
    /// The block's scale; what the block cannot hold is rounded when packed.
    pub d: f32,
    /// The block's min, 0 without one. For Q4_1 and Q5_1 the negated stored `m`, so that a weight is `scale · level − min`.
    pub m: f32,
    /// Integer scales of the groups; unused where blocks have scales of their own.
    pub scales: [i8; 16],
    /// Integer mins of the groups; unused where blocks have scales of their own.
    pub mins: [u8; 16],
}

impl BlockScales {
    /// Writes the scale and the min of each group of the block, in an encoding with codes.
    pub fn expand(&self, encoding: &Encoding, scales: &mut [f32], mins: &mut [f32]) {
        match encoding.sub() {
            None => {
                scales.fill(self.d);
                mins.fill(self.m);
            }
            Some(_) => {
                for (scale, &code) in scales.iter_mut().zip(&self.scales) {
                    *scale = self.d * f32::from(code);
                }
                for (min, &code) in mins.iter_mut().zip(&self.mins) {
                    *min = if encoding.has_min() { self.m * f32::from(code) } else { 0.0 };
                }
            }
        }
    }
}

impl GgmlType {
    /// How a weight in this type is represented. Computed in `f32` from [`GgmlType::expand`], that is what
    /// [`GgmlType::dequantize`] gives, bit for bit.
    pub const fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The same of the types with codes; `None` for F32, F16 and BF16, which have none.
    pub fn layout(&self) -> Option<&Encoding> {
        self.blocks.map(|_| &self.encoding)
    }

    /// Groups in a block; 1 for the types without codes.
    pub fn groups_per_block(&self) -> usize {
        self.layout().map_or(1, |encoding| self.block_len / encoding.group())
    }

    /// Writes the blocks of these scales and codes into `out`. There is one code a weight, from 0.
    ///
    /// Bits of a code beyond the type's are dropped, and so are those of a group's scale or min.
    ///
    /// # Panics
    /// When the type has no codes, or unless `blocks`, `codes` and `out` are for the same blocks.
    pub fn pack(&self, blocks: &[BlockScales], codes: &[u8], out: &mut [u8]) {
        (self.checked(blocks.len(), codes.len(), out.len()).pack)(blocks, codes, out);
    }

    /// Reads scales and codes of the blocks in `bytes`, the reverse of [`GgmlType::pack`].
    ///
    /// # Panics
    /// As [`GgmlType::pack`].
    pub fn unpack(&self, bytes: &[u8], blocks: &mut [BlockScales], codes: &mut [u8]) {
        (self.checked(blocks.len(), codes.len(), bytes.len()).unpack)(bytes, blocks, codes);
    }

    /// Writes the scale and the min of each group of a block, by ggml's arithmetic.
    ///
    /// # Panics
    /// When the type has no codes, or unless both slices hold [`GgmlType::groups_per_block`].
    pub fn expand(&self, block: &BlockScales, scales: &mut [f32], mins: &mut [f32]) {
        let encoding = self.layout().expect("a type with codes");
        let groups = self.groups_per_block();
        assert_eq!((scales.len(), mins.len()), (groups, groups), "groups in a block of {self}");
        block.expand(encoding, scales, mins);
    }

    fn checked(&self, blocks: usize, codes: usize, bytes: usize) -> Blocks {
        let expected = (blocks * self.block_len, blocks * self.block_bytes);
        assert_eq!((codes, bytes), expected, "codes and bytes of {blocks} blocks of {self}");
        self.blocks.expect("a type with codes")
    }
}
