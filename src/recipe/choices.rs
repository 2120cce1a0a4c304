//! What to do with parts of a checkpoint that not every model has.

use formats::GgmlType;
use serde::{Serialize, Serializer};

use super::named;
use crate::error::{Error, Result};

/// What to do with tensors that no rule of the model's family names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum UnknownTensors {
    /// They go over as they are.
    #[default]
    Copy,
    /// They are left out.
    Drop,
    /// They are an error.
    Refuse,
}

impl UnknownTensors {
    /// Every choice, with the name users type.
    pub const ALL: &[(&str, UnknownTensors)] =
        &[("copy", UnknownTensors::Copy), ("drop", UnknownTensors::Drop), ("refuse", UnknownTensors::Refuse)];
}

/// What to do with layers that predict further tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mtp {
    /// They are quantized as the others are, where it is known what they compute.
    #[default]
    Quantize,
    /// They go over as they are.
    Keep,
    /// They are left out.
    Drop,
}

impl Mtp {
    /// Every choice, with the name users type.
    pub const ALL: &[(&str, Mtp)] = &[("quantize", Mtp::Quantize), ("keep", Mtp::Keep), ("drop", Mtp::Drop)];
}

/// The choice of this name.
pub fn unknown_tensors(name: Option<&str>) -> Result<UnknownTensors> {
    name.map_or(Ok(UnknownTensors::default()), |name| named("--unknown-tensors", UnknownTensors::ALL, name))
}

/// What to do with matrices of what sees or hears beside a language model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Towers {
    /// They stay whole.
    #[default]
    Keep,
    /// They are rounded without data: as the language model is, and in a GGUF file's `mmproj` to Q8_0.
    Quantize,
    /// They get this of ggml's types in a GGUF file's `mmproj`.
    As(&'static str),
}

impl Towers {
    /// The choice of this name; `format` is what is written.
    ///
    /// Fails for what is no choice, for a type where no GGUF file is written, and for a layout whose codes no runtime looks for in towers.
    pub fn parse(name: &str, format: &str) -> Result<Towers> {
        let is = |known: &str| name.eq_ignore_ascii_case(known);
        let choice = match GgmlType::from_name(name) {
            _ if is("keep") => return Ok(Towers::Keep),
            _ if is("quantize") => Towers::Quantize,
            Some(ty) if ty.encode(&vec![0.0; ty.block_len], &mut vec![0; ty.block_bytes]).is_some() => {
                Towers::As(ty.name)
            }
            Some(ty) => {
                return Err(Error::usage(format!(
                    "--towers {ty}: what sees is rounded without a search for scales, as to Q8_0, Q5_1 or Q4_0"
                )));
            }
            None => {
                return Err(Error::usage(format!(
                    "--towers `{name}` is not known; there are keep, quantize and, for GGUF, a type as Q8_0"
                )));
            }
        };
        match (choice, format) {
            (_, "gguf") | (Towers::Quantize, "compressed-tensors") => Ok(choice),
            (Towers::As(ty), _) => Err(Error::usage(format!(
                "--towers {ty} is for GGUF files, and the format is {format}; say --towers quantize for compressed-tensors"
            ))),
            _ => Err(Error::usage(format!(
                "--towers quantize is for compressed-tensors and GGUF files, and the format is {format}, whose codes runtimes look for in \
                 language models alone"
            ))),
        }
    }

    /// The type of matrices in a GGUF file's `mmproj`, where it is not the checkpoint's own.
    pub fn ggml(self) -> Option<GgmlType> {
        match self {
            Towers::Keep => None,
            Towers::Quantize => GgmlType::from_name("Q8_0"),
            Towers::As(name) => GgmlType::from_name(name),
        }
    }
}

impl Serialize for Towers {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Towers::Keep => "keep",
            Towers::Quantize => "quantize",
            Towers::As(ty) => ty,
        })
    }
}
