//! Mixtures of experts in compressed-tensors, of which transformers reads all experts by one group of the configuration: they are
//! written so that it reads them, or it is told who does not, or they are refused (`tests/runtimes/families.py` loads them).

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::families::checkpoint;
use crate::harness::{Model, Room, Run};

const EXPERTS: &str = r"re:.*\.experts\.\d.*";

/// Quantizes a checkpoint by rounding, as a recipe says.
fn quantize(room: &Room, model: &TempDir, recipe: &str) -> Run {
    room.file("recipe.toml", recipe);
    let model = model.path().to_str().unwrap();
    let run = [
        "quantize",
        model,
        "-o",
        "out",
        "--force",
        "--recipe",
        "recipe.toml",
        "--method",
        "rtn",
        "--verify-text",
        "none",
    ];
    room.run(run)
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// Targets and bits of each group, in order.
fn groups(room: &Room) -> Vec<(Vec<String>, u64)> {
    let config = config(&room.path("out"));
    let groups = config["quantization_config"]["config_groups"].as_object().unwrap();
    let strings = |list: &Value| list.as_array().unwrap().iter().map(|t| t.as_str().unwrap().to_owned()).collect();
    groups.values().map(|g| (strings(&g["targets"]), g["weights"]["num_bits"].as_u64().unwrap())).collect()
}

/// The group by which transformers reads experts: the first with a regular expression in which there is `experts`, else the first with
/// the name of a class.
fn read_by(groups: &[(Vec<String>, u64)]) -> &(Vec<String>, u64) {
    let regular = |target: &String| target.starts_with("re:");
    let named = groups.iter().find(|(targets, _)| targets.iter().any(|t| regular(t) && t.contains("experts")));
    named.or(groups.iter().find(|(targets, _)| targets.iter().any(|t| !regular(t)))).unwrap_or(&groups[0])
}

#[test]
fn the_group_of_routed_experts_stands_before_that_of_shared_ones() {
    let room = Room::new();
    for family in ["deepseek_v2_lite", "qwen2_moe_plain", "deepseek_v3_plain"] {
        let model = checkpoint(family);
        let recipe = format!("scheme = 'W8A16'\ngroup_size = 32\n[[override]]\nmatch = '{EXPERTS}'\nbits = 4");
        quantize(&room, &model, &recipe).succeeds();
        let groups = groups(&room);
        assert_eq!(read_by(&groups).1, 4, "{family}: {groups:?}");
        let eights = &groups.iter().find(|(_, bits)| *bits == 8).unwrap().0;
        assert!(eights.iter().any(|target| target.contains("shared_expert")), "{family}: {eights:?}");
        room.run(["convert", "out", "-o", "plain", "--force"]).succeeds();
    }
}

#[test]
fn experts_without_packed_codes_are_read_by_a_group_of_floats() {
    let room = Room::new();
    let model = checkpoint("qwen3_moe_plain");
    let of = |recipe: &str| {
        let run = quantize(&room, &model, recipe);
        run.succeeds();
        assert!(!run.stderr().contains("xperts"), "{recipe}: {}", run.stderr());
        room.run(["convert", "out", "-o", "plain", "--force"]).succeeds();
        let groups = groups(&room);
        let config = config(&room.path("out"));
        let first = read_by(&groups);
        let kind = config["quantization_config"]["config_groups"]["group_0"]["weights"]["type"].clone();
        (first.0 == ["re:^$experts"], kind, groups.len())
    };
    let group = "group_size = 32\n";
    // A group that no module has: it multiplies what has a byte for a weight, and leaves plain weights as they are.
    assert_eq!(of("scheme = 'W8A8'"), (true, json!("float"), 2));
    assert_eq!(of(&format!("scheme = 'W4A16'\n{group}ignore = ['{EXPERTS}']")), (true, json!("float"), 2));
    assert_eq!(of(&format!("scheme = 'NVFP4A16'\nignore = ['{EXPERTS}']")), (true, json!("float"), 2));
    assert_eq!(
        of(r"scheme = 'W8A8'
ignore = ['re:.*layers\.0\..*experts.*']"),
        (true, json!("float"), 2)
    );
    // Where a group does so, or all is packed, there is none.
    assert_eq!(of("scheme = 'FP8_DYNAMIC'"), (false, json!("float"), 1));
    assert_eq!(of(&format!("scheme = 'FP8_DYNAMIC'\nignore = ['{EXPERTS}']")), (false, json!("float"), 1));
    assert_eq!(of(&format!("scheme = 'W4A16'\n{group}")), (false, json!("int"), 1));
    let mixed = format!("scheme = 'W8A8'\n[[override]]\nmatch = '{EXPERTS}'\nscheme = 'FP8_DYNAMIC'");
    assert_eq!(of(&mixed), (false, json!("float"), 2));
    // Of a model without experts nothing is made up.
    quantize(&room, &checkpoint("qwen3_plain"), "scheme = 'W8A8'").succeeds();
    assert_eq!(groups(&room).len(), 1);
}

#[test]
fn experts_that_a_runtime_does_not_read_are_told_or_refused() {
    let room = Room::new();
    let model = checkpoint("qwen3_moe_plain");
    let said = |recipe: &str| {
        let run = quantize(&room, &model, recipe);
        run.succeeds();
        run.stderr()
    };
    let by = |pattern: &str, what: &str| {
        format!("scheme = 'W8A16'\ngroup_size = 32\n[[override]]\nmatch = '{pattern}'\n{what}")
    };
    assert!(said("scheme = 'NVFP4A16'").contains("does not read the global scales of experts"));
    let first = r"re:.*layers\.0\..*experts.*";
    for (recipe, held) in [
        (by(first, "bits = 4"), "held in W4A16 and those of `model.layers.1.mlp` in W8A16"),
        (by(first, "ignore = true"), "held as they are and those of `model.layers.1.mlp` in W8A16"),
        (by(first, "group_size = 16"), "held in one way and those of `model.layers.1.mlp` in another"),
    ] {
        let told = said(&recipe);
        assert!(told.contains(held) && told.contains("vLLM takes each layer for itself"), "{told}");
    }
    // One by one as floats transformers reads them; vLLM keeps the linears of an expert in one stack.
    let told = said("scheme = 'FP8_DYNAMIC'\nignore = ['re:.*experts.*down_proj']");
    assert!(told.contains("vLLM keeps them in one stack and does not load that; transformers does"), "{told}");
    for (pattern, what) in [
        ("re:.*experts.*down_proj", "bits = 4"),
        ("re:.*experts.*down_proj", "ignore = true"),
        (r"re:.*experts\.0\..*", "bits = 4"),
    ] {
        let run = quantize(&room, &model, &by(pattern, what));
        run.refuses(2, &["model.layers.0.mlp", "all be quantized alike", "give all experts of the model one scheme"]);
    }
}

/// Beside packed linears transformers has Llama 4's experts as modules.
#[test]
fn experts_of_llama_4_that_stay_as_they_are_leave_their_stack() {
    let room = Room::new();
    let model = checkpoint("llama4_text_every_layer");
    for recipe in [
        format!("group_size = 32\nignore = ['{EXPERTS}']"),
        "group_size = 32\nignore = ['re:.*experts.*down_proj']".to_owned(),
    ] {
        quantize(&room, &model, &recipe).succeeds();
        let written = formats::SafetensorsFile::open(room.path("out/model.safetensors")).unwrap();
        let names: Vec<String> = written.tensors().map(|spec| spec.name.clone()).collect();
        assert!(names.iter().any(|name| name == "model.layers.0.feed_forward.experts.0.down_proj.weight"), "{names:?}");
        assert!(
            !names.iter().any(|name| name.ends_with("experts.down_proj") || name.ends_with("experts.gate_up_proj"))
        );
        let [original, written] = [model.path(), &room.path("out")].map(|path| quantc::Checkpoint::open(path).unwrap());
        let stack = original.load("model.layers.0.feed_forward.experts.down_proj").unwrap();
        let first = written.load("model.layers.0.feed_forward.experts.0.down_proj.weight").unwrap();
        let (rows, cols) = (64, first.len() / 64);
        // The stack has the matrix turned.
        assert!((0..rows * cols).all(|i| first[i] == stack[i % cols * rows + i / cols]));
    }
}

/// As transformers keeps them, and writes them where it is asked not to take them apart.
#[test]
fn experts_in_the_stacks_of_transformers_are_read() {
    let tokens = [(3..40).collect::<Vec<u32>>()];
    // The last two call mixtures otherwise in files than in memory.
    for family in ["qwen3_moe_plain", "deepseek_v2_lite", "mixtral_plain", "minimax_m2_plain"] {
        let model = checkpoint(family);
        let usual = crate::golden::logits(model.path(), &tokens).unwrap();
        let room = Room::new();
        let recipe = "scheme = 'W4A16'\ngroup_size = 32";
        quantize(&room, &model, recipe).succeeds();
        let packed = || {
            let file = formats::SafetensorsFile::open(room.path("out/model.safetensors")).unwrap();
            let tensor = |spec: &formats::TensorSpec| (spec.name.clone(), file.get(&spec.name).unwrap().data.to_vec());
            file.tensors().map(tensor).collect::<std::collections::BTreeMap<String, Vec<u8>>>()
        };
        let one_by_one = packed();
        stack(&Model::at(model.path()));
        assert!(crate::golden::logits(model.path(), &tokens).unwrap() == usual, "{family}");
        quantize(&room, &model, recipe).succeeds();
        assert!(packed() == one_by_one, "{family}");
        // What stays as it is leaves its stack too, so that vLLM finds it.
        quantize(&room, &model, &format!("{recipe}\nignore = ['{EXPERTS}']")).succeeds();
        let down = |name: &String| ["down_proj", "w2"].iter().any(|d| name.ends_with(&format!("experts.0.{d}.weight")));
        assert!(packed().keys().any(down), "{family}");
        room.run(["convert", "out", "-o", "plain"]).succeeds();
    }
}

/// Of DeepSeek V4, whose first layers look the experts of a token up.
#[test]
fn a_table_of_experts_names_those_that_are_there_in_whole_numbers() {
    let name = "model.layers.1.ffn.gate.tid2eid";
    let said = |change: &dyn Fn(&mut Value, &mut [u8])| {
        let model = checkpoint("deepseek_v4_plain");
        Model::at(model.path()).weights(|header, data| {
            let entry = header.get_mut(name).unwrap();
            let at = |index: usize| entry["data_offsets"][index].as_u64().unwrap() as usize;
            let range = at(0)..at(1);
            change(entry, &mut data[range]);
        });
        // Whoever only copies the table refuses it, too.
        let room = Room::new();
        let path = model.path().to_str().unwrap().to_owned();
        let run = room.run([
            "quantize",
            &path,
            "-o",
            "out",
            "--scheme",
            "W8A16",
            "--group-size",
            "32",
            "--method",
            "rtn",
            "--verify-text",
            "none",
        ]);
        let found = crate::golden::logits(model.path(), &[(3..40).collect()]).map_err(|error| error.to_string());
        match &found {
            Ok(_) => run.succeeds(),
            Err(_) => assert!(run.code() == Some(1) && run.stderr().contains(name), "{}", run.stderr()),
        }
        found
    };
    let usual = said(&|_, _| {}).unwrap();
    // Another expert is another model.
    assert!(said(&|_, table| table.chunks_exact_mut(8).for_each(|n| n[0] ^= 1)).unwrap() != usual);
    let told = said(&|_, table| table[8..16].copy_from_slice(&4i64.to_le_bytes())).unwrap_err();
    assert!(told.contains(&format!("`{name}`: expected experts below 4, found 4")), "{told}");
    let told = said(&|_, table| table[..8].copy_from_slice(&(-1i64).to_le_bytes())).unwrap_err();
    assert!(told.contains("expected experts below 4, found -1"), "{told}");
    let told = said(&|entry, _| entry["dtype"] = json!("F64")).unwrap_err();
    assert!(told.contains(&format!("`{name}` is of type F64, and numbers of experts are I64 or I32")), "{told}");
}

/// Those of Qwen3-VL are published with rows in columns; transformers takes either by the shape, and saves what it has in memory.
#[test]
fn stacks_of_qwen3_vl_are_read_either_way_round() {
    let tokens = [(3..40).collect::<Vec<u32>>()];
    let model = checkpoint("qwen3_vl_moe_vision");
    let usual = crate::golden::logits(model.path(), &tokens).unwrap();
    Model::at(model.path()).weights(|header, data| {
        for (_, entry) in header.iter_mut().filter(|(name, _)| name.contains(".experts.")) {
            let [count, rows, cols] = [0, 1, 2].map(|i| entry["shape"][i].as_u64().unwrap() as usize);
            entry["shape"] = json!([count, cols, rows]);
            let from = entry["data_offsets"][0].as_u64().unwrap() as usize;
            let old = data[from..from + 2 * count * rows * cols].to_vec();
            for (at, value) in old.chunks_exact(2).enumerate() {
                let (expert, row, col) = (at / (rows * cols), at / cols % rows, at % cols);
                let to = from + 2 * (expert * rows * cols + col * rows + row);
                data[to..to + 2].copy_from_slice(value);
            }
        }
    });
    assert!(crate::golden::logits(model.path(), &tokens).unwrap() == usual);
}

/// Where a stack of gates and up projections is as wide as high, the other one says how they lie.
#[test]
fn a_square_stack_lies_as_the_other_one_does() {
    let specs = [("gate_up_proj", [4, 64, 64]), ("down_proj", [4, 64, 32])];
    let model = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "qwen3_vl_moe_text", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "tie_word_embeddings": true,
    });
    let at = |name: &str| format!("model.layers.0.{name}");
    let mut tensors: Vec<(String, Vec<usize>)> =
        specs.iter().map(|(name, shape)| (at(&format!("mlp.experts.{name}")), shape.to_vec())).collect();
    let heads =
        ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| (at(&format!("self_attn.{name}.weight")), vec![64, 64]));
    let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| (at(&format!("{name}.weight")), vec![64]));
    let of_heads = ["q_norm", "k_norm"].map(|name| (at(&format!("self_attn.{name}.weight")), vec![32]));
    tensors.extend(heads.into_iter().chain(norms).chain(of_heads));
    tensors.push((at("mlp.gate.weight"), vec![4, 64]));
    tensors.push(("model.embed_tokens.weight".to_owned(), vec![64, 64]));
    tensors.push(("model.norm.weight".to_owned(), vec![64]));
    crate::unknown::write_as(formats::Dtype::BF16, model.path(), &config, &tensors);
    assert!(crate::golden::logits(model.path(), &[(3..40).collect()]).is_ok());
}

/// As transformers calls all tensors in memory, and stacks experts.
#[test]
fn names_of_the_class_are_read_like_those_that_models_are_published_under() {
    let tokens = [(3..40).collect::<Vec<u32>>()];
    for (name, prefix, own) in [
        (
            "mistral_large4_published",
            "",
            [
                "model.language_model.rotary_emb.alpha",
                "model.language_model.layers.1.mlp",
                "model.language_model.layers.1.experts.0.w3",
                "layers.1.experts.0.w3",
            ],
        ),
        (
            "deepseek_v4_published",
            "model.",
            [
                "model.layers.2.self_attn.compressor.indexer.position_bias",
                "model.layers.1.mlp",
                "model.layers.1.mlp.experts.3.w1",
                "layers.1.ffn.experts.3.w1",
            ],
        ),
    ] {
        let [model, published] = [checkpoint(name), checkpoint(name)];
        let usual = crate::golden::logits(model.path(), &tokens).unwrap();
        let loading = quantc::families::Loading::of(quantc::Checkpoint::open(model.path()).unwrap().config());
        let renamed = Model::at(model.path());
        stack(&renamed);
        renamed.weights(|header, _| {
            let loaded = |name: String| {
                // A router's correction is a bias by its name alone.
                let ends =
                    [".weight", ".bias"].into_iter().filter(|end| name.ends_with(end) && !name.contains(".gate."));
                let ends =
                    ends.chain([".weight"].into_iter().filter(|end| name.ends_with(end))).next().unwrap_or_default();
                let module = &name[..name.len() - ends.len()];
                let name = loading.names(module).first().map_or(name.clone(), |module| format!("{module}{ends}"));
                if name.starts_with("lm_head") { name } else { format!("{prefix}{name}") }
            };
            let kept = |name: &String| name.starts_with("__");
            *header = std::mem::take(header)
                .into_iter()
                .map(|(name, entry)| (if kept(&name) { name } else { loaded(name) }, entry))
                .collect();
            assert!(header.contains_key(own[0]), "{:?}", header.keys());
            assert!(header.contains_key(&format!("{}.experts.gate_up_proj", own[1])), "{:?}", header.keys());
        });
        assert!(crate::golden::logits(model.path(), &tokens).unwrap() == usual, "{name}");
        // By these names transformers fills its stacks, and nothing is to be said of it; what is written is read again.
        let room = Room::new();
        let run = quantize(&room, &model, "scheme = 'W8A16'\ngroup_size = 32\nmethod = 'rtn'");
        assert!(!run.stderr().contains("save_original_format"), "{name}: {}", run.stderr());
        let written = quantc::Checkpoint::open(&room.path("out")).unwrap();
        assert!(written.entry(&format!("{}.weight", own[2])).is_some(), "{name}: {:?}", written.entries());
        assert!(crate::golden::logits(&room.path("out"), &tokens).is_ok());
        let [was, is] = [(published.path(), own[3]), (&room.path("out"), own[2])].map(|(folder, linear)| {
            quantc::Checkpoint::open(folder).unwrap().load(&format!("{linear}.weight")).unwrap()
        });
        let largest = was.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let off = was.iter().zip(&is).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(off > 0.0 && off < largest / 60.0, "{name}: {off} of {largest}");
    }
}

/// Puts the experts of a model in bfloat16 into stacks.
fn stack(model: &Model) {
    model.weights(|header, data| {
        let at = |name: &str| name.split_once(".experts.").map(|(at, _)| at.to_owned());
        let layers: std::collections::BTreeSet<String> = header.keys().filter_map(|name| at(name)).collect();
        for layer in layers {
            let mut stacks = [Vec::new(), Vec::new()];
            let mut shapes = [Value::Null, Value::Null];
            for index in 0.. {
                let part = |name: &str| format!("{layer}.experts.{index}.{name}.weight");
                let names = [["gate_proj", "up_proj", "down_proj"], ["w1", "w3", "w2"]];
                let Some(names) = names.iter().find(|names| header.contains_key(&part(names[0]))) else {
                    shapes.iter_mut().for_each(|shape| shape[0] = json!(index));
                    break;
                };
                for (which, name) in [0, 0, 1].into_iter().zip(names) {
                    let entry = header.remove(&part(name)).unwrap();
                    let [from, to] = [0, 1].map(|i| entry["data_offsets"][i].as_u64().unwrap() as usize);
                    stacks[which].extend_from_slice(&data[from..to]);
                    let rows = entry["shape"][0].as_u64().unwrap() * if which == 0 { 2 } else { 1 };
                    shapes[which] = json!([0, rows, entry["shape"][1]]);
                }
            }
            for ((stack, shape), name) in stacks.into_iter().zip(shapes).zip(["gate_up", "down"]) {
                let entry =
                    json!({"dtype": "BF16", "shape": shape, "data_offsets": [data.len(), data.len() + stack.len()]});
                header.insert(format!("{layer}.experts.{name}_proj"), entry);
                data.extend(stack);
            }
        }
        let memory: serde_json::Map<String, Value> = std::mem::take(header)
            .into_iter()
            .map(|(name, entry)| (name.replace(".block_sparse_moe.", ".mlp."), entry))
            .collect();
        *header = memory;
        // Files have no gaps.
        let old = std::mem::take(data);
        for (_, entry) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
            let [from, to] = [0, 1].map(|i| entry["data_offsets"][i].as_u64().unwrap() as usize);
            entry["data_offsets"] = json!([data.len(), data.len() + to - from]);
            data.extend_from_slice(&old[from..to]);
        }
    });
}
