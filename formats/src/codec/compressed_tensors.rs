//! compressed-tensors: vLLM's own layouts.
//!
//! ```text
//! pack-quantized       integers, of weights alone
//! weight_packed      I32 [rows, ⌈cols·b/32⌉]    each row a bit stream of codes
//! weight_scale       F16|BF16|F32 [rows, groups]
//! weight_shape       I64 [2] = rows, cols
//! weight_zero_point  I32 [⌈rows·b/32⌉, groups]  only when asymmetric; each column a bit stream of zeros
//!
//! int-quantized        8 bits, for runtimes that round each token to 8 bits too
//! weight             I8 [rows, cols]             codes less 128
//! weight_scale       F16|BF16|F32 [rows, 1]
//!
//! float-quantized      E4M3, for runtimes that round each token to E4M3 too
//! weight             F8_E4M3 [rows, cols]
//! weight_scale       F16|BF16|F32 [rows, 1]
//!
//! nvfp4-pack-quantized E2M1, of weights alone
//! weight_packed      U8 [rows, cols/2]           two codes a byte, the low half first
//! weight_scale       F8_E4M3 [rows, cols/16]
//! weight_global_scale  F32 [1]                   divides the scales
//! ```
//!
//! The library thinks in signed codes `−2^(b−1)..` and stores them plus `2^(b−1)`, which is our unsigned code.

use serde_json::{Map, Value, json};

use super::foreign::scaled;
use super::names::{self, NameSet, Selection};
use super::{Codec, ConfigFiles, Declared, Foreign, PartLookup, Parts, QuantizedModule};
use super::{check_group, check_weight, exact_scales, expect_scales, expect_shape, group_map, part, words_shape};
use crate::bits::{packed_words, unpack};
use crate::encoding::{Activation, Block, E4M3, Encoding, Float, Levels, Offset, code_e4m3};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, TensorView};
use crate::weight::PackedWeight;
use crate::words::{WordLayout, from_words, to_words, transpose};

/// The version of the compressed-tensors library whose layout is written.
const VERSION: &str = "0.20.0";

/// One of the library's formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Packed,
    Int,
    Float,
    Nvfp4,
}

impl Format {
    /// The one that holds an encoding.
    fn of(encoding: &Encoding) -> Option<Format> {
        let rows = encoding.block == Block::Row && encoding.offset == Offset::None && encoding.global.is_none();
        let (eight, floats) = (encoding.levels == Levels::signed(8), encoding.levels == Levels::Table(&E4M3));
        match encoding.activation {
            None if *encoding == Encoding::NVFP4 => Some(Format::Nvfp4),
            None => encoding.scheme().map(|_| Format::Packed),
            Some(inputs) if rows && eight && inputs == Activation::INT8_TOKEN => Some(Format::Int),
            Some(inputs) if rows && floats && inputs == Activation::FP8_TOKEN => Some(Format::Float),
            Some(_) => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Format::Packed => "pack-quantized",
            Format::Int => "int-quantized",
            Format::Float => "float-quantized",
            Format::Nvfp4 => "nvfp4-pack-quantized",
        }
    }

    /// What a code is stored as where each has a byte of its own: the type, and what is added.
    fn bytes(self) -> Option<(Dtype, u8)> {
        match self {
            Format::Packed | Format::Nvfp4 => None,
            Format::Int => Some((Dtype::I8, 128)),
            Format::Float => Some((Dtype::F8_E4M3, 0)),
        }
    }
}

/// A target that no module has. Transformers takes the first group with a regular expression in whose text there is `experts` for
/// that of all experts, and else the first with the name of a class or module.
const NO_EXPERTS: &str = "re:^$experts";

fn is_pattern(target: &str) -> bool {
    target.starts_with("re:")
}

/// How the experts of a model are held.
struct Experts {
    /// Each encoding among them with how many linears have it.
    encodings: Vec<(Encoding, usize)>,
    /// Whether there are experts at all.
    any: bool,
    /// Whether each has a byte for a weight, or is left as it is.
    bytes: bool,
}

impl Experts {
    fn of(modules: &[QuantizedModule<'_>], left: &[String]) -> Experts {
        let mut encodings: Vec<(Encoding, usize)> = Vec::new();
        for module in modules.iter().filter(|module| names::is_expert(module.name)) {
            match encodings.iter_mut().find(|(encoding, _)| *encoding == module.encoding) {
                Some((_, count)) => *count += 1,
                None => encodings.push((module.encoding, 1)),
            }
        }
        let bytes = encodings.iter().all(|(encoding, _)| Format::of(encoding).is_some_and(|f| f.bytes().is_some()));
        let any = !encodings.is_empty() || left.iter().any(|name| names::is_expert(name));
        Experts { encodings, any, bytes }
    }

    /// How far in front the group of an encoding has to stand; 0 where no expert has it.
    fn rank(&self, encoding: &Encoding) -> usize {
        let count = self.encodings.iter().find(|(own, _)| own == encoding).map_or(0, |(_, count)| *count);
        // By a group of eight-bit floats transformers reads everything that has a byte for a weight, and plain weights too.
        let floats = count > 0 && self.bytes && Format::of(encoding) == Some(Format::Float);
        if floats { usize::MAX } else { count }
    }

    /// Whether transformers takes the group by which it can read all of them for theirs: it multiplies what has a byte for a weight by
    /// its scales, and takes plain weights as they are, where it takes them for eight-bit floats, and else looks for packed ones.
    fn are_read_by(&self, groups: &[(Encoding, Vec<String>)]) -> bool {
        let named = groups
            .iter()
            .find(|(_, targets)| targets.iter().any(|target| is_pattern(target) && target.contains("experts")));
        let by_class = || groups.iter().find(|(_, targets)| targets.iter().any(|target| !is_pattern(target)));
        let Some((encoding, _)) = named.or_else(by_class).or(groups.first()) else { return false };
        match self.bytes {
            true => Format::of(encoding) == Some(Format::Float),
            false => self.rank(encoding) > 0,
        }
    }
}

fn format_of(encoding: &Encoding) -> Result<&'static str> {
    let format = Format::of(encoding).map(Format::name);
    format.ok_or_else(|| Error::unsupported("compressed-tensors has no format for an encoding among these"))
}

/// A group of the configuration that gives an encoding to these targets.
fn group(encoding: &Encoding, targets: &[String]) -> Result<Value> {
    let group_size = Some(encoding.group()).filter(|width| *width > 0);
    let strategy = match group_size {
        Some(_) if encoding.global.is_some() => "tensor_group",
        Some(_) => "group",
        None => "channel",
    };
    let kind = |levels: &Levels| if matches!(levels, Levels::Integer { .. }) { "int" } else { "float" };
    let inputs = encoding.activation.map(|activation| {
        json!({
            "num_bits": activation.levels.bits(), "type": kind(&activation.levels), "symmetric": true,
            "strategy": "token", "group_size": null, "dynamic": activation.dynamic,
        })
    });
    let mut group = json!({
        "targets": targets,
        // Without its own format a loader guesses one from the widths.
        "format": format_of(encoding)?,
        "weights": {
            "num_bits": encoding.levels.bits(), "type": kind(&encoding.levels),
            "symmetric": encoding.fixed_zero().is_some(), "strategy": strategy, "group_size": group_size,
            "dynamic": false,
        },
        "input_activations": inputs,
        "output_activations": null,
    });
    if encoding.precision() == Float::E4M3 {
        let name = Value::from("torch.float8_e4m3fn");
        (group["weights"]["scale_dtype"], group["weights"]["zp_dtype"]) = (name.clone(), name);
    }
    Ok(group)
}

/// Whether it can be written, so that what a configuration says of it tells all there is to know.
pub(super) fn is_written(encoding: &Encoding) -> bool {
    Format::of(encoding).is_some()
}

/// The layouts of compressed-tensors.
#[derive(Clone, Copy, Debug)]
pub struct CompressedTensors;

impl Codec for CompressedTensors {
    fn id(&self) -> &'static str {
        "compressed-tensors"
    }

    fn presets(&self) -> &'static [&'static str] {
        &["W8A8", "FP8_DYNAMIC", "NVFP4A16"]
    }

    fn supports(&self, _rows: usize, cols: usize, encoding: &Encoding, desc_act: bool) -> Result<(), String> {
        if Format::of(encoding).is_none() {
            return Err(
                "compressed-tensors is written with integers of weights alone, W8A8, FP8_DYNAMIC and NVFP4A16".into()
            );
        }
        if !(2..=8).contains(&encoding.levels.bits()) {
            return Err(format!("compressed-tensors packs 2 to 8 bits, not {}", encoding.levels.bits()));
        }
        if desc_act {
            return Err(
                "compressed-tensors no longer stores reordered groups (desc_act); write GPTQ, or leave it out".into()
            );
        }
        check_group(cols, encoding)
    }

    fn layout(
        &self,
        rows: usize,
        cols: usize,
        encoding: &Encoding,
        scale_dtype: Dtype,
    ) -> Vec<(&'static str, Dtype, Vec<usize>)> {
        let (groups, bits) = (encoding.groups(cols), encoding.levels.bits());
        if let Some((dtype, _)) = Format::of(encoding).and_then(Format::bytes) {
            return vec![("weight", dtype, vec![rows, cols]), ("weight_scale", scale_dtype, vec![rows, groups])];
        }
        if Format::of(encoding) == Some(Format::Nvfp4) {
            return vec![
                ("weight_packed", Dtype::U8, vec![rows, cols / 2]),
                ("weight_scale", Dtype::F8_E4M3, vec![rows, groups]),
                ("weight_global_scale", Dtype::F32, vec![1]),
            ];
        }
        let mut layout = vec![
            ("weight_packed", Dtype::I32, vec![rows, packed_words(cols, bits)]),
            ("weight_scale", scale_dtype, vec![rows, groups]),
            ("weight_shape", Dtype::I64, vec![2]),
        ];
        if encoding.fixed_zero().is_none() {
            layout.push(("weight_zero_point", Dtype::I32, vec![packed_words(rows, bits), groups]));
        }
        layout
    }

    fn min_zero(&self) -> u8 {
        0
    }

    fn scale_dtype(&self, model: Dtype) -> Dtype {
        if model == Dtype::BF16 { Dtype::BF16 } else { Dtype::F16 }
    }

    fn word_layout(&self) -> WordLayout {
        WordLayout::Rows
    }

    fn encode_packed(&self, weight: PackedWeight, scale_dtype: Dtype) -> Result<Parts> {
        check_weight(&weight, self.word_layout())?;
        let PackedWeight { rows, cols, encoding, .. } = weight;
        if weight.group_of.is_some() {
            return Err(Error::invalid("compressed-tensors cannot store reordered groups"));
        }
        let groups = weight.groups();
        if Format::of(&encoding) == Some(Format::Nvfp4) {
            let global = weight.global.unwrap_or(1.0);
            // Words of eight codes are groups of four bytes, and a row is whole groups of sixteen.
            let data =
                [from_words(&weight.words), eighths(&weight.scales, global)?, (1.0 / global).to_le_bytes().to_vec()];
            return Ok(Parts::of(self.layout(rows, cols, &encoding, scale_dtype), data));
        }
        let mut data = vec![from_words(&weight.words), exact_scales(scale_dtype, &weight.scales)?];
        match Format::of(&encoding).and_then(Format::bytes) {
            Some((_, less)) => {
                // Words end with their row, and bytes do not.
                let rows = data[0].chunks_exact(packed_words(cols, 8).max(1) * 4);
                data[0] = rows.flat_map(|row| row[..cols].iter().map(|code| code.wrapping_sub(less))).collect();
            }
            None => data.push([rows as i64, cols as i64].iter().flat_map(|extent| extent.to_le_bytes()).collect()),
        }
        if encoding.fixed_zero().is_none() {
            let zeros = WordLayout::ColumnsTransposed.pack(&weight.zeros, [rows, groups], encoding.levels.bits())?;
            data.push(from_words(&zeros));
        }
        Ok(Parts::of(self.layout(rows, cols, &encoding, scale_dtype), data))
    }

    fn shape(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<[usize; 2]> {
        match plain(parts, &declared.encoding)? {
            Some(stored) => stored.matrix(),
            None => stored_shape(parts),
        }
    }

    fn decode_packed(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<PackedWeight> {
        let encoding = declared.encoding;
        let bits = encoding.levels.bits();
        if let Some(stored) = plain(parts, &encoding)? {
            return stored.weight(&by_name(parts), encoding)?.packed(self.word_layout());
        }
        let [rows, cols] = stored_shape(parts)?;
        let groups = encoding.groups(cols);
        let packed = part(parts, "weight_packed")?;
        let [packed_rows, words] = words_shape(&packed, "weight_packed")?;
        if packed_rows != rows {
            return Err(Error::mismatch("the number of rows in weight_packed", rows, packed_rows));
        }
        // Versions before 0.18 kept ⌊32/b⌋ codes in a word; with 2, 4 and 8 bits that is the same.
        let per_word = 32 / usize::from(bits);
        let words = if words == packed_words(cols, bits) {
            to_words(packed.data)
        } else if words == cols.div_ceil(per_word) {
            WordLayout::Rows.pack(&unpack_padded(packed.data, rows, cols, bits), [rows, cols], bits)?
        } else {
            let expected = format!("{} (or, padded, {})", packed_words(cols, bits), cols.div_ceil(per_word));
            return Err(Error::mismatch("the number of words in a row of weight_packed", expected, words));
        };

        let scale = part(parts, "weight_scale")?;
        let mut scales = scale.to_f32()?;
        if scales.len() == 1 && groups == 1 {
            scales = vec![scales[0]; rows];
        } else if scales.len() != rows * groups {
            expect_scales(&scale, "weight_scale", &[rows, groups], &encoding)?;
        }

        let half = 1u8 << (bits - 1);
        let zeros = match (parts("weight_zero_point"), encoding.fixed_zero()) {
            // Older versions stored zeros beside symmetric codes too, all of them 0.
            (_, Some(zero)) => vec![zero; rows * groups],
            (None, _) => return Err(Error::missing("its part weight_zero_point, which an asymmetric scheme needs,")),
            (Some(zero), _) if zero.dtype == Dtype::I8 => {
                expect_shape(&zero, "weight_zero_point", &[rows, groups])?;
                zero.data.iter().map(|&z| z.wrapping_add(half) & encoding.max_code()).collect()
            }
            (Some(zero), _) => {
                words_shape(&zero, "weight_zero_point")?;
                let words = packed_words(rows, bits);
                let (words, padded) = if zero.shape == [rows.div_ceil(per_word), groups] && zero.shape[0] != words {
                    (rows.div_ceil(per_word), true)
                } else {
                    expect_shape(&zero, "weight_zero_point", &[words, groups])?;
                    (words, false)
                };
                let stored = to_words(zero.data);
                match padded {
                    true => {
                        let by_group = from_words(&transpose(&stored, words, groups));
                        transpose(&unpack_padded(&by_group, groups, rows, bits), groups, rows)
                    }
                    false => WordLayout::ColumnsTransposed.unpack(&stored, [rows, groups], bits)?,
                }
            }
        };

        // Written by versions up to 0.18 for `actorder: group`.
        let group_of = match parts("weight_g_idx") {
            Some(map) if map.data.iter().any(|&b| b != 0xff) => {
                map.expect("weight_g_idx", Dtype::I32, &[cols])?;
                group_map(to_words(map.data), &encoding, groups)?
            }
            _ => None,
        };
        let weight = PackedWeight::of_words([rows, cols], encoding, words, scales, zeros);
        Ok(PackedWeight { group_of, ..weight })
    }

    fn part_names(&self) -> &'static [&'static str] {
        &["weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"]
    }

    fn goes_by_class(&self) -> bool {
        true
    }

    fn config(&self, modules: &[QuantizedModule<'_>], unquantized_linears: &[String]) -> Result<ConfigFiles> {
        let mut selections = names::by_encoding(modules, unquantized_linears);
        let experts = Experts::of(modules, unquantized_linears);
        // Transformers reads all experts by the first group that names some: theirs has to stand before that of shared experts.
        selections.sort_by_key(|selection| std::cmp::Reverse(experts.rank(&selection.encoding)));
        let mut groups: Vec<(Encoding, Vec<String>)> = selections
            .iter()
            .map(|Selection { encoding, names, .. }| match selections.len() {
                1 => (*encoding, vec!["Linear".to_owned()]),
                _ => (*encoding, names.targets()),
            })
            .collect();
        let mut formats = groups.iter().map(|(encoding, _)| format_of(encoding)).collect::<Result<Vec<_>>>()?;
        let several = groups.len() > 1;
        if experts.any && !experts.are_read_by(&groups) {
            match experts.bytes {
                true => {
                    let floats = Encoding::fp8(Block::Row).beside(Activation::FP8_TOKEN);
                    groups.insert(0, (floats, vec![NO_EXPERTS.to_owned()]));
                }
                false => groups[0].1.push(NO_EXPERTS.to_owned()),
            }
        }
        let groups: Map<String, Value> = groups
            .iter()
            .enumerate()
            .map(|(index, (encoding, targets))| Ok((format!("group_{index}"), group(encoding, targets)?)))
            .collect::<Result<_>>()?;
        // What is left in every layer is named once for all, so that layers are meant too that share one layer's tensors.
        let (components, left): (Vec<&str>, Vec<&str>) = unquantized_linears
            .iter()
            .map(String::as_str)
            .filter(|n| *n != "lm_head")
            .partition(|n| names::is_component(n));
        let all: Vec<&str> = modules.iter().flat_map(QuantizedModule::names).chain(left.iter().copied()).collect();
        let mut ignore = NameSet::new(&left, &all, !components.is_empty()).targets();
        ignore.extend(components.iter().map(|component| format!("re:{}", names::anywhere(component))));
        // A tied head is a Linear too, though it has no tensor of its own.
        if !modules.iter().any(|module| module.name == "lm_head") {
            ignore.push("lm_head".into());
        }
        let mut notes = Vec::new();
        if modules.iter().any(|module| module.encoding.fixed_zero().is_none()) {
            notes.push(match several {
                false => "transformers loads asymmetric compressed-tensors only with CompressedTensorsConfig(dequantize=True); vLLM loads them \
                      as they are"
                    .into(),
                true => "transformers does not load compressed-tensors of several schemes where one is asymmetric, with \
                      CompressedTensorsConfig(dequantize=True) neither; vLLM loads them as they are"
                    .into(),
            });
        }
        formats.dedup();
        let whole = match formats[..] {
            [] => Format::Packed.name(),
            [one] => one,
            _ => "mixed-precision",
        };
        let quantization_config = json!({
            "quant_method": "compressed-tensors",
            "format": whole,
            // Without this transformers leaves the linears at random values, silently.
            "quantization_status": "compressed",
            "version": VERSION,
            "global_compression_ratio": null,
            "kv_cache_scheme": null,
            "ignore": ignore,
            "sparsity_config": {},
            "transform_config": {},
            "config_groups": groups,
        });
        Ok(ConfigFiles { quantization_config, files: Vec::new(), notes })
    }
}

/// Scales as bytes of E4M3, over the global one; fails unless every one survives unchanged.
fn eighths(scales: &[f32], global: f32) -> Result<Vec<u8>> {
    let code = |scale: &f32| {
        let code = code_e4m3(scale / global);
        if E4M3[usize::from(code)] * global != *scale {
            return Err(Error::invalid(format!("scale {scale} is no E4M3 number times the global scale {global}")));
        }
        Ok(code)
    };
    scales.iter().map(code).collect()
}

/// Finds a weight in plain types; `None` of a packed one, as which 8 bits may be stored for runtimes that round inputs, too.
fn plain(parts: &PartLookup<'_, '_>, encoding: &Encoding) -> Result<Option<Foreign>> {
    let stored = match Format::of(encoding) {
        Some(Format::Nvfp4) => "weight_packed",
        Some(Format::Int | Format::Float) if parts("weight_packed").is_none() => "weight",
        _ => return Ok(None),
    };
    let view = part(parts, stored)?;
    let found = scaled::compressed_tensors(&format!("{MODULE}.{stored}"), &view, None, &by_name(parts))?;
    found.map_or_else(
        || Err(Error::mismatch(format!("the type of {stored}"), "one of codes", view.dtype)),
        |found| Ok(Some(found)),
    )
}

/// Stands for the name of the module, which a codec is not told.
const MODULE: &str = "module";

/// The parts by whole names.
fn by_name<'d>(parts: &PartLookup<'_, 'd>) -> impl Fn(&str) -> Option<TensorView<'d>> {
    move |name| name.strip_prefix(MODULE)?.strip_prefix('.').and_then(parts)
}

fn stored_shape(parts: &PartLookup<'_, '_>) -> Result<[usize; 2]> {
    let shape = part(parts, "weight_shape")?;
    let extents: Vec<u64> = match shape.dtype {
        Dtype::I64 => {
            shape.data.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))).collect()
        }
        Dtype::I32 => to_words(shape.data).into_iter().map(u64::from).collect(),
        other => return Err(Error::mismatch("the type of weight_shape", Dtype::I64, other)),
    };
    // Neither extent can exceed what the packed codes could hold, so products below cannot overflow.
    let limit = part(parts, "weight_packed")?.data.len() as u64 * 8;
    match extents[..] {
        [rows, cols] if rows <= limit && cols <= limit && rows.checked_mul(cols).is_some_and(|n| n <= limit) => {
            Ok([rows as usize, cols as usize])
        }
        _ => Err(Error::mismatch("weight_shape", "the rows and columns of weight_packed", format_args!("{extents:?}"))),
    }
}

/// Rows of words that each hold ⌊32/b⌋ codes and leave their top bits unused.
fn unpack_padded(packed: &[u8], rows: usize, cols: usize, bits: u8) -> Vec<u8> {
    let per_word = 32 / usize::from(bits);
    let row_bytes = 4 * cols.div_ceil(per_word);
    let mut codes = vec![0; rows * cols];
    if cols > 0 {
        for (codes, packed) in codes.chunks_exact_mut(cols).zip(packed.chunks_exact(row_bytes)) {
            for (codes, word) in codes.chunks_mut(per_word).zip(packed.chunks_exact(4)) {
                unpack(word, bits, codes);
            }
        }
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::testing::{Vector, any_weight, check_round_trip};
    use crate::encoding::PRESETS;
    use crate::grid::Scheme;
    use crate::tensor::Tensor;
    use crate::weight::QuantizedWeight;
    use proptest::prelude::*;

    /// Encodes the library's codes and compares with the library's bytes, then decodes those.
    fn check(vector: &str) {
        let v = Vector::load(vector);
        let args = v.value("weights_args");
        let bits = args["num_bits"].as_u64().unwrap() as u8;
        let symmetric = args["symmetric"].as_bool().unwrap();
        let group = args["group_size"].as_u64().map(|g| g as usize);
        let scheme = Scheme { bits, group, symmetric };
        let half = i64::from(scheme.midpoint());
        let [rows, cols]: [usize; 2] = v.shape("codes").try_into().unwrap();
        let zeros = if symmetric {
            vec![scheme.midpoint(); rows * scheme.groups(cols)]
        } else {
            // The vector holds zeros only as the library packed them; read them one field at a time.
            let words: Vec<u32> = v.ints("weight_zero_point").iter().map(|w| *w as u32).collect();
            let groups = scheme.groups(cols);
            let field = |row: usize, group: usize| words[row * 4 / 32 * groups + group] >> (row * 4 % 32) & 15;
            assert_eq!(bits, 4);
            (0..rows * groups).map(|i| field(i / groups, i % groups) as u8).collect()
        };
        let weight = QuantizedWeight {
            rows,
            cols,
            encoding: scheme.into(),
            codes: v.ints("codes").iter().map(|c| (c + half) as u8).collect(),
            scales: v.floats("weight_scale"),
            zeros,
            mins: Vec::new(),
            global: None,
            group_of: None,
        };
        let parts = CompressedTensors.encode(&weight, Dtype::BF16).unwrap();
        let names = CompressedTensors.layout(rows, cols, &scheme.into(), Dtype::BF16);
        for ((name, dtype, shape), (found_name, found)) in names.iter().zip(&parts.0) {
            assert_eq!((name, dtype, shape), (found_name, &found.dtype, &found.shape), "{vector}");
            let expected = v.tensor(name);
            assert_eq!(found.shape, expected.shape, "{vector} {name}");
            assert_eq!(found.data, expected.data, "{vector} {name}");
        }
        let declared = Declared { encoding: scheme.into(), zeros_minus_one: false };
        let back = CompressedTensors.decode(&|name| parts.get(name), &declared).unwrap();
        assert_eq!(back, weight, "{vector}");
        // The library multiplied in bfloat16.
        let mut row = vec![0.0; cols];
        back.dequantize_row(0, &mut row);
        for (ours, theirs) in row.iter().zip(v.floats("dequant_first_row")) {
            assert_eq!(half::bf16::from_f32(*ours).to_f32(), theirs, "{vector}");
        }
    }

    #[test]
    fn equals_the_library_byte_for_byte() {
        check("ct_pack_w3_sym_group");
        check("ct_pack_w4_sym_group");
        check("ct_pack_w4_asym_group");
        check("ct_pack_w8_sym_channel");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn round_trip(weight in any_weight(2u8..=8, 1usize..40, 1usize..140, 0)) {
            check_round_trip(&CompressedTensors, &weight);
        }

        #[test]
        fn the_padded_layout_of_older_versions_is_read(weight in any_weight(prop::sample::select(vec![3u8, 5, 6, 7]), 1usize..40, 32usize..140, 0)) {
            let &QuantizedWeight { rows, cols, encoding, .. } = &weight;
            let scheme = encoding.scheme().unwrap();
            let per_word = 32 / usize::from(scheme.bits);
            let words = cols.div_ceil(per_word);
            prop_assume!(words != packed_words(cols, scheme.bits));
            prop_assume!(scheme.symmetric || rows.div_ceil(per_word) != packed_words(rows, scheme.bits));
            let pad = |codes: &[u8], cols: usize| -> Vec<u32> {
                codes.chunks(cols).flat_map(|row| row.chunks(per_word)).map(|codes| {
                    codes.iter().enumerate().map(|(i, &c)| u32::from(c) << (i * usize::from(scheme.bits))).sum()
                }).collect()
            };
            let mut parts = CompressedTensors.encode(&weight, Dtype::F16).unwrap();
            parts.0[0].1 = Tensor { dtype: Dtype::I32, shape: vec![rows, words], data: from_words(&pad(&weight.codes, cols)) };
            if !scheme.symmetric {
                let groups = weight.groups();
                let zero_words = rows.div_ceil(per_word);
                let zeros = transpose(&pad(&transpose(&weight.zeros, rows, groups), rows), groups, zero_words);
                parts.0[3].1 = Tensor { dtype: Dtype::I32, shape: vec![zero_words, groups], data: from_words(&zeros) };
            }
            let declared = Declared { encoding: scheme.into(), zeros_minus_one: false };
            prop_assert_eq!(CompressedTensors.decode(&|name| parts.get(name), &declared).unwrap(), weight);
        }
    }

    /// Pairs of codes, scales of eight bits and one of all, as the library has them; another global scale than a power of two is read too.
    #[test]
    fn nvfp4_is_the_librarys() {
        let v = Vector::load("ct_nvfp4");
        let bytes = |key: &str| v.ints(key).iter().map(|byte| *byte as u8).collect::<Vec<u8>>();
        let theirs = v.floats("weight_global_scale")[0];
        let parts = |global: f32| {
            Parts(vec![
                ("weight_packed", Tensor { dtype: Dtype::U8, shape: vec![16, 32], data: bytes("weight_packed") }),
                (
                    "weight_scale",
                    Tensor { dtype: Dtype::F8_E4M3, shape: vec![16, 4], data: bytes("weight_scale_bytes") },
                ),
                (
                    "weight_global_scale",
                    Tensor { dtype: Dtype::F32, shape: vec![1], data: global.to_le_bytes().to_vec() },
                ),
            ])
        };
        let declared = Declared { encoding: Encoding::NVFP4, zeros_minus_one: false };
        let read = |parts: &Parts| CompressedTensors.decode(&|name| parts.get(name), &declared).unwrap();
        let mut row = vec![0.0; 64];
        read(&parts(theirs)).dequantize_row(0, &mut row);
        // The vector's values are divided after the product, the library's own before it: a difference in the last bit, and none below.
        for (ours, theirs) in row.iter().zip(v.floats("dequant_f32_first_row")) {
            assert!((ours - theirs).abs() <= 1e-7 * theirs.abs(), "{ours} and {theirs}");
        }
        // What is written has a power of two, and comes back as it was.
        let ours = parts(1024.0);
        let weight = read(&ours);
        assert_eq!(CompressedTensors.encode(&weight, Dtype::BF16).unwrap(), ours);
        let layout = CompressedTensors.layout(16, 64, &Encoding::NVFP4, Dtype::BF16);
        let found: Vec<_> = ours.0.iter().map(|(name, t)| (*name, t.dtype, t.shape.clone())).collect();
        assert_eq!(found, layout);
        let mut spoilt = weight.clone();
        spoilt.scales[3] *= 1.01;
        let error = CompressedTensors.encode(&spoilt, Dtype::BF16).unwrap_err().to_string();
        assert!(error.contains("is no E4M3 number"), "{error}");

        let module = QuantizedModule { name: "a.0.x", encoding: Encoding::NVFP4, desc_act: false, loaded: &[] };
        let config = CompressedTensors.config(&[module], &[]).unwrap().quantization_config;
        let weights = &config["config_groups"]["group_0"]["weights"];
        assert_eq!((&config["format"], &weights["strategy"]), (&json!("nvfp4-pack-quantized"), &json!("tensor_group")));
        assert_eq!(weights["scale_dtype"], "torch.float8_e4m3fn");
        let reader = crate::codec::read_quantization(&json!({"quantization_config": config})).unwrap().unwrap();
        assert_eq!(reader.declared("a.0.x").unwrap(), Some(declared));
        let lookup = |name: &str| name.strip_prefix("a.0.x.").and_then(|part| ours.get(part));
        let foreign = reader.foreign("a.0.x.weight_packed", &lookup).unwrap().unwrap();
        let mut values = vec![0.0; 16 * 64];
        foreign.read(&lookup, 0..16, &mut values).unwrap();
        assert_eq!(values, weight.dequantize());
    }

    /// Of runtimes that round inputs too: a byte a code, rows of any width.
    #[test]
    fn bytes_hold_codes_of_eight_bits() {
        for (name, dtype, byte) in [("W8A8", Dtype::I8, 0x80), ("FP8_DYNAMIC", Dtype::F8_E4M3, 0)] {
            let encoding = PRESETS.iter().find(|(known, _)| *known == name).unwrap().1.told();
            for cols in [1, 7, 64] {
                let codes = (0..3 * cols).map(|i| (i * 37 % 127) as u8).collect();
                let zeros = vec![encoding.fixed_zero().unwrap(); 3];
                let scales = vec![0.5, 0.25, 2.0];
                let weight = QuantizedWeight {
                    rows: 3,
                    cols,
                    encoding,
                    codes,
                    scales,
                    zeros,
                    mins: Vec::new(),
                    global: None,
                    group_of: None,
                };
                let parts = CompressedTensors.encode(&weight, Dtype::BF16).unwrap();
                let stored = parts.get("weight").unwrap();
                assert_eq!((stored.dtype, stored.shape, stored.data[0]), (dtype, &[3, cols][..], byte));
                assert_eq!(parts.get("weight_scale").unwrap().shape, [3, 1]);
                let declared = Declared { encoding, zeros_minus_one: false };
                let back = CompressedTensors.decode(&|name| parts.get(name), &declared).unwrap();
                assert_eq!(back, weight, "{name}");
                let level = encoding.levels.level(weight.codes[cols]);
                assert_eq!(back.dequantize()[cols], 0.25 * level, "{name}");
                // Whoever reads them without knowing the encoding reads the same.
                let config = CompressedTensors
                    .config(&[QuantizedModule { name: "a.0.x", encoding, desc_act: false, loaded: &[] }], &[]);
                let config = json!({"quantization_config": config.unwrap().quantization_config});
                let reader = crate::codec::read_quantization(&config).unwrap().unwrap();
                assert_eq!(reader.declared("a.0.x").unwrap(), Some(declared));
                assert!(reader.quantizes_activations());
                let lookup = |name: &str| name.strip_prefix("a.0.x.").and_then(|part| parts.get(part));
                let foreign = reader.foreign("a.0.x.weight", &lookup).unwrap().unwrap();
                let mut values = vec![0.0; 3 * cols];
                foreign.read(&lookup, 0..3, &mut values).unwrap();
                assert_eq!(values, weight.dequantize(), "{name}");
            }
        }
    }

    #[test]
    fn a_mix_of_formats_says_so() {
        let preset = |name| PRESETS.iter().find(|(known, _)| *known == name).unwrap().1;
        let module = |name, encoding| QuantizedModule { name, encoding, desc_act: false, loaded: &[] };
        let four = Scheme { bits: 4, group: Some(32), symmetric: true }.into();
        let modules = [module("a.0.x", preset("W8A8")), module("a.0.y", preset("FP8_DYNAMIC")), module("a.0.z", four)];
        let config = CompressedTensors.config(&modules, &[]).unwrap().quantization_config;
        assert_eq!(config["format"], "mixed-precision");
        let groups = config["config_groups"].as_object().unwrap();
        let formats: Vec<&Value> = groups.values().map(|group| &group["format"]).collect();
        assert_eq!(formats, ["int-quantized", "float-quantized", "pack-quantized"]);
        let inputs = &groups["group_0"]["input_activations"];
        assert_eq!(
            (&inputs["type"], &inputs["strategy"], &inputs["dynamic"]),
            (&json!("int"), &json!("token"), &json!(true))
        );
        assert_eq!(groups["group_1"]["weights"]["type"], "float");
    }

    #[test]
    fn parts_that_disagree_are_refused() {
        let scheme = Scheme { bits: 4, group: Some(32), symmetric: false };
        let weight = QuantizedWeight {
            rows: 8,
            cols: 64,
            encoding: scheme.into(),
            codes: vec![3; 512],
            scales: vec![0.5; 16],
            zeros: vec![9; 16],
            mins: Vec::new(),
            global: None,
            group_of: None,
        };
        let good = CompressedTensors.encode(&weight, Dtype::F16).unwrap();
        let check = |spoil: &dyn Fn(&mut Parts), message: &str| {
            let mut parts = good.clone();
            spoil(&mut parts);
            let declared = Declared { encoding: scheme.into(), zeros_minus_one: false };
            let error = CompressedTensors.decode(&|name| parts.get(name), &declared).unwrap_err();
            assert_eq!(error.to_string(), message);
        };
        check(&|p| drop(p.0.remove(0)), "its part weight_packed is missing");
        check(&|p| drop(p.0.remove(3)), "its part weight_zero_point, which an asymmetric scheme needs, is missing");
        check(&|p| p.0[1].1.shape = vec![8, 3], "the data of 24 F16 values is 32 bytes, expected 48 bytes");
        check(
            &|p| p.0[2].1.data = [8i64, 4000].iter().flat_map(|v| v.to_le_bytes()).collect(),
            "weight_shape is [8, 4000], expected the rows and columns of weight_packed",
        );
        check(
            &|p| p.0[2].1.data = [8i64, 48].iter().flat_map(|v| v.to_le_bytes()).collect(),
            "the number of words in a row of weight_packed is 8, expected 6 (or, padded, 6)",
        );
    }

    #[test]
    fn config_of_one_scheme_targets_linear_and_always_ignores_the_head() {
        let scheme = Scheme { bits: 4, group: None, symmetric: true };
        let modules = [QuantizedModule {
            name: "model.layers.0.mlp.up_proj",
            encoding: scheme.into(),
            desc_act: false,
            loaded: &[],
        }];
        let files = CompressedTensors.config(&modules, &["model.layers.0.mlp.down_proj".into()]).unwrap();
        let config = files.quantization_config;
        assert_eq!(config["config_groups"]["group_0"]["targets"], json!(["Linear"]));
        assert_eq!(config["config_groups"]["group_0"]["weights"]["strategy"], "channel");
        assert_eq!(config["config_groups"]["group_0"]["format"], "pack-quantized");
        assert_eq!(config["ignore"], json!([r"re:.*\.\d+\.mlp\.down_proj$", "lm_head"]));
        assert_eq!(config["quantization_status"], "compressed");
    }
}
