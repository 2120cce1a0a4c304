//! Which ggml type each tensor gets: llama-quantize's mixes as data.
//!
//! A mix is a base type and rules for parts of the model; the first rule that holds decides. What no mix changes are the
//! rules at the end of [`assign`]: models of eight experts, models of the size of Llama 70B, rows that no block divides.
//! `tests/fixtures/gguf/type_mixes.json` holds what llama.cpp chose for models of many shapes.

use std::fmt;

use formats::GgmlType;

use crate::error::{Error, Result};

/// A mix of types, by the name that users of llama-quantize know.
#[derive(Debug)]
pub struct Mix {
    /// As in `Q4_K_M`.
    pub name: &'static str,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// `general.file_type`.
    pub file_type: u32,
    /// The type of every tensor that no rule is about.
    base: &'static str,
    rules: &'static [Rule],
    /// The type of attention outputs in a model of eight experts, where it is not the base.
    attn_output_of_eight: Option<&'static str>,
}

/// Tensors of one part of the model get a type, when a condition holds.
#[derive(Debug)]
struct Rule {
    part: Part,
    when: When,
    ty: &'static str,
}

/// What a tensor is in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// The output projection, or the embedding that stands for it.
    Head,
    /// The token embedding where there is a head too.
    Embedding,
    Value,
    Key,
    AttnOutput,
    Down,
    Other,
}

/// When a rule holds; `i` counts the tensors of its part from 0, `n` is their number (blocks, for `Down`).
#[derive(Clone, Copy, Debug)]
enum When {
    Always,
    /// At least four query heads share a value head.
    Grouped,
    /// `i < count`.
    First(usize),
    /// `i < n / part`.
    FirstPart(usize),
    /// `i < n / 8`, and there is an importance matrix.
    FirstEighthCalibrated,
    /// `i < n / 8`, and there is none.
    FirstEighthUncalibrated,
    /// The first and last eighth, and every third between.
    MoreBits,
}

const fn rule(part: Part, when: When, ty: &'static str) -> Rule {
    Rule { part, when, ty }
}

const fn mix(name: &'static str, file_type: u32, base: &'static str, rules: &'static [Rule]) -> Mix {
    Mix { name, aliases: &[], file_type, base, rules, attn_output_of_eight: None }
}

impl Mix {
    /// The type of every tensor that no rule is about.
    pub fn base(&self) -> GgmlType {
        ggml(self.base)
    }

    const fn eight(self, attn_output: &'static str) -> Mix {
        Mix { attn_output_of_eight: Some(attn_output), ..self }
    }

    const fn alias(self, aliases: &'static [&'static str]) -> Mix {
        Mix { aliases, ..self }
    }
}

use Part::{AttnOutput, Down, Embedding, Value};
use When::{Always, First, FirstEighthCalibrated, FirstEighthUncalibrated, FirstPart, Grouped, MoreBits};

/// Every mix.
pub const MIXES: &[Mix] = &[
    mix("F32", 0, "F32", &[]),
    mix("F16", 1, "F16", &[]),
    mix("BF16", 32, "BF16", &[]),
    mix("Q8_0", 7, "Q8_0", &[]),
    mix("Q4_0", 2, "Q4_0", &[rule(Down, FirstEighthCalibrated, "Q4_1")]),
    mix("Q4_1", 3, "Q4_1", &[]),
    mix("Q5_0", 8, "Q5_0", &[rule(Down, FirstEighthCalibrated, "Q5_1")]),
    mix("Q5_1", 9, "Q5_1", &[]),
    mix(
        "Q2_K",
        10,
        "Q2_K",
        &[
            rule(Value, Grouped, "Q4_K"),
            rule(Value, Always, "Q3_K"),
            rule(Down, Always, "Q3_K"),
            rule(AttnOutput, Always, "Q3_K"),
        ],
    )
    .eight("Q5_K"),
    mix("Q2_K_S", 21, "Q2_K", &[rule(Value, Grouped, "Q4_K"), rule(Down, FirstPart(8), "Q4_K")]),
    mix("Q3_K_S", 11, "Q3_K", &[]).eight("Q5_K"),
    mix(
        "Q3_K_M",
        12,
        "Q3_K",
        &[
            rule(Value, First(2), "Q5_K"),
            rule(Value, Always, "Q4_K"),
            rule(Down, FirstPart(16), "Q5_K"),
            rule(Down, Always, "Q4_K"),
            rule(AttnOutput, Always, "Q4_K"),
        ],
    )
    .eight("Q5_K")
    .alias(&["Q3_K"]),
    mix(
        "Q3_K_L",
        13,
        "Q3_K",
        &[rule(Value, Always, "Q5_K"), rule(Down, Always, "Q5_K"), rule(AttnOutput, Always, "Q5_K")],
    ),
    mix("Q4_K_S", 14, "Q4_K", &[rule(Value, First(4), "Q5_K"), rule(Down, FirstPart(8), "Q5_K")]).eight("Q5_K"),
    mix("Q4_K_M", 15, "Q4_K", &[rule(Value, MoreBits, "Q6_K"), rule(Down, MoreBits, "Q6_K")])
        .eight("Q5_K")
        .alias(&["Q4_K"]),
    mix("Q5_K_S", 16, "Q5_K", &[]),
    mix("Q5_K_M", 17, "Q5_K", &[rule(Value, MoreBits, "Q6_K"), rule(Down, MoreBits, "Q6_K")]).alias(&["Q5_K"]),
    mix("Q6_K", 18, "Q6_K", &[]),
    mix("IQ4_NL", 25, "IQ4_NL", &[rule(Value, Grouped, "Q5_K"), rule(Down, FirstEighthUncalibrated, "Q5_K")])
        .eight("Q5_K"),
    mix("IQ4_XS", 30, "IQ4_XS", &[rule(Value, Grouped, "Q5_K"), rule(Down, FirstEighthUncalibrated, "Q5_K")])
        .eight("Q5_K"),
    mix("TQ1_0", 36, "TQ1_0", &[rule(Embedding, Always, "Q4_K")]),
    mix("TQ2_0", 37, "TQ2_0", &[rule(Embedding, Always, "Q4_K")]),
    // Not by parts: stacked experts are MXFP4, everything else Q8_0.
    mix("MXFP4_MOE", 38, "MXFP4", &[]),
];

/// What takes the place of a type whose blocks do not divide a row; F16 where that does not either.
const FALLBACKS: &[(&str, &str)] = &[
    ("Q2_K", "Q4_0"),
    ("Q3_K", "Q4_0"),
    ("TQ1_0", "Q4_0"),
    ("TQ2_0", "Q4_0"),
    ("Q4_K", "Q5_0"),
    ("Q5_K", "Q5_1"),
    ("Q6_K", "Q8_0"),
    ("IQ4_XS", "IQ4_NL"),
];

/// Sizes whose few value heads get more bits: architecture, blocks, and whether query heads must share them.
const OF_70B: &[(&str, usize, bool)] = &[("llama", 80, true), ("qwen2", 80, false)];

/// Tensors that stay as they are although they have rows and a name like a weight's.
const NEVER: &[&str] = &[
    "_norm.weight",
    "ffn_gate_inp.weight",
    "position_embd.weight",
    "per_layer_model_proj.weight",
    "altup",
    "laurel",
    "ssm_conv1d.weight",
    "ssm_conv1d_q.weight",
    "ssm_conv1d_k.weight",
    "ssm_conv1d_v.weight",
    "shortconv.conv.weight",
    "ssm_f_a.weight",
    "ssm_f_b.weight",
    "ssm_g_a.weight",
    "ssm_g_b.weight",
    // Another token that is seen changes more than rounding does.
    "indexer.attn_q_b.weight",
    "indexer.attn_k.weight",
    "indexer.proj.weight",
    "indexer.q_proj.weight",
    "indexer.k_proj.weight",
    "indexer_compressor_kv.weight",
    "indexer_compressor_gate.weight",
    // All of a text but its end is seen through these.
    "attn_compressor_kv.weight",
    "attn_compressor_gate.weight",
    "compressor_ape.weight",
    // Whole numbers.
    TABLE,
    // By these all streams are read and written.
    "hc_attn_",
    "hc_ffn_",
    "output_hc_",
    "ple_conv1d.weight",
    // llama-quantize rounds these, which are tiny and decide how fast a state forgets.
    "ssm_ba.weight",
    "ssm_alpha.weight",
    "ssm_beta.weight",
];

/// A table of the experts of each token.
const TABLE: &str = "ffn_gate_tid2eid.weight";

impl Mix {
    /// The mix that llama-quantize knows by `name`, in any case; `Q4_K` stands for `Q4_K_M`, and so on.
    pub fn parse(name: &str) -> Option<&'static Mix> {
        let is = |other: &&str| other.eq_ignore_ascii_case(name);
        MIXES.iter().find(|mix| is(&mix.name) || mix.aliases.iter().any(is))
    }

    /// Whether it is made of blocks with scales, so that types of single tensors can be chosen.
    pub fn is_quantized(&self) -> bool {
        self.base().block_len > 1
    }
}

/// What the rules ask of a model.
#[derive(Clone, Copy, Debug)]
pub struct ModelShape<'a> {
    /// `general.architecture`.
    pub architecture: &'a str,
    /// Decoder blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Experts of a layer; 0 without.
    pub experts: usize,
}

/// Name in the file and extents (slowest first) of a tensor.
#[derive(Clone, Copy, Debug)]
pub struct TensorInfo<'a> {
    /// The GGUF name.
    pub name: &'a str,
    /// Extents, slowest first.
    pub shape: &'a [usize],
}

/// What a user decided, as with llama-quantize.
#[derive(Debug, Default)]
pub struct Overrides {
    /// `--tensor-type`; the first that matches decides.
    pub tensors: Vec<TensorOverride>,
    /// `--output-tensor-type`.
    pub output: Option<GgmlType>,
    /// `--token-embedding-type`.
    pub embedding: Option<GgmlType>,
    /// `--pure`: the base type everywhere.
    pub pure: bool,
}

/// One `--tensor-type PATTERN=TYPE`.
pub struct TensorOverride {
    pattern: fancy_regex::Regex,
    text: String,
    ty: GgmlType,
}

impl fmt::Debug for TensorOverride {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TensorOverride {
    /// Reads `PATTERN=TYPE`: a regular expression searched for in GGUF names, whatever its case, and a type's name.
    pub fn parse(text: &str) -> Result<TensorOverride> {
        let wrong = |why: String| Error::usage(format!("--tensor-type {text}: {why}"));
        let (pattern, ty) = text
            .split_once('=')
            .filter(|(pattern, _)| !pattern.is_empty())
            .ok_or_else(|| wrong("expected PATTERN=TYPE, as in `attn_v=Q6_K`".to_owned()))?;
        let pattern = fancy_regex::Regex::new(&format!("(?i){pattern}")).map_err(|e| wrong(format!("{e}")))?;
        Ok(TensorOverride { pattern, text: text.to_owned(), ty: parse_type(ty).map_err(wrong)? })
    }

    fn matches(&self, name: &str) -> Result<bool> {
        self.pattern.is_match(name).map_err(|e| Error::usage(format!("--tensor-type {}: {e}", self.text)))
    }
}

/// The block that a GGUF tensor belongs to.
pub(crate) fn block_number(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

/// A type by its name, in any case, or why there is none.
pub fn parse_type(name: &str) -> Result<GgmlType, String> {
    GgmlType::from_name(name).ok_or_else(|| {
        let known: Vec<&str> = formats::ggml::TYPES.iter().map(|ty| ty.name).collect();
        format!("`{name}` is no type that can be written ({})", known.join(", "))
    })
}

/// Why a type takes the place of another, as [`Assigned::fallback`] says it.
const SPLIT: &str = "do not split into blocks of";

/// Whether what was done in place of what was asked for is one of llama.cpp's own substitutions of types, and nothing that went wrong.
pub fn is_substitution(fallback: &str) -> bool {
    fallback.contains(SPLIT)
}

/// What there is to say of all tensors that do not have the type that the mix names, in one sentence; `None` where there are none.
pub fn substitutions<'a>(assigned: impl Iterator<Item = &'a Assigned>) -> Option<String> {
    let mut kinds: Vec<(&str, usize)> = Vec::new();
    let mut all = 0;
    for fallback in assigned.filter_map(|assigned| assigned.fallback.as_deref()) {
        let kind = fallback.split_once(':').map_or(fallback, |(kind, _)| kind);
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, count)) => *count += 1,
            None => kinds.push((kind, 1)),
        }
        all += 1;
    }
    let kinds: Vec<String> = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let tensors = if all == 1 { "1 tensor has" } else { &format!("{all} tensors have") };
    (all > 0).then(|| {
        format!(
            "{tensors} rows that do not split into the blocks of the mix's type, and took what llama-quantize takes then: {}",
            kinds.join(", ")
        )
    })
}

/// The type of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Assigned {
    /// How it is to be stored.
    pub ty: GgmlType,
    /// Why it is not stored as the mix says, where rows do not split into that type's blocks.
    pub fallback: Option<String>,
}

/// Whether a tensor of this name and shape may be quantized; the others are stored as F32.
pub fn quantizable(name: &str, shape: &[usize]) -> bool {
    shape.iter().skip_while(|extent| **extent == 1).count() >= 2
        && name.ends_with("weight")
        && !NEVER.iter().any(|part| name.contains(part))
}

/// The type of each tensor, as llama-quantize chooses it.
///
/// `tensors` are all tensors of the file in llama-quantize's order ([`crate::dialect::names::plan`] gives it), since some rules
/// count them. `imatrix` tells whether there is an importance matrix.
///
/// Fails for `Q2_K_S` without an importance matrix, for an override that matches no tensor or has no effect, and for an
/// output or embedding type whose blocks do not divide a row.
pub fn assign(
    mix: &Mix,
    model: &ModelShape<'_>,
    tensors: &[TensorInfo<'_>],
    imatrix: bool,
    overrides: &Overrides,
) -> Result<Vec<Assigned>> {
    check_overrides(mix, tensors, overrides)?;
    let tied = tensors.iter().all(|tensor| tensor.name != "output.weight");
    let values = tensors.iter().filter(|tensor| part_of(tensor.name, tied) == Value).count();
    let mut chooser = Chooser { mix, model, imatrix, tied, output: overrides.output, values, value: 0, down: 0 };
    tensors.iter().map(|tensor| chooser.tensor(tensor, overrides)).collect()
}

/// The state of one pass over the tensors.
struct Chooser<'a> {
    mix: &'a Mix,
    model: &'a ModelShape<'a>,
    imatrix: bool,
    tied: bool,
    output: Option<GgmlType>,
    /// Value projections of the model.
    values: usize,
    /// Those seen, without overridden ones.
    value: usize,
    /// Down projections seen, without overridden ones.
    down: usize,
}

impl Chooser<'_> {
    fn tensor(&mut self, tensor: &TensorInfo<'_>, overrides: &Overrides) -> Result<Assigned> {
        if tensor.name.ends_with(TABLE) {
            return Ok(Assigned { ty: GgmlType::I32, fallback: None });
        }
        if !quantizable(tensor.name, tensor.shape) {
            return Ok(Assigned { ty: ggml("F32"), fallback: None });
        }
        // These two are taken as they are.
        let chosen = match tensor.name {
            "token_embd.weight" => overrides.embedding.map(|ty| ("--token-embedding-type", ty)),
            // Unless it is named, for it is large.
            "per_layer_token_embd.weight" => match self.named(tensor.name, overrides)? {
                true => None,
                false => overrides.embedding.map(|ty| ("--token-embedding-type", ty)),
            },
            "output.weight" => overrides.output.map(|ty| ("--output-tensor-type", ty)),
            _ => None,
        };
        let width = *tensor.shape.last().expect("two extents");
        if let Some((flag, ty)) = chosen {
            if !width.is_multiple_of(ty.block_len) {
                let name = tensor.name;
                return Err(Error::usage(format!(
                    "{flag} {ty}: rows of `{name}` have {width} values, which do not split into blocks of {}",
                    ty.block_len
                )));
            }
            return Ok(Assigned { ty, fallback: None });
        }
        let base = self.mix.base();
        if !self.mix.is_quantized() {
            return Ok(Assigned { ty: base, fallback: None });
        }
        let mut manual = None;
        for one in &overrides.tensors {
            if one.matches(tensor.name)? {
                manual = Some(one.ty);
                break;
            }
        }
        let (wanted, mut replaced) = match manual {
            Some(ty) => (ty, None),
            None if overrides.pure => (base, None),
            None => self.by_rules(tensor, width)?,
        };
        let mut ty = wanted;
        if !width.is_multiple_of(ty.block_len) {
            let smaller = FALLBACKS.iter().find(|(name, _)| *name == ty.name).map(|(_, other)| ggml(other));
            ty = smaller.filter(|ty| width.is_multiple_of(ty.block_len)).unwrap_or_else(|| ggml("F16"));
            replaced = Some(replaced.unwrap_or(wanted));
        }
        let by_name = matches!(tensor.name, "token_embd.weight" | "output.weight");
        if self.mix.name == "Q2_K_S" && ty.name == "Q2_K" && !by_name && !self.imatrix {
            return Err(Error::usage(
                "Q2_K_S needs to know which weights matter: calibrate, or give --imatrix; Q2_K does without",
            ));
        }
        let fallback = replaced
            .map(|wanted| format!("{ty} in place of {wanted}: rows of {width} values {SPLIT} {}", wanted.block_len));
        Ok(Assigned { ty, fallback })
    }

    /// Whether a type was given for a tensor by its name.
    fn named(&self, name: &str, overrides: &Overrides) -> Result<bool> {
        for one in &overrides.tensors {
            if one.matches(name)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What the mix says, and the type that this already replaces because of the row's length.
    fn by_rules(&mut self, tensor: &TensorInfo<'_>, width: usize) -> Result<(GgmlType, Option<GgmlType>)> {
        let part = part_of(tensor.name, self.tied);
        let base = self.mix.base();
        if part == Part::Head {
            if let Some(ty) = self.output {
                return Ok((ty, None));
            }
            return Ok(match () {
                () if matches!(self.mix.base, "MXFP4" | "Q8_0") => (ggml("Q8_0"), None),
                () if !width.is_multiple_of(base.block_len) => (ggml("Q8_0"), Some(base)),
                () => (ggml("Q6_K"), None),
            });
        }
        if self.mix.base == "MXFP4" {
            let stacked = tensor.shape.len() > 2 && tensor.shape[tensor.shape.len() - 3] > 1;
            return Ok((ggml(if stacked { "MXFP4" } else { "Q8_0" }), None));
        }
        let (i, n) = match part {
            Value => (self.value, self.values),
            // The experts of a layer are one tensor, but shared ones are another.
            Down if self.model.experts > 1 => (self.block(tensor)?, self.model.layers),
            Down => (self.down, self.model.layers),
            _ => (0, 0),
        };
        let holds = |rule: &&Rule| rule.part == part && self.holds(rule.when, i, n);
        let mut name = self.mix.rules.iter().find(holds).map_or(self.mix.base, |rule| rule.ty);
        match part {
            Value => {
                if self.is_70b() && matches!(name, "Q3_K" | "Q4_K") {
                    name = "Q5_K";
                }
                self.value += 1;
            }
            Down => self.down += 1,
            _ => {}
        }
        if self.model.experts == 8 {
            match part {
                Value | Part::Key => name = "Q8_0",
                AttnOutput => name = self.mix.attn_output_of_eight.unwrap_or(self.mix.base),
                _ => {}
            }
        }
        Ok((ggml(name), None))
    }

    fn holds(&self, when: When, i: usize, n: usize) -> bool {
        match when {
            Always => true,
            Grouped => self.model.heads / self.model.kv_heads.max(1) >= 4,
            First(count) => i < count,
            FirstPart(part) => i < n / part,
            FirstEighthCalibrated => i < n / 8 && self.imatrix,
            FirstEighthUncalibrated => i < n / 8 && !self.imatrix,
            MoreBits => i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2,
        }
    }

    fn is_70b(&self) -> bool {
        let model = self.model;
        OF_70B.iter().any(|(architecture, layers, shared)| {
            (model.architecture, model.layers) == (*architecture, *layers)
                && (!shared || model.heads != model.kv_heads)
                && model.experts != 8
        })
    }

    fn block(&self, tensor: &TensorInfo<'_>) -> Result<usize> {
        block_number(tensor.name).filter(|block| *block < self.model.layers).ok_or_else(|| {
            Error::failed(format!("tensor `{}`: its name has no block below {}", tensor.name, self.model.layers))
        })
    }
}

/// What a tensor is, by its name.
fn part_of(name: &str, tied: bool) -> Part {
    const PARTS: &[(&str, Part)] = &[
        ("attn_qkv.weight", Value),
        ("attn_kv_b.weight", Value),
        ("attn_v.weight", Value),
        ("attn_k.weight", Part::Key),
        ("attn_output.weight", AttnOutput),
        ("ffn_down", Down),
    ];
    match name {
        "output.weight" => Part::Head,
        "token_embd.weight" | "per_layer_token_embd.weight" if tied => Part::Head,
        "token_embd.weight" | "per_layer_token_embd.weight" => Embedding,
        _ => PARTS.iter().find(|(text, _)| name.contains(text)).map_or(Part::Other, |(_, part)| *part),
    }
}

/// Refuses what would silently have no effect.
fn check_overrides(mix: &Mix, tensors: &[TensorInfo<'_>], overrides: &Overrides) -> Result<()> {
    let tied = tensors.iter().all(|tensor| tensor.name != "output.weight");
    if overrides.output.is_some() && tied && (overrides.pure || overrides.embedding.is_some() || !mix.is_quantized()) {
        return Err(Error::usage(
            "--output-tensor-type has no effect: the model has no output tensor of its own; use --token-embedding-type",
        ));
    }
    for one in &overrides.tensors {
        if !mix.is_quantized() {
            return Err(Error::usage(format!("--tensor-type {}: has no effect with {}", one.text, mix.name)));
        }
        let mut found = false;
        for tensor in tensors.iter().filter(|tensor| quantizable(tensor.name, tensor.shape)) {
            found |= one.matches(tensor.name)?;
        }
        if !found {
            return Err(Error::usage(format!(
                "--tensor-type {}: no tensor that can be quantized matches; names are like `blk.0.attn_v.weight`",
                one.text
            )));
        }
    }
    Ok(())
}

fn ggml(name: &str) -> GgmlType {
    GgmlType::from_name(name).expect("tables name known types")
}

#[cfg(test)]
mod tests;
