//! Scales and codes of ggml's block types.

use formats::ggml::{GgmlType, Layout, Levels};

use super::{Cuda, Matrix, Module};
use crate::backend::BlockGrid;
use crate::{Error, Result};

pub(super) static BLOCKS: Module = Module { name: "blocks", source: include_str!("../ops/blocks.cu") };

/// A layout's levels as `struct Ladder` of `common.cuh`.
pub(super) fn ladder_of(layout: &Layout) -> Vec<u8> {
    let (mut ends, mut first, mut middles, mut steps) = ([0.0f32; 3], 0.0f32, [f32::INFINITY; 15], [0.0f32; 15]);
    let even = match layout.levels {
        Levels::Uniform { codes, offset } => {
            // The lowest of 256 levels has no counterpart above, and no encoder uses it.
            let lowest = if codes == 256 { 1 } else { 0 };
            ends = [lowest - offset, codes as i16 - 1 - offset, offset].map(f32::from);
            true
        }
        Levels::Table(table) => {
            let mut levels = table.map(f32::from).to_vec();
            levels.sort_unstable_by(f32::total_cmp);
            levels.dedup();
            for (i, pair) in levels.windows(2).enumerate() {
                (middles[i], steps[i]) = (0.5 * (pair[0] + pair[1]), pair[1] - pair[0]);
            }
            (ends[0], ends[1], first) = (levels[0], levels[levels.len() - 1], levels[0]);
            false
        }
    };
    let numbers = ends.into_iter().chain([first]).chain(middles).chain(steps);
    i32::from(even).to_ne_bytes().into_iter().chain(numbers.flat_map(f32::to_ne_bytes)).collect()
}

impl Cuda {
    pub(super) fn fitted_blocks(&self, weight: &Matrix, ty: GgmlType, importance: Option<&[f32]>) -> Result<BlockGrid> {
        let _ = (weight, ty, importance);
        Err(Error::Device("not written".to_owned()))
    }

    pub(super) fn rounded_blocks(&self, weight: &Matrix, grid: &BlockGrid) -> Result<Vec<u8>> {
        let _ = (weight, grid);
        Err(Error::Device("not written".to_owned()))
    }
}
