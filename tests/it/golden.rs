//! Logits of every tiny checkpoint against those of transformers (`tests/fixtures/make_checkpoints.py`).

use std::path::{Path, PathBuf};

use formats::SafetensorsFile;
use kernels::{Backend, Cpu};
use quantc::{Checkpoint, families, forward};

/// The committed checkpoints.
pub fn checkpoints() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints");
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    found.sort();
    found
}

fn golden(folder: &Path) -> (Vec<Vec<u32>>, Vec<f32>) {
    let file = SafetensorsFile::open(folder.join("golden.safetensors")).unwrap();
    let ids = file.get("input_ids").unwrap();
    let tokens = ids.shape[1];
    let ids: Vec<u32> = ids.data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();
    (ids.chunks(tokens).map(<[u32]>::to_vec).collect(), file.get("logits").unwrap().to_f32().unwrap())
}

#[test]
fn logits_are_those_of_transformers() {
    let folders = checkpoints();
    assert!(folders.len() >= 15, "the fixtures are there");
    for folder in folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let (sequences, expected) = golden(&folder);
        let source = Checkpoint::open(&folder).unwrap();
        let graph = families::graph_of(&source).unwrap();
        let hidden = forward::final_hidden(&Cpu::default(), &graph, &source, &sequences, &|| ()).unwrap();
        let head = forward::load_head(&Cpu::default(), &graph, &source).unwrap();
        let mut found = Vec::new();
        for chunk in &hidden {
            let input = Cpu::default().input(chunk.clone()).unwrap();
            found.extend(Cpu::default().linear(&input, &head, None).unwrap());
        }
        assert_eq!(found.len(), expected.len(), "{name}");
        let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-4 * largest, "{name}: logits are off by {worst}, the largest is {largest}");
    }
}
