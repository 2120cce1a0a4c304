//! LoRA adapters: PEFT's own merged weights (`tests/fixtures/make_adapters.py`), names, refusals, whole runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use formats::{Dtype, SafetensorsFile, ShardedWriter, TensorSpec};
use kernels::Cpu;
use quantc::job::{Job, Verification};
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request};
use quantc::report::Limits;
use quantc::{Checkpoint, families};
use serde_json::{Value, json};

use crate::families::checkpoint;
use crate::harness::Room;
use crate::pipeline;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Every case, with its model.
fn cases() -> Vec<(PathBuf, PathBuf)> {
    let folders = std::fs::read_dir(fixtures().join("adapters")).unwrap().map(|e| e.unwrap().path());
    let mut cases: Vec<_> = folders
        .filter(|folder| folder.join("case.json").exists())
        .map(|folder| {
            let base = read(&folder.join("case.json"))["base"].as_str().unwrap().to_owned();
            let place = if base == "gpt2" { "adapters" } else { "checkpoints" };
            let base = fixtures().join(place).join(base);
            (folder, base)
        })
        .collect();
    cases.sort();
    cases
}

/// The name in the checkpoint of a tensor that PEFT's model calls so.
fn entry_of<'a>(model: &'a Checkpoint, name: &str) -> &'a str {
    let found = model.entries().iter().find(|e| e.name == name || name == format!("transformer.{}", e.name));
    &found.unwrap_or_else(|| panic!("{name}")).name
}

#[test]
fn merged_weights_are_those_of_peft() {
    let cases = cases();
    assert!(cases.len() >= 12, "the fixtures are there");
    for (folder, base) in cases {
        let label = folder.file_name().unwrap().to_string_lossy().into_owned();
        let golden = SafetensorsFile::open(folder.join("golden.safetensors")).unwrap();
        let plain = Checkpoint::open(&base).unwrap();
        let merged = Checkpoint::open_with(&base, Some(&folder)).unwrap();
        let mut changed = Vec::new();
        for spec in golden.tensors() {
            let name = entry_of(&merged, &spec.name);
            assert_eq!(merged.entry(name).unwrap().shape, spec.shape, "{label}: {name}");
            let (found, expected) = (merged.load(name).unwrap(), golden.get(&spec.name).unwrap().to_f32().unwrap());
            let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for (f, e) in found.iter().zip(&expected) {
                assert!((f - e).abs() <= 1e-6 * largest, "{label}: {name}: {f}, expected {e}, the largest {largest}");
            }
            assert!(merged.raw(name).is_none(), "{label}: {name} cannot be copied as it lies");
            if let &[rows, width] = &spec.shape[..] {
                let chosen = [rows as u32 - 1, 0, rows as u32 / 2];
                let mut values = vec![0.0; 3 * width];
                merged.load_rows(name, &chosen, &mut values).unwrap();
                for (row, values) in chosen.iter().zip(values.chunks(width)) {
                    for (value, whole) in values.iter().zip(&found[*row as usize * width..]) {
                        assert!((value - whole).abs() <= 1e-6 * largest, "{label}: {name}: row {row}");
                    }
                }
            }
            merged.release(name);
            changed.push(name.to_owned());
        }
        for entry in plain.entries().iter().filter(|e| !changed.contains(&e.name)) {
            assert!(merged.load(&entry.name).unwrap() == plain.load(&entry.name).unwrap(), "{label}: {}", entry.name);
        }
        let report = merged.adapter().unwrap();
        assert!(report.modules > 0 && report.sha256.len() == 64, "{label}: {report:?}");
        let kind = if label.starts_with("dora") {
            "dora"
        } else if label == "rslora" {
            "rslora"
        } else {
            "lora"
        };
        assert_eq!(report.kind, kind, "{label}");
    }
}

#[test]
fn an_adapter_of_a_tied_head_gives_it_a_tensor() {
    let (folder, base) = (fixtures().join("adapters/tied_head"), fixtures().join("checkpoints/llama_tied"));
    let merged = Checkpoint::open_with(&base, Some(&folder)).unwrap();
    assert_eq!(merged.config()["tie_word_embeddings"], false);
    assert!(!families::graph_of(&merged).unwrap().head.tied);
    assert!(merged.notices()[0].contains("tensor of its own"), "{:?}", merged.notices());
    assert!(merged.load("model.embed_tokens.weight").unwrap() != merged.load("lm_head.weight").unwrap());

    // A product on the embedding alone leaves the head what it was trained with.
    let room = tempfile::tempdir().unwrap();
    let spec = [
        ("base_model.model.model.embed_tokens.lora_embedding_A", [4, 96]),
        ("base_model.model.model.embed_tokens.lora_embedding_B", [32, 4]),
    ];
    adapter(
        room.path(),
        &json!({}),
        &spec.map(|(name, shape)| (name, shape.to_vec(), random(name, shape.iter().product()))),
    );
    let merged = Checkpoint::open_with(&base, Some(room.path())).unwrap();
    let plain = Checkpoint::open(&base).unwrap().load("model.embed_tokens.weight").unwrap();
    assert!(merged.load("lm_head.weight").unwrap() == plain);
    assert!(merged.load("model.embed_tokens.weight").unwrap() != plain);
    adapter(
        room.path(),
        &json!({"ensure_weight_tying": true}),
        &spec.map(|(name, shape)| (name, shape.to_vec(), random(name, shape.iter().product()))),
    );
    let merged = Checkpoint::open_with(&base, Some(room.path())).unwrap();
    assert!(families::graph_of(&merged).unwrap().head.tied && merged.entry("lm_head.weight").is_none());
}

/// Repeatable numbers around 0.
pub fn random(seed: &str, count: usize) -> Vec<f32> {
    let mut state = seed.bytes().fold(17u64, |s, b| s.wrapping_mul(31).wrapping_add(u64::from(b)));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| 0.2 * next()).collect()
}

/// Writes an adapter with these settings beside the usual ones.
pub fn adapter(folder: &Path, settings: &Value, tensors: &[(&str, Vec<usize>, Vec<f32>)]) {
    let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"});
    settings.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let spec = |(name, shape, _): &(&str, Vec<usize>, Vec<f32>)| TensorSpec {
        name: (*name).to_owned(),
        dtype: Dtype::F32,
        shape: shape.clone(),
    };
    let writer = ShardedWriter::create(folder, tensors.iter().map(spec).collect(), 1 << 30, &BTreeMap::new()).unwrap();
    for (name, _, values) in tensors {
        let mut bytes = Vec::new();
        formats::tensor::narrow(Dtype::F32, values, &mut bytes).unwrap();
        writer.write(name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    std::fs::rename(folder.join("model.safetensors"), folder.join("adapter_model.safetensors")).unwrap();
}

/// A product for one module of a linear `[out, in]`.
pub fn product(module: &str, rank: usize, [outputs, inputs]: [usize; 2]) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let part = |part: &str, shape: [usize; 2]| {
        let name = format!("{module}.{part}.weight");
        let values = random(&name, shape[0] * shape[1]);
        (name, shape.to_vec(), values)
    };
    vec![part("lora_A", [rank, inputs]), part("lora_B", [outputs, rank])]
}

pub fn borrowed(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<(&str, Vec<usize>, Vec<f32>)> {
    tensors.iter().map(|(name, shape, values)| (name.as_str(), shape.clone(), values.clone())).collect()
}

#[test]
fn names_of_other_wrappers_are_understood() {
    let base = fixtures().join("checkpoints/llama_untied_gqa");
    let target = "model.layers.1.self_attn.o_proj.weight";
    let plain = Checkpoint::open(&base).unwrap().load(target).unwrap();
    for module in [
        "base_model.model.model.layers.1.self_attn.o_proj",
        "base_model.model.layers.1.self_attn.o_proj",
        "base_model.model.model.language_model.layers.1.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ] {
        let room = tempfile::tempdir().unwrap();
        adapter(room.path(), &json!({}), &borrowed(&product(module, 4, [32, 32])));
        let merged = Checkpoint::open_with(&base, Some(room.path())).unwrap();
        assert!(merged.load(target).unwrap() != plain, "{module}");
        assert_eq!(merged.adapter().unwrap().modules, 1);
    }
}

/// Names as PEFT writes them for models that see, with the transformers of today and of before 4.52; held to what PEFT 0.21 loads.
#[test]
fn adapters_of_models_that_see_are_told_where_peft_would_leave_them_out() {
    let [gemma, qwen] = ["gemma3_vision", "qwen2_5_vl_vision"].map(checkpoint);
    let (attention, mlp) = ("layers.0.self_attn.q_proj", "blocks.0.mlp.down_proj");
    let opened = |model: &Path, module: &str, settings: Value| {
        // Of the shape that the tensor has which it ends like; of towers the last one.
        let plain = Checkpoint::open(model).unwrap();
        let tower = ["visual", "vision"].iter().any(|part| module.contains(part));
        let leaf = module.rsplit('.').next().unwrap();
        let alike = |name: &str| {
            name.contains("vis") == tower && name.contains(".0.") && name.ends_with(&format!("{leaf}.weight"))
        };
        let entry = plain.entries().iter().find(|entry| alike(&entry.name)).unwrap();
        let room = tempfile::tempdir().unwrap();
        let shape = [entry.shape[0], entry.shape[1]];
        let module = format!("base_model.model.{module}");
        adapter(room.path(), &settings, &borrowed(&product(&module, 4, shape)));
        let merged = Checkpoint::open_with(model, Some(room.path())).map_err(|error| error.to_string())?;
        let changed = |name: &&str| merged.load(name).unwrap() != plain.load(name).unwrap();
        let names: Vec<&str> = plain.entries().iter().map(|entry| entry.name.as_str()).filter(changed).collect();
        Ok::<_, String>((names.join(" "), merged.notices()))
    };
    let (text, tower) = ("language_model.model.", "vision_tower.vision_model.encoder.");
    for (model, before, leaf, changes, foreign) in [
        (&gemma, "model.language_model.", attention, text, false),
        (&gemma, "language_model.model.", attention, text, false),
        (&gemma, "model.", attention, text, true),
        (&gemma, "model.vision_tower.encoder.", attention, tower, false),
        (&gemma, "vision_tower.vision_model.encoder.", attention, tower, false),
        (&gemma, "vision_tower.encoder.", attention, tower, true),
        (&gemma, "vision_model.encoder.", attention, tower, true),
        (&qwen, "model.language_model.", attention, "model.", false),
        (&qwen, "model.", attention, "model.", true),
        (&qwen, "model.visual.", mlp, "visual.", false),
        (&qwen, "visual.", mlp, "visual.", true),
    ] {
        let module = format!("{before}{leaf}");
        let (changed, notes) = opened(model.path(), &module, json!({})).unwrap();
        assert_eq!(changed, format!("{changes}{leaf}.weight"), "{module}");
        let told = notes.iter().filter(|note| note.contains("2 of the adapter's 2 tensors")).count();
        assert_eq!(told, usize::from(foreign), "{module}: {notes:?}");
    }
    let error = opened(gemma.path(), attention, json!({})).unwrap_err();
    assert!(error.contains("2 tensors of the model end in `layers.0.self_attn.q_proj.weight`"), "{error}");
    // Settings speak of the names of today, too.
    let settings = json!({"target_modules": r".*language_model.*\.q_proj"});
    let (_, notes) = opened(gemma.path(), &format!("model.language_model.{attention}"), settings).unwrap();
    let [note] = &notes[..] else { panic!("{notes:?}") };
    assert!(
        note.contains("no factors for 1 of the modules that target_modules names (`model.language_model.layers.1."),
        "{note}"
    );
    // Without a list PEFT has one of its own.
    for (settings, told) in [(json!({"target_modules": null}), true), (json!({}), false)] {
        let (_, notes) = opened(gemma.path(), &format!("model.language_model.{attention}"), settings).unwrap();
        let found =
            notes.iter().any(|note| note.contains("names no target_modules, and PEFT takes those of its own table"));
        assert_eq!(found, told, "{notes:?}");
    }
    // Tensors that were saved whole are looked for by the whole name.
    for (name, foreign) in [("model.language_model.embed_tokens.weight", false), ("model.embed_tokens.weight", true)] {
        let room = tempfile::tempdir().unwrap();
        let values = vec![0.5; 96 * 64];
        adapter(room.path(), &json!({}), &[(&format!("base_model.model.{name}"), vec![96, 64], values)]);
        let notes = Checkpoint::open_with(qwen.path(), Some(room.path())).unwrap().notices();
        assert_eq!(notes.iter().any(|note| note.contains("as PEFT calls them")), foreign, "{name}: {notes:?}");
    }
}

#[test]
fn what_cannot_be_merged_is_told_in_a_sentence() {
    let base = fixtures().join("checkpoints/llama_untied_gqa");
    let good = product("base_model.model.model.layers.0.self_attn.o_proj", 4, [32, 32]);
    let told = |settings: Value, tensors: &[(String, Vec<usize>, Vec<f32>)]| {
        let room = tempfile::tempdir().unwrap();
        adapter(room.path(), &settings, &borrowed(tensors));
        let opened = Checkpoint::open_with(&base, Some(room.path()));
        let error = match opened {
            Err(error) => error,
            Ok(merged) => merged.load("model.layers.0.self_attn.o_proj.weight").unwrap_err(),
        };
        error.to_string().replace(&room.path().display().to_string(), "DIR")
    };
    for (settings, words) in [
        (
            json!({"peft_type": "LOHA"}),
            "DIR/adapter_config.json: peft_type is LOHA, and only LORA (with rsLoRA and DoRA) is merged here; merge it with PEFT",
        ),
        (json!({"peft_type": "IA3"}), "peft_type is IA3, and only LORA"),
        (json!({"trainable_token_indices": [1]}), "trainable_token_indices is set: tokens that are trained alone"),
        (json!({"layer_replication": [[0, 1]]}), "layer_replication is set"),
        (json!({"target_parameters": ["mlp.experts.gate_up_proj"]}), "target_parameters is set"),
        (json!({"init_lora_weights": "pissa"}), "path_initial_model_for_weight_conversion"),
        (json!({"lora_alpha": 8, "target_parameters": ["x"]}), "give the model that comes out"),
        (json!({"r": 8}), "its rank is 4, and adapter_config.json says 8"),
        (json!({"r": 4.5}), "r is 4.5, expected a positive number"),
        (json!({"r": 0}), "r is 0, expected a positive number"),
        (json!({"lora_alpha": "8"}), "lora_alpha is \"8\", expected a number"),
        (json!({"rank_pattern": {"(": 2}}), "rank_pattern has an invalid pattern `(`"),
    ] {
        let message = told(settings.clone(), &good);
        assert!(message.contains(words), "{settings}: {message}");
    }
    let absent = product("base_model.model.model.layers.9.self_attn.o_proj", 4, [32, 32]);
    let message = told(json!({}), &absent);
    assert!(message.contains("has no `model.layers.9.self_attn.o_proj.weight` that it could change"), "{message}");
    let message = told(json!({}), &product("base_model.model.model.layers.0.self_attn.o_proj", 4, [48, 32]));
    assert!(message.contains("made for a weight of shape [48, 32]"), "{message}");
    let message = told(json!({}), &good[..1]);
    assert!(message.contains("lora_A is there and lora_B is not"), "{message}");
    let resized = vec![("base_model.model.model.embed_tokens.weight".to_owned(), vec![97, 32], vec![0.0; 97 * 32])];
    assert!(told(json!({}), &resized).contains("vocabulary that was resized"));
    let unknown = vec![("base_model.model.score.weight".to_owned(), vec![2, 32], vec![0.0; 64])];
    assert!(told(json!({}), &unknown).contains("has no `score.weight`"));
    let mut broken = good.clone();
    broken[0].2[5] = f32::NAN;
    assert!(told(json!({}), &broken).contains("value NaN at index 5"));

    let room = tempfile::tempdir().unwrap();
    let error = |folder: &Path| Checkpoint::open_with(&base, Some(folder)).unwrap_err().to_string();
    assert!(error(room.path()).contains("adapter_config.json is missing"));
    std::fs::write(room.path().join("adapter_config.json"), r#"{"peft_type": "LORA"}"#).unwrap();
    std::fs::write(room.path().join("adapter_model.bin"), "").unwrap();
    assert!(error(room.path()).contains("convert it once with PEFT: PeftModel.from_pretrained"));
}

/// An adapter of the built-in model that changes it a good deal, and replaces a norm.
fn demo_adapter(folder: &Path) {
    let mut tensors = Vec::new();
    for layer in 0..4 {
        tensors.extend(product(&format!("base_model.model.model.layers.{layer}.self_attn.o_proj"), 4, [256, 256]));
    }
    let name = "base_model.model.model.norm.weight".to_owned();
    tensors.push((name, vec![256], (0..256).map(|i| 1.0 + (i % 3) as f32 / 64.0).collect()));
    adapter(folder, &json!({"lora_alpha": 4.0}), &borrowed(&tensors));
}

#[test]
fn a_run_takes_the_merged_model_as_the_original() {
    let room = tempfile::tempdir().unwrap();
    let model = pipeline::model(room.path());
    let folder = room.path().join("adapter");
    demo_adapter(&folder);
    for (name, toml) in [("out", "scheme = 'W8A16'\ngroup_size = 64"), ("out.gguf", "format = 'gguf'\nscheme = 'Q8_0'")]
    {
        let toml = format!("{toml}\nmethod = 'rtn'\nadapter = '{}'", folder.display());
        let output = room.path().join(name);
        let limits = Limits::default();
        let verification = Verification { text: "held-out".into(), context: 128, windows: Some(2), limits };
        let recipe = Recipe::resolve(toml::from_str::<Request>(&toml).unwrap()).unwrap();
        let job = Job::one(&model, &output, recipe, Some(verification), false);
        let report = job.run_one(&Cpu::default(), &mut Progress::new(true)).unwrap();
        let merged = report.adapter.as_ref().unwrap();
        assert_eq!((merged.modules, merged.replaced, merged.kind), (4, 1, "lora"));
        let kld = report.quality.as_ref().unwrap().beside.as_ref().unwrap().kld_mean;
        assert!(kld < 0.002, "{name}: against the merged original 8 bits lose little, and here {kld}");

        let source = Checkpoint::open_with(&model, Some(&folder)).unwrap();
        let written = Checkpoint::open(&output).unwrap();
        let norm = written.load("model.norm.weight").unwrap();
        assert_eq!(norm, source.load("model.norm.weight").unwrap(), "{name}: the norm is the adapter's");
        let linear = "model.layers.1.self_attn.o_proj.weight";
        let distance = |a: &Checkpoint, b: &Checkpoint| {
            let (a, b) = (a.load(linear).unwrap(), b.load(linear).unwrap());
            a.iter().zip(&b).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt()
        };
        let plain = Checkpoint::open(&model).unwrap();
        let [near, far] = [&source, &plain].map(|other| distance(&written, other));
        assert!(near < 0.2 * far, "{name}: {near} from the merged, {far} from the plain weights");
    }
}

#[test]
fn merge_writes_the_merged_checkpoint() {
    let room = Room::new();
    let model = room.whole_model();
    demo_adapter(&room.path("adapter"));
    let args = ["merge", "model", "--adapter", "adapter", "-o", "out"];
    let run = room.run(args);
    run.succeeds();
    assert!(run.stdout().contains("4 modules merged, 1 tensors replaced"), "{}", run.stdout());
    let merged = Checkpoint::open_with(&model.path(""), Some(&room.path("adapter"))).unwrap();
    let written = Checkpoint::open(&room.path("out")).unwrap();
    assert_eq!(written.entries(), merged.entries(), "names, shapes and types stay");
    for entry in merged.entries() {
        let narrowed: Vec<f32> = match merged.raw(&entry.name) {
            Some(raw) => raw.to_f32().unwrap(),
            None => {
                let mut bytes = Vec::new();
                formats::tensor::narrow(Dtype::BF16, &merged.load(&entry.name).unwrap(), &mut bytes).unwrap();
                let mut back = vec![0.0; bytes.len() / 2];
                formats::tensor::widen(Dtype::BF16, &bytes, &mut back).unwrap();
                back
            }
        };
        assert!(written.load(&entry.name).unwrap() == narrowed, "{}", entry.name);
    }
    assert!(room.path("out/tokenizer.json").exists());
    assert_eq!(written.config(), merged.config());
    room.run(args).refuses(2, &["out: exists already"]);
    room.run(["merge", "model", "--adapter", "model", "-o", "new"]).refuses(1, &["adapter_config.json is missing"]);
    room.run(["merge", "model", "--adapter", "adapter", "-o", "adapter", "--force"]).refuses(2, &["adapter"]);
    room.run(["eval", "model", "--adapter", "adapter", "--reference", "out", "--context", "64", "--windows", "1"])
        .succeeds();
    assert_eq!(room.names(), ["adapter", "model", "out"]);
}

#[test]
fn columns_come_first_where_the_model_has_them_so_whatever_the_flag() {
    // A square matrix tells nothing by its shape; PEFT sets the flag for GPT-2's modules and takes it back for linears.
    let (folder, base) = cases().into_iter().find(|(folder, _)| folder.ends_with("lora")).expect("a plain case");
    let golden = Checkpoint::open_with(&base, Some(&folder)).unwrap();
    let room = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("adapter_model.safetensors"), room.path().join("adapter_model.safetensors")).unwrap();
    let mut config = read(&folder.join("adapter_config.json"));
    config["fan_in_fan_out"] = json!(true);
    std::fs::write(room.path().join("adapter_config.json"), config.to_string()).unwrap();
    let flagged = Checkpoint::open_with(&base, Some(room.path())).unwrap();
    let square = |entry: &&quantc::weights::Entry| matches!(entry.shape[..], [a, b] if a == b);
    assert!(golden.entries().iter().filter(square).count() > 0);
    for entry in golden.entries() {
        assert!(golden.load(&entry.name).unwrap() == flagged.load(&entry.name).unwrap(), "{}", entry.name);
    }
}
