use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::codec::foreign::testing::tensor;
use crate::codec::read_quantization;
use crate::codec::testing::check_round_trip;
use crate::encoding::Levels;
use crate::tensor::Tensor;
use crate::weight::QuantizedWeight;

const DECLARED: fn(u8, usize) -> Declared =
    |bits, group| Declared { encoding: Encoding::mlx(bits, group, Float::F32), zeros_minus_one: false };

/// One case of `tests/make_mlx_vectors.py`.
struct Case {
    bits: u8,
    group: usize,
    parts: BTreeMap<String, Tensor>,
    values: Vec<f32>,
}

fn cases() -> Vec<Case> {
    let path = format!("{}/tests/vectors/mlx.json", env!("CARGO_MANIFEST_DIR"));
    let list: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let case = |case: &Value| Case {
        bits: case["bits"].as_u64().unwrap() as u8,
        group: case["group"].as_u64().unwrap() as usize,
        parts: case["parts"].as_object().unwrap().iter().map(|(name, part)| (name.clone(), tensor(part))).collect(),
        values: tensor(&case["values"]).view().to_f32().unwrap(),
    };
    list.iter().map(case).collect()
}

#[test]
fn equals_mlx_byte_for_byte() {
    let cases = cases();
    for case in &cases {
        let declared = DECLARED(case.bits, case.group);
        let lookup = |name: &str| case.parts.get(name).map(Tensor::view);
        let weight = Mlx.decode(&lookup, &declared).unwrap();
        assert!(weight.dequantize() == case.values, "{} bits in groups of {}", case.bits, case.group);
        let mut rows = vec![0.0; 4 * weight.cols];
        Mlx.dequantize_rows(&lookup, &declared, &[2, 0, 1, 1], &mut rows).unwrap();
        let row = |row: usize| &case.values[row * weight.cols..][..weight.cols];
        assert!(rows == [row(2), row(0), row(1), row(1)].concat(), "{} bits: rows", case.bits);
        let parts = Mlx.encode(&weight, case.parts["scales"].dtype).unwrap();
        for (name, part) in &parts.0 {
            assert!(*part == case.parts[*name], "{} bits in groups of {}: {name}", case.bits, case.group);
        }
    }
    for (bits, group) in [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128)] {
        assert!(cases.iter().any(|case| (case.bits, case.group) == (bits, group)), "{bits} {group}");
    }
}

fn any_weight() -> impl Strategy<Value = QuantizedWeight> {
    let shape = (prop::sample::select(vec![4u8, 8]), prop::sample::select(GROUPS.to_vec()), 1usize..6, 1usize..4);
    (shape, any::<u64>()).prop_map(|((bits, group, rows, groups), seed)| {
        let mut state = seed | 1;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u32
        };
        let mut halves = |count: usize| -> Vec<f32> {
            let half = |bits: u32| half::f16::from_bits((bits & 0xbfff) as u16).to_f32() + 0.0;
            (0..count).map(|_| half(next())).collect()
        };
        let (scales, mins) = (halves(rows * groups), halves(rows * groups));
        let encoding = Encoding::mlx(bits, group, Float::F16);
        let codes = (0..rows * groups * group).map(|_| (next() & u32::from(encoding.max_code())) as u8).collect();
        let (cols, zeros) = (groups * group, vec![0; rows * groups]);
        QuantizedWeight { rows, cols, encoding, codes, scales, zeros, mins, global: None, group_of: None }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn round_trip(weight in any_weight()) {
        check_round_trip(&Mlx, &weight);
    }
}

#[test]
fn some_rows_alone_are_those_rows_of_all() {
    let case = &cases()[0];
    let declared = DECLARED(case.bits, case.group);
    let all = Mlx.decode(&|name| case.parts.get(name).map(Tensor::view), &declared).unwrap();
    let groups = all.groups();
    let last = QuantizedWeight {
        rows: 1,
        codes: all.codes[2 * all.cols..].to_vec(),
        scales: all.scales[2 * groups..].to_vec(),
        zeros: vec![0; groups],
        mins: all.mins[2 * groups..].to_vec(),
        ..all.clone()
    };
    for (name, part) in &Mlx.encode(&last, Dtype::BF16).unwrap().0 {
        assert!(case.parts[*name].data.ends_with(&part.data), "{name}");
        assert_eq!(part.data.len() * 3, case.parts[*name].data.len(), "{name}");
    }
}

#[test]
fn schemes_are_groups_with_a_bias() {
    for symmetric in [false, true] {
        let encoding = Mlx.encoding(Scheme { bits: 8, group: Some(32), symmetric }).unwrap();
        assert_eq!((encoding.levels, encoding.group()), (Levels::unsigned(8), 32));
        assert_eq!(Mlx.scheme(&encoding), Some(Scheme { bits: 8, group: Some(32), symmetric: false }));
        assert_eq!(Mlx.scheme(&encoding.stored_in(Float::BF16, 0)), Mlx.scheme(&encoding));
    }
    assert_eq!(Mlx.scheme(&Mlx.usual().into()), None);
    for (bits, group, why) in [
        (3, Some(64), "4 or 8 bits, not 3"),
        (4, Some(256), "groups of 32, 64 or 128, not 256"),
        (4, None, "no scale for a whole row"),
    ] {
        let told = Mlx.encoding(Scheme { bits, group, symmetric: false }).unwrap_err();
        assert!(told.contains(why), "{told}");
    }
    let four = Encoding::mlx(4, 128, Float::F16);
    assert_eq!(Mlx.supports(5, 256, &four, false), Ok(()));
    let told = Mlx.supports(5, 192, &four, false).unwrap_err();
    assert_eq!(told, "a row of 192 values does not split into groups of 128; group size 64 or 32 would fit");
    assert!(Mlx.supports(5, 100, &four, false).unwrap_err().ends_with("leave it out with --ignore"));
    assert!(Mlx.supports(5, 128, &Scheme::preset("W4A16").unwrap().into(), false).is_err());
    assert!(Mlx.supports(5, 128, &four, true).unwrap_err().contains("desc_act"));
}

#[test]
fn what_the_file_cannot_hold_is_told() {
    let case = &cases()[0];
    let mut weight =
        Mlx.decode(&|name| case.parts.get(name).map(Tensor::view), &DECLARED(case.bits, case.group)).unwrap();
    weight.mins[1] = 0.1;
    let told = Mlx.encode(&weight, Dtype::BF16).unwrap_err().to_string();
    assert!(told.starts_with("bias -0.1 at index 1 is not a BF16 number"), "{told}");
    weight.mins.pop();
    assert_eq!(Mlx.encode(&weight, Dtype::BF16).unwrap_err().to_string(), "the number of mins is 11, expected 12");
}

#[test]
fn parts_that_do_not_fit_are_told() {
    let told = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let Case { mut parts, bits, group, .. } = cases().swap_remove(1);
        change(&mut parts);
        let lookup = |name: &str| parts.get(name).map(Tensor::view);
        let mut out = [0.0; 128];
        let rows = Mlx.dequantize_rows(&lookup, &DECLARED(bits, group), &[0], &mut out).unwrap_err().to_string();
        let all = Mlx.decode(&lookup, &DECLARED(bits, group)).unwrap_err().to_string();
        assert_eq!(rows, all);
        all
    };
    assert_eq!(told(&|parts| drop(parts.remove("biases"))), "its part biases is missing");
    assert_eq!(
        told(&|parts| parts.get_mut("scales").unwrap().shape = vec![3, 1]),
        "scales is F16 [3, 1], expected floats [3, 128 / 64] beside a weight of 4 bits".replace("F16", "BF16")
    );
    assert_eq!(
        told(&|parts| parts.get_mut("weight").unwrap().dtype = Dtype::I64),
        "the type of weight is I64, expected U32"
    );
    assert!(told(&|parts| parts.get_mut("biases").unwrap().dtype = Dtype::U8).starts_with("biases is U8 [3, 2]"));
    let stacked = told(&|parts| parts.get_mut("weight").unwrap().shape = vec![3, 1, 16]);
    assert!(stacked.contains("only matrices are read") && stacked.contains("mlx_lm.convert --dequantize"), "{stacked}");
    // Words of another width than config.json says.
    assert!(told(&|parts| parts.get_mut("weight").unwrap().shape = vec![3, 32]).starts_with("scales is BF16"));
}

#[test]
fn a_configuration_names_what_is_otherwise() {
    let module = |name, bits| QuantizedModule {
        name,
        encoding: Encoding::mlx(bits, 64, Float::BF16),
        desc_act: false,
        loaded: &[],
    };
    let modules = [module("model.embed_tokens", 8), module("a.0.q", 4), module("a.1.q", 4)];
    let files = Mlx.config(&modules, &["a.0.gate".into(), "vision_tower.".into(), "lm_head".into()]).unwrap();
    let expected = json!({
        "group_size": 64, "bits": 4, "mode": "affine",
        "model.embed_tokens": {"group_size": 64, "bits": 8, "mode": "affine"}, "a.0.gate": false, "lm_head": false,
    });
    assert_eq!(files.quantization_config, expected);
    assert!(files.files.is_empty() && files.notes.is_empty());

    // As mlx-lm says it of a mixture, and as older versions did.
    let reader = |config: Value| read_quantization(&json!({"quantization": config})).map(Option::unwrap);
    let read = reader(json!({
        "group_size": 64, "bits": 4, "model.layers.0.mlp.gate": {"group_size": 32, "bits": 8}, "b": false, "c": true, "d": {},
        "linear_class": "QuantizedLinear",
    }))
    .unwrap();
    let of = |module: &str| read.declared(module).unwrap().map(|declared| declared.encoding);
    let mlx = |bits, group| Some(Encoding::mlx(bits, group, Float::F32));
    assert_eq!(of("model.layers.0.mlp.gate"), mlx(8, 32));
    assert_eq!([of("a"), of("b"), of("c"), of("d")], [mlx(4, 64), None, mlx(4, 64), mlx(4, 64)]);
    for (config, why) in [
        (json!({"group_size": 32, "bits": 4, "mode": "mxfp4"}), "in mode \"mxfp4\", of which only \"affine\" is read"),
        (json!({"group_size": 64, "bits": 4, "a": {"mode": "nvfp4"}}), "in mode \"nvfp4\""),
        (json!({"group_size": 48, "bits": 4}), "quantization.group_size is 48, expected 32, 64 or 128"),
        (json!({"group_size": 64, "bits": 4, "a": {"bits": 7}}), "quantization.a.bits is 7"),
    ] {
        let told = reader(config).unwrap_err().to_string();
        assert!(told.contains(why), "{told}");
    }
}
