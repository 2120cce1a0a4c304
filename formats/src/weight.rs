//! One quantized linear, independent of any file format.

use crate::encoding::{Encoding, Levels};
use crate::error::{Error, Result};
use crate::words::WordLayout;

/// A weight matrix `[rows, cols]` (`[out, in]`) with a scale for each group of a row: `w = scale · (code − zero)` on integers,
/// `w = scale · level` on levels of a table, and `− min` where there is one.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeight {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// What codes stand for, and which share a scale.
    pub encoding: Encoding,
    /// `[rows, cols]`, each in `0..=encoding.max_code()`.
    pub codes: Vec<u8>,
    /// `[rows, groups]`, already rounded to the precision they are stored in; may be negative or 0.
    pub scales: Vec<f32>,
    /// `[rows, groups]`; all [`Encoding::fixed_zero`] where none are stored.
    pub zeros: Vec<u8>,
    /// `[rows, groups]`: what is taken off, already rounded; empty unless the encoding [has a min](Encoding::has_min).
    pub mins: Vec<f32>,
    /// What every stored scale is multiplied by, which `scales` has been already; `None` without one.
    pub global: Option<f32>,
    /// `[cols]`: the group of each column, when groups are not runs of consecutive columns (`desc_act`).
    pub group_of: Option<Vec<u32>>,
}

impl QuantizedWeight {
    /// Codes `[rows, cols]` with a scale and a zero for each group, which are runs of columns; nothing else is taken off, and nothing
    /// multiplies the scales.
    pub fn of_codes(
        [rows, cols]: [usize; 2],
        encoding: Encoding,
        codes: Vec<u8>,
        scales: Vec<f32>,
        zeros: Vec<u8>,
    ) -> QuantizedWeight {
        QuantizedWeight { rows, cols, encoding, codes, scales, zeros, mins: Vec::new(), global: None, group_of: None }
    }

    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.encoding.groups(self.cols)
    }

    /// The group of column `col`.
    pub fn group_of(&self, col: usize) -> usize {
        match &self.group_of {
            Some(map) => map[col] as usize,
            None => col / self.encoding.group_width(self.cols),
        }
    }

    /// Writes the reals that row `row` stands for into `out` (`[cols]`).
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let groups = self.groups();
        let scales = &self.scales[row * groups..][..groups];
        let zeros = &self.zeros[row * groups..][..groups];
        let codes = &self.codes[row * self.cols..][..self.cols];
        match &self.group_of {
            None => {
                let width = self.encoding.group_width(self.cols);
                for (group, (out, codes)) in out.chunks_mut(width).zip(codes.chunks(width)).enumerate() {
                    let (scale, zero) = (scales[group], i32::from(zeros[group]));
                    match self.encoding.levels {
                        Levels::Table(table) => {
                            out.iter_mut().zip(codes).for_each(|(o, code)| *o = scale * table[usize::from(*code)]);
                        }
                        _ => {
                            out.iter_mut()
                                .zip(codes)
                                .for_each(|(o, code)| *o = scale * (i32::from(*code) - zero) as f32);
                        }
                    }
                    if let Some(min) = self.mins.get(row * groups + group) {
                        out.iter_mut().for_each(|o| *o -= min);
                    }
                }
            }
            Some(map) => {
                for ((o, code), group) in out.iter_mut().zip(codes).zip(map) {
                    let group = *group as usize;
                    *o = scales[group] * (i32::from(*code) - i32::from(zeros[group])) as f32;
                }
            }
        }
    }

    /// The same with its codes packed.
    ///
    /// Fails when a code does not fit in the encoding's width, or the layout has no room for such codes.
    pub fn packed(&self, layout: WordLayout) -> Result<PackedWeight> {
        let QuantizedWeight { rows, cols, encoding, .. } = *self;
        let bits = encoding.levels.bits();
        if let Some(code) = self.codes.iter().find(|&&code| code > encoding.max_code()) {
            return Err(Error::invalid(format!("code {code} does not fit in {bits} bits")));
        }
        let words = layout.pack(&self.codes, [rows, cols], bits)?;
        let (scales, zeros, group_of) = (self.scales.clone(), self.zeros.clone(), self.group_of.clone());
        Ok(PackedWeight {
            rows,
            cols,
            encoding,
            words,
            scales,
            zeros,
            mins: self.mins.clone(),
            global: self.global,
            group_of,
        })
    }

    /// The reals `[rows, cols]` that the codes stand for.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in out.chunks_exact_mut(self.cols).enumerate() {
            self.dequantize_row(row, out);
        }
        out
    }
}

/// A [`QuantizedWeight`] whose codes are packed as a file holds them.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedWeight {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// What codes stand for, and which share a scale.
    pub encoding: Encoding,
    /// The codes, in the layout that [`Codec::word_layout`](crate::Codec::word_layout) asks for.
    pub words: Vec<u32>,
    /// `[rows, groups]`, already rounded to the precision they are stored in; may be negative or 0.
    pub scales: Vec<f32>,
    /// `[rows, groups]`; all [`Encoding::fixed_zero`] where none are stored.
    pub zeros: Vec<u8>,
    /// `[rows, groups]`: what is taken off, already rounded; empty unless the encoding [has a min](Encoding::has_min).
    pub mins: Vec<f32>,
    /// What every stored scale is multiplied by, which `scales` has been already; `None` without one.
    pub global: Option<f32>,
    /// `[cols]`: the group of each column, when groups are not runs of consecutive columns (`desc_act`).
    pub group_of: Option<Vec<u32>>,
}

impl PackedWeight {
    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.encoding.groups(self.cols)
    }

    /// Words of codes `[rows, cols]` with a scale and a zero for each group, as [`QuantizedWeight::of_codes`].
    pub fn of_words(
        [rows, cols]: [usize; 2],
        encoding: Encoding,
        words: Vec<u32>,
        scales: Vec<f32>,
        zeros: Vec<u8>,
    ) -> PackedWeight {
        PackedWeight { rows, cols, encoding, words, scales, zeros, mins: Vec::new(), global: None, group_of: None }
    }

    /// The same with a byte for each code.
    ///
    /// Fails when the layout has no room for such codes, or there are more or fewer words than it takes.
    pub fn unpacked(self, layout: WordLayout) -> Result<QuantizedWeight> {
        let PackedWeight { rows, cols, encoding, words, scales, zeros, mins, global, group_of } = self;
        let codes = layout.unpack(&words, [rows, cols], encoding.levels.bits())?;
        Ok(QuantizedWeight { rows, cols, encoding, codes, scales, zeros, mins, global, group_of })
    }
}
