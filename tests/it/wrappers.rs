//! Models that see or hear: what is not the language model goes over whole, and beside a GGUF file lies what makes tokens of images, as
//! llama.cpp's own converter writes it (`tests/runtimes/mmproj.py`).

use std::collections::BTreeMap;
use std::path::Path;

use formats::container::gguf::MetadataValue;
use formats::{GgufFile, SafetensorsFile};
use kernels::Cpu;
use quantc::Checkpoint;
use quantc::job::Job;
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request};
use quantc::report::Report;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::families::{checkpoint, checkpoint_of, folder, names};

/// What models bring along for pictures, sound and conversations.
const FILES: &[&str] = &[
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "image_processing_own.py",
    "audio_tokenizer/config.json",
    "mel_filters.npz",
];

/// Every checkpoint of a model that sees.
fn wrappers() -> Vec<String> {
    let sees = |name: &String| {
        let config = std::fs::read(folder().join(name).join("config.json")).unwrap();
        serde_json::from_slice::<Value>(&config).unwrap().get("vision_config").is_some()
    };
    names().into_iter().filter(sees).chain(DERIVED.iter().map(|(name, _)| (*name).to_owned())).collect()
}

/// A checkpoint as other code than transformers' publishes it: what it is made of, and what else its names and settings are.
const DERIVED: &[(&str, &str)] = &[
    ("internvl_chat_vision", "internvl_vision"),
    ("kimi_vl_vision", "kimi_k25_vision"),
    ("gemma4_unified_sound", "gemma4_unified_vision"),
];

/// Makes such a checkpoint of the one of transformers'.
fn derive(room: &TempDir, name: &str) {
    let folder = crate::harness::Model::at(room.path());
    match name {
        "internvl_chat_vision" => {
            folder.weights(chat_names);
            folder.config(|config| {
                let (mut vision, text) = (config["vision_config"].take(), config["text_config"].take());
                vision["model_type"] = json!("intern_vit_6b");
                vision["image_size"] = vision["image_size"][0].clone();
                vision["patch_size"] = vision["patch_size"][0].clone();
                *config = json!({"architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "llm_config": text,
                    "vision_config": vision, "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2",
                    "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}, "torch_dtype": "bfloat16"});
            });
        }
        "kimi_vl_vision" => {
            rename(room, |name| {
                let name = name.replace("mm_projector.pre_norm", "multi_modal_projector.pre_norm");
                let name = name.replace("mm_projector.proj.0", "multi_modal_projector.linear_1");
                name.replace("mm_projector.proj.2", "multi_modal_projector.linear_2")
            });
            folder.config(|config| {
                config["architectures"] = json!(["KimiVLForConditionalGeneration"]);
                config["model_type"] = json!("kimi_vl");
                config["vision_config"]["model_type"] = json!("moonvit");
            });
        }
        "gemma4_unified_sound" => {
            folder.weights(|header, data| {
                let offsets = json!([data.len(), data.len() + 2 * 64 * 640]);
                data.resize(data.len() + 2 * 64 * 640, 0);
                let entry = json!({"dtype": "BF16", "shape": [64, 640], "data_offsets": offsets});
                header.insert("model.embed_audio.embedding_projection.weight".to_owned(), entry);
            });
            folder.config(|config| {
                config["audio_config"] = json!({"model_type": "gemma4_unified_audio", "audio_embed_dim": 640});
            });
        }
        other => panic!("{other}"),
    }
}

/// Gives tensors the names of InternVL's own code, which has queries, keys and values in one.
fn chat_names(header: &mut serde_json::Map<String, Value>, data: &mut Vec<u8>) {
    const NAMES: &[(&str, &str)] = &[
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
        ("model.multi_modal_projector.linear_1.", "mlp1.1."),
        ("model.multi_modal_projector.linear_2.", "mlp1.3."),
        ("model.vision_tower.", "vision_model."),
        ("embeddings.cls_token", "embeddings.class_embedding"),
        ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
        ("embeddings.position_embeddings", "embeddings.position_embedding"),
        ("encoder.layer.", "encoder.layers."),
        ("attention.projection_layer", "attn.proj"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("lambda_", "ls"),
    ];
    let mut all = serde_json::Map::new();
    for (name, entry) in std::mem::take(header) {
        all.insert(NAMES.iter().fold(name, |name, (from, to)| name.replacen(from, to, 1)), entry);
    }
    for layer in 0.. {
        let at = format!("vision_model.encoder.layers.{layer}");
        if !all.contains_key(&format!("{at}.norm1.weight")) {
            break;
        }
        for end in ["weight", "bias"] {
            let (first, mut rows) = (data.len(), 0);
            let mut shape = json!([]);
            for part in ["q", "k", "v"] {
                let entry = all.remove(&format!("{at}.attention.{part}_proj.{end}")).unwrap();
                let [from, to] = [0, 1].map(|i| entry["data_offsets"][i].as_u64().unwrap() as usize);
                data.extend_from_within(from..to);
                shape = entry["shape"].clone();
                rows += shape[0].as_u64().unwrap();
            }
            shape[0] = json!(rows);
            let offsets = json!([first, data.len()]);
            all.insert(
                format!("{at}.attn.qkv.{end}"),
                json!({"dtype": "BF16", "shape": shape, "data_offsets": offsets}),
            );
        }
    }
    // A file has no gaps.
    let old = std::mem::take(data);
    for (_, entry) in all.iter_mut().filter(|(name, _)| !name.starts_with("__")) {
        let [from, to] = [0, 1].map(|i| entry["data_offsets"][i].as_u64().unwrap() as usize);
        entry["data_offsets"] = json!([data.len(), data.len() + to - from]);
        data.extend_from_slice(&old[from..to]);
    }
    *header = all;
}

pub fn model(name: &str) -> TempDir {
    let derived = DERIVED.iter().find(|(derived, _)| *derived == name);
    // Of some there is a description beside what llama.cpp's converter writes.
    let described = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mmproj").join(name);
    let room = match described.is_dir() {
        true => checkpoint_of(&described),
        false => checkpoint(derived.map_or(name, |(_, made_of)| made_of)),
    };
    if derived.is_some() {
        derive(&room, name);
    }
    crate::gguf_families::spell(room.path());
    // The eighth token ends rows of pictures.
    let path = room.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocabulary.remove("(");
    vocabulary.insert("[IMG_BREAK]".to_owned(), json!(7));
    std::fs::write(path, tokenizer.to_string()).unwrap();
    for file in FILES {
        let path = room.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text = match *file {
            "preprocessor_config.json" => {
                r#"{"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.125, 1.0], "min_image_tokens": 4, "max_image_tokens": 64}"#
            }
            "chat_template.jinja" => "{{ messages }}",
            "chat_template.json" => r#"{"chat_template": "{{ messages }}"}"#,
            file if file.ends_with("json") => "{}",
            _ => "bytes of its own",
        };
        std::fs::write(path, text).unwrap();
    }
    room
}

pub fn quantize(model: &Path, output: &Path, toml: &str) -> quantc::Result<Report> {
    let request: Request = toml::from_str(toml).unwrap();
    let recipe = Recipe::resolve(request).unwrap();
    Job::one(model, output, recipe, None, false).run_one(&Cpu::exact(), &mut Progress::new(true))
}

/// The tensors of a folder, whatever files they lie in.
fn tensors(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_some_and(|ending| ending == "safetensors") {
            let file = SafetensorsFile::open(&entry).unwrap();
            let all: Vec<String> = file.tensors().map(|tensor| tensor.name.clone()).collect();
            found.extend(all.into_iter().map(|name| (name.clone(), file.get(&name).unwrap().data.to_vec())));
        }
    }
    found
}

#[test]
fn all_that_is_not_the_language_model_goes_over_with_its_files() {
    let outputs = tempfile::tempdir().unwrap();
    let names = wrappers();
    assert!(names.len() >= 12, "{names:?}");
    for name in names {
        let room = model(&name);
        let graph = quantc::families::graph_of(&Checkpoint::open(room.path()).unwrap()).unwrap();
        let own: Vec<String> = graph.tensors().into_iter().map(|(name, _)| name).collect();
        let before = tensors(room.path());
        let others: Vec<&String> = before
            .keys()
            .filter(|name| !own.contains(name) && graph.aside.iter().any(|(part, _)| name.starts_with(part)))
            .collect();
        assert!(!others.is_empty(), "{name}: {:?}", graph.aside);
        for (format, scheme) in [("compressed-tensors", "W8A16"), ("gptq", "W8A16"), ("awq", "W4A16_ASYM")] {
            let output = outputs.path().join(format!("{name}-{format}"));
            let toml = format!("format = '{format}'\nscheme = '{scheme}'\nmethod = 'rtn'\ngroup_size = 32");
            match quantize(room.path(), &output, &toml) {
                Ok(_) => {}
                Err(error) => {
                    assert!(error.to_string().contains("multiples of 32 rows"), "{name}, {format}: {error}");
                    continue;
                }
            }
            let after = tensors(&output);
            for tensor in &others {
                // Layers that predict further tokens are quantized as the model is.
                if tensor.starts_with("mtp.") {
                    continue;
                }
                assert!(after.get(*tensor) == before.get(*tensor), "{name}, {format}: {tensor}");
            }
            for file in FILES {
                let [a, b] = [room.path(), &output].map(|folder| std::fs::read(folder.join(file)).ok());
                assert!(a.is_some() && a == b, "{name}, {format}: {file}");
            }
        }
    }
}

/// A value as the listing has it.
pub fn plain(value: &MetadataValue) -> Value {
    match value {
        MetadataValue::Bool(value) => json!(value),
        MetadataValue::U32(value) => json!(value),
        MetadataValue::F32(value) => json!(value),
        MetadataValue::String(value) => json!(value),
        MetadataValue::Array(all) => all.values.iter().map(plain).collect(),
        other => panic!("{other:?}"),
    }
}

fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Number(a), Value::Number(b)) => (a.as_f64().unwrap() as f32) == (b.as_f64().unwrap() as f32),
        _ => a == b,
    }
}

/// Listings of what llama.cpp's converter writes; behind a dot the type that it is asked for.
const PROJECTED: &[&str] = &[
    "qwen2_5_vl_vision",
    "qwen2_5_vl_vision.q8_0",
    "qwen3_vl_vision",
    "qwen3_vl_moe_vision",
    "qwen3_5_vision",
    "qwen3_5_moe_vision",
    "gemma3_vision",
    "gemma3_vision.q8_0",
    "gemma4_vision",
    "gemma4_sound",
    "gemma4_unified_sound",
    "mistral3_vision",
    "smolvlm_vision",
    "lfm2_vl_vision",
    "internvl_vision",
    "glm4v_vision",
    "glm4v_moe_vision",
    "glm5_next_vision",
    "internvl_chat_vision",
    "kimi_vl_vision",
    "kimi_k25_vision",
    "qwen2_audio_sound",
    "voxtral_sound",
    "gemma3n_towers.f16",
];

#[test]
fn files_for_images_are_those_of_llama_cpp() {
    let outputs = tempfile::tempdir().unwrap();
    for name in PROJECTED {
        let (checkpoint, ty) = name.split_once('.').unwrap_or((name, "keep"));
        let room = model(checkpoint);
        let output = outputs.path().join(format!("{name}.gguf"));
        let toml = format!("format = 'gguf'\nscheme = 'Q8_0'\nmethod = 'rtn'\ntowers = '{ty}'");
        let report = quantize(room.path(), &output, &toml).unwrap();
        let path = outputs.path().join(format!("mmproj-{name}.gguf"));
        let told = report.projector.as_ref().unwrap_or_else(|| panic!("{name}: {:#?}", report.notes));
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((&told.name, told.bytes), (&format!("mmproj-{name}.gguf"), bytes.len() as u64));
        assert_eq!(told.sha256, format!("{:x}", Sha256::digest(&bytes)));
        let card = std::fs::read_to_string(outputs.path().join(format!("{name}.gguf.README.md"))).unwrap();
        assert!(card.contains(&format!("--mmproj mmproj-{name}.gguf")), "{card}");
        let listed = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/mmproj/{name}.json"));
        let listed: Value = serde_json::from_slice(&std::fs::read(listed).unwrap()).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let keys = listed["keys"].as_object().unwrap();
        let mut own: Vec<&str> = file.keys().into_iter().collect();
        own.sort_unstable();
        assert_eq!(own, keys.keys().map(String::as_str).collect::<Vec<_>>(), "{name}");
        for (key, expected) in keys {
            let found = plain(file.metadata(key).unwrap());
            assert!(equal(&found, expected), "{name}: {key}: {found}, not {expected}");
        }
        let mut found: Vec<Value> = Vec::new();
        for tensor in file.tensors() {
            let hash = format!("{:x}", Sha256::digest(file.get(&tensor.name).unwrap().data));
            found.push(json!([tensor.name, tensor.ty.name, tensor.shape, hash]));
        }
        // llama.cpp loads no file for Pixtral without it, and its converter leaves it out.
        let ends = found.iter().position(|tensor| tensor[0] == "v.token_embd.img_break").map(|at| found.remove(at));
        assert_eq!(ends.is_some(), name.starts_with("mistral3"), "{name}");
        if let Some(ends) = ends {
            assert_eq!((&ends[1], &ends[2]), (&json!("F32"), &json!([64])));
            let mut row = vec![0.0f32; 64];
            Checkpoint::open(room.path())
                .unwrap()
                .load_rows("language_model.model.embed_tokens.weight", &[7], &mut row)
                .unwrap();
            let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(ends[3], format!("{:x}", Sha256::digest(&bytes)));
        }
        found.sort_by_key(|tensor| tensor[0].as_str().unwrap().to_owned());
        let expected = listed["tensors"].as_array().unwrap();
        assert_eq!(found.len(), expected.len(), "{name}: {found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            // The rows of these two are in another order than its converter's (projectors.rs).
            let turned =
                ["v.blk.0.attn_q", "v.blk.0.attn_k"].iter().any(|at| found[0].as_str().unwrap().starts_with(at));
            if *name == "kimi_vl_vision" && turned {
                assert_eq!(found.as_array().unwrap()[..3], expected.as_array().unwrap()[..3]);
                assert_ne!(found[3], expected[3]);
                continue;
            }
            // As llama.cpp multiplies pictures by it; its converter writes a vector.
            if found[0].as_str().unwrap().ends_with(".layer_scale.gamma") {
                assert_eq!((&found[0], &found[1], &found[3]), (&expected[0], &expected[1], &expected[3]));
                assert_eq!(found[2], json!([1, expected[2][0], 1, 1]));
                continue;
            }
            assert_eq!(found, expected, "{name}");
        }
        // Another run does not write over it, and one with force replaces both.
        std::fs::remove_file(&output).unwrap();
        for paper in ["report.json", "README.md"] {
            std::fs::remove_file(outputs.path().join(format!("{name}.gguf.{paper}"))).unwrap();
        }
        let error = quantize(room.path(), &output, &toml).unwrap_err();
        assert!(error.to_string().contains(&format!("mmproj-{name}.gguf: exists already")), "{error}");
        let left: Vec<_> = std::fs::read_dir(outputs.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!left.iter().any(|file| file.to_string_lossy().contains("partial")), "{left:?}");
        let request: Request = toml::from_str(&toml).unwrap();
        let forced = Job::one(room.path(), &output, Recipe::resolve(request).unwrap(), None, true);
        forced.run_one(&Cpu::exact(), &mut Progress::new(true)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "{name}");
    }
}

#[test]
fn a_file_without_what_sees_says_why() {
    let outputs = tempfile::tempdir().unwrap();
    let told = |name: &str, room: &TempDir| {
        let output = outputs.path().join(format!("{name}.gguf"));
        let report = quantize(room.path(), &output, "format = 'gguf'\nscheme = 'Q8_0'\nmethod = 'rtn'").unwrap();
        assert!(report.projector.is_none() && !outputs.path().join(format!("mmproj-{name}.gguf")).exists());
        report.notes.into_iter().find(|note| note.contains("no mmproj file is written")).expect(name)
    };
    let other = model("llava_vision");
    assert!(told("other", &other).contains("models of the type llava"));
    let bare = model("gemma3_vision");
    std::fs::write(bare.path().join("preprocessor_config.json"), "{}").unwrap();
    assert!(told("bare", &bare).contains("has an image_mean of three numbers"));
    let text = checkpoint("qwen3_plain");
    crate::gguf_families::spell(text.path());
    let report =
        quantize(text.path(), &outputs.path().join("t.gguf"), "format = 'gguf'\nscheme = 'Q8_0'\nmethod = 'rtn'")
            .unwrap();
    assert!(!report.notes.iter().any(|note| note.contains("mmproj")), "{:?}", report.notes);
}

/// Gives values to the start of every tensor whose name ends so, in bytes of the type that it has.
fn poison(room: &TempDir, ends: &str, bytes: &[u8]) {
    let mut count = 0;
    crate::harness::Model::at(room.path()).weights(|header, data| {
        for (_, entry) in header.iter().filter(|(name, _)| name.ends_with(ends)) {
            let at = entry["data_offsets"][0].as_u64().unwrap() as usize;
            data[at..at + bytes.len()].copy_from_slice(bytes);
            count += 1;
        }
    });
    assert!(count > 0, "{ends}");
}

/// What values are cut at may be infinite, and what is copied is not computed with.
#[test]
fn values_that_are_not_finite_stand_only_where_they_mean_something() {
    let (room, outputs) = (model("gemma4_sound"), tempfile::tempdir().unwrap());
    let rtn = "format = 'compressed-tensors'\nscheme = 'W8A16'\ngroup_size = 32\nmethod = 'rtn'";
    poison(&room, ".input_max", &f32::INFINITY.to_le_bytes()[2..]);
    quantize(room.path(), &outputs.path().join("bounds"), rtn).unwrap();
    poison(&room, ".input_max", &f32::NAN.to_le_bytes()[2..]);
    let error = quantize(room.path(), &outputs.path().join("nan"), rtn).unwrap_err();
    assert!(error.to_string().contains("is not a finite number"), "{error}");
}

/// transformers would make it up at random, and llama.cpp refuses a file without it.
#[test]
fn what_one_layer_of_a_tower_lacks_is_told() {
    let outputs = tempfile::tempdir().unwrap();
    let notes = |kind: &str, room: &TempDir| {
        let rtn = "format = 'compressed-tensors'\nscheme = 'W8A16'\ngroup_size = 32\nmethod = 'rtn'";
        quantize(room.path(), &outputs.path().join(kind), rtn).unwrap().notes
    };
    for name in wrappers() {
        let room = model(&name);
        let source = Checkpoint::open(room.path()).unwrap();
        let graph = quantc::families::graph_of(&source).unwrap();
        assert_eq!(quantc::families::check_beside(&graph, &source), Vec::<String>::new(), "{name}");
    }
    let room = model("qwen3_vl_moe_vision");
    let missing = "model.visual.blocks.0.mlp.linear_fc1.weight";
    assert!(!notes("whole", &room).iter().any(|note| note.contains("missing")));
    crate::harness::Model::at(room.path()).weights(|header, _| {
        let entry = header.remove(missing).unwrap();
        header.insert("model.visual.another".to_owned(), entry);
    });
    let told = format!("tensor `{missing}` is missing: its bias is there");
    assert!(notes("damaged", &room).iter().any(|note| note.contains(&told)));
    let checked = quantc::convert::convert(room.path(), &outputs.path().join("plain"), None, Default::default(), false);
    assert!(checked.unwrap().iter().any(|note| note.contains(&told)));
}

#[test]
fn what_f16_cannot_hold_of_a_tower_is_refused() {
    let (room, outputs) = (model("qwen3_vl_vision"), tempfile::tempdir().unwrap());
    poison(&room, ".blocks.0.mlp.linear_fc1.weight", &1e5f32.to_le_bytes()[2..]);
    let write = |towers: &str| {
        let output = outputs.path().join(format!("{towers}.gguf"));
        quantize(room.path(), &output, &format!("format = 'gguf'\nscheme = 'F32'\nmethod = 'rtn'\ntowers = '{towers}'"))
    };
    let error = write("F16").unwrap_err().to_string();
    assert!(error.contains("linear_fc1.weight`: the value 9.9") && error.contains("--towers F32"), "{error}");
    assert!(!outputs.path().join("F16.gguf").exists() && !outputs.path().join("mmproj-F16.gguf").exists());
    write("BF16").unwrap();
}

/// Modules that the written configuration says are not quantized.
fn ignored(folder: &Path) -> Vec<String> {
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let list = config["quantization_config"]["ignore"].as_array().unwrap().iter();
    list.map(|name| name.as_str().unwrap().to_owned()).collect()
}

/// vLLM has them elsewhere: `language_model.model.self_decoder.altup_projections.0`.
#[test]
fn modules_beside_the_blocks_are_named_without_what_stands_before_them() {
    let outputs = tempfile::tempdir().unwrap();
    for (name, modules) in [
        ("gemma3n_vision", vec!["altup_projections.0", "altup_unembed_projections.1", "per_layer_model_projection"]),
        ("gemma4_vision", vec!["per_layer_model_projection"]),
    ] {
        let (room, output) = (model(name), outputs.path().join(name));
        quantize(room.path(), &output, "scheme = 'W4A16'\nmethod = 'rtn'\ngroup_size = 32").unwrap();
        let found = ignored(&output);
        for module in modules {
            let pattern = format!(r"re:(.*\.)?{}$", module.replace('.', r"\."));
            assert!(found.contains(&pattern), "{name}: {pattern} is not in {found:?}");
        }
    }
}

#[test]
fn towers_are_quantized_where_that_is_asked_for() {
    let outputs = tempfile::tempdir().unwrap();
    // The linears of each tower, what stays of its matrices, and whether transformers' class asks for packed weights.
    let cases = [
        ("qwen2_5_vl_vision", 7, vec![], false),
        ("qwen3_vl_vision", 8, vec!["model.visual.pos_embed"], false),
        ("gemma3_vision", 6, vec!["vision_tower.vision_model.embeddings.position_embedding"], true),
        ("mistral3_vision", 9, vec!["multi_modal_projector.patch_merger.merging_layer"], false),
    ];
    for (name, linears, left, asks) in cases {
        let room = model(name);
        let source = Checkpoint::open(room.path()).unwrap();
        let graph = quantc::families::graph_of(&source).unwrap();
        let found = quantc::families::towers::towers(&graph, &source);
        assert_eq!(found.len(), linears, "{name}: {found:?}");
        let [kept, output] = ["keep", "quantize"].map(|towers| outputs.path().join(format!("{name}-{towers}")));
        let toml = "scheme = 'W8A16'\nmethod = 'rtn'\nobserver = 'mse'\ngroup_size = 32\ntowers = ";
        quantize(room.path(), &kept, &format!("{toml}'keep'")).unwrap();
        let report = quantize(room.path(), &output, &format!("{toml}'quantize'")).unwrap();
        let written = Checkpoint::open(&output).unwrap();
        for linear in &found {
            let weight = format!("{}.weight", linear.module);
            let fate = report.tensors.iter().find(|one| one.name == weight).unwrap();
            assert_eq!(fate.fate, quantc::report::Fate::Quantized, "{name}: {weight}");
            let [was, is] = [&source, &written].map(|of| of.load(&weight).unwrap());
            let most = was.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let off = was.iter().zip(&is).fold(0.0f32, |off, (a, b)| off.max((a - b).abs()));
            assert!(off > 0.0 && off < most / 60.0, "{name}: {weight} is off by {off} of {most}");
        }
        let ignored = ignored(&output);
        for module in left {
            let own = module.trim_start_matches("model.").replace('.', "\\.");
            let plain = |entry: &String| entry.ends_with(&format!("{own}$"));
            assert!(ignored.iter().any(|entry| entry == module || plain(entry)), "{name}: {module}: {ignored:?}");
        }
        // All else is as it is without it.
        let [with, without] = [&output, &kept].map(|folder| tensors(folder));
        let own = |tensor: &String| found.iter().any(|linear| tensor.starts_with(&format!("{}.weight", linear.module)));
        let others =
            |all: BTreeMap<String, Vec<u8>>| all.into_iter().filter(|(name, _)| !own(name)).collect::<Vec<_>>();
        assert!(others(with) == others(without), "{name}");
        let told = |what: &str| report.notes.iter().any(|note| note.contains(what));
        assert!(told(&format!("{linears} linears of ")) && told("rounded without data"), "{name}: {:?}", report.notes);
        assert_eq!(told("class of the tower (siglip_vision_model)"), asks, "{name}: {:?}", report.notes);
    }
    // A pattern keeps one, rows that hold no whole groups stay, and a model that sees nothing has none.
    let room = model("qwen2_5_vl_vision");
    let toml = "scheme = 'W8A16'\nmethod = 'rtn'\ngroup_size = 32\ntowers = 'quantize'\nignore = ['merger.mlp.0']\n[[override]]\nmatch = 'blocks.0.attn.proj'\ngroup_size = 64";
    let report = quantize(room.path(), &outputs.path().join("some"), toml).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("5 linears of `visual`")), "{:?}", report.notes);
    assert!(
        report.notes.iter().any(|note| note.contains("1 linears beside the language model stay")),
        "{:?}",
        report.notes
    );
    let text = checkpoint("qwen3_plain");
    let toml = "scheme = 'W8A16'\nmethod = 'rtn'\ngroup_size = 32\ntowers = 'quantize'";
    let report = quantize(text.path(), &outputs.path().join("text"), toml).unwrap();
    assert!(report.notes.iter().any(|note| note.starts_with("towers has no effect")), "{:?}", report.notes);
}

#[test]
fn towers_are_quantized_in_formats_that_are_loaded_so() {
    let refused = |toml: &str| {
        let error = Recipe::resolve(toml::from_str(toml).unwrap()).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    assert!(refused("format = 'gptq'\ntowers = 'quantize'").contains("for compressed-tensors and GGUF files"));
    assert!(refused("towers = 'Q8_0'").contains("--towers Q8_0 is for GGUF files"));
    assert!(refused("towers = 'some'").contains("there are keep, quantize and"));
    assert!(refused("format = 'gguf'\ntowers = 'Q4_K'").contains("without a search"));
    let said = |toml: &str| serde_json::to_value(Recipe::resolve(toml::from_str(toml).unwrap()).unwrap()).unwrap();
    assert_eq!(said("format = 'gguf'\ntowers = 'q5_1'")["towers"], json!("Q5_1"));
    assert_eq!(said("towers = 'quantize'")["towers"], json!("quantize"));
    assert_eq!(said("format = 'gptq'")["towers"], json!("keep"));
}

/// Sets a value under a path of config.json.
pub fn set(room: &TempDir, path: &str, value: Value) {
    crate::harness::Model::at(room.path()).config(|config| {
        let mut at = config;
        for key in path.split('/') {
            at = &mut at[key];
        }
        *at = value;
    });
}

pub const RTN: &str = "format = 'gguf'\nscheme = 'Q8_0'\nmethod = 'rtn'";

/// llama.cpp computes the same whatever config.json says of these, so that it would see or hear something else.
#[test]
fn what_llama_cpp_computes_otherwise_gets_no_file() {
    let outputs = tempfile::tempdir().unwrap();
    let cases = [
        ("qwen2_5_vl_vision", "vision_config/hidden_act", json!("gelu"), "llama.cpp computes silu alone"),
        ("qwen2_5_vl_vision", "vision_config/window_size", json!(56), "vision_config.window_size 56"),
        ("qwen3_vl_vision", "vision_config/hidden_act", json!("silu"), "llama.cpp computes gelu alone"),
        ("qwen3_5_vision", "vision_config/spatial_merge_size", json!(4), "vision_config.spatial_merge_size 4"),
        ("smolvlm_vision", "vision_config/hidden_act", json!("quick_gelu"), "llama.cpp computes gelu alone"),
        ("lfm2_vl_vision", "vision_config/hidden_act", json!("relu"), "vision_config.hidden_act relu"),
        ("lfm2_vl_vision", "projector_hidden_act", json!("silu"), "projector_hidden_act silu"),
        ("gemma3_vision", "vision_config/hidden_act", json!("quick_gelu"), "vision_config.hidden_act quick_gelu"),
        ("gemma4_vision", "vision_config/hidden_activation", json!("silu"), "vision_config.hidden_activation silu"),
        ("gemma4_sound", "audio_config/hidden_act", json!("gelu"), "audio_config.hidden_act gelu"),
        ("mistral3_vision", "projector_hidden_act", json!("silu"), "projector_hidden_act silu"),
        (
            "mistral3_vision",
            "vision_config/rope_parameters/rope_theta",
            json!(500.0),
            "vision_config.rope_parameters.rope_theta 500",
        ),
        ("internvl_vision", "projector_hidden_act", json!("relu"), "projector_hidden_act relu"),
        ("internvl_vision", "vision_config/norm_type", json!("rms_norm"), "takes norms to be of the other kind"),
        ("glm4v_vision", "vision_config/hidden_act", json!("relu"), "llama.cpp computes gelu and silu alone"),
        ("kimi_k25_vision", "vision_config/projector_hidden_act", json!("relu"), "projector_hidden_act relu"),
        ("qwen2_audio_sound", "audio_config/activation_function", json!("relu"), "activation_function relu"),
        ("voxtral_sound", "projector_hidden_act", json!("silu"), "projector_hidden_act silu"),
    ];
    for (at, (name, path, value, told)) in cases.into_iter().enumerate() {
        let room = model(name);
        set(&room, path, value);
        let output = outputs.path().join(format!("{at}.gguf"));
        let report = quantize(room.path(), &output, RTN).unwrap();
        assert!(output.exists() && !outputs.path().join(format!("mmproj-{at}.gguf")).exists(), "{name}: {path}");
        let why = report.notes.iter().find(|note| note.contains("no mmproj file is written"));
        assert!(why.is_some_and(|why| why.contains(told)), "{name}: {path}: {:#?}", report.notes);
    }
    // Words for what it computes are others than that of its own files.
    let room = model("qwen3_vl_vision");
    set(&room, "vision_config/hidden_act", json!("gelu"));
    assert!(quantize(room.path(), &outputs.path().join("same.gguf"), RTN).unwrap().projector.is_some());
}

/// Norms, biases, positions and whole blocks: llama.cpp refuses such a file or computes without them, transformers makes them up.
#[test]
fn what_a_tower_lacks_of_what_its_class_has_is_told() {
    let outputs = tempfile::tempdir().unwrap();
    let cases = [
        ("qwen2_5_vl_vision", "visual.blocks.0.norm1.weight"),
        ("qwen3_vl_vision", "model.visual.pos_embed.weight"),
        ("qwen3_vl_vision", "model.visual.blocks.0.attn.qkv.bias"),
        ("qwen3_vl_vision", "model.visual.deepstack_merger_list.0.norm.bias"),
        ("gemma3_vision", "multi_modal_projector.mm_soft_emb_norm.weight"),
        ("gemma4_sound", "model.audio_tower.layers.0.norm_out.weight"),
        ("mistral3_vision", "vision_tower.ln_pre.weight"),
        ("mistral3_vision", "multi_modal_projector.patch_merger.merging_layer.weight"),
        ("smolvlm_vision", "model.vision_model.encoder.layers.0.layer_norm2.bias"),
        ("lfm2_vl_vision", "model.multi_modal_projector.linear_2.weight"),
        ("internvl_vision", "model.vision_tower.embeddings.cls_token"),
        ("glm4v_vision", "model.visual.post_layernorm.weight"),
        ("kimi_k25_vision", "vision_tower.patch_embed.pos_emb.weight"),
        ("qwen2_audio_sound", "audio_tower.conv2.bias"),
        ("voxtral_sound", "audio_tower.layers.0.self_attn.out_proj.bias"),
    ];
    let told = |notes: &[String], what: &str| notes.iter().any(|note| note.contains(what));
    for (at, (name, tensor)) in cases.into_iter().enumerate() {
        let room = model(name);
        crate::harness::Model::at(room.path()).weights(|header, _| {
            let keys: Vec<String> = header.keys().cloned().collect();
            let entry = header.remove(tensor).unwrap_or_else(|| panic!("{name}: {keys:?}"));
            header.insert("lm_head.unread".to_owned(), entry);
        });
        let output = outputs.path().join(format!("{at}.gguf"));
        let report = quantize(room.path(), &output, &format!("{RTN}\nunknown_tensors = 'copy'")).unwrap();
        let why = report.notes.iter().find(|note| note.contains("no mmproj file is written"));
        let missing = format!("the checkpoint has no `{tensor}`");
        assert!(why.is_some_and(|why| why.contains(&missing)), "{name}: {tensor}: {:#?}", report.notes);
        assert!(told(&report.notes, "makes such tensors up at random"), "{name}: {:#?}", report.notes);
    }
    // What is counted and not there.
    for (name, path, count) in
        [("qwen3_vl_moe_vision", "vision_config/depth", 4), ("smolvlm_vision", "vision_config/num_hidden_layers", 2)]
    {
        let room = model(name);
        set(&room, path, json!(count));
        let plain = outputs.path().join(format!("{name}-plain"));
        let notes = quantc::convert::convert(room.path(), &plain, None, Default::default(), false).unwrap();
        assert!(told(&notes, "the checkpoint has no `model.vis"), "{name}: {notes:#?}");
        let counts = notes.iter().any(|note| note.contains(&format!("config.json counts {count} layers")));
        assert_eq!(counts, name.contains("moe"), "{name}: {notes:#?}");
        let report = quantize(room.path(), &outputs.path().join(format!("{name}.gguf")), RTN).unwrap();
        assert!(report.projector.is_none(), "{name}");
    }
}

#[test]
fn a_norm_that_one_layer_of_a_tower_lacks_is_told() {
    let room = model("qwen3_vl_moe_vision");
    crate::harness::Model::at(room.path()).weights(|header, _| {
        let entry = header.remove("model.visual.blocks.2.norm2.bias").unwrap();
        header.insert("model.visual.another".to_owned(), entry);
    });
    let source = Checkpoint::open(room.path()).unwrap();
    let graph = quantc::families::graph_of(&source).unwrap();
    let notes = quantc::families::check_beside(&graph, &source);
    assert!(notes.iter().any(|note| note.contains("`model.visual.blocks.2.norm2.bias` is missing")), "{notes:?}");
}

/// As a language model is that is quantized already.
#[test]
fn a_tower_that_is_quantized_already_is_dequantized_for_its_file() {
    let outputs = tempfile::tempdir().unwrap();
    let room = model("qwen3_vl_vision");
    let packed = outputs.path().join("packed");
    let toml = "scheme = 'W8A16'\nmethod = 'rtn'\ngroup_size = 32\ntowers = 'quantize'";
    quantize(room.path(), &packed, toml).unwrap();
    let output = outputs.path().join("m.gguf");
    let report = quantize(&packed, &output, RTN).unwrap();
    assert!(report.projector.is_some(), "{:#?}", report.notes);
    let file = GgufFile::open(outputs.path().join("mmproj-m.gguf")).unwrap();
    let written = file.get("v.blk.0.attn_qkv.weight").unwrap();
    assert_eq!(written.ty.name, "BF16");
    let source = Checkpoint::open(&packed).unwrap();
    let expected = source.load("model.visual.blocks.0.attn.qkv.weight").unwrap();
    let mut found = vec![0.0; expected.len()];
    written.ty.dequantize(written.data, &mut found).unwrap();
    let off = found.iter().zip(&expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs() / b.abs().max(1e-3)));
    assert!(off < 0.005, "{off}");
}

#[test]
fn what_a_recipe_names_of_a_tower_has_its_own_type_in_the_file_for_images() {
    let (room, outputs) = (model("qwen3_vl_vision"), tempfile::tempdir().unwrap());
    let write = |name: &str, more: &str| {
        quantize(room.path(), &outputs.path().join(format!("{name}.gguf")), &format!("{RTN}\n{more}"))
    };
    let types = |name: &str| -> BTreeMap<String, &'static str> {
        let file = GgufFile::open(outputs.path().join(format!("mmproj-{name}.gguf"))).unwrap();
        file.tensors().iter().map(|tensor| (tensor.name.to_string(), tensor.ty.name)).collect()
    };
    write(
        "some",
        "towers = 'quantize'\nignore = ['merger.linear_fc1']\n[[override]]\nmatch = 'mlp.linear_fc2'\nscheme = 'Q4_0'",
    )
    .unwrap();
    let found = types("some");
    let of = |name: &str| found[name];
    assert_eq!(
        [of("mm.0.weight"), of("mm.2.weight"), of("v.blk.0.ffn_down.weight"), of("v.blk.0.ffn_up.weight")],
        ["BF16", "Q8_0", "Q4_0", "Q8_0"]
    );
    // All of it stays, and the pattern is no typing error.
    write("kept", "ignore = ['re:.*visual.*']").unwrap();
    assert_eq!(types("kept")["mm.0.weight"], "BF16");
    let error = write("wrong", "ignore = ['visual.nothing']").unwrap_err();
    assert!(error.to_string().contains("matches no linear"), "{error}");
    let error = write("searched", "[[override]]\nmatch = 'merger.linear_fc1'\nscheme = 'Q4_K'").unwrap_err();
    assert!(error.to_string().contains("without a search") || error.to_string().contains("no search"), "{error}");
}

/// Renames all tensors of a checkpoint.
fn rename(room: &TempDir, name_of: impl Fn(&str) -> String) {
    crate::harness::Model::at(room.path()).weights(|header, _| {
        let all = std::mem::take(header).into_iter();
        *header =
            all.map(|(name, entry)| (if name.starts_with("__") { name } else { name_of(&name) }, entry)).collect();
    });
}

#[test]
fn a_tower_under_an_older_name_is_not_missed() {
    let (room, outputs) = (model("qwen3_vl_vision"), tempfile::tempdir().unwrap());
    rename(&room, |name| name.replace("model.visual.", "visual.").replace("model.language_model.", "model."));
    let toml = "scheme = 'W8A16'\nmethod = 'rtn'\ngroup_size = 32\ntowers = 'quantize'";
    let report = quantize(room.path(), &outputs.path().join("out"), toml).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("linears of `visual`")), "{:#?}", report.notes);
    assert!(!report.notes.iter().any(|note| note.contains("have no linears in")), "{:#?}", report.notes);
}

#[test]
fn a_model_that_hears_by_another_encoder_is_told_of() {
    let (room, outputs) = (model("granite_plain"), tempfile::tempdir().unwrap());
    rename(&room, |name| format!("language_model.{name}"));
    crate::harness::Model::at(room.path()).config(|config| {
        let text = config.take();
        *config = json!({"architectures": ["GraniteSpeechForConditionalGeneration"], "model_type": "granite_speech",
            "text_config": text, "encoder_config": {"model_type": "granite_speech_encoder"}, "tie_word_embeddings": false});
    });
    let report = quantize(room.path(), &outputs.path().join("m.gguf"), RTN).unwrap();
    let told = "no file for images or sound is known here for models of the type granite_speech";
    assert!(report.notes.iter().any(|note| note.contains(told)), "{:#?}", report.notes);
}

/// What is said of them together.
#[test]
fn a_tower_of_which_nothing_can_be_quantized_is_said_to_be_copied() {
    let (room, outputs) = (model("gemma4_vision"), tempfile::tempdir().unwrap());
    let toml = "scheme = 'W8A16'\nmethod = 'rtn'\ngroup_size = 32\ntowers = 'quantize'";
    let report = quantize(room.path(), &outputs.path().join("out"), toml).unwrap();
    let told = |what: &str| report.notes.iter().any(|note| note.contains(what));
    assert!(told("towers has no effect") && told("copied as they are"), "{:#?}", report.notes);
    assert!(!told("rounded without data"), "{:#?}", report.notes);
}
