//! Model folders as people have them: what lies beside the weights, paths that mean a model, what is there in its place.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::adapter::{adapter, random};
use crate::harness::{Model, Room};

/// Quick, and without a text.
const RTN: &[&str] = &["--method", "rtn", "--group-size", "64", "--verify-text", "none"];

/// What every output of the built-in model has beside its configuration and weights.
const TOKENIZER: &[&str] = &["generation_config.json", "tokenizer.json", "tokenizer_config.json"];

/// Every file below a folder, with its content.
fn tree(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
                found.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    found
}

fn put(model: &Model, name: &str, content: impl AsRef<[u8]>) {
    let path = model.path(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

fn json_at(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// An adapter for one linear of the built-in model.
pub fn small_adapter(folder: &Path) {
    let module = "base_model.model.model.layers.0.self_attn.o_proj";
    let parts =
        [("lora_A", [4, 256]), ("lora_B", [256, 4])].map(|(part, shape)| (format!("{module}.{part}.weight"), shape));
    let parts: Vec<_> =
        parts.iter().map(|(name, shape)| (&name[..], shape.to_vec(), random(name, shape[0] * shape[1]))).collect();
    adapter(folder, &json!({}), &parts);
}

/// quantize, convert and merge of `model`, each to an output of its own name.
fn commands() -> Vec<Vec<&'static str>> {
    vec![
        [&["quantize", "model", "-o", "quantize"], RTN].concat(),
        vec!["convert", "model", "-o", "convert"],
        vec!["merge", "model", "--adapter", "adapter", "-o", "merge"],
    ]
}

#[test]
fn everything_beside_the_weights_goes_along_and_the_rest_is_told() {
    let room = Room::new();
    let model = room.model();
    small_adapter(&room.path("adapter"));
    let kept = [
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "tekken.json",
        "params.json",
        "qwen.tiktoken",
        "tiktoken.model",
        "configuration_own.py",
        "LICENSE",
        "README.de.md",
        "sparse_linear.pt",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "additional_chat_templates/tool.jinja",
        "figures/deep/down.png",
        "model_head.pkl",
        "vision-lora/adapter_config.json",
        "vision-lora/adapter_model.safetensors",
    ];
    for name in kept {
        put(&model, name, format!("{{\"name\": \"{name}\"}}"));
    }
    put(&model, "modules.json", r#"[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]"#);
    put(&model, "README.md", "---\nlicense: apache-2.0\ntags: [a]\n---\n# Hers\n");
    let left: &[(&str, &[&str])] = &[
        (
            "weights in another form, or not in the index",
            &[
                "consolidated.safetensors",
                "flax_model.msgpack",
                "model.onnx",
                "onnx/",
                "original/",
                "pytorch_model.bin",
                "tiny",
            ],
        ),
        ("left by training", &["checkpoint-500/", "optimizer.pt", "runs/", "trainer_state.json", "training_args.bin"]),
        ("of an earlier quantization", &["hf_quant_config.json", "quantize_config.json"]),
        ("an adapter, which --adapter would merge", &["adapter_config.json", "adapter_model.safetensors"]),
        ("downloads that are not complete", &["vocab.json.incomplete"]),
        ("hidden files and caches", &[".cache/", ".git/", ".gitattributes", "__pycache__/"]),
    ];
    for (_, names) in left {
        for name in *names {
            let inner = if name.ends_with('/') { format!("{name}inner.json") } else { (*name).to_owned() };
            put(&model, &inner, if *name == "tiny" { "GGUF" } else { "x" });
        }
    }
    put(&model, "model.safetensors.index.json.bak", "kept");
    for command in commands() {
        let run = room.run(&command);
        run.succeeds();
        let output = command[0];
        let found = tree(&room.path(output));
        for name in kept.iter().copied().chain(TOKENIZER.iter().copied()) {
            assert!(found.get(name) == Some(&std::fs::read(model.path(name)).unwrap()), "{output}: {name}");
        }
        let mut others: Vec<&str> = found.keys().map(|name| &name[..]).collect();
        others.retain(|name| !kept.contains(name) && !TOKENIZER.contains(name));
        let card = std::fs::read_to_string(model.path("README.md")).unwrap().into_bytes();
        let told = run.stderr();
        if output == "quantize" {
            let own = ["README.md", "README.original.md", "config.json", "model.safetensors", "report.json"];
            let all = [&own[..4], &["model.safetensors.index.json.bak", "modules.json"], &own[4..]].concat();
            assert_eq!(others, all);
            assert!(found["README.original.md"] == card);
            let own_card = String::from_utf8(found["README.md"].clone()).unwrap();
            assert!(
                own_card.starts_with("---\nlicense: apache-2.0\nlibrary_name: transformers\ntags:\n"),
                "{own_card}"
            );
            assert!(told.contains("note: the model card of model is README.original.md now"), "{told}");
            let report: Value = serde_json::from_slice(&found["report.json"]).unwrap();
            let notes: Vec<&str> =
                report["notes"].as_array().unwrap().iter().map(|note| note.as_str().unwrap()).collect();
            assert!(notes.iter().any(|note| told.contains(note) && note.starts_with("left out of")), "{notes:?}");
        } else {
            let all =
                ["README.md", "config.json", "model.safetensors", "model.safetensors.index.json.bak", "modules.json"];
            assert_eq!(others, all, "{output}");
            assert!(found["README.md"] == card, "{output}");
        }
        let lines: Vec<&str> = told.lines().filter(|line| line.starts_with("note: left out of")).collect();
        assert_eq!(lines.len(), 1, "{output}: {told}");
        for (why, names) in left {
            let words = format!("{} ({why})", names.join(", "));
            assert!(lines[0].contains(&words), "{output}: `{words}` is missing in: {}", lines[0]);
        }
    }
    // What is said of the first run is no card of the second.
    room.run(["convert", "quantize", "-o", "again"]).succeeds();
    let again = tree(&room.path("again"));
    assert!(
        !again.contains_key("README.md")
            && again.contains_key("README.original.md")
            && !again.contains_key("report.json")
    );
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_odd_names_kept() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;
    let room = Room::new();
    let model = room.model();
    room.file("hub/blobs/abc", "{\"blob\": 1}");
    room.file("hub/blobs/1_Pooling/config.json", "{}");
    // As a hub cache has it.
    symlink("../../blobs/abc", model.path("preprocessor_config.json")).unwrap();
    symlink("../../blobs/1_Pooling", model.path("1_Pooling")).unwrap();
    symlink("../../blobs/gone", model.path("gone.json")).unwrap();
    symlink("..", model.path("around")).unwrap();
    std::fs::create_dir(model.path("figures")).unwrap();
    symlink(".", model.path("figures/itself")).unwrap();
    let odd = OsStr::from_bytes(b"caf\xe9.txt");
    std::fs::write(model.path("").join(odd), "odd").unwrap();
    assert!(room.shell("mkfifo model/pipe").code() == Some(0));
    std::fs::create_dir(room.path("hub/snapshots")).unwrap();
    std::fs::rename(room.path("model"), room.path("hub/snapshots/abcd")).unwrap();
    let run = room.run(["convert", "hub/snapshots/abcd", "-o", "out"]);
    run.succeeds();
    let out = room.path("out");
    assert_eq!(std::fs::read(out.join("preprocessor_config.json")).unwrap(), b"{\"blob\": 1}");
    assert!(!out.join("preprocessor_config.json").is_symlink() && !out.join("1_Pooling").is_symlink());
    assert_eq!(std::fs::read(out.join("1_Pooling/config.json")).unwrap(), b"{}");
    assert_eq!(std::fs::read(out.join(odd)).unwrap(), b"odd");
    let told = run.stderr();
    for words in
        ["gone.json (links to nothing)", "pipe (no files)", "around/, figures/itself/ (links to folders around it)"]
    {
        assert!(told.contains(words), "`{words}` is missing in: {told}");
    }
    assert!(!out.join("around").exists() && !out.join("pipe").exists());
}

/// Adds a head to the built-in model, which has none: a copy of the embedding, or something else.
fn add_head(model: &Model, differs: bool) {
    model.weights(|header, data| {
        let of = &header["model.embed_tokens.weight"];
        let at = |index: usize| of["data_offsets"][index].as_u64().unwrap() as usize;
        let mut head = data[at(0)..at(1)].to_vec();
        if differs {
            head.rotate_left(1024);
        }
        let (start, shape) = (data.len(), of["shape"].clone());
        data.extend(head);
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert("lm_head.weight".to_owned(), entry);
    });
}

/// Makes the built-in model the language model of a wrapper; `None` leaves a flag out.
fn wrap(model: &Model, outer: Option<bool>, inner: Option<bool>) {
    model.config(|config| {
        let mut text = config.take();
        text.as_object_mut().unwrap().shift_remove("tie_word_embeddings");
        text.as_object_mut().unwrap().extend(inner.map(|flag| ("tie_word_embeddings".to_owned(), json!(flag))));
        *config = json!({"model_type": "llava", "text_config": text});
        config.as_object_mut().unwrap().extend(outer.map(|flag| ("tie_word_embeddings".to_owned(), json!(flag))));
    });
}

#[test]
fn the_tie_of_head_and_embedding_is_what_the_files_have() {
    // Flags outside and in `text_config`; a head that is stored, and differs; the flags that are written.
    type Flags = (Option<bool>, Option<Option<bool>>);
    let (yes, no) = (Some(true), Some(false));
    let cases: &[(Flags, Option<bool>, Flags)] = &[
        ((yes, None), Some(true), (no, None)),
        ((yes, None), Some(false), (yes, None)),
        ((no, None), Some(true), (no, None)),
        ((None, None), Some(true), (None, None)),
        ((yes, Some(yes)), Some(true), (no, Some(no))),
        ((yes, Some(None)), Some(true), (no, Some(no))),
        ((None, Some(yes)), Some(true), (no, Some(no))),
        ((no, Some(yes)), Some(true), (no, Some(no))),
        ((no, Some(no)), Some(true), (no, Some(no))),
        ((yes, Some(no)), None, (yes, Some(yes))),
        ((None, Some(yes)), None, (yes, Some(yes))),
        ((no, Some(yes)), Some(false), (yes, Some(yes))),
    ];
    for (index, (flags, head, written)) in cases.iter().enumerate() {
        let label = format!("{flags:?} {head:?}");
        let room = Room::new();
        let model = room.model();
        small_adapter(&room.path("adapter"));
        if let Some(differs) = head {
            add_head(&model, *differs);
        }
        match flags {
            (outer, Some(inner)) => wrap(&model, *outer, *inner),
            (outer, None) => model.config(|config| match outer {
                Some(outer) => config["tie_word_embeddings"] = json!(outer),
                None => drop(config.as_object_mut().unwrap().shift_remove("tie_word_embeddings")),
            }),
        }
        for command in commands() {
            let run = room.run(&command);
            run.succeeds();
            let config = json_at(&room.path(command[0]).join("config.json"));
            let flag = |config: &Value| config.get("tie_word_embeddings").map(|flag| flag.as_bool().unwrap());
            let found = (flag(&config), config.get("text_config").map(flag));
            assert_eq!(found, *written, "{label} {command:?}");
            assert_eq!(run.stderr().contains("tie_word_embeddings is"), flags != written, "{label}: {}", run.stderr());
            let names = quantc::Checkpoint::open(&room.path(command[0])).unwrap();
            if *head == Some(true) {
                assert!(names.entry("lm_head.weight").is_some(), "{label}: the head went along");
            }
        }
        if *head == Some(true) {
            // The file is the same in all cases; that it can be measured is seen once.
            let measured = if index == 0 { ["--verify-windows", "1"] } else { ["--verify-text", "none"] };
            let args = ["quantize", "model", "-o", "m.gguf", "--scheme", "Q8_0", "--method", "rtn"];
            room.run(args.iter().chain(&measured)).succeeds();
            let file = formats::GgufFile::open(room.path("m.gguf")).unwrap();
            assert!(file.get("output.weight").is_some(), "{label}: the head is in the GGUF file");
        }
    }
}

#[test]
fn a_head_that_is_missing_is_told_with_the_way_out() {
    for change in [
        |config: &mut Value| config["tie_word_embeddings"] = json!(false),
        |config: &mut Value| {
            config.as_object_mut().unwrap().shift_remove("tie_word_embeddings");
        },
    ] {
        let room = Room::new();
        room.model().config(change);
        for command in [&["eval", "model", "--windows", "1"][..], &[&["quantize", "model", "-o", "out"], RTN].concat()]
        {
            let words = ["tensor `lm_head.weight` is missing", "[4096, 256]", "set tie_word_embeddings to true"];
            room.run(command).refuses(1, &words);
        }
    }
}

#[test]
fn the_head_of_an_unknown_family_goes_along() {
    let room = Room::new();
    let model = room.model();
    add_head(&model, true);
    model.config(|config| config["model_type"] = json!("unheard_of"));
    let run = room.run([&["quantize", "model", "-o", "out"], RTN].concat());
    run.succeeds();
    assert_eq!(json_at(&room.path("out/config.json"))["tie_word_embeddings"], false);
    assert!(quantc::Checkpoint::open(&room.path("out")).unwrap().entry("lm_head.weight").is_some());
}

#[test]
fn a_configuration_left_over_from_other_weights_is_dropped_with_a_note() {
    let methods = [
        "hqq",
        "torchao",
        "quanto",
        "modelopt",
        "auto-round",
        "eetq",
        "vptq",
        "aqlm",
        "gptq",
        "awq",
        "fp8",
        "bitsandbytes",
        "mxfp4",
    ];
    let mut configs: Vec<(&str, Value)> =
        methods.iter().map(|method| (*method, json!({"quantization_config": {"quant_method": method}}))).collect();
    let mlx = json!({"group_size": 64, "bits": 4});
    configs.push(("mlx", json!({"quantization": mlx, "quantization_config": mlx})));
    configs.push(("mlx", json!({"quantization": mlx})));
    configs.push((
        "compressed-tensors",
        json!({"quantization_config": {
            "quant_method": "compressed-tensors", "quantization_status": "frozen", "format": "dense",
            "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}},
        }}),
    ));
    configs.push(("fp8", json!({"text_config": {"quantization_config": {"quant_method": "fp8"}}})));
    let plain = |room: &Room| tree(&room.path("out"));
    let room = Room::new();
    room.model();
    room.run(["convert", "model", "-o", "out"]).succeeds();
    let expected = plain(&room);
    for (method, keys) in configs {
        let room = Room::new();
        let inside = keys.get("text_config").is_some();
        room.model().config(|config| {
            if inside {
                *config = json!({"model_type": "llava", "text_config": config.take()});
                config["text_config"]["quantization_config"] = keys["text_config"]["quantization_config"].clone();
            } else {
                config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
            }
        });
        let run = room.run(["convert", "model", "-o", "out"]);
        run.succeeds();
        let told = run.stderr();
        assert!(
            told.contains(&format!("note: config.json calls the weights quantized ({method})")),
            "{method}: {told}"
        );
        assert!(!told.contains("round activations"), "{method}: {told}");
        let found = plain(&room);
        assert!(found["model.safetensors"] == expected["model.safetensors"], "{method}");
        let config = String::from_utf8(found["config.json"].clone()).unwrap();
        assert!(!config.contains("quantization"), "{method}: {config}");
    }
    // Those that round as they load are not what the numbers say.
    let room = Room::new();
    room.model().config(|config| config["quantization_config"] = json!({"quant_method": "bitnet"}));
    room.run(["inspect", "model"]).refuses(1, &["model/config.json", "`bitnet`"]);
}

#[test]
fn packed_weights_that_are_not_read_say_whose_they_are() {
    let add = |model: &Model, name: &str, dtype: &str, shape: &[usize], bytes: usize| {
        model.weights(|header, data| {
            let start = data.len();
            data.extend(vec![0; bytes]);
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
            header.insert(name.to_owned(), entry);
        });
    };
    type Case<'a> = (Value, &'a [(&'a str, &'a str, &'a [usize], usize)], &'a [&'a str]);
    let module = "model.layers.9.mlp.up_proj";
    let part = |name: &str| format!("{module}.{name}");
    let (weight, scales, w_q, scale) = (part("weight"), part("scales"), part("W_q"), part("weight_scale"));
    let mlx = json!({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}});
    let frozen = json!({"quantization_config": {"quant_method": "compressed-tensors", "quantization_status": "frozen",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}}}});
    let packed: &[(&str, &str, &[usize], usize)] = &[(&weight, "U32", &[2, 2], 16), (&scales, "BF16", &[2, 1], 4)];
    let cases: &[Case<'_>] = &[
        (mlx, packed, &["model/config.json", "packed by MLX in mode \"mxfp4\"", "mlx_lm.convert --dequantize"]),
        (
            json!({"quantization": {"group_size": 32, "bits": 4}}),
            packed,
            &["model/model.safetensors", module, "scales is BF16 [2, 1], expected floats"],
        ),
        (json!({}), packed, &["model/model.safetensors", &weight, "packed by MLX", "lacks the `quantization`"]),
        (
            json!({"quantization_config": {"quant_method": "hqq"}}),
            &[(&w_q, "U8", &[2, 2], 4)],
            &["model/config.json", "`hqq`", "take the model it was made from"],
        ),
        (
            frozen,
            &[(&weight, "BF16", &[2, 2], 8), (&scale, "BF16", &[2, 1], 4)],
            &[&scale, "stored as plain numbers", "compressed-tensors would round"],
        ),
        (
            json!({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}),
            &[(&weight, "F8_E4M3FNUZ", &[2, 2], 4), (&scale, "BF16", &[1], 2)],
            &[&scale, "is of type F8_E4M3FNUZ, which is not read here"],
        ),
    ];
    for (keys, tensors, words) in cases {
        let room = Room::new();
        let model = room.model();
        model.config(|config| config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone()));
        for (name, dtype, shape, bytes) in *tensors {
            add(&model, name, dtype, shape, *bytes);
        }
        for command in [&["inspect", "model"][..], &["convert", "model", "-o", "out"]] {
            room.run(command).refuses(1, words);
        }
        assert_eq!(room.names(), ["model"]);
    }
}

#[test]
fn gguf_is_known_by_its_first_bytes() {
    let room = Room::new();
    room.whole_model();
    let q8 = ["--format", "gguf", "--scheme", "Q8_0", "--method", "rtn", "--verify-windows", "1"];
    room.run(["quantize", "model", "-o", "sha256-0ab1"].iter().chain(&q8)).succeeds();
    assert_eq!(room.names(), ["model", "sha256-0ab1", "sha256-0ab1.README.md", "sha256-0ab1.report.json"]);
    room.run(["inspect", "sha256-0ab1"]).succeeds();
    room.run(["eval", "sha256-0ab1", "--windows", "1"]).succeeds();
    room.run(["eval", "model", "--windows", "1", "--reference", "sha256-0ab1"]).succeeds();
    room.run(["convert", "sha256-0ab1", "-o", "plain"]).succeeds();
    room.run([&["quantize", "sha256-0ab1", "-o", "codes"], RTN].concat()).succeeds();
    small_adapter(&room.path("adapter"));
    room.run(["merge", "sha256-0ab1", "--adapter", "adapter", "-o", "merged"]).succeeds();
    room.run(["quantize", "model", "-o", "sha256-0ab1"].iter().chain(&q8)).refuses(2, &["exists already"]);
    room.run(["quantize", "model", "-o", "sha256-0ab1", "--force"].iter().chain(&q8)).succeeds();

    // Files that belong together are told by their numbers, with and without an ending.
    let split = ["--split-max-size", "2M"];
    room.run(["quantize", "model", "-o", "parts/m"].iter().chain(&q8).chain(&split)).succeeds();
    let parts: Vec<String> = tree(&room.path("parts")).into_keys().collect();
    assert!(parts.len() > 2 && parts[0].starts_with("m-00001-of-0000"), "{parts:?}");
    for ending in ["", ".blob"] {
        let folder = room.path(&format!("renamed{ending}"));
        std::fs::create_dir(&folder).unwrap();
        for part in parts.iter().filter(|part| part.ends_with(".gguf")) {
            let name = format!("{}{ending}", part.strip_suffix(".gguf").unwrap());
            std::fs::copy(room.path("parts").join(part), folder.join(name)).unwrap();
        }
        let first = format!("renamed{ending}/{}{ending}", parts[0].strip_suffix(".gguf").unwrap());
        let run = room.run(["inspect", &first]);
        run.succeeds();
        assert!(run.stdout().contains("4.20 million parameters"), "{}", run.stdout());
    }
}

#[test]
fn a_hub_cache_means_its_snapshot() {
    let room = Room::new();
    room.whole_model();
    let hash = "0123abcd";
    let root = "hub/models--org--name";
    let snapshot = |hash: &str| format!("{root}/snapshots/{hash}");
    std::fs::create_dir_all(room.path(&format!("{root}/snapshots"))).unwrap();
    std::fs::create_dir_all(room.path(&format!("{root}/blobs"))).unwrap();
    room.run(["inspect", root]).refuses(1, &["a hub cache without a snapshot"]);
    std::fs::rename(room.path("model"), room.path(&snapshot(hash))).unwrap();
    let snapshots = format!("{root}/snapshots");
    for path in [root, &snapshots] {
        let run = room.run(["convert", path, "-o", "out"]);
        run.succeeds();
        assert!(run.stderr().contains(&format!("its snapshot {hash}, the only one, was taken")), "{}", run.stderr());
        std::fs::remove_dir_all(room.path("out")).unwrap();
    }
    std::fs::create_dir_all(room.path(&snapshot("ffff"))).unwrap();
    room.run(["inspect", root]).refuses(1, &["2 snapshots", &snapshot(hash), &snapshot("ffff")]);
    room.file(&format!("{root}/refs/main"), hash);
    let run = room.run([&["quantize", root, "-o", "out"], RTN].concat());
    run.succeeds();
    assert!(run.stderr().contains("which refs/main names, was taken"), "{}", run.stderr());
    let card = std::fs::read_to_string(room.path("out/README.md")).unwrap();
    assert!(card.contains("\n# llama 4M, W4A16") && card.contains("library_name: transformers"), "{card}");
    room.run(["convert", root, "-o", &format!("{root}/out")]).refuses(2, &["may not be the input"]);
    room.file(&format!("{root}/refs/main"), "eeee");
    room.run(["inspect", root]).refuses(1, &["the snapshot eeee, which is not there", hash]);
    room.run(["inspect", "hub"]).refuses(1, &["a hub cache of 1 models", root]);
    // A download that ended early.
    room.file(&format!("{root}/refs/main"), "ffff");
    room.file(&format!("{root}/blobs/77.incomplete"), "x");
    room.run(["inspect", root]).refuses(1, &["config.json is missing", "77.incomplete", "run the download again"]);
}

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n";
const PAGE: &str = "<!DOCTYPE html>\n<html lang=\"en\"><head><title>Hub</title></head></html>\n";

#[test]
fn what_was_never_fetched_is_told_whatever_file_it_stands_for() {
    for (content, word) in
        [(POINTER, "git lfs pull"), (PAGE, "an HTML page"), ("", "is empty"), ("Entry not found", "Entry not found")]
    {
        for file in ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"] {
            let room = Room::new();
            let model = room.model();
            if file == "model.safetensors.index.json" {
                std::fs::remove_file(model.path("model.safetensors")).unwrap();
            }
            std::fs::write(model.path(file), content).unwrap();
            room.run(["eval", "model", "--windows", "1"]).refuses(1, &[&format!("model/{file}"), word]);
        }
        let room = Room::new();
        let model = room.model();
        std::fs::remove_file(model.path("tokenizer.json")).unwrap();
        std::fs::write(model.path("tokenizer.model"), content).unwrap();
        room.run(["eval", "model", "--windows", "1"]).refuses(1, &["model/tokenizer.model", word]);
        for file in ["m.gguf", "sha256-00"] {
            room.file(file, content);
            room.run(["inspect", file]).refuses(1, &[file, word]);
        }
        small_adapter(&room.path("adapter"));
        room.file("adapter/adapter_model.safetensors", content);
        room.run(["eval", "model", "--adapter", "adapter"]).refuses(1, &["adapter/adapter_model.safetensors", word]);
    }
    // Without a text nothing reads the tokenizer, and a pointer would go along.
    for file in ["tokenizer.json", "tekken.json", "qwen.tiktoken", "model.py"] {
        let room = Room::new();
        std::fs::write(room.model().path(file), POINTER).unwrap();
        for command in [&[&["quantize", "model", "-o", "out"], RTN].concat()[..], &["convert", "model", "-o", "out"]] {
            room.run(command).refuses(1, &[&format!("model/{file}"), "git lfs pull"]);
        }
        assert_eq!(room.names(), ["model"]);
    }
    let room = Room::new();
    std::fs::write(room.model().path("logo.png"), POINTER).unwrap();
    let run = room.run(["convert", "model", "-o", "out"]);
    run.succeeds();
    assert!(run.stderr().contains("logo.png (pointers of git-lfs"), "{}", run.stderr());
}

#[test]
fn what_is_no_model_is_told_for_what_it_is() {
    let room = Room::new();
    room.model();
    small_adapter(&room.path("adapter"));
    let mut config = json_at(&room.path("adapter/adapter_config.json"));
    config["base_model_name_or_path"] = json!("org/base");
    room.file("adapter/adapter_config.json", config.to_string());
    room.file("mlx/adapter_config.json", json!({"fine_tune_type": "lora", "num_layers": 16}).to_string());
    room.file("mlx/adapters.safetensors", "x");
    room.file("with-config/config.json", std::fs::read(room.path("model/config.json")).unwrap());
    room.file("with-config/adapter_config.json", config.to_string());
    std::fs::copy(room.path("adapter/adapter_model.safetensors"), room.path("with-config/adapter_model.safetensors"))
        .unwrap();
    room.file("pipeline/model_index.json", json!({"_class_name": "FluxPipeline"}).to_string());
    let unet = json!({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"});
    room.file("pipeline/unet/config.json", unet.to_string());
    room.file("meta/params.json", "{}");
    room.file("meta/consolidated.00.pth", "x");
    room.file("quants/a-Q4_K_M.gguf", "GGUF");
    room.file("quants/b-Q8_0.gguf", "GGUF");
    room.file("gguf/config.json", std::fs::read(room.path("model/config.json")).unwrap());
    room.file("gguf/m.gguf", "GGUF");
    room.file("keras/config.json", std::fs::read(room.path("model/config.json")).unwrap());
    room.file("keras/tf_model.h5", "x");
    room.file("outer/inner/config.json", "{}");
    room.file("old.bin", b"tjgg\x03\0\0\0");
    room.file("download/.cache/huggingface/download/x.incomplete", "x");
    room.file("shards/config.json", std::fs::read(room.path("model/config.json")).unwrap());
    let index = json!({"weight_map": {"w": "model-00001-of-00001.safetensors"}});
    room.file("shards/model.safetensors.index.json", index.to_string());
    room.file("shards/model-00001-of-00001.safetensors.incomplete", "x");
    for (input, words) in [
        ("adapter", &["adapter: an adapter and no model", "org/base", "--adapter"][..]),
        ("adapter/adapter_model.safetensors", &["an adapter and no model", "org/base"]),
        ("with-config", &["an adapter and no model", "org/base"]),
        ("mlx", &["an adapter of MLX", "mlx_lm.fuse --dequantize"]),
        ("mlx/adapters.safetensors", &["an adapter of MLX"]),
        ("pipeline", &["a pipeline of diffusers (FluxPipeline)"]),
        ("pipeline/unet", &["a part of a pipeline of diffusers (UNet2DConditionModel)"]),
        ("meta", &["params.json and consolidated weights"]),
        ("quants", &["give one of its files: quants/a-Q4_K_M.gguf, quants/b-Q8_0.gguf"]),
        ("gguf", &["its weights are GGUF", "gguf/m.gguf"]),
        ("keras", &["tf_model.h5", "not read"]),
        ("outer", &["config.json is missing; there is one in outer/inner"]),
        ("old.bin", &["before GGUF"]),
        ("download", &["config.json is missing", "x.incomplete"]),
        ("shards", &["model-00001-of-00001.safetensors", "is missing, and a download is not complete", ".incomplete"]),
        ("model/model.safetensors", &["give the folder that it lies in, model"]),
        ("model/config.json", &["give the folder that it lies in, model"]),
    ] {
        for command in
            [&["inspect", input][..], &["eval", "model", "--reference", input], &["convert", input, "-o", "out"]]
        {
            room.run(command).refuses(1, words);
        }
    }
    room.run(["eval", "model", "--adapter", "mlx"]).refuses(1, &["an adapter of MLX", "mlx_lm.fuse"]);
    let file = "adapter/adapter_model.safetensors";
    room.run(["eval", "model", "--adapter", file]).refuses(1, &[file, "--adapter takes the directory"]);
    // aria2 gives a file its whole size at once.
    room.file("model/model.safetensors.aria2", "x");
    room.run(["inspect", "model"]).refuses(1, &["model/model.safetensors", "not complete", "model.safetensors.aria2"]);
}

#[test]
fn files_of_a_tokenizer_that_were_cut_short_do_not_go_along() {
    let room = Room::new();
    let model = room.model();
    let whole = std::fs::read(model.path("tokenizer_config.json")).unwrap();
    for (name, content) in
        [("tokenizer.json", &b"{\"version\": \"1.0\", \"trunc"[..]), ("tokenizer_config.json", b"{\"a\": 1,")]
    {
        put(&model, name, content);
        room.run([&["quantize", "model", "-o", "out"], RTN].concat()).refuses(1, &[name, "fetch the file again"]);
        room.run(["convert", "model", "-o", "out"]).refuses(1, &[name, "fetch the file again"]);
        put(&model, name, &whole);
    }
}
