//! Tensors that a model does not need, files that do not agree with their index, doubles, and models without a head.

use std::collections::BTreeMap;
use std::path::Path;

use formats::{Dtype, SafetensorsSet, ShardedWriter, TensorSpec};
use quantc::Checkpoint;
use serde_json::{Value, json};

use crate::harness::{Model, Room, TEXT};

/// Without data and without measuring.
const FAST: &[&str] = &["--method", "rtn", "--group-size", "64", "--verify-text", "none"];

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// What is done to two shards and the `weight_map` of their index.
type Change = dyn Fn(&mut [Tensors; 2], &mut BTreeMap<String, Value>);

fn read(folder: &Path) -> Tensors {
    let set = SafetensorsSet::open(folder).unwrap();
    let of = |spec: &TensorSpec| {
        (spec.name.clone(), (spec.dtype, spec.shape.clone(), set.get(&spec.name).unwrap().data.to_vec()))
    };
    set.tensors().map(of).collect()
}

/// Writes model.safetensors anew, after a change.
fn change(model: &Model, change: impl FnOnce(&mut Tensors)) {
    change_in(&model.path(""), change);
}

fn change_in(folder: &Path, change: impl FnOnce(&mut Tensors)) {
    let mut tensors = read(folder);
    change(&mut tensors);
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    write(folder, tensors);
}

fn write(folder: &Path, tensors: Tensors) {
    let spec = |(name, (dtype, shape, _)): (&String, &(Dtype, Vec<usize>, Vec<u8>))| TensorSpec {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
    };
    let writer = ShardedWriter::create(folder, tensors.iter().map(spec).collect(), u64::MAX, &BTreeMap::new()).unwrap();
    tensors.iter().for_each(|(name, (_, _, data))| writer.write(name, data).unwrap());
    writer.finish().unwrap();
}

/// A tensor of bytes that count.
fn add(tensors: &mut Tensors, name: &str, dtype: Dtype, shape: &[usize]) {
    let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    let data = (0..bytes).map(|at| (at % 63) as u8).collect();
    tensors.insert(name.to_owned(), (dtype, shape.to_vec(), data));
}

/// What real checkpoints were found with, and a part of what is said of each.
const STRAYS: &[(&str, Dtype, &[usize], &str)] = &[
    ("score.weight", Dtype::BF16, &[2, 256], "an output for something else than tokens"),
    ("v_head.summary.bias", Dtype::F32, &[1], "an output for something else than tokens"),
    ("mtp.layers.0.proj.weight", Dtype::BF16, &[64, 256], "predicts further tokens"),
    ("model.layers.4.mlp.up_proj.weight", Dtype::BF16, &[768, 256], "a layer beyond those that config.json counts"),
    ("model.layers.0.self_attn.rotary_emb.cos_cached", Dtype::F32, &[1, 1, 8, 64], "a buffer that runtimes compute"),
    ("model.embeddings.position_ids", Dtype::I64, &[1, 512], "a buffer that runtimes compute"),
    ("model.layers.0.self_attn.k_scale", Dtype::F32, &[], "a scale for the cache of keys and values"),
    ("model.layers.0.self_attn.q_proj.bias", Dtype::F16, &[256], "a bias that config.json says there is none of"),
    ("vision_tower.patch.weight", Dtype::F64, &[4, 4], "of a name that means nothing"),
    ("fc.counts", Dtype::U16, &[3], "of a name that means nothing"),
    ("fc.empty", Dtype::F32, &[0], "of a name that means nothing"),
    ("fc.mask", Dtype::BOOL, &[2, 2], "of a name that means nothing"),
    ("fc.eighths", Dtype::F8_E4M3, &[4], "of a name that means nothing"),
    ("fc.waves", Dtype::C64, &[2], "of a name that means nothing"),
    ("fc.wide", Dtype::U64, &[2], "of a name that means nothing"),
];

fn with_strays(room: &Room) -> Tensors {
    let model = room.model();
    change(&model, |tensors| {
        for (name, dtype, shape, _) in STRAYS {
            add(tensors, name, *dtype, shape);
        }
        // A mask is infinite where it masks.
        let infinite = f32::NEG_INFINITY.to_le_bytes().to_vec();
        tensors.insert("model.causal_mask".to_owned(), (Dtype::F32, vec![1], infinite));
    });
    read(&model.path(""))
}

#[test]
fn what_is_not_part_of_the_model_goes_over_untouched_with_a_note() {
    let room = Room::new();
    let before = with_strays(&room);
    for (format, listed) in [("compressed-tensors", "ignore"), ("gptq", "dynamic"), ("awq", "modules_to_not_convert")] {
        let run = room.run(["quantize", "model", "-o", "out", "--force", "--format", format].iter().chain(FAST));
        run.succeeds();
        let (after, told) = (read(&room.path("out")), run.stderr());
        for (name, _, _, reason) in STRAYS {
            assert_eq!(after.get(*name), before.get(*name), "{format}: {name}");
            assert!(told.contains(reason), "{name}: {told}");
        }
        assert_eq!(after["model.causal_mask"], before["model.causal_mask"]);
        assert!(told.contains("note: not part of a llama model, and copied as they are: "), "{told}");
        assert!(
            told.contains("`score.weight` and 1 more") || told.contains("`v_head.summary.bias` and 1 more"),
            "{told}"
        );
        let config: Value = serde_json::from_slice(&std::fs::read(room.path("out/config.json")).unwrap()).unwrap();
        let left = config["quantization_config"][listed].to_string();
        for module in ["score", "vision_tower", "proj"] {
            assert!(left.contains(module), "{format}: {module} in {left}");
        }
        let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
        let fate = report["tensors"].as_array().unwrap().iter().find(|t| t["name"] == "score.weight").unwrap();
        assert_eq!(fate["fate"]["aside"], "an output for something else than tokens");
        assert!(report["notes"].to_string().contains("copied as they are"));
        // It is read again as it was.
        room.run(["inspect", "out"]).succeeds();
    }
}

#[test]
fn a_name_that_is_in_others_is_not_left_out_where_these_would_be_as_well() {
    let room = Room::new();
    change(&room.model(), |tensors| add(tensors, "proj.weight", Dtype::BF16, &[64, 256]));
    room.run(["quantize", "model", "-o", "out", "--format", "awq"].iter().chain(FAST)).succeeds();
    let out = Checkpoint::open(&room.path("out")).unwrap();
    assert!(matches!(out.entry(DOWN).unwrap().dtype, quantc::weights::StoredType::Quantized { .. }));
    let config = std::fs::read_to_string(room.path("out/config.json")).unwrap();
    assert!(!config.contains("\"proj\""), "{config}");
}

#[test]
fn what_is_not_part_of_the_model_is_dropped_or_refused_on_request() {
    let room = Room::new();
    with_strays(&room);
    room.file("drop.toml", "unknown_tensors = 'drop'\n");
    for how in [["--unknown-tensors", "drop"], ["--recipe", "drop.toml"]] {
        let run = room.run(["quantize", "model", "-o", "out", "--force"].iter().chain(&how).chain(FAST));
        run.succeeds();
        let after = read(&room.path("out"));
        assert!(STRAYS.iter().all(|(name, ..)| !after.contains_key(*name)), "{how:?}");
        assert!(run.stderr().contains("not part of a llama model, and left out: "), "{}", run.stderr());
        let config = std::fs::read_to_string(room.path("out/config.json")).unwrap();
        assert!(!config.contains("score"), "{config}");
    }
    room.run(["quantize", "model", "-o", "no", "--unknown-tensors", "refuse"].iter().chain(FAST))
        .refuses(1, &["model: tensor `", "is not part of a llama model", "--unknown-tensors drop"]);
    // A flag goes before the recipe.
    let both = ["--recipe", "drop.toml", "--unknown-tensors", "refuse"];
    room.run(["quantize", "model", "-o", "no"].iter().chain(&both).chain(FAST)).refuses(1, &["no rule"]);
    room.run(["quantize", "model", "-o", "no", "--unknown-tensors", "keep"].iter().chain(FAST))
        .refuses(2, &["`keep` is not known; there are copy, drop, refuse"]);
    assert_eq!(room.names(), ["drop.toml", "model", "out"]);
}

#[test]
fn a_gguf_file_holds_no_tensor_that_its_loader_does_not_know() {
    let room = Room::new();
    let model = room.model();
    let quantize = |out: &str, more: &[&str]| {
        let scheme = ["--scheme", "Q8_0", "--verify-text", "none"];
        room.run(["quantize", "model", "-o", out].iter().chain(&scheme).chain(more))
    };
    quantize("plain.gguf", &[]).succeeds();
    change(&model, |tensors| {
        STRAYS.iter().for_each(|(name, dtype, shape, _)| add(tensors, name, *dtype, shape));
    });
    let run = quantize("strays.gguf", &[]);
    run.succeeds();
    assert!(run.stderr().contains("left out, for llama.cpp refuses files with tensors"), "{}", run.stderr());
    let [plain, strays] = ["plain.gguf", "strays.gguf"].map(|name| std::fs::read(room.path(name)).unwrap());
    assert!(plain == strays, "the same file");
    quantize("no.gguf", &["--unknown-tensors", "refuse"]).refuses(1, &["is not part of a llama model"]);
    let report = std::fs::read_to_string(room.path("strays.gguf.report.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    let fate = report["tensors"].as_array().unwrap().iter().find(|t| t["name"] == "score.weight").unwrap();
    assert_eq!(fate["fate"]["dropped"], "an output for something else than tokens");
}

#[test]
fn convert_and_merge_treat_them_alike() {
    let room = Room::new();
    let before = with_strays(&room);
    let adapter = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]});
    room.file("adapter/adapter_config.json", adapter.to_string());
    let mut lora = Tensors::new();
    let at = "base_model.model.model.layers.0.self_attn.q_proj";
    for (part, shape) in [("lora_A", [2, 256]), ("lora_B", [256, 2])] {
        lora.insert(format!("{at}.{part}.weight"), (Dtype::F32, shape.to_vec(), vec![0; 2048]));
    }
    write(&room.path("adapter"), lora);
    let folder = room.path("adapter");
    std::fs::rename(folder.join("model.safetensors"), folder.join("adapter_model.safetensors")).unwrap();
    for command in [&["convert", "model", "--dtype", "f16"][..], &["merge", "model", "--adapter", "adapter"]] {
        let run = |more: &[&str]| room.run(command.iter().chain(&["-o", "out", "--force"]).chain(more));
        let copied = run(&[]);
        copied.succeeds();
        assert!(copied.stderr().contains("copied as they are"), "{command:?}: {}", copied.stderr());
        let after = read(&room.path("out"));
        for (name, ..) in STRAYS {
            assert_eq!(after.get(*name), before.get(*name), "{command:?}: {name}");
        }
        run(&["--unknown-tensors", "drop"]).succeeds();
        let after = read(&room.path("out"));
        assert_eq!(after.len(), before.len() - STRAYS.len() - 1, "{command:?}");
        run(&["--unknown-tensors", "refuse"]).refuses(1, &["is not part of a llama model"]);
    }
}

#[test]
fn parts_of_an_adapter_are_not_ignored() {
    let room = Room::new();
    change(&room.model(), |tensors| {
        add(tensors, "model.layers.0.mlp.up_proj.lora_A.default.weight", Dtype::BF16, &[4, 256]);
    });
    let words = ["up_proj.lora_A.default.weight", "a part of an adapter", "merge it first", "--unknown-tensors drop"];
    room.run(["quantize", "model", "-o", "out"].iter().chain(FAST)).refuses(1, &words);
    room.run(["eval", "model", "--windows", "1"]).refuses(1, &words);
    let drop = ["--unknown-tensors", "drop"];
    room.run(["quantize", "model", "-o", "out"].iter().chain(FAST).chain(&drop)).succeeds();
}

#[test]
fn codes_beside_the_plain_weight_do_not_come_into_the_way_of_what_is_written() {
    let room = Room::new();
    let module = DOWN.strip_suffix(".weight").unwrap();
    change(&room.model(), |tensors| {
        add(tensors, &format!("{module}.qweight"), Dtype::I32, &[96, 256]);
        add(tensors, &format!("{module}.weight_scale"), Dtype::F32, &[256, 1]);
    });
    for format in ["gptq", "compressed-tensors"] {
        let run = room.run(["quantize", "model", "-o", "out", "--force", "--format", format].iter().chain(FAST));
        run.succeeds();
        let told = run.stderr();
        assert!(told.contains("left out: ") && told.contains("and 1 more (left over from another way"), "{told}");
        assert_eq!(Checkpoint::open(&room.path("out")).unwrap().entry(DOWN).unwrap().shape, [256, 768]);
    }
}

#[test]
fn a_tensor_under_another_name_is_named_with_the_one_that_is_missing() {
    let room = Room::new();
    change(&room.model(), |tensors| {
        let found = tensors.remove(DOWN).unwrap();
        tensors.insert("model.layers.2.mlp.w2.weight".to_owned(), found.clone());
        tensors.insert("model.layers.1.other.w2.weight".to_owned(), found.clone());
        tensors.insert("model.layers.1.mlp.w2.weight".to_owned(), found);
    });
    for args in [&["quantize", "model", "-o", "out"][..], &["eval", "model"]] {
        room.run(args).refuses(1, &[DOWN, "missing", "[256, 768]", "`model.layers.1.mlp.w2.weight` has that shape"]);
    }
    let room = Room::new();
    let model = room.model();
    model.config(|config| config["tie_word_embeddings"] = false.into());
    room.run(["eval", "model"]).refuses(1, &["`lm_head.weight` is missing", "tie_word_embeddings", "architectures"]);
}

/// The model in two shards and an index, changed before it is written.
fn shards(room: &Room, change: impl FnOnce(&mut [Tensors; 2], &mut BTreeMap<String, Value>)) {
    let model = room.model();
    let folder = model.path("");
    let tensors = read(&folder);
    std::fs::remove_file(model.path("model.safetensors")).unwrap();
    let (first, second) = tensors.into_iter().partition(|(name, _)| name.contains(".0.") || name.contains(".1."));
    let names = ["part-a.safetensors", "part-b.safetensors"];
    let mut parts: [Tensors; 2] = [first, second];
    let mut map = BTreeMap::new();
    for (part, file) in parts.iter().zip(names) {
        map.extend(part.keys().map(|name| (name.clone(), Value::from(file))));
    }
    change(&mut parts, &mut map);
    for (part, file) in parts.into_iter().zip(names) {
        write(&folder, part);
        std::fs::rename(model.path("model.safetensors"), model.path(file)).unwrap();
    }
    // The size is wrong, as it is in many an edited checkpoint.
    let index = json!({"metadata": {"total_size": 5}, "weight_map": map});
    std::fs::write(model.path("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn an_index_and_shards_that_do_not_agree_are_read_as_runtimes_do() {
    let plain = Room::new();
    plain.model();
    plain.run(["quantize", "model", "-o", "out"].iter().chain(FAST)).succeeds();
    let expected = read(&plain.path("out"));
    let check = |change: &Change, words: &[&str]| {
        let room = Room::new();
        shards(&room, change);
        let run = room.run(["quantize", "model", "-o", "out"].iter().chain(FAST));
        run.succeeds();
        let told = run.stderr();
        assert!(words.iter().all(|word| told.contains(word)), "{words:?}: {told}");
        assert!(!words.is_empty() || !told.contains("index"), "{told}");
        assert!(read(&room.path("out")) == expected, "{words:?}: the same weights");
        for command in [&["eval", "model", "--windows", "1"][..], &["convert", "model", "-o", "plain"]] {
            let run = room.run(command);
            run.succeeds();
            assert!(words.iter().all(|word| run.stderr().contains(word)), "{command:?}: {}", run.stderr());
        }
        assert!(read(&room.path("plain")) == read(&plain.path("model")), "{words:?}");
    };
    check(&|_, _| {}, &[]);
    let ghost = |_: &mut [Tensors; 2], map: &mut BTreeMap<String, Value>| {
        map.insert("ghost.weight".to_owned(), "part-a.safetensors".into());
    };
    check(&ghost, &["model.safetensors.index.json names `ghost.weight`, and no shard holds it"]);
    check(
        &|_, map| drop(map.remove(DOWN)),
        &["does not name `model.layers.1.mlp.down_proj.weight`, read from the shards"],
    );
    check(&|_, map| drop(map.insert(DOWN.to_owned(), "part-b.safetensors".into())), &["places", DOWN, "another shard"]);
    // Once more in the other shard: equal, then not, and the index decides.
    check(&|[a, b], _| drop(b.insert(DOWN.to_owned(), a[DOWN].clone())), &[]);
    let other = |[a, b]: &mut [Tensors; 2], _: &mut BTreeMap<String, Value>| {
        let (dtype, shape, data) = a[DOWN].clone();
        b.insert(DOWN.to_owned(), (dtype, shape, vec![0; data.len()]));
    };
    check(&other, &["two shards hold different values of", DOWN, "that of the index was read", "part-b.safetensors"]);
}

#[test]
fn a_tensor_that_the_index_promises_and_the_model_needs_is_named_with_shard_and_index() {
    let room = Room::new();
    shards(&room, |[a, _], _| drop(a.remove(DOWN)));
    let words = [DOWN, "missing", "model.safetensors.index.json places it in part-a.safetensors"];
    for args in [&["quantize", "model", "-o", "out"][..], &["eval", "model"]] {
        room.run(args).refuses(1, &words);
    }
    std::fs::remove_file(room.path("model/part-b.safetensors")).unwrap();
    room.run(["quantize", "model", "-o", "out"]).refuses(
        1,
        &["shard part-b.safetensors", "which the index names for `model.embed_tokens.weight`", "is missing"],
    );
}

/// The model's tensors in another type.
fn retyped(tensors: Tensors, dtype: Dtype, bytes: impl Fn(f32) -> Vec<u8>) -> Tensors {
    let value = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
    let data = |data: Vec<u8>| data.chunks_exact(2).flat_map(|b| bytes(value(b))).collect();
    tensors.into_iter().map(|(name, (_, shape, old))| (name, (dtype, shape, data(old)))).collect()
}

#[test]
fn doubles_are_read_as_singles() {
    let room = Room::new();
    let model = room.model();
    // What a double holds between two singles is rounded; a single of its own says to which.
    let nudged = |v: f32| f64::from(v) * (1.0 + 1e-9);
    change(&model, |tensors| {
        *tensors = retyped(std::mem::take(tensors), Dtype::F64, |v| nudged(v).to_le_bytes().to_vec())
    });
    model.config(|config| config["dtype"] = "float64".into());
    let single = Room::new();
    let other = single.model();
    change(&other, |tensors| {
        *tensors = retyped(std::mem::take(tensors), Dtype::F32, |v| (nudged(v) as f32).to_le_bytes().to_vec());
    });
    other.config(|config| config["dtype"] = "float32".into());
    for (format, file) in [("compressed-tensors", "model.safetensors"), ("gptq", "model.safetensors")] {
        let quantize = |room: &Room| {
            let args =
                ["quantize", "model", "-o", "out", "--force", "--format", format, "--samples", "4", "--seq-len", "64"];
            let run = room.run(args.iter().chain(&["--verify-windows", "1", "--calibration", TEXT]));
            run.succeeds();
            run.stderr()
        };
        let told = quantize(&room);
        assert!(told.contains("20 tensors of type F64 were rounded to F32"), "{told}");
        assert!(!quantize(&single).contains("F64"));
        for file in [file, "config.json"] {
            let [a, b] = [&room, &single].map(|room| std::fs::read(room.path("out").join(file)).unwrap());
            assert!(a == b, "{format}: {file}");
        }
    }
    for room in [&room, &single] {
        room.run(["convert", "model", "-o", "plain"]).succeeds();
        let args = ["quantize", "model", "-o", "out.gguf", "--scheme", "Q8_0", "--verify-windows", "1"];
        room.run(args.iter().chain(&["--calibration", TEXT])).succeeds();
    }
    assert!(read(&room.path("plain")) == read(&single.path("plain")));
    assert!(std::fs::read(room.path("out.gguf")).unwrap() == std::fs::read(single.path("out.gguf")).unwrap());
    // Beyond what a single holds.
    change(&model, |tensors| tensors.get_mut(DOWN).unwrap().2[..8].copy_from_slice(&1e300f64.to_le_bytes()));
    room.run(["quantize", "model", "-o", "out", "--force"].iter().chain(FAST))
        .refuses(1, &["model/model.safetensors", DOWN, "at index 0 is beyond F32's largest"]);
}

#[test]
fn eight_bits_are_plain_numbers_unless_there_are_scales() {
    let room = Room::new();
    let model = room.model();
    change(&model, |tensors| {
        let shape = tensors[DOWN].1.clone();
        add(tensors, DOWN, Dtype::F8_E4M3, &shape);
    });
    room.run(["quantize", "model", "-o", "out", "--verify-windows", "1"].iter().chain(&FAST[..4])).succeeds();
    change(&model, |tensors| add(tensors, &format!("{DOWN}_scale_inv"), Dtype::F32, &[2, 6]));
    for args in [&["quantize", "model", "-o", "no"][..], &["eval", "model"]] {
        room.run(args).refuses(1, &[DOWN, "F8_E4M3", "down_proj.weight_scale_inv", "quantization_config"]);
    }
    // Numbers that are no weights are found before the work begins.
    change(&model, |tensors| {
        tensors.retain(|name, _| !name.ends_with("scale_inv"));
        add(tensors, DOWN, Dtype::I8, &[256, 768]);
    });
    room.run(["quantize", "model", "-o", "no"]).refuses(1, &["model: tensor", DOWN, "is of type I8, and weights are"]);
}

/// The model as its bare class saves it, or with a head for labels.
fn headless(room: &Room, class: &str, tied: bool) {
    let model = room.model();
    model.config(|config| {
        config["architectures"] = json!([class]);
        config["tie_word_embeddings"] = tied.into();
    });
    let bare = class.ends_with("Model");
    change(&model, |tensors| {
        let name = |name: String| if bare { name["model.".len()..].to_owned() } else { name };
        *tensors = std::mem::take(tensors).into_iter().map(|(old, tensor)| (name(old), tensor)).collect();
        if !bare {
            add(tensors, "score.weight", Dtype::BF16, &[3, 256]);
        }
    });
    room.file("model/modules.json", r#"[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#);
    room.file("model/1_Pooling/config.json", r#"{"pooling_mode_lasttoken": true}"#);
}

#[test]
fn a_model_without_a_head_is_quantized_with_data_and_its_hidden_states_are_compared() {
    let quick =
        ["--samples", "4", "--seq-len", "64", "--verify-windows", "1", "--group-size", "64", "--calibration", TEXT];
    let mut weights = Vec::new();
    for (class, tied) in [("LlamaModel", false), ("LlamaModel", true), ("LlamaForSequenceClassification", false)] {
        let room = Room::new();
        headless(&room, class, tied);
        for format in ["compressed-tensors", "gptq", "awq"] {
            let scheme = if format == "awq" { "W4A16_ASYM" } else { "W8A16" };
            let args = ["quantize", "model", "-o", "out", "--force", "--format", format, "--scheme", scheme];
            let run = room.run(args.iter().chain(&quick));
            run.succeeds();
            let told = run.stderr();
            assert!(
                told.contains("no output projection: its hidden states on ") && told.contains("with the original's, "),
                "{told}"
            );
            let unpacked_late = told.contains("sentence-transformers calls the forward() of the model itself");
            assert_eq!(unpacked_late, format == "compressed-tensors", "{told}");
            let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
            let found = |key: &str| report["hidden_states"][key].as_f64().unwrap();
            let (mean, error) = if format == "awq" { (0.9, 0.4) } else { (0.999, 0.05) };
            assert!(found("cosine_mean") > mean && found("relative_error") < error, "{format}: {report:#}");
            assert!(found("cosine_min") <= found("cosine_mean") && found("relative_error") > 0.0);
            assert_eq!(report["quality"], Value::Null);
            assert!(room.path("out/1_Pooling/config.json").exists() && room.path("out/modules.json").exists());
            let out = read(&room.path("out"));
            assert_eq!(out.contains_key("score.weight"), class != "LlamaModel");
            assert!(!out.contains_key("lm_head.weight"));
            if format == "gptq" {
                let codes = out.into_iter().filter(|(name, _)| name.ends_with("qweight"));
                weights.push(codes.map(|(_, tensor)| tensor).collect::<Vec<_>>());
            }
        }
        let args = ["quantize", "model", "-o", "m.gguf", "--scheme", "Q8_0", "--verify-windows", "1"];
        room.run(args.iter().chain(&["--calibration", TEXT])).succeeds();
        let file = formats::GgufFile::open(room.path("m.gguf")).unwrap();
        assert_eq!(file.count("llama.pooling_type").unwrap(), Some(3));
        assert!(file.get("output.weight").is_none());
        room.run(["quantize", "model", "-o", "no", "--max-kld", "1"]).refuses(2, &["no output projection", "limits"]);
        room.run(["eval", "model"])
            .refuses(1, &["model: the model has no output projection", "give --reference MODEL"]);
        room.run(["convert", "model", "-o", "plain"]).succeeds();
        assert!(room.path("plain/1_Pooling/config.json").exists());
    }
    // The blocks do not depend on what stands behind them, nor on their names.
    assert!(weights[0] == weights[1] && weights[1] == weights[2]);
}

#[test]
fn a_head_that_is_there_counts_whatever_the_class() {
    let room = Room::new();
    room.model().config(|config| config["architectures"] = json!(["LlamaForCausalLM", "LlamaModel"]));
    room.run(["eval", "model", "--windows", "1"]).succeeds();
    let room = Room::new();
    let model = room.model();
    model.config(|config| config["architectures"] = json!(["LlamaModel"]));
    change(&model, |tensors| {
        drop(tensors.insert("lm_head.weight".to_owned(), tensors["model.embed_tokens.weight"].clone()))
    });
    room.run(["eval", "model", "--windows", "1"]).succeeds();
}

#[test]
fn layers_that_config_json_does_not_count_are_not_run() {
    let room = Room::new();
    let model = room.whole_model();
    model.config(|config| config["num_hidden_layers"] = 2.into());
    let run = room.run(["quantize", "model", "-o", "out"].iter().chain(FAST));
    run.succeeds();
    assert!(run.stderr().contains("and 17 more (a layer beyond those that config.json counts)"), "{}", run.stderr());
    room.run(["quantize", "model", "-o", "no", "--unknown-tensors", "refuse"].iter().chain(FAST))
        .refuses(1, &["model.layers.2.", "beyond"]);
    let drop = ["--unknown-tensors", "drop"];
    room.run(["quantize", "model", "-o", "less"].iter().chain(FAST).chain(&drop)).succeeds();
    assert!(!read(&room.path("less")).keys().any(|name| name.contains("layers.2")));
}

#[test]
fn what_a_known_family_lacks_is_missed_by_every_command() {
    let room = Room::new();
    let model = room.model();
    crate::folders::small_adapter(&room.path("adapter"));
    change(&model, |tensors| drop(tensors.remove(DOWN)));
    for command in [
        &["convert", "model", "-o", "out"][..],
        &["merge", "model", "--adapter", "adapter", "-o", "out"],
        &["eval", "model"],
    ] {
        room.run(command).refuses(1, &["model", DOWN, "is missing"]);
    }
    assert_eq!(room.names(), ["adapter", "model"]);
}

#[test]
fn a_file_of_another_name_is_read_with_a_note() {
    let room = Room::new();
    let model = room.model();
    std::fs::rename(model.path("model.safetensors"), model.path("weights.safetensors")).unwrap();
    let run = room.run(["convert", "model", "-o", "out"]);
    run.succeeds();
    assert!(run.stderr().contains("weights.safetensors was read, the only safetensors file"), "{}", run.stderr());
}

#[test]
fn two_tensors_for_one_weight_are_refused() {
    for twin in ["layers.0.mlp.up_proj.weight", "model.model.norm.weight"] {
        let room = Room::new();
        let model = room.model();
        model.weights(|header, data| {
            let known =
                if twin.starts_with("layers") { "model.layers.0.mlp.up_proj.weight" } else { "model.norm.weight" };
            let mut copy = header[known].clone();
            // Nothing of its own: the data of no tensor may be shared.
            copy["shape"] = json!([1]);
            copy["data_offsets"] = json!([data.len(), data.len() + 2]);
            data.extend([0, 0]);
            header.insert(twin.to_owned(), copy);
        });
        room.run(["convert", "model", "-o", "out"]).refuses(1, &[twin, "another tensor for a weight that is there"]);
        room.run(["convert", "model", "-o", "out", "--unknown-tensors", "drop"]).succeeds();
    }
}

#[test]
fn what_a_quantized_checkpoint_says_of_activations_and_caches_is_told() {
    let room = Room::new();
    room.model();
    room.run([&["quantize", "model", "-o", "packed"], FAST].concat()).succeeds();
    let plain = room.run(["convert", "packed", "-o", "out"]);
    plain.succeeds();
    assert!(!plain.stderr().contains("cache of keys"), "{}", plain.stderr());
    let path = room.path("packed/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["quantization_config"]["kv_cache_scheme"] = json!({"num_bits": 8, "type": "float"});
    std::fs::write(&path, config.to_string()).unwrap();
    let run = room.run(["convert", "packed", "-o", "out", "--force"]);
    run.succeeds();
    assert!(run.stderr().contains("and its kv_cache_scheme were left out"), "{}", run.stderr());
    change_in(&room.path("packed"), |tensors| {
        add(tensors, "model.layers.0.self_attn.k_scale", Dtype::F32, &[1]);
        add(tensors, "model.layers.0.self_attn.q_proj.input_scale", Dtype::F32, &[1]);
    });
    for command in
        [&["convert", "packed", "-o", "out", "--force"][..], &[&["quantize", "packed", "-o", "again"], FAST].concat()]
    {
        let run = room.run(command);
        run.succeeds();
        let told = "its 2 scales for activations or the cache of keys and values (`model.layers.0.self_attn.k_scale`) and its kv_cache_scheme";
        assert!(run.stderr().contains(told), "{}", run.stderr());
    }
}

#[test]
fn a_type_that_the_weights_do_not_have_is_told() {
    let room = Room::new();
    room.model().config(|config| config["dtype"] = json!("float32"));
    let run = room.run(["convert", "model", "-o", "out"]);
    run.succeeds();
    assert!(run.stderr().contains("the weights are F32, and most are stored as BF16"), "{}", run.stderr());
    let written: Value = serde_json::from_slice(&std::fs::read(room.path("out/config.json")).unwrap()).unwrap();
    let said = ["dtype", "torch_dtype"].map(|key| written[key].as_str().unwrap_or("bfloat16").to_owned());
    assert_eq!(said, ["bfloat16", "bfloat16"], "{written}");
}

/// What transformers saves with `save_original_format=False` has the names of its class, which no runtime reads.
#[test]
fn names_of_a_class_in_memory_are_told() {
    let room = crate::families::checkpoint("hy_v4_published");
    let module = "model.layers.0.self_attn";
    crate::harness::Model::at(room.path()).weights(|header, _| {
        let entry = header.shift_remove(&format!("{module}.linear_gate.weight")).unwrap();
        header.insert(format!("{module}.gate_proj.weight"), entry);
    });
    let recipe = toml::from_str("method = 'rtn'\ngroup_size = 32").unwrap();
    let recipe = quantc::recipe::Recipe::resolve(recipe).unwrap();
    let output = tempfile::tempdir().unwrap();
    let job = quantc::job::Job::one(room.path(), &output.path().join("out"), recipe, None, false);
    let done = job.run_one(&kernels::Cpu::exact(), &mut quantc::progress::Progress::new(true));
    let error = done.unwrap_err().to_string();
    let words = format!("the file has it in `{module}.gate_proj.weight`, as transformers' class calls it in memory");
    assert!(error.contains(&words) && error.contains("without save_original_format=False"), "{error}");
}
