//! One whole run: open, plan, compile, reopen, verify, report, move into place.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use calibration::samples::{Document, SampleSource, Samples, Text, needed, windows};
use calibration::statistics::Needs;
use formats::container::file;
use kernels::Backend;
use serde_json::Value;

use crate::checkpoint::{Beside, Checkpoint, ORIGINAL_CARD, SideFile, front_matter};
use crate::compile::{Compiled, compile, needs};
use crate::error::{Error, Result};
use crate::evidence;
use crate::families;
use crate::gguf::{self, GgufPlan};
use crate::graph::{Graph, Linear};
use crate::json;
use crate::memory::{self, Device, Expected, Free, Tokens, Work, peak_memory};
use crate::output::hashing::{Hashing, hash_beside, hashed};
use crate::output::{Place, SideOutput, Staging, bytes_of, check_beside, check_place};
use crate::plan::Plan;
use crate::probe;
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::{
    Activations, BitsPerWeight, Fate, FileReport, HiddenStates, Limits, LinearReport, Protocol, Quality, Report,
    Seconds, SmoothingReport, Stages, TensorReport, Verdict,
};
use crate::text::{ModelText, load_text};
use crate::verify::{compare_hidden, evaluate};
use crate::weights::StoredType;

/// Tokens of the held-out text, if it has so many, on which a tokenizer that was written is compared with the original's.
const COMPARED: usize = 1 << 16;

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

/// What every run has before its work begins.
struct Run {
    started: Instant,
    source: Checkpoint,
    graph: Graph,
    notes: Vec<String>,
    samples: Option<Samples>,
    held_out: Option<HeldOut>,
    hashing: Hashing,
    /// Bytes of the host's memory.
    expected: Option<u64>,
    prepare: f64,
}

/// The held-out text in the original's tokens, as far as it is looked at.
struct HeldOut {
    ids: Vec<u32>,
    /// How many ids were asked for; the text has no more where there are fewer.
    asked: usize,
    windows: Vec<Vec<u32>>,
}

/// What every run has when its work is done.
struct Outcome {
    interrupted: Vec<String>,
    quality: Option<Quality>,
    hidden_states: Option<HiddenStates>,
    outputs: Vec<FileReport>,
    linears: Vec<LinearReport>,
    smoothings: Vec<SmoothingReport>,
    tensors: Vec<TensorReport>,
    /// Other tensors that lose values, with the share of these.
    lost: Vec<(String, f64)>,
    /// Keys of the recipe that turned out to have no effect.
    idle: Vec<&'static str>,
    /// Weights in quantized linears, and the bytes they take.
    quantized: [u64; 2],
    stages: Stages,
    verify: f64,
}

/// Whether the written tokenizer makes the ids of the text once its characters are composed (NFC), which original tokenizers do by
/// themselves and llama.cpp does not; a note says so.
fn composed_alone(own: &ModelText, mut text: Text, held_out: &HeldOut, notes: &mut Vec<String>) -> Result<bool> {
    let Some(plain) = text.plain() else { return Ok(false) };
    let mut composed = tokenizers::NormalizedString::from(&*plain);
    let composed = composed.nfc().get().to_owned();
    let differs = composed != plain;
    text.documents = vec![Document::Plain(composed)];
    let alone = differs && own.first_ids(&text, held_out.asked)? == held_out.ids;
    if alone {
        notes.push(
            "the held-out text has characters that are put together of several (as e and an accent): the original's tokenizer \
             composes them first (NFC), as was done for measuring, and llama.cpp does not"
                .to_owned(),
        );
    }
    Ok(alone)
}

/// What to do about a GGUF file whose tokenizer gives other ids than the original's.
fn other_ids(byte_level: bool) -> &'static str {
    match byte_level {
        true => "choose another --pre",
        false => {
            "llama.cpp joins the pieces of SentencePiece by their scores, which a unigram model or one with rules for \
             characters was not made for; choose another --format"
        }
    }
}

impl Job<'_> {
    /// Runs it. The output appears only if everything up to and including the measurement worked; limits that are missed
    /// are told in the report's verdict, and the output stays.
    pub fn run<B: Backend>(self, backend: &B, progress: &mut Progress) -> Result<Report> {
        let (output, single) = (self.output, self.recipe.gguf.is_some());
        self.work(backend, progress).map_err(|error| error.of_output(output, single))
    }

    fn work<B: Backend>(self, backend: &B, progress: &mut Progress) -> Result<Report> {
        let started = Instant::now();
        let adapter = self.recipe.adapter.as_deref();
        if let Some(adapter) = adapter {
            check_place(self.output, adapter)?;
        }
        // A file that is read may not be replaced, nor a folder that it lies in.
        let texts = self.inputs();
        texts.iter().filter(|input| input.is_file()).try_for_each(|input| check_place(self.output, input))?;
        if let Some(path) = &self.report {
            check_beside("--report", path, &self.inputs(), self.output)?;
            let saved = self.recipe.gguf.as_ref().and_then(|gguf| gguf.save_imatrix.as_deref());
            if saved.is_some_and(|saved| Place::resolve(saved).ok() == Place::resolve(path).ok()) {
                return Err(Error::usage(format!(
                    "--report {}: is what --save-imatrix names too; choose another place",
                    path.display()
                )));
            }
        }
        let source = Checkpoint::open_with(self.model, adapter)?;
        let graph = families::graph_of(&source)?;
        if graph.head.missing && self.verification.as_ref().is_some_and(|v| v.limits.any()) {
            return Err(Error::usage(format!(
                "{}: the model has no output projection, as its architectures say: drop the limits on what it would predict",
                self.model.display()
            )));
        }
        let hashing = hash_beside(source.files());
        match self.recipe.gguf {
            Some(_) => self.gguf_file(backend, progress, started, source, graph, hashing),
            None => self.directory(backend, progress, started, source, graph, hashing),
        }
    }

    /// Every file and folder that is read. Names of bundled texts are among them and exist as no file.
    fn inputs(&self) -> Vec<&Path> {
        let Recipe { adapter, calibration, gguf, .. } = &self.recipe;
        let texts = self.verification.iter().map(|verification| Path::new(&verification.text));
        let imatrix = gguf.iter().filter_map(|gguf| gguf.imatrix.as_deref());
        let optional = [adapter.as_deref(), self.recipe.file.as_deref()];
        let known = [self.model, Path::new(calibration)];
        known.into_iter().chain(optional.into_iter().flatten()).chain(texts).chain(imatrix).collect()
    }

    fn directory<B: Backend>(
        self,
        backend: &B,
        progress: &mut Progress,
        started: Instant,
        source: Checkpoint,
        graph: Graph,
        hashing: Hashing,
    ) -> Result<Report> {
        let plan = Plan::new(&graph, &source, &self.recipe)?;
        let staging = Staging::folder_for(self.output, Some(self.model), self.force)?;
        let mut own = vec!["config.json", "report.json", "README.md"];
        own.extend(plan.config.files.iter().map(|(name, _)| &name[..]));
        let beside = source.beside(&own)?;
        staging.check_space(bytes_of(&plan.outputs) + beside.bytes())?;
        let mut run =
            self.prepare((Device::of(backend), progress), started, source, graph, needs(&self.recipe), hashing)?;
        run.notes.splice(0..0, plan.config.notes.iter().cloned());
        run.notes.extend(beside.notes.iter().cloned());
        let Run { source, graph, samples, .. } = &run;
        let Compiled { done, flushing } =
            compile(backend, graph, source, &self.recipe, &plan, samples.as_ref(), staging.folder(), progress)?;
        write_side_files(source, &beside, &plan, &staging)?;

        let verifying = Instant::now();
        let reopened = Checkpoint::open_strictly(staging.folder())?;
        let (quality, hidden_states) = self.measure(backend, &run, &reopened, progress)?;
        let quantized_bytes = reopened.entries().iter().filter(|e| matches!(e.dtype, StoredType::Quantized { .. }));
        let outcome = Outcome {
            interrupted: staging.notes().to_vec(),
            quality,
            hidden_states,
            verify: verifying.elapsed().as_secs_f64(),
            quantized: [
                graph
                    .linears()
                    .filter(|l| plan.schemes.contains_key(&l.module))
                    .map(|l| (l.rows * l.cols) as u64)
                    .sum(),
                quantized_bytes.map(|e| e.stored_bytes).sum(),
            ],
            outputs: hashed(flushing)?,
            linears: done.linears,
            smoothings: done.smoothings,
            tensors: plan
                .fates
                .iter()
                .map(|(name, fate)| TensorReport { name: name.clone(), fate: fate.clone(), ty: None })
                .collect(),
            lost: done.lost,
            idle: Vec::new(),
            stages: done.seconds,
        };
        drop(reopened);
        let report_path = self.report.clone();
        let mut report = self.report(backend, run, outcome)?;
        let json = serde_json::to_vec_pretty(&report).expect("a report is plain data");
        staging.write("report.json", &json)?;
        let card = card_licence(&beside).unwrap_or_default() + &report.card();
        staging.write("README.md", card.as_bytes())?;
        let copy = report_path.map(|path| SideOutput::write(&path, &json)).transpose()?;
        report.notes.extend(staging.commit()?);
        copy.map_or(Ok(()), SideOutput::appear)?;
        Ok(report)
    }

    fn gguf_file<B: Backend>(
        self,
        backend: &B,
        progress: &mut Progress,
        started: Instant,
        source: Checkpoint,
        graph: Graph,
        hashing: Hashing,
    ) -> Result<Report> {
        let plan = GgufPlan::new(&graph, &source, &self.recipe)?;
        let staging = Staging::gguf(self.output, Some(self.model), self.force)?;
        staging.check_space(plan.bytes())?;
        if let Some(path) = self.recipe.gguf.as_ref().and_then(|gguf| gguf.save_imatrix.as_deref()) {
            staging.check_another(path, Some(self.model), self.force)?;
        }
        let mut run =
            self.prepare((Device::of(backend), progress), started, source, graph, gguf::needs(&self.recipe), hashing)?;
        // What there is to say of the tokenizer, reading its files for the texts said too.
        run.notes.extend(plan.notices.iter().filter(|note| !run.notes.contains(note)).cloned().collect::<Vec<_>>());
        let Run { source, graph, samples, .. } = &run;
        let compiled = gguf::compile(
            backend,
            graph,
            source,
            &self.recipe,
            &plan,
            samples.as_ref(),
            &staging.folder().join(staging.name()),
            progress,
        )?;

        let verifying = Instant::now();
        let reopened = Checkpoint::open(&compiled.files[0])?;
        let byte_level = reopened.gguf().is_some_and(|file| file.metadata("tokenizer.ggml.merges").is_some());
        let found = match (source.tokenizer(), reopened.tokenizer()) {
            (Ok(Some(original)), Ok(Some(written))) => {
                let mut found = probe::differences(&original, &written, graph.vocabulary)?;
                // With a text to measure on, other ids are an error.
                let named = self.recipe.gguf.as_ref().is_some_and(|gguf| gguf.pre.is_some());
                if self.verification.is_none() && !probe::agree(&original, &written, named)? {
                    found.push(format!(
                        "the tokenizer that was written turns a sample text into other tokens than the original's; {}",
                        other_ids(byte_level)
                    ));
                }
                found
            }
            (Ok(Some(_)), Err(error)) => {
                vec![format!("the tokenizer that was written cannot be read back, and was not compared: {error}")]
            }
            _ => Vec::new(),
        };
        run.notes.extend(found);
        let (quality, hidden_states) = self.measure(backend, &run, &reopened, progress)?;
        if let (Some(verification), Some(held_out)) = (&self.verification, &run.held_out)
            && let Ok(own) = ModelText::open(&reopened)
            && own.first_ids(&load_text(&verification.text)?, held_out.asked)? != held_out.ids
            && !composed_alone(&own, load_text(&verification.text)?, held_out, &mut run.notes)?
        {
            let or = if byte_level { "" } else { ", or write it all the same with --verify-text none" };
            return Err(Error::failed(format!(
                "{}: the tokenizer that was written turns the held-out text into other tokens than the original's; {}{or}",
                self.output.display(),
                other_ids(byte_level)
            )));
        }
        let outcome = Outcome {
            interrupted: staging.notes().to_vec(),
            quality,
            hidden_states,
            verify: verifying.elapsed().as_secs_f64(),
            quantized: compiled.quantized,
            outputs: hashed(compiled.flushing)?,
            linears: compiled.linears,
            smoothings: Vec::new(),
            tensors: compiled.tensors,
            lost: compiled.lost,
            idle: plan.idle,
            stages: compiled.seconds,
        };
        drop(reopened);
        let report_path = self.report.clone();
        let mut report = self.report(backend, run, outcome)?;
        let json = serde_json::to_vec_pretty(&report).expect("a report is plain data");
        staging.write(&format!("{}.report.json", staging.name()), &json)?;
        let copy = report_path.map(|path| SideOutput::write(&path, &json)).transpose()?;
        report.notes.extend(staging.commit()?);
        copy.map_or(Ok(()), SideOutput::appear)?;
        Ok(report)
    }

    /// Reads the texts.
    fn prepare(
        &self,
        (device, progress): (Device, &Progress),
        started: Instant,
        source: Checkpoint,
        graph: Graph,
        needs: Needs,
        hashing: Hashing,
    ) -> Result<Run> {
        let mut notes = source.notices();
        let recipe = &self.recipe;
        let tokens = if needs > Needs::Nothing { recipe.samples.saturating_mul(recipe.seq_len) } else { 0 };
        check_room(
            device.room,
            &graph,
            [recipe.method.sweeps(), self.verification.is_some()],
            tokens.min(device.at_once.max(recipe.seq_len)),
        )?;
        if needs > Needs::Nothing || self.verification.is_some() {
            families::check_runnable(&graph, &source)?;
        }
        if graph.opaque {
            let bytes = |module: &str| source.entry(&format!("{module}.weight")).map_or(0, |entry| entry.stored_bytes);
            let found: u64 = graph.linears().map(|linear| bytes(&linear.module)).sum();
            let all: u64 = source.entries().iter().map(|entry| entry.stored_bytes).sum();
            notes.push(format!(
                "the model's type is not known: {} linears were found by name and shape, {:.0} % of its bytes, and nothing could be measured",
                graph.linears().count(),
                100.0 * found as f64 / all.max(1) as f64
            ));
        }
        notes.extend(families::cannot_run(&graph));
        if !graph.aside.is_empty() && !graph.opaque {
            let names: Vec<&str> = graph.aside.iter().map(|(prefix, _)| prefix.trim_end_matches('.')).collect();
            let done = if recipe.gguf.is_some() { "left out" } else { "copied as they are" };
            notes.push(format!("not part of the language model, and {done}: {}", names.join(", ")));
        }
        let tokenizer = source.tokenizer();
        notes.extend(source.notes_on(&tokenizer));
        let text = match needs > Needs::Nothing || self.verification.is_some() {
            true => Some(ModelText::of(&source, tokenizer?)?),
            false => None,
        };
        notes.extend(recipe.notes.iter().cloned());
        if recipe.moe_all_experts && !graph.has_experts() && needs > Needs::Nothing {
            notes.push("moe_all_experts has no effect: the model is no mixture of experts".to_owned());
        }
        // A GPU puts aside in the host's memory what does not fit into its own, and looks after that itself.
        let (host, work) = (device.room.is_none(), Work::of(recipe, needs));
        let free = if host { Free::now() } else { None };
        let expect = |tokens| Expected::calibration(&graph, device, work, tokens, free.clone());
        let samples = match (needs > Needs::Nothing, &text) {
            (true, Some(text)) => {
                let longest = families::longest_context(source.config())?.unwrap_or(usize::MAX);
                let seq_len = recipe.seq_len.min(longest);
                if seq_len < recipe.seq_len {
                    notes.push(format!("sequences were cut to the model's {seq_len} positions"));
                }
                let calibration = load_text(&recipe.calibration)?;
                // Tokenizing much takes long: what cannot be had is told before.
                expect(Some(memory::at_least(Tokens::of(recipe.samples, seq_len), calibration.bytes())))?;
                let samples = text.select(&calibration, recipe.samples, seq_len, recipe.seed)?;
                notes.extend(calibration.without_blank());
                notes.extend(calibration.notes);
                notes.extend(weak_conversations(&samples.source, text.without_default()));
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
        let held_out = match (&self.verification, &text) {
            (Some(verification), Some(text)) => {
                let least = if recipe.gguf.is_some() { COMPARED } else { 0 };
                Some(verification.read(&source, text, least, &mut notes)?)
            }
            _ => None,
        };
        // A tokenizer of a large vocabulary is tens of megabytes.
        drop(text);
        let mut what = Vec::new();
        let tokens = samples.as_ref().map(|samples| {
            let SampleSource { sequences, seq_len, .. } = samples.source;
            what.push(format!("calibrating on {sequences} sequences of {seq_len} tokens"));
            Tokens::of(sequences, seq_len)
        });
        let mut expected = expect(tokens)?;
        if let Some(HeldOut { windows, .. }) = &held_out {
            let length = windows.first().map_or(0, Vec::len);
            what.push(format!("measuring {} windows of {length}", windows.len()));
            let windows = Tokens::of(windows.len(), length);
            let written = if recipe.gguf.is_some() { None } else { Some(&source) };
            expected = expected.and_measuring(&graph, device, &[Some(&source), written], windows, "--verify-text")?;
        }
        if host {
            progress.say(&expected.line(&what));
        }
        let expected = host.then_some(expected.bytes);
        let prepare = started.elapsed().as_secs_f64();
        Ok(Run { started, source, graph, notes, samples, held_out, hashing, expected, prepare })
    }

    /// Measures what was written beside the original.
    fn measure<B: Backend>(
        &self,
        backend: &B,
        run: &Run,
        reopened: &Checkpoint,
        progress: &mut Progress,
    ) -> Result<(Option<Quality>, Option<HiddenStates>)> {
        let Some(HeldOut { windows, .. }) = &run.held_out else { return Ok((None, None)) };
        if run.graph.head.missing {
            return Ok((None, Some(compare_hidden(backend, reopened, &run.source, windows, progress)?)));
        }
        let mut quality =
            evaluate(backend, reopened, Some(&run.source), windows, Protocol::Papers, Activations::Exact, progress)?;
        quality.model = self.output.display().to_string();
        Ok((Some(quality), None))
    }

    fn report<B: Backend>(self, backend: &B, mut run: Run, outcome: Outcome) -> Result<Report> {
        let verdict = match (&outcome.quality, &self.verification) {
            (Some(Quality { beside: Some(beside), .. }), Some(v)) if v.limits.any() => {
                let missed = v.limits.missed(beside);
                Some(Verdict { limits: v.limits, passed: missed.is_empty(), missed })
            }
            _ => None,
        };
        run.notes.extend(evidence::notes(&outcome.linears, &outcome.lost));
        run.notes.extend(backend.notes());
        if run.graph.head.missing {
            let found = outcome.hidden_states.map_or("were not compared".to_owned(), |found| {
                format!(
                    "on {} tokens have a mean cosine of {:.5} with the original's, {:.5} at the lowest, and differ by {:.2} % of their length",
                    found.tokens,
                    found.cosine_mean,
                    found.cosine_min,
                    100.0 * found.relative_error
                )
            });
            run.notes.push(format!("the model has no output projection: its hidden states {found}"));
        }
        let mut recipe = self.recipe;
        recipe.idle.extend(outcome.idle);
        if !run.graph.has_experts() {
            recipe.idle.push("moe_all_experts");
        }
        let parameters: u64 = run.graph.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        let inputs = hashed(run.hashing)?;
        run.source.check_unchanged()?;
        let total_bytes = |files: &[FileReport]| files.iter().map(|f| f.bytes).sum::<u64>() as f64;
        let [weights, bytes] = outcome.quantized;
        Ok(Report {
            tool: concat!("quantc ", env!("CARGO_PKG_VERSION")).to_owned(),
            device: backend.name(),
            model: self.model.display().to_string(),
            name: run.source.name(),
            adapter: run.source.adapter().cloned(),
            family: run.graph.family,
            parameters,
            recipe,
            calibration: run.samples.map(|s| s.source),
            bpw: BitsPerWeight {
                quantized: bytes as f64 * 8.0 / weights.max(1) as f64,
                file: total_bytes(&outcome.outputs) * 8.0 / parameters as f64,
                original_file: total_bytes(&inputs) * 8.0 / parameters as f64,
            },
            inputs,
            outputs: outcome.outputs,
            quality: outcome.quality,
            hidden_states: outcome.hidden_states,
            verdict,
            notes: run.notes,
            interrupted: outcome.interrupted,
            linears: outcome.linears,
            smoothings: outcome.smoothings,
            tensors: outcome.tensors,
            seconds: Seconds {
                stages: outcome.stages,
                prepare: run.prepare,
                verify: outcome.verify,
                total: run.started.elapsed().as_secs_f64(),
            },
            expected_memory_bytes: run.expected,
            peak_memory_bytes: peak_memory(),
        })
    }
}

/// What there is to say of conversations that calibration did not see as the model does.
fn weak_conversations(source: &SampleSource, no_default: Option<&str>) -> Vec<String> {
    let SampleSource { name, refused, refusal, templated, untemplated, unwritten, .. } = source;
    let mut notes = Vec::new();
    if let (Some(refusal), true) = (refusal, *refused > 0) {
        notes.push(format!(
            "{refused} of {} conversations of {name} were left out, since the model refuses them: {refusal}",
            refused + templated + unwritten
        ));
    }
    if *unwritten > 0 {
        notes.push(format!(
            "{unwritten} of {} conversations of {name} were left out, since the model's chat template writes nothing of what is said in them",
            refused + templated + unwritten
        ));
    }
    if *untemplated > 0 {
        let why = no_default.unwrap_or("the model has no chat template");
        notes.push(format!("{untemplated} conversations of {name} were read as plain text, since {why}"));
    }
    notes
}

/// What there is to say of a text that gives fewer windows than were asked for.
pub fn fewer_windows(name: &str, found: usize, context: usize, asked: Option<usize>) -> Option<String> {
    let asked = asked.filter(|asked| found < *asked)?;
    Some(format!("{name} gives {found} windows of {context} tokens, {asked} were asked for"))
}

impl Verification {
    /// Its windows, and at least so many ids of the text if it has them.
    fn read(&self, source: &Checkpoint, text: &ModelText, least: usize, notes: &mut Vec<String>) -> Result<HeldOut> {
        let context = self.context.min(families::longest_context(source.config())?.unwrap_or(usize::MAX));
        let held_out = load_text(&self.text)?;
        let asked = needed(context, self.windows).max(least);
        let ids = text.first_ids(&held_out, asked)?;
        notes.extend(held_out.notes.iter().cloned());
        let windows =
            windows(&held_out.name, &ids, context, self.windows, None).map_err(crate::text::TextError::from)?;
        notes.extend(fewer_windows(&held_out.name, windows.len(), context, self.windows));
        Ok(HeldOut { ids, asked, windows })
    }
}

/// config.json, the codec's files, the tokenizer and everything else that belongs to the model.
fn write_side_files(source: &Checkpoint, beside: &Beside, plan: &Plan, staging: &Staging) -> Result<()> {
    let mut config = source.config().clone();
    if let Value::Object(config) = &mut config {
        config.insert("quantization_config".to_owned(), plan.config.quantization_config.clone());
        singles(config);
        if let Some(Value::Object(text)) = config.get_mut("text_config") {
            singles(text);
        }
    }
    debug_assert!(plan.fates.iter().any(|(_, fate)| *fate == Fate::Quantized));
    write_config(&config, staging)?;
    for (name, content) in &plan.config.files {
        staging.write(name, content)?;
    }
    copy_side_files(beside, staging)
}

/// Says float32 where a configuration says float64, which nothing is written in.
fn singles(config: &mut serde_json::Map<String, Value>) {
    for key in ["dtype", "torch_dtype"] {
        if let Some(name) = config.get_mut(key).filter(|name| *name == "float64" || *name == "torch.float64") {
            *name = Value::from("float32");
        }
    }
}

/// Writes config.json.
pub fn write_config(config: &Value, staging: &Staging) -> Result<()> {
    let mut bytes = json::pretty(config);
    bytes.push(b'\n');
    staging.write("config.json", &bytes)
}

/// Carries over what lies beside the weights.
pub fn copy_side_files(beside: &Beside, staging: &Staging) -> Result<()> {
    for (name, file) in &beside.files {
        let to = staging.folder().join(name);
        if let Some(folder) = to.parent() {
            std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        }
        match file {
            SideFile::Bytes(bytes) => std::fs::write(&to, bytes).map_err(Error::io(&to, "write"))?,
            SideFile::Copy(path, identity) => copy_file(path, identity, &to)?,
        }
    }
    Ok(())
}

/// Copies what a file holds; its mode is that of any new file. Fails for another file than was looked at when the run began, and for
/// one that was written to: a tokenizer would not be the one that the model was calibrated with, and a link may lead anywhere by now.
fn copy_file(from: &Path, identity: &file::Identity, to: &Path) -> Result<()> {
    let mut read = file::open(from).map_err(Error::io(from, "open"))?;
    identity.check_opened(&read).map_err(Error::io(from, "rely on"))?;
    let mut write = std::fs::File::create(to).map_err(Error::io(to, "create"))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = read.read(&mut buffer).map_err(Error::io(from, "read"))?;
        if count == 0 {
            return identity.check_opened(&read).map_err(Error::io(from, "rely on"));
        }
        write.write_all(&buffer[..count]).map_err(Error::io(to, "write"))?;
    }
}

/// The front matter for a model card: the licence that the original's card names.
fn card_licence(beside: &Beside) -> Option<String> {
    let (_, file) = beside.files.iter().find(|(name, _)| name == Path::new(ORIGINAL_CARD))?;
    let SideFile::Copy(path, _) = file else { return None };
    let front = front_matter(path)?;
    let said = front
        .lines()
        .filter(|line| ["license:", "license_name:", "license_link:"].iter().any(|key| line.starts_with(key)));
    let said: Vec<&str> = said.collect();
    (!said.is_empty()).then(|| format!("---\n{}\n---\n\n", said.join("\n")))
}

/// Refuses a model of which not even one operator's work on so many tokens fits into the device's memory; what is more than that is
/// put aside on the host while it is not used.
fn check_room(room: Option<u64>, graph: &Graph, [sweeps, measures]: [bool; 2], tokens: usize) -> Result<()> {
    let Some(room) = room else { return Ok(()) };
    // The Hessian, its factorization in doubles and the factor; the target, its errors and what feeds back.
    let solving = |linear: &Linear| {
        let (rows, cols) = (linear.rows as u64, linear.cols as u64);
        16 * rows * cols + if sweeps { 16 * cols * cols } else { 0 }
    };
    let Some(largest) = graph.linears().max_by_key(|linear| solving(linear)) else { return Ok(()) };
    let widest = graph.linears().map(|linear| linear.rows.max(linear.cols)).max().unwrap_or(0);
    // Two products of a gate, and what they become.
    let running = (tokens as u64).saturating_mul(12 * widest as u64);
    let head = if measures { 4 * (graph.vocabulary * graph.hidden) as u64 } else { 0 };
    let wanted = solving(largest).max(running).max(head);
    if wanted <= room {
        return Ok(());
    }
    Err(Error::usage(format!(
        "`{}` takes {:.2} GB of the GPU's memory and {:.2} GB may be used: give more with --gpu-memory, or run with --device cpu",
        largest.module,
        wanted as f64 / 1e9,
        room as f64 / 1e9
    )))
}
