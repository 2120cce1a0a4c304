//! ggml's storage types: rows cut into blocks of 32 or 256 weights, each block with its own scales.
//!
//! One small file a type, one line in [`TYPES`]. Products are taken in `f32` in the order ggml takes them, so that values
//! are bit for bit the same.

mod float;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q6_k;
mod q8_0;

use std::fmt;

use half::f16;

use crate::error::{Error, Result};

/// A storage type.
#[derive(Clone, Copy)]
pub struct GgmlType {
    /// The number that stands for it in files.
    pub id: u32,
    /// Its name, as in `Q4_K`.
    pub name: &'static str,
    /// Weights in a block; a row holds whole blocks.
    pub block_len: usize,
    /// Bytes in a block.
    pub block_bytes: usize,
    decode: fn(&[u8], &mut [f32]),
}

/// Every type that can be read.
pub const TYPES: &[GgmlType] = &[
    float::F32,
    float::F16,
    float::BF16,
    q4_0::TYPE,
    q4_1::TYPE,
    q5_0::TYPE,
    q5_1::TYPE,
    q8_0::TYPE,
    q4_k::TYPE,
    q6_k::TYPE,
];

impl GgmlType {
    /// The type with this number in files.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        TYPES.iter().find(|t| t.id == id).copied()
    }

    /// Bytes of a row of `len` weights; `None` when it does not split into blocks, or on overflow.
    pub fn row_bytes(&self, len: usize) -> Option<usize> {
        len.is_multiple_of(self.block_len).then_some(len / self.block_len)?.checked_mul(self.block_bytes)
    }

    /// Writes the reals that `bytes` stand for into `out`; `bytes` must be whole blocks of exactly `out.len()` weights.
    pub fn dequantize(&self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        if self.row_bytes(out.len()) != Some(bytes.len()) {
            return Err(Error::mismatch(
                format!("the data of {} {self} values", out.len()),
                match self.row_bytes(out.len()) {
                    Some(expected) => format!("{expected} bytes"),
                    None => format!("a multiple of {} values", self.block_len),
                },
                format_args!("{} bytes", bytes.len()),
            ));
        }
        (self.decode)(bytes, out);
        Ok(())
    }

    /// The description of the type whose blocks are `B`.
    const fn of<B: Block>(id: u32, name: &'static str) -> GgmlType {
        GgmlType { id, name, block_len: B::LEN, block_bytes: size_of::<B>(), decode: decode_blocks::<B> }
    }
}

impl PartialEq for GgmlType {
    fn eq(&self, other: &GgmlType) -> bool {
        self.id == other.id
    }
}

impl Eq for GgmlType {}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl fmt::Debug for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A block as it lies in files.
///
/// # Safety
/// Implementors are `#[repr(C)]` structs of `u8` and arrays of `u8` only, so that any bytes are a valid block.
unsafe trait Block: Copy {
    /// Weights in a block.
    const LEN: usize;

    /// Writes the block's reals into `out`, which holds `LEN`.
    fn decode(&self, out: &mut [f32]);
}

fn decode_blocks<B: Block>(bytes: &[u8], out: &mut [f32]) {
    const { assert!(align_of::<B>() == 1) };
    let count = bytes.len() / size_of::<B>();
    // SAFETY: `count` blocks lie inside `bytes`, need no alignment, and any bytes are a block by `Block`'s contract.
    let blocks = unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<B>(), count) };
    for (block, out) in blocks.iter().zip(out.chunks_exact_mut(B::LEN)) {
        block.decode(out);
    }
}

/// A half-precision field.
fn half(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn vector(name: &str) -> Value {
        let path = format!("{}/tests/vectors/gguf_{name}.json", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_slice(&std::fs::read(&path).expect(&path)).expect(&path)
    }

    /// Blocks made by ggml, values read from them by gguf-py.
    fn check(name: &str) {
        let v = vector(name);
        let hex = v["row0_hex_no_imatrix"].as_str().or(v["row0_hex"].as_str()).expect("a row");
        let bytes: Vec<u8> =
            (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
        let dequantized = v["row0_dequant_no_imatrix"].as_array().or(v["row0_dequant"].as_array()).expect("values");
        let expected: Vec<f32> = dequantized.iter().map(|x| x.as_f64().unwrap() as f32).collect();
        let ty = GgmlType::from_id(v["type_id"].as_u64().unwrap() as u32).unwrap();
        assert_eq!(ty.name, v["type"].as_str().unwrap());
        assert_eq!(ty.block_len as u64, v["block_elems"].as_u64().unwrap());
        assert_eq!(ty.block_bytes as u64, v["block_bytes"].as_u64().unwrap());
        let mut out = vec![0.0; 256];
        ty.dequantize(&bytes, &mut out).unwrap();
        for (i, (ours, theirs)) in out.iter().zip(&expected).enumerate() {
            assert_eq!(ours, theirs, "{name} at {i}");
        }
    }

    #[test]
    fn blocks_mean_what_ggml_says() {
        for name in ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k"] {
            check(name);
        }
    }

    #[test]
    fn lengths_are_checked() {
        let q4_0 = GgmlType::from_id(2).unwrap();
        assert_eq!(q4_0.row_bytes(64), Some(36));
        assert_eq!(q4_0.row_bytes(48), None);
        let message = q4_0.dequantize(&[0; 17], &mut [0.0; 32]).unwrap_err().to_string();
        assert_eq!(message, "the data of 32 Q4_0 values is 17 bytes, expected 18 bytes");
        let message = q4_0.dequantize(&[0; 18], &mut [0.0; 33]).unwrap_err().to_string();
        assert_eq!(message, "the data of 33 Q4_0 values is 18 bytes, expected a multiple of 32 values");
        assert_eq!(GgmlType::from_id(9999), None);
    }

    #[test]
    fn a_hand_made_block() {
        // Scale 2.0; weight j is the low nibble of byte j, weight j + 16 its high nibble.
        let mut bytes = vec![0x00, 0x40];
        bytes.extend((0..16).map(|j| j | (15 - j) << 4));
        let mut out = [0.0; 32];
        GgmlType::from_id(2).unwrap().dequantize(&bytes, &mut out).unwrap();
        for j in 0..16 {
            assert_eq!(out[j], 2.0 * (j as f32 - 8.0));
            assert_eq!(out[j + 16], 2.0 * (7.0 - j as f32));
        }
    }

    #[test]
    fn ids_and_names_are_distinct() {
        for (i, a) in TYPES.iter().enumerate() {
            assert!(TYPES[i + 1..].iter().all(|b| a.id != b.id && a.name != b.name), "{a}");
        }
    }
}
