//! Q3_K: a superblock of 256 weights in 16 groups of 16, `y = (d · (sc − 32)) · (q − 4)` with 6-bit `sc`.
//!
//! Weight `i = 128·h + 32·j + l` has its low two bits as in Q2_K and its third in bit `4h + j` of `hmask[l]`.
//! Scales: the low four bits of group `g` are the nibble `g / 8` of byte `g % 8`, its high two bits `2·(g / 4)` and the
//! next of byte `8 + g % 4`.

use super::q2_k::{join_pairs, split_pairs};
use super::{Block, BlockScales, Encoding, GgmlType, Levels, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ3K>(11, "Q3_K");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ3K {
    hmask: [u8; 32],
    qs: [u8; 64],
    scales: [u8; 12],
    d: [u8; 2],
}

const _: () = assert!(size_of::<BlockQ3K>() == 110);

// SAFETY: bytes only.
unsafe impl Block for BlockQ3K {
    const LEN: usize = 256;
    const ENCODING: Encoding = Encoding::superblocks(Levels::signed(3), 16, -32, 31);

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        let mut hmask = [0; 32];
        for (part, codes) in codes[..256].chunks_exact(32).enumerate() {
            for (mask, code) in hmask.iter_mut().zip(codes) {
                *mask |= (code >> 2 & 1) << part;
            }
        }
        BlockQ3K { hmask, qs: join_pairs(codes), scales: join_scales(&scales.scales), d: to_half(scales.d) }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_pairs(&self.qs, codes);
        for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, mask) in codes.iter_mut().zip(&self.hmask) {
                *code |= (mask >> part & 1) << 2;
            }
        }
        BlockScales { d: half(self.d), scales: split_scales(&self.scales), ..BlockScales::default() }
    }
}

#[inline(always)]
fn split_scales(s: &[u8; 12]) -> [i8; 16] {
    let mut scales = [0; 16];
    for (g, scale) in scales.iter_mut().enumerate() {
        let code = s[g % 8] >> (4 * (g / 8)) & 15 | (s[8 + g % 4] >> (2 * (g / 4)) & 3) << 4;
        *scale = code as i8 - 32;
    }
    scales
}

#[inline(always)]
fn join_scales(scales: &[i8; 16]) -> [u8; 12] {
    let mut s = [0; 12];
    for (g, scale) in scales.iter().enumerate() {
        let code = scale.wrapping_add(32) as u8;
        s[g % 8] |= (code & 15) << (4 * (g / 8));
        s[8 + g % 4] |= (code >> 4 & 3) << (2 * (g / 4));
    }
    s
}
