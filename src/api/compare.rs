//! Comparing schemes, as it is asked for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::keys::keyed;
use super::{Compute, Located, bring_adapters, check_windows};
use crate::compare::{Asked, Compared, Comparison};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::recipe::Request;
use crate::targets::schemes;

/// Schemes that a model is quantized by, each measured beside the original, and a report of it all.
///
/// ```no_run
/// use quantc::{Compare, Progress};
/// let table = Compare::new("model", ["W4A16", "Q4_K_M"], "report").run(Progress::silent())?;
/// println!("{}", serde_json::to_string(&table)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", default)]
#[non_exhaustive]
pub struct Compare {
    /// A Hugging Face directory, a GGUF file, or `org/name[@revision]` of a model on the Hugging Face hub.
    pub model: PathBuf,
    /// What to make of it, each as `[FORMAT:]SCHEME[:gN]`; the request completes them, and the first one leads.
    pub schemes: Vec<String>,
    /// Checkpoints of the same model that were made elsewhere.
    pub also: Vec<PathBuf>,
    /// The folder of the report; rows that are finished are kept there, and a later run reuses them.
    pub folder: PathBuf,
    /// What is said for all schemes.
    #[serde(flatten)]
    pub request: Request,
    /// A file with such settings.
    pub recipe: Option<PathBuf>,
    /// A text, or the name of a bundled one; the bundled held-out text where it is not said.
    pub text: Option<String>,
    /// Tokens of a window, cut down to the model's positions: 2048 by default.
    pub context: usize,
    /// Windows of each text at most; all where it is not said.
    pub windows: Option<usize>,
    /// Questions with choices, a JSON record a line, or `none`; bundled ones where it is not said.
    pub tasks: Option<String>,
    /// Calibrate every scheme by itself, as if it were the only one.
    pub independent: bool,
    /// Leave what the schemes made in the folder of the report, under `work`.
    pub keep: bool,
    /// Where it is computed.
    #[serde(flatten)]
    pub compute: Compute,
}

keyed!(Compare);

impl Default for Compare {
    fn default() -> Compare {
        Compare {
            model: PathBuf::new(),
            schemes: Vec::new(),
            also: Vec::new(),
            folder: PathBuf::new(),
            request: Request::default(),
            recipe: None,
            text: None,
            context: 2048,
            windows: None,
            tasks: None,
            independent: false,
            keep: false,
            compute: Compute::default(),
        }
    }
}

impl Compare {
    /// Compares these schemes, and writes the report to `folder`.
    pub fn new<S: Into<String>>(
        model: impl Into<PathBuf>,
        schemes: impl IntoIterator<Item = S>,
        folder: impl Into<PathBuf>,
    ) -> Compare {
        let schemes = schemes.into_iter().map(Into::into).collect();
        Compare { model: model.into(), schemes, folder: folder.into(), ..Compare::default() }
    }

    /// Quantizes, measures, and writes the report. A row that fails says so, and the others go on.
    ///
    /// Fails where nothing can be compared: for a model that cannot be read or measured, and for places that cannot be written.
    pub fn run(&self, mut progress: Progress) -> Result<Compared> {
        check_windows(self.context, self.windows)?;
        if self.model.as_os_str().is_empty() || self.folder.as_os_str().is_empty() {
            return Err(Error::usage("a model and the folder of the report have to be named"));
        }
        let file = self.recipe.as_deref().map(Request::read).transpose()?.unwrap_or_default();
        let mut outputs = schemes(self.request.clone(), file, &self.schemes)?;
        outputs.iter_mut().for_each(|output| output.recipe.file = self.recipe.clone());
        bring_adapters(&mut outputs, &mut progress)?;
        let model = Located::whole(&self.model, &mut progress)?;
        let located = Located::all(&self.also, &mut progress)?;
        let also: Vec<PathBuf> = located.iter().map(|path| path.path().to_path_buf()).collect();
        let asked = Asked {
            text: self.text.as_deref(),
            context: self.context,
            windows: self.windows,
            tasks: self.tasks.as_deref(),
        };
        let comparison = Comparison {
            model: model.path(),
            schemes: self.schemes.iter().cloned().zip(outputs).collect(),
            also: &also,
            report: &self.folder,
            keep: self.keep,
            independent: self.independent,
            asked,
        };
        self.compute
            .run(&mut progress, |engine, progress| with_backend!(engine, backend => comparison.run(backend, progress)))
    }
}
