//! What sentence-transformers lays beside a model that gives embeddings: its list of modules, and their settings.

use std::path::Path;

use serde_json::Value;

use super::Checkpoint;
use crate::json::read_json;

impl Checkpoint {
    /// Whether sentence-transformers is what runs the model: it is described for it, or scores texts by one number, as rerankers do.
    pub fn is_for_sentences(&self) -> bool {
        let described =
            ["modules.json", "config_sentence_transformers.json"].iter().any(|name| self.path().join(name).is_file());
        let config = self.config();
        let class = config["architectures"][0].as_str().unwrap_or_default();
        let labels = config["id2label"].as_object().map(serde_json::Map::len);
        let one = labels.map_or(config["num_labels"] == 1, |labels| labels == 1);
        described || one && class.ends_with("ForSequenceClassification")
    }
}

/// The modules after the model: their folders as the list names them, and what they do. Empty where there is no valid list.
pub(crate) fn modules(folder: &Path) -> Vec<(String, String)> {
    let Ok(Some(Value::Array(list))) = read_json(&folder.join("modules.json")) else { return Vec::new() };
    let module = |item: &Value| {
        let path = item["path"].as_str().filter(|path| !path.is_empty())?;
        Some((path.to_owned(), item["type"].as_str().unwrap_or_default().to_owned()))
    };
    list.iter().filter_map(module).collect()
}

/// What to say of a modules.json that is valid JSON, and no list of modules.
pub(super) fn no_modules(path: &Path, found: &Value) -> Option<String> {
    let is_module = |item: &Value| item["path"].is_string() && item["type"].is_string();
    let is_list = found.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(is_module));
    (!is_list).then(|| {
        format!(
            "{}: not a list of modules, each with a path and a type: nothing is made of hidden states by it here; the file goes along as it is, and \
             what reads it will fail or do without; fetch it again, or remove it where the model makes no embeddings",
            path.display()
        )
    })
}

/// Ways to make an embedding of hidden states that llama.cpp has, and its number of each.
const POOLINGS: &[(&str, u32)] = &[("mean_tokens", 1), ("mean", 1), ("cls_token", 2), ("cls", 2), ("lasttoken", 3)];

/// The settings of the module that makes an embedding of hidden states, if there is one.
fn of_pooling(folder: &Path) -> Option<serde_json::Map<String, Value>> {
    // Only what lies in a folder right beside the model.
    let own = |path: &str| Path::new(path).file_name().is_some_and(|name| name == path) && folder.join(path).is_dir();
    let module = modules(folder).into_iter().find(|(path, kind)| kind.ends_with("Pooling") && own(path));
    let config = module.and_then(|(module, _)| read_json(&folder.join(module).join("config.json")).ok()?);
    match config {
        Some(Value::Object(config)) => Some(config),
        _ => None,
    }
}

/// What the modules say of how hidden states become an embedding, all ways that are put together; nothing where they say nothing.
fn ways(folder: &Path) -> Vec<String> {
    of_pooling(folder).map_or(Vec::new(), |config| ways_of(&config))
}

/// The same of the settings of the module that does it: a flag for each way, or their names.
pub(super) fn ways_of(config: &serde_json::Map<String, Value>) -> Vec<String> {
    let flags = config.iter().filter(|(_, value)| **value == true);
    let mut ways: Vec<String> =
        flags.filter_map(|(key, _)| key.strip_prefix("pooling_mode_").map(str::to_owned)).collect();
    if ways.is_empty() {
        let named = match config.get("pooling_mode") {
            Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
            one => one.and_then(Value::as_str).into_iter().collect::<Vec<_>>(),
        };
        ways.extend(named.into_iter().map(str::to_owned));
    }
    ways
}

/// How hidden states become an embedding, as llama.cpp numbers it: by their mean, the first or the last. `None` for what it does not have.
pub fn pooling(folder: &Path) -> Option<u32> {
    let [one] = &ways(folder)[..] else { return None };
    POOLINGS.iter().find(|(name, _)| name == one).map(|(_, number)| *number)
}

/// What to say of modules that a GGUF file cannot hold: layers behind the model, and ways to make an embedding that llama.cpp does not have.
pub fn lost_in_gguf(folder: &Path) -> Vec<String> {
    let list = folder.join("modules.json");
    let said = read_json(&list).ok().flatten();
    let mut notes: Vec<String> = said.and_then(|said| no_modules(&list, &said)).into_iter().collect();
    let ways = ways(folder);
    if !ways.is_empty() && pooling(folder).is_none() {
        notes.push(format!(
            "modules.json makes an embedding of hidden states by {}, which llama.cpp does not have (mean, cls and lasttoken, each by itself): the \
             file does not say how, and embeddings made with it are others",
            ways.join(" and ")
        ));
    }
    if of_pooling(folder).is_some_and(|config| config.get("include_prompt") == Some(&Value::Bool(false))) {
        notes.push(
            "the pooling module leaves the prompt out (include_prompt is false), and llama.cpp pools over the prompt too: embeddings of texts with a \
             prompt are others"
                .to_owned(),
        );
    }
    // Lengths are made equal by llama.cpp's own programs, and nothing is dropped when nobody trains.
    let done = ["Transformer", "Pooling", "Normalize", "Dropout"];
    let layers: Vec<String> = modules(folder)
        .into_iter()
        .filter(|(_, kind)| !done.iter().any(|known| kind.ends_with(known)))
        .map(|(path, kind)| format!("{path} ({})", kind.rsplit('.').next().unwrap_or_default()))
        .collect();
    if !layers.is_empty() {
        notes.push(format!(
            "modules.json has layers behind the model that the file does not hold: {}; embeddings made with it are those before them",
            layers.join(", ")
        ));
    }
    notes
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
        for (settings, told) in
            [("", false), (r#", "include_prompt": false"#, true), (r#", "include_prompt": true"#, false)]
        {
            write("1_Pooling/config.json", &format!(r#"{{"pooling_mode": "mean"{settings}}}"#));
            let found = lost_in_gguf(&folder).iter().any(|note| note.contains("include_prompt is false"));
            assert_eq!(found, told, "{settings}");
        }
        assert_eq!(pooling(&folder), Some(1));
        write(
            "modules.json",
            r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#,
        );
        // Two at once are put one behind the other, which is no way of llama.cpp's; nor is the largest.
        for (config, says) in [
            (r#"{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}"#, "mean_tokens and cls_token"),
            (r#"{"pooling_mode_max_tokens": true}"#, "max_tokens"),
        ] {
            write("1_Pooling/config.json", config);
            let notes = lost_in_gguf(&folder);
            assert_eq!((pooling(&folder), notes.len()), (None, 1));
            assert!(notes[0].contains(says), "{notes:?}");
        }
        write("1_Pooling/config.json", r#"{"pooling_mode": "cls"}"#);
        assert_eq!((pooling(&folder), lost_in_gguf(&folder).len()), (Some(2), 0));
        write(
            "modules.json",
            r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
                {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"}]"#,
        );
        let notes = lost_in_gguf(&folder);
        assert!(
            notes.len() == 1 && notes[0].contains("2_Dense (Dense)") && !notes[0].contains("Normalize"),
            "{notes:?}"
        );
        write("modules.json", "[");
        assert_eq!((pooling(&folder), lost_in_gguf(&folder).len()), (None, 0));
        for none in ["{}", "[]", "7", "[{}]", r#"[{"path": "", "type": 3}]"#] {
            write("modules.json", none);
            let notes = lost_in_gguf(&folder);
            assert!(notes.len() == 1 && notes[0].contains("modules.json: not a list of modules"), "{none}: {notes:?}");
        }
    }
}
