//! IQ4_XS: a superblock of 256 weights in 8 groups of 32, `y = (d · (ls − 32)) · LEVELS[q]` with 6-bit `ls`.
//!
//! The low four bits of `ls` of group `g` are the nibble `g % 2` of `scales_l[g / 2]`, its high two bits `2g, 2g + 1` of
//! `scales_h`. Each group has 16 bytes of nibbles in the order of Q4_0; levels are those of IQ4_NL.

use super::iq4_nl::{LEVELS, TABLE, look_up};
use super::simple::{join_nibbles, split_nibbles};
use super::{Block, BlockScales, Encoding, GgmlType, Levels, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockIQ4XS>(23, "IQ4_XS");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockIQ4XS {
    d: [u8; 2],
    scales_h: [u8; 2],
    scales_l: [u8; 4],
    qs: [[u8; 16]; 8],
}

const _: () = assert!(size_of::<BlockIQ4XS>() == 136);

impl BlockIQ4XS {
    #[inline(always)]
    fn scale(&self, group: usize) -> i8 {
        let high = u16::from_le_bytes(self.scales_h) >> (2 * group) & 3;
        let low = self.scales_l[group / 2] >> (4 * (group % 2)) & 15;
        (low | (high as u8) << 4) as i8 - 32
    }
}

// SAFETY: bytes only.
unsafe impl Block for BlockIQ4XS {
    const LEN: usize = 256;
    const ENCODING: Encoding = Encoding::superblocks(Levels::Table(&TABLE), 32, -32, 31);

    #[inline(always)]
    fn decode(&self, out: &mut [f32]) {
        let d = half(self.d);
        for (group, (qs, out)) in self.qs.iter().zip(out.chunks_exact_mut(32)).enumerate() {
            look_up(d * f32::from(self.scale(group)), &LEVELS, qs, out);
        }
    }

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        let mut block = BlockIQ4XS { d: to_half(scales.d), scales_h: [0; 2], scales_l: [0; 4], qs: [[0; 16]; 8] };
        let mut high = 0;
        for group in 0..8 {
            let code = scales.scales[group].wrapping_add(32) as u8;
            block.scales_l[group / 2] |= (code & 15) << (4 * (group % 2));
            high |= u16::from(code >> 4 & 3) << (2 * group);
            block.qs[group] = join_nibbles(&codes[32 * group..]);
        }
        block.scales_h = high.to_le_bytes();
        block
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        let mut scales = BlockScales { d: half(self.d), ..BlockScales::default() };
        for (group, (qs, codes)) in self.qs.iter().zip(codes.chunks_exact_mut(32)).enumerate() {
            scales.scales[group] = self.scale(group);
            split_nibbles(qs, codes);
        }
        scales
    }
}
