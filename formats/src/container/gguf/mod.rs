//! GGUF: metadata, a table of tensors, aligned data.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensors | u64 keys
//! keys     × { string key | u32 type | value }                    string = u64 length + UTF-8
//! tensors  × { string name | u32 dims | u64 extents[dims] | u32 ggml type | u64 offset }
//! zeros up to the alignment
//! data, each tensor at its offset and followed by zeros up to the alignment
//! ```
//!
//! Values of metadata are parsed and written by gguf-rs-lib, which bounds every count before it allocates, and so is the
//! table written. What a message must name (the key, the tensor, the file of a split set) is read and checked here, and
//! so are the keys and the version: the library refuses names such as `command-r.block_count` and files of version 2.

mod header;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};

pub use gguf_rs_lib::format::{GGUFValueType, MetadataArray, MetadataValue};
pub use header::MAX_METADATA_BYTES;
pub use reader::{GgufFile, GgufSpec, GgufView};
pub use writer::{GgufTensor, GgufWriter, metadata_array};

/// Bytes to a multiple of which everything is padded, unless `general.alignment` says otherwise.
const ALIGNMENT: u64 = 32;

/// Names must be shorter than this to be read by ggml.
const NAME_BYTES: usize = 64;

/// Dimensions that ggml has.
const MAX_DIMS: usize = 4;

const SPLIT_NO: &str = "split.no";
const SPLIT_COUNT: &str = "split.count";
const SPLIT_TENSORS: &str = "split.tensors.count";

/// The path of file `number`, from 1, of `count` that a model is split into.
pub fn split_path(stem: impl AsRef<Path>, number: usize, count: usize) -> PathBuf {
    let mut path = stem.as_ref().as_os_str().to_os_string();
    path.push(format!("-{number:05}-of-{count:05}.gguf"));
    path.into()
}
