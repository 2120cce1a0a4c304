//! What sentence-transformers lays beside a model that gives embeddings: its list of modules, and their settings.

use std::path::Path;

use serde_json::Value;

use crate::json::read_json;

/// The modules after the model: their folders as the list names them, and what they do. Empty where there is no valid list.
pub(crate) fn modules(folder: &Path) -> Vec<(String, String)> {
    let Ok(Some(Value::Array(list))) = read_json(&folder.join("modules.json")) else { return Vec::new() };
    let module = |item: &Value| {
        let path = item["path"].as_str().filter(|path| !path.is_empty())?;
        Some((path.to_owned(), item["type"].as_str().unwrap_or_default().to_owned()))
    };
    list.iter().filter_map(module).collect()
}

/// How hidden states become an embedding, as llama.cpp numbers it: by their mean, the first or the last.
pub fn pooling(folder: &Path) -> Option<u32> {
    // Only what lies in a folder right beside the model.
    let own = |path: &str| Path::new(path).file_name().is_some_and(|name| name == path) && folder.join(path).is_dir();
    let (module, _) = modules(folder).into_iter().find(|(path, kind)| kind.ends_with("Pooling") && own(path))?;
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
    fn pooling_is_what_the_modules_beside_the_model_say_and_nothing_beyond_the_folder() {
        let room = tempfile::tempdir().unwrap();
        let folder = room.path().join("model");
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("weights.txt", "");
        write("../secret/config.json", "{}");
        assert_eq!(pooling(&folder), None);
        write(
            "modules.json",
            r#"[{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling", "type":
                "sentence_transformers.models.Pooling"}, {"path": "../secret", "type": "x"}, {"path": "gone"}]"#,
        );
        write("1_Pooling/config.json", r#"{"pooling_mode_cls_token": false, "pooling_mode_lasttoken": true}"#);
        assert_eq!(pooling(&folder), Some(3));
        write("1_Pooling/config.json", r#"{"pooling_mode": "mean"}"#);
        assert_eq!(pooling(&folder), Some(1));
        write("modules.json", "[");
        assert_eq!(pooling(&folder), None);
    }
}
