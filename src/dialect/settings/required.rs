//! Keys without which llama.cpp refuses a file of an architecture. Taking a usual value for one would be a guess.

use formats::Result;

use super::Settings;

/// Keys by architecture, beside those that all have: by the loaders of llama.cpp de3ff81.
const REQUIRED: &[(&str, &[&str])] = &[
    ("qwen2vl", &["rope.dimension_sections"]),
    ("qwen3vl", &["rope.dimension_sections"]),
    ("qwen3vlmoe", &["rope.dimension_sections"]),
    ("qwen3next", STATE),
    ("qwen35", STATE_AND_SECTIONS),
    ("qwen35moe", STATE_AND_SECTIONS),
    ("granite", &["logit_scale"]),
    ("granitehybrid", STATE),
    ("nemotron_h", STATE),
    ("nemotron_h_moe", STATE),
    ("falcon-h1", STATE),
    ("afmoe", &["expert_feed_forward_length", "expert_shared_count"]),
    ("lfm2", &["shortconv.l_cache"]),
    ("lfm2moe", &["shortconv.l_cache", "expert_feed_forward_length", "expert_gating_func"]),
    ("granitemoe", &["logit_scale"]),
    ("gptneox", &["use_parallel_residual"]),
    ("cohere2", &["attention.sliding_window", "logit_scale"]),
    ("exaone-moe", &["attention.sliding_window", "expert_feed_forward_length"]),
    ("hy_v3", &["expert_feed_forward_length"]),
    ("dots1", &["expert_feed_forward_length", "expert_shared_count"]),
    ("ernie4_5-moe", &["expert_feed_forward_length", "interleave_moe_layer_step"]),
    ("minimax-m2", &["expert_feed_forward_length"]),
    ("hunyuan-moe", &["expert_feed_forward_length"]),
    (
        "cohere2moe",
        &["attention.sliding_window", "logit_scale", "leading_dense_block_count", "expert_feed_forward_length"],
    ),
    (
        "mistral4",
        &["attention.kv_lora_rank", "attention.key_length", "expert_feed_forward_length", "expert_shared_count"],
    ),
    ("glm4moe", &["expert_feed_forward_length", "expert_shared_count"]),
    (
        "deepseek2",
        &["attention.kv_lora_rank", "attention.key_length", "expert_feed_forward_length", "expert_shared_count"],
    ),
    ("step35", &["attention.sliding_window", "attention.sliding_window_pattern", "expert_feed_forward_length"]),
    ("gemma3n", &["attention.sliding_window"]),
    ("gemma-embedding", &["attention.sliding_window"]),
    (
        "gemma4",
        &[
            "attention.sliding_window_pattern",
            "attention.sliding_window",
            "attention.key_length_swa",
            "attention.value_length_swa",
            "rope.freq_base_swa",
            "embedding_length_per_layer_input",
        ],
    ),
    ("deepseek32", CHOOSING),
    ("glm-dsa", CHOOSING),
    ("hy_v4", STREAMS),
    (
        "minimax-m3",
        &[
            "expert_feed_forward_length",
            "expert_shared_count",
            "expert_gating_func",
            "attention.indexer.head_count",
            "attention.indexer.key_length",
            "attention.indexer.top_k",
            "attention.indexer.block_size",
            "attention.indexer.local_blocks",
        ],
    ),
    (
        "qwen4exp",
        &[
            "ssm.conv_kernel",
            "ssm.inner_size",
            "ssm.state_size",
            "ssm.time_step_rank",
            "ssm.group_count",
            "rope.dimension_sections",
            "hyper_connection.count",
            "hyper_connection.low_rank",
            "attention.indexer.head_count",
            "attention.indexer.key_length",
            "attention.indexer.top_k",
        ],
    ),
    (
        "glm5-next",
        &[
            "attention.q_lora_rank",
            "attention.kv_lora_rank",
            "attention.key_length_mla",
            "attention.value_length_mla",
            "attention.indexer.head_count",
            "attention.indexer.key_length",
            "attention.indexer.top_k",
            "attention.indexer.kpool",
            "ssm.conv_kernel",
            "kda.head_dim",
            "expert_feed_forward_length",
            "expert_shared_count",
            "hyper_connection.count",
            "hyper_connection.sinkhorn_iterations",
            "hyper_connection.epsilon",
        ],
    ),
    ("deepseek4", COMPRESSED),
    ("mimo2", &["attention.sliding_window", "attention.sliding_window_pattern", "expert_feed_forward_length"]),
    (
        "bailingmoe3",
        &[
            "attention.kv_lora_rank",
            "attention.key_length_mla",
            "attention.value_length_mla",
            "ssm.conv_kernel",
            "kda.head_dim",
            "kda.gate_lower_bound",
            "expert_feed_forward_length",
            "expert_shared_count",
            "leading_dense_block_count",
            "expert_gating_func",
        ],
    ),
    (
        "kimi-linear",
        &[
            "attention.kv_lora_rank",
            "attention.key_length_mla",
            "attention.value_length_mla",
            "ssm.conv_kernel",
            "kda.head_dim",
            "expert_feed_forward_length",
            "expert_shared_count",
            "expert_gating_func",
        ],
    ),
    ("gpt-oss", &["expert_feed_forward_length", "attention.sliding_window"]),
    ("llama4", &["expert_feed_forward_length", "interleave_moe_layer_step"]),
];

/// Sizes of latent attention to what an indexer chooses, and of experts.
const CHOOSING: &[&str] = &[
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
    "attention.key_length",
    "attention.indexer.head_count",
    "attention.indexer.key_length",
    "attention.indexer.top_k",
    "expert_feed_forward_length",
    "expert_shared_count",
];

/// The same, and how streams are read and written.
const STREAMS: &[&str] = &[
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.indexer.head_count",
    "attention.indexer.key_length",
    "attention.indexer.top_k",
    "expert_feed_forward_length",
    "expert_shared_count",
    "hyper_connection.count",
    "hyper_connection.epsilon",
    "hyper_connection.magnitude",
];

/// Sizes of attention to a window and to entries, and how streams are mixed.
const COMPRESSED: &[&str] = &[
    "attention.q_lora_rank",
    "attention.sliding_window",
    "attention.indexer.head_count",
    "attention.indexer.key_length",
    "attention.indexer.top_k",
    "attention.output_group_count",
    "attention.output_lora_rank",
    "attention.compress_rope_freq_base",
    "attention.compress_ratios",
    "hyper_connection.count",
    "hyper_connection.sinkhorn_iterations",
    "hyper_connection.epsilon",
    "hash_layer_count",
    "expert_feed_forward_length",
    "expert_shared_count",
    "expert_weights_scale",
    "expert_weights_norm",
    "expert_gating_func",
    "swiglu_clamp_exp",
];

/// Sizes of layers with a state.
const STATE: &[&str] =
    &["ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count"];

/// The same, and what kinds of positions there are.
const STATE_AND_SECTIONS: &[&str] = &[
    "ssm.conv_kernel",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
    "ssm.group_count",
    "rope.dimension_sections",
];

/// Architectures whose norms take the mean away, or that ask for the epsilon of such; the others' has another key.
const LAYER_NORMS: &[&str] = &[
    "phi2",
    "olmo",
    "starcoder2",
    "gptneox",
    "gpt2",
    "command-r",
    "cohere2",
    "stablelm",
    "nemotron",
    "nemotron_h",
    "nemotron_h_moe",
];

/// The key of the epsilon of norms that leave the mean.
pub(super) const RMS: &str = "attention.layer_norm_rms_epsilon";

/// The key of the norms' epsilon.
pub(super) fn epsilon(settings: &Settings) -> &'static str {
    let id = settings.architecture.id;
    // Its norms leave the mean where the file has the epsilon of such.
    let mean = id == "cohere2moe" && !settings.keys.contains_key(&settings.key(RMS));
    match mean || LAYER_NORMS.contains(&id) {
        true => "attention.layer_norm_epsilon",
        false => RMS,
    }
}

/// Fails for the first key that the architecture needs and the file does not have.
pub(super) fn check(settings: &Settings) -> Result<()> {
    let id = settings.architecture.id;
    let own = REQUIRED.iter().filter(|(architecture, _)| *architecture == id).flat_map(|(_, keys)| *keys).copied();
    let grouped = settings.count("expert_group_count")?.is_some_and(|groups| groups > 1);
    let groups = grouped.then_some("expert_group_used_count");
    let vocabulary = settings.tensors.get("token_embd.weight").and_then(|shape| shape.first());
    let direct = match settings.layers()? {
        Some(26 | 27) => true,
        Some(48) => vocabulary == Some(&128256),
        _ => false,
    };
    let latent = (matches!(id, "deepseek2" | "mistral4") && !direct).then_some("attention.q_lora_rank");
    for name in own.chain([epsilon(settings)]).chain(groups).chain(latent) {
        let key = format!("{id}.{name}");
        if !settings.keys.contains_key(&key) {
            return Err(formats::Error::missing(format!("metadata key `{key}`")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use formats::container::gguf::MetadataValue;

    use super::*;
    use crate::dialect::architectures::{ARCHITECTURES, Architecture};

    fn settings(id: &str, keys: &[&str]) -> Settings {
        let one = |key: &&str| (format!("{id}.{key}"), MetadataValue::U32(2));
        Settings {
            architecture: Architecture::named(id).unwrap(),
            keys: keys.iter().map(one).collect(),
            tensors: HashMap::new(),
            factors: HashMap::new(),
            asked: Default::default(),
        }
    }

    fn missing(id: &str, keys: &[&str]) -> Option<String> {
        check(&settings(id, keys)).err().map(|error| error.to_string())
    }

    #[test]
    fn each_key_that_llama_cpp_asks_for_is_asked_for() {
        for architecture in ARCHITECTURES {
            let own = REQUIRED.iter().filter(|(id, _)| *id == architecture.id).flat_map(|(_, keys)| *keys).copied();
            let mut all: Vec<&str> = own.chain([epsilon(&settings(architecture.id, &[]))]).collect();
            let latent = matches!(architecture.id, "deepseek2" | "mistral4");
            all.extend(latent.then_some("attention.q_lora_rank"));
            assert_eq!(missing(architecture.id, &all), None, "{}", architecture.id);
            for left in &all {
                let others: Vec<&str> = all.iter().copied().filter(|key| key != left).collect();
                let told = missing(architecture.id, &others).unwrap();
                assert!(told.contains(&format!("`{}.{left}` is missing", architecture.id)), "{told}");
            }
        }
        assert!(REQUIRED.iter().all(|(id, _)| Architecture::named(id).is_some()));
        let lite = ["attention.kv_lora_rank", "attention.key_length", "expert_feed_forward_length"];
        let lite = [&lite[..], &["expert_shared_count", RMS]].concat();
        assert!(missing("deepseek2", &lite).unwrap().contains("q_lora_rank"));
        assert!(missing("llama", &[RMS, "expert_group_count"]).unwrap().contains("expert_group_used_count"));
        let command = settings("cohere2moe", &[RMS]);
        assert_eq!([epsilon(&command), epsilon(&settings("cohere2moe", &[]))], [RMS, "attention.layer_norm_epsilon"]);
    }
}
