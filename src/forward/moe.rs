//! Mixtures of experts: choosing them, and running each over the tokens that chose it.

use kernels::Backend;
use ndarray::ArrayView1;

use super::{Chunk, Others, Run, Supply, mlp, product};
use crate::error::Result;
use crate::graph::{Groups, Moe, Router, Scoring};

/// The tokens of a chunk that go to one expert, and its weight in each.
#[derive(Clone, Debug, Default)]
struct Routed {
    rows: Vec<usize>,
    weights: Vec<f32>,
}

pub(super) fn run<B: Backend>(
    run: &Run<'_, B>,
    moe: &Moe,
    supply: &mut dyn Supply<B>,
    chunks: &mut [Chunk<B::Matrix>],
) -> Result<()> {
    let backend = run.backend;
    let routes = route(run, moe, supply, chunks)?;
    let all = 0..chunks.len();
    let tokens = |index: usize| chunks[index].lengths.iter().sum::<usize>();
    let total: usize = all.clone().map(tokens).sum();
    let needed = supply.needs_output(run.last);
    let mut outputs = Vec::new();
    for chunk in chunks.iter() {
        let [rows, cols] = backend.shape(&chunk.hidden);
        outputs.push(backend.zeros(rows, cols)?);
    }
    // Rows are normed one by one: those of one expert need no others.
    let input = |index: usize, rows: &[usize], weights: Option<&[f32]>| -> Result<B::Input> {
        let mut x = run.norm(&backend.select_rows(run.source(chunks, index), rows)?)?;
        if let Some(weights) = weights {
            backend.scale(&mut x, weights, &[])?;
        }
        Ok(backend.input(x)?)
    };
    // About `count` tokens of all chunks, evenly spread.
    let spread = |count: usize, index: usize| -> Vec<usize> {
        let step = total.div_ceil(count.clamp(1, total.max(1))).max(1);
        let before: usize = (0..index).map(tokens).sum();
        (0..tokens(index)).filter(|row| (before + row).is_multiple_of(step)).collect()
    };
    for (expert, routed) in moe.experts.iter().zip(&routes) {
        let weighed = |index: usize| moe.weigh_input.then_some(&routed[index].weights[..]);
        let own = |index: usize| input(index, &routed[index].rows, weighed(index));
        let some = || all.clone().filter(|index| !routed[*index].rows.is_empty());
        let group: Vec<_> = expert.inputs.iter().collect();
        let others = Others {
            inputs: &|count, see| {
                all.clone().try_for_each(|index| match spread(count, index) {
                    rows if rows.is_empty() => Ok(()),
                    rows => see(&input(index, &rows, None)?),
                })
            },
            shared: Some(&run.block.name),
        };
        let inputs = supply.expert(&group, &|see| some().try_for_each(|index| see(&own(index)?)), &others)?;
        let inner: Vec<B::Input> =
            some().map(|index| mlp::activate(backend, expert, &inputs, &own(index)?)).collect::<Result<_>>()?;
        let others = Others {
            inputs: &|count, see| {
                all.clone().try_for_each(|index| match spread(count, index) {
                    rows if rows.is_empty() => Ok(()),
                    rows => see(&mlp::activate(backend, expert, &inputs, &input(index, &rows, None)?)?),
                })
            },
            shared: None,
        };
        let down = supply.expert(&[&expert.down], &|see| inner.iter().try_for_each(&mut *see), &others)?;
        if !needed {
            continue;
        }
        for (x, index) in inner.iter().zip(some()) {
            let y = product(backend, x, &down[0])?;
            let Routed { rows, weights } = &routed[index];
            let ones = vec![1.0; rows.len()];
            let weights = if moe.weigh_input { &ones } else { weights };
            backend.add_rows(&y, rows, weights, &mut outputs[index])?;
        }
    }
    if let Some((shared, gate)) = &moe.shared {
        let loaded = mlp::layer(run, shared, supply, chunks)?;
        let gate = gate.as_ref().map(|gate| supply.router(gate)).transpose()?;
        for index in all.clone().filter(|_| needed) {
            let x = loaded.inner(run, shared, chunks, index)?;
            let mut y = product(backend, &x, &loaded.down)?;
            if let Some(gate) = &gate {
                let logits = product(backend, &run.input(chunks, index)?, gate)?;
                let share: Vec<f32> = backend.download(&logits)?.iter().map(|x| sigmoid(*x)).collect();
                backend.scale(&mut y, &share, &[])?;
            }
            backend.add_scaled(&y, 1.0, &mut outputs[index])?;
        }
    }
    if !needed {
        return Ok(());
    }
    chunks.iter_mut().zip(outputs).try_for_each(|(chunk, output)| run.add_output(output, &mut chunk.hidden))
}

/// Sends every token to its experts: for each expert, its tokens in every chunk.
fn route<B: Backend>(
    run: &Run<'_, B>,
    moe: &Moe,
    supply: &mut dyn Supply<B>,
    chunks: &[Chunk<B::Matrix>],
) -> Result<Vec<Vec<Routed>>> {
    let backend = run.backend;
    let weight = supply.router(&moe.router.linear)?;
    let correction = moe.router.correction.as_ref().map(|(name, _)| supply.vector(name)).transpose()?;
    let mut routes = vec![vec![Routed::default(); chunks.len()]; moe.experts.len()];
    for index in 0..chunks.len() {
        let logits = product(backend, &run.input(chunks, index)?, &weight)?;
        for (row, logits) in backend.download(&logits)?.rows().into_iter().enumerate() {
            for (expert, weight) in choose(&moe.router, logits, correction.as_deref()) {
                routes[expert][index].rows.push(row);
                routes[expert][index].weights.push(weight);
            }
        }
    }
    Ok(routes)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Indices of the `count` largest values, the first ones of equals.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(count);
    order
}

/// The experts of one token, with their weights.
fn choose(router: &Router, logits: ArrayView1<'_, f32>, correction: Option<&[f32]>) -> Vec<(usize, f32)> {
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
    chosen.into_iter().map(|expert| (expert, scores[expert] / sum * router.scale)).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::arr1;

    use super::*;
    use crate::graph::Linear;

    fn router(scoring: Scoring, groups: Option<Groups>, renormalize: bool) -> Router {
        let linear = Linear::plain("router", 4, 1, false);
        Router { linear, scoring, top_k: 2, correction: None, groups, renormalize, scale: 2.0 }
    }

    #[test]
    fn the_best_are_chosen_and_weighed() {
        let logits = [4f32, 1.0, 2.0, 3.0].map(f32::ln);
        let found = choose(&router(Scoring::Softmax, None, false), arr1(&logits).view(), None);
        assert_eq!(found.iter().map(|x| x.0).collect::<Vec<_>>(), [0, 3]);
        assert!((found[0].1 - 0.8).abs() < 1e-6 && (found[1].1 - 0.6).abs() < 1e-6);
        let found = choose(&router(Scoring::Softmax, None, true), arr1(&logits).view(), None);
        assert!((found[0].1 - 8.0 / 7.0).abs() < 1e-6);
    }

    #[test]
    fn corrections_choose_and_do_not_weigh() {
        let logits = arr1(&[0.0, 0.0, 0.0, 0.0]);
        let found = choose(&router(Scoring::Sigmoid, None, false), logits.view(), Some(&[0.0, 3.0, 0.0, 2.0]));
        assert_eq!(found, [(1, 1.0), (3, 1.0)]);
    }

    #[test]
    fn groups_limit_the_choice() {
        // The best expert is in the worse group.
        let logits = arr1(&[5.0, -9.0, 3.0, 4.0]);
        let groups = Some(Groups { count: 2, kept: 1, ranked_by: 2 });
        let found = choose(&router(Scoring::Sigmoid, groups, false), logits.view(), None);
        assert_eq!(found.iter().map(|x| x.0).collect::<Vec<_>>(), [3, 2]);
    }
}
