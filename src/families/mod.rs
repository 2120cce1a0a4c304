//! Model families: `config.json` → [`Graph`]. A family is one file and one line here.

mod llama;

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::graph::Graph;

/// A model family.
pub struct Family {
    /// The name in reports.
    pub id: &'static str,
    /// `model_type` values of config.json that it builds.
    pub model_types: &'static [&'static str],
    /// Builds the graph.
    pub build: fn(&Config<'_>) -> Result<Graph>,
}

/// Every family.
pub const FAMILIES: &[Family] = &[llama::LLAMA, llama::MISTRAL];

/// Builds the graph of the model that `config` (config.json) describes. Fails for a family that is not in the list.
pub fn build(config: &Value) -> Result<Graph> {
    let config = Config(config);
    let model_type = config.text("model_type")?;
    match FAMILIES.iter().find(|family| family.model_types.contains(&model_type)) {
        Some(family) => (family.build)(&config),
        None => {
            let known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types.iter().copied()).collect();
            Err(Error::failed(format!(
                "config.json: model_type is `{model_type}`, and only {} are supported",
                known.join(", ")
            )))
        }
    }
}

/// Builds the graph of a checkpoint.
///
/// A stored head that differs from the embedding counts, whatever config.json says of tying: so do runtimes.
pub fn graph_of(source: &Checkpoint) -> Result<Graph> {
    let mut graph = build(source.config()).map_err(|error| match error {
        Error::Failed(why) if why.starts_with("config.json: ") => {
            Error::Failed(format!("{}/{why}", source.path().display()))
        }
        other => other,
    })?;
    if graph.head.tied
        && let Some(head) = source.raw(&graph.head.linear.weight())
        && let Some(embedding) = source.raw(&graph.embedding)
        && (head.dtype, head.data) != (embedding.dtype, embedding.data)
    {
        graph.head.tied = false;
    }
    Ok(graph)
}

/// Typed reads of config.json, with errors that name the key.
pub struct Config<'a>(&'a Value);

impl<'a> Config<'a> {
    /// The value of `key`, unless it is missing or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn wrong(key: &str, expected: &str, found: Option<&Value>) -> Error {
        let found = found.map_or("nothing".to_owned(), |v| v.to_string());
        Error::failed(format!("config.json: {key} must be {expected}, found {found}"))
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<&'a str> {
        self.get(key).and_then(Value::as_str).ok_or_else(|| Self::wrong(key, "a string", self.get(key)))
    }

    /// A count, at least 1.
    pub fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| Self::wrong(key, "a positive number", None))
    }

    /// A count, if it is there.
    pub fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().filter(|n| (1..1 << 32).contains(n)) {
            Some(n) => Ok(Some(n as usize)),
            None => Err(Self::wrong(key, "a positive number", Some(value))),
        }
    }

    /// A number, or `default` when it is missing.
    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().ok_or_else(|| Self::wrong(key, "a number", Some(value)))
    }

    /// A flag, or `default` when it is missing.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| Self::wrong(key, "true or false", Some(value)))
    }

    /// The object under `key`, if it is there.
    pub fn object(&self, key: &str) -> Result<Option<Config<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) if value.is_object() => Ok(Some(Config(value))),
            Some(value) => Err(Self::wrong(key, "an object", Some(value))),
        }
    }
}

/// The positions that a model was made for, if config.json says.
pub fn longest_context(config: &Value) -> Option<usize> {
    config.get("max_position_embeddings")?.as_u64().map(|n| n as usize).filter(|n| *n > 1)
}
