//! How a model is best sampled: generation_config.json, and llama.cpp's `general.sampling.*`, which its programs take where nobody says
//! otherwise.

use formats::GgufFile;
use formats::container::gguf::MetadataValue;
use serde_json::{Map, Value};

use super::metadata::Metadata;
use crate::json::{integer, real};

/// A setting in generation_config.json, what stands behind `general.sampling.`, and whether it is a whole number.
const SETTINGS: &[(&str, &str, bool)] = &[
    ("top_k", "top_k", true),
    ("top_p", "top_p", false),
    ("min_p", "min_p", false),
    ("xtc_probability", "xtc_probability", false),
    ("xtc_threshold", "xtc_threshold", false),
    ("temperature", "temp", false),
    ("penalty_last_n", "penalty_last_n", true),
    ("penalty_repeat", "penalty_repeat", false),
    ("mirostat", "mirostat", true),
    ("mirostat_tau", "mirostat_tau", false),
    ("mirostat_eta", "mirostat_eta", false),
];

/// Keys of a GGUF file for what generation_config.json says, as llama.cpp's converter writes them.
pub fn written(generation: &Value) -> Metadata {
    let value = |name: &str, whole: bool| {
        let said = generation.get(name)?;
        match whole {
            true => Some(MetadataValue::I32(i32::try_from(integer(said)?).ok()?)),
            false => real(said).map(|x| x as f32).filter(|x| x.is_finite()).map(MetadataValue::F32),
        }
    };
    let of = |(name, key, whole): &(&str, &str, bool)| Some((format!("general.sampling.{key}"), value(name, *whole)?));
    SETTINGS.iter().filter_map(of).collect()
}

/// What such keys are in generation_config.json; nothing where there are none.
///
/// transformers takes them only where `do_sample` is true, which is said with them.
pub fn read(file: &GgufFile) -> Map<String, Value> {
    let value = |key: &str, whole: bool| match file.metadata(&format!("general.sampling.{key}"))? {
        MetadataValue::I32(n) if whole => Some(Value::from(*n)),
        MetadataValue::U32(n) if whole => Some(Value::from(*n)),
        // The shortest number that is this one in single precision: 0.6, and not 0.6000000238418579.
        MetadataValue::F32(x) if !whole => x.to_string().parse::<f64>().ok().map(Value::from),
        MetadataValue::F64(x) if !whole => Some(Value::from(*x)),
        _ => None,
    };
    let of = |(name, key, whole): &(&str, &str, bool)| Some(((*name).to_owned(), value(key, *whole)?));
    let mut found: Map<String, Value> = SETTINGS.iter().filter_map(of).collect();
    if !found.is_empty() {
        found.insert("do_sample".to_owned(), true.into());
    }
    found
}

/// What a GGUF file says of its model in general (authors, sources, tags, how to sample it) that `own`, the keys of a file which is made of
/// it, lacks; what says how its weights are held is left out.
pub fn carried(file: &GgufFile, own: &Metadata) -> Metadata {
    const OF_WEIGHTS: &[&str] =
        &["file_type", "quantization_version", "quantized_by", "alignment", "size_label", "type"];
    let keys = file.keys().into_iter().filter(|key| {
        let general = key.strip_prefix("general.").filter(|rest| !OF_WEIGHTS.contains(rest));
        general.is_some() && !own.iter().any(|(name, _)| name == key)
    });
    keys.filter_map(|key| Some((key.to_owned(), file.metadata(key)?.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn settings_have_the_types_of_llama_cpps_keys() {
        let said = json!({"temperature": 0.6, "top_k": 20.0, "top_p": "high", "do_sample": true, "min_p": null});
        let expected = [
            ("general.sampling.top_k".to_owned(), MetadataValue::I32(20)),
            ("general.sampling.temp".to_owned(), MetadataValue::F32(0.6)),
        ];
        assert_eq!(written(&said), expected);
        assert!(written(&Value::Null).is_empty());
    }
}
