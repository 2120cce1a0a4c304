//! What a user nearly got right is answered with the command that works, and models are found by their names on a hub.

use crate::harness::{Room, Run};

/// Runs quantize with these words on the built-in model, without measuring.
fn quantize(room: &Room, words: &str) -> Run {
    let line = format!("quantize model {words} --method rtn --verify-text none");
    // The method that is given last would be given twice.
    let line = if words.contains("--method") { line.replace(" --method rtn --verify", " --verify") } else { line };
    room.run(line.split_whitespace())
}

#[test]
fn near_misses_are_answered_with_what_works() {
    let room = Room::new();
    room.model();
    room.file("wikitext.txt", "some text");
    for (words, code, told) in [
        ("-o m.gguf --scheme Q4KM", 2, &["did you mean --scheme Q4_K_M?"][..]),
        ("-o out --scheme Q4KM", 2, &["did you mean --scheme Q4_K_M -o NAME.gguf?"]),
        ("-o out --scheme Q4_K_M", 2, &["for a GGUF file say --scheme Q4_K_M -o NAME.gguf"]),
        ("-o out --scheme q5_k", 2, &["say --scheme Q5_K_M -o NAME.gguf"]),
        ("-o m.gguf --scheme W4A16", 2, &["did you mean --scheme Q4_K_M?", "-o DIR"]),
        ("-o out --scheme W4A16ASYM", 2, &["did you mean --scheme W4A16_ASYM?"]),
        ("-o out --scheme fp8dynamic", 2, &["did you mean --scheme FP8_DYNAMIC?"]),
        ("-o out --bits 5", 2, &["codes have 2, 3, 4 or 8", "--scheme Q5_K_M -o NAME.gguf"]),
        ("-o m.gguf --bits 6", 2, &["for about 6 bits say --scheme Q6_K"]),
        ("-o m.gguf --format awq", 2, &["m.gguf: is the name of a GGUF file", "`quantc quantize MODEL -o m.gguf`"]),
        ("-o out --method gtpq", 2, &["did you mean --method gptq?", "there are rtn, awq, gptq, awq+gptq"]),
        ("-o out --format compressed_tensors", 2, &["did you mean --format compressed-tensors?"]),
        ("-o out --format ggfu", 2, &["did you mean --format gguf?"]),
        ("-o out --observer minmaxx", 2, &["did you mean --observer minmax?", "there are minmax, mse, imatrix, clip"]),
        ("-o out --observer magic", 2, &["there are minmax, mse, imatrix, clip"]),
        ("-o out --method gptq --calibration wikitxt", 1, &["did you mean wikitext.txt?"]),
        ("-o out --method gptq --calibration mixde", 1, &["did you mean mixed?"]),
        ("-o out --unknown-tensors copyy", 2, &["did you mean --unknown-tensors copy?"]),
    ] {
        quantize(&room, words).refuses(code, told);
    }
    // A word that is as near to two names is left to the user.
    let told = quantize(&room, "-o out --scheme W5A16").stderr();
    assert!(told.contains("there are W4A16") && !told.contains("did you mean"), "{told}");
    assert!(!room.names().iter().any(|name| name.starts_with("out") || name.starts_with("m.")), "{:?}", room.names());
    // Case does not matter.
    quantize(&room, "-o m.gguf --scheme q4_k_m").succeeds();
    quantize(&room, "-o out --scheme w4a16 --group-size 64 --format Compressed-Tensors").succeeds();
    quantize(&room, "-o out --force --method RTN --group-size 64").succeeds();
}

#[cfg(unix)]
#[test]
fn models_are_found_in_the_cache_by_their_names() {
    let room = Room::new();
    room.whole_model();
    let hash = "0123456789abcdef0123456789abcdef01234567";
    let run = |line: &str| room.shell(&format!("unset HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_HOME; {line}"));
    let quantc = env!("CARGO_BIN_EXE_quantc");
    run(&format!("HF_HOME=hf {quantc} inspect org/small"))
        .refuses(1, &["org/small: it is not in the cache (hf/hub)", "HF_HUB_OFFLINE forbids to download it"]);
    run(&format!("HF_HOME=hf {quantc} inspect org/small@v1")).refuses(1, &["org/small@v1: it is not in the cache"]);
    let folder = room.path("hf/hub/models--org--small");
    std::fs::create_dir_all(folder.join("snapshots")).unwrap();
    std::fs::rename(room.path("model"), folder.join("snapshots").join(hash)).unwrap();
    room.file("hf/hub/models--org--small/refs/main", hash);
    room.file("hf/hub/models--org--small/refs/v1", hash);
    for place in ["HF_HOME=hf", "HF_HUB_CACHE=hf/hub", "HF_HOME=elsewhere HF_HUB_CACHE=hf/hub"] {
        for name in ["org/small", "org/small@main", "org/small@v1", "org/small@0123456"] {
            let run = run(&format!("{place} {quantc} inspect {name}"));
            run.succeeds();
            assert!(run.stdout().contains("4.20 million parameters"), "{place} {name}: {}", run.stdout());
        }
    }
    // Where nothing is said, it is in the user's cache.
    std::fs::create_dir_all(room.path("home/.cache")).unwrap();
    std::os::unix::fs::symlink(room.path("hf"), room.path("home/.cache/huggingface")).unwrap();
    run(&format!("unset XDG_CACHE_HOME; HOME=home {quantc} inspect org/small")).succeeds();
    run(&format!("HF_HOME=hf {quantc} inspect org/small@v2")).refuses(1, &["not this revision of it", hash]);
    let made =
        run(&format!("HF_HOME=hf {quantc} quantize org/small -o out --method rtn --group-size 64 --verify-text none"));
    made.succeeds();
    run(&format!("HF_HOME=hf {quantc} eval out org/small --reference org/small --windows 1 --context 32")).succeeds();
    // A folder of that name goes before the cache.
    std::fs::create_dir_all(room.path("org/small")).unwrap();
    run(&format!("HF_HOME=hf {quantc} inspect org/small")).refuses(1, &["org/small"]);
}

#[test]
fn help_is_in_sections_and_ends_with_examples() {
    let room = Room::new();
    let help = |command: &str| {
        let run = room.run([command, "--help"]);
        run.succeeds();
        run.stdout()
    };
    let quantize = help("quantize");
    let mut from = 0;
    for heading in ["Output", "Scheme", "Method", "Calibration", "GGUF", "Verification and limits", "Computation"] {
        assert!(quantize.contains(&format!("\n{heading}:\n")), "{heading}: {quantize}");
    }
    // Whatever is no help and no version has a section.
    let options = quantize.split("\nOptions:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    assert_eq!(options.lines().filter(|line| line.trim_start().starts_with('-')).count(), 1, "{options}");
    for command in ["demo", "quantize", "eval", "inspect", "convert", "merge", "clean", "devices"] {
        let help = help(command);
        let examples =
            help.split("\nExamples:\n").nth(1).unwrap_or_else(|| panic!("{command} has no examples: {help}"));
        for line in examples.lines().filter(|line| !line.trim().is_empty()) {
            assert!(line.starts_with(&format!("  quantc {command}")), "{line}");
            let words = line.split("  ").find(|part| part.starts_with("quantc")).unwrap();
            use clap::Parser;
            quantc::cli::Cli::try_parse_from(words.split_whitespace()).unwrap();
            from += 1;
        }
    }
    assert!(from >= 12);
}
