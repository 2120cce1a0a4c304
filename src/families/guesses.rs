//! What is made of settings that transformers 5 fails on or does not read: one sentence for each guess.

use serde_json::{Map, Value};

use super::classes::CLASSES;
use crate::json::{integer, shown};

/// Settings that classes let be null and compute with, and what is taken for a null where it is not the class's default.
const COMPUTED_WITH: &[(&str, Option<&str>)] = &[
    ("logit_scale", None),
    ("layer_norm_eps", None),
    ("embedding_multiplier", None),
    ("logits_scaling", None),
    ("residual_multiplier", None),
    ("attention_multiplier", None),
    ("n_group", Some("1")),
    ("topk_group", Some("1")),
];

/// Notes on the settings of a model of this class, each under its own name and without defaults.
pub(super) fn notes(class: &str, settings: &Map<String, Value>) -> Vec<String> {
    let mut notes = Vec::new();
    let said = |key: &str| settings.get(key).filter(|value| !value.is_null());
    let null = |key: &str| settings.get(key).is_some_and(Value::is_null);
    let known = &CLASSES[class];
    for (key, taken) in COMPUTED_WITH.iter().filter(|(key, _)| null(key) && known.nullable.iter().any(|n| n == key)) {
        let default = shown(&known.defaults[*key]);
        let taken = taken.unwrap_or(&default);
        notes.push(format!("config.json has null for {key}, which transformers 5 fails on: {taken} is taken"));
    }
    let types = said("layer_types").and_then(Value::as_array);
    let sliding = types.is_some_and(|types| types.iter().any(|kind| kind == "sliding_attention"));
    let switched = class.starts_with("qwen") && known.defaults.contains_key("use_sliding_window");
    let off = switched && said("use_sliding_window") != Some(&Value::Bool(true));
    if sliding && (off || null("sliding_window") && (switched || class.starts_with("exaone"))) {
        let why = if off { "use_sliding_window is not true" } else { "sliding_window is null" };
        notes.push(format!(
            "config.json has sliding_attention in layer_types though {why}, which transformers 5 fails on: no layer has a window"
        ));
    }
    match class {
        "hunyuan_v1_dense" | "hunyuan_v1_moe" if said("head_dim").is_none() => notes.push(
            "config.json has no head_dim, which transformers 5 fails on for this family: hidden_size divided by num_attention_heads is taken"
                .to_owned(),
        ),
        "smollm3" if said("no_rope_layers").and_then(Value::as_array).is_some_and(Vec::is_empty) => notes.push(
            "config.json has an empty no_rope_layers, which transformers 5 fails on: no_rope_layer_interval counts"
                .to_owned(),
        ),
        "gemma3_text" => {
            if let Some(cap) = said("attn_logit_softcapping") {
                notes.push(format!(
                    "config.json has {} for attn_logit_softcapping, which transformers 5 does not apply to a `gemma3_text`: scores are not \
                     capped, as in vLLM and llama.cpp",
                    shown(cap)
                ));
            }
        }
        "exaone4" | "exaone_moe" if types.is_none() => {
            let letters = said("sliding_window_pattern").filter(|pattern| pattern.is_string());
            let (what, taken) = match (null("sliding_window"), letters) {
                (true, _) => ("null for sliding_window".to_owned(), "no layer has a window"),
                (false, Some(letters)) => (
                    format!("{} for sliding_window_pattern", shown(letters)),
                    "the letters are repeated over the layers",
                ),
                (false, None) => return notes,
            };
            notes.push(format!("config.json has {what} and no layer_types, which transformers 5 fails on: {taken}"));
        }
        "internlm3" => {
            let biased = |key: &str| said(key) == Some(&Value::Bool(true));
            if biased("attention_bias") != biased("mlp_bias") {
                notes.push(
                    "config.json has qkv_bias and bias that differ, which transformers 5 fails on: qkv_bias counts for queries, keys and \
                     values, and bias for all other linears"
                        .to_owned(),
                );
            }
        }
        "deepseek_v2" | "deepseek_v3" => {
            if class == "deepseek_v2" && said("norm_topk_prob") == Some(&Value::Bool(true)) {
                notes.push(
                    "config.json has norm_topk_prob true, which transformers 5 does not read for `deepseek_v2`: the weights of the \
                     chosen experts are divided by their sum, as vLLM and llama.cpp do"
                        .to_owned(),
                );
            }
            if let Some(every) = said("moe_layer_freq").filter(|every| integer(every) != Some(1)) {
                notes.push(format!(
                    "config.json has {} for moe_layer_freq, which transformers 5 does not read for `{class}`: all layers behind the \
                     first first_k_dense_replace have experts",
                    shown(every)
                ));
            }
        }
        _ => {}
    }
    notes
}

/// Models that see or hear whose class in transformers scales or caps their logits as their language model does.
const LIKE_THEIR_TEXT: &[&str] =
    &["gemma3", "gemma3n", "granite4_vision", "granite_docling", "hyperclovax_vision_v2", "mistral_large4"];

/// A note on the head of the model `outer`, which sees or hears, where `text`, the settings of its language model of this class,
/// have a scale or a cap for logits that the outer class of transformers does not apply.
pub(super) fn head(outer: &str, class: &str, text: &Value) -> Option<String> {
    if LIKE_THEIR_TEXT.contains(&outer) {
        return None;
    }
    let known = CLASSES.get(class)?;
    let (key, value) = ["logit_scale", "logits_scaling", "final_logit_softcapping"].into_iter().find_map(|key| {
        let default = known.defaults.get(key)?;
        let value = text.get(key).unwrap_or(default).as_f64()?;
        (value != 1.0).then_some((key, value))
    })?;
    Some(format!(
        "{key} of the language model in config.json is {value}, which transformers 5 applies to a `{class}` and not inside a \
         `{outer}`: it is applied, as vLLM and llama.cpp do"
    ))
}

/// Models of transformers 5.23 with a language model as a part, beside those in [`renames`](super::renames) and those that are wrappers here.
#[rustfmt::skip]
const WITH_TEXT: &[&str] = &[
    "aimv2", "aimv2_text_model", "align", "align_text_model", "altclip_text_model", "blip-2", "blip_text_model",
    "bridgetower", "bridgetower_text_model", "canary", "chinese_clip_text_model", "clap", "clap_text_model", "clvp",
    "clvp_encoder", "cohere_compass", "cohere_compass_text", "cosmos3_edge_text", "deepseek_ocr2_text", "dia",
    "diffusion_gemma", "dots3_note_text", "embedding_gemma2", "emu3_text_model", "ernie4_5_vl_moe_text", "exaone4_5",
    "fast_vlm", "flava", "flava_text_model", "florence2", "fun_asr_nano", "gemma4_assistant",
    "gemma4_unified_assistant", "gemma4_unified_vision", "glm46v", "glm4v_moe_text", "glm4v_text", "glm_image",
    "glm_image_text", "glm_ocr", "glm_ocr_text", "glmga", "granite4_vision", "granite4_vision_text",
    "granite_docling", "granite_docling_text", "groupvit", "groupvit_text_model", "hunyuan_vl_text", "idefics2",
    "inkling_text", "instructblip", "instructblipvideo", "janus", "kosmos-2", "kosmos-2.5", "kosmos_2_5_text_model",
    "kosmos_2_text_model", "lighton_ocr", "minimax_m3_vl_text", "ministral3", "mllama_text_model",
    "moss_transcribe_diarize", "muse_glimmer", "muse_glimmer_assistant", "muse_spark", "musicgen_decoder",
    "musicgen_melody_decoder", "omdet-turbo", "ovis2", "owlv2", "owlv2_text_model", "owlvit", "owlvit_text_model",
    "pe_audio", "pe_audio_video", "pe_video", "perception_lm", "pp_formulanet", "pp_formulanet_text",
    "qwen2_5_omni_talker", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_asr", "qwen3_omni_moe", "qwen3_vl_moe_text",
    "qwen3_vl_text", "sam3_lite_text", "step3p5", "unlimited_ocr_text", "vibevoice", "video_llama_3", "videoprism",
    "videoprism_text_model", "xclip", "xclip_text_model",
    // Of vLLM's, with code of their own in transformers.
    "internvl_chat", "h2ovl_chat", "NVLM_D", "minicpmv", "minicpmo", "phi3_v", "deepseek_vl_v2", "kimi_vl", "keye", "molmo",
];

/// What to say of a model `outer` around a language model of this class, where no runtime is known to have such a one.
pub(super) fn unknown_outside(outer: &str, class: &str) -> Option<String> {
    let known = super::is_wrapper(outer) || super::renames::has(outer) || WITH_TEXT.contains(&outer);
    (!known).then(|| {
        format!(
            "config.json: model_type is `{outer}`, and no runtime is known to have models of that type: the language model inside, a `{class}`, is \
             known and run; where the type is wrong, take the config.json that was published with the model"
        )
    })
}

/// A note on settings of rotary positions that name two types, of which the newer key's is taken.
pub(super) fn two_types(own: &Map<String, Value>) -> Option<String> {
    // Qwen2-VL's are written with both, and so was the first LongRoPE.
    const ALIKE: &[[&str; 2]] = &[["mrope", "default"], ["su", "longrope"]];
    let of = |key: &str| own.get(key)?.as_str();
    let (new, old) = (of("rope_type")?, of("type")?);
    let alike = new == old || ALIKE.iter().any(|pair| pair.contains(&new) && pair.contains(&old));
    (!alike).then(|| {
        format!(
            "config.json has rope_type {new} and type {old} for rotary positions, and they differ: {new} is taken, as transformers does"
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn scales_that_transformers_applies_to_text_alone_are_told() {
        for (outer, class, text, told) in [
            ("aya_vision", "cohere2", json!({}), Some("logit_scale of the language model in config.json is 0.0625")),
            ("aya_vision", "cohere2", json!({"logit_scale": 1.0}), None),
            ("llava_next", "granite", json!({"logits_scaling": 8.0}), Some("logits_scaling of the language model")),
            ("llava", "gemma2", json!({"final_logit_softcapping": null}), None),
            ("llava", "gemma2", json!({"final_logit_softcapping": 5.0}), Some("not inside a `llava`")),
            ("gemma3", "gemma3_text", json!({"final_logit_softcapping": 5.0}), None),
            ("llava", "llama", json!({"logit_scale": 2.0}), None),
        ] {
            let note = head(outer, class, &text);
            assert_eq!(note.is_some(), told.is_some(), "{outer} {class} {text}: {note:?}");
            assert!(note.unwrap_or_default().contains(told.unwrap_or_default()), "{outer} {class}");
        }
    }

    #[test]
    fn biases_of_which_transformers_knows_no_model_are_told() {
        let of = |qkv: Value, others: Value| {
            notes("internlm3", json!({"attention_bias": qkv, "mlp_bias": others}).as_object().unwrap())
        };
        assert!(of(json!(true), json!(false))[0].contains("qkv_bias and bias that differ"));
        assert!(of(json!(true), json!(true)).is_empty() && of(Value::Null, json!(false)).is_empty());
    }

    #[test]
    fn a_cap_that_gemma_3_does_not_apply_is_told() {
        let of = |class: &str, cap: Value| notes(class, json!({"attn_logit_softcapping": cap}).as_object().unwrap());
        assert!(of("gemma3_text", json!(50.0))[0].contains("50.0 for attn_logit_softcapping"));
        assert!(of("gemma3_text", Value::Null).is_empty() && of("gemma2", json!(50.0)).is_empty());
    }

    #[test]
    fn weights_that_only_transformers_leaves_undivided_are_told() {
        let settings = json!({"norm_topk_prob": true});
        let of = |class: &str| notes(class, settings.as_object().unwrap());
        assert!(of("deepseek_v2")[0].contains("norm_topk_prob true"));
        assert!(of("deepseek_v3").is_empty());
    }
}
