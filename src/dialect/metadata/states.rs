//! What a GGUF file says of layers that have a state in place of attention.

use formats::container::gguf::{GGUFValueType, MetadataValue, metadata_array};

use super::{Layers, Written};
use crate::dialect::names;
use crate::error::Result;
use crate::graph::{Graph, Layer};

/// Sizes of linear attention, of state spaces and of short convolutions, and which layers have them.
pub(super) fn recurrent(out: &mut Written, graph: &Graph, layers: &Layers<'_>, id: &'static str) -> Result<()> {
    let key = |name: &str| format!("{id}.{name}");
    if let Some(convolution) = layers.short.first() {
        out.count(key("shortconv.l_cache"), convolution.taps)?;
    } else if id.starts_with("lfm2") {
        return Err(names::cannot(id, "a model without short convolutions"));
    }
    let Some((shape, convolution)) = layers.recurrent.first() else { return Ok(()) };
    out.count(key("ssm.conv_kernel"), convolution.taps)?;
    if matches!(id, "kimi-linear" | "bailingmoe3" | "glm5-next") {
        let heads = [shape.value_heads, layers.first.shape.heads];
        if heads[0] != heads[1] {
            let what = format!("{} heads of linear attention beside {} of attention", heads[0], heads[1]);
            return Err(names::cannot(id, what));
        }
        let bound = graph.blocks.iter().flat_map(|block| &block.steps).find_map(|step| match &step.layer {
            Layer::Delta(delta) => delta.decay.lower,
            _ => None,
        });
        if let Some(bound) = bound {
            if id == "bailingmoe3" {
                out.flag(key("kda.safe_gate"), true);
            }
            out.float(key("kda.gate_lower_bound"), bound);
        }
        return out.count(key("kda.head_dim"), shape.key_dim);
    }
    out.count(key("ssm.inner_size"), shape.value_heads * shape.value_dim)?;
    out.count(key("ssm.state_size"), shape.key_dim)?;
    out.count(key("ssm.time_step_rank"), shape.value_heads)?;
    out.count(key("ssm.group_count"), shape.key_heads)?;
    if !shape.replaces {
        if let Some(least) = shortest_step(graph).filter(|least| *least > 0.0) {
            out.notice(format!(
                "llama.cpp takes steps of state spaces that are shorter than {least}, which transformers does not: logits differ a little \
                 from the original's"
            ));
        }
        return Ok(());
    }
    let flags: Vec<bool> = graph.blocks.iter().map(|block| block.attention().is_none()).collect();
    let own = &flags[..graph.trunk().len()];
    let fits = |every: &usize| own.iter().enumerate().all(|(at, flag)| *flag != (at + 1).is_multiple_of(*every));
    match (1..=own.len()).find(fits) {
        Some(every) => out.count(key("full_attention_interval"), every)?,
        // Which only later versions of llama.cpp read.
        None => {
            let flags = flags.into_iter().map(MetadataValue::Bool).collect();
            out.metadata.push((key("attention.recurrent_layers"), metadata_array(flags, GGUFValueType::Bool)?));
        }
    }
    Ok(())
}

/// The shortest step of state spaces.
fn shortest_step(graph: &Graph) -> Option<f32> {
    graph.blocks.iter().flat_map(|block| &block.steps).find_map(|step| match &step.layer {
        Layer::Mamba(mamba) => Some(mamba.decay.limits[0]),
        _ => None,
    })
}
