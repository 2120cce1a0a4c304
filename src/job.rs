//! One whole run: open, plan, walk, reopen, verify, report, move into place.

pub mod key;
mod pace;
mod planned;
mod planning;
mod remarks;
mod room;

use std::path::{Path, PathBuf};
use std::time::Instant;

use calibration::samples::{SampleSource, Samples, Text, needed, windows};
use calibration::statistics::Needs;
use formats::Imatrix;
use kernels::Backend;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::cost::{Cost, longer, of_measuring};
use crate::error::{Error, Result};
use crate::evidence;
use crate::families;
use crate::graph::{BESIDE, FURTHER, Graph};
use crate::memory::{self, Device, Expected, Free, Tokens, Work, peak_memory};
use crate::output::hashing::{Hashing, hash_beside, hash_file, hashed};
use crate::output::{Before, Place, SideOutput, Staging, check_apart, check_beside, check_place};
use crate::pipeline::{Written, quantize};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::{
    BitsPerWeight, Fate, FileReport, HiddenStates, Limits, Original, Protocol, Quality, Report, Seconds, TensorReport,
    Verdict, papers_beside, projector_beside,
};
use crate::targets::{HeldOut, Output, Target, Words, target};
use crate::text::{HELD_OUT, ModelText, load_text};
use crate::verify::{Gives, KeptStates, Reference, compare_hidden, declared_activations, evaluate};
use crate::words::one_line;

pub use planned::{
    Planned, PlannedFile, PlannedFold, PlannedLinear, PlannedOutput, PlannedPart, PlannedSeconds, Serving, Takes,
};
pub use planning::Asked;
use remarks::Remarks;
use room::{OnDevice, check_room};

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

impl Verification {
    /// What is asked for: on a text, a bundled one where none is named, or on nothing where it is called `none`; in 8 windows of up to 2048
    /// tokens where their number is not said.
    ///
    /// Fails where limits are set and nothing is to be measured, with what to drop: `said`.
    pub fn asked(
        text: Option<&str>,
        windows: Option<usize>,
        limits: Limits,
        said: &str,
    ) -> Result<Option<Verification>> {
        if text != Some("none") {
            let text = text.unwrap_or(HELD_OUT).to_owned();
            return Ok(Some(Verification { text, context: 2048, windows: Some(windows.unwrap_or(8)), limits }));
        }
        if limits.any() {
            return Err(Error::usage(format!("limits on the quality need a text to measure it on: drop {said}")));
        }
        Ok(None)
    }
}

/// One run over a model.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    /// The input.
    pub model: &'a Path,
    /// What to make of it, all from one calibration as far as their recipes calibrate alike.
    pub outputs: Vec<Output>,
    /// The output whose weights the stream sees.
    pub lead: usize,
    /// Every output is calibrated on a stream of its own.
    pub independent: bool,
    /// What to measure afterwards.
    pub verification: Option<Verification>,
    /// Replace existing outputs.
    pub force: bool,
    /// What an interrupted run has finished is not gone on with.
    pub afresh: bool,
    /// Another run at the same place is waited for, instead of being refused.
    pub waits: bool,
}

/// What every run has before its work begins.
struct Run<'a> {
    started: Instant,
    source: &'a Checkpoint,
    graph: &'a Graph,
    gives: Gives,
    held_out: Option<HeldOut>,
    /// Its weight files while they are hashed, and once that is waited for.
    hashing: Option<Hashing>,
    inputs: Vec<FileReport>,
    /// Where what the original leaves of the held-out text is kept, once its files are hashed: the same for every output.
    kept: Option<KeptStates>,
}

impl<'a> Run<'a> {
    /// One whose files are not hashed.
    fn of(source: &'a Checkpoint, graph: &'a Graph) -> Run<'a> {
        let gives = Gives::of(graph, source);
        let started = Instant::now();
        Run { started, source, graph, gives, held_out: None, hashing: None, inputs: Vec::new(), kept: None }
    }
}

/// Outputs that are calibrated together, and what that takes.
struct Group {
    /// Which of the targets, the leading one first.
    members: Vec<usize>,
    samples: Option<Samples>,
    /// What there is to say of the calibration text.
    notes: Vec<String>,
    /// Bytes of the host's memory.
    expected: Option<u64>,
}

/// A report, and an imatrix that is to be written with its output.
type Made = (Report, Option<(PathBuf, Imatrix)>);

/// What was found of one output.
struct Outcome {
    quality: Option<Quality>,
    hidden_states: Option<HiddenStates>,
    notes: Vec<String>,
    verify: f64,
}

impl<'a> Job<'a> {
    /// A run with one output.
    pub fn one(
        model: &'a Path,
        output: &Path,
        recipe: Recipe,
        verification: Option<Verification>,
        force: bool,
    ) -> Job<'a> {
        let outputs = vec![Output { path: output.to_path_buf(), recipe, report: None }];
        Job { model, outputs, lead: 0, independent: false, verification, force, afresh: false, waits: false }
    }

    /// Runs a job with one output.
    pub fn run_one<B: Backend>(self, backend: &B, progress: &mut Progress) -> Result<Report> {
        Ok(self.run(backend, progress)?.remove(0))
    }

    /// Runs it; a report for each output. They appear only if everything up to and including the measurement of the last one worked;
    /// limits that are missed are told in a report's verdict, and the output stays.
    pub fn run<B: Backend>(self, backend: &B, progress: &mut Progress) -> Result<Vec<Report>> {
        let outputs: Vec<(PathBuf, bool)> =
            self.outputs.iter().map(|output| (output.path.clone(), output.recipe.gguf.is_some())).collect();
        tracing::info!("reading {}", self.model.display());
        self.work(backend, progress)
            .inspect(|reports| outputs.iter().zip(reports).for_each(|((path, _), report)| log(path, report)))
            .map_err(|error| outputs.iter().fold(error, |error, (output, single)| error.of_output(output, *single)))
    }

    fn work<B: Backend>(self, backend: &B, progress: &mut Progress) -> Result<Vec<Report>> {
        let started = Instant::now();
        self.check_places()?;
        let source = Checkpoint::open_with(self.model, self.adapter()?)?;
        let original = Original::of(&source);
        let graph = families::graph_of(&source)?;
        self.check_limits(&Gives::of(&graph, &source))?;
        let hashing = Some(hash_beside(source.files()));
        let key = self.key(backend, &source);
        let before = Before { key: &key, afresh: self.afresh, waits: self.waits };
        let targets = self.targets(&graph, &source)?;
        let stagings =
            self.outputs.iter().map(|output| self.staging(output, before)).collect::<Result<Vec<Staging>>>()?;
        self.check_projectors(&targets)?;
        check_space(&targets, &stagings)?;
        let both: Vec<(&dyn Target<B>, &Staging)> = targets.iter().map(|target| &**target).zip(&stagings).collect();
        let mut run = Run { started, hashing, ..Run::of(&source, &graph) };
        let (said, groups) = self.prepare((Device::of(backend), progress), &mut run, &targets)?;
        progress.check()?;
        let prepare = started.elapsed().as_secs_f64();
        let reports =
            self.make(backend, &mut run, (&said, &groups, prepare), &both, progress).inspect_err(|error| {
                stagings.iter().for_each(|staging| staging.keep_finished(error.may_pass()));
            })?;
        drop(run);
        self.commit(targets, stagings, (&original, reports))
    }

    /// Fails where limits are set on what the model does not give.
    fn check_limits(&self, gives: &Gives) -> Result<()> {
        let limits = self.verification.as_ref().map(|verification| verification.limits).unwrap_or_default();
        gives.check(&limits, &self.model.display().to_string())
    }

    /// What each output will hold of every tensor.
    fn targets<B: Backend>(&self, graph: &Graph, source: &Checkpoint) -> Result<Vec<Box<dyn Target<B>>>> {
        self.outputs.iter().map(|output| target(graph, source, output.recipe.clone())).collect()
    }

    /// Fails where what makes tokens of images would be written over a file that is not to be replaced.
    fn check_projectors<B: Backend>(&self, targets: &[Box<dyn Target<B>>]) -> Result<()> {
        for (output, target) in self.outputs.iter().zip(targets) {
            let name = target.projector(&Place::resolve(&output.path)?.name);
            name.map_or(Ok(()), |name| Staging::check_with(&output.path, &name, self.force))?;
        }
        Ok(())
    }

    /// Takes an output's place.
    fn staging(&self, output: &Output, before: Before<'_>) -> Result<Staging> {
        let begin = if output.recipe.gguf.is_some() { Staging::gguf } else { Staging::folder_for };
        let staging = begin(&output.path, Some(self.model), self.force, Some(before))?;
        if let Some(path) = output.recipe.save_imatrix.as_deref() {
            staging.check_another(path, Some(self.model), self.force)?;
        }
        Ok(staging)
    }

    /// Writes all outputs into their staging folders, and measures them.
    fn make<B: Backend>(
        &self,
        backend: &B,
        run: &mut Run<'_>,
        (said, groups, prepare): (&Remarks, &[Group], f64),
        targets: &[(&dyn Target<B>, &Staging)],
        progress: &mut Progress,
    ) -> Result<Vec<Made>> {
        let mut written: Vec<Option<Written>> = targets.iter().map(|_| None).collect();
        for group in groups {
            let together: Vec<_> = group.members.iter().map(|index| targets[*index]).collect();
            let samples = group.samples.as_ref();
            let all = quantize(backend, run.graph, run.source, &together, 0, samples, progress)?;
            for (index, one) in group.members.iter().zip(all) {
                let (target, staging) = targets[*index];
                target.complete(run.source, staging)?;
                written[*index] = Some(one);
            }
        }
        let mut reports = Vec::new();
        for (index, (both, written)) in targets.iter().zip(written).enumerate() {
            let group = groups.iter().find(|group| group.members.contains(&index)).expect("in a group");
            let mut notes = said.of(both.0, &group.notes);
            if let Some(note) = self.follows(group, index) {
                notes.push(note);
            }
            let mut written = written.expect("in a group");
            let imatrix = written.imatrix.take();
            let report = self.finish(backend, run, (*both, index), (group, prepare), written, notes, progress)?;
            reports.push((report, imatrix));
        }
        run.source.check_unchanged()?;
        Ok(reports)
    }

    /// Who this run is: another process with the same key would write the same bytes, and may go on where this one ends.
    fn key<B: Backend>(&self, backend: &B, source: &Checkpoint) -> Value {
        let outputs = self.outputs.iter().map(|Output { path, recipe, .. }| {
            let place = Place::resolve(path).map_or_else(|_| path.clone(), |place| place.path());
            (place.display().to_string(), key::of_recipe(recipe))
        });
        let mut whole = key::of_program(backend);
        whole["model"] = key::of_model(source);
        whole["output"] = Value::Object(outputs.collect());
        whole["outputs"] = self.outputs.iter().map(|output| output.path.display().to_string()).collect();
        whole["lead"] = self.lead.into();
        whole["independent"] = self.independent.into();
        whole
    }

    /// Of each output the one whose weights make the inputs that it is calibrated on: itself where it leads, or looks at no text.
    pub fn leads<B: Backend>(&self, graph: &Graph, source: &Checkpoint) -> Result<Vec<usize>> {
        let targets = self.targets::<B>(graph, source)?;
        let mut leads: Vec<usize> = (0..targets.len()).collect();
        for group in self.groups(&targets) {
            let followers = group.iter().filter(|index| targets[**index].needs() > Needs::Nothing);
            followers.for_each(|index| leads[*index] = group[0]);
        }
        Ok(leads)
    }

    /// Moves everything into place, once all of it is there.
    fn commit<B: Backend>(
        self,
        targets: Vec<Box<dyn Target<B>>>,
        stagings: Vec<Staging>,
        (original, mut reports): (&Original, Vec<Made>),
    ) -> Result<Vec<Report>> {
        let mut copies = Vec::new();
        for (((output, target), staging), (report, _)) in self.outputs.iter().zip(&targets).zip(&stagings).zip(&reports)
        {
            let json = serde_json::to_vec_pretty(report).expect("a report is plain data");
            let [name, card] = target.papers(staging.name());
            staging.write(&name, &json)?;
            staging.write(&card, report.card(original, &name).as_bytes())?;
            copies.push(output.report.as_deref().map(|path| SideOutput::write(path, &json)).transpose()?);
        }
        if stagings.len() > 1 {
            // Before any of them moves, so that what takes long, and what a full disk refuses, does not come between two moves.
            stagings.iter().try_for_each(Staging::flush)?;
        }
        for (staging, (report, imatrix)) in stagings.into_iter().zip(&mut reports) {
            // Right before the model, so that a run that is killed while it measures finds its place free.
            if let Some((path, imatrix)) = imatrix {
                imatrix.write(path)?;
            }
            report.notes.extend(staging.commit()?);
        }
        let reports = reports.into_iter().map(|(report, _)| report).collect();
        copies.into_iter().flatten().try_for_each(SideOutput::appear)?;
        Ok(reports)
    }

    /// The adapter, which is merged into the model that all outputs are made of.
    fn adapter(&self) -> Result<Option<&Path>> {
        let adapter = self.outputs[0].recipe.adapter.as_deref();
        if self.outputs.iter().any(|output| output.recipe.adapter.as_deref() != adapter) {
            return Err(Error::usage(
                "targets of one run are made of one model, and here of several adapters: run each by itself",
            ));
        }
        Ok(adapter)
    }

    /// Fails where something would be written over what is read, or over another output.
    fn check_places(&self) -> Result<()> {
        let adapter = self.adapter()?;
        let inputs = self.inputs();
        for (index, output) in self.outputs.iter().enumerate() {
            adapter.map_or(Ok(()), |adapter| check_place(&output.path, adapter))?;
            // A file that is read may not be replaced, nor a folder that it lies in.
            inputs.iter().filter(|input| input.is_file()).try_for_each(|input| check_place(&output.path, input))?;
            self.outputs[..index].iter().try_for_each(|other| check_apart(&other.path, &output.path))?;
            let single = output.recipe.gguf.is_some();
            if let Some(place) = Place::resolve(&output.path).ok().filter(|_| single) {
                let names = papers_beside(&place.name).into_iter().chain([projector_beside(&place.name)]);
                if let Some(folder) = { names }.map(|name| place.parent.join(name)).find(|path| path.is_dir()) {
                    return Err(Error::usage(format!(
                        "{}: is a folder in the place of a file that goes beside {}; move it, or give the output another name",
                        folder.display(),
                        output.path.display()
                    )));
                }
            }
            let saved = output.recipe.save_imatrix.as_deref();
            if let Some(saved) = saved {
                // A GGUF file tells by itself what it is called.
                let folders = self.outputs.iter().filter(|output| output.recipe.gguf.is_none());
                { folders }.try_for_each(|folder| check_apart(&folder.path, saved))?;
            }
            let Some(path) = &output.report else { continue };
            let place = |path: &Path| Place::resolve(path).ok();
            let same = |other: &Output| other.report.as_deref().is_some_and(|other| place(other) == place(path));
            if self.outputs[..index].iter().any(same) {
                return Err(Error::usage(format!("{}: is to hold the reports of two targets", path.display())));
            }
            self.outputs.iter().try_for_each(|output| check_beside("--report", path, &inputs, &output.path))?;
            if saved.is_some_and(|saved| Place::resolve(saved).ok() == Place::resolve(path).ok()) {
                return Err(Error::usage(format!(
                    "--report {}: is what --save-imatrix names too; choose another place",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    /// Every file and folder that is read. Names of bundled texts are among them and exist as no file.
    fn inputs(&self) -> Vec<&Path> {
        let mut all = vec![self.model];
        for Output { recipe, .. } in &self.outputs {
            let imatrix = recipe.imatrix.as_deref();
            all.push(Path::new(&recipe.calibration));
            all.extend([recipe.adapter.as_deref(), recipe.file.as_deref(), imatrix].into_iter().flatten());
        }
        all.extend(self.verification.iter().map(|verification| Path::new(&verification.text)));
        all
    }

    /// Which outputs are calibrated together: those that do it as the leading one does, and those that do not calibrate.
    fn groups<B: Backend>(&self, targets: &[Box<dyn Target<B>>]) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|index| *index != self.lead);
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for index in order {
            let alike = |first: usize| {
                let (one, other) = (&self.outputs[first].recipe, &self.outputs[index].recipe);
                let calibrates = |index: usize| targets[index].needs() > Needs::Nothing;
                !self.independent
                    && (!calibrates(index) || calibrates(first) && one.calibrates_as(other))
                    && one.method.smooths() == other.method.smooths()
            };
            match groups.iter_mut().find(|group| alike(group[0])) {
                Some(group) => group.push(index),
                None => groups.push(vec![index]),
            }
        }
        groups
    }

    /// What to say of an output that the stream does not see.
    fn follows(&self, group: &Group, index: usize) -> Option<String> {
        let lead = group.members[0];
        (lead != index && group.samples.is_some()).then(|| {
            format!(
                "calibrated beside {}, whose quantized weights made the inputs of each layer; --independent calibrates it by itself",
                self.outputs[lead].path.display()
            )
        })
    }

    /// Reads the texts, and tells what memory the work will take.
    fn prepare<B: Backend>(
        &self,
        (device, progress): (Device, &Progress),
        run: &mut Run<'_>,
        targets: &[Box<dyn Target<B>>],
    ) -> Result<(Remarks, Vec<Group>)> {
        let (source, graph) = (run.source, run.graph);
        let calibrates = targets.iter().any(|target| target.needs() > Needs::Nothing);
        let groups = self.groups(targets);
        for members in &groups {
            let needs = OnDevice::of(self, targets, device, members, self.verification.is_some());
            device.room.map_or(Ok(()), |room| check_room(room, graph, &needs))?;
        }
        if calibrates || self.verification.is_some() {
            families::check_runnable(graph, source)?;
        }
        let mut said = Remarks::of_model(graph, source);
        let tokenizer = source.tokenizer();
        said.tokenizer = source.notes_on(&tokenizer);
        let text = match calibrates || self.verification.is_some() {
            true => Some(ModelText::of(source, tokenizer?)?),
            false => None,
        };
        // A GPU puts aside in the host's memory what does not fit into its own, and looks after that itself.
        let host = device.room.is_none();
        let free = if host { Free::now() } else { None };
        let mut all = Vec::new();
        for members in groups {
            let work = members.iter().map(|i| Work::of(&self.outputs[*i].recipe, targets[*i].needs()));
            let work = work.reduce(Work::and).expect("at least one");
            let expect = |tokens| Expected::calibration(graph, device, work, tokens, free.clone());
            let recipe = &self.outputs[members[0]].recipe;
            let mut notes = Vec::new();
            let samples = match (work.needs > Needs::Nothing, &text) {
                (true, Some(text)) => {
                    let longest = families::longest_context(source.config())?.unwrap_or(usize::MAX);
                    let calibration = load_text(&recipe.calibration)?;
                    let asked = Tokens::of(recipe.samples, recipe.seq_len.min(longest));
                    // Tokenizing much takes long: what cannot be had is told before.
                    expect(Some(memory::at_least(asked, calibration.bytes())))?;
                    Some(draw(text, calibration, recipe, longest, &mut notes)?)
                }
                _ => None,
            };
            if let Some(samples) = samples.as_ref().filter(|_| work.sweeps) {
                notes.extend(few_tokens(graph, samples.source.tokens));
            }
            let tokens = samples.as_ref().map(|samples| Tokens::of(samples.source.sequences, samples.source.seq_len));
            all.push((Group { members, samples, notes, expected: None }, expect(tokens)?));
        }
        if let (Some(verification), Some(text)) = (&self.verification, &text) {
            let least = if self.outputs.iter().any(|output| output.recipe.gguf.is_some()) { COMPARED } else { 0 };
            run.held_out = Some(verification.read(source, text, least, &mut said.held_out)?);
        }
        // A tokenizer of a large vocabulary is tens of megabytes.
        drop(text);
        let mut groups = Vec::new();
        for (mut group, mut expected) in all {
            let mut what = Vec::new();
            if let Some(samples) = &group.samples {
                let SampleSource { sequences, seq_len, .. } = samples.source;
                what.push(format!("calibrating on {sequences} sequences of {seq_len} tokens"));
            }
            if let Some(HeldOut { windows, .. }) = &run.held_out {
                let length = windows.first().map_or(0, Vec::len);
                what.push(format!("measuring {} windows of {length}", windows.len()));
                let windows = Tokens::of(windows.len(), length);
                let single = group.members.iter().all(|index| self.outputs[*index].recipe.gguf.is_some());
                let written = if single { None } else { Some(source) };
                expected = expected.and_measuring(graph, device, &[Some(source), written], windows, "--verify-text")?;
            }
            let longer = self.measures_longer(run, &group, targets);
            if host {
                progress.say(&(expected.line(&what) + &longer.map_or(String::new(), |longer| format!("; {longer}"))));
            } else if let Some(longer) = longer {
                progress.say(&longer);
            }
            group.expected = host.then_some(expected.bytes);
            groups.push(group);
        }
        Ok((said, groups))
    }

    /// What to say where measuring the outputs of a group takes longer than making them, and some time at all.
    fn measures_longer<B: Backend>(
        &self,
        run: &Run<'_>,
        group: &Group,
        targets: &[Box<dyn Target<B>>],
    ) -> Option<String> {
        let HeldOut { windows, .. } = run.held_out.as_ref()?;
        let tokens = group.samples.as_ref().map_or(0, |samples| samples.source.tokens);
        let costs = group.members.iter().enumerate().map(|(at, index)| {
            let cost = Cost::of(&self.outputs[*index].recipe, targets[*index].needs(), tokens);
            if at == 0 { cost.total(run.graph) } else { cost.beside().total(run.graph) }
        });
        let measured = windows.iter().map(|window| window.len() as u64).sum();
        // Of the output and of the original.
        let measuring = 2 * group.members.len() as u64 * of_measuring(run.graph, measured);
        longer(costs.sum(), measuring, windows.len())
    }

    /// Measures an output beside the original, and reports.
    fn finish<B: Backend>(
        &self,
        backend: &B,
        run: &mut Run<'_>,
        ((target, staging), index): ((&dyn Target<B>, &Staging), usize),
        (group, prepare): (&Group, f64),
        written: Written,
        mut notes: Vec<String>,
        progress: &mut Progress,
    ) -> Result<Report> {
        let verifying = Instant::now();
        let reopened = target.reopen(staging)?;
        let output = &self.outputs[index].path;
        if let Some(hashing) = run.hashing.take() {
            run.inputs = hashed(hashing)?;
            if run.held_out.is_some() && run.gives.predicts {
                run.kept = key::kept_of(backend, run.source, Some(&run.inputs))?;
            }
        }
        let (quality, hidden_states) = self.measure(backend, run, output, &reopened, progress)?;
        let held_out = self.verification.as_ref().map(|v| &v.text[..]).zip(run.held_out.as_ref());
        let words = Words { vocabulary: run.graph.vocabulary, held_out, output };
        notes.extend(target.check_tokenizer(run.source, &reopened, &words)?);
        let verify = verifying.elapsed().as_secs_f64();
        drop(reopened);
        let outcome = Outcome { quality, hidden_states, notes, verify };
        self.report(backend, run, (target, staging), (group, prepare), written, outcome)
    }

    /// Measures what was written beside the original.
    fn measure<B: Backend>(
        &self,
        backend: &B,
        run: &Run<'_>,
        output: &Path,
        reopened: &Checkpoint,
        progress: &mut Progress,
    ) -> Result<(Option<Quality>, Option<HiddenStates>)> {
        let Some(HeldOut { windows, around: [before, after], .. }) = &run.held_out else { return Ok((None, None)) };
        let mut states = None;
        if run.gives.states() {
            let texts = run.gives.texts(windows, [before, after]);
            let found = compare_hidden(backend, &run.gives, reopened, run.source, &texts, progress)?;
            states = Some(HiddenStates { model: output.display().to_string(), ..found });
        }
        if !run.gives.predicts {
            return Ok((None, states));
        }
        let activations = declared_activations(reopened);
        let original = Reference { model: run.source, kept: run.kept.as_ref() };
        let mut quality =
            evaluate(backend, reopened, Some(original), windows, Protocol::Papers, activations, progress)?;
        quality.model = output.display().to_string();
        Ok((Some(quality), states))
    }

    fn report<B: Backend>(
        &self,
        backend: &B,
        run: &Run<'_>,
        (target, staging): (&dyn Target<B>, &Staging),
        (group, prepare): (&Group, f64),
        written: Written,
        outcome: Outcome,
    ) -> Result<Report> {
        let verdict = self.verification.as_ref().filter(|_| run.held_out.is_some());
        let (quality, states) = (outcome.quality.as_ref(), outcome.hidden_states.as_ref());
        let verdict = verdict.and_then(|verification| Verdict::of(verification.limits, quality, states));
        let (done, mut notes) = (written.done, outcome.notes);
        notes.extend(evidence::notes(&done.linears, &done.lost));
        notes.extend(backend.notes());
        notes.extend(remarks::of_states(&run.gives, run.graph, outcome.hidden_states.as_ref()));
        let mut recipe = target.recipe().clone();
        recipe.idle.extend(target.idle());
        let dropped = |one: &TensorReport| matches!(one.fate, Fate::Dropped(FURTHER));
        let further =
            run.graph.aside.iter().any(|(_, what)| what.starts_with(FURTHER)) || target.tensors().iter().any(dropped);
        if run.graph.predictors().is_empty() && !further {
            recipe.idle.push("mtp");
        }
        if !run.graph.aside.iter().any(|(_, what)| *what == BESIDE) && !recipe.idle.contains(&"towers") {
            recipe.idle.push("towers");
        }
        if !run.graph.has_experts() {
            recipe.idle.push("moe_all_experts");
        }
        let parameters = parameters(run.graph);
        let outputs = hashed(written.flushing)?;
        let projector = target.projector(staging.name()).map(|name| hash_file(&staging.folder().join(name)));
        let total_bytes = |files: &[FileReport]| files.iter().map(|f| f.bytes).sum::<u64>() as f64;
        let [weights, bytes] = target.quantized(run.graph);
        Ok(Report {
            tool: concat!("quantc ", env!("CARGO_PKG_VERSION")).to_owned(),
            device: backend.name(),
            model: self.model.display().to_string(),
            name: run.source.name(),
            adapter: run.source.adapter().cloned(),
            family: run.graph.family,
            parameters,
            recipe,
            calibration: group.samples.as_ref().filter(|_| target.needs() > Needs::Nothing).map(|s| s.source.clone()),
            bpw: BitsPerWeight {
                quantized: bytes as f64 * 8.0 / weights.max(1) as f64,
                file: total_bytes(&outputs) * 8.0 / parameters as f64,
                original_file: total_bytes(&run.inputs) * 8.0 / parameters as f64,
            },
            inputs: run.inputs.clone(),
            outputs,
            projector: projector.transpose()?,
            quality: outcome.quality,
            hidden_states: outcome.hidden_states,
            verdict,
            notes,
            interrupted: staging.notes().to_vec(),
            linears: done.linears,
            smoothings: done.smoothings,
            tensors: target.tensors(),
            seconds: Seconds {
                stages: done.seconds,
                prepare,
                verify: outcome.verify,
                total: run.started.elapsed().as_secs_f64(),
            },
            expected_memory_bytes: group.expected,
            peak_memory_bytes: peak_memory(),
        })
    }
}

/// Puts into the log what was made.
fn log(output: &Path, report: &Report) {
    let shown = output.display();
    let Seconds { prepare, verify, total, stages } = report.seconds;
    tracing::info!(bpw = report.bpw.quantized, linears = report.linears.len(), "{shown} is written");
    tracing::info!(prepare, verify, total, "{shown}: {stages:?}");
    if let Some(quality) = &report.quality {
        let beside = quality.beside.as_ref();
        let (kld, top1) = (beside.map(|beside| beside.kld_mean), beside.map(|beside| beside.top1_agreement));
        tracing::info!(perplexity = quality.perplexity, kld, top1, "{shown} is measured");
    }
    report.interrupted.iter().chain(&report.notes).for_each(|note| tracing::info!("{shown}: {}", one_line(note)));
    for missed in report.verdict.iter().flat_map(|verdict| &verdict.missed) {
        tracing::warn!("{shown}: {missed}");
    }
}

/// Fails where the disks have no room for all outputs together.
fn check_space<B: Backend>(targets: &[Box<dyn Target<B>>], stagings: &[Staging]) -> Result<()> {
    let bytes = |target: &dyn Target<B>, staging: &Staging| -> Result<u64> {
        Ok(target.files(staging.name())?.iter().map(|(_, bytes)| bytes).sum::<u64>() + target.beside())
    };
    let both = targets.iter().zip(stagings);
    let bytes = both.map(|(target, staging)| bytes(&**target, staging)).collect::<Result<Vec<u64>>>()?;
    for (index, staging) in stagings.iter().enumerate() {
        let together = stagings[..=index].iter().zip(&bytes).filter(|(other, _)| other.is_beside(staging));
        staging.check_space(together.map(|(_, bytes)| bytes).sum())?;
    }
    Ok(())
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
        let around = [text.tokenizer.prefix(), text.tokenizer.suffix()].map(<[u32]>::to_vec);
        Ok(HeldOut { ids, asked, windows, around })
    }
}

/// Draws the calibration sequences that a recipe asks for, none longer than the model's `longest`; notes say what falls short of it.
fn draw(
    text: &ModelText,
    calibration: Text,
    recipe: &Recipe,
    longest: usize,
    notes: &mut Vec<String>,
) -> Result<Samples> {
    let seq_len = recipe.seq_len.min(longest);
    if seq_len < recipe.seq_len {
        notes.push(format!("sequences were cut to the model's {seq_len} positions"));
    }
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
    Ok(samples)
}

/// What to say where so many tokens hardly determine the Hessian of the widest input.
fn few_tokens(graph: &Graph, tokens: usize) -> Option<String> {
    let width = graph.linears().map(|linear| linear.cols).max().unwrap_or(0);
    (tokens < 2 * width).then(|| {
        format!(
            "{tokens} calibration tokens are few for inputs of {width} features; the Hessians lean on their damping"
        )
    })
}

/// Parameters in all tensors of a model.
fn parameters(graph: &Graph) -> u64 {
    graph.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
}
