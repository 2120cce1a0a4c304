//! A project of models that are built: what is out of date is made again, and nothing else.
//!
//! ```text
//! for each target of quantc.toml:
//!     out of date, where the lock does not know it, or its recipe, the program, a file that was read or a file that was written is another
//! made together: the targets that are out of date, and with them the one that leads, which makes the inputs that they are calibrated on
//! the lock ← what was read and written, with hashes
//! ```

mod lock;
mod project;

use std::path::{Path, PathBuf};

use kernels::Backend;
use serde_json::{Value, json};

use crate::checkpoint::{in_snapshot, parts_of, resolve};
use crate::error::Result;
use crate::hub;
use crate::job::Job;
use crate::memory::Device;
use crate::output::{Place, Staging};
use crate::progress::Progress;
use crate::report::{FileReport, Report, papers_beside};
use crate::targets::Output;

pub use lock::{Lock, Locked, Seen, Stamp, files_in};
pub use project::{Project, schema};

/// The program, as locks name it.
pub const TOOL: &str = concat!("quantc ", env!("CARGO_PKG_VERSION"));

/// Where a target stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    /// Its place, as the project says it.
    pub path: PathBuf,
    /// Why it has to be made; `None` where it is up to date.
    pub stale: Option<String>,
    /// Limits that it missed when it was made.
    pub missed: Vec<String>,
}

impl Standing {
    /// What is told of it, as an event.
    pub fn event(&self) -> Value {
        json!({"event": "target", "path": self.path.display().to_string(), "stale": self.stale, "missed": self.missed})
    }
}

/// With what a build computes, as far as that changes what is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Means {
    /// The kind of device, `cpu` or `cuda`; `None` where any will do.
    pub device: Option<&'static str>,
    /// The type in which calibration multiplies, as `--math` says it.
    pub math: &'static str,
}

/// A project with what is known of its targets.
pub struct Build {
    project: Project,
    means: Means,
    lock: Lock,
    /// What the model is called on a hub, with the commit that it is at.
    model: Option<String>,
    /// One for each output.
    standings: Vec<Standing>,
    /// Files have been touched, and are as they were.
    touched: bool,
}

impl Build {
    /// Reads a project and its lock and looks at every file that a target was made of, and at what was made. With `hashes` every file is
    /// hashed, whatever it looks like.
    ///
    /// A model on a hub need not be on this disk: its commit says whether it is the one that a target was made of. The hub is asked for the
    /// commit of a branch or tag that the cache does not have.
    ///
    /// Fails as [`Project::read`] and [`Lock::read`] do, and where a model is not there.
    pub fn open(path: &Path, means: Means, hashes: bool) -> Result<Build> {
        let project = Project::read(path)?;
        let lock = Lock::read(&project.lock())?;
        let mut build = Build { project, means, lock, model: None, standings: Vec::new(), touched: false };
        if let Some(name) = build.project.hub.as_ref().filter(|_| !build.lock.targets.is_empty()) {
            build.model = Some(format!("{}@{}", name.id, hub::commit_of(name)?));
        }
        for index in 0..build.project.outputs.len() {
            let standing = build.stand(index, hashes)?;
            build.standings.push(standing);
        }
        Ok(build)
    }

    /// Where each target stands, in the project's order.
    pub fn standings(&self) -> &[Standing] {
        &self.standings
    }

    /// Whether there is nothing to be made.
    pub fn is_up_to_date(&self) -> bool {
        self.standings.iter().all(|standing| standing.stale.is_none())
    }

    /// The folder that paths in the lock are seen from.
    fn folder(&self) -> &Path {
        self.project.path.parent().unwrap_or(Path::new(""))
    }

    /// A path as the lock calls it: what lies in the cache of a hub is called as there, by its commit.
    fn called(&self, path: &Path) -> String {
        if let Some((name, commit, inner)) = in_snapshot(path) {
            return Path::new(&format!("{name}@{commit}")).join(inner).display().to_string();
        }
        path.strip_prefix(self.folder()).unwrap_or(path).display().to_string()
    }

    fn stand(&mut self, index: usize, hashes: bool) -> Result<Standing> {
        let output = &self.project.outputs[index];
        let (path, name) = (output.path.clone(), self.called(&output.path));
        let limits = self.project.verification.as_ref().map(|verification| verification.limits).unwrap_or_default();
        let standing = |stale: Option<String>, locked: Option<&Locked>| Standing {
            path: path.clone(),
            stale,
            missed: locked.map_or(Vec::new(), |locked| {
                let mut missed = locked.quality.map_or(Vec::new(), |quality| limits.missed_by(quality));
                missed.extend(locked.made.iter().flat_map(|made| limits.missed_in(made)));
                missed
            }),
        };
        let Some(locked) = self.lock.target(&name) else {
            return Ok(standing(Some("it was never made".to_owned()), None));
        };
        if locked.tool != TOOL {
            let why = format!("it was made by {}, and this is {TOOL}", locked.tool);
            return Ok(standing(Some(why), None));
        }
        if let Some(why) = self.other_means(locked) {
            return Ok(standing(Some(why), None));
        }
        if let Some(why) = self.other_recipe(index, &locked.recipe) {
            return Ok(standing(Some(why), None));
        }
        let inputs: Vec<(String, PathBuf)> =
            self.inputs(output)?.into_iter().map(|file| (self.called(&file), file)).collect();
        let place = |path: &str| inputs.iter().find(|(name, _)| name == path).map(|(_, file)| file.clone());
        // Which files of a commit are on this disk does not matter: they are the same everywhere.
        let model = self.model.as_ref().map(|model| format!("{model}/"));
        let fixed = |path: &str| model.as_ref().is_some_and(|model| path.starts_with(&model[..]));
        if let Some(gone) = locked.inputs.iter().find(|input| place(&input.path).is_none() && !fixed(&input.path)) {
            return Ok(standing(Some(format!("{} is not read any more", gone.path)), None));
        }
        let is_new = |path: &String| !fixed(path) && !locked.inputs.iter().any(|input| input.path == *path);
        if let Some((new, _)) = inputs.iter().find(|(path, _)| is_new(path)) {
            return Ok(standing(Some(format!("{new} is new")), None));
        }
        let mut renewed = locked.clone();
        for stamp in renewed.inputs.iter_mut().chain(&mut renewed.outputs) {
            let file = match place(&stamp.path) {
                Some(file) => file,
                None if fixed(&stamp.path) => continue,
                None => self.folder().join(&stamp.path),
            };
            match stamp.compare(&file, hashes)? {
                Seen::Same => {}
                Seen::Touched(now) => *stamp = now,
                Seen::Changed => return Ok(standing(Some(format!("{} is not what it was", stamp.path)), None)),
            }
        }
        if renewed != *locked {
            self.touched = true;
            if let Some(locked) = self.lock.targets.iter_mut().find(|target| target.path == name) {
                *locked = renewed.clone();
            }
            return Ok(standing(None, Some(&renewed)));
        }
        Ok(standing(None, Some(locked)))
    }

    /// All that a target is made by, apart from files.
    fn recipe(&self, index: usize) -> Value {
        let project = &self.project;
        let output = &project.outputs[index];
        let leader = &project.outputs[project.lead];
        let led = index != project.lead && !project.independent;
        let measured = project.verification.as_ref().map(
            |verification| json!({"text": self.called(Path::new(&verification.text)), "windows": verification.windows}),
        );
        json!({
            "model": self.model_called(),
            "recipe": output.recipe,
            "independent": project.independent,
            "leading target": led.then(|| self.called(&leader.path)),
            "leading target's recipe": led.then_some(&leader.recipe),
            "measured": measured,
        })
    }

    /// What it would be computed with otherwise than when the target was made.
    fn other_means(&self, locked: &Locked) -> Option<String> {
        let (device, math) = (locked.device.as_deref().unwrap_or("cpu"), locked.math.as_deref().unwrap_or("auto"));
        match self.means.device.filter(|asked| *asked != device) {
            Some(asked) => Some(format!("--device was {device} and is {asked}")),
            None => (math != self.means.math).then(|| format!("--math was {math} and is {}", self.means.math)),
        }
    }

    /// The model as the lock calls it: one on a hub by its name and commit.
    fn model_called(&self) -> String {
        let file = self.project.hub.as_ref().and_then(|name| name.file.as_ref());
        match (&self.model, file) {
            (Some(model), Some(file)) => format!("{model}:{file}"),
            (Some(model), None) => model.clone(),
            (None, _) => self.called(&self.project.model),
        }
    }

    /// What is asked for otherwise than when the target was made.
    fn other_recipe(&self, index: usize, locked: &str) -> Option<String> {
        let now = self.recipe(index);
        let before: Value = serde_json::from_str(locked).ok()?;
        if before == now {
            return None;
        }
        let mut paths = Vec::new();
        differing(&before, &now, "", &mut paths);
        let first = paths.first().cloned().unwrap_or_default();
        let more = if paths.len() > 1 { format!(", and {} more settings", paths.len() - 1) } else { String::new() };
        Some(format!("{first}{more}"))
    }

    /// Every file that a target is made of.
    fn inputs(&self, output: &Output) -> Result<Vec<PathBuf>> {
        let project = &self.project;
        let mut all = Vec::new();
        if let Some(model) = self.model() {
            let (model, _) = resolve(model)?;
            all = if model.is_file() { parts_of(&model)? } else { files_in(&model)? };
        }
        let recipe = &output.recipe;
        if let Some(adapter) = &recipe.adapter {
            all.extend(files_in(adapter)?);
        }
        let texts = [Some(&*recipe.calibration), project.verification.as_ref().map(|v| &*v.text)];
        let texts = texts.into_iter().flatten().map(PathBuf::from).filter(|path| path.is_file());
        all.extend(texts.chain(recipe.imatrix.clone()));
        // A project may lie in the model's folder, and then changes as it is built.
        let own = [self.project.path.clone(), self.project.lock()];
        let outputs: Vec<&PathBuf> = project.outputs.iter().map(|output| &output.path).collect();
        all.retain(|file| !own.contains(file) && !outputs.iter().any(|output| file.starts_with(output)));
        all.sort();
        all.dedup();
        Ok(all)
    }

    /// Makes what is out of date, and remembers it; the places that were written, with their reports.
    ///
    /// Fails where something lies at a target's place that no build has made, unless `force` replaces it; and as a run does, after which the
    /// lock is as before.
    pub fn make<B: Backend>(
        mut self,
        backend: &B,
        (force, waits): (bool, bool),
        progress: &mut Progress,
    ) -> Result<Vec<(PathBuf, Report)>> {
        let redone = self.redone();
        if redone.is_empty() {
            return self.remember().map(|()| Vec::new());
        }
        let outputs: Vec<Output> = redone.iter().map(|index| self.project.outputs[*index].clone()).collect();
        for output in outputs.iter().filter(|output| !force && self.lock.target(&self.called(&output.path)).is_none()) {
            Staging::check(&output.path, self.model(), false, output.recipe.gguf.is_some())?;
        }
        Lock::check_place(&self.project.lock())?;
        self.bring(progress)?;
        let project = &self.project;
        let lead = redone.iter().position(|index| *index == project.lead).unwrap_or(0);
        // As they are before the work: what changes while it is done is found changed by the next build.
        let mut inputs = Vec::new();
        for output in &outputs {
            inputs.push(self.inputs(output)?);
        }
        let job = Job {
            model: &project.model,
            outputs: outputs.clone(),
            lead,
            independent: project.independent,
            verification: project.verification.clone(),
            force: true,
            afresh: false,
            waits,
        };
        let reports = job.run(backend, progress)?;
        let device = if Device::of(backend).room.is_some() { "cuda" } else { "cpu" };
        for ((index, report), inputs) in redone.iter().zip(&reports).zip(inputs) {
            let mut locked = self.locked(*index, report, &inputs)?;
            (locked.device, locked.math) = (Some(device.to_owned()), Some(self.means.math.to_owned()));
            self.lock.targets.retain(|target| target.path != locked.path);
            self.lock.targets.push(locked);
        }
        // In the project's order, without what is no target any more.
        let order: Vec<String> = self.project.outputs.iter().map(|output| self.called(&output.path)).collect();
        self.lock.targets.retain(|target| order.contains(&target.path));
        self.lock.targets.sort_by_key(|target| order.iter().position(|path| *path == target.path));
        self.lock.write(&self.project.lock())?;
        Ok(outputs.into_iter().map(|output| output.path).zip(reports).collect())
    }

    /// Downloads a model on a hub that is not on this disk.
    fn bring(&mut self, progress: &mut Progress) -> Result<()> {
        let Some(name) = &self.project.hub else { return Ok(()) };
        if self.model().is_none() {
            let found = hub::find(Path::new(&format!("hf://{name}")), hub::Reads::Whole, progress)?;
            self.project.model = found.expect("hf:// is no path").place;
        }
        self.model = in_snapshot(&self.project.model).map(|(name, commit, _)| format!("{name}@{commit}"));
        Ok(())
    }

    /// Remembers how files look that were touched and are as they were, so that they need not be hashed again.
    pub fn remember(&self) -> Result<()> {
        if self.touched { self.lock.write(&self.project.lock()) } else { Ok(()) }
    }

    /// The model, where it is on this disk.
    fn model(&self) -> Option<&Path> {
        Some(&*self.project.model).filter(|model| self.project.hub.is_none() || model.exists())
    }

    /// Files that are read, and the lock: nothing else may be written over them.
    pub fn inputs_and_lock(&self) -> Vec<PathBuf> {
        let recipe = self.project.outputs.first().and_then(|output| output.recipe.file.clone());
        let model = self.model().map(Path::to_owned);
        let own = [self.project.path.clone(), self.project.lock()];
        model.into_iter().chain(own).chain(recipe).collect()
    }

    /// The places of the outputs that [`make`](Self::make) writes, in its order.
    pub fn redone_places(&self) -> Vec<PathBuf> {
        self.redone().into_iter().map(|index| self.project.outputs[index].path.clone()).collect()
    }

    /// Which outputs a run has to make: those that are out of date, and the leading one with them where it makes their inputs.
    fn redone(&self) -> Vec<usize> {
        let project = &self.project;
        let stale = |index: &usize| self.standings[*index].stale.is_some();
        let mut redone: Vec<usize> = (0..project.outputs.len()).filter(stale).collect();
        if !redone.is_empty() && !project.independent && !redone.contains(&project.lead) {
            redone.push(project.lead);
            redone.sort_unstable();
        }
        redone
    }

    fn locked(&self, index: usize, report: &Report, inputs: &[PathBuf]) -> Result<Locked> {
        let output = &self.project.outputs[index];
        let stamps = |files: &[PathBuf], known: &[FileReport]| -> Result<Vec<Stamp>> {
            files.iter().map(|file| Stamp::of(file, self.called(file), known)).collect()
        };
        let written = match output.path.is_dir() {
            true => files_in(&output.path)?,
            false => {
                let place = Place::resolve(&output.path)?;
                let mut files: Vec<PathBuf> = report.outputs.iter().map(|file| place.parent.join(&file.name)).collect();
                files.extend(papers_beside(&place.name).map(|paper| place.parent.join(paper)));
                files.extend(report.projector.iter().map(|file| place.parent.join(&file.name)));
                files
            }
        };
        Ok(Locked {
            path: self.called(&output.path),
            tool: TOOL.to_owned(),
            recipe: self.recipe(index).to_string(),
            device: None,
            math: None,
            quality: report
                .quality
                .as_ref()
                .and_then(|quality| quality.beside.as_ref())
                .map(|beside| [beside.perplexity_ratio, beside.kld_mean, beside.top1_agreement]),
            made: report.hidden_states.as_ref().map(|states| states.made()),
            inputs: stamps(inputs, &report.inputs)?,
            outputs: stamps(&written, &report.outputs)?,
        })
    }
}

/// Collects what differs between two values: its path, and both of them.
fn differing(before: &Value, now: &Value, path: &str, found: &mut Vec<String>) {
    match (before, now) {
        (Value::Object(one), Value::Object(other)) => {
            let mut keys: Vec<&String> = one.keys().chain(other.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let null = Value::Null;
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                differing(one.get(key).unwrap_or(&null), other.get(key).unwrap_or(&null), &path, found);
            }
        }
        _ if before != now => found.push(format!("{path} was {before} and is {now}")),
        _ => {}
    }
}
