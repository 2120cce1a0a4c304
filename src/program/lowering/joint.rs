//! Attention whose keys are its values (DeepSeek V4), and what stands for blocks of tokens beside its window.

use kernels::RopeLayout;

use super::Lowering;
use crate::graph::{Compressor, Joint, Rope};
use crate::program::{Kept, Kind, Streams};

impl<'b> Lowering<'b> {
    /// Queries, what is key and value, both as the linears make them, and the queries' latent.
    pub(super) fn joint(&mut self, joint: &'b Joint, x: usize) -> (usize, usize, usize) {
        let Joint { q, q_norm, kv, .. } = joint;
        let made = self.linears(vec![&q[0], kv], false, x, &["cq", "kv"]);
        let latent = self.norm(Some(q_norm), made[0], "cq");
        // Both are narrow, and made of one product with the input.
        [latent, made[1]].into_iter().for_each(|value| self.keep(value, Kept::Always));
        (self.linears(vec![&q[1]], false, latent, &["q"])[0], made[1], latent)
    }

    /// One entry for each whole block of tokens, at its last, turned as if it stood at the first.
    pub(super) fn entries(
        &mut self,
        beside: &'b Compressor,
        x: usize,
        rope: Option<&'b Rope>,
        layout: RopeLayout,
    ) -> usize {
        let Compressor { kv, pool, norm, block } = beside;
        let made = self.linears(vec![kv, &pool.gate], true, x, &["ckv", "cg"]);
        let width = kv.rows / if pool.overlap { 2 } else { 1 };
        let entries = self.one(Kind::Pool(pool), &made, "entries", width);
        let mut entries = self.norm(Some(norm), entries, "entries");
        if let Some(rope) = rope {
            let kind = Kind::Rope { rope, layout, back: block - 1, inverse: false };
            self.each(kind, std::slice::from_mut(&mut entries));
        }
        entries
    }

    /// What the output projection reads of what was attended to: that turned back, and made narrower by the parts of a linear, of which each reads
    /// what one group of heads has.
    pub(super) fn turned_back(
        &mut self,
        joint: &'b Joint,
        rope: Option<&'b Rope>,
        layout: RopeLayout,
        mut mixed: usize,
    ) -> usize {
        let linear = &joint.narrow;
        if let Some(rope) = rope {
            let kind = Kind::Rope { rope, layout, back: 0, inverse: true };
            self.each(kind, std::slice::from_mut(&mut mixed));
        }
        self.keep(mixed, Kept::Always);
        let parts = linear.split.parts();
        let group = |this: &mut Self, part| {
            this.one(Kind::Streams(linear.cols, Streams::Take(part)), &[mixed], "g", linear.cols)
        };
        let reads: Vec<usize> = (0..parts).map(|part| group(self, part)).collect();
        let makes = vec![("og", linear.rows / parts); parts];
        let made = self.operation(Kind::Linear { linears: vec![linear], fixed: false }, &reads, &makes);
        self.beside_each_other(made)
    }
}
