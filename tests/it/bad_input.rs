//! What the program says to input that it cannot use: one sentence, the right exit code, and nothing left behind.

use serde_json::{Value, json};

use crate::families::checkpoint;
use crate::harness::{Model, Room, TEXT};

/// A run of a second or so that uses everything: calibration, solving, writing, verification.
const QUICK: &[&str] = &["--samples", "4", "--seq-len", "64", "--verify-windows", "1"];

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

/// `quantize model -o out` with these arguments.
fn quantize(args: &[&str]) -> Vec<String> {
    let mut all: Vec<&str> = ["quantize", "model", "-o", "out"].iter().chain(QUICK).chain(args).copied().collect();
    if !args.contains(&"--calibration") {
        all.extend(["--calibration", TEXT]);
    }
    all.into_iter().map(str::to_owned).collect()
}

#[test]
fn the_same_run_without_damage_succeeds() {
    let room = Room::new();
    let model = room.model();
    // What the other tests do to a model, without doing it.
    model.weights(|_, _| {});
    model.config(|_| {});
    room.run(quantize(&[])).succeeds();
    assert_eq!(room.names(), ["model", "out"]);
    room.run(quantize(&[])).refuses(2, &["out", "--force"]);
    room.run(quantize(&["--force"])).succeeds();
    assert_eq!(room.names(), ["model", "out"]);
}

#[test]
fn a_damaged_safetensors_file_is_named() {
    type Change = fn(&mut serde_json::Map<String, Value>, &mut Vec<u8>);
    let cases: &[(Change, &[&str])] = &[
        (|_, data| data.extend([0, 0]), &["2 bytes follow the last tensor"]),
        (
            |header, _| {
                let other = header["model.layers.0.mlp.down_proj.weight"]["data_offsets"].clone();
                header[DOWN]["data_offsets"] = other;
            },
            &[DOWN, "overlaps"],
        ),
        (|header, _| header[DOWN]["data_offsets"].as_array_mut().unwrap().reverse(), &[DOWN, "offsets"]),
        (|header, _| header[DOWN]["shape"] = json!([256, 769]), &[DOWN, "393728 bytes", "[256, 769]"]),
        (|header, _| header[DOWN]["shape"] = json!([768, 256]), &[DOWN, "[768, 256]", "[256, 768]"]),
        (|header, _| header[DOWN]["shape"] = json!([1u64 << 40, 1u64 << 40]), &[DOWN, "no size in bytes"]),
        (|header, _| header[DOWN]["dtype"] = json!("I16"), &[DOWN, "I16", "BF16"]),
        (|header, _| header[DOWN]["dtype"] = json!("X9"), &[DOWN, "X9"]),
        (|header, _| drop(header.shift_remove(DOWN)), &["gap"]),
        (
            |header, _| {
                let tensor = header.shift_remove(DOWN).unwrap();
                header.insert("model.layers.1.mlp.else.weight".to_owned(), tensor);
            },
            &[DOWN, "missing", "[256, 768]"],
        ),
        (
            |header, data| {
                let end = data.len();
                data.extend([0, 0]);
                let extra = json!({"dtype": "BF16", "shape": [1], "data_offsets": [end, end + 2]});
                header.insert("model.layers.1.extra.weight".to_owned(), extra);
            },
            &["model.layers.1.extra.weight", "no rule"],
        ),
    ];
    for (change, words) in cases {
        let room = Room::new();
        let model = room.model();
        model.weights(*change);
        room.run(quantize(&["--unknown-tensors", "refuse"])).refuses(1, &[words, &["model"][..]].concat());
        assert_eq!(room.names(), ["model"], "{words:?}");
    }
}

#[test]
fn a_file_that_is_no_safetensors_file_is_named() {
    let whole = {
        let room = Room::new();
        std::fs::read(room.model().path("model.safetensors")).unwrap()
    };
    let cases: &[(&[u8], &str)] = &[
        (b"", "empty"),
        (b"\x01\x02", "2 bytes"),
        (&[0xff; 16], "header would be"),
        (b"\x05\0\0\0\0\0\0\0hello", "not a JSON object"),
        (&whole[..5_000_000], "truncated"),
        (&whole[..100], "model.safetensors"),
    ];
    for (bytes, word) in cases {
        let room = Room::new();
        let model = room.model();
        std::fs::write(model.path("model.safetensors"), bytes).unwrap();
        for args in [quantize(&[]), ["inspect", "model"].map(str::to_owned).to_vec()] {
            room.run(args).refuses(1, &["model.safetensors", word]);
        }
        assert_eq!(room.names(), ["model"]);
    }
}

#[test]
fn shards_that_are_missing_or_elsewhere_are_named() {
    let index = |shard: &str| json!({"weight_map": {DOWN: shard}}).to_string();
    let cases = [
        (index("model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors"),
        (index("../model.safetensors"), "expected a file in the index's folder or in one within it"),
        ("[]".to_owned(), "weight_map"),
        ("{".to_owned(), "index.json"),
    ];
    for (content, word) in cases {
        let room = Room::new();
        let model = room.model();
        std::fs::remove_file(model.path("model.safetensors")).unwrap();
        room.run(["inspect", "model"]).refuses(1, &["model.safetensors", "missing"]);
        std::fs::write(model.path("model.safetensors.index.json"), content).unwrap();
        room.run(quantize(&[])).refuses(1, &["model.safetensors.index.json", word]);
        assert_eq!(room.names(), ["model"]);
    }
}

#[test]
fn numbers_that_are_not_finite_are_found_wherever_they_are() {
    // A quantized linear, a norm, and a row of the embedding that no text touches, each with NaN or infinity.
    for (tensor, bits) in
        [(DOWN, 0x7fc0u16), (DOWN, 0xff80), ("model.norm.weight", 0x7fc0), ("model.embed_tokens.weight", 0x7f80)]
    {
        let room = Room::new();
        room.model().poison(tensor, bits);
        for args in [
            quantize(&[]),
            quantize(&["--method", "rtn", "--verify-text", "none"]),
            ["convert", "model", "-o", "out"].map(str::to_owned).to_vec(),
            ["eval", "model", "--windows", "1"].map(str::to_owned).to_vec(),
        ] {
            room.run(&args).refuses(1, &["model/model.safetensors", tensor, "not a finite number"]);
            assert_eq!(room.names(), ["model"], "{args:?}");
        }
    }
}

#[test]
fn the_numbers_of_an_activation_are_single_and_finite() {
    let room = Room::new();
    let model = checkpoint("apertus_plain");
    let tensor = "model.layers.1.mlp.act_fn.alpha_n";
    Model::at(model.path()).poison(tensor, 0x7f80);
    let path = model.path().to_str().unwrap();
    room.run(["quantize", path, "-o", "out", "--method", "rtn", "--verify-text", "none"])
        .refuses(1, &[tensor, "single finite number", "[inf]"]);
    assert!(room.names().is_empty());
}

#[test]
fn activations_that_overflow_are_an_error() {
    let room = Room::new();
    // The largest bf16 as a norm's weight: finite itself, and everything after it is not.
    let model = room.model();
    model.weights(|header, data| {
        let at = |index: usize| {
            header["model.layers.0.input_layernorm.weight"]["data_offsets"][index].as_u64().unwrap() as usize
        };
        for value in data[at(0)..at(1)].chunks_exact_mut(2) {
            value.copy_from_slice(&0x7f7fu16.to_le_bytes());
        }
    });
    room.run(quantize(&[])).refuses(1, &["model", "NaN or an infinity"]);
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn a_configuration_that_cannot_be_is_named_by_its_key() {
    let cases: &[(&str, Value, &str)] = &[
        ("model_type", json!("mamba"), "mamba"),
        ("model_type", Value::Null, "model_type is null, and it is what names the architecture"),
        ("hidden_size", json!("x"), "\"x\""),
        ("hidden_size", json!(-1), "-1"),
        ("hidden_size", json!(1u64 << 60), "hidden_size"),
        ("num_attention_heads", json!(0), "positive"),
        ("num_key_value_heads", json!(3), "cannot share 3"),
        ("num_hidden_layers", json!(9), "model.layers.4."),
        (
            "num_hidden_layers",
            json!(1u64 << 40),
            "num_hidden_layers is 1099511627776, but the checkpoint has only 38 tensors",
        ),
        ("num_hidden_layers", json!(30_000), "num_hidden_layers is 30000"),
        ("num_attention_heads", json!(1u32 << 31), "at most 65536"),
        ("rope_parameters", json!({"rope_theta": 0}), "rope_theta must be a positive number, found 0"),
        ("hidden_act", json!("mish"), "silu"),
        ("rms_norm_eps", json!("x"), "rms_norm_eps"),
        ("rms_norm_eps", json!(-1.0), "rms_norm_eps must be a positive number"),
        ("vocab_size", json!(100), "[100, 256]"),
        ("head_dim", json!(63), "63"),
    ];
    for (key, value, word) in cases {
        let room = Room::new();
        room.whole_model().config(|config| config[*key] = value.clone());
        room.run(quantize(&[])).refuses(1, &["model", word]);
        assert_eq!(room.names(), ["model"], "{key}");
    }
    let room = Room::new();
    room.whole_model().weights(|header, data| {
        header.clear();
        data.clear();
    });
    room.run(quantize(&[])).refuses(1, &["model: the checkpoint holds no tensors"]);
    // Of a mixture.
    for (key, value, word) in [
        ("num_local_experts", json!(1 << 20), "num_local_experts must be at most 16384"),
        ("num_local_experts", json!(7), "block_sparse_moe.experts.6.w1.weight` is missing"),
        ("num_experts_per_tok", json!(7), "each token would take 7 experts, and there are 6"),
        ("num_experts_per_tok", json!("2"), "num_experts_per_tok must be a positive number, found \"2\""),
    ] {
        let folder = crate::families::checkpoint("mixtral_plain");
        let path = folder.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let room = Room::new();
        let model = folder.path().to_str().unwrap();
        let run = room.run(["quantize", model, "-o", "out", "--method", "rtn", "--verify-text", "none"]);
        run.refuses(1, &[word]);
        assert_eq!(room.names(), [""; 0], "{key}");
    }
    for (content, word) in [("{", "not valid JSON"), ("[]", "not a JSON object")] {
        let room = Room::new();
        std::fs::write(room.whole_model().path("config.json"), content).unwrap();
        room.run(["inspect", "model"]).refuses(1, &["model/config.json", word]);
    }
}

#[test]
fn a_tokenizer_that_cannot_be_used_is_named() {
    let room = Room::new();
    let model = room.model();
    let tokenizer = model.path("tokenizer.json");
    let good = std::fs::read(&tokenizer).unwrap();
    let quiet = ["eval", "model", "--windows", "1", "--quiet"];
    std::fs::remove_file(&tokenizer).unwrap();
    room.run(quantize(&[])).refuses(1, &["model", "no tokenizer.json"]);
    // Round to nearest needs no text, and then no tokenizer.
    room.run(quantize(&["--method", "rtn", "--verify-text", "none", "--force"])).succeeds();
    for bytes in [&good[..good.len() / 2], b"[]", b"{}", b""] {
        std::fs::write(&tokenizer, bytes).unwrap();
        room.run(quiet).refuses(1, &["model/tokenizer.json"]);
    }
    std::fs::write(&tokenizer, &good).unwrap();
    std::fs::write(model.path("tokenizer_config.json"), "[").unwrap();
    room.run(quiet).refuses(1, &["model/tokenizer_config.json"]);

    // One whose ids go beyond the embedding: two common words are tokens of their own, spaces and all.
    let room = Room::new();
    let model = room.model();
    let mut json: Value = serde_json::from_slice(&good).unwrap();
    for (at, token) in [" the ", " and "].iter().enumerate() {
        let id = 4096 + at;
        json["added_tokens"].as_array_mut().unwrap().push(json!({"id": id, "content": token, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": false}));
    }
    std::fs::write(model.path("tokenizer.json"), json.to_string()).unwrap();
    room.run(quiet).refuses(1, &["model", "4096 embeddings", "tokenizer.json"]);
    room.run(quantize(&[])).refuses(1, &["model", "4096 embeddings", "tokenizer.json"]);
    assert_eq!(room.names(), ["model"]);
}

#[test]
fn a_text_that_cannot_be_used_is_named_with_the_place() {
    let room = Room::new();
    room.model();
    room.file("latin.txt", b"caf\xe9");
    room.file("empty.txt", " \n");
    room.file("short.txt", "a few words");
    room.file("bad.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n");
    room.file("broken.json", "[\n{]");
    room.file("chat.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n");
    let cases = [
        ("nowhere.txt", &["nowhere.txt: no such file", "mixed"][..]),
        ("latin.txt", &["latin.txt", "byte 3 "]),
        ("empty.txt", &["empty.txt", "empty"]),
        ("short.txt", &["tokens", "give more text"]),
        ("bad.jsonl", &["bad.jsonl, line 2", "`txt`"]),
        ("broken.json", &["broken.json, line 2, column 2"]),
        ("model", &["model: a folder; give one file"]),
    ];
    for (file, words) in cases {
        room.run(quantize(&["--calibration", file])).refuses(1, words);
        room.run(quantize(&["--verify-text", file])).refuses(1, words);
        room.run(["eval", "model", "--text", file]).refuses(1, words);
    }
    room.run(["eval", "model", "--text", "chat.jsonl"]).refuses(1, &["chat.jsonl", "running text"]);
    let left = room.names();
    assert!(left.iter().all(|name| name != "out" && !name.starts_with('.')), "{left:?}");
}

#[test]
fn requests_that_cannot_be_met_are_usage_errors() {
    let room = Room::new();
    room.model();
    room.file("type.toml", "samples = 4\nbits = 'x'\n");
    room.file("key.toml", "\nfrob = 1\n");
    room.file("nothing.toml", "[[override]]\nmatch = 'nope'\nbits = 8\n");
    let cases: &[(&[&str], &[&str])] = &[
        (&["--bits", "5"], &["5 bits", "2, 3, 4 or 8"]),
        (&["--scheme", "W5A16"], &["W5A16", "W4A16"]),
        (&["--format", "onnx"], &["onnx", "compressed-tensors"]),
        (&["--method", "magic"], &["magic", "awq+gptq"]),
        (&["--group-size", "48"], &["model.layers.0.self_attn.q_proj.weight", "256", "48", "64, 32"]),
        (&["--group-size", "0"], &["group size 0"]),
        (&["--format", "awq", "--bits", "3"], &["awq", "4 bits only"]),
        (&["--ignore", "nope"], &["`nope`", "matches no linear"]),
        (&["--ignore", "re:("], &["`re:(`", "unclosed group"]),
        (&["--ignore", "re:.*"], &["no linear to quantize"]),
        (&["--recipe", "type.toml"], &["type.toml, line 2, `", "expected a whole number"]),
        (&["--recipe", "key.toml"], &["key.toml, line 2", "`frob`"]),
        (&["--recipe", "nothing.toml"], &["`nope`", "matches no linear"]),
        (&["--samples", "0", "--samples", "0"], &["--samples"]),
        (&["--threads", "0"], &["--threads"]),
        (&["--damp", "nan"], &["damping"]),
        (&["--method", "rtn", "--desc-act"], &["--desc-act"]),
        (&["--verify-text", "none", "--max-kld", "1"], &["--verify-text none"]),
        (&["--max-kld=-0.1"], &["--max-kld -0.1", "0 or more"]),
        (&["--max-ppl-ratio", "nan"], &["--max-ppl-ratio NaN", "above 0"]),
        (&["--min-top1", "95"], &["--min-top1 95", "from 0 to 1"]),
    ];
    for (args, words) in cases {
        // QUICK has --samples too, and clap takes each flag once.
        let args: Vec<String> = match args[0] {
            "--samples" => ["quantize", "model", "-o", "out", "--samples", "0"].map(str::to_owned).to_vec(),
            _ => quantize(args),
        };
        room.run(args).refuses(2, words);
    }
    // Words that are no request at all: clap explains itself at more length.
    for args in [&["quantize"][..], &["frob"], &["quantize", "model", "-o", "out", "--device", "abacus"]] {
        let run = room.run(args);
        assert_eq!(run.code(), Some(2), "{}", run.stderr());
    }
    room.run(["quantize", "model", "-o", "out", "--recipe", "nowhere.toml"]).refuses(1, &["nowhere.toml"]);
    assert_eq!(room.names(), ["key.toml", "model", "nothing.toml", "type.toml"]);
}

#[test]
fn outputs_never_touch_what_is_there() {
    let room = Room::new();
    room.model();
    room.file("letters/letter", "dear");
    room.file("file", "x");
    let before = std::fs::read(room.path("model/model.safetensors")).unwrap();
    let to = |output: &str, args: &[&str]| {
        let mut all = quantize(args);
        all[3] = output.to_owned();
        room.run(all)
    };
    for (output, args, word) in [
        ("model", &["--force"][..], "may not be the input"),
        ("model/out", &["--force"], "may not be the input"),
        ("model/../model/deep/out", &[], "may not be the input"),
        (".", &["--force"], "."),
        ("letters", &[], "exists"),
        ("letters", &["--force"], "config.json"),
        ("file", &["--force"], "file"),
    ] {
        to(output, args).refuses(2, &[word]);
    }
    to("file/out", &[]).refuses(1, &["file"]);
    room.run(["convert", "model", "-o", "model", "--force"]).refuses(2, &["may not be the input"]);
    room.run(["demo", "--export", "model"]).refuses(2, &["model"]);
    assert_eq!(std::fs::read(room.path("letters/letter")).unwrap(), b"dear");
    assert_eq!(std::fs::read(room.path("model/model.safetensors")).unwrap(), before);
    assert_eq!(room.names(), ["file", "letters", "model"]);

    // A report that cannot be written is found before the work is done.
    to("out", &["--report", "nowhere/report.json"]).refuses(2, &["nowhere/report.json"]);
    assert!(!room.path("out").exists());
}

#[test]
fn an_output_below_the_bar_is_kept_and_ends_with_three() {
    let room = Room::new();
    room.model();
    let run = room.run(quantize(&["--max-kld", "0.000001", "--max-ppl-ratio", "1000"]));
    assert_eq!(run.code(), Some(3), "{}", run.stderr());
    assert!(run.stderr().contains("KL divergence") && run.stderr().contains("out"), "{}", run.stderr());
    assert!(!run.stderr().contains("perplexity ratio"), "that limit was kept: {}", run.stderr());
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
    assert_eq!(report["verdict"]["passed"], false);
    assert_eq!(report["verdict"]["missed"].as_array().unwrap().len(), 1);

    let passed = room.run(quantize(&["--force", "--max-kld", "100", "--max-ppl-ratio", "1000", "--min-top1", "0"]));
    passed.succeeds();
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap();
    assert_eq!(report["verdict"]["passed"], true);
}

#[test]
fn what_is_no_checkpoint_is_refused_by_every_command() {
    let room = Room::new();
    room.model();
    room.file("text.txt", "words");
    room.file("bad.gguf", [&b"GGUF"[..], &[0xff; 40]].concat());
    room.file("empty.gguf", "");
    std::fs::create_dir(room.path("void")).unwrap();
    for (input, word) in [
        ("nowhere", "nowhere: cannot open: No such file"),
        ("text.txt", "not a checkpoint"),
        ("void", "config.json is missing"),
        ("bad.gguf", "its GGUF version is 4294967295"),
        ("empty.gguf", "empty"),
    ] {
        for args in [
            &["inspect", input][..],
            &["eval", input],
            &["eval", "model", "--reference", input],
            &["convert", input, "-o", "out"],
            &["quantize", input, "-o", "out"],
        ] {
            let run = room.run(args);
            run.refuses(1, &[input, word]);
            assert_eq!(run.stderr().matches("os error").count(), usize::from(input == "nowhere"), "the cause, once");
        }
    }
    room.run(["eval", "model", "--protocol", "x"]).refuses(2, &["papers, llama.cpp"]);
    for context in ["0", "1"] {
        room.run(["eval", "model", "--context", context]).refuses(2, &["--context must be at least 2"]);
    }
    room.run(["eval", "model", "--windows", "0"]).refuses(2, &["error: --windows must be at least 1"]);
    room.run(["quantize", "model", "-o", "out", "--verify-windows", "0"])
        .refuses(2, &["error: --verify-windows must be at least 1"]);
    assert!(!room.path("out").exists());
}

/// A disk that fills up, played by the limit on a file's size.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let room = Room::new();
    room.model();
    let gguf = "quantize model -o m.gguf --scheme Q8_0 --method rtn --verify-text none";
    let run = room.shell(&format!("trap '' XFSZ; ulimit -f 200; exec {} {gguf}", env!("CARGO_BIN_EXE_quantc")));
    run.refuses(1, &["error: m.gguf", "File too large"]);
    assert_eq!(room.names(), ["model"]);
    for words in ["quantize model -o out --method rtn --verify-text none", "convert model -o out --dtype f32"] {
        let limited = format!("trap '' XFSZ; ulimit -f 2000; exec {} {words}", env!("CARGO_BIN_EXE_quantc"));
        let run = room.shell(&limited);
        run.refuses(1, &["error: out/model.safetensors", "File too large"]);
        assert_eq!(room.names(), ["model"]);
    }
}
