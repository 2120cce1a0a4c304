//! Little-endian bit streams: code `i` of width `b` occupies bits `[i·b, (i+1)·b)`, bit `k` being bit `k % 8` of byte `k / 8`.
//!
//! One packer for every width from 1 to 8. Eight codes fill exactly `b` bytes, so the loops below work on eight codes at
//! a time and only the ragged tail is special. Seen as 32-bit little-endian words the stream is the same.

/// Bytes that `count` codes of `bits` bits occupy, the last byte filled with zero bits.
pub fn packed_bytes(count: usize, bits: u8) -> usize {
    (count * usize::from(bits)).div_ceil(8)
}

/// 32-bit words that `count` codes of `bits` bits occupy, the last word filled with zero bits.
pub fn packed_words(count: usize, bits: u8) -> usize {
    (count * usize::from(bits)).div_ceil(32)
}

/// Packs `codes`, each below `2^bits`, into the first [`packed_bytes`] bytes of `out` and sets the rest of `out` to zero.
///
/// # Panics
/// When `bits` is not in `1..=8` or `out` is too short.
pub fn pack(codes: &[u8], bits: u8, out: &mut [u8]) {
    debug_assert!(codes.iter().all(|&code| u32::from(code) < 1 << bits));
    match bits {
        1 => pack_width::<1>(codes, out),
        2 => pack_width::<2>(codes, out),
        3 => pack_width::<3>(codes, out),
        4 => pack_width::<4>(codes, out),
        5 => pack_width::<5>(codes, out),
        6 => pack_width::<6>(codes, out),
        7 => pack_width::<7>(codes, out),
        8 => pack_width::<8>(codes, out),
        _ => panic!("codes are 1 to 8 bits wide, not {bits}"),
    }
}

/// Reads `codes.len()` codes of `bits` bits from the front of `packed`.
///
/// # Panics
/// When `bits` is not in `1..=8` or `packed` is shorter than [`packed_bytes`].
pub fn unpack(packed: &[u8], bits: u8, codes: &mut [u8]) {
    match bits {
        1 => unpack_width::<1>(packed, codes),
        2 => unpack_width::<2>(packed, codes),
        3 => unpack_width::<3>(packed, codes),
        4 => unpack_width::<4>(packed, codes),
        5 => unpack_width::<5>(packed, codes),
        6 => unpack_width::<6>(packed, codes),
        7 => unpack_width::<7>(packed, codes),
        8 => unpack_width::<8>(packed, codes),
        _ => panic!("codes are 1 to 8 bits wide, not {bits}"),
    }
}

fn pack_width<const B: usize>(codes: &[u8], out: &mut [u8]) {
    let whole = codes.len() / 8;
    let (body, rest) = out.split_at_mut(whole * B);
    for (codes, out) in codes.chunks_exact(8).zip(body.chunks_exact_mut(B)) {
        out.copy_from_slice(&join::<B>(codes).to_le_bytes()[..B]);
    }
    let tail = &codes[whole * 8..];
    let tail_bytes = packed_bytes(tail.len(), B as u8);
    let mut padded = [0; 8];
    padded[..tail.len()].copy_from_slice(tail);
    rest[..tail_bytes].copy_from_slice(&join::<B>(&padded).to_le_bytes()[..tail_bytes]);
    rest[tail_bytes..].fill(0);
}

fn unpack_width<const B: usize>(packed: &[u8], codes: &mut [u8]) {
    let whole = codes.len() / 8;
    let (body, rest) = packed.split_at(whole * B);
    for (packed, codes) in body.chunks_exact(B).zip(codes.chunks_exact_mut(8)) {
        codes.copy_from_slice(&split::<B>(packed));
    }
    let tail = &mut codes[whole * 8..];
    let tail_bytes = packed_bytes(tail.len(), B as u8);
    tail.copy_from_slice(&split::<B>(&rest[..tail_bytes])[..tail.len()]);
}

/// Eight codes as the low `8·B` bits of a word.
#[inline(always)]
fn join<const B: usize>(codes: &[u8]) -> u64 {
    let x = u64::from_le_bytes(codes.try_into().expect("eight codes"));
    match B {
        8 => x,
        // Halve the distance between the nibbles three times.
        4 => {
            let x = (x | x >> 4) & 0x00ff_00ff_00ff_00ff;
            let x = (x | x >> 8) & 0x0000_ffff_0000_ffff;
            (x | x >> 16) & 0xffff_ffff
        }
        _ => (0..8).fold(0, |word, k| word | (x >> (8 * k) & 0xff) << (B * k)),
    }
}

/// The inverse of [`join`]; `packed` holds up to `B` bytes, missing ones count as zero.
#[inline(always)]
fn split<const B: usize>(packed: &[u8]) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..packed.len()].copy_from_slice(packed);
    let x = u64::from_le_bytes(bytes);
    match B {
        8 => bytes,
        4 => {
            let x = (x | x << 16) & 0x0000_ffff_0000_ffff;
            let x = (x | x << 8) & 0x00ff_00ff_00ff_00ff;
            ((x | x << 4) & 0x0f0f_0f0f_0f0f_0f0f).to_le_bytes()
        }
        _ => std::array::from_fn(|k| (x >> (B * k) & ((1 << B) - 1)) as u8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, a bit at a time.
    fn pack_naive(codes: &[u8], bits: u8) -> Vec<u8> {
        let mut out = vec![0; packed_bytes(codes.len(), bits)];
        for (i, &code) in codes.iter().enumerate() {
            for b in 0..usize::from(bits) {
                let k = i * usize::from(bits) + b;
                out[k / 8] |= (code >> b & 1) << (k % 8);
            }
        }
        out
    }

    #[test]
    fn three_bit_codes_straddle_words() {
        // Code 10 has its two low bits at the top of word 0 and its high bit at the bottom of word 1.
        let mut codes = [0; 32];
        codes[10] = 0b101;
        let mut out = [0xff; 12];
        pack(&codes, 3, &mut out);
        let words: Vec<u32> = out.chunks(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
        assert_eq!(words, [0b01 << 30, 1, 0]);
    }

    proptest! {
        #[test]
        fn equals_the_definition_and_inverts(bits in 1u8..=8, codes in prop::collection::vec(any::<u8>(), 0..100), extra in 0usize..5) {
            let codes: Vec<u8> = codes.iter().map(|c| c & ((1u16 << bits) - 1) as u8).collect();
            let mut expected = pack_naive(&codes, bits);
            let bytes = expected.len();
            expected.extend(vec![0; extra]);
            let mut packed = vec![0xaa; bytes + extra];
            pack(&codes, bits, &mut packed);
            prop_assert_eq!(&packed, &expected);
            let mut back = vec![0xaa; codes.len()];
            unpack(&packed, bits, &mut back);
            prop_assert_eq!(back, codes);
        }
    }
}
