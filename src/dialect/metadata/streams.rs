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
    match hyper.shape.writes {
        Some([magnitude, _]) if hyper.shape.rounds == 0 => out.float(key("magnitude"), magnitude),
        _ => out.count(key("sinkhorn_iterations"), hyper.shape.rounds)?,
    }
    if let Some(indexer) =
        layers.attention.iter().find_map(|attention| attention.indexer()).filter(|i| i.pool.is_some())
    {
        out.float(format!("{id}.attention.layer_norm_epsilon"), indexer.k_norm.eps);
    }
    let mixture = layers.sparse.first();
    let activation = mixture.and_then(|moe| moe.experts.first()).map(|expert| expert.activation);
    let shared = mixture.and_then(|moe| moe.shared.as_ref()).map(|(shared, _)| shared.activation);
    if let Some(Activation::SwigluOai { limit, shift: 0.0, .. }) = activation {
        let limits = vec![MetadataValue::F32(limit); graph.blocks.len()];
        let names: &[&str] =
            if shared == activation { &["swiglu_clamp_exp", "swiglu_clamp_shexp"] } else { &["swiglu_clamp_exp"] };
        for name in names {
            out.metadata.push((format!("{id}.{name}"), metadata_array(limits.clone(), GGUFValueType::F32)?));
        }
    }
    Ok(())
}
