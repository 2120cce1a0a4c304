//! What a block makes of its tokens in a row: rows of a table that are found by a hash of a token and of those before it.

use super::{Convolution, Linear, Norm};

/// A table whose rows are found by hashes of the last two tokens, of the last three, and so on. Several heads hash each, and each into rows of
/// its own; what they find lies side by side. Nothing is remembered of tokens before the last one that ends a text.
///
/// With `id₀` the token and `idₙ` the one `n` places before it, a head of `k` tokens finds row `(id₀ · m₀ ⊕ … ⊕ idₖ₋₁ · mₖ₋₁) mod size` of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Grams {
    /// Tensors `[rows, cols]` with their rows, of which the table consists one after the other.
    pub parts: Vec<(String, usize)>,
    /// Values of a row.
    pub cols: usize,
    /// What the token and those before it are multiplied by; two at least.
    pub multipliers: Vec<i64>,
    /// Rows of each head, those of two tokens first; as many for each number of tokens.
    pub sizes: Vec<usize>,
    /// The token that ends a text. It stands for whatever was before it, and before the first.
    pub end: u32,
}

impl Grams {
    /// Values that are found for a token.
    pub fn width(&self) -> usize {
        self.sizes.len() * self.cols
    }

    /// The row of each head for each token of sequences of these lengths, `[tokens, heads]`.
    pub fn rows(&self, ids: &[u32], lengths: &[usize]) -> Vec<usize> {
        let heads = self.sizes.len() / (self.multipliers.len() - 1).max(1);
        let mut rows = Vec::with_capacity(ids.len() * self.sizes.len());
        let mut start = 0;
        for length in lengths {
            for at in start..start + length {
                let (mut hash, mut over) = (self.product(ids[at], 0), false);
                let mut first = 0;
                for (back, sizes) in (1..self.multipliers.len()).zip(self.sizes.chunks(heads.max(1))) {
                    let before = at.checked_sub(back).filter(|before| *before >= start).map(|before| ids[before]);
                    over |= before.is_none_or(|id| id == self.end);
                    hash ^= self.product(before.filter(|_| !over).unwrap_or(self.end), back);
                    for size in sizes {
                        rows.push(first + hash.rem_euclid(*size as i64) as usize);
                        first += size;
                    }
                }
            }
            start += length;
        }
        rows
    }

    fn product(&self, id: u32, back: usize) -> i64 {
        i64::from(id).wrapping_mul(self.multipliers[back])
    }
}

/// A step that adds to each of several streams what a table has for tokens in a row, as far as the stream agrees with it (Qwen 4's per-layer
/// embeddings): `g = σ(agreement(norm(key(e)), norm(h))) · value(e)`, and `g + convolution(norm(g))` is added.
#[derive(Clone, Debug)]
pub struct GramLayer {
    /// Where `e` is found.
    pub grams: Grams,
    /// To what each stream is compared with, `[streams · hidden, width]`.
    pub key: Linear,
    /// To what is added, `[hidden, width]`.
    pub value: Linear,
    /// Of what streams are compared with, of the streams, and of what is convolved; each stream by itself.
    pub norms: [Norm; 3],
    /// Of all streams.
    pub convolution: Convolution,
}

/// The least that an agreement counts as, before its root is taken.
pub const AGREEMENT: f32 = 1e-6;

impl GramLayer {
    /// Its linears, those that read one input together.
    pub(super) fn linears(&self) -> Vec<Vec<&Linear>> {
        vec![vec![&self.key, &self.value]]
    }

    /// Its tensors that are no linears and no norms, with their shapes.
    pub(super) fn vectors(&self) -> Vec<(String, Vec<usize>)> {
        let table = self.grams.parts.iter().map(|(tensor, rows)| (tensor.clone(), vec![*rows, self.grams.cols]));
        table.chain(self.convolution.vectors()).collect()
    }

    /// Does something to every linear.
    pub(super) fn linears_mut(&mut self, change: &mut dyn FnMut(&mut Linear)) {
        [&mut self.key, &mut self.value].into_iter().for_each(change);
    }

    /// Gives every tensor that is no linear's another name.
    pub(super) fn rename(&mut self, name: &dyn Fn(&str) -> String) {
        let parts = self.grams.parts.iter_mut().map(|(tensor, _)| tensor);
        parts.chain(self.norms.iter_mut().flat_map(|norm| &mut norm.weights)).for_each(|tensor| *tensor = name(tensor));
        self.convolution.rename(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_of_tokens_in_a_row_up_to_the_end_of_a_text() {
        let grams =
            Grams { parts: Vec::new(), cols: 1, multipliers: vec![3, 5, 9], sizes: vec![7, 11, 13, 17], end: 2 };
        let of = |ids: [i64; 3]| {
            let two = (ids[0] * 3) ^ (ids[1] * 5);
            let three = two ^ (ids[2] * 9);
            [two % 7, 7 + two % 11, 18 + three % 13, 31 + three % 17].map(|row| row as usize)
        };
        let found = grams.rows(&[10, 11, 2, 12, 13, 20], &[5, 1]);
        // Of each token, and the two before it as far as they count: what ends a text counts for what comes behind it as what was before all.
        let seen = [[10, 2, 2], [11, 10, 2], [2, 11, 10], [12, 2, 2], [13, 12, 2], [20, 2, 2]];
        assert_eq!(found, seen.map(of).concat());
    }
}
