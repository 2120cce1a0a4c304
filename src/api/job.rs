//! A run of quantization, as it is asked for: the keys of a recipe, and what stands around them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::keys::keyed;
use super::{Compute, Located, at_least_one, at_most, bring_adapters};
use crate::error::{Error, Result};
use crate::hub::Reads;
use crate::job::{self, Asked, Planned, Verification};
use crate::mixes::Mix;
use crate::output::{self, Place};
use crate::progress::Progress;
use crate::recipe::Request;
use crate::report::Report;
use crate::report::gates::Bounds;
use crate::serving::{Gpu, Runtime};
use crate::targets::{Output, requested, resolved};

/// Tokens of a sequence at the most: a hundred times what any model takes, and so few that bytes of caches can be counted.
const MOST_TOKENS: u64 = 1 << 28;

/// Sequences at a time at the most.
const MOST_SEQUENCES: u64 = 1 << 16;

/// A model that is to be quantized, and all that can be said about that.
///
/// It is made by [`Job::new`] and its public fields, or by serde from the keys of recipes and of `quantc.toml`; a key that is not known is
/// an error. The same request makes the same bytes, whatever the number of threads.
///
/// ```
/// use quantc::Job;
/// let mut job = Job::new("model", "model-w4");
/// job.request.group_size = Some(64);
/// let same: Job = serde_json::from_value(serde_json::json!({
///     "model": "model", "output": "model-w4", "group_size": 64
/// }))?;
/// assert_eq!(job, same);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", default)]
#[non_exhaustive]
pub struct Job {
    /// A Hugging Face directory, a GGUF file, or `org/name[@revision]` of a model on the Hugging Face hub.
    pub model: PathBuf,
    /// Where to write: a directory, or for GGUF a file. `None` where `targets` or `request.target` say it.
    pub output: Option<PathBuf>,
    /// Several outputs from one calibration, each as `FORMAT[:SCHEME[:gN]]=PATH`; the request completes them.
    pub targets: Vec<String>,
    /// What to make of the model. What is not said is taken from `recipe`, or has its default.
    #[serde(flatten)]
    pub request: Request,
    /// A file with such settings.
    pub recipe: Option<PathBuf>,
    /// Held-out text to measure the outputs on, or `none`. A bundled text where it is not said.
    pub verify_text: Option<String>,
    /// Windows of up to 2048 tokens to measure: 8 where it is not said.
    pub verify_windows: Option<usize>,
    /// Limits on the quality. Whether they are kept stands in the report's verdict; an output that misses them is written all the same.
    #[serde(flatten)]
    pub bounds: Bounds,
    /// Calibrate every target by itself, as if it were the only one.
    pub independent: bool,
    /// Replace an existing output.
    pub force: bool,
    /// Begin afresh, though an interrupted run of the same request has finished some blocks.
    pub no_resume: bool,
    /// Wait for another run that is writing to the same place, instead of being refused.
    pub wait: bool,
    /// Where it is computed.
    #[serde(flatten)]
    pub compute: Compute,
}

keyed!(Job);

/// What is asked about serving an output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Serve {
    /// Tokens of each sequence: what the model takes, up to 8192, where it is not said.
    pub context: Option<u64>,
    /// Sequences at the same time: 1 where it is not said.
    pub batch: Option<u64>,
    /// The program that is to serve it: vllm, sglang, llama.cpp, transformers or mlx.
    pub runtime: Option<String>,
    /// The GPUs, by generation, card or compute capability: ampere, l40s, 9.0.
    pub gpu: Option<String>,
    /// Number of GPUs among which the model is divided: 1 where it is not said.
    pub tensor_parallel: Option<usize>,
}

/// What a job stands for once everything in it is found and filled in.
struct Resolved {
    outputs: Vec<Output>,
    lead: usize,
    verification: Option<Verification>,
}

impl Job {
    /// Quantizes `model` to `output`, a directory or a file that ends in `.gguf`.
    pub fn new(model: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Job {
        Job { model: model.into(), output: Some(output.into()), ..Job::default() }
    }

    /// Makes of `model` what a request says, whose `target` tables name places.
    pub fn of(model: impl Into<PathBuf>, request: Request) -> Job {
        Job { model: model.into(), request, ..Job::default() }
    }

    /// Where the outputs go, in the order of the reports of [`run`](Self::run).
    ///
    /// Fails for a request that cannot be met, whatever the model.
    pub fn outputs(&self) -> Result<Vec<PathBuf>> {
        Ok(self.resolve(false)?.outputs.into_iter().map(|output| output.path).collect())
    }

    /// Quantizes, opens what was written again, and measures it beside the original; a report for each output.
    ///
    /// Outputs appear only if everything worked. Limits that are missed are told in a report's `verdict`, and the output stays.
    pub fn run(&self, mut progress: Progress) -> Result<Vec<Report>> {
        let Resolved { mut outputs, lead, verification } = self.resolve(false)?;
        bring_adapters(&mut outputs, &mut progress)?;
        let sketch = Located::of(&self.model, Reads::Headers, &mut progress)?;
        if !sketch.is_whole() {
            // What would be refused is refused before much is downloaded.
            let (independent, force, outputs, verification) =
                (self.independent, self.force, outputs.clone(), verification.clone());
            let model = sketch.path();
            let job = job::Job { model, outputs, lead, independent, verification, force, afresh: true, waits: false };
            let asked = Asked { named: true, ..Asked::default() };
            self.compute.run(
                &mut progress,
                |engine, progress| with_backend!(engine, backend => job.plan(backend, &asked, progress)),
            )?;
        }
        let model = Located::whole(&self.model, &mut progress)?;
        let job = job::Job {
            model: model.path(),
            outputs,
            lead,
            independent: self.independent,
            verification,
            force: self.force,
            afresh: self.no_resume,
            waits: self.wait,
        };
        self.compute.run(&mut progress, |engine, progress| with_backend!(engine, backend => job.run(backend, progress)))
    }

    /// Says what [`run`](Self::run) would do, without doing it: what becomes of every tensor, sizes, memory, time, and whether the outputs
    /// can be served. Reads no weights. An output need not be named.
    ///
    /// Fails where a run would be refused.
    pub fn plan(&self, serve: &Serve, mut progress: Progress) -> Result<Planned> {
        let Serve { context, batch, ref runtime, ref gpu, tensor_parallel } = *serve;
        at_least_one("--tensor-parallel", tensor_parallel.map(|count| count as u64))?;
        at_least_one("--batch", batch)?;
        at_least_one("--context", context)?;
        at_most("--context", context, MOST_TOKENS)?;
        at_most("--batch", batch, MOST_SEQUENCES)?;
        let runtime = runtime.as_deref().map(Runtime::parse).transpose()?;
        let gpu = gpu.as_deref().map(Gpu::parse).transpose()?;
        let named = self.is_named()?;
        let Resolved { mut outputs, lead, verification } = self.resolve(true)?;
        bring_adapters(&mut outputs, &mut progress)?;
        let located = Located::of(&self.model, Reads::Headers, &mut progress)?;
        let model = located.path();
        let (independent, force) = (self.independent, self.force);
        let job = job::Job { model, outputs, lead, independent, verification, force, afresh: true, waits: false };
        let (batch, tensor_parallel) = (batch.unwrap_or(1), tensor_parallel.unwrap_or(1));
        let asked = Asked { context, batch, runtime, gpu, tensor_parallel, named, tries: true };
        self.compute.run(&mut progress, |engine, progress| {
            progress.say_no_more();
            with_backend!(engine, backend => job.plan(backend, &asked, progress))
        })
    }

    /// Removes what interrupted runs have finished of the outputs: of each output how many blocks.
    pub fn discard(&self) -> Result<Vec<(PathBuf, usize)>> {
        let gone = |path: PathBuf| {
            let gone = output::discard(&Place::resolve(&path)?)?;
            Ok((path, gone.iter().map(|left| left.blocks).sum()))
        };
        self.outputs()?.into_iter().map(gone).collect()
    }

    /// Whether a place is named for the outputs.
    fn is_named(&self) -> Result<bool> {
        let tables = !self.request.target.is_empty() || !self.file()?.target.is_empty();
        Ok(self.output.is_some() || !self.targets.is_empty() || tables)
    }

    fn file(&self) -> Result<Request> {
        Ok(self.recipe.as_deref().map(Request::read).transpose()?.unwrap_or_default())
    }

    /// Finds the model, the outputs and what is to be measured. With `nameless` an output that has no place is called by its format.
    fn resolve(&self, nameless: bool) -> Result<Resolved> {
        at_least_one("--verify-windows", self.verify_windows.map(|windows| windows as u64))?;
        let request = self.request.clone().or(self.file()?);
        let mut output = self.output.clone();
        if nameless && output.is_none() && self.targets.is_empty() && request.target.is_empty() {
            output = Some(self::nameless(&request));
        }
        let asked = requested(request, output, &self.targets)?;
        let limits = self.bounds.limits(&Path::to_path_buf)?;
        let (text, windows) = (self.verify_text.as_deref(), self.verify_windows);
        let verification = Verification::asked(text, windows, limits, "--verify-text none")?;
        let (mut outputs, lead) = resolved(asked, self.recipe.as_deref())?;
        if verification.is_none() && self.verify_windows.is_some() {
            let note = "verify_windows has no effect: nothing is measured, as --verify-text none says";
            outputs.iter_mut().for_each(|output| output.recipe.notes.push(note.to_owned()));
        }
        if self.model.as_os_str().is_empty() {
            return Err(Error::usage("no model is named"));
        }
        Ok(Resolved { outputs, lead, verification })
    }
}

/// What an output without a place is called: as a file where a file would be written.
fn nameless(request: &Request) -> PathBuf {
    let gguf = request.format.as_deref().is_some_and(|format| format.eq_ignore_ascii_case("gguf"));
    let mix = request.format.is_none() && request.scheme.as_deref().is_some_and(|name| Mix::parse(name).is_some());
    PathBuf::from(if gguf || mix { "model.gguf" } else { "model" })
}
