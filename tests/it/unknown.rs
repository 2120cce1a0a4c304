//! Models of families that are not known, and names of tensors that no runtime knows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use formats::codec::read_quantization;
use formats::{Dtype, ShardedWriter, TensorSpec};
use quantc::Checkpoint;
use quantc::weights::StoredType;
use serde_json::{Value, json};

use crate::harness::{Model, Room};

const RTN: [&str; 6] = ["--method", "rtn", "--verify-text", "none", "--group-size", "32"];
const LAYOUTS: [[&str; 4]; 3] = [
    ["--format", "compressed-tensors", "--scheme", "W8A16"],
    ["--format", "gptq", "--scheme", "W8A16"],
    ["--format", "awq", "--scheme", "W4A16_ASYM"],
];

/// Writes a checkpoint whose values differ from tensor to tensor.
fn write(folder: &Path, config: &Value, tensors: &[(String, Vec<usize>)]) {
    write_as(Dtype::BF16, folder, config, tensors);
}

/// [`write`] in BF16, or in F32 with the same values.
pub fn write_as(dtype: Dtype, folder: &Path, config: &Value, tensors: &[(String, Vec<usize>)]) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let spec = |(name, shape): &(String, Vec<usize>)| TensorSpec { name: name.clone(), dtype, shape: shape.clone() };
    let writer = ShardedWriter::create(folder, tensors.iter().map(spec).collect(), 1 << 30, &BTreeMap::new()).unwrap();
    for (index, (name, shape)) in tensors.iter().enumerate() {
        let values = (0..shape.iter().product::<usize>()).map(|i| ((i * 37 + index * 11) % 251) as u16 | 0x3c00);
        let halves = |bits: u16| vec![bits.to_le_bytes()];
        let bytes = values.flat_map(|bits| match dtype {
            Dtype::F32 => [vec![[0, 0]], halves(bits)].concat(),
            _ => halves(bits),
        });
        writer.write(name, bytes.flatten().collect::<Vec<u8>>().as_slice()).unwrap();
    }
    writer.finish().unwrap();
}

/// Tensors of two layers, with a matrix of each kind that may be taken for a linear; and the modules that are linears.
fn unheard_of() -> (Vec<(String, Vec<usize>)>, BTreeSet<String>) {
    let mut tensors = Vec::new();
    let mut linears = BTreeSet::new();
    let mut add = |name: &str, shape: &[usize]| tensors.push((name.to_owned(), shape.to_vec()));
    add("model.embed_tokens.weight", &[96, 64]);
    for layer in 0..2 {
        let at = |rest: &str| format!("model.layers.{layer}.{rest}");
        for (module, rows) in [("self_attn.q_proj", 64), ("mlp.gate_proj", 96), ("mlp.experts.3.up_proj", 32)] {
            add(&at(&format!("{module}.weight")), &[rows, 64]);
            linears.insert(at(module));
        }
        add(&at("self_attn.q_proj.bias"), &[64]);
        add(&at("norm.weight"), &[64]);
        add(&at("mlp.router.weight"), &[32, 64]);
        add(&at("mlp.tiny_proj.weight"), &[8, 64]);
        add(&at("mamba.dt_proj.weight"), &[64, 64]);
        add(&at("moe.experts.gate_up_proj"), &[4, 64, 64]);
        add(&at("attn.in_proj_weight"), &[192, 64]);
        add(&at("attn.out_proj.weight"), &[64, 64]);
    }
    add("model.layers.2.eh_proj.weight", &[64, 128]);
    add("model.layers.2.self_attn.q_proj.weight", &[64, 64]);
    add("mtp.layers.0.self_attn.q_proj.weight", &[64, 64]);
    add("pooler.dense.weight", &[64, 64]);
    (tensors, linears)
}

fn config() -> Value {
    json!({"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"], "num_hidden_layers": 2})
}

/// Demands that `out` has codes for `linears` alone, everything else as in `model`, and a configuration that says so of each.
#[track_caller]
fn check(model: &Path, out: &Path, linears: &BTreeSet<String>) {
    let (plain, written) = (Checkpoint::open(model).unwrap(), Checkpoint::open(out).unwrap());
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let reader = read_quantization(&config).unwrap().unwrap();
    let mut quantized = BTreeSet::new();
    for entry in plain.entries() {
        let found = written.entry(&entry.name).unwrap_or_else(|| panic!("{} is missing", entry.name));
        let module = entry.name.strip_suffix(".weight");
        if let StoredType::Quantized { .. } = found.dtype {
            quantized.insert(module.unwrap().to_owned());
            continue;
        }
        assert_eq!(plain.raw(&entry.name).unwrap().data, written.raw(&entry.name).unwrap().data, "{}", entry.name);
        let Some(module) = module.filter(|module| entry.shape.len() > 1 && *module != "lm_head") else { continue };
        assert_eq!(reader.declared(module).unwrap(), None, "{module} has no codes: {config}");
    }
    assert_eq!(&quantized, linears);
}

#[test]
fn what_is_no_linear_stays_and_is_named_in_every_layout() {
    let room = Room::new();
    let (mut tensors, linears) = unheard_of();
    write(&room.path("tied"), &config(), &tensors);
    tensors.push(("lm_head.weight".to_owned(), vec![96, 64]));
    // A head that is stored counts, whatever the configuration says.
    let mut saying_tied = config();
    saying_tied["tie_word_embeddings"] = true.into();
    write(&room.path("model"), &saying_tied, &tensors);
    for (index, layout) in LAYOUTS.iter().enumerate() {
        for model in ["model", "tied"] {
            let out = format!("{model}-{index}");
            room.run(["quantize", model, "-o", &out].iter().chain(&RTN).chain(layout)).succeeds();
            check(&room.path(model), &room.path(&out), &linears);
        }
    }
    let ignored = |out: &str| {
        let config: Value =
            serde_json::from_slice(&std::fs::read(room.path(out).join("config.json")).unwrap()).unwrap();
        config["quantization_config"]["ignore"]
            .as_array()
            .unwrap()
            .iter()
            .map(|n| n.as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let (own, tied) = (ignored("model-0"), ignored("tied-0"));
    for name in [r"re:.*\.\d+\.mlp\.router$", r"re:.*\.\d+\.moe\.experts$", "mtp.layers.0.self_attn.q_proj", "lm_head"]
    {
        assert!(own.contains(&name.to_owned()) && tied.contains(&name.to_owned()), "{name}: {own:?}");
    }
    // Heads that share the embedding's tensor have no name in the file.
    let head = "cls.predictions.decoder".to_owned();
    assert!(!own.contains(&head) && tied.contains(&head), "{tied:?}");
}

#[test]
fn matrices_with_their_columns_first_are_no_linears() {
    let room = Room::new();
    let mut tensors = vec![("h.0.c_attn.weight".to_owned(), vec![64, 192]), ("h.0.c_attn.bias".to_owned(), vec![192])];
    tensors.extend([("h.0.c_proj.weight".to_owned(), vec![64, 64]), ("h.0.c_proj.bias".to_owned(), vec![64])]);
    // Norms have weights and biases of one extent.
    tensors.extend(["weight", "bias"].map(|part| (format!("h.0.ln_1.{part}"), vec![64])));
    write(&room.path("model"), &config(), &tensors);
    room.run(["quantize", "model", "-o", "out"].iter().chain(&RTN)).refuses(1, &["family is unknown", "Conv1D"]);
    room.run(["convert", "model", "-o", "copy"]).succeeds();
    // One beside them whose bias says that it is a linear.
    tensors.extend([("h.0.fc.weight".to_owned(), vec![96, 64]), ("h.0.fc.bias".to_owned(), vec![96])]);
    write(&room.path("mixed"), &config(), &tensors);
    room.run(["quantize", "mixed", "-o", "out"].iter().chain(&RTN)).succeeds();
    check(&room.path("mixed"), &room.path("out"), &BTreeSet::from(["h.0.fc".to_owned()]));
}

#[test]
fn only_the_language_of_a_model_that_sees_is_quantized_and_the_rest_is_named_as_a_whole() {
    let room = Room::new();
    let names = [
        "language_model.model.layers.0.fc",
        "vision_tower.layers.0.fc",
        "ears.layers.0.fc",
        "bridge.linear_1",
        "language_model.model.layers.0.gate",
    ];
    let tensors: Vec<_> = names.iter().map(|name| (format!("{name}.weight"), vec![64, 64])).collect();
    let config = json!({"model_type": "seeing", "text_config": {"model_type": "unheard_of"}});
    write(&room.path("model"), &config, &tensors);
    for (index, layout) in LAYOUTS.iter().enumerate() {
        let out = format!("out-{index}");
        room.run(["quantize", "model", "-o", &out].iter().chain(&RTN).chain(layout)).succeeds();
        check(&room.path("model"), &room.path(&out), &BTreeSet::from([names[0].to_owned()]));
        let config: Value =
            serde_json::from_slice(&std::fs::read(room.path(&out).join("config.json")).unwrap()).unwrap();
        // As transformers calls them today, whatever the file says.
        let reader = read_quantization(&config).unwrap().unwrap();
        let inner = "model.language_model.layers.0.";
        assert!(reader.declared(&format!("{inner}fc")).unwrap().is_some(), "{config}");
        for name in [&format!("{inner}gate"), "model.vision_tower.layers.0.fc", "model.ears.layers.0.fc"] {
            assert_eq!(reader.declared(name).unwrap(), None, "{name}: {config}");
        }
    }
}

#[test]
fn a_layout_that_cannot_tell_modules_apart_by_name_is_refused() {
    let room = Room::new();
    let names = ["layers.0.mlp.gate_proj", "layers.0.mlp.gate"];
    let tensors: Vec<_> = names.iter().map(|name| (format!("{name}.weight"), vec![64, 64])).collect();
    write(&room.path("model"), &config(), &tensors);
    let run = |layout: &[&str]| room.run(["quantize", "model", "-o", "out"].iter().chain(&RTN).chain(layout));
    run(&LAYOUTS[2]).refuses(2, &["layers.0.mlp.gate_proj", "--ignore", "--format"]);
    run(&LAYOUTS[0]).succeeds();
    check(&room.path("model"), &room.path("out"), &BTreeSet::from([names[0].to_owned()]));
}

/// Gives the tensors of a model other names.
fn rename(model: &Model, change: impl Fn(&str) -> String) {
    model.weights(|header, _| {
        let renamed = std::mem::take(header).into_iter().map(|(name, info)| match name.as_str() {
            "__metadata__" => (name, info),
            _ => (change(&name), info),
        });
        header.extend(renamed);
    });
}

#[test]
fn names_of_training_are_written_as_the_architecture_has_them() {
    let plain = Room::new();
    plain.model();
    let quantize = ["quantize", "model", "-o", "out"];
    plain.run(quantize.iter().chain(&RTN)).succeeds();
    plain.run(["convert", "model", "-o", "plain"]).succeeds();
    let file = |room: &Room, path: &str| std::fs::read(room.path(path).join("model.safetensors")).unwrap();
    type Spelling = (&'static str, fn(&str) -> String);
    let spellings: [Spelling; 7] = [
        ("module.", |name| format!("module.{name}")),
        ("compiled", |name| format!("_orig_mod.{name}")),
        ("in the middle", |name| {
            name.replace("layers.1.", "layers.1._orig_mod.").replace("mlp.", "mlp._fsdp_wrapped_module.")
        }),
        ("both", |name| format!("module._orig_mod.{name}")),
        ("PEFT's", |name| format!("base_model.model.{name}")),
        ("another model's", |name| format!("language_model.{name}")),
        ("the base model's", |name| name.replace("model.", "")),
    ];
    for (what, spelling) in spellings {
        let room = Room::new();
        rename(&room.model(), spelling);
        let run = room.run(quantize.iter().chain(&RTN));
        run.succeeds();
        assert!(run.stderr().contains("names were rewritten"), "{what}: {}", run.stderr());
        assert!(file(&room, "out") == file(&plain, "out"), "{what}");
        let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
        assert!(report["notes"].to_string().contains("names were rewritten"), "{what}");
        let run = room.run(["convert", "model", "-o", "plain"]);
        run.succeeds();
        assert!(run.stderr().contains("names were rewritten"), "{what}: {}", run.stderr());
        assert!(file(&room, "plain") == file(&plain, "plain"), "{what}");
        // What was written is looked at as strictly as runtimes do.
        assert!(Checkpoint::open_strictly(&room.path("out")).is_ok());
        let error = Checkpoint::open_strictly(&room.path("model")).unwrap_err().to_string();
        assert!(error.contains("no runtime would find"), "{what}: {error}");
    }
}

#[test]
fn a_base_class_keeps_its_names() {
    let room = Room::new();
    let model = room.model();
    rename(&model, |name| name.replace("model.", ""));
    model.config(|config| config["architectures"] = json!(["LlamaModel"]));
    let run = room.run(["quantize", "model", "-o", "out", "--verify-windows", "1"].iter().chain(&RTN[..2]));
    run.succeeds();
    assert!(!run.stderr().contains("rewritten"), "{}", run.stderr());
    let written = Checkpoint::open_strictly(&room.path("out")).unwrap();
    assert!(written.entry("layers.0.mlp.up_proj.weight").is_some());
}

#[test]
fn names_that_cannot_be_put_right_are_refused() {
    let room = Room::new();
    let model = room.model();
    rename(&model, |name| match name {
        "model.norm.weight" => "model.layers.0._orig_mod.input_layernorm.weight".to_owned(),
        other => other.to_owned(),
    });
    let quantize = ["quantize", "model", "-o", "out"];
    room.run(quantize.iter().chain(&RTN)).refuses(1, &["model.layers.0.input_layernorm.weight", "would be called so"]);
    let room = Room::new();
    rename(&room.model(), |name| format!("base_model.model.{}", name.replace("q_proj.", "q_proj.base_layer.")));
    room.run(quantize.iter().chain(&RTN)).refuses(1, &["q_proj.base_layer.weight", "merge_and_unload", "--adapter"]);
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn a_weight_that_other_layers_have_is_missed() {
    let room = Room::new();
    let (mut tensors, _) = unheard_of();
    tensors.retain(|(name, _)| name != "model.layers.1.self_attn.q_proj.weight");
    write(&room.path("model"), &config(), &tensors);
    let words = ["tensor `model.layers.1.self_attn.q_proj.weight` is missing", "its bias is there"];
    room.run(["quantize", "model", "-o", "out"].iter().chain(&RTN)).refuses(1, &words);
}

/// DBRX has its attention in a module that is called after its norms, and the weights of all experts in one matrix.
#[test]
fn attention_among_norms_is_quantized_and_flat_stacks_are_named() {
    let room = Room::new();
    let mut tensors = vec![("transformer.wte.weight".to_owned(), vec![96, 64])];
    let mut linears = BTreeSet::new();
    for layer in 0..2 {
        let at = |rest: &str| format!("transformer.blocks.{layer}.{rest}");
        for (module, rows) in [("norm_attn_norm.attn.Wqkv", 96), ("norm_attn_norm.attn.out_proj", 64)] {
            tensors.push((at(&format!("{module}.weight")), vec![rows, 64]));
            linears.insert(at(module));
        }
        tensors.push((at("norm_attn_norm.norm_1.weight"), vec![64]));
        tensors.push((at("ffn.router.layer.weight"), vec![4, 64]));
        tensors.extend(["w1", "v1", "w2"].map(|part| (at(&format!("ffn.experts.mlp.{part}")), vec![4 * 32, 64])));
    }
    tensors.push(("lm_head.weight".to_owned(), vec![96, 64]));
    let config = json!({"model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "n_layers": 2});
    write(&room.path("model"), &config, &tensors);
    for (index, layout) in LAYOUTS.iter().enumerate() {
        let out = format!("out-{index}");
        room.run(["quantize", "model", "-o", &out].iter().chain(&RTN).chain(layout)).succeeds();
        check(&room.path("model"), &room.path(&out), &linears);
        let config = std::fs::read_to_string(room.path(&out).join("config.json")).unwrap();
        assert!(config.contains("ffn") && config.contains("experts"), "{config}");
    }
}

#[test]
fn only_classes_that_ask_for_packed_weights_are_said_to() {
    let room = Room::new();
    let (tensors, _) = unheard_of();
    for (model_type, asks) in
        [("falcon", true), ("rwkv", true), ("t5", true), ("bloom", false), ("opt", false), ("unheard_of", false)]
    {
        let config = json!({"model_type": model_type});
        write(&room.path(model_type), &config, &tensors);
        let out = format!("out-{model_type}");
        let run = room.run(["quantize", model_type, "-o", &out].iter().chain(&RTN).chain(&LAYOUTS[0]));
        run.succeeds();
        assert_eq!(run.stderr().contains("dequantize=True"), asks, "{model_type}: {}", run.stderr());
    }
}

/// A file may name what is left out otherwise than transformers does once it has loaded it.
#[test]
fn what_stays_is_named_as_transformers_calls_it_too() {
    let room = Room::new();
    let cases = [
        (
            "phimoe",
            "model.layers",
            vec!["block_sparse_moe.gate"],
            vec!["mlp.router"],
            ["self_attn.q_proj", "self_attn.q_proj"],
        ),
        (
            "inkling2_text",
            "model.llm.layers",
            vec!["attn.gate_attn", "mlp.gate"],
            vec!["self_attn.gate_proj", "mlp.gate"],
            ["attn.wq_du", "self_attn.q_proj"],
        ),
    ];
    for (model_type, list, kept, loaded, [packed, called]) in cases {
        let mut tensors = Vec::new();
        let mut linears = BTreeSet::new();
        for layer in 0..2 {
            let at = |rest: &&str| format!("{list}.{layer}.{rest}");
            tensors.extend(kept.iter().map(|name| (format!("{}.weight", at(name)), vec![64, 64])));
            tensors.push((format!("{}.weight", at(&packed)), vec![64, 64]));
            linears.insert(at(&packed));
        }
        write(&room.path(model_type), &json!({"model_type": model_type}), &tensors);
        for (index, layout) in LAYOUTS.iter().enumerate() {
            let out = format!("out-{model_type}-{index}");
            room.run(["quantize", model_type, "-o", &out].iter().chain(&RTN).chain(layout)).succeeds();
            check(&room.path(model_type), &room.path(&out), &linears);
            let config = std::fs::read(room.path(&out).join("config.json")).unwrap();
            let config: Value = serde_json::from_slice(&config).unwrap();
            let reader = read_quantization(&config).unwrap().unwrap();
            for name in &loaded {
                assert_eq!(reader.declared(&format!("model.layers.1.{name}")).unwrap(), None, "{name}: {config}");
            }
            assert!(reader.declared(&format!("model.layers.1.{called}")).unwrap().is_some(), "{config}");
        }
    }
}

/// RoBERTa-PreLayerNorm has `norm` in the name of the model, which says nothing of what is in it.
#[test]
fn the_name_of_a_model_does_not_decide_what_its_matrices_are() {
    let room = Room::new();
    let names =
        ["roberta_prelayernorm.encoder.layer.0.fc", "roberta_prelayernorm.encoder.layer.0.norm.fc", "norms.0.fc"];
    let tensors: Vec<_> = names.iter().map(|name| (format!("{name}.weight"), vec![64, 64])).collect();
    write(&room.path("model"), &config(), &tensors);
    room.run(["quantize", "model", "-o", "out"].iter().chain(&RTN)).succeeds();
    check(&room.path("model"), &room.path("out"), &BTreeSet::from([names[0].to_owned()]));
}

/// Classes that are not known may have kinds of layers of their own; those that are may not.
#[test]
fn nothing_is_said_of_kinds_of_layers_that_may_be_a_familys_own() {
    let room = Room::new();
    let (tensors, _) = unheard_of();
    let mut config = config();
    config["layer_types"] = json!(["new_attention", "full_attention"]);
    config["mlp_layer_types"] = json!(["hash_moe", "sparse"]);
    write(&room.path("model"), &config, &tensors);
    let run = room.run(["quantize", "model", "-o", "out"].iter().chain(&RTN));
    run.succeeds();
    assert!(!run.stderr().contains("layer_types"), "{}", run.stderr());
    let room = Room::new();
    let model = room.model();
    model.config(|config| config["layer_types"] = json!(vec!["new_attention"; 4]));
    let run = room.run(["inspect", "model"]);
    assert!(
        run.stderr().contains("\"new_attention\" in layer_types, which transformers 5 refuses"),
        "{}",
        run.stderr()
    );
}

#[test]
fn inspect_says_what_is_missing() {
    let room = Room::new();
    let (tensors, _) = unheard_of();
    write(&room.path("model"), &config(), &tensors);
    let run = room.run(["inspect", "model"]);
    for part in
        ["no family describes models of the type", "were found by name and shape; not among them are", "docs/models.md"]
    {
        assert!(run.stderr().contains(part), "{part}: {}", run.stderr());
    }
    let model = room.model();
    assert!(!room.run(["inspect", "model"]).stderr().contains("no family describes"));
    model.config(|config| config["num_key_value_heads"] = json!(3));
    let run = room.run(["inspect", "model"]);
    assert!(
        run.stderr().contains("it cannot be quantized: ")
            && run.stderr().contains("cannot share 3 key and value heads"),
        "{}",
        run.stderr()
    );
}

/// transformers looks for heads under the names of the parts that have them, and unpacks when the whole model is called.
#[test]
fn parts_of_an_encoder_and_decoder_have_their_heads_named() {
    let room = Room::new();
    let mut tensors = Vec::new();
    for part in ["encoder.encoder.layer", "decoder.model.decoder.layers"] {
        for layer in 0..2 {
            for module in ["self_attn.q_proj", "fc1"] {
                tensors.push((format!("{part}.{layer}.{module}.weight"), vec![64, 64]));
            }
        }
    }
    tensors.push(("decoder.model.decoder.embed_tokens.weight".to_owned(), vec![96, 64]));
    let out = |name: &str, tensors: &[(String, Vec<usize>)]| {
        let model = format!("{name}-model");
        write(&room.path(&model), &config(), tensors);
        let run = room.run(["quantize", &model, "-o", name].iter().chain(&RTN));
        run.succeeds();
        let config = std::fs::read(room.path(name).join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        (run.stderr(), config["quantization_config"]["ignore"].to_string())
    };
    let (told, ignored) = out("tied", &tensors);
    assert!(ignored.contains("\"decoder.lm_head\"") && !ignored.contains("\"encoder.lm_head\""), "{ignored}");
    assert!(told.contains("when the model as a whole is first called"), "{told}");
    // One that is stored stands for itself.
    tensors.push(("decoder.output_projection.weight".to_owned(), vec![96, 64]));
    let (_, ignored) = out("stored", &tensors);
    assert!(ignored.contains("\"decoder.output_projection\"") && !ignored.contains("decoder.lm_head"), "{ignored}");
    // A model of one stack is called as a whole.
    let (mut tensors, _) = unheard_of();
    tensors.retain(|(name, _)| name.contains(".layers.0.") || name.contains(".layers.1."));
    assert!(!out("one", &tensors).0.contains("when the model as a whole"));
}

/// Runtimes look for codes of every linear of the model's class, whether the files have it or not.
#[test]
fn linears_that_only_the_class_has_are_left_out_by_name_with_a_note() {
    let seen = ["vision", "visual", "projector"];
    for (family, expected) in [
        ("gemma3_vision", vec![r"re:(.*\.)?vision_tower\..*"]),
        ("llava_vision", vec![r"re:(.*\.)?multi_modal_projector\..*", r"re:(.*\.)?vision_tower\..*"]),
        ("mistral3_vision", vec![r"re:(.*\.)?multi_modal_projector\..*", r"re:(.*\.)?vision_tower\..*"]),
        ("qwen3_vl_vision", vec![r"re:(.*\.)?visual\..*"]),
    ] {
        let room = Room::new();
        let whole = crate::families::checkpoint(family);
        let opened = Checkpoint::open(whole.path()).unwrap();
        let of_text = opened.entries().iter().filter(|entry| !seen.iter().any(|word| entry.name.contains(word)));
        let tensors: Vec<(String, Vec<usize>)> = of_text.map(|e| (e.name.clone(), e.shape.clone())).collect();
        write(&room.path("model"), opened.config(), &tensors);
        let run = room.run(["quantize", "model", "-o", "out", "--scheme", "W8A16"].iter().chain(&RTN));
        run.succeeds();
        let class = opened.config()["architectures"][0].as_str().unwrap();
        assert!(run.stderr().contains("the model's files have no linears in "), "{family}: {}", run.stderr());
        assert!(run.stderr().contains(&format!(", which {class} has")), "{family}: {}", run.stderr());
        let written = std::fs::read_to_string(room.path("out/config.json")).unwrap();
        let written: Value = serde_json::from_str(&written).unwrap();
        let ignore = written["quantization_config"]["ignore"].as_array().unwrap();
        expected.iter().for_each(|name| assert!(ignore.contains(&json!(name)), "{family}: {ignore:?}"));
        let run = room.run(["convert", "model", "-o", "plain"]);
        run.succeeds();
        assert!(run.stderr().contains(&format!(", which {class} has")), "{family}: {}", run.stderr());
        // With all its tensors there is nothing to tell.
        let model = whole.path().to_str().unwrap();
        let run = room.run(["quantize", model, "-o", "whole", "--scheme", "W8A16"].iter().chain(&RTN));
        run.succeeds();
        assert!(!run.stderr().contains("have no linears in"), "{family}: {}", run.stderr());
    }
    // Where the class is not known well enough, names that it does not have are told.
    let room = Room::new();
    let (tensors, _) = unheard_of();
    let config = json!({"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"], "text_config": {"model_type": "mllama_text_model"}});
    write(&room.path("model"), &config, &tensors);
    let run = room.run(["quantize", "model", "-o", "out", "--scheme", "W8A16"].iter().chain(&RTN));
    run.succeeds();
    let told = "config.json names the class MllamaForConditionalGeneration, whose linears transformers looks for in such places as \
                `model.language_model.layers`, and the files have none there";
    assert!(run.stderr().contains(told), "{}", run.stderr());

    let room = Room::new();
    let config = json!({"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 1});
    let mut tensors = vec![("embeddings.word_embeddings.weight".to_owned(), vec![96, 64])];
    for module in ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"] {
        tensors.push((format!("encoder.layer.0.{module}.weight"), vec![64, 64]));
    }
    write(&room.path("model"), &config, &tensors);
    let run = room.run(["quantize", "model", "-o", "out", "--scheme", "W8A16"].iter().chain(&RTN));
    run.succeeds();
    let told = "the model's files have no linears in `pooler`, which BertModel has: transformers makes them up";
    assert!(run.stderr().contains(told), "{}", run.stderr());
    let written = std::fs::read_to_string(room.path("out/config.json")).unwrap();
    assert!(written.contains("pooler"), "{written}");
}

/// The text of a model that also sees, by names of its own, gets those that the class of the whole has.
#[test]
fn text_under_the_configuration_of_a_model_that_sees_gets_the_names_of_its_class() {
    for (family, place) in [
        ("gemma3_vision", "model.language_model."),
        ("llava_vision", "model.language_model."),
        ("mistral3_vision", "model.language_model."),
        ("qwen3_vl_vision", "model.language_model."),
        ("llama4_vision", "language_model.model."),
    ] {
        let whole = crate::families::checkpoint(family);
        let opened = Checkpoint::open(whole.path()).unwrap();
        let head = opened.entries().iter().find(|entry| entry.name.ends_with("lm_head.weight")).map(|e| e.name.clone());
        for (alone, prefix) in [(true, "model."), (true, ""), (false, "model."), (true, "text.")] {
            let room = Room::new();
            let mut expected = BTreeSet::new();
            let tensors: Vec<(String, Vec<usize>)> = opened
                .entries()
                .iter()
                .filter_map(|entry| {
                    if Some(&entry.name) == head.as_ref() {
                        expected.insert(
                            if place.starts_with("model") { "lm_head.weight" } else { "language_model.lm_head.weight" }
                                .to_owned(),
                        );
                        return Some(("lm_head.weight".to_owned(), entry.shape.clone()));
                    }
                    let Some((_, rest)) = entry.name.split_once("language_model.") else {
                        expected.extend((!alone).then(|| entry.name.clone()));
                        return (!alone).then(|| (entry.name.clone(), entry.shape.clone()));
                    };
                    let rest = rest.strip_prefix("model.").unwrap_or(rest);
                    expected.insert(format!("{place}{rest}"));
                    Some((format!("{prefix}{rest}"), entry.shape.clone()))
                })
                .collect();
            write(&room.path("model"), opened.config(), &tensors);
            let renamed = Checkpoint::open(&room.path("model")).unwrap();
            let names: BTreeSet<String> = renamed.entries().iter().map(|entry| entry.name.clone()).collect();
            assert_eq!(names, expected, "{family} from {prefix:?}");
            assert!(renamed.remarks().iter().any(|note| note.contains("names were rewritten")), "{family}");
        }
        // Names that runtimes know stay.
        assert!(!opened.remarks().iter().any(|note| note.contains("rewritten")), "{family}: {:?}", opened.remarks());
    }
    let flat = crate::families::checkpoint("qwen2_vl_flat");
    assert!(Checkpoint::open_strictly(flat.path()).is_ok());
}

/// Tensors of a plain decoder of so many layers.
fn decoder(layers: usize) -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![320, 64])];
    for layer in 0..layers {
        for (module, shape) in [("attn.q", [64, 64]), ("attn.v", [32, 64]), ("fc1", [128, 64]), ("fc2", [64, 128])] {
            tensors.push((format!("model.layers.{layer}.{module}.weight"), shape.to_vec()));
            tensors.push((format!("model.layers.{layer}.{module}.bias"), vec![shape[0]]));
        }
        tensors.push((format!("model.layers.{layer}.norm.weight"), vec![64]));
    }
    tensors
}

#[test]
fn a_model_that_surely_lacks_something_is_refused() {
    let config = |more: Value| {
        let mut config = json!({"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"],
            "num_hidden_layers": 4, "vocab_size": 320});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    type Change = fn(&mut Vec<(String, Vec<usize>)>);
    let cases: [(Change, Value, &str); 6] = [
        (
            |t| t.retain(|(name, _)| !name.contains("layers.2.")),
            json!({}),
            "all tensors of `model.layers.2` are missing",
        ),
        (|t| t.remove(0).0.clear(), json!({}), "no tensor has the 320 rows of the embedding"),
        (
            |t| {
                t.iter_mut()
                    .filter(|(name, _)| name == "model.layers.1.fc1.weight")
                    .for_each(|(_, shape)| shape.reverse())
            },
            json!({}),
            "tensor `model.layers.1.fc1.weight` has shape [64, 128], and those of all other layers [128, 64]",
        ),
        (
            |t| {
                t.iter_mut()
                    .filter(|(name, _)| name == "model.layers.0.fc2.weight")
                    .for_each(|(_, shape)| shape.reverse())
            },
            json!({}),
            "tensor `model.layers.0.fc2.weight` has shape [128, 64]",
        ),
        // Layers without anything are a kind of their own where settings of layers differ.
        (|t| t.retain(|(name, _)| !name.contains("layers.2.")), json!({"block_configs": [1, 2, 3, 4]}), ""),
        (|t| t.retain(|(name, _)| !name.contains("layers.2.")), json!({"num_hidden_layers": 7}), ""),
    ];
    for (change, settings, told) in cases {
        let room = Room::new();
        let mut tensors = decoder(4);
        change(&mut tensors);
        write(&room.path("model"), &config(settings), &tensors);
        let quantize = room.run(["quantize", "model", "-o", "out"].iter().chain(&RTN));
        let check = room.run(["check", "model"]);
        match told {
            "" => {
                quantize.succeeds();
                check.succeeds();
            }
            told => {
                quantize.refuses(1, &[told, "download the weights again"]);
                room.run(["convert", "model", "-o", "out"]).refuses(1, &[told]);
                assert!(check.code() == Some(1) && check.stderr().contains(told), "{}", check.stderr());
            }
        }
    }
}

#[test]
fn what_a_model_probably_lacks_is_told_and_what_its_family_may_have_so_is_not() {
    type Keep = fn(&str) -> bool;
    let config = |key: &str, value: Value| {
        let mut config = json!({"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"],
            "num_hidden_layers": 4, "vocab_size": 320});
        config[key] = value;
        config
    };
    let no_fc1: Keep = |name| !name.contains("layers.1.fc1");
    let no_last: Keep = |name| !name.contains("layers.3.");
    let module = "`model.layers.1.fc1.weight` is missing, which all other layers have";
    let layer = "config.json counts 4 layers (num_hidden_layers), and the files have 3";
    let cases: [(Keep, Value, &str); 14] = [
        (|_| true, config("x", json!(1)), ""),
        (no_fc1, config("x", json!(1)), module),
        (
            |name| !name.contains("layers.1.fc1") && !name.contains("layers.2.attn.v"),
            config("x", json!(1)),
            "`model.layers.2.attn.v.weight`, `model.layers.1.fc1.weight` are missing",
        ),
        (|name| !name.contains("layers.0.attn.v"), config("x", json!(1)), "`model.layers.0.attn.v.weight` is missing"),
        (no_last, config("x", json!(1)), layer),
        // Hybrids say of each layer what it is, or have a rule for it.
        (no_fc1, config("layer_types", json!(["a", "b", "a", "a"])), ""),
        (no_fc1, config("attn_layer_period", json!(3)), ""),
        (no_fc1, config("num_kv_shared_layers", json!(2)), ""),
        // Two layers are no exception.
        (|name| !name.contains("layers.1.fc1") && !name.contains("layers.2.fc1"), config("x", json!(1)), ""),
        // Nor is a layer of another kind, which has tensors of its own, and such as lack several.
        (
            |name| !name.contains("layers.1.fc1") && (name.contains("layers.1.") || !name.contains("attn.q")),
            config("x", json!(1)),
            "",
        ),
        // ALBERT's layers, those of encoders beside decoders, and other ways of counting.
        (no_last, config("num_hidden_groups", json!(3)), ""),
        (no_last, config("decoder_layers", json!(3)), ""),
        (no_last, config("num_physical_layers", json!(3)), ""),
        (
            |name| !name.contains("layers.3.") && !name.contains("layers.2.") && !name.contains("layers.1."),
            config("x", json!(1)),
            "",
        ),
    ];
    for (keep, config, told) in cases {
        let room = Room::new();
        let mut tensors = decoder(4);
        tensors.retain(|(name, _)| keep(name));
        write(&room.path("model"), &config, &tensors);
        for command in
            [&["quantize", "model", "-o", "out"][..], &["check", "model"], &["convert", "model", "-o", "plain"]]
        {
            let options = if command[0] == "quantize" { &RTN[..] } else { &[] };
            let run = room.run(command.iter().chain(options));
            run.succeeds();
            let is_told =
                ["which all other layers have", "config.json counts"].iter().any(|words| run.stderr().contains(words));
            assert!(
                is_told != told.is_empty() && run.stderr().contains(told),
                "{command:?} {config}: {}",
                run.stderr()
            );
        }
    }
}

/// Linears of `model` that have codes when it is rounded.
fn packed(room: &Room, model: &str, out: &str) -> BTreeSet<String> {
    room.run(["quantize", model, "-o", out].iter().chain(&RTN).chain(&LAYOUTS[0])).succeeds();
    let written = Checkpoint::open(&room.path(out)).unwrap();
    let coded = written.entries().iter().filter(|entry| matches!(entry.dtype, StoredType::Quantized { .. }));
    coded.map(|entry| entry.name.clone()).collect()
}

/// Names alone tell of routers, indexers, what makes entries of tokens, streams, and convolutions.
#[test]
fn what_known_families_keep_whole_is_kept_where_nobody_knows_the_family() {
    let families = [
        "deepseek_v32_further",
        "deepseek_v4_further",
        "gemma3n_text_published",
        "lfm2_moe_plain",
        "nemotron_h_experts",
        "qwen3_5_moe_vision",
        "qwen4_exp_text_further",
    ];
    crate::families::each(&families, |family| {
        let room = Room::new();
        let known = crate::families::checkpoint(family);
        let opened = Checkpoint::open(known.path()).unwrap();
        let mut config = opened.config().clone();
        config["model_type"] = json!("unheard_of");
        config["architectures"] = json!(["UnheardOfForCausalLM"]);
        if config.get("text_config").is_some() {
            config["text_config"]["model_type"] = json!("unheard_of_text");
        }
        let tensors: Vec<_> = opened.entries().iter().map(|e| (e.name.clone(), e.shape.clone())).collect();
        write(&room.path("model"), &config, &tensors);
        let found = packed(&room, "model", "unknown");
        let wanted = packed(&room, known.path().to_str().unwrap(), "known");
        let more: Vec<&String> = found.difference(&wanted).collect();
        assert!(more.is_empty(), "{family}: {more:?}");
        assert!(!found.is_empty(), "{family}");
    });
}
