//! What every reader is put through with bytes from anywhere: an error that can be said, or a file that can be used.
//!
//! The fuzz targets call these, and so does `formats/tests/mutation.rs` on seeds with a few changes.

#![allow(dead_code)] // Each target uses its own.

use formats::ggml::BlockScales;
use formats::{GgufFile, Imatrix, SafetensorsFile, SentencePiece};

/// Values of a tensor looked at; larger ones are read no differently.
const MAX_VALUES: usize = 1 << 16;

pub fn gguf(data: &[u8]) {
    let file = match GgufFile::from_bytes("file", data.to_vec()) {
        Ok(file) => file,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    for key in file.keys() {
        assert!(file.metadata(key).is_some());
        let _ = (file.string(key), file.bool(key), file.count(key), file.float(key));
        let _ = (file.strings(key), file.integers(key), file.floats(key));
    }
    for spec in file.tensors() {
        let view = file.get(&spec.name).expect("listed");
        let (rows, width) = view.rows_and_width();
        assert_eq!(view.data.len(), spec.bytes());
        let Some(values) = rows.checked_mul(width).filter(|n| (1..=MAX_VALUES).contains(n)) else { continue };
        let mut out = vec![0.0; values];
        view.ty.dequantize(view.data, &mut out).expect("whole blocks");
        assert_eq!(view.row(rows - 1).len() * rows, view.data.len());
        if view.ty.layout().is_some() {
            let groups = view.ty.groups_per_block();
            let mut blocks = vec![BlockScales::default(); values / view.ty.block_len];
            let mut codes = vec![0; values];
            view.ty.unpack(view.data, &mut blocks, &mut codes);
            view.ty.expand(&blocks[0], &mut vec![0.0; groups], &mut vec![0.0; groups]);
            view.ty.pack(&blocks, &codes, &mut vec![0; view.data.len()]);
        }
        file.release(&spec.name);
    }
}

pub fn safetensors(data: &[u8]) {
    let file = match SafetensorsFile::from_bytes("file", data.to_vec()) {
        Ok(file) => file,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    for spec in file.tensors() {
        let view = file.get(&spec.name).expect("listed");
        assert_eq!(Some(view.data.len()), spec.bytes());
        let _ = view.is_finite();
        if view.data.len() <= 4 * MAX_VALUES {
            let _ = view.to_f32();
        }
    }
}

pub fn imatrix(data: &[u8]) {
    let imatrix = match Imatrix::from_bytes("file", data.to_vec()) {
        Ok(imatrix) => imatrix,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    for (name, entry) in &imatrix.entries {
        let means = imatrix.importance(name, entry.sums.len()).expect("its own width").expect("an entry");
        assert!(means.iter().all(|mean| *mean >= 0.0), "{name}");
        assert!(imatrix.importance(name, entry.sums.len() + 1).is_err());
    }
}

pub fn sentencepiece(data: &[u8]) {
    let model = match SentencePiece::parse(data) {
        Ok(model) => model,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(model.pieces.iter().all(|piece| piece.score.is_finite()));
    if let Some((size, rest)) = model.rules.split_first_chunk() {
        let (trie, texts) = rest.split_at(u32::from_le_bytes(*size) as usize);
        let texts = std::str::from_utf8(texts).unwrap();
        // Whatever is looked up, as the tokenizers library does.
        for start in (0..data.len()).step_by(1 + data.len() / 64) {
            look_up(trie, texts, &data[start..]);
        }
        (1..=255).for_each(|byte| look_up(trie, texts, &[byte; 8]));
    }
}

fn look_up(trie: &[u8], texts: &str, key: &[u8]) {
    let unit = |at: usize| u32::from_le_bytes(trie[4 * at..4 * at + 4].try_into().unwrap()) as usize;
    let offset = |unit: usize| (unit >> 10) << ((unit & 1 << 9) >> 6);
    let mut at = offset(unit(0));
    for byte in key.iter().take_while(|byte| **byte != 0) {
        at ^= usize::from(*byte);
        let found = unit(at);
        if found & (1 << 31 | 0xff) != usize::from(*byte) {
            return;
        }
        at ^= offset(found);
        if found >> 8 & 1 == 1 {
            let _ = &texts[unit(at) & !(1 << 31)..];
        }
    }
}
