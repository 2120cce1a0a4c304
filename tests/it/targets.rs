//! Several outputs of one run.

use std::path::Path;

use serde_json::Value;

use crate::harness::{Room, Run, TEXT};

const FEW: &[&str] = &["--samples", "4", "--seq-len", "128", "--calibration", TEXT, "--verify-text", "none"];

fn quantize(room: &Room, args: &[&str]) -> Run {
    room.run([&["quantize", "model"], args, FEW].concat())
}

/// The weights that an output holds.
fn weights(path: &Path) -> Vec<u8> {
    let file = if path.is_dir() { path.join("model.safetensors") } else { path.to_path_buf() };
    std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn report(path: &Path) -> Value {
    let file = match path.is_dir() {
        true => path.join("report.json"),
        false => path.with_file_name(format!("{}.report.json", path.file_name().unwrap().to_str().unwrap())),
    };
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// Targets of one run, with the flags of a run of each alone.
const TARGETS: &[(&str, &str, &[&str])] = &[
    ("compressed-tensors:W4A16:g64", "ct", &["--scheme", "W4A16", "--group-size", "64"]),
    ("gguf:Q4_K_S", "k.gguf", &["--scheme", "Q4_K_S"]),
    ("gptq:W3A16:g32", "gptq", &["--format", "gptq", "--scheme", "W3A16", "--group-size", "32"]),
    ("awq", "awq", &["--format", "awq"]),
    ("mlx:W4A16:g64", "mlx", &["--format", "mlx", "--scheme", "W4A16", "--group-size", "64"]),
];

#[test]
fn whichever_target_leads_has_the_bytes_of_a_run_alone_and_with_independent_ones_all_have() {
    let room = Room::new();
    room.model();
    for (_, path, flags) in TARGETS {
        let path = format!("alone-{path}");
        quantize(&room, &[&["-o", &path], *flags].concat()).succeeds();
    }
    let same = |run: &str, path: &str| {
        weights(&room.path(&format!("{run}-{path}"))) == weights(&room.path(&format!("alone-{path}")))
    };
    for lead in 0..2 {
        let mut order: Vec<_> = TARGETS.iter().collect();
        order.rotate_left(lead);
        let run = format!("run{lead}");
        let texts: Vec<String> = order.iter().map(|(what, path, _)| format!("{what}={run}-{path}")).collect();
        let args: Vec<&str> = texts.iter().flat_map(|text| ["--target", text]).collect();
        let done = quantize(&room, &args);
        done.succeeds();
        let first = order[0].1;
        assert!(same(&run, first), "{first}");
        // What the others' inputs were made by is told.
        for (index, (_, path, _)) in order.iter().enumerate() {
            let report = report(&room.path(&format!("{run}-{path}")));
            let notes = report["notes"].to_string();
            assert_eq!(notes.contains(&format!("calibrated beside {run}-{first}")), index > 0, "{path}: {notes}");
            assert_eq!(report["linears"].as_array().unwrap().len(), 14);
        }
        // They see other inputs, and all of them a line of the table.
        assert!(!same(&run, order[1].1), "{}", order[1].1);
        let said = done.stdout();
        assert!(order.iter().all(|(_, path, _)| said.matches(&format!("{run}-{path}")).count() == 2), "{said}");
    }
    let texts: Vec<String> = TARGETS.iter().map(|(what, path, _)| format!("{what}=each-{path}")).collect();
    let args: Vec<&str> = texts.iter().flat_map(|text| ["--target", text]).chain(["--independent"]).collect();
    quantize(&room, &args).succeeds();
    for (_, path, _) in TARGETS {
        assert!(same("each", path), "{path}");
        assert!(!report(&room.path(&format!("each-{path}")))["notes"].to_string().contains("calibrated beside"));
    }
}

#[test]
fn what_is_calibrated_otherwise_is_walked_through_by_itself() {
    let room = Room::new();
    room.model();
    let alone = [
        ("a", &["--method", "awq"][..]),
        ("b", &["--method", "rtn", "--group-size", "64"]),
        ("c", &["--samples", "2"]),
        ("d", &["--method", "rtn", "--observer", "imatrix"]),
    ];
    for (path, flags) in alone {
        let few: Vec<&str> = FEW[if path == "c" { 2 } else { 0 }..].to_vec();
        room.run([&["quantize", "model", "-o", &format!("alone-{path}")], flags, &few].concat()).succeeds();
    }
    let recipe = "samples = 4\nseq_len = 128\n[[target]]\npath = 'd'\nmethod = 'rtn'\nobserver = 'imatrix'\n\
         [[target]]\npath = 'a'\nmethod = 'awq'\nreport = 'a.json'\n\
         [[target]]\npath = 'b'\nmethod = 'rtn'\ngroup_size = 64\nlead = true\n[[target]]\npath = 'c'\nsamples = 2\n";
    room.file("recipe.toml", recipe);
    room.run(["quantize", "model", "--recipe", "recipe.toml", "--calibration", TEXT, "--verify-text", "none"])
        .succeeds();
    for (path, _) in alone {
        assert_eq!(weights(&room.path(path)), weights(&room.path(&format!("alone-{path}"))), "{path}");
    }
    assert_eq!(std::fs::read(room.path("a.json")).unwrap(), std::fs::read(room.path("a/report.json")).unwrap());
    // The report says what was known of each: a target that needs no text has none.
    assert_eq!(report(&room.path("b"))["calibration"], Value::Null);
    assert_eq!(report(&room.path("c"))["calibration"]["sequences"], 2);
}

#[test]
fn a_gguf_file_takes_every_method_and_observer() {
    let room = Room::new();
    room.model();
    let mut seen = Vec::new();
    for (index, flags) in [
        &["--method", "rtn"][..],
        &["--method", "rtn", "--observer", "mse"],
        &["--method", "rtn", "--observer", "clip"],
        &["--method", "awq"],
        &["--method", "awq+gptq"],
        &["--method", "gptq", "--observer", "mse"],
        &["--method", "gptq"],
    ]
    .iter()
    .enumerate()
    {
        let path = format!("{index}.gguf");
        let few = &FEW[..6];
        let run = [&["quantize", "model", "-o", &path, "--scheme", "Q4_K_S", "--verify-windows", "2"], *flags, few];
        room.run(run.concat()).succeeds();
        let report = report(&room.path(&path));
        let kld = report["quality"]["kld_mean"].as_f64().unwrap();
        assert!(kld < 0.02, "{flags:?}: {kld}");
        assert_eq!(report["smoothings"].as_array().unwrap().is_empty(), !flags[1].contains("awq"), "{flags:?}");
        let bytes = weights(&room.path(&path));
        assert!(!seen.contains(&bytes), "{flags:?}");
        seen.push(bytes);
    }
}

#[test]
fn targets_that_cannot_be_are_refused_before_any_work() {
    let room = Room::new();
    room.model();
    let before = room.names();
    for (args, words) in [
        (&["--target", "awq=x", "--target", "gptq=x"][..], &["x: is or holds another output of this run"][..]),
        (&["--target", "awq=x", "--target", "gguf=x/y.gguf"], &["is or holds another output"]),
        (&["--target", "awq=x", "-o", "y"], &["-o is the short form of one --target"]),
        (&["--target", "awq"], &["--target `awq`", "FORMAT[:SCHEME[:gN]]=PATH"]),
        (&["--target", "awq=x", "--target", "gguf:W4A16=y.gguf"], &["scheme `W4A16` is not one of GGUF's"]),
        (&["--target", "awq=x", "--target", "gguf=model/y.gguf"], &["model/y.gguf", "the input"]),
        (&["--target", "awq=x", "--target", "gptq=y", "--report", "r.json"], &["--report is for one output"]),
        (&["--target", "awq=x", "--desc-act"], &["desc_act is said for all targets, and is for none"]),
        (&[], &["there is no output: give -o OUT, or --target"]),
    ] {
        quantize(&room, args).refuses(2, words);
        assert_eq!(room.names(), before, "{args:?}");
    }
    // Of several outputs all appear or none.
    room.file("text.txt", "too short");
    let args = ["quantize", "model", "--target", "awq:g64=x", "--target", "gguf=y.gguf", "--calibration", "text.txt"];
    room.run(args).refuses(1, &["text.txt"]);
    assert_eq!(room.names(), [&before[..], &["text.txt".to_owned()]].concat());
}

#[test]
fn one_language_of_patterns_serves_every_format() {
    let room = Room::new();
    room.whole_model();
    let recipe = "ignore = ['model.layers.0.self_attn.o_proj']\n[[target]]\npath = 'ct'\ngroup_size = 64\n\
         [[target.override]]\nmatch = 're:.*down_proj'\nbits = 8\n\
         [[target]]\npath = 'm.gguf'\n[[target.override]]\nmatch = 're:.*down_proj'\nscheme = 'Q6_K'\n";
    room.file("recipe.toml", recipe);
    room.run([&["quantize", "model", "--recipe", "recipe.toml"][..], FEW].concat()).succeeds();
    let of = |path: &str, key: &str| -> Vec<(String, String)> {
        let report = report(&room.path(path));
        let linears = report["linears"].as_array().unwrap().clone();
        linears.iter().map(|one| (one["name"].as_str().unwrap().to_owned(), one[key].to_string())).collect()
    };
    let (codes, blocks) = (of("ct", "bits"), of("m.gguf", "type"));
    assert_eq!((codes.len(), blocks.len()), (27, 28), "a GGUF file's report names what stays, too");
    for (name, bits) in codes {
        assert_eq!(bits, if name.ends_with("down_proj") { "8" } else { "4" }, "{name}");
    }
    for (name, ty) in blocks {
        let stays = name == "model.layers.0.self_attn.o_proj";
        assert!(!stays || ty == "\"BF16\"", "{name}: {ty}");
        assert!(!name.ends_with("down_proj") || ty == "\"Q6_K\"", "{name}: {ty}");
    }
}
