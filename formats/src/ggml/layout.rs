//! What the codes of a block type stand for, and the way between blocks and their scales and codes.

use super::{Blocks, GgmlType};

/// Which reals the codes of a block type stand for: `scale · level − min`, one scale (and min) per `group` columns.
///
/// Computed in `f32` from [`GgmlType::expand`], that is what [`GgmlType::dequantize`] gives, bit for bit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    /// Columns that share one scale and min.
    pub group: usize,
    /// The levels that codes stand for.
    pub levels: Levels,
    /// Whether a min is subtracted.
    pub has_min: bool,
    /// How the groups' scales are stored in terms of the block's; `None` where each group's own scale is stored.
    pub sub: Option<SubScales>,
    /// How the block's scale is stored.
    pub scale: ScaleKind,
}

/// The levels of a type's codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Levels {
    /// Evenly spaced: `level = code − offset`.
    Uniform {
        /// How many codes there are.
        codes: u16,
        /// The code of the level 0.
        offset: i16,
    },
    /// `level = table[code]`.
    Table(&'static [i8; 16]),
}

impl Levels {
    /// How many codes there are.
    pub fn count(&self) -> usize {
        match self {
            Levels::Uniform { codes, .. } => usize::from(*codes),
            Levels::Table(table) => table.len(),
        }
    }

    /// The level of a code.
    ///
    /// # Panics
    /// When a table has no such code.
    #[inline]
    pub fn level(&self, code: u8) -> f32 {
        match self {
            Levels::Uniform { offset, .. } => (i16::from(code) - offset).into(),
            Levels::Table(table) => table[usize::from(code)].into(),
        }
    }
}

/// The integers that multiply a block's scale and min to give those of its groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubScales {
    /// The smallest that a group's scale can be.
    pub low: i8,
    /// The largest.
    pub high: i8,
    /// The largest that a group's min can be, from 0; 0 where there are no mins.
    pub max_min: u8,
}

/// How a block's scale is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleKind {
    /// As a half.
    F16,
    /// As a power of two, `2^(e − 128)` with a byte `e`.
    E8M0,
}

/// The scale fields of one block as the file stores them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BlockScales {
    /// The block's scale; what its [`ScaleKind`] cannot hold is rounded when packed.
    pub d: f32,
    /// The block's min, 0 without one. For Q4_1 and Q5_1 the negated stored `m`, so that a weight is `scale · level − min`.
    pub m: f32,
    /// Integer scales of the groups; unused without [`SubScales`].
    pub scales: [i8; 16],
    /// Integer mins of the groups; unused without [`SubScales`].
    pub mins: [u8; 16],
}

impl GgmlType {
    /// What the codes stand for; `None` for F32, F16 and BF16, which have none.
    pub fn layout(&self) -> Option<&'static Layout> {
        self.blocks.map(|blocks| blocks.layout)
    }

    /// Groups in a block; 1 for the types without a layout.
    pub fn groups_per_block(&self) -> usize {
        self.layout().map_or(1, |layout| self.block_len / layout.group)
    }

    /// Writes the blocks of these scales and codes into `out`. There is one code a weight, from 0.
    ///
    /// Bits of a code beyond the type's are dropped, and so are those of a group's scale or min.
    ///
    /// # Panics
    /// When the type has no layout, or unless `blocks`, `codes` and `out` are for the same blocks.
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
    /// When the type has no layout, or unless both slices hold [`GgmlType::groups_per_block`].
    pub fn expand(&self, block: &BlockScales, scales: &mut [f32], mins: &mut [f32]) {
        let layout = self.layout().expect("a type with a layout");
        let groups = self.groups_per_block();
        assert_eq!((scales.len(), mins.len()), (groups, groups), "groups in a block of {self}");
        match layout.sub {
            None => {
                scales.fill(block.d);
                mins.fill(block.m);
            }
            Some(_) => {
                for (scale, &code) in scales.iter_mut().zip(&block.scales) {
                    *scale = block.d * f32::from(code);
                }
                for (min, &code) in mins.iter_mut().zip(&block.mins) {
                    *min = if layout.has_min { block.m * f32::from(code) } else { 0.0 };
                }
            }
        }
    }

    fn checked(&self, blocks: usize, codes: usize, bytes: usize) -> Blocks {
        let expected = (blocks * self.block_len, blocks * self.block_bytes);
        assert_eq!((codes, bytes), expected, "codes and bytes of {blocks} blocks of {self}");
        self.blocks.expect("a type with a layout")
    }
}
