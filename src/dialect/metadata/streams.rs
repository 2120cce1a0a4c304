//! Keys of models whose stream is several hidden states wide.

use formats::container::gguf::{GGUFValueType, MetadataValue};
use kernels::Activation;

use super::{Layers, Written, metadata_array};
use crate::error::Result;
use crate::graph::Graph;

/// How many streams there are and how their weights are made, and what the activation of routed experts is limited to.
pub(super) fn settings(out: &mut Written, graph: &Graph, layers: &Layers<'_>, id: &str) -> Result<()> {
    let hyper = graph.blocks.iter().flat_map(|block| &block.steps).find_map(|step| step.hyper.as_ref()?.hyper());
    let Some(hyper) = hyper else { return Ok(()) };
    let key = |name: &str| format!("{id}.hyper_connection.{name}");
    out.count(key("count"), hyper.shape.streams)?;
    out.float(key("epsilon"), hyper.shape.eps);
    // llama.cpp's class of DeepSeek V4 has this one built in.
    if let Some([magnitude, _]) = hyper.shape.writes.filter(|_| id != "deepseek4") {
        out.float(key("magnitude"), magnitude);
    }
    let activation = layers.sparse.first().and_then(|moe| moe.experts.first()).map(|expert| expert.activation);
    if let Some(Activation::SwigluOai { limit, shift: 0.0, .. }) = activation {
        let limits = vec![MetadataValue::F32(limit); graph.blocks.len()];
        out.metadata.push((format!("{id}.swiglu_clamp_exp"), metadata_array(limits, GGUFValueType::F32)?));
    }
    Ok(())
}
