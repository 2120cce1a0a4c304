//! Which ggml type each tensor gets: llama-quantize's mixes as data.
//!
//! A mix is a base type and rules for parts of the model; the first rule that holds decides. What no mix changes are the
//! rules at the end of [`assign`]: models of eight experts, models of the size of Llama 70B, rows that no block divides.
//! Checked against llama.cpp 0c1e570, its `llama-quantize`, for every mix.

use std::fmt;

use formats::GgmlType;

use crate::error::{Error, Result};
use crate::import::names::block_number;

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
const NEVER: &[&str] = &["_norm.weight", "ffn_gate_inp.weight"];

impl Mix {
    /// The mix that llama-quantize knows by `name`, in any case; `Q4_K` stands for `Q4_K_M`, and so on.
    pub fn parse(name: &str) -> Option<&'static Mix> {
        let is = |other: &&str| other.eq_ignore_ascii_case(name);
        MIXES.iter().find(|mix| is(&mix.name) || mix.aliases.iter().any(|alias| is(&alias)))
    }

    /// Whether it is made of blocks with scales, so that types of single tensors can be chosen.
    fn is_quantized(&self) -> bool {
        ggml(self.base).block_len > 1
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

/// A type by its name, in any case, or why there is none.
pub fn parse_type(name: &str) -> Result<GgmlType, String> {
    GgmlType::from_name(name).ok_or_else(|| {
        let known: Vec<&str> = formats::ggml::TYPES.iter().map(|ty| ty.name).collect();
        format!("`{name}` is no type that can be written ({})", known.join(", "))
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
/// `tensors` are all tensors of the file in llama-quantize's order ([`super::names::plan`] gives it), since some rules
/// count them. `imatrix` tells whether there is an importance matrix. Where llama-quantize refuses rows that no block of
/// 32 divides, they become F16 here, with the reason in `fallback`.
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
        if !quantizable(tensor.name, tensor.shape) {
            return Ok(Assigned { ty: ggml("F32"), fallback: None });
        }
        // These two are taken as they are.
        let chosen = match tensor.name {
            "token_embd.weight" => overrides.embedding.map(|ty| ("--token-embedding-type", ty)),
            "output.weight" => overrides.output.map(|ty| ("--output-tensor-type", ty)),
            _ => None,
        };
        let width = *tensor.shape.last().expect("two extents");
        if let Some((flag, ty)) = chosen {
            if width % ty.block_len != 0 {
                let name = tensor.name;
                return Err(Error::usage(format!(
                    "{flag} {ty}: rows of `{name}` have {width} values, which do not split into blocks of {}",
                    ty.block_len
                )));
            }
            return Ok(Assigned { ty, fallback: None });
        }
        let base = ggml(self.mix.base);
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
        let fallback = replaced.map(|wanted| {
            format!(
                "{ty} in place of {wanted}: rows of {width} values do not split into blocks of {}",
                wanted.block_len
            )
        });
        Ok(Assigned { ty, fallback })
    }

    /// What the mix says, and the type that this already replaces because of the row's length.
    fn by_rules(&mut self, tensor: &TensorInfo<'_>, width: usize) -> Result<(GgmlType, Option<GgmlType>)> {
        let part = part_of(tensor.name, self.tied);
        let base = ggml(self.mix.base);
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
        "token_embd.weight" if tied => Part::Head,
        "token_embd.weight" => Embedding,
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
mod tests {
    use super::*;
    use serde_json::Value as Json;

    const LLAMA: ModelShape<'_> = ModelShape { architecture: "llama", layers: 16, heads: 8, kv_heads: 8, experts: 0 };

    /// The tensors of a llama in file order.
    fn llama(layers: usize, width: usize, inner: usize, tied: bool) -> Vec<(String, Vec<usize>)> {
        let mut tensors = vec![("output_norm.weight".to_owned(), vec![width])];
        tensors.push(("token_embd.weight".to_owned(), vec![512, width]));
        if !tied {
            tensors.insert(0, ("output.weight".to_owned(), vec![512, width]));
        }
        for layer in 0..layers {
            for (part, shape) in [
                ("attn_k.weight", vec![width, width]),
                ("attn_norm.weight", vec![width]),
                ("attn_output.weight", vec![width, width]),
                ("attn_q.bias", vec![width]),
                ("attn_q.weight", vec![width, width]),
                ("attn_v.weight", vec![width, width]),
                ("ffn_down.weight", vec![width, inner]),
                ("ffn_gate.weight", vec![inner, width]),
                ("ffn_norm.weight", vec![width]),
                ("ffn_up.weight", vec![inner, width]),
            ] {
                tensors.push((format!("blk.{layer}.{part}"), shape));
            }
        }
        tensors
    }

    fn run(
        mix: &str,
        model: &ModelShape<'_>,
        tensors: &[(String, Vec<usize>)],
        imatrix: bool,
        overrides: &Overrides,
    ) -> Result<Vec<(String, Assigned)>> {
        let infos: Vec<TensorInfo<'_>> = tensors.iter().map(|(name, shape)| TensorInfo { name, shape }).collect();
        let assigned = assign(Mix::parse(mix).unwrap(), model, &infos, imatrix, overrides)?;
        Ok(tensors.iter().map(|(name, _)| name.clone()).zip(assigned).collect())
    }

    /// The types of a plain llama of 16 blocks.
    fn types(mix: &str, width: usize, tied: bool, imatrix: bool, overrides: &Overrides) -> Vec<(String, Assigned)> {
        run(mix, &LLAMA, &llama(16, width, 2 * width, tied), imatrix, overrides).unwrap()
    }

    fn of<'t>(types: &'t [(String, Assigned)], name: &str) -> &'t str {
        types.iter().find(|(other, _)| other == name).expect(name).1.ty.name
    }

    /// Blocks whose tensor of this name is of the type.
    fn blocks(types: &[(String, Assigned)], part: &str, ty: &str) -> Vec<usize> {
        let is = |layer: &usize| of(types, &format!("blk.{layer}.{part}.weight")) == ty;
        (0..16).filter(is).collect()
    }

    fn message(result: Result<Vec<(String, Assigned)>>) -> String {
        result.unwrap_err().to_string()
    }

    fn tensor(text: &str) -> Overrides {
        Overrides { tensors: vec![TensorOverride::parse(text).unwrap()], ..Overrides::default() }
    }

    #[test]
    fn types_are_those_of_llama_quantize() {
        let fixture: Json = serde_json::from_str(include_str!("../../tests/fixtures/gguf/type_mixes.json")).unwrap();
        let mut compared = 0;
        for model in fixture["models"].as_array().unwrap() {
            let count = |key: &str| model[key].as_u64().unwrap() as usize;
            let experts = count("experts");
            let shape = ModelShape { heads: count("heads"), kv_heads: count("kv_heads"), experts, ..LLAMA };
            for (mix, expected) in model["mixes"].as_object().unwrap() {
                let mut tensors = Vec::new();
                for part in expected.as_object().unwrap().keys() {
                    let extents = match part.ends_with("_exps") {
                        true => vec![experts, 256, 256],
                        false => vec![256, 256],
                    };
                    if part.ends_with(".weight") {
                        tensors.push((part.clone(), extents));
                    } else {
                        tensors.extend((0..16).map(|i| (format!("blk.{i}.{part}.weight"), extents.clone())));
                    }
                }
                tensors.sort_by(|a, b| crate::import::names::file_order(&a.0, &b.0));
                for (name, found) in run(mix, &shape, &tensors, false, &Overrides::default()).unwrap() {
                    let part = name
                        .strip_prefix("blk.")
                        .and_then(|rest| rest.split_once('.'))
                        .map_or(name.as_str(), |(_, part)| part.strip_suffix(".weight").unwrap());
                    let expected = match &expected[part] {
                        Json::Array(layers) => &layers[block_number(&name).unwrap()],
                        one => one,
                    };
                    assert_eq!(found.ty.name, expected.as_str().unwrap(), "{mix}: {name} of {}", model["name"]);
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 12 * (2 * (2 + 7 * 16) + 2 + 8 * 16));
    }

    #[test]
    fn every_mix_is_found_by_its_names_and_has_its_number() {
        for (name, number) in [("q4_k", 15), ("Q4_K_M", 15), ("Q3_K", 12), ("q5_k", 17), ("Q2_K_S", 21), ("iq4_xs", 30)]
        {
            assert_eq!(Mix::parse(name).unwrap().file_type, number, "{name}");
        }
        assert!(Mix::parse("IQ2_XS").is_none() && Mix::parse("").is_none());
        for (i, mix) in MIXES.iter().enumerate() {
            assert!(MIXES[i + 1..].iter().all(|other| (other.name, other.file_type) != (mix.name, mix.file_type)));
            // Every table entry names a type that exists.
            types(mix.name, 256, false, true, &Overrides::default());
        }
    }

    #[test]
    fn an_importance_matrix_changes_the_first_down_projections() {
        let none = Overrides::default();
        for (mix, without, with) in [
            ("Q4_0", "Q4_0", "Q4_1"),
            ("Q5_0", "Q5_0", "Q5_1"),
            ("IQ4_XS", "Q5_K", "IQ4_XS"),
            ("IQ4_NL", "Q5_K", "IQ4_NL"),
        ] {
            for (imatrix, first) in [(false, without), (true, with)] {
                let types = types(mix, 256, false, imatrix, &none);
                assert_eq!(of(&types, "blk.0.ffn_down.weight"), first);
                assert_eq!(of(&types, "blk.1.ffn_down.weight"), first);
                assert_eq!(of(&types, "blk.2.ffn_down.weight"), Mix::parse(mix).unwrap().base);
            }
        }
        let shape = ModelShape { kv_heads: 2, ..LLAMA };
        let types = run("Q2_K_S", &shape, &llama(16, 256, 512, false), true, &none).unwrap();
        assert_eq!(of(&types, "blk.9.attn_v.weight"), "Q4_K");
        assert_eq!(blocks(&types, "ffn_down", "Q4_K"), [0, 1]);
        assert_eq!((of(&types, "blk.0.attn_output.weight"), of(&types, "output.weight")), ("Q2_K", "Q6_K"));
        let refused = message(run("Q2_K_S", &shape, &llama(16, 256, 512, false), false, &none));
        assert!(refused.contains("Q2_K_S needs to know which weights matter"), "{refused}");
        // Without a single Q2_K tensor there is nothing to refuse.
        run("Q2_K_S", &shape, &llama(2, 64, 64, false), false, &none).unwrap();
    }

    #[test]
    fn heads_embeddings_and_floats() {
        let none = Overrides::default();
        for (mix, head, embedding) in [
            ("Q8_0", "Q8_0", "Q8_0"),
            ("Q4_1", "Q6_K", "Q4_1"),
            ("TQ2_0", "Q6_K", "Q4_K"),
            ("MXFP4_MOE", "Q8_0", "Q8_0"),
            ("F16", "F16", "F16"),
            ("BF16", "BF16", "BF16"),
            ("F32", "F32", "F32"),
        ] {
            let untied = types(mix, 256, false, false, &none);
            assert_eq!((of(&untied, "output.weight"), of(&untied, "token_embd.weight")), (head, embedding), "{mix}");
            assert_eq!(of(&types(mix, 256, true, false, &none), "token_embd.weight"), head, "{mix}");
            assert_eq!((of(&untied, "output_norm.weight"), of(&untied, "blk.3.attn_q.bias")), ("F32", "F32"));
        }
        let mut experts = llama(1, 256, 512, true);
        experts.push(("blk.0.ffn_up_exps.weight".to_owned(), vec![4, 512, 256]));
        let shape = ModelShape { experts: 4, ..LLAMA };
        let types = run("MXFP4_MOE", &shape, &experts, false, &none).unwrap();
        assert_eq!((of(&types, "blk.0.ffn_up_exps.weight"), of(&types, "blk.0.ffn_up.weight")), ("MXFP4", "Q8_0"));
    }

    #[test]
    fn rows_that_no_block_divides_fall_back() {
        let none = Overrides::default();
        for (mix, wide, tied_head) in [
            ("Q2_K", "Q4_0", "Q8_0"),
            ("Q3_K_S", "Q4_0", "Q8_0"),
            ("Q4_K_S", "Q5_0", "Q8_0"),
            ("Q5_K_S", "Q5_1", "Q8_0"),
            ("Q6_K", "Q8_0", "Q8_0"),
            ("IQ4_XS", "IQ4_NL", "Q8_0"),
            ("TQ1_0", "Q4_0", "Q8_0"),
            ("Q4_0", "Q4_0", "Q8_0"),
            ("IQ4_NL", "IQ4_NL", "Q8_0"),
        ] {
            let types = types(mix, 576, true, false, &none);
            assert_eq!(of(&types, "blk.9.attn_q.weight"), wide, "{mix}");
            assert_eq!(of(&types, "token_embd.weight"), tied_head, "{mix}");
            let (_, q) = types.iter().find(|(name, _)| name == "blk.9.attn_q.weight").unwrap();
            assert_eq!(q.fallback.is_some(), wide != Mix::parse(mix).unwrap().base);
        }
        let types = types("Q4_K_M", 172, true, false, &none);
        let (_, q) = types.iter().find(|(name, _)| name == "blk.2.attn_q.weight").unwrap();
        let expected = "F16 in place of Q4_K: rows of 172 values do not split into blocks of 256";
        assert_eq!((q.ty.name, q.fallback.as_deref()), ("F16", Some(expected)));
        // Not even 32 divides; llama-quantize stops here.
        let q8 = run("Q8_0", &LLAMA, &llama(16, 172, 344, true), false, &none).unwrap();
        assert_eq!((of(&q8, "token_embd.weight"), of(&q8, "blk.0.ffn_up.weight")), ("F16", "F16"));
    }

    #[test]
    fn large_models_and_eight_experts() {
        let none = Overrides::default();
        let shape =
            |architecture, heads, kv_heads| ModelShape { architecture, layers: 80, heads, kv_heads, experts: 0 };
        let value = |shape: &ModelShape<'_>, mix: &str| {
            let types = run(mix, shape, &llama(80, 256, 256, false), true, &none).unwrap();
            of(&types, "blk.40.attn_v.weight").to_owned()
        };
        assert_eq!(value(&shape("llama", 64, 8), "Q4_K_S"), "Q5_K");
        assert_eq!(value(&shape("llama", 64, 8), "Q3_K_S"), "Q5_K");
        assert_eq!(value(&shape("llama", 64, 64), "Q4_K_S"), "Q4_K");
        assert_eq!(value(&shape("qwen2", 64, 64), "Q4_K_S"), "Q5_K");
        assert_eq!(value(&shape("qwen3", 64, 8), "Q4_K_S"), "Q4_K");
        let eight = ModelShape { experts: 8, ..LLAMA };
        let types = run("Q3_K_L", &eight, &llama(16, 256, 256, false), false, &none).unwrap();
        let found = ["attn_v", "attn_k", "attn_output"].map(|part| of(&types, &format!("blk.9.{part}.weight")));
        assert_eq!(found, ["Q8_0", "Q8_0", "Q3_K"]);
        let stray = vec![("ffn_down_exps.weight".to_owned(), vec![8, 256, 256])];
        assert!(message(run("Q4_K_M", &eight, &stray, false, &none)).contains("its name has no block below 16"));
    }

    #[test]
    fn users_decide() {
        let types_with = |mix: &str, overrides: &Overrides| types(mix, 256, false, false, overrides);
        let pure = types_with("Q4_K_M", &Overrides { pure: true, ..Overrides::default() });
        assert!(pure.iter().all(|(name, a)| a.ty.name
            == if quantizable(name, &[2, 2]) && !name.contains("bias") && !name.contains("norm") {
                "Q4_K"
            } else {
                "F32"
            }));
        let named = GgmlType::from_name("q8_0");
        let output = types_with("Q4_K_M", &Overrides { output: named, ..Overrides::default() });
        assert_eq!((of(&output, "output.weight"), of(&output, "token_embd.weight")), ("Q8_0", "Q4_K"));
        let embedding = types_with("F16", &Overrides { embedding: named, ..Overrides::default() });
        assert_eq!((of(&embedding, "output.weight"), of(&embedding, "token_embd.weight")), ("F16", "Q8_0"));
        let tied = types("Q4_K_M", 256, true, false, &Overrides { output: named, ..Overrides::default() });
        assert_eq!(of(&tied, "token_embd.weight"), "Q8_0");

        // The first pattern decides; what is decided by hand is not counted.
        let mut overrides = tensor("BLK\\.[01]\\.attn_v=q2_k");
        overrides.tensors.push(TensorOverride::parse("attn_v|ffn_up=Q3_K").unwrap());
        let types = types_with("Q3_K_M", &overrides);
        assert_eq!(blocks(&types, "attn_v", "Q2_K"), [0, 1]);
        assert_eq!(blocks(&types, "attn_v", "Q3_K").len(), 14);
        assert_eq!(blocks(&types, "ffn_up", "Q3_K").len(), 16);
        let types = types_with("Q3_K_M", &tensor("blk\\.0\\.attn_v=Q2_K"));
        assert_eq!(blocks(&types, "attn_v", "Q5_K"), [1, 2]);
        // Rows that do not fit fall back here, too.
        let types = self::types("Q8_0", 576, false, false, &tensor("blk.(?!0)[0-9]+.attn_q=Q4_K"));
        assert_eq!((of(&types, "blk.3.attn_q.weight"), of(&types, "blk.0.attn_q.weight")), ("Q5_0", "Q8_0"));
    }

    #[test]
    fn decisions_without_effect_are_refused() {
        let refused = |mix: &str, width: usize, tied: bool, overrides: Overrides| {
            message(run(mix, &LLAMA, &llama(16, width, width, tied), false, &overrides))
        };
        let none = Overrides::default;
        let q4_k = GgmlType::from_name("Q4_K");
        assert!(refused("Q4_K_M", 256, false, tensor("attn_z=Q8_0")).contains("--tensor-type attn_z=Q8_0: no tensor"));
        assert!(refused("Q4_K_M", 256, false, tensor("ffn_norm=Q8_0")).contains("no tensor that can be quantized"));
        assert!(refused("F16", 256, false, tensor("attn_v=Q8_0")).ends_with("has no effect with F16"));
        let wide = refused("Q8_0", 576, false, Overrides { output: q4_k, ..none() });
        assert!(wide.contains("--output-tensor-type Q4_K: rows of `output.weight` have 576 values"), "{wide}");
        for overrides in
            [Overrides { output: q4_k, pure: true, ..none() }, Overrides { output: q4_k, embedding: q4_k, ..none() }]
        {
            let tied = refused("Q8_0", 256, true, overrides);
            assert!(tied.contains("--output-tensor-type has no effect"), "{tied}");
        }
        for (text, expected) in [
            ("attn_v", "expected PATTERN=TYPE"),
            ("=Q8_0", "expected PATTERN=TYPE"),
            ("attn_v=Q9", "`Q9` is no type that can be written (F32, "),
            ("(=Q8_0", "--tensor-type (=Q8_0: "),
        ] {
            let error = TensorOverride::parse(text).unwrap_err();
            assert!(error.to_string().contains(expected) && error.exit_code() == 2, "{error}");
        }
    }
}
