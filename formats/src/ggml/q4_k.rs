//! Q4_K: a superblock of 256 weights in 8 groups of 32, `y = (d · sc) · q − dmin · mn` with 6-bit `sc` and `mn`.
//!
//! ```text
//! scales[0..4]   bits 0-5: sc of groups 0..4    bits 6-7: high bits of sc of groups 4..8
//! scales[4..8]   bits 0-5: mn of groups 0..4    bits 6-7: high bits of mn of groups 4..8
//! scales[8..12]  low nibble: sc, high nibble: mn of groups 4..8
//! qs[32·p..]     low nibbles: group 2p, high nibbles: group 2p + 1
//! ```

use super::{Block, BlockScales, Encoding, GgmlType, Levels, Offset, half, to_half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ4K>(12, "Q4_K");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ4K {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; 12],
    qs: [u8; 128],
}

const _: () = assert!(size_of::<BlockQ4K>() == 144);

// SAFETY: bytes only.
unsafe impl Block for BlockQ4K {
    const LEN: usize = 256;
    const ENCODING: Encoding = Encoding::superblocks(Levels::unsigned(4), 32, 0, 63).with(Offset::SubMin { max: 63 });

    #[inline(always)]
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self {
        BlockQ4K { d: to_half(scales.d), dmin: to_half(scales.m), scales: join_scales(scales), qs: join_halves(codes) }
    }

    #[inline(always)]
    fn unpack(&self, codes: &mut [u8]) -> BlockScales {
        split_halves(&self.qs, codes);
        split_scales(half(self.d), half(self.dmin), &self.scales)
    }
}

/// The scales of a block of Q4_K or Q5_K.
#[inline(always)]
pub(super) fn split_scales(d: f32, m: f32, s: &[u8; 12]) -> BlockScales {
    let mut scales = BlockScales { d, m, ..BlockScales::default() };
    for group in 0..4 {
        let (sc, mn, high) = (s[group], s[group + 4], s[group + 8]);
        scales.scales[group] = (sc & 63) as i8;
        scales.mins[group] = mn & 63;
        scales.scales[group + 4] = (high & 15 | sc >> 6 << 4) as i8;
        scales.mins[group + 4] = high >> 4 | mn >> 6 << 4;
    }
    scales
}

/// The reverse of [`split_scales`].
#[inline(always)]
pub(super) fn join_scales(scales: &BlockScales) -> [u8; 12] {
    let mut s = [0; 12];
    for group in 0..4 {
        let (sc, mn) = (scales.scales[group] as u8, scales.mins[group]);
        let (sc4, mn4) = (scales.scales[group + 4] as u8, scales.mins[group + 4]);
        s[group] = sc & 63 | sc4 >> 4 << 6;
        s[group + 4] = mn & 63 | mn4 >> 4 << 6;
        s[group + 8] = sc4 & 15 | mn4 << 4;
    }
    s
}

/// The nibbles of Q4_K and Q5_K: 32 low ones, then the high ones of the same bytes.
#[inline(always)]
pub(super) fn split_halves(qs: &[u8; 128], codes: &mut [u8]) {
    for (qs, codes) in qs.chunks_exact(32).zip(codes.chunks_exact_mut(64)) {
        let (low, high) = codes.split_at_mut(32);
        for ((&q, low), high) in qs.iter().zip(low).zip(high) {
            *low = q & 15;
            *high = q >> 4;
        }
    }
}

/// The reverse of [`split_halves`]; higher bits of the codes are dropped.
#[inline(always)]
pub(super) fn join_halves(codes: &[u8]) -> [u8; 128] {
    let mut qs = [0; 128];
    for (qs, codes) in qs.chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
        let (low, high) = codes.split_at(32);
        for ((q, low), high) in qs.iter_mut().zip(low).zip(high) {
            *q = low & 15 | high << 4;
        }
    }
    qs
}
