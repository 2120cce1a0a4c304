//! Measures a checkpoint on held-out text: perplexity, and divergence from the model it was made of.

mod further;
mod hidden;
mod kept;

use std::ops::Range;

use formats::Dtype;
use kernels::{Backend, TokenComparison};

use crate::checkpoint::Checkpoint;
use crate::cost::{of_block, of_head};
use crate::error::{Error, Result};
use crate::families;
use crate::forward::{Hidden, LoadedHead, final_hidden, together};
use crate::graph::{Block, Graph};
use crate::plan::check_tensors;
use crate::progress::Progress;
use crate::report::{Activations, Beside, Drafts, Protocol, Quality};

pub use hidden::{Gives, Outputs, compare_hidden, outputs};
pub use kept::KeptStates;

/// Tokens that go through the model before the next ones are taken up.
const BATCH_TOKENS: usize = 16_384;

/// Logits that are built at a time.
const LOGITS: usize = 1 << 23;

/// Tokens whose logits are built at a time where each use of the output projection reads it from its file.
const TOGETHER: usize = 128;

/// Windows of so many tokens that go through the model together.
pub(crate) fn batch(context: usize) -> usize {
    (BATCH_TOKENS / context.max(1)).max(1)
}

/// Tokens whose logits are in memory together at the most.
pub(crate) fn logits_at_once(vocabulary: usize) -> usize {
    tokens_at_once(vocabulary).max(TOGETHER)
}

/// Tokens whose logits one product gives.
fn tokens_at_once(vocabulary: usize) -> usize {
    (LOGITS / vocabulary.max(1)).max(16)
}

impl Protocol {
    /// Positions of a window of `context` tokens whose next token is scored.
    fn scored(self, context: usize) -> Range<usize> {
        match self {
            Protocol::Papers => 0..context - 1,
            Protocol::LlamaCpp => context / 2..context - 1,
        }
    }
}

impl Quality {
    /// Fails where the likelihoods are numbers, and a perplexity is too large to be one.
    fn check(&self) -> Result<()> {
        let refuse = |path: &str| {
            Err(Error::failed(format!(
                "{path}: its perplexity is larger than a number can say; the model is broken, or was made for other tokens"
            )))
        };
        let Quality { perplexity, perplexity_stderr, .. } = self;
        if let Some(beside) = &self.beside
            && !beside.reference_perplexity.is_finite()
        {
            return refuse(&beside.reference);
        }
        let ratio = self.beside.as_ref().map_or([0.0; 2], |b| [b.perplexity_ratio, b.perplexity_ratio_stderr]);
        match [*perplexity, *perplexity_stderr].iter().chain(&ratio).all(|value| value.is_finite()) {
            true => Ok(()),
            false => refuse(&self.model),
        }
    }
}

/// A model that is measured, and what its linears and attention read.
#[derive(Clone, Copy, Debug)]
pub struct Measured<'a> {
    /// The model.
    pub model: &'a Checkpoint,
    /// What they read.
    pub activations: Activations,
}

/// The model beside which others are measured.
#[derive(Clone, Copy)]
pub struct Reference<'a> {
    /// The model.
    pub model: &'a Checkpoint,
    /// Where what it leaves of a text is kept for later runs.
    pub kept: Option<&'a KeptStates>,
}

impl<'a> From<&'a Checkpoint> for Reference<'a> {
    fn from(model: &'a Checkpoint) -> Reference<'a> {
        Reference { model, kept: None }
    }
}

/// One model that is being evaluated.
struct Side<'a, B: Backend> {
    graph: Graph,
    source: &'a Checkpoint,
    activations: Activations,
    /// None where that of another side, `head_of`, is the same.
    head: Option<LoadedHead<'a, B>>,
    head_of: usize,
    /// Of the layers that predict further tokens and are looked at, those that are their own.
    further: Vec<Option<LoadedHead<'a, B>>>,
}

/// Evaluates one model as [`evaluate_all`] does.
pub fn evaluate<B: Backend>(
    backend: &B,
    model: &Checkpoint,
    reference: Option<Reference<'_>>,
    windows: &[Vec<u32>],
    protocol: Protocol,
    activations: Activations,
    progress: &mut Progress,
) -> Result<Quality> {
    let models = [Measured { model, activations }];
    Ok(evaluate_all(backend, "the output", &models, reference, windows, protocol, progress)?.remove(0))
}

/// Evaluates `models`, beside `reference` if there is one, on `windows` of equal length; what is found of each, in their order, is what is
/// found of it alone. The reference runs once for all. `called` is what the progress calls the models.
///
/// Fails where activations are a runtime's of which it is not known what it rounds.
pub fn evaluate_all<B: Backend>(
    backend: &B,
    called: &str,
    models: &[Measured<'_>],
    reference: Option<Reference<'_>>,
    windows: &[Vec<u32>],
    protocol: Protocol,
    progress: &mut Progress,
) -> Result<Vec<Quality>> {
    let rounds = |one: &Measured<'_>| one.model.gguf().is_some() || one.model.rounds_inputs();
    if let Some(one) = models.iter().find(|one| one.activations == Activations::Runtime && !rounds(one)) {
        let path = one.model.path().display();
        return Err(Error::usage(format!(
            "--activations runtime is for GGUF files, and for checkpoints whose configuration says that runtimes round each token (W8A8, \
             FP8_DYNAMIC); {path} is neither"
        )));
    }
    let context = windows.first().map_or(0, Vec::len);
    let scored = protocol.scored(context.max(1));
    if scored.is_empty() {
        return Err(Error::usage(format!("a context of {context} tokens leaves none to score")));
    }
    let scored = vec![scored; windows.len()];
    let looks = Looks { flips: false, further: true };
    let found = token_by_token(backend, called, models, reference, windows, &scored, looks, progress)?;
    let of = |(one, found): (&Measured<'_>, &Found)| {
        found.quality(
            *one,
            reference.map(|reference| reference.model),
            &found.tokens,
            [context, windows.len()],
            protocol,
        )
    };
    models.iter().zip(&found).map(of).collect()
}

/// Where a model would say another token than its reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flip {
    /// Which of the scored tokens, all windows counted through.
    pub at: usize,
    /// What the reference would say, and what the model would.
    pub tokens: [u32; 2],
    /// The probabilities of both by the reference, and by the model.
    pub probabilities: [[f64; 2]; 2],
}

/// What was found of one model, token by token.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The scored tokens of the windows, one window after the other. Without a reference only the model's own losses.
    pub tokens: TokenComparison,
    /// Where both differ, if that was asked for.
    pub flips: Vec<Flip>,
    /// How often layers that predict further tokens draft what the model would say, if that was asked for.
    pub drafts: Vec<Drafts>,
    /// Size of the vocabulary.
    vocabulary: usize,
}

/// What is looked at besides losses.
#[derive(Clone, Copy, Debug)]
pub struct Looks {
    /// Where models and reference would say different tokens.
    pub flips: bool,
    /// What layers draft that predict further tokens.
    pub further: bool,
}

impl Found {
    /// What is found of some of the tokens, those of so many windows of one length (`[length, count]`).
    ///
    /// Fails on logits that are no numbers.
    pub fn quality(
        &self,
        one: Measured<'_>,
        reference: Option<&Checkpoint>,
        tokens: &TokenComparison,
        windows: [usize; 2],
        protocol: Protocol,
    ) -> Result<Quality> {
        check_logits(tokens, self.vocabulary, one.model, reference)?;
        let found = summarize(one.model, reference, tokens, windows, protocol);
        let quality = Quality { activations: one.activations, further: self.drafts.clone(), ..found };
        quality.check()?;
        Ok(quality)
    }
}

/// Runs `models`, and the reference once for all, through windows of whatever lengths. Of each window the positions `scored` are, those
/// whose next token is looked at; `looks` says at what else. `called` is what the progress
/// calls the models.
pub fn token_by_token<B: Backend>(
    backend: &B,
    called: &str,
    models: &[Measured<'_>],
    reference: Option<Reference<'_>>,
    windows: &[Vec<u32>],
    scored: &[Range<usize>],
    looks: Looks,
    progress: &mut Progress,
) -> Result<Vec<Found>> {
    let kept = reference.and_then(|reference| reference.kept);
    let reference = reference.map(|reference| reference.model);
    let sides = sides(backend, models, reference, windows, looks.further)?;
    let beside = reference.map_or(String::new(), |reference| format!(" beside {}", reference.role()));
    // Of these windows nothing but logits is computed once more of the reference.
    let known = |windows: &[Vec<u32>]| kept.is_some_and(|kept| kept.knows(backend, windows, sides[0].further.len()));
    let count = |windows: &[Vec<u32>]| windows.iter().map(Vec::len).sum::<usize>() as u64;
    let looked_at = scored.iter().map(Range::len).sum::<usize>() as u64;
    let work = |side: &Side<'_, B>| {
        let blocks = side.blocks().iter().map(|block| of_block(block, count(windows))).sum::<u64>();
        blocks + of_head(&side.graph, looked_at) * (1 + side.further.len() as u64)
    };
    let saved: u64 = together(windows, BATCH_TOKENS)
        .map(|range| &windows[range])
        .filter(|windows| known(windows))
        .map(|windows| sides[0].blocks().iter().map(|block| of_block(block, count(windows))).sum::<u64>())
        .sum();
    let work = sides.iter().map(work).sum::<u64>() - saved;
    if let Some(reference) = reference.filter(|_| saved > 0) {
        progress.say(&format!(
            "{} is not run again: what it made of the text is known from an earlier run",
            reference.role()
        ));
    }
    progress.start(format!("measuring {called}{beside}"), work)?;
    let vocabulary = sides[0].graph.vocabulary;
    let mut all: Vec<Found> = models.iter().map(|_| Found { vocabulary, ..Found::default() }).collect();
    let mut counted: Vec<Vec<further::Counted>> = sides.iter().map(|_| Vec::new()).collect();
    for batch in together(windows, BATCH_TOKENS) {
        progress.part(part(batch.start, batch.len(), windows.len()));
        let windows = &windows[batch.clone()];
        let mut hidden: Vec<Hidden<B::Matrix>> = Vec::new();
        let tokens = count(windows);
        for (index, Side { graph, source, activations, further, .. }) in sides.iter().enumerate() {
            let kept = kept.filter(|_| index == 0);
            if let Some(known) = kept.and_then(|kept| kept.take(backend, windows, further.len())) {
                hidden.push(known);
                continue;
            }
            let step = |block: &Block| progress.step(of_block(block, tokens));
            let found = final_hidden(backend, graph, source, windows, *activations, !further.is_empty(), &step)?;
            if let Some(kept) = kept {
                kept.keep(backend, windows, &found);
            }
            hidden.push(found);
        }
        let here = (windows, &scored[batch]);
        let before = all[0].tokens.model.nll.len();
        compare_windows(backend, &sides, &hidden, here, looks.flips, &mut all, progress)?;
        let first = sides.len() - all.len();
        for (index, hidden) in hidden.iter().enumerate() {
            let said = match index.checked_sub(first) {
                Some(model) => &all[model].tokens.model.argmax,
                None => &all[0].tokens.reference.argmax,
            };
            further::count(backend, &sides, (index, hidden), here, &said[before..], &mut counted[index], progress)?;
        }
    }
    let (reference, own) = counted.split_at(sides.len() - all.len());
    let reference = reference.first().map_or(&[][..], |reference| reference);
    for ((found, side), own) in all.iter_mut().zip(&sides[sides.len() - models.len()..]).zip(own) {
        found.drafts = further::told(&side.graph, own, reference);
    }
    Ok(all)
}

impl<B: Backend> Side<'_, B> {
    /// The blocks that are run.
    fn blocks(&self) -> &[Block] {
        if self.further.is_empty() { self.graph.trunk() } else { &self.graph.blocks }
    }
}

/// Which windows are at work: so many after the first `before`.
fn part(before: usize, count: usize, all: usize) -> String {
    match count {
        1 => format!("window {} of {all}", before + 1),
        _ => format!("windows {} to {} of {all}", before + 1, before + count),
    }
}

/// The reference, if there is one, and then the models, with the heads that they need.
///
/// Fails for a model that cannot be run or has no head, for tokens that it does not have, and for vocabularies of two sizes.
fn sides<'a, B: Backend>(
    backend: &'a B,
    models: &[Measured<'a>],
    reference: Option<&'a Checkpoint>,
    windows: &[Vec<u32>],
    further: bool,
) -> Result<Vec<Side<'a, B>>> {
    let largest = windows.iter().flatten().max().copied().unwrap_or(0) as usize;
    let mut sides: Vec<Side<'a, B>> = Vec::new();
    let reference = reference.map(|model| Measured { model, activations: Activations::Exact });
    for Measured { model: source, activations } in reference.into_iter().chain(models.iter().copied()) {
        let graph = families::graph_of(source)?;
        families::check_runnable(&graph, source)?;
        check_tensors(&graph, source)?;
        if graph.head.missing {
            return Err(Error::failed(format!(
                "{}: the model has no output projection, as its architectures say, and so no perplexity",
                source.path().display()
            )));
        }
        if largest >= graph.vocabulary {
            return Err(Error::failed(format!(
                "{}: the tokenizer gives token {largest}, and the model has {}",
                source.path().display(),
                graph.vocabulary
            )));
        }
        if let Some(first) = sides.first().filter(|first| first.graph.vocabulary != graph.vocabulary) {
            return Err(Error::failed(format!(
                "{} has a vocabulary of {} and {} one of {}: they cannot be compared",
                first.source.path().display(),
                first.graph.vocabulary,
                source.path().display(),
                graph.vocabulary
            )));
        }
        let further = match further {
            true => further::heads(backend, &graph, source, activations)?,
            false => Vec::new(),
        };
        sides.push(Side { graph, source, activations, head: None, head_of: 0, further });
    }
    for index in 0..sides.len() {
        // A head that several share is kept once.
        let (before, own) = (&sides[..index], &sides[index]);
        let same = |other: &Side<'_, B>| other.activations == own.activations && same_head(other, own);
        let head_of = before.iter().position(same).unwrap_or(index);
        sides[index].head_of = head_of;
        if head_of == index {
            let side = &mut sides[index];
            side.head = Some(LoadedHead::of(backend, &side.graph, side.source, side.activations)?);
        }
    }
    Ok(sides)
}

/// Positions of one chunk whose logits are looked at together.
struct Piece {
    chunk: usize,
    rows: Vec<usize>,
    targets: Vec<u32>,
}

/// The positions `scored` of each window, in their order, no more than `most` of one chunk together.
fn pieces(windows: &[Vec<u32>], scored: &[Range<usize>], at_once: usize, most: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (chunk, range) in together(windows, at_once).enumerate() {
        let (mut offset, mut rows, mut targets) = (0, Vec::new(), Vec::new());
        for (window, scored) in windows[range.clone()].iter().zip(&scored[range]) {
            rows.extend(scored.clone().map(|row| offset + row));
            targets.extend(scored.clone().map(|row| window[row + 1]));
            offset += window.len();
        }
        let both = rows.chunks(most).zip(targets.chunks(most));
        pieces.extend(both.map(|(rows, targets)| Piece { chunk, rows: rows.to_vec(), targets: targets.to_vec() }));
    }
    pieces
}

/// Adds what the sides make of the positions `scored` of each window to what is known of each model, window after window.
///
/// `hidden` has the hidden states of each side before the head, in the chunks in which they were computed.
fn compare_windows<B: Backend>(
    backend: &B,
    sides: &[Side<'_, B>],
    hidden: &[Hidden<B::Matrix>],
    (windows, scored): (&[Vec<u32>], &[Range<usize>]),
    flips: bool,
    all: &mut [Found],
    progress: &Progress,
) -> Result<()> {
    let first = sides.len() - all.len();
    let per_pass = tokens_at_once(sides[0].graph.vocabulary);
    let at_once = sides.iter().filter_map(|side| side.head.as_ref()).map(|h| h.products_at_once(per_pass, TOGETHER));
    let most = per_pass * at_once.min().unwrap_or(1);
    for Piece { chunk, rows, targets } in pieces(windows, scored, backend.tokens_at_once(), most) {
        let logits = |side: usize| -> Result<B::Matrix> {
            let head = sides[sides[side].head_of].head.as_ref().expect("loaded");
            head.logits(backend, backend.select_rows(&hidden[side].normed[chunk], &rows)?, per_pass)
        };
        let reference = (first > 0).then(|| logits(0)).transpose()?;
        for (model, all) in all.iter_mut().enumerate() {
            let own = logits(first + model)?;
            let found = match &reference {
                None => TokenComparison { model: backend.token_loss(&own, &targets)?, ..Default::default() },
                Some(reference) => backend.compare(reference, &own, &targets)?,
            };
            if let (true, Some(reference)) = (flips, &reference) {
                all.flips.extend(differing(backend, [reference, &own], &found, all.tokens.model.nll.len())?);
            }
            for (all, found) in [(&mut all.tokens.model, found.model), (&mut all.tokens.reference, found.reference)] {
                all.nll.extend(found.nll);
                all.argmax.extend(found.argmax);
            }
            all.tokens.kld.extend(found.kld);
        }
        sides.iter().try_for_each(|side| progress.step(of_head(&side.graph, rows.len() as u64)))?;
    }
    Ok(())
}

/// Where the two would say different tokens, of the logits of the reference and the model; `before` tokens were scored before these.
fn differing<B: Backend>(
    backend: &B,
    logits: [&B::Matrix; 2],
    found: &TokenComparison,
    before: usize,
) -> Result<Vec<Flip>> {
    let (said, would_say) = (&found.reference.argmax, &found.model.argmax);
    let rows: Vec<usize> = (0..said.len()).filter(|row| said[*row] != would_say[*row]).collect();
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let tokens: Vec<[u32; 2]> = rows.iter().map(|row| [said[*row], would_say[*row]]).collect();
    let mut flips: Vec<Flip> = rows
        .iter()
        .zip(&tokens)
        .map(|(row, tokens)| Flip { at: before + row, tokens: *tokens, probabilities: [[0.0; 2]; 2] })
        .collect();
    for (side, logits) in logits.into_iter().enumerate() {
        let logits = backend.select_rows(logits, &rows)?;
        for which in 0..2 {
            let of: Vec<u32> = tokens.iter().map(|tokens| tokens[which]).collect();
            let loss = backend.token_loss(&logits, &of)?;
            flips.iter_mut().zip(loss.nll).for_each(|(flip, nll)| flip.probabilities[side][which] = (-nll).exp());
        }
    }
    Ok(flips)
}

/// Fails on logits that are no numbers, of which nothing can be said; the reference's are looked at first.
fn check_logits(
    all: &TokenComparison,
    vocabulary: usize,
    model: &Checkpoint,
    reference: Option<&Checkpoint>,
) -> Result<()> {
    let broken = |values: &[f64]| values.iter().position(|value| !value.is_finite());
    let refuse = |source: &Checkpoint, at: usize, what: &str| {
        Err(Error::failed(format!(
            "{}: the logits of scored token {at} are not finite numbers; {what}",
            source.path().display()
        )))
    };
    // Of logits that are all equal every token is as likely as any other, and the first counts as the likeliest.
    let flat = |nll: &[f64]| {
        let uniform = (vocabulary as f64).ln();
        nll.len() > 1 && nll.iter().all(|nll| (nll - uniform).abs() <= 1e-6 * uniform)
    };
    for (source, nll) in
        reference.map(|reference| (reference, &all.reference.nll)).into_iter().chain([(model, &all.model.nll)])
    {
        if flat(nll) {
            return Err(Error::failed(format!(
                "{}: every token of the vocabulary is given the same probability; the model is broken, and nothing can be measured",
                source.path().display()
            )));
        }
    }
    if let (Some(at), Some(reference)) = (broken(&all.reference.nll), reference) {
        let what = format!("{} is broken, and nothing can be measured beside it", reference.role());
        return refuse(reference, at, &what);
    }
    if let Some(at) = broken(&all.model.nll) {
        return refuse(model, at, "the model is broken");
    }
    // Both give the token that comes some probability, and one of them no number for another.
    match (broken(&all.kld), reference) {
        (Some(at), Some(reference)) => Err(Error::failed(format!(
            "the divergence of {} from {} is no finite number at scored token {at}; some of their logits are none",
            model.path().display(),
            reference.path().display()
        ))),
        _ => Ok(()),
    }
}

/// What a model's linears read where nobody says anything else: rounded where that is part of its scheme.
pub fn declared_activations(model: &Checkpoint) -> Activations {
    if model.rounds_inputs() { Activations::Runtime } else { Activations::Exact }
}

fn same_head<B: Backend>(a: &Side<'_, B>, b: &Side<'_, B>) -> bool {
    let name = |side: &Side<'_, B>| match side.graph.head.tied {
        true => side.graph.embedding.tensor.clone(),
        false => side.graph.head.linear.weight(),
    };
    match (a.source.raw(&name(a)), b.source.raw(&name(b))) {
        (Some(x), Some(y)) => x.dtype == y.dtype && x.dtype != Dtype::F64 && x.data == y.data,
        _ => false,
    }
}

fn summarize(
    model: &Checkpoint,
    reference: Option<&Checkpoint>,
    all: &TokenComparison,
    [context, windows]: [usize; 2],
    protocol: Protocol,
) -> Quality {
    let (nll, nll_error) = mean(&all.model.nll);
    let beside = reference.map(|reference| {
        let (base, _) = mean(&all.reference.nll);
        let differences: Vec<f64> = all.model.nll.iter().zip(&all.reference.nll).map(|(a, b)| a - b).collect();
        let (difference, difference_error) = mean(&differences);
        let (kld_mean, kld_stderr) = mean(&all.kld);
        let mut sorted = all.kld.clone();
        sorted.sort_by(f64::total_cmp);
        let same = all.model.argmax.iter().zip(&all.reference.argmax).filter(|(a, b)| a == b).count();
        Beside {
            reference: reference.path().display().to_string(),
            reference_quantized: reference.quantized_as(),
            reference_perplexity: base.exp(),
            perplexity_ratio: difference.exp(),
            perplexity_ratio_stderr: difference.exp() * difference_error,
            kld_mean,
            kld_stderr,
            kld_median: quantile(&sorted, 0.5),
            kld_p99: quantile(&sorted, 0.99),
            kld_max: sorted.last().copied().unwrap_or(0.0),
            top1_agreement: same as f64 / all.kld.len().max(1) as f64,
        }
    });
    Quality {
        model: model.path().display().to_string(),
        perplexity: nll.exp(),
        perplexity_stderr: nll.exp() * nll_error,
        tokens: all.model.nll.len(),
        context,
        windows,
        protocol,
        activations: Activations::Exact,
        beside,
        further: Vec::new(),
    }
}

/// The mean of some values and its standard error, values taken as independent; 0 of none.
pub fn mean(values: &[f64]) -> (f64, f64) {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    (mean, (variance / count).sqrt())
}

/// Linear interpolation between the order statistics.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len().max(1) - 1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    match sorted.get(high) {
        Some(top) => sorted[low] + (top - sorted[low]) * (place - low as f64),
        None => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_those_of_the_textbook() {
        let (m, e) = mean(&[1.0, 2.0, 3.0, 6.0]);
        assert_eq!((m, e), (3.0, (14.0f64 / 3.0 / 4.0).sqrt()));
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), 3.0);
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
    }

    #[test]
    fn positions_of_windows_of_any_lengths_are_found_in_their_chunks() {
        let windows: Vec<Vec<u32>> = [vec![1, 2, 3], vec![4, 5], vec![6, 7, 8, 9], vec![10, 11]].into();
        let scored = [0..2, 0..1, 2..3, 0..1];
        let all: Vec<_> = pieces(&windows, &scored, 5, 2).into_iter().map(|p| (p.chunk, p.rows, p.targets)).collect();
        // Two windows fill the first chunk, and the others have one each.
        let expected =
            [(0, vec![0, 1], vec![2, 3]), (0, vec![3], vec![5]), (1, vec![2], vec![9]), (2, vec![0], vec![11])];
        assert_eq!(all, expected);
    }

    #[test]
    fn protocols_score_what_they_say() {
        assert_eq!(Protocol::Papers.scored(8), 0..7);
        assert_eq!(Protocol::LlamaCpp.scored(8), 4..7);
        assert!(Protocol::LlamaCpp.scored(1).is_empty());
    }
}
