//! Q4_0: 32 weights, `y = d · (q − 8)`; byte `j` holds weights `j` (low nibble) and `j + 16`.

use super::{Block, GgmlType, half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ4_0>(2, "Q4_0");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ4_0 {
    d: [u8; 2],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ4_0>() == 18);

// SAFETY: bytes only.
unsafe impl Block for BlockQ4_0 {
    const LEN: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = half(self.d);
        let (low, high) = out.split_at_mut(16);
        for ((q, low), high) in self.qs.iter().zip(low).zip(high) {
            *low = d * (i32::from(q & 15) - 8) as f32;
            *high = d * (i32::from(q >> 4) - 8) as f32;
        }
    }
}
