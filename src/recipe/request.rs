//! What a user asks for, by flags and in `recipe.toml`.

use std::path::{Path, PathBuf};

use clap::Args;
use formats::container::file;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::headings::{CALIBRATION, GGUF, METHOD, OUTPUT, SCHEME};
use super::llm_compressor;
use crate::error::{Error, Result};
use crate::words::one_line;

/// Under which headings the flags of `quantc quantize` stand in its help.
pub mod headings {
    /// What is written, and where.
    pub const OUTPUT: &str = "Output";
    /// How weights are represented.
    pub const SCHEME: &str = "Scheme";
    /// How codes are chosen.
    pub const METHOD: &str = "Method";
    /// What is seen of the model's inputs.
    pub const CALIBRATION: &str = "Calibration";
    /// What is measured, and what it has to keep.
    pub const VERIFICATION: &str = "Verification and limits";
    /// What only GGUF files have.
    pub const GGUF: &str = "GGUF";
    /// What a pipeline reads of a run.
    pub const PIPELINE: &str = "Pipelines";
    /// Where and how it is computed.
    pub const COMPUTATION: &str = "Computation";
}

/// Declares what can be asked for: each setting once, as flag of `quantc quantize` and as key of `recipe.toml`. What it says of itself is
/// the help of the flag.
macro_rules! request {
    ($(#[$of:meta])* pub struct $request:ident { $($(#[$about:meta])* pub $setting:ident: $kind:ty,)* }) => {
        $(#[$of])*
        pub struct $request {
            $($(#[$about])* pub $setting: $kind,)*
        }

        impl $request {
            /// This request, completed by `base` where it says nothing; of lists that may be given in parts it has its own, then those of
            /// `base`.
            pub fn or(self, base: $request) -> $request {
                $request { $($setting: self.$setting.over(base.$setting),)* }
            }
        }
    };
}

/// A setting that may be left to what lies behind it.
trait Setting {
    /// The setting, or that of `base` where there is none.
    fn over(self, base: Self) -> Self;
}

macro_rules! single {
    ($($kind:ty),*) => {
        $(impl Setting for Option<$kind> {
            fn over(self, base: Self) -> Self {
                self.or(base)
            }
        })*
    };
}

single!(String, PathBuf, bool, u8, i64, u64, usize, f64);

impl Setting for Option<Vec<String>> {
    fn over(self, base: Self) -> Self {
        match (self, base) {
            (Some(mut own), Some(more)) => {
                own.extend(more);
                Some(own)
            }
            (own, more) => own.or(more),
        }
    }
}

impl<T> Setting for Vec<T> {
    fn over(self, base: Self) -> Self {
        if self.is_empty() { base } else { self }
    }
}

request! {
    /// What a user asks for; every setting may come from `recipe.toml`, and a flag goes before the file.
    #[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[non_exhaustive]
    pub struct Request {
        /// Layout of the output: compressed-tensors, gptq, awq, mlx or gguf. [default: gguf if OUT ends in .gguf, else
        /// compressed-tensors]
        #[arg(long, help_heading = OUTPUT, value_name = "FORMAT")]
        pub format: Option<String>,
        /// W4A16, W8A16, W3A16 or W2A16, each also with _ASYM; groups of 128. For compressed-tensors also W8A8, FP8_DYNAMIC and
        /// NVFP4A16. For GGUF a mix as llama-quantize names it: Q4_K_M, Q5_K_S, Q6_K, Q8_0, IQ4_XS, F16 … [default: W4A16, Q4_K_M]
        #[arg(long, help_heading = SCHEME, value_name = "SCHEME")]
        pub scheme: Option<String>,
        /// Bits of a code, in place of what the scheme says: 2, 3, 4 or 8.
        #[arg(long, help_heading = SCHEME, value_name = "N")]
        pub bits: Option<u8>,
        /// Weights of a row that share a scale: 32, 64, 128, or -1 for the whole row; in place of what the scheme says.
        #[arg(long, help_heading = SCHEME, value_name = "N", allow_negative_numbers = true)]
        pub group_size: Option<i64>,
        /// Whether the zero is the middle code (true), or chosen for each group and stored (false); in place of what the scheme
        /// says.
        #[arg(long, help_heading = SCHEME, value_name = "BOOL")]
        pub symmetric: Option<bool>,
        /// rtn, awq, gptq or awq+gptq. [default: gptq; rtn with --imatrix]
        #[arg(long, help_heading = METHOD, value_name = "METHOD")]
        pub method: Option<String>,
        /// How scales are chosen: minmax, mse, imatrix or clip. [default: minmax for rtn, clip for awq, imatrix for gptq and
        /// where an imatrix is read or, with rtn, written]
        #[arg(long, help_heading = METHOD, value_name = "OBSERVER")]
        pub observer: Option<String>,
        /// Share of itself that is added to each diagonal entry of the Hessian. [default: 0.05]
        #[arg(long, help_heading = METHOD, value_name = "SHARE")]
        pub damp: Option<f64>,
        /// Whether GPTQ goes through the columns by falling importance (true) or from left to right (false). [default: true]
        #[arg(long, help_heading = METHOD, value_name = "BOOL")]
        pub act_order: Option<bool>,
        /// Whether scales and codes are changed once more after GPTQ, wherever that lowers the error of the output. [default:
        /// true]
        #[arg(long, help_heading = METHOD, value_name = "BOOL")]
        pub refine: Option<bool>,
        /// Form groups in the order in which columns are quantized, and store that order as g_idx (GPTQ only; vLLM and SGLang
        /// refuse such files).
        #[arg(long, help_heading = METHOD, num_args = 0, default_missing_value = "true")]
        pub desc_act: Option<bool>,
        /// Calibrate every expert of a mixture on all tokens, as llm-compressor does, instead of on those sent to it.
        #[arg(long, help_heading = CALIBRATION, num_args = 0, default_missing_value = "true")]
        pub moe_all_experts: Option<bool>,
        /// Linears to leave as they are: a module, the end of its name, or re: and a regular expression. Repeatable.
        #[arg(long, help_heading = SCHEME, value_name = "PATTERN")]
        pub ignore: Option<Vec<String>>,
        /// Let linears that vLLM and SGLang load as one matrix (q, k and v; gate and up) have several schemes, in files for transformers
        /// alone.
        #[arg(long, help_heading = SCHEME, num_args = 0, default_missing_value = "true")]
        pub allow_uneven: Option<bool>,
        /// Tensors that are not part of the model: copy them as they are, drop them, or refuse. A GGUF file never holds any. [default: copy]
        #[arg(long, help_heading = SCHEME, value_name = "copy|drop|refuse")]
        pub unknown_tensors: Option<String>,
        /// Layers that predict further tokens (MTP): quantize them as the others, keep them as they are, or drop them. [default: quantize]
        #[arg(long, help_heading = SCHEME, value_name = "quantize|keep|drop")]
        pub mtp: Option<String>,
        /// What sees or hears beside a language model: keep it whole, or quantize its linears without data, in a GGUF file's mmproj
        /// to Q8_0 or to the type that is said. [default: keep]
        #[arg(long, help_heading = SCHEME, value_name = "keep|quantize|TYPE")]
        pub towers: Option<String>,
        /// A LoRA adapter (PEFT's directory, or its name on the hub) to merge first; quality is measured against the merged model.
        #[arg(long, help_heading = CALIBRATION, value_name = "DIR")]
        pub adapter: Option<PathBuf>,
        /// Calibration text: .txt, .jsonl, .json, .csv, .tsv, .parquet, or a bundled preset. [default: mixed]
        #[arg(long, help_heading = CALIBRATION, value_name = "FILE|PRESET")]
        pub calibration: Option<String>,
        /// Number of calibration sequences. [default: 128]
        #[arg(long, help_heading = CALIBRATION, value_name = "N")]
        pub samples: Option<usize>,
        /// Tokens of each calibration sequence. [default: 2048]
        #[arg(long, help_heading = CALIBRATION, value_name = "N")]
        pub seq_len: Option<usize>,
        /// Seed with which the calibration sequences are chosen. [default: 0]
        #[arg(long, help_heading = CALIBRATION, value_name = "N")]
        pub seed: Option<u64>,
        /// GGUF: PATTERN=TYPE, a type for tensors whose name in the file matches. Repeatable.
        #[arg(long, help_heading = GGUF, value_name = "PATTERN=TYPE")]
        pub tensor_type: Option<Vec<String>>,
        /// GGUF: a file of such settings, one a line, as llama-quantize reads it; those of --tensor-type go before it.
        #[arg(long, help_heading = GGUF, value_name = "FILE")]
        pub tensor_type_file: Option<PathBuf>,
        /// GGUF: the type of the output projection.
        #[arg(long, help_heading = GGUF, value_name = "TYPE")]
        pub output_tensor_type: Option<String>,
        /// GGUF: the type of the token embedding.
        #[arg(long, help_heading = GGUF, value_name = "TYPE")]
        pub token_embedding_type: Option<String>,
        /// GGUF: give all tensors one type, without the exceptions of the mix.
        #[arg(long, help_heading = GGUF, num_args = 0, default_missing_value = "true")]
        pub pure: Option<bool>,
        /// GGUF: the pre-tokenizer's name, when it is not recognised.
        #[arg(long, help_heading = GGUF, value_name = "NAME")]
        pub pre: Option<String>,
        /// Take the importance of inputs from llama.cpp's .gguf or .dat instead of from calibration.
        #[arg(long, help_heading = CALIBRATION, value_name = "FILE")]
        pub imatrix: Option<PathBuf>,
        /// Write the importance of the inputs to this file, in the form that llama-quantize reads.
        #[arg(long, help_heading = CALIBRATION, value_name = "FILE")]
        pub save_imatrix: Option<PathBuf>,
        /// GGUF: write several files, each with at most this many bytes of tensors, as 500M or 5G.
        #[arg(long, help_heading = GGUF, value_name = "SIZE")]
        pub split_max_size: Option<String>,
        /// Settings for some linears; the first match wins. They have no flag.
        #[arg(skip)]
        #[serde(default, rename = "override")]
        pub overrides: Vec<Override>,
        /// Write the report here as well.
        #[arg(long, help_heading = OUTPUT, value_name = "FILE")]
        pub report: Option<PathBuf>,
        /// Of a target: where it goes. With flags it is -o, or part of --target.
        #[arg(skip)]
        pub path: Option<PathBuf>,
        /// Of a target: its weights are those that the inputs of each layer are made with. With flags it is the first --target.
        #[arg(skip)]
        pub lead: Option<bool>,
        /// Several outputs from one calibration, each with settings of its own before those around it. With flags it is --target.
        #[arg(skip)]
        #[serde(default)]
        pub target: Vec<Request>,
    }
}

/// Other settings for linears that match a pattern.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// Which linears: a module name, the end of one, or `re:` and a regular expression.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Leave them as they are.
    #[serde(default)]
    pub ignore: bool,
    /// Preset name.
    pub scheme: Option<String>,
    /// Width of a code.
    pub bits: Option<u8>,
    /// Columns per scale, −1 for whole rows.
    pub group_size: Option<i64>,
    /// Symmetric grids.
    pub symmetric: Option<bool>,
}

impl Request {
    /// Reads `recipe.toml`, or a `recipe.yaml` of llm-compressor. Unknown keys are errors.
    pub fn read(path: &Path) -> Result<Request> {
        let text = file::read_text(path, file::DESCRIPTION).map_err(Error::io(path, "read"))?;
        let ending = path.extension().unwrap_or_default().to_ascii_lowercase();
        if ending == "yaml" || ending == "yml" {
            return llm_compressor::read(&text)
                .map_err(|why| Error::usage(format!("{}: {}", path.display(), one_line(&why))));
        }
        toml::from_str(&text).map_err(|error| toml_error(path, &text, error))
    }
}

/// What to say of a file that is not the TOML that it should be: the line, and why.
pub fn toml_error(path: &Path, text: &str, error: toml::de::Error) -> Error {
    let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let found = text.lines().nth(line - 1).unwrap_or_default().trim();
    let mut why = error.message().replace('\n', ", ");
    // The names of Rust's types tell nothing to who writes TOML.
    for whole in ["u8", "usize", "i64", "u64"] {
        why = why.replace(&format!("expected {whole}"), "expected a whole number");
    }
    why = why.replace("expected f64", "expected a number");
    Error::usage(format!("{}, line {line}, `{found}`: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        request: Request,
    }

    fn asked(flags: &[&str], recipe: &str) -> Request {
        let line = Line::try_parse_from([&["quantize"], flags].concat()).unwrap();
        line.request.or(toml::from_str(recipe).unwrap())
    }

    #[test]
    fn a_flag_goes_before_the_file_and_the_file_before_nothing() {
        let recipe = "bits = 8\ndesc_act = true\npure = false\nadapter = 'a'\n[[override]]\nmatch = 'x'\nbits = 4";
        let request = asked(&["--bits", "3", "--pure", "--group-size", "-1"], recipe);
        assert_eq!((request.bits, request.group_size), (Some(3), Some(-1)));
        // A switch that is not there says nothing, and does not take back what the file says.
        assert_eq!([request.desc_act, request.pure, request.moe_all_experts], [Some(true), Some(true), None]);
        assert_eq!((request.adapter, request.overrides.len()), (Some(PathBuf::from("a")), 1));
        assert_eq!(asked(&["--desc-act"], "desc_act = false").desc_act, Some(true));
    }

    #[test]
    fn lists_of_flags_and_file_are_joined() {
        let request = asked(&["--ignore", "a", "--ignore", "b"], "ignore = ['c']\ntensor_type = ['x=Q8_0']");
        assert_eq!(request.ignore.unwrap(), ["a", "b", "c"]);
        assert_eq!(request.tensor_type.unwrap(), ["x=Q8_0"]);
        assert_eq!(asked(&[], "").ignore, None);
    }

    #[test]
    fn switches_take_no_value() {
        for wrong in [&["--pure=true"][..], &["--pure", "true"], &["--pure", "--pure"], &["--ignore"]] {
            assert!(Line::try_parse_from([&["quantize"], wrong].concat()).is_err(), "{wrong:?}");
        }
    }
}
