//! The sweep over columns, and the refinement after it.

use std::ops::Range;

use formats::ggml::BlockScales;
use formats::{Encoding, Float};
use rayon::prelude::*;

use super::blocks::level_set_of;
use super::factor::{Halves, operand, pinned, transposed};
use super::{
    Arg, Buffer, Codes, Cuda, Matrix, Module, Operand, Product, Real, THREADS, expect, expect_grid, expect_refined,
};
use crate::backend::{Factor, Grid, Swept};
use crate::ops::levels::codes_of;
use crate::{Error, Result};

pub(super) static SWEEP: Module = Module { name: "sweep", source: include_str!("../ops/sweep.cu") };
pub(super) static REFINE: Module = Module { name: "refine", source: include_str!("../ops/refine.cu") };

/// Rows that are at work at a time: enough for every device, so few that they leave room for the rest.
pub(super) const CHUNK: usize = 16384;
/// Columns of a panel of the sweep, rows and threads of its blocks.
const PANEL: usize = 128;
const ROWS: usize = 32;
const ROW_THREADS: u32 = 128;

/// A target, the scales of its groups, and what they are scales of.
struct Part<'a> {
    target: &'a Matrix,
    /// `[rows, groups]`.
    scales: &'a [f32],
    /// `[rows, groups]` of zeros or of mins.
    offsets: Offsets<'a>,
}

#[derive(Clone, Copy)]
enum Offsets<'a> {
    Zeros(&'a [u8]),
    Mins(&'a [f32]),
}

/// How values are rounded, the same in all parts of a sweep.
struct Points<'a> {
    groups: usize,
    /// `[cols]`.
    group_of: &'a [u32],
    kind: Kind,
}

enum Kind {
    /// To codes up to this one.
    Codes(f32),
    /// To levels; the code of each, at `level + 128`.
    Levels { set: Vec<u8>, codes: Vec<u8> },
}

/// Rows of a part that are swept together with others, and where they lie among them.
struct Share {
    part: usize,
    /// Its first row.
    first: usize,
    rows: usize,
    /// Where that is among all that are swept together; a multiple of [`ROWS`].
    at: usize,
}

/// One sweep: its parts, and which of their rows go together.
#[derive(Clone, Copy)]
struct Sweeping<'a> {
    parts: &'a [Part<'a>],
    factor: &'a Factor<Matrix>,
    points: &'a Points<'a>,
    rounds: &'a [Vec<Share>],
    /// Rows that there is room for.
    height: usize,
}

/// Rows that a round takes, padding between its shares included.
fn height_of(round: &[Share]) -> usize {
    round.last().map_or(0, |last| last.at + last.rows.next_multiple_of(ROWS))
}

/// Divides parts of so many rows into rounds of at most [`CHUNK`].
fn rounds(parts: impl Iterator<Item = usize>) -> Vec<Vec<Share>> {
    let mut rounds: Vec<Vec<Share>> = Vec::new();
    for (part, rows) in parts.enumerate() {
        for first in (0..rows).step_by(CHUNK) {
            let some = CHUNK.min(rows - first);
            match rounds.last_mut().filter(|round| height_of(round) + some.next_multiple_of(ROWS) <= CHUNK) {
                Some(round) => {
                    let at = height_of(round);
                    round.push(Share { part, first, rows: some, at });
                }
                None => rounds.push(vec![Share { part, first, rows: some, at: 0 }]),
            }
        }
    }
    rounds
}

fn at(base: u64, offset: usize, bytes: usize) -> Arg {
    Arg::At(base + (offset * bytes) as u64)
}

fn plain(at: u64, offset: usize, stride: usize) -> Operand {
    Operand { at: at + 4 * offset as u64, stride, transposed: false }
}

impl Cuda {
    /// Weights whose grids have the same levels and groups are swept side by side, as far as they fit.
    pub(super) fn swept(&self, targets: &[(&Matrix, &Grid)], factor: &Factor<Matrix>) -> Result<Vec<Swept<Codes>>> {
        let mut all = Vec::with_capacity(targets.len());
        let alike = |a: &&(&Matrix, &Grid), b: &&(&Matrix, &Grid)| {
            let (a, b) = (&a.1.spec, &b.1.spec);
            let same = match (a.encoding.ggml_type(), b.encoding.ggml_type()) {
                (None, None) => a.encoding.max_code() == b.encoding.max_code(),
                (a, b) => a == b,
            };
            same && a.groups() == b.groups() && a.group_of == b.group_of
        };
        let targets: Vec<&(&Matrix, &Grid)> = targets.iter().collect();
        for same in targets.chunk_by(alike) {
            let spec = &same[0].1.spec;
            let blocks = spec.encoding.ggml_type().is_some();
            let mut parts = Vec::with_capacity(same.len());
            for (target, grid) in same {
                expect_grid("sweep", [target.rows, target.cols], grid)?;
                expect("sweep", "columns", factor.order.len(), target.cols)?;
                let offsets = if blocks { Offsets::Mins(&grid.mins) } else { Offsets::Zeros(&grid.zeros) };
                parts.push(Part { target, scales: &grid.scales, offsets });
            }
            let kind = match blocks {
                false => Kind::Codes(f32::from(spec.encoding.max_code())),
                true => Kind::Levels { set: level_set_of(&spec.encoding), codes: codes_of(&spec.encoding).to_vec() },
            };
            let points = Points { groups: spec.groups(), group_of: &spec.group_of, kind };
            all.extend(self.sweep_parts(&parts, factor, &points)?);
        }
        Ok(all)
    }

    /// Sweeps targets of one width, each on its own scales.
    fn sweep_parts(
        &self,
        parts: &[Part<'_>],
        factor: &Factor<Matrix>,
        points: &Points<'_>,
    ) -> Result<Vec<Swept<Codes>>> {
        let (n, groups) = (factor.order.len(), points.groups);
        expect("sweep", "groups of columns", n, points.group_of.len())?;
        expect("sweep", "pivots", n, factor.pivots.len())?;
        expect("sweep", "rows of the factor", n, factor.unit.rows)?;
        expect("sweep", "columns of the factor", n, factor.unit.cols)?;
        for part in parts {
            expect("sweep", "scales", part.target.rows * groups, part.scales.len())?;
        }
        let outside = |values: &[u32], end: usize| values.iter().find(|x| **x as usize >= end).copied();
        if let Some(found) = outside(&factor.order, n).or(outside(points.group_of, groups)) {
            let expected = format!("columns below {n} and groups below {groups}");
            return Err(Error::Shape { op: "sweep", expected, found: found.to_string() });
        }
        let codes = |part: &Part<'_>| {
            let (rows, cols) = (part.target.rows, n);
            Ok(Codes { buffer: self.buffer::<u8>(rows * cols)?, rows, cols })
        };
        let out = parts.iter().map(codes).collect::<Result<Vec<Codes>>>()?;
        let mut losses = vec![0.0f64; parts.len()];
        let rounds = rounds(parts.iter().map(|part| part.target.rows));
        let height = rounds.iter().map(|round| height_of(round)).max().unwrap_or(0);
        if height * n > 0 {
            self.sweep_rounds(&Sweeping { parts, factor, points, rounds: &rounds, height }, &out, &mut losses)?;
        }
        Ok(out.into_iter().zip(losses).map(|(codes, loss)| Swept { codes, loss }).collect())
    }

    fn sweep_rounds(&self, sweeping: &Sweeping<'_>, out: &[Codes], losses: &mut [f64]) -> Result<()> {
        let Sweeping { parts, factor, points, rounds, height } = *sweeping;
        let (n, groups) = (factor.order.len(), points.groups);
        let group_at: Vec<u32> = factor.order.iter().map(|col| points.group_of[*col as usize]).collect();
        let (order, group_at, pivots) = (self.send(&factor.order)?, self.send(&group_at)?, self.send(&factor.pivots)?);
        let (set, table) = match &points.kind {
            Kind::Codes(_) => (None, None),
            Kind::Levels { set, codes } => (Some(self.send(set)?), Some(self.send(codes)?)),
        };
        let [columns, feedback] = [self.buffer::<f32>(n * height)?, self.buffer::<f32>(n * height)?];
        let (errors, grid) = (self.buffer::<f32>(PANEL * height)?, self.buffer::<f32>(4 * groups * height)?);
        let codes = self.buffer::<u8>(n * height)?;
        let lost = self.cleared::<f64>(rounds.len() * height)?;
        let (order, group_at, pivots) = (order.pin()?, group_at.pin()?, pivots.pin()?);
        let set = set.as_ref().map(Buffer::pin).transpose()?;
        // What hands the errors of a panel on, and those errors, as sums of two of bfloat16 where the card multiplies them so.
        let unit_halves = self.halves(factor.unit.buffer.pin_to_read()?.at, n * n)?;
        let error_halves = self.room_of_halves(PANEL * height)?;
        for (index, round) in rounds.iter().enumerate() {
            let (columns, feedback, errors) = (columns.pin()?, feedback.pin()?, errors.pin()?);
            let (grid, codes, lost) = (grid.pin()?, codes.pin()?, lost.pin()?);
            for share in round {
                let part = &parts[share.part];
                let target = part.target.buffer.pin_to_read()?;
                let from = target.at + 4 * (share.first * n) as u64;
                self.to_columns(columns.at + 4 * share.at as u64, from, share.rows, n, height)?;
                self.send_grid_columns(grid.at + 16 * share.at as u64, part, share, groups, height)?;
            }
            self.device().clear(feedback.at, 4 * n * height)?;
            let unit = factor.unit.buffer.pin_to_read()?;
            let unit_halves = unit_halves.as_ref().map(pinned).transpose()?;
            let error_halves = error_halves.as_ref().map(pinned).transpose()?;
            let units = Halves::of(&unit, unit_halves.as_ref());
            for start in (0..n).step_by(PANEL) {
                let width = PANEL.min(n - start);
                let (kernel, rounding) = match (&points.kind, &set) {
                    (Kind::Levels { .. }, Some(set)) => ("sweep_levels", set.arg()),
                    (Kind::Codes(max), _) => ("sweep_codes", (*max).into()),
                    _ => unreachable!("levels have a set"),
                };
                let args = [
                    columns.arg(),
                    feedback.arg(),
                    unit.arg(),
                    pivots.arg(),
                    order.arg(),
                    group_at.arg(),
                    grid.arg(),
                    codes.arg(),
                    errors.arg(),
                    at(lost.at, index * height, 8),
                    (start as i32).into(),
                    (width as i32).into(),
                    (n as i32).into(),
                    (height as i32).into(),
                    rounding,
                ];
                self.blocks(&SWEEP, kernel, height_of(round) / ROWS, ROW_THREADS, 0, &args)?;
                let end = start + width;
                if end < n {
                    if let Some(halves) = &error_halves {
                        self.split(errors.at, halves, width * height)?;
                    }
                    let product = Product {
                        real: Real::F32,
                        shape: [n - end, height_of(round), width],
                        a: transposed(0, n),
                        b: operand(0, height),
                        c: plain(feedback.at, end * height, height),
                        alpha: 1.0,
                        beta: 1.0,
                    };
                    let errors = Halves::of(&errors, error_halves.as_ref());
                    self.multiply_split(product, [units, errors], [start * n + end, 0])?;
                }
            }
            for share in round {
                let from = codes.at + share.at as u64;
                self.to_rows(&out[share.part].buffer, share.first, from, table.as_ref(), share.rows, n, height)?;
            }
        }
        let lost = self.fetch::<f64>(&lost, rounds.len() * height)?;
        for (round, lost) in rounds.iter().zip(lost.chunks_exact(height)) {
            for share in round {
                losses[share.part] += lost[share.at..][..share.rows].iter().sum::<f64>();
            }
        }
        Ok(())
    }

    /// Scales of a share's rows, and their zeros or mins, in columns.
    fn send_grid_columns(&self, to: u64, part: &Part<'_>, share: &Share, groups: usize, height: usize) -> Result<()> {
        let own = share.first * groups..(share.first + share.rows) * groups;
        let scales = self.send(&part.scales[own.clone()])?;
        let (zeros, mins) = match part.offsets {
            Offsets::Zeros(zeros) => (Some(self.send(&zeros[own])?), None),
            Offsets::Mins(mins) => (None, Some(self.send(&mins[own])?)),
        };
        let (scales, zeros, mins) =
            (scales.pin()?, zeros.as_ref().map(Buffer::pin).transpose()?, mins.as_ref().map(Buffer::pin).transpose()?);
        let padded = share.rows.next_multiple_of(ROWS);
        let args = [
            Arg::At(to),
            scales.arg(),
            super::at(zeros.as_ref()),
            super::at(mins.as_ref()),
            (share.rows as i32).into(),
            (padded as i32).into(),
            (groups as i32).into(),
            (height as i32).into(),
        ];
        self.each(&SWEEP, "grid_columns", groups * padded, &args)
    }

    /// `[rows, cols]` to `[cols][height]`, zeros up to the next multiple of 32 rows.
    fn to_columns(&self, to: u64, from: u64, rows: usize, cols: usize, height: usize) -> Result<()> {
        let args = [Arg::At(to), Arg::At(from), (rows as i32).into(), (cols as i32).into(), (height as i32).into()];
        self.grid(&SWEEP, "columns_of", [cols.div_ceil(32), rows.div_ceil(32), 1], THREADS, 0, &args)
    }

    /// Codes in columns to the rows from `first` on.
    fn to_rows(
        &self,
        to: &Buffer,
        first: usize,
        from: u64,
        table: Option<&Buffer>,
        rows: usize,
        cols: usize,
        height: usize,
    ) -> Result<()> {
        let (to, table) = (to.pin()?, table.map(Buffer::pin).transpose()?);
        let args = [
            at(to.at, first * cols, 1),
            Arg::At(from),
            super::at(table.as_ref()),
            (rows as i32).into(),
            (cols as i32).into(),
            (height as i32).into(),
        ];
        self.grid(&SWEEP, "codes_to_rows", [cols.div_ceil(32), rows.div_ceil(32), 1], THREADS, 0, &args)
    }

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
        let ty = grid.spec.encoding.ggml_type().expect("checked");
        let (encoding, per_row) = (&ty.encoding(), n / ty.block_len);
        if rows * n == 0 {
            return Ok(0.0);
        }
        let hessian = self.matrix(n, n)?;
        {
            let (hessian, gram) = (hessian.buffer.pin()?, gram.buffer.pin_to_read()?);
            let args = [hessian.arg(), gram.arg(), (1.0 + damp).into(), (n as i32).into()];
            self.grid(&REFINE, "damped_whole", [n.div_ceil(32), n.div_ceil(32), 1], THREADS, 0, &args)?;
        }
        let height = CHUNK.min(rows.next_multiple_of(ROWS));
        let work = Refinement {
            cuda: self,
            hessian,
            encoding,
            n,
            height,
            width: ty.block_len,
            set: self.send(&level_set_of(encoding))?,
            levels: self.buffer::<u8>(n * height)?,
            errors: self.buffer::<f32>(n * height)?,
            pull: self.buffer::<f32>(n * height)?,
            steps: self.buffer::<f32>(SPAN * height)?,
            factors: self.buffer::<f32>(2 * (n / encoding.group()) * height)?,
            grid: self.buffer::<f32>(4 * (n / encoding.group()) * height)?,
            curvature: self.buffer::<f64>(3 * per_row * height)?,
        };
        let (level_of, code_of) = (self.send(&levels_of(encoding))?, self.send(&codes_of(encoding)[..])?);
        let chunks = rows.div_ceil(height);
        let (sent, losses) = (&codes.buffer, self.buffer::<f64>(chunks * height)?);
        // [chunks][blocks][height] of scales and mins.
        let ends = self.buffer::<f32>(2 * chunks * per_row * height)?;
        for (chunk, first) in (0..rows).step_by(height).enumerate() {
            let some = height.min(rows - first);
            let blocks = &grid.blocks[first * per_row..][..some * per_row];
            // What else is pinned meanwhile must not push it out.
            let pinned = ends.pin()?;
            let own = pinned.at + (8 * chunk * per_row * height) as u64;
            work.start(&Chunk { target, codes: sent, level_of: &level_of, first, rows: some, blocks, ends: own })?;
            work.move_scales(own)?;
            work.move_codes(own)?;
            work.move_scales(own)?;
            {
                let (losses, errors, pull) = (losses.pin()?, work.errors.pin()?, work.pull.pin()?);
                let hessian = work.hessian.buffer.pin()?;
                let args = [
                    at(losses.at, chunk * height, 8),
                    errors.arg(),
                    pull.arg(),
                    hessian.arg(),
                    (n as i32).into(),
                    (height as i32).into(),
                ];
                self.blocks(&REFINE, "refined_loss", height / 32, THREADS, 0, &args)?;
            }
            self.to_rows(sent, first, work.levels.pin()?.at, Some(&code_of), some, n, height)?;
        }
        let found = self.fetch::<f32>(&ends, 2 * chunks * per_row * height)?;
        let mut blocks = std::mem::take(&mut grid.blocks);
        for (row, blocks) in blocks.chunks_exact_mut(per_row).enumerate() {
            let (chunk, within) = (row / height, row % height);
            for (index, block) in blocks.iter_mut().enumerate() {
                let from = 2 * ((chunk * per_row + index) * height + within);
                (block.d, block.m) = (found[from], found[from + 1]);
            }
        }
        *grid = Grid::of_blocks(ty, rows, n, blocks);
        Ok(self.fetch::<f64>(&losses, rows)?.iter().sum())
    }
}

/// Columns whose changes reach the rest of the pull together, in one product.
const SPAN: usize = 256;
/// Columns of a panel of codes.
const CODES: usize = 64;

/// The level of each code; of those that the type has not, 0.
fn levels_of(encoding: &Encoding) -> Vec<u8> {
    let mut levels: Vec<u8> =
        (0..encoding.levels.count()).map(|code| (encoding.levels.level(code as u8) as i8).cast_unsigned()).collect();
    levels.resize(256, 0);
    levels
}

/// Rows that are refined together, and where their blocks' scales and mins lie.
struct Chunk<'a> {
    target: &'a Matrix,
    codes: &'a Buffer,
    level_of: &'a Buffer,
    first: usize,
    rows: usize,
    blocks: &'a [BlockScales],
    ends: u64,
}

/// What a refinement works in; columns one after the other, rows side by side.
struct Refinement<'a> {
    cuda: &'a Cuda,
    hessian: Matrix,
    encoding: &'a Encoding,
    n: usize,
    height: usize,
    /// Columns of a block.
    width: usize,
    set: Buffer,
    levels: Buffer,
    /// What is missing: target minus value.
    errors: Buffer,
    /// `H` times that.
    pull: Buffer,
    /// `[SPAN]` columns of what errors have changed by.
    steps: Buffer,
    factors: Buffer,
    grid: Buffer,
    curvature: Buffer,
}

impl Refinement<'_> {
    fn groups(&self) -> usize {
        self.n / self.encoding.group()
    }

    fn per_block(&self) -> usize {
        self.width / self.encoding.group()
    }

    fn group_shift(&self) -> Arg {
        debug_assert!(self.encoding.group().is_power_of_two(), "columns are found in their groups by shifts");
        (self.encoding.group().trailing_zeros() as i32).into()
    }

    /// Brings rows to the device in the shape that the rest wants.
    fn start(&self, chunk: &Chunk<'_>) -> Result<()> {
        let (cuda, n, height) = (self.cuda, self.n, self.height);
        let ends: Vec<f32> = chunk.blocks.iter().flat_map(|block| [block.d, block.m]).collect();
        let per_block = self.per_block();
        let bytes = |of: &(dyn Fn(&BlockScales, usize) -> u8 + Sync)| {
            let mut out = vec![0u8; chunk.blocks.len() * per_block];
            out.par_chunks_exact_mut(per_block).zip(chunk.blocks).for_each(|(out, block)| {
                out.iter_mut().enumerate().for_each(|(i, out)| *out = of(block, i));
            });
            cuda.send(&out)
        };
        let subs = match self.encoding.sub() {
            Some(_) => Some((bytes(&|b, i| b.scales[i].cast_unsigned())?, bytes(&|b, i| b.mins[i])?)),
            None => None,
        };
        let ends = cuda.send(&ends)?;
        let subs = match &subs {
            Some((scales, mins)) => Some((scales.pin()?, mins.pin()?)),
            None => None,
        };
        let (ends, factors, grid) = (ends.pin()?, self.factors.pin()?, self.grid.pin()?);
        let args = [
            factors.arg(),
            Arg::At(chunk.ends),
            super::at(subs.as_ref().map(|(scales, _)| scales)),
            super::at(subs.as_ref().map(|(_, mins)| mins)),
            ends.arg(),
            self.encoding.has_min().into(),
            (chunk.rows as i32).into(),
            (self.groups() as i32).into(),
            (per_block as i32).into(),
            (height as i32).into(),
        ];
        cuda.each(&REFINE, "block_columns", self.groups() * height, &args)?;
        self.expand(chunk.ends)?;
        let (target, codes) = (chunk.target.buffer.pin_to_read()?, chunk.codes.pin()?);
        let (level_of, levels, errors, pull) =
            (chunk.level_of.pin()?, self.levels.pin()?, self.errors.pin()?, self.pull.pin()?);
        let args = [
            levels.arg(),
            errors.arg(),
            at(target.at, chunk.first * n, 4),
            at(codes.at, chunk.first * n, 1),
            level_of.arg(),
            grid.arg(),
            (self.encoding.group() as i32).into(),
            (chunk.rows as i32).into(),
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

    /// Scale and min of every group.
    fn expand(&self, ends: u64) -> Result<()> {
        let (grid, factors) = (self.grid.pin()?, self.factors.pin()?);
        let args = [
            grid.arg(),
            factors.arg(),
            Arg::At(ends),
            (self.groups() as i32).into(),
            (self.per_block() as i32).into(),
            (self.height as i32).into(),
        ];
        self.cuda.each(&REFINE, "expand_columns", self.groups() * self.height, &args)
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

    /// One exact move of every block's scale and min.
    fn move_scales(&self, ends: u64) -> Result<()> {
        // A power of two has no room to move.
        if self.encoding.precision() == Float::E8M0 {
            return Ok(());
        }
        let (cuda, n, height, width) = (self.cuda, self.n, self.height, self.width);
        let (levels, factors, hessian) = (self.levels.pin()?, self.factors.pin()?, self.hessian.buffer.pin()?);
        let (curvature, errors) = (self.curvature.pin()?, self.errors.pin()?);
        let (pull, steps) = (self.pull.pin()?, self.steps.pin()?);
        let args = [
            curvature.arg(),
            levels.arg(),
            factors.arg(),
            hessian.arg(),
            (width as i32).into(),
            self.group_shift(),
            (n as i32).into(),
            (height as i32).into(),
        ];
        let kernel = if self.encoding.has_min() { "curvatures_with_min" } else { "curvatures" };
        let shape = [height.div_ceil(ROW_THREADS as usize), n / width, 1];
        cuda.grid(&REFINE, kernel, shape, ROW_THREADS, 0, &args)?;
        for start in (0..n).step_by(SPAN) {
            let end = n.min(start + SPAN);
            for first in (start..end).step_by(width) {
                let block = first / width;
                let args = [
                    at(ends, block * height, 8),
                    errors.arg(),
                    at(steps.at, (first - start) * height, 4),
                    pull.arg(),
                    levels.arg(),
                    factors.arg(),
                    at(curvature.at, block * height, 8),
                    ((n / width * height) as i64).into(),
                    (first as i32).into(),
                    (width as i32).into(),
                    self.group_shift(),
                    self.encoding.has_min().into(),
                    self.encoding.sub().is_some().into(),
                    (height as i32).into(),
                ];
                cuda.blocks(&REFINE, "move_block", height / 32, THREADS, 0, &args)?;
                self.add_pull(start..end, first..first + width, first - start)?;
            }
            self.add_pull(0..start, start..end, 0)?;
            self.add_pull(end..n, start..end, 0)?;
        }
        Ok(())
    }

    /// One round over all codes, each to where the loss is least while the others stay.
    fn move_codes(&self, ends: u64) -> Result<()> {
        self.expand(ends)?;
        let (cuda, n, height) = (self.cuda, self.n, self.height);
        let (levels, errors, steps, pull) =
            (self.levels.pin()?, self.errors.pin()?, self.steps.pin()?, self.pull.pin()?);
        let (hessian, grid, set) = (self.hessian.buffer.pin()?, self.grid.pin()?, self.set.pin()?);
        for start in (0..n).step_by(SPAN) {
            let end = n.min(start + SPAN);
            for first in (start..end).step_by(CODES) {
                let last = end.min(first + CODES);
                let args = [
                    levels.arg(),
                    errors.arg(),
                    at(steps.at, (first - start) * height, 4),
                    pull.arg(),
                    hessian.arg(),
                    grid.arg(),
                    set.arg(),
                    (first as i32).into(),
                    ((last - first) as i32).into(),
                    self.group_shift(),
                    (n as i32).into(),
                    (height as i32).into(),
                ];
                cuda.blocks(&REFINE, "move_codes", height / ROWS, ROW_THREADS, 0, &args)?;
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
