//! Attention to the tokens of a window, and beside it to entries that stand for blocks of tokens, all of them or a choice (DeepSeek V4).
//!
//! An entry is key and value in one, and stands at the last token of its block: from there on it is seen. The part of the window costs as much for each
//! token however long the text is; that of the entries a block's share of attention to all, or as much as is chosen.

use ndarray::{Array2, ArrayView2, s};

use super::attention::{Task, in_tasks, of_head, plain_mix, plain_score, softmax};
use super::sparse::{SPARSE, dots, mix};
use super::{Shared, gemm};
use crate::backend::AttentionShape;

/// What is seen beside the window.
#[derive(Clone, Copy)]
pub struct Far<'a> {
    /// `[tokens, kv_heads · head_dim]`, of which the last row of each whole block is read.
    pub values: ArrayView2<'a, f32>,
    /// Tokens of a block.
    pub block: usize,
    /// For each query the blocks that it sees, −1 behind them.
    pub chosen: Option<ArrayView2<'a, f32>>,
}

/// The plain loop, in `f64`.
pub fn reference(
    [q, k, v]: [ArrayView2<f32>; 3],
    far: Far<'_>,
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    lengths: &[usize],
) -> Array2<f32> {
    let AttentionShape { heads, kv_heads, head_dim, value_dim, scale, .. } = *shape;
    let Far { values, block, chosen } = far;
    let mut out = Array2::zeros((q.nrows(), heads * value_dim));
    let mut start = 0;
    for &length in lengths {
        for (head, query) in (0..heads).flat_map(|head| (0..length).map(move |query| (head, query))) {
            let kv_head = head / (heads / kv_heads);
            let sees = |entry: &usize| {
                chosen.is_none_or(|chosen| chosen.row(start + query).iter().any(|index| *index == *entry as f32))
            };
            let entries = (0..(query + 1) / block).filter(sees);
            let keys: Vec<(bool, usize)> = (shape.first_seen(query)..=query)
                .map(|key| (false, start + key))
                .chain(entries.map(|entry| (true, start + (entry + 1) * block - 1)))
                .collect();
            let own = of_head(&q, [start + query, head], head_dim);
            let of = |(is_entry, row): &(bool, usize), near, width| {
                of_head(if *is_entry { &values } else { near }, [*row, kv_head], width)
            };
            let scores: Vec<f64> = keys.iter().map(|key| plain_score(own, of(key, &k, head_dim), scale)).collect();
            let sink = sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
            let seen: Vec<_> = keys.iter().map(|key| of(key, &v, value_dim)).collect();
            let out = out.slice_mut(s![start + query, head * value_dim..(head + 1) * value_dim]);
            plain_mix(&scores, sink, &seen, out);
        }
        start += length;
    }
    out
}

/// One task for 64 queries of a head.
pub fn run(
    qkv: [ArrayView2<f32>; 3],
    far: Far<'_>,
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    lengths: &[usize],
) -> Array2<f32> {
    let tokens = qkv[0].nrows();
    let [q, k, v] = qkv.map(|m| m.to_slice().expect("a contiguous matrix"));
    let layer = Layer {
        q,
        k,
        v,
        entries: far.values.to_slice().expect("a contiguous matrix"),
        chosen: far.chosen.map(|m| (m.to_slice().expect("a contiguous matrix"), m.ncols())),
        block: far.block,
        sinks,
        shape,
    };
    in_tasks(tokens, shape, lengths, |scratch: &mut Scratch, task, target| {
        // SAFETY: the slices hold all tokens, and each task writes its own queries of its own head.
        unsafe { scratch.attend(&layer, task, target) };
    })
}

/// What all tasks read.
struct Layer<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    entries: &'a [f32],
    /// Choices, and the numbers of each.
    chosen: Option<(&'a [f32], usize)>,
    block: usize,
    sinks: Option<&'a [f32]>,
    shape: &'a AttentionShape,
}

/// Keys that are values, or one of both, of one head: so many rows, so far from one to the next.
struct Rows<'a> {
    values: &'a [f32],
    count: usize,
    stride: usize,
}

impl Rows<'_> {
    /// Scores of `count` queries of `depth` values with all of them.
    ///
    /// # Safety
    /// All rows are there, and the pointers have so many queries and scores, with their strides.
    unsafe fn score(
        &self,
        [count, depth]: [usize; 2],
        (queries, cols): (*const f32, usize),
        (scores, wide): (*mut f32, usize),
        scale: f32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let (shape, keys) = ([count, self.count, depth], self.values.as_ptr());
            gemm(shape, scores, [wide, 1], false, queries, [cols, 1], keys, [1, self.stride], [0.0, scale]);
        }
    }

    /// Sums of them with these weights, added to what is there if that is to be kept.
    ///
    /// # Safety
    /// As of [`score`](Self::score).
    unsafe fn mix(
        &self,
        [count, width]: [usize; 2],
        (weights, wide): (*const f32, usize),
        (out, cols): (*mut f32, usize),
        keep: bool,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let (shape, values) = ([count, width, self.count], self.values.as_ptr());
            gemm(shape, out, [cols, 1], keep, weights, [wide, 1], values, [self.stride, 1], [1.0, 1.0]);
        }
    }
}

impl Layer<'_> {
    /// The entries that a query sees, where they were chosen.
    fn seen(&self, token: usize, seen: &mut Vec<usize>) {
        seen.clear();
        let Some((chosen, most)) = self.chosen else { return };
        let chosen = chosen[token * most..][..most].iter().take_while(|index| **index >= 0.0);
        seen.extend(chosen.map(|index| *index as usize));
    }
}

#[derive(Default)]
struct Scratch {
    /// `[queries, tokens of the windows and then entries]`.
    scores: Vec<f32>,
    /// Of the entries that one query sees.
    own: Vec<f32>,
    seen: Vec<usize>,
}

impl Scratch {
    /// # Safety
    /// The layer and the target have the task's tokens, and nobody else writes to these queries of this head.
    unsafe fn attend(&mut self, layer: &Layer<'_>, task: &Task, target: Shared<f32>) {
        let AttentionShape { heads, kv_heads, head_dim, value_dim, scale, .. } = *layer.shape;
        let Task { start, head, query, count, .. } = *task;
        let kv_head = head / (heads / kv_heads);
        let [q_cols, k_cols, out_cols] = [heads * head_dim, kv_heads * head_dim, heads * value_dim];
        let sink = layer.sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head]);
        let first = layer.shape.first_seen(query);
        let (near, there) = (query + count - first, (query + count) / layer.block);
        let most = layer.chosen.map_or(there, |(_, most)| most);
        // All entries, in one product, unless that takes longer than gathering those that are chosen.
        let whole = there <= SPARSE.saturating_mul(most);
        let wide = near + if whole { there } else { most };
        let Scratch { scores, own, seen } = self;
        scores.clear();
        scores.resize(count * wide, f32::NEG_INFINITY);
        let queries = &layer.q[(start + query) * q_cols + head * head_dim..];
        let skipped = (start + first) * k_cols + kv_head * head_dim;
        let [k, v] = [layer.k, layer.v].map(|m| Rows { values: &m[skipped..], count: near, stride: k_cols });
        // None where there is no whole block: the first would stand behind all tokens.
        let at = (start + layer.block - 1) * k_cols + kv_head * head_dim;
        let far =
            Rows { values: layer.entries.get(at..).unwrap_or_default(), count: there, stride: layer.block * k_cols };
        let tile = scores.as_mut_ptr();
        // SAFETY: the caller's promise, and scratch is as wide as both parts.
        unsafe {
            k.score([count, head_dim], (queries.as_ptr(), q_cols), (tile, wide), scale);
            if whole && there > 0 {
                far.score([count, head_dim], (queries.as_ptr(), q_cols), (tile.add(near), wide), scale);
            }
        }
        for (row, scores) in scores.chunks_exact_mut(wide).enumerate() {
            let position = query + row;
            let (window, entries) = scores.split_at_mut(near);
            window[..layer.shape.first_seen(position) - first].fill(f32::NEG_INFINITY);
            window[position + 1 - first..].fill(f32::NEG_INFINITY);
            layer.seen(start + position, seen);
            if layer.chosen.is_none() {
                entries[(position + 1) / layer.block..].fill(f32::NEG_INFINITY);
            } else if whole {
                own.clear();
                own.extend(seen.iter().map(|entry| entries[*entry]));
                entries.fill(f32::NEG_INFINITY);
                seen.iter().zip(&*own).for_each(|(entry, score)| entries[*entry] = *score);
            } else {
                let query = &queries[row * q_cols..][..head_dim];
                dots(query, far.values, far.stride, seen, scale, &mut entries[..seen.len()]);
            }
            softmax(scores, sink);
        }
        // SAFETY: as above.
        unsafe {
            let out = target.at((start + query) * out_cols + head * value_dim);
            v.mix([count, value_dim], (scores.as_ptr(), wide), (out, out_cols), false);
            if whole && there > 0 {
                far.mix([count, value_dim], (scores.as_ptr().add(near), wide), (out, out_cols), true);
            }
            for (row, weights) in scores.chunks_exact(wide).enumerate().filter(|_| !whole) {
                layer.seen(start + query + row, seen);
                let out = std::slice::from_raw_parts_mut(out.add(row * out_cols), value_dim);
                mix(&weights[near..][..seen.len()], far.values, far.stride, seen, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::sparse::select_reference;
    use super::super::testing::{Noise, close};
    use super::*;
    use crate::backend::IndexShape;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn agrees_with_the_plain_loop(
            (kv_heads, of_each, head_dim) in (1usize..3, 1usize..4, 1usize..40),
            window in prop_oneof![Just(None), (1usize..100).prop_map(Some)],
            block in 1usize..9, count in prop_oneof![Just(None), (1usize..6).prop_map(Some)], sunk: bool,
            lengths in prop::collection::vec(prop_oneof![0usize..5, 60usize..70, 120usize..200], 1..4), seed: u64,
        ) {
            let mut noise = Noise(seed);
            let (tokens, heads) = (lengths.iter().sum(), kv_heads * of_each);
            let scale = (head_dim as f32).powf(-0.5);
            let shape = AttentionShape {
                heads, kv_heads, head_dim, value_dim: head_dim, scale, window, chunk: None, softcap: None, both_ways: false,
            };
            let chosen = count.map(|count| {
                let index = IndexShape {
                    heads: 2, head_dim: 3, scale: 0.5, count, block, local: 0, apart: false, pooled: true, entries: true,
                };
                let [q, k, weights] = [6, 3, 2].map(|cols| noise.matrix(tokens, cols));
                select_reference(q.view(), k.view(), Some(weights.view()), &index, &lengths)
            });
            let q = noise.matrix(tokens, heads * head_dim) * 2.0;
            let [k, v, values] = [(); 3].map(|()| noise.matrix(tokens, kv_heads * head_dim));
            let sinks: Vec<f32> = (0..heads).map(|_| 3.0 * noise.next()).collect();
            let sinks = sunk.then_some(&sinks[..]);
            let far = Far { values: values.view(), block, chosen: chosen.as_ref().map(|m| m.view()) };
            let qkv = [q.view(), k.view(), v.view()];
            let fast = run(qkv, far, sinks, &shape, &lengths);
            let slow = reference(qkv, far, sinks, &shape, &lengths);
            close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 2e-6);
        }
    }
}
