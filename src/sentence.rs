//! What sentence-transformers lays beside a model that gives embeddings: its list of modules, their settings, and small
//! weights of their own that go over untouched.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::read_json;
use crate::error::{Error, Result};

/// Files in the model's own folder.
const FILES: &[&str] = &["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"];

/// The modules after the model: folders beside it, and what they do. Empty where there is no valid list.
fn modules(folder: &Path) -> Vec<(String, String)> {
    let Ok(Some(Value::Array(list))) = read_json(&folder.join("modules.json")) else { return Vec::new() };
    let module = |item: &Value| {
        let (path, kind) = (item["path"].as_str()?, item["type"].as_str().unwrap_or_default());
        // Only what lies in a folder right beside the model.
        let own = Path::new(path).file_name().is_some_and(|name| name == path);
        (own && folder.join(path).is_dir()).then(|| (path.to_owned(), kind.to_owned()))
    };
    list.iter().filter_map(module).collect()
}

/// Its files, by their names below the model's folder.
pub fn files(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found: Vec<(String, PathBuf)> = FILES.iter().map(|name| ((*name).to_owned(), folder.join(name))).collect();
    for (module, _) in modules(folder) {
        let place = folder.join(&module);
        for entry in std::fs::read_dir(&place).map_err(Error::io(&place, "list"))? {
            let entry = entry.map_err(Error::io(&place, "list"))?;
            if let Ok(name) = entry.file_name().into_string() {
                found.push((format!("{module}/{name}"), entry.path()));
            }
        }
    }
    found.retain(|(_, path)| path.is_file());
    found.sort();
    Ok(found)
}

/// How hidden states become an embedding, as llama.cpp numbers it: by their mean, the first or the last.
pub fn pooling(folder: &Path) -> Option<u32> {
    let (module, _) = modules(folder).into_iter().find(|(_, kind)| kind.ends_with("Pooling"))?;
    let config = read_json(&folder.join(module).join("config.json")).ok()??;
    let says = |mode: &str| config[format!("pooling_mode_{mode}")] == true;
    let modes = [("mean_tokens", 1), ("cls_token", 2), ("lasttoken", 3)];
    let newer = |name: &str| config["pooling_mode"] == name;
    modes.into_iter().find(|(mode, _)| says(mode)).map(|(_, number)| number).or_else(|| {
        [("mean", 1), ("cls", 2), ("lasttoken", 3)].into_iter().find(|(mode, _)| newer(mode)).map(|(_, number)| number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_its_modules_are_found_and_nothing_beyond_the_folder() {
        let room = tempfile::tempdir().unwrap();
        let folder = room.path().join("model");
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("weights.txt", "");
        write("../secret/config.json", "{}");
        assert_eq!((files(&folder).unwrap(), pooling(&folder)), (vec![], None));
        write(
            "modules.json",
            r#"[{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling", "type":
                "sentence_transformers.models.Pooling"}, {"path": "../secret", "type": "x"}, {"path": "gone"}]"#,
        );
        write("1_Pooling/config.json", r#"{"pooling_mode_cls_token": false, "pooling_mode_lasttoken": true}"#);
        let names: Vec<String> = files(&folder).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["1_Pooling/config.json", "modules.json"]);
        assert_eq!(pooling(&folder), Some(3));
        write("1_Pooling/config.json", r#"{"pooling_mode": "mean"}"#);
        assert_eq!(pooling(&folder), Some(1));
        write("modules.json", "[");
        assert_eq!(pooling(&folder), None);
    }
}
