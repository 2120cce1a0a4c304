//! Importance matrices, read and written beside outputs of every format.

use std::path::Path;

use formats::{Imatrix, ImatrixEntry};
use quantc::Checkpoint;
use serde_json::Value;

use crate::harness::{Room, Run, TEXT};

fn quantize(room: &Room, args: &str) -> Run {
    let few = format!("--calibration {TEXT} --samples 4 --seq-len 64 --verify-text none");
    let needs = if args.contains("--imatrix") && !args.contains("--method") { "--verify-text none" } else { &few };
    room.run(format!("quantize model {args} {needs}").split(' '))
}

fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("model.safetensors")).unwrap()
}

fn report(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// An imatrix of the built-in model in which some inputs count much more than others.
fn uneven(room: &Room, name: &str) -> Imatrix {
    let mut all = Imatrix { chunk_count: 200, chunk_size: 512, ..Imatrix::default() };
    for layer in 0..4 {
        for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
            let width = if name == "ffn_down" { 768 } else { 256 };
            let sums = (0..width).map(|i| if i % 5 == 0 { 1000.0 } else { 1.0 }).collect();
            all.entries.insert(format!("blk.{layer}.{name}.weight"), ImatrixEntry { sums, counts: vec![100.0] });
        }
    }
    all.write(room.path(name)).unwrap();
    all
}

/// The error of a linear of the built-in model, each column as heavy as its importance.
fn weighted_error(room: &Room, output: &str, imatrix: &Imatrix) -> f64 {
    let load =
        |model: &str| Checkpoint::open(&room.path(model)).unwrap().load("model.layers.1.mlp.up_proj.weight").unwrap();
    let importance = imatrix.importance("blk.1.ffn_up.weight", 256).unwrap().unwrap();
    let errors = load("model").into_iter().zip(load(output)).enumerate();
    errors.map(|(at, (a, b))| f64::from(importance[at % 256]) * f64::from(a - b).powi(2)).sum()
}

#[test]
fn what_a_gguf_file_and_a_directory_save_is_the_same_and_read_alike() {
    let room = Room::new();
    room.whole_model();
    let recipe = "method = 'rtn'\nsamples = 4\nseq_len = 64\nignore = ['model.layers.1.self_attn.o_proj']\n\
         [[target]]\npath = 'a.gguf'\nscheme = 'Q4_0'\nsave_imatrix = 'file.gguf'\n\
         [[target]]\npath = 'b'\nsave_imatrix = 'folder.gguf'\n";
    room.file("recipe.toml", recipe);
    let args = ["quantize", "model", "--recipe", "recipe.toml", "--calibration", TEXT, "--verify-text", "none"];
    room.run(args).succeeds();
    let [file, folder] = ["file.gguf", "folder.gguf"].map(|name| std::fs::read(room.path(name)).unwrap());
    assert!(file == folder, "both have seen the same inputs");
    let read = Imatrix::read(room.path("folder.gguf")).unwrap();
    assert_eq!(read.entries.len(), 28, "what stays as it is has an entry, too");

    quantize(&room, "-o c --imatrix file.gguf").succeeds();
    quantize(&room, "-o d --imatrix folder.gguf").succeeds();
    assert!(weights(&room.path("c")) == weights(&room.path("d")));
    let said = report(&room.path("c/report.json"));
    assert_eq!((&said["recipe"]["method"], &said["recipe"]["observer"]), (&"rtn".into(), &"imatrix".into()));
    assert_eq!((&said["recipe"]["imatrix"], &said["calibration"]), (&"file.gguf".into(), &Value::Null));
    assert!(said["notes"].to_string().contains("file.gguf: it was computed on 256 tokens, which are few"));

    // By itself a directory saves what its own weights make of the inputs; before the first rounding that is the same.
    quantize(&room, "-o e --method rtn --save-imatrix own.gguf").succeeds();
    let own = Imatrix::read(room.path("own.gguf")).unwrap();
    assert_eq!(own.entries["blk.0.attn_q.weight"], read.entries["blk.0.attn_q.weight"]);
    assert!(own.datasets == read.datasets && own.entries.len() == 28);
    assert_eq!(report(&room.path("e/report.json"))["recipe"]["observer"], "imatrix");
}

#[test]
fn importance_reaches_the_search_of_every_layout() {
    let room = Room::new();
    room.model();
    let imatrix = uneven(&room, "i.gguf");
    for (format, scheme) in [
        ("compressed-tensors", "W4A16"),
        ("compressed-tensors", "W8A8"),
        ("gptq", "W4A16"),
        ("awq", "W4A16_ASYM"),
        ("mlx", "W4A16"),
    ] {
        let name = format!("{format}-{scheme}");
        let common = format!("--format {format} --scheme {scheme}");
        quantize(&room, &format!("-o {name}-i {common} --imatrix i.gguf")).succeeds();
        quantize(&room, &format!("-o {name}-mse {common} --method rtn --observer mse")).succeeds();
        let [with, without] = ["i", "mse"].map(|end| weighted_error(&room, &format!("{name}-{end}"), &imatrix));
        assert!(with < without, "{name}: {with} with importance, {without} without");
    }
    // A sweep has inputs of its own, and takes the importance for its scales.
    quantize(&room, "-o swept --method gptq --imatrix i.gguf").succeeds();
    quantize(&room, "-o plain --method gptq").succeeds();
    assert!(weights(&room.path("swept")) != weights(&room.path("plain")));
    let said = report(&room.path("swept/report.json"));
    assert!(said["recipe"]["imatrix"] == "i.gguf" && said["calibration"]["sequences"] == 4, "{}", said["recipe"]);
}

#[test]
fn the_embedding_of_mlx_takes_its_entry() {
    let room = Room::new();
    room.whole_model();
    let mut imatrix = uneven(&room, "without.gguf");
    let sums = (0..256).map(|i| if i % 3 == 0 { 500.0 } else { 1.0 }).collect();
    imatrix.entries.insert("token_embd.weight".to_owned(), ImatrixEntry { sums, counts: vec![100.0] });
    imatrix.write(room.path("with.gguf")).unwrap();
    for name in ["with", "without"] {
        quantize(&room, &format!("-o {name} --format mlx --imatrix {name}.gguf")).succeeds();
    }
    let load = |model: &str, tensor: &str| Checkpoint::open(&room.path(model)).unwrap().load(tensor).unwrap();
    let same = |tensor: &str| load("with", tensor) == load("without", tensor);
    assert!(!same("model.embed_tokens.weight") && same("model.layers.1.mlp.up_proj.weight"));
    assert!(!report(&room.path("with/report.json"))["notes"].to_string().contains("does not have"));
}

#[test]
fn what_an_imatrix_does_not_say_is_told_and_counts_alike() {
    let room = Room::new();
    room.whole_model();
    let mut imatrix = uneven(&room, "i.gguf");
    imatrix.entries.remove("blk.1.ffn_up.weight");
    imatrix.entries.insert("blk.9.ffn_up.weight".to_owned(), ImatrixEntry { sums: vec![1.0], counts: vec![1.0] });
    imatrix.write(room.path("i.gguf")).unwrap();
    quantize(&room, "-o i --imatrix i.gguf").succeeds();
    quantize(&room, "-o mse --method rtn --observer mse").succeeds();
    let load = |model: &str, linear: &str| {
        let name = format!("model.layers.1.mlp.{linear}.weight");
        Checkpoint::open(&room.path(model)).unwrap().load(&name).unwrap()
    };
    assert!(load("i", "up_proj") == load("mse", "up_proj") && load("i", "gate_proj") != load("mse", "gate_proj"));
    let notes = report(&room.path("i/report.json"))["notes"].to_string();
    for words in
        ["no entry for 1 of 28 linears (`model.layers.1.mlp.up_proj`)", "1 of its 28 entries (`blk.9.ffn_up.weight`)"]
    {
        assert!(notes.contains(words), "{notes}");
    }
    // An observer that does not go by it is told, and the report does not say that it was read.
    quantize(&room, "-o clip --method rtn --observer clip --imatrix i.gguf").succeeds();
    let said = report(&room.path("clip/report.json"));
    assert!(said["recipe"].get("imatrix").is_none(), "{}", said["recipe"]);
    let notes = said["notes"].to_string();
    assert!(notes.contains("imatrix has no effect: observer clip does not go by the importance of inputs"), "{notes}");
}

#[test]
fn importance_that_is_of_no_use_to_a_directory_is_refused() {
    let room = Room::new();
    let model = room.whole_model();
    let mut imatrix = uneven(&room, "i.gguf");
    imatrix.entries.get_mut("blk.2.attn_q.weight").unwrap().sums = vec![1.0; 128];
    imatrix.write(room.path("narrow.gguf")).unwrap();
    for entry in imatrix.entries.values_mut() {
        (entry.sums, entry.counts) = (vec![1.0; if entry.sums.len() == 768 { 768 } else { 256 }], vec![0.0]);
    }
    imatrix.write(room.path("empty.gguf")).unwrap();
    let entry = imatrix.entries["blk.2.attn_q.weight"].clone();
    imatrix.entries = [("elsewhere".to_owned(), entry)].into();
    imatrix.write(room.path("other.gguf")).unwrap();
    let before = room.names();
    for (args, code, words) in [
        ("-o out --imatrix none.gguf", 1, &["none.gguf"][..]),
        ("-o out --imatrix narrow.gguf", 1, &["narrow.gguf", "`blk.2.attn_q.weight`", "is 128, expected 256"]),
        ("-o out --imatrix empty.gguf", 1, &["empty.gguf", "none of the model's 28 linears apart"]),
        ("-o out --imatrix other.gguf", 1, &["other.gguf", "none of its 1 entries", "made for another one"]),
        ("-o out --save-imatrix i.gguf", 2, &["i.gguf: exists already; --force replaces it"]),
        ("-o out --save-imatrix out/i.gguf", 2, &["out/i.gguf", "another output of this run, out"]),
        ("-o out --save-imatrix model/i.gguf", 2, &["model/i.gguf", "the input"]),
        ("-o out --save-imatrix r --report r", 2, &["--save-imatrix names too"]),
        ("-o i.gguf --format gptq --imatrix i.gguf --force", 2, &["may not be the input"]),
    ] {
        quantize(&room, args).refuses(code, words);
        assert_eq!(room.names(), before, "{args}");
    }
    // What llama.cpp does not know, it has no names for.
    model.config(|config| {
        config["model_type"] = "of_its_own".into();
        config["architectures"] = Value::from(vec!["OfItsOwn"]);
    });
    for flag in ["--imatrix i.gguf", "--save-imatrix new.gguf"] {
        let told =
            ["an imatrix goes by llama.cpp's names of tensors, and it has none for models", "leave it out", flag];
        quantize(&room, &format!("-o out {flag} --method rtn")).refuses(2, &told);
        assert_eq!(room.names(), before, "{flag}");
    }
}
