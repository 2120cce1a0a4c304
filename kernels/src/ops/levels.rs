//! The levels of an encoding in the form that rounding wants: which one is nearest, and what its code is.
//!
//! Wherever levels come from a table, what is kept of a weight while it is at work is its level with 128 added, a byte; codes follow at
//! the end through [`codes_of`].

use formats::{Encoding, Levels};

/// What rounding asks of the levels of an encoding.
pub trait LevelSet: Copy {
    /// The level nearest to `x`.
    fn nearest(self, x: f32) -> f32;
    /// The smallest and the largest level.
    fn range(self) -> [f32; 2];
    /// The code of a level; `codes` is [`codes_of`] the encoding.
    fn code(self, level: f32, codes: &[u8; 256]) -> u8;
}

/// Every integer from one to another.
#[derive(Clone, Copy, Debug)]
pub struct EvenLevels {
    /// The level of the smallest code.
    pub low: f32,
    /// The level of the largest code.
    pub high: f32,
    /// The code of the level 0.
    pub offset: f32,
}

impl LevelSet for EvenLevels {
    #[inline(always)]
    fn nearest(self, x: f32) -> f32 {
        x.round_ties_even().clamp(self.low, self.high)
    }

    #[inline(always)]
    fn range(self) -> [f32; 2] {
        [self.low, self.high]
    }

    #[inline(always)]
    fn code(self, level: f32, _: &[u8; 256]) -> u8 {
        (level + self.offset) as i32 as u8
    }
}

/// Sixteen levels of a table, or fewer: where one gives way to the next, and by how much.
#[derive(Clone, Copy, Debug)]
pub struct TableLevels {
    /// The level that all smaller values are rounded to.
    pub first: f32,
    /// The level that all larger values are rounded to.
    pub last: f32,
    /// Between each level and the next; infinite where there are fewer.
    pub middles: [f32; 15],
    /// From each level to the next.
    pub steps: [f32; 15],
}

impl LevelSet for TableLevels {
    #[inline(always)]
    fn nearest(self, x: f32) -> f32 {
        let mut level = self.first;
        for i in 0..15 {
            level += if x > self.middles[i] { self.steps[i] } else { 0.0 };
        }
        level
    }

    #[inline(always)]
    fn range(self) -> [f32; 2] {
        [self.first, self.last]
    }

    #[inline(always)]
    fn code(self, level: f32, codes: &[u8; 256]) -> u8 {
        codes[usize::from((level + 128.0) as i32 as u8)]
    }
}

/// The levels of any encoding.
#[derive(Clone, Copy, Debug)]
pub enum AnyLevels {
    /// Integers one apart.
    Even(EvenLevels),
    /// Those of a table, of integers: steps between them are added up, which is exact for these alone.
    Table(TableLevels),
}

impl AnyLevels {
    /// The levels of an encoding.
    ///
    /// # Panics
    /// Without codes, or with a table of more than sixteen levels: a mistake of the caller.
    pub fn of(encoding: &Encoding) -> AnyLevels {
        match encoding.levels {
            // The lowest of 256 levels has no counterpart above, and no encoder uses it.
            Levels::Integer { codes, zero } => {
                let lowest = if codes == 256 { 1 } else { 0 };
                let zero = i16::from(zero);
                let [low, high, offset] = [lowest - zero, codes as i16 - 1 - zero, zero].map(f32::from);
                AnyLevels::Even(EvenLevels { low, high, offset })
            }
            Levels::Table(table) => {
                let mut levels = table.to_vec();
                levels.sort_unstable_by(f32::total_cmp);
                levels.dedup();
                let (mut middles, mut steps) = ([f32::INFINITY; 15], [0.0; 15]);
                for (i, pair) in levels.windows(2).enumerate() {
                    (middles[i], steps[i]) = (0.5 * (pair[0] + pair[1]), pair[1] - pair[0]);
                }
                AnyLevels::Table(TableLevels { first: levels[0], last: levels[levels.len() - 1], middles, steps })
            }
            Levels::Plain(_) => panic!("plain values have no levels"),
        }
    }
}

/// The code of each level, at `level + 128`.
pub fn codes_of(encoding: &Encoding) -> [u8; 256] {
    let mut codes = [0; 256];
    // Downwards, so that of two codes for one level the first stays.
    for code in (0..encoding.levels.count()).rev() {
        codes[(encoding.levels.level(code as u8) + 128.0) as usize] = code as u8;
    }
    codes
}
