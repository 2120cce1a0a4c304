//! The architectures that GGUF files name: which families are written as each, and what it asks of tensors.
//!
//! One entry of [`ARCHITECTURES`] an architecture. How a graph's tensors are named and laid out in it is in
//! [`crate::dialect::names`], which reading goes backwards.

use std::cmp::Ordering;

use crate::graph::{Graph, Layer};
use crate::mixes::block_number;

/// Factors that each rotary frequency is divided by; part of config.json in Hugging Face's terms.
pub(crate) const ROPE_FREQS: &str = "rope_freqs.weight";

/// The factor of a rotary frequency that is to stand still.
pub(crate) const STANDING: f32 = 1e30;

/// LongRoPE's factors beyond the first context.
pub(crate) const ROPE_LONG: &str = "rope_factors_long.weight";

/// LongRoPE's factors within it.
pub(crate) const ROPE_SHORT: &str = "rope_factors_short.weight";

/// Whether loaders ask for a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// They refuse a file that has it.
    Never,
    /// They take it where it is.
    May,
    /// They refuse a file without it.
    Must,
}

/// What a GGUF architecture asks for, as llama.cpp's loader has it.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// `general.architecture`.
    pub id: &'static str,
    /// The families written as it, by [`crate::families::Family::id`].
    pub families: &'static [&'static str],
    /// Whether neighbours are rotated together: rows of heads whose halves are rotated together are interleaved.
    pub neighbours: bool,
    /// Whether all heads together must be as wide as the residual stream.
    pub square: bool,
    /// An output projection beside the embedding.
    pub head: Need,
    /// Its bias.
    pub head_bias: Need,
    /// Biases of queries, keys and values.
    pub qkv_bias: Need,
    /// Of attention's output.
    pub o_bias: Need,
    /// Of feed-forward layers that are no experts.
    pub mlp_bias: Need,
    /// Of routers and experts.
    pub moe_bias: Need,
    /// What a mixture's correction of its scores is called.
    pub correction: &'static str,
    /// The norm before feed-forward layers.
    pub ffn_norm: &'static str,
    /// Whether tensors of rotary factors are read.
    pub factors: bool,
    /// Whether layers may see a window only; elsewhere windows are ignored.
    pub windows: bool,
    /// Whether attention is always through latents, of whose norms and scaled positions there is one form.
    pub latent: bool,
    /// The name of that norm's weight says no more.
    pub bare_ffn_norm: bool,
    /// What the last norm is called.
    pub final_norm: &'static str,
    /// A gate and what it gates are two tensors, though the model stores them as one.
    pub gate_apart: bool,
    /// Experts have no gate, and may work in a space of their own.
    pub ungated_experts: bool,
    /// Tensors are multiplied by the model's factors, for which there are no settings.
    pub absorbs: bool,
    /// Whether heads of values take turns in linear attention, one for each head of keys, in place of those of one head of keys first.
    pub tiled: bool,
    /// What config.json calls the number of layers that predict further tokens, where loaders know such.
    pub further: Option<&'static str>,
    /// Whether the stream may be several hidden states wide. Attention through a latent may have a gate then, and indexers turn as attention does.
    pub streams: bool,
    /// Whether layers may be given rows of a table, read the keys and values of others, or be multiplied by a number.
    pub per_layer: bool,
    /// Whether blocks work on one of several streams, are given rows of a table, and the last ones read the keys and values of others.
    pub altup: bool,
}

const PLAIN: Architecture = Architecture {
    id: "",
    families: &[],
    neighbours: false,
    square: false,
    head: Need::May,
    head_bias: Need::Never,
    qkv_bias: Need::May,
    o_bias: Need::Never,
    mlp_bias: Need::Never,
    moe_bias: Need::Never,
    ffn_norm: "ffn_norm",
    bare_ffn_norm: false,
    final_norm: "output_norm",
    gate_apart: false,
    ungated_experts: false,
    absorbs: false,
    factors: false,
    windows: false,
    latent: false,
    tiled: false,
    further: None,
    streams: false,
    per_layer: false,
    altup: false,
    correction: "exp_probs_b.bias",
};

const LLAMA: Architecture = Architecture {
    id: "llama",
    families: &["llama", "mistral", "ministral", "internlm3", "mixtral"],
    neighbours: true,
    o_bias: Need::May,
    mlp_bias: Need::May,
    factors: true,
    ..PLAIN
};

const QWEN35: Architecture = Architecture {
    id: "qwen35",
    families: &["qwen3_5"],
    ffn_norm: "post_attention_norm",
    tiled: true,
    further: Some("mtp_num_hidden_layers"),
    ..PLAIN
};

/// What most configurations call the number of layers that predict further tokens.
const FURTHER: &str = "num_nextn_predict_layers";

/// Every architecture that can be read and written.
pub(crate) const ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    Architecture { id: "qwen2", families: &["qwen2"], square: true, ..PLAIN },
    Architecture { id: "qwen2vl", families: &["qwen2_vl"], square: true, ..PLAIN },
    Architecture { id: "qwen3", families: &["qwen3"], ..PLAIN },
    Architecture { id: "qwen3vl", families: &["qwen3_vl"], ..PLAIN },
    Architecture { id: "gemma", families: &["gemma"], head: Need::Never, ..PLAIN },
    Architecture { id: "gemma2", families: &["gemma2"], head: Need::Never, windows: true, ..PLAIN },
    Architecture { id: "gemma3", families: &["gemma3"], windows: true, ..PLAIN },
    // Of Gemma 3, where tokens see what comes after them, too.
    Architecture { id: "gemma-embedding", families: &[], windows: true, ..PLAIN },
    Architecture { id: "gemma3n", families: &["gemma3n"], qkv_bias: Need::Never, windows: true, altup: true, ..PLAIN },
    Architecture {
        id: "gemma4",
        families: &["gemma4"],
        qkv_bias: Need::Never,
        factors: true,
        windows: true,
        per_layer: true,
        ..PLAIN
    },
    Architecture {
        id: "phi2",
        families: &["phi"],
        square: true,
        head: Need::Must,
        head_bias: Need::Must,
        o_bias: Need::Must,
        mlp_bias: Need::Must,
        ..PLAIN
    },
    Architecture { id: "phi3", families: &["phi3"], square: true, factors: true, ..PLAIN },
    Architecture { id: "olmo", families: &["olmo"], neighbours: true, square: true, ..PLAIN },
    Architecture { id: "olmo2", families: &["olmo2", "olmo3"], square: true, head: Need::Must, windows: true, ..PLAIN },
    Architecture { id: "granite", families: &["granite"], gate_apart: true, ..LLAMA },
    Architecture { id: "granitemoe", families: &["granitemoe", "granitemoeshared"], gate_apart: true, ..LLAMA },
    Architecture { id: "granitehybrid", families: &["granitemoehybrid", "bamba"], gate_apart: true, ..LLAMA },
    Architecture {
        id: "nemotron_h",
        families: &["nemotron_h"],
        further: Some(FURTHER),
        mlp_bias: Need::May,
        ffn_norm: "attn_norm",
        qkv_bias: Need::Never,
        ..PLAIN
    },
    // Of those with experts.
    Architecture {
        id: "nemotron_h_moe",
        ffn_norm: "attn_norm",
        qkv_bias: Need::Never,
        ungated_experts: true,
        further: Some(FURTHER),
        ..PLAIN
    },
    Architecture {
        id: "falcon-h1",
        families: &["falcon_h1"],
        qkv_bias: Need::Never,
        mlp_bias: Need::May,
        bare_ffn_norm: true,
        absorbs: true,
        ..PLAIN
    },
    Architecture {
        id: "starcoder2",
        families: &["starcoder2"],
        square: true,
        qkv_bias: Need::Must,
        o_bias: Need::Must,
        mlp_bias: Need::Must,
        ..PLAIN
    },
    Architecture {
        id: "gptneox",
        families: &["gpt_neox"],
        square: true,
        head: Need::Must,
        qkv_bias: Need::Must,
        o_bias: Need::Must,
        mlp_bias: Need::Must,
        ..PLAIN
    },
    Architecture {
        id: "gpt2",
        families: &["gpt2"],
        square: true,
        qkv_bias: Need::Must,
        o_bias: Need::Must,
        mlp_bias: Need::Must,
        ..PLAIN
    },
    Architecture { id: "apertus", families: &["apertus"], head: Need::Must, o_bias: Need::May, factors: true, ..PLAIN },
    Architecture { id: "arcee", families: &["arcee"], neighbours: true, factors: true, ..PLAIN },
    Architecture { id: "seed_oss", families: &["seed_oss"], ffn_norm: "post_attention_norm", ..PLAIN },
    Architecture { id: "ernie4_5", families: &["ernie4_5"], neighbours: true, ..PLAIN },
    Architecture { id: "mistral3", families: &["ministral3"], neighbours: true, ..PLAIN },
    Architecture {
        id: "glm4moe",
        families: &["glm4_moe", "glm4v_moe", "solar_open"],
        ffn_norm: "post_attention_norm",
        further: Some(FURTHER),
        ..PLAIN
    },
    Architecture { id: "dots1", families: &["dots1"], head: Need::Must, ..PLAIN },
    Architecture { id: "ernie4_5-moe", families: &["ernie4_5_moe"], neighbours: true, ..PLAIN },
    Architecture { id: "minimax-m3", families: &["minimax_m3"], head: Need::Must, ..PLAIN },
    Architecture {
        id: "qwen4exp",
        families: &["qwen4_exp"],
        tiled: true,
        streams: true,
        final_norm: "output_hc_norm",
        ..PLAIN
    },
    Architecture { id: "minimax-m2", families: &["minimax_m2"], head: Need::Must, ..PLAIN },
    Architecture { id: "hunyuan-dense", families: &["hunyuan_v1_dense"], ..PLAIN },
    Architecture { id: "hunyuan-moe", families: &["hunyuan_v1_moe"], factors: true, ..PLAIN },
    Architecture { id: "smollm3", families: &["smollm3"], neighbours: true, ..PLAIN },
    Architecture { id: "command-r", families: &["cohere"], neighbours: true, square: true, head: Need::Never, ..PLAIN },
    Architecture {
        id: "cohere2",
        families: &["cohere2"],
        neighbours: true,
        square: true,
        head: Need::Never,
        windows: true,
        ..PLAIN
    },
    Architecture { id: "cohere2moe", families: &["cohere2_moe"], neighbours: true, windows: true, ..PLAIN },
    Architecture { id: "chatglm", families: &["glm"], neighbours: true, square: true, ..PLAIN },
    Architecture { id: "glm4", families: &["glm4", "glm4v"], neighbours: true, ..PLAIN },
    Architecture { id: "stablelm", families: &["stablelm"], square: true, head: Need::Must, ..PLAIN },
    Architecture {
        id: "nemotron",
        families: &["nemotron"],
        square: true,
        head: Need::Must,
        o_bias: Need::May,
        mlp_bias: Need::May,
        ..PLAIN
    },
    Architecture { id: "exaone4", families: &["exaone4"], square: true, factors: true, windows: true, ..PLAIN },
    Architecture { id: "exaone-moe", families: &["exaone_moe"], windows: true, further: Some(FURTHER), ..PLAIN },
    Architecture { id: "hy_v3", families: &["hy_v3"], correction: "exp_probs_b", further: Some(FURTHER), ..PLAIN },
    Architecture { id: "qwen2moe", families: &["qwen2_moe"], square: true, head: Need::Must, ..PLAIN },
    Architecture { id: "qwen3moe", families: &["qwen3_moe"], ..PLAIN },
    Architecture { id: "qwen3vlmoe", families: &["qwen3_vl_moe"], ..PLAIN },
    Architecture { id: "olmoe", families: &["olmoe"], square: true, head: Need::Must, ..PLAIN },
    Architecture {
        id: "deepseek2",
        families: &["deepseek_v2", "deepseek_v3", "glm4_moe_lite"],
        neighbours: true,
        latent: true,
        further: Some(FURTHER),
        ..PLAIN
    },
    Architecture { id: "mistral4", families: &["mistral4"], neighbours: true, latent: true, ..PLAIN },
    Architecture {
        id: "deepseek32",
        families: &["deepseek_v32"],
        neighbours: true,
        latent: true,
        further: Some(FURTHER),
        ..PLAIN
    },
    Architecture {
        id: "step35",
        families: &["step3p5"],
        further: Some(FURTHER),
        head: Need::Must,
        qkv_bias: Need::Never,
        factors: true,
        windows: true,
        ..PLAIN
    },
    Architecture {
        id: "mimo2",
        families: &["mimo_v2_flash"],
        head: Need::Must,
        windows: true,
        further: Some(FURTHER),
        ..PLAIN
    },
    Architecture { id: "kimi-linear", families: &["kimi_linear"], head: Need::Must, latent: true, ..PLAIN },
    Architecture {
        id: "glm5-next",
        families: &["glm5_next"],
        further: Some(FURTHER),
        head: Need::Must,
        latent: true,
        streams: true,
        ..PLAIN
    },
    Architecture {
        id: "hy_v4",
        families: &["hy_v4"],
        neighbours: true,
        head: Need::Must,
        latent: true,
        streams: true,
        ..PLAIN
    },
    Architecture {
        id: "deepseek4",
        families: &["deepseek_v4"],
        neighbours: true,
        head: Need::Must,
        windows: true,
        streams: true,
        ..PLAIN
    },
    Architecture {
        id: "bailingmoe3",
        families: &["bailing_hybrid"],
        neighbours: true,
        latent: true,
        further: Some(FURTHER),
        ..PLAIN
    },
    Architecture {
        id: "glm-dsa",
        families: &["glm_moe_dsa"],
        neighbours: true,
        latent: true,
        further: Some(FURTHER),
        ..PLAIN
    },
    Architecture {
        id: "gpt-oss",
        families: &["gpt_oss"],
        head: Need::Must,
        o_bias: Need::Must,
        moe_bias: Need::Must,
        ffn_norm: "post_attention_norm",
        windows: true,
        ..PLAIN
    },
    Architecture { id: "afmoe", families: &["afmoe"], qkv_bias: Need::Never, windows: true, ..PLAIN },
    Architecture { id: "lfm2", families: &["lfm2"], square: true, final_norm: "token_embd_norm", ..PLAIN },
    Architecture { id: "lfm2moe", families: &["lfm2_moe"], square: true, final_norm: "token_embd_norm", ..PLAIN },
    Architecture { id: "qwen3next", families: &["qwen3_next"], tiled: false, ..QWEN35 },
    QWEN35,
    Architecture { id: "qwen35moe", families: &["qwen3_5_moe"], ..QWEN35 },
    Architecture { id: "llama4", families: &["llama4"], neighbours: true, factors: true, windows: true, ..PLAIN },
];

impl Architecture {
    /// Whether loaders ask for a bias, by its name in the file.
    pub fn asks_for_bias(&self, name: &str) -> Need {
        match name.strip_suffix(".bias").and_then(|name| name.rsplit_once('.')).map(|(_, module)| module) {
            Some("attn_q" | "attn_k" | "attn_v" | "attn_qkv") => self.qkv_bias,
            Some("attn_output") => self.o_bias,
            Some("ffn_gate" | "ffn_up" | "ffn_down") => self.mlp_bias,
            _ => Need::Never,
        }
    }

    /// The architecture that a file calls `id`.
    pub fn named(id: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|architecture| architecture.id == id)
    }

    /// The architecture that a model is written as: that of its family, unless what it has besides decides.
    pub fn of(graph: &Graph) -> Option<&'static Architecture> {
        let recurrent = graph.blocks.iter().flat_map(|b| &b.steps).any(|step| matches!(step.layer, Layer::Mamba(_)));
        match (graph.family, recurrent, graph.has_experts()) {
            ("granitemoehybrid", false, true) => Architecture::named("granitemoe"),
            ("granitemoehybrid", false, false) => Architecture::named("granite"),
            ("gemma3", ..) if graph.sees_both_ways() => Architecture::named("gemma-embedding"),
            ("nemotron_h", _, true) => Architecture::named("nemotron_h_moe"),
            _ => Architecture::of_family(graph.family),
        }
    }

    /// Whether neighbours are rotated together in this model: not where positions are of several kinds, which llama.cpp rotates by halves alone.
    pub fn rotates_neighbours(&self, graph: &Graph) -> bool {
        self.neighbours && graph.family != "glm4v"
    }

    /// The architecture that most models of a family are written as.
    pub fn of_family(family: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|architecture| architecture.families.contains(&family))
    }
}

/// The order in which llama-quantize visits and writes tensors: those of no block first, then block by block, by name.
pub(crate) fn file_order(a: &str, b: &str) -> Ordering {
    block_number(a).cmp(&block_number(b)).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_architecture_has_families_of_its_own() {
        for (i, architecture) in ARCHITECTURES.iter().enumerate() {
            assert_eq!(Architecture::named(architecture.id).unwrap().families, architecture.families);
            for family in architecture.families {
                assert!(crate::families::FAMILIES.iter().any(|known| known.id == *family), "{family}");
                assert!(ARCHITECTURES[i + 1..].iter().all(|other| !other.families.contains(family)), "{family}");
            }
        }
        assert_eq!(Architecture::of_family("mistral").unwrap().id, "llama");
    }

    #[test]
    fn tensors_of_no_block_come_first_and_blocks_by_number() {
        let mut names = [
            "blk.10.attn_q.weight",
            "token_embd.weight",
            "blk.2.ffn_up.weight",
            "output.weight",
            "blk.2.attn_q.weight",
        ];
        names.sort_by(|a, b| file_order(a, b));
        let sorted = [
            "output.weight",
            "token_embd.weight",
            "blk.2.attn_q.weight",
            "blk.2.ffn_up.weight",
            "blk.10.attn_q.weight",
        ];
        assert_eq!(names, sorted);
    }
}
