//! Settings of architectures whose layers differ in the width of heads and feed-forward layers, and read what others leave.

use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};

use super::{Layers, Written};
use crate::dialect::names;
use crate::error::Result;
use crate::graph::{Attention, Graph, Keys, Layer, PerLayer};

/// The attention whose heads stand for all where only one kind is asked for: that of layers that see all.
pub(super) fn first<'g>(attention: &[&'g Attention]) -> Option<&'g Attention> {
    attention.iter().find(|attention| attention.shape.window.is_none()).copied()
}

/// Widths of feed-forward layers, those beside experts too.
pub(super) fn widths(graph: &Graph) -> Vec<usize> {
    let steps = graph.blocks.iter().flat_map(|block| &block.steps);
    let width = |layer: &Layer| match layer {
        Layer::Mlp(mlp) => Some(mlp.inner()),
        Layer::Moe(moe) => moe.shared.as_ref().map(|(shared, _)| shared.inner()),
        _ => None,
    };
    steps.filter_map(|step| width(&step.layer)).collect()
}

impl Written {
    /// A count for each layer, or one where it is the same for all.
    pub(super) fn counts_or_one(&mut self, key: String, values: &[usize]) -> Result<()> {
        match values {
            [first, rest @ ..] if rest.iter().all(|other| other == first) => self.count(key, *first),
            _ => self.counts(key, values.iter().copied()),
        }
    }
}

/// Heads of both kinds of layers, what layers share, and what each is given of the tokens.
///
/// Fails where no layer has a window, whose heads llama.cpp asks for.
pub(super) fn settings(out: &mut Written, graph: &Graph, layers: &Layers<'_>, id: &'static str) -> Result<()> {
    let key = |name: &str| format!("{id}.{name}");
    let Some(near) = layers.attention.iter().find(|attention| attention.shape.window.is_some()) else {
        return Err(names::cannot(id, "a model whose layers all see the whole text"));
    };
    out.count(key("attention.key_length_swa"), near.shape.head_dim)?;
    out.count(key("attention.value_length_swa"), near.shape.value_dim)?;
    let rotated = near.rope.as_ref().map_or(0, |rope| 2 * rope.inverse_frequencies.len());
    out.count(key("rope.dimension_count_swa"), rotated)?;
    shared(out, graph, layers, id)
}

/// What layers share, and what each is given of the tokens.
pub(super) fn shared(out: &mut Written, graph: &Graph, layers: &Layers<'_>, id: &'static str) -> Result<()> {
    let key = |name: &str| format!("{id}.{name}");
    let shared = layers.attention.iter().filter(|attention| matches!(attention.keys, Keys::Of(_))).count();
    out.count(key("attention.shared_kv_layers"), shared)?;
    let width = graph.blocks.iter().flat_map(|block| &block.steps).find_map(|step| match &step.layer {
        Layer::PerLayer(layer) => {
            let PerLayer { out, .. } = &**layer;
            Some(out.cols)
        }
        _ => None,
    });
    out.count(key("embedding_length_per_layer_input"), width.unwrap_or(0))
}

/// How many streams there are, the one that blocks work on, and by how many standard deviations a value of a gate has to be above their mean.
pub(super) fn streams(out: &mut Written, graph: &Graph, layers: &Layers<'_>, id: &'static str) -> Result<()> {
    let key = |name: &str| format!("{id}.{name}");
    if let Some(altup) = graph.blocks.iter().find_map(|block| block.altup.as_deref()) {
        out.count(key("altup.num_inputs"), altup.count)?;
        out.count(key("altup.active_idx"), altup.active)?;
    }
    // Where all of a gate counts this is where a normal distribution begins.
    let above = layers.dense.iter().map(|mlp| MetadataValue::F32(mlp.cut.unwrap_or(f32::NEG_INFINITY)));
    out.metadata.push((key("activation_sparsity_scale"), metadata_array(above.collect(), GGUFValueType::F32)?));
    Ok(())
}
