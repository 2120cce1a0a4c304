//! Q5_1: 32 weights, `y = d · q + m`; codes as in Q5_0.

use super::{Block, GgmlType, half, q5_0};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ5_1>(7, "Q5_1");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ5_1 {
    d: [u8; 2],
    m: [u8; 2],
    qh: [u8; 4],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_1>() == 24);

// SAFETY: bytes only.
unsafe impl Block for BlockQ5_1 {
    const LEN: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let (d, m) = (half(self.d), half(self.m));
        let codes = q5_0::codes(&self.qs, self.qh);
        for (out, q) in out.iter_mut().zip(codes) {
            *out = d * f32::from(q) + m;
        }
    }
}
