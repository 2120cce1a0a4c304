//! What a GGUF file says of how far attention sees.

use formats::container::gguf::{GGUFValueType, MetadataValue};

use super::{Written, metadata_array, names};
use crate::dialect::architectures::Architecture;
use crate::error::Result;
use crate::graph::{Attention, Graph};

/// The window, which layers have one, and whether attention sees what comes after a token.
///
/// A notice says where llama.cpp would see more of a text of up to `context` tokens. Fails where it has no attention of this kind.
pub(super) fn settings(
    out: &mut Written,
    graph: &Graph,
    attention: &[&Attention],
    architecture: &Architecture,
    context: usize,
) -> Result<()> {
    let id = architecture.id;
    let key = |name: &str| format!("{id}.attention.{name}");
    let windows: Vec<Option<usize>> = attention.iter().map(|a| a.shape.window.or(a.shape.chunk)).collect();
    let window = windows.iter().flatten().min().copied();
    if let Some(window) = window.filter(|window| *window < context && !architecture.windows) {
        out.notice(format!(
            "llama.cpp ignores the sliding window of {window} tokens for this architecture: beyond {window} tokens the model attends to more than it was trained with"
        ));
    }
    if id == "gemma-embedding" && window.is_none_or(|window| window < 2) {
        return Err(names::cannot(id, "attention both ways without a window"));
    }
    if architecture.windows {
        // Only where there are windows: their absence is how the largest models are told from the others.
        if let Some(window) = window.filter(|_| id != "llama4") {
            // There it counts tokens on both sides together, and not the one that sees them.
            let both = if id == "gemma-embedding" { 2 * (window - 1) } else { window };
            out.count(key("sliding_window"), both)?;
            // All layers of DeepSeek V4 have one.
            if id != "deepseek4" {
                let flags = windows.iter().map(|window| MetadataValue::Bool(window.is_some())).collect();
                let flags = metadata_array(flags, GGUFValueType::Bool)?;
                out.metadata.push((key("sliding_window_pattern"), flags));
            }
        } else if id == "llama4" && window.is_none() {
            out.count(key("sliding_window"), 0)?;
        }
    }
    if graph.sees_both_ways() && id != "gemma-embedding" {
        if window.is_some() {
            return Err(names::cannot(id, "attention both ways within a window"));
        }
        out.metadata.push((key("causal"), MetadataValue::Bool(false)));
    }
    Ok(())
}
