//! What a `recipe.yaml` of llm-compressor asks for, as far as that is the same here; everything else is refused by its name.
//!
//! ```text
//! quant_stage:                       one stage, one group of modifiers
//!   quant_modifiers:
//!     AWQModifier: {…}               method: awq, with a GPTQModifier after it awq+gptq
//!     GPTQModifier: {…}              gptq; a QuantizationModifier is rtn
//!       scheme / config_groups       scheme, bits, group_size, symmetric; groups for some modules become overrides
//!       ignore                       patterns that may match nothing
//! ```
//!
//! What the file does not say has the defaults of this program.

use serde_json::{Map, Value};

use super::{Override, Request};

/// Why a file asks for what is not made here: where it says so, and what to write in its place.
type Refusal = String;

/// A modifier's name and its settings.
type Modifier<'a> = (&'a str, &'a Map<String, Value>);

/// Modifiers that choose codes, with the method that each is.
const QUANTIZERS: &[(&str, &str)] = &[("GPTQModifier", "gptq"), ("QuantizationModifier", "rtn")];

/// Settings that say how the other program goes about it, and change nothing of the result.
const IDLE: &[&str] = &[
    "block_size",
    "offload_hessians",
    "offload_device",
    "bypass_divisibility_checks",
    "sequential_update",
    "sequential_targets",
    "index",
    "group",
    "start",
    "end",
    "update",
];

/// Schemes that are called the same here, or otherwise.
const SCHEMES: &[(&str, &str)] = &[
    ("W4A16", "W4A16"),
    ("W4A16_ASYM", "W4A16_ASYM"),
    ("W8A16", "W8A16"),
    ("W8A8", "W8A8"),
    ("INT8", "W8A8"),
    ("FP8_DYNAMIC", "FP8_DYNAMIC"),
    ("NVFP4A16", "NVFP4A16"),
];

/// Names of observers, with what does the same here.
const OBSERVERS: &[(&str, &str)] = &[
    ("minmax", "minmax"),
    ("memoryless_minmax", "minmax"),
    ("static_minmax", "minmax"),
    ("mse", "mse"),
    ("memoryless_mse", "mse"),
];

/// How weights of some modules are held.
#[derive(Clone, Debug, Default, PartialEq)]
struct Held {
    scheme: Option<String>,
    bits: Option<u8>,
    group_size: Option<i64>,
    symmetric: Option<bool>,
    act_order: Option<bool>,
    observer: Option<String>,
}

/// Reads a file's text.
///
/// Fails where it is no YAML, no recipe, or asks for what is not made here, with the reason.
pub fn read(text: &str) -> Result<Request, Refusal> {
    // A recipe is small; more is refused before it is laid out in memory, and so are aliases that grow.
    let whole: Value = serde_saphyr::from_str(text).map_err(|error| {
        let why = error.to_string();
        why.lines().next().unwrap_or_default().to_owned()
    })?;
    let modifiers = modifiers(&whole)?;
    let (awq, rest): (Vec<_>, Vec<_>) = modifiers.into_iter().partition(|(name, _)| *name == "AWQModifier");
    let mut request = Request::default();
    if let [(_, args)] = &awq[..] {
        check_awq(args)?;
    }
    let (method, args) = match (&awq[..], &rest[..]) {
        ([], [(name, args)]) => (method_of(name)?, *args),
        ([_], [(name, args)]) if method_of(name)? == "gptq" => ("awq+gptq", *args),
        ([(_, own)], [(name, args)]) => {
            method_of(name)?;
            if own.keys().any(|key| QUANTIZATION.contains(&&**key)) {
                return Err(
                    "AWQModifier and another one both say how to quantize: leave that to one of them".to_owned()
                );
            }
            ("awq", *args)
        }
        // As it was before AWQ needed another one to quantize.
        ([(_, args)], []) => ("awq", *args),
        ([], []) => return Err("it names no modifier".to_owned()),
        _ => return Err("it names several modifiers that choose codes: keep one, and make a target of each".to_owned()),
    };
    request.method = Some(method.to_owned());
    quantization(args, method.ends_with("gptq"), &mut request)?;
    Ok(request)
}

/// The modifiers of the one stage, in their order.
fn modifiers(whole: &Value) -> Result<Vec<Modifier<'_>>, Refusal> {
    let stages = whole.as_object().ok_or("it is no recipe: it begins with a stage, as quant_stage")?;
    let mut found = Vec::new();
    let mut seen = 0;
    for (stage, groups) in stages {
        if stage == "args" && (groups.is_null() || groups.as_object().is_some_and(Map::is_empty)) {
            continue;
        }
        if !stage.ends_with("_stage") {
            return Err(format!("`{stage}` is no stage: write what it stands for into the modifiers"));
        }
        seen += 1;
        for (group, all) in groups.as_object().ok_or_else(|| format!("{stage} holds no modifiers"))? {
            let all = all.as_object().filter(|_| group.ends_with("_modifiers"));
            for (name, args) in all.ok_or_else(|| format!("{stage}: `{group}` is no group of modifiers"))? {
                let known = name == "AWQModifier" || QUANTIZERS.iter().any(|(known, _)| known == name);
                if !known {
                    return Err(refused_modifier(name));
                }
                let none = || format!("{name} is no map of settings");
                found.push((&**name, args.as_object().ok_or_else(none)?));
            }
        }
    }
    match seen {
        0 | 1 => Ok(found),
        _ => Err("it has several stages: keep the one that quantizes".to_owned()),
    }
}

fn method_of(name: &str) -> Result<&'static str, Refusal> {
    let found = QUANTIZERS.iter().find(|(known, _)| *known == name);
    found.map(|(_, method)| *method).ok_or_else(|| refused_modifier(name))
}

fn refused_modifier(name: &str) -> Refusal {
    let instead = match name {
        "SmoothQuantModifier" => {
            "inputs are not smoothed here: leave it out, or write an AWQModifier, which scales channels for W4A16"
        }
        "SparseGPTModifier" | "WandaPruningModifier" | "MagnitudePruningModifier" | "ConstantPruningModifier" => {
            "weights are not pruned here: leave it out"
        }
        _ => "there are GPTQModifier, AWQModifier and QuantizationModifier",
    };
    format!("{name}: {instead}")
}

/// Settings by which modules are given a scheme.
const QUANTIZATION: &[&str] = &["scheme", "config_groups", "targets", "ignore", "kv_cache_scheme"];

/// Fails for settings of AWQ that search otherwise than is done here.
fn check_awq(args: &Map<String, Value>) -> Result<(), Refusal> {
    let usual = [
        ("duo_scaling", Value::Bool(true), "leave it out: scales are searched by inputs and weights here"),
        ("n_grid", 20.into(), "leave it out: as many exponents are tried here as are worth it"),
        ("mappings", Value::Null, "leave it out: what scales can go into is found from what the model computes"),
    ];
    for (key, usual, instead) in usual {
        match args.get(key) {
            Some(given) if *given != usual && !given.is_null() => {
                return Err(format!("AWQModifier.{key} is {given}: {instead}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Reads what a modifier says of schemes.
fn quantization(args: &Map<String, Value>, sweeps: bool, request: &mut Request) -> Result<(), Refusal> {
    let mut groups = Vec::new();
    let mut observer = None;
    for (key, value) in args.iter().filter(|(_, value)| !value.is_null()) {
        match &**key {
            "scheme" => groups.extend(scheme(value, args.get("targets"))?),
            "config_groups" => groups.extend(config_groups(value)?),
            "ignore" => request.ignore = Some(strings(key, value)?.iter().map(|name| ignored(name)).collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect()),
            "dampening_frac" if sweeps => request.damp = Some(value.as_f64().ok_or("dampening_frac is no number")?),
            "weight_observer" => observer = Some(observer_of(value)?),
            "observer" => {
                for (of, name) in value.as_object().ok_or("observer is no map")? {
                    match &**of {
                        "weights" => observer = Some(observer_of(name)?),
                        _ => return Err(format!("observer.{of}: scales of inputs are not calibrated here: leave it out")),
                    }
                }
            }
            "kv_cache_scheme" => return Err("kv_cache_scheme: the cache's scales are not calibrated here: leave it out, and give the server --kv-cache-dtype fp8".to_owned()),
            "input_observer" | "output_observer" => return Err(format!("{key}: scales of inputs are not calibrated here: leave it out")),
            "targets" | "actorder" | "duo_scaling" | "n_grid" | "mappings" => {}
            key if IDLE.contains(&key) => {}
            key => return Err(format!("`{key}` is not known: leave it out")),
        }
    }
    if groups.is_empty() {
        return Err("it says neither scheme nor config_groups: write scheme: W4A16, or what is wanted".to_owned());
    }
    settle(groups, request)?;
    request.observer = match (request.observer.take(), observer) {
        (Some(own), Some(other)) if own != other => {
            return Err(format!("it names two observers, {own} and {other}: keep one"));
        }
        (own, other) => own.or(other),
    };
    if sweeps {
        if let Some(given) = args.get("actorder") {
            let own = order(given)?;
            if request.act_order.is_some_and(|of_scheme| of_scheme != own) {
                return Err("actorder is said twice, and not alike: keep one".to_owned());
            }
            request.act_order = Some(own);
        }
    } else {
        request.act_order = None;
    }
    Ok(())
}

/// The schemes of `config_groups`, each with what it is for.
fn config_groups(value: &Value) -> Result<Vec<(Vec<String>, Held)>, Refusal> {
    let mut found = Vec::new();
    for (name, group) in value.as_object().ok_or("config_groups is no map")? {
        let within = |why: Refusal| format!("{name}: {why}");
        let group = group.as_object().ok_or_else(|| within("is no scheme".to_owned()))?;
        let known = ["targets", "weights", "input_activations", "output_activations", "format"];
        if let Some(key) = group.keys().find(|key| !known.contains(&&***key)) {
            return Err(within(format!("`{key}` is not known: leave it out")));
        }
        let targets = group.get("targets").ok_or_else(|| within("it has no targets".to_owned()))?;
        let targets = strings("targets", targets).map_err(within)?;
        found.push((targets, held(group).map_err(within)?));
    }
    Ok(found)
}

/// What `scheme` says: a name, a name for each kind of targets, or a scheme written out.
fn scheme(value: &Value, targets: Option<&Value>) -> Result<Vec<(Vec<String>, Held)>, Refusal> {
    let targets = match targets.filter(|targets| !targets.is_null()) {
        Some(targets) => strings("targets", targets)?,
        None => vec!["Linear".to_owned()],
    };
    match value {
        Value::String(name) => Ok(vec![(targets, preset(name)?)]),
        Value::Object(map) if map.contains_key("weights") => Ok(vec![(targets, held(map)?)]),
        Value::Object(map) => {
            map.iter().map(|(name, targets)| Ok((strings("scheme", targets)?, preset(name)?))).collect()
        }
        _ => Err("scheme is neither a name nor a map".to_owned()),
    }
}

fn preset(name: &str) -> Result<Held, Refusal> {
    let known = SCHEMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
    let (_, own) = known.ok_or_else(|| {
        let all: Vec<&str> = SCHEMES.iter().map(|(name, _)| *name).collect();
        format!("scheme {name} is not made here: there are {}", all.join(", "))
    })?;
    Ok(Held { scheme: Some((*own).to_owned()), ..Held::default() })
}

/// A scheme that is written out.
fn held(scheme: &Map<String, Value>) -> Result<Held, Refusal> {
    let weights = scheme.get("weights").and_then(Value::as_object).ok_or("it has no weights")?;
    if scheme.get("output_activations").is_some_and(|value| !value.is_null()) {
        return Err("output_activations: outputs are not rounded here: leave it out".to_owned());
    }
    let known = [
        "num_bits",
        "type",
        "symmetric",
        "strategy",
        "group_size",
        "dynamic",
        "actorder",
        "observer",
        "observer_kwargs",
        "block_structure",
        "scale_dtype",
        "zp_dtype",
    ];
    if let Some(key) = weights.keys().find(|key| !known.contains(&&***key)) {
        return Err(format!("weights.{key} is not known: leave it out"));
    }
    let given = |key: &str| weights.get(key).filter(|value| !value.is_null());
    if given("dynamic").is_some_and(|value| *value != Value::Bool(false)) {
        return Err("weights.dynamic: scales of weights are stored: write false".to_owned());
    }
    for key in ["block_structure", "scale_dtype", "zp_dtype"] {
        if given(key).is_some() {
            return Err(format!("weights.{key}: leave it out; a scheme by name says it, as NVFP4A16"));
        }
    }
    if given("observer_kwargs").is_some_and(|value| value.as_object().is_none_or(|all| !all.is_empty())) {
        return Err("weights.observer_kwargs: an observer has no settings here: leave it out".to_owned());
    }
    let bits = given("num_bits").and_then(Value::as_u64).unwrap_or(8);
    let float = given("type").is_some_and(|kind| kind == "float");
    let symmetric = given("symmetric").is_none_or(|value| value != &Value::Bool(false));
    let group = given("group_size").and_then(Value::as_i64);
    let strategy = match given("strategy").and_then(Value::as_str) {
        Some(strategy) => strategy,
        None if group.is_some_and(|group| group > 0) => "group",
        None if group == Some(-1) => "channel",
        None => "tensor",
    };
    let inputs = scheme.get("input_activations").filter(|value| !value.is_null());
    let what = format!("{bits} bits, {}, strategy {strategy}", if float { "float" } else { "int" });
    let mut held = match (float, strategy, inputs) {
        (false, "group" | "channel", None) if [2, 3, 4, 8].contains(&bits) => {
            let group = match (strategy, group) {
                ("channel", _) => -1,
                (_, Some(group)) if group > 0 => group,
                _ => return Err("weights.group_size is missing".to_owned()),
            };
            Held { bits: Some(bits as u8), group_size: Some(group), symmetric: Some(symmetric), ..Held::default() }
        }
        (float, "channel", Some(inputs)) if bits == 8 && symmetric => {
            let name = if float { "FP8_DYNAMIC" } else { "W8A8" };
            check_inputs(inputs, float, name)?;
            Held { scheme: Some(name.to_owned()), ..Held::default() }
        }
        (true, "tensor_group", None) if bits == 4 && symmetric && group == Some(16) => preset("NVFP4A16")?,
        _ => {
            let inputs = if inputs.is_some() { ", with inputs rounded" } else { "" };
            return Err(format!(
                "weights of {what}{inputs} are not made here: write integers of 2, 3, 4 or 8 bits with strategy group or channel, or scheme: \
                 W8A8, FP8_DYNAMIC or NVFP4A16"
            ));
        }
    };
    held.act_order = weights.get("actorder").filter(|value| !value.is_null()).map(order).transpose()?;
    held.observer = given("observer").map(observer_of).transpose()?;
    Ok(held)
}

/// Fails for inputs that are rounded otherwise than token by token as they come.
fn check_inputs(inputs: &Value, float: bool, scheme: &str) -> Result<(), Refusal> {
    let kind = if float { "float" } else { "int" };
    let wanted = [
        ("num_bits", Value::from(8)),
        ("type", kind.into()),
        ("symmetric", true.into()),
        ("strategy", "token".into()),
        ("dynamic", true.into()),
    ];
    for (key, wanted) in wanted {
        let usual = if key == "symmetric" {
            Value::Bool(true)
        } else if key == "type" {
            "int".into()
        } else {
            Value::Null
        };
        let given = inputs.get(key).filter(|value| !value.is_null()).unwrap_or(&usual);
        if *given != wanted {
            return Err(format!("input_activations.{key} is {given}, and {scheme} has {wanted}: write that"));
        }
    }
    Ok(())
}

/// Whether columns are gone through by falling importance.
fn order(value: &Value) -> Result<bool, Refusal> {
    match value {
        Value::Null | Value::Bool(false) => Ok(false),
        Value::String(name) if ["static", "weight"].contains(&&**name) => Ok(true),
        Value::String(name) if ["group", "dynamic"].contains(&&**name) => Err(format!(
            "actorder: {name} stores the order of the columns, which vLLM refuses for many schemes: write static, or make a GPTQ file with \
             --format gptq --desc-act"
        )),
        other => Err(format!("actorder is {other}: write static or null")),
    }
}

fn observer_of(value: &Value) -> Result<String, Refusal> {
    let name = value.as_str().unwrap_or_default();
    let known = OBSERVERS.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
    known
        .map(|(_, own)| (*own).to_owned())
        .ok_or_else(|| format!("observer {value} is not known here: write minmax or mse"))
}

/// A string, or a list of such.
fn strings(key: &str, value: &Value) -> Result<Vec<String>, Refusal> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let all = match value {
        Value::String(one) => Some(vec![one.clone()]),
        Value::Array(all) => all.iter().map(text).collect(),
        _ => None,
    };
    all.ok_or_else(|| format!("{key} is no list of names"))
}

/// The pattern for modules of this name, which is whole there and may be the end of one here.
fn pattern(name: &str) -> Result<String, Refusal> {
    if name.starts_with("re:") {
        return Ok(name.to_owned());
    }
    if name.starts_with(|c: char| c.is_ascii_uppercase()) {
        return Err(format!(
            "`{name}` is a class of modules, and they are found by name here: write re: and a regular expression"
        ));
    }
    Ok(format!("re:{}$", regex::escape(name)))
}

/// The pattern for modules that stay as they are; it may match none, as there. None for the output projection, which always stays.
fn ignored(name: &str) -> Result<Option<String>, Refusal> {
    if name == "lm_head" {
        return Ok(None);
    }
    Ok(Some(format!("?{}", pattern(name)?)))
}

/// Turns schemes and what they are for into a request: the one for all linears is what it says of itself, and the others are overrides.
/// A linear has the scheme of the first name that is its own, then of the first regular expression in the order of the alphabet, and
/// then that of all linears; one that none is for stays as it is.
fn settle(groups: Vec<(Vec<String>, Held)>, request: &mut Request) -> Result<(), Refusal> {
    let all: Vec<&Held> =
        groups.iter().filter(|(targets, _)| targets.iter().any(|t| t == "Linear")).map(|(_, held)| held).collect();
    if all.len() > 1 {
        return Err("two schemes are for all Linear: keep one".to_owned());
    }
    for (what, differs) in [
        ("actorder", groups.windows(2).any(|pair| pair[0].1.act_order != pair[1].1.act_order)),
        ("observer", groups.windows(2).any(|pair| pair[0].1.observer != pair[1].1.observer)),
    ] {
        if differs {
            return Err(format!("{what} is not the same in all groups: write it once, beside them"));
        }
    }
    let whole = all.first().copied().unwrap_or(&groups[0].1).clone();
    let mut some: Vec<(&str, &Held)> = groups
        .iter()
        .flat_map(|(targets, held)| targets.iter().map(move |target| (&**target, held)))
        .filter(|(target, _)| *target != "Linear")
        .collect();
    some.sort_by_key(|(target, _)| (target.starts_with("re:"), *target));
    for (target, held) in some {
        let numbers = held.bits.is_some() && whole.bits.is_some();
        if !numbers && *held != whole {
            return Err(format!(
                "`{target}` and others have schemes of different kinds: write them out in a recipe.toml, with [[override]]"
            ));
        }
        let (bits, group_size, symmetric) = (held.bits, held.group_size, held.symmetric);
        request.overrides.push(Override {
            pattern: pattern(target)?,
            bits,
            group_size,
            symmetric,
            ..Override::default()
        });
    }
    if all.is_empty() {
        request.overrides.push(Override { pattern: "re:.*".to_owned(), ignore: true, ..Override::default() });
    }
    (request.scheme, request.bits, request.group_size, request.symmetric) =
        (whole.scheme, whole.bits, whole.group_size, whole.symmetric);
    (request.act_order, request.observer) = (whole.act_order, whole.observer);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(modifiers: &str) -> Result<Request, Refusal> {
        let lines: String = modifiers.lines().map(|line| format!("    {line}\n")).collect();
        read(&format!("quant_stage:\n  quant_modifiers:\n{lines}"))
    }

    #[test]
    fn a_scheme_by_name_is_the_same_here() {
        let found =
            of("GPTQModifier:\n  scheme: W4A16\n  targets: Linear\n  ignore: [lm_head, 're:.*mlp\\.gate$', a.b]\n  \
                        dampening_frac: 0.01\n  block_size: 128\n  offload_hessians: false")
            .unwrap();
        let expected: Request = toml::from_str(
            "method = 'gptq'\nscheme = 'W4A16'\ndamp = 0.01\nignore = ['?re:.*mlp\\.gate$', '?re:a\\.b$']",
        )
        .unwrap();
        assert_eq!(found, expected);
        assert_eq!(
            of("QuantizationModifier:\n  scheme: {FP8_DYNAMIC: [Linear]}").unwrap().scheme.unwrap(),
            "FP8_DYNAMIC"
        );
    }

    #[test]
    fn groups_are_settings_and_overrides() {
        let weights = |bits: u8, targets: &str| {
            format!(
                "      weights: {{num_bits: {bits}, type: int, symmetric: true, strategy: group, group_size: 64}}\n      targets: [{targets}]\n"
            )
        };
        let one = format!("GPTQModifier:\n  actorder: null\n  config_groups:\n    group_0:\n{}", weights(4, "Linear"));
        let found = of(&one).unwrap();
        let expected: Request =
            toml::from_str("method = 'gptq'\nbits = 4\ngroup_size = 64\nsymmetric = true\nact_order = false").unwrap();
        assert_eq!(found, expected);
        // Names before expressions, these in the order of the alphabet, and all others stay as they are.
        let two = format!(
            "AWQModifier: {{}}\nGPTQModifier:\n  config_groups:\n    a:\n{}    b:\n{}",
            weights(8, "'re:.*down_proj', 're:.*a_proj'"),
            weights(4, "'re:.*b_proj', x.y")
        );
        let found = of(&two).unwrap();
        let overrides: Vec<(&str, Option<u8>, bool)> =
            found.overrides.iter().map(|one| (&*one.pattern, one.bits, one.ignore)).collect();
        assert_eq!(
            overrides,
            [
                ("re:x\\.y$", Some(4), false),
                ("re:.*a_proj", Some(8), false),
                ("re:.*b_proj", Some(4), false),
                ("re:.*down_proj", Some(8), false),
                ("re:.*", None, true)
            ]
        );
        assert_eq!(found.method.unwrap(), "awq+gptq");
    }

    #[test]
    fn schemes_that_are_written_out_are_known_by_what_they_say() {
        let of = |weights: &str, inputs: &str| {
            let group = format!(
                "  config_groups:\n    g:\n      targets: [Linear]\n      weights: {{{weights}}}\n      {inputs}"
            );
            of(&format!("QuantizationModifier:\n{group}")).map(|request| request.scheme)
        };
        let dynamic = |kind: &str| {
            format!("input_activations: {{num_bits: 8, type: {kind}, symmetric: true, strategy: token, dynamic: true}}")
        };
        let int8 = "num_bits: 8, type: int, symmetric: true, strategy: channel";
        let fp8 = "num_bits: 8, type: float, symmetric: true, strategy: channel, dynamic: false";
        assert_eq!(of(int8, &dynamic("int")).unwrap().unwrap(), "W8A8");
        assert_eq!(of(fp8, &dynamic("float")).unwrap().unwrap(), "FP8_DYNAMIC");
        assert_eq!(
            of("num_bits: 4, type: float, strategy: tensor_group, group_size: 16", "").unwrap().unwrap(),
            "NVFP4A16"
        );
        assert!(
            of(int8, "input_activations: {num_bits: 8, type: int, strategy: tensor}").unwrap_err().contains("strategy")
        );
        assert!(of(fp8, "").unwrap_err().contains("FP8_DYNAMIC"));
    }

    #[test]
    fn awq_alone_is_read_in_its_old_form_and_its_new() {
        let new = of("AWQModifier:\n  duo_scaling: true\nQuantizationModifier:\n  scheme: W4A16_ASYM").unwrap();
        let old = of("AWQModifier:\n  scheme: W4A16_ASYM\n  targets: [Linear]").unwrap();
        assert_eq!((new.method.as_deref(), &new), (Some("awq"), &old));
    }

    #[test]
    fn what_is_not_the_same_is_refused_by_name() {
        let gptq = |more: &str| format!("GPTQModifier:\n  scheme: W4A16\n  {more}");
        for (text, told) in [
            (
                "SmoothQuantModifier:\n  smoothing_strength: 0.8\nGPTQModifier:\n  scheme: W8A8".to_owned(),
                "SmoothQuantModifier",
            ),
            ("SparseGPTModifier:\n  sparsity: 0.5".to_owned(), "pruned"),
            (
                "AWQModifier:\n  mappings: [a]\nQuantizationModifier:\n  scheme: W4A16".to_owned(),
                "AWQModifier.mappings",
            ),
            (
                "AWQModifier:\n  duo_scaling: both\nQuantizationModifier:\n  scheme: W4A16".to_owned(),
                "AWQModifier.duo_scaling",
            ),
            ("QuantizationModifier:\n  scheme: NVFP4".to_owned(), "there are W4A16"),
            ("QuantizationModifier:\n  targets: [Linear]".to_owned(), "neither scheme nor config_groups"),
            (gptq("actorder: group"), "write static"),
            (gptq("kv_cache_scheme: {num_bits: 8}"), "--kv-cache-dtype"),
            (gptq("observer: {input: mse}"), "observer.input"),
            (gptq("weight_observer: imatrix_mse"), "minmax or mse"),
            (gptq("ignore: [Qwen3MoeSparseMoeBlock]"), "class of modules"),
            (gptq("damping: 1"), "`damping` is not known"),
            ("GPTQModifier:\n  scheme: W4A16\nQuantizationModifier:\n  scheme: W8A16".to_owned(), "several modifiers"),
        ] {
            let refused = of(&text).unwrap_err();
            assert!(refused.contains(told), "{text}: {refused}");
        }
        for (text, told) in [
            ("", "no recipe"),
            ("a: 1", "`a` is no stage"),
            ("a_stage: {x: 1}", "`x` is no group"),
            ("a_stage: {}\nb_stage: {}", "several stages"),
            ("a_stage: [", ""),
            ("default_stage: {default_modifiers: {GPTQModifier: 3}}", "no map"),
        ] {
            let refused = read(text).unwrap_err();
            assert!(refused.contains(told), "{text}: {refused}");
        }
    }
}
