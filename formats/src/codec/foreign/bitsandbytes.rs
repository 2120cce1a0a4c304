//! bitsandbytes: 4-bit codes of a table, or bytes, with the largest magnitude of each block or row.
//!
//! ```text
//! T                 any type    two codes a byte, row after row, the high nibble first
//! T.quant_map       F32 [16]    the table
//! T.absmax          F32 [blocks], or U8 [blocks] codes of another table:
//! T.nested_quant_map  F32 [256]
//! T.nested_absmax     F32 [⌈blocks/nested_blocksize⌉]
//! T.quant_state.bitsandbytes__nf4 (or fp4)   U8: JSON with shape, blocksize, nested_blocksize, nested_offset
//! ```
//!
//! `w = quant_map[code] · absmax`, nested `absmax = nested_quant_map[a] · nested_absmax + nested_offset`.

use serde_json::Value;

use super::{Foreign, Layout, TensorLookup, need, scaled};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, TensorView};

/// What the JSON says, and the table.
#[derive(Debug)]
pub(super) struct FourBit {
    table: [f32; 16],
    block: usize,
    nested: Option<Nested>,
}

#[derive(Debug)]
struct Nested {
    block: usize,
    offset: f32,
}

pub(super) fn find(stored: &str, view: &TensorView<'_>, tensors: &TensorLookup<'_, '_>) -> Result<Option<Foreign>> {
    for kind in ["nf4", "fp4"] {
        let state = format!("{stored}.quant_state.bitsandbytes__{kind}");
        if let Some(json) = tensors(&state) {
            return four_bit(stored, view, kind, state, &json, tensors).map(Some);
        }
    }
    let Some(module) = stored.strip_suffix(".weight") else { return Ok(None) };
    match view.dtype {
        Dtype::I8 if tensors(&format!("{module}.SCB")).is_some() => scaled::int8_rows(stored, view, tensors).map(Some),
        Dtype::I8 => Err(Error::missing(format!("its part {module}.SCB"))),
        Dtype::U8 => Err(Error::missing(format!("its part {stored}.quant_state.bitsandbytes__nf4 (or fp4)"))),
        _ => Ok(None),
    }
}

fn four_bit(
    stored: &str,
    view: &TensorView<'_>,
    kind: &str,
    state: String,
    json: &TensorView<'_>,
    tensors: &TensorLookup<'_, '_>,
) -> Result<Foreign> {
    let settings: Value =
        serde_json::from_slice(json.data).map_err(|e| Error::malformed(format!("{state} is not valid JSON: {e}")))?;
    let wrong = |key: &str, expected: &str| Error::mismatch(format!("{key} in {state}"), expected, &settings[key]);
    let count = |key: &str| {
        let number = settings[key].as_u64().filter(|n| (1..1 << 32).contains(n));
        number.map(|n| n as usize).ok_or_else(|| wrong(key, "a positive number"))
    };
    let extents =
        settings["shape"].as_array().map(|list| list.iter().map(|n| n.as_u64().map(|n| n as usize)).collect());
    let shape: Vec<usize> = extents.flatten().ok_or_else(|| wrong("shape", "a list of extents"))?;
    let values = shape.iter().try_fold(1usize, |n, extent| n.checked_mul(*extent));
    let values = values.filter(|n| n.div_ceil(2) == view.data.len() && *n > 0 && shape.len() >= 2);
    let values = values
        .ok_or_else(|| wrong("shape", &format!("a matrix of two values for each of {} bytes", view.data.len())))?;
    let block = count("blocksize")?;
    let blocks = values.div_ceil(block);

    let table = need(tensors, &format!("{stored}.quant_map"))?;
    table.expect("quant_map", Dtype::F32, &[16])?;
    let table = table.to_f32()?.try_into().expect("checked");
    let mut parts = vec![stored.to_owned()];
    parts.extend(["absmax", "quant_map"].map(|part| format!("{stored}.{part}")));
    parts.push(state.clone());
    let absmax = need(tensors, &parts[1])?;
    let nested = match absmax.dtype {
        Dtype::U8 => {
            let names = ["nested_absmax", "nested_quant_map"].map(|part| format!("{stored}.{part}"));
            let offset = settings["nested_offset"].as_f64().ok_or_else(|| wrong("nested_offset", "a number"))?;
            let nested = Nested { block: count("nested_blocksize")?, offset: offset as f32 };
            need(tensors, &names[0])?.expect("nested_absmax", Dtype::F32, &[blocks.div_ceil(nested.block)])?;
            need(tensors, &names[1])?.expect("nested_quant_map", Dtype::F32, &[256])?;
            parts.extend(names);
            Some(nested)
        }
        _ => None,
    };
    absmax.expect("absmax", if nested.is_some() { Dtype::U8 } else { Dtype::F32 }, &[blocks])?;
    let layout = Layout::FourBit(FourBit { table, block, nested });
    Ok(Foreign { name: stored.to_owned(), shape, kind: format!("bitsandbytes {kind}"), parts, layout })
}

impl FourBit {
    /// The values from `first` on.
    pub(super) fn read(
        &self,
        parts: &[String],
        tensors: &TensorLookup<'_, '_>,
        first: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let codes = need(tensors, &parts[0])?.data;
        let absmax = need(tensors, &parts[1])?;
        let nested = match &self.nested {
            Some(nested) => Some((nested, need(tensors, &parts[4])?, need(tensors, &parts[5])?.to_f32()?)),
            None => None,
        };
        let single = |data: &[u8], index: usize| {
            f32::from_le_bytes(data[4 * index..4 * index + 4].try_into().expect("four bytes"))
        };
        let mut at = first;
        let mut rest = out;
        while !rest.is_empty() {
            let block = at / self.block;
            let (now, later) = rest.split_at_mut(rest.len().min((block + 1) * self.block - at));
            let scale = match &nested {
                Some((nested, outer, table)) => {
                    table[usize::from(absmax.data[block])] * single(outer.data, block / nested.block) + nested.offset
                }
                None => single(absmax.data, block),
            };
            for (index, value) in (at..).zip(now.iter_mut()) {
                let byte = codes[index / 2];
                let code = if index % 2 == 0 { byte >> 4 } else { byte & 15 };
                *value = self.table[usize::from(code)] * scale;
            }
            at += now.len();
            rest = later;
        }
        Ok(())
    }
}
