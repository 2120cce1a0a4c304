//! Reading a checkpoint's quantization configuration, as written here or by the libraries that own the formats.

use fancy_regex::Regex;
use serde_json::{Map, Value};

use super::compressed_tensors::is_written;
use super::foreign::Library;
use super::{Awq, Codec, CompressedTensors, Declared, Foreign, Gptq, Mlx, PartLookup, TensorLookup, mlx};
use crate::encoding::{Activation, Block, Encoding};
use crate::error::{Error, Result};
use crate::grid::Scheme;
use crate::weight::PackedWeight;
use crate::words::WordLayout;

/// What a checkpoint says about how its modules are quantized.
#[derive(Debug)]
pub struct QuantizationReader {
    method: String,
    rules: Rules,
    activations: bool,
    cache: bool,
}

#[derive(Debug)]
enum Rules {
    CompressedTensors {
        groups: Vec<(Vec<Target>, Weights)>,
        ignore: Vec<Target>,
    },
    Gptq {
        base: GptqSettings,
        dynamic: Vec<(Regex, Option<GptqSettings>)>,
        zeros_minus_one: bool,
    },
    Awq {
        scheme: Scheme,
        skip: Vec<String>,
    },
    /// The encoding of all modules, and of those that are named.
    Mlx(mlx::Said),
    /// Told by the parts that are there.
    Foreign {
        library: Library,
        block: Option<[usize; 2]>,
    },
}

/// What compressed-tensors says about the weights of a group.
#[derive(Clone, Copy, Debug)]
enum Weights {
    /// `pack-quantized`.
    Packed(Encoding),
    /// Another format: the blocks that share a scale, where they are declared, and the encoding, where it is one that is written too.
    Foreign(Option<[usize; 2]>, Option<Encoding>),
}

#[derive(Clone, Copy, Debug)]
struct GptqSettings {
    scheme: Scheme,
}

/// An entry of `targets` or `ignore`.
#[derive(Debug)]
enum Target {
    Pattern(Regex),
    /// A module's name or the name of its class.
    Name(String),
}

/// Every `quant_method` that is read.
const METHODS: &str = "compressed-tensors, gptq, awq, fp8, fbgemm_fp8, bitsandbytes, mxfp4";

/// Keys of config.json, and of its `text_config`, that say how weights are quantized; the last is MLX's.
pub const QUANTIZATION_KEYS: &[&str] = &["quantization_config", "compression_config", "quantization"];

/// What a config.json, or a whole quantize_config.json, says of quantization.
pub(super) fn declaration(config_json: &Value) -> Option<&Value> {
    let object = config_json.as_object()?;
    // Of a model in a wrapper, which may say it inside.
    let places = [Some(object), object.get("text_config").and_then(Value::as_object)];
    // An empty one says nothing.
    let empty = |value: &Value| value.is_null() || value.as_object().is_some_and(Map::is_empty);
    let said = |key: &str, value: &Value| !empty(value) && (key != "quantization" || value.is_object());
    let found = places
        .into_iter()
        .flatten()
        .find_map(|object| QUANTIZATION_KEYS.iter().find_map(|key| object.get(*key).filter(|value| said(key, value))));
    let whole =
        object.contains_key("quant_method") || (object.contains_key("bits") && object.contains_key("group_size"));
    found.or_else(|| whole.then_some(config_json))
}

/// The `quant_method` that a config.json declares, with the names of those that do not say it themselves; `None` when the
/// model is not quantized.
pub fn declared_method(config_json: &Value) -> Option<&str> {
    let config = declaration(config_json)?.as_object()?;
    Some(match config.get("quant_method").and_then(Value::as_str) {
        Some(method) => method,
        None if config.contains_key("config_groups") => "compressed-tensors",
        // MLX writes what it says there once more under the key that others read.
        None if config_json.get("quantization").is_some_and(Value::is_object) => "mlx",
        // As transformers knows it, which wrote no method at first.
        None if ["load_in_4bit", "load_in_8bit"].iter().any(|key| config.get(*key) == Some(&Value::Bool(true))) => {
            "bitsandbytes"
        }
        None => "gptq",
    })
}

/// Reads `quantization_config` of a config.json, or a whole quantize_config.json; `None` when the model is not quantized.
pub fn read_quantization(config_json: &Value) -> Result<Option<QuantizationReader>> {
    let config = match declaration(config_json) {
        None => return Ok(None),
        Some(Value::Object(config)) => config,
        Some(other) => return Err(Error::mismatch("quantization_config", "an object", other)),
    };
    let method = declared_method(config_json).expect("an object");
    let rules = match method {
        "compressed-tensors" => compressed_tensors(config),
        "gptq" => gptq(config),
        "awq" => awq(config),
        "fp8" | "fbgemm_fp8" => {
            let block = get(config, "weight_block_size", "two positive numbers", block)?;
            Ok(Rules::Foreign { library: Library::Float8, block })
        }
        "bitsandbytes" => Ok(Rules::Foreign { library: Library::BitsAndBytes, block: None }),
        "mxfp4" => Ok(Rules::Foreign { library: Library::Mxfp4, block: None }),
        "mlx" => mlx::said(config).map(Rules::Mlx),
        other => Err(Error::unsupported(format!(
            "quant_method `{other}` is not one that can be read ({METHODS}); take the model it was made from, or save it \
             with plain weights by the library that packed it"
        ))),
    }?;
    let groups = config.get("config_groups").and_then(Value::as_object);
    let there = |of: &Map<String, Value>, key: &str| of.get(key).is_some_and(|v| !v.is_null());
    let quantizes = |group: &Value| {
        let sides = ["input_activations", "output_activations"];
        group.as_object().is_some_and(|group| sides.iter().any(|side| there(group, side)))
    };
    // fp8 says so by its name; one that is kept for weights alone has no scheme for activations.
    let activations = groups.is_some_and(|groups| groups.values().any(quantizes))
        || method == "fbgemm_fp8"
        || method == "fp8" && config.get("activation_scheme").is_none_or(|v| !v.is_null());
    let cache = there(config, "kv_cache_scheme");
    Ok(Some(QuantizationReader { method: method.to_owned(), rules, activations, cache }))
}

impl QuantizationReader {
    /// The `quant_method`.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// Whether runtimes round activations too, which reading the weights says nothing of.
    pub fn quantizes_activations(&self) -> bool {
        self.activations
    }

    /// Whether runtimes round keys and values that they keep, too.
    pub fn quantizes_cache(&self) -> bool {
        self.cache
    }

    /// The codec of this checkpoint; `None` when it has another library's layouts alone.
    pub fn codec(&self) -> Option<&'static dyn Codec> {
        match self.rules {
            Rules::CompressedTensors { .. } => Some(&CompressedTensors),
            Rules::Gptq { .. } => Some(&Gptq),
            Rules::Awq { .. } => Some(&Awq),
            Rules::Mlx(_) => Some(&Mlx),
            Rules::Foreign { .. } => None,
        }
    }

    /// The local name that every module of the codec has a tensor of.
    pub fn main_part(&self) -> Option<&'static str> {
        Some(self.codec()?.part_names()[0])
    }

    /// Splits the name of a codec's part into module and local name; `None` for every other tensor.
    pub fn split_part<'n>(&self, tensor: &'n str) -> Option<(&'n str, &'static str)> {
        let (module, suffix) = tensor.rsplit_once('.')?;
        let name = self.codec()?.part_names().iter().find(|name| **name == suffix)?;
        Some((module, name))
    }

    /// What a tensor of the checkpoint holds in a layout that is only read, if it is the part with the values.
    ///
    /// Fails when parts that belong to it are missing or do not fit.
    pub fn foreign(&self, stored: &str, tensors: &TensorLookup<'_, '_>) -> Result<Option<Foreign>> {
        let (library, block) = match &self.rules {
            Rules::Foreign { library, block } => (*library, *block),
            Rules::CompressedTensors { .. } => {
                let Some((module, "weight" | "weight_packed")) = stored.rsplit_once('.') else { return Ok(None) };
                let block = match self.weights(module)? {
                    Some(Weights::Foreign(block, _)) => block,
                    _ => None,
                };
                (Library::CompressedTensors, block)
            }
            _ => return Ok(None),
        };
        Foreign::find(library, block, stored, tensors)
    }

    /// Whether a tensor says how runtimes round activations or caches, and is no part of the model itself.
    pub fn is_for_runtimes(&self, tensor: &str) -> bool {
        const NAMES: &[&str] = &[
            "input_scale",
            "input_scale_ub",
            "input_global_scale",
            "input_zero_point",
            "activation_scale",
            "output_scale",
            "output_zero_point",
            "q_scale",
            "k_scale",
            "v_scale",
        ];
        let scales =
            matches!(self.rules, Rules::CompressedTensors { .. } | Rules::Foreign { library: Library::Float8, .. });
        scales && tensor.rsplit_once('.').is_some_and(|(_, name)| NAMES.contains(&name))
    }

    /// What compressed-tensors declares of a module; `None` when it is left unquantized.
    fn weights(&self, module: &str) -> Result<Option<Weights>> {
        let Rules::CompressedTensors { groups, ignore } = &self.rules else { return Ok(None) };
        for target in ignore {
            if target.is_module(module)? {
                return Ok(None);
            }
        }
        // Names before classes, as the runtimes do.
        for (targets, weights) in groups {
            for target in targets {
                if target.is_module(module)? {
                    return Ok(Some(*weights));
                }
            }
        }
        let class = if module.ends_with("embed_tokens") { "Embedding" } else { "Linear" };
        let is_class = |target: &Target| matches!(target, Target::Name(name) if name == class);
        Ok(groups.iter().find(|(targets, _)| targets.iter().any(is_class)).map(|(_, weights)| *weights))
    }

    /// What the configuration says about a module of the codec; `None` when it is left unquantized.
    pub fn declared(&self, module: &str) -> Result<Option<Declared>> {
        match &self.rules {
            Rules::CompressedTensors { .. } => Ok(match self.weights(module)? {
                Some(Weights::Packed(encoding) | Weights::Foreign(_, Some(encoding))) => {
                    Some(Declared { encoding, zeros_minus_one: false })
                }
                _ => None,
            }),
            Rules::Gptq { base, dynamic, zeros_minus_one } => {
                let mut settings = Some(*base);
                for (pattern, overridden) in dynamic {
                    if is_match(pattern, module)? {
                        settings = *overridden;
                        break;
                    }
                }
                Ok(settings.map(|s| Declared { encoding: s.scheme.into(), zeros_minus_one: *zeros_minus_one }))
            }
            Rules::Awq { scheme, skip } => {
                let skipped = skip.iter().any(|part| module.contains(part.as_str()));
                Ok((!skipped).then_some(Declared { encoding: (*scheme).into(), zeros_minus_one: false }))
            }
            Rules::Mlx((base, modules)) => {
                let own = modules.get(module).copied();
                Ok(own.unwrap_or(Some(*base)).map(|encoding| Declared { encoding, zeros_minus_one: false }))
            }
            Rules::Foreign { .. } => Ok(None),
        }
    }

    /// How a module that has codes is declared, and its rows and columns, without reading the codes.
    pub fn describe(&self, module: &str, parts: &PartLookup<'_, '_>) -> Result<(Declared, [usize; 2])> {
        let declared = self.declared_with_codes(module)?;
        let shape = self.declared_codec().shape(parts, &declared).map_err(|error| error.in_tensor(module))?;
        Ok((declared, shape))
    }

    /// The codec, where something has been declared for it.
    fn declared_codec(&self) -> &'static dyn Codec {
        self.codec().expect("modules are declared for a codec")
    }

    fn declared_with_codes(&self, module: &str) -> Result<Declared> {
        self.declared(module)?.ok_or_else(|| {
            Error::malformed(format!(
                "the checkpoint has {} for it, but its quantization_config leaves it unquantized",
                self.main_part().unwrap_or("codes")
            ))
            .in_tensor(module)
        })
    }

    /// Reads a module, and says how its words lie; `None` when `parts` has no codes for it. Codes for a module that the configuration
    /// leaves out are an error.
    pub fn read(&self, module: &str, parts: &PartLookup<'_, '_>) -> Result<Option<(PackedWeight, WordLayout)>> {
        if self.main_part().and_then(parts).is_none() {
            return Ok(None);
        }
        let (declared, codec) = (self.declared_with_codes(module)?, self.declared_codec());
        let read = codec.decode_packed(parts, &declared).map_err(|error| error.in_tensor(module))?;
        Ok(Some((read, codec.word_layout())))
    }

    /// Writes the reals of some rows of a module that has codes into `out` (`[rows.len(), cols]`); these rows are there.
    pub fn read_rows(&self, module: &str, parts: &PartLookup<'_, '_>, rows: &[u32], out: &mut [f32]) -> Result<()> {
        let declared = self.declared_with_codes(module)?;
        let read = self.declared_codec().dequantize_rows(parts, &declared, rows, out);
        read.map_err(|error| error.in_tensor(module))
    }
}

impl Target {
    fn new(text: &str) -> Result<Target> {
        match text.strip_prefix("re:") {
            Some(pattern) => Ok(Target::Pattern(regex(pattern)?)),
            None => Ok(Target::Name(text.into())),
        }
    }

    fn is_module(&self, module: &str) -> Result<bool> {
        match self {
            Target::Pattern(pattern) => is_match(pattern, module),
            Target::Name(name) => Ok(name == module),
        }
    }
}

/// A Python `re.match` pattern: anchored at the start only.
fn regex(pattern: &str) -> Result<Regex> {
    Regex::new(&format!("^(?:{pattern})"))
        .map_err(|e| Error::malformed(format!("quantization_config has an invalid pattern `{pattern}`: {e}")))
}

fn is_match(pattern: &Regex, module: &str) -> Result<bool> {
    pattern.is_match(module).map_err(|e| Error::malformed(format!("a pattern of quantization_config fails: {e}")))
}

/// An optional key; fails when it is there with another type.
fn get<'v, T>(
    config: &'v Map<String, Value>,
    key: &str,
    expected: &str,
    read: impl Fn(&'v Value) -> Option<T>,
) -> Result<Option<T>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            read(value).map(Some).ok_or_else(|| Error::mismatch(format!("quantization_config.{key}"), expected, value))
        }
    }
}

fn get_bits(config: &Map<String, Value>, keys: &[&str]) -> Result<Option<u8>> {
    for key in keys {
        if let Some(bits) = get(config, key, "a width from 1 to 8", |v| v.as_u64().filter(|b| (1..=8).contains(b)))? {
            return Ok(Some(bits as u8));
        }
    }
    Ok(None)
}

/// `Some(None)` is one scale per row.
fn get_group(config: &Map<String, Value>, keys: &[&str]) -> Result<Option<Option<usize>>> {
    for key in keys {
        let group = get(config, key, "-1 or a number of columns", |v| match v.as_i64()? {
            -1 => Some(None),
            n if n > 0 => Some(Some(n as usize)),
            _ => None,
        })?;
        if group.is_some() {
            return Ok(group);
        }
    }
    Ok(None)
}

fn strings(config: &Map<String, Value>, key: &str) -> Result<Vec<String>> {
    let list = get(config, key, "a list of strings", |v| {
        v.as_array()?.iter().map(|s| s.as_str().map(str::to_string)).collect::<Option<Vec<_>>>()
    })?;
    Ok(list.unwrap_or_default())
}

fn block(value: &Value) -> Option<[usize; 2]> {
    let list: Option<Vec<usize>> =
        value.as_array()?.iter().map(|n| n.as_u64().filter(|n| (1..1 << 32).contains(n)).map(|n| n as usize)).collect();
    list?.try_into().ok()
}

/// Formats of compressed-tensors in which every value has a byte or a nibble of its own.
const PLAIN_FORMATS: &[&str] = &[
    "naive-quantized",
    "int-quantized",
    "float-quantized",
    "mxfp8-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
];

fn compressed_tensors(config: &Map<String, Value>) -> Result<Rules> {
    let top_format = get(config, "format", "a string", Value::as_str)?;
    let config_groups = get(config, "config_groups", "an object", Value::as_object)?
        .ok_or_else(|| Error::missing("quantization_config.config_groups"))?;
    let mut groups = Vec::new();
    for (name, group) in config_groups {
        // A preset's name with a list of targets, or everything spelt out.
        if let Value::Array(list) = group {
            let scheme = Scheme::preset(name).ok_or_else(|| {
                Error::unsupported(format!("the quantization scheme `{name}` is not one that can be read"))
            })?;
            let targets: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
            let targets =
                targets.ok_or_else(|| Error::mismatch(format!("config_groups.{name}"), "a list of names", group))?;
            let targets = targets.into_iter().map(Target::new).collect::<Result<_>>()?;
            groups.push((targets, Weights::Packed(scheme.into())));
            continue;
        }
        let group =
            group.as_object().ok_or_else(|| Error::mismatch(format!("config_groups.{name}"), "an object", group))?;
        let in_group = |error: Error| {
            let kind = error.kind.to_string();
            Error::malformed(format!("config_groups.{name}: {kind}"))
        };
        let format = get(group, "format", "a string", Value::as_str).map_err(in_group)?.or(top_format);
        let packed = match format {
            None | Some("pack-quantized") => true,
            Some(format) if PLAIN_FORMATS.contains(&format) => false,
            Some("dense") => {
                return Err(Error::unsupported(format!(
                    "the format of {name} is `dense`: the weights are plain, and were to be rounded as the model runs; take the model it \
                     was made from, or take quantization_config out of config.json, and what is there is taken as it is"
                )));
            }
            Some(other) => {
                return Err(Error::unsupported(format!(
                    "the compressed-tensors format `{other}` of {name} is not one that can be read (pack-quantized, {})",
                    PLAIN_FORMATS.join(", ")
                )));
            }
        };
        let targets = strings(group, "targets").map_err(in_group)?;
        let targets = targets.iter().map(|t| Target::new(t)).collect::<Result<Vec<_>>>()?;
        let Some(weights) = get(group, "weights", "an object", Value::as_object).map_err(in_group)? else { continue };
        let activation = group.get("input_activations").and_then(Value::as_object).and_then(activation_args);
        let weights = match packed {
            true => Weights::Packed(Encoding { activation, ..weight_args(weights).map_err(in_group)?.into() }),
            false => {
                let block = get(weights, "block_structure", "two positive numbers", block).map_err(in_group)?;
                // Of inputs that are rounded in another way it is none of those that are written.
                let told = activation.is_some() || group.get("input_activations").is_none_or(Value::is_null);
                let encoding = plain_args(weights).filter(|encoding| told || encoding.global.is_none());
                Weights::Foreign(block, encoding.map(|encoding| Encoding { activation, ..encoding }).filter(is_written))
            }
        };
        groups.push((targets, weights));
    }
    let ignore = strings(config, "ignore")?.iter().map(|t| Target::new(t)).collect::<Result<_>>()?;
    Ok(Rules::CompressedTensors { groups, ignore })
}

/// What is said of inputs, where it is a way of rounding that is known.
fn activation_args(args: &Map<String, Value>) -> Option<Activation> {
    let is = |key: &str, value: Value| args.get(key) == Some(&value);
    let known = is("num_bits", 8.into()) && is("strategy", "token".into()) && is("dynamic", true.into());
    let known = known && args.get("symmetric").is_none_or(|value| *value == Value::Bool(true));
    match args.get("type").and_then(Value::as_str) {
        Some("int") | None if known => Some(Activation::INT8_TOKEN),
        Some("float") if known => Some(Activation::FP8_TOKEN),
        _ => None,
    }
}

/// What is said of weights of eight bits with a scale for each row, and of NVFP4.
fn plain_args(args: &Map<String, Value>) -> Option<Encoding> {
    let is = |key: &str, value: Value| args.get(key) == Some(&value);
    if is("num_bits", 4.into()) && is("type", "float".into()) && is("strategy", "tensor_group".into()) {
        return is("group_size", 16.into()).then_some(Encoding::NVFP4);
    }
    let known = is("num_bits", 8.into()) && is("strategy", "channel".into());
    let known = known && args.get("symmetric").is_none_or(|value| *value == Value::Bool(true));
    match args.get("type").and_then(Value::as_str) {
        Some("int") | None if known => Some(Scheme { bits: 8, group: None, symmetric: true }.into()),
        Some("float") if known => Some(Encoding::fp8(Block::Row)),
        _ => None,
    }
}

fn weight_args(args: &Map<String, Value>) -> Result<Scheme> {
    let kind = get(args, "type", "int or float", Value::as_str)?.unwrap_or("int");
    if kind != "int" {
        return Err(Error::unsupported(format!("weights of type `{kind}` cannot be read, only int")));
    }
    let bits = get_bits(args, &["num_bits"])?.unwrap_or(8);
    let symmetric = get(args, "symmetric", "a boolean", Value::as_bool)?.unwrap_or(true);
    let group = get_group(args, &["group_size"])?;
    let strategy = get(args, "strategy", "a string", Value::as_str)?;
    let group = match (strategy, group) {
        (Some("group") | None, Some(group)) => group,
        (Some("channel"), None | Some(None)) | (Some("tensor") | None, None) => None,
        (strategy, group) => {
            return Err(Error::unsupported(format!(
                "strategy {} with group_size {} cannot be read",
                strategy.unwrap_or("none"),
                group.flatten().map_or("none".into(), |g| g.to_string())
            )));
        }
    };
    Ok(Scheme { bits, group, symmetric })
}

fn gptq(config: &Map<String, Value>) -> Result<Rules> {
    let format = match get(config, "checkpoint_format", "a string", Value::as_str)? {
        Some(format) => format,
        None => get(config, "format", "a string", Value::as_str)?.unwrap_or("gptq"),
    };
    let zeros_minus_one = match format {
        "gptq" => true,
        "gptq_v2" => false,
        other => {
            return Err(Error::unsupported(format!(
                "the GPTQ checkpoint format `{other}` is not one that can be read (gptq, gptq_v2)"
            )));
        }
    };
    if get(config, "is_marlin_format", "a boolean", Value::as_bool)? == Some(true) {
        return Err(Error::unsupported(
            "GPTQ codes in the order of Marlin (is_marlin_format) cannot be read; take the checkpoint it was made from",
        ));
    }
    if let Some(other) = get(config, "pack_dtype", "a string", Value::as_str)?.filter(|d| *d != "int32") {
        return Err(Error::unsupported(format!("GPTQ codes packed in {other} cannot be read, only int32")));
    }
    let default = GptqSettings { scheme: Scheme { bits: 4, group: Some(128), symmetric: true } };
    let base = gptq_settings(config, default)?;
    let mut dynamic = Vec::new();
    if let Some(rules) = get(config, "dynamic", "an object", Value::as_object)? {
        for (pattern, settings) in rules {
            let (left_out, pattern) = match pattern.strip_prefix("-:") {
                Some(pattern) => (true, pattern),
                None => (false, pattern.strip_prefix("+:").unwrap_or(pattern)),
            };
            let settings = match settings {
                _ if left_out => None,
                Value::Object(settings) => Some(gptq_settings(settings, base)?),
                other => {
                    return Err(Error::mismatch(format!("quantization_config.dynamic.{pattern}"), "an object", other));
                }
            };
            dynamic.push((regex(pattern)?, settings));
        }
    }
    Ok(Rules::Gptq { base, dynamic, zeros_minus_one })
}

fn gptq_settings(config: &Map<String, Value>, default: GptqSettings) -> Result<GptqSettings> {
    let bits = get_bits(config, &["bits"])?.unwrap_or(default.scheme.bits);
    if !matches!(bits, 2 | 3 | 4 | 8) {
        return Err(Error::unsupported(format!("GPTQ with {bits} bits cannot be read (2, 3, 4 or 8)")));
    }
    Ok(GptqSettings {
        scheme: Scheme {
            bits,
            group: get_group(config, &["group_size"])?.unwrap_or(default.scheme.group),
            symmetric: get(config, "sym", "a boolean", Value::as_bool)?.unwrap_or(default.scheme.symmetric),
        },
    })
}

fn awq(config: &Map<String, Value>) -> Result<Rules> {
    let version = match get(config, "version", "a string", Value::as_str)? {
        Some(version) => version,
        None => get(config, "format", "a string", Value::as_str)?.unwrap_or("gemm"),
    };
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(Error::unsupported(format!(
            "AWQ version `{version}` is not one that can be read (gemm): take the model it was made from, or one that AutoAWQ packed with \
             version=\"GEMM\""
        )));
    }
    let bits = get_bits(config, &["bits", "w_bit"])?.unwrap_or(4);
    if bits != 4 {
        return Err(Error::unsupported(format!("AWQ with {bits} bits cannot be read, only 4")));
    }
    let group = get_group(config, &["group_size", "q_group_size"])?.unwrap_or(Some(128));
    let zero_point = get(config, "zero_point", "a boolean", Value::as_bool)?.unwrap_or(true);
    let skip = strings(config, "modules_to_not_convert")?;
    Ok(Rules::Awq { scheme: Scheme { bits, group, symmetric: !zero_point }, skip })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{CODECS, QuantizedModule};
    use serde_json::json;

    fn reader(config: Value) -> QuantizationReader {
        read_quantization(&json!({"model_type": "llama", "quantization_config": config})).unwrap().unwrap()
    }

    fn refused(config: Value) -> String {
        read_quantization(&json!({ "quantization_config": config })).unwrap_err().to_string()
    }

    fn scheme_of(reader: &QuantizationReader, module: &str) -> Option<(u8, Option<usize>, bool)> {
        reader.declared(module).unwrap().map(|d| d.encoding.scheme().unwrap()).map(|s| (s.bits, s.group, s.symmetric))
    }

    #[test]
    fn mlx_is_known_by_its_own_key() {
        let mlx = json!({"group_size": 64, "bits": 4});
        for config in [
            json!({"quantization": mlx}),
            json!({"quantization": mlx, "quantization_config": mlx}),
            json!({"text_config": {}, "quantization": mlx, "quantization_config": mlx}),
        ] {
            assert_eq!(declared_method(&config), Some("mlx"));
            assert_eq!(read_quantization(&config).unwrap().unwrap().codec().unwrap().id(), "mlx");
        }
        assert_eq!(declared_method(&json!({"quantization_config": mlx})), Some("gptq"));
        let four = json!({"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
        assert_eq!(declared_method(&json!({"quantization_config": four})), Some("bitsandbytes"));
        assert_eq!(
            declared_method(&json!({"text_config": {"quantization_config": {"quant_method": "awq"}}})),
            Some("awq")
        );
    }

    #[test]
    fn plain_models_are_not_quantized() {
        assert!(read_quantization(&json!({"model_type": "llama", "bits": 3})).unwrap().is_none());
        assert!(read_quantization(&json!({"quantization_config": null})).unwrap().is_none());
    }

    #[test]
    fn compressed_tensors_targets_by_name_pattern_class_and_ignore() {
        let weights = |bits: u8, group: i64| json!({"num_bits": bits, "type": "int", "symmetric": bits == 4, "strategy": "group", "group_size": group});
        let r = reader(json!({
            "quant_method": "compressed-tensors", "format": "mixed-precision",
            "ignore": ["lm_head", "re:.*\\.(?!mlp)[a-z_]+\\.o_proj"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "format": "pack-quantized", "weights": weights(4, 128), "input_activations": null},
                "group_1": {"targets": ["re:.*down_proj$", "model.layers.0.mlp.up_proj"], "format": "pack-quantized", "weights": weights(8, 32)},
            },
        }));
        assert_eq!(scheme_of(&r, "model.layers.3.mlp.gate_proj"), Some((4, Some(128), true)));
        assert_eq!(scheme_of(&r, "model.layers.3.mlp.down_proj"), Some((8, Some(32), false)));
        assert_eq!(scheme_of(&r, "model.layers.0.mlp.up_proj"), Some((8, Some(32), false)));
        assert_eq!(scheme_of(&r, "model.layers.0.self_attn.o_proj"), None);
        assert_eq!(scheme_of(&r, "lm_head"), None);
        assert_eq!(scheme_of(&r, "model.embed_tokens"), None);
        assert_eq!(r.split_part("a.b.weight_scale"), Some(("a.b", "weight_scale")));
        assert_eq!(r.split_part("a.b.weight"), None);
    }

    #[test]
    fn compressed_tensors_defaults_and_presets() {
        let r = reader(json!({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}));
        assert_eq!(scheme_of(&r, "x"), Some((4, Some(128), true)));
        let r = reader(
            json!({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": -1}}}}),
        );
        assert_eq!(scheme_of(&r, "x"), Some((8, None, true)));
    }

    #[test]
    fn gptq_defaults_dynamic_and_versions() {
        let r = read_quantization(&json!({"bits": 4, "group_size": 128, "desc_act": false})).unwrap().unwrap();
        assert_eq!(r.codec().unwrap().id(), "gptq");
        assert!(r.declared("x").unwrap().unwrap().zeros_minus_one);
        let r = reader(json!({
            "quant_method": "gptq", "bits": 4, "group_size": 64, "sym": false, "format": "gptq_v2",
            "dynamic": {"-:.*\\.gate.*": {}, "+:model\\.layers\\.1\\.": {"bits": 8, "sym": true}, ".*\\.down": {"group_size": -1}},
        }));
        assert_eq!(scheme_of(&r, "model.layers.1.mlp.gate_proj"), None);
        assert_eq!(scheme_of(&r, "model.layers.1.mlp.down_proj"), Some((8, Some(64), true)));
        assert_eq!(scheme_of(&r, "model.layers.2.mlp.down_proj"), Some((4, None, false)));
        assert_eq!(scheme_of(&r, "model.layers.2.mlp.up_proj"), Some((4, Some(64), false)));
        assert!(!r.declared("model.layers.2.mlp.up_proj").unwrap().unwrap().zeros_minus_one);
    }

    #[test]
    fn awq_spellings_and_skipped_modules() {
        let r = reader(
            json!({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM", "modules_to_not_convert": ["gate"]}),
        );
        assert_eq!(scheme_of(&r, "a.up_proj"), Some((4, Some(64), false)));
        assert_eq!(scheme_of(&r, "a.gate_proj"), None);
        let r = reader(
            json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": false, "modules_to_not_convert": null}),
        );
        assert_eq!(scheme_of(&r, "a"), Some((4, Some(128), true)));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        assert_eq!(
            refused(json!({"quant_method": "hqq"})),
            "quant_method `hqq` is not one that can be read \
             (compressed-tensors, gptq, awq, fp8, fbgemm_fp8, bitsandbytes, mxfp4); take the model it was made from, or \
             save it with plain weights by the library that packed it"
        );
        assert_eq!(
            refused(json!({"quant_method": "gptq", "bits": "4"})),
            "quantization_config.bits is \"4\", expected a width from 1 to 8"
        );
        assert_eq!(
            refused(json!({"quant_method": "gptq", "group_size": 0})),
            "quantization_config.group_size is 0, expected -1 or a number of columns"
        );
        assert_eq!(
            refused(json!({"quant_method": "gptq", "checkpoint_format": "marlin"})),
            "the GPTQ checkpoint format `marlin` is not one that can be read (gptq, gptq_v2)"
        );
        assert_eq!(
            refused(json!({"quant_method": "awq", "version": "gemv"})),
            "AWQ version `gemv` is not one that can be read (gemm): take the model it was made from, or one that AutoAWQ packed with version=\"GEMM\""
        );
        assert_eq!(
            refused(json!({"config_groups": {"g": {"targets": [], "format": "marlin-24"}}})),
            "the compressed-tensors format `marlin-24` of g is not one that can be read (pack-quantized, naive-quantized, \
             int-quantized, float-quantized, mxfp8-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized)"
        );
        assert!(
            refused(json!({"config_groups": {}, "ignore": ["re:("]}))
                .starts_with("quantization_config has an invalid pattern `(`")
        );
    }

    #[test]
    fn a_module_left_out_must_not_have_codes() {
        let r = reader(json!({"quant_method": "awq", "modules_to_not_convert": ["lm_head"]}));
        let word = crate::tensor::Tensor { dtype: crate::Dtype::I32, shape: vec![1, 1], data: vec![0; 4] };
        assert!(r.read("lm_head", &|_| None).unwrap().is_none());
        let message = r.read("lm_head", &|_| Some(word.view())).unwrap_err().to_string();
        assert_eq!(
            message,
            "tensor `lm_head`: the checkpoint has qweight for it, but its quantization_config leaves it unquantized"
        );
    }

    /// What a codec writes about a mixed model, this reads back, module for module.
    #[test]
    fn written_configs_are_read_back() {
        let four = Scheme { bits: 4, group: Some(32), symmetric: false };
        let eight = Scheme { bits: 8, group: None, symmetric: true };
        let tails = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.down_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ];
        for codec in CODECS {
            // What the layout makes of the schemes, or of its own.
            let [four, eight] = [four, eight].map(|scheme| match codec.id() {
                "mlx" => codec.encoding(Scheme { group: Some(32), ..scheme }).unwrap(),
                _ => Encoding::from(scheme),
            });
            let mut modules = Vec::new();
            let mut left = vec!["lm_head".to_string()];
            for layer in 0..12 {
                for (i, tail) in tails.iter().enumerate() {
                    let name = format!("model.layers.{layer}.{tail}");
                    match (layer, i) {
                        (1, 3) | (_, 4) => left.push(name),
                        (2, 0..=2) | (_, 5) if codec.id() != "awq" => modules.push((name, eight)),
                        _ => modules.push((name, four)),
                    }
                }
            }
            let listed: Vec<_> = modules
                .iter()
                .map(|(name, encoding)| QuantizedModule { name, encoding: *encoding, desc_act: false, loaded: &[] })
                .collect();
            let files = codec.config(&listed, &left).unwrap();
            let r = read_quantization(&files.of(*codec)).unwrap().unwrap();
            assert_eq!(r.codec().unwrap().id(), codec.id());
            for (name, encoding) in &modules {
                assert_eq!(r.declared(name).unwrap().unwrap().encoding, *encoding, "{} {name}", codec.id());
            }
            for name in &left {
                // GPTQ and AWQ leave the head out by convention.
                if name != "lm_head" || !matches!(codec.id(), "gptq" | "awq") {
                    assert_eq!(r.declared(name).unwrap(), None, "{} {name}", codec.id());
                }
            }
        }
    }
}
