//! The built-in model: a small Llama that shows, in seconds and without a download, what quantization does.

use std::path::Path;
use std::time::Instant;

use kernels::Backend;

use crate::error::{Error, Result};
use crate::job::{Job, Verification};
use crate::output::Staging;
use crate::progress::Progress;
use crate::recipe::{Recipe, Request};
use crate::report::{Limits, Report};
use crate::text::HELD_OUT_TEXT;

/// The files of the built-in model; see `src/demo/README.md` for how it was made and of what text.
const FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("demo/model/config.json")),
    ("generation_config.json", include_bytes!("demo/model/generation_config.json")),
    ("model.safetensors", include_bytes!("demo/model/model.safetensors")),
    ("tokenizer.json", include_bytes!("demo/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("demo/model/tokenizer_config.json")),
];

const CALIBRATION: &str = include_str!("demo/calibration.txt");

/// Writes the built-in model to `folder`, which must not exist yet or be empty; it appears there whole.
pub fn export(folder: &Path) -> Result<()> {
    let staging = Staging::folder_for(folder, None, false, None)?;
    FILES.iter().try_for_each(|(name, content)| staging.write(name, content))?;
    staging.commit().map(drop)
}

/// Quantizes the built-in model with every method at 4 and 3 bits; returns a table.
pub fn run<B: Backend>(backend: &B, progress: &mut Progress) -> Result<String> {
    progress.say_no_more();
    let room = tempfile::tempdir().map_err(|e| Error::failed(format!("no room for temporary files: {e}")))?;
    let model = room.path().join("model");
    export(&model)?;
    let write = |name: &str, content: &str| {
        let path = room.path().join(name);
        std::fs::write(&path, content).map_err(Error::io(&path, "write"))?;
        Ok::<String, Error>(path.display().to_string())
    };
    let (calibration, evaluation) = (write("calibration.txt", CALIBRATION)?, write("evaluation.txt", HELD_OUT_TEXT)?);
    let started = Instant::now();
    let mut rows: Vec<(String, Report)> = Vec::new();
    for bits in [4, 3] {
        for method in ["rtn", "awq", "gptq"] {
            let request = Request {
                bits: Some(bits),
                group_size: Some(64),
                method: Some(method.to_owned()),
                calibration: Some(calibration.clone()),
                samples: Some(24),
                seq_len: Some(512),
                ..Request::default()
            };
            let output = room.path().join(format!("{method}-{bits}"));
            let verification =
                Verification { text: evaluation.clone(), context: 512, windows: Some(16), limits: Limits::default() };
            let job = Job::one(&model, &output, Recipe::resolve(request)?, Some(verification), false);
            rows.push((format!("{} {bits}-bit", method.to_uppercase()), job.run_one(backend, progress)?));
        }
    }
    Ok(table(&rows, &backend.name(), started.elapsed().as_secs_f64()))
}

fn table(rows: &[(String, Report)], device: &str, seconds: f64) -> String {
    let first = &rows[0].1;
    let mut text = format!(
        "The built-in Llama ({:.1} million parameters), groups of 64, on {device}, {seconds:.1} s in all.\n\
         Measured on the files written, on held-out text; KL is the divergence from the original, top-1 how often both\n\
         would say the same token.\n\n",
        first.parameters as f64 / 1e6
    );
    text += &format!(
        "{:<12} {:>5} {:>10} {:>17} {:>18} {:>8} {:>8}\n",
        "", "bpw", "file MB", "perplexity", "KL, mean", "top-1", "seconds"
    );
    let megabytes = |files: &[crate::report::FileReport]| files.iter().map(|f| f.bytes).sum::<u64>() as f64 / 1e6;
    if let Some(beside) = first.quality.as_ref().and_then(|q| q.beside.as_ref()) {
        text += &format!(
            "{:<12} {:>5.2} {:>10.2} {:>17} {:>18} {:>8} {:>8}\n",
            "original",
            first.bpw.original_file,
            megabytes(&first.inputs),
            format!("{:.2}", beside.reference_perplexity),
            "0",
            "100 %",
            ""
        );
    }
    for (name, report) in rows {
        let Some((quality, beside)) = report.quality.as_ref().and_then(|q| Some((q, q.beside.as_ref()?))) else {
            continue;
        };
        text += &format!(
            "{name:<12} {:>5.2} {:>10.2} {:>17} {:>18} {:>8} {:>8.1}\n",
            report.bpw.quantized,
            megabytes(&report.outputs),
            format!("{:.2} ± {:.2}", quality.perplexity, quality.perplexity * beside.perplexity_ratio_stderr),
            format!("{:.4} ± {:.4}", beside.kld_mean, beside.kld_stderr),
            format!("{:.1} %", 100.0 * beside.top1_agreement),
            report.seconds.total - report.seconds.verify
        );
    }
    text + "\nbpw: bits per weight of the quantized layers (for the original, of the file). The embedding stays in bf16.\n"
}
