//! What the weights of a model are called and how they are stored, whatever files they come from.

use std::ops::Range;
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

/// Values of a tensor that are read at a time where it is looked at as a whole.
const AT_ONCE: usize = 1 << 22;

impl Entry {
    /// Runs of slices along the first extent that are read at a time, some millions of values each; vectors are read whole.
    pub fn pieces(&self) -> Vec<Range<usize>> {
        let count = self.shape.first().copied().unwrap_or(0);
        let at_once = match self.shape.len() {
            0 | 1 => count,
            _ => AT_ONCE / self.shape[1..].iter().product::<usize>().max(1),
        };
        let at_once = at_once.clamp(1, count.max(1));
        // What has no extents, or nothing in one, is a piece too.
        (0..count.div_ceil(at_once).max(1)).map(|piece| piece * at_once..count.min((piece + 1) * at_once)).collect()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_slice_once() {
        let of = |shape: &[usize]| {
            let dtype = StoredType::Plain(Dtype::F32);
            Entry { name: String::new(), shape: shape.to_vec(), dtype, stored_bytes: 0 }.pieces()
        };
        assert_eq!([of(&[]), of(&[0, 8]), of(&[AT_ONCE + 1])].map(|pieces| pieces.len()), [1; 3]);
        let pieces = of(&[5, AT_ONCE / 2]);
        assert_eq!(pieces, [0..2, 2..4, 4..5]);
        assert_eq!(of(&[3, 2 * AT_ONCE]).len(), 3, "one slice at a time where it is larger");
    }
}
