//! Q6_K: a superblock of 256 weights in 16 groups of 16, `y = (d · scale) · (q − 32)` with signed 8-bit scales.
//!
//! Weight `i = 128·h + 32·j + l` has its low four bits in `ql[64·h + 32·(j % 2) + l]`, the low nibble for `j < 2`, and its
//! high two in bits `2j, 2j + 1` of `qh[32·h + l]`.

use super::{Block, GgmlType, half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ6K>(14, "Q6_K");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ6K {
    ql: [u8; 128],
    qh: [u8; 64],
    scales: [u8; 16],
    d: [u8; 2],
}

const _: () = assert!(size_of::<BlockQ6K>() == 210);

// SAFETY: bytes only.
unsafe impl Block for BlockQ6K {
    const LEN: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = half(self.d);
        for (part, out) in out.chunks_exact_mut(32).enumerate() {
            let (h, j) = (part / 4, part % 4);
            let low = &self.ql[64 * h + 32 * (j % 2)..][..32];
            let high = &self.qh[32 * h..][..32];
            for l in 0..32 {
                let q = low[l] >> (4 * (j / 2)) & 15 | (high[l] >> (2 * j) & 3) << 4;
                let scale = d * f32::from(self.scales[2 * part + l / 16] as i8);
                out[l] = scale * (i32::from(q) - 32) as f32;
            }
        }
    }
}
