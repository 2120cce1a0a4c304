//! Dividing a model among several GPUs as vLLM and SGLang do: heads, and the inner width of each feed-forward layer.
//!
//! Linears that begin such a part are cut by rows, the one that ends it by columns. So each GPU gets whole heads, and of a linear that is cut by
//! columns whole groups: a group that lies on two GPUs would have its scale on one.

use formats::Encoding;
use serde::Serialize;

use super::{Finding, Held, Runtime};
use crate::graph::{Layer, Linear, Mlp};

/// GPUs that a model is divided among at most.
const MOST: usize = 64;

/// Among how many GPUs an output can be divided.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Splits {
    /// Every number that works, ascending, up to 64.
    pub works: Vec<usize>,
    /// The largest of them.
    pub largest: usize,
    /// Of the number that was asked for: why it does not work.
    pub refused: Option<String>,
}

impl Splits {
    /// What to say where the number that was asked for does not work.
    #[cfg_attr(doc, doc(hidden))]
    pub fn finding(&self, asked: usize) -> Option<Finding> {
        let why = self.refused.as_ref()?;
        let text = format!("it cannot be divided among {asked} GPUs: {why}; {} is the most that works", self.largest);
        Some(Finding { refused: true, text })
    }
}

/// Finds out among how many GPUs `held` can be divided, and why not among `asked`.
pub fn splits(held: &Held<'_>, runtime: Runtime, asked: usize) -> Splits {
    let works: Vec<usize> = (1..=MOST).filter(|parts| refusal(held, runtime, *parts).is_none()).collect();
    Splits { largest: works.last().copied().unwrap_or(1), refused: refusal(held, runtime, asked), works }
}

/// Why an output cannot be divided among so many GPUs.
fn refusal(held: &Held<'_>, runtime: Runtime, parts: usize) -> Option<String> {
    let layers = || held.graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer);
    layers().find_map(|layer| match layer {
        Layer::Attention(attention) => {
            let shape = attention.shape;
            if !shape.heads.is_multiple_of(parts) {
                return Some(format!("{} heads are not divided by {parts}", shape.heads));
            }
            // Fewer heads than GPUs are copied to several.
            if !shape.kv_heads.is_multiple_of(parts) && !parts.is_multiple_of(shape.kv_heads) {
                let heads = shape.kv_heads;
                return Some(format!(
                    "{heads} heads of keys and values are not divided by {parts}, and do not divide it"
                ));
            }
            by_columns(held, runtime, &attention.o, parts)
        }
        Layer::Delta(delta) => {
            // Each GPU has whole heads of keys with those of values that they serve.
            let heads = delta.shape.key_heads;
            if !heads.is_multiple_of(parts) {
                return Some(format!("{heads} heads of linear attention are not divided by {parts}"));
            }
            by_columns(held, runtime, &delta.out, parts)
        }
        Layer::Mamba(mamba) => {
            let (heads, groups) = (mamba.shape.value_heads, mamba.shape.key_heads);
            if !heads.is_multiple_of(parts) {
                return Some(format!("{heads} heads of a state space are not divided by {parts}"));
            }
            // A single group is copied to every GPU.
            if groups > 1 && !groups.is_multiple_of(parts) {
                return Some(format!("{groups} groups of heads of a state space are not divided by {parts}"));
            }
            by_columns(held, runtime, &mamba.out, parts)
        }
        Layer::Short(short) => by_rows(held, &short.input, short.convolution.channels, parts)
            .or_else(|| by_columns(held, runtime, &short.out, parts)),
        Layer::Mlp(mlp) => inner(held, runtime, mlp, parts),
        Layer::Moe(moe) => {
            let all = moe.experts.iter().chain(moe.shared.as_ref().map(|(shared, _)| shared));
            { all }.find_map(|mlp| inner(held, runtime, mlp, parts))
        }
        // Each GPU has all of it.
        Layer::Further(_) => None,
        // Copied to every GPU.
        Layer::PerLayer(_) | Layer::Grams(_) => None,
        // Where a model of which only the linears are known is cut is not known either.
        Layer::Opaque(_) => (parts > 1).then(|| "how the model is divided is not known".to_owned()),
    })
}

fn inner(held: &Held<'_>, runtime: Runtime, mlp: &Mlp, parts: usize) -> Option<String> {
    by_columns(held, runtime, &mlp.down, parts)
        .or_else(|| mlp.inputs.iter().find_map(|linear| by_rows(held, linear, mlp.inner(), parts)))
}

/// Of a linear that is cut by columns.
fn by_columns(held: &Held<'_>, runtime: Runtime, linear: &Linear, parts: usize) -> Option<String> {
    let Linear { module, cols, .. } = linear;
    if !cols.is_multiple_of(parts) {
        return Some(format!("the {cols} inputs of `{module}` are not divided by {parts}"));
    }
    let group = held.of(linear).iter().map(|encoding| group_of(encoding, *cols)).max()?;
    // A scale for the whole row is on every GPU.
    let whole = group >= *cols && runtime != Runtime::LlamaCpp;
    (!whole && !(cols / parts).is_multiple_of(group)).then(|| {
        format!(
            "each of {parts} GPUs would have {} inputs of `{module}`, which groups of {group} do not divide",
            cols / parts
        )
    })
}

/// Of one that is cut by rows, of which `inner` belong to one of its parts. AWQ packs eight rows into a word.
fn by_rows(held: &Held<'_>, linear: &Linear, inner: usize, parts: usize) -> Option<String> {
    let module = &linear.module;
    if !inner.is_multiple_of(parts) {
        return Some(format!("the {inner} outputs of `{module}` are not divided by {parts}"));
    }
    let packed = held.format == "awq" && !held.of(linear).is_empty();
    (packed && !(inner / parts).is_multiple_of(8)).then(|| {
        format!(
            "each of {parts} GPUs would have {} outputs of `{module}`, and AWQ packs 8 of them into a word",
            inner / parts
        )
    })
}

/// Columns that lie together: those of a group, or of a block of ggml's.
fn group_of(encoding: &Encoding, cols: usize) -> usize {
    encoding.ggml_type().map_or_else(|| encoding.group_width(cols), |ty| ty.block_len)
}
