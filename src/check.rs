//! Whether a checkpoint is whole: its files have the bytes that its report says, and everything in it can be read and is what its
//! configuration calls for.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::convert::fates;
use crate::error::{Error, Result};
use crate::families;
use crate::graph::Stored;
use crate::output::hashing::hash_file;
use crate::recipe::UnknownTensors;
use crate::report::{Fate, read_report};
use crate::text::ModelText;
use crate::verify::Gives;
use crate::weights::{Entry, StoredType};

/// What was found of a checkpoint.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Checked {
    /// The path that was checked.
    pub path: String,
    /// Its files of weights.
    pub files: Vec<CheckedFile>,
    /// Tensors that were read, all of them.
    pub tensors: usize,
    /// Values in all of them, zero points and scales not counted.
    pub values: u64,
    /// What is wrong; nothing where it is whole.
    pub faults: Vec<String>,
    /// What is worth knowing, and no fault.
    pub notes: Vec<String>,
}

/// A file of weights.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CheckedFile {
    /// Its name, without the folder.
    pub name: String,
    /// Its size in bytes, headers included.
    pub bytes: u64,
    /// SHA-256 of its content, where a report says what it should be.
    pub sha256: Option<String>,
}

/// Checks a checkpoint: hashes of its files, where a report beside it says them; every tensor of the model, by name, shape and value; what its
/// configuration says of quantization; its tokenizer.
///
/// Fails where it cannot be opened at all.
pub fn check(path: &Path) -> Result<Checked> {
    let source = if path.is_dir() { Checkpoint::open_strictly(path)? } else { Checkpoint::open(path)? };
    let (mut faults, mut notes) = (Vec::new(), source.remarks());
    let files = check_files(&source, &mut faults, &mut notes)?;
    match fates(&source, UnknownTensors::Copy) {
        Ok((fates, said)) => {
            notes.extend(said);
            faults.extend(parts_alone(
                fates.iter().filter(|(_, fate)| matches!(fate, Fate::Aside(_))).map(|(name, _)| &**name),
            ));
        }
        Err(error) => faults.push(error.to_string()),
    }
    let read: Vec<Result<u64>> = source.entries().par_iter().map(|entry| read(&source, entry)).collect();
    let mut values = 0;
    for one in read {
        match one {
            Ok(count) => values += count,
            Err(error) => faults.push(error.to_string()),
        }
    }
    faults.extend(source.broken_promise());
    let graph = families::graph_of(&source).ok();
    faults.extend(graph.iter().flat_map(families::not_whole));
    notes.retain(|note| !faults.contains(note));
    faults.extend(plain_of_packed(&source));
    let gives = graph.map(|graph| Gives::of(&graph, &source));
    faults.extend(gives.iter().filter_map(Gives::fault).map(str::to_owned));
    let tokenizer = source.tokenizer();
    if let Ok(Some(files)) = &tokenizer {
        faults.extend(source.faults_of_words(files));
        let known: Vec<String> = source.notes_on(&tokenizer);
        notes.extend(known.into_iter().filter(|note| !faults.contains(note)));
        let rows = families::vocabulary(source.config()).ok().flatten();
        let last = files.tokenizer.max_id();
        notes.extend(rows.filter(|rows| last as usize >= *rows).map(|rows| {
            format!(
                "{}: its last token has the id {last}, and the embedding has {rows} rows: a text with tokens beyond them fails in runtimes",
                files.file()
            )
        }));
    }
    match tokenizer {
        Ok(None) => match read_report(path)? {
            // Calibrating and measuring take one.
            Some(report) if report["calibration"].is_object() || report["quality"].is_object() => {
                faults.push("it has no tokenizer, and had one when it was written".to_owned());
            }
            _ => notes.push("it has no tokenizer".to_owned()),
        },
        tokenizer => faults.extend(
            tokenizer
                .map_err(|error| error.to_string())
                .and_then(|files| ModelText::of(&source, files).map_err(|e| e.to_string()))
                .err(),
        ),
    }
    source.check_unchanged()?;
    Ok(Checked { path: path.display().to_string(), files, tensors: source.entries().len(), values, faults, notes })
}

/// A fault of linears that are plain numbers where the configuration says that they are packed, so that runtimes look for codes that are not there.
fn plain_of_packed(source: &Checkpoint) -> Option<String> {
    let graph = families::graph_of(source).ok()?;
    let loading = families::Loading::of(source.config());
    let head = Some(&graph.head.linear).filter(|_| !graph.head.tied);
    let is_plain = |name: &str| source.entry(name).is_some_and(|entry| matches!(entry.dtype, StoredType::Plain(_)));
    // Runtimes go by the names that modules have once they are loaded.
    let called_packed = |module: &str| {
        let mut names = loading.names(module);
        names.push(module.to_owned());
        names.iter().all(|name| source.calls_packed(name))
    };
    let linears = graph.linears().chain(head).filter(|linear| linear.stored == Stored::Plain);
    let plain: Vec<&str> = linears
        .filter(|linear| is_plain(&linear.weight()) && called_packed(&linear.module))
        .map(|linear| &linear.module[..])
        .collect();
    let first = plain.first()?;
    Some(format!(
        "{} linears are stored as plain numbers, and config.json does not leave them out of what is packed (`{first}`): runtimes look for codes of \
         them; take the config.json that was written with these files",
        plain.len()
    ))
}

fn check_files(source: &Checkpoint, faults: &mut Vec<String>, notes: &mut Vec<String>) -> Result<Vec<CheckedFile>> {
    let report = read_report(source.path())?;
    if report.is_none() {
        notes.push("no report lies beside it, so that nothing says which bytes its files should have".to_owned());
    }
    let paths = source.files();
    let outputs = || report.as_ref()?["outputs"].as_array();
    let own = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Files that somebody has given other names are in the same order as they were.
    let known = |file: &Value| paths.iter().any(|path| file["name"] == *own(path));
    let renamed = outputs().is_some_and(|outputs| outputs.len() == paths.len() && !outputs.iter().any(known));
    if renamed {
        notes.push("its files have other names than the report says; they are compared in order".to_owned());
    }
    let said = |name: &str| {
        let at = paths.iter().position(|path| own(path) == name).filter(|_| renamed);
        outputs()?
            .iter()
            .enumerate()
            .find(|(index, file)| Some(*index) == at || file["name"] == *name)
            .map(|(_, file)| file.clone())
    };
    let looked: Vec<Result<CheckedFile>> = paths
        .par_iter()
        .map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match said(&name) {
                Some(_) => {
                    hash_file(path).map(|file| CheckedFile { name, bytes: file.bytes, sha256: Some(file.sha256) })
                }
                None => {
                    let bytes = std::fs::metadata(path).map_err(Error::io(path, "look at"))?.len();
                    Ok(CheckedFile { name, bytes, sha256: None })
                }
            }
        })
        .collect();
    let mut files = Vec::new();
    for file in looked {
        let file = file?;
        let told = said(&file.name);
        if let (Some(told), Some(found)) = (&told, &file.sha256) {
            if told["sha256"] != **found {
                faults.push(format!(
                    "{}: has {} bytes with the SHA-256 {found}, and the report says {} bytes with {}; it was changed since it was written",
                    file.name, file.bytes, told["bytes"], told["sha256"]
                ));
            }
        } else if report.is_some() {
            faults.push(format!("{}: the report says nothing of it", file.name));
        }
        files.push(file);
    }
    for file in outputs().into_iter().flatten().filter(|_| !renamed) {
        let name = file["name"].as_str().unwrap_or_default();
        if !files.iter().any(|found| found.name == name) {
            faults.push(format!("{name}: the report says it was written, and it is not there"));
        }
    }
    Ok(files)
}

/// Reads all values of a tensor, a piece at a time, which fails where one is not finite.
fn read(source: &Checkpoint, entry: &Entry) -> Result<u64> {
    // Integers that are no weights (positions, masks) have no values to be read as such.
    if source.raw(&entry.name).is_none_or(|raw| formats::tensor::is_float(raw.dtype)) {
        for piece in entry.pieces() {
            source.load_piece(entry, piece)?;
        }
        source.release(&entry.name);
    }
    Ok(entry.shape.iter().product::<usize>() as u64)
}

/// Local names of what packed weights are made of.
const PARTS: &[&str] = &[
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_global_scale",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "biases",
];

/// Faults of tensors that belong to a packed weight, and to none that the configuration calls packed.
fn parts_alone<'n>(names: impl Iterator<Item = &'n str>) -> Option<String> {
    let mut alone: Vec<&str> =
        names.filter(|name| name.rsplit('.').next().is_some_and(|part| PARTS.contains(&part))).collect();
    alone.sort_unstable();
    let first = alone.first()?;
    Some(format!(
        "{} tensors are parts of packed weights, and config.json does not call these packed (`{first}`): take the config.json that was written \
         with them",
        alone.len()
    ))
}

impl Checked {
    /// What is found of one that cannot even be opened.
    #[cfg_attr(doc, doc(hidden))]
    pub fn broken(path: &Path, fault: String) -> Checked {
        let path = path.display().to_string();
        Checked { path, files: Vec::new(), tensors: 0, values: 0, faults: vec![fault], notes: Vec::new() }
    }

    /// For people.
    pub fn text(&self) -> String {
        let hashed = self.files.iter().filter(|file| file.sha256.is_some()).count();
        let bytes: u64 = self.files.iter().map(|file| file.bytes).sum();
        let hashed = match hashed {
            0 => "no hashes to compare".to_owned(),
            _ if self.faults.is_empty() => "hashes as the report says".to_owned(),
            count => format!("{count} hashes compared"),
        };
        let verdict = match self.faults.len() {
            0 => "whole".to_owned(),
            1 => "1 fault".to_owned(),
            count => format!("{count} faults"),
        };
        format!(
            "{}: {verdict}; {} {} of {:.1} MB, {hashed}; {} tensors with {:.2} million values, all read\n",
            self.path,
            self.files.len(),
            if self.files.len() == 1 { "file" } else { "files" },
            bytes as f64 / 1e6,
            self.tensors,
            self.values as f64 / 1e6
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_packed_weights_are_known_by_their_last_name() {
        assert_eq!(parts_alone(["a.weight", "rotary.inv_freq"].into_iter()), None);
        let told = parts_alone(["b.q.weight_scale", "b.q.weight_packed", "x"].into_iter()).unwrap();
        assert!(told.starts_with("2 tensors") && told.contains("`b.q.weight_packed`"), "{told}");
    }
}
