//! What the weights of a model are called and how they are stored, whatever files they come from.

use std::path::Path;

use formats::{Dtype, Encoding, GgmlType, GgufFile, TensorView};
use serde_json::Value;

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The Hugging Face name; `<module>.weight` for a quantized module.
    pub name: String,
    /// Extents in Hugging Face order, `[out, in]` for a linear.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub dtype: StoredType,
    /// Bytes in the file, all parts together.
    pub stored_bytes: u64,
}

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// As numbers of this type.
    Plain(Dtype),
    /// As codes and scales.
    Quantized {
        /// The codec's id: `compressed-tensors`, `gptq`, `awq` or `mlx`.
        codec: &'static str,
        /// What codes stand for.
        encoding: Encoding,
    },
    /// As codes and scales in a layout that is only read: fp8, bitsandbytes, MXFP4.
    Foreign,
    /// As blocks of a ggml type.
    Ggml(GgmlType),
}

/// A tensor stored plainly, as it lies in the file.
pub type RawTensor<'a> = TensorView<'a>;

/// An open model, as far as families and the dialect of GGUF look at it, who know of no files. The one there is is
/// [`Checkpoint`](crate::Checkpoint), whose methods these are.
pub trait Weights {
    /// Where it was opened.
    fn path(&self) -> &Path;
    /// What the model is called.
    fn name(&self) -> String;
    /// config.json, or what stands for it.
    fn config(&self) -> &Value;
    /// Every tensor, in the order of the files.
    fn entries(&self) -> &[Entry];
    /// The tensor of this name.
    fn entry(&self, name: &str) -> Option<&Entry>;
    /// The bytes of a tensor that is stored plainly.
    fn raw(&self, name: &str) -> Option<RawTensor<'_>>;
    /// Gives the memory behind a tensor back.
    fn release(&self, name: &str);
    /// The file itself where it is a GGUF file.
    fn gguf(&self) -> Option<&GgufFile>;
}
