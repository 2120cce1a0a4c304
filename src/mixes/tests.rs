//! Types of whole models, against llama.cpp and by hand.

use super::*;
use serde_json::Value as Json;

const LLAMA: ModelShape<'_> = ModelShape { architecture: "llama", layers: 16, heads: 8, kv_heads: 8, experts: 0 };

/// The tensors of a llama in file order.
fn llama(layers: usize, width: usize, inner: usize, tied: bool) -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![("output_norm.weight".to_owned(), vec![width])];
    tensors.push(("token_embd.weight".to_owned(), vec![512, width]));
    if !tied {
        tensors.insert(0, ("output.weight".to_owned(), vec![512, width]));
    }
    for layer in 0..layers {
        for (part, shape) in [
            ("attn_k.weight", vec![width, width]),
            ("attn_norm.weight", vec![width]),
            ("attn_output.weight", vec![width, width]),
            ("attn_q.bias", vec![width]),
            ("attn_q.weight", vec![width, width]),
            ("attn_v.weight", vec![width, width]),
            ("ffn_down.weight", vec![width, inner]),
            ("ffn_gate.weight", vec![inner, width]),
            ("ffn_norm.weight", vec![width]),
            ("ffn_up.weight", vec![inner, width]),
        ] {
            tensors.push((format!("blk.{layer}.{part}"), shape));
        }
    }
    tensors
}

fn run(
    mix: &str,
    model: &ModelShape<'_>,
    tensors: &[(String, Vec<usize>)],
    imatrix: bool,
    overrides: &Overrides,
) -> Result<Vec<(String, Assigned)>> {
    let infos: Vec<TensorInfo<'_>> = tensors.iter().map(|(name, shape)| TensorInfo { name, shape }).collect();
    let assigned = assign(Mix::parse(mix).unwrap(), model, &infos, imatrix, overrides)?;
    Ok(tensors.iter().map(|(name, _)| name.clone()).zip(assigned).collect())
}

/// The types of a plain llama of 16 blocks.
fn types(mix: &str, width: usize, tied: bool, imatrix: bool, overrides: &Overrides) -> Vec<(String, Assigned)> {
    run(mix, &LLAMA, &llama(16, width, 2 * width, tied), imatrix, overrides).unwrap()
}

fn of<'t>(types: &'t [(String, Assigned)], name: &str) -> &'t str {
    types.iter().find(|(other, _)| other == name).expect(name).1.ty.name
}

/// Blocks whose tensor of this name is of the type.
fn blocks(types: &[(String, Assigned)], part: &str, ty: &str) -> Vec<usize> {
    let is = |layer: &usize| of(types, &format!("blk.{layer}.{part}.weight")) == ty;
    (0..16).filter(is).collect()
}

fn message(result: Result<Vec<(String, Assigned)>>) -> String {
    result.unwrap_err().to_string()
}

fn tensor(text: &str) -> Overrides {
    Overrides { tensors: vec![TensorOverride::parse(text).unwrap()], ..Overrides::default() }
}

/// The tensors of a model of the fixture, as its script makes them.
fn fixture_tensors(model: &Json) -> Vec<(String, Vec<usize>)> {
    let count = |key: &str| model[key].as_u64().unwrap() as usize;
    let (width, inner, experts) = (count("width"), count("inner"), count("experts"));
    let kv = width / count("heads") * count("kv_heads");
    let mut tensors = vec![("token_embd.weight".to_owned(), vec![64, width])];
    tensors.push(("output_norm.weight".to_owned(), vec![width]));
    if model["tied"] == false {
        tensors.push(("output.weight".to_owned(), vec![64, width]));
    }
    for block in 0..count("layers") {
        let mut part = |name: &str, shape: &[usize]| tensors.push((format!("blk.{block}.{name}"), shape.to_vec()));
        for name in ["attn_q", "attn_output"] {
            part(&format!("{name}.weight"), &[width, width]);
        }
        for name in ["attn_k", "attn_v"] {
            part(&format!("{name}.weight"), &[kv, width]);
        }
        part("attn_v.bias", &[kv]);
        part("attn_norm.weight", &[width]);
        if experts > 0 {
            part("ffn_gate_inp.weight", &[experts, width]);
            part("ffn_gate_exps.weight", &[experts, 32, width]);
            part("ffn_up_exps.weight", &[experts, 32, width]);
            part("ffn_down_exps.weight", &[experts, 4, inner]);
        } else {
            part("ffn_gate.weight", &[32, width]);
            part("ffn_up.weight", &[32, width]);
            part("ffn_down.weight", &[4, inner]);
        }
    }
    tensors.sort_by(|a, b| crate::dialect::architectures::file_order(&a.0, &b.0));
    tensors
}

/// The type that the fixture has for a tensor.
fn fixture_type<'f>(types: &'f Json, name: &str) -> &'f str {
    let part = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, part)| part);
    let other = match [".bias", "norm.weight", "gate_inp.weight"].iter().any(|end| name.ends_with(end)) {
        true => "F32",
        false => types["else"].as_str().unwrap(),
    };
    match &types[part] {
        Json::String(ty) => ty,
        Json::Object(blocks) => {
            let block = Json::from(block_number(name).unwrap());
            let has = |list: &Json| list.as_array().unwrap().contains(&block);
            blocks.iter().find(|(_, list)| has(list)).map_or(other, |(ty, _)| ty)
        }
        _ => other,
    }
}

#[test]
fn types_are_those_of_llama_quantize() {
    let fixture: Json = serde_json::from_str(include_str!("../../tests/fixtures/gguf/type_mixes.json")).unwrap();
    let (mut compared, mut refused) = (0, 0);
    for case in fixture["models"].as_array().unwrap() {
        let mut model = fixture["plain"].clone();
        let changes = case["model"].as_object().unwrap();
        model.as_object_mut().unwrap().extend(changes.clone());
        let tensors = fixture_tensors(&model);
        let count = |key: &str| model[key].as_u64().unwrap() as usize;
        let (heads, kv_heads) = (count("heads"), count("kv_heads"));
        let shape = ModelShape { layers: count("layers"), heads, kv_heads, experts: count("experts"), ..LLAMA };
        let named = |key: &str| model[key].as_str().map(|ty| GgmlType::from_name(ty).unwrap());
        let patterns = model["tensors"].as_array().into_iter().flatten();
        let overrides = Overrides {
            tensors: patterns.map(|text| TensorOverride::parse(text.as_str().unwrap()).unwrap()).collect(),
            output: named("output"),
            embedding: named("embedding"),
            pure: model["pure"] == true,
        };
        for (mix, expected) in case["mixes"].as_object().unwrap() {
            let found = run(mix, &shape, &tensors, model["imatrix"] == true, &overrides);
            if expected.is_null() {
                assert!(message(found).contains("calibrate"), "{mix} {changes:?}");
                refused += 1;
                continue;
            }
            // What has no effect in llama-quantize is refused here.
            if let Err(error) = &found
                && error.to_string().contains("has no effect")
            {
                let floats = ["F32", "F16", "BF16"].contains(&mix.as_str());
                assert!(floats && (overrides.output.is_some() || !overrides.tensors.is_empty()), "{error}");
                continue;
            }
            for (name, found) in found.unwrap() {
                assert_eq!(found.ty.name, fixture_type(expected, &name), "{mix}: {name} of {changes:?}");
                compared += 1;
            }
        }
    }
    assert!(compared > 50_000 && refused == 12, "{compared} {refused}");
}

#[test]
fn every_mix_is_found_by_its_names_and_has_its_number() {
    for (name, number) in [("q4_k", 15), ("Q4_K_M", 15), ("Q3_K", 12), ("q5_k", 17), ("Q2_K_S", 21), ("iq4_xs", 30)] {
        assert_eq!(Mix::parse(name).unwrap().file_type, number, "{name}");
    }
    assert!(Mix::parse("IQ2_XS").is_none() && Mix::parse("").is_none());
    for (i, mix) in MIXES.iter().enumerate() {
        assert!(MIXES[i + 1..].iter().all(|other| (other.name, other.file_type) != (mix.name, mix.file_type)));
        // Every table entry names a type that exists.
        types(mix.name, 256, false, true, &Overrides::default());
    }
}

#[test]
fn an_importance_matrix_changes_the_first_down_projections() {
    let none = Overrides::default();
    for (mix, without, with) in
        [("Q4_0", "Q4_0", "Q4_1"), ("Q5_0", "Q5_0", "Q5_1"), ("IQ4_XS", "Q5_K", "IQ4_XS"), ("IQ4_NL", "Q5_K", "IQ4_NL")]
    {
        for (imatrix, first) in [(false, without), (true, with)] {
            let types = types(mix, 256, false, imatrix, &none);
            assert_eq!(of(&types, "blk.0.ffn_down.weight"), first);
            assert_eq!(of(&types, "blk.1.ffn_down.weight"), first);
            assert_eq!(of(&types, "blk.2.ffn_down.weight"), Mix::parse(mix).unwrap().base);
        }
    }
    let shape = ModelShape { kv_heads: 2, ..LLAMA };
    let types = run("Q2_K_S", &shape, &llama(16, 256, 512, false), true, &none).unwrap();
    assert_eq!(of(&types, "blk.9.attn_v.weight"), "Q4_K");
    assert_eq!(blocks(&types, "ffn_down", "Q4_K"), [0, 1]);
    assert_eq!((of(&types, "blk.0.attn_output.weight"), of(&types, "output.weight")), ("Q2_K", "Q6_K"));
    let refused = message(run("Q2_K_S", &shape, &llama(16, 256, 512, false), false, &none));
    assert!(refused.contains("Q2_K_S needs to know which weights matter"), "{refused}");
    // Without a single Q2_K tensor there is nothing to refuse.
    run("Q2_K_S", &shape, &llama(2, 64, 64, false), false, &none).unwrap();
}

#[test]
fn heads_embeddings_and_floats() {
    let none = Overrides::default();
    for (mix, head, embedding) in [
        ("Q8_0", "Q8_0", "Q8_0"),
        ("Q4_1", "Q6_K", "Q4_1"),
        ("TQ2_0", "Q6_K", "Q4_K"),
        ("MXFP4_MOE", "Q8_0", "Q8_0"),
        ("F16", "F16", "F16"),
        ("BF16", "BF16", "BF16"),
        ("F32", "F32", "F32"),
    ] {
        let untied = types(mix, 256, false, false, &none);
        assert_eq!((of(&untied, "output.weight"), of(&untied, "token_embd.weight")), (head, embedding), "{mix}");
        assert_eq!(of(&types(mix, 256, true, false, &none), "token_embd.weight"), head, "{mix}");
        assert_eq!((of(&untied, "output_norm.weight"), of(&untied, "blk.3.attn_q.bias")), ("F32", "F32"));
    }
    let mut experts = llama(1, 256, 512, true);
    experts.push(("blk.0.ffn_up_exps.weight".to_owned(), vec![4, 512, 256]));
    let shape = ModelShape { experts: 4, ..LLAMA };
    let types = run("MXFP4_MOE", &shape, &experts, false, &none).unwrap();
    assert_eq!((of(&types, "blk.0.ffn_up_exps.weight"), of(&types, "blk.0.ffn_up.weight")), ("MXFP4", "Q8_0"));
}

#[test]
fn rows_that_no_block_divides_fall_back() {
    let none = Overrides::default();
    for (mix, wide, tied_head) in [
        ("Q2_K", "Q4_0", "Q8_0"),
        ("Q3_K_S", "Q4_0", "Q8_0"),
        ("Q4_K_S", "Q5_0", "Q8_0"),
        ("Q5_K_S", "Q5_1", "Q8_0"),
        ("Q6_K", "Q8_0", "Q8_0"),
        ("IQ4_XS", "IQ4_NL", "Q8_0"),
        ("TQ1_0", "Q4_0", "Q8_0"),
        ("Q4_0", "Q4_0", "Q8_0"),
        ("IQ4_NL", "IQ4_NL", "Q8_0"),
    ] {
        let types = types(mix, 576, true, false, &none);
        assert_eq!(of(&types, "blk.9.attn_q.weight"), wide, "{mix}");
        assert_eq!(of(&types, "token_embd.weight"), tied_head, "{mix}");
        let (_, q) = types.iter().find(|(name, _)| name == "blk.9.attn_q.weight").unwrap();
        assert_eq!(q.fallback.is_some(), wide != Mix::parse(mix).unwrap().base);
    }
    let types = types("Q4_K_M", 172, true, false, &none);
    let (_, q) = types.iter().find(|(name, _)| name == "blk.2.attn_q.weight").unwrap();
    let expected = "F16 in place of Q4_K: rows of 172 values do not split into blocks of 256";
    assert_eq!((q.ty.name, q.fallback.as_deref()), ("F16", Some(expected)));
    // Not even 32 divides.
    let q8 = run("Q8_0", &LLAMA, &llama(16, 172, 344, true), false, &none).unwrap();
    assert_eq!((of(&q8, "token_embd.weight"), of(&q8, "blk.0.ffn_up.weight")), ("F16", "F16"));
}

#[test]
fn large_models_and_eight_experts() {
    let none = Overrides::default();
    let shape = |architecture, heads, kv_heads| ModelShape { architecture, layers: 80, heads, kv_heads, experts: 0 };
    let value = |shape: &ModelShape<'_>, mix: &str| {
        let types = run(mix, shape, &llama(80, 256, 256, false), true, &none).unwrap();
        of(&types, "blk.40.attn_v.weight").to_owned()
    };
    assert_eq!(value(&shape("llama", 64, 8), "Q4_K_S"), "Q5_K");
    assert_eq!(value(&shape("llama", 64, 8), "Q3_K_S"), "Q5_K");
    assert_eq!(value(&shape("llama", 64, 64), "Q4_K_S"), "Q4_K");
    assert_eq!(value(&shape("qwen2", 64, 64), "Q4_K_S"), "Q5_K");
    assert_eq!(value(&shape("qwen3", 64, 8), "Q4_K_S"), "Q4_K");
    let eight = ModelShape { experts: 8, ..LLAMA };
    let types = run("Q3_K_L", &eight, &llama(16, 256, 256, false), false, &none).unwrap();
    let found = ["attn_v", "attn_k", "attn_output"].map(|part| of(&types, &format!("blk.9.{part}.weight")));
    assert_eq!(found, ["Q8_0", "Q8_0", "Q3_K"]);
    let stray = vec![("ffn_down_exps.weight".to_owned(), vec![8, 256, 256])];
    assert!(message(run("Q4_K_M", &eight, &stray, false, &none)).contains("its name has no block below 16"));
}

#[test]
fn users_decide() {
    let types_with = |mix: &str, overrides: &Overrides| types(mix, 256, false, false, overrides);
    let pure = types_with("Q4_K_M", &Overrides { pure: true, ..Overrides::default() });
    assert!(pure.iter().all(|(name, a)| a.ty.name
        == if quantizable(name, &[2, 2]) && !name.contains("bias") && !name.contains("norm") {
            "Q4_K"
        } else {
            "F32"
        }));
    let named = GgmlType::from_name("q8_0");
    let output = types_with("Q4_K_M", &Overrides { output: named, ..Overrides::default() });
    assert_eq!((of(&output, "output.weight"), of(&output, "token_embd.weight")), ("Q8_0", "Q4_K"));
    let embedding = types_with("F16", &Overrides { embedding: named, ..Overrides::default() });
    assert_eq!((of(&embedding, "output.weight"), of(&embedding, "token_embd.weight")), ("F16", "Q8_0"));
    let tied = types("Q4_K_M", 256, true, false, &Overrides { output: named, ..Overrides::default() });
    assert_eq!(of(&tied, "token_embd.weight"), "Q8_0");

    // The first pattern decides; what is decided by hand is not counted.
    let mut overrides = tensor("BLK\\.[01]\\.attn_v=q2_k");
    overrides.tensors.push(TensorOverride::parse("attn_v|ffn_up=Q3_K").unwrap());
    let types = types_with("Q3_K_M", &overrides);
    assert_eq!(blocks(&types, "attn_v", "Q2_K"), [0, 1]);
    assert_eq!(blocks(&types, "attn_v", "Q3_K").len(), 14);
    assert_eq!(blocks(&types, "ffn_up", "Q3_K").len(), 16);
    let types = types_with("Q3_K_M", &tensor("blk\\.0\\.attn_v=Q2_K"));
    assert_eq!(blocks(&types, "attn_v", "Q5_K"), [1, 2]);
    // Rows that do not fit fall back here, too.
    let types = self::types("Q8_0", 576, false, false, &tensor("blk.(?!0)[0-9]+.attn_q=Q4_K"));
    assert_eq!((of(&types, "blk.3.attn_q.weight"), of(&types, "blk.0.attn_q.weight")), ("Q5_0", "Q8_0"));
}

#[test]
fn decisions_without_effect_are_refused() {
    let refused = |mix: &str, width: usize, tied: bool, overrides: Overrides| {
        message(run(mix, &LLAMA, &llama(16, width, width, tied), false, &overrides))
    };
    let none = Overrides::default;
    let q4_k = GgmlType::from_name("Q4_K");
    assert!(refused("Q4_K_M", 256, false, tensor("attn_z=Q8_0")).contains("--tensor-type attn_z=Q8_0: no tensor"));
    assert!(refused("Q4_K_M", 256, false, tensor("ffn_norm=Q8_0")).contains("no tensor that can be quantized"));
    assert!(refused("F16", 256, false, tensor("attn_v=Q8_0")).ends_with("has no effect with F16"));
    let wide = refused("Q8_0", 576, false, Overrides { output: q4_k, ..none() });
    assert!(wide.contains("--output-tensor-type Q4_K: rows of `output.weight` have 576 values"), "{wide}");
    for overrides in
        [Overrides { output: q4_k, pure: true, ..none() }, Overrides { output: q4_k, embedding: q4_k, ..none() }]
    {
        let tied = refused("Q8_0", 256, true, overrides);
        assert!(tied.contains("--output-tensor-type has no effect"), "{tied}");
    }
    for (text, expected) in [
        ("attn_v", "expected PATTERN=TYPE"),
        ("=Q8_0", "expected PATTERN=TYPE"),
        ("attn_v=Q9", "`Q9` is no type that can be written (F32, "),
        ("(=Q8_0", "--tensor-type (=Q8_0: "),
    ] {
        let error = TensorOverride::parse(text).unwrap_err();
        assert!(error.to_string().contains(expected) && error.exit_code() == 2, "{error}");
    }
}
