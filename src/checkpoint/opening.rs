//! Opening: what a path is, what its configuration declares, and whether the weights bear it out.

use std::path::Path;

use formats::codec::{QUANTIZATION_KEYS, QuantizationReader, check_run_time, declared_method};
use formats::tensor::is_float;
use formats::{Dtype, SafetensorsSet, TensorSpec, read_quantization};
use serde_json::{Value, json};

use super::adapter::Adapter;
use super::training::{emptied, empty_weights};
use super::{Checkpoint, Listed, Source, directory_entries, dominant_dtype, dtype_named, index};
use super::{names, place};
use crate::dialect::model::GgufModel;
use crate::error::{Error, Result};
use crate::families;
use crate::json::read_json;
use crate::weights::StoredType;

impl Checkpoint {
    /// Opens a Hugging Face directory, a hub cache's folder of a model, or a GGUF file, whatever it is called.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        Self::open_with(path, None)
    }

    /// [`Checkpoint::open`], merged with the LoRA adapter in the directory `adapter`.
    pub fn open_with(path: &Path, adapter: Option<&Path>) -> Result<Checkpoint> {
        let (place, note) = place::resolve(path)?;
        let mut opened = Self::open_alone(&place)?;
        opened.remarks.splice(0..0, note);
        if let Some(folder) = adapter {
            let (folder, note) = place::resolve(folder)?;
            opened.remarks.extend(note);
            let Checkpoint { config, entries, .. } = &mut opened;
            opened.adapter = Some(Adapter::open(&folder, path, config, entries)?);
            opened.by_name = index(&opened.entries);
        }
        Ok(opened)
    }

    fn open_alone(path: &Path) -> Result<Checkpoint> {
        if path.is_dir() {
            return Self::open_directory(path);
        }
        if !path.is_file() {
            return Err(Error::failed(format!("{}: neither a directory nor a file", path.display())));
        }
        let bytes = place::beginning(path)?;
        let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if !named && !place::is_gguf(&bytes) {
            return Err(place::no_model(path, &bytes));
        }
        let model = GgufModel::open(path)?;
        let remarks = model.notes().to_vec();
        let mut opened = Self::new(path, model.config().clone(), model.dtype(), model.entries(), Source::Gguf(model));
        opened.remarks = remarks;
        Ok(opened)
    }

    fn open_directory(path: &Path) -> Result<Checkpoint> {
        place::check_links(path)?;
        let config_path = path.join("config.json");
        let mut config = read_json(&config_path)?.ok_or_else(|| place::no_config(path))?;
        if !config.is_object() {
            return Err(Error::failed(format!("{}: not a JSON object", config_path.display())));
        }
        place::check_kind(path, &config)?;
        let mut remarks = families::normalize(&mut config);
        place::check_weights(path)?;
        let tensors = SafetensorsSet::open(path).map_err(|error| place::explain_missing(path, error))?;
        tensors.files().iter().try_for_each(|file| place::check_complete(file.path()))?;
        let shapes = tensors.tensors().map(|spec| (&spec.name[..], &spec.shape[..]));
        if let Some((name, counts)) = empty_weights(shapes) {
            return Err(emptied(tensors.file_of(name).expect("listed"), name, counts, false));
        }
        let (tensors, renamed) = names::as_the_architecture_has(tensors, &config, path)?;
        refuse_named_weights(&config, &tensors, path)?;
        remarks.extend(forget_named_weights(&mut config));

        // Whether or not the weights are stored as it says.
        check_run_time(&config).map_err(|error| error.in_file(&config_path))?;
        let mut quantization = match read_quantization(&config) {
            Ok(quantization) => quantization,
            Err(_) if is_left_over(&config, &tensors) => {
                remarks.extend(left_over(&config));
                None
            }
            Err(error) => return Err(error.in_file(&config_path).into()),
        };
        // GPTQ's and AWQ's libraries once wrote it beside config.json, where vLLM looks for it.
        let [gptq, awq] = ["quantize_config.json", "quant_config.json"].map(|name| path.join(name));
        let separate = if gptq.exists() { gptq } else { awq };
        let has_codes = |name: &str| name.ends_with(".qweight") || name.ends_with(".weight_packed");
        if quantization.is_none()
            && tensors.tensors().any(|spec| has_codes(&spec.name))
            && let Some(mut separate_config) = read_json(&separate)?
        {
            if separate_config.get("w_bit").is_some() {
                separate_config["quant_method"] = json!("awq");
            }
            quantization = read_quantization(&separate_config).map_err(|e| e.in_file(&separate))?;
        }

        if quantization.as_ref().and_then(QuantizationReader::codec).is_none_or(|codec| codec.id() != "mlx") {
            refuse_untold_mlx(&tensors)?;
        }

        remarks.extend(stored_by_mlx(&tensors, &config)?);

        let Listed { entries, foreign, note } = directory_entries(&tensors, quantization.as_ref())?;
        remarks.extend(note);
        let declared_dtype = ["dtype", "torch_dtype"].iter().find_map(|key| dtype_named(config.get(key)?.as_str()?));
        let quantized = entries.iter().any(|e| matches!(e.dtype, StoredType::Quantized { .. } | StoredType::Foreign));
        if let (Some(reader), false) = (&quantization, quantized) {
            refuse_scales_of_plain_weights(reader, &tensors)?;
            remarks.extend(left_over(&config));
        }
        remarks.extend(quantization.as_ref().and_then(|reader| left_to_runtimes(reader, &tensors)));
        if let Some(key) = QUANTIZATION_KEYS.iter().find(|key| config.get(**key) == Some(&json!({}))) {
            remarks.push(format!("config.json has an empty {key}, which transformers fails on: it was left out"));
        }
        forget_quantization(&mut config);
        let dominant = dominant_dtype(&entries);
        if let (Some(declared), Some(stored), false) = (declared_dtype, dominant, quantized)
            && declared != stored
        {
            remarks.push(format!(
                "config.json says that the weights are {declared}, and most are stored as {stored}: they are taken as they are stored, and \
                 the written configuration says so"
            ));
        }
        let dtype = if quantized { declared_dtype.or(dominant) } else { dominant.or(declared_dtype) };
        let source = Source::Directory { tensors, quantization, foreign };
        let mut opened = Self::new(path, config, dtype.unwrap_or(Dtype::F16), entries, source);
        remarks.extend(place::adapter_beside(path));
        (opened.remarks, opened.renamed) = (remarks, renamed);
        if let Some((config, note)) = families::tying::settled(&opened) {
            opened.config = config;
            opened.remarks.push(note);
        }
        Ok(opened)
    }
}

/// Fails where config.json says that the weights are in another file than those that were opened.
fn refuse_named_weights(config: &Value, tensors: &SafetensorsSet, path: &Path) -> Result<()> {
    let Some(named) = config.get("transformers_weights").and_then(Value::as_str) else { return Ok(()) };
    let opened = |file: &formats::SafetensorsFile| file.path().file_name().is_some_and(|name| name == named);
    if tensors.files().iter().all(opened) || named == "model.safetensors.index.json" {
        return Ok(());
    }
    Err(Error::failed(format!(
        "{}: transformers_weights says that the weights are in {named}, which is not what runtimes other than transformers read: call that file \
         model.safetensors (or its index model.safetensors.index.json), and take the key out",
        path.join("config.json").display()
    )))
}

/// Takes the name of the weights' file out of config.json, for outputs have files of their own; a note where that was another name.
fn forget_named_weights(config: &mut Value) -> Option<String> {
    let named = config.as_object_mut()?.shift_remove("transformers_weights")?;
    let named = named.as_str().filter(|name| !name.starts_with("model.safetensors"))?;
    Some(format!(
        "config.json says in transformers_weights that the weights are in {named}: what is written has model.safetensors (or shards with \
         an index), where every runtime looks, and the key is left out"
    ))
}

/// A note on what a quantized checkpoint says of how runtimes round activations and the cache of keys and values.
fn left_to_runtimes(reader: &QuantizationReader, tensors: &SafetensorsSet) -> Option<String> {
    let mut names = tensors.tensors().map(|spec| spec.name.as_str()).filter(|name| reader.is_for_runtimes(name));
    let first = names.next();
    let what = match (first, reader.quantizes_cache()) {
        (Some(first), cache) => {
            let also = if cache { " and its kv_cache_scheme" } else { "" };
            format!(
                "its {} scales for activations or the cache of keys and values (`{first}`){also}",
                names.count() + 1
            )
        }
        (None, true) => "its kv_cache_scheme".to_owned(),
        (None, false) => return None,
    };
    Some(format!("the checkpoint is quantized, and {what} were left out: weights alone are taken"))
}

/// Takes out of config.json what says how weights are quantized: every output says it anew, or is plain.
fn forget_quantization(config: &mut Value) {
    let is_said = |key: &str, value: Option<&Value>| key != "quantization" || value.is_some_and(Value::is_object);
    let forget = |object: &mut Value| {
        let Value::Object(object) = object else { return };
        for key in QUANTIZATION_KEYS.iter().filter(|key| is_said(key, object.get(**key))).collect::<Vec<_>>() {
            object.shift_remove(*key);
        }
        // Of what type experts are (DeepSeek V4).
        object.shift_remove("expert_dtype");
    };
    for key in families::TEXT_PARTS {
        config.get_mut(key).into_iter().for_each(forget);
    }
    forget(config);
}

/// What to say where no weight is stored as the configuration declares.
fn left_over(config: &Value) -> Option<String> {
    let method = declared_method(config).unwrap_or("a method without a name");
    Some(format!(
        "config.json calls the weights quantized ({method}), and all of them are stored as plain numbers: they were taken as \
         they are, and what config.json says of it was left out"
    ))
}

/// Whether a configuration that cannot be read is left over from other weights: all that are there are plain numbers.
fn is_left_over(config: &Value, tensors: &SafetensorsSet) -> bool {
    // BitNet keeps the weights that it rounds as a runtime loads them.
    declared_method(config) != Some("bitnet") && tensors.tensors().all(|spec| is_plain(&spec.name, spec.dtype))
}

/// Whether a tensor is a weight as plain numbers, or a buffer that models have beside them.
fn is_plain(name: &str, dtype: Dtype) -> bool {
    const BUFFERS: &[&str] = &["bias", "masked_bias", "position_ids", "token_type_ids", "num_batches_tracked"];
    /// What libraries call scales and the like, where no plain model has a parameter of this name.
    const PARTS: &[&str] = &[
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
        "weight_global_scale",
        "scales",
        "qzeros",
        "absmax",
        "SCB",
        "codebooks",
        "centroids",
        "_amax",
    ];
    let last = name.rsplit('.').next().unwrap_or(name);
    let float = matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
    if float { !PARTS.contains(&last) } else { BUFFERS.contains(&last) || last.ends_with("_index") }
}

/// Fails for weights that MLX packed, of which config.json does not say how.
fn refuse_untold_mlx(tensors: &SafetensorsSet) -> Result<()> {
    let packed = |name: &str| {
        let module = name.strip_suffix(".weight")?;
        tensors.get(&format!("{module}.scales")).map(|_| ())
    };
    match tensors.tensors().find(|spec| spec.dtype == Dtype::U32 && packed(&spec.name).is_some()) {
        None => Ok(()),
        Some(spec) => {
            let why = "the weight is packed by MLX, and config.json lacks the `quantization` that says with how many bits and in \
                       which groups; take the config.json that belongs to it, or the model it was made from";
            let file = tensors.file_of(&spec.name).expect("listed");
            Err(formats::Error::unsupported(why).in_tensor(&spec.name).in_file(file).into())
        }
    }
}

/// What to say of files that mlx-lm or mlx-vlm wrote of a model whose family is not known, and may hold as their own classes have it.
///
/// Fails where a tensor shows that they do: a convolution, whose channels come last in MLX, where norms and factors may be folded into weights
/// beside it; and experts that are stacked as no other runtime has them.
fn stored_by_mlx(tensors: &SafetensorsSet, config: &Value) -> Result<Option<String>> {
    if !tensors.files().iter().any(|file| file.metadata().get("format").is_some_and(|format| format == "mlx")) {
        return Ok(None);
    }
    let turned = |spec: &&TensorSpec| match spec.shape[..] {
        [_, width, 1] => width > 1 && spec.name.contains("conv"),
        [.., height, width, channels] => spec.shape.len() > 3 && height == width && width > 1 && channels != width,
        _ => false,
    };
    let stacked = |spec: &&TensorSpec| {
        spec.shape.len() == 3 && [".experts.", ".switch_mlp."].iter().any(|part| spec.name.contains(part))
    };
    let weights = || tensors.tensors().filter(|spec| spec.name.ends_with(".weight"));
    let found = weights().find(turned).map(|spec| (spec, "the channels last, as MLX has convolutions"));
    let found = found.or_else(|| weights().find(stacked).map(|spec| (spec, "all experts, as MLX stacks them")));
    if let Some((spec, how)) = found {
        let why = format!(
            "has shape {:?}, with {how}: this model was converted for MLX, in a form that other runtimes do not load; take the model that it \
             was made from",
            spec.shape
        );
        let file = tensors.file_of(&spec.name).expect("listed");
        return Err(formats::Error::unsupported(why).in_tensor(&spec.name).in_file(file).into());
    }
    Ok((!families::is_known(config)).then(|| {
        "the files were written for MLX, which may hold models of this type otherwise than transformers does (names, norms, factors): see that \
         transformers loads what is written, or take the model that they were made from"
            .to_owned()
    }))
}

/// Fails for plain weights with scales beside them: runtimes round them to these scales, and what is measured would be
/// another model.
fn refuse_scales_of_plain_weights(reader: &QuantizationReader, tensors: &SafetensorsSet) -> Result<()> {
    let scale = tensors.tensors().find(|spec| {
        ["weight_scale", "weight_zero_point", "weight_global_scale"].iter().any(|part| {
            let module = spec.name.strip_suffix(part).filter(|module| module.ends_with('.'));
            module.is_some_and(|module| tensors.get(&format!("{module}weight")).is_some())
        })
    });
    match scale {
        None => Ok(()),
        Some(spec) => {
            let module = spec.name.rsplit_once('.').map_or("", |(module, _)| module);
            let weight = tensors.get(&format!("{module}.weight")).map(|view| view.dtype);
            let why = match weight.filter(|dtype| !is_float(*dtype)) {
                Some(dtype) => format!(
                    "the weight that it scales is of type {dtype}, which is not read here; take the model it was made from, or one whose \
                     weights are F8_E4M3"
                ),
                None => format!(
                    "the weight that it scales is stored as plain numbers, which {} would round as it loads them; save the \
                     model compressed, or take the one it was made from",
                    reader.method()
                ),
            };
            let file = tensors.file_of(&spec.name).expect("listed");
            Err(formats::Error::unsupported(why).in_tensor(&spec.name).in_file(file).into())
        }
    }
}
