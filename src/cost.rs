//! What quantizing and measuring take, counted in multiplications: the time that is left is told by it, and which of the two takes longer.

use std::collections::HashMap;

use calibration::statistics::Needs;

use crate::graph::{Block, Graph, Joining, Layer, Linear};
use crate::recipe::Recipe;

/// What searching scales and codes of a weight takes.
const SEARCH: u64 = 64;

/// What is done for each column of a Hessian and each weight of its row: a sweep, and twice as much where codes are moved after it.
const SWEEP: u64 = 3;

/// What a target does with what is seen of `tokens` calibration tokens.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Tokens that go through the model.
    pub tokens: u64,
    /// What is gathered of inputs.
    pub needs: Needs,
    /// Whether columns are swept.
    pub sweeps: bool,
    /// Whether each block is run once more to search channel scales.
    pub smooths: bool,
}

impl Cost {
    /// That of a recipe which needs this of its inputs.
    pub fn of(recipe: &Recipe, needs: Needs, tokens: usize) -> Cost {
        let tokens = if needs > Needs::Nothing { tokens as u64 } else { 0 };
        Cost { tokens, needs, sweeps: recipe.method.sweeps(), smooths: recipe.method.smooths() }
    }

    /// That of a target beside which the same tokens go through the model anyway.
    pub fn beside(self) -> Cost {
        Cost { tokens: 0, ..self }
    }

    /// Of every linear, by module: running it, looking at its input with the first that reads it, and solving it.
    pub fn of_linears(&self, graph: &Graph) -> HashMap<String, u64> {
        let mut costs = HashMap::new();
        for layer in graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer) {
            for group in layer.linears() {
                for (index, linear) in group.iter().enumerate() {
                    let tokens = tokens_of(layer, linear, self.tokens);
                    let (rows, cols) = (linear.rows as u64, linear.cols as u64);
                    let run = tokens * rows * cols * if self.smooths { 3 } else { 1 };
                    let hessian = if self.needs >= Needs::Hessian { tokens * cols * cols / 2 } else { 0 };
                    let factor = if self.sweeps { cols * cols * cols } else { 0 };
                    let solve = rows * cols * (SEARCH + if self.sweeps { SWEEP * cols } else { 0 });
                    let input = if index == 0 { hessian + factor } else { 0 };
                    costs.insert(linear.module.clone(), run + input + solve);
                }
            }
        }
        costs
    }

    /// Of the whole model.
    pub fn total(&self, graph: &Graph) -> u64 {
        self.of_linears(graph).values().sum()
    }
}

/// How many of so many tokens come to a linear, as far as its layer tells: of a mixture those that its router sends there, and all of them once
/// more for each stream that it reads.
fn tokens_of(layer: &Layer, linear: &Linear, tokens: u64) -> u64 {
    if let Layer::Further(further) = layer
        && let Joining::Apart { state, streams, .. } = &further.joining
        && state.module == linear.module
    {
        return tokens * *streams as u64;
    }
    let Layer::Moe(moe) = layer else { return tokens };
    let shared = moe.shared.iter().flat_map(|(shared, _)| shared.inputs.iter().chain([&shared.down]));
    let latent = moe.latent.iter().flat_map(|latent| latent.iter());
    match shared.chain(latent).any(|other| other.module == linear.module) {
        true => tokens,
        false => tokens * moe.router.top_k as u64 / moe.experts.len().max(1) as u64,
    }
}

/// What running a block on so many tokens takes.
pub fn of_block(block: &Block, tokens: u64) -> u64 {
    let layers = block.steps.iter().map(|step| &step.layer);
    let of = |layer: &Layer| -> u64 {
        let linears = layer.linears().into_iter().flatten();
        linears.map(|linear| tokens_of(layer, linear, tokens) * (linear.rows * linear.cols) as u64).sum()
    };
    layers.map(of).sum()
}

/// What measuring a model on so many tokens takes.
pub fn of_measuring(graph: &Graph, tokens: u64) -> u64 {
    let blocks: u64 = graph.blocks.iter().map(|block| of_block(block, tokens)).sum();
    blocks + of_head(graph, tokens) * (1 + graph.predictors().len() as u64)
}

/// What the output projection of so many tokens takes.
pub fn of_head(graph: &Graph, tokens: u64) -> u64 {
    tokens * (graph.vocabulary * graph.hidden) as u64
}

/// Multiplications that measuring takes before it is worth a word: some seconds of a CPU.
const LONG: u64 = 500_000_000_000;

/// What to say where measuring so many windows takes longer than quantizing; both in multiplications.
pub fn longer(quantizing: u64, measuring: u64, windows: usize) -> Option<String> {
    let fewer = if windows > 2 {
        let share = (windows as f64 / 2.0).round();
        format!("--verify-windows 2 takes a {share:.0}th of that, and ")
    } else {
        String::new()
    };
    (measuring > quantizing.max(LONG))
        .then(|| format!("measuring will take longer than quantizing: {fewer}--verify-text none leaves it out"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measuring_is_told_where_it_takes_longer_and_some_time() {
        assert_eq!(longer(1, LONG, 8), None);
        assert_eq!(longer(3 * LONG, 2 * LONG, 8), None);
        let told = longer(LONG, 4 * LONG, 8).unwrap();
        assert!(told.starts_with("measuring will take longer than quantizing: --verify-windows 2 "), "{told}");
        assert!(told.contains("a 4th of that") && told.ends_with("--verify-text none leaves it out"), "{told}");
        assert!(!longer(LONG, 4 * LONG, 2).unwrap().contains("--verify-windows"));
    }
}
