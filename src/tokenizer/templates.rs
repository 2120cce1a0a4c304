//! The chat templates of a model, wherever they stand.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::read_json;
use crate::error::{Error, Result};
use crate::text::TextError;

/// The file of the default template.
const JINJA: &str = "chat_template.jinja";

/// The folder of templates beside the default one.
const FOLDER: &str = "additional_chat_templates";

/// Chat templates: the one that is used unless another is asked for, and others by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Templates {
    /// The one called `default`.
    pub default: Option<String>,
    /// The others with their names, such as `tool_use`.
    pub others: Vec<(String, String)>,
    /// The file in which the default one stands; empty where none is.
    pub file: String,
}

impl Templates {
    /// Those of a folder whose tokenizer_config.json is `config`.
    ///
    /// chat_template.jinja and `additional_chat_templates/*.jinja` go before tokenizer_config.json, as in transformers, and
    /// that before chat_template.json, which processors of images have.
    pub(crate) fn of_folder(folder: &Path, config: &Value) -> Result<Templates> {
        let mut found = Templates { default: template_in(&folder.join(JINJA))?, ..Templates::default() };
        let mut file = JINJA.to_owned();
        for (its, path) in template_files(folder)? {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(text) = template_in(&path)? {
                if found.default.is_none() && name == "default" {
                    file = its;
                }
                found.add(name, text);
            }
        }
        if found.default.is_none() {
            file = "tokenizer_config.json".to_owned();
        }
        if found == Templates::default() {
            found = Templates::of_value(&config["chat_template"]);
        }
        if found.default.is_none() {
            found.default = Templates::of_value(&config["chat_template"]).default;
        }
        if found.default.is_none()
            && let Some(json) = read_json(&folder.join("chat_template.json"))?
        {
            file = "chat_template.json".to_owned();
            let processor = Templates::of_value(&json["chat_template"]);
            found.default = processor.default;
            processor.others.into_iter().for_each(|(name, text)| found.add(name, text));
        }
        found.file = if found.default.is_some() { file } else { String::new() };
        Ok(found)
    }

    /// A template, a list of objects with `name` and `template`, or an object of templates by name.
    pub(crate) fn of_value(value: &Value) -> Templates {
        let mut found = Templates::default();
        match value {
            Value::String(text) => found.default = Some(text.clone()),
            Value::Array(list) => {
                for item in list {
                    if let Some((name, text)) = item["name"].as_str().zip(item["template"].as_str()) {
                        found.add(name.to_owned(), text.to_owned());
                    }
                }
            }
            Value::Object(table) => {
                for (name, text) in table {
                    text.as_str().into_iter().for_each(|text| found.add(name.clone(), text.to_owned()));
                }
            }
            _ => {}
        }
        found
    }

    /// The first of a name stays.
    fn add(&mut self, name: String, text: String) {
        if name == "default" {
            self.default.get_or_insert(text);
        } else if !self.others.iter().any(|(other, _)| *other == name) {
            self.others.push((name, text));
        }
    }
}

/// The templates beside the default one of the model in `folder`: their names from there, and their paths.
pub(crate) fn template_files(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    let folder = folder.join(FOLDER);
    if folder.is_dir() {
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder, "list"))? {
            let entry = entry.map_err(Error::io(&folder, "list"))?;
            let (name, path) = (entry.file_name(), entry.path());
            if let Some(name) = name.to_str().filter(|name| name.ends_with(".jinja") && path.is_file()) {
                found.push((format!("{FOLDER}/{name}"), path));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// A template as Python reads a file of text: every kind of line break is `\n`.
fn template_in(path: &Path) -> Result<Option<String>> {
    match std::fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8(bytes).map_err(|error| TextError::Encoding {
                path: path.to_owned(),
                offset: error.utf8_error().valid_up_to(),
            })?;
            Ok(Some(text.replace("\r\n", "\n").replace('\r', "\n")))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path, "read")(error)),
    }
}
