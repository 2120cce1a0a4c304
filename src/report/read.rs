//! The report that lies beside an output.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// What the report and the model card in an output's folder are called.
pub const PAPERS: [&str; 2] = ["report.json", "README.md"];

/// What the report and the model card beside an output that is a file called `name` are called.
pub fn papers_beside(name: &str) -> [String; 2] {
    PAPERS.map(|paper| format!("{name}.{paper}"))
}

/// Where the report and the model card of an output lie.
pub fn papers_of(path: &Path) -> [PathBuf; 2] {
    if path.is_dir() {
        return PAPERS.map(|paper| path.join(paper));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Parts of a file share their papers, which are called as the whole of it.
    let whole = match name.strip_suffix(".gguf").and_then(|stem| stem.rsplit_once("-of-")) {
        Some((first, _)) => first.rsplit_once('-').map_or(name.to_string(), |(stem, _)| format!("{stem}.gguf")),
        None => name.to_string(),
    };
    papers_beside(&whole).map(|paper| path.with_file_name(paper))
}

/// Where the report of an output lies.
pub fn report_of(path: &Path) -> PathBuf {
    let [report, _] = papers_of(path);
    report
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

/// What the file is called that makes tokens of images, beside a GGUF file of this name.
pub fn projector_beside(name: &str) -> String {
    format!("mmproj-{name}")
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
