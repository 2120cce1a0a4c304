//! What chooses the tokens that attention sees, as llama.cpp's classes have it.

use super::{Lister, Need};
use crate::error::Result;
use crate::graph::{Attention, Indexer, Linear};

impl Lister {
    /// An indexer. Fails for one of another form than the architecture's class has.
    pub(super) fn indexer(&mut self, at: &str, attention: &Attention, indexer: &Indexer) -> Result<()> {
        match self.architecture.id {
            "minimax-m3" | "qwen4exp" => self.of_blocks(at, attention, indexer),
            _ => self.of_tokens(at, attention, indexer),
        }
    }

    /// DeepSeek V3.2's, which GLM-5 and Hunyuan 4 have, too, and GLM-5.3-Flash with one key for a block of tokens.
    fn of_tokens(&mut self, at: &str, attention: &Attention, indexer: &Indexer) -> Result<()> {
        let (Some(keys), Some(weights), None) = (&indexer.k, &indexer.weights, &indexer.q_norm) else {
            return Err(self.cannot("an indexer of this form"));
        };
        if let Some(pool) = &indexer.pool {
            if self.architecture.id != "glm5-next" {
                return Err(self.cannot("an indexer with one key for a block of tokens"));
            }
            self.pool(&format!("{at}.indexer_compressor"), pool, indexer.shape.block)?;
        }
        // llama.cpp turns queries and keys by a Hadamard matrix of this width, and aborts over others; keys of blocks it does not turn.
        let width = indexer.shape.head_dim;
        if indexer.pool.is_none() && (width < 64 || !width.is_power_of_two()) {
            return Err(self.cannot(format_args!("an indexer with heads of {width} values")));
        }
        let order = self.turned(attention, indexer);
        for (name, linear) in [("attn_q_b", &indexer.q), ("attn_k", keys)] {
            let rows = order.as_ref().map(|order| order(linear.rows));
            self.linear(&format!("{at}.indexer.{name}"), linear, rows, Need::Never)?;
        }
        self.linear(&format!("{at}.indexer.proj"), weights, None, Need::Never)?;
        self.norm_of(&format!("{at}.indexer.k_norm"), &indexer.k_norm, order.map(|order| order(width)))
    }

    /// MiniMax M3's and Qwen 4's, whose queries and keys are normed. The latter's are made by one linear, and two in the file.
    ///
    /// Fails where heads of the former do not choose for one head of keys each.
    fn of_blocks(&mut self, at: &str, attention: &Attention, indexer: &Indexer) -> Result<()> {
        let Indexer { q, k, q_norm, k_norm, shape, .. } = indexer;
        let whole: fn(&Linear) -> Vec<usize> = |linear| (0..linear.rows).collect();
        let (heads, parts) = match (k, self.architecture.id) {
            (Some(k), "minimax-m3") => (attention.shape.kv_heads, [(q, whole(q)), (k, whole(k))]),
            (None, "qwen4exp") if indexer.mean => {
                let first = shape.heads * shape.head_dim;
                (shape.heads, [(q, (0..first).collect()), (q, (first..q.rows).collect())])
            }
            _ => return Err(self.cannot("an indexer of this form")),
        };
        let Some(q_norm) = q_norm.as_ref().filter(|_| indexer.weights.is_none() && !indexer.layout.interleaved) else {
            return Err(self.cannot("an indexer of this form"));
        };
        if heads != shape.heads {
            return Err(self.cannot(format_args!("an indexer with {} heads for {heads} heads of keys", shape.heads)));
        }
        for (name, (linear, rows)) in ["q_proj", "k_proj"].into_iter().zip(parts) {
            self.rows(&format!("{at}.indexer.{name}"), linear, rows)?;
        }
        self.norm(&format!("{at}.indexer.q_norm"), q_norm)?;
        self.norm(&format!("{at}.indexer.k_norm"), k_norm)
    }

    /// The order of the rows of an indexer's heads where the runtime turns neighbours in them as in attention, and the model halves.
    fn turned(&self, attention: &Attention, indexer: &Indexer) -> Option<impl Fn(usize) -> Vec<usize> + use<>> {
        let (width, first) = (indexer.shape.head_dim, indexer.layout.first);
        let pairs = attention.rope.as_ref()?.inverse_frequencies.len();
        let within = move |at: usize| match at.checked_sub(first).filter(|at| *at < 2 * pairs) {
            Some(at) => first + at % 2 * pairs + at / 2,
            None => at,
        };
        let order = move |rows: usize| (0..rows).map(|row| row / width * width + within(row % width)).collect();
        (self.architecture.streams && !indexer.layout.interleaved).then_some(order)
    }
}
