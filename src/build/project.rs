//! `quantc.toml`: a model, what is to be made of it, and how good that has to be.

use std::path::{Path, PathBuf};

use formats::container::file;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{HubName, cache};
use crate::error::{Error, Result};
use crate::job::Verification;
use crate::output::Place;
use crate::recipe::{Request, toml_error};
use crate::report::Limits;
use crate::report::gates::share;
use crate::targets::{Output, requested, resolved};

/// The version of the file's form that is read.
pub const VERSION: u32 = 1;

/// What stands in the file beside what a recipe may say.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Settings {
    /// The version of the file's form: 1.
    pub version: u32,
    /// A Hugging Face directory, a model's folder of a hub cache, or a GGUF file, seen from this file's folder; or org/name[@revision] of a
    /// model on the Hugging Face hub.
    pub model: PathBuf,
    /// Held-out text to measure the outputs on, or "none". A bundled text where it is not said.
    pub verify_text: Option<String>,
    /// Windows of up to 2048 tokens to measure: 8 where it is not said.
    pub verify_windows: Option<usize>,
    /// The most that the perplexity may be, as a ratio to the original's.
    pub max_ppl_ratio: Option<f64>,
    /// The most that the mean KL divergence from the original may be, in nats.
    pub max_kld: Option<f64>,
    /// The least share of tokens that output and original predict alike, from 0 to 1.
    pub min_top1: Option<f64>,
    /// An earlier output, or its report.json: the perplexity ratio and the mean KL divergence may not be worse.
    pub baseline: Option<PathBuf>,
    /// How much worse than the baseline's they may be, as "5%" or "0.05": 0 where it is not said.
    pub max_regression: Option<String>,
    /// Calibrate every target by itself, as if it were the only one.
    #[serde(default)]
    pub independent: bool,
}

/// The whole file, as its JSON Schema describes it.
#[derive(JsonSchema)]
#[expect(
    dead_code,
    reason = "read by its schema alone: serde refuses unknown keys only of parts that are not flattened"
)]
pub struct File {
    #[serde(flatten)]
    settings: Settings,
    #[serde(flatten)]
    recipe: Request,
}

/// The schema of the file.
pub fn schema() -> serde_json::Value {
    let mut schema = schemars::schema_for!(File).to_value();
    schema["title"] = "quantc.toml".into();
    schema
}

/// A file that was read.
pub struct Project {
    /// The `quantc.toml`; paths in it are seen from its folder.
    pub path: PathBuf,
    /// The model, as it is found from where the program runs. Where it is one on a hub that is not on this disk, its name.
    pub model: PathBuf,
    /// What the model is called on a hub, where the file names it so.
    pub hub: Option<HubName>,
    /// What is to be made of it.
    pub outputs: Vec<Output>,
    /// The output whose weights the stream sees.
    pub lead: usize,
    /// Every output is calibrated on a stream of its own.
    pub independent: bool,
    /// What to measure of every output; `None` where `verify_text` is `none`.
    pub verification: Option<Verification>,
}

impl Project {
    /// Reads the file, in which paths are seen from its own folder.
    ///
    /// Fails where it is none of the version that is known, says what is not known, or asks for what cannot be made.
    pub fn read(path: &Path) -> Result<Project> {
        let text = file::read_text(path, file::DESCRIPTION).map_err(Error::io(path, "read"))?;
        let mut recipe: toml::Table = toml::from_str(&text).map_err(|error| toml_error(path, &text, error))?;
        let mut own = toml::Table::new();
        let known = serde_json::to_value(Settings::default()).expect("plain data");
        for key in known.as_object().into_iter().flatten().map(|(key, _)| key) {
            if let Some(value) = recipe.remove(key) {
                own.insert(key.clone(), value);
            }
        }
        let shown = path.display();
        match own.get("version").map(|version| version.as_integer()) {
            Some(Some(version)) if version == i64::from(VERSION) => {}
            Some(_) => {
                return Err(Error::usage(format!(
                    "{shown}: its version is {}, and this program reads version {VERSION}; take the quantc that it was written for",
                    own["version"]
                )));
            }
            None => return Err(Error::usage(format!("{shown}: says no version; begin it with version = {VERSION}"))),
        }
        let wrong = |error: toml::de::Error| Error::usage(format!("{shown}: {}", error.message().replace('\n', ", ")));
        let settings: Settings = own.try_into().map_err(wrong)?;
        // The text is read once more where it is wrong, so that the message has the line.
        let request: Request = match recipe.try_into() {
            Ok(request) => request,
            Err(error) => {
                let own: Vec<&str> = known.as_object().into_iter().flatten().map(|(key, _)| &**key).collect();
                return Err(Error::usage(format!("{}; the project's own keys are {}", wrong(error), own.join(", "))));
            }
        };
        Project::of(path, settings, request)
    }

    fn of(path: &Path, settings: Settings, mut request: Request) -> Result<Project> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let within = |path: &Path| if folder == Path::new(".") { path.to_path_buf() } else { folder.join(path) };
        settle(&mut request, &within);
        let limits = Limits {
            max_ppl_ratio: settings.max_ppl_ratio,
            max_kld: settings.max_kld,
            min_top1: settings.min_top1,
            baseline: None,
        };
        let limits = match &settings.baseline {
            Some(baseline) => {
                let regression =
                    settings.max_regression.as_deref().map(|text| share("max_regression", text)).transpose()?;
                limits.relative(&within(baseline), regression.unwrap_or(0.0))?
            }
            None => limits,
        };
        limits.check()?;
        let text = settings
            .verify_text
            .map(|text| if within(Path::new(&text)).is_file() { shown(&within(Path::new(&text))) } else { text });
        let windows = settings.verify_windows.map(|windows| windows.max(1));
        let verification = Verification::asked(text.as_deref(), windows, limits, "verify_text = \"none\"")
            .map_err(|error| Error::usage(format!("{}: {error}", path.display())))?;
        if request.target.is_empty() {
            return Err(Error::usage(format!(
                "{}: names no output; say [[target]] with a path, and as many of them as you like",
                path.display()
            )));
        }
        let asked = requested(Request::default(), request, None, &[])?;
        let (outputs, lead) = resolved(asked, None)?;
        let lock = path.with_extension("lock");
        for output in &outputs {
            let written = [Some(&output.path), output.report.as_ref(), output.recipe.save_imatrix.as_ref()];
            for place in written.into_iter().flatten() {
                let same = |own: &Path| {
                    Place::resolve(place).ok().is_some_and(|place| Place::resolve(own).ok() == Some(place))
                };
                if same(path) || same(&lock) {
                    return Err(Error::usage(format!(
                        "{}: {} would be written over the project or its lock; choose another place",
                        path.display(),
                        place.display()
                    )));
                }
            }
        }
        let model = within(&settings.model);
        let (model, hub) = on_hub(&settings.model, &model)?.unwrap_or((model, None));
        let independent = settings.independent;
        Ok(Project { path: path.to_path_buf(), model, hub, outputs, lead, independent, verification })
    }

    /// Where it is kept what was made, and of what.
    pub fn lock(&self) -> PathBuf {
        self.path.with_extension("lock")
    }
}

/// What is said to be the model, as one on a hub: where the cache has it, or its name; `None` where the path that it is seen from the project is
/// meant.
fn on_hub(said: &Path, seen: &Path) -> Result<Option<(PathBuf, Option<HubName>)>> {
    let name = if seen.exists() { None } else { HubName::of(said)? };
    let Some(name) = name else { return Ok(None) };
    let cached = cache().and_then(|cache| name.cached(&cache)).filter(|cached| cached.lacks.is_none());
    if cached.is_none() && !said.starts_with("hf:") && seen.parent().is_some_and(Path::exists) {
        return Ok(None);
    }
    let place = cached.map_or_else(|| PathBuf::from(format!("hf://{name}")), |cached| cached.place);
    Ok(Some((place, Some(name))))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Makes paths of a request those that they are seen from elsewhere. Names of bundled texts are no paths.
fn settle(request: &mut Request, within: &dyn Fn(&Path) -> PathBuf) {
    let Request { adapter, imatrix, save_imatrix, tensor_type_file, report, path, .. } = request;
    for path in [adapter, imatrix, save_imatrix, tensor_type_file, report, path].into_iter().flatten() {
        *path = within(path);
    }
    if let Some(text) = request.calibration.as_mut().filter(|text| within(Path::new(&**text)).exists()) {
        *text = shown(&within(Path::new(&**text)));
    }
    request.target.iter_mut().for_each(|target| settle(target, within));
}
