//! Codes as files hold them, packed where they are, so that only the packed bytes leave the device.

use formats::bits::packed_words;

use super::{Arg, Buffer, Cuda, Module, at, expect_multiple};
use crate::backend::BlockGrid;
use crate::{Error, Result};

pub(super) static PACK: Module = Module { name: "pack", source: include_str!("../ops/pack.cu") };

/// Groups in a block, at most.
const GROUPS: usize = 16;

/// How the words of packed codes `[rows, cols]` lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackLayout {
    /// `[rows, words]`: each row a stream of bits (`weight_packed` of compressed-tensors).
    Rows,
    /// `[words, rows]`: the same, words transposed (`qweight` of GPTQ).
    RowsTransposed,
    /// `[cols, words]`: each column a stream of codes less one (`qzeros` of GPTQ, version 1).
    ColumnsLessOne,
    /// `[words, cols]`: each column a stream, words transposed (`weight_zero_point` of compressed-tensors).
    ColumnsTransposed,
    /// `[cols, rows / 8]`: eight rows a word in the order 0 2 4 6 1 3 5 7 (`qweight` and `qzeros` of AWQ, 4 bits).
    Awq,
}

impl Cuda {
    /// Packs codes `[rows, cols]` of the device, a byte each and below `2^bits`.
    pub fn pack_codes(
        &self,
        codes: &Buffer,
        rows: usize,
        cols: usize,
        bits: u8,
        layout: PackLayout,
    ) -> Result<Vec<u32>> {
        let awq = layout == PackLayout::Awq;
        if !(1..=8).contains(&bits) || awq && bits != 4 {
            let expected = if awq { "4 bits" } else { "1 to 8 bits" }.to_owned();
            return Err(Error::Shape { op: "pack_codes", expected, found: bits.to_string() });
        }
        if awq {
            expect_multiple("pack_codes", 8, rows)?;
        }
        let by_rows = matches!(layout, PackLayout::Rows | PackLayout::RowsTransposed);
        let (streams, length) = if by_rows { (rows, cols) } else { (cols, rows) };
        let [stream_step, code_step] = if by_rows { [cols, 1] } else { [1, cols] };
        let words = packed_words(length, bits);
        let transposed = matches!(layout, PackLayout::RowsTransposed | PackLayout::ColumnsTransposed);
        let [stream_words, word_step] = if transposed { [1, streams] } else { [words, 1] };
        let out = self.buffer::<u32>(streams * words)?;
        {
            let (to, from) = (out.pin()?, codes.pin()?);
            let steps = [streams, length, words, stream_step, code_step, stream_words, word_step];
            let mut args = vec![to.arg(), from.arg()];
            args.extend(steps.map(|n| Arg::Long(n as i64)));
            let less = i32::from(layout == PackLayout::ColumnsLessOne);
            // Neighbours read neighbours.
            args.extend([i32::from(bits), less, awq.into(), (!by_rows).into()].map(Arg::Int));
            self.each(&PACK, "pack_words", streams * words, &args)?;
        }
        self.fetch(&out, streams * words)
    }

    /// Packs codes `[rows, cols]` of the device, a byte each, and the scales of their blocks, as [`GgmlType::pack`] does.
    ///
    /// [`GgmlType::pack`]: formats::GgmlType::pack
    pub fn packed_blocks(&self, codes: &Buffer, grid: &BlockGrid) -> Result<Vec<u8>> {
        let BlockGrid { ty, rows, cols, ref blocks, .. } = *grid;
        let Some(layout) = ty.layout() else {
            let expected = "a type with blocks".to_owned();
            return Err(Error::Shape { op: "pack_blocks", expected, found: ty.to_string() });
        };
        expect_multiple("pack_blocks", ty.block_len, cols)?;
        super::expect("pack_blocks", "blocks", rows * (cols / ty.block_len), blocks.len())?;
        let heads: Vec<f32> = blocks.iter().flat_map(|block| [block.d, block.m]).collect();
        let heads = self.send(&heads)?;
        let subs = match layout.sub {
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
            let (to, from, heads) = (out.pin()?, codes.pin()?, heads.pin()?);
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
