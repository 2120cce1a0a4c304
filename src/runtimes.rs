//! What runtimes are known not to load, so that a report says it before anyone tries. Measured by `tests/runtimes/families.py`
//! with transformers 5.23 and GPTQModel 7.7, by `tests/runtimes/in_vllm.py` with vLLM 0.32, and by `tests/runtimes/mlx.py`, which also fail when
//! a note here is no longer true.

pub mod experts;
mod gptqmodel;
pub(crate) mod vllm;

use std::collections::HashMap;

use formats::codec::is_expert;
use formats::{Dtype, Encoding};
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::dialect::mlx;
use crate::error::Result;
use crate::families::{Loading, changed_modules, settings, type_of};
use crate::graph::{FURTHER, Graph, Layer, Linear};
use crate::report::Fate;

/// Models whose classes in transformers ask linears for their weights before these are unpacked: as they compute, measured by
/// `tests/runtimes/unknown.py` (but for mt5, whose class is umt5's but for where positions are), or as they are made, measured by
/// `tests/runtimes/asks.py`.
const ASK_FOR_WEIGHTS: &[&str] = &[
    "altclip_vision_model",
    "blt",
    "blt_patcher",
    "bridgetower",
    "chinese_clip_vision_model",
    "chmv2",
    "clap",
    "clap_text_model",
    "clipseg",
    "clipseg_text_model",
    "clipseg_vision_model",
    "clvp",
    "clvp_decoder",
    "clvp_encoder",
    "colmodernvbert",
    "cvt",
    "d_fine",
    "deimv2",
    "depth_anything",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "emu3_vqgan",
    "falcon",
    "falcon_mamba",
    "fastspeech2_conformer",
    "fastspeech2_conformer_with_hifigan",
    "gpt_bigcode",
    "grounding-dino",
    "groupvit",
    "groupvit_text_model",
    "hiera",
    "ijepa",
    "kosmos-2",
    "longt5",
    "lw_detr",
    "lw_detr_vit",
    "mamba",
    "mamba2",
    "mask2former",
    "mgp-str",
    "mlcd",
    "mlcd_vision_model",
    "mm-grounding-dino",
    "modernbert",
    "modernbert-decoder",
    "modernvbert",
    "mt5",
    "nanochat",
    "neomme",
    "oneformer",
    "owlv2",
    "owlv2_text_model",
    "owlvit",
    "owlvit_text_model",
    "pe_audio",
    "phi4_multimodal_vision",
    "pix2struct",
    "pix2struct_text_model",
    "pix2struct_vision_model",
    "pop2piano",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "prompt_depth_anything",
    "pvt",
    "pvt_v2",
    "radio",
    "recurrent_gemma",
    "rf_detr",
    "rf_detr_dinov2",
    "rt_detr",
    "rt_detr_v2",
    "rwkv",
    "sapiens2",
    "seggpt",
    "siglip",
    "siglip2",
    "siglip2_text_model",
    "siglip2_vision_model",
    "siglip_text_model",
    "siglip_vision_model",
    "swiftformer",
    "swin2sr",
    "switch_transformers",
    "t5",
    "timesformer",
    "tipsv2_dpt",
    "tipsv2_vision_model",
    "udop",
    "umt5",
    "videoprism",
    "videoprism_text_model",
    "videoprism_vision_model",
    "vitdet",
    "vitpose",
    "vitpose_backbone",
    "vjepa2",
    "xclip",
    "xclip_text_model",
    "xclip_vision_model",
    "xlstm",
];

/// Models whose linears are of a class of their own in transformers, which is filled from plain weights alone.
const OWN_LINEARS: &[&str] = &["ibert"];

/// What is asked of a model.
struct Facts<'a> {
    family: &'a str,
    /// The layout's codec.
    codec: &'a str,
    /// Whether experts are quantized.
    experts: bool,
    /// Whether experts are in NVFP4.
    global: bool,
    /// Whether what computes is known here.
    known: bool,
    /// Whether a quantized linear has a zero point.
    asymmetric: bool,
    /// Whether keys and values that are made through a latent have codes.
    latent: bool,
    /// Whether the model is a part of a larger one.
    wrapped: bool,
    /// Whether some experts have no linears.
    idle: bool,
}

/// How many stacks of layers a model is made of, as an encoder and a decoder are.
fn stacks(graph: &Graph) -> usize {
    let stack = |block: &crate::graph::Block| {
        let parts = block.name.split('.').take_while(|part| part.parse::<usize>().is_err());
        parts.collect::<Vec<_>>().join(".")
    };
    let mut all: Vec<String> = graph.blocks.iter().map(stack).collect();
    all.sort();
    all.dedup();
    all.len()
}

/// Notes on the runtimes that will not load `graph` in the layout `codec` with these encodings: what happens, and who does.
pub fn notes(
    graph: &Graph,
    source: &Checkpoint,
    loading: &Loading,
    codec: &str,
    encodings: &HashMap<String, Encoding>,
) -> Result<Vec<String>> {
    let model_type = settings(source.config())?.model_type;
    let layers = || graph.blocks.iter().flat_map(|block| &block.steps).map(|step| &step.layer);
    let quantized = |linear: &Linear| encodings.contains_key(&linear.module);
    let experts = layers().any(|layer| match layer {
        Layer::Moe(moe) => moe.experts.iter().any(|expert| expert.inputs.iter().chain([&expert.down]).any(quantized)),
        Layer::Opaque(linears) => linears.iter().any(|linear| is_expert(&linear.module) && quantized(linear)),
        _ => false,
    });
    let facts = Facts {
        family: graph.family,
        codec,
        experts,
        global: encodings.iter().any(|(module, encoding)| encoding.global.is_some() && is_expert(module)),
        known: !graph.opaque,
        asymmetric: encodings.values().any(|encoding| encoding.fixed_zero().is_none()),
        latent: matches!(graph.family, "deepseek_v3" | "deepseek_v32" | "glm4_moe_lite" | "glm_moe_dsa")
            && encodings.keys().any(|module| module.ends_with("kv_b_proj")),
        idle: layers().any(|layer| matches!(layer, Layer::Moe(moe) if moe.experts.len() < moe.router.linear.rows)),
        wrapped: graph.aside.iter().any(|(prefix, what)| !prefix.is_empty() && !what.starts_with(FURTHER)),
    };
    let packed = codec == "compressed-tensors";
    let refused = packed && loading.refuses_packed(source.entries().iter().map(|entry| &entry.name[..]));
    let is_one = |types: &[&str]| {
        types.contains(&&model_type[..]) || type_of(source.config()).is_some_and(|outer| types.contains(&outer))
    };
    let any = |types: &[&str]| packed && !refused && is_one(types);
    let mut all = encodings.values();
    let one = all.next().is_none_or(|first| all.all(|other| other == first));
    let dequantized = match one {
        true => "with CompressedTensorsConfig(dequantize=True) it loads",
        false => {
            "it unpacks files of one scheme with CompressedTensorsConfig(dequantize=True), and this one has several"
        }
    };
    let unknown = any(ASK_FOR_WEIGHTS).then(|| {
        format!(
            "transformers' class of this model asks for the weights of linears while these are packed, and fails ('Linear' object has \
             no attribute 'weight'); {dequantized}"
        )
    });
    // It unpacks when the model as a whole is called for the first time.
    let apart = packed && !refused && graph.opaque && unknown.is_none() && stacks(graph) > 1;
    let apart = apart.then(|| {
        format!(
            "transformers unpacks this output when the model as a whole is first called; what calls a part of it before, such as generate() of an encoder and \
             decoder or get_text_features(), fails ('Linear' object has no attribute 'weight'); {dequantized}"
        )
    });
    let sentences = packed && !refused && unknown.is_none() && source.is_for_sentences();
    let sentences = sentences.then(|| for_sentences(one));
    let own = any(OWN_LINEARS).then(|| {
        format!("transformers fills the linears of this model from plain weights alone and would leave them at random values; {dequantized}")
    });
    let split = refused.then(|| {
        "transformers splits or joins matrices of this model as it loads it, and fails at that where anything is packed as \
         compressed-tensors, with CompressedTensorsConfig(dequantize=True) too: it cannot load this output"
            .to_owned()
    });
    let stays = if graph.opaque { changed(&changed_modules(source)) } else { None };
    // The library unpacks these to bfloat16, whatever the model is in.
    let dtype = source.dtype();
    let halves = packed && dtype != Dtype::BF16 && encodings.values().any(|encoding| encoding.global.is_some());
    let halves = halves.then(|| {
        let or = if one { ", or as it is with CompressedTensorsConfig(dequantize=True)" } else { "" };
        format!(
            "transformers unpacks NVFP4A16 to bfloat16 and fails at the first product where the rest of the model has another type, as \
             this one ({dtype}): load it with dtype=torch.bfloat16{or}"
        )
    });
    let elsewhere = (codec == "gptq" && is_one(&["smolvlm", "idefics3"])).then(|| {
        "transformers does not find the layers of this model's text where it loads GPTQ, and fails; give another --format, as \
         compressed-tensors"
            .to_owned()
    });
    let lost = vllm::notes(graph, codec);
    let known = transformers(&facts).map(str::to_owned).into_iter();
    let known = known.chain(gptqmodel::note(&facts, graph, source, encodings));
    let known = known.chain(mlx_lm(&facts, graph, source.config())?);
    Ok(known
        .chain([unknown, apart, sentences, own, split, stays, halves, elsewhere].into_iter().flatten())
        .chain(lost)
        .collect())
}

/// What to say where linears of a tower are quantized and have no `weight` in the file: who does not load them.
pub fn of_towers(config: &Value) -> Option<String> {
    let parts = config.as_object()?.values().filter_map(type_of);
    let asks = parts.into_iter().find(|part| ASK_FOR_WEIGHTS.contains(part))?;
    Some(format!(
        "transformers' class of the tower ({asks}) asks for the weights of its linears while these are packed, and fails ('Linear' object has no \
         attribute 'weight'): load this output with CompressedTensorsConfig(dequantize=True), or give --scheme W8A8 or FP8_DYNAMIC"
    ))
}

/// What to say of matrices that stay as they are because transformers changes them.
fn changed(modules: &[String]) -> Option<String> {
    let first = modules.first()?;
    let what = match modules.len() {
        1 => format!("`{first}` as it loads it, which it cannot do to a packed matrix: it stays as it is"),
        n => format!(
            "`{first}` and {} more matrices as it loads them, which it cannot do to packed ones: they stay as they are",
            n - 1
        ),
    };
    Some(format!("transformers splits, joins or turns {what}"))
}

/// What sentence-transformers makes of packed linears, of one scheme or several.
fn for_sentences(one: bool) -> String {
    let how = match one {
        true => "give it model_kwargs={\"quantization_config\": CompressedTensorsConfig(dequantize=True)}",
        false => {
            "transformers does so earlier with CompressedTensorsConfig(dequantize=True), for files of one scheme alone"
        }
    };
    format!(
        "sentence-transformers calls the forward() of the model itself, before transformers has unpacked this output, and fails ('Linear' object \
         has no attribute 'weight'): {how}"
    )
}

fn transformers(facts: &Facts<'_>) -> Option<&'static str> {
    match (facts.codec, facts.family) {
        ("compressed-tensors" | "gptq" | "awq", "gpt_oss") if facts.experts => Some(
            "transformers and vLLM keep this family's experts in stacks and fill them from stacks alone: they would compute with random \
             ones; leave the experts as they are with --ignore",
        ),
        (
            "compressed-tensors",
            "gemma4" | "granitemoe" | "granitemoeshared" | "granitemoehybrid" | "hy_v4" | "mistral4" | "qwen3_vl_moe"
            | "step3p5",
        ) if facts.experts => Some(
            "transformers keeps this family's experts in stacks and fills them from stacks alone: it would load wrong weights; \
             vLLM loads experts one by one",
        ),
        ("compressed-tensors", _) if facts.experts && facts.idle => Some(
            "transformers stacks this family's experts with those that have no weights, and does not load packed ones: it cannot load this \
             output; leave the experts as they are with --ignore",
        ),
        // Those of Llama 4 it takes apart.
        ("compressed-tensors", family) if facts.experts && facts.asymmetric && family != "llama4" => {
            Some("transformers does not unpack asymmetric experts; vLLM does, and symmetric ones load in both")
        }
        ("compressed-tensors", family) if facts.global && family != "llama4" => Some(match facts.known {
            true => {
                "transformers does not read the global scales of experts in NVFP4A16 and would load wrong weights, thousands of times too \
                 large, without a word; vLLM loads them; for transformers give the experts another scheme (W4A16, FP8_DYNAMIC), or --ignore"
            }
            false => {
                "where transformers keeps this model's experts in stacks it does not read their global scales in NVFP4A16 and would load \
                 wrong weights, without a word; for transformers give the experts another scheme (W4A16, FP8_DYNAMIC), or --ignore"
            }
        }),
        ("gptq" | "awq", _) if facts.experts => Some(
            "transformers keeps experts in stacks and does not fill them from GPTQ or AWQ: it would load wrong weights; \
             vLLM loads experts one by one",
        ),
        ("gptq", "gpt2") => Some("transformers fails on GPTQ files of this family; GPTQModel loads them"),
        ("awq", "gpt_neox" | "starcoder2") => Some(
            "transformers asks AWQ files of this family for scales of an activation, which only AutoAWQ's own scaling has, \
             and leaves them at random values; compressed-tensors loads",
        ),
        _ => None,
    }
}

/// What mlx-lm does with a model: whether it loads it by its type and by how its experts are written, and then by what it computes.
fn mlx_lm(facts: &Facts<'_>, graph: &Graph, config: &Value) -> Result<Vec<String>> {
    if facts.codec != "mlx" {
        return Ok(Vec::new());
    }
    let model_type = type_of(config).unwrap_or_default();
    if !mlx::knows(model_type) {
        return Ok(vec![format!(
            "mlx-lm 0.32 does not know models of this type (`{model_type}`) and does not load this output; give another --format, as \
             compressed-tensors or gguf, for other runtimes"
        )]);
    }
    let experts = match facts.family {
        "gpt_oss" => Some(
            "mlx-lm 0.32 loads this family's experts from MXFP4 alone and does not load this output; give another --format, as \
             compressed-tensors",
        ),
        "granitemoe" | "granitemoehybrid" | "llama4" if facts.experts => Some(
            "mlx-lm 0.32 fills this family's experts from stacks alone and does not load them one by one; leave them as they are with \
             --ignore",
        ),
        _ if facts.experts && !mlx::stacks_experts(model_type) => Some(
            "mlx-lm 0.32 stacks this family's experts without their scales and does not load them; leave them as they are with --ignore",
        ),
        _ => None,
    };
    if let Some(experts) = experts {
        return Ok(vec![experts.to_owned()]);
    }
    if graph.opaque {
        return Ok(vec![format!(
            "it is not known here what models of the type `{model_type}` compute, and so neither whether mlx-lm loads this output nor \
             whether it computes the same: load it, and compare its answers with the original's"
        )]);
    }
    let mut notes = mlx::notes(config, graph)?;
    if facts.latent {
        notes.push(
            "mlx-lm 0.32 takes `kv_b_proj` of this family apart as it loads it and rounds the parts anew; --ignore kv_b_proj keeps it as it is"
                .to_owned(),
        );
    }
    Ok(notes)
}

/// What to say of tensors that go over though no rule names them, of a format whose loader takes none that its classes do not know.
pub fn unknown_to_mlx(graph: &Graph, source: &Checkpoint, codec: &str, fates: &[(String, Fate)]) -> Option<String> {
    let model_type = type_of(source.config()).unwrap_or_default();
    // Of models that are not known everything but linears goes over so.
    if codec != "mlx" || !mlx::knows(model_type) || graph.opaque {
        return None;
    }
    let aside = fates.iter().filter_map(|(name, fate)| match fate {
        Fate::Aside(reason) if !mlx::leaves_out(model_type, name, graph.blocks.len()) => Some((name, *reason)),
        _ => None,
    });
    let aside: Vec<(&String, &str)> = aside.collect();
    let (first, _) = aside.first()?;
    let count = aside.len();
    // What leaves each of them out.
    let mut flags: Vec<Option<&str>> = Vec::new();
    for (_, reason) in &aside {
        let flag = match reason {
            reason if reason.starts_with(FURTHER) => Some("--mtp drop"),
            reason => (!graph.aside.iter().any(|(_, what)| what == reason)).then_some("--unknown-tensors drop"),
        };
        if !flags.contains(&flag) {
            flags.push(flag);
        }
    }
    let flags: Option<Vec<&str>> = flags.into_iter().collect();
    let advice = match flags {
        Some(flags) => format!("give {} if it is to load the output", flags.join(" and ")),
        None => "it does not load the output".to_owned(),
    };
    Some(format!(
        "mlx-lm refuses files with tensors that its model class does not know, and {count} of these are copied (`{first}`): {advice}"
    ))
}
