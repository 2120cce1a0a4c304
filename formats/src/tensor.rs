//! Tensors as bytes with a type and a shape, and the step between those bytes and `f32`.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
pub use safetensors::Dtype;

use crate::error::{Error, Result};

/// A tensor in memory: row-major, little-endian bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<u8>,
}

impl Tensor {
    /// The same tensor, borrowed.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: &self.shape, data: &self.data }
    }
}

/// A tensor that lies in a file or in someone else's memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Extents, slowest first.
    pub shape: &'a [usize],
    /// The elements, row-major and little-endian; not necessarily aligned to the element's size.
    pub data: &'a [u8],
}

impl TensorView<'_> {
    /// The elements as `f32`; fails unless they are floats.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.shape.iter().product()];
        widen(self.dtype, self.data, &mut out)?;
        Ok(out)
    }

    /// Whether no element is NaN or infinite; true for types that have neither.
    pub fn is_finite(&self) -> bool {
        // Some thousand at a time, side by side: an end after each would keep them one by one.
        let below = |mask: u16| {
            let largest = |largest: u16, b: &[u8]| largest.max(u16::from_le_bytes([b[0], b[1]]) & mask);
            self.data.chunks(1 << 13).all(|part| part.chunks_exact(2).fold(0, largest) < mask)
        };
        match self.dtype {
            Dtype::BF16 => below(0x7f80),
            Dtype::F16 => below(0x7c00),
            Dtype::F32 => self.data.chunks_exact(4).all(|b| b[3] & 0x7f != 0x7f || b[2] & 0x80 == 0),
            Dtype::F64 => self.data.chunks_exact(8).all(|b| b[7] & 0x7f != 0x7f || b[6] & 0xf0 != 0xf0),
            Dtype::F8_E4M3 => self.data.iter().all(|b| b & 0x7f != 0x7f),
            Dtype::F8_E5M2 => self.data.iter().all(|b| b & 0x7c != 0x7c),
            _ => true,
        }
    }

    /// Fails unless the type and the shape are these.
    pub fn expect(&self, what: &str, dtype: Dtype, shape: &[usize]) -> Result<()> {
        if self.dtype != dtype {
            return Err(Error::mismatch(format!("the type of {what}"), dtype, self.dtype));
        }
        if self.shape != shape {
            return Err(Error::mismatch(
                format!("the shape of {what}"),
                format_args!("{shape:?}"),
                format_args!("{:?}", self.shape),
            ));
        }
        Ok(())
    }
}

/// What will be written under a name, known before the data is.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// The tensor's name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Size of the data, or `None` when it overflows or ends inside a byte.
    pub fn bytes(&self) -> Option<usize> {
        byte_len(self.dtype, &self.shape)
    }
}

/// Bytes that a tensor of this type and shape occupies; `None` on overflow or when it would end inside a byte.
pub fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The number that a byte of type E4M3 (the variant with NaN and without infinities) stands for.
pub(crate) fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((exponent + 120) << 23),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// The number that a byte of type E5M2 stands for: the upper half of a half.
pub(crate) fn e5m2(code: u8) -> f32 {
    f16::from_bits(u16::from(code) << 8).to_f32()
}

/// Whether a type's values can be weights: a float of one, two, four or eight bytes that is no mere power of two.
pub fn is_float(dtype: Dtype) -> bool {
    use Dtype::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64};
    matches!(dtype, F64 | F32 | F16 | BF16 | F8_E4M3 | F8_E5M2)
}

/// Converts floats to `f32`: F64 to the nearest, ties to even, every other type exactly. `bytes` must hold exactly
/// `out.len()` elements.
///
/// Fails for a finite F64 that would become infinite.
pub fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let expected = byte_len(dtype, &[out.len()]);
    if expected != Some(bytes.len()) {
        return Err(Error::mismatch(
            format!("the data of {} {dtype} values", out.len()),
            format_args!("{} bytes", expected.unwrap_or(usize::MAX)),
            format_args!("{} bytes", bytes.len()),
        ));
    }
    match dtype {
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Dtype::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        Dtype::F16 => {
            // SAFETY: any bits are a half.
            let (unaligned, halves, _) = unsafe { bytes.align_to::<f16>() };
            if cfg!(target_endian = "little") && unaligned.is_empty() {
                halves.convert_to_f32_slice(out);
                return Ok(());
            }
            // Through an aligned buffer, so that the CPU's own conversion can be used on whole slices.
            let mut halves = [f16::ZERO; 1024];
            for (out, bytes) in out.chunks_mut(halves.len()).zip(bytes.chunks(2 * halves.len())) {
                let halves = &mut halves[..out.len()];
                for (h, b) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
                    *h = f16::from_le_bytes([b[0], b[1]]);
                }
                halves.convert_to_f32_slice(out);
            }
        }
        Dtype::F64 => {
            for (index, (o, b)) in out.iter_mut().zip(bytes.chunks_exact(8)).enumerate() {
                let value = f64::from_le_bytes(b.try_into().expect("eight bytes"));
                *o = value as f32;
                if o.is_infinite() && value.is_finite() {
                    return Err(Error::invalid(format!("value {value:?} at index {index} is beyond F32's largest")));
                }
            }
        }
        Dtype::F8_E4M3 => out.iter_mut().zip(bytes).for_each(|(o, b)| *o = e4m3(*b)),
        Dtype::F8_E5M2 => out.iter_mut().zip(bytes).for_each(|(o, b)| *o = e5m2(*b)),
        _ => {
            return Err(Error::unsupported(format!(
                "values of type {dtype} are not weights (F64, F32, F16, BF16, F8_E4M3 or F8_E5M2)"
            )));
        }
    }
    Ok(())
}

/// Rounds `values` to F64, F32, F16 or BF16 (nearest, ties to even) and appends their bytes to `out`.
///
/// Fails when a finite value would become infinite.
pub fn narrow(dtype: Dtype, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    let start = out.len();
    match dtype {
        Dtype::F32 => {
            out.resize(start + 4 * values.len(), 0);
            for (o, v) in out[start..].chunks_exact_mut(4).zip(values) {
                o.copy_from_slice(&v.to_le_bytes());
            }
        }
        Dtype::F64 => out.extend(values.iter().flat_map(|v| f64::from(*v).to_le_bytes())),
        Dtype::F16 | Dtype::BF16 => {
            let largest = if dtype == Dtype::F16 { f16::MAX.to_f32() } else { bf16::MAX.to_f32() };
            out.resize(start + 2 * values.len(), 0);
            let mut halves = [f16::ZERO; 1024];
            for (index, (out, values)) in out[start..].chunks_mut(2 * 1024).zip(values.chunks(1024)).enumerate() {
                let mut overflow = false;
                if dtype == Dtype::F16 {
                    halves[..values.len()].convert_from_f32_slice(values);
                    for (o, h) in out.chunks_exact_mut(2).zip(&halves) {
                        o.copy_from_slice(&h.to_le_bytes());
                        overflow |= h.is_infinite();
                    }
                } else {
                    for (o, v) in out.chunks_exact_mut(2).zip(values) {
                        let b = bf16::from_f32(*v);
                        o.copy_from_slice(&b.to_le_bytes());
                        overflow |= b.is_infinite();
                    }
                }
                if overflow
                    && let Some(at) = values.iter().position(|&v| {
                        v.is_finite()
                            && if dtype == Dtype::F16 {
                                f16::from_f32(v).is_infinite()
                            } else {
                                bf16::from_f32(v).is_infinite()
                            }
                    })
                {
                    return Err(Error::invalid(format!(
                        "value {:?} at index {} is beyond {dtype}'s largest, {largest:?}",
                        values[at],
                        1024 * index + at
                    )));
                }
            }
        }
        _ => return Err(Error::unsupported(format!("weights are not written as {dtype} (F64, F32, F16 or BF16)"))),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(dtype: Dtype, values: &[f32]) -> Vec<f32> {
        let mut bytes = Vec::new();
        narrow(dtype, values, &mut bytes).unwrap();
        let mut back = vec![0.0; values.len()];
        widen(dtype, &bytes, &mut back).unwrap();
        back
    }

    #[test]
    fn every_value_that_is_not_finite_is_seen() {
        let is_finite = |dtype, data: &[u8]| TensorView { dtype, shape: &[1], data }.is_finite();
        for bits in 0..=u16::MAX {
            let bytes = bits.to_le_bytes();
            assert_eq!(is_finite(Dtype::BF16, &bytes), bf16::from_bits(bits).is_finite(), "bf16 {bits:#x}");
            assert_eq!(is_finite(Dtype::F16, &bytes), f16::from_bits(bits).is_finite(), "f16 {bits:#x}");
            for low in [0u32, 0xffff] {
                let bits = u32::from(bits) << 16 | low;
                let expected = f32::from_bits(bits).is_finite();
                assert_eq!(is_finite(Dtype::F32, &bits.to_le_bytes()), expected, "f32 {bits:#x}");
            }
        }
        assert!(is_finite(Dtype::I32, &[0xff; 4]));
    }

    #[test]
    fn widening_inverts_narrowing_of_values_that_fit() {
        let values: Vec<f32> = (0..4001).map(|i| (i - 2000) as f32 / 4.0).collect();
        assert!(round_trip(Dtype::F32, &values) == values);
        assert!(round_trip(Dtype::F16, &values) == values);
        let values: Vec<f32> = (0..256).map(|i| (i - 128) as f32).collect();
        assert_eq!(round_trip(Dtype::BF16, &values), values);
    }

    #[test]
    fn every_half_and_bfloat_widens_as_the_half_crate_says() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut out = vec![0.0; 65536];
        widen(Dtype::F16, &bytes, &mut out).unwrap();
        for (bits, &v) in (0..=u16::MAX).zip(&out) {
            let expected = f16::from_bits(bits).to_f32();
            assert!(v == expected || (v.is_nan() && expected.is_nan()), "{bits:#x}");
        }
        widen(Dtype::BF16, &bytes, &mut out).unwrap();
        for (bits, &v) in (0..=u16::MAX).zip(&out) {
            let expected = bf16::from_bits(bits).to_f32();
            assert!(v == expected || (v.is_nan() && expected.is_nan()), "{bits:#x}");
        }
    }

    #[test]
    fn doubles_are_rounded_to_the_nearest_and_eight_bits_are_what_they_stand_for() {
        let read = |values: &[f64]| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let view = TensorView { dtype: Dtype::F64, shape: &[values.len()], data: &bytes };
            (view.is_finite(), view.to_f32())
        };
        // Halfway between two singles, and a little more; a sum of two roundings would give the even one for both.
        let half = 1.0 + 2f64.powi(-24);
        let (finite, found) = read(&[half, half + 2f64.powi(-50), -0.1, f64::from(f32::MAX), 1e-50]);
        assert!(finite);
        assert_eq!(found.unwrap(), [1.0, 1.0 + f32::EPSILON, -0.1, f32::MAX, 0.0]);
        let (finite, found) = read(&[1.0, 1e39]);
        assert!(finite && found.unwrap_err().to_string().contains("at index 1 is beyond F32's largest"));
        assert!([f64::NAN, f64::NEG_INFINITY].iter().all(|v| !read(&[*v]).0));
        assert_eq!(round_trip(Dtype::F64, &[0.1, -7.5]), [0.1, -7.5]);
        for dtype in [Dtype::F8_E4M3, Dtype::F8_E5M2] {
            for byte in 0..=255 {
                let view = TensorView { dtype, shape: &[1], data: &[byte] };
                assert_eq!(view.is_finite(), view.to_f32().unwrap()[0].is_finite(), "{dtype} {byte:#x}");
            }
        }
        let view = TensorView { dtype: Dtype::F8_E4M3, shape: &[2], data: &[0x38, 0xc4] };
        assert_eq!(view.to_f32().unwrap(), [1.0, -3.0]);
    }

    #[test]
    fn overflow_is_named() {
        let mut values = vec![1.0; 2000];
        values[1500] = 70000.0;
        let error = narrow(Dtype::F16, &values, &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "value 70000.0 at index 1500 is beyond F16's largest, 65504.0");
    }

    #[test]
    fn wrong_length_is_an_error() {
        assert!(widen(Dtype::F32, &[0; 7], &mut [0.0; 2]).is_err());
        assert!(widen(Dtype::I32, &[0; 8], &mut [0.0; 2]).is_err());
    }
}
