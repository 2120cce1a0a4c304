//! Attention whose keys are its values, and what stands for blocks of tokens, as llama.cpp's class of DeepSeek V4 has them.

use super::{From, Lister, Part};
use crate::dialect::architectures::Need;
use crate::error::Result;
use crate::graph::{Attention, Compressor, Joint, Pool, Projections, Router};

/// Tokens of the blocks that llama.cpp knows: those of which an indexer chooses, and others.
pub(crate) const BLOCKS: [usize; 2] = [4, 128];

impl Lister {
    /// The tensors of such attention.
    pub(super) fn joint(&mut self, at: &str, attention: &Attention) -> Result<()> {
        let Projections::Joint(joint) = &attention.projections else { unreachable!("asked for these") };
        let Joint { q: [to_latent, q], q_norm, kv, narrow } = &**joint;
        for (name, linear) in [
            ("attn_q_a", to_latent),
            ("attn_q_b", q),
            ("attn_kv", kv),
            ("attn_output_a", narrow),
            ("attn_output_b", &attention.o),
        ] {
            self.linear(&format!("{at}.{name}"), linear, None, Need::Never)?;
        }
        self.norm(&format!("{at}.attn_q_a_norm"), q_norm)?;
        if let Some(norm) = attention.norms.as_ref().and_then(|norms| norms.k.as_ref()) {
            self.norm(&format!("{at}.attn_kv_a_norm"), norm)?;
        }
        if let Some(tensor) = &attention.sinks {
            let part = Part::whole(From::Tensor(tensor.clone(), vec![attention.shape.heads]));
            self.push(format!("{at}.attn_sinks.weight"), vec![attention.shape.heads], vec![part]);
        }
        let Some(beside) = &attention.beside else { return Ok(()) };
        let Compressor { kv, pool, norm, block } = &**beside;
        if *block != BLOCKS[usize::from(attention.choice.is_none())] {
            return Err(self.cannot(format_args!(
                "entries that stand for {block} tokens (llama.cpp has them for {} where an indexer chooses, and for {} elsewhere)",
                BLOCKS[0], BLOCKS[1]
            )));
        }
        self.linear(&format!("{at}.attn_compressor_kv"), kv, None, Need::Never)?;
        self.pool(&format!("{at}.attn_compressor"), pool, *block)?;
        self.norm(&format!("{at}.attn_compressor_norm"), norm)?;
        let Some(indexer) = attention.indexer() else { return Ok(()) };
        let (Some(keys), Some(weights), Some(pool)) = (&indexer.k, &indexer.weights, &indexer.pool) else {
            return Err(self.cannot("an indexer of this form"));
        };
        // llama.cpp turns queries and keys by a Hadamard matrix of this width, and aborts over others.
        let width = indexer.shape.head_dim;
        if width < 64 || !width.is_power_of_two() {
            return Err(self.cannot(format_args!("an indexer with heads of {width} values")));
        }
        self.linear(&format!("{at}.indexer.attn_q_b"), &indexer.q, None, Need::Never)?;
        self.linear(&format!("{at}.indexer.proj"), weights, None, Need::Never)?;
        self.linear(&format!("{at}.indexer_compressor_kv"), keys, None, Need::Never)?;
        self.pool(&format!("{at}.indexer_compressor"), pool, *block)?;
        self.norm(&format!("{at}.indexer_compressor_norm"), &indexer.k_norm)
    }

    /// What weighs the tokens of a block, whose names begin so.
    pub(super) fn pool(&mut self, start: &str, pool: &Pool, block: usize) -> Result<()> {
        self.linear(&format!("{start}_gate"), &pool.gate, None, Need::Never)?;
        let shape = vec![block, pool.gate.rows];
        let part = Part::whole(From::Tensor(pool.places.clone(), shape.clone()));
        self.push(format!("{start}_ape.weight"), shape, vec![part]);
        Ok(())
    }

    /// The table of a router's experts.
    pub(super) fn table(&mut self, at: &str, router: &Router) -> Result<()> {
        let Some((tensor, shape)) = &router.table else { return Ok(()) };
        let part = Part::whole(From::Tensor(tensor.clone(), shape.clone()));
        self.push(format!("{at}.ffn_gate_tid2eid.weight"), shape.clone(), vec![part]);
        Ok(())
    }
}
