//! What GPTQModel does with GPTQ and AWQ. It fills the classes of transformers from a file, by the names that tensors have in these, and takes for
//! quantized what its own table says of a type of models, whatever the file has. What it does not find stays at random values.

use std::collections::HashMap;

use formats::Encoding;

use super::Facts;
use crate::checkpoint::Checkpoint;
use crate::families::{AdapterNames, type_of};
use crate::graph::{Graph, Layer};

/// The types of models in its table.
const KNOWN: &[&str] = &[
    "afmoe",
    "agnes",
    "apertus",
    "apertus1p5",
    "apertus1p5_text",
    "axk2",
    "baichuan",
    "bailing_hybrid",
    "bailing_moe",
    "bloom",
    "brumby",
    "chatglm",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cohere_compass",
    "dbrx",
    "dbrx_converted",
    "deci",
    "deepseek_ocr2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "deepseek_vl",
    "deepseek_vl_v2",
    "diffusion_gemma",
    "dots1",
    "dream",
    "ernie4_5",
    "ernie4_5_moe",
    "ernie4_5_moe_vl",
    "ernie4_5_vl_moe",
    "exaone",
    "exaone4",
    "exaone4_5",
    "exaone4_5_text",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n",
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v",
    "glm4v_moe",
    "glm4v_moe_text",
    "glm5_next",
    "glm_moe_dsa",
    "glm_ocr",
    "glmasr",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gpt_pangu",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "grinmoe",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hunyuan_vl",
    "hy_v3",
    "hymba",
    "inkling_mm_model",
    "instella",
    "intern_s2_preview",
    "internlm",
    "internlm2",
    "interns1",
    "internvl",
    "internvl_chat",
    "jamba",
    "k2_horizon",
    "kimi_k2",
    "kimi_k25",
    "klear",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "lfm2_vl",
    "llada2_moe",
    "llama",
    "llama4",
    "llama4_text",
    "llava",
    "llava_qwen2",
    "locateanything",
    "longcat_flash",
    "longllama",
    "mage_vl",
    "marin",
    "mimo",
    "mimo_v2",
    "minicpm",
    "minicpm3",
    "minicpmo",
    "minicpmv",
    "minicpmv4_6",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl",
    "ministral3",
    "mistral",
    "mistral3",
    "mixtral",
    "mllama",
    "mllama_text_model",
    "mobilellm",
    "moss",
    "mpt",
    "muse_glimmer",
    "nanbeige",
    "nemotron-nas",
    "nemotron_h",
    "nemotron_h_puzzle",
    "nemotron_labs_diffusion",
    "nemotronh_nano_omni_reasoning_v3",
    "olmo2",
    "olmo3",
    "olmoe",
    "openvla",
    "opt",
    "ouro",
    "ovis",
    "ovis2",
    "ovis2_5",
    "ovis2_6_moe",
    "ovis2_6_next",
    "phi",
    "phi3",
    "phi4mm",
    "phimoe",
    "qwen",
    "qwen2",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_5_vl_text",
    "qwen2_audio",
    "qwen2_moe",
    "qwen2_vl",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen4_exp",
    "qwen4_exp_text",
    "qwen_drive",
    "refinedWeb",
    "refinedWebModel",
    "seed_oss",
    "smollm3",
    "smolvlm",
    "solar_open",
    "solar_open2",
    "spark2_5",
    "stablelm",
    "stablelm_epoch",
    "starcoder2",
    "telechat",
    "unlimited-ocr",
    "voxtral",
    "xing4_0",
    "xverse",
    "yi",
    "zamba",
    "zamba2",
    "zdtaichu5_0",
];

/// Linears that the table lacks, by families: what their names have in them.
const LEFT_OUT: &[(&str, &[&str])] = &[
    ("afmoe", &[".mlp.", ".self_attn.gate_proj"]),
    ("cohere2_moe", &[".shared_experts."]),
    ("gemma4", &[".experts."]),
    ("lfm2_moe", &[".experts.", ".self_attn.out_proj"]),
    ("nemotron_h", &[".mixer."]),
];

/// Families of whose layers it knows the mixtures alone: feed-forward layers without experts it leaves at random values.
const MIXTURES_ALONE: &[&str] = &["llama4", "qwen2_moe", "qwen3_moe", "qwen3_next"];

/// Who else loads what it does not, where that is known.
fn elsewhere(facts: &Facts<'_>) -> &'static str {
    match (facts.known, facts.experts) {
        (false, _) => "",
        (true, true) => "; vLLM loads experts one by one",
        (true, false) => "; transformers loads it",
    }
}

/// The note on GPTQModel, if it does not load these files.
pub(super) fn note(
    facts: &Facts<'_>,
    graph: &Graph,
    source: &Checkpoint,
    encodings: &HashMap<String, Encoding>,
) -> Option<String> {
    if !matches!(facts.codec, "gptq" | "awq") {
        return None;
    }
    let config = source.config();
    let model_type = type_of(config).unwrap_or_default();
    let layers = || graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer);
    if !KNOWN.contains(&model_type) {
        let odd = |layer: &Layer| matches!(layer, Layer::Delta(_) | Layer::Mamba(_) | Layer::Short(_));
        let what = match facts.codec {
            "awq" => "refuses them in AWQ",
            _ if facts.wrapped => "may not find what is quantized of them in GPTQ",
            _ if facts.experts || layers().any(odd) => {
                "finds of them in GPTQ attention and feed-forward layers alone: it refuses this output or would load wrong weights"
            }
            _ => return None,
        };
        let elsewhere = elsewhere(facts);
        return Some(format!("GPTQModel 7.7 does not know models of the type `{model_type}` and {what}{elsewhere}"));
    }
    let wrapped = || {
        let may = "GPTQModel 7.7 may look for the language model under other names than this file's";
        facts.wrapped.then(|| may.to_owned())
    };
    renamed(graph, source)
        .or_else(|| computed(facts).map(str::to_owned))
        .or_else(|| left_out(facts, graph, encodings))
        .or_else(wrapped)
}

/// Families that it takes apart, or whose layers it writes anew, otherwise than files have them.
fn computed(facts: &Facts<'_>) -> Option<&'static str> {
    Some(match facts.family {
        "gpt_oss" if facts.experts => {
            "GPTQModel 7.7 calls this family's experts otherwise than checkpoints and vLLM do, and does not find them"
        }
        "glm" | "glm4" | "glm4v" | "phi3" => {
            "GPTQModel 7.7 takes this family's `gate_up_proj` apart before it loads and does not find it: it refuses GPTQ and \
             loads wrong weights from AWQ; transformers loads both"
        }
        "glm4_moe" | "glm4_moe_lite" if facts.experts => {
            "GPTQModel 7.7 fails in this family's experts; vLLM loads them"
        }
        "granitemoehybrid" => {
            "GPTQModel 7.7 fails in this family's layers; compressed-tensors loads in transformers and vLLM"
        }
        _ => return None,
    })
}

/// Whether transformers knows a tensor of the language model by another name than the file, which it is told of and GPTQModel is not.
fn renamed(graph: &Graph, source: &Checkpoint) -> Option<String> {
    let names = AdapterNames::of(source.config());
    let other = |tensor: &str| {
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        names.in_memory(module).into_iter().find(|name| name != module).map(|name| (module.to_owned(), name))
    };
    let aside =
        |tensor: &str| graph.aside.iter().any(|(prefix, _)| !prefix.is_empty() && tensor.starts_with(&prefix[..]));
    let mut own = source.entries().iter().filter(|entry| !aside(&entry.name));
    let (file, memory) = own.find_map(|entry| other(&entry.name))?;
    Some(format!(
        "GPTQModel 7.7 looks for tensors by the names that transformers gives them, and so for `{file}` as `{memory}`: it refuses this output or \
         would load wrong weights; transformers and vLLM know the file's names"
    ))
}

/// Whether something is quantized that its table lacks.
fn left_out(facts: &Facts<'_>, graph: &Graph, encodings: &HashMap<String, Encoding>) -> Option<String> {
    let parts = LEFT_OUT.iter().find(|(family, _)| *family == facts.family).map_or(&[][..], |(_, parts)| *parts);
    let alone = MIXTURES_ALONE.contains(&facts.family);
    let layers = graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer);
    let linears = layers.flat_map(|layer| {
        let dense = alone && matches!(layer, Layer::Mlp(_));
        layer.linears().into_iter().flatten().map(move |linear| (dense, &linear.module))
    });
    let quantized = linears.filter(|(_, module)| encodings.contains_key(*module));
    let mut lost = quantized.filter(|(dense, module)| *dense || parts.iter().any(|part| module.contains(part)));
    let (_, module) = lost.next()?;
    let elsewhere = elsewhere(facts);
    Some(format!("GPTQModel 7.7 does not know that `{module}` is quantized and would load wrong weights{elsewhere}"))
}
