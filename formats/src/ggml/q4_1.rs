//! Q4_1: 32 weights, `y = d · q + m`; nibbles in the order of Q4_0.

use super::{Block, GgmlType, half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ4_1>(3, "Q4_1");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ4_1 {
    d: [u8; 2],
    m: [u8; 2],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_1>() == 20);

// SAFETY: bytes only.
unsafe impl Block for BlockQ4_1 {
    const LEN: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let (d, m) = (half(self.d), half(self.m));
        let (low, high) = out.split_at_mut(16);
        for ((q, low), high) in self.qs.iter().zip(low).zip(high) {
            *low = d * f32::from(q & 15) + m;
            *high = d * f32::from(q >> 4) + m;
        }
    }
}
