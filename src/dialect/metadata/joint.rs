//! Keys of DeepSeek V4.

use super::{Layers, Written, names};
use crate::error::Result;
use crate::graph::{Attention, Graph, Projections, Rope, RopeScaling, Scoring};

/// The base of positions in layers of which a model has none.
const USUAL: [f32; 2] = [10_000.0, 160_000.0];

/// What layers see, how wide their projections are, how experts are chosen and how streams are mixed.
pub(super) fn settings(out: &mut Written, graph: &Graph, layers: &Layers<'_>, id: &'static str) -> Result<()> {
    let key = |name: &str| format!("{id}.{name}");
    let Projections::Joint(joint) = &layers.first.projections else { return Ok(()) };
    out.count(key("attention.q_lora_rank"), joint.q[0].rows)?;
    let groups = joint.narrow.split.parts();
    out.count(key("attention.output_group_count"), groups)?;
    out.count(key("attention.output_lora_rank"), joint.narrow.rows / groups)?;
    let blocks = layers.attention.iter().map(|attention| attention.beside.as_ref().map_or(0, |beside| beside.block));
    let blocks: Vec<usize> = blocks.collect();
    if let Some(none) = names::joint::BLOCKS.iter().find(|block| !blocks.contains(block)) {
        return Err(names::cannot(
            id,
            format!("a model in which no layer has entries for {none} tokens, over which llama.cpp stumbles,"),
        ));
    }
    out.counts(key("attention.compress_ratios"), blocks.into_iter())?;
    out.float(key("attention.compress_rope_freq_base"), rope_of(&layers.attention, true).map_or(USUAL[1], |r| r.theta));
    // They are asked for in any case.
    let shape = layers.attention.iter().find_map(|attention| Some(*attention.choice.as_ref()?.shape()));
    let [heads, width, count] = shape.map_or([64, 128, 512], |shape| [shape.heads, shape.head_dim, shape.count]);
    for (name, value) in [("head_count", heads), ("key_length", width), ("top_k", count)] {
        out.count(key(&format!("attention.indexer.{name}")), value)?;
    }
    let hyper = graph.collapse.as_ref().map_or(0, |collapse| collapse.streams());
    if hyper != 4 {
        return Err(names::cannot(id, format!("{hyper} streams, where llama.cpp has 4,")));
    }
    out.count(key("embedding_length_out"), hyper * graph.hidden)?;
    experts(out, layers, id)
}

fn experts(out: &mut Written, layers: &Layers<'_>, id: &'static str) -> Result<()> {
    let key = |name: &str| format!("{id}.{name}");
    let Some(first) = layers.sparse.first() else { return Ok(()) };
    let tabled: Vec<bool> = layers.sparse.iter().map(|moe| moe.router.table.is_some()).collect();
    let count = tabled.iter().take_while(|tabled| **tabled).count();
    if tabled[count..].contains(&true) || layers.sparse.iter().any(|moe| moe.router.scoring != Scoring::RootSoftplus) {
        let what = match tabled[count..].contains(&true) {
            true => "experts that a table names behind layers that choose them".to_owned(),
            false => "experts with scores other than roots of softplus".to_owned(),
        };
        return Err(names::cannot(id, what));
    }
    out.count(key("hash_layer_count"), count)?;
    out.count(key("expert_shared_count"), 1)?;
    out.float(key("expert_weights_scale"), first.router.scale);
    out.flag(key("expert_weights_norm"), first.router.renormalize);
    out.count(key("expert_gating_func"), 4)?;
    Ok(())
}

/// The rotation of layers that see entries, or of the others.
fn rope_of<'g>(attention: &[&'g Attention], beside: bool) -> Option<&'g Rope> {
    attention
        .iter()
        .find(|attention| attention.beside.is_some() == beside)
        .and_then(|attention| attention.rope.as_deref())
}

/// The base of positions in layers that see a window alone, and how they are stretched in the others.
pub(super) fn rope(out: &mut Written, attention: &[&Attention], id: &'static str) -> Result<()> {
    let key = |name: &str| format!("{id}.rope.{name}");
    out.float(key("freq_base"), rope_of(attention, false).map_or(USUAL[0], |rope| rope.theta));
    match rope_of(attention, true).map(|rope| &rope.scaling) {
        None | Some(RopeScaling::None) => {}
        Some(RopeScaling::Linear { factor }) => {
            out.string(key("scaling.type"), "linear");
            out.float(key("scaling.factor"), *factor);
        }
        Some(RopeScaling::Yarn { factor, original, .. }) => {
            out.string(key("scaling.type"), "yarn");
            out.float(key("scaling.factor"), *factor);
            out.count(key("scaling.original_context_length"), *original)?;
        }
        Some(_) => return Err(names::cannot(id, "positions that are stretched in this way".to_owned())),
    }
    Ok(())
}
