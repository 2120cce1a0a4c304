//! What was done, to what, how well: `report.json` for machines, the model card for people.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use calibration::samples::SampleSource;
use formats::Follower;
use formats::container::file;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::adapter::AdapterReport;
use crate::error::{Error, Result};
use crate::forward::Activations;
use crate::pipeline::{LinearReport, SmoothingReport, Stages};
use crate::plan::Fate;
use crate::recipe::Recipe;
use crate::verify::{HiddenStates, Limits, Quality};
use crate::words::{called, one_line};

/// A file and what is in it.
#[derive(Clone, Debug, Serialize)]
pub struct FileReport {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, lower-case hex.
    pub sha256: String,
}

/// What becomes of a tensor of the input.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Quantized, copied, tied, or dropped and why.
    pub fate: Fate,
    /// Its type in a GGUF file.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub ty: Option<&'static str>,
}

/// Bits per weight.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BitsPerWeight {
    /// Of the quantized linears alone, scales and zeros included.
    pub quantized: f64,
    /// Of the whole file, embeddings and norms included.
    pub file: f64,
    /// Of the whole file of the original.
    pub original_file: f64,
}

/// Whether the limits were kept.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// What was asked for.
    pub limits: Limits,
    /// Whether all were kept.
    pub passed: bool,
    /// What was missed.
    pub missed: Vec<String>,
}

/// Everything about one run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name and version of the program.
    pub tool: String,
    /// The device it ran on.
    pub device: String,
    /// The input.
    pub model: String,
    /// What it calls itself.
    pub name: String,
    /// The LoRA adapter that it was merged with; quality is measured against the merged model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterReport>,
    /// Its family.
    pub family: &'static str,
    /// Parameters in its tensors.
    pub parameters: u64,
    /// Its weight files.
    pub inputs: Vec<FileReport>,
    /// What was asked for and had an effect, defaults filled in; the scheme of a GGUF file is its mix.
    #[serde(serialize_with = "with_mix")]
    pub recipe: Recipe,
    /// The calibration text, if one was used.
    pub calibration: Option<SampleSource>,
    /// The weight files that were written.
    pub outputs: Vec<FileReport>,
    /// Size.
    pub bpw: BitsPerWeight,
    /// Against the original, on held-out text.
    pub quality: Option<Quality>,
    /// Of a model without an output projection, against the original, on held-out text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_states: Option<HiddenStates>,
    /// Limits on the quality.
    pub verdict: Option<Verdict>,
    /// Limits on who can load the output, and other things worth knowing.
    pub notes: Vec<String>,
    /// What a run that was interrupted had left at the output's place, and what became of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interrupted: Vec<String>,
    /// Every quantized linear.
    pub linears: Vec<LinearReport>,
    /// Every folded channel scale.
    pub smoothings: Vec<SmoothingReport>,
    /// Every input tensor.
    pub tensors: Vec<TensorReport>,
    /// Where the time went.
    pub seconds: Seconds,
    /// What was expected to be in memory at the most, mapped files apart; null where the device's memory is not the host's.
    pub expected_memory_bytes: Option<u64>,
    /// Largest resident set of the process, mapped files included.
    pub peak_memory_bytes: Option<u64>,
}

/// A recipe that says what was done: without what had no effect, and with the mix in place of a width and a group, of which it has no
/// single ones.
fn with_mix<S: serde::Serializer>(recipe: &Recipe, serializer: S) -> Result<S::Ok, S::Error> {
    let mut value = serde_json::to_value(recipe).map_err(serde::ser::Error::custom)?;
    if let Some(gguf) = &recipe.gguf {
        value["scheme"] = gguf.mix.into();
    }
    for key in &recipe.idle {
        // The key of what only a GGUF file has may be among them.
        for place in ["", "/gguf"] {
            if let Some(place) = value.pointer_mut(place).and_then(serde_json::Value::as_object_mut) {
                place.shift_remove(*key);
            }
        }
    }
    value.serialize(serializer)
}

/// Where the time went.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Seconds {
    /// By stage of the compilation.
    #[serde(flatten)]
    pub stages: Stages,
    /// Tokenizing and hashing.
    pub prepare: f64,
    /// Reopening and evaluating.
    pub verify: f64,
    /// From start to end.
    pub total: f64,
}

/// Files that are hashed beside other work.
pub type Hashing = JoinHandle<Result<Vec<FileReport>>>;

/// Hashes files on threads of their own, up to a quarter of the cores.
pub fn hash_beside(paths: Vec<PathBuf>) -> Hashing {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    hash_on((cores / 4).max(1), paths)
}

fn hash_on(threads: usize, paths: Vec<PathBuf>) -> Hashing {
    std::thread::spawn(move || {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(path) = paths.get(index) else { return done };
                done.push((index, hash_file(path)));
            }
        };
        let mut done: Vec<(usize, Result<FileReport>)> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads.min(paths.len())).map(|_| scope.spawn(work)).collect();
            workers.into_iter().flat_map(|worker| worker.join().expect("hashing does not panic")).collect()
        });
        done.sort_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, file)| file).collect()
    })
}

/// Hashes files as they are written, each on a thread of its own: none waits for another to be complete.
pub fn hash_written(files: Vec<Follower>) -> Hashing {
    hash_each(files.into_iter().map(|file| (file.path().to_owned(), file)).collect())
}

fn hash_each<R: Read + Send + 'static>(files: Vec<(PathBuf, R)>) -> Hashing {
    let begin = |(path, mut file): (PathBuf, R)| std::thread::spawn(move || hash(&path, &mut file));
    let workers: Vec<JoinHandle<Result<FileReport>>> = files.into_iter().map(begin).collect();
    let end = |worker: JoinHandle<_>| worker.join().map_err(|_| Error::failed("hashing failed"))?;
    std::thread::spawn(move || workers.into_iter().map(end).collect())
}

/// Waits, on a thread of its own, until what is being hashed is on the disk as well, which `finish` sees to.
pub fn flushed(finish: impl FnOnce() -> formats::Result<()> + Send + 'static, hashing: Hashing) -> Hashing {
    std::thread::spawn(move || {
        finish()?;
        hashed(hashing)
    })
}

/// Waits for what is being hashed.
pub fn hashed(hashing: Hashing) -> Result<Vec<FileReport>> {
    hashing.join().map_err(|_| Error::failed("hashing failed"))?
}

/// Hashes a file without keeping it in memory.
pub fn hash_file(path: &Path) -> Result<FileReport> {
    let mut file = file::open(path).map_err(Error::io(path, "open"))?;
    let length = file.metadata().map_err(Error::io(path, "open"))?.len();
    let report = hash(path, &mut file)?;
    if report.bytes != length {
        return Err(Error::failed(format!(
            "{}: {} of its {length} bytes could be read; its disk failed, or it was written to",
            path.display(),
            report.bytes
        )));
    }
    Ok(report)
}

fn hash(path: &Path, file: &mut impl Read) -> Result<FileReport> {
    let mut hash = Sha256::new();
    // Small enough to be hashed out of the nearest caches.
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer).map_err(Error::io(path, "read"))?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        bytes += read as u64;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(FileReport { name, bytes, sha256: hash.finalize().iter().map(|b| format!("{b:02x}")).collect() })
}

/// The largest resident set of this process so far, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

impl Report {
    /// A note without the places of the run's files, which differ between machines.
    fn without_places(&self, note: &str) -> String {
        let mut note = note.to_owned();
        let model = self.model.trim_end_matches(std::path::MAIN_SEPARATOR);
        if !model.is_empty() {
            note = note.replace(&format!("{model}{}", std::path::MAIN_SEPARATOR), "").replace(model, "the model");
        }
        let imatrix = self.recipe.gguf.iter().filter_map(|gguf| gguf.imatrix.as_ref());
        let others = imatrix.chain(self.recipe.adapter.as_ref()).map(|path| path.display().to_string());
        for path in others.chain([self.recipe.calibration.clone()]) {
            note = note.replace(&path, called(&path));
        }
        note
    }

    /// The model card. Depends on nothing that changes between equal runs.
    pub fn card(&self) -> String {
        let Recipe { format, scheme, method, .. } = &self.recipe;
        let group = scheme.group.map_or("one scale per row".to_owned(), |g| format!("groups of {g}"));
        let name = one_line(&self.name);
        let mut card = format!(
            "# {name}, {} ({})\n\nQuantized with {} to the {format} layout: {}, {group}, method {}.\n\n",
            scheme.name(),
            method.name(),
            self.tool,
            scheme.name(),
            method.name()
        );
        card += &format!(
            "- size: {:.2} bits per weight of the file ({:.2} of the quantized linears), original {:.2}\n",
            self.bpw.file, self.bpw.quantized, self.bpw.original_file
        );
        if let Some(AdapterReport { path, kind, sha256, modules, replaced }) = &self.adapter {
            let name = one_line(called(path));
            card += &format!(
                "- merged with the {kind} adapter {name} (sha256 {sha256}): {modules} modules, {replaced} tensors replaced\n"
            );
        }
        match &self.calibration {
            Some(c) => {
                card += &format!(
                    "- calibrated on {} sequences of {} tokens of `{}` (seed {}; token ids sha256 {})\n",
                    c.sequences,
                    c.seq_len,
                    one_line(called(&c.name)),
                    c.seed,
                    c.tokens_sha256
                );
            }
            None => card += "- no calibration data was used\n",
        }
        let fallbacks = self.linears.iter().filter(|l| l.fallback.is_some()).count();
        card += &format!("- {} linears quantized, {fallbacks} with a fallback\n", self.linears.len());
        if let Some(quality) = &self.quality {
            card += "\n## Quality, measured on the files in this directory\n\n";
            card += &quality_table(quality);
        }
        for note in &self.notes {
            card += &format!("\n> {}\n", one_line(&self.without_places(note)));
        }
        card += "\nDetails of every tensor: report.json.\n";
        card
    }
}

/// A markdown table of one evaluation.
pub fn quality_table(quality: &Quality) -> String {
    let protocol = match quality.protocol {
        crate::verify::Protocol::Papers => "papers",
        crate::verify::Protocol::LlamaCpp => "llama.cpp",
    };
    let rounded = match quality.activations {
        Activations::Exact => "",
        Activations::Runtime => ", activations rounded as llama.cpp does",
    };
    let Quality { tokens, context, .. } = quality;
    let mut table = format!("| {tokens} tokens, context {context}, protocol {protocol}{rounded} | |\n|---|---|\n");
    let mut row = |what: &str, value: String| table += &format!("| {what} | {value} |\n");
    row("perplexity", format!("{:.4} ± {:.4}", quality.perplexity, quality.perplexity_stderr));
    if let Some(b) = &quality.beside {
        row("perplexity of the original", format!("{:.4}", b.reference_perplexity));
        row("ratio", format!("{:.5} ± {:.5}", b.perplexity_ratio, b.perplexity_ratio_stderr));
        row("KL divergence, mean", format!("{:.5} ± {:.5}", b.kld_mean, b.kld_stderr));
        row(
            "KL divergence, median / 99 % / largest",
            format!("{:.5} / {:.4} / {:.3}", b.kld_median, b.kld_p99, b.kld_max),
        );
        row("same top token", format!("{:.2} %", 100.0 * b.top1_agreement));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first of two files is complete only when the second is hashed, as one whose first tensor comes last.
    #[test]
    fn no_file_waits_for_another_to_be_written() {
        struct Last(Option<std::sync::mpsc::Receiver<()>>);
        impl Read for Last {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                let gone = self.0.take().map(|gone| gone.recv_timeout(std::time::Duration::from_secs(20)));
                match gone {
                    Some(Err(std::sync::mpsc::RecvTimeoutError::Timeout)) => Err(std::io::Error::other("nobody came")),
                    _ => Ok(0),
                }
            }
        }
        struct First(#[expect(dead_code, reason = "what it takes with it is what counts")] std::sync::mpsc::Sender<()>);
        impl Read for First {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                Ok(0)
            }
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        let (last, first): (Box<dyn Read + Send>, Box<dyn Read + Send>) =
            (Box::new(Last(Some(receiver))), Box::new(First(sender)));
        let files =
            hashed(hash_each(vec![(PathBuf::from("a/last"), last), (PathBuf::from("a/first"), first)])).unwrap();
        assert_eq!(files.iter().map(|file| &file.name[..]).collect::<Vec<_>>(), ["last", "first"]);
    }

    #[test]
    fn files_are_hashed_in_order_whoever_does_it() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..7).map(|i| dir.path().join(format!("{i}"))).collect();
        for (path, byte) in paths.iter().zip(b"abcdefg") {
            std::fs::write(path, vec![*byte; 1 << (byte - b'a')]).unwrap();
        }
        let expected = hashed(hash_on(1, paths.clone())).unwrap();
        // printf a | sha256sum
        assert_eq!(expected[0].sha256, "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb");
        let found = hashed(hash_on(3, paths.clone())).unwrap();
        let told = |all: &[FileReport]| format!("{all:?}");
        assert!(told(&found) == told(&expected) && found.len() == 7);
        assert!(hashed(hash_on(3, Vec::new())).unwrap().is_empty());
        let lost = [paths, vec![dir.path().join("lost")]].concat();
        assert!(hashed(hash_on(3, lost)).unwrap_err().to_string().contains("lost: cannot open"));
    }
}
