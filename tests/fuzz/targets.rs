//! What every reader is put through with bytes from anywhere: an error that can be said, or a file that can be used.
//!
//! The fuzz targets call these, and so does `formats/tests/mutation.rs` on seeds with a few changes.

#![allow(dead_code)] // Each target uses its own.

use formats::ggml::BlockScales;
use formats::{GgufFile, Imatrix, SafetensorsFile};

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
