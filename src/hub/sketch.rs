//! A model without the values of its weights, for who reads none: what is beside the weights, and of each file of weights the header, which
//! says what tensors there are, with a hole of the file's size behind it.

use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

use super::Found;
use super::fetch::Fetch;
use super::listing::{Listed, Wanted};
use crate::error::{Error, Result};
use crate::json::read_json;
use crate::progress::Progress;

/// Bytes that are asked for at first: most headers are within.
const FIRST: u64 = 256 << 10;

/// Bytes of the largest header.
const LARGEST: u64 = 100 << 20;

/// Files that are asked for at the same time.
const AT_ONCE: usize = 4;

/// The sketch of a model; `None` where it has to be read as a whole: GGUF files, whose headers do not say how long they are, and weights that
/// are quantized already, of which some numbers are read.
pub fn sketch(fetch: &Fetch<'_>, wanted: &Wanted, progress: &mut Progress) -> Result<Option<Found>> {
    let Wanted::Folder(side) = wanted else { return Ok(None) };
    fetch.side(side, progress)?;
    let config = read_json(&fetch.snapshot().join("config.json"))?.unwrap_or_default();
    if is_quantized(&config) || is_quantized(&config["text_config"]) {
        return Ok(None);
    }
    let weights = fetch.weights()?;
    let room = tempfile::Builder::new()
        .prefix("quantc-")
        .tempdir()
        .map_err(Error::io(std::env::temp_dir(), "create a folder in"))?;
    // As it would lie in the cache, so that it is known by its name.
    let place = room.path().join(fetch.name.folder()).join("snapshots").join(&fetch.listing.commit);
    for file in side {
        copy(&fetch.snapshot(), &place, &file.path)?;
    }
    progress.start(format!("reading the headers of {}", fetch.name.id), weights.len() as u64)?;
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(file) = weights.get(next.fetch_add(1, Ordering::Relaxed)) {
            hollow(fetch, file, &place)?;
            progress.step(1)?;
        }
        Ok(())
    };
    let done: Vec<Result<()>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE.min(weights.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("reading headers does not panic")).collect()
    });
    done.into_iter().collect::<Result<()>>()?;
    let bytes: u64 = weights.iter().map(|file| file.bytes).sum();
    let note = format!(
        "{}: its weights ({:.1} MB) are not on this disk and were not downloaded: the headers of their files were read",
        fetch.name,
        bytes as f64 / 1e6
    );
    Ok(Some(Found { place, note: Some(note), room: Some(room) }))
}

/// Whether a configuration says that weights are stored quantized.
fn is_quantized(config: &Value) -> bool {
    ["quantization_config", "compression_config", "quantization"].iter().any(|key| config[*key].is_object())
}

/// Copies a file from one folder into another.
fn copy(from: &Path, to: &Path, name: &str) -> Result<()> {
    let place = to.join(name);
    let folder = place.parent().unwrap_or(to);
    std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    std::fs::copy(from.join(name), &place).map(drop).map_err(Error::io(&place, "write"))
}

/// Writes a file of weights with its header, and nothing behind it.
fn hollow(fetch: &Fetch<'_>, file: &Listed, folder: &Path) -> Result<()> {
    let mut head = fetch.beginning(file, 0, FIRST)?;
    let length = head.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)).filter(|length| *length <= LARGEST);
    let wrong = || {
        Error::failed(format!("{}: {}: not a safetensors file; tell who published the model", fetch.name, file.path))
    };
    let end = length.ok_or_else(wrong)? + 8;
    if end > head.len() as u64 {
        head.extend(fetch.beginning(file, head.len() as u64, end - head.len() as u64)?);
    }
    let place = folder.join(&file.path);
    let within = place.parent().unwrap_or(folder);
    std::fs::create_dir_all(within).map_err(Error::io(within, "create"))?;
    let write = || {
        let mut hollow = std::fs::File::create(&place)?;
        hollow.write_all(&head[..head.len().min(end as usize)])?;
        hollow.set_len(file.bytes)
    };
    write().map_err(Error::io(&place, "write"))
}
