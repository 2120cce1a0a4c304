//! `quantc.toml`: a model, what is to be made of it, and how good that has to be.

use std::path::{Path, PathBuf};

use formats::container::file;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::Spanned;
use toml::de::DeTable;

use crate::checkpoint::{HubName, Sought, cache};
use crate::error::{Error, Result};
use crate::job::Verification;
use crate::output::Place;
use crate::recipe::{Request, toml_error};
use crate::report::gates::Bounds;
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
    /// Calibrate every target by itself, as if it were the only one.
    #[serde(default)]
    pub independent: bool,
    /// A recipe.toml, or a recipe.yaml of llm-compressor, with settings that this file does not have; paths in it are seen from this file's
    /// folder, too.
    pub recipe: Option<PathBuf>,
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
    bounds: Bounds,
    #[serde(flatten)]
    recipe: Request,
}

/// The keys of settings, in the order in which they are declared.
fn keys(of: &impl Serialize) -> Vec<String> {
    let all = serde_json::to_value(of).expect("plain data");
    all.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect()
}

/// The text with spaces in place of all keys but those that are `wanted`, and of their values: every line is still where it was.
fn only(text: &str, table: &Spanned<DeTable<'_>>, wanted: &dyn Fn(&str) -> bool) -> String {
    let mut left = text.as_bytes().to_vec();
    let others = table.get_ref().iter().filter(|(key, _)| !wanted(key.get_ref()));
    for (key, value) in others {
        let all = [key.span(), value.span()];
        let (start, end) = (all[0].start.min(all[1].start), all[0].end.max(all[1].end));
        left[start..end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
    }
    String::from_utf8(left).expect("spaces in place of whole values")
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
        let wrong = |error| toml_error(path, &text, error);
        let table = DeTable::parse(&text).map_err(wrong)?;
        let shown = path.display();
        match table.get_ref().get("version").map(|version| version.get_ref()) {
            Some(version) if version.as_integer().is_some_and(|version| version.as_str() == VERSION.to_string()) => {}
            Some(version) => {
                let found = version.as_integer().map_or("no number".to_owned(), |version| version.as_str().to_owned());
                return Err(Error::usage(format!(
                    "{shown}: its version is {found}, and this program reads version {VERSION}; take the quantc that it was written for"
                )));
            }
            None => return Err(Error::usage(format!("{shown}: says no version; begin it with version = {VERSION}"))),
        }
        let (own, bounds) = (keys(&Settings::default()), keys(&Bounds::default()));
        let settings = toml::from_str(&only(&text, &table, &|key| own.iter().any(|own| own == key))).map_err(wrong)?;
        let limits = toml::from_str(&only(&text, &table, &|key| bounds.iter().any(|own| own == key))).map_err(wrong)?;
        let rest = |key: &str| !own.iter().any(|own| own == key) && !bounds.iter().any(|own| own == key);
        let request: Request = toml::from_str(&only(&text, &table, &rest)).map_err(|error| {
            let own: Vec<&str> = own.iter().chain(&bounds).map(|key| &**key).collect();
            Error::usage(format!("{}; the project's own keys are {}", wrong(error), own.join(", ")))
        })?;
        Project::of(path, settings, &limits, request)
    }

    fn of(path: &Path, settings: Settings, bounds: &Bounds, mut request: Request) -> Result<Project> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let within = |path: &Path| if folder == Path::new(".") { path.to_path_buf() } else { folder.join(path) };
        let recipe = settings.recipe.as_deref().map(within);
        if let Some(recipe) = &recipe {
            request = request.or(Request::read(recipe)?);
        }
        let adapters = request.adapter.iter().chain(request.target.iter().flat_map(|target| &target.adapter));
        for adapter in adapters.filter(|adapter| !within(adapter).exists()) {
            if let Some(name) = HubName::of(adapter)? {
                return Err(Error::usage(format!(
                    "{}: adapter: there is no folder {}, and of an adapter on the hub the lock would not know what it was; download it \
                     (hf download {} --local-dir DIR) and name DIR",
                    path.display(),
                    adapter.display(),
                    name.id
                )));
            }
        }
        settle(&mut request, &within);
        let limits = bounds.limits(&within)?;
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
        let asked = requested(request, None, &[])?;
        let (outputs, lead) = resolved(asked, recipe.as_deref())?;
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
    let cached = cache().and_then(|cache| name.cached(&cache, Sought::Model)).filter(|cached| cached.lacks.is_none());
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
