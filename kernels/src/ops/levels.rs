//! The levels of an encoding in the form that rounding wants: which one is nearest, and which byte is kept of it.
//!
//! What is kept of a weight while it is at work is a byte ([`LevelSet::keep`]): the code itself where levels follow codes, the place among
//! the sorted levels where they come from a table. Codes follow at the end through [`codes_of`].

use formats::encoding::{E4M3, code_e4m3, round_e4m3};
use formats::{Encoding, Levels};

/// What rounding asks of the levels of an encoding.
pub trait LevelSet: Copy {
    /// The level nearest to `x`.
    fn nearest(self, x: f32) -> f32;
    /// The smallest and the largest level.
    fn range(self) -> [f32; 2];
    /// The byte that is kept of a level.
    fn keep(self, level: f32) -> u8;
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
    fn keep(self, level: f32) -> u8 {
        (level + self.offset) as i32 as u8
    }
}

/// Sixteen levels of a table, or fewer, from the smallest up.
#[derive(Clone, Copy, Debug)]
pub struct TableLevels {
    /// The levels; behind the last one that again.
    pub levels: [f32; 16],
    /// Between each level and the next; infinite where there are fewer.
    pub middles: [f32; 15],
}

impl LevelSet for TableLevels {
    #[inline(always)]
    fn nearest(self, x: f32) -> f32 {
        let mut level = self.levels[0];
        for i in 0..15 {
            level = if x > self.middles[i] { self.levels[i + 1] } else { level };
        }
        level
    }

    #[inline(always)]
    fn range(self) -> [f32; 2] {
        [self.levels[0], self.levels[15]]
    }

    #[inline(always)]
    fn keep(self, level: f32) -> u8 {
        let mut rank = 0;
        for middle in self.middles {
            rank += u8::from(level > middle);
        }
        rank
    }
}

/// The values of E4M3, which lie the closer the smaller they are.
#[derive(Clone, Copy, Debug)]
pub struct FloatLevels;

impl LevelSet for FloatLevels {
    #[inline(always)]
    fn nearest(self, x: f32) -> f32 {
        round_e4m3(x)
    }

    #[inline(always)]
    fn range(self) -> [f32; 2] {
        [-448.0, 448.0]
    }

    #[inline(always)]
    fn keep(self, level: f32) -> u8 {
        code_e4m3(level)
    }
}

/// The levels of any encoding.
#[derive(Clone, Copy, Debug)]
pub enum AnyLevels {
    /// Integers one apart.
    Even(EvenLevels),
    /// Those of a table.
    Table(TableLevels),
    /// Those of E4M3.
    Float(FloatLevels),
}

impl AnyLevels {
    /// The levels of an encoding.
    ///
    /// # Panics
    /// Without codes, or with a table of more than sixteen levels that is not E4M3's: a mistake of the caller.
    pub fn of(encoding: &Encoding) -> AnyLevels {
        match encoding.levels {
            // The lowest of 256 signed levels has no counterpart above, and no encoder uses it.
            Levels::Integer { codes, zero } => {
                let lowest = if codes == 256 && zero > 0 { 1 } else { 0 };
                let zero = i16::from(zero);
                let [low, high, offset] = [lowest - zero, codes as i16 - 1 - zero, zero].map(f32::from);
                AnyLevels::Even(EvenLevels { low, high, offset })
            }
            Levels::Table(_) if encoding.levels == Levels::Table(&E4M3) => AnyLevels::Float(FloatLevels),
            Levels::Table(table) => {
                let sorted = sorted(table);
                let (mut levels, mut middles) = ([sorted[sorted.len() - 1]; 16], [f32::INFINITY; 15]);
                levels[..sorted.len()].copy_from_slice(&sorted);
                for (middle, pair) in middles.iter_mut().zip(sorted.windows(2)) {
                    *middle = 0.5 * (pair[0] + pair[1]);
                }
                AnyLevels::Table(TableLevels { levels, middles })
            }
            Levels::Plain(_) => panic!("plain values have no levels"),
        }
    }
}

/// The levels of a table from the smallest up, each once; of two zeros the one without a sign.
fn sorted(table: &[f32]) -> Vec<f32> {
    let mut levels: Vec<f32> = table.iter().map(|level| level + 0.0).collect();
    levels.sort_unstable_by(f32::total_cmp);
    levels.dedup();
    levels
}

/// The code of each byte that is kept.
pub fn codes_of(encoding: &Encoding) -> [u8; 256] {
    let mut codes: [u8; 256] = std::array::from_fn(|byte| byte as u8);
    if let (Levels::Table(table), AnyLevels::Table(set)) = (encoding.levels, AnyLevels::of(encoding)) {
        // Downwards, so that of two codes for one level the first stays.
        for (code, level) in table.iter().enumerate().rev() {
            codes[usize::from(set.keep(*level))] = code as u8;
        }
    }
    codes
}

/// The level of each code; 0 of those that the encoding has not, or that stand for no number.
pub fn levels_of(encoding: &Encoding) -> [f32; 256] {
    std::array::from_fn(|code| match code < encoding.levels.count() {
        true => Some(encoding.levels.level(code as u8)).filter(|level| level.is_finite()).unwrap_or(0.0),
        false => 0.0,
    })
}

/// Runs the body for the set that `$levels` is, by its own name.
macro_rules! with_levels {
    ($levels:expr, $set:ident => $body:expr) => {
        match $levels {
            $crate::ops::levels::AnyLevels::Even($set) => $body,
            $crate::ops::levels::AnyLevels::Table($set) => $body,
            $crate::ops::levels::AnyLevels::Float($set) => $body,
        }
    };
}

pub(crate) use with_levels;

#[cfg(test)]
mod tests {
    use formats::encoding::PRESETS;
    use formats::ggml::TYPES;

    use super::*;

    #[test]
    fn every_code_is_the_nearest_to_its_own_level() {
        let types = TYPES.iter().map(|ty| (ty.name, ty.encoding()));
        for (name, encoding) in PRESETS.iter().copied().chain(types).filter(|(_, encoding)| encoding.has_codes()) {
            let codes = codes_of(&encoding);
            for code in 0..encoding.levels.count() {
                let level = encoding.levels.level(code as u8);
                let found = with_levels!(AnyLevels::of(&encoding), set => {
                    let nearest = set.nearest(level);
                    (nearest, codes[usize::from(set.keep(nearest))])
                });
                let unused = !level.is_finite() || level == -128.0;
                assert!(unused || found.0 == level, "{name}: {level} becomes {}", found.0);
                assert!(unused || encoding.levels.level(found.1) == level, "{name}: {level} has the code {}", found.1);
            }
        }
    }
}
