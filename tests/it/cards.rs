//! What surrounds a card: libraries of either version, compilers that take their time, memory that others use or that lies in pieces.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::cuda::{ALL, Imitated, SOLVER, imitation, model_of, small_model};
use crate::harness::{Room, TEXT};

/// Makes libraries of these names that are the imitation's, as packages have them: known by their names once they are loaded. Each
/// notes when it is.
fn libraries(imitation: &Path, folder: &Path, names: &[&str]) {
    std::fs::create_dir_all(folder).unwrap();
    let driver = imitation.join("driver");
    for name in names {
        let source = folder.join(format!("{name}.cpp"));
        let noted = "#include <cstdio>\n#include <cstdlib>\n__attribute__((constructor)) static void loaded() {\n\
             const char *path = getenv(\"FAKE_CUDA_LOADED\");\nFILE *file = path ? fopen(path, \"a\") : nullptr;\n\
             if (file) fprintf(file, \"%s\\n\", NAME), fclose(file);\n}\n";
        std::fs::write(&source, noted).unwrap();
        let made = Command::new("c++")
            .args(["-shared", "-fPIC", "-o"])
            .arg(folder.join(name))
            .arg(&source)
            .arg(format!("-DNAME=\"{name}\""))
            .arg(format!("-Wl,-soname,{name}"))
            .arg("-Wl,--no-as-needed")
            .arg(format!("-L{}", driver.display()))
            .arg("-l:libcuda.so.1")
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        std::fs::remove_file(source).unwrap();
    }
}

const CUDA_12: [&str; 6] = [
    "libcublas.so.12",
    "libcublasLt.so.12",
    "libcusolver.so.11",
    "libcusparse.so.12",
    "libnvJitLink.so.12",
    "libnvrtc.so.12",
];
const CUDA_13: [&str; 6] = [
    "libcublas.so.13",
    "libcublasLt.so.13",
    "libcusolver.so.12",
    "libcusparse.so.12",
    "libnvJitLink.so.13",
    "libnvrtc.so.13",
];

/// A run of the small model over so many sequences of so many tokens.
fn run_over<'a>(sequences: &'a str, tokens: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["quantize", "model", "-o", "out", "--force", "--group-size", "64", "--verify-text", "none"];
    [&args[..], &["--samples", sequences, "--seq-len", tokens, "--calibration", TEXT], more].concat()
}

/// The same over little.
fn quick<'a>(more: &[&'a str]) -> Vec<&'a str> {
    run_over("2", "32", more)
}

fn counts(path: &Path) -> BTreeMap<String, usize> {
    let text = std::fs::read_to_string(path).unwrap();
    let line =
        |line: &str| line.rsplit_once(' ').map(|(name, count)| (name.to_owned(), count.parse().unwrap())).unwrap();
    text.lines().map(line).collect()
}

fn report(room: &Room) -> Value {
    serde_json::from_slice(&std::fs::read(room.path("out/report.json")).unwrap()).unwrap()
}

fn weights(room: &Room) -> Vec<u8> {
    std::fs::read(room.path("out/model.safetensors")).unwrap()
}

/// The script's path, and a folder that it may run in.
fn script(room: &Room) -> (PathBuf, PathBuf) {
    let folder = room.path("card");
    std::fs::create_dir_all(&folder).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu.sh");
    std::fs::copy(script, folder.join("gpu.sh")).unwrap();
    (folder.join("gpu.sh"), folder)
}

/// The libraries that a run loads, sorted, one as often as it is loaded. What is asked of cuSOLVER first fails, so that it is known to be
/// there.
fn loaded(imitated: &Imitated<'_>, version: &str, libraries: &str, named: &Path) -> Vec<String> {
    let log = imitated.room.path("loaded");
    let _ = std::fs::remove_file(&log);
    let settings = [
        ("FAKE_CUDA_FAIL", "cusolverDnCreate"),
        ("FAKE_CUDA_ERROR", "6"),
        ("FAKE_CUDA_VERSION", version),
        ("FAKE_CUDA_LOADED", log.to_str().unwrap()),
        ("QUANTC_CUDA_LIBRARIES", named.to_str().unwrap()),
    ];
    let ran = imitated.run(libraries, &settings, &quick(&["--device", "cuda", "--quiet"]));
    assert!(ran.code == 1 && ran.err.contains("cuSOLVER: start"), "{version}: {}", ran.err);
    let mut found: Vec<String> = std::fs::read_to_string(log).unwrap().lines().map(str::to_owned).collect();
    found.sort();
    found
}

#[test]
fn libraries_of_cuda_12_and_13_are_found() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    small_model(&room);
    let found = |version: &str, names: &[&str]| {
        let named = room.path(&format!("{version}-{}", names.len()));
        libraries(folder, &named.join("lib"), names);
        let mut found = loaded(&imitated, version, "driver", &named);
        found.dedup();
        found
    };
    assert_eq!(found("12080", &CUDA_12), CUDA_12);
    assert_eq!(found("13000", &CUDA_13), CUDA_13);
    // A driver for CUDA 12 runs nothing of 13's.
    assert_eq!(found("12080", &[CUDA_12, CUDA_13].concat()), CUDA_12);
}

#[test]
fn what_the_system_finds_is_loaded_once() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    small_model(&room);
    let here = room.path("here");
    libraries(folder, &here, &CUDA_13);
    let path = format!("{}:{}", folder.join("driver").display(), here.display());
    let own = ["libcublas.so.13", "libcusolver.so.12", "libnvrtc.so.13"];
    assert_eq!(loaded(&imitated, "13000", &path, &room.path("none")), own);
}

#[test]
fn libraries_lie_beside_what_python3_is_a_link_to() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    libraries(folder, &room.path("opt/py/lib/python3.12/site-packages/nvidia/cu13/lib"), &CUDA_13);
    room.file("opt/py/bin/python3.12", "");
    for (link, to) in [("bin/python3", "../alternatives/python"), ("alternatives/python", "../opt/py/bin/python3.12")] {
        let link = room.path(link);
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(to, link).unwrap();
    }
    let path = room.path("bin");
    let ran = imitated.run("driver", &[("PATH", path.to_str().unwrap())], &["devices"]);
    assert!(ran.code == 0 && ran.out.contains("Imaginary 0") && !ran.out.contains("not usable"), "{}", ran.out);
}

#[test]
fn pinned_memory_that_runs_out_is_the_hosts() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    small_model(&room);
    let log = room.path("counts");
    let little = ["--method", "rtn", "--observer", "imatrix", "--gpu-memory", "6300KB", "--quiet"];
    let little = run_over("64", "64", &little);
    let ran = imitated.run(ALL, &[("FAKE_CUDA_COUNTS", log.to_str().unwrap())], &little);
    assert!(ran.code == 0 && report(&room)["notes"].to_string().contains("put aside"), "{}", ran.err);
    std::fs::remove_dir_all(room.path("out")).unwrap();
    // The first that is asked for, and the last, in which something is put aside.
    let last = (counts(&log)["cuMemHostAlloc"] - 1).to_string();
    for (after, args) in [("0", quick(&["--quiet"])), (&last, little)] {
        let settings = [("FAKE_CUDA_FAIL", "cuMemHostAlloc"), ("FAKE_CUDA_ERROR", "2"), ("FAKE_CUDA_AFTER", after)];
        let ran = imitated.run(ALL, &settings, &args);
        assert_eq!(ran.code, 1, "{}", ran.err);
        assert!(ran.err.contains("the host") && ran.err.contains("give more with --gpu-memory"), "{}", ran.err);
        assert!(ran.err.trim().lines().count() == 1 && !room.path("out").exists(), "{}", ran.err);
    }
}

#[test]
fn what_others_use_of_a_card_changes_no_byte() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    model_of(&room, 1);
    // A card of 48 GiB: all of it, the 5 that others leave, or as little as is asked for.
    let cases: [(&str, &[&str]); 3] = [("0", &[]), ("46170898432", &[]), ("0", &["--gpu-memory", "1GiB"])];
    let written = cases.map(|(taken, more)| {
        let settings = [("FAKE_CUDA_MEMORY", "51539607552"), ("FAKE_CUDA_TAKEN", taken)];
        let ran = imitated.run(SOLVER, &settings, &run_over("33", "64", more));
        assert_eq!(ran.code, 0, "{}", ran.err);
        weights(&room)
    });
    for (index, other) in written.iter().enumerate() {
        assert!(*other == written[0], "case {index} has other bytes");
    }
}

#[test]
fn memory_in_pieces_is_joined_before_anything_is_put_aside() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    small_model(&room);
    // cuBLAS has 64 MiB of it.
    let memory = ((64 << 20) + 3_000_000).to_string();
    let written = [("0", "0"), ("1", "0"), ("1", "1")].map(|(fragments, fails)| {
        let log = room.path("counts");
        let mut settings = vec![
            ("FAKE_CUDA_MEMORY", &memory[..]),
            ("FAKE_CUDA_FRAGMENTS", fragments),
            ("FAKE_CUDA_COUNTS", log.to_str().unwrap()),
        ];
        if fails == "1" {
            settings.extend([("FAKE_CUDA_FAIL", "cuMemPoolTrimTo"), ("FAKE_CUDA_ERROR", "700")]);
        }
        let ran = imitated.run(ALL, &settings, &quick(&["--quiet", "--gpu-memory", "3MB"]));
        if fails == "1" {
            assert!(ran.code == 1 && ran.err.contains("memory pool"), "{}", ran.err);
            return Vec::new();
        }
        assert_eq!(ran.code, 0, "{}", ran.err);
        let notes = report(&room)["notes"].to_string();
        assert!(!notes.contains("put aside"), "{fragments}: {notes}");
        let trims = counts(&log).get("cuMemPoolTrimTo").copied().unwrap_or(0);
        assert_eq!(trims > 0, fragments == "1", "{trims} times");
        weights(&room)
    });
    assert!(written[0] == written[1]);
}

#[test]
fn a_profile_waits_for_nothing() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    small_model(&room);
    let [plain, profiled] = [&[][..], &["--profile"]].map(|more| {
        let log = room.path("counts");
        let settings = [("FAKE_CUDA_COUNTS", log.to_str().unwrap())];
        let ran = imitated.run(ALL, &settings, &quick(more));
        assert_eq!(ran.code, 0, "{}", ran.err);
        (counts(&log), ran.err)
    });
    let waits = |counts: &BTreeMap<String, usize>| {
        counts.get("cuStreamSynchronize").unwrap_or(&0) + counts.get("cuEventSynchronize").unwrap_or(&0)
    };
    let launches = profiled.0["cuLaunchKernel"];
    assert!(launches > 200 && plain.0["cuLaunchKernel"] == launches);
    assert!(waits(&profiled.0) < waits(&plain.0) + launches / 100, "{} and {}", waits(&profiled.0), waits(&plain.0));
    // Of all launches the time is known.
    let line = |name: &str| -> (f64, usize) {
        let line = profiled.1.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{}", profiled.1));
        let words: Vec<&str> = line[name.len()..].split_whitespace().collect();
        (words[0].parse().unwrap(), words[4].parse().unwrap())
    };
    let (seconds, all) = line("all ");
    assert!(all == launches + profiled.0["cublasGemmEx"] + profiled.0.get("cublasDgemm").unwrap_or(&0), "{all}");
    assert!(seconds > 0.0 && line("sweep_codes").0 > 0.0, "{seconds}");
}

#[test]
fn modules_are_compiled_at_once_each_once_and_only_those_that_may_be_needed() {
    let Some(folder) = imitation() else { return };
    let room = Room::new();
    let imitated = Imitated { room: &room, folder };
    model_of(&room, 1);
    let log = room.path("counts");
    let run = |settings: &[(&str, &str)], more: &[&str]| {
        let _ = std::fs::remove_dir_all(room.path("cache"));
        let own = [("FAKE_CUDA_COUNTS", log.to_str().unwrap())];
        imitated.run(ALL, &[&own[..], settings].concat(), &quick(more))
    };
    let slow = [("FAKE_CUDA_COMPILES", "150")];
    let ran = run(&slow, &[]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let made = counts(&log);
    assert!(made["compiled at once"] > 1, "{made:?}");
    for name in ["sweep", "factor", "attention", "search", "gram"] {
        assert_eq!(made.get(&format!("compiled {name}.cu")), Some(&1), "{made:?}");
    }
    assert!(!made.contains_key("compiled clip.cu"), "{made:?}");
    // From the cache the second time.
    let ran = imitated.run(ALL, &[("FAKE_CUDA_COUNTS", log.to_str().unwrap())], &quick(&[]));
    assert!(ran.code == 0 && !counts(&log).contains_key("compiled sweep.cu"), "{}", ran.err);
    // AWQ clips.
    let ran = run(&[], &["--format", "awq", "--method", "awq"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(counts(&log).get("compiled clip.cu"), Some(&1));
    // What cannot be compiled is told once, although several fail.
    let ran = run(&[("FAKE_CUDA_FAIL", "nvrtcCompileProgram"), ("FAKE_CUDA_ERROR", "6")], &["--quiet"]);
    assert!(ran.code == 1 && ran.err.matches("NVRTC:").count() == 1, "{}", ran.err);
    assert_eq!(ran.err.trim().lines().count(), 1, "{}", ran.err);
}

#[test]
fn a_step_that_fails_or_hangs_does_not_end_the_others() {
    let room = Room::new();
    let (script, folder) = script(&room);
    // The tests fail, the table hangs, quantc writes down what it is asked for.
    for (name, content) in [
        ("kernel-tests", "#!/bin/sh\necho 'test one ... FAILED'; exit 101\n"),
        (
            "gpu-bench",
            "#!/bin/sh\n[ \"$1\" = --synthesize ] && mkdir -p $2 && touch $2/config.json && exit 0\nexec sleep 60\n",
        ),
        ("quantc", "#!/bin/sh\necho \"$@\" >>\"${0%/*}/asked\"\n"),
    ] {
        let path = folder.join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let run = Command::new("bash")
        .arg(&script)
        .arg("1b")
        .envs([
            ("LIMIT", "2"),
            ("WORK", room.path("work").to_str().unwrap()),
            ("OUT", room.path("logs").to_str().unwrap()),
        ])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&run.stdout);
    assert_eq!(run.status.code(), Some(1), "{told}");
    let asked = std::fs::read_to_string(folder.join("asked")).unwrap();
    for part in ["devices", "demo --device cuda", "--method rtn", "--gpu-memory 8GiB", "Q4_K_M"] {
        assert!(asked.contains(part), "{part} was never run: {asked}");
    }
    // Once for the caches, once for the figure, once for the profile.
    assert_eq!(asked.lines().filter(|line| line.contains("out-w4a16-gptq ")).count(), 3, "{asked}");
    let failed = told.lines().skip_while(|line| !line.contains("failed")).collect::<Vec<_>>().join("\n");
    assert!(failed.contains("kernels") && failed.contains("each operation"), "{told}");
    assert!(!failed.contains("demo"), "{told}");
}
