//! Measuring models, as it is asked for.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::keys::keyed;
use super::{Compute, Located, check_windows};
use crate::error::{Error, Result};
use crate::eval::{Evaluated, Evaluation};
use crate::progress::Progress;
use crate::recipe::named;
use crate::report::gates::Bounds;
use crate::report::{Activations, Protocol};

/// Models whose perplexity is to be measured, and their divergence from a reference.
///
/// ```no_run
/// use quantc::{Evaluate, Progress};
/// let mut ask = Evaluate::new(["model-w4"]);
/// ask.reference = Some("model".into());
/// let found = ask.run(Progress::silent())?;
/// println!("{:?}", found.models[0].quality.as_ref().map(|quality| quality.perplexity));
/// # Ok::<(), quantc::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", default)]
#[non_exhaustive]
pub struct Evaluate {
    /// The models, at least one: each a Hugging Face directory, quantized or not, a GGUF file, or `org/name[@revision]` of a model on
    /// the Hugging Face hub.
    pub models: Vec<PathBuf>,
    /// A LoRA adapter to merge into the one model: a folder, or its name on the hub.
    pub adapter: Option<PathBuf>,
    /// The original model, to compare with.
    pub reference: Option<PathBuf>,
    /// A LoRA adapter to merge into the reference: a folder, or its name on the hub.
    pub reference_adapter: Option<PathBuf>,
    /// A text, or the name of a bundled one; the bundled held-out text where it is not said.
    pub text: Option<String>,
    /// Tokens of a window, cut down to the model's positions: 2048 by default.
    pub context: usize,
    /// Windows at most; all where it is not said.
    pub windows: Option<usize>,
    /// `papers` (all tokens but the first of each window) or `llama.cpp` (the second half of each window); `papers` by default.
    pub protocol: String,
    /// `exact` or `runtime`: whether what linears read is rounded as the runtime does. What each model says where it is not said.
    pub activations: Option<String>,
    /// Limits on the quality, which need a reference.
    #[serde(flatten)]
    pub bounds: Bounds,
    /// Where it is computed.
    #[serde(flatten)]
    pub compute: Compute,
}

keyed!(Evaluate);

impl Default for Evaluate {
    fn default() -> Evaluate {
        Evaluate {
            models: Vec::new(),
            adapter: None,
            reference: None,
            reference_adapter: None,
            text: None,
            context: 2048,
            windows: None,
            protocol: "papers".to_owned(),
            activations: None,
            bounds: Bounds::default(),
            compute: Compute::default(),
        }
    }
}

impl Evaluate {
    /// Measures these models, each by itself.
    pub fn new<P: Into<PathBuf>>(models: impl IntoIterator<Item = P>) -> Evaluate {
        Evaluate { models: models.into_iter().map(Into::into).collect(), ..Evaluate::default() }
    }

    /// Measures them. Limits that are missed are told in the result.
    ///
    /// Fails for limits without a reference, for one adapter with several models, and for models that make other tokens of the text than
    /// the rest, all before anything runs.
    pub fn run(&self, mut progress: Progress) -> Result<Evaluated> {
        check_windows(self.context, self.windows)?;
        if self.models.is_empty() {
            return Err(Error::usage("no model is named"));
        }
        let located = Located::all(&self.models, &mut progress)?;
        let models: Vec<PathBuf> = located.iter().map(|model| model.path().to_path_buf()).collect();
        let reference = self.reference.as_deref().map(|path| Located::whole(path, &mut progress)).transpose()?;
        let mut adapter = |adapter: &Option<PathBuf>| {
            adapter.as_deref().map(|path| Located::adapter(path, &mut progress)).transpose()
        };
        let (own, of_reference) = (adapter(&self.adapter)?, adapter(&self.reference_adapter)?);
        let activations = self.activations.as_deref();
        let asked = Evaluation {
            models: &models,
            adapter: own.as_deref(),
            reference: reference.as_ref().map(Located::path),
            reference_adapter: of_reference.as_deref(),
            text: self.text.as_deref(),
            context: self.context,
            windows: self.windows,
            protocol: named("protocol", Protocol::ALL, &self.protocol)?,
            activations: activations.map(|name| named("activations", Activations::ALL, name)).transpose()?,
            limits: self.bounds.limits(&Path::to_path_buf)?,
        };
        self.compute
            .run(&mut progress, |engine, progress| with_backend!(engine, backend => asked.run(backend, progress)))
    }
}
