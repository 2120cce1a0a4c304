//! Parts of the rows of wide tables.

use std::ops::Range;

use super::Checkpoint;
use crate::error::{Error, Result};

impl Checkpoint {
    /// Columns `columns` of rows `rows` of a matrix `[n, width]` into `out` (`[rows.len(), columns]`): a part of wide rows, of which no more
    /// than is needed is read where they lie in the file as plain numbers.
    pub fn load_columns(&self, name: &str, rows: &[u32], columns: Range<usize>, out: &mut [f32]) -> Result<()> {
        let entry = self.expect(name)?;
        let width = entry.shape.last().copied().unwrap_or(0);
        if columns.start > columns.end || columns.end > width {
            return Err(Error::failed(format!("tensor `{name}`: columns {columns:?} are beyond its {width}")));
        }
        let own = columns.len();
        if own == width {
            return self.load_rows(name, rows, out);
        }
        let raw = if self.change(name).is_none() { self.raw(name) } else { None };
        let Some(raw) = raw.filter(|raw| raw.shape.len() == 2) else {
            // Each row once, whatever part of it is wanted.
            let mut whole = vec![0.0; width];
            for (row, out) in rows.iter().zip(out.chunks_exact_mut(own.max(1))) {
                self.load_rows(name, &[*row], &mut whole)?;
                out.copy_from_slice(&whole[columns.clone()]);
            }
            return Ok(());
        };
        let bytes = raw.data.len() / (raw.shape[0] * width).max(1);
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(own.max(1))) {
            if row as usize >= raw.shape[0] {
                return Err(Error::failed(format!("tensor `{name}`: row {row} is beyond its {} rows", raw.shape[0])));
            }
            let first = row as usize * width + columns.start;
            let data = &raw.data[first * bytes..(first + own) * bytes];
            formats::tensor::widen(raw.dtype, data, out).map_err(|e| self.locate(e, name))?;
            self.check_finite(name, out, first)?;
        }
        Ok(())
    }
}
