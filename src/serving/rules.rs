//! What runtimes and generations of GPUs ask of an output, found out before it is made.
//!
//! Read in vLLM 0.32 (`compressed_tensors.py` and its schemes, `auto_gptq.py`, `auto_awq.py`, the kernels under `kernels/linear`) and in SGLang
//! 0.5.23 (`layers/quantization`). What a runtime cannot make of a model's class is said by [`runtimes`](crate::runtimes) whichever runtime is
//! named.

use std::collections::BTreeMap;

use formats::Encoding;
use serde::Serialize;

use super::{Held, Runtime, unequal};
use crate::error::{Error, Result};
use crate::words::listed;

/// Something that a runtime or a GPU will not do with an output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// Whether the output does not load or run at all; otherwise it does so in another way than one may expect.
    pub refused: bool,
    /// What, and what to do.
    pub text: String,
}

impl Finding {
    fn refused(text: impl Into<String>) -> Finding {
        Finding { refused: true, text: text.into() }
    }

    fn told(text: impl Into<String>) -> Finding {
        Finding { refused: false, text: text.into() }
    }
}

/// A generation of NVIDIA's GPUs, by its compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gpu(pub u32);

/// Names that people have for generations and cards, and their compute capability, ten times over.
const GPUS: &[(&[&str], u32)] = &[
    (&["pascal", "p100", "p40", "gtx1080"], 61),
    (&["volta", "v100"], 70),
    (&["turing", "t4", "rtx20"], 75),
    (&["ampere", "a100", "a30"], 80),
    (&["a10", "a40", "a6000", "rtx30", "rtx3090", "rtx3060"], 86),
    (&["ada", "l4", "l40", "l40s", "rtx40", "rtx4090", "rtx4060"], 89),
    (&["hopper", "h100", "h200", "gh200"], 90),
    (&["blackwell", "b100", "b200", "gb200", "b300"], 100),
    (&["rtx50", "rtx5090", "rtx5080", "rtxpro6000"], 120),
];

impl Gpu {
    /// A generation or card by its name, or a capability as `8.9` or `sm_89`. Fails for anything else.
    pub fn parse(text: &str) -> Result<Gpu> {
        let bare = text.to_ascii_lowercase().replace([' ', '-', '_'], "");
        let named = GPUS.iter().find(|(names, _)| names.contains(&&*bare)).map(|(_, capability)| *capability);
        let number = bare.trim_start_matches("sm").replace('.', "");
        let counted = number.parse().ok().filter(|capability| (30..=200).contains(capability));
        named.or(counted).map(Gpu).ok_or_else(|| {
            let names: Vec<&str> = GPUS.iter().map(|(names, _)| names[0]).collect();
            Error::usage(format!(
                "--gpu `{text}` is not known: say {}, or a compute capability as 8.9",
                names.join(", ")
            ))
        })
    }
}

impl std::fmt::Display for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "compute capability {}.{}", self.0 / 10, self.0 % 10)
    }
}

/// What `runtime`, on a GPU of this generation if one is named, will not do with an output.
pub fn lint(held: &Held<'_>, runtime: Runtime, gpu: Option<Gpu>) -> Vec<Finding> {
    let (format, name) = (held.format, runtime.name());
    let mut all: Vec<Finding> = of_format(format, runtime).into_iter().collect();
    if all.iter().any(|finding| finding.refused) {
        return all;
    }
    all.extend(of_encodings(held, runtime, gpu));
    let grouped = || held.encodings.values().flatten().any(|encoding| encoding.group() > 0);
    if held.desc_act && matches!(runtime, Runtime::Vllm | Runtime::Sglang) && grouped() {
        all.push(Finding::refused(format!(
            "{name} refuses desc_act with groups: leave --desc-act out, or give --group-size -1"
        )));
    }
    if let (Runtime::Vllm | Runtime::Sglang, true) = (runtime, format != "gguf") {
        let of = |linear: &crate::graph::Linear| held.of(linear).to_vec();
        all.extend(unequal(held.graph, of).map(|(group, count)| {
            let modules: Vec<&str> = group.iter().map(|linear| &*linear.module).collect();
            let more = if count > 1 { format!(", and {} more such groups", count - 1) } else { String::new() };
            Finding::refused(format!(
                "{name} loads {} as one matrix, which must have one scheme, and they have several{more}: give them one, or leave all of them out \
                 with --ignore",
                listed(&modules)
            ))
        }));
    }
    all
}

/// Whether a runtime reads a layout at all.
fn of_format(format: &str, runtime: Runtime) -> Option<Finding> {
    let name = runtime.name();
    match (runtime, format) {
        (Runtime::LlamaCpp, "gguf") | (Runtime::Mlx, "mlx") => None,
        (Runtime::LlamaCpp, _) => {
            Some(Finding::refused(format!("{name} reads GGUF alone: give -o NAME.gguf with a type as --scheme Q4_K_M")))
        }
        (Runtime::Mlx, _) => Some(Finding::refused(format!("{name} reads its own layout: give --format mlx"))),
        (_, "mlx") => Some(Finding::refused(format!(
            "{name} does not read mlx-lm's layout: leave --format out, which gives compressed-tensors"
        ))),
        (Runtime::Vllm, "gguf") => Some(Finding::told(
            "vLLM 0.32 reads GGUF through a plugin of its own (vllm-gguf-plugin) and slowly; compressed-tensors is what it is made for",
        )),
        (Runtime::Transformers, "gguf") => Some(Finding::told(
            "transformers turns GGUF back into 16 or 32 bits as it loads it, which takes the memory of the original",
        )),
        _ => None,
    }
}

/// What a runtime does with each way to hold a weight, said once for all linears that are held so.
fn of_encodings(held: &Held<'_>, runtime: Runtime, gpu: Option<Gpu>) -> Vec<Finding> {
    let mut linears: BTreeMap<String, (Encoding, Vec<&str>)> = BTreeMap::new();
    for linear in held.graph.linears() {
        for encoding in held.of(linear) {
            let entry = linears.entry(format!("{encoding:?}")).or_insert_with(|| (*encoding, Vec::new()));
            entry.1.push(&linear.module);
        }
    }
    let mut found: Vec<Finding> = Vec::new();
    for (encoding, modules) in linears.values() {
        let facts = of_encoding(held.format, encoding, runtime).into_iter();
        for finding in facts.chain(gpu.and_then(|gpu| on_gpu(encoding, runtime, gpu))) {
            let text = format!("{} ({})", finding.text, listed(modules));
            if !found.iter().any(|other| other.text == text) {
                found.push(Finding { text, ..finding });
            }
        }
    }
    found
}

fn of_encoding(format: &str, encoding: &Encoding, runtime: Runtime) -> Option<Finding> {
    let name = runtime.name();
    let scheme = encoding.scheme().filter(|_| encoding.activation.is_none());
    let (bits, symmetric) = (encoding.levels.bits(), scheme.is_none_or(|scheme| scheme.symmetric));
    match (runtime, format) {
        (Runtime::Vllm | Runtime::Sglang, "gptq") if !matches!(bits, 4 | 8) => {
            Some(Finding::refused(format!("{name} reads GPTQ of 4 and 8 bits, not of {bits}")))
        }
        (Runtime::Vllm | Runtime::Sglang, "gptq") if !symmetric => Some(Finding::refused(format!(
            "{name} reads GPTQ with symmetric grids alone: give --symmetric true, or --format awq or compressed-tensors"
        ))),
        (Runtime::Vllm, "awq") if bits != 4 => Some(Finding::refused(format!(
            "vLLM reads AWQ of 4 bits, not of {bits}: leave --format out, or give --format gptq"
        ))),
        (Runtime::Sglang, "compressed-tensors") if scheme.is_some() && !matches!(bits, 4 | 8) => {
            Some(Finding::refused(format!("SGLang reads compressed-tensors of 4 and 8 bits, not of {bits}")))
        }
        // Marlin has unsigned codes with zeros of 4 bits, and codes around 0 of 4 and 8.
        (Runtime::Vllm, "compressed-tensors") if scheme.is_some() && !(bits == 4 || bits == 8 && symmetric) => {
            let kind = if symmetric { "" } else { ", with zero points" };
            Some(Finding::told(format!(
                "vLLM's own kernels hold 4 bits, and 8 bits with symmetric grids; {bits} bits{kind} need the package humming-kernels beside it"
            )))
        }
        (Runtime::Transformers, "gptq" | "awq") => {
            Some(Finding::told(format!("transformers loads {} through the package gptqmodel", format.to_uppercase())))
        }
        (Runtime::Transformers, "compressed-tensors") => Some(Finding::told(
            "transformers loads it through the package compressed-tensors and unpacks every weight as it is used, which is slow",
        )),
        _ => None,
    }
}

/// What a GPU of this generation lacks for weights held so.
fn on_gpu(encoding: &Encoding, runtime: Runtime, gpu: Gpu) -> Option<Finding> {
    if !matches!(runtime, Runtime::Vllm | Runtime::Sglang) || encoding.ggml_type().is_some() {
        return None;
    }
    let name = runtime.name();
    if gpu < Gpu(75) {
        return Some(Finding::refused(format!(
            "{name} has no kernels for packed weights on GPUs of {gpu}; it takes 7.5 (Turing) or later"
        )));
    }
    match encoding.name() {
        Some(preset) if preset.starts_with("FP8") && gpu < Gpu(89) => Some(Finding::told(format!(
            "GPUs of {gpu} do not multiply FP8: {name} keeps the weights so and multiplies in 16 bits; 8.9 (Ada) and later do"
        ))),
        Some("W8A8") if gpu >= Gpu(100) => Some(Finding::refused(format!(
            "{name} has no products of 8-bit integers on GPUs of {gpu} (Blackwell): give --scheme FP8_DYNAMIC"
        ))),
        Some("NVFP4A16") if gpu < Gpu(100) => Some(Finding::told(format!(
            "GPUs of {gpu} do not multiply four-bit floats: {name} unpacks them to 16 bits in its kernels, which saves memory and no products"
        ))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_known_by_generation_card_and_capability() {
        let of = |text: &str| Gpu::parse(text).map(|gpu| gpu.0);
        for (text, capability) in [
            ("turing", 75),
            ("RTX 4090", 89),
            ("h100", 90),
            ("8.6", 86),
            ("sm_120", 120),
            ("Blackwell", 100),
            ("10.0", 100),
        ] {
            assert_eq!(of(text).unwrap(), capability, "{text}");
        }
        for text in ["", "voodoo", "9", "9000"] {
            let told = of(text).unwrap_err();
            assert!(told.exit_code() == 2 && told.to_string().contains("turing"), "{told}");
        }
    }
}
