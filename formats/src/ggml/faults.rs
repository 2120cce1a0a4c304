//! Which blocks have scales that stand for no numbers, or for too few of them, found without a look at the codes.

use super::{Block, GgmlType, blocks_of};
use crate::encoding::{Float, Scale};

/// What is the matter with blocks, or with runs of [`GgmlType::span`] values where there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScaleFaults {
    /// The first whose scale or min is no number, infinite, or the largest that is stored, to which larger ones were cut.
    pub beyond: Option<usize>,
    /// Those whose scale is 0 or a few steps above it. What they hold may still be near: of zeros, or of equal values
    /// that their min says. Only the values tell.
    pub tiny: Vec<usize>,
}

/// Values of F16 that are looked at together: one small value says nothing, a run of them does.
const RUN: usize = 256;

/// The smallest half above 0.
const STEP: f32 = 5.960_464_5e-8;

impl GgmlType {
    /// How many values [`GgmlType::scale_faults`] counts as one: those of a block, or a run of a type without.
    pub fn span(&self) -> usize {
        if self.block_len > 1 { self.block_len } else { RUN }
    }

    /// Judges the scales of whole blocks.
    ///
    /// # Panics
    /// Unless `bytes` are whole blocks.
    pub fn scale_faults(&self, bytes: &[u8]) -> ScaleFaults {
        assert!(bytes.len().is_multiple_of(self.block_bytes), "whole blocks of {self}");
        match &self.blocks {
            Some(blocks) => (blocks.judge)(bytes),
            None => self.run_faults(bytes),
        }
    }

    fn run_faults(&self, bytes: &[u8]) -> ScaleFaults {
        let mut faults = ScaleFaults::default();
        // The bits of infinity, and those below which a run of halves is tiny; the others have the range of a float.
        let (infinite, tiny) = match self.name {
            "F16" => (0x7c00, 32),
            "BF16" => (0x7f80, 0),
            _ => return faults,
        };
        for (index, run) in bytes.chunks(RUN * self.block_bytes).enumerate() {
            let peak = run.chunks_exact(2).fold(0, |peak: u16, b| peak.max(u16::from_le_bytes([b[0], b[1]]) & 0x7fff));
            if peak >= infinite {
                faults.beyond = faults.beyond.or(Some(index));
            }
            if peak < tiny {
                faults.tiny.push(index);
            }
        }
        faults
    }
}

super::over_blocks! {
    /// [`GgmlType::scale_faults`] of the type whose blocks are `B`.
    fn judge_each<B: Block>(bytes: &[u8], faults: &mut ScaleFaults) {
        let (levels, has_min) = (B::ENCODING.levels, B::ENCODING.has_min());
        let top = (0..levels.count()).fold(0.0f32, |top, code| top.max(levels.level(code as u8).abs()));
        let (largest, small) = match B::ENCODING.scale {
            // At 2^125 a level of 12 is infinite.
            Scale::Own(Float::E8M0) => (4.253_529_6e37, f32::MIN_POSITIVE),
            // Integers between a block's scale and those of its groups find their place beside a coarse one.
            Scale::Sub { .. } => (65504.0, 8.0 * STEP),
            // Rounded, it moves the outermost level by half a step and more.
            _ => (65504.0, top * STEP),
        };
        for (index, block) in blocks_of::<B>(bytes).iter().enumerate() {
            let mut codes = [0; 256];
            let scales = block.unpack(&mut codes[..B::LEN]);
            let (d, m) = (scales.d.abs(), if has_min { scales.m.abs() } else { 0.0 });
            // Written so that a NaN is beyond.
            if !(d < largest && m < largest) {
                faults.beyond = faults.beyond.or(Some(index));
            }
            if d <= small {
                faults.tiny.push(index);
            }
        }
    }
}

/// What [`GgmlType::of`] keeps of it.
pub(super) fn judge_blocks<B: Block>(bytes: &[u8]) -> ScaleFaults {
    let mut faults = ScaleFaults::default();
    judge_each::<B>(bytes, &mut faults);
    faults
}

#[cfg(test)]
mod tests {
    use super::super::{BlockScales, TYPES};
    use super::*;

    #[test]
    fn scales_at_their_ends_are_found() {
        for ty in TYPES.iter().filter(|ty| ty.layout().is_some()) {
            let layout = ty.layout().unwrap();
            let judged = |scales: [(f32, f32); 3]| {
                let blocks = scales.map(|(d, m)| BlockScales { d, m, scales: [9; 16], mins: [3; 16] });
                let mut bytes = vec![0; 3 * ty.block_bytes];
                ty.pack(&blocks, &vec![1; 3 * ty.block_len], &mut bytes);
                ty.scale_faults(&bytes)
            };
            let usual = (0.25, 0.0);
            assert_eq!(judged([usual; 3]), ScaleFaults::default(), "{ty}");
            let halves = layout.precision() == Float::F16;
            let large: &[f32] = if halves { &[65504.0, f32::INFINITY, f32::NAN] } else { &[1e38, f32::INFINITY] };
            for &d in large {
                assert_eq!(judged([usual, (d, 0.0), (d, 0.0)]).beyond, Some(1), "{ty}: {d}");
            }
            if layout.has_min() {
                assert_eq!(judged([usual, usual, (0.25, 1e6)]).beyond, Some(2), "{ty}");
            }
            let small: &[f32] = if halves { &[0.0, STEP, -STEP] } else { &[0.0] };
            for &d in small.iter().filter(|d| **d >= 0.0 || !layout.has_min()) {
                let faults = judged([(d, 0.0), usual, (d, 0.0)]);
                assert_eq!((faults.beyond, faults.tiny), (None, vec![0, 2]), "{ty}: {d}");
            }
            let largest = if halves { 65472.0 } else { 2e37 };
            assert_eq!(judged([(largest, 0.0), usual, usual]), ScaleFaults::default(), "{ty}");
        }
    }

    #[test]
    fn runs_of_plain_values_are_judged_whole() {
        let halves = GgmlType::from_name("F16").unwrap();
        let mut values = vec![1e-7; 3 * RUN - 5];
        values[RUN] = 0.5;
        let judge = |ty: &GgmlType, values: &[f32]| {
            let mut bytes = vec![0; values.len() * ty.block_bytes];
            ty.encode(values, &mut bytes).unwrap();
            ty.scale_faults(&bytes)
        };
        assert_eq!(judge(&halves, &values), ScaleFaults { beyond: None, tiny: vec![0, 2] });
        values[2 * RUN] = 1e5;
        assert_eq!(judge(&halves, &values), ScaleFaults { beyond: Some(2), tiny: vec![0] });
        for name in ["BF16", "F32"] {
            assert_eq!(judge(&GgmlType::from_name(name).unwrap(), &values), ScaleFaults::default());
        }
        values[0] = f32::MAX;
        assert_eq!(judge(&GgmlType::from_name("BF16").unwrap(), &values).beyond, Some(0));
    }
}
