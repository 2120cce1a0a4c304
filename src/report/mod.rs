//! What was done, to what, how well: `report.json` for machines, the model card for people.
//!
//! What stands in a report is declared here, whoever finds it out.

mod card;
pub mod gates;
mod quality;
mod read;
mod states;

use calibration::samples::SampleSource;
use serde::{Deserialize, Serialize};

use crate::mixes::is_substitution;
use crate::recipe::Recipe;

pub use card::{Original, quality_text};
pub use quality::{Activations, Beside, Drafts, Limits, Measured, Protocol, Quality};
pub use read::{PAPERS, papers_beside, papers_of, projector_beside, read_report, report_of};
pub use states::{Embeddings, HiddenStates, Made, Scored, Scores, states_text};

/// A file and what is in it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct FileReport {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, lower-case hex.
    pub sha256: String,
}

/// What happens to one input tensor.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Fate {
    /// Becomes codes.
    Quantized,
    /// Goes over as it is.
    Copied,
    /// Goes over as it is, for it is no part of what is quantized.
    Aside(&'static str),
    /// Is another tensor's twin and not stored.
    Tied,
    /// Is left out, for this reason.
    Dropped(&'static str),
}

/// What becomes of a tensor of the input.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Quantized, copied, tied, or dropped and why.
    pub fate: Fate,
    /// Its type in a GGUF file.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub ty: Option<&'static str>,
}

/// What was merged, for the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct AdapterReport {
    /// Its directory.
    pub path: String,
    /// Its name on the hub with its commit, where it is from there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hub: Option<String>,
    /// `lora`, `rslora`, `dora` or `rsdora`.
    pub kind: &'static str,
    /// SHA-256 of adapter_model.safetensors, lower-case hex.
    pub sha256: String,
    /// Modules with a low-rank product.
    pub modules: usize,
    /// Tensors it brings whole.
    pub replaced: usize,
}

/// What became of one linear.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LinearReport {
    /// The module.
    pub name: String,
    /// The method that chose its codes.
    pub method: String,
    /// The type of its blocks, in a GGUF file.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub ty: Option<String>,
    /// Width of a code.
    pub bits: u8,
    /// Columns per scale; −1 for a whole row.
    pub group_size: i64,
    /// Symmetric grid.
    pub symmetric: bool,
    /// Calibration tokens that its input was seen on.
    pub tokens: usize,
    /// Share of what is known of an expert's input that came from tokens of the other experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prior: Option<f64>,
    /// Share of its input's channels that were 0 for all of these tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_inputs: Option<f64>,
    /// Relative damping that was used.
    pub damp: Option<f64>,
    /// What was done in place of what was asked for.
    pub fallback: Option<String>,
    /// `tr((W − Ŵ) H (W − Ŵ)ᵀ)` per token.
    pub proxy_loss: Option<f64>,
    /// Share of the output's energy that is lost.
    pub relative_error: Option<f64>,
    /// Whether its weights lay on a grid of this kind already, as after quantization-aware training, and scale and code of each were recovered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovered: Option<Recovery>,
    /// Share of its weights that are too small for the scales that the file stores, and lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<f64>,
    /// Time to choose its codes.
    pub seconds: f64,
}

/// How weights that lay on a grid already were recovered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recovery {
    /// Every weight to the bit, in the precision of the original.
    Exact,
    /// But for scales that the file's precision lacks, which are its nearest ones.
    NearestScales,
}

impl Recovery {
    /// Whether it is `exact`; of several parts the worst.
    pub fn of(exact: impl IntoIterator<Item = Option<bool>>) -> Option<Recovery> {
        let all: Option<Vec<bool>> = exact.into_iter().collect();
        let all = all.filter(|all| !all.is_empty())?;
        Some(if all.into_iter().all(|exact| exact) { Recovery::Exact } else { Recovery::NearestScales })
    }
}

/// Channel scales that were folded into the model before it was quantized.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SmoothingReport {
    /// What the scales were divided out of.
    pub producer: String,
    /// The linears that read them.
    pub readers: Vec<String>,
    /// The exponent of the activations' magnitude.
    pub alpha: f32,
    /// Rounding loss with the scales as a share of the loss without.
    pub loss_ratio: f64,
}

/// Seconds by stage.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Stages {
    /// Reading and widening weights.
    pub load: f64,
    /// Running the model.
    pub forward: f64,
    /// Gathering statistics of inputs.
    pub observe: f64,
    /// Searching channel scales.
    pub smooth: f64,
    /// Ordering and factoring Hessians.
    pub factor: f64,
    /// Searching scales, choosing codes, measuring the loss.
    pub solve: f64,
    /// Packing, and writing as far as it is not done behind the rest.
    pub write: f64,
}

/// Bits per weight.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct BitsPerWeight {
    /// Of the quantized linears alone, scales and zeros included.
    pub quantized: f64,
    /// Of the whole file, embeddings and norms included.
    pub file: f64,
    /// Of the whole file of the original.
    pub original_file: f64,
}

/// Whether the limits were kept.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Verdict {
    /// What was asked for.
    pub limits: Limits,
    /// Whether all were kept.
    pub passed: bool,
    /// What was missed.
    pub missed: Vec<String>,
}

impl Verdict {
    /// What becomes of limits beside what was measured; `None` where there are none.
    #[cfg_attr(doc, doc(hidden))]
    pub fn of(limits: Limits, quality: Option<&Quality>, states: Option<&HiddenStates>) -> Option<Verdict> {
        let missed = limits.missed(quality, states);
        limits.any().then_some(Verdict { limits, passed: missed.is_empty(), missed })
    }
}

/// Everything about one run.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Name and version of the program.
    pub tool: String,
    /// The device it ran on.
    pub device: String,
    /// The input.
    pub model: String,
    /// What it calls itself.
    pub name: String,
    /// The LoRA adapter that it was merged with; quality is measured against the merged model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterReport>,
    /// Its family.
    pub family: &'static str,
    /// Parameters in its tensors.
    pub parameters: u64,
    /// Its weight files.
    pub inputs: Vec<FileReport>,
    /// What was asked for and had an effect, defaults filled in; the scheme of a GGUF file is its mix.
    #[cfg_attr(doc, doc(hidden))]
    #[serde(serialize_with = "with_mix")]
    pub recipe: Recipe,
    /// The calibration text, if one was used.
    #[cfg_attr(doc, doc(hidden))]
    pub calibration: Option<SampleSource>,
    /// The weight files that were written.
    pub outputs: Vec<FileReport>,
    /// The file beside a GGUF file from which llama.cpp makes tokens of images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub projector: Option<FileReport>,
    /// Size.
    pub bpw: BitsPerWeight,
    /// Against the original, on held-out text.
    pub quality: Option<Quality>,
    /// Of a model that predicts no tokens, or scores texts by them, against the original, on held-out text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_states: Option<HiddenStates>,
    /// Limits on the quality.
    pub verdict: Option<Verdict>,
    /// Limits on who can load the output, and other things worth knowing.
    pub notes: Vec<String>,
    /// What a run that was interrupted had left at the output's place, and what became of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interrupted: Vec<String>,
    /// Every quantized linear.
    pub linears: Vec<LinearReport>,
    /// Every folded channel scale.
    pub smoothings: Vec<SmoothingReport>,
    /// Every input tensor.
    pub tensors: Vec<TensorReport>,
    /// Where the time went.
    pub seconds: Seconds,
    /// What was expected to be in memory at the most, mapped files apart; null where the device's memory is not the host's.
    pub expected_memory_bytes: Option<u64>,
    /// Largest resident set of the process, mapped files included.
    pub peak_memory_bytes: Option<u64>,
}

impl Report {
    /// Linears of which something went otherwise than asked; that a type's blocks do not divide their rows is not counted.
    pub fn fallbacks(&self) -> usize {
        let told = |linear: &&LinearReport| {
            linear.fallback.iter().flat_map(|all| all.split("; ")).any(|one| !is_substitution(one))
        };
        self.linears.iter().filter(told).count()
    }
}

/// A recipe that says what was done: without what had no effect, and with the mix in place of a width and a group, of which it has no
/// single ones.
fn with_mix<S: serde::Serializer>(recipe: &Recipe, serializer: S) -> Result<S::Ok, S::Error> {
    let mut value = serde_json::to_value(recipe).map_err(serde::ser::Error::custom)?;
    if let Some(gguf) = &recipe.gguf {
        value["scheme"] = gguf.mix.into();
    }
    if let Some(said) = value.as_object_mut() {
        recipe.idle.iter().for_each(|key| drop(said.shift_remove(*key)));
    }
    value.serialize(serializer)
}

/// Where the time went.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct Seconds {
    /// By stage of the compilation.
    #[serde(flatten)]
    pub stages: Stages,
    /// Tokenizing and hashing.
    pub prepare: f64,
    /// Reopening and evaluating.
    pub verify: f64,
    /// From start to end.
    pub total: f64,
}
