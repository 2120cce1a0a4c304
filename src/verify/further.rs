//! How often a layer that predicts further tokens drafts what the model itself would say.

use std::ops::Range;

use kernels::Backend;

use super::{Side, TOGETHER, tokens_at_once};
use crate::checkpoint::Checkpoint;
use crate::cost::of_head;
use crate::error::Result;
use crate::forward::{Hidden, LoadedHead, together};
use crate::graph::{Block, Graph, Head};
use crate::progress::Progress;
use crate::report::{Activations, Drafts};

/// Tokens that a layer has drafted, and how many of them the model would say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counted {
    tokens: usize,
    agreed: usize,
}

impl Counted {
    fn share(self) -> f64 {
        self.agreed as f64 / self.tokens.max(1) as f64
    }
}

/// What was found of each layer of a model beside what was found of its reference's, in the order of the layers.
pub(super) fn told(graph: &Graph, own: &[Counted], reference: &[Counted]) -> Vec<Drafts> {
    let of = |(index, (block, own)): (usize, (&Block, &Counted))| Drafts {
        block: block.name.clone(),
        tokens: own.tokens,
        agreement: own.share(),
        reference_agreement: reference.get(index).map(|found| found.share()),
    };
    graph.predictors().iter().zip(own).enumerate().map(of).collect()
}

/// The output projections of layers that have one of their own, in the order of the layers.
///
/// Fails on values that are not finite.
pub(super) fn heads<'a, B: Backend>(
    backend: &B,
    graph: &Graph,
    source: &'a Checkpoint,
    activations: Activations,
) -> Result<Vec<Option<LoadedHead<'a, B>>>> {
    let own = |block: &Block| {
        let Some(linear) = block.further().and_then(|further| further.head.clone()) else { return Ok(None) };
        let head = Head { linear, tied: false, missing: false, ..graph.head.clone() };
        let graph = Graph { head, ..graph.without_blocks() };
        LoadedHead::of(backend, &graph, source, activations).map(Some)
    };
    graph.predictors().iter().map(own).collect()
}

/// Adds to `found` how often each layer of a model drafts what the model `said` at the positions `scored` of each window, one after the other.
///
/// The `n`th layer has drafted `n` tokens before what a position says. Of windows that are too short for a layer nothing is counted.
pub(super) fn count<B: Backend>(
    backend: &B,
    sides: &[Side<'_, B>],
    (index, hidden): (usize, &Hidden<B::Matrix>),
    (windows, scored): (&[Vec<u32>], &[Range<usize>]),
    said: &[u32],
    found: &mut Vec<Counted>,
    progress: &Progress,
) -> Result<()> {
    let Side { graph, further, head_of, .. } = &sides[index];
    found.resize(hidden.further.len(), Counted::default());
    let per_pass = tokens_at_once(graph.vocabulary);
    for (layer, states) in hidden.further.iter().enumerate() {
        let ahead = layer + 1;
        if windows.iter().any(|window| window.len() <= ahead) {
            continue;
        }
        let head = further[layer].as_ref().or(sides[*head_of].head.as_ref()).expect("loaded");
        let most = per_pass * head.products_at_once(per_pass, TOGETHER);
        let mut before = 0;
        for (chunk, range) in together(windows, backend.tokens_at_once()).enumerate() {
            let (mut rows, mut answers, mut offset) = (Vec::new(), Vec::new(), 0);
            for (window, scored) in windows[range.clone()].iter().zip(&scored[range]) {
                for (position, answer) in scored.clone().zip(&said[before..]) {
                    if position >= ahead {
                        rows.push(offset + position - ahead);
                        answers.push(*answer);
                    }
                }
                before += scored.len();
                offset += window.len() - ahead;
            }
            for (rows, answers) in rows.chunks(most).zip(answers.chunks(most)) {
                let logits = head.logits(backend, backend.select_rows(&states[chunk], rows)?, per_pass)?;
                let drafted = backend.token_loss(&logits, answers)?.argmax;
                found[layer].tokens += answers.len();
                found[layer].agreed += drafted.iter().zip(answers).filter(|(drafted, said)| drafted == said).count();
            }
        }
        progress.step(of_head(graph, said.len() as u64))?;
    }
    Ok(())
}
