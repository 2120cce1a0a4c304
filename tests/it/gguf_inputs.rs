//! GGUF files that say more than the plain settings of their architecture, or less.

use std::path::Path;

use formats::container::gguf::MetadataValue;
use formats::{GgmlType, GgufFile, GgufTensor, GgufWriter};
use quantc::Checkpoint;

use crate::harness::Room;

pub type Keys = Vec<(String, MetadataValue)>;
pub type Tensors = Vec<(GgufTensor, Vec<u8>)>;

const EVAL: &[&str] = &["--context", "64", "--windows", "1"];

/// A room with the built-in model as `m.gguf`, and a changed copy of it as `x.gguf`.
pub fn changed(change: impl FnOnce(&mut Keys, &mut Tensors)) -> Room {
    let room = Room::new();
    room.model();
    room.run(["quantize", "model", "-o", "m.gguf", "--scheme", "F32", "--method", "rtn", "--verify-text", "none"])
        .succeeds();
    rewrite(&room.path("m.gguf"), &room.path("x.gguf"), change);
    room
}

pub fn rewrite(from: &Path, to: &Path, change: impl FnOnce(&mut Keys, &mut Tensors)) {
    let file = GgufFile::open(from).unwrap();
    let mut keys: Keys =
        file.keys().into_iter().map(|key| (key.to_owned(), file.metadata(key).unwrap().clone())).collect();
    let tensor = |spec: &formats::container::gguf::GgufSpec| {
        let tensor = GgufTensor { name: spec.name.clone(), ty: spec.ty, shape: spec.shape.clone() };
        (tensor, file.get(&spec.name).unwrap().data.to_vec())
    };
    let mut tensors: Tensors = file.tensors().iter().map(tensor).collect();
    change(&mut keys, &mut tensors);
    let specs =
        tensors.iter().map(|(t, _)| GgufTensor { name: t.name.clone(), ty: t.ty, shape: t.shape.clone() }).collect();
    if to.exists() {
        std::fs::remove_file(to).unwrap();
    }
    let writer = GgufWriter::create(to, keys, specs).unwrap();
    tensors.iter().for_each(|(tensor, data)| writer.write(&tensor.name, data).unwrap());
    writer.finish().unwrap();
}

pub fn floats(name: &str, values: &[f32]) -> (GgufTensor, Vec<u8>) {
    let ty = GgmlType::from_name("F32").unwrap();
    let tensor = GgufTensor { name: name.to_owned(), ty, shape: vec![values.len()] };
    (tensor, values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

pub fn key(name: &str, value: MetadataValue) -> (String, MetadataValue) {
    (name.to_owned(), value)
}

/// Every command that reads `x.gguf`.
fn commands() -> [Vec<&'static str>; 3] {
    [
        [&["eval", "x.gguf"], EVAL].concat(),
        vec!["convert", "x.gguf", "-o", "out"],
        vec!["quantize", "x.gguf", "-o", "out.gguf", "--method", "rtn", "--scheme", "Q8_0", "--verify-windows", "1"],
    ]
}

#[test]
fn attention_to_what_comes_later_is_computed_and_written() {
    let room = changed(|keys, _| keys.push(key("llama.attention.causal", MetadataValue::Bool(false))));
    let perplexity = |model: &str| {
        let run = room.run([&["eval", model, "--json"], EVAL].concat());
        run.succeeds();
        serde_json::from_str::<serde_json::Value>(&run.stdout()).unwrap()["perplexity"].as_f64().unwrap()
    };
    let both = perplexity("x.gguf");
    assert_ne!(both, perplexity("m.gguf"));
    room.run(["convert", "x.gguf", "-o", "out"]).succeeds();
    let config = std::fs::read(room.path("out/config.json")).unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&config).unwrap()["is_causal"], false);
    let again = "quantize out -o again.gguf --scheme F32 --method rtn --verify-text none";
    room.run(again.split(' ')).succeeds();
    let again = GgufFile::open(room.path("again.gguf")).unwrap();
    assert!(matches!(again.metadata("llama.attention.causal"), Some(MetadataValue::Bool(false))));
    assert!((perplexity("again.gguf") / both - 1.0).abs() < 1e-3);
    rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |keys, _| {
        keys.push(key("llama.attention.causal", MetadataValue::Bool(true)));
    });
    let run = room.run([&["eval", "x.gguf"], EVAL].concat());
    run.succeeds();
    assert!(!run.stderr().contains("note:"), "{}", run.stderr());
}

#[test]
fn pooling_goes_from_file_to_file() {
    let room = changed(|keys, _| keys.push(key("llama.pooling_type", MetadataValue::U32(3))));
    let [_, convert, quantize] = commands();
    room.run(quantize).succeeds();
    assert_eq!(GgufFile::open(room.path("out.gguf")).unwrap().count("llama.pooling_type").unwrap(), Some(3));
    let run = room.run(convert);
    run.succeeds();
    assert!(run.stderr().contains("(pooling_type 3) has no place"), "{}", run.stderr());
}

#[test]
fn settings_that_nothing_goes_by_are_named_in_one_note() {
    let room = changed(|keys, _| {
        keys.push(key("llama.use_parallel_residual", MetadataValue::Bool(true)));
        keys.push(key("llama.attention.scale", MetadataValue::F32(0.5)));
        keys.push(key("llama.rope.scaling.finetuned", MetadataValue::Bool(true)));
        // Of another architecture.
        keys.push(key("llama4.attention.scale", MetadataValue::F32(0.5)));
    });
    for command in commands() {
        let run = room.run(command);
        run.succeeds();
        let told = run.stderr();
        assert!(told.contains("(`llama.attention.scale`, `llama.use_parallel_residual`)"), "{told}");
    }
}

#[test]
fn a_factor_of_the_rotation_is_not_dropped() {
    let warm = |keys: &mut Keys, kind: Option<&str>| {
        keys.push(key("llama.rope.scaling.attn_factor", MetadataValue::F32(1.25)));
        if let Some(kind) = kind {
            keys.push(key("llama.rope.scaling.type", MetadataValue::String(kind.to_owned())));
            keys.push(key("llama.rope.scaling.factor", MetadataValue::F32(2.0)));
        }
    };
    let room = changed(|keys, _| warm(keys, None));
    for (kind, factor) in [(None, 1.0), (Some("none"), 1.0), (Some("linear"), 2.0)] {
        rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |keys, _| warm(keys, kind));
        for command in commands() {
            room.run(
                [&command[..], &["--force"]].concat().iter().filter(|word| **word != "--force" || command[0] != "eval"),
            )
            .succeeds();
        }
        let scaling = Checkpoint::open(&room.path("out.gguf")).unwrap().config()["rope_scaling"].clone();
        assert_eq!((&scaling["attention_factor"], &scaling["short_factor"][1]), (&1.25.into(), &factor.into()));
    }
    rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |keys, _| {
        warm(keys, Some("yarn"));
    });
    let scaling = Checkpoint::open(&room.path("x.gguf")).unwrap().config()["rope_scaling"].clone();
    assert!(scaling["attention_factor"].as_f64().unwrap() > 1.25);
}

#[test]
fn scales_of_whole_linears_are_applied() {
    let room = changed(|_, tensors| {
        tensors.push(floats("blk.0.attn_q.scale", &[0.5]));
        tensors.push(floats("blk.1.ffn_down.scale", &[-3.0]));
    });
    let [plain, scaled] = ["m.gguf", "x.gguf"].map(|name| Checkpoint::open(&room.path(name)).unwrap());
    let modules = [("0.self_attn.q_proj", 0.5), ("1.mlp.down_proj", -3.0), ("0.self_attn.k_proj", 1.0)];
    for (module, factor) in modules {
        let name = format!("model.layers.{module}.weight");
        let expected: Vec<f32> = plain.load(&name).unwrap().iter().map(|x| x * factor).collect();
        assert_eq!(scaled.load(&name).unwrap(), expected, "{name}");
        let mut row = vec![0.0; scaled.entry(&name).unwrap().shape[1]];
        scaled.load_rows(&name, &[3], &mut row).unwrap();
        assert_eq!(row, expected[3 * row.len()..][..row.len()], "{name}");
    }
    room.run(["convert", "x.gguf", "-o", "out"]).succeeds();
    let run = room.run([&["eval", "out", "--reference", "x.gguf", "--json"], EVAL].concat());
    run.succeeds();
    let found: serde_json::Value = serde_json::from_str(&run.stdout()).unwrap();
    assert!(found["kld_mean"].as_f64().or(found["beside"]["kld_mean"].as_f64()).unwrap() < 1e-9, "{found}");
    rewrite(&room.path("m.gguf"), &room.path("x.gguf"), |_, tensors| {
        tensors.push(floats("blk.0.attn_q.scale", &[0.5, 2.0]));
    });
    for command in commands() {
        room.run(command).refuses(1, &["x.gguf", "`blk.0.attn_q.scale`", "one value"]);
    }
}

#[test]
fn a_missing_tensor_has_the_name_that_the_file_would_have() {
    let room = changed(|_, tensors| tensors.retain(|(tensor, _)| tensor.name != "blk.1.ffn_norm.weight"));
    for command in commands() {
        let run = room.run(command);
        run.refuses(1, &["x.gguf: tensor `blk.1.ffn_norm.weight` is missing", "download the file again"]);
        assert!(!run.stderr().contains("config.json"), "{}", run.stderr());
    }
}

#[test]
fn measuring_names_what_it_leaves_out() {
    let room = changed(|_, tensors| {
        tensors.push(floats("cls.output.weight", &[0.5; 8]));
        tensors.push(floats("blk.99.attn_norm.weight", &[0.5; 8]));
    });
    let run = room.run([&["eval", "x.gguf"], EVAL].concat());
    run.succeeds();
    for words in [
        "not part of a llama model, and left out: ",
        "`cls.output.weight` (an output for something else than tokens)",
        "`blk.99.attn_norm.weight` (a block beyond those that `block_count` counts)",
    ] {
        assert!(run.stderr().contains(words), "{}", run.stderr());
    }
}

#[test]
fn measuring_a_folder_names_what_it_leaves_out() {
    let room = Room::new();
    room.model().weights(|header, data| {
        let at = data.len();
        data.extend([0; 4]);
        let value = serde_json::json!({"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]});
        header.insert("v_head.summary.bias".to_owned(), value);
    });
    let words = "left out: `v_head.summary.bias` (an output for something else than tokens)";
    let run = room.run([&["eval", "model", "--reference", "model"], EVAL].concat());
    run.succeeds();
    assert_eq!(run.stderr().matches(words).count(), 1, "{}", run.stderr());
    let run = room.run([&["eval", "model", "--quiet"], EVAL].concat());
    assert!(!run.stderr().contains(words), "{}", run.stderr());
}

#[test]
fn the_embedding_of_a_tied_model_is_its_head() {
    let room = Room::new();
    let model = room.model();
    model.weights(|header, _| drop(header.remove("lm_head.weight")));
    model.config(|config| config["tie_word_embeddings"] = true.into());
    let fixed = ["quantize", "model", "--scheme", "Q4_K_M", "--method", "rtn", "--verify-text", "none", "-o"];
    let of = |name: &str, flags: &[&str]| {
        room.run(fixed.iter().chain(&[name]).chain(flags)).succeeds();
        GgufFile::open(room.path(name)).unwrap().get("token_embd.weight").unwrap().ty.name
    };
    assert_eq!(of("a.gguf", &[]), "Q6_K");
    assert_eq!(of("b.gguf", &["--ignore", "lm_head"]), "BF16");
}
