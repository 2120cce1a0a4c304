//! Attention to a choice of tokens: small heads score every earlier token for each query, and attention sees those with the best scores
//! (the lightning indexer of DeepSeek Sparse Attention, DeepSeek-V3.2 2025, arXiv:2512.02556).
//!
//! The choice is a matrix `[tokens, groups · count]`: for each query and each group of heads the positions in its sequence of the blocks that are
//! seen, ascending, and −1 behind them where there are fewer. Of equal scores the earliest are chosen, as torch does where it sorts no more than
//! the best; where it partitions all, it leaves the order open.

use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

use super::attention::{QUERIES, Task, in_tasks, of_head, plain_mix, plain_score, softmax};
use super::{Shared, gemm};
use crate::backend::{AttentionShape, IndexShape};
use crate::simd::{LANES, sum_lanes};
use crate::simd_fn;

/// Up to so many times the tokens that a query sees, all scores of a task are one product: gathering rows one by one takes longer.
pub(super) const SPARSE: usize = 8;

/// The scores of all blocks of a query in a sequence that begins at `start`, for a group of heads, in `f64`.
fn scores(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    weights: Option<ArrayView2<f32>>,
    shape: &IndexShape,
    [start, query, group]: [usize; 3],
) -> Vec<f64> {
    let IndexShape { heads, head_dim, scale, block, local, pooled, .. } = *shape;
    let score = |head: usize, key: usize| {
        let (a, b) = (q.row(start + query), k.row(start + key));
        let products = (0..head_dim).map(|d| f64::from(a[head * head_dim + d]) * f64::from(b[d]));
        products.sum::<f64>() * f64::from(scale) + 0.0
    };
    let of = |key: usize| match weights {
        None => score(group, key),
        Some(weights) => {
            let weighed = |head| f64::from(weights[[start + query, head]]) * score(head, key).max(0.0);
            (0..heads).map(weighed).fold(0.0, |sum, x| sum + x)
        }
    };
    let own = query / block;
    let best = |index: usize| match (index + local > own, pooled) {
        (true, _) => f64::INFINITY,
        (_, true) if (index + 1) * block > query + 1 => f64::INFINITY,
        (_, true) => of((index + 1) * block - 1),
        (false, false) => {
            (index * block..((index + 1) * block).min(query + 1)).map(of).fold(f64::NEG_INFINITY, f64::max)
        }
    };
    (0..shape.there(query)).map(best).collect()
}

/// The plain loop over queries, in `f64`; `weights` are there unless heads choose by themselves.
pub fn select_reference(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    weights: Option<ArrayView2<f32>>,
    shape: &IndexShape,
    lengths: &[usize],
) -> Array2<f32> {
    let mut out = Array2::from_elem((q.nrows(), shape.width()), -1.0);
    let mut start = 0;
    for &length in lengths {
        for query in 0..length {
            for group in 0..shape.groups() {
                let scores = scores(q, k, weights, shape, [start, query, group]);
                let mut order: Vec<usize> = (0..scores.len()).collect();
                order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
                order.truncate(shape.chosen(query));
                order.sort_unstable();
                for (place, index) in order.into_iter().enumerate() {
                    out[[start + query, group * shape.count + place]] = index as f32;
                }
            }
        }
        start += length;
    }
    out
}

/// One task for 64 queries of a sequence and a group of heads.
pub fn select(
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    weights: Option<ArrayView2<f32>>,
    shape: &IndexShape,
    lengths: &[usize],
) -> Array2<f32> {
    let (tokens, width) = (q.nrows(), shape.width());
    let mut out = vec![-1.0f32; tokens * width];
    let target = Shared::new(&mut out);
    let [q, k] = [q, k].map(|m| m.to_slice().expect("a contiguous matrix"));
    let weights = weights.map(|m| m.to_slice().expect("a contiguous matrix"));
    let mut tasks = Vec::new();
    let mut start = 0;
    for &length in lengths {
        for query in (0..length).step_by(QUERIES).rev() {
            tasks.extend((0..shape.groups()).map(|group| (start, length, query, group)));
        }
        start += length;
    }
    tasks.into_par_iter().with_max_len(1).for_each_init(Scored::default, |scored, (start, length, query, group)| {
        let count = QUERIES.min(length - query);
        // Nothing is to be chosen where the last query sees all.
        if !shape.sees_all(query + count) {
            scored.of(q, k, weights, shape, [start, query, count, group]);
        }
        for row in 0..count {
            // SAFETY: the target holds all tokens, and each task writes its own queries of its own group.
            let to = unsafe {
                std::slice::from_raw_parts_mut(
                    target.at((start + query + row) * width + group * shape.count),
                    shape.count,
                )
            };
            scored.choose(row, query + row, query + count, shape, to);
        }
    });
    Array2::from_shape_vec((tokens, width), out).expect("as long as its shape says")
}

/// What a task of [`select`] works in.
#[derive(Default)]
struct Scored {
    /// Of one head, then of all, `[queries, keys]`.
    part: Vec<f32>,
    all: Vec<f32>,
    /// Of the blocks of one query.
    blocks: Vec<f32>,
    order: Vec<usize>,
}

impl Scored {
    /// Scores of `count` queries from `query` on with every token up to the last of them.
    fn of(
        &mut self,
        q: &[f32],
        k: &[f32],
        weights: Option<&[f32]>,
        shape: &IndexShape,
        [start, query, count, group]: [usize; 4],
    ) {
        let IndexShape { heads, head_dim, scale, .. } = *shape;
        let (keys, cols) = (query + count, heads * head_dim);
        self.all.clear();
        self.all.resize(count * keys, 0.0);
        self.part.resize(count * keys, 0.0);
        let chosen = if weights.is_some() { 0..heads } else { group..group + 1 };
        for head in chosen {
            let to = if weights.is_some() { &mut self.part } else { &mut self.all };
            // SAFETY: the slices hold these tokens, and scratch is as long as the shape says.
            unsafe {
                gemm(
                    [count, keys, head_dim],
                    to.as_mut_ptr(),
                    [keys, 1],
                    false,
                    q.as_ptr().add((start + query) * cols + head * head_dim),
                    [cols, 1],
                    k.as_ptr().add(start * head_dim),
                    [1, head_dim],
                    [0.0, scale],
                );
            }
            if let Some(weights) = weights {
                let rows = self.all.chunks_exact_mut(keys).zip(self.part.chunks_exact(keys)).enumerate();
                rows.for_each(|(row, (sum, part))| {
                    add_positive(sum, part, weights[(start + query + row) * heads + head]);
                });
            }
        }
    }

    /// Writes which blocks the query at `position` sees, row `row` of scores of `keys` tokens.
    fn choose(&mut self, row: usize, position: usize, keys: usize, shape: &IndexShape, to: &mut [f32]) {
        let IndexShape { block, local, pooled, .. } = *shape;
        let (count, there) = (shape.chosen(position), shape.there(position));
        if there <= count {
            to[..there].iter_mut().enumerate().for_each(|(index, to)| *to = index as f32);
            return;
        }
        let scores = &self.all[row * keys..][..position + 1];
        self.blocks.clear();
        // −0 is no less than 0.
        let best = |block: &[f32]| block.iter().copied().fold(f32::NEG_INFINITY, f32::max) + 0.0;
        match pooled {
            // A block that is not whole is seen whatever its score would be.
            true => self.blocks.extend(
                scores
                    .chunks(block)
                    .take(there)
                    .map(|of| if of.len() == block { of[block - 1] + 0.0 } else { f32::INFINITY }),
            ),
            false => self.blocks.extend(scores.chunks(block).map(best)),
        }
        self.blocks[there - local.min(there)..].fill(f32::INFINITY);
        self.order.clear();
        self.order.extend(0..there);
        let blocks = &self.blocks;
        self.order.select_nth_unstable_by(count - 1, |a, b| blocks[*b].total_cmp(&blocks[*a]).then(a.cmp(b)));
        let chosen = &mut self.order[..count];
        chosen.sort_unstable();
        to.iter_mut().zip(chosen).for_each(|(to, index)| *to = *index as f32);
    }
}

simd_fn! {
    /// `sum ← sum + weight · max(x, 0)`.
    fn add_positive(sum: &mut [f32], x: &[f32], weight: f32) {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += weight * if *x > 0.0 { *x } else { 0.0 };
        }
    }
}

/// The tokens that a query at `position` sees, by its row of the choice for one group of heads.
fn seen(chosen: &[f32], position: usize, block: usize) -> impl Iterator<Item = usize> {
    let blocks = chosen.iter().take_while(|index| **index >= 0.0).map(|index| *index as usize);
    blocks.flat_map(move |index| index * block..((index + 1) * block).min(position + 1))
}

/// Attention to what was chosen: the plain loop, in `f64`.
pub fn attend_reference(
    [q, k, v]: [ArrayView2<f32>; 3],
    chosen: ArrayView2<f32>,
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    index: &IndexShape,
    lengths: &[usize],
) -> Array2<f32> {
    let AttentionShape { heads, kv_heads, head_dim, value_dim, scale, .. } = *shape;
    let mut out = Array2::zeros((q.nrows(), heads * value_dim));
    let mut start = 0;
    for &length in lengths {
        for (head, query) in (0..heads).flat_map(|head| (0..length).map(move |query| (head, query))) {
            let (kv_head, group) = (head / (heads / kv_heads), head / (heads / index.groups()));
            let row = chosen.row(start + query).to_vec();
            let keys: Vec<usize> = seen(&row[group * index.count..][..index.count], query, index.block).collect();
            let own = of_head(&q, [start + query, head], head_dim);
            let score = |key: &usize| plain_score(own, of_head(&k, [start + key, kv_head], head_dim), scale);
            let scores: Vec<f64> = keys.iter().map(score).collect();
            let sink = sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
            let values: Vec<_> = keys.iter().map(|key| of_head(&v, [start + key, kv_head], value_dim)).collect();
            let out = out.slice_mut(s![start + query, head * value_dim..(head + 1) * value_dim]);
            plain_mix(&scores, sink, &values, out);
        }
        start += length;
    }
    out
}

/// One task for 64 queries of a head.
pub fn attend(
    qkv: [ArrayView2<f32>; 3],
    chosen: ArrayView2<f32>,
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    index: &IndexShape,
    lengths: &[usize],
) -> Array2<f32> {
    let tokens = qkv[0].nrows();
    let [q, k, v] = qkv.map(|m| m.to_slice().expect("a contiguous matrix"));
    let layer = Layer { q, k, v, chosen: chosen.to_slice().expect("a contiguous matrix"), sinks, shape, index };
    in_tasks(tokens, shape, lengths, |scratch: &mut Scratch, task, target| {
        // SAFETY: the slices hold all tokens, and each task writes its own queries of its own head.
        unsafe { scratch.attend(&layer, task, target) };
    })
}

/// What all tasks of [`attend`] read.
struct Layer<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    chosen: &'a [f32],
    sinks: Option<&'a [f32]>,
    shape: &'a AttentionShape,
    index: &'a IndexShape,
}

#[derive(Default)]
struct Scratch {
    /// `[queries, keys]`, where all are computed.
    scores: Vec<f32>,
    /// Of the tokens that one query sees.
    own: Vec<f32>,
    seen: Vec<usize>,
}

impl Scratch {
    /// # Safety
    /// The layer and the target have the task's tokens, and nobody else writes to these queries of this head.
    unsafe fn attend(&mut self, layer: &Layer<'_>, task: &Task, target: Shared<f32>) {
        let AttentionShape { heads, kv_heads, head_dim, value_dim, scale, .. } = *layer.shape;
        let Task { start, head, query, count, .. } = *task;
        let (kv_head, group) = (head / (heads / kv_heads), head / (heads / layer.index.groups()));
        let [q_cols, k_cols, v_cols] = [heads * head_dim, kv_heads * head_dim, kv_heads * value_dim];
        let out_cols = heads * value_dim;
        let sink = layer.sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head]);
        let keys = query + count;
        let whole = keys <= SPARSE * layer.index.tokens();
        let Scratch { scores, own, seen: tokens } = self;
        let queries = &layer.q[(start + query) * q_cols + head * head_dim..];
        let (k, v) =
            (&layer.k[start * k_cols + kv_head * head_dim..], &layer.v[start * v_cols + kv_head * value_dim..]);
        if whole {
            scores.resize(count * keys, 0.0);
            let product = [count, keys, head_dim];
            let scores = scores.as_mut_ptr();
            // SAFETY: the caller's promise, and scratch is as long as the shape says.
            unsafe {
                gemm(
                    product,
                    scores,
                    [keys, 1],
                    false,
                    queries.as_ptr(),
                    [q_cols, 1],
                    k.as_ptr(),
                    [1, k_cols],
                    [0.0, scale],
                );
            }
        }
        for row in 0..count {
            let chosen = &layer.chosen[(start + query + row) * layer.index.width() + group * layer.index.count..];
            tokens.clear();
            tokens.extend(seen(&chosen[..layer.index.count], query + row, layer.index.block));
            own.clear();
            if whole {
                let scores = &mut scores[row * keys..][..keys];
                own.extend(tokens.iter().map(|token| scores[*token]));
                softmax(own, sink);
                scores.fill(0.0);
                tokens.iter().zip(&*own).for_each(|(token, weight)| scores[*token] = *weight);
                continue;
            }
            own.resize(tokens.len(), 0.0);
            dots(&queries[row * q_cols..][..head_dim], k, k_cols, tokens, scale, own);
            softmax(own, sink);
            // SAFETY: the caller's promise.
            let out = unsafe {
                let at = target.at((start + query + row) * out_cols + head * value_dim);
                std::slice::from_raw_parts_mut(at, value_dim)
            };
            out.fill(0.0);
            mix(own, v, v_cols, tokens, out);
        }
        if whole {
            let product = [count, value_dim, keys];
            // SAFETY: the caller's promise, and scratch is as long as the shape says.
            unsafe {
                let out = target.at((start + query) * out_cols + head * value_dim);
                gemm(
                    product,
                    out,
                    [out_cols, 1],
                    false,
                    scores.as_ptr(),
                    [keys, 1],
                    v.as_ptr(),
                    [v_cols, 1],
                    [0.0, 1.0],
                );
            }
        }
    }
}

simd_fn! {
    /// `out[i] ← scale · query · keys[tokens[i]]`, rows of `keys` `stride` apart.
    pub(super) fn dots(query: &[f32], keys: &[f32], stride: usize, tokens: &[usize], scale: f32, out: &mut [f32]) {
        for (out, token) in out.iter_mut().zip(tokens) {
            let key = &keys[token * stride..][..query.len()];
            let mut lanes = [0.0f32; LANES];
            let (a, b) = (query.chunks_exact(LANES), key.chunks_exact(LANES));
            let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
            for (a, b) in a.zip(b) {
                for lane in 0..LANES {
                    lanes[lane] += a[lane] * b[lane];
                }
            }
            *out = scale * (sum_lanes(lanes) + rest);
        }
    }
}

simd_fn! {
    /// `out ← out + Σ weights[i] · values[tokens[i]]`, rows of `values` `stride` apart.
    pub(super) fn mix(weights: &[f32], values: &[f32], stride: usize, tokens: &[usize], out: &mut [f32]) {
        for (weight, token) in weights.iter().zip(tokens) {
            for (out, value) in out.iter_mut().zip(&values[token * stride..]) {
                *out += weight * value;
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Noise, close};
    use super::*;

    /// Queries, keys and weights of an indexer in small whole numbers, whose scores are exact and often equal.
    pub fn whole(noise: &mut Noise, tokens: usize, shape: &IndexShape) -> [Array2<f32>; 3] {
        let mut of = |cols| noise.matrix(tokens, cols).mapv(|x| (2.0 * x).round());
        [of(shape.heads * shape.head_dim), of(shape.head_dim), of(shape.heads)]
    }

    /// Heads that choose together, or each its own blocks.
    pub fn shape(heads: usize, head_dim: usize, count: usize, block: usize, apart: bool) -> IndexShape {
        let local = if apart { 1 } else { 0 };
        IndexShape { heads, head_dim, scale: 0.5, count, block, local, apart, pooled: false, entries: false }
    }

    fn check(index: IndexShape, of: [usize; 4], lengths: &[usize], seed: u64) {
        let mut noise = Noise(seed);
        let tokens = lengths.iter().sum();
        let [q, k, weights] = whole(&mut noise, tokens, &index);
        let weights = (!index.apart).then(|| weights.view());
        let chosen = select(q.view(), k.view(), weights, &index, lengths);
        assert_eq!(chosen, select_reference(q.view(), k.view(), weights, &index, lengths), "{index:?}, {lengths:?}");
        let [kv_heads, of_each, head_dim, value_dim] = of;
        let heads = kv_heads * of_each;
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
            value_dim,
            scale: (head_dim as f32).powf(-0.5),
            window: None,
            chunk: None,
            softcap: None,
            both_ways: false,
        };
        let q = noise.matrix(tokens, heads * head_dim) * 2.0;
        let [k, v] = [head_dim, value_dim].map(|dim| noise.matrix(tokens, kv_heads * dim));
        let qkv = [q.view(), k.view(), v.view()];
        let own: Vec<f32> = (0..heads).map(|_| 3.0 * noise.next()).collect();
        for sinks in [None, Some(&own[..])] {
            let fast = attend(qkv, chosen.view(), sinks, &shape, &index, lengths);
            let slow = attend_reference(qkv, chosen.view(), sinks, &shape, &index, lengths);
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn agrees_with_the_plain_loop(
            heads in 1usize..4, dim in 1usize..20, count in 1usize..12, block in 1usize..5, apart: bool,
            (kv_heads, of_each, head_dim, value_dim) in (1usize..3, 1usize..3, 1usize..40, 1usize..40),
            lengths in prop::collection::vec(prop_oneof![0usize..5, 60usize..70, 120usize..200], 1..4), seed: u64,
        ) {
            let heads = if apart { kv_heads } else { heads };
            let shape = shape(heads, dim, count, block, apart);
            check(shape, [kv_heads, of_each, head_dim, value_dim], &lengths, seed);
            let pooled = IndexShape { count: count + 1, local: 0, pooled: true, ..shape };
            check(pooled, [kv_heads, of_each, head_dim, value_dim], &lengths, seed);
            // Attention reads what they stand for.
            let entries = IndexShape { local: 0, pooled: true, entries: true, ..shape };
            let mut noise = Noise(seed);
            let [q, k, weights] = whole(&mut noise, lengths.iter().sum(), &entries);
            let weights = (!apart).then(|| weights.view());
            let chosen = select(q.view(), k.view(), weights, &entries, &lengths);
            prop_assert_eq!(chosen, select_reference(q.view(), k.view(), weights, &entries, &lengths));
        }
    }

    #[test]
    fn a_choice_of_all_is_attention_to_all() {
        let mut noise = Noise(3);
        let index = shape(2, 4, 100, 1, false);
        let [q, k, weights] = whole(&mut noise, 100, &index);
        let chosen = select(q.view(), k.view(), Some(weights.view()), &index, &[70, 30]);
        assert!(index.sees_all(70) && !index.sees_all(101));
        let shape = AttentionShape {
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            value_dim: 4,
            scale: 0.5,
            window: None,
            chunk: None,
            softcap: None,
            both_ways: false,
        };
        let all = super::super::attention::run(q.view(), k.view(), k.view(), None, &shape, &[70, 30]);
        let qkv = [q.view(), k.view(), k.view()];
        close(
            attend(qkv, chosen.view(), None, &shape, &index, &[70, 30]).as_slice().unwrap(),
            all.as_slice().unwrap(),
            2e-6,
        );
    }

    #[test]
    fn a_block_is_chosen_once_it_is_whole_and_its_own_seen_until_then() {
        let shape = IndexShape { pooled: true, ..shape(1, 1, 2, 2, false) };
        let (q, weights) = (Array2::ones((6, 1)), Array2::ones((6, 1)));
        // Only keys at the ends of blocks count.
        let k = ndarray::arr2(&[[9.0f32], [1.0], [9.0], [3.0], [9.0], [2.0]]);
        let chosen = select(q.view(), k.view(), Some(weights.view()), &shape, &[6]);
        let expected = [[0.0, -1.0], [0.0, -1.0], [0.0, 1.0], [1.0, -1.0], [1.0, 2.0], [1.0, -1.0]];
        assert_eq!(chosen, ndarray::arr2(&expected));
        assert!(shape.sees_all(3) && !shape.sees_all(4));
    }

    #[test]
    fn of_equal_tokens_the_earliest_are_chosen() {
        let index = shape(1, 1, 2, 1, false);
        let (q, weights) = (Array2::ones((5, 1)), Array2::ones((5, 1)));
        let k = ndarray::arr2(&[[-1.0f32], [-2.0], [3.0], [-1.0], [0.0]]);
        let chosen = select(q.view(), k.view(), Some(weights.view()), &index, &[5]);
        assert_eq!(chosen, ndarray::arr2(&[[0.0, -1.0], [0.0, 1.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]));
    }
}
