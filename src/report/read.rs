//! The report that lies beside an output.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// Where the report of an output lies.
pub fn report_of(path: &Path) -> PathBuf {
    if path.is_dir() {
        return path.join("report.json");
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Parts of a file share a report, which is called as the whole of it.
    let whole = match name.strip_suffix(".gguf").and_then(|stem| stem.rsplit_once("-of-")) {
        Some((first, _)) => first.rsplit_once('-').map_or(name.to_string(), |(stem, _)| format!("{stem}.gguf")),
        None => name.to_string(),
    };
    path.with_file_name(format!("{whole}.report.json"))
}

/// Reads the report beside an output; `None` where there is none. Fails where there is one that cannot be read.
pub fn read_report(path: &Path) -> Result<Option<Value>> {
    let report = report_of(path);
    match std::fs::read(&report) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::failed(format!("{}: is no report of quantc: {error}", report.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(&report, "read")(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_lie_beside_files_and_in_folders() {
        let of = |path: &str| report_of(Path::new(path)).display().to_string();
        assert_eq!(of("/nowhere/m.gguf"), "/nowhere/m.gguf.report.json");
        assert_eq!(of("m-00002-of-00003.gguf"), "m.gguf.report.json");
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(report_of(folder.path()), folder.path().join("report.json"));
    }
}
