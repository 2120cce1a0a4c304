//! What transformers 5 knows of the settings of a model type: `defaults.json`, made from its configuration classes.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::{Map, Value};

/// What transformers knows of a model type.
#[derive(serde::Deserialize)]
pub(super) struct Class {
    pub(super) defaults: Map<String, Value>,
    /// Those that may be null.
    pub(super) nullable: Vec<String>,
    /// A setting and the keys that stand for it, of which the last wins.
    pub(super) spellings: Vec<Vec<String>>,
}

pub(super) static CLASSES: LazyLock<HashMap<String, Class>> =
    LazyLock::new(|| serde_json::from_str(include_str!("defaults.json")).expect("a committed file"));

/// Settings that shapes of tensors follow from.
pub(super) const SIZES: &[&str] = &[
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_embd",
    "n_layer",
    "n_head",
];

/// The class that reads a model type; some types of wrappers are those of their text too.
pub(super) fn class_of(model_type: &str) -> &str {
    match model_type {
        "qwen2_vl" => "qwen2_vl_text",
        "qwen2_5_vl" => "qwen2_5_vl_text",
        "kimi_k2" => "deepseek_v3",
        "mimo" => "qwen2",
        other => other,
    }
}
