//! What a plan says is what a run then does, and who would not load it is told before.

use quantc::job::{PlannedOutput, PlannedPart};
use quantc::report::Report;
use serde_json::Value;

use crate::harness::{Room, TEXT};

/// Fails unless an output was planned as it was then written.
pub fn check(planned: &PlannedOutput, report: &Report) {
    let named = |path: &str| path.rsplit('/').next().unwrap().to_owned();
    let files: Vec<(String, u64)> = report.outputs.iter().map(|file| (named(&file.name), file.bytes)).collect();
    let weights = planned.files.iter().filter(|file| !file.name.ends_with(".json"));
    assert_eq!(weights.map(|file| (named(&file.name), file.bytes)).collect::<Vec<_>>(), files);
    assert_eq!((planned.bpw.quantized, planned.bpw.file), (report.bpw.quantized, report.bpw.file));
    assert_eq!(planned.bpw.original_file, report.bpw.original_file);
    // A linear of several parts is told by its first in the report.
    let told = |name: &str, part: &PlannedPart| (name.to_owned(), part.bits, part.group_size, part.symmetric);
    let mut decided: Vec<_> = planned.linears.iter().filter_map(|l| Some(told(&l.name, l.parts.first()?))).collect();
    let done = report.linears.iter().map(|l| (l.name.clone(), l.bits, l.group_size, l.symmetric));
    let mut done: Vec<_> = done.collect();
    decided.sort();
    done.sort();
    assert_eq!(decided, done);
    let fates = |all: &[quantc::report::TensorReport]| {
        all.iter().map(|tensor| (tensor.name.clone(), tensor.fate.clone(), tensor.ty)).collect::<Vec<_>>()
    };
    assert_eq!(fates(&planned.tensors), fates(&report.tensors));
    let mut folded: Vec<&str> =
        report.smoothings.iter().map(|fold| fold.producer.trim_end_matches(".weight")).collect();
    let mut folds: Vec<&str> = planned.folds.iter().map(|fold| &*fold.producer).collect();
    folded.sort_unstable();
    folds.sort_unstable();
    // Inputs that no token has reached are left alone.
    assert!(folded.iter().all(|fold| folds.contains(fold)), "{folded:?} of {folds:?}");
    let all: Vec<&String> = planned.notes.iter().filter(|note| !report.notes.contains(note)).collect();
    assert!(all.is_empty(), "planned, and not in the report: {all:?}");
}

fn plan(room: &Room, flags: &[&str]) -> Value {
    let done = room.run([&["plan", "model", "--json"], flags].concat());
    done.succeeds();
    serde_json::from_str(&done.stdout()).unwrap()
}

const FEW: &[&str] = &["--samples", "2", "--seq-len", "64", "--calibration", TEXT, "--verify-text", "none"];

#[test]
fn files_have_the_planned_bytes_and_nothing_is_written_by_planning() {
    let room = Room::new();
    room.model();
    let formats: &[&[&str]] = &[
        &["-o", "out"],
        &["-o", "out", "--scheme", "FP8_DYNAMIC"],
        &["-o", "out", "--format", "mlx", "--group-size", "64", "--method", "awq"],
        &["-o", "out", "--format", "gptq", "--group-size", "32", "--ignore", "k_proj", "--allow-uneven"],
        &["-o", "out.gguf", "--scheme", "Q4_K_M"],
        &["-o", "out.gguf", "--scheme", "Q8_0", "--split-max-size", "2M"],
        &["--target", "awq=a", "--target", "gguf:IQ4_NL=b.gguf"],
    ];
    for flags in formats {
        let planned = plan(&room, &[*flags, FEW].concat());
        assert_eq!(room.names(), ["model"], "{flags:?}");
        room.run([&["quantize", "model"], *flags, FEW].concat()).succeeds();
        for output in planned["outputs"].as_array().unwrap() {
            let path = room.path(output["path"].as_str().unwrap());
            let folder = if path.is_dir() { path.clone() } else { path.parent().unwrap().to_path_buf() };
            for file in output["files"].as_array().unwrap() {
                let found = std::fs::metadata(folder.join(file["name"].as_str().unwrap()));
                assert_eq!(found.unwrap().len(), file["bytes"].as_u64().unwrap(), "{flags:?}: {file}");
            }
        }
        // Without a place it is the same.
        let nameless: Vec<&str> = match flags[0] {
            "-o" if flags[1] == "out.gguf" => [&["--format", "gguf"], &flags[2..]].concat(),
            "-o" => flags[2..].to_vec(),
            _ => Vec::new(),
        };
        if flags[0] == "-o" {
            let other = plan(&room, &[&nameless[..], FEW].concat());
            assert_eq!(other["outputs"][0]["bytes"], planned["outputs"][0]["bytes"], "{flags:?}");
            assert_eq!(other["outputs"][0]["path"], Value::Null);
        }
        for name in room.names() {
            let path = room.path(&name);
            match path.is_dir() {
                true if name != "model" => std::fs::remove_dir_all(path).unwrap(),
                false => std::fs::remove_file(path).unwrap(),
                _ => {}
            }
        }
    }
}

#[test]
fn what_a_run_would_refuse_is_refused_and_what_a_runtime_would_is_told() {
    let room = Room::new();
    room.whole_model();
    let refused = |flags: &[&str], words: &[&str]| room.run([&["plan", "model"], flags].concat()).refuses(2, words);
    room.file("out/config.json", "{}");
    refused(&["-o", "out"], &["out: exists already"]);
    refused(&["--scheme", "Q4KM"], &["Q4KM"]);
    refused(&["--group-size", "100"], &["100"]);
    refused(&["--for", "vlm"], &["--for `vlm`", "vllm, sglang, llama.cpp, transformers, mlx"]);
    refused(&["--for", "vllm", "--gpu", "voodoo"], &["--gpu `voodoo`"]);
    refused(&["--batch", "0"], &["--batch must be at least 1"]);
    let one = "`model.layers.0.self_attn.k_proj`, `model.layers.0.self_attn.v_proj` have several schemes";
    refused(&["--ignore", "v_proj"], &[one, "as 3 more such groups do", "give them one scheme", "--allow-uneven"]);
    refused(
        &["--format", "gptq", "--ignore", "re:.*up_proj"],
        &["mlp.up_proj` have several schemes", "--allow-uneven"],
    );
    let told = |flags: &[&str], code: i32, words: &[&str]| {
        let done = room.run([&["plan", "model"], flags, FEW].concat());
        assert_eq!(done.code(), Some(code), "{flags:?}: {}{}", done.stdout(), done.stderr());
        words.iter().for_each(|word| assert!(done.stdout().contains(word), "{flags:?}: {word} in {}", done.stdout()));
    };
    told(
        &["--for", "vllm", "--gpu", "ampere"],
        0,
        &["vLLM is not known to refuse anything", "divided among GPUs: 1, 2"],
    );
    told(&["--for", "llama.cpp"], 2, &["refused: llama.cpp reads GGUF alone"]);
    told(
        &["--for", "vllm", "--format", "mlx", "--group-size", "64"],
        2,
        &["refused: vLLM does not read mlx-lm's layout"],
    );
    told(
        &["--for", "vllm", "--format", "gptq", "--bits", "3"],
        2,
        &["refused: vLLM reads GPTQ of 4 and 8 bits, not of 3"],
    );
    told(
        &["--for", "vllm", "--ignore", "v_proj", "--allow-uneven"],
        2,
        &["as one matrix, which must have one scheme", "3 more such groups"],
    );
    // Heads of 64 values: 4 of the queries, and 2 of keys and values; groups of 128 in 256 inputs.
    told(
        &["--for", "vllm", "--tensor-parallel", "4"],
        2,
        &["refused: it cannot be divided among 4 GPUs", "2 is the most that works"],
    );
    told(&["--for", "vllm", "--tensor-parallel", "4", "--group-size", "64"], 0, &["divided among GPUs: 1, 2, 4 work"]);
    told(&["--for", "vllm", "--scheme", "W8A8", "--gpu", "b200"], 2, &["no products of 8-bit integers"]);
    told(
        &["--for", "vllm", "--scheme", "FP8_DYNAMIC", "--gpu", "a100"],
        0,
        &["told: GPUs of compute capability 8.0 do not multiply FP8"],
    );
    let order = ["--for", "vllm", "--format", "gptq", "--group-size", "64", "--desc-act"];
    told(&order, 2, &["refused: vLLM refuses desc_act with groups"]);
    told(&["--for", "sglang", "--tensor-parallel", "2"], 0, &["2 cards of    cache in 16 bits"]);
    for (flag, count) in [("--context", "18446744073709551615"), ("--batch", "18446744073709551615")] {
        room.run([&["plan", "model", flag, count], FEW].concat()).refuses(2, &[flag, "the most that is counted with"]);
    }
    told(&["--context", "100000"], 0, &["told: the model takes 512 tokens, and --context says 100000"]);
}

#[test]
fn cards_are_counted_by_weights_and_cache() {
    let room = Room::new();
    let model = room.whole_model();
    model.config(|config| config["max_position_embeddings"] = 1_048_576.into());
    let planned = plan(&room, &[&["--context", "1048576", "--batch", "4"], FEW].concat());
    let serving = &planned["outputs"][0]["serving"];
    // 4 layers with 2 heads of 64 values, keys and values, each of two bytes.
    let cache = 4 * 4 * 2 * 64 * 2 * 1_048_576u64 * 2;
    assert_eq!((serving["cache_16_bit"].as_u64(), serving["cache_8_bit"].as_u64()), (Some(cache), Some(cache / 2)));
    let weights = planned["outputs"][0]["bytes"].as_u64().unwrap();
    for card in serving["cards"].as_array().unwrap() {
        let room = (card["gib"].as_u64().unwrap() << 30) as f64 * 0.9 - weights as f64;
        assert_eq!(card["fits_16_bit"], Value::from(cache as f64 <= room), "{card}");
        let longest = (room / (cache as f64 / 1_048_576.0)).min(1_048_576.0).floor();
        assert!((card["context_16_bit"].as_f64().unwrap() - longest).abs() <= 1.0, "{card}");
    }
}
