//! Schemes: what users call the encodings by integers whose groups have scales (and zeros) of their own.

use serde::{Deserialize, Serialize};

/// How a weight matrix is divided into groups and how wide each code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Scheme {
    /// Width of one code, 2 to 8.
    pub bits: u8,
    /// Columns that share one scale; `None` is one scale per row ("channel").
    pub group: Option<usize>,
    /// Symmetric grids fix the zero at `2^(bits-1)`.
    pub symmetric: bool,
}

impl Scheme {
    /// Parses the preset names users type: `W4A16`, `W8A16`, `W3A16`, `W2A16` and each with `_ASYM`.
    /// The group is 128 columns, as in those presets.
    pub fn preset(name: &str) -> Option<Scheme> {
        let upper = name.to_ascii_uppercase();
        let (base, symmetric) = match upper.strip_suffix("_ASYM") {
            Some(base) => (base, false),
            None => (upper.as_str(), true),
        };
        let bits = match base {
            "W2A16" => 2,
            "W3A16" => 3,
            "W4A16" => 4,
            "W8A16" => 8,
            _ => return None,
        };
        Some(Scheme { bits, group: Some(128), symmetric })
    }

    /// The preset-style name, without the group.
    pub fn name(&self) -> String {
        format!("W{}A16{}", self.bits, if self.symmetric { "" } else { "_ASYM" })
    }

    /// Largest code, `2^bits - 1`.
    pub fn max_code(&self) -> u8 {
        ((1u16 << self.bits) - 1) as u8
    }

    /// The zero of a symmetric grid, `2^(bits-1)`.
    pub fn midpoint(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Columns per group in a row of `cols` values.
    pub fn group_width(&self, cols: usize) -> usize {
        self.group.unwrap_or(cols)
    }

    /// Groups in a row of `cols` values.
    pub fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group_width(cols).max(1))
    }
}
