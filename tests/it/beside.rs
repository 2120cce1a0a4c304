//! What is not quantized is written beside the work on what is.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::Room;

/// Bytes of a tensor in a file that may still be being written, by its header.
fn tensor(file: &[u8], name: &str) -> Option<Vec<u8>> {
    let length = u64::from_le_bytes(file.get(..8)?.try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(file.get(8..8 + length)?).ok()?;
    let place = |end: usize| 8 + length + header[name]["data_offsets"][end].as_u64().unwrap() as usize;
    file.get(place(0)..place(1)).map(<[u8]>::to_vec)
}

/// The file of weights of an output that is being written.
fn staged(room: &Room) -> Option<Vec<u8>> {
    let folder = room.names().into_iter().find(|name| name.contains("partial"))?;
    std::fs::read(Path::new(&room.path(&folder)).join("model.safetensors")).ok()
}

#[test]
fn the_embedding_is_written_while_linears_are_solved() {
    let room = Room::new();
    room.whole_model();
    let args =
        ["quantize", "model", "-o", "out", "--device", "cpu", "--verify-text", "none", "--samples", "16", "--quiet"];
    let mut run = Command::new(env!("CARGO_BIN_EXE_quantc"))
        .args(args)
        .current_dir(room.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let source = std::fs::read(room.path("model/model.safetensors")).unwrap();
    let embedding = tensor(&source, "model.embed_tokens.weight").unwrap();
    let mut seen = false;
    while run.try_wait().unwrap().is_none() {
        let Some(file) = staged(&room) else { continue };
        let (Some(copied), Some(last)) =
            (tensor(&file, "model.embed_tokens.weight"), tensor(&file, "model.layers.3.mlp.down_proj.weight_packed"))
        else {
            continue;
        };
        // Nothing of the last linear is there yet.
        seen |= copied == embedding && last.iter().all(|byte| *byte == 0);
    }
    assert!(run.wait().unwrap().success());
    assert!(seen, "the embedding came no sooner than the last linear");
    let file = std::fs::read(room.path("out/model.safetensors")).unwrap();
    assert_eq!(tensor(&file, "model.embed_tokens.weight").unwrap(), embedding);
}

#[test]
fn what_cannot_be_copied_is_told_although_all_else_can_be_done() {
    let room = Room::new();
    let model = room.model();
    model.poison("model.embed_tokens.weight", 0x7fc0);
    let run = room.run(["quantize", "model", "-o", "out", "--method", "rtn", "--verify-text", "none", "--quiet"]);
    run.refuses(1, &["model.embed_tokens.weight", "model.safetensors"]);
    assert_eq!(room.names(), ["model"]);
}
