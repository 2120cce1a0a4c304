//! Models whose tokens see those after them as well: those that make embeddings of texts.

use super::{Attention, Graph, Keys, Layer, Step};

impl Graph {
    /// Has every token see what comes after it as well, as transformers does where `is_causal` is false: a window is then of so many tokens on
    /// each side. Returns whether that can be, which it cannot where a layer has a state, or sees a choice of tokens, one block of positions or
    /// the keys of another layer; the graph is then as it was.
    pub fn see_both_ways(&mut self) -> bool {
        let can = |step: &Step| match &step.layer {
            Layer::Attention(a) => a.choice.is_none() && a.shape.chunk.is_none() && a.keys == Keys::Own,
            Layer::Mlp(_) | Layer::Moe(_) => true,
            _ => false,
        };
        if !self.blocks.iter().flat_map(|block| &block.steps).all(can) {
            return false;
        }
        for step in self.blocks.iter_mut().flat_map(|block| &mut block.steps) {
            if let Layer::Attention(Attention { shape, .. }) = &mut step.layer {
                // A window counts the token itself, and transformers' does not where it reaches to both sides.
                shape.window = shape.window.map(|window| window + 1);
                shape.both_ways = true;
            }
        }
        true
    }

    /// Whether some token sees what comes after it.
    pub fn sees_both_ways(&self) -> bool {
        let steps = self.blocks.iter().flat_map(|block| &block.steps);
        steps.into_iter().any(|step| matches!(&step.layer, Layer::Attention(a) if a.shape.both_ways))
    }
}
