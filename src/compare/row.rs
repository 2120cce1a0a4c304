//! What is found of one model, and how it is kept until the next call.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::numbers::Histogram;
use super::tasks::Tasks;
use crate::error::{Error, Result};
use crate::output::SideOutput;
use crate::output::hashing::hex;

/// Where a row is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Origin {
    /// The model that everything is made of.
    Original,
    /// Quantized here by a scheme.
    Scheme,
    /// Made elsewhere.
    Also,
}

/// One line of the table, and all that lies behind it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Row {
    /// The scheme as it was asked for, or what the checkpoint is called.
    pub name: String,
    /// Where it is from.
    pub origin: Origin,
    /// Why there is nothing to say of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Whether no other row is both smaller and closer to the original.
    #[serde(default)]
    pub pareto: bool,
    /// What was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<Box<Measurement>>,
}

/// What was measured of a model, on the files of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Measurement {
    /// Its files.
    #[serde(flatten)]
    pub files: Files,
    /// The recipe of a scheme.
    pub recipe: Option<Value>,
    /// The scheme whose quantized weights made the inputs that this one was calibrated on, where that is another.
    pub beside: Option<String>,
    /// What was found on the text.
    pub text: Figures,
    /// How its divergences are distributed.
    pub histogram: Histogram,
    /// What was found on the text of each domain.
    pub domains: Vec<Domain>,
    /// What it makes of questions.
    pub tasks: Option<Tasks>,
    /// Where it would say another token than the original in the passages that are shown.
    pub flips: Vec<ShownFlip>,
    /// The error of each linear that was quantized here.
    pub linears: Option<Vec<LinearError>>,
    /// What there is to say of it.
    pub notes: Vec<String>,
    /// Seconds that it took to quantize, of all schemes that were quantized together.
    pub seconds: Option<f64>,
}

/// The files of a model, as far as nothing runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Files {
    /// Where it is, or was.
    pub path: String,
    /// Bytes of its weight files.
    pub bytes: u64,
    /// Bits per weight of these files, over all weights of the original.
    pub bpw: f64,
    /// Bits per weight of the quantized linears, scales and zeros included; null where none is quantized.
    pub bpw_quantized: Option<f64>,
    /// How each tensor is stored.
    pub tensors: Vec<Stored>,
}

/// Figures on one text.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Figures {
    /// Tokens that were scored.
    pub tokens: usize,
    /// Tokens of a window.
    pub context: usize,
    /// Windows, of `context` tokens each.
    pub windows: usize,
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Standard error of the perplexity, tokens taken as independent.
    pub perplexity_stderr: f64,
    /// Perplexity over the original's.
    pub ratio: f64,
    /// Standard error of the ratio, from the difference token by token.
    pub ratio_stderr: f64,
    /// Mean `KL(original ‖ model)` in nats.
    pub kld_mean: f64,
    /// Standard error of the mean divergence, in nats.
    pub kld_stderr: f64,
    /// Median of the divergences, in nats.
    pub kld_median: f64,
    /// 99th percentile of the divergences, in nats.
    pub kld_p99: f64,
    /// The largest divergence, in nats.
    pub kld_max: f64,
    /// Share of tokens on which both would say the same.
    pub top1: f64,
    /// Standard error of that share, tokens taken as independent.
    pub top1_stderr: f64,
}

/// Figures on the text of a domain.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Domain {
    /// The domain.
    pub name: String,
    /// What was found.
    #[serde(flatten)]
    pub figures: Figures,
}

/// A token of a passage before which the model would say another than the original.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ShownFlip {
    /// Which passage.
    pub passage: usize,
    /// Which of its tokens.
    pub at: usize,
    /// What the original would say in its place, and what the model would.
    pub tokens: [String; 2],
    /// The probabilities of both by the original, and by the model.
    pub probabilities: [[f64; 2]; 2],
}

/// The error of a linear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LinearError {
    /// The module.
    pub name: String,
    /// The layer it stands in; null where its name has no number.
    pub layer: Option<usize>,
    /// What it is in its layer.
    pub part: String,
    /// Share of the output's energy that is lost; null where that was not looked at.
    pub relative_error: Option<f64>,
    /// Width of a code.
    pub bits: u8,
}

/// How a tensor is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Stored {
    /// Its Hugging Face name, whatever the format.
    pub name: String,
    /// How it is stored, as `quantc inspect` says it.
    pub kind: String,
    /// Number of values.
    pub values: u64,
    /// Stored bits per value, scales and zero points included.
    pub bpw: f64,
}

impl LinearError {
    /// That of a linear called `name`, of whose name the first number is the layer's.
    #[cfg_attr(doc, doc(hidden))]
    pub fn of(name: &str, relative_error: Option<f64>, bits: u8) -> LinearError {
        let parts: Vec<&str> = name.split('.').collect();
        let at = parts.iter().position(|part| part.parse::<usize>().is_ok());
        LinearError {
            name: name.to_owned(),
            layer: at.and_then(|at| parts[at].parse().ok()),
            part: at.map_or(name.to_owned(), |at| parts[at + 1..].join(".")),
            relative_error,
            bits,
        }
    }
}

/// SHA-256 of a value as it is written, lower-case hex.
pub fn digest(value: &Value) -> String {
    hex(&Sha256::digest(value.to_string()))
}

/// Something that is found again by what it was made of.
pub struct Kept {
    path: PathBuf,
    key: Value,
}

impl Kept {
    /// In this folder, called like `name`, made of what `key` says.
    pub fn of(folder: &Path, name: &str, key: Value) -> Kept {
        let path = folder.join(format!("{}-{}.json", slug(name), &digest(&key)[..12]));
        Kept { path, key }
    }

    /// What is kept of it; nothing where that was made of something else, or cannot be read.
    pub fn read<T: serde::de::DeserializeOwned>(&self) -> Option<T> {
        let mut whole: Value = serde_json::from_slice(&std::fs::read(&self.path).ok()?).ok()?;
        (whole["key"] == self.key).then(|| serde_json::from_value(whole["kept"].take()).ok())?
    }

    /// Keeps it, whole or not at all, and returns it as it will be read.
    pub fn write<T: Serialize + serde::de::DeserializeOwned>(&self, kept: &T) -> Result<T> {
        let whole = json!({ "key": self.key, "kept": kept });
        let folder = self.path.parent().expect("in a folder");
        std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        SideOutput::write(&self.path, whole.to_string().as_bytes())?.appear()?;
        self.read()
            .ok_or_else(|| Error::failed(format!("{}: what was written cannot be read back", self.path.display())))
    }
}

/// A name as part of a file's.
pub fn slug(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '-' };
    let slug: String = name.chars().take(60).map(plain).collect();
    slug.trim_start_matches(['.', '-']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_found_by_what_it_was_made_of() {
        let folder = tempfile::tempdir().unwrap();
        let row = Row { name: "a".into(), origin: Origin::Also, failed: None, pareto: false, found: None };
        let kept = Kept::of(folder.path(), "../a b", json!({"x": 1}));
        assert!(kept.read::<Row>().is_none());
        kept.write(&row).unwrap();
        assert_eq!(kept.read::<Row>().unwrap().name, "a");
        assert!(Kept::of(folder.path(), "../a b", json!({"x": 2})).read::<Row>().is_none());
        assert_eq!(slug("../a b"), "a-b");
        std::fs::write(&kept.path, "{").unwrap();
        assert!(kept.read::<Row>().is_none());
    }

    #[test]
    fn layers_are_told_from_what_stands_in_them() {
        let of = |name: &str| {
            let found = LinearError::of(name, None, 4);
            (found.layer, found.part)
        };
        assert_eq!(of("model.layers.11.mlp.experts.3.up_proj"), (Some(11), "mlp.experts.3.up_proj".to_owned()));
        assert_eq!(of("head"), (None, "head".to_owned()));
    }
}
