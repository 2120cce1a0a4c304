//! The whole program on a GPU that there is not: driver, compiler and matrix library answer as CUDA's do and compute on the CPU
//! (`tests/fake_cuda/cuda.cpp`), and so do the kernels, from their own source.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use formats::{Dtype, SafetensorsFile, ShardedWriter, TensorSpec};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{Room, TEXT};

/// Where the imitation lies, built once for what it is made of; nothing without a C++ compiler.
pub fn imitation() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        if !Command::new("c++").arg("--version").output().is_ok_and(|o| o.status.success()) {
            assert!(std::env::var_os("QUANTC_TEST_ALL").is_none(), "no C++ compiler, and QUANTC_TEST_ALL is set");
            eprintln!("SKIPPED: no C++ compiler, so CUDA cannot be imitated");
            return None;
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let source = root.join("tests/fake_cuda/cuda.cpp");
        // What was compiled serves until something changes that it is made of.
        let mut hash = Sha256::new();
        for path in [&source, &root.join("kernels/src/cuda/on_cpu.h")] {
            hash.update(std::fs::read(path).unwrap());
        }
        let key: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let all_of_them = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake_cuda");
        let folder = all_of_them.join(&key);
        std::fs::create_dir_all(&folder).unwrap();
        // By this name others find the one that is in use.
        let own = all_of_them.join(std::process::id().to_string());
        let _ = std::fs::remove_file(&own);
        std::os::unix::fs::symlink(&key, &own).unwrap();
        std::fs::rename(&own, all_of_them.join("current")).unwrap();
        let library = folder.join("libcuda.so.1");
        if library.exists() {
            return Some(folder);
        }
        let cuda = ["libcuda.so.1", "libnvrtc.so.13", "libcublas.so.13"];
        let all = cuda.map(|name| format!("{ALL}/{name}"));
        let with_solver = cuda.iter().chain(&["libcusolver.so.12"]).map(|name| format!("{SOLVER}/{name}"));
        for name in all.into_iter().chain(with_solver).chain(["driver/libcuda.so.1".to_owned()]) {
            let link = folder.join(name);
            std::fs::create_dir_all(link.parent().unwrap()).unwrap();
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(&library, &link).unwrap();
        }
        let own = folder.join(format!("{}.so", std::process::id()));
        let options = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-o"];
        let made = Command::new("c++").args(options).arg(&own).arg(&source).arg("-ldl").output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        std::fs::rename(&own, &library).unwrap();
        Some(folder)
    });
    built.as_deref()
}

/// Runs quantc with the imitation in place of CUDA; nothing of the machine's own CUDA is seen.
pub struct Imitated<'r> {
    pub room: &'r Room,
    pub folder: &'static Path,
}

pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Imitated<'_> {
    pub fn run(&self, libraries: &str, settings: &[(&str, &str)], args: &[&str]) -> Ran {
        let cache = self.folder.join("cache");
        std::fs::create_dir_all(&cache).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantc"));
        command.args(args).current_dir(self.room.path("")).env_clear();
        command.env("PATH", "/usr/bin:/bin").env("LD_LIBRARY_PATH", self.folder.join(libraries));
        command.env("QUANTC_CACHE", self.room.path("cache")).env("FAKE_CUDA_FOLDER", &cache);
        command.env("FAKE_CUDA_KERNELS", Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/src/cuda"));
        settings.iter().for_each(|(name, value)| {
            command.env(name, value);
        });
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ran { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// Folders of libraries: what is needed, and cuSOLVER as well.
pub const ALL: &str = "all";
pub const SOLVER: &str = "solver";
const QUICK: [&str; 10] =
    ["--samples", "2", "--seq-len", "32", "--group-size", "64", "--verify-text", "none", "--calibration", TEXT];

/// Libraries that are there, what is imitated, the device that is asked for; the exit code, and parts of what is said.
type Case = (&'static str, &'static [(&'static str, &'static str)], &'static str, i32, &'static [&'static str]);

#[test]
fn what_is_wrong_with_a_gpu_is_one_sentence() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    room.model();
    let quantize = |device: &'static str| {
        [&["quantize", "model", "-o", "out", "--device", device, "--quiet"], &QUICK[..]].concat()
    };
    let cases: &[Case] = &[
        ("none", &[], "cuda", 1, &["no NVIDIA driver", "--device cpu"]),
        (ALL, &[("FAKE_CUDA_VERSION", "11040")], "cuda", 1, &["driver is for CUDA 11.4", "12.0 is needed"]),
        (ALL, &[("FAKE_CUDA_DEVICES", "0")], "cuda", 1, &["sees no GPU"]),
        (ALL, &[("FAKE_CUDA_DEVICES", "2")], "cuda:2", 1, &["no GPU number 2", "0: Imaginary 0, 1: Imaginary 1"]),
        (ALL, &[("FAKE_CUDA_CAPABILITY", "61")], "cuda", 1, &["compute capability 6.1", "7.5 is needed"]),
        ("driver", &[], "cuda", 1, &["nvrtc is not there", "pip install nvidia-cuda-nvrtc"]),
        (
            ALL,
            &[("FAKE_CUDA_FAIL", "cuLaunchKernel"), ("FAKE_CUDA_ERROR", "700")],
            "cuda",
            1,
            &["illegal memory access", "--device cpu"],
        ),
        (
            ALL,
            &[("FAKE_CUDA_FAIL", "cuEventSynchronize"), ("FAKE_CUDA_ERROR", "214"), ("FAKE_CUDA_AFTER", "40")],
            "cuda",
            1,
            &["ECC", "nvidia-smi"],
        ),
        // Of the stream that weights are sent ahead in.
        (
            ALL,
            &[("FAKE_CUDA_FAIL", "cuMemcpyHtoDAsync@1"), ("FAKE_CUDA_ERROR", "700"), ("FAKE_CUDA_AFTER", "3")],
            "cuda",
            1,
            &["copy to the GPU", "illegal memory access"],
        ),
        (
            ALL,
            &[("FAKE_CUDA_FAIL", "cuMemAllocAsync@1"), ("FAKE_CUDA_ERROR", "214")],
            "cuda",
            1,
            &["device memory", "ECC"],
        ),
        (
            ALL,
            &[("FAKE_CUDA_FAIL", "cuStreamWaitEvent"), ("FAKE_CUDA_ERROR", "700"), ("FAKE_CUDA_AFTER", "2")],
            "cuda",
            1,
            &["waiting for a copy", "illegal memory access"],
        ),
        // What the runs before have compiled is not compiled again.
        (
            ALL,
            &[("FAKE_CUDA_FAIL", "nvrtcCompileProgram"), ("FAKE_CUDA_ERROR", "6"), ("QUANTC_CACHE", "fresh")],
            "cuda",
            1,
            &["NVRTC", "for sm_80"],
        ),
        (ALL, &[], "gpu", 2, &["--device `gpu` is not known", "cuda:N"]),
        (ALL, &[], "cuda:x", 2, &["--device `cuda:x` is not known"]),
    ];
    for (libraries, settings, device, code, expected) in cases {
        let ran = imitated.run(libraries, settings, &quantize(device));
        let told = ran.err.trim();
        if *libraries == "none" && !told.contains("no NVIDIA driver") {
            eprintln!("SKIPPED: this machine has a driver of its own");
            continue;
        }
        assert_eq!(ran.code, *code, "{settings:?}: {told}");
        assert_eq!(told.lines().count(), 1, "{settings:?}: {told}");
        for part in *expected {
            assert!(told.contains(part), "{settings:?}: `{part}` in {told}");
        }
        assert_eq!(room.names().iter().filter(|name| name.contains("out")).count(), 0, "{:?}", room.names());
    }
    for (size, code, part) in
        [("8", 2, "8GiB"), ("0GiB", 2, "is not a size"), ("900GiB", 1, "it has"), ("1MB", 2, "--gpu-memory")]
    {
        let ran = imitated.run(ALL, &[], &[&quantize("cuda")[..], &["--gpu-memory", size]].concat());
        assert!(ran.code == code && ran.err.contains(part), "{size}: {} {}", ran.code, ran.err);
    }
    let ran = imitated.run(ALL, &[], &[&quantize("cpu")[..], &["--gpu-memory", "1GB"]].concat());
    assert!(ran.code == 2 && ran.err.contains("--gpu-memory is for a GPU"), "{}", ran.err);
}

#[test]
fn devices_are_listed_with_what_keeps_them_from_use() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    let two = imitated.run(ALL, &[("FAKE_CUDA_DEVICES", "2"), ("FAKE_CUDA_MEMORY", "8589934592")], &["devices"]);
    assert_eq!(two.code, 0);
    assert!(two.out.contains("cuda:1  Imaginary 1, compute capability 8.0, 8.0 GiB\n"), "{}", two.out);
    let old = imitated.run(ALL, &[("FAKE_CUDA_CAPABILITY", "70")], &["devices"]);
    assert!(old.out.contains("not usable: compute capability 7.0"), "{}", old.out);
    let bare = imitated.run("driver", &[], &["devices", "--json"]);
    let bare: Value = serde_json::from_str(&bare.out).unwrap();
    assert!(bare["gpus"][0]["unusable"].as_str().unwrap().contains("nvidia-cuda-nvrtc"), "{bare}");
    let none = imitated.run(ALL, &[("FAKE_CUDA_DEVICES", "0")], &["devices"]);
    assert!(none.out.contains("sees no GPU") && none.out.starts_with("cpu"), "{}", none.out);
}

pub fn codes(path: &Path) -> Vec<u8> {
    let file = SafetensorsFile::open(path).unwrap();
    let mut packed = Vec::new();
    for tensor in file.tensors().filter(|t| t.name.ends_with("weight_packed")) {
        packed.extend_from_slice(file.get(&tensor.name).unwrap().data);
    }
    packed
}

/// A small Llama with random weights and the built-in model's tokenizer: kernels on the CPU take their time.
pub fn small_model(room: &Room) {
    model_of(room, 2);
}

/// The same with so many layers.
pub fn model_of(room: &Room, layers: usize) {
    let model = room.model();
    std::fs::remove_file(model.path("model.safetensors")).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers, "vocab_size": 4096,
        "tie_word_embeddings": true, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "torch_dtype": "bfloat16"
    });
    std::fs::write(model.path("config.json"), config.to_string()).unwrap();
    let tensors = quantc::families::build(&config).unwrap().tensors();
    let spec = |(name, shape): &(String, Vec<usize>)| TensorSpec {
        name: name.clone(),
        dtype: Dtype::BF16,
        shape: shape.clone(),
    };
    let folder = model.path("");
    let writer = ShardedWriter::create(&folder, tensors.iter().map(spec).collect(), 1 << 30, &BTreeMap::new()).unwrap();
    let mut state = 1u64;
    for (name, shape) in &tensors {
        let spread = if shape.len() == 1 { 0.0 } else { (shape[1] as f32).powf(-0.5) };
        let bytes = (0..shape.iter().product()).flat_map(|_: usize| {
            let mut sum = 0.0;
            for _ in 0..4 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                sum += (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            }
            let value = if shape.len() == 1 { 1.0 } else { 3.0 * spread * sum };
            ((value.to_bits() >> 16) as u16).to_le_bytes()
        });
        writer.write(name, &bytes.collect::<Vec<u8>>()).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_gpu_gives_what_the_cpu_gives_and_the_same_with_little_memory() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    small_model(&room);
    let quantize = |out: &'static str, more: &[&'static str]| {
        let args = [&["quantize", "model", "-o", out, "--group-size", "64", "--verify-text", "none"], more].concat();
        let args = if more.contains(&"mse") { args } else { [&args[..], &["--calibration", TEXT]].concat() };
        let ran = imitated.run(ALL, &[], &args);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let report: Value =
            serde_json::from_slice(&std::fs::read(room.path(out).join("report.json")).unwrap()).unwrap();
        (codes(&room.path(out).join("model.safetensors")), report)
    };
    // Without data nothing differs.
    let rounded = ["cpu", "cuda"].map(|device| {
        let args = ["--method", "rtn", "--observer", "mse", "--device", device];
        quantize(if device == "cpu" { "rtn-cpu" } else { "rtn-gpu" }, &args).0
    });
    assert!(!rounded[0].is_empty() && rounded[0] == rounded[1]);
    // With data sums differ in their last bits, and so do a few codes: the models are equally good.
    let (_, report) = quantize("gpu", &["--samples", "16", "--seq-len", "32"]);
    assert!(report["device"].as_str().unwrap().contains("Imaginary 0 (cuda:0, sm_80), calibration in bfloat16"));
    assert!(report["notes"].as_array().unwrap().iter().all(|n| !n.as_str().unwrap().contains("put aside")));
    quantize("cpu", &["--samples", "16", "--seq-len", "32", "--device", "cpu"]);
    let loss = |out: &str, device: &str| {
        let measure = ["--reference", "model", "--context", "32", "--windows", "2", "--json", "--device", device];
        let ran = imitated.run(ALL, &[], &[&["eval", out], &measure[..]].concat());
        let quality: Value = serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{}", ran.err));
        quality["kld_mean"].as_f64().unwrap()
    };
    let [gpu, cpu, plain] = ["gpu", "cpu", "rtn-cpu"].map(|out| loss(out, "cpu"));
    println!("KL of what the GPU wrote {gpu}, of what the CPU wrote {cpu}, of rounding {plain}");
    assert!((gpu - cpu).abs() < 0.2 * cpu && gpu < plain, "{gpu}, {cpu} and {plain}");
    let measured = loss("gpu", "cuda");
    assert!((measured - gpu).abs() < 1e-4 * gpu, "{measured} and {gpu}");
    // What does not fit waits on the host, and comes back as it was.
    let weighted = ["--method", "rtn", "--observer", "imatrix", "--samples", "64", "--seq-len", "64"];
    let (ample, _) = quantize("ample", &weighted);
    let (little, report) = quantize("little", &[&weighted[..], &["--gpu-memory", "6300KB"]].concat());
    let notes = report["notes"].to_string();
    assert!(notes.contains("put aside"), "{notes}");
    assert_eq!(ample, little);
}

#[test]
fn many_threads_may_ask_a_gpu_at_once() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    small_model(&room);
    // Without data the rows of a tensor are searched by several threads, and nothing differs from the CPU.
    let written = [("cpu", &[][..]), ("cuda", &[]), ("cuda", &["--gpu-memory", "2MB"])].map(|(device, more)| {
        let args =
            ["quantize", "model", "-o", "out.gguf", "--force", "--scheme", "IQ4_NL", "--pure", "--method", "rtn"];
        let args = [&args[..], &["--verify-text", "none", "--threads", "4", "--device", device], more].concat();
        let ran = imitated.run(ALL, &[], &args);
        assert_eq!(ran.code, 0, "{}", ran.err);
        std::fs::read(room.path("out.gguf")).unwrap()
    });
    assert!(written[0] == written[1] && written[0] == written[2]);
}

#[test]
fn factorizations_of_a_library_are_those_of_our_own() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    model_of(&room, 1);
    let quantize = |libraries, settings: &[(&str, &str)], out: &'static str| {
        let args = ["quantize", "model", "-o", out, "--samples", "16", "--seq-len", "32", "--group-size", "64"];
        imitated.run(libraries, settings, &[&args[..], &["--verify-text", "none", "--calibration", TEXT]].concat())
    };
    let report = |out: &str| -> Value {
        serde_json::from_slice(&std::fs::read(room.path(out).join("report.json")).unwrap()).unwrap()
    };
    for (libraries, out) in [(ALL, "own"), (SOLVER, "library")] {
        let ran = quantize(libraries, &[], out);
        assert_eq!(ran.code, 0, "{}", ran.err);
    }
    let [own, library] = ["own", "library"].map(|out| codes(&room.path(out).join("model.safetensors")));
    let nibbles = own.iter().zip(&library).map(|(a, b)| u32::from(a & 15 != b & 15) + u32::from(a >> 4 != b >> 4));
    let different: u32 = nibbles.sum();
    println!("{different} of {} codes differ", 2 * own.len());
    assert!(own.len() == library.len() && different as usize <= 2 * own.len() / 1000, "{different}");
    let damps = |out: &str| -> Vec<f64> {
        report(out)["linears"].as_array().unwrap().iter().map(|linear| linear["damp"].as_f64().unwrap()).collect()
    };
    assert!(damps("own") == damps("library") && damps("own").iter().all(|damp| *damp == damps("own")[0]));
    // A pivot that is not positive is tried again with more damping, and told.
    let ran = quantize(SOLVER, &[("FAKE_CUDA_PIVOT", "3")], "damped");
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!((damps("damped")[0] / damps("library")[0] - 10.0).abs() < 1e-9, "{:?}", damps("damped"));
    assert!(report("damped")["linears"][0]["fallback"].as_str().unwrap().contains("10 times the damping"));
    let ran = quantize(SOLVER, &[("FAKE_CUDA_FAIL", "cusolverDnDpotrf"), ("FAKE_CUDA_ERROR", "6")], "failed");
    assert!(ran.code == 1 && ran.err.contains("cuSOLVER: Cholesky") && !room.path("failed").exists(), "{}", ran.err);
}

#[test]
fn weights_go_ahead_and_change_nothing() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    small_model(&room);
    // Megabytes that were sent ahead.
    let ahead = |ran: &Ran| -> f64 {
        let line =
            ran.err.lines().find_map(|line| line.strip_prefix("sent ahead ")).unwrap_or_else(|| panic!("{}", ran.err));
        line.trim_end_matches(" MB").parse().unwrap()
    };
    // A block has 0.295 MB. Where there is no memory for what goes ahead, nothing does.
    let none = [("FAKE_CUDA_FAIL", "cuMemAllocAsync@1"), ("FAKE_CUDA_ERROR", "2")];
    let quick = ["--samples", "2", "--seq-len", "32", "--verify-text", "none", "--calibration", TEXT];
    let cases: [(&str, &[&str]); 3] = [
        ("gptq", &["--group-size", "64"]),
        ("rtn", &["--method", "rtn", "--group-size", "64"]),
        ("blocks.gguf", &["--format", "gguf", "--scheme", "Q4_0"]),
    ];
    for (out, args) in cases {
        let written = [("", &[][..], &[][..]), ("bare-", &none, &[]), ("little-", &[], &["--gpu-memory", "1MB"])].map(
            |(prefix, settings, more)| {
                let out = format!("{prefix}{out}");
                let args = [&["quantize", "model", "-o", &out, "--profile"], &quick[..], args, more].concat();
                let ran = imitated.run(ALL, settings, &args);
                // Not everything can be done with so little.
                if ran.code == 2 && prefix == "little-" {
                    assert!(ran.err.contains("give more with --gpu-memory"), "{out}: {}", ran.err);
                    return None;
                }
                assert_eq!(ran.code, 0, "{out}: {}", ran.err);
                let file = if out.ends_with("gguf") { out.clone() } else { format!("{out}/model.safetensors") };
                Some((ahead(&ran), std::fs::read(room.path(&file)).unwrap()))
            },
        );
        let [sent, others @ ..] = written;
        let (bytes, expected) = sent.expect("there is enough");
        println!("{out}: {bytes} MB went ahead, {} runs without", others.iter().flatten().count());
        assert!(bytes > 0.2, "{out}: {bytes} MB");
        for (bytes, found) in others.into_iter().flatten() {
            assert!(bytes == 0.0 && found == expected, "{out}");
        }
    }
    let measure = ["eval", "gptq", "--reference", "model", "--context", "32", "--windows", "2", "--json", "--profile"];
    let [with, without] = [&[][..], &none].map(|settings| imitated.run(ALL, settings, &measure));
    assert!(with.out.contains("kld_mean") && with.out == without.out, "{}{}", with.err, without.err);
    assert!(ahead(&with) > 0.2 && ahead(&without) == 0.0);
}
