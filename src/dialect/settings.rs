//! config.json from the settings of a GGUF file: what llama.cpp would run, in Hugging Face's terms.
//!
//! Writing uses it too: a model is written only if what would be read back is the same model
//! ([`crate::dialect::metadata`]).

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use formats::container::gguf::MetadataValue;
use serde_json::{Value, json};

use crate::dialect::architectures::{Architecture, ROPE_FREQS, ROPE_LONG, ROPE_SHORT};

mod classes;
pub(super) mod config;
mod per_layer;
mod required;

/// What a GGUF file says of a model beside its weights.
pub(crate) struct Settings {
    /// What the settings' names start with.
    pub architecture: &'static Architecture,
    /// Keys and values.
    pub keys: HashMap<String, MetadataValue>,
    /// Names and extents of tensors.
    pub tensors: HashMap<String, Vec<usize>>,
    /// The values of the tensors of rotary factors.
    pub factors: HashMap<String, Vec<f32>>,
    /// Keys that were asked for.
    pub asked: RefCell<HashSet<String>>,
}

/// What keys of an activation with numbers of its own for each layer start with.
pub(crate) const CURVE: &str = "xielu";

/// Settings that change nothing that is computed here, or are carried over elsewhere.
const SILENT: &[&str] = &[
    "vocab_size",
    "tensor_data_layout",
    "pooling_type",
    "expert_shared_count",
    "rope.scaling.finetuned",
    // Of a latent they follow from its width.
    "attention.key_length",
    "attention.value_length",
    "embedding_length_out",
];

type Result<T> = formats::Result<T>;

impl Settings {
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.id)
    }

    fn get<T>(&self, name: &str, what: &str, as_type: impl Fn(&MetadataValue) -> Option<T>) -> Result<Option<T>> {
        match self.look(name) {
            None => Ok(None),
            Some(value) => as_type(value)
                .map(Some)
                .ok_or_else(|| formats::Error::malformed(format!("metadata key `{}` is not {what}", self.key(name)))),
        }
    }

    /// The value of a setting, which counts as asked for.
    fn look(&self, name: &str) -> Option<&MetadataValue> {
        let key = self.key(name);
        let value = self.keys.get(&key);
        self.asked.borrow_mut().insert(key);
        value
    }

    /// The architecture's settings in the file that nothing has asked for, sorted.
    pub fn unread(&self) -> Vec<&str> {
        let asked = self.asked.borrow();
        let own = |key: &&str| {
            let name = key.strip_prefix(self.architecture.id).and_then(|rest| rest.strip_prefix('.'));
            name.is_some_and(|name| !SILENT.contains(&name)) && !asked.contains(*key)
        };
        let mut unread: Vec<&str> = self.keys.keys().map(String::as_str).filter(own).collect();
        unread.sort_unstable();
        unread
    }

    /// A count; the first of a list where there is one for each layer and all are the same.
    pub(super) fn count(&self, name: &str) -> Result<Option<usize>> {
        self.get(name, "a count that is the same for all layers", |value| match value {
            MetadataValue::Array(list) => {
                let mut list = list.iter().map(integer);
                let first = list.next()??;
                list.all(|other| other == Some(first)).then_some(first)
            }
            value => integer(value),
        })
    }

    /// A count for each layer, which may be 0.
    pub(super) fn counts(&self, name: &str, layers: usize) -> Result<Vec<usize>> {
        let list = self.get(name, "a count for each layer", |value| match value {
            MetadataValue::Array(list) => {
                list.iter().map(integer).collect::<Option<Vec<_>>>().filter(|list| list.len() >= layers)
            }
            value => integer(value).map(|count| vec![count; layers]),
        })?;
        let list = list.ok_or_else(|| formats::Error::missing(format!("metadata key `{}`", self.key(name))))?;
        Ok(list[..layers].to_vec())
    }

    pub(super) fn required(&self, name: &str) -> Result<usize> {
        let value =
            self.count(name)?.ok_or_else(|| formats::Error::missing(format!("metadata key `{}`", self.key(name))))?;
        match value {
            0 => Err(formats::Error::mismatch(format!("metadata key `{}`", self.key(name)), "a positive count", 0)),
            value => Ok(value),
        }
    }

    pub(super) fn float(&self, name: &str) -> Result<Option<f64>> {
        self.get(name, "a float", |value| match value {
            // The shortest decimal that is the same number.
            MetadataValue::F32(x) => x.to_string().parse().ok(),
            MetadataValue::F64(x) => Some(*x),
            _ => None,
        })
    }

    /// A float, alone or the same for all layers.
    fn float_of_layers(&self, name: &str) -> Result<Option<f64>> {
        let of = |value: &MetadataValue| match value {
            MetadataValue::F32(x) => x.to_string().parse().ok(),
            _ => None,
        };
        self.get(name, "a float that is the same for all layers", |value| match value {
            MetadataValue::Array(list) => {
                let first: f64 = of(list.iter().next()?)?;
                list.iter().all(|other| of(other) == Some(first)).then_some(first)
            }
            value => of(value),
        })
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        self.get(name, "a boolean", |value| match value {
            MetadataValue::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&str>> {
        match self.look(name) {
            None => Ok(None),
            Some(MetadataValue::String(text)) => Ok(Some(text)),
            Some(_) => Err(formats::Error::malformed(format!("metadata key `{}` is not a string", self.key(name)))),
        }
    }

    fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    pub(super) fn unsupported(&self, why: impl Into<String>) -> formats::Error {
        formats::Error::unsupported(why.into())
    }

    /// Which layers see a window only: one flag a layer, or all but every so many.
    fn local(&self, layers: usize, default: usize) -> Result<Vec<bool>> {
        let name = "attention.sliding_window_pattern";
        let list = match self.look(name) {
            Some(MetadataValue::Array(list)) => list
                .iter()
                .map(|value| match value {
                    MetadataValue::Bool(flag) => Some(*flag),
                    other => integer(other).map(|n| n != 0),
                })
                .collect::<Option<Vec<bool>>>(),
            _ => {
                let every = self.count(name)?.unwrap_or(default);
                Some((0..layers).map(|layer| every == 0 || layer % every + 1 < every).collect())
            }
        };
        list.filter(|list| list.len() >= layers).map(|list| list[..layers].to_vec()).ok_or_else(|| {
            formats::Error::malformed(format!("metadata key `{}` has no flag for each layer", self.key(name)))
        })
    }

    /// Which layers have a state in place of attention: one flag a layer, or all but every so many.
    fn recurrent(&self, layers: usize) -> Result<Vec<bool>> {
        let name = "attention.recurrent_layers";
        let every = self.count("full_attention_interval")?.filter(|every| *every > 0).unwrap_or(4);
        let Some(MetadataValue::Array(list)) = self.look(name) else {
            return Ok((1..=layers).map(|layer| !layer.is_multiple_of(every)).collect());
        };
        let flag = |value: &MetadataValue| match value {
            MetadataValue::Bool(flag) => Some(*flag),
            other => integer(other).map(|n| n != 0),
        };
        let list = list.iter().map(flag).collect::<Option<Vec<bool>>>();
        list.filter(|list| list.len() >= layers).map(|list| list[..layers].to_vec()).ok_or_else(|| {
            formats::Error::malformed(format!("metadata key `{}` has no flag for each layer", self.key(name)))
        })
    }

    /// A window that layers of this architecture do not keep to, where a text may be longer.
    pub fn unused_window(&self) -> Result<Option<usize>> {
        let context = self.count("context_length")?.unwrap_or(0);
        let window = self.count("attention.sliding_window")?.filter(|window| (1..context).contains(window));
        Ok(window.filter(|_| !self.architecture.windows))
    }

    /// `model_type`, the class in transformers and the activation.
    fn class(&self, experts: bool) -> Result<[&'static str; 3]> {
        let windowed = self.count("attention.sliding_window")?.is_some_and(|window| window > 0);
        Ok(match (self.architecture.id, experts) {
            ("olmo2", false) if windowed => ["olmo3", "Olmo3ForCausalLM", "silu"],
            ("granitehybrid", false) if !self.keys.contains_key(&self.key("embedding_scale")) => {
                ["bamba", "BambaForCausalLM", "silu"]
            }
            ("granitemoe", true) if self.count("expert_shared_feed_forward_length")?.is_some_and(|n| n > 0) => {
                ["granitemoehybrid", "GraniteMoeHybridForCausalLM", "silu"]
            }
            ("afmoe", true) if self.sigmoid(true)? => ["afmoe", "AfmoeForCausalLM", "silu"],
            ("exaone-moe" | "hy_v3" | "glm4moe" | "dots1" | "minimax-m2" | "minimax-m3", true)
                if !self.sigmoid(true)? =>
            {
                let id = self.architecture.id;
                return Err(
                    self.unsupported(format!("a {id} model that routes by softmax cannot be said in config.json"))
                );
            }
            ("glm4", false) if self.has_sections() => ["glm4v_text", "Glm4vForConditionalGeneration", "silu"],
            ("glm4moe", true) if self.look("rope.dimension_sections").is_some() => {
                ["glm4v_moe_text", "Glm4vMoeForConditionalGeneration", "silu"]
            }
            ("deepseek2", _) if self.sigmoid(false)? => ["deepseek_v3", "DeepseekV3ForCausalLM", "silu"],
            ("step35", true) if self.sigmoid(true)? => ["step3p5", "Step3p5ForCausalLM", "silu"],
            (id, experts) => classes::of(id, experts).ok_or_else(|| {
                self.unsupported(match experts {
                    true => format!("a mixture of experts of architecture `{id}` cannot be read"),
                    false => format!("a model of architecture `{id}` has experts, this one none"),
                })
            })?,
        })
    }

    /// Whether positions are of several kinds, as llama.cpp tells it of an architecture that may have either.
    fn has_sections(&self) -> bool {
        let Some(MetadataValue::Array(list)) = self.look("rope.dimension_sections") else { return false };
        list.iter().take(2).filter(|kind| integer(kind).is_some_and(|pairs| pairs > 0)).count() == 2
    }

    /// Layers that predict further tokens, which stand behind the others.
    fn further(&self) -> Result<usize> {
        Ok(self.count("nextn_predict_layers")?.unwrap_or(0))
    }

    /// The layers of the model itself. Fails where all of the blocks predict further tokens.
    fn layers(&self) -> Result<Option<usize>> {
        let (all, further) = (self.count("block_count")?, self.further()?);
        let Some(all) = all else { return Ok(None) };
        match all.checked_sub(further).filter(|own| *own > 0 || further == 0) {
            Some(own) => Ok(Some(own)),
            None => Err(self.unsupported(format!(
                "`{}` is {further} of {all} blocks, and a model has some that predict the next token",
                self.key("nextn_predict_layers")
            ))),
        }
    }

    /// Whether experts are chosen by sigmoids; where the file does not say, `usual`.
    fn sigmoid(&self, usual: bool) -> Result<bool> {
        let name = "expert_gating_func";
        let layers = self.layers()?;
        // GLM 4.7 Lite, whose files do not say.
        let vocabulary = self.tensors.get("token_embd.weight").and_then(|shape| shape.first());
        let lite =
            self.architecture.id == "deepseek2" && matches!(layers, Some(47 | 48)) && vocabulary == Some(&154880);
        match self.count(name)? {
            None | Some(0) => Ok(usual || lite),
            Some(1) => Ok(false),
            Some(2) => Ok(true),
            Some(other) => Err(self.unsupported(format!(
                "`{}` is {other}: experts can be chosen by softmax (1) and by sigmoids (2)",
                self.key(name)
            ))),
        }
    }

    fn rope_scaling(&self, theta: f64, latent: bool) -> Result<Option<Value>> {
        if matches!(self.architecture.id, "gemma4" | "deepseek4") {
            // Its own words for it say all.
            return Ok(None);
        }
        let warm = self.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
        if let Some(factors) = self.factors.get(ROPE_FREQS) {
            // Of layers that see all half a head is turned, and as many factors are read.
            let read = if self.architecture.id == "step35" { factors.len() / 2 } else { factors.len() };
            let factors = &factors[..read];
            let usable = factors.iter().all(|factor| *factor > 0.0 && factor.is_finite()) && !latent;
            let scaled = if usable { self.scaled_factors(factors, warm)? } else { None };
            if scaled.is_some() {
                return Ok(scaled);
            }
            return llama3_scaling(factors, theta).or_else(|error| match usable {
                // Any other factors, within the first context and beyond it.
                true => self.divided(decimals(factors), warm).map(Some),
                false => Err(error.in_tensor(ROPE_FREQS)),
            });
        }
        let original = self.count("rope.scaling.original_context_length")?;
        if let (Some(long), Some(short)) = (self.factors.get(ROPE_LONG), self.factors.get(ROPE_SHORT)) {
            // The factors decide, whatever the type says.
            self.look("rope.scaling.type");
            if self.float("rope.scaling.factor")?.is_some_and(|factor| factor != 0.0 && factor != 1.0) {
                return Err(self.unsupported(format!(
                    "`{}` beside LongRoPE's own factors cannot be said in config.json; quantize the checkpoint that the file was made from",
                    self.key("rope.scaling.factor")
                )));
            }
            let original = original.map_or_else(|| self.required("context_length"), Ok)?;
            return Ok(Some(json!({
                "rope_type": "longrope", "short_factor": decimals(short), "long_factor": decimals(long),
                "original_max_position_embeddings": original, "attention_factor": warm,
            })));
        }
        self.scaling_by_type(theta, warm, latent)
    }
}

fn integer(value: &MetadataValue) -> Option<usize> {
    let wide: i128 = match value {
        MetadataValue::U8(n) => (*n).into(),
        MetadataValue::I8(n) => (*n).into(),
        MetadataValue::U16(n) => (*n).into(),
        MetadataValue::I16(n) => (*n).into(),
        MetadataValue::U32(n) => (*n).into(),
        MetadataValue::I32(n) => (*n).into(),
        MetadataValue::U64(n) => (*n).into(),
        MetadataValue::I64(n) => (*n).into(),
        _ => return None,
    };
    wide.try_into().ok()
}

/// Numbers by their shortest decimals.
fn decimals(values: &[f32]) -> Vec<f64> {
    values.iter().filter_map(|x| x.to_string().parse().ok()).collect()
}

/// Finds Llama 3's scaling from the factor it gives each rotary frequency.
///
/// With wavelength `λ` the factor is 1 below `original/high`, `factor` above `original/low`, and between them
/// `1 / ((1 − t)/factor + t)` with `t = (original/λ − low) / (high − low)`. Only the ratios `original : low : high` can be
/// known, so `low` is taken to be 1, as it always is.
fn llama3_scaling(factors: &[f32], theta: f64) -> formats::Result<Option<Value>> {
    if factors.iter().all(|f| *f == 1.0) {
        return Ok(None);
    }
    let dim = 2 * factors.len();
    let inverse_wavelength = |i: usize| theta.powf(-(2.0 * i as f64) / dim as f64) / std::f64::consts::TAU;
    let factor = factors.iter().copied().fold(1.0f32, f32::max);
    // Each factor in between gives a point on the line t(1/λ).
    let t = |f: f32| (1.0 / f64::from(f) - 1.0 / f64::from(factor)) / (1.0 - 1.0 / f64::from(factor));
    let between: Vec<(f64, f64)> = (0..factors.len())
        .filter(|&i| factors[i] > 1.0 && factors[i] < factor)
        .map(|i| (inverse_wavelength(i), t(factors[i])))
        .collect();
    let (original, high) = match (between.first(), between.last()) {
        (Some(first), Some(last)) if between.len() > 1 => {
            let slope = (last.1 - first.1) / (last.0 - first.0);
            let low_over_span = slope * first.0 - first.1;
            let span = 1.0 / low_over_span;
            (slope * span, 1.0 + span)
        }
        // Few rotary pairs leave the bounds open; any between the last unscaled and the first scaled wavelength will do.
        (None, None) => {
            let wavelength = |i: usize| 1.0 / inverse_wavelength(i);
            let first_scaled = (0..factors.len()).find(|&i| factors[i] > 1.0).map_or(1.0, wavelength);
            let last_whole =
                (0..factors.len()).rev().find(|&i| factors[i] == 1.0).map_or(first_scaled / 4.0, wavelength);
            let original = first_scaled.floor();
            (original, (original / last_whole).min(4.0))
        }
        // One point tells one bound; the other is Llama's.
        (Some((inverse, t)), _) => ((3.0 * t + 1.0) / inverse, 4.0),
        (None, Some(_)) => unreachable!("the first is the last"),
    };
    let (original, high) = (original.round(), (high * 1000.0).round() / 1000.0);
    let expected = |i: usize| {
        let t = (original * inverse_wavelength(i) - 1.0) / (high - 1.0);
        1.0 / ((1.0 - t.clamp(0.0, 1.0)) / f64::from(factor) + t.clamp(0.0, 1.0))
    };
    if let Some(i) = (0..factors.len()).find(|&i| (f64::from(factors[i]) / expected(i) - 1.0).abs() > 1e-3) {
        return Err(formats::Error::unsupported(format!(
            "the frequency factors are not Llama 3's rope scaling: factor {i} is {}, expected {:.4}",
            factors[i],
            expected(i)
        )));
    }
    Ok(Some(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
        "original_max_position_embeddings": original as u64,
    })))
}
