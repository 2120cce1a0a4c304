//! What a model makes of texts that predicts no tokens, beside what its original makes of them: hidden states, embeddings, scores.

use kernels::Backend;

use super::{batch, declared_activations, part};
use crate::checkpoint::{Checkpoint, Modules};
use crate::cost::of_block;
use crate::error::{Error, Result};
use crate::families::{self, Labels};
use crate::forward::{LoadedHead, final_hidden, load_bias, load_matrix, together};
use crate::graph::{Block, Graph};
use crate::plan::check_tensors;
use crate::progress::Progress;
use crate::report::{Activations, Embeddings, HiddenStates, Limits, Scored, Scores};

/// Tokens of a text whose embedding or score is looked at.
const TEXT: usize = 128;

/// What comes out of a model, by its class and by the files beside it, which is what it is measured by.
#[derive(Clone, Debug)]
pub struct Gives {
    /// The next token: it has an output projection, and nothing is said of embeddings.
    pub predicts: bool,
    /// Whether there is an output projection at all.
    headless: bool,
    modules: Option<Modules>,
    labels: Option<Labels>,
    /// What of the files beside it is not known.
    pub notes: Vec<String>,
    /// Why nothing can be measured: what it is made of does not fit, or is broken.
    broken: Option<String>,
}

impl Gives {
    /// What comes out of a model.
    pub fn of(graph: &Graph, source: &Checkpoint) -> Gives {
        let (modules, notes) = match source.modules() {
            Ok(modules) => (modules, Vec::new()),
            Err(why) => {
                (None, vec![format!("{why}: what sentence-transformers makes of hidden states was not measured")])
            }
        };
        let headless = graph.head.missing;
        let labels = Labels::of(graph, source).filter(|_| headless);
        let embeds = modules.as_ref().is_some_and(Modules::embeds);
        // Of a model whose family is unknown no width is.
        let (width, logits) = (Some(graph.hidden), Some(graph.vocabulary).filter(|_| !headless));
        let [width, logits] = [width, logits].map(|count| count.filter(|_| !graph.opaque));
        let fits = modules.as_ref().map_or(Ok(()), |modules| modules.check(source.path(), width, logits));
        let broken = fits.err().map(|error| error.to_string()).or_else(|| Labels::fault(graph, source));
        Gives { predicts: !headless && !embeds, headless, modules, labels, notes, broken }
    }

    /// What is wrong with what makes embeddings or scores, if anything is: nothing can be measured then.
    pub fn fault(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Whether something else than predictions is to be looked at.
    pub fn states(&self) -> bool {
        !self.predicts || self.score().is_some()
    }

    /// The tokens whose logits are a text's score.
    fn score(&self) -> Option<(u32, Option<u32>)> {
        self.modules.as_ref().and_then(|modules| modules.score).filter(|_| !self.headless)
    }

    fn embedding(&self) -> Option<&Modules> {
        self.modules.as_ref().filter(|modules| modules.embeds())
    }

    /// Fails where what makes embeddings or scores is broken; and for limits on what the model at a place does not give: a usage error.
    pub fn check(&self, limits: &Limits, place: &str) -> Result<()> {
        if let Some(why) = &self.broken {
            return Err(Error::failed(why.clone()));
        }
        let refuse = |why: &str| Err(Error::usage(format!("{place}: {why}")));
        let predicted = limits.max_kld.or(limits.max_ppl_ratio).is_some() || limits.baseline.is_some();
        if !self.predicts && predicted {
            return refuse(match self.headless {
                true => {
                    "the model has no output projection, as its architectures say: drop the limits on what it would predict; --min-cosine, \
                     --min-top1 and --min-spearman are for what it makes of texts"
                }
                false => {
                    "the model makes embeddings, as modules.json beside it says: drop the limits on what it would predict; --min-cosine is for \
                     embeddings"
                }
            });
        }
        let labels = self.labels.as_ref().is_some_and(|labels| labels.count() > 1 || labels.several);
        if !self.predicts && limits.min_top1.is_some() && !labels {
            return refuse("--min-top1 is for models that predict tokens, or choose a label: the model does neither");
        }
        if self.predicts && limits.min_cosine.is_some() {
            return refuse("--min-cosine is for models that predict no tokens, and this one does: give --max-kld");
        }
        let one = self.labels.as_ref().is_some_and(|labels| labels.count() == 1 && !labels.tokens);
        if limits.min_spearman.is_some() && !one && self.score().is_none() {
            return refuse(
                "--min-spearman is for rerankers and reward models, which give a text one score: the model gives none",
            );
        }
        Ok(())
    }

    /// The texts that are looked at: pieces of windows, between the ids that the tokenizer puts around every text; windows as they are where
    /// nothing is made of a text as a whole.
    pub fn texts(&self, windows: &[Vec<u32>], around: [&[u32]; 2]) -> Vec<Vec<u32>> {
        if self.modules.is_none() && self.labels.is_none() {
            return windows.to_vec();
        }
        let [before, after] = around;
        let room = TEXT.saturating_sub(before.len() + after.len()).max(1);
        let pieces = windows.iter().flat_map(|window| window.chunks(room));
        pieces.map(|piece| [before, piece, after].concat()).collect()
    }
}

/// One of the models, and what makes scores of its hidden states.
struct Side<'a, B: Backend> {
    graph: Graph,
    source: &'a Checkpoint,
    activations: Activations,
    labels: Vec<Scorer>,
    head: Option<LoadedHead<'a, B>>,
}

/// A linear of a head for labels, in memory.
struct Scorer {
    weight: Vec<f32>,
    cols: usize,
    bias: Option<Vec<f32>>,
}

impl Scorer {
    /// Those of a model.
    fn all(labels: &Labels, source: &Checkpoint) -> Result<Vec<Scorer>> {
        let of = |linear| {
            let weight = load_matrix(source, linear)?.into_raw_vec_and_offset().0;
            Ok(Scorer { weight, cols: linear.cols, bias: load_bias(source, linear)? })
        };
        labels.layers.iter().map(of).collect()
    }

    /// The scores of a token: a ReLU stands between two linears.
    fn scores(all: &[Scorer], hidden: &[f32]) -> Vec<f64> {
        let mut x: Vec<f64> = hidden.iter().map(|x| f64::from(*x)).collect();
        for (index, Scorer { weight, cols, bias }) in all.iter().enumerate() {
            if index > 0 {
                // What is no number stays none.
                x.iter_mut().filter(|x| **x < 0.0).for_each(|x| *x = 0.0);
            }
            let row = |(row, weight): (usize, &[f32])| {
                let sum: f64 = weight.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum();
                sum + bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]))
            };
            x = weight.chunks_exact((*cols).max(1)).enumerate().map(row).collect();
        }
        x
    }
}

/// What a model makes of some texts.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// Normed hidden states, one token after the other.
    pub hidden: Vec<f32>,
    /// Of each text its embedding, where one is made.
    pub embeddings: Vec<Vec<f64>>,
    /// Of each text, or of each of its tokens, its scores, where there are some.
    pub scores: Vec<Vec<f64>>,
}

/// What is summed up over all texts.
#[derive(Default)]
struct Sums {
    tokens: Cosines,
    squares: [f64; 2],
    embeddings: Cosines,
    dimensions: usize,
    /// Of each text or token the scores of the reference and of the model.
    scores: Vec<[Vec<f64>; 2]>,
}

/// Cosines of pairs of vectors.
struct Cosines {
    count: usize,
    sum: f64,
    lowest: f64,
}

impl Default for Cosines {
    fn default() -> Cosines {
        Cosines { count: 0, sum: 0.0, lowest: f64::INFINITY }
    }
}

impl Cosines {
    /// Adds that of two vectors. Fails where it is no number.
    fn add<T: Copy + Into<f64>>(&mut self, a: &[T], b: &[T], what: impl FnOnce() -> String) -> Result<()> {
        let dot = |x: &[T], y: &[T]| x.iter().zip(y).map(|(x, y)| (*x).into() * (*y).into()).sum::<f64>();
        let lengths = [dot(a, a), dot(b, b)];
        let cosine = match lengths {
            [0.0, 0.0] => 1.0,
            // One that is gone is not what it was.
            [0.0, other] | [other, 0.0] if other.is_finite() => 0.0,
            [a_length, b_length] => dot(a, b) / (a_length * b_length).sqrt(),
        };
        if !cosine.is_finite() {
            return Err(Error::failed(what()));
        }
        (self.count, self.sum, self.lowest) = (self.count + 1, self.sum + cosine, self.lowest.min(cosine));
        Ok(())
    }

    fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }
}

/// Compares what `model` and `reference` make of `texts`: their normed hidden states, and what comes of these.
///
/// Fails for tokens that a model does not have, and on results that are no numbers.
pub fn compare_hidden<B: Backend>(
    backend: &B,
    gives: &Gives,
    model: &Checkpoint,
    reference: &Checkpoint,
    texts: &[Vec<u32>],
    progress: &mut Progress,
) -> Result<HiddenStates> {
    let sides = [(reference, Activations::Exact), (model, declared_activations(model))];
    let sides = sides.map(|(source, activations)| side(backend, gives, source, reference, activations, texts));
    let [first, second] = sides;
    let sides = [first?, second?];
    check_tensors(&sides[1].graph, model)?;
    let count = |texts: &[Vec<u32>]| texts.iter().map(Vec::len).sum::<usize>() as u64;
    let work = sides.iter().flat_map(|side| side.graph.trunk()).map(|block| of_block(block, count(texts))).sum();
    progress.start(format!("comparing hidden states of the output and {}", reference.role()), work)?;
    let mut sums = Sums::default();
    let all = texts.len();
    let at_once = batch(texts.iter().map(Vec::len).max().unwrap_or(1));
    for (index, texts) in texts.chunks(at_once).enumerate() {
        progress.part(part(index * at_once, texts.len(), all));
        let mut normed = Vec::new();
        for side in &sides {
            let step = |block: &Block| progress.step(of_block(block, count(texts)));
            let found = final_hidden(backend, &side.graph, side.source, texts, side.activations, false, &step)?;
            normed.push(found.normed);
        }
        for (chunk, range) in together(texts, backend.tokens_at_once()).enumerate() {
            let of = |side: usize| sides[side].made(backend, gives, &normed[side][chunk], &texts[range.clone()]);
            sums.add([of(0)?, of(1)?], sides[0].graph.hidden, &model.path().display())?;
        }
    }
    Ok(sums.told(gives, model, reference))
}

/// One of the models; a head for labels that it does not have is taken of the reference, whose it is.
fn side<'a, B: Backend>(
    backend: &'a B,
    gives: &Gives,
    source: &'a Checkpoint,
    reference: &Checkpoint,
    activations: Activations,
    texts: &[Vec<u32>],
) -> Result<Side<'a, B>> {
    let graph = families::graph_of(source)?;
    families::check_runnable(&graph, source)?;
    let largest = texts.iter().flatten().max().copied().unwrap_or(0) as usize;
    if largest >= graph.vocabulary {
        return Err(Error::failed(format!(
            "{}: the tokenizer gives token {largest}, and the model has {}",
            source.path().display(),
            graph.vocabulary
        )));
    }
    let labels = match &gives.labels {
        None => Vec::new(),
        Some(labels) => {
            let own = labels.layers.iter().all(|linear| source.entry(&linear.weight()).is_some());
            for linear in labels.layers.iter().filter(|_| own) {
                let (name, shape) = (linear.weight(), [linear.rows, linear.cols]);
                let found = source.entry(&name).map(|entry| entry.shape.clone()).unwrap_or_default();
                if found != shape {
                    return Err(Error::failed(format!(
                        "{}: `{name}` has the shape {found:?}, and that of {} {shape:?}: scores of other labels cannot be compared; give \
                         the model that this one was made from",
                        source.path().display(),
                        reference.path().display()
                    )));
                }
            }
            Scorer::all(labels, if own { source } else { reference })?
        }
    };
    let head = gives.score().map(|_| LoadedHead::of(backend, &graph, source, activations)).transpose()?;
    Ok(Side { graph, source, activations, labels, head })
}

/// What one model makes of texts.
///
/// Fails as [`compare_hidden`] does.
pub fn outputs<B: Backend>(backend: &B, model: &Checkpoint, texts: &[Vec<u32>]) -> Result<Outputs> {
    let gives = Gives::of(&families::graph_of(model)?, model);
    let side = side(backend, &gives, model, model, declared_activations(model), texts)?;
    let normed = final_hidden(backend, &side.graph, model, texts, side.activations, false, &|_| Ok(()))?.normed;
    let mut all = Outputs::default();
    for (chunk, range) in together(texts, backend.tokens_at_once()).enumerate() {
        let found = side.made(backend, &gives, &normed[chunk], &texts[range])?;
        all.hidden.extend(found.hidden);
        all.embeddings.extend(found.embeddings);
        all.scores.extend(found.scores);
    }
    Ok(all)
}

impl<B: Backend> Side<'_, B> {
    /// What it makes of some texts, whose hidden states are one matrix.
    fn made(&self, backend: &B, gives: &Gives, normed: &B::Matrix, texts: &[Vec<u32>]) -> Result<Outputs> {
        let width = self.graph.hidden;
        let hidden = backend.download(normed)?.into_raw_vec_and_offset().0;
        let mut made = Outputs { scores: self.of_logits(backend, gives, normed, texts)?, ..Outputs::default() };
        let mut start = 0;
        for text in texts {
            let own = &hidden[start * width..(start + text.len()) * width];
            if let Some(modules) = gives.embedding() {
                made.embeddings.push(modules.embed(own, width).map_err(Error::Failed)?);
            }
            if let Some(labels) = &gives.labels {
                let rows = match labels.tokens {
                    true => 0..text.len(),
                    false => {
                        let last = text.iter().rposition(|id| Some(*id) != labels.pad).unwrap_or(0);
                        last..last + 1
                    }
                };
                let score = |row: usize| Scorer::scores(&self.labels, &own[row * width..(row + 1) * width]);
                made.scores.extend(rows.map(score));
            }
            start += text.len();
        }
        made.hidden = hidden;
        Ok(made)
    }

    /// Of each text the score that its last logits give, where they do.
    fn of_logits(&self, backend: &B, gives: &Gives, hidden: &B::Matrix, texts: &[Vec<u32>]) -> Result<Vec<Vec<f64>>> {
        let (Some((yes, no)), Some(head)) = (gives.score(), &self.head) else { return Ok(Vec::new()) };
        let ends = texts.iter().scan(0, |end, text| {
            *end += text.len();
            Some(*end - 1)
        });
        let rows = backend.select_rows(hidden, &ends.collect::<Vec<usize>>())?;
        let logits = backend.download(&head.logits(backend, rows, super::tokens_at_once(self.graph.vocabulary))?)?;
        let of = |row: usize, id: u32| {
            logits.get([row, id as usize]).map(|x| f64::from(*x)).ok_or_else(|| {
                let place = self.source.path().display();
                Error::failed(format!(
                    "{place}: modules.json makes scores of token {id}, and the model has {}",
                    logits.ncols()
                ))
            })
        };
        (0..texts.len()).map(|row| Ok(vec![of(row, yes)? - no.map_or(Ok(0.0), |no| of(row, no))?])).collect()
    }
}

impl Sums {
    /// Adds what the reference and the model at `place` make of some texts.
    fn add(&mut self, [theirs, ours]: [Outputs; 2], width: usize, place: &dyn std::fmt::Display) -> Result<()> {
        for (a, b) in ours.hidden.chunks_exact(width).zip(theirs.hidden.chunks_exact(width)) {
            let token = self.tokens.count;
            let what = || format!("{place}: the hidden states of token {token} are not finite numbers");
            self.tokens.add(a, b, what)?;
            self.squares[0] += a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>();
            self.squares[1] += b.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>();
        }
        for (a, b) in ours.embeddings.iter().zip(&theirs.embeddings) {
            self.dimensions = a.len();
            self.embeddings.add(a, b, || format!("{place}: the embedding of a text is not finite"))?;
        }
        if !theirs.scores.iter().chain(&ours.scores).flatten().all(|score| score.is_finite()) {
            return Err(Error::failed(format!("{place}: scores are not finite numbers, or the original's are none")));
        }
        self.scores.extend(theirs.scores.into_iter().zip(ours.scores).map(|(theirs, ours)| [theirs, ours]));
        Ok(())
    }

    fn told(&self, gives: &Gives, model: &Checkpoint, reference: &Checkpoint) -> HiddenStates {
        let embeddings = gives.embedding().map(|modules| Embeddings {
            made_by: modules.said(),
            dimensions: self.dimensions,
            texts: self.embeddings.count,
            cosine_mean: self.embeddings.mean(),
            cosine_min: self.embeddings.lowest,
        });
        HiddenStates {
            model: model.path().display().to_string(),
            reference: reference.path().display().to_string(),
            reference_quantized: reference.quantized_as(),
            tokens: self.tokens.count,
            cosine_mean: self.tokens.mean(),
            cosine_min: self.tokens.lowest,
            relative_error: (self.squares[0] / self.squares[1].max(f64::MIN_POSITIVE)).sqrt(),
            embeddings,
            scores: scores(&self.scores, gives.labels.as_ref()),
        }
    }
}

/// What there is to say of scores, the reference's first; nothing where there are none.
fn scores(all: &[[Vec<f64>; 2]], labels: Option<&Labels>) -> Option<Scores> {
    let count = all.first()?[0].len();
    let pairs = || all.iter().flat_map(|[a, b]| a.iter().zip(b));
    let differences: Vec<f64> = pairs().map(|(a, b)| (a - b).abs()).collect();
    let several = labels.is_some_and(|labels| labels.several);
    let share = |agreed: usize, of: usize| agreed as f64 / of.max(1) as f64;
    let label_agreement = match (several, count) {
        (true, _) => Some(share(pairs().filter(|(a, b)| (**a > 0.0) == (**b > 0.0)).count(), pairs().count())),
        (false, 1) => None,
        (false, _) => Some(share(all.iter().filter(|[a, b]| largest(a) == largest(b)).count(), all.len())),
    };
    let of = |side: usize| all.iter().map(|both| both[side][0]).collect::<Vec<f64>>();
    Some(Scores {
        of: if labels.is_some_and(|labels| labels.tokens) { Scored::Tokens } else { Scored::Texts },
        scored: all.len(),
        labels: count,
        label_agreement,
        difference_mean: differences.iter().sum::<f64>() / differences.len().max(1) as f64,
        difference_max: differences.iter().copied().fold(0.0, f64::max),
        rank_correlation: if count == 1 { spearman(&of(0), &of(1)) } else { None },
    })
}

/// Which score is the highest; of equal ones the first.
fn largest(scores: &[f64]) -> usize {
    (0..scores.len()).fold(0, |best, at| if scores[at] > scores[best] { at } else { best })
}

/// The correlation of ranks; equal values share the mean of theirs. Nothing where one side has one value only.
fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    let [a, b] = [ranks(a), ranks(b)];
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let sum = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum::<f64>();
    let spread = (sum(&a, &a) * sum(&b, &b)).sqrt();
    (spread > 0.0).then(|| sum(&a, &b) / spread)
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for group in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let shared = start as f64 + (group.len() as f64 - 1.0) / 2.0;
        group.iter().for_each(|at| ranks[*at] = shared);
        start += group.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_correlation_is_that_of_the_textbook() {
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[10.0, 20.0, 25.0]), Some(1.0));
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]), Some(-1.0));
        // Of five places without ties 1 − 6 Σd² / (n³ − n).
        assert!((spearman(&[1.0, 2.0, 3.0, 4.0, 5.0], &[2.0, 1.0, 4.0, 3.0, 5.0]).unwrap() - 0.8).abs() < 1e-12);
        assert_eq!(ranks(&[5.0, 1.0, 5.0, 7.0]), [1.5, 0.0, 1.5, 3.0]);
        assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), None);
        assert_eq!(spearman(&[], &[]), None);
    }

    #[test]
    fn what_is_no_number_has_no_cosine_and_what_is_gone_none_with_what_was() {
        let cosine = |a: &[f64], b: &[f64]| {
            let mut sum = Cosines::default();
            sum.add(a, b, || "none".to_owned()).map(|()| sum.mean())
        };
        assert_eq!(cosine(&[3.0, 4.0], &[6.0, 8.0]).unwrap(), 1.0);
        assert_eq!(cosine(&[0.0, 0.0], &[0.0, 0.0]).unwrap(), 1.0);
        assert_eq!([cosine(&[0.0], &[2.0]).unwrap(), cosine(&[2.0], &[0.0]).unwrap()], [0.0; 2]);
        for (a, b) in [(f64::NAN, f64::NAN), (f64::NAN, 1.0), (1.0, f64::INFINITY), (0.0, f64::NAN)] {
            assert!(cosine(&[1.0, a], &[1.0, b]).is_err() && cosine(&[b], &[a]).is_err(), "{a}, {b}");
        }
    }

    #[test]
    fn labels_agree_by_their_highest_score_or_one_by_one() {
        let all = [[vec![1.0, 0.5], vec![1.0, 2.0]], [vec![-1.0, 0.5], vec![-3.0, 0.75]]];
        let one = scores(&all, None).unwrap();
        assert_eq!((one.label_agreement, one.labels, one.rank_correlation), (Some(0.5), 2, None));
        assert_eq!((one.difference_max, one.difference_mean), (2.0, (0.0 + 1.5 + 2.0 + 0.25) / 4.0));
        let labels = Labels { layers: Vec::new(), tokens: false, pad: None, several: true };
        assert_eq!(scores(&all, Some(&labels)).unwrap().label_agreement, Some(1.0));
        assert!(scores(&[], None).is_none());
    }
}
