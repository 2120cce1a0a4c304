//! Every family as GGUF: written, read back, and still the model that transformers runs.

use std::path::Path;

use kernels::Cpu;
use quantc::job::Job;
use quantc::progress::Progress;
use quantc::recipe::{Recipe, Request};
use quantc::report::Report;
use serde_json::{Value, json};

use crate::families::{checkpoint, folder, names};
use crate::golden::{golden, logits};

/// Gives a checkpoint a tokenizer that GGUF knows: a token for each of the first bytes.
fn spell(folder: &Path) {
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let size = config.get("text_config").unwrap_or(&config)["vocab_size"].as_u64().unwrap() as u32;
    // GPT-2's alphabet begins with what ASCII prints; these go on as letters do.
    let letters = (0x21..0x7f).chain(0xa1..0xad).chain(0xae..0x1000).filter_map(char::from_u32);
    let vocab: serde_json::Map<String, Value> =
        letters.zip(0..size).map(|(letter, id)| (letter.to_string(), json!(id))).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

fn write(model: &Path, output: &Path, scheme: &str) -> quantc::Result<Report> {
    let request: Request = toml::from_str(&format!("format = 'gguf'\nmethod = 'rtn'\nscheme = '{scheme}'")).unwrap();
    let recipe = Recipe::resolve(request).unwrap();
    let job = Job { model, output, recipe, verification: None, force: false, report: None };
    job.run(&Cpu::exact(), &mut Progress::new(true))
}

/// What llama.cpp has no architecture for, or no setting, and what the refusal says.
const REFUSED: &[(&str, &str)] = &[];

/// Beyond how many tokens the file means another model, as a notice says.
fn valid(report: &Report) -> usize {
    let of = |notice: &String| {
        let (_, rest) = notice.split_once("beyond ")?;
        rest.split_whitespace().next()?.parse::<usize>().ok()
    };
    report.notes.iter().filter_map(of).min().unwrap_or(usize::MAX)
}

#[test]
fn every_family_is_read_back_as_the_model_that_was_written() {
    let mut wrong = Vec::new();
    let only = std::env::var("QUANTC_FAMILY").ok();
    let mut names = names();
    names.retain(|name| name != "gpt_oss_mxfp4" && only.as_ref().is_none_or(|only| name.contains(only)));
    for name in names {
        let room = checkpoint(&name);
        spell(room.path());
        let outputs = tempfile::tempdir().unwrap();
        let output = outputs.path().join("model.gguf");
        let refused = REFUSED.iter().find(|(refused, _)| *refused == name);
        let report = match (write(room.path(), &output, "F32"), refused) {
            (Ok(report), None) => report,
            (Err(error), Some((_, why))) if error.to_string().contains(why) => {
                assert_eq!(error.exit_code(), 2, "{name}: {error}");
                continue;
            }
            (Ok(_), Some(_)) => {
                wrong.push(format!("{name}: written, and should be refused"));
                continue;
            }
            (Err(error), _) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        let (sequences, expected) = golden(&folder().join(&name));
        let width = expected.len() / sequences.iter().map(Vec::len).sum::<usize>();
        let length = sequences[0].len();
        let valid = valid(&report).min(length);
        let sequences: Vec<Vec<u32>> = sequences.into_iter().map(|ids| ids[..valid].to_vec()).collect();
        let expected: Vec<f32> = match name.contains("dynamic") {
            false => expected.chunks_exact(length * width).flat_map(|logits| &logits[..valid * width]).copied().collect(),
            // How it is scaled depends on the length of the whole text.
            true => logits(room.path(), &sequences).unwrap(),
        };
        let approximate = report.notes.iter().any(|note| note.contains("approximates GELU") || note.contains("rounds the bounds"));
        match logits(&output, &sequences) {
            Err(error) => wrong.push(format!("{name}: {error}")),
            Ok(found) if found.len() != expected.len() => wrong.push(format!("{name}: {} logits", found.len())),
            Ok(found) => {
                let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                let close = worst <= if approximate { 2e-2 } else { 2e-4 } * largest;
                if !close {
                    wrong.push(format!("{name}: logits are off by {worst}, the largest is {largest}, {valid} tokens"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}
