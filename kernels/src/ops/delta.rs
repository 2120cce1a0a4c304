//! Linear attention whose state forgets: the gated delta rule (Yang et al. 2024, arXiv:2412.06464), which replaces what the state holds under a
//! key, and the state spaces of Mamba 2 (Dao and Gu 2024, arXiv:2405.21060), which add to it.
//!
//! A task takes one head of one sequence and goes through it in chunks. Within a chunk of `C` tokens, with `c` the decays summed up from its
//! beginning, what the tokens write is the solution `U` of a triangular system,
//! `(1 + tril(diag(β) (K Kᵀ ⊙ D), −1)) U = diag(β) (V − diag(eᶜ) K S)` with `D[i, j] = exp(c[i] − c[j])`: the UT form of the product of
//! Householder-like factors (Yang et al. 2024, arXiv:2406.06484). Then the result is `diag(eᶜ) Q S + tril(Q Kᵀ ⊙ D) U`, and the state
//! becomes `e^c[C] S + Kᵀ diag(e^(c[C] − c)) U`. So all but the solving are products, and the cost grows with the tokens, not with their square.
//! Where the state is only added to, `U` is `diag(β) V`, and nothing is solved: this is the duality of a state space with one decay a head and
//! attention (SSD).
//! Where each channel of the keys decays by itself, `D` is a factor of each term of these products: [`channels`].

mod channels;

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use self::channels::Channels;
use super::{Shared, gemm};
use crate::backend::DeltaShape;
use crate::simd::exp;
use crate::simd_fn;

/// Tokens that are worked off together.
const CHUNK: usize = 64;

/// Rows of the triangular system that are solved one by one before what they say goes into the others by a product.
const ROWS: usize = 16;

/// The plain loop over tokens, in `f64`.
pub fn reference(
    [q, k, v]: [ArrayView2<f32>; 3],
    decay: ArrayView2<f32>,
    beta: ArrayView2<f32>,
    shape: &DeltaShape,
    lengths: &[usize],
) -> Array2<f32> {
    let DeltaShape { key_heads, value_heads, key_dim, value_dim, scale, replaces, .. } = *shape;
    let mut out = Array2::zeros((q.nrows(), value_heads * value_dim));
    let mut start = 0;
    for &length in lengths {
        for head in 0..value_heads {
            let key_head = head / (value_heads / key_heads);
            let mut state = Array2::<f64>::zeros((key_dim, value_dim));
            for token in start..start + length {
                let key = |d: usize| f64::from(k[[token, key_head * key_dim + d]]);
                let query = |d: usize| f64::from(q[[token, key_head * key_dim + d]]) * f64::from(scale);
                for (d, mut row) in state.rows_mut().into_iter().enumerate() {
                    let column = if shape.by_channel { head * key_dim + d } else { head };
                    row *= f64::from(decay[[token, column]]).exp();
                }
                for e in 0..value_dim {
                    let held: f64 = (0..key_dim).map(|d| state[[d, e]] * key(d)).sum();
                    let held = if replaces { held } else { 0.0 };
                    let change = f64::from(beta[[token, head]]) * (f64::from(v[[token, head * value_dim + e]]) - held);
                    (0..key_dim).for_each(|d| state[[d, e]] += key(d) * change);
                    let read: f64 = (0..key_dim).map(|d| state[[d, e]] * query(d)).sum();
                    out[[token, head * value_dim + e]] = read as f32;
                }
            }
        }
        start += length;
    }
    out
}

/// One task for each head of each sequence.
pub fn run(
    [q, k, v]: [ArrayView2<f32>; 3],
    decay: ArrayView2<f32>,
    beta: ArrayView2<f32>,
    shape: &DeltaShape,
    lengths: &[usize],
) -> Array2<f32> {
    let tokens = q.nrows();
    let cols = shape.value_heads * shape.value_dim;
    let mut out = vec![0.0f32; tokens * cols];
    let target = Shared::new(&mut out);
    let [q, k, v, decay, beta] = [q, k, v, decay, beta].map(|m| m.to_slice().expect("a contiguous matrix"));
    let layer = Layer { q, k, v, decay, beta, shape: *shape };
    let mut tasks = Vec::new();
    let mut start = 0;
    for &length in lengths {
        tasks.extend((0..shape.value_heads).map(|head| (start, length, head)));
        start += length;
    }
    tasks.into_par_iter().with_max_len(1).for_each_init(Scratch::default, |scratch, (start, length, head)| {
        scratch.begin(shape);
        for from in (0..length).step_by(CHUNK) {
            let count = CHUNK.min(length - from);
            // SAFETY: the slices hold `start + length` tokens, and each task writes its own tokens of its own head.
            unsafe {
                match shape.by_channel {
                    true => scratch.advance_by_channel(&layer, [start + from, count, head], from == 0, target),
                    false => scratch.advance(&layer, start + from, count, head, from == 0, target),
                }
            };
        }
    });
    Array2::from_shape_vec((tokens, cols), out).expect("as long as its shape says")
}

/// What all tasks read.
struct Layer<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    decay: &'a [f32],
    beta: &'a [f32],
    shape: DeltaShape,
}

impl<'a> Layer<'a> {
    /// The query and the key of a token for a head of values.
    fn query_and_key(&self, token: usize, head: usize) -> [&'a [f32]; 2] {
        let DeltaShape { key_heads, value_heads, key_dim, .. } = self.shape;
        let at = (token * key_heads + head / (value_heads / key_heads)) * key_dim;
        [self.q, self.k].map(|m| &m[at..at + key_dim])
    }

    /// The logarithms of a token's decays, where each channel has its own.
    fn decay_of(&self, token: usize, head: usize) -> &'a [f32] {
        let DeltaShape { value_heads, key_dim, .. } = self.shape;
        &self.decay[(token * value_heads + head) * key_dim..][..key_dim]
    }
}

/// What a task works in.
#[derive(Default)]
struct Scratch {
    /// `[key_dim, value_dim]`.
    state: Vec<f32>,
    /// Decays from one token of the chunk to a later one, `[CHUNK, CHUNK]`.
    between: Vec<f32>,
    /// Products of keys with keys, then of queries with keys, `[CHUNK, CHUNK]`.
    pairs: Vec<f32>,
    /// What the tokens write, `[CHUNK, value_dim]`.
    written: Vec<f32>,
    /// Logarithms of decays from each token to the one at hand.
    sums: Vec<f32>,
    /// Decays from the beginning of the chunk to each token.
    since: Vec<f32>,
    /// For decays of channels.
    channels: Channels,
}

impl Scratch {
    fn begin(&mut self, shape: &DeltaShape) {
        self.state.clear();
        self.state.resize(shape.key_dim * shape.value_dim, 0.0);
        self.between.resize(CHUNK * CHUNK, 0.0);
        self.pairs.resize(CHUNK * CHUNK, 0.0);
        self.written.resize(CHUNK * shape.value_dim, 0.0);
    }

    /// Works off `count` tokens from `start` on.
    ///
    /// # Safety
    /// The layer and the target have these tokens, and nobody else writes to this head of them.
    unsafe fn advance(
        &mut self,
        layer: &Layer<'_>,
        start: usize,
        count: usize,
        head: usize,
        first: bool,
        target: Shared<f32>,
    ) {
        let DeltaShape { key_heads, value_heads, key_dim, value_dim, scale, replaces, .. } = layer.shape;
        let key_head = head / (value_heads / key_heads);
        let (key_cols, value_cols) = (key_heads * key_dim, value_heads * value_dim);
        let Scratch { state, between, pairs, written, sums, since, .. } = self;
        let (pairs, between) = (&mut pairs[..count * count], &mut between[..count * count]);
        let written = &mut written[..count * value_dim];
        sums.clear();
        since.clear();
        let mut sum = 0.0f32;
        // Summed up from each token on its own: differences of sums from the beginning would lose what is small beside them.
        for (row, between) in between.chunks_exact_mut(count).enumerate() {
            let decay = layer.decay[(start + row) * value_heads + head];
            sum += decay;
            since.push(sum);
            sums.iter_mut().for_each(|earlier| *earlier += decay);
            sums.push(0.0);
            between[..=row].copy_from_slice(sums);
            exponents(&mut between[..=row]);
        }
        exponents(since);
        // SAFETY: the slices hold these tokens.
        let [queries, keys] =
            [layer.q, layer.k].map(|m| unsafe { m.as_ptr().add(start * key_cols + key_head * key_dim) });
        let key_rows = [key_cols, 1];
        let (state_at, written_at) = (state.as_mut_ptr(), written.as_mut_ptr());
        // SAFETY: the caller's promise; scratch is as long as the shapes say.
        unsafe {
            let out = target.at(start * value_cols + head * value_dim);
            let out_row = |row: usize| std::slice::from_raw_parts_mut(out.add(row * value_cols), value_dim);
            // K S and Q S, which are nothing yet where the state is.
            let product = [count, value_dim, key_dim];
            if !first {
                gemm(product, out, [value_cols, 1], false, queries, key_rows, state_at, [value_dim, 1], [0.0, scale]);
                (0..count).for_each(|row| scale_by(out_row(row), since[row]));
            }
            if first || !replaces {
                written.fill(0.0);
            } else {
                gemm(product, written_at, [value_dim, 1], false, keys, key_rows, state_at, [value_dim, 1], [0.0, 1.0]);
            }
            let by_key = [count, count, key_dim];
            if replaces {
                gemm(by_key, pairs.as_mut_ptr(), [count, 1], false, keys, key_rows, keys, [1, key_cols], [0.0, 1.0]);
            }
            for row in 0..count {
                let beta = layer.beta[(start + row) * value_heads + head];
                if replaces {
                    multiply(&mut pairs[row * count..][..row], &between[row * count..][..row], beta);
                }
                let values = &layer.v[(start + row) * value_cols + head * value_dim..][..value_dim];
                correct(&mut written[row * value_dim..][..value_dim], values, since[row], beta);
            }
            if replaces {
                solve(pairs, written, [count, value_dim]);
            }
            gemm(by_key, pairs.as_mut_ptr(), [count, 1], false, queries, key_rows, keys, [1, key_cols], [0.0, scale]);
            for row in 0..count {
                multiply(&mut pairs[row * count..][..=row], &between[row * count..][..=row], 1.0);
                pairs[row * count + row + 1..(row + 1) * count].fill(0.0);
            }
            let by_token = [count, value_dim, count];
            let (pairs_at, written_at) = (pairs.as_ptr(), written.as_mut_ptr());
            gemm(by_token, out, [value_cols, 1], true, pairs_at, [count, 1], written_at, [value_dim, 1], [1.0, 1.0]);
            // Each write as it is at the end of the chunk.
            for (row, written) in written.chunks_exact_mut(value_dim.max(1)).enumerate() {
                scale_by(written, between[(count - 1) * count + row]);
            }
            let by_write = [key_dim, value_dim, count];
            let kept = [since[count - 1], 1.0];
            gemm(by_write, state_at, [value_dim, 1], true, keys, [1, key_cols], written_at, [value_dim, 1], kept);
        }
    }
}

/// Solves `(1 + L) X = B` in the place of `B` `[count, width]`, of whose `L` `[count, count]` what lies below the diagonal is looked at.
fn solve(lower: &[f32], x: &mut [f32], [count, width]: [usize; 2]) {
    for first in (0..count).step_by(ROWS) {
        let rows = ROWS.min(count - first);
        let (above, rest) = x.split_at_mut(first * width);
        if first > 0 {
            // SAFETY: the slices are as long as the shapes say.
            unsafe {
                let l = lower.as_ptr().add(first * count);
                let product = [rows, width, first];
                gemm(
                    product,
                    rest.as_mut_ptr(),
                    [width, 1],
                    true,
                    l,
                    [count, 1],
                    above.as_ptr(),
                    [width, 1],
                    [1.0, -1.0],
                );
            }
        }
        for row in 1..rows {
            let (before, here) = rest.split_at_mut(row * width);
            for earlier in 0..row {
                let factor = lower[(first + row) * count + first + earlier];
                subtract(&mut here[..width], &before[earlier * width..][..width], factor);
            }
        }
    }
}

simd_fn! {
    /// `x ← exp(x)`.
    fn exponents(x: &mut [f32]) {
        for x in x.iter_mut() {
            *x = exp(*x);
        }
    }
}

simd_fn! {
    fn scale_by(x: &mut [f32], factor: f32) {
        for x in x.iter_mut() {
            *x *= factor;
        }
    }
}

simd_fn! {
    /// `x ← factor · x · y`.
    fn multiply(x: &mut [f32], y: &[f32], factor: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x *= factor * y;
        }
    }
}

simd_fn! {
    /// `held ← beta · (values − since · held)`.
    fn correct(held: &mut [f32], values: &[f32], since: f32, beta: f32) {
        for (held, value) in held.iter_mut().zip(values) {
            *held = beta * (value - since * *held);
        }
    }
}

simd_fn! {
    /// `y ← y − factor · x`.
    fn subtract(y: &mut [f32], x: &[f32], factor: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y -= factor * x;
        }
    }
}

/// `x ← −rate · clamp(ln(1 + exp(x + bias)))`, a rate and a bias for each column, and the same limits for all.
pub fn decays(x: &mut Array2<f32>, rates: &[f32], bias: &[f32], [least, most]: [f32; 2]) {
    for mut row in x.rows_mut() {
        for ((x, rate), bias) in row.iter_mut().zip(rates).zip(bias) {
            let shifted = *x + bias;
            *x = -rate * (shifted.max(0.0) + (-shifted.abs()).exp().ln_1p()).max(least).min(most);
        }
    }
}

/// `x ← lower · σ(rate · (x + bias))`, a rate and a bias for each column.
pub fn bounded_decays(x: &mut Array2<f32>, rates: &[f32], bias: &[f32], lower: f32) {
    for mut row in x.rows_mut() {
        for ((x, rate), bias) in row.iter_mut().zip(rates).zip(bias) {
            *x = lower / (1.0 + exp(-(rate * (*x + bias))));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Noise, close};
    use super::*;

    /// Queries and keys of unit length, values, decays and betas for so many tokens.
    pub fn layer(noise: &mut Noise, tokens: usize, shape: &DeltaShape) -> [Array2<f32>; 5] {
        let DeltaShape { key_heads, value_heads, key_dim, value_dim, .. } = *shape;
        let [mut q, mut k] = [0, 0].map(|_| noise.matrix(tokens, key_heads * key_dim));
        for m in [&mut q, &mut k] {
            let ones = vec![1.0; key_dim];
            crate::ops::norm::heads(m, key_dim, crate::NormKind::Length, &ones, None, 1e-6);
        }
        let v = noise.matrix(tokens, value_heads * value_dim);
        // From hardly any decay to nearly all of it.
        let decay = noise.matrix(tokens, shape.decays()).mapv(|x| -(4.0 * x - 3.0).exp());
        let beta = noise.matrix(tokens, value_heads).mapv(|x| 1.0 / (1.0 + (-2.0 * x).exp()));
        [q, k, v, decay, beta]
    }

    fn check(shape: DeltaShape, lengths: &[usize], seed: u64) {
        let tokens = lengths.iter().sum();
        let all = layer(&mut Noise(seed), tokens, &shape);
        let [q, k, v, decay, beta] = all.each_ref().map(|m| m.view());
        let fast = run([q, k, v], decay, beta, &shape, lengths);
        let slow = reference([q, k, v], decay, beta, &shape, lengths);
        close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 1e-5);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn agrees_with_the_plain_loop(
            (key_heads, of_each) in (1usize..3, 1usize..4), key_dim in 1usize..40, value_dim in 1usize..40,
            lengths in prop::collection::vec(prop_oneof![0usize..5, 60usize..70, 120usize..200], 1..4), by_channel: bool, seed: u64,
        ) {
            let scale = (key_dim as f32).powf(-0.5);
            let value_heads = key_heads * of_each;
            for replaces in [true, false] {
                let shape = DeltaShape { key_heads, value_heads, key_dim, value_dim, scale, replaces, by_channel };
                check(shape, &lengths, seed);
            }
        }
    }

    #[test]
    fn agrees_with_the_plain_loop_over_many_chunks() {
        for (replaces, by_channel) in [(true, false), (true, true), (false, false), (false, true)] {
            let sizes = DeltaShape {
                key_heads: 1,
                value_heads: 2,
                key_dim: 128,
                value_dim: 128,
                scale: 0.0884,
                replaces,
                by_channel,
            };
            check(sizes, &[700, 64], 3);
        }
    }

    #[test]
    fn a_state_that_forgets_all_at_once_stays_finite() {
        for by_channel in [false, true] {
            let shape = DeltaShape {
                key_heads: 1,
                value_heads: 1,
                key_dim: 4,
                value_dim: 4,
                scale: 0.5,
                replaces: true,
                by_channel,
            };
            let [q, k, v, mut decay, beta] = layer(&mut Noise(5), 200, &shape);
            for ((token, channel), x) in decay.indexed_iter_mut() {
                *x = [0.0, -1e-6, -30.0, -3000.0][(token + channel) % 4];
            }
            let [q, k, v, decay, beta] = [&q, &k, &v, &decay, &beta].map(|m| m.view());
            for shape in [shape, DeltaShape { replaces: false, ..shape }] {
                let fast = run([q, k, v], decay, beta, &shape, &[200]);
                let slow = reference([q, k, v], decay, beta, &shape, &[200]);
                close(fast.as_slice().unwrap(), slow.as_slice().unwrap(), 3e-6);
            }
        }
    }

    #[test]
    fn bounded_decays_agree_with_the_plain_form() {
        let mut x = Array2::from_shape_fn((41, 2), |(row, _)| row as f32 * 0.5 - 10.0);
        let before = x.clone();
        bounded_decays(&mut x, &[1.0, 7.5], &[0.0, -0.25], -5.0);
        for ((row, col), found) in x.indexed_iter() {
            let shifted = (f64::from(before[[row, col]]) + [0.0, -0.25][col]) * [1.0, 7.5][col];
            let expected = -5.0 / (1.0 + (-shifted).exp());
            assert!((f64::from(*found) - expected).abs() <= 3e-6 * expected.abs() + 1e-30, "{found}, not {expected}");
        }
    }

    #[test]
    fn decays_are_never_positive_and_agree_with_the_plain_form() {
        let mut x = Array2::from_shape_fn((41, 2), |(row, _)| row as f32 * 5.0 - 100.0);
        let before = x.clone();
        let mut limited = x.clone();
        decays(&mut x, &[1.0, 7.5], &[0.0, -0.25], [0.0, f32::INFINITY]);
        decays(&mut limited, &[1.0, 7.5], &[0.0, -0.25], [0.5, 20.0]);
        for ((row, col), found) in x.indexed_iter() {
            let shifted = f64::from(before[[row, col]]) + [0.0, -0.25][col];
            let softplus = if shifted > 40.0 { shifted } else { shifted.exp().ln_1p() };
            for (found, softplus) in [(*found, softplus), (limited[[row, col]], softplus.clamp(0.5, 20.0))] {
                let expected = -[1.0, 7.5][col] * softplus;
                let error = (f64::from(found) - expected).abs();
                assert!(error <= 1e-6 * expected.abs() + 1e-40 && found <= 0.0, "{found}, not {expected}");
            }
        }
    }
}
