//! Outputs that appear whole or not at all.
//!
//! `place` finds out where an output goes and what forbids it, `staging` keeps it hidden while it is written, `switch` moves it into
//! place in one step. `behind` is the thread that writes, `hashing` reads what was written behind it.

pub mod behind;
pub mod hashing;
pub mod journal;
mod left;
mod look;
mod place;
mod staging;
mod switch;

use std::collections::BTreeMap;
use std::path::Path;

use formats::{ShardedWriter, TensorSpec};

use crate::error::{Error, Result};

pub use left::{Before, Unfinished, clean, discard, sweep, unfinished};
pub use look::Look;
pub use place::{Place, SideOutput, check_apart, check_beside, check_place, check_space, free_space};
use staging::without_hidden_names;
pub use staging::{Staging, remove_made};

/// Bytes of one file of weights.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Bytes of all tensors together.
pub fn bytes_of(specs: &[TensorSpec]) -> u64 {
    specs.iter().filter_map(TensorSpec::bytes).map(|bytes| bytes as u64).sum()
}

/// Lays out the weight files of a Hugging Face directory in `folder`, or takes up those that an earlier process has laid out.
pub fn weight_writer(folder: &Path, specs: Vec<TensorSpec>, taken_up: bool) -> Result<ShardedWriter> {
    Ok(match taken_up {
        true => ShardedWriter::take_up(folder, specs, SHARD_BYTES, &format())?,
        false => ShardedWriter::create(folder, specs, SHARD_BYTES, &format())?,
    })
}

/// Names and bytes of the files that [`weight_writer`] would lay out.
pub fn weight_files(specs: Vec<TensorSpec>) -> Result<Vec<(String, u64)>> {
    let files = ShardedWriter::sizes(specs, SHARD_BYTES, &format())?;
    Ok(files.into_iter().map(|(path, bytes)| (path.display().to_string(), bytes)).collect())
}

/// What such a file says of itself.
fn format() -> BTreeMap<String, String> {
    [("format".to_owned(), "pt".to_owned())].into_iter().collect()
}

impl Error {
    /// Names the files of `output` as they will be called; while they are written they lie in a hidden folder, of which
    /// the user knows nothing. `single` says that the output is a file, or its parts, and no folder.
    #[cfg_attr(doc, doc(hidden))]
    pub fn of_output(self, output: &Path, single: bool) -> Error {
        let told = self.to_string();
        let named = without_hidden_names(&told, output, single);
        if named == told {
            return self;
        }
        match self {
            Error::Usage(_) => Error::Usage(named),
            _ => Error::Failed(named),
        }
    }
}
