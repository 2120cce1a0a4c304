//! The refinement after a sweep: scales and codes are moved wherever the loss falls.

use std::ops::Range;

use formats::Encoding;
use formats::ggml::BlockScales;
use rayon::prelude::*;

use super::blocks::level_set_of;
use super::search::number_of;
use super::sweep::{CHUNK, ROW_THREADS, ROWS, at, plain};
use super::{Arg, Buffer, Codes, Cuda, Matrix, Module, Product, Real, THREADS, expect_refined};
use crate::Result;
use crate::backend::{Grid, GridSpec};
use crate::ops::apart::Stored;
use crate::ops::fit::Rules;
use crate::ops::levels::{AnyLevels, LevelSet, codes_of, levels_of, with_levels};
use crate::ops::refine::{Units, moves_scales, turns, units};

pub(super) static REFINE: Module = Module { name: "refine", source: include_str!("../ops/refine.cu") };

/// Columns whose changes reach the rest of the pull together, in one product; more where a unit is wider.
const SPAN: usize = 256;
/// Columns of a panel of codes.
const CODES: usize = 64;

/// What codes stand for.
enum Kind {
    /// `scale · level − min`, with stored scales of blocks.
    Blocks(Encoding, Stored),
    /// `scale · (code − zero)`.
    Integers(Rules),
}

impl Cuda {
    /// Refines the codes and the grid of all rows, some rows at a time; returns the loss `Σ eᵀ H e` that is left. As
    /// [`crate::ops::refine`] does it. Fails for shapes that do not fit each other.
    pub(super) fn refined(
        &self,
        target: &Matrix,
        gram: &Matrix,
        damp: f64,
        grid: &mut Grid,
        codes: &mut Codes,
    ) -> Result<f64> {
        let (rows, n) = (target.rows, target.cols);
        expect_refined("refine", [rows, n], [gram.rows, gram.cols], [codes.rows, codes.cols], grid)?;
        if rows * n == 0 {
            return Ok(0.0);
        }
        let encoding = grid.spec.encoding;
        let work = Refinement::new(self, gram, damp, &grid.spec, CHUNK.min(rows.next_multiple_of(ROWS)))?;
        let code_of = match work.kind {
            Kind::Blocks(..) => Some(self.send(&codes_of(&encoding)[..])?),
            Kind::Integers(_) => None,
        };
        let (height, per_row) = (work.height, work.units.len());
        let chunks = rows.div_ceil(height);
        let losses = self.buffer::<f64>(chunks * height)?;
        // [chunks][units][height] of scales and offsets.
        let ends = self.buffer::<f32>(2 * chunks * per_row * height)?;
        for (chunk, first) in (0..rows).step_by(height).enumerate() {
            let some = height.min(rows - first);
            // What else is pinned meanwhile must not push it out.
            let pinned = ends.pin()?;
            let own = pinned.at + (8 * chunk * per_row * height) as u64;
            work.start(target, &codes.buffer, grid, first..first + some, own)?;
            work.move_scales(own)?;
            for _ in 0..turns(&encoding) {
                work.move_codes(own)?;
                work.move_scales(own)?;
            }
            work.write_losses(&losses, chunk)?;
            let through = [code_of.as_ref(), work.order.as_ref()];
            self.to_rows(&codes.buffer, first, work.levels.pin()?.at, through, some, n, height)?;
        }
        work.keep(&self.fetch::<f32>(&ends, 2 * chunks * per_row * height)?, rows, grid);
        Ok(self.fetch::<f64>(&losses, rows)?.iter().sum())
    }

    /// Both triangles of the Hessian, damped, with columns in order.
    fn damped(&self, gram: &Matrix, damp: f64, order: Option<&Buffer>) -> Result<Matrix> {
        let n = gram.cols;
        let whole = self.matrix(n, n)?;
        {
            let (to, from) = (whole.buffer.pin()?, gram.buffer.pin_to_read()?);
            match order {
                None => {
                    let args = [to.arg(), from.arg(), (1.0 + damp).into(), (n as i32).into()];
                    self.grid(&REFINE, "damped_whole", [n.div_ceil(32), n.div_ceil(32), 1], THREADS, 0, &args)?;
                }
                Some(order) => {
                    let order = order.pin()?;
                    let args = [to.arg(), from.arg(), order.arg(), (1.0 + damp).into(), (n as i32).into()];
                    self.each(&REFINE, "damped_ordered", n * n, &args)?;
                }
            }
        }
        Ok(whole)
    }
}

/// What is kept of each code; of those that the encoding has not, that of 0.
fn bytes_of_codes(encoding: &Encoding) -> Vec<u8> {
    let levels = levels_of(encoding);
    with_levels!(AnyLevels::of(encoding), set => levels.iter().map(|level| set.keep(*level)).collect())
}

/// The level of each byte that is kept.
fn values_of(encoding: &Encoding) -> Vec<f32> {
    let levels = levels_of(encoding);
    codes_of(encoding).iter().map(|code| levels[usize::from(*code)]).collect()
}

/// What a refinement works in; columns one after the other, rows side by side.
struct Refinement<'a> {
    cuda: &'a Cuda,
    hessian: Matrix,
    n: usize,
    height: usize,
    groups: usize,
    units: Vec<Range<usize>>,
    kind: Kind,
    /// The column at each position.
    order: Option<Buffer>,
    /// The group of each position, and the first position of each unit.
    group_of: Buffer,
    starts: Buffer,
    /// What is kept of each code, and the level of that.
    byte_of: Buffer,
    values: Buffer,
    set: Option<Buffer>,
    levels: Buffer,
    /// What is missing: target minus value.
    errors: Buffer,
    /// `H` times that.
    pull: Buffer,
    /// Columns of what errors have changed by.
    steps: Buffer,
    factors: Buffer,
    grid: Buffer,
    curvature: Buffer,
}

impl<'a> Refinement<'a> {
    /// Makes room for `height` rows at a time, and brings what is the same for every row to the device.
    fn new(cuda: &'a Cuda, gram: &Matrix, damp: f64, spec: &GridSpec, height: usize) -> Result<Refinement<'a>> {
        let encoding = spec.encoding;
        let blocks = !encoding.is_integers();
        let n = gram.cols;
        let Units { order, ranges } = units(spec);
        let order = order.as_ref().map(|order| cuda.send(order)).transpose()?;
        // The group of each position: of blocks smaller than their unit.
        let group_of: Vec<u32> = match blocks {
            true => spec.group_of.clone(),
            false => (0..).zip(&ranges).flat_map(|(unit, range)| vec![unit; range.len()]).collect(),
        };
        let kind = match blocks {
            true => Kind::Blocks(encoding, Stored::of(&encoding, spec.global)),
            false => Kind::Integers(Rules::of(&encoding)),
        };
        let groups = spec.groups();
        let widest = ranges.iter().map(Range::len).max().unwrap_or(0);
        let starts: Vec<u32> = ranges.iter().map(|range| range.start as u32).chain([n as u32]).collect();
        let (byte_of, set) = match &kind {
            Kind::Blocks(encoding, _) => (bytes_of_codes(encoding), Some(level_set_of(encoding))),
            Kind::Integers(_) => ((0..=255).collect(), None),
        };
        Ok(Refinement {
            cuda,
            hessian: cuda.damped(gram, damp, order.as_ref())?,
            n,
            height,
            groups,
            group_of: cuda.send(&group_of)?,
            starts: cuda.send(&starts)?,
            byte_of: cuda.send(&byte_of)?,
            values: cuda.send(&values_of(&encoding))?,
            set: set.map(|set| cuda.send(&set)).transpose()?,
            levels: cuda.buffer::<u8>(n * height)?,
            errors: cuda.buffer::<f32>(n * height)?,
            pull: cuda.buffer::<f32>(n * height)?,
            steps: cuda.buffer::<f32>(SPAN.max(widest) * height)?,
            factors: cuda.buffer::<f32>(2 * groups * height)?,
            grid: cuda.buffer::<f32>(4 * groups * height)?,
            curvature: cuda.buffer::<f64>(3 * ranges.len() * height)?,
            order,
            units: ranges,
            kind,
        })
    }

    /// Writes the loss of each row of a chunk to its place among those of all rows.
    fn write_losses(&self, losses: &Buffer, chunk: usize) -> Result<()> {
        let (losses, errors, pull) = (losses.pin()?, self.errors.pin()?, self.pull.pin()?);
        let hessian = self.hessian.buffer.pin()?;
        let args = [
            at(losses.at, chunk * self.height, 8),
            errors.arg(),
            pull.arg(),
            hessian.arg(),
            (self.n as i32).into(),
            (self.height as i32).into(),
        ];
        self.cuda.blocks(&REFINE, "refined_loss", self.height / 32, THREADS, 0, &args)
    }

    /// Takes scales and offsets, `[chunks][units][height]` of pairs, over into the grid.
    fn keep(&self, ends: &[f32], rows: usize, grid: &mut Grid) {
        let (height, per_row) = (self.height, self.units.len());
        let end = |row: usize, unit: usize| {
            let from = 2 * ((row / height * per_row + unit) * height + row % height);
            [ends[from], ends[from + 1]]
        };
        let blocks = matches!(self.kind, Kind::Blocks(..));
        for row in 0..rows {
            for unit in 0..per_row {
                let (index, [scale, offset]) = (row * per_row + unit, end(row, unit));
                match blocks {
                    true => (grid.blocks[index].d, grid.blocks[index].m) = (scale, offset),
                    false => (grid.scales[index], grid.zeros[index]) = (scale, offset as u8),
                }
            }
        }
        if blocks {
            *grid = Grid::of_blocks(grid.spec.clone(), rows, std::mem::take(&mut grid.blocks));
        }
    }

    fn per_unit(&self) -> usize {
        self.groups / self.units.len()
    }

    fn group_shift(&self) -> Arg {
        match &self.kind {
            Kind::Blocks(encoding, _) if encoding.sub().is_some() => {
                debug_assert!(encoding.group().is_power_of_two(), "columns are found in their groups by shifts");
                (encoding.group().trailing_zeros() as i32).into()
            }
            // A unit is one group.
            Kind::Blocks(..) | Kind::Integers(_) => 31.into(),
        }
    }

    fn has_offset(&self) -> bool {
        match &self.kind {
            Kind::Blocks(encoding, _) => encoding.has_min(),
            Kind::Integers(rules) => !rules.symmetric,
        }
    }

    /// Brings rows to the device in the shape that the rest wants.
    fn start(&self, target: &Matrix, codes: &Buffer, grid: &Grid, rows: Range<usize>, to: u64) -> Result<()> {
        let (cuda, n, height) = (self.cuda, self.n, self.height);
        let (per_row, per_unit) = (self.units.len(), self.per_unit());
        let own = rows.start * per_row..rows.end * per_row;
        let integers = matches!(self.kind, Kind::Integers(_));
        let ends: Vec<f32> = match integers {
            false => grid.blocks[own.clone()].iter().flat_map(|block| [block.d, block.m]).collect(),
            true => own.clone().flat_map(|index| [grid.scales[index], f32::from(grid.zeros[index])]).collect(),
        };
        let bytes = |of: &(dyn Fn(&BlockScales, usize) -> u8 + Sync)| {
            let blocks = &grid.blocks[own.clone()];
            let mut out = vec![0u8; blocks.len() * per_unit];
            out.par_chunks_exact_mut(per_unit).zip(blocks).for_each(|(out, block)| {
                out.iter_mut().enumerate().for_each(|(i, out)| *out = of(block, i));
            });
            cuda.send(&out)
        };
        let subs = match &self.kind {
            Kind::Blocks(encoding, _) if encoding.sub().is_some() => {
                Some((bytes(&|b, i| b.scales[i].cast_unsigned())?, bytes(&|b, i| b.mins[i])?))
            }
            _ => None,
        };
        let ends = cuda.send(&ends)?;
        let subs = match &subs {
            Some((scales, mins)) => Some((scales.pin()?, mins.pin()?)),
            None => None,
        };
        let (ends, factors, expanded) = (ends.pin()?, self.factors.pin()?, self.grid.pin()?);
        let args = [
            factors.arg(),
            Arg::At(to),
            super::at(subs.as_ref().map(|(scales, _)| scales)),
            super::at(subs.as_ref().map(|(_, mins)| mins)),
            ends.arg(),
            // A zero is taken as it is, whether it moves or not.
            (integers || self.has_offset()).into(),
            (rows.len() as i32).into(),
            (self.groups as i32).into(),
            (per_unit as i32).into(),
            (height as i32).into(),
        ];
        cuda.each(&REFINE, "block_columns", self.groups * height, &args)?;
        self.expand(to)?;
        let (target, codes) = (target.buffer.pin_to_read()?, codes.pin()?);
        let (byte_of, levels, errors, pull) =
            (self.byte_of.pin()?, self.levels.pin()?, self.errors.pin()?, self.pull.pin()?);
        let (group_of, order) = (self.group_of.pin()?, self.order.as_ref().map(Buffer::pin).transpose()?);
        let values = self.values.pin()?;
        let args = [
            levels.arg(),
            errors.arg(),
            at(target.at, rows.start * n, 4),
            at(codes.at, rows.start * n, 1),
            byte_of.arg(),
            expanded.arg(),
            group_of.arg(),
            super::at(order.as_ref()),
            values.arg(),
            integers.into(),
            (rows.len() as i32).into(),
            (n as i32).into(),
            (height as i32).into(),
        ];
        cuda.grid(&REFINE, "errors_of", [n.div_ceil(32), height / 32, 1], THREADS, 0, &args)?;
        let hessian = self.hessian.buffer.pin()?;
        cuda.device().product(&Product {
            real: Real::F32,
            shape: [n, height, n],
            a: plain(hessian.at, 0, n),
            b: plain(errors.at, 0, height),
            c: plain(pull.at, 0, height),
            alpha: 1.0,
            beta: 0.0,
        })
    }

    /// Scale and offset of every group.
    fn expand(&self, ends: u64) -> Result<()> {
        let (grid, factors) = (self.grid.pin()?, self.factors.pin()?);
        let args = [
            grid.arg(),
            factors.arg(),
            Arg::At(ends),
            (self.groups as i32).into(),
            (self.per_unit() as i32).into(),
            (self.height as i32).into(),
        ];
        self.cuda.each(&REFINE, "expand_columns", self.groups * self.height, &args)
    }

    /// Adds `H · steps` of the columns `changed`, which lie in `steps` from `skip` on, to the pull of the columns `of`.
    fn add_pull(&self, of: Range<usize>, changed: Range<usize>, skip: usize) -> Result<()> {
        if of.is_empty() || changed.is_empty() {
            return Ok(());
        }
        let (n, height) = (self.n, self.height);
        let (hessian, steps, pull) = (self.hessian.buffer.pin()?, self.steps.pin()?, self.pull.pin()?);
        self.cuda.device().product(&Product {
            real: Real::F32,
            shape: [of.len(), height, changed.len()],
            a: plain(hessian.at, of.start * n + changed.start, n),
            b: plain(steps.at, skip * height, height),
            c: plain(pull.at, of.start * height, height),
            alpha: 1.0,
            beta: 1.0,
        })
    }

    /// One exact move of every unit's scale and offset.
    fn move_scales(&self, ends: u64) -> Result<()> {
        let (has_min, has_sub, stored, rules) = match &self.kind {
            Kind::Blocks(encoding, _) if !moves_scales(encoding) => return Ok(()),
            Kind::Blocks(encoding, stored) => (encoding.has_min(), encoding.sub().is_some(), *stored, None),
            Kind::Integers(rules) => {
                (false, false, Stored { scale: rules.precision, min: None, global: 1.0 }, Some(rules))
            }
        };
        let (cuda, n, height) = (self.cuda, self.n, self.height);
        let (levels, factors, hessian) = (self.levels.pin()?, self.factors.pin()?, self.hessian.buffer.pin()?);
        let (curvature, errors, starts) = (self.curvature.pin()?, self.errors.pin()?, self.starts.pin()?);
        let (pull, steps, values) = (self.pull.pin()?, self.steps.pin()?, self.values.pin()?);
        let args = [
            curvature.arg(),
            levels.arg(),
            values.arg(),
            factors.arg(),
            Arg::At(if rules.is_some() { ends } else { 0 }),
            hessian.arg(),
            starts.arg(),
            self.group_shift(),
            (n as i32).into(),
            (height as i32).into(),
        ];
        let kernel = if self.has_offset() { "curvatures_with_offset" } else { "curvatures" };
        let shape = [height.div_ceil(ROW_THREADS as usize), self.units.len(), 1];
        cuda.grid(&REFINE, kernel, shape, ROW_THREADS, 0, &args)?;
        for some in self.spans() {
            let span = self.units[some.start].start..self.units[some.end - 1].end;
            for (index, unit) in some.clone().zip(&self.units[some]) {
                let skip = unit.start - span.start;
                let args = [
                    at(ends, index * height, 8),
                    errors.arg(),
                    at(steps.at, skip * height, 4),
                    pull.arg(),
                    levels.arg(),
                    values.arg(),
                    factors.arg(),
                    at(curvature.at, index * height, 8),
                    ((self.units.len() * height) as i64).into(),
                    (index as i32).into(),
                    (unit.start as i32).into(),
                    (unit.len() as i32).into(),
                    self.group_shift(),
                    has_min.into(),
                    has_sub.into(),
                    rules.is_some().into(),
                    number_of(stored.scale).into(),
                    stored.min.map_or(0, number_of).into(),
                    stored.global.into(),
                    rules.is_none_or(|rules| rules.symmetric).into(),
                    rules.map_or(0.0, |rules| f32::from(rules.min_zero)).into(),
                    rules.map_or(0.0, |rules| f32::from(rules.max)).into(),
                    (height as i32).into(),
                ];
                cuda.blocks(&REFINE, "move_unit", height / 32, THREADS, 0, &args)?;
                self.add_pull(span.clone(), unit.clone(), skip)?;
            }
            self.add_pull(0..span.start, span.clone(), 0)?;
            self.add_pull(span.end..n, span, 0)?;
        }
        Ok(())
    }

    /// Units whose changes reach the rest together.
    fn spans(&self) -> Vec<Range<usize>> {
        let mut spans: Vec<Range<usize>> = Vec::new();
        for (index, unit) in self.units.iter().enumerate() {
            match spans.last_mut().filter(|span| unit.end - self.units[span.start].start <= SPAN) {
                Some(span) => span.end = index + 1,
                None => spans.push(index..index + 1),
            }
        }
        spans
    }

    /// One round over all codes, each to where the loss is least while the others stay.
    fn move_codes(&self, ends: u64) -> Result<()> {
        self.expand(ends)?;
        let (cuda, n, height) = (self.cuda, self.n, self.height);
        let (levels, errors, steps, pull) =
            (self.levels.pin()?, self.errors.pin()?, self.steps.pin()?, self.pull.pin()?);
        let (hessian, grid, group_of) = (self.hessian.buffer.pin()?, self.grid.pin()?, self.group_of.pin()?);
        let set = self.set.as_ref().map(Buffer::pin).transpose()?;
        let values = self.values.pin()?;
        let (kernel, rounding) = match (&self.kind, &set) {
            (Kind::Integers(rules), _) => ("move_codes", vec![Arg::Float(rules.max.into())]),
            (Kind::Blocks(..), Some(set)) => ("move_levels", vec![set.arg(), values.arg()]),
            _ => unreachable!("blocks have levels"),
        };
        for start in (0..n).step_by(SPAN) {
            let end = n.min(start + SPAN);
            for first in (start..end).step_by(CODES) {
                let last = end.min(first + CODES);
                let mut args = vec![
                    levels.arg(),
                    errors.arg(),
                    at(steps.at, (first - start) * height, 4),
                    pull.arg(),
                    hessian.arg(),
                    grid.arg(),
                    group_of.arg(),
                    (first as i32).into(),
                    ((last - first) as i32).into(),
                    (n as i32).into(),
                    (height as i32).into(),
                ];
                args.extend(rounding.iter().copied());
                cuda.blocks(&REFINE, kernel, height / ROWS, ROW_THREADS, 0, &args)?;
                // The panel's own pull is up to date already.
                self.add_pull(start..first, first..last, first - start)?;
                self.add_pull(last..end, first..last, first - start)?;
            }
            self.add_pull(0..start, start..end, 0)?;
            self.add_pull(end..n, start..end, 0)?;
        }
        Ok(())
    }
}
