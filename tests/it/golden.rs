//! Logits of every tiny checkpoint against those of transformers (`tests/fixtures/make_checkpoints.py`,
//! `tests/fixtures/make_families.py`).

use std::path::{Path, PathBuf};

use formats::SafetensorsFile;
use kernels::Cpu;
use quantc::recipe::UnknownTensors;
use quantc::report::Activations;
use quantc::stray::Strays;
use quantc::{Checkpoint, families, forward};

/// The committed checkpoints.
pub fn checkpoints() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints");
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    found.sort();
    found
}

/// Token ids, and the logits that transformers gave for them.
pub fn golden(folder: &Path) -> (Vec<Vec<u32>>, Vec<f32>) {
    let file = SafetensorsFile::open(folder.join("golden.safetensors")).unwrap();
    let ids = file.get("input_ids").unwrap();
    let tokens = ids.shape[1];
    let ids: Vec<u32> = ids.data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();
    (ids.chunks(tokens).map(<[u32]>::to_vec).collect(), file.get("logits").unwrap().to_f32().unwrap())
}

/// The logits of a checkpoint, all of whose tensors must be accounted for.
pub fn logits(folder: &Path, sequences: &[Vec<u32>]) -> quantc::Result<Vec<f32>> {
    let cpu = Cpu::default();
    let source = Checkpoint::open(folder)?;
    let graph = families::graph_of(&source)?;
    quantc::plan::check_tensors(&graph, &source)?;
    for entry in source.entries() {
        if !graph.tensors().iter().any(|(name, _)| *name == entry.name) {
            Strays::new(&graph, &source, UnknownTensors::Refuse).fate(&entry.name)?;
        }
    }
    let hidden = forward::final_hidden(&cpu, &graph, &source, sequences, Activations::Exact, &|_| Ok(()))?;
    let head = forward::LoadedHead::of(&cpu, &graph, &source, Activations::Exact)?;
    let mut found = Vec::new();
    for chunk in hidden {
        found.extend(head.logits(&cpu, chunk, usize::MAX)?);
    }
    Ok(found)
}

/// What is wrong with the logits of the checkpoint in `folder`, if anything.
fn difference(folder: &Path, golden_folder: &Path) -> Option<String> {
    let (sequences, expected) = golden(golden_folder);
    let found = match logits(folder, &sequences) {
        Ok(found) => found,
        Err(error) => return Some(error.to_string()),
    };
    if found.len() != expected.len() {
        return Some(format!("{} logits, not {}", found.len(), expected.len()));
    }
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // Written so that a NaN is a difference.
    let close = worst <= 1e-4 * largest;
    (!close).then(|| format!("logits are off by {worst}, the largest is {largest}"))
}

#[test]
fn logits_are_those_of_transformers() {
    let folders = checkpoints();
    assert!(folders.len() >= 15, "the fixtures are there");
    for folder in folders {
        assert_eq!(difference(&folder, &folder), None, "{}", folder.display());
    }
}

#[test]
fn every_family_has_the_logits_of_transformers() {
    let names = crate::families::names();
    let wrong: Vec<String> = names
        .iter()
        .filter_map(|name| {
            let room = crate::families::checkpoint(name);
            difference(room.path(), &crate::families::folder().join(name)).map(|why| format!("{name}: {why}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), names.len(), wrong.join("\n"));
}
