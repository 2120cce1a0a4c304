//! Mixtures of experts: which of them each token is sent to.

use formats::Dtype;
use ndarray::ArrayView1;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::graph::{Groups, Router, Scoring};

/// The tokens of a chunk that go to one expert, and its weight in each.
#[derive(Clone, Debug, Default)]
pub struct Routed {
    pub rows: Vec<usize>,
    pub weights: Vec<f32>,
}

pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Indices of the `count` largest values, the first ones of equals.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(count);
    order
}

/// The experts of one token, with their weights; `correction` is added to the scores for choosing, and each weight multiplied by the expert's
/// factor. Where its experts are `told`, nothing is chosen.
pub fn choose(
    router: &Router,
    logits: ArrayView1<'_, f32>,
    correction: Option<&[f32]>,
    factors: Option<&[f32]>,
    told: Option<&[u32]>,
) -> Vec<(usize, f32)> {
    let logits = logits.map(|x| x * router.logits);
    let scores: Vec<f32> = match router.scoring {
        Scoring::Sigmoid => logits.iter().map(|x| sigmoid(*x)).collect(),
        Scoring::RootSoftplus => logits.iter().map(|x| (x.max(0.0) + (-x.abs()).exp().ln_1p()).sqrt()).collect(),
        Scoring::Softmax => {
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let powers: Vec<f32> = logits.iter().map(|x| (x - top).exp()).collect();
            let sum: f32 = powers.iter().sum();
            powers.into_iter().map(|x| x / sum).collect()
        }
    };
    let mut ranks = scores.clone();
    ranks.iter_mut().zip(correction.into_iter().flatten()).for_each(|(rank, c)| *rank += c);
    if let Some(Groups { count, kept, ranked_by }) = router.groups {
        let width = ranks.len() / count;
        let of = |group: &[f32]| largest(group, ranked_by).into_iter().map(|i| group[i]).sum::<f32>();
        let best = largest(&ranks.chunks(width).map(of).collect::<Vec<_>>(), kept);
        let left_out = ranks.iter_mut().enumerate().filter(|(expert, _)| !best.contains(&(expert / width)));
        left_out.for_each(|(_, rank)| *rank = f32::NEG_INFINITY);
    }
    let chosen = match told {
        Some(told) => told.iter().map(|expert| *expert as usize).collect(),
        None => largest(&ranks, router.top_k),
    };
    let sum = match router.renormalize {
        true => chosen.iter().map(|expert| scores[*expert]).sum::<f32>(),
        false => 1.0,
    };
    let scale = |expert: usize| router.scale * factors.map_or(1.0, |factors| factors[expert]);
    let mut found: Vec<(usize, f32)> = Vec::with_capacity(chosen.len());
    for expert in chosen {
        let weight = scores[expert] / sum * scale(expert);
        // A table may name an expert twice, which is then given the token once.
        match found.iter_mut().find(|(known, _)| *known == expert) {
            Some((_, known)) => *known += weight,
            None => found.push((expert, weight)),
        }
    }
    found
}

/// The experts of the token with this id, of those beyond the table the first row's.
pub fn told(table: &[u32], top_k: usize, id: u32) -> &[u32] {
    table.chunks_exact(top_k).nth(id as usize).unwrap_or(&table[..top_k])
}

/// The table of a router that has one, `[ids, top_k]`.
///
/// Fails for one of another shape or of other numbers than those of experts.
pub fn table(source: &Checkpoint, router: &Router) -> Result<Option<Vec<u32>>> {
    let Some((name, shape)) = &router.table else { return Ok(None) };
    let experts = router.linear.rows;
    let number = |n: i64| {
        u32::try_from(n).ok().filter(|n| (*n as usize) < experts).ok_or_else(|| {
            let place = source.path().display();
            Error::failed(format!("{place}: tensor `{name}`: expected experts below {experts}, found {n}"))
        })
    };
    numbers(source, name, shape)?.into_iter().map(number).collect::<Result<Vec<u32>>>().map(Some)
}

/// The whole numbers of a tensor of this shape.
///
/// Fails for one of another shape or type.
pub fn numbers(source: &Checkpoint, name: &str, shape: &[usize]) -> Result<Vec<i64>> {
    let wrong = |found: String| {
        let place = source.path().display();
        Error::failed(format!("{place}: tensor `{name}`: expected whole numbers {shape:?}, found {found}"))
    };
    let Some(raw) = source.raw(name) else { return Err(wrong("none that are stored as such".to_owned())) };
    if raw.shape != shape {
        return Err(wrong(format!("{:?}", raw.shape)));
    }
    match raw.dtype {
        Dtype::I64 => Ok(raw.data.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()),
        Dtype::I32 => Ok(raw.data.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes).into()).collect()),
        other => Err(wrong(format!("{other}"))),
    }
}

#[cfg(test)]
mod tests {
    use ndarray::arr1;

    use super::*;
    use crate::graph::Linear;

    fn router(scoring: Scoring, groups: Option<Groups>, renormalize: bool) -> Router {
        let linear = Linear::plain("router", 4, 1, false);
        Router {
            linear,
            logits: 1.0,
            scoring,
            top_k: 2,
            correction: None,
            groups,
            renormalize,
            scale: 2.0,
            factors: None,
            table: None,
        }
    }

    #[test]
    fn the_best_are_chosen_and_weighed() {
        let logits = [4f32, 1.0, 2.0, 3.0].map(f32::ln);
        let found = choose(&router(Scoring::Softmax, None, false), arr1(&logits).view(), None, None, None);
        assert_eq!(found.iter().map(|x| x.0).collect::<Vec<_>>(), [0, 3]);
        assert!((found[0].1 - 0.8).abs() < 1e-6 && (found[1].1 - 0.6).abs() < 1e-6);
        let found = choose(&router(Scoring::Softmax, None, true), arr1(&logits).view(), None, None, None);
        assert!((found[0].1 - 8.0 / 7.0).abs() < 1e-6);
    }

    #[test]
    fn corrections_choose_and_do_not_weigh() {
        let logits = arr1(&[0.0, 0.0, 0.0, 0.0]);
        let found =
            choose(&router(Scoring::Sigmoid, None, false), logits.view(), Some(&[0.0, 3.0, 0.0, 2.0]), None, None);
        assert_eq!(found, [(1, 1.0), (3, 1.0)]);
    }

    #[test]
    fn groups_limit_the_choice() {
        // The best expert is in the worse group.
        let logits = arr1(&[5.0, -9.0, 3.0, 4.0]);
        let groups = Some(Groups { count: 2, kept: 1, ranked_by: 2 });
        let found = choose(&router(Scoring::Sigmoid, groups, false), logits.view(), None, None, None);
        assert_eq!(found.iter().map(|x| x.0).collect::<Vec<_>>(), [3, 2]);
    }

    #[test]
    fn a_table_says_which_and_scores_say_how_much() {
        let mut router = router(Scoring::RootSoftplus, None, true);
        router.scale = 1.0;
        let logits = arr1(&[3.0, -1.0, 0.5, 9.0]);
        let table = [0, 1, 2, 2];
        let found = choose(&router, logits.view(), None, None, Some(told(&table, 2, 0)));
        let score = |x: f32| (1.0 + x.exp()).ln().sqrt();
        let sum = score(3.0) + score(-1.0);
        assert_eq!(found.iter().map(|x| x.0).collect::<Vec<_>>(), [0, 1]);
        assert!((found[0].1 - score(3.0) / sum).abs() < 1e-6 && (found[1].1 - score(-1.0) / sum).abs() < 1e-6);
        // One that is named twice has the weights of both.
        assert_eq!(choose(&router, logits.view(), None, None, Some(told(&table, 2, 1))), [(2, 1.0)]);
        assert_eq!(told(&table, 2, 7), [0, 1]);
    }
}
