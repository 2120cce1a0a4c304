//! What vLLM 0.32 leaves out of models, measured by `tests/runtimes/in_vllm.py`.

use std::collections::HashSet;

use crate::graph::{Block, Graph, Layer, Linear};

/// The layout that vLLM never loads, so that nothing is left out of it for its sake.
const MLX: &str = "mlx";

/// Families whose classes have no place for some biases and skip them: what the names of these linears begin with inside a layer.
const UNBIASED: &[(&str, &[&str])] = &[
    ("afmoe", &["self_attn."]),
    ("cohere", &["self_attn."]),
    ("cohere2", &["self_attn."]),
    ("cohere2_moe", &["self_attn."]),
    ("deepseek_v2", &["mlp.", "self_attn."]),
    ("deepseek_v3", &["self_attn."]),
    ("ernie4_5", &["self_attn.", "mlp."]),
    ("ernie4_5_moe", &["self_attn.o_proj"]),
    ("falcon_h1", &["self_attn.", "feed_forward."]),
    ("granitemoe", &["self_attn."]),
    ("granitemoeshared", &["self_attn."]),
    ("qwen3", &["self_attn.o_proj"]),
    ("qwen3_moe", &["self_attn.o_proj"]),
    ("nemotron_h", &["mixer.q_", "mixer.k_", "mixer.v_", "mixer.o_", "mixer.shared_experts."]),
];

/// Families whose classes compute logits with the embedding, whatever the file has.
const TIED: &[&str] = &["cohere", "cohere2", "cohere2_moe", "lfm2", "lfm2_moe"];

/// What vLLM does not load of `graph`, whether or not it is quantized, and what stays whole for it.
pub(super) fn notes(graph: &Graph, codec: &str) -> Vec<String> {
    if codec == MLX {
        return Vec::new();
    }
    let head = TIED.contains(&graph.family) && !graph.head.tied;
    let head = head.then(|| {
        let head = &graph.head.linear.module;
        format!("vLLM leaves out `{head}` of this family, without a word, and computes logits with the embedding; transformers does not")
    });
    let whole = whole(graph, codec);
    let count = whole.len();
    let whole = whole.into_iter().min().map(|first| {
        format!("linears as `{first}` stay as they are ({count} in all), because vLLM loads them without codes")
    });
    head.into_iter().chain(biases(graph)).chain(whole).collect()
}

/// Linears of which vLLM reads no codes, by module: queries, keys and values that are one matrix with what is written and what decays where
/// each channel decays by itself, and what ends the attention of MiMo's layers for further tokens.
pub(crate) fn whole<'g>(graph: &'g Graph, codec: &str) -> HashSet<&'g str> {
    if codec == MLX {
        return HashSet::new();
    }
    let layers = graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer);
    let nets = layers.filter_map(|layer| match layer {
        Layer::Delta(delta) if delta.shape.by_channel => delta.inputs.get(..3),
        _ => None,
    });
    let predictors = if graph.family == "mimo_v2_flash" { graph.predictors() } else { &[] };
    let ends = predictors.iter().filter_map(Block::attention).map(|attention| &attention.o);
    nets.flatten().chain(ends).map(|linear| &*linear.module).collect()
}

/// What vLLM calls matrices that it makes of several which stay as they are, where its class does not say of which.
pub(crate) fn called(graph: &Graph, codec: &str) -> Vec<String> {
    if graph.family != "glm5_next" {
        return Vec::new();
    }
    let queries = whole(graph, codec).into_iter().filter_map(|module| module.strip_suffix("q_proj"));
    let mut all: Vec<String> = queries.map(|at| format!("{at}in_proj_qkvbfg_a")).collect();
    all.sort_unstable();
    all
}

fn biases(graph: &Graph) -> Option<String> {
    let (_, parts) = UNBIASED.iter().find(|(family, _)| *family == graph.family)?;
    let lost = |linear: &&Linear| {
        let inside = linear.module.split_once(".layers.").and_then(|(_, rest)| rest.split_once('.'));
        linear.bias && inside.is_some_and(|(_, name)| parts.iter().any(|part| name.starts_with(part)))
    };
    let all: Vec<&Linear> = graph.linears().filter(lost).collect();
    let first = &all.first()?.module;
    Some(format!(
        "vLLM leaves out biases of this family, without a word (`{first}.bias`, {} in all); transformers computes with them",
        all.len()
    ))
}
