//! The sweep over columns, and the refinement after it.

use super::blocks::ladder_of;
use super::{Arg, Buffer, Cuda, Matrix, Module, Operand, Product, Real, THREADS, expect};
use crate::backend::{BlockGrid, Factor, Grid, Swept};
use crate::ops::blocks::codes_of;
use crate::{Error, Result};

pub(super) static SWEEP: Module = Module { name: "sweep", source: include_str!("../ops/sweep.cu") };
pub(super) static REFINE: Module = Module { name: "refine", source: include_str!("../ops/refine.cu") };

/// Rows that are at work at a time: enough for every device, so few that they leave room for the rest.
const CHUNK: usize = 16384;
/// Columns of a panel of the sweep, rows and threads of its blocks.
const PANEL: usize = 128;
const ROWS: usize = 32;
const ROW_THREADS: u32 = 128;

/// Scales of every group and how values are rounded onto them.
struct Points<'a> {
    op: &'static str,
    rows: usize,
    groups: usize,
    /// `[cols]`.
    group_of: &'a [u32],
    /// `[rows, groups]`.
    scales: &'a [f32],
    kind: Kind<'a>,
}

enum Kind<'a> {
    Codes {
        zeros: &'a [u8],
        max: f32,
    },
    Levels {
        mins: &'a [f32],
        ladder: Vec<u8>,
        /// The code of each level, at `level + 128`.
        codes: [u8; 256],
    },
}

fn at(base: u64, offset: usize, bytes: usize) -> Arg {
    Arg::At(base + (offset * bytes) as u64)
}

fn plain(at: u64, offset: usize, stride: usize) -> Operand {
    Operand { at: at + 4 * offset as u64, stride, transposed: false }
}

impl Cuda {
    pub(super) fn swept(&self, target: &Matrix, factor: &Factor<Matrix>, grid: &Grid) -> Result<Swept> {
        expect("sweep", "rows", grid.rows, target.rows)?;
        expect("sweep", "columns", factor.order.len(), target.cols)?;
        expect("sweep", "zeros", grid.scales.len(), grid.zeros.len())?;
        let max = f32::from(grid.spec.scheme.max_code());
        self.sweep_points(
            target,
            factor,
            &Points {
                op: "sweep",
                rows: grid.rows,
                groups: grid.spec.groups(),
                group_of: &grid.spec.group_of,
                scales: &grid.scales,
                kind: Kind::Codes { zeros: &grid.zeros, max },
            },
        )
    }

    pub(super) fn swept_blocks(&self, target: &Matrix, factor: &Factor<Matrix>, grid: &BlockGrid) -> Result<Swept> {
        expect("sweep_blocks", "rows", grid.rows, target.rows)?;
        expect("sweep_blocks", "columns", grid.cols, target.cols)?;
        expect("sweep_blocks", "columns", factor.order.len(), target.cols)?;
        expect("sweep_blocks", "mins", grid.scales.len(), grid.mins.len())?;
        let layout = grid.ty.layout().expect("a type with codes");
        let group_of: Vec<u32> = (0..grid.cols).map(|col| (col / layout.group) as u32).collect();
        let kind = Kind::Levels { mins: &grid.mins, ladder: ladder_of(layout), codes: codes_of(layout) };
        self.sweep_points(
            target,
            factor,
            &Points {
                op: "sweep_blocks",
                rows: grid.rows,
                groups: grid.cols / layout.group,
                group_of: &group_of,
                scales: &grid.scales,
                kind,
            },
        )
    }

    fn sweep_points(&self, target: &Matrix, factor: &Factor<Matrix>, points: &Points<'_>) -> Result<Swept> {
        let (rows, n, groups) = (points.rows, target.cols, points.groups);
        expect(points.op, "groups of columns", n, points.group_of.len())?;
        expect(points.op, "scales", rows * groups, points.scales.len())?;
        expect(points.op, "pivots", n, factor.pivots.len())?;
        expect(points.op, "rows of the factor", n, factor.unit.rows)?;
        expect(points.op, "columns of the factor", n, factor.unit.cols)?;
        let outside = |values: &[u32], end: usize| values.iter().find(|x| **x as usize >= end).copied();
        if let Some(found) = outside(&factor.order, n).or(outside(points.group_of, groups)) {
            let expected = format!("columns below {n} and groups below {groups}");
            return Err(Error::Shape { op: points.op, expected, found: found.to_string() });
        }
        if rows * n == 0 {
            return Ok(Swept { codes: Vec::new(), loss: 0.0 });
        }
        let height = CHUNK.min(rows.next_multiple_of(ROWS));
        let group_at: Vec<u32> = factor.order.iter().map(|col| points.group_of[*col as usize]).collect();
        let (order, group_at, pivots) = (self.send(&factor.order)?, self.send(&group_at)?, self.send(&factor.pivots)?);
        let scales = self.send(points.scales)?;
        let (seconds, ladder, table) = match &points.kind {
            Kind::Codes { zeros, .. } => (self.send(zeros)?, None, None),
            Kind::Levels { mins, ladder, codes } => {
                (self.send(mins)?, Some(self.send(ladder)?), Some(self.send(&codes[..])?))
            }
        };
        let [columns, feedback] = [self.buffer::<f32>(n * height)?, self.buffer::<f32>(n * height)?];
        let (errors, grid) = (self.buffer::<f32>(PANEL * height)?, self.buffer::<f32>(4 * groups * height)?);
        let (codes, out) = (self.buffer::<u8>(n * height)?, self.buffer::<u8>(rows * n)?);
        let losses = self.cleared::<f64>(rows.next_multiple_of(height))?;
        {
            let (order, group_at, pivots) = (order.pin()?, group_at.pin()?, pivots.pin()?);
            let (scales, seconds) = (scales.pin()?, seconds.pin()?);
            let ladder = ladder.as_ref().map(Buffer::pin).transpose()?;
            let (columns, feedback, errors) = (columns.pin()?, feedback.pin()?, errors.pin()?);
            let (grid, codes, losses) = (grid.pin()?, codes.pin()?, losses.pin()?);
            let (target, unit) = (target.buffer.pin()?, factor.unit.buffer.pin()?);
            for first in (0..rows).step_by(CHUNK) {
                let some = CHUNK.min(rows - first);
                self.to_columns(columns.at, target.at + 4 * (first * n) as u64, some, n, height)?;
                let (zeros, mins) = match &points.kind {
                    Kind::Codes { .. } => (at(seconds.at, first * groups, 1), Arg::At(0)),
                    Kind::Levels { .. } => (Arg::At(0), at(seconds.at, first * groups, 4)),
                };
                let args = [
                    grid.arg(),
                    at(scales.at, first * groups, 4),
                    zeros,
                    mins,
                    (some as i32).into(),
                    (groups as i32).into(),
                    (height as i32).into(),
                ];
                self.each(&SWEEP, "grid_columns", groups * height, &args)?;
                self.device().clear(feedback.at, 4 * n * height)?;
                for start in (0..n).step_by(PANEL) {
                    let width = PANEL.min(n - start);
                    let (kernel, rounding) = match (&points.kind, &ladder) {
                        (Kind::Levels { .. }, Some(ladder)) => ("sweep_levels", ladder.arg()),
                        (Kind::Codes { max, .. }, _) => ("sweep_codes", (*max).into()),
                        _ => unreachable!("levels have a ladder"),
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
                        at(losses.at, first, 8),
                        (start as i32).into(),
                        (width as i32).into(),
                        (n as i32).into(),
                        (height as i32).into(),
                        rounding,
                    ];
                    self.blocks(&SWEEP, kernel, height / ROWS, ROW_THREADS, 0, &args)?;
                    let end = start + width;
                    if end < n {
                        self.device().product(&Product {
                            real: Real::F32,
                            shape: [n - end, height, width],
                            a: Operand { transposed: true, ..plain(unit.at, start * n + end, n) },
                            b: plain(errors.at, 0, height),
                            c: plain(feedback.at, end * height, height),
                            alpha: 1.0,
                            beta: 1.0,
                        })?;
                    }
                }
                self.to_rows(&out, first, codes.at, table.as_ref(), some, n, height)?;
            }
        }
        let loss = self.fetch::<f64>(&losses, rows)?.iter().sum();
        Ok(Swept { codes: self.fetch(&out, rows * n)?, loss })
    }

    /// `[rows, cols]` to `[cols][height]`, the rest of the height zeros.
    fn to_columns(&self, to: u64, from: u64, rows: usize, cols: usize, height: usize) -> Result<()> {
        let args = [Arg::At(to), Arg::At(from), (rows as i32).into(), (cols as i32).into(), (height as i32).into()];
        self.grid(&SWEEP, "columns_of", [cols.div_ceil(32), height / 32, 1], THREADS, 0, &args)
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
        self.grid(&SWEEP, "codes_to_rows", [cols.div_ceil(32), height / 32, 1], THREADS, 0, &args)
    }

    pub(super) fn refined_blocks(
        &self,
        target: &Matrix,
        gram: &Matrix,
        damp: f64,
        grid: &mut BlockGrid,
        codes: &mut [u8],
    ) -> Result<f64> {
        let _ = (target, gram, damp, grid, codes);
        Err(Error::Device("not written".to_owned()))
    }
}
