//! Which model a path means, and what to say of a folder or file that is none.

use std::path::{Path, PathBuf};

use formats::container::file;
use formats::container::stand_in::{LOOKED_AT, another, stand_in};
use serde_json::Value;

use super::adapter::mlx_adapter;
use super::hub;
use super::training::training;
use crate::error::{Error, Result};
use crate::json::read_json;

/// The configuration of an adapter, of PEFT or of MLX.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Weights of adapters, and of what is beside a model in training.
const ADAPTER_WEIGHTS: &[&str] = &["adapter_model.safetensors", "adapters.safetensors"];

/// Endings of downloads that are not complete.
const UNFINISHED: &[&str] = &[".incomplete", ".part", ".crdownload", ".aria2", ".download"];

/// What to do about a model that is not there, where what stands in a path's place is a name on a hub or an address of one.
fn advice(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    let Some((_, address)) = text.split_once("://") else { return hub::advice(text) };
    let id: Vec<&str> = address.split('/').skip(1).take(2).collect();
    hub::advice(&id.join("/"))
}

/// The folder or file that `path` means: of a hub cache its snapshot, with a note on which, else the path itself.
///
/// Fails when there is nothing, and for a hub cache whose snapshot cannot be told.
pub(crate) fn resolve(path: &Path) -> Result<(PathBuf, Option<String>)> {
    check_link(path)?;
    let metadata = std::fs::metadata(path).map_err(|error| match advice(path) {
        Some(what) if error.kind() == std::io::ErrorKind::NotFound => {
            Error::failed(format!("{}: cannot open: {error}; {what}", path.display()))
        }
        _ => Error::io(path, "open")(error),
    })?;
    let itself = || Ok((path.to_path_buf(), None));
    let holds = |name: &str| path.join(name).exists();
    if !metadata.is_dir() || holds("config.json") || holds(ADAPTER_CONFIG) {
        return itself();
    }
    let snapshots = match path.file_name().is_some_and(|name| name == "snapshots") {
        true => path.to_path_buf(),
        false => path.join("snapshots"),
    };
    let root = snapshots.parent().unwrap_or(path);
    let is_cache = snapshots.is_dir() && (root.join("refs").is_dir() || root.join("blobs").is_dir());
    if !is_cache {
        return itself();
    }
    let shown = path.display();
    let main = file::read_text(&root.join("refs/main"), file::DESCRIPTION).ok().map(|text| text.trim().to_owned());
    let found: Vec<String> = names(&snapshots)?.into_iter().filter(|name| snapshots.join(name).is_dir()).collect();
    let give = || match &found[..] {
        [] => String::new(),
        found => format!(", or give a snapshot that is there: {}", found.join(", ")),
    };
    let (chosen, why) = match (main, &found[..]) {
        (Some(main), _) if found.contains(&main) => (main, "which refs/main names"),
        (Some(main), _) => {
            return Err(Error::failed(format!(
                "{shown}: refs/main of this hub cache names the snapshot {main}, which is not there; download the model \
                 again{}",
                give()
            )));
        }
        (None, [one]) => (one.clone(), "the only one"),
        (None, []) => {
            return Err(Error::failed(format!("{shown}: a hub cache without a snapshot; download the model again")));
        }
        (None, many) => {
            return Err(Error::failed(format!(
                "{shown}: a hub cache with {} snapshots and no refs/main that says which; give one of them: {}",
                many.len(),
                many.iter().map(|name| snapshots.join(name).display().to_string()).collect::<Vec<_>>().join(", ")
            )));
        }
    };
    let note = format!("{shown} is a hub cache: its snapshot {chosen}, {why}, was taken");
    Ok((snapshots.join(chosen), Some(note)))
}

/// What to say of a folder of a model that holds an adapter too.
pub(super) fn adapter_beside(folder: &Path) -> Option<String> {
    let holds = |name: &str| folder.join(name).exists();
    (holds(ADAPTER_CONFIG) && ADAPTER_WEIGHTS.iter().any(|name| holds(name))).then(|| {
        let shown = folder.display();
        format!(
            "{shown} holds an adapter beside its weights, which transformers applies where PEFT is installed: here it was not applied; \
             --adapter {shown} merges it"
        )
    })
}

/// Fails for a link to what is not there.
fn check_link(path: &Path) -> Result<()> {
    match std::fs::read_link(path) {
        Ok(target) if !path.exists() => Err(Error::failed(format!(
            "{}: a link to {}, which is not there; download the model again, as a hub cache links to what it has fetched",
            path.display(),
            target.display()
        ))),
        _ => Ok(()),
    }
}

/// Fails where the configuration or weights in a folder are links to what is not there.
pub(super) fn check_links(folder: &Path) -> Result<()> {
    let is_read = |name: &&String| {
        *name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
    };
    names(folder)?.iter().filter(is_read).try_for_each(|name| check_link(&folder.join(name)))
}

/// What a model is called by its own configuration: the last part of the name that it was saved under, else its type and size.
///
/// Where it lies says nothing: the same model gives the same output from every folder.
pub(super) fn model_name(config: &Value, parameters: u64) -> String {
    let saved = config["_name_or_path"].as_str().unwrap_or_default().trim_end_matches(['/', '\\']);
    let last = saved.rsplit(['/', '\\']).next().unwrap_or_default();
    if last.chars().any(char::is_alphanumeric) {
        return last.to_owned();
    }
    let size = match parameters {
        0..=999_999 => format!("{}K", parameters.div_ceil(1000)),
        1_000_000..=999_999_999 => format!("{}M", (parameters + 500_000) / 1_000_000),
        _ => format!("{:.1}B", parameters as f64 / 1e9),
    };
    format!("{} {size}", crate::families::type_of(config).unwrap_or("model"))
}

/// Names, or the first dozen and how many more.
pub(super) fn list(names: &[String]) -> String {
    let shown = names[..names.len().min(12)].join(", ");
    match names.len() - names.len().min(12) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The names in a folder, sorted.
pub(super) fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        names.push(entry.map_err(Error::io(folder, "list"))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// The first bytes of a file; fewer where it is shorter.
pub(super) fn beginning(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let file = file::open(path).map_err(Error::io(path, "open"))?;
    file.take(LOOKED_AT as u64).read_to_end(&mut bytes).map_err(Error::io(path, "read"))?;
    Ok(bytes)
}

/// Whether a file is GGUF, by its first bytes.
pub(super) fn is_gguf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"GGUF")
}

/// Why a file that is no GGUF file is no model.
pub(super) fn no_model(path: &Path, bytes: &[u8]) -> Error {
    let shown = path.display();
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if let Some(why) = stand_in(bytes) {
        return Error::failed(format!("{shown}: {why}"));
    }
    if folder.join("config.json").is_file() {
        return Error::failed(format!(
            "{shown}: one of the files of a model; give the folder that it lies in, {}",
            folder.display()
        ));
    }
    if ADAPTER_WEIGHTS.contains(&&name[..]) || name == ADAPTER_CONFIG {
        return adapter(folder);
    }
    if name.ends_with(".safetensors") {
        return Error::failed(format!(
            "{shown}: weights without the config.json that says what model they are; a checkpoint is a folder with both"
        ));
    }
    if let Some(why) = another(bytes, "a checkpoint") {
        return Error::failed(format!("{shown}: {why}"));
    }
    Error::failed(format!(
        "{shown}: not a checkpoint: expected a directory with config.json and model.safetensors, or a GGUF file"
    ))
}

/// A folder that holds an adapter where a model was asked for.
fn adapter(folder: &Path) -> Error {
    let shown = folder.display();
    let config = read_json(&folder.join(ADAPTER_CONFIG)).ok().flatten().unwrap_or_default();
    if let Some(error) = mlx_adapter(folder, &config) {
        return error;
    }
    let base = match config["base_model_name_or_path"].as_str() {
        Some(base) if !base.is_empty() => format!(", {base},"),
        _ => String::new(),
    };
    Error::failed(format!(
        "{shown}: an adapter and no model; give the model that it was made for{base} and this folder with --adapter"
    ))
}

/// Why a folder without config.json is no model that can be read.
pub(super) fn no_config(folder: &Path) -> Error {
    let shown = folder.display();
    let names = match names(folder) {
        Ok(names) => names,
        Err(error) => return error,
    };
    let holds = |name: &str| names.iter().any(|other| other == name);
    let ends = |ending: &str| names.iter().find(|name| name.to_lowercase().ends_with(ending));
    if holds("model_index.json") {
        let index = read_json(&folder.join("model_index.json")).ok().flatten().unwrap_or_default();
        let class = index["_class_name"].as_str().map_or(String::new(), |class| format!(" ({class})"));
        return Error::failed(format!(
            "{shown}: a pipeline of diffusers{class}; only language models are read, and of these the folder with config.json"
        ));
    }
    if holds(ADAPTER_CONFIG) || ADAPTER_WEIGHTS.iter().any(|name| holds(name)) {
        return adapter(folder);
    }
    if let Some(unfinished) = unfinished(folder) {
        return Error::failed(format!(
            "{shown}: config.json is missing, and a download is not complete ({unfinished}); run the download again"
        ));
    }
    if let Some(files) = gguf_files(folder, &names) {
        return Error::failed(format!("{shown}: config.json is missing, and the folder holds GGUF; {files}"));
    }
    if holds("params.json") && (ends(".pth").is_some() || names.iter().any(|name| name.starts_with("consolidated"))) {
        return Error::failed(format!(
            "{shown}: config.json is missing; params.json and consolidated weights are the form of the model's maker, get \
             the one with config.json and model.safetensors"
        ));
    }
    if let Some(error) = training(folder) {
        return error;
    }
    let models: Vec<&String> = names.iter().filter(|name| name.starts_with("models--")).collect();
    if let Some(first) = models.first() {
        return Error::failed(format!(
            "{shown}: a hub cache of {} models; give one of them, as {}",
            models.len(),
            folder.join(first).display()
        ));
    }
    let inner: Vec<&String> = names.iter().filter(|name| folder.join(name).join("config.json").is_file()).collect();
    let hint = match &inner[..] {
        [] => String::new(),
        [one] => format!("; there is one in {}", folder.join(one).display()),
        [first, ..] => format!("; {} folders in it have one, as {}", inner.len(), folder.join(first).display()),
    };
    Error::failed(format!("{shown}: config.json is missing{hint}"))
}

/// A GGUF file and the others that its model is split into.
pub(crate) fn parts_of(file: &Path) -> Result<Vec<PathBuf>> {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some((stem, rest)) = name.split_once("-00001-of-") else { return Ok(vec![file.to_path_buf()]) };
    let ending = format!("-of-{rest}");
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let other = entry.map_err(Error::io(folder, "list"))?.file_name().to_string_lossy().into_owned();
        if other.starts_with(&format!("{stem}-")) && other.ends_with(&ending) {
            found.push(file.with_file_name(other));
        }
    }
    found.sort();
    Ok(found)
}

/// Which GGUF file to give instead of a folder that has some: all of them, but of a split model the first alone.
fn gguf_files(folder: &Path, names: &[String]) -> Option<String> {
    let later = |name: &str| {
        let number = name.rsplit_once("-of-").and_then(|(rest, _)| rest.rsplit_once('-')?.1.parse::<usize>().ok());
        number.is_some_and(|number| number > 1)
    };
    let gguf = |name: &&String| {
        let path = folder.join(name);
        !later(name) && path.is_file() && beginning(&path).is_ok_and(|bytes| is_gguf(&bytes))
    };
    let found: Vec<String> = names.iter().filter(gguf).map(|name| folder.join(name).display().to_string()).collect();
    match &found[..] {
        [] => None,
        [one] => Some(format!("give the file itself, {one}")),
        several => Some(format!("give one of its files: {}", list(several))),
    }
}

/// Fails for a folder whose config.json is no language model's.
pub(super) fn check_kind(folder: &Path, config: &Value) -> Result<()> {
    let diffusers = config.get("_diffusers_version").is_some();
    match config.get("_class_name").and_then(Value::as_str).filter(|_| diffusers) {
        Some(class) => Err(Error::failed(format!(
            "{}: a part of a pipeline of diffusers ({class}); only language models are read",
            folder.display()
        ))),
        None => Ok(()),
    }
}

/// Fails for a folder that has weights in other forms than safetensors and nothing else, and says what they are.
pub(super) fn check_weights(folder: &Path) -> Result<()> {
    let names = names(folder)?;
    let is_own = |name: &String| {
        let index = name.ends_with(".safetensors.index.json");
        index || name.ends_with(".safetensors") && !ADAPTER_WEIGHTS.contains(&&name[..])
    };
    if names.iter().any(is_own) {
        return Ok(());
    }
    let shown = folder.display();
    let is_pickle = |name: &&String| [".bin", ".pth", ".pt"].iter().any(|ending| name.ends_with(ending));
    // Not what training and adapters leave.
    let others = ["adapter_model", "training_args", "optimizer", "scheduler", "scaler", "rng_state"];
    let pickles = || names.iter().filter(is_pickle).filter(|name| !others.iter().any(|other| name.starts_with(other)));
    let pickle = pickles().rfind(|name| name.starts_with("pytorch_model")).or_else(|| pickles().next_back());
    if let Some(name) = pickle {
        return Err(Error::failed(format!(
            "{shown}: PyTorch pickles such as {name} are not read, as opening one can run what it contains; convert them \
             once: python3 -c 'from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
             M.from_pretrained(\"{shown}\", dtype=\"auto\").save_pretrained(\"OUT\"); \
             T.from_pretrained(\"{shown}\").save_pretrained(\"OUT\")'"
        )));
    }
    if names.iter().any(|name| name == ADAPTER_CONFIG || ADAPTER_WEIGHTS.contains(&&name[..])) {
        return Err(adapter(folder));
    }
    if let Some(files) = gguf_files(folder, &names) {
        return Err(Error::failed(format!("{shown}: its weights are GGUF; {files}")));
    }
    if let Some(error) = training(folder) {
        return Err(error);
    }
    let other = [".h5", ".msgpack", ".onnx", ".npz", ".ot", ".ckpt", ".tflite", ".nemo"];
    match names.iter().find(|name| other.iter().any(|ending| name.ends_with(ending))) {
        Some(name) => Err(Error::failed(format!(
            "{shown}: its weights ({name}) are in a form that is not read; get or save the model as safetensors"
        ))),
        None => Ok(()),
    }
}

/// Says of weights that are missing when a download of them is not complete.
pub(super) fn explain_missing(folder: &Path, error: formats::Error) -> Error {
    let formats::error::Kind::Missing(what) = &error.kind else { return error.into() };
    match unfinished(folder) {
        Some(name) => {
            Error::failed(format!("{error}, and a download is not complete ({name}); run the download again"))
        }
        None if what.contains("model.safetensors") && inside(folder).is_some() => Error::failed(format!(
            "{error}; {} has weights: give that folder, or lay its files here",
            inside(folder).unwrap_or_default()
        )),
        None if what.starts_with("shard ") => Error::failed(format!("{error}; fetch it, or download the model again")),
        None => error.into(),
    }
}

/// A folder right in this one that has weights, as training leaves `checkpoint-500`, or weights under a name in capitals.
fn inside(folder: &Path) -> Option<String> {
    let names = names(folder).ok()?;
    let weights = |name: &String| name.to_lowercase().ends_with(".safetensors");
    let has = |name: &&String| {
        let path = folder.join(name);
        path.is_dir() && self::names(&path).is_ok_and(|inner| inner.iter().any(weights))
    };
    Some(folder.join(names.iter().find(has)?).display().to_string())
}

/// Fails when a weight file that is there is known to be incomplete: aria2 gives a file its whole size at once, and keeps
/// beside it what is still to come.
pub(super) fn check_complete(file: &Path) -> Result<()> {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let control = file.with_file_name(format!("{name}.aria2"));
    match control.exists() {
        true => Err(Error::failed(format!(
            "{}: its download is not complete, as {name}.aria2 beside it says; run the download again",
            file.display()
        ))),
        false => Ok(()),
    }
}

/// Whether a file is part of a download that is not complete.
pub(super) fn is_unfinished(name: &str) -> bool {
    UNFINISHED.iter().any(|ending| name.ends_with(ending))
}

/// A file of a download into `folder` that is not complete: in it, where `hf download` keeps them, or among the blobs of its
/// hub cache.
fn unfinished(folder: &Path) -> Option<String> {
    let mut places = vec![folder.to_path_buf(), folder.join(".cache/huggingface/download")];
    if let Some(snapshots) = folder.parent().filter(|parent| parent.ends_with("snapshots")) {
        places.extend(snapshots.parent().map(|root| root.join("blobs")));
    }
    let found = |place: &PathBuf| names(place).ok()?.into_iter().find(|name| is_unfinished(name));
    places.iter().find_map(found)
}
