//! One byte or one nibble a value, and scales for blocks of a matrix.
//!
//! ```text
//! fp8, fbgemm_fp8     T          F8 [.., rows, cols]     T_scale_inv, T_scale, or M.scale of T = M.weight   float [.., ⌈rows/m⌉, ⌈cols/n⌉], [rows] or [1]
//! compressed-tensors  M.weight   F8|I8 [rows, cols]      M.weight_scale           M.weight_zero_point for integers
//!                     M.weight_packed  U8 [rows, cols/2] M.weight_scale           M.weight_global_scale (nvfp4): divides
//! bitsandbytes int8   M.weight   I8 [rows, cols]         M.SCB  F32 [rows]        the largest magnitude of a row, for code 127
//! ```
//!
//! `w = (value − zero) · scale`. The low nibble comes first. A scale of one byte without a type is an exponent.

use std::ops::Range;

use super::{Foreign, Layout, TensorLookup, are_scales, e5m2, need, scales};
use crate::encoding::{E2M1, E4M3, Encoding, Levels};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, TensorView};
use crate::weight::QuantizedWeight;

/// How scales lie over the matrices.
#[derive(Debug)]
pub(super) struct Scaled {
    values: Values,
    /// Rows and columns of one matrix.
    extent: [usize; 2],
    /// Rows and columns that share a scale.
    block: [usize; 2],
    /// Rows and columns of the scales of one matrix.
    grid: [usize; 2],
    /// One scale for all matrices.
    shared: bool,
    zeros: bool,
    /// What the scales are divided by, after a tensor that does so too.
    divisor: f32,
    global: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Values {
    E4m3,
    E5m2,
    Int8,
    E2m1,
}

impl Values {
    fn of(dtype: Dtype) -> Option<Values> {
        match dtype {
            Dtype::F8_E4M3 => Some(Values::E4m3),
            Dtype::F8_E5M2 => Some(Values::E5m2),
            Dtype::I8 => Some(Values::Int8),
            _ => None,
        }
    }

    /// What the codes stand for, and what makes a byte a code; `None` where no encoding has them.
    fn levels(self) -> Option<(Levels, u8)> {
        match self {
            Values::E4m3 => Some((Levels::Table(&E4M3), 0)),
            Values::Int8 => Some((Levels::signed(8), 0x80)),
            Values::E2m1 => Some((Levels::Table(&E2M1), 0)),
            Values::E5m2 => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Values::E4m3 => "fp8",
            Values::E5m2 => "fp8 e5m2",
            Values::Int8 => "int8",
            Values::E2m1 => "fp4",
        }
    }
}

/// `fp8` and `fbgemm_fp8`: every tensor of a float type of one byte; nibbles under the type I8.
pub(super) fn float8(
    stored: &str,
    view: &TensorView<'_>,
    block: Option<[usize; 2]>,
    tensors: &TensorLookup<'_, '_>,
) -> Result<Option<Foreign>> {
    let Some(values) = Values::of(view.dtype) else { return Ok(None) };
    // One byte floats may be scales themselves.
    let beside = stored.strip_suffix(".weight").map(|module| format!("{module}.scale"));
    let names = ["_scale_inv", "_scale"].map(|suffix| format!("{stored}{suffix}"));
    let Some(scale) = names.iter().chain(&beside).find(|name| tensors(name).is_some()) else {
        return match view.shape.len() {
            0 | 1 => Ok(None),
            _ if stored.ends_with("_scale") || stored.ends_with("_scale_inv") => Ok(None),
            _ => Err(Error::missing(format!("its scale, {} or {},", names[0], names[1]))),
        };
    };
    let values = if values == Values::Int8 { Values::E2m1 } else { values };
    let parts = vec![stored.to_owned(), scale.clone()];
    build(stored.to_owned(), parts, values, view, block, tensors, Extra::default()).map(Some)
}

/// What `compressed-tensors` writes in plain types, and its packed 4-bit floats.
pub(in crate::codec) fn compressed_tensors(
    stored: &str,
    view: &TensorView<'_>,
    block: Option<[usize; 2]>,
    tensors: &TensorLookup<'_, '_>,
) -> Result<Option<Foreign>> {
    let (module, values) = match (stored.strip_suffix(".weight"), stored.strip_suffix(".weight_packed")) {
        (Some(module), _) => match Values::of(view.dtype) {
            Some(values) => (module, values),
            None => return Ok(None),
        },
        (_, Some(module)) if view.dtype == Dtype::U8 => (module, Values::E2m1),
        _ => return Ok(None),
    };
    let mut parts = vec![stored.to_owned(), format!("{module}.weight_scale")];
    need(tensors, &parts[1])?;
    let mut extra = Extra::default();
    for (part, there) in [("weight_zero_point", &mut extra.zeros), ("weight_global_scale", &mut extra.global)] {
        let name = format!("{module}.{part}");
        *there = tensors(&name).is_some();
        parts.extend(there.then_some(name));
    }
    if extra.zeros && extra.global {
        return Err(Error::unsupported("weights with zero points and a global scale cannot be read"));
    }
    build(format!("{module}.weight"), parts, values, view, block, tensors, extra).map(Some)
}

/// bitsandbytes' matrices of bytes.
pub(super) fn int8_rows(stored: &str, view: &TensorView<'_>, tensors: &TensorLookup<'_, '_>) -> Result<Foreign> {
    let module = stored.strip_suffix(".weight").unwrap_or(stored);
    let mut parts = vec![stored.to_owned(), format!("{module}.SCB")];
    let format = format!("{module}.weight_format");
    if let Some(order) = tensors(&format) {
        if order.data != [0] {
            return Err(Error::unsupported(
                "its weight_format is not `row`; save it again with a current bitsandbytes",
            ));
        }
        parts.push(format);
    }
    let extra = Extra { divisor: Some(127.0), ..Extra::default() };
    let mut found = build(stored.to_owned(), parts, Values::Int8, view, None, tensors, extra)?;
    found.kind = "bitsandbytes int8".into();
    Ok(found)
}

#[derive(Default)]
struct Extra {
    zeros: bool,
    global: bool,
    divisor: Option<f32>,
}

fn build(
    name: String,
    parts: Vec<String>,
    values: Values,
    view: &TensorView<'_>,
    declared: Option<[usize; 2]>,
    tensors: &TensorLookup<'_, '_>,
    extra: Extra,
) -> Result<Foreign> {
    let mut shape = view.shape.to_vec();
    let &mut [.., rows, ref mut cols] = &mut shape[..] else {
        return Err(Error::mismatch("its shape", "a matrix", format_args!("{:?}", view.shape)));
    };
    if view.data.is_empty() {
        return Err(Error::malformed("it has no values"));
    }
    if values == Values::E2m1 {
        *cols *= 2;
    }
    let (cols, matrices) = (*cols, shape[..shape.len() - 2].iter().product::<usize>());
    let scale = need(tensors, &parts[1])?;
    if !are_scales(scale.dtype) {
        return Err(Error::mismatch(format!("the type of {}", parts[1]), "a float", scale.dtype));
    }
    let misfit = || {
        // Of matrices that are joined, as those of queries, keys and values, each may have brought its own.
        let joined = matches!(scale.shape[..], [n] if n > 1);
        let more = if joined {
            "; scales of several matrices that were joined into this one cannot be told apart: take the model it was made from, or save it \
             with one scale for all or for each row"
        } else {
            ""
        };
        Error::mismatch(
            format!("the shape of {}", parts[1]),
            format_args!("one that divides {shape:?} into blocks"),
            format_args!("{:?}{more}", scale.shape),
        )
    };
    let shared = scale.shape.iter().product::<usize>() == 1;
    let grid = match scale.shape {
        _ if shared => [1, 1],
        [n] if matrices == 1 && *n == rows => [*n, 1],
        [n] if *n == matrices => [1, 1],
        [leading @ .., r, c] if leading == &shape[..shape.len() - 2] => [*r, *c],
        _ => return Err(misfit()),
    };
    let block = match declared {
        Some([m, n]) if !shared && grid == [rows.div_ceil(m), cols.div_ceil(n)] => [m, n],
        _ if grid[0] > 0 && grid[1] > 0 && rows.is_multiple_of(grid[0]) && cols.is_multiple_of(grid[1]) => {
            [rows / grid[0], cols / grid[1]]
        }
        _ => return Err(misfit()),
    };
    for part in &parts[2..] {
        let found = need(tensors, part)?;
        if part.ends_with("weight_zero_point") && (found.shape != scale.shape || found.dtype != Dtype::I8) {
            return Err(Error::mismatch(
                part,
                format_args!("I8 {:?}", scale.shape),
                format_args!("{} {:?}", found.dtype, found.shape),
            ));
        }
        if part.ends_with("weight_global_scale") && (found.dtype != Dtype::F32 || found.data.len() != 4) {
            return Err(Error::mismatch(part, "one F32", format_args!("{} {:?}", found.dtype, found.shape)));
        }
    }
    let how = match block {
        _ if shared => "with one scale".to_owned(),
        [1, n] if n == cols => "with a scale per row".to_owned(),
        [m, 1] if m == rows => "with a scale per column".to_owned(),
        [1, n] => format!("in groups of {n}"),
        [m, n] => format!("in blocks of {m}x{n}"),
    };
    let divisor = extra.divisor.unwrap_or(1.0);
    let scaled =
        Scaled { values, extent: [rows, cols], block, grid, shared, zeros: extra.zeros, divisor, global: extra.global };
    Ok(Foreign { name, shape, kind: format!("{} {how}", values.name()), parts, layout: Layout::Scaled(scaled) })
}

impl Scaled {
    /// Codes and scales of a matrix `[rows, cols]` in `encoding`, whose groups are runs of columns and which stores no zeros.
    pub(super) fn weight(
        &self,
        parts: &[String],
        tensors: &TensorLookup<'_, '_>,
        [rows, cols]: [usize; 2],
        encoding: Encoding,
    ) -> Result<QuantizedWeight> {
        let (codes, scale) = (need(tensors, &parts[0])?, need(tensors, &parts[1])?);
        let Some((_, turn)) = self.values.levels().filter(|(levels, _)| *levels == encoding.levels) else {
            return Err(Error::mismatch(
                format!("the type of {}", parts[0]),
                "that of the declared codes",
                codes.dtype,
            ));
        };
        if let Some(zeros) = parts.get(2).filter(|_| self.zeros) {
            return Err(Error::unsupported(format!("{zeros} stands beside codes that are declared symmetric")));
        }
        let groups = encoding.groups(cols);
        if scale.shape.iter().product::<usize>() != rows * groups {
            return Err(Error::mismatch(
                format!("the shape of {}", parts[1]),
                format_args!("[{rows}, {groups}]"),
                format_args!("{:?}", scale.shape),
            ));
        }
        let mut scale_values = Vec::new();
        scales(&scale, 0..rows * groups, &mut scale_values)?;
        let mut global = None;
        if self.global {
            let divisor = need(tensors, &parts[2])?.to_f32()?[0];
            scale_values.iter_mut().for_each(|scale| *scale /= divisor);
            global = Some(1.0 / divisor);
        }
        let codes = match self.values {
            Values::E2m1 => codes.data.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect(),
            _ => codes.data.iter().map(|byte| byte ^ turn).collect(),
        };
        let zeros = vec![encoding.fixed_zero().unwrap_or(0); rows * groups];
        let weight = QuantizedWeight::of_codes([rows, cols], encoding, codes, scale_values, zeros);
        Ok(QuantizedWeight { global, ..weight })
    }

    /// Slices `range` of `slice` values each.
    pub(super) fn read(
        &self,
        parts: &[String],
        tensors: &TensorLookup<'_, '_>,
        range: Range<usize>,
        slice: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let (codes, scale) = (need(tensors, &parts[0])?, need(tensors, &parts[1])?);
        let zeros = if self.zeros { Some(need(tensors, &parts[2])?) } else { None };
        let mut divisor = vec![self.divisor];
        if self.global {
            scales(&need(tensors, &parts[2])?, 0..1, &mut divisor)?;
        }
        let mut table = [0.0f32; 256];
        for (code, value) in (0..=255u8).zip(&mut table) {
            *value = match self.values.levels() {
                Some((levels, turn)) => levels.level((code ^ turn) & (levels.count() - 1) as u8),
                None => e5m2(code),
            };
        }
        let ([rows, cols], [height, width], [grid_rows, grid_cols]) = (self.extent, self.block, self.grid);
        let first = range.start * slice / cols;
        let mut row_scales: Vec<f32> = Vec::new();
        let mut at = usize::MAX;
        for (row, out) in (first..).zip(out.chunks_exact_mut(cols)) {
            let (matrix, inner) = (row / rows, row % rows);
            let wanted = if self.shared { 0 } else { matrix * grid_rows + inner / height };
            if wanted != at {
                at = wanted;
                scales(&scale, at * grid_cols..(at + 1) * grid_cols, &mut row_scales)?;
                if divisor[0] != 1.0 {
                    row_scales.iter_mut().for_each(|s| *s /= divisor[0]);
                }
            }
            if self.values == Values::E2m1 {
                let bytes = &codes.data[row * cols / 2..][..cols / 2];
                for (pair, byte) in out.chunks_exact_mut(2).zip(bytes) {
                    pair.copy_from_slice(&[table[usize::from(byte & 15)], table[usize::from(byte >> 4)]]);
                }
            } else {
                let bytes = &codes.data[row * cols..][..cols];
                out.iter_mut().zip(bytes).for_each(|(o, code)| *o = table[usize::from(*code)]);
            }
            for (block, (out, s)) in out.chunks_mut(width).zip(&row_scales).enumerate() {
                if let Some(zeros) = &zeros {
                    let zero = f32::from(zeros.data[at * grid_cols + block] as i8);
                    out.iter_mut().for_each(|o| *o -= zero);
                }
                out.iter_mut().for_each(|o| *o *= s);
            }
        }
        Ok(())
    }
}
