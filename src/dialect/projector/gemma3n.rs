//! Gemma 3n, whose vision tower is MobileNetV5. llama.cpp hears nothing with it, so that what hears is left out.

use formats::container::gguf::{GGUFValueType, MetadataValue};

use super::computed::Need;
use super::{Kind, Make, PLAIN, Rule, Ty, array, count, float, itself, weight};
use crate::json::{integer, real};

/// A convolution, whose weights llama.cpp takes in F16 alone: in BF16 it stops where one goes over all channels, and in F32 where it goes over one.
const fn over(from: &'static str, to: &'static str) -> Rule {
    Rule { need: Need::Nothing, ty: Ty::F16, ..weight(from, to) }
}

/// The norm of one; a block has those of its kind.
const fn norm(from: &'static str, to: &'static str) -> Rule {
    Rule { need: Need::Nothing, ..weight(from, to) }
}

/// What is outside of blocks.
const AROUND: &[Rule] = &[
    Rule { ty: Ty::F32, ..itself("vision_tower.timm_model.conv_stem.conv.weight", "v.conv_stem.conv.weight") },
    Rule {
        need: Need::Itself,
        ..super::made("vision_tower.timm_model.conv_stem.conv.bias", "v.conv_stem.conv.bias", Make::Channels)
    },
    weight("vision_tower.timm_model.conv_stem.bn", "v.conv_stem.bn"),
    Rule { need: Need::Weight, ..over("vision_tower.timm_model.msfa.ffn.pw_exp.conv", "v.msfa.ffn.pw_exp.conv") },
    weight("vision_tower.timm_model.msfa.ffn.pw_exp.bn", "v.msfa.ffn.pw_exp.bn"),
    Rule { need: Need::Weight, ..over("vision_tower.timm_model.msfa.ffn.pw_proj.conv", "v.msfa.ffn.pw_proj.conv") },
    weight("vision_tower.timm_model.msfa.ffn.pw_proj.bn", "v.msfa.ffn.pw_proj.bn"),
    weight("vision_tower.timm_model.msfa.norm", "v.msfa.norm"),
    weight("embed_vision.embedding", "mm.embedding"),
    weight("embed_vision.hard_embedding_norm", "mm.hard_emb_norm"),
    weight("embed_vision.soft_embedding_norm", "mm.soft_emb_norm"),
    weight("embed_vision.embedding_projection", "mm.input_projection"),
];

/// What is in blocks, which have a number within their stage.
const WITHIN: &[Rule] = &[
    over("vision_tower.timm_model.blocks.{}.conv_exp", "v.blk.{}.conv_exp"),
    norm("vision_tower.timm_model.blocks.{}.bn1", "v.blk.{}.bn1"),
    over("vision_tower.timm_model.blocks.{}.conv_pwl", "v.blk.{}.conv_pwl"),
    norm("vision_tower.timm_model.blocks.{}.bn2", "v.blk.{}.bn2"),
    over("vision_tower.timm_model.blocks.{}.dw_start.conv", "v.blk.{}.dw_start.conv"),
    norm("vision_tower.timm_model.blocks.{}.dw_start.bn", "v.blk.{}.dw_start.bn"),
    over("vision_tower.timm_model.blocks.{}.dw_mid.conv", "v.blk.{}.dw_mid.conv"),
    norm("vision_tower.timm_model.blocks.{}.dw_mid.bn", "v.blk.{}.dw_mid.bn"),
    over("vision_tower.timm_model.blocks.{}.pw_exp.conv", "v.blk.{}.pw_exp.conv"),
    norm("vision_tower.timm_model.blocks.{}.pw_exp.bn", "v.blk.{}.pw_exp.bn"),
    over("vision_tower.timm_model.blocks.{}.pw_proj.conv", "v.blk.{}.pw_proj.conv"),
    norm("vision_tower.timm_model.blocks.{}.pw_proj.bn", "v.blk.{}.pw_proj.bn"),
    norm("vision_tower.timm_model.blocks.{}.norm", "v.blk.{}.norm"),
    over("vision_tower.timm_model.blocks.{}.attn.query.proj", "v.blk.{}.attn.query.proj"),
    over("vision_tower.timm_model.blocks.{}.attn.key.proj", "v.blk.{}.attn.key.proj"),
    over("vision_tower.timm_model.blocks.{}.attn.key.down_conv", "v.blk.{}.attn.key.down_conv"),
    norm("vision_tower.timm_model.blocks.{}.attn.key.norm", "v.blk.{}.attn.key.norm"),
    over("vision_tower.timm_model.blocks.{}.attn.value.proj", "v.blk.{}.attn.value.proj"),
    over("vision_tower.timm_model.blocks.{}.attn.value.down_conv", "v.blk.{}.attn.value.down_conv"),
    norm("vision_tower.timm_model.blocks.{}.attn.value.norm", "v.blk.{}.attn.value.norm"),
    over("vision_tower.timm_model.blocks.{}.attn.output.proj", "v.blk.{}.attn.output.proj"),
    // llama.cpp multiplies pictures by it, and its converter writes it as a vector, at which llama.cpp stops.
    Rule {
        need: Need::Nothing,
        ..super::made(
            "vision_tower.timm_model.blocks.{}.layer_scale.gamma",
            "v.blk.{}.layer_scale.gamma",
            Make::Channels,
        )
    },
];

/// Gemma 3n with a vision tower of MobileNetV5-300M's kind; others have no place in llama.cpp.
pub(super) const GEMMA3N: Kind = Kind {
    id: "gemma3nv",
    model_types: &["gemma3n"],
    architectures: &["gemma3n"],
    prefixes: &["vision_tower.", "embed_vision."],
    rules: &[AROUND, WITHIN],
    hears: true,
    // What llama.cpp's converter says, and llama.cpp counts for itself.
    usual: &[("num_hidden_layers", 128), ("intermediate_size", 8192), ("num_attention_heads", 8), ("patch_size", 3)],
    settings: |said, out| {
        let tower = said.vision["architecture"].as_str().unwrap_or("mobilenetv5_300m_enc");
        if !tower.starts_with("mobilenetv5_300m") {
            return Err(format!(
                "vision_config has the architecture {tower}, and llama.cpp computes MobileNetV5 alone"
            ));
        }
        let of = |value: i64| u32::try_from(value).ok().filter(|value| *value > 0);
        let size = integer(&said.preprocessor["size"]["height"]).and_then(of).unwrap_or(768);
        let tokens = integer(&said.preprocessor["image_seq_length"]).and_then(of).unwrap_or(256);
        let mut own = vec![("patch_size", MetadataValue::U32((size / tokens).max(1)))];
        // Pictures go in as they are unless it is said otherwise, whatever they would be shifted and divided by.
        if said.preprocessor["do_normalize"].as_bool() != Some(true) {
            for (key, value) in [("image_mean", 0.0), ("image_std", 1.0)] {
                own.push((key, array(vec![MetadataValue::F32(value); 3], GGUFValueType::F32)?));
            }
        }
        for (key, value) in own {
            let key = format!("clip.vision.{key}");
            out.retain(|(name, _)| *name != key);
            out.push((key, value));
        }
        count(out, "image_size", size);
        float(out, "attention.layer_norm_epsilon", real(&said.vision["layer_norm_eps"]).unwrap_or(1e-6));
        Ok(())
    },
    ..PLAIN
};
