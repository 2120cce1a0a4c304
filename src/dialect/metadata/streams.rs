//! Keys of models whose stream is several hidden states wide, and of tables for tokens in a row.

use formats::container::gguf::{GGUFValueType, MetadataValue};
use kernels::Activation;
use serde_json::Value;

use super::{Layers, Written, metadata_array};
use crate::error::Result;
use crate::graph::{Connection, Graph, Layer};
use crate::json::integer;

/// How many streams there are and how their weights are made, and what the activation of routed experts is limited to.
pub(super) fn settings(out: &mut Written, graph: &Graph, layers: &Layers<'_>, id: &str) -> Result<()> {
    let connection = graph.blocks.iter().flat_map(|block| &block.steps).find_map(|step| step.hyper.as_deref());
    let Some(connection) = connection else { return Ok(()) };
    let key = |name: &str| format!("{id}.hyper_connection.{name}");
    out.count(key("count"), connection.streams())?;
    let hyper = match connection {
        Connection::Weighed(hyper) => hyper,
        Connection::Gated(gated) => return out.count(key("low_rank"), gated.mix[0].rows),
    };
    out.float(key("epsilon"), hyper.shape.eps);
    match hyper.shape.writes {
        Some([magnitude, _]) if hyper.shape.rounds == 0 => out.float(key("magnitude"), magnitude),
        _ => out.count(key("sinkhorn_iterations"), hyper.shape.rounds)?,
    }
    let pooled = layers.attention.iter().find_map(|attention| attention.indexer()).filter(|i| i.pool.is_some());
    if let Some(indexer) = pooled.filter(|_| id == "glm5-next") {
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

/// By what rows of the table for tokens in a row are found.
pub(super) fn grams(out: &mut Written, graph: &Graph, config: &Value, id: &str) -> Result<()> {
    let layers = graph.blocks.iter().enumerate();
    let found = layers.flat_map(|(at, block)| block.steps.iter().map(move |step| (at, &step.layer)));
    let Some((at, layer)) = { found }.find_map(|(at, layer)| match layer {
        Layer::Grams(layer) => Some((at, layer)),
        _ => None,
    }) else {
        return Ok(());
    };
    let key = |name: &str| format!("{id}.ple.{name}");
    let (grams, order) = (&layer.grams, layer.grams.multipliers.len());
    out.counts(key("layers"), std::iter::once(at))?;
    out.count(key("ngram_size"), order)?;
    out.count(key("heads_per_ngram"), grams.sizes.len() / (order - 1))?;
    out.count(key("conv_kernel"), layer.convolution.taps)?;
    out.count(key("eos_token_id"), grams.end as usize)?;
    if let Some(image) = config.get("image_token_id").and_then(integer) {
        // It stands for what is no token.
        out.count(key("image_token_id"), usize::try_from(image).unwrap_or(0))?;
    }
    out.count(format!("{id}.embedding_length_per_layer_input"), grams.cols)?;
    let offsets = grams.sizes.iter().scan(0, |next, size| Some(std::mem::replace(next, *next + size)));
    let lists: [(&str, Vec<u64>); 3] = [
        ("layer_multipliers", grams.multipliers.iter().map(|by| *by as u64).collect()),
        ("head_offsets", offsets.map(|first| first as u64).collect()),
        ("head_vocab_sizes", grams.sizes.iter().map(|size| *size as u64).collect()),
    ];
    for (name, values) in lists {
        let values = values.into_iter().map(MetadataValue::U64).collect();
        out.metadata.push((key(name), metadata_array(values, GGUFValueType::U64)?));
    }
    Ok(())
}
