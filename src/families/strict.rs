//! Settings of another type than transformers 5 demands: it refuses the file, though the meaning may be plain. What is plain is brought
//! into the form that every runtime reads, and the rest is told.
//!
//! `types.json` holds the types that its configuration classes check.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::classes::{CLASSES, SIZES, class_of};
use super::{TextPart, text_part};
use crate::json::{integer, real, shown};

/// Settings by the types that they may have, such as `int|null`.
type Types = HashMap<String, Vec<String>>;

static TYPES: LazyLock<HashMap<String, Types>> =
    LazyLock::new(|| serde_json::from_str(include_str!("types.json")).expect("a committed file"));

/// Kinds of layers that transformers has for attention and what stands in its place, old names too.
const LAYER_TYPES: &[&str] = &[
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "window_attention",
    "indexed_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
    "conv",
    "moe",
    "hybrid",
    "hybrid_sliding",
    "reference_sliding_attention",
    "linear_attention",
    "mamba",
    "attention",
    "deepseek_sparse_attention",
    "qwen_sparse_attention",
];

/// Those that DeepSeek V4's class takes.
const DEEPSEEK_V4_TYPES: &[&str] =
    &["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"];

/// Types of weights as configurations call them, and as torch does.
const DTYPES: &[(&str, &str)] = &[
    ("bf16", "bfloat16"),
    ("fp16", "float16"),
    ("f16", "float16"),
    ("fp32", "float32"),
    ("f32", "float32"),
    ("fp64", "float64"),
];

/// What is done with a setting that transformers refuses.
enum Remedy {
    Write(Value),
    /// The default of its class counts, which a null stands for.
    LeaveOut,
    /// What was meant cannot be told.
    Keep,
}

/// Whether a class has this setting, so that it is looked at from the beginning.
pub(super) fn has_setting(class: &str, setting: &str) -> bool {
    TYPES.get(class).is_some_and(|types| types.values().flatten().any(|known| known == setting))
}

/// Rewrites settings whose meaning is certain as transformers 5 demands them, and says what was done, and what it will refuse.
pub fn normalize(config: &mut Value) -> Vec<String> {
    let TextPart { model_type, inner, .. } = text_part(config);
    let outer = super::type_of(config).unwrap_or_default().to_owned();
    let mut notes = Vec::new();
    let key = super::text_key(config);
    let Value::Object(settings) = config else { return notes };
    if outer.is_empty() && model_type.is_empty() {
        notes.push("config.json names no model_type, without which transformers loads nothing".to_owned());
    }
    if inner && let Some(Value::Object(part)) = settings.get_mut(key) {
        object(&model_type, part, &format!("{key}."), &mut notes);
    }
    object(&outer, settings, "", &mut notes);
    notes
}

fn object(model_type: &str, settings: &mut Map<String, Value>, place: &str, notes: &mut Vec<String>) {
    // A wrapper has a class of its own; other types may be read by that of another.
    let own = if TYPES.contains_key(model_type) { model_type } else { class_of(model_type) };
    let known = TYPES.contains_key(own) && own != "*";
    let types = &TYPES[if known { own } else { "*" }];
    let of = |setting: &str| {
        // Other checks stand among the types, under names with spaces.
        let mut groups = types.iter().filter(|(kinds, _)| !kinds.contains(' '));
        let found = groups.find(|(_, settings)| settings.iter().any(|name| name == setting));
        found.map(|(kinds, _)| kinds.split('|').collect::<Vec<&str>>())
    };
    let keys: Vec<String> = settings.keys().cloned().collect();
    for key in keys {
        let value = &settings[&key];
        let remedy = match &key[..] {
            "dtype" | "torch_dtype" => dtype(value),
            "num_labels" => match integer(value) {
                Some(count) => value.is_f64().then(|| Remedy::Write(count.into())),
                None => Some(Remedy::Keep),
            },
            "id2label" => (!are_labels(value)).then_some(Remedy::Keep),
            _ => of(alias(own, &key)).and_then(|kinds| remedy(own, &key, value, &kinds)),
        };
        // What stands for a field of another name is not checked, and wanted all the same.
        let verb = match &key[..] {
            "dtype" | "torch_dtype" => "does not know",
            "num_labels" | "id2label" => "fails on",
            key if alias(own, key) == key => "refuses",
            _ => "fails on",
        };
        let refused = format!("config.json has {} for {place}{key}, which transformers 5 {verb}", shown(value));
        match remedy {
            Some(Remedy::Write(new)) => {
                notes.push(format!("{refused}: it is read and written as {}", shown(&new)));
                settings[&key] = new;
            }
            Some(Remedy::LeaveOut) if known || key.ends_with("dtype") => {
                notes.push(format!("{refused}: it is left out, so that the default counts"));
                settings.shift_remove(&key);
            }
            // Every class has these two.
            Some(Remedy::Keep) if known || ["num_labels", "id2label"].contains(&&key[..]) => {
                notes.push(format!("{refused}; it is written as it stands"))
            }
            Some(_) | None => {}
        }
    }
    for key in types.get("from 0 to 1").into_iter().flatten() {
        if let Some(value) = settings.get(key).filter(|value| real(value).is_some_and(|x| !(0.0..=1.0).contains(&x))) {
            notes.push(format!(
                "config.json has {} for {place}{key}, which is not from 0 to 1: transformers 5 refuses that; it is written as it stands",
                shown(value)
            ));
        }
    }
    layers(own, known, settings, place, notes);
    if types.contains_key("whole heads")
        && let [Some(hidden), Some(heads)] = ["hidden_size", "num_attention_heads"].map(|key| count(own, settings, key))
        && heads > 0
        && hidden % heads != 0
    {
        notes.push(format!(
            "config.json has {hidden} for {place}hidden_size, which is no multiple of its {heads} heads: transformers 5 refuses that"
        ));
    }
}

/// The setting that a key stands for.
fn alias<'k>(class: &str, key: &'k str) -> &'k str
where
    'static: 'k,
{
    let spellings = CLASSES.get(class).map(|class| &class.spellings[..]).unwrap_or_default();
    // The class checks the name of its field, which may be either.
    let of = |spelling: &'static Vec<String>| spelling.iter().any(|name| name == key).then_some(spelling);
    let Some(spelling) = spellings.iter().find_map(of) else { return key };
    let types = &TYPES[class];
    let field = spelling.iter().find(|name| types.values().flatten().any(|known| known == *name));
    field.map_or(key, |field| field.as_str())
}

/// Whether names of classes have numbers that Python's `int` reads, or there are none.
fn are_labels(value: &Value) -> bool {
    let number = |key: &String| {
        let digits = key.trim();
        let digits = digits.strip_prefix(['-', '+']).unwrap_or(digits);
        digits.split('_').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    value.is_null() || value.as_object().is_some_and(|labels| labels.keys().all(number))
}

fn count(class: &str, settings: &Map<String, Value>, key: &str) -> Option<i64> {
    integer(settings.get(key).or_else(|| CLASSES.get(class)?.defaults.get(key))?)
}

/// Tells of lists of layers that transformers holds against the number of layers. Classes that are not known may have kinds of layers
/// of their own.
fn layers(class: &str, known: bool, settings: &Map<String, Value>, place: &str, notes: &mut Vec<String>) {
    // Which counts its layers by this list, and has kinds of its own.
    if class == "nemotron_h" {
        return;
    }
    let Some(count) = count(class, settings, "num_hidden_layers") else { return };
    // The second is looked at only where the first is there.
    let (kinds, feeds): (_, &[&str]) = match class {
        // Which has kinds of its own.
        "deepseek_v4" => (DEEPSEEK_V4_TYPES, &["moe", "hash_moe"]),
        _ => (LAYER_TYPES, &["sparse", "dense"]),
    };
    for (key, allowed) in [("layer_types", kinds), ("mlp_layer_types", feeds)] {
        let Some(list) = settings.get(key).and_then(Value::as_array) else { return };
        if list.len() as i64 != count {
            notes.push(format!(
                "config.json has {} entries in {place}{key} and {count} layers: transformers 5 refuses that; it is written as it stands",
                list.len()
            ));
        }
        if known
            && let Some(other) = list.iter().find(|kind| !kind.as_str().is_some_and(|kind| allowed.contains(&kind)))
        {
            notes.push(format!(
                "config.json has {} in {place}{key}, which transformers 5 refuses; it is written as it stands",
                shown(other)
            ));
        }
    }
}

/// What to do with a type of weights that torch has no name for; `None` where it has.
fn dtype(value: &Value) -> Option<Remedy> {
    let name = value.as_str()?;
    let bare = name.strip_prefix("torch.").unwrap_or(name);
    let known = DTYPES.iter().find(|(word, _)| word.eq_ignore_ascii_case(bare)).map_or(bare, |(_, known)| known);
    match known {
        "auto" => Some(Remedy::LeaveOut),
        _ => (known != name).then(|| Remedy::Write(known.into())),
    }
}

/// What to do with a value that is of none of these types; `None` where it is of one.
fn remedy(class: &str, key: &str, value: &Value, kinds: &[&str]) -> Option<Remedy> {
    let has = |kind: &str| kinds.contains(&kind);
    let fits = match value {
        Value::Null => has("null"),
        Value::Bool(_) => has("bool"),
        Value::String(_) => has("str"),
        Value::Array(list) => has("list") || has("list[int]") && list.iter().all(|item| item.is_i64() || item.is_u64()),
        Value::Number(number) if number.is_f64() => has("float"),
        Value::Number(_) => has("int"),
        // Numbers that only Python writes stand in an object; whole ones are too large for anything else.
        Value::Object(_) if real(value).is_some() => {
            has(if shown(value).trim_start_matches('-').bytes().all(|b| b.is_ascii_digit()) { "int" } else { "float" })
        }
        Value::Object(_) => has("dict"),
    };
    if fits {
        return None;
    }
    // Readers say of a setting that they need that it must not stand in quotes.
    let is_read = SIZES.contains(&key) || CLASSES.get(class).is_some_and(|class| class.defaults.contains_key(key));
    let number = |text: &str| -> Option<Value> {
        let text = text.trim();
        let whole = text.parse::<i64>().ok().filter(|_| has("int")).map(Value::from);
        whole.or_else(|| text.parse::<f64>().ok().filter(|x| x.is_finite() && has("float")).map(Value::from))
    };
    let certain = match value {
        Value::Null if !SIZES.contains(&key) => return Some(Remedy::LeaveOut),
        Value::String(text) if has("bool") && text.eq_ignore_ascii_case("true") => Some(true.into()),
        Value::String(text) if has("bool") && text.eq_ignore_ascii_case("false") => Some(false.into()),
        Value::String(text) if !is_read => number(text),
        Value::Number(_) if has("int") => integer(value).map(Value::from),
        Value::Number(_) if has("float") => value.as_f64().map(Value::from),
        Value::Number(_) if has("bool") => match integer(value) {
            Some(0) => Some(false.into()),
            Some(1) => Some(true.into()),
            _ => None,
        },
        Value::Array(list) if has("list[int]") => {
            let whole: Option<Vec<Value>> = list.iter().map(|item| Some(integer(item)?.into())).collect();
            whole.map(Value::from)
        }
        _ => None,
    };
    Some(certain.map_or(Remedy::Keep, Remedy::Write))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A model with this setting, as it is written, and what is said of it.
    fn written(model_type: &str, key: &str, value: Value) -> (Value, Vec<String>) {
        let mut config = json!({"model_type": model_type, "num_hidden_layers": 2});
        config[key] = value;
        let notes = normalize(&mut config);
        (config.get(key).cloned().unwrap_or_default(), notes)
    }

    #[track_caller]
    fn check(key: &str, value: Value, expected: Value) {
        let (found, notes) = written("llama", key, value.clone());
        assert_eq!(found, expected, "{key}");
        assert_eq!(found.is_f64(), expected.is_f64(), "{key}");
        assert_eq!(notes.len(), 1, "{notes:?}");
        let named = format!("has {} for {key}, which transformers 5 ", shown(&value));
        assert!(notes[0].contains(&named) && notes[0].contains(": it is "), "{notes:?}");
        // What was written is as it should be.
        assert!(expected.is_null() || written("llama", key, expected).1.is_empty(), "{key}");
    }

    #[test]
    fn what_is_certain_is_written_as_transformers_demands_it() {
        check("num_hidden_layers", json!(2.0), json!(2));
        check("bos_token_id", json!(0.0), json!(0));
        check("pad_token_id", json!("0"), json!(0));
        check("eos_token_id", json!([2.0, 5]), json!([2, 5]));
        check("use_cache", json!("True"), json!(true));
        check("use_cache", json!(0), json!(false));
        check("initializer_range", json!(1), json!(1.0));
        check("initializer_range", json!("0.02"), json!(0.02));
        check("rms_norm_eps", Value::Null, Value::Null);
        check("tie_word_embeddings", Value::Null, Value::Null);
        check("torch_dtype", json!("torch.bfloat16"), json!("bfloat16"));
        check("dtype", json!("fp16"), json!("float16"));
        check("dtype", json!("auto"), Value::Null);
    }

    #[test]
    fn what_is_not_certain_stays_and_is_told() {
        for (key, value) in [
            ("num_hidden_layers", json!(true)),
            ("bos_token_id", json!(0.5)),
            ("use_cache", json!("yes")),
            ("hidden_act", json!(7)),
            ("rope_parameters", json!([])),
            ("initializer_range", json!(2.5)),
            ("id2label", json!({"0": "a", "one": "b"})),
            ("id2label", json!({"1.0": "a"})),
            ("id2label", json!(["a", "b"])),
            ("num_labels", json!("two")),
            ("bos_token_id", crate::json::parse(b"NaN").unwrap()),
        ] {
            let (found, notes) = written("llama", key, value.clone());
            assert_eq!(found, value);
            assert!(notes.len() == 1 && notes[0].ends_with("it is written as it stands"), "{notes:?}");
        }
        for list in [json!(["full_attention"]), json!(["full_attention", "banana"])] {
            let (found, notes) = written("llama", "layer_types", list.clone());
            assert_eq!(found, list);
            assert!(notes.len() == 1 && notes[0].contains("layer_types"), "{notes:?}");
        }
        // A size that stands in quotes or is null is refused by whoever needs it.
        assert_eq!(written("llama", "vocab_size", json!("32")).0, json!("32"));
        assert_eq!(written("llama", "hidden_size", Value::Null).1.len(), 1);
    }

    #[test]
    fn what_fits_is_left_alone() {
        for (key, value) in [
            ("eos_token_id", json!([2, 5])),
            ("attention_dropout", json!(0)),
            ("pad_token_id", Value::Null),
            ("initializer_range", json!(0.02)),
            ("vocab_size", crate::json::parse(b"1000000000000000019884624838656").unwrap()),
            ("layer_types", json!(["full_attention", "sliding_attention"])),
            ("no_setting_of_llama", json!("true")),
            ("dtype", json!("half")),
            ("id2label", json!({"0": "a", " +1_0 ": null})),
            ("id2label", Value::Null),
            ("num_labels", json!(3)),
        ] {
            assert_eq!(written("llama", key, value.clone()), (value, Vec::new()), "{key}");
        }
    }

    #[test]
    fn parts_and_unknown_models_are_looked_at_too() {
        let mut config = json!({
            "model_type": "llava", "image_token_index": 5.0,
            "text_config": {"model_type": "llama", "use_cache": "false", "num_hidden_layers": 2},
        });
        let notes = normalize(&mut config);
        assert!(notes.len() == 2 && notes[0].contains("text_config.use_cache"), "{notes:?}");
        assert_eq!((&config["image_token_index"], &config["text_config"]["use_cache"]), (&json!(5), &json!(false)));
        // Of another library's class no more is known than what all agree on.
        assert_eq!(written("unheard_of", "hidden_size", json!(64.0)).0, json!(64));
        assert_eq!(written("unheard_of", "use_cache", json!("yes")), (json!("yes"), Vec::new()));
        assert_eq!(written("gpt2", "num_hidden_layers", json!(2.0)).0, json!(2));
        assert_eq!(written("gpt2", "n_layer", json!(2.0)).0, json!(2));
        let notes = written("", "hidden_size", json!(64)).1;
        assert!(notes.len() == 1 && notes[0].contains("names no model_type"), "{notes:?}");
    }
}
