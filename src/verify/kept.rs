//! What the original's last block left of a text, kept in the user's cache folder for later runs that measure beside the same original.
//!
//! Only hidden states are kept, `[tokens, hidden]` in single precision, and no logits, which take a vocabulary times as much. They are taken
//! again, bit for bit, by the same program on the same device for the same model and the same tokens. A cache that cannot be read or written is
//! done without.

use std::io::Read;
use std::path::{Path, PathBuf};

use formats::container::cache;
use kernels::Backend;
use ndarray::Array2;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::forward::Hidden;
use crate::output::hashing::hex;

/// Bytes that are kept, of all originals together; what was used longest ago is removed first.
const MOST: u64 = 4 << 30;

/// Where the hidden states of one model are kept.
pub struct KeptStates {
    folder: PathBuf,
    /// All that they depend on besides the tokens.
    key: Value,
}

impl KeptStates {
    /// Those of the model, the program and the device that `key` names; `None` where there is no cache folder.
    pub fn of(key: Value) -> Option<KeptStates> {
        Some(KeptStates { folder: cache::folder("originals")?, key })
    }

    /// `layers` that predict further tokens are kept with what the model leaves.
    fn path<B: Backend>(&self, backend: &B, windows: &[Vec<u32>], layers: usize) -> PathBuf {
        let mut hash = Sha256::new();
        hash.update(self.key.to_string());
        hash.update((layers as u64).to_le_bytes());
        // By it the windows are cut into chunks.
        hash.update((backend.tokens_at_once() as u64).to_le_bytes());
        for window in windows {
            hash.update((window.len() as u64).to_le_bytes());
            window.iter().for_each(|token| hash.update(token.to_le_bytes()));
        }
        self.folder.join(format!("{}.f32", &hex(&hash.finalize())[..32]))
    }

    /// Whether there is something of these windows, whole or not.
    pub fn knows<B: Backend>(&self, backend: &B, windows: &[Vec<u32>], layers: usize) -> bool {
        self.path(backend, windows, layers).is_file()
    }

    /// What was kept of these windows, in the chunks in which it was computed; `None` where that is nothing, or damaged.
    pub fn take<B: Backend>(&self, backend: &B, windows: &[Vec<u32>], layers: usize) -> Option<Hidden<B::Matrix>> {
        let path = self.path(backend, windows, layers);
        let matrices = cache::read(&path, |content| {
            let list = |content: &mut dyn Read| {
                let [count] = counts(content)?;
                (0..count).map(|_| matrix(content)).collect::<std::io::Result<Vec<_>>>()
            };
            (0..=layers).map(|_| list(content)).collect::<std::io::Result<Vec<_>>>()
        })?;
        // By this time it is known what was used last.
        let _ = std::fs::File::options()
            .append(true)
            .open(&path)
            .and_then(|file| file.set_modified(std::time::SystemTime::now()));
        let upload = |list: Vec<Array2<f32>>| list.into_iter().map(|matrix| backend.upload(matrix).ok()).collect();
        let mut lists = matrices.into_iter().map(upload);
        Some(Hidden { normed: lists.next()??, further: lists.collect::<Option<_>>()? })
    }

    /// Keeps what was computed of these windows.
    pub fn keep<B: Backend>(&self, backend: &B, windows: &[Vec<u32>], hidden: &Hidden<B::Matrix>) {
        let path = self.path(backend, windows, hidden.further.len());
        let written = cache::write(&path, |file| {
            let lists = || [&hidden.normed].into_iter().chain(&hidden.further);
            for (list, at, chunk) in
                lists().flat_map(|list| list.iter().enumerate().map(move |(at, chunk)| (list, at, chunk)))
            {
                if at == 0 {
                    file.write_all(&(list.len() as u64).to_le_bytes())?;
                }
                let matrix = backend.download(chunk).map_err(std::io::Error::other)?;
                // A broken model is refused each time in the same words.
                if matrix.iter().any(|value| !value.is_finite()) {
                    return Err(damaged());
                }
                let (rows, columns) = matrix.dim();
                [rows, columns].iter().try_for_each(|count| file.write_all(&(*count as u64).to_le_bytes()))?;
                for row in matrix.rows() {
                    let bytes: Vec<u8> = row.iter().flat_map(|value| value.to_le_bytes()).collect();
                    file.write_all(&bytes)?;
                }
            }
            Ok(())
        });
        if written.is_ok() {
            trim(&self.folder, &path);
        }
    }
}

fn counts<const N: usize>(content: &mut dyn Read) -> std::io::Result<[usize; N]> {
    let mut all = [0; N];
    for count in &mut all {
        let mut bytes = [0; 8];
        content.read_exact(&mut bytes)?;
        *count = u64::from_le_bytes(bytes) as usize;
    }
    Ok(all)
}

fn matrix(content: &mut dyn Read) -> std::io::Result<Array2<f32>> {
    let [rows, columns] = counts(content)?;
    // Counts of a damaged file may be any: nothing is allotted before it was read.
    let mut values = Vec::new();
    let mut row = vec![0; columns.checked_mul(4).filter(|bytes| *bytes <= 1 << 30).ok_or_else(damaged)?];
    for _ in 0..rows {
        content.read_exact(&mut row)?;
        values.extend(row.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes"))));
    }
    Array2::from_shape_vec((rows, columns), values).map_err(|_| damaged())
}

fn damaged() -> std::io::Error {
    std::io::ErrorKind::InvalidData.into()
}

/// Removes what was used longest ago, and not `new`, while all together is more than is kept.
fn trim(folder: &Path, new: &Path) {
    let files = std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| {
        let (path, about) = (entry.as_ref().ok()?.path(), entry.as_ref().ok()?.metadata().ok()?);
        Some((about.modified().ok()?, about.len(), path))
    });
    let mut files: Vec<_> = files.collect();
    files.sort();
    let mut all: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
    for (_, bytes, path) in files {
        if all > MOST && path != new && std::fs::remove_file(&path).is_ok() {
            all -= bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use kernels::{Cpu, Memory};
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_kept_comes_back_for_the_same_model_and_tokens_alone() {
        let room = tempfile::tempdir().unwrap();
        let cpu = Cpu::default();
        let kept = |key| KeptStates { folder: room.path().to_owned(), key: json!(key) };
        let windows = vec![vec![1, 2, 3], vec![4, 5]];
        let chunks =
            [Array2::from_shape_fn((3, 2), |(i, j)| (i * 2 + j) as f32 / 3.0), Array2::from_elem((2, 2), -0.0)];
        let uploaded: Vec<_> = chunks.iter().map(|chunk| cpu.upload(chunk.clone()).unwrap()).collect();
        assert!(kept("a").take(&cpu, &windows, 1).is_none());
        kept("a").keep(&cpu, &windows, &Hidden { normed: uploaded.clone(), further: vec![uploaded[1..].to_vec()] });
        assert!(kept("a").take(&cpu, &windows, 0).is_none());
        let back = kept("a").take(&cpu, &windows, 1).unwrap();
        assert_eq!([back.normed.len(), back.further.len(), back.further[0].len()], [2, 1, 1]);
        for (chunk, back) in chunks.iter().chain([&chunks[1]]).zip(back.normed.iter().chain(&back.further[0])) {
            let back = cpu.download(back).unwrap();
            assert!(chunk.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()) && chunk.dim() == back.dim());
        }
        assert!(kept("b").take(&cpu, &windows, 1).is_none());
        // The same tokens, cut elsewhere.
        assert!(kept("a").take(&cpu, &[vec![1, 2], vec![3, 4, 5]], 1).is_none());
        let path = kept("a").path(&cpu, &windows, 1);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[30] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(kept("a").knows(&cpu, &windows, 1) && kept("a").take(&cpu, &windows, 1).is_none());
    }
}
