//! Scales and codes of ggml's block types.

use formats::encoding::SubScales;
use formats::ggml::{BlockScales, GgmlType};
use formats::{Encoding, Float, Levels};

use super::memory::Buffer;
use super::search::number_of;
use super::{Arg, Codes, Cuda, Matrix, Module, at};
use crate::Result;
use crate::backend::{Grid, GridSpec};
use crate::ops::apart::{Stored, global_scale};
use crate::ops::blocks::{candidates, floor};
use crate::ops::levels::{AnyLevels, EvenLevels, LevelSet, TableLevels, codes_of, levels_of};

pub(super) static BLOCKS: Module = Module { name: "blocks", source: include_str!("../ops/blocks.cu") };

pub(super) static APART: Module = Module { name: "apart", source: include_str!("../ops/apart.cu") };

/// An encoding's levels as `struct LevelSet` of `common.cuh`.
pub(super) fn level_set_of(encoding: &Encoding) -> Vec<u8> {
    let (kind, mut numbers) = match AnyLevels::of(encoding) {
        AnyLevels::Even(EvenLevels { low, high, offset }) => (1i32, vec![low, high, offset]),
        AnyLevels::Table(TableLevels { levels, middles }) => {
            (0, [levels[0], levels[15], 0.0].into_iter().chain(levels).chain(middles).collect())
        }
        AnyLevels::Float(set) => (2, vec![set.range()[0], set.range()[1], 0.0]),
    };
    numbers.resize(3 + 16 + 15, 0.0);
    kind.to_ne_bytes().into_iter().chain(numbers.into_iter().flat_map(f32::to_ne_bytes)).collect()
}

/// `LAYOUT_ARGUMENTS` of the kernels but for the candidates: groups of a block, what is stored of them.
fn layout_of(ty: GgmlType, encoding: &Encoding) -> [Arg; 6] {
    let sub = encoding.sub().unwrap_or(SubScales { low: 0, high: 0, max_min: 0 });
    [
        (ty.groups_per_block() as i32).into(),
        encoding.has_min().into(),
        encoding.sub().is_some().into(),
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
    pub(super) fn fitted_blocks(&self, weight: &Matrix, ty: GgmlType, importance: Option<&[f32]>) -> Result<Grid> {
        let encoding = &ty.encoding();
        let (blocks, per_block) = (weight.rows * weight.cols / ty.block_len, ty.groups_per_block());
        if blocks == 0 {
            return Ok(Grid::of_blocks(GridSpec::of(*encoding, weight.cols), weight.rows, Vec::new()));
        }
        let groups = blocks * per_block;
        let kernel = match (encoding.precision(), encoding.levels, encoding.group()) {
            (Float::F16, Levels::Integer { .. }, 16) => Some("fit_blocks_even_16"),
            (Float::F16, Levels::Integer { .. }, 32) => Some("fit_blocks_even_32"),
            (Float::F16, Levels::Table(_), 32) => Some("fit_blocks_uneven_32"),
            _ => None,
        };
        let integers =
            |wanted: bool| (wanted && encoding.sub().is_some()).then(|| self.buffer::<u8>(groups)).transpose();
        let fitted = Fitted {
            d: self.buffer::<f32>(blocks)?,
            m: encoding.has_min().then(|| self.buffer::<f32>(blocks)).transpose()?,
            scales: integers(true)?,
            mins: integers(encoding.has_min())?,
        };
        {
            let importance = importance.map(|importance| self.send(&floor(importance))).transpose()?;
            let set = self.send(&level_set_of(encoding))?;
            let (x, d, set) = (weight.buffer.pin_to_read()?, fitted.d.pin()?, set.pin()?);
            let [importance, m, scales, mins] =
                [&importance, &fitted.m, &fitted.scales, &fitted.mins].map(|b| b.as_ref().map(Buffer::pin).transpose());
            let (importance, m, scales, mins) = (importance?, m?, scales?, mins?);
            let h = at(importance.as_ref());
            match kernel {
                Some(kernel) => {
                    let mut args = vec![d.arg(), at(m.as_ref()), at(scales.as_ref()), at(mins.as_ref()), x.arg(), h];
                    args.extend([set.arg(), (groups as i64).into(), (weight.cols as i32).into()]);
                    args.extend(layout_of(ty, encoding));
                    // With a min, levels begin at 0.
                    args.extend(tries(encoding.levels.count()));
                    self.blocks(&BLOCKS, kernel, groups.div_ceil(128), 128, 0, &args)?;
                }
                None => {
                    assert!(
                        encoding.sub().is_none() && !encoding.has_min() && ty.block_len <= 256,
                        "a block of one scale"
                    );
                    let mut args = vec![d.arg(), x.arg(), h, set.arg(), (blocks as i64).into()];
                    args.extend([weight.cols, ty.block_len].map(|count| Arg::Int(count as i32)));
                    args.push((encoding.precision() == Float::E8M0).into());
                    args.extend(tries(encoding.levels.count()));
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
        Ok(Grid::of_blocks(GridSpec::of(*encoding, weight.cols), weight.rows, all))
    }

    /// Scales that blocks store themselves, as `apart.rs` chooses them.
    pub(super) fn fitted_apart(&self, weight: &Matrix, spec: &GridSpec, importance: Option<&[f32]>) -> Result<Grid> {
        let (encoding, rows, cols) = (&spec.encoding, weight.rows, weight.cols);
        let mut spec = spec.clone();
        if encoding.global.is_some() && spec.global.is_none() {
            let values = self.fetch::<f32>(&weight.buffer, rows * cols)?;
            let reach = values.iter().fold(0.0f32, |reach, x| reach.max(x.abs()));
            spec.global = Some(global_scale(encoding, reach));
        }
        let groups = spec.groups();
        if rows * groups == 0 {
            return Ok(Grid::of_blocks(spec, rows, Vec::new()));
        }
        let height = encoding.block_height(rows);
        let blocks = rows.div_ceil(height) * groups;
        let stored = Stored::of(encoding, spec.global);
        let d = self.buffer::<f32>(rows * groups)?;
        let m = stored.min.map(|_| self.buffer::<f32>(rows * groups)).transpose()?;
        {
            let searched = importance.is_some();
            let importance = importance.map(|importance| self.send(&floor(importance))).transpose()?;
            let set = self.send(&level_set_of(encoding))?;
            let (x, d, set) = (weight.buffer.pin_to_read()?, d.pin()?, set.pin()?);
            let [importance, m] = [&importance, &m].map(|b| b.as_ref().map(Buffer::pin).transpose());
            let (importance, m) = (importance?, m?);
            let mut args =
                vec![d.arg(), at(m.as_ref()), x.arg(), at(importance.as_ref()), set.arg(), (blocks as i64).into()];
            args.extend([rows, cols, groups, encoding.group_width(cols), height].map(|count| Arg::Int(count as i32)));
            args.push(searched.into());
            args.extend([stored.scale, stored.min.unwrap_or(Float::F32)].map(|of| Arg::Int(number_of(of))));
            args.extend([Arg::Int(stored.min.is_some().into()), Arg::Float(stored.global)]);
            args.extend(tries(encoding.levels.count()));
            self.blocks(&APART, "fit_apart", (blocks * 16).div_ceil(128), 128, 0, &args)?;
        }
        let mut all: Vec<BlockScales> = self
            .fetch::<f32>(&d, rows * groups)?
            .into_iter()
            .map(|d| BlockScales { d, ..BlockScales::default() })
            .collect();
        if let Some(m) = &m {
            all.iter_mut().zip(self.fetch::<f32>(m, rows * groups)?).for_each(|(block, m)| block.m = m);
        }
        Ok(Grid::of_blocks(spec, rows, all))
    }

    pub(super) fn rounded_blocks(&self, weight: &Matrix, grid: &Grid) -> Result<Codes> {
        let (encoding, count) = (&grid.spec.encoding, weight.rows * weight.cols);
        let codes = self.buffer::<u8>(count)?;
        if count > 0 {
            let (scales, mins) = self.send_scales(grid, encoding)?;
            let (set, level_codes) = (self.send(&level_set_of(encoding))?, self.send(&codes_of(encoding))?);
            let mins = mins.as_ref().map(Buffer::pin).transpose()?;
            let pins = (codes.pin()?, weight.buffer.pin_to_read()?, scales.pin()?, set.pin()?, level_codes.pin()?);
            let args = [
                pins.0.arg(),
                pins.1.arg(),
                pins.2.arg(),
                at(mins.as_ref()),
                pins.3.arg(),
                pins.4.arg(),
                (count as i64).into(),
                (weight.cols as i32).into(),
                (grid.spec.groups() as i32).into(),
                (encoding.group_width(weight.cols) as i32).into(),
            ];
            self.each(&BLOCKS, "round_blocks", count.div_ceil(4), &args)?;
        }
        Ok(Codes { buffer: codes, rows: weight.rows, cols: weight.cols })
    }

    /// Sends what each group is scaled by, and its min if the type has one.
    fn send_scales(&self, grid: &Grid, encoding: &Encoding) -> Result<(Buffer, Option<Buffer>)> {
        Ok((self.send(&grid.scales)?, encoding.has_min().then(|| self.send(&grid.mins)).transpose()?))
    }

    /// The reals that codes stand for.
    pub(super) fn dequantized_blocks(&self, codes: &Codes, grid: &Grid) -> Result<Matrix> {
        let (encoding, count) = (&grid.spec.encoding, grid.rows * grid.cols());
        let out = self.matrix(grid.rows, grid.cols())?;
        if count == 0 {
            return Ok(out);
        }
        {
            let (scales, mins) = self.send_scales(grid, encoding)?;
            let levels = self.send(&levels_of(encoding))?;
            let mins = mins.as_ref().map(Buffer::pin).transpose()?;
            let pins = (out.buffer.pin()?, codes.buffer.pin_to_read()?, scales.pin()?, levels.pin()?);
            let args = [
                pins.0.arg(),
                pins.1.arg(),
                pins.2.arg(),
                at(mins.as_ref()),
                pins.3.arg(),
                (count as i64).into(),
                (grid.cols() as i32).into(),
                (grid.spec.groups() as i32).into(),
                (encoding.group_width(grid.cols()) as i32).into(),
            ];
            self.each(&BLOCKS, "dequantize_blocks", count.div_ceil(4), &args)?;
        }
        Ok(out)
    }
}
