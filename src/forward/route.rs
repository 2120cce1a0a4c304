//! Mixtures of experts: which of them each token is sent to.

use ndarray::ArrayView1;

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
/// factor.
pub fn choose(
    router: &Router,
    logits: ArrayView1<'_, f32>,
    correction: Option<&[f32]>,
    factors: Option<&[f32]>,
) -> Vec<(usize, f32)> {
    let logits = logits.map(|x| x * router.logits);
    let scores: Vec<f32> = match router.scoring {
        Scoring::Sigmoid => logits.iter().map(|x| sigmoid(*x)).collect(),
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
    let chosen = largest(&ranks, router.top_k);
    let sum = match router.renormalize {
        true => chosen.iter().map(|expert| scores[*expert]).sum::<f32>(),
        false => 1.0,
    };
    let scale = |expert: usize| router.scale * factors.map_or(1.0, |factors| factors[expert]);
    chosen.into_iter().map(|expert| (expert, scores[expert] / sum * scale(expert))).collect()
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
        }
    }

    #[test]
    fn the_best_are_chosen_and_weighed() {
        let logits = [4f32, 1.0, 2.0, 3.0].map(f32::ln);
        let found = choose(&router(Scoring::Softmax, None, false), arr1(&logits).view(), None, None);
        assert_eq!(found.iter().map(|x| x.0).collect::<Vec<_>>(), [0, 3]);
        assert!((found[0].1 - 0.8).abs() < 1e-6 && (found[1].1 - 0.6).abs() < 1e-6);
        let found = choose(&router(Scoring::Softmax, None, true), arr1(&logits).view(), None, None);
        assert!((found[0].1 - 8.0 / 7.0).abs() < 1e-6);
    }

    #[test]
    fn corrections_choose_and_do_not_weigh() {
        let logits = arr1(&[0.0, 0.0, 0.0, 0.0]);
        let found = choose(&router(Scoring::Sigmoid, None, false), logits.view(), Some(&[0.0, 3.0, 0.0, 2.0]), None);
        assert_eq!(found, [(1, 1.0), (3, 1.0)]);
    }

    #[test]
    fn groups_limit_the_choice() {
        // The best expert is in the worse group.
        let logits = arr1(&[5.0, -9.0, 3.0, 4.0]);
        let groups = Some(Groups { count: 2, kept: 1, ranked_by: 2 });
        let found = choose(&router(Scoring::Sigmoid, groups, false), logits.view(), None, None);
        assert_eq!(found.iter().map(|x| x.0).collect::<Vec<_>>(), [3, 2]);
    }
}
