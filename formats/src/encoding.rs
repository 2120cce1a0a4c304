//! How a weight is represented: which reals its codes stand for, and what is stored beside the codes.
//!
//! A weight `[rows, cols]` falls into blocks ([`Block`]), and every value of a block is
//!
//! ```text
//! scale · level                 Offset::None
//! scale · (level − zero)        Offset::Zero       an integer zero per block, a code itself
//! scale · level − min           Offset::Min        a real minimum per block
//! scale · level − min           Offset::SubMin     min = integer of the block · minimum of its superblock
//!
//! scale = stored                Scale::Own
//!       = integer · stored      Scale::Sub         integer of the block, stored scale of its superblock
//!       = 1                     Scale::One
//! ```
//!
//! with `level` the entry of the code in [`Levels`]. Where there is a `global` scale, it multiplies every scale (and min) of the matrix.
//! Each axis is independent of the others, so that a new format is a new constant here and not new code elsewhere.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::ggml::GgmlType;
use crate::grid::Scheme;

/// The precision in which scales (and real minima) are stored, and therefore searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Float {
    /// IEEE half.
    F16,
    /// bfloat16, limited to what half can hold too, so that a runtime may keep the scale in either.
    BF16,
    /// Single precision.
    F32,
    /// Eight bits, four of them exponent and three mantissa, up to 448 and without infinities (`float8_e4m3fn`).
    E4M3,
    /// A power of two from 2⁻¹²⁷ to 2¹²⁷, eight bits of exponent and no sign.
    E8M0,
}

impl Float {
    /// The nearest value that the file can hold; finite input stays finite, and a nonzero scale may become zero.
    ///
    /// Of powers of two there is no zero and no negative one: these become the smallest.
    pub fn round(self, scale: f32) -> f32 {
        match self {
            Float::F32 => scale,
            Float::F16 => f16::from_f32(scale.clamp(-65504.0, 65504.0)).to_f32(),
            Float::BF16 => {
                let r = bf16::from_f32(scale.clamp(-65280.0, 65280.0)).to_f32();
                // Below half's normal range bf16 keeps bits that half drops.
                if r.abs() < 6.103_515_6e-5 { f16::from_f32(r).to_f32() } else { r }
            }
            Float::E4M3 => round_e4m3(scale),
            Float::E8M0 => {
                // Half of the mantissa's range carries into the exponent: 1.5 · 2ⁿ and above become 2ⁿ⁺¹.
                let exponent = (scale.clamp(0.0, f32::MAX).to_bits() + (1 << 22)) >> 23;
                if exponent == 0 { f32::from_bits(1 << 22) } else { f32::from_bits(exponent.min(254) << 23) }
            }
        }
    }

    /// The largest value that it can hold.
    pub const fn largest(self) -> f32 {
        match self {
            Float::F32 => f32::MAX,
            Float::F16 => 65504.0,
            Float::BF16 => 65280.0,
            Float::E4M3 => 448.0,
            Float::E8M0 => 1.701_411_8e38,
        }
    }
}

/// The nearest value of E4M3, ties to the even code; beyond ±448 that.
#[inline]
pub fn round_e4m3(x: f32) -> f32 {
    // Three bits of mantissa: values lie 2⁻³ of their power of two apart, at least 2⁻⁹.
    let quantum = (f32::from_bits(x.to_bits() & 0x7f80_0000) * 0.125).max(0.001_953_125);
    ((x / quantum).round_ties_even() * quantum).clamp(-448.0, 448.0)
}

/// The code of the nearest value of E4M3, which is its byte; as [`round_e4m3`] rounds.
#[inline]
pub fn code_e4m3(x: f32) -> u8 {
    let value = round_e4m3(x);
    let magnitude = value.abs();
    let code = match magnitude < 0.015_625 {
        // Below the smallest power of two that is stored as one they lie 2⁻⁹ apart.
        true => (magnitude * 512.0) as u8,
        false => ((magnitude.to_bits() >> 20) - (120 << 3)) as u8,
    };
    code | if value.is_sign_negative() { 0x80 } else { 0 }
}

/// The levels that codes stand for.
#[derive(Clone, Copy, Debug)]
pub enum Levels {
    /// Evenly spaced: `level = code − zero`, for the codes from 0.
    Integer {
        /// How many codes there are, up to 256.
        codes: u16,
        /// The code of the level 0; 0 where each block stores its own ([`Offset::Zero`]).
        zero: u8,
    },
    /// `level = table[code]`, up to 256 entries; not in order of size. NaNs are entries that no weight is given.
    Table(&'static [f32]),
    /// No codes: the value itself is stored in this precision.
    Plain(Float),
}

impl PartialEq for Levels {
    fn eq(&self, other: &Levels) -> bool {
        match (self, other) {
            (Levels::Integer { codes, zero }, Levels::Integer { codes: c, zero: z }) => (codes, zero) == (c, z),
            // By their bits, so that a NaN is itself.
            (Levels::Table(a), Levels::Table(b)) => a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())),
            (Levels::Plain(a), Levels::Plain(b)) => a == b,
            _ => false,
        }
    }
}

impl Eq for Levels {}

impl Levels {
    /// `2^bits` levels around 0, as two's complement has them: from `−2^(bits−1)`.
    pub const fn signed(bits: u8) -> Levels {
        Levels::Integer { codes: 1 << bits, zero: 1 << (bits - 1) }
    }

    /// `2^bits` levels from 0.
    pub const fn unsigned(bits: u8) -> Levels {
        Levels::Integer { codes: 1 << bits, zero: 0 }
    }

    /// How many codes there are; 0 without codes.
    pub const fn count(&self) -> usize {
        match self {
            Levels::Integer { codes, .. } => *codes as usize,
            Levels::Table(table) => table.len(),
            Levels::Plain(_) => 0,
        }
    }

    /// Bits that a code takes when it is packed without a gap; 0 without codes.
    pub const fn bits(&self) -> u8 {
        match self.count() {
            0 => 0,
            count => (usize::BITS - (count - 1).leading_zeros()) as u8,
        }
    }

    /// The level of a code.
    ///
    /// # Panics
    /// When a table has no such code, or there are no codes at all.
    #[inline]
    pub fn level(&self, code: u8) -> f32 {
        match self {
            Levels::Integer { zero, .. } => (i16::from(code) - i16::from(*zero)).into(),
            Levels::Table(table) => table[usize::from(code)],
            Levels::Plain(_) => panic!("plain values have no codes"),
        }
    }
}

/// The values that share one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    /// A whole row ("channel"); of activations, a token.
    Row,
    /// So many consecutive columns of a row; the last of a row may be shorter.
    Columns(usize),
    /// So many consecutive values of the matrix read row by row, wherever rows end (bitsandbytes).
    Flat(usize),
    /// So many rows by so many columns; at the far edges fewer.
    Tile([usize; 2]),
    /// All values of the matrix together.
    Matrix,
}

impl Block {
    /// How many there are in a matrix.
    pub fn count(&self, [rows, cols]: [usize; 2]) -> usize {
        match *self {
            _ if rows * cols == 0 => 0,
            Block::Row => rows,
            Block::Columns(width) => rows * cols.div_ceil(width),
            Block::Flat(len) => (rows * cols).div_ceil(len),
            Block::Tile([height, width]) => rows.div_ceil(height) * cols.div_ceil(width),
            Block::Matrix => 1,
        }
    }

    /// Which one a value belongs to; they are counted row by row.
    pub fn of(&self, [row, col]: [usize; 2], [_, cols]: [usize; 2]) -> usize {
        match *self {
            Block::Row => row,
            Block::Columns(width) => row * cols.div_ceil(width) + col / width,
            Block::Flat(len) => (row * cols + col) / len,
            Block::Tile([height, width]) => row / height * cols.div_ceil(width) + col / width,
            Block::Matrix => 0,
        }
    }
}

/// What a level is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Nothing: levels are the values.
    One,
    /// The block's own scale, stored in this precision.
    Own(Float),
    /// An integer of the block times the scale of its superblock.
    Sub {
        /// Consecutive blocks of a row that form a superblock.
        blocks: usize,
        /// The smallest that a block's integer can be.
        low: i8,
        /// The largest that it can be.
        high: i8,
        /// The precision of the superblock's scale.
        of: Float,
    },
}

/// What is taken off a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offset {
    /// Nothing, or a zero that is the same everywhere and part of the levels.
    None,
    /// The code of 0, one for each block; `min` is the smallest that the file can hold (GPTQ's first version cannot hold 0).
    Zero {
        /// The smallest zero that the file can hold.
        min: u8,
    },
    /// A real minimum of each block, in this precision.
    Min(Float),
    /// An integer of each block, from 0 to `max`, times the minimum of its superblock, which is stored as its scale is.
    SubMin {
        /// The largest that a block's integer can be.
        max: u8,
    },
}

/// What a runtime rounds a linear's input to before it multiplies it with the weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activation {
    /// What its codes stand for.
    pub levels: Levels,
    /// The values that share a scale; [`Block::Row`] is a token.
    pub block: Block,
    /// Precision of that scale.
    pub scale: Float,
    /// Whether scales follow from each input; else they are fixed beforehand and stored with the weight.
    pub dynamic: bool,
}

impl Activation {
    /// Eight bits for each 32 values with a scale in half precision, as ggml has them beside weights in blocks of 32.
    pub const Q8_0: Activation =
        Activation { levels: Levels::signed(8), block: Block::Columns(32), scale: Float::F16, dynamic: true };
    /// Eight bits for each 256 values with a scale in single precision, as ggml has them beside weights in superblocks of 256.
    pub const Q8_K: Activation =
        Activation { levels: Levels::signed(8), block: Block::Columns(256), scale: Float::F32, dynamic: true };
    /// Eight bits for each token.
    pub const INT8_TOKEN: Activation =
        Activation { levels: Levels::signed(8), block: Block::Row, scale: Float::F32, dynamic: true };
    /// E4M3 for each token.
    pub const FP8_TOKEN: Activation =
        Activation { levels: Levels::Table(&E4M3), block: Block::Row, scale: Float::F32, dynamic: true };
    /// E4M3 with one scale that is stored with the weight.
    pub const FP8_STATIC: Activation =
        Activation { levels: Levels::Table(&E4M3), block: Block::Matrix, scale: Float::F32, dynamic: false };
    /// E4M3 for each 128 values of a token.
    pub const FP8_BLOCK: Activation =
        Activation { levels: Levels::Table(&E4M3), block: Block::Columns(128), scale: Float::F32, dynamic: true };
}

/// Where codes and scales lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// In tensors of their own; a [`Codec`](crate::Codec) says how.
    Apart,
    /// Together, in blocks of ggml's type of this number.
    Ggml(u32),
}

/// How a weight is represented; the head of this file says what its values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// What codes stand for.
    pub levels: Levels,
    /// The values that share a scale.
    pub block: Block,
    /// What levels are multiplied by.
    pub scale: Scale,
    /// What is taken off.
    pub offset: Offset,
    /// A scale of the whole matrix that multiplies all others.
    pub global: Option<Float>,
    /// What the runtime does to the input.
    pub activation: Option<Activation>,
    /// Where codes and scales lie.
    pub store: Store,
}

/// The integers that make the scale and the min of a block out of those of its superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubScales {
    /// The smallest that a block's scale can be.
    pub low: i8,
    /// The largest that it can be.
    pub high: i8,
    /// The largest that a block's min can be, from 0; 0 where there are no mins.
    pub max_min: u8,
}

impl Encoding {
    /// Levels with a scale of each block and nothing else.
    const fn scaled(levels: Levels, block: Block, scale: Float) -> Encoding {
        Encoding {
            levels,
            block,
            scale: Scale::Own(scale),
            offset: Offset::None,
            global: None,
            activation: None,
            store: Store::Apart,
        }
    }

    /// Values as they are, in this precision.
    pub const fn plain(values: Float) -> Encoding {
        Encoding {
            levels: Levels::Plain(values),
            scale: Scale::One,
            ..Encoding::scaled(Levels::Plain(values), Block::Row, Float::F32)
        }
    }

    /// Integers of `bits` bits whose zero is in the middle.
    pub const fn symmetric(bits: u8, block: Block, scale: Float) -> Encoding {
        Encoding::scaled(Levels::signed(bits), block, scale)
    }

    /// Integers of `bits` bits; each block stores its zero, `min_zero` at least.
    pub const fn asymmetric(bits: u8, block: Block, scale: Float, min_zero: u8) -> Encoding {
        Encoding { offset: Offset::Zero { min: min_zero }, ..Encoding::scaled(Levels::unsigned(bits), block, scale) }
    }

    /// MLX's: `scale · code + bias` in groups of `group` columns; the bias is the min with its sign turned.
    pub const fn mlx(bits: u8, group: usize, scale: Float) -> Encoding {
        Encoding {
            offset: Offset::Min(scale),
            ..Encoding::scaled(Levels::unsigned(bits), Block::Columns(group), scale)
        }
    }

    /// E4M3 with a scale in single precision for each block.
    pub const fn fp8(block: Block) -> Encoding {
        Encoding::scaled(Levels::Table(&E4M3), block, Float::F32)
    }

    /// bitsandbytes' NF4: blocks of 64 values, each with its largest magnitude in single precision.
    pub const NF4: Encoding = Encoding::scaled(Levels::Table(&NF4), Block::Flat(64), Float::F32);

    /// OCP's MXFP4: E2M1 with a power of two for each 32 columns.
    pub const MXFP4: Encoding = Encoding::scaled(Levels::Table(&E2M1), Block::Columns(32), Float::E8M0);

    /// NVIDIA's NVFP4: E2M1 with an E4M3 scale for each 16 columns and one in single precision for all of the matrix.
    pub const NVFP4: Encoding = Encoding {
        global: Some(Float::F32),
        ..Encoding::scaled(Levels::Table(&E2M1), Block::Columns(16), Float::E4M3)
    };

    /// The same with a runtime that rounds the input to `activation`.
    pub const fn beside(self, activation: Activation) -> Encoding {
        Encoding { activation: Some(activation), ..self }
    }

    /// ggml's blocks of `block` columns with scales in half precision.
    pub(crate) const fn ggml(levels: Levels, block: usize) -> Encoding {
        let activation = if block == 32 { Activation::Q8_0 } else { Activation::Q8_K };
        Encoding::scaled(levels, Block::Columns(block), Float::F16).beside(activation)
    }

    /// ggml's superblocks of 256 columns in blocks of `block`, whose scales are integers from `low` to `high`.
    pub(crate) const fn superblocks(levels: Levels, block: usize, low: i8, high: i8) -> Encoding {
        Encoding {
            scale: Scale::Sub { blocks: 256 / block, low, high, of: Float::F16 },
            ..Encoding::ggml(levels, block).beside(Activation::Q8_K)
        }
    }

    /// The same with an offset.
    pub(crate) const fn with(self, offset: Offset) -> Encoding {
        Encoding { offset, ..self }
    }

    /// The type of ggml's whose blocks hold it.
    pub fn ggml_type(&self) -> Option<GgmlType> {
        match self.store {
            Store::Ggml(id) => GgmlType::from_id(id),
            Store::Apart => None,
        }
    }

    /// Columns of a row of `cols` that share one scale; a tile or a flat block may reach beyond them.
    pub const fn group_width(&self, cols: usize) -> usize {
        match self.block {
            Block::Columns(width) | Block::Flat(width) | Block::Tile([_, width]) => width,
            Block::Row | Block::Matrix => cols,
        }
    }

    /// Columns of a group, 0 where it is as wide as the matrix.
    pub const fn group(&self) -> usize {
        self.group_width(0)
    }

    /// Groups in a row of `cols`.
    pub fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group_width(cols).max(1))
    }

    /// Columns of a row of `cols` that share what the file stores as one scale: a group, or all groups of a superblock.
    pub const fn unit_width(&self, cols: usize) -> usize {
        match self.scale {
            Scale::Sub { blocks, .. } => blocks * self.group_width(cols),
            Scale::Own(_) | Scale::One => self.group_width(cols),
        }
    }

    /// Rows of a matrix of `rows` that have their scales in common.
    pub const fn block_height(&self, rows: usize) -> usize {
        match self.block {
            Block::Tile([height, _]) => height,
            Block::Matrix => rows,
            Block::Row | Block::Columns(_) | Block::Flat(_) => 1,
        }
    }

    /// Whether a real minimum is subtracted.
    pub const fn has_min(&self) -> bool {
        matches!(self.offset, Offset::Min(_) | Offset::SubMin { .. })
    }

    /// The integers of blocks in superblocks; `None` where each block's own scale is stored.
    pub const fn sub(&self) -> Option<SubScales> {
        let max_min = if let Offset::SubMin { max } = self.offset { max } else { 0 };
        match self.scale {
            Scale::Sub { low, high, .. } => Some(SubScales { low, high, max_min }),
            Scale::Own(_) | Scale::One => None,
        }
    }

    /// The precision that scales are stored in; of superblocks the superblock's.
    pub const fn precision(&self) -> Float {
        match self.scale {
            Scale::Own(of) | Scale::Sub { of, .. } => of,
            Scale::One => Float::F32,
        }
    }

    /// Largest code; 0 without codes.
    pub const fn max_code(&self) -> u8 {
        self.levels.count().saturating_sub(1) as u8
    }

    /// The code of 0 where all blocks have the same and none is stored; 0 of levels in a table.
    pub const fn fixed_zero(&self) -> Option<u8> {
        match (self.offset, self.levels) {
            (Offset::None, Levels::Integer { zero, .. }) => Some(zero),
            (Offset::None, _) => Some(0),
            _ => None,
        }
    }

    /// The same with scales (and real minima) in `scale`, where it does not fix eight bits for them, and zeros of `min_zero` at least where
    /// they are stored.
    pub const fn stored_in(self, scale: Float, min_zero: u8) -> Encoding {
        let offset = match self.offset {
            Offset::Zero { .. } => Offset::Zero { min: min_zero },
            Offset::Min(_) => Offset::Min(scale),
            other => other,
        };
        let scale = match self.scale {
            Scale::Own(Float::F16 | Float::BF16 | Float::F32) => Scale::Own(scale),
            other => other,
        };
        Encoding { scale, offset, ..self }
    }

    /// As a configuration tells it, which does not say in which precision scales are stored.
    pub const fn told(self) -> Encoding {
        self.stored_in(Float::F32, 0)
    }

    /// The scheme of integers that only weights are rounded to.
    pub fn weight_scheme(&self) -> Option<Scheme> {
        self.scheme().filter(|_| self.activation.is_none())
    }

    /// Whether there are codes, whose scales are searched and whose columns are swept; else values are stored as they are.
    pub const fn has_codes(&self) -> bool {
        self.levels.count() > 0
    }

    /// Whether it is a [scheme](Self::scheme) of integers in tensors of their own, which have their operations to themselves; all others are
    /// worked on as blocks.
    pub fn is_integers(&self) -> bool {
        self.store == Store::Apart && self.scheme().is_some()
    }

    /// The name it has among [`PRESETS`], with scales in whatever precision.
    pub fn name(&self) -> Option<&'static str> {
        PRESETS.iter().find(|(_, preset)| preset.told() == self.told()).map(|(name, _)| *name)
    }

    /// The scheme of integers with scales of their own, in groups of columns or rows; `None` of anything else.
    pub fn scheme(&self) -> Option<Scheme> {
        let Levels::Integer { codes, .. } = self.levels else { return None };
        let group = match self.block {
            Block::Row => None,
            Block::Columns(width) => Some(width),
            _ => return None,
        };
        let symmetric = match self.offset {
            Offset::None => true,
            Offset::Zero { .. } => false,
            Offset::Min(_) | Offset::SubMin { .. } => return None,
        };
        let whole = codes.is_power_of_two() && matches!(self.scale, Scale::Own(_)) && self.global.is_none();
        whole.then_some(Scheme { bits: self.levels.bits(), group, symmetric })
    }
}

impl From<Scheme> for Encoding {
    /// As a configuration tells it.
    fn from(scheme: Scheme) -> Encoding {
        scheme.encoding(Float::F32, 0)
    }
}

impl Scheme {
    /// The encoding of a weight in this scheme, with scales in `scale`; a zero is at least `min_zero`.
    pub const fn encoding(&self, scale: Float, min_zero: u8) -> Encoding {
        let block = match self.group {
            Some(width) => Block::Columns(width),
            None => Block::Row,
        };
        match self.symmetric {
            true => Encoding::symmetric(self.bits, block, scale),
            false => Encoding::asymmetric(self.bits, block, scale, min_zero),
        }
    }
}

/// The encodings with a name of their own; those of ggml are [`TYPES`](crate::ggml::TYPES).
pub const PRESETS: &[(&str, Encoding)] = &[
    ("W2A16", Encoding::symmetric(2, Block::Columns(128), Float::F16)),
    ("W2A16_ASYM", Encoding::asymmetric(2, Block::Columns(128), Float::F16, 0)),
    ("W3A16", Encoding::symmetric(3, Block::Columns(128), Float::F16)),
    ("W3A16_ASYM", Encoding::asymmetric(3, Block::Columns(128), Float::F16, 0)),
    ("W4A16", Encoding::symmetric(4, Block::Columns(128), Float::F16)),
    ("W4A16_ASYM", Encoding::asymmetric(4, Block::Columns(128), Float::F16, 0)),
    ("W5A16", Encoding::symmetric(5, Block::Columns(128), Float::F16)),
    ("W5A16_ASYM", Encoding::asymmetric(5, Block::Columns(128), Float::F16, 0)),
    ("W6A16", Encoding::symmetric(6, Block::Columns(128), Float::F16)),
    ("W6A16_ASYM", Encoding::asymmetric(6, Block::Columns(128), Float::F16, 0)),
    ("W7A16", Encoding::symmetric(7, Block::Columns(128), Float::F16)),
    ("W7A16_ASYM", Encoding::asymmetric(7, Block::Columns(128), Float::F16, 0)),
    ("W8A16", Encoding::symmetric(8, Block::Columns(128), Float::F16)),
    ("W8A16_ASYM", Encoding::asymmetric(8, Block::Columns(128), Float::F16, 0)),
    ("W8A8", Encoding::symmetric(8, Block::Row, Float::F32).beside(Activation::INT8_TOKEN)),
    ("FP8", Encoding::fp8(Block::Matrix).beside(Activation::FP8_STATIC)),
    ("FP8_DYNAMIC", Encoding::fp8(Block::Row).beside(Activation::FP8_TOKEN)),
    ("FP8_BLOCK", Encoding::fp8(Block::Tile([128, 128])).beside(Activation::FP8_BLOCK)),
    ("NF4", Encoding::NF4),
    ("MXFP4A16", Encoding::MXFP4),
    ("NVFP4A16", Encoding::NVFP4),
    ("MLX4_32", Encoding::mlx(4, 32, Float::BF16)),
    ("MLX4_64", Encoding::mlx(4, 64, Float::BF16)),
    ("MLX4_128", Encoding::mlx(4, 128, Float::F16)),
    ("MLX8_64", Encoding::mlx(8, 64, Float::BF16)),
];

/// Four bits, two of them exponent and one mantissa: the codes of MXFP4 and NVFP4.
pub static E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// bitsandbytes' table of 16 levels, each as likely as the others for normally distributed weights (QLoRA, arXiv:2305.14314).
pub static NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Eight bits, four of them exponent and three mantissa: up to 448, no infinities, NaN at 127 and 255.
pub static E4M3: [f32; 256] = e4m3_table();

const fn e4m3_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0u32;
    while code < 256 {
        let (exponent, mantissa) = (code >> 3 & 15, code & 7);
        let magnitude = if code & 127 == 127 {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            f32::from_bits((exponent + 120) << 23 | mantissa << 20)
        };
        table[code as usize] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    table
}

/// A table of integers as one of reals.
pub(crate) const fn reals(levels: &[i8; 16]) -> [f32; 16] {
    let mut table = [0.0; 16];
    let mut code = 0;
    while code < 16 {
        table[code] = levels[code] as f32;
        code += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_and_encodings_say_the_same() {
        for bits in 2..=8 {
            for (group, symmetric) in [(Some(64), true), (None, false)] {
                let scheme = Scheme { bits, group, symmetric };
                let encoding = scheme.encoding(Float::F16, 1);
                assert_eq!(encoding.scheme(), Some(scheme));
                assert_eq!(encoding.max_code(), scheme.max_code());
                assert_eq!(encoding.groups(200), scheme.groups(200));
                let zero = if symmetric { scheme.midpoint() } else { 0 };
                assert_eq!(encoding.levels.level(zero), 0.0);
            }
        }
        for (name, encoding) in PRESETS {
            assert_eq!(encoding.scheme().is_some(), name.starts_with('W'), "{name}");
            assert!(encoding.ggml_type().is_none(), "{name}");
        }
    }

    #[test]
    fn every_type_of_ggml_is_an_encoding() {
        for ty in crate::ggml::TYPES {
            let encoding = ty.encoding();
            assert_eq!(encoding.ggml_type(), Some(*ty));
            assert_eq!(ty.plain().is_some(), matches!(encoding.levels, Levels::Plain(_)), "{ty}");
            if let Scale::Sub { blocks, .. } = encoding.scale {
                assert_eq!(blocks * encoding.group(), ty.block_len, "{ty}");
            }
        }
        let q4_k = GgmlType::from_name("Q4_K").unwrap().encoding();
        assert_eq!(q4_k.sub(), Some(SubScales { low: 0, high: 63, max_min: 63 }));
        assert_eq!((q4_k.group(), q4_k.levels.bits(), q4_k.has_min()), (32, 4, true));
        assert_eq!(q4_k.activation, Some(Activation::Q8_K));
    }

    /// Of each float every value is its own nearest, and between two neighbours the nearer one is.
    #[test]
    fn scales_are_rounded_to_the_nearest_value() {
        let mut eights: Vec<f32> = E4M3.iter().copied().filter(|x| x.is_finite()).collect();
        eights.sort_by(f32::total_cmp);
        for pair in eights.windows(2) {
            let middle = 0.5 * (pair[0] + pair[1]);
            let apart = 0.01 * (pair[1] - pair[0]);
            assert_eq!(Float::E4M3.round(pair[0]), pair[0]);
            assert_eq!(Float::E4M3.round(middle - apart), pair[0]);
            assert_eq!(Float::E4M3.round(middle + apart), pair[1]);
        }
        assert_eq!([1e9, -1e9, 1.0625, 1.1875].map(|x| Float::E4M3.round(x)), [448.0, -448.0, 1.0, 1.25]);
        for exponent in -126..=127 {
            let power = 2f32.powi(exponent);
            assert_eq!([power, 1.49 * power].map(|x| Float::E8M0.round(x)), [power; 2]);
            if exponent < 127 {
                assert_eq!(Float::E8M0.round(1.51 * power), 2.0 * power);
            }
        }
        assert_eq!(
            [0.0, -3.0, 1e-45, f32::MAX].map(|x| Float::E8M0.round(x)),
            [2f32.powi(-127), 2f32.powi(-127), 2f32.powi(-127), 2f32.powi(127)]
        );
    }

    #[test]
    fn every_value_of_e4m3_has_its_code() {
        for (code, value) in E4M3.iter().enumerate().filter(|(_, value)| value.is_finite()) {
            assert_eq!(usize::from(code_e4m3(*value)), code, "{value}");
        }
        // Ties go to the even code.
        assert_eq!([1.0625, 1.1875, -1e9, 0.000_976_562_5, -0.0001].map(code_e4m3), [0x38, 0x3a, 0xfe, 0, 0x80]);
    }

    #[test]
    fn every_value_is_in_one_block() {
        for (block, shape, count) in [
            (Block::Row, [3, 10], 3),
            (Block::Columns(4), [3, 10], 9),
            (Block::Flat(4), [3, 10], 8),
            (Block::Tile([2, 4]), [3, 10], 6),
            (Block::Matrix, [3, 10], 1),
            (Block::Matrix, [0, 10], 0),
        ] {
            assert_eq!(block.count(shape), count, "{block:?}");
            let mut seen = vec![0; count];
            for row in 0..shape[0] {
                for col in 0..shape[1] {
                    seen[block.of([row, col], shape)] += 1;
                }
            }
            assert!(seen.iter().all(|values| *values > 0), "{block:?}: {seen:?}");
        }
    }
}
