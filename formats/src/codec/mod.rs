//! Lays one quantized weight out as the tensors a runtime loads, reads it back, and describes it in `config.json`.
//!
//! Codecs are pure functions on one weight with local tensor names; module prefixes and files come from the caller.

mod awq;
mod compressed_tensors;
mod foreign;
mod gptq;
mod mlx;
mod names;
mod reader;
mod transforms;

use serde_json::Value;

use crate::encoding::{Block, Encoding};
use crate::error::{Error, Result};
use crate::grid::Scheme;
use crate::tensor::{Dtype, Tensor, TensorView, narrow};
use crate::weight::{PackedWeight, QuantizedWeight};
use crate::words::WordLayout;

pub use awq::Awq;
pub use compressed_tensors::CompressedTensors;
pub use foreign::{Foreign, TensorLookup};
pub use gptq::Gptq;
pub use mlx::Mlx;
pub use names::is_expert;
pub use reader::{QUANTIZATION_KEYS, QuantizationReader, declared_method, read_quantization};
pub use transforms::check_run_time;

/// Every codec, by preference.
pub const CODECS: &[&dyn Codec] = &[&CompressedTensors, &Gptq, &Awq, &Mlx];

/// The codec with this [`Codec::id`].
pub fn codec(id: &str) -> Option<&'static dyn Codec> {
    CODECS.iter().copied().find(|codec| codec.id() == id)
}

/// The scheme that a codec makes an encoding of; `None` of presets and of ggml's types.
pub fn scheme_of(encoding: &Encoding) -> Option<Scheme> {
    CODECS.iter().find_map(|codec| codec.scheme(encoding))
}

/// The tensors of one quantized linear, by local name (`weight_packed`, `qweight`, …).
#[derive(Clone, Debug, PartialEq)]
pub struct Parts(pub Vec<(&'static str, Tensor)>);

impl Parts {
    /// Those of a [layout](Codec::layout), with the bytes of each in its order.
    fn of(layout: Vec<(&'static str, Dtype, Vec<usize>)>, data: impl IntoIterator<Item = Vec<u8>>) -> Parts {
        let parts = layout.into_iter().zip(data);
        Parts(parts.map(|((name, dtype, shape), data)| (name, Tensor { dtype, shape, data })).collect())
    }

    /// The part of this local name.
    pub fn get(&self, suffix: &str) -> Option<TensorView<'_>> {
        self.0.iter().find(|(name, _)| *name == suffix).map(|(_, tensor)| tensor.view())
    }
}

/// Looks up the part of a module by its local name.
pub type PartLookup<'a, 'd> = dyn Fn(&str) -> Option<TensorView<'d>> + 'a;

/// A module that has been or will be quantized, as the configuration describes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizedModule<'a> {
    /// The module's name, without `.weight`.
    pub name: &'a str,
    /// How its weight is represented.
    pub encoding: Encoding,
    /// Groups follow the order of importance instead of the columns (GPTQ's `desc_act`).
    pub desc_act: bool,
    /// Other names by which runtimes know it, which must not be taken for those of linears that are left as they were.
    pub loaded: &'a [String],
}

impl<'a> QuantizedModule<'a> {
    fn names(&self) -> impl Iterator<Item = &'a str> {
        [self.name].into_iter().chain(self.loaded.iter().map(String::as_str))
    }
}

/// What a checkpoint's configuration says about one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Declared {
    /// How its weight is represented, as far as that is told ([`Encoding::told`]).
    pub encoding: Encoding,
    /// Zeros are stored minus one (GPTQ v1).
    pub zeros_minus_one: bool,
}

/// What a codec adds to an output directory besides tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigFiles {
    /// The `quantization_config` object of config.json.
    pub quantization_config: Value,
    /// Further files, name and content.
    pub files: Vec<(String, Vec<u8>)>,
    /// Limits on who can load it, each one sentence for the user.
    pub notes: Vec<String>,
}

impl ConfigFiles {
    /// What `codec` adds to config.json.
    pub fn of(&self, codec: &dyn Codec) -> Value {
        let keys = codec.config_keys().iter();
        Value::Object(keys.map(|key| ((*key).to_owned(), self.quantization_config.clone())).collect())
    }
}

/// A file layout for quantized linears.
pub trait Codec: Sync {
    /// `compressed-tensors`, `gptq`, `awq` or `mlx`; also the `quant_method` in config.json, where that says one.
    fn id(&self) -> &'static str;

    /// The keys of config.json that its configuration stands under.
    fn config_keys(&self) -> &'static [&'static str] {
        &["quantization_config"]
    }

    /// The scheme that is written where nobody asks for another.
    fn usual(&self) -> Scheme {
        Scheme { bits: 4, group: Some(128), symmetric: true }
    }

    /// How integers of this width in such groups are represented; where they cannot be, why, and what can.
    fn encoding(&self, scheme: Scheme) -> Result<Encoding, String> {
        Ok(scheme.into())
    }

    /// The scheme that [`Codec::encoding`] makes an encoding of; `None` of presets.
    fn scheme(&self, encoding: &Encoding) -> Option<Scheme> {
        encoding.weight_scheme()
    }

    /// Whether runtimes read the embedding and the head in it as they read linears, so that these are quantized too. Its parts lie row by
    /// row then, and parts of some rows are what [`Codec::encode_packed`] makes of those rows alone.
    fn holds_ends(&self) -> bool {
        false
    }

    /// Names of [`PRESETS`](crate::encoding::PRESETS) that it can write besides the schemes of integers.
    fn presets(&self) -> &'static [&'static str] {
        &[]
    }

    /// Why a `[rows, cols]` linear cannot be written in this encoding, and what would fit, before any work is done.
    fn supports(&self, rows: usize, cols: usize, encoding: &Encoding, desc_act: bool) -> Result<(), String>;

    /// Name, type and shape of each part, for a linear that [`Codec::supports`] accepts.
    fn layout(
        &self,
        rows: usize,
        cols: usize,
        encoding: &Encoding,
        scale_dtype: Dtype,
    ) -> Vec<(&'static str, Dtype, Vec<usize>)>;

    /// The smallest zero that can be stored on an asymmetric grid.
    fn min_zero(&self) -> u8;

    /// The type scales are stored in, given the type of the model's own weights.
    fn scale_dtype(&self, model: Dtype) -> Dtype;

    /// How the codes of a weight lie.
    fn word_layout(&self) -> WordLayout;

    /// Lays a weight out whose codes are packed as [`Codec::word_layout`] says. Fails when a zero or scale cannot be stored
    /// exactly.
    fn encode_packed(&self, weight: PackedWeight, scale_dtype: Dtype) -> Result<Parts>;

    /// Packs a weight. Fails when a code, zero or scale cannot be stored exactly.
    fn encode(&self, weight: &QuantizedWeight, scale_dtype: Dtype) -> Result<Parts> {
        self.encode_packed(weight.packed(self.word_layout())?, scale_dtype)
    }

    /// Rows and columns of a stored weight, without reading its codes.
    fn shape(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<[usize; 2]>;

    /// Reads a weight back whose codes stay packed as [`Codec::word_layout`] says; `parts` looks a local name up. Parts that do not fit
    /// each other are an error.
    fn decode_packed(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<PackedWeight>;

    /// Reads a weight back. Fails as [`Codec::decode_packed`] does.
    fn decode(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<QuantizedWeight> {
        self.decode_packed(parts, declared)?.unpacked(self.word_layout())
    }

    /// Writes the reals of some rows into `out` (`[rows.len(), cols]`), in the order that is asked for.
    ///
    /// Fails as [`Codec::decode`] does.
    ///
    /// # Panics
    /// When there is no such row, or `out` has another length.
    fn dequantize_rows(
        &self,
        parts: &PartLookup<'_, '_>,
        declared: &Declared,
        rows: &[u32],
        out: &mut [f32],
    ) -> Result<()> {
        let weight = self.decode(parts, declared)?;
        rows.iter()
            .zip(out.chunks_exact_mut(weight.cols.max(1)))
            .for_each(|(&row, out)| weight.dequantize_row(row as usize, out));
        Ok(())
    }

    /// Every local name that tells of a weight in codes; the first is there of each. What is stored as `weight` is told by its type.
    fn part_names(&self) -> &'static [&'static str];

    /// Whether runtimes look for codes of every module of a class, so that one without has to be left out by name even where
    /// no tensor tells of it.
    fn goes_by_class(&self) -> bool {
        false
    }

    /// The configuration of a model whose linears are `modules` and, left as they were, `unquantized_linears`. A name
    /// among these that ends in a dot stands for a whole component, such as `vision_tower.`; beside one, a runtime may
    /// keep every module under another prefix than the file.
    ///
    /// Pure, so a plan can be checked with it before any work: it fails when the layout cannot express the mix.
    fn config(&self, modules: &[QuantizedModule<'_>], unquantized_linears: &[String]) -> Result<ConfigFiles>;
}

/// Fails unless the group divides the row; names the sizes that would.
fn check_group(cols: usize, encoding: &Encoding) -> Result<(), String> {
    let Block::Columns(group) = encoding.block else { return Ok(()) };
    if group > 0 && cols.is_multiple_of(group) {
        return Ok(());
    }
    let fitting: Vec<String> =
        [256, 128, 64, 32].into_iter().filter(|g| cols.is_multiple_of(*g)).map(|g| g.to_string()).collect();
    let advice = match fitting.len() {
        0 => "no group size of 32 or more fits; one scale per row (group size -1) would".to_string(),
        _ => format!("group size {} or -1 (one scale per row) would fit", fitting.join(", ")),
    };
    Err(format!("a row of {cols} values does not split into groups of {group}; {advice}"))
}

/// Fails unless the lengths agree and every zero is within the encoding's width.
fn check_weight(weight: &PackedWeight, layout: WordLayout) -> Result<()> {
    let PackedWeight { rows, cols, encoding, words, scales, zeros, mins, group_of, .. } = weight;
    let bits = encoding.levels.bits();
    let grids = rows * weight.groups();
    let packed = layout.words([*rows, *cols], bits)?;
    let of_mins = if encoding.has_min() { grids } else { 0 };
    for (what, found, expected) in [
        ("words", words.len(), packed),
        ("scales", scales.len(), grids),
        ("zeros", zeros.len(), grids),
        ("mins", mins.len(), of_mins),
    ] {
        if found != expected {
            return Err(Error::mismatch(format!("the number of {what}"), expected, found));
        }
    }
    if let Some(zero) = zeros.iter().find(|&&zero| zero > encoding.max_code()) {
        return Err(Error::invalid(format!("zero {zero} does not fit in {bits} bits")));
    }
    if let Some(fixed) = encoding.fixed_zero().filter(|fixed| zeros.iter().any(|zero| zero != fixed)) {
        return Err(Error::invalid(format!("a symmetric grid has a zero other than {fixed}")));
    }
    if let Some(map) = group_of {
        if map.len() != *cols {
            return Err(Error::mismatch("the number of columns with a group", cols, map.len()));
        }
        if let Some(group) = map.iter().find(|&&group| group as usize >= weight.groups()) {
            return Err(Error::invalid(format!("a column is in group {group} of {}", weight.groups())));
        }
    }
    Ok(())
}

/// Scales as bytes; fails unless every one survives unchanged.
fn exact_scales(dtype: Dtype, scales: &[f32]) -> Result<Vec<u8>> {
    exact("scale", dtype, scales)
}

/// Numbers as bytes, each called `what`; fails unless every one survives unchanged.
fn exact(what: &str, dtype: Dtype, values: &[f32]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.bitsize() / 8);
    narrow(dtype, values, &mut bytes)?;
    let mut back = vec![0.0; values.len()];
    crate::tensor::widen(dtype, &bytes, &mut back)?;
    if let Some(at) = (0..values.len()).find(|&i| values[i] != back[i]) {
        return Err(Error::invalid(format!(
            "{what} {} at index {at} is not a {dtype} number (the nearest is {}); round {what}s before fitting codes to them",
            values[at], back[at]
        )));
    }
    Ok(bytes)
}

/// The part of this name, or an error that names it.
fn part<'d>(parts: &PartLookup<'_, 'd>, name: &str) -> Result<TensorView<'d>> {
    parts(name).ok_or_else(|| Error::missing(format!("its part {name}")))
}

/// The part's two extents; fails unless it is a matrix of 32-bit words.
fn words_shape(part: &TensorView<'_>, name: &str) -> Result<[usize; 2]> {
    if !matches!(part.dtype, Dtype::I32 | Dtype::U32) {
        return Err(Error::mismatch(format!("the type of {name}"), Dtype::I32, part.dtype));
    }
    part.shape
        .try_into()
        .map_err(|_| Error::mismatch(format!("the shape of {name}"), "a matrix", format_args!("{:?}", part.shape)))
}

/// Fails unless the part has this shape.
fn expect_shape(part: &TensorView<'_>, name: &str, shape: &[usize]) -> Result<()> {
    part.expect(name, part.dtype, shape)
}

/// Fails unless the part of scales has this shape, which follows from the encoding's groups.
fn expect_scales(part: &TensorView<'_>, name: &str, shape: &[usize], encoding: &Encoding) -> Result<()> {
    if part.shape == shape {
        return part.expect(name, part.dtype, shape);
    }
    let width = encoding.group();
    let said = if width == 0 { "without a group_size".to_owned() } else { format!("with the group_size {width}") };
    let expected =
        format!("{shape:?} {said} of quantization_config; take the config.json that was published with these weights");
    Err(Error::mismatch(format!("the shape of {name}"), expected, format_args!("{:?}", part.shape)))
}

/// The columns' groups in the form [`QuantizedWeight`] keeps them: `None` when they are runs of `group` columns.
fn group_map(map: Vec<u32>, encoding: &Encoding, groups: usize) -> Result<Option<Vec<u32>>> {
    if let Some(found) = map.iter().find(|&&group| group as usize >= groups) {
        return Err(Error::malformed(format!(
            "g_idx puts a column in group {}, but there are {groups}",
            *found as i32
        )));
    }
    let width = encoding.group_width(map.len()).max(1);
    let in_order = map.iter().enumerate().all(|(col, &group)| group as usize == col / width);
    Ok(if in_order { None } else { Some(map) })
}

#[cfg(test)]
pub(crate) mod testing {
    //! Reading the golden vectors, and random weights.

    use super::*;
    use crate::grid::Scheme;
    use half::f16;
    use proptest::prelude::*;

    /// One JSON file of `tests/vectors`.
    pub struct Vector(Value);

    impl Vector {
        pub fn load(name: &str) -> Vector {
            let path = format!("{}/tests/vectors/{name}.json", env!("CARGO_MANIFEST_DIR"));
            Vector(serde_json::from_slice(&std::fs::read(&path).expect(&path)).expect(&path))
        }

        pub fn value(&self, key: &str) -> &Value {
            &self.0[key]
        }

        pub fn usize(&self, key: &str) -> usize {
            self.0[key].as_u64().expect(key) as usize
        }

        pub fn ints(&self, key: &str) -> Vec<i64> {
            let data = self.0[key]["data"].as_array().expect(key);
            data.iter().map(|v| v.as_i64().expect(key)).collect()
        }

        pub fn floats(&self, key: &str) -> Vec<f32> {
            let data = self.0[key]["data"].as_array().expect(key);
            data.iter().map(|v| v.as_f64().expect(key) as f32).collect()
        }

        pub fn shape(&self, key: &str) -> Vec<usize> {
            let shape = self.0[key]["shape"].as_array().expect(key);
            shape.iter().map(|v| v.as_u64().expect(key) as usize).collect()
        }

        /// The tensor under `key` with the bytes a file would hold.
        pub fn tensor(&self, key: &str) -> Tensor {
            let shape = self.shape(key);
            match self.0[key]["dtype"].as_str().expect(key) {
                "int32" => {
                    let data = self.ints(key).iter().flat_map(|v| (*v as i32).to_le_bytes()).collect();
                    Tensor { dtype: Dtype::I32, shape, data }
                }
                "int64" => {
                    let data = self.ints(key).iter().flat_map(|v| v.to_le_bytes()).collect();
                    Tensor { dtype: Dtype::I64, shape, data }
                }
                name @ ("float16" | "bfloat16") => {
                    let dtype = if name == "float16" { Dtype::F16 } else { Dtype::BF16 };
                    let mut data = Vec::new();
                    narrow(dtype, &self.floats(key), &mut data).unwrap();
                    Tensor { dtype, shape, data }
                }
                other => panic!("{key} has type {other}"),
            }
        }
    }

    /// Weights whose scales fit half precision.
    pub fn any_weight(
        bits: impl Strategy<Value = u8>,
        rows: impl Strategy<Value = usize>,
        cols: impl Strategy<Value = usize>,
        min_zero: u8,
    ) -> impl Strategy<Value = QuantizedWeight> {
        (bits, rows, cols, any::<bool>(), 0usize..4, any::<u64>()).prop_map(
            move |(bits, rows, cols, symmetric, group, seed)| {
                let group = [Some(32), Some(64), Some(cols), None][group].filter(|g| cols.is_multiple_of(*g));
                let scheme = Scheme { bits, group, symmetric };
                let groups = scheme.groups(cols);
                let mut state = seed | 1;
                let mut next = move || {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 32) as u32
                };
                let max = u32::from(scheme.max_code());
                QuantizedWeight {
                    rows,
                    cols,
                    encoding: scheme.into(),
                    codes: (0..rows * cols).map(|_| (next() % (max + 1)) as u8).collect(),
                    scales: (0..rows * groups)
                        .map(|_| f16::from_bits((next() % 0xf000) as u16))
                        .map(|h| if h.is_finite() { h.to_f32() } else { 0.0 })
                        .collect(),
                    zeros: (0..rows * groups)
                        .map(|_| {
                            if symmetric {
                                scheme.midpoint()
                            } else {
                                min_zero + (next() % (max + 1 - u32::from(min_zero))) as u8
                            }
                        })
                        .collect(),
                    mins: Vec::new(),
                    global: None,
                    group_of: None,
                }
            },
        )
    }

    /// Encodes, checks the announced layout, decodes, and compares.
    pub fn check_round_trip(codec: &dyn Codec, weight: &QuantizedWeight) {
        let desc_act = weight.group_of.is_some();
        codec.supports(weight.rows, weight.cols, &weight.encoding, desc_act).unwrap();
        let parts = codec.encode(weight, Dtype::F16).unwrap();
        let layout = codec.layout(weight.rows, weight.cols, &weight.encoding, Dtype::F16);
        let found: Vec<_> = parts.0.iter().map(|(name, t)| (*name, t.dtype, t.shape.clone())).collect();
        assert_eq!(found, layout);
        for (name, tensor) in &parts.0 {
            assert_eq!(Some(tensor.data.len()), crate::tensor::byte_len(tensor.dtype, &tensor.shape), "{name}");
            assert!(codec.part_names().contains(name));
        }
        let declared = Declared { encoding: weight.encoding, zeros_minus_one: codec.id() == "gptq" };
        assert_eq!(codec.shape(&|name| parts.get(name), &declared).unwrap(), [weight.rows, weight.cols]);
        let back = codec.decode(&|name| parts.get(name), &declared).unwrap();
        assert!(
            &back == weight,
            "decode(encode(w)) differs for {:?} [{}, {}]",
            weight.encoding,
            weight.rows,
            weight.cols
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::Scheme;

    #[test]
    fn group_advice_names_what_fits() {
        let scheme = Encoding::from(Scheme { bits: 4, group: Some(128), symmetric: true });
        assert_eq!(check_group(256, &scheme), Ok(()));
        assert_eq!(
            check_group(576, &scheme).unwrap_err(),
            "a row of 576 values does not split into groups of 128; group size 64, 32 or -1 (one scale per row) would fit"
        );
        assert_eq!(
            check_group(172, &scheme).unwrap_err(),
            "a row of 172 values does not split into groups of 128; \
             no group size of 32 or more fits; one scale per row (group size -1) would"
        );
        assert!(check_group(128, &Encoding { block: Block::Columns(0), ..scheme }).is_err());
    }

    #[test]
    fn scales_must_be_exact() {
        let message = exact_scales(Dtype::BF16, &[0.5, 0.1]).unwrap_err().to_string();
        assert!(message.starts_with("scale 0.1 at index 1 is not a BF16 number"), "{message}");
        assert_eq!(exact_scales(Dtype::F16, &[-0.5, 0.0]).unwrap(), [0, 0xb8, 0, 0]);
    }
}
