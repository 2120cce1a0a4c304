//! By what a run and what it reads are known again.

use std::path::{Path, PathBuf};

use kernels::Backend;
use serde_json::{Map, Value, json};

use crate::checkpoint::Checkpoint;
use crate::output::Look;
use crate::recipe::Recipe;

/// The program, and the device it computes on: another build or another device may give other figures.
pub fn of_program<B: Backend>(backend: &B) -> Value {
    let own = std::env::current_exe().ok();
    json!({
        "quantc": env!("CARGO_PKG_VERSION"),
        "program": own.as_deref().map(stamp),
        // Results do not depend on the number of threads.
        "device": backend.relaxed().name().split(", ").filter(|part| !part.contains(" thread")).collect::<Vec<_>>(),
    })
}

/// The files of a model, with whatever lies beside its weights.
pub fn of_model(source: &Checkpoint) -> Value {
    let mut all = files(source.path());
    all.extend(source.files());
    looked_at(all)
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
