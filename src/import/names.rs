//! Tensor names and row order of the architectures that GGUF files name, for reading and writing.
//!
//! One entry of [`ARCHITECTURES`] an architecture; nothing else knows a GGUF tensor's name.

use std::cmp::Ordering;

/// Frequency factors, one per rotary pair; part of config.json in Hugging Face's terms.
pub(crate) const ROPE_FREQS: &str = "rope_freqs.weight";

/// How a GGUF architecture names the tensors of the families that it serves.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// `general.architecture`.
    pub id: &'static str,
    /// The families written as it, by [`crate::families::Family::id`].
    pub families: &'static [&'static str],
    /// Modules outside the blocks: GGUF's name, Hugging Face's.
    model: &'static [(&'static str, &'static str)],
    /// Modules of a block: GGUF's name, Hugging Face's.
    block: &'static [(&'static str, &'static str)],
    /// Modules whose rows are interleaved, and whose heads they hold.
    interleaved: &'static [(&'static str, Heads)],
}

/// Which heads the rows of a projection belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heads {
    /// The query heads.
    Query,
    /// The key and value heads.
    Key,
}

/// Every architecture that can be read and written.
pub(crate) const ARCHITECTURES: &[Architecture] = &[Architecture {
    id: "llama",
    families: &["llama", "mistral"],
    model: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
    block: &[
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ],
    interleaved: &[("attn_q", Heads::Query), ("attn_k", Heads::Key)],
}];

impl Architecture {
    /// The architecture that a file calls `id`.
    pub fn named(id: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|architecture| architecture.id == id)
    }

    /// The architecture that models of a family are written as.
    pub fn of_family(family: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|architecture| architecture.families.contains(&family))
    }

    /// Hugging Face's name of a GGUF tensor; `None` for one that the architecture does not have.
    pub fn hugging_face_name(&self, name: &str) -> Option<String> {
        let (module, suffix) = split_suffix(name)?;
        if let Some((_, module)) = self.model.iter().find(|(ggml, _)| *ggml == module) {
            return Some(format!("{module}.{suffix}"));
        }
        let (block, module) = block_of(module, "blk.")?;
        let (_, module) = self.block.iter().find(|(ggml, _)| *ggml == module)?;
        Some(format!("model.layers.{block}.{module}.{suffix}"))
    }

    /// GGUF's name of a Hugging Face tensor; `None` for one that the architecture does not have.
    pub fn gguf_name(&self, name: &str) -> Option<String> {
        let (module, suffix) = split_suffix(name)?;
        if let Some((ggml, _)) = self.model.iter().find(|(_, hugging_face)| *hugging_face == module) {
            return Some(format!("{ggml}.{suffix}"));
        }
        let (block, module) = block_of(module, "model.layers.")?;
        let (ggml, _) = self.block.iter().find(|(_, hugging_face)| *hugging_face == module)?;
        Some(format!("blk.{block}.{ggml}.{suffix}"))
    }

    /// The heads whose rows the GGUF tensor (a weight or a bias) holds interleaved; `None` where rows keep their order.
    pub fn interleaved(&self, name: &str) -> Option<Heads> {
        let (_, module) = block_of(split_suffix(name)?.0, "blk.")?;
        self.interleaved.iter().find(|(ggml, _)| *ggml == module).map(|(_, heads)| *heads)
    }
}

/// `a.b.weight` as `a.b` and `weight`.
fn split_suffix(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.').filter(|(_, suffix)| matches!(*suffix, "weight" | "bias"))
}

/// `{prefix}3.a.b` as `3` and `a.b`.
fn block_of<'n>(name: &'n str, prefix: &str) -> Option<(usize, &'n str)> {
    let (block, module) = name.strip_prefix(prefix)?.split_once('.')?;
    Some((block.parse().ok()?, module))
}

/// The block that a GGUF tensor belongs to.
pub(crate) fn block_number(name: &str) -> Option<usize> {
    block_of(name, "blk.").map(|(block, _)| block)
}

/// The row of a GGUF file that holds Hugging Face's row `row` of `rows`, interleaved by head.
///
/// Hugging Face rotates the halves of a head, ggml neighbours: row `p·d/2 + j` of a head is stored as `2·j + p`.
pub(crate) fn stored_row(row: usize, rows: usize, heads: usize) -> usize {
    let width = rows / heads;
    let (head, within) = (row / width, row % width);
    let (part, pair) = (within / (width / 2), within % (width / 2));
    head * width + 2 * pair + part
}

/// The Hugging Face row that row `row` of `rows` of a GGUF file holds: the inverse of [`stored_row`].
pub(crate) fn original_row(row: usize, rows: usize, heads: usize) -> usize {
    let width = rows / heads;
    let (head, within) = (row / width, row % width);
    head * width + within % 2 * (width / 2) + within / 2
}

/// The order in which llama-quantize visits and writes tensors: those of no block first, then block by block, by name.
pub(crate) fn file_order(a: &str, b: &str) -> Ordering {
    block_number(a).cmp(&block_number(b)).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        let llama = Architecture::of_family("mistral").unwrap();
        assert_eq!(llama.id, Architecture::named("llama").unwrap().id);
        for (gguf, hugging_face) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
            ("blk.12.ffn_down.weight", "model.layers.12.mlp.down_proj.weight"),
            ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ] {
            assert_eq!(llama.hugging_face_name(gguf).as_deref(), Some(hugging_face));
            assert_eq!(llama.gguf_name(hugging_face).as_deref(), Some(gguf));
        }
        for name in ["blk.x.attn_q.weight", "blk.0.attn_q.scale", "blk.0.attn_z.weight", "attn_q.weight", ROPE_FREQS] {
            assert_eq!(llama.hugging_face_name(name), None, "{name}");
        }
        assert_eq!(llama.gguf_name("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
        assert_eq!(llama.interleaved("blk.3.attn_q.bias"), Some(Heads::Query));
        assert_eq!(llama.interleaved("blk.3.attn_k.weight"), Some(Heads::Key));
        assert_eq!(llama.interleaved("blk.3.attn_v.weight"), None);
    }

    #[test]
    fn rows_go_both_ways() {
        // Two heads of six rows: halves 0 1 2 | 3 4 5 become pairs.
        let stored: Vec<usize> = (0..12).map(|row| original_row(row, 12, 2)).collect();
        assert_eq!(stored, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert!((0..12).all(|row| original_row(stored_row(row, 12, 2), 12, 2) == row));
    }

    #[test]
    fn tensors_of_no_block_come_first_and_blocks_by_number() {
        let mut names = [
            "blk.10.attn_q.weight",
            "token_embd.weight",
            "blk.2.ffn_up.weight",
            "output.weight",
            "blk.2.attn_q.weight",
        ];
        names.sort_by(|a, b| file_order(a, b));
        let sorted = [
            "output.weight",
            "token_embd.weight",
            "blk.2.attn_q.weight",
            "blk.2.ffn_up.weight",
            "blk.10.attn_q.weight",
        ];
        assert_eq!(names, sorted);
    }
}
