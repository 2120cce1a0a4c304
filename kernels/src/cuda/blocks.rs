//! Scales and codes of ggml's block types.

use formats::ggml::{BlockScales, GgmlType, Layout, Levels, ScaleKind, SubScales};

use super::memory::Buffer;
use super::{Arg, Codes, Cuda, Matrix, Module, at, expect, expect_blocks};
use crate::backend::BlockGrid;
use crate::ops::blocks::{Even, Rungs, Uneven, candidates, codes_of, floor};
use crate::{Error, Result};

pub(super) static BLOCKS: Module = Module { name: "blocks", source: include_str!("../ops/blocks.cu") };

/// A layout's levels as `struct Ladder` of `common.cuh`.
pub(super) fn ladder_of(layout: &Layout) -> Vec<u8> {
    let (even, numbers) = match Rungs::of(layout) {
        Rungs::Even(Even { low, high, offset }) => {
            let mut numbers = vec![low, high, offset, 0.0];
            numbers.extend([f32::INFINITY; 15].into_iter().chain([0.0; 15]));
            (1i32, numbers)
        }
        Rungs::Uneven(Uneven { first, last, middles, steps }) => {
            let mut numbers = vec![first, last, 0.0, first];
            numbers.extend(middles.into_iter().chain(steps));
            (0, numbers)
        }
    };
    even.to_ne_bytes().into_iter().chain(numbers.into_iter().flat_map(f32::to_ne_bytes)).collect()
}

/// `LAYOUT_ARGUMENTS` of the kernels but for the candidates: groups of a block, what is stored of them.
fn layout_of(ty: GgmlType, layout: &Layout) -> [Arg; 6] {
    let sub = layout.sub.unwrap_or(SubScales { low: 0, high: 0, max_min: 0 });
    [
        (ty.groups_per_block() as i32).into(),
        layout.has_min.into(),
        layout.sub.is_some().into(),
        f32::from(sub.low).into(),
        f32::from(sub.high).into(),
        f32::from(sub.max_min).into(),
    ]
}

/// The candidates of a search on so many levels, those of the CPU: between which sizes, in how many steps.
fn tries(levels: usize) -> [Arg; 3] {
    let (from, to, steps) = candidates(levels as f32);
    [Arg::Float(from), Arg::Float(to), Arg::Int(steps as i32)]
}

/// What a fit leaves on the device: the scales of each block, and what the file stores of each group.
struct Fitted {
    d: Buffer,
    m: Option<Buffer>,
    scales: Option<Buffer>,
    mins: Option<Buffer>,
}

impl Cuda {
    pub(super) fn fitted_blocks(&self, weight: &Matrix, ty: GgmlType, importance: Option<&[f32]>) -> Result<BlockGrid> {
        let Some(layout) = ty.layout().filter(|_| ty.row_bytes(weight.cols).is_some()) else {
            let expected = format!("rows of whole blocks of {ty}, {} weights each", ty.block_len);
            return Err(Error::Shape { op: "fit_blocks", expected, found: weight.cols.to_string() });
        };
        if let Some(importance) = importance {
            expect("fit_blocks", "importances", weight.cols, importance.len())?;
        }
        let (blocks, per_block) = (weight.rows * weight.cols / ty.block_len, ty.groups_per_block());
        if blocks == 0 {
            return Ok(BlockGrid::new(ty, weight.rows, weight.cols, Vec::new()));
        }
        let groups = blocks * per_block;
        let kernel = match (layout.scale, layout.levels, layout.group) {
            (ScaleKind::F16, Levels::Uniform { .. }, 16) => Some("fit_blocks_even_16"),
            (ScaleKind::F16, Levels::Uniform { .. }, 32) => Some("fit_blocks_even_32"),
            (ScaleKind::F16, Levels::Table(_), 32) => Some("fit_blocks_uneven_32"),
            _ => None,
        };
        let integers = |wanted: bool| (wanted && layout.sub.is_some()).then(|| self.buffer::<u8>(groups)).transpose();
        let fitted = Fitted {
            d: self.buffer::<f32>(blocks)?,
            m: layout.has_min.then(|| self.buffer::<f32>(blocks)).transpose()?,
            scales: integers(true)?,
            mins: integers(layout.has_min)?,
        };
        {
            let importance = importance.map(|importance| self.send(&floor(importance))).transpose()?;
            let ladder = self.send(&ladder_of(layout))?;
            let (x, d, ladder) = (weight.buffer.pin_to_read()?, fitted.d.pin()?, ladder.pin()?);
            let [importance, m, scales, mins] =
                [&importance, &fitted.m, &fitted.scales, &fitted.mins].map(|b| b.as_ref().map(Buffer::pin).transpose());
            let (importance, m, scales, mins) = (importance?, m?, scales?, mins?);
            let h = at(importance.as_ref());
            match kernel {
                Some(kernel) => {
                    let mut args = vec![d.arg(), at(m.as_ref()), at(scales.as_ref()), at(mins.as_ref()), x.arg(), h];
                    args.extend([ladder.arg(), (groups as i64).into(), (weight.cols as i32).into()]);
                    args.extend(layout_of(ty, layout));
                    // With a min, levels begin at 0.
                    args.extend(tries(layout.levels.count()));
                    self.blocks(&BLOCKS, kernel, groups.div_ceil(128), 128, 0, &args)?;
                }
                None => {
                    assert!(layout.sub.is_none() && !layout.has_min && ty.block_len <= 256, "a block of one scale");
                    let mut args = vec![d.arg(), x.arg(), h, ladder.arg(), (blocks as i64).into()];
                    args.extend([weight.cols, ty.block_len].map(|count| Arg::Int(count as i32)));
                    args.push((layout.scale == ScaleKind::E8M0).into());
                    args.extend(tries(layout.levels.count()));
                    self.blocks(&BLOCKS, "fit_blocks_singly", (blocks * 16).div_ceil(128), 128, 0, &args)?;
                }
            }
        }
        let d: Vec<f32> = self.fetch(&fitted.d, blocks)?;
        let mut all: Vec<BlockScales> = d.into_iter().map(|d| BlockScales { d, ..BlockScales::default() }).collect();
        if let Some(m) = &fitted.m {
            all.iter_mut().zip(self.fetch(m, blocks)?).for_each(|(block, m)| block.m = m);
        }
        if let Some(scales) = &fitted.scales {
            let scales: Vec<u8> = self.fetch(scales, groups)?;
            for (block, scales) in all.iter_mut().zip(scales.chunks_exact(per_block)) {
                block.scales.iter_mut().zip(scales).for_each(|(to, scale)| *to = scale.cast_signed());
            }
        }
        if let Some(mins) = &fitted.mins {
            let mins: Vec<u8> = self.fetch(mins, groups)?;
            for (block, mins) in all.iter_mut().zip(mins.chunks_exact(per_block)) {
                block.mins[..per_block].copy_from_slice(mins);
            }
        }
        Ok(BlockGrid::new(ty, weight.rows, weight.cols, all))
    }

    pub(super) fn rounded_blocks(&self, weight: &Matrix, grid: &BlockGrid) -> Result<Codes> {
        expect("round_blocks", "rows", grid.rows, weight.rows)?;
        expect("round_blocks", "columns", grid.cols, weight.cols)?;
        let (layout, count) = (grid.ty.layout().expect("a type with codes"), weight.rows * weight.cols);
        let codes = self.buffer::<u8>(count)?;
        if count > 0 {
            let (scales, mins) = self.send_scales(grid, layout)?;
            let (ladder, level_codes) = (self.send(&ladder_of(layout))?, self.send(&codes_of(layout))?);
            let mins = mins.as_ref().map(Buffer::pin).transpose()?;
            let pins = (codes.pin()?, weight.buffer.pin_to_read()?, scales.pin()?, ladder.pin()?, level_codes.pin()?);
            let args = [
                pins.0.arg(),
                pins.1.arg(),
                pins.2.arg(),
                at(mins.as_ref()),
                pins.3.arg(),
                pins.4.arg(),
                (count as i64).into(),
                (layout.group as i32).into(),
            ];
            self.each(&BLOCKS, "round_blocks", count / 4, &args)?;
        }
        Ok(Codes { buffer: codes, rows: weight.rows, cols: weight.cols })
    }

    /// Sends what each group is scaled by, and its min if the type has one.
    fn send_scales(&self, grid: &BlockGrid, layout: &Layout) -> Result<(Buffer, Option<Buffer>)> {
        Ok((self.send(&grid.scales)?, layout.has_min.then(|| self.send(&grid.mins)).transpose()?))
    }

    /// The reals that codes stand for.
    pub(super) fn restored_blocks(&self, codes: &Codes, grid: &BlockGrid) -> Result<Matrix> {
        expect_blocks("restore_blocks", [codes.rows, codes.cols], grid)?;
        let (layout, count) = (grid.ty.layout().expect("a type with codes"), grid.rows * grid.cols);
        let out = self.matrix(grid.rows, grid.cols)?;
        if count == 0 {
            return Ok(out);
        }
        {
            let mut levels = vec![0.0f32; 256];
            for (code, level) in levels.iter_mut().enumerate().take(layout.levels.count()) {
                *level = layout.levels.level(code as u8);
            }
            let (scales, mins) = self.send_scales(grid, layout)?;
            let levels = self.send(&levels)?;
            let mins = mins.as_ref().map(Buffer::pin).transpose()?;
            let pins = (out.buffer.pin()?, codes.buffer.pin_to_read()?, scales.pin()?, levels.pin()?);
            let args = [
                pins.0.arg(),
                pins.1.arg(),
                pins.2.arg(),
                at(mins.as_ref()),
                pins.3.arg(),
                (count as i64).into(),
                (layout.group as i32).into(),
            ];
            self.each(&BLOCKS, "restore_blocks", count / 4, &args)?;
        }
        Ok(out)
    }
}
