//! Codes as files hold them, packed where they are, so that only the packed bytes leave the device.

use formats::WordLayout;
use formats::bits::packed_words;

use super::{Arg, Codes, Cuda, Module, at, expect_grid, expect_type};
use crate::backend::Grid;
use crate::{Error, Result};

pub(super) static PACK: Module = Module { name: "pack", source: include_str!("../ops/pack.cu") };

/// Groups in a block, at most.
const GROUPS: usize = 16;

impl Cuda {
    pub(super) fn packed_words(&self, codes: &Codes, bits: u8, layout: WordLayout) -> Result<Vec<u8>> {
        let (rows, cols) = (codes.rows, codes.cols);
        let count = layout.words([rows, cols], bits).map_err(|error| {
            let expected = "codes that the layout has room for".to_owned();
            Error::Shape { op: "pack", expected, found: error.to_string() }
        })?;
        let by_rows = matches!(layout, WordLayout::Rows | WordLayout::RowsTransposed);
        let (streams, length) = if by_rows { (rows, cols) } else { (cols, rows) };
        let [stream_step, code_step] = if by_rows { [cols, 1] } else { [1, cols] };
        let words = packed_words(length, bits);
        let transposed = matches!(layout, WordLayout::RowsTransposed | WordLayout::ColumnsTransposed);
        let [stream_words, word_step] = if transposed { [1, streams] } else { [words, 1] };
        let out = self.buffer::<u32>(count)?;
        {
            let (to, from) = (out.pin()?, codes.buffer.pin()?);
            let steps = [streams, length, words, stream_step, code_step, stream_words, word_step];
            let mut args = vec![to.arg(), from.arg()];
            args.extend(steps.map(|n| Arg::Long(n as i64)));
            let less = i32::from(layout == WordLayout::ColumnsLessOne);
            // Neighbours read neighbours.
            let awq = layout == WordLayout::Awq;
            args.extend([i32::from(bits), less, awq.into(), (!by_rows).into()].map(Arg::Int));
            self.each(&PACK, "pack_words", count, &args)?;
        }
        self.fetch(&out, 4 * count)
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
