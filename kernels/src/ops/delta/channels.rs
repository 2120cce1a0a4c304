//! The gated delta rule with a decay for each channel of the keys (Kimi Delta Attention, Kimi Linear 2025, arXiv:2510.26692).
//!
//! What decays between two tokens is then no factor of their product, but of each of its terms. A chunk is worked off in parts of [`ROWS`] tokens:
//! queries and keys of a part as they decay from its beginning meet the keys before it as these decay to its beginning, so that no
//! factor is larger than 1, and all are products. Tokens of one part meet term by term.

use super::{CHUNK, Layer, ROWS, Scratch, correct, gemm, scale_by, solve};
use crate::backend::DeltaShape;
use crate::ops::Shared;
use crate::simd::{LANES, exp, sum_lanes};
use crate::simd_fn;

/// What a task works in besides.
#[derive(Default)]
pub(super) struct Channels {
    /// Queries, then keys, as they decay from the beginning of the chunk or of a part, `[CHUNK, key_dim]`.
    queries: Vec<f32>,
    keys: Vec<f32>,
    /// Keys as they decay to where a part begins, and at last to the end of the chunk, `[CHUNK, key_dim]`.
    kept: Vec<f32>,
    /// Logarithms of the decays behind each token, `[CHUNK, key_dim]`.
    behind: Vec<f32>,
    /// Of the decays up to the token at hand, `[key_dim]`.
    sum: Vec<f32>,
    /// Products of queries with keys, `[CHUNK, CHUNK]`.
    mixes: Vec<f32>,
}

impl Channels {
    fn begin(&mut self, key_dim: usize) {
        for values in [&mut self.queries, &mut self.keys, &mut self.kept, &mut self.behind] {
            values.resize(CHUNK * key_dim, 0.0);
        }
        self.sum.resize(key_dim, 0.0);
        self.mixes.resize(CHUNK * CHUNK, 0.0);
    }

    /// Queries and keys of `count` tokens as they decay from where the first of them begins.
    fn decay(&mut self, layer: &Layer<'_>, [start, count, head]: [usize; 3]) {
        let width = layer.shape.key_dim;
        self.sum.fill(0.0);
        for row in 0..count {
            add(&mut self.sum, layer.decay_of(start + row, head));
            let [query, key] = layer.query_and_key(start + row, head);
            decayed(&mut self.queries[row * width..][..width], query, &self.sum);
            decayed(&mut self.keys[row * width..][..width], key, &self.sum);
        }
    }
}

impl Scratch {
    /// As [`Scratch::advance`], with decays of channels.
    ///
    /// # Safety
    /// The layer and the target have these tokens, and nobody else writes to this head of them.
    pub(super) unsafe fn advance_by_channel(
        &mut self,
        layer: &Layer<'_>,
        [start, count, head]: [usize; 3],
        first: bool,
        target: Shared<f32>,
    ) {
        let DeltaShape { value_heads, key_dim, value_dim, scale, replaces, .. } = layer.shape;
        let value_cols = value_heads * value_dim;
        let Scratch { state, pairs, written, channels, .. } = self;
        channels.begin(key_dim);
        let (pairs, written) = (&mut pairs[..count * count], &mut written[..count * value_dim]);
        let by_state = [count, value_dim, key_dim];
        channels.decay(layer, [start, count, head]);
        let (state_at, written_at) = (state.as_mut_ptr(), written.as_mut_ptr());
        // SAFETY: the caller's promise.
        let out = unsafe { target.at(start * value_cols + head * value_dim) };
        if first || !replaces {
            written.fill(0.0);
        }
        if !first {
            let (queries, keys, rows) = (channels.queries.as_ptr(), channels.keys.as_ptr(), [key_dim, 1]);
            // SAFETY: the caller's promise; scratch is as long as the shapes say.
            unsafe {
                if replaces {
                    gemm(by_state, written_at, [value_dim, 1], false, keys, rows, state_at, [value_dim, 1], [0.0, 1.0]);
                }
                gemm(by_state, out, [value_cols, 1], false, queries, rows, state_at, [value_dim, 1], [0.0, scale]);
            }
        }
        // What is left of the state at the end of the chunk.
        for (row, sum) in state.chunks_exact_mut(value_dim.max(1)).zip(&channels.sum) {
            scale_by(row, exp(*sum));
        }
        for from in (0..count).step_by(ROWS) {
            channels.meet(layer, pairs, [start, count, head], from, ROWS.min(count - from));
        }
        for row in 0..count {
            let beta = layer.beta[(start + row) * value_heads + head];
            scale_by(&mut pairs[row * count..][..row], beta);
            let values = &layer.v[(start + row) * value_cols + head * value_dim..][..value_dim];
            correct(&mut written[row * value_dim..][..value_dim], values, 1.0, beta);
        }
        if replaces {
            solve(pairs, written, [count, value_dim]);
        }
        channels.keep(layer, [start, count, head]);
        let (by_token, by_write) = ([count, value_dim, count], [key_dim, value_dim, count]);
        let (mixes, kept, written) = (channels.mixes.as_ptr(), channels.kept.as_ptr(), written.as_ptr());
        // SAFETY: the caller's promise; scratch is as long as the shapes say.
        unsafe {
            gemm(by_token, out, [value_cols, 1], true, mixes, [count, 1], written, [value_dim, 1], [1.0, 1.0]);
            gemm(by_write, state_at, [value_dim, 1], true, kept, [1, key_dim], written, [value_dim, 1], [1.0, 1.0]);
        }
    }
}

impl Channels {
    /// Keys of `count` tokens as they decay to where the tokens at hand begin.
    fn keep(&mut self, layer: &Layer<'_>, [start, count, head]: [usize; 3]) {
        let width = layer.shape.key_dim;
        for row in 0..count {
            let [_, key] = layer.query_and_key(start + row, head);
            decayed(&mut self.kept[row * width..][..width], key, &self.behind[row * width..][..width]);
        }
    }

    /// Products of the queries and keys of `rows` tokens of a chunk, from its token `from` on, with the keys up to them: those of the keys into
    /// `pairs`, those of the queries into `mixes`, both `[count, count]`.
    fn meet(
        &mut self,
        layer: &Layer<'_>,
        pairs: &mut [f32],
        [start, count, head]: [usize; 3],
        from: usize,
        rows: usize,
    ) {
        let DeltaShape { key_dim, scale, .. } = layer.shape;
        self.decay(layer, [start + from, rows, head]);
        self.keep(layer, [start, from, head]);
        if from > 0 {
            let product = [rows, from, key_dim];
            let (queries, keys, kept) = (self.queries.as_ptr(), self.keys.as_ptr(), self.kept.as_ptr());
            let (row, col) = ([key_dim, 1], [1, key_dim]);
            let at = from * count;
            let (pairs, mixes) = (pairs[at..].as_mut_ptr(), self.mixes[at..].as_mut_ptr());
            // SAFETY: scratch is as long as the shapes say.
            unsafe {
                gemm(product, pairs, [count, 1], false, keys, row, kept, col, [0.0, 1.0]);
                gemm(product, mixes, [count, 1], false, queries, row, kept, col, [0.0, scale]);
            }
        }
        // The whole part lies behind all that is before it.
        for earlier in 0..from {
            add(&mut self.behind[earlier * key_dim..][..key_dim], &self.sum);
        }
        for row in from..from + rows {
            let decay = layer.decay_of(start + row, head);
            let [query, key] = layer.query_and_key(start + row, head);
            for earlier in from..row {
                let behind = &mut self.behind[earlier * key_dim..][..key_dim];
                add(behind, decay);
                let [_, other] = layer.query_and_key(start + earlier, head);
                let [mix, pair] = decayed_products(query, key, other, behind);
                self.mixes[row * count + earlier] = scale * mix;
                pairs[row * count + earlier] = pair;
            }
            self.behind[row * key_dim..][..key_dim].fill(0.0);
            let own = &self.behind[row * key_dim..][..key_dim];
            self.mixes[row * count + row] = scale * decayed_products(query, key, key, own)[0];
            self.mixes[row * count + row + 1..(row + 1) * count].fill(0.0);
        }
    }
}

simd_fn! {
    fn add(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

simd_fn! {
    /// `out ← x · exp(sums)`.
    fn decayed(out: &mut [f32], x: &[f32], sums: &[f32]) {
        for ((out, x), sum) in out.iter_mut().zip(x).zip(sums) {
            *out = x * exp(*sum);
        }
    }
}

simd_fn! {
    /// Products of a query and a key with another key that decayed.
    fn decayed_products(query: &[f32], key: &[f32], other: &[f32], sums: &[f32]) -> [f32; 2] {
        let mut lanes = [[0.0f32; LANES]; 2];
        let whole = other.len() / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            let [query, key, other, sums] = [query, key, other, sums].map(|x| &x[at..at + LANES]);
            for lane in 0..LANES {
                let kept = other[lane] * exp(sums[lane]);
                lanes[0][lane] += query[lane] * kept;
                lanes[1][lane] += key[lane] * kept;
            }
        }
        let mut sums_of = lanes.map(sum_lanes);
        for at in whole..other.len() {
            let kept = other[at] * exp(sums[at]);
            sums_of[0] += query[at] * kept;
            sums_of[1] += key[at] * kept;
        }
        sums_of
    }
}
