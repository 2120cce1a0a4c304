//! ggml's storage types: rows cut into blocks of 32 or 256 weights, each block with its own scales.
//!
//! One small file a type, one line in [`TYPES`]. What the codes of a type stand for is data ([`Encoding`]), so that whoever
//! chooses scales need not know where their bits lie. Products are taken in `f32` in the order ggml takes them, so that
//! values are bit for bit the same.

mod faults;
mod float;
mod iq4_nl;
mod iq4_xs;
mod layout;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod simple;
#[cfg(test)]
mod tests;
mod tq1_0;
mod tq2_0;

use std::fmt;

use half::f16;

use crate::encoding::{Encoding, Float, Levels, Offset, Scale, Store};
use crate::error::{Error, Result};
pub use faults::ScaleFaults;
use faults::judge_blocks;
pub use layout::BlockScales;

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
    encoding: Encoding,
    decode: fn(&[u8], &mut [f32]),
    encode: Option<EncodeFn>,
    /// `None` for the types that store values as they are.
    blocks: Option<Blocks>,
}

/// Rounds values into whole blocks.
type EncodeFn = fn(&[f32], &mut [u8]);

/// What a type with scales can do, on slices whose lengths were checked.
#[derive(Clone, Copy)]
struct Blocks {
    pack: fn(&[BlockScales], &[u8], &mut [u8]),
    unpack: fn(&[u8], &mut [BlockScales], &mut [u8]),
    judge: fn(&[u8]) -> ScaleFaults,
}

/// Every type of weights that can be read and written.
pub const TYPES: &[GgmlType] = &[
    float::F32,
    float::F16,
    float::BF16,
    q4_0::TYPE,
    q4_1::TYPE,
    q5_0::TYPE,
    q5_1::TYPE,
    q8_0::TYPE,
    q2_k::TYPE,
    q3_k::TYPE,
    q4_k::TYPE,
    q5_k::TYPE,
    q6_k::TYPE,
    iq4_nl::TYPE,
    iq4_xs::TYPE,
    tq1_0::TYPE,
    tq2_0::TYPE,
    mxfp4::TYPE,
];

impl GgmlType {
    /// Whole numbers of 32 bits, which are no weights.
    pub const I32: GgmlType = float::I32;

    /// The type with this number in files.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        TYPES.iter().chain([&GgmlType::I32]).find(|t| t.id == id).copied()
    }

    /// The type of this name, in capitals or not.
    pub fn from_name(name: &str) -> Option<GgmlType> {
        TYPES.iter().find(|t| t.name.eq_ignore_ascii_case(name)).copied()
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

    /// Rounds `values` as ggml's reference encoder does without importance, byte for byte, and writes whole blocks.
    ///
    /// `None`, with nothing written, for the types whose encoder searches for scales (the K-quants and IQ types). Values
    /// should be finite; others give some block, as they do in ggml.
    ///
    /// # Panics
    /// Unless `out` holds exactly the blocks of `values`.
    pub fn encode(&self, values: &[f32], out: &mut [u8]) -> Option<()> {
        let encode = self.encode?;
        assert_eq!(self.row_bytes(values.len()), Some(out.len()), "whole blocks of {self}");
        encode(values, out);
        Some(())
    }

    /// The description of the type whose blocks are `B`.
    const fn of<B: Block>(id: u32, name: &'static str) -> GgmlType {
        GgmlType {
            id,
            name,
            block_len: B::LEN,
            block_bytes: size_of::<B>(),
            encoding: Encoding { store: Store::Ggml(id), ..B::ENCODING },
            decode: decode_blocks::<B>,
            encode: None,
            blocks: Some(Blocks { pack: pack_blocks::<B>, unpack: unpack_blocks::<B>, judge: judge_blocks::<B> }),
        }
    }

    /// [`GgmlType::of`] a type whose reference encoder is here too.
    const fn with_encoder<B: Encode>(id: u32, name: &'static str) -> GgmlType {
        GgmlType { encode: Some(encode_blocks::<B>), ..GgmlType::of::<B>(id, name) }
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
/// Methods are `#[inline(always)]`, so that they are compiled for the instruction set of the loop that calls them.
///
/// # Safety
/// Implementors are `#[repr(C)]` structs of `u8` and arrays of `u8` only, so that any bytes are a valid block.
unsafe trait Block: Copy {
    /// Weights in a block.
    const LEN: usize;

    /// What the codes stand for; where they lie is filled in with the type's number.
    const ENCODING: Encoding;

    /// Writes the block's reals into `out`, which holds `LEN`.
    ///
    /// Through all codes of the block, which then lie in order in the nearest cache: faster than a loop over its fields.
    #[inline(always)]
    fn decode(&self, out: &mut [f32]) {
        let mut codes = [0; 256];
        let codes = &mut codes[..Self::LEN];
        let block = self.unpack(codes);
        let (group, has_min, sub) = const { (Self::ENCODING.group(), Self::ENCODING.has_min(), Self::ENCODING.sub()) };
        let Levels::Integer { zero, .. } = Self::ENCODING.levels else {
            unreachable!("types with a table have their own")
        };
        for (index, (out, codes)) in out.chunks_exact_mut(group).zip(codes.chunks_exact(group)).enumerate() {
            let (scale, min) = match sub {
                None => (block.d, block.m),
                Some(_) => (block.d * f32::from(block.scales[index]), block.m * f32::from(block.mins[index])),
            };
            for (out, &code) in out.iter_mut().zip(codes) {
                let product = scale * (i32::from(code) - i32::from(zero)) as f32;
                *out = if has_min { product - min } else { product };
            }
        }
    }

    /// The block of these scales and `LEN` codes.
    fn pack(scales: &BlockScales, codes: &[u8]) -> Self;

    /// The scales, with the `LEN` codes written into `codes`.
    fn unpack(&self, codes: &mut [u8]) -> BlockScales;
}

/// A block whose scales ggml's reference encoder takes from the extremes of its values.
trait Encode: Block {
    /// The block nearest to `LEN` values.
    fn encode(values: &[f32]) -> Self;
}

/// Defines a function over blocks, compiled a second time for AVX2, which is used where the CPU has it.
macro_rules! over_blocks {
    ($(#[$doc:meta])* fn $name:ident<$b:ident: $bound:ident>($($arg:ident: $ty:ty),*) $body:block) => {
        $(#[$doc])*
        fn $name<$b: $bound>($($arg: $ty),*) {
            #[inline(always)]
            fn plain<$b: $bound>($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,f16c")]
                fn wide<$b: $bound>($($arg: $ty),*) {
                    plain::<$b>($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("f16c") {
                    // SAFETY: the CPU has both features.
                    return unsafe { wide::<$b>($($arg),*) };
                }
            }
            plain::<$b>($($arg),*)
        }
    };
}

use over_blocks;

over_blocks! {
    fn decode_blocks<B: Block>(bytes: &[u8], out: &mut [f32]) {
        for (block, out) in blocks_of::<B>(bytes).iter().zip(out.chunks_exact_mut(B::LEN)) {
            block.decode(out);
        }
    }
}

over_blocks! {
    fn pack_blocks<B: Block>(scales: &[BlockScales], codes: &[u8], out: &mut [u8]) {
        for ((out, scales), codes) in blocks_of_mut::<B>(out).iter_mut().zip(scales).zip(codes.chunks_exact(B::LEN)) {
            *out = B::pack(scales, codes);
        }
    }
}

over_blocks! {
    fn unpack_blocks<B: Block>(bytes: &[u8], scales: &mut [BlockScales], codes: &mut [u8]) {
        for ((block, scales), codes) in blocks_of::<B>(bytes).iter().zip(scales).zip(codes.chunks_exact_mut(B::LEN)) {
            *scales = block.unpack(codes);
        }
    }
}

over_blocks! {
    fn encode_blocks<B: Encode>(values: &[f32], out: &mut [u8]) {
        for (out, values) in blocks_of_mut::<B>(out).iter_mut().zip(values.chunks_exact(B::LEN)) {
            *out = B::encode(values);
        }
    }
}

fn blocks_of<B: Block>(bytes: &[u8]) -> &[B] {
    const { assert!(align_of::<B>() == 1) };
    let count = bytes.len() / size_of::<B>();
    // SAFETY: `count` blocks lie inside `bytes`, need no alignment, and any bytes are a block by `Block`'s contract.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<B>(), count) }
}

fn blocks_of_mut<B: Block>(bytes: &mut [u8]) -> &mut [B] {
    const { assert!(align_of::<B>() == 1) };
    let count = bytes.len() / size_of::<B>();
    // SAFETY: as in `blocks_of`; and any block is bytes, without padding since every field has alignment 1.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<B>(), count) }
}

/// A half-precision field; exact, and without a call, so that loops around it stay loops.
#[inline(always)]
fn half(bytes: [u8; 2]) -> f32 {
    let bits = u32::from(u16::from_le_bytes(bytes));
    // Exponent and mantissa in the place of a float's, then its bias: also turns subnormal halves into normal floats.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((254 - 15) << 23);
    let not_finite = if magnitude >= 65536.0 { 0xff << 23 } else { 0 };
    f32::from_bits(magnitude.to_bits() | not_finite | (bits & 0x8000) << 16)
}

/// The half nearest to `value`, ties to even.
#[inline(always)]
fn to_half(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}
