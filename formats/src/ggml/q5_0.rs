//! Q5_0: 32 weights, `y = d · (q − 16)`; low four bits as in Q4_0, bit `j` of `qh` is bit 4 of weight `j`.

use super::{Block, GgmlType, half};

pub(super) const TYPE: GgmlType = GgmlType::of::<BlockQ5_0>(6, "Q5_0");

#[derive(Clone, Copy)]
#[repr(C)]
struct BlockQ5_0 {
    d: [u8; 2],
    qh: [u8; 4],
    qs: [u8; 16],
}

const _: () = assert!(size_of::<BlockQ5_0>() == 22);

// SAFETY: bytes only.
unsafe impl Block for BlockQ5_0 {
    const LEN: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = half(self.d);
        let codes = codes(&self.qs, self.qh);
        for (out, q) in out.iter_mut().zip(codes) {
            *out = d * (i32::from(q) - 16) as f32;
        }
    }
}

/// The 5-bit codes of Q5_0 and Q5_1.
pub(super) fn codes(qs: &[u8; 16], qh: [u8; 4]) -> [u8; 32] {
    let qh = u32::from_le_bytes(qh);
    std::array::from_fn(|i| {
        let low = if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 };
        low | ((qh >> i & 1) as u8) << 4
    })
}
