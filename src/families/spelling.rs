//! One spelling for the settings of a model, whichever of several its config.json has.
//!
//! What wins where two are there, and what is taken where none is, is what transformers 5 does: `defaults.json` is made
//! from its configuration classes, and [`Rotation`] says what they do with rotary positions.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::classes::{CLASSES, SIZES, class_of};
use super::{guesses, strict};
use crate::error::{Error, Result};
use crate::json::{real, shown};

/// The settings of a language model.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The model's type, or that of its text.
    pub model_type: String,
    /// Every setting under one name. All that is said of rotary positions is in `rope_parameters`, with a `rope_type` and
    /// a `rope_theta`, for each type of layer where the family tells them apart.
    pub values: Value,
    /// What a user should know of choices that were made, one sentence each.
    pub notes: Vec<String>,
    /// Settings that config.json does not have or has a null for, and for which defaults stand here.
    pub left_out: BTreeSet<String>,
}

/// What a class does with settings of rotary positions.
#[derive(Clone, Copy)]
struct Rotation {
    /// The base where none is said.
    theta: f64,
    /// The share of each head that is rotated where none is said; `None` for models that rotate all of it.
    partial: Option<f64>,
    form: Form,
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// One rotation for all layers.
    Flat,
    /// One for each type of layer; settings outside are those of layers that see all, but for this key.
    Layered { near: Option<&'static str> },
    /// One for each type of layer, each as it is said, and usual ones where nothing is.
    Apart,
    /// One for each type of layer; where they are not said, each of the first layer of its type, in lists of all layers.
    Listed,
    /// One for layers that see a window alone (`main`), and one for those that see entries beside it (`compress`).
    MainAndCompress,
    /// Keys of its own: `rotary_emb_base` and `rotary_pct`.
    NeoX,
    /// What is not `default` is LongRoPE.
    Long,
    /// No positions, or learned ones.
    Absent,
}

impl Rotation {
    fn of(model_type: &str) -> Rotation {
        let rotation = |theta, partial, form| Rotation { theta, partial, form };
        match model_type {
            "gpt2" | "nemotron_h" => rotation(1e4, None, Form::Absent),
            "gemma3_text" | "gemma3n_text" => rotation(1e6, None, Form::Layered { near: Some("rope_local_base_freq") }),
            "olmo3" => rotation(5e5, None, Form::Layered { near: None }),
            "lfm3" => rotation(1e6, None, Form::Layered { near: None }),
            "gemma4_text" | "gemma4_unified_text" => rotation(1e6, None, Form::Apart),
            "step3p5" => rotation(1e4, None, Form::Listed),
            "deepseek_v4" => rotation(1e4, Some(0.125), Form::MainAndCompress),
            "gpt_neox" => rotation(1e4, Some(0.25), Form::NeoX),
            "phi3" => rotation(1e4, Some(1.0), Form::Long),
            "bamba" | "phi" | "glm" | "glm4" | "glm4_moe" | "nemotron" => rotation(1e4, Some(0.5), Form::Flat),
            "stablelm" | "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text" => rotation(1e4, Some(0.25), Form::Flat),
            "minimax_m2" | "minimax_m3_vl_text" => rotation(5e6, Some(1.0), Form::Flat),
            "qwen4_exp_text" | "glm4v_text" | "glm4v_moe_text" => rotation(1e4, Some(1.0), Form::Flat),
            "bailing_hybrid" => rotation(6e6, None, Form::Flat),
            "longcat_flash" => rotation(1e7, None, Form::Flat),
            "kimi_linear" | "glm5_next_text" => rotation(1e4, None, Form::Absent),
            "mimo_v2_flash" => rotation(5e6, Some(0.334), Form::Layered { near: Some("swa_rope_theta") }),
            "cohere" | "flex_olmo" | "ernie4_5" | "ernie4_5_moe" | "llama4_text" | "qwen3_vl_text"
            | "qwen3_vl_moe_text" => rotation(5e5, None, Form::Flat),
            "lfm2" | "lfm2_moe" | "mixtral" | "qwen2_vl_text" | "qwen2_5_vl_text" | "solar_open" => {
                rotation(1e6, None, Form::Flat)
            }
            "apertus" => rotation(1.2e7, None, Form::Flat),
            "hy_v3" => rotation(11_158_840.0, None, Form::Flat),
            "mistral4" => rotation(1e4, Some(0.5), Form::Flat),
            "helium" => rotation(1e5, None, Form::Flat),
            "gpt_oss" => rotation(1.5e5, None, Form::Flat),
            "smollm3" => rotation(2e6, None, Form::Flat),
            _ => rotation(1e4, None, Form::Flat),
        }
    }

    /// `rope_parameters` of a model whose config.json has none.
    fn unsaid(model_type: &str, context: &Value) -> Value {
        match model_type {
            "gpt_oss" => json!({
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                "original_max_position_embeddings": 4096,
            }),
            "lfm3" => json!({
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            }),
            "gemma4_text" | "gemma4_unified_text" => json!({
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }),
            "ministral3" => json!({
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
                "max_position_embeddings": context, "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0,
                "mscale": 1.0, "llama_4_scaling_beta": 0.1,
            }),
            "apertus" => json!({
                "rope_type": "llama3", "rope_theta": 1.2e7, "factor": 8.0, "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            }),
            "mistral_large4_text" => json!({
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 2048.0, "original_max_position_embeddings": 512,
                "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0,
            }),
            "mistral4" => json!({
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 128.0, "original_max_position_embeddings": 8192,
                "max_position_embeddings": context, "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0,
                "mscale": 1.0, "llama_4_scaling_beta": 0.1,
            }),
            _ => json!({}),
        }
    }
}

/// Settings of `model_type` in one spelling. Of a type that transformers has no class for they are as they were.
pub fn settled(model_type: &str, mut values: Map<String, Value>) -> Result<Settings> {
    let mut notes = Vec::new();
    let Some(class) = CLASSES.get(class_of(model_type)) else {
        let model_type = model_type.to_owned();
        return Ok(Settings { model_type, values: values.into(), ..Settings::default() });
    };
    for spelling in &class.spellings {
        let (setting, keys) = spelling.split_first().expect("a setting and its keys");
        let said: Vec<(&String, Value)> =
            keys.iter().filter_map(|key| Some((key, values.remove(key)?))).filter(|(_, v)| !v.is_null()).collect();
        let Some((winner, value)) = said.last().cloned() else { continue };
        if let Some((other, _)) = said.iter().find(|(_, other)| !same(other, &value)) {
            notes.push(format!(
                "config.json has {other} and {winner}, and they differ: {winner} is taken, as transformers does"
            ));
        }
        values.insert(setting.clone(), value);
    }
    notes.extend(guesses::notes(class_of(model_type), &values));
    let mut left_out = BTreeSet::new();
    for (setting, default) in &class.defaults {
        match values.get(setting) {
            None => {}
            // No size is guessed where one was meant to be.
            Some(Value::Null) if SIZES.contains(&setting.as_str()) => continue,
            // To Python a null is no.
            Some(Value::Null) if default.is_boolean() => {
                values.insert(setting.clone(), false.into());
                continue;
            }
            // One that may not be null was left out when the checkpoint was opened, with a note.
            Some(Value::Null) if !class.nullable.contains(setting) => {}
            Some(_) => continue,
        }
        left_out.insert(setting.clone());
        values.insert(setting.clone(), default.clone());
    }
    let sizes: Vec<&str> = SIZES.iter().copied().filter(|size| left_out.contains(*size)).collect();
    if !sizes.is_empty() {
        notes.push(format!(
            "config.json does not say {}: transformers' defaults for `{model_type}` are taken",
            sizes.join(", ")
        ));
    }
    rotary(model_type, &mut values, &mut notes)?;
    Ok(Settings { model_type: model_type.to_owned(), values: values.into(), notes, left_out })
}

fn same(a: &Value, b: &Value) -> bool {
    match (real(a), real(b)) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// Brings everything about rotary positions into `rope_parameters`.
fn rotary(model_type: &str, values: &mut Map<String, Value>, notes: &mut Vec<String>) -> Result<()> {
    let class = class_of(model_type);
    let rotation = Rotation::of(class);
    match rotation.form {
        Form::Absent => return Ok(()),
        Form::Apart => return apart(class, values),
        Form::Listed => return listed(rotation.theta, values),
        Form::MainAndCompress => return main_and_compress(&rotation, values),
        _ => {}
    }
    // An empty one is none.
    let old = object(values, "rope_scaling")?.filter(|scaling| !scaling.is_empty());
    let unsaid = match (rotation.form, Rotation::unsaid(class, &Value::Null)) {
        (Form::Layered { .. }, Value::Object(unsaid)) if !unsaid.is_empty() && old.is_none() => Some(unsaid),
        _ => None,
    };
    let new = object(values, "rope_parameters")?.or(unsaid);
    let own = old.clone().or(new.clone()).unwrap_or_default();
    // A base of null means no positions to this class.
    let base = own.get("rope_theta").or(values.get("rope_theta"));
    if class == "olmo_hybrid" && base.is_some_and(Value::is_null) {
        values.retain(|key, _| !["rope_theta", "rope_scaling", "rope_parameters"].contains(&key.as_str()));
        return Ok(());
    }
    let nested = own.values().filter_map(Value::as_object);
    notes.extend(std::iter::once(&own).chain(nested).filter_map(guesses::two_types));
    let mut take = |key: &str| values.remove(key);
    let outside = Outside {
        theta: take("rope_theta"),
        partial: take("partial_rotary_factor"),
        base: take("rotary_emb_base"),
        percent: take("rotary_pct"),
        near: take("rope_local_base_freq"),
        dim: take("rotary_dim"),
        original: values.get("original_max_position_embeddings").filter(|v| !v.is_null()).cloned(),
        context: values.get("max_position_embeddings").cloned().unwrap_or_default(),
        head_dim: values.get("head_dim").and_then(real),
        turned: turned(values),
    };
    let mut told = Vec::new();
    let found = match rotation.form {
        Form::Layered { near } => layered(&rotation, near, old.clone(), new.clone(), &outside, &mut told),
        _ => {
            let own = old.clone().or(new.clone());
            let own = own.unwrap_or_else(|| match Rotation::unsaid(class, &outside.context) {
                Value::Object(unsaid) => unsaid,
                _ => unreachable!("an object"),
            });
            flat(class, &rotation, own, &outside, &mut told)?
        }
    };
    if let (Some(_), Some(new)) = (&old, new.filter(|new| !new.is_empty())) {
        let alone = match rotation.form {
            Form::Layered { near } => Some(layered(&rotation, near, None, Some(new), &outside, &mut Vec::new())),
            _ => flat(class, &rotation, new, &outside, &mut Vec::new()).ok(),
        };
        if !alone.is_some_and(|alone| alike(&alone, &found)) {
            told.insert(
                0,
                "config.json has both rope_scaling and rope_parameters, and they differ: rope_scaling is taken, as transformers does"
                    .to_owned(),
            );
        }
    }
    notes.append(&mut told);
    values.remove("rope_scaling");
    values.insert("rope_parameters".to_owned(), found.into());
    Ok(())
}

/// The rotations of a class that reads nothing but `rope_parameters`, as they are said.
fn apart(class: &str, values: &mut Map<String, Value>) -> Result<()> {
    let unsaid = Rotation::unsaid(class, &Value::Null);
    let mut all = match object(values, "rope_parameters")? {
        Some(said) => Value::Object(said),
        None => unsaid,
    };
    for own in all.as_object_mut().into_iter().flat_map(Map::values_mut).filter_map(Value::as_object_mut) {
        // Which rotates whole heads, whatever is said.
        if name_type(own) == "default" {
            own.remove("partial_rotary_factor");
        }
    }
    values.insert("rope_parameters".to_owned(), all);
    Ok(())
}

/// The rotations of types of layers, each as it is said, or as the lists of all layers have it; what scales positions is that of layers that see all.
///
/// Fails for lists with fewer entries than there are layers.
fn listed(theta: f64, values: &mut Map<String, Value>) -> Result<()> {
    const FULL: &str = "full_attention";
    let types: Vec<&str> = match values.get("layer_types").and_then(Value::as_array) {
        Some(types) => types.iter().filter_map(Value::as_str).collect(),
        None => vec![FULL],
    };
    let said = object(values, "rope_parameters")?.unwrap_or_default();
    let scaling = object(values, "rope_scaling")?;
    let mut all = Map::new();
    for kind in [FULL, "sliding_attention"] {
        let Some(first) = types.iter().position(|other| *other == kind) else { continue };
        let of = |key: &str| match values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => list.get(first).cloned().map(Some).ok_or_else(|| {
                Error::failed(format!("config.json: {key} has {} entries, and none for layer {first}", list.len()))
            }),
            Some(one) => Ok(Some(one.clone())),
        };
        let own = match types.iter().all(|kind| said.get(*kind).is_some_and(Value::is_object)) {
            true => said[kind].clone(),
            false => {
                let mut own = json!({"rope_type": "default", "rope_theta": of("rope_theta")?.unwrap_or(theta.into())});
                if let Some(share) = of("partial_rotary_factors")? {
                    own["partial_rotary_factor"] = share;
                }
                let scaled = scaling.iter().flatten().filter(|_| kind == FULL);
                scaled.for_each(|(key, value)| own[key] = value.clone());
                own
            }
        };
        all.insert(kind.to_owned(), own);
    }
    ["rope_theta", "rope_scaling"].iter().for_each(|key| drop(values.remove(*key)));
    values.insert("rope_parameters".to_owned(), all.into());
    Ok(())
}

/// The rotations of layers that see a window alone, and of those that see entries beside it: what scales positions is that of the latter, whose base
/// is `compress_rope_theta`, unless both are said.
fn main_and_compress(rotation: &Rotation, values: &mut Map<String, Value>) -> Result<()> {
    const KINDS: [&str; 2] = ["main", "compress"];
    let given = |key: &str| values.get(key).filter(|value| !value.is_null()).cloned();
    let theta = [("rope_theta", rotation.theta), ("compress_rope_theta", 1.6e5)]
        .map(|(key, usual)| given(key).unwrap_or_else(|| usual.into()));
    let head = values.get("head_dim").and_then(real).unwrap_or(512.0);
    let turned = given("qk_rope_head_dim").as_ref().and_then(real).map(|turned| (turned / head).into());
    let partial = given("partial_rotary_factor").or(turned).or(rotation.partial.map(Value::from)).unwrap_or_default();
    let (context, original) = (given("max_position_embeddings"), given("original_max_position_embeddings"));
    let old = object(values, "rope_scaling")?.filter(|scaling| !scaling.is_empty());
    let said = old.or(object(values, "rope_parameters")?).unwrap_or_default();
    let apart = KINDS.iter().all(|kind| said.get(*kind).is_some_and(Value::is_object));
    let mut all = Map::new();
    for (kind, theta) in KINDS.into_iter().zip(theta) {
        let mut own = match (said.get(kind).and_then(Value::as_object).filter(|_| apart), kind) {
            (Some(own), _) => own.clone(),
            (None, "main") => Map::new(),
            (None, _) => said.clone().into_iter().filter(|(key, _)| !KINDS.contains(&&key[..])).collect(),
        };
        let name = name_type(&mut own);
        if apart {
            own.entry("rope_theta").or_insert(theta);
        } else {
            own.insert("rope_theta".to_owned(), theta);
            own.insert("partial_rotary_factor".to_owned(), partial.clone());
            if name == "yarn" {
                // Its class takes none of what YaRN would warm attention by.
                own.entry("attention_factor").or_insert(1.0.into());
            }
        }
        if ["llama3", "yarn", "longrope"].contains(&&name[..]) {
            let inside = own.get("original_max_position_embeddings").filter(|value| !value.is_null()).cloned();
            let found = original.clone().or(inside).or(context.clone()).unwrap_or_default();
            own.insert("original_max_position_embeddings".to_owned(), found);
        }
        all.insert(kind.to_owned(), own.into());
    }
    ["rope_theta", "rope_scaling"].iter().for_each(|key| drop(values.remove(*key)));
    values.insert("rope_parameters".to_owned(), all.into());
    Ok(())
}

/// Settings of rotary positions outside the objects of their own; null ones are there.
struct Outside {
    theta: Option<Value>,
    partial: Option<Value>,
    base: Option<Value>,
    percent: Option<Value>,
    near: Option<Value>,
    dim: Option<Value>,
    original: Option<Value>,
    context: Value,
    head_dim: Option<f64>,
    /// The share of a head of latent attention that is rotated.
    turned: Option<f64>,
}

/// The share of each head that is rotated where config.json has a count of the values that are and of those that are not.
fn turned(values: &Map<String, Value>) -> Option<f64> {
    let count = |key: &str| values.get(key).and_then(real);
    let (rotated, others) = (count("qk_rope_head_dim")?, count("qk_nope_head_dim")?);
    Some(rotated / (rotated + others))
}

fn said(value: &Option<Value>) -> Option<&Value> {
    value.as_ref().filter(|value| !value.is_null())
}

fn object(values: &Map<String, Value>, key: &str) -> Result<Option<Map<String, Value>>> {
    match values.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object.clone())),
        Some(other) => Err(Error::failed(format!("config.json: {key} must be an object, found {}", shown(other)))),
    }
}

/// Puts a setting from outside into `own`, unless it is there.
fn fill(
    own: &mut Map<String, Value>,
    key: &str,
    outside: Option<(&str, &Value)>,
    default: Option<Value>,
    notes: &mut Vec<String>,
) {
    match (own.get(key).filter(|value| !value.is_null()), outside) {
        (Some(inside), Some((name, value))) if !same(inside, value) => notes.push(format!(
            "config.json has {name} {} outside the settings of rotary positions and {key} {} inside: {} is taken, as transformers does",
            shown(value),
            shown(inside),
            shown(inside)
        )),
        (Some(_), _) => {}
        (None, Some((_, value))) => drop(own.insert(key.to_owned(), value.clone())),
        (None, None) => drop(default.map(|default| own.insert(key.to_owned(), default))),
    }
}

/// Its `rope_type`, by the newer name if both are there.
fn name_type(own: &mut Map<String, Value>) -> String {
    let found = ["rope_type", "type"].iter().find_map(|key| own.get(*key).filter(|v| !v.is_null()).cloned());
    let found = found.unwrap_or_else(|| "default".into());
    own.remove("type");
    own.insert("rope_type".to_owned(), found.clone());
    found.as_str().unwrap_or_default().to_owned()
}

/// The rotation of all layers of `class`, from `own`, the settings that are its own, and those `outside`. Fails for settings that
/// the class cannot have.
fn flat(
    class: &str,
    rotation: &Rotation,
    mut own: Map<String, Value>,
    outside: &Outside,
    notes: &mut Vec<String>,
) -> Result<Map<String, Value>> {
    leave_out_layered(class, &mut own, notes)?;
    let named = |name: &'static str, value: &'_ Option<Value>| said(value).cloned().map(|value| (name, value));
    let (theta, partial) = match rotation.form {
        Form::NeoX => {
            if let Some((key, value)) =
                named("rope_theta", &outside.theta).or(named("partial_rotary_factor", &outside.partial))
            {
                notes.push(format!(
                    "config.json has {key} {} outside rope_parameters, which transformers does not read for `{class}`: it is left out",
                    shown(&value)
                ));
            }
            (named("rotary_emb_base", &outside.base), named("rotary_pct", &outside.percent))
        }
        _ => (named("rope_theta", &outside.theta), named("partial_rotary_factor", &outside.partial)),
    };
    let nulls = [own.get("rope_theta"), outside.theta.as_ref()];
    if theta.is_none() && said(&own.get("rope_theta").cloned()).is_none() && nulls.contains(&Some(&Value::Null)) {
        notes.push(format!(
            "config.json has null for rope_theta, which transformers 5 fails on: {} is taken",
            shown(&rotation.theta.into())
        ));
    }
    fill(&mut own, "rope_theta", theta.as_ref().map(|(n, v)| (*n, v)), Some(rotation.theta.into()), notes);
    let kind = kind_of(class, rotation.form, &mut own, notes);
    share(class, rotation, &mut own, Share { kind: &kind, outside, partial }, notes)?;
    if ["llama3", "yarn", "longrope"].contains(&kind.as_str()) {
        original_context(&mut own, outside, notes);
    }
    Ok(own)
}

/// Takes away settings for types of layers, which `class` does not tell apart. Fails for a class that has such types.
fn leave_out_layered(class: &str, own: &mut Map<String, Value>, notes: &mut Vec<String>) -> Result<()> {
    let nested = ["full_attention", "sliding_attention"];
    if let Some(kind) = nested.iter().find(|kind| own.get(**kind).is_some_and(Value::is_object)) {
        if strict::has_setting(class, "layer_types") {
            return Err(Error::failed(format!(
                "config.json: rope_parameters has settings for `{kind}` alone, and models of the type `{class}` have one rotation for \
                 all layers; write them without `{kind}` around them"
            )));
        }
        own.retain(|key, _| !nested.contains(&&key[..]));
        notes.push(format!(
            "config.json has rope_parameters for types of layers, which transformers does not read for `{class}`: what stands beside \
             them or outside counts, or else its defaults"
        ));
    }
    Ok(())
}

/// Settles `rope_type`: the kind that is meant, by its name of today.
fn kind_of(class: &str, form: Form, own: &mut Map<String, Value>, notes: &mut Vec<String>) -> String {
    let kind = match (name_type(own), form) {
        // Its configurations of the first days.
        (kind, Form::Long) if kind == "yarn" => "longrope".to_owned(),
        (kind, Form::Long) if kind == "su" => {
            let key = "original_max_position_embeddings";
            if own.get(key).is_none_or(Value::is_null) {
                notes.push(format!(
                    "config.json has rotary positions of the type su without {key} beside it, which transformers 5 fails on: that \
                     outside them, or the class's default, counts"
                ));
            }
            "longrope".to_owned()
        }
        // In a text the positions of all kinds are the same.
        (kind, _) if kind == "mrope" && class.ends_with("vl_text") => "default".to_owned(),
        (kind, _) => kind,
    };
    own.insert("rope_type".to_owned(), kind.clone().into());
    kind
}

/// What is said of the share of each head that is rotated.
struct Share<'a> {
    /// The `rope_type`.
    kind: &'a str,
    outside: &'a Outside,
    /// The setting outside that is the share, and its value.
    partial: Option<(&'static str, Value)>,
}

/// Settles `partial_rotary_factor`. Fails for a rotation of a part of each head, where it is scaled, or the class fails on it, in a class that
/// rotates all of it.
fn share(
    class: &str,
    rotation: &Rotation,
    own: &mut Map<String, Value>,
    Share { kind, outside, mut partial }: Share<'_>,
    notes: &mut Vec<String>,
) -> Result<()> {
    let default = match rotation.partial {
        Some(default) => {
            if class == "minimax_m2" && outside.partial.is_none() {
                let dim = said(&outside.dim).and_then(real).zip(outside.head_dim);
                partial = dim.map(|(dim, head)| ("rotary_dim", (dim / head).into()));
            }
            // Its class puts its own in the place of what stands outside.
            if class == "bamba"
                && let Some((key, value)) = partial.take().filter(|(_, value)| real(value) != Some(default))
            {
                notes.push(format!(
                        "config.json has {key} {} outside rope_parameters, which transformers does not read for `{class}`: it is left out",
                        shown(&value)
                    ));
            }
            // A null is no share, and that is all of a head.
            let nulled = rotation.form == Form::Flat && class != "bamba" && outside.partial == Some(Value::Null);
            match outside.turned.filter(|_| class == "mistral4") {
                Some(turned) => turned,
                None if nulled => 1.0,
                None => default,
            }
        }
        // This kind is the same in every class.
        None if kind == "proportional" => 1.0,
        None => {
            let inside = own.remove("partial_rotary_factor").filter(|v| !v.is_null());
            if let Some(share) = inside.or(partial.map(|(_, value)| value)).filter(|share| real(share) != Some(1.0)) {
                // These classes fail on it.
                if kind != "default" || matches!(class, "glm4_moe_lite" | "solar_open") {
                    return Err(Error::failed(format!(
                        "config.json: partial_rotary_factor is {}, but models of the type `{class}` rotate the whole of each head",
                        shown(&share)
                    )));
                }
                notes.push(format!(
                    "config.json has partial_rotary_factor {}, which transformers does not read for `{class}`: whole heads are rotated",
                    shown(&share)
                ));
            }
            return Ok(());
        }
    };
    let partial = partial.as_ref().map(|(name, value)| (*name, value));
    fill(own, "partial_rotary_factor", partial, Some(default.into()), notes);
    Ok(())
}

/// Settles `original_max_position_embeddings`: that outside counts, or else that inside, or else the model's context.
fn original_context(own: &mut Map<String, Value>, outside: &Outside, notes: &mut Vec<String>) {
    let key = "original_max_position_embeddings";
    let inside = own.get(key).filter(|v| !v.is_null());
    if let (Some(outer), Some(inner)) = (&outside.original, inside)
        && !same(outer, inner)
    {
        notes.push(format!(
            "config.json has {key} {} outside the settings of rotary positions and {} inside: {} is taken, as transformers does",
            shown(outer),
            shown(inner),
            shown(outer)
        ));
    }
    let found = outside.original.as_ref().or(inside).unwrap_or(&outside.context).clone();
    own.insert(key.to_owned(), found);
}

fn layered(
    rotation: &Rotation,
    near: Option<&str>,
    old: Option<Map<String, Value>>,
    new: Option<Map<String, Value>>,
    outside: &Outside,
    notes: &mut Vec<String>,
) -> Map<String, Value> {
    let kinds = ["full_attention", "sliding_attention"];
    let mut all = new
        .unwrap_or_else(|| kinds.map(|kind| (kind.to_owned(), json!({"rope_type": "default"}))).into_iter().collect());
    if kinds.iter().all(|kind| all.get(*kind).is_none_or(Value::is_null)) && !all.is_empty() {
        notes.push(
            "config.json has rope_parameters for all layers alike, which transformers does not read for this model: those of its \
             types of layers are the usual ones"
                .to_owned(),
        );
    }
    let truncate = all.get("truncate").cloned();
    let mut of = |kind: &str| match all.remove(kind) {
        Some(Value::Object(own)) => own,
        _ => Map::from_iter([("rope_type".to_owned(), "default".into())]),
    };
    let (mut wide, mut local) = (of(kinds[0]), of(kinds[1]));
    if let Some(old) = old {
        let before = wide.get("rope_type").cloned();
        wide.extend(old);
        // It is the newer name that counts, and a default was there.
        if let (Some(named), Some(before)) = (wide.get("type"), before)
            && wide.get("rope_type") == Some(&before)
            && *named != before
        {
            notes.push(format!(
                "config.json has a rope_scaling of the type {}, and transformers reads only rope_type there, which is {}",
                shown(named),
                shown(&before)
            ));
        }
    }
    let theta = said(&outside.theta).map(|value| ("rope_theta", value));
    fill(&mut wide, "rope_theta", theta, Some(rotation.theta.into()), notes);
    let (name, theta) = match near {
        Some(key) => (key, 1e4),
        None => ("rope_theta", rotation.theta),
    };
    let own = near.and(said(&outside.near)).map(|value| (name, value));
    fill(&mut local, "rope_theta", own, Some(theta.into()), notes);
    if near.is_none()
        && let Some(theta) = said(&outside.theta)
        && same(theta, &wide["rope_theta"])
        && !same(theta, &local["rope_theta"])
    {
        notes.push(format!(
            "config.json has rope_theta {}, which transformers takes for layers that see all: those with a window have {}",
            shown(theta),
            shown(&local["rope_theta"])
        ));
    }
    for own in [&mut wide, &mut local] {
        let kind = name_type(own);
        if ["llama3", "yarn", "longrope"].contains(&kind.as_str())
            && own.get("original_max_position_embeddings").is_none_or(Value::is_null)
        {
            own.insert("original_max_position_embeddings".to_owned(), outside.context.clone());
        }
        own.remove("truncate");
        if let Some(truncate) = &truncate {
            own.insert("truncate".to_owned(), truncate.clone());
        }
        match rotation.partial {
            // It is the way of turning heads that says how much of them.
            None if kind == "proportional" => {}
            None => drop(own.remove("partial_rotary_factor")),
            Some(share) => fill(own, "partial_rotary_factor", None, Some(share.into()), notes),
        }
    }
    [(kinds[0].to_owned(), wide.into()), (kinds[1].to_owned(), local.into())].into_iter().collect()
}

/// Whether two settings of rotary positions say the same.
fn alike(a: &Map<String, Value>, b: &Map<String, Value>) -> bool {
    let same = |a: &Value, b: &Value| match (a, b) {
        (Value::Object(a), Value::Object(b)) => alike(a, b),
        (a, b) => same(a, b),
    };
    a.len() == b.len() && a.iter().all(|(key, value)| b.get(key).is_some_and(|other| same(value, other)))
}
