//! By what a run and what it reads are known again.

use std::path::{Path, PathBuf};

use kernels::Backend;
use serde_json::{Map, Value, json};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::output::Look;
use crate::output::hashing::{hash_beside, hashed};

use crate::recipe::Recipe;
use crate::report::FileReport;
use crate::verify::KeptStates;

/// The program, and the device it computes on: another build or another device may give other figures.
pub fn of_program<B: Backend>(backend: &B) -> Value {
    let own = own_file();
    json!({
        "quantc": env!("CARGO_PKG_VERSION"),
        "program": own.as_deref().map(stamp),
        // Results do not depend on the number of threads.
        "device": backend.relaxed().name().split(", ").filter(|part| !part.contains(" thread")).collect::<Vec<_>>(),
    })
}

/// The file that this code was loaded from: the program, or a library in another one, as the module for Python is.
fn own_file() -> Option<PathBuf> {
    let own = own_file as *const () as usize;
    let holds = |range: &str| {
        let (begin, end) = range.split_once('-')?;
        let [begin, end] = [begin, end].map(|text| usize::from_str_radix(text, 16).ok());
        Some((begin?..end?).contains(&own))
    };
    // Addresses, rights, offset, device, inode, and the path to the end of the line.
    let mapped = std::fs::read_to_string("/proc/self/maps").ok().and_then(|maps| {
        let line = maps.lines().find(|line| line.split(' ').next().and_then(holds) == Some(true))?;
        Some(PathBuf::from(&line[line.find('/')?..]))
    });
    mapped.or_else(|| std::env::current_exe().ok())
}

/// The files of a model, with whatever lies beside its weights.
pub fn of_model(source: &Checkpoint) -> Value {
    let mut all = files(source.path());
    all.extend(source.files());
    looked_at(all)
}

/// Where the hidden states of a model are kept, which depend, besides the tokens, on the program, the device, and what stands in all files, of
/// which those of the `weights` may be hashed already. Times do not count here: in some stores all files have the same.
///
/// Fails where a file cannot be read, or was written to since the model was opened.
pub fn kept_of<B: Backend>(
    backend: &B,
    source: &Checkpoint,
    weights: Option<&[FileReport]>,
) -> Result<Option<KeptStates>> {
    let described = files(source.path()).into_iter().filter(|file| file.extension().is_some_and(|kind| kind == "json"));
    let adapter = source.adapter().map_or_else(Vec::new, |adapter| files(Path::new(&adapter.path)));
    let beside = hash_beside(described.chain(adapter).filter(|file| file.is_file()).collect());
    let own = match weights {
        Some(_) => None,
        None => Some(hashed(hash_beside(source.files()))?),
    };
    let beside = hashed(beside)?;
    source.check_unchanged()?;
    let weights = weights.or(own.as_deref());
    Ok(KeptStates::of(json!({ "program": of_program(backend), "weights": weights, "beside": beside })))
}

/// What a recipe says, and the files that it names.
pub fn of_recipe(recipe: &Recipe) -> Value {
    json!({
        "recipe": recipe,
        "adapter": recipe.adapter.as_deref().map(|adapter| looked_at(files(adapter))),
        "calibration": stamp(Path::new(&recipe.calibration)),
        "imatrix": recipe.imatrix.as_deref().map(stamp),
    })
}

/// What lies in a folder; nothing where there is none.
fn files(folder: &Path) -> Vec<PathBuf> {
    let listed = std::fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<PathBuf> = listed.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    files
}

/// Names of files with their stamps.
fn looked_at(paths: Vec<PathBuf>) -> Value {
    let named = |path: &PathBuf| Some((path.file_name()?.to_string_lossy().into_owned(), stamp(path)));
    Value::Object(paths.iter().filter_map(named).collect::<Map<String, Value>>())
}

/// Size and time of a file; null where there is none.
fn stamp(path: &Path) -> Value {
    Look::of(path).map_or(Value::Null, |look| json!([look.bytes, look.modified]))
}

#[cfg(test)]
mod tests {
    #[test]
    fn code_knows_its_file() {
        assert_eq!(super::own_file(), std::env::current_exe().ok());
    }
}
