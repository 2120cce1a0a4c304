//! What operations demand of what they are given, the same on every device.

use crate::{Error, Result};

/// So many of something.
pub(crate) fn expect(op: &'static str, what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{expected} {what}"), found: found.to_string() })
}

/// `parts` parts of one size, or parts of that size.
pub(crate) fn expect_multiple(op: &'static str, parts: usize, whole: usize) -> Result<()> {
    if parts > 0 && whole.is_multiple_of(parts) {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("a multiple of {parts}"), found: whole.to_string() })
}

/// What values are limited to; `f32::clamp` would panic at others.
pub(crate) fn expect_limit(op: &'static str, limit: f32) -> Result<()> {
    if limit >= 0.0 {
        return Ok(());
    }
    Err(Error::Shape { op, expected: "a limit of at least 0".to_owned(), found: limit.to_string() })
}
