//! The model card: what machines read of it, what people do, and what it keeps of the original's.

use std::path::Path;

use serde_json::Value;

use crate::harness::{Room, TEXT};

/// The front matter of a card, as the YAML that it is: values by key, and lists of one level.
fn front(card: &str) -> Vec<(String, Vec<String>)> {
    let (front, _) = card.strip_prefix("---\n").unwrap().split_once("\n---\n\n").unwrap();
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for line in front.lines() {
        // No quotes are needed where a value is of these letters, and does not begin with one that means something.
        let plain = |text: &str| {
            !text.is_empty()
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./+".contains(c))
                && !text.starts_with('-')
        };
        match line.strip_prefix("- ") {
            Some(item) => {
                assert!(plain(item), "{line}");
                found.last_mut().unwrap().1.push(item.to_owned());
            }
            None => {
                let (key, value) = line.split_once(':').unwrap();
                assert!(plain(key) && (value.is_empty() || plain(value.strip_prefix(' ').unwrap())), "{line}");
                assert!(!found.iter().any(|(known, _)| known == key), "{key} stands twice");
                found.push((key.to_owned(), value.split_whitespace().map(str::to_owned).collect()));
            }
        }
    }
    found
}

fn card(folder: &Path) -> String {
    std::fs::read_to_string(folder.join("README.md")).unwrap()
}

#[test]
fn cards_tell_machines_and_people() {
    let room = Room::new();
    let model = room.model();
    let own = "---\nlanguage: en\nlicense: other\nlicense_name: llama3\n---\n# Hers\n";
    std::fs::write(model.path("README.md"), own).unwrap();
    let hash = "0123456789abcdef0123456789abcdef01234567";
    let place = format!("hub/models--org--small/snapshots/{hash}");
    std::fs::create_dir_all(room.path("hub/models--org--small/snapshots")).unwrap();
    std::fs::create_dir_all(room.path("hub/models--org--small/refs")).unwrap();
    std::fs::rename(room.path("model"), room.path(&place)).unwrap();
    for (format, flags, tags, command) in [
        ("compressed-tensors", "--method rtn", "compressed-tensors rtn 4-bit w4a16 quantc", "vllm serve PATH"),
        ("gptq", "--method gptq --samples 4", "gptq 4-bit w4a16 quantc", "vllm serve PATH"),
        ("awq", "--method rtn", "awq rtn 4-bit w4a16_asym quantc", "vllm serve PATH"),
        (
            "mlx",
            "--method rtn --bits 8",
            "mlx rtn 8-bit w8a16_asym quantc",
            "mlx_lm.generate --model PATH --prompt \"Hello\"",
        ),
        ("gguf", "--method rtn --scheme Q8_0", "gguf rtn 8-bit q8_0 quantc", "llama-cli -m gguf"),
    ] {
        let group = if format == "gguf" { "" } else { "--group-size 64" };
        let line = format!(
            "quantize {place} -o {format} --format {format} {group} {flags} --calibration {TEXT} --seq-len 64 --verify-windows 1 \
             --max-kld 0.9 --min-top1 0.1 --ignore down_proj"
        );
        let run = room.run(line.split_whitespace());
        run.succeeds();
        let told = run.stdout();
        let runs = told.lines().find_map(|line| line.strip_prefix("run it: "));
        assert_eq!(runs, Some(&*command.replace("PATH", format)));
        let card = match format {
            "gguf" => std::fs::read_to_string(room.path("gguf.README.md")).unwrap(),
            _ => card(&room.path(format)),
        };
        let front = front(&card);
        let of = |key: &str| front.iter().find(|(known, _)| known == key).map(|(_, values)| values.join(" "));
        assert_eq!(of("license").as_deref(), Some("other"), "{card}");
        assert_eq!(of("license_name").as_deref(), Some("llama3"));
        assert_eq!(of("base_model").as_deref(), Some("org/small"));
        assert_eq!(of("base_model_relation").as_deref(), Some("quantized"));
        assert_eq!(
            of("library_name").as_deref(),
            Some(if matches!(format, "mlx" | "gguf") { format } else { "transformers" })
        );
        assert_eq!(of("tags").as_deref(), Some(tags));
        for words in [
            "It was made of org/small.",
            &format!("```sh\n{command}\n```"),
            "## How it was made",
            "left as they are: `down_proj`",
            "| perplexity of the original |",
            "Limits: a mean KL divergence of at most 0.9, a share of equal top tokens of at least 0.1; kept.",
        ] {
            assert!(card.contains(words), "`{words}` is missing in {card}");
        }
        assert!(!card.contains(hash), "no place of this machine: {card}");
        if format == "gguf" {
            assert!(card.contains("In Ollama:") && card.ends_with("tensor: gguf.report.json.\n"), "{card}");
            continue;
        }
        assert_eq!(std::fs::read_to_string(room.path(format).join("README.original.md")).unwrap(), own);
    }
}

#[test]
fn a_card_without_an_original_and_with_a_missed_limit() {
    let room = Room::new();
    room.model();
    let line = "quantize model -o out --method rtn --bits 2 --group-size 64 --verify-windows 1 --max-kld 0.001";
    let run = room.run(line.split_whitespace());
    assert_eq!(run.code(), Some(3), "{}", run.stderr());
    let card = card(&room.path("out"));
    assert_eq!(front(&card)[0].0, "library_name");
    assert!(!card.contains("base_model") && card.contains("; missed: the mean KL divergence is "), "{card}");
    assert!(!card.contains("the the model"), "{card}");
}

#[test]
fn substituted_types_are_one_line_and_no_failure() {
    let room = Room::new();
    // Rows of 64 and 128 values, where the mix wants blocks of 256.
    let model = crate::families::checkpoint("llama_rope_linear");
    crate::gguf_families::spell(model.path());
    let run = room.run([
        "quantize",
        model.path().to_str().unwrap(),
        "-o",
        "m.gguf",
        "--pre",
        "default",
        "--method",
        "rtn",
        "--verify-text",
        "none",
    ]);
    run.succeeds();
    let told = run.stderr();
    let lines: Vec<&str> = told.lines().filter(|line| line.contains("in place of")).collect();
    assert_eq!(lines.len(), 1, "{told}");
    assert!(lines[0].contains("took what llama-quantize takes then: "), "{told}");
    assert!(!(run.stdout() + &told).contains("fallback"), "{}{told}", run.stdout());
    let report: Value = serde_json::from_slice(&std::fs::read(room.path("m.gguf.report.json")).unwrap()).unwrap();
    let fallback = report["linears"][0]["fallback"].as_str().unwrap();
    assert!(fallback.contains(" in place of ") && fallback.contains("do not split into blocks of 256"), "{fallback}");
    let told = run.stdout();
    let last: Vec<&str> = told.lines().rev().take(2).collect();
    assert_eq!(last[1], "run it: llama-cli -m m.gguf", "{told}");
    let ollama = "in Ollama: echo 'FROM ./m.gguf' > Modelfile && ollama create m -f Modelfile && ollama run m";
    assert_eq!(last[0], ollama, "{told}");
}

#[test]
fn a_pipe_gets_no_signs_for_terminals() {
    let room = Room::new();
    room.model();
    let line = "quantize model -o out --method rtn --group-size 64 --verify-windows 1 -v";
    let run = room.run(line.split_whitespace());
    run.succeeds();
    let told = run.stdout() + &run.stderr();
    assert!(!told.contains('\u{1b}') && !told.contains("left") && !told.contains(" | "), "{told}");
    let both = room.run(["quantize", "model", "-o", "x", "-q", "-v"]);
    assert!(both.code() == Some(2) && both.stderr().contains("cannot be used with"), "{}", both.stderr());
}
