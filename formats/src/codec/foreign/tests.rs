use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::testing::tensor;
use super::*;
use crate::codec::read_quantization;
use crate::tensor::Tensor;

/// One case of `tests/make_foreign_vectors.py`.
struct Case {
    label: String,
    config: Value,
    tensors: BTreeMap<String, Tensor>,
    name: String,
    values: Tensor,
}

fn cases() -> Vec<Case> {
    let path = format!("{}/tests/vectors/foreign.json", env!("CARGO_MANIFEST_DIR"));
    let list: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    list.iter()
        .map(|case| Case {
            label: case["label"].as_str().unwrap().to_owned(),
            config: case["quantization_config"].clone(),
            tensors: case["tensors"].as_object().unwrap().iter().map(|(name, t)| (name.clone(), tensor(t))).collect(),
            name: case["name"].as_str().unwrap().to_owned(),
            values: tensor(&case["values"]),
        })
        .collect()
}

impl Case {
    fn lookup<'a>(&'a self) -> impl Fn(&str) -> Option<TensorView<'a>> {
        |name| self.tensors.get(name).map(Tensor::view)
    }

    /// What the reader finds, in any of the tensors.
    fn find(&self) -> Result<Option<Foreign>> {
        let reader = read_quantization(&json!({ "quantization_config": self.config }))?.expect("is quantized");
        for name in self.tensors.keys() {
            if let Some(found) = reader.foreign(name, &self.lookup())? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

#[test]
fn values_are_those_the_libraries_read() {
    let cases = cases();
    assert!(cases.len() >= 19);
    for case in cases {
        let found = case.find().unwrap().unwrap_or_else(|| panic!("{}: not found", case.label));
        assert_eq!((&found.name, &found.shape), (&case.name, &case.values.shape), "{}", case.label);
        assert_eq!(found.kind, case.label);
        let expected = case.values.view().to_f32().unwrap();
        let mut values = vec![f32::NAN; expected.len()];
        found.read(&case.lookup(), 0..found.shape[0], &mut values).unwrap();
        // compressed-tensors computes 4-bit floats in bfloat16.
        let rounded = case.config["quant_method"] == "compressed-tensors" && case.label.starts_with("fp4");
        let tolerance = if rounded { 0.004 } else { 3e-7 };
        for (index, (value, expected)) in values.iter().zip(&expected).enumerate() {
            let off = (value - expected).abs();
            assert!(off <= tolerance * expected.abs(), "{}: {value} at {index}, expected {expected}", case.label);
        }
        let slice = values.len() / found.shape[0];
        for row in 0..found.shape[0] {
            let mut alone = vec![f32::NAN; slice];
            found.read(&case.lookup(), row..row + 1, &mut alone).unwrap();
            assert!(alone == values[row * slice..][..slice], "{}: slice {row}", case.label);
        }
        let reader = read_quantization(&json!({ "quantization_config": case.config })).unwrap().unwrap();
        let unclaimed = |name: &&String| !found.parts.contains(name) && !reader.is_for_runtimes(name);
        assert_eq!(case.tensors.keys().find(unclaimed), None, "{}", case.label);
    }
}

/// Every part that is missing, of another shape or of another type is told, and nothing panics.
#[test]
fn parts_that_do_not_fit_are_told() {
    for case in cases() {
        let found = case.find().unwrap().unwrap();
        for part in &found.parts {
            let spoil = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
                let mut spoilt = Case {
                    tensors: case.tensors.clone(),
                    config: case.config.clone(),
                    label: case.label.clone(),
                    name: case.name.clone(),
                    values: case.values.clone(),
                };
                change(&mut spoilt.tensors);
                match spoilt.find() {
                    Err(error) => Some(error.to_string()),
                    Ok(None) => Some("nothing found".into()),
                    Ok(Some(found)) => {
                        let mut out = vec![0.0; found.shape.iter().product()];
                        found.read(&spoilt.lookup(), 0..found.shape[0], &mut out).err().map(|e| e.to_string())
                    }
                }
            };
            let optional = part.ends_with("weight_format") || part.ends_with("zero_point");
            let missing = spoil(&|tensors| drop(tensors.remove(part)));
            assert!(missing.is_some() || optional || part.ends_with("global_scale"), "{}: without {part}", case.label);
            let whole_type = |tensors: &mut BTreeMap<String, Tensor>| {
                let tensor = tensors.get_mut(part).unwrap();
                tensor.dtype = Dtype::I64;
                tensor.data = vec![1; 8 * tensor.shape.iter().product::<usize>()];
            };
            // Codes of four bits may have any type.
            let any_type = part == &found.name && found.kind.contains("bitsandbytes nf4");
            let told = spoil(&whole_type);
            assert!(told.is_some() || any_type, "{}: {part} of another type", case.label);
            let other_shape = |tensors: &mut BTreeMap<String, Tensor>| {
                let tensor = tensors.get_mut(part).unwrap();
                let bytes = tensor.dtype.bitsize() / 8;
                tensor.shape = vec![7, 5];
                tensor.data = vec![0; 35 * bytes];
            };
            let told = spoil(&other_shape);
            let alone = part == &found.name && case.tensors.values().any(|t| t.shape.iter().product::<usize>() == 1);
            assert!(told.is_some() || alone, "{}: {part} of another shape", case.label);
        }
    }
}

/// As DeepSeek V4 has them, whose scales are exponents.
#[test]
fn scales_may_stand_beside_a_weight() {
    let mut case = cases().into_iter().find(|case| case.label == "fp8 in blocks of 16x16").unwrap();
    let mut scale = case.tensors.remove("a.weight_scale_inv").unwrap();
    (scale.data, scale.dtype) = ((0..6).map(|n| 124 + n).collect(), Dtype::F8_E8M0);
    case.tensors.insert("a.scale".to_owned(), scale);
    let found = case.find().unwrap().unwrap();
    assert_eq!((&*found.name, &found.parts[..]), ("a.weight", &["a.weight".to_owned(), "a.scale".to_owned()][..]));
    let mut values = vec![0.0; 32 * 48];
    found.read(&case.lookup(), 0..32, &mut values).unwrap();
    let codes = &case.tensors["a.weight"].data;
    for (at, value) in values.iter().enumerate() {
        let block = at / 48 / 16 * 3 + at % 48 / 16;
        assert_eq!(*value, e4m3(codes[at]) * 2f32.powi(block as i32 - 3), "{at}");
    }
}

#[test]
fn every_float_of_a_byte_is_right() {
    // Worked out from the definitions: sign, exponent, mantissa.
    for code in 0..=255u8 {
        let sign = if code & 0x80 != 0 { -1.0f64 } else { 1.0 };
        let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let expected = sign * if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) };
        match code & 0x7f {
            0x7f => assert!(e4m3(code).is_nan()),
            _ => assert_eq!(f64::from(e4m3(code)), expected, "{code:#x}"),
        }
        let (e, m) = (i32::from(code >> 2 & 31), f64::from(code & 3));
        let expected = sign * if e == 0 { m / 4.0 * 2f64.powi(-14) } else { (1.0 + m / 4.0) * 2f64.powi(e - 15) };
        if e < 31 {
            assert_eq!(f64::from(e5m2(code)), expected, "{code:#x}");
        } else {
            assert!(!e5m2(code).is_finite());
        }
        let expected = 2f64.powi(i32::from(code) - 127);
        assert_eq!(f64::from(power(code)), if code == 255 { f64::INFINITY } else { expected });
    }
}

#[test]
fn messages_name_part_and_shape() {
    let told = |label: &str, change: &dyn Fn(&mut Case)| {
        let mut case = cases().into_iter().find(|case| case.label == label).unwrap();
        change(&mut case);
        case.find().unwrap_err().to_string()
    };
    assert_eq!(
        told("fp8 in blocks of 16x16", &|c| drop(c.tensors.remove("a.weight_scale_inv"))),
        "tensor `a.weight`: its scale, a.weight_scale_inv or a.weight_scale, is missing"
    );
    assert_eq!(
        told("fp8 in blocks of 16x16", &|c| c.tensors.get_mut("a.weight_scale_inv").unwrap().shape = vec![6, 1]),
        "tensor `a.weight`: the shape of a.weight_scale_inv is [6, 1], expected one that divides [32, 48] into blocks"
    );
    let joined = told("fp8 in blocks of 16x16", &|c| c.tensors.get_mut("a.weight_scale_inv").unwrap().shape = vec![3]);
    assert!(joined.contains("is [3]; scales of several matrices that were joined"), "{joined}");
    assert_eq!(
        told("bitsandbytes nf4", &|c| c.tensors.retain(|name, _| !name.contains("quant_state"))),
        "tensor `a.weight`: its part a.weight.quant_state.bitsandbytes__nf4 (or fp4) is missing"
    );
    assert_eq!(
        told("mxfp4", &|c| drop(c.tensors.remove("mlp.experts.gate_up_proj_scales"))),
        "tensor `mlp.experts.gate_up_proj_blocks`: its part mlp.experts.gate_up_proj_scales is missing"
    );
}
