//! Compares schemes: one reading of a model, one calibration, every scheme written, opened again and measured beside one run of the
//! original, and a table of it all that says for whom it can be believed.

mod measure;
mod numbers;
mod page;
mod row;
mod shown;
mod spelling;
mod tasks;
mod texts;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kernels::Backend;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::families;
use crate::graph::Graph;
use crate::job::{Job, key};
use crate::output::{self, SideOutput, check_place};
use crate::progress::Progress;
use crate::report::Report;
use crate::targets::{Output, target};
use crate::words::called;

use measure::measure;
use numbers::pareto;
use row::{Kept, slug};
use texts::Material;

pub use numbers::Histogram;
pub use row::{Domain, Figures, Files, LinearError, Measurement, Origin, Row, ShownFlip, Stored};
pub use tasks::Tasks;
pub use texts::{Asked, DOMAINS, Passage};

/// What is to be compared.
pub struct Comparison<'a> {
    /// The model that everything is made of.
    pub model: &'a Path,
    /// The schemes as they were asked for, each with what it makes; where it is written is decided here.
    pub schemes: Vec<(String, Output)>,
    /// Checkpoints that were made elsewhere.
    pub also: &'a [PathBuf],
    /// The folder of the report.
    pub report: &'a Path,
    /// Leave what the schemes made in that folder.
    pub keep: bool,
    /// Calibrate every scheme by itself.
    pub independent: bool,
    /// What is measured on.
    pub asked: Asked<'a>,
}

/// All rows with what they have in common, as `compare.json` holds it.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct Compared {
    /// Name and version of the program.
    pub tool: String,
    /// The device it ran on.
    pub device: String,
    /// What the model calls itself.
    pub model: String,
    /// The text that the table is of.
    pub text: String,
    /// The questions that were asked, if any were.
    pub tasks: Option<String>,
    /// The original, then the schemes, then the others.
    pub rows: Vec<Row>,
    /// Where tokens that flip are shown.
    pub passages: Vec<Passage>,
    /// The questions, for who wants to see which answers changed.
    pub questions: Vec<AskedQuestion>,
    /// The decimal logarithms at which the bins of histograms begin and end, and how many bins a decade has.
    pub histogram: [i32; 3],
    /// What there is to say of texts and model.
    pub notes: Vec<String>,
}

/// A question of the table.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct AskedQuestion {
    /// What goes before the answer.
    pub prompt: String,
    /// The answers to choose from, in the file's order.
    pub choices: Vec<String>,
    /// Which of them is right.
    pub gold: usize,
}

/// What is known of an output once it is written, and what tells whether it is still that.
#[derive(Debug, Serialize, Deserialize)]
struct Made {
    /// Stamps of its files.
    files: Value,
    recipe: Value,
    beside: Option<String>,
    linears: Vec<LinearError>,
    notes: Vec<String>,
    seconds: f64,
}

/// A row that is wanted: found among those of an earlier call, or still to be found.
struct Wanted {
    kept: Kept,
    row: Row,
    done: bool,
}

/// What all rows have in common.
struct Common<'a> {
    source: &'a Checkpoint,
    graph: &'a Graph,
    material: &'a Material,
    /// Program, device, model and texts.
    key: Value,
}

impl Comparison<'_> {
    /// Quantizes, measures, and writes the report. A row that fails says so, and the others go on.
    ///
    /// Fails where nothing can be compared: for a model that cannot be read or measured, and for places that cannot be written.
    pub fn run<B: Backend>(mut self, backend: &B, progress: &mut Progress) -> Result<Compared> {
        self.check()?;
        let adapter = self.schemes.first().and_then(|(_, output)| output.recipe.adapter.clone());
        let source = Checkpoint::open_with(self.model, adapter.as_deref())?;
        let graph = families::graph_of(&source)?;
        families::check_runnable(&graph, &source)?;
        if graph.head.missing {
            return Err(Error::usage(format!(
                "{}: the model has no output projection, as its architectures say: there is nothing to compare",
                self.model.display()
            )));
        }
        let material = Material::of(&self.asked, &source)?;
        let key = json!({
            "program": key::of_program(backend),
            "model": key::of_model(&source),
            "adapter": adapter.as_ref().map(|_| key::of_recipe(&self.schemes[0].1.recipe)["adapter"].clone()),
            "measured": material.digest,
        });
        let common = Common { source: &source, graph: &graph, material: &material, key };
        std::fs::create_dir_all(self.report).map_err(Error::io(self.report, "create"))?;
        let folder = self.report.join("rows");
        let (work, mut places) = (self.report.join("work"), Vec::new());
        for (name, output) in &mut self.schemes {
            let ending = if output.recipe.gguf.is_some() { ".gguf" } else { "" };
            let of = &row::digest(&key::of_recipe(&output.recipe))[..8];
            output.path = work.join(format!("{}-{of}{ending}", slug(name)));
            places.push(output.path.clone());
        }
        let role = source.role().trim_start_matches("the ");
        let mut wanted = vec![Wanted::of(&folder, role, Origin::Original, common.key.clone())];
        let mut schemes = self.planned::<B>(&common, &folder)?;
        self.quantize(backend, &common, &mut schemes, progress)?;
        let mut also = self.others(&common, &folder);
        self.measure(backend, &common, (&mut wanted[0], &mut schemes, &mut also), progress)?;
        wanted.extend(schemes);
        wanted.extend(also);
        self.sweep(&work, &places)?;
        source.check_unchanged()?;
        let table = self.table(backend.name(), &source, material, wanted);
        self.write(&table)?;
        Ok(table)
    }

    /// Fails where two rows would be the same, or the report would lie in what is read.
    fn check(&self) -> Result<()> {
        if self.schemes.is_empty() && self.also.is_empty() {
            return Err(Error::usage(
                "there is nothing to compare the model with: give --scheme W4A16, or --also with a checkpoint made elsewhere",
            ));
        }
        for (index, (name, output)) in self.schemes.iter().enumerate() {
            if self.schemes[..index].iter().any(|(other, _)| other.eq_ignore_ascii_case(name)) {
                return Err(Error::usage(format!("--scheme {name} is given twice")));
            }
            if output.recipe.save_imatrix.is_some() {
                return Err(Error::usage("--save-imatrix is for quantize: compare keeps no more than its report"));
            }
        }
        let texts = [self.asked.text, self.asked.tasks].into_iter().flatten().map(Path::new);
        let read = [self.model].into_iter().chain(self.also.iter().map(PathBuf::as_path)).chain(texts);
        for input in read.filter(|path| path.exists()) {
            check_place(self.report, input)?;
        }
        Ok(())
    }

    /// A run that makes some of the schemes.
    fn job(&self, schemes: &[usize]) -> Job<'_> {
        Job {
            model: self.model,
            outputs: schemes.iter().map(|index| self.schemes[*index].1.clone()).collect(),
            lead: 0,
            independent: self.independent,
            verification: None,
            force: true,
            afresh: false,
            waits: false,
        }
    }

    /// The row of each scheme: found, to be found, or refused before any work.
    fn planned<B: Backend>(&self, common: &Common<'_>, folder: &Path) -> Result<Vec<Wanted>> {
        let plan = |(_, output): &(String, Output)| {
            target::<B>(common.graph, common.source, output.recipe.clone()).map(drop).err()
        };
        let refused: Vec<Option<Error>> = self.schemes.iter().map(plan).collect();
        let able: Vec<usize> = (0..refused.len()).filter(|index| refused[*index].is_none()).collect();
        let leads = self.leads::<B>(common, &able)?;
        let wanted = |((index, (name, _)), refused): ((usize, &(String, Output)), Option<Error>)| {
            let mut wanted = Wanted::of(folder, name, Origin::Scheme, self.key(common, index, leads.get(&index)));
            if let Some(error) = refused {
                wanted.fail(&error);
            }
            wanted
        };
        Ok(self.schemes.iter().enumerate().zip(refused).map(wanted).collect())
    }

    /// Of each of these schemes the one that it is calibrated beside, where that is another.
    fn leads<B: Backend>(&self, common: &Common<'_>, schemes: &[usize]) -> Result<BTreeMap<usize, usize>> {
        if schemes.is_empty() {
            return Ok(BTreeMap::new());
        }
        let leads = self.job(schemes).leads::<B>(common.graph, common.source)?;
        let both = leads.into_iter().enumerate().filter(|(own, lead)| own != lead);
        Ok(both.map(|(own, lead)| (schemes[own], schemes[lead])).collect())
    }

    /// What the row of a scheme depends on.
    fn key(&self, common: &Common<'_>, scheme: usize, lead: Option<&usize>) -> Value {
        let recipe = |scheme: usize| key::of_recipe(&self.schemes[scheme].1.recipe);
        json!({ "common": common.key, "scheme": recipe(scheme), "beside": lead.map(|lead| recipe(*lead)) })
    }

    /// What tells of an output that an earlier call has written.
    fn made(&self, common: &Common<'_>, scheme: usize, lead: Option<&usize>) -> Kept {
        let mut key = self.key(common, scheme, lead);
        // It is the same whatever it is measured on.
        key["common"]["measured"] = Value::Null;
        Kept::of(&self.report.join("work"), &self.schemes[scheme].0, key)
    }

    /// Writes the outputs of all schemes whose rows are still to be found, and tells what is known of each. One that fails does not
    /// keep the others from being written; who follows it is then calibrated beside another.
    fn quantize<B: Backend>(
        &self,
        backend: &B,
        common: &Common<'_>,
        rows: &mut [Wanted],
        progress: &mut Progress,
    ) -> Result<()> {
        loop {
            let able: Vec<usize> = (0..rows.len()).filter(|index| rows[*index].row.failed.is_none()).collect();
            let leads = self.leads::<B>(common, &able)?;
            let there = |index: &usize| self.written(common, *index, leads.get(index)).is_some();
            let missing: Vec<usize> =
                able.iter().copied().filter(|index| !rows[*index].done && !there(index)).collect();
            if missing.is_empty() {
                return Ok(());
            }
            // Whose weights make the inputs of another has to be there with it.
            let together: Vec<usize> = able
                .iter()
                .copied()
                .filter(|index| missing.contains(index) || missing.iter().any(|other| leads.get(other) == Some(index)))
                .collect();
            let reports = match self.job(&together).run(backend, progress) {
                Ok(reports) => reports,
                Err(error) if together.len() == 1 => {
                    rows[together[0]].fail(&error);
                    self.keyed_anew::<B>(common, rows)?;
                    continue;
                }
                Err(Error::Usage(why)) => return Err(Error::Usage(why)),
                Err(error) => {
                    progress.say(&format!("note: {error}; each scheme is now made by itself"));
                    self.one_by_one(backend, common, rows, &together, progress)?;
                    continue;
                }
            };
            for (index, report) in together.iter().zip(&reports) {
                self.note(common, *index, leads.get(index), report)?;
            }
        }
    }

    /// Finds out which of the schemes cannot be made, the one that leads first: its row says so.
    fn one_by_one<B: Backend>(
        &self,
        backend: &B,
        common: &Common<'_>,
        rows: &mut [Wanted],
        together: &[usize],
        progress: &mut Progress,
    ) -> Result<()> {
        for index in together {
            let leads = self.leads::<B>(common, together)?;
            let with: Vec<usize> = leads.get(index).copied().into_iter().chain([*index]).collect();
            match self.job(&with).run(backend, progress) {
                Ok(reports) => {
                    for (index, report) in with.iter().zip(&reports) {
                        self.note(common, *index, leads.get(index), report)?;
                    }
                }
                Err(error) => {
                    rows[*index].fail(&error);
                    return self.keyed_anew::<B>(common, rows);
                }
            }
        }
        Ok(())
    }

    /// After a scheme has failed, others may be calibrated beside another one.
    fn keyed_anew<B: Backend>(&self, common: &Common<'_>, rows: &mut [Wanted]) -> Result<()> {
        let able: Vec<usize> = (0..rows.len()).filter(|index| rows[*index].row.failed.is_none()).collect();
        let leads = self.leads::<B>(common, &able)?;
        let folder = self.report.join("rows");
        for index in able {
            let key = self.key(common, index, leads.get(&index));
            rows[index] = Wanted::of(&folder, &self.schemes[index].0, Origin::Scheme, key);
        }
        Ok(())
    }

    /// Keeps what is known of an output that was just written.
    fn note(&self, common: &Common<'_>, scheme: usize, lead: Option<&usize>, report: &Report) -> Result<()> {
        let linears = report.linears.iter();
        let made = Made {
            files: key::of_model(&opened(&self.schemes[scheme].1.path)?),
            recipe: serde_json::to_value(report).map_err(|e| Error::failed(e.to_string()))?["recipe"].take(),
            beside: lead.map(|lead| self.schemes[*lead].0.clone()),
            linears: linears.map(|l| LinearError::of(&l.name, l.relative_error, l.bits)).collect(),
            notes: report.notes.iter().filter(|note| !note.starts_with("calibrated beside ")).cloned().collect(),
            seconds: report.seconds.total,
        };
        self.made(common, scheme, lead).write(&made).map(drop)
    }

    /// What is known of an output that is there as it was written.
    fn written(&self, common: &Common<'_>, scheme: usize, lead: Option<&usize>) -> Option<Made> {
        let made: Made = self.made(common, scheme, lead).read()?;
        let there = opened(&self.schemes[scheme].1.path).ok()?;
        (key::of_model(&there) == made.files).then_some(made)
    }

    /// The rows of checkpoints that were made elsewhere.
    fn others(&self, common: &Common<'_>, folder: &Path) -> Vec<Wanted> {
        let name = |path: &PathBuf| path.display().to_string();
        let short = |path: &PathBuf| called(&name(path)).to_owned();
        let alone = |path: &PathBuf| self.also.iter().filter(|other| short(other) == short(path)).count() == 1;
        let of = |path: &PathBuf| {
            let label = if alone(path) { short(path) } else { name(path) };
            match Checkpoint::open(path) {
                Ok(model) => {
                    let key = json!({ "common": common.key, "also": name(path), "files": key::of_model(&model) });
                    Wanted::of(folder, &label, Origin::Also, key)
                }
                Err(error) => {
                    let mut wanted = Wanted::of(folder, &label, Origin::Also, json!({ "also": name(path) }));
                    wanted.fail(&error);
                    wanted
                }
            }
        };
        self.also.iter().map(of).collect()
    }

    /// Measures whatever is not measured yet, and keeps each row.
    fn measure<B: Backend>(
        &self,
        backend: &B,
        common: &Common<'_>,
        (original, schemes, also): (&mut Wanted, &mut [Wanted], &mut [Wanted]),
        progress: &mut Progress,
    ) -> Result<()> {
        let able: Vec<usize> = (0..schemes.len()).filter(|index| schemes[*index].row.failed.is_none()).collect();
        let leads = self.leads::<B>(common, &able)?;
        let paths = self.schemes.iter().map(|(_, output)| &output.path).chain(self.also);
        let mut open: Vec<(&mut Wanted, Checkpoint, Option<Made>)> = Vec::new();
        for (index, (wanted, path)) in schemes.iter_mut().chain(also.iter_mut()).zip(paths).enumerate() {
            if wanted.done || wanted.row.failed.is_some() {
                continue;
            }
            let made = if index < self.schemes.len() { self.written(common, index, leads.get(&index)) } else { None };
            match self.comparable(path, common) {
                Ok(model) => open.push((wanted, model, made)),
                Err(error) => wanted.fail(&error),
            }
        }
        let models: Vec<&Checkpoint> = open.iter().map(|(_, model, _)| model).collect();
        let sides = (common.source, common.graph);
        let found = measure(backend, sides, &models, common.material, progress);
        for ((wanted, _, made), found) in open.iter_mut().zip(found) {
            let [mut own, reference] = match found {
                Ok(pair) => pair,
                Err(error) => {
                    wanted.fail(&error);
                    continue;
                }
            };
            if !original.done {
                original.finish(reference)?;
            }
            if let Some(made) = made.take() {
                own.notes.extend(made.notes);
                (own.recipe, own.beside) = (Some(made.recipe), made.beside);
                (own.linears, own.seconds) = (Some(made.linears), Some(made.seconds));
            }
            wanted.finish(own)?;
        }
        if !original.done {
            let [_, reference] = measure(backend, sides, &[common.source], common.material, progress).remove(0)?;
            original.finish(reference)?;
        }
        Ok(())
    }

    /// Opens a model that is to be measured. Fails where it turns the texts into other tokens than the original.
    fn comparable(&self, path: &Path, common: &Common<'_>) -> Result<Checkpoint> {
        let model = opened(path)?;
        if Material::of(&self.asked, &model)?.digest != common.material.digest {
            return Err(Error::failed(format!(
                "{} turns the texts into other tokens than {}: they cannot be compared",
                path.display(),
                self.model.display()
            )));
        }
        Ok(model)
    }

    /// Removes what the schemes made, unless it is to be kept or an earlier call was to keep it; what cannot be removed stays.
    fn sweep(&self, work: &Path, places: &[PathBuf]) -> Result<()> {
        let list = work.join("kept.json");
        let stem = |path: &Path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.trim_end_matches(".gguf").to_owned()
        };
        let read = std::fs::read(&list).ok().and_then(|bytes| serde_json::from_slice::<Vec<String>>(&bytes).ok());
        let mut kept = read.unwrap_or_default();
        if self.keep && !places.is_empty() && work.exists() {
            kept.extend(places.iter().map(|place| stem(place)));
            kept.sort();
            kept.dedup();
            return SideOutput::write(&list, json!(kept).to_string().as_bytes())?.appear();
        }
        let _ = output::clean(work, false);
        let ours = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            // An output, its parts and its report begin alike, and what is known of it is called like its scheme.
            let of = |(place, (scheme, _)): (&PathBuf, &(String, Output))| {
                let made = |rest: &str| rest.len() == 18 && rest.starts_with('-') && rest.ends_with(".json");
                !kept.contains(&stem(place))
                    && (name.starts_with(&stem(place)) || name.strip_prefix(&slug(scheme)).is_some_and(made))
            };
            places.iter().zip(&self.schemes).any(of)
        };
        let listed = std::fs::read_dir(work).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        for path in listed.filter(ours) {
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
        let _ = std::fs::remove_dir(work);
        Ok(())
    }

    fn table(&self, device: String, source: &Checkpoint, material: Material, wanted: Vec<Wanted>) -> Compared {
        let mut rows: Vec<Row> = wanted.into_iter().map(|wanted| wanted.row).collect();
        let pair = |row: &Row| row.found.as_ref().map(|found| (found.files.bytes as f64, found.text.kld_mean));
        let front = pareto(&rows.iter().map(pair).collect::<Vec<_>>());
        rows.iter_mut().zip(front).for_each(|(row, on)| row.pareto = on);
        let question = |question: tasks::Question| {
            let tasks::Question { prompt, choices, gold } = question;
            AskedQuestion { prompt, choices, gold }
        };
        Compared {
            tool: concat!("quantc ", env!("CARGO_PKG_VERSION")).to_owned(),
            device,
            model: source.name(),
            text: called(&material.text.name).to_owned(),
            tasks: material.tasks,
            rows,
            passages: material.passages,
            questions: material.questions.into_iter().map(question).collect(),
            histogram: [numbers::Histogram::RANGE[0], numbers::Histogram::RANGE[1], numbers::Histogram::PER_DECADE],
            notes: material.notes,
        }
    }

    /// Writes the report in all its forms, each of which appears whole.
    fn write(&self, table: &Compared) -> Result<()> {
        let json = serde_json::to_string_pretty(table).map_err(|e| Error::failed(e.to_string()))?;
        let forms =
            [("md", table.markdown()), ("csv", table.csv()), ("html", page::page(table)?), ("json", json + "\n")];
        let write = |(ending, content): (&str, String)| {
            SideOutput::write(&self.report.join(format!("compare.{ending}")), content.as_bytes())
        };
        let written = forms.into_iter().map(write).collect::<Result<Vec<SideOutput>>>()?;
        written.into_iter().try_for_each(SideOutput::appear)
    }
}

impl Wanted {
    fn of(folder: &Path, name: &str, origin: Origin, key: Value) -> Wanted {
        let kept = Kept::of(folder, name, key);
        let found = kept.read::<Row>();
        let done = found.is_some();
        let new = Row { name: String::new(), origin, failed: None, pareto: false, found: None };
        let row = Row { name: name.to_owned(), ..found.unwrap_or(new) };
        Wanted { kept, row, done }
    }

    fn fail(&mut self, error: &Error) {
        (self.row.failed, self.row.found, self.done) = (Some(error.to_string()), None, false);
    }

    /// Keeps what was found.
    fn finish(&mut self, found: Measurement) -> Result<()> {
        self.row.found = Some(Box::new(found));
        // As a later call will read it, so that both write the same report.
        self.row = self.kept.write(&self.row)?;
        self.done = true;
        Ok(())
    }
}

/// Opens an output; of a GGUF file in parts the first.
fn opened(path: &Path) -> Result<Checkpoint> {
    if path.exists() || path.extension().is_none_or(|ending| ending != "gguf") {
        return Checkpoint::open(path);
    }
    let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let first = format!("{name}-00001-of-");
    let folder = path.parent().unwrap_or(Path::new("."));
    let listed = std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let part = { listed }.find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&first)));
    Checkpoint::open(part.as_deref().unwrap_or(path))
}

impl Compared {
    /// Rows of which there is nothing to say, and why.
    pub fn failed(&self) -> impl Iterator<Item = (&str, &str)> {
        self.rows.iter().filter_map(|row| Some((&row.name[..], row.failed.as_deref()?)))
    }
}
