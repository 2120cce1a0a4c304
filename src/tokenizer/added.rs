//! The tokens that the files beside a vocabulary add to it, put together as transformers does.
//!
//! tokenizer_config.json's `added_tokens_decoder` says everything in one place; where it stands, special_tokens_map.json and
//! added_tokens.json are not looked at. Otherwise they are, and special_tokens_map.json goes before tokenizer_config.json.
//! Then come the special tokens that have a name, and those that have none.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// The file of settings.
pub(crate) const CONFIG: &str = "tokenizer_config.json";
/// Names of special tokens, by earlier programs.
pub(crate) const MAP: &str = "special_tokens_map.json";
/// Ids of what was added, by earlier programs.
pub(crate) const ADDED: &str = "added_tokens.json";

/// The special tokens that every model may name (`bos_token`, …), in the order in which new ones get their ids.
pub(crate) const NAMES: [&str; 7] = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"];

/// A token that is looked for in texts before they are split.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Added {
    pub content: String,
    pub special: bool,
    /// Looked for in the text as it is after the rules for characters.
    pub normalized: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    pub single_word: bool,
}

impl Added {
    pub fn new(content: &str, special: bool) -> Added {
        let content = content.to_owned();
        Added { content, special, normalized: !special, lstrip: false, rstrip: false, single_word: false }
    }

    /// An object with `content`; `special` where the object does not matter.
    fn read(token: &Value, special: Option<bool>) -> Option<Added> {
        let flag = |name: &str| token[name] == true;
        let mut added = Added::new(token["content"].as_str()?, special.unwrap_or_else(|| flag("special")));
        added.normalized = token["normalized"].as_bool().unwrap_or(added.normalized);
        (added.lstrip, added.rstrip, added.single_word) = (flag("lstrip"), flag("rstrip"), flag("single_word"));
        Some(added)
    }

    /// A special token: a spelling, or an object. Only an object that says its type knows better.
    fn spelt(token: &Value, special: Option<bool>) -> Option<Added> {
        let added = match token {
            Value::String(content) => Some(Added::new(content, true)),
            object => Added::read(object, special.or(object["__type"].is_null().then_some(true))),
        };
        added.filter(|added| !added.content.is_empty())
    }

    /// As tokenizer.json has it, where nothing may be missing.
    fn of_json(token: &Value) -> Option<(u32, Added)> {
        let flags = ["special", "normalized", "lstrip", "rstrip", "single_word"];
        let whole = flags.iter().all(|flag| token[flag].is_boolean());
        let id = u32::try_from(token["id"].as_u64()?).ok()?;
        Some((id, Added::read(token, None)?)).filter(|_| whole)
    }

    pub fn to_json(&self, id: u32) -> Value {
        json!({
            "id": id, "content": self.content, "single_word": self.single_word, "lstrip": self.lstrip,
            "rstrip": self.rstrip, "normalized": self.normalized, "special": self.special,
        })
    }
}

/// The added tokens of a tokenizer.json; `None` where the list is not as it has to be.
pub(crate) fn of_json(json: &Value) -> Option<Vec<(u32, Added)>> {
    match &json["added_tokens"] {
        Value::Null => Some(Vec::new()),
        list => list.as_array()?.iter().map(Added::of_json).collect(),
    }
}

/// The spelling of a token, which is a string or an object.
fn spelling(token: &Value) -> Option<&str> {
    token.as_str().or(token["content"].as_str()).filter(|text| !text.is_empty())
}

/// The files beside a vocabulary, `Null` where there is none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sources {
    pub config: Value,
    pub map: Value,
    pub added: Value,
    /// The class of config.json, which is asked where tokenizer_config.json has none.
    pub class: Option<String>,
    /// The model's type, by config.json.
    pub model_type: Option<String>,
    /// The name of the tokenizer.json that is read, where that is another one.
    pub file: Option<String>,
}

/// Special tokens by name.
type Named = Vec<(String, Added)>;

/// What the files say.
#[derive(Debug, Default)]
pub(crate) struct Declared {
    /// Tokens with an id, by it, and the file that gives it.
    pub numbered: Vec<(u32, Added)>,
    /// Where the ids stand.
    pub file: &'static str,
    /// Special tokens with a name (`eos_token`, `image_token`), in the order in which new ones get their ids.
    pub named: Named,
    /// Special tokens without one.
    pub extra: Vec<Added>,
}

/// A file, and what is wrong with it.
pub(crate) type Flaw = (&'static str, String);

impl Sources {
    /// `model_type` is what config.json calls the model.
    pub fn read(folder: &Path, model_type: Option<&str>) -> Result<Sources> {
        let json_of = |name: &str| match super::read_words(&folder.join(name))? {
            None => Ok(Value::Null),
            Some(json) if json.is_object() => Ok(json),
            Some(_) => Err(Error::failed(format!(
                "{}: not a JSON object, and no tokenizer loads with it; fetch the file again",
                folder.join(name).display()
            ))),
        };
        let class = json_of("config.json")?["tokenizer_class"].as_str().map(str::to_owned);
        let model_type = model_type.map(str::to_owned);
        let (config, map, added) = (json_of(CONFIG)?, json_of(MAP)?, json_of(ADDED)?);
        Ok(Sources { config, map, added, class, model_type, file: None })
    }

    pub fn flag(&self, name: &str) -> Option<bool> {
        self.config[name].as_bool()
    }

    /// Special tokens with names of a model's own, as `image_token`, which templates print by these.
    pub fn extra_tokens(&self) -> Vec<(String, String)> {
        let Some(named) = self.config["extra_special_tokens"].as_object() else { return Vec::new() };
        let text = |value: &Value| value.as_str().or(value["content"].as_str()).map(str::to_owned);
        named.iter().filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect()
    }

    /// The class of tokenizer_config.json, or else of config.json.
    pub fn class(&self) -> Option<&str> {
        self.config["tokenizer_class"].as_str().or(self.class.as_deref())
    }

    /// Whether tokenizer_config.json says everything, so that the older files are not looked at.
    pub fn is_whole(&self) -> bool {
        self.config["added_tokens_decoder"].is_object()
    }

    /// The spelling of a named token such as `eos`, and the file that says so.
    ///
    /// special_tokens_map.json is asked even where transformers does not look at it, if nothing else names the token.
    pub fn named(&self, name: &str) -> Option<(&'static str, &str)> {
        let key = format!("{name}_token");
        let mut files = [(CONFIG, &self.config), (MAP, &self.map)];
        if !self.is_whole() {
            files.reverse();
        }
        files.into_iter().find_map(|(file, json)| Some((file, spelling(&json[&key])?)))
    }

    /// Puts together what the files add. Fails for an entry with an id and without a token, or the other way round.
    pub fn declared(&self) -> Result<Declared, Flaw> {
        let older = [&self.map].into_iter().filter(|_| !self.is_whole()).filter_map(Value::as_object);
        let mut names: HashMap<String, Added> = HashMap::new();
        // Names of a model's own, first those that are not written as a plain string in the newer file.
        let (mut own, mut own_strings) = (Named::new(), Named::new());
        let mut name = |key: &str, token: Added, plain: bool| match key.strip_suffix("_token") {
            Some(short) if NAMES.contains(&short) => {
                names.insert(short.to_owned(), token);
            }
            _ if plain => replace(&mut own_strings, key, token),
            _ => replace(&mut own, key, token),
        };
        for (key, token) in self.config.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token")) {
            if let Some(added) = Added::spelt(token, None) {
                name(key, added, token.is_string());
            }
        }
        let list = |value: &Value, special: Option<bool>| -> Vec<Added> {
            value.as_array().into_iter().flatten().filter_map(|token| Added::spelt(token, special)).collect()
        };
        let table = |value: &Value| -> Named {
            let entries = value.as_object().into_iter().flatten();
            entries.filter_map(|(key, token)| Some((key.clone(), Added::spelt(token, None)?))).collect()
        };
        let empty = |value: &Value| match value {
            Value::Array(list) => list.is_empty(),
            Value::Object(table) => table.is_empty(),
            other => other.is_null(),
        };
        let older_name = &self.config["additional_special_tokens"];
        let newer_name = &self.config["extra_special_tokens"];
        let listed = if empty(newer_name) && !older_name.is_null() { older_name } else { newer_name };
        let (mut extra, mut is_listed) = (list(listed, None), listed.is_array());
        table(listed).into_iter().for_each(|(key, token)| name(&key, token, true));
        for (key, value) in older.flatten() {
            match &key[..] {
                "extra_special_tokens" => {
                    for token in list(value, Some(true)) {
                        if !extra.iter().any(|known| known.content == token.content) {
                            extra.push(token);
                        }
                    }
                    table(value).into_iter().for_each(|(key, token)| name(&key, token, true));
                    is_listed |= value.is_array();
                }
                _ if !key.ends_with("_token") => {}
                _ => {
                    if let Some(token) = Added::spelt(value, Some(true)) {
                        name(key, token, false);
                    }
                }
            }
        }
        let mut declared = Declared { file: CONFIG, ..Declared::default() };
        match self.config["added_tokens_decoder"].as_object() {
            Some(decoder) => {
                for (id, token) in decoder {
                    let read = id.trim().parse::<u32>().ok().zip(Added::read(token, None));
                    declared.numbered.push(read.ok_or_else(|| {
                        (CONFIG, format!("has an entry in added_tokens_decoder, `{id}`, without an id or a content"))
                    })?);
                }
            }
            None => {
                declared.file = ADDED;
                let special: HashSet<&str> = names.values().chain(&extra).map(|token| token.content.as_str()).collect();
                for (content, id) in self.added.as_object().into_iter().flatten() {
                    let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                    let id = id.ok_or_else(|| (ADDED, format!("has no id for `{content}`")))?;
                    declared.numbered.push((id, Added::new(content, special.contains(&content[..]))));
                }
            }
        }
        declared.numbered.sort_by_key(|(id, _)| *id);
        if !is_listed && !self.is_whole() {
            extra = list(&self.map["additional_special_tokens"], Some(true));
        }
        let standard = NAMES.iter().filter_map(|short| Some((format!("{short}_token"), names.remove(*short)?)));
        declared.named = standard.chain(own).chain(own_strings).collect();
        declared.named.iter_mut().for_each(|(_, token)| token.special = true);
        declared.extra = extra;
        Ok(declared)
    }

    /// Settings of a kind that transformers loads no tokenizer with, each with what it is.
    pub fn misshapen(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut tell = |key: &str, value: &Value| found.push(format!("{key} is `{}`", shortened(value)));
        for short in NAMES {
            let (key, value) = (format!("{short}_token"), &self.config[format!("{short}_token")]);
            if !(value.is_null() || value.is_string() || value["content"].is_string()) {
                tell(&key, value);
            }
        }
        if let value @ (Value::Bool(_) | Value::Number(_)) = &self.config["chat_template"] {
            tell("chat_template", value);
        }
        let decoder = &self.config["added_tokens_decoder"];
        if !decoder.is_null() && !decoder.is_object() {
            tell("added_tokens_decoder", decoder);
        }
        let plain = |token: &&Value| token.is_string() || token["__type"].is_string();
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            let list = self.config[key].as_array().into_iter().flatten();
            if let Some(value) = list.into_iter().find(|token| !plain(token)) {
                tell(&format!("a token of {key}"), value);
            }
        }
        found
    }

    /// What stands in files that are not looked at, and is none of the tokens that `known` knows.
    pub fn passed_over(&self, known: &dyn Fn(&str) -> bool) -> Option<String> {
        if !self.is_whole() {
            return None;
        }
        let lists = ["additional_special_tokens", "extra_special_tokens"].map(|key| &self.map[key]);
        let lists = lists.into_iter().filter_map(Value::as_array).flatten();
        let single =
            |map: &Map<String, Value>| map.values().filter_map(spelling).map(str::to_owned).collect::<Vec<_>>();
        let of_map = self.map.as_object().map(single).unwrap_or_default();
        let of_map = of_map.into_iter().chain(lists.filter_map(spelling).map(str::to_owned)).map(|text| (MAP, text));
        let of_added = self.added.as_object().into_iter().flatten().map(|(text, _)| (ADDED, text.clone()));
        let mut missing: Vec<(&str, String)> = of_map.chain(of_added).filter(|(_, text)| !known(text)).collect();
        missing.dedup();
        let (file, text) = missing.first()?;
        let others = if missing.len() > 1 { format!(" and {} other tokens", missing.len() - 1) } else { String::new() };
        Some(format!(
            "{file} names `{text}`{others}, which are no tokens to transformers, as {CONFIG} has an added_tokens_decoder without them"
        ))
    }
}

/// The beginning of a value as JSON.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn replace(list: &mut Named, key: &str, token: Added) {
    match list.iter_mut().find(|(other, _)| other == key) {
        Some((_, old)) => *old = token,
        None => list.push((key.to_owned(), token)),
    }
}

/// An added token, and the id that a file gives it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stated {
    pub token: Added,
    pub id: Option<u32>,
    /// The file with the id.
    pub file: &'static str,
}

impl Declared {
    /// Everything beside the vocabulary of a tokenizer.json with the added tokens `own`, in the order in which tokens that
    /// the vocabulary lacks get the next ids. `whole` is [`Sources::is_whole`].
    pub fn merge(&self, own: &[(u32, Added)], whole: bool) -> Vec<Stated> {
        let mut merged: Vec<Stated> = Vec::with_capacity(own.len());
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut put = |token: &Added, id: Option<u32>, file: &'static str, replaces: bool| {
            if token.content.is_empty() {
                return;
            }
            match places.get(&token.content) {
                Some(&place) if replaces => {
                    let known = &mut merged[place];
                    // The vocabulary keeps its id; that of another file is told.
                    if id.is_some() && id != known.id && file != known.file {
                        (known.id, known.file) = (id, file);
                    }
                    known.token = token.clone();
                }
                Some(_) => {}
                None => {
                    places.insert(token.content.clone(), merged.len());
                    merged.push(Stated { token: token.clone(), id, file });
                }
            }
        };
        for (id, token) in own {
            put(token, Some(*id), "tokenizer.json", true);
        }
        // The older file's ids give way to those of tokenizer.json.
        let taken: HashSet<u32> = own.iter().map(|(id, _)| *id).filter(|_| !whole).collect();
        for (id, token) in self.numbered.iter().filter(|(id, _)| !taken.contains(id)) {
            put(token, Some(*id), self.file, true);
        }
        for token in self.named.iter().map(|(_, token)| token).chain(&self.extra) {
            put(token, None, CONFIG, false);
        }
        merged
    }
}
