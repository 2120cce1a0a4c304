//! What blocks of Gemma 3n have that work on one of several streams, as llama.cpp calls it.

use super::{ExportTensor, From, Lister, Part, Source};
use crate::dialect::architectures::Need;
use crate::error::Result;
use crate::graph::{Attention, Block, Linear};

impl Lister {
    /// The linears, norms and scales of the streams, and of the residual beside attention.
    pub(super) fn altup(&mut self, at: &str, block: &Block) -> Result<()> {
        let Some(altup) = block.altup.as_deref().filter(|_| self.architecture.altup) else {
            return match &block.altup {
                None => Ok(()),
                Some(_) => Err(self.cannot("a model whose blocks work on one of several streams")),
            };
        };
        let Some((scale, shape)) = &altup.scale else {
            return Err(self.cannot("streams without a scale of the one that blocks work on"));
        };
        let part = Part::whole(From::Tensor(scale.clone(), shape.clone()));
        self.push(format!("{at}.altup_correct_scale.weight"), shape.clone(), vec![part]);
        for (name, linear) in [
            ("altup_router", &altup.router),
            ("altup_predict_coef", &altup.predict),
            ("altup_correct_coef", &altup.correct),
            ("laurel_l", &altup.laurel.left),
            ("laurel_r", &altup.laurel.right),
        ] {
            self.linear(&format!("{at}.{name}"), linear, None, Need::Never)?;
        }
        self.norm(&format!("{at}.altup_router_norm"), &altup.norm)?;
        self.norm(&format!("{at}.laurel_post_norm"), &altup.laurel.norm)?;
        self.ends("altup_proj.weight", &altup.widen);
        self.ends("altup_unembd_proj.weight", &altup.narrow);
        Ok(())
    }

    /// Linears of all streams but the first, in one tensor.
    fn ends(&mut self, name: &str, linears: &[Linear]) {
        let Some(first) = linears.first() else { return };
        let parts = linears.iter().map(|linear| Part::whole(From::Weight(linear.clone()))).collect();
        self.push(name.to_owned(), vec![linears.len(), first.rows, first.cols], parts);
    }

    /// Keys and values of a layer that reads those of another: without them llama.cpp does not load a file, and it does not use them.
    pub(super) fn unread_keys(&mut self, at: &str, attention: &Attention) {
        let shape = &attention.shape;
        let width = attention.o.rows;
        for (name, extents) in [
            ("attn_k", vec![shape.kv_heads * shape.head_dim, width]),
            ("attn_v", vec![shape.kv_heads * shape.value_dim, width]),
            ("attn_k_norm", vec![shape.head_dim]),
        ] {
            self.tensors.push(ExportTensor {
                gguf: format!("{at}.{name}.weight"),
                shape: extents,
                source: Source::Zeros,
            });
        }
    }
}
