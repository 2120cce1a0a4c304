//! Layers that predict further tokens, under the names that families give them.
//!
//! transformers leaves most of them out; what they compute is what vLLM, SGLang and llama.cpp make of them.

use super::build::Base;
use crate::graph::{Block, FURTHER, Further, Graph, Layer, Linear, Lookup, Step};
use crate::weights::Weights;

/// What tensors aside are of such a layer of which some are missing.
const PARTIAL: &str = "predicts further tokens, and is not whole";

/// What the parts of such a layer are called besides those of any block.
struct Parts<'n> {
    prefix: String,
    /// Of the embedding and of the state.
    norms: [&'n str; 2],
    /// The state comes before the embedding.
    state_first: bool,
    projection: &'n str,
    norm: &'n str,
    /// Copies of the embedding and of the output projection that files may hold.
    copies: Option<[&'n str; 2]>,
}

impl<'n> Parts<'n> {
    fn beside(block: &Block, norm: &'n str) -> Parts<'n> {
        let prefix = format!("{}.", block.name);
        Parts { prefix, norms: ["enorm", "hnorm"], state_first: false, projection: "eh_proj", norm, copies: None }
    }
}

/// Adds a layer behind the model whose parts have DeepSeek V3's names and stand beside those of `block`: `eh_proj` and the like.
pub fn beside(graph: &mut Graph, base: &Base, block: Block) {
    let copies = Some(["embed_tokens", "shared_head.head"]);
    append(graph, base, Parts { copies, ..Parts::beside(&block, "shared_head.norm") }, block);
}

/// The same of Hunyuan 3, which calls the last norm otherwise and always takes the model's embedding and head.
pub fn beside_hunyuan(graph: &mut Graph, base: &Base, block: Block) {
    append(graph, base, Parts::beside(&block, "final_layernorm"), block);
}

/// Adds a layer of MiMo's, which puts the state before the embedding.
pub fn of_mimo(graph: &mut Graph, base: &Base, block: Block) {
    let parts = Parts {
        norms: ["token_layernorm", "hidden_layernorm"],
        projection: "input_proj",
        state_first: true,
        ..Parts::beside(&block, "final_layernorm")
    };
    append(graph, base, parts, block);
}

/// Adds the only layer of `mtp`, whose parts have the names of Qwen3-Next's.
pub fn of_mtp(graph: &mut Graph, base: &Base, block: Block) {
    let parts = Parts {
        prefix: "mtp.".to_owned(),
        norms: ["pre_fc_norm_embedding", "pre_fc_norm_hidden"],
        state_first: false,
        projection: "fc",
        norm: "norm",
        copies: None,
    };
    append(graph, base, parts, block);
}

fn append(graph: &mut Graph, base: &Base, parts: Parts<'_>, mut block: Block) {
    let Parts { prefix, norms: [of_token, of_state], state_first, projection, norm, copies } = parts;
    let [embedding, head] = match copies {
        Some(copies) => copies.map(|name| Some(format!("{prefix}{name}"))),
        None => [None, None],
    };
    let named = |name: &str| base.norm(&format!("{prefix}{name}"));
    let further = Further {
        before: graph.predictors().last().and_then(Block::further).map_or(&graph.final_norm, |last| &last.norm).clone(),
        embedding: Lookup::whole(
            embedding.map_or_else(|| graph.embedding.tensor.clone(), |module| format!("{module}.weight")),
            [graph.vocabulary, base.hidden],
        ),
        of_token: named(of_token),
        of_state: named(of_state),
        state_first,
        projection: Linear::plain(format!("{prefix}{projection}"), base.hidden, 2 * base.hidden, false),
        norm: named(norm),
        head: head.map(|module| Linear::plain(module, base.vocabulary, base.hidden, false)),
        prefix,
    };
    let first = Step {
        pre: None,
        layer: Layer::Further(Box::new(further)),
        post: None,
        scale: 1.0,
        given: 1.0,
        unseen: 0,
        hyper: None,
    };
    block.steps.insert(0, first);
    graph.blocks.push(block);
}

/// Takes the model's embedding and head where a file has no copies of them, and sets those layers aside that it does not hold, or not whole.
pub(super) fn settle(graph: &mut Graph, source: &dyn Weights) {
    let (embedding, own) = (graph.embedding.tensor.clone(), graph.trunk().len());
    for step in graph.blocks[own..].iter_mut().flat_map(|block| &mut block.steps) {
        let Layer::Further(further) = &mut step.layer else { continue };
        if source.entry(&further.embedding.tensor).is_none() {
            further.embedding.tensor.clone_from(&embedding);
        }
        further.head = further.head.take().filter(|head| source.entry(&head.weight()).is_some());
    }
    let whole = |block: &Block| {
        let one = Graph { blocks: vec![block.clone()], ..graph.without_blocks() };
        let prefix = &block.further().expect("one of these").prefix;
        let mut of_it = one.tensors().into_iter().filter(|(name, _)| name.starts_with(prefix));
        of_it.all(|(name, _)| source.entry(&name).is_some())
    };
    let count = graph.predictors().iter().take_while(|block| whole(block)).count();
    for block in graph.blocks.split_off(own + count) {
        let prefix = block.further().expect("one of these").prefix.clone();
        let any = source.entries().iter().any(|entry| entry.name.starts_with(&prefix));
        graph.aside.push((prefix, if any { PARTIAL } else { FURTHER }));
    }
}
