//! Classes of tokenizers that transformers 5 builds anew: it takes the vocabulary of tokenizer.json, and normalizes and divides texts as
//! the class does, whatever the file says of that. Their rules stand in classes.json, which
//! `tests/fixtures/make_tokenizer_classes.py` makes.

use std::sync::LazyLock;

use serde_json::{Map, Value};

static KNOWN: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("classes.json")).expect("made by a script"));

/// Classes that take tokenizer.json as it is, unless the model's type has a class of its own.
const GENERAL: &[&str] = &["PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"];

/// The class by which transformers 5 reads a tokenizer.json otherwise than the file says; `None` where both are the same, or where it
/// takes the file as it is.
pub fn other_rules<'a>(class: Option<&'a str>, model_type: Option<&str>, json: &Value) -> Option<&'a str> {
    let named = class.filter(|class| !GENERAL.contains(class));
    let class = match named {
        Some(class) => class,
        None => KNOWN["models"][model_type?].as_str()?,
    };
    let rules = KNOWN["classes"].get(class).or_else(|| KNOWN["classes"].get(class.strip_suffix("Fast")?))?;
    let own = [&json["normalizer"], &json["pre_tokenizer"]].map(plain);
    // Vocabularies of bytes keep their own rules under the class of Llama.
    let of_bytes = own[1].to_string().contains("\"ByteLevel\"");
    if class.starts_with("LlamaTokenizer") && of_bytes {
        return None;
    }
    (own != [plain(&rules[0]), plain(&rules[1])]).then_some(class)
}

/// A rule without what does not change ids, and a sequence of one as that one.
fn plain(rule: &Value) -> Value {
    let Value::Object(fields) = rule else { return rule.clone() };
    let list = ["normalizers", "pretokenizers"].iter().find_map(|key| fields.get(*key)?.as_array());
    match list.map(Vec::as_slice) {
        Some([]) => Value::Null,
        Some([one]) => plain(one),
        Some(many) => many.iter().map(plain).collect(),
        None => {
            let kept = fields.iter().filter(|(key, _)| *key != "trim_offsets" && *key != "invert");
            Value::Object(kept.map(|(key, value)| (key.clone(), value.clone())).collect::<Map<_, _>>())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn classes_with_other_rules_are_known() {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let digits =
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes]});
        let own = json!({"normalizer": null, "pre_tokenizer": digits});
        // SmolLM2's tokenizer under its own class, as the hub has it.
        assert_eq!(other_rules(Some("GPT2Tokenizer"), Some("llama"), &own), Some("GPT2Tokenizer"));
        assert_eq!(other_rules(Some("GPT2TokenizerFast"), None, &own), Some("GPT2TokenizerFast"));
        assert_eq!(other_rules(Some("PreTrainedTokenizerFast"), Some("llama"), &own), None);
        assert_eq!(other_rules(None, Some("qwen2"), &own), Some("Qwen2Tokenizer"));
        assert_eq!(other_rules(Some("LlamaTokenizer"), Some("llama"), &own), None);
        assert_eq!(other_rules(Some("SomebodysTokenizer"), Some("llama"), &own), None);
        let gpt2 = json!({"normalizer": null, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [bytes]}});
        assert_eq!(other_rules(Some("GPT2Tokenizer"), None, &gpt2), None);
        let llama = json!({"normalizer": {"type": "Prepend", "prepend": "▁"}, "pre_tokenizer": null});
        assert_eq!(other_rules(Some("LlamaTokenizer"), Some("llama"), &llama), Some("LlamaTokenizer"));
    }
}
