//! Codes as files hold them, packed and unpacked where they are, so that only the packed bytes leave the device or come to it.

use formats::WordLayout;
use formats::bits::packed_words;

use super::{Arg, Codes, Cuda, Module, at, expect, expect_grid, expect_type};
use crate::Result;
use crate::backend::Grid;
use crate::checks::no_room;

pub(super) static PACK: Module = Module { name: "pack", source: include_str!("../ops/pack.cu") };

/// Groups in a block, at most.
const GROUPS: usize = 16;

/// How codes `[rows, cols]` fall into streams of bits, and these into words; steps are in codes and in words.
struct Streams {
    /// Streams, codes of each, and words of each.
    counts: [usize; 3],
    /// From a stream to the next, and from a code to the next.
    codes: [usize; 2],
    /// From a stream to the next, and from a word to the next.
    words: [usize; 2],
    /// Rows are streams; else columns are.
    by_rows: bool,
}

impl Streams {
    fn of(layout: WordLayout, [rows, cols]: [usize; 2], bits: u8) -> Streams {
        let by_rows = matches!(layout, WordLayout::Rows | WordLayout::RowsTransposed);
        let (streams, length) = if by_rows { (rows, cols) } else { (cols, rows) };
        let codes = if by_rows { [cols, 1] } else { [1, cols] };
        let count = packed_words(length, bits);
        let transposed = matches!(layout, WordLayout::RowsTransposed | WordLayout::ColumnsTransposed);
        let words = if transposed { [1, streams] } else { [count, 1] };
        Streams { counts: [streams, length, count], codes, words, by_rows }
    }

    /// What both kernels are told of them, after their buffers.
    fn args(&self, layout: WordLayout, bits: u8, streams_first: bool) -> Vec<Arg> {
        let steps = self.counts.into_iter().chain(self.codes).chain(self.words);
        let mut args: Vec<Arg> = steps.map(|n| Arg::Long(n as i64)).collect();
        let (less, awq) = (layout == WordLayout::ColumnsLessOne, layout == WordLayout::Awq);
        args.extend([i32::from(bits), less.into(), awq.into(), streams_first.into()].map(Arg::Int));
        args
    }
}

impl Cuda {
    pub(super) fn packed_words(&self, codes: &Codes, bits: u8, layout: WordLayout) -> Result<Vec<u8>> {
        let shape = [codes.rows, codes.cols];
        let count = layout.words(shape, bits).map_err(|error| no_room("pack", &error))?;
        let streams = Streams::of(layout, shape, bits);
        let out = self.buffer::<u32>(count)?;
        {
            let (to, from) = (out.pin()?, codes.buffer.pin()?);
            let mut args = vec![to.arg(), from.arg()];
            // Neighbours read neighbours.
            args.extend(streams.args(layout, bits, !streams.by_rows));
            self.each(&PACK, "pack_words", count, &args)?;
        }
        self.fetch(&out, 4 * count)
    }

    /// Codes `[rows, cols]` of words that lie as [`WordLayout::unpack`] reads them.
    pub(super) fn unpacked_words(
        &self,
        words: &[u32],
        shape: [usize; 2],
        bits: u8,
        layout: WordLayout,
    ) -> Result<Codes> {
        let count = layout.words(shape, bits).map_err(|error| no_room("upload_packed", &error))?;
        expect("upload_packed", "words", count, words.len())?;
        let streams = Streams::of(layout, shape, bits);
        let [rows, cols] = shape;
        let codes = Codes { buffer: self.buffer::<u8>(rows * cols)?, rows, cols };
        let words = self.send(words)?;
        let (to, from) = (codes.buffer.pin()?, words.pin()?);
        let mut args = vec![to.arg(), from.arg()];
        // Neighbours write neighbours.
        args.extend(streams.args(layout, bits, !streams.by_rows));
        self.each(&PACK, "unpack_words", rows * cols, &args)?;
        drop(to);
        Ok(codes)
    }

    /// As [`GgmlType::pack`](formats::GgmlType::pack) does.
    pub(super) fn packed_blocks(&self, codes: &Codes, grid: &Grid) -> Result<Vec<u8>> {
        expect_grid("pack", [codes.rows, codes.cols], grid)?;
        let (ty, blocks) = (expect_type("pack", grid)?, &grid.blocks);
        let heads: Vec<f32> = blocks.iter().flat_map(|block| [block.d, block.m]).collect();
        let heads = self.send(&heads)?;
        let subs = match ty.encoding().sub() {
            None => None,
            Some(_) => {
                let mut all = Vec::with_capacity(blocks.len() * 2 * GROUPS);
                for block in blocks {
                    all.extend(block.scales.map(i8::cast_unsigned));
                    all.extend(block.mins);
                }
                Some(self.send(&all)?)
            }
        };
        let count = blocks.len() * ty.block_bytes;
        let out = self.buffer::<u8>(count)?;
        {
            let (to, from, heads) = (out.pin()?, codes.buffer.pin()?, heads.pin()?);
            let subs = subs.as_ref().map(|subs| subs.pin()).transpose()?;
            let args = [
                to.arg(),
                from.arg(),
                heads.arg(),
                at(subs.as_ref()),
                (ty.id as i32).into(),
                (ty.block_len as i32).into(),
                (ty.block_bytes as i32).into(),
                (count as i64).into(),
            ];
            self.each(&PACK, "pack_blocks", count, &args)?;
        }
        self.fetch(&out, count)
    }
}
