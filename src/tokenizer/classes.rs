//! What transformers 5 makes of a tokenizer.json by the class of the tokenizer: many classes take no more than the vocabulary from the
//! file and build the rest anew, by their own rules and by settings of tokenizer_config.json. The rules stand in classes.json, which
//! `tests/fixtures/make_tokenizer_classes.py` makes.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use super::added::{CONFIG, Sources};

static KNOWN: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("classes.json")).expect("made by a script"));

/// Classes that take tokenizer.json as it is.
pub(crate) const GENERAL: &[&str] = &["PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"];

/// The class, by its setting that says so or by the model's type, and what it does that the file does not say.
#[derive(Debug, PartialEq)]
pub struct Otherwise {
    class: String,
    /// What it does, each with its verb.
    does: Vec<String>,
    /// Settings of tokenizer_config.json that are not usual for the class.
    settings: Vec<String>,
}

/// What transformers 5 does by a class and not by tokenizer.json; `None` where both are the same, or where the file counts.
pub fn otherwise(sources: &Sources, model_type: Option<&str>, json: &Value) -> Option<Otherwise> {
    let of_bytes = json["pre_tokenizer"].to_string().contains("\"ByteLevel\"")
        || json["decoder"].to_string().contains("\"ByteLevel\"");
    let class = class(sources.class(), model_type, of_bytes)?;
    let (mut does, mut settings) = (Vec::new(), Vec::new());
    let Some(known) = KNOWN["classes"].get(plain_name(class)) else {
        let is_other = KNOWN["others"].as_array()?.iter().any(|other| other == plain_name(class));
        does.push("normalizes and divides texts by rules that are not known here".to_owned());
        return is_other.then(|| Otherwise { class: class.to_owned(), does, settings });
    };

    let own = [&json["normalizer"], &json["pre_tokenizer"]].map(plain);
    let (rules, unusual) = mix(known, sources, json["normalizer"].to_string().contains("\"precompiled_charsmap\""))?;
    settings.extend(unusual);
    if alike(own) != alike([plain(&rules[1]), plain(&rules[2])]) {
        does.push("normalizes and divides texts".to_owned());
    }
    does.extend(other_pieces(&known["model"], sources, &json["model"]));
    does.extend(other_marks(known, sources, &json["post_processor"]));
    (!does.is_empty()).then(|| Otherwise { class: class.to_owned(), does, settings })
}

/// What a class does to texts, and what it says of its pieces.
pub(super) struct Rules {
    /// Its name, without `Fast`.
    pub class: &'static str,
    pub normalizer: &'static Value,
    pub pre_tokenizer: &'static Value,
    /// What stands in `model` of a tokenizer.json, beside vocabulary and merges.
    pub model: &'static Value,
}

/// What transformers 5 makes of a vocabulary without a tokenizer.json; `None` where no class is known.
pub(super) fn rules(sources: &Sources) -> Option<Rules> {
    let name = plain_name(class(sources.class(), sources.model_type.as_deref(), false)?);
    let (class, known) = KNOWN["classes"].as_object()?.get_key_value(name)?;
    let (rules, _) = mix(known, sources, false)?;
    Some(Rules { class, normalizer: &rules[1], pre_tokenizer: &rules[2], model: &known["model"] })
}

/// A class's rules for the settings that are not usual, and these; `table` says whether a file brings a table of characters along.
fn mix(known: &'static Value, sources: &Sources, table: bool) -> Option<(&'static Value, Vec<String>)> {
    let mut mix = Map::new();
    for (key, usual) in known["settings"].as_object().into_iter().flatten() {
        let value = &sources.config[key];
        if value.is_boolean() && value != usual {
            mix.insert(key.clone(), value.clone());
        }
    }
    let settings = mix.iter().map(|(key, value)| format!("\"{key}\": {value}")).collect();
    if table {
        mix.insert("_spm_precompiled_charsmap".to_owned(), true.into());
    }
    let mut mixes = known["rules"].as_array().into_iter().flatten();
    let usual = mixes.clone().next()?;
    // A class that takes no table of characters has none among its mixes.
    let rules = mixes.find(|rules| rules[0].as_object() == Some(&mix));
    let rules = rules.or_else(|| {
        mix.remove("_spm_precompiled_charsmap");
        known["rules"].as_array()?.iter().find(|rules| rules[0].as_object() == Some(&mix))
    });
    Some((rules.unwrap_or(usual), settings))
}

/// Whether a class says what tokens stand around texts.
pub(crate) fn puts_marks(class: &str) -> bool {
    KNOWN["classes"][plain_name(class)]["around"].is_array()
}

impl Otherwise {
    /// One sentence about the file at `path`, which is a tokenizer.json or, with `of_pieces`, a tokenizer.model.
    pub fn note(&self, path: &str, of_pieces: bool) -> String {
        let does = match self.does.split_last() {
            Some((last, [])) => last.clone(),
            Some((last, others)) => format!("{} and {last}", others.join(", ")),
            None => String::new(),
        };
        let class = &self.class;
        let by = match self.settings.is_empty() {
            true => String::new(),
            false => format!(" with {} in {CONFIG}", self.settings.join(", ")),
        };
        let others = match (of_pieces, self.settings.is_empty()) {
            (true, _) => {
                return format!(
                    "{path}: transformers 5 {does} as its class {class} does{by} and not as SentencePiece does, so that some texts have other ids \
                     there; here and in llama.cpp SentencePiece's rules count (a tokenizer.json beside it, saved by transformers 5, has the \
                     class's rules: {})",
                    save_tokenizer("MODEL")
                );
            }
            (false, true) => "here, in llama.cpp and in transformers 4",
            (false, false) => "here and in llama.cpp",
        };
        format!(
            "{path}: transformers 5 {does} as its class {class} does{by} and not as this file says, so that some texts have other ids there; \
             {others} the file counts (where the model's type has no class of its own, \"tokenizer_class\": \
             \"PreTrainedTokenizerFast\" makes it count in transformers 5 too)"
        )
    }
}

/// Whether tokenizer.json counts, or else the class that transformers 5 reads it by. `named` is what the files call it.
fn class<'a>(named: Option<&'a str>, model_type: Option<&str>, of_bytes: bool) -> Option<&'a str> {
    let of_model = model_type.and_then(|model_type| KNOWN["models"][model_type].as_str());
    let corrected = KNOWN["corrected"].as_array()?.iter().any(|other| other.as_str() == model_type);
    // Vocabularies of bytes that say they were Llama's keep their own rules.
    if named.is_some_and(|named| plain_name(named) == "LlamaTokenizer") && of_bytes && !corrected {
        return None;
    }
    let class = match (named, of_model) {
        (Some(named), Some(of_model)) if plain_name(named) != of_model => match of_model {
            "" => return None,
            of_model if corrected => of_model,
            _ => named,
        },
        (Some(named), _) => named,
        (None, of_model) => of_model?,
    };
    (!GENERAL.contains(&class)).then_some(class)
}

fn plain_name(class: &str) -> &str {
    class.strip_suffix("Fast").unwrap_or(class)
}

/// What a class says of the model of pieces that tokenizer.json's own model does not.
fn other_pieces(known: &Value, sources: &Sources, model: &Value) -> Option<String> {
    let kind = model["type"].as_str()?;
    if known["type"] != kind {
        return Some(format!("reads the vocabulary of a {kind} model as {}", known["type"].as_str()?));
    }
    let pieces = model["vocab"].as_array();
    let has = |piece: &str| match pieces {
        Some(pieces) => pieces.iter().any(|other| other[0] == piece),
        None => model["vocab"].get(piece).is_some(),
    };
    let unknown = || {
        let name = sources.named("unk").map_or("<unk>", |(_, name)| name);
        pieces.and_then(|pieces| pieces.iter().position(|piece| piece[0] == name)).unwrap_or(0)
    };
    let mut found = Vec::new();
    for (key, value) in known.as_object()?.iter().filter(|(key, _)| *key != "type") {
        let value = if value == "unk_token" { unknown().into() } else { value.clone() };
        let own = match (&key[..], &model[key]) {
            ("byte_fallback" | "ignore_merges", Value::Null) => Value::Bool(false),
            ("max_input_chars_per_word", Value::Null) => 100.into(),
            (_, own) => own.clone(),
        };
        let is_nothing = |value: &Value| value.is_null() || value == "";
        // Without pieces for bytes there is nothing to fall back to.
        let matters = key != "byte_fallback" || has("<0x00>");
        if matters && own != value && !(is_nothing(&own) && is_nothing(&value)) {
            found.push(format!("\"{key}\": {value} in place of {own}"));
        }
    }
    (!found.is_empty()).then(|| format!("makes pieces with {}", found.join(", ")))
}

/// Tokens that a class puts around texts and tokenizer.json does not.
fn other_marks(known: &Value, sources: &Sources, post_processor: &Value) -> Option<String> {
    let flagged = ["add_bos_token", "add_eos_token"].iter().any(|flag| sources.flag(flag).is_some());
    if known["follows"] == true && flagged {
        return None;
    }
    let text = |token: &Value| {
        let token = token.as_str()?;
        match token.strip_suffix("_token") {
            Some(short) => {
                let named = sources.named(short).map(|(_, text)| text);
                Some(named.or_else(|| known["tokens"][token].as_str())?.to_owned())
            }
            None => Some(token.to_owned()),
        }
    };
    let [before, behind] = known["around"]
        .as_array()?
        .iter()
        .map(|side| side.as_array()?.iter().map(text).collect())
        .collect::<Option<Vec<Vec<String>>>>()?
        .try_into()
        .ok()?;
    if marks(post_processor)? == [before.clone(), behind.clone()] {
        return None;
    }
    let shown = |tokens: &[String]| tokens.iter().map(|token| format!("`{token}`")).collect::<Vec<_>>().join(" ");
    Some(match (&before[..], &behind[..]) {
        ([], []) => "puts no token around texts".to_owned(),
        (before, []) => format!("puts {} before texts and nothing behind them", shown(before)),
        ([], behind) => format!("puts {} behind texts and nothing before them", shown(behind)),
        (before, behind) => format!("puts {} before texts and {} behind them", shown(before), shown(behind)),
    })
}

/// The tokens that a post-processor puts before and behind a text; `None` for one that is not known.
fn marks(post_processor: &Value) -> Option<[Vec<String>; 2]> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match post_processor["type"].as_str() {
        None if post_processor.is_null() => Some([Vec::new(), Vec::new()]),
        Some("ByteLevel") => Some([Vec::new(), Vec::new()]),
        Some("RobertaProcessing" | "BertProcessing") => {
            Some([vec![text(&post_processor["cls"][0])?], vec![text(&post_processor["sep"][0])?]])
        }
        Some("TemplateProcessing") => {
            let parts = post_processor["single"].as_array()?;
            let at = parts.iter().position(|part| !part["Sequence"].is_null())?;
            let tokens = |parts: &[Value]| -> Option<Vec<String>> {
                let tokens = parts.iter().map(|part| {
                    let id = part["SpecialToken"]["id"].as_str()?;
                    post_processor["special_tokens"][id]["tokens"].as_array()?.iter().map(text).collect()
                });
                Some(tokens.collect::<Option<Vec<Vec<String>>>>()?.concat())
            };
            Some([tokens(&parts[..at])?, tokens(&parts[at + 1..])?])
        }
        Some("Sequence") => {
            let mut all = [Vec::new(), Vec::new()];
            for processor in post_processor["processors"].as_array()? {
                let [before, behind] = marks(processor)?;
                all[0].splice(0..0, before);
                all[1].extend(behind);
            }
            Some(all)
        }
        _ => None,
    }
}

/// A normalizer and a pre-tokenizer without one that finds nothing to divide at, as Gemma's.
fn alike([normalizer, pre_tokenizer]: [Value; 2]) -> [Value; 2] {
    let has_no_spaces = normalizer == json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let at_spaces = pre_tokenizer["type"] == "Split" && pre_tokenizer["pattern"] == json!({"String": " "});
    [normalizer, if has_no_spaces && at_spaces { Value::Null } else { pre_tokenizer }]
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
            // A class takes the table of characters that the file has.
            const ASIDE: &[&str] = &["trim_offsets", "invert", "precompiled_charsmap"];
            let kept = fields.iter().filter(|(key, _)| !ASIDE.contains(&&key[..]));
            Value::Object(kept.map(|(key, value)| (key.clone(), value.clone())).collect::<Map<_, _>>())
        }
    }
}

/// The line of Python that saves tokenizer.json.
pub(crate) fn save_tokenizer(model: &str) -> String {
    format!(
        "python3 -c 'from transformers import AutoTokenizer as T; T.from_pretrained(\"{model}\").save_pretrained(\"{model}\")'"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(class: Option<&str>, config: Value) -> Sources {
        Sources { config, class: class.map(str::to_owned), ..Sources::default() }
    }

    fn found(class: Option<&str>, config: Value, model_type: Option<&str>, json: &Value) -> Option<String> {
        otherwise(&sources(class, config), model_type, json).map(|otherwise| otherwise.note("x", false))
    }

    /// A note that says this.
    fn says(note: Option<String>, words: &str) {
        assert!(note.as_ref().is_some_and(|note| note.contains(words)), "{note:?}");
    }

    const NONE: Value = Value::Null;

    fn byte_level(add_prefix_space: bool) -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": true})
    }

    #[test]
    fn classes_with_other_rules_are_known() {
        let class = |class: Option<&str>, model_type: Option<&str>, json: &Value| {
            otherwise(&sources(class, NONE), model_type, json).map(|otherwise| otherwise.class)
        };
        let digits = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(false)]});
        let own = json!({"normalizer": null, "pre_tokenizer": digits});
        let is = |name: &str| Some(name.to_owned());
        // SmolLM2's tokenizer under its own class, as the hub has it.
        assert_eq!(class(Some("GPT2Tokenizer"), Some("llama"), &own), is("GPT2Tokenizer"));
        assert_eq!(class(Some("GPT2TokenizerFast"), None, &own), is("GPT2TokenizerFast"));
        assert_eq!(class(Some("PreTrainedTokenizerFast"), Some("llama"), &own), None);
        assert_eq!(class(None, Some("qwen2"), &own), is("Qwen2Tokenizer"));
        assert_eq!(class(Some("LlamaTokenizer"), Some("llama"), &own), None);
        assert_eq!(class(None, Some("llama"), &own), None);
        assert_eq!(class(Some("SomebodysTokenizer"), Some("llama"), &own), None);
        let gpt2 =
            json!({"normalizer": null, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level(false)]}});
        assert_eq!(class(Some("GPT2Tokenizer"), None, &gpt2), None);
        let llama = json!({"normalizer": {"type": "Prepend", "prepend": "▁"}, "pre_tokenizer": null});
        assert_eq!(class(Some("LlamaTokenizer"), Some("llama"), &llama), is("LlamaTokenizer"));
        // The class counts for no model of Mistral's, and for Qwen2's the model's own.
        assert_eq!(class(Some("LlamaTokenizerFast"), Some("mistral"), &llama), None);
        assert_eq!(class(Some("PreTrainedTokenizerFast"), Some("qwen2"), &own), is("Qwen2Tokenizer"));
        assert_eq!(class(Some("PreTrainedTokenizerFast"), Some("qwen3"), &own), None);
        assert_eq!(class(None, Some("mistral"), &llama), None);
    }

    #[test]
    fn settings_that_change_a_class_are_known() {
        let gpt2 = |space: bool| json!({"pre_tokenizer": byte_level(space), "model": {"type": "BPE"}});
        let with = |key: &str, value: Value| json!({key: value});
        let space = with("add_prefix_space", true.into());
        says(
            found(Some("GPT2Tokenizer"), space.clone(), Some("llama"), &gpt2(false)),
            "transformers 5 normalizes and divides texts as its class GPT2Tokenizer does with \"add_prefix_space\": true in \
             tokenizer_config.json and not as this file says",
        );
        assert_eq!(found(Some("GPT2Tokenizer"), space, Some("llama"), &gpt2(true)), None);
        assert_eq!(found(Some("GPT2Tokenizer"), with("add_prefix_space", NONE), Some("llama"), &gpt2(false)), None);
        let llama = |scheme: &str| {
            let space = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
            json!({"pre_tokenizer": space, "model": {"type": "BPE", "byte_fallback": true}})
        };
        for (key, value, scheme) in
            [("add_prefix_space", false, "never"), ("legacy", true, "always"), ("legacy", false, "first")]
        {
            for other in ["never", "always", "first"] {
                let found = found(Some("LlamaTokenizer"), with(key, value.into()), Some("llama"), &llama(other));
                assert_eq!(found.is_none(), other == scheme, "{key} {value} {other}: {found:?}");
            }
        }
        let bert = |lowercase: bool, accents: Value| {
            let normalizer = json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "strip_accents": accents, "lowercase": lowercase});
            json!({"normalizer": normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"}})
        };
        let cased = with("do_lower_case", false.into());
        says(found(Some("BertTokenizer"), cased.clone(), None, &bert(true, NONE)), "with \"do_lower_case\": false in");
        let config = json!({"do_lower_case": false, "strip_accents": true, "tokenize_chinese_chars": true});
        says(
            found(Some("BertTokenizer"), config.clone(), None, &bert(false, NONE)),
            "with \"do_lower_case\": false, \"strip_accents\": true in",
        );
        // What it puts around texts is no matter of the settings.
        for (config, normalized) in [(cased, bert(false, NONE)), (config, bert(false, true.into()))] {
            let found = found(Some("BertTokenizer"), config, None, &normalized).unwrap();
            assert!(
                found.contains("transformers 5 puts `[CLS]` before texts and `[SEP]` behind them as its"),
                "{found}"
            );
        }
    }

    #[test]
    fn classes_that_put_other_tokens_around_texts_are_known() {
        let template = |before: &[&str], behind: &[&str]| {
            let part = |token: &&str| json!({"SpecialToken": {"id": token, "type_id": 0}});
            let mut single: Vec<Value> = before.iter().map(part).collect();
            single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
            single.extend(behind.iter().map(part));
            let all = before.iter().chain(behind);
            let tokens: Map<String, Value> =
                all.map(|t| (t.to_string(), json!({"id": t, "ids": [1], "tokens": [t]}))).collect();
            json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens})
        };
        let bytes = |post_processor: Value| json!({"pre_tokenizer": byte_level(false), "post_processor": post_processor, "model": {"type": "BPE"}});
        let roberta = |config: Value, post: Value| found(Some("RobertaTokenizer"), config, Some("llama"), &bytes(post));
        says(
            roberta(NONE, NONE),
            "transformers 5 puts `<s>` before texts and `</s>` behind them as its class RobertaTokenizer",
        );
        says(roberta(json!({"cls_token": "<c>"}), template(&["<s>"], &["</s>"])), "puts `<c>` before texts");
        assert_eq!(roberta(NONE, template(&["<s>"], &["</s>"])), None);
        let own = json!({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]});
        assert_eq!(roberta(NONE, own.clone()), None);
        assert_eq!(roberta(NONE, json!({"type": "Sequence", "processors": [byte_level(true), own]})), None);
        says(
            found(Some("WhisperTokenizer"), NONE, Some("llama"), &bytes(byte_level(false))),
            "puts `<|endoftext|>` `<|endoftext|>` before texts and `<|endoftext|>` behind them as its class WhisperTokenizer",
        );
        let unigram = |unknown: usize, post_processor: Value| {
            let space = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
            let pre_tokenizer = json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]});
            let vocab = json!([["a", 0.0], ["b", 0.0], ["<unk>", 0.0], ["<0x00>", 0.0]]);
            let model = json!({"type": "Unigram", "unk_id": unknown, "vocab": vocab});
            json!({"pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "model": model})
        };
        let ends = || template(&["<s>"], &["</s>"]);
        let roberta = |json: &Value| found(Some("XLMRobertaTokenizer"), NONE, None, json);
        says(
            roberta(&unigram(2, template(&[], &["</s>"]))),
            "makes pieces with \"unk_id\": 3 in place of 2 and puts `<s>` before texts and `</s>` behind them as",
        );
        assert_eq!(roberta(&unigram(3, ends())), None);
        let camembert = |json: &Value| found(Some("CamembertTokenizer"), NONE, None, json);
        says(camembert(&unigram(0, ends())), "makes pieces with \"unk_id\": 2 in place of 0 as its class Camembert");
        assert_eq!(camembert(&unigram(2, ends())), None);
        // A table of characters is taken along.
        let mut table = unigram(2, ends());
        table["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
        assert_eq!(camembert(&table), None);
        says(found(Some("UdopTokenizer"), NONE, None, &table), "normalizes and divides texts");
    }

    #[test]
    fn classes_of_other_models_are_known() {
        let llama = json!({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
            "model": {"type": "BPE", "byte_fallback": false, "vocab": {"<0x00>": 0}}});
        says(
            found(Some("LlamaTokenizer"), NONE, None, &llama),
            "makes pieces with \"byte_fallback\": true in place of false",
        );
        let mut other = llama.clone();
        other["model"]["vocab"] = json!({"a": 0});
        assert_eq!(found(Some("LlamaTokenizer"), NONE, None, &other), None);
        // Where there are no spaces, nothing is divided at them.
        let gemma = |pre_tokenizer: Value| json!({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": pre_tokenizer});
        assert_eq!(found(Some("GemmaTokenizer"), NONE, None, &gemma(NONE)), None);
        says(found(Some("GemmaTokenizer"), NONE, None, &gemma(byte_level(true))), "normalizes and divides texts as");
        says(
            found(Some("MarianTokenizer"), NONE, None, &gemma(NONE)),
            "by rules that are not known here as its class Marian",
        );
        assert_eq!(found(Some("ParakeetTokenizer"), NONE, None, &gemma(NONE)), None);
        other["model"]["type"] = "Unigram".into();
        says(found(Some("LlamaTokenizer"), NONE, None, &other), "reads the vocabulary of a Unigram model as BPE");
    }
}
