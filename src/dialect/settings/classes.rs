//! Which class of transformers runs a file of an architecture.

const DENSE: Option<bool> = Some(false);
const EXPERTS: Option<bool> = Some(true);
const EITHER: Option<bool> = None;

/// Architectures, whether they have experts, and `model_type`, class and activation: those that these two decide about alone.
const CLASSES: &[(&str, Option<bool>, [&str; 3])] = &[
    ("llama", DENSE, ["llama", "LlamaForCausalLM", "silu"]),
    ("llama", EXPERTS, ["mixtral", "MixtralForCausalLM", "silu"]),
    ("qwen2", DENSE, ["qwen2", "Qwen2ForCausalLM", "silu"]),
    ("qwen2vl", DENSE, ["qwen2_vl", "Qwen2VLForConditionalGeneration", "silu"]),
    ("qwen3", DENSE, ["qwen3", "Qwen3ForCausalLM", "silu"]),
    ("qwen3vl", DENSE, ["qwen3_vl_text", "Qwen3VLForConditionalGeneration", "silu"]),
    ("qwen3vlmoe", EXPERTS, ["qwen3_vl_moe_text", "Qwen3VLMoeForConditionalGeneration", "silu"]),
    ("gemma", DENSE, ["gemma", "GemmaForCausalLM", "gelu_pytorch_tanh"]),
    ("gemma2", DENSE, ["gemma2", "Gemma2ForCausalLM", "gelu_pytorch_tanh"]),
    ("gemma3", DENSE, ["gemma3_text", "Gemma3ForCausalLM", "gelu_pytorch_tanh"]),
    ("gemma-embedding", DENSE, ["gemma3_text", "Gemma3TextModel", "gelu_pytorch_tanh"]),
    ("gemma3n", DENSE, ["gemma3n_text", "Gemma3nForCausalLM", "gelu_pytorch_tanh"]),
    ("gemma4", EITHER, ["gemma4_text", "Gemma4ForCausalLM", "gelu_pytorch_tanh"]),
    ("phi2", DENSE, ["phi", "PhiForCausalLM", "gelu_new"]),
    ("phi3", DENSE, ["phi3", "Phi3ForCausalLM", "silu"]),
    ("olmo", DENSE, ["olmo", "OlmoForCausalLM", "silu"]),
    ("olmo2", DENSE, ["olmo2", "Olmo2ForCausalLM", "silu"]),
    ("granite", DENSE, ["granite", "GraniteForCausalLM", "silu"]),
    ("granitehybrid", EITHER, ["granitemoehybrid", "GraniteMoeHybridForCausalLM", "silu"]),
    ("lfm2", DENSE, ["lfm2", "Lfm2ForCausalLM", "silu"]),
    ("lfm2moe", EXPERTS, ["lfm2_moe", "Lfm2MoeForCausalLM", "silu"]),
    ("falcon-h1", DENSE, ["falcon_h1", "FalconH1ForCausalLM", "silu"]),
    ("granitemoe", EXPERTS, ["granitemoe", "GraniteMoeForCausalLM", "silu"]),
    ("starcoder2", DENSE, ["starcoder2", "Starcoder2ForCausalLM", "gelu_pytorch_tanh"]),
    ("gptneox", DENSE, ["gpt_neox", "GPTNeoXForCausalLM", "gelu_new"]),
    ("gpt2", DENSE, ["gpt2", "GPT2LMHeadModel", "gelu_new"]),
    ("smollm3", DENSE, ["smollm3", "SmolLM3ForCausalLM", "silu"]),
    ("command-r", DENSE, ["cohere", "CohereForCausalLM", "silu"]),
    ("cohere2", DENSE, ["cohere2", "Cohere2ForCausalLM", "silu"]),
    ("chatglm", DENSE, ["glm", "GlmForCausalLM", "silu"]),
    ("glm4", DENSE, ["glm4", "Glm4ForCausalLM", "silu"]),
    ("stablelm", DENSE, ["stablelm", "StableLmForCausalLM", "silu"]),
    ("nemotron", DENSE, ["nemotron", "NemotronForCausalLM", "relu2"]),
    ("exaone4", DENSE, ["exaone4", "Exaone4ForCausalLM", "silu"]),
    ("exaone-moe", EXPERTS, ["exaone_moe", "ExaoneMoeForCausalLM", "silu"]),
    ("hy_v3", EXPERTS, ["hy_v3", "HYV3ForCausalLM", "silu"]),
    ("mistral3", DENSE, ["ministral3", "Ministral3ForCausalLM", "silu"]),
    ("glm4moe", EXPERTS, ["glm4_moe", "Glm4MoeForCausalLM", "silu"]),
    ("apertus", DENSE, ["apertus", "ApertusForCausalLM", "xielu"]),
    ("arcee", DENSE, ["arcee", "ArceeForCausalLM", "relu2"]),
    ("seed_oss", DENSE, ["seed_oss", "SeedOssForCausalLM", "silu"]),
    ("ernie4_5", DENSE, ["ernie4_5", "Ernie4_5ForCausalLM", "silu"]),
    ("hunyuan-moe", EXPERTS, ["hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", "silu"]),
    ("dots1", EXPERTS, ["dots1", "Dots1ForCausalLM", "silu"]),
    ("minimax-m2", EXPERTS, ["minimax_m2", "MiniMaxM2ForCausalLM", "silu"]),
    ("minimax-m3", EXPERTS, ["minimax_m3_vl_text", "MiniMaxM3VLForCausalLM", "silu"]),
    ("ernie4_5-moe", EXPERTS, ["ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "silu"]),
    ("cohere2moe", EXPERTS, ["cohere2_moe", "Cohere2MoeForCausalLM", "silu"]),
    ("mistral4", EITHER, ["mistral4", "Mistral4ForCausalLM", "silu"]),
    ("hunyuan-dense", DENSE, ["hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "silu"]),
    ("qwen2moe", EXPERTS, ["qwen2_moe", "Qwen2MoeForCausalLM", "silu"]),
    ("qwen3next", EXPERTS, ["qwen3_next", "Qwen3NextForCausalLM", "silu"]),
    ("qwen35", DENSE, ["qwen3_5_text", "Qwen3_5ForCausalLM", "silu"]),
    ("qwen35moe", EXPERTS, ["qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", "silu"]),
    ("qwen4exp", EXPERTS, ["qwen4_exp_text", "Qwen4ExpForCausalLM", "silu"]),
    ("qwen3moe", EXPERTS, ["qwen3_moe", "Qwen3MoeForCausalLM", "silu"]),
    ("olmoe", EXPERTS, ["olmoe", "OlmoeForCausalLM", "silu"]),
    ("deepseek2", EITHER, ["deepseek_v2", "DeepseekV2ForCausalLM", "silu"]),
    ("deepseek32", EITHER, ["deepseek_v32", "DeepseekV32ForCausalLM", "silu"]),
    ("mimo2", EXPERTS, ["mimo_v2_flash", "MiMoV2FlashForCausalLM", "silu"]),
    ("bailingmoe3", EXPERTS, ["bailing_hybrid", "BailingHybridForCausalLM", "silu"]),
    ("kimi-linear", EITHER, ["kimi_linear", "KimiLinearForCausalLM", "silu"]),
    ("glm5-next", EITHER, ["glm5_next_text", "Glm5NextTextModel", "silu"]),
    ("hy_v4", EITHER, ["hy_v4", "HYV4ForCausalLM", "silu"]),
    ("deepseek4", EXPERTS, ["deepseek_v4", "DeepseekV4ForCausalLM", "silu"]),
    ("glm-dsa", EITHER, ["glm_moe_dsa", "GlmMoeDsaForCausalLM", "silu"]),
    ("gpt-oss", EXPERTS, ["gpt_oss", "GptOssForCausalLM", "silu"]),
    ("llama4", EXPERTS, ["llama4_text", "Llama4ForCausalLM", "silu"]),
    ("nemotron_h", DENSE, ["nemotron_h", "NemotronHForCausalLM", "relu2"]),
    ("nemotron_h_moe", EXPERTS, ["nemotron_h", "NemotronHForCausalLM", "relu2"]),
];

/// `model_type`, class and activation of a model of an architecture, with experts or without; `None` where there is no such class.
pub(super) fn of(architecture: &str, experts: bool) -> Option<[&'static str; 3]> {
    let is = |(id, own, _): &&(&str, Option<bool>, [&'static str; 3])| {
        *id == architecture && own.is_none_or(|own| own == experts)
    };
    CLASSES.iter().find(is).map(|(_, _, class)| *class)
}
