//! Layouts of other libraries that are read and never written: one tensor of the model from its parts, as `f32`.
//!
//! Which of them a checkpoint may hold follows from its `quant_method`; which tensor is stored how follows from the parts
//! that are there. Everything that can be checked without reading the values is checked when a tensor is found.

mod bitsandbytes;
mod experts;
pub(super) mod scaled;

use std::ops::Range;

use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::tensor::{Dtype, TensorView, e4m3, e5m2, widen};
use crate::weight::QuantizedWeight;

/// Looks a tensor of the checkpoint up by its whole name.
pub type TensorLookup<'a, 'd> = dyn Fn(&str) -> Option<TensorView<'d>> + 'a;

/// The layouts that a checkpoint may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Library {
    /// `fp8` of transformers and DeepSeek, `fbgemm_fp8`.
    Float8,
    /// The formats of compressed-tensors that are not `pack-quantized`.
    CompressedTensors,
    /// 4-bit (`nf4`, `fp4`) and `int8`.
    BitsAndBytes,
    /// The experts of gpt-oss.
    Mxfp4,
}

/// A tensor of the model that a checkpoint stores in parts.
#[derive(Debug)]
pub struct Foreign {
    /// Its name in the model.
    pub name: String,
    /// Its extents in the model.
    pub shape: Vec<usize>,
    /// How it is stored, as `fp8 in blocks of 128x128` or `bitsandbytes nf4`.
    pub kind: String,
    /// The tensors that hold it, the one with the values first.
    pub parts: Vec<String>,
    layout: Layout,
}

#[derive(Debug)]
enum Layout {
    Scaled(scaled::Scaled),
    FourBit(bitsandbytes::FourBit),
    Experts,
}

impl Foreign {
    /// What `stored` holds, if it is the part with the values. Fails when the other parts are missing or do not fit it.
    ///
    /// `block` is the extent of the blocks that share a scale, where the configuration declares one.
    pub(super) fn find(
        library: Library,
        block: Option<[usize; 2]>,
        stored: &str,
        tensors: &TensorLookup<'_, '_>,
    ) -> Result<Option<Foreign>> {
        let Some(view) = tensors(stored) else { return Ok(None) };
        match library {
            Library::Float8 => scaled::float8(stored, &view, block, tensors),
            Library::CompressedTensors => scaled::compressed_tensors(stored, &view, block, tensors),
            Library::BitsAndBytes => bitsandbytes::find(stored, &view, tensors),
            Library::Mxfp4 => experts::find(stored, &view, tensors),
        }
        .map_err(|error| error.in_tensor(stored))
    }

    /// Rows and columns; fails unless it is a matrix.
    pub(super) fn matrix(&self) -> Result<[usize; 2]> {
        let shape = self.shape[..].try_into();
        shape.map_err(|_| Error::mismatch("its shape", "a matrix", format_args!("{:?}", self.shape)))
    }

    /// The codes and scales of a matrix in this encoding; fails when they are stored in another, or in a layout without codes of their own.
    pub(super) fn weight(&self, tensors: &TensorLookup<'_, '_>, encoding: Encoding) -> Result<QuantizedWeight> {
        match &self.layout {
            Layout::Scaled(scaled) => scaled.weight(&self.parts, tensors, self.matrix()?, encoding),
            _ => Err(Error::unsupported(format!("codes cannot be taken from {}", self.kind))),
        }
    }

    /// The values of slices `range` along the first extent, into `out`, row-major. Fails when the parts hold no numbers.
    ///
    /// Panics when `out` does not hold exactly these slices.
    pub fn read(&self, tensors: &TensorLookup<'_, '_>, range: Range<usize>, out: &mut [f32]) -> Result<()> {
        let slice: usize = self.shape[1..].iter().product();
        assert_eq!(out.len(), range.len() * slice, "the output holds the slices");
        if out.is_empty() {
            return Ok(());
        }
        match &self.layout {
            Layout::Scaled(scaled) => scaled.read(&self.parts, tensors, range, slice, out),
            Layout::FourBit(four_bit) => four_bit.read(&self.parts, tensors, range.start * slice, out),
            Layout::Experts => experts::read(&self.shape, &self.parts, tensors, range, out),
        }
        .map_err(|error| error.in_tensor(&self.name))
    }
}

/// The tensor, or an error that names it.
fn need<'d>(tensors: &TensorLookup<'_, 'd>, name: &str) -> Result<TensorView<'d>> {
    tensors(name).ok_or_else(|| Error::missing(format!("its part {name}")))
}

/// `2^(code − 127)`, the scale that a byte of type E8M0 stands for; infinite for 255.
fn power(code: u8) -> f32 {
    f32::from_bits(if code == 0 { 0x0040_0000 } else { u32::from(code) << 23 })
}

/// Values `range` of a tensor of scales, in whatever type.
fn scales(view: &TensorView<'_>, range: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
    let bytes = view.dtype.bitsize() / 8;
    let data = &view.data[range.start * bytes..range.end * bytes];
    out.clear();
    match view.dtype {
        Dtype::U8 | Dtype::F8_E8M0 => out.extend(data.iter().map(|code| power(*code))),
        Dtype::F8_E4M3 => out.extend(data.iter().map(|code| e4m3(*code))),
        dtype => {
            out.resize(range.len(), 0.0);
            widen(dtype, data, out)?;
        }
    }
    Ok(())
}

/// Whether [`scales`] reads this type.
fn are_scales(dtype: Dtype) -> bool {
    use Dtype::*;
    matches!(dtype, U8 | F8_E8M0 | F8_E4M3 | F16 | BF16 | F32)
}

#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
