//! The chat templates of a model, wherever they stand.

use std::path::{Path, PathBuf};

use formats::container::file;
use serde_json::Value;

use super::TextError;
use crate::error::{Error, Result};
use crate::tokenizer::added::CONFIG;

/// The folder of templates beside the default one.
const FOLDER: &str = "additional_chat_templates";

/// Chat templates: the one that is used unless another is asked for, and others by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Templates {
    /// The one called `default`.
    pub default: Option<String>,
    /// The others with their names, such as `tool_use`.
    pub others: Vec<(String, String)>,
    /// Where each stands, by its name: a file within the folder, and the key in it.
    pub(crate) places: Vec<(String, String)>,
    /// What of the files is no template, each a sentence that begins with the file's name.
    pub(crate) notices: Vec<String>,
}

/// The name of the one that is used unless another is asked for.
pub(crate) const DEFAULT: &str = "default";
const PLAIN_FILE: &str = "chat_template.jinja";
const PROCESSOR_FILE: &str = "chat_template.json";

impl Templates {
    /// Those of a folder whose tokenizer_config.json is `config`.
    ///
    /// chat_template.jinja and `additional_chat_templates/*.jinja` go before tokenizer_config.json, as in transformers, and
    /// that before chat_template.json, which processors of images have.
    pub(crate) fn of_folder(folder: &Path, config: &Value) -> Result<Templates> {
        let mut found = Templates::default();
        if let Some(text) = template_in(&folder.join(PLAIN_FILE))? {
            found.add(DEFAULT.to_owned(), text, PLAIN_FILE);
        }
        for (file, path) in template_files(folder)? {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(text) = template_in(&path)? {
                found.add(name, text, &file);
            }
        }
        let of_config = Templates::of_value(&config["chat_template"], CONFIG);
        if found == Templates::default() {
            found = of_config;
        } else {
            found.notices.extend(of_config.notices);
            of_config.default.into_iter().for_each(|text| found.add(DEFAULT.to_owned(), text, CONFIG));
        }
        if found.default.is_none()
            && let Some(json) = super::read_words(&folder.join(PROCESSOR_FILE))?
        {
            let processor = Templates::of_value(&json["chat_template"], PROCESSOR_FILE);
            found.notices.extend(processor.notices);
            if json["chat_template"].is_null() {
                let notice = "has no `chat_template`, and no processor of transformers loads with such a file";
                found.notices.push(format!("{PROCESSOR_FILE} {notice}"));
            }
            let default = processor.default.map(|text| (DEFAULT.to_owned(), text));
            default.into_iter().chain(processor.others).for_each(|(name, text)| found.add(name, text, PROCESSOR_FILE));
        }
        Ok(found)
    }

    /// Where the template of this name stands.
    pub(crate) fn place(&self, name: &str) -> &str {
        self.places.iter().find(|(other, _)| other == name).map_or("", |(_, place)| place)
    }

    /// What to say of templates of which none is the default.
    pub(crate) fn without_default(&self) -> String {
        let names: Vec<String> = self.others.iter().map(|(name, _)| format!("`{name}`")).collect();
        format!(
            "the model's chat templates are called {} and none of them `default`, without which transformers refuses conversations",
            names.join(", ")
        )
    }

    /// Whether there are templates and none is the default.
    pub(crate) fn lacks_default(&self) -> bool {
        self.default.is_none() && !self.others.is_empty()
    }

    /// A template, a list of objects with `name` and `template`, or an object of templates by name.
    pub(crate) fn of_value(value: &Value, file: &str) -> Templates {
        let mut found = Templates::default();
        match value {
            Value::String(text) => found.add(DEFAULT.to_owned(), text.clone(), file),
            Value::Array(list) => {
                for item in list {
                    match item["name"].as_str().zip(item["template"].as_str()) {
                        Some((name, text)) => found.add(name.to_owned(), text.to_owned(), file),
                        None => found.no_template(item, file),
                    }
                }
            }
            Value::Object(table) => {
                for (name, text) in table {
                    match text.as_str() {
                        Some(text) => found.add(name.clone(), text.to_owned(), file),
                        None => found.no_template(text, file),
                    }
                }
            }
            Value::Null => {}
            other => found.no_template(other, file),
        }
        found
    }

    fn no_template(&mut self, value: &Value, file: &str) {
        let shown: String = value.to_string().chars().take(60).collect();
        let notice = format!("{file}: chat_template holds {shown}, which is no template and was left out");
        if !self.notices.iter().any(|known| known.starts_with(file)) {
            self.notices.push(notice);
        }
    }

    /// The first of a name stays.
    fn add(&mut self, name: String, text: String, file: &str) {
        if self.places.iter().any(|(other, _)| *other == name) {
            return;
        }
        self.places.push((name.clone(), file.to_owned()));
        match &name[..] {
            DEFAULT => self.default = Some(text),
            _ => self.others.push((name, text)),
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
    match file::read(path, file::DESCRIPTION) {
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
