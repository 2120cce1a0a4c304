//! Which reals a code stands for, how codes lie in bytes, how files hold tensors.
//!
//! Nothing here chooses scales, knows a model family or starts a thread.

pub mod bits;
pub mod codec;
pub mod container;
pub mod encoding;
pub mod error;
pub mod ggml;
pub mod grid;
pub mod tensor;
pub mod weight;
pub mod words;

pub use codec::{CODECS, Codec, read_quantization};
pub use container::gguf::{GgufFile, GgufTensor, GgufWriter};
pub use container::imatrix::{Imatrix, ImatrixEntry};
pub use container::placed::Follower;
pub use container::safetensors::{SafetensorsFile, ShardedWriter};
pub use container::sentencepiece::SentencePiece;
pub use container::shards::SafetensorsSet;
pub use encoding::{Block, Encoding, Float, Levels, Offset, Scale};
pub use error::{Error, Result};
pub use ggml::GgmlType;
pub use grid::Scheme;
pub use tensor::{Dtype, Tensor, TensorSpec, TensorView};
pub use weight::{PackedWeight, QuantizedWeight};
pub use words::WordLayout;
