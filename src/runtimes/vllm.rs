//! What vLLM 0.32 leaves out of models, measured by `tests/runtimes/in_vllm.py`.

use std::collections::HashSet;

use crate::graph::{Attention, Block, FURTHER, Graph, Layer, Linear};

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

/// Families whose classes fail at the groups of columns that GPTQ stores beside a matrix (`g_idx`), and those that do so where they are a part of a
/// larger model.
const UNINDEXED: &[&str] = &["falcon_h1", "glm4", "glm4v", "stablelm"];
const UNINDEXED_PARTS: &[&str] = &["lfm2"];

/// Families whose classes of layers for further tokens do.
const UNINDEXED_FURTHER: &[&str] = &["ernie4_5_moe", "glm4_moe", "glm5_next", "hy_v3"];

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
    head.into_iter().chain(biases(graph)).chain(whole).chain(of_layout(graph, codec)).collect()
}

/// What vLLM does not load in this layout, and does in others.
fn of_layout(graph: &Graph, codec: &str) -> Option<String> {
    let part = || graph.aside.iter().any(|(prefix, what)| !prefix.is_empty() && !what.starts_with(FURTHER));
    let of = |families: &[&str]| families.contains(&graph.family);
    match codec {
        "gptq" if of(UNINDEXED) || of(UNINDEXED_PARTS) && part() => Some(
            "vLLM 0.32 fails at the tensors `g_idx` that every GPTQ file has, in its class of this family; AWQ and compressed-tensors load"
                .to_owned(),
        ),
        "gptq" if of(UNINDEXED_FURTHER) && !graph.predictors().is_empty() => Some(
            "vLLM 0.32 fails at the tensors `g_idx` of layers for further tokens of this family in GPTQ, where it is to draft with them; --mtp keep \
             writes them as they are"
                .to_owned(),
        ),
        "gptq" | "awq" if layers(graph).any(|layer| matches!(layer, Layer::Grams(_))) => Some(format!(
            "vLLM 0.32 refuses {} for models with tables of tokens in a row, as this one; compressed-tensors loads",
            codec.to_uppercase()
        )),
        _ => None,
    }
}

/// Linears of which vLLM reads no codes.
struct Whole {
    /// In which families; in all of them, where none is named.
    families: &'static [&'static str],
    /// In which layouts; in all but MLX's, where none is named.
    codecs: &'static [&'static str],
    /// Which of a model.
    of: fn(&Graph) -> Vec<&Linear>,
}

/// All of them; a model may have linears of several.
const WHOLE: &[Whole] = &[
    // Queries, keys and values are one matrix with what is written and what decays, where each channel decays by itself.
    Whole { families: &[], codecs: &[], of: of_channels },
    // All linears of attention, linear and other.
    Whole {
        families: &["glm5_next"],
        codecs: &[],
        of: |graph| mixing(graph).into_iter().flatten().flatten().collect(),
    },
    // Queries, keys and values are one matrix with those of an indexer, where layers have one. It looks for those of layers for further tokens under
    // the numbers of the model's own, so that all layers have to be alike.
    Whole { families: &["minimax_m3"], codecs: &[], of: beside_indexers },
    // What ends the attention of layers for further tokens.
    Whole {
        families: &["mimo_v2_flash"],
        codecs: &[],
        of: |graph| drafting(graph).map(|attention| &attention.o).collect(),
    },
    // All such layers are taken for plain where a part of one is left out, as the projection is.
    Whole { families: &["qwen3_5", "qwen3_5_moe"], codecs: &["gptq", "awq"], of: within_predictors },
    // It calls the layers with a state otherwise than the file does.
    Whole { families: &["granitemoehybrid"], codecs: &["gptq"], of: of_states },
];

/// Linears of which vLLM reads no codes in this layout, by module.
pub(crate) fn whole<'g>(graph: &'g Graph, codec: &str) -> HashSet<&'g str> {
    if codec == MLX {
        return HashSet::new();
    }
    let named = |names: &[&str], name: &str| names.is_empty() || names.contains(&name);
    let rules = WHOLE.iter().filter(|rule| named(rule.families, graph.family) && named(rule.codecs, codec));
    rules.flat_map(|rule| (rule.of)(graph)).map(|linear| &*linear.module).collect()
}

fn layers(graph: &Graph) -> impl Iterator<Item = &Layer> {
    graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer)
}

/// The linears of each layer that mixes tokens by attention or by the delta rule, those of one input together.
fn mixing(graph: &Graph) -> Vec<Vec<Vec<&Linear>>> {
    let attention = layers(graph).filter(|layer| matches!(layer, Layer::Attention(_) | Layer::Delta(_)));
    attention.map(Layer::linears).collect()
}

fn of_channels(graph: &Graph) -> Vec<&Linear> {
    let nets = layers(graph).filter_map(|layer| match layer {
        Layer::Delta(delta) if delta.shape.by_channel => delta.inputs.get(..3),
        _ => None,
    });
    nets.flatten().collect()
}

fn beside_indexers(graph: &Graph) -> Vec<&Linear> {
    let chooses = |attention: &Attention| attention.choice.is_some();
    match graph.blocks.iter().filter_map(Block::attention).any(chooses) {
        true => mixing(graph).into_iter().flat_map(|groups| groups.into_iter().take(1).flatten()).collect(),
        false => Vec::new(),
    }
}

/// Attention of layers for further tokens.
fn drafting(graph: &Graph) -> impl Iterator<Item = &Attention> {
    graph.predictors().iter().filter_map(Block::attention)
}

fn within_predictors(graph: &Graph) -> Vec<&Linear> {
    graph.predictors().iter().flat_map(Block::linears).filter(|linear| !graph.joins(linear)).collect()
}

fn of_states(graph: &Graph) -> Vec<&Linear> {
    let states = layers(graph).filter(|layer| matches!(layer, Layer::Mamba(_)));
    states.flat_map(|layer| layer.linears().into_iter().flatten()).collect()
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
