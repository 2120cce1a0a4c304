//! AWQ, version `gemm`: 4-bit codes packed along the outputs, eight to a word in the order 0 2 4 6 1 3 5 7.
//!
//! ```text
//! qweight  I32 [cols, rows/8]    nibble k of word c is output 8c + AWQ_ORDER[k]
//! qzeros   I32 [groups, rows/8]  in the same order, as they are
//! scales   F16 [groups, rows]
//! ```

use serde_json::{Value, json};

use super::names;
use super::{Codec, ConfigFiles, Declared, PartLookup, Parts, QuantizedModule};
use super::{check_group, check_weight, exact_scales, expect_scales, expect_shape, part, words_shape};
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::grid::Scheme;
use crate::tensor::Dtype;
use crate::weight::PackedWeight;
use crate::words::{WordLayout, from_words, to_words, transpose};

/// The AWQ layout of AutoAWQ, version `gemm`.
#[derive(Clone, Copy, Debug)]
pub struct Awq;

impl Codec for Awq {
    fn id(&self) -> &'static str {
        "awq"
    }

    fn usual(&self) -> Scheme {
        Scheme { bits: 4, group: Some(128), symmetric: false }
    }

    fn supports(&self, rows: usize, cols: usize, encoding: &Encoding, desc_act: bool) -> Result<(), String> {
        let Some(scheme) = encoding.weight_scheme() else {
            return Err("AWQ stores integers of weights alone; write compressed-tensors".into());
        };
        if scheme.bits != 4 {
            return Err(format!("AWQ stores 4 bits only, not {}; write compressed-tensors or GPTQ", scheme.bits));
        }
        if desc_act {
            return Err("AWQ cannot store reordered groups (desc_act); write GPTQ, or leave it out".into());
        }
        if !rows.is_multiple_of(8) {
            return Err(format!(
                "AWQ stores multiples of 8 rows only, not {rows}; leave the linear out or write compressed-tensors"
            ));
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
        let groups = encoding.groups(cols);
        vec![
            ("qweight", Dtype::I32, vec![cols, rows / 8]),
            ("qzeros", Dtype::I32, vec![groups, rows / 8]),
            ("scales", scale_dtype, vec![groups, rows]),
        ]
    }

    fn min_zero(&self) -> u8 {
        0
    }

    fn scale_dtype(&self, _model: Dtype) -> Dtype {
        Dtype::F16
    }

    fn word_layout(&self) -> WordLayout {
        WordLayout::Awq
    }

    fn encode_packed(&self, weight: PackedWeight, scale_dtype: Dtype) -> Result<Parts> {
        check_weight(&weight, self.word_layout())?;
        let PackedWeight { rows, cols, encoding, .. } = weight;
        self.supports(rows, cols, &encoding, weight.group_of.is_some()).map_err(Error::invalid)?;
        let groups = weight.groups();
        let data = [
            from_words(&weight.words),
            from_words(&self.word_layout().pack(&weight.zeros, [rows, groups], encoding.levels.bits())?),
            exact_scales(scale_dtype, &transpose(&weight.scales, rows, groups))?,
        ];
        Ok(Parts::of(self.layout(rows, cols, &encoding, scale_dtype), data))
    }

    fn shape(&self, parts: &PartLookup<'_, '_>, _declared: &Declared) -> Result<[usize; 2]> {
        let [cols, words] = words_shape(&part(parts, "qweight")?, "qweight")?;
        Ok([words * 8, cols])
    }

    fn decode_packed(&self, parts: &PartLookup<'_, '_>, declared: &Declared) -> Result<PackedWeight> {
        let scheme = super::gptq::integers(&declared.encoding);
        let [rows, cols] = self.shape(parts, declared)?;
        let words = to_words(part(parts, "qweight")?.data);
        let groups = scheme.groups(cols);
        let scale = part(parts, "scales")?;
        expect_scales(&scale, "scales", &[groups, rows], &declared.encoding)?;
        let scales = transpose(&scale.to_f32()?, groups, rows);
        let zeros = match parts("qzeros") {
            Some(zeros) => {
                words_shape(&zeros, "qzeros")?;
                expect_shape(&zeros, "qzeros", &[groups, rows / 8])?;
                self.word_layout().unpack(&to_words(zeros.data), [rows, groups], scheme.bits)?
            }
            None if scheme.symmetric => vec![scheme.midpoint(); rows * groups],
            None => return Err(Error::missing("its part qzeros")),
        };
        let symmetric = scheme.symmetric && zeros.iter().all(|&zero| zero == scheme.midpoint());
        let scheme = Scheme { symmetric, ..scheme };
        Ok(PackedWeight::of_words([rows, cols], scheme.into(), words, scales, zeros))
    }

    fn part_names(&self) -> &'static [&'static str] {
        &["qweight", "qzeros", "scales"]
    }

    /// `zero_point` is always true and zeros are always stored, symmetric (all 8) or not: every reader takes that.
    fn config(&self, modules: &[QuantizedModule<'_>], unquantized_linears: &[String]) -> Result<ConfigFiles> {
        let Some(first) = modules.first() else {
            return Err(Error::invalid("an AWQ checkpoint needs at least one quantized linear"));
        };
        let scheme_of = |m: &QuantizedModule<'_>| super::gptq::integers(&m.encoding);
        let key = |m: &QuantizedModule<'_>| (m.encoding.levels.bits(), m.encoding.block);
        if let Some(other) = modules.iter().find(|module| key(module) != key(first)) {
            return Err(Error::unsupported(format!(
                "AWQ stores one scheme for the whole model, but {} has {} with group {} and {} has {} with group {}; \
                 write compressed-tensors, or give every linear the same scheme",
                first.name,
                scheme_of(first).name(),
                super::gptq::group_size(&scheme_of(first)),
                other.name,
                scheme_of(other).name(),
                super::gptq::group_size(&scheme_of(other))
            )));
        }
        let lm_head = modules.iter().any(|module| module.name == "lm_head");
        let wrapped = unquantized_linears.iter().any(|name| names::is_component(name));
        let mut skip: Vec<String> = Vec::new();
        for name in unquantized_linears {
            if names::is_component(name) {
                // transformers looks at how names start, vLLM at what is in them.
                let core = names::core(name).trim_end_matches('.');
                skip.extend([core.to_owned(), format!("model.{core}")]);
            } else {
                // vLLM may keep what stands beside the blocks in a part of its own; a name that others have in them is left as it is.
                let alone = |own: &&str| modules.iter().all(|module| !module.name.contains(own));
                let usual = || if wrapped { names::core(name) } else { name };
                // It may count layers for further tokens as it does the model's own.
                let counted = name.find(".mtp.layers.").map(|at| &name[at + ".mtp.".len()..]).filter(alone);
                skip.extend(counted.map(str::to_owned));
                skip.push(names::beside(name).filter(alone).unwrap_or_else(usual).to_owned());
            }
        }
        if skip.iter().all(|name| name == "lm_head") {
            skip.clear();
        } else if !lm_head && skip.iter().all(|name| name != "lm_head") {
            skip.push("lm_head".into());
        }
        let mut quantization_config = json!({
            "quant_method": "awq",
            "bits": first.encoding.levels.bits(),
            "group_size": super::gptq::group_size(&scheme_of(first)),
            "zero_point": true,
            "version": "gemm",
            "lm_head": lm_head,
            "modules_to_not_convert": if skip.is_empty() { None } else { Some(skip) },
        });
        // GPTQModel reads no other list of what is left out.
        let dynamic = names::left_out(modules, unquantized_linears);
        if !dynamic.is_empty() {
            quantization_config["dynamic"] = Value::Object(dynamic);
        }
        Ok(ConfigFiles { quantization_config, files: Vec::new(), notes: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::testing::{Vector, any_weight, check_round_trip};
    use crate::weight::QuantizedWeight;
    use proptest::prelude::*;

    #[test]
    fn equals_autoawq_byte_for_byte() {
        let v = Vector::load("awq_gemm_w4");
        let scheme = Scheme { bits: 4, group: Some(v.usize("group_size")), symmetric: false };
        let [rows, cols]: [usize; 2] = v.shape("codes_out_in").try_into().unwrap();
        let groups = scheme.groups(cols);
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
            group_of: None,
        };
        let parts = Awq.encode(&weight, Dtype::F16).unwrap();
        for (name, found) in &parts.0 {
            assert!(*found == v.tensor(name), "{name}");
        }
        let back =
            Awq.decode(&|name| parts.get(name), &Declared { encoding: scheme.into(), zeros_minus_one: false }).unwrap();
        assert_eq!(back, weight);
        let mut row = vec![0.0; cols];
        back.dequantize_row(0, &mut row);
        for (ours, theirs) in row.iter().zip(v.floats("dequant_out_in_first_row")) {
            assert_eq!(*ours, theirs);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn round_trip(weight in any_weight(Just(4u8), (1usize..9).prop_map(|n| 8 * n), 1usize..140, 0)) {
            check_round_trip(&Awq, &weight);
        }
    }

    #[test]
    fn one_scheme_only() {
        let scheme = Scheme { bits: 4, group: Some(64), symmetric: false };
        let module =
            |name, scheme: Scheme| QuantizedModule { name, encoding: scheme.into(), desc_act: false, loaded: &[] };
        let same = [module("a.0.x", scheme), module("a.1.x", scheme)];
        let config = |others: &[&str]| {
            let others: Vec<String> = others.iter().map(|s| s.to_string()).collect();
            let config = Awq.config(&same, &others).unwrap().quantization_config;
            [config["modules_to_not_convert"].clone(), config["dynamic"].clone()]
        };
        assert_eq!(config(&["lm_head"]), [json!(null), json!(null)]);
        assert_eq!(config(&["a.0.y"]), [json!(["a.0.y", "lm_head"]), json!({r"-:.*\.\d+\.y$": {}})]);
        // What stands beside the blocks is looked for in any name, unless others have its own in them.
        assert_eq!(config(&["model.up.0"])[0], json!(["up.0", "lm_head"]));
        assert_eq!(config(&["model.x"])[0], json!(["model.x", "lm_head"]));
        let further = "model.mtp.layers.0.eh_proj";
        assert_eq!(config(&[further])[0], json!(["layers.0.eh_proj", further, "lm_head"]));
        let mixed = [module("a.0.x", scheme), module("a.1.x", Scheme { group: Some(32), ..scheme })];
        let message = Awq.config(&mixed, &[]).unwrap_err().to_string();
        assert!(message.starts_with("AWQ stores one scheme for the whole model, but a.0.x has"), "{message}");
    }
}
