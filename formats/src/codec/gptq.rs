//! GPTQ: codes packed along the inputs, zeros along the outputs; version 1 on disk, version 2 read too.
//!
//! ```text
//! qweight  I32 [cols·b/32, rows]    column o is the bit stream of output o's codes
//! qzeros   I32 [groups, rows·b/32]  each row a bit stream of zeros, in version 1 minus one (mod 2^b, field by field)
//! scales   F16 [groups, rows]
//! g_idx    I32 [cols]               the group of each input
//! ```

use serde_json::{Value, json};

use super::names;
use super::{Codec, ConfigFiles, Declared, PartLookup, Parts, QuantizedModule};
use super::{check_group, check_weight, exact_scales, expect_scales, expect_shape, group_map, part, words_shape};
use crate::bits::packed_words;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::grid::Scheme;
use crate::tensor::Dtype;
use crate::weight::PackedWeight;
use crate::words::{WordLayout, from_words, to_words, transpose};

/// The GPTQ layout of AutoGPTQ and GPTQModel.
#[derive(Clone, Copy, Debug)]
pub struct Gptq;

impl Codec for Gptq {
    fn id(&self) -> &'static str {
        "gptq"
    }

    fn supports(&self, rows: usize, cols: usize, encoding: &Encoding, _desc_act: bool) -> Result<(), String> {
        let Some(scheme) = encoding.weight_scheme() else {
            return Err("GPTQ stores integers of weights alone; write compressed-tensors".into());
        };
        if !matches!(scheme.bits, 2 | 3 | 4 | 8) {
            return Err(format!("GPTQ stores 2, 3, 4 or 8 bits, not {}", scheme.bits));
        }
        for (what, extent) in [("rows", rows), ("columns", cols)] {
            if !extent.is_multiple_of(32) {
                return Err(format!(
                    "GPTQ stores multiples of 32 {what} only, not {extent}; leave the linear out or write compressed-tensors"
                ));
            }
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
        let scheme = integers(encoding);
        let groups = scheme.groups(cols);
        vec![
            ("qweight", Dtype::I32, vec![packed_words(cols, scheme.bits), rows]),
            ("qzeros", Dtype::I32, vec![groups, packed_words(rows, scheme.bits)]),
            ("scales", scale_dtype, vec![groups, rows]),
            ("g_idx", Dtype::I32, vec![cols]),
        ]
    }

    /// Version 1 subtracts one, and readers differ on what becomes of 0.
    fn min_zero(&self) -> u8 {
        1
    }

    fn scale_dtype(&self, _model: Dtype) -> Dtype {
        Dtype::F16
    }

    fn word_layout(&self) -> WordLayout {
        WordLayout::RowsTransposed
    }

    fn encode_packed(&self, weight: PackedWeight, scale_dtype: Dtype) -> Result<Parts> {
        check_weight(&weight, self.word_layout())?;
        let PackedWeight { rows, cols, encoding, .. } = weight;
        self.supports(rows, cols, &encoding, weight.group_of.is_some()).map_err(Error::invalid)?;
        let groups = weight.groups();
        if weight.zeros.contains(&0) {
            return Err(Error::invalid("GPTQ version 1 cannot store a zero of 0; zeros must be at least 1"));
        }

        let zeros = WordLayout::ColumnsLessOne.pack(&weight.zeros, [rows, groups], encoding.levels.bits())?;
        let width = encoding.group_width(cols);
        let map = weight.group_of.unwrap_or_else(|| (0..cols).map(|col| (col / width) as u32).collect());
        let data = [
            from_words(&weight.words),
            from_words(&zeros),
            exact_scales(scale_dtype, &transpose(&weight.scales, rows, groups))?,
            from_words(&map),
        ];
        Ok(Parts::of(self.layout(rows, cols, &encoding, scale_dtype), data))
    }

    fn shape(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<[usize; 2]> {
        let bits = usize::from(declared.encoding.levels.bits());
        let [words, rows] = words_shape(&part(parts, "qweight")?, "qweight")?;
        if !(words * 32).is_multiple_of(bits) {
            return Err(Error::mismatch(format!("the height of qweight at {bits} bits"), "whole codes", words));
        }
        Ok([rows, words * 32 / bits])
    }

    fn decode_packed(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<PackedWeight> {
        let mut scheme = integers(&declared.encoding);
        let bits = scheme.bits;
        let [rows, cols] = self.shape(parts, declared)?;
        let words = to_words(part(parts, "qweight")?.data);
        let groups = scheme.groups(cols);
        let scale = part(parts, "scales")?;
        expect_scales(&scale, "scales", &[groups, rows], &declared.encoding)?;
        let scales = transpose(&scale.to_f32()?, groups, rows);

        let qzeros = part(parts, "qzeros")?;
        words_shape(&qzeros, "qzeros")?;
        expect_shape(&qzeros, "qzeros", &[groups, packed_words(rows, bits)])?;
        let qzeros = to_words(qzeros.data);
        let zeros = match declared.zeros_minus_one {
            true => WordLayout::ColumnsLessOne.unpack(&qzeros, [rows, groups], bits)?,
            false => transpose(&WordLayout::Rows.unpack(&qzeros, [groups, rows], bits)?, groups, rows),
        };
        // Kernels for symmetric checkpoints ignore the zeros, the others use them; believe what is stored.
        scheme.symmetric &= zeros.iter().all(|&zero| zero == scheme.midpoint());

        let group_of = match parts("g_idx") {
            Some(map) => {
                map.expect("g_idx", Dtype::I32, &[cols])?;
                group_map(to_words(map.data), &declared.encoding, groups)?
            }
            None => None,
        };
        let weight = PackedWeight::of_words([rows, cols], scheme.into(), words, scales, zeros);
        Ok(PackedWeight { group_of, ..weight })
    }

    fn part_names(&self) -> &'static [&'static str] {
        &["qweight", "qzeros", "scales", "g_idx"]
    }

    fn config(&self, modules: &[QuantizedModule<'_>], unquantized_linears: &[String]) -> Result<ConfigFiles> {
        let selections = names::by_encoding(modules, unquantized_linears);
        let Some(base) = selections.first() else {
            return Err(Error::invalid("a GPTQ checkpoint needs at least one quantized linear"));
        };
        let mut notes = Vec::new();

        // The sets of linears are disjoint.
        let mut dynamic = names::left_out(modules, unquantized_linears);
        for other in &selections[1..] {
            for pattern in other.names.patterns() {
                let settings = json!({
                    "bits": other.scheme().bits, "group_size": group_size(&other.scheme()),
                    "sym": other.scheme().symmetric, "desc_act": other.desc_act,
                });
                dynamic.insert(format!("+:{pattern}"), settings);
            }
        }
        if selections.len() > 1 {
            notes.push(
                "the linears have several schemes, which GPTQ states under `dynamic`: GPTQModel and vLLM read it, \
                 transformers with optimum ignores it and would load wrong weights"
                    .into(),
            );
        }
        // transformers with optimum replaces every linear of a block unless told which, block after block alike, by the names in memory.
        let mut in_block: Vec<&str> = Vec::new();
        for tail in modules.iter().flat_map(QuantizedModule::names).filter_map(names::tail) {
            if !in_block.contains(&tail) {
                in_block.push(tail);
            }
        }
        let left = || {
            let linears =
                unquantized_linears.iter().filter(|name| !names::is_component(name) && !name.ends_with("lm_head"));
            linears.filter_map(|name| names::tail(name))
        };
        if left().any(|tail| in_block.contains(&tail)) {
            notes.push(
                "some linears are quantized in one decoder block and not in another, which GPTQ states under `dynamic`: \
                 GPTQModel and vLLM read it, transformers with optimum ignores it and would load wrong weights"
                    .into(),
            );
        }
        if selections.iter().any(|s| !matches!(s.scheme().bits, 4 | 8) || !s.scheme().symmetric) {
            notes.push("vLLM and SGLang load GPTQ only when symmetric with 4 or 8 bits; transformers and GPTQModel load the rest".into());
        }
        if selections.iter().any(|s| s.desc_act && s.scheme().group.is_some()) {
            notes.push("vLLM and SGLang refuse desc_act with groups; transformers and GPTQModel load it".into());
        }

        let lm_head = modules.iter().any(|module| module.name == "lm_head");
        let mut config = json!({
            "quant_method": "gptq",
            "bits": base.scheme().bits,
            "group_size": group_size(&base.scheme()),
            "desc_act": base.desc_act,
            "sym": base.scheme().symmetric,
            "lm_head": lm_head,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "true_sequential": true,
            "static_groups": !base.desc_act,
            "meta": {"quantizer": [concat!("quantc:", env!("CARGO_PKG_VERSION"))]},
        });
        if !dynamic.is_empty() {
            config["dynamic"] = Value::Object(dynamic);
        }
        // vLLM looks for all members of what it fuses, and layers may lack one, whose name it does not find in the file.
        let lacks = |module: &QuantizedModule<'_>| {
            let keys = module.name.strip_suffix("q_proj").map(|parent| format!("{parent}v_proj"));
            keys.is_some_and(|name| {
                modules.iter().all(|other| other.name != name) && in_block.contains(&"self_attn.v_proj")
            })
        };
        if left().next().is_some() || modules.iter().any(lacks) {
            config["modules_in_block_to_quantize"] = json!([in_block]);
        }
        let text = serde_json::to_vec_pretty(&config).expect("a JSON value");
        Ok(ConfigFiles { quantization_config: config, files: vec![("quantize_config.json".into(), text)], notes })
    }
}

/// The integers of a weight that [`Codec::supports`] accepts.
pub(super) fn integers(encoding: &Encoding) -> Scheme {
    encoding.scheme().expect("integers in groups")
}

/// The group in a file's terms, where −1 is one scale per row.
pub(super) fn group_size(scheme: &Scheme) -> i64 {
    scheme.group.map_or(-1, |group| group as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::testing::{Vector, any_weight, check_round_trip};
    use crate::tensor::Tensor;
    use crate::weight::QuantizedWeight;
    use proptest::prelude::*;

    /// Encodes GPTQModel's codes and compares with its bytes, then decodes those in both versions.
    fn check(vector: &str) {
        let v = Vector::load(vector);
        let scheme = Scheme {
            bits: v.usize("bits") as u8,
            group: Some(v.usize("group_size")),
            symmetric: v.value("sym").as_bool().unwrap(),
        };
        let [rows, cols]: [usize; 2] = v.shape("codes_out_in").try_into().unwrap();
        let groups = scheme.groups(cols);
        let map: Vec<u32> = v.ints("g_idx").iter().map(|g| *g as u32).collect();
        let zeros: Vec<u8> = v.ints("zeros_groups_out").iter().map(|z| *z as u8).collect();
        let weight = QuantizedWeight {
            rows,
            cols,
            encoding: scheme.into(),
            codes: v.ints("codes_out_in").iter().map(|c| *c as u8).collect(),
            scales: transpose(&v.floats("scales"), groups, rows),
            zeros: transpose(&zeros, groups, rows),
            mins: Vec::new(),
            global: None,
            group_of: v.value("desc_act").as_bool().unwrap().then(|| map.clone()),
        };
        let parts = Gptq.encode(&weight, Dtype::F16).unwrap();
        for (name, found) in &parts.0 {
            let expected = match *name {
                "qzeros" => v.tensor("qzeros_v1"),
                "g_idx" => Tensor { dtype: Dtype::I32, shape: vec![cols], data: from_words(&map) },
                name => v.tensor(name),
            };
            assert!(*found == expected, "{vector} {name}");
        }
        let v2 = v.tensor("qzeros_v2");
        let read_v1 =
            Gptq.decode(&|name| parts.get(name), &Declared { encoding: scheme.into(), zeros_minus_one: true }).unwrap();
        let read_v2 = Gptq
            .decode(
                &|name| if name == "qzeros" { Some(v2.view()) } else { parts.get(name) },
                &Declared { encoding: scheme.into(), zeros_minus_one: false },
            )
            .unwrap();
        assert_eq!(read_v1, weight, "{vector}");
        assert_eq!(read_v2, weight, "{vector}");
        let mut row = vec![0.0; cols];
        read_v1.dequantize_row(0, &mut row);
        for (ours, theirs) in row.iter().zip(v.floats("dequant_out_in_first_row")) {
            assert_eq!(*ours, theirs, "{vector}");
        }
    }

    #[test]
    fn equals_gptqmodel_byte_for_byte() {
        check("gptq_w2_asym");
        check("gptq_w3_asym");
        check("gptq_w4_asym");
        check("gptq_w4_asym_actorder");
        check("gptq_w4_sym");
        check("gptq_w8_sym");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn round_trip(mut weight in any_weight(
            prop::sample::select(vec![2u8, 3, 4, 8]), (1usize..4).prop_map(|n| 32 * n), (1usize..5).prop_map(|n| 32 * n), 1,
        ), shuffle in any::<bool>()) {
            let groups = weight.groups() as u32;
            if shuffle && groups > 1 {
                weight.group_of = Some((0..weight.cols as u32).map(|col| col % groups).collect());
            }
            check_round_trip(&Gptq, &weight);
        }
    }

    #[test]
    fn zero_of_zero_odd_sizes_and_wild_groups_are_refused() {
        let scheme = Scheme { bits: 4, group: Some(32), symmetric: false };
        let mut weight = QuantizedWeight {
            rows: 32,
            cols: 64,
            encoding: scheme.into(),
            codes: vec![3; 2048],
            scales: vec![0.5; 64],
            zeros: vec![9; 64],
            mins: Vec::new(),
            global: None,
            group_of: None,
        };
        let parts = Gptq.encode(&weight, Dtype::F16).unwrap();
        weight.zeros[5] = 0;
        let message = Gptq.encode(&weight, Dtype::F16).unwrap_err().to_string();
        assert_eq!(message, "GPTQ version 1 cannot store a zero of 0; zeros must be at least 1");
        assert_eq!(
            Gptq.supports(48, 64, &scheme.into(), false).unwrap_err(),
            "GPTQ stores multiples of 32 rows only, not 48; leave the linear out or write compressed-tensors"
        );
        let mut spoiled = parts.clone();
        spoiled.0[3].1.data[..4].copy_from_slice(&7u32.to_le_bytes());
        let declared = Declared { encoding: scheme.into(), zeros_minus_one: true };
        let message = Gptq.decode(&|name| spoiled.get(name), &declared).unwrap_err().to_string();
        assert_eq!(message, "g_idx puts a column in group 7, but there are 2");
        // Without g_idx the groups are runs of columns.
        let plain = Gptq.decode(&|name| if name == "g_idx" { None } else { parts.get(name) }, &declared).unwrap();
        assert_eq!(plain.group_of, None);
    }

    #[test]
    fn config_states_what_is_mixed_and_who_cannot_read_it() {
        let four = Scheme { bits: 4, group: Some(64), symmetric: true };
        let eight = Scheme { bits: 8, ..four };
        let module =
            |name, scheme: Scheme| QuantizedModule { name, encoding: scheme.into(), desc_act: false, loaded: &[] };
        let modules = [
            module("model.layers.0.mlp.up_proj", four),
            module("model.layers.0.mlp.down_proj", eight),
            module("model.layers.1.mlp.up_proj", four),
            module("model.layers.1.mlp.down_proj", eight),
            module("model.layers.1.mlp.gate_proj", four),
        ];
        let simple = Gptq.config(&modules[..1], &["lm_head".into()]).unwrap();
        assert_eq!(simple.notes, Vec::<String>::new());
        assert_eq!(simple.quantization_config.get("dynamic"), None);
        assert_eq!(simple.quantization_config.get("modules_in_block_to_quantize"), None);
        assert_eq!(simple.files[0].0, "quantize_config.json");

        let files = Gptq.config(&modules, &["model.layers.0.mlp.gate_proj".into(), "lm_head".into()]).unwrap();
        let config = files.quantization_config;
        assert_eq!(config["bits"], 4);
        assert_eq!(config["dynamic"][r"+:.*\.\d+\.mlp\.down_proj$"]["bits"], 8);
        assert_eq!(config["dynamic"][r"-:^model\.layers\.0\.mlp\.gate_proj$"], json!({}));
        assert_eq!(config["modules_in_block_to_quantize"], json!([["mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"]]));
        assert_eq!(files.notes.len(), 2, "{:?}", files.notes);

        // The second layer takes its values from its keys.
        let names =
            ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj"].map(|at| format!("model.layers.{at}"));
        let modules: Vec<QuantizedModule<'_>> = names.iter().map(|name| module(name, four)).collect();
        let told = |modules: &[QuantizedModule<'_>]| {
            Gptq.config(modules, &[]).unwrap().quantization_config["modules_in_block_to_quantize"].clone()
        };
        assert_eq!(told(&modules), json!([["self_attn.q_proj", "self_attn.v_proj"]]));
        assert_eq!(told(&modules[..2]), Value::Null);
    }
}
