//! Scales and codes of integer grids.

use formats::Float;

use super::memory::Buffer;
use super::{Arg, Codes, Cuda, Matrix, Module, at, expect, expect_spec};
use crate::Result;
use crate::backend::{FitKind, Grid, GridSpec, Memory, Quantize};
use crate::ops::fit::{Rules, candidates, floor};

pub(super) static SEARCH: Module =
    Module { name: "search", source: concat!(include_str!("../ops/grids.cuh"), include_str!("../ops/fit.cu")) };
pub(super) static CLIP: Module =
    Module { name: "clip", source: concat!(include_str!("../ops/grids.cuh"), include_str!("../ops/clip.cu")) };

/// Groups of up to so many weights lie in the registers of half a warp.
const SHORT: usize = 128;
/// Widest group whose own Hessian block is used; wider ones fall back to its diagonal.
const WIDEST_BLOCK: usize = 256;
/// Lanes of half a warp.
const LANES: usize = 16;
/// Rows that a block of threads clips, and its threads.
const CLIP_ROWS: usize = 8;
const CLIP_THREADS: u32 = 192;
/// Threads of a block that fits a long group.
const LONG_THREADS: u32 = 256;

/// The columns of every group, on both sides.
struct Groups {
    /// Group after group.
    columns: Vec<u32>,
    /// Where each begins, and the end.
    starts: Vec<u32>,
    /// `columns`, unless they are all columns in order.
    columns_at: Option<Buffer>,
    starts_at: Buffer,
}

impl Groups {
    fn columns_of(&self, group: usize) -> &[u32] {
        &self.columns[self.starts[group] as usize..self.starts[group + 1] as usize]
    }

    fn width(&self, group: u32) -> usize {
        self.columns_of(group as usize).len()
    }

    fn count(&self) -> usize {
        self.starts.len() - 1
    }
}

/// What `round_scale` of `common.cuh` calls a precision.
pub(super) fn number_of(precision: Float) -> i32 {
    match precision {
        Float::F16 => 0,
        Float::BF16 => 1,
        Float::F32 => 2,
        Float::E4M3 => 3,
        Float::E8M0 => 4,
    }
}

/// `RULES_ARGUMENTS` of the kernels: what the file allows, and which scales are tried.
fn rules(spec: &GridSpec) -> [Arg; 8] {
    let rules = Rules::of(&spec.encoding);
    let (from, to, steps) = candidates(&rules);
    [
        rules.symmetric.into(),
        number_of(rules.precision).into(),
        f32::from(rules.max).into(),
        f32::from(rules.midpoint).into(),
        f32::from(rules.min_zero).into(),
        Arg::Float(from),
        Arg::Float(to),
        Arg::Int(steps as i32),
    ]
}

impl Cuda {
    fn groups(&self, spec: &GridSpec) -> Result<Groups> {
        let mut starts = vec![0u32; spec.groups() + 1];
        for group in &spec.group_of {
            starts[*group as usize + 1] += 1;
        }
        for group in 0..spec.groups() {
            starts[group + 1] += starts[group];
        }
        let mut columns = vec![0u32; spec.group_of.len()];
        let mut next = starts.clone();
        for (col, group) in (0..).zip(&spec.group_of) {
            let place = &mut next[*group as usize];
            columns[*place as usize] = col;
            *place += 1;
        }
        let scattered = columns.iter().zip(0..).any(|(column, place)| *column != place);
        let columns_at = scattered.then(|| self.send(&columns)).transpose()?;
        Ok(Groups { starts_at: self.send(&starts)?, columns, starts, columns_at })
    }

    pub(super) fn fitted(&self, weight: &Matrix, spec: &GridSpec, kind: FitKind<'_, Matrix>) -> Result<Grid> {
        let count = weight.rows * spec.groups();
        let grid = |scales, zeros| Grid::of_integers(spec.clone(), weight.rows, scales, zeros);
        if count == 0 {
            return Ok(grid(Vec::new(), Vec::new()));
        }
        let groups = self.groups(spec)?;
        let (scales, zeros) = (self.buffer::<f32>(count)?, self.buffer::<u8>(count)?);
        let hessian = match kind {
            FitKind::BlockHessian(hessian) => Some(hessian),
            _ => None,
        };
        let all = 0..groups.count() as u32;
        let (clipped, searched): (Vec<u32>, Vec<u32>) =
            all.partition(|group| hessian.is_some() && (1..=WIDEST_BLOCK).contains(&groups.width(*group)));
        let importance = match (&kind, hessian) {
            (FitKind::Weighted(h), _) => Some(h.to_vec()),
            (_, Some(hessian)) if !searched.is_empty() => Some(self.diagonal(hessian)?),
            _ => None,
        };
        let importance = importance.map(|importance| {
            let of = |group| groups.columns_of(group).iter().map(|col| importance[*col as usize]).collect();
            (0..groups.count()).flat_map(|group| floor(of(group))).collect::<Vec<f32>>()
        });
        self.search_groups(weight, spec, &groups, searched, importance.as_deref(), [&scales, &zeros])?;
        if let Some(hessian) = hessian {
            self.clip_groups(weight, spec, &groups, &clipped, hessian, [&scales, &zeros])?;
        }
        Ok(grid(self.fetch(&scales, count)?, self.fetch(&zeros, count)?))
    }

    /// The groups of `list` by the search, or from their range without an importance.
    fn search_groups(
        &self,
        weight: &Matrix,
        spec: &GridSpec,
        groups: &Groups,
        list: Vec<u32>,
        importance: Option<&[f32]>,
        [scales, zeros]: [&Buffer; 2],
    ) -> Result<()> {
        let importance = importance.map(|importance| self.send(importance)).transpose()?;
        let importance = importance.as_ref().map(|b| b.pin()).transpose()?;
        let columns = groups.columns_at.as_ref().map(|b| b.pin()).transpose()?;
        let (short, long): (Vec<u32>, Vec<u32>) = list.into_iter().partition(|group| groups.width(*group) <= SHORT);
        for (list, short) in [(short, true), (long, false)] {
            if list.is_empty() {
                continue;
            }
            let list_at = self.send(&list)?;
            let pins =
                (scales.pin()?, zeros.pin()?, weight.buffer.pin_to_read()?, groups.starts_at.pin()?, list_at.pin()?);
            let mut args = vec![
                pins.0.arg(),
                pins.1.arg(),
                pins.2.arg(),
                at(columns.as_ref()),
                pins.3.arg(),
                pins.4.arg(),
                at(importance.as_ref()),
            ];
            if short {
                args.push((weight.rows as i64).into());
            }
            args.extend([weight.cols, groups.count(), list.len()].map(|count| Arg::Int(count as i32)));
            args.extend(rules(spec));
            let tasks = weight.rows * list.len();
            match short {
                true => self.each_half_warp("fit_short", tasks, &args)?,
                false => self.blocks(&SEARCH, "fit_long", tasks, LONG_THREADS, 0, &args)?,
            }
        }
        Ok(())
    }

    /// Starts a kernel with half a warp for each of `tasks`.
    fn each_half_warp(&self, kernel: &'static str, tasks: usize, args: &[Arg]) -> Result<()> {
        self.blocks(&SEARCH, kernel, (tasks * LANES).div_ceil(128), 128, 0, args)
    }

    /// The groups of `list` by their blocks of the Hessian.
    fn clip_groups(
        &self,
        weight: &Matrix,
        spec: &GridSpec,
        groups: &Groups,
        list: &[u32],
        hessian: &Matrix,
        [scales, zeros]: [&Buffer; 2],
    ) -> Result<()> {
        let Some(widest) = list.iter().map(|group| groups.width(*group)).max() else { return Ok(()) };
        let (kernel, chunks) = match widest {
            0..=32 => ("fit_clip_2", 2),
            33..=64 => ("fit_clip_4", 4),
            65..=128 => ("fit_clip_8", 8),
            _ => ("fit_clip_16", 16),
        };
        let list_at = self.send(list)?;
        let blocks = self.cleared::<f32>(list.len() * widest * LANES * (chunks + 1))?;
        let columns = groups.columns_at.as_ref().map(|b| b.pin()).transpose()?;
        let (blocks, starts, list_at) = (blocks.pin()?, groups.starts_at.pin()?, list_at.pin()?);
        {
            let hessian = hessian.buffer.pin_to_read()?;
            let mut args = vec![blocks.arg(), hessian.arg(), at(columns.as_ref()), starts.arg(), list_at.arg()];
            args.extend([weight.cols, widest, chunks].map(|count| Arg::Int(count as i32)));
            self.blocks(&CLIP, "fit_hessian_blocks", list.len() * widest, 128, 0, &args)?;
        }
        let pins = (scales.pin()?, zeros.pin()?, weight.buffer.pin_to_read()?);
        let mut args = vec![
            pins.0.arg(),
            pins.1.arg(),
            pins.2.arg(),
            at(columns.as_ref()),
            starts.arg(),
            list_at.arg(),
            blocks.arg(),
            (weight.rows as i64).into(),
        ];
        args.extend([weight.cols, groups.count(), list.len(), widest].map(|count| Arg::Int(count as i32)));
        args.extend(rules(spec));
        self.blocks(&CLIP, kernel, weight.rows.div_ceil(CLIP_ROWS) * list.len(), CLIP_THREADS, 0, &args)
    }

    /// Sends a grid: scales, zeros, the group of each column.
    fn send_grid(&self, grid: &Grid) -> Result<[Buffer; 3]> {
        Ok([self.send(&grid.scales)?, self.send(&grid.zeros)?, self.send(&grid.spec.group_of)?])
    }

    pub(super) fn rounded_codes(&self, weight: &Matrix, grid: &Grid) -> Result<Codes> {
        let count = weight.rows * weight.cols;
        let codes = self.buffer::<u8>(count)?;
        if count > 0 {
            let [scales, zeros, group_of] = &self.send_grid(grid)?;
            let pins = (codes.pin()?, weight.buffer.pin_to_read()?, scales.pin()?, zeros.pin()?, group_of.pin()?);
            let args = [
                pins.0.arg(),
                pins.1.arg(),
                pins.2.arg(),
                pins.3.arg(),
                pins.4.arg(),
                (count as i64).into(),
                (weight.cols as i32).into(),
                (grid.spec.groups() as i32).into(),
                f32::from(grid.spec.encoding.max_code()).into(),
            ];
            self.each(&SEARCH, "round_groups", count.div_ceil(4), &args)?;
        }
        Ok(Codes { buffer: codes, rows: weight.rows, cols: weight.cols })
    }

    /// `W − Ŵ diag(t)⁻¹` for the min-max rounding `Ŵ` of `W diag(t)`.
    pub(super) fn scaled_rounding_error(&self, weight: &Matrix, t: &[f32], spec: &GridSpec) -> Result<Matrix> {
        expect("scaled_rounding_loss", "factors", weight.cols, t.len())?;
        expect_spec("scaled_rounding_loss", weight.cols, spec)?;
        if !spec.encoding.is_integers() {
            // Blocks are searched, not spanned: step by step.
            let mut scaled = self.copy(weight)?;
            self.scale(&mut scaled, &[], t)?;
            let grid = self.fit(&scaled, spec, FitKind::MinMax)?;
            let values = self.dequantize(&self.round(&scaled, &grid)?, &grid)?;
            let mut error = self.difference(&scaled, &values)?;
            self.scale(&mut error, &[], &t.iter().map(|t| 1.0 / t).collect::<Vec<f32>>())?;
            return Ok(error);
        }
        let error = self.matrix(weight.rows, weight.cols)?;
        if weight.rows * weight.cols == 0 {
            return Ok(error);
        }
        let (groups, t) = (self.groups(spec)?, self.send(t)?);
        let columns = groups.columns_at.as_ref().map(|b| b.pin()).transpose()?;
        let pins = (error.buffer.pin()?, weight.buffer.pin_to_read()?, t.pin()?, groups.starts_at.pin()?);
        let (short, long): (Vec<u32>, Vec<u32>) =
            (0..groups.count() as u32).partition(|group| groups.width(*group) <= SHORT);
        for (list, short) in [(short, true), (long, false)] {
            if list.is_empty() {
                continue;
            }
            let list_at = self.send(&list)?;
            let list_at = list_at.pin()?;
            let mut args =
                vec![pins.0.arg(), pins.1.arg(), pins.2.arg(), at(columns.as_ref()), pins.3.arg(), list_at.arg()];
            if short {
                args.push((weight.rows as i64).into());
            }
            args.extend([weight.cols, list.len()].map(|count| Arg::Int(count as i32)));
            args.extend(rules(spec));
            let tasks = weight.rows * list.len();
            match short {
                true => self.each_half_warp("scaled_error_short", tasks, &args)?,
                false => self.blocks(&SEARCH, "scaled_error_long", tasks, LONG_THREADS, 0, &args)?,
            }
        }
        drop(pins);
        Ok(error)
    }

    /// The reals that codes stand for.
    pub(super) fn dequantized(&self, codes: &Codes, grid: &Grid) -> Result<Matrix> {
        let (rows, cols) = (codes.rows, codes.cols);
        let out = self.matrix(rows, cols)?;
        if rows * cols == 0 {
            return Ok(out);
        }
        {
            let [scales, zeros, group_of] = &self.send_grid(grid)?;
            let pins = (out.buffer.pin()?, codes.buffer.pin_to_read()?, scales.pin()?, zeros.pin()?, group_of.pin()?);
            let args = [
                pins.0.arg(),
                pins.1.arg(),
                pins.2.arg(),
                pins.3.arg(),
                pins.4.arg(),
                ((rows * cols) as i64).into(),
                (cols as i32).into(),
                (grid.spec.groups() as i32).into(),
            ];
            self.each(&SEARCH, "dequantize_groups", rows * cols, &args)?;
        }
        Ok(out)
    }
}
