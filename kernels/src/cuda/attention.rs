//! Softmax attention.

use super::{Arg, Cuda, Matrix, Module, Operands, Rounded, at};
use crate::Result;
use crate::backend::{AttentionShape, Memory};
use crate::checks::expect_attention;

pub(super) static ATTENTION: Module = Module { name: "attention", source: include_str!("../ops/attention.cu") };

/// Queries and threads of a block, and keys of a tile.
const QUERIES: usize = 64;
const BLOCK: u32 = 128;

/// A form on tensor cores, for heads of up to so many terms and values.
struct Form {
    kernel: &'static str,
    terms: usize,
    values: usize,
    keys: usize,
    /// Queries stay in registers, not in shared memory.
    held: bool,
}

impl Form {
    const fn new(kernel: &'static str, terms: usize, values: usize, keys: usize, held: bool) -> Form {
        Form { kernel, terms, values, keys, held }
    }

    /// Bytes of shared memory: rows are padded by 16.
    fn shared(&self) -> usize {
        let rows = |count, width| count * (2 * width + 16);
        let queries = if self.held { 0 } else { rows(QUERIES, self.terms) };
        queries + rows(self.keys, self.terms) + rows(self.keys, self.values)
    }
}

const FORMS: [Form; 5] = [
    Form::new("attend_rounded_64", 64, 64, 64, true),
    Form::new("attend_rounded_96", 96, 96, 64, true),
    Form::new("attend_rounded_128", 128, 128, 64, true),
    Form::new("attend_rounded_192", 192, 128, 64, false),
    Form::new("attend_rounded_256", 256, 256, 32, false),
];

/// Rows of 16 bytes begin where copies of 16 bytes may, and products take 16 terms at once.
fn form_for(shape: &AttentionShape) -> Option<&'static Form> {
    let whole = shape.head_dim.is_multiple_of(16) && shape.value_dim.is_multiple_of(16);
    FORMS.iter().find(|form| whole && shape.head_dim <= form.terms && shape.value_dim <= form.values)
}

/// What the blocks take: where a sequence starts, its length, and the first of some queries. What sees the most keys comes first.
fn tiles(shape: &AttentionShape, lengths: &[usize]) -> Vec<[i32; 3]> {
    let mut all = Vec::new();
    let mut start = 0;
    for &length in lengths {
        all.extend((0..length).step_by(QUERIES).map(|query| {
            let last = (query + QUERIES).min(length) - 1;
            let keys = shape.end_seen(last, length) - shape.first_seen(query);
            (keys, [start, length, query].map(|x| x as i32))
        }));
        start += length;
    }
    all.sort_by_key(|(keys, _)| std::cmp::Reverse(*keys));
    all.into_iter().map(|(_, tile)| tile).collect()
}

impl Cuda {
    pub(super) fn attend(
        &self,
        q: &Matrix,
        k: &Matrix,
        v: &Matrix,
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        lengths: &[usize],
    ) -> Result<Operands> {
        let AttentionShape { heads, kv_heads, head_dim, value_dim, scale, window, chunk, softcap, both_ways } = *shape;
        expect_attention([q, k, v].map(|m| [m.rows, m.cols]), sinks, shape, lengths)?;

        let tiles = tiles(shape, lengths);
        let work = tiles.len() * heads;
        let tiles = self.send(tiles.as_flattened())?;
        let sinks = sinks.map(|sinks| self.send(sinks)).transpose()?;
        let (tiles, sinks) = (tiles.pin()?, sinks.as_ref().map(|sinks| sinks.pin()).transpose()?);
        // No sequence is longer than the largest.
        let limit = |positions: Option<usize>| positions.map_or(0, |p| p.min(i32::MAX as usize) as i32);
        // Positions after its own that a token sees: so few that a sum with a position is a number, too.
        let most = 1 << 30;
        let ahead: i32 = if both_ways { window.map_or(most, |window| (window - 1).min(most)) as i32 } else { 0 };
        let rest = [
            at(sinks.as_ref()),
            tiles.arg(),
            (heads as i32).into(),
            (kv_heads as i32).into(),
            (head_dim as i32).into(),
            (value_dim as i32).into(),
            scale.into(),
            softcap.unwrap_or(0.0).into(),
            limit(window).into(),
            limit(chunk).into(),
            ahead.into(),
        ];
        let start = |kernel, grid, shared, places: [Arg; 4]| {
            let args: Vec<Arg> = places.into_iter().chain(rest).collect();
            self.grid(&ATTENTION, kernel, grid, BLOCK, shared, &args)
        };
        let (rows, cols) = (q.rows, heads * value_dim);
        if let Some(form) = form_for(shape).filter(|_| self.rounds()) {
            let out = Rounded { buffer: self.buffer::<u16>(rows * cols)?, rows, cols };
            let [q, k, v] = [self.narrowed(q)?, self.narrowed(k)?, self.narrowed(v)?];
            {
                let [to, q, k, v] = [out.buffer.pin()?, q.pin()?, k.pin()?, v.pin()?];
                start(form.kernel, [work, 1, 1], form.shared(), [to.arg(), q.arg(), k.arg(), v.arg()])?;
            }
            return Ok(Operands::Rounded(out));
        }
        let out = self.matrix(rows, cols)?;
        // Values beyond those of one block are another's, which computes the scores again.
        let (kernel, wide) = if value_dim <= 64 { ("attend_whole_64", 64) } else { ("attend_whole_128", 128) };
        {
            let (to, [q, k, v]) = (out.buffer.pin()?, [q, k, v].map(|m| m.buffer.pin_to_read()));
            let [q, k, v] = [q?, k?, v?];
            start(kernel, [work, value_dim.div_ceil(wide), 1], 0, [to.arg(), q.arg(), k.arg(), v.arg()])?;
        }
        self.input(out)
    }
}
