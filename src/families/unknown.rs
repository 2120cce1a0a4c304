//! Models of families that are not in the list: linears found by name and shape, for quantization without data.

use kernels::NormKind;

use crate::checkpoint::{Checkpoint, Entry, StoredType};
use crate::error::{Error, Result};
use crate::graph::{Block, Embedding, Graph, Head, Layer, Linear, Norm, Step};

/// Parts of names of modules in layers that are matrices and no linears to quantize.
const KEPT: &[&str] = &[
    "embed",
    "norm",
    "gate",
    "router",
    "conv",
    "rotary",
    "position",
    "vision",
    "visual",
    "audio",
    "projector",
    "patch",
    "lora",
];

/// Gates of feed-forward layers, which are linears all the same.
const QUANTIZED: &[&str] = &["gate_proj", "gate_up_proj", "gate_up"];

/// A graph that names linears and cannot be run. Fails when there are none.
pub fn graph(source: &Checkpoint) -> Result<Graph> {
    let mut blocks: Vec<Block> = Vec::new();
    for (entry, block) in source.entries().iter().filter_map(|entry| Some((entry, block_of(entry)?))) {
        let module = entry.name.strip_suffix(".weight").expect("as block_of says");
        let bias = source.entry(&format!("{module}.bias")).is_some();
        let linear = Linear::plain(module, entry.shape[0], entry.shape[1], bias);
        let step = Step { pre: None, layer: Layer::Opaque(vec![linear]), post: None, scale: 1.0 };
        match blocks.last_mut().filter(|last| last.name == block) {
            Some(last) => last.steps.push(step),
            None => blocks.push(Block { name: block.to_owned(), steps: vec![step], parallel: false }),
        }
    }
    if blocks.is_empty() {
        return Err(Error::failed(format!(
            "{}: the model's family is unknown, and no matrices of numbered layers were found in it",
            source.path().display()
        )));
    }
    Ok(Graph {
        family: "unknown",
        hidden: 0,
        vocabulary: 0,
        embedding: Embedding { tensor: String::new(), scale: 1.0, positions: None },
        blocks,
        final_norm: Norm {
            kind: NormKind::Rms,
            weights: Vec::new(),
            offset: 0.0,
            bias: None,
            shape: vec![0],
            eps: 0.0,
        },
        head: Head {
            linear: Linear::plain("lm_head", 0, 0, false),
            tied: true,
            missing: false,
            scale: 1.0,
            softcap: None,
        },
        dropped: super::DROPPED.to_vec(),
        aside: vec![(String::new(), "not a linear that was recognised")],
        opaque: true,
    })
}

/// The block that a linear belongs to: the name up to its first number; `None` for what is no linear of a block.
fn block_of(entry: &Entry) -> Option<&str> {
    let module = entry.name.strip_suffix(".weight")?;
    let parts: Vec<&str> = module.split('.').collect();
    let number = parts.iter().position(|part| part.parse::<usize>().is_ok())?;
    let last = parts.last()?;
    let kept = parts.iter().any(|part| KEPT.iter().any(|word| part.contains(word))) && !QUANTIZED.contains(last);
    let matrix = matches!(entry.dtype, StoredType::Plain(_) | StoredType::Quantized { .. } | StoredType::Foreign)
        && entry.shape.len() == 2
        && entry.shape.iter().all(|extent| *extent >= 32);
    let length: usize = parts[..=number].iter().map(|part| part.len() + 1).sum::<usize>() - 1;
    (matrix && !kept && number > 0).then(|| &module[..length])
}
