//! Walks models through everything they are compared on, all beside one run of the original, and makes rows of what is found.

use std::ops::Range;

use kernels::{Backend, TokenComparison, TokenLoss};

use super::numbers::{Histogram, share_stderr};
use super::row::{Domain, Figures, Files, Measurement, ShownFlip, Stored};
use super::tasks::tasks;
use super::texts::{Material, Part};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::memory::{self, Device, Tokens};
use crate::progress::Progress;
use crate::report::{Activations, Protocol, Quality};
use crate::verify::{Found, Looks, Measured, Reference, declared_activations, token_by_token};
use crate::weights::StoredType;

/// What was measured of a model, and of the original by the way.
pub type Pair = [Measurement; 2];

/// Measures models beside the original, as many at once as memory allows; what went wrong with one does not touch the others.
///
/// Fails where the original itself cannot be measured.
pub fn measure<B: Backend>(
    backend: &B,
    (original, graph): (Reference<'_>, &Graph),
    models: &[&Checkpoint],
    material: &Material,
    progress: &mut Progress,
) -> Vec<Result<Pair>> {
    let longest = material.sequences.iter().map(Vec::len).max().unwrap_or(0);
    let tokens = material.sequences.iter().map(Vec::len).sum::<usize>().div_ceil(longest.max(1));
    let at_once =
        memory::fitting(graph, Device::of(backend), Some(original.model), models, Tokens::of(tokens, longest));
    let mut all = Vec::new();
    for together in models.chunks(at_once) {
        let mut walk = |models: &[&Checkpoint]| walk(backend, (original, graph), models, material, progress);
        match walk(together) {
            Ok(found) => all.extend(found),
            Err(error) if together.len() == 1 => all.push(Err(error)),
            // Whose fault it is shows when each is measured alone.
            Err(_) => {
                for one in together {
                    all.push(walk(&[one]).and_then(|mut found| found.remove(0)));
                }
            }
        }
    }
    all
}

fn walk<B: Backend>(
    backend: &B,
    (original, graph): (Reference<'_>, &Graph),
    models: &[&Checkpoint],
    material: &Material,
    progress: &mut Progress,
) -> Result<Vec<Result<Pair>>> {
    let sides: Vec<Measured<'_>> =
        models.iter().map(|model| Measured { model, activations: declared_activations(model) }).collect();
    let (sequences, scored) = (&material.sequences, &material.scored);
    let called = match &sides[..] {
        [one] => one.model.path().display().to_string(),
        all => format!("{} models", all.len()),
    };
    let looks = Looks { flips: true, further: false };
    let found = token_by_token(backend, &called, &sides, Some(original), sequences, scored, looks, progress)?;
    Ok(sides.iter().zip(&found).map(|(side, found)| pair(*side, original.model, graph, found, material)).collect())
}

fn pair(one: Measured<'_>, source: &Checkpoint, graph: &Graph, found: &Found, material: &Material) -> Result<Pair> {
    let asked = (!material.questions.is_empty()).then(|| tasks(&material.questions, &material.choices, &found.tokens));
    let [ours, theirs] = match asked {
        Some([ours, theirs]) => [Some(ours), Some(theirs)],
        None => [None, None],
    };
    // The original beside itself, of which every figure but its perplexity is known beforehand.
    let own = found.tokens.reference.clone();
    let itself = TokenComparison { kld: vec![0.0; own.nll.len()], reference: own.clone(), model: own };
    let itself_measured = Measured { model: source, activations: Activations::Exact };
    let of = |one: Measured<'_>, tokens: &TokenComparison, tasks, flips| -> Result<Measurement> {
        let figures = |part: &Part, tokens: &TokenComparison| -> Result<Figures> {
            let windows = [part.context, part.windows];
            figures(&found.quality(one, Some(source), tokens, windows, Protocol::Papers)?)
        };
        let text = slice(tokens, &material.text.tokens);
        let domain =
            |part: &Part| Ok(Domain { name: part.name.clone(), figures: figures(part, &slice(tokens, &part.tokens))? });
        Ok(Measurement {
            files: files(one.model, graph)?,
            recipe: None,
            beside: None,
            text: figures(&material.text, &text)?,
            histogram: Histogram::of(&text.kld),
            domains: material.domains.iter().map(domain).collect::<Result<_>>()?,
            tasks,
            flips,
            linears: None,
            notes: one.model.remarks(),
            seconds: None,
        })
    };
    Ok([of(one, &found.tokens, ours, flips(found, material))?, of(itself_measured, &itself, theirs, Vec::new())?])
}

/// What is known of some of the tokens.
fn slice(all: &TokenComparison, range: &Range<usize>) -> TokenComparison {
    let loss = |loss: &TokenLoss| TokenLoss {
        nll: loss.nll[range.clone()].to_vec(),
        argmax: loss.argmax[range.clone()].to_vec(),
    };
    TokenComparison { reference: loss(&all.reference), model: loss(&all.model), kld: all.kld[range.clone()].to_vec() }
}

fn figures(quality: &Quality) -> Result<Figures> {
    let beside = quality.beside.as_ref().ok_or_else(|| Error::failed("nothing was measured beside the original"))?;
    Ok(Figures {
        tokens: quality.tokens,
        context: quality.context,
        windows: quality.windows,
        perplexity: quality.perplexity,
        perplexity_stderr: quality.perplexity_stderr,
        ratio: beside.perplexity_ratio,
        ratio_stderr: beside.perplexity_ratio_stderr,
        kld_mean: beside.kld_mean,
        kld_stderr: beside.kld_stderr,
        kld_median: beside.kld_median,
        kld_p99: beside.kld_p99,
        kld_max: beside.kld_max,
        top1: beside.top1_agreement,
        top1_stderr: share_stderr(beside.top1_agreement, quality.tokens),
    })
}

/// The flips in the passages that are shown, which are the first windows of the domains.
fn flips(found: &Found, material: &Material) -> Vec<ShownFlip> {
    let mut shown = Vec::new();
    for (passage, part) in material.domains.iter().enumerate() {
        let first = part.tokens.start..part.tokens.start + part.context - 1;
        for flip in found.flips.iter().filter(|flip| first.contains(&flip.at)) {
            shown.push(ShownFlip {
                passage,
                // The first token of a window is not predicted.
                at: flip.at - first.start + 1,
                tokens: flip.tokens.map(|token| material.spelling.one(token)),
                probabilities: flip.probabilities,
            });
        }
    }
    shown
}

/// What the files of a model say of its size.
fn files(model: &Checkpoint, graph: &Graph) -> Result<Files> {
    let values = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let parameters: u64 = graph.tensors().iter().map(|(_, shape)| values(shape)).sum();
    let bytes = model.file_bytes()?;
    let ends = [graph.embedding.tensor.clone(), graph.head.linear.weight()];
    let (mut quantized, mut tensors) = ([0, 0], Vec::new());
    for entry in model.entries() {
        let count = values(&entry.shape);
        let plain = match entry.dtype {
            StoredType::Plain(_) => true,
            StoredType::Ggml(ty) => ty.block_len == 1,
            _ => false,
        };
        if !plain && !ends.contains(&entry.name) {
            quantized = [quantized[0] + count, quantized[1] + entry.stored_bytes];
        }
        let bpw = entry.stored_bytes as f64 * 8.0 / count.max(1) as f64;
        tensors.push(Stored { name: entry.name.clone(), kind: model.kind(entry), values: count, bpw });
    }
    Ok(Files {
        path: model.path().display().to_string(),
        bytes,
        bpw: bytes as f64 * 8.0 / parameters.max(1) as f64,
        bpw_quantized: (quantized[0] > 0).then(|| quantized[1] as f64 * 8.0 / quantized[0] as f64),
        tensors,
    })
}
