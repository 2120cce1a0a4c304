//! The sweep over columns.

use super::blocks::level_set_of;
use super::factor::{Halves, operand, pinned, transposed};
use super::{Arg, Buffer, Codes, Cuda, Matrix, Module, Operand, Product, Real, THREADS, expect, expect_grid};
use crate::backend::{Factor, Grid, Swept};
use crate::ops::levels::codes_of;
use crate::{Error, Result};

pub(super) static SWEEP: Module = Module { name: "sweep", source: include_str!("../ops/sweep.cu") };

/// Rows that are at work at a time: enough for every device, so few that they leave room for the rest.
pub(super) const CHUNK: usize = 16384;
/// Columns of a panel of the sweep, rows and threads of its blocks.
const PANEL: usize = 128;
pub(super) const ROWS: usize = 32;
pub(super) const ROW_THREADS: u32 = 128;

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

pub(super) fn at(base: u64, offset: usize, bytes: usize) -> Arg {
    Arg::At(base + (offset * bytes) as u64)
}

pub(super) fn plain(at: u64, offset: usize, stride: usize) -> Operand {
    Operand { at: at + 4 * offset as u64, stride, transposed: false }
}

impl Cuda {
    /// Weights whose grids have the same levels and groups are swept side by side, as far as they fit.
    pub(super) fn swept(&self, targets: &[(&Matrix, &Grid)], factor: &Factor<Matrix>) -> Result<Vec<Swept<Codes>>> {
        let mut all = Vec::with_capacity(targets.len());
        let alike = |a: &&(&Matrix, &Grid), b: &&(&Matrix, &Grid)| {
            let (a, b) = (&a.1.spec, &b.1.spec);
            let same = match (a.encoding.is_integers(), b.encoding.is_integers()) {
                (true, true) => a.encoding.max_code() == b.encoding.max_code(),
                (a_is, b_is) => a_is == b_is && a.encoding.levels == b.encoding.levels,
            };
            same && a.groups() == b.groups() && a.group_of == b.group_of
        };
        let targets: Vec<&(&Matrix, &Grid)> = targets.iter().collect();
        for same in targets.chunk_by(alike) {
            let spec = &same[0].1.spec;
            let blocks = !spec.encoding.is_integers();
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
                self.to_rows(
                    &out[share.part].buffer,
                    share.first,
                    from,
                    [table.as_ref(), None],
                    share.rows,
                    n,
                    height,
                )?;
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

    /// Codes in columns to the rows from `first` on, through a table of codes and to the columns of an order, where there are these.
    pub(super) fn to_rows(
        &self,
        to: &Buffer,
        first: usize,
        from: u64,
        [table, order]: [Option<&Buffer>; 2],
        rows: usize,
        cols: usize,
        height: usize,
    ) -> Result<()> {
        let (to, table) = (to.pin()?, table.map(Buffer::pin).transpose()?);
        let order = order.map(Buffer::pin).transpose()?;
        let args = [
            at(to.at, first * cols, 1),
            Arg::At(from),
            super::at(table.as_ref()),
            super::at(order.as_ref()),
            (rows as i32).into(),
            (cols as i32).into(),
            (height as i32).into(),
        ];
        self.grid(&SWEEP, "codes_to_rows", [cols.div_ceil(32), rows.div_ceil(32), 1], THREADS, 0, &args)
    }
}
