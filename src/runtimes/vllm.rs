//! What vLLM 0.32 leaves out of models, measured by `tests/runtimes/in_vllm.py`.

use std::collections::HashSet;

use crate::graph::{Block, FURTHER, Graph, Layer, Linear};

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
    let mut layers = graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer);
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
        "gptq" | "awq" if layers.any(|layer| matches!(layer, Layer::Grams(_))) => Some(format!(
            "vLLM 0.32 refuses {} for models with tables of tokens in a row, as this one; compressed-tensors loads",
            codec.to_uppercase()
        )),
        _ => None,
    }
}

/// Linears of which vLLM reads no codes, by module: queries, keys and values that are one matrix with what is written and what decays where
/// each channel decays by itself, and what ends the attention of MiMo's layers for further tokens; all linears of attention, linear and
/// other, of GLM 5 Next; and queries, keys and values of MiniMax M3, which are one matrix with those of an indexer, where layers have one. It
/// looks for those of M3's layers for further tokens under the numbers of the model's own, so that all layers are alike. In GPTQ and AWQ also Qwen 3.5's
/// layers for further tokens, since it takes all of them for plain where a part is left out, and in GPTQ the Mamba layers of Granite, which it calls otherwise
/// than the file.
pub(crate) fn whole<'g>(graph: &'g Graph, codec: &str) -> HashSet<&'g str> {
    if codec == MLX {
        return HashSet::new();
    }
    let layers = || graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer);
    let nets = layers().filter_map(|layer| match layer {
        Layer::Delta(delta) if delta.shape.by_channel => delta.inputs.get(..3),
        _ => None,
    });
    let attention = || layers().filter(|layer| matches!(layer, Layer::Attention(_) | Layer::Delta(_)));
    let mixing =
        attention().filter(|_| graph.family == "glm5_next").flat_map(|layer| layer.linears().into_iter().flatten());
    let indexed = graph.family == "minimax_m3"
        && graph.blocks.iter().filter_map(Block::attention).any(|one| one.choice.is_some());
    let beside = attention().filter(|_| indexed).flat_map(|layer| layer.linears().into_iter().take(1).flatten());
    let predictors = if graph.family == "mimo_v2_flash" { graph.predictors() } else { &[] };
    let ends = predictors.iter().filter_map(Block::attention).map(|attention| &attention.o);
    let plain = matches!(codec, "gptq" | "awq") && matches!(graph.family, "qwen3_5" | "qwen3_5_moe");
    let drafting =
        graph.predictors().iter().filter(|_| plain).flat_map(Block::linears).filter(|linear| !graph.joins(linear));
    let granite = codec == "gptq" && graph.family == "granitemoehybrid";
    let states = layers().filter(|layer| granite && matches!(layer, Layer::Mamba(_)));
    let states = states.flat_map(|layer| layer.linears().into_iter().flatten());
    let attending = nets.flatten().chain(ends).chain(mixing).chain(beside);
    attending.chain(drafting).chain(states).map(|linear| &*linear.module).collect()
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
