//! One whole run: open, plan, compile, reopen, verify, report, move into place.

use std::path::{Path, PathBuf};
use std::time::Instant;

use calibration::samples::windows;
use calibration::statistics::Needs;
use kernels::Backend;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, SideFile, StoredType};
use crate::compile::{compile, needs};
use crate::error::{Error, Result};
use crate::families;
use crate::output::Staging;
use crate::plan::{Fate, Plan};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::{BitsPerWeight, Report, Seconds, TensorReport, Verdict, hash_files, peak_memory};
use crate::text::{ModelText, load_text};
use crate::verify::{Limits, Protocol, Quality, evaluate};

/// What to measure of the output.
#[derive(Clone, Debug)]
pub struct Verification {
    /// A file or a bundled text.
    pub text: String,
    /// Tokens of a window; cut down to what the model can take.
    pub context: usize,
    /// Windows at most.
    pub windows: Option<usize>,
    /// Limits on the result.
    pub limits: Limits,
}

/// One quantization.
pub struct Job<'a> {
    /// The input.
    pub model: &'a Path,
    /// The output directory.
    pub output: &'a Path,
    /// What to do.
    pub recipe: Recipe,
    /// What to measure afterwards.
    pub verification: Option<Verification>,
    /// Replace an existing output.
    pub force: bool,
    /// A second copy of the report.
    pub report: Option<PathBuf>,
}

impl Job<'_> {
    /// Runs it. The output directory appears only if everything up to and including the measurement worked; limits that
    /// are missed are told in the report's verdict, and the output stays.
    pub fn run<B: Backend>(self, backend: &B, progress: &mut Progress) -> Result<Report> {
        let started = Instant::now();
        let Job { model, output, recipe, verification, force, report: report_path } = self;
        let source = Checkpoint::open(model)?;
        if source.entries().iter().any(|e| matches!(e.dtype, StoredType::Quantized { .. })) {
            return Err(Error::usage(format!(
                "{}: is quantized already; quantizing it again would add one error to another (quantc convert makes plain weights of it)",
                model.display()
            )));
        }
        let graph = families::graph_of(&source)?;
        let plan = Plan::new(&graph, &source, &recipe)?;
        let staging = Staging::new(output, Some(model), force)?;

        let mut notes = plan.config.notes.clone();
        if source.entries().iter().any(|e| matches!(e.dtype, StoredType::Ggml(t) if t.block_len > 1)) {
            notes.push(format!(
                "{} is itself quantized: its dequantized weights were taken as the original, and quality is measured against them",
                model.display()
            ));
        }
        let text = match (needs(&recipe) > Needs::Nothing) || verification.is_some() {
            true => Some(ModelText::open(&source)?),
            false => None,
        };
        let samples = match (needs(&recipe) > Needs::Nothing, &text) {
            (true, Some(text)) => {
                let longest = families::longest_context(source.config()).unwrap_or(usize::MAX);
                let seq_len = recipe.seq_len.min(longest);
                if seq_len < recipe.seq_len {
                    notes.push(format!("sequences were cut to the model's {seq_len} positions"));
                }
                let samples = text.select(&load_text(&recipe.calibration)?, recipe.samples, seq_len, recipe.seed)?;
                if samples.source.sequences < recipe.samples {
                    notes.push(format!(
                        "the calibration text gives {} sequences of {seq_len} tokens, {} were asked for",
                        samples.source.sequences, recipe.samples
                    ));
                }
                let width = graph.linears().map(|l| l.cols).max().unwrap_or(0);
                if recipe.method.sweeps() && samples.source.tokens < 2 * width {
                    notes.push(format!(
                        "{} calibration tokens are few for inputs of {width} features; the Hessians lean on their damping",
                        samples.source.tokens
                    ));
                }
                Some(samples)
            }
            _ => None,
        };
        let held_out = match (&verification, &text) {
            (Some(verification), Some(text)) => Some(verification.windows(&source, text)?),
            _ => None,
        };
        // A tokenizer of a large vocabulary is tens of megabytes.
        drop(text);
        let inputs = source.files();
        let hashing = std::thread::spawn(move || hash_files(&inputs));
        let prepare = started.elapsed().as_secs_f64();

        let compiled = compile(backend, &graph, &source, &recipe, &plan, samples.as_ref(), staging.folder(), progress)?;
        write_side_files(&source, &plan, &staging)?;

        let verifying = Instant::now();
        let reopened = Checkpoint::open(staging.folder())?;
        let mut quality = match &held_out {
            Some(windows) => Some(evaluate(backend, &reopened, Some(&source), windows, Protocol::Papers, progress)?),
            None => None,
        };
        if let Some(quality) = &mut quality {
            quality.model = output.display().to_string();
        }
        let verify = verifying.elapsed().as_secs_f64();
        let verdict = match (&quality, &verification) {
            (Some(Quality { beside: Some(beside), .. }), Some(v)) if v.limits.any() => {
                let missed = v.limits.missed(beside);
                Some(Verdict { limits: v.limits, passed: missed.is_empty(), missed })
            }
            _ => None,
        };
        let parameters: u64 = graph.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        let quantized: u64 =
            graph.linears().filter(|l| plan.schemes.contains_key(&l.module)).map(|l| (l.rows * l.cols) as u64).sum();
        let quantized_bytes: u64 = reopened
            .entries()
            .iter()
            .filter(|e| matches!(e.dtype, StoredType::Quantized { .. }))
            .map(|e| e.stored_bytes)
            .sum();
        let outputs = hash_files(&reopened.files())?;
        let inputs = hashing.join().map_err(|_| Error::failed("hashing the input failed"))??;
        let total_bytes = |files: &[crate::report::FileReport]| files.iter().map(|f| f.bytes).sum::<u64>() as f64;
        drop(reopened);
        let report = Report {
            tool: concat!("quantc ", env!("CARGO_PKG_VERSION")).to_owned(),
            device: backend.name(),
            model: model.display().to_string(),
            family: graph.family,
            parameters,
            recipe,
            calibration: samples.map(|s| s.source),
            bpw: BitsPerWeight {
                quantized: quantized_bytes as f64 * 8.0 / quantized as f64,
                file: total_bytes(&outputs) * 8.0 / parameters as f64,
                original_file: total_bytes(&inputs) * 8.0 / parameters as f64,
            },
            inputs,
            outputs,
            quality,
            verdict,
            notes,
            linears: compiled.linears,
            smoothings: compiled.smoothings,
            tensors: plan
                .fates
                .iter()
                .map(|(name, fate)| TensorReport { name: name.clone(), fate: fate.clone() })
                .collect(),
            seconds: Seconds { stages: compiled.seconds, prepare, verify, total: started.elapsed().as_secs_f64() },
            peak_memory_bytes: peak_memory(),
        };
        let json = serde_json::to_vec_pretty(&report).expect("a report is plain data");
        staging.write("report.json", &json)?;
        staging.write("README.md", report.card().as_bytes())?;
        staging.commit()?;
        // After the output is safe: a bad path here must not cost it.
        if let Some(path) = report_path {
            std::fs::write(&path, &json).map_err(Error::io(&path, "write"))?;
        }
        Ok(report)
    }
}

impl Verification {
    fn windows(&self, source: &Checkpoint, text: &ModelText) -> Result<Vec<Vec<u32>>> {
        let context = self.context.min(families::longest_context(source.config()).unwrap_or(usize::MAX));
        let ids = text.evaluation_ids(&load_text(&self.text)?)?;
        Ok(windows(&ids, context, self.windows, None).map_err(crate::text::TextError::from)?)
    }
}

/// config.json, the codec's files, the tokenizer and everything else that belongs to the model.
fn write_side_files(source: &Checkpoint, plan: &Plan, staging: &Staging) -> Result<()> {
    let mut config = source.config().clone();
    if let Value::Object(config) = &mut config {
        config.insert("quantization_config".to_owned(), plan.config.quantization_config.clone());
    }
    debug_assert!(plan.fates.iter().any(|(_, fate)| *fate == Fate::Quantized));
    write_config(&config, staging)?;
    for (name, content) in &plan.config.files {
        staging.write(name, content)?;
    }
    copy_side_files(source, staging)
}

/// Writes config.json.
pub fn write_config(config: &Value, staging: &Staging) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(config).expect("a config is plain data");
    bytes.push(b'\n');
    staging.write("config.json", &bytes)
}

/// Carries tokenizer, templates, code and licences over.
pub fn copy_side_files(source: &Checkpoint, staging: &Staging) -> Result<()> {
    for (name, file) in source.side_files()? {
        match file {
            SideFile::Bytes(bytes) => staging.write(&name, &bytes)?,
            SideFile::Copy(path) => {
                std::fs::copy(&path, staging.folder().join(&name)).map_err(Error::io(&path, "copy"))?;
            }
        }
    }
    Ok(())
}
