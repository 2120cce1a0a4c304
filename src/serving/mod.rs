//! What serving an output takes: memory beside its weights, and what the program that loads it asks of its linears.
//!
//! Nothing here reads weights or runs a model: it is said of the graph and of how every linear is held.

mod cache;
mod rules;
mod split;

use std::collections::HashMap;

use formats::Encoding;

use crate::error::{Error, Result};
use crate::graph::{Graph, Layer, Linear, Projections};

pub use cache::{CARDS, CacheType, Fit, cache_bytes, fits};
pub use rules::{Finding, Gpu, lint};
pub use split::{Splits, splits};

/// A program that serves models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// llama.cpp, and what is built on it: Ollama, LM Studio.
    LlamaCpp,
    /// Hugging Face transformers.
    Transformers,
    /// mlx-lm.
    Mlx,
}

impl Runtime {
    /// Every runtime, with the name users type.
    pub const ALL: &[(&str, Runtime)] = &[
        ("vllm", Runtime::Vllm),
        ("sglang", Runtime::Sglang),
        ("llama.cpp", Runtime::LlamaCpp),
        ("transformers", Runtime::Transformers),
        ("mlx", Runtime::Mlx),
    ];

    /// By the name users type. Fails for another one, with all there are.
    pub fn parse(name: &str) -> Result<Runtime> {
        let known = |text: &str| text.to_ascii_lowercase().replace(['_', '-'], ".");
        let asked = match &*known(name) {
            "ollama" | "llamacpp" | "lm.studio" => "llama.cpp".to_owned(),
            "mlx.lm" => "mlx".to_owned(),
            "hf" | "huggingface" => "transformers".to_owned(),
            other => other.to_owned(),
        };
        let found = Self::ALL.iter().find(|(one, _)| known(one) == asked);
        found.map(|(_, runtime)| *runtime).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(name, _)| *name).collect();
            Error::usage(format!("--for `{name}` is not known: there are {}", names.join(", ")))
        })
    }

    /// As it writes itself.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Vllm => "vLLM",
            Runtime::Sglang => "SGLang",
            Runtime::LlamaCpp => "llama.cpp",
            Runtime::Transformers => "transformers",
            Runtime::Mlx => "mlx-lm",
        }
    }
}

/// How an output holds the linears of a model.
pub struct Held<'a> {
    /// The model.
    pub graph: &'a Graph,
    /// The layout, as users type it.
    pub format: &'a str,
    /// Whether groups follow the order in which columns were quantized, which GPTQ's `g_idx` says.
    pub desc_act: bool,
    /// Of each linear, by module, the encodings of its parts; one that stays as it is is not in it.
    pub encodings: HashMap<&'a str, Vec<Encoding>>,
}

impl Held<'_> {
    /// The encodings of a linear's parts; none where it stays as it is.
    pub fn of(&self, linear: &Linear) -> &[Encoding] {
        self.encodings.get(&*linear.module).map_or(&[], |found| found)
    }
}

/// Linears that vLLM and SGLang load as one matrix, which has one scheme: q, k and v, with the gate of linear attention whose heads
/// decay as a whole; a gate and what it gates; the first linears of latent attention; and all experts of a layer.
pub fn fused(graph: &Graph) -> Vec<Vec<&Linear>> {
    let mut all = Vec::new();
    for step in graph.blocks.iter().flat_map(|block| &block.steps) {
        match &step.layer {
            Layer::Attention(attention) => match &attention.projections {
                // A gate of its own stays by itself.
                Projections::Direct(linears) if attention.gated && linears.len() == 4 => {
                    all.push(vec![&linears[0], &linears[2], &linears[3]]);
                }
                Projections::Direct(linears) => all.push(linears.iter().collect()),
                // With one linear to the queries, nothing is fused.
                Projections::Latent(latent) if latent.q.len() > 1 => {
                    all.push(latent.q[..1].iter().chain(&latent.kv_a).collect());
                }
                Projections::Latent(_) => {}
                Projections::Joint(joint) => all.push(vec![&joint.q[0], &joint.kv]),
            },
            // A gate has a matrix of its own where each channel decays by itself.
            Layer::Delta(delta) if delta.shape.by_channel => all.push(delta.inputs.iter().take(3).collect()),
            Layer::Delta(delta) => all.push(delta.inputs.iter().collect()),
            Layer::Mlp(mlp) => all.push(mlp.inputs.iter().collect()),
            Layer::Moe(moe) => {
                all.push(moe.experts.iter().flat_map(|expert| &expert.inputs).collect());
                all.push(moe.experts.iter().map(|expert| &expert.down).collect());
                all.extend(moe.shared.iter().map(|(shared, _)| shared.inputs.iter().collect()));
            }
            // One linear, however many parts it has.
            Layer::Mamba(_) | Layer::Short(_) | Layer::Further(_) | Layer::PerLayer(_) => {}
            Layer::Grams(_) | Layer::Opaque(_) => {}
        }
    }
    all.retain(|group: &Vec<&Linear>| group.len() > 1);
    all
}

/// The first group of [`fused`] linears that are not all held alike, and how many such groups there are.
pub fn unequal(graph: &Graph, of: impl Fn(&Linear) -> Vec<Encoding>) -> Option<(Vec<&Linear>, usize)> {
    let differs = |group: &Vec<&Linear>| group.windows(2).any(|pair| of(pair[0]) != of(pair[1]));
    let mut groups = fused(graph).into_iter().filter(differs);
    let first = groups.next()?;
    Some((first, 1 + groups.count()))
}
