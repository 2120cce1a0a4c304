//! A weight in any encoding, by plain loops in `f64`: scales from the range of each block, codes to the nearest level.
//!
//! Every encoding that can be said can be quantized here; the operations that search scales know fewer. It is what these are held to, not
//! what a file should be made of.

use formats::{Encoding, Float, Levels, Offset, Scale};
use ndarray::{Array2, ArrayView2};

/// Codes, and all that the file stores beside them.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// How to read the rest.
    pub encoding: Encoding,
    /// Rows and columns of the weight.
    pub shape: [usize; 2],
    /// `[rows, cols]`; the values themselves where there are no codes are in `scales`.
    pub codes: Vec<u8>,
    /// `[blocks]`: each block's scale, or the integer that makes it out of its superblock's.
    pub scales: Vec<f32>,
    /// `[blocks]`: each block's zero or min, or the integer that makes it out of its superblock's; zeros where nothing is taken off.
    pub offsets: Vec<f32>,
    /// `[superblocks]`: scale and min.
    pub superblocks: Vec<[f32; 2]>,
    /// The scale of the whole matrix, 1 without one.
    pub global: f32,
}

/// Quantizes `weight` from the ranges of its blocks.
pub fn quantize(weight: ArrayView2<f32>, encoding: &Encoding) -> Encoded {
    let shape = [weight.nrows(), weight.ncols()];
    let blocks = encoding.block.count(shape);
    let mut ranges = vec![[0.0f64; 2]; blocks];
    for ((row, col), x) in weight.indexed_iter() {
        let [low, high] = &mut ranges[encoding.block.of([row, col], shape)];
        // Widened to hold 0, which stays 0.
        (*low, *high) = (low.min(f64::from(*x)), high.max(f64::from(*x)));
    }
    let wanted: Vec<[f64; 2]> = ranges.iter().map(|range| wanted(*range, encoding)).collect();
    let mut out = Encoded {
        encoding: *encoding,
        shape,
        codes: Vec::new(),
        scales: vec![1.0; blocks],
        offsets: vec![0.0; blocks],
        superblocks: Vec::new(),
        global: 1.0,
    };
    if let Levels::Plain(of) = encoding.levels {
        out.scales = weight.iter().map(|x| of.round(*x)).collect();
        return out;
    }
    if let (Some(of), Scale::Own(scale)) = (encoding.global, encoding.scale) {
        // The largest scale becomes the largest that can be stored.
        let largest = wanted.iter().fold(0.0f64, |m, [scale, _]| m.max(*scale));
        out.global = of.round((largest / f64::from(scale.largest())) as f32);
    }
    let global = if out.global == 0.0 { 1.0 } else { f64::from(out.global) };
    match encoding.scale {
        Scale::One => {}
        Scale::Own(of) => {
            out.scales = wanted.iter().map(|[scale, _]| of.round((scale / global) as f32)).collect();
            for (block, [_, offset]) in wanted.iter().enumerate() {
                out.offsets[block] = match encoding.offset {
                    Offset::Min(of) => of.round(*offset as f32),
                    Offset::Zero { min } => {
                        let (scale, most) = (f64::from(out.scales[block]), f64::from(encoding.max_code()));
                        let zero = if scale == 0.0 { 0.0 } else { (offset / scale).round_ties_even() };
                        zero.clamp(min.into(), most) as f32
                    }
                    Offset::None | Offset::SubMin { .. } => 0.0,
                };
            }
        }
        Scale::Sub { blocks, low, high, of } => {
            let max_min = encoding.sub().map_or(0, |sub| sub.max_min);
            for (index, some) in wanted.chunks(blocks).enumerate() {
                let most = |of: usize| some.iter().fold(0.0f64, |m, w| m.max(w[of]));
                let d = of.round((most(0) / f64::from(high)) as f32);
                let m = if max_min == 0 { 0.0 } else { of.round((most(1) / f64::from(max_min)) as f32) };
                out.superblocks.push([d, m]);
                let integer = |x: f64, step: f32, low: f64, high: f64| match step {
                    0.0 => 0.0,
                    _ => (x / f64::from(step)).round_ties_even().clamp(low, high) as f32,
                };
                for (block, [scale, min]) in some.iter().enumerate() {
                    let at = index * blocks + block;
                    out.scales[at] = integer(*scale, d, low.into(), high.into());
                    out.offsets[at] = integer(*min, m, 0.0, max_min.into());
                }
            }
        }
    }
    let levels = &encoding.levels;
    let code = |((row, col), x): ((usize, usize), &f32)| {
        let block = encoding.block.of([row, col], shape);
        let apart = |code: &usize| {
            let value = out.value(block, levels.level(*code as u8));
            if value.is_finite() { (value - x).abs() } else { f32::INFINITY }
        };
        let codes = 0..levels.count();
        codes.min_by(|a, b| apart(a).total_cmp(&apart(b))).expect("levels") as u8
    };
    out.codes = weight.indexed_iter().map(code).collect();
    out
}

/// Scale and offset of a block of this range: what is taken off is its lower end where that is stored, or near it.
fn wanted([low, high]: [f64; 2], encoding: &Encoding) -> [f64; 2] {
    let count = encoding.levels.count();
    let largest = (0..count).map(|code| encoding.levels.level(code as u8).abs()).filter(|level| level.is_finite());
    let largest = f64::from(largest.fold(0.0f32, f32::max));
    match encoding.offset {
        Offset::None => match encoding.levels {
            // All steps between the ends, so that of the two ends the one that has a level less is cut.
            Levels::Integer { .. } => [2.0 * high.max(-low) / (count as f64 - 1.0), 0.0],
            _ => [high.max(-low) / largest, 0.0],
        },
        // One of the levels is zero, and the end that is further from it is kept.
        Offset::Min(_) if high > low => {
            let far = high.max(-low);
            let steps = (far * largest / (high - low)).round_ties_even();
            let zero = if -low > high { steps } else { largest - steps };
            [far / steps, far / steps * zero]
        }
        Offset::Zero { .. } | Offset::Min(_) | Offset::SubMin { .. } => [(high - low) / largest, -low],
    }
}

impl Encoded {
    /// What a level of a block stands for.
    fn value(&self, block: usize, level: f32) -> f32 {
        let (mut scale, mut offset) = (self.scales[block], self.offsets[block]);
        if let Scale::Sub { blocks, .. } = self.encoding.scale {
            let [d, m] = self.superblocks[block / blocks];
            (scale, offset) = (scale * d, offset * m);
        }
        match self.encoding.offset {
            Offset::None => scale * level * self.global,
            Offset::Zero { .. } => scale * (level - offset) * self.global,
            Offset::Min(_) | Offset::SubMin { .. } => (scale * level - offset) * self.global,
        }
    }

    /// The reals `[rows, cols]`.
    pub fn dequantize(&self) -> Array2<f32> {
        let Encoding { levels, block, .. } = &self.encoding;
        let cols = self.shape[1];
        let value = |(row, col): (usize, usize)| match levels {
            Levels::Plain(_) => self.scales[row * cols + col],
            _ => self.value(block.of([row, col], self.shape), levels.level(self.codes[row * cols + col])),
        };
        Array2::from_shape_fn(self.shape, value)
    }

    /// Bits of the file for each weight, as far as they grow with it.
    pub fn bits_per_weight(&self) -> f64 {
        let size = |of: Float| match of {
            Float::F32 => 32.0,
            Float::F16 | Float::BF16 => 16.0,
            Float::E4M3 | Float::E8M0 => 8.0,
        };
        let weights = (self.shape[0] * self.shape[1]).max(1) as f64;
        if let Levels::Plain(of) = self.encoding.levels {
            return size(of);
        }
        let bits = f64::from(self.encoding.levels.bits());
        let of_offset = match self.encoding.offset {
            Offset::None => 0.0,
            Offset::Zero { .. } => bits,
            Offset::Min(of) => size(of),
            Offset::SubMin { max } => f64::from(8 - max.leading_zeros()),
        };
        let of_scale = match self.encoding.scale {
            Scale::One => 0.0,
            Scale::Own(of) => size(of),
            Scale::Sub { low, high, .. } => f64::from(u32::BITS - (i32::from(high) - i32::from(low)).leading_zeros()),
        };
        let of_superblock = if self.encoding.has_min() { 2.0 } else { 1.0 } * size(self.encoding.precision());
        let blocks = self.scales.len() as f64 * (of_scale + of_offset);
        bits + (blocks + self.superblocks.len() as f64 * of_superblock) / weights
    }
}

#[cfg(test)]
mod tests {
    use formats::encoding::PRESETS;
    use formats::ggml::{BlockScales, TYPES};

    use super::super::testing::Noise;
    use super::super::{dequantize, fit, round};
    use super::*;
    use crate::{FitKind, GridSpec};

    /// All presets and all of ggml's types.
    fn all() -> impl Iterator<Item = (&'static str, Encoding)> {
        PRESETS.iter().copied().chain(TYPES.iter().map(|ty| (ty.name, ty.encoding())))
    }

    #[test]
    fn every_encoding_holds_a_weight() {
        let mut noise = Noise(31);
        let mut weight = noise.matrix(130, 512);
        weight.row_mut(3).fill(0.0);
        let energy = |m: &Array2<f32>| m.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        for (name, encoding) in all() {
            let encoded = quantize(weight.view(), &encoding);
            let values = encoded.dequantize();
            let lost = energy(&(&weight - &values)) / energy(&weight);
            // From ranges, so that few levels lose more than searched scales would.
            let most = match encoding.levels {
                Levels::Plain(_) => 1e-5,
                Levels::Integer { codes: 0..=4, .. } => 0.9,
                Levels::Integer { codes: 5..=8, .. } => 0.2,
                Levels::Integer { codes: 9..=16, .. } => 0.03,
                Levels::Integer { codes: 17..=32, .. } => 0.008,
                Levels::Integer { codes: 33..=64, .. } => 0.002,
                Levels::Integer { .. } => 0.0005,
                Levels::Table(table) if table.len() == 16 => 0.03,
                Levels::Table(_) => 0.002,
            };
            assert!(lost < most, "{name}: {lost} of the energy is lost");
            assert!(values.row(3).iter().all(|x| *x == 0.0), "{name}: zeros stay zeros");
        }
    }

    #[test]
    fn a_weight_takes_as_many_bits_as_its_files_do() {
        let weight = Noise(32).matrix(128, 512);
        let bits = |name: &str| {
            let encoding = all().filter(|(other, _)| *other == name).last().unwrap().1;
            quantize(weight.view(), &encoding).bits_per_weight()
        };
        for ty in TYPES {
            let expected = (8 * ty.block_bytes) as f64 / ty.block_len as f64;
            // Of ternary codes five lie in a byte.
            let gained = if ty.name == "TQ1_0" { 0.375 } else { 0.0 };
            assert_eq!(bits(ty.name) - gained, expected, "{ty}");
        }
        assert_eq!([bits("W4A16"), bits("W4A16_ASYM"), bits("NF4"), bits("NVFP4A16")], [4.125, 4.15625, 4.5, 4.5]);
        assert_eq!([bits("FP8_BLOCK"), bits("MLX4_64")], [8.0 + 32.0 / 16384.0, 4.5]);
    }

    /// What is said of one of ggml's types is what its blocks hold.
    #[test]
    fn ggmls_blocks_hold_what_encodings_say() {
        let weight = Noise(33).matrix(3, 512);
        for ty in TYPES.iter().filter(|ty| ty.layout().is_some()) {
            let encoded = quantize(weight.view(), &ty.encoding());
            let groups = ty.groups_per_block();
            let block = |index: usize| {
                let mut block = BlockScales::default();
                match encoded.superblocks.get(index) {
                    Some([d, m]) => {
                        (block.d, block.m) = (*d, *m);
                        for group in 0..groups {
                            block.scales[group] = encoded.scales[index * groups + group] as i8;
                            block.mins[group] = encoded.offsets[index * groups + group] as u8;
                        }
                    }
                    None => (block.d, block.m) = (encoded.scales[index], encoded.offsets[index]),
                }
                block
            };
            let blocks: Vec<BlockScales> = (0..weight.len() / ty.block_len).map(block).collect();
            let mut bytes = vec![0; ty.row_bytes(weight.len()).unwrap()];
            ty.pack(&blocks, &encoded.codes, &mut bytes);
            let mut values = vec![0.0; weight.len()];
            ty.dequantize(&bytes, &mut values).unwrap();
            assert_eq!(encoded.dequantize().as_slice().unwrap(), values, "{ty}");
        }
    }

    /// The operations' grids from ranges are those of the plain loop, and so are codes and reals.
    #[test]
    fn integers_in_groups_are_fitted_and_rounded_as_by_the_plain_loop() {
        let mut noise = Noise(34);
        for (name, encoding) in PRESETS.iter().filter(|(_, encoding)| encoding.scheme().is_some()) {
            let weight = noise.matrix(7, 300);
            let spec = GridSpec::of(*encoding, 300);
            let grid = fit::run(weight.view(), &spec, FitKind::MinMax);
            let codes = Array2::from_shape_vec((7, 300), round::run(weight.view(), &grid)).unwrap();
            let values = dequantize::run(codes.view(), &grid);
            let plain = quantize(weight.view(), encoding);
            // In double precision a scale may be rounded the other way.
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-3 * b.abs();
            assert!(grid.scales.iter().zip(&plain.scales).all(near), "{name}");
            let other =
                values.iter().zip(&plain.dequantize()).filter(|(a, b)| (*a - *b).abs() > 2e-3 * b.abs()).count();
            assert!(other * 100 <= values.len(), "{name}: {other} of {} values", values.len());
        }
    }
}
