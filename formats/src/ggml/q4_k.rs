//! Q4_K: a superblock of 256 weights in 8 sub-blocks of 32, `y = (d · sc) · q − dmin · mn`.
//!
//! ```text
//! scales[0..4]   bits 0-5: sc of sub-blocks 0..4    bits 6-7: high bits of sc of sub-blocks 4..8
//! scales[4..8]   bits 0-5: mn of sub-blocks 0..4    bits 6-7: high bits of mn of sub-blocks 4..8
//! scales[8..12]  low nibble: sc, high nibble: mn of sub-blocks 4..8
//! qs[32·p..]     low nibbles: sub-block 2p, high nibbles: sub-block 2p + 1
//! ```

use super::{Block, GgmlType, half};

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

    fn decode(&self, out: &mut [f32]) {
        let (d, dmin) = (half(self.d), half(self.dmin));
        for (sub, out) in out.chunks_exact_mut(32).enumerate() {
            let (sc, mn) = scale_and_min(&self.scales, sub);
            let (scale, min) = (d * f32::from(sc), dmin * f32::from(mn));
            let shift = 4 * (sub % 2);
            for (out, q) in out.iter_mut().zip(&self.qs[32 * (sub / 2)..]) {
                *out = scale * f32::from(q >> shift & 15) - min;
            }
        }
    }
}

/// The 6-bit scale and minimum of a sub-block.
fn scale_and_min(s: &[u8; 12], sub: usize) -> (u8, u8) {
    if sub < 4 {
        (s[sub] & 63, s[sub + 4] & 63)
    } else {
        (s[sub + 4] & 15 | s[sub - 4] >> 6 << 4, s[sub + 4] >> 4 | s[sub] >> 6 << 4)
    }
}
