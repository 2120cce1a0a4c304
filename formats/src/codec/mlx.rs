//! MLX: Apple's affine layout, as mlx-lm loads it. A bias in place of a zero, and embedding and head in it too.
//!
//! ```text
//! weight  U32 [rows, cols·b/32]         each row a bit stream of codes
//! scales  F16|BF16|F32 [rows, groups]
//! biases  F16|BF16|F32 [rows, groups]   w = scale · code + bias, so that a bias is the min with its sign turned
//! ```
//!
//! A module is in codes where it has `scales`. Files are laid out as PyTorch's are (`format: pt`), for that is what mlx-lm, which does not
//! look, and those who do make their own names and axes of.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{Codec, ConfigFiles, Declared, PartLookup, Parts, QuantizedModule};
use super::{check_weight, exact, exact_scales, names, part};
use crate::bits::packed_words;
use crate::encoding::{Block, Encoding, Float};
use crate::error::{Error, Result};
use crate::grid::Scheme;
use crate::tensor::{Dtype, TensorView};
use crate::weight::PackedWeight;
use crate::words::{WordLayout, from_words, to_words};

/// The affine layout of MLX.
#[derive(Clone, Copy, Debug)]
pub struct Mlx;

/// Groups that MLX has kernels for.
const GROUPS: [usize; 3] = [32, 64, 128];

impl Codec for Mlx {
    fn id(&self) -> &'static str {
        "mlx"
    }

    fn config_keys(&self) -> &'static [&'static str] {
        &["quantization", "quantization_config"]
    }

    /// As mlx-lm's own converter.
    fn usual(&self) -> Scheme {
        Scheme { bits: 4, group: Some(64), symmetric: false }
    }

    /// A real offset of each group is stored in any case, which whoever names a symmetric scheme does not mind.
    fn encoding(&self, Scheme { bits, group, .. }: Scheme) -> Result<Encoding, String> {
        match group {
            _ if !matches!(bits, 4 | 8) => Err(format!("MLX is written with 4 or 8 bits, not {bits}")),
            Some(group) if GROUPS.contains(&group) => Ok(Encoding::mlx(bits, group, Float::F32)),
            Some(group) => Err(format!("MLX has groups of 32, 64 or 128, not {group}")),
            None => Err("MLX has no scale for a whole row; say a group of 32, 64 or 128".into()),
        }
    }

    fn scheme(&self, encoding: &Encoding) -> Option<Scheme> {
        let Block::Columns(group) = encoding.block else { return None };
        let bits = encoding.levels.bits();
        (encoding.told() == Encoding::mlx(bits, group, Float::F32)).then_some(Scheme {
            bits,
            group: Some(group),
            symmetric: false,
        })
    }

    fn holds_ends(&self) -> bool {
        true
    }

    fn supports(&self, _rows: usize, cols: usize, encoding: &Encoding, desc_act: bool) -> Result<(), String> {
        let Some(Scheme { group: Some(group), .. }) = self.scheme(encoding) else {
            return Err("MLX stores integers of weights alone with a scale and a bias for each group".into());
        };
        if desc_act {
            return Err("MLX cannot store reordered groups (desc_act); write GPTQ, or leave it out".into());
        }
        if cols.is_multiple_of(group) {
            return Ok(());
        }
        let fitting: Vec<String> =
            GROUPS.iter().rev().filter(|g| cols.is_multiple_of(**g)).map(|g| g.to_string()).collect();
        let advice = match fitting.len() {
            0 => "none of MLX's, 32, 64 and 128, fits: leave it out with --ignore".to_owned(),
            _ => format!("group size {} would fit", fitting.join(" or ")),
        };
        Err(format!("a row of {cols} values does not split into groups of {group}; {advice}"))
    }

    fn layout(
        &self,
        rows: usize,
        cols: usize,
        encoding: &Encoding,
        scale_dtype: Dtype,
    ) -> Vec<(&'static str, Dtype, Vec<usize>)> {
        let groups = encoding.groups(cols);
        vec![
            ("weight", Dtype::U32, vec![rows, packed_words(cols, encoding.levels.bits())]),
            ("scales", scale_dtype, vec![rows, groups]),
            ("biases", scale_dtype, vec![rows, groups]),
        ]
    }

    /// None are stored.
    fn min_zero(&self) -> u8 {
        0
    }

    /// What an embedding gives is of this type, so that it is the model's own.
    fn scale_dtype(&self, model: Dtype) -> Dtype {
        if model == Dtype::BF16 { Dtype::BF16 } else { Dtype::F16 }
    }

    fn word_layout(&self) -> WordLayout {
        WordLayout::Rows
    }

    fn encode_packed(&self, weight: PackedWeight, scale_dtype: Dtype) -> Result<Parts> {
        check_weight(&weight, self.word_layout())?;
        let PackedWeight { rows, cols, encoding, .. } = weight;
        self.supports(rows, cols, &encoding, weight.group_of.is_some()).map_err(Error::invalid)?;
        // Not −0, which is no number of its own here.
        let biases: Vec<f32> = weight.mins.iter().map(|min| 0.0 - min).collect();
        let data = [
            from_words(&weight.words),
            exact_scales(scale_dtype, &weight.scales)?,
            exact("bias", scale_dtype, &biases)?,
        ];
        Ok(Parts::of(self.layout(rows, cols, &encoding, scale_dtype), data))
    }

    fn shape(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<[usize; 2]> {
        let bits = usize::from(declared.encoding.levels.bits());
        let packed = part(parts, "weight")?;
        if packed.dtype != Dtype::U32 {
            return Err(Error::mismatch("the type of weight", Dtype::U32, packed.dtype));
        }
        let &[rows, words] = packed.shape else {
            return Err(Error::unsupported(format!(
                "the shape of weight is {:?}, and of what MLX has packed only matrices are read; take the model it was made from, or \
                 have MLX unpack it: mlx_lm.convert --dequantize",
                packed.shape
            )));
        };
        let bits_of_row = words as u128 * 32;
        if !bits_of_row.is_multiple_of(bits as u128) {
            return Err(Error::mismatch(format!("the width of weight at {bits} bits"), "whole codes", words));
        }
        let cols = words * 32 / bits;
        let width = declared.encoding.group();
        for name in ["scales", "biases"] {
            let found = part(parts, name)?;
            let floats = matches!(found.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32);
            if !floats || found.shape != [rows, cols / width] || !cols.is_multiple_of(width) {
                return Err(Error::mismatch(
                    name,
                    format_args!("floats [{rows}, {cols} / {width}] beside a weight of {bits} bits"),
                    format_args!("{} {:?}", found.dtype, found.shape),
                ));
            }
        }
        Ok([rows, cols])
    }

    fn decode_packed(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<PackedWeight> {
        let [rows, cols] = self.shape(parts, declared)?;
        self.rows(parts, declared, [rows, cols], 0, rows)
    }

    fn dequantize_rows(
        &self,
        parts: &PartLookup<'_, '_>,
        declared: &Declared,
        rows: &[u32],
        out: &mut [f32],
    ) -> Result<()> {
        let shape = self.shape(parts, declared)?;
        let mut done = 0;
        // Runs of rows that follow each other.
        for run in rows.chunk_by(|a, b| a + 1 == *b) {
            let weight = self.rows(parts, declared, shape, run[0] as usize, run.len())?.unpacked(self.word_layout())?;
            for row in 0..run.len() {
                weight.dequantize_row(row, &mut out[(done + row) * shape[1]..][..shape[1]]);
            }
            done += run.len();
        }
        Ok(())
    }

    /// By the scales it is known that a weight is in codes.
    fn part_names(&self) -> &'static [&'static str] {
        &["scales", "weight", "biases"]
    }

    /// The encoding of most modules, and an entry for every other one; `false` for those that stay as they are.
    fn config(&self, modules: &[QuantizedModule<'_>], unquantized_linears: &[String]) -> Result<ConfigFiles> {
        let mut kinds: Vec<(Encoding, usize)> = Vec::new();
        for module in modules {
            match kinds.iter_mut().find(|(encoding, _)| *encoding == module.encoding) {
                Some((_, count)) => *count += 1,
                None => kinds.push((module.encoding, 1)),
            }
        }
        // Of two that are as frequent the first.
        let most = kinds.iter().rev().max_by_key(|(_, count)| *count).map(|(encoding, _)| *encoding);
        let Some(base) = most else {
            return Err(Error::invalid("an MLX checkpoint needs at least one quantized module"));
        };
        let said = |encoding: &Encoding| {
            let mut said = Map::new();
            said.insert("group_size".into(), json!(encoding.group()));
            said.insert("bits".into(), json!(encoding.levels.bits()));
            said.insert("mode".into(), json!("affine"));
            said
        };
        let mut whole = said(&base);
        for module in modules.iter().filter(|module| module.encoding != base) {
            whole.insert(module.name.to_owned(), Value::Object(said(&module.encoding)));
        }
        for name in unquantized_linears.iter().filter(|name| !names::is_component(name)) {
            whole.insert(name.clone(), Value::Bool(false));
        }
        Ok(ConfigFiles { quantization_config: Value::Object(whole), files: Vec::new(), notes: Vec::new() })
    }
}

impl Mlx {
    /// So many rows of a weight `[rows, cols]` from `first` on, whose parts fit each other.
    fn rows(
        &self,
        parts: &PartLookup<'_, '_>,
        declared: &Declared,
        [all, cols]: [usize; 2],
        first: usize,
        rows: usize,
    ) -> Result<PackedWeight> {
        let of = |name: &str| -> Result<(Dtype, &[u8])> {
            let TensorView { dtype, data, .. } = part(parts, name)?;
            let row = data.len() / all.max(1);
            Ok((dtype, &data[first * row..][..rows * row]))
        };
        let floats = |name: &str| {
            let (dtype, data) = of(name)?;
            let mut values = vec![0.0; data.len() * 8 / dtype.bitsize()];
            crate::tensor::widen(dtype, data, &mut values)?;
            Ok::<Vec<f32>, Error>(values)
        };
        let encoding = declared.encoding;
        let words = to_words(of("weight")?.1);
        let (scales, mut mins) = (floats("scales")?, floats("biases")?);
        mins.iter_mut().for_each(|bias| *bias = 0.0 - *bias);
        let zeros = vec![0; scales.len()];
        Ok(PackedWeight { mins, ..PackedWeight::of_words([rows, cols], encoding, words, scales, zeros) })
    }
}

/// What a configuration says of MLX's modules: the encoding of all, and of those it names; `None` for one that is left as it is.
pub(super) type Said = (Encoding, HashMap<String, Option<Encoding>>);

/// Reads `quantization` of a config.json.
pub(super) fn said(config: &Map<String, Value>) -> Result<Said> {
    let base = settings(config, "quantization")?;
    let mut modules = HashMap::new();
    for (name, value) in config {
        let encoding = match value {
            Value::Object(own) => Some(settings(own, &format!("quantization.{name}"))?),
            Value::Bool(true) => Some(base),
            Value::Bool(false) => None,
            _ => continue,
        };
        modules.insert(name.clone(), encoding);
    }
    Ok((base, modules))
}

/// What MLX takes where a module's entry leaves something out is its usual scheme.
fn settings(config: &Map<String, Value>, place: &str) -> Result<Encoding> {
    if let Some(mode) = config.get("mode").filter(|mode| !mode.is_null() && **mode != "affine") {
        return Err(Error::unsupported(format!(
            "the weights are packed by MLX in mode {mode}, of which only \"affine\" is read; take the model it was made from, or have MLX \
             unpack it: mlx_lm.convert --dequantize"
        )));
    }
    let number = |key: &str, usual: usize, fits: &dyn Fn(usize) -> bool, expected: &str| match config.get(key) {
        None | Some(Value::Null) => Ok(usual),
        Some(value) => value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .filter(|number| fits(*number))
            .ok_or_else(|| Error::mismatch(format!("{place}.{key}"), expected, value)),
    };
    let bits = number("bits", 4, &|bits| matches!(bits, 2..=6 | 8), "2, 3, 4, 5, 6 or 8")?;
    let group = number("group_size", 64, &|group| GROUPS.contains(&group), "32, 64 or 128")?;
    Ok(Encoding::mlx(bits as u8, group, Float::F32))
}

#[cfg(test)]
mod tests;
