//! Q8_0: 32 weights, `y = d · q` with signed bytes `q`.

use super::{Block, GgmlType, half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ8_0>(8, "Q8_0");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ8_0 {
    d: [u8; 2],
    qs: [u8; 32],
}

const _: () = assert!(size_of::<BlockQ8_0>() == 34);

// SAFETY: bytes only.
unsafe impl Block for BlockQ8_0 {
    const LEN: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = half(self.d);
        for (out, &q) in out.iter_mut().zip(&self.qs) {
            *out = d * f32::from(q as i8);
        }
    }
}
