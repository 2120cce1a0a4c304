//! Attention to a choice of tokens.

use super::{Address, Cuda, Matrix, Module, Operand, Operands, Product, Real, at};
use crate::Result;
use crate::backend::{AttentionShape, Entries, IndexShape, Memory};
use crate::checks::{expect_choice, expect_entries, expect_index, expect_pool};
use crate::ops::pool::starts;

pub(super) static SPARSE: Module = Module { name: "sparse", source: include_str!("../ops/sparse.cu") };

/// Threads of a block of `choose`, as the kernel has it, and of one of `attend_chosen`.
const CHOOSING: u32 = 256;
const ATTENDING: u32 = 128;

/// Columns of values that a block of `attend_chosen` sums up.
const COLUMNS: usize = 128;

/// Scores that are in memory at a time.
const SCORES: usize = 1 << 24;

impl Cuda {
    pub(super) fn chosen(
        &self,
        q: &Matrix,
        k: &Matrix,
        weights: Option<&Matrix>,
        shape: &IndexShape,
        lengths: &[usize],
    ) -> Result<Matrix> {
        let of = |m: &Matrix| [m.rows, m.cols];
        expect_index([of(q), of(k)], weights.map(of), shape, lengths)?;
        let out = self.matrix(q.rows, shape.width())?;
        let mut start = 0;
        for &length in lengths {
            let rows = (SCORES / length.max(1)).clamp(1, length.max(1));
            for query in (0..length).step_by(rows) {
                let count = rows.min(length - query);
                for group in 0..shape.groups() {
                    self.choose([q, k], weights, shape, [start, query, count, group], &out)?;
                }
            }
            start += length;
        }
        Ok(out)
    }

    /// Writes the choices of `count` queries from `query` on for a group of heads.
    fn choose(
        &self,
        [q, k]: [&Matrix; 2],
        weights: Option<&Matrix>,
        shape: &IndexShape,
        [start, query, count, group]: [usize; 4],
        out: &Matrix,
    ) -> Result<()> {
        let IndexShape { heads, head_dim, scale, .. } = *shape;
        let keys = query + count;
        let part = self.matrix(count, keys)?;
        let sum = weights.map(|_| self.matrix(count, keys)).transpose()?;
        // Nothing is to be chosen where the last query sees all.
        let scored = match weights {
            _ if shape.sees_all(keys) => 0..0,
            Some(_) => 0..heads,
            None => group..group + 1,
        };
        for head in scored {
            let (a, b, c) = (q.buffer.pin_to_read()?, k.buffer.pin_to_read()?, part.buffer.pin()?);
            let after = |at: Address, values: usize| at + (4 * values) as Address;
            self.device().product(&Product {
                real: Real::F32,
                shape: [count, keys, head_dim],
                a: Operand {
                    at: after(a.at, (start + query) * heads * head_dim + head * head_dim),
                    stride: heads * head_dim,
                    transposed: false,
                },
                b: Operand { at: after(b.at, start * head_dim), stride: head_dim, transposed: true },
                c: Operand { at: c.at, stride: keys, transposed: false },
                alpha: scale.into(),
                beta: 0.0,
            })?;
            if let (Some(weights), Some(sum)) = (weights, &sum) {
                let (sum, weights) = (sum.buffer.pin()?, weights.buffer.pin_to_read()?);
                let args = [
                    sum.arg(),
                    c.arg(),
                    weights.arg(),
                    ((start + query) as i64).into(),
                    (count as i64).into(),
                    (keys as i64).into(),
                    (heads as i32).into(),
                    (head as i32).into(),
                    i32::from(head > 0).into(),
                ];
                self.each(&SPARSE, "add_scores", count * keys, &args)?;
            }
        }
        let (to, scores) = (out.buffer.pin()?, sum.as_ref().unwrap_or(&part).buffer.pin_to_read()?);
        let args = [
            to.arg(),
            scores.arg(),
            ((start + query) as i64).into(),
            (query as i32).into(),
            (keys as i64).into(),
            (shape.width() as i32).into(),
            ((group * shape.count) as i32).into(),
            (shape.count as i32).into(),
            (shape.block as i32).into(),
            (shape.local.min(i32::MAX as usize / 2) as i32).into(),
            i32::from(shape.pooled).into(),
            i32::from(shape.entries).into(),
        ];
        self.grid(&SPARSE, "choose", [count, 1, 1], CHOOSING, 0, &args)
    }

    pub(super) fn pooled(
        &self,
        x: &Matrix,
        gates: &Matrix,
        places: &[f32],
        (block, overlap): (usize, bool),
        lengths: &[usize],
    ) -> Result<Matrix> {
        expect_pool([x.rows, x.cols], [gates.rows, gates.cols], places, (block, overlap), lengths)?;
        let channels = x.cols / if overlap { 2 } else { 1 };
        let out = self.zeros(x.rows, channels)?;
        let starts = starts(block, lengths);
        let sent: Vec<u32> = starts.iter().flat_map(|(start, behind)| [*start as u32, u32::from(*behind)]).collect();
        let (sent, count) = (self.send(&sent)?, starts.len());
        let places = self.send(places)?;
        let pins =
            (out.buffer.pin()?, x.buffer.pin_to_read()?, gates.buffer.pin_to_read()?, places.pin()?, sent.pin()?);
        let args = [
            pins.0.arg(),
            pins.1.arg(),
            pins.2.arg(),
            pins.3.arg(),
            pins.4.arg(),
            (count as i64).into(),
            (channels as i32).into(),
            (block as i32).into(),
            i32::from(overlap).into(),
        ];
        self.each(&SPARSE, "pool_blocks", count * channels, &args)?;
        drop(pins);
        Ok(out)
    }

    pub(super) fn attend_to(
        &self,
        qkv: [&Matrix; 3],
        chosen: &Matrix,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        index: &IndexShape,
        lengths: &[usize],
    ) -> Result<Operands> {
        let of = |m: &Matrix| [m.rows, m.cols];
        expect_choice(qkv.map(of), of(chosen), sinks, shape, index, lengths)?;
        let seen = Seen { near: 0, entries: None, chosen: Some(chosen), groups: index.groups(), block: index.block };
        self.attend_seen(qkv, seen, sinks, shape, lengths)
    }

    pub(super) fn attend_beside(
        &self,
        qkv: [&Matrix; 3],
        entries: &Entries<'_, Matrix>,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Operands> {
        let of = |m: &Matrix| [m.rows, m.cols];
        let Entries { values, block, chosen } = *entries;
        expect_entries(qkv.map(of), of(values), (block, chosen.map(of)), sinks, shape, lengths)?;
        let near = shape.window.unwrap_or(usize::MAX).min(i32::MAX as usize);
        self.attend_seen(qkv, Seen { near, entries: Some(values), chosen, groups: 1, block }, sinks, shape, lengths)
    }

    fn attend_seen(
        &self,
        [q, k, v]: [&Matrix; 3],
        seen: Seen<'_>,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Operands> {
        let Seen { near, entries, chosen, groups, block } = seen;
        let AttentionShape { heads, kv_heads, head_dim, value_dim, scale, .. } = *shape;
        let mut places = Vec::with_capacity(2 * q.rows);
        let mut start = 0;
        for &length in lengths {
            places.extend((0..length).flat_map(|position| [position as i32, start as i32]));
            start += length;
        }
        let out = self.matrix(q.rows, heads * value_dim)?;
        if q.rows > 0 {
            let (places, sinks) = (self.send(&places)?, sinks.map(|sinks| self.send(sinks)).transpose()?);
            let sinks = sinks.as_ref().map(|sinks| sinks.pin()).transpose()?;
            let [far, picked] = [entries, chosen].map(|m| m.map(|m| m.buffer.pin_to_read()).transpose());
            let (far, picked) = (far?, picked?);
            let pins = (out.buffer.pin()?, places.pin()?);
            let [q_at, k_at, v_at] = [q, k, v].map(|m| m.buffer.pin_to_read());
            let (q_at, k_at, v_at) = (q_at?, k_at?, v_at?);
            let args = [
                pins.0.arg(),
                q_at.arg(),
                k_at.arg(),
                v_at.arg(),
                at(far.as_ref()),
                at(picked.as_ref()),
                at(sinks.as_ref()),
                pins.1.arg(),
                (q.rows as i64).into(),
                (heads as i32).into(),
                (kv_heads as i32).into(),
                (head_dim as i32).into(),
                (value_dim as i32).into(),
                scale.into(),
                (groups as i32).into(),
                (chosen.map_or(0, |m| m.cols / groups) as i32).into(),
                (block as i32).into(),
                (near as i32).into(),
            ];
            let blocks = (q.rows * heads).div_ceil(ATTENDING as usize / 32);
            let grid = [blocks, value_dim.div_ceil(COLUMNS), 1];
            self.grid(&SPARSE, "attend_chosen", grid, ATTENDING, 0, &args)?;
        }
        self.input(out)
    }
}

/// What each query of `attend_chosen` sees.
struct Seen<'m> {
    /// So many tokens up to its own.
    near: usize,
    /// What stands for blocks of tokens and is read in their place.
    entries: Option<&'m Matrix>,
    /// The blocks that were chosen for it.
    chosen: Option<&'m Matrix>,
    /// Choices of a token.
    groups: usize,
    /// Tokens of a block.
    block: usize,
}
