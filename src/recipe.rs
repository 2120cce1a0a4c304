//! What to do with which tensor: flags and `recipe.toml`, resolved into one value that the report repeats.

use std::path::PathBuf;

use calibration::solvers::Observer;
use calibration::statistics::Needs;
use formats::codec::scheme_of;
use formats::container::file;
use formats::encoding::{E4M3, PRESETS};
use formats::{Codec, Encoding, Levels, Scheme};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::mixes::{Mix, TensorOverride, parse_type};
use crate::words::nearest;

mod choices;
mod llm_compressor;
mod near;
mod patterns;
mod request;

pub use choices::{Mtp, Towers, UnknownTensors, unknown_tensors};
pub use patterns::{Pattern, Patterns};
pub use request::{Override, Request, headings, toml_error};

/// A quantization method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Method {
    /// Round to nearest.
    #[serde(rename = "rtn")]
    Rtn,
    /// Activation-aware scales and clipping, then rounding.
    #[serde(rename = "awq")]
    Awq,
    /// Error feedback across columns.
    #[serde(rename = "gptq")]
    Gptq,
    /// AWQ's scales, then GPTQ.
    #[serde(rename = "awq+gptq")]
    AwqGptq,
}

impl Method {
    /// Every method, with the name users type.
    pub const ALL: &[(&str, Method)] =
        &[("rtn", Method::Rtn), ("awq", Method::Awq), ("gptq", Method::Gptq), ("awq+gptq", Method::AwqGptq)];

    /// The name users type.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, method)| *method == self).expect("in the list").0
    }

    /// Whether channels are rescaled first.
    pub fn smooths(self) -> bool {
        matches!(self, Method::Awq | Method::AwqGptq)
    }

    /// Whether columns are swept with feedback.
    pub fn sweeps(self) -> bool {
        matches!(self, Method::Gptq | Method::AwqGptq)
    }

    /// How scales are chosen unless the user says otherwise.
    pub fn observer(self) -> Observer {
        match self {
            Method::Rtn => Observer::MinMax,
            Method::Awq => Observer::Clip,
            Method::Gptq | Method::AwqGptq => Observer::Imatrix,
        }
    }
}

/// Finds a name in one of the `ALL` tables; the error lists what there is.
pub fn named<T: Copy>(what: &str, table: &[(&str, T)], name: &str) -> Result<T> {
    match table.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)) {
        Some((_, value)) => Ok(*value),
        None => {
            let known: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
            let flag = what.trim_start_matches('-');
            let meant = nearest(name, known.iter().copied());
            let meant = meant.map_or(String::new(), |meant| format!("did you mean --{flag} {meant}? "));
            Err(Error::usage(format!("{what} `{name}` is not known; {meant}there are {}", known.join(", "))))
        }
    }
}

/// A request with every default filled in.
#[derive(Clone, Debug, Serialize)]
pub struct Recipe {
    /// Output layout.
    pub format: String,
    /// How weights are represented, where no exception says otherwise.
    #[serde(rename = "scheme", serialize_with = "as_scheme")]
    pub encoding: Encoding,
    /// Method.
    pub method: Method,
    /// How scales are chosen, by the name users type.
    pub observer: &'static str,
    /// Relative damping.
    pub damp: f64,
    /// Columns by falling energy.
    pub act_order: bool,
    /// Scales and codes are moved once more after the sweep.
    pub refine: bool,
    /// Groups in processing order.
    pub desc_act: bool,
    /// Every token counts as sent to every expert of a mixture.
    pub moe_all_experts: bool,
    /// Patterns of linears that stay as they are.
    pub ignore: Vec<String>,
    /// Whether linears that vLLM and SGLang load as one matrix may have several schemes.
    pub allow_uneven: bool,
    /// What to do with tensors that are not part of the model.
    pub unknown_tensors: UnknownTensors,
    /// What to do with layers that predict further tokens.
    pub mtp: Mtp,
    /// What to do with what sees or hears beside the language model.
    pub towers: Towers,
    /// A LoRA adapter that was merged before anything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Calibration text.
    pub calibration: String,
    /// Calibration sequences.
    pub samples: usize,
    /// Tokens of each.
    pub seq_len: usize,
    /// Seed.
    pub seed: u64,
    /// Exceptions.
    pub overrides: Vec<Override>,
    /// Where importance is read from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub imatrix: Option<PathBuf>,
    /// Where importance is written to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_imatrix: Option<PathBuf>,
    /// What only a GGUF file has; its presence says that one is to be written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gguf: Option<GgufRecipe>,
    /// Keys that have no effect on this method, which a report leaves out.
    #[serde(skip)]
    pub idle: Vec<&'static str>,
    /// What to say of those that were asked for all the same.
    #[serde(skip)]
    pub notes: Vec<String>,
    /// The file that it was read from.
    #[serde(skip)]
    pub file: Option<PathBuf>,
}

/// Keys that a request has, of those that may have no effect.
struct Given(Vec<&'static str>);

impl Given {
    fn of(request: &Request) -> Given {
        let keys = [
            ("damp", request.damp.is_some()),
            ("act_order", request.act_order.is_some()),
            ("refine", request.refine.is_some()),
            ("calibration", request.calibration.is_some()),
            ("samples", request.samples.is_some()),
            ("seq_len", request.seq_len.is_some()),
            ("seed", request.seed.is_some()),
            ("moe_all_experts", request.moe_all_experts == Some(true)),
            ("imatrix", request.imatrix.is_some()),
        ];
        Given(keys.into_iter().filter(|(_, given)| *given).map(|(key, _)| key).collect())
    }
}

/// What a recipe says of a linear in particular.
pub enum Said<'r> {
    /// It stays as it is.
    Ignored,
    /// It has settings of its own.
    Otherwise(&'r Override),
    /// No pattern matches it.
    Nothing,
}

/// What only a GGUF file has.
#[derive(Clone, Debug, Serialize)]
pub struct GgufRecipe {
    /// The mix of types.
    pub mix: &'static str,
    /// `PATTERN=TYPE`.
    pub tensor_type: Vec<String>,
    /// The type of the output projection.
    pub output_tensor_type: Option<String>,
    /// The type of the token embedding.
    pub token_embedding_type: Option<String>,
    /// One type for everything.
    pub pure: bool,
    /// The pre-tokenizer's name.
    pub pre: Option<String>,
    /// Bytes of tensors in one file.
    pub split_max_size: Option<u64>,
}

impl Recipe {
    /// Fills the defaults in. Fails on names, widths or groups that do not exist, and on settings that the format lacks.
    pub fn resolve(request: Request) -> Result<Recipe> {
        let format = request.format.clone().unwrap_or_else(|| "compressed-tensors".to_owned()).to_ascii_lowercase();
        if format == "gguf" {
            return Recipe::resolve_gguf(request);
        }
        let Some(codec) = formats::codec::codec(&format) else {
            return Err(near::no_format(&format));
        };
        let only_gguf = [
            ("tensor-type", request.tensor_type.is_some()),
            ("tensor-type-file", request.tensor_type_file.is_some()),
            ("output-tensor-type", request.output_tensor_type.is_some()),
            ("token-embedding-type", request.token_embedding_type.is_some()),
            ("pure", request.pure == Some(true)),
            ("pre", request.pre.is_some()),
            ("split-max-size", request.split_max_size.is_some()),
        ];
        if let Some((flag, _)) = only_gguf.iter().find(|(_, given)| *given) {
            return Err(Error::usage(format!("--{flag} is for GGUF files, and the format is {format}")));
        }
        let base = codec.encoding(codec.usual()).expect("the usual one");
        let encoding = change(
            codec,
            base,
            request.scheme.as_deref(),
            request.bits,
            request.group_size,
            request.symmetric,
            "the request",
        )?;
        // Of eight bits of which four are exponent rounding loses so little that a calibration is not asked of everyone.
        let fine = encoding.levels == Levels::Table(&E4M3);
        let usual = if fine || request.imatrix.is_some() { "rtn" } else { "gptq" };
        let method = named("method", Method::ALL, request.method.as_deref().unwrap_or(usual))?;
        let collected = request.save_imatrix.is_some() && method == Method::Rtn;
        let observer = match &request.observer {
            Some(name) => named("observer", Observer::ALL, name)?,
            None if request.imatrix.is_some() || collected => Observer::Imatrix,
            None => method.observer(),
        };
        let damp = request.damp.unwrap_or(0.05);
        if !(damp.is_finite() && (0.0..=10.0).contains(&damp)) {
            return Err(Error::usage(format!("damping {damp} is not between 0 and 10")));
        }
        let desc_act = request.desc_act.unwrap_or(false);
        if desc_act && !method.sweeps() {
            return Err(Error::usage("--desc-act needs a method with a sweep: gptq or awq+gptq"));
        }
        if desc_act && request.act_order == Some(false) {
            return Err(Error::usage(
                "--desc-act stores columns by falling energy, and --act-order false sweeps them from left to right: drop one of the two",
            ));
        }
        for (what, value) in [("samples", request.samples), ("seq-len", request.seq_len)] {
            if value == Some(0) {
                return Err(Error::usage(format!("--{what} must be at least 1")));
            }
        }
        let given = Given::of(&request);
        let towers = request.towers.as_deref().map_or(Ok(Towers::default()), |name| Towers::parse(name, &format))?;
        let recipe = Recipe {
            format,
            encoding,
            method,
            observer: Observer::ALL.iter().find(|(_, o)| *o == observer).expect("in the list").0,
            damp,
            act_order: request.act_order.unwrap_or(true),
            refine: request.refine.unwrap_or(true),
            desc_act,
            moe_all_experts: request.moe_all_experts.unwrap_or(false),
            ignore: request.ignore.unwrap_or_default(),
            allow_uneven: request.allow_uneven.unwrap_or(false),
            unknown_tensors: unknown_tensors(request.unknown_tensors.as_deref())?,
            mtp: request.mtp.as_deref().map_or(Ok(Mtp::default()), |name| named("--mtp", Mtp::ALL, name))?,
            towers,
            adapter: request.adapter,
            calibration: request.calibration.unwrap_or_else(|| "mixed".to_owned()),
            samples: request.samples.unwrap_or(128),
            seq_len: request.seq_len.unwrap_or(2048),
            seed: request.seed.unwrap_or(0),
            overrides: request.overrides,
            imatrix: request.imatrix,
            save_imatrix: request.save_imatrix,
            gguf: None,
            idle: Vec::new(),
            notes: Vec::new(),
            file: None,
        };
        Ok(recipe.without_idle(&given))
    }

    /// Finds the keys that have no effect on what it does.
    fn without_idle(mut self, given: &Given) -> Recipe {
        let method = self.method.name();
        let (mut idle, mut notes) = (Vec::new(), Vec::new());
        let mut leave = |keys: &[&'static str], why: String| {
            let told: Vec<&str> = keys.iter().copied().filter(|key| given.0.contains(key)).collect();
            if !told.is_empty() {
                let have = if told.len() == 1 { "has" } else { "have" };
                notes.push(format!("{} {have} no effect: {why}", told.join(", ")));
            }
            idle.extend(keys);
        };
        if !self.method.sweeps() {
            let why = format!("method {method} does not sweep the columns of a Hessian");
            leave(&["damp", "act_order", "refine", "desc_act"], why);
        }
        if self.imatrix.is_some() && !self.takes_imatrix() {
            leave(&["imatrix"], format!("observer {} does not go by the importance of inputs", self.observer));
        }
        if self.needs() == Needs::Nothing {
            let why = match self.takes_imatrix() {
                true => "the importance of inputs is that of the imatrix, and nothing is calibrated".to_owned(),
                false => format!("method {method} with observer {} is done without calibration", self.observer),
            };
            leave(&["calibration", "samples", "seq_len", "seed", "moe_all_experts"], why);
        }
        (self.idle, self.notes) = (idle, notes);
        self
    }

    /// The same for a GGUF file.
    fn resolve_gguf(request: Request) -> Result<Recipe> {
        let name = request.scheme.as_deref().unwrap_or("Q4_K_M");
        let mix = Mix::parse(name).ok_or_else(|| near::no_mix(name))?;
        let not_gguf = [
            ("bits", request.bits.is_some()),
            ("group-size", request.group_size.is_some()),
            ("symmetric", request.symmetric.is_some()),
            ("desc-act", request.desc_act == Some(true)),
        ];
        if let Some((flag, _)) = not_gguf.iter().find(|(_, given)| *given) {
            return Err(Error::usage(format!(
                "--{flag} is not for GGUF files: the scheme's types decide; see --tensor-type{}",
                near::mix_for_bits(request.bits)
            )));
        }
        for Override { pattern, ignore, scheme, bits, group_size, symmetric } in &request.overrides {
            let ours = bits.is_none() && group_size.is_none() && symmetric.is_none();
            match scheme {
                Some(name) if ours => {
                    parse_type(name).map_err(|e| Error::usage(format!("override `{pattern}`: {e}")))?;
                }
                None if ours && *ignore => {}
                _ => {
                    return Err(Error::usage(format!(
                        "override `{pattern}`: in a GGUF file a linear is left as it is (ignore = true), or has a type (scheme = \"Q6_K\")"
                    )));
                }
            }
        }
        // Where a code has eight bits or a value none, there is nothing left to gain from data.
        let coarse = !matches!(mix.name, "Q8_0" | "F16" | "BF16" | "F32");
        let method = match request.method.as_deref() {
            Some(name) => named("method", Method::ALL, name)?,
            None if request.imatrix.is_some() || !coarse => Method::Rtn,
            None => Method::Gptq,
        };
        let known = request.imatrix.is_some() || request.save_imatrix.is_some() || method != Method::Rtn;
        let observer = match request.observer.as_deref() {
            Some(name) => named("observer", Observer::ALL, name)?,
            None if known => Observer::Imatrix,
            None => Observer::MinMax,
        };
        let observer = Observer::ALL.iter().find(|(_, o)| *o == observer).expect("in the list").0;
        let split_max_size = request.split_max_size.as_deref().map(parse_size).transpose()?;
        let gguf = GgufRecipe {
            mix: mix.name,
            tensor_type: tensor_types(&request)?,
            output_tensor_type: request.output_tensor_type.clone(),
            token_embedding_type: request.token_embedding_type.clone(),
            pure: request.pure.unwrap_or(false),
            pre: request.pre.clone(),
            split_max_size,
        };
        let given = Given::of(&request);
        let towers = request.towers.as_deref().map_or(Ok(Towers::default()), |name| Towers::parse(name, "gguf"))?;
        let common = Request {
            format: None,
            scheme: None,
            observer: None,
            method: Some(method.name().to_owned()),
            tensor_type: None,
            tensor_type_file: None,
            output_tensor_type: None,
            token_embedding_type: None,
            pure: None,
            pre: None,
            split_max_size: None,
            towers: None,
            ..request
        };
        let recipe =
            Recipe { format: "gguf".to_owned(), observer, towers, gguf: Some(gguf), ..Recipe::resolve(common)? };
        Ok(recipe.without_idle(&given))
    }

    /// The mix of a GGUF file; else width and group as a scheme's name says them.
    pub fn scheme_name(&self) -> String {
        match (&self.gguf, scheme_of(&self.encoding)) {
            (Some(gguf), _) => gguf.mix.to_owned(),
            (None, Some(scheme)) => {
                let group = scheme.group.map_or("row".to_owned(), |group| format!("g{group}"));
                format!("{} {group}", scheme.name())
            }
            (None, None) => called(&self.encoding),
        }
    }

    /// The scheme's name without its groups; of a GGUF file that of its mix.
    pub fn width(&self) -> String {
        if let Some(gguf) = &self.gguf {
            return gguf.mix.to_owned();
        }
        scheme_of(&self.encoding).map_or_else(|| called(&self.encoding), |scheme| scheme.name())
    }

    /// Whether another recipe looks at the same text in the same way.
    pub fn calibrates_as(&self, other: &Recipe) -> bool {
        let of = |recipe: &Recipe| {
            (recipe.calibration.clone(), recipe.samples, recipe.seq_len, recipe.seed, recipe.moe_all_experts)
        };
        of(self) == of(other)
    }

    /// What has to be known of the inputs.
    pub fn needs(&self) -> Needs {
        match self.method {
            method if method.smooths() || method.sweeps() => Needs::Hessian,
            _ if self.save_imatrix.is_some() => self.observer().needs().max(Needs::Moments),
            _ if self.takes_imatrix() => Needs::Nothing,
            _ => self.observer().needs(),
        }
    }

    /// Whether the importance that is read from a file decides anything. The blocks of a GGUF file have nothing else to go by.
    pub fn takes_imatrix(&self) -> bool {
        self.imatrix.is_some() && (self.gguf.is_some() || self.observer() == Observer::Imatrix)
    }

    /// How scales are chosen.
    pub fn observer(&self) -> Observer {
        named("observer", Observer::ALL, self.observer).expect("resolved")
    }

    /// What is said of a linear in particular; each pattern counts its matches.
    pub fn said_of(&self, module: &str, patterns: &mut Patterns) -> Said<'_> {
        let mut ignored = false;
        for (pattern, hits) in &mut patterns.ignore {
            if pattern.matches(module) {
                *hits += 1;
                ignored = true;
            }
        }
        let mut first = None;
        for (index, (pattern, hits)) in patterns.overrides.iter_mut().enumerate() {
            if pattern.matches(module) {
                *hits += 1;
                first = first.or(Some(index));
            }
        }
        let followed = first.filter(|index| !ignored && !self.overrides[*index].ignore);
        patterns.choose(followed);
        match (followed, first) {
            (Some(index), _) => Said::Otherwise(&self.overrides[index]),
            (None, None) if !ignored => Said::Nothing,
            _ => Said::Ignored,
        }
    }

    /// How a linear is represented, or `None` when it stays as it is.
    pub fn encoding_of(&self, module: &str, patterns: &mut Patterns) -> Result<Option<Encoding>> {
        match self.said_of(module, patterns) {
            Said::Ignored => Ok(None),
            Said::Nothing => Ok(Some(self.encoding)),
            Said::Otherwise(Override { scheme, bits, group_size, symmetric, pattern, .. }) => {
                let codec = formats::codec::codec(&self.format).expect("resolved");
                change(codec, self.encoding, scheme.as_deref(), *bits, *group_size, *symmetric, pattern).map(Some)
            }
        }
    }

    /// The recipe's patterns, ready to match. Fails on a bad regular expression.
    pub fn patterns(&self) -> Result<Patterns> {
        let ignore = self.ignore.iter().map(|text| Pattern::new(text)).collect::<Result<_>>()?;
        let overrides = self.overrides.iter().map(|o| Pattern::new(&o.pattern)).collect::<Result<_>>()?;
        Ok(Patterns::new(ignore, overrides))
    }
}

/// Bytes, as llama.cpp's tools write them: a number and `M` or `G`.
fn parse_size(text: &str) -> Result<u64> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, 'M' | 'm')) => (&text[..at], 1_000_000),
        Some((at, 'G' | 'g')) => (&text[..at], 1_000_000_000),
        _ => ("", 0),
    };
    match number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(Error::usage(format!("--split-max-size `{text}` is not a size; say 500M or 5G"))),
    }
}

/// An encoding's name among the presets.
fn called(encoding: &Encoding) -> String {
    encoding.name().unwrap_or("its own encoding").to_owned()
}

/// Integers of weights alone as their width and grouping, anything else by its name.
fn as_scheme<S: serde::Serializer>(encoding: &Encoding, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    match scheme_of(encoding) {
        Some(scheme) => scheme.serialize(serializer),
        None => serializer.serialize_str(&called(encoding)),
    }
}

/// The types that are asked for by name, those of the flags before those of a file.
fn tensor_types(request: &Request) -> Result<Vec<String>> {
    let mut all = request.tensor_type.clone().unwrap_or_default();
    let Some(path) = &request.tensor_type_file else { return Ok(all) };
    let text = file::read_text(path, file::DESCRIPTION).map_err(Error::io(path, "read"))?;
    for setting in text.split_whitespace() {
        TensorOverride::parse(setting).map_err(|error| Error::usage(format!("{}: {error}", path.display())))?;
        all.push(setting.to_owned());
    }
    if all.is_empty() {
        return Err(Error::usage(format!("{}: names no type; say PATTERN=TYPE, one a line", path.display())));
    }
    Ok(all)
}

/// The preset of this name that a codec writes besides the schemes of integers.
pub fn preset(codec: &dyn Codec, name: &str) -> Option<Encoding> {
    let known = codec.presets().iter().find(|known| known.eq_ignore_ascii_case(name))?;
    PRESETS.iter().find(|(preset, _)| preset == known).map(|(_, encoding)| *encoding)
}

fn change(
    codec: &dyn Codec,
    base: Encoding,
    name: Option<&str>,
    bits: Option<u8>,
    group_size: Option<i64>,
    symmetric: Option<bool>,
    place: &str,
) -> Result<Encoding> {
    let keys = [("bits", bits.is_some()), ("group-size", group_size.is_some()), ("symmetric", symmetric.is_some())];
    let whole = match name {
        Some(name) => preset(codec, name),
        None => Some(base).filter(|base| scheme_of(base).is_none()),
    };
    if let Some(whole) = whole {
        return match keys.iter().find(|(_, given)| *given) {
            Some((key, _)) => Err(Error::usage(format!(
                "{} fixes width, scales and zeros: --{key} in {place} is not for it; leave it out, or name another scheme",
                called(&whole)
            ))),
            None => Ok(whole),
        };
    }
    // Beside one that has no groups a preset has its own.
    let inherited = scheme_of(&base).filter(|_| place != "the request");
    let mut scheme = scheme_of(&base).unwrap_or(codec.usual());
    if let Some(name) = name {
        let preset = Scheme::preset(name).ok_or_else(|| near::no_scheme(codec, name))?;
        scheme = Scheme { group: inherited.map_or(codec.usual().group, |base| base.group), ..preset };
    }
    if let Some(bits) = bits {
        if ![2, 3, 4, 8].contains(&bits) {
            return Err(Error::usage(format!(
                "{bits} bits in {place}: codes have 2, 3, 4 or 8{}",
                near::bits_of_gguf(bits)
            )));
        }
        scheme.bits = bits;
    }
    if let Some(group) = group_size {
        scheme.group = match group {
            -1 => None,
            16..=4096 if group % 16 == 0 => Some(group as usize),
            _ => {
                return Err(Error::usage(format!(
                    "group size {group} in {place}: 32, 64, 128 or -1 (one scale per row) is what runtimes take"
                )));
            }
        };
    }
    if let Some(symmetric) = symmetric {
        if !has_symmetry(codec) {
            return Err(Error::usage(format!(
                "{} stores an offset for each group whatever the scheme: --symmetric in {place} is not for it, leave it out",
                codec.id()
            )));
        }
        scheme.symmetric = symmetric;
    }
    codec.encoding(scheme).map_err(|why| Error::usage(format!("{place}: {why}")))
}

/// Whether a codec tells symmetric schemes from others.
pub fn has_symmetry(codec: &dyn Codec) -> bool {
    let of = |symmetric| codec.encoding(Scheme { symmetric, ..codec.usual() });
    of(true) != of(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(toml: &str) -> Result<Recipe> {
        Recipe::resolve(toml::from_str(toml).unwrap())
    }

    #[test]
    fn overrides_and_ignores() {
        let recipe = resolve(
            "scheme = 'W4A16_ASYM'\ngroup_size = 64\nignore = ['o_proj']\n[[override]]\nmatch = 'down_proj'\nbits = 8\n[[override]]\nmatch = 're:.*layers.1'\nignore = true",
        )
        .unwrap();
        let mut patterns = recipe.patterns().unwrap();
        let mut of = |module: &str| {
            recipe.encoding_of(module, &mut patterns).unwrap().map(|encoding| encoding.scheme().unwrap())
        };
        assert_eq!(of("layers.0.up_proj"), Some(Scheme { bits: 4, group: Some(64), symmetric: false }));
        assert_eq!(of("layers.1.down_proj"), Some(Scheme { bits: 8, group: Some(64), symmetric: false }));
        assert_eq!(of("x.layers.1.up_proj"), None);
        assert_eq!(of("layers.0.o_proj"), None);
        patterns.check_hits().unwrap();
        let unmatched = recipe.patterns().unwrap().check_hits().unwrap_err().to_string();
        assert!(unmatched.contains("`o_proj` matches no linear"), "{unmatched}");
    }

    #[test]
    fn schemes_with_rounded_inputs_go_beside_others() {
        let recipe = resolve(
            "scheme = 'w8a8'\n[[override]]\nmatch = 'down_proj'\nscheme = 'FP8_DYNAMIC'\n[[override]]\nmatch = 'o_proj'\nscheme = 'W4A16'",
        )
        .unwrap();
        let mut patterns = recipe.patterns().unwrap();
        let mut of = |module: &str| recipe.encoding_of(module, &mut patterns).unwrap().unwrap();
        let preset = |name| PRESETS.iter().find(|(known, _)| *known == name).unwrap().1;
        assert_eq!(of("layers.0.up_proj"), preset("W8A8"));
        assert_eq!(of("layers.0.down_proj"), preset("FP8_DYNAMIC"));
        assert_eq!(of("layers.0.o_proj"), Scheme::preset("W4A16").unwrap().into());
        assert_eq!((recipe.method, recipe.scheme_name()), (Method::Gptq, "W8A8".to_owned()));
        assert_eq!(serde_json::to_value(&recipe).unwrap()["scheme"], "W8A8");
        let floats = resolve("scheme = 'FP8_DYNAMIC'").unwrap();
        assert_eq!((floats.method, floats.needs()), (Method::Rtn, Needs::Nothing));
    }

    #[test]
    fn schemes_of_mlx_are_groups_with_an_offset() {
        for (toml, bits, group) in [
            ("", 4, 64),
            ("scheme = 'W4A16'", 4, 64),
            ("scheme = 'w8a16_asym'\ngroup_size = 32", 8, 32),
            ("bits = 8\ngroup_size = 128", 8, 128),
        ] {
            let recipe = resolve(&format!("format = 'mlx'\n{toml}")).unwrap();
            assert_eq!(recipe.encoding, Encoding::mlx(bits, group, formats::Float::F32), "{toml}");
            assert_eq!(recipe.scheme_name(), format!("W{bits}A16_ASYM g{group}"));
        }
        let recipe = resolve("format = 'mlx'\ngroup_size = 32\n[[override]]\nmatch = 'down_proj'\nbits = 8").unwrap();
        let of = recipe.encoding_of("layers.0.down_proj", &mut recipe.patterns().unwrap()).unwrap();
        assert_eq!(of, Some(Encoding::mlx(8, 32, formats::Float::F32)));
        assert_eq!(serde_json::to_value(&recipe).unwrap()["scheme"]["group"], 32);
    }

    #[test]
    fn what_has_no_effect_is_told_where_it_was_asked_for() {
        let idle = |toml: &str| {
            let recipe = resolve(toml).unwrap();
            (recipe.idle.join(" "), recipe.notes)
        };
        let data = "calibration samples seq_len seed moe_all_experts";
        for (toml, keys, notes) in [
            ("", String::new(), &[][..]),
            ("method = 'awq+gptq'\ndamp = 0.1\nsamples = 3", String::new(), &[]),
            ("method = 'rtn'", format!("damp act_order refine desc_act {data}"), &[]),
            (
                "method = 'rtn'\ndamp = 0.1\nact_order = true\nsamples = 3",
                format!("damp act_order refine desc_act {data}"),
                &[
                    "damp, act_order have no effect: method rtn does not sweep the columns of a Hessian",
                    "samples has no effect: method rtn with observer minmax is done without calibration",
                ],
            ),
            ("method = 'rtn'\nobserver = 'imatrix'\nsamples = 3", "damp act_order refine desc_act".to_owned(), &[]),
            (
                "method = 'awq'\ndamp = 0.1",
                "damp act_order refine desc_act".to_owned(),
                &["damp has no effect: method awq does not sweep the columns of a Hessian"],
            ),
            ("format = 'gguf'\ndamp = 0.1\nseed = 3", String::new(), &[]),
            (
                "format = 'gguf'\nscheme = 'Q8_0'\nseed = 3",
                format!("damp act_order refine desc_act {data}"),
                &["seed has no effect: method rtn with observer minmax is done without calibration"],
            ),
            (
                "format = 'gguf'\nimatrix = 'i.gguf'\nseq_len = 3\nmoe_all_experts = true",
                format!("damp act_order refine desc_act {data}"),
                &[
                    "seq_len, moe_all_experts have no effect: the importance of inputs is that of the imatrix, and nothing is calibrated",
                ],
            ),
            (
                "format = 'gguf'\nmethod = 'rtn'\nsave_imatrix = 'i'\nseed = 3",
                "damp act_order refine desc_act".to_owned(),
                &[],
            ),
            (
                "imatrix = 'i.gguf'\nseq_len = 3",
                format!("damp act_order refine desc_act {data}"),
                &["seq_len has no effect: the importance of inputs is that of the imatrix, and nothing is calibrated"],
            ),
            (
                "imatrix = 'i.gguf'\nobserver = 'clip'",
                "damp act_order refine desc_act imatrix".to_owned(),
                &["imatrix has no effect: observer clip does not go by the importance of inputs"],
            ),
            ("imatrix = 'i.gguf'\nmethod = 'gptq'\nsamples = 3", String::new(), &[]),
            ("method = 'rtn'\nsave_imatrix = 'i'\nseed = 3", "damp act_order refine desc_act".to_owned(), &[]),
        ] {
            assert_eq!(idle(toml), (keys, notes.iter().map(|note| (*note).to_owned()).collect()), "{toml}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for (toml, expected) in [
            ("format = 'exl2'", "format `exl2` is not known"),
            ("scheme = 'W5A16'", "scheme `W5A16` is not known"),
            ("bits = 5", "5 bits"),
            ("scheme = 'W8A8'\nbits = 4", "W8A8 fixes width, scales and zeros: --bits in the request is not for it"),
            ("scheme = 'W8A8'\ngroup_size = 64", "--group-size in the request"),
            ("scheme = 'fp8_dynamic'\nsymmetric = false", "FP8_DYNAMIC fixes width, scales and zeros: --symmetric"),
            ("format = 'gptq'\nscheme = 'W8A8'", "scheme `W8A8` is one of compressed-tensors, and the format is gptq"),
            ("format = 'awq'\nscheme = 'FP8_DYNAMIC'", "scheme `FP8_DYNAMIC` is one of compressed-tensors"),
            ("format = 'gguf'\nscheme = 'W8A8'", "scheme `W8A8` is not one of GGUF's"),
            ("group_size = 0", "group size 0"),
            ("format = 'mlx'\nscheme = 'W3A16'", "the request: MLX is written with 4 or 8 bits, not 3"),
            ("format = 'mlx'\nsymmetric = true", "mlx stores an offset for each group whatever the scheme"),
            ("method = 'magic'", "method `magic` is not known; there are rtn, awq, gptq, awq+gptq"),
            ("damp = -1.0", "damping -1"),
            ("method = 'rtn'\ndesc_act = true", "--desc-act needs"),
            ("desc_act = true\nact_order = false", "drop one of the two"),
            ("samples = 0", "--samples must be at least 1"),
            ("unknown_tensors = 'keep'", "--unknown-tensors `keep` is not known; there are copy, drop, refuse"),
            ("pure = true", "--pure is for GGUF files"),
            ("format = 'gguf'\nscheme = 'W4A16'", "scheme `W4A16` is not one of GGUF's"),
            ("format = 'gguf'\ngroup_size = 64", "--group-size is not for GGUF files"),
            ("format = 'gguf'\nsplit_max_size = '5'", "is not a size"),
            ("format = 'gguf'\n[[override]]\nmatch = 'x'\nbits = 4", "override `x`: in a GGUF file"),
            ("format = 'gguf'\n[[override]]\nmatch = 'x'\nscheme = 'W4A16'", "override `x`: `W4A16` is no type"),
        ] {
            let found = resolve(toml).unwrap_err();
            assert!(found.to_string().contains(expected), "{found}");
            assert_eq!(found.exit_code(), 2);
        }
    }
}
