//! What a GGUF file says of what chooses the tokens that attention sees.

use formats::container::gguf::{GGUFValueType, MetadataValue};

use super::{Layers, Written, metadata_array};
use crate::error::Result;
use crate::graph::{Block, Graph};

/// How much indexers choose, and which layers have one.
///
/// A notice says where llama.cpp sees more than was chosen of a text of up to `context` tokens.
pub(super) fn settings(
    out: &mut Written,
    graph: &Graph,
    layers: &Layers<'_>,
    context: usize,
    id: &'static str,
) -> Result<()> {
    let key = |name: &str| format!("{id}.attention.indexer.{name}");
    // DeepSeek V4's stand among its other keys.
    let first = layers.attention.iter().find_map(|attention| attention.choice.as_ref());
    let Some(choice) = first.filter(|_| id != "deepseek4") else { return Ok(()) };
    let shape = choice.shape();
    out.count(key("head_count"), shape.heads)?;
    out.count(key("key_length"), shape.head_dim)?;
    // Of blocks, beside the one that is not whole yet.
    let whole = shape.count - usize::from(shape.pooled);
    out.count(key("top_k"), if shape.pooled { whole * shape.block } else { whole })?;
    match id {
        "glm5-next" => {
            out.count(key("kpool"), shape.block)?;
            out.flag(key("kpool_select_tail"), true);
        }
        "minimax-m3" => {
            out.count(key("block_size"), shape.block)?;
            out.count(key("local_blocks"), shape.local)?;
        }
        "qwen4exp" => {
            let of = |block: &Block| block.attention().map_or(0, |_| shape.block);
            out.counts(format!("{id}.attention.compress_ratios"), graph.blocks.iter().map(of))?;
            // It fills up with tokens of another block what the one that is not whole yet leaves of the room for it.
            let all = shape.count * shape.block - 1;
            if shape.block > 1 && all < context {
                out.notice(format!(
                    "beyond {all} tokens llama.cpp lets attention see up to {} tokens more than its indexer chose: logits differ a little from the \
                     original's",
                    shape.block - 1
                ));
            }
        }
        _ => {}
    }
    if matches!(id, "glm-dsa" | "hy_v4" | "glm5-next") {
        let own = |block: &Block| block.attention().is_none_or(|attention| attention.indexer().is_some());
        let own = graph.trunk().iter().map(|block| MetadataValue::Bool(own(block)));
        out.metadata.push((key("types"), metadata_array(own.collect(), GGUFValueType::Bool)?));
    }
    Ok(())
}
